"""Settings of the documentation site; `make docs` builds it."""

import os
import sys
import warnings
from importlib import metadata
from pathlib import Path
from typing import Any

HERE = Path(__file__).parent
sys.path.insert(0, str(HERE / "extensions"))

# Set before torch is imported: pictures and numbers of the gallery are then the same on every machine.
os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")

project = "tucka"
copyright = "the authors of tucka"
release = metadata.version("tucka")

extensions = [
    "myst_parser",
    "sphinx.ext.autodoc",
    "sphinx.ext.autosummary",
    "numpydoc",
    "sphinx_gallery.gen_gallery",
    "sphinx_copybutton",
    "sphinx_design",
    "breaks",
    "mathml",
    "named_tuples",
]
exclude_patterns = ["_build", "gallery", "Thumbs.db", ".DS_Store"]
templates_path = ["_templates"]
html_static_path = ["_static"]
html_css_files = ["site.css"]
html_favicon = "_static/icon.svg"

# --- pages -----------------------------------------------------------------------------------------------------------

myst_enable_extensions = ["colon_fence", "dollarmath", "deflist"]
myst_heading_anchors = 3
highlight_language = "none"
html_math_renderer = "mathml"
suppress_warnings = ["config.cache"]  # the order of a gallery is a function, which no cache can hold

# --- reference -------------------------------------------------------------------------------------------------------

default_role = "py:obj"
add_module_names = False
toc_object_entries_show_parents = "hide"  # the list beside a page is narrow
autodoc_typehints = "none"  # the docstrings say shapes as well
autodoc_member_order = "bysource"
autosummary_generate = True
autosummary_filename_map = {  # file systems that ignore case hold one of them otherwise
    "analysis.sweeps.Plan": "analysis.sweeps.Plan-class",
    "tucka.ranks.Spectra": "tucka.ranks.Spectra-class",
}
numpydoc_show_class_members = False  # the templates list them
numpydoc_class_members_toctree = False

# --- gallery ---------------------------------------------------------------------------------------------------------

sphinx_gallery_conf = {
    "examples_dirs": "gallery",
    "gallery_dirs": "auto/gallery",
    "filename_pattern": r"/plot_",
    "ignore_pattern": r"digits\.py$",
    "within_subsection_order": "FileNameSortKey",
    "download_all_examples": False,
    "remove_config_comments": True,
    "show_memory": False,
    "show_signature": False,
    "write_computation_times": False,
    "min_reported_time": 3600,  # seconds of the machine that built the site say nothing
    "doc_module": ("tucka", "analysis"),
    "backreferences_dir": "auto/backreferences",
    "reference_url": {"tucka": None, "analysis": None},  # names in the code lead to their pages
    "log_level": {"backreference_missing": "debug"},
}
warnings.filterwarnings("ignore", category=DeprecationWarning)
warnings.filterwarnings("ignore", message=".*is_gradient_checkpointing.*")

# --- looks -----------------------------------------------------------------------------------------------------------

html_theme = "pydata_sphinx_theme"
html_title = "tucka"
html_show_sourcelink = False
html_context = {"default_mode": "auto"}
html_theme_options: dict[str, Any] = {
    "logo": {"text": "tucka", "image_light": "_static/icon.svg", "image_dark": "_static/icon.svg", "alt_text": ""},
    "navbar_align": "left",
    "header_links_before_dropdown": 8,
    "show_prev_next": True,
    "show_toc_level": 2,
    "navigation_depth": 3,
    "collapse_navigation": True,
    "footer_start": ["copyright"],
    "footer_end": ["theme-version"],
    "pygments_light_style": "tango",
    "pygments_dark_style": "monokai",
}
html_sidebars = {page: [] for page in ("index", "mathematics", "faq", "changelog")}  # no pages below them
