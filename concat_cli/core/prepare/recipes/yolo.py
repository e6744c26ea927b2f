"""YOLO polygons in ultralytics' layout -> what a COCO JSON of instances would list.

`data.yaml` names the classes and the pictures of each part. A picture's labels are in a text file,
a line an object: the class, then x and y of each corner as shares of the upright picture's sides.
"""

from __future__ import annotations

import os
from array import array
from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass, replace
from pathlib import PurePosixPath
from typing import Any, cast

import yaml

from concat_cli.core.data.coco import CocoJson, Item, Segment
from concat_cli.core.data.json_values import is_text
from concat_cli.core.data.store import (
    SUFFIXES,
    file_exists,
    location_exists,
    open_file,
    open_store,
    read_file,
)
from concat_cli.core.errors import UserError
from concat_cli.core.prepare.recipes.layouts import join
from concat_cli.core.prepare.recipes.names import apart_path, joined, together
from concat_cli.core.prepare.recipes.pairs import numbered_items
from concat_cli.core.prepare.source import PARTS, PartName

_MEND = "Mend that line, or write the labels again."
_FAR = 2.0  # sides of a picture that a corner may be away from it: beyond, these are no shares
_WORDS: dict[PartName, tuple[str, ...]] = {"train": ("train",), "val": ("val", "validation")}


@dataclass(frozen=True)
class Places:
    """Where a part's pictures and text files are, if not as `data.yaml` and its layout say."""

    images: str = ""
    labels: str = ""


@dataclass(frozen=True)
class _Row:
    """An object: its class, and its corners [x, y, x, y, ...] as shares of the sides."""

    category: int
    corners: tuple[float, ...]


def read_yolo(
    location: str, given: dict[PartName, Places]
) -> tuple[dict[PartName, tuple[str, CocoJson]], list[str]]:
    """Of each part that there is, the location of its pictures and what is listed of them; and what
    to say of the file. UserError naming what is wrong with it or with a line of the labels."""
    raw = _yaml(location)
    names = _names(location, raw)
    base, notes = _base(location, str(raw.get("path") or ""))
    parts: dict[PartName, tuple[str, CocoJson]] = {}
    listed: dict[PartName, list[str]] = {}
    for part in PARTS:
        entry: Any = next((raw[word] for word in _WORDS[part] if raw.get(word)), None)
        entries = cast("list[Any]", entry if isinstance(entry, list) else [entry] if entry else [])
        places = given[part]
        listed[part] = [
            picture
            for one in ([places.images] if places.images else [_place(base, e) for e in entries])
            for picture in _pictures(location, base, one)
        ]
        if not places.images and not entries:
            continue
        if not listed[part]:
            raise UserError(f"{location}: no picture of {part} is there.", "Look at its places.")
        if part == "val" and listed["val"] == listed["train"]:
            continue  # one part, which serves as both
        parts[part] = _part(f"{location}, {part}", names, listed[part], places)
    if "train" not in parts:
        raise UserError(
            f"{location} does not say where the pictures of train are.",
            "Give them: --images FOLDER, and --labels FOLDER where that is not found by itself.",
        )
    both = len({*listed["val"]}.intersection(listed["train"])) if "val" in parts else 0
    if both:
        count = len(listed["val"])
        notes.append(f"{location}: {both} of {count} pictures of val are also in train")
    if raw.get("test"):
        notes.append(f"{location}: its part `test` is not read")
    return parts, notes


def _yaml(location: str) -> dict[str, Any]:
    """What the file holds, numbers as text."""
    try:
        raw: Any = yaml.load(read_file(location).decode("utf-8-sig"), yaml.BaseLoader)
    except (yaml.YAMLError, ValueError, RecursionError) as error:
        reason = " ".join(str(error).split())[:120]
        raise UserError(f"{location} is no valid YAML: {reason}.", "Mend it.") from error
    if not isinstance(raw, dict):
        raise UserError(f"{location} holds no `names` of classes.", "Give YOLO's data.yaml.")
    if "kpt_shape" in raw:
        raise UserError(
            f"{location} is of key points (`kpt_shape`), whose labels have no outlines.",
            "Export the data as a segmentation set, with polygons.",
        )
    return cast("dict[str, Any]", raw)


def _names(location: str, raw: dict[str, Any]) -> dict[int, str]:
    """Number -> name of each class, from a list or from a mapping."""
    found: Any = raw.get("names")
    rows = cast("list[Any]", found if isinstance(found, list) else [])
    table = cast("dict[str, Any]", found) if isinstance(found, dict) else dict(enumerate(rows))
    if not table or not all(is_text(name) and name.strip() for name in table.values()):
        what = f"{location} names no classes: `names` is to be a list, or number: name."
        raise UserError(what, "Classes are recognised by their names: give each one.")
    try:
        names = {int(key): str(name) for key, name in table.items()}
    except ValueError as error:
        raise UserError(f"{location}: `names` has a key that is no number.", "Mend it.") from error
    count = raw.get("nc")
    if count is not None and str(count) != str(len(names)):
        what = f"{location}: `nc` is {count}, but `names` has {len(names)} classes."
        raise UserError(what, "Mend it: one of them is of another data set.")
    return names


def _base(location: str, path: str) -> tuple[str, list[str]]:
    """The folder that places are relative to, and what to say where it is not the one named."""
    own = os.path.dirname(apart_path(location))  # noqa: PTH120
    if not path:
        return own, []
    places = _place(own, path), os.path.abspath(path)  # noqa: PTH100
    found = next((place for place in places if location_exists(joined(place))), "")
    if found:
        return found, []
    return own, [f"{location}: its `path`, {path}, is not there; its own folder is taken instead"]


def _place(base: str, entry: Any) -> str:
    """A place as seen from a folder."""
    text = str(entry).replace("\\", "/")
    return os.path.normpath(os.path.join(base, text))  # noqa: PTH118


def _pictures(location: str, base: str, place: str) -> list[str]:
    """The pictures of a folder, or those that a text file lists; both as whole paths."""
    outside = os.path.relpath(place, base)
    inner = _place(base, outside.removeprefix("../"))  # ultralytics looks there, too
    for where in dict.fromkeys((apart_path(place), inner)):
        if location_exists(joined(where)):
            names = open_store(joined(where)).names()
            found = [name for name in names if name.lower().endswith(tuple(SUFFIXES))]
            return [f"{where}/{name}" for name in found]
        if file_exists(joined(where)):
            return _listed(joined(where), where, base)
    raise UserError(
        f"{location} names {joined(place)}, which is neither a folder nor a list of pictures.",
        "Mend its `path`, `train` and `val`, or give the pictures: --images, --val-images.",
    )


def _listed(location: str, where: str, base: str) -> list[str]:
    """The pictures that a text file lists, as seen from its folder, else from the data's."""
    try:
        lines = read_file(location).decode("utf-8-sig").splitlines()
    except UnicodeDecodeError as error:
        raise UserError(f"{location} is no list of pictures ({error}).", "Mend it.") from error
    found: list[str] = []
    for line in filter(None, map(str.strip, lines)):
        near, other = _place(os.path.dirname(where), line), _place(base, line)  # noqa: PTH120
        found.append(near if near == other or file_exists(joined(near)) else other)
    return list(dict.fromkeys(found))


def _part(
    where: str, names: dict[int, str], pictures: list[str], places: Places
) -> tuple[str, CocoJson]:
    """The pictures of a part and their objects."""
    images, inside = together([joined(picture) for picture in pictures])
    told: Counter[str] = Counter()
    items: list[Item] = []
    files: list[str] = []
    for item, picture in zip(numbered_items(inside), pictures, strict=True):
        name = os.path.relpath(picture, apart_path(places.images)) if places.images else item.image
        files.append(_label_of(picture, name, places.labels))
        if not file_exists(files[-1]):
            told["without"] += 1
            items.append(replace(item, segments=()))
            continue
        rows = _rows(files[-1], names, told)
        items.append(_item(item, open_file(joined(picture)), rows))
    if told["without"] == len(items):
        raise UserError(
            f"{where}: no picture has a text file of labels; looked for {files[0]} and others.",
            "Pictures in a folder `images` have their labels in `labels` beside it; give another "
            "folder with --labels.",
        )
    if not told["outlines"]:
        boxes = f"none of its {told['boxes']} labels has an outline: these are boxes."
        raise UserError(
            f"{where}: {boxes if told['boxes'] else 'its text files hold no label.'}",
            "Export masks or polygons (a segmentation project, not one of detection).",
        )
    categories = [{"id": number, "name": name} for number, name in names.items()]
    told["unlike"] = len(_others(files))
    notes = tuple(f"{where}: {note}" for note in _notes(told, len(items)))
    return images, CocoJson(where, "instance", categories, items, notes=notes)


def _label_of(picture: str, name: str, labels: str) -> str:
    """The text file of a picture: the last folder `images` of its path is `labels` there, as
    ultralytics has it."""
    if labels:
        return join(labels, str(PurePosixPath(name).with_suffix(".txt")))
    path = "/labels/".join(picture.rsplit("/images/", 1))
    return joined(f"{path.rpartition('.')[0]}.txt")


def _others(files: Iterable[str]) -> set[str]:
    """Text files beside those of the pictures, which belong to none."""
    known = {*files}
    folders = {file.rpartition("/")[0] for file in known}
    there = {
        f"{folder}/{name}"
        for folder in folders
        if location_exists(folder)
        for name in open_store(folder).names()
        if name.endswith(".txt") and "/" not in name and name != "classes.txt"
    }
    return there - known


def _rows(file: str, names: dict[int, str], told: Counter[str]) -> list[_Row]:
    """The objects of a text file, each once; UserError naming a line that is none."""
    try:
        lines = read_file(file).decode("utf-8-sig").splitlines()
    except UnicodeDecodeError as error:
        raise UserError(f"{file} is no text in UTF-8 ({error}).", "Is it another file?") from error
    rows: list[_Row] = []
    for number, line in enumerate(lines, 1):
        fields = line.split()
        try:
            row = _row(fields, names) if fields else None
        except ValueError as error:
            raise UserError(f"{file}, line {number}: {error}.", _MEND) from error
        if row is None:
            told["boxes"] += bool(fields)
            continue
        told["outlines"] += 1
        told["beyond"] += min(row.corners) < 0 or max(row.corners) > 1
        rows.append(row)
    once = list(dict.fromkeys(rows))
    told["twice"] += len(rows) - len(once)
    return once


def _row(fields: list[str], names: dict[int, str]) -> _Row | None:
    """An object with an outline; None of a box, with its confidence or not."""
    numbers = [float(field) for field in fields]
    category, corners = numbers[0], tuple(numbers[1:])
    if category not in names:
        raise ValueError(f"the class {fields[0]} is none of the {len(names)} in `names`")
    if not all(-_FAR <= value <= 1 + _FAR for value in corners):
        far = next(f for f in fields[1:] if not -_FAR <= float(f) <= 1 + _FAR)
        raise ValueError(f"{far} is no share of the picture's side, as 0 to 1 are")
    if len(corners) in (4, 5):
        return None
    if len(corners) < 6 or len(corners) % 2:
        more = " (is the last number a confidence?)" * (len(corners) > 6)
        raise ValueError(f"{len(corners)} numbers follow the class, no x and y a corner{more}")
    return _Row(int(category), corners)


def _item(item: Item, file: Any, rows: list[_Row]) -> Item:
    """The item with its objects in pixels; as it is where the picture cannot be read, which is told
    when it is checked."""
    from concat_cli.core.data.image_io import read_header  # which no help text waits for

    try:
        height, width = read_header(file).shown()
    except UserError:
        return replace(item, segments=())
    segments: list[Segment] = []
    for number, row in enumerate(rows, 1):
        scaled = (value * (width, height)[i % 2] for i, value in enumerate(row.corners))
        segments.append(Segment(number, row.category, mask=[array("d", scaled)]))
    return replace(item, size=(height, width), segments=tuple(segments))


def _notes(told: Counter[str], pictures: int) -> list[str]:
    """What of the labels is not as one would think."""
    notes = {
        "without": f"{told['without']} of {pictures} pictures have no text file: no object is in "
        "them",
        "boxes": f"{told['boxes']} labels are boxes without an outline and left out, "
        f"{told['outlines']} have one",
        "twice": f"{told['twice']} labels stand twice in their file; each counts once",
        "beyond": f"{told['beyond']} outlines lead out of their pictures and are cut off there",
        "unlike": f"{told['unlike']} text files are of no picture",
    }
    return [note for key, note in notes.items() if told[key]]
