"""XLA on its CPU runtime: one graph per step, no reads between logs, the numbers of eager PyTorch, one or several devices."""
import json
import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from datasel_wb.core import align
from datasel_wb.selectors import Task
from datasel_wb.trainer import Recipe, Training, evaluate
from methods import DATA, METHODS

pytest.importorskip("torch_xla")
from datasel_wb.tpu_trainer import XLA  # noqa: E402

HERE = Path(__file__).parent
RECIPE = Recipe(model="tiny_cnn", epochs=4, batch_size=64, warmup_steps=5, ema_decay=0.9)
LOOSE = {"data parameters, joint": 1e-4, "batchweight": 2e-3}   # σ of 0.001 and weights cut at 0 magnify what rounding leaves


@pytest.mark.parametrize("method", METHODS)
def test_every_method_in_one_graph_as_in_eager(method):
    """Four epochs beside eager PyTorch: after warm-up a step compiles nothing; between logs nothing is read on the host
    (subset methods choose at the start of an epoch); after six steps the weights agree to 1e-6."""
    eager, xla = (Training(replace(RECIPE, device=d), DATA, METHODS[method]()) for d in ("cpu", "xla"))
    while not xla.done:
        new_epoch = not xla.loader.remaining
        eager.step()
        before = xla.backend.counters()
        xla.step()
        xla.backend.fence()
        after = xla.backend.counters()
        if not new_epoch: assert after["xla/from_device"] == before["xla/from_device"], f"step {xla.steps_done} reads on the host"
        if not new_epoch and xla.steps_done > 4: assert after["xla/compiles"] == before["xla/compiles"], f"step {xla.steps_done} compiles"
        if xla.steps_done == 6:
            gap = max((p - q.cpu()).abs().max().item() for p, q in zip(eager.model.parameters(), xla.model.parameters()))
            assert gap <= LOOSE.get(method, 1e-6)
        if xla.steps_done % 20 == 0:
            assert xla.read_meters().keys() - {"xla/compiles", "xla/to_device", "xla/from_device"} == eager.read_meters().keys()
            assert xla.opinions().keys() == eager.opinions().keys()
            evaluated = xla.backend.counters()["xla/compiles"]
            results = xla.evaluate()
            if xla.steps_done > 20: assert xla.backend.counters()["xla/compiles"] == evaluated, "the second evaluation compiles"
            if xla.steps_done == 20: assert results["test"]["loss"] == pytest.approx(eager.evaluate()["test"]["loss"], rel=0.02)
    assert eager.done and xla.skips.tolist() == [0, 0, 0]


def test_learning_rates_0_and_1_do_not_compile(monkeypatch):
    training = Training(replace(RECIPE, device="xla"), DATA)
    for lr in (0.3, 0.1, 0.0, 1.0, 0.5):
        monkeypatch.setattr(Recipe, "lr_at", lambda self, place: lr)
        before = [p.clone() for p in training.model.parameters()]
        training.step()
        training.backend.fence()
        if lr == 0.3: compiled = training.backend.counters()["xla/compiles"]
        if lr == 0.0: assert all(torch.equal(p.cpu(), q.cpu()) for p, q in zip(before, training.model.parameters()))
    assert training.backend.counters()["xla/compiles"] <= compiled + 2   # the clones of this test


@pytest.mark.parametrize("precision", ["float32", "bfloat16"])
def test_rewards_of_a_trained_net_against_float64(precision):
    "Relative error of the rewards of a batch, the direction being a dev gradient of the same precision."
    eager = Training(replace(RECIPE, device="cpu", epochs=20), DATA)
    while not eager.done: eager.step()
    assert evaluate(eager.model, DATA.test)["top1"] > 80
    backend = XLA("xla", precision)
    model = backend.adapt(RECIPE.build(DATA.train).to(backend.device))
    model.load_state_dict(eager.model.state_dict())
    task = Task(model, DATA.train, DATA.dev, autocast=backend.autocast, collectives=backend.collectives)
    batch = DATA.train.take(torch.arange(64))
    batch = batch._replace(x=task.prepare(batch.x))
    v = task.dev_grad()
    rewards = task.align(batch.to(backend.device), v).cpu().double()
    wide = eager.model.double().eval()
    exact = align(wide, batch._replace(x=batch.x.double()), {k: t.cpu().double() for k, t in v.items()}, how="reverse")
    error = ((rewards - exact).norm() / exact.norm()).item()
    print(f"{precision}: relative error {error:.1e}")
    assert error <= 5e-3


def job(devices, **task):
    "Start tests/xla_job.py with so many virtual devices."
    env = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(HERE), "PJRT_DEVICE": "CPU", "CPU_NUM_DEVICES": str(devices)}
    return subprocess.Popen([sys.executable, HERE / "xla_job.py", json.dumps(task)], env=env, cwd=HERE.parent, stdout=subprocess.PIPE,
                            stderr=subprocess.STDOUT, text=True)


def end(process, status=0):
    said, _ = process.communicate(timeout=900)
    assert process.returncode == status, said[-4000:]
    return said


@pytest.mark.parametrize("methods, counts", [(["dds", "data parameters, instance"], (1, 2, 4)), (["dynams, proxy", "mentornet"], (1, 2))])
def test_virtual_devices_equal_one(tmp_path, methods, counts):
    "Six steps without dropout on 1, 2 and 4 devices; the batch is really split."
    jobs = {n: job(n, methods=methods, out=str(tmp_path / f"{n}.pt")) for n in counts}
    for n, process in jobs.items(): assert f"losses of 64 examples on {n} devices" in end(process)
    one, *others = (torch.load(tmp_path / f"{n}.pt", weights_only=True) for n in counts)
    for several in others:
        for method in methods:
            for name, a in one[method].items(): torch.testing.assert_close(several[method][name], a, rtol=0, atol=1e-6, equal_nan=True, msg=lambda m: f"{method}, {name}: {m}")


def test_batch_that_the_devices_cannot_share_is_refused():
    said = end(job(4, methods=["uniform"], batch_size=62, out="never"), status=1)
    assert "ValueError: batch_size = 62: must be a multiple of the 4 devices" in said


def test_what_is_not_there_is_said(monkeypatch):
    monkeypatch.setattr("datasel_wb.tpu_trainer.version", lambda name: "2.8.1")
    with pytest.raises(ValueError, match=f"torch {torch.__version__.split('+')[0]}.* and torch_xla 2.8.1: must be of the same release"): XLA()
    def missing(name): raise __import__("importlib.metadata").metadata.PackageNotFoundError(name)
    monkeypatch.setattr("datasel_wb.tpu_trainer.version", missing)
    with pytest.raises(ValueError, match=r"needs torch_xla, which is not installed; pip install 'datasel_wb\[tpu\]'"): XLA()


def test_a_kind_of_device_that_is_not_there():
    env = os.environ | {"PJRT_DEVICE": "TPU"}
    code = "from datasel_wb.tpu_trainer import XLA; XLA()"
    done = subprocess.run([sys.executable, "-c", code], env=env, capture_output=True, text=True, timeout=300)
    assert done.returncode == 1 and "ValueError: PJRT_DEVICE = 'TPU': no such device here" in done.stderr, done.stderr[-2000:]
