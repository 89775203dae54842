"""The explorer in a real JupyterLab, with the mouse: brush, lasso, filter,
open, mark, undo, train, cancel, export; and as a page of voila."""
import shutil
import time
from urllib.error import HTTPError
from urllib.parse import urlparse
from urllib.request import urlopen

import pandas as pd
import psutil
import pytest

from browser import ROOT, lab, notebook, voila
from waits import patience
from datasel_wb.corruption import read_decisions
from datasel_wb.review import edited_name, example_run, read_training

pytestmark = pytest.mark.browser

PANEL = "panel = __import__('datasel_wb.explorer').explorer.Explorer({!r}); panel"
SCATTER = ".datasel-scatter canvas"
AROUND = [(0.5, 0.55), (0.97, 0.5), (0.97, 0.99), (0.5, 0.99)]   # the lower right of the scatter


EXECUTE = """async ([code, kernel]) => {   // as somebody in the page's console would
    const config = JSON.parse(document.getElementById('jupyter-config-data').textContent);
    const channels = `api/kernels/${kernel ?? config.kernelId}/channels?session_id=page&token=t`;
    const socket = new WebSocket(`ws://${location.host}${config.baseUrl}${channels}`);
    await new Promise((yes, no) => { socket.onopen = yes; socket.onerror = no; });
    const header = { msg_id: 'one', msg_type: 'execute_request', username: '', session: 'page', version: '5.3',
                     date: new Date().toISOString() };
    const content = { code, silent: false, store_history: false, user_expressions: {}, allow_stdin: false };
    socket.send(JSON.stringify({ header, content, parent_header: {}, metadata: {}, buffers: [], channel: 'shell' }));
    await new Promise(r => setTimeout(r, 1000));
}"""


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    "A run long enough to be cancelled."
    return example_run(tmp_path_factory.mktemp("runs"), steps=600, eval_every=200, save_every=40, log_every=20,
                       history=30, name="digits")


@pytest.fixture(scope="module")
def page(run, tmp_path_factory):
    folder = tmp_path_factory.mktemp("lab")
    with lab(notebook(folder / "panel.ipynb", PANEL.format(str(run))), folder, size=(1300, 1700)) as page:
        page.run_all()
        page.page.wait_for_selector("canvas")
        page.still(SCATTER)
        yield page
        assert page.blocked == []


def click(page, text): page.page.locator(f".jp-OutputArea button:has-text('{text}')").first.click()
def picked(page): return page.value("panel.selected.tolist()")


def test_the_panel_opens_and_draws(page):
    page.screenshot("open")
    assert page.value("(panel.run.value, panel.training.value, panel.x.score.value, panel.y.score.value)") == (
        "digits", "uniform-0", "confidence_spread", "confidence")
    assert page.page.locator("canvas").count() >= 2 and page.errors == []


def test_lasso_selects_and_shows_cards(page, run):
    page.lasso(".datasel-scatter canvas", AROUND)
    page.until("len(panel.selected) > 20", True)
    rows = picked(page)
    frame = read_training(run).frame
    assert rows != list(range(len(frame))) and frame.loc[rows, "confidence"].mean() < frame.confidence.mean()
    page.page.wait_for_function("n => document.querySelectorAll('.datasel-card').length == n", arg=min(60, len(rows)))
    page.screenshot("lasso")
    first = page.page.locator(".datasel-card div").first.inner_text()
    top = frame.loc[rows].sort_values("loss_mean", ascending=False).iloc[0]
    assert first == top["class"]


def test_open_an_example(page, run):
    page.page.locator(".datasel-face").nth(3).click()
    page.until("panel.chosen.cards.opened >= 0", True)
    row = page.value("panel.chosen.cards.opened")
    frame = read_training(run).frame
    order = frame.loc[picked(page)].sort_values("loss_mean", ascending=False, kind="stable")
    assert row == order.index[3]
    page.page.wait_for_selector("img[alt='the example']")
    page.until("len(panel.chosen.opened.losses.children)", 1)
    assert page.value("len(panel.chosen.opened.losses.children[0].rows)") == 30
    page.screenshot("opened")


def test_ticked_cards_are_removed_and_it_can_be_undone(page, run):
    for k in (0, 2): page.page.locator(".datasel-card input").nth(k).check()
    page.until("len(panel.chosen.cards.picked)", 2)
    rows = page.value("panel.chosen.cards.picked")
    page.page.locator(".jp-OutputArea input[placeholder='reason']").fill("blurred")
    click(page, "Remove")
    page.until("len(panel.decisions)", 2)
    frame = read_training(run).frame
    saved = read_decisions(run / "decisions.csv")
    assert sorted(saved.id) == sorted(frame["id"][rows]) and set(saved.action) == {"remove"}
    assert set(saved.reason) == {"blurred"}
    page.page.wait_for_function("() => document.querySelectorAll('.datasel-remove').length == 2")
    click(page, "Undo")
    page.until("len(panel.decisions)", 0)
    assert len(read_decisions(run / "decisions.csv")) == 0


def test_filter_by_class_and_by_histogram(page, run):
    page.do("panel.select([])")
    page.page.locator(".jp-OutputArea select[multiple]").select_option(["3", "8"])
    page.until("set(panel.selection['class'])", {"3", "8"})
    both = len(picked(page))
    page.drag(".datasel-histogram canvas", (0.2, 0.5), (0.5, 0.5))
    page.until(f"0 < len(panel.selected) < {both}", True)
    page.still(".datasel-histogram canvas")           # the brush has come to rest
    low, high = page.value("tuple(map(float, panel.histogram.interval))")
    frame = read_training(run).frame
    assert picked(page) == frame.index[frame["class"].isin(["3", "8"])
                                       & frame.confidence_spread.between(low, high)].tolist()
    page.screenshot("filtered")
    page.do("panel.histogram.interval = None; panel.classes.value = ()")


def test_relabel_the_selection_by_the_mouse(page, run):
    page.do("panel.ask(); panel.select([int(i) for i in (panel.records.frame.predicted != "
            "panel.records.frame['class']).to_numpy().nonzero()[0]])")
    assert page.value("panel.label.value") == "(as predicted)"
    click(page, "Relabel")
    page.until("len(panel.decisions) > 10", True)
    saved = read_decisions(run / "decisions.csv").set_index("id")
    table = page.value("panel.selection.set_index('id').predicted.to_dict()")
    assert saved.label.to_dict() == table and set(saved.action) == {"relabel"}
    click(page, "Undo")
    page.until("len(panel.decisions)", 0)


def test_lasso_remove_train_cancel_train_compare_export(page, run):
    for axis, score in (("x", "confidence_spread"), ("y", "confidence")):
        page.do(f"panel.select([]); panel.{axis}.score.value = {score!r}")
        page.still(SCATTER)
    page.lasso(".datasel-scatter canvas", AROUND)
    page.until("len(panel.selected) > 20", True)
    click(page, "Remove")
    page.until("len(panel.decisions) == len(panel.selected)", True)
    frame, rows = read_training(run).frame, picked(page)
    assert frame.confidence[rows].max() < frame.confidence.quantile(0.75)
    assert frame.confidence_spread[rows].min() > frame.confidence_spread.min()
    # exactly the selected ids
    assert read_decisions(run / "decisions.csv").id.tolist() == frame["id"][rows].tolist()
    click(page, "Train on what is left")
    page.until("panel.again.job is not None and (panel.again.job.folder / "
               "'uniform-0/checkpoints/checkpoints.json').exists()", True, timeout=patience(200))
    page.until("panel.again.live.children[0].state.phase", "running", timeout=patience(120))
    # the curves are drawn, and grow
    page.page.wait_for_function("n => document.querySelectorAll('.datasel-live canvas').length == 1")
    points = page.value("len(panel.again.live.children[0].chart.rows)")
    page.until(f"len(panel.again.live.children[0].chart.rows) > {points}", True)
    page.screenshot("training")
    click(page, "Cancel")
    page.until("panel.again.job.state()", "cancelled", timeout=patience(120))
    page.until("'cancelled' in panel.message.value", True)
    page.screenshot("cancelled")
    click(page, "Train on what is left")
    page.until("panel.again.job.state()", "done", timeout=patience(400))
    page.until("panel.again.result.value != ''", True)
    assert page.value("list(panel.again.table.index)") == ["before", "after"]
    assert page.value("bool(panel.again.table.notna().all(axis=None))")
    after = run.parent / edited_name(run, run / "decisions.csv", 0)
    assert len(pd.read_parquet(after / "uniform-0" / "examples.parquet")) == len(frame) - len(rows)
    page.screenshot("compared")
    click(page, "Export the selection")
    page.until("(panel.records.run / 'exports' / 'selection.csv').exists()", True)
    assert pd.read_csv(run / "exports" / "selection.csv").id.tolist() == frame["id"][rows].tolist()
    page.theme("dark")
    page.still(SCATTER)
    page.screenshot("dark")
    assert page.errors == []


def test_empty_selection_is_told(page):
    page.do("panel.select([])")
    click(page, "Keep")
    page.until("'nothing is selected' in panel.message.value", True)


def test_where_code_may_be_run_the_same_attempt_succeeds(page, tmp_path):
    "So that the refusal by a page of voila says something."
    made = tmp_path / "made"
    kernel = page.page.evaluate("jupyterapp.shell.currentWidget.sessionContext.session.kernel.id")
    page.page.evaluate(EXECUTE, [f"open({str(made)!r}, 'w').close()", kernel])
    page.until(f"__import__('os').path.exists({str(made)!r})", True)


def only_shows(page, folder):
    "A page of voila: no code on it, signs that are drawn, and nothing that runs code or reads files."
    assert "panel = " not in page.page.content()
    assert page.page.locator(".CodeMirror, .cm-editor").count() == 0
    icon = page.page.locator(".fa-download").first.evaluate(
        "i => [getComputedStyle(i, '::before').content.length, getComputedStyle(i).fontFamily]")
    # a sign in quotes, in the font of icons
    assert icon[0] == 3 and "Awesome" in icon[1]
    port = urlparse(page.page.url).port
    assert {c.laddr.ip for c in psutil.net_connections() if c.status == "LISTEN" and c.laddr.port == port} == {
        "127.0.0.1"}
    made = folder / "made"
    page.page.evaluate(EXECUTE, [f"open({str(made)!r}, 'w').close()", None])
    time.sleep(2)
    assert not made.exists()                                                       # the page cannot run code of its own
    for path in ("voila/files/explore.ipynb", "voila/files/../../../etc/hostname",
                 "voila/files/..%2f..%2f..%2fetc/hostname", "files/explore.ipynb", "api/contents"):
        with pytest.raises(HTTPError):
            urlopen(f"http://127.0.0.1:{port}/{path}", timeout=patience(20))          # nor read files


@pytest.mark.parametrize("opened", [lab, voila])
def test_the_notebook_explore(run, tmp_path, opened):
    "As it is in the project, in a folder that has one run; with voila, as a page that only shows."
    shutil.copy(ROOT / "settings.ini", tmp_path)
    shutil.copytree(run, tmp_path / "papermill_runs" / "mine")
    ready = {"ready": "canvas"} if opened is voila else {}
    with opened(ROOT / "nbs" / "explore.ipynb", tmp_path, size=(1300, 1700), **ready) as page:
        if opened is lab: page.run_all()
        page.page.wait_for_selector("canvas")
        page.still(SCATTER)
        page.lasso(".datasel-scatter canvas", AROUND)
        page.page.wait_for_selector(".datasel-card")
        page.page.locator("button:has-text('Remove')").first.click()
        page.page.wait_for_selector("text=saved in mine/decisions.csv")
        assert len(read_decisions(tmp_path / "papermill_runs" / "mine" / "decisions.csv")) > 10
        page.screenshot("page")
        assert page.errors == [] and page.blocked == []
        if opened is voila: only_shows(page, tmp_path)
