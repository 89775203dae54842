"""Settings of the docs site; `build.py` calls Sphinx with them."""
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent))

import datasel_wb  # noqa: E402

project = "datasel_wb"
copyright = "2026 onwards, the datasel_wb developers"
version = release = datasel_wb.__version__

extensions = ["myst_nb", "sphinx_design", "sphinx_copybutton", "site_parts"]
nb_execution_mode = "off"
nb_output_stderr = "remove"
nb_merge_streams = True
myst_enable_extensions = ["dollarmath", "amsmath", "fieldlist", "colon_fence"]
myst_heading_anchors = 4
myst_links_external_new_tab = False

html_theme = "pydata_sphinx_theme"
html_title = "datasel_wb"
html_context = {"default_mode": "auto"}
html_favicon = "static/icon.svg"
html_static_path = ["static"]
html_extra_path = [str(Path(__file__).resolve().parents[1] / "_proc" / "extra")]
html_css_files = ["site.css"]
html_use_index = False
html_domain_indices = False
html_copy_source = False
html_show_sourcelink = False
html_sidebars = {"methods": []}   # no pages below it
html_theme_options = dict(
    navbar_align="left", header_links_before_dropdown=8, show_toc_level=2, show_prev_next=True,
    secondary_sidebar_items=["page-toc"], footer_start=["copyright"], footer_end=[], back_to_top_button=False)
smartquotes = False
add_module_names = False
python_maximum_signature_line_length = 88
toc_object_entries_show_parents = "hide"
