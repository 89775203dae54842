"""Accounting and run folders."""
import json
import math

import pandas as pd
import pytest

from datasel_wb import experiments, recipes, runs
from datasel_wb.datasets import DataRecipe, load_data
from datasel_wb.scorer import DDSRecipe, Scorer
from datasel_wb.loop import Recipe
from datasel_wb.trainer import fit


def row(method, seed, accuracy, pre=0.0):
    return dict(method=method, seed=seed, accuracy=accuracy, seconds=100.0 + pre, pretrain_seconds=pre,
                examples=256_000)


ROWS = ([row("uniform", s, a) for s, a in enumerate((88.0, 87.0, 89.0))]
        + [row("dds", s, a, 50.0) for s, a in enumerate((91.0, 91.4, 91.2))])


def test_differences_are_paired_by_seed():
    table = runs.results(ROWS[::-1]).set_index("method")          # in whatever order the rows come
    assert table.loc["dds", "n"] == 3 and abs(table.loc["dds", "diff"] - (3.0 + 4.4 + 2.2) / 3) < 1e-9
    assert abs(table.loc["dds", "diff_std"] - pd.Series([3.0, 4.4, 2.2]).std()) < 1e-9
    assert table.loc["dds", "seconds"] == 150 and table.loc["dds", "pretrain_seconds"] == 50
    assert pd.isna(table.loc["uniform", "diff"])


def test_table_for_readers():
    shown = runs.show_results(runs.results(ROWS))
    assert shown.loc["dds"].tolist() == ["91.2 ± 0.2", "+3.2 ± 1.1", "150", "50.0", "256,000", 3]
    assert shown.loc["uniform", "paired difference"] == "–"
    lines = runs.results_text(runs.results(ROWS)).splitlines()
    assert len(lines) == 3 and len({len(line) for line in lines}) == 1


def test_what_plain_training_finds_stands_in_the_column_of_the_methods():
    found = {"uniform": {"auroc": 0.95, "auroc_loss": 0.9412}, "dds": {"auroc": 0.912}}
    shown = runs.show_results(runs.results([r | found[r["method"]] for r in ROWS]))
    assert shown["noise AUROC"].to_dict() == {"uniform": "margin 0.950, loss 0.941", "dds": "0.912"}
    older = [r | {"auroc": math.nan if r["method"] == "uniform" else 0.9} for r in ROWS]
    assert runs.show_results(runs.results(older))["noise AUROC"].to_dict() == {"uniform": "–", "dds": "0.900"}


def test_accuracy_and_bleu_stay_apart(tmp_path):
    "Each table is headed by what it compares; a table over runs of both kinds says which row is what."
    bleu = [{("bleu" if k == "accuracy" else k): v for k, v in r.items()} | {"chrf": 50.0} for r in ROWS]
    for name, rows in (("images", ROWS), ("text", bleu)):
        columns = {m: g.drop(columns="method").to_dict("list")
                   for m, g in pd.DataFrame(rows).groupby("method", sort=False)}
        (tmp_path / name).mkdir()
        (tmp_path / name / "result.json").write_text(json.dumps({"methods": columns}))
    text = runs.read_results(tmp_path / "text").set_index("method")
    assert text["mean"].equals(runs.read_results(tmp_path / "images").set_index("method")["mean"])
    assert text.chrf.eq(50).all()
    assert runs.show_results(runs.read_results(tmp_path / "text")).columns[0] == "BLEU"
    assert runs.show_results(runs.read_results(tmp_path / "images")).columns[0] == "accuracy, %"
    both = runs.table(tmp_path)
    assert dict(zip(both.run, both.metric)) == {"images": "accuracy, %", "text": "BLEU"}
    shown = runs.show_results(both)
    assert shown.columns[0] == "accuracy, % or BLEU" and shown.chrF.tolist() == ["–", "–", "50.0", "50.0"]


def test_a_run_written_and_read_back(tmp_path):
    settings = runs.resolve({"recipe": "quick", "steps": 20, "warmup_steps": 2, "eval_every": 10, "n_train": 200},
                            recipes.DDS_RECIPES, "cifar10-wrn28-10", data=DataRecipe, train=Recipe, dds=DDSRecipe)
    data, run, records = load_data(settings.data), runs.open_run(settings, "dds-", tmp_path), []
    for seed in (0, 1):
        for method in ("uniform", "dds"):
            selector = (settings.dds.selector(Scorer.like(settings.train.build(data.train, 5)))
                        if method == "dds" else None)
            records.append(runs.record(method,
                                       fit(settings.train, data, selector, seed, run.folder / f"{method}-{seed}")))
    table = runs.finish(run, records)
    uniform, dds = (table.set_index("method").loc[m] for m in ("uniform", "dds"))
    # 20 steps of 128; DDS also sends 128 through the scorer, 128 dev examples and 128 alignments each step
    assert uniform["examples"] == 20 * 128 and dds["examples"] == 4 * 20 * 128 and uniform.seconds < dds.seconds
    pd.testing.assert_frame_equal(table, runs.read_results(run.folder))
    assert runs.table(tmp_path)[["run", "method", "n"]].values.tolist() == [[run.folder.name, "uniform", 2],
                                                                            [run.folder.name, "dds", 2]]
    examples = pd.read_parquet(run.folder / "examples.parquet")
    assert len(examples) == 4 * 200 and examples.query("method == 'dds'").score.notna().all()
    metrics = pd.read_parquet(run.folder / "metrics.parquet")
    assert {"step", "epoch", "examples_seen", "seconds", "split", "name", "value", "method",
            "seed"} <= set(metrics.columns)
    recipe = json.loads((run.folder / "recipe.json").read_text())
    assert recipe["settings"]["steps"] == 20 and recipe["versions"]["torch"]
    assert (run.folder / "dds-0" / "tb").is_dir()


def test_where_a_run_is_kept_may_change(tmp_path):
    "The folder of a named run goes on with other checkpoints; not with another training."
    def opened(**given):
        settings = runs.resolve({"recipe": "quick", "name": "mine"} | given, recipes.DDS_RECIPES, "cifar10-wrn28-10",
                                data=DataRecipe, train=Recipe, dds=DDSRecipe)
        runs.open_run(settings, root=tmp_path).close()
    opened()
    opened(keep=5, save_every=7, checkpoint_dir="memory://elsewhere", device="cpu")
    with pytest.raises(ValueError, match="another run; log_every = 9 here, 20 there"): opened(log_every=9)


def test_a_named_run_of_the_version_before_goes_on(tmp_path):
    "Its recipe.json lacks settings that came later; they were as their default, or as that version did."
    def opened(notebook, lacking=(), **given):
        settings = experiments.settings(notebook, {"recipe": "quick", "name": notebook} | given)
        runs.open_run(settings, root=tmp_path).close()
        path = tmp_path / notebook / "recipe.json"
        recipe = json.loads(path.read_text())
        assert set(lacking) <= recipe["settings"].keys()
        recipe["settings"] = {k: v for k, v in recipe["settings"].items() if k not in lacking}
        path.write_text(json.dumps(recipe))
    opened("run_dds", ("fill", "randaugment_style", "scorer_weights", "scorer_trains", "reward"))
    for wrong, text in ((dict(fill=128), "another run; fill = 128 here, 0 there$"),
                        (dict(scorer_trains="all"), "another run; scorer_trains = 'all' here, 'head' there$"),
                        (dict(reward="reverse"), "another run; reward = 'reverse' here, 'forward' there$")):
        with pytest.raises(ValueError, match=text): opened("run_dds", **wrong)
    opened("run_dds")
    opened("run_compare", ("batchweight_norm", "scorer_trains"), batchweight_norm="running")
    with pytest.raises(ValueError, match="another run; batchweight_norm = 'batch' here, 'running' there$"):
        opened("run_compare")
    opened("run_compare", batchweight_norm="running")


@pytest.mark.parametrize("name", ["../x", "/abs", ".", "..", "", "a/b", ".hidden"])
def test_a_name_cannot_leave_the_folder_of_runs(name):
    with pytest.raises(ValueError, match="must be a plain folder name"): runs.RunRecipe(name=name)


def test_reading_what_is_no_finished_run(tmp_path):
    with pytest.raises(ValueError, match="no result.json"): runs.read_results(tmp_path)
    assert runs.table(tmp_path).empty


@pytest.mark.parametrize("name", recipes.DDS_RECIPES)
def test_every_recipe_is_valid(name):
    runs.resolve({"recipe": name, "data_dir": None}, recipes.DDS_RECIPES, "cifar10-wrn28-10", data=DataRecipe,
                 train=Recipe, dds=DDSRecipe)


def test_the_published_recipe_says_what_the_paper_and_its_command_line_say():
    r = runs.resolve({"steps": 150_000}, recipes.DDS_RECIPES, "cifar10-wrn28-10", data=DataRecipe, train=Recipe,
                     dds=DDSRecipe)
    assert (r.train.model, r.train.batch_size, r.train.warmup_steps, r.train.lr_at(2499)) == (
        "wrn28-10", 1024, 2500, 0.4)
    assert (r.train.bn_momentum, r.train.bn_eps, r.train.ema_decay, r.train.dropout) == (0.01, 1e-3, 0.9999, 0.1)
    assert (r.data.dev_size, r.data.dev_from, r.data.randaugment, r.data.cutout, r.data.noise) == (
        5000, "first", 17, 16, 0.0)
    assert (r.dds.scorer_clip, r.dds.scorer_lr, r.dds.scorer_steps, r.dds.scorer_sees) == (0.5, 1e-6, 100_000, "x")
    assert (r.train.activation, r.train.ema_start, r.train.decay_on, r.train.conv_bias) == (
        "leaky_relu", "zero", "no_norm", False)
    assert (r.dds.scorer_augment, r.dds.scorer_weights, r.dds.variant) == ("plain", "raw", "paper")


def test_a_folder_that_cannot_be_written_is_refused(tmp_path):
    settings = runs.resolve({"recipe": "quick", "name": "mine"}, recipes.DDS_RECIPES, "cifar10-wrn28-10",
                            data=DataRecipe, train=Recipe, dds=DDSRecipe)
    (tmp_path / "file").write_text("")
    with pytest.raises(ValueError, match=r"name = 'mine': .*file/mine cannot be written \(Not a directory\)"):
        runs.open_run(settings, root=tmp_path / "file")


def test_what_says_only_where_a_run_is_kept_names_no_other_folder(tmp_path):
    "Without a name: the same folder with other checkpoints kept, another one with another learning rate."
    def folder(**given):
        run = runs.open_run(runs.resolve({"recipe": "quick"} | given, recipes.DDS_RECIPES, "cifar10-wrn28-10",
                                         data=DataRecipe, train=Recipe, dds=DDSRecipe), root=tmp_path)
        run.close()
        return run.folder
    assert folder() == folder(keep=5, save_every=7, device="cpu") != folder(lr=0.3)
