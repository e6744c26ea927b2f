"""Folders of labelme's JSON files, one a picture -> what a COCO JSON of instances would list.

Corners are in pixels from the upper left corner of the picture, as on labelme's canvas; a mask is
read as it is drawn.
"""

from __future__ import annotations

import base64
import math
import posixpath
from array import array
from collections import Counter
from collections.abc import Mapping, Sequence
from contextlib import closing
from dataclasses import dataclass, replace
from pathlib import PurePosixPath, PureWindowsPath
from typing import Any, cast

from concat_cli.core.data.coco import CocoJson, Item, Segment, read_json
from concat_cli.core.data.json_values import Mask, is_text, odd, whole
from concat_cli.core.data.store import SUFFIXES, Held, file_exists, open_store
from concat_cli.core.errors import UserError
from concat_cli.core.prepare.recipes.layouts import join
from concat_cli.core.prepare.recipes.names import apart_path, joined, together
from concat_cli.core.prepare.recipes.pairs import numbered_items

_CORNERS = {"rectangle": 2, "circle": 2, "oriented_rectangle": 4, "mask": 2}
_KINDS = ("polygon", *_CORNERS)
_IGNORED = ("__ignore__", "_background_")  # labels by which labelme's examples mean no class
_FAR = 1 << 20  # pixels from a picture's corner, beyond any
_SAGITTA = 0.05  # pixels that a circle's outline may lie inside of the circle
_MEND = "Mend it in labelme, or move the file elsewhere."
_Size = tuple[int, int] | None


@dataclass(frozen=True)
class Labelme:
    """The location of the pictures, and what is listed of those that have a JSON; packed: as of
    `SourcePart`, where pictures have to be taken out of their JSONs."""

    images: str
    listed: CocoJson
    packed: Mapping[str, str]


def read_labelme(location: str, images: str = "") -> Labelme:
    """What the files below a location list; UserError naming the one that is wrong.

    Args:
        images: where the pictures are; by default where the JSONs' `imagePath` leads, and, if one
            is not there, inside its JSON.
    """
    read = [
        (name, found)
        for name in open_store(location).names()
        if name.lower().endswith(".json")
        for found in [_slim(read_json(join(location, name)))]
    ]
    files = [(name, found) for name, found in read if "shapes" in found]
    if not files:
        raise UserError(
            f"{location} holds no JSON of labelme ({len(read)} others): one has `shapes`.",
            "Give the folder that labelme saved to.",
        )
    left: Counter[str] = Counter()
    flagged: Counter[str] = Counter()
    paths = [_path(join(location, name), found) for name, found in files]
    folders = [posixpath.dirname(name) for name, _ in files]
    pairs = zip(folders, paths, strict=True)
    pictures = [posixpath.normpath(posixpath.join(*pair)) for pair in pairs]
    packed: dict[str, str] = {}
    if not images:
        places = [joined(apart_path(join(location, picture))) for picture in pictures]
        packed = _packed(location, files, places)
        images, pictures = (location, list(packed)) if packed else together(places)
    _refuse_twice(location, pictures, [name for name, _ in files])
    listed = zip(numbered_items(pictures), files, strict=True)
    shapes = [(item, *_shapes(join(location, name), found)) for item, (name, found) in listed]
    used = {str(row["label"]) for *_, rows in shapes for row in rows if _kind(row) in _KINDS}
    labels = sorted(used - {*_IGNORED})
    numbers = {label: number for number, label in enumerate(labels, 1)}
    items: list[Item] = []
    for (item, size, rows), (name, found) in zip(shapes, files, strict=True):
        flagged["pictures"] += _is_flagged(found)
        flagged["shapes"] += sum(map(_is_flagged, rows))
        segments = _segments(join(location, name), rows, size, numbers, left)
        items.append(replace(item, size=size, segments=segments))
    if not numbers:
        raise UserError(
            f"The {len(files)} files in {location} hold no shape.", "Draw some in labelme."
        )
    categories = [{"id": number, "name": label} for label, number in numbers.items()]
    notes = _notes(location, left, flagged, len(read) - len(files))
    if inside := sum(place.endswith(".json") for place in packed.values()):
        notes.append(
            f"{location}: {inside} pictures are in their JSON alone, so that all {len(packed)} are "
            "written once with what is prepared"
        )
    listed = CocoJson(location, "instance", categories, items, notes=tuple(notes))
    return Labelme(images, listed, packed)


def picture_in(location: str) -> bytes:
    """The picture that a JSON holds, as a file; UserError where it holds none."""
    data = read_json(location).get("imageData")
    try:
        return base64.b64decode(data or "", validate=True)
    except (TypeError, ValueError) as error:
        what = f"{location}: its `imageData` is no picture in base64 ({error})."
        raise UserError(what, _MEND) from error


def _packed(
    location: str, files: Sequence[tuple[str, dict[str, Any]]], places: Sequence[str]
) -> dict[str, str]:
    """Name -> the JSON that holds a picture, or the picture, which has its JSON's name; nothing
    where no picture has to be taken out of its JSON."""
    named = [
        posixpath.splitext(name)[0] + posixpath.splitext(p)[1]
        for (name, _), p in zip(files, places, strict=True)
    ]
    inside = [
        found["imageData"] and not file_exists(place)
        for (_, found), place in zip(files, places, strict=True)
    ]
    if not any(inside):
        return {}
    found = [
        join(location, file[0]) if held else p
        for file, held, p in zip(files, inside, places, strict=True)
    ]
    return dict(zip(named, found, strict=True))


def same_numbers(parts: Sequence[CocoJson]) -> list[CocoJson]:
    """Parts with all their classes under the same numbers: labelme's files list no classes, so that
    each part knows those alone that it holds."""
    names = sorted({row["name"] for part in parts for row in part.categories})
    categories = [{"id": number, "name": name} for number, name in enumerate(names, 1)]
    number_of = {row["name"]: row["id"] for row in categories}
    made: list[CocoJson] = []
    for part in parts:
        new = {row["id"]: number_of[row["name"]] for row in part.categories}
        items = [
            replace(
                item,
                segments=tuple(
                    replace(s, category_id=new[s.category_id]) for s in item.segments or ()
                ),
            )
            for item in part.items
        ]
        made.append(replace(part, categories=categories, items=items))
    return made


def _slim(found: dict[str, Any]) -> dict[str, Any]:
    """A file less the picture in it, of which so many would fill the memory: whether it has one."""
    return found | {"imageData": bool(found.get("imageData"))}


def _path(where: str, found: dict[str, Any]) -> str:
    """The picture's path as seen from its JSON; of one on another machine, the name alone."""
    path = found.get("imagePath")
    if not path or not is_text(path):
        raise UserError(f"{where}: {odd(found, 'imagePath', 'no text')}.", _MEND)
    windows = PureWindowsPath(path)
    return windows.name if windows.drive or windows.root else windows.as_posix()


def _refuse_twice(location: str, pictures: list[str], names: list[str]) -> None:
    owners: dict[str, str] = {}
    for picture, name in zip(pictures, names, strict=True):
        if (first := owners.setdefault(picture, name)) != name:
            raise UserError(
                f"{location}: {first} and {name} are both of the picture {picture}.",
                "Keep one of them.",
            )


def _shapes(where: str, found: dict[str, Any]) -> tuple[_Size, list[dict[str, Any]]]:
    """(height, width) if they are given, and the shapes with a label and a list of points each."""
    rows = found["shapes"]
    if not isinstance(rows, list):
        raise UserError(f"{where}: {odd(found, 'shapes', 'no list')}.", _MEND)
    try:
        given = [found.get(side) is not None for side in ("imageHeight", "imageWidth")]
        size = (whole(found, "imageHeight"), whole(found, "imageWidth")) if all(given) else None
    except ValueError as error:
        raise UserError(f"{where}: {error}.", _MEND) from error
    for number, row in enumerate(cast("list[Any]", rows), 1):
        try:
            if not isinstance(row, dict):
                raise ValueError("it is no object")
            row = cast("dict[str, Any]", row)
            if not is_text(row.get("label")) or not row["label"].strip():
                raise odd(row, "label", "no text")
        except ValueError as error:
            raise UserError(f"{where}: shape {number}: {error}.", _MEND) from error
    return size, cast("list[dict[str, Any]]", rows)


def _segments(
    where: str,
    rows: list[dict[str, Any]],
    size: _Size,
    numbers: dict[str, int],
    left: Counter[str],
) -> tuple[Segment, ...]:
    """The instances: shapes of one label and one `group_id` are parts of the same. left: counts
    shapes that cover nothing."""
    parts: dict[tuple[str, Any], list[Mask]] = {}
    for number, row in enumerate(rows, 1):
        kind = _kind(row)
        if row["label"] in _IGNORED:
            left[row["label"]] += 1
            continue
        try:
            mask = _mask(kind, row, size)
        except (ValueError, TypeError, OverflowError) as error:
            what = f"{where}: shape {number} ({row['label']!r}, {kind}): {error}."
            raise UserError(what, _MEND) from error
        if mask is None:
            left[kind] += 1
            continue
        group = row.get("group_id")
        key = (row["label"], ("shape", number) if group is None else ("group", str(group)))
        parts.setdefault(key, []).append(mask)
    try:
        return tuple(
            Segment(id, numbers[label], mask=_union(masks, size))
            for id, ((label, _), masks) in enumerate(parts.items(), 1)
        )
    except ValueError as error:
        raise UserError(f"{where}: {error}.", _MEND) from error


def _kind(row: dict[str, Any]) -> str:
    return str(row.get("shape_type") or "polygon")


def _mask(kind: str, row: dict[str, Any], size: _Size) -> Mask:
    """What a shape covers; None of points, lines and whatever else covers nothing."""
    if kind not in _KINDS:
        return None
    points = [(float(x), float(y)) for x, y in row.get("points") or ()]
    if not all(abs(value) < _FAR for point in points for value in point):  # False of NaN
        raise ValueError("a corner is no number of pixels")
    wanted = _CORNERS.get(kind, len(points))
    if kind == "rectangle" and len(points) == 4:  # as other programs write it
        wanted, kind = 4, "polygon"
    if len(points) != wanted:
        raise ValueError(f"it has {len(points)} points, not {wanted}")
    if kind == "mask":
        return _pixels(row, points, size)
    if kind == "rectangle":
        (x0, y0), (x1, y1) = points
        points = [(x0, y0), (x1, y0), (x1, y1), (x0, y1)]
    elif kind == "circle":
        (x, y), other = points
        radius = math.dist((x, y), other)
        count = max(8, math.ceil(math.pi * math.sqrt(radius / (2 * _SAGITTA))))
        turns = [2 * math.pi * step / count for step in range(count)]
        points = [(x + radius * math.cos(t), y + radius * math.sin(t)) for t in turns]
    if len(points) < 3:
        return None
    return [array("d", (value for point in points for value in point))]


def _pixels(row: dict[str, Any], points: list[tuple[float, float]], size: _Size) -> Mask:
    """The run lengths of a mask: a PNG of the pixels in a box, both corners included."""
    import numpy as np  # which no help text waits for
    from pycocotools import mask as coco_mask

    from concat_cli.core.data.image_io import BROKEN, MAX_PIXELS, open_image

    if size is None:
        raise ValueError("its picture has no `imageHeight` and `imageWidth`")
    if min(size) < 1 or size[0] * size[1] > MAX_PIXELS:
        raise ValueError(f"its picture is of {size[1]} x {size[0]} pixels")
    try:
        held = Held("in a shape", base64.b64decode(row["mask"], validate=True))
        with closing(open_image(held)) as image:
            found = np.asarray(image) > 0
    except BROKEN as error:
        raise ValueError(f"its `mask` is no PNG in base64 ({error})") from error
    (x0, y0), (x1, y1) = [(int(x), int(y)) for x, y in points]
    box = y1 - y0 + 1, x1 - x0 + 1
    if found.shape != box:
        raise ValueError(f"its `mask` has {found.shape} pixels, its box {box}")
    pixels = np.zeros(size, np.uint8, order="F")
    within = pixels[max(y0, 0) : max(y1 + 1, 0), max(x0, 0) : max(x1 + 1, 0)]
    top, left = max(-y0, 0), max(-x0, 0)
    within[:] = found[top : top + within.shape[0], left : left + within.shape[1]]
    packed: Any = coco_mask.encode(pixels)
    return {"size": list(size), "counts": packed["counts"].decode()}


def _union(masks: list[Mask], size: _Size) -> Mask:
    """The parts of an instance as one mask."""
    if all(isinstance(mask, list) for mask in masks):
        return [polygon for mask in cast("list[list[array[float]]]", masks) for polygon in mask]
    from pycocotools import mask as coco_mask  # as above

    from concat_cli.core.prepare.labels import encode_rle

    assert size is not None, "`_pixels` has refused a mask without"
    packed = [{"size": list(size), "counts": encode_rle(m, size).encode()} for m in masks]
    merged: Any = coco_mask.merge(cast("Any", packed))
    return {"size": list(size), "counts": merged["counts"].decode()}


def _is_flagged(row: dict[str, Any]) -> bool:
    flags = row.get("flags")
    return isinstance(flags, dict) and any(cast("dict[str, Any]", flags).values())


def _notes(location: str, left: Counter[str], flagged: Counter[str], others: int) -> list[str]:
    """What of the files is not read."""
    notes: list[str] = []
    if left:
        kinds = ", ".join(f"{count} {kind}" for kind, count in left.most_common())
        notes.append(
            f"{location}: {left.total()} shapes are left out, as they cover nothing or name no "
            f"class: {kinds}"
        )
    if flagged.total():
        notes.append(
            f"{location}: flags of {flagged['pictures']} pictures and {flagged['shapes']} shapes "
            "are set; they are not read"
        )
    if others:
        notes.append(f"{location}: {others} JSON files without `shapes` are none of labelme's")
    return notes


def without_json(images: str, items: list[Item]) -> str:
    """What to say of pictures beside labelled ones, on which nobody has drawn; "" of none."""
    labelled = {item.image for item in items}
    folders = {str(PurePosixPath(name).parent) for name in labelled}
    others = [
        name
        for name in open_store(images).names()
        if name.lower().endswith(tuple(SUFFIXES))
        and name not in labelled
        and str(PurePosixPath(name).parent) in folders
    ]
    if not others:
        return ""
    return (
        f"{images}: {len(others)} pictures have no JSON and are left out, such as {others[0]}; one "
        "without an object has a JSON without shapes"
    )
