"""Where each known data set is looked for: name -> `find(root, **options) -> Source`."""

from __future__ import annotations

from collections.abc import Callable
from importlib import import_module
from pathlib import Path
from typing import Any

from concat_cli.core.data.source import Source

Find = Callable[..., Source]


def _find(module: str) -> Find:
    """The recipe's `find`, imported when it is called."""

    def find(root: Path, **options: Any) -> Source:
        return import_module(f"{__name__}.{module}").find(root, **options)

    return find


RECIPES: dict[str, Find] = {
    "coco": _find("coco"),
    "coco-instances": _find("coco_instances"),
    "coco-stuff": _find("coco_stuff"),
    "voc": _find("voc"),
    "pascal-context": _find("pascal_context"),
    "ade20k": _find("ade20k"),
    "cityscapes": _find("cityscapes"),
    "custom": _find("custom"),
}
