"""Cityscapes: 19 classes of street scenes, 8 of them things."""

from __future__ import annotations

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

    def pairs(end: str, form: LabelFormat, name: str, tasks: tuple[Task, ...]) -> PairLayout:
        return PairLayout(
            name,
            _IMAGES,
            _LABELS,
            form,
            image_end="_leftImg8bit.png",
            label_end=f"_gtFine_{end}.png",
            number=hashed,
            tasks=tasks,
        )

    def panoptic(name: str, suffix: str) -> CocoLayout:
        return CocoLayout(
            name,
            images=_IMAGES,
            json=tuple(f"{place}{suffix}.json" for place in _JSON),
            pngs=tuple(place + suffix for place in _JSON),
            category=lambda row: _id_of(vocabulary, row),
            image=_image,
        )

    return [
        pairs("instanceIds", LabelFormat("cityscapes", table=labels, void=void), "official", EVERY),
        panoptic("panoptic JSON", ""),
        panoptic("panoptic JSON with train ids", "_trainId"),
        pairs("labelIds", LabelFormat("semantic", table=labels, void=void), "labelIds", _SEMANTIC),
        pairs(
            "labelTrainIds",
            LabelFormat("semantic", table=positions, void=(255,)),
            "labelTrainIds",
            _SEMANTIC,
        ),
    ]


_SEMANTIC: tuple[Task, ...] = ("semantic",)


def _id_of(vocabulary: Vocabulary, category: dict[str, Any]) -> int | None:
    """By name, for the JSON may be written with label ids or with train ids."""
    index = vocabulary.index_of_name.get(str(category["name"]))
    return None if index is None else vocabulary.ids[index]


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
