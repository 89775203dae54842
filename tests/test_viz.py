"""Charts: valid Vega-Lite that renders, aggregation that agrees with pandas, and errors that name the field."""
import io
import json
import subprocess
import sys

import altair as alt
import numpy as np
import pandas as pd
import pytest
import torch
import vl_convert as vlc
from PIL import Image

from datasel_wb import chart_base, charts, language_charts, pictures, result_charts
from datasel_wb.examples import Examples

METHODS = ("uniform", "dds", "infobatch")


def make_metrics(methods=METHODS, seeds=3, steps=range(0, 500, 50), names=(("test", "top1"),), drop=()):
    "Random records in the columns of a run; `drop` lists (method, seed) pairs that are missing."
    rng, rows = np.random.default_rng(0), []
    for m in methods:
        for s in range(seeds):
            for split, name in names:
                if (m, s) in drop: continue
                rows += [dict(method=m, seed=s, step=t, epoch=t / 100, examples_seen=t * 8,
                              seconds=t * rng.uniform(1, 2), split=split, name=name, value=rng.uniform(0.1, 0.9))
                              for t in steps]
    return pd.DataFrame(rows)


WEIGHTS = (("train", "weight/clean"), ("train", "weight/noisy"), ("train", "auroc/score"), ("train", "saturated"),
           *(("train", f"weight/class/c{i}") for i in range(30)))


STATS = ("mean", "std", "min", "max", "q05", "q25", "q50", "q75", "q95")


def make_sigma(groups=("all", "clean", "noisy"), stats=STATS, which="inst", seeds=2, steps=range(0, 500, 50)):
    "Random data parameters of one method: sorted draws, so that quantiles are in order."
    rng, rows = np.random.default_rng(0), []
    for seed in range(seeds):
        for t in steps:
            for group in groups:
                draws = dict(zip(("min", "q05", "q25", "q50", "q75", "q95", "max"),
                                 np.sort(np.exp(rng.normal(size=7)))))
                draws |= {"mean": draws["q50"], "std": 1.0}
                rows += [dict(method="dp", seed=seed, step=t, epoch=t / 100, examples_seen=t * 8, seconds=float(t),
                              split="train", name=f"sigma/{which}/{group}/{s}", value=draws[s]) for s in stats]
    return pd.DataFrame(rows)


def make_examples(n=40, methods=("dds", "rs2"), seeds=2):
    "Random per-example records; every tenth margin is missing or infinite."
    rng, rows = np.random.default_rng(0), n * len(methods) * seeds
    table = pd.DataFrame({"method": np.repeat(methods, n * seeds),
                          "seed": np.tile(np.repeat(range(seeds), n), len(methods)),
                          "id": np.tile(range(n), len(methods) * seeds), "class": "c", "noisy": rng.random(rows) < 0.3,
                          "confidence": rng.random(rows), "confidence_spread": rng.random(rows) / 2,
                          "correct_mean": rng.random(rows), "margin": rng.normal(size=rows)})
    table.loc[::10, "margin"] = np.inf
    table.loc[5::20, "margin"] = np.nan
    return table


def make_results(n=15, cost=lambda k: 30.0 * 1.2**k):
    rng = np.random.default_rng(0)
    names = ["uniform", *(f"method number {k}" for k in range(1, n))]
    return pd.DataFrame({"method": names, "n": 3, "mean": 88 + rng.normal(size=n), "std": rng.uniform(0.1, 0.5, n),
                         "diff": 0.0, "diff_std": 0.1, "seconds": [cost(k) for k in range(n)], "pretrain_seconds": 0.0,
                         "examples": 256_000})


LANGUAGES = ("tur", "rus", "por", "ces", "aze", "bel", "glg", "slk", "ukr")


def make_languages(prefix="usage", languages=LANGUAGES, methods=("uniform", "tcs", "dds"), seeds=3,
                   steps=range(100, 600, 100)):
    "Random shares of languages, which sum to 1 at each step."
    rng = np.random.default_rng(0)
    return pd.DataFrame([dict(method=m, seed=s, step=t, split="train", name=f"{prefix}/{language}", value=v)
                         for m in methods for s in range(seeds)
                         for t in steps for language, v in zip(languages, rng.dirichlet(np.ones(len(languages))))])


def make_similarity(n=9):
    return pd.DataFrame(np.random.default_rng(0).uniform(size=(n, n)), LANGUAGES[:n], LANGUAGES[:n])


@pytest.fixture(scope="module")
def records():
    rng = np.random.default_rng(0)
    examples = pd.DataFrame({"method": "dds", "seed": 0, "id": range(500), "noisy": rng.random(500) < 0.3,
                             "score": rng.normal(size=500)})
    results = pd.DataFrame({"method": METHODS, "n": 3, "mean": [88.0, 91.2, 88.5], "std": [0.3, 0.2, np.nan],
                            "diff": [np.nan, 3.2, 0.5], "diff_std": [np.nan, 0.2, 0.4], "seconds": [12.3, 2345.6, 9.0],
                            "pretrain_seconds": [0, 100.0, 0], "examples": 256_000})
    images = rng.integers(0, 256, (60, 3, 8, 8), dtype=np.uint8)
    sweep = pd.DataFrame([dict(score=name, removed=r, seed=seed, accuracy=94 - k * r / 5000 + rng.normal())
                          for k, name in enumerate(("forgetting", "max_loss_increase", "random"))
                          for r in range(0, 30_000, 5000) for seed in range(3)])
    plan = pd.DataFrame({"epoch": range(20), "share": np.linspace(1, 0.2, 20)})
    return dict(metrics=make_metrics(names=(("test", "top1"), *WEIGHTS)), examples=examples, results=results,
                images=images, labels=np.arange(60) % 12, sigma=make_sigma(), sweep=sweep, plan=plan,
                languages=make_languages(), similarity=make_similarity())


CHARTS = {
    "curves, step": lambda r: charts.curves(r["metrics"]),
    "curves, seconds": lambda r: charts.curves(r["metrics"], x="seconds", start=200),
    "weights, noisy": lambda r: charts.weights_over_time(r["metrics"]),
    "weights, class": lambda r: charts.weights_over_time(r["metrics"], by="class"),
    "diagnostics": lambda r: charts.diagnostics(r["metrics"]),
    "histogram": lambda r: result_charts.score_histogram(r["examples"], "score"),
    "data map": lambda r: result_charts.data_map(make_examples(), "dds", seed=1),
    "data map, sampled": lambda r: result_charts.data_map(make_examples(3000), "rs2"),
    "scatter": lambda r: result_charts.score_scatter(make_examples(), "confidence", "margin", "dds"),
    "scatter, no noise known, sampled": lambda r: result_charts.score_scatter(make_examples(6000).drop(columns="noisy"),
                                                                              "confidence", "margin", "dds", seed=0),
    "data, noise": lambda r: pictures.data_picture(r["images"], r["labels"], list("abcdefghijkl"),
                                                   np.arange(60) % 5 == 0),
    "data, clean": lambda r: pictures.data_picture(r["images"], r["labels"], list("abcdefghijkl")),
    "comparison": lambda r: result_charts.comparison(r["results"]),
    "sigma, step": lambda r: charts.sigma(r["sigma"]),
    "sigma, epoch": lambda r: charts.sigma(
        r["sigma"][r["sigma"]["name"].str.contains("/all/")].drop(columns=["method", "seed"]), x="epoch"),
    "sigma, one step": lambda r: charts.sigma(r["sigma"].query("step == 0")),
    "removal": lambda r: result_charts.removal(r["sweep"], n_train=50_000),
    "removal, no baseline, one seed": lambda r: result_charts.removal(r["sweep"].query("seed == 0"), baseline=None),
    "schedule": lambda r: charts.schedule(r["plan"]),
    "schedule, methods": lambda r: charts.schedule(pd.concat([r["plan"].assign(method=m) for m in METHODS]),
                                                   budget=0.6),
    "cost": lambda r: result_charts.accuracy_against_cost(r["results"]),
    "cost, many": lambda r: result_charts.accuracy_against_cost(make_results()),
    "cost, all the same": lambda r: result_charts.accuracy_against_cost(make_results(), x="examples"),
    "languages": lambda r: language_charts.language_usage(r["languages"]),
    "languages, six methods": lambda r: language_charts.language_usage(
        make_languages(methods="abcdef", steps=range(0, 9000, 10), seeds=1)),
    "languages, one step": lambda r: language_charts.language_usage(make_languages(steps=[100], seeds=1), "tcs"),
    "languages, probabilities": lambda r: language_charts.language_usage(make_languages("p"), prefix="p", columns=2),
    "languages, lines": lambda r: language_charts.language_lines(make_languages("reward")
                                                                 .assign(value=lambda t: t["value"] - 0.1)),
    "languages, lines of eleven": lambda r: language_charts.language_lines(
        make_languages("margin", tuple("abcdefghijk")), "margin", columns=2),
    "similarity": lambda r: language_charts.similarity_map(r["similarity"], highlight="aze"),
    "similarity, gaps": lambda r: language_charts.similarity_map(make_similarity(2).where(np.eye(2) == 0), "overlap",
                                                                 "target", "source", domain=(0, 0.5), digits=1),
}


@pytest.fixture()
def fresh_altair():
    "Altair's registries as they were before the test."
    renderer, theme = alt.renderers.active, alt.theme.active
    yield
    alt.renderers.enable(renderer)
    alt.theme.enable(theme)


def rows_in(spec) -> int:
    return sum(len(rows) for rows in spec["datasets"].values())


@pytest.mark.parametrize("name", CHARTS)
def test_chart_is_valid_and_renders_live_and_as_png(name, records, fresh_altair):
    chart_base.enable()
    chart = CHARTS[name](records)
    spec = chart.to_dict(validate=True)
    assert rows_in(spec) <= chart_base.MAX_ROWS and spec["config"]["background"] == "transparent"
    data, metadata = chart._repr_mimebundle_()
    live = data["application/vnd.vegalite.v5+json"]
    json.dumps(live, allow_nan=False)
    # the nearest to JupyterLab's 5.6
    assert vlc.vegalite_to_svg(json.dumps(live), vl_version="5.8").startswith("<svg")
    assert metadata["image/png"]["alt"] and data["text/plain"] == f"<chart: {metadata['image/png']['alt']}>"
    shown = Image.open(io.BytesIO(__import__("base64").b64decode(data["image/png"]))).convert("RGBA")
    alpha = np.asarray(shown)[..., 3]
    assert alpha.min() == 0 and alpha.max() >= 250, (
        "transparent around opaque marks, but for the rounding of 256 colours")


def test_chart_colours_survive_transparency(tmp_path):
    chart = alt.Chart(pd.DataFrame({"x": [1]}), width=40, height=40).mark_rect(opacity=0.5, color="#D55E00").encode()
    pixel = np.asarray(Image.open(pictures.save_png(chart, tmp_path / "a.png", scale=1)))[20, 20].astype(int)
    assert abs(pixel - [0xD5, 0x5E, 0, 128]).max() <= 2


def test_stored_output_passes_nbformat(records, fresh_altair):
    import nbformat
    chart_base.enable()
    data, metadata = charts.curves(records["metrics"])._repr_mimebundle_()
    out = nbformat.v4.new_output("display_data", data=data, metadata=metadata)
    nbformat.validate(nbformat.v4.new_notebook(cells=[nbformat.v4.new_code_cell("", outputs=[out])]))


@pytest.mark.parametrize("x", chart_base.X_TITLES)
def test_aggregation_agrees_with_pandas(x):
    metrics = make_metrics(drop={("dds", 1)})
    ours = chart_base.over_seeds(metrics, x=x).set_index(["line", "step"])
    for (method, step), rows in metrics.groupby(["method", "step"]):
        row = ours.loc[(method, step)]
        assert np.allclose(row[["x", "mean", "low", "high"]].astype(float),
                           [rows[x].mean(), rows["value"].mean(), rows["value"].min(), rows["value"].max()])
        assert row["seeds"] == rows["seed"].nunique() == (2 if method == "dds" else 3)
    assert "2–3 seeds" in json.dumps(charts.curves(metrics, x=x).to_dict(), ensure_ascii=False)


@pytest.mark.parametrize("x", chart_base.X_TITLES)
def test_curves_show_mean_and_range_over_seeds(x):
    metrics = make_metrics(names=(("test", "top1"), ("dev", "top1"), ("test", "loss")))
    shown = all_rows(charts.curves(metrics, x=x, start=100)).set_index(["line", "step"]).sort_index()
    own = metrics.query("split == 'test' and name == 'top1' and step >= 100").groupby(["method", "step"]).agg(
        x=(x, "mean"), mean=("value", "mean"), low=("value", "min"), high=("value", "max")).sort_index()
    assert list(shown.index) == list(own.index) and np.allclose(shown[list(own)], own, rtol=1e-5)


def test_weights_of_clean_and_wrong_labels(records):
    chart = charts.weights_over_time(records["metrics"], method="infobatch")
    shown = all_rows(chart).dropna(subset=["line"]).set_index(["line", "step"]).sort_index()
    rows = records["metrics"].query("method == 'infobatch' and name in ['weight/clean', 'weight/noisy']")
    own = rows.assign(line=rows["name"].map({"weight/clean": "clean", "weight/noisy": "wrong label"})).groupby(
        ["line", "step"])["value"].agg(["mean", "min", "max"])
    assert list(shown.index) == list(own.index) and np.allclose(shown[["mean", "low", "high"]], own, rtol=1e-5)
    assert chart.to_dict()["layer"][0]["encoding"]["color"]["scale"] == {
        "domain": ["clean", "wrong label"], "range": [chart_base.BLUE, chart_base.VERMILLION]}


@pytest.mark.parametrize("called", ["auroc/score", "auroc/sigma/inst"])
def test_diagnostics_show_detection_and_saturation(records, called):
    metrics = records["metrics"].assign(name=records["metrics"]["name"].replace("auroc/score", called))
    shown = all_rows(charts.diagnostics(metrics)).dropna(subset=["line"]).set_index(["line", "step"])
    for label, name in (("AUROC, wrong labels", called), ("share of scores at clip", "saturated")):
        own = metrics[(metrics["method"] == "dds") & (metrics["name"] == name)].groupby("step")["value"].agg(
            ["mean", "min", "max"])
        assert np.allclose(shown.loc[label, ["mean", "low", "high"]], own, rtol=1e-5)


def test_diagnostics_show_plain_training_beside_a_method(records):
    "Mean margin and mean loss of uniform training, where the metrics have them; they are no opinion of a method."
    metrics = records["metrics"]
    some = metrics[(metrics["method"] == "dds") & (metrics["name"] == "auroc/score")]
    plain = [some.assign(method="uniform", name=f"auroc/{k}", value=v) for k, v in (("margin", 0.9), ("loss", 0.8))]
    shown = all_rows(charts.diagnostics(pd.concat([metrics, *plain]))).dropna(subset=["line"]).set_index("line")
    for label, value in (("plain training, mean margin", 0.9), ("plain training, mean loss", 0.8)):
        assert np.allclose(shown.loc[label, ["mean", "low", "high"]].astype(float), value)
    own = all_rows(charts.diagnostics(metrics)).dropna(subset=["line"]).set_index("line")
    label = "AUROC, wrong labels"
    assert np.allclose(shown.loc[label, "mean"].astype(float), own.loc[label, "mean"].astype(float))
    with pytest.raises(ValueError, match="neither auroc/score nor saturated"):
        charts.diagnostics(pd.concat(plain), "uniform")


def test_diagnostics_of_a_method_whose_score_is_a_margin(records):
    "DynaMS reports margins; their name is that of a record of plain training, which has a mean loss beside it."
    metrics = records["metrics"]
    some = metrics[(metrics["method"] == "dds") & (metrics["name"] == "auroc/score")]
    own = some.assign(method="dynams", name="auroc/margin")
    plain = [some.assign(method=m, name=f"auroc/{k}", value=v) for m in ("uniform", "uniform-short")
             for k, v in (("margin", 0.9), ("loss", 0.8))]
    alone, beside = (all_rows(charts.diagnostics(pd.concat([own, *more]), "dynams")).dropna(subset=["line"])
                     .set_index("line") for more in ([], plain))
    expected = some.groupby("step")["value"].agg(["mean", "min", "max"])
    for shown in (alone, beside):
        assert np.allclose(shown.loc["AUROC, wrong labels", ["mean", "low", "high"]].astype(float), expected)
    assert set(alone.index) == {"AUROC, wrong labels"} and set(beside.index) == {
        "AUROC, wrong labels", *charts.PLAIN_FINDS.values()}
    assert np.allclose(beside.loc["plain training, mean margin", "mean"].astype(float), 0.9)
    for method in ("uniform", "uniform-short"):                        # records of plain training are no opinion
        with pytest.raises(ValueError, match="neither auroc/score nor saturated"):
            charts.diagnostics(pd.concat(plain), method)


def test_histogram_counts_each_group_in_each_bin(records):
    examples, shown = records["examples"], all_rows(result_charts.score_histogram(records["examples"], "score", bins=7))
    edges = np.linspace(examples["score"].min(), examples["score"].max(), 8)
    for group, wrong in (("clean", False), ("wrong label", True)):
        bars = shown[shown["group"] == group]
        values = examples.loc[examples["noisy"] == wrong, "score"]
        assert np.allclose(bars["start"], edges[:-1]) and np.allclose(bars["end"], edges[1:])
        assert bars["count"].tolist() == [((values >= a) & ((values < b) | (k == 6))).sum()
                                          for k, (a, b) in enumerate(zip(edges, edges[1:]))]


def test_comparison_shows_the_table(records):
    shown = all_rows(result_charts.comparison(records["results"])).set_index("method")
    own = records["results"].set_index("method")
    assert np.allclose(shown["mean"], own["mean"]) and shown["label"].tolist() == ["88.0 ± 0.3", "91.2 ± 0.2", "88.5"]
    assert np.allclose(shown["high"] - shown["mean"], own["std"].fillna(0))
    assert np.allclose(shown["mean"] - shown["low"], own["std"].fillna(0))


def test_schedule_shows_the_share_of_each_epoch(records):
    shown = all_rows(charts.schedule(records["plan"]))
    steps = shown.dropna(subset=["share"]).sort_values("epoch").drop_duplicates("epoch")
    assert np.allclose(steps.set_index("epoch")["share"][:20], records["plan"]["share"], atol=1e-5)


def test_data_map_shows_the_statistics_of_each_example():
    examples = make_examples()
    chart = result_charts.data_map(examples, "dds", seed=1)
    shown = all_rows(chart).set_index("id").sort_index()
    own = examples.query("method == 'dds' and seed == 1").set_index("id")
    assert np.allclose(shown[["confidence_spread", "confidence", "correct_mean"]],
                       own[["confidence_spread", "confidence", "correct_mean"]], rtol=1e-4)
    encoding = chart.to_dict()["encoding"]
    assert [encoding[c]["field"] for c in ("x", "y", "color")] == ["confidence_spread", "confidence", "correct_mean"]
    assert chart_base.title_of(chart.to_dict()) == "data map of dds, seed 1. 40 examples, one seed"
    assert len(all_rows(result_charts.data_map(examples, "dds"))) == 80, "without a seed, a point per example and seed"


def test_a_large_scatter_is_a_sample_and_its_correlation_is_of_all_rows():
    from scipy.stats import kendalltau, spearmanr
    examples = make_examples(6000, seeds=1)
    examples["margin"] += 2 * examples["confidence"]
    own = examples.query("method == 'rs2'").replace([np.inf], np.nan).dropna(subset=["margin"])
    chart = result_charts.score_scatter(examples, "confidence", "margin", "rs2")
    title, shown = chart_base.title_of(chart.to_dict()), all_rows(chart).set_index("id")
    ranks = own[["confidence", "margin"]].rank().to_numpy()
    assert f"ρ = {np.corrcoef(ranks.T)[0, 1]:.2f}. " in title
    assert abs(np.corrcoef(ranks.T)[0, 1] - kendalltau(own["confidence"], own["margin"]).statistic) > 0.1
    assert f"{len(own):,} examples" in title and f"{6000 - len(own):,} without two finite" in title
    assert f"{chart_base.MAX_ROWS:,} of them drawn" in title
    assert len(shown) == chart_base.MAX_ROWS and shown.index.is_unique
    assert shown.equals(all_rows(result_charts.score_scatter(examples, "confidence", "margin", "rs2")).set_index("id"))
    own = own.set_index("id").loc[shown.index]
    assert np.allclose(shown[["confidence", "margin"]], own[["confidence", "margin"]], rtol=1e-4, atol=1e-8)
    assert (shown["group"] == own["noisy"].map({True: "wrong label", False: "clean"})).all()
    assert (spearmanr(shown["confidence"], shown["margin"])
            .statistic == pytest.approx(np.corrcoef(ranks.T)[0, 1], abs=0.05))


def test_scatter_of_a_constant_or_reversed_score():
    examples = make_examples(20, ("dds",), 1).assign(margin=lambda t: -t["confidence"] ** 3)
    assert "ρ = -1.00" in chart_base.title_of(result_charts.score_scatter(examples, "confidence", "margin").to_dict())
    assert "a score is constant" in chart_base.title_of(
        result_charts.score_scatter(examples.assign(margin=1), "confidence", "margin").to_dict())


def test_resumed_steps_count_once_and_missing_values_not_at_all():
    rows = make_metrics(methods=["dds"], seeds=1, steps=[0, 50])
    again = rows[rows["step"] == 50].assign(value=0.75)
    gone = rows[rows["step"] == 0].assign(step=100, value=np.nan)
    table = chart_base.over_seeds(pd.concat([rows, again, gone]))
    assert table["step"].tolist() == [0, 50] and table["mean"].iloc[-1] == 0.75


def test_long_runs_are_thinned_with_both_ends_kept():
    metrics = make_metrics(methods=[f"m{i}" for i in range(30)], seeds=1, steps=range(1000))
    spec = charts.curves(metrics).to_dict()
    steps = pd.DataFrame(next(iter(spec["datasets"].values()))).groupby("line")["step"].agg(["min", "max", "size"])
    assert rows_in(spec) <= chart_base.MAX_ROWS and (steps["min"] == 0).all() and (steps["max"] == 999).all()


def test_many_classes_show_those_farthest_from_uniform(records):
    spec = charts.weights_over_time(records["metrics"], by="class").to_dict()
    last = chart_base.over_seeds(records["metrics"].query("method == 'dds' and name.str.startswith('weight/class/')"),
                                 by="name").groupby("line")["mean"].last()
    shown = {r["line"] for rows in spec["datasets"].values() for r in rows if "line" in r}
    assert shown == {n.removeprefix("weight/class/") for n in (last - 1).abs().nlargest(12).index}
    assert "12 of 30 classes" in json.dumps(spec)


@pytest.mark.parametrize("noisy", [None, "bool", "missing", "object"])
def test_histogram_counts_add_up(records, noisy):
    examples = records["examples"].copy()
    if noisy is None: examples = examples.drop(columns="noisy")
    if noisy == "missing": examples["noisy"] = examples["noisy"].astype("boolean").where(examples["id"] > 100)
    if noisy == "object": examples["noisy"] = None
    examples.loc[:9, "score"] = np.nan
    counts = result_charts.score_histogram(examples, "score").data.groupby("group")["count"].sum()
    assert counts.sum() == 490
    if noisy == "bool": assert counts["wrong label"] == examples["noisy"][10:].sum()
    if noisy == "missing": assert counts["unknown"] == 91
    if noisy in (None, "object"): assert list(counts.index) == ["all examples"]


def test_image_grid_keeps_every_pixel():
    images = np.random.default_rng(0).integers(0, 256, (5, 3, 4, 4), dtype=np.uint8)
    grid = pictures.image_grid(images, columns=5, scale=3)
    sheet = np.asarray(Image.open(io.BytesIO(grid.png)))
    assert np.array_equal(sheet[6:6 + 24:6, 6:6 + 24:6, :3], images[0].transpose(1, 2, 0)) and sheet[0, 0, 3] == 0
    assert sheet.shape[:2] == (2 * grid.height, 2 * grid.width) and "5 images" in grid.alt


def test_image_grid_takes_tensors_and_stays_small():
    images = torch.randint(0, 256, (64, 3, 32, 32), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    assert len(pictures.image_grid(images, ["noise, the worst case"] * 64).png) < 200_000
    assert pictures.image_grid(images[:3, :1], ["a", "b\nc", "d" * 99]).height < 120


def test_ranked_images_shows_both_ends():
    tiles = torch.arange(20, dtype=torch.uint8).view(20, 1, 1, 1).expand(20, 1, 4, 4)
    train = Examples(tiles.clone(), torch.zeros(20, dtype=torch.int64), ("a", "b"))
    examples = pd.DataFrame({"method": ["a"] * 10 + ["b"] * 10, "id": range(20), "class": [f"c{i}" for i in range(20)],
                             "noisy": pd.Series([None, True, False, None] * 5, dtype=object),
                             "s": np.r_[np.linspace(-1, 1, 19), np.nan]})
    high, low = (pictures.ranked_images(train, examples, "s", lowest, n=3, method="b") for lowest in (False, True))
    assert high.alt.endswith("3 images: c18 1, c17, wrong 0.889, c16 0.778")
    assert "c10 0.111, c11 0.222, c12 0.333" in low.alt
    first = np.asarray(Image.open(io.BytesIO(high.png)))
    assert first[10, first.shape[1] // 6, 0] == 18
    with pytest.raises(ValueError, match="lacks 'score'"): pictures.ranked_images(train, examples, "score")
    with pytest.raises(ValueError, match="method = 'c'"): pictures.ranked_images(train, examples, "s", method="c")


def test_data_picture_counts_and_marks(records):
    wrong = np.arange(60) % 5 == 0
    tiles, bars = pictures.data_picture(records["images"], records["labels"], list("abcdefghijkl"), wrong,
                                        each=3).hconcat
    shown = records["labels"] < 10
    assert bars.data.groupby("kind")["count"].sum().to_dict() == {"clean": int((shown & ~wrong).sum()),
                                                                  "wrong label": int((shown & wrong).sum())}
    assert len(tiles.data) == 30 and (tiles.data["wrong"] == wrong[tiles.data["id"]]).all()


def all_rows(chart) -> pd.DataFrame:
    return pd.concat([pd.DataFrame(rows) for rows in chart.to_dict()["datasets"].values()], ignore_index=True)


def test_labels_apart_are_the_closest_feasible():
    from scipy.optimize import minimize
    rng = np.random.default_rng(0)
    for n in (1, 2, 5, 7):
        y = rng.uniform(0, 100, n)
        ours, order = chart_base._apart(y, 13, 0, 100), np.argsort(y)
        assert (np.diff(ours[order]) >= 13 - 1e-9).all() and ours.min() >= 0 and ours.max() <= 100 + 1e-9
        limits = [{"type": "ineq", "fun": lambda p, i=i: p[i + 1] - p[i] - 13} for i in range(n - 1)]
        best = minimize(lambda p: ((p - y[order]) ** 2).sum(), np.linspace(5, 95, n), bounds=[(0, 100)] * n,
                        constraints=limits)
        assert np.allclose(ours[order], best.x, atol=1e-2)


def test_sigma_shows_one_seed_as_logged(records):
    shown = all_rows(charts.sigma(records["sigma"], seed=1)).dropna(subset=["mean"])
    wide = records["sigma"].query("seed == 1").pivot(index="step", columns="name", values="value")
    logged = np.concatenate([wide[[f"sigma/inst/{group}/{s}" for s in STATS]].to_numpy()
                             for group in ("clean", "noisy")])
    assert len(shown) == 2 * 10
    assert np.allclose(np.sort(shown[list(STATS)].to_numpy(), axis=0), np.sort(logged, axis=0), rtol=1e-4)
    first = json.dumps(charts.sigma(records["sigma"]).to_dict())
    assert "dp, seed 0" in first and "seed 1" not in first


@pytest.mark.parametrize("groups, titles", [(("all",), ["all"]), (("all", "clean"), ["clean"]),
                                            (("all", "clean", "noisy"), ["clean", "wrong label"])])
def test_sigma_panels_and_bands_follow_what_was_logged(groups, titles):
    spec = charts.sigma(make_sigma(groups, stats=("mean", "min", "max"))).to_dict()
    assert [p["title"]["text"] for p in spec["hconcat"]] == titles
    assert [layer["mark"]["type"] for layer in spec["hconcat"][0]["layer"][:2]] == ["area", "line"]
    assert all(
        layer["encoding"]["y"]["scale"]["domain"] == spec["hconcat"][-1]["layer"][0]["encoding"]["y"]["scale"]["domain"]
        for p in spec["hconcat"] for layer in p["layer"][:2])


def test_sigma_of_classes():
    "As the method logs them, by either word."
    rows = make_sigma(which="cls")
    for word in ("class", "cls"): assert "one per class" in charts.sigma(rows, word).to_dict()["title"]["text"]
    assert charts.sigma(rows, "class").to_dict() == charts.sigma(rows, "cls").to_dict()


def test_ticks_of_a_log_axis():
    assert charts.log_ticks((0.3, 12)) == [0.5, 1, 2, 5, 10] and charts.log_ticks((0.9, 1.1)) is None
    assert charts.log_ticks((0.005, 20)) == [0.01, 0.1, 1, 10]
    assert charts.log_ticks((0.9e-9, 2)) == [1e-9, 1e-7, 1e-5, 1e-3, 0.1]
    for low, high in np.random.default_rng(0).uniform(0.01, 10, (500, 2)):
        ticks = charts.log_ticks((10 ** -low, 10 ** high))
        assert ticks is None or 2 <= len(ticks) <= 8 and ticks == sorted(set(ticks))


def test_sigma_leaves_out_what_a_log_axis_cannot_show_and_thins():
    rows = make_sigma(seeds=1, steps=range(2000))
    rows.loc[rows["name"].str.endswith("/min"), "value"] = 0.0
    shown = all_rows(charts.sigma(rows))
    assert shown["min"].isna().all() and len(shown) < 500 and {0, 1999} <= set(shown["x"])


def test_removal_agrees_with_pandas(records):
    shown = all_rows(result_charts.removal(records["sweep"], n_train=50_000)).dropna(subset=["line"]).set_index(
        ["line", "step"])
    own = records["sweep"].groupby(["score", "removed"])["accuracy"].agg(["mean", "std", "min", "max"]).loc[shown.index]
    assert len(shown) == 3 * 6 and np.allclose(shown[["mean", "std", "low", "high"]].astype(float), own, atol=1e-3)
    assert np.allclose(shown["share"], shown.index.get_level_values("step") / 50_000)


def test_schedule_says_what_the_mean_is(records):
    two = pd.concat([records["plan"].assign(method="a"), records["plan"].assign(method="b", share=0.5)])
    assert "mean 60%" in set(all_rows(charts.schedule(records["plan"]))["text"])
    assert set(all_rows(charts.schedule(two))["text"].dropna()) == {"a, mean 60%", "b, mean 50%"}
    assert set(all_rows(charts.schedule(two, budget=0.55))["text"].dropna()) == {"a", "b", "budget 55%"}
    assert all_rows(charts.schedule(records["plan"]))["epoch"].max() == 20


@pytest.mark.parametrize("cost, scale", [(lambda k: 30.0 * 1.2**k, "log"), (lambda k: 30.0 + k, "linear"),
                                         (lambda k: 30.0 * k, "linear")])
def test_cost_axis_and_values(cost, scale):
    table = make_results(cost=cost)
    chart = result_charts.accuracy_against_cost(table)
    axis = next(layer["encoding"]["x"]["scale"] for layer in chart.to_dict()["layer"]
                if "scale" in layer["encoding"].get("x", {}))
    assert axis["type"] == scale and (scale == "log" or axis["domain"][0] == 0)
    assert axis["domain"][1] > table["seconds"].max()
    shown = all_rows(chart).set_index("method")
    assert np.allclose(shown.loc[table["method"], ["x", "mean"]], table[["seconds", "mean"]], rtol=1e-4)
    assert np.allclose(shown["high"] - shown["low"], 2 * table.set_index("method")["std"], atol=1e-3)


def test_cost_without_spread_or_cost():
    table = make_results(4).assign(std=np.nan)
    table.loc[2, "seconds"] = np.nan
    chart = result_charts.accuracy_against_cost(table)
    assert len(all_rows(chart)) == 3 and "one run per method" in json.dumps(chart.to_dict())


def test_names_of_many_methods_do_not_cover_each_other():
    for seed in range(5):
        points = np.random.default_rng(seed).uniform([20, 20], [400, 280], (14, 2))
        widths = np.full(14, 70.0)
        x, y, side = result_charts._free_places(points, widths, np.full(14, 15.0), (480, 300)).T
        left = np.select([side > 0, side < 0], [x, x - widths], x - widths / 2)
        boxes = np.c_[left, y - 5, left + widths, y + 5]
        for i in range(14): assert result_charts._overlap(boxes[i], np.delete(boxes, i, 0)) == 0


def panels(chart) -> dict:
    "Rows of the first mark of each panel, by its title."
    spec = chart.to_dict()
    return {p["title"]["text"]: pd.DataFrame(spec["datasets"][p["layer"][0]["data"]["name"]]) for p in spec["concat"]}


def test_language_shares_agree_with_pandas_and_fill_the_panel():
    rows = make_languages()
    gone = rows["name"].eq("usage/slk") & rows["step"].eq(300) & rows["seed"].eq(1)   # an unnamed language has share 0
    rows.loc[rows["name"].eq("usage/rus") & rows["step"].eq(300) & rows["seed"].eq(1),
             "value"] += rows.loc[gone, "value"].to_numpy()
    own = rows.assign(value=rows["value"].where(~gone, 0)).groupby(["method", "name", "step"])["value"].mean()
    shown = panels(language_charts.language_usage(rows[~gone]))
    assert list(shown) == ["uniform", "tcs", "dds"]
    for method, table in shown.items():
        heights = (table["high"] - table["low"]).set_axis(pd.MultiIndex.from_frame(table[["line", "x"]]))
        for (name, step), value in own[method].items():
            assert np.isclose(heights[name.removeprefix("usage/"), step], value, atol=2e-4)
        assert np.allclose(heights.xs(0, level="x").loc[list(LANGUAGES)],
                           heights.xs(100, level="x").loc[list(LANGUAGES)]), (
            "the first share counts since step 0")
        for _, at in table.groupby("x"):
            at = at.set_index("line").loc[list(LANGUAGES)]   # the first language on top, no gap below it
            assert at["high"].iloc[0] == 1 and at["low"].iloc[-1] == 0
            assert np.allclose(at["low"][:-1], at["high"][1:], atol=2e-4)


def test_language_has_one_colour_in_all_charts_and_axes_are_shared():
    rows = pd.concat([make_languages(), make_languages("p"), make_languages("reward", LANGUAGES[3:])])
    charts = language_charts.language_usage(rows), language_charts.language_usage(
        rows, ["dds", "tcs"], prefix="p"), language_charts.language_lines(rows)
    looks = []
    for chart in charts:
        encodings = [layer["encoding"] for p in chart.to_dict()["concat"]
                     for layer in p["layer"] if "line" in json.dumps(layer.get("encoding", {}).get("color", {}))]
        for channel in "xy": assert len({json.dumps(e[channel]["scale"]) for e in encodings}) == 1
        scales = [e["color"]["scale"] for e in encodings]
        looks += [dict(zip(s["domain"], s["range"])) for s in scales]
    assert list(looks[0]) == list(LANGUAGES) and len(set(looks[0].values())) == 9
    assert list(looks[-1]) == list(LANGUAGES[3:])
    assert all(look[n] == looks[0][n] for look in looks for n in look)
    assert list(panels(charts[1])) == ["dds", "tcs"]


def test_language_lines_agree_with_pandas():
    rows = make_languages("reward", methods=["dds"]).assign(value=lambda t: t["value"] - 0.5)
    chart = language_charts.language_lines(rows)
    shown = all_rows(chart).dropna(subset=["line"]).set_index(["line", "x"]).sort_index()
    own = rows.assign(line=rows["name"].str.removeprefix("reward/")).groupby(["line", "step"])["value"].agg(
        ["mean", "min", "max"]).sort_index()
    assert np.allclose(shown[["mean", "low", "high"]], own, atol=1e-5)
    first = [language_charts.language_lines(r).to_dict()["concat"][0]["layer"][0]["mark"]["type"]
             for r in (rows, rows.assign(value=1.0))]
    assert first == ["rule", "area"], "a rule at 0 where something is below"


def test_similarity_keeps_the_order_and_its_numbers_are_readable():
    frame = make_similarity()[list(LANGUAGES[::-1])]
    spec = language_charts.similarity_map(frame, highlight="aze").to_dict()
    cells = all_rows(language_charts.similarity_map(frame)).set_index(["row", "column"])
    assert np.allclose(cells["value"].unstack().loc[frame.index, frame.columns], frame, atol=1e-4)
    assert [spec["layer"][0]["encoding"][c]["scale"]["domain"] for c in "yx"] == [list(frame.index),
                                                                                  list(frame.columns)]
    assert spec["layer"][-1]["mark"]["stroke"] == chart_base.VERMILLION
    assert [{"row": "aze"}] in spec["datasets"].values()
    png = chart_base.chart_png(language_charts.similarity_map(pd.DataFrame([[0.5]], ["a"], ["a"]), title="").to_dict(),
                               4, None)
    pixels = np.asarray(Image.open(io.BytesIO(png)).convert("RGB")).reshape(-1, 3)
    ends = np.array([[int(c[i:i + 2], 16) for i in (1, 3, 5)] for c in language_charts.MAP_COLOURS])
    assert (abs(pixels.astype(int) - ends.mean(0)).max(1) <= 2).sum() > 5000, (
        "the cell has the colour that the ink was chosen for")
    for value, ink in zip(np.linspace(0, 1, 101), language_charts._inks(np.linspace(0, 1, 101), (0, 1))):
        r = (ends[0] + value * (ends[1] - ends[0])) / 255
        level = np.where(r <= 0.03928, r / 12.92, ((r + 0.055) / 1.055) ** 2.4) @ [0.2126, 0.7152, 0.0722] + 0.05
        assert (1.05 / level if ink == "#FFFFFF" else level / 0.05) > 4.5


@pytest.mark.parametrize("metric, title", [(None, "top-1 accuracy, %"), ("bleu", "BLEU"), ("chrf", "chrF"),
                                           ("BLEU, detokenised", "BLEU, detokenised")])
def test_result_charts_name_their_metric(records, metric, title):
    table = records["results"].copy()
    if metric: table.attrs["metric"] = metric
    for chart in (result_charts.comparison(table), result_charts.accuracy_against_cost(table)):
        said = json.dumps(chart.to_dict())
        assert f'"title": "{title}"' in said and (("accuracy" in said) == (metric is None))


@pytest.mark.parametrize("name, title",
                         [("bleu", "BLEU"), ("loss", "loss, nats"), ("perplexity", "perplexity"), ("ter", "ter")])
def test_curves_name_their_quantity(name, title):
    spec = charts.curves(make_metrics(names=(("dev", name),)), name, split="dev").to_dict()
    assert all(layer["encoding"]["y"]["title"] == title for layer in spec["layer"])
    assert chart_base.title_of(spec).startswith(f"{title} (dev). ")


ERRORS = {
    "metrics lacks 'value'": lambda r: charts.curves(r["metrics"].drop(columns="value")),
    "metrics has no rows": lambda r: charts.curves(r["metrics"].iloc[:0]),
    "x = 'hours': must be one of step, seconds": lambda r: charts.curves(r["metrics"], x="hours"),
    "name = 'top5': metrics with split 'test' has top1": lambda r: charts.curves(r["metrics"], "top5"),
    "start = 9999: the last step is 450": lambda r: charts.curves(r["metrics"], start=9999),
    "value: not one finite number": lambda r: charts.curves(r["metrics"].assign(value=np.nan)),
    "by = 'label': must be one of noisy, class": lambda r: charts.weights_over_time(r["metrics"], by="label"),
    "method = 'rs2': metrics with split 'train' has uniform, dds, infobatch": lambda r: charts.weights_over_time(
        r["metrics"], method="rs2"),
    "by = 'class': metrics of 'dds' has no rows": lambda r: charts.weights_over_time(
        make_metrics(names=WEIGHTS[:2]), by="class"),
    "name: metrics of 'dds' has neither auroc/score nor saturated": lambda r: charts.diagnostics(
        make_metrics(names=WEIGHTS[:2])),
    "examples lacks 'margin'": lambda r: result_charts.score_histogram(r["examples"], "margin"),
    "method = 'rs2': examples has dds": lambda r: result_charts.score_histogram(r["examples"], "score", method="rs2"),
    "method = None: examples has dds, rs2; name one": lambda r: result_charts.score_histogram(
        pd.concat([r["examples"], r["examples"].assign(method="rs2")]), "score"),
    "examples lacks 'confidence_spread', 'correct_mean'": lambda r: result_charts.data_map(
        make_examples().drop(columns=["confidence_spread", "correct_mean"])),
    "method = None: examples has dds, rs2; name": lambda r: result_charts.data_map(make_examples()),
    "seed = 5: examples with method 'dds' has 0, 1": lambda r: result_charts.score_scatter(
        make_examples(), "confidence", "margin", "dds", seed=5),
    "y = 'margin': must be another": lambda r: result_charts.score_scatter(make_examples(), "margin", "margin", "dds"),
    "score = 'margin': not one finite number": lambda r: result_charts.score_scatter(
        make_examples().assign(margin=np.inf), "confidence", "margin", "dds"),
    "confidence and margin: no row has finite": lambda r: result_charts.score_scatter(
        make_examples(2).assign(margin=[1, np.nan] * 4, confidence=[np.nan, 1] * 4), "confidence", "margin", "dds"),
    "images: must be uint8": lambda r: pictures.image_grid(r["images"] / 255),
    "images: there is none": lambda r: pictures.image_grid(r["images"][:0]),
    "captions: 1 for 60 images": lambda r: pictures.image_grid(r["images"], ["one"]),
    "labels: 3 for 60 images": lambda r: pictures.data_picture(r["images"], [0, 1, 2], "abc"),
    "labels: no example of the classes": lambda r: pictures.data_picture(r["images"], r["labels"] + 50, list("abc")),
    "results lacks 'std'": lambda r: result_charts.comparison(r["results"].drop(columns="std")),
    "x = 'seconds': must be one of step, epoch": lambda r: charts.sigma(r["sigma"], x="seconds"),
    "which = 'cls': metrics has sigma of inst": lambda r: charts.sigma(r["sigma"], "class"),
    "which = 'inst': metrics has no sigma/…, but weight/clean": lambda r: charts.sigma(r["metrics"]),
    "split = 'train': metrics has test": lambda r: charts.sigma(r["metrics"].query("split == 'test'")),
    "seed = 7: metrics has 0, 1": lambda r: charts.sigma(r["sigma"], seed=7),
    "method: metrics has sigma of dp, dq": lambda r: charts.sigma(
        pd.concat([r["sigma"], r["sigma"].assign(method="dq")])),
    "group = 'all': sigma/inst has odd": lambda r: charts.sigma(make_sigma(["odd"])),
    "sigma/inst lacks 'mean'": lambda r: charts.sigma(make_sigma(stats=["min", "max"])),
    "sigma/inst: no mean is a positive number": lambda r: charts.sigma(r["sigma"].assign(value=-1.0)),
    "frame lacks 'score', 'removed'": lambda r: result_charts.removal(r["plan"].assign(seed=0, accuracy=1.0)),
    "score = 'chance': frame has forgetting, max_loss_increase, random": lambda r: result_charts.removal(
        r["sweep"], baseline="chance"),
    "n_train = 100: frame removes up to 25000": lambda r: result_charts.removal(r["sweep"], n_train=100),
    "frame lacks 'share'": lambda r: charts.schedule(r["plan"].drop(columns="share")),
    "frame has no rows": lambda r: charts.schedule(r["plan"].iloc[:0]),
    "share = 60.0: must be between 0 and 1": lambda r: charts.schedule(r["plan"].assign(share=60.0)),
    "budget = 60: must be above 0 and at most 1": lambda r: charts.schedule(r["plan"], budget=60),
    "x = 'step': must be one of seconds, examples": lambda r: result_charts.accuracy_against_cost(
        r["results"], x="step"),
    "table lacks 'n'": lambda r: result_charts.accuracy_against_cost(r["results"].drop(columns="n")),
    "prefix = 'usage': metrics with split 'train' has no usage/<language>, but weight/clean":
        lambda r: language_charts.language_usage(r["metrics"]),
    "prefix = 'reward': metrics with split 'train' has no reward/<language>, but usage/tur":
        lambda r: language_charts.language_lines(r["languages"]),
    "split = 'dev': metrics has train": lambda r: language_charts.language_usage(r["languages"], split="dev"),
    "method = 'rs2': metrics of usage/<language> has uniform, tcs, dds": lambda r: language_charts.language_usage(
        r["languages"], ["dds", "rs2"]),
    "metrics lacks 'seed'": lambda r: language_charts.language_lines(r["languages"].drop(columns="seed")),
    "prefix = 'usage': 1, 1, 1, 1, 1, 1, 1, 1, 1 at step 100 of dds are no shares":
        lambda r: language_charts.language_usage(r["languages"].assign(value=1.0)),
    "frame: there is no language": lambda r: language_charts.similarity_map(pd.DataFrame()),
    "frame: its rows are tur, its columns rus; must be the same": lambda r: language_charts.similarity_map(
        pd.DataFrame([[1.0]], ["tur"], ["rus"])),
    "frame: -0.5: must be between 0 and 1": lambda r: language_charts.similarity_map(
        pd.DataFrame([[-0.5]], ["tur"], ["tur"])),
    "highlight = 'eng': must be one of tur, rus": lambda r: language_charts.similarity_map(
        r["similarity"], highlight="eng"),
    "seconds: no method has both a mean and a cost": lambda r: result_charts.accuracy_against_cost(
        r["results"].assign(seconds=np.nan)),
}


@pytest.mark.parametrize("message", ERRORS)
def test_wrong_input_is_one_clear_sentence(message, records):
    with pytest.raises(ValueError, match="^" + __import__("re").escape(message)):
        ERRORS[message](records)


def test_import_changes_nothing():
    code = ("import altair as alt; a = alt.renderers.active, alt.theme.active; import datasel_wb.viz; "
            "assert a == (alt.renderers.active, alt.theme.active)")
    subprocess.run([sys.executable, "-c", code], check=True)
