"""Recipes, methods by name, and trainings that count epochs."""
import json
import math
import re
from dataclasses import fields, replace
from pathlib import Path
from types import SimpleNamespace

import pandas as pd
import pytest
import torch

from datasel_wb import recipes, runs
from datasel_wb.datasets import PUBLISHED_STATS, load_data
from datasel_wb.experiments import EXPERIMENTS
from datasel_wb.scores import SCORES
from datasel_wb.models import small_cnn
from datasel_wb.recipes import (METHODS, CompareRecipe, RemovalRecipe, check_methods, detection, detections, order_of,
                                recipe_for, scores_of, train_method)
from datasel_wb.registry import Context
from datasel_wb.selectors import RS2, InfoBatch, Prune, Task
from datasel_wb.checkpoints import Checkpoints
from datasel_wb.loop import Recipe, Training
from datasel_wb.trainer import fit

PARTS = {e.book.split(".")[1]: e.parts() for e in EXPERIMENTS.values() if e.book.startswith("recipes.")}


def settings(**kw):
    train = dict(model="tiny_cnn", epochs=3, batch_size=64, warmup_steps=3, log_every=5, eval_every=10, save_every=7)
    given = (dict(n_train=400, dev_size=60, noise=0.4, dynams_warmup=1, dynams_every=1, proxy=0.5, inst_lr=5.0,
                  scorer_lr=0.01) | train | kw)
    parts = PARTS["COMPARE_RECIPES"] | {"run": runs.RunRecipe}
    known = {f.name for c in parts.values() for f in fields(c)}
    assert not set(given) - known
    return SimpleNamespace(**{k: c(**{f.name: given[f.name] for f in fields(c) if f.name in given})
                              for k, c in parts.items()})


@pytest.mark.parametrize("book, recipe", [(b, r) for b in PARTS for r in getattr(recipes, b)])
def test_every_recipe_is_valid_and_uses_every_value_it_gives(book, recipe):
    parts = PARTS[book]
    values = getattr(recipes, book)[recipe]
    assert not set(values) - {f.name for c in (runs.RunRecipe, *parts.values()) for f in fields(c)}
    made = runs.resolve({"recipe": recipe}, getattr(recipes, book), "", **parts)
    for part in parts:
        for f in fields(getattr(made, part)):
            if f.name in values: assert getattr(getattr(made, part), f.name) == values[f.name]


def test_published_data_parameters():
    r = runs.resolve({"recipe": "cifar100-wrn28-10"}, recipes.DATA_PARAMETERS_RECIPES, "",
                     **PARTS["DATA_PARAMETERS_RECIPES"])
    steps = replace(r.train, steps=120 * 390)          # 50,000 examples in batches of 128
    drops = [e for e in range(1, 120) if steps.lr_at(e * 390) < steps.lr_at(e * 390 - 1)]
    # the third drop, at 160, lies behind the 120 epochs
    assert drops == [80, 100] and steps.lr_at(0) == 0.1 and r.train.stop_epoch == 84
    assert (r.data.noise, r.data.noise_kind, r.dp.level, r.dp.inst_lr) == (0.4, "swap", "inst", 0.2)
    assert (r.train.decay_on, r.train.conv_bias, r.train.activation, r.data.stats) == ("all", True, "relu", "published")
    assert PUBLISHED_STATS["cifar100"][1] == (0.2023, 0.1994, 0.2010)
    joint = runs.resolve({"recipe": "imagenet-joint"}, recipes.DATA_PARAMETERS_RECIPES, "",
                         **PARTS["DATA_PARAMETERS_RECIPES"]).dp.selector()
    assert {k: (s.lr, s.init, s.weight_decay) for k, s in joint.settings.items()} == {
        "cls": (0.1, 1.0, 1e-4), "inst": (0.8, 0.001, 1e-8)}


def test_steps_given_by_hand_win_over_the_epochs_of_a_recipe():
    parts = PARTS["DATA_PARAMETERS_RECIPES"]
    assert runs.resolve({"recipe": "quick", "steps": 50}, recipes.DATA_PARAMETERS_RECIPES, "",
                        **parts).train.epochs == 0
    assert runs.resolve({"epochs": 9}, recipes.DATA_PARAMETERS_RECIPES, "cifar100-wrn28-10",
                        **parts).run.recipe == "cifar100-wrn28-10"


# --- epochs

@pytest.fixture(scope="module")
def data(): return load_data(settings().data)


def test_a_subset_gets_the_same_schedule_in_fewer_steps(data):
    "The learning rate is a function of the share of the epochs done, also where an epoch has fewer steps."
    recipe = settings(epochs=10, warmup_steps=0).train
    whole, part = Training(recipe, data), Training(recipe, data, RS2(0.5))
    rates = {}
    for name, t in (("whole", whole), ("part", part)):
        rates[name] = []
        while not t.done:
            t.step()
            rates[name].append(t.optimizer.param_groups[0]["lr"])
    assert len(rates["whole"]) == 60 and len(rates["part"]) == 30          # 6 and 3 batches of 64 in an epoch
    assert rates["part"] == pytest.approx([r for i, r in enumerate(rates["whole"]) if i % 2 == 0])
    assert whole.recipe.steps == 60 and whole.schedule_step == 60 == part.schedule_step


@pytest.mark.parametrize("schedule", ["cosine", "step"])
def test_schedules_against_torch(schedule):
    recipe = Recipe(steps=50, warmup_steps=0, batch_size=256, schedule=schedule, milestones="0.3,0.6,0.8", lr_drop=0.2)
    opt = torch.optim.SGD([torch.zeros(1)], recipe.lr)
    theirs = (torch.optim.lr_scheduler.CosineAnnealingLR(opt, 50) if schedule == "cosine"
              else torch.optim.lr_scheduler.MultiStepLR(opt, [15, 30, 40], 0.2))
    for t in range(50):
        assert recipe.lr_at(t) == pytest.approx(opt.param_groups[0]["lr"], abs=1e-12)
        opt.step()
        theirs.step()


def test_stop_epoch_ends_early_on_the_schedule_of_the_whole(data):
    whole, short = (fit(settings(epochs=6, stop_epoch=e).train, data) for e in (0, 2))
    assert short.steps_done == 12 and short.schedule_step == 12 and whole.steps_done == 36
    assert short.optimizer.param_groups[0]["lr"] == whole.recipe.lr_at(11)


class Killed(Exception): pass


@pytest.mark.parametrize("name", ["infobatch", "rs2", "dynams-proxy", "data-parameters", "mentornet", "batchweight"])
def test_killed_in_mid_epoch_and_resumed_is_bit_equal(name, data, tmp_path, monkeypatch):
    s = settings(epochs=4)
    whole = train_method(name, s, data, 0, tmp_path / "whole")[0]
    step, left = Training.step, [10]
    def limited(self):
        if left[0] == 0: raise Killed
        left[0] -= 1
        return step(self)
    monkeypatch.setattr(Training, "step", limited)
    with pytest.raises(Killed): train_method(name, s, data, 0, tmp_path / "again")
    assert Checkpoints(tmp_path / "again" / f"{name}-0" / "checkpoints").load()["step"] == 7
    monkeypatch.setattr(Training, "step", step)
    again = train_method(name, s, data, 0, tmp_path / "again")[0]
    a, b = whole.model.state_dict(), again.model.state_dict()
    assert all(torch.equal(a[k], b[k]) for k in a) and torch.equal(whole.dynamics.rows, again.dynamics.rows)
    assert whole.examples_seen == again.examples_seen and whole.selector.task.passes == again.selector.task.passes


def test_history_is_on_disk_in_a_run(data, tmp_path):
    t = fit(settings(epochs=3, history=3).train, data, folder=tmp_path)
    assert t.dynamics.history("loss").shape == (400, 3) and any("history" in f.name for f in tmp_path.rglob("*"))
    assert not any("kept" in k for k in t.state()["parts"]["dynamics"])


# --- methods by name

def test_every_method_trains_and_its_cost_is_counted(data, tmp_path):
    s = settings()
    check_methods(s, data)
    seen = {}
    for name in s.compare.names():
        training, *stages = train_method(name, s, data, 0, tmp_path)
        r = runs.record(name, training, *stages, **detections(training))
        seen[name] = r["examples"]
        assert r["accuracy"] > 0 and (stages == []) == (r["pretrain_seconds"] == 0)
        assert 0 <= r["auroc"] <= 1 or name in ("rs2", "random", "forgetting", "max_loss_increase", "el2n")
        assert ("auroc_loss" in r) == (name in ("uniform", "uniform-short"))
    assert set(seen) == set(METHODS) and seen["uniform"] == 3 * 6 * 64
    assert seen["uniform-short"] == 2 * 6 * 64 and seen["rs2"] == seen["random"] == 3 * 3 * 64
    # the training that gave the scores is charged
    assert seen["forgetting"] == seen["uniform"] + 3 * 3 * 64
    # the batch, a dev batch, one pass for the alignment
    assert seen["batchweight"] == 18 * (64 + 64 + 64)
    assert seen["dds"] > 3 * seen["uniform"] and seen["dynams"] < seen["uniform"] + 2 * 400
    # each step of the model is one of the proxy
    assert seen["dynams-proxy"] == seen["dynams"] + (seen["dynams"] - 2 * 400)


def test_plain_training_finds_noise_by_its_records(data, tmp_path):
    "Every pair of a wrong and a right label is compared by mean margin and by mean loss, in plain Python."
    training = fit(settings(epochs=4).train, data, folder=tmp_path)
    table = pd.read_parquet(tmp_path / "examples.parquet")
    def share(score):
        pairs = [(c, n) for n in score[table.noisy] for c in score[~table.noisy]]
        return sum((c > n) + 0.5 * (c == n) for c, n in pairs) / len(pairs)
    found = detections(training)
    assert found["auroc"] == detection(training) == pytest.approx(share(table.margin), abs=1e-6)
    assert found["auroc_loss"] == pytest.approx(share(-table.loss_mean), abs=1e-6) and found["auroc"] > 0.6
    log = training.log.frame().query("split == 'train'")
    for name, value in (("auroc/margin", found["auroc"]), ("auroc/loss", found["auroc_loss"])):
        assert log[log.name == name].value.iloc[-1] == value
    clean = data._replace(train=data.train.select(range(200)))
    clean.train.noisy = None
    assert math.isnan(detection(bare := fit(settings(epochs=4).train, clean))) and "auroc_loss" not in detections(bare)


def test_same_start_for_all_methods(data):
    s = settings()
    starts = [Training(recipe_for(n, s), data, METHODS[n].selector(s, Context(data)), seed=5)
              for n in ("uniform", "rs2", "spcl", "data-parameters")]
    for t in starts[1:]:
        assert all(torch.equal(a, b) for a, b in zip(starts[0].model.parameters(), t.model.parameters()))


def test_uniform_the_shortened_schedule_and_rs2_are_always_in():
    assert CompareRecipe("dds").names() == ["uniform", "uniform-short", "rs2", "dds"]
    assert set(CompareRecipe().names()) == set(METHODS)


def test_never_presented_examples_are_kept_by_pruning():
    table = pd.DataFrame({"id": [0, 1, 2, 3], "presentations": [3, 0, 3, 3],
                          "max_loss_increase": [2.0, float("nan"), 1.0, -float("inf")]})
    order = order_of(table, "max_loss_increase")
    assert order.tolist() == [3, 2, 0, 1]
    assert 1 in Prune(order, remove_n=3).bind(Task(small_cnn(), n=4)).kept


def test_every_score_can_be_swept_from_its_easy_end(data):
    "Each order puts what was learned well before what was not: the mean loss is lower in its first half."
    training = fit(settings(epochs=8).train, data, model=small_cnn(10, 1))
    passes = training.selector.task.passes
    table = scores_of(training, SCORES)
    # two passes at the end
    assert set(SCORES) <= set(table) and training.selector.task.passes == passes + 2 * len(data.train)
    final = training.data.train.by_id(torch.tensor(table["loss_mean"].to_numpy()))
    for name in SCORES:
        order = order_of(table, name)
        half = len(order) // 2
        assert sorted(order.tolist()) == table.id.tolist(), name
        if name == "confidence_spread": continue                   # small at both ends
        assert final[order[:half]].mean() < final[order[half:]].mean(), name
    with pytest.raises(ValueError, match="NaN for 1 of 400 examples, the first of them id 67"):
        order_of(table.assign(el2n=table.el2n.where(table.id != 67)), "el2n")


def test_gradient_scores_at_the_end_are_those_of_the_final_weights(data):
    training = fit(settings(epochs=1).train, data)
    table, norms = scores_of(training, ["last_layer_grad_norm"]), []
    training.model.eval()
    for i in (3, 11):
        b = data.train.take(data.train.ids[[i]])
        head = training.model.head
        loss = torch.nn.functional.cross_entropy(training.model(training.prepare(b.x)), b.y)
        norms.append(torch.cat([g.flatten() for g in torch.autograd.grad(loss, [head.weight, head.bias])])
                     .norm().item())
    assert table.last_layer_grad_norm[[3, 11]].tolist() == pytest.approx(norms, rel=1e-4)


def test_a_checkpoint_knows_the_settings_of_its_method(data, tmp_path):
    recipe = settings(epochs=2).train
    half = fit(recipe, data, RS2(0.5), folder=tmp_path / "rs2")
    assert fit(recipe, data, RS2(0.5), folder=tmp_path / "rs2").examples_seen == half.examples_seen
    with pytest.raises(ValueError, match="another training; made_with.r: 0.5 there, 0.7 here$"):
        fit(recipe, data, RS2(0.7), folder=tmp_path / "rs2")
    fit(recipe, data, Prune(data.train.ids, 100), folder=tmp_path / "prune")
    with pytest.raises(ValueError, match="made_with"):
        fit(recipe, data, Prune(data.train.ids.flip(0), 100), folder=tmp_path / "prune")


@pytest.mark.parametrize("change, text", [
    (dict(methods="dds,forgeting"), "did you mean 'forgetting'"),
    (dict(methods=","), "must be names, comma-separated"),
    (dict(budget=0.0), r"budget = 0.0"),
    (dict(mentor="wise"), "mentor = 'wise'"),
])
def test_bad_comparison(change, text):
    with pytest.raises(ValueError, match=text): settings(**change)


@pytest.mark.parametrize("change, text", [
    (dict(dev_size=0, methods="batchweight"), "batchweight: BatchWeight needs dev_batch"),
    (dict(dev_size=0, methods="dds"), "dds: DDS needs dev_batch"),
    (dict(budget=0.4, methods="dynams"), "dynams: budget = 0.4: a power schedule"),
    (dict(proxy=0.0, methods="dynams-proxy"), "dynams-proxy: proxy = 0.0: must be above 0"),
    (dict(budget=0.15, methods="rs2"),
     "rs2: batch_size = 64: must not exceed the 60 examples that RS2 visits in its smallest epoch"),
    (dict(budget=0.15, methods="forgetting"), "batch_size = 64: must not exceed the 60 examples"),
    (dict(epochs=0, steps=50), "epochs = 0"),
])
def test_a_comparison_that_cannot_end_does_not_begin(change, text):
    s = settings(**change)
    with pytest.raises(ValueError, match=text): check_methods(s, load_data(s.data))


@pytest.mark.parametrize("kw, text", [
    (dict(remove="1.0,500"), None), (dict(remove="0"), "remove = '0'"), (dict(remove="a,b"), "must be numbers"),
    (dict(scores=""), "must be names"), (dict(scores="loss"), "known are|did you mean"),
    (dict(keep_lowest_n=-1), "keep_lowest_n = -1"), (dict(score_seeds=0), "score_seeds = 0")])
def test_removal_recipe(kw, text):
    if text is None:
        assert RemovalRecipe(**kw).counts(600) == [1, 500]
        with pytest.raises(ValueError, match="500 must lie in 1..472 for 600 examples.*batch_size = 128"):
            RemovalRecipe(**kw).counts(600, 128)
    else:
        with pytest.raises(ValueError, match=text): RemovalRecipe(**kw)


def test_infobatch_needs_epochs(data):
    with pytest.raises(ValueError, match="InfoBatch needs epochs"):
        Training(Recipe(model="tiny_cnn", steps=50, batch_size=64), data, InfoBatch())


def test_every_setting_of_the_page_on_published_code_exists():
    "Its tables name in the fourth column what switches; and each recipe named there is one."
    book = json.loads((Path(__file__).parents[1] / "nbs" / "published.ipynb").read_text())
    rows = [line.split("|")[1:-1] for c in book["cells"] if c["cell_type"] == "markdown"
            for line in "".join(c["source"]).splitlines() if line.startswith("| ") and not line.startswith("| what")]
    named = {word for row in rows for word in re.findall(r"`([a-z_0-9]+)`", row[3])}
    known = {name for e in EXPERIMENTS.values() for name in e.known()}
    assert len(rows) > 50 and {len(row) for row in rows} == {5}
    assert named - known == {"unscored"} and len(named) > 25        # an argument of `sorted_ids`
