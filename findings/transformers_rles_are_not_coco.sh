#!/usr/bin/env bash
# transformers 5.24.0 (torch 2.14.1, torchvision 0.29.1), `post_process_instance_segmentation` of the
# Mask2Former and MaskFormer image processors with `return_coco_annotation=True`.
#
# Expected: of each segment a mask in COCO's run lengths, in the order of `segments_info`.
# Seen: the numbers are pairs of a start, counted from 1 along the rows, and a length, where COCO's
# are lengths alone, down the columns. The list begins with a mask of the background, which
# `segments_info` lacks, so that zip() gives each segment its neighbour's mask. Masks are made from
# the flat map, though the documentation advises this where instances overlap: one that is covered
# has none, and the two lists may then be of one length by chance.
set -euo pipefail
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
python3 -m venv "$work/venv"
"$work/venv/bin/pip" install -q transformers==5.24.0 torch==2.14.1 torchvision==0.29.1
cd "$work"
"$work/venv/bin/python" - <<'PY'
from itertools import groupby
from types import SimpleNamespace

import torch
from transformers import Mask2FormerImageProcessor, MaskFormerImageProcessor

SIDE, CLASSES, QUERIES = 8, 80, 100
SMALL, LARGE = (slice(2, 4), slice(4, 6)), (slice(2, 4), slice(4, 8))


def found(processor, boxes):
    """Segments and their masks, of sure queries with these masks, the first the surest."""
    scores = torch.full((1, QUERIES, CLASSES + 1), -9.0)
    scores[..., CLASSES] = 9.0  # no object
    masks = torch.full((1, QUERIES, SIDE, SIDE), -9.0)
    for query, box in enumerate(boxes):
        scores[0, query, query], masks[(0, query, *box)] = 18.0 - 4 * query, 9.0
    masks = masks.repeat_interleave(48, 2).repeat_interleave(48, 3)  # as large as both resize them to
    output = SimpleNamespace(class_queries_logits=scores, masks_queries_logits=masks)
    (answer,) = processor.post_process_instance_segmentation(
        output, target_sizes=[(SIDE, SIDE)], return_coco_annotation=True
    )
    return answer["segments_info"], answer["segmentation"]


def filled(runs):
    """The pixels that pairs of start and length name, along the rows."""
    flat = torch.zeros(SIDE * SIDE, dtype=torch.bool)
    for start, length in zip(runs[::2], runs[1::2]):
        flat[start - 1 : start - 1 + length] = True
    return flat.view(SIDE, SIDE)


mask = torch.zeros(SIDE, SIDE, dtype=torch.bool)
mask[SMALL] = True
coco = [len(list(run)) for _, run in groupby(mask.T.flatten().tolist())]
for processor in (Mask2FormerImageProcessor(), MaskFormerImageProcessor()):
    name = type(processor).__name__
    segments, runs = found(processor, [SMALL])
    print(f"{name}: {len(segments)} segment, {len(runs)} masks; the segment's is {runs[-1]}, in COCO's "
          f"form {coco}")
    assert (len(segments), len(runs)) == (1, 2), "the behaviour has changed"
    assert torch.equal(filled(runs[0]), ~mask), "the behaviour has changed"
    assert torch.equal(filled(runs[1]), mask) and runs[1] != coco, "the behaviour has changed"
    segments, runs = found(processor, [SMALL, LARGE])
    areas = [int(filled(one).sum()) for one in runs]
    print(f"{name}: {len(segments)} segments, the first within the second: masks of {areas} pixels")
    assert (len(segments), areas) == (2, [SIDE * SIDE - 8, 8]), "the behaviour has changed"
PY
