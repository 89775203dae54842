"""Records and scores of single examples, each against a plain-Python count, a brute-force gradient or a second run."""
import math
import os
import pickle
import signal
import subprocess
import time
from collections import OrderedDict, defaultdict

import numpy as np
import pandas as pd
import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.func import grad, vmap
from torch.utils._python_dispatch import TorchDispatchMode

from datasel_wb import scores as S
from datasel_wb.core import Batch, per_example_loss
from datasel_wb.dynamics import Dynamics, History
from datasel_wb.scores import merge_scores, noise_auroc, sorted_ids, read_stats_dict
from datasel_wb.selectors import Prune, Task
from forked import Forked
from waits import slowness

N, T, C = 1000, 15, 3


def generator(seed=0):
    return torch.Generator().manual_seed(seed)


@pytest.fixture(scope="module")
def ragged():
    "1,000 histories of 0 to 15 presentations; losses are multiples of 1/64, so that differences are exact in float32."
    g = generator()
    shown = torch.randint(0, T + 1, (N,), generator=g)
    shown[:3] = torch.tensor([0, 1, T])
    chance = torch.rand(N, 1, generator=g) * 1.4 - 0.2                  # some never learned, some never wrong
    correct = (torch.rand(N, T, generator=g) < chance).float()
    losses = torch.randint(0, 640, (N, T), generator=g) / 64
    late = torch.arange(T) >= shown[:, None]
    return shown, correct.masked_fill(late, torch.nan), losses.masked_fill(late, torch.nan)


COUNTS = ("forgetting_events", "first_learned", "presentations_to_learn", "max_loss_increase", "unforgettable")


def count(a: list, losses: list) -> dict:
    "The scores of one example by the book, one presentation at a time; none where there is none."
    if not a: return dict.fromkeys(COUNTS, math.nan) | {"unforgettable": False}
    events, first, last_wrong, rise = 0, -1, 0, -math.inf
    for t, right in enumerate(a):
        if right and first < 0: first = t
        if not right: last_wrong = t + 1
        if t and a[t - 1] and not right: events += 1
        if t: rise = max(rise, losses[t] - losses[t - 1])
    return {"forgetting_events": events if first >= 0 else len(a), "first_learned": first if first >= 0 else math.inf,
            "presentations_to_learn": last_wrong, "max_loss_increase": rise,
            "unforgettable": first >= 0 and events == 0}


def plain(ragged):
    shown, correct, losses = (t.tolist() for t in ragged)
    return [count(a[:n], ls[:n]) for n, a, ls in zip(shown, correct, losses)]


def feed(dyn, y, shown, correct, losses, g, batch=64):
    "Present the examples in random order, batch after batch, until each has had its number of presentations."
    for _ in range(10 * T):
        open_ = (dyn.column("presentations") < shown).nonzero().flatten()
        if not len(open_): return
        idx = open_[torch.randperm(len(open_), generator=g)[:max(batch, len(open_) // 2)]]
        for ids in idx.split(batch):
            t = dyn.column("presentations")[ids].long()
            said = (y[ids] + (correct[ids, t] == 0)) % C                # the label, or another class
            logits = torch.rand(len(ids), C, generator=g) + 2 * F.one_hot(said, C)
            dyn.record(ids, logits, losses[ids, t], y[ids], None)


@pytest.fixture(scope="module")
def fed(ragged):
    g = generator(1)
    y = torch.randint(C, (N,), generator=g)
    dyn = Dynamics(y, ("a", "b", "c"), history=T)
    feed(dyn, y, *ragged, g)
    assert torch.equal(dyn.column("presentations").long(), ragged[0])
    return dyn


@pytest.mark.parametrize("name", COUNTS)
def test_functions_of_histories_equal_a_plain_count(ragged, name):
    shown, correct, losses = ragged
    expected = [row[name] for row in plain(ragged)]
    got = getattr(S, name)(losses if name == "max_loss_increase" else correct)
    assert np.array_equal(got.numpy(), expected, equal_nan=True) and (shown == 0).sum() > 10
    if name != "max_loss_increase":                                    # truth values and integers, nothing missing
        full = shown == T
        for kind in (torch.bool, torch.int64, torch.float64):
            assert getattr(S, name)(correct[full].to(kind)).tolist() == [e for e, f in zip(expected, full) if f]


def test_functions_of_empty_histories():
    none = torch.zeros(2, 0)
    for name, expected in count([], []).items():
        assert np.array_equal(getattr(S, name)(none).numpy(), [expected] * 2, equal_nan=True)


def test_what_was_never_presented_is_kept_by_pruning(ragged):
    "Whatever is removed as easiest: the ids without a history go last, in every order from easy to hard."
    shown, correct, losses = ragged
    unseen = (shown == 0).nonzero().flatten().tolist()
    for score in (S.forgetting_events(correct), S.first_learned(correct), S.presentations_to_learn(correct),
                  S.max_loss_increase(losses)):
        assert score.isnan().nonzero().flatten().tolist() == unseen
        values = score.tolist()
        by_book = sorted((i for i in range(N) if i not in unseen), key=lambda i: values[i]) + unseen
        order = sorted_ids(score, unscored="last")
        assert order.tolist() == by_book
        backwards = sorted(by_book[:-len(unseen)], key=lambda i: (-values[i], i)) + unseen
        assert sorted_ids(score, descending=True, unscored="last").tolist() == backwards
        sel = Prune(order, remove_n=N - len(unseen)).bind(Task(nn.Linear(1, 1), n=N))
        assert sel.indices().tolist() == unseen
    # of those shown, what was never learned is the last to go, too
    never = ((shown > 0) & ~(correct == 1).any(1)).nonzero().flatten().tolist()
    order = sorted_ids(S.first_learned(correct), unscored="last").tolist()
    assert len(never) > 10 and order[-len(never + unseen):] == never + unseen


@pytest.mark.parametrize("name", ["forgetting", "first_learned", "presentations_to_learn", "max_loss_increase",
                                  "unforgettable"])
def test_online_scores_equal_a_plain_count(fed, ragged, name):
    by_book = [row["forgetting_events" if name == "forgetting" else name] for row in plain(ragged)]
    seen = ragged[0] > 0
    score = fed.scores()[name]
    assert score[seen].tolist() == [v for v, s in zip(by_book, seen) if s]
    assert (score.dtype == torch.bool and not score[~seen].any() if name == "unforgettable"
            else score[~seen].isnan().all())
    assert np.array_equal(fed.table()[name].to_numpy(), score.numpy(), equal_nan=True)


def test_online_means_equal_those_of_the_batches():
    g, y = generator(2), torch.tensor([0, 1, 2, 1])
    dyn, seen = Dynamics(y, ("a", "b", "c")), defaultdict(list)
    for _ in range(40):
        idx = torch.randperm(3, generator=g)[:2]
        logits = 3 * torch.randn(2, C, generator=g)
        losses, weights = per_example_loss(logits, y[idx]), torch.rand(2, generator=g)
        dyn.record(idx, logits.bfloat16().float(), losses, y[idx], weights)
        p = logits.bfloat16().double().softmax(1).tolist()
        for b, i in enumerate(idx.tolist()):
            k, z = y[i].item(), logits.bfloat16()[b].tolist()
            others = [v for j, v in enumerate(z) if j != k]
            error = math.sqrt(sum((q - (j == k)) ** 2 for j, q in enumerate(p[b])))
            seen[i].append((p[b][k], error, z[k] - max(others), z[k] > max(others), losses[b].item(),
                            2 * weights[b].item()))
    table = dyn.table()
    for i, rows in seen.items():
        c, e, m, a, ls, w = np.array(rows, dtype=float).T
        got = table.loc[i]
        assert got[["confidence", "el2n", "margin", "correct_mean", "loss_mean",
                    "weight_mean"]].tolist() == pytest.approx(
            [c.mean(), e.mean(), m.mean(), a.mean(), ls.mean(), w.mean()], rel=1e-5)
        assert got.confidence_spread == pytest.approx(c.std(), abs=1e-3)
        assert (got[["correct_last", "loss_last", "weight_last"]].tolist()
                == pytest.approx([a[-1], ls[-1], w[-1]], rel=1e-6))
        assert got.presentations == len(rows)
    assert table.loc[3].drop(["id", "presentations", "unforgettable"]).isna().all() and table.presentations[3] == 0


def test_groups_are_those_of_the_batches():
    g, y, noisy = generator(3), torch.arange(60) % C, torch.arange(60) % 7 == 0
    dyn = Dynamics(y, ("a", "b", "c"), noisy)
    for _ in range(3):                                                 # three readings: each starts anew
        shares = defaultdict(list)
        for _ in range(5):
            idx, weights = torch.randperm(60, generator=g)[:16], torch.rand(16, generator=g)
            dyn.record(idx, torch.randn(16, C, generator=g), torch.rand(16), y[idx], weights)
            for i, w in zip(idx.tolist(), weights.tolist()):
                for group in ("class/" + "abc"[y[i]], "noisy" if noisy[i] else "clean"):
                    shares[f"weight/{group}"].append(16 * w)
        assert dyn.read_groups() == pytest.approx({k: np.mean(v) for k, v in shares.items()}, rel=1e-5)
    assert dyn.read_groups() == {}


def test_half_precision_logits_and_a_graph_do_no_harm():
    y = torch.tensor([0, 1])
    dyn, logits = Dynamics(y, ("a", "b", "c"), history=2), torch.randn(2, C, dtype=torch.bfloat16, requires_grad=True)
    losses = per_example_loss(logits, y)
    dyn.record(torch.arange(2), logits, losses, y, None)
    losses.sum().backward()                                            # the recorder keeps nothing of the graph
    assert logits.grad is not None and not dyn.rows.requires_grad and dyn.rows.dtype == torch.float32


def test_nothing_comes_to_the_host_and_shapes_are_static():
    class Watch(TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            assert not any(k in str(func) for k in ("_local_scalar_dense", "nonzero", "masked_select", "unique")), func
            return func(*args, **(kwargs or {}))

    y = torch.arange(8) % C
    dyn = Dynamics(y, ("a", "b", "c"), y == 0, history=2)
    with Watch(): dyn.record(torch.tensor([5, 2]), torch.randn(2, C), torch.rand(2), y[[5, 2]], torch.rand(2))


def test_a_hundred_thousand_examples_are_recorded_quickly():
    n, g = 100_000, generator(4)
    y = torch.randint(10, (n,), generator=g)
    dyn, logits, losses = Dynamics(y, tuple(range(10)), history=3), torch.randn(128, 10, generator=g), torch.rand(128)
    begin = time.perf_counter()
    for ids in torch.randperm(n, generator=g).split(128):
        dyn.record(ids, logits[:len(ids)], losses[:len(ids)], y[ids], None)
    # 0.3 s on a free core
    assert (dyn.column("presentations") == 1).all() and time.perf_counter() - begin < 10 * slowness()
    assert len(dyn.table()) == n


# ---- the full history

def test_history_is_what_was_recorded(fed, ragged):
    assert torch.equal(fed.history("correct").nan_to_num(-1), ragged[1].nan_to_num(-1))
    assert torch.equal(fed.history("loss").nan_to_num(-1), ragged[2].nan_to_num(-1))
    assert torch.equal(fed.history("margin") > 0, ragged[1] == 1)


def test_history_keeps_the_first_presentations_only(ragged):
    g, shown, correct, losses = generator(5), *(t[:50] for t in ragged)
    y = torch.randint(C, (50,), generator=g)
    dyn = Dynamics(y, ("a", "b", "c"), history=4)
    feed(dyn, y, shown, correct, losses, g, batch=16)
    assert dyn.history("loss").shape == (50, 4)
    assert torch.equal(dyn.history("loss").nan_to_num(-1), losses[:, :4].nan_to_num(-1))


def test_mapped_history_equals_that_in_memory_and_survives_a_kill(tmp_path, ragged):
    "A process is killed after its checkpoint, later entries are already in the files; the resumed run overwrites them."
    shown, correct, losses = (t[:80] for t in ragged)
    y = torch.arange(80) % C
    def make(folder=None): return Dynamics(y, ("a", "b", "c"), history=T, folder=folder)
    memory = make()
    feed(memory, y, shown, correct, losses, generator(6), batch=16)
    script = tmp_path / "killed.py"
    script.write_text("""
import os, signal, sys, torch
from datasel_wb.dynamics import Dynamics
y, folder = torch.arange(80) % 3, sys.argv[1]
dyn = Dynamics(y, ("a", "b", "c"), history=15, folder=folder)
def show(ids, loss): dyn.record(ids, torch.zeros(len(ids), 3), torch.full((len(ids),), loss), y[ids], None)
show(torch.arange(40), 1.0)
torch.save(dyn.state_dict(), f"{folder}/state.pt")
show(torch.arange(80), 77.0)                          # after the checkpoint: to be hidden
os.kill(os.getpid(), signal.SIGKILL)
""")
    assert Forked(script, tmp_path).wait() == -signal.SIGKILL
    mapped, state = make(tmp_path), torch.load(tmp_path / "state.pt")
    assert list(state) == ["rows"]                                     # the files are not in the checkpoint
    mapped.load_state_dict(state)
    expected = torch.full((80, T), torch.nan)
    expected[:40, 0] = 1.0
    assert torch.equal(mapped.history("loss").nan_to_num(-1), expected.nan_to_num(-1))
    fresh = make(tmp_path)                                             # a new run over old files sees nothing of them
    assert fresh.history("loss").isnan().all()
    feed(fresh, y, shown, correct, losses, generator(6), batch=16)
    for name in History.NAMES:
        assert torch.equal(fresh.history(name).nan_to_num(-1), memory.history(name).nan_to_num(-1))
    again = make(tmp_path)
    again.load_state_dict(fresh.state_dict())
    for name in History.NAMES:
        assert torch.equal(again.history(name).nan_to_num(-1), memory.history(name).nan_to_num(-1))


def test_history_errors(tmp_path):
    y = torch.zeros(4, dtype=torch.int64)
    with pytest.raises(ValueError, match="history = 0"): Dynamics(y, ("a",)).history("loss")
    with pytest.raises(ValueError, match="'entropy': must be one of loss, correct, margin"):
        Dynamics(y, ("a",), history=1).history("entropy")
    with pytest.raises(ValueError, match="history = -1"): Dynamics(y, ("a",), history=-1)
    Dynamics(y, ("a",), history=2, folder=tmp_path / "new")
    with pytest.raises(ValueError, match="history_loss.f32 = 48 bytes: must have 64"):
        Dynamics(y, ("a",), history=3, folder=tmp_path / "new")


@pytest.mark.parametrize("history", [0, T])
def test_a_resumed_recorder_is_the_uninterrupted_one(ragged, history):
    shown, correct, losses = (t[:60] for t in ragged)
    y = torch.arange(60) % C
    def make(): return Dynamics(y, ("a", "b", "c"), y == 1, history=history)
    whole, g = make(), generator(7)
    feed(whole, y, shown // 2, correct, losses, g, batch=16)
    resumed = make()
    resumed.load_state_dict(pickle.loads(pickle.dumps(whole.state_dict())))
    assert set(resumed.state_dict()) == {"rows"} | ({f"kept.{k}" for k in History.NAMES} if history else set())
    draws = g.get_state()
    for dyn in (whole, resumed):
        g.set_state(draws)
        feed(dyn, y, shown, correct, losses, g, batch=16)
    pd.testing.assert_frame_equal(whole.table(), resumed.table())
    assert whole.read_groups() == resumed.read_groups()
    if history: assert torch.equal(whole.history("margin").nan_to_num(-9), resumed.history("margin").nan_to_num(-9))


# ---- scores of one pass

@pytest.mark.parametrize("bias", [True, False])
def test_last_layer_norm_is_that_of_the_gradient(bias):
    g = generator(8)
    head = nn.Linear(7, 5, bias=bias).double()
    h, y = torch.randn(32, 7, generator=g, dtype=torch.float64), torch.randint(5, (32,), generator=g)
    theta = {k: p.detach() for k, p in head.named_parameters()}
    def loss(theta, h, y): return F.cross_entropy(torch.func.functional_call(head, theta, (h[None],)), y[None])
    grads = vmap(grad(loss), (None, 0, 0))(theta, h, y)
    exact = torch.cat([v.flatten(1) for v in grads.values()], 1).norm(dim=1)
    got = S.last_layer_grad_norm(head(h).detach(), h, y, bias=bias)
    assert ((got - exact).abs() / exact).max() <= 1e-12


def test_el2n_is_the_norm_of_the_gradient_by_the_logits():
    g = generator(9)
    z, y = 4 * torch.randn(64, 6, generator=g, dtype=torch.float64), torch.randint(6, (64,), generator=g)
    exact = vmap(grad(lambda z, y: F.cross_entropy(z[None], y[None])))(z, y).norm(dim=1)
    assert ((S.el2n(z, y) - exact).abs() / exact).max() <= 1e-12
    assert S.el2n(z.bfloat16(), y).dtype == torch.float32


@pytest.mark.parametrize("frozen", [False, True])
def test_grand_equals_one_backward_pass_per_example(frozen):
    torch.manual_seed(0)
    net = nn.Sequential(nn.Conv2d(2, 4, 3), nn.BatchNorm2d(4), nn.ReLU(), nn.Flatten(), nn.Dropout(0.3),
                        nn.Linear(4 * 16, 5)).double()
    x, y = torch.randn(11, 2, 6, 6, dtype=torch.float64), torch.randint(5, (11,))
    for _ in range(3): net(x)
    net[0].requires_grad_(not frozen)
    before = {k: t.clone() for k, t in net.state_dict().items()}
    got = {chunk: S.grand(net, Batch(x, y, torch.arange(11)), chunk=chunk) for chunk in (1, 4, 64)}
    assert net.training and all(p.grad is None for p in net.parameters())
    assert all(torch.equal(before[k], t) for k, t in net.state_dict().items())
    net.eval()
    params = [p for p in net.parameters() if p.requires_grad]
    for i in range(11):
        grads = torch.autograd.grad(F.cross_entropy(net(x[i:i + 1]), y[i:i + 1]), params)
        exact = sum(g.square().sum().item() for g in grads) ** 0.5
        for chunk, value in got.items(): assert value[i].item() == pytest.approx(exact, rel=1e-12), chunk


# ---- seeds, ranking, noise

def test_merge_scores():
    a = pd.DataFrame({"id": [4, 1, 7], "forgetting": [1.0, 0.0, 9.0], "margin": [0.5, 1.0, -1.0],
                      "unforgettable": [False, True, False], "class": ["x", "y", "z"]})
    b = a.iloc[[2, 0, 1]].assign(forgetting=[8.0, 3.0, 1.0], unforgettable=False).reset_index(drop=True)
    both = merge_scores([a, b])
    assert list(both) == ["id", "forgetting", "unforgettable", "margin"] and both.id.tolist() == [4, 1, 7]
    assert both.forgetting.tolist() == [4, 1, 17] and both.margin.tolist() == [0.5, 1, -1]
    assert both.unforgettable.tolist() == [0, 0.5, 0]
    assert list(merge_scores([a, b], scores=("margin",))) == ["id", "margin"]
    for other in (a[:2], a.assign(id=[4, 1, 8]), a.assign(id=[4, 4, 1])):
        with pytest.raises(ValueError, match=r"frames\[1\].id"): merge_scores([a, other])
    with pytest.raises(ValueError, match="no column 'margin'"): merge_scores([a, a.drop(columns="margin")])
    with pytest.raises(ValueError, match="at least one"): merge_scores([])
    with pytest.raises(ValueError, match="has no score"): merge_scores([a[["id", "class"]]])


def test_merged_tables_of_runs(fed):
    both = merge_scores([fed.table(), fed.table()])
    assert np.array_equal(both.forgetting, 2 * fed.scores()["forgetting"].numpy(), equal_nan=True) and len(both) == N
    assert set(both) == {"id", "presentations", *fed.scores()}
    assert np.array_equal(both.presentations, fed.table().presentations)


def test_rank_is_stable_and_refuses_nan():
    score = torch.randint(0, 5, (2000,), generator=generator(10)).float()
    by_book = sorted(range(2000), key=lambda i: score[i].item())
    assert sorted_ids(score).tolist() == by_book
    assert sorted_ids(score, descending=True).tolist() == sorted(range(2000), key=lambda i: -score[i].item())
    assert sorted_ids(torch.tensor([0.0, -math.inf, math.inf])).tolist() == [1, 0, 2]
    assert sorted_ids(torch.tensor([True, False, True])).tolist() == [1, 0, 2]
    score[[7, 30]] = torch.nan
    with pytest.raises(ValueError, match="NaN for 2 of 2000 examples, the first of them id 7"): sorted_ids(score)
    with pytest.raises(ValueError, match="unscored = 'first': must be one of refused, last"):
        sorted_ids(score, unscored="first")


@pytest.mark.parametrize("n", [2, 5, 60, 301])
def test_otsu_leaves_the_least_variance_of_all_thresholds(n):
    g = generator(n)
    values = torch.cat([torch.randn(n, generator=g), 4 + torch.randn(n // 2, generator=g)]).round(decimals=1)
    if n == 2: values = torch.tensor([3.0, 1.0])
    def within(t): return sum(float(((p - p.mean()) ** 2).sum()) for p in (values[values <= t], values[values > t]))
    best = min(values.unique()[:-1].tolist(), key=within)
    for more in ([], [torch.nan, torch.inf]):                          # what has no place on the line does not count
        at = S.otsu(torch.cat([values, torch.tensor(more)]))
        assert torch.equal(values > at, values > best)
    for bad in (torch.ones(4), torch.full((3,), torch.nan), torch.zeros(0)):
        with pytest.raises(ValueError, match="must have two that differ"): S.otsu(bad)


def test_noise_auroc_leaves_out_what_has_no_score():
    g = generator(11)
    score, noisy = torch.randint(0, 9, (300,), generator=g).float(), torch.rand(300, generator=g) < 0.3
    score[:20] = torch.nan
    wins = [(c > n) + 0.5 * (c == n) for n in score[20:][noisy[20:]].tolist() for c in score[20:][~noisy[20:]].tolist()]
    assert noise_auroc(score, noisy) == pytest.approx(np.mean(wins), abs=1e-12)
    assert noise_auroc(torch.tensor([-math.inf, 0.0, math.inf]), torch.tensor([True, False, False])) == 1.0
    assert math.isnan(noise_auroc(torch.full((4,), torch.nan), torch.tensor([True, False, True, False])))


# ---- statistics of published runs

PROTOCOLS = range(2, pickle.HIGHEST_PROTOCOL + 1)
KINDS = {
    "python": lambda v: v,
    "numpy scalars": lambda v: [np.float32(x) if isinstance(x, float) else np.int64(x) for x in v],
    "numpy bools": lambda v: [np.bool_(x) if isinstance(x, int) else np.float64(x) for x in v],
    "0-d arrays": lambda v: [np.array(x) for x in v],
    "arrays of one": lambda v: [np.array([x]) for x in v],
    "arrays": lambda v: np.array(v),
    "every second": lambda v: np.repeat(np.array(v), 2)[::2],
    "big endian": lambda v: np.array(v).astype(">f8"),
}


def write(path, thing, protocol=3):
    path.write_bytes(pickle.dumps(thing, protocol=protocol))
    return path


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("protocol", PROTOCOLS)
def test_a_published_file_is_read(tmp_path, ragged, kind, protocol):
    shown, correct, losses = (t[:30].tolist() for t in ragged)
    table = defaultdict(list) if kind == "arrays" else OrderedDict() if kind == "python" else {}
    table["train"], table["test"] = [[], [50.0]], [[], [60.0]]
    for i in reversed(range(30)):
        if n := shown[i]:
            parts = losses[i][:n], [int(a) for a in correct[i][:n]], [-x for x in losses[i][:n]]
            table[np.int64(i) if i % 2 else i] = [KINDS[kind](p) for p in parts]
    got = read_stats_dict(write(tmp_path / "x_stats_dict.pkl", table, protocol), n=31)
    longest = max(shown)
    for name, expected in {"loss": losses, "correct": correct, "margin": [[-x for x in row] for row in losses]}.items():
        expected = torch.cat([torch.tensor(expected), torch.full((1, T), torch.nan)])[:, :longest]
        assert got[name].dtype == torch.float32 and torch.equal(got[name].nan_to_num(-99), expected.nan_to_num(-99))


def test_names_of_both_numpy_generations_are_read(tmp_path):
    data = pickle.dumps({0: [np.array([0.5]), [np.int64(1)], [1.0]]}, protocol=2)
    new, old = b"numpy._core.multiarray", b"numpy.core.multiarray"
    assert (new in data) != (old in data)
    for a, b in ((new, old), (old, new)):
        (tmp_path / "f.pkl").write_bytes(data.replace(a, b))
        assert read_stats_dict(tmp_path / "f.pkl")["loss"].tolist() == [[0.5]]


class Calls:
    def __init__(self, f, *args): self.call = f, args
    def __reduce__(self): return self.call


@pytest.mark.parametrize("harm, name", [
    (lambda p: Calls(os.system, f"touch {p}"), "posix.system|nt.system"),
    (lambda p: Calls(eval, f"open({str(p)!r}, 'w')"), "builtins.eval|__builtin__.eval"),
    (lambda p: Calls(getattr, "x", "upper"), "getattr"),
    (lambda p: Calls(np.load, str(p)), "numpy"),
    (lambda p: Calls(subprocess.Popen, ["touch", str(p)]), "Popen"),
    (lambda p: torch.zeros(1), "torch"),
])
@pytest.mark.parametrize("protocol", PROTOCOLS)
def test_a_malicious_file_is_refused_before_anything_runs(tmp_path, harm, name, protocol):
    trace = tmp_path / "trace"
    for thing in ({0: harm(trace)}, {0: [[1.0], [1], [harm(trace)]]}):
        with pytest.raises(ValueError, match=name): read_stats_dict(write(tmp_path / "bad.pkl", thing, protocol))
    assert not trace.exists()


def test_dotted_and_aliased_globals_are_refused(tmp_path):
    for code in (b"cos\nsystem\n(S'true'\ntR.", b"\x80\x04\x8c\x0bcollections\x8c\x14OrderedDict.fromkeys\x93.",
                 b"\x80\x04\x8c\x05numpy\x8c\x11ndarray.__class__\x93.", b"cnumpy.core.multiarray\nfrombuffer\n."):
        (tmp_path / "f.pkl").write_bytes(code)
        with pytest.raises(ValueError, match="it was refused, nothing was run"): read_stats_dict(tmp_path / "f.pkl")


GOOD = [[0.5, 0.25], [0, 1], [-1.0, 1.0]]


@pytest.mark.parametrize("thing, n, said", [
    ({0: GOOD, 5: GOOD}, None, "id 5: must be 0 to 1 or n be given"),
    ({0: GOOD, np.int64(5): GOOD}, 5, "id 5: must be 0 to 4"),
    ({-1: GOOD}, 5, "id -1"),
    ({"validation": GOOD}, 5, "id validation"),
    ({1.5: GOOD}, 5, "id 1.5"),
    ({"train": [[], []]}, None, "no example"),
    ({0: GOOD[:2]}, None, "three lists"),
    ({0: [[0.5], [0, 1], [1.0]]}, None, "one length"),
    ({0: [[0.5], [2], [1.0]]}, None, "correctness of id 0"),
    ({0: [["a"], [1], [1.0]]}, None, "cannot be read"),
    ({0: 3}, None, "three lists"),
    ({0: [np.array([object()], dtype=object)] * 3}, None, "must be a number|_reconstruct|object"),
    ([1, 2], None, "cannot be read"),
])
def test_what_is_no_table_of_numbers_is_refused(tmp_path, thing, n, said):
    with pytest.raises(ValueError, match=said): read_stats_dict(write(tmp_path / "f.pkl", thing), n)


def test_damaged_and_missing_files(tmp_path):
    whole = pickle.dumps({0: GOOD})
    for k in (0, 1, len(whole) // 2, len(whole) - 1):
        (tmp_path / "cut.pkl").write_bytes(whole[:k])
        with pytest.raises(ValueError, match="cut.pkl cannot be read"): read_stats_dict(tmp_path / "cut.pkl")
    with pytest.raises(FileNotFoundError): read_stats_dict(tmp_path / "none.pkl")
    assert read_stats_dict(write(tmp_path / "f.pkl", {0: GOOD}),
                           n=3)["loss"].isnan().all(1).tolist() == [False, True, True]
