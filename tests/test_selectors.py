"""One contract check for every registered method (adding a method adds one row), and oracles of the subset methods."""
import copy
import math

import pytest
import torch

from datasel_wb.datasets import DataRecipe, load_data
from datasel_wb.scores import sorted_ids
from datasel_wb.models import Slim, features_and_logits, make_model, small_cnn, tiny_resnet
from datasel_wb.scorer import DDS, Scorer
from datasel_wb.contract import check_selector
from datasel_wb.selectors import (
    RS2, DynaMS, InfoBatch, Prune, Selector, Task, Uniform, infobatch_sample, margin_schedule, margin_to_boundary,
    removed_ids)
from datasel_wb.loop import Recipe, Training
from datasel_wb.trainer import fit
from datasel_wb.weighting import SPCL, BatchWeight, DataParameters, MentorNet, Sigma
from loops import bare_loop
from methods import DATA, METHODS


@pytest.mark.parametrize("method", METHODS)
def test_contract(method):
    # those act from the second epoch on
    check_selector(METHODS[method], steps=72 if "dynams" in method or "infobatch" in method else 40)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs CUDA")
@pytest.mark.parametrize("method", METHODS)
def test_on_cuda(method):
    recipe = Recipe(model="tiny_cnn", epochs=3, batch_size=64, warmup_steps=5, device="cuda")
    training = fit(recipe, DATA, METHODS[method]())
    assert training.done and training.skips[0] == 0 and all(p.isfinite().all() for p in training.model.parameters())


class NoHostState(DynaMS):
    host = ()


class NoScale(InfoBatch):
    def setup(self, task):
        super().setup(task)
        self.register_buffer("scale", self.scale, persistent=False)


@pytest.mark.parametrize("bad", [lambda: NoHostState(0.7, warmup=1, every=2), NoScale])
def test_contract_finds_lost_state(bad):
    with pytest.raises(AssertionError, match="resume is not bit-equal"): check_selector(bad)


@pytest.mark.parametrize("shift, text", [
    (1297, r"batch.idx = \d+: must lie in 0..1296"), (-1297, r"batch.idx = -\d+: must lie in 0..1296"),
    (-250, "batch.idx = 0: must be among the ids of the training set")])
@pytest.mark.parametrize("method", METHODS)
def test_ids_of_another_dataset_are_refused(method, shift, text):
    sel = METHODS[method]().bind(task())
    b = DATA.train.take(DATA.train.ids[:32])
    with pytest.raises(ValueError, match=text): sel.loss(torch.randn(32, 10), b._replace(idx=b.idx + shift))


def test_labels_that_the_training_set_lacks_are_refused():
    b = DATA.train.take(DATA.train.ids[:32])
    with pytest.raises(ValueError, match="batch.y = 10: must lie in 0..9"):
        Uniform().bind(task()).loss(torch.randn(32, 11), b._replace(y=torch.full((32,), 10)))


N = len(DATA.train)


def task(model=None, **kw):
    torch.manual_seed(0)
    return Task(model or small_cnn(width=8), DATA.train, DATA.dev, **dict(steps=64, epochs=2, dev_batch_size=32) | kw)


def train(sel, epochs=2):
    "Parameters after a short training, bit for bit."
    t = task()
    sel = sel.bind(t)
    for _ in bare_loop(sel, epochs): pass
    return torch.cat([p.flatten() for p in t.model.parameters()])


@pytest.mark.parametrize("sel", [
    lambda: DataParameters(inst=Sigma(lr=0.0)), lambda: DataParameters(cls=Sigma(lr=0.0)),
    lambda: Prune(DATA.train.ids), lambda: Prune(), lambda: RS2(1.0), lambda: InfoBatch(r=0.0),
    lambda: DynaMS(budget=1.0, warmup=1)],
    ids=["σ instance", "σ class", "prune 0", "prune 0 at random", "rs2 1", "infobatch 0", "dynams 1"])
def test_setting_that_means_uniform_equals_uniform(sel):
    assert torch.equal(train(sel()), train(Uniform()))


def test_all_weights_equal_is_uniform_but_for_rounding():
    "SPCL with everything in from the start: the same weights as uniform, summed in another way."
    assert torch.allclose(train(SPCL(start=1.0)), train(Uniform()), atol=1e-3)


# --- pruning

@pytest.mark.parametrize("k, r, m", [(0, 5, 0), (3, 4, 0), (0, 0, 0), (6, 0, 2), (-1, 4, 0)])
def test_removed_ids_by_the_book(k, r, m):
    order = torch.randperm(20)
    gone = removed_ids(order, r, k, m, torch.Generator().manual_seed(0)).tolist()
    if m: assert len(set(gone)) == m and set(gone) <= set(order[:k].tolist())
    elif k < 0: assert len(set(gone)) == r
    else: assert gone == [int(order[i]) for i in range(k, k + r)]


def test_random_removal_differs_by_seed_and_repeats():
    kept = [Prune(remove_n=100).bind(task(seed=s)).epoch(0) for s in (0, 0, 1)]
    assert torch.equal(kept[0], kept[1]) and not torch.equal(kept[0], kept[2]) and len(kept[0]) == N - 100


def test_prune_keeps_the_rest_in_place():
    order = sorted_ids(torch.randn(N), ids=DATA.train.ids)
    kept = Prune(order, 200, keep_lowest_n=50).bind(task()).epoch(0)
    assert sorted(kept.tolist() + order[50:250].tolist()) == DATA.train.ids.tolist()


# --- RS2

def test_rs2_visits_all_equally_often_and_none_twice_in_an_epoch():
    sel = RS2(0.3).bind(Task(small_cnn(width=8), n=50))
    visits = torch.zeros(50)
    for e in range(100):
        ids = sel.epoch(e)
        assert len(set(ids.tolist())) == len(ids) == 15
        visits += ids.bincount(minlength=50)
    assert visits.max() - visits.min() <= 1 and visits.sum() == 1500


def test_rs2_draws_other_subsets_for_another_seed():
    a, b = (RS2(0.3).bind(task(seed=s)).epoch(0) for s in (0, 1))
    assert not torch.equal(a, b)


# --- InfoBatch

def test_infobatch_gradient_is_unbiased():
    "Over many draws the reweighted sum of gradients meets the full sum, within five standard errors."
    g = torch.Generator().manual_seed(0)
    losses, grads = torch.rand(60, generator=g) ** 3, torch.randn(60, 4, generator=g, dtype=torch.float64)
    draws = []
    for _ in range(4000):
        ids, w = infobatch_sample(losses, 0.5, g)
        draws.append(w[ids].double() @ grads[ids])
    draws = torch.stack(draws)
    error = (draws.mean(0) - grads.sum(0)).abs() / (draws.std(0) / math.sqrt(len(draws)))
    assert error.max() < 5 and draws.std(0).min() > 0.1


def test_infobatch_by_hand():
    losses = torch.tensor([1.0, 2.0, 3.0, 10.0, math.inf])          # mean of what was seen: 4
    for seed in range(20):
        ids, w = infobatch_sample(losses, 1 / 3, torch.Generator().manual_seed(seed))
        assert len(ids) == 4 and {3, 4} <= set(ids.tolist()) and w[3] == w[4] == 1
        assert all(w[i] == 1.5 for i in ids.tolist() if i < 3)
    ids, w = infobatch_sample(torch.full((5,), math.inf), 0.5)
    assert ids.tolist() == [0, 1, 2, 3, 4] and w.tolist() == [1] * 5


@pytest.mark.parametrize("delta, epochs, whole_from",
                         [(0.875, 8, 7), (0.5, 4, 2), (0.9, 10, 9), (1.0, 5, None), (0.29, 100, 29)])
def test_infobatch_is_whole_again_at_the_end(delta, epochs, whole_from):
    "Also where delta times the epochs is not a whole number in floating point."
    sel = InfoBatch(0.5, delta).bind(Task(small_cnn(width=8), n=100, epochs=epochs))
    sel.losses.copy_(torch.arange(100.0))
    sizes = [100 if (ids := sel.epoch(e)) is None else len(ids) for e in range(epochs)]
    assert sizes == [75 if whole_from is None or e < whole_from else 100 for e in range(epochs)]
    assert (sel.scale == 1).all() or whole_from is None


# --- DynaMS

def nearest_boundary(h, weight, bias, y, directions=20_000):
    "Walk from h in many directions until the logit of y meets that of another class."
    angle = torch.linspace(0, 2 * math.pi, directions, dtype=h.dtype)
    u = torch.stack([angle.cos(), angle.sin()])                     # [2, D]
    best = math.inf
    for k in range(len(weight)):
        if k == y: continue
        gap = (weight[y] - weight[k]) @ h + bias[y] - bias[k]
        speed = (weight[y] - weight[k]) @ u                         # of the gap along each direction
        steps = -gap / speed
        best = min(best, steps[steps >= 0].min().item())
    return best


def test_margin_against_a_search_for_the_nearest_boundary():
    g = torch.Generator().manual_seed(0)
    weight, bias = torch.randn(5, 2, generator=g, dtype=torch.float64), torch.randn(5, generator=g, dtype=torch.float64)
    h, y = 3 * torch.randn(40, 2, generator=g, dtype=torch.float64), torch.randint(5, (40,), generator=g)
    found = torch.tensor([nearest_boundary(h[i], weight, bias, int(y[i])) for i in range(40)], dtype=torch.float64)
    assert torch.allclose(margin_to_boundary(h, weight, bias, y), found, rtol=1e-6, atol=0)


def test_margin_with_equal_rows_and_without_bias():
    weight = torch.tensor([[1.0, 0.0], [1.0, 0.0], [0.0, 1.0]])     # no boundary between 0 and 1
    m = margin_to_boundary(torch.tensor([[2.0, 0.0]]), weight, None, torch.tensor([0]))
    assert torch.isfinite(m).all() and m.item() == 0                # their logits are equal everywhere


@pytest.mark.parametrize("shape", ["power", "linear"])
@pytest.mark.parametrize("budget, epochs, warmup, every",
                         [(0.6, 30, 5, 5), (0.6, 200, 20, 10), (0.75, 17, 3, 4), (0.9, 10, 1, 1)])
def test_schedule_meets_its_budget_within_one_example(shape, budget, epochs, warmup, every):
    n = 9973
    sel = DynaMS(budget, warmup, every, shape).bind(Task(tiny_resnet(), DATA.train, n=n, n_classes=10, epochs=epochs))
    sel.score = lambda model: torch.rand(n)
    sizes = [n if (ids := sel.epoch(e)) is None else len(ids) for e in range(epochs)]
    assert abs(sum(sizes) / epochs - budget * n) <= 1
    assert all(a >= b for a, b in zip(sizes, sizes[1:])) and sizes[warmup - 1] == n > sizes[warmup]


@pytest.mark.parametrize("shape", ["power", "linear"])
def test_impossible_schedule_says_what_is_possible(shape):
    with pytest.raises(ValueError, match="budget = 0.2.*can spend more than") as e:
        margin_schedule(0.2, 30, 5, 5, shape)
    least = float(str(e.value).split("more than ")[1].split(" ")[0])
    assert min(margin_schedule(least + 0.01, 30, 5, 5, shape)) > 0
    with pytest.raises(ValueError): margin_schedule(least - 0.01, 30, 5, 5, shape)


def test_dynams_keeps_the_smallest_margins():
    t = task(epochs=4)
    sel = DynaMS(0.6, warmup=1, every=1).bind(t)
    assert sel.epoch(0) is None
    ids = sel.epoch(1)
    h, logits = features_and_logits(t.model.eval(), t.prepare(DATA.train.x))
    m = margin_to_boundary(h, t.model.head.weight, t.model.head.bias, DATA.train.y)
    assert sel.margins[ids].max() <= sel.margins[[i
                                                  for i in DATA.train.ids.tolist() if i not in set(ids.tolist())]].min()
    assert torch.allclose(sel.margins[DATA.train.ids], m, atol=1e-5)
    assert sel.margins[:250].isnan().all() and t.passes == N


def test_slim_shares_weights_and_has_statistics_of_its_own():
    wide = tiny_resnet(in_channels=1)
    before = copy.deepcopy(wide.state_dict())
    slim = Slim(wide, 0.5)
    slim(torch.randn(16, 1, 8, 8)).square().sum().backward()
    # statistics of the wide network untouched
    assert all(torch.equal(v, before[k]) for k, v in wide.state_dict().items())
    assert any((v != 0).any() for k, v in slim.state_dict().items() if "running_mean" in k)
    assert not list(p for p in slim.parameters() if p.requires_grad)
    moved = {k: p.grad for k, p in wide.named_parameters() if p.grad is not None}
    assert set(moved) == {k for k, _ in wide.named_parameters()}
    with torch.no_grad(): wide.head.weight.zero_()
    assert torch.equal(slim.eval()(torch.randn(2, 1, 8, 8)), wide.head.bias.expand(2, 10))


@pytest.mark.parametrize("name", ["tiny_cnn", "resnet18", "wrn28-2"])
def test_slim_of_every_kind_of_network(name):
    wide = make_model(name, 10, 3)
    slim = Slim(wide, 0.5).eval()
    assert slim(torch.randn(2, 3, 32, 32)).shape == (2, 10)
    assert sum(v.numel() for v in slim.weights().values()) < 0.3 * sum(p.numel() for p in wide.parameters())
    # fresh statistics are those of a fresh network
    whole = Slim(wide, 1.0).eval()
    x = torch.randn(2, 3, 32, 32)
    assert torch.allclose(whole(x), wide.eval()(x), atol=1e-5)


def test_proxy_learns_to_rank_like_the_network():
    t = task(epochs=6)
    sel = DynaMS(0.7, warmup=2, every=2, proxy=0.5).bind(t)
    for _ in bare_loop(sel, epochs=6): pass
    agreement = sel.agreement()
    assert agreement["spearman"] > 0.5 and agreement["same"] > 0.6


# --- bad input

@pytest.mark.parametrize("make, text", [
    (lambda: RS2(0.0), r"r = 0.0: must lie in \(0, 1\]"),
    (lambda: RS2(1.5), "r = 1.5"),
    (lambda: InfoBatch(1.0), r"r = 1.0: must lie in \[0, 1\)"),
    (lambda: InfoBatch(delta=0.0), "delta = 0.0"),
    (lambda: Prune(torch.arange(N - 1)).bind(task()),
     f"order: must have each of the {N} ids of the training set once; has {N - 1} ids"),
    (lambda: Prune(torch.arange(N)).bind(task()), "each of the"),
    (lambda: Prune(torch.arange(N).float()).bind(task()), "1-D int64"),
    (lambda: Prune(DATA.train.ids, remove_n=N).bind(task()), f"remove_n = {N}"),
    (lambda: Prune(DATA.train.ids, remove_n=5, keep_lowest_n=N).bind(task()), f"keep_lowest_n = {N}"),
    (lambda: Prune(DATA.train.ids, keep_lowest_n=5, remove_subsample=6).bind(task()), "remove_subsample = 6"),
    (lambda: Prune(DATA.train.ids.tolist(), remove_n=3.5).bind(task()), "remove_n = 3.5: must be of type int"),
    (lambda: Prune(remove_n=3, keep_lowest_n=5), "keep_lowest_n = 5 and remove_subsample = 0 must be 0"),
    (lambda: sorted_ids(torch.tensor([0.0, math.nan])), "NaN for 1 of 2"),
    (lambda: DynaMS(0.0), None),
    (lambda: DynaMS(proxy=2.0), "proxy = 2.0"),
    (lambda: DynaMS(0.1).bind(task(epochs=30)), "budget = 0.1"),
    (lambda: DynaMS(0.6, warmup=30).bind(task(epochs=30)), "warmup = 30"),
    (lambda: DynaMS(0.6, warmup=2.5).bind(task(epochs=30)), "warmup = 2.5: must be of type int"),
    (lambda: DynaMS(0.6, warmup=1).bind(task(epochs=30)).agreement(), "needs a proxy"),
    (lambda: Training(Recipe(model="tiny_cnn", epochs=10, batch_size=64, warmup_steps=5), DATA, RS2(0.06)),
     "batch_size = 64: must not exceed the 63 examples that RS2 visits"),
    (lambda: Uniform().bind(Task(small_cnn(width=8), load_data(DataRecipe(keep_rates="0,0,1,0,0,0,0,0,0,0")).train)),
     "train.y = 2 for all"),
    (lambda: DynaMS(0.6).bind(Task(small_cnn(width=8), n=10)), "needs epochs, score_all"),
    (lambda: DynaMS(0.6, shape="cubic").bind(task(epochs=30)), "shape = 'cubic'"),
    (lambda: DynaMS(0.9).bind(task(torch.nn.Conv2d(1, 10, 3), epochs=30)), "no linear layer"),
    (lambda: InfoBatch().bind(Task(small_cnn(width=8), n=10)), "InfoBatch needs epochs"),
    (lambda: Uniform().bind(Task(small_cnn(width=8), n=10, n_classes=1)), "n_classes = 1"),
])
def test_bad_input(make, text):
    with pytest.raises(ValueError, match=text): make().bind(task(epochs=30))


def test_a_method_of_ones_own_in_ten_lines():
    class MostConfidentHalf(Selector):
        def weights(self, losses, batch):
            k = len(losses) // 2
            return torch.zeros_like(losses).scatter(0, (-losses).topk(k).indices, 1 / k)

    check_selector(MostConfidentHalf)
