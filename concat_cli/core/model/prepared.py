"""A segmentor made ready to predict on a CPU: the same numbers, laid out for its kernels."""

from copy import deepcopy
from typing import Any, cast

import torch
from torch import nn
from torch.nn.utils.fusion import fuse_conv_bn_eval

from concat_cli.core.model.backbone import Backbone
from concat_cli.core.model.segmentor import Segmentor

AGREED = 1e-4  # of the largest feature: what folding may change in fp32; it is about 1e-6


def fold_batch_norms(module: nn.Module) -> None:
    """Batch norms that are registered right behind a convolution become part of it, in place.

    In evaluation mode both are linear. Convolutions of other classes do more than convolve.
    """
    before, conv = "", module
    for name, child in list(module.named_children()):
        folds = type(conv) is nn.Conv2d and isinstance(child, nn.BatchNorm2d)
        if folds and not child.training and conv.out_channels == child.num_features:
            conv, norm = cast("nn.Conv2d", conv), cast("nn.BatchNorm2d", child)
            setattr(module, before, fuse_conv_bn_eval(conv, norm))
            setattr(module, name, nn.Sequential(*child.children()))  # timm's hold an activation
        else:
            fold_batch_norms(child)
        before, conv = name, child


@torch.no_grad()
def _folded(backbone: Backbone) -> nn.Module:
    """The backbone's body without its batch norms; as it is, where it computes in another order
    than its parts are registered in."""
    if not any(isinstance(part, nn.BatchNorm2d) for part in backbone.modules()):
        return backbone.body
    body = deepcopy(backbone.body)
    fold_batch_norms(body)
    size = (1, 3, 64, 64)
    ramp = torch.linspace(-2, 2, 3 * 64 * 64, device=backbone.mean.device).view(size)
    with torch.autocast(ramp.device.type, enabled=False):
        maps = zip(backbone.body(ramp), body(ramp), strict=True)
    same = all(bool((a - b).abs().max() <= AGREED * a.abs().max()) for a, b in maps)
    return body if same else backbone.body


def prepare(model: nn.Module, dtype: torch.dtype | None) -> None:
    """Segmentors in a model, for forwards on a CPU under autocast of `dtype` (None: in fp32).

    In place; they can no longer be trained. Autocast would cast all weights at each forward; and
    for maps in the order (channels, rows, columns) there are no fast convolutions in half
    precision, and slower ones in fp32.
    """
    for segmentor in [part for part in model.modules() if isinstance(part, Segmentor)]:
        backbone = segmentor.backbone
        backbone.body = cast("Any", _folded(backbone))
        for part in (backbone, segmentor.pixel_decoder, segmentor.query_decoder):
            for layer in part.modules():
                if isinstance(layer, (nn.Conv2d, nn.Linear)):
                    layer.to(dtype)
            cast("Any", part).to(memory_format=torch.channels_last)
