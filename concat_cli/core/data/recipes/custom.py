"""The user's own data: COCO JSON files or label maps, wherever they are."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass, replace
from pathlib import Path, PurePosixPath

from concat_cli.core.data.coco_json import CocoJson, holds, read_instances, read_panoptic
from concat_cli.core.data.recipes.coco import panoptic_part, same_categories
from concat_cli.core.data.recipes.custom_classes import read_classes
from concat_cli.core.data.recipes.places import hashed, named, packed_twice, unpacking
from concat_cli.core.data.source import (
    Item,
    LabelFormat,
    PartName,
    Source,
    SourcePart,
    Task,
)
from concat_cli.core.data.store import file_exists, location_exists, open_store
from concat_cli.core.errors import UserError
from concat_cli.core.vocabulary import Vocabulary

_IMAGES = (".jpg", ".jpeg", ".png", ".bmp", ".webp", ".tif", ".tiff")
_LABELS = (".png", ".tif", ".tiff", ".mat")
_WAYS = (
    "Give --images with one of: --json PANOPTIC.json --labels PNGS; --json INSTANCES.json; "
    "--labels MAPS --classes FILE; --json INSTANCES.json --labels MAPS --classes FILE."
)
_TASKS: dict[str, tuple[Task, ...]] = {
    "panoptic": ("panoptic", "semantic", "instance"),
    "semantic": ("semantic",),
    "instances": ("instance",),
    "instances_over_semantic": ("panoptic", "semantic", "instance"),
}


@dataclass(frozen=True)
class _Given:
    """The places of one part; "" where none was given."""

    images: str
    json: str
    labels: str


def find(
    root: Path,
    images: str = "",
    json: str = "",
    labels: str = "",
    classes: str = "",
    val_images: str = "",
    val_json: str = "",
    val_labels: str = "",
) -> Source:
    """Data described by its places, which may be relative to `root`.

    Panoptic: json and labels (by default the folder named like the JSON). Instances: json alone.
    Semantic: labels and classes, label maps named like the images. Instances over semantic maps:
    json, labels and classes. UserError where these do not fit or something is not there.
    """
    given: dict[PartName, _Given] = {"train": _given(root, images, json, labels)}
    if val_images or val_json or val_labels:
        given["val"] = _given(root, val_images, val_json, val_labels)
    kinds = {_kind(places, classes) for places in given.values()}
    if len(kinds) > 1:
        raise UserError(f"train is {' and val is '.join(sorted(kinds))}.", _WAYS)
    kind = kinds.pop()
    vocabulary, parts = _PARTS[kind](given, root / classes if classes else root)
    return Source(
        name=root.resolve().name or "custom",
        layout=named(kind.replace("_", " "), parts.values()),
        vocabulary=vocabulary,
        tasks=_TASKS[kind],
        parts=parts,
        default_split="all_seen",
        notes=packed_twice(parts.values()),
        single=True,
    )


Parts = dict[PartName, SourcePart]


def _given(root: Path, images: str, json: str, labels: str) -> _Given:
    if not images:
        raise UserError("Nobody says where the images are.", _WAYS)
    if json and not labels:
        beside = str(Path(json).with_suffix(""))
        labels = beside if location_exists(root / beside) else ""
    places = [str(root / place) if place else "" for place in (images, json, labels)]
    for place in (places[0], places[2]):
        if place and not location_exists(place):
            command = unpacking(Path(place)) if Path(place).is_file() else ""
            hint = f"Only zip files are read in place; unpack it: {command}" if command else _WAYS
            raise UserError(f"There is no folder {place}.", hint)
    if json and not file_exists(places[1]):
        raise UserError(f"There is no file {places[1]}.", _WAYS)
    return _Given(*places)


def _kind(given: _Given, classes: str) -> str:
    if not given.json:
        if not given.labels or not classes:
            raise UserError("Images alone are no data set: their truth is missing.", _WAYS)
        return "semantic"
    if holds(given.json) == "panoptic":
        if not given.labels:
            raise UserError(f"Nobody says where the PNGs of {given.json} are.", _WAYS)
        if classes:
            raise UserError(f"{given.json} has its own classes; --classes is for maps.", _WAYS)
        return "panoptic"
    if given.labels and not classes:
        raise UserError(f"Nobody says what the values in {given.labels} mean.", _WAYS)
    return "instances_over_semantic" if classes else "instances"


def _panoptic(given: dict[PartName, _Given], _: Path) -> tuple[Vocabulary, Parts]:
    lists = {name: read_panoptic(places.json) for name, places in given.items()}
    parts: Parts = {}
    for name, places in given.items():
        where = {"images": places.images, "json": places.json, "pngs": places.labels}
        parts[name] = panoptic_part(where, lists[name])
    return same_categories(list(lists.values())), parts


def _instances(given: dict[PartName, _Given], _: Path) -> tuple[Vocabulary, Parts]:
    lists = {name: read_instances(places.json) for name, places in given.items()}
    parts: Parts = {
        name: SourcePart(
            places.images, "", LabelFormat("instances"), lists[name].items, listed_in=places.json
        )
        for name, places in given.items()
    }
    return same_categories(list(lists.values())), parts


def _semantic(given: dict[PartName, _Given], classes: Path) -> tuple[Vocabulary, Parts]:
    vocabulary, void = read_classes(classes)
    parts: Parts = {}
    for name, places in given.items():
        images = [n for n in open_store(places.images).names() if _ends(n, _IMAGES)]
        label_of = _labels(places.labels)
        items = [
            Item(number, image, label_of.get(_stem(image), f"{_stem(image)}.png"))
            for number, image in zip(_numbers(images), images, strict=True)
        ]
        fmt = _format("semantic", label_of, vocabulary, void)
        parts[name] = SourcePart(places.images, places.labels, fmt, items)
    return vocabulary, parts


def _merged(given: dict[PartName, _Given], classes: Path) -> tuple[Vocabulary, Parts]:
    """Classes of the JSON are things and come from it, all others are stuff of the maps."""
    vocabulary, void = read_classes(classes)
    lists: dict[PartName, CocoJson] = {n: read_instances(p.json) for n, p in given.items()}
    things = {id_: _value_of(name, vocabulary, classes) for id_, name in _names(lists).items()}
    counted = set(things.values())
    vocabulary = Vocabulary(
        tuple(replace(e, kind="thing" if e.id in counted else "stuff") for e in vocabulary.entries)
    )
    parts: Parts = {}
    for name, places in given.items():
        label_of = _labels(places.labels)
        fmt = _format("instances_over_semantic", label_of, vocabulary, void)
        fmt = replace(fmt, things={value: value for value in counted})
        items = [_with_values(item, things, label_of) for item in lists[name].items]
        parts[name] = SourcePart(places.images, places.labels, fmt, items, listed_in=places.json)
    return vocabulary, parts


_PARTS = {
    "panoptic": _panoptic,
    "instances": _instances,
    "semantic": _semantic,
    "instances_over_semantic": _merged,
}


def _names(lists: dict[PartName, CocoJson]) -> dict[int, str]:
    """Category id -> name of JSON files that belong together."""
    vocabulary = same_categories(list(lists.values()))
    return dict(zip(vocabulary.ids, vocabulary.names, strict=True))


def _value_of(name: str, vocabulary: Vocabulary, classes: Path) -> int:
    if name not in vocabulary.index_of_name:
        raise UserError(
            f"{classes} has no class {name!r}, which the JSON has.", "Classes are matched by name."
        )
    return vocabulary.ids[vocabulary.index_of_name[name]]


def _with_values(item: Item, things: dict[int, int], label_of: dict[str, str]) -> Item:
    """The item with the map's values as categories (unknown ones are left for the check)."""
    segments = tuple(
        replace(segment, category_id=things.get(segment.category_id, -1))
        for segment in item.segments or ()
    )
    label = label_of.get(_stem(item.image), f"{_stem(item.image)}.png")
    return replace(item, label=label, segments=segments)


def _format(
    kind: str, label_of: dict[str, str], vocabulary: Vocabulary, void: tuple[int, ...]
) -> LabelFormat:
    mat = any(label.endswith(".mat") for label in label_of.values())
    table = {value: value for value in vocabulary.ids}
    return LabelFormat(kind, "mat" if mat else "index", table, void)  # pyright: ignore[reportArgumentType]


def _labels(location: str) -> dict[str, str]:
    """Name without ending -> label map; UserError where two differ in the ending alone."""
    names = [name for name in open_store(location).names() if _ends(name, _LABELS)]
    counts = Counter(map(_stem, names))
    twice = [name for name in names if counts[_stem(name)] > 1]
    if twice:
        raise UserError(f"{location} has {' and '.join(twice[:2])}.", "Keep one label an image.")
    return {_stem(name): name for name in names}


def _numbers(names: list[str]) -> list[int]:
    """Image ids: the number that a name is, if all are; else a hash of it, so that an image keeps
    its id, and its part, when others are added."""
    stems = [PurePosixPath(name).stem for name in names]
    if all(stem.isdecimal() for stem in stems) and len({int(s) for s in stems}) == len(stems):
        return [int(stem) for stem in stems]
    return [hashed(_stem(name).replace("/", "-")) for name in names]


def _stem(name: str) -> str:
    return str(PurePosixPath(name).with_suffix(""))


def _ends(name: str, endings: tuple[str, ...]) -> bool:
    return name.lower().endswith(endings)
