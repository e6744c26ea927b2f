#!/usr/bin/env bash
# transformers 5.24.0 (torch 2.14.1, torchvision 0.29.1), `post_process_instance_segmentation` of the
# Mask2Former, MaskFormer and EoMT image processors, on the CPU.
#
# Expected: where two instances overlap, the one of higher score is seen in the map.
# Seen: the one that is written last. Mask2Former and MaskFormer write in the order of
# topk(sorted=False), which hangs on the number of classes: with 100 queries and 80 or 133 classes the
# weakest is always on top, with 20 now one, now the other. EoMT writes by the number of the query. An
# instance of score 0.99 has no pixel left below one of 0.95, and is listed with its score all the
# same. `return_binary_maps=True`, which EoMT lacks, keeps both.
set -euo pipefail
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
python3 -m venv "$work/venv"
"$work/venv/bin/pip" install -q transformers==5.24.0 torch==2.14.1 torchvision==0.29.1
cd "$work"
"$work/venv/bin/python" - <<'PY'
from types import SimpleNamespace

import torch
from transformers import EomtImageProcessor, Mask2FormerImageProcessor, MaskFormerImageProcessor

QUERIES, SIDE = 100, 64


def strong_pixels(processor, classes, strong, weak):
    """How many pixels the stronger of two instances gets; its mask lies within the other's."""
    scores = torch.full((1, QUERIES, classes + 1), -9.0)
    scores[..., classes] = 9.0  # no object
    scores[0, strong, 0], scores[0, weak, 0] = 18.0, 12.0
    masks = torch.full((1, QUERIES, SIDE, SIDE), -9.0)
    masks[0, strong, 16:48, 16:48] = 9.0
    masks[0, weak, 16:48, 16:64] = 9.0
    output = SimpleNamespace(class_queries_logits=scores, masks_queries_logits=masks)
    (found,) = processor.post_process_instance_segmentation(output, target_sizes=[(SIDE, SIDE)])
    best = max(found["segments_info"], key=lambda one: one["score"])
    assert len(found["segments_info"]) == 2 and best["score"] > 0.99
    return int((found["segmentation"] == best["id"]).sum())


eomt = EomtImageProcessor(
    size={"shortest_edge": SIDE, "longest_edge": SIDE}, do_pad=True, do_split_image=False
)
for processor in (Mask2FormerImageProcessor(), MaskFormerImageProcessor(), eomt):
    for classes in (20, 80, 133):
        seen = [strong_pixels(processor, classes, *pair) for pair in ((9, 40), (40, 9))]
        print(f"{type(processor).__name__}, {classes} classes: pixels of the stronger instance, as "
              f"query 9 and as query 40: {seen} of 1024")
        if processor is eomt:
            assert seen == [0, 1024], "the behaviour has changed"
        elif classes > 20:
            assert seen == [0, 0], "the behaviour has changed"
        else:
            assert seen != [0, 0], "the behaviour has changed"
PY
