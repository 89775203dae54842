"""What the package costs, what it needs, and which names it has: in processes and in an environment of their own."""
import importlib
import os
import shutil
import subprocess
import sys
import venv
import warnings
from importlib.metadata import distribution, version
from pathlib import Path

import pytest
from packaging.requirements import Requirement

import datasel_wb
from datasel_wb import names

try: import tomllib
except ImportError: import tomli as tomllib   # Python 3.10

ROOT = Path(__file__).resolve().parents[1]
HEAVY = {"torchvision", "sklearn", "scipy", "pandas", "pyarrow", "PIL", "tqdm", "fsspec", "tensorboard", "altair",
         "sacrebleu", "sentencepiece", "num2words", "psutil", "filelock", "fastcore", "IPython", "ipywidgets",
         "matplotlib"}
LIGHT = ("from datasel_wb.weighting import DataParameters", "from datasel_wb import DDS, InfoBatch, Task",
         "import datasel_wb.core, datasel_wb.examples, datasel_wb.images, datasel_wb.corruption, datasel_wb.models",
         "import datasel_wb.sparse_optimizer, datasel_wb.scores, datasel_wb.dynamics, datasel_wb.contract",
         "from datasel_wb.datasets import DataRecipe; from datasel_wb.loop import Recipe",
         "import datasel_wb.report, datasel_wb.backends, datasel_wb.checkpoints, datasel_wb.corpus",
         "import datasel_wb.profile, datasel_wb.mixtures")

OLD = {   # room -> names that it exported before the rooms were divided
    "core":
        "ALIGN RULES Batch per_example_loss evaluating align seeded Collectives start_momentum setting check_settings "
        "check check_ids suggest",
    "data":
        "OPS IMAGE_FILES NOISE ACTIONS DECISIONS STATS IMAGENET_STATS DATASETS Split Examples pick_pixels flip_crop "
        "warp randaugment cutout Augment ahead check_batch fetch feed Loader eval_batches list_tree read_image "
        "crop_window load_image load_images FolderExamples flip_labels swap_images thin_classes noise_pixels "
        "permute_pixels changed_labels apply_changes read_decisions apply_decisions pixel_stats load_digits_splits "
        "DataRecipe load_tree Splits load_data make_augment",
    "dynamics":
        "SUMS LAST ROWS SCORES forgetting_events first_learned presentations_to_learn unforgettable max_loss_increase "
        "el2n last_layer_grad_norm grand History Dynamics merge_scores rank read_stats_dict noise_auroc",
    "explorer":
        "TILE ACROSS NONE PREDICTED TIPS LOCKED sheet Cards aligned AsDataset attempt Opened Chosen TrainAgain Picker "
        "Explorer",
    "models":
        "MODELS Net conv_bn Pool small_cnn resnet18 resnet18_imagenet resnet50 PreactBlock wrn28 Residual tiny_resnet "
        "small_resnet classifier features_and_logits Slim make_model",
    "nmt":
        "NUMBERS STEMS RELATED CORPORA PAD BOS EOS UNK Corpus Parallel join_pairs pick n_candidates share_targets "
        "number_words draw_numbers read_lines read_pair find_places find_pair CorpusRecipe choose_languages "
        "load_corpus train_pieces Pairs bucket_lengths encode PairLoader batch_sizes LSTM Seq2Seq sentence_loss "
        "beam_search translate translation_scores paired_bootstrap NMTRecipe Text prepare_text Translation "
        "corpus_loss ngrams similarity LanguageSampler masked_log_softmax gumbel Languages target_conditioned TCS "
        "LanguageScorer Sketch LanguageDDS imitate",
    "recipes":
        "DDS_RECIPES DATA_PARAMETERS_RECIPES FORGETTING_RECIPES DYNAMS_RECIPES AT_THE_END ON_SCORES ON_UNIFORM "
        "METHODS COMPARE_RECIPES NMT_RECIPES NMT_METHODS RemovalRecipe CompareRecipe order_of scores_of recipe_for "
        "check_methods train_method detection LanguageRecipe train_translation check_languages",
    "review":
        "EXAMPLE PLAIN EMBEDDINGS example_run read_settings settings_of data_of same_data check_files Records Files "
        "Held as_pictures pictures_of trainings_of find_runs read_training add_pictures ask_model Decisions "
        "edited_name seed_of retrain Retraining final before_and_after",
    "runs":
        "RESULTS RunRecipe resolve project_root commit Run open_run begin record results finish read_results table "
        "plus_minus show_results results_text wants_run_folder papermill_main",
    "scorer": "Scorer log_probabilities DDS DDSSettings DDSRecipe",
    "selectors":
        "SHAPES Task Seen Selector Uniform digits_trial check_selector removed_ids Prune RS2 infobatch_sample "
        "InfoBatch margin_to_boundary margin_schedule DynaMS DynaMSRecipe",
    "sparse_optimizer": "SparseSGD",
    "tpu_trainer":
        "PARTS CHIPS FLOAT32 ProcessGroup GlobalBatchNorm Torchrun AffineBatchNorm LoopLSTM import_xla Mesh XLA "
        "step_flops Chips projected_hours",
    "trainer":
        "PLACE BACKENDS QUANTILES LoopRecipe Recipe Eager step_where make_backend EMA evaluate write_atomic Store "
        "snapshot Checkpoints groups spread MetricLog write_frame Training Live progress_bar Preemption fit "
        "checkpoint_folder examples_table saved_model",
    "viz":
        "BLUE VERMILLION GREY COLOURS WIDTH HEIGHT MAX_ROWS X_TITLES Y_TITLES HEALTH SIGMA_X SIGMA_BANDS SIGMA_LABELS "
        "SIGMA_GROUPS GROUPS LANGUAGE_COLOURS LANGUAGE_TITLES MAP_COLOURS CELL ROW RING COSTS COST_SIZE theme "
        "method_colours mimebundle enable LiveChart over_seeds curves weights_over_time diagnostics sigma "
        "score_histogram data_map score_scatter removal schedule language_colours language_usage language_lines "
        "similarity_map Picture image_grid ranked_images data_picture comparison accuracy_against_cost save_png",
    "watch": "SILENT RESULTS SPLITS LOOKS State read_rows alive look curve_points LiveView",
    "weighting":
        "Sigma DataParameters DataParametersRecipe normalised self_paced SPCL BatchWeight Mentor MentorNet",
    "widgets": "PALETTE palette Scatter Histogram",
}


def packages(statement: str, python=sys.executable) -> set:
    "Top-level modules in a fresh process after a statement."
    code = f"{statement}\nimport sys; print(*sys.modules)"
    run = subprocess.run([python, "-c", code], capture_output=True, text=True, cwd=ROOT)
    assert not run.returncode, run.stderr
    return {name.split(".")[0] for name in run.stdout.split()}


@pytest.fixture(scope="module")
def torch_alone(): return packages("import numpy, torch")


@pytest.mark.parametrize("statement", LIGHT)
def test_what_the_methods_need_is_torch_numpy_and_the_standard_library(statement, torch_alone):
    more = packages(statement) - torch_alone - sys.stdlib_module_names - {"datasel_wb"}
    assert not {m for m in more if not m.startswith("_")}, f"{statement}: imports {sorted(more)}"


def test_heavy_packages_are_seen_where_they_are_imported(torch_alone):
    assert {"altair", "pandas", "PIL"} <= (packages("import datasel_wb.chart_base") - torch_alone) & HEAVY


@pytest.mark.parametrize("statement", ["import datasel_wb.recipes", "from datasel_wb.trainer import fit"])
def test_settings_are_there_before_anything_slow(statement, torch_alone):
    assert not (packages(statement) - torch_alone) & (HEAVY - {"tqdm"})


# Extras

def project() -> dict: return tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]


def test_extras_are_those_of_the_project():
    assert set(names.EXTRAS) == set(project()["optional-dependencies"])
    assert {Requirement(r).name for r in project()["dependencies"]} == {"torch", "numpy"}


def test_what_is_tested_is_pinned():
    pinned = {line.split("==")[0] for line in (ROOT / "constraints.txt").read_text().splitlines()}
    wanted = [Requirement(r).name for rs in project()["optional-dependencies"].values() for r in rs]
    unpinned = {n.lower().replace("_", "-") for n in wanted} - {p.lower().replace("_", "-") for p in pinned}
    assert unpinned <= {"datasel-wb", "gcsfs"}


def test_unknown_extra_is_one_sentence():
    known = "images, text, workbench, hf, lightning, docs, dev, tpu"
    with pytest.raises(ValueError, match=rf"^extra = 'imagse': must be one of {known}$"):
        with names.extra("imagse"): pass


def test_missing_package_is_one_sentence_and_other_errors_pass():
    sentence = r"^no_such_package is not installed; it comes with: pip install 'datasel_wb\[images\]'$"
    with pytest.raises(ImportError, match=sentence):
        with names.extra("workbench"):
            with names.extra("images"): import no_such_package  # noqa: F401
    with pytest.raises(ImportError, match="cannot import name 'no_such_name'"):
        with names.extra("images"): from math import no_such_name  # noqa: F401


def test_the_reference_shows_annotations_of_late_imports_without_quotes(monkeypatch):
    monkeypatch.syspath_prepend(ROOT / "docs")
    api, scores, report = (importlib.import_module(m) for m in ("api", "datasel_wb.scores", "datasel_wb.report"))
    assert api.call(scores.merge_scores) == "(frames: list, scores: tuple | None=None) -> pd.DataFrame"
    assert api.call(report.Live.__init__, True).startswith("(report: Report, ")
    assert api.call(scores.grand).endswith(" -> Tensor")


# The plain installation

def closure(requirements: list) -> dict:
    "Installed distributions by name that requirements without extras ask for, and what these ask for."
    found, todo = {}, list(requirements)
    while todo:
        r = Requirement(todo.pop())
        if r.marker and not r.marker.evaluate({"extra": ""}): continue
        dist = distribution(r.name)
        if dist.metadata["Name"] in found: continue
        found[dist.metadata["Name"]] = dist
        todo += dist.requires or ()
    return found


def link(dist, site: Path) -> None:
    "Bring the files of an installed distribution into another environment, as links."
    for file in dist.files:
        if file.parts[0] == ".." or "__pycache__" in file.parts: continue
        if (site / file).is_symlink(): continue   # several distributions of a namespace
        (site / file).parent.mkdir(parents=True, exist_ok=True)
        (site / file).symlink_to(dist.locate_file(file).resolve())


def build_wheel(folder: Path) -> Path:
    "The project's wheel, from a copy of its files, without a network."
    assert int(version("setuptools").split(".")[0]) >= 77, "needs setuptools 77 or newer, which the extra dev brings"
    for name in ("pyproject.toml", "README.md", "LICENSE"): shutil.copy(ROOT / name, folder)
    shutil.copytree(ROOT / "datasel_wb", folder / "datasel_wb", ignore=shutil.ignore_patterns("__pycache__"))
    pip = [sys.executable, "-m", "pip", "--disable-pip-version-check", "wheel", "--quiet"]
    alone = ["--no-index", "--no-deps", "--no-build-isolation"]
    run = subprocess.run([*pip, *alone, "-w", folder / "wheels", folder], capture_output=True, text=True)
    assert not run.returncode, run.stdout + run.stderr
    return next((folder / "wheels").glob("*.whl"))


@pytest.fixture(scope="module")
def plain(tmp_path_factory):
    "A Python of an environment with nothing but the plain installation."
    home, source = tmp_path_factory.mktemp("plain"), tmp_path_factory.mktemp("source")
    venv.create(home)
    python = home / "bin" / "python"
    site = next(home.glob("lib/python*/site-packages"))
    found = closure(project()["dependencies"])
    for dist in found.values(): link(dist, site)
    env = {k: v for k, v in os.environ.items() if k != "PYTHONPATH"}
    pip = [sys.executable, "-m", "pip", "--disable-pip-version-check", "--python", python]
    wheel = build_wheel(source)
    for command in (["install", "--quiet", "--no-index", wheel], ["check"]):   # what it requires has to be there
        run = subprocess.run([*pip, *command], capture_output=True, text=True, env=env)
        assert not run.returncode, run.stdout + run.stderr
    assert not {"torchvision", "pandas", "scikit-learn", "scipy", "pillow", "tqdm"} & set(found)
    return python


def said(python, code: str) -> subprocess.CompletedProcess:
    "A program in that environment, which sees neither this one nor the working tree."
    return subprocess.run([python, "-I", "-c", code], capture_output=True, text=True, cwd=python.parent)


TRAIN = """
import torch
from torch import nn
from torch.utils.data import DataLoader, Subset, TensorDataset
from datasel_wb import Batch, DataParameters, InfoBatch, Sigma, Task, Uniform
import datasel_wb
assert "site-packages" in datasel_wb.__file__

torch.manual_seed(0)
centres = 3 * torch.randn(4, 8)
y = torch.randint(4, (400,))
x = centres[y] + torch.randn(400, 8)
data = TensorDataset(x, y, torch.arange(400))

def train(method, epochs=6):
    torch.manual_seed(1)
    model = nn.Sequential(nn.Linear(8, 16), nn.ReLU(), nn.Linear(16, 4))
    opt, seen = torch.optim.SGD(model.parameters(), lr=0.05), 0
    sel = method.bind(Task(model, n=400, n_classes=4, steps=epochs * 10, epochs=epochs))
    for e in range(epochs):
        visit = sel.epoch(e)
        for b in DataLoader(data if visit is None else Subset(data, visit), 40, shuffle=True):
            b = Batch(*b)
            sel.loss(model(b.x), b).backward()
            opt.step(); opt.zero_grad()
            sel.after_step(b)
            seen += len(b.y)
    return (model(x).argmax(1) == y).float().mean().item(), seen, sel

right, seen, _ = train(Uniform())
assert right > 0.9 and seen == 2400, (right, seen)
right, seen, _ = train(InfoBatch())
assert right > 0.9 and seen < 2400, (right, seen)
right, seen, sel = train(DataParameters(inst=Sigma(lr=1.0)))
assert right > 0.9 and sel.report()["sigma/inst"].std() > 0, right
"""


def test_plain_installation_trains_with_three_methods(plain):
    run = said(plain, TRAIN)
    assert not run.returncode, run.stderr


@pytest.mark.parametrize("package, extra, code", [
    ("tqdm", "workbench", "import datasel_wb.trainer"),
    ("tqdm", "workbench", "from datasel_wb import fit"),
    ("altair", "workbench", "import datasel_wb.charts"),
    ("altair", "workbench", "from datasel_wb import Explorer"),
    ("tqdm", "workbench", "import datasel_wb.recipes"),
    ("sentencepiece", "text", "import datasel_wb.translation"),
    ("torchvision", "images", "from datasel_wb.models import resnet18; resnet18()"),
    ("torchvision", "images", "import torch, datasel_wb; datasel_wb.FolderExamples([b'0'], torch.zeros(1), ['a'], 8)"),
    ("PIL", "images", "from datasel_wb.images import read_image; read_image('a.png')"),
    ("sklearn", "workbench", "from datasel_wb import DataRecipe, load_data; load_data(DataRecipe())"),
    ("pandas", "workbench", "from datasel_wb.corruption import read_decisions; read_decisions('a.csv')"),
    ("accelerate", "hf", "from datasel_wb import SelectionTrainer"),
    ("lightning", "lightning", "from datasel_wb import Selection"),
    ("num2words", "text", "from datasel_wb.corpus import number_words; number_words(3, 'en')"),
])
def test_a_missing_extra_is_one_sentence_with_the_command(plain, package, extra, code):
    run = said(plain, code)
    assert run.returncode == 1
    sentence = f"ImportError: {package} is not installed; it comes with: pip install 'datasel_wb[{extra}]'"
    assert run.stderr.splitlines()[-1] == sentence
    assert "During handling" not in run.stderr and "direct cause" not in run.stderr


# Names of the package, and names that moved

@pytest.mark.parametrize("name", names.ROOM_OF)
def test_a_public_name_is_the_documented_object(name):
    room = importlib.import_module(f"datasel_wb.{names.ROOM_OF[name]}")
    thing = getattr(datasel_wb, name)
    assert thing is getattr(room, name) and name in room.__all__ and thing.__doc__
    assert thing.__module__ == room.__name__


def test_the_package_lists_its_names():
    assert {*names.ROOM_OF, "__version__"} <= set(dir(datasel_wb))
    with pytest.raises(AttributeError, match="^module 'datasel_wb' has no attribute 'DSS'$"): datasel_wb.DSS
    with pytest.raises(ImportError, match="cannot import name 'DSS'"): from datasel_wb import DSS  # noqa: F401


def homes() -> dict:
    "Rooms that export a name, by name."
    found = {}
    for room in sorted(file.stem for file in (ROOT / "datasel_wb").glob("[a-z]*.py")):
        for name in importlib.import_module(f"datasel_wb.{room}").__all__: found.setdefault(name, set()).add(room)
    return found


def test_every_name_of_the_version_before_is_where_it_was():
    now, warned = homes(), 0
    for room, name in ((room, name) for room, found in OLD.items() for name in found.split()):
        module, new = importlib.import_module(f"datasel_wb.{room}"), names.RENAMED.get(name, name)
        with warnings.catch_warnings(record=True) as seen:
            warnings.simplefilter("always")
            thing = getattr(module, name)
        rooms = now[new]
        assert any(thing is getattr(importlib.import_module(f"datasel_wb.{r}"), new) for r in rooms), (room, name)
        if room in rooms or name in vars(module): continue      # it stayed, or the room itself imports it
        new_names = [f"datasel_wb.{room}.{name} is now datasel_wb.{r}.{new};" for r in rooms]
        assert len(seen) == 1 and seen[0].category is DeprecationWarning, (room, name)
        assert any(str(seen[0].message).startswith(n) for n in new_names), str(seen[0].message)
        warned += 1
    assert warned > 100


def test_a_name_that_never_was_has_no_old_place():
    with pytest.raises(AttributeError, match="^module 'datasel_wb.viz' has no attribute 'kurves'$"):
        importlib.import_module("datasel_wb.viz").kurves
