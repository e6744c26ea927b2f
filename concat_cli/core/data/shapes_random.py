"""Random numbers of the built-in world: integers first, so that they are the same everywhere.

Only integer arithmetic and the operations that IEEE 754 rounds exactly (+ - * / sqrt, min, max,
floor) are used in the world's drawing code; no library sine, no NumPy generator, no float sums.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TypeVar

import numpy as np

T = TypeVar("T")
FloatArray = np.ndarray

_MASK = (1 << 64) - 1
_GAMMA = 0x9E3779B97F4A7C15


def _mix(z: int) -> int:
    """SplitMix64's output function, a bijection of 64-bit integers (Steele et al. 2014)."""
    z = ((z ^ (z >> 30)) * 0xBF58476D1CE4E5B9) & _MASK
    z = ((z ^ (z >> 27)) * 0x94D049BB133111EB) & _MASK
    return z ^ (z >> 31)


class Random:
    """SplitMix64. Distinct seeds 0..2^64-1 start from distinct states."""

    def __init__(self, seed: int) -> None:
        assert 0 <= seed <= _MASK, "seeds are 64-bit"
        self.state = _mix(seed)

    def bits(self) -> int:
        """The next 64 bits."""
        self.state = (self.state + _GAMMA) & _MASK
        return _mix(self.state)

    def uniform(self, low: float = 0.0, high: float = 1.0) -> float:
        """A float in [low, high)."""
        return low + (high - low) * ((self.bits() >> 11) * 2.0**-53)

    def below(self, n: int) -> int:
        """An integer in 0..n-1."""
        return (self.bits() * n) >> 64

    def choice(self, items: Sequence[T]) -> T:
        """One of the items."""
        return items[self.below(len(items))]

    def sample(self, items: Sequence[T], n: int) -> list[T]:
        """n different positions' items, in random order."""
        pool = list(items)
        return [pool.pop(self.below(len(pool))) for _ in range(n)]

    def direction(self) -> tuple[float, float]:
        """Cosine and sine of a random angle, by the exact half-angle formula."""
        t = self.uniform(-1.0, 1.0)  # tan of half an angle in -pi/2..pi/2; nearly even
        c, s = (1 - t * t) / (1 + t * t), 2 * t / (1 + t * t)
        return (c, s) if self.bits() >> 63 else (-c, -s)

    def table(self, rows: int, columns: int) -> FloatArray:
        """(rows, columns) float32 in [0, 1)."""
        z = np.arange(rows * columns, dtype=np.uint64) * np.uint64(_GAMMA) + np.uint64(self.bits())
        z = (z ^ (z >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
        z = (z ^ (z >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
        return ((z >> np.uint64(40)).astype(np.float32) * (2.0**-24)).reshape(rows, columns)


def wave(turns: FloatArray) -> FloatArray:
    """A smooth periodic curve in -1..1, sine's parabola approximation; argument in turns."""
    x = turns - np.floor(turns)
    x *= 2.0
    x -= 1.0
    return x * (np.abs(x) - 1.0) * 4.0


def _cells(t: FloatArray) -> tuple[np.ndarray, FloatArray]:
    base = np.floor(t)
    f = t - base
    return (base - base[0]).astype(np.intp), f * f * (3.0 - 2.0 * f)


def noise(rng: Random, x: FloatArray, y: FloatArray, cell_x: float, cell_y: float) -> FloatArray:
    """Smooth value noise in 0..1, (h, w), over rising coordinates x (w,) and y (h,)."""
    (ix, fx), (iy, fy) = _cells(x / cell_x), _cells(y / cell_y)
    lattice = rng.table(int(iy[-1]) + 2, int(ix[-1]) + 2)
    left = lattice[:, ix]
    rows = left + (lattice[:, ix + 1] - left) * fx  # (lattice rows, w)
    top = rows[iy]  # (h, w)
    return top + (rows[iy + 1] - top) * fy[:, None]
