"""XLA on its CPU runtime: one graph per step, no reads between logs, the numbers of eager PyTorch."""
import copy
import os
import subprocess
import sys
from dataclasses import replace

import pytest
import torch

from datasel_wb.core import align
from datasel_wb.images import Augment
from datasel_wb.report import Report
from datasel_wb.selectors import Task
from datasel_wb.loop import Recipe, Training, evaluate
from methods import DATA, METHODS
from waits import patience

pytest.importorskip("torch_xla")
from datasel_wb.tpu_trainer import XLA  # noqa: E402

RECIPE = Recipe(model="tiny_cnn", epochs=4, batch_size=64, warmup_steps=5, ema_decay=0.9)
# σ of 0.001 and weights cut at 0 magnify what rounding leaves
LOOSE = {"data parameters, joint": 1e-4, "batchweight": 2e-3, "batchweight, running": 2e-3}


@pytest.mark.parametrize("method", METHODS)
def test_every_method_in_one_graph_as_in_eager(method):
    """Three epochs beside eager PyTorch: after warm-up no step compiles; between logs nothing is read on the host
    (subset methods choose at the start of an epoch); after six steps the weights agree to 1e-6."""
    eager, xla = (Training(replace(RECIPE, device=d, epochs=3), DATA, METHODS[method]()) for d in ("cpu", "xla"))
    while not xla.done:
        new_epoch = not xla.loader.remaining
        eager.step()
        before = xla.backend.counters()
        xla.step()
        xla.backend.synchronize()
        after = xla.backend.counters()
        if not new_epoch:
            assert after["xla/from_device"] == before["xla/from_device"], f"step {xla.steps_done} reads on the host"
        if not new_epoch and xla.steps_done > 4:
            assert after["xla/compiles"] == before["xla/compiles"], f"step {xla.steps_done} compiles"
        if xla.steps_done == 6:
            gap = max((p - q.cpu()).abs().max().item()
                      for p, q in zip(eager.model.parameters(), xla.model.parameters()))
            assert gap <= LOOSE.get(method, 1e-6)
        if xla.steps_done % 15 == 0:
            assert xla.read_meters().keys() - {"xla/compiles", "xla/to_device",
                                               "xla/from_device"} == eager.read_meters().keys()
            assert Report(xla).opinions().keys() == Report(eager).opinions().keys()
            evaluated = xla.backend.counters()["xla/compiles"]
            results = xla.evaluate()
            if xla.steps_done > 15:
                assert xla.backend.counters()["xla/compiles"] == evaluated, "the second evaluation compiles"
            if xla.steps_done == 15:
                assert results["test"]["loss"] == pytest.approx(eager.evaluate()["test"]["loss"], rel=0.02)
    assert eager.done and xla.skips.tolist() == [0, 0, 0]


def test_learning_rates_0_and_1_do_not_compile(monkeypatch):
    training = Training(replace(RECIPE, device="xla"), DATA)
    for lr in (0.3, 0.1, 0.0, 1.0, 0.5):
        monkeypatch.setattr(Recipe, "lr_at", lambda self, place: lr)
        before = [p.clone() for p in training.model.parameters()]
        training.step()
        training.backend.synchronize()
        if lr == 0.3: compiled = training.backend.counters()["xla/compiles"]
        if lr == 0.0: assert all(torch.equal(p.cpu(), q.cpu()) for p, q in zip(before, training.model.parameters()))
    assert training.backend.counters()["xla/compiles"] <= compiled + 2   # the clones of this test


def test_data_on_the_host_or_on_the_device():
    "Batches prefetched from the host are those gathered on the device; records and history are those of eager PyTorch."
    augment = Augment(crop=1, cutout=2, mean=DATA.train.mean, std=DATA.train.std)
    where = {f: Training(replace(RECIPE, device="cpu" if f == "eager" else "xla",
                                 feeding="auto" if f == "eager" else f, history=2),
                         DATA, augment=augment) for f in ("eager", "device", "host")}
    assert where["host"].loader.examples.x.device.type == "cpu"
    assert where["device"].loader.examples.x.device.type == "xla"
    for t in where.values():
        for _ in range(20): t.step()
    for name in ("device", "host"):
        a, b = where["eager"], where[name]
        for p, q in zip(a.model.parameters(), b.model.parameters()):
            torch.testing.assert_close(q.cpu(), p, rtol=0, atol=1e-6)
        torch.testing.assert_close(b.dynamics.rows.cpu(), a.dynamics.rows, rtol=1e-4, atol=1e-4)
        torch.testing.assert_close(b.dynamics.history("loss").cpu(), a.dynamics.history("loss"), rtol=1e-4, atol=1e-4,
                                   equal_nan=True)


@pytest.mark.parametrize("batch_size", [7, 64, 1000])
def test_evaluation_counts_every_example_once(batch_size):
    "The last batch is filled up to one shape; of 1,047 batches of 7 and 64 leave 3 and 23; one may turn by rounding."
    model, backend = RECIPE.build(DATA.train, 3), XLA()
    plain = evaluate(model, DATA.train, batch_size=batch_size)
    there = evaluate(backend.adapt(copy.deepcopy(model).to(backend.device)), DATA.train, None, batch_size,
                     backend.device, backend.collectives)
    assert there["top1"] == pytest.approx(plain["top1"], abs=0.1)
    assert there["loss"] == pytest.approx(plain["loss"], rel=1e-5)


@pytest.fixture(scope="module")
def trained():
    "A net after 20 epochs of eager training."
    eager = Training(replace(RECIPE, device="cpu", epochs=20), DATA)
    while not eager.done: eager.step()
    assert evaluate(eager.model, DATA.test)["top1"] > 80
    return eager.model


@pytest.mark.parametrize("precision", ["float32", "bfloat16"])
def test_rewards_of_a_trained_net_against_float64(trained, precision):
    "Relative error of the rewards of a batch, the direction being a dev gradient of the same precision."
    backend = XLA("xla", precision)
    model = backend.adapt(RECIPE.build(DATA.train).to(backend.device))
    model.load_state_dict(trained.state_dict())
    task = Task(model, DATA.train, DATA.dev, autocast=backend.autocast, collectives=backend.collectives)
    batch = DATA.train.take(DATA.train.ids[:64])
    batch = batch._replace(x=task.prepare(batch.x))
    with torch.autograd.set_multithreading_enabled(False): v = task.dev_grad()   # as within a step
    rewards = task.align(batch.to(backend.device), v).cpu().double()
    wide = copy.deepcopy(trained).double().eval()
    exact = align(wide, batch._replace(x=batch.x.double()), {k: t.cpu().double() for k, t in v.items()}, how="reverse")
    error = ((rewards - exact).norm() / exact.norm()).item()
    print(f"{precision}: relative error {error:.1e}")
    assert error <= 5e-3


def test_a_step_in_bfloat16():
    "Half-precision logits, losses and scorer in float32, and the method learns."
    training = Training(replace(RECIPE, device="xla", precision="bfloat16"), DATA, METHODS["dds, input alone"]())
    head = training.selector.scorer.head.weight.cpu().clone()
    for _ in range(4): training.step()
    assert training.selector.seen.logits.dtype == torch.bfloat16
    assert training.selector.seen.losses.dtype == torch.float32
    assert training.skips.tolist() == [0, 0, 0] and not torch.equal(head, training.selector.scorer.head.weight.cpu())
    assert training.selector.scorer.head.weight.dtype == torch.float32


def test_what_is_not_there_is_said(monkeypatch):
    monkeypatch.setattr("datasel_wb.tpu_trainer.version", lambda name: "2.8.1")
    with pytest.raises(ValueError, match=f"torch {torch.__version__.split('+')[0]}.* and torch_xla 2.8.1: "
                       "must be of the same release"):
        XLA()
    def missing(name): raise __import__("importlib.metadata").metadata.PackageNotFoundError(name)
    monkeypatch.setattr("datasel_wb.tpu_trainer.version", missing)
    with pytest.raises(ValueError, match=r"needs torch_xla, which is not installed; pip install 'datasel_wb\[tpu\]'"):
        XLA()


def test_a_kind_of_device_that_is_not_there():
    env = os.environ | {"PJRT_DEVICE": "TPU"}
    code = "from datasel_wb.tpu_trainer import XLA; XLA()"
    done = subprocess.run([sys.executable, "-c", code], env=env, capture_output=True, text=True, timeout=patience(120))
    assert done.returncode == 1 and "ValueError: PJRT_DEVICE = 'TPU': no such device here" in done.stderr, (
        done.stderr[-2000:])
