"""One contract check for every registered method; adding a method adds one row."""
import pytest

from datasel_wb.models import make_model
from datasel_wb.scorer import DDS, Scorer
from datasel_wb.selectors import Uniform, check_selector


def dds(sees="xy", **kw):
    return lambda: DDS(Scorer.like(make_model("tiny_cnn", 10, 1, seed=1), sees, clip=2.0), **kw)


METHODS = {
    "uniform": Uniform,
    "dds": dds(lr=0.05),
    "dds, input alone": dds("x", lr=0.05),
    "dds, released code": dds(lr=0.05, variant="released", reward="difference"),
    "dds, all options": dds(lr=0.05, momentum=0.9, wait_steps=3, reward="reverse", baseline="moving", decay=True),
    "retrained dds": dds(lr=0.0),
}


@pytest.mark.parametrize("method", METHODS)
def test_contract(method):
    check_selector(METHODS[method], steps=40)
