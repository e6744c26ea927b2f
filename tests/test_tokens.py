"""CLS tokens: masked crops against a loop over segments, padding, and the cache on disk."""

from __future__ import annotations

import math

import pytest
import torch
import torch.nn.functional as F
from clip_helpers import random_clip
from mini import Heard

from concat_cli.core.clip.tokens import (
    TokenCache,
    gather_masks,
    image_tokens,
    masked_crops,
    segment_keys,
    segment_tokens,
    square_boxes,
    view_keys,
)
from concat_cli.core.errors import UserError


@pytest.fixture(scope="module")
def clip(tmp_path_factory):
    return random_clip(tmp_path_factory.mktemp("clip"))


@pytest.fixture
def batch():
    """Two images of two segments; segment maps with straight and ragged borders."""
    generator = torch.Generator().manual_seed(0)
    images = torch.randint(0, 256, (2, 3, 48, 64), generator=generator, dtype=torch.uint8)
    segment_map = torch.zeros(2, 48, 64, dtype=torch.int32)
    segment_map[0, 5:25, 10:30] = 1
    segment_map[0, 30:48, 40:64] = 2
    segment_map[1, :, :20] = 1
    segment_map[1, 8:40, 24:60] = 2 * (torch.rand(32, 36, generator=generator) > 0.3).int()
    select = torch.tensor([[0, 0], [0, 1], [1, 1], [1, 0]])
    return images, segment_map, select


def masks_of(segment_map):
    return torch.stack([segment_map == n for n in (1, 2)], 1)


def naive_crop(image, mask, size):
    """Cut the square out by hand, then average each output pixel's bilinear samples."""
    rows, columns = torch.where(mask)
    x0, x1 = int(columns.min()), int(columns.max()) + 1
    y0, y1 = int(rows.min()), int(rows.max()) + 1
    side = max(x1 - x0, y1 - y0)
    left, top = (x0 + x1) / 2 - side / 2, (y0 + y1) / 2 - side / 2
    per = max(math.ceil(side / size), 1)  # samples along an output pixel's side
    at = (torch.arange(size * per) + 0.5) * side / (size * per)
    height, width = mask.shape
    margin = side + 2
    wide = F.pad(image * mask, (margin,) * 4)
    full_h, full_w = height + 2 * margin, width + 2 * margin
    x = 2 * (left + at + margin) / full_w - 1
    y = 2 * (top + at + margin) / full_h - 1
    grid = torch.stack(torch.meshgrid(x, y, indexing="xy"), -1)[None]
    sampled = F.grid_sample(wide[None], grid, mode="bilinear", align_corners=False)
    return F.avg_pool2d(sampled, per)[0]


def test_masked_crops_equal_a_naive_loop(batch):
    images, segment_map, select = batch
    values = images.float() / 255 - 0.5
    masks = gather_masks(segment_map, select)
    crops = masked_crops(values[select[:, 0]], masks, 32)
    for crop, (b, _), mask in zip(crops, select.tolist(), masks, strict=True):
        torch.testing.assert_close(crop, naive_crop(values[b], mask, 32), atol=2e-5, rtol=1e-4)


def test_masked_crop_of_a_whole_image_is_the_image():
    image = torch.rand(1, 3, 32, 32)
    crop = masked_crops(image, torch.ones(1, 32, 32, dtype=torch.bool), 32)
    torch.testing.assert_close(crop, image)


def test_what_lies_outside_the_mask_does_not_matter(clip, batch):
    images, segment_map, select = batch
    changed = images.clone()
    changed[:, :, segment_map[0] != 1] = 7
    first = select[:1]
    same = segment_tokens(clip, changed, segment_map, first)
    torch.testing.assert_close(same, segment_tokens(clip, images, segment_map, first))


def test_square_boxes():
    masks = torch.zeros(3, 10, 12, dtype=torch.bool)
    masks[0, 2:4, 1:9] = True  # 8 wide, 2 high
    masks[1, 9, 11] = True
    expected = [[1, -1, 9, 7], [11, 9, 12, 10]]
    assert square_boxes(masks)[:2].tolist() == expected
    assert (square_boxes(masks)[2, 2:] - square_boxes(masks)[2, :2]).tolist() == [1, 1]  # empty


def test_masks_may_be_a_tensor_or_a_segment_map(batch):
    _, segment_map, select = batch
    masks = masks_of(segment_map)
    expected = torch.stack([masks[b, n] for b, n in select.tolist()])
    for form in (masks, segment_map):
        assert torch.equal(gather_masks(form, select), expected)


def test_segment_tokens_in_pieces_equal_all_at_once(clip, batch, monkeypatch):
    images, segment_map, select = batch
    whole = segment_tokens(clip, images, segment_map, select)
    monkeypatch.setattr("concat_cli.core.clip.tokens._PIXELS", 48 * 64)
    pieces = segment_tokens(clip, images, masks_of(segment_map), select)
    torch.testing.assert_close(pieces, whole, atol=1e-5, rtol=1e-5)
    assert whole.shape == (4, clip.embed_dim)
    torch.testing.assert_close(whole.norm(dim=1), torch.ones(4))
    assert segment_tokens(clip, images, segment_map, select[:0]).shape == (0, clip.embed_dim)


def padded(images, segment_map):
    images = F.pad(images, (0, 32, 0, 16), value=0)
    padding = torch.ones(len(images), *images.shape[-2:], dtype=torch.bool)
    padding[:, :48, :64] = False
    return images, F.pad(segment_map, (0, 32, 0, 16)), padding


def test_padding_changes_no_token(clip, batch):
    images, segment_map, select = batch
    wide_images, wide_map, padding = padded(images, segment_map)
    alone, wide = image_tokens(clip, images), image_tokens(clip, wide_images, padding)
    torch.testing.assert_close(wide, alone, atol=1e-5, rtol=1e-5)
    alone = segment_tokens(clip, images, segment_map, select)
    wide = segment_tokens(clip, wide_images, wide_map, select)
    torch.testing.assert_close(wide, alone, atol=1e-5, rtol=1e-5)


def test_keys_name_view_and_mask_and_nothing_else(batch):
    images, segment_map, select = batch
    wide_images, wide_map, padding = padded(images, segment_map)
    assert view_keys(images) == view_keys(wide_images, padding)
    keys = segment_keys(images, segment_map, select)
    assert keys == segment_keys(wide_images, wide_map, select, padding)
    assert keys == segment_keys(images, masks_of(segment_map), select)
    assert len(set(keys)) == len(select)
    assert not set(keys) & set(segment_keys(images.flip(-1), segment_map.flip(-1), select))


def test_cached_tokens_equal_online_ones(clip, batch, tmp_path):
    images, segment_map, select = batch
    cache = TokenCache(tmp_path, clip.identity, clip.embed_dim)
    online = segment_tokens(clip, images, segment_map, select)
    for _ in range(2):
        cached = cache.segment_tokens(clip, images, segment_map, select)
        torch.testing.assert_close(cached, online, atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(cache.image_tokens(clip, images), image_tokens(clip, images))
    assert (cache.hits, cache.misses, len(cache)) == (4, 6, 6)


def test_cache_resumes_without_encoding_again(clip, batch, tmp_path, monkeypatch):
    images, segment_map, select = batch
    first = TokenCache(tmp_path, clip.identity, clip.embed_dim)
    half = first.segment_tokens(clip, images, segment_map, select[:2])
    second = TokenCache(tmp_path, clip.identity, clip.embed_dim)
    whole = second.segment_tokens(clip, images, segment_map, select)
    assert (second.hits, second.misses) == (2, 2)
    assert torch.equal(whole[:2], half)
    third = TokenCache(tmp_path, clip.identity, clip.embed_dim)
    monkeypatch.setattr(type(clip), "encode_normalised", None)  # nothing may be encoded now
    assert torch.equal(third.segment_tokens(clip, images, segment_map, select), whole)


def test_a_torn_last_row_is_computed_again(clip, batch, tmp_path):
    images, segment_map, select = batch
    cache = TokenCache(tmp_path, clip.identity, clip.embed_dim)
    expected = cache.segment_tokens(clip, images, segment_map, select)
    (values,) = cache.folder.glob("*.tokens")
    with values.open("r+b") as file:
        file.truncate(values.stat().st_size - 5)
    again = TokenCache(tmp_path, clip.identity, clip.embed_dim)
    tokens = again.segment_tokens(clip, images, segment_map, select)
    assert again.misses == 1
    torch.testing.assert_close(tokens, expected, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("fault", ["nan", "zeros", "another row"])
def test_damaged_tokens_are_computed_again_once(clip, batch, tmp_path, fault):
    images, segment_map, select = batch
    cache = TokenCache(tmp_path, clip.identity, clip.embed_dim)
    expected = cache.segment_tokens(clip, images, segment_map, select)
    (path,) = cache.folder.glob("*.tokens")
    data, row = path.read_bytes(), 4 * clip.embed_dim
    wrong = {"nan": b"\xff" * row, "zeros": bytes(row), "another row": data[row : 2 * row]}[fault]
    path.write_bytes(wrong + data[row:])
    heard = Heard()
    again = TokenCache(tmp_path, clip.identity, clip.embed_dim, progress=heard)
    found = again.segment_tokens(clip, images, segment_map, select)
    torch.testing.assert_close(found, expected, atol=1e-5, rtol=1e-5)
    assert again.misses == 1 and str(path) in heard.lines[0]
    third = TokenCache(tmp_path, clip.identity, clip.embed_dim)
    assert torch.equal(third.segment_tokens(clip, images, segment_map, select), found)
    assert third.misses == 0


def test_a_cache_that_cannot_be_written_is_a_user_error(clip, batch, tmp_path):
    images, segment_map, select = batch
    (tmp_path / "tokens").write_text("a file where a folder should be")
    cache = TokenCache(tmp_path, clip.identity, clip.embed_dim)
    with pytest.raises(UserError, match="Cannot write"):
        cache.segment_tokens(clip, images, segment_map, select)


def test_the_cache_stops_growing_and_says_so(clip, batch, tmp_path):
    images, *_ = batch
    heard = Heard()
    cache = TokenCache(tmp_path, clip.identity, clip.embed_dim, None, 3 * 4 * clip.embed_dim, heard)
    for shift in range(4):  # eight views, none of which comes again
        views = images.roll(shift + 1, -1)
        torch.testing.assert_close(cache.image_tokens(clip, views), image_tokens(clip, views))
    files = {path.suffix: path.stat().st_size for path in cache.folder.iterdir()}
    assert files == {".keys": 3 * 24, ".tokens": 3 * 4 * clip.embed_dim} and len(cache) == 3
    assert len(heard.lines) == 1 and "3 views" in heard.lines[0] and "online" in heard.lines[0]
    assert cache.image_tokens(clip, images.roll(1, -1)).shape == (2, clip.embed_dim)
    assert (cache.hits, cache.misses) == (2, 8)
