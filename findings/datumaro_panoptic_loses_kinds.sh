#!/usr/bin/env bash
# datumaro 1.13.12, `coco_panoptic`, and supervision 0.31.2, `DetectionDataset.as_coco`.
#
# Expected: a panoptic data set that is read and written again means the same.
# Seen: every category has `isthing` 0 after it, and categories 3 and 7 have become 1 and 2, so that
# things count as stuff, and predictions made with the first JSON mean other classes in the second. The
# polygons that datumaro, and then supervision, write of a mask run through the middles of its outer
# pixels, which COCO reads as corners: a rectangle of 10 x 20 pixels loses a row and a column.
set -euo pipefail
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
python3 -m venv "$work/venv"
"$work/venv/bin/pip" install -q datumaro==1.13.12 supervision==0.31.2
mkdir -p "$work/in/annotations/panoptic_val" "$work/in/images/val" && cd "$work"
"$work/venv/bin/python" - <<'PY'
import json

import datumaro
import numpy as np
import supervision
from PIL import Image
from pycocotools import mask as coco_mask

ids = np.zeros((40, 60), np.uint8)
ids[5:15, 5:25], ids[30:, :] = 1, 2
Image.new("RGB", (60, 40)).save("in/images/val/a.jpg")
Image.fromarray(np.dstack([ids, 0 * ids, 0 * ids])).save("in/annotations/panoptic_val/a.png")
truth = {
    "images": [{"id": 1, "file_name": "a.jpg", "height": 40, "width": 60}],
    "annotations": [
        {"image_id": 1, "file_name": "a.png", "segments_info": [
            {"id": i, "category_id": c, "iscrowd": 0, "area": int((ids == i).sum()), "bbox": b}
            for i, c, b in ((1, 3, [5, 5, 20, 10]), (2, 7, [0, 30, 60, 10]))
        ]}
    ],
    "categories": [{"id": 3, "name": "cat", "isthing": 1}, {"id": 7, "name": "sky", "isthing": 0}],
}
json.dump(truth, open("in/annotations/panoptic_val.json", "w"))
data = datumaro.Dataset.import_from("in", "coco_panoptic")
data.export("panoptic", "coco_panoptic", save_media=True)
data.export("instances", "coco_instances", save_media=True)
written = json.load(open("panoptic/annotations/panoptic_val.json"))
kinds = {c["name"]: (c["id"], c["isthing"]) for c in written["categories"]}
print("datumaro's panoptic export, (id, isthing):", kinds)
assert kinds == {"cat": (1, 0), "sky": (2, 0)}, "the behaviour has changed"


def area(path):
    """Pixels of the rectangle by COCO's own reading."""
    shapes = [
        a["segmentation"] for a in json.load(open(path))["annotations"] if a["category_id"] == 1
    ]
    return int(coco_mask.decode(coco_mask.merge(coco_mask.frPyObjects(shapes[0], 40, 60))).sum())


first = area("instances/annotations/instances_val.json")
read = supervision.DetectionDataset.from_coco(
    "instances/images/val", "instances/annotations/instances_val.json", force_masks=True
)
for path in list(read.annotations):
    found = read.annotations[path]
    found.data.pop("segmentation", None)  # what was read; left in, it is written as it was
read.as_coco(annotations_path="again.json")
shapes = [a["segmentation"] for a in json.load(open("again.json"))["annotations"]]
second = sorted(
    int(coco_mask.decode(coco_mask.merge(coco_mask.frPyObjects(s, 40, 60))).sum()) for s in shapes
)[0]
print(f"a rectangle of 200 pixels: {first} by datumaro's polygon, {second} after supervision")
assert (first, second) == (171, 171), "the behaviour has changed"
PY
