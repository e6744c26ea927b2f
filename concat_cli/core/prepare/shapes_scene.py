"""The built-in world: its classes, and one procedural scene of stuff regions and things, from a
seed.

Pixels are the same for a seed on every machine (see shapes_paint.py). Layout is in scene units:
the short side of a picture is 128 units long, so that objects scale with the picture.
"""

from __future__ import annotations

import difflib
from collections import Counter
from collections.abc import Collection
from dataclasses import dataclass
from typing import Any

import numpy as np

from concat_cli.core.errors import UserError
from concat_cli.core.prepare.shapes_paint import (
    PATTERNS,
    SHAPES,
    TEXTURES,
    Colour,
    FloatArray,
    Random,
    noise,
    pick_colours,
    second_colour,
    wave,
)
from concat_cli.core.vocabulary import ClassEntry, Vocabulary

# The rule of every split: each word of an unseen name (shape, pattern, texture, colouring) also
# occurs in the name of a seen class.
STUFF: tuple[str, ...] = tuple(TEXTURES)
THINGS: tuple[str, ...] = tuple(f"{pattern} {shape[0]}" for shape in SHAPES for pattern in PATTERNS)

# All 48 classes, 40 things and then 8 stuff, with data-set ids 1..48; all of them seen.
CLASSES = Vocabulary(
    tuple(ClassEntry(name, i + 1, kind="thing") for i, name in enumerate(THINGS))
    + tuple(ClassEntry(name, len(THINGS) + i + 1, kind="stuff") for i, name in enumerate(STUFF))
)

DEFAULT_UNSEEN: tuple[str, ...] = (
    "checkered circle", "dotted square", "striped triangle", "striped star", "outlined heart",
    "solid cross", "checkered ring", "dotted crescent", "green water", "grey wood",
)  # fmt: skip


def unseen_split(unseen: str = "", unseen_seed: int = -1) -> tuple[str, tuple[str, ...]]:
    """The split's name and its unseen class names, in class order.

    unseen: names between semicolons; "none": every class is seen (the upper bound of zero-shot
    results); empty: the default split, or the one of `unseen_seed` >= 0.
    UserError for an unknown name and for a set that breaks the rule.
    """
    if unseen.strip() == "none":
        return "all_seen", ()
    if unseen.strip():
        return "custom", _parse(unseen)
    if unseen_seed < 0:
        return "default", DEFAULT_UNSEEN
    if unseen_seed >= 1 << 64:
        raise UserError(f"unseen_seed {unseen_seed} is too large.", "Take one below 2^64.")
    return f"seed-{unseen_seed}", _drawn(unseen_seed)


def seen_indices(unseen: Collection[str]) -> tuple[int, ...]:
    """Class indices of the classes that are not named in `unseen`."""
    return CLASSES.with_unseen(unseen).seen_indices


def _drawn(seed: int) -> tuple[str, ...]:
    """Two stuff classes of two colourings and textures, and one thing of each shape with each
    pattern at most twice; never the default split."""
    rng = Random(seed)
    words = Counter(word for name in STUFF for word in name.split())
    able = [name for name in STUFF if all(words[word] > 1 for word in name.split())]
    while True:
        stuff = rng.sample(able, 2)
        extra = rng.sample(PATTERNS, len(SHAPES) - len(PATTERNS))
        patterns = rng.sample([*PATTERNS, *extra], len(SHAPES))
        names = {f"{p} {shape[0]}" for p, shape in zip(patterns, SHAPES, strict=True)}
        chosen = _ordered(names | set(stuff))
        if chosen != DEFAULT_UNSEEN and not _lost_words(chosen):
            return chosen


def _ordered(names: Collection[str]) -> tuple[str, ...]:
    return tuple(name for name in CLASSES.names if name in names)


def _lost_words(unseen: Collection[str]) -> list[str]:
    """Words of unseen names that no seen name holds."""
    seen = {word for name in CLASSES.names if name not in unseen for word in name.split()}
    return sorted({word for name in unseen for word in name.split()} - seen)


def _parse(text: str) -> tuple[str, ...]:
    """Names between semicolons (or commas), checked."""
    parts = (" ".join(part.lower().split()) for part in text.replace(",", ";").split(";"))
    names = {part for part in parts if part}
    for name in sorted(names):
        if name not in CLASSES.index_of_name:
            near = difflib.get_close_matches(name, CLASSES.names, n=3, cutoff=0.6)
            meant = " or ".join(f'"{n}"' for n in near)
            raise UserError(
                f'The built-in world has no class "{name}".',
                f"Did you mean {meant}?" if near else f"It has {THINGS[0]}, ..., {STUFF[-1]}.",
            )
    if not names:
        raise UserError(f"No class name in {text!r}.", 'Write "striped star; green water".')
    lost = _lost_words(names)
    if lost:
        holders = {word: [n for n in names if word in n.split()] for word in lost}
        raise UserError(
            "; ".join(f'no seen class would hold "{w}"' for w in lost).capitalize() + ".",
            f"Leave out one of: {', '.join(_ordered(holders[lost[0]]))}. "
            "Each shape, pattern, texture and colouring must be seen elsewhere.",
        )
    return _ordered(names)


SIDE = 128.0  # scene units along the short side
PARTS: tuple[str, ...] = ("train", "dev", "val", "clip", "clip_test")
SEED_BOUND = 1 << 28  # of the seed of a data set
_SHAPES = {name: (distance, least) for name, distance, least in SHAPES}
_LARGEST = 31.0  # greatest radius of a thing in scene units
_SHADOW = 3.0  # reach of a thing's shadow in scene units


@dataclass(frozen=True)
class Scene:
    """A drawn scene.

    image: (H, W, 3) uint8 RGB. segment_map: (H, W) int32, i+1 = segment i, covering every pixel.
    labels: (N,) int64 class indices into `CLASSES`.
    """

    image: np.ndarray
    segment_map: np.ndarray
    labels: np.ndarray


@dataclass(frozen=True)
class _Frame:
    """The picture's grid: pixels a scene unit, and the pixels' centres in scene units."""

    height: int
    width: int
    unit: float
    x: FloatArray  # (W,)
    y: FloatArray  # (H,)

    @staticmethod
    def of(size: int | tuple[int, int]) -> _Frame:
        height, width = (size, size) if isinstance(size, int) else size
        unit = min(height, width) / SIDE
        x, y = (
            (np.arange(n, dtype=np.float32) + 0.5) * np.float32(1.0 / unit) for n in (width, height)
        )
        return _Frame(height, width, unit, x, y)


@dataclass(frozen=True)
class _Thing:
    """A placed thing: its window, local coordinates and signed distance, all in scene units."""

    label: int
    radius: float
    rows: slice
    columns: slice
    x: FloatArray  # (h, w), rotated with the thing
    y: FloatArray
    light: FloatArray  # (h, w), -1 (lit) .. 1 (shaded)
    distance: FloatArray  # (h, w), negative inside


def scene_seed(part: str, seed: int, index: int) -> int:
    """The seed of scene `index` (0..2^32-1) of a part under a data set's seed (0..2^28-1).

    Part, seed and index lie in separate bits, so that no two scenes share a seed. `clip` and
    `clip_test` are the scenes of the built-in CLIP.
    """
    assert 0 <= seed < SEED_BOUND and 0 <= index < 1 << 32
    return (PARTS.index(part) + 1) << 60 | seed << 32 | index


def draw_scene(
    seed: int, size: int | tuple[int, int] = 128, allowed: Collection[int] | None = None
) -> Scene:
    """Draws the scene of a seed (0..2^64-1), `size` = side or (height, width) in pixels, with
    classes from `allowed` only (class indices, at least one stuff; None: all)."""
    indices = sorted(set(range(len(CLASSES)) if allowed is None else allowed))
    things = [i for i in indices if CLASSES.is_thing[i]]
    stuff = [i for i in indices if not CLASSES.is_thing[i]]
    assert stuff, "a scene needs at least one stuff class"
    rng, frame = Random(seed), _Frame.of(size)
    covers, segment_map = _regions(rng, frame, min(1 + _pick(rng, (0.25, 0.45, 0.3)), len(stuff)))
    labels = rng.sample(stuff, len(covers) + 1)
    placed = _place(rng, frame, segment_map, things, len(labels)) if things else []
    canvas = _paint_stuff(rng, frame, covers, labels)
    grounds = [TEXTURES[CLASSES.names[i]][1][1] for i in labels]
    for thing in placed:
        _paint_thing(rng, frame, canvas, thing, grounds)
    image: Any = np.rint(np.minimum(np.maximum(canvas, 0.0), 255.0)).astype(np.uint8)
    return Scene(
        image=np.ascontiguousarray(image.transpose(1, 2, 0)),
        segment_map=segment_map,
        labels=np.array(labels + [thing.label for thing in placed], dtype=np.int64),
    )


def _pick(rng: Random, weights: tuple[float, ...]) -> int:
    u = rng.uniform()
    for i, weight in enumerate(weights):
        u -= weight
        if u < 0:
            return i
    return len(weights) - 1


def _regions(rng: Random, frame: _Frame, count: int) -> tuple[list[FloatArray], np.ndarray]:
    """Wavy regions: coverages (H, W) of regions 2..count in painting order, and the segment map.

    Each region shows on at least a tenth of the picture.
    """
    area = frame.height * frame.width
    for _ in range(30):
        covers: list[FloatArray] = []
        segment_map = np.ones((frame.height, frame.width), dtype=np.int32)
        if count > 1:
            covers = _cut(rng, frame, count)
        for i, cover in enumerate(covers):
            segment_map[cover >= 0.5] = i + 2
        if min(np.bincount(segment_map.ravel(), minlength=count + 1)[1:]) >= 0.1 * area:
            return covers, segment_map
    return _regions(rng, frame, count - 1)


def _cut(rng: Random, frame: _Frame, count: int) -> list[FloatArray]:
    """One or two wavy cuts through the picture: a second line beside or across, or an island."""
    direction = rng.direction()
    if count == 2:
        if rng.uniform() < 0.25:
            return [_island(rng, frame)]
        return [_line(rng, frame, direction, rng.uniform(-20.0, 20.0))]
    way = rng.below(3)
    if way == 0:
        offsets = rng.uniform(-30.0, -16.0), rng.uniform(16.0, 30.0)
        return [_line(rng, frame, direction, offset) for offset in offsets]
    first = _line(rng, frame, direction, rng.uniform(-14.0, 14.0))
    if way == 1:
        return [first, _island(rng, frame)]
    across = _line(rng, frame, (-direction[1], direction[0]), rng.uniform(-16.0, 16.0))
    return [first, np.minimum(across, first)]


def _line(rng: Random, frame: _Frame, direction: tuple[float, float], offset: float) -> FloatArray:
    """Coverage of the half-plane beyond a wavy line, (H, W) in 0..1."""
    c, s = direction
    x, y = frame.x - 0.5 * frame.width / frame.unit, frame.y - 0.5 * frame.height / frame.unit
    along, beyond = (x * -s)[None] + (y * c)[:, None], (x * c)[None] + (y * s)[:, None]
    for length, height in ((rng.uniform(60.0, 100.0), 5.5), (rng.uniform(22.0, 38.0), 2.2)):
        swing = rng.uniform(0.5, 1.0) * height
        beyond = beyond + swing * wave(along * (1.0 / length) + rng.uniform())
    return np.minimum(np.maximum((beyond - offset) * frame.unit + 0.5, 0.0), 1.0)


def _island(rng: Random, frame: _Frame) -> FloatArray:
    """Coverage of a wavy round region, (H, W) in 0..1."""
    cx = frame.width / frame.unit * rng.uniform(0.2, 0.8)
    cy = frame.height / frame.unit * rng.uniform(0.2, 0.8)
    dx, dy = ((frame.x - cx) * rng.uniform(0.75, 1.0))[None], (frame.y - cy)[:, None]
    depth = rng.uniform(28.0, 38.0) - np.sqrt(dx * dx + dy * dy)
    depth = depth + (noise(rng, frame.x, frame.y, 22.0, 22.0) - 0.5) * 22.0
    return np.minimum(np.maximum(depth * frame.unit + 0.5, 0.0), 1.0)


def _place(
    rng: Random, frame: _Frame, segment_map: np.ndarray, allowed: list[int], first: int
) -> list[_Thing]:
    """Places 2-5 things into `segment_map` (in place, segments from `first` on).

    A thing lies at least 80% inside the picture; each earlier thing keeps 60% of itself in sight,
    each region a twentieth of the picture.
    """
    kept = [0.05 * segment_map.size] * first
    placed: list[_Thing] = []
    goal = 2 + rng.below(4)
    for _ in range(60):
        if len(placed) == goal:
            break
        thing, whole = _try_thing(rng, frame, rng.choice(allowed))
        inside = thing.distance <= 0.0
        count = int(inside.sum())
        if count < max(0.8 * whole, 40.0 * frame.unit * frame.unit):
            continue
        trial = np.array(segment_map[thing.rows, thing.columns])
        trial[inside] = first + len(placed) + 1
        left = np.bincount(segment_map.ravel(), minlength=len(kept) + 1)
        left -= np.bincount(segment_map[thing.rows, thing.columns][inside], minlength=len(kept) + 1)
        if all(left[i + 1] >= least for i, least in enumerate(kept)):
            segment_map[thing.rows, thing.columns] = trial
            kept.append(0.6 * count)
            placed.append(thing)
    return placed


def _try_thing(rng: Random, frame: _Frame, label: int) -> tuple[_Thing, int]:
    """A thing at a random place, cropped to the picture, and its whole area in pixels."""
    distance, least = _SHAPES[CLASSES.names[label].split()[1]]
    radius = rng.uniform(least, _LARGEST)
    cx = rng.uniform(0.08, 0.92) * frame.width / frame.unit
    cy = rng.uniform(0.08, 0.92) * frame.height / frame.unit
    c, s = rng.direction()
    reach = radius * 1.08 + _SHADOW
    x0, x1 = (int((cx + side * reach) * frame.unit) + (side > 0) for side in (-1, 1))
    y0, y1 = (int((cy + side * reach) * frame.unit) + (side > 0) for side in (-1, 1))
    step = np.float32(1.0 / frame.unit)
    dx = ((np.arange(x0, x1, dtype=np.float32) + 0.5) * step - cx)[None]
    dy = ((np.arange(y0, y1, dtype=np.float32) + 0.5) * step - cy)[:, None]
    x, y = dx * c + dy * s, dy * c - dx * s
    depth = distance(x * (1.0 / radius), y * (1.0 / radius)) * radius
    whole = int((depth <= 0.0).sum())
    light = (dx + dy) * (0.7 / radius)
    rows, columns = (
        slice(max(y0, 0), min(y1, frame.height)),
        slice(max(x0, 0), min(x1, frame.width)),
    )
    crop = slice(rows.start - y0, rows.stop - y0), slice(columns.start - x0, columns.stop - x0)
    return _Thing(label, radius, rows, columns, x[crop], y[crop], light[crop], depth[crop]), whole


def _paint_stuff(
    rng: Random, frame: _Frame, covers: list[FloatArray], labels: list[int]
) -> FloatArray:
    """The regions' textures under soft light, (3, H, W) float32 in 0-255."""
    canvas = np.empty((3, frame.height, frame.width), dtype=np.float32)
    for i, label in enumerate(labels):
        paint, colours = TEXTURES[CLASSES.names[label]]
        if i == 0:
            canvas[:] = np.stack(paint(frame.x, frame.y, frame.unit, colours, rng))
            continue
        rows, columns = (np.flatnonzero((covers[i - 1] > 0).any(axis=axis)) for axis in (1, 0))
        window = slice(rows[0], rows[-1] + 1), slice(columns[0], columns[-1] + 1)
        cover = covers[i - 1][window]
        rim = 1.0 - 0.5 * cover * (1.0 - cover)
        planes = paint(frame.x[window[1]], frame.y[window[0]], frame.unit, colours, rng)
        for plane, value in zip(canvas, planes, strict=True):
            under = plane[window]
            plane[window] = (under + (value - under) * cover) * rim
    glow = noise(rng, frame.x, frame.y, 90.0, 90.0) * 0.22 + 0.9
    canvas *= glow
    return canvas


def _paint_thing(
    rng: Random, frame: _Frame, canvas: FloatArray, thing: _Thing, grounds: list[Colour]
) -> None:
    """Paints a thing and its shadow onto the canvas, in place."""
    pattern = CLASSES.names[thing.label].split()[0]
    unit, distance = frame.unit, thing.distance
    first, second = pick_colours(rng, pattern, grounds)
    share = second_colour(pattern, thing.x, thing.y, -distance, thing.radius, unit, rng)
    cover = np.minimum(np.maximum(0.5 - distance * unit, 0.0), 1.0)
    edge = np.minimum(np.maximum(distance * 0.4 + 1.0, 0.0), 1.0)  # 0 deep inside .. 1 at the rim
    lit = 1.04 - 0.12 * thing.light - 0.12 * edge * edge
    shade = _shadow(distance, unit)
    window = canvas[:, thing.rows, thing.columns]
    for c in range(3):
        value = (
            lit * first[c] if share is None else lit * (share * (second[c] - first[c]) + first[c])
        )
        under = window[c] * shade
        window[c] = under + (value - under) * cover


def _shadow(distance: FloatArray, unit: float) -> FloatArray:
    """What a thing's shadow, cast down and to the right, leaves of the light under it."""
    step = max(int(1.5 * unit + 0.5), 1)
    cast = np.minimum(np.maximum(0.5 - distance * 0.35, 0.0), 1.0)
    shade = np.ones_like(distance)
    shade[step:, step:] -= 0.42 * cast[:-step, :-step]
    return shade
