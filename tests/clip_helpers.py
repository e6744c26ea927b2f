"""A small CLIP with random weights, built through `local-dir:`."""

from __future__ import annotations

import json
from pathlib import Path

from concat_cli.core.clip.encoder import Clip, load_clip
from concat_cli.core.config import ClipConfig

MODEL = {
    "embed_dim": 16,
    "vision_cfg": {"image_size": 32, "layers": 1, "width": 32, "head_width": 16, "patch_size": 8},
    "text_cfg": {"context_length": 24, "vocab_size": 49408, "width": 16, "heads": 2, "layers": 1},
}


def write_model(folder: Path) -> str:
    """Writes the config; returns the model's name for `ClipConfig`."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "open_clip_config.json").write_text(json.dumps({"model_cfg": MODEL}))
    return f"local-dir:{folder}"


def random_clip(folder: Path, image_tower: bool = True) -> Clip:
    """The small model with seeded random weights."""
    cfg = ClipConfig(model=write_model(folder), pretrained="random")
    return load_clip(cfg, image_tower=image_tower)
