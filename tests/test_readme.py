"""The README's own code, as it stands there, and that it leads to every page of the guide."""
import re
from pathlib import Path

ROOT = Path(__file__).parents[1]
README = (ROOT / "README.md").read_text()


def test_the_code_of_the_readme_runs_and_shows_its_effect(capsys):
    code, = re.findall(r"^```python\n(.*?)^```", README, re.M | re.S)
    exec(compile(code, "README.md", "exec"), {"__name__": "readme"})
    row = re.compile(r"^ *(\w+) +([\d.]+)% of the test digits right, ([\d,]+) examples visited$", re.M)
    found, quoted = ({name: (float(right), int(visited.replace(",", ""))) for name, right, visited in row.findall(said)}
                     for said in (capsys.readouterr().out, README))
    assert list(found) == list(quoted) == ["Uniform", "DataParameters", "InfoBatch"]
    assert found["DataParameters"][0] > found["Uniform"][0] + 4 and found["InfoBatch"][0] > found["Uniform"][0] - 2
    assert found["DataParameters"][1] == found["Uniform"][1] == 36_000 and found["InfoBatch"][1] < 32_000
    for name, (right, visited) in quoted.items():                # the figures that stand below the code
        assert abs(found[name][0] - right) < 4 and abs(found[name][1] - visited) < 1_000, (name, found[name])


def test_every_page_of_the_guide_is_two_steps_away():
    "From the README or from the front page of the site."
    pages = {p.name for p in (ROOT / "nbs").glob("guide_*.ipynb")}
    for start in (README, (ROOT / "nbs" / "index.ipynb").read_text()):
        first = set(re.findall(r"\((?:nbs/)?(\w+\.ipynb)", start))
        second = {name for page in first & {p.name for p in (ROOT / "nbs").glob("*.ipynb")}
                  for name in re.findall(r"\((\w+\.ipynb)", (ROOT / "nbs" / page).read_text())}
        assert len(pages) >= 10 and pages <= first | second


def test_the_extras_of_the_hosts_are_listed():
    for name in ("hf", "lightning", "workbench"): assert f"pip install '.[{name}]'" in README
