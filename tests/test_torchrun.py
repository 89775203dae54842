"""Two processes under torchrun against one, in float64: the same weights, records and method state for every method."""
import math
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from methods import METHODS

HERE = Path(__file__).parent
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
    jobs = [start(*command, HERE / "torchrun_job.py", folder / f"{n}.pt") for n, command in ((1, [sys.executable]), (2, [*TORCHRUN, 2]))]
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
