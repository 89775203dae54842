"""The protocol in other people's loops: any target, steps in pieces, scalers, compiled models, several processes."""
import copy
import json
import subprocess
import sys
import warnings
from pathlib import Path

import pytest
import torch
from plain_loops import BATCH, IN_PIECES, METHODS, N, TARGETS, Loop, difference, network, training_set
from torch import nn
from torch.utils.data import DataLoader, Dataset, IterableDataset, TensorDataset
from waits import patience

from datasel_wb import (
    DDS, RS2, Batch, BatchWeight, DataParameters, Dynamics, GroupScorer, InfoBatch, MentorNet, Prune, Scorer, Selector,
    Sigma, Task, Uniform)
from datasel_wb.core import align, call, per_example_loss
from datasel_wb.models import last_layer

CASES = [(m, t) for m in METHODS for t in TARGETS[m]]
PLAIN = {}


def plain(method, target):
    "The result of one plain process on whole batches."
    if (method, target) not in PLAIN: PLAIN[method, target] = Loop(method, target).run()
    return PLAIN[method, target]


@pytest.mark.parametrize("method, target", CASES)
def test_a_method_learns_on_each_target_that_it_works_on(method, target):
    loop = plain(method, target)
    x, y = training_set(target)
    x = {"words": x} if target == "tokens" else x
    with torch.no_grad():
        before, after = (loop.sel.task.loss_fn(call(m, x), y).mean() for m in (network(target), loop.bare))
    assert after < before and loop.sel.steps_done >= 3
    assert loop.records.column("presentations").sum() == len(loop.visited) >= 3 * BATCH


@pytest.mark.parametrize("method", METHODS)
def test_other_targets_are_refused_at_once(method):
    for target in {"class", "multilabel", "regression", "tokens"} - set(TARGETS[method]):
        with pytest.raises(ValueError, match=f"target = '{target}': .* works on"): Loop(method, target)


@pytest.mark.parametrize("method, target", [c for c in CASES if c[0] in IN_PIECES])
def test_pieces_of_a_step_equal_the_whole_batch(method, target):
    one, parts = plain(method, target), Loop(method, target).run(BATCH // 4, 4)
    used = len(one.visited)
    assert parts.visited == one.visited[:used] and difference(one.result(), parts.result()) < 1e-10


@pytest.mark.parametrize("method", [m for m in METHODS if m not in IN_PIECES])
def test_what_weighs_a_step_as_a_whole_refuses_pieces(method):
    loop = Loop(method, "class")
    with pytest.raises(ValueError, match="loss was called again before after_step.*no gradient accumulation"):
        loop.run(BATCH // 4, 4)
    assert loop.sel.steps_done == 0 and torch.equal(loop.bare[0].weight, network("class")[0].weight)


@pytest.mark.parametrize("method, target", [c for c in CASES if c[1] == "class" or c[0] == "σ"])
def test_a_scaled_loss_teaches_as_the_plain_one(method, target):
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**10, growth_interval=2)
    loop = Loop(method, target).run(scaler=scaler)
    assert scaler.get_scale() > 2.0**10 and difference(plain(method, target).result(), loop.result()) < 1e-10


def test_a_scaled_loss_in_pieces():
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**10, growth_interval=2)
    loop = Loop("σ, both", "class").run(BATCH // 4, 4, scaler)
    assert difference(plain("σ, both", "class").result(), loop.result()) < 1e-10


def test_a_step_that_the_scaler_skips_teaches_nothing():
    loop = Loop("σ", "class")
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**10)
    ids = torch.arange(BATCH)
    loop.step([ids], scaler)
    before = copy.deepcopy(loop.result())
    scaler.scale(loop.loss(ids)).backward()
    loop.bare[0].weight.grad[0, 0] = torch.inf
    scaler.step(loop.opt)
    scaler.update()
    loop.opt.zero_grad()
    loop.sel.after_step(scaler=scaler)
    after = loop.result()
    assert all(torch.equal(before[k], after[k]) for k in before if not k.startswith("record"))
    loop.step([ids], scaler)
    assert loop.sel.steps_done == 2


def test_a_step_told_as_skipped():
    loop = Loop("σ", "class")
    loop.loss(torch.arange(BATCH)).backward()
    loop.sel.after_step(skipped=True)
    assert loop.sel.steps_done == 0 and (loop.sel.log_inst == loop.sel.log_inst[0]).all()


@pytest.mark.parametrize("method", METHODS)
def test_a_compiled_model_is_used_as_the_model(method):
    loop = Loop(method, "class", lambda m: torch.compile(m, backend="aot_eager")).run()
    assert loop.sel.task.model is loop.bare and difference(plain(method, "class").result(), loop.result()) < 1e-10


@pytest.fixture(scope="module")
def two_processes(tmp_path_factory):
    "Results of tests/processes_job.py, run by two processes of torch.distributed."
    folder = tmp_path_factory.mktemp("processes")
    job = Path(__file__).with_name("processes_job.py")
    done = subprocess.run([sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", "2", "--master-port", "0",
                           "--rdzv-backend", "c10d", "--rdzv-endpoint", "localhost:0", job, folder],
                          capture_output=True, text=True, timeout=patience(240))
    assert done.returncode == 0, done.stderr[-4000:]
    return folder


@pytest.mark.parametrize("method", METHODS)
def test_two_processes_with_ddp_equal_one(two_processes, method):
    parts = [torch.load(two_processes / f"{method} {rank}.pt", weights_only=True) for rank in (0, 1)]
    one = plain(method, "class")
    for part in parts:
        assert difference(one.result(), part["result"]) < 1e-10
    both = zip(parts[0]["visited"], parts[1]["visited"])
    assert [i for pair in both for i in pair] == one.visited


@pytest.mark.parametrize("method", ["uniform", "prune", "rs2", "infobatch", "σ", "σ, both", "spcl"])
def test_two_processes_with_fsdp_equal_one(two_processes, method):
    for rank in (0, 1):
        part = torch.load(two_processes / f"fsdp {method} {rank}.pt", weights_only=True)
        assert difference(plain(method, "class").result(), part["result"]) < 1e-10


def test_what_fsdp_cannot_do_is_said(two_processes):
    said = json.loads((two_processes / "refused.json").read_text())
    assert said.keys() == {"batchweight", "dds"}
    assert all("split over the processes (FSDP), must be whole" in v for v in said.values())


# ---- order, resume, devices

def numbered(n=N):
    x, y = training_set("class")
    return TensorDataset(x[:n], y[:n], torch.arange(n))


@pytest.mark.parametrize("make", [lambda: InfoBatch(0.5, 1.0), lambda: RS2(0.5), lambda: Uniform()])
@pytest.mark.parametrize("options", [{}, {"num_workers": 2, "persistent_workers": True}])
def test_a_killed_loop_goes_on_bit_for_bit(make, options, stop=7):
    "Resumed in mid-epoch, with workers that fetch ahead; both parts together are the whole."
    class Run:
        def __init__(self, state=None):
            self.model = network("class")
            self.opt = torch.optim.SGD(self.model.parameters(), 0.1, momentum=0.9)
            self.sel = make()
            if state is not None:
                self.model.load_state_dict(state["model"])
                self.opt.load_state_dict(state["opt"])
                self.sel.load_state_dict(state["sel"])
            self.sel.bind(Task(self.model, n=N, steps=99, epochs=6))
            self.loader = DataLoader(numbered(), 16, sampler=self.sel.sampler(seed=2), drop_last=True, **options)
            self.seen = []
        def run(self, epochs, stop=None):
            for _ in range(self.sel.epoch_number, epochs):
                for b in self.loader:
                    self.sel.loss(self.model(b[0]), b).backward()
                    self.opt.step()
                    self.opt.zero_grad()
                    self.sel.after_step()
                    self.seen.append(b[2].tolist())
                    if len(self.seen) == stop: return self
            return self
        def state(self):
            state = {k: getattr(self, k).state_dict() for k in ("model", "opt", "sel")}
            return copy.deepcopy(state)

    whole, first = Run().run(4), Run().run(4, stop)
    second = Run(first.state()).run(4)
    assert first.seen + second.seen == whole.seen and all(type(i) is int for i in list(whole.sel.sampler()))
    assert all(torch.equal(a, b) for a, b in zip(whole.model.state_dict().values(), second.model.state_dict().values()))


def test_infobatch_with_workers_visits_what_the_bare_loop_visits():
    def visits(loader_of):
        sel = InfoBatch(0.5, 1.0).bind(Task(network("class"), n=N, epochs=4))
        seen, loader = [], loader_of(sel)
        for e in range(4):
            epoch = loader if loader is not None else batches(sel.epoch(e), e)
            seen.append(set())
            for b in epoch:
                sel.loss(sel.task.model(b[0]), b).backward()
                sel.after_step()
                seen[-1] |= set(b[2].tolist())
        return seen
    def batches(ids, e):
        from datasel_wb.core import seeded
        ids = torch.arange(N) if ids is None else torch.tensor(list(ids))
        order = ids[torch.randperm(len(ids), generator=seeded(7, f"order-{e}"))]
        return [tuple(t[part] for t in numbered().tensors) for part in order.split(16)]
    with_sampler = visits(lambda sel: DataLoader(numbered(), 16, sampler=sel.sampler(seed=7), num_workers=2,
                                                 persistent_workers=True))
    assert with_sampler == visits(lambda sel: None) and len(with_sampler[0]) == N > len(with_sampler[1])


def test_batch_samplers_and_len():
    sel = RS2(0.5).bind(Task(network("class"), n=N))
    sampler = sel.sampler()
    loader = DataLoader(numbered(), batch_sampler=torch.utils.data.BatchSampler(sampler, 40, drop_last=False))
    assert len(sampler) == N // 2 and len(loader) == 3
    assert [len(b[0]) for b in loader] == [40, 40, 16]
    sampler.set_epoch(3)
    third = list(sampler)
    sampler.set_epoch(3)
    assert list(sampler) == third != list(sampler) and sel.epoch_number == 4
    assert list(RS2(0.5).bind(Task(network("class"), n=4)).sampler(shuffle=False)) != []


def test_ids_of_an_epoch_suit_any_dataset():
    frame = pytest.importorskip("pandas").DataFrame({"a": range(10)})
    ids = Prune(torch.arange(10), 3).bind(Task(network("class"), n=10)).epoch(0)
    assert [type(i) for i in ids] == [int] * 7 and type(ids[0]) is int and ids[1:3].tolist() == [4, 5]
    rows = torch.utils.data.Subset(["a", "b"] * 5, ids)
    assert rows[0] == "b" and frame.iloc[ids[0]]["a"] == 3 and type(ids + 1) is torch.Tensor


def test_an_epoch_that_nobody_asked_for_warns_once():
    sel = RS2(0.5).bind(Task(network("class"), n=N))
    x, y, ids = (t[:8] for t in numbered().tensors)
    with pytest.warns(UserWarning, match="RS2 chooses which examples to visit, but nobody asked"):
        sel.loss(sel.task.model(x), (x, y, ids))
    for other in (sel, Uniform().bind(Task(network("class"), n=N))):
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            other.loss(other.task.model(x), (x, y, ids))


@pytest.mark.parametrize("method", ["σ, both", "infobatch", "mentornet", "dds"])
def test_tables_go_where_the_logits_are(method):
    "Without another device at hand: the state after `follow` equals the state before, and training goes on the same."
    here, gone = Loop(method, "class"), Loop(method, "class")
    for loop in (here, gone): loop.run(epochs=1)
    gone.sel.follow("cpu")
    for loop in (here, gone): loop.run(epochs=1)
    assert difference(here.result(), gone.result()) == 0


def test_tables_follow_the_model_to_xla():
    "In a process of its own: XLA must be there before the first backward pass."
    pytest.importorskip("torch_xla")
    code = """
import torch, torch_xla
from datasel_wb import DataParameters, Sigma, Task
model, device = torch.nn.Linear(6, 4), torch_xla.device()
sel = DataParameters(inst=Sigma(lr=1.0)).bind(Task(model, n=20))
model.to(device)
x, y, ids = (t.to(device) for t in (torch.rand(8, 6), torch.arange(8) % 4, torch.arange(8)))
sel.loss(model(x), (x, y, ids)).backward()
sel.after_step()
table = sel.log_inst.cpu()
assert sel.log_inst.device == device and (table[:8] != 0).all() and (table[8:] == 0).all()
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=patience(60))
    assert done.returncode == 0, done.stderr[-2000:]


def test_a_state_inside_a_larger_module_waits_for_bind():
    class Whole(nn.Module):
        def __init__(self): super().__init__(); self.sel, self.net = DataParameters(inst=Sigma()), network("class")
    whole, again = Whole(), Whole()
    whole.sel.bind(Task(whole.net, n=5))
    whole.sel.log_inst.fill_(0.25)
    again.load_state_dict(whole.state_dict())
    assert (again.sel.bind(Task(again.net, n=5)).log_inst == 0.25).all()


# ---- alignment and scorers on any network

class Odd(nn.Module):
    "Its last linear layer was made first; another is never used."
    def __init__(self):
        super().__init__()
        self.out, self.inside, self.idle = nn.Linear(8, 3), nn.Linear(6, 8), nn.Linear(8, 3)
    def forward(self, x): return (self.out(self.inside(x).tanh()), "more")


def test_the_last_layer_is_found_by_what_it_computes():
    odd = Odd()
    assert last_layer(odd, torch.rand(2, 6)) is odd.out and last_layer(odd) is odd.idle
    assert last_layer(odd, torch.rand(2, 6), "inside") is odd.inside
    with pytest.raises(ValueError, match="last_layer = 'outt'.*out"): last_layer(odd, name="outt")
    double = nn.Sequential(nn.Linear(6, 3), nn.Softplus())
    with pytest.raises(ValueError, match="output of none of its linear layers"): last_layer(double, torch.rand(2, 6))


def of_each(model, b, v):
    "The definition of alignment: one gradient per example."
    model.eval()
    grads = [torch.autograd.grad(per_example_loss(call(model, b[0]), b[1])[i], list(model.parameters()),
                                 allow_unused=True, materialize_grads=True) for i in range(len(b[2]))]
    return torch.stack([sum((g * v[k]).sum() for g, k in zip(row, v)) for row in grads])


@pytest.mark.parametrize("how", ["forward", "reverse"])
def test_alignment_on_a_transformer(how):
    transformers = pytest.importorskip("transformers")
    config = transformers.BertConfig(vocab_size=30, hidden_size=16, num_hidden_layers=2, num_attention_heads=2,
                                     intermediate_size=24, num_labels=3)
    model = transformers.BertForSequenceClassification(config).double()
    x = {"input_ids": torch.randint(1, 30, (5, 7)), "attention_mask": torch.ones(5, 7, dtype=torch.int64)}
    b = Batch(x, torch.randint(3, (5,)), torch.arange(5))
    v = {k: torch.randn_like(p) for k, p in model.named_parameters()}
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        found = align(model, b, v, how)
    assert torch.allclose(found, of_each(model, b, v), rtol=1e-9)


def test_frozen_parameters_have_no_part():
    model = Odd().double()
    model.inside.requires_grad_(False)
    task = Task(model, n=9, dev=lambda: (torch.rand(9, 6, dtype=torch.float64), torch.arange(9) % 3))
    g = task.dev_grad()
    assert set(g) == {"out.weight", "out.bias", "idle.weight", "idle.bias"} and not g["idle.weight"].any()
    b = Batch(torch.rand(4, 6, dtype=torch.float64), torch.arange(4) % 3, torch.arange(4))
    v = g | {k: torch.zeros_like(p) for k, p in model.named_parameters() if k not in g}
    v = {k: v[k] for k, _ in model.named_parameters()}
    expected = task.align(b, g)
    model.requires_grad_(True)
    assert torch.allclose(expected, of_each(model, b, v))


class NoForward(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x): return x * 2
    @staticmethod
    def backward(ctx, g): return g * 2


class Doubled(Odd):
    def forward(self, x): return NoForward.apply(super().forward(x)[0])


def test_a_model_without_forward_mode_is_measured_by_differences_and_says_so_once():
    model = Doubled().double()
    b = Batch(torch.rand(4, 6, dtype=torch.float64), torch.arange(4) % 3, torch.arange(4))
    v = {k: torch.randn_like(p) for k, p in model.named_parameters()}
    with pytest.warns(UserWarning, match="Doubled has no forward-mode derivative"): found = align(model, b, v)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        again = align(model, b, v)
    truth = of_each(model, b, v)
    assert torch.equal(found, again) and (found - truth).norm() < 0.02 * truth.norm()


def test_a_scorer_of_a_model_of_sequences_sees_the_mean_of_what_counts():
    transformers = pytest.importorskip("transformers")
    config = transformers.GPT2Config(vocab_size=20, n_positions=8, n_embd=8, n_layer=1, n_head=2)
    model = transformers.GPT2LMHeadModel(config).eval()
    x = {"input_ids": torch.randint(20, (2, 6)), "attention_mask": torch.tensor([[1] * 6, [1] * 4 + [0] * 2])}
    scorer = Scorer.of(model, x, sees="x")
    assert scorer.body.layer == "lm_head" and scorer.head.out_features == 1
    hidden = model(**x, output_hidden_states=True).hidden_states[-1]
    expected = torch.stack([hidden[0].mean(0), hidden[1, :4].mean(0)])
    assert torch.allclose(scorer.eval().body(x), expected, atol=1e-6)


def test_dds_finds_the_source_that_the_held_out_examples_come_from():
    x, y = training_set("class")
    source = torch.arange(N) % 3
    y = torch.where(source == 1, y, (y + source + 1) % 4)     # two sources with other labels
    held = TensorDataset(x[source == 1][:32], y[source == 1][:32])
    model = network("class")
    sel = DDS(GroupScorer([f"source {i}" for i in source.tolist()]), lr=20.0).bind(Task(model, n=N, dev=held))
    opt = torch.optim.SGD(model.parameters(), 0.1)
    for b in [b for _ in range(20) for b in DataLoader(TensorDataset(x, y, torch.arange(N)), 48)]:
        sel.loss(model(b[0]), b).backward()
        opt.step()
        opt.zero_grad()
        sel.after_step()
    scores = dict(zip(sel.scorer.names, sel.scorer.scores().tolist()))
    assert scores["source 1"] > max(scores["source 0"], scores["source 2"]) + 1
    assert torch.equal(sel.report()["score"], sel.scorer.scores().detach()[source])


# ---- what is refused

class Endless(IterableDataset):
    def __iter__(self): return iter([(torch.rand(6), 1)])

class NoLength(Dataset):
    def __getitem__(self, i): return torch.rand(6), 1


@pytest.mark.parametrize("make, said", [
    (lambda: Task(network("class"), n=5, target="classes"), "target = 'classes': must be one of class, multilabel"),
    (lambda: Task(network("class"), n=5, dev=Endless()), "dev: Endless has no length"),
    (lambda: Task(network("class"), n=5, dev=NoLength()), "dev: NoLength has no length"),
    (lambda: Task(network("class"), n=5, dev=3), "dev is a int: must be a split, a Dataset"),
    (lambda: DDS(GroupScorer([0, 1])).bind(Task(network("class"), n=5, dev=numbered(5))),
     "group has 2 entries: must have 5"),
    (lambda: GroupScorer([1, 1]), "group = \\[1\\]: must have 2 groups"),
    (lambda: BatchWeight().bind(Task(network("class"), n=5,
                                   dev=TensorDataset(torch.rand(4, 5), torch.zeros(4).long()))),
     "dev: the model cannot take its batches"),
    (lambda: DataParameters(inst=Sigma()).sampler(), "knows no training set"),
    (lambda: Uniform().loss(torch.rand(2, 3), (0, [1, 1], [0, 1])), "Uniform is not bound"),
    (lambda: Dynamics(), "n = None: must be the number of examples"),
    (lambda: Dynamics(n=3, target="x"), "target = 'x'"),
])
def test_bad_arguments(make, said):
    with pytest.raises(ValueError, match=said): make()


X, Y, IDS = (t[:4] for t in numbered().tensors)
NAN = torch.tensor([0.5, torch.nan, 1, 1])


@pytest.mark.parametrize("target, logits, batch, said", [
    ("class", 4, (X, Y), "is \\(x, y\\), must have the ids .* with_ids"),
    ("class", 4, {"input_ids": X, "labels": Y}, "has input_ids, labels, must have the ids .* collator"),
    ("class", 4, {"input_ids": X, "idx": IDS}, "must have one of labels, label, y"),
    ("class", 4, "text", "batch is a str"),
    ("class", 4, (X, Y - 101, IDS), "batch.y = -1..: must lie in 0..3"),
    ("class", 4, (X, torch.full((4,), -100), IDS), "batch.y = -100: must lie in 0..3"),
    ("class", 4, (X, Y.float(), IDS), "batch.y is torch.float32: must be int64 for target = 'class'"),
    ("class", 4, (X, Y[:, None], IDS), "must have 1 dimensions"),
    ("class", 4, (X[:0], Y[:0], IDS[:0]), "batch.idx is empty in process 0"),
    ("class", 4, (X, Y, IDS[:3]), "logits have 4 rows, batch.y 4, batch.idx 3"),
    ("class", 4, (X, Y, IDS + N), "batch.idx = 19.: must lie in 0..191"),
    ("regression", 1, (X, NAN, IDS), "batch.y of example 1 of the batch is NaN"),
    ("regression", 2, (X, NAN.nan_to_num(), IDS), "the model gave \\[4, 2\\], labels are \\[4\\]: must be alike"),
    ("multilabel", 4, (X, torch.full((4, 4), 2.0), IDS), "batch.y = 2.0: must lie in 0..1"),
])
def test_bad_batches_teach_nothing(target, logits, batch, said):
    sel = Uniform().bind(Task(network("class"), n=N, target=target))
    rows = 0 if isinstance(batch, tuple) and len(batch) == 3 and len(batch[2]) == 0 else 4
    with pytest.raises(ValueError, match=said): sel.loss(torch.zeros(rows, logits), batch)
    with pytest.raises(ValueError, match="after_step: no loss since the last step"): sel.after_step()


def test_sigma_at_b_equal_t_goes_along_the_sequences():
    sel = DataParameters(inst=Sigma(init=2.0, lr=0)).bind(Task(network("tokens"), n=N, target="tokens"))
    sel.log_inst.copy_(torch.arange(N) / 10)
    logits, ids = torch.randn(3, 3, 5), torch.tensor([7, 0, 30])
    changed = sel.logits(logits, Batch(None, None, ids))
    for i in range(3): assert torch.allclose(changed[i].double(), logits[i].double() / (ids[i] / 10).double().exp())


def test_backward_is_needed():
    sel = DataParameters(inst=Sigma()).bind(Task(network("class"), n=N))
    sel.loss(sel.task.model(X), (X, Y, IDS))
    with pytest.raises(ValueError, match="after_step: no backward since the last step"): sel.after_step()


def test_a_second_sampler_replaces_the_first():
    sel = RS2(0.5).bind(Task(network("class"), n=N))
    first, second = sel.sampler(), sel.sampler()
    assert len(list(second)) == N // 2
    with pytest.raises(ValueError, match="this sampler was replaced"): iter(first)


def test_a_method_that_weighs_is_taken_to_weigh_a_step_as_a_whole_unless_it_says():
    class Mine(Selector):
        def weights(self, losses, batch): return torch.full_like(losses, 1 / len(losses))
    for pieces, says in ((None, True), (True, False)):
        sel = type("Mine", (Mine,), {"micro_batches": pieces})().bind(Task(network("class"), n=N))
        sel.loss(sel.task.model(X), (X, Y, IDS))
        if says:
            with pytest.raises(ValueError, match="Mine: loss was called again"): sel.loss(X[:, :4], (X, Y, IDS))
        else: sel.loss(X[:, :4], (X, Y, IDS))


def test_mentornet_says_why():
    with pytest.raises(ValueError, match="works on class, because it learns from flipped classes"):
        MentorNet().bind(Task(network("multilabel"), n=N, n_classes=4, steps=3, dev=lambda: training_set("multilabel"),
                              target="multilabel"))
