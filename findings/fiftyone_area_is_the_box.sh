#!/usr/bin/env bash
# FiftyOne 1.22.1, `COCODetectionDatasetExporter` with masks.
#
# Expected: `area` is that of the mask, as in COCO, where it decides on small, medium and large.
# Seen: it is the area of the box, whatever the mask covers: 400 here for a mask of 39 pixels. AP by
# size, scored against the export, counts thin objects among larger ones.
set -euo pipefail
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
python3 -m venv "$work/venv"
"$work/venv/bin/pip" install -q fiftyone==1.22.1
cd "$work"
FIFTYONE_DO_NOT_TRACK=true HOME="$work" "$work/venv/bin/python" - <<'PY'
import json

import fiftyone.core.labels as labels
import fiftyone.core.metadata as metadata
import fiftyone.utils.coco as coco
import numpy as np
from PIL import Image

Image.new("RGB", (100, 100)).save("picture.png")
mask = np.zeros((20, 20), bool)
mask[10], mask[:, 10] = True, True  # a thin cross
cross = labels.Detection(label="cross", bounding_box=[0.1, 0.1, 0.2, 0.2], mask=mask)
exporter = coco.COCODetectionDatasetExporter(export_dir="out", classes=["cross"])
with exporter:
    exporter.export_sample(
        "picture.png",
        labels.Detections(detections=[cross]),
        metadata=metadata.ImageMetadata(width=100, height=100),
    )
(one,) = json.load(open("out/labels.json"))["annotations"]
print(f"a mask of {mask.sum()} pixels in a box of 20 x 20 has the area {one['area']:g}")
assert (int(mask.sum()), round(one["area"])) == (39, 400), "the behaviour has changed"
PY
