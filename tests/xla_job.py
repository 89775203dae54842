"""What a process of tests/test_xla.py does on its virtual devices: six steps of each method, weights saved."""
import json
import sys
from dataclasses import replace

import torch

from datasel_wb import tpu_trainer  # noqa: F401, has the engine for XLA
from datasel_wb.data import Augment
from datasel_wb.trainer import Recipe, Training
from methods import DATA, METHODS

task = json.loads(sys.argv[1])
recipe = Recipe(model="tiny_cnn", epochs=4, batch_size=64, warmup_steps=2, ema_decay=0.9, device="xla")
recipe = replace(recipe, batch_size=task.get("batch_size", 64))
augment = Augment(crop=1, cutout=2, mean=DATA.train.mean, std=DATA.train.std)


def trained(method):
    training = Training(recipe, DATA, METHODS[method](), augment=augment)
    for _ in range(6): training.step()
    training.backend.fence()
    losses = training.selector.seen.losses
    spec = training.backend.torch_xla._XLAC._get_xla_sharding_spec(losses)   # e.g. {devices=[2]0,1}
    n = int(spec.split("[")[1].split("]")[0]) if "devices=[" in spec else 1
    print(f"losses of {len(losses)} examples on {n} devices")
    return {f"{part}/{k}": t.cpu() for part in ("model", "selector") for k, t in getattr(training, part).state_dict().items() if isinstance(t, torch.Tensor)}


done = {m: trained(m) for m in task["methods"]}
torch.save(done, task["out"])
