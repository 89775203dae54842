"""XLA with virtual devices and in new processes: several devices
equal one, a run that was stopped equals one that was not."""
import json
import os
import signal
import subprocess
import time
from pathlib import Path

import pytest
import torch

from datasel_wb.checkpoints import Checkpoints
from forked import Forked
from waits import patience, slowness

pytest.importorskip("torch_xla")
HERE = Path(__file__).parent
# compiles in a quarter of the time, runs slower: right for a few steps
QUICK = {"XLA_FLAGS": "--xla_backend_optimization_level=0"}


def job(devices, **task):
    "Start tests/xla_job.py with so many virtual devices."
    env = os.environ | {"PJRT_DEVICE": "CPU", "CPU_NUM_DEVICES": str(devices)} | QUICK
    return Forked(HERE / "xla_job.py", json.dumps(task), env=env, cwd=HERE.parent, stderr=subprocess.STDOUT)


def end(process, status=0):
    said, _ = process.communicate(timeout=patience(300))
    assert process.returncode == status, said[-4000:]
    return said


METHODS = {1: ["dds", "data parameters, instance", "dynams, proxy", "mentornet"],
           2: ["dds", "data parameters, instance", "dynams, proxy", "mentornet"],
           4: ["dds", "data parameters, instance"]}   # trained on so many devices


@pytest.fixture(scope="module")
def six_steps(tmp_path_factory):
    """What six steps without dropout come to on 1, 2 and 4 devices, and what was said; on four fed from the host, and
    refused a batch at the end. One process each: a new one is ten seconds of imports."""
    folder, more = tmp_path_factory.mktemp("six"), {4: dict(feeding="host", refused=62)}
    jobs = {n: job(n, do="six_steps", methods=m, out=str(folder / f"{n}.pt"), **more.get(n, {}))
            for n, m in METHODS.items()}
    said = {n: end(process, status=int(n == 4)) for n, process in jobs.items()}
    return {n: torch.load(folder / f"{n}.pt", weights_only=True) for n in METHODS}, said


@pytest.mark.parametrize("several, methods", [(4, METHODS[4]), (2, METHODS[4]), (2, METHODS[2][2:])])
def test_virtual_devices_equal_one(six_steps, several, methods):
    "Six steps on 1, 2 and 4 devices; the batch is really split."
    states, said = six_steps
    for n in (1, several): assert said[n].count(f"losses of 64 examples on {n} devices") == len(METHODS[n])
    for method in methods:
        for name, a in states[1][method].items():
            torch.testing.assert_close(states[several][method][name], a, rtol=0, atol=1e-6, equal_nan=True,
                                       msg=lambda m: f"{method}, {name}: {m}")


@pytest.fixture(scope="module")
def tree(tmp_path_factory):
    "One process for both: the graphs are the same."
    return end(job(2, do="tree", folder=str(tmp_path_factory.mktemp("tree")), workers=[0, 2]))


@pytest.mark.parametrize("workers", [0, 2])
def test_images_on_disk_for_two_devices(tree, workers):
    assert f"{workers} workers: as eager PyTorch" in tree


def test_batch_that_the_devices_cannot_share_is_refused(six_steps):
    assert "ValueError: batch_size = 62: must be a multiple of the 4 devices" in six_steps[1][4]


def saved(folder):
    "Steps of the checkpoints so far."
    path = Path(folder) / "checkpoints" / "checkpoints.json"
    return [e["step"] for e in json.loads(path.read_text())["saved"]] if path.exists() else []


def interrupt(process, folder, signum, writing=False):
    "Send a signal once there is a new checkpoint; with `writing`, while the next one is being written."
    before = saved(folder)
    while saved(folder) == before and process.poll() is None: time.sleep(0.01)
    while writing and process.poll() is None and not list((Path(folder) / "checkpoints").glob("*.tmp")):
        time.sleep(0.0005)
    assert process.poll() is None, "ended before it could be stopped: " + process.communicate()[0][-2000:]
    process.send_signal(signum)


def state_of(folder, *parts):
    state = Checkpoints(Path(folder) / "checkpoints", write=False).load()
    assert state["step"] == 40
    return {f"{p}/{k}": t for p in parts for k, t in state["parts"][p].items() if isinstance(t, torch.Tensor)}


def test_resume_in_a_new_process_is_bit_equal(tmp_path):
    "DDS with dropout and augmentation: SIGTERM in mid-run, kill -9 while a checkpoint is written, and on, unharmed."
    whole, folder = (dict(do="whole", method="dds, input alone", folder=str(tmp_path / f), dropout=0.2)
                     for f in ("whole", "stopped"))
    undisturbed, first = job(1, **whole), job(1, **folder)
    interrupt(first, folder["folder"], signal.SIGTERM)
    asked = time.monotonic()
    assert "stopped by SIGTERM at step" in end(first) and time.monotonic() - asked < 20 * slowness()
    second = job(1, **folder)
    interrupt(second, folder["folder"], signal.SIGKILL, writing=True)
    end(second, -signal.SIGKILL)
    end(job(1, **folder))
    end(undisturbed)
    a, b = (state_of(f["folder"], "model", "ema", "selector") for f in (whole, folder))
    assert a.keys() == b.keys() and all(torch.equal(a[k], b[k]) for k in a)


def test_two_devices_resumed_on_one(tmp_path):
    one, two = (dict(do="whole", method="uniform", folder=str(tmp_path / f)) for f in ("one", "two"))
    undisturbed, first = job(1, **one), job(2, **two)
    interrupt(first, two["folder"], signal.SIGTERM)
    end(first)
    end(job(1, **two))
    end(undisturbed)
    a, b = (state_of(f["folder"], "model", "ema") for f in (one, two))
    for k in a: torch.testing.assert_close(b[k], a[k], rtol=0, atol=1e-5, msg=lambda m: f"{k}: {m}")
