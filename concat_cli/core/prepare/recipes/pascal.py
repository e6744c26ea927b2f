"""PASCAL VOC 2012: 20 things, with the labels of SBD for more training images; and PASCAL-Context:
59 or all 459 classes on the images of VOC 2010."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Annotated

from concat_cli.core.data.class_split import load_class_list
from concat_cli.core.data.coco import Item
from concat_cli.core.data.store import read_file
from concat_cli.core.errors import UserError
from concat_cli.core.prepare.recipes.layouts import (
    Layout,
    Look,
    Offer,
    PairLayout,
    Piece,
    bases,
    choose,
    digits,
    first_file,
    first_folder,
    join,
    listed,
    stems,
)
from concat_cli.core.prepare.source import LabelFormat, PartName, Recipe, Source, SourcePart, Task
from concat_cli.core.vocabulary import ClassEntry, Vocabulary

_LISTS = "ImageSets/Segmentation/"
_AUGMENTED = ("trainaug", "train_aug")  # 10,582 names; where there is only `aug`, train's are more
_OWN, _SBD = "SegmentationClass", "SegmentationClassAug"
_OFFER = Offer(
    "PASCAL VOC 2012",
    {
        "devkit": "Images and labels: VOCtrainval_11-May-2012.tar, "
        "http://host.robots.ox.ac.uk/pascal/VOC/voc2012/",
        "labels": "More labels for training: SegmentationClassAug, the .mat labels of SBD as PNGs "
        "(mmsegmentation's voc_aug.py converts them), "
        "http://home.bharathh.info/pubs/codes/SBD/download.html",
    },
)


@dataclass(frozen=True)
class DevkitLayout:
    """The development kit's folder, with the list and the labels of SBD where they are there."""

    format: LabelFormat
    name: str = "official"
    tasks: tuple[Task, ...] = ("semantic",)

    def look(self, bases: Sequence[str], part: PartName) -> Look:
        """What there is of a part; UserError where the list names labels that are not there."""
        kit = next((base for base in bases if first_folder([base], ["JPEGImages"])), "")
        kits = [kit] if kit else []
        labels = first_folder(kits, [_OWN, _SBD])
        names = training_names(kits) if part == "train" else _names(kits, part)
        pieces = tuple(
            Piece("devkit", part, (f"VOCdevkit/VOC2012/{inside}",), kit if there else "")
            for inside, there in (("JPEGImages", kit), (_OWN, labels), (f"{_LISTS}{part}", names))
        )
        if not (labels and names):
            return Look(pieces, None)
        where, folders = _labels(bases, kit, names)
        items = [
            Item(digits(name), f"JPEGImages/{name}.jpg", f"{folder}{name}.png")
            for name, folder in zip(names, folders, strict=True)
        ]
        return Look(pieces, SourcePart(kit, where, self.format, items))


def find(
    root: Path, background: Annotated[bool, "Background is a class, not void."] = False
) -> Source:
    """VOC 2012 with SBD's labels for training where they are there; UserError that lists what is
    missing. `background`: value 0 is a class instead of void."""
    vocabulary = load_class_list("voc_20")
    if background:
        extra = ClassEntry("background", 0, kind="stuff")
        vocabulary = Vocabulary((*vocabulary.entries, extra))
    folders = ("VOCdevkit/VOC2012", "VOC2012", "VOCZERO", "pascal_voc_d2")
    places = bases(root, *folders)
    found = choose(root, places, _layouts(vocabulary, background), _OFFER)
    train = found.parts.get("train")
    few = isinstance(found.layout, DevkitLayout) and not _has_sbd(train)
    note = (
        "The list of SBD (ImageSets/Segmentation/trainaug.txt) is not there: training has the "
        f"1,464 images of VOC alone instead of 10,582. {_OFFER.pieces['labels']}"
    )
    return found.source("voc", vocabulary, "voc_15_5", (note,) if few else ())


def training_names(kits: Sequence[str]) -> list[str]:
    """The longest list of training images that is there: with SBD's, else VOC's own."""
    for name in _AUGMENTED:
        if found := _names(kits, name):
            return found
    return list(dict.fromkeys(_names(kits, "train") + _names(kits, "aug")))


def _names(kits: Sequence[str], name: str) -> list[str]:
    path = first_file(kits, [f"{_LISTS}{name}.txt"])
    return listed(path) if path else []


def _labels(bases: Sequence[str], kit: str, names: list[str]) -> tuple[str, list[str]]:
    """The location of the labels, and the folder of each name below it.

    VOC's own labels are finer than SBD's (which have no void border), so they go first.
    """
    own, more = (_stems_in(first_folder([kit], [folder])) for folder in (_OWN, _SBD))
    lacking = [name for name in names if name not in own and name not in more]
    if not lacking:
        return kit, [f"{_OWN if name in own else _SBD}/" for name in names]
    zipped = first_folder(bases, [_SBD, f"{_SBD}.zip!{_SBD}", f"{_SBD}.zip"])
    if _stems_in(zipped).issuperset(names):
        return zipped, [""] * len(names)
    raise UserError(
        f"{len(lacking)} of the {len(names)} training or validation images that {kit} lists have "
        f"no label, the first {lacking[0]}.png: looked in {join(kit, _OWN)}, {join(kit, _SBD)}"
        + (f" and {zipped}." if zipped else f" and for {_SBD}.zip."),
        _OFFER.pieces["labels"],
    )


def _stems_in(folder: str) -> frozenset[str]:
    return frozenset(stems(folder, ".png") if folder else ())


def _has_sbd(train: SourcePart | None) -> bool:
    if train is None:
        return True  # nothing to say of it
    items = list(train.items)
    return _SBD in train.labels or any(item.label.startswith(_SBD) for item in items)


def _layouts(vocabulary: Vocabulary, background: bool) -> list[Layout]:
    void = (255,) if background else (0, 255)
    raw = LabelFormat("semantic", table={i: i for i in vocabulary.ids}, void=void)
    lowered = replace(raw, table={i - 1: i for i in vocabulary.ids if i}, void=(255,))
    images, converted = ("images/{part}",), ("images_detectron2/{part}", "JPEGImages")
    layouts: list[Layout] = [
        DevkitLayout(raw),
        PairLayout("VOCZERO", images, ("annotations/{part}",), raw),
        PairLayout("pascal_voc_d2", images, ("annotations_pascal21/{part}",), raw, long=True),
    ]
    if background:  # the other layouts have thrown it away
        return layouts
    name, labels = "pascal_voc_d2 of 20 classes", ("annotations_pascal20/{part}",)
    return [
        *layouts,
        PairLayout(name, images, labels, lowered, long=True),
        PairLayout("detectron2", converted, ("annotations_detectron2/{part}",), lowered),
    ]


VOC = Recipe(
    "voc",
    find,
    "PASCAL VOC 2012, 20 classes: SegmentationClassAug, or SegmentationClass.",
    ("concat prepare-data voc data/voc",),
)

# LabelMap values of the 59 classes, in their order: the class of the n-th is n.
RAW_59: tuple[int, ...] = (
    2, 9, 18, 19, 22, 23, 25, 31, 33, 34, 44, 45, 46, 59, 65, 68, 72, 80, 85, 98, 104, 105, 113,
    115, 144, 158, 159, 162, 187, 189, 207, 220, 232, 258, 259, 260, 284, 295, 296, 308, 324, 326,
    347, 349, 354, 355, 360, 366, 368, 397, 415, 416, 420, 424, 427, 440, 445, 454, 458,
)  # fmt: skip
_SPLITS: Mapping[int, str] = {59: "pascal_context_10", 459: "all_seen"}
# The annotated images are all of VOC 2010's train and val: its own lists serve where the others are
# not there.
_CONTEXT_LISTS = "ImageSets/SegmentationContext/{part}.txt", "ImageSets/Main/{part}.txt"
_PAGE = "https://www.cs.stanford.edu/~roozbeh/pascal-context/"
_KIT = "VOCtrainval_03-May-2010.tar, http://host.robots.ox.ac.uk/pascal/VOC/voc2010/"
_CONTEXT_OFFER = Offer(
    "PASCAL-Context",
    {
        "images": f"Images and lists: {_KIT}",
        "labels": f"Labels: trainval.tar.gz, {_PAGE}",
        "list": f"Lists: ImageSets of {_KIT}",
    },
)


def find_context(root: Path, classes: Annotated[int, "59 or 459."] = 59) -> Source:
    """PASCAL-Context from the .mat files of its publishers, mmsegmentation's PNGs (59 classes), or
    what detectron2's users convert it to; UserError that lists what is missing."""
    if classes not in _SPLITS:
        what = f"PASCAL-Context has no version of {classes} classes."
        raise UserError(what, "Choose 59 or 459 classes.")
    vocabulary = load_class_list(f"pascal_context_{classes}")
    places = bases(root, "VOCdevkit/VOC2010", "VOC2010", "pascal_ctx_d2")
    names_file = first_file(places, ["labels.txt", "trainval/labels.txt"])
    if names_file:
        _check_names(names_file, vocabulary, classes)
    found = choose(root, places, _context_layouts(vocabulary, classes), _CONTEXT_OFFER)
    return found.source(f"pascal-context-{classes}", vocabulary, _SPLITS[classes])


def _context_layouts(vocabulary: Vocabulary, classes: int) -> Sequence[PairLayout]:
    few = classes == 59
    same = {i: i for i in vocabulary.ids}
    raw = dict(zip(RAW_59, vocabulary.ids, strict=True)) if few else same
    others = tuple(i for i in range(460) if i not in raw)
    mat = LabelFormat("semantic", pixels="mat", table=raw, void=others)
    plain = LabelFormat("semantic", table=same, void=(0,))
    void, end = (255, ".png") if few else (65535, ".tif")
    lowered = replace(plain, table={i - 1: i for i in vocabulary.ids}, void=(void,))
    images, lists = ("JPEGImages",), _CONTEXT_LISTS
    long = (f"annotations_ctx{classes}/{{part}}",)
    short = (f"annotations_detectron2/pc{classes}_{{part}}",)
    pngs = PairLayout("mmsegmentation", images, ("SegmentationClassContext",), plain, lists=lists)
    return [
        *([pngs] if few else []),
        PairLayout("official", images, ("trainval",), mat, label_end=".mat", lists=lists),
        PairLayout("pascal_ctx_d2", ("images/{part}",), long, lowered, label_end=end, long=True),
        PairLayout("detectron2", images, short, lowered, label_end=end),
    ]


def _check_names(path: str, vocabulary: Vocabulary, classes: int) -> None:
    """UserError where the labels.txt beside the labels gives other names to the values."""
    try:
        rows = [line.split(":", 1) for line in read_file(path).decode("utf-8").splitlines() if line]
        names = {int(number): name.strip() for number, name in rows}
    except ValueError as error:
        what = f"{path} is no list of `id: name` lines ({error})."
        raise UserError(what, f"Get it again: {_CONTEXT_OFFER.pieces['labels']}") from error
    values = RAW_59 if classes == 59 else vocabulary.ids
    for value, name in zip(values, vocabulary.names, strict=True):
        theirs = names.get(value, "")
        if theirs.replace(" ", "").casefold() != name.replace(" ", "").casefold():
            raise UserError(
                f"{path} calls value {value} {theirs!r}, but PASCAL-Context calls it {name!r}.",
                "These are labels of another data set or version: get them again from " + _PAGE,
            )


CONTEXT = Recipe(
    "pascal-context",
    find_context,
    "PASCAL Context: PNGs, or the .mat labels as published.",
    (
        "concat prepare-data pascal-context data/voc --out data/context",
        "concat prepare-data pascal-context data/voc --classes 459 --out data/context-459",
    ),
)
