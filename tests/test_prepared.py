"""What is done once before forwards in half precision leaves their meaning as it is."""

import pytest
import torch
from torch import Tensor, nn

from concat_cli.core.model.backbone import Backbone
from concat_cli.core.model.pixel_decoder import DeformablePixelDecoder
from concat_cli.core.model.prepared import fold_batch_norms, prepare
from concat_cli.core.model.query_decoder import QueryDecoder
from concat_cli.core.model.segmentor import Classifier, Projector, Segmentor


def _moved(module: nn.Module) -> nn.Module:
    """A module in evaluation whose batch norms are none of the identity."""
    for norm in module.modules():
        if isinstance(norm, nn.BatchNorm2d):
            for values in (norm.running_var, norm.weight):
                assert values is not None
                values.data.uniform_(0.5, 1.5)
            norm.bias.data.normal_()
            assert norm.running_mean is not None
            norm.running_mean.normal_()
    return module.eval()


def test_a_folded_norm_is_that_of_its_formula() -> None:
    torch.manual_seed(0)
    conv, norm = nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4)
    pair = _moved(nn.Sequential(conv, norm))
    image = torch.randn(2, 3, 9, 9)
    assert norm.running_mean is not None and norm.running_var is not None

    def of_channel(values: Tensor) -> Tensor:
        return values[:, None, None]

    centred = conv(image) - of_channel(norm.running_mean)
    scaled = centred / of_channel(norm.running_var + norm.eps).sqrt()
    expected = scaled * of_channel(norm.weight) + of_channel(norm.bias)
    fold_batch_norms(pair)
    assert not any(isinstance(part, nn.BatchNorm2d) for part in pair.modules())
    torch.testing.assert_close(pair(image), expected, atol=1e-5, rtol=1e-5)


class _Backwards(nn.Module):
    """Registers its parts in another order than it calls them, and says so at no place."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 3, 1)
        self.norm = nn.BatchNorm2d(3)

    def forward(self, images: Tensor, padding: Tensor | None = None) -> list[Tensor]:
        return [self.conv(torch.relu(self.norm(images)))]


def _segmentor(name: str) -> Segmentor:
    torch.manual_seed(0)
    backbone = Backbone(name)
    model = Segmentor(
        backbone,
        DeformablePixelDecoder(backbone.channels, 32, 32, 4, 64, 2, groups=8),
        QueryDecoder(32, 4, 3, 64, 10, 32),
        Projector(32, 16),
        Classifier(16),
    )
    moved = _moved(model)
    assert isinstance(moved, Segmentor)
    return moved


@pytest.mark.parametrize("name", ["small", "resnet18", "regnetx_002"])
@torch.no_grad()
def test_a_prepared_segmentor_predicts_what_it_did(name: str) -> None:
    model = _segmentor(name)
    images, text = torch.rand(2, 3, 64, 96), torch.randn(5, 16)
    padding = torch.zeros(2, 64, 96, dtype=torch.bool)
    padding[1, :, 64:] = True
    full = model(images, padding, text).mask_logits
    with torch.autocast("cpu", torch.bfloat16):
        plain = model(images, padding, text).mask_logits
        prepare(model, torch.bfloat16)
        ready = model(images, padding, text).mask_logits
    assert not any(isinstance(part, nn.BatchNorm2d) for part in model.backbone.modules())
    assert {p.dtype for p in model.backbone.parameters()} == {torch.bfloat16}
    scale = full.abs().max()
    assert (ready - full).abs().max() <= 2 * (plain - full).abs().max() + 1e-3 * scale


@torch.no_grad()
def test_in_fp32_the_outputs_stay() -> None:
    model, images, text = _segmentor("resnet18"), torch.rand(1, 3, 64, 96), torch.randn(5, 16)
    before = model(images, None, text)
    prepare(model, None)
    after = model(images, None, text)
    assert model.pixel_decoder.get_parameter("mask_out.weight").dtype == torch.float32
    torch.testing.assert_close(after.mask_logits, before.mask_logits, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(after.class_logits, before.class_logits, rtol=1e-4, atol=1e-4)
    assert not after.pixel.mask_features.is_contiguous()  # but channels last


def test_an_unusual_order_is_left_alone() -> None:
    model = _segmentor("small")
    body = _moved(_Backwards())
    model.backbone.body = body  # pyright: ignore[reportAttributeAccessIssue]
    prepare(model, torch.bfloat16)
    assert model.backbone.body is body
