#!/usr/bin/env bash
# cityscapesScripts 2.3.0, `createPanopticImgs.convert2panoptic`.
#
# Expected: the JSON's `images` name the pictures of the data set.
# Seen: `ulm_000000_000019_gtFine_instanceIds.png` becomes the picture
# `ulm_000000_000019_gtFine_leftImg8bit.png`; the data set's is `ulm_000000_000019_leftImg8bit.png`.
# Whoever looks a picture up by its name finds none.
set -euo pipefail
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
python3 -m venv "$work/venv"
"$work/venv/bin/pip" install -q cityscapesscripts==2.3.0
mkdir -p "$work/gtFine/val/ulm" && cd "$work"
"$work/venv/bin/python" - <<'PY'
import json

import numpy as np
from cityscapesscripts.preparation.createPanopticImgs import convert2panoptic
from PIL import Image

ids = np.full((32, 48), 7, np.uint16)  # road
ids[4:20, 4:20] = 26001  # a car
Image.fromarray(ids).save("gtFine/val/ulm/ulm_000000_000019_gtFine_instanceIds.png")
convert2panoptic("gtFine", "gtFine", setNames=["val"])
(image,) = json.load(open("gtFine/cityscapes_panoptic_val.json"))["images"]
print("\nthe picture is called", image["file_name"])
assert image["file_name"] == "ulm_000000_000019_gtFine_leftImg8bit.png", "the behaviour has changed"
PY
