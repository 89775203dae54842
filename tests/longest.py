"""What takes longest, so that it starts first and no worker is left alone with it: no tests here.

    python tests/longest.py 2    # nbdev_test, two notebooks at a time, the longest first; seconds of each at the end

Each notebook has a process of its own: what one declares or sets is gone before the next. A name that is missing
costs balance, nothing else: it comes after those that are here.
"""
import builtins
import multiprocessing
import sys
from concurrent.futures import ProcessPoolExecutor, ThreadPoolExecutor
from pathlib import Path

NOTEBOOKS = ["find_noise", "06_weighting", "05_selectors", "07_scorer", "tour", "12_review", "results", "13_explorer",
             "guide_3_loop", "guide_3a_hf", "guide_3c_text", "10_translation", "09_tpu_trainer", "benchmarks",
             "12_pictures", "12_charts", "12_result_charts", "01_datasets", "10_mixtures", "08_trainer", "00_core"]
FILES = ["test_xla", "test_explorer_browser", "test_command", "test_xla_devices", "test_torchrun", "test_nmt_engines",
         "test_trainer", "test_docs", "test_widgets_browser", "test_explorer_data_browser", "test_nmt", "test_recipes",
         "test_review", "test_data", "test_notebooks", "test_viz"]


def place(
    name,    # of a file, without its ending
    names,   # NOTEBOOKS or FILES
) -> int:
    "Where in the order it starts."
    return names.index(name) if name in names else len(names)


def longest_first(paths, **kw):
    "`sorted`, as nbdev calls it for its notebooks; other calls as ever."
    if kw: return builtins.sorted(paths, **kw)
    return builtins.sorted(paths, key=lambda p: (place(Path(p).stem, NOTEBOOKS), str(p)))


def alone(run, notebook, **kw):
    "In a process of a fork server, where other processes begin as they do elsewhere."
    multiprocessing.set_start_method("fork", force=True)
    return run(notebook, **kw)


def apart(run, notebooks, n_workers, pause=0, **kw):
    "`parallel`, as nbdev calls it: so many at a time, each in a process that has imported what nearly all import."
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["nbdev.test", "torchvision", "pandas", "altair", "sklearn"])
    def one(notebook):
        with ProcessPoolExecutor(1, context) as process: return process.submit(alone, run, notebook, **kw).result()
    with ThreadPoolExecutor(n_workers) as threads: return list(threads.map(one, notebooks))


if __name__ == "__main__":
    import nbdev.test
    nbdev.test.sorted, nbdev.test.parallel = longest_first, apart
    nbdev.test.nbdev_test(n_workers=int(sys.argv[1]), timing=True)
