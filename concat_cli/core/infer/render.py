"""Pictures of predictions: translucent segments with outlines, names and scores drawn on them."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageDraw, ImageFont

from concat_cli.core.data.dataset import Sample
from concat_cli.core.data.image_io import from_strips, strips
from concat_cli.core.infer.colours import Colour, colours_of, luminance, usual
from concat_cli.core.vocabulary import Vocabulary

if TYPE_CHECKING:
    from concat_cli.core.infer.prediction import Prediction

Rect = tuple[int, int, int, int]  # left, top, right, bottom

FINE = 1 << 12  # pixels of a segment that its name is placed by: to within a fiftieth of its side
MIN_SIDE, MAX_SIDE = 512, 2048  # previews grow to the first, never beyond the second
FILL_THING, FILL_STUFF, EDGE, HATCH = 0.42, 0.28, 0.95, 0.2  # opacities
INK, PAPER = (24, 26, 31), (255, 255, 255)


@dataclass(frozen=True)
class Mark:
    """One segment to draw: its id in the map, name, kind, and score if it is a prediction."""

    id: int
    name: str
    thing: bool
    score: float | None = None

    @property
    def text(self) -> str:
        """What stands on the plate."""
        return self.name if self.score is None else f"{self.name}  {self.score:.2f}"


@dataclass(frozen=True)
class Drawing:
    """A map (H, W), 0 = nothing, the segments in it, and usual colours of classes by name."""

    segment_map: NDArray[np.integer]
    marks: tuple[Mark, ...]
    usual: Mapping[str, Colour] = field(default_factory=dict[str, Colour])

    @staticmethod
    def of_prediction(prediction: Prediction) -> Drawing:
        """Segments with names and scores."""
        kinds = prediction.vocabulary.is_thing
        marks = (
            Mark(s.id, prediction.name(s), kinds[s.class_index], s.score)
            for s in prediction.segments
        )
        return Drawing(prediction.panoptic_map, tuple(marks), usual(prediction.vocabulary))

    @staticmethod
    def of_sample(sample: Sample, vocabulary: Vocabulary) -> Drawing:
        """The truth, without scores."""
        marks = (
            Mark(i + 1, vocabulary.names[label], vocabulary.is_thing[label])
            for i, label in enumerate(map(int, sample.labels))
        )
        return Drawing(sample.segment_map, tuple(marks), usual(vocabulary))


def overlay(
    image: NDArray[np.uint8],
    drawing: Drawing | Prediction,
    min_area: float = 0.0008,
    scale: int = 1,
) -> Image.Image:
    """The picture (H, W, 3) with its segments, `scale` times as large.

    Segments below `min_area` (share of the picture) are coloured but not named.
    """
    drawing = drawing if isinstance(drawing, Drawing) else Drawing.of_prediction(drawing)
    canvas = np.asarray(enlarged(image, scale))
    segment_map = _enlarged_map(drawing.segment_map, scale)
    drawing = replace(drawing, segment_map=segment_map)
    areas = _areas(segment_map)
    colours = _colours(drawing, areas)
    picture = _tinted(canvas, drawing, colours)
    _draw_names(picture, segment_map, drawing.marks, areas, colours, min_area)
    return picture


def drawn_colours(prediction: Prediction) -> dict[int, Colour]:
    """The colour of each segment by its id, as `overlay` draws it."""
    return _colours(Drawing.of_prediction(prediction), _areas(prediction.panoptic_map))


def side_by_side(image: NDArray[np.uint8], truth: Drawing, prediction: Drawing) -> Image.Image:
    """Image, truth and prediction in a row, with captions; small ones enlarged."""
    scale = enlargement(*image.shape[:2])
    drawn = (overlay(image, one, scale=scale) for one in (truth, prediction))
    return panel([[enlarged(image, scale), *drawn]], captions=["image", "truth", "prediction"])


def stack(pictures: Sequence[Image.Image], gap: int = 12) -> Image.Image:
    """Pictures below one another."""
    return panel([[picture] for picture in pictures], gap=gap)


def panel(
    rows: Sequence[Sequence[Image.Image]],
    captions: Sequence[str] = (),
    gap: int = 12,
    background: Colour = PAPER,
) -> Image.Image:
    """A contact sheet: rows of pictures, each row at one height; captions stand above columns."""
    assert rows and all(rows), "a panel holds at least one picture a row"
    fitted = [_same_height(row) for row in rows]
    width = max(sum(p.width for p in row) + gap * (len(row) + 1) for row in fitted)
    font = _font(max(14, fitted[0][0].height // 24))
    top = gap + (int(font.size * 1.5) if captions else 0)
    height = top + sum(row[0].height + gap for row in fitted)
    sheet = Image.new("RGB", (width, height), background)
    draw = ImageDraw.Draw(sheet)
    for number, row in enumerate(fitted):
        left = gap
        for column, picture in enumerate(row):
            sheet.paste(picture, (left, top))
            if number == 0 and column < len(captions):
                draw.text((left, gap // 2), captions[column], INK, font=font)
            left += picture.width + gap
        top += row[0].height + gap
    return sheet


def enlargement(height: int, width: int) -> int:
    """The whole factor that brings the short side to about 512 pixels; 1 where it is near."""
    factor = min(math.ceil(MIN_SIDE / min(height, width)), MAX_SIDE // max(height, width))
    return max(1, factor) if min(height, width) < 0.75 * MIN_SIDE else 1


def _same_height(row: Sequence[Image.Image]) -> list[Image.Image]:
    height = max(picture.height for picture in row)
    return [
        picture
        if picture.height == height
        else picture.resize((max(1, round(picture.width * height / picture.height)), height))
        for picture in row
    ]


def _font(size: int) -> ImageFont.FreeTypeFont:
    """Pillow's built-in type."""
    font = ImageFont.load_default(size)
    assert isinstance(font, ImageFont.FreeTypeFont), "Pillow was built without FreeType"
    return font


def enlarged(image: NDArray[np.uint8], factor: int) -> Image.Image:
    """The picture (H, W, 3), a whole number of times as large."""
    size = (image.shape[1] * factor, image.shape[0] * factor)
    picture = Image.fromarray(image)
    return picture if factor == 1 else picture.resize(size, Image.Resampling.BICUBIC)


def _enlarged_map(segment_map: NDArray[np.integer], factor: int) -> NDArray[np.integer]:
    """Enlarged with smooth edges: each pixel goes to the segment that is strongest around it."""
    if factor == 1:
        return segment_map
    rows, columns = (_enlarging(side, factor) for side in segment_map.shape)
    best = np.full((len(rows), len(columns)), -1.0, np.float32)
    result = np.zeros(best.shape, np.int64)
    for value in np.unique(segment_map):
        mask = (segment_map == value).astype(np.float32)
        share = np.matmul(np.matmul(rows, mask), np.transpose(columns))
        better = np.greater(share, best)
        best[better], result[better] = share[better], value
    return result


def _enlarging(side: int, factor: int) -> NDArray[np.float32]:
    """(side * factor, side) weights: linear between the pixels, then twice the mean of as many
    neighbours as a pixel has become."""
    places = ((np.arange(side * factor) + 0.5) / factor - 0.5).clip(0, side - 1)
    weights = np.maximum(0, 1 - np.abs(places[:, None] - np.arange(side)))
    for _ in range(2):
        ends = ((factor // 2 + 1, factor - 1 - factor // 2), (0, 0))
        sums = np.pad(weights, ends, "symmetric").cumsum(0)
        weights = (sums[factor:] - sums[:-factor]) / factor
    return weights.astype(np.float32)


def _areas(segment_map: NDArray[np.integer]) -> NDArray[np.int64]:
    """Pixels of each id from 0 on."""
    top = int(segment_map.max(initial=0)) + 1
    areas = np.zeros(top, np.int64)
    for rows in strips(*segment_map.shape):
        areas += np.bincount(segment_map[rows].ravel(), minlength=top)
    return areas


def _colours(drawing: Drawing, areas: NDArray[np.int64]) -> dict[int, Colour]:
    """A colour per segment id; the largest segments choose first."""
    order = sorted(drawing.marks, key=lambda m: -(areas[m.id] if m.id < len(areas) else 0))
    names = {mark.id: mark.name for mark in order}
    return colours_of(names, drawing.usual, drawing.segment_map)


def _toned(colour: Colour, tone: float) -> Colour:
    """Towards white for a positive tone, towards black for a negative one."""
    goal = 255 if tone > 0 else 0
    red, green, blue = (round(c + (goal - c) * abs(tone)) for c in colour)
    return red, green, blue


def _tinted(canvas: NDArray[np.uint8], drawing: Drawing, colours: dict[int, Colour]) -> Image.Image:
    """The canvas with fills and outlines, and faintly hatched where there is no segment.

    What a value becomes is looked up, by the segment and by whether the pixel is inside of it, on
    its edge or on the dark hairline that keeps neighbours of like colour apart.
    """
    segment_map = drawing.segment_map
    top = int(segment_map.max(initial=0)) + 1
    light, dark, every = top, top + 1, top + 2  # lines of the hatch, beside the ids 0..top - 1
    colour, opacity = np.zeros((3, every, 3)), np.zeros((3, every))
    colour[:, light], opacity[0, light], opacity[0, dark] = 255, HATCH, HATCH
    for mark in drawing.marks:
        if mark.id < top:
            colour[:, mark.id] = colours[mark.id]
            opacity[:, mark.id] = FILL_THING if mark.thing else FILL_STUFF, EDGE, EDGE
    colour[2] *= 0.35
    alpha = opacity.reshape(-1, 1, 1)
    mixed = np.arange(256) * (1 - alpha) + colour.reshape(-1, 3, 1) * alpha
    table = np.moveaxis(np.round(mixed).astype(np.uint8), 1, 0).reshape(3, -1)  # of each channel
    side = math.sqrt(segment_map.size)
    width = max(1, round(side / 280))
    hatch = _hatch(segment_map, max(8, round(side / 40)), (light, dark))

    def tinted(rows: slice) -> NDArray[np.uint8]:
        around = slice(max(0, rows.start - width), rows.stop + width)  # as far as the edges look
        inner = slice(rows.start - around.start, rows.stop - around.start)
        near = segment_map[around]
        edges = _differs(near, width, width)[inner].astype(np.int32)
        edges += _differs(near, 1, 0)[inner]
        ids = np.where(segment_map[rows] == 0, hatch[rows], segment_map[rows])
        first = (ids + edges * every).astype(np.int32) * 256
        channels = [np.take(table[c], first + canvas[rows][..., c]) for c in range(3)]
        return np.stack(channels, -1)

    return from_strips((segment_map.shape[0], segment_map.shape[1]), tinted)


def _hatch(
    segment_map: NDArray[np.integer], period: int, lines: tuple[int, int]
) -> NDArray[np.int32]:
    """(H, W) the first value on diagonals that many pixels apart, the second beside them, else 0;
    a view of few numbers."""
    height, width = segment_map.shape
    diagonals = np.zeros((height + width, period), np.int32).ravel()[: height + width - 1]
    thick = max(1, period // 10)
    for number, value in enumerate(lines):
        for step in range(thick):
            diagonals[number * thick + step :: period] = value
    return np.lib.stride_tricks.sliding_window_view(diagonals, width)


def _differs(segment_map: NDArray[np.integer], before: int, after: int) -> NDArray[np.bool_]:
    """Whether the square from so many pixels before a pixel to so many after it holds more than
    one segment: then two neighbours in it differ."""
    return _near_steps(segment_map, before, after) | np.transpose(
        _near_steps(np.transpose(segment_map), before, after)
    )


def _near_steps(ids: NDArray[np.integer], before: int, after: int) -> NDArray[np.bool_]:
    """The like for neighbours above one another."""
    steps = np.zeros(ids.shape, bool)  # of a pixel from the one above it
    np.not_equal(ids[1:], ids[:-1], out=steps[1:])
    rows = _spread(steps, before - 1, after)
    return np.transpose(_spread(np.transpose(rows), before, after))


def _spread(marked: NDArray[np.bool_], before: int, after: int) -> NDArray[np.bool_]:
    """Whether any of the rows from so many before a row to so many after it is marked."""
    found = np.array(marked)
    for step in range(1, before + 1):
        found[step:] |= marked[:-step]
    for step in range(1, after + 1):
        found[:-step] |= marked[step:]
    return found


def _draw_names(
    picture: Image.Image,
    segment_map: NDArray[np.integer],
    marks: Sequence[Mark],
    areas: NDArray[np.int64],
    colours: dict[int, Colour],
    min_area: float,
) -> None:
    """Names from the smallest segment to the largest, each where it hides least."""
    font = _font(int(min(96, max(11, math.sqrt(segment_map.size) / 32))))
    draw = ImageDraw.Draw(picture)
    taken: list[Rect] = []
    named = [m for m in marks if m.id < len(areas) and areas[m.id]]
    for mark in sorted(named, key=lambda m: areas[m.id]):
        if areas[mark.id] < min_area * segment_map.size:
            continue
        pad = max(2, int(font.size) // 4)
        text = _fitting(mark, font, picture.width - 2 * pad - 4)
        left, _, right, _ = draw.textbbox((0, 0), text, font=font)
        size = (int(right - left) + 2 * pad, int(font.size * 1.1) + pad)
        rect = _place(segment_map == mark.id, size, taken, picture.size)
        taken.append(rect)
        plate = colours[mark.id]
        draw.rounded_rectangle(rect, radius=pad, fill=plate, outline=_toned(plate, -0.55))
        middle = (rect[0] + pad - int(left), (rect[1] + rect[3]) // 2)
        draw.text(middle, text, _contrast(plate), font=font, anchor="lm")


def _fitting(mark: Mark, font: ImageFont.FreeTypeFont, width: int) -> str:
    """The name and score, the name alone or its beginning: what has room in so many pixels."""
    cut = (f"{mark.name[:length]}.." for length in range(len(mark.name) - 1, 0, -1))
    texts = (mark.text, mark.name, *cut)
    return next((text for text in texts if font.getlength(text) <= width), mark.name[:1])


def _contrast(plate: Colour) -> Colour:
    """Dark or white type, whichever is further from the plate (WCAG relative luminance)."""
    return INK if luminance(plate) > 0.3 else PAPER


def _place(
    mask: NDArray[np.bool_], size: tuple[int, int], taken: Sequence[Rect], canvas: tuple[int, int]
) -> Rect:
    """A rectangle deep inside the mask, within the canvas, off the taken ones if possible."""
    width, height = size
    rows, columns = np.flatnonzero(mask.any(1)), np.flatnonzero(mask.any(0))
    top, left = rows[0], columns[0]
    box = mask[top : rows[-1] + 1, left : columns[-1] + 1]
    step = math.ceil(math.sqrt(box.size / FINE))
    if not box[::step, ::step].any():  # thinner than that
        step = 1
    depth = _depth(np.pad(box[::step, ::step], 1))  # beyond it is outside
    best: tuple[float, Rect] | None = None
    for _ in range(12):
        y, x = divmod(int(depth.argmax()), depth.shape[1])
        if depth[y, x] <= 0:
            break
        for shift in (0, -height - 2, height + 2):
            middle = int((x - 1) * step + left), int((y - 1) * step + top) + shift
            rect = _inside(*middle, width, height, canvas)
            cost = sum(_shared(rect, other) for other in taken) + 0.005 * abs(shift) * width
            if best is None or cost < best[0]:
                best = (cost, rect)
        if best[0] == 0:
            break
        up, aside = height // step, width // 2 // step
        near = slice(max(0, y - up), y + up), slice(max(0, x - aside), x + aside)
        depth[near] = 0  # look elsewhere in the segment
        depth[y, x] = 0
    assert best is not None, "the mask has at least one pixel"
    return best[1]


def _depth(mask: NDArray[np.bool_]) -> NDArray[np.float32]:
    """Squared distance of each pixel of a mask to the next one outside; those at its border must
    be. Along columns by counting, then over the pixels of a row (Felzenszwalb and Huttenlocher,
    Distance Transforms of Sampled Functions, 2012)."""
    if mask.shape[1] > mask.shape[0]:
        return np.transpose(_depth(np.transpose(mask)))
    rows = np.arange(len(mask), dtype=np.float32)[:, None]
    above = np.maximum.accumulate(np.where(mask, -1, rows), 0)
    below = np.minimum.accumulate(np.where(mask, len(mask), rows)[::-1], 0)[::-1]
    upright = np.minimum(rows - above, below - rows) ** 2
    places = np.arange(mask.shape[1], dtype=np.float32)
    return np.min(upright[:, None] + (places[:, None] - places) ** 2, axis=2)


def _inside(x: int, y: int, width: int, height: int, canvas: tuple[int, int]) -> Rect:
    """The rectangle around (x, y), moved into the canvas."""
    left = max(1, min(x - width // 2, canvas[0] - width - 2))
    top = max(1, min(y - height // 2, canvas[1] - height - 2))
    return left, top, left + width, top + height


def _shared(a: Rect, b: Rect) -> int:
    """Pixels that two rectangles share."""
    width = min(a[2], b[2]) - max(a[0], b[0])
    height = min(a[3], b[3]) - max(a[1], b[1])
    return max(0, width + 1) * max(0, height + 1)
