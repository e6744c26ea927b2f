"""COCO-Stuff: 171 classes on the images of COCO 2017."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

from concat_cli.core.data.class_list import load_class_list
from concat_cli.core.data.recipes.coco import IMAGES
from concat_cli.core.data.recipes.layouts import PairLayout
from concat_cli.core.data.recipes.places import Offer, bases, choose
from concat_cli.core.data.source import LabelFormat, Source
from concat_cli.core.vocabulary import Vocabulary

_MAPS = "stuffthingmaps_trainval2017"
_LABELS = (
    "stuffthingmaps/{part}2017",
    f"{_MAPS}/{{part}}2017",
    f"{_MAPS}.zip!{{part}}2017",
    f"{_MAPS}.zip!{_MAPS}/{{part}}2017",
    f"annotations/{_MAPS}.zip!{{part}}2017",
    "annotations/{part}2017",
)
_TRAIN_IDS = "_labelTrainIds.png"
_OFFER = Offer(
    "COCO-Stuff",
    {
        "images": "Images: train2017.zip and val2017.zip, https://cocodataset.org/#download",
        "labels": "Labels: stuffthingmaps_trainval2017.zip, https://github.com/nightrome/cocostuff",
    },
)


def find(root: Path) -> Source:
    """COCO-Stuff as its publishers pack it, as mmsegmentation has it, or as detectron2's users do;
    UserError that lists what is missing."""
    vocabulary = load_class_list("coco_stuff_171")
    folders = ("coco", "coco_stuff164k", "coco_stuff", "coco-stuff", "coco/coco_stuff")
    places = bases(root, *folders, archives=False)
    found = choose(root, places, _layouts(vocabulary), _OFFER)
    return Source(
        name="coco-stuff",
        layout=found.name,
        vocabulary=vocabulary,
        tasks=found.layout.tasks,
        parts=found.parts,
        default_split="coco_stuff_156_15",
    )


def _layouts(vocabulary: Vocabulary) -> list[PairLayout]:
    raw = LabelFormat("semantic", table={i - 1: i for i in vocabulary.ids}, void=(255,))
    positions = replace(raw, table=dict(enumerate(vocabulary.ids)))
    converted = "stuffthingmaps_detectron2/{part}2017", "annotations_detectron2/{part}2017"
    return [
        PairLayout("official", IMAGES, _LABELS, raw, but=(_TRAIN_IDS,)),
        PairLayout("mmsegmentation", IMAGES, _LABELS[-1:], positions, label_end=_TRAIN_IDS),
        PairLayout("detectron2", IMAGES, converted, positions),
    ]
