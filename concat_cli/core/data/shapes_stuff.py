"""Stuff of the built-in world: brick, grass, water and wood, each in two colourings.

A painter takes x (w,) and y (h,) in scene units, `unit` pixels each, and returns three (h, w)
float32 planes, 0-255.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np

from concat_cli.core.data.shapes_random import FloatArray, Random, noise, wave
from concat_cli.core.data.shapes_things import Colour

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
    planes = []
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
        return [p.T for p in _planks(y, x, unit, colours, rng)]
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
