"""How long tests wait, in one place: no tests here.

A wait ends as soon as what it waits for is there; only its limit is here, so patience costs nothing on a quick machine. Limits are written
for a quiet machine with two cores, and `PATIENCE` makes them hold on one that is several times slower; `DATASEL_PATIENCE` sets another factor.
"""
import os
import time

PATIENCE = float(os.environ.get("DATASEL_PATIENCE", 4))
REFERENCE = 0.08   # seconds of `work` on a quiet core


def patience(
    seconds,   # enough on a quiet machine
) -> float:
    "Seconds after which a wait is given up."
    return PATIENCE * seconds


def work() -> float:
    "Seconds that a fixed piece of work takes just now."
    begin = time.perf_counter()
    total = 0
    for k in range(1_000_000): total += k * k % 7
    return time.perf_counter() - begin


def slowness() -> float:
    """How many times slower this machine is just now than a quiet one: by a piece of work, or by the processes that share a core. At least 1;
    bounds on speed are multiplied by it."""
    return max(1.0, sum(work() for _ in range(3)) / 3 / REFERENCE, os.getloadavg()[0] / os.cpu_count())
