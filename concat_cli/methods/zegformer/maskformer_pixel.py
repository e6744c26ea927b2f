"""MaskFormer's pixel decoder: a feature pyramid that ends in mask features at stride 4."""

from collections.abc import Sequence

import torch.nn.functional as F
from torch import Tensor, nn

from concat_cli.core.model.layers import map_size, resize_padding, zero_padding
from concat_cli.core.model.pixel_decoder import NormedConvolution

GROUPS = 32  # of the group norms [ZegFormer, code]


class MaskFormerPixelDecoder(nn.Module):
    """From the coarsest map down: doubled by its nearest neighbours, a finer map added, smoothed.

    The coarsest map itself has a 3x3 convolution and no lateral one [ZegFormer, code].

    Args:
        channels: of the backbone's maps at strides 4, 8, 16, 32.
        width: D, channels of the pyramid, a multiple of 32. mask_width: Dm.
    """

    def __init__(self, channels: Sequence[int], width: int = 256, mask_width: int = 256) -> None:
        super().__init__()
        *finer, coarsest = channels
        self.coarsest = NormedConvolution(coarsest, width, 3, False, GROUPS)
        self.laterals = nn.ModuleList(
            NormedConvolution(c, width, 1, False, GROUPS) for c in reversed(finer)
        )
        self.smooth = nn.ModuleList(
            NormedConvolution(width, width, 3, False, GROUPS) for _ in finer
        )
        self.mask_out = nn.Conv2d(width, mask_width, 3, padding=1)
        for module in self.modules():
            if isinstance(module, nn.Conv2d):
                nn.init.kaiming_uniform_(module.weight, a=1)  # as detectron2 fills them
        assert self.mask_out.bias is not None
        nn.init.zeros_(self.mask_out.bias)

    def forward(self, features: list[Tensor], padding: Tensor | None = None) -> Tensor:
        """Four backbone maps, fine to coarse, padding (B, H, W) -> (B, Dm, H/4, W/4)."""
        paddings = [resize_padding(padding, map_size(x)) for x in features]
        merged = F.relu(self.coarsest(features[-1], paddings[-1]))
        finer = zip(features[-2::-1], paddings[-2::-1], strict=True)
        for lateral, smooth, (fine, pad) in zip(self.laterals, self.smooth, finer, strict=True):
            added = lateral(fine, pad)
            added = added + F.interpolate(merged, size=map_size(added), mode="nearest")
            merged = F.relu(smooth(added, pad))
        return self.mask_out(zero_padding(merged, paddings[0]))
