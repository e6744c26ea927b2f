#!/usr/bin/env bash
# transformers 5.24.0 (torch 2.14.1, torchvision 0.29.1, scipy 1.17.1), Mask2Former, MaskFormer and
# OneFormer, each with a Swin backbone.
#
# Expected: `pixel_mask`, "mask to avoid performing attention on padding pixel values", which the
# processors return and the models take, keeps a padded picture's outputs near those it gives alone.
# Seen: it is accepted and read by nothing. Outputs with and without it are equal to the last bit,
# and those of a padded picture are other than alone, as all three attend to the padding.
set -euo pipefail
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
python3 -m venv "$work/venv"
"$work/venv/bin/pip" install -q transformers==5.24.0 torch==2.14.1 torchvision==0.29.1 scipy==1.17.1
cd "$work"
"$work/venv/bin/python" - <<'PY'
import torch
from transformers import (
    DetrConfig,
    Mask2FormerConfig,
    Mask2FormerForUniversalSegmentation,
    MaskFormerConfig,
    MaskFormerForInstanceSegmentation,
    OneFormerConfig,
    OneFormerForUniversalSegmentation,
    SwinConfig,
)
from transformers.utils import logging

logging.set_verbosity_error()
torch.manual_seed(0)
swin = dict(
    image_size=64, embed_dim=16, depths=[1] * 4, num_heads=[1, 2, 4, 8], window_size=2,
    out_features=["stage1", "stage2", "stage3", "stage4"],
)
wide = dict(num_queries=10, num_labels=3, hidden_dim=64, encoder_feedforward_dim=64,
            dim_feedforward=64, encoder_layers=2, decoder_layers=3)
detr = DetrConfig(d_model=64, encoder_layers=1, decoder_layers=2, encoder_ffn_dim=64,
                  decoder_ffn_dim=64, num_queries=10)
models = [
    Mask2FormerForUniversalSegmentation(Mask2FormerConfig(
        backbone_config=SwinConfig(**swin), feature_size=64, mask_feature_size=64, **wide)),
    MaskFormerForInstanceSegmentation(MaskFormerConfig(
        backbone_config=SwinConfig(**swin), fpn_feature_size=64, mask_feature_size=64,
        decoder_config=detr, num_labels=3)),
    OneFormerForUniversalSegmentation(OneFormerConfig(
        backbone_config=SwinConfig(**swin), conv_dim=64, mask_dim=64, **wide)),
]
picture = torch.rand(1, 3, 64, 64)
padded = torch.zeros(1, 3, 64, 128)
padded[..., :64] = picture
real = torch.zeros(1, 64, 128, dtype=torch.long)
real[..., :64] = 1

for model in models:
    model.eval()
    name = type(model).__name__
    more = {"task_inputs": torch.ones(1, 77, dtype=torch.long)} if "OneFormer" in name else {}
    with torch.no_grad():
        alone = model(pixel_values=picture, **more)
        without = model(pixel_values=padded, **more)
        told = model(pixel_values=padded, pixel_mask=real, **more)
    equal = all(
        torch.equal(getattr(told, kind), getattr(without, kind))
        for kind in ("masks_queries_logits", "class_queries_logits")
    )
    first = alone.masks_queries_logits > 0
    other = float((told.masks_queries_logits[..., : first.shape[-1]] > 0).ne(first).float().mean())
    print(f"{name}: with and without pixel_mask equal: {equal}; mask pixels other than alone {other:.1%}")
    assert equal and other > 0.01, "the behaviour has changed"
PY
