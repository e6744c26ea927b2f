#!/usr/bin/env bash
# datumaro 1.13.12, export "yolo_ultralytics" (numpy 2.4.6, opencv-python-headless 4.14.0.94).
#
# Expected: polygons and masks are written as YOLO polygons, which the format has, or the export says
# that they are not.
# Seen: boxes alone are written. A set of polygons and masks comes out with an empty label file for
# every picture, without an error or a warning, and ultralytics takes an empty file for a picture
# without objects: what trains on it learns that nothing is there.
set -euo pipefail
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
python3 -m venv "$work/venv"
"$work/venv/bin/pip" install -q datumaro==1.13.12 numpy==2.4.6 opencv-python-headless==4.14.0.94
cd "$work"
"$work/venv/bin/python" - 2>log <<'PY'
from pathlib import Path

import datumaro
import numpy as np

photo, mask = np.full((40, 60, 3), 80, np.uint8), np.zeros((40, 60), np.uint8)
mask[4:20, 6:24] = 1
drawn = [
    datumaro.Polygon([6, 4, 24, 4, 24, 20, 6, 20], label=0, id=1, group=1),
    datumaro.Mask(mask, label=0, id=2, group=2),
]
items = [
    datumaro.DatasetItem(part, subset=part, media=datumaro.Image.from_numpy(data=photo), annotations=drawn)
    for part in ("train", "val")
]
made = datumaro.Dataset.from_iterable(items, categories=["cat"])
made.export("out", "yolo_ultralytics", save_media=True)
rows = {str(path): path.read_text() for path in sorted(Path("out/labels").rglob("*.txt"))}
print(f"a polygon and a mask in each of 2 pictures are written as {rows}")
assert list(rows.values()) == ["", ""], "the behaviour has changed"
PY
if grep -i -E "polygon|mask|skip" log; then echo "it says so now: the behaviour has changed"; exit 1; fi
echo "and nothing is said of it"
