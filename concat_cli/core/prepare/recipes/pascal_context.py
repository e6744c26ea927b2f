"""PASCAL-Context: 59 or all 459 classes on the images of VOC 2010."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Annotated

from concat_cli.core.data.class_split import load_class_list
from concat_cli.core.data.store import read_file
from concat_cli.core.errors import UserError
from concat_cli.core.prepare.recipes.layouts import (
    NAMED,
    Offer,
    PairLayout,
    bases,
    choose,
    first_file,
)
from concat_cli.core.prepare.source import LabelFormat, Recipe, Source
from concat_cli.core.vocabulary import Vocabulary

# LabelMap values of the 59 classes, in their order: the class of the n-th is n.
RAW_59 = tuple(
    int(value)
    for value in (
        "2 9 18 19 22 23 25 31 33 34 44 45 46 59 65 68 72 80 85 98 104 105 113 115 144 158 159 162 "
        "187 189 207 220 232 258 259 260 284 295 296 308 324 326 347 349 354 355 360 366 368 397 "
        "415 416 420 424 427 440 445 454 458"
    ).split()
)
_SPLITS: Mapping[int, str] = {59: "pascal_context_10", 459: "all_seen"}
# The annotated images are all of VOC 2010's train and val: its own lists serve where the others are
# not there.
_LISTS = "ImageSets/SegmentationContext/{part}.txt", "ImageSets/Main/{part}.txt"
_PAGE = "https://www.cs.stanford.edu/~roozbeh/pascal-context/"
_KIT = "VOCtrainval_03-May-2010.tar, http://host.robots.ox.ac.uk/pascal/VOC/voc2010/"
_OFFER = Offer(
    "PASCAL-Context",
    {
        "images": f"Images and lists: {_KIT}",
        "labels": f"Labels: trainval.tar.gz, {_PAGE}",
        "list": f"Lists: ImageSets of {_KIT}",
    },
)


def find(root: Path, classes: Annotated[int, "59 or 459."] = 59) -> Source:
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
    found = choose(root, places, _layouts(vocabulary, classes), _OFFER)
    return Source(
        name=f"pascal-context-{classes}",
        layout=found.name,
        vocabulary=vocabulary,
        tasks=found.layout.tasks,
        parts=found.parts,
        default_split=_SPLITS[classes],
    )


def _layouts(vocabulary: Vocabulary, classes: int) -> Sequence[PairLayout]:
    same = {i: i for i in vocabulary.ids}
    images = ("JPEGImages",)
    plain = LabelFormat("semantic", table=same, void=(0,))
    raw = dict(zip(RAW_59, vocabulary.ids, strict=True)) if classes == 59 else same
    mat = LabelFormat(
        "semantic", pixels="mat", table=raw, void=tuple(i for i in range(460) if i not in raw)
    )
    official = PairLayout("official", images, ("trainval",), mat, label_end=".mat", lists=_LISTS)
    void = 255 if classes == 59 else 65535
    lowered = replace(plain, table={i - 1: i for i in vocabulary.ids}, void=(void,))
    end = ".png" if classes == 59 else ".tif"
    converted = [
        PairLayout(
            "pascal_ctx_d2",
            ("images/{part}",),
            (f"annotations_ctx{classes}/{{part}}",),
            lowered,
            label_end=end,
            words=NAMED,
        ),
        PairLayout(
            "detectron2",
            images,
            (f"annotations_detectron2/pc{classes}_{{part}}",),
            lowered,
            label_end=end,
        ),
    ]
    if classes == 459:
        return [official, *converted]
    context = ("SegmentationClassContext",)
    return [
        PairLayout("mmsegmentation", images, context, plain, lists=_LISTS),
        official,
        *converted,
    ]


def _check_names(path: str, vocabulary: Vocabulary, classes: int) -> None:
    """UserError where the labels.txt beside the labels gives other names to the values."""
    try:
        rows = [line.split(":", 1) for line in read_file(path).decode("utf-8").splitlines() if line]
        names = {int(number): name.strip() for number, name in rows}
    except ValueError as error:
        what = f"{path} is no list of `id: name` lines ({error})."
        raise UserError(what, f"Get it again: {_OFFER.pieces['labels']}") from error
    values = RAW_59 if classes == 59 else vocabulary.ids
    for value, name in zip(values, vocabulary.names, strict=True):
        if (theirs := names.get(value)) is None or _plain(theirs) != _plain(name):
            raise UserError(
                f"{path} calls value {value} {theirs!r}, but PASCAL-Context calls it {name!r}.",
                "These are labels of another data set or version: get them again from " + _PAGE,
            )


def _plain(name: str) -> str:
    return name.replace(" ", "").casefold()


RECIPE = Recipe(
    "pascal-context",
    find,
    "PASCAL Context: PNGs, or the .mat labels as published.",
    (
        "concat prepare-data pascal-context data/voc --out data/context",
        "concat prepare-data pascal-context data/voc --classes 459 --out data/context-459",
    ),
)
