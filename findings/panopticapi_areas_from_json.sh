#!/usr/bin/env bash
# panopticapi (panopticapi-lite 0.2.0, the same code) and hotcoco 1.3.0, `pq_compute` (numpy 1.26.4).
#
# Expected: PQ lies between 0 and 1 and is 1 for a truth scored against itself.
# Seen: the union of a pair is made of the predicted segment's pixels in its PNG, and of the true
# segment's `area` in the JSON. PNGs at half the size beside the JSON as it was, which a resized data
# set easily has, give the truth against itself a PQ of 0; JSON areas of a fifth of the pixels give 5.
# Neither program says a word.
set -euo pipefail
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
python3 -m venv "$work/venv"
"$work/venv/bin/pip" install -q panopticapi-lite==0.2.0 hotcoco==1.3.0 numpy==1.26.4
cd "$work"
"$work/venv/bin/python" - <<'PY'
import contextlib
import copy
import io
import json
from pathlib import Path

import numpy as np
from hotcoco import panoptic as hotcoco
from panopticapi import evaluation as panopticapi
from PIL import Image

ids = np.zeros((40, 60), np.uint8)
ids[5:25, 5:35], ids[30:, :] = 1, 2
whole = {
    "images": [{"id": 1, "file_name": "1.jpg", "height": 40, "width": 60}],
    "annotations": [
        {"image_id": 1, "file_name": "1.png", "segments_info": [
            {"id": i, "category_id": i, "iscrowd": 0, "area": int((ids == i).sum())} for i in (1, 2)
        ]}
    ],
    "categories": [{"id": 1, "name": "cat", "isthing": 1}, {"id": 2, "name": "sky", "isthing": 0}],
}


def scores(pixels, share):
    """PQ of a truth against itself, by both programs; share: of the areas, as the JSON has them."""
    for name in ("truth", "found"):
        Path(name).mkdir(exist_ok=True)
        Image.fromarray(np.dstack([pixels, 0 * pixels, 0 * pixels])).save(f"{name}/1.png")
        told = copy.deepcopy(whole)
        for segment in told["annotations"][0]["segments_info"]:
            segment["area"] = int(segment["area"] * share)
        Path(f"{name}.json").write_text(json.dumps(told))
    found = []
    for tool in (panopticapi, hotcoco):
        with contextlib.redirect_stdout(io.StringIO()):
            found.append(round(float(tool.pq_compute("truth.json", "found.json")["All"]["pq"]), 6))
    return found


plain, halved, fifth = scores(ids, 1), scores(ids[::2, ::2], 1), scores(ids, 0.2)
print(f"PQ of panopticapi and hotcoco: {plain}; PNGs of half the size {halved}; areas / 5 {fifth}")
assert (plain, halved, fifth) == ([1, 1], [0, 0], [5, 5]), "the behaviour has changed"
PY
