"""Pictures as a page holds them: small, and bounded whatever is in them."""

from __future__ import annotations

import io
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from concat_cli.core.data.image_io import runs

SIDE = 480  # of a picture on the page, in pixels
MOST_BYTES = 60_000  # of a photo
MOST_RUNS = 8_000  # of a map
QUALITIES = (80, 65, 45, 25, 10)


@dataclass(frozen=True)
class Picture:
    """An image with its true and its predicted segments.

    photo: WebP, None where there is no photo. size: height and width. truth, found: (value, length)
    of the runs of the maps, row by row, one after the other; 0 = nothing, i+1 = segment i.
    """

    photo: bytes | None
    size: tuple[int, int]
    truth: tuple[int, ...]
    found: tuple[int, ...]


def picture_of(
    photo: NDArray[np.uint8] | None,
    truth: NDArray[np.integer],
    found: NDArray[np.integer],
) -> Picture:
    """The picture (H, W, 3) and the maps (H, W), as small as the page needs them."""
    side = min(SIDE, max(truth.shape))
    while True:
        maps = [_shrunk(one, side) for one in (truth, found)]
        truth_runs, found_runs = map(_runs, maps)
        if max(len(truth_runs), len(found_runs)) <= 2 * MOST_RUNS:
            break
        side = side * 3 // 4
    height, width = maps[0].shape
    small = None if photo is None else webp(Image.fromarray(photo), SIDE, MOST_BYTES)
    return Picture(small, (height, width), truth_runs, found_runs)


def webp(image: Image.Image, side: int, most: int) -> bytes:
    """The image as WebP of at most so many pixels a side and, as far as quality goes, bytes."""
    image = image.convert("RGB")
    image.thumbnail((side, side), Image.Resampling.LANCZOS)
    data = b""
    for quality in QUALITIES:
        buffer = io.BytesIO()
        image.save(buffer, "WEBP", quality=quality, method=4)
        data = buffer.getvalue()
        if len(data) <= most:
            break
    return data


def _shrunk(values: NDArray[np.integer], side: int) -> NDArray[np.integer]:
    """Every so manyth value, so that the longer side has `side`; never enlarged."""
    longest = max(values.shape)
    if longest <= side:
        return values
    rows, columns = (
        ((np.arange(max(1, n * side // longest)) + 0.5) * n / max(1, n * side // longest)).astype(
            int
        )
        for n in values.shape
    )
    return values[rows[:, None], columns]


def _runs(values: NDArray[np.integer]) -> tuple[int, ...]:
    return tuple(np.stack(runs(values), 1).ravel().tolist())
