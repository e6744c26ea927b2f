"""A small Swin, and timm's of the same shape."""

from __future__ import annotations

from typing import Any

import timm
from torch import nn

from concat_cli.core.model.swin import SwinShape

TOY = SwinShape(24, (2, 2, 1, 2), (2, 2, 4, 4), 4)


def toy_of_timm(**options: Any) -> nn.Module:
    """timm's Swin."""
    return timm.models.swin_transformer.SwinTransformer(
        img_size=128, embed_dim=TOY.width, depths=TOY.depths, num_heads=TOY.heads,
        window_size=TOY.window, num_classes=7, **options,
    )  # fmt: skip
