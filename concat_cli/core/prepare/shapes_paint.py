"""How the built-in world is painted: its random numbers, eight shapes in five patterns, and brick,
grass, water and wood in two colourings each.

Only integer arithmetic and the operations that IEEE 754 rounds exactly (+ - * / sqrt, min, max,
floor) are used in the world's drawing code, so that pixels are the same everywhere; no library
sine, no NumPy generator, no float sums.

A painter of stuff takes x (w,) and y (h,) in scene units, `unit` pixels each, and returns three
(h, w) float32 planes, 0-255.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, TypeVar

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
        unit: Any = (z >> np.uint64(40)).astype(np.float32) * (2.0**-24)
        return unit.reshape(rows, columns)


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


# Things

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


# Stuff

Planes = list[FloatArray]
Colours = tuple[Colour, Colour, Colour]


def _unit_clip(v: FloatArray) -> FloatArray:
    return np.minimum(np.maximum(v, 0.0), 1.0)


def _ramp(v: FloatArray, colours: Colours) -> Planes:
    """Three colours blended along v in 0..1."""
    low, high = np.minimum(v, 0.5) * 2.0, np.maximum(v, 0.5) * 2.0 - 1.0
    dark, middle, light = colours
    return [low * (middle[c] - dark[c]) + high * (light[c] - middle[c]) + dark[c] for c in range(3)]


def _brick(x: FloatArray, y: FloatArray, unit: float, colours: Colours, rng: Random) -> Planes:
    """Running bond: mortar, a tone per brick, a worn face and a lit upper edge."""
    mortar, dark, light = colours
    scale = rng.uniform(0.9, 1.15)
    width, height, joint = 21.0 * scale, 9.5 * scale, 0.75
    v = y[:, None] * (1.0 / height) + rng.uniform(0.0, 8.0)
    row = np.floor(v)
    half = row - 2.0 * np.floor(row * 0.5)
    u = x[None] * (1.0 / width) + (half * 0.5 + rng.uniform(0.0, 8.0))  # (h, w)
    column = np.floor(u)
    lx, ly = (u - column) * width, (v - row) * height
    edge = np.minimum(np.minimum(lx, width - lx), np.minimum(ly, height - ly)) - joint
    face = _unit_clip(edge * unit + 0.5)
    cell = (row.astype(np.intp) % 64) * 64 + column.astype(np.intp) % 64
    tone, tint = rng.table(1, 4096)[0].take(cell), rng.table(1, 4096)[0].take(cell)
    worn = noise(rng, x, y, 2.2, 1.8)
    mix = tone * 0.7 + worn * 0.3
    lit = 1.0 + 0.16 * _unit_clip(joint + 1.6 - ly) - 0.2 * _unit_clip(ly - height + joint + 1.6)
    lit = lit + (worn - 0.5) * 0.16
    grit = noise(rng, x, y, 1.3, 1.3) * 34.0 - 17.0
    shift = (8.0, -3.0, -6.0)
    planes: list[FloatArray] = []
    for c in range(3):
        brick = (mix * (light[c] - dark[c]) + dark[c] + (tint - 0.5) * shift[c]) * lit
        ground = grit + mortar[c]
        planes.append(ground + (brick - ground) * face)
    return planes


def _blades(
    x: FloatArray, y: FloatArray, unit: float, width: float, length: float, rng: Random
) -> tuple[FloatArray, FloatArray]:
    """One layer of pointed blades: coverage and brightness, both (h, w) in 0..1."""
    u = x * (1.0 / width) + rng.uniform(0.0, 8.0)
    column = np.floor(u)
    across = (u - column - 0.5) * width  # (w,)
    column = column.astype(np.intp) % 64
    v = y[:, None] * (1.0 / length) + rng.table(1, 64)[0].take(column)[None] * 8.0  # (h, w)
    row = np.floor(v)
    down = v - row  # 0 at the tip, 1 at the root
    cell = (row.astype(np.intp) % 64) * 64 + column[None]
    up = 1.0 - down
    bend = (rng.table(1, 4096)[0].take(cell) - 0.5) * (up * up) * (width * 0.75)
    half = down * (2.0 - down) * (width * 0.3)
    cover = _unit_clip((half - np.abs(across[None] - bend)) * unit + 0.5)
    tone = rng.table(1, 4096)[0].take(cell)
    return cover, (tone * 0.5 + 0.5) * (up * 0.65 + 0.35)


def _grass(x: FloatArray, y: FloatArray, unit: float, colours: Colours, rng: Random) -> Planes:
    """Three layers of blades over dark ground, with broad patches of light."""
    v = noise(rng, x, y, 3.0, 5.0) * 0.3
    for depth, (width, length) in enumerate(((3.1, 11.0), (3.9, 13.0), (4.7, 14.0))):
        cover, bright = _blades(x, y, unit, width, length, rng)
        v = v + (bright * (0.66 + 0.17 * depth) - v) * cover
    v = v + (noise(rng, x, y, 34.0, 26.0) - 0.5) * 0.36
    return _ramp(_unit_clip(v), colours)


def _water(x: FloatArray, y: FloatArray, unit: float, colours: Colours, rng: Random) -> Planes:
    """Wavelets: two trains of bent waves, thin crests and glints."""
    bent = noise(rng, x, y, 17.0, 8.0) * 1.5
    fine = noise(rng, x, y, 8.0, 4.0)
    rows = y[:, None]
    long = wave(rows * (1.0 / 11.0) + x[None] * (1.0 / 110.0) + bent)
    short = wave(rows * (1.0 / 5.2) - x[None] * (1.0 / 60.0) + bent * 0.8 + fine)
    v = long * 0.24 + short * 0.15 + fine * 0.2 + 0.3
    crest = _unit_clip(long * 0.7 + short * 0.6 - 0.72) * (0.35 + 0.65 * fine)
    return _ramp(_unit_clip(v + crest * 1.3), colours)


def _wood(x: FloatArray, y: FloatArray, unit: float, colours: Colours, rng: Random) -> Planes:
    """Planks with grain that bends into rings around knots."""
    if rng.bits() >> 63:
        turned: list[Any] = _planks(y, x, unit, colours, rng)
        return [plane.T for plane in turned]
    return _planks(x, y, unit, colours, rng)


def _planks(x: FloatArray, y: FloatArray, unit: float, colours: Colours, rng: Random) -> Planes:
    """Planks along x."""
    width = rng.uniform(24.0, 32.0)
    p = y * (1.0 / width) + rng.uniform(0.0, 8.0)  # (h,)
    plank = np.floor(p)
    within = (p - plank) * width
    seam = _unit_clip((np.minimum(within, width - within) - 0.55) * unit + 0.5)[:, None]
    tones = rng.table(1, 64)[0].take(plank.astype(np.intp) % 64)[:, None]
    rings = y[:, None] + noise(rng, x, y, 42.0, 11.0) * 15.0 + tones * 40.0
    for _ in range(3):
        kx = (x[None] - rng.uniform(float(x[0]), float(x[-1]))) * 0.42
        ky = y[:, None] - rng.uniform(float(y[0]), float(y[-1]))
        rings = rings + 190.0 / (kx * kx + ky * ky + 14.0)
    t = rings * (1.0 / 4.6)
    t = t - np.floor(t)
    late = np.minimum(t * t, (1.0 - t) * 5.0)  # slow darkening, then the sharp end of a year
    fibre = noise(rng, x, y, 16.0, 0.9)
    v = 0.98 - 0.5 * late + (fibre - 0.5) * 0.3 + (tones - 0.5) * 0.36 - 0.22
    return _ramp(_unit_clip(v) * (seam * 0.85 + 0.15), colours)


Painter = Callable[[FloatArray, FloatArray, float, Colours, Random], Planes]
# Texture and its three colours, dark to light (brick: mortar, dark, light).
TEXTURES: dict[str, tuple[Painter, Colours]] = {
    "red brick": (_brick, ((206, 196, 182), (128, 46, 36), (196, 88, 62))),
    "grey brick": (_brick, ((214, 212, 206), (92, 94, 100), (166, 168, 172))),
    "green grass": (_grass, ((16, 46, 14), (66, 134, 38), (158, 208, 84))),
    "yellow grass": (_grass, ((84, 58, 16), (198, 160, 54), (246, 226, 132))),
    "blue water": (_water, ((14, 56, 122), (48, 118, 192), (214, 238, 250))),
    "green water": (_water, ((6, 66, 60), (38, 138, 116), (204, 242, 222))),
    "brown wood": (_wood, ((48, 24, 10), (140, 86, 44), (206, 150, 92))),
    "grey wood": (_wood, ((46, 44, 42), (126, 122, 118), (196, 192, 186))),
}
