"""XLA on its CPU runtime: one graph per step, no reads between logs, the numbers of eager PyTorch, one or several devices, resume."""
import copy
import json
import os
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from datasel_wb.core import align
from datasel_wb.data import Augment
from datasel_wb.selectors import Task
from datasel_wb.trainer import Checkpoints, Recipe, Training, evaluate
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


def test_data_on_the_host_or_on_the_device():
    "Batches sent ahead from the host are those gathered on the device; the records, history included, are those of eager PyTorch."
    augment = Augment(crop=1, cutout=2, mean=DATA.train.mean, std=DATA.train.std)
    where = {f: Training(replace(RECIPE, device="cpu" if f == "eager" else "xla", feeding="auto" if f == "eager" else f, history=2),
                         DATA, augment=augment) for f in ("eager", "device", "host")}
    assert where["host"].loader.examples.x.device.type == "cpu" and where["device"].loader.examples.x.device.type == "xla"
    for t in where.values():
        for _ in range(20): t.step()
    for name in ("device", "host"):
        a, b = where["eager"], where[name]
        for p, q in zip(a.model.parameters(), b.model.parameters()): torch.testing.assert_close(q.cpu(), p, rtol=0, atol=1e-6)
        torch.testing.assert_close(b.dynamics.rows.cpu(), a.dynamics.rows, rtol=1e-4, atol=1e-4)
        torch.testing.assert_close(b.dynamics.history("loss").cpu(), a.dynamics.history("loss"), rtol=1e-4, atol=1e-4, equal_nan=True)


@pytest.mark.parametrize("batch_size", [7, 64, 1000])
def test_evaluation_counts_every_example_once(batch_size):
    "The last batch is filled up to one shape; 1,047 examples in batches of 7 and of 64 leave 3 and 23."
    model, backend = RECIPE.build(DATA.train, 3), XLA()
    plain = evaluate(model, DATA.train, batch_size=batch_size)
    there = evaluate(backend.adapt(copy.deepcopy(model).to(backend.device)), DATA.train, None, batch_size, backend.device, backend.collectives)
    assert there["top1"] == plain["top1"] and there["loss"] == pytest.approx(plain["loss"], rel=1e-5)


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
    with torch.autograd.set_multithreading_enabled(False): v = task.dev_grad()   # as within a step
    rewards = task.align(batch.to(backend.device), v).cpu().double()
    wide = eager.model.double().eval()
    exact = align(wide, batch._replace(x=batch.x.double()), {k: t.cpu().double() for k, t in v.items()}, how="reverse")
    error = ((rewards - exact).norm() / exact.norm()).item()
    print(f"{precision}: relative error {error:.1e}")
    assert error <= 5e-3


def test_a_step_in_bfloat16():
    "Half-precision logits, losses and scorer in float32, and the method learns."
    training = Training(replace(RECIPE, device="xla", precision="bfloat16"), DATA, METHODS["dds, input alone"]())
    head = training.selector.scorer.head.weight.cpu().clone()
    for _ in range(4): training.step()
    assert training.selector.seen.logits.dtype == torch.bfloat16 and training.selector.seen.losses.dtype == torch.float32
    assert training.skips.tolist() == [0, 0, 0] and not torch.equal(head, training.selector.scorer.head.weight.cpu())
    assert training.selector.scorer.head.weight.dtype == torch.float32


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
    feeding = {4: "host"}   # on four devices also fed from the host
    jobs = {n: job(n, do="six_steps", methods=methods, out=str(tmp_path / f"{n}.pt"), feeding=feeding.get(n, "auto")) for n in counts}
    for n, process in jobs.items(): assert f"losses of 64 examples on {n} devices" in end(process)
    one, *others = (torch.load(tmp_path / f"{n}.pt", weights_only=True) for n in counts)
    for several in others:
        for method in methods:
            for name, a in one[method].items(): torch.testing.assert_close(several[method][name], a, rtol=0, atol=1e-6, equal_nan=True, msg=lambda m: f"{method}, {name}: {m}")


@pytest.mark.parametrize("workers", [0, 2])
def test_images_on_disk_for_two_devices(tmp_path, workers):
    end(job(2, do="tree", folder=str(tmp_path), workers=workers))


def test_batch_that_the_devices_cannot_share_is_refused():
    said = end(job(4, do="six_steps", methods=["uniform"], batch_size=62, out="never"), status=1)
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


def saved(folder):
    "Steps of the checkpoints so far."
    path = Path(folder) / "checkpoints" / "checkpoints.json"
    return [e["step"] for e in json.loads(path.read_text())["saved"]] if path.exists() else []


def interrupt(process, folder, signum, writing=False):
    "Send a signal once there is a new checkpoint; with `writing`, while the next one is being written."
    before = saved(folder)
    while saved(folder) == before and process.poll() is None: time.sleep(0.01)
    while writing and process.poll() is None and not list((Path(folder) / "checkpoints").glob("*.tmp")): pass
    assert process.poll() is None, "ended before it could be stopped: " + process.communicate()[0][-2000:]
    process.send_signal(signum)


def state_of(folder, *parts):
    state = Checkpoints(Path(folder) / "checkpoints", write=False).load()
    assert state["step"] == 240
    return {f"{p}/{k}": t for p in parts for k, t in state["parts"][p].items() if isinstance(t, torch.Tensor)}


def test_resume_in_a_new_process_is_bit_equal(tmp_path):
    "DDS with dropout and augmentation: SIGTERM in mid-run, kill -9 while a checkpoint is written, and on; as if nothing had been."
    whole, folder = (dict(do="whole", method="dds, input alone", folder=str(tmp_path / f), dropout=0.2) for f in ("whole", "stopped"))
    undisturbed, first = job(1, **whole), job(1, **folder)
    interrupt(first, folder["folder"], signal.SIGTERM)
    asked = time.monotonic()
    assert "stopped by SIGTERM at step" in end(first) and time.monotonic() - asked < 20
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
