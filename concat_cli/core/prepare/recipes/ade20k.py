"""ADE20K: 150 classes of scene parsing, semantic or panoptic, and the 847 of the full release."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Annotated, Any

from concat_cli.core.data.class_split import load_class_list
from concat_cli.core.errors import UserError
from concat_cli.core.prepare.recipes.layouts import (
    CocoLayout,
    Layout,
    Offer,
    PairLayout,
    bases,
    choose,
    digits,
    unpacking,
)
from concat_cli.core.prepare.source import EVERY, LabelFormat, Recipe, Source
from concat_cli.core.vocabulary import Vocabulary

_FULL_IDS = 3688  # object classes of release 2021_17_01, of which 847 count
_IMAGES = ("images/{part}",)
_PAGE = "http://sceneparsing.csail.mit.edu"
_CHALLENGE = (
    f"Images and labels: ADEChallengeData2016.zip, {_PAGE} (ADE20K_2021_17_01 is for --classes 847)"
)
_OFFERS = {
    150: Offer(
        "ADE20K (150 classes)",
        {
            "images": _CHALLENGE,
            "labels": _CHALLENGE,
            "instances": f"Instances: annotations_instance.tar, {_PAGE}",
            "json": "ade20k_panoptic_*.json: written by Mask2Former's prepare_ade20k_pan_seg.py",
        },
    ),
    847: Offer(
        "ADE20K-Full",
        {
            "images": "ADE20K_2021_17_01, https://ade20k.csail.mit.edu (after registration)",
            "labels": "ADE20K_2021_17_01, https://ade20k.csail.mit.edu (after registration)",
        },
    ),
}
_ALONE = (
    "There are no instances (annotations_instance, or ade20k_panoptic_*.json with its PNGs): the "
    f"data can score mIoU, not PQ. {_OFFERS[150].pieces['instances']}"
)


def find(
    root: Path,
    classes: Annotated[int, "150 or 847."] = 150,
    task: Annotated[str, "panoptic or semantic. Default: what is there."] = "",
) -> Source:
    """ADE20K as its publishers pack it or as detectron2's users convert it; UserError that lists
    what is missing.

    Args:
        classes: 150, or the 847 of ADE20K-Full.
        task: "panoptic" or "semantic", of 150 classes; "" takes instances where they are there.
    """
    if classes not in _OFFERS or task not in ("", "panoptic", "semantic"):
        raise UserError(
            f"There is no ADE20K of {classes} classes{f' for task {task!r}' * bool(task)}.",
            "The classes are 150 or 847; the task is panoptic or semantic.",
        )
    if classes == 847 and task == "panoptic":
        raise UserError("ADE20K-Full is semantic here: it has no panoptic task.", "Leave out task.")
    vocabulary = load_class_list(f"ade20k_{classes}")
    folder = "ADEChallengeData2016" if classes == 150 else "ADE20K_2021_17_01"
    layouts = _of_150(vocabulary) if classes == 150 else _of_847(vocabulary)
    wanted = [
        one for one in layouts if not task or ("panoptic" in one.tasks) == (task == "panoptic")
    ]
    found = choose(root, bases(root, folder), wanted, _OFFERS[classes])
    alone = classes == 150 and not task and "panoptic" not in found.layout.tasks
    command = unpacking(root)
    note = f"{_ALONE}; unpack it: {command}" if command else _ALONE
    split = "all_seen" if classes == 150 else "ade20k_full_572_275"
    return found.source(f"ade20k-{classes}", vocabulary, split, (note,) if alone else ())


def _of_150(vocabulary: Vocabulary) -> list[Layout]:
    semantic = LabelFormat("semantic", table={i: i for i in vocabulary.ids}, void=(0,))
    things = [entry.id for entry in vocabulary.entries if entry.kind == "thing"]
    both = replace(semantic, kind="things_over_stuff", things=dict(enumerate(things, 1)))
    lowered = replace(semantic, table={i - 1: i for i in vocabulary.ids}, void=(255,))
    labels = ("annotations/{part}",)
    instances = ("annotations_instance/{part}",)
    name = "official with instances"

    def category(row: dict[str, Any]) -> int | None:
        """Mask2Former's script numbers the classes from 0 and spells some names in its own way."""
        number = int(row["id"]) + 1
        return number if number in vocabulary.index_of_id else None

    return [
        CocoLayout(
            "panoptic JSON",
            images=("images/{long}",),
            json=("ade20k_panoptic_{part}.json",),
            pngs=("ade20k_panoptic_{part}",),
            category=category,
            image=lambda row: (digits(str(row["id"])), str(row["file_name"])),
        ),
        PairLayout(name, _IMAGES, labels, both, second=instances, long=True, tasks=EVERY),
        PairLayout("official", _IMAGES, labels, semantic, long=True),
        PairLayout("detectron2", _IMAGES, ("annotations_detectron2/{part}",), lowered, long=True),
    ]


def _of_847(vocabulary: Vocabulary) -> list[Layout]:
    others = tuple(i for i in range(_FULL_IDS + 1) if i not in vocabulary.index_of_id)
    raw = LabelFormat("semantic", "ade_rg", {i: i for i in vocabulary.ids}, others)
    positions = LabelFormat("semantic", table=dict(enumerate(vocabulary.ids)), void=(65535,))
    places = ("images/ADE/{part}",)
    images, labels = ("images_detectron2/{part}",), ("annotations_detectron2/{part}",)
    return [
        PairLayout("official", places, places, raw, label_end="_seg.png", long=True),
        PairLayout("detectron2", images, labels, positions, label_end=".tif", long=True),
    ]


RECIPE = Recipe(
    "ade20k",
    find,
    "ADE20K: ADEChallengeData2016 (150 classes) or ADE20K_2021_17_01 (847).",
    (
        "concat prepare-data ade20k data/ade",
        "concat prepare-data ade20k data/ade-full --classes 847",
    ),
)
