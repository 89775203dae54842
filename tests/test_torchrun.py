"""Two processes under torchrun against one, in float64: the same
weights, records and method state for every method; resume."""
import json
import os
import shutil
import signal
import subprocess
import sys
import time
import uuid
from pathlib import Path

import pytest
import torch

from datasel_wb.checkpoints import Checkpoints
from forked import Forked
from methods import METHODS
from waits import patience

HERE = Path(__file__).parent
ROOT = HERE.parent
JOB = HERE / "torchrun_job.py"   # several tasks in one start: a process is seconds of imports
TORCHRUN = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node"]


def start(*command):
    "A command in two processes under torchrun."
    env = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": f"{HERE}{os.pathsep}{ROOT}"}
    return subprocess.Popen([*TORCHRUN, "2", *map(str, command)], env=env, cwd=ROOT, stdout=subprocess.PIPE,
                            stderr=subprocess.STDOUT, text=True)


def job(processes, *tasks):
    "The tasks of tests/torchrun_job.py, each with its arguments, in one process or in two under torchrun."
    told = json.dumps([list(map(str, t)) for t in tasks])
    return start(JOB, told) if processes == 2 else Forked(JOB, told, cwd=ROOT, stderr=subprocess.STDOUT)


def end(process, status=0):
    said, _ = process.communicate(timeout=patience(300))
    assert (process.returncode == 0) == (status == 0), said[-4000:]
    return said


DROPOUT = {1: 0.0, 2: 0.1}   # by processes: masks are drawn per process


@pytest.fixture(scope="module")
def done(tmp_path_factory):
    "The folder of what one and two processes saved: every method, a training from start to end; and what they said."
    folder = tmp_path_factory.mktemp("torchrun")
    tasks = {n: [("each", folder / f"{n}.pt"), ("whole", folder / f"whole-{n}", DROPOUT[n])] for n in (1, 2)}
    jobs = job(1, *tasks[1]), job(2, *tasks[2], ["refused"])
    return folder, [end(j, status) for j, status in zip(jobs, (0, 1))]


@pytest.fixture(scope="module")
def trained(done): return [torch.load(done[0] / f"{n}.pt", weights_only=True) for n in (1, 2)]


@pytest.mark.parametrize("method", METHODS)
def test_two_processes_equal_one(trained, method):
    one, two = (t[method] for t in trained)
    assert one.keys() == two.keys() and one["passes"] == two["passes"]
    for name, a in one.items():
        if isinstance(a, torch.Tensor):
            torch.testing.assert_close(two[name], a, rtol=1e-12, atol=1e-12, equal_nan=True,
                                       msg=lambda m: f"{name}: {m}")
    for split, values in one["results"].items():
        assert two["results"][split] == pytest.approx(values, rel=1e-5)   # summed in float32 logits
    for name, value in one["scores"].items():
        if "auroc" not in name:
            assert two["scores"][name] == pytest.approx(value, rel=1e-6, nan_ok=True)       # ties among equal scores


def checkpoint(folder): return Checkpoints(folder / "checkpoints", write=False).load()


def stopped(folder, dropout):
    "Two processes, stopped by SIGTERM after the first checkpoint; torchrun passes it on and ends with a failure."
    process, manifest = job(2, ["whole", folder, dropout]), folder / "checkpoints" / "checkpoints.json"
    while not manifest.exists() and process.poll() is None: time.sleep(0.01)
    process.send_signal(signal.SIGTERM)
    assert end(process, status=1).count("stopped by SIGTERM at step") == 2
    assert 10 <= checkpoint(folder)["step"] < 120


@pytest.mark.parametrize("processes, dropout", DROPOUT.items())
def test_stopped_with_two_processes_and_resumed(done, tmp_path, processes, dropout):
    "SIGTERM stops both at the same step. One process goes on from there, or two with dropout; as if nothing had been."
    both, whole = tmp_path / "both", done[0] / f"whole-{processes}"
    stopped(both, dropout)
    end(job(processes, ["whole", both, dropout]))
    a, b = checkpoint(whole), checkpoint(both)
    assert a["step"] == b["step"] == 120
    for part in ("model", "ema", "dynamics"):
        for k, t in a["parts"][part].items():
            torch.testing.assert_close(b["parts"][part][k], t, rtol=1e-6, atol=1e-6, equal_nan=True,
                                       msg=lambda m: f"{part} {k}: {m}")
    assert {p.relative_to(both).parts[0] for p in both.rglob("*")} == {"checkpoints", "examples.parquet",
                                                                       "metrics.parquet", "tb"}


@pytest.mark.parametrize("said", ["batch_size = 63: must be a multiple of the 2 devices",
                                  "Local = 2 processes: must be one, because it keeps what it saw of its own part"])
def test_what_processes_cannot_share_is_refused(done, said):
    assert f"ValueError: {said}" in done[1][1]


def test_the_notebook_in_two_processes():
    "papermill under torchrun: one run folder with one notebook."
    name, papermill = f"test-torchrun-{uuid.uuid4().hex[:8]}", ROOT / ".venv/bin/papermill"
    if not papermill.exists() or "datasel_wb" not in papermill.read_text():
        pytest.skip("no papermill wrapper in .venv; `make test` writes it")
    settings = dict(device="cpu", recipe="quick", steps=40, warmup_steps=5, scorer_steps=30, seeds=1, name=name)
    try:
        end(start("--no-python", papermill, "nbs/run_dds.ipynb",
                  *(a for k, v in settings.items() for a in ("-p", k, v))))
        folder = ROOT / "papermill_runs" / name
        assert list(json.loads((folder / "result.json").read_text())["methods"]) == ["uniform", "dev-only", "dds"]
        assert "cpu, 2 devices" in (folder / "run.ipynb").read_text()
        assert not [f for f in folder.parent.glob(".waiting-*") if name in f.read_text()]
    finally: shutil.rmtree(ROOT / "papermill_runs" / name, ignore_errors=True)
