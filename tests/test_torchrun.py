"""Two processes under torchrun against one, in float64: the same weights, records and method state for every method; resume."""
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

from datasel_wb.trainer import Checkpoints
from methods import METHODS

HERE = Path(__file__).parent
JOB = HERE / "torchrun_job.py"
TORCHRUN = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node"]


def start(*command):
    env = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(HERE)}
    return subprocess.Popen([str(c) for c in command], env=env, cwd=HERE.parent, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)


def end(process, status=0):
    said, _ = process.communicate(timeout=900)
    assert (process.returncode == 0) == (status == 0), said[-4000:]
    return said


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    "What one and what two processes saved, method by method."
    folder = tmp_path_factory.mktemp("torchrun")
    jobs = [start(*command, JOB, "each", folder / f"{n}.pt") for n, command in ((1, [sys.executable]), (2, [*TORCHRUN, 2]))]
    for job in jobs: end(job)
    return [torch.load(folder / f"{n}.pt", weights_only=True) for n in (1, 2)]


@pytest.mark.parametrize("method", METHODS)
def test_two_processes_equal_one(trained, method):
    one, two = (t[method] for t in trained)
    assert one.keys() == two.keys() and one["passes"] == two["passes"]
    for name, a in one.items():
        if isinstance(a, torch.Tensor): torch.testing.assert_close(two[name], a, rtol=1e-12, atol=1e-12, equal_nan=True, msg=lambda m: f"{name}: {m}")
    for split, values in one["results"].items(): assert two["results"][split] == pytest.approx(values, rel=1e-5)   # summed in float32 logits
    for name, value in one["scores"].items():
        if "auroc" not in name: assert two["scores"][name] == pytest.approx(value, rel=1e-6, nan_ok=True)       # ties among equal scores


def checkpoint(folder): return Checkpoints(folder / "checkpoints", write=False).load()


def stopped(folder, *method):
    "Two processes, stopped by SIGTERM after the first checkpoint; torchrun passes it on and itself ends with a failure."
    process, manifest = start(*TORCHRUN, 2, JOB, "whole", folder, *method), folder / "checkpoints" / "checkpoints.json"
    while not manifest.exists() and process.poll() is None: time.sleep(0.01)
    process.send_signal(signal.SIGTERM)
    said = end(process, status=1)
    assert said.count("stopped by SIGTERM at step") == 2
    return checkpoint(folder)["step"]


def test_stopped_with_two_processes_resumed_with_one(tmp_path):
    "SIGTERM stops both at the same step; one process goes on from their checkpoint, to the weights of one that made all steps."
    alone = start(sys.executable, JOB, "whole", tmp_path / "alone")
    at = stopped(tmp_path / "both")
    assert 20 <= at < 240
    end(start(sys.executable, JOB, "whole", tmp_path / "both"))
    end(alone)
    a, b = (checkpoint(tmp_path / f) for f in ("alone", "both"))
    assert a["step"] == b["step"] == 240
    for part in ("model", "ema", "dynamics"):
        for k, t in a["parts"][part].items(): torch.testing.assert_close(b["parts"][part][k], t, rtol=1e-6, atol=1e-6, equal_nan=True, msg=lambda m: f"{part} {k}: {m}")
    files = {p.relative_to(tmp_path / "both").parts[0] for p in (tmp_path / "both").rglob("*")}
    assert files == {"checkpoints", "examples.parquet", "metrics.parquet", "tb"}


def test_a_state_per_process_needs_as_many_processes(tmp_path):
    stopped(tmp_path, "local")
    said = end(start(sys.executable, JOB, "whole", tmp_path, "local"), status=1)
    assert "ValueError: world = 1: Local has a state per process, so the 2 processes of the checkpoint are needed" in said


def test_batch_that_the_processes_cannot_share_is_refused():
    said = end(start(*TORCHRUN, 2, JOB, "batch", 63), status=1)
    assert "ValueError: batch_size = 63: must be a multiple of the 2 devices" in said
