"""COCO's JSON files, panoptic and of instances -> `Item`s; what is wrong in them is named."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass, field, replace
from itertools import count
from pathlib import Path, PurePosixPath
from typing import Any, Literal, cast

from concat_cli.core.data.json_values import (
    Mask,
    flag,
    identity,
    is_text,
    mask_of,
    numbered,
    odd,
    short,
    shown,
    whole,
)
from concat_cli.core.data.store import read_file
from concat_cli.core.errors import UserError

Truth = Literal["panoptic", "instance"]
_MEND = "Mend that entry, or write the JSON again."
_WHOLE = "It is damaged or only a part of the file: copy, fetch or write it again."
_LISTS = ("images", "annotations", "categories")
_MASKS: dict[Truth, str] = {"panoptic": "segments_info", "instance": "segmentation"}
_BAD = (KeyError, TypeError, ValueError, AttributeError)  # what a strange entry raises


@dataclass(frozen=True, slots=True)
class Segment:
    """One segment as a JSON lists it. id: text of instances alone. mask: of instances alone; short:
    whether its outlines lost pixels, see `json_values.short`."""

    id: int | str
    category_id: int
    crowd: bool = False
    mask: Mask = None
    short: bool = field(default=False, repr=False)


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
    """What a COCO JSON lists: its categories, their ids as numbers, and its images in its order: the
    annotated ones of a panoptic JSON, all of one of instances.

    parents: ids of categories that others name as what they belong to and no segment has.
    notes: what to say of it.
    """

    location: str
    truth: Truth
    categories: list[dict[str, Any]]
    items: list[Item]
    parents: frozenset[int] = frozenset()
    notes: tuple[str, ...] = ()

    def without(self, parents: Collection[int]) -> CocoJson:
        """The same without these categories; UserError where two others have one name."""
        kept = [row for row in self.categories if row["id"] not in parents]
        _refuse_same(self.location, "categories", "name", [row["name"] for row in kept])
        return replace(self, categories=kept)


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
    raw, where = read_json(location, _slim), str(location)
    truth = truth or _truth(location, raw)
    for key in _LISTS:
        if not isinstance(raw.get(key), list):
            what = f"{where} is not a COCO {truth} JSON: it has no {key}, or no list of them."
            raise UserError(what, f"Give the file whose annotations hold `{_MASKS[truth]}`.")
    if not raw["categories"]:
        raise UserError(f"{where} lists no category.", "Write the JSON with its `categories`.")
    categories, numbers = _categories(where, raw["categories"])
    images = _images(where, raw["images"], named or _named)
    if truth == "panoptic":
        items = _panoptic(where, raw["annotations"], images, numbers)
    else:
        items = _instances(where, raw["annotations"], images, numbers)
        _refuse_without_outlines(location, items)
    used = {segment.category_id for item in items for segment in item.segments or ()}
    parents = _parents(categories, used)
    named_by = {"categories": numbers, "images": {key: i.image_id for key, i in images.items()}}
    notes = [_told_text(where, rows, ids) for rows, ids in named_by.items()]
    notes = tuple(filter(None, [*notes, _told_short(where, items)]))
    found = CocoJson(where, truth, categories, items, parents, notes)
    found.without(parents)  # only for what it refuses
    return found


def _categories(
    where: str, rows: list[Any]
) -> tuple[list[dict[str, Any]], dict[int | str, int]]:
    """The categories with numbers as ids, and the number of each id; kinds as 0 and 1."""
    made: list[dict[str, Any]] = []
    ids: list[int | str] = []
    for row in rows:
        try:
            ids.append(found := identity(row, "id"))
            if isinstance(found, int) and not 0 <= found < 1 << 31:
                raise odd(row, "id", "not within 0 and 2^31")
            if not is_text(row.get("name")):
                raise odd(row, "name", "no text")
            thing = flag(row, "isthing")
        except _BAD as error:
            raise _entry(where, "category", row, error) from error
        kind = {} if thing is None else {"isthing": int(thing)}
        made.append({k: v for k, v in row.items() if k != "isthing"} | kind)
    free = (number for number in count(1) if number not in ids)
    texts = sorted(found for found in set(ids) if isinstance(found, str))
    numbers = {i: i for i in ids if isinstance(i, int)} | dict(zip(texts, free, strict=False))
    _refuse_same(where, "categories", "id", ids)
    return [row | {"id": numbers[i]} for row, i in zip(made, ids, strict=True)], numbers


def _images(
    where: str, rows: list[Any], named: Callable[[dict[str, Any]], tuple[int, str]]
) -> dict[int | str, Item]:
    """Id as listed -> an image without segments."""
    ids: list[int | str] = []
    images: dict[int | str, Item] = {}
    for row in rows:
        try:
            ids.append(identity(row, "id"))
            images[ids[-1]] = Item(*named(row), size=_size(row))
        except _BAD as error:
            raise _entry(where, "image", row, error) from error
    _refuse_same(where, "images", "id", ids)
    return images


def _panoptic(
    where: str,
    rows: list[Any],
    images: Mapping[int | str, Item],
    numbers: Mapping[int | str, int],
) -> list[Item]:
    """The annotated images with their PNGs and segments."""
    items: list[Item] = []
    for row in rows:
        if isinstance(row, tuple):
            what = f"{where} lists instances: its annotations have no `segments_info`."
            raise UserError(what, "Give the JSON of panoptic segments.")
        try:
            image = _image(row, images)
            if not isinstance(row.get("segments_info"), list):
                raise odd(row, "segments_info", "no list")
            name = PurePosixPath(image.image).with_suffix(".png").name
            label = row.get("file_name") or name
            if not is_text(label):
                raise odd(row, "file_name", "no text")
        except _BAD as error:
            raise _entry(where, "annotation of image", row, error, "image_id") from error
        found: list[Segment] = []
        for segment in row["segments_info"]:
            if not isinstance(segment, Segment):
                try:
                    segment = _segment(segment, numbers)  # noqa: PLW2901
                except _BAD as error:
                    place = f"segments_info of image {shown(row['image_id'])}, segment"
                    raise _entry(where, place, segment, error) from error
            found.append(segment)
        items.append(replace(image, label=label, segments=tuple(found)))
    if len({item.image_id for item in items}) < len(items):
        raise UserError(f"{where}: an image is annotated twice.", _MEND)
    return items


def _instances(
    where: str,
    rows: list[Any],
    images: Mapping[int | str, Item],
    numbers: Mapping[int | str, int],
) -> list[Item]:
    """All images with their annotations in the order of their ids, numbers before text."""
    segments: dict[int, list[Segment]] = {image.image_id: [] for image in images.values()}
    for row in rows:
        entry = row
        try:
            if isinstance(row, tuple):
                image_id, segment = cast("tuple[Any, Segment]", row)
                entry = {"id": segment.id, "image_id": image_id}
            else:
                segment = _segment(row, numbers)
            image = _image(entry, images)
        except _BAD as error:
            raise _entry(where, "annotation", entry, error) from error
        segments[image.image_id].append(segment)
    return [
        replace(image, segments=tuple(sorted(segments[image.image_id], key=_order)))
        for image in images.values()
    ]


def _order(segment: Segment) -> tuple[bool, int | str]:
    return isinstance(segment.id, str), segment.id


def _image(row: Any, images: Mapping[int | str, Item]) -> Item:
    """The image that an annotation is of; ValueError where there is none."""
    found = row.get("image_id")
    if type(found) is not int:
        found = identity(row, "image_id")
    if found not in images:
        raise odd(row, "image_id", "which no image has")
    return images[found]


def _segment(row: Any, numbers: Mapping[int | str, int] | None = None) -> Segment:
    """A segment or an instance; ValueError naming the odd field.

    numbers: of category ids that are text; without them those are odd.
    """
    instance = "image_id" in row
    category = whole(row, "category_id") if numbers is None else identity(row, "category_id")
    if isinstance(category, str):
        if category not in (numbers or {}):
            raise odd(row, "category_id", "which no category has")
        category = (numbers or {})[category]
    number = identity(row, "id") if instance else whole(row, "id")
    mask = mask_of(row.get("segmentation")) if instance else None
    lost = isinstance(mask, list) and short(mask, row.get("bbox"), row.get("area"))
    return Segment(number, category, bool(flag(row, "iscrowd")), mask, lost)


def _entry(where: str, kind: str, row: Any, error: Exception, name: str = "id") -> UserError:
    """What is wrong with one entry of the JSON. name: the field that tells which it is."""
    if not isinstance(row, dict):
        return UserError(f"{where}: the {kind} {shown(row)} is no object.", _MEND)
    which = f" {shown(row[name])}" if name in row else ""
    reason = f"it has no `{error.args[0]}`" if isinstance(error, KeyError) else error
    return UserError(f"{where}: {kind}{which}: {reason}.", _MEND)


def _told_text(where: str, rows: str, numbers: Mapping[int | str, int]) -> str:
    """What to say of ids that are text; "" where none is."""
    texts = [key for key in numbers if isinstance(key, str)]
    if not texts:
        return ""
    return f"{where}: ids of {rows} are text; {texts[0]!r} is {numbers[texts[0]]} in what is written"


def _told_short(where: str, items: list[Item]) -> str:
    """What to say of outlines that lost pixels; "" where not most of them did: a few of any tool
    fit by accident."""
    outlined = [s.short for i in items for s in i.segments or () if isinstance(s.mask, list)]
    if 2 * sum(outlined) <= len(outlined):
        return ""
    return (
        f"{where}: {sum(outlined)} of {len(outlined)} outlines lost a row and a column of pixels "
        "when they were written, by the box or area beside them: they go through the centres of "
        "the outer pixels. Export run lengths (RLE) where the tool can"
    )


def _named(image: Any) -> tuple[int, str]:
    """Id and file name of an image; ValueError where they are of another type."""
    if not is_text(image.get("file_name")) or not image["file_name"]:
        raise odd(image, "file_name", "no text")
    return numbered(identity(image, "id")), image["file_name"]


def _size(image: Any) -> tuple[int, int] | None:
    """(height, width) where the JSON gives them; ValueError where they are no integers."""
    if image.get("height") is None or image.get("width") is None:
        return None
    return whole(image, "height"), whole(image, "width")


def read_json(
    location: Path | str, hook: Callable[[dict[str, Any]], Any] | None = None
) -> dict[str, Any]:
    """The object that a JSON file holds; UserError where it holds none. hook: as of `json.loads`."""
    data = read_file(location)
    try:
        raw: Any = json.loads(data, object_hook=hook)
    except RecursionError as error:
        raise UserError(f"{location} nests lists and objects too deeply.", _WHOLE) from error
    except ValueError as error:  # also of bytes that are no text
        raise UserError(f"{location} is not valid JSON ({error}).", _WHOLE) from error
    if not isinstance(raw, dict):
        what = f"{location} holds a {type(raw).__name__}, not a JSON object."
        raise UserError(what, "Is it another file?")
    return cast("dict[str, Any]", raw)


def _slim(value: dict[str, Any]) -> Any:
    """Keeps of each segment and instance only what is needed, while the JSON is parsed: the whole
    of COCO's takes several times the memory. What is odd stays as it is, to be named later."""
    if "category_id" not in value or "id" not in value:
        return value
    if "file_name" in value or "segments_info" in value:
        return value
    try:
        segment = _segment(value)
    except ValueError:
        return value
    return (value["image_id"], segment) if "image_id" in value else segment


def _truth(location: Path | str, raw: dict[str, Any]) -> Truth:
    """What the first annotation that is one holds; UserError where none is."""
    annotations = raw.get("annotations")
    for row in cast("list[Any]", annotations) if isinstance(annotations, list) else []:
        if isinstance(row, dict) and "segments_info" in row:
            return "panoptic"
        if isinstance(row, tuple) or (isinstance(row, dict) and "segmentation" in row):
            return "instance"
    raise UserError(
        f"{location} has no annotation with `segments_info` or `segmentation`.",
        "Give a COCO JSON of panoptic segments or of instances with masks.",
    )


def _parents(categories: list[dict[str, Any]], used: set[int]) -> frozenset[int]:
    """Ids of unused categories that other categories name as their `supercategory`."""
    groups = [(row.get("supercategory"), row["id"]) for row in categories]
    return frozenset(
        row["id"]
        for row in categories
        if row["id"] not in used
        and any(name == row["name"] and by != row["id"] for name, by in groups)
    )


def _refuse_same(where: str, rows: str, field: str, values: list[Any]) -> None:
    """UserError where two images or categories have one id or name."""
    for value, times in Counter(values).most_common(1):
        if times > 1:
            what = f"{where}: two {rows} have the {field} {value!r:.80}."
            raise UserError(what, f"Each needs its own {field}: write the JSON again.")


def _refuse_without_outlines(location: Path | str, items: list[Item]) -> None:
    """UserError where the annotations are boxes alone, or not in pixels."""
    masks = [segment.mask for item in items for segment in item.segments or ()]
    if masks and not any(masks):
        rows = read_json(location)["annotations"]
        boxes = all(row.get("bbox") or row.get("segmentation") for row in rows)
        raise UserError(
            f"{location}: none of its {len(masks)} annotations has an outline or run lengths"
            f"{': these are boxes.' if boxes else '.'}",
            "Export masks or polygons (a segmentation project, not one of detection).",
        )
    within = 0
    for polygon in (p for mask in masks if isinstance(mask, list) for p in mask):
        if not (0 <= min(polygon) and max(polygon) <= 1):
            return
        within += 1
    if within:
        raise UserError(
            f"{location}: all {within} outlines lie within 0 and 1: they are normalised, not in "
            "pixels.",
            "Multiply each x by the width and each y by the height of its image.",
        )
