"""What every single image adds to the scores, kept small: only classes that occur in it."""

from __future__ import annotations

from array import array
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from scipy.sparse import csr_array

FloatArray = NDArray[np.float64]


class SparseCounts:
    """`columns` figures for each image and class; about 35 bytes for a class in an image."""

    def __init__(self, columns: int, classes: int) -> None:
        self.columns, self.classes = columns, classes
        self._where = array("q")  # image number * classes + class
        self._values = array("d")  # `columns` of them for each of `_where`

    def add(self, image: int, counts: NDArray[np.number]) -> None:
        """The figures (columns, K) of an image, by its number."""
        found = np.flatnonzero(counts.any(0))
        self._where.frombytes((image * self.classes + found).astype(np.int64).tobytes())
        self._values.frombytes(counts[:, found].T.astype(np.float64).tobytes())

    def merge(self, other: SparseCounts) -> None:
        """Adds the images of another process."""
        assert (self.columns, self.classes) == (other.columns, other.classes)
        self._where.extend(other._where)
        self._values.extend(other._values)

    def matrix(self, images: int) -> csr_array:
        """The sparse (columns * K, M) matrix of the figures of M images."""
        where, values = np.frombuffer(self._where, np.int64), np.frombuffer(self._values)
        number, classes = np.divmod(where, self.classes)
        rows = np.arange(self.columns) * self.classes + classes[:, None]  # (n, columns)
        place = (rows.ravel(), number.repeat(self.columns))
        return csr_array((values, place), shape=(self.columns * self.classes, images))

    def dense(self, images: int) -> FloatArray:
        """(M, columns, K)."""
        found = self.matrix(images).toarray()
        return np.ascontiguousarray(found.T).reshape(images, self.columns, self.classes)

    def nbytes(self) -> int:
        """Bytes of memory."""
        return len(self._where) * self._where.itemsize + len(self._values) * self._values.itemsize


@dataclass(frozen=True)
class ImageCounts:
    """Counts of every image by class; None where a task was not scored.

    panoptic: summed IoU, TP, FP, FN. semantic: right, true and named pixels.
    """

    images: int
    panoptic: SparseCounts | None
    semantic: SparseCounts | None

    def dense_panoptic(self) -> FloatArray:
        """(M, 4, K), what `differences` computes with."""
        assert self.panoptic is not None, "panoptic quality was not scored"
        return self.panoptic.dense(self.images)


def merged(parts: Sequence[SparseCounts | None]) -> SparseCounts | None:
    """The counts of all processes; None where there are none."""
    there = [part for part in parts if part is not None]
    if not there:
        return None
    whole = SparseCounts(there[0].columns, there[0].classes)
    for part in there:
        whole.merge(part)
    return whole
