"""Parallel text: every bad input, the three layouts of files, who keeps which target, and what must not change with a
setting."""
import math
import os
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
import torch

from datasel_wb.corpus import (
    NUMBERS, RELATED, CorpusRecipe, draw_numbers, find_places, join_pairs, load_corpus, n_candidates, number_words,
    pick, read_lines, share_targets)

SIZES = dict(dev_size=0, test_size=0)


def says(*words, **recipe):
    "The one sentence that a recipe is refused with."
    with pytest.raises(ValueError) as e: load_corpus(CorpusRecipe(**recipe))
    assert all(w in str(e.value) for w in words), str(e.value)
    assert "\n" not in str(e.value)


def text(numbers, lang): return "".join(f"{number_words(n, lang)}\n" for n in numbers)

def names(layout, part, lang, target="en"):
    "The source file and the target file of a layout."
    name = {"lines": "{part}.{code}", "pairs": "{part}.{lang}-{target}.{code}", "opus": "{part}.{target}-{lang}.{code}",
            "ted": "{lang}_{target}/ted-{part}.mtok.{code}"}[layout]
    return [name.format(part=part, lang=lang, target=target, code=code) for code in (lang, target)]

def write(root, layout, numbers, target="en", **parts):
    "Aligned files of number words: `numbers` maps a language to its training numbers; dev and test exist in every one."
    for lang, train in numbers.items():
        for part, which in ({"train": train, "dev": range(900, 905), "test": range(950, 957)} | parts).items():
            for name, code in zip(names(layout, part, lang, target), (lang, target)):
                (root / name).parent.mkdir(parents=True, exist_ok=True)
                (root / name).write_text(text(
                    which, {"aze": "az", "tur": "tr", "eng": "en", "pt-br": "pt"}.get(code, code)), encoding="utf-8")
    return root

def pairs_of(corpus):
    "Every pair with its language, as often as it is there."
    return Counter(zip(np.array(corpus.languages)[corpus.lang], corpus.source, corpus.target))

THREE = {"az": range(1, 21), "tr": range(1, 21), "ru": range(1, 21)}


# ---- numbers

def test_default_corpus():
    data = load_corpus(CorpusRecipe())
    assert data.train.languages == data.dev.languages == data.test.languages == NUMBERS
    assert np.bincount(data.train.lang).tolist() == [100] + [2000] * 7 and (data.dev.n, data.test.n) == (200, 300)
    assert data.train.lang.dtype == np.int64 and set(data.dev.lang) == set(data.test.lang) == {0}
    # a tuple of four
    assert data.train.n == len(data.train.target) == len(data.train.lang) == 14100 and len(data.train) == 4
    english = {number_words(n, "en"): n for n in range(10**4)}
    for l, source, target in zip(data.train.lang, data.train.source, data.train.target):
        if target in english: assert source == number_words(english[target], NUMBERS[l])
    assert all(s == s.lower().strip() for s in data.train.source + data.train.target)


def test_dev_and_test_are_not_in_training_and_stay_when_sizes_change():
    base = load_corpus(CorpusRecipe())
    small = load_corpus(CorpusRecipe(low=20, high=300, overlap=0.9, test_size=100))
    other = load_corpus(CorpusRecipe(data_seed=1))
    for data in (base, small, other):
        dev, test = set(data.dev.target), set(data.test.target)
        assert not dev & test and not (dev | test) & set(data.train.target) and len(dev) == 200
    assert small.dev.source == base.dev.source and small.test.source == base.test.source[:100]
    assert other.dev.source != base.dev.source
    again = load_corpus(CorpusRecipe())
    assert again.train.source == base.train.source and np.array_equal(again.train.lang, base.train.lang)


def test_more_pairs_of_lang_and_fewer_languages_leave_the_rest_alone():
    base = pairs_of(load_corpus(CorpusRecipe(low=50, high=500)).train)
    more = pairs_of(load_corpus(CorpusRecipe(low=100, high=500)).train)
    assert {p for p in base if p[0] == "az"} < {p for p in more if p[0] == "az"}
    for lang in ("az", "tr"):
        fewer = pairs_of(load_corpus(CorpusRecipe(low=50, high=500, languages="az,tr")).train)
        assert {p for p in fewer if p[0] == lang} == {p for p in base if p[0] == lang}


@pytest.mark.parametrize("overlap", [0.2, 0.5, 0.9, 1.0])
def test_overlap_is_the_share_of_the_candidates(overlap):
    train = load_corpus(CorpusRecipe(lang="sk", low=60, high=1000, overlap=overlap)).train
    assert np.bincount(train.lang).tolist() == [60 if l == "sk" else 1000 for l in NUMBERS]
    targets, sources = set(train.target), Counter(train.target)
    n = math.ceil(1000 / overlap)
    assert len(targets) <= n and min(sources.values()) >= 1
    expected = n * (1 - (1 - overlap) ** 7)            # a candidate that no language drew is gone
    assert abs(len(targets) - expected) < 4 * (n * 0.25) ** 0.5
    mine = [sources[t] - 1 for l, t in zip(train.lang, train.target) if train.languages[l] == "sk"]
    assert abs(np.mean(mine) - 7 * overlap) < 4 * (7 * overlap * (1 - overlap) / 60) ** 0.5 + 1e-9
    if overlap == 1: assert set(mine) == {7} and len(targets) == 1000


def test_numbers_are_distinct_even_over_digits_and_unambiguous():
    parts = draw_numbers((4000, 400, 400), 3)
    assert len(set(np.concatenate(parts).tolist())) == 4800
    digits = np.bincount([len(str(n)) for n in parts[0]], minlength=7)[1:]
    assert (digits[3:] > 900).all() and digits[1] > 40       # the short ones run out, the others are even
    for lang in (*NUMBERS, "en"): assert len({number_words(int(n), lang) for n in np.concatenate(parts)}) == 4800


def test_other_target_one_language_and_other_low_resource_language():
    data = load_corpus(CorpusRecipe(lang="en", target="cs", languages="en, sk", low=10, high=40))
    assert data.train.languages == ("en", "sk") and data.test.target[0] != data.test.source[0]
    alone = load_corpus(CorpusRecipe(languages="az", low=30, dev_size=5, test_size=5))
    assert alone.train.languages == ("az",) and alone.train.n == 30 and set(alone.train.lang) == {0}


def test_global_random_state_is_left_alone():
    state, state_np = torch.get_rng_state(), np.random.get_state()[1].copy()
    load_corpus(CorpusRecipe(high=100))
    assert torch.equal(state, torch.get_rng_state()) and np.array_equal(state_np, np.random.get_state()[1])


def test_relatives():
    assert CorpusRecipe().relative() == "tr" and CorpusRecipe(lang="be").relative() == "ru"
    assert CorpusRecipe(lang="cs").relative() is None
    assert CorpusRecipe(related="ru").relative() == "ru"
    assert {l: RELATED[l] for l in ("aze", "bel", "glg", "slk")} == {"aze": "tur", "bel": "rus", "glg": "por",
                                                                     "slk": "ces"}


@pytest.mark.parametrize("words,bad", [
    (["corpus = 'number'", "did you mean 'numbers'"], dict(corpus="number")),
    (["corpus = '/no/such'", "no such folder"], dict(corpus="/no/such")),
    (["lang = 'azz'", "az, tr", "did you mean 'az'"], dict(lang="azz")),
    (["lang = 'en'", "must be one of az"], dict(lang="en")),
    (["lang = 'az'", "languages = 'tr,ru'"], dict(languages="tr,ru")),
    (["languages = 'pl'", "must be one of az"], dict(languages="az,pl")),
    (["languages = ''", "must be one of az"], dict(languages="az,,tr")),
    (["languages = 'az,tr,az'", "only once"], dict(languages="az,tr,az")),
    (["related = 'az'", "must be one of tr"], dict(related="az")),
    (["related = 'ru'", "must be one of tr"], dict(related="ru", languages="az,tr")),
    (["target = 'eng'", "did you mean 'en'"], dict(target="eng")),
    (["lang = 'az'", "must be one of tr"], dict(target="az")),
    (["low = 0", "above 0"], dict(low=0)), (["high = 0", "above 0"], dict(high=0)),
    (["dev_size = 0"], dict(dev_size=0)), (["test_size = 0"], dict(test_size=0)),
    (["dev_size = 100000", "at most 9"], dict(dev_size=100000)),
    (["test_size = 100000", "at most 8"], dict(test_size=100000)),
    (["high / overlap", "2000000", "at most 7"], dict(overlap=0.001)),
    (["low = -1"], dict(low=-1)), (["high = 10.5", "int"], dict(high=10.5)), (["overlap = 0"], dict(overlap=0.0)),
    (["overlap = 1.1"], dict(overlap=1.1)), (["data_seed = -1"], dict(data_seed=-1)),
])
def test_recipes_refused(words, bad): says(*words, **bad)


# ---- who keeps what

def test_pick_is_nested_and_even():
    there = np.arange(1000) % 3 > 0
    ten, many = pick(there, 10, 0, "t"), pick(there, 400, 0, "t")
    assert ten.sum() == 10 and many.sum() == 400 and (ten <= many).all() and (many <= there).all()
    assert np.array_equal(pick(there, 10**6, 0, "t"), there) and pick(there, 0, 0, "t").sum() == 0
    assert not np.array_equal(pick(there, 400, 1, "t"), many) and not np.array_equal(pick(there, 400, 0, "u"), many)
    counts = sum(pick(np.ones(20, dtype=bool), 5, s, "t").astype(int) for s in range(2000))
    assert (np.abs(counts - 500) < 5 * (2000 * 0.25 * 0.75) ** 0.5).all()


def test_share_targets_where_languages_have_gaps():
    rng = np.random.default_rng(0)
    there = rng.random((4, 3000)) < np.array([[0.05], [0.9], [0.3], [1.0]])
    kept = share_targets(there, ("a", "b", "c", "d"), "a", 100, 800, 0.5)
    assert (kept <= there).all() and kept[0].sum() == 100 and kept[1].sum() == kept[3].sum() == 800
    assert kept.any(0).sum() <= 1600
    assert 350 < kept[2].sum() < 650                   # c has but three candidates in ten, and keeps them
    whole = share_targets(there, ("a", "b", "c", "d"), "a", 0, 0, 1.0)
    assert np.array_equal(whole, there)
    half = share_targets(there, ("a", "b", "c", "d"), "a", 0, 0, 0.5)
    assert half[3].sum() == half[1].sum() == 1500 and np.array_equal(half[0], there[0])
    assert n_candidates(100, 2000, 0.5) == 4000 and n_candidates(100, 30, 1.0) == 100
    assert n_candidates(0, 30, 1.0) is None
    assert n_candidates(1, 700, 0.7) == 1000           # and not 1001 for the rounding of 700 / 0.7


def test_join_pairs_without_some_language():
    corpus = join_pairs(("a", "b", "c"), {"c": (["x"], ["z"]), "a": (["y", "w"], ["v", "u"])})
    assert corpus.lang.tolist() == [0, 0, 2] and corpus.source == ["y", "w", "x"]
    assert corpus.target == ["v", "u", "z"] and corpus.n == 3


# ---- files

@pytest.mark.parametrize("layout,target",
                         [("lines", "en"), ("pairs", "en"), ("opus", "en"), ("ted", "en"), ("ted", "eng")])
def test_layouts_give_the_same_corpus(tmp_path, layout, target):
    root = write(tmp_path, layout, THREE, target)
    data = load_corpus(CorpusRecipe(corpus=str(root), target=target, low=0, high=0, overlap=1.0, **SIZES))
    assert data.train.languages == ("az", "ru", "tr") and (data.dev.n, data.test.n) == (5, 7)
    assert set(data.test.lang) == {0}
    expected = {(l, number_words(n, l), number_words(n, "en")) for l, numbers in THREE.items() for n in numbers}
    assert pairs_of(data.train) == Counter(expected)
    assert data.dev.source == [number_words(n, "az") for n in range(900, 905)]
    assert data.test.target == [number_words(n, "en") for n in range(950, 957)]


@pytest.mark.parametrize("layout", ["lines", "pairs", "ted"])
def test_sizes_of_files(tmp_path, layout):
    root = str(write(tmp_path, layout, THREE))
    cut = load_corpus(CorpusRecipe(corpus=root, low=4, high=8, overlap=1.0, dev_size=2, test_size=3))
    assert np.bincount(cut.train.lang).tolist() == [4, 8, 8] and (cut.dev.n, cut.test.n) == (2, 3)
    assert cut.test.source == [number_words(n, "az") for n in (950, 951, 952)]
    whole = pairs_of(load_corpus(CorpusRecipe(corpus=root, low=0, high=100, overlap=1.0, **SIZES)).train)
    assert pairs_of(cut.train) < whole and sum(whole.values()) == 60
    other = load_corpus(CorpusRecipe(corpus=root, low=4, high=8, overlap=1.0, data_seed=1, dev_size=2, test_size=3))
    assert pairs_of(other.train) != pairs_of(cut.train) and other.test.source == cut.test.source
    pair = load_corpus(CorpusRecipe(corpus=root, lang="ru", languages="ru,tr", low=5, high=0, overlap=1.0, **SIZES))
    assert pair.train.languages == ("ru", "tr") and np.bincount(pair.train.lang).tolist() == [5, 20]
    assert set(pair.dev.lang) == {0}
    file = names(layout, "train", "az")[0]
    says("low = 21", file, "20 pairs", corpus=root, low=21, **SIZES)
    says("dev_size = 6", "has 5", corpus=root, low=4, dev_size=6)
    says("test_size = 8", "has 7", corpus=root, low=4, dev_size=5, test_size=8)


def test_pairs_keep_targets_that_occur_several_times(tmp_path):
    root = write(tmp_path, "pairs", {"az": [5, 5, 7], "tr": [5, 7, 8, 8]})
    train = load_corpus(CorpusRecipe(corpus=str(root), low=0, high=0, overlap=0.1, **SIZES)).train
    assert Counter(train.target) == Counter({"five": 3, "seven": 2, "eight": 2})
    assert np.bincount(train.lang).tolist() == [3, 4]


def test_gaps_of_aligned_files(tmp_path):
    root, whole = write(tmp_path, "lines", THREE), dict(low=0, high=0, overlap=1.0, dev_size=0, test_size=0)
    def blank(name, *at):
        lines = (root / name).read_text().split("\n")
        (root / name).write_text("\n".join("" if i + 1 in at else line for i, line in enumerate(lines)))
    blank("train.tr", 2, 3), blank("train.az", 3, 20), blank("dev.az", 1)
    data = load_corpus(CorpusRecipe(corpus=str(root), **whole))
    assert np.bincount(data.train.lang).tolist() == [18, 20, 18]
    assert data.dev.source == [number_words(n, "az") for n in range(901, 905)]
    got = pairs_of(data.train)
    assert ("tr", "üç", "three") not in got and ("ru", "три", "three") in got and "" not in data.train.source
    # three has no source in az and tr
    pair = load_corpus(CorpusRecipe(corpus=str(root), languages="az,tr", **whole)).train
    assert "three" not in pair.target and "two" in pair.target and pair.n == 36
    says("low = 19", "train.az", "18 pairs", corpus=str(root), low=19, **SIZES)
    blank("train.ru", 3)
    says("train.en, line 3", "no source", corpus=str(root), **whole)
    blank("train.en", 5)
    says("train.en, line 5", "empty", corpus=str(root), **whole)
    blank("dev.az", *range(1, 6))
    says("dev.az", "no sentence pair", corpus=str(root), **whole)


@pytest.mark.parametrize("layout", ["lines", "pairs", "ted"])
def test_damaged_files(tmp_path, layout):
    root = write(tmp_path, layout, THREE)
    source, target = (root / n for n in names(layout, "train", "az"))
    recipe, good = dict(corpus=str(root), low=0, **SIZES), source.read_bytes()
    lines = good.split(b"\n")
    def with_line(k, line): source.write_bytes(b"\n".join(lines[:k - 1] + [line] + lines[k:]))

    source.write_bytes(good + b"bir\n")
    says(str(source), str(target), "21", "20", "line 21", "partner", **recipe)
    source.write_bytes(b"\n".join(lines[:7]))          # without a line feed at the end
    says(str(source), str(target), "has 7 lines", "has 20", "line 8", **recipe)
    with_line(4, b"d\xf6rd")
    says(f"{source}, line 4", "0xf6", "UTF-8", **recipe)
    source.write_bytes(good)
    if layout != "lines":
        with_line(9, b" \t\r")
        says(f"{source}, line 9", "empty", **recipe)
        source.write_bytes(b"")
        says(str(source), "has 0 lines", "line 1", **recipe)
        source.write_bytes(good)
    kept = target.read_text()
    target.write_text(kept.replace("six\n", "\n", 1))
    says(f"{target}, line 6", "empty", **recipe)
    target.write_text(kept)
    for part in ("dev", "test"):
        x, y = (root / n for n in names(layout, part, "az"))
        y.rename(y.with_suffix(".gone"))
        says(str(y), "no such file", **recipe)
        y.with_suffix(".gone").rename(y)
        x.unlink()
        says("lang = 'az'", f"no {part} file in {x.parent}", x.name, **recipe)
        x.write_text(text(range(900, 905) if part == "dev" else range(950, 957), "az"))
    load_corpus(CorpusRecipe(**recipe))


@pytest.mark.parametrize("layout", ["lines", "pairs", "ted"])
def test_names_that_a_folder_lacks(tmp_path, layout):
    root = str(write(tmp_path, layout, {"aze": THREE["az"], "tur": THREE["tr"]}, "eng"))
    eng = dict(corpus=root, target="eng", low=0, **SIZES)
    says("target = 'en'", "did you mean 'eng'", corpus=root)
    says("lang = 'az'", "must be one of aze, tur", "did you mean 'aze'", **eng)
    says("languages = 'rus'", "must be one of aze, tur", **eng, lang="aze", languages="aze,rus")
    says("related = 'rus'", "must be one of tur", **eng, lang="aze", related="rus")
    assert CorpusRecipe(**eng, lang="aze").relative() == "tur"
    assert load_corpus(CorpusRecipe(**eng, lang="aze", related="tur")).train.n > 20


def test_lines_end_at_the_line_feed_alone(tmp_path):
    file = tmp_path / "f.az"
    file.write_bytes("\ufeffbir\r\niki\u2028\x0bü\x85ç\x1cdörd\r\n  beş ".encode())
    assert read_lines(file) == ["bir", "iki\u2028\x0bü\x85ç\x1cdörd", "beş"]
    for k, bad in ((2, b"bir\n\xff\n"), (1, "bir".encode("utf-16")), (3, b"bir\niki\n\xc3"), (1, b"\xed\xa0\x80")):
        file.write_bytes(bad)
        with pytest.raises(ValueError, match=rf"f\.az, line {k}: byte 0x.. is not UTF-8"): read_lines(file)
    file.write_bytes(b"bir\n\n")
    with pytest.raises(ValueError, match="line 2: empty"): read_lines(file)
    assert read_lines(file, absent=True) == ["bir", ""]


def test_a_corpus_with_dos_line_ends_is_the_same(tmp_path):
    a, b = (write(tmp_path / n, "lines", THREE) for n in ("a", "b"))
    for f in b.iterdir(): f.write_bytes(b"\xef\xbb\xbf" + f.read_bytes().replace(b"\n", b"\r\n"))
    a, b = (load_corpus(CorpusRecipe(corpus=str(root), low=5, high=9, **SIZES)) for root in (a, b))
    for one, two in zip(a, b):
        assert one.source == two.source and one.target == two.target and np.array_equal(one.lang, two.lang)


def test_names_of_dev_and_test(tmp_path):
    root = write(tmp_path, "lines", THREE, valid=range(30, 33), test_2016=range(40, 44), test_2017=range(50, 52))
    recipe = dict(corpus=str(root), low=0, **SIZES)
    def sizes(): return [d.n for d in load_corpus(CorpusRecipe(**recipe))[1:]]
    assert sizes() == [5, 7]
    for f in [*root.glob("dev.*"), *root.glob("test.*")]: f.unlink()
    assert sizes() == [3, 4]
    for f in root.glob("valid.*"): f.rename(f.with_name(f"val{f.suffix}"))
    assert sizes() == [3, 4]


def test_layouts_are_told_apart(tmp_path):
    assert find_places(tmp_path, "en") == ("", {})
    says("no training files", "train.en", "train.{lang}-en.en", "{lang}_en/ted-train.orig.en", corpus=str(tmp_path))
    (tmp_path / "aze_eng").mkdir()
    for code in ("aze", "eng"): (tmp_path / f"aze_eng/ted-train.mtok.spm8000.{code}").write_text("▁a b\n")
    says("spm8000.aze", "cut into pieces", "ted-train.orig.aze", corpus=str(tmp_path), lang="aze", target="eng")
    write(tmp_path, "ted", {"aze": range(3)}, "eng")
    assert find_places(tmp_path, "eng")[0] == "ted"
    for code in ("aze", "eng"): (tmp_path / f"aze_eng/ted-train.orig.{code}").write_text("a\n")
    assert find_places(tmp_path, "eng")[1]["aze"][2] == ".orig."         # running text before tokenized text
    write(tmp_path, "pairs", {"pt-br": range(3)}, "eng")
    assert find_places(tmp_path, "eng")[0] == "pairs" and set(find_places(tmp_path, "eng")[1]) == {"pt-br"}
    write(tmp_path, "lines", {"tr": range(3)}, "eng")
    assert find_places(tmp_path, "eng") == ("lines", {"tr": (tmp_path, "", ".")})


# ---- Multi30k

def test_multi30k_that_is_not_there(tmp_path, monkeypatch):
    monkeypatch.delenv("DATASEL_DATA", raising=False)
    words = ["corpus = 'multi30k'", "multi30k", "data_dir", "DATASEL_DATA", "train, val and test_2016_flickr", ".cs"]
    says(*words, corpus="multi30k", lang="cs")
    says(*words, str(tmp_path), corpus="multi30k", lang="cs", data_dir=str(tmp_path))
    monkeypatch.setenv("DATASEL_DATA", str(tmp_path))
    says(*words, str(tmp_path), corpus="multi30k", lang="cs")
    (tmp_path / "multi30k").mkdir()
    says("no training files", str(tmp_path), corpus="multi30k", lang="cs")
    write(tmp_path / "multi30k", "lines", {"cs": range(9)})
    assert load_corpus(CorpusRecipe(corpus="multi30k", lang="cs", low=0, **SIZES)).train.n == 9


needs_multi30k = pytest.mark.skipif(not Path(os.environ.get("DATASEL_DATA") or "/nowhere", "multi30k").is_dir(),
                                    reason="DATASEL_DATA names no folder with multi30k/")

@needs_multi30k
def test_multi30k():
    data = load_corpus(CorpusRecipe(corpus="multi30k", lang="cs", low=1000, high=0, **SIZES))
    assert data.train.languages == ("cs", "de", "fr") and np.bincount(data.train.lang).tolist() == [1000, 14500, 14500]
    assert (data.dev.n, data.test.n) == (1014, 1000) and set(data.dev.lang) == {0}
    sources = Counter(Counter(data.train.target).values())
    assert all(sources[k] > 0 for k in (1, 2, 3)) and sum(sources[k] for k in (1, 2, 3)) > 0.999 * sum(sources.values())
    assert data.test.source[0].startswith("Muž v oranžovém klobouku")
    assert data.test.target[0].startswith("A man in an orange hat")
    root = Path(os.environ["DATASEL_DATA"], "multi30k")
    files = {l: (root / f"train.{l}").read_text(encoding="utf-8").split("\n") for l in ("cs", "de", "fr", "en")}
    for l in data.train.languages:
        there = set(zip((s.strip() for s in files[l]), (s.strip() for s in files["en"])))
        assert all(p[1:] in there for p in pairs_of(data.train) if p[0] == l)
    says("low = 29001", "29000 pairs", corpus="multi30k", lang="cs", low=29001)
    says("lang = 'az'", "must be one of cs, de, fr", corpus="multi30k")
