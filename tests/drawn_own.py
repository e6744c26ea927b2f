"""A user's own data in all forms that `prepare-data custom` takes, drawn at small scale."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
from data_helpers import CATEGORIES
from drawn_labels import column_runs, encode

from concat_cli.core.data.dataset import PanopticDataset, read_dataset_info
from concat_cli.core.prepare.recipes.custom import find
from concat_cli.core.prepare.run import Options, prepare_data

SIZE = (12, 16)
NAMES = {3: "cat", 7: "cow", 20: "sky", 21: "wall"}


def halves(left: int, right: int) -> np.ndarray:
    """A map of two values side by side, with a void border below."""
    values = np.full(SIZE, 255, np.uint8)
    values[:10, :8], values[:10, 8:] = left, right
    return values


MAPS = {"a/1.png": halves(0, 1), "a/2.png": halves(2, 3), "3.png": halves(3, 3)}
BOX = np.zeros(SIZE, bool)
BOX[2:6, 4:12] = True


def draw_own(root: Path) -> None:
    """photos, maps of the values 0..3, classes.txt, instances.json (a cat in each image),
    panoptic.json with its PNGs."""
    root.mkdir(parents=True, exist_ok=True)
    (root / "classes.txt").write_text("cat, kitten\ncow\n\n# stuff\nsky : stuff\nwall : stuff\n")
    images, annotations, panoptic = [], [], []
    for number, (name, raw) in enumerate(MAPS.items(), 1):
        photo = name.replace(".png", ".jpg")
        for folder in ("photos", "maps", "pngs"):
            (root / folder / name).parent.mkdir(parents=True, exist_ok=True)
        picture = np.full((*SIZE, 3), 99, np.uint8)
        (root / "photos" / photo).write_bytes(encode(picture, "JPEG"))
        (root / "maps" / name).write_bytes(encode(raw))
        ids = np.stack([raw + 1, raw * 0, raw * 0], -1) * (raw < 255)[..., None]
        (root / "pngs" / name).write_bytes(encode(ids.astype(np.uint8)))
        images.append({"id": number, "file_name": photo, "height": SIZE[0], "width": SIZE[1]})
        annotations.append(
            {"id": number, "image_id": number, "category_id": 50, "iscrowd": 0,
             "segmentation": column_runs(BOX)}
        )  # fmt: skip
        segments = [
            {"id": int(v) + 1, "category_id": [3, 7, 20, 21][v]} for v in np.unique(raw[raw < 255])
        ]
        panoptic.append({"image_id": number, "file_name": name, "segments_info": segments})
    kinds: dict[str, tuple[list[Any], list[Any]]] = {
        "instances": (annotations, [{"id": 50, "name": "cat"}]),
        "panoptic": (panoptic, CATEGORIES),
    }
    for name, (rows, categories) in kinds.items():
        content = {"images": images, "annotations": rows, "categories": categories}
        (root / f"{name}.json").write_text(json.dumps(content))


def prepared(root: Path, **given: str) -> dict[str, list[tuple[str, np.ndarray]]]:
    """Image name -> names and masks of its segments, as val of the prepared data set has them."""
    prepare_data("custom", root, root / "out", Options(processes=1), **given)
    info = read_dataset_info(root / "out")
    assert set(info.tasks) == set(find(root, **given).tasks)
    dataset = PanopticDataset(info.part("val"), info.vocabulary, keep_crowd=True)
    return {
        sample.file_name: [
            (info.vocabulary.names[label], sample.segment_map == i)
            for i, label in enumerate(sample.labels, 1)
        ]
        for sample in map(dataset.__getitem__, range(len(dataset)))
    }


def same(found: list[tuple[str, np.ndarray]], wanted: list[tuple[str, np.ndarray]]) -> bool:
    def key(pair: tuple[str, np.ndarray]) -> tuple[str, bytes]:
        return pair[0], pair[1].tobytes()

    return sorted(map(key, found)) == sorted(map(key, wanted))
