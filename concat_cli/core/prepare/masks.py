"""Masks of instances as COCO writes them, by pycocotools, and in which order they are painted."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
from pycocotools import mask as coco_mask

from concat_cli.core.data.coco import Segment
from concat_cli.core.errors import UserError


def painted(
    segments: Mapping[int, Segment], size: tuple[int, int], image_id: int, where: str
) -> list[tuple[int, str]]:
    """Ids and run lengths in the order of painting: crowds, then the larger before the smaller.

    where: the file that lists them, as the UserError names it where a mask cannot be.
    """
    found: list[tuple[bool, int, int, str]] = []
    for number, segment in segments.items():
        try:
            counts = encode_rle(segment.mask, size)
        except (ValueError, TypeError, KeyError) as error:
            raise UserError(
                f"{where}: the mask of annotation {segment.id} of image {image_id} cannot be "
                f"read ({error}).",
                "Write the JSON again.",
            ) from error
        found.append((not segment.crowd, -rle_area(counts, size), number, counts))
    return [(number, counts) for _, _, number, counts in sorted(found)]


def decode_rle(counts: str, size: tuple[int, int]) -> np.ndarray:
    """(H, W) bool of compressed run lengths."""
    rle: Any = {"size": list(size), "counts": counts.encode()}
    return coco_mask.decode(rle).astype(bool)


def encode_rle(rle: Any, size: tuple[int, int]) -> str:
    """Compressed run lengths of polygons or of run lengths as a JSON holds them.

    ValueError, TypeError or KeyError where it is neither, or of another (height, width).
    """
    if isinstance(rle, list):
        if not rle or any(len(polygon) < 6 or len(polygon) % 2 for polygon in rle):
            raise ValueError("a polygon has fewer than three corners")
        _refuse_absurd(rle, size)
        merged: Any = coco_mask.merge(coco_mask.frPyObjects(rle, *size))
        return merged["counts"].decode()
    if tuple(rle["size"]) != size:
        raise ValueError(f"run lengths are of size {rle['size']}, the image is {list(size)}")
    if isinstance(rle["counts"], list):
        if any(type(count) is not int or count < 0 for count in rle["counts"]):
            raise ValueError("run lengths are no integers from 0 on")
        if sum(rle["counts"]) != size[0] * size[1]:
            raise ValueError("run lengths do not fill the image")
        rle = coco_mask.frPyObjects(rle, *size)
        return rle["counts"].decode()
    counts = str(rle["counts"])
    if _length(counts) != size[0] * size[1]:
        raise ValueError("run lengths do not fill the image")
    return counts


def rle_area(counts: str, size: tuple[int, int]) -> int:
    """Pixels of a mask."""
    rle: Any = {"size": list(size), "counts": counts.encode()}
    return int(coco_mask.area(rle))


def _refuse_absurd(polygons: Any, size: tuple[int, int]) -> None:
    """ValueError where an outline is no number or far longer than any in an image of that size can
    be: pycocotools would take memory for every fifth of a pixel along it."""
    longest = min(size[0] * size[1] + 10_000, 5_000_000)
    for polygon in polygons:
        corners = np.asarray(polygon, np.float64).reshape(-1, 2)
        near = np.abs(corners).max() <= longest  # False of NaN
        if not near or np.abs(np.diff(corners, axis=0, append=corners[:1])).sum() > 2 * longest:
            raise ValueError("a polygon leads far out of the image")


def _length(counts: str) -> int:
    """Pixels that compressed run lengths span: pycocotools itself does not look whether they fit.

    Each number is in groups of 5 bits from 48 on, bit 32 = more follow, bit 16 of the last = sign;
    from the third on it is the difference to the last but one.
    """
    lengths: list[int] = []
    value = shift = 0
    for letter in counts.encode("ascii"):
        code = letter - 48
        if not 0 <= code < 64:
            raise ValueError("run lengths hold a strange letter")
        value |= (code & 31) << shift
        shift += 5
        if shift > 60:
            raise ValueError("run lengths hold a number of more than 60 bits")
        if code & 32:
            continue
        if code & 16:
            value -= 1 << shift
        lengths.append(value + (lengths[-2] if len(lengths) > 2 else 0))
        if lengths[-1] < 0:
            raise ValueError("run lengths are negative")
        value = shift = 0
    if shift:
        raise ValueError("run lengths end within a number")
    return sum(lengths)
