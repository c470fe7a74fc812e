"""A real browser without a screen, in which tests open pages."""

import html
import re
import shutil
import subprocess
from pathlib import Path

import pytest

PROGRAMS = ('chromium', 'chromium-browser', 'google-chrome', 'google-chrome-stable')


def open_page(page: Path, fragment: str = '', script: str = '') -> str:
    """The elements of a page as text, after its scripts have run.

    Args:
        page (Path): A file.
        fragment (str): What follows # in its address. Default: none.
        script (str): Is added to a copy of the page and runs when it has been loaded; it can call
            ``report(object)``, which :func:`reported` returns. Default: none.
    """
    program = next(filter(None, map(shutil.which, PROGRAMS)), None)
    if program is None:
        pytest.skip('no Chromium is installed')
    if script:
        copy = page.with_name('copy.html')
        added = (
            '<pre id="report"></pre><script>function report(value) {'
            "document.getElementById('report').textContent = JSON.stringify(value); }"
            "window.addEventListener('load', () => setTimeout(() => { %s }, 50));</script>"
        )
        copy.write_text(page.read_text().replace('</body>', added % script + '</body>'))
        page = copy
    command = [
        program,
        *('--headless', '--no-sandbox', '--disable-gpu', '--disable-dev-shm-usage'),
        # Nothing outside the page: a name that does not resolve for every host.
        *('--host-resolver-rules=MAP * ~NOTFOUND', '--disable-background-networking'),
        f'--user-data-dir={page.parent / "browser"}',
        *('--window-size=1280,1400', '--virtual-time-budget=10000', '--dump-dom'),
        f'{page.resolve().as_uri()}{"#" + fragment if fragment else ""}',
    ]
    result = subprocess.run(command, capture_output=True, text=True, timeout=300)
    assert result.returncode == 0, result.stderr
    return result.stdout


def attributes(page: str, identity: str) -> dict[str, str]:
    """Attributes of the element with an id."""
    (start,) = re.findall(rf'<\w+ ([^>]*id="{identity}"[^>]*)>', page)
    return {k: html.unescape(v) for k, v in re.findall(r'([\w-]+)="([^"]*)"', start)}


def content(page: str, identity: str) -> str:
    """What is in the element with an id."""
    tag, inner = re.search(rf'<(\w+) [^>]*id="{identity}"[^>]*>(.*)', page, re.DOTALL).groups()
    return html.unescape(inner.partition(f'</{tag}>')[0])


def table(page: str, identity: str) -> list[list[float]]:
    """Numbers in a table."""
    rows = re.findall(r'<tr>(.*?)</tr>', content(page, identity), re.DOTALL)
    return [[float(n) for n in re.findall(r'<td[^>]*>([^<]*)</td>', row)] for row in rows]
