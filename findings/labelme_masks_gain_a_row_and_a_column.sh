#!/usr/bin/env bash
# labelme 6.3.1, `labelme.utils.shape_to_mask` and `shapes_to_label` (numpy 2.4.6, Pillow 13.0.0).
#
# Expected: a rectangle from (4, 4) to (20, 16) covers the 16 x 12 pixels inside of it, and of two
# rectangles that share a side no pixel belongs to both.
# Seen: it covers 17 x 13 pixels, as corners are taken for pixels: those below and right of the shape
# are inside, and both rectangles have the column that their side lies in; in the label map it goes to
# the later shape. A circle of radius 6 has 129 pixels, not 113. An IoU of 0.87 with the 16 x 12 pixels
# is what labelme's own masks reach.
set -euo pipefail
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
python3 -m venv "$work/venv"
"$work/venv/bin/pip" install -q labelme==6.3.1 numpy==2.4.6 pillow==13.0.0
cd "$work"
"$work/venv/bin/python" - <<'PY'
from labelme.utils import shape_to_mask, shapes_to_label

size, left, right = (32, 48), [[4, 4], [20, 16]], [[20, 4], [36, 16]]
masks = [shape_to_mask(size, points, "rectangle") for points in (left, right)]
circle = shape_to_mask(size, [[24, 16], [30, 16]], "circle")
shared = int((masks[0] & masks[1]).sum())
shapes = [{"label": "a", "points": p, "shape_type": "rectangle"} for p in (left, right)]
_, instances = shapes_to_label(size, shapes, {"a": 1})
areas = [int((instances == number).sum()) for number in (1, 2)]
print(f"a rectangle of 16 x 12 covers {masks[0].sum()} pixels; two that share a side share {shared}")
print(f"in the label map these two have {areas} pixels; a circle of radius 6 has {circle.sum()}")
assert (int(masks[0].sum()), shared, int(circle.sum())) == (221, 13, 129), "the behaviour has changed"
assert areas == [208, 221], "the behaviour has changed"
PY
