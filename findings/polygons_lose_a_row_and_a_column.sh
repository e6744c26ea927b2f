#!/usr/bin/env bash
# datumaro 1.13.12, export "coco_instances" with segmentation_mode="polygons"; supervision 0.31.2,
# `DetectionDataset.as_coco` (numpy 2.4.6, opencv-python-headless 4.14.0.94, pycocotools 2.0.11).
#
# Expected: the polygons of a mask cover it again when pycocotools, with which COCO is scored, reads
# them.
# Seen: both go through the centres of the outer pixels, as OpenCV finds them, while COCO's go around
# the pixels: 12 x 16 pixels come back as 11 x 15 (supervision writes the area of 192 beside them, and
# reads 192 back itself), and a line of 16 pixels has no polygon at all. An IoU of 0.86 is then the
# best that a flawless mask of that size can reach.
set -euo pipefail
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
python3 -m venv "$work/venv"
"$work/venv/bin/pip" install -q datumaro==1.13.12 supervision==0.31.2 numpy==2.4.6 \
    opencv-python-headless==4.14.0.94 pycocotools==2.0.11
cd "$work"
"$work/venv/bin/python" -W ignore - <<'PY'
import json
from pathlib import Path

import datumaro
import numpy as np
import supervision
from PIL import Image
from pycocotools import mask as coco

photo = np.full((32, 48, 3), 80, np.uint8)
Image.fromarray(photo).save("a.png")
square, line = np.zeros((2, 32, 48), bool)
square[4:16, 4:20] = True
line[4, 4:20] = True


def by_datumaro(mask):
    mask = datumaro.Mask(mask.astype(np.uint8), label=0, id=1, group=1)
    item = datumaro.DatasetItem("a", media=datumaro.Image.from_numpy(data=photo), annotations=[mask])
    made = datumaro.Dataset.from_iterable([item], categories=["square"])
    made.export("datumaro", "coco_instances", segmentation_mode="polygons")
    return json.loads(next(Path("datumaro").rglob("*.json")).read_text())["annotations"]


def by_supervision(mask):
    found = supervision.Detections(
        xyxy=np.array([[4.0, 4, 20, 16]]), mask=mask[None], class_id=np.array([0])
    )
    made = supervision.DetectionDataset(["square"], ["a.png"], {"a.png": found})
    made.as_coco(annotations_path="supervision.json")
    return json.loads(Path("supervision.json").read_text())["annotations"]


seen = []
for writer in (by_datumaro, by_supervision):
    for name, mask in (("square", square), ("line", line)):
        polygons = [one for row in writer(mask) for one in row["segmentation"]]
        pixels = int(coco.area(coco.merge(coco.frPyObjects(polygons, 32, 48)))) if polygons else 0
        seen.append(pixels)
        print(f"{writer.__name__}: a {name} of {mask.sum()} pixels is read as {pixels}: {polygons}")
assert seen[0] == seen[2] == 11 * 15 and seen[1] == seen[3] == 0, "the behaviour has changed"
PY
