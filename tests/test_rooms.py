"""The architecture: a module imports only modules above it in the table of rooms."""
import ast
import re
from pathlib import Path

ROOT = Path(__file__).parents[1]
# notebook and module, from the first floor up
TABLE = re.findall(r"^\| (\d\d_\w+) \| (\w+) \|", (ROOT / "CONTRIBUTING.md").read_text(), re.M)
ROOMS = [room for _, room in TABLE]


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
    file.write_text("from .core import Batch\nfrom datasel_wb import images\nimport datasel_wb.runs\ndef f():\n    "
                    "from . import charts\n")
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
