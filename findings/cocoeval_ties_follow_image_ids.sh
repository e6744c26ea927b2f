#!/usr/bin/env bash
# pycocotools 2.0.11 (numpy 2.4.6), COCOeval.
#
# Expected: AP does not depend on the numbers that the pictures happen to have.
# Seen: detections of equal score are ranked in the order of their pictures' ids. A hit and a false
# alarm, both of score 0.9, give an AP of 1.0 where the hit's picture has the smaller id, and of 0.5
# after the two ids are swapped. Scores that were rounded to two digits have many such ties.
set -euo pipefail
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
python3 -m venv "$work/venv"
"$work/venv/bin/pip" install -q pycocotools==2.0.11 numpy==2.4.6
cd "$work"
"$work/venv/bin/python" - <<'PY'
import contextlib
import io

from pycocotools.coco import COCO
from pycocotools.cocoeval import COCOeval


def average_precision(with_object, without_object):
    """AP of a hit in one picture and a false alarm in another, of equal score."""
    box, far = [10.0, 10.0, 50.0, 50.0], [200.0, 200.0, 50.0, 50.0]
    truth = COCO()
    truth.dataset = {
        "info": {},
        "images": [{"id": i, "width": 300, "height": 300} for i in (with_object, without_object)],
        "categories": [{"id": 1, "name": "cat"}],
        "annotations": [
            {"id": 1, "image_id": with_object, "category_id": 1, "bbox": box, "area": 2500.0,
             "iscrowd": 0}
        ],
    }
    with contextlib.redirect_stdout(io.StringIO()):
        truth.createIndex()
        found = truth.loadRes(
            [
                {"image_id": with_object, "category_id": 1, "bbox": box, "score": 0.9},
                {"image_id": without_object, "category_id": 1, "bbox": far, "score": 0.9},
            ]
        )
        judge = COCOeval(truth, found, "bbox")
        judge.evaluate()
        judge.accumulate()
        judge.summarize()
    return round(float(judge.stats[0]), 6)


first, swapped = average_precision(1, 2), average_precision(2, 1)
print(f"AP: {first} with the hit in picture 1, {swapped} after the ids are swapped")
assert (first, swapped) == (1.0, 0.5), "the behaviour has changed"
PY
