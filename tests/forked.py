"""Processes that begin with their imports done, forked from a server that did them once: no tests here.

    process = Forked(code, folder)   # as `python -c code folder`, or with a file as `python file folder`
    process.stdout.readline()
    process.send_signal(signal.SIGTERM)
    process.wait()

For tests of what a process does once it runs: how it is killed and resumed, what it says and saves. What is
imported, and how a command line is read, is asked of a `python` of its own.
"""
import multiprocessing
import os
import runpy
import subprocess
import sys
import threading
from functools import cache
from pathlib import Path

IMPORTED = ["torch._dynamo", "torchvision", "pandas", "altair", "sklearn.datasets", "tensorboard", "datasel_wb.trainer",
            "datasel_wb.experiments", "datasel_wb.tpu_trainer", "datasel_wb.translation", "datasel_wb.review"]


@cache
def server():
    "Of this process of pytest; started with the first process that it forks."
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(IMPORTED)
    return context


def begin(out, both, program, argv, env, cwd):
    "What a forked process does: it becomes the one that `python program` would be, in a session of its own."
    os.setsid()
    for stream in (1, 2) if both else (1,): os.dup2(out.fileno(), stream)
    out.close()
    os.environ.clear()
    os.environ.update(env)
    os.chdir(cwd)
    multiprocessing.set_start_method("fork", force=True)   # as elsewhere
    sys.argv = [str(program), *argv]
    if isinstance(program, Path):
        sys.path.insert(0, str(program.parent))
        runpy.run_path(str(program), run_name="__main__")
    else: exec(compile(program, "<program>", "exec"), {"__name__": "__main__"})


class Forked:
    "A forked process, with as much of `subprocess.Popen` as the tests use; `stdout` is a pipe of text."

    def __init__(
        self,
        program,      # Python code, or the path of a file
        *argv,        # its arguments
        env=None,     # its environment; that of the tests when None
        cwd=None,     # its folder; that of the tests when None
        stderr=None,  # subprocess.STDOUT: into `stdout` too; None: where that of the tests goes
    ):
        self.args, (out, inner) = [program, *map(str, argv)], server().Pipe(duplex=False)
        told = (program, self.args[1:], dict(env or os.environ), str(cwd or Path.cwd()))
        self.process = server().Process(target=begin, args=(inner, stderr == subprocess.STDOUT, *told))
        self.process.start()
        inner.close()
        self.stdout, self.pid = os.fdopen(os.dup(out.fileno()), encoding="utf-8", errors="replace"), self.process.pid
        out.close()

    @property
    def returncode(self): return self.process.exitcode

    poll = returncode.fget

    def wait(self, timeout=None):
        self.process.join(timeout)
        if self.returncode is None: raise subprocess.TimeoutExpired(self.args, timeout)
        return self.returncode

    def send_signal(self, signum):
        if self.poll() is None: os.kill(self.pid, signum)

    def kill(self): self.process.kill()

    def communicate(self, timeout=None):
        "What it says until it ends, and None, as for Popen with stderr=STDOUT; it is killed after `timeout` seconds."
        late = threading.Timer(timeout, self.kill) if timeout else None
        if late: late.start()
        said = self.stdout.read()
        if late: late.cancel()
        self.wait(timeout)
        return said, None
