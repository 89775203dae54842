"""Translation training on other engines: two processes equal one in
float64; XLA equals eager PyTorch, compiles once, is split and resumed."""
import json
import os
import signal
import subprocess
from pathlib import Path

import pytest
import torch

from datasel_wb.checkpoints import Checkpoints
from forked import Forked
from languages import METHODS
from test_torchrun import end, start

HERE = Path(__file__).parent
XLA = {"PJRT_DEVICE": "CPU", "XLA_FLAGS": "--xla_backend_optimization_level=0"}   # a third off the time to compile


def job(*, processes=1, env=None, **task):
    "Start tests/nmt_job.py, under torchrun where there are several processes."
    if processes > 1: return start(HERE / "nmt_job.py", json.dumps(task))
    return Forked(HERE / "nmt_job.py", json.dumps(task), env=os.environ | (env or {}), cwd=HERE.parent,
                  stderr=subprocess.STDOUT)


def on_xla(devices=1, **task):
    pytest.importorskip("torch_xla")
    return job(env=XLA | {"CPU_NUM_DEVICES": str(devices)}, **task)


def both(tmp_path, *jobs):
    "What two jobs saved, and what the second said."
    said = [end(j) for j in jobs]
    return *(torch.load(tmp_path / f"{n}.pt", weights_only=True) for n in (1, 2)), said[1]


def test_two_processes_equal_one(tmp_path):
    "A few blocks of each method; one process translates and all of them know the scores."
    task = dict(do="each", methods=list(METHODS), steps=16)
    ones, twos, _ = both(tmp_path, job(out=str(tmp_path / "1.pt"), **task),
                         job(processes=2, out=str(tmp_path / "2.pt"), **task))
    second = torch.load(tmp_path / "2.pt.1", weights_only=True)
    for method in METHODS:
        one, two = ones[method], twos[method]
        assert one.keys() == two.keys() and one["blocks"] == two["blocks"] and one["passes"] == two["passes"]
        assert one["passes"] == {"dds": 2 * 4 * 16, "tcs_dds": 2 * 4 * 16, "dds, dot, projected": 2 * 2 * 4 * 16,
                                 "dds, low first": (one["blocks"] - 1) * 16}.get(method, 0)   # of one language
        for name, a in one.items():
            if isinstance(a, torch.Tensor):
                torch.testing.assert_close(two[name], a, rtol=1e-10, atol=1e-10, equal_nan=True,
                                           msg=lambda m: f"{method}, {name}: {m}")
        assert two["meters"] == pytest.approx(one["meters"], rel=1e-10) and second[method]["results"] == two["results"]
        for split in ("dev", "test"): assert two["results"][split] == pytest.approx(one["results"][split], rel=1e-10)


BESIDE = [dict(method="uniform", steps=20, feeding="host"), dict(method="dds, dot, projected", steps=26)]


@pytest.fixture(scope="module")
def beside():
    "What one process says of both."
    return end(on_xla(do="all_beside", tasks=BESIDE))


@pytest.mark.parametrize("method", [task["method"] for task in BESIDE])
def test_xla_beside_eager(beside, method):
    assert f"{method}: weights within" in beside


def test_two_virtual_devices_equal_one(tmp_path):
    "TCS+DDS over three blocks; every batch is split, 15 x 26 and 24 x 16 pieces being all that 400 hold."
    task = dict(do="some_steps", methods=["tcs_dds"], steps=14)
    one, two, said = both(tmp_path, *(on_xla(n, out=str(tmp_path / f"{n}.pt"), **task) for n in (1, 2)))
    assert "batches of [26, 16] pairs on 2 devices" in said
    for name, a in one["tcs_dds"].items():
        atol = 1e-4 if name.startswith("selector/") else 1e-5   # Adam on ψ magnifies what rounding leaves
        torch.testing.assert_close(two["tcs_dds"][name], a, rtol=0, atol=atol, equal_nan=True,
                                   msg=lambda m: f"{name}: {m}")


def test_killed_and_resumed_on_xla_is_bit_equal(tmp_path):
    "DDS with dropout, kill -9 between two checkpoints in mid-block, and on; as if nothing had been."
    from test_xla_devices import interrupt
    whole, stopped = (dict(do="whole", method="dds", folder=str(tmp_path / f), device="xla", dropout=0.2, steps=40)
                      for f in ("whole", "stopped"))
    undisturbed, first = on_xla(**whole), on_xla(**stopped)
    interrupt(first, stopped["folder"], signal.SIGKILL)
    end(first, -signal.SIGKILL)
    end(on_xla(**stopped))
    end(undisturbed)
    a, b = (Checkpoints(f"{f['folder']}/checkpoints", write=False).load() for f in (whole, stopped))
    assert a["step"] == b["step"] == 40
    for part in ("model", "ema", "selector"):
        for k, t in a["parts"][part].items():
            if isinstance(t, torch.Tensor): assert torch.equal(b["parts"][part][k], t), f"{part}/{k}"
    for a, b in zip(*(s["parts"]["optimizer"]["state"].values() for s in (a, b))):
        assert all(torch.equal(a[k], b[k]) for k in a)
