"""Random weights of a segmentor that another program has a place for."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

from concat_cli.core.build import build_segmentor
from concat_cli.core.checkpoint import save_weights
from concat_cli.core.config import Config, InferConfig, ModelConfig
from concat_cli.core.config_file import to_dict
from concat_cli.core.metadata import FORMAT
from concat_cli.core.vocabulary import ClassEntry, Vocabulary

CLASSES = Vocabulary(
    (
        ClassEntry("red circle", 1, ("red ring",)),
        ClassEntry("green water", 2, kind="stuff"),
        ClassEntry("blue square", 3, seen=False),
        ClassEntry("yellow star", 4),
    )
)
FITTING: dict[str, Any] = {
    "backbone": "resnet18", "pixel_decoder": "deformable", "width": 64, "mask_width": 32,
    "heads": 4, "encoder_layers": 1, "encoder_ffn": 48, "decoder_layers": 3, "decoder_ffn": 40,
    "queries": 20, "token_queries": False, "mask_pooling": False,
}  # fmt: skip


def written(path: Path, **keys: Any) -> Path:
    """Weights of stage con with the tiny CLIP, no tensor at a special value."""
    cfg = Config(model=ModelConfig(**(FITTING | keys)), infer=InferConfig(size=64, max_size=96))
    torch.manual_seed(0)
    segmentor = build_segmentor(cfg.model, 128)
    for name, tensor in segmentor.state_dict().items():
        if name.endswith("running_var"):
            tensor.uniform_(0.5, 1.5)
        elif tensor.is_floating_point() and "log_scale" not in name:
            tensor.add_(torch.randn_like(tensor) * 0.05)
    meta = {
        "format": FORMAT, "stage": "con", "config": to_dict(cfg), "vocabulary": CLASSES.to_json(),
        "trained": ["red circle", "green water", "yellow star"],
        "clip": {"model": "tiny", "pretrained": "", "sha256": ""},
    }  # fmt: skip
    save_weights(path, {f"segmentor.{n}": t for n, t in segmentor.state_dict().items()}, meta)
    return path
