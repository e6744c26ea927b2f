"""Post-processing against Mask2Former's published algorithm, one query after another."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch.nn import functional as F

from concat_cli.core.config import InferConfig
from concat_cli.core.evaluate.quality import overlaps
from concat_cli.core.infer import postprocess
from concat_cli.core.infer.postprocess import calibrated, panoptic, semantic

K = 5
IS_THING = torch.tensor([True, False, True, False, True])
SEEN = torch.tensor([True, True, False, False, True])


def naive_masks(mask_logits, size, valid):
    padded = [4 * side for side in mask_logits.shape[-2:]]
    masks = F.interpolate(mask_logits[None], padded, mode="bilinear", align_corners=False)
    masks = masks[..., : valid[0], : valid[1]]
    return F.interpolate(masks, size, mode="bilinear", align_corners=False)[0].sigmoid()


def naive_panoptic(class_logits, mask_logits, size, valid, cfg):
    """The published loop; returns (map, [(class, best score)])."""
    logits = class_logits.clone()
    logits[:, :K][:, SEEN] -= cfg.seen_offset
    scores, labels = logits.softmax(-1).max(-1)
    keep = labels.ne(K) & (scores > cfg.min_score)
    scores, labels = scores[keep], labels[keep]
    panoptic_map, segments, stuff = np.zeros(size, int), [], {}
    if not len(scores):
        return panoptic_map, segments
    masks = naive_masks(mask_logits, size, valid)[keep]
    winner = (scores[:, None, None] * masks).argmax(0)
    for k in range(len(scores)):
        label = int(labels[k])
        one = [k]
        if cfg.joint_stuff and not IS_THING[label]:
            one = [i for i in range(len(labels)) if labels[i] == label]
        claimed = sum(int((winner == i).sum()) for i in one)
        own = int((masks[one] >= cfg.min_mask).any(0).sum())
        mask = ((winner == k) & (masks[k] >= cfg.min_mask)).numpy()
        if not (claimed and own and mask.any()) or claimed / own < cfg.overlap:
            continue
        if not IS_THING[label] and label in stuff:
            panoptic_map[mask] = stuff[label]
            old = segments[stuff[label] - 1]
            segments[stuff[label] - 1] = (label, max(old[1], float(scores[k])))
            continue
        segments.append((label, float(scores[k])))
        if not IS_THING[label]:
            stuff[label] = len(segments)
        panoptic_map[mask] = len(segments)
    return panoptic_map, segments


def random_outputs(seed, b=4, q=9, h=8, w=8):
    """Smooth random masks and peaky classes: plenty of overlaps, merges and drops."""
    generator = torch.Generator().manual_seed(seed)
    masks = torch.randn(b, q, 3, 3, generator=generator) * 6 - 2
    masks = F.interpolate(masks, (h, w), mode="bicubic")
    return torch.randn(b, q, K + 1, generator=generator) * 4, masks


def probabilities(class_logits, offset=0.0):
    return calibrated(class_logits, SEEN, offset).softmax(-1)


@pytest.mark.parametrize("seed", range(12))
@pytest.mark.parametrize("joint", [False, True])
@pytest.mark.parametrize("budget", [postprocess.BUDGET, 3000])
def test_equals_the_published_loop(seed, budget, joint, monkeypatch):
    monkeypatch.setattr(postprocess, "ON_CPU", budget)  # also in strips of a few rows
    class_logits, mask_logits = random_outputs(seed)
    sizes, valid = [(32, 32), (45, 70), (32, 32), (3, 90)], [(32, 32), (20, 32), (32, 32), (1, 32)]
    offset = float(seed % 3)
    cfg = InferConfig(min_score=0.3, overlap=0.6, joint_stuff=joint, seen_offset=offset)
    likely = probabilities(class_logits, cfg.seen_offset)
    results = panoptic(likely, mask_logits, sizes, IS_THING, cfg, valid)
    for i, result in enumerate(results):
        expected, segments = naive_panoptic(
            class_logits[i], mask_logits[i], sizes[i], valid[i], cfg
        )
        assert (result.panoptic_map != expected).mean() < 1e-3  # ties of rounding at most
        assert [s.class_index for s in result.segments] == [label for label, _ in segments]
        np.testing.assert_allclose(
            [s.score for s in result.segments], [score for _, score in segments], rtol=1e-5
        )


def test_queries_that_share_a_stuff_region_lose_it_unless_they_count_as_one():
    for label in range(K):
        likely = torch.zeros(1, 2, K + 1)
        likely[..., label], likely[..., K] = 0.9, 0.1
        masks = torch.full((1, 2, 8, 8), 6.0)
        masks[:, 0, 4:], masks[:, 1, :4] = 5.0, 5.0  # both cover all, each wins half of it
        for joint, segments in ((False, 0), (True, int(not IS_THING[label]))):
            cfg = InferConfig(joint_stuff=joint)
            (found,) = panoptic(likely, masks, [(32, 32)], IS_THING, cfg)
            assert len(found.segments) == segments
            assert (found.panoptic_map > 0).all() == bool(segments)


def test_segments_describe_their_map():
    found = 0
    for seed in range(4):
        class_logits, mask_logits = random_outputs(seed)
        cfg = InferConfig(min_score=0.2, overlap=0.3)
        for result in panoptic(
            probabilities(class_logits), mask_logits, [(37, 50)] * 4, IS_THING, cfg
        ):
            ids = [s.id for s in result.segments]
            assert ids == list(range(1, len(ids) + 1))
            assert set(np.unique(result.panoptic_map)) - {0} == set(ids)
            for segment in result.segments:
                y, x = np.nonzero(result.panoptic_map == segment.id)
                assert segment.area == len(y)
                box = (x.min(), y.min(), np.ptp(x) + 1, np.ptp(y) + 1)
                assert segment.bbox == tuple(int(v) for v in box)
                found += 1
    assert found > 10


def test_no_confident_query_gives_an_empty_map():
    class_logits = torch.zeros(2, 3, K + 1)
    class_logits[..., K] = 9
    masks = torch.ones(2, 3, 8, 8)
    for result in panoptic(class_logits.softmax(-1), masks, [(5, 6)] * 2, IS_THING, InferConfig()):
        assert result.segments == () and result.panoptic_map.shape == (5, 6)
        assert not result.panoptic_map.any()


def test_stuff_of_one_class_is_merged_and_things_are_not():
    class_logits = torch.full((1, 4, K + 1), -9.0)
    class_logits[0, [0, 1], 1] = torch.tensor([1.0, 9.0])  # stuff, twice
    class_logits[0, [2, 3], 2] = 9.0  # a thing, twice
    mask_logits = torch.full((1, 4, 8, 8), -9.0)
    for q in range(4):
        mask_logits[0, q, :, 2 * q : 2 * q + 2] = 9.0
    likely = probabilities(class_logits)
    (result,) = panoptic(likely, mask_logits, [(32, 32)], IS_THING, InferConfig())
    assert [s.class_index for s in result.segments] == [1, 2, 2]
    assert result.segments[0].area > 1.5 * result.segments[1].area
    assert result.segments[0].score > 0.99  # of the better query


def test_seen_offset_moves_the_choice_to_unseen_classes():
    class_logits = torch.full((1, 1, K + 1), -9.0)
    class_logits[0, 0, 0], class_logits[0, 0, 2] = 2.0, 1.0
    mask_logits = torch.ones(1, 1, 8, 8)
    chosen = [
        panoptic(
            probabilities(class_logits, offset), mask_logits, [(8, 8)], IS_THING, InferConfig()
        )
        for offset in (0.0, 2.0)
    ]
    assert [found[0].segments[0].class_index for found in chosen] == [0, 2]


@pytest.mark.parametrize("budget", [postprocess.BUDGET, 3000])
def test_semantic_equals_the_formula(budget, monkeypatch):
    monkeypatch.setattr(postprocess, "ON_CPU", budget)
    class_logits, mask_logits = random_outputs(5)
    sizes, valid = [(32, 32), (45, 70), (32, 32), (3, 90)], [(32, 32), (20, 32), (32, 32), (1, 32)]
    taken_off = torch.linspace(0, 0.4, K)
    maps = semantic(class_logits.softmax(-1), mask_logits, sizes, valid, taken_off)
    for i, found in enumerate(maps):
        masks = naive_masks(mask_logits[i], sizes[i], valid[i])
        scores = torch.einsum("qc,qhw->chw", class_logits[i].softmax(-1)[:, :-1], masks)
        scores -= taken_off[:, None, None]
        assert found.shape == sizes[i]
        assert (found != scores.argmax(0).numpy()).mean() < 1e-3


def test_overlaps_counts_every_pixel():
    truth, pred = np.array([[0, 1, 1], [2, 2, 0]]), np.array([[1, 1, 0], [1, 0, 0]])
    assert overlaps(truth, pred, 2, 1).tolist() == [[1, 1], [1, 1], [1, 1]]
