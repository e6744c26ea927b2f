#!/usr/bin/env bash
# transformers 5.24.0 (torch 2.14.1, torchvision 0.29.1), `post_process_*_segmentation` of the
# Mask2Former and MaskFormer image processors.
#
# Expected: a picture's segments lie where the model saw them, whatever else is in the batch.
# Seen: pictures of unequal size are padded to the largest by the processor, and the masks of picture
# and padding are together resized to the size in `target_sizes`; nothing takes the padding off, and
# there is no argument for it. A square beside a picture twice as wide gets its masks squeezed to the
# left half: flawless masks come back with an IoU of 0.2.
set -euo pipefail
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
python3 -m venv "$work/venv"
"$work/venv/bin/pip" install -q transformers==5.24.0 torch==2.14.1 torchvision==0.29.1
cd "$work"
"$work/venv/bin/python" - <<'PY'
from types import SimpleNamespace

import numpy as np
import torch
from transformers import Mask2FormerImageProcessor, MaskFormerImageProcessor

pictures = [np.zeros((64, width, 3), np.uint8) for width in (64, 128)]
for picture in pictures:
    picture[16:48, 16:48] = 255  # an object of class 0 on a ground of class 1
SIZES = [picture.shape[:2] for picture in pictures]


def object_of(found):
    """Where class 0 is, in any of the three answers."""
    if not isinstance(found, dict):
        return found == 0
    ids = [one["id"] for one in found["segments_info"] if one["label_id"] == 0]
    return torch.isin(found["segmentation"], torch.tensor(ids))


def ious(processor, chosen):
    """IoU of the object in each of these pictures, given as one batch to a flawless model."""
    batch = processor(images=[pictures[n] for n in chosen], return_tensors="pt")
    masks = torch.where(batch["pixel_values"].mean(1, keepdim=True) > 0.5, 10.0, -10.0)
    classes = torch.tensor([[10.0, -10, -10], [-10, 10, -10]]).expand(len(chosen), 2, 3)
    output = SimpleNamespace(
        class_queries_logits=classes, masks_queries_logits=torch.cat([masks, -masks], 1)
    )
    seen = {}
    for kind, more in (("panoptic", {"label_ids_to_fuse": set()}), ("instance", {}), ("semantic", {})):
        after = getattr(processor, f"post_process_{kind}_segmentation")
        answers = after(output, target_sizes=[SIZES[n] for n in chosen], **more)
        seen[kind] = []
        for found, n in zip(answers, chosen):
            truth, mask = torch.from_numpy(pictures[n][..., 0] > 0), object_of(found)
            seen[kind].append(round(float((mask & truth).sum() / (mask | truth).sum()), 2))
    return seen


for kind in (Mask2FormerImageProcessor, MaskFormerImageProcessor):
    processor = kind(do_resize=False)
    alone, together = ious(processor, [0]), ious(processor, [0, 1])
    print(f"{kind.__name__}: IoU of the square picture alone {alone}; beside a wide one {together}")
    assert all(values == [1.0] for values in alone.values()), "the behaviour has changed"
    assert all(values == [0.2, 1.0] for values in together.values()), "the behaviour has changed"
PY
