"""The known data sets: one file each says where it is looked for, and what its command says."""

from __future__ import annotations

from concat_cli.core.prepare.recipes import ade20k, cityscapes, coco, custom, pascal
from concat_cli.core.prepare.source import Recipe

RECIPES: dict[str, Recipe] = {
    recipe.name: recipe
    for recipe in (
        coco.PANOPTIC,
        coco.INSTANCES,
        coco.STUFF,
        pascal.VOC,
        pascal.CONTEXT,
        ade20k.RECIPE,
        cityscapes.RECIPE,
        custom.RECIPE,
    )
}
