"""The rules of CI: which skips it allows, and what it says where Chromium is missing."""
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from waits import patience

HERE = Path(__file__).parent
TESTS = """
import pytest
@pytest.mark.browser
def test_page(): {page}
@pytest.mark.skipif(True, reason="needs CUDA")
def test_cuda(): pass
def test_other(): {other}
"""


@pytest.mark.parametrize("ci, page, other, status, said", [
    ("true", "pass", "pass", 0, "browser tests: 1 run, 0 skipped"),
    ("true", "pytest.skip('no Chromium')", "pass", 1, "skipped, which CI does not allow: test_small.py::test_page (no Chromium)"),
    ("true", "pass", "pytest.skip('not today')", 1, "skipped, which CI does not allow: test_small.py::test_other (not today)"),
    ("", "pytest.skip('no Chromium')", "pytest.skip('not today')", 0, "browser tests: 0 run, 1 skipped"),
])
def test_skips_in_ci(tmp_path, ci, page, other, status, said):
    for name in ("conftest.py", "longest.py"): shutil.copy(HERE / name, tmp_path)
    (tmp_path / "test_small.py").write_text(TESTS.format(page=page, other=other))
    env = {k: v for k, v in os.environ.items() if not k.startswith(("PYTEST_", "CI"))} | ({"CI": ci} if ci else {})
    done = subprocess.run([sys.executable, "-m", "pytest", "-p", "no:cacheprovider", tmp_path], env=env, cwd=tmp_path, capture_output=True, text=True,
                          timeout=patience(30))
    assert done.returncode == status and said in done.stdout and "   1  needs CUDA" in done.stdout, done.stdout


@pytest.mark.parametrize("tools, status, said", [
    ({"chromium": ""}, 0, ""),
    ({"id": "echo 1000"}, 1, "this machine has none, and it can be installed here only by root with apt-get"),
    ({"id": "echo 0", "apt-get": "echo no network >&2; exit 100"}, 1, "Debian's package chromium could not be installed; apt-get says why, above."),
    ({"id": "echo 0", "apt-get": "echo $1 $2 >&2"}, 0, "update -qq\ninstall -qq"),
])
def test_chromium_is_installed_or_the_reason_said(tmp_path, tools, status, said):
    "The function of .ci/run, with programs of the test's own."
    for name, does in tools.items():
        (tmp_path / name).write_text(f"#!/bin/sh\n{does}\n")
        (tmp_path / name).chmod(0o755)
    text = (HERE.parent / ".ci" / "run").read_text()
    function = text[text.index("\nbrowser() {"):]
    function = function[:function.index("\n}\n") + 3]
    env = {k: v for k, v in os.environ.items() if k != "DATASEL_CHROMIUM"} | {"PATH": str(tmp_path)}
    done = subprocess.run([shutil.which("bash"), "-c", function + "browser"], env=env, capture_output=True, text=True, timeout=patience(10))
    assert done.returncode == status and said in done.stderr, done.stderr
