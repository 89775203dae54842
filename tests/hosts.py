"""What the tests of the adapters share: rows of numbers in float64, a network that every host can call, the methods,
and the plain loop on whole batches of 64 in one process that all of them are compared with."""
import torch
from torch import nn
from torch.utils.data import Dataset

from datasel_wb.batch_selection import RHOLoss
from datasel_wb.core import Batch, seeded
from datasel_wb.dynamics import Dynamics
from datasel_wb.scorer import DDS, GroupScorer
from datasel_wb.selectors import RS2, InfoBatch, Prune, Uniform
from datasel_wb.task import Task
from datasel_wb.weighting import SPCL, BatchWeight, DataParameters, MentorNet, Sigma

N, CLASSES, BATCH, EPOCHS, SEED = 192, 3, 64, 3, 5
METHODS = {   # label -> () -> Selector
    "uniform": Uniform,
    "prune": lambda: Prune(torch.arange(N).flip(0), remove_n=40),
    "rs2": lambda: RS2(0.7),
    "infobatch": lambda: InfoBatch(0.5, delta=0.7),   # epochs of 192, about 140, and 192 examples
    "data parameters": lambda: DataParameters(Sigma(lr=0.5), Sigma(lr=8.0, weight_decay=1e-3)),
    "spcl": SPCL,
    "batchweight": BatchWeight,
    "mentornet": lambda: MentorNet("predefined", burn_in=0.0),
    "rho-loss": lambda: RHOLoss(torch.linspace(0, 2, N), keep=0.25),
    "dds": lambda: DDS(GroupScorer(torch.arange(N) % 3).double(), lr=1.0),
}
WHOLE = ("spcl", "batchweight", "mentornet", "rho-loss", "dds")   # that must see a step's examples at once
IN_PIECES = [m for m in METHODS if m not in WHOLE]


def numbers(n=N, seed=0):
    "x [n, 4] in float64 and y [n], some of them wrong."
    rng = torch.Generator().manual_seed(seed)
    y = torch.randint(CLASSES, (n,), generator=rng)
    x = torch.cat([3 * torch.eye(CLASSES)[y], torch.zeros(n, 1)], 1) + torch.randn(n, 4, generator=rng)
    y[: n // 8] = (y[: n // 8] + 1) % CLASSES
    return x.double(), y


class DictRows(Dataset):
    "Rows as Hugging Face has them."
    def __init__(self, n=N, seed=0): self.x, self.y = numbers(n, seed)
    def __len__(self): return len(self.y)
    def __getitem__(self, i): return {"x": self.x[i], "labels": self.y[i], "unused": i}


class Net(nn.Module):
    "A network that gives its logits in a dict, as models of transformers do."
    def __init__(self):
        super().__init__()
        torch.manual_seed(1)
        self.net = nn.Sequential(nn.Linear(4, 8), nn.Tanh(), nn.Linear(8, CLASSES)).double()
        self.noise = 0.0   # of the inputs, from PyTorch's own generator
    def forward(self, x, labels=None):
        logits = self.net(nn.functional.dropout(x, self.noise, self.training))
        return {"loss": nn.functional.cross_entropy(logits, labels) if labels is not None else None, "logits": logits}


def noisy():
    "A network that draws random numbers in training."
    model = Net()
    model.noise = 0.2
    return model


def sgd(model): return torch.optim.SGD(model.parameters(), 0.2, momentum=0.9)


def task_of(model, dev, **more):
    "What the plain loop binds a method to; the same that each host is told."
    return Task(model, n=N, n_classes=CLASSES, dev=dev, steps=EPOCHS * N // BATCH, epochs=EPOCHS, dev_batch_size=32,
                seed=SEED, **more)


def bare(make, dev, epochs=EPOCHS, batch=BATCH, tail=False, without=None):
    """The loop without a host: model, method, records, ids of each step. Without `tail` a last smaller batch is left
    out; step number `without` is not made, and nothing learned from it."""
    x, y = numbers()
    model, visited = Net(), []
    sel, records, opt = make().bind(task_of(model, dev)), Dynamics(n=N), sgd(model)
    for e in range(epochs):
        ids = sel.epoch(e)
        ids = torch.arange(N) if ids is None else torch.tensor(ids.tolist())
        order = ids[torch.randperm(len(ids), generator=seeded(SEED, f"order-{e}"))]
        for step in order.split(batch):
            if len(step) < batch and not tail: continue
            b = Batch(x[step], y[step], step)
            sel.loss(model(b.x)["logits"], b).backward()
            records.record(b.idx, sel.seen.logits, sel.seen.losses, b.y, sel.seen.weights)
            if len(visited) != without: opt.step()
            opt.zero_grad()
            sel.after_step(skipped=len(visited) == without)
            visited.append(step.tolist())
    return model, sel, records, visited


def tensors(sel):
    "The tables of a method."
    return {k: v for k, v in sel.state_dict().items() if isinstance(v, torch.Tensor)}


def assert_like(plain, model, sel, records=None, tolerance=1e-10):
    "A host's model, method and records are those of the plain loop; InfoBatch keeps its weights in float32."
    if isinstance(sel, InfoBatch): tolerance = 1e-7
    a, b = plain[0].state_dict(), model.state_dict()
    assert a.keys() == {k.removeprefix("inner.") for k in b}
    for k, v in b.items(): torch.testing.assert_close(v, a[k.removeprefix("inner.")], rtol=tolerance, atol=tolerance)
    for k, v in tensors(sel).items():
        torch.testing.assert_close(v, tensors(plain[1])[k], rtol=tolerance, atol=tolerance)
    if records is None: return
    for name in records.ROWS:
        if name.startswith("weight"): continue   # relative to the batch, which came in pieces
        torch.testing.assert_close(records.column(name), plain[2].column(name), rtol=1e-5, atol=1e-6, equal_nan=True)


def assert_equal(a, b):
    "Two trainings ended with the same bits."
    for x, y in zip(a.parameters(), b.parameters(), strict=True): assert torch.equal(x, y)


class Plain:
    "Results of the plain loop by method, each made once."
    def __init__(self, dev): self.dev, self.made = dev, {}   # () -> held-out examples, for methods that want them
    def __call__(self, name, **more):
        key = name, *more.items()
        if key not in self.made: self.made[key] = bare(METHODS[name], self.dev() if name in WHOLE else None, **more)
        return self.made[key]
