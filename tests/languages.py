"""A small translation training as the tests of engines make it: number words of four languages, a tiny LSTM, the methods that choose languages."""
import warnings

from datasel_wb.corpus import CorpusRecipe, load_corpus
from datasel_wb.registry import trials
from datasel_wb.translation import NMTRecipe, prepare_text

RECIPE = NMTRecipe(steps=60, lr=5e-3, warmup_steps=5, ema_decay=0.9, weight_decay=1e-4, dropout=0.0, source_vocab=80, target_vocab=60, max_length=24,
                   max_tokens=400, buckets=2, embed=8, hidden=16, beam=2, eval_every=30, log_every=30, save_every=10, device="cpu")


with warnings.catch_warnings(action="ignore"):   # long pairs are left out
    TEXT = prepare_text(load_corpus(CorpusRecipe(languages="az,tr,ru,cs", low=30, high=150, dev_size=6, test_size=6)), RECIPE)

METHODS = trials("translation")
