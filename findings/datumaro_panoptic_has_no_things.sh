#!/usr/bin/env bash
# datumaro 1.13.12 (numpy 2.4.6), import and export of "coco_panoptic".
#
# Expected: a data set that is read and written again has the same categories: bottle, 44, a thing,
# and grass, 193, stuff.
# Seen: `isthing` is 0 for both, as what was read is not kept, and the ids are 1 and 2. Scores of
# things and of stuff are then those of other classes, what counts objects sees none, and results
# with COCO's ids no longer fit.
set -euo pipefail
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
python3 -m venv "$work/venv"
"$work/venv/bin/pip" install -q datumaro==1.13.12 numpy==2.4.6
cd "$work"
"$work/venv/bin/python" -W ignore - <<'PY'
import json
from pathlib import Path

import datumaro
import numpy as np
from PIL import Image

Path("in/images/val").mkdir(parents=True)
Path("in/annotations/panoptic_val").mkdir(parents=True)
ids = np.full((32, 48), 5, np.uint8)
ids[4:16, 4:20], ids[4:16, 24:40] = 1, 2
Image.fromarray(np.dstack([ids, 0 * ids, 0 * ids])).save("in/annotations/panoptic_val/a.png")
Image.fromarray(np.full((32, 48, 3), 80, np.uint8)).save("in/images/val/a.jpg")
categories = [
    {"id": 44, "name": "bottle", "supercategory": "kitchen", "isthing": 1},
    {"id": 193, "name": "grass", "supercategory": "plant", "isthing": 0},
]
boxes = {1: (44, [4, 4, 16, 12]), 2: (44, [24, 4, 16, 12]), 5: (193, [0, 0, 48, 32])}
segments = [
    {"id": i, "category_id": c, "iscrowd": 0, "bbox": box, "area": int((ids == i).sum())}
    for i, (c, box) in boxes.items()
]
content = {
    "images": [{"id": 7, "file_name": "a.jpg", "width": 48, "height": 32}],
    "annotations": [{"image_id": 7, "file_name": "a.png", "segments_info": segments}],
    "categories": categories,
}
Path("in/annotations/panoptic_val.json").write_text(json.dumps(content))
datumaro.Dataset.import_from("in", "coco_panoptic").export("out", "coco_panoptic", save_media=True)
written = json.loads(Path("out/annotations/panoptic_val.json").read_text())
assert np.array_equal(np.array(Image.open("out/annotations/panoptic_val/a.png"))[..., 0], ids)
for name, rows in (("read", categories), ("written", written["categories"])):
    print(f"{name}:", [(row["name"], row["id"], row["isthing"]) for row in rows])
found = [(row["id"], row["isthing"]) for row in written["categories"]]
assert found == [(1, 0), (2, 0)], "the behaviour has changed"
PY
