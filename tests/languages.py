"""A small translation training as the tests of engines make it: number words of four languages, a tiny LSTM, the methods that choose languages."""
import warnings

from datasel_wb.corpus import CorpusRecipe, load_corpus
from datasel_wb.mixtures import TCS, LanguageDDS
from datasel_wb.translation import NMTRecipe, prepare_text
from datasel_wb.selectors import Uniform
from datasel_wb.weighting import SPCL

RECIPE = NMTRecipe(steps=60, lr=5e-3, warmup_steps=5, ema_decay=0.9, weight_decay=1e-4, dropout=0.0, source_vocab=80, target_vocab=60, max_length=24,
                   max_tokens=400, buckets=2, embed=8, hidden=16, beam=2, eval_every=30, log_every=30, save_every=10, device="cpu")
ALIKE = {"az": 1.0, "tr": 0.5, "ru": 0.2, "cs": 0.3}

with warnings.catch_warnings(action="ignore"):   # long pairs are left out
    TEXT = prepare_text(load_corpus(CorpusRecipe(languages="az,tr,ru,cs", low=30, high=150, dev_size=6, test_size=6)), RECIPE)


def tcs(tau=0.1): return TCS(ALIKE, tau, block=120)


def dds(**kw): return lambda: LanguageDDS("az", **dict(block=120, updates=5, lr=1e-2, batch=20, batches=1) | kw)


METHODS = {
    "uniform": Uniform,
    "spcl": SPCL,
    "tcs": tcs,
    "dds": dds(),
    "dds, dot, projected": dds(reward="dot", projection=64, batches=2),
    "tcs_dds": lambda: dds(start=tcs())(),
}
