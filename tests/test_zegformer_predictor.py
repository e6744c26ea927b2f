"""ZegFormer's predictor: its branches against the published way, what CLIP is spared, offsets."""

from __future__ import annotations

import math
from dataclasses import replace

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from clip_helpers import random_clip
from torch import nn

from concat_cli.core.build import build_segmentor
from concat_cli.core.config import InferConfig, ModelConfig
from concat_cli.core.data.transforms import resize_short
from concat_cli.core.infer.crops import encode_segments
from concat_cli.core.infer.predictor import Predictor
from concat_cli.core.model.segmentor import QueryOutput
from concat_cli.core.vocabulary import ClassEntry, Vocabulary
from concat_cli.methods.zegformer.config import ZegFormerConfig
from concat_cli.methods.zegformer.predictor import (
    ZegFormerPredictor,
    class_scores,
)

VOCABULARY = Vocabulary(
    (
        ClassEntry("solid star", 1),
        ClassEntry("dotted star", 2, seen=False),
        ClassEntry("red brick", 3, kind="stuff"),
        ClassEntry("striped heart", 4, seen=False),
    )
)
MODEL = ModelConfig(width=32, mask_width=32, heads=4, encoder_ffn=32, decoder_layers=1,
                    decoder_ffn=32, queries=6)  # fmt: skip
CFG = InferConfig(size=64, max_size=128, min_score=0.05, overlap=0.1, batch=3)
SIZES = [(64, 64), (70, 61), (64, 64)]


class Planted(nn.Module):
    """Says what was planted for an image, whose number its first pixel holds."""

    def __init__(self, class_logits, mask_logits):
        super().__init__()
        self.class_logits, self.mask_logits = class_logits, mask_logits

    def forward(self, images, padding, text, last_only):
        which = images[:, 0, 0, 0].long()
        nothing = torch.zeros(1, len(which), 1, 1)
        return QueryOutput(
            nothing, nothing, self.class_logits[which][None], self.mask_logits[which][None]
        )


@pytest.fixture(scope="module")
def clip(tmp_path_factory):
    return random_clip(tmp_path_factory.mktemp("clip"))


@pytest.fixture(scope="module")
def texts():
    torch.manual_seed(0)
    return F.normalize(torch.randn(2, len(VOCABULARY), 16), dim=-1)


@pytest.fixture(scope="module")
def segmentor():
    torch.manual_seed(0)
    return build_segmentor(MODEL, 16).eval()


@pytest.fixture
def make(clip, texts):
    def build(model, vocabulary=VOCABULARY, infer=CFG, **keys):
        way = ZegFormerConfig(**keys)
        own = {"way": way, "clip": clip, "image_text": texts[1]}
        return ZegFormerPredictor(model, texts[0], vocabulary, infer, **own)

    return build


def pictures():
    rng = np.random.default_rng(0)
    return [rng.integers(0, 256, (h, w, 3), dtype=np.uint8) for h, w in SIZES]


def planted(queries=6, seed=0):
    """Four numbered pictures of 64x64; of each the last two queries are empty, the two before them
    are surely no object."""
    generator = torch.Generator().manual_seed(seed)
    classes = 4 * torch.randn(4, queries, len(VOCABULARY) + 1, generator=generator)
    masks = 3 * torch.randn(4, queries, 16, 16, generator=generator)
    masks[:, -2:] = -30 + torch.rand(4, 2, 16, 16, generator=generator)
    classes[:, -4:-2, -1] = 60
    images = pictures()[:1] * 4
    images = [image.copy() for image in images]
    for number, image in enumerate(images):
        image[0, 0] = number
    return Planted(classes, masks), images


def pixel_scores(predictor, raw):
    """(B, K, H, W) of the padded input."""
    masks = F.interpolate(raw.mask_logits, scale_factor=4, mode="bilinear").sigmoid()
    return torch.einsum("bqk,bqhw->bkhw", predictor.scores(raw)[..., :-1], masks)


def naive_scores(segmentor, clip, texts, image, branch, crop):
    """(K, H, W) of one photo: every query alone is shown to CLIP."""
    base = Predictor(segmentor, texts[0], VOCABULARY, CFG)
    (alone,) = base.raw([image])
    resized = resize_short(image, CFG.size, CFG.max_size)
    (height, width), valid = resized.shape[:2], alone.valid
    shown = torch.zeros(1, 3, -(-height // 32) * 32, -(-width // 32) * 32, dtype=torch.uint8)
    shown[0, :, :height, :width] = torch.tensor(resized).permute(2, 0, 1)
    said = [
        encode_segments(clip, shown, alone.mask_logits, valid, torch.tensor([[0, query]]), crop)
        for query in range(MODEL.queries)
    ]
    logits = clip.logit_scale * torch.cat(said) @ texts[1].T
    scores = class_scores(branch, alone.class_logits, logits[None], base.is_seen, 2 / 3)
    masks = F.interpolate(alone.mask_logits, scale_factor=4, mode="bilinear")
    masks = F.interpolate(masks[..., :height, :width], image.shape[:2], mode="bilinear").sigmoid()
    return torch.einsum("qk,qhw->khw", scores[0, :, :-1], masks[0])


@pytest.mark.parametrize(
    ("branch", "crop"),
    [
        ("segment", "crop"),
        ("image", "crop"),
        ("image", "mask"),
        ("image", "cropmask"),
        ("fusion", "cropmask"),
    ],
)
def test_branches_equal_the_published_way(make, segmentor, clip, texts, branch, crop):
    predictor = make(segmentor, branch=branch, crop=crop)
    images, tried = pictures(), 0
    for raw in predictor.raw(images):
        for position, found in zip(raw.positions, predictor.semantic(raw, 0.02), strict=True):
            expected = naive_scores(segmentor, clip, texts, images[position], branch, crop)
            expected -= 0.02 * torch.tensor(VOCABULARY.is_seen)[:, None, None]
            best, second = expected.topk(2, dim=0).values
            clear = (best - second > 2e-3).numpy()  # what is left out changes sums by 1e-3
            assert clear.mean() > 0.8
            assert (found == expected.argmax(0).numpy())[clear].all()
            tried += 1
    assert tried == len(images)


def test_clip_is_not_asked_where_it_cannot_matter(make):
    model, images = planted()
    (some,), (every,) = (
        list(make(model, infer=replace(CFG, batch=4), skip_below=skip).raw(images))
        for skip in (1e-3, 0.0)
    )
    predictor = make(model)
    sent = some.image_logits.isfinite().all(-1)
    assert torch.equal(sent, predictor.sent(some))
    assert torch.equal(sent, torch.tensor([True, True, False, False, False, False]).expand(4, 6))
    assert every.image_logits.isfinite().all()
    torch.testing.assert_close(some.image_logits[sent], every.image_logits[sent])
    difference = pixel_scores(predictor, some) - pixel_scores(predictor, every)
    assert difference.abs().max() < 1e-3


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize("branch", ["image", "fusion"])
def test_queries_left_out_change_pixels_by_less_than_the_limit(make, seed, branch):
    """Also where masks are faint and CLIP could matter a little."""
    model, images = planted(12, seed)
    model.mask_logits[:, 4:8] -= 12
    limit = 0.2
    (some,), (every,) = (
        list(make(model, infer=replace(CFG, batch=4), branch=branch, skip_below=skip).raw(images))
        for skip in (limit, 0.0)
    )
    predictor = make(model, branch=branch)
    assert 0 < some.image_logits.isfinite().all(-1).sum() < 4 * 8
    difference = pixel_scores(predictor, some) - pixel_scores(predictor, every)
    assert 0 < difference.abs().max() < limit


def test_a_batch_equals_single_pictures(make, segmentor):
    predictor = make(segmentor)
    together = predictor.predict_batch(pictures())
    assert any(found.segments for found in together)
    for image, found in zip(pictures(), together, strict=True):
        alone = predictor(image)
        assert (alone.semantic_map != found.semantic_map).mean() < 0.01
        assert alone.names == found.names


def test_the_segment_branch_needs_no_clip(segmentor, texts):
    way = ZegFormerConfig(branch="segment")
    predictor = ZegFormerPredictor(segmentor, texts[0], VOCABULARY, CFG, way=way)
    plain = Predictor(segmentor, texts[0], VOCABULARY, CFG)
    assert not predictor.needs_clip_image
    for mine, theirs in zip(predictor.raw(pictures()), plain.raw(pictures()), strict=True):
        assert mine.image_logits is None
        torch.testing.assert_close(
            predictor.probabilities(mine, 0.0), plain.probabilities(theirs, 0.0)
        )
        for a, b in zip(predictor.semantic(mine), plain.semantic(theirs), strict=True):
            assert (a == b).all()


def test_the_other_branches_need_clip(segmentor, texts):
    with pytest.raises(AssertionError):
        ZegFormerPredictor(segmentor, texts[0], VOCABULARY, CFG, way=ZegFormerConfig())


@pytest.mark.parametrize("is_seen", [False, True])
def test_a_free_vocabulary(make, segmentor, is_seen):
    """Names of which none, or each, was trained on."""
    entries = tuple(replace(entry, seen=is_seen) for entry in VOCABULARY.entries)
    predictor = make(segmentor, Vocabulary(entries))
    for raw in predictor.raw(pictures()):
        found = predictor.scores(raw)
        assert found.isfinite().all()
        p = raw.class_logits.softmax(-1)
        if is_seen:  # CLIP says how much there is of all of them
            torch.testing.assert_close(
                found[..., 0] / found[..., 1], (p[..., 0] / p[..., 1]) ** (2 / 3), rtol=1e-3, atol=0
            )
        assert all(m.max() < len(entries) for m in predictor.semantic(raw))


def two_segments():
    """One picture, its left half seen class 0, its right half class 0 or unseen class 1."""
    classes = torch.tensor([[[9.0, -9, -9, -9, -9], [1.5, 1.0, -9, -9, -9]]])
    masks = torch.full((1, 2, 16, 16), 20.0)
    masks[0, 0, :, 8:] = masks[0, 1, :, :8] = -20
    image = np.zeros((64, 64, 3), np.uint8)
    return Planted(classes, masks), image


def test_the_offset_is_taken_off_scores(make):
    """On the right, p = 0.62 and 0.38: 0.24 apart."""
    model, image = two_segments()
    predictor = make(model, branch="segment")
    (raw,) = predictor.raw([image])
    for offset, right in ((0.0, 0), (0.2, 0), (0.3, 1), (0.6, 1)):
        (semantic,) = predictor.semantic(raw, offset)
        assert (semantic[:, 40:] == right).all() and (semantic[:, :24] == 0).all()
        (panoptic,) = predictor.panoptic(raw, offset)
        labels = [segment.class_index for segment in panoptic.segments]
        assert labels == [0, right]
        (things,) = predictor.instances(raw, offset)
        assert things[0].class_index == 0 and things[0].score == pytest.approx(1 - offset, abs=0.01)
    own = make(model, branch="segment", infer=replace(CFG, seen_offset=0.3))
    assert (own.semantic(raw)[0] == predictor.semantic(raw, 0.3)[0]).all()
    assert own.panoptic(raw)[0].segments[1].class_index == 1
    assert own.offset_scale == 1


def test_one_mask_a_class_gives_semantic_maps(make):
    """Two queries of one class are one segment; a score is the mean share of its pixels."""
    model, image = two_segments()
    apart = make(model, branch="segment", targets="segment").predict_batch([image])[0]
    assert apart.is_panoptic and [s.area for s in apart.segments] == [2048, 2048]
    predictor = make(model, branch="segment", targets="category")
    assert predictor.tasks == ("semantic",)
    found = predictor.predict_batch([image])[0]
    assert not found.is_panoptic and (found.panoptic_map == found.semantic_map + 1).all()
    (segment,) = found.segments
    assert (segment.class_index, segment.area) == (0, 4096)
    right = 1 / (1 + math.exp(-0.5))  # of classes whose logits are 0.5 apart
    assert segment.score == pytest.approx((1 + right) / 2, abs=0.02)
    calibrated = make(
        model, targets="category", branch="segment", infer=replace(CFG, seen_offset=0.3)
    )
    found = calibrated.predict_batch([image])[0]
    assert [(s.class_index, s.area) for s in found.segments] == [(0, 2048), (1, 2048)]


def test_seen_segments_pass_the_thresholds_of_panoptic_inference(make):
    """The fusion's own scores of seen classes are at most (number of seen classes)^(-1/3)."""
    model, image = two_segments()
    predictor = make(model, infer=replace(CFG, min_score=0.8))
    (raw,) = predictor.raw([image])
    assert predictor.scores(raw)[0, 0, 0] < 0.8 < predictor.probabilities(raw, 0.0)[0, 0, 0]
    assert predictor.panoptic(raw)[0].segments[0].class_index == 0


def test_clip_text_of_the_image_branch_is_its_own(make, clip, texts, segmentor):
    own = {"way": ZegFormerConfig(), "clip": clip, "image_text": texts[1].flip(0)}
    other = ZegFormerPredictor(segmentor, texts[0], VOCABULARY, CFG, **own)
    for a, b in zip(make(segmentor).raw(pictures()), other.raw(pictures()), strict=True):
        assert torch.equal(a.class_logits, b.class_logits)
        torch.testing.assert_close(a.image_logits, b.image_logits.flip(-1))
