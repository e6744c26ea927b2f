"""COCO's JSON files, panoptic and of instances -> `Item`s; what is wrong in them is named."""

from __future__ import annotations

import json
from array import array
from collections import Counter
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass, replace
from pathlib import Path, PurePosixPath
from typing import Any, Literal, cast

from concat_cli.core.data.store import read_file
from concat_cli.core.errors import UserError

Truth = Literal["panoptic", "instance"]
_AGAIN = "Download or write the JSON again."
_NEEDED = {"images": {"id", "file_name"}, "annotations": set[str](), "categories": {"id", "name"}}
_MASKS: dict[Truth, str] = {"panoptic": "segments_info", "instance": "segmentation"}
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
    raw = read_json(location, _slim)
    truth = truth or _truth(location, raw)
    _check(location, raw, truth)
    items = _items(str(location), raw, truth, named or _named)
    return CocoJson(str(location), truth, raw["categories"], items)


def _items(
    where: str,
    raw: dict[str, Any],
    truth: Truth,
    named: Callable[[dict[str, Any]], tuple[int, str]],
) -> list[Item]:
    images: dict[Any, Item] = {}
    for image in raw["images"]:
        try:
            images[image["id"]] = Item(*named(image), size=_size(image))
        except _BAD as error:
            what = f"{where}: the image {image['id']!r:.80} is not as it should be ({error})."
            raise UserError(what, _AGAIN) from error
    items: list[Item] = []
    segments: dict[Any, list[Segment]] = {key: [] for key in images}
    for annotation in raw["annotations"]:
        key = annotation
        try:
            if truth == "instance":
                key, segment = annotation
                segments[key].append(_sound(segment))
                continue
            key = annotation["image_id"]
            found = tuple(map(_sound, annotation["segments_info"]))
            name = PurePosixPath(images[key].image).with_suffix(".png").name
            label = annotation.get("file_name") or name
            if not _is_text(label):
                raise ValueError(f"the file name {label!r} is no text")
            items.append(replace(images[key], label=label, segments=found))
        except _BAD as error:
            raise UserError(
                f"{where}: the annotation of image {key!r:.80} is incomplete or names an "
                f"image that is not listed ({error!r:.200}).",
                _AGAIN,
            ) from error
    if len({item.image_id for item in items}) < len(items):
        raise UserError(f"{where}: an image is annotated twice.", "Write the JSON again.")
    if truth == "panoptic":
        return items
    return [
        replace(image, segments=tuple(sorted(segments[key], key=lambda segment: segment.id)))
        for key, image in images.items()
    ]


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
    if not _is_text(image["file_name"]):
        raise ValueError("its file_name is no text")
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


def read_json(
    location: Path | str, hook: Callable[[dict[str, Any]], Any] | None = None
) -> dict[str, Any]:
    """The object that a JSON file holds; UserError where it holds none. hook: as of `json.loads`."""
    data = read_file(location)
    try:
        raw: Any = json.loads(data, object_hook=hook)
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
    for key, needed in _NEEDED.items():
        if not isinstance(raw.get(key), list):
            what = f"{location} is not a COCO {truth} JSON: it has no {key}, or no list of them."
            raise UserError(what, f"Give the file whose annotations hold `{_MASKS[truth]}`.")
        for row in raw[key]:
            if needed and not (isinstance(row, dict) and needed <= row.keys()):
                what = f"{location}: an entry of {key} lacks {' or '.join(sorted(needed))}."
                raise UserError(what, _AGAIN)
    for category in raw["categories"]:
        id_, name = category["id"], category["name"]
        if type(id_) is not int or not 0 <= id_ < 1 << 31 or not _is_text(name):
            what = f"{location}: the category {name!r:.80} with the id {id_!r:.80} cannot be."
            raise UserError(what, "An id is an integer from 0 on, a name is text.")
    if not all(isinstance(image["id"], int | str) for image in raw["images"]):
        raise UserError(f"{location}: the id of an image is neither number nor text.", _AGAIN)
    for key, column in (("images", "id"), ("categories", "id"), ("categories", "name")):
        for value, count in Counter(row[column] for row in raw[key]).most_common(1):
            if count > 1:
                what = f"{location}: two {key} have the {column} {value!r:.80}."
                raise UserError(what, f"Each needs its own {column}: write the JSON again.")
