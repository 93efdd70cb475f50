"""How the pages are built: make docs."""

import os
import sys
from pathlib import Path

os.environ.setdefault("KERAS_BACKEND", "torch")
sys.path.insert(0, str(Path(__file__).parents[1]))

from lstmfused import __version__

project = "lstmfused"
version = release = __version__
extensions = [
    "myst_parser",
    "sphinx.ext.autodoc",
    "sphinx.ext.napoleon",
    "sphinx_copybutton",
]
exclude_patterns = ["_build"]

myst_heading_anchors = 3
autodoc_member_order = "bysource"
autodoc_typehints = "none"
napoleon_custom_sections = [("Shape", "notes_style")]
copybutton_exclude = ".linenos, .gp, .go"

nitpicky = True
nitpick_ignore_regex = [  # what is documented elsewhere
    ("py:.*", r"(torch|keras|collections)\..*"),
    ("py:.*", r"(Any|Tensor|NotImplementedError|NamedTuple|Iterator|nn\..*)"),
]

html_theme = "furo"
html_title = "lstmfused"
html_show_sphinx = False
html_show_copyright = False
html_static_path = ["_static"]
html_css_files = ["pages.css"]
