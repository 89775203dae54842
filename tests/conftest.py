"""Order of the tests, and what was skipped: in CI only what needs hardware or data that the machine does not have may be."""
import os
import sys
from collections import Counter
from pathlib import Path

for name, value in (("OMP_NUM_THREADS", "1"), ("OMP_WAIT_POLICY", "PASSIVE")):
    os.environ.setdefault(name, value)   # before anything imports PyTorch

import pytest

from longest import FILES, place

os.environ.setdefault("XLA_FLAGS", "--xla_backend_optimization_level=1")   # a step compiles in two thirds of the time, and runs as fast

ALLOWED = ["needs CUDA", "this machine has CUDA"] + ([] if os.environ.get("DATASEL_DATA") else ["DATASEL_DATA names no folder"])   # beginnings of reasons
SKIPS, WRONG = pytest.StashKey[Counter](), pytest.StashKey[list]()


def pytest_configure(config):
    config.addinivalue_line("markers", "browser: opens a page in Chromium; a skip is a failure where CI is set")


def pytest_collection_modifyitems(items):
    "The longest files first; within a file as written."
    items.sort(key=lambda item: place(item.path.stem, FILES))


def in_browser(report) -> bool:
    "Whether the test is marked as one that opens a page; a file that is skipped whole has no marks."
    return "browser" in getattr(report, "keywords", ())


def reason(report) -> str:
    "Why a report says 'skipped'."
    said = report.longrepr[2] if isinstance(report.longrepr, tuple) else str(report.longrepr)
    return said.removeprefix("Skipped: ")


@pytest.hookimpl(tryfirst=True)
def pytest_sessionfinish(session):
    "Servers and browsers end. Count the skips; in CI a skip for any other reason than ALLOWED fails, and that of a browser test always does."
    if "browser" in sys.modules: sys.modules["browser"].ENDINGS.close()
    reporter = session.config.pluginmanager.get_plugin("terminalreporter")
    if reporter is None or hasattr(session.config, "workerinput"): return
    skipped = reporter.stats.get("skipped", [])
    session.config.stash[SKIPS] = Counter(map(reason, skipped))
    wrong = [r for r in skipped if in_browser(r) or not reason(r).startswith(tuple(ALLOWED))]
    session.config.stash[WRONG] = wrong if os.environ.get("CI") else []
    if session.config.stash[WRONG] and session.exitstatus == pytest.ExitCode.OK: session.exitstatus = pytest.ExitCode.TESTS_FAILED


def pytest_terminal_summary(terminalreporter, config):
    "The skips by reason, the browser tests, and in CI what should not have been skipped."
    done = [r for kind in ("passed", "failed") for r in terminalreporter.stats.get(kind, []) if r.when == "call" and in_browser(r)]
    left = [r for r in terminalreporter.stats.get("skipped", []) if in_browser(r)]
    terminalreporter.section("skips by reason")
    for why, n in config.stash.get(SKIPS, Counter()).most_common(): terminalreporter.line(f"{n:4}  {why}")
    terminalreporter.line(f"browser tests: {len(done)} run, {len(left)} skipped")
    for r in config.stash.get(WRONG, []): terminalreporter.line(f"skipped, which CI does not allow: {Path(r.nodeid)} ({reason(r)})", red=True)
