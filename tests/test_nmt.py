"""Translation against computations that share nothing with it: loops,
enumeration, finite differences, sacrebleu's command, explicit gradients."""
import copy
import io
import itertools
import json
import math
import re
import shutil
import subprocess
import sys
import warnings
from collections import Counter, defaultdict
from dataclasses import replace

import numpy as np
import pandas as pd
import pytest
import torch

from datasel_wb.core import Collectives, seeded, start_momentum
from datasel_wb.corpus import NUMBERS, RELATED, CorpusRecipe, join_pairs, load_corpus, number_words
from datasel_wb.mixtures import (
    TCS, LanguageDDS, LanguageSampler, LanguageScorer, Languages, Sketch, imitate)
from datasel_wb.sources import gumbel, masked_log_softmax, ngrams, similarity, target_conditioned
from datasel_wb.translation import (
    BOS, EOS, PAD, NMTRecipe, PairLoader, Pairs, Seq2Seq, Translation, beam_search, corpus_loss, encode,
    paired_bootstrap, prepare_text, sentence_loss, train_pieces, translate, translation_scores)
from datasel_wb.selectors import Task, Uniform
from datasel_wb.backends import Eager
from datasel_wb.checkpoints import Checkpoints
from datasel_wb.trainer import fit
from datasel_wb.weighting import SPCL

RECIPE = NMTRecipe(steps=24, warmup_steps=3, lr=5e-3, dropout=0.2, source_vocab=300, target_vocab=60, embed=8,
                   hidden=12, max_tokens=400, log_every=4, eval_every=12, save_every=8, beam=2)


@pytest.fixture(scope="module")
def corpus(): return load_corpus(CorpusRecipe(low=50, high=250, dev_size=30, test_size=25))

@pytest.fixture(scope="module")
def text(corpus): return prepare_text(corpus, RECIPE)

@pytest.fixture(scope="module")
def alike(corpus): return similarity(corpus.train)


def again(state):
    "A state after a checkpoint on disk."
    file = io.BytesIO()
    torch.save(state, file)
    return torch.load(io.BytesIO(file.getvalue()), weights_only=True)

def said(warned): return [str(w.message) for w in warned if issubclass(w.category, UserWarning)]

def seed_weights(net, seed, std=0.7):
    "Weights that make a distribution far from even."
    rng = seeded(seed, "weights")
    with torch.no_grad():
        for p in net.parameters(): p.copy_(std * torch.randn(p.shape, generator=rng, dtype=p.dtype))
    return net.eval()

def tiny_net(seed=0, vocab=(7, 6), std=0.7, end=0.0):
    "In float64; `end` is added to the logit of the end."
    net = seed_weights(Seq2Seq(vocab, 3, 4, 0.0).double(), seed, std)
    with torch.no_grad(): net.out.bias[EOS] += end
    return net

@pytest.fixture(scope="module")
def talker(text):
    "A network of a usual shape that says very different things."
    net = seed_weights(Seq2Seq(text.train.vocab, 12, 16, 0.0), 0, 1.0)
    with torch.no_grad(): net.out.bias[EOS] += 4
    return net

def sentences(n, vocab, seed=0, longest=6):
    "Random source rows, the end last."
    rng = seeded(seed, "sentences")
    return [torch.cat([torch.randint(3, vocab, (int(torch.randint(0, longest, (), generator=rng)),), generator=rng),
                       torch.tensor([EOS])]) for _ in range(n)]

def padded(rows, width=0):
    return torch.nn.utils.rnn.pad_sequence([*rows, torch.zeros(width or 1, dtype=torch.int64)], True, PAD)[:-1]


# ---- pieces

def test_vocabularies_that_cannot_be(corpus):
    "One sentence with setting and limit, and the limit is where it says: one piece further is refused, the limit not."
    for size, words, side, step in ((5000, "must be at most", corpus.train.target, 1),
                                    (10, "must be at least", corpus.train.source, -1)):
        with pytest.raises(ValueError, match=rf"^some_vocab = {size}: {words} \d+[^\n]*$") as e:
            train_pieces(side, size, "some_vocab")
        limit = int(re.search(rf"{words} (\d+)", str(e.value))[1])
        assert train_pieces(side, limit, "some_vocab").vocab_size() == limit
        with pytest.raises(ValueError, match=f"^some_vocab = {limit + step}: "):
            train_pieces(side, limit + step, "some_vocab")


def test_prepare_names_the_settings(corpus):
    for bad in ({"source_vocab": 20}, {"source_vocab": 50_000}, {"target_vocab": 6}, {"target_vocab": 50_000}):
        name, value = next(iter(bad.items()))
        with pytest.raises(ValueError, match=f"^{name} = {value}: must be at "):
            prepare_text(corpus, replace(RECIPE, **bad))


def test_pieces_give_every_sentence_back(corpus, text):
    assert set(corpus.train.lang.tolist()) == set(range(8))
    for part in (corpus.train, corpus.dev, corpus.test):
        for sentence in part.source: assert text.source.decode(text.source.encode(sentence)) == sentence
        for sentence in part.target: assert text.target.decode(text.target.encode(sentence)) == sentence
    assert [text.source.id_to_piece(i) for i in range(4)] == ["<pad>", "<s>", "</s>", "<unk>"]


# ---- pairs

def test_pairs_hold_every_sentence(corpus, text):
    for split, part in ((text.train, corpus.train), (text.dev, corpus.dev), (text.test, corpus.test)):
        assert len(split) == part.n and split.x.shape[2] == split.y.shape[1] == int(split.length.max())
        names = {}
        for i in range(part.n):
            source, before, y = (row[:int((row != PAD).sum())].tolist() for row in (*split.x[i], split.y[i]))
            assert not split.x[i, 0, len(source):].any() and not split.x[i, 1, len(before):].any()
            assert not split.y[i, len(y):].any()
            assert source[-1] == y[-1] == EOS and before[0] == BOS and before[1:] == y[:-1] and len(before) == len(y)
            assert not {PAD, BOS, EOS} & {*source[:-1], *y[:-1]} and max(source) < split.vocab[0]
            assert max(y) < split.vocab[1]
            assert text.source.decode(source) == part.source[i] and text.target.decode(y) == part.target[i]
            assert split.length[i] == max(len(source), len(y)) and split.lang[i] == part.lang[i] and split.ids[i] == i
            assert names.setdefault(part.target[i], int(split.target[i])) == split.target[i]
        assert len(set(names.values())) == len(names) and sorted(names.values()) == list(range(len(names)))
    assert text.train.vocab == (300, 60) and text.train.n_classes == 60


def test_present_is_a_look_into_a_dictionary(corpus, text):
    there, present = defaultdict(set), text.train.present()
    for target, lang in zip(corpus.train.target, corpus.train.lang.tolist()): there[target].add(lang)
    for i, target in enumerate(corpus.train.target):
        row = present[text.train.target[i]]
        assert {l for l in range(8) if row[l]} == there[target]
    assert len(present) == len(there)


def test_long_sentences_are_counted_and_left_out(corpus, text):
    def pieces(i):
        return max(len(text.source.encode(corpus.train.source[i])), len(text.target.encode(corpus.train.target[i]))) + 1
    for limit in (12, 16):
        stay = [i for i in range(corpus.train.n) if pieces(i) <= limit]
        with warnings.catch_warnings(record=True) as warned:
            warnings.simplefilter("always")
            short = encode(corpus.train, text.source, text.target, limit)
        told, = said(warned)
        assert told.startswith(f"max_length = {limit}: {corpus.train.n - len(stay)} of {corpus.train.n} training pairs")
        assert short.ids.tolist() == stay
        assert short.lang.tolist() == corpus.train.lang[stay].tolist()
        assert int(short.length.max()) <= limit
        assert sorted(short.target.unique().tolist()) == list(range(len({corpus.train.target[i] for i in stay})))
        assert len(short.present()) == int(short.target.max()) + 1 and short.present().any(1).all()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert len(encode(corpus.train, text.source, text.target,
                          max(map(pieces, range(corpus.train.n))))) == corpus.train.n


def test_a_language_without_pairs_left_is_refused(text):
    far, near = number_words(777_777, "tr"), number_words(1, "az")
    uneven = join_pairs(("az", "tr"), {"az": ([near] * 2, ["one"] * 2), "tr": ([far], ["one"])})
    shortest = len(text.source.encode(far)) + 1
    with pytest.warns(UserWarning), pytest.raises(
            ValueError, match=rf"^max_length = 4: must leave pairs of tr; its shortest has {shortest} pieces$"):
        encode(uneven, text.source, text.target, 4)


def test_padded_lengths_share_the_pairs(text):
    for n in (1, 3, 6):
        split = Pairs(text.train.x, text.train.y, text.train.lang, text.train.target, text.train.ids,
                      text.train.languages, text.train.vocab, n)
        assert 1 <= len(split.lengths) <= n and list(split.lengths) == sorted(set(split.lengths))
        assert split.lengths[-1] == int(split.length.max())
        below = [0, *[sum(l <= m for l in split.length.tolist()) for m in split.lengths]]
        ties = max(Counter(split.length.tolist()).values())
        assert max(b - a for a, b in zip(below, below[1:])) <= len(split) / n + ties


# ---- batches

class Two(Collectives): devices = 2

@pytest.mark.parametrize("words, given, collectives",
                         [(300, None, Collectives()), (500, "part", Collectives()), (300, None, Two())])
def test_batches_are_full_and_hold_their_sentences(text, words, given, collectives):
    pairs = text.train
    ids = None if given is None else torch.randperm(len(pairs), generator=seeded(1, "part"))[:700]
    loader = PairLoader(pairs, words, seed=4, collectives=collectives)
    shapes = {(words // n // collectives.devices * collectives.devices, n) for n in pairs.lengths}
    epochs = []
    for _ in range(2):
        seen = []
        for batch in loader(ids):
            rows, _, length = batch.x.shape
            assert (rows, length) in shapes and loader.given == rows and rows * length <= words
            assert rows % collectives.devices == 0
            assert batch.y.shape == (rows, length) and int(pairs.length[batch.idx].max()) <= length     # nothing is cut
            whole = pairs.take(batch.idx)
            assert torch.equal(batch.x, whole.x[:, :, :length]) and torch.equal(batch.y, whole.y[:, :length])
            assert not whole.x[:, :, length:].any() and not whole.y[:, length:].any()
            seen += batch.idx.tolist()
        allowed = set(range(len(pairs)) if ids is None else ids.tolist())
        assert len(seen) == len(set(seen)) and set(seen) <= allowed
        assert len(allowed) - len(seen) < min(rows for rows, _ in shapes)
        assert loader.remaining == 0
        epochs.append(seen)
    assert epochs[0] != epochs[1]
    assert abs(loader.batches_per_epoch(len(ids)) / len(loader.plan) - 1) < 0.2 if ids is not None else True


def test_batches_of_every_shape_come_in_mixed_order(text):
    lengths = [b.x.shape[2] for b in PairLoader(text.train, 300)(None)]
    assert set(lengths) == set(text.train.lengths) and lengths != sorted(lengths)
    assert lengths != sorted(lengths, reverse=True)


@pytest.mark.parametrize("resident", [True, False])
def test_a_loader_resumes_in_mid_epoch(text, resident):
    whole = PairLoader(text.train, 300, seed=2, resident=resident)
    for _ in whole(None): pass
    batches = whole(None)
    for _ in range(5): next(batches)
    state, fresh = again(whole.state_dict()), PairLoader(text.train, 300, seed=2, resident=resident)
    fresh.load_state_dict(state)
    assert fresh.remaining == whole.remaining > 5
    rest, more = list(batches), list(iter(fresh))
    for _ in range(2):
        assert len(rest) == len(more) and all(torch.equal(s, t) for a, b in zip(rest, more) for s, t in zip(a, b))
        rest, more = list(whole(None)), list(fresh(None))
    assert torch.equal(whole.usage(), fresh.usage())


def test_usage_counts_the_languages_of_the_batches(text):
    loader, count = PairLoader(text.train, 300), Counter()
    assert loader.usage().tolist() == [0] * 8
    for k, batch in enumerate(loader(None), 1):
        count.update(text.train.lang[batch.idx].tolist())
        if k % 7: continue
        assert loader.usage().tolist() == pytest.approx([count[l] / sum(count.values()) for l in range(8)])
        count.clear()


@pytest.mark.parametrize("devices", [1, 2])
def test_words_that_make_no_batch(text, devices):
    longest, n = text.train.lengths[-1], len(text.train)
    c = Two() if devices == 2 else Collectives()
    few, many = devices * longest - 1, n * longest + devices * longest
    assert PairLoader(text.train, few + 1, collectives=c).sizes[-1] == devices
    with pytest.raises(ValueError, match=f"^max_tokens = {few}: must be at least {few + 1}, "):
        PairLoader(text.train, few, collectives=c)
    with pytest.raises(ValueError, match=f"^max_tokens = {many}: must be at most {n * longest}, "):
        PairLoader(text.train, many, collectives=c)
    for words in (few, many):
        with pytest.raises(ValueError, match=f"^max_tokens = {words}: "):
            replace(RECIPE, max_tokens=words).check(text.train, devices)


# ---- the model

def lstm_loop(cell, xs, h, c):
    "An LSTM by its equations: states [T, H] and the last cell."
    states = []
    for x in xs:
        i, f, g, o = (cell.weight_ih_l0 @ x + cell.bias_ih_l0 + cell.weight_hh_l0 @ h + cell.bias_hh_l0).chunk(4)
        c = f.sigmoid() * c + i.sigmoid() * g.tanh()
        states.append(h := o.sigmoid() * c.tanh())
    return torch.stack(states), c

def written_out(net, source, prefix):
    "Logits [T, V] of one sentence without padding, piece by piece."
    zero = torch.zeros(net.ahead.hidden_size, dtype=torch.float64)
    pieces = net.source.weight[source]
    ahead = lstm_loop(net.ahead, pieces, zero, zero)[0]
    back = lstm_loop(net.back, pieces.flip(0), zero, zero)[0].flip(0)
    m = torch.stack([net.memory.weight @ torch.cat([a, b]) + net.memory.bias for a, b in zip(ahead, back)])
    h, c = (net.start.weight @ torch.cat([ahead[-1], back[0]]) + net.start.bias).chunk(2)
    logits = []
    for q in lstm_loop(net.decoder, net.target.weight[prefix], h.tanh(), c)[0]:
        weight = torch.tensor([float((net.score.weight @ q) @ mj) for mj in m], dtype=torch.float64).exp()
        context = sum(w * mj for w, mj in zip(weight / weight.sum(), m))
        logits.append(net.out.weight @ (net.mix.weight @ torch.cat([q, context]) + net.mix.bias).tanh() + net.out.bias)
    return torch.stack(logits)

@torch.no_grad()
def test_the_network_written_out_and_padding(text):
    net = tiny_net()
    sources, targets = sentences(12, 7, 0), [s[:-1] for s in sentences(12, 6, 1)]
    x = torch.stack([padded(sources, 9), padded([torch.cat([torch.tensor([BOS]), t]) for t in targets], 9)], 1)
    logits = net(x)
    for i, (source, target) in enumerate(zip(sources, targets)):
        prefix = torch.cat([torch.tensor([BOS]), target])
        assert torch.allclose(logits[i, :len(prefix)], written_out(net, source, prefix), rtol=0, atol=1e-10)
        width = max(len(source), len(prefix))
        assert torch.allclose(logits[i, :len(prefix)], net(x[i:i + 1, :, :width])[0, :len(prefix)], rtol=0, atol=1e-10)
    assert logits.std() > 0.3                                                              # and it is not all the same


def test_attention_gives_padding_no_weight():
    net, source, prefix = tiny_net(), padded(sentences(8, 7), 8), torch.full((8, 3), 4)
    memory, mask, state = net.encode(source)
    memory = memory.detach().requires_grad_()
    logits = net.decode(prefix, memory, mask, state)[0]
    assert torch.equal(mask, source != PAD) and not mask.all()
    other = torch.where(mask[:, :, None], memory,
                        1e3 * torch.randn(memory.shape, generator=seeded(0, "other"), dtype=torch.float64))
    assert torch.equal(net.decode(prefix, other, mask, state)[0], logits)
    g, = torch.autograd.grad((logits * torch.randn(logits.shape, generator=seeded(1, "other"), dtype=torch.float64))
                             .sum(), memory)
    assert not g[~mask].any() and (g[mask].abs().sum(-1) > 0).float().mean() > 0.9


def test_gradients_are_finite_differences():
    net = tiny_net().train()
    sources, targets = sentences(5, 7, 2), sentences(5, 6, 3)
    x = torch.stack([padded(sources, 7), padded([torch.cat([torch.tensor([BOS]), t[:-1]]) for t in targets], 7)], 1)
    y, share = padded(targets, 7), torch.arange(1.0, 6, dtype=torch.float64)
    def loss(): return sentence_loss(net(x), y, 0.1) @ share
    loss().backward()
    rng, eps = seeded(0, "coordinates"), 1e-5
    for name, p in net.named_parameters():
        for k in torch.randperm(p.numel(), generator=rng)[:6].tolist():
            flat, there = p.data.view(-1), []
            for sign in (1, -1):
                flat[k] += sign * eps
                with torch.no_grad(): there.append(float(loss()))
                flat[k] -= sign * eps
            assert float(p.grad.view(-1)[k]) == pytest.approx((there[0] - there[1]) / (2 * eps), rel=1e-5, abs=1e-7), (
                f"{name}[{k}]")
        assert p.grad.abs().sum() > 0


@torch.no_grad()
def test_teacher_forcing_is_decoding_piece_by_piece(text):
    net, batch = seed_weights(Seq2Seq(text.train.vocab, 6, 9, 0.3).double(), 1, 0.3), text.train.take(torch.arange(20))
    memory, mask, state = net.encode(batch.x[:, 0])
    steps = []
    for t in range(batch.x.shape[2]):
        logits, state = net.decode(batch.x[:, 1, t:t + 1], memory, mask, state)
        steps.append(logits)
    assert torch.allclose(torch.cat(steps, 1), net(batch.x), rtol=0, atol=1e-10)


@pytest.mark.parametrize("smoothing", [0.0, 0.1])
def test_sentence_loss_is_a_loop(smoothing):
    rng = seeded(0, "logits")
    logits = 3 * torch.randn(6, 5, 7, generator=rng, dtype=torch.float64)
    y = padded([torch.randint(1, 7, (n,), generator=rng) for n in (5, 1, 3, 2, 4)]
               + [torch.zeros(0, dtype=torch.int64)], 5)
    losses = sentence_loss(logits, y, smoothing)
    for i in range(5):
        total = n = 0
        for t in range(5):
            if y[i, t] == PAD: continue
            z = [math.exp(v) for v in logits[i, t].tolist()]
            logp = [math.log(v / sum(z)) for v in z]
            total, n = total - (1 - smoothing) * logp[y[i, t]] - smoothing * sum(logp) / 7, n + 1
        assert float(losses[i]) == pytest.approx(total / n, abs=1e-12)
    assert losses[5] == 0                                                                   # nothing to say, no NaN
    assert torch.allclose(sentence_loss(logits.float(), y, smoothing).double(), losses, atol=1e-5)
    assert sentence_loss(logits.bfloat16(), y, smoothing).dtype == torch.float32


def test_corpus_loss_is_the_mean_over_all_pieces(text, talker):
    total = n = 0
    for i in range(len(text.dev)):
        y = text.dev.y[i][text.dev.y[i] != PAD].long()
        with torch.no_grad(): logp = talker(text.dev.take(torch.tensor([i])).x)[0].double().log_softmax(1)
        total, n = total - float(logp[torch.arange(len(y)), y].sum()), n + len(y)
    assert corpus_loss(talker, text.dev, max_tokens=200) == pytest.approx(total / n, rel=1e-5) == corpus_loss(
        talker, text.dev)


# ---- search

SAYS = (EOS, 3, 4, 5)   # what a model of six target pieces may say

@torch.no_grad()
def every_translation(net, source, limit, alpha):
    "Each sequence that ends within the limit, or is as long as the limit and does not end -> its score."
    ends = [(*s, EOS) for n in range(limit) for s in itertools.product(SAYS[1:], repeat=n)]
    scores, memory = {}, net.encode(source[None])
    for s in ends + list(itertools.product(SAYS[1:], repeat=limit)):
        logp = net.decode(torch.tensor([[BOS, *s[:-1]]]), *memory)[0][0].log_softmax(1)
        scores[s] = float(sum(logp[t, p] for t, p in enumerate(s))) / len(s) ** alpha
    return scores

def told(row): return tuple(p for p in row.tolist() if p != PAD)


@pytest.mark.parametrize("alpha", [0.0, 1.0])
@pytest.mark.parametrize("limit", [3, 4])
def test_a_wide_beam_is_exhaustive(limit, alpha):
    lengths = set()
    for seed in range(4):
        net, rows = tiny_net(seed, std=1.0 if alpha else 2.5, end=2 * alpha), sentences(3, 7, seed)
        found = beam_search(net, padded(rows), limit, beam=4 ** limit, alpha=alpha)
        for source, row in zip(rows, found):
            scores = every_translation(net, source, limit, alpha)
            # one without an end counts where nothing has ended
            best = max((s for s in scores if s[-1] == EOS), key=scores.get)
            assert told(row) == tuple(p for p in best if p != EOS)
            lengths.add(len(best))
    # the cases are not all alike
    assert len(lengths) > 1


def test_a_narrow_beam_finds_no_more_and_lengths_count():
    "A search can only find what there is; a larger exponent prefers longer translations."
    shorter = longer = 0
    for seed in range(12):
        net, rows = tiny_net(seed, std=2.5), sentences(4, 7, seed)
        narrow, plain, long = (beam_search(net, padded(rows), 4, beam, alpha)
                               for beam, alpha in ((1, 0.0), (256, 0.0), (256, 3.0)))
        for source, n, p, l in zip(rows, narrow, plain, long):
            scores = every_translation(net, source, 4, 0.0)
            def score(row): return scores[told(row) if len(told(row)) == 4 else (*told(row), EOS)]
            shorter, longer = shorter + len(told(p)), longer + len(told(l))
            if len(told(n)) == 4:
                continue                                                  # greedy search came to no end
            assert score(n) <= score(p) + 1e-6
    assert shorter < longer


@torch.no_grad()
def test_a_beam_of_one_is_greedy():
    for seed in range(3):
        net, rows = tiny_net(seed, std=1.0), sentences(8, 7, seed)
        for source, row in zip(rows, beam_search(net, padded(rows), 7, beam=1)):
            out, memory = [BOS], net.encode(source[None])
            while len(out) < 8 and out[-1] != EOS:
                last = net.decode(torch.tensor([out]), *memory)[0][0, -1]
                out.append(max(SAYS, key=lambda p: float(last[p])))
            assert told(row) == tuple(p for p in out[1:] if p != EOS)


@pytest.mark.parametrize("beam", [1, 4])
def test_batches_translate_as_sentences_alone_do(text, talker, beam):
    for net, rows in ((talker, [r[r != PAD].long() for r in text.dev.x[:20, 0]]),
                      (tiny_net(3, (30, 20), std=1.0, end=1.0), sentences(20, 30))):
        together = beam_search(net, padded(rows), 12, beam)
        for source, row in zip(rows, together): assert told(row) == told(beam_search(net, source[None], 12, beam)[0])
        assert len(set(map(told, together))) > 3


def test_search_leaves_the_mode_and_takes_no_dropout(text):
    net = seed_weights(Seq2Seq((7, 6), 3, 4, 0.5).double(), 0).train()
    modes, rows = [m.training for m in net.modules()], padded(sentences(9, 7))
    a, b = beam_search(net, rows, 6), beam_search(net, rows, 6)
    assert torch.equal(a, b) and [m.training for m in net.modules()] == modes


def test_translations_keep_their_order(text, talker, corpus):
    sources = [*corpus.dev.source, "", corpus.dev.source[0]]
    def run(some, **kw): return translate(talker, some, text.source, text.target, limit=25, **kw)
    whole = run(sources)
    assert len(whole) == len(sources) and whole[-1] == whole[0] and len(set(whole)) > 10
    turn = torch.randperm(len(sources), generator=seeded(0, "turn")).tolist()
    assert run([sources[i] for i in turn]) == [whole[i] for i in turn]
    for words in (1, 60, 300): assert run(sources, max_tokens=words) == whole
    assert run(sources[:1]) == whole[:1] and run([]) == [] and run(tuple(sources)) == whole
    assert all(isinstance(t, str) for t in run(["", "~"], beam=1))


# ---- scores

REFERENCES = ["The cat — a “big” one — sat on the mat.", "¿Qué? Sí, 1,234.5 km²!", "naïve café, déjà vu…", "数字は百です",
              "½ of it; don't (really) go", "one hundred and five thousand", "A & B <i>x</i> 50%",
              "Straße über ĐĐ ə ğ ı"] * 4
WORSE = ["The cat - a big one sat on a mat.", "¿Que? Si, 1,234.5 km!", "naive café, deja vu…", "数字は千です",
         "½ of that; do not go", "one hundred and five", "A and B x 50 %", ""] * 4

def sacrebleu_says(*arguments):
    return json.loads(subprocess.run([sys.executable, "-m", "sacrebleu", *map(str, arguments)], check=True,
                                     capture_output=True, text=True).stdout)

@pytest.fixture
def files(tmp_path):
    def write(name, lines):
        (tmp_path / name).write_text("".join(f"{l}\n" for l in lines), encoding="utf-8")
        return tmp_path / name
    return write


def test_scores_are_those_of_sacrebleus_command(files):
    ours = translation_scores(WORSE, REFERENCES)
    theirs = sacrebleu_says(files("ref", REFERENCES), "-i", files("hyp", WORSE), "-m", "bleu", "chrf", "-b", "-w", 6)
    assert [round(ours["bleu"], 6), round(ours["chrf"], 6)] == theirs and 5 < theirs[0] < 90
    assert translation_scores(REFERENCES, REFERENCES) == pytest.approx({"bleu": 100, "chrf": 100})


def test_paired_bootstrap_is_that_of_sacrebleus_command(files):
    half = [r if k % 3 else w for k, (r, w) in enumerate(zip(REFERENCES, WORSE))]
    other = [r if k % 3 != 1 else w for k, (r, w) in enumerate(zip(REFERENCES, WORSE))]
    systems = {"half": half, "other": other, "worse": WORSE}
    ours = paired_bootstrap(systems, REFERENCES)
    theirs = sacrebleu_says(files("ref", REFERENCES), "-i", *(files(k, v) for k, v in systems.items()), "-m", "bleu",
                            "--paired-bs", "-f", "json")
    assert list(ours.index)[1:] == ["other", "worse"] and len(theirs) == 3
    for (_, row), there in zip(ours.iterrows(), theirs):
        assert (row.bleu, row.interval) == pytest.approx((there["BLEU"]["score"], there["BLEU"]["ci"]), abs=1e-9)
        assert (np.isnan(row.p) if there["BLEU"]["p_value"] is None
                else row.p == pytest.approx(there["BLEU"]["p_value"], abs=1e-12))
    assert np.isnan(ours.p.iloc[0]) and ours.p["worse"] < 0.01 < 0.05 < ours.p["other"]


def test_a_copy_of_the_baseline_is_no_improvement():
    "sacrebleu's own p would be the smallest there is."
    test = paired_bootstrap({"a": WORSE, "copy": list(WORSE), "right": REFERENCES}, REFERENCES, samples=200)
    assert test.p["copy"] == 1 and test.p["right"] == pytest.approx(1 / 201) and test.bleu["copy"] == test.bleu.iloc[0]
    with pytest.raises(ValueError, match=r"^systems = \['a'\]: must be two or more"):
        paired_bootstrap({"a": WORSE}, REFERENCES)


# ---- how alike languages are

def counted_ngrams(sentences, n, top):
    counts = Counter()
    for sentence in sentences:
        for start in range(len(sentence)):
            for end in range(start + 1, min(start + n, len(sentence)) + 1):
                if not any(ch.isspace() for ch in sentence[start:end]): counts[sentence[start:end]] += 1
    return counts, set(sorted(counts, key=lambda g: (-counts[g], g))[:top or len(counts)])

@pytest.mark.parametrize("n, top", [(4, 10_000), (4, 60), (2, 0), (1, 5)])
def test_similarity_is_a_nested_loop(corpus, n, top):
    sides = {l: [s for s, k in zip(corpus.train.source, corpus.train.lang) if k == i] for i, l in enumerate(NUMBERS)}
    grams, table = {l: counted_ngrams(s, n, top)[1] for l, s in sides.items()}, similarity(corpus.train, n, top)
    assert ngrams(sides["az"], n, top) == grams["az"]
    for a, b in itertools.product(NUMBERS, repeat=2):
        assert table.loc[a, b] == pytest.approx(sum(g in grams[b] for g in grams[a]) / len(grams[a]))
    # the most frequent, not the rarest
    if top == 60:
        counts = counted_ngrams(sides["tr"], 4, 0)[0]
        assert (min(counts[g] for g in ngrams(sides["tr"], 4, 60)) >= max(c for g, c in counts.items()
                                                                          if g not in grams["tr"]))


@pytest.mark.parametrize("lang", ["az", "be", "sk"])
@pytest.mark.parametrize("low", [50, 100])
def test_the_relative_is_the_nearest(lang, low):
    table = similarity(load_corpus(CorpusRecipe(lang=lang, low=low)).train)
    assert table.loc[lang].drop(lang).idxmax() == RELATED[lang] and np.allclose(np.diag(table), 1)


# ---- which language for this sentence

def synthetic(present, copies=None):
    "Pairs of a piece each, from a table of the targets [T] and their languages [L]; `copies` of each pair."
    target, lang = (present if copies is None else present).nonzero(as_tuple=True)
    if copies is not None: target, lang = (t.repeat_interleave(copies[target, lang]) for t in (target, lang))
    turn = torch.randperm(len(target), generator=seeded(0, "turn"))
    target, lang, n = target[turn], lang[turn], len(target)
    y = torch.stack([4 + torch.arange(n) % 2, torch.full((n,), EOS)], 1)
    x = torch.stack([y, torch.stack([torch.full((n,), BOS), y[:, 0]], 1)], 1)
    return Pairs(x, y, lang, target, torch.arange(n), NUMBERS[:present.shape[1]], (6, 6), 1)

def task_of(pairs, model=None, batch=6, **kw):
    return Task(model or Seq2Seq(pairs.vocab, 2, 2, 0.0), pairs, prepare=lambda x: x, loss_fn=sentence_loss,
                dev_batch_size=batch, **kw)

def random_present(t, n, seed=0):
    present = torch.rand(t, n, generator=seeded(seed, "present")) < 0.5
    present[torch.arange(t), torch.randint(n, (t,), generator=seeded(seed, "one"))] = True
    return present

ALIKE = {"az": 1.0, "tr": 0.62, "be": 0.31, "ru": 0.29}

def by_hand(similar, present, tau):
    "p(S|y) in float64, one number at a time."
    rows = []
    for row in present.tolist():
        top = max(s for s, there in zip(similar, row) if there)
        weights = [math.exp((s - top) / tau) if there else 0.0 for s, there in zip(similar, row)]
        rows.append([w / sum(weights) for w in weights])
    return torch.tensor(rows, dtype=torch.float64)


def test_target_conditioned_by_hand():
    present, similar = random_present(60, 5), torch.tensor([0.8, 1.0, 0.35, 0.1, 0.79], dtype=torch.float64)
    for tau in (2.0, 0.3, 0.05, 0.001):
        p = target_conditioned(similar, present, tau).exp()
        assert torch.allclose(p, by_hand(similar.tolist(), present, tau), rtol=1e-10, atol=1e-14)
        assert not p[~present].any()
    hard = target_conditioned(similar, present, 0.0).exp()
    for row, there in zip(hard.tolist(), present.tolist()):
        best = max((s, i) for i, (s, t) in enumerate(zip(similar.tolist(), there)) if t)[1]
        assert row == [float(i == best) for i in range(5)]
    extreme = target_conditioned(similar.float(), present, 0.001)
    assert not extreme.isnan().any() and torch.allclose(extreme.exp(), hard.float(), atol=1e-4)


def test_a_sentence_without_a_language_is_refused():
    present = torch.tensor([[True, False], [False, False], [False, True]])
    for call in (lambda: masked_log_softmax(torch.zeros(3, 2), present),
                 lambda: target_conditioned(torch.tensor([1.0, 0.5]), present, 0.1),
                 lambda: target_conditioned(torch.tensor([1.0, 0.5]), present, 0.0),
                 lambda: LanguageScorer(2)(present)):
        with pytest.raises(ValueError,
                           match=r"^present: row 1 has no language; every target sentence must have a source$"):
            call()


@pytest.mark.parametrize("make, tau", [(lambda b: LanguageSampler(b), None), (lambda b: TCS(ALIKE, 0.2, b), 0.2),
                                       (lambda b: TCS(ALIKE, 0.001, b), 0.001)])
def test_a_million_draws_have_their_probabilities(make, tau):
    "For each set of languages that a target has: at most 5 standard deviations, and none that is not there."
    present = random_present(50_000, 4)
    pairs = synthetic(present)
    sampler, code = make(len(present)).bind(task_of(pairs)), present.long() @ (2 ** torch.arange(4))
    counts = torch.zeros(16, 4, dtype=torch.int64)
    for e in range(20):
        at = pairs.positions(sampler.epoch(e))
        target, lang = pairs.target[at], pairs.lang[at]
        assert target.unique().numel() == len(at) == len(present) and present[target, lang].all()
        counts += (code[target] * 4 + lang).bincount(minlength=64).view(16, 4)
    assert counts.sum() == 1_000_000
    for c in range(1, 16):
        there, n = torch.tensor([[bool(c >> i & 1) for i in range(4)]]), int(counts[c].sum())
        p = by_hand(list(ALIKE.values()) if tau else [0.0] * 4, there, tau or 1.0)[0]
        for i in range(4):
            assert abs(int(counts[c, i]) - n * float(p[i])) <= 5 * math.sqrt(n * float(p[i] * (1 - p[i]))) + 1e-9
    exact = by_hand(list(ALIKE.values()) if tau else [0.0] * 4, present, tau or 1.0).mean(0)
    assert torch.allclose(sampler.share.double(), exact, atol=1e-6)


def test_gumbel_noise_is_finite_and_gumbel():
    noise = gumbel((200_000,), seeded(0, "noise"))
    assert noise.isfinite().all() and float(noise.mean()) == pytest.approx(0.5772, abs=0.02)
    assert float(noise.var()) == pytest.approx(math.pi ** 2 / 6, rel=0.03)


def test_several_sources_of_a_target_in_one_language_come_alike():
    present, copies = torch.tensor([[True, True], [True, False]]), torch.tensor([[3, 1], [2, 0]])
    pairs = synthetic(present, copies)
    sampler, count = LanguageSampler(2).bind(task_of(pairs)), Counter()
    for e in range(2000): count.update(sampler.epoch(e).tolist())
    for i in range(len(pairs)):
        p = (0.5 if pairs.target[i] == 0 else 1) / int(copies[pairs.target[i], pairs.lang[i]])
        assert abs(count[i] - 2000 * p) < 5 * math.sqrt(2000 * p * (1 - p)) + 1e-9


@pytest.mark.parametrize("block", [1, 7, 30, 64, 100])
def test_all_targets_come_before_any_comes_twice(block):
    pairs = synthetic(random_present(100, 3))
    sampler, drawn = LanguageSampler(block).bind(task_of(pairs)), []
    for e in range(math.ceil(500 / block)):
        targets = pairs.target[sampler.epoch(e)].tolist()
        assert len(set(targets)) == len(targets) == block
        drawn += targets
    rounds = [drawn[k:k + 100] for k in range(0, 500, 100)]
    assert all(sorted(r) == list(range(100)) for r in rounds) and rounds[0] != rounds[1]
    assert sampler.fewest() == block


def test_a_block_has_at_most_all_targets(text, alike):
    n = len(text.train.present())
    for block in (n, n + 1, 10 * n):
        for make in (LanguageSampler, lambda b: TCS(alike.loc["az"], 0.1, b), lambda b: LanguageDDS("az", b)):
            sampler = make(block).bind(task_of(text.train))
            assert sampler.fewest() == n
            assert text.train.target[sampler.epoch(0)].sort().values.tolist() == list(range(n))


def test_an_unfinished_translation_counts_only_where_nothing_ended():
    "A network that likes to go on: of five beams an ended one is taken, if there is one; within one piece may be none."
    net, rows = tiny_net(0, std=1.0, end=-3), padded(sentences(12, 7, 0))
    for limit in (2, 6):
        with torch.no_grad(): wide, narrow = (beam_search(net, rows, limit, beam) for beam in (64, 1))
        # 64 beams hold the one that ends at once
        assert all(len(told(r)) < limit for r in wide)
        assert any(len(told(r)) == limit for r in narrow)


def test_gradients_that_are_not_finite_are_left_out(text):
    dds = LanguageDDS("az", 100, updates=2, batch=8, batches=2).bind(task := task_of(text.train))
    dds.epoch(0), dds.epoch(1)
    before, grad = dds.memory.clone(), task.grad
    task.grad = lambda batch: {k: v * math.nan for k, v in grad(batch).items()}
    dds.epoch(2)
    assert torch.equal(dds.memory, before) and dds.rewards.isfinite().all() and dds.share.isfinite().all()


def test_a_translation_for_each_reference():
    with pytest.raises(ValueError, match="translations: has 1 sentences, references 2"):
        translation_scores(["x"], ["x", "y"])
    with pytest.raises(ValueError, match="b: has 1 sentences, references 2"):
        paired_bootstrap({"a": ["x", "y"], "b": ["x"]}, ["x", "y"])


def test_test_translations_come_back(text, tmp_path):
    "The run folder is lost, its checkpoints are not."
    recipe = replace(RECIPE, steps=4, eval_every=2, save_every=2, checkpoint_dir=str(tmp_path / "kept"))
    done = fit(recipe, text, folder=tmp_path / "run" / "uniform-0", kind=Translation)
    shutil.rmtree(tmp_path / "run")
    again = fit(recipe, text, folder=tmp_path / "run" / "uniform-0", kind=Translation)
    lines = (tmp_path / "run" / "uniform-0" / "translations.txt").read_text().split("\n")[:-1]
    assert len(lines) == len(text.test) and again.steps_done == 4
    def bleu(t): return t.log.frame().query("split == 'test' and name == 'bleu'").value.iloc[-1]
    assert bleu(again) == bleu(done) == pytest.approx(translation_scores(lines, text.corpus.test.target)["bleu"])


@pytest.mark.parametrize("make", [lambda: LanguageSampler(130), lambda: TCS(ALIKE, 0.3, 130),
                                  lambda: LanguageDDS("az", 130, updates=3, batch=8, batches=1, lr=0.01,
                                                      start=TCS(ALIKE, 0.3, 130))])
def test_samplers_resume(make):
    pairs = synthetic(random_present(300, 4))
    whole, fresh = make().bind(task_of(pairs, seed=5)), make().bind(task_of(pairs, seed=5))
    if isinstance(whole, LanguageDDS): fresh.task.model.load_state_dict(whole.task.model.state_dict())
    for e in range(3): whole.epoch(e)
    fresh.load_state_dict(again(whole.state_dict()))
    for e in range(3, 8):
        assert torch.equal(whole.epoch(e), fresh.epoch(e))
        assert all(torch.equal(a, b) for a, b in zip(whole.report().values(), fresh.report().values()))
    assert not torch.equal(whole.epoch(8), make().bind(task_of(pairs, seed=6)).epoch(8))


def test_languages_keeps_all_pairs_of_some(text, corpus):
    ids = Languages(("az", "tr")).bind(task_of(text.train)).epoch(0)
    assert ids.tolist() == [i for i, l in enumerate(corpus.train.lang) if NUMBERS[l] in ("az", "tr")]


# ---- DDS over languages

def small_pairs(text, n=240):
    return text.train.select(torch.randperm(len(text.train), generator=seeded(3, "few"))[:n])

def bind_dds(pairs, model, **kw):
    "A bound DDS and the batches that its gradients are taken on."
    task, batches = task_of(pairs, model, seed=2), []
    ask = task.grad
    def grad(batch):
        batches.append(batch)
        return ask(batch)
    task.grad = grad
    settings = dict(block=40, updates=4, batch=10, batches=2, averages=(0.7, 0.2), lr=0.01) | kw
    return LanguageDDS("az", **settings).bind(task), batches

def whole_pairs(text, n=240):
    "Some pairs whose targets are numbered anew."
    few = small_pairs(text, n)
    few.target = torch.unique(few.target, return_inverse=True)[1]
    return few


@pytest.mark.parametrize("reward", ["dot", "cosine"])
def test_rewards_are_explicit_gradients(text, reward):
    "One pair at a time, cut to its own length, averaged by hand; dropout is on in training and off here."
    pairs = whole_pairs(text)
    model = seed_weights(Seq2Seq(pairs.vocab, 4, 5, 0.4).double(), 0, 0.3).train()
    sel, batches = bind_dds(pairs, model, reward=reward)
    sel.epoch(0)
    # nothing is learned before the first block
    assert not batches and sel.rewards.isnan().all() and sel.task.passes == 0
    size, per = sum(p.numel() for p in model.parameters()), 2
    memory = torch.zeros(8, size, dtype=torch.float64)
    for e in (1, 2):
        before = {k: p.clone() for k, p in model.state_dict().items()}
        sel.epoch(e)
        assert all(torch.equal(p, before[k]) for k, p in model.state_dict().items()) and len(batches) == 8 * per
        ref = copy.deepcopy(model).eval()
        for k, batch in enumerate(batches):
            assert (pairs.lang[pairs.positions(batch.idx)] == k // per).all()
            assert len(batch.idx) == 6 and batch.x.shape[2] in pairs.lengths
            total = torch.zeros(size, dtype=torch.float64)
            for i in pairs.positions(batch.idx).tolist():
                y, n = pairs.y[i][pairs.y[i] != PAD].long(), int(pairs.length[i])
                logp = ref(pairs.x[i:i + 1, :, :n].long())[0].log_softmax(1)
                loss = -logp[torch.arange(len(y)), y].mean()
                total += torch.cat([g.flatten() for g in torch.autograd.grad(loss, list(ref.parameters()))]) / 6
            memory[k // per] = 0.7 * memory[k // per] + 0.2 * total
        r = [float(m @ memory[0]) / (float(m.norm() * memory[0].norm()) if reward == "cosine" else 1.0) for m in memory]
        assert torch.allclose(sel.memory, memory, rtol=1e-9, atol=1e-14)
        assert sel.rewards.tolist() == pytest.approx(r, rel=1e-6) and (reward == "dot" or r[0] == pytest.approx(1))
        exact = sel.memory @ sel.memory[0]
        assert exact.tolist() == pytest.approx([float(m @ memory[0]) for m in memory], rel=1e-10)
        assert sel.task.passes == e * 8 * per * 6                                           # each example counts once
        batches.clear()
        seed_weights(model, e, 0.3).train()                                                 # θ moves on
    assert sel.report()["reward/tr"] == sel.rewards[1]


def written_scores(weights, present):
    "log p(S|y) of one target, from three matrices; only of the languages that are there."
    h = torch.tensor([float(t) for t in present], dtype=torch.float64) / sum(present)
    for w in weights[:-1]: h = (w @ h).clamp_min(0)
    z = weights[-1] @ h
    norm = sum(z[i].exp() for i, t in enumerate(present) if t).log()
    return {i: z[i] - norm for i, t in enumerate(present) if t}


def test_the_scorers_update_is_a_loop(text):
    sel, _ = bind_dds(whole_pairs(text), seed_weights(Seq2Seq(text.train.vocab, 4, 5, 0.0), 0, 0.3),
                      scale=0.5, updates=5)
    sel.scorer.double()
    start_momentum(sel.opt)
    weights = [p.detach().clone().requires_grad_() for p in sel.scorer.parameters()]
    opt, asked = torch.optim.Adam(weights, 0.01), []
    sel.scorer.register_forward_pre_hook(lambda _, given: asked.append(given[0].clone()))
    sel.epoch(0)
    for e in (1, 2):
        asked.clear()
        sel.epoch(e)
        assert [tuple(a.shape) for a in asked] == [(10, 8)] * 5 + [(40, 8)]
        r = sel.rewards.float().tolist()
        for present in asked[:5]:
            assert present.any(1).all()
            opt.zero_grad()
            (-sum(0.5 * r[i] * logp for row in present.tolist() for i, logp in written_scores(weights, row).items())
             / 10).backward()
            opt.step()
        for mine, theirs in zip(sel.scorer.parameters(), weights):
            assert torch.allclose(mine, theirs, rtol=0, atol=1e-9)
    # the same seed: where it began
    moved = LanguageDDS("az", block=40).bind(sel.task).scorer.parameters()
    assert all((a.double() - b).abs().max() > 1e-3 for a, b in zip(moved, weights))


def test_the_scorer_by_hand():
    scorer, present = LanguageScorer(5).double(), random_present(40, 5)
    logp = scorer(present)
    for row, there in zip(logp, present.tolist()):
        hand = written_scores(list(scorer.parameters()), there)
        for i in range(5): assert row[i] == -torch.inf if i not in hand else torch.isclose(row[i], hand[i], rtol=1e-12)
    assert [tuple(p.shape) for p in scorer.parameters()] == [(32, 5), (32, 32), (5, 32)]


def given_gradients(present, vectors, **kw):
    "DDS whose gradients are these vectors [L, weights], whatever the model."
    pairs = synthetic(present)
    task = task_of(pairs)
    flat = torch.tensor(vectors, dtype=torch.float32)
    def grad(batch):
        lang, = set(pairs.lang[batch.idx].tolist())
        n = sum(p.numel() for p in task.params().values())
        v, out, at = torch.zeros(n), {}, 0
        v[:flat.shape[1]] = flat[lang]
        for k, p in task.params().items(): out[k], at = v[at:at + p.numel()].view_as(p), at + p.numel()
        return out
    task.grad = grad
    return LanguageDDS("az", block=100, batches=1, **kw).bind(task)

@torch.no_grad()
def chances(sel, *rows): return sel.scorer(torch.tensor(rows, dtype=torch.bool)).exp()


@pytest.mark.parametrize("reward", ["dot", "cosine"])
def test_a_language_that_agrees_gains(reward):
    "az is S; tr's gradient points its way, be's the other way, ru's across."
    sel = given_gradients(random_present(200, 4), [[1.0, 0, 0], [1.0, 0.2, 0], [-1.0, 0, 0.1], [0, 1.0, 1.0]], lr=1e-2,
                          updates=40, reward=reward)
    rows = [1, 1, 1, 1], [0, 1, 1, 0], [0, 1, 0, 1]
    was = chances(sel, *rows)
    for e in range(4): sel.epoch(e)
    now = chances(sel, *rows)
    assert now[0, 1] > was[0, 1] and now[0, 2] < was[0, 2] and now[1, 1] > was[1, 1] + 0.2
    assert now[1, 2] < was[1, 2] - 0.2 and now[2, 1] > was[2, 1]
    assert sel.rewards[2] < 0 and abs(sel.rewards[3]) < 1e-6
    assert sel.share[1] > sel.share[2]


def test_the_fixed_point_of_positive_rewards():
    sel = given_gradients(torch.ones(150, 3, dtype=torch.bool), [[1.0, 0], [0.5, 2.0], [0.25, 1.0]], lr=5e-3,
                          updates=400, batch=16, reward="dot", averages=(0.0, 1.0))
    for e in range(3): sel.epoch(e)
    assert chances(sel, [1, 1, 1])[0].tolist() == pytest.approx([4 / 7, 2 / 7, 1 / 7], abs=0.02)


def test_sketches_keep_inner_products():
    rng, n, seeds, sums = seeded(0, "vectors"), 300, 300, (16, 64, 256, 1024)
    a, b = torch.randn(2, n, dtype=torch.float64, generator=rng)
    b = b + 0.4 * a
    exact, spread = float(a @ b), []
    for d in sums:
        found = torch.tensor([float(s(a) @ s(b)) for s in (Sketch(n, d, seed) for seed in range(seeds))])
        theory = math.sqrt(float((a @ a) * (b @ b) + (a @ b) ** 2 - 2 * (a * a * b * b).sum()) / d)
        assert abs(float(found.mean()) - exact) < 4 * theory / math.sqrt(seeds)
        spread.append(float((found - exact).square().mean().sqrt()))
        assert spread[-1] == pytest.approx(theory, rel=0.25)
    assert np.polyfit(np.log(sums), np.log(spread), 1)[0] == pytest.approx(-0.5, abs=0.08)
    s = Sketch(n, 32, 1)
    assert torch.allclose(s(2 * a - 3 * b), 2 * s(a) - 3 * s(b), atol=1e-12) and s(a).shape == (32,)
    matrix = torch.stack([s(e) for e in torch.eye(n, dtype=torch.float64)], 1)               # one sign in each column
    assert torch.allclose(matrix @ a, s(a)) and (matrix.abs().sum(0) == 1).all() and ((matrix != 0).sum(0) == 1).all()
    assert -0.2 < float(s.sign.double().mean()) < 0.2


def test_projected_averages_are_sketches_of_the_exact_ones(text):
    pairs, model = whole_pairs(text), seed_weights(Seq2Seq(text.train.vocab, 4, 5, 0.0).double(), 0, 0.3)
    (exact, a), (small, b) = bind_dds(pairs, model), bind_dds(pairs, model, projection=512)
    for e in range(3): exact.epoch(e), small.epoch(e)
    assert small.memory.shape == (8, 512) and all(torch.equal(s.idx, t.idx) for s, t in zip(a, b))
    for m, s in zip(exact.memory, small.memory): assert torch.allclose(small.sketch(m), s, atol=1e-12)
    assert (exact.rewards - small.rewards).abs().max() < 5 * math.sqrt(2 / 512)


@pytest.mark.parametrize("tau", [0.3, 0.1, 0.03, 0.01, 0.0])
def test_scorers_imitate_tcs(text, alike, tau):
    "Over all sets of languages that targets of the bundled corpus have."
    present, similar = text.train.present(), torch.tensor(alike.loc["az"].to_numpy())
    assert len(present.unique(dim=0)) > 100
    p = target_conditioned(similar, present, tau).exp()
    for seed in range(3):
        with torch.random.fork_rng():
            torch.manual_seed(seed)
            scorer = LanguageScorer(8)
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            gap = imitate(scorer, lambda cases: target_conditioned(similar, cases, tau), present)
        with torch.no_grad(): real = float((scorer(present).exp() - p).abs().max())
        assert real < 1e-3 and gap == pytest.approx(real, abs=1e-5)


def test_tcs_dds_begins_as_tcs(text, alike):
    task = task_of(text.train)
    start = TCS(alike.loc["az"], 0.1, 50)
    sel = LanguageDDS("az", block=50, start=start).bind(task)
    with torch.no_grad():
        assert (sel.log_probabilities(sel.present).exp()
                - start.log_probabilities(sel.present).exp()).abs().max() < 1e-3
    with pytest.warns(UserWarning, match=r"^rounds = 1: the scorer is still "):
        imitate(LanguageScorer(8), start.log_probabilities, sel.present, tolerance=1e-9, rounds=1)


# ---- training

def methods(alike):
    tcs = TCS(alike.loc["az"], 0.1, 120)
    dds = dict(block=120, updates=5, batch=20, lr=0.01, batches=1)
    return {"uniform": Uniform(), "related": Languages(("az", "tr")), "spcl": SPCL(), "even": LanguageSampler(120),
            "tcs": TCS(alike.loc["az"], 0.1, 120), "dds": LanguageDDS("az", reward="dot", **dds),
            "dds, projected": LanguageDDS("az", projection=256, **dds), "tcs+dds": LanguageDDS("az", start=tcs, **dds)}

NAMES = list(methods(pd.DataFrame(0.5, NUMBERS, NUMBERS)))

@pytest.mark.parametrize("name", NAMES)
def test_every_method_trains_and_keeps_records(name, text, corpus, alike, tmp_path, monkeypatch):
    shown = []   # language counts of every batch
    record = Translation.record
    def watched(self, batch, *rest):
        shown.append(np.bincount(text.train.lang[batch.idx], minlength=8))
        record(self, batch, *rest)
    monkeypatch.setattr(Translation, "record", watched)
    training = fit(RECIPE, text, methods(alike)[name], seed=1, folder=tmp_path, kind=Translation)
    log = pd.read_parquet(tmp_path / "metrics.parquet")
    train = log[log.split == "train"].pivot(index="step", columns="name", values="value")
    assert train.index.tolist() == [4, 8, 12, 16, 20, 24] and len(shown) == 24 and train["loss"].notna().all()
    usage = train[[f"usage/{l}" for l in NUMBERS]].to_numpy()
    counts = np.array(shown).reshape(6, 4, 8).sum(1)
    assert np.allclose(usage.sum(1), 1) and np.allclose(usage, counts / counts.sum(1, keepdims=True), atol=1e-6)
    if name == "related": assert (usage[:, 2:] == 0).all()
    p, reward = ([c for c in train if c.startswith(k)] for k in ("p/", "reward/"))
    assert len(p) == (8 if name in NAMES[3:] else 0) and len(reward) == (8 if "dds" in name else 0)
    if p: assert np.allclose(train[p].sum(axis=1), 1, atol=1e-5) and (train[p] > 0).all(axis=None)
    if reward:
        assert training.epochs_begun >= 3 and train[reward].iloc[0].isna().all()
        assert train[reward].iloc[-1].notna().all()
        if name != "dds": assert train["reward/az"].iloc[-1] == pytest.approx(1)
        assert training.selector.task.passes == (training.epochs_begun - 1) * 8 * training.loader.batch_size
    assert training.examples_seen == sum(c.sum() for c in shown)

    scores = log[log.split != "train"]
    assert set(map(tuple, scores[["split", "step", "name"]].to_numpy().tolist())) == {
        (s, t, m) for s, t in (("dev", 12), ("dev", 24), ("test", 24)) for m in ("loss", "perplexity", "bleu", "chrf")}
    def logged(split, m): return scores[(scores.split == split) & (scores.step == 24) & (scores.name == m)].value.item()
    lines = (tmp_path / "translations.txt").read_bytes().decode().split("\n")
    assert len(lines) == corpus.test.n + 1 and lines[-1] == ""
    assert (translation_scores(lines[:-1], corpus.test.target)
            == pytest.approx({"bleu": logged("test", "bleu"), "chrf": logged("test", "chrf")}))
    greedy = translate(training.model, corpus.dev.source, text.source, text.target, 2 * text.train.lengths[-1], 1)
    assert translation_scores(greedy, corpus.dev.target)["chrf"] == pytest.approx(logged("dev", "chrf"))
    assert logged("dev", "chrf") > 0
    assert logged("dev", "perplexity") == pytest.approx(math.exp(logged("dev", "loss")))

    table = pd.read_parquet(tmp_path / "examples.parquet")
    assert table.id.tolist() == list(range(corpus.train.n)) and table.presentations.sum() == training.examples_seen
    assert table.language.tolist() == [NUMBERS[l] for l in corpus.train.lang]
    assert table.source_text.tolist() == corpus.train.source
    assert table.target_text.tolist() == corpus.train.target and table.target.tolist() == text.train.target.tolist()
    assert np.bincount(corpus.train.lang, table.presentations, 8).tolist() == sum(shown).tolist()
    if name == "spcl": assert (table.weight_mean == 0).any() and table.weight_mean.max() > 1
    else: assert (table.weight_mean.dropna() == 1).all()


def test_a_resume_equals_the_undisturbed_training(text, alike, tmp_path):
    "TCS+DDS with dropout, stopped by an error in a step after a checkpoint, within a block."
    class Cut(Eager):
        calls = 0
        def apply(self, *a):
            self.calls += 1
            if self.calls == 19: raise KeyboardInterrupt
            super().apply(*a)
    def run(folder, **kw):
        return fit(RECIPE, text, methods(alike)["tcs+dds"], seed=3, folder=tmp_path / folder, kind=Translation, **kw)
    whole = run("whole")
    with pytest.raises(KeyboardInterrupt): run("cut", backend=Cut())
    assert Checkpoints(tmp_path / "cut" / "checkpoints").load()["step"] == 16
    assert not (tmp_path / "cut" / "examples.parquet").exists()
    resumed = run("cut")
    assert resumed.steps_done == whole.steps_done == 24 and resumed.examples_seen == whole.examples_seen
    for part in ("model", "ema", "selector"):
        a, b = (getattr(t, part).state_dict() for t in (whole, resumed))
        assert a.keys() == b.keys()
        assert all(torch.equal(t.nan_to_num(), b[k].nan_to_num()) for k, t in a.items() if isinstance(t, torch.Tensor))
    assert all(torch.equal(a, b) for a, b in zip(whole.selector.opt.state_dict()["state"][0].values(),
                                                 resumed.selector.opt.state_dict()["state"][0].values()))
    for name in ("metrics", "examples"):
        a, b = (pd.read_parquet(tmp_path / f / f"{name}.parquet").drop(columns="seconds", errors="ignore")
                for f in ("whole", "cut"))
        pd.testing.assert_frame_equal(a, b, check_exact=True)
    assert ((tmp_path / "whole" / "translations.txt").read_bytes() == (tmp_path / "cut" / "translations.txt")
            .read_bytes())


def test_records_see_the_worst_piece(text):
    "A sentence is correct when all of its pieces are; its margin is that of its worst piece."
    training = Translation(RECIPE, text)
    rng, batch = seeded(0, "records"), text.train.take(torch.arange(30))
    right, losses = torch.zeros(30), torch.rand(30, generator=rng)
    for time in range(3):
        logits = torch.randn(*batch.y.shape, 60, generator=rng)
        logits.scatter_add_(2, batch.y[:, :, None], 4.5 + torch.randn(*batch.y.shape, 1, generator=rng))
        training.record(batch, logits, losses, None)
        correct, margins = [], []
        for i in range(30):
            n = int((batch.y[i] != PAD).sum())
            correct.append(float(all(int(logits[i, t].argmax()) == batch.y[i, t] for t in range(n))))
            margins.append(min(float(logits[i, t, batch.y[i, t]] - max(v for k, v in enumerate(logits[i, t].tolist())
                                                                       if k != batch.y[i, t])) for t in range(n)))
        assert training.dynamics.column("correct")[:30].tolist() == correct and 0 < sum(correct) < 30
        assert training.dynamics.column("margin")[:30].tolist() == pytest.approx(margins, abs=1e-5)
        forgotten = (right.bool() & ~torch.tensor(correct).bool()).float() + (forgotten if time else 0)
        right = torch.tensor(correct)
    assert torch.equal(training.dynamics.column("forgetting")[:30], forgotten) and forgotten.sum() > 0
    assert training.dynamics.column("presentations").sum() == 90


def test_label_smoothing_and_averages_reach_the_training(text):
    plain, smooth = (fit(replace(RECIPE, steps=6, ema_decay=0.9, label_smoothing=s, eval_every=6), text,
                         kind=Translation) for s in (0.0, 0.1))
    assert not torch.equal(next(plain.model.parameters()), next(smooth.model.parameters()))
    log = plain.log.frame()
    loss = log[(log.split == "dev") & (log.name == "loss")].value.item()
    assert loss == pytest.approx(corpus_loss(plain.ema.model,
                                             text.dev)) != pytest.approx(corpus_loss(plain.model, text.dev))


# ---- settings

@pytest.mark.parametrize("make, words", [
    (lambda: LanguageSampler(0), "block = 0: must be above 0"),
    (lambda: LanguageSampler(2.5), "block = 2.5: must be of type int"),
    (lambda: TCS({}, -0.1), "tau = -0.1: must be 0 or more"),
    (lambda: TCS({}, float("nan")), "tau = nan: must be finite"),
    (lambda: TCS({}, 0.1, -3), "block = -3: must be above 0"),
    (lambda: LanguageDDS("az", block=0), "block = 0: must be above 0"),
    (lambda: LanguageDDS("az", updates=0), "updates = 0: must be above 0"),
    (lambda: LanguageDDS("az", batch=-1), "batch = -1: must be above 0"),
    (lambda: LanguageDDS("az", batches=1.5), "batches = 1.5: must be of type int"),
    (lambda: LanguageDDS("az", lr=0.0), "lr = 0.0: must be above 0"),
    (lambda: LanguageDDS("az", scale=-0.01), "scale = -0.01: must be above 0"),
    (lambda: LanguageDDS("az", projection=-1), "projection = -1: must be 0 or more"),
    (lambda: LanguageDDS("az", reward="sideways"), "reward = 'sideways': must be one of dot, cosine"),
    (lambda: LanguageDDS("az", averages=(0.5,)), "averages = "),
    (lambda: LanguageDDS("az", averages=(-0.5, 0.5)), "averages = "),
    (lambda: LanguageDDS("az", averages=(0.5, 0.0)), "averages = "),
    (lambda: LanguageDDS("az", averages=(0.5, float("nan"))), "averages = "),
    (lambda: NMTRecipe(source_vocab=0), "source_vocab = 0: must be above 0"),
    (lambda: NMTRecipe(target_vocab=-8), "target_vocab = -8: must be above 0"),
    (lambda: NMTRecipe(max_length=-1), "max_length = -1: must be 0 or more"),
    (lambda: NMTRecipe(max_tokens=0), "max_tokens = 0: must be above 0"),
    (lambda: NMTRecipe(buckets=0), "buckets = 0: must be above 0"),
    (lambda: NMTRecipe(embed=0), "embed = 0: must be above 0"),
    (lambda: NMTRecipe(hidden=1.5), "hidden = 1.5: must be of type int"),
    (lambda: NMTRecipe(beam=0), "beam = 0: must be above 0"),
    (lambda: NMTRecipe(dropout=1.0), r"dropout = 1.0: must lie in [0, 1)"),
    (lambda: NMTRecipe(schedule="linear"), "schedule = 'linear': must be one of"),
    (lambda: NMTRecipe(feeding="disk"), "feeding = 'disk': must be one of auto, device, host"),
    (lambda: NMTRecipe(lr=0.0), "lr = 0.0: must be above 0"),
    (lambda: NMTRecipe(warmup_steps=600), "warmup_steps = 600: must be below steps = 600")])
def test_settings_speak(make, words):
    with pytest.raises(ValueError) as e: make()
    assert str(e.value).startswith(words) and "\n" not in str(e.value)


@pytest.mark.parametrize("make, words", [
    (lambda: Languages(("az", "rr")), "keep = ('az', 'rr'): "), (lambda: Languages(()), "keep = (): "),
    (lambda: LanguageDDS("azz", 10), "low = 'azz': did you mean 'az'?"),
    (lambda: TCS({"az": 1.0, "tr": 0.5}, 0.1, 10),
     "similarity: must have every language; lacks be, ru, pt, es, sk, cs"),
    (lambda: LanguageDDS("az", 10, start=TCS({"az": 1.0}, 0.1, 10)), "similarity: must have every language"),
    (lambda: TCS({l: 1.0 if l != "be" else float("nan") for l in NUMBERS}, 0.1, 10),
     "similarity of be = nan: must be finite"),
    (lambda: TCS({"az": -1.0}), "similarity of az = -1.0: must be 0 or more")])
def test_settings_that_do_not_fit_the_data_speak(text, make, words):
    with pytest.raises(ValueError) as e: make().bind(task_of(text.train))
    assert str(e.value).startswith(words) and "\n" not in str(e.value)


def test_blocks_below_a_batch_are_refused(text):
    with pytest.raises(ValueError,
                       match="must not exceed the 3 examples that LanguageSampler visits in its smallest epoch"):
        Translation(RECIPE, text, LanguageSampler(3))


def test_decisions_about_pairs(corpus, tmp_path):
    file = tmp_path / "decisions.csv"
    def prepared(rows):
        file.write_text("source,action\n" + "".join(f"{s},{a}\n" for s, a in rows))
        return prepare_text(corpus, RECIPE, file).train
    full = prepare_text(corpus, RECIPE).train
    out = [0, 7, len(full) - 1]
    few = prepared([(s, "remove") for s in out])
    assert few.ids.tolist() == [s for s in range(len(full)) if s not in out]
    assert few.present().any(1).all()                                    # every target that is left has a source
    same = {tuple(row): int(t) for row, t in zip(full.y[few.ids].tolist(), few.target)}
    assert all(same[tuple(y)] == int(t) for y, t in zip(few.y.tolist(), few.target))
    with pytest.raises(ValueError, match="'relabel' for id 3: must be remove or keep"):
        file.write_text("source,action,label\n3,relabel,tr\n")
        prepare_text(corpus, RECIPE, file)
    lang = full.languages[int(full.lang[0])]
    with pytest.raises(ValueError, match=f"must leave pairs of {lang}"):
        prepared([(int(s), "remove") for s in full.ids[full.lang == full.lang[0]]])
