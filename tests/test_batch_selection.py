"""RHO-LOSS against loops in float64, and its holdout model in a comparison."""
import copy
from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F

from datasel_wb import runs
from datasel_wb.batch_selection import RHOLoss, RHOSettings, reducible_weights
from datasel_wb.datasets import DataRecipe, load_data
from datasel_wb.loop import Recipe
from datasel_wb.models import make_model
from datasel_wb.recipes import CompareRecipe, check_methods, train_method
from datasel_wb.selectors import Task
from loops import bare_loop


@pytest.fixture(scope="module")
def data(): return load_data(DataRecipe(n_train=300, dev_size=70, noise=0.4))


@pytest.mark.parametrize("k", [1, 3, 8])
def test_weights_against_a_loop(k):
    g = torch.Generator().manual_seed(k)
    losses, irreducible = (torch.rand(8, generator=g, dtype=torch.float64) for _ in range(2))
    order = sorted(range(8), key=lambda i: float(losses[i]) - float(irreducible[i]), reverse=True)
    expected = [1 / k if i in order[:k] else 0.0 for i in range(8)]
    assert reducible_weights(losses, irreducible, k).tolist() == pytest.approx(expected, abs=1e-15)
    assert reducible_weights(torch.ones(4), torch.ones(4), 1).tolist() == [0.25] * 4              # equal at the bound: all of them


def test_a_training_against_one_that_takes_only_the_chosen_examples(data):
    "In float64, epoch by epoch: a step on the mean loss of the n_b chosen ones, nothing of the others."
    holdout = make_model("tiny_cnn", 10, 1, seed=5).double()
    with torch.no_grad():
        irreducible = []
        for i in range(len(data.train)):
            x = data.train.x[i:i + 1].double() / 255
            x = (x - torch.tensor(data.train.mean).double()[:, None, None]) / torch.tensor(data.train.std).double()[:, None, None]
            irreducible.append(float(F.cross_entropy(holdout.eval()(x), data.train.y[i:i + 1])))
    model = torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(data.train.x[0].numel(), 10)).double()
    other = copy.deepcopy(model)
    def prepare(x, *_): return (x.double() / 255 - torch.tensor(data.train.mean).double()[:, None, None]) / torch.tensor(data.train.std).double()[:, None, None]
    sel = RHOLoss(holdout, keep=0.25).bind(Task(model, data.train, prepare=prepare))
    assert sel.irreducible[data.train.ids].tolist() == pytest.approx(irreducible, rel=1e-12) and sel.task.passes == 300 and sel.holdout is None
    by_id = dict(zip(data.train.ids.tolist(), irreducible))
    opt = torch.optim.SGD(other.parameters(), 0.1, momentum=0.9)
    for b in bare_loop(sel, epochs=3):
        losses = F.cross_entropy(other(b.x), b.y, reduction="none")
        order = sorted(range(len(b.y)), key=lambda i: losses[i].item() - by_id[int(b.idx[i])], reverse=True)
        opt.zero_grad()
        (sum(losses[i] for i in order[:16]) / 16).backward()
        opt.step()
        for p, q in zip(model.parameters(), other.parameters()): torch.testing.assert_close(p, q, rtol=1e-9, atol=1e-12)
    assert sel.steps_done == 3 * (300 // 64)


def test_in_a_comparison(data, tmp_path):
    "The holdout model is trained on the dev split alone, in its own folder, and its cost and the pass are charged to the method."
    run = SimpleNamespace(data=DataRecipe(n_train=300, dev_size=70, noise=0.4), train=Recipe(model="tiny_cnn", epochs=3, batch_size=50, warmup_steps=6),
                          compare=CompareRecipe("rho-loss"), rho=RHOSettings(0.2))
    check_methods(run, data)
    training, holdout = train_method("rho-loss", run, data, 0, tmp_path)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["holdout-0", "rho-loss-0"]
    assert len(holdout.data.train) == 70 and holdout.steps_done == 3 and holdout.recipe.batch_size == 50   # 70 // 50 batches an epoch
    assert training.selector.keep == 0.2 and (training.selector.seen.weights > 0).sum() == 10
    r = runs.record("rho-loss", training, holdout)
    assert r["examples"] == 3 * 6 * 50 + 300 + 3 * 50 and r["pretrain_seconds"] > holdout.seconds
    again, _ = train_method("rho-loss", run, data, 0, tmp_path)                             # from its checkpoint
    assert torch.equal(*(t.selector.irreducible[data.train.ids] for t in (again, training))) and again.steps_done == 18


@pytest.mark.parametrize("make, text", [
    (lambda: RHOLoss(torch.zeros(300), keep=0.0), "keep = 0.0: must lie in"),
    (lambda: RHOSettings(rho_keep=1.5), "rho_keep = 1.5: must lie in"),
    (lambda: RHOLoss(torch.zeros(7)).bind(Task(make_model("tiny_cnn", 10, 1), n=300)), r"holdout: must give each of the 300 .* shape \(7,\)"),
    (lambda: RHOLoss(torch.full((300,), torch.nan)).bind(Task(make_model("tiny_cnn", 10, 1), n=300)), "a finite loss"),
    (lambda: RHOLoss(make_model("tiny_cnn", 10, 1)).bind(Task(make_model("tiny_cnn", 10, 1), n=300)), "RHOLoss needs score_all"),
])
def test_bad_input(make, text):
    with pytest.raises(ValueError, match=text): make()


def test_without_held_out_examples(data):
    run = SimpleNamespace(train=Recipe(model="tiny_cnn", epochs=3, batch_size=50, warmup_steps=6), compare=CompareRecipe("rho-loss"))
    with pytest.raises(ValueError, match="rho-loss: dev_size = 0: a holdout model needs held-out examples"):
        check_methods(run, load_data(DataRecipe(n_train=300, dev_size=0)))
