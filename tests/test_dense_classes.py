"""`benchmarks/dense_classes.py`: memory does not grow with the number of classes."""

from __future__ import annotations

import sys

import pytest

from benchmarks.dense_classes import CHUNK, in_a_process

SIDE, WIDTH = 320, 64


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc, and sets glibc's allocator")
def test_memory_does_not_grow_beyond_one_chunk_of_classes() -> None:
    many = 16 * CHUNK

    def peak(how: str, classes: int) -> float:
        return in_a_process(how, classes, SIDE, WIDTH, 1, gives_back=True)["peak_mib"]

    logits = many * SIDE**2 * 4 / 2**20  # of all classes, at the size of the photo
    assert peak("chunks", many) < peak("chunks", many // 8) + 4 < logits / 2
    assert peak("at once", many) > logits
