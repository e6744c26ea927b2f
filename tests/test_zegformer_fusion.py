"""The fusion of ZegFormer's branches against a naive loop, its limits, and what may be left out."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from concat_cli.methods.zegformer.predictor import (
    class_scores,
    distribution,
    fuse,
    highest_scores,
    image_probabilities,
    left_out,
)

CLASSES = 5
SEEN = {
    "some": torch.tensor([True, False, True, True, False]),
    "all": torch.ones(CLASSES, dtype=torch.bool),
    "none": torch.zeros(CLASSES, dtype=torch.bool),
}
RAW = 7.0  # a raw no_object logit is not bound by the scale of the cosines, here 5


def logits(seed=0, classes=CLASSES, no_object=None):
    """Class logits (2, 3, K+1) with cosines times 5, and image logits (2, 3, K)."""
    generator = torch.Generator().manual_seed(seed)
    by_segment = 5 * (2 * torch.rand(2, 3, classes + 1, generator=generator) - 1)
    if no_object is not None:
        by_segment[..., -1] = no_object
    return by_segment, 14 * (2 * torch.rand(2, 3, classes, generator=generator) - 1)


def naive_fusion(by_segment, by_image, seen, exponent):
    """Class by class with plain floats, as the paper writes it."""
    result = torch.zeros_like(by_segment)
    for b, q in ((b, q) for b in range(2) for q in range(3)):
        z, y = by_segment[b, q].double().tolist(), by_image[b, q].double().tolist()
        p = [math.exp(v) / sum(map(math.exp, z)) for v in z]
        y.append(z[-1])  # CLIP knows no no_object: the segment branch's
        image = [math.exp(v) / sum(map(math.exp, y)) for v in y]
        of_seen = [image[k] for k in range(len(seen)) if seen[k]]
        for k, is_seen in enumerate(seen.tolist()):
            if is_seen:
                average = sum(of_seen) / len(of_seen)
                result[b, q, k] = p[k] ** exponent * average ** (1 - exponent)
            else:
                result[b, q, k] = p[k] ** (1 - exponent) * image[k] ** exponent
        result[b, q, -1] = p[-1]
    return result


@pytest.mark.parametrize("seen", SEEN)
@pytest.mark.parametrize("exponent", [0.0, 1 / 3, 2 / 3, 1.0])
@pytest.mark.parametrize("no_object", [None, RAW])
def test_fusion_equals_a_naive_loop(seen, exponent, no_object):
    by_segment, by_image = logits(no_object=no_object)
    found = class_scores("fusion", by_segment, by_image, SEEN[seen], exponent)
    torch.testing.assert_close(found, naive_fusion(by_segment, by_image, SEEN[seen], exponent))


def test_by_hand():
    p = torch.tensor([0.5, 0.125, 0.375])
    image = torch.tensor([0.25, 0.125, 0.625])
    seen = torch.tensor([True, False])
    found = fuse(p, image, seen, 1 / 3)
    # seen: (1/2)^(1/3) (1/4)^(2/3) = 2^(-5/3); unseen: (1/8)^(2/3) (1/8)^(1/3) = 1/8
    assert found.tolist() == pytest.approx([2 ** (-5 / 3), 0.125, 0.375])


@pytest.mark.parametrize("seen", SEEN)
def test_the_exponents_limits(seen):
    by_segment, by_image = logits()
    member = SEEN[seen]
    p = by_segment.softmax(-1)
    image = image_probabilities(by_image, by_segment[..., -1:])
    average = image[..., :-1][..., member].mean(-1, keepdim=True) if member.any() else p[..., :1]
    one = class_scores("fusion", by_segment, by_image, member, 1.0)[..., :-1]
    torch.testing.assert_close(one, torch.where(member, p[..., :-1], image[..., :-1]))
    zero = class_scores("fusion", by_segment, by_image, member, 0.0)[..., :-1]
    torch.testing.assert_close(zero, torch.where(member, average.expand_as(one), p[..., :-1]))


@pytest.mark.parametrize("is_seen", [True, False])
def test_one_class(is_seen):
    by_segment, by_image = logits(classes=1)
    found = class_scores("fusion", by_segment, by_image, torch.tensor([is_seen]), 2 / 3)
    p = by_segment.softmax(-1)[..., 0]
    image = torch.sigmoid(by_image[..., 0] - by_segment[..., 1])
    way = p ** (2 / 3) * image ** (1 / 3) if is_seen else p ** (1 / 3) * image ** (2 / 3)
    torch.testing.assert_close(found[..., 0], way)


def test_clip_does_not_reorder_seen_classes():
    by_segment, by_image = logits()
    seen = SEEN["some"]
    found = class_scores("fusion", by_segment, by_image, seen, 2 / 3)[..., :-1][..., seen]
    assert torch.equal(found.argsort(-1), by_segment[..., :-1][..., seen].argsort(-1))


def test_single_branches():
    by_segment, by_image = logits()
    seen = SEEN["some"]
    alone = class_scores("segment", by_segment, None, seen, 2 / 3)
    assert torch.equal(alone, by_segment.softmax(-1))
    image = class_scores("image", by_segment, by_image, seen, 2 / 3)
    torch.testing.assert_close(image.sum(-1), torch.ones(2, 3))
    torch.testing.assert_close(image[..., :-1] / image[..., -1:],
                               (by_image - by_segment[..., -1:]).exp())  # fmt: skip


@pytest.mark.parametrize("branch", ["image", "fusion"])
def test_a_query_that_was_not_sent_is_of_no_class(branch):
    by_segment, by_image = logits()
    by_image[1, 2] = -torch.inf
    found = class_scores(branch, by_segment, by_image, SEEN["some"], 2 / 3)
    assert found.isfinite().all() and not found[1, 2, :-1].any() and found[1, 2, -1] > 0
    assert not distribution(found, SEEN["some"], 0.0)[1, 2, :-1].any()


@pytest.mark.parametrize("branch", ["image", "fusion"])
@settings(max_examples=60, deadline=None)
@given(
    seed=st.integers(0, 10_000),
    exponent=st.floats(0, 1),
    no_object=st.floats(-10, 40),
    seen=st.sampled_from(sorted(SEEN)),
)
def test_whatever_clip_says_stays_below_the_bound(branch, seed, exponent, no_object, seen):
    by_segment, by_image = logits(seed, no_object=no_object)  # within CLIP's scale of 14
    bound = highest_scores(branch, by_segment, SEEN[seen], exponent, 14.0)
    for said in (by_image, torch.full_like(by_image, 14.0), by_image.sign() * 14):
        found = class_scores(branch, by_segment, said, SEEN[seen], exponent)
        assert (found[..., :-1].amax(-1) <= bound * (1 + 1e-5)).all()


def test_being_sure_of_no_object_is_no_reason_to_leave_a_query_out():
    """p(no_object) = 0.999, and yet the fusion can make a tenth of an unseen class."""
    by_segment = torch.tensor([[[math.log(1e-3), -30.0, math.log(0.999)]]])
    seen = torch.tensor([False, True])
    said = torch.tensor([[[14.0, -14.0]]])
    assert class_scores("fusion", by_segment, said, seen, 2 / 3)[0, 0, 0] > 0.09
    assert highest_scores("fusion", by_segment, seen, 2 / 3, 14.0)[0, 0] > 0.09


@settings(max_examples=60, deadline=None)
@given(seed=st.integers(0, 10_000), limit=st.floats(0, 2))
def test_as_many_queries_are_left_out_as_the_limit_allows(seed, limit):
    bounds = torch.rand(3, 6, generator=torch.Generator().manual_seed(seed)) ** 4
    out = left_out(bounds, limit)
    for row, chosen in zip(bounds, out, strict=True):
        assert row[chosen].sum() <= limit * (1 + 1e-5)
        if not chosen.all():
            assert row[~chosen].min() >= row[chosen].max() if chosen.any() else True
            assert row[chosen].sum() + row[~chosen].min() > limit * (1 - 1e-5)


def test_probabilities_add_up_and_keep_their_order():
    by_segment, by_image = logits()
    seen = SEEN["some"]
    scores = class_scores("fusion", by_segment, by_image, seen, 2 / 3)
    found = distribution(scores, seen, 0.0)
    torch.testing.assert_close(found.sum(-1), torch.ones(2, 3))
    assert torch.equal(found[..., :-1].argsort(-1), scores[..., :-1].argsort(-1))
    assert torch.equal(found[..., -1], by_segment.softmax(-1)[..., -1])
    for branch in ("segment", "image"):  # these are distributions already
        own = class_scores(branch, by_segment, by_image, seen, 2 / 3)
        torch.testing.assert_close(distribution(own, seen, 0.0), own)


def test_the_offset_is_taken_off_seen_classes_only():
    by_segment, _ = logits()
    seen = SEEN["some"]
    p = by_segment.softmax(-1)
    found = distribution(p, seen, 0.1)
    torch.testing.assert_close(found[..., :-1][..., ~seen], p[..., :-1][..., ~seen])
    torch.testing.assert_close(found[..., :-1][..., seen], (p[..., :-1][..., seen] - 0.1).relu())
    assert torch.equal(found[..., -1], p[..., -1])
