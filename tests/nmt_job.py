"""What a process of tests/test_nmt_engines.py does: translation trainings under torchrun (float64), or on XLA with one or more virtual devices."""
import json
import os
import sys
from dataclasses import replace

import torch

from datasel_wb import tpu_trainer  # noqa: F401, has the engines
from datasel_wb.translation import Translation
from datasel_wb.report import MetricLog
from datasel_wb.trainer import fit
from languages import METHODS, RECIPE, TEXT


def made(method, wide=False, **settings):
    "A training without a folder."
    recipe = replace(RECIPE, **settings)
    model = recipe.build(TEXT.train)
    t = Translation(recipe, TEXT, METHODS[method](), model=model.double() if wide else model)
    t.log = MetricLog()
    return t


def outcome(t):
    "Weights, averages, records and the method's state."
    state = {f"{k}/{n}": v.cpu() for k in ("model", "ema", "selector") for n, v in getattr(t, k).state_dict().items() if isinstance(v, torch.Tensor)}
    moments = {f"adam/{i}/{k}": v.cpu() for i, s in enumerate(t.optimizer.state.values()) for k, v in s.items()}
    return state | moments | {"rows": t.dynamics.rows.cpu()}


def each(out, methods, steps):
    "In float64: what comes out of each method, its numbers and its translations' scores; saved by every process."
    torch.set_default_dtype(torch.float64)
    done = {}
    for m in methods:
        t = made(m, wide=True, steps=steps)
        while not t.done: t.step()
        done[m] = outcome(t) | {"results": t.evaluate(), "passes": t.selector.task.passes, "blocks": t.epochs_begun, "meters": t.read_meters()}
    torch.save(done, out if not (rank := int(os.environ.get("RANK", 0))) else f"{out}.{rank}")


def beside(method, steps, **settings):
    "XLA beside eager PyTorch: nothing is read within a block's steps; no compilation once each length and one update were seen."
    t, eager = (made(method, device=d, **settings) for d in ("xla", "cpu"))
    seen, blocks, gaps = set(), 0, []
    while t.steps_done < steps:
        fresh = not t.loader.remaining
        blocks += fresh
        known = t.loader.position < len(t.loader.plan) and int(t.loader.plan[t.loader.position]) in seen
        eager.step()
        before = t.backend.counters()
        t.step()
        t.backend.synchronize()
        new = {k.removeprefix("xla/"): n - before[k] for k, n in t.backend.counters().items()}
        if not fresh: assert new["from_device"] == 0, f"step {t.steps_done} reads on the host"
        if (known and not fresh) or (fresh and blocks > 3): assert new["compiles"] == 0, f"step {t.steps_done} compiles {new['compiles']} graphs"
        seen.add(int(t.loader.plan[t.loader.position - 1]))
        gaps.append(max((p - q.cpu()).abs().max().item() for p, q in zip(eager.model.parameters(), t.model.parameters())))
        if t.steps_done == steps // 2: searched(t, eager)
    assert max(gaps) < 2e-5 and len(seen) == 2 and t.skips.tolist() == [0, 0, 0], gaps
    a, b = outcome(eager), outcome(t)
    for k in ("rewards", "share"):
        if f"selector/{k}" in a: torch.testing.assert_close(b[f"selector/{k}"], a[f"selector/{k}"], rtol=0, atol=1e-3)
    assert t.optimizer.state[t.params[0]]["step"].device.type == "xla" and int(b["adam/0/step"]) == steps
    print(f"{method}: weights within {max(gaps):.1e}")


def all_beside(tasks):
    "Several, one after the other."
    for t in tasks: beside(**t)


def searched(t, eager):
    "Evaluation in the middle: that of eager PyTorch, and the training is as it was."
    before, count = outcome(t), t.backend.counters()["xla/compiles"]
    results, plain = t.evaluate()["dev"], eager.evaluate()["dev"]
    assert abs(results["loss"] - plain["loss"]) < 1e-4 and t.backend.counters()["xla/compiles"] == count
    assert all(p.device.type == "xla" for p in t.model.parameters())
    after = outcome(t)
    assert all(torch.equal(before[k].nan_to_num(), after[k].nan_to_num()) for k in before)


def spread(t):
    "On how many devices the last batch lay."
    spec = t.backend.torch_xla._XLAC._get_xla_sharding_spec(t.selector.seen.losses)   # e.g. {devices=[2]0,1}
    return int(spec.split("[")[1].split("]")[0]) if "devices=[" in spec else 1


def some_steps(out, methods, steps, **settings):
    "Save what some steps of each method come to."
    done = {}
    for m in methods:
        t = made(m, device="xla", **settings)
        for _ in range(steps): t.step()
        t.backend.synchronize()
        print(f"batches of {t.loader.sizes} pairs on {spread(t)} devices")
        done[m] = outcome(t) | {"loss": torch.tensor(t.evaluate()["dev"]["loss"])}
    torch.save(done, out)


def whole(method, folder, **settings):
    "Train from the newest checkpoint to the end."
    print("begins", flush=True)
    recipe = replace(RECIPE, **settings)
    fit(recipe, TEXT, METHODS[method](), folder=folder, kind=Translation)


task = json.loads(sys.argv[1])
{f.__name__: f for f in (each, all_beside, some_steps, whole)}[task.pop("do")](**task)
