import pytest


@pytest.fixture(scope='module', autouse=True)
def _from_the_root(pytestconfig):
    """Programs are run as users do: paths of configs are relative to the checkout."""
    with pytest.MonkeyPatch.context() as monkeypatch:
        monkeypatch.chdir(pytestconfig.rootpath)
        yield
