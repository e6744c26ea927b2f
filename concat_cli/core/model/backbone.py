"""Backbones: a small CNN for the built-in world, Swins, and any timm model with features."""

from collections.abc import Sequence
from pickle import UnpicklingError
from typing import Any, cast

import torch
import torch.nn.functional as F
from safetensors import SafetensorError
from torch import Tensor, nn

from concat_cli.core.errors import UserError
from concat_cli.core.model.layers import map_size, resize_padding, zero_padding
from concat_cli.core.model.swin import SWINS, SwinBackbone
from concat_cli.core.weights_from.hub import short, size_of, without_waiting

STRIDES = (4, 8, 16, 32)
IMAGENET_MEAN = (0.485, 0.456, 0.406)
IMAGENET_STD = (0.229, 0.224, 0.225)


def _conv_norm(inputs: int, outputs: int, stride: int = 1) -> nn.Sequential:
    conv = nn.Conv2d(inputs, outputs, 3, stride, 1, bias=False)
    return nn.Sequential(conv, nn.BatchNorm2d(outputs))


class ResidualBlock(nn.Module):
    """Two 3x3 convolutions around a shortcut; the first may halve the resolution."""

    def __init__(self, inputs: int, outputs: int, stride: int) -> None:
        super().__init__()
        self.first = _conv_norm(inputs, outputs, stride)
        self.second = _conv_norm(outputs, outputs)
        self.shortcut = nn.Identity()
        if stride != 1 or inputs != outputs:
            self.shortcut = nn.Sequential(
                nn.AvgPool2d(stride) if stride > 1 else nn.Identity(),
                nn.Conv2d(inputs, outputs, 1, bias=False),
                nn.BatchNorm2d(outputs),
            )

    def forward(self, features: Tensor, padding: Tensor | None) -> Tensor:
        """(B, C, h, w) -> (B, C', h', w'); padding is at the output's resolution."""
        hidden = zero_padding(F.relu(self.first(features)), padding)
        return zero_padding(F.relu(self.second(hidden) + self.shortcut(features)), padding)


class SmallBackbone(nn.Module):
    """A residual CNN of about 2 million parameters, built for 128x128 on a CPU [ours]."""

    def __init__(
        self,
        channels: Sequence[int] = (48, 96, 192, 192),
        blocks: Sequence[int] = (1, 2, 2, 1),
        stem: int = 32,
    ) -> None:
        super().__init__()
        self.channels = tuple(channels)
        self.stem = nn.ModuleList((_conv_norm(3, stem, 2), _conv_norm(stem, channels[0], 2)))
        self.stages = nn.ModuleList()
        inputs = channels[0]
        for stage, (outputs, count) in enumerate(zip(channels, blocks, strict=True)):
            strides = [1 if stage == 0 else 2] + [1] * (count - 1)
            widths = [inputs] + [outputs] * (count - 1)
            self.stages.append(
                nn.ModuleList(
                    ResidualBlock(i, outputs, s) for i, s in zip(widths, strides, strict=True)
                )
            )
            inputs = outputs

    def forward(self, images: Tensor, padding: Tensor | None = None) -> list[Tensor]:
        """Normalised (B, 3, H, W), H and W multiples of 32 -> maps at strides 4, 8, 16, 32."""
        height, width = images.shape[-2:]
        assert height % 32 == 0 and width % 32 == 0, "pad images to multiples of 32"
        features = images
        for index, layer in enumerate(self.stem):
            stride = 2 ** (index + 1)
            at_stride = resize_padding(padding, (height // stride, width // stride))
            features = zero_padding(F.relu(layer(features)), at_stride)
        maps: list[Tensor] = []
        for stride, stage in zip(STRIDES, cast("list[nn.ModuleList]", self.stages), strict=True):
            at_stride = resize_padding(padding, (height // stride, width // stride))
            for block in stage:
                features = block(features, at_stride)
            maps.append(features)
        return maps


def _timm_model(name: str, pretrained: bool, **options: Any) -> Any:
    """A timm model (their classes share no type); what goes wrong there is told to the user."""
    import timm

    hint = "Any timm model with `features_only`: resnet50, convnext_tiny, swin_tiny_patch4_..."
    if not timm.is_model(name):
        raise UserError(
            f"There is no backbone '{name}': it is neither 'small' nor a timm model.", hint
        )
    try:
        with without_waiting(all_cached=not pretrained):
            return timm.create_model(name, pretrained=pretrained, **options)
    except (OSError, RuntimeError, ValueError, UnpicklingError, SafetensorError) as error:
        if not pretrained:
            raise UserError(f"timm cannot build '{name}': {error}", hint) from error
        raise UserError(
            f"The published weights of '{name}' cannot be loaded: {short(error)}. They are a "
            f"download {size_of(name.partition('.')[0])}.",
            f'Where there is a network: python -c "import timm; timm.create_model({name!r}, '
            'pretrained=True)", then copy ~/.cache/huggingface; or start '
            "from a file (model.backbone_weights, or a student's encoder_weights).",
        ) from error


def published_repository(name: str) -> str:
    """The hub's repository of a timm model's published weights; empty where there is none."""
    import timm

    found = timm.get_pretrained_cfg(name) if timm.is_model(name) else None
    return (found.hf_hub_id or "") if found is not None else ""


class TimmBackbone(nn.Module):
    """A timm model; padded borders reach a few pixels into the image, as in Mask2Former."""

    def __init__(self, name: str, pretrained: bool) -> None:
        super().__init__()
        options: dict[str, Any] = {"strict_img_size": False} if name.startswith("swin") else {}
        body = _timm_model(name, pretrained, features_only=True, **options)
        self.body: nn.Module = body
        reductions = body.feature_info.reduction()
        if not set(STRIDES) <= set(reductions):
            raise UserError(
                f"Backbone '{name}' has features at strides {reductions}, not at 4, 8, 16 and 32.",
                "Choose another one, such as resnet50.",
            )
        last = {stride: index for index, stride in enumerate(reductions)}
        self.kept = [last[stride] for stride in STRIDES]
        self.channels = tuple(body.feature_info.channels()[index] for index in self.kept)
        self.channels_at_end = str(getattr(body, "output_fmt", "")).endswith("NHWC")

    def forward(self, images: Tensor, padding: Tensor | None = None) -> list[Tensor]:
        """Normalised (B, 3, H, W) -> maps at strides 4, 8, 16, 32, zero at the padding."""
        found = self.body(images)
        maps: list[Tensor] = []
        for index in self.kept:
            features = found[index]
            if self.channels_at_end:  # Swin and its kin speak (B, h, w, C)
                features = features.permute(0, 3, 1, 2).contiguous()
            maps.append(zero_padding(features, resize_padding(padding, map_size(features))))
        return maps


def _published_swin(name: str, pretrained: bool) -> SwinBackbone:
    """A Swin by timm's name, with the weights that timm publishes if asked for."""
    body = SwinBackbone(SWINS[name.partition(".")[0]])
    if pretrained:
        published = _timm_model(name, True).state_dict()
        body.load_state_dict({k: v for k, v in published.items() if k in body.state_dict()}, False)
    return body


class Backbone(nn.Module):
    """Image features at strides 4, 8, 16 and 32.

    Args:
        name: "small", or a timm model with `features_only`; Swins are those of Mask2Former.
        pretrained: load timm's published weights; UserError where they cannot be had.
        frozen_bn: batch norms keep their statistics and weights, as in Mask2Former's R-50.
    """

    mean: Tensor  # (3, 1, 1) of the images in 0-1
    std: Tensor

    def __init__(
        self, name: str = "small", pretrained: bool = False, frozen_bn: bool = False
    ) -> None:
        super().__init__()
        if name == "small" and pretrained:
            raise UserError(
                "The 'small' backbone has no published weights.",
                "Set model.backbone_weights='' (of a student encoder_weights='').",
            )
        if name == "small":
            self.body = SmallBackbone()
        elif name.partition(".")[0] in SWINS:
            self.body = _published_swin(name, pretrained)
        else:
            self.body = TimmBackbone(name, pretrained)
        self.channels: tuple[int, ...] = self.body.channels
        self.strides = STRIDES
        for key, value in (("mean", IMAGENET_MEAN), ("std", IMAGENET_STD)):
            self.register_buffer(key, torch.tensor(value)[:, None, None], persistent=False)
        self.frozen_bn = frozen_bn
        if frozen_bn:
            for norm in self._batch_norms():
                norm.requires_grad_(False)
                norm.eval()

    def _batch_norms(self) -> list[nn.BatchNorm2d]:
        return [m for m in self.modules() if isinstance(m, nn.BatchNorm2d)]

    def train(self, mode: bool = True) -> "Backbone":
        """Training mode, in which frozen batch norms stay as they are."""
        super().train(mode)
        if self.frozen_bn:
            for norm in self._batch_norms():
                norm.eval()
        return self

    def normalised(self, images: Tensor, padding: Tensor | None) -> Tensor:
        """Images (B, 3, H, W), uint8 or float in 0-1, as the forward pass takes them: 0 is the mean
        colour, also at the padding (B, H, W)."""
        images = images / 255.0 if images.dtype == torch.uint8 else images
        images = (images - self.mean) / self.std
        return images if padding is None else images.masked_fill(padding[:, None], 0.0)

    def forward(self, images: Tensor, padding: Tensor | None = None) -> list[Tensor]:
        """Normalised images (B, 3, H, W), padding (B, H, W) -> four maps (B, C, h, w)."""
        return self.body(images, padding)
