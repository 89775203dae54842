"""The docs site: built by the command of `make docs`, then every
page opened in Chromium, which sees no host but this one."""
import functools
import http.server
import json
import subprocess
import sys
import threading
from pathlib import Path

import axe_core_python
import pytest

from browser import chromium
from waits import patience

ROOT = Path(__file__).resolve().parents[1]
AXE = (Path(axe_core_python.__file__).parent / "axe.min.js").read_text()
SERIOUS = """async (contrast) => {
    const options = {resultTypes: ["violations"], rules: {"color-contrast": {enabled: contrast}}};
    return (await axe.run(document, options)).violations
        .filter(v => ["serious", "critical"].includes(v.impact) || v.id === "heading-order")
        .map(v => [v.id, v.nodes.length, v.nodes[0].html.slice(0, 160)]);
}"""
DRAWN = """() => ({
    charts: document.querySelectorAll("figure.chart").length,
    drawn: [...document.querySelectorAll("figure.chart canvas")].filter(c => c.width > 50 && c.height > 50).length,
    formulas: document.querySelectorAll(".math").length,
    typeset: [...document.querySelectorAll(".math")].filter(m => m.querySelector("mjx-container > mjx-math")).length,
    wrong: document.querySelectorAll("mjx-merror").length,
    blank: [...document.images].filter(i => i.complete && !i.naturalWidth).map(i => i.src),
    silent: [...document.images].filter(i => !i.alt).map(i => i.src),
    ids: [...document.querySelectorAll("[id]")].map(e => e.id),
    links: [...document.querySelectorAll("a[href]")].map(a => a.href)})"""
READY = "async () => { await window.MathJax?.startup?.promise; await window.chartsDrawn; }"
# axe's time goes into the coloured words of code, nine elements in ten, and into contrast; both come from one style
# sheet: test_contrast looks at them
PLAIN_CODE = """() => {
    for (const code of document.querySelectorAll(".highlight pre")) code.textContent = code.textContent;
}"""
PHONE = "() => document.documentElement.scrollWidth <= innerWidth"


class Quiet(http.server.SimpleHTTPRequestHandler):
    def log_message(self, *args): pass


@pytest.fixture(scope="module")
def site():
    "The built site and its address."
    out = ROOT / "_docs"
    built = subprocess.run([sys.executable, ROOT / "docs" / "build.py"], capture_output=True, text=True)
    assert built.returncode == 0, built.stderr[-5000:]
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), functools.partial(Quiet, directory=out))
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield out, f"http://127.0.0.1:{server.server_port}/"
    server.shutdown()


@pytest.fixture(scope="module")
def browser():
    "One Chromium for all tests, which draws no WebGL, without their pages at the end."
    yield (drawing := chromium(webgl=False))
    for context in drawing.contexts: context.close()


def open_page(browser, address, complaints, **options):
    "A page that writes down what goes wrong and reaches no other host."
    context = browser.new_context(viewport={"width": 1280, "height": 900}, reduced_motion="reduce", **options)
    context.set_default_timeout(patience(30) * 1000)
    page = context.new_page()
    own = (address, "data:", "blob:")   # no other host is found; a route, which refuses it, would switch the cache off
    page.on("request", lambda r: None if r.url.startswith(own) else complaints.append(f"request to {r.url}"))
    page.on("console", lambda m: complaints.append(f"{m.type}: {m.text}") if m.type in ("error", "warning") else None)
    page.on("pageerror", lambda e: complaints.append(f"error: {e}"))
    page.on("requestfailed", lambda r: complaints.append(f"failed: {r.url}"))
    page.on("response", lambda r: complaints.append(f"{r.status}: {r.url}") if r.status >= 400 else None)
    return page


def test_every_notebook_and_module_has_a_page(site):
    out, _ = site
    pages = {p.stem for p in out.glob("*.html")}
    assert {p.stem for p in (ROOT / "nbs").glob("*.ipynb")} <= pages
    assert {f"api_{p.stem}" for p in (ROOT / "datasel_wb").glob("[a-z]*.py")} <= pages


@pytest.mark.browser
def test_every_page_in_a_browser(site, browser):
    "Nothing fails or asks others; charts and formulas are drawn, links lead somewhere, axe is content, so is a phone."
    out, address = site
    wrong, ids, links = {}, {}, {}
    complaints = []
    page = open_page(browser, address, complaints)
    page.add_init_script(AXE)
    for file in sorted(out.glob("*.html")):
        page.goto(address + file.name)
        page.evaluate(READY)
        seen = page.evaluate(DRAWN)
        ids[file.name], links[file.name] = set(seen.pop("ids")), seen.pop("links")
        if (seen["charts"] != seen["drawn"] or seen["formulas"] != seen["typeset"] or seen["wrong"] or seen["blank"]
            or seen["silent"]):
            complaints.append(seen)
        page.evaluate(PLAIN_CODE)
        complaints.extend(page.evaluate(SERIOUS, False))
        page.set_viewport_size({"width": 390, "height": 844})
        if not page.evaluate(PHONE): complaints.append("wider than a phone")
        page.set_viewport_size({"width": 1280, "height": 900})
        if complaints: wrong[file.name] = list(complaints)
        complaints.clear()
    for name, there in links.items():
        for link in {k.removeprefix(address) for k in there if k.startswith(address)}:
            target, _, fragment = link.partition("#")
            target = target.partition("?")[0] or "index.html"
            if not (out / target).exists() or (fragment and target in ids and fragment not in ids[target]):
                wrong.setdefault(name, []).append(f"broken link: {link}")
    assert not wrong, json.dumps(wrong, indent=1)


@pytest.mark.browser
@pytest.mark.parametrize("theme", ["light", "dark"])
def test_contrast(site, browser, theme):
    "Some pages of each kind, with their code."
    _, address = site
    complaints = []
    page = open_page(browser, address, complaints, color_scheme=theme)
    page.add_init_script(AXE)
    for name in ("index", "00_core", "results", "methods", "api_core", "guide"):
        page.goto(f"{address}{name}.html")
        page.evaluate(READY)
        assert page.evaluate("document.documentElement.dataset.theme") == theme
        complaints.extend([name, *found] for found in page.evaluate(SERIOUS, True))
    assert not complaints, complaints


@pytest.mark.browser
def test_search_finds_a_word(site, browser):
    _, address = site
    complaints = []
    page = open_page(browser, address, complaints)
    page.goto(f"{address}search.html?q=forgetting")
    page.wait_for_selector("#search-results li a[href*='04_dynamics.html']")
    assert not complaints


def test_a_notebook_without_a_place_is_an_error():
    sys.path.insert(0, str(ROOT / "docs"))
    try: import pages
    finally: sys.path.pop(0)
    assert pages.sections(["index", "00_core", "run_dds"])["library"] == ["00_core"]
    with pytest.raises(ValueError, match="notebooks stray: in no section"):
        pages.sections(["index", "00_core", "stray"])
