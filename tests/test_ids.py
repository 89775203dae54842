"""One id, one loss: an id is a place in the full set, wherever an example goes; records hold the model's own loss."""
import numpy as np
import pandas as pd
import pytest
import torch
import torch.nn.functional as F
from torch.utils.data import DataLoader, Subset, TensorDataset

from datasel_wb.core import Batch
from datasel_wb.corruption import read_decisions
from datasel_wb.datasets import DataRecipe, load_data, load_digits_splits
from datasel_wb.dynamics import Dynamics
from datasel_wb.explorer import Explorer
from datasel_wb.loop import Recipe, Training
from datasel_wb.models import small_cnn
from datasel_wb.recipes import DDS_RECIPES, order_of, scores_of
from datasel_wb.report import Report
from datasel_wb.review import EXAMPLE, Records, add_pictures, read_training
from datasel_wb.runs import begin, finish, record, resolve
from datasel_wb.scores import by_full_set, merge_scores
from datasel_wb.selectors import RS2, InfoBatch, Prune, Task, Uniform
from datasel_wb.trainer import fit
from datasel_wb.weighting import DataParameters, Sigma

PUBLISHED, _ = load_digits_splits()
THINNED = dict(dev_from="first", dev_size=250, n_train=None, noise=0.3, keep_rates="1,1,0.3,1,1,1,1,1,1,1")


@pytest.fixture(scope="module")
def walked(tmp_path_factory):
    "A run on digits without their first 250, noise, a thinned class, decisions and pruning; what was removed where."
    root = tmp_path_factory.mktemp("runs")
    removed = [300, 301, 777]
    (root / "first.csv").write_text("id,action\n" + "".join(f"{i},remove\n" for i in removed))
    given = EXAMPLE | THINNED | dict(recipe="quick", seeds=1, steps=60, decisions=str(root / "first.csv"), name="walk")
    settings = resolve(given, DDS_RECIPES, published="quick", data=DataRecipe, train=Recipe)
    data = load_data(settings.data)
    run = begin(settings, data, root=root)
    pruned = data.train.ids.flip(0)[:100]
    training = fit(settings.train, data, Prune(data.train.ids.flip(0), remove_n=100), folder=run.folder / "prune-0")
    finish(run, [record("prune", training)])
    return run.folder, training, set(removed), set(pruned.tolist())


def test_an_id_survives_everything(walked):
    folder, training, removed, pruned = walked
    records = read_training(folder)
    assert add_pictures(records) == ""
    frame, ids = records.frame, records.frame["id"]
    assert ids.min() >= 250 and not removed & set(ids) and ids.is_monotonic_increasing and 900 < len(ids) < 1047 - 3
    assert (frame.label == 2).sum() < 60                                       # the thinned class
    at = torch.tensor(ids.tolist())
    assert torch.equal(torch.stack(records.pictures.take(range(len(frame)))), PUBLISHED.x[at])
    assert frame.clean_label.tolist() == PUBLISHED.y[at].tolist()
    assert 0.2 < (frame.label != frame.clean_label).mean() < 0.35     # noise changed labels, not which example it is
    assert set(ids[frame.presentations == 0]) >= pruned and set(ids[frame.presentations > 0]) & pruned == set()
    listed = pd.read_csv(folder / "changed_labels.csv")
    assert listed.id.tolist() == ids[frame.label != frame.clean_label].tolist()
    row = int(np.flatnonzero(frame.presentations > 1)[5])
    expected = training.dynamics.history("loss")[row]
    assert np.array_equal(records.history(row), expected[expected.isfinite()].numpy())
    merged = merge_scores([frame, frame.iloc[::-1]], ("el2n", "margin"))
    assert merged.id.tolist() == ids.tolist() and np.allclose(merged.margin, frame.margin, equal_nan=True)
    order = order_of(frame, "margin")
    assert sorted(order.tolist()) == ids.tolist()
    margin = frame.set_index("id").margin[order[:50].tolist()]
    assert margin.is_monotonic_decreasing and margin.iloc[0] == frame.margin.max()
    again = Training(training.recipe, training.data, Prune(order, remove_n=200))
    assert set(again.selector.epoch(0).tolist()) == set(ids) - set(order[:200].tolist())


def test_an_id_survives_the_explorer(walked):
    folder, *_ = walked
    panel = Explorer("walk", root=folder.parent)
    frame = panel.records.frame
    rows = np.flatnonzero(frame.presentations > 0)[[3, 40, 77]]
    panel.select(rows)
    ids = frame["id"].iloc[rows].tolist()
    out = pd.read_csv(panel.export("some.csv"))
    assert out.id.tolist() == ids and "source" not in out
    chosen, own = panel.subset(), panel.subset(TensorDataset(PUBLISHED.x, PUBLISHED.y))
    for i, (x, y), (mine, clean) in zip(ids, chosen, own, strict=True):
        assert torch.equal(x, PUBLISHED.x[i]) and torch.equal(mine, PUBLISHED.x[i]) and clean == PUBLISHED.y[i]
        assert y == int(frame.set_index("id").label[i])
    panel.mark("remove")
    file = panel.decisions.path
    assert sorted(read_decisions(file).id) == sorted([300, 301, 777, *ids])
    assert file.read_text().startswith("id,action,")
    left = panel.split(decided=True)
    panel.close()
    again = load_data(DataRecipe(**THINNED, decisions=str(file))).train
    assert again.ids.tolist() == left.ids.tolist() == [i for i in frame["id"] if i not in ids]


def test_live_examples_are_named_by_their_place(walked):
    training = walked[1]
    found = Report(training).extremes(4)
    table = training.dynamics.table().set_index("id")
    for e in found["highest"]: assert table.loss_last[e["id"]] == pytest.approx(e["value"])


def test_tables_and_decisions_of_earlier_versions_are_read(walked, tmp_path):
    folder, *_ = walked
    now = read_training(folder).frame
    older = now.drop(columns="id").assign(id=range(len(now)), source=now["id"])
    assert Records(older).frame["id"].tolist() == now["id"].tolist() and "source" not in Records(older).frame
    assert merge_scores([older, now], ("margin",)).id.tolist() == now["id"].tolist()
    assert torch.equal(order_of(older, "margin"), order_of(now, "margin"))
    own = pd.DataFrame({"id": [7, 5], "source": [0, 1], "loss": [1.0, 2.0]})           # columns of somebody's own
    assert by_full_set(own) is own
    (tmp_path / "old.csv").write_text("source,action\n300,remove\n")
    assert read_decisions(tmp_path / "old.csv").id.tolist() == [300]


# ---- a dataset of one's own

ids_of_subset = torch.randperm(300, generator=torch.Generator().manual_seed(1))[:140]

@pytest.mark.parametrize("make", [
    Uniform, lambda: Prune(remove_n=20), lambda: Prune(ids_of_subset.flip(0), 20), lambda: RS2(0.5),
    lambda: InfoBatch(0.5, delta=1.0), lambda: DataParameters(inst=Sigma(lr=5.0))])
def test_a_subset_of_ones_own_dataset(make):
    numbered = TensorDataset(PUBLISHED.x[:300].float() / 255, PUBLISHED.y[:300], torch.arange(300))
    subset, known = Subset(numbered, ids_of_subset.tolist()), set(ids_of_subset.tolist())
    torch.manual_seed(0)
    model = small_cnn(width=8)
    opt = torch.optim.SGD(model.parameters(), 0.1)
    sel = make().bind(Task(model, n=len(numbered), n_classes=10, ids=subset.indices, epochs=4))
    dynamics, seen = Dynamics(PUBLISHED.y[ids_of_subset], range(10), ids=ids_of_subset), {i: 0 for i in known}
    for e in range(4):
        ids = sel.epoch(e)
        assert ids is None or len(ids) >= sel.fewest()
        for part in DataLoader(subset if ids is None else Subset(numbered, ids.tolist()), 20, shuffle=True):
            b = Batch(*part)
            sel.loss(model(b.x), b).backward()
            opt.step(); opt.zero_grad()
            sel.after_step(b)
            dynamics.record(b.idx, *sel.seen[:2], b.y, sel.seen.weights)
            for i in b.idx.tolist(): seen[i] += 1      # a KeyError is an id that is not in the subset
    table = dynamics.table()
    assert table.id.tolist() == ids_of_subset.tolist() and table.set_index("id").presentations.to_dict() == seen
    for score in sel.report().values():
        assert score.shape == (300,) and set(score.isfinite().nonzero()[:, 0].tolist()) == known
    absent = next(i for i in range(300) if i not in known)
    wrong = Batch(b.x[:1], b.y[:1], torch.tensor([absent]))
    with pytest.raises(ValueError, match=f"batch.idx = {absent}: must be among the ids of the training set"):
        sel.loss(model(wrong.x), wrong)
    with pytest.raises(ValueError, match=f"idx = {absent}: must be among the ids of the recorded"):
        dynamics.record(wrong.idx, torch.zeros(1, 10), torch.zeros(1), wrong.y, None)


def test_ids_that_cannot_be_are_refused():
    model = small_cnn(width=8)
    for ids, text in (([3, 300], r"ids = 300: must lie in 0..299"), ([3, 3], "ids = 3: must be given only once")):
        with pytest.raises(ValueError, match=text): Task(model, n=300, ids=ids)


# ---- scores at the end, evaluation, checkpoints

def test_scores_of_a_pass_are_placed_by_id():
    train = load_data(DataRecipe(dev_size=100, n_train=230, dev_from="first")).train
    train = train.select(torch.arange(229, -1, -1))     # backwards
    task = Task(small_cnn(width=8), train)
    score = task.score_all(lambda b: b.x.flatten(1).mean(1), batch_size=50)
    assert score.shape == (1297,) and score[:100].isnan().all() and score[330:].isnan().all()
    assert torch.allclose(score[100:330], task.prepare(PUBLISHED.x[100:330]).flatten(1).mean(1), atol=1e-5)
    assert task.passes == 230


def test_gradient_scores_stand_beside_their_examples():
    data = load_data(DataRecipe(dev_size=100, n_train=230, dev_from="first"))
    training = fit(Recipe(model="tiny_cnn", steps=5, warmup_steps=1, batch_size=32), data)
    table = scores_of(training, ("last_layer_grad_norm",))
    score = training.selector.task.score_all(lambda b: b.y.float())
    assert table.id.tolist() == list(range(100, 330)) and score[table.id.to_numpy()].tolist() == data.train.y.tolist()
    assert table.last_layer_grad_norm.notna().all()


def test_a_checkpoint_of_an_earlier_version_is_refused():
    data = load_data(DataRecipe(dev_size=100, n_train=230))
    training = Training(Recipe(model="tiny_cnn", steps=5, warmup_steps=1, batch_size=32), data)
    state = training.state()
    training.load_state(state)
    with pytest.raises(ValueError, match="the checkpoint is of format 1, must be 2: another version") as e:
        training.load_state({k: v for k, v in state.items() if k != "format"})
    assert "\n" not in str(e.value)


# ---- one loss

@pytest.mark.parametrize("level", ["cls", "inst", "both"])
@pytest.mark.parametrize("smoothing", [0.0, 0.1])
def test_records_hold_the_models_own_loss(level, smoothing):
    "Data parameters: what is descended is tempered; seen, observe, table and meter are not. All against float64."
    data = load_data(DataRecipe(dev_size=100, n_train=230, noise=0.4))
    tables = {"cls": Sigma(lr=0.5, init=2.0), "inst": Sigma(lr=20.0, init=0.5)}
    sigmas = {k: s for k, s in tables.items() if level in (k, "both")}
    sel = DataParameters(**sigmas)
    recipe = Recipe(model="tiny_cnn", epochs=6, warmup_steps=1, batch_size=46, label_smoothing=smoothing)
    training, plain = Training(recipe, data, sel), sel.loss
    told, history, means = [], {i: [] for i in data.train.ids.tolist()}, []
    def cross_entropy(wide, y): return F.cross_entropy(wide, y, reduction="none", label_smoothing=smoothing)
    def watched(logits, batch):
        places, wide = {"cls": batch.y, "inst": batch.idx}, logits.detach().double()
        sigma = sum(getattr(sel, f"log_{k}").double().exp()[places[k]] for k in sigmas)
        loss, own = plain(logits, batch), cross_entropy(wide, batch.y)
        assert loss.item() == pytest.approx(cross_entropy(wide / sigma[:, None], batch.y).mean().item(), rel=1e-5)
        for losses in (sel.seen.losses, told[-1]): assert torch.allclose(losses.double(), own, rtol=1e-5, atol=1e-6)
        for i, v in zip(batch.idx.tolist(), own.tolist()): history[i].append(v)
        means.append(own.mean().item())
        return loss
    sel.observe, sel.loss = lambda logits, losses, batch: told.append(losses), watched
    while not training.done: training.step()
    assert training.read_meters()["loss"] == pytest.approx(np.mean(means), rel=1e-5)
    table = training.dynamics.table().set_index("id")
    for i, v in history.items():
        assert table.loss_mean[i] == pytest.approx(np.mean(v), rel=1e-4, abs=1e-6)
        assert table.loss_last[i] == pytest.approx(v[-1], rel=1e-4, abs=1e-6)
        assert table.max_loss_increase[i] == pytest.approx(np.diff(v).max(), rel=1e-3, abs=1e-5)
    tempered = [getattr(sel, f"log_{k}").abs().max().item() for k in sigmas]
    assert min(tempered) > 0.1                                                     # the two losses differ


def test_a_method_that_leaves_the_logits_alone_computes_one_loss():
    data = load_data(DataRecipe(dev_size=100, n_train=230))
    calls, task = [], Task(small_cnn(width=8), data.train)
    task.loss_fn = lambda logits, y: calls.append(1) or F.cross_entropy(logits, y, reduction="none")
    sel, b = Uniform().bind(task), data.train.take(data.train.ids[:8])
    sel.loss(task.model(task.prepare(b.x)), b)
    assert len(calls) == 1
