"""Data of any kind: what `with_ids`, `labels_of`, `Examples.of` and streamed splits give, held against indexing by
hand, in the classes that people really have; and every bad input."""
from collections import UserDict

import numpy as np
import pandas as pd
import pytest
import torch
from torch import nn
from torch.utils.data import ConcatDataset, DataLoader, Dataset, IterableDataset, Subset, TensorDataset

from datasel_wb.core import Batch, as_batch, seeded
from datasel_wb.corruption import flip_labels, noise_pixels, swap_images
from datasel_wb.examples import Examples, Loader, Normalise, Splits, Streamed, eval_batches, preparation
from datasel_wb.loading import WithIds, labels_of, with_ids
from datasel_wb.loop import Recipe, evaluate
from datasel_wb.reading import read_data
from datasel_wb.selectors import Prune, Task
from datasel_wb.trainer import fit

N = 40
X = torch.randn(N, 6, generator=seeded(0, "x"))
Y = torch.randint(3, (N,), generator=seeded(0, "y"))
PLAIN = TensorDataset(X, Y)
WORDS = [f"word{i} " * (1 + i % 3) for i in range(N)]
FRAME = pd.DataFrame(X.double().numpy(), columns=list("abcdef")).assign(
    kind=np.array(["x", "y", "z"])[Y.numpy()], flag=(Y == 1).numpy(), text=WORDS, price=X.double().sum(1).numpy())
FRAME.index = FRAME.index[::-1]   # an index of its own, which is no id


def refuses(call, *words):
    "The error of a call in one sentence, with all words in it."
    with pytest.raises(ValueError) as e: call()
    assert all(w in str(e.value) for w in words) and "\n" not in str(e.value), str(e.value)


class Counting(Dataset):
    "Rows as dicts that are read in bulk where the loader knows how; counts the calls."
    def __init__(self): self.single = self.several = 0
    def __len__(self): return N
    def row(self, i): return {"ids": X[i], "mask": X[i] > 0, "labels": int(Y[i])}
    def __getitem__(self, i):
        self.single += 1
        return self.row(i)
    def __getitems__(self, at):
        self.several += 1
        return [self.row(i) for i in at]


class Unsized(Dataset):
    def __getitem__(self, i): return X[i], 0


class Unsized2(Dataset):
    def __getitem__(self, i): return X[i], 0
    def __len__(self): raise NotImplementedError


class Stream(IterableDataset):
    def __iter__(self): yield from PLAIN


# ---- labels

@pytest.mark.parametrize("kind", ["int8", "uint8", "int16", "uint16", "int32", "int64", "uint64"])
def test_class_numbers_of_any_width_become_int64(kind):
    values = np.array([3, 0, 2], dtype=kind)
    for y in (values, list(values), tuple(values.tolist()), pd.Series(values)):
        assert labels_of(y).dtype == torch.int64 and labels_of(y).tolist() == [3, 0, 2]


def test_labels_of_every_target():
    assert labels_of([True, False]).tolist() == [1, 0]
    assert torch.equal(labels_of(np.eye(3, dtype=bool), "multilabel"), torch.eye(3))
    assert torch.equal(labels_of([1, 2.5], "regression"), torch.tensor([1, 2.5]))
    assert labels_of(np.zeros((4, 2)), "regression").dtype == torch.float32
    half = torch.tensor([0.5], dtype=torch.float64)
    assert labels_of(half, "regression") is half          # a tensor keeps its type
    assert labels_of(np.array([[1, -100]], dtype=np.int32), "tokens").tolist() == [[1, -100]]
    assert labels_of(np.array(["b", "a", "b"]), classes=["a", "b"]).tolist() == [1, 0, 1]
    assert labels_of(pd.Series(["b", "a"]), classes=("b", "a")).tolist() == [0, 1]


@pytest.mark.parametrize("y,target,words", [
    ([0, 1, -1], "class", ["y = -1 in example 2", "0 or more"]),
    ([0, -100], "class", ["y = -100 in example 1"]),
    (np.array(["cat", "dog"]), "class", ["y = 'cat' in example 0", "give classes"]),
    ([0.0, 1.0], "class", ["1-D int64", "1-D torch.float32", "target = 'class'"]),
    ([[0, 1]], "class", ["1-D int64", "2-D"]),
    ([0, np.nan, 1], "regression", ["y = nan in example 1", "finite"]),
    (torch.tensor([[1.0, 2], [3, torch.inf]]), "regression", ["y = inf in example 1"]),
    (np.zeros((2, 2, 2)), "regression", ["1-D or 2-D", "3-D"]),
    ([[0, 1], [0, 2]], "multilabel", ["y = 2.0 in example 1", "0..1"]),
    ([[0, 1], [-1, 1]], "multilabel", ["y = -1.0 in example 1"]),
    ([0, 1], "multilabel", ["2-D"]),
    ([[4, -2]], "tokens", ["y = -2 in example 0", "-100"]),
    ([[1.0]], "tokens", ["2-D int64"]),
    ([[1, 2], [3]], "tokens", ["different lengths", "pad"]),
    ([None, 1], "class", ["y: must be numbers"]),
    ([0], "classes", ["target = 'classes'", "tokens"]),
])
def test_labels_refuse(y, target, words): refuses(lambda: labels_of(y, target), *words)


def test_text_labels_must_be_known():
    refuses(lambda: labels_of(["a", "c"], classes="ab"), "y = 'c' in example 1", "a, b")


# ---- ids

def by_hand(rows, at): return [rows[i] for i in at]


@pytest.mark.parametrize("dataset,ids,full", [
    (PLAIN, range(N), N),
    (Subset(PLAIN, [7, 3, 39]), [7, 3, 39], N),
    (Subset(Subset(PLAIN, range(10, 30)), torch.tensor([5, 0])), [15, 10], N),
    (ConcatDataset([PLAIN, PLAIN]), range(2 * N), 2 * N),
    ([(x, int(y)) for x, y in PLAIN], range(N), N),
    (Subset(with_ids(PLAIN), [4, 2]), [4, 2], N),
], ids=["dataset", "subset", "nested", "concat", "list", "subset_with_ids"])
def test_ids_are_places_in_the_full_set(dataset, ids, full):
    own = with_ids(dataset)
    assert own.ids.tolist() == list(ids) and own.full == full and len(own) == len(dataset)
    b = as_batch(next(iter(DataLoader(own, batch_size=len(own)))))
    assert torch.equal(b.x, X[torch.tensor(list(ids)) % N]) and torch.equal(b.y, Y[b.idx % N])
    assert b.idx.tolist() == list(ids) and b.idx.dtype == b.y.dtype == torch.int64
    assert own.positions(b.idx).tolist() == list(range(len(own)))
    again = with_ids(own)
    assert again.ids.tolist() == list(ids) and again[-1][2] == list(ids)[-1]


def test_ids_come_through_workers_and_shuffling():
    loader = DataLoader(with_ids(Subset(PLAIN, range(5, 40))), 7, shuffle=True, num_workers=2,
                        generator=torch.Generator().manual_seed(0))
    batches = [as_batch(b) for b in loader]
    assert sorted(torch.cat([b.idx for b in batches]).tolist()) == list(range(5, 40))
    assert all(torch.equal(b.x, X[b.idx]) and torch.equal(b.y, Y[b.idx]) for b in batches)


def test_rows_in_bulk_stay_in_bulk():
    rows = Counting()
    b = next(iter(DataLoader(with_ids(rows), 8)))
    assert (rows.single, rows.several) == (0, 1)
    assert sorted(b) == ["ids", "idx", "labels", "mask"] and torch.equal(b["ids"], X[:8])
    assert b["idx"].tolist() == list(range(8)) and torch.equal(b["labels"], Y[:8])
    kept = with_ids(rows, columns=["mask"])[torch.tensor(3)]      # an index may be a tensor
    assert sorted(kept) == ["idx", "labels", "mask"] and kept["idx"] == 3


def test_a_sampler_of_ids_finds_the_rows_of_a_subset():
    part = with_ids(Subset(PLAIN, range(39, 9, -2)))
    order = part.ids[X[part.ids, 0].argsort()]
    sel = Prune(order, remove_n=5).bind(Task(nn.Linear(6, 3), n=part.full, ids=part.ids))
    seen = [as_batch(b) for b in DataLoader(part.by_id(), 4, sampler=sel.sampler())]
    assert all(torch.equal(b.x, X[b.idx]) and torch.equal(b.y, Y[b.idx]) for b in seen)
    ids = torch.cat([b.idx for b in seen])
    assert set(ids.tolist()) == set(order[5:].tolist())
    refuses(lambda: part.by_id()[10], "ids = 10", "among the ids of the dataset")
    refuses(lambda: part.by_id()[40], "ids = 40", "0..39")
    whole = with_ids(PLAIN)
    assert whole.by_id() is whole


def test_labels_of_rows_are_converted():
    def y(value, **kw): return with_ids([(0.0, value)], **kw)[0][1]
    assert y(np.int16(3)) == 3 and type(y(np.uint8(3))) is int and y(torch.tensor(2, dtype=torch.int32)) == 2
    assert y(0.25).dtype == y(np.float64(0.25)).dtype == torch.float32
    assert y([1, -100]).dtype == torch.int64 and y([True, False]).tolist() == [1.0, 0.0]
    assert y(4, target="regression").dtype == torch.float32 and y("b", classes=["a", "b"]) == 1
    assert with_ids([{"x": 1, "mood": "b"}], label="mood", classes="ab")[0] == {"x": 1, "labels": 1, "idx": 0}
    assert with_ids([{"x": 1, "labels": [1, -100, 3]}])[0]["labels"] == [1, -100, 3]      # for a collator to pad


def test_a_frame_gives_rows():
    rows = with_ids(FRAME, columns=["a", "flag"], label="kind")
    x, y, idx = next(iter(DataLoader(rows, N)))
    assert rows.classes == ("x", "y", "z") and torch.equal(y, Y) and torch.equal(idx, torch.arange(N))
    assert torch.equal(x, torch.stack([X[:, 0], (Y == 1).float()], 1))
    x, y, idx = with_ids(FRAME, columns=["a", "text"], label="price")[7]
    assert x == {"a": X[7, 0], "text": WORDS[7]} and y.dtype == torch.float32 and idx == 7
    assert torch.equal(with_ids(FRAME, ["a"], ["b", "c"])[3][1], X[3, 1:3])
    whole = with_ids(FRAME.astype({"flag": "Int64"}), columns=["a"], label="flag")
    assert whole[3][1] == int(Y[3] == 1) and type(whole[3][1]) is int


def test_ids_that_the_user_knows():
    rows = [{"x": 1.0, "y": 0, "idx": 17}, {"x": 2.0, "y": 1, "idx": 4}]
    refuses(lambda: with_ids(rows)[0], "row 0 has idx = 17", "must be 0", "ids=")
    known = with_ids(rows, ids=[17, 4])
    assert [r["idx"] for r in known] == [17, 4] and known.full == 18
    refuses(lambda: with_ids(rows, ids=[4, 4]), "ids = 4", "twice")
    refuses(lambda: with_ids(rows, ids=[4]), "ids has 1 values", "2")


@pytest.mark.parametrize("dataset,words", [
    (Stream(), ["Stream", "map-style", "list of its rows"]),
    ((row for row in PLAIN), ["generator", "map-style"]),
    (X, ["Tensor", "TensorDataset"]),
    (X.numpy(), ["ndarray", "TensorDataset"]),
    (Unsized(), ["Unsized without a length", "__len__"]),
    (Unsized2(), ["Unsized2 without a length"]),
    ({"train": PLAIN, "test": PLAIN}, ["dict of train, test", "one"]),
    ([], ["length 0"]),
    (Subset(PLAIN, [3, 1, 3]), ["ids = 3", "twice"]),
], ids=lambda v: "-")
def test_what_has_no_ids_is_refused(dataset, words): refuses(lambda: with_ids(dataset), *words)


@pytest.mark.parametrize("row,words", [
    ((X[0],), ["row 0 is a tuple of 1", "(x, y)"]),
    (X[0], ["row 0 is a Tensor"]),
    ((X[0], X[1], 0.5), ["three values", "must be 0"]),
    ((X[0], 0, 5), ["the last = 5: must be 0"]),
    ((X[0], "cat"), ["label = 'cat' of id 0", "give classes"]),
    ((X[0], float("nan")), ["label = nan of id 0", "finite"]),
    ((X[0], -100), ["label = -100 of id 0", "0 or more"]),
    ((X[0], torch.tensor([1.0, torch.inf])), ["of id 0", "finite"]),
    ((X[0], None), ["label of id 0", "numbers"]),
])
def test_bad_rows_are_refused(row, words): refuses(lambda: with_ids([row])[0], *words)


def test_bad_columns_are_refused():
    refuses(lambda: with_ids(FRAME, ["a"]), "label = None", "kind")
    refuses(lambda: with_ids(FRAME, ["z"], "kind"), "'z' is missing", "a, b")
    refuses(lambda: with_ids(FRAME, [], "kind"), "columns = []")
    refuses(lambda: with_ids(FRAME.assign(a=np.where(Y == 2, np.nan, 1.0)), ["a"], "kind"), "column 'a' = nan in row")
    refuses(lambda: with_ids(FRAME.assign(kind=None), ["a"], "kind"), "column 'kind' = None in row 0")
    refuses(lambda: with_ids(FRAME.astype({"text": "category"}), ["text"], "kind"), "'text' is category", "cat.codes")
    refuses(lambda: with_ids(FRAME.assign(t=pd.Timestamp(0)), ["t"], "kind"), "'t' is datetime64")
    refuses(lambda: with_ids(FRAME, ["a"], "price", target="class"), "column 'price'", "1-D int64")
    refuses(lambda: with_ids(Counting(), columns=["tokens"])[0], "'tokens' is missing", "mask")
    refuses(lambda: with_ids(PLAIN, target="any"), "target = 'any'")


# ---- examples

def same(batch: Batch, x, y, ids):
    "A batch against inputs and labels of all examples, indexed by hand."
    assert torch.equal(batch.idx.cpu(), torch.as_tensor(ids)) and torch.equal(batch.y, y[batch.idx])
    if isinstance(x, dict): return all(torch.equal(batch.x[k], x[k][batch.idx]) for k in x) and list(batch.x) == list(x)
    return torch.equal(batch.x, x[batch.idx])


TREE = {"input_ids": torch.arange(N * 5).view(N, 5), "mask": torch.rand(N, 5) > 0.3, "more": torch.rand(N).double()}


@pytest.mark.parametrize("x", [X, X.double(), torch.arange(N), TREE, UserDict(TREE)],
                         ids=["floats", "doubles", "ids", "tree", "mapping"])
def test_examples_of_any_input(x):
    split, plain = Examples(x, Y, "abc"), dict(x) if isinstance(x, UserDict) else x
    assert same(split.take(torch.tensor([3, 0])), plain, Y, [3, 0])
    part = split.select([8, 2, 5])
    assert same(part.take(torch.tensor([5, 8])), plain, Y, [5, 8])
    for b in Loader(part, 1)(torch.tensor([2, 8])): assert same(b, plain, Y, b.idx)
    assert torch.cat([b.idx for b in eval_batches(split, 7)]).tolist() == list(range(N))
    assert all(same(b, plain, Y, b.idx) for b in Loader(split, 8, resident=False)())
    assert split.nbytes == sum(t.nbytes for t in (plain.values() if isinstance(plain, dict) else [plain]))
    assert not split.pictures and preparation(split)(x) is x


@pytest.mark.parametrize("y,target,label", [
    (torch.rand(N), "regression", ["label"]), (torch.rand(N, 2), "regression", ["label/0", "label/1"]),
    (torch.eye(N)[:, :3], "multilabel", ["label/0", "label/1", "label/2"]),
    (torch.arange(N * 4).view(N, 4), "tokens", [])])
def test_examples_of_any_target(y, target, label):
    split = Examples(X, y, target=target)
    assert same(split.take(torch.tensor([5, 1])), X, y, [5, 1]) and split.n_classes is None and split.learns == target
    group, names, noisy = split.groups()
    assert group.tolist() == [0] * N and names == ("all",) and noisy is None
    assert [k for k, v in split.columns().items() if v is not None] == label
    known = Examples(X, y, target=target, clean_y=y.flip(0))
    assert torch.equal(known.noisy, (y != y.flip(0)).reshape(N, -1).any(1))
    refuses(lambda: flip_labels(split, 0.1, seeded(0, "t")), "classes", target)
    swapped = swap_images(known, 0.5, seeded(0, "t"))
    assert 0 < swapped.noisy.sum() <= N // 2 and swapped.noisy[N // 2:].sum() == 0


def test_named_outputs():
    both = Examples(X, X[:, :2].contiguous(), ["left", "right"], target="regression")
    assert both.classes == ("left", "right") and "label/right" in both.columns()
    refuses(lambda: Examples(X, X[:, :2], ["left"], target="regression"), "classes has 1 names", "2")
    refuses(lambda: Examples(X, Y), "classes = None", "Examples.of")


@pytest.mark.parametrize("x,words", [
    (TREE | {"mask": torch.ones(3)}, ["x['mask'] has 3 rows", "40"]),
    (TREE | {"text": WORDS}, ["x['text'][0] is str", "tokenise"]),
    ([1.0] * N, ["x[0] is float", "tensor"]),
    ({}, ["x = {}", "tensor"]),
    (TREE | {"more": torch.full((N,), torch.nan)}, ["x['more'] has NaN or infinite values in example 0"]),
    ((torch.tensor(1.0),), ["x[0] has no rows"]),
])
def test_bad_inputs_are_refused(x, words): refuses(lambda: Examples(x, Y, "abc"), *words)


def test_only_images_are_normalised():
    refuses(lambda: Normalise()(X), "[40, 6]", "[B, C, H, W]")
    refuses(lambda: Normalise()(TREE), "dict")
    refuses(lambda: Normalise((0.1,) * 3, (1.0,) * 3)(torch.rand(2, 1, 4, 4)), "[2, 1, 4, 4]", "C = 3")
    refuses(lambda: noise_pixels(Examples(X, Y, "abc"), 0.1, 1.0, seeded(0, "t")), "pixel_noise", "images")


def test_examples_from_arrays():
    for data in (X.double().numpy(), X.tolist(), X):
        split = Examples.of(data, Y.numpy().astype("int32"))
        assert torch.allclose(split.x, X) and split.x.dtype == torch.float32 and split.classes == ("0", "1", "2")
        assert torch.equal(split.y, Y)
    names = np.array(["pear", "apple", "fig"])[Y.numpy()]
    split = Examples.of({"a": X.numpy(), "b": WORDS, "kind": names}, "kind", columns=["a"])
    assert split.classes == ("apple", "fig", "pear") and [split.classes[c] for c in split.y] == names.tolist()
    assert Examples.of(X.double(), Y).x.dtype == torch.float64     # a tensor keeps its type
    pair = Examples.of((X.numpy(), TREE), Y).take(torch.tensor([4])).x
    assert torch.equal(pair[1]["input_ids"], TREE["input_ids"][[4]]) and torch.equal(pair[0], X[[4]])
    assert Examples.of(X, X.sum(1), target="regression").learns == "regression"
    refuses(lambda: Examples.of(X), "label = None")
    refuses(lambda: Examples.of({"a": X}, "b"), "label = 'b'", "a")
    refuses(lambda: Examples.of(WORDS, Y), "x: must be numbers", "tokenised")
    refuses(lambda: Examples.of(X, Y[:9]), "x has 40 rows, y has 9")
    refuses(lambda: Examples.of(X, Y, target="other"), "target = 'other'")


def test_examples_from_a_frame():
    split = Examples.of(FRAME, "kind", columns=["b", "flag"])
    assert torch.equal(split.x, torch.stack([X[:, 1], (Y == 1).float()], 1)) and torch.equal(split.y, Y)
    assert split.classes == ("x", "y", "z") and split.ids.tolist() == list(range(N))
    price = Examples.of(FRAME.drop(columns=["kind", "text"]), "price", target="regression")
    assert price.shape == (7,) and torch.allclose(price.y, X.sum(1), atol=1e-6)
    flags = Examples.of(FRAME.assign(other=1), ["flag", "other"], ["a"], target="multilabel")
    assert flags.classes == ("flag", "other") and torch.equal(flags.y[:, 0], (Y == 1).float())
    assert torch.equal(Examples.of(FRAME[["a"]], Y).y, Y)
    numbered = pd.DataFrame({0: X[:, 0].numpy(), 1: X[:, 1].numpy(), 2: Y.numpy()})
    assert torch.equal(Examples.of(numbered, 2).y, Y) and torch.equal(Examples.of(numbered, 2).x, X[:, :2])
    refuses(lambda: Examples.of(FRAME[:0], "kind", ["a"]), "no rows")
    refuses(lambda: Examples.of(np.zeros((0, 3)), np.zeros(0, dtype=int)), "x has no rows")
    refuses(lambda: Examples.of(FRAME, "kind"), "column 'text' is text", "Hugging Face")
    refuses(lambda: Examples.of(FRAME, "price", ["a"]), "column 'price'", "target = 'class'")


def test_examples_from_a_dataset_in_memory_and_streamed():
    part = Subset(Counting(), [9, 4, 30, 2, 17, 8])
    held, large = Examples.of(part), Examples.of(part, memory=100)
    assert type(held) is Examples and type(large) is Streamed and large.nbytes is None
    rows = {"ids": X, "mask": X > 0}
    for split in (held, large):
        assert split.ids.tolist() == [9, 4, 30, 2, 17, 8] and split.full == N and torch.equal(split.y, Y[split.ids])
        assert split.shape == {"ids": (6,), "mask": (6,)} and split.classes == ("0", "1", "2")
        assert same(split.take(torch.tensor([17, 9])), rows, Y, [17, 9])
        assert same(split.select([2, 0]).take(torch.tensor([9])), rows, Y, [9])
        assert [b.idx.tolist() for b in eval_batches(split, 4)] == [[9, 4, 30, 2], [17, 8]]
    batches = [list(Loader(split, 2, seed=3)()) for split in (held, large)]
    assert all(torch.equal(a.idx, b.idx) and torch.equal(a.x["ids"], b.x["ids"]) for a, b in zip(*batches))
    noisy = flip_labels(large, 0.5, seeded(0, "t"))
    assert noisy.noisy.sum() == 3 and torch.equal(noisy.take(large.ids).y, noisy.y)     # the split's, not the rows'
    assert same(noisy.to("cpu").take(torch.tensor([8])), rows, noisy.by_id(noisy.y, -1), [8])


def test_a_streamed_split_reads_in_workers():
    large = Examples.of(PLAIN, memory=0, classes="abc")
    rows = torch.randperm(N)[:12].view(3, 4)
    found = list(large.stream(rows, workers=2))
    assert len(found) == 3 and all(same(b, X, Y, row) for b, row in zip(found, rows))
    broken = Examples.of(TensorDataset(torch.where(torch.arange(N)[:, None] == 7, torch.nan, X), Y), memory=0)
    refuses(lambda: list(broken.stream(torch.arange(8).view(2, 4), workers=1)), "NaN or infinite values in example 7")
    refuses(lambda: Examples.of(broken.dataset), "x has NaN or infinite values in example 7")


def test_labels_are_not_read_where_they_are_known():
    class Photos(Counting):
        targets, classes = Y.tolist(), ["a", "b", "c"]
    photos = Photos()
    split = Examples.of(Subset(photos, range(0, N, 2)), memory=0)
    assert torch.equal(split.y, Y[::2]) and split.classes == ("a", "b", "c") and photos.several <= 2
    other = Examples.of(photos, label=Y.flip(0), memory=0)
    assert torch.equal(other.y, Y.flip(0)) and other.take(torch.tensor([3])).y == Y.flip(0)[3]


def test_rows_that_make_no_batch_are_refused():
    ragged = [{"input_ids": [1] * (2 + i % 3), "label": i % 2} for i in range(N)]
    refuses(lambda: Examples.of(ragged), "make no batch", "pad", "collate=")
    refuses(lambda: Examples.of(list(zip(WORDS, Y.tolist()))), "x[0] is text, 'word0 '", "tokenise")
    refuses(lambda: Examples.of([{"a": X[i]} for i in range(N)]), "label = None", "a")
    refuses(lambda: Examples.of([(object(), 0)] * 3), "make no batch", "transform")
    def padded(rows):
        width = 5
        pad = [r["input_ids"] + [0] * (width - len(r["input_ids"])) for r in rows]
        return {"input_ids": torch.tensor(pad), "labels": torch.tensor([r["label"] for r in rows])}
    split = Examples.of(ragged, collate=padded)
    assert split.shape == {"input_ids": (5,)} and split.x["input_ids"].sum(1).tolist() == [2 + i % 3 for i in range(N)]
    moods = Examples.of([(x, "good" if y else "bad") for x, y in PLAIN])
    assert moods.classes == ("bad", "good") and torch.equal(moods.y, (Y > 0).long())


# ---- Hugging Face

def test_hugging_face_datasets():
    datasets = pytest.importorskip("datasets")
    columns = {"text": WORDS, "input_ids": TREE["input_ids"].tolist(), "score": X[:, 0].double().tolist()}
    kinds = datasets.ClassLabel(names=["no", "maybe", "yes"])
    data = datasets.Dataset.from_dict(columns | {"label": Y.tolist()}).cast_column("label", kinds)
    rows = with_ids(data)
    assert rows[3] == {"text": WORDS[3], "input_ids": TREE["input_ids"][3].tolist(), "score": X[3, 0].item(),
                       "label": int(Y[3]), "idx": 3}
    b = next(iter(DataLoader(with_ids(data.with_format("torch"), ["input_ids", "score"]), 5)))
    assert torch.equal(b["input_ids"], TREE["input_ids"][:5]) and b["idx"].tolist() == list(range(5))
    split = Examples.of(data, columns=["input_ids", "score"])
    assert split.classes == ("no", "maybe", "yes") and split.x["score"].dtype == torch.float32
    assert same(split.take(torch.tensor([6, 1])), {"input_ids": TREE["input_ids"], "score": X[:, 0]}, Y, [6, 1])
    words = datasets.Dataset.from_dict({"a": X.tolist(), "kind": FRAME.kind.tolist()})
    large = Examples.of(words, "kind", memory=0)
    assert type(large) is Streamed and large.classes == ("x", "y", "z") and torch.equal(large.y, Y)
    assert torch.equal(large.take(torch.tensor([2])).x["a"], X[[2]])
    assert Examples.of(data, "score", ["input_ids"], target="regression").y.dtype == torch.float32
    refuses(lambda: Examples.of(data), "x['text'][0] is text", "columns=")
    refuses(lambda: Examples.of(words), "label = None", "kind")
    refuses(lambda: with_ids(datasets.DatasetDict(train=data)), "DatasetDict of train")
    refuses(lambda: with_ids(data.to_iterable_dataset()), "IterableDataset", "map-style")
    chosen = data.add_column("idx", list(range(N))).select([5, 3])
    refuses(lambda: with_ids(chosen)[0], "idx = 5", "ids=")
    assert [r["idx"] for r in with_ids(chosen, ids=chosen["idx"])] == [5, 3]


def test_batch_encodings():
    transformers = pytest.importorskip("transformers")
    encoded = transformers.BatchEncoding({k: TREE[k] for k in ("input_ids", "mask")})
    split = Examples(encoded, Y, "abc")
    assert same(split.take(torch.tensor([7])), dict(encoded), Y, [7]) and type(split.x) is dict
    rows = [(transformers.BatchEncoding({"input_ids": TREE["input_ids"][i].tolist()}), int(Y[i])) for i in range(N)]
    assert torch.equal(Examples.of(rows).x["input_ids"], TREE["input_ids"])


# ---- training

PLAINLY = dict(schedule="constant", warmup_steps=0, weight_decay=0, clip_norm=0, ema_decay=0, nesterov=False, lr=8.0,
               batch_size=8, log_every=6, eval_every=6, device="cpu", steps=12, threads=1)
LOSS = {"class": lambda f, y: nn.functional.cross_entropy(f, y),
        "multilabel": lambda f, y: nn.functional.binary_cross_entropy_with_logits(f, y),
        "regression": lambda f, y: nn.functional.mse_loss(f, y)}


@pytest.mark.parametrize("target,y", [("class", Y), ("multilabel", torch.eye(3)[Y]), ("regression", X[:, :3] / 4)])
@pytest.mark.parametrize("memory", [None, 0])
def test_fit_on_a_table_equals_a_plain_loop(target, y, memory):
    split = (Examples(X, y, "abc", target=target) if memory is None
             else Examples.of(TensorDataset(X, y), target=target, classes="abc", memory=memory))
    torch.manual_seed(0)
    own, plain = nn.Linear(6, 3), nn.Linear(6, 3)
    plain.load_state_dict(own.state_dict())
    training = fit(Recipe(**PLAINLY | {"lr": 3.2}), Splits(split, split.select(range(8)), split), model=own, seed=5)
    sgd, loader = torch.optim.SGD(plain.parameters(), 0.1, momentum=0.9), Loader(split, 8, seed=5)
    done = 0
    while done < 12:
        for _, b in zip(range(12 - done), loader()):
            sgd.zero_grad()
            LOSS[target](plain(X[b.idx]), y[b.idx]).backward()
            sgd.step()
            done += 1
    assert training.steps_done == 12 and torch.allclose(own.weight, plain.weight, atol=1e-6)
    log = training.log.frame().query("split == 'test' and step == 12").set_index("name").value
    expected = LOSS[target](plain(X), y).item()
    assert log["loss"] == pytest.approx(expected, abs=1e-5) and ("top1" in log) == (target == "class")
    if target == "class": assert log["top1"] == pytest.approx(100 * (plain(X).argmax(1) == Y).float().mean().item())
    assert (training.METRIC == "loss") == (target != "class")
    assert len(training.report.table()) == N and len(training.report.extremes(2)["highest"]) == 2


def test_fit_takes_a_tree_and_resumes(tmp_path):
    class Model(nn.Module):
        def __init__(self): super().__init__(); self.head = nn.Linear(6, 3)
        def forward(self, ids, mask): return {"logits": self.head(ids * mask)}
    data = Examples.of(Counting(), classes="abc")
    torch.manual_seed(0)
    models = [Model() for _ in range(2)]
    models[1].load_state_dict(models[0].state_dict())
    whole = fit(Recipe(**PLAINLY), Splits(data, None, data), model=models[0])
    short = Splits(data, None, data)
    fit(Recipe(**PLAINLY | {"steps": 12, "save_every": 12}), short, model=models[1], folder=tmp_path / "a")
    assert torch.equal(whole.model.head.weight, models[1].head.weight)
    assert (tmp_path / "a" / "examples.parquet").exists()
    assert evaluate(models[0], data)["loss"] == pytest.approx(
        nn.functional.cross_entropy(models[0].head(X * (X > 0)), Y).item(), abs=1e-5)


def test_what_training_cannot_do_is_refused():
    numbers = Examples(X, X[:, 0].contiguous(), target="regression")
    table = Examples(X, Y, "abc")
    refuses(lambda: fit(Recipe(**PLAINLY), Splits(table, None, table)), "no images", "model=")
    refuses(lambda: fit(Recipe(**PLAINLY, label_smoothing=0.1), Splits(numbers, None, numbers), model=nn.Linear(6, 1)),
            "label_smoothing = 0.1", "regression")
    assert isinstance(with_ids(PLAIN), WithIds) and read_data(PLAIN).x is not None
