"""Pages of the site: notebooks made ready for myst-nb, section pages, the API reference written from the package."""
import ast
import base64
import hashlib
import json
import re
import shutil
from pathlib import Path

import nbformat

import api

SECTIONS = {   # page -> title, pattern of its notebooks, others by name, what it is
    "guide": ("Guide", r"guide_.*", ("tour", "find_noise", "explore"),
              "From the first run to your own loop, in short notebooks."),
    "methods": None,
    "library": ("Library", r"\d\d_.*", (),
                "One notebook per module: why, the maths, the code, and a value that is shown and asserted."),
    "runs": ("Runs", r"run_.*", (), "Experiments with parameters, from data to result; each is executed by papermill."),
    "measured": ("Results", None, ("results", "published", "benchmarks", "full_scale"),
                 "What was measured, with the commands; also where a method loses."),
    "api": None,
    "project": None,
}
TEXTS = {"changelog": "CHANGELOG.md", "contributing": "CONTRIBUTING.md"}   # page -> file of the repository
CHART = "application/vnd.vegalite.v5+json"
WIDGETS = ("application/vnd.jupyter.widget-view+json", "application/javascript")


def sections(notebooks) -> dict:
    "Names of the notebooks of each section, in order. `ValueError` for a notebook that has no place."
    left, found = set(notebooks) - {"index", "methods"}, {}
    for page, section in SECTIONS.items():
        if section is None: continue
        _, pattern, named, _ = section
        mine = sorted(n for n in left if pattern and re.fullmatch(pattern, n))
        found[page] = mine + [n for n in named if n in left]
        left -= set(found[page])
    if left:
        raise ValueError(
            f"notebooks {', '.join(sorted(left))}: in no section of the site; name them in SECTIONS of docs/pages.py")
    return found


def summary(notebook) -> tuple:
    "Title of a notebook and the line under it."
    first = notebook.cells[0].source
    title, line = re.search(r"^# (.+)$", first, re.M), re.search(r"^> (.+)$", first, re.M)
    if not (title and line):
        raise ValueError(f"{first[:40]!r}: a notebook begins with a title (# ...) and a line about it (> ...)")
    return title[1], line[1]


def escape(text: str) -> str:
    "Text for an HTML attribute."
    return text.replace("&", "&amp;").replace('"', "&quot;").replace("<", "&lt;")


def live_chart(output, extra: Path) -> str:
    "HTML of a chart: its specification, drawn by charts.js, and its picture until then."
    shown = output.metadata.get("image/png", {})
    png = base64.b64decode(output.data["image/png"])
    name = f"{hashlib.sha256(png).hexdigest()[:16]}.png"
    (extra / "charts" / name).write_bytes(png)
    size = " ".join(f'{k}="{shown[k]}"' for k in ("width", "height") if k in shown)
    # without the version of Vega-Lite, which is JupyterLab's: the site draws with the newest
    chart = {k: v for k, v in output.data[CHART].items() if k != "$schema"}
    alt = escape(shown.get("alt") or "chart")
    spec = json.dumps(chart).replace("</", "<\\/")
    return (f'<figure class="chart" tabindex="0" aria-label="{alt}"><script type="application/json">{spec}</script>'
            f'<img src="charts/{name}" alt="{alt}" {size} loading="lazy"></figure>')


def ready_output(output, heading: str, extra: Path) -> None:
    "Change an output into what a static page can show."
    if output.output_type not in ("execute_result", "display_data"): return
    for kind in WIDGETS: output.data.pop(kind, None)
    if CHART in output.data: output.data = {"text/html": live_chart(output, extra)}
    output.data.pop("image/jpeg", None)   # the picture as PNG is there too
    if "image/png" in output.data: output.metadata.setdefault("image/png", {}).setdefault("alt", f"Pictures: {heading}")


def exported_names(source: str) -> list:
    "Names that a cell defines at its top level."
    found = []
    for node in ast.parse(source).body:
        targets = [node.target] if isinstance(node, ast.AnnAssign) else getattr(node, "targets", [])
        found += [n.id for t in targets for n in ast.walk(t) if isinstance(n, ast.Name)]
        if hasattr(node, "name"): found.append(node.name)
    return found


def ready_cell(c, heading: str, extra: Path) -> None:
    "Change a code cell into what a static page can show."
    if re.search(r"^#\| *echo: *false", c.source, re.M): c.metadata["tags"] = ["remove-input"]
    c.source = re.sub(r"^#\|.*\n?", "", c.source, flags=re.M)
    for o in c.outputs: ready_output(o, heading, extra)


def ready_notebook(notebook, name: str, extra: Path) -> dict:
    "Take out directives and hidden cells, make charts live, label each exported cell; the labels by exported name."
    cells, heading, labels = [], name, {}
    for c in notebook.cells:
        directives = re.findall(r"^#\| *(\w+)", c.source, re.M)
        if {"hide", "default_exp"} & set(directives): continue
        if c.cell_type == "markdown": heading = ([heading] + re.findall(r"^#+ (.+)$", c.source, re.M))[-1]
        else: ready_cell(c, heading, extra)
        if "export" in directives and (names := exported_names(c.source)):
            label = f"source-{name}-{c.id}"
            labels |= dict.fromkeys(names, label)
            c.metadata["tags"] = ["exported"]
            cells.append(nbformat.v4.new_markdown_cell(f"({label})="))
        cells.append(c)
    notebook.cells = cells
    notebook.metadata.pop("widgets", None)
    notebook.metadata["language_info"] = {"name": "python", "pygments_lexer": "python3"}
    return labels


def toctree(names) -> str:
    "A toctree that shows in the navigation only."
    return "\n".join(["```{toctree}", ":hidden:", "", *names, "```"])


def section_page(page: str, names: list, about: dict) -> str:
    "The page of a section: a card for each notebook."
    title, _, _, text = SECTIONS[page]
    cards = [f"```{{grid-item-card}} {about[n][0]}\n:link: {n}\n:link-type: doc\n\n{about[n][1]}\n```" for n in names]
    return "\n\n".join([f"# {title}", text, "````{grid} 1 1 2 2\n:gutter: 3\n", *cards, "````", toctree(names)])


def project_page() -> str:
    "The page of the repository's own texts."
    return "\n\n".join(["# Project", "- [Changelog](changelog.md)\n- [Contributing](contributing.md)", toctree(TEXTS)])


def stage(root: Path, work: Path) -> None:
    "Write all pages into `work/pages`, and their files into `work/extra`."
    pages, extra = work / "pages", work / "extra"
    for folder in (pages, extra / "charts"): folder.mkdir(parents=True)
    notebooks = {p.stem: nbformat.read(p, 4) for p in sorted((root / "nbs").glob("*.ipynb"))}
    about = {n: summary(nb) for n, nb in notebooks.items()}
    parts = sections(notebooks)
    texts = {f"{page}.md": section_page(page, names, about) for page, names in parts.items()}
    texts |= {f"{page}.md": (root / file).read_text().replace("](nbs/", "](") for page, file in TEXTS.items()}
    notebooks["index"].cells.append(nbformat.v4.new_markdown_cell(toctree(SECTIONS)))
    labels = {n: ready_notebook(nb, n, extra) for n, nb in notebooks.items()}
    texts |= {f"{n}.ipynb": nbformat.writes(nb) for n, nb in notebooks.items()}
    texts |= {"project.md": project_page()} | api.pages({n: labels[n] for n in parts["library"]})
    for name, text in texts.items(): (pages / name).write_text(text)
    shutil.copytree(root / "nbs" / "images", pages / "images")
