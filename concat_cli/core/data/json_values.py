"""Values in COCO's JSON files as people's tools write them -> what they stand for.

What has one obvious meaning is read; of everything else a ValueError says which field is odd.
"""

from __future__ import annotations

import hashlib
import reprlib
from array import array
from collections.abc import Mapping
from typing import Any, TypeAlias, cast

Mask: TypeAlias = "list[array[float]] | dict[str, Any] | str | None"
"""Polygons, [x, y, x, y, ...] each; run lengths, {"size": [height, width], "counts"}; None of what
covers nothing; or, as text, why it cannot be read, which matters once its image is wanted."""

_SHORT = reprlib.Repr()
_SHORT.maxlevel, _SHORT.maxstring, _SHORT.maxother = 2, 60, 60
_BOUND = 1 << 63
_FAR = 1 << 24  # beyond any picture
_FLAGS = {"0": False, "0.0": False, "false": False, "1": True, "1.0": True, "true": True}


def shown(value: Any) -> str:
    """A value as its file has it, in a few words."""
    return "null" if value is None else _SHORT.repr(value)


def whole(row: Mapping[str, Any], field: str) -> int:
    """A whole number of 64 bits, also where it is written as 7.0 or "7"."""
    number = _number(row.get(field))
    if number is None:
        raise odd(row, field, "no whole number")
    return number


def identity(row: Mapping[str, Any], field: str) -> int | str:
    """An id: a whole number, or text that is none."""
    value = row.get(field)
    number = _number(value)
    if number is not None:
        return number
    if not value or not is_text(value):
        raise odd(row, field, "neither a whole number nor text")
    return cast("str", value)


def numbered(found: int | str) -> int:
    """An id as a number: text becomes 48 bits of its SHA-256, so that it keeps its number when
    others come or go."""
    if isinstance(found, int):
        return found
    return int.from_bytes(hashlib.sha256(found.encode()).digest()[:6], "big")


def flag(row: Mapping[str, Any], field: str) -> bool | None:
    """0 or 1, also as true, 1.0 or "True"; None where it is null or missing."""
    value = row.get(field)
    if value is None:
        return None
    found = _FLAGS.get(str(value).strip().lower()) if isinstance(value, (str, int, float)) else None
    if found is None:
        raise odd(row, field, "neither 0 nor 1")
    return found


def is_text(value: Any) -> bool:
    """Whether it is a string that UTF-8 can hold: JSON can also write halves of characters."""
    return isinstance(value, str) and not any("\ud800" <= c <= "\udfff" for c in value)


def odd(row: Mapping[str, Any], field: str, why: str) -> ValueError:
    """The error of a field that is missing or holds what it cannot."""
    if field not in row:
        return ValueError(f"it has no `{field}`")
    return ValueError(f"its `{field}` is {shown(row[field])}, {why}")


def mask_of(value: Any) -> Mask:
    """An annotation's `segmentation`.

    Outlines may also be one flat list, pairs of x and y, lists nested once too often, or kwcoco's
    {"exterior": pairs} without holes. One of fewer than three corners covers nothing: the two
    corners of a box do not say what is in it.
    """
    if value is None:
        return None
    if isinstance(value, dict):
        if "exterior" not in value:
            return _run_lengths(cast("dict[str, Any]", value))
        value = [value]
    if not isinstance(value, list):
        return f"its `segmentation` is {shown(value)}"
    try:
        polygons = _polygons(cast("list[Any]", value))
    except (TypeError, ValueError, OverflowError):
        return f"its `segmentation` is {shown(value)}, no outline of numbers without holes"
    if any(len(polygon) % 2 for polygon in polygons):
        return "an outline has an x without a y"
    return [polygon for polygon in polygons if len(polygon) >= 6] or None


def short(polygons: list[array[float]], bbox: Any, area: Any) -> bool:
    """Whether outlines go through the centres of a mask's outer pixels, as OpenCV finds them, by
    what is listed beside them; COCO's go around the pixels, so these are a row and a column short.

    Their corners are whole, and the listed box is a pixel wider and higher than they are, or the
    listed area is their number of whole points, those on the line included (Pick's theorem).
    """
    if not all(value.is_integer() and abs(value) < _FAR for p in polygons for value in p):
        return False
    import numpy as np  # which no help text waits for

    corners = [np.array(polygon).reshape(-1, 2) for polygon in polygons]
    first = np.min([part.min(0) for part in corners], 0)
    sides = np.max([part.max(0) for part in corners], 0) - first
    if bbox == [*first.tolist(), *(sides + 1).tolist()]:
        return True
    points = 0.0
    for part in corners:
        steps = np.roll(part, -1, 0) - part
        twice = part[:, 0] * steps[:, 1] - part[:, 1] * steps[:, 0]
        points += abs(twice.sum()) / 2 + 1
        points += int(np.gcd.reduce(np.abs(steps).astype(int), 1).sum()) / 2
    return area == float(points)


def _number(value: Any) -> int | None:
    if type(value) is not int:
        if isinstance(value, str) and len(value) < 20 and value.isascii() and value.isdecimal():
            value = int(value)
        elif isinstance(value, float) and value.is_integer():
            value = int(value)
        else:
            return None
    return value if -_BOUND < value < _BOUND else None


def _run_lengths(value: dict[str, Any]) -> Mask:
    size, counts = value.get("size"), value.get("counts")
    sides = cast("list[Any]", size) if isinstance(size, list) else []
    if len(sides) != 2 or any(_number(side) is None for side in sides):
        return f"the `size` of its run lengths is {shown(size)}, not [height, width]"
    if not isinstance(counts, str | list):
        return f"the `counts` of its run lengths are {shown(cast('Any', counts))}"
    return {"size": [_number(side) for side in sides], "counts": counts}


def _polygons(value: list[Any]) -> list[array[float]]:
    """Every form as COCO's; TypeError, ValueError or OverflowError where it is no outline."""
    try:
        polygons = [array("d", polygon) for polygon in value]  # COCO's own form
    except TypeError:
        polygons = []
        while len(value) == 1 and isinstance(value[0], list) and value[0]:
            if not isinstance(value[0][0], list):
                break
            value = cast("list[Any]", value[0])
        if value and not any(isinstance(part, (list, dict)) for part in value):
            value = [value]
        for polygon in value:
            polygons.append(_joined(polygon))
    if len(polygons) > 2 and all(len(polygon) == 2 for polygon in polygons):
        return [array("d", (number for pair in polygons for number in pair))]
    return polygons


def _joined(polygon: Any) -> array[float]:
    """One outline, of which the corners may be pairs."""
    if isinstance(polygon, dict):
        outline = cast("dict[str, Any]", polygon)
        polygon = None if outline.get("interiors") else outline.get("exterior")
    if not isinstance(polygon, list):
        raise TypeError("no list of corners")
    polygon = cast("list[Any]", polygon)
    while len(polygon) == 1 and isinstance(polygon[0], list):
        polygon = cast("list[Any]", polygon[0])
    numbers: list[Any] = []
    for part in polygon:
        if not isinstance(part, list):
            numbers.append(part)
        elif len(cast("list[Any]", part)) == 2:
            numbers += part
        else:
            raise ValueError("a corner that is no pair")
    return array("d", map(float, numbers))
