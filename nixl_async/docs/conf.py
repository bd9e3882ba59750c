"""How Sphinx builds this site: `sphinx-build -W -b html nixl_async/docs OUTPUT`, from the checkout."""

from __future__ import annotations

import sys
from pathlib import Path

HERE = Path(__file__).resolve().parent
sys.path[:0] = [str(HERE), str(HERE.parents[1])]

import nixl_async  # noqa: E402 - where it is found is said above

project = "nixl_async"
release = version = nixl_async.__version__
copyright = "the nixl_async authors"
language = "en"

extensions = [
    "myst_parser",
    "sphinx.ext.autodoc",
    "sphinx.ext.napoleon",
    "sphinx_copybutton",
    "directives",
]
source_suffix = {".md": "markdown"}
exclude_patterns = ["__pycache__"]
nitpicky = True
# Other libraries' objects are not looked up: a build reaches no other host.
nitpick_ignore_regex = [(r"py:.*", r"(?!nixl_async\.).*"), (r"py:obj", r".*"), (r"py:class", r"nixl_async\.backend\.T")]
smartquotes_action = "D"

myst_enable_extensions = ["colon_fence", "deflist", "fieldlist"]
myst_heading_anchors = 3

# Docstrings put code in single backquotes; what is an object becomes a link.
default_role = "py:obj"
autodoc_member_order = "bysource"
autodoc_typehints_format = "short"
autodoc_class_signature = "mixed"
autodoc_preserve_defaults = True
autodoc_type_aliases = {name: name for name in ("Array", "ArrayLike", "Bytes", "Places", "Token")}
python_use_unqualified_type_names = True
python_maximum_signature_line_length = 88
napoleon_numpy_docstring = False
napoleon_use_rtype = False
napoleon_custom_sections = [("Promises", "notes"), ("Obligations", "notes")]

html_theme = "furo"
html_title = f"nixl_async {release}"
html_static_path = ["_static"]
html_css_files = ["site.css"]
html_copy_source = False
html_show_sphinx = False
html_theme_options = {"navigation_with_keys": True}
copybutton_prompt_text = "$ "
