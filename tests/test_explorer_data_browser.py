"""The explorer in a real JupyterLab with other data than one run of digits:
50,000 pictures, sentences, lost pictures, runs that cannot be read."""
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pandas as pd
import pytest
from browser import lab, notebook
from PIL import Image
from small_runs import SENTENCES, recorded_run, translation_run
from waits import slowness

from datasel_wb.corruption import read_decisions
from datasel_wb.review import Decisions, example_run, read_training

pytestmark = pytest.mark.browser

CIFAR = Path(os.environ.get("DATASEL_DATA") or "/nowhere", "cifar10", "train")
IMAGES = """import time
import numpy as np, pandas as pd
from pathlib import Path
from datasel_wb.explorer import Explorer
files = sorted(Path({folder!r}).glob("*/*"))
frame = pd.DataFrame({{"class": [f.parent.name for f in files], "kilobytes": [f.stat().st_size / 1000 for f in files],
                      "place": np.random.default_rng(0).random(len(files))}})
panel, times = Explorer(frame, files, root={root!r}), []
panel.scatter.observe(lambda change: times.append(time.time()), "selected")   # after the panel's own observer
panel"""
WATCHED = """() => {   // when the button was released, when the cards were drawn
    window.addEventListener("mouseup", () => { window.released = performance.now(); window.drawn = null; }, true);
    const drawn = () => requestAnimationFrame(() => requestAnimationFrame(() => { window.drawn = performance.now(); }));
    new MutationObserver(drawn).observe(document.querySelector(".datasel-cards"), { childList: true });
}"""
READABLE = """(() => {   // contrast of the cards' texts with what is behind them; 0 where one is cut off
    const light = c => { const [r, g, b] = c.match(/[\\d.]+/g).map(v => (v /= 255) <= 0.03928 ? v / 12.92
                         : ((v + 0.055) / 1.055) ** 2.4); return 0.2126 * r + 0.7152 * g + 0.0722 * b; };
    const of = face => {
        if (face.scrollHeight > face.clientHeight + 1 || face.scrollWidth > face.clientWidth + 1) return 0;
        const style = getComputedStyle(face), [a, b] = [light(style.color), light(style.backgroundColor)];
        return (Math.max(a, b) + 0.05) / (Math.min(a, b) + 0.05); };
    return Math.min(...[...document.querySelectorAll(".datasel-text .datasel-face")].map(of));
})()"""
CLOSED = "no comm channel defined"   # JupyterLab, of a view that has something to tell to a panel closed before
MESSAGE, CARD, SCATTER = ".datasel-message", ".datasel-card", ".datasel-scatter canvas"


def choose(page, title, option):
    page.page.locator(f".widget-dropdown:has(label:text-is('{title}')) select").first.select_option(option)


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    "Runs that can be read, and some that cannot."
    root = tmp_path_factory.mktemp("runs")
    good = example_run(root, steps=40, eval_every=20, save_every=20, name="good")
    translation_run(root)
    for name in ("older", "written"): shutil.copytree(good, root / name)
    older = root / "older" / "uniform-0" / "examples.parquet"
    pd.read_parquet(older).drop(columns="id").to_parquet(older)
    written = root / "written" / "uniform-0" / "examples.parquet"
    written.write_bytes(written.read_bytes()[:1000])
    begun = root / "begun" / "uniform-0"
    (begun / "tb").mkdir(parents=True)
    shutil.copy(good / "recipe.json", begun.parent)
    return root


@pytest.fixture(scope="module")
def opened(tmp_path_factory):
    folder = tmp_path_factory.mktemp("lab")
    with lab(notebook(folder / "panel.ipynb", "panel = None"), folder, size=(1300, 1500)) as page:
        page.run_all()
        yield page


@pytest.fixture
def page(opened, root):
    "A new panel at rest, without decisions, on the page of all tests."
    opened.do("for shown in filter(None, (panel, globals().pop('again', None))): shown.close()")
    (root / "good" / "decisions.csv").unlink(missing_ok=True)
    opened.write(f"from datasel_wb.explorer import Explorer\npanel = Explorer('good', root={str(root)!r}); panel")
    opened.run_all()
    opened.still(SCATTER)   # what is closed while it is being drawn has messages on the way
    yield opened
    opened.still(SCATTER)
    assert {*opened.errors} <= {CLOSED} and opened.blocked == []


def test_runs_that_cannot_be_read_are_told_and_the_panel_goes_on(page, root):
    says = lambda text: page.page.wait_for_selector(f"{MESSAGE} div:has-text({text!r})")
    for name, text in {"older": "no column 'id', so it is of an older version", "written": "it is damaged"}.items():
        choose(page, "run", name)
        says(text)
        assert page.page.locator("canvas").count() == 0     # nothing of the run before
        choose(page, "run", "good")
        page.page.wait_for_selector("canvas")
    page.do("again = Explorer('begun', root=panel.root)")
    assert "no training has ended yet" in page.value("again.message.value")
    assert "uniform-0" in page.value("again.message.value")
    page.do("panel.select(range(5)); panel.mark('remove')")
    assert len(read_decisions(root / "good" / "decisions.csv")) == 5
    choose(page, "beside", "older")                          # a second run for the axes
    page.page.wait_for_timeout(500)
    choose(page, "x", "older/uniform-0")
    says("older version")
    choose(page, "x", "uniform-0")
    page.until("panel.x.score.value is not None", True)
    page.screenshot("told")
    page.do("panel.undo()")


def test_a_second_explorer_only_looks(page, root):
    decided = root / "good" / "decisions.csv"
    page.do("panel.select([1, 2, 3]); panel.mark('keep')")
    with pytest.raises(ValueError, match="another explorer decides about this run"):
        Decisions(decided).decide("remove", [7])   # of this process
    assert len(read_decisions(decided)) == 3
    page.do("panel.undo(); panel.close()")
    other = ("import sys, time; from datasel_wb.review import Decisions; d = Decisions(sys.argv[1]); print('has it', "
             "flush=True); time.sleep(3600)")
    process = subprocess.Popen([sys.executable, "-c", other, decided], stdout=subprocess.PIPE, text=True)
    try:
        assert process.stdout.readline() == "has it\n"
        page.run_all()
        page.page.wait_for_selector("div[role=status]:has-text('another explorer decides about this run')")
        page.do("panel.select([4])")
        page.page.wait_for_selector(CARD)
        page.page.locator(".jp-OutputArea button:has-text('Remove')").first.click()
        page.page.wait_for_selector(f"{MESSAGE} div:has-text('decisions.csv: another explorer decides about this run')")
        assert len(read_decisions(decided)) == 0 and page.value("len(panel.decisions)") == 0
        page.screenshot("second")
    finally: process.kill()


def test_sentences_are_cards_of_text(page, root):
    choose(page, "run", "words")
    frame = read_training(root / "words").frame
    page.until("len(panel.records.frame)", len(frame))
    page.page.wait_for_selector("canvas")
    page.page.locator(".jp-OutputArea select[multiple]").select_option(["az"])
    page.page.wait_for_selector(f"{CARD}.datasel-text")
    rows = page.value("panel.selected.tolist()")
    assert rows == frame.index[frame.language == "az"].tolist()
    first = page.value("panel.chosen.order.tolist()")[0]
    face = page.page.locator(".datasel-face").first
    assert face.inner_text() == f"{frame.source_text[first]}\n→ {frame.target_text[first]}"
    face.click()
    page.page.wait_for_selector(f"td:text-is('{frame.source_text[first]}')")
    page.screenshot("sentences")
    page.do("panel.mark('remove', reason='too long')")
    assert read_decisions(root / "words" / "decisions.csv").id.tolist() == frame["id"][rows].tolist()


def test_sentences_and_rows_of_a_foreign_loop_can_be_read(page, tmp_path):
    run = recorded_run(tmp_path, data=SENTENCES)
    page.do("panel.close()")
    page.write(f"panel = Explorer({str(run)!r}); panel")
    page.run_all()
    page.page.wait_for_selector("canvas")
    page.do("panel.select(range(12)); panel.chosen.by.value = 'margin'")
    page.page.wait_for_function("document.querySelectorAll('.datasel-text .datasel-face').length == 12")
    texts = page.page.locator(".datasel-face").all_inner_texts()
    assert sorted(t for t in texts if not t.endswith("…")) == sorted(s for s in SENTENCES if len(s) < 320)
    for theme in ("light", "dark"):
        page.theme(theme)
        page.page.wait_for_function(f"{READABLE} > 4.5")                     # contrast, and nothing is cut off
        page.screenshot(f"foreign-{theme}")
    page.theme("light")
    page.page.locator(".datasel-face", has_text="passcode & cannot log in <at all>").click()
    page.page.wait_for_selector("div:text-is('I have forgotten my passcode & cannot log in <at all>.')")
    assert not page.page.locator("button:has-text('Train on what is left'):visible").count()
    page.do("import numpy as np, pandas as pd\n"
            "table = pd.DataFrame({'age': range(20, 32), 'profession, as given': ['nurse'] * 12, 'balance': np.pi})\n"
            f"panel.close(); again = Explorer({str(run)!r}, table)")
    page.write("again")
    page.run_all()
    page.page.wait_for_selector("canvas")
    page.do("again.select([3, 4]); again.mark('remove')")
    page.page.wait_for_function("document.querySelectorAll('.datasel-remove .datasel-pairs').length == 2")
    assert page.page.locator(".datasel-pairs").first.inner_text().split() == (
        "age 23 profession, as given nurse balance 3.142".split() if page.value("int(again.chosen.order[0])") == 3
        else "age 24 profession, as given nurse balance 3.142".split())
    page.screenshot("rows")


def test_lost_pictures_and_values_are_counted(page, tmp_path):
    folder = tmp_path / "pictures"
    folder.mkdir()
    for k in range(8): Image.new("RGB", (32, 32), (30 * k, 90, 200)).save(folder / f"{k}.png")
    (folder / "2.png").unlink()
    (folder / "5.png").write_bytes(b"no picture")
    page.do(f"""import numpy as np, pandas as pd
frame = pd.DataFrame({{"loss": [0.0, 1, 2, 3, 4, 5, np.nan, 7], "margin": range(8), "class": list("aabbccdd")}})
panel.close()""")
    page.write(f"panel = Explorer(frame, [f'{folder}/{{k}}.png' for k in range(8)], root={str(tmp_path)!r}); panel")
    page.run_all()
    page.page.wait_for_selector("canvas")
    page.do("panel.select(range(8))")
    page.page.wait_for_function("document.querySelectorAll('.datasel-card').length == 8")
    assert page.page.locator(".datasel-missing").count() == 2
    assert "2 of these pictures missing" in page.value("panel.chosen.about.value")
    assert page.page.locator(".datasel-scatter:has-text('1 row has no finite value and is not drawn.')").count() == 1
    page.screenshot("lost")
    page.page.locator(".datasel-missing").first.click()
    page.page.wait_for_selector("i:has-text('no picture')")


@pytest.mark.skipif(not CIFAR.is_dir(), reason="DATASEL_DATA names no folder with cifar10/")
def test_fifty_thousand_pictures(tmp_path):
    with lab(notebook(tmp_path / "many.ipynb", IMAGES.format(folder=str(CIFAR), root=str(tmp_path))), tmp_path,
             size=(1300, 1500)) as page:
        page.run_all()
        page.page.wait_for_selector("canvas")
        page.still(SCATTER)
        page.page.evaluate(WATCHED)
        waits, grids, slow = [], [], slowness()
        for k in range(3):
            page.do("times.clear()")
            left = 0.15 + 0.1 * k
            released = page.lasso(".datasel-scatter canvas",
                                  [(left, 0.2), (left + 0.3, 0.25), (left + 0.25, 0.8), (left - 0.05, 0.7)], steps=3)
            page.until("len(times) > 0", True)
            waits.append(page.value("times[0]") - released)
            page.page.wait_for_function("() => window.drawn && document.querySelectorAll('.datasel-card').length == 60")
            grids.append(page.page.evaluate("(window.drawn - window.released) / 1000"))
            assert page.value("len(panel.selected)") > 1000
        page.screenshot("many")
        print(f"50,000 pictures: selection in Python after {[round(w, 2) for w in waits]} s, 60 cards drawn after "
              f"{[round(g, 2) for g in grids]} s; page {page.memory()} MB")
        slow = max(slow, slowness())
        assert max(waits) < 2 * slow and max(grids) < 4 * slow and page.errors == []
