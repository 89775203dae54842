"""The linked views in a real JupyterLab: what the mouse does on the page is what Python gets."""
import numpy as np
import pytest
from browser import lab, notebook, voila
from PIL import Image
from waits import slowness

pytestmark = pytest.mark.browser

SCATTER, HISTOGRAM = ".datasel-scatter canvas", ".datasel-histogram canvas"
IMPORTS = "import time\nimport numpy as np\nfrom datasel_wb.widgets import Histogram, Scatter"
THREE = """# three clusters of 40: left, middle, right; and their numbers drawn in a histogram
rng = np.random.default_rng(0)
x, y = np.repeat([0.0, 5.0, 10.0], 40) + rng.random(120), rng.random(120)
group = np.repeat(["left", "middle", "right"], 40)
s = Scatter(x, y, colour=group)"""
MANY = """rng = np.random.default_rng(0)
x, y = rng.random({n}), rng.random({n})
s, times = Scatter(x, y, colour=np.arange({n}) % 10), []
s.observe(lambda change: times.append(time.time()), "selected")
polygons = []
def seen(change): polygons.extend([change["new"]] if len(change["new"]) > 2 else [])
s._plot.widget.observe(seen, "lasso_selection_polygon")"""
INSIDE = """from matplotlib.path import Path   # another computation, in float64
polygon = np.asarray(polygons.pop(), float)
inside = Path(polygon).contains_points(np.column_stack([s._now["x"], s._now["y"]]))
expected = np.flatnonzero(s._now["mask"] & inside)"""
MIDDLE = [(0.4, 0.005), (0.65, 0.005), (0.65, 0.995), (0.4, 0.995)]   # around the second cluster


def pixels(page, name: str, selector=SCATTER) -> np.ndarray:
    "What a view looks like when the mouse is away and nothing moves any more."
    page.page.mouse.move(5, 5)
    page.page.wait_for_timeout(700)
    now, before = _shot(page, name, selector), None
    for _ in range(5):
        if before is not None and np.array_equal(now, before): break
        page.page.wait_for_timeout(400)
        now, before = _shot(page, name, selector), now
    return now


def _shot(page, name: str, selector: str) -> np.ndarray:
    return np.asarray(Image.open(page.screenshot(name, selector)).convert("RGB"), float)


@pytest.fixture(scope="module")
def three(tmp_path_factory):
    folder = tmp_path_factory.mktemp("three")
    with lab(notebook(folder / "three.ipynb", IMPORTS, THREE, "s", "h = Histogram(x, groups=group); h"),
             folder) as page:
        page.run_all()
        page.page.wait_for_selector(HISTOGRAM)
        yield page
        assert page.errors == [] and page.blocked == []


def test_lasso_gives_the_points_inside(three):
    three.lasso(SCATTER, MIDDLE)
    three.until("s.selected.tolist()", list(range(40, 80)))


def test_box_gives_the_points_inside_and_a_double_click_clears(three):
    three.do("s._plot.lasso(type='rectangle')")
    three.drag(SCATTER, (0.7, 0.005), (0.995, 0.995))
    three.until("s.selected.tolist()", list(range(80, 120)))
    three.page.mouse.dblclick(*three.at(SCATTER, (0.3, 0.5)))
    three.until("s.selected.tolist()", [])
    three.do("s._plot.lasso(type='freeform')")


def test_new_scores_and_filters_show_and_select_live(three):
    canvas = three.page.locator(SCATTER).first.element_handle()
    three.do("s.show(x=-x)")   # the third cluster is now at the left
    before = pixels(three, "mirrored")
    three.lasso(SCATTER, [(0.001 if across < 0.5 else 0.3, down) for across, down in MIDDLE])
    three.until("s.selected.tolist()", list(range(80, 120)))
    three.do("s.show(mask=np.arange(120) % 2 == 0)")
    three.until("s.selected.tolist()", list(range(80, 120, 2)))
    three.lasso(SCATTER, MIDDLE)
    three.until("s.selected.tolist()", list(range(40, 80, 2)))
    three.do("s.select([])")
    assert np.abs(pixels(three, "filtered") - before).max() > 50
    three.do("s.show(mask=np.ones(120, bool))")
    assert np.abs(pixels(three, "all") - before).mean() < 0.5
    three.do("s.show(x=x)")
    assert canvas.evaluate("c => c.isConnected")   # the same picture all the time


def test_calls_in_a_row_end_with_the_last(three):
    last = pixels(three, "last")
    three.do("s.show(x=-x); s.show(x=y, y=x); s.show(x=x, y=y)")
    assert np.abs(pixels(three, "again") - last).mean() < 0.5


def test_selection_from_python_is_seen_and_survives_an_empty_lasso(three):
    three.do("s.select([])")
    nothing = pixels(three, "nothing")
    three.lasso(SCATTER, [(0.4, 0.9), (0.42, 0.9), (0.42, 0.93), (0.4, 0.93)])   # no point there
    three.do("s.select(range(40))")
    assert np.abs(pixels(three, "left") - nothing).max() > 50
    assert three.value("len(s.selected)") == 40
    three.do("s.select([])")


def test_brush_gives_the_interval_and_a_click_clears_it(three):
    three.drag(HISTOGRAM, (0.42, 0.5), (0.62, 0.5))
    three.until("h.interval is not None", True)
    three.page.wait_for_timeout(300)
    assert three.value("np.flatnonzero((x >= h.interval[0]) & (x <= h.interval[1])).tolist()") == list(range(40, 80))
    three.do("h.show(highlight=range(40, 80))")
    three.page.wait_for_timeout(500)
    assert three.value("h.interval is not None")   # the brush stays
    three.page.mouse.click(*three.at(HISTOGRAM, (0.35, 0.4)))
    three.until("h.interval", None)


def test_brush_from_python_is_drawn_and_stays_what_it_was_set_to(three):
    three.do("h.show(highlight=[])")
    bare = pixels(three, "bare", HISTOGRAM)
    three.do("h.interval = (5.0, 6.5)")
    brushed = pixels(three, "brushed", HISTOGRAM)
    assert np.abs(brushed - bare).mean() > 1 and three.value("h.interval") == (5.0, 6.5)
    three.do("h.show(highlight=range(50))")
    assert three.value("h.interval") == (5.0, 6.5)
    three.do("h.show(highlight=[]); h.interval = None")
    assert np.abs(pixels(three, "unbrushed", HISTOGRAM) - bare).mean() < 0.1


def test_page_and_kernel_come_to_rest(three):
    "Changes in quick succession, from both sides: at the end stands what came last, and nobody answers an answer."
    bare = pixels(three, "before", HISTOGRAM)
    three.do("said = []; h._chart.observe(lambda change: said.append(change['name']))")
    brush = three.at(HISTOGRAM, (0.3, 0.5)), three.at(HISTOGRAM, (0.5, 0.5))

    def drag():   # over a picture that may just be replaced
        three.page.mouse.move(*brush[0])
        three.page.mouse.down()
        three.page.mouse.move(*brush[1], steps=12)
        three.page.mouse.up()
    drag()
    three.do("for k in range(10): h.show(highlight=range(k)); h.show(values=rng.random(120)); h.show(highlight=[])")
    drag()
    three.do("h.show(values=x, highlight=[])")
    assert np.abs(pixels(three, "after", HISTOGRAM) - bare).mean() < 0.1 and three.value("h.interval") is None
    messages = three.value("len(said)")
    three.page.wait_for_timeout(1000)
    assert three.value("len(said)") == messages


def test_dark_theme(three):
    three.theme("dark")
    assert pixels(three, "dark").mean() < 80   # see-through, not a white box
    three.theme("light")


@pytest.fixture(scope="module")
def many(tmp_path_factory):
    "One kernel for both."
    folder = tmp_path_factory.mktemp("many")
    with lab(notebook(folder / "many.ipynb", IMPORTS), folder) as page:
        page.run_all()
        yield page


@pytest.mark.parametrize("n, seconds", [(50_000, 2), (500_000, 8)])
def test_many_points(many, n, seconds):
    page = many
    page.write(MANY.format(n=n) + "\ns")
    page.run_all()
    page.page.wait_for_selector(SCATTER)
    page.still(SCATTER)
    waits, slow = [], slowness()
    for k in range(3):   # a lasso of few moves: each of them draws all points anew
        page.do("times.clear(); polygons.clear()")
        left = 0.2 + 0.1 * k
        released = page.lasso(SCATTER,
                              [(left, 0.2), (left + 0.25, 0.3), (left + 0.2, 0.7), (left - 0.05, 0.6)], steps=1)
        page.until("len(times) > 0 and len(polygons) > 0", True)
        waits.append(page.value("times[0]") - released)
        page.do(INSIDE)
        assert page.value("len(expected)") > n / 20 and page.value("np.array_equal(s.selected, expected)")
    page.do("s.show(mask=np.arange(len(x)) % 3 == 0, x=y, y=x)")
    page.still(SCATTER)
    page.lasso(SCATTER, [(0.3, 0.3), (0.7, 0.3), (0.5, 0.8)], steps=1)
    page.until("len(polygons) > 0", True)
    page.page.wait_for_timeout(500)
    page.do(INSIDE)
    assert page.value("len(expected)") > n / 50 and page.value("np.array_equal(s.selected, expected)")
    page.do("s.select([])")
    still = pixels(page, "still")
    page.do("s._plot.mouse('panZoom')")
    page.drag(SCATTER, (0.4, 0.4), (0.6, 0.5))
    assert np.abs(pixels(page, "moved") - still).mean() > 1
    print(f"{n:,} points: mouse-up to Python {[round(w, 2) for w in waits]} s, page {page.memory()} MB")
    assert max(waits) < seconds * max(slow, slowness()) and page.errors == []


def test_a_page_of_voila(tmp_path):
    with voila(notebook(tmp_path / "page.ipynb", IMPORTS, THREE, "s"), tmp_path, ready=SCATTER) as page:
        page.page.wait_for_timeout(1500)
        page.lasso(SCATTER, MIDDLE)
        page.until("s.selected.tolist()", list(range(40, 80)))
        assert page.page.locator("text=rng.random").count() == 0   # no code on the page
        assert page.blocked == []
