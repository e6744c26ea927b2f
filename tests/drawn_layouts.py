"""Every layout of the field's data sets, drawn at small scale: 48 x 64 pixels, a few images a part.

A `Case` draws one and knows the truth of each image, by rules written anew in `drawn_*.py`: what a
raw value means is a small function, and the product's tables are not looked at.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import drawn_ade as ade
import drawn_cityscapes as city
import drawn_coco as coco
import drawn_custom as custom
import drawn_voc as voc
from drawn_files import Truth


@dataclass(frozen=True)
class Case:
    """A layout: which recipe finds it, what it calls it, and how it is drawn."""

    recipe: str
    layout: str
    draw: Callable[[Path], Truth]
    options: Mapping[str, Any] = field(default_factory=dict)
    tasks: tuple[str, ...] = ("semantic",)


EVERY = ("panoptic", "semantic", "instance")
CASES: dict[str, Case] = {
    "coco": Case("coco", "official", coco.coco_panoptic, {}, EVERY),
    "coco detectron2": Case("coco", "official", coco.coco_panoptic_detectron, {}, EVERY),
    "coco zips": Case("coco", "official, zips in place", coco.coco_panoptic_zips, {}, EVERY),
    "coco zips stored": Case(
        "coco", "official, zips in place", coco.coco_panoptic_zips_stored, {}, EVERY
    ),
    "coco-stuff": Case("coco-stuff", "official", coco.coco_stuff),
    "coco-stuff zips": Case("coco-stuff", "official, zips in place", coco.coco_stuff_zips),
    "coco-stuff mmseg": Case("coco-stuff", "mmsegmentation", coco.coco_stuff_mmseg),
    "coco-stuff mmseg raw": Case("coco-stuff", "official", coco.coco_stuff_mmseg_both),
    "coco-stuff detectron2": Case("coco-stuff", "detectron2", coco.coco_stuff_detectron),
    "voc trainaug": Case("voc", "official", voc.voc_trainaug),
    "voc mmseg": Case("voc", "official", voc.voc_mmseg),
    "voc SBD zip": Case("voc", "official, zips in place", voc.voc_aug_zip),
    "voc one zip": Case("voc", "official, zips in place", voc.voc_one_zip),
    "voc background": Case("voc", "official", voc.voc_background, {"background": True}),
    "voc VOCZERO": Case("voc", "VOCZERO", voc.voc_zero),
    "voc d2": Case("voc", "pascal_voc_d2 of 20 classes", voc.voc_d2),
    "context mmseg": Case("pascal-context", "mmsegmentation", voc.context_mmseg),
    "context mat 59": Case("pascal-context", "official", voc.context_mat_59),
    "context mat 459 zip": Case(
        "pascal-context", "official, zips in place", voc.context_mat_459, {"classes": 459}
    ),
    "context d2 459": Case("pascal-context", "pascal_ctx_d2", voc.context_d2, {"classes": 459}),
    "context val only": Case("pascal-context", "detectron2", voc.context_val_only),
    "ade semantic": Case("ade20k", "official", ade.ade_semantic),
    "ade zip": Case("ade20k", "official, zips in place", ade.ade_zip),
    "ade instances": Case("ade20k", "official with instances", ade.ade_instances, {}, EVERY),
    "ade panoptic JSON": Case("ade20k", "panoptic JSON", ade.ade_panoptic, {}, EVERY),
    "ade detectron2": Case("ade20k", "detectron2", ade.ade_converted),
    "ade full": Case("ade20k", "official", ade.ade_full, {"classes": 847}),
    "ade full zip": Case("ade20k", "official, zips in place", ade.ade_full_zip, {"classes": 847}),
    "ade full tiff": Case("ade20k", "detectron2", ade.ade_full_tiff, {"classes": 847}),
    "cityscapes": Case("cityscapes", "official", city.cityscapes, {}, EVERY),
    "cityscapes zips": Case(
        "cityscapes", "official, zips in place", city.cityscapes_zips, {}, EVERY
    ),
    "cityscapes JSON": Case("cityscapes", "panoptic JSON", city.cityscapes_json, {}, EVERY),
    "cityscapes JSON train ids": Case(
        "cityscapes", "panoptic JSON with train ids", city.cityscapes_json_train_ids, {}, EVERY
    ),
    "cityscapes labelIds": Case("cityscapes", "labelIds", city.cityscapes_label_ids),
    "cityscapes labelTrainIds": Case("cityscapes", "labelTrainIds", city.cityscapes_train_ids),
    "coco instances": Case("coco-instances", "official", coco.coco_instances, {}, ("instance",)),
    "coco instances 65 zips": Case(
        "coco-instances",
        "official, zips in place",
        coco.coco_instances_zips,
        {"year": 2014, "classes": 65},
        ("instance",),
    ),
    "custom panoptic": Case("custom", "panoptic", custom.panoptic, custom.PANOPTIC, EVERY),
    "custom panoptic zips": Case(
        "custom", "panoptic, zips in place", custom.panoptic_zips, custom.PANOPTIC_ZIPS, EVERY
    ),
    "custom instances": Case(
        "custom", "instances", custom.instances, custom.INSTANCES, ("instance",)
    ),
    "custom semantic": Case("custom", "semantic", custom.semantic, custom.SEMANTIC),
    "custom semantic zip": Case(
        "custom", "semantic, zips in place", custom.semantic_zip, custom.SEMANTIC_ZIP
    ),
    "custom merged": Case("custom", "instances over semantic", custom.merged, custom.MERGED, EVERY),
}
