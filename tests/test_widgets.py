"""The linked views without a page: what they hold, say and refuse."""
import numpy as np
import pytest
import traitlets

from datasel_wb.widgets import Histogram, Scatter, _bars, palette

X = np.array([0.0, 1.0, 2.0, np.nan, 4.0, 5.0])
Y = np.array([0.0, 1.0, np.inf, 3.0, 4.0, 5.0])


def points(scatter: Scatter) -> list:
    "Positions of the rows that are to be seen on the page."
    widget = scatter._plot.widget
    return (np.arange(len(widget.points)) if widget.filter is None else widget.filter).tolist()


def test_rows_without_a_finite_value_are_counted_and_not_drawn():
    scatter = Scatter(X, Y)
    assert points(scatter) == [0, 1, 4, 5] and scatter.message == "2 rows have no finite value and are not drawn."
    scatter.show(y=np.arange(6))
    assert points(scatter) == [0, 1, 2, 4, 5] and scatter.message == "1 row has no finite value and is not drawn."
    scatter.show(x=np.arange(6))
    assert points(scatter) == list(range(6)) and scatter.message == ""


@pytest.mark.parametrize("values, message", [([], "There are no rows."),
                                             ([np.nan] * 3, "No row has a finite value, so there is nothing to draw.")])
def test_nothing_to_draw_is_a_sentence(values, message):
    scatter, histogram = Scatter(values, values), Histogram(values)
    assert scatter.message == histogram.message == message
    assert not {"JupyterScatter", "LiveChart"} & {type(c).__name__ for v in (scatter, histogram) for c in v.children}
    scatter.select([])
    scatter.show(mask=np.ones(len(values), bool))
    assert len(scatter.selected) == 0


def test_what_comes_back_is_drawn_again():
    scatter, histogram = Scatter(X, X), Histogram(X)
    scatter.show(mask=np.zeros(6, bool))
    histogram.show(mask=np.zeros(6, bool))
    assert scatter.message == histogram.message == "The filter leaves no row."
    scatter.show(mask=np.ones(6, bool))
    histogram.show(mask=np.ones(6, bool))
    assert scatter._plot.widget in scatter.children and histogram._chart in histogram.children


def test_places_keep_their_precision():
    far = 1e9 + np.arange(1000) * 1e-3   # in float32 all of them would be one number
    x, y = Scatter(far, -far)._plot.widget.points[:, :2].astype(np.float32).T
    assert len(np.unique(x)) == len(np.unique(y)) == 1000 and (np.diff(x) > 0).all() and (np.diff(y) < 0).all()


def test_a_constant_score_has_a_place():
    places = Scatter([7.0] * 3, [0.0, 1.0, 2.0])._plot.widget.points[:, :2]
    assert np.allclose(places[:, 0], 0) and np.allclose(places[:, 1], np.array([-1, 0, 1]) / 1.04)


def test_a_filter_leaves_places_and_view_as_they_were():
    scatter = Scatter(np.arange(6), np.arange(6))
    before, domain = scatter._plot.widget.points.copy(), list(scatter._plot.widget.x_scale_domain)
    scatter.show(mask=np.arange(6) > 3)
    assert points(scatter) == [4, 5]
    assert np.array_equal(scatter._plot.widget.points, before) and scatter._plot.widget.x_scale_domain == domain


def test_selection_from_python_and_from_the_page():
    scatter, seen = Scatter(X, Y), []
    scatter.observe(lambda change: seen.append(change["new"].tolist()), "selected")
    scatter.select([5, 1, 1])
    assert scatter.selected.dtype == np.int64 and scatter.selected.tolist() == [1, 5]
    assert scatter._plot.widget.selection.tolist() == [1, 5]
    scatter._plot.widget.selection = np.array([4, 0], np.uint32)   # as the page sends it
    assert scatter.selected.tolist() == [0, 4]
    scatter._plot.widget.selection = np.array([], np.uint32)
    assert seen == [[1, 5], [0, 4], []]


def test_a_mask_takes_rows_out_of_the_selection_and_new_scores_do_not():
    scatter = Scatter(X, X)
    scatter.select([0, 1, 4])
    scatter.show(y=Y[::-1])
    assert scatter.selected.tolist() == [0, 1, 4]
    scatter.show(mask=np.arange(6) != 1)
    assert scatter.selected.tolist() == [0, 4] and scatter._plot.widget.selection.tolist() == [0, 4]


def test_more_rows_than_the_limit_are_sampled_and_selected_by_their_own_positions():
    scatter = Scatter(np.arange(1000), np.arange(1000), limit=100)
    assert len(scatter._plot.widget.points) == 100 and scatter.message == "A sample of 100 of 1,000 rows is drawn."
    scatter._plot.widget.selection = np.array([0, 99], np.uint32)
    assert scatter.selected.tolist() == [0, 999]
    scatter.select([0, 1, 999])
    assert scatter.selected.tolist() == [0, 1, 999] and scatter._plot.widget.selection.tolist() == [0, 99]


def test_a_category_keeps_its_colour():
    scatter = Scatter(X, X, colour=list("abcabc"))
    codes = scatter._plot.widget.points[:, 2].tolist()
    shown = [scatter._plot.widget.color[int(c)] for c in codes]
    scatter.show(mask=np.arange(6) > 1, colour=list("cabcab"))
    again = [scatter._plot.widget.color[int(c)] for c in scatter._plot.widget.points[:, 2]]
    assert again == shown[2:] + shown[:2] and len({tuple(c) for c in shown}) == 3


@pytest.mark.parametrize("call, message", [
    (lambda: Scatter([1, 2], [1]), r"y: has shape \(1,\), must be 2 values, one per row"),
    (lambda: Scatter([1, 2], [1, 2]).show(mask=[True]), r"mask: has shape \(1,\), must be 2 values"),
    (lambda: Scatter([1, 2], [1, 2], tooltip={"id": [1]}), r"tooltip 'id': has shape \(1,\), must be 2 values"),
    (lambda: Scatter([1, 2], [1, 2]).select([2]), r"positions: from 2 to 2, must be from 0 to 1"),
    (lambda: Histogram([1, 2]).show(highlight=[-1]), r"positions: from -1 to -1, must be from 0 to 1"),
    (lambda: Histogram([1, 2], groups=["a"]), r"groups: has shape \(1,\), must be 2 values"),
])
def test_what_does_not_fit_is_refused_in_a_sentence(call, message):
    with pytest.raises((ValueError, traitlets.TraitError), match=message): call()


def test_bars_count_every_row_once():
    rng = np.random.default_rng(0)
    values, groups = rng.normal(size=500), rng.choice(["a", "b"], 500)
    edges = np.linspace(-5, 5, 21)
    bars = _bars(values, groups, palette(groups), edges, 1.0)
    for name in "ab":
        counts = {b["low"]: b["top"] - b["base"] for b in bars if b["group"] == name}
        wanted = {low: ((groups == name) & (values >= low) & (values < high)).sum()
                  for low, high in zip(edges, edges[1:])}
        assert counts == {low: n for low, n in wanted.items() if n}
    assert max(b["top"] for b in bars) == max(((values >= a) & (values < b)).sum() for a, b in zip(edges, edges[1:]))


def test_histogram_highlights_filters_and_forgets_the_brush_with_other_values():
    histogram = Histogram(np.arange(6.0), groups=list("aabbbb"), bins=6)
    histogram.interval = (1, 3)
    chart = histogram._chart
    rows = lambda opacity: sum(b["top"] - b["base"] for b in chart.rows if b["opacity"] == opacity)
    assert rows(1.0) == 6
    histogram.show(highlight=[0, 5])
    assert rows(1.0) == 2 and rows(0.3) == 6
    histogram.show(mask=np.arange(6) > 0)
    assert rows(1.0) == 1 and rows(0.3) == 5 and histogram.interval == (1, 3) and histogram._chart is chart
    histogram.show(values=X, highlight=[])
    assert rows(1.0) == 4 and histogram.interval is None
    assert histogram.message == "1 row has no finite value and is not drawn."


def test_the_script_of_the_scatter_is_the_one_that_waits():
    "Another release of jupyter-scatter may write this place otherwise."
    assert Scatter(X, Y)._plot.widget._esm.count("inTurn(createScatterplot(initialOptions))") == 1
