"""Execute a notebook of the documentation and store it with its outputs, for `make docs` to show.

Of printed text, progress bars, colours and warnings are left out, and of the training's log all but
one line an epoch; photographs become JPEG.
"""

import argparse
import base64
import io
import re
from pathlib import Path

import nbclient
import nbformat
from PIL import Image

LINE = re.compile(r'[\r\n]+')
COLOURS = re.compile(r'\x1b\[[0-9;]*m')
# Progress, warnings and what packages say of themselves.
NOISE = re.compile(r'%\||Warning|warn\(|OneDL|Loads checkpoint|WARNING')
EPOCH = re.compile(r' - mmengine - INFO - Epoch\((train|val)\) +\[(\d+)\]')


def text_of(outputs: list) -> str:
    """What was printed, without noise."""
    printed = ''.join(output.text for output in outputs if output.output_type == 'stream')
    lines = [line for line in LINE.split(COLOURS.sub('', printed)) if not NOISE.search(line)]
    # Of an epoch, the last line.
    epochs = {match.groups(): line for line in lines if (match := EPOCH.search(line))}
    lines = list(epochs.values()) or lines
    return '\n'.join(line for line in lines if line.strip())


def picture(data: dict, quality: int = 82) -> dict:
    """A PNG as JPEG, where that is smaller."""
    raw = base64.b64decode(data['image/png'])
    image, file = Image.open(io.BytesIO(raw)).convert('RGB'), io.BytesIO()
    image.thumbnail((1200, 1200))
    image.save(file, 'JPEG', quality=quality, optimize=True)
    if len(file.getvalue()) > len(raw) / 2:
        return data
    others = {kind: value for kind, value in data.items() if kind != 'image/png'}
    return {**others, 'image/jpeg': base64.b64encode(file.getvalue()).decode()}


def clean(notebook: nbformat.NotebookNode) -> None:
    for cell in notebook.cells:
        cell.metadata.pop('execution', None)
        if cell.cell_type != 'code':
            continue
        shown = [output for output in cell.outputs if output.output_type != 'stream']
        for output in shown:
            if 'image/png' in output.get('data', {}):
                output.data = picture(output.data)
        if text := text_of(cell.outputs):
            shown.insert(0, nbformat.v4.new_output('stream', name='stdout', text=f'{text}\n'))
        cell.outputs = shown
    notebook.metadata.language_info = {'name': 'python', 'pygments_lexer': 'ipython3'}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument('notebook', nargs='?', type=Path, default='docs/scene_digits.ipynb')
    args = parser.parse_args()
    notebook = nbformat.read(args.notebook, as_version=4)
    nbclient.NotebookClient(notebook, timeout=None, resources={'metadata': {'path': '.'}}).execute()
    clean(notebook)
    nbformat.write(notebook, args.notebook)
    print(f'notebook: {args.notebook} ({args.notebook.stat().st_size / 2**20:.1f} MiB)')


if __name__ == '__main__':
    main()
