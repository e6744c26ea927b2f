"""What the scripts share that time two sides by turns, a process each."""

from __future__ import annotations

import os
import statistics
import subprocess
import time
from collections.abc import Sequence
from pathlib import Path

# Runs what it is given and prints the peak of its memory in KiB, last. A process begins with the
# peak of the one that started it, so that this one is small.
PEAK = """import resource, subprocess, sys
subprocess.run(sys.argv[1:], check=True)
print(resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss)"""


def seconds(command: Sequence[str], folder: Path | str, checkout: Path | None = None) -> float:
    """Wall time of a command in a folder, which must succeed; of a checkout's package, if given."""
    path = {} if checkout is None else {"PYTHONPATH": str(checkout)}
    start = time.perf_counter()
    subprocess.run(command, cwd=folder, check=True, capture_output=True, env=os.environ | path)
    return time.perf_counter() - start


def verdict(ratios: Sequence[float], target: float) -> str:
    """The median of paired ratios with its quartiles, and whether it meets a target."""
    low, middle, high = statistics.quantiles(ratios, n=4)
    met = "met" if middle <= target else "MISSED"
    return f"{middle:.3f} (quartiles {low:.3f}-{high:.3f}), <= {target}: {met}"
