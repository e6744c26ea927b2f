"""Small CLIPs with random weights, one of each kind of image tower, through `local-dir:`."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from timm.models import register_model
from timm.models.vision_transformer import VisionTransformer

from concat_cli.core.clip.encoder import Clip, load_clip
from concat_cli.core.config import ClipConfig

TEXT = {"context_length": 24, "vocab_size": 49408, "width": 16, "heads": 2, "layers": 1}


@register_model
def toy_siglip(pretrained: bool = False, **keys: Any) -> VisionTransformer:
    """timm's ViT as SigLIP has it, but small."""
    keys = {k: v for k, v in keys.items() if not k.startswith(("pretrained", "cache_dir"))}
    shape = {"img_size": 32, "patch_size": 8, "embed_dim": 32, "depth": 2, "num_heads": 4}
    return VisionTransformer(**shape, class_token=False, **keys)


def timm_tower(name: str, size: int, pool: str, proj: str) -> dict[str, Any]:
    """The configuration of a tower of timm."""
    return {
        "timm_model_name": name, "timm_model_pretrained": False, "timm_pool": pool,
        "timm_proj": proj, "image_size": size,
    }  # fmt: skip


VIT = {"image_size": 32, "layers": 3, "width": 32, "head_width": 8, "patch_size": 8}
TOWERS: dict[str, dict[str, Any]] = {
    "vit": VIT,
    "vit with scales": VIT | {"ls_init_value": 0.3},
    "siglip": timm_tower("toy_siglip", 32, "map", "none"),
    "convnext": timm_tower("test_convnext", 96, "", "linear"),
    "convnext with mlp": timm_tower("test_convnext2", 96, "", "mlp"),
    "resnet": {"image_size": 96, "layers": [1, 1, 1, 1], "width": 8, "patch_size": None},
}
STRIDES = {name: 8 if "vit" in name or name == "siglip" else 32 for name in TOWERS}
OTHERS: dict[str, dict[str, Any]] = {  # that cannot be pooled under masks
    "average of patches": VIT | {"pool_type": "avg"},
    "CoCa": VIT | {"attentional_pool": True},
    "other blocks": VIT | {"qk_norm": True},
    "rotary pool": timm_tower("test_convnext", 96, "rot_attn", ""),
    "ResNet of timm": timm_tower("test_resnet", 96, "", "linear"),
    "CLS token of timm": timm_tower("test_vit", 160, "", "linear"),
}


def tower_clip(folder: Path, name: str) -> Clip:
    """The CLIP of a tower; no weight is at a special value."""
    tower = (TOWERS | OTHERS)[name]
    width = 32 if name == "siglip" else 16
    model = {"embed_dim": width, "vision_cfg": tower, "text_cfg": TEXT, "custom_text": True}
    folder = folder / name.replace(" ", "_")
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "open_clip_config.json").write_text(json.dumps({"model_cfg": model}))
    clip = load_clip(ClipConfig(f"local-dir:{folder}", "random"))
    generator = torch.Generator().manual_seed(1)
    for name, tensor in clip.model.visual.state_dict().items():
        if name.endswith("running_var"):
            tensor.uniform_(0.5, 1.5, generator=generator)
        elif tensor.is_floating_point():
            tensor.add_(0.05 * torch.randn(tensor.shape, generator=generator))
    return clip
