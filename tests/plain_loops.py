"""One small training in float64, stepped in all the ways that loops have; what each must equal is one plain process."""
import torch
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from datasel_wb import (
    DDS, RS2, SPCL, BatchWeight, DataParameters, Dynamics, GroupScorer, InfoBatch, MentorNet, Prune, RHOLoss, Scorer,
    Sigma, Task, Uniform)
from datasel_wb.core import IGNORED, call

N, BATCH, EPOCHS = 192, 64, 3


class Sequences(nn.Module):
    "A linear layer on each token, as a dict."
    def __init__(self):
        super().__init__()
        self.read = nn.Linear(4, 5)
    def forward(self, words): return {"logits": self.read(words)}


def training_set(target: str) -> tuple:
    "Inputs and labels of N examples; of sequences, some tokens do not count."
    rng = torch.Generator().manual_seed(3)
    x = torch.randn(N, 6, generator=rng, dtype=torch.float64)
    made = x @ torch.randn(6, 4, generator=rng, dtype=torch.float64)
    if target == "class": return x, (made + torch.randn(N, 4, generator=rng)).argmax(1)
    if target == "multilabel": return x, (made > 0).double()
    if target == "regression": return x, made[:, :1]
    words = torch.randn(N, 7, 4, generator=rng, dtype=torch.float64)
    y = words.argmax(2)
    y[torch.rand(N, 7, generator=rng) < 0.3] = IGNORED
    return words, y


def network(target: str) -> nn.Module:
    "Freshly initialised, float64."
    torch.manual_seed(5)
    width = {"class": 4, "multilabel": 4, "regression": 1}
    if target == "tokens": return Sequences().double()
    return nn.Sequential(nn.Linear(6, 8), nn.Tanh(), nn.Linear(8, width[target])).double()


METHODS = {
    "uniform": lambda model: Uniform(),
    "prune": lambda model: Prune(torch.arange(N), 64),
    "rs2": lambda model: RS2(0.7),
    "infobatch": lambda model: InfoBatch(0.5, 1.0),
    "σ": lambda model: DataParameters(inst=Sigma(lr=2.0, init=0.5, weight_decay=0.01)),
    "σ, both": lambda model: DataParameters(Sigma(lr=0.5), Sigma(lr=2.0, init=0.001)),
    "spcl": lambda model: SPCL(),
    "batchweight": lambda model: BatchWeight(),
    "mentornet": lambda model: MentorNet(burn_in=0.0, every=2),
    "mentornet, predefined": lambda model: MentorNet("predefined", burn_in=0.0),
    "rho-loss": lambda model: RHOLoss(torch.linspace(0, 1, N, dtype=torch.float64), keep=0.25),
    "dds": lambda model: DDS(Scorer.of(model), lr=5.0),
    "dds, x": lambda model: DDS(Scorer.of(model, sees="x"), lr=5.0, baseline="moving"),
    "dds, groups": lambda model: DDS(GroupScorer(torch.arange(N) % 3), lr=50.0, momentum=0.5),
}
IN_PIECES = ("uniform", "prune", "rs2", "infobatch", "σ", "σ, both")
TARGETS = {k: {"σ, both": ("class",), "σ": ("class", "multilabel", "tokens"), "mentornet": ("class",),
               "dds": ("class",)}.get(k, ("class", "multilabel", "regression", "tokens")) for k in METHODS}


class Loop:
    "A model in training with a method and its records; `run` makes the epochs."
    def __init__(self, method: str, target: str, wrap=lambda m: m, **task):
        x, y = training_set(target)
        x = {"words": x} if target == "tokens" else x
        self.x, self.y, self.target = x, y, target
        model = network(target)
        self.model, self.bare = wrap(model), model
        held_out = TensorDataset(*training_set(target))
        if target == "tokens": held_out = [{"words": a, "labels": b} for a, b in held_out]
        task = {"n": N, "n_classes": 4 if target == "class" else None, "dev": held_out, "dev_batch_size": 32,
                "steps": 9, "epochs": EPOCHS, "target": target} | task
        self.sel = METHODS[method](network(target)).double().bind(Task(self.model, **task))
        self.opt = torch.optim.SGD(self.bare.parameters(), 0.02 if target == "regression" else 0.1, momentum=0.9)
        self.records = Dynamics(n=N, target=target)
        self.sampler = self.sel.sampler(seed=1)
        self.visited = []

    def batch(self, ids):
        x = {k: v[ids] for k, v in self.x.items()} if isinstance(self.x, dict) else self.x[ids]
        return x, self.y[ids], ids

    def loss(self, ids):
        "The method's loss of some examples, recorded."
        b = self.batch(ids)
        loss = self.sel.loss(call(self.model, b[0]), b)
        self.records.record(ids, *self.sel.seen[:2], b[1], self.sel.seen.weights)
        self.visited += ids.tolist()
        return loss

    def run(self, size: int = BATCH, pieces: int = 1, scaler=None, epochs: int = EPOCHS):
        "Train with batches of `size`, `pieces` of them in each step."
        for _ in range(epochs):
            batches = list(DataLoader(range(N), size, sampler=self.sampler, drop_last=True))
            for step in zip(*[iter(batches)] * pieces):
                self.step(step, scaler)
        return self

    def step(self, batches, scaler=None):
        for ids in batches:
            loss = self.loss(ids) / len(batches)
            (loss if scaler is None else scaler.scale(loss)).backward()
        if scaler is None: self.opt.step()
        else:
            scaler.step(self.opt)
            scaler.update()
        self.opt.zero_grad()
        self.sel.after_step(scaler=scaler)

    def result(self) -> dict:
        "All that must agree: the model's and the method's numbers, and the records."
        state = {f"model {k}": v for k, v in self.bare.state_dict().items()}
        state |= {f"method {k}": v for k, v in self.sel.state_dict().items() if isinstance(v, torch.Tensor)}
        return state | {f"record {k}": self.records.column(k) for k in ("loss_sum", "weight_sum", "margin_sum")}


def difference(one: dict, other: dict) -> float:
    "The largest difference of two results, NaN equal to NaN."
    assert one.keys() == other.keys()
    apart = [((a.double() - b.double()).nan_to_num(0, 0, 0).abs().amax() if a.numel() else 0) for a, b in
             zip(one.values(), other.values())]
    assert all(torch.equal(a.isnan(), b.isnan()) for a, b in zip(one.values(), other.values()))
    return float(max(apart))
