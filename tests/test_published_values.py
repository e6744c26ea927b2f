"""The configurations of the other methods' benchmarks hold what their authors published."""

from __future__ import annotations

from operator import attrgetter
from types import SimpleNamespace
from typing import Any

import pytest

from concat_cli.core.config_file import load_config

ZEGFORMER: dict[str, Any] = {  # CVPR 2022 and its code
    "zegformer.segmentor": "maskformer", "zegformer.targets": "category",
    "zegformer.raw_no_object": True, "zegformer.exponent": 2 / 3, "zegformer.crop": "cropmask",
    "zegformer.image_prompts": "masked", "zegformer.branch": "fusion",
    "model.queries": 100, "model.width": 256, "model.mask_width": 256, "model.heads": 8,
    "model.decoder_layers": 6, "model.decoder_ffn": 2048, "model.frozen_bn": True,
    "model.projector_layers": 1, "model.logit_scale": 100, "model.learn_scale": False,
    "loss.classes": 1, "loss.mask": 20, "loss.dice": 1, "loss.no_object": 0.1,
    "optim.batch_size": 32, "optim.lr": 1e-4, "optim.weight_decay": 1e-4, "optim.warmup": 0,
    "optim.backbone_factor": 0.1, "optim.clip_norm": 0.01, "optim.schedule": "poly",
    "data.scale_side": "short", "infer.seen_offset": 0.1, "clip.model": "ViT-B-16-quickgelu",
}  # fmt: skip
ZEGCLIP: dict[str, Any] = {  # the schedule that CLIP-ZSS's own is not known to differ from
    "data.crop": 512, "data.scale_min": 0.5, "data.scale_max": 2.0, "data.scale_side": "short",
    "optim.batch_size": 16, "optim.warmup": 1500, "optim.weight_decay": 0.01,
    "optim.schedule": "poly", "optim.backbone_factor": 0.1, "infer.size": 512,
    "clip_zss.glm": 1.0, "clip_zss.classes": 1.0, "clip_zss.prototypes": 1.0,
    "clip_zss.pseudo": True, "clip_zss.synthesizer": 1, "clip_zss.full_size": True,
}  # fmt: skip
PUBLISHED: dict[str, dict[str, Any]] = {
    "zegformer_coco_stuff_156_15": ZEGFORMER | {
        "data.crop": 640, "data.scale_min": 0.5, "data.scale_max": 1.5, "infer.size": 640,
        "infer.max_size": 2560, "optim.steps": 60_000, "clip.templates": "imagenet_select",
    },
    "zegformer_voc_15_5": ZEGFORMER | {
        "data.crop": 512, "data.scale_min": 0.5, "data.scale_max": 2.0, "infer.size": 512,
        "infer.max_size": 2048, "optim.steps": 30_000, "clip.templates": "scene",
    },
    "clip_zss_coco_stuff_156_15": ZEGCLIP | {"optim.steps": 80_000},
    "clip_zss_voc_15_5": ZEGCLIP | {"optim.steps": 20_000},
}  # fmt: skip


@pytest.mark.parametrize("name", PUBLISHED)
def test_values_are_the_published_ones(name: str) -> None:
    cfg = load_config(name)
    sections = SimpleNamespace(**cfg.sections())
    held = {key: attrgetter(key)(sections) for key in PUBLISHED[name]}
    assert held == PUBLISHED[name]
