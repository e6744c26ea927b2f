#!/usr/bin/env bash
# transformers 5.24.0 (torch 2.14.1, torchvision 0.29.1, scipy 1.17.1), OneFormer made with
# `is_training=True`, as its documentation has it for fine-tuning.
#
# Expected: after `eval()` a model gives the same masks for the same picture.
# Seen: it does not. The pixel decoder's dropout is ruled by a copy of `is_training` in each layer,
# not by train() and eval(); the configuration is saved with it, so that fine-tuned weights which are
# loaded again draw at random too. `model.model.is_training = False` changes nothing; loading with
# `is_training=False` does.
set -euo pipefail
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
python3 -m venv "$work/venv"
"$work/venv/bin/pip" install -q transformers==5.24.0 torch==2.14.1 torchvision==0.29.1 scipy==1.17.1
cd "$work"
"$work/venv/bin/python" - <<'PY'
import torch
from transformers import OneFormerConfig, OneFormerForUniversalSegmentation, SwinConfig
from transformers.utils import logging

logging.set_verbosity_error()
logging.disable_progress_bar()
torch.manual_seed(0)
swin = SwinConfig(
    image_size=64, embed_dim=16, depths=[1] * 4, num_heads=[1, 2, 4, 8], window_size=2,
    out_features=["stage1", "stage2", "stage3", "stage4"],
)
config = OneFormerConfig(
    backbone_config=swin, is_training=True, num_queries=20, num_labels=3, conv_dim=64, mask_dim=64,
    hidden_dim=64, encoder_feedforward_dim=64, dim_feedforward=64, encoder_layers=2,
    decoder_layers=2, text_encoder_width=64, text_encoder_num_layers=1, text_encoder_n_ctx=4,
)
OneFormerForUniversalSegmentation(config).save_pretrained("tuned")

inputs = {
    "pixel_values": torch.rand(1, 3, 64, 64),
    "task_inputs": torch.ones(1, 77, dtype=torch.long),
    "text_inputs": torch.ones(1, 16, 77, dtype=torch.long),
}
seen = {}
for how in ("as saved", "model.model.is_training = False", "from_pretrained(is_training=False)"):
    more = {"is_training": False} if "from" in how else {}
    model = OneFormerForUniversalSegmentation.from_pretrained("tuned", **more).eval()
    if how.startswith("model"):
        model.model.is_training = False
    with torch.no_grad():
        first, second = (model(**inputs).masks_queries_logits for _ in range(2))
    seen[how] = float((first - second).abs().max() / first.std())
    print(f"{how}: runs in eval() differ by up to {seen[how]:.2f} standard deviations of the masks")
random, too, same = seen.values()
assert random > 0.1 and too > 0.1 and same == 0, "the behaviour has changed"
PY
