"""The architecture: a module imports only modules above it
in the table of rooms; lines, modules and cells are short."""
import ast
import json
import re
from pathlib import Path

ROOT = Path(__file__).parents[1]
# notebook and module, from the first floor up
TABLE = re.findall(r"^\| (\d\d_\w+) \| (\w+) \|", (ROOT / "CONTRIBUTING.md").read_text(), re.M)
ROOMS = [room for _, room in TABLE]
LONG_SHARE = 0.145   # of exported cells has more than 25 lines, most of them one class each; it only goes down


def project_imports(path: Path) -> set:
    "Names of the project's modules that a file imports, also inside functions; nbdev makes these imports relative."
    found = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            found |= {a.name for a in node.names}
        elif isinstance(node, ast.ImportFrom):
            module = f"datasel_wb.{node.module or ''}".rstrip(".") if node.level else node.module
            found |= {module} if module != "datasel_wb" else {f"datasel_wb.{a.name}" for a in node.names}
    return {name.split(".")[1] for name in found if name.startswith("datasel_wb.")} & set(ROOMS)


def test_the_reader_of_imports_sees_them(tmp_path):
    file = tmp_path / "m.py"
    file.write_text("from .core import Batch\nfrom datasel_wb import images\nimport datasel_wb.runs\n"
                    "def f():\n    from . import charts\n")
    assert project_imports(file) == {"core", "images", "runs", "charts"}


def test_the_table_has_every_notebook_and_names_its_module():
    assert {n for n, _ in TABLE} == {p.stem for p in (ROOT / "nbs").glob("[0-9][0-9]_*.ipynb")}
    assert len(TABLE) == len(set(ROOMS))
    assert all(n[3:] == room for n, room in TABLE)


def test_every_module_is_a_room():
    modules = {p.stem for p in (ROOT / "datasel_wb").glob("*.py")} - {"__init__", "_modidx"}
    assert modules == set(ROOMS)


def test_imports_only_downward():
    for i, room in enumerate(ROOMS):
        above = project_imports(ROOT / "datasel_wb" / f"{room}.py") - set(ROOMS[:i])
        assert not above, f"{room} imports {sorted(above)}, which stand below it in the table of rooms"


def test_torch_xla_is_imported_nowhere_at_import_time():
    for room in ROOMS:
        assert "torch_xla" not in (ROOT / "datasel_wb" / f"{room}.py").read_text() or room in ("tpu_trainer", "names")


def code_cells(path: Path) -> list:
    "The sources of a notebook's code cells, but those that are written from settings."
    return ["".join(c["source"]) for c in json.loads(path.read_text())["cells"]
            if c["cell_type"] == "code" and "parameters" not in c["metadata"].get("tags", [])]


def test_lines_have_at_most_120_columns():
    texts = {p: re.sub(r"# %% auto #0\n.*?\n\n", "", p.read_text(), flags=re.S)
             for folder in ("datasel_wb", "tests", "docs") for p in (ROOT / folder).glob("*.py")
             if p.name != "_modidx.py"}
    texts |= {p: "\n".join(code_cells(p)) for p in (ROOT / "nbs").glob("*.ipynb")}
    wide = [f"{p.relative_to(ROOT)}: {line.strip()[:60]}..." for p, text in texts.items()
            for line in text.split("\n") if len(line) > 120]
    assert len(texts) > 120 and not wide, "\n".join(wide)


def test_modules_have_at_most_520_lines():
    lines = {room: (ROOT / "datasel_wb" / f"{room}.py").read_text().count("\n") for room in ROOMS}
    assert max(lines.values()) <= 520, {room: n for room, n in lines.items() if n > 520}


def test_exported_cells_do_not_grow():
    exported = [c for p in (ROOT / "nbs").glob("[0-9]*.ipynb") for c in code_cells(p) if c.startswith("#| export")]
    long = sum(c.count("\n") + 1 > 25 for c in exported)
    assert len(exported) > 450 and long <= LONG_SHARE * len(exported), (
        f"{long} of {len(exported)} exported cells have more than 25 lines, {LONG_SHARE:.1%} are allowed; "
        "split the new ones")
