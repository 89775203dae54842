"""What a process of tests/test_xla_devices.py does on its virtual devices: six steps of some methods, or a whole training in a folder."""
import json
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import torch
from torchvision.io import write_png

from datasel_wb import tpu_trainer  # noqa: F401, has the engine for XLA
from datasel_wb.examples import Splits
from datasel_wb.images import Augment, FolderExamples
from datasel_wb.loop import Recipe, Training
from datasel_wb.trainer import fit
from methods import DATA, METHODS

recipe = Recipe(model="tiny_cnn", steps=40, batch_size=64, warmup_steps=2, ema_decay=0.9, device="xla", log_every=10, eval_every=20, save_every=5)
augment = Augment(crop=1, cutout=2, mean=DATA.train.mean, std=DATA.train.std)


def spread(training):
    "On how many devices the last batch lay."
    spec = training.backend.torch_xla._XLAC._get_xla_sharding_spec(training.selector.seen.losses)   # e.g. {devices=[2]0,1}
    return int(spec.split("[")[1].split("]")[0]) if "devices=[" in spec else 1


def six_steps(methods, out, refused=0, **settings):
    "Save model and method after six steps of each; then a batch of size `refused`, which ends the process."
    done = {}
    for m in methods:
        training = Training(replace(recipe, epochs=4, **settings), DATA, METHODS[m](), augment=augment)
        for _ in range(6): training.step()
        training.backend.synchronize()
        print(f"losses of {len(training.selector.seen.losses)} examples on {spread(training)} devices")
        states = {part: getattr(training, part).state_dict() for part in ("model", "selector")}
        done[m] = {f"{part}/{k}": t.cpu() for part, s in states.items() for k, t in s.items() if isinstance(t, torch.Tensor)}
    torch.save(done, out)
    if refused: Training(replace(recipe, batch_size=refused), DATA)


def whole(method, folder, **settings):
    "Train from the newest checkpoint to the end."
    print("begins", flush=True)
    fit(replace(recipe, **settings), DATA, METHODS[method](), folder=folder, augment=augment)


def tree(folder, workers):
    "Three steps on images that stay on disk, read by no and by so many workers, beside the same in eager PyTorch."
    x, y = DATA.train.x[:200], DATA.train.y[:200]
    files = [str(Path(folder) / f"{i}.png") for i in range(200)]
    for file, image in zip(files, x): write_png(image, file)
    images = FolderExamples(np.array(files), y, DATA.train.classes, 8, 1, mean=DATA.train.mean, std=DATA.train.std)
    states = []
    for device, n in (("cpu", 0), *(("xla", n) for n in workers)):
        training = Training(replace(recipe, device=device, workers=n), Splits(images, images, None), METHODS["spcl"]())
        for _ in range(3): training.step()
        states.append([t.cpu() for t in training.model.state_dict().values()] + [torch.tensor(training.evaluate()["dev"]["loss"])])
    eager, *on_xla = states
    for n, state in zip(workers, on_xla):
        for a, b in zip(state, eager): torch.testing.assert_close(a, b, rtol=1e-3, atol=1e-4)   # running variances round differently
        print(f"{n} workers: as eager PyTorch")


task = json.loads(sys.argv[1])
{"six_steps": six_steps, "whole": whole, "tree": tree}[task.pop("do")](**task)
