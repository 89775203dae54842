"""Figures that README, guide and cards quote, against the stored tables of nbs/results and the outputs of notebooks."""
import json
import re
from functools import lru_cache
from pathlib import Path

import numpy as np
import pytest

from datasel_wb import runs

ROOT = Path(__file__).parents[1]
STORED = ROOT / "nbs" / "results"
TEXTS = ("README.md", *(f"nbs/{n}.ipynb" for n in (
    "index", "guide_1_start", "guide_2_choose", "guide_2a_support", "guide_3_loop", "guide_3a_hf", "guide_3b_lightning",
    "guide_3c_text", "guide_3d_tables", "guide_3e_language_models", "guide_4_devices", "methods", "results",
    "published", "find_noise")))


def text(name):
    "The prose of a file; of a notebook, its markdown cells."
    if name.endswith(".md"): return (ROOT / name).read_text()
    return "\n\n".join("".join(c["source"]) for c in cells(name) if c["cell_type"] == "markdown")


@lru_cache
def cells(name): return json.loads((ROOT / name).read_text())["cells"]


def shown(name):
    "What the cells of a notebook show, as text, by the cell's id."
    said = {c["id"]: ["".join(o.get("text") or o.get("data", {}).get("text/plain", "")) for o in c["outputs"]]
            for c in cells(name) if c["cell_type"] == "code"}
    return {k: "\n".join(v) for k, v in said.items() if any(v)}


def parts(prose):
    "Paragraphs, a table together with the paragraph below it; and each row of a table by itself."
    whole = re.split(r"\n\s*\n", prose)
    tables = {k for k, p in enumerate(whole) if p.lstrip().startswith("|")}
    joined = ["\n\n".join(whole[k:k + 1 + (k in tables)]) for k in range(len(whole))]
    return joined + [row for k in tables for row in whole[k].splitlines()]


def stored(name): return runs.read_results(STORED / name).set_index("method")


def table_row(prose, first, after):
    "Cells of the only row that begins with `first` in the table below the words `after`."
    table = prose.split(after)[1].split("\n\n")[1]
    rows = [[c.strip() for c in line.strip("| ").split("|")] for line in table.splitlines()]
    row, = [r for r in rows if r[0] == first]
    return row


def plain():
    "AUROC that plain training reaches in the recipe of the data parameters by margin, loss and EL2N: mean of seeds."
    kept = json.loads((STORED / "cifar10-10k-data-parameters" / "plain.json").read_text())
    assert all(len(kept[k]) in (0, len(kept["seeds"])) for k in ("margin", "loss", "el2n"))
    return {k: np.mean(kept[k]) for k in ("margin", "loss", "el2n") if kept[k]}


def noise_on_cifar():
    "What an earlier *find_noise* found on CIFAR-10."
    return json.loads((STORED / "find-noise-cifar10" / "result.json").read_text())


def found_on_digits():
    "AUROC of σ, and of plain training's mean margin and loss, in each stored run on digits with 40% wrong labels."
    tables = [shown(f"nbs/run_{k}.ipynb")[c] for k, c in (("data_parameters", "ccc15533"), ("compare", "9c9487d5"))]
    rows = [re.search(r"^uniform +[\d,]+ +margin ([\d.]+), loss ([\d.]+)", t, re.M).groups() for t in tables]
    sigma = [re.search(r"^data-parameters +[\d,]+ +(0\.\d+)", t, re.M)[1] for t in tables]
    own = shown("nbs/find_noise.ipynb")["c0ffee04"]
    rows.append([re.search(rf"^plain training, mean {k}.* ([\d.]+)$", own, re.M)[1] for k in ("margin", "loss")])
    margin, loss = (sorted(float(v) for v in column) for column in zip(*rows))
    return {"sigma": sorted(map(float, sigma)), "margin": margin, "loss": loss}


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


@pytest.mark.parametrize("file", ["README.md", "nbs/methods.ipynb", "nbs/results.ipynb"])
def test_what_temperatures_find_stands_beside_what_plain_training_finds(file):
    "A paragraph that says how well σ finds wrong labels says the same of plain training, with the figures kept."
    found = stored("cifar10-10k-data-parameters").loc["data-parameters", "auroc"]
    words = {"mean margin": "margin", "mean EL2N": "el2n"}
    said = re.compile(rf"(σ|data parameters)[^|]*AUROC of ({found:.3f}|{found:.2f})\b", re.DOTALL)
    claims = [p for p in re.split(r"\n\n|\n(?=\|)", text(file)) if said.search(p)]
    assert claims
    for part in claims:
        assert "plain training" in part, part
        for name, key in words.items():
            quoted, = re.findall(rf"{name}[^\d.;|]*(0\.\d+)", part)
            assert quoted == f"{plain()[key]:.{len(quoted) - 2}f}", (name, part)


def test_the_guide_recommends_what_finds_most():
    "For wrong labels without a clean example: the mean loss, with the figures of every stored run on digits."
    row, = [p for p in text("nbs/guide_2_choose.ipynb").splitlines()
            if p.startswith("| wrong labels, no clean example | the wrong labels |")]
    found, spans = found_on_digits(), {}
    for key, values in found.items(): spans[key] = f"{values[0]:.2f} to {values[-1]:.2f}"
    assert "the mean loss that any training records" in row and len(found["loss"]) == 3
    assert (f"AUROC {spans['loss']} on digits, of plain training (its mean margin: {spans['margin']}; "
            f"the σ of data parameters: {spans['sigma']})") in row
    assert found["loss"][0] > max(found["margin"][-1], found["sigma"][-1])
    card, = [p for p in text("nbs/methods.ipynb").split("\n\n") if "σ found them" in p]
    assert f"its mean loss found more than σ ({spans['loss']} against {spans['sigma']})" in card


@pytest.mark.parametrize("file", TEXTS)
def test_no_auroc_of_a_score_without_plain_training(file):
    "Whatever is told of 0.9 and more names the comparison in the same paragraph, row, or table."
    for part in parts(text(file)):
        assert not ("AUROC" in part and re.search(r"0\.9\d|1\.00", part)) or "plain training" in part, part


@pytest.mark.parametrize("file", [f for f in TEXTS if f.endswith("ipynb")] + [
    f"nbs/run_{k}.ipynb" for k in ("compare", "data_parameters", "dds", "dynams", "forgetting")])
def test_no_shown_auroc_without_plain_training(file):
    "A table that a notebook shows with an AUROC of 0.9 and more has plain training's in one of its rows."
    for cell, said in shown(file).items():
        if "AUROC" in said and re.search(r"\b(0\.9\d|1\.00)", said):
            assert "plain training" in said or re.search(r"^uniform .*margin 0\.\d+, loss 0\.\d+", said, re.M), cell


def test_parts_of_a_text():
    "A body row belongs to its table, and a table to the paragraph below it."
    whole = parts("one\n\n| a | AUROC |\n|---|---|\n| b | 0.95 |\n\ntwo\n\nthree")
    assert whole[0] == "one" and whole[1].startswith("| a | AUROC |") and whole[1].endswith("| b | 0.95 |\n\ntwo")
    assert whole[2:4] == ["two", "three"] and "| b | 0.95 |" in whole[4:]


def test_what_dds_finds_on_digits_stands_beside_plain_training():
    prose, loss = text("nbs/results.ipynb"), found_on_digits()["loss"]
    accuracies = [float(re.search(r"^uniform +([\d.]+)", shown(f"nbs/run_{k}.ipynb")[c], re.M)[1])
                  for k, c in (("data_parameters", "ccc15533"), ("compare", "9c9487d5"))]
    row = table_row(prose, "plain training, by its mean loss, in two other runs", "What we learnt on the way")
    assert row[1] == "–".join(f"{v:.0f}" for v in sorted(accuracies))
    assert row[2] == f"{loss[-2]:.3f}–{loss[-1]:.3f}" and loss[0] < loss[-2]       # the lowest is that of find_noise


def test_plain_training_stands_in_the_stored_tables():
    "The last row of a table of an older run, as shown, holds the figures that are kept of another training."
    tables, kept = shown("nbs/results.ipynb"), noise_on_cifar()["margins"]["auroc"]
    found = ", ".join(f"{k} {v:.3f}" for k, v in plain().items())
    assert re.search(rf"^plain training, another run .*{found}", tables["0fc6e142"], re.M)
    assert re.search(rf"^plain training, another run .*margin {kept:.3f}", tables["3ad7266d"], re.M)
    assert re.search(rf"^plain training, mean margin .*{kept:.2f}$", shown("nbs/methods.ipynb")["9f986c40"], re.M)
    for file in ("methods", "results"): assert f"AUROC of {kept:.3f}" in text(f"nbs/{file}.ipynb")


def test_the_kept_auroc_is_that_of_the_histogram():
    "By its bins, each pair of a wrong and a clean example: half of those in one bin count as found."
    kept = noise_on_cifar()["margins"]
    pairs = [(a, b, c * w) for a, c in enumerate(kept["clean"]) for b, w in enumerate(kept["wrong label"])]
    assert len(kept["edges"]) == 41 and np.all(np.diff(kept["edges"]) > 0)
    assert [sum(kept[k]) for k in ("clean", "wrong label")] == [6000, 4000]
    share = sum(n * ((b < a) + (a == b) / 2) for a, b, n in pairs) / 24e6
    assert kept["auroc"] == round(share, 3) and sum(n for a, b, n in pairs if a == b) / 24e6 < 0.025


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
    tables, readme = shown("nbs/find_noise.ipynb"), text("README.md")
    def row(words):
        return [float(v) for v in re.search(rf"^{words} +\d+ +([\d.]+) +([\d.]+)", tables["c0ffee04"], re.M).groups()]
    precision, recall = row(r"plain training, mean loss \(the rule\)")
    before, after = (re.search(rf"{k} +\S+ +\d+ +([\d.]+)", tables["972f1353"])[1] for k in ("before", "after"))
    assert (f"the mean loss above Otsu's threshold finds {recall:.0%} of the wrong ones with a precision of "
            f"{precision:.0%} (five held-out networks change this by less than a point, and give the new labels), "
            f"and training on the rest ends at {after} instead of {before}") in readme
    assert precision >= 0.8 and recall >= 0.6
    assert np.abs(np.subtract(row("the rule and held-out networks"), [precision, recall])).max() < 0.01
    assert "change them by less than a point" in text("nbs/find_noise.ipynb")


def test_the_rule_of_find_noise_holds_at_two_shares_of_noise_and_three_seeds():
    rows = re.findall(r"^(?:(0\.\d) +)? *(\d) +([\d.]+) +([\d.]+)$", shown("nbs/find_noise.ipynb")["c0ffee06"], re.M)
    assert [r[0] for r in rows if r[0]] == ["0.1", "0.4"] and [r[1] for r in rows] == ["0", "1", "2"] * 2
    assert all(float(precision) >= 0.8 and float(recall) >= 0.6 for *_, precision, recall in rows)


def test_what_find_noise_found_on_cifar():
    "Sentences of the notebook and of the README against the figures that are kept of the earlier run."
    kept, prose, readme = noise_on_cifar(), text("nbs/find_noise.ipynb"), text("README.md")
    found, top = kept["found"], {m: v["accuracy"][0] for m, v in kept["methods"].items()}
    assert found["removed"] * found["precision"] == pytest.approx(found["of them wrong"], abs=2)
    assert found["of them wrong"] == pytest.approx(4000 * found["recall"], abs=2)
    assert (f"{found['removed']:,} labels removed, {found['recall']:.1%} of the wrong ones with a precision of "
            f"{found['precision']:.1%}; accuracy {top['removed']}% after training again, {top['uniform']}% before, and "
            f"{top['relabelled']}% with the labels replaced, of which {found['new labels right']:.0%} were") in prose
    assert f"reaches an AUROC of {kept['margins']['auroc']}" in prose
    assert (f"{found['recall']:.0%} of them with a precision of {found['precision']:.0%}, and training on the rest "
            f"ended at {top['removed']} instead of {top['uniform']}") in readme
    assert kept["recipe"]["n_train"] == 10_000 and runs.read_results(STORED / "find-noise-cifar10")["n"].eq(1).all()
