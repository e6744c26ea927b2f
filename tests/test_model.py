"""The segmentor's parts: shapes, padding, isolation, gradients, export."""

import math

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from concat_cli.core.errors import UserError
from concat_cli.core.model import deformable
from concat_cli.core.model.backbone import Backbone
from concat_cli.core.model.deformable import sample_bags, sample_reference
from concat_cli.core.model.pixel_decoder import (
    DeformablePixelDecoder,
    FPNPixelDecoder,
    PixelFeatures,
)
from concat_cli.core.model.query_decoder import (
    Denoising,
    QueryDecoder,
    Tokens,
    isolation,
    select_tokens,
)
from concat_cli.core.model.segmentor import Classifier, MaskPool, Projector, Segmentor

WIDTH, CLIP_WIDTH, QUERIES, LAYERS, CLASSES = 32, 24, 6, 3, 5


def _pixel_decoder(kind: str, channels: tuple[int, ...]) -> nn.Module:
    if kind == "fpn":
        return FPNPixelDecoder(channels, WIDTH, WIDTH, heads=4, ffn=48)
    return DeformablePixelDecoder(channels, WIDTH, WIDTH, heads=4, ffn=48, layers=2, groups=4)


def _segmentor(
    kind: str = "fpn", tokens: bool = True, pooling: bool = True, detach: bool = False
) -> Segmentor:
    torch.manual_seed(0)
    backbone = Backbone("small")
    level = 0 if kind == "fpn" else 1
    decoder = QueryDecoder(WIDTH, 4, LAYERS, 48, QUERIES, WIDTH, tokens, token_level=level)
    segmentor = Segmentor(
        backbone,
        _pixel_decoder(kind, backbone.channels),
        decoder,
        Projector(WIDTH, CLIP_WIDTH, layers=2, hidden=20),
        Classifier(CLIP_WIDTH, 25.0, learn_scale=True),
        MaskPool([*backbone.channels, WIDTH], WIDTH) if pooling else None,
        detach,
    )
    for tensor in segmentor.state_dict().values():
        if tensor.is_floating_point() and tensor.dim():
            tensor.add_(torch.randn_like(tensor) * 0.02)  # no weight stays at a special value
    return segmentor.eval()


def _images(batch: int, height: int, width: int) -> Tensor:
    generator = torch.Generator().manual_seed(3)
    return torch.randint(0, 256, (batch, 3, height, width), generator=generator, dtype=torch.uint8)


def _text() -> Tensor:
    return torch.randn(CLASSES, CLIP_WIDTH, generator=torch.Generator().manual_seed(4))


def _denoising(batch: int, count: int = 4) -> Denoising:
    generator = torch.Generator().manual_seed(5)
    masks = (torch.rand(batch, count, 16, 16, generator=generator) > 0.7).float()
    valid = torch.ones(batch, count, dtype=torch.bool)
    valid[:, -1] = False
    return Denoising(masks, valid)


@pytest.mark.parametrize("kind", ["fpn", "deformable"])
@pytest.mark.parametrize("tokens", [True, False])
def test_shapes(kind: str, tokens: bool) -> None:
    model = _segmentor(kind, tokens, pooling=tokens)
    with torch.no_grad():
        denoising = _denoising(2) if tokens else None
        output = model(_images(2, 64, 96), None, _text(), denoising, dense=tokens)
    layers = LAYERS + 1
    for part, count in ((output, QUERIES), (output.denoising, 4))[: 1 + tokens]:
        assert part.vision_queries.shape == (layers, 2, count, WIDTH)
        assert part.semantic_queries.shape == (layers, 2, count, CLIP_WIDTH)
        assert part.class_logits.shape == (layers, 2, count, CLASSES + 1)
        assert part.mask_logits.shape == (layers, 2, count, 16, 24)
    if tokens:
        assert output.dense.class_logits.shape == (2, 24, CLASSES + 1)
        assert output.dense.objectness.shape == (2, 24) and output.dense.size == (4, 6)
    else:
        assert output.dense is None and output.denoising is None


def test_last_only_equals_the_last_layer() -> None:
    model, images = _segmentor(), _images(2, 64, 64)
    with torch.no_grad():
        whole = model(images, None, _text())
        last = model(images, None, _text(), last_only=True)
    for name in ("vision_queries", "semantic_queries", "class_logits", "mask_logits"):
        assert getattr(last, name).shape[0] == 1
        torch.testing.assert_close(getattr(last, name)[0], getattr(whole, name)[-1])


@pytest.mark.parametrize("kind", ["fpn", "deformable"])
@pytest.mark.parametrize("size", [(64, 96), (50, 75)])
def test_padding_changes_nothing(kind: str, size: tuple[int, int]) -> None:
    """An image alone (padded to multiples of 32) equals the same image in a larger batch."""
    model, (height, width) = _segmentor(kind), size
    image = _images(1, height, width)

    def run(canvas: tuple[int, int]) -> tuple[Tensor, ...]:
        images = torch.full((2, 3, *canvas), 200, dtype=torch.uint8)
        images[:1, :, :height, :width] = image
        padding = torch.zeros(2, *canvas, dtype=torch.bool)
        padding[0, height:], padding[0, :, width:] = True, True
        with torch.no_grad():
            out = model(images, padding, _text())
        cells = math.ceil(height / 4), math.ceil(width / 4)
        return out.class_logits[:, 0], out.mask_logits[:, 0, :, : cells[0], : cells[1]]

    alone = run((math.ceil(height / 32) * 32, math.ceil(width / 32) * 32))
    padded = run((128, 160))
    for ours, expected in zip(padded, alone, strict=True):
        torch.testing.assert_close(ours, expected, rtol=1e-3, atol=1e-3)


def test_no_padding_equals_an_empty_padding_mask() -> None:
    model, images = _segmentor("deformable"), _images(1, 64, 64)
    with torch.no_grad():
        plain = model(images, None, _text())
        empty = model(images, torch.zeros(1, 64, 64, dtype=torch.bool), _text())
    torch.testing.assert_close(plain.mask_logits, empty.mask_logits, rtol=1e-4, atol=1e-4)


def _naive_sample(values: Tensor, sizes: list, places: Tensor, weights: Tensor) -> Tensor:
    """Bilinear reading, one point after the other."""
    batch, _, heads, width = values.shape
    queries, points = places.shape[1], places.shape[4]
    result = torch.zeros(batch, queries, heads, width)
    for b, q, m in ((b, q, m) for b in range(batch) for q in range(queries) for m in range(heads)):
        start = 0
        for level, (rows, columns) in enumerate(sizes):
            image = values[b, start : start + rows * columns, m].view(rows, columns, width)
            start += rows * columns
            for p in range(points):
                x, y = (places[b, q, m, level, p] - 0.5).tolist()
                for row in (math.floor(y), math.floor(y) + 1):
                    for column in (math.floor(x), math.floor(x) + 1):
                        if 0 <= row < rows and 0 <= column < columns:
                            share = (1 - abs(y - row)) * (1 - abs(x - column))
                            result[b, q, m] += (
                                weights[b, q, m, level, p] * share * image[row, column]
                            )
    return result.flatten(2)


@pytest.mark.parametrize("sampler", [sample_reference, sample_bags])
def test_deformable_sampling_against_a_loop(sampler, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(deformable, "QUERIES", 4)
    generator = torch.Generator().manual_seed(0)
    sizes = [(2, 3), (4, 5), (7, 9)]
    values = torch.randn(2, sum(h * w for h, w in sizes), 2, 4, generator=generator)
    places = torch.rand(2, 6, 2, 3, 4, 2, generator=generator) * 14 - 3  # partly outside
    places[0, 0, 0, :, 0] = torch.tensor([(w, h) for h, w in sizes]).float()  # on the very edge
    places[0, 0, 0, :, 1] = 0.0
    weights = torch.rand(2, 6, 2, 3, 4, generator=generator)
    expected = _naive_sample(values, sizes, places, weights)
    torch.testing.assert_close(sampler(values, sizes, places, weights), expected)


def test_samplers_have_the_same_gradients(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(deformable, "QUERIES", 4)
    generator = torch.Generator().manual_seed(0)
    sizes = [(2, 3), (4, 5)]
    inputs = [
        torch.randn(1, 26, 2, 4, generator=generator, requires_grad=True),
        (torch.rand(1, 6, 2, 2, 4, 2, generator=generator) * 6).requires_grad_(),
        torch.rand(1, 6, 2, 2, 4, generator=generator, requires_grad=True),
    ]
    found = []
    for sampler in (sample_reference, sample_bags):
        result = sampler(inputs[0], sizes, inputs[1], inputs[2])
        found.append(torch.autograd.grad(result.square().sum(), inputs))
    for ours, expected in zip(*found, strict=True):
        torch.testing.assert_close(ours, expected, rtol=1e-4, atol=1e-4)


def test_masks_of_given_segments_are_the_first_prediction_of_denoising_queries() -> None:
    model, given = _segmentor(), _denoising(2)
    padding = torch.zeros(2, 64, 96, dtype=torch.bool)
    padding[1, :, 64:] = True
    with torch.no_grad():
        output = model(_images(2, 64, 96), padding, _text(), given)
        again = model.query_decoder.masks_of(output.pixel, given)
    assert output.denoising is not None
    torch.testing.assert_close(again, output.denoising.mask_logits[0])


def test_ordinary_queries_do_not_see_denoising_ones() -> None:
    model, images = _segmentor(), _images(2, 64, 64)
    with torch.no_grad():
        plain = model(images, None, _text())
        with_denoising = model(images, None, _text(), _denoising(2))
    torch.testing.assert_close(with_denoising.class_logits, plain.class_logits)
    torch.testing.assert_close(with_denoising.mask_logits, plain.mask_logits)


def test_isolation_by_hand() -> None:
    allowed = isolation(2, torch.tensor([[True, True, False]]))[0].int().tolist()
    assert allowed == [
        [1, 1, 0, 0, 0],
        [1, 1, 0, 0, 0],
        [0, 0, 1, 1, 0],
        [0, 0, 1, 1, 0],
        [0, 0, 1, 1, 1],
    ]


def test_classes_are_scaled_cosines() -> None:
    model = _segmentor()
    vision, text = torch.randn(2, 3, WIDTH), _text()
    semantic, logits = model.classify(vision, text)
    expected = [F.cosine_similarity(semantic, row, dim=-1) for row in text]
    expected.append(F.cosine_similarity(semantic, model.classifier.no_object, dim=-1))
    scale = model.classifier.log_scale.exp()
    torch.testing.assert_close(logits, scale * torch.stack(expected, -1), rtol=1e-4, atol=1e-4)
    _, scaled_text = model.classify(vision, 3 * text)
    torch.testing.assert_close(scaled_text, logits, rtol=1e-4, atol=1e-4)


def test_scale_is_at_most_100() -> None:
    classifier = Classifier(8, 90.0, learn_scale=True)
    with torch.no_grad():
        classifier.log_scale.fill_(9.0)
    assert classifier.scale.item() == pytest.approx(100.0)
    assert not list(Classifier(8, 100.0).parameters())[1:], "a fixed scale is no parameter"


def _gradients(model: Segmentor, part: str) -> dict[str, bool]:
    """Which parts of the model the class or mask logits' gradient reaches."""
    model.zero_grad()
    output = model(_images(1, 64, 64), None, _text())
    getattr(output, part).square().sum().backward()
    return {
        name: any(p.grad is not None and p.grad.abs().sum() > 0 for p in module.parameters())
        for name, module in model.named_children()
        if name != "classifier"
    }


def test_detached_class_path_leaves_the_query_decoder_alone() -> None:
    free, detached = _segmentor(), _segmentor(detach=True)
    assert all(_gradients(free, "class_logits").values())
    reached = _gradients(detached, "class_logits")
    assert not reached["query_decoder"] and reached["backbone"] and reached["mask_pool"]
    reached = _gradients(detached, "mask_logits")
    assert reached["query_decoder"] and not reached["mask_pool"], "masks do not use pooling"


def test_every_parameter_can_learn() -> None:
    model = _segmentor()
    output = model(_images(2, 64, 64), None, _text(), _denoising(2), dense=True)
    parts = [output.class_logits, output.mask_logits, output.denoising.class_logits]
    parts += [output.dense.class_logits, output.dense.objectness]
    sum(part.square().sum() for part in parts).backward()
    assert not [name for name, p in model.named_parameters() if p.grad is None]


def test_mask_queries_ignore_what_is_outside_the_mask() -> None:
    pool = MaskPool([4, 6], 8)
    maps = [torch.randn(1, 4, 8, 8), torch.randn(1, 6, 4, 4)]
    mask = torch.zeros(1, 1, 8, 8)
    mask[..., :4, :4] = 1
    before = pool(maps, mask, None)
    for features in maps:
        half = features.shape[-1] // 2
        features[..., half:, :] = 7.0
        features[..., :, half:] = 7.0
    torch.testing.assert_close(pool(maps, mask, None), before)


def test_mask_queries_of_the_segmentor() -> None:
    model = _segmentor()
    masks = torch.zeros(2, 3, 16, 16)
    masks[:, :2, :8] = 1.0  # the third mask is empty: finite all the same
    queries = model.mask_queries(*model.features(_images(2, 64, 64), None), masks)
    assert queries.shape == (2, 3, WIDTH) and queries.isfinite().all()
    torch.testing.assert_close(queries[:, 0], queries[:, 1])


def test_empty_masks_attend_everywhere() -> None:
    decoder = QueryDecoder(WIDTH, 4, 1, 48, 2, WIDTH)
    states, features = torch.randn(1, 2, WIDTH), torch.zeros(1, WIDTH, 4)
    with torch.no_grad():
        direction = decoder.mask_embedding(states)[0, 0]
        features[0] = -direction[:, None]  # the first query's mask is empty
        features[0, :, 1] = direction
        inside = decoder._allowed_pixels(states, features, None)
        features[0, :, 1] = -direction
        empty = decoder._allowed_pixels(states, features, None)
        padding = torch.tensor([[[False, False], [False, True]]])
        padded = decoder._allowed_pixels(states, features, padding)
    assert inside[0, 0].tolist() == [False, True, False, False]
    assert empty[0, 0].tolist() == [True] * 4
    assert padded[0, 0].tolist() == [True, True, True, False]


def test_token_selection_takes_peaks_first() -> None:
    grid = torch.tensor([[9.0, 8, 7, 3], [8, 7, 6, 2], [4, 3, 2, 1], [0, -1, 1, 5]])
    tokens = Tokens(torch.zeros(1, 16, 2), grid.view(1, 16), None, (4, 4))
    assert select_tokens(tokens, 3)[0].tolist() == [0, 15, 1]
    padding = torch.ones(1, 16, dtype=torch.bool)
    padding[0, :2] = False
    padded = Tokens(tokens.features, tokens.objectness, padding, (4, 4))
    assert select_tokens(padded, 5)[0].tolist() == [0, 1, 0, 1, 0]


def test_frozen_batch_norms_stay() -> None:
    backbone = Backbone("small", frozen_bn=True).train()
    norms = {k: v.clone() for k, v in backbone.state_dict().items() if "running" in k}
    backbone(torch.randn(2, 3, 64, 64))
    assert norms and all(torch.equal(backbone.state_dict()[k], v) for k, v in norms.items())
    trained = {name for name, p in backbone.named_parameters() if p.requires_grad}
    assert all(name.endswith("weight") for name in trained), "batch norms' weights are frozen too"


def test_backbone_mistakes_are_told() -> None:
    with pytest.raises(UserError, match="resnet5"):
        Backbone("resnet5")
    with pytest.raises(UserError, match="not at 4, 8, 16"):
        Backbone("vit_tiny_patch16_224")
    with pytest.raises(UserError, match="no published weights"):
        Backbone("small", pretrained=True)


@pytest.mark.parametrize("name", ["mobilenetv3_small_050", "swin_tiny_patch4_window7_224"])
def test_timm_backbones_of_both_layouts(name: str) -> None:
    backbone = Backbone(name).eval()
    padding = torch.zeros(1, 64, 96, dtype=torch.bool)
    padding[:, :, 64:] = True
    with torch.no_grad():
        maps = backbone(torch.randn(1, 3, 64, 96), padding)
    assert [m.shape[1] for m in maps] == list(backbone.channels)
    for stride, features in zip(backbone.strides, maps, strict=True):
        assert features.shape[-2:] == (64 // stride, 96 // stride)
        assert not features[..., 64 // stride :].any() and features[..., : 64 // stride].any()


def test_bf16_autocast() -> None:
    model = _segmentor("deformable").train()
    with torch.autocast("cpu", torch.bfloat16):
        output = model(_images(2, 64, 64), None, _text(), _denoising(2), dense=True)
    assert output.class_logits.dtype == output.mask_logits.dtype == torch.float32
    (output.class_logits.mean() + output.mask_logits.mean()).backward()
    assert all(p.grad.isfinite().all() for p in model.parameters() if p.grad is not None)


class _Flat(nn.Module):
    """The segmentor with tensors in and out, as an exporter wants it."""

    def __init__(self, segmentor: Segmentor) -> None:
        super().__init__()
        self.segmentor = segmentor

    def forward(self, images: Tensor, padding: Tensor, text: Tensor) -> tuple[Tensor, Tensor]:
        output = self.segmentor(images, padding, text, last_only=True)
        return output.class_logits[-1], output.mask_logits[-1]


@pytest.mark.parametrize("kind", ["fpn", "deformable"])
def test_export(kind: str) -> None:
    model = _Flat(_segmentor(kind)).eval()
    padding = torch.zeros(1, 64, 64, dtype=torch.bool)
    padding[:, 40:] = True
    inputs = (_images(1, 64, 64), padding, _text())
    with torch.no_grad():
        expected = model(*inputs)
        exported = torch.export.export(model, inputs).module()(*inputs)
    for ours, theirs in zip(exported, expected, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-4)


def test_pixel_features_hold_three_levels() -> None:
    backbone = Backbone("small").eval()
    decoder = FPNPixelDecoder(backbone.channels, WIDTH, 16, 4, 48, level_strides=(32, 16, 8)).eval()
    with torch.no_grad():
        pixel: PixelFeatures = decoder(backbone(torch.randn(1, 3, 64, 96)))
    assert [tuple(x.shape[-2:]) for x in pixel.levels] == [(2, 3), (4, 6), (8, 12)]
    assert pixel.mask_features.shape == (1, 16, 16, 24)
