"""Every method as the tests make it, for a training set of 1,047 digits; adding a method adds one row."""
import torch

from datasel_wb.datasets import DataRecipe, load_data
from datasel_wb.models import make_model
from datasel_wb.scorer import DDS, Scorer
from datasel_wb.selectors import RS2, DynaMS, InfoBatch, Prune, Uniform
from datasel_wb.weighting import SPCL, BatchWeight, DataParameters, MentorNet, Sigma


DATA = load_data(DataRecipe(dataset="digits", dev_size=250, noise=0.2))


def dds(sees="xy", **kw):
    return lambda: DDS(Scorer.like(make_model("tiny_cnn", 10, 1, seed=1), sees, clip=2.0), **kw)


METHODS = {
    "uniform": Uniform,
    "prune by an order": lambda: Prune(DATA.train.ids.flip(0), remove_n=300, keep_lowest_n=50),
    "prune at random": lambda: Prune(remove_n=300),
    "rs2": lambda: RS2(0.3),
    "infobatch": InfoBatch,
    "infobatch, never whole": lambda: InfoBatch(0.7, delta=1.0),
    "dynams": lambda: DynaMS(0.7, warmup=1, every=2),
    "dynams, proxy": lambda: DynaMS(0.8, warmup=1, every=1, shape="linear", proxy=0.5),
    "data parameters, class": lambda: DataParameters(cls=Sigma(lr=0.1, weight_decay=1e-2)),
    "data parameters, instance": lambda: DataParameters(inst=Sigma(lr=2.0)),
    "data parameters, joint": lambda: DataParameters(Sigma(lr=0.1), Sigma(lr=0.8, init=0.001, weight_decay=1e-4, momentum=0), clamp=False),
    "spcl": SPCL,
    "spcl, soft": lambda: SPCL(soft=True, until=0.5),
    "batchweight": BatchWeight,
    "mentornet": MentorNet,
    "mentornet, predefined": lambda: MentorNet("predefined", burn_in=0.0),
    "dds": dds(lr=0.05),
    "dds, input alone": dds("x", lr=0.05),
    "dds, released code": dds(lr=0.05, variant="released", reward="difference"),
    "dds, all options": dds(lr=0.05, momentum=0.9, wait_steps=3, reward="reverse", baseline="moving", decay=True),
    "retrained dds": dds(lr=0.0),
}
