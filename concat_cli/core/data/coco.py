"""COCO's JSON files, panoptic and of instances -> `Item`s; what is wrong in them is named."""

from __future__ import annotations

import json
from array import array
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Any, Literal, cast

from concat_cli.core.data.store import read_file
from concat_cli.core.errors import UserError

Truth = Literal["panoptic", "instance"]
_AGAIN = "Download or write the JSON again."
_NEEDED = {  # of each entry
    "images": ("id", "file_name"),
    "annotations": (),
    "categories": ("id", "name"),
}
_FORMS: dict[Truth, str] = {
    "panoptic": "Give the file whose annotations hold `segments_info`.",
    "instance": "Give the file whose annotations hold `segmentation`.",
}
_BAD = (KeyError, TypeError, ValueError, AttributeError)  # what a strange entry raises


@dataclass(frozen=True, slots=True)
class Segment:
    """One segment as a JSON lists it. `mask`: COCO run lengths or polygons, of instances alone."""

    id: int
    category_id: int
    crowd: bool = False
    mask: Any = None


@dataclass(frozen=True, slots=True)
class Item:
    """One image. Names are inside the part's stores, with "/".

    size: (height, width) where a JSON gives it; else it is read from the image.
    segments: where a JSON lists them; else they are found in the label's pixels.
    label: "" where there is no label file; second_label: of a map of things over `label`.
    """

    image_id: int
    image: str
    label: str = ""
    second_label: str = ""
    size: tuple[int, int] | None = None
    segments: tuple[Segment, ...] | None = None


@dataclass(frozen=True)
class CocoJson:
    """What a COCO JSON lists: its categories as they are, and its images in its order: the annotated
    ones of a panoptic JSON, all of one of instances."""

    location: str
    truth: Truth
    categories: list[dict[str, Any]]
    items: list[Item]


def read_coco(
    location: Path | str,
    truth: Truth | None = None,
    named: Callable[[dict[str, Any]], tuple[int, str]] | None = None,
) -> CocoJson:
    """Reads a JSON (also "x.zip!member"); UserError naming what is wrong with it.

    Args:
        truth: what its annotations must hold; None takes what they do.
        named: an entry of `images` -> image id and name of the file, where those are not as COCO's.
    """
    raw = _load(location)
    if truth is None:
        truth = _truth(location, raw)
    _check(location, raw, truth)
    read = _panoptic_items if truth == "panoptic" else _instance_items
    return CocoJson(
        str(location), truth, raw["categories"], read(str(location), raw, named or _named)
    )


Named = Callable[[dict[str, Any]], tuple[int, str]]


def _panoptic_items(where: str, raw: dict[str, Any], named: Named) -> list[Item]:
    images = {image["id"]: image for image in raw["images"]}
    items: list[Item] = []
    for annotation in raw["annotations"]:
        try:
            items.append(_panoptic_item(images[annotation["image_id"]], annotation, named))
        except _BAD as error:
            told = cast("dict[str, Any]", annotation) if isinstance(annotation, dict) else {}
            image = told.get("image_id", annotation)
            raise UserError(
                f"{where}: the annotation of image {image!r:.80} is incomplete or names an "
                f"image that is not listed ({error!r:.200}).",
                _AGAIN,
            ) from error
    if len({item.image_id for item in items}) < len(items):
        raise UserError(f"{where}: an image is annotated twice.", "Write the JSON again.")
    return items


def _panoptic_item(image: Any, annotation: Any, named: Named) -> Item:
    segments = tuple(map(_sound, annotation["segments_info"]))
    image_id, name = named(image)
    label = annotation.get("file_name") or PurePosixPath(name).with_suffix(".png").name
    if not _is_text(label):
        raise ValueError(f"the file name {label!r} is no text")
    return Item(image_id, name, label, size=_size(image), segments=segments)


def _instance_items(where: str, raw: dict[str, Any], named: Named) -> list[Item]:
    segments: dict[int, list[Segment]] = {image["id"]: [] for image in raw["images"]}
    for annotation in raw["annotations"]:
        try:
            image_id, segment = annotation
            segments[image_id].append(_sound(segment))
        except _BAD as error:
            raise UserError(
                f"{where}: the annotation {annotation!r:.80} is incomplete or names an "
                "image that is not listed.",
                _AGAIN,
            ) from error
    items: list[Item] = []
    for image in raw["images"]:
        try:
            found = tuple(sorted(segments[image["id"]], key=lambda segment: segment.id))
            items.append(Item(*named(image), size=_size(image), segments=found))
        except _BAD as error:
            what = f"{where}: the image {image['id']!r:.80} is not as it should be ({error})."
            raise UserError(what, _AGAIN) from error
    return items


def _is_text(value: Any) -> bool:
    """Whether it is a string that UTF-8 can hold: JSON can also write halves of characters."""
    return isinstance(value, str) and not any("\ud800" <= c <= "\udfff" for c in value)


def _sound(segment: Any) -> Segment:
    """The segment; ValueError where its ids are no integers (JSON also knows NaN)."""
    if not isinstance(segment, Segment):
        raise ValueError("a segment lacks id or category_id")
    if type(segment.id) is not int or type(segment.category_id) is not int:
        raise ValueError("an id or category_id of a segment is no integer")
    return segment


def _named(image: Any) -> tuple[int, str]:
    """Id and file name of an image; ValueError where they are of another type."""
    if not isinstance(image["id"], int | str) or not _is_text(image["file_name"]):
        raise ValueError("its id is no integer or its file_name no text")
    number = int(image["id"])
    if abs(number) >= 1 << 63:
        raise ValueError("its id has more than 64 bits")
    return number, image["file_name"]


def _size(image: Any) -> tuple[int, int] | None:
    """(height, width) where the JSON gives them; ValueError where they are no integers."""
    if "height" not in image or "width" not in image:
        return None
    height, width = image["height"], image["width"]
    if type(height) is not int or type(width) is not int:
        raise ValueError("its height and width are no integers")
    return height, width


def _load(location: Path | str) -> dict[str, Any]:
    data = read_file(location)
    try:
        raw: Any = json.loads(data, object_hook=_slim)
    except (ValueError, RecursionError) as error:  # also of bytes that are no text
        raise UserError(f"{location} is not valid JSON ({error}).", _AGAIN) from error
    if not isinstance(raw, dict):
        raise UserError(f"{location} holds a {type(raw).__name__}, not a JSON object.", _AGAIN)
    return cast("dict[str, Any]", raw)


def _slim(value: dict[str, Any]) -> Any:
    """Keeps of each segment and instance only what is needed, while the JSON is parsed: the whole
    of COCO's takes several times the memory."""
    if "category_id" not in value or "id" not in value:
        return value
    category, crowd = value["category_id"], bool(value.get("iscrowd", 0))
    if "image_id" in value:
        if "segmentation" not in value:
            return value
        mask = value["segmentation"]
        if isinstance(mask, list):  # polygons
            with suppress(TypeError, OverflowError):  # said when it is drawn
                mask = [array("d", polygon) for polygon in cast("list[Any]", mask)]
        return value["image_id"], Segment(value["id"], category, crowd, mask)
    return Segment(value["id"], category, crowd)


def _truth(location: Path | str, raw: dict[str, Any]) -> Truth:
    """What the first annotation holds; UserError where that is neither."""
    annotations = raw.get("annotations")
    listed = cast("list[Any]", annotations) if isinstance(annotations, list) else []
    first = listed[0] if listed else None
    if isinstance(first, dict) and "segments_info" in first:
        return "panoptic"
    if isinstance(first, tuple):
        return "instance"
    raise UserError(
        f"{location} has no annotation with `segments_info` or `segmentation`.",
        "Give a COCO JSON of panoptic segments or of instances with masks.",
    )


def _check(location: Path | str, raw: dict[str, Any], truth: Truth) -> None:
    """UserError where a list or a needed key is missing, or two images or categories are one."""
    missing = [key for key in _NEEDED if key not in raw]
    if missing:
        what = f"{location} is not a COCO {truth} JSON: it has no {' and no '.join(missing)}."
        raise UserError(what, _FORMS[truth])
    for key, needed in _NEEDED.items():
        if not isinstance(raw[key], list):
            raise UserError(f"{location}: `{key}` is no list.", _AGAIN)
        for row in raw[key]:
            if needed and not (isinstance(row, dict) and all(name in row for name in needed)):
                what = f"{location}: an entry of {key} lacks {' or '.join(needed)}."
                raise UserError(what, _AGAIN)
    for category in raw["categories"]:
        id_, name = category["id"], category["name"]
        if type(id_) is not int or not 0 <= id_ < 1 << 31 or not _is_text(name):
            what = f"{location}: the category {name!r:.80} with the id {id_!r:.80} cannot be."
            raise UserError(what, "An id is an integer from 0 on, a name is text.")
    if not all(isinstance(image["id"], int | str) for image in raw["images"]):
        raise UserError(f"{location}: the id of an image is neither number nor text.", _AGAIN)
    if len({image["id"] for image in raw["images"]}) < len(raw["images"]):
        raise UserError(f"{location}: an image is listed twice.", "Write the JSON again.")
    for column in ("id", "name"):
        values = [category[column] for category in raw["categories"]]
        if len(set(values)) < len(values):
            twice = next(v for v in values if values.count(v) > 1)
            what = f"{location}: two categories have the {column} {twice!r:.80}."
            raise UserError(what, "Each category has an id and a name of its own.")
