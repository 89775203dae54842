"""What every process of tests/test_torchrun.py does: train each method in float64 and save what came out."""
import sys

import torch

from datasel_wb import tpu_trainer  # noqa: F401, has the engine for torchrun
from datasel_wb.data import Augment
from datasel_wb.trainer import Recipe, Training
from methods import DATA, METHODS

torch.set_default_dtype(torch.float64)
RECIPE = Recipe(model="tiny_cnn", epochs=3, batch_size=64, warmup_steps=5, ema_decay=0.9, device="cpu")
augment = Augment(crop=1, cutout=2, mean=DATA.train.mean, std=DATA.train.std)


def trained(method):
    "Weights, averages, records and the method's state after three epochs; the accuracy."
    model = RECIPE.build(DATA.train).double()
    selector = METHODS[method]().double()
    training = Training(RECIPE, DATA, selector, augment=augment, model=model)
    while not training.done: training.step()
    state = {f"{k}/{n}": t for k in ("model", "ema", "selector") for n, t in getattr(training, k).state_dict().items() if isinstance(t, torch.Tensor)}
    return state | {"rows": training.dynamics.rows, "scores": training.opinions(), "results": training.evaluate(), "passes": selector.task.passes}


done = {m: trained(m) for m in sys.argv[2:] or METHODS}
if training_is_first := not torch.distributed.is_initialized() or torch.distributed.get_rank() == 0: torch.save(done, sys.argv[1])
