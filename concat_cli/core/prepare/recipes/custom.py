"""The user's own data: COCO JSON files, labelme's or YOLO's, or label maps, wherever they are."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from enum import Enum
from pathlib import Path, PurePosixPath
from typing import Annotated, Any

from concat_cli.core.data.coco import CocoJson, Item, read_coco
from concat_cli.core.data.store import file_exists, location_exists
from concat_cli.core.errors import UserError
from concat_cli.core.files import below_or_here
from concat_cli.core.prepare.class_values import read_classes
from concat_cli.core.prepare.recipes.coco import same_categories
from concat_cli.core.prepare.recipes.labelme import read_labelme, same_numbers, without_json
from concat_cli.core.prepare.recipes.layouts import named, unpacking
from concat_cli.core.prepare.recipes.names import fitted
from concat_cli.core.prepare.recipes.pairs import Pairs, split_pattern
from concat_cli.core.prepare.recipes.yolo import Places, read_yolo
from concat_cli.core.prepare.source import (
    EVERY,
    PARTS,
    Kind,
    LabelFormat,
    PartName,
    Recipe,
    Source,
    SourcePart,
    Task,
)
from concat_cli.core.vocabulary import Vocabulary
from concat_cli.core.vocabulary_file import doubt, with_kinds

_WAYS = (
    "Give --images with one of: --json PANOPTIC.json --labels PNGS; --json INSTANCES.json; "
    "--labels MAPS --classes FILE; --json INSTANCES.json --labels MAPS --classes FILE. Or, without "
    "--images: --json FOLDER of labelme's files; --yolo data.yaml."
)
_TASKS: dict[Kind, tuple[Task, ...]] = {
    "panoptic": EVERY,
    "semantic": ("semantic",),
    "instances": ("instance",),
    "instances_over_semantic": EVERY,
}
_SAME = "The same of val."


class Crowds(str, Enum):
    """What `iscrowd` in a JSON stands for."""

    groups = "groups"
    objects = "objects"


@dataclass(frozen=True)
class Own:
    """The options of the command; places may be relative to its folder."""

    images: Annotated[str, "Folder or zip of the images."] = ""
    json: Annotated[str, "COCO JSON: panoptic or of instances. Or labelme's folder."] = ""
    labels: Annotated[str, "PNGs of the JSON, or maps of classes: maps, maps/*_mask.png."] = ""
    classes: Annotated[str, "Names of the values or colours in maps, a line each."] = ""
    val_images: Annotated[str, "The same of val; else train is val."] = ""
    val_json: Annotated[str, _SAME] = ""
    val_labels: Annotated[str, _SAME] = ""
    yolo: Annotated[str, "data.yaml of YOLO polygons: train and val."] = ""
    crowds: Annotated[Crowds, "objects: what has iscrowd is one object."] = Crowds.groups
    val_share: Annotated[float, "Share of the images cut from train as val, such as 0.1."] = 0.0
    seed: Annotated[int, "Of --val-share: another one cuts other images."] = 0
    kinds: Annotated[str, 'Kinds, if not as listed: "dog; sky : stuff"; or a file.'] = ""


@dataclass(frozen=True)
class _Given:
    """The places of one part, "" where there are none, what its JSON lists, and what to say."""

    pairs: Pairs
    json: CocoJson | None
    notes: tuple[str, ...] = ()
    packed: Mapping[str, str] = field(default_factory=dict[str, str])  # as of `SourcePart`

    @property
    def images(self) -> str:
        """The place of the images."""
        return self.pairs.images

    @property
    def labels(self) -> str:
        """The place of the label maps or PNGs."""
        return self.pairs.labels

    def part(self, form: LabelFormat, items: list[Item]) -> SourcePart:
        """The part with images of the given items."""
        if self.json is None:
            return SourcePart(self.images, self.labels, form, items)
        labels = "" if form.kind == "instances" else self.labels
        listed, categories = self.json.location, self.json.categories
        part = SourcePart(self.images, labels, form, items, "", listed, categories)
        return replace(part, packed=self.packed)


def find(root: Path, **given: Any) -> Source:
    """Data described by its places, fields of `Own`, relative to `root` or to the current folder.

    Panoptic: json and labels (by default the folder named like the JSON). Instances: json alone, or
    the folder of labelme's files as json, or yolo, which has both parts.
    Semantic: labels and classes, label maps named like the images, or by a pattern at the end of
    their place. Instances over semantic maps: json, labels and classes. UserError where these do
    not fit or something is not there.
    """
    own = Own(**given)
    notes: list[str] = []
    there: dict[PartName, _Given]
    if own.yolo:
        there, notes = _yolo(root, own)
    else:
        there = {"train": _given(root, own.images, own.json, own.labels, own.crowds)}
        if own.val_images or own.val_json or own.val_labels:
            there["val"] = _given(root, own.val_images, own.val_json, own.val_labels, own.crowds)
        there = _same_numbers(there)
    kinds: set[Kind] = {_kind(places, own.classes) for places in there.values()}
    if len(kinds) > 1:
        raise UserError(f"train is {' and val is '.join(sorted(kinds))}.", _WAYS)
    kind = kinds.pop()
    there, told = _without_parents(there)
    notes += told
    parts: dict[PartName, SourcePart]
    if own.classes:
        classes = Path(_place(root, own.classes, file_exists, "file"))
        vocabulary, parts = _with_classes(kind, there, classes)
        notes += filter(None, [doubt(vocabulary)])
    else:
        form = LabelFormat(kind)
        parts = {name: one.part(form, one.json.items) for name, one in there.items() if one.json}
        vocabulary = same_categories(parts.values())
    if own.kinds:
        vocabulary = with_kinds(vocabulary, own.kinds, root)
    if own.val_share:
        parts, told = _cut(parts, own.val_share, own.seed)
        notes.append(told)
    layout = named(kind.replace("_", " "), parts.values())
    name = root.resolve().name or "custom"
    notes += [note for one in there.values() for note in one.notes]
    found = Source(name, layout, vocabulary, _TASKS[kind], parts, "all_seen", tuple(notes))
    return replace(found, single=True)


def _cut(
    parts: dict[PartName, SourcePart], share: float, seed: int
) -> tuple[dict[PartName, SourcePart], str]:
    """train and val, by a hash of the names: the same on every machine, whatever their order."""
    if "val" in parts:
        raise UserError("--val-share cuts val from train, but val is given.", "Leave one out.")
    items = list(parts["train"].items)
    number = max(1, round(len(items) * share))
    if not 0 < share < 1 or number >= len(items):
        raise UserError(
            f"--val-share {share:g} cannot be cut from {len(items)} images.",
            "Give a share between 0 and 1, such as 0.1, of two images or more.",
        )
    ranked = sorted(items, key=lambda i: hashlib.sha256(f"{seed} {i.image}".encode()).digest())
    chosen = {item.image for item in ranked[:number]}
    kept = [item for item in items if item.image not in chosen]
    held = [item for item in items if item.image in chosen]
    cut: dict[PartName, SourcePart] = {
        "train": replace(parts["train"], items=kept),
        "val": replace(parts["train"], items=held),
    }
    told = f"val: {number} of {len(items)} images are cut from train (--val-share, seed {seed})"
    return cut, told


def _given(root: Path, images: str, json: str, labels: str, crowds: Crowds) -> _Given:
    given, (labels, label_pattern) = bool(images), split_pattern(labels)
    images, image_pattern = split_pattern(images)
    images = _place(root, images) if given else ""
    json = _place_of_json(root, json) if json else ""
    labelme = bool(json) and location_exists(json)
    if not given and not labelme:
        raise UserError("Nobody says where the images are.", _WAYS)
    if labels or label_pattern:
        labels = _place(root, labels)
    elif json and not labelme:
        beside = str(Path(json).with_suffix(""))
        labels = beside if location_exists(beside) else ""
    packed: Mapping[str, str] = {}
    if labelme:
        read = read_labelme(json, images)
        images, listed, packed = read.images, read.listed, read.packed
    else:
        listed = read_coco(json) if json else None
    pairs = Pairs(images, image_pattern, labels, label_pattern)
    if listed is None:
        return _Given(pairs, None)
    items, notes = listed.items, list(listed.notes)
    if crowds == Crowds.objects:
        items = [_of_objects(item) for item in items]
    if not packed:
        files, note = fitted([item.image for item in items], pairs.images, listed.location)
        notes.append(note)
        items = [replace(item, image=files[item.image]) for item in items]
    notes.append(without_json(images, items) if labelme else "")
    if listed.truth == "panoptic" and labels:
        files, note = fitted([item.label for item in items], labels, listed.location)
        notes.append(note)
        items = [replace(item, label=files[item.label]) for item in items]
    if listed.truth == "panoptic" and not any("isthing" in row for row in listed.categories):
        notes.append(f"No category of {listed.location} says `isthing`: all count as things.")
    return _Given(pairs, replace(listed, items=items), tuple(filter(None, notes)), packed)


def _place_of_json(root: Path, json: str) -> str:
    """A file, or a folder of labelme's; a place in a zip may be either."""
    return _place(root, json, lambda name: location_exists(name) or file_exists(name), "file")


def _yolo(root: Path, own: Own) -> tuple[dict[PartName, _Given], list[str]]:
    """The parts of a data.yaml, and what to say of it."""
    if own.json or own.val_json or own.classes:
        raise UserError("--yolo brings its own classes and labels.", _WAYS)
    location = _place(root, own.yolo, file_exists, "file")
    places: dict[PartName, Places] = {
        "train": Places(*(name and _place(root, name) for name in (own.images, own.labels))),
        "val": Places(*(name and _place(root, name) for name in (own.val_images, own.val_labels))),
    }
    parts, notes = read_yolo(location, places)
    return {
        name: _Given(Pairs(images, "", "", ""), listed, listed.notes)
        for name, (images, listed) in parts.items()
    }, notes


def _same_numbers(there: dict[PartName, _Given]) -> dict[PartName, _Given]:
    """The parts, and those of labelme with the same classes."""
    listed = [one.json for one in there.values() if one.json and location_exists(one.json.location)]
    if len(listed) < len(PARTS):
        return there
    both = zip(there.items(), same_numbers(listed), strict=True)
    return {name: replace(one, json=json) for (name, one), json in both}


def _of_objects(item: Item) -> Item:
    """The item with each of its crowds as one object."""
    return replace(item, segments=tuple(replace(s, crowd=False) for s in item.segments or ()))


def _without_parents(there: dict[PartName, _Given]) -> tuple[dict[PartName, _Given], list[str]]:
    """The parts without categories that only group others, and what to say of those."""
    listed = [one.json for one in there.values() if one.json is not None]
    parents = frozenset[int].intersection(*(one.parents for one in listed)) if listed else ()
    kept: dict[PartName, _Given] = {
        name: one if one.json is None else replace(one, json=one.json.without(parents))
        for name, one in there.items()
    }
    notes = [
        f"The category {row['name']!r} (id {row['id']}) groups others and has no annotation: it is "
        "left out."
        for row in (listed[0].categories if listed else ())
        if row["id"] in parents
    ]
    return kept, notes


def _place(
    root: Path, name: str, exists: Callable[[str], bool] = location_exists, kind: str = "folder"
) -> str:
    """As `below_or_here`; UserError where it is in neither."""
    found = below_or_here(root, name, exists)
    if found is not None:
        return found
    below = str(root / name)
    command = unpacking(Path(below)) if Path(below).is_file() else ""
    hint = f"Only zip files are read in place; unpack it: {command}" if command else _WAYS
    also = "" if below == name else f", and none at {Path(name).absolute()}"
    raise UserError(f"There is no {kind} {below}{also}.", hint)


def _kind(given: _Given, classes: str) -> Kind:
    if given.json is None:
        if not given.labels or not classes:
            raise UserError("Images alone are no data set: their truth is missing.", _WAYS)
        return "semantic"
    if given.json.truth == "panoptic":
        path = given.json.location
        if not given.labels:
            raise UserError(f"Nobody says where the PNGs of {path} are.", _WAYS)
        if classes:
            raise UserError(f"{path} has its own classes; --classes is for maps.", _WAYS)
        return "panoptic"
    if given.labels and not classes:
        raise UserError(f"Nobody says what the values in {given.labels} mean.", _WAYS)
    if classes and not given.labels:
        what = (
            f"{given.json.location} has its own classes; --classes is for maps, and none are given."
        )
        raise UserError(what, _WAYS)
    return "instances_over_semantic" if classes else "instances"


def _with_classes(
    kind: Kind, given: dict[PartName, _Given], classes: Path
) -> tuple[Vocabulary, dict[PartName, SourcePart]]:
    """Label maps and what their values are; classes of a JSON are things and come from it alone."""
    meaning = read_classes(classes)
    vocabulary = meaning.vocabulary
    things: dict[int, int] = {}  # category of the JSON -> value of the map
    if kind == "instances_over_semantic":
        lists = same_categories(one.part(LabelFormat(kind), []) for one in given.values())
        for category in lists.entries:
            if category.name not in vocabulary.index_of_name:
                what = f"{classes} has no class {category.name!r}, which the JSON has."
                raise UserError(what, "Classes are matched by name.")
            things[category.id] = vocabulary.ids[vocabulary.index_of_name[category.name]]
        counted = things.values()
        vocabulary = Vocabulary(
            tuple(
                replace(entry, kind="thing" if entry.id in counted else "stuff")
                for entry in vocabulary.entries
            )
        )
    parts: dict[PartName, SourcePart] = {}
    for name, one in given.items():
        found = one.pairs.items() if one.json is None else one.json.items
        label_of = one.pairs.label_of(found)
        mat = any(label.endswith(".mat") for label in label_of.values())
        pixels = "colour" if meaning.coloured else "mat" if mat else "index"
        counted = {value: value for value in things.values()}
        form = LabelFormat(kind, pixels, meaning.table, meaning.void, counted)
        parts[name] = one.part(form, [_mapped(item, things, label_of) for item in found])
    return vocabulary, parts


def _mapped(item: Item, things: dict[int, int], label_of: dict[str, str]) -> Item:
    """The item with its label map, and the map's values as categories (-1 where there is none)."""
    name = PurePosixPath(item.image).with_suffix(".png")
    label = label_of.get(item.image, str(name))
    if item.segments is None:
        return replace(item, label=label)
    segments = tuple(
        replace(segment, category_id=things.get(segment.category_id, -1))
        for segment in item.segments
    )
    return replace(item, label=label, segments=segments)


RECIPE = Recipe(
    "custom",
    find,
    "Your own data: a COCO JSON, labelme, YOLO, or label maps with a list of classes.",
    (
        "concat prepare-data custom data/own --images photos --json panoptic.json --labels pngs",
        "concat prepare-data custom data/own --images photos --json instances.json",
        "concat prepare-data custom data/own --json labelme",
        "concat prepare-data custom data/own --yolo data.yaml",
        "concat prepare-data custom data/own --images photos --labels maps --classes classes.txt",
        "concat prepare-data custom data/own --images photos --json instances.json --labels maps "
        "--classes classes.txt --class-split split.yaml",
    ),
    unseen_pixels="drop",
    single=True,
    options=Own,
    root="Folder of the data; where the places below are not in it, the current folder counts.",
)
