"""The run notebook and the papermill command, in processes of their own as a user starts them."""
import io
import json
import os
import pty
import re
import select
import shutil
import signal
import subprocess
import time
import uuid
from pathlib import Path

import nbclient
import nbformat
import pandas as pd
import psutil
import pytest
import torch
from PIL import Image

from datasel_wb import recipes, runs
from datasel_wb.datasets import DataRecipe, load_data
from datasel_wb.scorer import DDSRecipe
from datasel_wb.checkpoints import Checkpoints
from datasel_wb.loop import Recipe, Training
from datasel_wb.trainer import fit, saved_model
from waits import patience

ROOT = Path(__file__).resolve().parents[1]
PAPERMILL, NOTEBOOK, HOME = ROOT / ".venv/bin/papermill", "nbs/run_dds.ipynb", ROOT / "papermill_runs"
PARTS = {"data": DataRecipe, "train": Recipe, "dds": DDSRecipe}
TINY = dict(recipe="quick", steps=40, warmup_steps=5, scorer_steps=40, scorer_warmup_steps=2, seeds=1, n_train=300,
            batch_size=64,
            # 4 batches per epoch: checkpoints in mid-epoch
            dropout=0.1, crop=1, eval_every=20, save_every=10, log_every=5)

wrapped = pytest.mark.skipif(not PAPERMILL.exists() or "datasel_wb" not in PAPERMILL.read_text(),
                             reason="no papermill wrapper in .venv; `make test` writes it")


# Starting, watching and ending processes

class Command:
    "A papermill command under way; what it writes is collected."
    def __init__(self, folder, *args, output=None, stdin=subprocess.DEVNULL, before="", **parameters):
        flags = [str(a) for k, v in parameters.items() for a in ("-p", k, v)]
        line = [str(PAPERMILL), *args, NOTEBOOK, *([str(output)] if output else []), *flags]
        if before: line = ["sh", "-c", f'{before}; exec "$@"', "sh", *line]       # exec: the process keeps its number
        self.name, self.out, self.err = parameters.get("name"), folder / "out", folder / "err"
        env = {k: v for k, v in os.environ.items() if not k.startswith("DATASEL_")} | {"OMP_NUM_THREADS": "1"}
        self.tty = None
        if stdin == "tty":
            self.tty, inner = pty.openpty()
            self.process = subprocess.Popen(line, cwd=ROOT, env=env, stdin=inner, stdout=inner, stderr=inner,
                                            start_new_session=True)
            os.close(inner)
        else:
            with open(self.out, "wb") as out, open(self.err, "wb") as err:
                self.process = subprocess.Popen(line, cwd=ROOT, env=env, stdin=stdin, stdout=out, stderr=err,
                                                start_new_session=True)

    @property
    def folder(self): return HOME / self.name
    @property
    def waiting(self): return HOME / f".waiting-{self.process.pid}.ipynb"

    def finish(self, seconds=patience(120)):
        "The exit status."
        if self.tty is not None: self._read_tty(time.monotonic() + seconds)
        return self.process.wait(seconds)

    def _read_tty(self, until):
        with open(self.out, "wb") as out:
            while time.monotonic() < until:
                if not select.select([self.tty], [], [], 1)[0]: continue
                try: data = os.read(self.tty, 65536)
                except OSError: return                     # the other side is closed
                if not data: return
                out.write(data)

    def text(self): return self.out.read_text(errors="replace").replace("\r\n", "\n")
    def errors(self): return self.err.read_text(errors="replace")

    def wait_for(self, file, seconds=patience(90)):
        "Until the run folder holds `file`."
        until = time.monotonic() + seconds
        while not (self.folder / file).exists():
            assert self.process.poll() is None, (
                f"ended before {file} was there:\n{self.text()[-1000:]}\n{self.errors()[-3000:]}")
            assert time.monotonic() < until, f"no {file} after {seconds} s:\n{self.errors()[-3000:]}"
            time.sleep(0.003)

    def kernel(self):
        return next(p for p in psutil.Process(self.process.pid).children(recursive=True)
                    if "ipykernel_launcher" in " ".join(p.cmdline()))

    def end(self):
        "kill -9 of everything that is left, and no trace in the project's folder of runs except the run itself."
        family = []
        if self.process.poll() is None:
            family = psutil.Process(self.process.pid).children(recursive=True)
            os.killpg(self.process.pid, signal.SIGKILL)
        for p in family:
            try: p.kill()
            except psutil.NoSuchProcess: pass
        psutil.wait_procs(family, patience(10))
        self.process.wait(patience(10))
        if self.tty is not None: os.close(self.tty)
        if self.process.stdin: self.process.stdin.close()
        if self.waiting.is_symlink() or self.waiting.exists(): self.waiting.unlink()


@pytest.fixture(scope="module")
def start(tmp_path_factory):
    "Starts commands; ends them and removes their run folders when the tests are done."
    commands = []
    def begin(**kw):
        commands.append(Command(tmp_path_factory.mktemp("command"), **kw))
        return commands[-1]
    yield begin
    for c in commands:
        if c.process.returncode is None: c.end()
        if c.waiting.is_symlink() or c.waiting.exists(): c.waiting.unlink()
        if c.name: shutil.rmtree(c.folder, ignore_errors=True)


def fresh(what): return f"test-{what}-{uuid.uuid4().hex[:8]}"

def resolve(**given): return runs.resolve(given, recipes.DDS_RECIPES, "cifar10-wrn28-10", **PARTS)

def code_cells(path): return [c for c in json.loads(Path(path).read_text())["cells"] if c["cell_type"] == "code"]

def printed(cell): return "".join("".join(o.get("text", "")) for o in cell["outputs"])


# The runs that the tests look at; each is started once

@pytest.fixture(scope="module")
def whole(start):
    "A run in a terminal, from its first to its last step."
    command = start(name=fresh("whole"), stdin="tty", **TINY)
    command.status = command.finish()
    yield command
    command.end()


@pytest.fixture(scope="module")
def killed(start):
    "The same settings under another name, killed in each of the three trainings and started again each time."
    name, commands = fresh("killed"), []
    for part, stdin in (("supervised", subprocess.DEVNULL), ("uniform", subprocess.PIPE), ("dds", subprocess.PIPE)):
        command = start(name=name, stdin=stdin, **TINY)
        command.wait_for(f"{part}-0/checkpoints/checkpoints.json")
        time.sleep(0.04)                                              # on, to somewhere between two checkpoints
        kernel = command.kernel()
        kernel.suspend()
        command.owner, command.reached = kernel.pid, sorted(p.name for p in command.folder.glob("*-0"))
        command.unfinished = not (command.folder / "result.json").exists()
        command.steps = Checkpoints(command.folder / f"{part}-0/checkpoints").load()["step"]
        command.notebook = (command.folder / "run.ipynb").exists()
        try:
            # a second process, while the first still has the folder
            runs.open_run(resolve(name=name, **TINY), "dds-")
        except ValueError as e: command.refusal = str(e)
        else: command.refusal = ""
        command.end()
        commands.append(command)
    return commands


@pytest.fixture(scope="module")
def resumed(start, killed, tmp_path_factory):
    "The killed run once more, to its end, with an output path and an open, empty pipe as stdin."
    output = tmp_path_factory.mktemp("executed") / "mine.ipynb"
    command = start(name=killed[0].name, output=output, stdin=subprocess.PIPE, **TINY)
    command.status, command.output = command.finish(), output
    yield command
    command.end()


@pytest.fixture(scope="module")
def stopped(start, tmp_path_factory):
    "The same settings under a third name, stopped by SIGTERM in two trainings; only papermill gets the second."
    name, commands = fresh("stopped"), []
    for part, output in (("supervised", None), ("dds", tmp_path_factory.mktemp("stopped") / "mine.ipynb"),
                         (None, tmp_path_factory.mktemp("ended") / "mine.ipynb")):
        command = start(name=name, output=output, **TINY)
        if part:
            command.wait_for(f"{part}-0/checkpoints/checkpoints.json")
            clock = time.monotonic()
            if not output:
                os.kill(command.kernel().pid, signal.SIGTERM)    # as when a service manager signals every process
            command.process.send_signal(signal.SIGTERM)
        command.status, command.output = command.finish(), output or command.folder / "run.ipynb"
        if part:
            command.seconds = time.monotonic() - clock
            command.unfinished = not (command.folder / "result.json").exists()
            command.executed = code_cells(command.output)
            command.steps = Checkpoints(command.folder / f"{part}-0/checkpoints").load()["step"]
        commands.append(command)
    yield commands
    for c in commands: c.end()


# The command

@wrapped
def test_in_a_terminal(whole):
    text = whole.text()
    assert whole.status == 0, text[-3000:]
    lines = [line for line in text.splitlines() if line.strip()]
    methods = list(json.loads((whole.folder / "result.json").read_text())["methods"])
    assert lines[-1] == f"run folder: {whole.folder}"
    assert [line.split()[0] for line in lines[-2 - len(methods):-1]] == ["method", *methods]
    assert "accuracy, %" in lines[-2 - len(methods)]
    assert re.search(r"dds 0: 100%.*40/40.*step/s.*test=[\d.]+%", text), "no progress with rate and metrics"
    assert not whole.waiting.exists() and not whole.waiting.is_symlink()


@wrapped
def test_run_folder(whole):
    assert ({"recipe.json", "result.json", "metrics.parquet", "examples.parquet",
             "run.ipynb"} <= {p.name for p in whole.folder.iterdir()})
    for part in ("supervised-0", "uniform-0", "dds-0"):
        assert (whole.folder / part / "checkpoints/checkpoints.json").exists()
        assert any((whole.folder / part / "tb").glob("events.*"))
        assert Checkpoints(whole.folder / part / "checkpoints").load()["step"] == 40
    result = json.loads((whole.folder / "result.json").read_text())["methods"]
    assert {"uniform", "dds"} <= set(result) and result["dds"]["n"] == 1
    settings = json.loads((whole.folder / "recipe.json").read_text())["settings"]
    assert TINY.items() <= settings.items()
    for name in ("metrics", "examples"):
        assert set(pd.read_parquet(whole.folder / f"{name}.parquet").method) == set(result)


@wrapped
def test_executed_notebook(whole):
    path = whole.folder / "run.ipynb"
    assert path.is_file() and not path.is_symlink()
    cells = code_cells(path)
    assert all(c["execution_count"] for c in cells)
    assert not any(o["output_type"] == "error" for c in cells for o in c["outputs"])
    assert any("injected-parameters" in c["metadata"]["tags"] and "steps = 40" in "".join(c["source"]) for c in cells)
    pictures = [o for c in cells for o in c["outputs"]
                if any(m.startswith(("image/", "application/vnd.vega")) for m in o.get("data", {}))]
    # data, comparison, curves, weights, scores, two grids
    assert len(pictures) >= 8
    assert any("accuracy, %" in str(o.get("data", {}).get("text/html", "")) for c in cells for o in c["outputs"])


@wrapped
def test_published_recipe_when_steps_are_given(start):
    "The literal command; the overrides only make it start at once, without CIFAR-10."
    command = start(steps=150_000, name=fresh("published"), dataset="digits", model="tiny_cnn", batch_size=64,
                    n_train=300, dev_size=100, crop=1, cutout=0, log_every=5, save_every=10)
    command.wait_for("supervised-0/checkpoints/checkpoints.json")
    settings = json.loads((command.folder / "recipe.json").read_text())["settings"]
    assert (settings["recipe"], settings["steps"], settings["scorer_steps"]) == ("cifar10-wrn28-10", 150_000, 100_000)
    assert (settings["dropout"], settings["scorer_lr"], settings["warmup_steps"]) == (0.1, 1e-6, 2500)
    assert len(pd.read_parquet(command.folder / "supervised-0/metrics.parquet")) > 0
    assert code_cells(command.folder / "run.ipynb")
    kernel = command.kernel()
    # what a user's kill reaches: the kernel has a session of its own
    os.killpg(command.process.pid, signal.SIGKILL)
    command.process.wait(patience(10))
    try: kernel.wait(patience(20))
    except psutil.TimeoutExpired:
        kernel.kill()
        pytest.fail("the kernel goes on training after its papermill was killed")
    runs.open_run(resolve(**settings | {"name": command.name})).close()  # the folder is free again


@wrapped
def test_with_an_output_path_as_stock_papermill(resumed):
    assert resumed.status == 0, resumed.errors()[-3000:]
    assert resumed.output.is_file() and not resumed.output.is_symlink()
    cells = code_cells(resumed.output)
    assert all(c["execution_count"] for c in cells) and any("run folder: papermill_runs/" in printed(c) for c in cells)
    assert "run folder:" not in resumed.text() and "uniform" not in resumed.text()
    assert (resumed.folder / "result.json").exists()
    assert not resumed.waiting.exists() and not resumed.waiting.is_symlink()


# Killed and started again

@wrapped
def test_killed_in_three_moments(killed):
    moments = ("supervised-0", "uniform-0", "dds-0")
    assert [[m for m in moments if m in c.reached] for c in killed] == [[*moments[:1]], [*moments[:2]], [*moments]]
    assert all(c.unfinished and c.notebook for c in killed) and all(10 <= c.steps < 40 for c in killed)


@wrapped
def test_a_folder_in_use_is_refused(killed):
    for c in killed: assert f"name = '{c.name}': the run folder is in use by process {c.owner} " in c.refusal


def unpacked(log): return pd.read_parquet(io.BytesIO(log.numpy().tobytes())).to_dict("list")

def differences(a, b, at=""):
    "Where two saved states differ, leaving out the clock."
    if isinstance(a, torch.Tensor):
        same = a.dtype == b.dtype and a.shape == b.shape and bool(((a == b) | ((a != a) & (b != b))).all())
        return [] if same else [at]
    if isinstance(a, dict):
        if set(a) != set(b): return [f"{at}: {set(a) ^ set(b)}"]
        if "log" in a: a, b = ({**s, "log": unpacked(s["log"])} for s in (a, b))
        return [d for k in a if k != "seconds" for d in differences(a[k], b[k], f"{at}/{k}")]
    if isinstance(a, (list, tuple)):
        return ([f"{at}: length"] if len(a) != len(b)
                else [d for i, (p, q) in enumerate(zip(a, b)) for d in differences(p, q, f"{at}/{i}")])
    return [] if a == b or (a != a and b != b) else [f"{at}: {a!r}, {b!r}"]


@wrapped
def test_resumed_equals_uninterrupted(whole, resumed):
    assert whole.status == resumed.status == 0
    for part in ("supervised-0", "uniform-0", "dds-0"):
        a, b = (Checkpoints(c.folder / part / "checkpoints").load() for c in (whole, resumed))
        assert set(a["parts"]) >= {"model", "ema", "optimizer", "selector", "loader", "dynamics"}
        assert differences(a, b) == [], part
        if part == "dds-0": assert a["parts"]["selector"], "no state of the scorer"
    for name in ("metrics", "examples"):
        a, b = (pd.read_parquet(c.folder / f"{name}.parquet").drop(columns="seconds", errors="ignore")
                for c in (whole, resumed))
        pd.testing.assert_frame_equal(a, b, check_exact=True)
    a, b = (json.loads((c.folder / "result.json").read_text())["methods"] for c in (whole, resumed))
    for method in a: assert all(a[method][k] == b[method][k] for k in ("accuracy", "examples", "seed"))


@wrapped
def test_resumed_goes_on_instead_of_starting_anew(resumed):
    text = "".join(map(printed, code_cells(resumed.output)))
    assert "supervised 0:" not in text and "uniform 0:" not in text    # they were finished before the last kill
    first = re.search(r"dds 0:.*?(\d+)/40", text)
    assert first and 10 <= int(first[1]) < 40


# Stopped by SIGTERM, as a machine that is taken away does it

@wrapped
def test_sigterm_ends_the_notebook_without_failure(stopped):
    for c in stopped[:2]:
        assert c.status == 0 and c.seconds < patience(30) and c.unfinished, c.errors()[-3000:]
        last = max(i for i, cell in enumerate(c.executed) if cell["execution_count"])
        # no later cell runs
        assert last < len(c.executed) - 1 and not any(cell["outputs"] for cell in c.executed[last + 1:])
        assert f"stopped by SIGTERM at step {c.steps}; the same command goes on from there" in printed(c.executed[last])
        errors = [(o["ename"], o["evalue"]) for cell in c.executed
                  for o in cell["outputs"] if o["output_type"] == "error"]
        assert errors == [("SystemExit", "0")] and any("data" in o for cell in c.executed for o in cell["outputs"])
        assert not c.waiting.exists() and not c.waiting.is_symlink()
    assert "stopped by SIGTERM" in stopped[0].errors() and f"run folder: {stopped[0].folder}" in stopped[0].text()


@wrapped
def test_stopped_equals_uninterrupted(whole, stopped):
    assert stopped[2].status == 0 and (stopped[2].folder / "result.json").exists(), stopped[2].errors()[-3000:]
    assert all(c["execution_count"] for c in code_cells(stopped[2].output))
    for part in ("supervised-0", "uniform-0", "dds-0"):
        a, b = (Checkpoints(c.folder / part / "checkpoints") for c in (whole, stopped[2]))
        assert differences(a.load(), b.load()) == [], part
        assert a.manifest["best"]["step"] == b.manifest["best"]["step"]
    for name in ("metrics", "examples"):
        a, b = (pd.read_parquet(c.folder / f"{name}.parquet").drop(columns="seconds", errors="ignore")
                for c in (whole, stopped[2]))
        pd.testing.assert_frame_equal(a, b, check_exact=True)


@wrapped
def test_sigterm_outside_of_a_training(start):
    "In the charts of the data: nothing to save, and no failure."
    command = start(name=fresh("charts"), **TINY)
    command.wait_for("recipe.json")
    time.sleep(0.3)
    command.process.send_signal(signal.SIGTERM)
    assert command.finish(patience(30)) == 0, command.errors()[-3000:]
    assert "stopped by SIGTERM between two trainings" in "".join(map(printed, code_cells(command.folder / "run.ipynb")))
    assert not list(command.folder.glob("*-0/checkpoints/checkpoints.json"))


@wrapped
def test_sigterm_before_the_run_has_begun(start):
    "While the notebook imports: the kernel ends at once, as without this project."
    command = start(name=fresh("imports"), **TINY)
    until = time.monotonic() + patience(60)
    while time.monotonic() < until:
        try:
            if command.kernel().cpu_times().user > 1: break
        except (StopIteration, psutil.NoSuchProcess): pass
        time.sleep(0.05)
    assert not command.folder.exists()
    command.process.send_signal(signal.SIGTERM)
    # papermill's status for a dead kernel
    assert command.finish(patience(30)) == 138, command.errors()[-3000:]
    assert "Kernel died" in command.errors() and not command.folder.exists() and not command.waiting.exists()


# Bad input

@pytest.fixture(scope="module")
def misspelt(start, tmp_path_factory):
    "A misspelt parameter; a killed command of the same process number has left its link to another run's notebook."
    victim = tmp_path_factory.mktemp("victim") / "run.ipynb"
    victim.write_text("another run's notebook")
    command = start(name=fresh("misspelt"), batchsize=64, before=f"ln -s '{victim}' papermill_runs/.waiting-$$.ipynb")
    command.status, command.victim = command.finish(), victim
    return command


@wrapped
def test_misspelt_parameter(misspelt):
    assert misspelt.status == 1
    lines = [line for line in misspelt.errors().splitlines() if line.strip()]
    assert lines[-1] == "ValueError: batchsize: no such parameter; did you mean 'batch_size'?"
    assert "Traceback" not in misspelt.errors()
    assert not misspelt.folder.exists() and "step/s" not in misspelt.errors() + misspelt.text()


@wrapped
def test_the_link_of_a_killed_command_is_not_followed(misspelt):
    assert misspelt.victim.read_text() == "another run's notebook"
    assert str(misspelt.victim.parent) not in misspelt.text()
    assert not misspelt.waiting.is_symlink() and not misspelt.waiting.exists()


@pytest.mark.parametrize("given, message", [
    ({"steps": "many"}, "steps = 'many': must be of type int"),
    ({"steps": 1.5}, "steps = 1.5: must be of type int"),
    ({"steps": True}, "steps = True: must be of type int"),
    ({"flip": 1}, "flip = 1: must be of type bool"),
    ({"name": 5}, "name = 5: must be of type str or none"),
    ({"lr": "0,1"}, "lr = '0,1': must be of type float"),
    ({"steps": 0}, "steps = 0: must be above 0"),
    ({"steps": -150_000}, "steps = -150000: must be above 0"),
    ({"seeds": 0}, "seeds = 0: must be above 0"),
    ({"steps": 100, "warmup_steps": 100}, "warmup_steps = 100: must be below steps = 100"),
    ({"dataset": "cifar"}, "dataset = 'cifar': neither a known name nor a folder; did you mean 'cifar10'?"),
    ({"model": "resnet"}, "model = 'resnet': must be one of "),
    ({"recipe": "quik"}, "recipe = 'quik': did you mean 'quick'?"),
    ({"recipe": "imagenet"}, "recipe = 'imagenet': did you mean 'imagenet-resnet50'?"),
    ({"stpes": 10}, "stpes: no such parameter; did you mean 'steps'?"),
    ({"noise": 1.0}, "noise = 1.0: must lie in [0, 1)"),
    ({"noise": -0.1}, "noise = -0.1: must lie in [0, 1)"),
    ({"noise": float("nan")}, "noise = nan: must be finite"),
    ({"noise_kind": "salt"}, "noise_kind = 'salt': must be one of flip, swap"),
    ({"keep_rates": "1,2"}, "keep_rates = '1,2': must be numbers in [0, 1]"),
    ({"scorer_sees": "y"}, "scorer_sees = 'y': must be one of x, xy"),
    ({"scorer_clip": 0}, "scorer_clip = 0: must be above 0"),
    ({"n_train": 1500}, "n_train = 1500 and dev_size = "),
    ({"dataset": "./no-such-folder"}, "dataset = './no-such-folder': no such folder"),
    ({"batch_size": 301, "n_train": 300}, "batch_size = 301: must lie in 1..300"),
])
def test_bad_input_stops_before_training(given, message):
    "Field, value, what is allowed."
    with pytest.raises(ValueError, match=re.escape(message)):
        settings = resolve(**{"recipe": "quick"} | given)
        Training(settings.train, load_data(settings.data))             # the first thing that a run makes; no step yet


def test_data_set_that_is_not_there(tmp_path, monkeypatch):
    monkeypatch.delenv("DATASEL_DATA", raising=False)
    with pytest.raises(ValueError, match="dataset = 'cifar10': set data_dir, or the environment variable DATASEL_DATA"):
        load_data(resolve(steps=9000).data)
    with pytest.raises(ValueError, match=f"dataset = 'cifar10': not found in {tmp_path}"):
        load_data(resolve(steps=9000, data_dir=str(tmp_path)).data)


def test_empty_class_folder(tmp_path):
    for split in ("train", "test"):
        for name in ("cat", "dog"):
            (tmp_path / split / name).mkdir(parents=True)
            Image.new("RGB", (8, 8)).save(tmp_path / split / name / "0.png")
    (tmp_path / "train/dog/0.png").unlink()
    settings = resolve(recipe="quick", dataset=str(tmp_path), dev_size=0, n_train=1)
    with pytest.raises(ValueError, match=f"{tmp_path}/train/dog: an empty class folder"): load_data(settings.data)


def test_scorer_checkpoint_of_another_model(tmp_path):
    settings = resolve(**TINY | {"steps": 2, "warmup_steps": 1, "save_every": 2})
    data = load_data(settings.data)
    fit(settings.train, data, folder=tmp_path / "tiny")
    assert saved_model(tmp_path / "tiny", settings.train, data.train)
    other = resolve(**TINY | {"model": "small_cnn"})
    with pytest.raises(ValueError, match="tiny: the checkpoint is of another model than small_cnn; .* there, .* here"):
        saved_model(tmp_path / "tiny", other.train, data.train)
    with pytest.raises(ValueError, match="nothing: has no checkpoints/ of a training"):
        saved_model(tmp_path / "nothing", other.train, data.train)


def test_folder_that_holds_another_run(tmp_path):
    runs.open_run(resolve(name="mine", **TINY), root=tmp_path).close()
    runs.open_run(resolve(name="mine", **TINY), root=tmp_path).close()      # the same command: goes on
    with pytest.raises(ValueError, match=r"name = 'mine': that folder holds another run; steps = 50 here, 40 there"):
        runs.open_run(resolve(name="mine", **TINY | {"steps": 50}), root=tmp_path)
    runs.open_run(resolve(name="mine", **TINY), root=tmp_path).close()      # the refusal has let go of the folder


# Help, and the command without the project

def test_help_lists_the_parameters(capsys, monkeypatch):
    monkeypatch.chdir(ROOT)
    with pytest.raises(SystemExit) as end: runs.papermill_main(["--help-notebook", NOTEBOOK])
    shown = capsys.readouterr().out
    assert end.value.code in (0, None)
    assert re.search(r"  steps: int \(default None\)\s+optimizer steps", shown)
    assert re.search(r"  scorer_clip: float \(default None\)\s+scores lie in \(-clip, clip\)", shown)


@pytest.mark.parametrize("line, wants", [
    ("nbs/run_dds.ipynb", True), ("nbs/run_dds.ipynb -p steps 150000", True),
    ("-p steps 150000 nbs/run_dds.ipynb", True), ("nbs/run_dds.ipynb out.ipynb", False),
    ("-p steps 9 nbs/run_dds.ipynb out.ipynb", False), ("--help-notebook nbs/run_dds.ipynb", False),
    ("nbs/11_runs.ipynb", False), ("elsewhere/run_dds.ipynb", False), ("--version", False), ("--help", False),
    ("", False)])
def test_which_commands_get_a_run_folder(line, wants, monkeypatch):
    monkeypatch.chdir(ROOT)
    assert runs.wants_run_folder(line.split()) is wants


@wrapped
def test_papermill_without_the_project(tmp_path):
    wrapper = tmp_path / "papermill"
    wrapper.write_text("import sys; sys.modules['datasel_wb'] = None   # as if it were uninstalled\n"
                       + PAPERMILL.read_text())
    done = subprocess.run([PAPERMILL.parent / "python", wrapper, "--version"], capture_output=True, text=True,
                          cwd=tmp_path, timeout=patience(60))
    assert done.returncode == 0 and re.match(r"\d+\.\d+", done.stdout) and not done.stderr, done.stderr


@wrapped
def test_nbdev_clean_leaves_nothing_of_widgets(tmp_path):
    "A stored view is the id of a model in a kernel that is gone; what a reader can use stays."
    nb = nbformat.v4.new_notebook(
        cells=[nbformat.v4.new_code_cell("import ipywidgets\nprint('before')\nipywidgets.IntSlider(3)")])
    nbclient.NotebookClient(nb).execute()
    assert "widget-view" in str(nb) and nb.metadata.widgets
    nbformat.write(nb, tmp_path / "widget.ipynb")
    subprocess.run([PAPERMILL.parent / "nbdev_clean", "--fname", tmp_path / "widget.ipynb"], check=True, cwd=ROOT,
                   timeout=patience(120))
    cleaned = nbformat.read(tmp_path / "widget.ipynb", 4)
    assert "widgets" not in cleaned.metadata and "widget-view" not in str(cleaned)
    printed, shown = cleaned.cells[0].outputs
    assert printed.text == "before\n" and shown.data["text/plain"] == "IntSlider(value=3)"
