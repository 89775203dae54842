"""What every process of tests/test_torchrun.py does, in float64: train each method
and save what came out, a training in a folder, what cannot be; one after the other.

Steps are what costs here, not examples: batches of 128, and no more steps than a stop in the middle needs.
"""
import json
import sys
from dataclasses import replace

import torch

from datasel_wb import tpu_trainer  # noqa: F401, has the engine for torchrun
from datasel_wb.images import Augment
from datasel_wb.report import Report
from datasel_wb.selectors import Uniform
from datasel_wb.loop import Recipe, Training
from datasel_wb.trainer import fit
from methods import DATA, METHODS

torch.set_default_dtype(torch.float64)
RECIPE = Recipe(model="tiny_cnn", epochs=3, batch_size=128, warmup_steps=5, ema_decay=0.9, device="cpu")
augment = Augment(crop=1, cutout=2, mean=DATA.train.mean, std=DATA.train.std)


def trained(method):
    "Weights, averages, records and the method's state after three epochs; the accuracy."
    selector = METHODS[method]().double()
    training = Training(RECIPE, DATA, selector, augment=augment, model=RECIPE.build(DATA.train).double())
    while not training.done: training.step()
    state = {f"{k}/{n}": t for k in ("model", "ema", "selector")
             for n, t in getattr(training, k).state_dict().items() if isinstance(t, torch.Tensor)}
    return (state | {"rows": training.dynamics.rows, "scores": Report(training).opinions(),
                     "results": training.evaluate(), "passes": selector.task.passes})


def each(out):
    done = {m: trained(m) for m in METHODS}
    if not torch.distributed.is_initialized() or torch.distributed.get_rank() == 0: torch.save(done, out)


class Local(Uniform):
    one_process = "it keeps what it saw of its own part"


def whole(folder, dropout):
    "Train DDS for 120 steps from the newest checkpoint on; checkpoints every 10."
    recipe = replace(RECIPE, epochs=0, steps=120, batch_size=64, save_every=10, log_every=25, eval_every=60,
                     dropout=float(dropout))
    fit(recipe, DATA, METHODS["dds"]().double(), folder=folder, augment=augment,
        model=recipe.build(DATA.train).double())


def refused():
    "What processes cannot share; the last ends this process."
    try: Training(RECIPE, DATA, Local())
    except ValueError as e: print(f"ValueError: {e}", flush=True)
    Training(replace(RECIPE, batch_size=63), DATA)


for task, *args in json.loads(sys.argv[1]): {"each": each, "whole": whole, "refused": refused}[task](*args)
