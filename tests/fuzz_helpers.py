"""What tests of damaged input share: how data are prepared and read, and what may come of it."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import Any

import numpy as np
from data_helpers import CATEGORIES
from PIL import Image

from concat_cli.core.data.dataset import PanopticDataset, read_dataset_info
from concat_cli.core.prepare.run import Options, prepare_data

INSTANCES = {  # what the recipe "custom" is given for `write_instances`
    "images": "train2017",
    "json": "annotations/instances_train2017.json",
    "val_images": "val2017",
    "val_json": "annotations/instances_val2017.json",
}


def prepare_and_read(root: Path, name: str = "coco", **given: Any) -> str:
    """What a user does: prepare with every class seen, then read every sample; its digest."""
    options = Options(class_split="all_seen", processes=1)
    prepare_data(name, root, root / "out", options, **given)
    return read_all(root / "out")


def read_all(out: Path) -> str:
    """A digest of every sample of every part."""
    info, found = read_dataset_info(out), hashlib.sha256()
    for part in info.parts:
        dataset = PanopticDataset(info.part(part), info.vocabulary, keep_crowd=True)
        for i in range(len(dataset)):
            sample = dataset[i]
            assert sample.image.shape[:2] == sample.segment_map.shape
            assert sample.segment_map.max(initial=0) <= len(sample.labels)
            for values in (sample.image, sample.segment_map, sample.labels, sample.crowd):
                found.update(values.tobytes())
    return found.hexdigest()


def write_instances(root: Path) -> Path:
    """A small data set of COCO instances: polygons, run lengths and a crowd."""
    rng = np.random.default_rng(0)
    for number, part in ((1, "train"), (2, "train"), (3, "val")):
        (root / f"{part}2017").mkdir(exist_ok=True)
        picture = rng.integers(0, 255, (24, 32, 3), np.uint8)
        Image.fromarray(picture).save(root / f"{part}2017" / f"{number}.jpg")
    (root / "annotations").mkdir()
    for part, numbers in (("train", (1, 2)), ("val", (3,))):
        content = {
            "images": [
                {"id": n, "file_name": f"{n}.jpg", "height": 24, "width": 32} for n in numbers
            ],
            "annotations": [row for n in numbers for row in _instances_of(n)],
            "categories": [row for row in CATEGORIES if row["isthing"]],
        }
        (root / "annotations" / f"instances_{part}2017.json").write_text(json.dumps(content))
    return root


def _instances_of(image_id: int) -> list[dict[str, Any]]:
    polygon = [[1.0, 1.0, 12.0, 1.0, 12.0, 12.0, 1.0, 12.0]]
    common = {"image_id": image_id, "bbox": [1, 1, 11, 11], "area": 121}
    rle = {"counts": [100, 20, 648], "size": [24, 32]}
    return [
        common | {"id": 10 * image_id, "category_id": 3, "iscrowd": 0, "segmentation": polygon},
        common | {"id": 10 * image_id + 1, "category_id": 7, "iscrowd": 1, "segmentation": rle},
    ]
