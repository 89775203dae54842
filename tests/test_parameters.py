"""The first look of the papermill command at its parameters: what it
sees, what it refuses, and that nothing large is imported for it."""
import base64
import json
import subprocess
import sys
from pathlib import Path

import click
import pytest
from papermill.cli import _resolve_type, papermill

from datasel_wb.command import FILE, TAKES, check_command, parameters, passive, project_root, read_command, typed
from datasel_wb.experiments import EXPERIMENTS, described
from datasel_wb.settings import check_values, describe

ROOT = Path(__file__).resolve().parents[1]
LARGE = ("torch", "papermill", "nbclient", "jupyter_client", "pandas", "numpy", "ipykernel", "datasel_wb.core",
         "datasel_wb.runs")


@pytest.mark.parametrize("name", EXPERIMENTS)
def test_the_file_is_what_the_classes_say(name):
    e = EXPERIMENTS[name]
    said = json.loads(json.dumps(describe(e.known(), e.recipes(), e.published)))
    assert json.loads(FILE.read_text())[name] == said, "run make parameters"
    assert FILE.read_text() == described()


def test_nothing_large_is_imported_before_the_check():
    "In a process of its own; that the list is of names that a run does import is shown by the second one."
    argv = [str(ROOT / "nbs/run_dds.ipynb"), "-p", "batchsize", "64"]
    code = (f"import sys; from datasel_wb.command import refused; print(refused({argv}), "
            f"[m for m in {LARGE} if m in sys.modules])")
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=100)
    assert done.stdout == "True []\n"
    assert done.stderr == "ValueError: batchsize: no such parameter; did you mean 'batch_size'?\n"
    code = f"import sys, datasel_wb.runs, papermill.cli; print([m for m in {LARGE} if m not in sys.modules])"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=300).stdout in (
        "['ipykernel']\n", "[]\n")


@pytest.mark.parametrize("name, given, text", [
    ("run_dds", ["-p", "batchsize", "64"], "batchsize: no such parameter; did you mean 'batch_size'?"),
    ("run_dds", ["-p", "steps", "many"], "steps = 'many': must be of type int"),
    ("run_dds", ["-p", "steps", "1.5"], "steps = 1.5: must be of type int"),
    ("run_dds", ["-p", "steps", "0"], "steps = 0: must be above 0"),
    ("run_dds", ["-p", "recipe", "quik"], "recipe = 'quik': did you mean 'quick'?"),
    ("run_dds", ["-p", "noise", "nan"], "noise = nan: must be finite"),
    ("run_dds", ["-p", "flip", "yes"], "flip = 'yes': must be of type bool"),
    ("run_dds", ["-p", "warmup_steps", "30", "-p", "steps", "30"], "warmup_steps = 30: must be below steps = 30"),
    ("run_dds", ["-p", "stop_epoch", "9", "-p", "epochs", "3"], "stop_epoch = 9: must not exceed epochs = 3"),
    ("run_dds", ["-r", "seeds", "3"], "seeds = '3': must be of type int"),
    ("run_dds", ["-y", "seeds: 0"], "seeds = 0: must be above 0"),
    ("run_dds", ["-b", base64.b64encode(b"seeds: 0").decode()], "seeds = 0: must be above 0"),
    ("run_dds", ["-p", "model", "resnet"], "model = 'resnet': must be one of "),
    ("run_dds", ["-p", "dataset", "mnits"], "dataset = 'mnits': neither a known name nor a folder; did you mean"),
    ("run_dds", ["-p", "dataset", "./nowhere"], "dataset = './nowhere': no such folder /"),
    ("run_nmt", ["-p", "corpus", "./nowhere"], "corpus = './nowhere': no such folder /"),
    ("run_dds", ["-p", "keep_rates", "1,2"], "keep_rates = '1,2': must be numbers in [0, 1], comma-separated"),
    ("run_dds", ["-p", "milestones", "0.6,0.3"], "milestones = '0.6,0.3': must be growing numbers in (0, 1)"),
    ("run_dds", ["-p", "milestones", "1"], "milestones = '1': must be growing numbers in (0, 1)"),
    ("run_dds", ["-p", "randaugment", "31"], "randaugment = 31: must lie in 0..30 (0 is off)"),
    ("run_dds", ["-p", "momentum", "0"], "nesterov = True: needs a momentum above 0"),
    ("run_compare", ["-p", "methods", "uniform,data_parameters"], "methods = 'uniform,data_parameters': did you mean"),
    ("run_nmt", ["-p", "method", "dsd"], "method = 'dsd': did you mean 'dds'?"),
    ("run_forgetting", ["-p", "scores", "forgeting"], "scores = 'forgeting': did you mean 'forgetting'?"),
    ("run_forgetting", ["-p", "remove", "half"], "remove = 'half': must be numbers, comma-separated"),
    ("run_nmt", ["-p", "reward", "cosin"], "reward = 'cosin': must be one of "),
    ("run_nmt", ["-p", "batch_size", "64"], "batch_size: no such parameter"),
    ("run_data_parameters", ["out.ipynb", "-p", "inst_init", "0.0"], "inst_init = 0.0: must be above 0"),
])
def test_what_is_refused(name, given, text):
    with pytest.raises(ValueError) as e: check_command([str(ROOT / "nbs" / f"{name}.ipynb"), *given])
    assert str(e.value).startswith(text) and "\n" not in str(e.value)


def test_a_file_of_parameters(tmp_path):
    (tmp_path / "p.yaml").write_text("steps: 0\n")
    with pytest.raises(ValueError, match="steps = 0"):
        check_command([str(ROOT / "nbs/run_dds.ipynb"), "-f", str(tmp_path / "p.yaml")])
    # the later one counts
    check_command([str(ROOT / "nbs/run_dds.ipynb"), "-f", str(tmp_path / "p.yaml"), "-p", "steps", "3"])
    # papermill says so
    check_command([str(ROOT / "nbs/run_dds.ipynb"), "-f", str(tmp_path / "none.yaml")])


@pytest.mark.parametrize("argv", [
    ["nbs/run_dds.ipynb", "-p", "steps", "3", "-p", "recipe", "quick"], ["nbs/run_dds.ipynb", "-p", "flip", "true"],
    ["nbs/run_dds.ipynb"], ["nbs/run_dds.ipynb", "-p", "name", "None"], ["--help"], [],
    ["nbs/tour.ipynb", "-p", "batchsize", "3"], ["-p", "steps"],
    ["--help-notebook", "nbs/run_dds.ipynb", "-p", "batchsize", "3"],
    ["nbs/run_dds.ipynb", "-p", "dataset", "./nbs"], ["nbs/run_dds.ipynb", "-p", "dataset", "tests"],
    ["nbs/run_dds.ipynb", "-p", "dataset", "../x", "--cwd", "tests"], ["nbs/run_dds.ipynb", "-p", "dataset", "None"],
    ["nbs/run_dds.ipynb", "-p", "milestones", "0.5"], ["nbs/run_forgetting.ipynb", "-p", "remove", "0.5"],
    ["nbs/run_compare.ipynb", "-p", "methods", "dds, rs2"], ["nbs/run_compare.ipynb", "-p", "methods", "all"]])
def test_what_passes(argv, monkeypatch):
    monkeypatch.chdir(ROOT)
    check_command(argv)


def test_a_notebook_of_somebody_elses_passes(tmp_path, monkeypatch):
    (tmp_path / "run_dds.ipynb").write_text("{}")
    check_command([str(tmp_path / "run_dds.ipynb"), "-p", "batchsize", "64"])


def test_an_unknown_name_may_be_of_another_package(monkeypatch):
    "Whose methods bring settings; what is known is checked all the same."
    monkeypatch.setattr("datasel_wb.command.entry_points",
                        lambda group: ["one"] if group == "datasel_wb.methods" else [])
    check_command([str(ROOT / "nbs/run_compare.ipynb"), "-p", "toy_share", "0.5", "-p", "methods", "toy"])
    with pytest.raises(ValueError, match="seeds = 0"):
        check_command([str(ROOT / "nbs/run_compare.ipynb"), "-p", "toy_share", "0.5", "-p", "seeds", "0"])


@pytest.mark.parametrize("name", EXPERIMENTS)
def test_every_recipe_passes(name):
    for recipe in EXPERIMENTS[name].recipes(): check_values({"recipe": recipe}, json.loads(FILE.read_text())[name])


def test_values_are_read_as_papermill_reads_them():
    for text in ("1", "-3", "1e-3", "1_000", "0x1", "True", "true", "None", "none", "nan", "", "a b", "1,2", " 7 "):
        ours, theirs = typed(text), _resolve_type(text)
        assert type(ours) is type(theirs) and (ours == theirs or ours != ours)


def test_all_options_of_papermill_with_a_value_are_known():
    there = {o: p.nargs for p in papermill.params if isinstance(p, click.Option) and not p.is_flag
             for o in (*p.opts, *p.secondary_opts)}
    assert TAKES == there


def test_a_command_line_in_parts():
    paths, options = read_command(["--cwd=x", "-psteps", "3", "a.ipynb", "b.ipynb", "--parameters", "lr", "0.1",
                                   "--log-output", "-k", "mine"])
    assert paths == ["a.ipynb", "b.ipynb"] and parameters(options) == dict(steps=3, lr=0.1) and project_root() == ROOT


def test_the_command_of_the_environment_looks_first():
    "What make writes, up to the exit status; beside a machine's speed: nothing but the check has run."
    script = (ROOT / "Makefile").read_text().split("define PAPERMILL\n")[1].split("endef")[0]
    done = subprocess.run([sys.executable, "-c", script, str(ROOT / "nbs/run_dds.ipynb"), "-p", "steps", "0"],
                          capture_output=True, text=True, timeout=100)
    assert done.returncode == 1 and done.stderr == "ValueError: steps = 0: must be above 0\n" and done.stdout == ""


def test_what_the_user_says_of_waiting_stays(monkeypatch):
    monkeypatch.setenv("OMP_WAIT_POLICY", "ACTIVE")
    assert passive() == {"OMP_WAIT_POLICY": "ACTIVE"}
    monkeypatch.delenv("OMP_WAIT_POLICY")
    assert passive() == {"OMP_WAIT_POLICY": "PASSIVE"}
