"""The explorer without a page: its files, what it offers, what it says of bad input, what it leaves behind."""
import shutil

import ipywidgets
import numpy as np
import pandas as pd
import pytest
import torch
from small_runs import INTENTS, LABELS, SENTENCES, recorded_run, translation_run
from waits import patience

from datasel_wb import chart_base
from datasel_wb.corruption import read_decisions
from datasel_wb.cards import _loss_chart
from datasel_wb.explorer import Explorer
from datasel_wb.review import edited_name, example_run, second_opinion
from datasel_wb.watch import _curves
from datasel_wb.widgets import _bar_chart

SMALL = dict(steps=20, warmup_steps=2, eval_every=10, save_every=10, log_every=10)


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    root = tmp_path_factory.mktemp("runs")
    example_run(root, name="one", seeds=2, **SMALL)
    example_run(root, name="two", noise=0.2, **SMALL)
    shutil.copytree(root / "one", root / "elsewhere")
    recipe = root / "elsewhere" / "recipe.json"
    recipe.write_text(recipe.read_text().replace('"dataset": "digits"', '"dataset": "mnist"'))
    return root


@pytest.fixture
def panel(root):
    panel = Explorer("one", root=root)
    yield panel
    panel.close()
    for name in ("one", "two"): (root / name / "decisions.csv").unlink(missing_ok=True)


def test_an_export_touches_no_file_of_the_run(panel, root):
    panel.select([1, 2])
    panel.mark("remove")
    for name in ("decisions.csv", "metrics.parquet"): panel.export(name)
    assert len(read_decisions(root / "one" / "decisions.csv")) == 2
    assert {p.name for p in (root / "one" / "exports").iterdir()} == {"decisions.csv", "metrics.parquet"}
    for name in ("../one.csv", "selection.txt", "/tmp/selection.csv"):
        with pytest.raises(ValueError, match="must be a plain name"): panel.export(name)


def test_the_panel_says_whom_it_asked_and_shows_how_far_they_are(panel):
    seen, panel.whom.options = [], {"in-sample": 0, "two": 2}
    panel.progress.observe(lambda change: seen.append((change.new, panel.progress.layout.display)), "value")
    panel.ask()
    said, own = panel.message.value, panel.records.frame.predicted.tolist()
    assert "in-sample: the network, which was trained on these labels" in said and not seen
    panel.whom.value = 2
    panel.ask()
    assert "held out: of 2 networks" in panel.message.value and panel.records.frame.predicted.tolist() != own
    values, shown = zip(*seen)
    assert values[-1] == 1 and list(values) == sorted(values) and set(shown) == {""} and len(values) > 4
    assert panel.progress.layout.display == "none" and list(panel.records.frame).count("predicted") == 1
    seen.clear()
    panel.ask()                                                        # the bar begins at its left end again
    assert seen[0] == (0, "none") and [v for v, _ in seen[1:]] == list(values)
    panel.records.frame["class"] = panel.records.frame.predicted       # as a network would say that knows them by heart
    panel.say(*second_opinion(panel.records.frame.predicted, panel.records.frame["class"]))
    assert chart_base.VERMILLION in panel.message.value and "learned wrong ones by heart" in panel.message.value
    with pytest.raises(ValueError, match="folds = 1"): panel.ask(folds=1)
    assert panel.progress.layout.display == "none"


def test_the_same_score_of_two_trainings_keeps_both_names(panel, root):
    panel.beside.value = "two"
    panel.x.score.value = panel.y.score.value = "margin"
    panel.y.training.value = "two/uniform-0"
    panel.y.score.value = "margin"
    panel.select(range(9))
    out = pd.read_csv(panel.export("both.csv"))
    other = pd.read_parquet(root / "two" / "uniform-0" / "examples.parquet").set_index("id").margin
    assert np.allclose(out["two/uniform-0/margin"], other[out.id]) and np.allclose(out.margin, panel.selection.margin)
    assert panel.scatter._now["names"] == ("margin", "two/uniform-0/margin")


def test_only_runs_on_the_same_data_are_laid_beside(panel):
    assert set(panel.beside.options) == {"(none)", "one", "two"}
    assert set(panel.run.options) == {"one", "two", "elsewhere"}


def test_tables_of_their_own_have_decisions_of_their_own(tmp_path):
    table = lambda names: pd.DataFrame({"loss": np.arange(4.0), "class": list(names)})
    first, second = Explorer(table("abab"), root=tmp_path), Explorer(table("bbaa"), root=tmp_path)
    first.select([0])
    first.mark("remove")
    assert len(second.decisions) == 0 and first.decisions.lock and second.decisions.lock
    for panel in (first, second): panel.close()
    again = Explorer(table("abab"), root=tmp_path)
    assert len(again.decisions) == 1
    again.close()


def test_who_goes_on_to_another_run_keeps_its_decisions(panel, root):
    panel.run.value = "two"
    other = Explorer("one", root=root)
    assert panel.decisions.lock and other.decisions.lock
    panel.select([3])
    panel.mark("keep")
    third = Explorer("two", root=root)
    assert panel.decisions.lock is None and "here you can only look" in panel.status.value
    assert "another explorer" in panel.message.value
    assert third.decisions.lock and len(third.decisions) == 1 and "would see 1 of" in third.status.value
    for p in (other, third): p.close()
    assert not {p for p in Explorer.open_files.values() if p in (other, third)}


def test_ticks_outlive_another_order_and_not_another_selection(panel):
    panel.select(range(20))
    panel.chosen.cards.picked = [4]
    panel.chosen.by.value, panel.chosen.down.value = "margin", False
    assert panel.chosen.cards.picked == [4] and "<b>1 ticked</b>" in panel.chosen.about.value
    panel.mark("keep")
    assert list(panel.decisions.rows) == [int(panel.records.frame["id"][4])]
    panel.chosen.cards.picked = [4]
    panel.select(range(10))
    assert panel.chosen.cards.picked == [] and "ticked" not in panel.chosen.about.value


def test_what_nobody_foresaw_is_said(panel, root, tmp_path):
    file = root / "one" / "uniform-0" / "history_loss.f32"
    whole = file.read_bytes()
    file.write_bytes(whole[:-7])
    panel.select(range(5))
    panel.chosen.cards.opened = 3
    assert "ValueError" in panel.message.value or "history_loss" in panel.message.value or "size" in panel.message.value
    file.write_bytes(whole)
    odd = Explorer(pd.DataFrame({"loss": [1.0, np.nan, 3], "class": ["a", None, "b"], "notes": [[1], [2], []]}),
                   root=tmp_path)
    assert set(odd.classes.options) == {"a", "b", "nan"} or set(odd.classes.options) == {"a", "b", "None"}
    odd.close()


def test_a_run_is_found_by_name_by_path_and_from_within(root, monkeypatch):
    monkeypatch.chdir(root / "two")
    for source, given in (("two", {"root": root}), (root / "two", {}), (".", {})):
        panel = Explorer(source, **given)
        assert panel.records.run == root / "two"
        panel.close()


def test_a_training_that_is_not_there_is_named(root):
    panel = Explorer("one", training="uniform-7", root=root)
    assert "training = &#x27;uniform-7&#x27;: must be one of uniform-0" in panel.message.value and panel.records is None
    panel.close()


def test_a_failed_training_says_why_and_the_panel_goes_on(panel, root):
    panel.select(range(len(panel.records.frame)))
    panel.mark("remove")
    panel.again.start()
    panel.again.waiting.join(patience(120))
    assert "the training failed" in panel.message.value and "must leave some" in panel.message.value
    assert not panel.again.start_button.disabled and panel.again.cancel_button.disabled
    panel.undo()
    panel.select(range(5))
    panel.mark("remove", reason="another one")
    panel.again.start()
    panel.again.waiting.join(patience(120))
    edited = edited_name(root / "one", root / "one" / "decisions.csv", 0)
    assert "is done" in panel.message.value and edited in panel.run.options and panel.run.value == "one"


def test_sentences_have_no_class_to_change(root, tmp_path):
    panel = Explorer(translation_run(tmp_path), root=tmp_path)
    panel.select([0])
    with pytest.raises(ValueError, match="have no class"): panel.mark("relabel", "az")
    panel.close()


# A loop of somebody else

@pytest.fixture(scope="module")
def foreign(tmp_path_factory):
    root = tmp_path_factory.mktemp("foreign")
    recorded_run(root, data=pd.DataFrame({"query": SENTENCES, "source": ["app", "mail"] * 6}))
    for target in ("multilabel", "regression", "tokens"): recorded_run(root, target)
    return root


def faces(panel) -> dict:
    "What the cards show, by row."
    return {c["row"]: c["text"] or c["pairs"] or "picture" for c in panel.chosen.cards.cards}


def test_a_foreign_run_opens_on_its_sentences(foreign):
    panel = Explorer(foreign / "recorded-class")
    assert panel.message.value == "" and panel.classes.options == tuple(sorted(INTENTS))
    assert (panel.x.score.value, panel.y.score.value) == ("confidence_spread", "confidence")
    panel.select([1, 7])
    assert faces(panel)[1] == SENTENCES[1]
    cut = faces(panel)[7]
    assert 280 < len(cut) <= 320 < len(SENTENCES[7]) and cut.endswith(" …") and SENTENCES[7].startswith(cut[:-1])
    panel.chosen.cards.opened = 7
    assert SENTENCES[7] in panel.chosen.opened.picture.value and "<td>mail</td>" in panel.chosen.opened.picture.value
    assert len(panel.chosen.opened.losses.children[0].rows) == 6             # its history
    panel.mark("relabel", "charge", "asked about both")
    decided = read_decisions(foreign / "recorded-class" / "decisions.csv").set_index("id")
    assert decided.index.tolist() == [1, 7] and decided.was[1] == "arrival" and decided.label[1] == "charge"
    out = pd.read_csv(panel.export("two.csv"))
    assert out.id.tolist() == [1, 7] and np.allclose(out.confidence, panel.selection.confidence)
    assert panel.asking.layout.display == "none" and panel.again.bar.layout.display == "none"
    assert "trained in a loop of your own" in panel.again.note.value
    with pytest.raises(ValueError, match="loop of your own"): panel.again.start()
    with pytest.raises(ValueError, match="must be a training of images"): panel.ask()
    assert "recorded-regression" not in panel.beside.options                 # other labels
    panel.run.value = "recorded-regression"                                  # and back, in one panel
    assert "was not kept with the run" in panel.message.value
    panel.close()


@pytest.mark.parametrize("target, axes, groups", [
    ("multilabel", ("confidence_spread", "confidence"), 0), ("regression", ("y", "residual"), 0),
    ("tokens", ("confidence_spread", "confidence"), 0)])
def test_what_has_no_classes_still_has_map_histogram_and_cards(foreign, target, axes, groups):
    panel = Explorer(f"recorded-{target}", SENTENCES, root=foreign)
    assert panel.message.value == "" and (panel.x.score.value, panel.y.score.value) == axes
    assert len(panel.classes.options) == groups and np.isfinite(panel._value(panel.x)).all()
    panel.select([2])
    assert faces(panel) == {2: SENTENCES[2]}
    panel.mark("remove")
    with pytest.raises(ValueError, match="have no class"): panel.mark("relabel", "x")
    panel.close()


def test_other_data_on_a_foreign_run(foreign, tmp_path):
    grey = torch.rand(12, 1, 8, 8)
    table = pd.DataFrame({f"f{k}": np.arange(12) / (k + 1) for k in range(11)})
    for data, face in ((grey, "picture"), (lambda id: f"number {id}", "number 5"), (table[["f0", "f1"]],
                       [["f0", "5"], ["f1", "2.5"]]), (table, [*([f"f{k}", f"{5 / (k + 1):.4g}"] for k in range(8)),
                                                              ["…", "3 more"]])):
        panel = Explorer("recorded-regression", data, root=foreign)
        panel.select([5])
        assert faces(panel)[5] == face and "was not kept" not in panel.message.value
        assert bool(panel.chosen.cards.sheet) == (face == "picture") and not panel.chosen.cards.cards[0]["missing"]
        panel.chosen.cards.opened = 5
        if data is table: assert "f10" in panel.chosen.opened.picture.value
        panel.close()
    for data, text in ((42, "data = int: must be texts"), (SENTENCES[:3], "3 for a full set of 12 examples")):
        panel = Explorer("recorded-regression", data, root=foreign)
        assert text in panel.message.value and panel.records is None and panel.scatter is None   # no hatched cards
        panel.close()


def test_a_table_shows_its_own_texts_or_rows(tmp_path):
    scores = pd.DataFrame({"loss": np.arange(12.0), "utterance": SENTENCES})
    rows = scores[["loss"]].assign(job="cook")
    for table, face in ((scores, SENTENCES[4]), (rows, [["loss", "4"], ["job", "cook"], ["id", "4"]])):
        panel = Explorer(table, root=tmp_path)
        panel.select([4])
        assert faces(panel)[4] == face
        panel.close()
    with pytest.raises(ValueError, match="data = int"): Explorer(scores, 42, root=tmp_path)
    with pytest.raises(ValueError, match="3 for 12 examples"): Explorer(scores, SENTENCES[:3], root=tmp_path)


def test_a_folder_is_found_by_any_path(foreign, monkeypatch):
    run = foreign / "recorded-tokens"
    monkeypatch.chdir(foreign.parent)
    within = f"{foreign.name}/recorded-tokens"
    for source in (run, str(run), within, f"./{foreign.name}/../{within}", run / "uniform-0"):
        panel = Explorer(source)
        assert panel.records.run == run and panel.root == foreign
        panel.close()
    for source in ("/no/such/run", "no/such/run", foreign):
        panel = Explorer(source)
        assert "no such folder" in panel.message.value or "no recipe.json" in panel.message.value
        panel.close()


def test_a_panel_that_is_closed_leaves_nothing(root):
    alive = lambda: len(ipywidgets.Widget.widgets) if isinstance(getattr(ipywidgets.Widget, "widgets", None),
                                                                 dict) else len(ipywidgets.widgets.widget._instances)
    before = alive()
    panel = Explorer("one", root=root)
    opened = alive()
    for name in ("two", "one") * 3: panel.run.value = name
    assert alive() == opened
    panel.close()
    assert alive() - before < 10


def test_what_the_small_charts_encode():
    curves = _curves("bleu").to_dict()
    assert [p["encoding"]["y"]["title"] for p in curves["hconcat"]] == [chart_base.Y_TITLES["loss"],
                                                                        chart_base.Y_TITLES["bleu"]]
    assert ([p["transform"] for p in curves["hconcat"]] == [[{"filter": f"(datum.panel === '{name}')"}]
                                                            for name in ("loss", "metric")])
    assert curves["data"] == {"name": "rows"} and curves["hconcat"][0]["encoding"]["x"]["field"] == "step"
    bars = _bar_chart((-1.0, 3.0), "margin", (300, 100)).to_dict()
    x, y = bars["encoding"]["x"], bars["encoding"]["y"]
    assert (x["field"], bars["encoding"]["x2"]["field"], y["field"], bars["encoding"]["y2"]["field"]) == (
        "low", "high", "base", "top")
    assert x["scale"]["domain"] == [-1.0, 3.0] and x["title"] == "margin" and bars["params"][0]["name"] == "brush"
    loss = _loss_chart().to_dict()["encoding"]
    assert (loss["x"]["field"], loss["y"]["field"], loss["y"]["title"]) == ("presentation", "loss", "loss, nats")
