"""Methods that declare themselves: names, earlier trainings, and a method from outside the package wherever methods are listed."""
import json
import os
import re
import shutil
import subprocess
import sys
import uuid
from pathlib import Path
from types import SimpleNamespace

import nbformat
import pytest

from datasel_wb import registry
from datasel_wb.examples import Splits
from datasel_wb.loop import Recipe
from datasel_wb.recipes import trained
from datasel_wb.registry import Context, before, declare, declare_stage, declared, trials
from datasel_wb.selectors import Selector, Uniform
from datasel_wb.trainer import fit
from methods import DATA

ROOT = Path(__file__).resolve().parents[1]
TOY = '''
from dataclasses import dataclass

import torch

from datasel_wb.core import check_settings, setting
from datasel_wb.registry import declare
from datasel_wb.selectors import Selector

@dataclass(frozen=True)
class ToySettings:
    "Settings of the toy."
    toy_share: float = setting(0.5, "toy: share of each batch that counts", "fraction")
    def __post_init__(self): check_settings(self)

class Toy(Selector):
    "The highest losses of a batch count, the others do not."
    def __init__(self, share): super().__init__(); self.share = share
    def weights(self, losses, batch):
        k = max(1, round(self.share * len(losses)))
        return torch.zeros_like(losses).scatter(0, losses.topk(k).indices, 1 / k)

declare("toy", lambda s, context: Toy(s.toy_share), settings=ToySettings, card="A toy from outside the package.")
'''


@pytest.fixture
def own(monkeypatch):
    "Declarations of a test, gone after it."
    monkeypatch.setattr(registry, "_DECLARED", dict(registry._DECLARED))


@pytest.fixture(scope="module")
def outside(tmp_path_factory):
    "The environment of a process in which a package with a method is installed."
    folder = tmp_path_factory.mktemp("site")
    (folder / "toy_package.py").write_text(TOY)
    about = folder / "toy_package-1.0.dist-info"
    about.mkdir()
    (about / "METADATA").write_text("Metadata-Version: 2.1\nName: toy-package\nVersion: 1.0\n")
    (about / "entry_points.txt").write_text("[datasel_wb.methods]\ntoy = toy_package\n")
    return os.environ | {"PYTHONPATH": os.pathsep.join([str(folder), str(ROOT), os.environ.get("PYTHONPATH", "")]), "OMP_NUM_THREADS": "1"}


def run(env, *command):
    "What a process in the project's folder says; it must succeed."
    done = subprocess.run([sys.executable, *map(str, command)], cwd=ROOT, env=env, capture_output=True, text=True, timeout=900)
    assert done.returncode == 0, (done.stdout + done.stderr)[-4000:]
    return done.stdout


def test_every_method_has_a_card_and_is_tried():
    "One variant at least of every class that a method makes; a card for each, sentences of a reader."
    for kind in ("images", "translation"):
        methods = declared(kind)
        assert all(re.fullmatch(r"[A-Z].{20,}\.", m.card) for m in methods.values())
        tried = {type(make()) for make in trials(kind).values()}
        alone = [m for m in methods.values() if not m.after and kind == "images"]
        run_of = SimpleNamespace(dynams=next(m for m in declared().values() if m.name == "dynams").settings(proxy=0.5))
        assert {type(m.selector(run_of, Context(DATA))) for m in alone} <= tried


def test_a_name_is_declared_once(own):
    def make(s, context): return Uniform()
    declare("mine", make, card="Mine.")
    with pytest.raises(ValueError, match="name = 'mine': declared by .*test_registry already; a method needs a name of its own"):
        declare("mine", lambda s, context: Uniform())
    with pytest.raises(ValueError, match="name = 'spcl': declared by datasel_wb.weighting already"): declare("spcl", make)
    with pytest.raises(ValueError, match="name = 'mine': declared by"): declare_stage("mine", lambda s, context: Uniform())
    assert declare("mine", make).card == ""                                            # a module that is loaded again
    declare("mine", lambda s, context: Uniform(), kind="translation")                # another kind of run
    with pytest.raises(ValueError, match="trials of other: 'spcl' is a label of another method"):
        declare("other", lambda s, context: Uniform(), trials={"spcl": Uniform})
        trials()


def test_two_methods_of_a_notebook_that_is_run_again(own):
    "A cell that was edited and run again replaces its method; so does the module that was exported from it, if it is the same."
    def first(s, context): return Uniform()
    def edited(s, context): return Selector()
    for f in (first, edited): f.__module__ = "__main__"
    declare("mine", first)
    assert declare("mine", edited).make is edited is declared()["mine"].make
    def exported(s, context): return Selector()
    declare("mine", exported)
    with pytest.raises(ValueError, match="name = 'mine'"): declare("mine", lambda s, context: Uniform())


class Noted(Selector):
    "Uniform, with what it was made from."
    def __init__(self, earlier): super().__init__(); self.earlier = {k: t.steps_done for k, t in earlier.items()}


def test_earlier_trainings_are_any_that_are_declared(own, tmp_path):
    "Each is trained once, in its own folder, with its own data and recipe; a second method finds it there."
    from dataclasses import replace
    declare_stage("few", lambda s, context: Uniform(), split=lambda data: Splits(data.dev, None, data.test),
                  recipe=lambda recipe, s, context: replace(recipe, batch_size=32))
    declare("second", lambda s, context: Noted(context.earlier), after=("few",), trials={})
    declare("third", lambda s, context: Noted(context.earlier), after=("second", "uniform", "few"), trials={})
    run_of = SimpleNamespace(train=Recipe(model="tiny_cnn", epochs=2, batch_size=64, warmup_steps=2))
    fresh = []
    def train(method, context):
        folder = tmp_path / method.name
        fresh.append((method.name, not folder.exists()))
        recipe, data, selector = method.parts(run_of, context)
        return fit(recipe, data, selector, folder=folder)
    last, *stages = trained("third", "images", Context(DATA), train)
    assert fresh == [("few", True), ("second", True), ("uniform", True), ("third", True)] and len(stages) == 3
    assert last.selector.earlier == {"second": 32, "uniform": 32, "few": 14}         # 1,047 and 250 examples, two epochs
    again, *_ = trained("second", "images", Context(DATA), train)
    assert fresh[4:] == [("few", False), ("second", False)] and again.steps_done == 32
    declare("lost", lambda s, context: Uniform(), after=("hold-out",), trials={})
    with pytest.raises(ValueError, match="lost needs 'hold-out', which nobody declares"): before("lost")


def test_an_outside_method_in_the_contract_check_and_in_the_profile(outside):
    said = run(outside, "-m", "pytest", "-p", "no:cacheprovider", "tests/test_selectors.py", "tests/test_profile.py", "-k", "toy", "-v")
    for test in ("test_contract[toy] PASSED", "test_every_method_and_a_step_as_always[toy] PASSED"): assert test in said


def test_an_outside_method_among_the_cards(outside, tmp_path):
    run(outside, "-m", "papermill", "nbs/methods.ipynb", tmp_path / "methods.ipynb", "--cwd", ROOT, "--no-progress-bar")
    shown = [o.data.get("text/html", "") for c in nbformat.read(tmp_path / "methods.ipynb", 4).cells for o in c.get("outputs", []) if "data" in o]
    assert re.search(r"<th>toy</th>\s*<td>A toy from outside the package.</td>\s*<td></td>\s*<td>toy_share = 0.5</td>", shown[-1])


def test_an_outside_method_in_run_compare(outside, tmp_path):
    "With its setting by -p, and the parameter cells of the project as they were."
    name = f"test-toy-{uuid.uuid4().hex[:8]}"
    given = dict(recipe="quick", name=name, methods="toy", toy_share=0.25, epochs=2, seeds=1, n_train=200, dev_size=40, warmup_steps=2, eval_every=6)
    flags = [v for pair in given.items() for v in ("-p", *pair)]
    try:
        run(outside, "-m", "papermill", "nbs/run_compare.ipynb", tmp_path / "run.ipynb", "--cwd", ROOT, "--no-progress-bar", *flags)
        folder = ROOT / "papermill_runs" / name
        assert list(json.loads((folder / "result.json").read_text())["methods"]) == ["uniform", "uniform-short", "rs2", "toy"]
        assert json.loads((folder / "recipe.json").read_text())["settings"]["toy_share"] == 0.25
    finally: shutil.rmtree(ROOT / "papermill_runs" / name, ignore_errors=True)
    run(outside, "-m", "datasel_wb.experiments", "--check")


def test_an_outside_module_that_cannot_be_loaded(outside, tmp_path):
    about = tmp_path / "broken-1.0.dist-info"
    about.mkdir()
    (about / "METADATA").write_text("Metadata-Version: 2.1\nName: broken\nVersion: 1.0\n")
    (about / "entry_points.txt").write_text("[datasel_wb.methods]\nbroken = no_such_module\n")
    env = outside | {"PYTHONPATH": os.pathsep.join([str(tmp_path), outside["PYTHONPATH"]])}
    said = run(env, "-c", "from datasel_wb.registry import declared\ntry: declared()\nexcept ImportError as e: print(e)")
    assert "entry point broken = no_such_module of datasel_wb.methods: cannot be loaded (No module named 'no_such_module')" in said
