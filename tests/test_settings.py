"""Settings: old names, values of a run, what gives way in a short training, what a notebook's namespace says."""
import json
import subprocess
import sys
import warnings
from dataclasses import replace

import pytest

from datasel_wb import recipes, runs
from datasel_wb.datasets import DataRecipe
from datasel_wb.loop import LoopRecipe, Recipe
from datasel_wb.scorer import DDSRecipe
from datasel_wb.selectors import DynaMSRecipe
from datasel_wb.settings import Known, takes_old_names

PARTS = dict(data=DataRecipe, train=Recipe, dds=DDSRecipe)
ROOMS = ("review", "explorer", "recipes", "runs", "watch", "cards")
TRANSLATION = ("datasel_wb.translation", "datasel_wb.corpus", "datasel_wb.sources", "datasel_wb.mixtures",
               "datasel_wb.language_recipes", "sentencepiece", "sacrebleu", "num2words")


def resolve(namespace=None, /, **given):
    return runs.resolve(given if namespace is None else namespace, recipes.DDS_RECIPES, "cifar10-wrn28-10", **PARTS)


# --- no room of images imports one of translation

def test_no_room_of_images_imports_translation():
    "Counted in a process of its own; the second part shows that the count can fail."
    code = (f"import sys, datasel_wb.{', datasel_wb.'.join(ROOMS)}; "
            f"there = [m for m in {TRANSLATION} if m in sys.modules]; print(there)")
    code += ("; import datasel_wb.language_recipes; datasel_wb.corpus.number_words(7, 'az'); "
             f"print(len([m for m in {TRANSLATION} if m in sys.modules]))")
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=300)
    assert done.stdout.split("\n")[:2] == ["[]", str(len(TRANSLATION))], done.stdout + done.stderr[-2000:]


# --- the kind of a run

def test_the_kind_is_written_and_read(tmp_path):
    run = runs.open_run(resolve(name="mine"), root=tmp_path)
    run.close()
    about = json.loads((run.folder / "recipe.json").read_text())
    assert about["kind"] == "images" == runs.read_recipe(run.folder)["kind"]
    del about["kind"]
    (run.folder / "recipe.json").write_text(json.dumps(about))                 # of an older version
    assert runs.read_recipe(run.folder)["kind"] == "images"
    about["settings"]["corpus"] = "numbers"
    (run.folder / "recipe.json").write_text(json.dumps(about))
    assert runs.read_recipe(run.folder)["kind"] == "translation"
    (run.folder / "recipe.json").write_text(json.dumps(about | {"kind": "sounds"}))
    with pytest.raises(ValueError, match="kind = 'sounds': must be one of images, translation"):
        runs.read_recipe(run.folder)


def test_a_column_does_not_make_the_kind(tmp_path):
    "A run of images whose settings happen to have a corpus stays one of images."
    run = runs.open_run(resolve(name="mine"), root=tmp_path)
    run.close()
    about = json.loads((run.folder / "recipe.json").read_text())
    about["settings"]["corpus"] = "numbers"
    (run.folder / "recipe.json").write_text(json.dumps(about))
    assert runs.read_recipe(run.folder)["kind"] == "images"


# --- old names

def test_old_names_of_settings():
    for cls in (LoopRecipe, Recipe):
        with pytest.warns(DeprecationWarning, match="grad_bound is now clip_norm"):
            assert cls(grad_bound=0.5).clip_norm == 0.5
    with pytest.raises(ValueError, match="grad_bound = 0.5: is the old name of clip_norm, which is given too"):
        replace(Recipe(), grad_bound=0.5)
    with pytest.raises(TypeError, match="grad_bount"): Recipe(grad_bount=0.5)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert Recipe(clip_norm=0.5).clip_norm == 0.5


def test_old_names_in_parameters_and_in_old_runs(tmp_path):
    with pytest.warns(DeprecationWarning, match="grad_bound is now clip_norm"):
        assert resolve(grad_bound=0.5).train.clip_norm == 0.5
    cells = ["clip_norm: float = None", "# Parameters\ngrad_bound = 0.25"]
    with pytest.warns(DeprecationWarning):
        assert resolve(dict(In=cells, clip_norm=None, grad_bound=0.25)).train.clip_norm == 0.25
    with pytest.raises(ValueError, match="words: no such parameter"): resolve(words=5)    # of translation
    run = runs.open_run(resolve(name="mine", clip_norm=0.5), root=tmp_path)
    run.close()
    text = (run.folder / "recipe.json").read_text()
    (run.folder / "recipe.json").write_text(text.replace('"clip_norm"', '"grad_bound"'))
    with pytest.warns(DeprecationWarning): assert runs.read_recipe(run.folder)["settings"]["clip_norm"] == 0.5
    with pytest.warns(DeprecationWarning): runs.open_run(resolve(name="mine", clip_norm=0.5), root=tmp_path).close()


def test_old_names_of_functions():
    @takes_old_names(words="max_tokens")
    def batches(first, max_tokens=10): return first + max_tokens
    with pytest.warns(DeprecationWarning) as said: assert batches(1, words=5) == 6
    assert said[0].filename == __file__                                          # the line that used the old name
    assert batches(1) == 11 and batches(1, 2) == 3


# --- short runs

@pytest.mark.parametrize("given, there", [
    (dict(steps=3), dict(warmup_steps=0, log_every=1, eval_every=1, save_every=1)),
    (dict(steps=3), dict(scorer_steps=3, scorer_warmup_steps=0)),
    (dict(steps=3, scorer_steps=8), dict(scorer_steps=8, scorer_warmup_steps=2)),
    (dict(steps=40), dict(warmup_steps=10, log_every=8, eval_every=20, save_every=20)),
    (dict(steps=400), dict(warmup_steps=30, log_every=20, eval_every=100, save_every=200)),
    (dict(steps=4000), dict(scorer_steps=150, warmup_steps=30, log_every=20, eval_every=100, save_every=200)),
    (dict(steps=3, eval_every=7, log_every=9, save_every=11), dict(eval_every=7, log_every=9, save_every=11)),
    (dict(epochs=1), dict(warmup_steps=2, log_every=1, eval_every=4)),            # 1,047 examples, 8 batches of 128
    (dict(epochs=20), dict(warmup_steps=30, log_every=20, eval_every=80)),
    (dict(scorer_steps=8), dict(scorer_warmup_steps=2, warmup_steps=30)),
    (dict(), dict(warmup_steps=30, scorer_warmup_steps=20, log_every=20, eval_every=100, save_every=200)),
])
def test_what_nobody_set_gives_way(given, there):
    settings = resolve(recipe="quick", **given)
    values = vars(settings.train) | vars(settings.dds)
    assert {k: values[k] for k in there} == there


def test_a_recipe_in_epochs_gives_way_by_its_share():
    def short(**given):
        return runs.resolve(given | {"recipe": "quick"}, recipes.DYNAMS_RECIPES, "", data=DataRecipe, train=Recipe,
                            dynams=DynaMSRecipe)
    whole, part = short(), short(epochs=5)
    assert (whole.train.epochs, whole.train.warmup_steps, whole.dynams.dynams_warmup, whole.dynams.dynams_every) == (
        20, 20, 4, 4)
    assert (part.train.epochs, part.train.warmup_steps, part.dynams.dynams_warmup, part.dynams.dynams_every) == (
        5, 5, 1, 1)
    assert short(epochs=5, dynams_warmup=3).dynams.dynams_warmup == 3


@pytest.mark.parametrize("given, message", [
    (dict(steps=3, warmup_steps=3), "warmup_steps = 3: must be below steps = 3"),
    (dict(steps=3, warmup_steps=30), "warmup_steps = 30: must be below steps = 3"),
    (dict(steps=3, eval_every=0), "eval_every = 0: must be above 0"),
    (dict(steps="3"), "steps = '3': must be of type int"),
])
def test_what_was_set_and_does_not_fit_is_refused(given, message):
    with pytest.raises(ValueError, match=message): resolve(recipe="quick", **given)


# --- what a namespace says

CELLS = ["import os", "recipe: str = 'auto'\nsteps: int = None", "# Parameters\nsteps = 50\n",
         "count = 5\nfor k in range(3): pass"]


def test_a_stray_global_of_a_notebook_is_no_parameter():
    namespace = dict(In=CELLS, Out={}, recipe="auto", steps=50, count=5, k=2, limits=(1, 2), note="mine")
    assert resolve(namespace).train.steps == 50
    with pytest.raises(ValueError, match="count: no such parameter"):
        resolve({k: v for k, v in namespace.items() if k not in ("In", "Out")})


@pytest.mark.parametrize("cell, name", [("# Parameters\nbatchsize = 64", "batchsize"),
                                        ("steps = 9\nbatchsize: int = 64", "batchsize"),
                                        ("steps, batchsize = 9, 64", "batchsize")])
def test_a_misspelt_name_in_a_parameter_cell_is_refused(cell, name):
    with pytest.raises(ValueError, match="batchsize: no such parameter; did you mean 'batch_size'"):
        resolve({"In": [*CELLS, cell], "recipe": "auto", "steps": 50, name: 64, "count": 5})


def test_without_a_parameter_cell_everything_plain_is_a_parameter():
    "As a shell that keeps no cells has it; nothing misspelt is ever ignored."
    with pytest.raises(ValueError, match="batchsize: no such parameter"):
        resolve({"In": ["", "%matplotlib inline"], "batchsize": 64})


@pytest.mark.parametrize("text, value", [("true", True), ("True", True), ("false", False), ("FALSE", False)])
def test_truth_values_of_a_command_line(text, value):
    assert resolve(flip=text).data.flip is value
    assert Known((bool,), "any", None).read(text) is value and Known((str,), "any", None).read(text) == text


def test_what_is_no_truth_value():
    for wrong in ("yes", 1, "t"):
        with pytest.raises(ValueError, match="must be of type bool"): resolve(flip=wrong)


# --- paths

def test_paths_are_stored_absolute(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "numbers").mkdir()
    (tmp_path / "mnist").mkdir()
    def stored(**given):
        run = runs.open_run(resolve(recipe="quick", **given), root=tmp_path / "runs")
        run.close()
        return runs.read_recipe(run.folder)["settings"]
    there = stored(dataset="./pictures", data_dir="data", decisions="d.csv", checkpoint_dir="kept",
                   scorer_checkpoint="a/b")
    for name, path in dict(dataset="pictures", data_dir="data", decisions="d.csv", checkpoint_dir="kept",
                           scorer_checkpoint="a/b").items():
        assert there[name] == f"{tmp_path}/{path}"
    assert stored(dataset="numbers")["dataset"] == f"{tmp_path}/numbers"           # a folder
    assert stored(dataset="mnist")["dataset"] == "mnist"                            # a data set, whatever lies here
    assert stored(checkpoint_dir="gs://bucket/run")["checkpoint_dir"] == "gs://bucket/run"
    assert stored()["data_dir"] is None
    assert runs.absolute({"corpus": "numbers"}, runs.kind_of_run("translation")) == {"corpus": "numbers"}
    assert runs.absolute({"corpus": "./ted"}, runs.kind_of_run("translation")) == {"corpus": f"{tmp_path}/ted"}


def test_a_run_of_an_older_version_with_relative_paths_goes_on(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    def opened():
        return runs.open_run(resolve(name="mine", recipe="quick", dataset="./pictures"), root=tmp_path / "runs")
    run = opened()
    run.close()
    path = run.folder / "recipe.json"
    now = path.read_text()
    path.write_text(now.replace(f'"{tmp_path}/pictures"', '"./pictures"'))
    assert path.read_text() != now
    opened().close()
    path.write_text(now)
    monkeypatch.chdir(tmp_path / "runs")                                        # the same word, another folder
    with pytest.raises(ValueError, match="that folder holds another run; dataset"): opened()
