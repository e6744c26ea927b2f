"""Things of the built-in world: eight shapes as signed distances, five patterns, their colours."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np

from concat_cli.core.data.shapes_random import FloatArray, Random

Colour = tuple[float, float, float]

PALETTE: tuple[Colour, ...] = (
    (208, 42, 44),
    (238, 128, 28),
    (250, 208, 52),
    (142, 200, 58),
    (22, 132, 72),
    (20, 164, 168),
    (44, 96, 214),
    (30, 40, 112),
    (128, 58, 176),
    (218, 56, 148),
    (248, 168, 190),
    (246, 243, 236),
    (36, 34, 42),
    (98, 44, 28),
)


def _length(x: FloatArray, y: FloatArray) -> FloatArray:
    return np.sqrt(x * x + y * y)


def _circle(x: FloatArray, y: FloatArray) -> FloatArray:
    return _length(x, y) - 0.92


def _square(x: FloatArray, y: FloatArray) -> FloatArray:
    return np.maximum(np.abs(x), np.abs(y)) - 0.8


def _triangle(x: FloatArray, y: FloatArray) -> FloatArray:
    return np.maximum(0.8660254 * np.abs(x) - 0.5 * y, y) - 0.52


def _star(x: FloatArray, y: FloatArray) -> FloatArray:
    """Five points: the plane is folded into one tenth of the star, an edge is left."""
    kx, ky, inner = 0.809017, 0.5877853, 0.5
    px, py = np.abs(x), -y
    fold = 2.0 * np.maximum(kx * px - ky * py, 0.0)
    px, py = px - fold * kx, py + fold * ky
    fold = 2.0 * np.maximum(-kx * px - ky * py, 0.0)
    px, py = np.abs(px + fold * kx), py + fold * ky - 1.0
    ex, ey = inner * ky, inner * kx - 1.0
    along = np.minimum(np.maximum((px * ex + py * ey) / (ex * ex + ey * ey), 0.0), 1.0)
    distance = _length(px - ex * along, py - ey * along)
    return np.where(py * ex > px * ey, distance, -distance)


def _heart(x: FloatArray, y: FloatArray) -> FloatArray:
    """A turned square and two half discs."""
    px, py = np.abs(x) * 0.62, 0.56 - y * 0.62
    lobe = _length(px - 0.25, py - 0.75) - 0.3535534
    fold = np.maximum(px + py, 0.0) * 0.5
    edge = np.minimum(_length(px, py - 1.0), _length(px - fold, py - fold))
    body = np.where(px > py, edge, -edge)
    return np.where(px + py > 1.0, lobe, body) / 0.62


def _cross(x: FloatArray, y: FloatArray) -> FloatArray:
    ax, ay = np.abs(x), np.abs(y)
    return np.minimum(np.maximum(ax - 0.34, ay - 0.96), np.maximum(ay - 0.34, ax - 0.96))


def _ring(x: FloatArray, y: FloatArray) -> FloatArray:
    return np.abs(_length(x, y) - 0.7) - 0.27


def _crescent(x: FloatArray, y: FloatArray) -> FloatArray:
    shifted = x + 0.22
    return np.maximum(_length(shifted, y) - 0.98, 0.72 - _length(shifted - 0.62, y))


# Name, signed distance in units of the radius (negative inside), least radius in scene units.
SHAPES: tuple[tuple[str, Callable[[FloatArray, FloatArray], FloatArray], float], ...] = (
    ("circle", _circle, 12.0),
    ("square", _square, 12.0),
    ("triangle", _triangle, 14.0),
    ("star", _star, 15.0),
    ("heart", _heart, 13.0),
    ("cross", _cross, 14.0),
    ("ring", _ring, 15.0),
    ("crescent", _crescent, 15.0),
)
PATTERNS: tuple[str, ...] = ("solid", "striped", "dotted", "checkered", "outlined")


def _band(t: FloatArray, period: float, unit: float) -> FloatArray:
    """Anti-aliased 0/1 bands of half a period each."""
    t = t * (1.0 / period)
    t = np.abs(t - np.floor(t) - 0.5) * period - period * 0.25
    return np.minimum(np.maximum(t * unit + 0.5, 0.0), 1.0)


def _clip(value: float, low: float, high: float) -> float:
    return min(max(value, low), high)


def second_colour(
    pattern: str,
    x: FloatArray,
    y: FloatArray,
    inside: FloatArray,
    radius: float,
    unit: float,
    rng: Random,
) -> FloatArray | None:
    """Share of the second colour, (h, w) in 0..1; None for a solid thing.

    x, y: local coordinates; `inside`: depth below the edge; all in scene units, `unit` pixels each.
    """
    if pattern == "solid":
        return None
    if pattern == "striped":
        c, s = rng.direction()
        return _band(x * c + y * s + rng.uniform(0.0, 20.0), _clip(radius * 0.5, 7.0, 12.0), unit)
    if pattern == "dotted":
        pitch = _clip(radius * 0.42, 6.4, 10.5)
        gx, gy = x * (1.0 / pitch) + rng.uniform(), y * (1.0 / pitch) + rng.uniform()
        away = _length(gx - np.floor(gx) - 0.5, gy - np.floor(gy) - 0.5)
        return np.minimum(np.maximum((0.3 - away) * (pitch * unit) + 0.5, 0.0), 1.0)
    if pattern == "checkered":
        period = 2.0 * _clip(radius * 0.3, 4.2, 7.5)
        a = _band(x + rng.uniform(0.0, 20.0), period, unit)
        b = _band(y + rng.uniform(0.0, 20.0), period, unit)
        return a + b - 2.0 * a * b
    assert pattern == "outlined", pattern
    width = _clip(radius * 0.16, 2.4, 4.6)
    return np.minimum(np.maximum((width - inside) * unit + 0.5, 0.0), 1.0)


def _luma(c: Colour) -> float:
    return 0.3 * c[0] + 0.59 * c[1] + 0.11 * c[2]


def _apart(a: Colour, b: Colour) -> float:
    return 2 * (a[0] - b[0]) ** 2 + 4 * (a[1] - b[1]) ** 2 + 3 * (a[2] - b[2]) ** 2


def pick_colours(rng: Random, pattern: str, backgrounds: Sequence[Colour]) -> tuple[Colour, Colour]:
    """Two colours that differ in lightness and stand out against the backgrounds."""

    def draw() -> Colour:
        r, g, b = (v + rng.uniform(-12.0, 12.0) for v in rng.choice(PALETTE))
        return (r, g, b)

    best, best_score = (draw(), draw()), -1.0
    for _ in range(24):
        a, b = draw(), draw()
        used = (a,) if pattern == "solid" else (a, b)
        clear = min(_apart(c, ground) for c in used for ground in backgrounds)
        score = clear if pattern == "solid" else min(clear, 5 * (_luma(a) - _luma(b)) ** 2)
        if score > best_score:
            best, best_score = (a, b), score
        if score > 42000:
            break
    return best
