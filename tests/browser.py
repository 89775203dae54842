"""A real JupyterLab, or voila, in headless Chromium, for tests: no tests here.

    def test_it(tmp_path):
        with lab(NOTEBOOK, tmp_path) as page:          # or voila(NOTEBOOK, tmp_path)
            page.run_all()
            page.drag(".jupyter-scatter", (0.2, 0.2), (0.8, 0.8))
            assert page.value("s.selected.tolist()") == [1, 2]
            page.screenshot("selected")                # tmp_path / selected.png
            assert page.errors == []

One Chromium and one JupyterLab per process of pytest serve all of its tests: each gets a browser context and a
workspace of its own, and its kernel ends with it. The server runs with its own folders for settings, workspaces
and kernels, on 127.0.0.1; kernels inherit the environment of the tests (and the project of this folder). The
browser reaches no other host: what it asks of one is in `page.blocked`. Tests that use it are skipped, with the
reason, where there is no Chromium or no Playwright; `DATASEL_CHROMIUM` names another Chromium.
"""
import ast
import atexit
import json
import os
import shutil
import socket
import subprocess
import sys
import tempfile
import time
import uuid
from contextlib import ExitStack, contextmanager
from functools import cache
from pathlib import Path
from urllib.request import Request, urlopen

import nbformat
import psutil
import pytest

from waits import patience

ROOT = Path(__file__).parents[1]
CHROMIUM = (os.environ.get("DATASEL_CHROMIUM") or shutil.which("chromium") or shutil.which("chromium-browser")
            or shutil.which("google-chrome"))
WEBGL = ["--use-gl=angle", "--use-angle=swiftshader", "--enable-unsafe-swiftshader"]
FLAGS = ["--no-sandbox", "--disable-quic", "--no-first-run", "--disable-background-networking",
         "--disable-component-update", "--disable-sync", "--enable-precise-memory-info",
         "--host-resolver-rules=MAP * ~NOTFOUND, EXCLUDE 127.0.0.1"]
ENDINGS = ExitStack()   # what ends with the process: the servers, the browser, Playwright
atexit.register(ENDINGS.close)   # conftest.py does it earlier
SETTINGS = {   # of JupyterLab, by plugin
    "apputils-extension/themes": {"theme": "JupyterLab Light"},
    "apputils-extension/notification": {"fetchNews": "false", "checkForUpdates": False},
    "notebook-extension/tracker": {"windowingMode": "none"},   # every cell is in the page
}


def notebook(
    path,     # of the file to write
    *cells,   # source of its code cells
) -> Path:
    "Write a notebook; returns its path."
    kernel = {"name": "python3", "display_name": "Python 3", "language": "python"}
    cells = [nbformat.v4.new_code_cell(c) for c in cells]
    nbformat.write(nbformat.v4.new_notebook(cells=cells, metadata={"kernelspec": kernel}), path)
    return Path(path)


def free_port() -> int:
    "A port of 127.0.0.1 that nobody listens on."
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        return s.getsockname()[1]


@contextmanager
def server(
    command,   # arguments after the Python executable's `-m`
    folder,    # for its settings, kernels and log
    port,      # where it will listen
    python=sys.executable,
    cwd=None,  # where it is started; None: `folder`
):
    "A Jupyter server as a process of its own, stopped with its kernels at the end."
    folder.mkdir(parents=True, exist_ok=True)
    own = {f"JUPYTER{name}_DIR": str(folder / name.strip("_").lower())
           for name in ("LAB_SETTINGS", "LAB_WORKSPACES", "_RUNTIME", "_CONFIG", "_DATA")}
    path = os.pathsep.join([str(ROOT), *filter(None, [os.environ.get("PYTHONPATH")])])
    env = os.environ | own | {"PYTHONPATH": path, "IPYTHONDIR": str(folder / "ipython")}
    with open(folder / "server.log", "w") as log:
        process = subprocess.Popen([python, "-m", *command], env=env, stdout=log, stderr=subprocess.STDOUT,
                                   cwd=cwd or folder)
    try:
        until = time.monotonic() + patience(60)
        while time.monotonic() < until:
            try: socket.create_connection(("127.0.0.1", port), timeout=5).close()
            except OSError: time.sleep(0.25)
            else: break
            assert process.poll() is None, (folder / "server.log").read_text()[-2000:]
        yield folder
    finally:
        family = [process, *psutil.Process(process.pid).children(recursive=True)] if process.poll() is None else []
        process.terminate()
        try: process.wait(patience(15))
        except subprocess.TimeoutExpired: pass
        for p in family:
            try: p.kill()
            except (psutil.NoSuchProcess, ProcessLookupError): pass


@cache
def playwright():
    "Playwright itself, once per process: two at a time are refused."
    session = pytest.importorskip("playwright.sync_api", reason="Playwright is not installed").sync_playwright().start()
    ENDINGS.callback(session.stop)
    return session


@cache
def chromium(
    webgl=True,   # for the scatter; every page is drawn through it, at a third more of the processor's time
):
    "One headless Chromium per process and kind."
    if not CHROMIUM: pytest.skip("no Chromium on this machine")
    started = playwright().chromium.launch(executable_path=CHROMIUM, headless=True,
                                           args=FLAGS + (WEBGL if webgl else ["--disable-gpu"]))
    ENDINGS.callback(started.close)
    return started


@contextmanager
def browser(
    size=(1150, 1000), # of the window, pixels
):
    "A page without a past that reaches 127.0.0.1 only; `(page, errors of its console, requests to other hosts)`."
    errors, blocked = [], []

    def gate(route):
        if route.request.url.startswith("http://127.0.0.1:"): return route.continue_()
        blocked.append(route.request.url)
        route.abort()
    context = chromium().new_context(viewport=dict(zip(("width", "height"), size)))
    context.route(lambda url: url.startswith(("http:", "https:")), gate)
    context.set_default_timeout(patience(30) * 1000)
    page = context.new_page()
    page.on("console", lambda m: errors.append(m.text) if m.type == "error" else None)
    page.on("pageerror", lambda e: errors.append(e.stack or str(e)))
    try: yield page, errors, blocked
    finally: context.close()


class Notebook:
    "A notebook open in JupyterLab or served by voila, with its kernel; `page` is Playwright's page."

    def __init__(self, page, errors, blocked, folder, runtime, kernel="*"):
        self.page, self.errors, self.blocked = page, errors, blocked
        self.folder, self.runtime, self.kernel = folder, runtime, kernel
        self.client = None

    def run_all(
        self,
        timeout=patience(120),   # seconds
    ):
        "Run all cells and wait for the last; an error in a cell fails with its text."
        self.page.evaluate("t => Promise.race([jupyterapp.commands.execute('notebook:run-all-cells'), "
                           "new Promise(r => setTimeout(r, t))])",
                           timeout * 1000)
        cells = self.page.evaluate("""() => jupyterapp.shell.currentWidget.content.model.sharedModel.cells
            .map(c => c.toJSON())
            .filter(c => c.cell_type == 'code' && c.source.length)""")
        failed = [f"{o['ename']}: {o['evalue']}" for c in cells for o in c["outputs"] if o["output_type"] == "error"]
        assert not failed, failed[0]
        waiting = sum(c["execution_count"] is None for c in cells)
        assert not waiting, f"{waiting} of {len(cells)} cells have not run after {timeout} s"

    def value(
        self,
        expression,   # Python, whose value has a literal `repr`
        timeout=patience(60),   # seconds
    ):
        "The value of an expression in the kernel."
        reply = self._execute("", {"it": expression}, timeout)["user_expressions"]["it"]
        assert reply["status"] == "ok", f"{expression}: {reply.get('ename')}: {reply.get('evalue')}"
        return ast.literal_eval(reply["data"]["text/plain"])

    def do(
        self,
        code,         # Python statements
        timeout=patience(60),   # seconds
    ):
        "Run statements in the kernel, outside the cells of the notebook."
        reply = self._execute(code, {}, timeout)
        assert reply["status"] == "ok", f"{code}: {reply.get('ename')}: {reply.get('evalue')}"

    def _execute(self, code, expressions, timeout):
        from jupyter_client import BlockingKernelClient
        if self.client is None:
            newest = max(self.runtime.rglob(f"kernel-{self.kernel}.json"), key=lambda f: f.stat().st_mtime)
            self.client = BlockingKernelClient(connection_file=str(newest))
            self.client.load_connection_file()
            self.client.start_channels()
        return self.client.execute(code, store_history=False, user_expressions=expressions, reply=True,
                                   timeout=timeout)["content"]

    def close(self):
        "No more questions to the kernel."
        if self.client: self.client.stop_channels()

    def until(
        self,
        expression,   # Python
        wanted,       # its value at last
        timeout=patience(90),   # seconds
    ):
        "Wait until an expression in the kernel has this value; fails with the value that it has in the end."
        end = time.monotonic() + timeout
        while (got := self.value(expression)) != wanted and time.monotonic() < end: time.sleep(0.05)
        assert got == wanted, f"{expression} is {got!r}, not {wanted!r}"

    def theme(
        self,
        name,   # "light" or "dark"
    ):
        "Switch JupyterLab's theme."
        self.page.evaluate("theme => jupyterapp.commands.execute('apputils:change-theme', {theme})",
                           f"JupyterLab {name.title()}")
        self.page.wait_for_selector(f"body[data-jp-theme-light='{str(name == 'light').lower()}']", state="attached")

    def at(
        self,
        selector,   # of an element
        point,      # (across, down), shares of its width and height
    ):
        "A point of an element in pixels of the page."
        box = self.page.locator(selector).first.bounding_box()
        return box["x"] + point[0] * box["width"], box["y"] + point[1] * box["height"]

    def lasso(
        self,
        selector,   # of an element
        points,     # [(across, down)], shares of its width and height
        steps=8,    # mouse moves between two points
        key=None,   # held down, e.g. "Shift"
    ):
        "Drag the mouse along a path; returns the time (seconds since 1970) just before the button was released."
        self.page.locator(selector).first.scroll_into_view_if_needed()
        first, *others = [self.at(selector, p) for p in points]
        if key: self.page.keyboard.down(key)
        self.page.mouse.move(*first)
        self.page.mouse.down()
        self.page.mouse.move(first[0] + 1, first[1] + 1)   # a lasso starts at the first move
        for point in others: self.page.mouse.move(*point, steps=steps)
        released = time.time()
        self.page.mouse.up()
        if key: self.page.keyboard.up(key)
        return released

    def drag(
        self,
        selector,      # of an element
        start,         # (across, down), shares of its width and height
        end,           # the same
        key=None,      # held down, e.g. "Shift"
    ):
        "Drag the mouse from one point to another; returns as `lasso` does."
        return self.lasso(selector, [start, end], steps=12, key=key)

    def screenshot(
        self,
        name,            # of the file, without .png
        selector=None,   # an element; None: the window
    ):
        "A picture in the folder of the test; returns its path."
        path = self.folder / f"{name}.png"
        (self.page.locator(selector).first if selector else self.page).screenshot(path=path)
        return path

    def still(
        self,
        selector,              # of an element
        timeout=patience(20),  # seconds
    ):
        "Wait until an element looks as it did 0.4 s before: drawn, and at rest."
        end, before = time.monotonic() + timeout, None
        while (now := self.page.locator(selector).first.screenshot()) != before:
            assert time.monotonic() < end, f"{selector} does not come to rest"
            before = now
            self.page.wait_for_timeout(400)

    def write(
        self,
        source,   # of the active cell
    ):
        "Write the active cell of JupyterLab's notebook anew."
        self.page.evaluate(
            "code => jupyterapp.shell.currentWidget.content.activeCell.model.sharedModel.setSource(code)", source)

    def memory(self) -> dict:
        "Megabytes of the page: JavaScript's heap, and what its process (with its GPU process) holds."
        metrics = self.page.context.new_cdp_session(self.page)
        metrics.send("Performance.enable")
        heap = {m["name"]: m["value"] for m in metrics.send("Performance.getMetrics")["metrics"]}["JSHeapUsedSize"]
        rss = {"renderer": 0, "gpu-process": 0}
        for p in psutil.Process().children(recursive=True):
            try: told, size = " ".join(p.cmdline()), p.memory_info().rss
            except psutil.Error: continue   # it has ended meanwhile, as those of closed pages do
            for kind in rss:
                if f"--type={kind}" in told: rss[kind] = max(rss[kind], size)
        return {"heap": round(heap / 2**20), **{kind: round(v / 2**20) for kind, v in rss.items()}}


@cache
def jupyterlab(
    python=sys.executable,
):
    "One JupyterLab per process (and Python), over all files; `(address, its folder)`."
    folder = Path(tempfile.mkdtemp(prefix="jupyterlab-"))
    ENDINGS.callback(shutil.rmtree, folder, ignore_errors=True)
    port = free_port()
    command = ["jupyterlab", "--no-browser", "--allow-root", "--ServerApp.ip=127.0.0.1", f"--ServerApp.port={port}",
               "--ServerApp.port_retries=0", "--IdentityProvider.token=t", f"--ServerApp.root_dir=/",
               "--LabApp.expose_app_in_browser=True"]   # `jupyterapp` in the page
    ENDINGS.enter_context(server(command, folder, port, python))
    return f"http://127.0.0.1:{port}", folder


def settled(folder):
    "JupyterLab's settings are those of tests again, whatever a test has changed."
    for plugin, values in SETTINGS.items():
        file = folder / "lab_settings" / "@jupyterlab" / f"{plugin}.jupyterlab-settings"
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(json.dumps(values))


@contextmanager
def lab(
    notebook,            # a file; a copy of it is opened
    folder,              # an empty folder, e.g. pytest's tmp_path
    size=(1150, 1000),   # of the window, pixels
    python=sys.executable,
):
    "The notebook in JupyterLab with its kernel ready; a `Notebook`."
    with browser(size) as (page, errors, blocked):
        address, runtime = jupyterlab(python)
        settled(runtime)
        work = folder / "work"
        work.mkdir()
        path = Path(shutil.copy(notebook, work)).resolve()
        page.goto(f"{address}/lab/workspaces/{uuid.uuid4().hex}/tree{path}?token=t", timeout=patience(60) * 1000)
        page.wait_for_selector(".jp-NotebookPanel .jp-Cell", timeout=patience(60) * 1000)
        page.wait_for_function("() => jupyterapp.shell.currentWidget?.sessionContext?.isReady",
                               timeout=patience(60) * 1000)
        page.wait_for_selector(".jp-Notebook-ExecutionIndicator[data-status='idle']", state="attached",
                               timeout=patience(60) * 1000)
        page.keyboard.press("Control+b")   # no file browser
        kernel = page.evaluate("jupyterapp.shell.currentWidget.sessionContext.session.kernel.id")
        notebook = Notebook(page, errors, blocked, folder, runtime, kernel)
        try: yield notebook
        finally:
            notebook.close()
            urlopen(Request(f"{address}/api/kernels/{kernel}?token=t", method="DELETE"), timeout=patience(20)).close()


@contextmanager
def voila(
    notebook,            # a file; a copy of it is served
    folder,              # an empty folder, e.g. pytest's tmp_path
    size=(1150, 1000),   # of the window, pixels
    ready=".lm-Widget",  # an element that is there when the page is
    options=(),          # further arguments of voila
):
    "The notebook as a page of voila, started in the project's folder, its cells run; a `Notebook`."
    with browser(size) as (page, errors, blocked):
        work = folder / "work"
        work.mkdir()
        shutil.copy(notebook, work)
        port = free_port()
        command = ["voila", str(work / Path(notebook).name), "--no-browser", f"--port={port}",
                   f"--Voila.connection_dir_root={folder / 'server'}", *options]
        with server(command, folder / "server", port, cwd=ROOT) as runtime:
            page.goto(f"http://127.0.0.1:{port}/", timeout=patience(120) * 1000)
            page.wait_for_selector(ready, timeout=patience(120) * 1000)
            notebook = Notebook(page, errors, blocked, folder, runtime)
            try: yield notebook
            finally: notebook.close()
