"""The table of rooms in CONTRIBUTING.md: modules in the order of imports, their lines and longest functions. `python tests/rooms.py` writes the figures anew."""
import ast
import re
from pathlib import Path

ROOT = Path(__file__).parents[1]
ROW = re.compile(r"^\| (\d\d_\w+) \| (\w+) \| (?:(\d+) \| ([\w.]* \d+) \| )?(.*) \|$", re.M)   # notebook, module, lines, longest function, purpose
HEAD = "| notebook | module | {}its one responsibility |\n|---|---|{}---|\n"


def figures(room: str) -> tuple:
    "Lines of a module; its longest function, and the lines of that one without its signature and docstring."
    text = (ROOT / "datasel_wb" / f"{room}.py").read_text()
    found = [("", 0)]
    for owner in (n for n in ast.walk(ast.parse(text)) if isinstance(n, (ast.Module, ast.ClassDef))):
        for f in (n for n in owner.body if isinstance(n, ast.FunctionDef)):
            name = f"{owner.name}.{f.name}" if isinstance(owner, ast.ClassDef) else f.name
            found.append((name, f.end_lineno - f.body[0].lineno + (0 if ast.get_docstring(f) else 1)))
    name, longest = max(found, key=lambda item: item[1])
    return text.count("\n"), name, longest


def main():
    "Write the figures of every row."
    path = ROOT / "CONTRIBUTING.md"
    def row(m):
        lines, name, longest = figures(m[2])
        return f"| {m[1]} | {m[2]} | {lines} | {name} {longest} | {m[5]} |"
    text = path.read_text().replace(HEAD.format("", ""), HEAD.format("lines | longest function | ", "---|---|"))
    path.write_text(ROW.sub(row, text))


if __name__ == "__main__": main()
