"""Builds the site in `_docs/`: `python docs/build.py`. Warnings are errors."""
import shutil
import sys
from pathlib import Path

from sphinx.cmd.build import main

import pages

ROOT = Path(__file__).resolve().parents[1]


def build(work: Path, out: Path) -> int:
    "Pages from notebooks and package, HTML from pages; the exit status of Sphinx."
    shutil.rmtree(work, ignore_errors=True)
    pages.stage(ROOT, work)
    failed = main(["-W", "--keep-going", "-q", "-j", "auto", "-c", str(ROOT / "docs"), "-d", str(work / "doctrees"),
                   str(work / "pages"), str(work / "html")])
    if not failed:
        shutil.rmtree(out, ignore_errors=True)
        (work / "html").rename(out)
    return failed


if __name__ == "__main__":
    sys.exit(build(ROOT / "_proc", ROOT / "_docs"))
