"""A miniature data set in COCO panoptic format, drawn for tests."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from concat_cli.core.data.dataset import Part, Sample
from concat_cli.core.data.image_io import write_id_png
from concat_cli.core.vocabulary import Vocabulary

CATEGORIES = [
    {"id": 3, "name": "cat", "isthing": 1},
    {"id": 7, "name": "cow", "isthing": 1},
    {"id": 20, "name": "sky", "isthing": 0},
    {"id": 21, "name": "wall", "isthing": 0},
]
VOCABULARY = Vocabulary.from_categories(CATEGORIES)
PHOTOS = Path(__file__).parents[2] / "shared" / "samples" / "coco_panoptic"


def write_scene(
    images: Path, pngs: Path, image_id: int, classes: list[int], size: tuple[int, int] = (24, 32)
) -> tuple[dict[str, Any], dict[str, Any]]:
    """One image of vertical bands, a segment each, with a band of void; its two JSON entries."""
    height, width = size
    edges = np.linspace(0, width, len(classes) + 2).astype(int)
    ids = np.zeros(size, np.int64)
    picture = np.full((height, width, 3), 8 + image_id % 50, np.uint8)
    segments = []
    for i, category in enumerate(classes):
        number = 1 + 70_000 * i + image_id  # uses all three channels of the PNG
        ids[:, edges[i] : edges[i + 1]] = number
        picture[:, edges[i] : edges[i + 1], 1] = 60 + 30 * i
        area = int((ids == number).sum())
        box = [int(edges[i]), 0, int(edges[i + 1] - edges[i]), height]
        segments.append(
            {"id": number, "category_id": category, "area": area, "bbox": box, "iscrowd": 0}
        )
    name = f"{image_id:012d}"
    for folder in (images, pngs):
        folder.mkdir(parents=True, exist_ok=True)
    Image.fromarray(picture).save(images / f"{name}.png")
    write_id_png(pngs / f"{name}.png", ids)
    image = {"id": image_id, "file_name": f"{name}.png", "height": height, "width": width}
    annotation = {"image_id": image_id, "file_name": f"{name}.png", "segments_info": segments}
    return image, annotation


def write_part(
    part: Part, scenes: dict[int, list[int]], sizes: dict[int, tuple[int, int]] | None = None
) -> Part:
    """Image id -> category ids of its segments, written as a panoptic data set."""
    rows = [
        write_scene(
            part.images, part.labels, image_id, classes, (sizes or {}).get(image_id, (24, 32))
        )
        for image_id, classes in scenes.items()
    ]
    part.index.parent.mkdir(parents=True, exist_ok=True)
    content = {
        "images": [image for image, _ in rows],
        "annotations": [annotation for _, annotation in rows],
        "categories": CATEGORIES,
    }
    part.index.write_text(json.dumps(content))
    return part


def simple_part(root: Path) -> Part:
    """The places of the simple layout below `root`."""
    return Part(root / "images", root / "panoptic.json", root / "panoptic")


def official_part(root: Path, part: str) -> Part:
    """The places of the official COCO layout below `root`."""
    json_file = root / "annotations" / f"panoptic_{part}2017.json"
    return Part(root / f"{part}2017", json_file, json_file.with_suffix(""))


def edit_json(path: Path, change: Any) -> None:
    """Applies `change` to the parsed content of a JSON file, in place."""
    content = json.loads(path.read_text())
    change(content)
    path.write_text(json.dumps(content))


def coded_sample(height: int, width: int, segments: int, rng: np.random.Generator) -> Sample:
    """A sample whose green channel tells the segment of each pixel: 20 x its number (0 is void)."""
    segment_map = rng.integers(0, segments + 1, (1 + height // 8, 1 + width // 8), dtype=np.int32)
    segment_map = segment_map.repeat(8, 0).repeat(8, 1)[:height, :width]
    used = np.unique(segment_map[segment_map > 0])
    new = np.zeros(segments + 1, np.int32)
    new[used] = np.arange(1, len(used) + 1)
    segment_map = np.ascontiguousarray(new[segment_map])
    labels = np.arange(len(used), dtype=np.int64) + 5
    image = np.zeros((height, width, 3), np.uint8)
    image[..., 1] = np.where(segment_map > 0, 20 * (np.append(0, labels)[segment_map] - 4), 0)
    image[..., 0] = np.arange(width, dtype=np.uint8)
    return Sample(image, segment_map, labels, np.zeros(len(used), bool), 1, "coded.png")
