"""Import time of the names that people use most, against torch itself: `python tests/import_time.py`."""
import statistics
import subprocess
import sys

NAMES = ("Task", "DDS", "DataParameters")
STATEMENTS = ("import torch", *(f"from datasel_wb import {name}" for name in NAMES))


def seconds(statement: str) -> float:
    "User and system time of a statement in a fresh process, which a busy machine changes little."
    code = f"import os\nbefore = sum(os.times()[:2])\n{statement}\nprint(sum(os.times()[:2]) - before)"
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    return float(run.stdout)


def measure(rounds: int = 7) -> dict:
    "Median seconds of each statement; the statements take turns."
    taken = {s: [] for s in STATEMENTS}
    for _ in range(rounds):
        for s in STATEMENTS: taken[s].append(seconds(s))
    return {s: statistics.median(v) for s, v in taken.items()}


if __name__ == "__main__":
    found = measure(int(sys.argv[1]) if sys.argv[1:] else 7)
    print("| statement | seconds | against `import torch` |\n|---|---|---|")
    for s, v in found.items(): print(f"| `{s}` | {v:.2f} | {v / found['import torch']:.2f} |")
