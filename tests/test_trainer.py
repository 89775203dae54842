"""The loop: equal to plain PyTorch, equal after a kill, and nothing lost when the disk or the numbers fail."""
import copy
import json
import math
import os
import random
import resource
import shutil
import signal
import subprocess
import sys
import threading
import time
import warnings
from dataclasses import replace
from pathlib import Path

import fsspec
import pandas as pd
import pytest
import torch
import torch.nn.functional as F

from datasel_wb.core import Collectives, structure
from datasel_wb.datasets import DataRecipe, load_data
from datasel_wb.examples import Loader
from datasel_wb.images import Augment
from datasel_wb.models import make_model
from datasel_wb.scorer import DDS, Scorer
from datasel_wb.backends import BACKENDS, Eager, fastest_threads, step_where
from datasel_wb.checkpoints import Checkpoints, snapshot
from datasel_wb.loop import EMA, Recipe, Training, decayed
from datasel_wb.trainer import fit, saved_model
from datasel_wb.weighting import BatchWeight, DataParameters, Sigma
from forked import Forked
from waits import patience, slowness

RECIPE = Recipe(model="tiny_cnn", steps=60, batch_size=64, warmup_steps=5, log_every=7, eval_every=20, save_every=15)


@pytest.fixture(scope="module")
def digits():
    return load_data(DataRecipe(dataset="digits", dev_size=250, noise=0.2))


def same(a, b):
    return all(torch.equal(x, y) for x, y in zip(a, b, strict=True))


def test_uniform_equals_a_hand_written_loop(digits):
    "torch.optim.SGD with its own weight decay, F.cross_entropy with its own mean, 50 augmented steps: bit for bit."
    recipe = replace(RECIPE, steps=50, clip_norm=0.0, dropout=0.1)
    augment = Augment(crop=1, mean=digits.train.mean, std=digits.train.std)
    training = Training(recipe, digits, augment=augment, seed=3)
    with training.backend.own_random_state(3):
        for _ in range(50): training.step()

    model = make_model("tiny_cnn", 10, 1, dropout=0.1, seed=3)
    kernels = [p for p in model.parameters() if p.ndim > 1]
    rest = [p for p in model.parameters() if p.ndim == 1]
    opt = torch.optim.SGD([{"params": kernels, "weight_decay": 2e-4}, {"params": rest}], 0.1, momentum=0.9,
                          nesterov=True)
    schedule = torch.optim.lr_scheduler.LambdaLR(opt, lambda t: recipe.lr_at(t) / 0.1)
    with torch.random.fork_rng():
        torch.manual_seed(3)
        done, loader = 0, Loader(digits.train, 64, augment, seed=3)
        while done < 50:
            for batch in loader():
                if done == 50: break
                opt.zero_grad()
                F.cross_entropy(model(batch.x), batch.y).backward()
                opt.step()
                schedule.step()
                done += 1
    assert same(model.parameters(), training.model.parameters())


@pytest.mark.parametrize("decay_on", ["kernels", "no_norm", "all"])
def test_what_is_decayed_by_name_and_in_a_hand_written_loop(digits, decay_on):
    "Three steps of a WRN with biased convolutions against torch.optim.SGD with a group of decayed parameters."
    recipe = Recipe(model="wrn28-2", steps=60, batch_size=8, warmup_steps=0, schedule="constant", lr=0.32,
                    clip_norm=0.0, weight_decay=0.1, decay_on=decay_on, conv_bias=True, precision="float32")
    training = Training(recipe, digits)
    names = [k for k, _ in training.model.named_parameters()]
    norm = [k for k in names if "bn" in k or k.startswith("body.13.")]
    kernels = [k for k in names if k.endswith("weight") and k not in norm]
    expected = {"kernels": kernels, "no_norm": [k for k in names if k not in norm], "all": names}[decay_on]
    assert list(decayed(training.model, decay_on)) == expected
    assert ("head.bias" in expected) == (decay_on != "kernels") and len(norm) == 2 * 25 and len(kernels) == 29
    assert ("body.0.bias" in expected, "body.13.bias" in expected) == (decay_on != "kernels", decay_on == "all")
    if decay_on == "kernels": return   # the loop above has it

    model = recipe.build(digits.train, 0)
    parts = [[p for k, p in model.named_parameters() if (k in expected) == wanted] for wanted in (True, False)]
    opt = torch.optim.SGD([{"params": parts[0], "weight_decay": 0.1}, {"params": parts[1]}], 0.01, momentum=0.9,
                          nesterov=True)
    loader = Loader(digits.train, 8, training.prepare)
    loader.begin()
    for _, batch in zip(range(3), loader):
        training.step()
        opt.zero_grad()
        F.cross_entropy(model(batch.x), batch.y).backward()
        opt.step()
    assert same(model.parameters(), training.model.parameters())


def test_leaky_relu_has_the_published_slope_wherever_there_is_a_relu(digits):
    "WRN, torchvision's networks and ours: one forward pass with F.relu exchanged, and no ReLU is left."
    x = torch.randn(2, 3, 32, 32)
    for name in ("wrn28-2", "resnet18", "small_resnet"):
        plain, leaky = (make_model(name, 10, 3, activation=a).train() for a in ("relu", "leaky_relu"))
        assert same(plain.parameters(), leaky.parameters()) and not torch.allclose(plain(x), leaky(x))
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(F, "relu", lambda x, inplace=False: torch.where(x > 0, x, 0.2 * x))
            assert torch.allclose(plain(x), leaky(x), atol=1e-5)
    block = make_model("wrn28-2", 10, 3, activation="leaky_relu").body[1]
    assert torch.allclose(block.rectify(torch.tensor([-1.0, 2.0])), torch.tensor([-0.2, 2.0]))


def test_a_checkpoint_tells_a_leaky_from_a_plain_network(tmp_path, digits):
    recipe = replace(RECIPE, steps=4, warmup_steps=1)
    fit(recipe, digits, folder=tmp_path)
    for changed, text in ((dict(activation="leaky_relu"), "activation: 'relu' there, 'leaky_relu' here"),
                          (dict(conv_bias=True), "conv_bias: False there"),
                          (dict(decay_on="all"), "decay_on: 'kernels'"),
                          (dict(ema_start="zero"), "ema_start: 'weights' there, 'zero' here")):
        with pytest.raises(ValueError, match=text): fit(replace(recipe, **changed), digits, folder=tmp_path)
    with pytest.raises(ValueError, match=r"ReLU\(inplace=True\) there, .*LeakyReLU\(negative_slope=0.2"):
        saved_model(tmp_path, replace(recipe, activation="leaky_relu"), digits.train)
    plain, leaky = (structure(make_model("wrn28-2", 10, 3, activation=a)) for a in ("relu", "leaky_relu"))
    assert "body.1: PreactBlock()" in plain and "body.1: PreactBlock(slope=0.2)" in leaky


def test_the_first_ten_moving_averages_in_closed_form():
    "Of constant weights w: ours stays w, the published one is w (1 - 10! (t+2)! / (t+11)!), the product of its ramp."
    net = torch.nn.Sequential(torch.nn.Linear(3, 3), torch.nn.BatchNorm1d(3)).double()
    for p in net.parameters(): torch.nn.init.constant_(p, 2.0)
    net[1].running_var.fill_(3.0)
    ours, zero = EMA(net, 0.9999), EMA(net, 0.9999, "zero")
    for t in range(10):
        for ema in (ours, zero): ema.update(net, t)
        left = math.factorial(10) * math.factorial(t + 2) / math.factorial(t + 11)
        for k, v in ours.model.state_dict().items(): assert torch.allclose(v, net.state_dict()[k])
        found = {k: v for k, v in zero.model.state_dict().items() if v.is_floating_point()}
        expected = {k: 2 * (1 - left) for k in ("0.weight", "0.bias", "1.weight")} | {
            "1.bias": 2 * (1 - left) + left, "1.running_mean": 0.0, "1.running_var": 3 * (1 - left) + left}
        assert found.keys() == expected.keys()
        for k, v in expected.items(): assert torch.allclose(found[k], torch.full_like(found[k], v), rtol=1e-9), (t, k)


def test_moving_averages_of_moving_weights():
    "Ten steps of both ramps, and a decay that ends one, against the sum written out."
    net, steps = torch.nn.Linear(1, 1, bias=False).double(), [float(t * t) for t in range(1, 11)]
    for start, ahead, decay in (("weights", 0, 0.9999), ("zero", 1, 0.9999), ("zero", 1, 0.3)):
        net.weight.data.fill_(5.0)
        ema, d = EMA(net, decay, start), [min(decay, (t + 1 + ahead) / (t + 10 + ahead)) for t in range(10)]
        for t, value in enumerate(steps):
            net.weight.data.fill_(value)
            ema.update(net, t)
            expected = math.prod(d[:t + 1]) * (0.0 if ahead else 5.0) + sum(
                math.prod(d[k + 1:t + 1]) * (1 - d[k]) * steps[k] for k in range(t + 1))
            assert ema.model.weight.item() == pytest.approx(expected, rel=1e-12)
    with pytest.raises(ValueError, match="start = 'one': must be one of weights, zero"): EMA(net, 0.9, "one")


def test_the_users_random_state_is_left_alone(digits):
    torch.manual_seed(5)
    state = torch.get_rng_state()
    fit(replace(RECIPE, steps=10, dropout=0.1), digits)
    assert torch.equal(state, torch.get_rng_state())


SCRIPT = """
import sys
from datasel_wb.datasets import DataRecipe, load_data
from datasel_wb.images import Augment
from datasel_wb.loop import Recipe
from datasel_wb.scorer import DDS, Scorer
from datasel_wb.trainer import fit
recipe = Recipe(model="tiny_cnn", steps=240, batch_size=64, log_every=7, eval_every=40, save_every=12, dropout=0.2)
data = load_data(DataRecipe(dataset="digits", dev_size=250, noise=0.3))
augment = Augment(crop=1, cutout=2, mean=data.train.mean, std=data.train.std)
print("ready", flush=True)
dds = DDS(Scorer.like(recipe.build(data.train, 9), clip=2.0), lr=0.01, momentum=0.5, baseline="moving")
fit(recipe, data, dds, folder=sys.argv[1], augment=augment)
"""


def start(folder):
    env = os.environ | {"OMP_NUM_THREADS": "1", "DATASEL_LOG_SECONDS": "60"}
    process = Forked(SCRIPT, folder, env=env)
    assert process.stdout.readline() == "ready\n"
    return process


def weights(folder):
    parts = Checkpoints(Path(folder) / "checkpoints").load()["parts"]
    return [t for part in ("model", "ema", "selector") for t in parts[part].values() if isinstance(t, torch.Tensor)]


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    "Folder of the script's training, uninterrupted."
    folder = tmp_path_factory.mktemp("whole")
    assert start(folder).wait() == 0
    return folder


def assert_equal_trainings(whole, other):
    "In weights, records and the choice of the best, but for the clock."
    assert same(weights(whole), weights(other))
    a, b = (Checkpoints(f / "checkpoints", write=False).manifest for f in (whole, other))
    assert a["best"]["step"] == b["best"]["step"]
    for name in ("metrics", "examples"):
        a, b = (pd.read_parquet(f / f"{name}.parquet").drop(columns="seconds", errors="ignore") for f in (whole, other))
        pd.testing.assert_frame_equal(a, b, check_exact=True)


def test_killed_three_times_equals_uninterrupted(whole, tmp_path):
    "kill -9 at random moments of a DDS run with dropout and augmentation; the same call goes on each time."
    kills, rng = 0, random.Random(time.time_ns())
    while True:
        process = start(tmp_path / "killed")
        manifest = tmp_path / "killed" / "checkpoints" / "checkpoints.json"
        before = manifest.read_text() if manifest.exists() else ""
        while kills < 3 and process.poll() is None and (not manifest.exists() or manifest.read_text() == before):
            time.sleep(0.005)
        if kills == 3: break
        time.sleep(rng.uniform(0, 0.3))
        os.killpg(process.pid, signal.SIGKILL)
        assert process.wait() == -signal.SIGKILL, "the run ended before it could be killed"
        kills += 1
    assert process.wait() == 0
    assert_equal_trainings(whole, tmp_path / "killed")


@pytest.fixture
def small_files():
    "A real write failure: the process may not write files larger than a limit."
    old = resource.getrlimit(resource.RLIMIT_FSIZE)
    yield lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, old[1]))
    resource.setrlimit(resource.RLIMIT_FSIZE, old)


@pytest.mark.parametrize("notice", ["wait", "save", "load"])
def test_full_disk_leaves_the_previous_checkpoint(tmp_path, digits, small_files, notice):
    training = Training(RECIPE, digits)
    saved = Checkpoints(tmp_path)
    saved.save({"step": 1, "w": torch.ones(3)}, 1)
    saved.wait()
    small_files()
    saved.save(training.state() | {"big": torch.zeros(100_000)}, 2)           # returns: the writing goes on behind it
    with pytest.raises(OSError, match="cannot save step-00000002.pt .*what was saved before is intact"):
        saved.save({"step": 3}, 3) if notice == "save" else getattr(saved, notice)()
    assert not list(tmp_path.glob("*.tmp"))
    assert Checkpoints(tmp_path).load()["step"] == 1
    saved.save({"step": 4}, 4)                                                # said once; the next one may go well
    saved.wait()
    assert Checkpoints(tmp_path).load()["step"] == 4


def test_full_disk_at_the_end_of_a_fit(tmp_path, digits, small_files, monkeypatch):
    "The last checkpoint is written after the last step: its error must come all the same, and hide no other one."
    monkeypatch.setattr("datasel_wb.report.MetricLog.save", lambda self: None)
    fit(replace(RECIPE, steps=15), digits, folder=tmp_path / "whole")         # what the loop loads lazily is there
    small_files()
    with pytest.raises(OSError, match="cannot save step-00000015.pt"):
        fit(replace(RECIPE, steps=15), digits, folder=tmp_path / "full")
    assert not (tmp_path / "full" / "examples.parquet").exists()
    step = Training.step
    def failing(self):
        if self.steps_done == 16: raise ZeroDivisionError
        step(self)
    monkeypatch.setattr(Training, "step", failing)
    with pytest.raises(ZeroDivisionError), pytest.warns(UserWarning, match="cannot save step-00000015.pt"):
        fit(RECIPE, digits, folder=tmp_path / "both")


FILLS = """
import errno, resource, sys, torch
from datasel_wb.checkpoints import Checkpoints
saved, done, failed = Checkpoints(sys.argv[1], keep=50), [], 0
for step in range(1, 60):                                    # until the disk is full, and on
    if sys.argv[2:] and step == 5:
        resource.setrlimit(resource.RLIMIT_FSIZE, (10_000, resource.getrlimit(resource.RLIMIT_FSIZE)[1]))
    try:
        saved.save({"step": step, "w": torch.zeros(5_000 if failed < 3 else 100)}, step)
        saved.wait()
    except OSError as e:
        failed += e.errno in (errno.ENOSPC, errno.EFBIG)
        there = Checkpoints(sys.argv[1], write=False)
        assert [e["step"] for e in there.manifest["saved"]] == done
        assert all(there.read(e)["step"] == e["step"] for e in there.manifest["saved"])
    else: done.append(step)
print(failed, len(done), Checkpoints(sys.argv[1]).load()["step"] == done[-1])
"""


@pytest.mark.parametrize("size", [200, 230])
def test_a_disk_that_is_really_full(tmp_path, size):
    "A small file system of its own: whatever could not be written, file or manifest, nothing that was saved is lost."
    inside = f'mount -t tmpfs -o size={size}k none {tmp_path} && exec {sys.executable} -c "$1" {tmp_path}'
    command = ["unshare", "-rm", "sh", "-c", inside, "sh", FILLS]
    if shutil.which("unshare") is None or subprocess.run(["unshare", "-rm", "true"], capture_output=True).returncode:
        # nothing may be mounted here: files of a limited size
        command = [sys.executable, "-c", FILLS, tmp_path, "limit"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr[-3000:]
    failed, kept, last = done.stdout.split()
    assert int(failed) >= 3 and int(kept) >= 3 and last == "True", done.stdout


def test_the_state_is_that_of_the_call(tmp_path, monkeypatch):
    "Training goes on while the file is written; `save` waits only for the write before."
    goes_on, written = threading.Event(), torch.save
    def slow(*a):
        assert goes_on.wait(patience(20))
        written(*a)
    monkeypatch.setattr(torch, "save", slow)
    saved, w, counts = Checkpoints(tmp_path), torch.zeros(1000), {"seen": [1]}
    saved.save({"step": 1, "parts": {"w": w, "views": [w[:3], (w[3:],)]}, "counts": counts}, 1)
    w += 1
    counts["seen"].append(2)
    assert not list(tmp_path.iterdir())
    goes_on.set()
    saved.wait()
    state = Checkpoints(tmp_path).load()
    assert not state["parts"]["w"].any() and not state["parts"]["views"][0].any() and state["counts"] == {"seen": [1]}
    assert isinstance(state["parts"]["views"][1], tuple)


def test_a_snapshot_keeps_what_a_state_dict_carries():
    state = torch.nn.BatchNorm1d(2).state_dict()
    copied = snapshot(state)
    assert type(copied) is type(state) and copied._metadata == state._metadata and list(copied) == list(state)
    assert all(a.data_ptr() != b.data_ptr() and torch.equal(a, b) for a, b in zip(state.values(), copied.values()))


SAVES = """
import sys, torch
from datasel_wb.checkpoints import Checkpoints
saved = Checkpoints(sys.argv[1])
step = (saved.load() or {"step": 0})["step"]
print("ready", flush=True)
while True:
    step += 1
    saved.save({"step": step, "w": torch.full((500_000,), float(step))}, step, best=step % 7 == 0)
"""


def test_killed_while_writing(tmp_path):
    "kill -9 at random moments of saves that follow one another: what the manifest names is always intact."
    rng, reached = random.Random(time.time_ns()), 0
    for _ in range(4):
        process = Forked(SAVES, tmp_path)
        assert process.stdout.readline() == "ready\n"
        newest = lambda: max((entry["step"] for entry in (Checkpoints(tmp_path, write=False).manifest or {})
                              .get("saved", [])), default=0)
        while newest() <= reached: time.sleep(0.01)                              # a busy machine takes its time
        time.sleep(rng.uniform(0, 0.15))
        process.kill()
        assert process.wait() == -signal.SIGKILL
        process.stdout.close()
        saved = Checkpoints(tmp_path)
        with warnings.catch_warnings():
            warnings.simplefilter("error")                                    # none is damaged
            state = saved.load()
        assert state["step"] > reached and (state["w"] == state["step"]).all()
        reached = state["step"]
        for entry in [*saved.manifest["saved"], *filter(None, [saved.manifest.get("best")])]:
            assert (saved.read(entry)["w"] == entry["step"]).all()


@pytest.mark.parametrize("where", ["disk", "memory"])
def test_how_many_are_kept(tmp_path, where):
    "The last `keep` and the best; the rest, and what a kill left half done, is removed."
    folder = str(tmp_path) if where == "disk" else f"memory://kept/{tmp_path.name}"
    fs, path = fsspec.core.url_to_fs(folder)
    def files(): return sorted(Path(p).name for p in fs.ls(path, detail=False))
    saved = Checkpoints(folder, keep=3)
    for step in range(1, 8):
        if step == 5: fs.pipe_file(f"{path}/step-00000099.pt.tmp", b"half a checkpo")
        saved.save({"step": step}, step, best=step == 2)
    saved.wait()
    assert files() == ["checkpoints.json", *(f"step-0000000{n}.pt" for n in (2, 5, 6, 7))]
    assert [e["step"] for e in saved.manifest["saved"]] == [5, 6, 7] and saved.manifest["best"]["step"] == 2
    for n, then in ((7, 6), (6, 5)):
        fs.pipe_file(f"{path}/step-0000000{n}.pt", b"damaged")
        with pytest.warns(UserWarning,
                          match=f"step-0000000{n}.pt is damaged.*going on from the previous one, step {then}"):
            assert Checkpoints(folder).load()["step"] == then
    again = Checkpoints(folder, keep=2)
    again.save({"step": 6}, 6)                                                # the training went back to step 5
    again.wait()
    assert [e["step"] for e in Checkpoints(folder).manifest["saved"]] == [5, 6]
    assert Checkpoints(folder).load()["step"] == 6
    assert again.read(again.manifest["best"])["step"] == 2


def test_the_best_saved_again_at_its_step(tmp_path):
    "After a resume from before it; the entry must fit the new file."
    saved = Checkpoints(tmp_path)
    for seconds in (1.0, 2.0): saved.save({"step": 1, "seconds": seconds}, 1, best=seconds == 1.0)
    saved.wait()
    assert saved.read(saved.manifest["best"])["seconds"] == 2.0 and len(saved.manifest["saved"]) == 1


def test_checkpoints_of_an_earlier_version_are_refused(tmp_path):
    (tmp_path / "checkpoints.json").write_text('{"last": {"file": "step-1.pt", "step": 1}}')
    with pytest.raises(ValueError, match=f"{tmp_path}: holds checkpoints of an earlier version"): Checkpoints(tmp_path)


def unwritable(tmp_path):
    "Addresses where nothing can be written, and what is said."
    (tmp_path / "file").write_text("in the way")
    yield str(tmp_path / "file" / "below"), "checkpoints cannot be written there"
    yield "nonsense://bucket/run", "cannot be opened .*nonsense"
    yield "https://localhost:9/run", "checkpoints cannot be written there|cannot be opened"
    if os.geteuid():   # root may write everywhere
        (tmp_path / "closed").mkdir(mode=0o500)
        yield str(tmp_path / "closed"), "checkpoints cannot be written there .*denied"


def test_an_unwritable_folder_is_refused_before_training(tmp_path, digits, monkeypatch):
    monkeypatch.setattr(Training, "step", lambda self: pytest.fail("it trains"))
    for folder, said in unwritable(tmp_path):
        with pytest.raises(ValueError, match=said) as e: Checkpoints(folder)
        assert str(e.value).startswith(f"{folder}: ")
        with pytest.raises(ValueError, match=said):
            fit(replace(RECIPE, checkpoint_dir=folder), digits, folder=tmp_path / "run" / "a-0")


def test_checkpoints_elsewhere(tmp_path, digits):
    "Under the names of run and training, in a store that is no folder; a fit that was stopped goes on from there."
    root = f"memory://elsewhere/{tmp_path.name}"
    recipe = replace(RECIPE, checkpoint_dir=root, dropout=0.1)
    whole = fit(replace(recipe, checkpoint_dir=None), digits)
    def power_cut(*a): raise KeyboardInterrupt
    class Cut(Eager):
        calls = 0
        def apply(self, *a):
            Cut.calls += 1
            if Cut.calls == 40: power_cut()
            super().apply(*a)
    with pytest.raises(KeyboardInterrupt): fit(recipe, digits, folder=tmp_path / "x" / "dds-0", backend=Cut())
    assert Checkpoints(f"{root}/x/dds-0").load()["step"] == 30
    resumed = fit(recipe, digits, folder=tmp_path / "x" / "dds-0")
    assert same(whole.model.parameters(), resumed.model.parameters())
    assert Checkpoints(f"{root}/x/dds-0").load()["step"] == 60
    assert not (tmp_path / "x" / "dds-0" / "checkpoints").exists()
    fit(replace(recipe, checkpoint_dir=str(tmp_path / "disk")), digits, folder=tmp_path / "x" / "dds-1")
    assert (tmp_path / "disk" / "x" / "dds-1" / "checkpoints.json").exists()


def test_where_and_how_it_is_kept_may_change(tmp_path, digits):
    fit(replace(RECIPE, epochs=4, stop_epoch=3), digits, folder=tmp_path)
    again = fit(replace(RECIPE, epochs=4, stop_epoch=3, keep=5, save_every=7, device="cpu"), digits, folder=tmp_path)
    assert again.done and Checkpoints(tmp_path / "checkpoints").load()["step"] == again.steps_done
    with pytest.raises(ValueError, match="another training; log_every: 7 there, 9 here"):
        fit(replace(RECIPE, epochs=4, stop_epoch=3, log_every=9), digits, folder=tmp_path)


def test_sigterm_saves_and_the_same_call_goes_on(whole, tmp_path):
    "As a machine that is taken away does it, at two random moments of the script above; status 0 each time."
    steps, rng = [], random.Random(time.time_ns())
    for _ in range(2):
        process = start(tmp_path / "stopped")
        checkpoints = tmp_path / "stopped" / "checkpoints"
        def manifest():
            return (checkpoints / "checkpoints.json").read_text() if (checkpoints / "checkpoints.json").exists() else ""
        before = manifest()
        while process.poll() is None and manifest() == before: time.sleep(0.005)
        time.sleep(rng.uniform(0, 0.2))
        clock = time.monotonic()
        process.send_signal(signal.SIGTERM)
        out = process.communicate(timeout=patience(30))[0]
        assert process.returncode == 0 and time.monotonic() - clock < 10 * slowness()
        steps.append(Checkpoints(checkpoints).load()["step"])
        assert f"stopped by SIGTERM at step {steps[-1]}; the same command goes on from there" in out
        assert not (tmp_path / "stopped" / "examples.parquet").exists()
    assert 12 <= steps[0] < steps[1] < 240
    process = start(tmp_path / "stopped")
    assert process.wait() == 0
    assert_equal_trainings(whole, tmp_path / "stopped")


class Terminated(Eager):
    "SIGTERM comes in the middle of a step."
    def __init__(self, at):
        self.calls, self.at = 0, at
        super().__init__("cpu")
    def apply(self, *a):
        self.calls += 1
        if self.calls == self.at: os.kill(os.getpid(), signal.SIGTERM)
        super().apply(*a)


def test_sigterm_without_a_folder(digits, capsys):
    before = signal.getsignal(signal.SIGTERM)
    with pytest.raises(SystemExit) as end: fit(RECIPE, digits, backend=Terminated(at=11))
    assert end.value.code == 0 and signal.getsignal(signal.SIGTERM) is before
    assert "stopped by SIGTERM at step 11; nothing was saved" in capsys.readouterr().out


@pytest.mark.parametrize("at", [10, 15, 25, 60])
def test_sigterm_and_the_calendar(tmp_path, digits, at, monkeypatch):
    "Where nothing is due, a save is due, an evaluation is not saved, in the last step: the same end, the same best."
    # best at step 20, saved at 30
    monkeypatch.setattr(Training, "evaluate", lambda self: {"dev": {"top1": 100.0 - self.steps_done}})
    with pytest.raises(SystemExit) as end: fit(RECIPE, digits, folder=tmp_path, backend=Terminated(at))
    assert end.value.code == 0 and Checkpoints(tmp_path / "checkpoints").load()["step"] == at
    whole, resumed = fit(RECIPE, digits, folder=tmp_path / "whole"), fit(RECIPE, digits, folder=tmp_path)
    assert same(whole.model.parameters(), resumed.model.parameters()) and whole.best == resumed.best == 80
    pd.testing.assert_frame_equal(*(t.log.frame().drop(columns="seconds") for t in (whole, resumed)))
    a, b = (Checkpoints(f / "checkpoints").manifest for f in (tmp_path / "whole", tmp_path))
    assert a["best"]["step"] == b["best"]["step"] == 30
    assert [e["step"] for e in a["saved"]] == [e["step"] for e in b["saved"]] == [45, 60]


def test_sigterm_in_another_process_of_the_run(tmp_path, digits, capsys):
    "The flag is asked for in one place, which a backend over several processes overrides."
    class Told(Eager):
        calls = 0
        def anywhere(self, here):
            assert here is False
            self.calls += 1
            return self.calls == 22
    with pytest.raises(SystemExit) as end: fit(RECIPE, digits, folder=tmp_path, backend=Told("cpu"))
    assert end.value.code == 0 and Checkpoints(tmp_path / "checkpoints").load()["step"] == 22


def test_fit_in_another_thread(digits):
    "Python sets handlers in the main thread only; a fit elsewhere trains all the same."
    done = []
    thread = threading.Thread(target=lambda: done.append(fit(replace(RECIPE, steps=10), digits).steps_done))
    thread.start()
    thread.join()
    assert done == [10]


def test_truncated_checkpoint_falls_back_and_says_so(tmp_path, digits):
    done = fit(RECIPE, digits, folder=tmp_path)
    last = tmp_path / "checkpoints" / "step-00000060.pt"
    last.write_bytes(last.read_bytes()[:-1000])
    with pytest.warns(UserWarning, match="step-00000060.pt is damaged.*going on from the previous one, step 45"):
        again = fit(RECIPE, digits, folder=tmp_path)
    assert same(done.model.parameters(), again.model.parameters())
    for f in (tmp_path / "checkpoints").glob("*.pt"): f.write_bytes(b"")
    with pytest.raises(ValueError, match="damaged.*to start anew"): fit(RECIPE, digits, folder=tmp_path)


def broken(data, how):
    "Bytes of a manifest that is damaged in some way."
    return {"empty": b"", "truncated": data[:len(data) // 2], "no JSON": b"<html>", "no manifest": b"[1, 2]",
            "no list": b"{}", "no checksums": data.replace(b"sha256", b"md5")}[how]


@pytest.mark.parametrize("how", ["empty", "truncated", "no JSON", "no manifest", "no list", "no checksums"])
def test_a_damaged_manifest_loses_nothing(tmp_path, digits, how):
    whole = fit(RECIPE, digits, folder=tmp_path / "whole")
    fit(replace(RECIPE, keep=1), digits, folder=tmp_path / "a")
    manifest = tmp_path / "a" / "checkpoints" / "checkpoints.json"
    before = Checkpoints(manifest.parent, write=False).manifest
    for name in ("examples.parquet", "metrics.parquet"): (tmp_path / "a" / name).unlink()
    manifest.write_bytes(broken(manifest.read_bytes(), how))
    (manifest.parent / "step-00000099.pt").write_bytes(b"half a checkpo")
    with pytest.warns(UserWarning,
                      match="checkpoints.json cannot be read .*; the checkpoints beside it can: steps .*60"):
        found = Checkpoints(manifest.parent, keep=1)
    assert found.manifest["saved"] == before["saved"] and found.manifest["best"] == before["best"]
    with pytest.warns(UserWarning, match="cannot be read"): assert saved_model(tmp_path / "a", RECIPE, digits.train)
    with pytest.warns(UserWarning, match="cannot be read"):
        again = fit(replace(RECIPE, keep=1), digits, folder=tmp_path / "a")
    assert again.steps_done == 60 and same(whole.model.parameters(), again.model.parameters())
    for f in manifest.parent.glob("step-*.pt"): f.write_bytes(b"nothing")
    with pytest.raises(ValueError, match=r"^[^\n]*checkpoints.json cannot be read \(\w+\), "
                       r"and no checkpoint beside it can; delete [^\n]* to start anew$"):
        fit(RECIPE, digits, folder=tmp_path / "a")


def test_after_a_damaged_manifest_the_list_is_written_again(tmp_path):
    saved = Checkpoints(tmp_path, keep=2)
    for step in (1, 2): saved.save({"step": step}, step)
    saved.wait()
    (tmp_path / "checkpoints.json").write_text("no JSON")
    with pytest.warns(UserWarning, match="steps 1, 2$"): again = Checkpoints(tmp_path, keep=2)
    again.save({"step": 3}, 3)
    again.wait()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert [e["step"] for e in Checkpoints(tmp_path).manifest["saved"]] == [2, 3]


# --- what network a checkpoint is of

def own(act=torch.nn.ReLU, dropout=0.1):
    "A network of one's own; as initialised by seed 0."
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(64, 32), act(), torch.nn.Dropout(dropout),
                                   torch.nn.Linear(32, 10))


def test_a_checkpoint_knows_the_network_of_ones_own(tmp_path, digits):
    recipe = replace(RECIPE, steps=15)
    kept = fit(recipe, digits, folder=tmp_path, model=own())
    identity = Checkpoints(tmp_path / "checkpoints").load()["identity"]
    assert identity["model"] == "Sequential" and "ReLU" in identity["structure"]
    assert fit(recipe, digits, folder=tmp_path, model=own()).examples_seen == kept.examples_seen
    with pytest.raises(ValueError, match=r"another training; 2: ReLU\(\) there, 2: Tanh\(\) here"):
        fit(recipe, digits, folder=tmp_path, model=own(torch.nn.Tanh))
    with pytest.raises(ValueError, match=r"3: Dropout\(p=0.1, inplace=False\) there, 3: Dropout\(p=0.5"):
        fit(recipe, digits, folder=tmp_path, model=own(dropout=0.5))
    with pytest.raises(ValueError, match="model: 'Sequential' there, 'tiny_cnn' here"):
        fit(recipe, digits, folder=tmp_path)


def test_saved_model_of_a_network_of_ones_own(tmp_path, digits):
    kept, mine = fit(replace(RECIPE, steps=15), digits, folder=tmp_path, model=own()), own()
    found = saved_model(tmp_path, model=mine)
    # mine stays as it is
    assert same(found.parameters(), kept.ema.model.parameters()) and same(mine.parameters(), own().parameters())
    with pytest.raises(ValueError, match=r"of another model than Sequential; 2: ReLU\(\) there, 2: Tanh\(\) here"):
        saved_model(tmp_path, model=own(torch.nn.Tanh))
    with pytest.raises(ValueError, match="of another model than tiny_cnn; body.0.0.weight is missing there"):
        saved_model(tmp_path, RECIPE, digits.train)
    with pytest.raises(ValueError, match="model = None: must be given, or else recipe and train"): saved_model(tmp_path)
    assert same(saved_model(tmp_path, model=mine, weights="raw").parameters(), kept.model.parameters())
    with pytest.raises(ValueError, match="weights = 'best': must be one of ema, raw"):
        saved_model(tmp_path, model=mine, weights="best")


def test_checkpoints_of_the_version_before_go_on(tmp_path, digits):
    "Without a structure, with old names of settings, and without those that came later."
    recipe = replace(RECIPE, steps=30)
    whole = fit(recipe, digits, folder=tmp_path / "whole")
    saved = Checkpoints(tmp_path / "old" / "checkpoints")
    state = Checkpoints(tmp_path / "whole" / "checkpoints").read(Checkpoints(tmp_path / "whole" / "checkpoints")
                                                                 .manifest["saved"][0])
    lacking = ("structure", "inputs", "activation", "conv_bias", "ema_start", "decay_on")
    identity = {("grad_bound" if k == "clip_norm" else k): v for k, v in state["identity"].items() if k not in lacking}
    saved.save(state | {"identity": identity}, state["step"])
    saved.wait()
    assert state["step"] == 15
    with pytest.raises(ValueError, match="another training; decay_on: 'kernels' there, 'all' here"):
        fit(replace(recipe, decay_on="all"), digits, folder=tmp_path / "old")
    assert same(whole.model.parameters(), fit(recipe, digits, folder=tmp_path / "old").model.parameters())


def test_another_scorer_network_is_another_method(tmp_path, digits):
    "Same settings, other layers."
    recipe = replace(RECIPE, steps=15)
    def dds(act, clip=5.0): return DDS(Scorer(torch.nn.Sequential(*list(own(act))[:4]), 32, 10, "x", clip))
    fit(recipe, digits, dds(torch.nn.ReLU), folder=tmp_path)
    fit(recipe, digits, dds(torch.nn.ReLU), folder=tmp_path)
    for other in (dds(torch.nn.Tanh), dds(torch.nn.ReLU, clip=4.0)):
        with pytest.raises(ValueError, match="another training; made_with.scorer: [0-9a-f]+ there, [0-9a-f]+ here$"):
            fit(recipe, digits, other, folder=tmp_path)
    frozen = dds(torch.nn.ReLU)
    frozen.scorer.body.requires_grad_(False)
    with pytest.raises(ValueError, match="another training; made_with.trains: 'all' there, 'head' here$"):
        fit(recipe, digits, DDS(frozen.scorer), folder=tmp_path)


def older(state, drop=(), made_with=()):
    "A state as a version wrote it that did not tell these entries of an identity."
    identity = {k: v for k, v in state["identity"].items() if k not in drop}
    identity["made_with"] = {k: v for k, v in identity["made_with"].items() if k not in made_with}
    return state | {"identity": identity}


def test_a_checkpoint_knows_what_became_of_its_images(tmp_path, digits):
    "Statistics and augmentation; a version before did not tell them."
    recipe, stats = replace(RECIPE, steps=4, warmup_steps=1), dict(mean=digits.train.mean, std=digits.train.std)
    def again(where="new", data=digits, **how):
        return fit(recipe, data, folder=tmp_path / where, augment=Augment(**how | {"crop": 1} | stats))
    kept = again()
    for changed, text in ((dict(crop=1, fill=128), r"inputs.augment.fill: 0 there, 128 here$"),
                          (dict(flip=True), r"inputs.augment.flip: False there, True here$"),
                          (dict(randaugment_style="dds"),
                           r"inputs.augment.randaugment_style: 'uniform' there, 'dds' here$")):
        with pytest.raises(ValueError, match="another training; " + text): again(**changed)
    other = copy.deepcopy(digits)
    other.train.mean, stats["mean"] = (0.25,), (0.25,)
    with pytest.raises(ValueError, match=r"inputs.mean: \(0.3.*,\) there, \(0.25,\) here$"): again(data=other)
    with pytest.raises(ValueError, match=r"mean = \(0.3.*,\) of the images there, must be that .* here, \(0.25,\)$"):
        saved_model(tmp_path / "new", recipe, other.train)
    saved = Checkpoints(tmp_path / "old" / "checkpoints")
    saved.save(older(Checkpoints(tmp_path / "new" / "checkpoints").load(), ["inputs"]), 4)
    saved.wait()
    assert same(again("old", other).model.parameters(), kept.model.parameters())
    assert same(saved_model(tmp_path / "old", recipe, other.train).parameters(), kept.ema.model.parameters())
    off = Training(recipe, digits, augment=Augment(fill=9, mean=digits.train.mean, std=digits.train.std))
    assert off.inputs() == Training(recipe, digits).inputs()   # nothing is changed at random
    assert Training(recipe, digits, augment=lambda x, g, c: x.float()).inputs()["augment"] == "function"


def dds_of(**kw): return lambda: DDS(Scorer.like(make_model("tiny_cnn", 10, 1, seed=9), "x"), 0.01, **kw)


@pytest.mark.parametrize("make, lacking, goes_on", [
    (dds_of(), ["trains"], True),
    (dds_of(variant="released", reward="difference"), ["trains", "revision"], False),
    (dds_of(variant="released_as_run", reward="difference"), ["trains"], True),
    (lambda: DataParameters(inst=Sigma()), [], True),
    (lambda: DataParameters(inst=Sigma(init=0.001)), ["revision"], False),
    (lambda: DataParameters(inst=Sigma(init=0.001), clamp=False), [], True),
    (lambda: BatchWeight("running"), ["norm"], True),
    (lambda: BatchWeight("batch"), ["norm"], False)])
def test_a_method_goes_on_from_a_version_before_where_its_maths_is_the_same(tmp_path, digits, make, lacking, goes_on):
    recipe = replace(RECIPE, steps=4, warmup_steps=1, save_every=2)
    whole = fit(recipe, digits, make(), folder=tmp_path / "whole")
    assert set(lacking) <= whole.selector.made_with.keys()
    assert ("revision" in whole.selector.made_with) == ("revision" in lacking)
    there = Checkpoints(tmp_path / "whole" / "checkpoints")
    saved = Checkpoints(tmp_path / "old" / "checkpoints")
    saved.save(older(there.read(there.manifest["saved"][0]), ["inputs"], lacking), 2)
    saved.wait()
    if goes_on: assert same(fit(recipe, digits, make(), folder=tmp_path / "old").model.parameters(),
                            whole.model.parameters())
    else:
        with pytest.raises(ValueError, match=f"another training; made_with.{lacking[-1]}: .* there, .* here$"):
            fit(recipe, digits, make(), folder=tmp_path / "old")


def test_killed_after_the_last_checkpoint_still_writes_its_examples(tmp_path, digits):
    fit(RECIPE, digits, folder=tmp_path)
    table = pd.read_parquet(tmp_path / "examples.parquet")
    (tmp_path / "examples.parquet").unlink()   # as if the process had died between the two files
    fit(RECIPE, digits, folder=tmp_path)
    pd.testing.assert_frame_equal(table, pd.read_parquet(tmp_path / "examples.parquet"), check_exact=True)


def test_checkpoint_of_another_training_or_model_is_refused(tmp_path, digits):
    fit(replace(RECIPE, steps=15), digits, folder=tmp_path)
    with pytest.raises(ValueError, match="another training; steps: 15 there, 60 here"):
        fit(RECIPE, digits, folder=tmp_path)
    with pytest.raises(ValueError, match="of another model than small_cnn; body.0.0.weight is"):
        saved_model(tmp_path, replace(RECIPE, model="small_cnn"), digits.train)
    with pytest.raises(ValueError, match="has no checkpoints"): saved_model(tmp_path / "nowhere", RECIPE, digits.train)


@pytest.mark.parametrize("where", [False, True])
def test_a_step_that_is_not_finite_changes_nothing(digits, where):
    training = Training(RECIPE, digits)
    if where: training.backend.apply = lambda opt, ok, lr: step_where(ok, opt, lr)   # as on an accelerator
    for _ in range(3): training.step()
    before = [p.clone() for p in training.model.parameters()]
    momentum = [training.optimizer.state[p]["momentum_buffer"].clone() for p in training.params]
    loss = training.selector.loss
    training.selector.loss = lambda *a: loss(*a) * float("nan")
    training.step()
    assert same(before, training.model.parameters())
    assert same(momentum, [training.optimizer.state[p]["momentum_buffer"] for p in training.params])
    assert training.skips.tolist() == [1, 1, 1]
    training.selector.loss = loss
    training.step()
    assert training.skips.tolist() == [1, 0, 1] and not same(before, training.model.parameters())


def test_twenty_skipped_steps_in_a_row_stop_the_run(tmp_path, digits, monkeypatch):
    monkeypatch.setattr(Training, "shape_gradient", lambda self: torch.tensor(float("inf")))
    with pytest.raises(FloatingPointError, match="not finite in 20 steps in a row, up to step 20"):
        fit(RECIPE, digits, folder=tmp_path)


@pytest.mark.parametrize("wrong, said", [
    (dict(steps=0), "steps = 0: must be above 0"), (dict(steps=10.5), "steps = 10.5: must be of type int"),
    (dict(model="wrn"), "model = 'wrn': must be one of"), (dict(lr=0.0), "lr = 0.0: must be above 0"),
    (dict(warmup_steps=60), "warmup_steps = 60: must be below steps = 60"),
    (dict(dropout=1.0), r"dropout = 1.0: must lie in \[0, 1\)"),
    (dict(momentum=0.0), "nesterov = True: needs a momentum"),
    (dict(nesterov=1), "nesterov = 1: must be of type bool")])
def test_settings_speak(wrong, said):
    with pytest.raises(ValueError, match=said): replace(RECIPE, **wrong)


def test_cuda_without_cuda_is_refused():
    if torch.cuda.is_available(): pytest.skip("this machine has CUDA")
    with pytest.raises(ValueError, match="device = 'cuda': this machine has no CUDA device"): Eager("cuda")


@pytest.mark.parametrize("recipe, processes, kind",
                         [(replace(RECIPE, device="xla"), "1", "xla"), (RECIPE, "2", "torchrun")])
def test_an_engine_that_was_not_imported_is_named(digits, monkeypatch, recipe, processes, kind):
    monkeypatch.delitem(BACKENDS, kind, raising=False)
    monkeypatch.setenv("WORLD_SIZE", processes)
    with pytest.raises(ValueError, match=f"import datasel_wb.tpu_trainer first, which has the engine for {kind}"):
        Training(recipe, digits)


def test_a_batch_larger_than_the_split_is_refused(digits):
    with pytest.raises(ValueError, match="batch_size = 5000"): Training(replace(RECIPE, batch_size=5000), digits)


def test_dds_under_bfloat16_autocast_is_resumable(tmp_path, digits):
    "The accelerator's precision, on the CPU: half-precision logits and dev gradients, float32 rewards and scorer."
    recipe = replace(RECIPE, precision="bfloat16")
    def make(): return DDS(Scorer.like(recipe.build(digits.train, 9), clip=2.0), lr=0.01)
    whole = fit(recipe, digits, make())
    assert whole.selector.seen.logits.dtype == torch.bfloat16 and whole.selector.seen.losses.dtype == torch.float32
    half = Training(recipe, digits, make())
    with half.backend.own_random_state(0):
        for _ in range(30): half.step()
    saved = Checkpoints(tmp_path / "checkpoints")
    saved.save(half.state(), 30)
    saved.wait()
    resumed = fit(recipe, digits, make(), folder=tmp_path)
    assert same(whole.model.parameters(), resumed.model.parameters())
    assert same(whole.selector.scorer.parameters(), resumed.selector.scorer.parameters())


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs CUDA")
def test_on_cuda_in_bfloat16(digits):
    training = fit(replace(RECIPE, device="cuda"), digits)
    assert training.log.frame().query("name == 'top1'").value.iloc[-1] > 50


def test_checkpoints_are_enough(tmp_path, digits):
    "The folder is lost, its checkpoints elsewhere are not: the training is loaded, its records are written again."
    recipe = replace(RECIPE, checkpoint_dir=str(tmp_path / "safe"))
    done = fit(recipe, digits, folder=tmp_path / "run" / "uniform-0")
    shutil.rmtree(tmp_path / "run")
    again = fit(recipe, digits, folder=tmp_path / "run" / "uniform-0")
    assert again.log.frame().equals(done.log.frame())
    assert {p.name for p in again.log.path.parent.iterdir()} == {"metrics.parquet", "examples.parquet", "tb"}
    # the checkpoints' own folder
    kept = saved_model(tmp_path / "safe" / "run" / "uniform-0", recipe, digits.train)
    assert same(kept.parameters(), again.ema.model.parameters())


def test_checkpoints_that_are_not_where_they_were_are_missed(tmp_path, digits):
    fit(replace(RECIPE, steps=15), digits, folder=tmp_path / "run" / "a")
    with pytest.warns(UserWarning, match="elsewhere/run/a: has no checkpoint, though .* has records of an earlier one; "
                      "starting anew"):
        fit(replace(RECIPE, steps=15, checkpoint_dir=str(tmp_path / "elsewhere")), digits,
            folder=tmp_path / "run" / "a")


def test_history_stays_where_it_is_kept(tmp_path, digits):
    class Elsewhere(Eager):
        "An engine of several devices, as far as the history is concerned."
        class collectives(Collectives): fixed = True
        collectives = collectives()
    fit(replace(RECIPE, history=2, steps=15), digits, folder=tmp_path)
    with pytest.raises(ValueError, match="history = 2: cpu and cuda keep it on disk, other engines on the device"):
        fit(replace(RECIPE, history=2, steps=15), digits, folder=tmp_path, backend=Elsewhere("cpu"))


def test_trace(tmp_path, digits):
    "A profile of three steps for TensorBoard; the weights are those of a training without."
    traced = fit(replace(RECIPE, steps=20, trace=3), digits, folder=tmp_path)
    trace = json.loads(next((tmp_path / "tb").glob("*.pt.trace.json")).read_text())
    # three layers in three steps
    assert sum("conv2d" in e["name"] for e in trace["traceEvents"] if e.get("cat") == "cpu_op") >= 9
    assert same(fit(replace(RECIPE, steps=20), digits).model.parameters(), traced.model.parameters())


# --- threads

def everything(training):
    "The whole state as one list of tensors, and the user's random state."
    found = []
    def visit(v):
        if isinstance(v, torch.Tensor): found.append(v.double().nan_to_num(nan=-7.0))   # NaN: never presented
        elif isinstance(v, dict): [visit(v[k]) for k in v]
        elif isinstance(v, (list, tuple)): [visit(x) for x in v]
    visit(training.state())
    return [*found, torch.get_rng_state()]


def test_timing_changes_nothing(digits):
    "Of the model, its generators, its records, and the user's random state; dropout and batch norm in the network."
    training = Training(replace(RECIPE, dropout=0.3, history=3), digits,
                        augment=Augment(crop=1, mean=digits.train.mean, std=digits.train.std))
    for _ in range(3): training.step()
    before = everything(training)
    grads = [p.grad.clone() for p in training.params]
    global_threads = torch.get_num_threads()
    assert 1 <= fastest_threads(training.trial(), 2) <= 2
    assert same(before, everything(training)) and torch.get_num_threads() == global_threads
    assert same(grads, [p.grad for p in training.params])


@pytest.fixture
def two_threads():
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    yield
    torch.set_num_threads(before)


def test_a_training_has_its_threads_and_gives_them_back(digits, monkeypatch, two_threads):
    monkeypatch.setattr("datasel_wb.trainer.FOUND", {})
    monkeypatch.setattr("datasel_wb.trainer.fastest_threads", lambda run, most: run() or 1)
    seen, step = [], Training.step
    def counting(self):
        seen.append(torch.get_num_threads())
        step(self)
        if self.recipe.threads == 1 and self.steps_done == 3: raise ZeroDivisionError
    monkeypatch.setattr(Training, "step", counting)
    found = fit(replace(RECIPE, steps=15), digits)
    assert set(seen) == {1} and found.threads == 1 and torch.get_num_threads() == 2
    log = found.log.frame()
    assert log[log.name == "threads"].value.eq(1).all()
    assert len(log[log.name == "threads"]) == len(log[log.name == "lr"])
    seen.clear()
    assert fit(replace(RECIPE, steps=15, threads=2), digits).threads == 2 and set(seen) == {2}
    seen.clear()
    with pytest.raises(ZeroDivisionError): fit(replace(RECIPE, steps=15, threads=1), digits)
    assert set(seen) == {1} and torch.get_num_threads() == 2


def test_a_resume_keeps_the_threads(tmp_path, digits, monkeypatch, two_threads):
    monkeypatch.setattr("datasel_wb.trainer.FOUND", {})
    monkeypatch.setattr("datasel_wb.trainer.fastest_threads", lambda run, most: 1)
    step = Training.step
    def failing(self):
        if self.steps_done == 20: raise ZeroDivisionError
        step(self)
    monkeypatch.setattr(Training, "step", failing)
    with pytest.raises(ZeroDivisionError): fit(RECIPE, digits, folder=tmp_path)
    monkeypatch.setattr(Training, "step", step)
    monkeypatch.setattr("datasel_wb.trainer.FOUND", {})
    monkeypatch.setattr("datasel_wb.trainer.fastest_threads", lambda run, most: pytest.fail("timed again"))
    assert fit(RECIPE, digits, folder=tmp_path).threads == 1
    assert fit(replace(RECIPE, threads=2), digits, folder=tmp_path).steps_done == 60     # no part of what a training is


def test_the_number_of_threads_of_one_network_is_one(digits, monkeypatch, two_threads):
    "Timed once in a process, so that paired trainings have the same."
    timed = []
    monkeypatch.setattr("datasel_wb.trainer.FOUND", {})
    monkeypatch.setattr("datasel_wb.trainer.fastest_threads", lambda run, most: timed.append(most) or 2)
    for seed in (0, 1): assert fit(replace(RECIPE, steps=10, warmup_steps=1), digits, seed=seed).threads == 2
    assert timed == [2]
    fit(replace(RECIPE, steps=10, warmup_steps=1, batch_size=32), digits)
    assert timed == [2, 2]


@pytest.mark.parametrize("times, most, best", [
    ({1: 1.0, 2: 0.95, 4: 1.4}, 4, 4),       # not worth another number
    ({1: 1.0, 2: 5.0, 4: 9.0}, 4, 1),        # threads that wait for each other
    ({1: 1.0, 2: 0.4, 3: 0.7}, 3, 2),
    ({1: 1.0, 2: 0.6, 3: 0.5}, 3, 3),        # no power of two
    ({1: 1.0}, 1, 1),
])
def test_the_default_number_unless_another_is_much_faster(times, most, best):
    before = torch.get_num_threads()
    assert fastest_threads(None, most, lambda step: times[torch.get_num_threads()]) == best
    assert torch.get_num_threads() == before


def test_a_failing_trial_gives_the_threads_back():
    before = torch.get_num_threads()
    def fails(): raise ZeroDivisionError
    with pytest.raises(ZeroDivisionError): fastest_threads(fails, before + 1)
    assert torch.get_num_threads() == before
