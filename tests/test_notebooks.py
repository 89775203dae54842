"""The run notebooks: their parameters, and each of them from data to result, on digits. One of them goes through
papermill and a kernel (as test_command.py, test_registry.py and test_torchrun.py do it with others), the rest run in
processes that have the imports behind them."""
import json
import re
import shutil
import subprocess
import uuid
from dataclasses import fields, make_dataclass
from pathlib import Path
from typing import get_args, get_type_hints

import nbformat
import pandas as pd
import papermill
import pytest
from papermill.iorw import load_notebook_node
from papermill.parameterize import parameterize_notebook

from datasel_wb import experiments, runs
from datasel_wb.core import setting
from datasel_wb.experiments import EXPERIMENTS
from forked import Forked
from waits import patience

ROOT = Path(__file__).resolve().parents[1]


def parameters(name):
    "Source of the cell that papermill fills."
    notebook = nbformat.read(ROOT / "nbs" / f"{name}.ipynb", 4)
    return next(c.source for c in notebook.cells if "parameters" in c.metadata.get("tags", []))


def test_every_run_notebook_is_an_experiment():
    assert set(EXPERIMENTS) == {p.stem for p in (ROOT / "nbs").glob("run_*.ipynb")}


@pytest.mark.parametrize("name", EXPERIMENTS)
def test_parameters_cell(name):
    "Exactly the fields of the settings, with their types and comments, all None but the recipe."
    e = EXPERIMENTS[name]
    lines = [re.fullmatch(r"(\w+): (\w+) = (\S+)  # (.+)", line)
             for line in parameters(name).splitlines() if not line.startswith("#")]
    assert all(lines)
    there = {m[1]: (m[2], m[4]) for m in lines}
    def plain(hint): return next((k for k in get_args(hint) if k is not type(None)), hint).__name__
    here = {f.name: (plain(get_type_hints(c)[f.name]), f.metadata["doc"]) for c in (runs.RunRecipe, *e.parts().values())
            for f in fields(c)}
    assert there == here and len(lines) == len(here)
    assert {m[1]: m[3] for m in lines if m[3] != "None"} == {"recipe": '"auto"'}
    assert parameters(name) == experiments.parameter_cell(name)   # `make parameters` writes it
    namespace = {}
    exec(parameters(name), namespace)
    assert (experiments.settings(name, namespace) == runs.resolve({"recipe": "quick"}, e.recipes(), e.published,
                                                                  **e.parts()))


def test_a_parameter_cell_edited_by_hand(tmp_path, monkeypatch, capsys):
    "One sentence and a failure; written, it is as before."
    for name in EXPERIMENTS: shutil.copy(ROOT / "nbs" / f"{name}.ipynb", tmp_path)
    monkeypatch.setattr(runs, "project_root", lambda: tmp_path)
    (tmp_path / "nbs").symlink_to(tmp_path)
    path = tmp_path / "run_dds.ipynb"
    original = path.read_bytes()
    assert experiments.main(["--check"]) == 0 and capsys.readouterr().out == ""
    path.write_bytes(original.replace(b"steps: int = None", b"steps: int = 500"))
    assert path.read_bytes() != original and experiments.main(["--check"]) == 1
    assert capsys.readouterr().out == "run_dds: its parameter cell differs from the settings; run make parameters\n"
    assert experiments.main([]) == 0 and path.read_bytes() == original
    with pytest.raises(SystemExit, match="--chek: must be --check or nothing"): experiments.main(["--chek"])


@pytest.mark.parametrize("change, text", [
    (dict(default=0.7),
     "budget: Other declares it with the default 0.7, DynaMSRecipe with 0.6; one name must mean one thing"),
    (dict(rule="share"), "the rule 'share', DynaMSRecipe with 'fraction'"),
    (dict(doc="euros"), "the comment 'euros', DynaMSRecipe with 'mean share")])
def test_a_field_that_two_classes_declare_with_different_meaning(change, text):
    parts = EXPERIMENTS["run_compare"].parts()
    f = next(f for f in fields(parts["dynams"]) if f.name == "budget")
    same = dict(default=f.default, doc=f.metadata["doc"], rule=f.metadata["rule"])
    def other(**kw): return make_dataclass("Other", [("budget", float, setting(**same | kw))], frozen=True)
    experiments.check_agreement([*parts.values(), other()])
    with pytest.raises(ValueError, match=re.escape(text)):
        experiments.check_agreement([*parts.values(), other(**change)])


EXECUTE = "import sys; from execnb.shell import exec_nb; exec_nb(sys.argv[1], sys.argv[1], exc_stop=True)"


def by_papermill(path, out, given):
    "In a kernel, as the command does it."
    papermill.execute_notebook(path, out, given, cwd=ROOT, progress_bar=False)


def forked(path, out, given):
    "The same cells with the same parameters in a forked process; what it says, and its status."
    nbformat.write(parameterize_notebook(load_notebook_node(str(path)), given), out)
    process = Forked(EXECUTE, out, cwd=ROOT, stderr=subprocess.STDOUT)
    said, _ = process.communicate(patience(200))
    return said, process.returncode


def succeeds(path, out, given):
    said, status = forked(path, out, given)
    assert status == 0, said[-4000:]


@pytest.fixture(scope="module")
def execute(tmp_path_factory):
    "Runs a notebook; gives its run folder, removed after the tests, and the executed notebook."
    folders = []
    def run(name, /, by=succeeds, **given):
        run_name = given.get("name", f"test-{name}-{uuid.uuid4().hex[:8]}")
        folders.append(ROOT / "papermill_runs" / run_name)
        out = tmp_path_factory.mktemp(name) / "run.ipynb"
        done = by(ROOT / "nbs" / f"{name}.ipynb", out, dict(recipe="quick", name=run_name) | given)
        return folders[-1], done or nbformat.read(out, 4)
    yield run
    for f in folders: shutil.rmtree(f, ignore_errors=True)


def charts(notebook):
    "How many charts an executed notebook shows."
    return sum(any("vegalite" in kind for kind in o.get("data", {})) for c in notebook.cells
               for o in c.get("outputs", []))


def trained(folder):
    "Names of the methods with a result, in order."
    return list(json.loads((folder / "result.json").read_text())["methods"])


def test_compare(execute):
    "Every kind of method; that each of them trains is tested in test_recipes."
    methods = "forgetting,infobatch,data-parameters,dds"
    folder, notebook = execute("run_compare", methods=methods, epochs=3, n_train=448, dev_size=64, seeds=2,
                               warmup_steps=4)
    table = runs.read_results(folder).set_index("method")
    assert list(table.index) == ["uniform", "uniform-short", "rs2", *methods.split(",")] and (table.n == 2).all()
    assert table["mean"].between(0, 100).all() and table["diff"].drop("uniform").notna().all()
    assert (table.pretrain_seconds > 0).sum() == 2 and table.auroc.between(0, 1).sum() >= 4
    assert table.auroc_loss.dropna().index.tolist() == ["uniform", "uniform-short"]
    assert charts(notebook) >= 4
    changed = pd.read_csv(folder / "changed_labels.csv")
    assert len(changed) == 179 and (changed.label != changed.clean_label).all()            # floor(0.4 * 448)


def test_data_parameters(execute):
    folder, notebook = execute("run_data_parameters", epochs=12, seeds=2)
    table = runs.read_results(folder).set_index("method")
    assert table.loc["data-parameters", "auroc"] > 0.75 and table.loc["uniform", ["auroc", "auroc_loss"]].min() > 0.75
    shown = next(o.data["text/plain"] for c in notebook.cells if "show_results" in c.source
                 for o in c.get("outputs", []) if "data" in o)
    assert re.search(r"margin 0\.\d{3}, loss 0\.\d{3}", shown)      # of plain training, in the column of the others
    assert charts(notebook) >= 6
    metrics = pd.read_parquet(folder / "metrics.parquet")
    sigma = metrics[metrics.name == "sigma/inst/noisy/mean"].value
    assert sigma.iloc[-1] > metrics[metrics.name == "sigma/inst/clean/mean"].value.iloc[-1]
    board = b"".join(f.read_bytes() for f in (folder / "data-parameters-0" / "tb").iterdir())
    assert b"sigma/inst/noisy" in board                                                       # the histograms


def test_forgetting_removal_sweep(execute):
    "Three seeds, scores, removal by two scores and at random."
    folder, notebook = execute("run_forgetting", epochs=8)
    sweep = pd.read_parquet(folder / "sweep.parquet")
    assert set(sweep.score) == {"forgetting", "max_loss_increase", "random"} and set(sweep.removed) == {0, 519, 1038}
    assert (sweep.groupby(["score", "removed"]).seed.nunique() == 3).all() and charts(notebook) >= 1
    mean = sweep.groupby(["score", "removed"]).accuracy.mean()
    assert mean["random", 0] > 90 and mean["random", 1038] < mean["random", 0]
    scores = pd.read_parquet(folder / "scores.parquet")
    assert len(scores) == 1297 and scores.forgetting.sum() > 0 and "random-519" in trained(folder)
    kept = pd.read_parquet(folder / "forgetting-1038-0" / "examples.parquet")
    gone = set(scores.sort_values("forgetting", kind="stable").id.head(1038))
    assert set(kept.id[kept.presentations > 0]) & gone == set()


def test_dynams(execute):
    folder, notebook = execute("run_dynams", by=by_papermill, epochs=8, seeds=1, dynams_warmup=2, dynams_every=2)
    table = runs.read_results(folder).set_index("method")
    assert list(table.index) == ["uniform", "uniform-short", "rs2", "dynams", "dynams-proxy"] and charts(notebook) >= 3
    full = table.loc["uniform", "examples"]
    assert table.loc["rs2", "examples"] / full == pytest.approx(0.6, abs=0.02)
    assert table.loc["dynams", "examples"] / full == pytest.approx(0.6 + 3 / 8, abs=0.03)     # and three scoring passes
    agreement = next(o.data["text/html"] for c in notebook.cells if "agreements" in c.source
                     for o in c.get("outputs", []) if "data" in o)
    assert "spearman" in agreement


def test_translation(execute):
    "Two methods and two seeds; the same command on the finished folder trains nothing and gives the same table."
    given = dict(method="tcs_dds,related", lang="be", steps=40, eval_every=20, log_every=10, save_every=20, seeds=2,
                 high=600, block=300, updates=10, gradient_batches=1, test_size=30, dev_size=30, hidden=32)
    folder, notebook = execute("run_nmt", **given)
    table = runs.read_results(folder).set_index("method")
    assert list(table.index) == ["uniform", "tcs_dds", "related"] and (table.n == 2).all()
    assert table.attrs["metric"] == "BLEU"
    assert table["mean"].between(0, 100).all() and table.chrf.between(0, 100).all() and charts(notebook) >= 5
    # the gradients are counted
    assert table.examples["tcs_dds"] > table.examples["uniform"]
    metrics = pd.read_parquet(folder / "metrics.parquet")
    usage = metrics[metrics.name.str.startswith("usage/")].groupby(["method", "seed", "step"]).value.sum()
    assert ((usage - 1).abs() < 1e-6).all()
    assert metrics[(metrics.method == "tcs_dds") & (metrics.name == "reward/ru")
                   & (metrics.step == 40)].value.notna().all()
    assert (pd.read_csv(folder / "bootstrap.csv", index_col=0).loc[["tcs_dds", "related"],
                                                                   ["seed 0", "seed 1"]] <= 1).all(axis=None)
    again, _ = execute("run_nmt", **given, name=folder.name)
    assert again == folder
    pd.testing.assert_frame_equal(runs.read_results(folder), table.reset_index(), check_exact=True)


def test_dds_on_xla(execute):
    "The whole notebook on XLA's CPU runtime; compilations end with the first evaluation."
    pytest.importorskip("torch_xla")
    folder, notebook = execute("run_dds", device="xla", steps=60, warmup_steps=10, scorer_steps=40, seeds=1,
                               eval_every=20, log_every=10)
    assert trained(folder) == ["uniform", "dev-only", "dds"] and charts(notebook) >= 5
    metrics = pd.read_parquet(folder / "dds-0" / "metrics.parquet")
    compiles = metrics[metrics.name == "xla/compiles"].set_index("step").value
    assert compiles[60] == compiles[30] and runs.read_results(folder)["mean"].min() > 50


@pytest.mark.parametrize("name, given, text", [
    ("run_compare", dict(methods="forgeting"), "did you mean 'forgetting'"),
    ("run_compare", dict(decisions="none.csv"), "decisions = 'none.csv': no such file"),
    ("run_compare", dict(dev_size=0), "batchweight: BatchWeight needs dev_batch"),
    ("run_forgetting", dict(remove="5000"), "remove = '5000': 5000 must lie in 1..1265 for 1297 examples"),
    ("run_dynams", dict(budget=0.1), "budget = 0.1: a power schedule"),
    ("run_data_parameters", dict(inst_init=0.0), "inst_init = 0.0: must be above 0"),
    ("run_data_parameters", dict(steps=50, batch_size=5000), "batch_size = 5000"),
    ("run_nmt", dict(method="tcsdds"), "did you mean 'tcs_dds'"),
    ("run_nmt", dict(lang="ax"), "lang = 'ax': must be one of az"),
    ("run_nmt", dict(target_vocab=500), "target_vocab = 500: must be at most"),
    ("run_nmt", dict(lang="tr"), "related: related = '': must name the relative of 'tr', one of az, be, "),
    ("run_nmt", dict(languages="az,ru", source_vocab=100),
     "related: related = 'tr': must name the relative of 'az', one of ru; or leave"),
    ("run_nmt", dict(max_tokens=20), "max_tokens = 20: must be at least"),
])
def test_bad_input_stops_before_training(execute, name, given, text):
    _, (said, status) = execute(name, by=forked, **given)
    kind, _, message = said.splitlines()[-1].partition(": ")
    assert status == 1 and kind == "ValueError" and text in message, said[-4000:]


def test_bad_input_through_papermill(execute):
    with pytest.raises(papermill.PapermillExecutionError, match="budget = 0.1: a power schedule"):
        execute("run_dynams", by=by_papermill, budget=0.1)
