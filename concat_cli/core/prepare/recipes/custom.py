"""The user's own data: COCO JSON files or label maps, wherever they are."""

from __future__ import annotations

import re
from collections import Counter
from dataclasses import dataclass, replace
from pathlib import Path, PurePosixPath
from typing import Annotated

from concat_cli.core.data.coco import CocoJson, Item, read_coco
from concat_cli.core.data.store import file_exists, location_exists, open_store
from concat_cli.core.errors import UserError
from concat_cli.core.prepare.recipes.coco import same_categories
from concat_cli.core.prepare.recipes.layouts import hashed, named, unpacking
from concat_cli.core.prepare.source import (
    EVERY,
    Kind,
    LabelFormat,
    PartName,
    Recipe,
    Source,
    SourcePart,
    Task,
)
from concat_cli.core.vocabulary import Vocabulary
from concat_cli.core.vocabulary_file import parse_vocabulary, without_comment

_IMAGES = (".jpg", ".jpeg", ".png", ".bmp", ".webp", ".tif", ".tiff")
_LABELS = (".png", ".tif", ".tiff", ".mat")
_WAYS = (
    "Give --images with one of: --json PANOPTIC.json --labels PNGS; --json INSTANCES.json; "
    "--labels MAPS --classes FILE; --json INSTANCES.json --labels MAPS --classes FILE."
)
_TASKS: dict[Kind, tuple[Task, ...]] = {
    "panoptic": EVERY,
    "semantic": ("semantic",),
    "instances": ("instance",),
    "instances_over_semantic": EVERY,
}
_SAME = "The same of val."


@dataclass(frozen=True)
class _Given:
    """The places of one part, "" where none was given, and what its JSON lists."""

    images: str
    labels: str
    json: CocoJson | None

    def part(self, form: LabelFormat, items: list[Item]) -> SourcePart:
        """The part with images of the given items."""
        if self.json is None:
            return SourcePart(self.images, self.labels, form, items)
        labels = "" if form.kind == "instances" else self.labels
        listed, categories = self.json.location, self.json.categories
        return SourcePart(self.images, labels, form, items, listed_in=listed, categories=categories)


def find(
    root: Path,
    images: Annotated[str, "Folder or zip of the images."] = "",
    json: Annotated[str, "COCO JSON: panoptic or of instances."] = "",
    labels: Annotated[str, "PNGs of the JSON, or maps of classes."] = "",
    classes: Annotated[str, "Names of the values in maps, a line each."] = "",
    val_images: Annotated[str, "The same of val; else train is val."] = "",
    val_json: Annotated[str, _SAME] = "",
    val_labels: Annotated[str, _SAME] = "",
) -> Source:
    """Data described by its places, which may be relative to `root`.

    Panoptic: json and labels (by default the folder named like the JSON). Instances: json alone.
    Semantic: labels and classes, label maps named like the images. Instances over semantic maps:
    json, labels and classes. UserError where these do not fit or something is not there.
    """
    given: dict[PartName, _Given] = {"train": _given(root, images, json, labels)}
    if val_images or val_json or val_labels:
        given["val"] = _given(root, val_images, val_json, val_labels)
    kinds: set[Kind] = {_kind(places, classes) for places in given.values()}
    if len(kinds) > 1:
        raise UserError(f"train is {' and val is '.join(sorted(kinds))}.", _WAYS)
    kind = kinds.pop()
    parts: dict[PartName, SourcePart]
    if classes:
        vocabulary, parts = _with_classes(kind, given, root / classes)
    else:
        form = LabelFormat(kind)
        parts = {name: one.part(form, one.json.items) for name, one in given.items() if one.json}
        vocabulary = same_categories(parts.values())
    layout = named(kind.replace("_", " "), parts.values())
    name = root.resolve().name or "custom"
    return Source(name, layout, vocabulary, _TASKS[kind], parts, "all_seen", single=True)


def _given(root: Path, images: str, json: str, labels: str) -> _Given:
    if not images:
        raise UserError("Nobody says where the images are.", _WAYS)
    if json and not labels:
        beside = str(Path(json).with_suffix(""))
        labels = beside if location_exists(root / beside) else ""
    for place in (images, labels):
        if place and not location_exists(root / place):
            path = root / place
            command = unpacking(path) if path.is_file() else ""
            hint = f"Only zip files are read in place; unpack it: {command}" if command else _WAYS
            raise UserError(f"There is no folder {path}.", hint)
    if json and not file_exists(root / json):
        raise UserError(f"There is no file {root / json}.", _WAYS)
    listed = read_coco(root / json) if json else None
    return _Given(str(root / images), str(root / labels) if labels else "", listed)


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
    return "instances_over_semantic" if classes else "instances"


def _with_classes(
    kind: Kind, given: dict[PartName, _Given], classes: Path
) -> tuple[Vocabulary, dict[PartName, SourcePart]]:
    """Label maps and what their values are; classes of a JSON are things and come from it alone."""
    vocabulary, void = read_classes(classes)
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
        label_of = _labels_at(one.labels)
        mat = any(label.endswith(".mat") for label in label_of.values())
        values, counted = ({i: i for i in ids} for ids in (vocabulary.ids, things.values()))
        form = LabelFormat(kind, "mat" if mat else "index", values, void, counted)
        found = _images_at(one.images) if one.json is None else one.json.items
        parts[name] = one.part(form, [_mapped(item, things, label_of) for item in found])
    return vocabulary, parts


def _mapped(item: Item, things: dict[int, int], label_of: dict[str, str]) -> Item:
    """The item with its label map, and the map's values as categories (-1 where there is none)."""
    label = label_of.get(_stem(item.image), f"{_stem(item.image)}.png")
    if item.segments is None:
        return replace(item, label=label)
    segments = tuple(
        replace(segment, category_id=things.get(segment.category_id, -1))
        for segment in item.segments
    )
    return replace(item, label=label, segments=segments)


def _labels_at(location: str) -> dict[str, str]:
    """Name without ending -> label map; UserError where two differ in the ending alone."""
    names = [name for name in open_store(location).names() if name.lower().endswith(_LABELS)]
    counts = Counter(map(_stem, names))
    twice = [name for name in names if counts[_stem(name)] > 1]
    if twice:
        raise UserError(f"{location} has {' and '.join(twice[:2])}.", "Keep one label an image.")
    return {_stem(name): name for name in names}


def _images_at(location: str) -> list[Item]:
    """The images there. Ids: the number that a name is, if all are; else a hash of it, so that an
    image keeps its id, and its part, when others are added."""
    names = [name for name in open_store(location).names() if name.lower().endswith(_IMAGES)]
    own = [PurePosixPath(name).stem for name in names]
    if all(stem.isdecimal() for stem in own) and len({int(stem) for stem in own}) == len(own):
        return [Item(int(stem), name) for stem, name in zip(own, names, strict=True)]
    return [Item(hashed(_stem(name).replace("/", "-")), name) for name in names]


def _stem(name: str) -> str:
    return str(PurePosixPath(name).with_suffix(""))


VOID = (255, 65535)  # void by custom, in 8 and 16 bit, unless they are classes
_VALUE = re.compile(r"^(.*?)\s*=\s*(\d+)\s*$")
_HINT = "Give each line its value, like `car, automobile = 7`, or none: then they count from 0."


def read_classes(path: Path) -> tuple[Vocabulary, tuple[int, ...]]:
    """The classes of label maps, with their raw values as ids, and the void values.

    A vocabulary file, whose lines stand for the raw values 0, 1, 2, ...; `car = 7` gives its own;
    the value of a line `void` has no truth. UserError where two lines have one value or only some
    lines have one.
    """
    if path.suffix.lower() in (".yaml", ".yml", ".json"):
        vocabulary = parse_vocabulary(path)
        values, void = list(range(len(vocabulary))), []
    else:
        vocabulary, values, void = _read_lines(path)
    twice = {value for value in values if [*values, *void].count(value) > 1}
    if twice:
        raise UserError(f"{path}: two lines have the value {min(twice)}.", _HINT)
    if max(values) > 65534 or max(void, default=0) > 65535:
        largest = max([*values, *void])
        raise UserError(f"{path}: {largest} is no value of 16 bit that could be one.", _HINT)
    entries = (replace(e, id=v) for e, v in zip(vocabulary.entries, values, strict=True))
    unused = [value for value in VOID if value not in values and value not in void]
    return Vocabulary(tuple(entries)), (*void, *unused)


def _read_lines(path: Path) -> tuple[Vocabulary, list[int], list[int]]:
    """A text file's classes, their values, and the values of its `void` lines."""
    try:
        text = path.read_text(encoding="utf-8-sig")
    except (OSError, UnicodeDecodeError):
        text = ""  # parse_vocabulary says what is wrong
    names: list[str] = []
    given: list[tuple[str, bool]] = []  # the value as written, and whether it is void
    for line in text.splitlines():
        plain = without_comment(line)
        match = _VALUE.match(plain)
        name, value = match.groups() if match else (plain, "")
        void = name.split(":")[0].strip().casefold() == "void"
        if match and not name:
            raise UserError(f"{path}: {plain[:80]!r} has a value and no name.", _HINT)
        if plain:
            given.append((value[:9], void))  # longer ones are refused, too
        names.append("" if void else name)
    vocabulary = parse_vocabulary(path, text="\n".join(names) if names else None)
    some = sum(bool(value) for value, _ in given)
    if 0 < some < len(given):
        raise UserError(f"{path}: {some} of {len(given)} lines have a value.", _HINT)
    values = [int(value) if value else place for place, (value, _) in enumerate(given)]
    rows = list(zip(values, (void for _, void in given), strict=True))
    return vocabulary, [v for v, void in rows if not void], [v for v, void in rows if void]


RECIPE = Recipe(
    "custom",
    find,
    "Your own data: a COCO JSON, label maps with a list of classes, or both.",
    (
        "concat prepare-data custom data/own --images photos --json panoptic.json --labels pngs",
        "concat prepare-data custom data/own --images photos --json instances.json",
        "concat prepare-data custom data/own --images photos --labels maps --classes classes.txt",
        "concat prepare-data custom data/own --images photos --json instances.json --labels maps "
        "--classes classes.txt --class-split split.yaml",
    ),
    unseen_pixels="drop",
    single=True,
    root="Folder that the places below are relative to.",
)
