"""What the released scripts of TCS and DDS do in translation, against loops and
closed forms: draws, blocks, sums, cuts, imitation, whose gradients are measured."""
import math
import warnings
from dataclasses import fields, replace
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from datasel_wb.core import Batch, seeded
from datasel_wb.corpus import CorpusRecipe, load_corpus, number_words
from datasel_wb.language_recipes import NMT_METHODS, NMT_RECIPES, check_languages, train_translation
from datasel_wb.mixtures import (
    TCS, LanguageContext, LanguageDDS, LanguageRecipe, LanguageSampler, LanguageScorer, LowFirst, imitate_stepwise)
from datasel_wb.pairs import BOS, EOS, PAD, cut_pieces, encode
from datasel_wb.sources import draw_each, draw_one, fewest_drawn, low_first, low_index, similarity
from datasel_wb.translation import (
    NMTRecipe, Seq2Seq, Translation, corpus_loss, prepare_text, sentence_loss, sentence_sum)
from test_nmt import (
    ALIKE, RECIPE, alike, bind_dds, by_hand, corpus, random_present, said, seed_weights, synthetic,  # noqa: F401
    task_of, text, whole_pairs, written_scores)

TED = NMT_RECIPES["ted"]

def of(cls, recipe, **more):
    "The settings of a recipe that a class has."
    return cls(**{k: v for k, v in (recipe | more).items() if k in {f.name for f in fields(cls)}})


# ---- draws

@pytest.mark.parametrize("make, p_of", [
    (lambda **kw: LanguageSampler(30_000, **kw), lambda present: by_hand([0.0] * 4, present, 1.0)),
    (lambda **kw: TCS(ALIKE, 0.2, 30_000, **kw), lambda present: by_hand(list(ALIKE.values()), present, 0.2)),
    (lambda **kw: LowFirst("az", 30_000, **kw), lambda present: by_hand([100.0, 0, 0, 0], present, 1.0))])
def test_every_source_is_drawn_for_itself(make, p_of):
    "Frequency of each source, of each two of a target together, and of targets with none: products of p."
    present = random_present(30_000, 4)
    pairs, p = synthetic(present), p_of(present)
    sampler = make(draw="bernoulli").bind(task_of(pairs))
    code, epochs = present.long() @ (2 ** torch.arange(4)), 10
    counts, both, none, sizes = torch.zeros(16, 4), torch.zeros(16, 4, 4), torch.zeros(16), []
    for e in range(epochs):
        at = pairs.positions(sampler.epoch(e))
        taken = torch.zeros(present.shape)
        taken[pairs.target[at], pairs.lang[at]] += 1
        assert not taken[~present].any() and len(at.unique()) == len(at) == int(taken.sum())   # each exists, once
        sizes.append(len(at))
        for c in range(1, 16):
            rows = taken[code == c]
            counts[c] += rows.sum(0)
            both[c] += rows.T @ rows
            none[c] += (rows.sum(1) == 0).sum()
    for c in range(1, 16):
        n, q = epochs * int((code == c).sum()), p[code == c][0]
        def near(found, share): return abs(float(found) - n * share) <= 5 * math.sqrt(n * share * (1 - share)) + 1e-6
        assert near(none[c], math.prod(1 - float(v) for v in q))
        for i in range(4):
            assert near(counts[c, i], float(q[i]))
            assert all(near(both[c, i, j], float(q[i] * q[j])) for j in range(i))
    spread = math.sqrt(float((p * (1 - p)).sum()))
    assert all(abs(k - 30_000) <= 5 * spread + 1e-6 for k in sizes) and min(sizes) >= sampler.fewest()
    assert (len(set(sizes)) > 1) == (spread > 0)
    assert torch.allclose(sampler.share.double(), p.mean(0), atol=1e-6)


def test_one_source_each_is_as_before():
    "`draw_one` gives every row a language; `draw_each` repeats itself with its generator and gives at least `least`."
    logp = by_hand(list(ALIKE.values()), random_present(40, 4), 0.3).log()
    rows, lang = draw_one(logp, seeded(1, "a"))
    assert rows.tolist() == list(range(40)) and logp[rows, lang].isfinite().all()
    for least in (0, 40, 48):
        a, b = (draw_each(logp, seeded(2, "b"), least) for _ in range(2))
        assert all(torch.equal(s, t) for s, t in zip(a, b)) and len(a[0]) >= least
    assert len(draw_each(logp, seeded(2, "b"))[0]) < 48                  # so that the last one was drawn anew


@pytest.mark.parametrize("block", [1, 2, 5, 40])
def test_no_block_is_below_what_is_promised(block):
    pairs = synthetic(random_present(60, 3))
    sampler = LanguageSampler(block, draw="bernoulli").bind(task_of(pairs))
    assert sampler.fewest() == fewest_drawn(block, 3) == max(1, math.floor(block - 6 * math.sqrt(block * 2 / 3)))
    assert all(len(sampler.epoch(e)) >= sampler.fewest() for e in range(300))


@pytest.mark.parametrize("order", ["shuffled", "corpus"])
def test_the_first_blocks_are_smaller(order):
    "Five of 50, then 200: the block schedule of dds_tcs.sh, divided by 100; every target once in a round."
    pairs = synthetic(random_present(1030, 3))
    sampler, drawn = LanguageSampler(200, first=(5, 50), target_order=order).bind(task_of(pairs)), []
    blocks = [pairs.target[pairs.positions(sampler.epoch(e))].tolist() for e in range(13)]
    assert [len(b) for b in blocks] == [50] * 5 + [200] * 8 and sampler.fewest() == 50
    drawn = sum(blocks, [])
    assert sorted(drawn[:1030]) == list(range(1030)) and len(set(drawn[1030:])) == len(drawn) - 1030 > 0
    assert (drawn == [*range(1030), *range(len(drawn) - 1030)]) == (order == "corpus")
    assert LanguageSampler(30, first=(5, 50)).bind(task_of(pairs)).fewest() == 30


@pytest.mark.parametrize("make, words", [
    (lambda: LanguageSampler(draw="two"), "draw = 'two': must be one of one, bernoulli"),
    (lambda: LanguageSampler(target_order="sorted"), "target_order = 'sorted': must be one of shuffled, corpus"),
    (lambda: LanguageSampler(first=(1,)), "first = (1,): must be two numbers, blocks and their size"),
    (lambda: LanguageSampler(first=(1, 0)), "first_block = 0: must be above 0"),
    (lambda: LanguageSampler(first=(-1, 5)), "first_blocks = -1: must be 0 or more"),
    (lambda: LanguageDDS("az", gradient_of="some"), "gradient_of = 'some': must be one of all, low"),
    (lambda: LanguageDDS("az", imitate_steps=-1), "imitate_steps = -1: must be 0 or more"),
    (lambda: low_index("azz", ("az", "tr")), "low = 'azz': did you mean 'az'?"),
    (lambda: LanguageRecipe(draw="all"), "draw = 'all': must be one of one, bernoulli"),
    (lambda: LanguageRecipe(imitate="tcs"), "imitate = 'tcs': must be one of none, low"),
    (lambda: NMTRecipe(loss_sum=1), "loss_sum = 1: must be of type bool"),
    (lambda: NMTRecipe(cut_length=-1), "cut_length = -1: must be 0 or more"),
    (lambda: cut_pieces([[5]], 1), "cut_length = 1: must be 0 or at least 2, the begin and a piece")])
def test_settings_speak(make, words):
    with pytest.raises(ValueError) as e: make()
    assert str(e.value) == words


# ---- sums and cuts

@pytest.mark.parametrize("smoothing", [0.0, 0.1])
def test_the_sum_of_a_sentence_is_a_loop(smoothing):
    rng = seeded(0, "logits")
    logits = 3 * torch.randn(5, 7, 6, generator=rng, dtype=torch.float64)
    y = torch.randint(1, 6, (5, 7), generator=rng)
    lengths = [7, 4, 1, 6, 3]
    for row, n in zip(y, lengths): row[n:] = PAD
    total, mean = sentence_sum(logits, y, smoothing), sentence_loss(logits, y, smoothing)
    for i, n in enumerate(lengths):
        by_loop = 0.0
        for t in range(n):
            z = [float(v) for v in logits[i, t]]
            norm = math.log(sum(math.exp(v) for v in z))
            by_loop += (1 - smoothing) * (norm - z[int(y[i, t])]) + smoothing * sum(norm - v for v in z) / 6
        assert float(total[i]) == pytest.approx(by_loop, rel=1e-12)
        assert float(mean[i]) == pytest.approx(by_loop / n, rel=1e-12)


def test_a_training_descends_the_sums(text):  # noqa: F811
    "Gradient norm and loss of the first step are those of the sums over B; dev stays nats per piece."
    recipe = replace(RECIPE, dropout=0.0, loss_sum=True, clip_norm=0.0)
    t, plain = (Translation(r, text, seed=1) for r in (recipe, replace(recipe, loss_sum=False)))
    before = {k: v.clone() for k, v in t.model.state_dict().items()}
    seen = []
    step = Translation.record
    t.record = lambda batch, *rest: seen.append(batch) or step(t, batch, *rest)
    for u in (t, plain): u.step()
    batch, model = seen[0], Seq2Seq(text.train.vocab, 8, 12, 0.0)
    model.load_state_dict(before)
    loss = 0.0
    for i in range(len(batch.y)):
        n = int((batch.y[i] != PAD).sum())
        logp = model(batch.x[i:i + 1])[0, :n].log_softmax(1)
        loss = loss - logp[torch.arange(n), batch.y[i, :n]].sum() / len(batch.y)
    loss.backward()
    norm = math.sqrt(sum(float((p.grad ** 2).sum()) for p in model.parameters()))
    meters, others = t.read_meters(), plain.read_meters()
    assert meters["loss"] == pytest.approx(float(loss.detach()), rel=1e-5)
    assert meters["grad_norm"] == pytest.approx(norm, rel=1e-4)
    assert others["loss"] < meters["loss"] / 3 and others["grad_norm"] < meters["grad_norm"] / 3
    assert t.examine(t.model, "dev", 1)["loss"] == pytest.approx(corpus_loss(t.model, text.dev), rel=1e-6)
    assert corpus_loss(t.model, text.dev) < 1.5 * math.log(text.train.vocab[1])
    t.trial()()                                                                  # what is timed has the same loss


@pytest.mark.parametrize("cut", [2, 3, 9, 300])
def test_sentences_are_cut(cut, corpus, text):  # noqa: F811
    "Begin, pieces and end, cut to so many ids; decoder input and labels are those shifted by one."
    with warnings.catch_warnings(record=True) as warned:
        warnings.simplefilter("always")
        pairs = encode(corpus.train, text.source, text.target, cut_length=cut)
    longer = 0
    for i in range(len(pairs)):
        s, t = text.source.encode(corpus.train.source[i]), text.target.encode(corpus.train.target[i])
        longer += max(len(s), len(t)) + 2 > cut
        source, target = ([BOS, *ids, EOS][:cut] for ids in (s, t))
        for row, expected in ((pairs.x[i, 0], source[1:]), (pairs.x[i, 1], target[:-1]), (pairs.y[i], target[1:])):
            assert row[:len(expected)].tolist() == expected and not row[len(expected):].any()
        assert int(pairs.length[i]) == max(len(source), len(target)) - 1
    assert said(warned) == ([f"cut_length = {cut}: {longer} of {len(pairs)} training pairs are longer and are cut"]
                            if cut < 300 else [])
    assert pairs.ids.tolist() == list(range(corpus.train.n)) and int(pairs.length.max()) <= cut - 1
    assert torch.equal(pairs.target, text.train.target) and torch.equal(pairs.present(), text.train.present())


def test_long_sentences_are_cut_at_300():
    for n in (0, 1, 297, 298, 299, 300, 301, 700):
        whole = list(range(4, 4 + n))
        found, = cut_pieces([whole], 300)
        assert found == ([*whole, EOS] if n <= 298 else whole[:299])
    assert cut_pieces([[7] * 700]) == [[7] * 700 + [EOS]]


def test_pairs_are_left_out_by_their_whole_length_and_then_cut(corpus):  # noqa: F811
    with pytest.warns(UserWarning) as warned:
        some = prepare_text(corpus, replace(RECIPE, max_length=14, cut_length=8))
    told = [str(w.message) for w in warned]
    assert told[0].startswith("max_length = 14: ") and told[1].startswith("cut_length = 8: ")
    def pieces(i):
        return max(len(some.source.encode(corpus.train.source[i])), len(some.target.encode(corpus.train.target[i]))) + 1
    assert some.train.ids.tolist() == [i for i in range(corpus.train.n) if pieces(i) <= 14]
    assert int(some.train.length.max()) == 7 and int(some.dev.length.max()) > 7
    for split, part in ((some.dev, corpus.dev), (some.test, corpus.test)):
        assert [some.target.decode(y[y != PAD].tolist()) for y in split.y] == part.target


# ---- DDS: where it begins, and what it is rewarded for

def test_low_first_is_the_published_actor():
    "A logit of 100 for S where it is there, 0 for the others, in float64."
    present = random_present(300, 5)
    for low in range(5):
        p = low_first(present, low).double().exp()
        exact = by_hand([100.0 * (i == low) for i in range(5)], present, 1.0)
        assert torch.allclose(p, exact, rtol=1e-6, atol=1e-30) and not p[~present].any()
        assert (p[present[:, low], low] == 1).all()


def test_dds_begins_at_the_low_resource_language(text):  # noqa: F811
    task = task_of(text.train)
    with warnings.catch_warnings():
        warnings.simplefilter("error")                                    # the imitation fits
        sel = LanguageDDS("az", block=50, start=LowFirst("az")).bind(task)
    with torch.no_grad(): p = sel.scorer(sel.present).exp()
    low, others = sel.present[:, 0], ~sel.present[:, 0]
    assert low.any() and (p[low, 0] > 0.999).all()
    alike_there = sel.present[others] / sel.present[others].sum(1, keepdim=True)
    assert (p[others] - alike_there).abs().max() < 1e-3


def test_the_stepwise_imitation_is_a_loop():
    present, similar = random_present(50, 4), list(ALIKE.values())
    scorer = LanguageScorer(4).double()
    weights = [p.detach().clone().requires_grad_() for p in scorer.parameters()]
    def teacher(rows): return by_hand(similar, rows, 0.3).log()
    gap = imitate_stepwise(scorer, teacher, present, steps=40, seed=3)
    opt = torch.optim.Adam(weights, 1e-3)
    for i in torch.randint(50, (40,), generator=seeded(3, "imitation")).tolist():
        opt.zero_grad()
        row, goal = present[i].tolist(), by_hand(similar, present[i:i + 1], 0.3)[0]
        (sum((logp.exp() - goal[k]) ** 2 for k, logp in written_scores(weights, row).items()) / 4).backward()
        opt.step()
    for mine, theirs in zip(scorer.parameters(), weights): assert torch.allclose(mine, theirs, rtol=0, atol=1e-10)
    left = (scorer(present).exp() - by_hand(similar, present, 0.3)).abs().max()
    assert gap == pytest.approx(float(left.detach()), abs=1e-12)


def test_3200_steps_go_most_of_the_way(text, alike):  # noqa: F811
    "As many as the scripts take; the limits are what was measured, with room."
    present = text.train.present()
    tcs = TCS(alike.loc["az"], 0.1, 50).bind(task_of(text.train))
    for teacher, limit in ((tcs.log_probabilities, 0.1), (lambda rows: low_first(rows, 0), 0.1)):
        torch.manual_seed(0)
        scorer = LanguageScorer(8)
        with torch.no_grad(): before = (scorer(present).exp() - teacher(present).exp()).abs().sum(1).mean()
        imitate_stepwise(scorer, teacher, present, 3200)
        with torch.no_grad(): after = (scorer(present).exp() - teacher(present).exp()).abs().sum(1).mean()
        assert after < limit * before


@pytest.mark.parametrize("reward", ["cosine", "dot"])
def test_gradients_of_the_low_resource_language_alone(text, reward):  # noqa: F811
    "Its average is what it is with all of them; the others' stay 0, and so do their rewards; ψ follows a loop."
    pairs, model = whole_pairs(text), seed_weights(Seq2Seq(text.train.vocab, 4, 5, 0.0).double(), 0, 0.3)
    (low, few), (every, many) = (bind_dds(pairs, model, reward=reward, gradient_of=g, averages=(0.0, 1.0), scale=0.5)
                                 for g in ("low", "all"))
    low.scorer.double()
    weights = [p.detach().clone().requires_grad_() for p in low.scorer.parameters()]
    opt, asked = torch.optim.Adam(weights, 0.01), []
    low.opt = torch.optim.Adam(low.scorer.parameters(), 0.01)
    low.scorer.register_forward_pre_hook(lambda _, given: asked.append(given[0].clone()))
    for e in (0, 1): low.epoch(e), every.epoch(e)
    assert len(few) == 2 and len(many) == 16 and low.task.passes * 8 == every.task.passes
    assert all((pairs.lang[pairs.positions(b.idx)] == 0).all() for b in few)
    assert torch.equal(low.memory[0], every.memory[0]) and not low.memory[1:].any() and every.memory[1:].any(1).all()
    own = float(low.memory[0].double() @ low.memory[0].double()) if reward == "dot" else 1.0
    assert low.rewards.tolist() == pytest.approx([own] + [0.0] * 7, rel=1e-6)
    for present in asked[1:5]:                                             # the first draws the block before
        opt.zero_grad()
        (-sum(0.5 * float(low.rewards[0]) * written_scores(weights, row)[0] for row in present.tolist() if row[0])
         / len(present) + 0 * weights[0].sum()).backward()
        opt.step()
    for mine, theirs in zip(low.scorer.parameters(), weights): assert torch.allclose(mine, theirs, rtol=0, atol=1e-9)


# ---- the recipe

def test_ted_is_what_the_scripts_say():
    "dds.sh, dds_tcs.sh and the defaults of rl_main.py, as they were read."
    scripts = dict(cut_length=300, max_tokens=1500 // 2, embed=128, hidden=512, dropout=0.3, lr=0.001, clip_norm=5.0,
                   language_lr=0.0001, language_batch=160, block=20_000, first_blocks=5, first_block=5_000, updates=100,
                   block_alone=10_000_000,
                   updates_alone=1, imitate="low", imitate_steps=20 * 160, gradient_of="low", draw="bernoulli",
                   target_order="corpus", loss_sum=True, alpha1=0.5, alpha2=1.0, reward="cosine", reward_scale=0.01,
                   max_length=200 + 1, eval_every=2500, log_every=50, beam=5,
                   languages="aze,bel,glg,slk,tur,rus,por,ces")
    assert {k: TED.get(k) for k in scripts} == scripts
    ours = {"draw": "one", "block_alone": 0, "target_order": "shuffled", "first_blocks": 0, "updates_alone": 0,
            "imitate": "none", "imitate_steps": 0, "gradient_of": "all"}
    assert {k: getattr(LanguageRecipe(), k) for k in ours} == ours
    assert (NMTRecipe().loss_sum, NMTRecipe().cut_length) == (False, 0)
    for name in ("quick", "multi30k"): assert not {*ours, "loss_sum", "cut_length"} & {*NMT_RECIPES[name]}


def test_a_recipe_makes_each_script(alike):  # noqa: F811
    context = LanguageContext(None, lang="az", alike=alike)
    def made(name, recipe):
        return NMT_METHODS[name].selector(SimpleNamespace(languages=of(LanguageRecipe, recipe)), context)
    dds, tcs_dds = made("dds", TED), made("tcs_dds", TED)
    assert (dds.updates, dds.gradient_of, type(dds.start), dds.first_blocks[0]) == (1, "low", LowFirst, 0)
    assert (tcs_dds.updates, tcs_dds.gradient_of, type(tcs_dds.start)) == (100, "all", TCS)
    assert tcs_dds.first_blocks == (5, 5000) and dds.imitate_steps == tcs_dds.imitate_steps == 3200
    for name in ("targets", "tcs", "dds", "tcs_dds"):
        sel, quick = made(name, TED), made(name, NMT_RECIPES["quick"])
        assert (sel.draw, sel.target_order) == ("bernoulli", "corpus")
        assert sel.block == (20_000 if "dds" in name else 10_000_000)      # uniform.sh, tcs.sh: all targets at a time
        assert quick.block == NMT_RECIPES["quick"]["block"]
        assert (quick.draw, quick.target_order, quick.first_blocks[0]) == ("one", "shuffled", 0)
    quick = made("dds", NMT_RECIPES["quick"])
    assert quick.start is None and quick.gradient_of == "all" and quick.updates == 100


@pytest.fixture(scope="module")
def ted_folder(tmp_path_factory):
    "Eight languages as the published corpus has them, of number words."
    root = tmp_path_factory.mktemp("ted")
    codes = dict(aze="az", bel="be", glg="es", slk="sk", tur="tr", rus="ru", por="pt", ces="cs")
    for i, (code, language) in enumerate(codes.items()):
        (root / f"{code}_eng").mkdir()
        for part, numbers in (("train", range(i * 7, i * 7 + 70)), ("dev", range(300, 304)), ("test", range(304, 308))):
            for name, of_language in ((code, language), ("eng", "en")):
                words = [" ".join(number_words(k, of_language) for k in (n, n + 1000)) for n in numbers]
                (root / f"{code}_eng/ted-{part}.orig.{name}").write_text("".join(f"{w}\n" for w in words))
    return root


def test_ted_trains_every_method(ted_folder, tmp_path):
    small = dict(corpus=str(ted_folder), steps=10, source_vocab=200, target_vocab=55, embed=8, hidden=12, buckets=2,
                 max_tokens=300, eval_every=10, log_every=5, save_every=10, block=110, first_block=90, imitate_steps=40,
                 updates=5, gradient_batches=1, device="cpu", threads=1, cut_length=25)
    settings = SimpleNamespace(data=of(CorpusRecipe, TED, **small), train=of(NMTRecipe, TED, **small),
                               languages=of(LanguageRecipe, TED, **small))
    found = load_corpus(settings.data)
    assert found.train.languages == tuple(TED["languages"].split(","))
    with warnings.catch_warnings(action="ignore"):
        ready = prepare_text(found, settings.train)
        near = similarity(found.train)
        check_languages(settings, ready, near)
        for name in settings.languages.names():
            done, *_ = train_translation(name, settings, ready, near, 0, tmp_path)
            log = done.log.frame()
            assert done.steps_done == 10 and log[(log.split == "test") & (log.name == "loss")].value.notna().all(), name
            if name == "tcs_dds":
                assert [done.selector.block_size(e) for e in range(7)] == [90] * 5 + [110] * 2
                assert np.isfinite(done.selector.rewards).all()
            if name == "dds": assert done.selector.rewards.tolist() == pytest.approx([1.0] + [0.0] * 7, abs=1e-6)
    assert isinstance(ready.train.take(ready.train.ids[:2]), Batch) and ready.train.lengths[-1] <= 24
