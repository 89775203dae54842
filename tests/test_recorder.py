"""Records of loops of one's own: folders that say what an independent computation says, and open like any other."""
import copy
import io
import json
import shutil
from types import SimpleNamespace

import numpy as np
import pandas as pd
import pytest
import torch
import torch.nn.functional as F
from PIL import Image
from small_runs import INTENTS, LABELS, SENTENCES, recorded_run
from torch import nn
from torch.utils.data import Dataset, IterableDataset

from datasel_wb import charts, result_charts, runs
from datasel_wb.core import Batch
from datasel_wb.hosts import Guest, follow, guest_state, load_guest
from datasel_wb.recorder import OPEN, Recorder
from datasel_wb.review import find_runs, read_training, retrain, same_data, trainings_of
from datasel_wb.selectors import Task
from datasel_wb.shown import as_picture, as_shown, keep_shown, part_of, read_shown
from datasel_wb.watch import look
from datasel_wb.weighting import DataParameters, Sigma

TABLE = pd.DataFrame({"age": np.arange(20, 32), "job": ["cook", "nurse", "clerk"] * 4,
                      "balance": np.linspace(-3, 4, 12)})


def words(texts):
    "Counts of words, [N, V] float64."
    known = sorted({w for t in texts for w in t.lower().split()})
    return torch.tensor([[t.lower().split().count(w) for w in known] for t in texts], dtype=torch.float64)


def loop(recorder, x, y, losses_of, epochs=12, out=3):
    "Plain training in float64; the losses and hits of every example, by hand."
    torch.manual_seed(1)
    model = nn.Linear(x.shape[1], out).double()
    opt = torch.optim.SGD(model.parameters(), lr=0.5)
    kept, g = [([], []) for _ in y], torch.Generator().manual_seed(2)
    for _ in range(epochs):
        for idx in torch.randperm(len(y), generator=g)[:10].split(5):   # two of twelve are left out, others each time
            logits = model(x[idx])
            losses = losses_of(logits, y[idx])
            opt.zero_grad()
            losses.mean().backward()
            opt.step()
            recorder.record(idx, logits, losses, y[idx])
            for i, l, out_i in zip(idx.tolist(), losses.tolist(), logits.tolist()):
                kept[i][0].append(l)
                kept[i][1].append(bool(np.argmax(out_i) == y[i]) if y.ndim == 1 and not y.is_floating_point() else None)
    return kept, model


def forgotten(hits: list) -> int:
    "Events of being right, then wrong; all presentations, where it was never right (Toneva et al.)."
    return sum(a and not b for a, b in zip(hits, hits[1:])) if any(hits) else len(hits)


@pytest.mark.parametrize("kind", ["text", "table"])
def test_a_folder_says_what_an_independent_computation_says(kind, tmp_path):
    y = torch.tensor(LABELS)
    y[5], y[9] = 0, 1
    x = words(SENTENCES) if kind == "text" else torch.tensor(TABLE[["age", "balance"]].to_numpy(float)) / 10
    data = SENTENCES if kind == "text" else TABLE
    with Recorder(tmp_path / "mine", y, classes=INTENTS, noisy=[i in (5, 9) for i in range(12)], data=data, history=12,
                  log_every=4) as recorder:
        kept, _ = loop(recorder, x, y, lambda a, b: F.cross_entropy(a, b, reduction="none"))
    records = read_training(tmp_path / "mine")
    frame = records.frame
    assert frame["id"].tolist() == list(range(12)) and frame["class"].tolist() == [INTENTS[c] for c in y]
    assert frame.presentations.tolist() == [len(l) for l, _ in kept] and frame.noisy.sum() == 2
    assert np.allclose(frame.loss_mean, [np.mean(l) for l, _ in kept], rtol=1e-6)
    assert np.allclose(frame.loss_last, [l[-1] for l, _ in kept], rtol=1e-6)
    assert frame.forgetting.tolist() == [forgotten(h) for _, h in kept]
    assert np.allclose(frame.correct_mean, [np.mean(h) for _, h in kept])
    assert np.allclose(records.history(3), kept[3][0], rtol=1e-6)
    assert records.shown.kind == {"text": "text", "table": "row"}[kind]
    assert records.shown.take([7]) == ([SENTENCES[7]] if kind == "text" else TABLE.iloc[[7]].to_dict("records"))
    rows = pd.read_parquet(tmp_path / "mine" / "metrics.parquet").query("name == 'loss'")
    assert rows.step.tolist() == [4, 8, 12, 16, 20, 24] and rows.examples_seen.tolist()[-1] == 120
    total = sum(sum(l) for l, _ in kept)
    assert abs(rows.value.mean() * 120 - total) < 1e-4 * total          # six means of twenty losses each


LOSS = {"multilabel": lambda a, b: F.binary_cross_entropy_with_logits(a, b, reduction="none").mean(1),
        "regression": lambda a, b: (a[:, 0] - b) ** 2}


@pytest.mark.parametrize("target", LOSS)
def test_other_targets_keep_their_losses(target, tmp_path):
    g = torch.Generator().manual_seed(0)
    y = torch.rand(12, 3, generator=g).round() if target == "multilabel" else torch.rand(12, generator=g)
    y, out = y.double(), 3 if target == "multilabel" else 1
    with Recorder("r", y, target=target, classes=INTENTS if out == 3 else None, root=tmp_path) as recorder:
        kept, _ = loop(recorder, words(SENTENCES), y, LOSS[target], out=out)
    frame = read_training(recorder.run).frame
    assert np.allclose(frame.loss_mean, [np.mean(l) for l, _ in kept], rtol=1e-6) and "class" not in frame
    if target == "regression": assert np.allclose(frame.y, y)
    else: assert frame["labels"][0] == ", ".join(n for n, on in zip(INTENTS, y[0]) if on)


def test_sequences_are_recorded_by_the_loss_of_the_tokens_that_count(tmp_path):
    g = torch.Generator().manual_seed(0)
    logits, y = torch.randn(4, 5, 7, generator=g), torch.randint(7, (4, 5), generator=g)
    y[1, 2:] = -100
    with Recorder("r", n=4, target="tokens", root=tmp_path) as recorder: recorder.record([0, 1, 2, 3], logits, y=y)
    by_hand = [np.mean([-F.log_softmax(logits[i, t].double(), 0)[y[i, t]].item() for t in range(5) if y[i, t] >= 0])
               for i in range(4)]
    assert np.allclose(read_training(recorder.run).frame.loss_mean, by_hand, rtol=1e-5)


def test_labels_that_nobody_gave_are_learned_from_the_steps(tmp_path):
    with Recorder("r", n=5, root=tmp_path) as recorder:
        recorder.record(torch.tensor([3, 0]), torch.eye(2), None, torch.tensor([1, 0]))
        recorder.record((torch.zeros(1), torch.tensor([1]), torch.tensor([4])), torch.eye(2)[1:])
    frame = read_training(recorder.run).frame
    assert frame["class"].tolist() == ["0", "unknown", "unknown", "1", "1"]
    assert frame.presentations.tolist() == [1, 0, 0, 1, 1]
    assert frame.correct_mean.isna().tolist() == [False, True, True, False, False] and frame.correct_mean[4] == 1


def test_a_method_is_recorded_with_its_weights_and_scores(tmp_path):
    x, y = words(SENTENCES).float(), torch.tensor(LABELS)
    torch.manual_seed(0)
    model = nn.Linear(x.shape[1], 3)
    opt = torch.optim.SGD(model.parameters(), lr=0.5)
    sel = DataParameters(inst=Sigma(lr=1.0)).bind(Task(model, n=12, n_classes=3, steps=9))
    with Recorder("r", y, method="data_parameters", selector=sel, root=tmp_path) as recorder:
        for _ in range(9):
            b = Batch(x, y, torch.arange(12))
            sel.loss(model(b.x), b).backward()
            opt.step()
            opt.zero_grad()
            sel.after_step(b)
            recorder.record(b, sel.seen)
    frame = read_training(recorder.run).frame
    assert np.allclose(frame["sigma/inst"], sel.report()["sigma/inst"].detach()) and frame.weight_mean.notna().all()
    assert trainings_of(recorder.run) == ["data_parameters-0"]


def test_tables_and_charts_open_it_like_a_run_of_the_project(tmp_path):
    for method in ("uniform", "mine"):
        for seed in (0, 1):
            with Recorder("r", LABELS, method=method, seed=seed, root=tmp_path, log_every=1) as recorder:
                for k in range(3):
                    recorder.record(torch.arange(12), torch.eye(3)[LABELS] * k)
                    recorder.metric("top1", 50 + k + 10 * seed + (method == "mine"), split="test")
    recorded_run(tmp_path)
    found = runs.table(tmp_path)
    assert found.run.tolist() == ["r", "r"] and found.n.tolist() == [2, 2] and found.metric.unique() == ["accuracy, %"]
    assert found.set_index("method")["mean"].to_dict() == {"uniform": 57.0, "mine": 58.0}
    assert found.set_index("method")["diff"]["mine"] == 1 and found.examples.tolist() == [36, 36]
    assert "57.0 ± 7.1" in runs.results_text(runs.read_results(tmp_path / "r"))
    metrics, examples = (pd.read_parquet(tmp_path / "r" / f"{k}.parquet") for k in ("metrics", "examples"))
    assert len(examples) == 48 and set(examples.method) == {"uniform", "mine"}
    assert "layer" in charts.curves(metrics).to_dict() and charts.weights_over_time(metrics, "class", method="mine")
    assert result_charts.score_histogram(examples[examples.seed == 0], "margin", method="mine")
    assert sorted(find_runs(tmp_path)) == ["r", "recorded-class"]
    assert look(tmp_path / "r").phase == "done" and "4 trainings" in look(tmp_path / "r").message


def test_another_metric_is_compared_when_it_is_named(tmp_path):
    for seed, value in ((0, 2.0), (1, 4.0)):
        with Recorder("r", n=2, target="regression", result="rmse", seed=seed, root=tmp_path) as recorder:
            recorder.record([0, 1], torch.rand(2), y=torch.rand(2))
            recorder.metric("rmse", value, split="test")
            recorder.metric("rmse", 9.0, split="dev")
    table = runs.table(tmp_path)
    assert table["mean"].tolist() == [3.0] and table.metric.tolist() == ["rmse"]
    assert "rmse" in runs.results_text(runs.read_results(tmp_path / "r"))


def test_a_resume_from_the_hosts_checkpoint_records_the_same(tmp_path):
    g, steps = torch.Generator().manual_seed(0), []
    for _ in range(8): steps.append((torch.randperm(12, generator=g)[:6], torch.randn(6, 3, generator=g)))
    def run(name, n, state=None, **more):
        recorder = Recorder(name, n=12, history=5, root=tmp_path, log_every=3, **more)
        if state is not None: recorder.load_state_dict(state)
        y = torch.tensor(LABELS)
        for idx, logits in steps[recorder.step:n]: recorder.record(idx, logits, y=y[idx])
        return recorder
    whole, part = run("whole", 8), run("part", 5)
    part.save()
    torch.save(part.state_dict(), tmp_path / "state.pt")
    with pytest.raises(ValueError, match="holds the records of uniform-0 already; go on from them"): run("part", 8)
    for r in (whole, again := run("part", 8, torch.load(tmp_path / "state.pt", weights_only=True))): r.close()
    a, b = (pd.read_parquet(r.folder / "examples.parquet") for r in (whole, again))
    pd.testing.assert_frame_equal(a, b, check_exact=True)
    a, b = (pd.read_parquet(r.folder / "metrics.parquet").drop(columns="seconds") for r in (whole, again))
    pd.testing.assert_frame_equal(a, b, check_exact=True)
    assert np.array_equal(*(read_training(r.run).history(0) for r in (whole, again)))
    with pytest.raises(ValueError, match="state: records of 12 examples; must be of 7"):
        Recorder("other", n=7, root=tmp_path).load_state_dict(again.state_dict())


def guest(records, at=0, until=9, state=None):
    "A loop with a method in it that an adapter would drive; the adapter's part, and its state after each step."
    torch.manual_seed(0)
    x, y, model = words(SENTENCES).float(), torch.tensor(LABELS), nn.Linear(4, 3)
    x, opt = x[:, :4] + torch.randn(12, 4), torch.optim.SGD(model.parameters(), lr=0.5)
    inside = Guest(DataParameters(inst=Sigma(lr=5.0)), records)
    inside.bind(Task(model, n=12, n_classes=3))
    follow(inside, opt)
    if state is not None:
        model.load_state_dict(state[0])
        load_guest(inside, state[1])
    for k in range(at, until):
        idx = torch.randperm(12, generator=torch.Generator().manual_seed(k))[:7]
        inside.loss(model(x[idx]), (x[idx], y[idx], idx)).backward()
        opt.step()
        opt.zero_grad()
    return inside, (copy.deepcopy(model.state_dict()), guest_state(inside))


def test_an_adapter_writes_into_the_folder_of_a_recorder(tmp_path):
    plain, _ = guest(True)
    with Recorder("r", LABELS, data=SENTENCES, root=tmp_path, log_every=3) as recorder: inside, _ = guest(recorder)
    frame, by_hand = read_training(recorder.run).frame, plain.records.table()
    pd.testing.assert_frame_equal(frame[list(by_hand)], by_hand, check_dtype=False)
    assert inside.records is recorder
    assert np.allclose(frame["sigma/inst"], plain.selector.report()["sigma/inst"]) and frame["sigma/inst"].nunique() > 9
    _, state = guest(Recorder("half", LABELS, root=tmp_path), until=5)
    torch.save(state, tmp_path / "state.pt")
    state = torch.load(tmp_path / "state.pt", weights_only=True)
    with Recorder("again", LABELS, root=tmp_path) as again: guest(again, 5, state=state)
    pd.testing.assert_frame_equal(read_training(again.run).frame[list(by_hand)], by_hand, check_dtype=False)
    with pytest.raises(ValueError, match="has records of a Recorder, this training records: must be alike"):
        guest(True, state=state)
    with pytest.raises(ValueError, match="^records is a str: must be True, a Dynamics or a Recorder$"): guest("r")
    several = Recorder("several", LABELS, root=tmp_path)
    several.dynamics.collectives = SimpleNamespace(world=2)
    with pytest.raises(ValueError, match="^records: the Recorder was made in 2 processes, the training is in 1: must"):
        guest(several)


def test_what_was_saved_outlives_the_process(tmp_path, monkeypatch):
    recorder = Recorder("r", LABELS, root=tmp_path, save_every=1e-9)
    for _ in range(3): recorder.record(torch.arange(12), torch.zeros(12, 3))
    frame = pd.read_parquet(recorder.folder / "examples.parquet")          # nobody has called save
    assert frame.presentations.tolist() == [3] * 12 and look(recorder.run).phase != "done"
    monkeypatch.setattr("os.replace", lambda *_: (_ for _ in ()).throw(OSError(28, "No space left on device")))
    with pytest.raises(OSError, match="cannot save examples.parquet"): recorder.save()
    monkeypatch.undo()
    pd.testing.assert_frame_equal(frame, pd.read_parquet(recorder.folder / "examples.parquet"))
    with pytest.raises(RuntimeError):
        with recorder: raise RuntimeError("of the host")
    assert not (recorder.run / "result.json").exists()


def test_a_cell_run_twice_needs_a_word(tmp_path):
    first = Recorder("r", LABELS, root=tmp_path)
    first.record(torch.arange(12), torch.zeros(12, 3))
    second = Recorder("r", LABELS, root=tmp_path)                           # takes over; the first is saved
    assert OPEN[second.folder] is second and (second.folder / "examples.parquet").exists()
    with pytest.raises(ValueError, match="overwrite=True"): second.record(torch.arange(12), torch.zeros(12, 3))
    with Recorder("r", LABELS, root=tmp_path, overwrite=True) as third:
        third.record(torch.arange(12), torch.zeros(12, 3))
    assert read_training(third.run).frame.presentations.tolist() == [1] * 12


def test_runs_on_the_same_labels_are_laid_beside(tmp_path):
    a, b = recorded_run(tmp_path), recorded_run(tmp_path, "regression")
    shutil.copytree(a, tmp_path / "again")
    assert same_data(a, tmp_path / "again") and not same_data(a, b)
    with pytest.raises(ValueError, match="trained in a loop of your own"): retrain(a, tmp_path / "none.csv")


EYE = torch.eye(3)[LABELS]


@pytest.mark.parametrize("make, text", [
    (dict(), r"^n: not known; give y, the labels of all examples, or their number n$"),
    (dict(n=0), "n = 0: must be a whole number, 1 or more"),
    (dict(y=LABELS, n=11), "n = 11: must be 12, the number of labels in y"),
    (dict(y=LABELS, target="clas"), "target = 'clas': must be one of class, multilabel, regression, tokens"),
    (dict(y=["a", "b"]), "y: must be numbers, one row per example; got list of <U1"),
    (dict(y=[0.5, 1]), r"y: must be class numbers \[N\]"), (dict(y=LABELS, target="multilabel"), r"must be \[N, L\]"),
    (dict(y=[0.5, float("nan")], target="regression"), "y: must be finite"),
    (dict(y=LABELS, classes=INTENTS[:2]), r"y = 2 in example 8: labels must lie in 0..1"),
    (dict(y=[0, -100]), r"y = -100 in example 1: labels must lie in 0..0"),
    (dict(y=LABELS, noisy=[True]), "noisy: 1 for 12 examples"), (dict(y=LABELS, seed=-1), "seed = -1"),
    (dict(y=LABELS, method="a/b"), "method = 'a/b': must be a plain name"),
    (dict(y=LABELS, data=SENTENCES[:5]), "data: 5 for a full set of 12 examples"),
    (dict(y=LABELS, data=7), r"^data = int: must be texts, a DataFrame, an array"),
    (dict(y=LABELS, save_every=-1), "save_every = -1: must be 0 or more"), (dict(y=LABELS, run=""), "run = ''"),
    (dict(y=LABELS, settings={"model": EYE}), "settings: must be numbers, texts, lists and dicts of them"),
    (dict(y=LABELS, run="taken"), "that folder holds another run; n = 12 here, 5 there"),
    (dict(y=LABELS, run="images"), "that folder holds another run, of images; choose another name"),
])
def test_bad_input_at_the_start(make, text, tmp_path):
    if make.get("run") == "taken": Recorder("taken", n=5, root=tmp_path)
    if make.get("run") == "images":
        (tmp_path / "images").mkdir()
        (tmp_path / "images" / "recipe.json").write_text(json.dumps({"settings": {}, "kind": "images"}))
    with pytest.raises(ValueError, match=text): Recorder(**{"run": "r"} | make, root=tmp_path)
    assert not (tmp_path / "r").exists()                                    # nothing was begun


@pytest.mark.parametrize("step, text", [
    (dict(batch=[0, 12], logits=EYE[:2]), "12"), (dict(batch=[0, 1], logits=EYE[:3]), "logits: 3 for 2 ids"),
    (dict(batch=[0, 1], logits=EYE[:2], losses=torch.zeros(3)), "losses: 3 for 2 ids"),
    (dict(batch=[0, 1], logits=EYE[:2], losses=torch.zeros(2, 2)), r"losses = \[2, 2\]: must be \[B\]"),
    (dict(batch=[0.0, 1.0], logits=EYE[:2]), r"must be ids \[B\], whole numbers"), (dict(batch=[0]), "logits: none"),
    (dict(batch=(EYE[:2], torch.tensor([0, 1])), logits=EYE[:2]), "idx"),
])
def test_bad_input_at_the_first_step(step, text, tmp_path):
    recorder = Recorder("r", LABELS, root=tmp_path)
    with pytest.raises((ValueError, IndexError), match=text): recorder.record(**step)
    assert recorder.step == 0 and not recorder.dynamics.column("presentations").any()
    with pytest.raises(ValueError, match="y: not known"): Recorder("s", n=3, root=tmp_path).record([0], EYE[:1])


# What is shown

class Pairs(Dataset):
    "As many datasets are: (x, y), made when asked for."
    def __init__(self, xs): self.xs = xs
    def __len__(self): return len(self.xs)
    def __getitem__(self, i): return self.xs[i], 0


class Endless(IterableDataset):
    def __iter__(self): return iter(SENTENCES)


RGB = [Image.new("RGB", (6, 4), (20 * k, 90, 200)) for k in range(12)]
BYTES = np.stack([np.asarray(p) for p in RGB])   # [12, 4, 6, 3]


def png(picture) -> bytes:
    "As Hugging Face's tables hold pictures."
    out = io.BytesIO()
    picture.save(out, "PNG")
    return out.getvalue()


INTENT = [INTENTS[c] for c in LABELS]


@pytest.mark.parametrize("data, kind, third", [
    (SENTENCES, "text", SENTENCES[3]), (tuple(SENTENCES), "text", SENTENCES[3]),
    (np.array(SENTENCES), "text", SENTENCES[3]), (pd.Series(SENTENCES, name="query"), "text", SENTENCES[3]),
    (pd.DataFrame({"intent": INTENT, "utterance": SENTENCES}, index=range(50, 62)), "text", SENTENCES[3]),
    (pd.DataFrame({"a": SENTENCES, "b": SENTENCES[::-1]}), "text", f"{SENTENCES[3]}\n{SENTENCES[8]}"),
    (lambda id: SENTENCES[id], "text", SENTENCES[3]), (Pairs(SENTENCES), "text", SENTENCES[3]),
    ([{"text": t, "label": 1} for t in SENTENCES], "text", SENTENCES[3]),
    (TABLE, "row", {"age": 23, "job": "cook", "balance": TABLE.balance[3]}),
    (TABLE[["age"]].to_numpy(), "row", {"0": 23}), (torch.tensor(TABLE.age.to_numpy()), "row", {"0": 23}),
    (Pairs(torch.arange(24).view(12, 2)), "row", {"0": 6, "1": 7}),
    ([{"age": a, "label": 0} for a in range(20, 32)], "row", {"age": 23}),
    (RGB, "picture", BYTES[3]), (BYTES, "picture", BYTES[3]),
    (torch.tensor(BYTES).permute(0, 3, 1, 2), "picture", BYTES[3]),
    (BYTES / 255, "picture", BYTES[3]), (Pairs(RGB), "picture", BYTES[3]), (lambda id: RGB[id], "picture", BYTES[3]),
    ([{"image": p, "label": 0} for p in RGB], "picture", BYTES[3]), (BYTES[..., 0], "picture", BYTES[3, :, :, :1]),
    (pd.DataFrame({"image": RGB, "kind": INTENT}), "picture", BYTES[3]),
    (pd.DataFrame({"image": [{"bytes": png(p), "path": None} for p in RGB]}), "picture", BYTES[3]),
])
def test_data_as_they_come_are_shown(data, kind, third):
    shown = as_shown(data, range(12))
    assert shown.kind == kind and len(shown) == 12
    got, = shown.take([3])
    if kind == "picture": assert got.dtype == torch.uint8 and np.array_equal(got.permute(1, 2, 0), third)
    else: assert got == third
    by_id = as_shown(data, [7, 3], full=12).take([1])[0]                    # an id is a place in the full set
    assert np.array_equal(by_id, got) if kind == "picture" else by_id == got


@pytest.mark.parametrize("data, text", [
    (7, r"^data = int: must be texts"), ("a.csv", "data = str"), (Endless(), "data = Endless"),
    (iter(SENTENCES), "without length"), ({"a": 1}, "data = dict"), ([], "without an example"),
    ([{"input_ids": [1, 2]}] * 12, "of dict with input_ids, in which is nothing to show"),
    (lambda: 0, "that fails for id 0"), (lambda id: None, "that gives NoneType for id 0"), ([None] * 12, "of NoneType"),
    (np.zeros((12, 2, 3, 4, 5)), r"an array \[12, 2, 3, 4, 5\]"),
    (SENTENCES[:7], "7 for 12 examples; must be one for each row"), (pd.DataFrame(index=range(12)), "without columns"),
])
def test_other_data_are_refused_in_a_sentence(data, text):
    with pytest.raises(ValueError, match=text): as_shown(data, range(12))


def test_pictures_keep_their_values_or_are_stretched():
    grey = torch.linspace(0, 1, 12).view(3, 4)
    assert np.allclose(as_picture(grey), (255 * grey[None]).round())
    assert as_picture(grey - 0.5).min() == 0 and as_picture(100 * grey).max() == 255
    assert as_picture((100 * grey).long()).max() == 100 and as_picture(grey > 0.5).unique().tolist() == [0, 255]
    assert as_picture(torch.zeros(5, 6, 7)) is None and as_picture("a") is None and part_of(None) is None


def test_files_and_lost_ones(tmp_path):
    for k in (0, 2): RGB[k].save(tmp_path / f"{k}.png")
    for files in ([tmp_path / f"{k}.png" for k in range(3)], [str(tmp_path / f"{k}.png") for k in range(3)]):
        assert [x is None for x in as_shown(files, range(3)).take([0, 1, 2])] == [False, True, False]
    assert keep_shown(as_shown(files, range(3)), tmp_path)
    again = as_shown(read_shown(tmp_path), range(3))
    assert np.array_equal(again.take([2])[0].permute(1, 2, 0), BYTES[2])
