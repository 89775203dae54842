"""The table of methods, loops and targets in the guide, against the trainings of test_protocol."""
import json
from pathlib import Path

import pytest
import test_protocol
from plain_loops import IN_PIECES, TARGETS

GUIDE = Path(__file__).parents[1] / "nbs" / "guide_2a_support.ipynb"
ROWS = {"uniform": "Uniform", "prune": "Prune (forgetting, EL2N, ...)", "rs2": "RS2", "infobatch": "InfoBatch",
        "σ": "data parameters, per example", "σ, both": "data parameters, per class", "spcl": "SPCL",
        "batchweight": "BatchWeight", "mentornet": "MentorNet", "mentornet, predefined": "MentorNet, predefined",
        "rho-loss": "RHO-LOSS", "dds": "DDS, scorer of input and label", "dds, x": "DDS, scorer of the input",
        "dds, groups": "DDS, a weight per group"}


@pytest.fixture(scope="module")
def support():
    "The table, made by the cells of the page."
    namespace = {}
    for cell in json.loads(GUIDE.read_text())["cells"]:
        if cell["cell_type"] == "code": exec("".join(cell["source"]), namespace)
    return namespace["support"]


def parametrised(test) -> set:
    "Methods that a test of test_protocol is run with."
    return {m for mark in test.pytestmark if mark.name == "parametrize" for m in mark.args[1]}


def test_the_table_is_what_the_trainings_of_the_tests_cover(support):
    assert set(ROWS) == set(TARGETS) and set(support.index) - set(ROWS.values()) == {"DynaMS"}
    for method, name in ROWS.items():
        says = support.loc[name]
        assert {t for t in ("class", "multilabel", "regression", "tokens") if says[t]} == set(TARGETS[method]), name
        assert says["accumulation"] == (method in IN_PIECES) and says["DDP"], name
    assert parametrised(test_protocol.test_two_processes_with_ddp_equal_one) == set(ROWS)
    assert {ROWS[m] for m in parametrised(test_protocol.test_two_processes_with_fsdp_equal_one)} <= set(
        support.index[support.FSDP.astype(bool)])
    assert {"BatchWeight", "DynaMS", *(ROWS[m] for m in ROWS if m.startswith("dds"))} == set(
        support.index[~support.FSDP.astype(bool)])
