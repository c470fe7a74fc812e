import base64
import io

import numpy as np
import pytest
from PIL import Image

nbformat = pytest.importorskip('nbformat', reason='comes with docs/requirements.txt')
pytest.importorskip('nbclient', reason='comes with docs/requirements.txt')

from execute_notebook import main  # noqa: E402

CODE = r"""
import sys
from IPython.display import Image, display
print('\r 50%|##', end='')
print('\r100%|##')
for epoch in (1, 2):
    for i in (5, 10):
        print(f'11/29 12:00:00 - mmengine - \x1b[4mINFO\x1b[0m - Epoch(train) [{epoch}][{i}/10] ok')
print('UserWarning: noise', file=sys.stderr)
display(Image('noise.png'))
"""


@pytest.mark.slow
def test_execute_notebook(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    pixels = np.random.default_rng(0).normal(128, 20, (90, 120, 3)).clip(0, 255).astype(np.uint8)
    Image.fromarray(pixels).resize((1800, 1350), Image.BICUBIC).save('noise.png')
    notebook = nbformat.v4.new_notebook(
        cells=[nbformat.v4.new_code_cell(CODE), nbformat.v4.new_code_cell("print('result')")]
    )
    nbformat.write(notebook, 'a.ipynb')
    monkeypatch.setattr('sys.argv', ['execute_notebook.py', 'a.ipynb'])
    main()
    assert 'a.ipynb' in capsys.readouterr().out
    first, second = nbformat.read('a.ipynb', 4).cells
    text, picture = first.outputs
    start = '11/29 12:00:00 - mmengine - INFO - Epoch(train)'
    assert text.text == f'{start} [1][10/10] ok\n{start} [2][10/10] ok\n'
    drawn = Image.open(io.BytesIO(base64.b64decode(picture.data['image/jpeg'])))
    assert drawn.size == (1200, 900)
    assert second.outputs[0].text == 'result\n'
    assert second.execution_count == 2
