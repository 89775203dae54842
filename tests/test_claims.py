"""Figures that README, guide and cards quote, against the stored tables of nbs/results and the outputs of notebooks."""
import json
import re
from pathlib import Path

import nbformat
import numpy as np
import pytest

from datasel_wb import runs

ROOT = Path(__file__).parents[1]
STORED = ROOT / "nbs" / "results"
TEXTS = ("README.md", *(f"nbs/{n}.ipynb" for n in (
    "index", "guide_1_start", "guide_2_choose", "guide_3_loop", "guide_4_devices", "methods", "results")))


def text(name):
    "The prose of a file; of a notebook, its markdown cells."
    if name.endswith(".md"): return (ROOT / name).read_text()
    return "\n\n".join(c.source for c in nbformat.read(ROOT / name, as_version=4).cells if c.cell_type == "markdown")


def stored(name): return runs.read_results(STORED / name).set_index("method")


def table_row(prose, first, after):
    "Cells of the only row that begins with `first` in the table below the words `after`."
    table = prose.split(after)[1].split("\n\n")[1]
    rows = [[c.strip() for c in line.strip("| ").split("|")] for line in table.splitlines()]
    row, = [r for r in rows if r[0] == first]
    return row


def plain():
    "What plain training finds in the recipe of the data parameters."
    return json.loads((STORED / "cifar10-10k-data-parameters" / "plain.json").read_text())


def test_the_first_table_of_the_readme_is_the_stored_one():
    shown = runs.show_results(runs.read_results(STORED / "quick"))
    for method, row in shown.iterrows():
        assert table_row(text("README.md"), method, "on the bundled digits")[1:] == [str(v) for v in row]


@pytest.mark.parametrize("file", ["README.md", "nbs/guide_2_choose.ipynb", "nbs/methods.ipynb"])
def test_the_gain_of_data_parameters_is_the_stored_one(file):
    row = stored("cifar10-10k-data-parameters").loc["data-parameters"]
    gain = f"{row['diff']:.1f} ± {row['diff_std']:.1f} points"
    quoted = re.findall(r"[\d.]+ ± [\d.]+ points", text(file))
    mentor = stored("cifar10-10k-noisy").loc["mentornet"]
    assert gain in quoted and set(quoted) <= {gain, f"{mentor['diff']:.1f} ± {mentor['diff_std']:.1f} points"}


@pytest.mark.parametrize("file", ["README.md", "nbs/guide_2_choose.ipynb", "nbs/methods.ipynb", "nbs/results.ipynb"])
def test_what_temperatures_find_stands_beside_what_plain_training_finds(file):
    "A paragraph or row that says how well σ finds wrong labels says the same of plain training, with the figures kept."
    found = stored("cifar10-10k-data-parameters").loc["data-parameters", "auroc"]
    known = {f"{found:.2f}", f"{found:.3f}", *(f"{v:.3f}" for k, v in plain().items() if k.startswith("mean"))}
    parts = [p for p in re.split(r"\n\n|\n(?=\|)", text(file))
             if "AUROC" in p and re.search("σ|data parameters", p) and f"{found:.2f}" in p]
    assert parts
    for part in parts:
        assert "plain training" in part, part
        quoted = set(re.findall(r"0\.9\d+", part.split("| learning rate")[0]))
        assert quoted <= known and quoted & {f"{v:.3f}" for k, v in plain().items() if k.startswith("mean")}, part


@pytest.mark.parametrize("file", TEXTS)
def test_no_auroc_of_a_score_without_plain_training(file):
    "Whatever is told of 0.9 and more names the comparison in the same paragraph."
    for part in re.split(r"\n\n|\n(?=\|)", text(file)):
        high = re.search(r"AUROC[^.|;]{0,60}?0\.9\d|0\.9\d\d?[^.|;]{0,20}AUROC", part)
        assert not high or "plain training" in part or "accuracy, %" in part, part


def test_the_rest_of_the_readme_s_second_paragraph():
    table, prose = stored("cifar10-10k-noisy"), text("README.md")
    saved = 1 - table.seconds["rs2"] / table.seconds["uniform"]
    assert f"save {10 * round(10 * saved)}% of the time for two points" in prose and round(table["diff"]["rs2"]) == -2
    lost = -table.loc[["forgetting", "max_loss_increase", "el2n", "dynams", "dynams-proxy"], "diff"]
    assert f"lose {lost.min():.0f} to {lost.max():.0f} points" in prose
    assert sorted(table.index[table["diff"] > 0]) == ["data-parameters", "mentornet"] and "Two methods gain" in prose


def test_translation_in_the_readme():
    tables = {k: stored(f"numbers-{k}") for k in ("az", "be", "sk")}
    for method, title in (("uniform", "uniform"), ("tcs", "TCS: similar languages more often"), ("tcs_dds", "TCS+DDS"),
                          ("related", "related: its relative alone beside it (tr, ru, cs)"), ("dds", "DDS"),
                          ("spcl", "SPCL")):
        *bleu, gain = table_row(text("README.md"), title, "Multilingual translation")[1:]
        assert bleu == [runs.plus_minus(*t.loc[method, ["mean", "std"]]) for t in tables.values()]
        if method != "uniform":
            mean = np.mean([t.loc[method, "diff"] for t in tables.values()])
            assert float(gain.replace("−", "-")) == pytest.approx(mean, abs=0.051)


def test_the_guide_s_table():
    prose, noisy = text("nbs/guide_2_choose.ipynb"), stored("cifar10-10k-noisy")
    own = stored("cifar10-10k-data-parameters")
    def more(table, method): return f"{table.seconds[method] / table.seconds['uniform'] - 1:.0%} more time"
    assert more(own, "data-parameters") in prose and more(noisy, "mentornet") in prose
    assert "the best of fifteen" in prose and len(noisy) == 15 and noisy["mean"].idxmax() == "mentornet"
    first, second = map(int, re.search(r"(\d+)% against (\d+)% on digits", prose).groups())
    assert [first, second] == pytest.approx(stored("quick")["mean"][["dds", "uniform"]], abs=0.6)
    gains = [np.mean([stored(f"numbers-{k}").loc[m, "diff"] for k in ("az", "be", "sk")]) for m in ("related", "tcs")]
    assert "plus 32 and plus 14.5 BLEU" in prose and [round(gains[0]), round(gains[1], 1)] == [32, 14.5]


def test_what_find_noise_found():
    "The sentence of the README against the outputs that the notebook holds."
    cells = nbformat.read(ROOT / "nbs" / "find_noise.ipynb", as_version=4).cells
    shown = {c.id: "".join(o.data["text/plain"] for o in c.outputs if "data" in o)
             for c in cells if c.cell_type == "code"}
    precision, recall = re.search(r"\(the rule\) +\d+ +([\d.]+) +([\d.]+)", shown["c0ffee04"]).groups()
    before, after = (re.search(rf"{k} +\S+ +\d+ +([\d.]+)", shown["972f1353"])[1] for k in ("before", "after"))
    said = (f"find {float(recall):.0%} of the wrong ones with a precision of {float(precision):.0%}, "
            f"and training on the rest ends at {after} instead of {before}")
    assert said in text("README.md") and float(precision) >= 0.8 and float(recall) >= 0.6
    earlier = cells[-2].source
    assert "72.3% of the wrong ones with a precision of 82.8%" in earlier and "56.0% after" in earlier
    said = "72% of them with a precision of 83%, and training on the rest ended at 56.0 instead of 54.3"
    assert said in text("README.md")
