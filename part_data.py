# %% md
## Pairs, and the targets they share

Multilingual translation into one language has sentence pairs $(x, y)$ whose source $x$ comes in one of $n$ languages and whose target $y$ is always in the same one. Of one source language there is little; that is the one to be translated, and dev and test speak it alone. The others are there to help, and the question of every method below is which of them does.

Those methods look at the data from the target's side ([Wang and Neubig, arXiv 1905.08212](https://arxiv.org/abs/1905.08212)): first a target $y$ is drawn, then one of the sources that it has. A corpus in which every target has a single source leaves nothing to choose in the second draw. So the corpora here say for every pair what its language is, and targets are the same when their text is.
# %%
#| export
import math
import os
import re
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from num2words import num2words

from datasel_wb.core import check_settings, seeded, setting, suggest
# %%
import tempfile

import pandas as pd
# %%
#| export
class Corpus(NamedTuple):
    "Sentence pairs of several source languages with one target language."
    languages: tuple   # names of the source languages
    lang: np.ndarray   # [N] int64, the source's place in `languages`
    source: list       # [N] source sentences
    target: list       # [N] target sentences
    @property
    def n(self) -> int: return len(self.source)

class Parallel(NamedTuple):
    "Training pairs of every language; dev and test pairs of the low-resource language alone."
    train: Corpus
    dev: Corpus
    test: Corpus

def join_pairs(
    languages: tuple,  # names of the source languages
    pairs: dict,       # language -> (sources, targets), two lists of one length; a language may be missing
) -> Corpus:
    "One corpus, language after language."
    counts = [len(pairs[l][0]) if l in pairs else 0 for l in languages]
    source, target = ([s for l in languages if l in pairs for s in pairs[l][side]] for side in (0, 1))
    return Corpus(tuple(languages), np.repeat(np.arange(len(languages)), counts), source, target)
# %% md
Two targets, the first with two sources. Seen from the target's side, a corpus is a table with a row for every target and a column for every language:
# %%
def from_targets(corpus):
    "A row for each target text, a column for each language; how many sources it has first."
    pairs = pd.DataFrame({"target": corpus.target, "language": np.array(corpus.languages)[corpus.lang], "source": corpus.source})
    table = pairs.pivot_table(index="target", columns="language", values="source", aggfunc="first").reindex(columns=list(corpus.languages))
    return pd.concat([table.notna().sum(axis=1).rename("sources"), table.fillna("")], axis=1)

tiny = join_pairs(("az", "tr"), {"az": (["salam dünya"], ["hello world"]), "tr": (["merhaba dünya", "iyi geceler"], ["hello world", "good night"])})
assert tiny.n == 3 and tiny.lang.tolist() == [0, 1, 1]
assert from_targets(tiny)["sources"].to_dict() == {"hello world": 2, "good night": 1}
from_targets(tiny)
# %% md
## Who has which target

Corpora of sentences that exist in all languages at once would make every choice equally rich. Real ones have gaps, and so has ours: of $T$ candidate targets, the low-resource language has `low`, and every other language has the share `overlap`, drawn for itself. With `overlap` = 0.5 and seven other languages, a target has 3.5 sources in the mean. How many candidates there are follows from `high`, the number of pairs of each other language: $T = \lceil \text{high} / \text{overlap} \rceil$.

Every language draws from a stream of its own, and takes the entries of lowest rank. So a smaller choice is part of a larger one, and leaving a language out changes nothing for the others: comparisons stay paired.
# %%
#| export
def pick(
    there: np.ndarray,  # [T] bool, what may be chosen
    k: int,             # how many; all that are there when fewer
    seed: int,
    purpose: str,       # names the stream of random numbers
) -> np.ndarray:        # [T] bool
    "A choice of k; a smaller k chooses a part of what a larger one does."
    rank = torch.rand(len(there), dtype=torch.float64, generator=seeded(seed, purpose)).numpy()
    chosen = np.zeros(len(there), dtype=bool)
    chosen[np.where(there, rank, 2.0).argsort()[:min(k, int(there.sum()))]] = True
    return chosen

def n_candidates(
    low: int, high: int,  # pairs wanted of the low-resource language, of each other one; 0: all
    overlap: float,       # share of the candidates that each other language has
) -> int | None:          # None: all targets there are
    "How many targets to share out."
    return max(low, math.ceil(round(high / overlap, 6))) if low and high else None
# %%
#| export
def share_targets(
    there: np.ndarray,        # [L, T] bool, which target exists in which language
    languages: tuple,         # [L] names
    lang: str,                # the low-resource one
    low: int, high: int,      # pairs of `lang`, and at most of each other language; 0: all
    overlap: float,           # share of the candidate targets that each other language has
    seed: int = 0,
) -> np.ndarray:              # [L, T] bool, the pairs to keep
    "Which language keeps which target; all targets of `lang` are candidates."
    kept, size = np.zeros_like(there), there.shape[1]
    mine, n = languages.index(lang), n_candidates(low, high, overlap)
    kept[mine] = pick(there[mine], low or size, seed, f"pairs {lang}")
    others = pick(~kept[mine], max((n or size) - int(kept[mine].sum()), 0), seed, "candidates")
    candidates = kept[mine] | others
    most = max(1, round(overlap * int(candidates.sum())))
    for i in set(range(len(languages))) - {mine}:
        kept[i] = pick(there[i] & candidates, min(high or size, most), seed, f"pairs {languages[i]}")
    return kept
# %% md
Four languages, of which all have everything to begin with; `be` is to keep 20 pairs, the others 500 each:
# %%
names = ("be", "ru", "pt", "es")
kept = share_targets(np.ones((4, 2000), dtype=bool), names, "be", 20, 500, 0.5)
assert kept.sum(1).tolist() == [20, 500, 500, 500] and kept.any(0).sum() <= 1000
assert (kept[1:, kept[0]].sum(0) > 0).sum() >= 14   # most targets of be exist in some other language as well
fewer = share_targets(np.ones((3, 2000), dtype=bool), names[:3], "be", 10, 500, 0.5)
assert (fewer[0] <= kept[0]).all() and fewer[0].sum() == 10
pd.DataFrame({"targets": np.bincount(kept.sum(0))[1:]}, index=pd.RangeIndex(1, kept.sum(0).max() + 1, name="sources of a target"))
# %% md
## Numbers in words

A parallel corpus that needs no download: the numbers below a million, written out by the library `num2words` in eight languages that come in related pairs (Azerbaijani and Turkish, Belarusian and Russian, Portuguese and Spanish, Slovak and Czech), and in English. It is real text with real kinship: Azerbaijani *yeddi* is Turkish *yedi*.

All numbers of digits, one to six, are equally likely as long as they last, so that short and long sentences occur: an exponential clock for each number, running at a rate of one over the count of numbers with as many digits, and the first to ring are taken. A second draw gives eight numbers in ten to training and one each to dev and test, once and for all: no size changes which part a number belongs to.
# %%
#| export
NUMBERS = ("az", "tr", "be", "ru", "pt", "es", "sk", "cs")   # source languages of the bundled corpus

@lru_cache(maxsize=1 << 18)
def number_words(n: int, language: str) -> str:
    "A number in words, lower case."
    return num2words(n, lang=language).lower()

def draw_numbers(
    sizes: tuple,  # how many for train, dev and test
    seed: int = 0,
) -> tuple:        # three arrays of distinct numbers, int64; no number is in two of them
    "Numbers of one to six digits. `ValueError` when a part has fewer than asked for."
    numbers = np.arange(10**6)
    numbers = numbers[(numbers < 2000) | (numbers // 1000 % 10 != 1)]   # az and tr of the others: two numbers, one text
    digits = np.searchsorted(10 ** np.arange(1, 6), numbers, side="right")
    u = torch.rand(2, len(numbers), dtype=torch.float64, generator=seeded(seed, "numbers")).numpy()
    clock, part = -np.log1p(-u[0]) * np.bincount(digits)[digits], np.digitize(u[1], [0.8, 0.9])
    parts = [numbers[part == p][clock[part == p].argsort()] for p in range(3)]
    for name, k, have in zip(("candidate targets (low, or high / overlap)", "dev_size", "test_size"), sizes, map(len, parts)):
        if k > have: raise ValueError(f"{name} = {k}: must be at most {have} with corpus = 'numbers'")
    return tuple(p[:k] for p, k in zip(parts, sizes))
# %%
some = [7, 21, 105, 2012, 21735]
words = pd.DataFrame({l: [number_words(n, l) for n in some] for l in ("en", *NUMBERS)}, index=some).T
assert words.loc["az", 7] == "yeddi" and words.loc["tr", 7] == "yedi"
words
# %% md
The strings are the library's, odd ones included. English is British: *and*, a hyphen, a comma after thousands. Turkish and Slovak are written as one long word where Azerbaijani and Czech have spaces, so that kinship shows in characters and not in words. Spanish *veintiuno mil* should be *veintiún mil*.

One oddity is more than that: Azerbaijani, and at times Turkish, loses the *one* before *thousand*, in the table too: 21,735 has become 20,735. Two targets with one source cannot be told apart by any model, so numbers from 2,000 on whose thousands end in 1 are left out, in all languages.
# %%
assert number_words(21735, "az") == number_words(20735, "az") and number_words(101018, "tr") == number_words(100018, "tr")
train, dev, test = draw_numbers((4000, 200, 300))
assert not (set(train) & set(dev) | set(train) & set(test) | set(dev) & set(test)) and len(set(train)) == 4000
assert all(len({number_words(int(n), l) for n in train}) == 4000 for l in NUMBERS)   # what is left is unambiguous
by_digits = {name: pd.Series(part).astype(str).str.len().value_counts() for name, part in (("train", train), ("dev", dev), ("test", test))}
pd.DataFrame(by_digits).rename_axis("digits")
# %% md
## Files

Real corpora are files with a sentence per line, where line $k$ of one belongs to line $k$ of the other. Whatever moves a line ruins all that follow, silently. So lines end at the line feed and nowhere else (Python's `splitlines` also cuts at eight rarer characters, which do occur in web text), and what cannot be right is refused by file and line.
# %%
#| export
def read_lines(
    path: Path,
    absent: bool = False,  # an empty line is allowed: the sentence does not exist in this language
) -> list:                 # sentences, without space around them
    "The lines of a UTF-8 file. `ValueError` on bytes that are not UTF-8, and on empty lines."
    lines = path.read_bytes().removeprefix(b"\xef\xbb\xbf").split(b"\n")
    if not lines[-1]: lines.pop()
    texts = []
    for k, line in enumerate(lines, 1):
        try: texts.append(line.decode().strip())
        except UnicodeDecodeError as e: raise ValueError(f"{path}, line {k}: byte 0x{line[e.start]:02x} is not UTF-8; files must be") from None
        if not (texts[-1] or absent): raise ValueError(f"{path}, line {k}: empty; every line must hold a sentence")
    return texts

def read_pair(
    source: Path, target: Path,  # aligned line by line
    absent: bool = False,        # an empty source line is allowed
) -> tuple:                      # sources and targets, two lists of one length
    "Two aligned files. `ValueError` when one is missing or shorter."
    if not target.is_file(): raise ValueError(f"{target}: no such file; {source} needs it, line by line")
    x, y = read_lines(source, absent), read_lines(target)
    if len(x) != len(y):
        raise ValueError(f"{source} has {len(x)} lines, {target} has {len(y)}: line {min(len(x), len(y)) + 1} of the longer one has no "
                         "partner; aligned files must have equally many")
    return x, y
# %%
folder = Path(tempfile.mkdtemp())
def write(name, *lines):
    "A small file of the lesson."
    (folder / name).parent.mkdir(parents=True, exist_ok=True)
    (folder / name).write_bytes(b"".join(line.encode() if isinstance(line, str) else line for line in lines))
    return folder / name

assert read_lines(write("a.en", "\ufeffone\r\n", "two\u2028halves\n", "three")) == ["one", "two\u2028halves", "three"]
write("b.en", "one\n", b"na\xefve\n"); write("c.en", "one\n", " \n", "three\n"); write("d.en", "one\n")
said = []
for a, b in (("b", "a"), ("c", "a"), ("a", "d"), ("a", "e")):
    try: read_pair(folder / f"{a}.en", folder / f"{b}.en")
    except ValueError as e: said.append(str(e).replace(f"{folder}/", ""))
assert len(said) == 4 and said[1] == "c.en, line 2: empty; every line must hold a sentence"
print("\n".join(said))
# %% md
A folder may be laid out in three ways, told apart by its training files; `en` stands for the target language, `az` for any source:

1. **lines**: `train.en`, `train.az`, ...: one file per language, all aligned, as Multi30k has them. An empty source line says that the target of this line does not exist in that language; a line that is empty in every source is an error.
2. **pairs**: `train.az-en.az` and `train.az-en.en` (or `en-az` in the middle), as OPUS and WMT name them. Every language has targets of its own; equal text is the same target.
3. **TED**: `az_en/ted-train.orig.az` and `az_en/ted-train.orig.en`, or `mtok` for `orig`, the folders of the published experiments, whose codes have three letters (`aze_eng`). Files cut into pieces (`spm8000`) are not read: pieces are made here, from text.

Dev is called `dev`, `val` or `valid`; test anything that begins with `test`, the first by name if there are several.
# %%
#| export
STEMS = {"train": "train", "dev": "dev|val|valid", "test": r"test[^.]*"}

def _ted_place(folder: Path, lang: str, target: str) -> tuple | None:
    "Where the files of a TED folder are: running text before tokenized text; None without training files."
    for kind in ("orig", "mtok"):
        if all((folder / f"ted-train.{kind}.{l}").is_file() for l in (lang, target)): return folder, "ted-", f".{kind}."
    if pieces := sorted(folder.glob(f"ted-train.*spm*.{lang}")):
        raise ValueError(f"{pieces[0]}: cut into pieces; the sentences are needed beside it, as ted-train.orig.{lang} or ted-train.mtok.{lang}")

def find_places(
    root: Path,   # folder of a corpus
    target: str,  # target language
) -> tuple:       # "lines", "pairs", "ted" or ""; {language: (folder, beginning, middle of its file names)}
    "The layout of a folder and its source languages, by the training files."
    names = sorted(p.name for p in root.iterdir())
    lines = {m[1]: (root, "", ".") for n in names if (m := re.fullmatch(r"train\.([^.]+)", n)) and m[1] != target}
    if lines and f"train.{target}" in names: return "lines", lines
    t = re.escape(target)
    pairs = {m[4]: (root, "", f".{m[1]}.") for n in names
             if (m := re.fullmatch(rf"train\.((.+)-{t}|{t}-(.+))\.([^.]+)", n)) and m[4] in (m[2], m[3])}
    ted = {l: p for n in names if n.endswith(f"_{target}") and (p := _ted_place(root / n, l := n[:-len(target) - 1], target))}
    return ("pairs", pairs) if pairs else ("ted", ted) if ted else ("", {})
# %%
#| export
def find_pair(
    place: tuple,  # folder, beginning and middle of the file names, from `find_places`
    part: str,     # "train", "dev" or "test"
    lang: str, target: str,
) -> tuple:        # source file and target file
    "The two files of one part. `ValueError` when the source file is missing."
    folder, before, middle = place
    pattern = f"{before}({STEMS[part]}){re.escape(middle + lang)}"
    if found := sorted(p for p in folder.iterdir() if re.fullmatch(pattern, p.name)):
        return found[0], found[0].with_name(found[0].name.removesuffix(lang) + target)
    raise ValueError(f"lang = {lang!r}: no {part} file in {folder}; it must be called {before}{part}{middle}{lang}")
# %%
for name in ("lines/train.az", "lines/train.tr", "lines/train.en", "lines/val.az", "pairs/train.az-en.az", "pairs/train.en-tr.tr",
             "ted/aze_eng/ted-train.orig.aze", "ted/aze_eng/ted-train.mtok.aze", "ted/aze_eng/ted-train.mtok.eng"):
    write(name, "...\n")
seen = {kind: find_places(folder / kind, "eng" if kind == "ted" else "en") for kind in ("lines", "pairs", "ted")}
assert all(kind == layout for kind, (layout, _) in seen.items()) and find_places(folder, "en") == ("", {})
assert [p.name for p in find_pair(seen["ted"][1]["aze"], "train", "aze", "eng")] == ["ted-train.mtok.aze", "ted-train.mtok.eng"]
{kind: {l: f"{p[1]}train{p[2]}{l}" for l, p in places.items()} for kind, (_, places) in seen.items()}
# %% md
## The recipe of a corpus

Which corpus, which language is the poor one, how poor, and how much the others have in common. The relative is for methods that are told it; the table knows the pairs of the published experiments and of the bundled corpus. Nothing related to Czech is in Multi30k, so there the setting `related` has to decide.
# %%
#| export
RELATED = {"az": "tr", "be": "ru", "gl": "pt", "sk": "cs", "pt": "es",       # low-resource language -> its high-resource relative
           "aze": "tur", "bel": "rus", "glg": "por", "slk": "ces"}

@dataclass(frozen=True)
class CorpusRecipe:
    "Which sentence pairs, and how many of them."
    corpus: str = setting("numbers", "numbers (bundled), multi30k, or a folder of aligned files")
    lang: str = setting("az", "low-resource source language: dev and test are in it")
    languages: str = setting("", "source languages, comma-separated; empty: all that the corpus has")
    related: str = setting("", "high-resource relative of lang, for the method related; empty: the known one")
    target: str = setting("en", "target language")
    low: int = setting(100, "training pairs of lang; 0: all", "natural")
    high: int = setting(2000, "training pairs of every other language, at most; 0: all", "natural")
    overlap: float = setting(0.5, "share of the candidate targets that every other language has; not for files in pairs", "fraction")
    dev_size: int = setting(200, "dev pairs, the first ones; 0: all", "natural")
    test_size: int = setting(300, "test pairs, the first ones; 0: all", "natural")
    data_dir: str | None = setting(None, "folder of the data sets; none: the environment variable DATASEL_DATA")
    data_seed: int = setting(0, "draws which pairs are kept", "natural")
    def __post_init__(self):
        check_settings(self)
        _check_corpus(self)
    def relative(self) -> str | None:
        "The high-resource relative of `lang`, which the corpus may lack; None when none is set or known."
        return self.related or RELATED.get(self.lang)
# %%
#| export
CORPORA = ("numbers", "multi30k")

def _check_corpus(r: CorpusRecipe) -> None:
    "What `check_settings` cannot see: the name of the corpus, and sizes of one that has no end."
    if r.corpus not in CORPORA and not ({"/", os.sep} & set(r.corpus) or Path(r.corpus).is_dir()):
        raise ValueError(f"corpus = {r.corpus!r}: neither a known corpus nor a folder; {suggest(r.corpus, CORPORA)}")
    for name in ("low", "high", "dev_size", "test_size") if r.corpus == "numbers" else ():
        if not getattr(r, name): raise ValueError(f"{name} = 0: must be above 0 with corpus = 'numbers', which has no end")

def _one_of(field: str, word: str, known) -> None:
    "`ValueError` unless a word is known; a near one is hinted at."
    hint = suggest(word, known)
    near = f"; {hint}" if hint.startswith("did you mean") else ""
    if word not in known: raise ValueError(f"{field} = {word!r}: must be one of {', '.join(known)}{near}")

def choose_languages(recipe: CorpusRecipe, known) -> tuple:
    "The source languages of a recipe, of those that the corpus has. `ValueError` on one that it lacks."
    words = [w.strip() for w in recipe.languages.split(",")] if recipe.languages.strip() else list(known)
    for w in words: _one_of("languages", w, known)
    if len(set(words)) < len(words): raise ValueError(f"languages = {recipe.languages!r}: each must be named only once")
    _one_of("lang", recipe.lang, known)
    if recipe.lang not in words: raise ValueError(f"lang = {recipe.lang!r}: must be among languages = {recipe.languages!r}")
    if recipe.related: _one_of("related", recipe.related, [w for w in words if w != recipe.lang])
    return tuple(words)
# %% md
The bundled corpus and a folder of aligned lines come to the same thing: a table of languages and targets, of which some entries are kept. Only the entries kept are put into words. A target that no language keeps is in no pair and so is gone.
# %%
#| export
def _numbers(r: CorpusRecipe) -> tuple:
    "Languages; training pairs by language; dev and test pairs."
    known = (*NUMBERS, "en")
    _one_of("target", r.target, known)
    languages = choose_languages(r, [l for l in known if l != r.target])
    train, *rest = draw_numbers((n_candidates(r.low, r.high, r.overlap), r.dev_size, r.test_size), r.data_seed)
    kept = share_targets(np.ones((len(languages), len(train)), dtype=bool), languages, r.lang, r.low, r.high, r.overlap, r.data_seed)
    def pairs(numbers, l): return tuple([number_words(int(n), code) for n in numbers] for code in (l, r.target))
    return languages, {l: pairs(train[k], l) for l, k in zip(languages, kept)}, *(pairs(numbers, r.lang) for numbers in rest)

def _enough(field: str, asked: int, have: int, where) -> None:
    "`ValueError` when more pairs are asked for than there are, or there are none."
    if not have: raise ValueError(f"{where}: holds no sentence pair; at least one is needed")
    if asked > have: raise ValueError(f"{field} = {asked}: {where} has {have} pairs; 0 takes all")
# %%
#| export
def _train_lines(r: CorpusRecipe, files: dict) -> dict:
    "Training pairs by language, from files that are all aligned with one target file."
    texts = {l: read_pair(*f, absent=True) for l, f in files.items()}
    targets, path = texts[r.lang][1], files[r.lang][1]
    there = np.array([[bool(s) for s in x] for x, _ in texts.values()])
    if not r.languages and not there.any(0).all():
        raise ValueError(f"{path}, line {int(there.any(0).argmin()) + 1}: a target with no source; each must have one in some language")
    for (l, f), have in zip(files.items(), there.sum(1).tolist()): _enough("low", r.low if l == r.lang else 0, have, f[0])
    some = there.any(0).nonzero()[0]   # with languages chosen, a target may have no source in any of them
    kept = share_targets(there[:, some], tuple(texts), r.lang, r.low, r.high, r.overlap, r.data_seed)
    return {l: ([texts[l][0][i] for i in some[k]], [targets[i] for i in some[k]]) for l, k in zip(texts, kept)}

def _train_pairs(r: CorpusRecipe, files: dict) -> dict:
    "Training pairs by language, from two files for each language."
    kept = {}
    for l, f in files.items():
        x, y = read_pair(*f)
        _enough("low", r.low if l == r.lang else 0, len(x), f[0])
        at = pick(np.ones(len(x), dtype=bool), (r.low if l == r.lang else r.high) or len(x), r.data_seed, f"pairs {l}").nonzero()[0]
        kept[l] = [x[i] for i in at], [y[i] for i in at]
    return kept
# %%
#| export
def _places(root: Path, r: CorpusRecipe) -> tuple:
    "Layout and source languages of a folder. `ValueError` that tells the layouts, or the target languages, when none fits."
    if not root.is_dir(): raise ValueError(f"corpus = {r.corpus!r}: no such folder {root}")
    layout, places = find_places(root, r.target)
    if places: return layout, places
    words = {w for p in root.iterdir() for n in (p.name,) for w in (n.split(".")[-1], n.split("_")[-1])}
    if known := sorted(w for w in words if find_places(root, w)[1]): _one_of("target", r.target, known)
    l, t = "{lang}", r.target
    raise ValueError(f"corpus = {r.corpus!r}: no training files in {root}; it must hold train.{t} and train.{l}, or train.{l}-{t}.{l} and "
                     f"train.{l}-{t}.{t}, or {l}_{t}/ted-train.orig.{l} and {l}_{t}/ted-train.orig.{t} (or mtok)")

def _held_out(r: CorpusRecipe, layout: str, place: tuple, part: str) -> tuple:
    "The first pairs of the dev or test files of `lang`."
    files, size = find_pair(place, part, r.lang, r.target), getattr(r, f"{part}_size")
    pairs = [p for p in zip(*read_pair(*files, absent=layout == "lines")) if p[0]]
    _enough(f"{part}_size", size, len(pairs), files[0])
    return tuple(map(list, zip(*pairs[:size or None])))
# %%
#| export
def _files(r: CorpusRecipe) -> tuple:
    "Languages; training pairs by language; dev and test pairs: from a folder in one of the three layouts."
    root = Path(r.corpus)
    if r.corpus == "multi30k":
        data = r.data_dir or os.environ.get("DATASEL_DATA")
        root = Path(data or "DATASEL_DATA", r.corpus)
        if not (data and root.is_dir()):
            raise ValueError(f"corpus = 'multi30k': no folder {root}; set data_dir, or the environment variable DATASEL_DATA, to the folder that "
                             "holds multi30k/ with the files train, val and test_2016_flickr, each with the endings .en, .de, .fr and .cs")
    layout, places = _places(root, r)
    languages = choose_languages(r, sorted(places))
    held_out = [_held_out(r, layout, places[r.lang], part) for part in ("dev", "test")]
    files = {l: find_pair(places[l], "train", l, r.target) for l in languages}
    return languages, (_train_lines if layout == "lines" else _train_pairs)(r, files), *held_out

def load_corpus(recipe: CorpusRecipe) -> Parallel:
    "The corpus of a recipe. `ValueError` says what does not fit."
    languages, train, dev, test = (_numbers if recipe.corpus == "numbers" else _files)(recipe)
    return Parallel(join_pairs(languages, train), *(join_pairs(languages, {recipe.lang: pairs}) for pairs in (dev, test)))
# %% md
The default: Azerbaijani with 100 pairs, seven others with 2,000 each.
# %%
recipe = CorpusRecipe()
data = load_corpus(recipe)
assert np.bincount(data.train.lang).tolist() == [100] + [2000] * 7 and (data.dev.n, data.test.n) == (200, 300)
assert {data.train.languages[i] for i in data.dev.lang} == {"az"} and recipe.relative() == "tr"
assert not set(data.train.target) & set(data.dev.target + data.test.target)
table = from_targets(data.train)
of_az = table[table["az"] != ""].sort_values("sources").iloc[::30]
assert 3.4 < table["sources"].mean() < 3.7 and (table.loc[table["az"] != "", "sources"] > 1).mean() > 0.9
of_az.T
# %% md
Most targets have several sources, and so there is something to choose:
# %%
pd.crosstab(table["sources"], np.where(table["az"] != "", "with az", "without az"))
# %% md
Files in one of the layouts give the same thing. Here the Turkish file has a gap, at a target that only Azerbaijani has:
# %%
for part, numbers in (("train", range(1, 9)), ("dev", (10, 12)), ("test", (20, 30))):
    for l in ("az", "tr", "en"): write(f"lines/{part}.{l}", *(("" if (l, n) == ("tr", 3) else number_words(n, l)) + "\n" for n in numbers))
(folder / "lines/val.az").unlink()
mine = load_corpus(CorpusRecipe(corpus=str(folder / "lines"), low=0, high=0, overlap=1.0, dev_size=0, test_size=0))
assert np.bincount(mine.train.lang).tolist() == [8, 7] and mine.dev.source == ["on", "on iki"]
assert from_targets(mine.train).loc["three", "sources"] == 1
from_targets(mine.train).head(3)
# %% md
And recipes that cannot be:
# %%
write("lines/train.az", *["bir\n"] * 2, "\n", *["bir\n"] * 5)
(folder / "empty").mkdir()
said = []
for bad in ({"corpus": "number"}, {"lang": "azz"}, {"languages": "tr,ru"}, {"languages": "az,tr,pl"}, {"related": "az"}, {"target": "eng"},
            {"high": 0}, {"overlap": 0.0}, {"dev_size": 10**6}, {"corpus": "multi30k", "data_dir": str(folder)},
            {"corpus": str(folder / "empty")}, {"corpus": str(folder / "lines"), "dev_size": 0, "test_size": 0},
            {"corpus": str(folder / "lines"), "dev_size": 3}, {"corpus": str(folder / "lines"), "target": "eng"}):
    try: load_corpus(CorpusRecipe(**bad))
    except ValueError as e: said.append(str(e).replace(str(folder), "<folder>"))
assert len(said) == 14
print("\n".join(said))
