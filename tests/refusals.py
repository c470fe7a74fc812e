"""How programs end on what they refuse."""

import contextlib
import io
from collections.abc import Callable

import pytest


def refusal(main: Callable[[list[str]], None], argv: list[str]) -> str:
    """The one line on the terminal with which a program ends, with an exit code that says so."""
    said = io.StringIO()
    with contextlib.redirect_stderr(said), pytest.raises(SystemExit) as end:
        main(argv)
    if isinstance(end.value.code, str):  # Python says it, and the exit code is 1
        said.write(f'{end.value.code}\n')
    else:
        assert end.value.code not in (0, None)
    lines = said.getvalue().splitlines()
    assert len(lines) == 1, said.getvalue()
    assert lines[0].startswith('error: ')
    return lines[0]
