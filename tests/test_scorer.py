"""DDS against Algorithm 1 written out: explicit per-example gradients in float64, no protocol, no alignment primitive."""
import copy

import pytest
import torch
import torch.nn.functional as F
from torch.func import functional_call, grad, vmap

from datasel_wb.core import Batch, seeded
from datasel_wb.datasets import DataRecipe, load_data
from datasel_wb.images import Augment
from datasel_wb.models import make_model
from datasel_wb.scorer import DDS, DDSRecipe, Scorer
from datasel_wb.selectors import Task


@pytest.fixture(scope="module")
def digits():
    return load_data(DataRecipe(dataset="digits", dev_size=250, noise=0.4))


def make(digits, sees="xy", **kw):
    "Model, bound DDS and a batch, in float64."
    model = make_model("tiny_cnn", 10, 1).double()
    scorer = Scorer.like(make_model("tiny_cnn", 10, 1, seed=1), sees, clip=2.0).double()
    torch.nn.init.normal_(scorer.head.weight, std=0.3, generator=seeded(0, "head"))
    prepare = Augment(mean=digits.train.mean, std=digits.train.std)
    task = Task(model, digits.train, digits.dev, steps=10, dev_batch_size=16, prepare=lambda x: prepare(x).double())
    sel = DDS(scorer, **kw).bind(task)
    batch = digits.train.take(digits.train.ids[:24])
    return model, sel, batch._replace(x=task.prepare(batch.x))


def score64(scorer, batch):
    "c tanh(w h), without Scorer.forward."
    h = scorer.body(batch.x)
    w = scorer.head.weight
    raw = torch.stack([h[i] @ (w[batch.y[i]] if scorer.sees == "xy" else w[0]) for i in range(len(h))])
    return scorer.clip * torch.tanh(raw)


@pytest.mark.parametrize("sees", ["x", "xy"])
@pytest.mark.parametrize("baseline", ["none", "batch"])
def test_three_steps_of_algorithm_1(digits, sees, baseline):
    lr, theta_lr = 0.05, 0.1
    model, sel, batch = make(digits, sees, lr=lr, baseline=baseline)
    ref, ref_scorer, dev_rng = copy.deepcopy(model), copy.deepcopy(sel.scorer).eval(), seeded(0, "dev")

    opt = torch.optim.SGD(model.parameters(), theta_lr)
    for _ in range(3):
        opt.zero_grad()
        sel.loss(model(batch.x), batch).backward()
        opt.step()
        sel.after_step(batch)

    prepare = sel.task.prepare
    for _ in range(3):
        logp = score64(ref_scorer, batch).log_softmax(0)
        before = {k: p.detach().clone() for k, p in ref.named_parameters()}
        losses = F.cross_entropy(ref(batch.x), batch.y, reduction="none")
        g = torch.autograd.grad((logp.detach().exp() * losses).sum(), list(ref.parameters()))
        with torch.no_grad():
            for p, gp in zip(ref.parameters(), g): p -= theta_lr * gp
        ids = torch.randint(len(digits.dev), (16,), generator=dev_rng)
        dev = digits.dev.take(ids)
        ref.eval()
        d = torch.autograd.grad(F.cross_entropy(ref(prepare(dev.x)), dev.y), list(ref.parameters()))
        one = lambda theta, x, y: F.cross_entropy(functional_call(ref, theta, (x[None],)), y[None])
        per = vmap(grad(one), (None, 0, 0))(before, batch.x, batch.y)
        r = sum(per[k].flatten(1) @ dk.flatten() for (k, _), dk in zip(ref.named_parameters(), d))
        ref.train()
        if baseline == "batch": r = r - r.mean()
        step = torch.autograd.grad((r * logp).mean(), list(ref_scorer.parameters()))
        with torch.no_grad():
            for p, s in zip(ref_scorer.parameters(), step): p += lr * s

    for a, b in zip(sel.scorer.parameters(), ref_scorer.parameters()): assert torch.allclose(a, b, rtol=1e-9, atol=1e-12)
    for a, b in zip(model.parameters(), ref.parameters()): assert torch.allclose(a, b, rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("reward", ["forward", "reverse", "difference"])
def test_agreeing_examples_gain_probability(digits, reward):
    "The sign of the update: dev is one image; its twin in the batch agrees, the twin with another label does not."
    torch.manual_seed(0)
    model = make_model("tiny_cnn", 10, 1)
    one = digits.dev.select([7])
    sel = DDS(Scorer.like(make_model("tiny_cnn", 10, 1, seed=1), clip=2.0), lr=5.0, reward=reward).bind(Task(model, dev=one, n=2))
    twin = Batch(sel.task.prepare(one.x).repeat(2, 1, 1, 1), torch.stack([one.y[0], (one.y[0] + 3) % 10]), torch.arange(2))
    opt = torch.optim.SGD(model.parameters(), 1e-3)
    chances = []
    for _ in range(5):
        opt.zero_grad()
        sel.loss(model(twin.x), twin).backward()
        opt.step()
        sel.after_step(twin)
        chances.append(sel.seen.weights[0].item())
    assert chances[0] == 0.5 and chances == sorted(chances) and chances[-1] > 0.6


def test_waiting_and_frozen_scorers_do_not_move(digits):
    for kw in ({"lr": 0.0}, {"lr": 0.1, "wait_steps": 10}):
        model, sel, batch = make(digits, **kw)
        before = [p.clone() for p in sel.scorer.parameters()]
        for _ in range(3):
            sel.loss(model(batch.x), batch).backward()
            sel.after_step(batch)
        assert all(torch.equal(a, b) for a, b in zip(before, sel.scorer.parameters()))


def test_a_reward_that_is_not_finite_leaves_the_scorer_finite(digits):
    model, sel, batch = make(digits, lr=0.1)
    broken = batch._replace(x=batch.x.clone())
    broken.x[3] = float("nan")
    model.eval()  # keep the NaN in its own example
    sel.scores = None
    sel.weights(None, batch)
    sel.update(broken)
    assert all(p.isfinite().all() for p in sel.scorer.parameters())


def test_released_variant_is_the_scalar_reward(digits):
    model, sel, batch = make(digits, lr=0.1, variant="released")
    r = torch.randn(24, dtype=torch.float64, generator=seeded(0, "r"))
    logp = torch.randn(24, dtype=torch.float64, generator=seeded(1, "r")).log_softmax(0)
    entropy = -(logp.exp() * logp).sum()
    assert torch.isclose(sel.objective(r, logp), (logp.exp() @ r) * entropy / 24)
    assert torch.isclose(sel.average, 0.01 * (logp.exp() @ r).to(sel.average.dtype))


@pytest.mark.parametrize("wrong, said", [
    (dict(scorer_sees="y"), "scorer_sees = 'y': must be one of x, xy"), (dict(scorer_clip=0.0), "scorer_clip = 0.0: must be above 0"),
    (dict(scorer_lr=-1.0), "scorer_lr = -1.0: must be 0 or more"), (dict(reward="sideways"), "reward = 'sideways': must be one of"),
    (dict(scorer_steps=2.5), "scorer_steps = 2.5: must be of type int")])
def test_settings_speak(wrong, said):
    with pytest.raises(ValueError, match=said): DDSRecipe(**wrong)


def test_binding_without_dev_data_is_refused():
    model = make_model("tiny_cnn", 10, 1)
    with pytest.raises(ValueError, match="DDS needs dev_batch"): DDS(Scorer.like(model), lr=0.1).bind(Task(model, n=10, n_classes=10))
