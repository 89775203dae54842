"""DDS against Algorithm 1 written out: explicit per-example
gradients in float64, no protocol, no alignment primitive."""
import copy
from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F
from torch.func import functional_call, grad, vmap

from datasel_wb.backends import step_where
from datasel_wb.core import Batch, seeded, start_momentum
from datasel_wb.datasets import DataRecipe, load_data
from datasel_wb.images import Augment
from datasel_wb.loop import Recipe, Training
from datasel_wb.models import make_model
from datasel_wb.recipes import COMPARE_RECIPES, DDS_RECIPES
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

    for a, b in zip(sel.scorer.parameters(), ref_scorer.parameters()):
        assert torch.allclose(a, b, rtol=1e-9, atol=1e-12)
    for a, b in zip(model.parameters(), ref.parameters()): assert torch.allclose(a, b, rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("reward", ["forward", "reverse", "difference"])
def test_agreeing_examples_gain_probability(digits, reward):
    "The sign of the update: dev is one image; its twin in the batch agrees, the twin with another label does not."
    torch.manual_seed(0)
    model = make_model("tiny_cnn", 10, 1)
    one = digits.dev.select([7])
    sel = DDS(Scorer.like(make_model("tiny_cnn", 10, 1, seed=1), clip=2.0), lr=5.0, reward=reward).bind(
        Task(model, dev=one, n=2))
    twin = Batch(sel.task.prepare(one.x).repeat(2, 1, 1, 1), torch.stack([one.y[0], (one.y[0] + 3) % 10]),
                 torch.arange(2))
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


@pytest.mark.parametrize("variant", ["released", "released_as_run"])
def test_released_variants_are_the_scalar_reward_minus_an_average_that_has_it(digits, variant):
    model, sel, batch = make(digits, lr=0.1, variant=variant)
    logp = torch.randn(24, dtype=torch.float64, generator=seeded(1, "r")).log_softmax(0)
    entropy, average = -(logp.exp() * logp).sum(), 0.0
    for t in range(3):
        r = torch.randn(24, dtype=torch.float64, generator=seeded(t, "r"))
        reward = (r * (logp.exp() if variant == "released" else 1)).sum().item()
        average -= 0.01 * (average - reward)          # before it is subtracted
        assert torch.isclose(sel.objective(r, logp), (reward - average) * entropy / 24, rtol=1e-5)
        assert abs(sel.average.item() - average) < 1e-6


def released_steps(digits, variant, seed, steps=20):
    "Weights of a model after some steps beside a scorer whose head is drawn from a seed, and its scores."
    model, sel, batch = make(digits, "x", lr=0.05, variant=variant, reward="step")
    torch.nn.init.normal_(sel.scorer.head.weight, std=1.0, generator=seeded(seed, "another head"))
    opt = torch.optim.SGD(model.parameters(), 0.1, momentum=0.9, nesterov=True)
    for _ in range(steps):
        opt.zero_grad()
        loss = sel.loss(model(batch.x), batch)
        if variant == "released_as_run":
            assert torch.isclose(loss, F.cross_entropy(model(batch.x), batch.y, reduction="sum"))
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        opt.step()
        sel.after_step(batch)
    return torch.nn.utils.parameters_to_vector(model.parameters()).detach(), sel.scorer(batch).detach()


def test_as_run_the_scores_never_reach_the_model(digits):
    "[B, 1] times [B]; squeezed, they do."
    for variant, reaches in (("released_as_run", False), ("released", True)):
        (a, scores), (b, others) = (released_steps(digits, variant, seed) for seed in (0, 1))
        assert (scores - others).abs().max() > 0.1
        assert ((a - b).abs().max() > 0.01) == reaches and ((a - b).abs().max() <= 1e-7) != reaches


@pytest.mark.parametrize("variant", ["released", "released_as_run"])
def test_the_steps_reward_is_the_published_product(digits, variant):
    "Three steps: clipped gradient with weight decay through training-mode batch norm, times the dev gradient after it."
    model, sel, batch = make(digits, "x", lr=0.05, variant=variant, reward="step")
    ref, ref_scorer, dev_rng = copy.deepcopy(model), copy.deepcopy(sel.scorer).eval(), seeded(0, "dev")
    opt = torch.optim.SGD(model.parameters(), 0.1)
    for _ in range(3):
        opt.zero_grad()
        sel.loss(model(batch.x), batch).backward()
        with torch.no_grad():
            for p in model.parameters(): p.grad.add_(p, alpha=0.01)
        torch.nn.utils.clip_grad_norm_(model.parameters(), 0.5)
        opt.step()
        sel.after_step(batch)

    average, theta = 0.0, list(ref.parameters())
    for _ in range(3):
        logp = score64(ref_scorer, batch).log_softmax(0)
        losses = F.cross_entropy(ref(batch.x), batch.y, reduction="none")
        scores = logp.detach().exp()[:, None] if variant == "released_as_run" else logp.detach().exp()
        total = (losses * scores).sum() + 0.005 * sum((p ** 2).sum() for p in theta)
        g = torch.autograd.grad(total, theta)
        norm = torch.sqrt(sum((v ** 2).sum() for v in g))
        g = [v * min(1.0, 0.5 / norm) for v in g]
        with torch.no_grad():
            for p, v in zip(theta, g): p -= 0.1 * v
        dev = digits.dev.take(torch.randint(len(digits.dev), (16,), generator=dev_rng))
        ref.eval()
        d = torch.autograd.grad(F.cross_entropy(ref(sel.task.prepare(dev.x)), dev.y), theta)
        ref.train()
        reward = sum((a * b).sum() for a, b in zip(g, d)).item()
        average -= 0.01 * (average - reward)
        entropy = -(logp.exp() * logp).sum()
        step = torch.autograd.grad((reward - average) * entropy / 24, list(ref_scorer.parameters()))
        with torch.no_grad():
            for p, s in zip(ref_scorer.parameters(), step): p -= 0.05 * s
    for a, b in zip(model.parameters(), theta): assert torch.allclose(a, b, rtol=1e-5, atol=1e-8)
    for a, b in zip(sel.scorer.parameters(), ref_scorer.parameters()): assert torch.allclose(a, b, rtol=1e-5, atol=1e-9)


def test_the_steps_reward_where_the_optimizer_computes_in_the_gradient(digits):
    "As on CUDA: SGD over all tensors at once, with Nesterov momentum; the oracle keeps each gradient before the step."
    model, sel, batch = make(digits, "x", lr=0.05, variant="released", reward="step")
    opt = torch.optim.SGD(model.parameters(), 1.0, momentum=0.9, nesterov=True, foreach=True)
    start_momentum(opt)
    ref = copy.deepcopy(model)
    by_hand = torch.optim.SGD(ref.parameters(), 0.1, momentum=0.9, nesterov=True, foreach=False)
    dev_rng = seeded(0, "dev")
    for _ in range(3):
        opt.zero_grad()
        sel.loss(model(batch.x), batch).backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 0.5)
        clipped = [p.grad.clone() for p in model.parameters()]
        for p, g in zip(ref.parameters(), clipped): p.grad = g.clone()
        by_hand.step()
        step_where(torch.tensor(True), opt, 0.1)
        for p, q, g in zip(model.parameters(), ref.parameters(), clipped):
            assert torch.equal(p.grad, g) and torch.allclose(p, q, rtol=1e-12, atol=1e-14)
        dev = digits.dev.take(torch.randint(len(digits.dev), (16,), generator=dev_rng))
        ref.load_state_dict(model.state_dict())
        loss = F.cross_entropy(ref.eval()(sel.task.prepare(dev.x)), dev.y)
        d = torch.autograd.grad(loss, list(ref.parameters()))
        expected, got = sum((a * b).sum() for a, b in zip(clipped, d)), []
        rewards = sel.rewards
        sel.rewards = lambda b: got.append(rewards(b)) or got[-1]
        sel.after_step(batch)
        sel.rewards = rewards
        assert torch.isclose(got[0], expected, rtol=1e-9)


def test_the_steps_reward_needs_the_gradients_of_the_step(digits):
    model, sel, batch = make(digits, lr=0.05, variant="released", reward="step")
    sel.loss(model(batch.x), batch).backward()
    model.zero_grad()
    with pytest.raises(ValueError, match=r"body.0.0.weight.grad = None: reward = 'step' .* zero_grad after after_step"):
        sel.after_step(batch)


@pytest.mark.parametrize("wrong, said", [
    (dict(variant="released", baseline="batch"), "baseline = 'batch': .* none or moving for variant = 'released'"),
    (dict(variant="released_as_run", baseline="batch"), "baseline = 'batch'"),
    (dict(reward="step"), "reward = 'step': .* must be one of forward, reverse, difference for variant = 'paper'")])
def test_options_that_do_not_go_together_are_refused_at_construction(digits, wrong, said):
    with pytest.raises(ValueError, match=said): make(digits, **wrong)
    with pytest.raises(ValueError, match=said): DDSRecipe(**wrong)


# --- the supervised stage

def test_the_stage_of_the_scorer_as_published_and_as_ours(digits):
    "Augmentation, schedule, and whose weights become the body."
    data = DataRecipe(dataset="cifar10", flip=True, crop=4, randaugment=17, cutout=16)
    ours, published = DDSRecipe(), DDSRecipe(scorer_augment="plain", scorer_weights="raw")
    assert ours.stage_data(data) == replace(data, randaugment=0)
    assert published.stage_data(data) == replace(data, randaugment=0, cutout=0)
    recipe = Recipe(model="tiny_cnn", steps=60, batch_size=64, warmup_steps=5, ema_decay=0.9)
    for dds in (ours, published):
        stage = replace(dds, scorer_steps=8, scorer_warmup_steps=2, scorer_stage_lr=0.3).stage(recipe)
        assert stage == replace(recipe, steps=8, warmup_steps=2, lr=0.3)
    training = Training(stage, digits)
    for _ in range(8): training.step()
    raw, averaged = (torch.nn.utils.parameters_to_vector(m.parameters()) for m in (training.model, training.ema.model))
    assert (raw - averaged).abs().max() > 1e-3
    for dds, weights in ((ours, averaged), (published, raw)):
        body = Scorer.like(dds.body(training)).body
        n = sum(p.numel() for p in body.parameters())
        assert torch.equal(torch.nn.utils.parameters_to_vector(body.parameters()), weights[:n])


@pytest.mark.parametrize("trains", ["all", "head"])
@pytest.mark.parametrize("weights", ["ema", "raw"])
def test_what_dds_trains_of_the_scorer_does_not_hang_on_whose_weights_it_has(digits, trains, weights):
    training = Training(Recipe(model="tiny_cnn", steps=20, batch_size=32, warmup_steps=2, ema_decay=0.5), digits)
    for _ in range(2): training.step()
    settings = DDSRecipe(scorer_weights=weights, scorer_trains=trains, scorer_lr=0.5, scorer_clip=2.0)
    scorer = settings.scorer(settings.body(training))
    body, head = list(scorer.body.parameters()), scorer.head.weight
    assert scorer.trains == trains and head.requires_grad and {p.requires_grad for p in body} == {trains == "all"}
    for source in (training.model, training.ema.model):           # asked for or not, theirs stays
        assert {p.requires_grad for p in source.parameters()} == {source is training.model}
    torch.nn.init.normal_(head, std=0.3, generator=seeded(0, "head"))
    before = [p.detach().clone() for p in (*body, head)]
    dds = Training(replace(training.recipe, warmup_steps=0), digits, settings.selector(scorer))
    for _ in range(3): dds.step()
    moved = [not torch.equal(a, b) for a, b in zip(before, (*body, head))]
    assert moved[-1] and all(moved) == (trains == "all") and any(moved[:-1]) == (trains == "all")


def test_which_recipes_train_the_head_alone():
    "Ours do, as they were measured; the published ones train all."
    alone = {name for name, r in DDS_RECIPES.items() if r.get("scorer_trains", DDSRecipe().scorer_trains) == "head"}
    assert alone == {"quick"} and all(r["scorer_trains"] == "head" for r in COMPARE_RECIPES.values())
    with pytest.raises(ValueError, match="trains = 'body': must be one of all, head"):
        Scorer.like(make_model("tiny_cnn", 10, 1), trains="body")


@pytest.mark.parametrize("wrong, said", [
    (dict(scorer_sees="y"), "scorer_sees = 'y': must be one of x, xy"),
    (dict(scorer_clip=0.0), "scorer_clip = 0.0: must be above 0"),
    (dict(scorer_lr=-1.0), "scorer_lr = -1.0: must be 0 or more"),
    (dict(reward="sideways"), "reward = 'sideways': must be one of"),
    (dict(scorer_steps=2.5), "scorer_steps = 2.5: must be of type int")])
def test_settings_speak(wrong, said):
    with pytest.raises(ValueError, match=said): DDSRecipe(**wrong)


def test_binding_without_dev_data_is_refused():
    model = make_model("tiny_cnn", 10, 1)
    with pytest.raises(ValueError, match="DDS needs dev_batch"):
        DDS(Scorer.like(model), lr=0.1).bind(Task(model, n=10, n_classes=10))
