"""The live view: what a training tells those who watch, what a folder says, and a thread that ends."""
import json
import os
import platform
import re
import shutil
import signal
import subprocess
import sys
import time
from dataclasses import replace

import numpy as np
import pandas as pd
import pytest
import torch

from datasel_wb.core import Batch
from datasel_wb.datasets import DataRecipe, load_data
from datasel_wb.scorer import DDS, Scorer
from datasel_wb.selectors import Uniform
from datasel_wb.backends import Eager
from datasel_wb.checkpoints import write_frame
from datasel_wb.loop import Recipe, Training
from datasel_wb.report import Live, MetricLog, Report
from datasel_wb.trainer import fit
from small_runs import translation_run
from waits import patience

from datasel_wb.watch import LiveView, alive, curve_points, look, read_rows

RECIPE = Recipe(model="tiny_cnn", steps=60, batch_size=64, warmup_steps=5, log_every=10, eval_every=20, save_every=20)


@pytest.fixture(scope="module")
def digits():
    return load_data(DataRecipe(dataset="digits", dev_size=250, noise=0.2))


class At(Eager):
    "Calls `what` in one step, or in each."
    def __init__(self, what, step=None):
        super().__init__("cpu")
        self.what, self.step, self.count = what, step, 0

    def apply(self, *args):
        self.count += 1
        if self.step in (None, self.count): self.what()
        super().apply(*args)


def fail(): raise RuntimeError("out of power")
def stop(): os.kill(os.getpid(), signal.SIGTERM)


def broken(folder, digits, what=fail, step=45, recipe=RECIPE):
    "The state of a training that ends in this step."
    with pytest.raises((RuntimeError, SystemExit, KeyboardInterrupt)):
        fit(recipe, digits, folder=folder, backend=At(what, step))
    return look(folder)


@pytest.fixture
def whole(tmp_path_factory, digits):
    folder = tmp_path_factory.mktemp("whole") / "uniform-0"
    return fit(RECIPE, digits, folder=folder), folder


def test_while_it_trains_the_folder_says_what_the_log_has(tmp_path, digits):
    seen, training = [], {}
    def watch():
        seen.append((look(tmp_path / "a"), read_rows(tmp_path / "a"), training["it"].log.frame()))
    backend = At(watch)
    class Kept(Training):
        def __init__(self, *args):
            training["it"] = self
            super().__init__(*args)
    fit(RECIPE, digits, folder=tmp_path / "a", backend=backend, kind=Kept)
    assert {s.phase for s, *_ in seen} == {"running"}
    assert [s.step for s, *_ in seen] == [k // 10 * 10 for k in range(60)]
    for state, rows, logged in seen:
        pd.testing.assert_frame_equal(rows, logged.astype({"step": int}) if len(logged) else rows, check_dtype=False)
        assert state.steps == 60 and (state.left is None) == (state.step == 0)
    assert not list((tmp_path / "a").glob("live.*")) and look(tmp_path / "a").phase == "done"


def test_extremes_are_those_of_the_records(digits):
    for method, by in ((Uniform(), "loss"), (DDS(Scorer.like(RECIPE.build(digits.train, 9)), lr=0.01), "weight")):
        training = Training(RECIPE, digits, method)
        assert Report(training).extremes()["highest"] == []
        for _ in range(20): training.step()
        table, found = training.dynamics.table(), Report(training).extremes(5)
        table = table[table["presentations"] > 0]
        assert found["by"] == by
        for end, order in (("highest", table.nlargest), ("lowest", table.nsmallest)):
            assert [e["value"] for e in found[end]] == pytest.approx(order(5, f"{by}_last")[f"{by}_last"].tolist())
            for e in found[end]:
                assert table.set_index("id")[f"{by}_last"][e["id"]] == pytest.approx(e["value"])
                assert e["class"] == digits.train.classes[digits.train.y[at := digits.train.ids.tolist()
                                                                         .index(e["id"])]]
                assert e["noisy"] == bool(digits.train.noisy[at])


def test_a_failure_is_told_and_the_resume_begins_at_its_checkpoint(tmp_path, digits, whole):
    state = broken(tmp_path, digits)
    assert (state.phase, state.step, state.message) == ("failed", 44,
                                                        "failed at step 44 of 60: RuntimeError: out of power")
    assert state.rows["step"].max() == 40
    steps = []
    def watch(): steps.append((read_rows(tmp_path)["step"].max(), look(tmp_path).rate))
    fit(RECIPE, digits, folder=tmp_path, backend=At(watch))
    assert [s for s, _ in steps] == [40] * 10 + [50] * 10 and steps[0][1] is None and steps[-1][1] > 0
    a, b = (read_rows(f).drop(columns="seconds") for f in (tmp_path, whole[1]))
    pd.testing.assert_frame_equal(a, b, check_exact=True)
    assert look(tmp_path).phase == "done"


def test_rows_past_the_checkpoint_are_cut_at_the_resume(tmp_path, digits):
    broken(tmp_path, digits, step=58)
    assert read_rows(tmp_path)["step"].max() == 50
    def watch(): told.append(read_rows(tmp_path))
    told = []
    fit(RECIPE, digits, folder=tmp_path, backend=At(watch, 1))
    assert told[0]["step"].max() == 40 and not told[0].duplicated(["step", "split", "name"]).any()


@pytest.mark.parametrize("what, step", [(stop, 45), (signal.raise_signal, 45)])
def test_stopped(tmp_path, digits, what, step):
    before = signal.signal(signal.SIGINT, signal.default_int_handler)   # a job in the background ignores it
    try: state = broken(tmp_path, digits, stop if what is stop else lambda: signal.raise_signal(signal.SIGINT), step)
    finally: signal.signal(signal.SIGINT, before)
    assert state.phase == "stopped" and state.step in (44, 45) and "the same command goes on" in state.message


def test_with_epochs_the_place_in_the_schedule_counts(tmp_path, digits):
    seen = []
    fit(replace(RECIPE, epochs=4, stop_epoch=2), digits, folder=tmp_path,
        backend=At(lambda: seen.append(look(tmp_path))))
    per_epoch = len(digits.train) // 64
    assert seen[-1].steps == 2 * per_epoch and 0 <= seen[-1].step < seen[-1].steps and len(seen) == 2 * per_epoch


def test_nothing_is_told_without_a_folder_or_by_another_process(tmp_path, digits, monkeypatch):
    monkeypatch.chdir(tmp_path)
    fit(RECIPE, digits)
    assert not list(tmp_path.iterdir())
    training = Training(RECIPE, digits)
    training.log = MetricLog(tmp_path, write=False)
    monkeypatch.setattr(type(training.backend.collectives), "main", False)
    with Live(Report(training), tmp_path) as live: live.tell()
    assert not list(tmp_path.iterdir())


def test_a_disk_that_refuses_costs_the_view_and_not_the_training(tmp_path, digits, monkeypatch, whole):
    def full(self): raise OSError(28, "No space left on device")
    monkeypatch.setattr(Live, "_write", full)
    with pytest.warns(UserWarning, match="cannot be watched"): training = fit(RECIPE, digits, folder=tmp_path)
    assert all(torch.equal(a, b) for a, b in zip(training.model.parameters(), whole[0].model.parameters()))


SCRIPT = """
import sys
from datasel_wb.datasets import DataRecipe, load_data
from datasel_wb.loop import Recipe
from datasel_wb.trainer import fit
recipe = Recipe(model="tiny_cnn", steps=100_000, batch_size=64, log_every=10)
fit(recipe, load_data(DataRecipe(dataset="digits", dev_size=250)), folder=sys.argv[1])
"""


def wait_for(condition, seconds=patience(60)):
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, "waited in vain"
        time.sleep(0.02)


def test_another_process_is_followed_and_its_death_is_seen(tmp_path):
    folder = tmp_path / "elsewhere-0"
    view = LiveView(folder, every=0.05)
    assert view.state.phase == "waiting" and "does not exist yet" in view.head.value
    process = subprocess.Popen([sys.executable, "-c", SCRIPT, str(folder)], stdout=subprocess.DEVNULL,
                               env=os.environ | {"OMP_NUM_THREADS": "1"})
    try:
        wait_for(lambda: view.state.step >= 20)
        assert view.state.phase == "running" and "running" in view.head.value and 0 < view.bar.value < 1
    finally: process.kill()
    wait_for(lambda: view.state.phase == "gone")   # also while nobody has waited for the dead process
    process.wait()
    assert f"its process {process.pid} is gone" in look(folder).message and view.thread.is_alive()
    view.close()
    assert not view.thread.is_alive()


def test_numbers_of_processes_are_given_anew():
    me = os.getpid(), platform.node()
    assert alive(*me, time.time()) and alive(*me, 0) is False and alive(1, "elsewhere", 0) is None


def tell(folder, **changes):
    "A `live.json` as a training of this process leaves it, with changes; None takes a field away."
    folder.mkdir(parents=True, exist_ok=True)
    facts = {"status": "running", "message": "", "step": 20, "steps": 80, "start": 0, "seconds": 1.0,
             "began": time.time() - 10, "time": time.time(), "pid": os.getpid(), "host": platform.node(),
             "shown": {"dev": "91%"}, "by": "loss", "highest": [], "lowest": []} | changes
    (folder / "live.json").write_text(json.dumps({k: v for k, v in facts.items() if v is not None}))


def test_speed_and_time_left(tmp_path):
    tell(tmp_path, start=10)
    state = look(tmp_path)
    assert state.rate == pytest.approx(1, rel=0.01) and state.left == pytest.approx(60, rel=0.01)
    tell(tmp_path, host="elsewhere", time=time.time() - 500, began=time.time() - 600)
    assert look(tmp_path).phase == "running"
    assert re.search(r"last heard of 50\d s ago, on elsewhere", look(tmp_path).message)


@pytest.mark.parametrize("rest, steps", [("", 2), ("30,1,1920,0.9,train,loss,1.", 2),
                                         ('30,1,1920,0.9,train,"weight/class/a', 2), ("\n", 2)])
def test_half_a_line_is_not_yet_there(tmp_path, rest, steps):
    tell(tmp_path)
    (tmp_path / "live.csv").write_text(
        "10,1,640,0.3,train,loss,2.5\n20,1,1280,0.6,train,\"weight/class/a, b\",nan\n" + rest)
    rows = look(tmp_path).rows
    assert rows["step"].tolist() == [10, 20]
    assert rows["name"].tolist() == ["loss", "weight/class/a, b"]
    assert rows["value"].isna().tolist() == [False, True]


def test_a_class_may_be_called_none(tmp_path):
    (tmp_path / "live.csv").write_text("10,1,640,0.3,train,NA,2.5\n")
    assert read_rows(tmp_path)["name"].tolist() == ["NA"]


BAD = {
    "live.json: cannot be read": lambda f: (f / "live.json").write_text('{"status": "run'),
    "live.json: another version wrote it (KeyError: 'steps')": lambda f: tell(f, steps=None),
    "live.json: another version wrote it (TypeError": lambda f: (f / "live.json").write_text("[1]"),
    "its records cannot be read": lambda f: (tell(f),
                                             (f / "live.csv").write_text("a,b\n" * 3 + "1,2,3,4,5,6,7,8,9,10\n")),
    "its records cannot be read ": lambda f: ((f / "tb").mkdir(), (f / "metrics.parquet").write_bytes(b"PAR1")),
    "nothing was saved yet": lambda f: (f / "checkpoints").mkdir(),
    "neither a training nor a run": lambda f: (f / "notes.txt").write_text("x"),
    "0 trainings done; waiting for the next": lambda f: (f / "recipe.json").write_text("{}"),
}


@pytest.mark.parametrize("said", BAD)
def test_whatever_lies_in_a_folder_the_answer_is_a_sentence(tmp_path, said):
    BAD[said](tmp_path)
    state = look(tmp_path)
    assert said.strip() in state.message and "\n" not in state.message
    view = LiveView(tmp_path, every=0.05)
    assert said.strip() in view.head.value.replace("&#x27;", "'") and view.others.value == ""
    view.close()


def test_a_folder_of_an_earlier_version_shows_its_records(tmp_path, whole):
    _, folder = whole
    shutil.copytree(folder, tmp_path / "a")
    assert look(tmp_path / "a").phase == "done" and look(tmp_path / "a").by == "loss"
    assert len(look(tmp_path / "a").highest) == 8
    (tmp_path / "a" / "examples.parquet").unlink()   # as an earlier version leaves it in mid-training
    state = look(tmp_path / "a")
    assert state.phase == "unknown" and "saved up to step 60" in state.message
    assert len(state.rows) == len(look(folder).rows)
    old = pd.DataFrame({"id": [0, 1], "loss_mean": [1.0, 2.0]})   # lacks the columns of today
    write_frame(old, tmp_path / "a" / "examples.parquet")
    assert look(tmp_path / "a").phase == "done" and look(tmp_path / "a").highest == []
    tell(tmp_path / "a", pid=2**22 + 1)   # killed after its records were written
    assert look(tmp_path / "a").phase == "done"


def test_a_run_is_followed_to_its_end(tmp_path, whole):
    run = tmp_path / "run"
    run.mkdir()
    (run / "recipe.json").write_text("{}")
    (run / ".owner").write_text(f"process {os.getpid()} on {platform.node()}")
    view = LiveView(run, every=0.05)
    shutil.copytree(whole[1], run / "uniform-0")
    wait_for(lambda: view.state.finished)
    assert view.state.phase == "waiting" and view.state.message == "1 training done; waiting for the next training"
    tell(run / "dds-0")
    wait_for(lambda: view.state.phase == "running")
    assert view.state.name == "dds-0" and list(view.state.finished) == ["uniform-0"]
    assert "1 finished" in view.others.value
    top1 = read_rows(whole[1]).query("split == 'test' and name == 'top1'")["value"].iloc[-1]
    assert view.state.finished["uniform-0"] == f"{top1:.1f} %"
    tell(run / "dds-0", status="failed", message="ValueError: no")
    wait_for(lambda: view.state.phase == "failed")
    shutil.rmtree(run / "dds-0")
    shutil.copytree(whole[1], run / "dds-0")
    (run / ".owner").write_text(f"process {2**22 + 1} on {platform.node()}")
    wait_for(lambda: view.state.phase == "gone")
    assert view.thread.is_alive() and "the run's process is gone" in view.state.message
    (run / "result.json").write_text("{}")
    view.thread.join(patience(10))
    assert not view.thread.is_alive()
    assert view.state.message == "the run is finished; 2 trainings done"
    assert view.state.phase == "done"


def test_a_view_of_a_finished_training_has_no_thread_and_shows_what_was_logged(whole, digits):
    training, folder = whole
    view = LiveView(folder, split=digits.train)
    assert view.thread.ident is None and view.bar.bar_style == "success" and view.ends.value.count("<img") == 2
    shown = pd.DataFrame(view.chart.rows)
    log = training.log.frame()
    for panel, name in (("loss", "loss"), ("metric", "top1")):
        for split, rows in log[log["name"] == name].groupby("split"):
            points = shown[(shown["panel"] == panel) & (shown["line"] == split)]
            assert points["step"].tolist() == rows["step"].tolist()
            assert points["value"].tolist() == rows["value"].tolist()
    assert len(shown) == 6 + 3 + 3 + 3 + 3
    view.close()
    view.close()


def test_long_logs_are_thinned_with_both_ends_kept():
    rows = pd.DataFrame({"step": range(10_000), "split": "train", "name": "loss", "value": 1.0})
    rows.loc[5000, "value"] = float("nan")
    steps = [p["step"] for p in curve_points(rows)]
    assert len(steps) == 400 and steps[0] == 0 and steps[-1] == 9999 and curve_points(rows.iloc[:0]) == []


def test_wrong_arguments_are_refused_and_a_wrong_split_is_told(tmp_path, digits, whole):
    with pytest.raises(ValueError, match="every = 0: must be"): LiveView(tmp_path, every=0)
    class Floats:
        ids = torch.arange(1)
        def take(self, ids): return Batch(torch.zeros(1, 1, 2, 2), None, ids)
    with pytest.raises(ValueError, match="images: must be uint8"): LiveView(tmp_path, split=Floats())
    class Short:
        ids = digits.train.ids[:1]
        def take(self, ids): return digits.train.take(ids)
    view = LiveView(whole[1], split=Short())
    assert "split: has no example with id" in view.others.value


def test_close_ends_the_thread_also_at_once(tmp_path):
    view = LiveView(tmp_path / "nothing", every=100)
    start = time.time()
    view.close()
    assert not view.thread.is_alive() and time.time() - start < 50


def test_costly_looks_become_rare(tmp_path, monkeypatch):
    "At most a fiftieth of a core: a look of 20 ms of work is followed by a second of rest, however short `every` is."
    looks = []
    def costly(self):
        looks.append(time.monotonic())
        end = time.thread_time() + 0.02
        while time.thread_time() < end: pass
    view = LiveView(tmp_path / "later", every=0.01)
    monkeypatch.setattr(LiveView, "update", costly)
    wait_for(lambda: len(looks) >= 3)
    view.close()
    pauses = np.diff(looks)
    assert len(looks) >= 3 and pauses.min() >= 1.0


def test_a_translation_shows_its_bleu(tmp_path):
    run = translation_run(tmp_path)
    view = LiveView(run / "uniform-0")
    assert view.state.phase == "done"
    assert {p["panel"] for p in view.chart.rows} == {"loss", "metric"}
    assert '"BLEU"' in json.dumps(view.chart.spec)
    assert "BLEU" in LiveView(run).others.value and "language" not in view.others.value
    # the highest and the lowest losses, with their languages
    assert view.ends.value.count("<b>") == 2 and "(az" in view.ends.value
