"""The profile of a step: counts against closed forms, every method, and a step that is not changed by being counted."""
import pytest
import torch
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from datasel_wb.examples import Examples, Splits
from datasel_wb.scorer import DDS, Scorer
from datasel_wb.selectors import DynaMS, Uniform
from datasel_wb.profile import CHIPS, PARTS, projected_hours, step_flops
from datasel_wb.loop import Recipe, Training
from datasel_wb.weighting import BatchWeight, MentorNet
from methods import DATA, METHODS

torch.set_num_threads(1)
RECIPE = Recipe(model="tiny_cnn", batch_size=32, epochs=4, warmup_steps=2, device="cpu")


def examples(n, channels=3, side=8, classes=5):
    x = torch.randint(0, 256, (n, channels, side, side), dtype=torch.uint8, generator=torch.Generator().manual_seed(n))
    return Examples(x, torch.arange(n) % classes, range(classes), mean=(0.5,) * channels, std=(0.25,) * channels)


def body():
    return nn.Sequential(nn.Conv2d(3, 4, 3, padding=1), nn.BatchNorm2d(4), nn.ReLU(),
                         nn.Conv2d(4, 6, 3, stride=2, padding=1), nn.AdaptiveAvgPool2d(1), nn.Flatten())


# forward FLOPs per example; two for each multiply-add
FIRST, SECOND, LINEAR = 2 * 64 * 27 * 4, 2 * 16 * 36 * 6, 2 * 6 * 5
MODEL = 2 * FIRST + 3 * (SECOND + LINEAR)                              # no gradient with respect to the images
SCORER = 2 * FIRST + 3 * (SECOND + 2 * 6)                              # one output
FORWARD_MODE = 3 * (FIRST + SECOND + LINEAR)


def profile(selector, batch_size=4, steps=1):
    data = Splits(examples(32), examples(16), examples(16))
    net = nn.Sequential(*body(), nn.Linear(6, 5))
    return step_flops(Training(Recipe(batch_size=batch_size, steps=20, warmup_steps=1, device="cpu"), data, selector,
                               model=net), steps)


def dds(**kw): return DDS(Scorer(body(), 6, 5, sees="x"), **{"lr": 0.1} | kw)


@pytest.mark.parametrize("selector, expected", [
    (Uniform, (MODEL, 0, 0, 0)),
    (dds, (MODEL, MODEL, FORWARD_MODE, SCORER)),
    (lambda: dds(reward="difference", variant="released"), (MODEL, MODEL, 2 * (FIRST + SECOND + LINEAR), SCORER)),
    (lambda: dds(lr=0.0), (MODEL, 0, 0, FIRST + SECOND + 12)),                     # scored, not trained
    (BatchWeight, (MODEL, MODEL, FORWARD_MODE, 0)),
], ids=["uniform", "dds", "dds, difference", "retrained dds", "batchweight"])
def test_closed_form(selector, expected):
    table = profile(selector())
    assert tuple(table.index) == PARTS and tuple(table.per_example) == expected
    assert tuple(table.flops) == tuple(4 * e for e in expected) and table.share.sum() == pytest.approx(1)


def test_reverse_mode_needs_a_second_backward_pass():
    reverse = profile(dds(reward="reverse")).per_example
    assert reverse["reward"] > FORWARD_MODE and tuple(reverse.drop("reward")) == (MODEL, MODEL, SCORER)


def test_proportional_to_the_batch():
    assert (profile(dds(), batch_size=8).per_example == profile(dds(), batch_size=2).per_example).all()


def test_average_over_steps():
    "MentorNet trains its small network in every fourth step."
    one, four = profile(MentorNet(), steps=1), profile(MentorNet(), steps=4)
    assert one.per_example["model"] == four.per_example["model"] == MODEL
    assert one.per_example["scorer"] < (FIRST + SECOND + LINEAR) / 4 < four.per_example["scorer"]


def test_both_passes_of_a_proxy_are_not_the_models():
    uniform = Training(RECIPE, DATA)
    dynams = Training(RECIPE, DATA, DynaMS(0.8, warmup=1, every=1, shape="linear", proxy=0.5))
    table = step_flops(dynams)
    with FlopCounterMode(display=False) as alone:
        dynams.selector.proxy(torch.zeros(32, *DATA.train.shape)).sum().backward()
    assert table.flops["model"] == step_flops(uniform).flops["model"]
    assert table.flops["scorer"] == alone.get_total_flops() > 0


def equal(a, b):
    "Equal bit for bit; NaN, which stands for what was not yet seen, equals itself."
    return (not isinstance(a, torch.Tensor)
            or (torch.equal(a.isnan(), b.isnan()) and torch.equal(a.nan_to_num(), b.nan_to_num())))


# PyTorch takes another formula for the forward derivative of batch norm in training mode while a counter listens:
# 2e-7 of the alignments. With running statistics ("batchweight, running") nothing is rounded.
ROUNDED = ("batchweight",)


@pytest.mark.parametrize("name", METHODS)
def test_every_method_and_a_step_as_always(name):
    "Bit-equal weights and state to a training that nobody counted; with ROUNDED, equal to 1e-6."
    def same(a, b):
        if name not in ROUNDED or not isinstance(a, torch.Tensor): return equal(a, b)
        return torch.allclose(a.double(), b.double(), rtol=1e-6, atol=1e-6, equal_nan=True)
    counted, plain = (Training(RECIPE, DATA, METHODS[name]()) for _ in range(2))
    table = step_flops(counted, steps=3)
    for _ in range(3): plain.step()
    assert table.flops["model"] > 0 and (table.flops >= 0).all() and table.share.sum() == pytest.approx(1)
    assert counted.steps_done == plain.steps_done == 3 and counted.selector.task.passes == plain.selector.task.passes
    for part in ("model", "ema", "selector", "dynamics"):
        a, b = getattr(counted, part).state_dict(), getattr(plain, part).state_dict()
        assert a.keys() == b.keys()
        for k in a: assert same(a[k], b[k]), (part, k)
    counted.step(), plain.step()                                               # nothing of the counter is left behind
    for p, q in zip(counted.model.parameters(), plain.model.parameters()): assert same(p, q)
    assert not {"loss", "after_step"} & vars(counted.selector).keys()
    assert not {"dev_grad", "align"} & vars(counted.selector.task).keys()


def test_counter_leaves_after_a_failure():
    training = Training(RECIPE, DATA, METHODS["dds"]())
    def broken(*_): raise RuntimeError("broken")
    training.selector.update = broken
    with pytest.raises(RuntimeError, match="broken"): step_flops(training)
    assert "align" not in vars(training.selector.task) and "loss" not in vars(training.selector)


def test_end_of_the_training():
    training = Training(Recipe(model="tiny_cnn", batch_size=32, steps=2, warmup_steps=1, device="cpu"), DATA)
    with pytest.raises(ValueError, match="steps = 3: the training ends before, at step 2"):
        step_flops(training, steps=3)
    with pytest.raises(ValueError, match="steps = 0: must be above 0"): step_flops(training, steps=0)


def test_hours():
    "Against plain arithmetic, for a part in bfloat16 and one in float32."
    table = profile(dds())
    got = projected_hours(table, steps=1000, batch_size=256, chips="v5litepod-8", utilisation=0.5, stage_steps=100)
    seconds = 1000 * 256 / (8 * 197e12 * 0.5)
    assert got["model"] == pytest.approx(MODEL * seconds / 3600)
    assert got["reward"] == pytest.approx(6 * FORWARD_MODE * seconds / 3600)
    assert got["scorer"] == pytest.approx(6 * SCORER * seconds / 3600)
    assert got["supervised stage"] == pytest.approx(MODEL * seconds / 36000)
    gpu = projected_hours(table, 1000, 256, "8 x H100")
    assert gpu["reward"] == pytest.approx(2 * FORWARD_MODE * 1000 * 256 / (8 * 989e12 * 0.4) / 3600)
    assert gpu["supervised stage"] == 0
    assert set(got.index) == {*PARTS, "supervised stage"}
    assert all(projected_hours(table, 10, 8, chips).sum() > 0 for chips in CHIPS)


@pytest.mark.parametrize("wrong, text", [
    (dict(chips="v4-9"), "chips = 'v4-9': did you mean 'v4-8'?"),
    (dict(utilisation=0.0), "utilisation = 0.0: must lie in"),
    (dict(utilisation=1.5), "utilisation = 1.5: must lie in"),
    (dict(steps=0), "steps = 0: must be above 0"),
    (dict(batch_size=0), "batch_size = 0: must be above 0"),
    (dict(stage_steps=-1), "stage_steps = -1: must be 0 or more"),
])
def test_hours_refuse(wrong, text):
    with pytest.raises(ValueError) as e: projected_hours(profile(Uniform()), **dict(steps=10, batch_size=8) | wrong)
    assert text in str(e.value)
