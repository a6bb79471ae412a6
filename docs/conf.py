"""Sphinx settings: an offline site, with pages for the API and the registry made from the package."""

import sys
import tomllib
import warnings
from pathlib import Path

HERE = Path(__file__).resolve().parent
sys.path[:0] = [str(HERE.parent), str(HERE / "_ext")]
warnings.filterwarnings("ignore", message=r"\s*ArviZ is undergoing a major refactor", category=FutureWarning)

import generated_pages  # noqa: E402 - needs the path above

project = "vifamily"
author = "The vifamily authors"
copyright = "The vifamily authors, Apache-2.0"  # noqa: A001 - the name Sphinx reads
release = version = tomllib.loads((HERE.parent / "pyproject.toml").read_text("utf-8"))["project"]["version"]

generated_pages.write_all(HERE)

extensions = ["myst_parser", "sphinx.ext.autodoc", "sphinx.ext.napoleon", "sphinx.ext.viewcode", "mathml"]
exclude_patterns = ["_build", "_ext"]
suppress_warnings = ["config.cache"]

myst_enable_extensions = ["colon_fence", "deflist", "dollarmath"]
myst_heading_anchors = 3

autodoc_member_order = "bysource"
autodoc_typehints = "signature"
autodoc_typehints_format = "short"
autodoc_preserve_defaults = True
python_use_unqualified_type_names = True
napoleon_google_docstring = True
napoleon_numpy_docstring = False
napoleon_use_rtype = False  # "The posterior: draws, density" is a sentence, not a type and its description
napoleon_use_ivar = True  # as fields of the class: a dataclass would otherwise list each attribute twice

html_theme = "furo"
html_title = f"vifamily {release}"
html_static_path = ["_static"]
html_css_files = ["math.css"]
html_math_renderer = "mathml"
html_show_sourcelink = False
html_copy_source = False


def _leave_out_requests(app, what, name, obj, skip, options):
    """Leave out what scikit-learn adds to every estimator (``set_fit_request`` ...): it refers to its own site."""
    return True if name.startswith("set_") and name.endswith("_request") else skip


def setup(app):
    """Connect the hooks of this site."""
    app.connect("autodoc-skip-member", _leave_out_requests)
