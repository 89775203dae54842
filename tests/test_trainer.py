"""The loop: equal to plain PyTorch, equal after a kill, and nothing lost when the disk or the numbers fail."""
import os
import random
import resource
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import pandas as pd
import pytest
import torch
import torch.nn.functional as F

from datasel_wb.data import Augment, DataRecipe, Loader, load_data
from datasel_wb.models import make_model
from datasel_wb.scorer import DDS, Scorer
from datasel_wb.trainer import Checkpoints, Eager, Recipe, Training, fit, saved_model, step_where

RECIPE = Recipe(model="tiny_cnn", steps=60, batch_size=64, warmup_steps=5, log_every=7, eval_every=20, save_every=15)


@pytest.fixture(scope="module")
def digits():
    return load_data(DataRecipe(dataset="digits", dev_size=250, noise=0.2))


def same(a, b):
    return all(torch.equal(x, y) for x, y in zip(a, b, strict=True))


def test_uniform_equals_a_hand_written_loop(digits):
    "torch.optim.SGD with its own weight decay, F.cross_entropy with its own mean, 50 steps, augmentation on: bit for bit."
    recipe = replace(RECIPE, steps=50, grad_bound=0.0, dropout=0.1)
    augment = Augment(crop=1, mean=digits.train.mean, std=digits.train.std)
    training = Training(recipe, digits, augment=augment, seed=3)
    with training.backend.own_random_state(3):
        for _ in range(50): training.step()

    model = make_model("tiny_cnn", 10, 1, dropout=0.1, seed=3)
    kernels = [p for p in model.parameters() if p.ndim > 1]
    rest = [p for p in model.parameters() if p.ndim == 1]
    opt = torch.optim.SGD([{"params": kernels, "weight_decay": 2e-4}, {"params": rest}], 0.1, momentum=0.9, nesterov=True)
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


def test_the_users_random_state_is_left_alone(digits):
    torch.manual_seed(5)
    state = torch.get_rng_state()
    fit(replace(RECIPE, steps=10, dropout=0.1), digits)
    assert torch.equal(state, torch.get_rng_state())


SCRIPT = """
import sys
from datasel_wb.data import Augment, DataRecipe, load_data
from datasel_wb.scorer import DDS, Scorer
from datasel_wb.trainer import Recipe, fit
recipe = Recipe(model="tiny_cnn", steps=240, batch_size=64, log_every=7, eval_every=40, save_every=12, dropout=0.2)
data = load_data(DataRecipe(dataset="digits", dev_size=250, noise=0.3))
augment = Augment(crop=1, cutout=2, mean=data.train.mean, std=data.train.std)
print("ready", flush=True)
fit(recipe, data, DDS(Scorer.like(recipe.build(data.train, 9), clip=2.0), lr=0.01, momentum=0.5, baseline="moving"), folder=sys.argv[1], augment=augment)
"""


def start(folder):
    env = os.environ | {"OMP_NUM_THREADS": "1", "DATASEL_LOG_SECONDS": "60"}
    process = subprocess.Popen([sys.executable, "-c", SCRIPT, str(folder)], stdout=subprocess.PIPE, text=True, env=env, start_new_session=True)
    assert process.stdout.readline() == "ready\n"
    return process


def weights(folder):
    parts = Checkpoints(Path(folder) / "checkpoints").load()["parts"]
    return [t for part in ("model", "ema", "selector") for t in parts[part].values() if isinstance(t, torch.Tensor)]


def test_killed_three_times_equals_uninterrupted(tmp_path):
    "kill -9 at random moments of a DDS run with dropout and augmentation; the same call goes on each time."
    whole = start(tmp_path / "whole")
    assert whole.wait() == 0
    kills, rng = 0, random.Random(time.time_ns())
    while True:
        process = start(tmp_path / "killed")
        manifest = tmp_path / "killed" / "checkpoints" / "checkpoints.json"
        before = manifest.read_text() if manifest.exists() else ""
        while kills < 3 and process.poll() is None and (not manifest.exists() or manifest.read_text() == before): time.sleep(0.005)
        if kills == 3: break
        time.sleep(rng.uniform(0, 0.3))
        os.killpg(process.pid, signal.SIGKILL)
        assert process.wait() == -signal.SIGKILL, "the run ended before it could be killed"
        kills += 1
    assert process.wait() == 0
    assert same(weights(tmp_path / "whole"), weights(tmp_path / "killed"))
    for name in ("metrics", "examples"):
        a, b = (pd.read_parquet(tmp_path / f / f"{name}.parquet").drop(columns="seconds", errors="ignore") for f in ("whole", "killed"))
        pd.testing.assert_frame_equal(a, b, check_exact=True)


def test_full_disk_leaves_the_previous_checkpoint(tmp_path, digits):
    "A real write failure: the process may not write files larger than a limit."
    training = Training(RECIPE, digits)
    saved = Checkpoints(tmp_path)
    saved.save({"step": 1, "w": torch.ones(3)}, 1)
    old = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, old[1]))
    try:
        with pytest.raises(OSError, match="cannot save step-00000002.pt .*what was saved before is intact"):
            saved.save(training.state() | {"big": torch.zeros(100_000)}, 2)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, old)
    assert not list(tmp_path.glob("*.tmp"))
    assert Checkpoints(tmp_path).load()["step"] == 1


def test_truncated_checkpoint_falls_back_and_says_so(tmp_path, digits):
    done = fit(RECIPE, digits, folder=tmp_path)
    last = tmp_path / "checkpoints" / "step-00000060.pt"
    last.write_bytes(last.read_bytes()[:-1000])
    with pytest.warns(UserWarning, match="step-00000060.pt is damaged.*going on from the previous one, step 45"):
        again = fit(RECIPE, digits, folder=tmp_path)
    assert same(done.model.parameters(), again.model.parameters())
    for f in (tmp_path / "checkpoints").glob("*.pt"): f.write_bytes(b"")
    with pytest.raises(ValueError, match="damaged.*to start anew"): fit(RECIPE, digits, folder=tmp_path)


def test_killed_after_the_last_checkpoint_still_writes_its_examples(tmp_path, digits):
    fit(RECIPE, digits, folder=tmp_path)
    table = pd.read_parquet(tmp_path / "examples.parquet")
    (tmp_path / "examples.parquet").unlink()   # as if the process had died between the two files
    fit(RECIPE, digits, folder=tmp_path)
    pd.testing.assert_frame_equal(table, pd.read_parquet(tmp_path / "examples.parquet"), check_exact=True)


def test_checkpoint_of_another_training_or_model_is_refused(tmp_path, digits):
    fit(replace(RECIPE, steps=15), digits, folder=tmp_path)
    with pytest.raises(ValueError, match="another training; steps: 15 there, 60 here"): fit(RECIPE, digits, folder=tmp_path)
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
    with pytest.raises(FloatingPointError, match="not finite in 20 steps in a row, up to step 20"): fit(RECIPE, digits, folder=tmp_path)


@pytest.mark.parametrize("wrong, said", [
    (dict(steps=0), "steps = 0: must be above 0"), (dict(steps=10.5), "steps = 10.5: must be of type int"),
    (dict(model="wrn"), "model = 'wrn': must be one of"), (dict(lr=0.0), "lr = 0.0: must be above 0"),
    (dict(warmup_steps=60), "warmup_steps = 60: must be below steps = 60"), (dict(dropout=1.0), r"dropout = 1.0: must lie in \[0, 1\)"),
    (dict(momentum=0.0), "nesterov = True: needs a momentum"), (dict(nesterov=1), "nesterov = 1: must be of type bool")])
def test_settings_speak(wrong, said):
    with pytest.raises(ValueError, match=said): replace(RECIPE, **wrong)


def test_cuda_without_cuda_is_refused():
    if torch.cuda.is_available(): pytest.skip("this machine has CUDA")
    with pytest.raises(ValueError, match="device = 'cuda': this machine has no CUDA device"): Eager("cuda")


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
    Checkpoints(tmp_path / "checkpoints").save(half.state(), 30)
    resumed = fit(recipe, digits, make(), folder=tmp_path)
    assert same(whole.model.parameters(), resumed.model.parameters()) and same(whole.selector.scorer.parameters(), resumed.selector.scorer.parameters())


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs CUDA")
def test_on_cuda_in_bfloat16(digits):
    training = fit(replace(RECIPE, device="cuda"), digits)
    assert training.log.frame().query("name == 'top1'").value.iloc[-1] > 50
