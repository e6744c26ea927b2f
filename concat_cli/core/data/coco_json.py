"""COCO's JSON files, panoptic and of instances -> `Item`s; what is wrong in them is named."""

from __future__ import annotations

import json
from array import array
from collections.abc import Callable, Collection
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Any

from concat_cli.core.data.index import Record, Row
from concat_cli.core.data.source import Item, Segment
from concat_cli.core.data.store import read_file
from concat_cli.core.errors import UserError
from concat_cli.core.vocabulary import Vocabulary

_AGAIN = "Download or write the JSON again."
_FORMS = {
    "panoptic": "Give the file whose annotations hold `segments_info`.",
    "instance": "Give the file whose annotations hold `segmentation`.",
}


@dataclass(frozen=True)
class CocoJson:
    """What a COCO JSON lists: its categories as they are, and the annotated images in its order."""

    location: str
    categories: list[dict[str, Any]]
    items: list[Item]


def read_panoptic_json(path: Path | str) -> dict[str, Any]:
    """A COCO panoptic JSON with `images`, `annotations` and `categories`; UserError otherwise."""
    return _checked(path, _load(path), "panoptic")


def read_panoptic(location: Path | str) -> CocoJson:
    """The images of a panoptic JSON (also "x.zip!member") with their segments and PNG names."""
    raw = _checked(location, _load(location, _slim), "panoptic")
    images = {image["id"]: image for image in raw["images"]}
    items: list[Item] = []
    for annotation in raw["annotations"]:
        try:
            items.append(_panoptic_item(images[annotation["image_id"]], annotation))
        except (KeyError, TypeError, ValueError, AttributeError) as error:
            where = annotation.get("image_id") if isinstance(annotation, dict) else annotation
            raise UserError(
                f"{location}: the annotation of image {where!r:.80} is incomplete or names an "
                f"image that is not listed ({error!r:.200}).",
                _AGAIN,
            ) from error
    if len({item.image_id for item in items}) < len(items):
        raise UserError(f"{location}: an image is annotated twice.", "Write the JSON again.")
    return CocoJson(str(location), raw["categories"], items)


def read_instances(location: Path | str) -> CocoJson:
    """All images of an instances JSON (also "x.zip!member"), also those without an instance."""
    raw = _checked(location, _load(location, _slim), "instance")
    segments: dict[int, list[Segment]] = {image["id"]: [] for image in raw["images"]}
    for annotation in raw["annotations"]:
        try:
            image_id, segment = annotation
            segments[image_id].append(_sound(segment))
        except (KeyError, TypeError, ValueError) as error:
            raise UserError(
                f"{location}: the annotation {annotation!r:.80} is incomplete or names an "
                "image that is not listed.",
                _AGAIN,
            ) from error
    items: list[Item] = []
    for image in raw["images"]:
        try:
            found = tuple(sorted(segments[image["id"]], key=lambda segment: segment.id))
            items.append(Item(*_named(image), size=_size(image), segments=found))
        except (TypeError, ValueError) as error:
            what = f"{location}: the image {image['id']!r:.80} is not as it should be ({error})."
            raise UserError(what, _AGAIN) from error
    return CocoJson(str(location), raw["categories"], items)


def holds(location: Path | str) -> str:
    """ "panoptic" or "instance", by what the annotations of a JSON hold; UserError if neither."""
    raw = _load(location)
    annotations = raw.get("annotations")
    first = annotations[0] if isinstance(annotations, list) and annotations else {}
    for kind, key in (("panoptic", "segments_info"), ("instance", "segmentation")):
        if isinstance(first, dict) and key in first:
            return kind
    raise UserError(
        f"{location} has no annotation with `segments_info` or `segmentation`.",
        "Give a COCO JSON of panoptic segments or of instances with masks.",
    )


def read_records(path: Path, vocabulary: Vocabulary) -> list[Record]:
    """The images of a panoptic JSON in its order, with class indices; UserError on a bad entry."""
    records: list[Record] = []
    for item in read_panoptic(path).items:
        if item.size is None:
            what = f"{path} does not give height and width of image {item.image_id}."
            raise UserError(what, _AGAIN)
        row = listed_row(item, item.size, vocabulary.index_of_id.keys(), str(path))
        records.append(row.record(vocabulary))
    return records


def listed_row(item: Item, size: tuple[int, int], known: Collection[int], where: str) -> Row:
    """The row of an image whose segments are listed, sorted by id, areas still 0; UserError where
    an id or a category cannot be."""
    assert item.segments is not None
    segments = sorted(item.segments, key=lambda segment: segment.id)
    ids = [segment.id for segment in segments]
    if ids and (ids[0] < 1 or ids[-1] >= 1 << 24 or len(set(ids)) < len(ids)):
        raise UserError(
            f"{where}: image {item.image_id} has segment ids that are repeated or outside "
            "1..2^24-1.",
            "0 is void in a panoptic PNG; each other id stands for one segment.",
        )
    check_categories(item, known, where)
    return Row(
        item.image_id,
        item.image,
        item.label,
        *size,
        ids,
        [segment.category_id for segment in segments],
        [int(segment.crowd) for segment in segments],
        [0] * len(segments),
    )


def check_categories(item: Item, known: Collection[int], where: str) -> None:
    """UserError where a segment of the image has a category that the data set lacks."""
    unknown = {segment.category_id for segment in item.segments or ()} - set(known)
    if unknown:
        raise UserError(
            f"{where}: image {item.image_id} has segments of unknown category {sorted(unknown)}.",
            "Every category_id must be among the JSON's categories.",
        )


def _panoptic_item(image: Any, annotation: Any) -> Item:
    segments = tuple(map(_sound, annotation["segments_info"]))
    image_id, name = _named(image)
    label = annotation.get("file_name") or PurePosixPath(name).with_suffix(".png").name
    if not is_text(label):
        raise ValueError(f"the file name {label!r} is no text")
    return Item(image_id, name, label, size=_size(image), segments=segments)


def is_text(value: Any) -> bool:
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
    if not isinstance(image["id"], int | str) or not is_text(image["file_name"]):
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
                mask = [array("d", polygon) for polygon in mask]
        return value["image_id"], Segment(value["id"], category, crowd, mask)
    return Segment(value["id"], category, crowd)


def _load(location: Path | str, hook: Callable[[dict[str, Any]], Any] | None = None) -> Any:
    data = read_file(location)
    try:
        raw = json.loads(data, object_hook=hook)
    except (ValueError, RecursionError) as error:  # also of bytes that are no text
        raise UserError(f"{location} is not valid JSON ({error}).", _AGAIN) from error
    if not isinstance(raw, dict):
        raise UserError(f"{location} holds a {type(raw).__name__}, not a JSON object.", _AGAIN)
    return raw


def _checked(location: Path | str, raw: dict[str, Any], kind: str) -> dict[str, Any]:
    """UserError where a list or a needed key is missing, or two categories are the same."""
    missing = [key for key in ("images", "annotations", "categories") if key not in raw]
    if missing:
        what = f"{location} is not a COCO {kind} JSON: it has no {' and no '.join(missing)}."
        raise UserError(what, _FORMS[kind])
    for key in ("images", "annotations", "categories"):
        if not isinstance(raw[key], list):
            raise UserError(f"{location}: `{key}` is no list.", _AGAIN)
    for key, needed in (("categories", ("id", "name")), ("images", ("id", "file_name"))):
        for row in raw[key]:
            if not isinstance(row, dict) or any(name not in row for name in needed):
                what = f"{location}: an entry of {key} lacks {' or '.join(needed)}."
                raise UserError(what, _AGAIN)
    for category in raw["categories"]:
        id_, name = category["id"], category["name"]
        if type(id_) is not int or not 0 <= id_ < 1 << 31 or not is_text(name):
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
    return raw
