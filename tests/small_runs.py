"""Small finished runs that several tests look at: no tests here."""
from pathlib import Path

import torch

from datasel_wb import language_recipes, runs
from datasel_wb.corpus import CorpusRecipe, load_corpus
from datasel_wb.recorder import Recorder
from datasel_wb.translation import NMTRecipe, Translation, prepare_text
from datasel_wb.trainer import fit

TRANSLATION = dict(steps=6, eval_every=6, log_every=3, save_every=6, languages="az,tr", low=30, high=60, dev_size=4,
                   test_size=4, hidden=16, embed=16, source_vocab=100, target_vocab=50, history=10, name="words")


def translation_run(root) -> Path:
    "A run of the bundled numbers in two languages; returns its folder."
    settings = runs.resolve(TRANSLATION, language_recipes.NMT_RECIPES, published="quick", data=CorpusRecipe,
                            train=NMTRecipe)
    text = prepare_text(load_corpus(settings.data), settings.train)
    run = runs.begin(settings, text, root=root)
    runs.finish(run,
                [runs.record("uniform", fit(settings.train, text, folder=run.folder / "uniform-0", kind=Translation))])
    return run.folder


SENTENCES = [   # as people write to their bank
    "How do I locate my card?", "I still have not received my new card, I ordered over a week ago.",
    "Can I track the card that was sent to me?", "My card has not come yet. Is it lost?",
    "Why was I charged twice for one coffee?", "There is a fee on my statement that I do not recognise.",
    "I was charged a fee for a payment in my own country, which the terms say is free.",
    "The exchange rate that you applied to my purchase abroad is wrong; please explain how it came about and give me "
    "back the difference, since I compared it with the rate of that day and paid nearly four percent more than I "
    "should have, and this is the third time that it has happened to me since the spring of this year alone.",
    "How do I change my PIN?", "Can I choose my own PIN while I am abroad?",
    "I have forgotten my passcode & cannot log in <at all>.", "What do I need to verify my identity?"]
INTENTS = ("arrival", "charge", "access")
LABELS = [0, 0, 0, 0, 1, 1, 1, 1, 2, 2, 2, 2]


def recorded_run(root, target: str = "class", steps: int = 6, **more) -> Path:
    "A run of a loop that is not the project's, twelve examples and no network; returns its folder."
    n, g = len(LABELS), torch.Generator().manual_seed(0)
    y = {"class": torch.tensor(LABELS), "multilabel": (torch.rand(n, 3, generator=g) > 0.5).float(),
         "regression": torch.rand(n, generator=g), "tokens": torch.randint(9, (n, 5), generator=g)}[target]
    shape = {"class": (n, 3), "multilabel": (n, 3), "regression": (n,), "tokens": (n, 5, 9)}[target]
    names = {"classes": INTENTS} if target == "class" else {}
    with Recorder(f"recorded-{target}", y, target=target, root=root, history=8, **names | more) as recorder:
        for _ in range(steps): recorder.record(torch.arange(n), torch.randn(shape, generator=g))
    return recorder.run
