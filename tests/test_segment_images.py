"""What CLIP is shown of predicted segments, against naive loops; batches and shared views."""

from __future__ import annotations

import math

import pytest
import torch
import torch.nn.functional as F
from clip_helpers import random_clip

from concat_cli.core.infer.crops import (
    binary_masks,
    encode_alike,
    encode_segments,
    peaks,
    segment_images,
    tight_boxes,
)

SIZE = (32, 64)  # of the padded input
VALID = [(32, 64), (23, 41)]
CROPS = ("crop", "mask", "cropmask")


@pytest.fixture(scope="module")
def clip(tmp_path_factory):
    return random_clip(tmp_path_factory.mktemp("clip"))


@pytest.fixture
def batch():
    """Two images, five queries each; those of `EMPTY` have no pixel."""
    generator = torch.Generator().manual_seed(0)
    images = torch.randint(0, 256, (2, 3, *SIZE), generator=generator, dtype=torch.uint8)
    logits = torch.full((2, 5, 8, 16), -6.0)
    logits[0, 0, 2:5, 3:9] = 4
    logits[0, 1] = 3 * torch.randn(8, 16, generator=generator)
    logits[0, 2, 1, 14] = 5
    logits[1, 0, :4, :4] = 2
    logits[1, 1] = 3 * torch.randn(8, 16, generator=generator)
    logits[1, 2, 6:, 12:] = 9  # in the padding
    return images, logits


EMPTY = {(0, 3), (0, 4), (1, 2), (1, 3), (1, 4)}
ALL = torch.tensor([(b, q) for b in range(2) for q in range(5)])


def naive_mask(logits, valid):
    """The published way for one mask."""
    mask = F.interpolate(logits[None, None], SIZE, mode="bilinear")[0, 0].sigmoid() > 0.5
    mask[valid[0] :] = False
    mask[:, valid[1] :] = False
    return mask


def naive_view(image, mask, valid, size, crop):
    """Averages of bilinear samples in the cells of the box, of one normalised image."""
    y0, x0, y1, x1 = 0, 0, *valid
    if crop != "mask" and mask.any():
        rows, columns = torch.where(mask)
        y0, y1 = int(rows.min()), int(rows.max()) + 1
        x0, x1 = int(columns.min()), int(columns.max()) + 1
    shown = image if crop == "crop" else image * mask
    down, across = (max(1, math.ceil((b - a) / size)) for a, b in ((y0, y1), (x0, x1)))
    y = y0 + (torch.arange(size * down) + 0.5) * (y1 - y0) / (size * down)
    x = x0 + (torch.arange(size * across) + 0.5) * (x1 - x0) / (size * across)
    places = torch.meshgrid(2 * x / SIZE[1] - 1, 2 * y / SIZE[0] - 1, indexing="xy")
    grid = torch.stack(places, -1)[None]
    sampled = F.grid_sample(shown[None], grid, padding_mode="border", align_corners=False)
    return F.avg_pool2d(sampled, (down, across))[0]


def test_masks_are_binary_at_a_half_and_inside_the_picture(batch):
    _, logits = batch
    image, query = ALL.unbind(1)
    masks = binary_masks(logits[image, query], SIZE, torch.tensor(VALID)[image])
    for (b, q), mask in zip(ALL.tolist(), masks, strict=True):
        assert torch.equal(mask, naive_mask(logits[b, q], VALID[b]))
        assert mask.any() == ((b, q) not in EMPTY)


def test_tight_boxes():
    masks = torch.zeros(3, 10, 12, dtype=torch.bool)
    masks[0, 2:4, 1:9] = True
    masks[1, 9, 11] = True
    whole = torch.tensor([[0.0, 0, 7, 6]]).expand(3, 4)
    assert tight_boxes(masks, whole).tolist() == [[1, 2, 9, 4], [11, 9, 12, 10], [0, 0, 7, 6]]


@pytest.mark.parametrize("crop", CROPS)
def test_views_equal_a_naive_loop(batch, crop):
    images, logits = batch
    values = images.float() / 255 - 0.5
    image, query = ALL.unbind(1)
    valid = torch.tensor(VALID)[image]
    masks = binary_masks(logits[image, query], SIZE, valid)
    views = segment_images(values, image, masks, valid, 16, crop)
    for (b, _), mask, view in zip(ALL.tolist(), masks, views, strict=True):
        expected = naive_view(values[b], mask, VALID[b], 16, crop)
        torch.testing.assert_close(view, expected, atol=2e-5, rtol=1e-4)


def test_only_crop_shows_what_lies_around_a_segment(batch):
    images, logits = batch
    mask = binary_masks(logits[0, :1], SIZE, torch.tensor(VALID[:1]))
    other = torch.where(mask[:, None], images[:1], 255 - images[:1])
    for crop in CROPS:
        seen = [
            segment_images(
                x[:1].float() - 128, torch.tensor([0]), mask, torch.tensor(VALID[:1]), 16, crop
            )
            for x in (images, other)
        ]
        assert torch.equal(*seen) == (crop != "crop")


@pytest.mark.parametrize("crop", CROPS)
def test_batches_and_shared_views_change_nothing(clip, batch, crop, monkeypatch):
    images, logits = batch
    naive = [
        encode_segments(clip, images[b : b + 1], logits[b : b + 1], VALID[b : b + 1],
                        torch.tensor([[0, q]]), crop)
        for b, q in ALL.tolist()
    ]  # fmt: skip
    pieces = encode_segments(clip, images, logits, VALID, ALL, crop, at_most=3)
    torch.testing.assert_close(pieces, torch.cat(naive), atol=1e-5, rtol=1e-4)
    encode, sizes = clip.encode_normalised, []
    monkeypatch.setattr(
        clip, "encode_normalised", lambda views: (sizes.append(len(views)), encode(views))[1]
    )
    alike = encode_alike(clip, images, logits, VALID, ALL, crop)
    torch.testing.assert_close(alike, pieces, atol=1e-5, rtol=1e-4)
    assert sizes == [len(ALL) - 3]  # five empty masks, two views
    some = torch.tensor([[1, 4], [0, 0], [1, 3]])
    torch.testing.assert_close(
        encode_alike(clip, images, logits, VALID, some, crop), pieces[[9, 0, 8]],
        atol=1e-5, rtol=1e-4,
    )  # fmt: skip
    assert sizes[1:] == [2]
    assert encode_alike(clip, images, logits, VALID, ALL[:0], crop).shape == (0, clip.embed_dim)


@pytest.mark.parametrize("seed", range(5))
def test_no_pixel_of_a_picture_rises_above_the_peak(seed):
    generator = torch.Generator().manual_seed(seed)
    logits = torch.randn(4, 3, 8, 16, generator=generator)
    valid = [(int(h), int(w)) for h, w in torch.randint(1, 32, (4, 2), generator=generator)]
    found = peaks(logits, valid)
    large = F.interpolate(logits, SIZE, mode="bilinear")
    for b, (height, width) in enumerate(valid):
        inside = large[b, :, :height, :width].amax((1, 2))
        assert (inside <= found[b]).all()
        beyond = logits[b].clone()
        beyond[:, -(-height // 4) + 1 :] = beyond[:, :, -(-width // 4) + 1 :] = 99
        assert torch.equal(peaks(beyond[None], valid[b : b + 1])[0], found[b])
