#!/usr/bin/env bash
# torchmetrics 1.9.0 (torch 2.14.1), torchmetrics.segmentation.GeneralizedDiceScore.
#
# Expected: the score of a set of pictures does not depend on how they are split into batches.
# Seen: it does. A class that a picture lacks has an infinite weight, which is replaced by the
# largest finite weight of that class in the batch, so that a picture's score hangs on its
# neighbours. MeanIoU of the same module gives one figure for every split.
set -euo pipefail
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
python3 -m venv "$work/venv"
"$work/venv/bin/pip" install -q torchmetrics==1.9.0 torch==2.14.1
cd "$work"
"$work/venv/bin/python" - <<'PY'
import torch
from torchmetrics.segmentation import GeneralizedDiceScore, MeanIoU

generator = torch.Generator().manual_seed(0)
found = torch.randint(0, 4, (4, 32, 32), generator=generator)
truth = torch.randint(0, 4, (4, 32, 32), generator=generator)
truth[0], truth[1], truth[2] = 3, found[1], truth[2].clamp(max=1)


def scores(metric, sizes):
    """The figure after pictures were given in batches of these sizes."""
    metric, start = metric(num_classes=4, input_format="index"), 0
    for size in sizes:
        metric.update(found[start : start + size], truth[start : start + size])
        start += size
    return round(float(metric.compute()), 4)


for metric in (GeneralizedDiceScore, MeanIoU):
    seen = {sizes: scores(metric, sizes) for sizes in ((4,), (1, 3), (3, 1), (1, 1, 1, 1))}
    print(metric.__name__, seen)
    spread = max(seen.values()) - min(seen.values())
    differs = metric is GeneralizedDiceScore
    assert (spread > 0.05) == differs, "the behaviour has changed"
PY
