"""A scene of the built-in world as COCO panoptic: ids, segments, the JSON of a part."""

from __future__ import annotations

import colorsys
from collections.abc import Collection, Iterable, Iterator
from dataclasses import replace
from typing import Any

import numpy as np

from concat_cli.core.data.index import Row
from concat_cli.core.data.shapes import Scene
from concat_cli.core.data.shapes_random import Random
from concat_cli.core.data.shapes_split import CLASSES

WORLD = 1  # raised when the same seed draws other pixels


def row_of(scene: Scene, image_id: int, name: str) -> Row:
    """All segments of a scene, numbered from 1."""
    numbers = range(1, len(scene.labels) + 1)
    areas = np.bincount(scene.segment_map.ravel(), minlength=len(numbers) + 1)[1:]
    categories = [CLASSES.ids[label] for label in scene.labels.tolist()]
    height, width = scene.segment_map.shape
    crowd = [0] * len(numbers)
    return Row(image_id, name, name, height, width, [*numbers], categories, crowd, areas.tolist())


def without(scene: Scene, hidden: Collection[int]) -> Scene:
    """The scene without the segments of these classes: their pixels are 0, void."""
    keep = np.array([label not in hidden for label in scene.labels.tolist()], bool)
    number = np.append(0, np.where(keep, keep.cumsum(), 0)).astype(scene.segment_map.dtype)
    return replace(scene, segment_map=number[scene.segment_map], labels=scene.labels[keep])


def segment_ids(scene: Scene, image_id: int) -> list[int]:
    """Ids as COCO's: near the category's colour, R + 256 G + 65536 B, different within an image."""
    rng = Random(image_id)
    ids: list[int] = []
    for label in scene.labels.tolist():
        code = 0
        while code == 0 or code in ids:
            r, g, b = (min(max(v + rng.below(41) - 20, 0), 255) for v in category_colour(label))
            code = r | g << 8 | b << 16
        ids.append(code)
    return ids


def segments_info(scene: Scene, ids: Iterable[int]) -> Iterator[dict[str, Any]]:
    """The entries of a scene's segments, in its order."""
    for i, (label, code) in enumerate(zip(scene.labels.tolist(), ids, strict=True)):
        mask = scene.segment_map == i + 1
        rows, columns = (np.flatnonzero(mask.any(axis=axis)) for axis in (1, 0))
        x, y = int(columns[0]), int(rows[0])
        yield {
            "id": code,
            "category_id": CLASSES.ids[label],
            "area": int(np.count_nonzero(mask)),
            "bbox": [x, y, int(columns[-1]) - x + 1, int(rows[-1]) - y + 1],
            "iscrowd": 0,
        }


def category_colour(label: int) -> tuple[int, int, int]:
    """A class's colour in COCO's categories: hues a golden section apart, three depths."""
    r, g, b = colorsys.hsv_to_rgb(label * 0.618034 % 1.0, 0.55 + 0.2 * (label % 3), 0.9)
    return int(255 * r), int(255 * g), int(255 * b)


def panoptic_json(part: str, size: int, annotations: list[dict[str, Any]]) -> dict[str, Any]:
    """The COCO panoptic JSON of one part."""
    return {
        "info": {"description": f"concat shapes, {part}", "version": str(WORLD)},
        "licenses": [],
        "images": [
            {"id": a["image_id"], "file_name": a["file_name"], "height": size, "width": size}
            for a in annotations
        ],
        "annotations": annotations,
        "categories": [
            {
                "id": entry.id,
                "name": entry.name,
                "supercategory": entry.name.split()[1],
                "isthing": int(entry.kind == "thing"),
                "color": list(category_colour(label)),
            }
            for label, entry in enumerate(CLASSES.entries)
        ],
    }
