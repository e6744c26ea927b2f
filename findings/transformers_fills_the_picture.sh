#!/usr/bin/env bash
# transformers 5.24.0 (torch 2.14.1, torchvision 0.29.1), Mask2Former and MaskFormer image processors,
# `post_process_panoptic_segmentation`.
#
# Expected, as Mask2Former's own code has it: a pixel belongs to a segment only where the segment's
# mask has a probability of at least 0.5 there.
# Seen: each pixel goes to the query of highest score times probability, and that is all. A picture
# in which one query is kept, with a mask on a quarter of it, comes back as one segment of every
# pixel. With a second query elsewhere the two share the picture, and nothing is void.
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

CLASSES, SIDE = 3, 8
for processor in (Mask2FormerImageProcessor(), MaskFormerImageProcessor()):
    name = type(processor).__name__
    for kept in (1, 2):
        classes = torch.full((1, 2, CLASSES + 1), -10.0)
        masks = torch.full((1, 2, SIDE, SIDE), -10.0)
        classes[0, :, CLASSES] = 10.0  # no object ...
        for query in range(kept):  # ... but for these, each sure of a quarter of the picture
            classes[0, query] = torch.tensor([10.0, -10.0, -10.0, -10.0])
            corner = slice(4 * query, 4 * query + 4)
            masks[0, query, corner, corner] = 10.0
        output = SimpleNamespace(class_queries_logits=classes, masks_queries_logits=masks)
        (found,) = processor.post_process_panoptic_segmentation(
            output, target_sizes=[(SIDE, SIDE)], label_ids_to_fuse=set()
        )
        inside = int((masks[0].sigmoid() >= 0.5).any(0).sum())
        painted = int((found["segmentation"] > 0).sum())
        print(f"{name}: {kept} kept; masks cover {inside} pixels, segments {painted} of {SIDE * SIDE}")
        assert (inside, painted) == (16 * kept, SIDE * SIDE), "the behaviour has changed"
PY
