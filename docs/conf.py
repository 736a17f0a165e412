"""Configuration of the documentation site: `sphinx-build -W docs site`."""

import sys
from pathlib import Path

DOCS = Path(__file__).parent
sys.path[:0] = [str(DOCS.parent), str(DOCS / "_ext")]

import sam_hf  # noqa: E402 - the package of this checkout

project = "sam_hf"
author = "The sam_hf contributors"
copyright = f"2026, {author}"
release = version = sam_hf.__version__

extensions = [
    "myst_nb",
    "sphinx.ext.autodoc",
    "sphinx.ext.napoleon",
    "sphinx_copybutton",
    "sphinx_design",
    "generated",  # docs/_ext/generated.py: pages made from the code
]
exclude_patterns = ["_build", "_ext", "**.ipynb_checkpoints"]
nitpicky = False

myst_enable_extensions = ["colon_fence", "deflist", "dollarmath", "fieldlist"]
myst_heading_anchors = 3
nb_execution_mode = "off"  # outputs are committed; a slow test runs the notebooks

# Docstrings write names in single backticks.
default_role = "code"
autodoc_member_order = "bysource"
autodoc_typehints = "none"
autodoc_default_options = {"members": True}
napoleon_google_docstring = True
napoleon_numpy_docstring = False

html_theme = "furo"
html_title = f"sam_hf {release}"
html_theme_options = {
    "source_repository": "https://github.com/sam-hf/sam_hf/",
    "source_branch": "main",
    "source_directory": "docs/",
}
copybutton_prompt_text = r"\$ |>>> "
copybutton_prompt_is_regexp = True
