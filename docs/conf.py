"""Settings of the documentation site; `make docs` builds it with warnings as errors."""

import os
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent / "_ext"))
for name in [name for name in os.environ if name.startswith("PETALS_")]:
    del os.environ[name]  # defaults shown on the site are those of an empty environment

import petals  # noqa: E402

project = "Petals"
release = version = petals.__version__
copyright = "the Petals authors"  # noqa: A001

extensions = ["myst_parser", "sphinx.ext.autodoc", "petals_docs"]
exclude_patterns = ["_ext"]
default_role = "code"
smartquotes = False  # they make one dash of the two in --join

myst_enable_extensions = ["attrs_inline", "colon_fence"]
myst_heading_anchors = 3
suppress_warnings = ["myst.header"]  # files of results are shown as they are

toc_object_entries_show_parents = "hide"
autodoc_member_order = "bysource"
autodoc_typehints = "signature"
autodoc_typehints_format = "short"
autodoc_preserve_defaults = True
python_maximum_signature_line_length = 80
add_module_names = False

html_theme = "furo"
html_title = "Petals"
html_static_path = ["_static"]
html_css_files = ["petals.css"]
html_copy_source = False
html_theme_options = {"navigation_with_keys": False}
