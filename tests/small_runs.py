"""Small finished runs that several tests look at: no tests here."""
from pathlib import Path

from datasel_wb import language_recipes, runs
from datasel_wb.corpus import CorpusRecipe, load_corpus
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
