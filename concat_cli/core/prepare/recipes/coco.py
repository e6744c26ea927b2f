"""COCO: panoptic segments of 133 classes, instances of 80 or 65, and COCO-Stuff's maps of 171; the
official layouts, unpacked or in their zips as they are offered."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Annotated

from concat_cli.core.data.class_split import load_class_list
from concat_cli.core.errors import UserError
from concat_cli.core.prepare.recipes.layouts import CocoLayout, Offer, PairLayout, bases, choose
from concat_cli.core.prepare.source import LabelFormat, Recipe, Source, SourcePart
from concat_cli.core.vocabulary import Vocabulary

_PAGE = "https://cocodataset.org/#download"
_ALL = "panoptic_annotations_trainval2017.zip"
_PNGS = "panoptic_{part}2017"
_OFFER = Offer(
    "COCO's panoptic segments",
    {
        "images": f"Images: train2017.zip and val2017.zip, {_PAGE}; for files elsewhere use "
        "`concat prepare-data custom`",
        "json": f"Lists of segments: {_ALL}, {_PAGE}",
        "labels": "Pixels of segments: panoptic_train2017.zip and panoptic_val2017.zip, which lie "
        f"inside {_ALL}, {_PAGE}",
    },
)


def _images(year: int) -> tuple[str, ...]:
    """Where COCO's images are looked for."""
    name = f"{{part}}{year}"
    return name, f"images/{name}", f"{name}.zip!{name}", f"images/{name}.zip!{name}"


def find(root: Path) -> Source:
    """COCO's panoptic segments in the official layout, or images, panoptic.json and panoptic;
    UserError that lists what is missing."""
    inside = f"annotations/{_PNGS}"
    layouts = [
        CocoLayout(
            "official",
            images=_images(2017),
            json=(
                f"{inside}.json",
                f"{_PNGS}.json",
                f"{_ALL}!{inside}.json",
                f"annotations/{_ALL}!{inside}.json",
            ),
            pngs=(
                inside,
                _PNGS,
                f"{inside}.zip!{_PNGS}",
                f"{_PNGS}.zip!{_PNGS}",
                f"{_ALL}!{inside}.zip!{_PNGS}",
                f"annotations/{_ALL}!{inside}.zip!{_PNGS}",
            ),
        ),
        CocoLayout(
            "images, panoptic.json, panoptic", ("images",), ("panoptic.json",), ("panoptic",)
        ),
    ]
    found = choose(root, bases(root, "coco", archives=False), layouts, _OFFER)
    vocabulary = same_categories(found.parts.values())
    source = found.source("coco", vocabulary, "coco_panoptic_119_14")
    return replace(source, single=found.layout is layouts[1])


def same_categories(parts: Iterable[SourcePart]) -> Vocabulary:
    """The classes of JSON files that belong together; UserError where they differ."""
    first, *others = parts
    for other in others:
        ours, theirs = ({(c["id"], c["name"]) for c in one.categories} for one in (first, other))
        if ours != theirs:
            raise UserError(
                f"{first.listed_in} and {other.listed_in} list different categories, for example "
                f"{sorted(ours ^ theirs)[0]}.",
                "Both parts must come from one data set.",
            )
    return Vocabulary.from_categories(map(dict, first.categories))


PANOPTIC = Recipe(
    "coco",
    find,
    "COCO panoptic, 133 classes: train2017, val2017 and panoptic annotations.",
    (
        "concat prepare-data coco data/coco",
        "concat prepare-data coco data/coco --class-split all_seen --out data/coco-all",
        "concat prepare-data coco data/coco --unseen-pixels void --skip-bad --out data/coco-void",
    ),
    unseen_pixels="drop",
)

_SPLITS: Mapping[int, str] = {80: "coco_instances_65_15", 65: "coco_instances_48_17"}


def find_instances(
    root: Path,
    year: Annotated[int, "2014 or 2017."] = 2017,
    classes: Annotated[int, "80, or 65 of the 48/17 split."] = 80,
) -> Source:
    """COCO instances from JSON and images in folders or in their zips; UserError that lists what is
    missing. The papers of the 48/17 split use year 2014."""
    if year not in (2014, 2017) or classes not in _SPLITS:
        raise UserError(
            f"There are no COCO instances of {year} with {classes} classes.",
            "The year is 2014 or 2017; the classes are 80 or 65.",
        )
    vocabulary = load_class_list(f"coco_instances_{classes}")
    inside, archive = (
        f"annotations/instances_{{part}}{year}.json",
        f"annotations_trainval{year}.zip",
    )
    layout = CocoLayout(
        "official",
        images=_images(year),
        json=(inside, f"{archive}!{inside}", f"annotations/{archive}!{inside}"),
        but=frozenset(load_class_list("coco_instances_80").ids) - frozenset(vocabulary.ids),
        tasks=("instance",),
    )
    offer = Offer(
        f"COCO instances {year}",
        {
            "images": f"Images: train{year}.zip and val{year}.zip, {_PAGE}",
            "json": f"Annotations: {archive}, {_PAGE}",
        },
    )
    found = choose(root, bases(root, "coco", archives=False), [layout], offer)
    return found.source("coco-instances", vocabulary, _SPLITS[classes])


INSTANCES = Recipe(
    "coco-instances",
    find_instances,
    "COCO instances: things alone.",
    (
        "concat prepare-data coco-instances data/coco --out data/coco-things",
        "concat prepare-data coco-instances data/coco --year 2014 --classes 65 --out data/zsi",
    ),
    unseen_pixels="drop",
)

_MAPS = "stuffthingmaps_trainval2017"
_LABELS = (
    "stuffthingmaps/{part}2017",
    f"{_MAPS}/{{part}}2017",
    f"{_MAPS}.zip!{{part}}2017",
    f"{_MAPS}.zip!{_MAPS}/{{part}}2017",
    f"annotations/{_MAPS}.zip!{{part}}2017",
    "annotations/{part}2017",
)
_CONVERTED = "stuffthingmaps_detectron2/{part}2017", "annotations_detectron2/{part}2017"
_TRAIN_IDS = "_labelTrainIds.png"
_STUFF_OFFER = Offer(
    "COCO-Stuff",
    {
        "images": f"Images: train2017.zip and val2017.zip, {_PAGE}",
        "labels": "Labels: stuffthingmaps_trainval2017.zip, https://github.com/nightrome/cocostuff",
    },
)


def find_stuff(root: Path) -> Source:
    """COCO-Stuff as its publishers pack it, as mmsegmentation has it, or as detectron2's users do;
    UserError that lists what is missing."""
    vocabulary = load_class_list("coco_stuff_171")
    raw = LabelFormat("semantic", table={i - 1: i for i in vocabulary.ids}, void=(255,))
    positions = replace(raw, table=dict(enumerate(vocabulary.ids)))
    images = _images(2017)
    layouts = [
        PairLayout("official", images, _LABELS, raw, but=(_TRAIN_IDS,)),
        PairLayout("mmsegmentation", images, _LABELS[-1:], positions, label_end=_TRAIN_IDS),
        PairLayout("detectron2", images, _CONVERTED, positions),
    ]
    folders = ("coco", "coco_stuff164k", "coco_stuff", "coco-stuff", "coco/coco_stuff")
    found = choose(root, bases(root, *folders, archives=False), layouts, _STUFF_OFFER)
    return found.source("coco-stuff", vocabulary, "coco_stuff_156_15")


STUFF = Recipe(
    "coco-stuff",
    find_stuff,
    "COCO-Stuff, 171 classes: stuffthingmaps.",
    (
        "concat prepare-data coco-stuff data/coco --out data/coco-stuff",
        "concat prepare-data coco-stuff data/coco --unseen-pixels drop --out data/coco-stuff-drop",
    ),
)
