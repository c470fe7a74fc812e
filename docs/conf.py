"""Sphinx configuration; ``make docs`` builds offline and takes warnings for errors."""

import sys
from pathlib import Path

from docutils import nodes
from latex2mathml.converter import convert
from sphinx.application import Sphinx
from sphinx.util.docutils import SphinxTranslator

ROOT = Path(__file__).parents[1]
sys.path.insert(0, str(ROOT))

import acmix_mm  # noqa: E402

project = 'acmix_mm'
author = 'acmix_mm developers'
copyright = author
release = acmix_mm.__version__

extensions = [
    'myst_nb',
    'sphinx.ext.autodoc',
    'sphinx.ext.napoleon',
    'sphinx.ext.viewcode',
    'sphinx_copybutton',
]
exclude_patterns = ['_build']
html_theme = 'furo'
html_title = f'acmix_mm {release}'

# Markdown as GitHub shows it, too.
myst_enable_extensions = ['dollarmath', 'colon_fence']
myst_heading_anchors = 3
nb_execution_mode = 'off'  # tools/dev/execute_notebook.py does, and tests/test_docs.py
nb_render_markdown_format = 'gfm'  # tables

# Docstrings in Google's style with types, as OpenMMLab's. Signatures carry the types already.
autodoc_member_order = 'bysource'
autodoc_typehints = 'none'
autodoc_preserve_defaults = True
napoleon_google_docstring = True
napoleon_use_rtype = False
copybutton_exclude = '.linenos, .gp'

# Formulas as MathML, which browsers draw without a script from elsewhere.
html_math_renderer = 'mathml'


def inline_formula(self: SphinxTranslator, node: nodes.math) -> None:
    self.body.append(convert(node.astext()))
    raise nodes.SkipNode


def formula(self: SphinxTranslator, node: nodes.math_block) -> None:
    self.body.append(convert(node.astext(), display='block'))
    raise nodes.SkipNode


def setup(app: Sphinx) -> None:
    app.add_html_math_renderer('mathml', (inline_formula, None), (formula, None))
