#!/usr/bin/env bash
# transformers 5.24.0 (torch 2.14.1, torchvision 0.29.1), `post_process_panoptic_segmentation` of the
# Mask2Former and MaskFormer image processors.
#
# Expected: pixels without a segment have one value in all pictures, 0 here, as ids begin with 1.
# Seen: a picture in which something was found uses ids from 1 on in a map of int32 and 0 for the
# rest; one in which nothing was found is -1 throughout, in a map of float32. Written as COCO's
# R + 256 G + 65536 B, -1 becomes an id of 16777215 that no segment has.
set -euo pipefail
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
python3 -m venv "$work/venv"
"$work/venv/bin/pip" install -q transformers==5.24.0 torch==2.14.1 torchvision==0.29.1
cd "$work"
"$work/venv/bin/python" - <<'PY'
from types import SimpleNamespace

import torch
from transformers import Mask2FormerImageProcessor, MaskFormerImageProcessor

for processor in (Mask2FormerImageProcessor(), MaskFormerImageProcessor()):
    classes = torch.full((2, 2, 4), -10.0)
    masks = torch.full((2, 2, 8, 8), -10.0)
    classes[:, :, 3] = 10.0  # no object ...
    # ... but in the first picture: a clear segment above, and below one that mostly hides behind it
    classes[0] = torch.tensor([[10.0, -10, -10, -10], [-10, 2.5, -10, -10]])
    masks[0, 0, :4] = 10.0
    masks[0, 1] = 2.0
    output = SimpleNamespace(class_queries_logits=classes, masks_queries_logits=masks)
    found = processor.post_process_panoptic_segmentation(
        output, target_sizes=[(8, 8)] * 2, label_ids_to_fuse=set()
    )
    maps = [one["segmentation"] for one in found]
    values = [sorted(set(m.flatten().tolist())) for m in maps]
    print(type(processor).__name__, values, [str(m.dtype) for m in maps])
    assert values == [[0, 1], [-1]], "the behaviour has changed"
    assert [m.dtype for m in maps] == [torch.int32, torch.float32], "the behaviour has changed"
PY
