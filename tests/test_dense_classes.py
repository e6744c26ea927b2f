"""`benchmarks/dense_classes.py`: memory does not grow with the number of classes."""

from __future__ import annotations

import runpy
import sys
from pathlib import Path

import pytest

SCRIPT = Path(__file__).parents[1] / "benchmarks" / "dense_classes.py"
SIDE, WIDTH = 320, 64


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc, and sets glibc's allocator")
def test_memory_does_not_grow_beyond_one_chunk_of_classes() -> None:
    script = runpy.run_path(str(SCRIPT))
    many = 16 * script["CHUNK"]

    def peak(how: str, classes: int) -> float:
        row = script["in_a_process"](how, classes, SIDE, WIDTH, 1, script["GIVES_BACK"])
        return row["peak_mib"]

    logits = many * SIDE**2 * 4 / 2**20  # of all classes, at the size of the photo
    assert peak("chunks", many) < peak("chunks", many // 8) + 4 < logits / 2
    assert peak("at once", many) > logits
