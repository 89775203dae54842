"""Alignment against its definition, in float64, one gradient per example."""
import copy

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.func import functional_call, grad, vmap

from datasel_wb.core import ALIGN, Batch, align, check_settings, per_example_loss, seeded, suggest
from datasel_wb.models import make_model


def oracle(model, batch, v):
    model = copy.deepcopy(model).double().eval()

    def loss(theta, x, y):
        return F.cross_entropy(functional_call(model, theta, (x[None],)), y[None])

    g = vmap(grad(loss), (None, 0, 0))(dict(model.named_parameters()), batch.x.double(), batch.y)
    return sum(g[k].flatten(1) @ v[k].double().flatten() for k in v)


@pytest.fixture(params=["conv_bn", "small_cnn", "wrn28-2"])
def trained(request):
    "A network with lived-in batch-norm statistics, a batch and a direction."
    torch.manual_seed(0)  # dropout and default initialisation
    rng = seeded(0, "test")
    channels, side = (3, 16) if request.param == "wrn28-2" else (1, 8)
    if request.param == "conv_bn":
        model = nn.Sequential(nn.Conv2d(1, 8, 3), nn.BatchNorm2d(8), nn.ReLU(), nn.Dropout(0.5), nn.Flatten(),
                              nn.Linear(288, 10))
    else:
        model = make_model(request.param, 10, channels, dropout=0.1)
    batch = Batch(torch.randn(8, channels, side, side, generator=rng), torch.randint(10, (8,), generator=rng),
                  torch.arange(8))
    opt = torch.optim.SGD(model.parameters(), 0.01)
    for _ in range(5):
        F.cross_entropy(model(batch.x), batch.y).backward()
        opt.step()
        opt.zero_grad()
    return model, batch, {k: torch.randn(p.shape, generator=rng) for k, p in model.named_parameters()}


@pytest.mark.parametrize("how, tolerance", [("forward", 1e-9), ("reverse", 1e-9), ("difference", 5e-2)])
def test_align_equals_its_definition(trained, how, tolerance):
    model, batch, v = trained
    model, batch = model.double(), batch._replace(x=batch.x.double())
    truth = oracle(model, batch, v)
    assert (align(model, batch, {k: t.double() for k, t in v.items()}, how) - truth).norm() <= tolerance * truth.norm()


@pytest.mark.parametrize("trained", ["conv_bn"], indirect=True)
@pytest.mark.parametrize("how, tolerance", [("forward", 1e-4), ("reverse", 1e-4), ("difference", 5e-2)])
def test_align_in_float32_against_the_float64_definition(trained, how, tolerance):
    "On a shallow net: in a deep one the precisions disagree on which side of its kink a ReLU is, and both are right."
    model, batch, v = trained
    truth = oracle(model, batch, v)
    assert (align(model, batch, v, how) - truth).norm() <= tolerance * truth.norm()


@pytest.mark.parametrize("how, tolerance", [("forward", 1e-12), ("reverse", 1e-12), ("difference", 5e-2)])
def test_align_with_the_batch_s_statistics(trained, how, tolerance):
    "One gradient per example of the losses of the whole batch, batch norm in training mode and dropout off."
    model, batch, v = trained
    model, batch, v = model.double(), batch._replace(x=batch.x.double()), {k: t.double() for k, t in v.items()}
    before = {k: t.clone() for k, t in model.state_dict().items()}
    got = align(model, batch, v, how, norm="batch")
    assert all(torch.equal(before[k], t) for k, t in model.state_dict().items()) and model.training
    twin = copy.deepcopy(model).eval()
    for m in twin.modules(): m.train(isinstance(m, nn.BatchNorm2d))
    losses, params = per_example_loss(twin(batch.x), batch.y), dict(twin.named_parameters())
    truth = torch.stack([sum((g * v[k]).sum() for k, g in zip(params, torch.autograd.grad(
        loss, params.values(), retain_graph=True))) for loss in losses])
    assert (got - truth).norm() <= tolerance * truth.norm()


@pytest.mark.parametrize("how", ALIGN)
def test_align_leaves_the_model_alone(trained, how):
    model, batch, v = trained
    model[0].eval() if isinstance(model, nn.Sequential) else model.head.eval()  # a mode set by its owner
    before = {k: t.clone() for k, t in model.state_dict().items()}
    modes = [m.training for m in model.modules()]
    align(model, batch, v, how)
    assert all(torch.equal(before[k], t) for k, t in model.state_dict().items())
    assert all(p.grad is None for p in model.parameters()) and [m.training for m in model.modules()] == modes


def test_align_at_other_weights_and_with_missing_names(trained):
    model, batch, v = trained
    moved = copy.deepcopy(model)
    with torch.no_grad():
        for p in moved.parameters(): p.add_(0.01)
    at = {k: p.detach() for k, p in moved.named_parameters()}
    assert torch.equal(align(model, batch, v, at=at), align(moved, batch, v))
    some = dict(list(v.items())[:2])
    zeros = {k: some.get(k, torch.zeros_like(t)) for k, t in v.items()}
    assert torch.allclose(align(model, batch, some), align(model, batch, zeros), rtol=1e-4, atol=1e-5)


def test_align_refuses_what_it_does_not_know(trained):
    model, batch, v = trained
    with pytest.raises(ValueError, match="how = 'sideways': must be one of forward, reverse, difference"):
        align(model, batch, v, "sideways")
    with pytest.raises(ValueError, match="nobody"): align(model, batch, {"nobody": torch.ones(1)})


def test_half_precision_logits_give_float32_losses():
    logits = torch.randn(4, 10, generator=seeded(0, "test"))
    y = torch.arange(4)
    assert per_example_loss(logits.bfloat16(), y).dtype == torch.float32
    assert per_example_loss(logits.double(), y).dtype == torch.float64


def test_streams_are_independent_and_leave_the_global_state_alone():
    state = torch.get_rng_state()
    draws = {p: torch.rand(100, generator=seeded(0, p)) for p in ("order", "dev", "augment")}
    assert torch.equal(state, torch.get_rng_state())
    assert abs(torch.corrcoef(torch.stack(list(draws.values())))[0, 1]) < 0.3


def test_suggest_names_the_nearest():
    assert suggest("stpes", ["steps", "seed"]) == "did you mean 'steps'?"
    assert suggest("qqq", ["steps", "seed"]) == "known are seed, steps"


def test_check_settings_wants_a_dataclass():
    with pytest.raises(TypeError): check_settings(object())
