"""MaskFormer: its parts against transformers' with copied weights, padding, dropout, its head."""

from __future__ import annotations

import math
import re

import pytest
import torch
import torch.nn.functional as F
from concat_cli.core.model.layers import Attention
from torch import Tensor, nn

from concat_cli.core.config import Config
from concat_cli.core.config_file import load_config
from concat_cli.core.model.segmentor import Classifier, Segmentor
from concat_cli.methods.zegformer.maskformer import (
    MaskFormer,
    MaskFormerDecoder,
    MaskFormerPixelDecoder,
    build_zegformer,
)

CHANNELS = (8, 16, 24, 40)
WIDTH, MASK_WIDTH, HEADS, LAYERS, FFN, QUERIES, CLIP = 64, 32, 4, 3, 96, 7, 12
KEYS = f"""
model.width={WIDTH} model.mask_width={MASK_WIDTH} model.heads={HEADS} model.queries={QUERIES}
model.decoder_layers={LAYERS} model.decoder_ffn={FFN}
""".split()


def config(*keys: str) -> Config:
    return load_config(None, [*KEYS, *keys])


def maskformer(*keys: str) -> MaskFormer:
    torch.manual_seed(0)
    found = build_zegformer(config(*keys), CLIP)
    assert isinstance(found, MaskFormer)
    return found.eval()


def text(classes: int = 5) -> Tensor:
    return F.normalize(torch.randn(classes, CLIP, generator=seeded()), dim=-1)


def seeded(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def maps(*sizes: tuple[int, int]) -> list[Tensor]:
    g = seeded(1)
    return [torch.randn(2, c, *s, generator=g) for c, s in zip(CHANNELS, sizes, strict=True)]


# --- against transformers ---------------------------------------------------------------------

_NAMES = (
    # theirs -> ours
    (r"fpn\.stem\.0\.", "coarsest.conv."),
    (r"fpn\.stem\.1\.", "coarsest.norm."),
    (r"fpn\.layers\.(\d)\.proj\.0\.", r"laterals.\1.conv."),
    (r"fpn\.layers\.(\d)\.proj\.1\.", r"laterals.\1.norm."),
    (r"fpn\.layers\.(\d)\.block\.0\.", r"smooth.\1.conv."),
    (r"fpn\.layers\.(\d)\.block\.1\.", r"smooth.\1.norm."),
    (r"mask_projection\.", "mask_out."),
    (r"input_projection\.", "input."),
    (r"queries_embedder\.weight", "query_position"),
    (r"decoder\.layernorm\.", "norm."),
    (r"decoder\.layers\.(\d)\.self_attn_layer_norm\.", r"layers.\1.self_norm."),
    (r"decoder\.layers\.(\d)\.encoder_attn_layer_norm\.", r"layers.\1.cross_norm."),
    (r"decoder\.layers\.(\d)\.final_layer_norm\.", r"layers.\1.feed_forward_norm."),
    (r"decoder\.layers\.(\d)\.self_attn\.", r"layers.\1.self_attention."),
    (r"decoder\.layers\.(\d)\.encoder_attn\.", r"layers.\1.cross_attention."),
    (r"decoder\.layers\.(\d)\.mlp\.fc1\.", r"layers.\1.feed_forward.first."),
    (r"decoder\.layers\.(\d)\.mlp\.fc2\.", r"layers.\1.feed_forward.second."),
    (r"(.*attention\.)q_proj\.", r"\1query."),
    (r"(.*attention\.)k_proj\.", r"\1key."),
    (r"(.*attention\.)v_proj\.", r"\1value."),
    (r"(.*attention\.)o_proj\.", r"\1out."),
)


def take_weights(ours: nn.Module, theirs: nn.Module) -> None:
    """Copies every weight, none of them at a special value."""
    state = {}
    g = seeded(2)
    with torch.no_grad():
        for name, tensor in theirs.state_dict().items():
            tensor.add_(torch.randn(tensor.shape, generator=g) * 0.05)
            for pattern, target in _NAMES:
                name = re.sub(f"^{pattern}", target, name)
            state[name] = tensor
    ours.load_state_dict(state)


def close(ours: Tensor, theirs: Tensor) -> None:
    assert ours.shape == theirs.shape
    assert (ours - theirs).abs().max() < 1e-4 * theirs.abs().max()


@pytest.mark.parametrize(
    "sizes", [((16, 24), (8, 12), (4, 6), (2, 3)), ((13, 9), (7, 5), (4, 3), (2, 2))]
)
def test_the_pixel_decoder_is_that_of_transformers(sizes: tuple[tuple[int, int], ...]) -> None:
    peer = pytest.importorskip("transformers.models.maskformer.modeling_maskformer")
    theirs = peer.MaskFormerPixelDecoder(
        in_features=CHANNELS[-1],
        lateral_widths=list(CHANNELS[:-1]),
        feature_size=WIDTH,
        mask_feature_size=MASK_WIDTH,
    ).eval()
    ours = MaskFormerPixelDecoder(CHANNELS, WIDTH, MASK_WIDTH).eval()
    take_weights(ours, theirs)
    with torch.no_grad():
        features = maps(*sizes)
        close(ours(features), theirs(features).last_hidden_state)


@pytest.mark.parametrize("size", [(2, 3), (5, 4)])
def test_the_query_decoder_is_that_of_transformers(size: tuple[int, int]) -> None:
    """The queries after every layer, through the shared norm."""
    peer = pytest.importorskip("transformers.models.maskformer.modeling_maskformer")
    from transformers import MaskFormerConfig, ResNetConfig
    from transformers.models.maskformer.configuration_maskformer import MaskFormerDetrConfig

    detr = MaskFormerDetrConfig(
        d_model=WIDTH, decoder_layers=LAYERS, decoder_attention_heads=HEADS, decoder_ffn_dim=FFN,
        num_queries=QUERIES,
    )  # fmt: skip
    backbone = ResNetConfig(out_features=["stage1", "stage2", "stage3", "stage4"])
    whole = MaskFormerConfig(backbone_config=backbone, decoder_config=detr)
    theirs = peer.MaskFormerTransformerModule(CHANNELS[-1], whole).eval()
    ours = MaskFormerDecoder(CHANNELS[-1], WIDTH, HEADS, LAYERS, FFN, QUERIES).eval()
    take_weights(ours, theirs)
    coarsest = torch.randn(2, CHANNELS[-1], *size, generator=seeded(3))
    with torch.no_grad():
        expected = theirs(coarsest, output_hidden_states=True, return_dict=True)
        found = ours(coarsest)
        close(found[-1], expected.last_hidden_state)
        states = expected.hidden_states[-LAYERS:]
        for layer in range(LAYERS - 1):
            close(found[layer], theirs.decoder.layernorm(states[layer]))


# --- the whole --------------------------------------------------------------------------------


def test_masks_and_classes_are_products() -> None:
    model = maskformer()
    images = torch.randint(0, 256, (2, 3, 64, 96), generator=seeded(), dtype=torch.uint8)
    with torch.no_grad():
        out = model(images, None, text())
        features = model.backbone(model.backbone.normalised(images, None))
        pixels = model.pixel_decoder(features)
        embedding = model.mask_embedding(out.vision_queries)
    assert out.vision_queries.shape == (LAYERS, 2, QUERIES, WIDTH)
    assert out.semantic_queries.shape == (LAYERS, 2, QUERIES, CLIP)
    assert out.mask_logits.shape == (LAYERS, 2, QUERIES, 16, 24)
    for layer, b, q in ((0, 0, 0), (2, 1, 6)):
        expected = sum(embedding[layer, b, q, c] * pixels[b, c] for c in range(MASK_WIDTH))
        torch.testing.assert_close(out.mask_logits[layer, b, q], expected, rtol=1e-3, atol=1e-4)
    semantic, classes = model.projector(out.vision_queries), out.class_logits
    torch.testing.assert_close(semantic, out.semantic_queries)
    torch.testing.assert_close(model.classifier(semantic, text()), classes)


def test_the_last_layer_alone() -> None:
    model = maskformer()
    images = torch.rand(1, 3, 64, 64, generator=seeded())
    with torch.no_grad():
        every, last = (model(images, None, text(), last_only=only) for only in (False, True))
    for name in ("vision_queries", "semantic_queries", "class_logits", "mask_logits"):
        one = getattr(last, name)
        assert len(one) == 1
        torch.testing.assert_close(one[0], getattr(every, name)[-1])


def test_an_image_is_the_same_alone_and_padded_in_a_batch() -> None:
    model = maskformer()
    image = torch.rand(1, 3, 64, 64, generator=seeded())
    wide = torch.rand(2, 3, 64, 128, generator=seeded(1))
    wide[0, :, :, :64] = image[0]
    padding = torch.zeros(2, 64, 128, dtype=torch.bool)
    padding[0, :, 64:] = True
    with torch.no_grad():
        alone, padded = model(image, None, text()), model(wide, padding, text())
        wide[0, :, :, 64:] = 0.5
        again, unpadded = model(wide, padding, text()), model(wide, None, text())
    for name in ("vision_queries", "class_logits"):
        one, both = getattr(alone, name)[:, 0], getattr(padded, name)[:, 0]
        torch.testing.assert_close(both, one, rtol=1e-4, atol=1e-4)
        assert torch.equal(both, getattr(again, name)[:, 0])
    masks = padded.mask_logits[:, 0, :, :, :16]
    torch.testing.assert_close(masks, alone.mask_logits[:, 0], rtol=1e-4, atol=1e-4)
    assert not torch.allclose(unpadded.class_logits[:, 0], alone.class_logits[:, 0], atol=1e-3)


def test_attention_weights_are_dropped_in_training_alone() -> None:
    torch.manual_seed(0)
    ours, plain = Attention(16, 4, 0.5), Attention(16, 4)
    plain.load_state_dict(ours.state_dict())
    query, key, value = (torch.randn(2, n, 16) for n in (3, 40, 40))
    allowed = torch.rand(2, 1, 40) < 0.8
    expected = plain(query, key, value, allowed)
    torch.testing.assert_close(ours.eval()(query, key, value, allowed), expected)
    drawn = torch.stack([ours.train()(query, key, value, allowed) for _ in range(200)])
    assert (drawn[0] - expected).abs().max() > 0.01
    error = (drawn.mean(0) - expected).abs() / (drawn.std(0) / math.sqrt(200))
    assert error.max() < 5  # what is kept is scaled up: the mean stays


def test_training_drops_and_evaluation_does_not() -> None:
    model = maskformer()
    images = torch.rand(2, 3, 64, 64, generator=seeded())
    with torch.no_grad():
        still = [model(images, None, text()).class_logits for _ in range(2)]
        decoder, features = model.query_decoder.train(), model.backbone(images)[-1]
        drawn = [decoder(features) for _ in range(2)]
    assert torch.equal(*still) and not torch.equal(*drawn)


# --- no_object --------------------------------------------------------------------------------


def test_the_no_object_embedding_by_its_length_or_by_its_direction() -> None:
    torch.manual_seed(0)
    raw, cosine = Classifier(CLIP, raw_no_object=True), Classifier(CLIP)
    cosine.load_state_dict(raw.state_dict())
    query, names = torch.randn(3, CLIP), torch.randn(4, CLIP)
    with torch.no_grad():
        for module in (raw, cosine):
            module.no_object *= 3.7
        found, other = raw(query, names), cosine(query, names)
    for q in range(3):
        unit = query[q] / query[q].norm()
        for k in range(4):
            expected = 100 * float(unit @ names[k] / names[k].norm())
            assert found[q, k].item() == pytest.approx(expected, abs=1e-3)
        product = 100 * float(unit @ raw.no_object.detach())
        assert found[q, 4].item() == pytest.approx(product, abs=1e-3)
        expected = product / float(raw.no_object.detach().norm())
        assert other[q, 4].item() == pytest.approx(expected, abs=1e-3)
    assert torch.equal(found[:, :4], other[:, :4])


@pytest.mark.parametrize("kind", ["maskformer", "mask2former"])
def test_both_segmentors_take_the_choice(kind: str) -> None:
    for raw in (True, False):
        keys = f"zegformer.segmentor={kind}", f"zegformer.raw_no_object={raw}"
        model = build_zegformer(config(*keys), CLIP)
        assert model.classifier.raw_no_object is raw
        assert isinstance(model, MaskFormer if kind == "maskformer" else Segmentor)


def test_it_has_the_size_that_was_published() -> None:
    """R-50, FPN, 6 layers of width 256: 41 million with MaskFormer's 150 classes."""
    keys = """model.backbone=resnet50 model.width=256 model.mask_width=256 model.heads=8
        model.decoder_layers=6 model.decoder_ffn=2048 model.queries=100""".split()
    with torch.device("meta"):
        model = build_zegformer(load_config(None, keys), 512)
    assert sum(p.numel() for p in model.parameters()) / 1e6 == pytest.approx(41, abs=0.6)
