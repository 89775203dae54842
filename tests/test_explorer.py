"""The explorer without a page: its files, what it offers, what it says of bad input, what it leaves behind."""
import shutil

import ipywidgets
import numpy as np
import pandas as pd
import pytest
from small_runs import translation_run
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
