"""Cityscapes: 19 classes of street scenes, 8 of them things."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

from concat_cli.core.data.class_split import load_class_list
from concat_cli.core.prepare.recipes.layouts import (
    CocoLayout,
    Layout,
    Offer,
    PairLayout,
    bases,
    choose,
    hashed,
)
from concat_cli.core.prepare.source import EVERY, LabelFormat, Recipe, Source, Task
from concat_cli.core.vocabulary import Vocabulary

_IMAGES = "leftImg8bit/{part}", "leftImg8bit_trainvaltest.zip!leftImg8bit/{part}"
_LABELS = "gtFine/{part}", "gtFine_trainvaltest.zip!gtFine/{part}"
_JSON = "gtFine/cityscapes_panoptic_{part}", "cityscapes_panoptic_{part}"
_SITE = "https://www.cityscapes-dataset.com/downloads/"
_OFFER = Offer(
    "Cityscapes",
    {
        "images": f"Images: leftImg8bit_trainvaltest.zip, {_SITE}",
        "labels": f"Labels: gtFine_trainvaltest.zip, {_SITE}",
    },
)


def find(root: Path) -> Source:
    """Cityscapes from its instanceIds PNGs, its panoptic JSON, or semantic PNGs alone, which have
    no instances; UserError that lists what is missing."""
    vocabulary = load_class_list("cityscapes_19")
    places = bases(root, "cityscapes", archives=False)
    found = choose(root, places, _layouts(vocabulary), _OFFER)
    return found.source("cityscapes", vocabulary, "all_seen")


def _layouts(vocabulary: Vocabulary) -> list[Layout]:
    void = tuple(i for i in range(34) if i not in vocabulary.index_of_id)
    labels = {i: i for i in vocabulary.ids}
    positions = dict(enumerate(vocabulary.ids))

    def pairs(name: str, end: str, form: LabelFormat, *tasks: Task) -> PairLayout:
        ends = "_leftImg8bit.png", f"_gtFine_{end}.png"
        return PairLayout(name, _IMAGES, _LABELS, form, *ends, number=hashed, tasks=tasks)

    def panoptic(name: str, suffix: str) -> CocoLayout:
        pngs = tuple(place + suffix for place in _JSON)
        json = tuple(f"{place}.json" for place in pngs)
        return CocoLayout(name, _IMAGES, json, pngs, category=category, image=_image)

    def category(row: dict[str, Any]) -> int | None:
        """By name, for the JSON may be written with label ids or with train ids."""
        index = vocabulary.index_of_name.get(str(row["name"]))
        return None if index is None else vocabulary.ids[index]

    raw = LabelFormat("semantic", table=labels, void=void)
    trained = LabelFormat("semantic", table=positions, void=(255,))
    return [
        pairs("official", "instanceIds", replace(raw, kind="cityscapes"), *EVERY),
        panoptic("panoptic JSON", ""),
        panoptic("panoptic JSON with train ids", "_trainId"),
        pairs("labelIds", "labelIds", raw, "semantic"),
        pairs("labelTrainIds", "labelTrainIds", trained, "semantic"),
    ]


def _image(image: dict[str, Any]) -> tuple[int, str]:
    """The JSON's id is city_sequence_frame; its file_name is that of no file on disk."""
    name = str(image["id"])
    return hashed(name), f"{name.partition('_')[0]}/{name}_leftImg8bit.png"


RECIPE = Recipe(
    "cityscapes",
    find,
    "Cityscapes, 19 classes: leftImg8bit and gtFine.",
    ("concat prepare-data cityscapes data/cityscapes",),
)
