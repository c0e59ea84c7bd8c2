"""Sphinx configuration: sphinx-build -W --keep-going -b html docs docs/_build/html."""

import re
from pathlib import Path

root = Path(__file__).resolve().parent.parent
version_line = re.search(r'^__version__ = "(.+)"$', (root / "distill_optim" / "__init__.py").read_text("utf-8"), re.M)
assert version_line is not None

project = "distill_optim"
author = "the distill_optim authors"
copyright = author
version = release = version_line.group(1)

extensions = ["myst_parser", "sphinx.ext.autodoc", "sphinx.ext.napoleon", "sphinx.ext.mathjax"]
myst_enable_extensions = ["amsmath", "dollarmath"]
myst_heading_anchors = 3
# An equation that is wider than the page is broken into lines: on a phone nobody would see that it can be scrolled.
mathjax4_config = {"output": {"displayOverflow": "linebreak"}}

# "maximize, foreach: as in torch" documents several arguments in one line, so types stay in the signature.
autodoc_typehints = "signature"
autodoc_typehints_format = "short"
autodoc_member_order = "bysource"
autodoc_preserve_defaults = True
maximum_signature_line_length = 88
napoleon_numpy_docstring = False

exclude_patterns = ["_build"]
html_theme = "furo"
# Removed lines red, added lines green, in both modes.
pygments_style = "default"
pygments_dark_style = "native"
html_title = f"distill_optim {release}"
html_static_path = ["_static"]
html_css_files = ["custom.css"]
