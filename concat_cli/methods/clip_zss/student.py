"""The student of CLIP-ZSS: a dense encoder whose every position lies in CLIP's space."""

from collections.abc import Sequence

import torch.nn.functional as F
from torch import Tensor, nn

from concat_cli.core.model.backbone import Backbone
from concat_cli.core.model.layers import map_size, resize_features, resize_padding
from concat_cli.core.model.segmentor import Scaled


class AllMlpHead(nn.Module):
    """SegFormer's all-MLP head (NeurIPS 2021, sec. 3.2), from the maps of four strides to one.

    A linear layer for each map, bilinear resizing to the first one's size, a linear layer over all
    of them, norm, ReLU. Resizing and the second layer commute, so each map meets its columns of
    that layer before it grows: the same result for a quarter of the multiplications.

    Args:
        channels: of the maps, finest first. width: of the result.
    """

    def __init__(self, channels: Sequence[int], width: int, dropout: float = 0.1) -> None:
        super().__init__()
        self.linears = nn.ModuleList(nn.Conv2d(c, width, 1) for c in channels)
        self.fuse = nn.Conv2d(len(channels) * width, width, 1, bias=False)
        self.norm = nn.BatchNorm2d(width)
        self.dropout = nn.Dropout2d(dropout)

    def forward(self, maps: Sequence[Tensor], padding: Tensor | None = None) -> Tensor:
        """Maps (B, C, h, w), padding (B, H, W) of the images -> (B, width, H/4, W/4)."""
        size = map_size(maps[0])
        columns = self.fuse.weight.chunk(len(maps), dim=1)
        total: Tensor | None = None
        for features, linear, weight in zip(maps, self.linears, columns, strict=True):
            part = F.conv2d(linear(features), weight)
            if map_size(part) != size:
                part = resize_features(part, size, resize_padding(padding, map_size(part)))
            total = part if total is None else total + part
        assert total is not None, "no maps"
        return self.dropout(F.relu(self.norm(total)))


class Student(Scaled):
    """Encoder -> all-MLP head -> CLIP's space; text embeddings classify each position.

    The paper's students (SegFormer, SegNeXt, Swin) are any encoder with maps at strides 4 to 32.
    timm has no MiT and no MSCAN; `pvt_v2_b0` to `pvt_v2_b2` are the nearest to MiT-B0 to B2.

    Args:
        clip_width: E. head_width: of the head. scale: first factor on the cosines, at most 100.
        learn_scale: learn it, as exp(log_scale).
    """

    def __init__(
        self,
        encoder: Backbone,
        clip_width: int,
        head_width: int = 256,
        dropout: float = 0.1,
        scale: float = 1 / 0.07,
        learn_scale: bool = True,
    ) -> None:
        super().__init__()
        self.encoder = encoder
        self.head = AllMlpHead(encoder.channels, head_width, dropout)
        self.projection = nn.Conv2d(head_width, clip_width, 1)
        self.set_scale(scale, learn_scale)

    def forward(self, images: Tensor, padding: Tensor | None = None) -> Tensor:
        """Images (B, 3, H, W) uint8 or float in 0-1, padding (B, H, W) bool -> (B, E, H/4, W/4).

        Sides are multiples of 32. Not normalised; what lies at the padding means nothing.
        """
        images = self.encoder.normalised(images, padding)
        return self.projection(self.head(self.encoder(images, padding), padding))
