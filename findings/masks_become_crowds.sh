#!/usr/bin/env bash
# datumaro 1.13.12, export "coco_instances"; supervision 0.31.2, `DetectionDataset.as_coco`
# (numpy 2.4.6, opencv-python-headless 4.14.0.94).
#
# Expected: an object has `iscrowd` 0; 1 marks a group that nobody divided, which COCO's scorers leave
# aside and training code leaves out.
# Seen: datumaro marks every mask so that does not say otherwise itself, supervision every mask with
# a hole: run lengths and crowds are one thing to both. Whoever trains on it sees no such object, or
# no object at all, without a word.
set -euo pipefail
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
python3 -m venv "$work/venv"
"$work/venv/bin/pip" install -q datumaro==1.13.12 supervision==0.31.2 numpy==2.4.6 \
    opencv-python-headless==4.14.0.94
cd "$work"
"$work/venv/bin/python" -W ignore - <<'PY'
import json
from pathlib import Path

import datumaro
import numpy as np
import supervision
from PIL import Image

photo = np.full((32, 48, 3), 80, np.uint8)
Image.fromarray(photo).save("a.png")
whole = np.zeros((32, 48), bool)
whole[4:16, 4:20] = True
ring = whole.copy()
ring[8:12, 8:12] = False


def by_datumaro(mask):
    mask = datumaro.Mask(mask.astype(np.uint8), label=0, id=1, group=1)
    item = datumaro.DatasetItem("a", media=datumaro.Image.from_numpy(data=photo), annotations=[mask])
    made = datumaro.Dataset.from_iterable([item], categories=["square"])
    made.export("datumaro", "coco_instances")
    return json.loads(next(Path("datumaro").rglob("*.json")).read_text())["annotations"]


def by_supervision(mask):
    found = supervision.Detections(
        xyxy=np.array([[4.0, 4, 20, 16]]), mask=mask[None], class_id=np.array([0])
    )
    made = supervision.DetectionDataset(["square"], ["a.png"], {"a.png": found})
    made.as_coco(annotations_path="supervision.json")
    return json.loads(Path("supervision.json").read_text())["annotations"]


seen = {}
for writer in (by_datumaro, by_supervision):
    for name, mask in (("whole", whole), ("with a hole", ring)):
        (annotation,) = writer(mask)
        seen[writer.__name__, name] = annotation["iscrowd"]
        print(f"{writer.__name__}: one object, {name}: iscrowd {annotation['iscrowd']}")
assert list(seen.values()) == [1, 1, 0, 1], "the behaviour has changed"
PY
