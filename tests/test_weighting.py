"""Weighting methods against independent computations."""
import copy
import math

import pytest
import torch
import torch.nn.functional as F
from torch.func import functional_call

from datasel_wb.core import Batch, per_example_loss
from datasel_wb.datasets import DataRecipe, load_data
from datasel_wb.scores import noise_auroc
from datasel_wb.models import make_model, small_cnn
from datasel_wb.selectors import Task
from datasel_wb.weighting import (
    SPCL, BatchWeight, BatchWeightSettings, DataParameters, DataParametersRecipe, MentorNet, Sigma, normalised,
    self_paced)
from loops import bare_loop

DATA = load_data(DataRecipe(dataset="digits", dev_size=250, noise=0.4))
N = len(DATA.train)


def task(model=None, **kw):
    torch.manual_seed(0)
    return Task(model or small_cnn(width=8), DATA.train, DATA.dev, **dict(steps=100, dev_batch_size=64) | kw)


def batch(t, n=32):
    b = DATA.train.take(DATA.train.ids[torch.randperm(N)[:n]])
    return b._replace(x=t.prepare(b.x))


# --- data parameters

@pytest.mark.parametrize("level", ["cls", "inst", "both"])
@pytest.mark.parametrize("decay", [0.0, 0.1])
def test_data_parameters_against_autograd_over_the_whole_table(level, decay):
    "Ten steps; the oracle has dense tables in float64, indexed by autograd, and momentum in a loop over entries."
    t = task()
    settings = {k: Sigma(lr, init, decay) for k, lr, init in (("cls", 0.3, 1.0), ("inst", 2.0, 0.5))
                if level in (k, "both")}
    sel = DataParameters(**settings).bind(t)
    tables = {k: torch.full((10 if k == "cls" else DATA.train.full,), math.log(s.init), dtype=torch.float64)
              for k, s in settings.items()}
    buffers = {k: {} for k in tables}
    for _ in range(10):
        b, logits = batch(t), 3 * torch.randn(32, 10)
        ids = {"cls": b.y, "inst": b.idx}
        leaves = {k: v.clone().requires_grad_() for k, v in tables.items()}
        sigma = sum(leaves[k][ids[k]].exp() for k in leaves)
        oracle = (F.cross_entropy(logits.double() / sigma[:, None], b.y)
                  + sum(0.5 * decay * (leaves[k][ids[k]] ** 2).sum() for k in leaves))
        oracle.backward()
        loss = sel.loss(logits, b)
        assert torch.isclose(loss.double(), oracle, rtol=1e-5)
        loss.backward()
        sel.after_step(b)
        for k, leaf in leaves.items():
            for i in set(ids[k].tolist()):
                g = leaf.grad[i].item()
                buffers[k][i] = 0.9 * buffers[k][i] + g if i in buffers[k] else g
                tables[k][i] = min(max(tables[k][i].item() - settings[k].lr * buffers[k][i], -math.log(20)),
                                   math.log(20))
    for k in tables: assert torch.allclose(getattr(sel, f"log_{k}").double(), tables[k], atol=1e-5)


def test_joint_sigma_is_the_sum():
    t = task()
    sel = DataParameters(Sigma(init=1.0), Sigma(init=0.5)).bind(t)
    logits = torch.randn(32, 10)
    assert torch.allclose(sel.logits(logits, batch(t)), logits / 1.5)


@pytest.mark.parametrize("clamp", [True, False])
def test_clamp(clamp):
    t = task()
    sel = DataParameters(inst=Sigma(lr=1e4), clamp=clamp).bind(t)
    b = batch(t)
    sel.loss(5 * torch.randn(32, 10), b).backward()
    sel.after_step(b)
    s = sel.log_inst[b.idx].abs()
    assert (s.max() <= math.log(20) + 1e-6) == clamp


def test_an_initial_value_outside_the_limits_is_clamped_for_all_in_the_first_step():
    t = task()
    sel = DataParameters(Sigma(), Sigma(lr=0.8, init=0.001)).bind(t)
    b = batch(t)
    logits = sel.logits(torch.ones(32, 10), b)
    assert torch.allclose(logits, torch.full((32, 10), 1 / 1.001))   # the first step is made with the value as given
    sel.loss(5 * torch.randn(32, 10), b).backward()
    sel.after_step(b)
    assert torch.allclose(sel.report()["sigma/inst"][DATA.train.ids], torch.tensor(0.05))
    free = DataParameters(Sigma(), Sigma(lr=0.8, init=0.001), clamp=False).bind(task())
    assert torch.allclose(free.log_inst, torch.tensor(0.001).log())


def test_clamping_the_batch_equals_clamping_the_whole_table():
    "The published joint setting, 200 steps of a linear network on 24 examples; tables and momentum dense, in float64."
    rng = torch.Generator().manual_seed(0)
    x = torch.randn(24, 6, generator=rng, dtype=torch.float64)
    y = torch.randint(3, (24,), generator=rng)
    cls, inst = Sigma(0.1, 1.0, 1e-4), Sigma(0.8, 0.001, 1e-8)
    torch.manual_seed(0)
    net = torch.nn.Linear(6, 3, dtype=torch.float64)
    ref = copy.deepcopy(net)
    sel = DataParameters(cls, inst).bind(Task(net, n=24, n_classes=3))
    tables = {k: torch.full((n,), math.log(s.init), dtype=torch.float64)
              for k, n, s in (("cls", 3, cls), ("inst", 24, inst))}
    buffers, touched = ({k: torch.zeros(len(v), dtype=dtype) for k, v in tables.items()}
                        for dtype in (torch.float64, torch.bool))
    opts = [torch.optim.SGD(n.parameters(), 0.1, momentum=0.9) for n in (net, ref)]
    for step in range(200):
        at = torch.randperm(24, generator=rng)[:8]
        opts[0].zero_grad()
        b = Batch(x[at], y[at], at)
        sel.loss(net(b.x), b).backward()
        opts[0].step()
        sel.after_step(b)

        ids = {"cls": y[at], "inst": at}
        leaves = {k: v.clone().requires_grad_() for k, v in tables.items()}
        sigma = sum(leaves[k][ids[k]].exp() for k in leaves)
        decay = sum(0.5 * s.weight_decay * (leaves[k][ids[k]] ** 2).sum() for k, s in (("cls", cls), ("inst", inst)))
        opts[1].zero_grad()
        (F.cross_entropy(ref(x[at]) / sigma[:, None], y[at]) + decay).backward()
        opts[1].step()
        for k, s in (("cls", cls), ("inst", inst)):
            there = torch.zeros_like(touched[k]).index_fill_(0, ids[k], True)
            buffers[k][there] = 0.9 * buffers[k][there] + leaves[k].grad[there]
            tables[k][there] -= s.lr * buffers[k][there]
            tables[k].clamp_(math.log(1 / 20), math.log(20))                  # the whole table
        if step == 0: assert torch.allclose(tables["inst"], torch.tensor(1 / 20).log().double())
        for k in tables: assert torch.allclose(getattr(sel, f"log_{k}").double(), tables[k], atol=1e-5), (step, k)
    assert (tables["inst"] > math.log(1 / 20) + 0.1).any() and (tables["inst"] < math.log(1 / 20) + 1e-6).any()
    for a, b in zip(net.parameters(), ref.parameters()): assert torch.allclose(a, b, atol=1e-5)


def test_a_broken_step_adds_nothing_to_the_temperatures():
    t = task()
    sel = DataParameters(inst=Sigma(lr=1.0)).bind(t)
    b = batch(t)
    sel.loss(torch.full((32, 10), torch.nan, requires_grad=True), b).backward()
    sel.after_step(b)
    assert (sel.log_inst == 0).all()
    sel.loss(torch.randn(32, 10, requires_grad=True), b).backward()
    sel.after_step(b)
    coasting = copy.deepcopy(sel.optimizers["inst"].state_dict()["state"][0]["momentum_buffer"])
    before = sel.log_inst.clone()
    sel.loss(torch.full((32, 10), torch.nan, requires_grad=True), b).backward()
    sel.after_step(b)                                                  # nothing is added; the momentum goes on
    assert torch.allclose(sel.log_inst, (before - 0.9 * coasting).clamp(*sel.LIMITS))


def test_temperatures_find_wrong_labels():
    t = task(make_model("tiny_cnn", 10, 1))
    sel = DataParameters(inst=Sigma(lr=10.0)).bind(t)
    for _ in bare_loop(sel, epochs=10): pass
    assert noise_auroc(-sel.report()["sigma/inst"][DATA.train.ids], DATA.train.noisy) > 0.9


def test_recipe_makes_the_published_settings():
    joint = DataParametersRecipe(level="both", cls_lr=0.1, cls_decay=1e-4, inst_lr=0.8, inst_init=0.001,
                                 inst_decay=1e-8).selector()
    assert joint.settings == {"cls": Sigma(0.1, 1.0, 1e-4), "inst": Sigma(0.8, 0.001, 1e-8)} and joint.clamp


# --- BatchWeight

@pytest.mark.parametrize("norm", ["batch", "running"])
def test_batchweight_against_a_virtual_step(norm):
    "Double backward through one SGD step with weights eps on the batch, in float64; batch norm in either mode."
    t = task(small_cnn(width=8).double())
    prepare, t.prepare = t.prepare, lambda x: prepare(x).double()
    b = batch(t)
    for _ in range(5): t.model(batch(t).x)                           # running statistics that differ from a batch's
    before, state = copy.deepcopy(t.model.state_dict()), t.dev_rng.get_state()
    w = BatchWeight(norm).bind(t).weights(per_example_loss(t.model.eval()(b.x), b.y).detach(), b)
    after = t.model.state_dict()
    assert all(torch.equal(before[k], after[k]) for k in before)     # neither running statistics nor their count

    t.dev_rng.set_state(state)
    dev, model = t.dev_batch(), t.model.train(norm == "batch")
    theta = {k: p.detach().requires_grad_() for k, p in model.named_parameters()}
    def losses(params, batch):
        own = {k: v.clone() for k, v in model.named_buffers()}
        return per_example_loss(functional_call(model, params | own, (batch.x,)), batch.y)
    eps = torch.zeros(32, dtype=torch.float64, requires_grad=True)
    grads = torch.autograd.grad(eps @ losses(theta, b), list(theta.values()), create_graph=True)
    stepped = {k: p - 0.1 * g for (k, p), g in zip(theta.items(), grads)}
    raw = (-torch.autograd.grad(losses(stepped, dev).mean(), eps)[0]).clamp_min(0)
    assert (raw > 0).any() and (raw == 0).any()
    assert (w - raw / raw.sum()).abs().max() <= 1e-10


def test_batchweight_in_the_published_mode_is_another_weighting():
    "The two modes differ by more than rounding, and the published one is the default, also of the settings."
    t = task(small_cnn(width=8).double())
    prepare, t.prepare = t.prepare, lambda x: prepare(x).double()
    b, state, found = batch(t), t.dev_rng.get_state(), {}
    for norm in ("batch", "running", None):
        t.dev_rng.set_state(state)
        found[norm] = BatchWeight(*[norm] if norm else []).bind(t).weights(None, b)
    assert torch.equal(found[None], found["batch"]) and BatchWeightSettings().batchweight_norm == "batch"
    assert (found["batch"] - found["running"]).abs().max() > 1e-3


def test_batchweight_is_uniform_when_nothing_agrees():
    t = task()
    sel = BatchWeight().bind(t)
    t.align = lambda batch, v, **norm: -torch.rand(len(batch.y))
    assert torch.allclose(sel.weights(torch.rand(32), batch(t)), torch.full((32,), 1 / 32))


# --- self-paced learning

def test_self_paced_by_the_book():
    losses, level = torch.tensor([0.1, 0.5, 0.9]), torch.tensor(0.5)
    assert self_paced(losses, level).tolist() == [1, 0, 0]
    assert torch.allclose(self_paced(losses, level, soft=True), torch.tensor([0.8, 0.0, 0.0]))


@pytest.mark.parametrize("done, counted", [(0, 16), (20, 20), (40, 24), (80, 32), (100, 32)])
def test_spcl_lets_more_in_until_all_are(done, counted):
    t = task()
    sel = SPCL(start=0.5, until=0.8).bind(t)
    sel.steps_done.fill_(done)
    w = sel.weights(torch.rand(32), batch(t))
    assert (w > 0).sum() == counted and torch.isclose(w.sum(), torch.tensor(1.0))


def test_normalised():
    assert normalised(torch.tensor([0.0, 2.0])).tolist() == [0, 1] and normalised(torch.zeros(2)).tolist() == [0.5, 0.5]


# --- MentorNet

def test_predefined_mentor_is_a_moving_threshold_after_burn_in():
    t = task()
    sel = MentorNet("predefined", percentile=0.5, burn_in=0.2).bind(t)
    b, losses = batch(t), torch.arange(32.0)
    sel.observe(None, losses, b)
    assert sel.level == losses.quantile(0.5) and torch.allclose(sel.weights(losses, b), torch.full((32,), 1 / 32))
    sel.steps_done.fill_(50)
    sel.observe(None, losses + 10, b)
    assert torch.isclose(sel.level, 0.95 * losses.quantile(0.5) + 0.05 * (losses + 10).quantile(0.5))
    assert (sel.weights(losses, b) > 0).sum() == 16


def test_data_driven_mentor_learns_from_dev_examples():
    t = task(make_model("tiny_cnn", 10, 1))
    sel = MentorNet(burn_in=0.0).bind(t)
    given = torch.zeros(DATA.train.full)
    for b in bare_loop(sel, epochs=8): given[b.idx] += sel.seen.weights
    assert noise_auroc(given[DATA.train.ids], DATA.train.noisy) > 0.8


# --- bad input

@pytest.mark.parametrize("make, text", [
    (lambda: Sigma(lr=-0.1), "lr = -0.1"), (lambda: Sigma(lr=math.nan), "lr = nan"),
    (lambda: Sigma(init=0.0), "init = 0.0"), (lambda: Sigma(weight_decay=-1.0), "weight_decay = -1.0"),
    (lambda: DataParameters(), "one of them must be a Sigma"),
    (lambda: SPCL(start=0.0), "start = 0.0"), (lambda: SPCL(until=2.0), "until = 2.0"),
    (lambda: SPCL().bind(task(steps=None)), "SPCL needs steps"),
    (lambda: BatchWeight().bind(Task(small_cnn(width=8), DATA.train)), "BatchWeight needs dev_batch"),
    (lambda: MentorNet().bind(Task(small_cnn(width=8), DATA.train, steps=10)), "MentorNet needs dev_batch"),
    (lambda: BatchWeight("layer"), "norm = 'layer': must be one of running, batch"),
    (lambda: BatchWeightSettings("layer"), "batchweight_norm = 'layer'"),
    (lambda: MentorNet("sage"), "kind = 'sage'"), (lambda: MentorNet(flipped=0.0), "flipped = 0.0"),
    (lambda: MentorNet(lr=0.0), "lr = 0.0"),
    (lambda: DataParameters(Sigma(), Sigma()).bind(Task(small_cnn(width=8))), "needs n, n_classes"),
    (lambda: DataParameters(inst=Sigma()).bind(Task(small_cnn(width=8))), "needs n, which"),
    (lambda: DataParametersRecipe(inst_init=-1.0), "inst_init = -1.0"),
])
def test_bad_input(make, text):
    with pytest.raises(ValueError, match=text): make()


def test_data_parameters_need_a_sigma():
    with pytest.raises(ValueError, match="inst = 0.2: must be a Sigma"): DataParameters(inst=0.2)
