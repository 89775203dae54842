"""SparseSGD against a dense float64 loop over entries and against torch.optim.SGD."""
import itertools

import pytest
import torch

from datasel_wb.sparse_optimizer import SparseSGD

OPTIONS = [dict(lr=0.1, momentum=m, dampening=d, weight_decay=w, nesterov=n)
           for m, d, w, n in itertools.product((0, 0.9), (0, 0.3), (0, 0.05), (False, True))
           if not (n and (m == 0 or d))]


def by_loop(start, steps, lr, momentum, dampening, weight_decay, nesterov):
    "One Python loop over entries; a dict of momentum buffers, so that a missing key means never touched."
    s, buffers = [float(v) for v in start], {}
    for ids, grads in steps:
        total = {}
        for i, g in zip(ids.tolist(), grads.double().tolist()): total[i] = total.get(i, 0.0) + g
        for i, g in total.items():
            d = g + weight_decay * s[i]
            if momentum:
                buffers[i] = d if i not in buffers else momentum * buffers[i] + (1 - dampening) * d
                d = d + momentum * buffers[i] if nesterov else buffers[i]
            s[i] -= lr * d
    return torch.tensor(s, dtype=torch.float64)


def random_steps(n=40, batch=16, steps=500):
    g = torch.Generator().manual_seed(1)
    return [(torch.randint(n, (batch,), generator=g), torch.randn(batch, generator=g) / 4) for _ in range(steps)]


@pytest.mark.parametrize("given", ["sparse", "dense", "entries"])
@pytest.mark.parametrize("options", OPTIONS, ids=str)
def test_equals_a_loop_over_entries(options, given):
    start, steps = torch.randn(40, dtype=torch.float64, generator=torch.Generator().manual_seed(0)), random_steps()
    s = start.clone()
    opt = SparseSGD([s], **options)
    for ids, g in steps:
        grad = torch.sparse_coo_tensor(ids[None], g.double(), s.shape)
        if given == "entries": opt.step(ids, g.double())
        elif given == "dense":
            s.grad = grad.to_dense()
            opt.step(ids)
        else:
            s.grad = grad
            opt.step()
    assert (s - by_loop(start, steps, **options)).abs().max() <= 1e-6


@pytest.mark.parametrize("device",
                         ["cpu", pytest.param(
                             "cuda", marks=pytest.mark.skipif(not torch.cuda.is_available(), reason="needs CUDA"))])
@pytest.mark.parametrize("options", OPTIONS, ids=str)
def test_float32_stays_near_the_loop(options, device):
    start, steps = torch.randn(40, generator=torch.Generator().manual_seed(0)), random_steps()
    s = start.to(device, copy=True)
    opt = SparseSGD([s], **options)
    for ids, g in steps:
        s.grad = torch.sparse_coo_tensor(ids[None], g, s.shape).to(device)
        opt.step()
    s, want = s.cpu(), by_loop(start, steps, **options)
    assert ((s - want).abs() / want.abs().clamp_min(1)).max() <= 2e-5


@pytest.mark.parametrize("options", OPTIONS, ids=str)
def test_equals_torch_sgd_when_all_entries_are_present(options):
    start = torch.randn(64, dtype=torch.float64)
    a, b = start.clone(), start.clone()
    mine, theirs = SparseSGD([a], **options), torch.optim.SGD([b], **options)
    for _ in range(100):
        ids, g = torch.randperm(64), torch.randn(64, dtype=torch.float64)
        a.grad, b.grad = torch.sparse_coo_tensor(ids[None], g[ids], a.shape), g
        mine.step()
        theirs.step()
    assert torch.allclose(a, b, rtol=0, atol=1e-12)


def test_entries_outside_the_batch_keep_every_bit():
    s = torch.randn(1000)
    opt = SparseSGD([s], lr=0.1, momentum=0.9, weight_decay=0.1)
    for _ in range(20):
        ids = torch.randint(500, (64,))
        before, rest = s.clone(), torch.ones(1000, dtype=torch.bool)
        rest[ids] = False
        buffer = opt.state[s].get("momentum_buffer", torch.zeros(1000)).clone()
        s.grad = torch.sparse_coo_tensor(ids[None], torch.randn(64), s.shape)
        opt.step()
        assert torch.equal(s[rest], before[rest]) and torch.equal(opt.state[s]["momentum_buffer"][rest], buffer[rest])
        assert (s[~rest] != before[~rest]).all()


def test_rows():
    start, ids = torch.randn(10, 3, dtype=torch.float64), torch.tensor([2, 5, 2])
    g = torch.randn(3, 3, dtype=torch.float64)
    for dampening in (0, 0.5):
        s, opts = start.clone(), dict(lr=0.1, momentum=0.9, dampening=dampening, weight_decay=0.1)
        columns = [start[:, j].clone() for j in range(3)]
        opt, one_by_one = SparseSGD([s], **opts), SparseSGD(columns, **opts)
        for _ in range(5):
            s.grad = torch.sparse_coo_tensor(ids[None], g, s.shape)
            for j, c in enumerate(columns): c.grad = torch.sparse_coo_tensor(ids[None], g[:, j], c.shape)
            opt.step()
            one_by_one.step()
        assert torch.allclose(s, torch.stack(columns, 1), rtol=0, atol=1e-14)


@pytest.mark.parametrize("options", [dict(momentum=0.9), dict(momentum=0.9, dampening=0.2), dict(momentum=0)], ids=str)
def test_state_dict_round_trip(options, tmp_path):
    steps = random_steps(steps=40)

    def run(s, opt, part):
        for ids, g in part:
            s.grad = torch.sparse_coo_tensor(ids[None], g, s.shape)
            opt.step()

    whole, first = torch.ones(40), torch.ones(40)
    run(whole, SparseSGD([whole], lr=0.1, **options), steps)
    opt = SparseSGD([first], lr=0.1, **options)
    run(first, opt, steps[:20])
    torch.save({"s": first, "opt": opt.state_dict()}, tmp_path / "state.pt")
    saved = torch.load(tmp_path / "state.pt", weights_only=True)
    second = saved["s"]
    opt = SparseSGD([second], lr=7.0, **options)
    opt.load_state_dict(saved["opt"])
    run(second, opt, steps[20:])
    assert torch.equal(second, whole)


def test_ten_million_entries():
    s = torch.zeros(10_000_000)
    opt = SparseSGD([s], lr=1.0, momentum=0.9)
    ids = torch.tensor([0, 9_999_999, 9_999_999])
    s.grad = torch.sparse_coo_tensor(ids[None], torch.ones(3), s.shape)
    opt.step()
    assert s[0] == -1 and s[-1] == -2 and s.count_nonzero() == 2


def test_works_with_schedulers():
    s = torch.zeros(3)
    opt = SparseSGD([s], lr=1.0)
    schedule = torch.optim.lr_scheduler.StepLR(opt, 1, 0.1)
    for _ in range(2):
        s.grad = torch.sparse_coo_tensor([[0]], [1.0], s.shape)
        opt.step()
        schedule.step()
    assert torch.allclose(s, torch.tensor([-1.1, 0, 0]))


@pytest.mark.parametrize("options, text", [
    (dict(lr=-0.1), "lr = -0.1"), (dict(lr=float("nan")), "lr = nan"), (dict(lr=0.1, momentum=-1), "momentum = -1"),
    (dict(lr=0.1, weight_decay=-1), "weight_decay = -1"), (dict(lr=0.1, nesterov=True), "nesterov"),
    (dict(lr=0.1, momentum=0.9, dampening=0.1, nesterov=True), "nesterov")])
def test_wrong_options(options, text):
    with pytest.raises(ValueError, match=text): SparseSGD([torch.zeros(3)], **options)


def test_wrong_arguments_of_a_step():
    a, b = torch.zeros(3), torch.zeros(3)
    with pytest.raises(ValueError, match="ids: must be int64, are torch.float32"):
        SparseSGD([a], lr=1.0).step(torch.tensor([0.0]), torch.ones(1))
    with pytest.raises(ValueError, match="for an optimizer of one tensor; this one has 2"):
        SparseSGD([a, b], lr=1.0).step(torch.tensor([0]), torch.ones(1))
    assert not a.any() and not b.any()


@pytest.mark.parametrize("bad", [3, -1])
def test_ids_out_of_range_change_nothing(bad):
    s = torch.ones(3)
    opt = SparseSGD([s], lr=0.1, momentum=0.9)
    s.grad = torch.ones(3)
    with pytest.raises(ValueError, match=r"must lie in 0\.\.2"): opt.step(torch.tensor([0, bad]))
    assert torch.equal(s, torch.ones(3))
