"""How long ``import graphprune`` takes, beside ``import torch`` alone.

    python tools/bench_import.py [--repeats 5]

Every import is a process of its own, and they take turns. Python's own start is in all of them and is taken off.
``compile`` is what the first call of :func:`graphprune.compile` needs imported; the package itself imports nothing of
it.
"""

from __future__ import annotations

import argparse
import statistics
import subprocess
import sys
import time
from collections.abc import Sequence

IMPORTS = {
    "python": "pass",
    "graphprune": "import graphprune",
    "torch": "import torch",
    "compile": "import graphprune; graphprune.compile",
}


def seconds(code: str) -> float:
    """Wall-clock seconds of a process that runs ``code``."""
    start = time.perf_counter()
    subprocess.run([sys.executable, "-c", code], check=True)
    return time.perf_counter() - start


def measure(repeats: int) -> dict[str, float]:
    """Name of an import → median seconds, less those of a bare Python."""
    for code in IMPORTS.values():  # reads the files from disk once
        seconds(code)
    found: dict[str, list[float]] = {name: [] for name in IMPORTS}
    for _ in range(repeats):
        for name, code in IMPORTS.items():
            found[name].append(seconds(code))
    medians = {name: statistics.median(values) for name, values in found.items()}
    bare = medians.pop("python")
    return {name: value - bare for name, value in medians.items()}


def main(argv: Sequence[str] | None = None) -> int:
    """Run the tool; returns the exit status."""
    parser = argparse.ArgumentParser(description="How long importing takes, beside torch alone.")
    parser.add_argument("--repeats", type=int, default=5)
    found = measure(parser.parse_args(argv).repeats)
    for name, value in found.items():
        print(f"{name:<12} {value:6.2f} s   {value / found['torch']:5.2f} of torch")
    return 0


if __name__ == "__main__":
    sys.exit(main())
