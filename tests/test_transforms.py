"""Augmented views keep image and segments together; resizing follows the stated rule."""

from __future__ import annotations

from math import ceil

import numpy as np
import pytest
from data_helpers import coded_sample
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.lib.stride_tricks import sliding_window_view

from concat_cli.core.config import DataConfig
from concat_cli.core.data.dataset import Sample
from concat_cli.core.data.transforms import (
    Augment,
    flip_sample,
    jitter_colours,
    resize_short,
    short_size,
)

STILL = {"scale_min": 1.0, "scale_max": 1.0, "flip": 0.0, "colour": 0.0}
fast = settings(max_examples=40, deadline=None)
scaled = given(
    size=st.tuples(st.integers(40, 160), st.integers(40, 160)),
    scale=st.floats(0.6, 3.0),
    seed=st.integers(0, 2**31),
)


def _check_aligned(view: Sample, reach: int) -> None:
    """The green channel tells the class of each pixel more than `reach` from another segment."""
    height, width = view.segment_map.shape
    assert view.image.shape == (height, width, 3)
    assert view.segment_map.max(initial=0) == len(view.labels) == len(view.crowd)
    assert set(np.unique(view.segment_map)) - {0} == set(range(1, len(view.labels) + 1))
    wanted = np.append(0, 20 * (view.labels - 4))[view.segment_map]
    around = np.pad(view.segment_map, reach, constant_values=-1)  # the view may be a crop
    near = sliding_window_view(around, (2 * reach + 1,) * 2)
    inside = near.min(axis=(2, 3)) == near.max(axis=(2, 3))  # where resizing blends nothing
    right = np.abs(view.image[..., 1].astype(int) - wanted) <= 1
    assert reach > 0 or inside.all()
    assert right[inside].all()


@fast
@given(
    size=st.tuples(st.integers(5, 90), st.integers(5, 90)),
    segments=st.integers(0, 9),
    flip=st.booleans(),
    seed=st.integers(0, 2**31),
)
def test_crop_and_flip_keep_pixels_exact(size, segments: int, flip: bool, seed: int) -> None:
    rng = np.random.default_rng(seed)
    sample = coded_sample(*size, segments, rng)
    # a scale that leaves the sample's own size, so that only cropping and flipping happen
    scale = max(size) / 32
    augment = Augment(DataConfig(crop=32, scale_min=scale, scale_max=scale, flip=float(flip)))
    view = augment(sample, rng)
    assert view.segment_map.shape == (min(size[0], 32), min(size[1], 32))
    _check_aligned(view, reach=0)
    columns = view.image[0, :, 0].astype(int)  # the red channel counts columns
    assert (np.diff(columns) == (-1 if flip else 1)).all()


@fast
@scaled
def test_scaling_moves_image_and_segments_together(size, scale: float, seed: int) -> None:
    rng = np.random.default_rng(seed)
    sample = coded_sample(*size, 5, rng)
    view = Augment(DataConfig(crop=64, scale_min=scale, scale_max=scale))(sample, rng)
    assert max(view.segment_map.shape) == min(64, round(64 * scale))
    _check_aligned(view, reach=ceil(max(1, scale * 64 / max(size))))


@fast
@scaled
def test_the_short_side_is_scaled_where_that_is_asked_for(size, scale: float, seed: int) -> None:
    rng = np.random.default_rng(seed)
    sample = coded_sample(*size, 5, rng)
    data = DataConfig(crop=64, scale_min=scale, scale_max=scale, scale_side="short")
    view = Augment(data)(sample, rng)
    factor = 64 * scale / min(size)
    assert view.segment_map.shape == tuple(min(64, round(side * factor)) for side in size)
    _check_aligned(view, reach=ceil(max(1, factor)))


def test_scaling_up_by_a_whole_factor_is_aligned_inside_blocks() -> None:
    sample = coded_sample(32, 32, 4, np.random.default_rng(0))
    view = resize_short(sample, 128, 128)
    inner = np.s_[8:24, 8:24]  # the inside of the first block, which is now 32 wide
    _check_aligned(view, reach=4)
    assert len(np.unique(view.segment_map[inner])) == 1
    assert len(np.unique(view.image[inner][..., 1])) == 1


def test_vanished_segments_are_dropped() -> None:
    segment_map = np.ones((64, 64), np.int32)
    segment_map[:, 32:] = 2
    segment_map[0, 0] = 3  # a pixel that a view at a quarter of the size loses
    labels, crowd = np.array([4, 5, 6]), np.zeros(3, bool)
    sample = Sample(np.zeros((64, 64, 3), np.uint8), segment_map, labels, crowd, 1, "a")
    view = resize_short(sample, 16, 16)
    assert view.labels.tolist() == [4, 5] and view.segment_map.max() == 2
    assert (view.segment_map == resize_short(sample, 16, 16).segment_map).all()


def test_identity() -> None:
    sample = coded_sample(64, 64, 4, np.random.default_rng(0))
    still = Augment(DataConfig(crop=64, **STILL))
    view = still(sample, np.random.default_rng(0))
    assert view.image is sample.image and view.segment_map is sample.segment_map
    wide = coded_sample(40, 100, 4, np.random.default_rng(0))
    one, two = (still(wide, np.random.default_rng(seed)) for seed in (1, 2))
    assert one.image.shape == (26, 64, 3) and (one.image == two.image).all()


@pytest.mark.parametrize(
    "change", [{"flip": 0.5}, {"colour": 0.1}, {"scale_min": 0.5}, {"scale_max": 1.5}]
)
def test_any_of_them_gives_other_views(change: dict[str, float]) -> None:
    augment = Augment(DataConfig(crop=64, **(STILL | change)))
    sample = coded_sample(64, 64, 4, np.random.default_rng(0))
    views = {augment(sample, np.random.default_rng(seed)).image.tobytes() for seed in range(8)}
    assert len(views) > 1


def test_same_seed_same_view() -> None:
    augment = Augment(DataConfig(crop=48, scale_min=0.5, scale_max=2, colour=0.4))
    sample = coded_sample(64, 80, 6, np.random.default_rng(0))
    views = [augment(sample, np.random.default_rng(seed)) for seed in (3, 3, 4)]
    assert (views[0].image == views[1].image).all()
    assert views[0].image.shape != views[2].image.shape or (views[0].image != views[2].image).any()


def test_colour_jitter_changes_colours_only() -> None:
    sample = coded_sample(64, 64, 4, np.random.default_rng(0))
    view = Augment(DataConfig(crop=64, **(STILL | {"colour": 0.5})))(
        sample, np.random.default_rng(1)
    )
    assert (view.segment_map == sample.segment_map).all()
    assert (view.image != sample.image).any() and view.image.dtype == np.uint8
    assert (jitter_colours(sample.image, 0.0, np.random.default_rng(0)) == sample.image).all()


def test_flip_twice_is_nothing() -> None:
    sample = coded_sample(9, 14, 4, np.random.default_rng(0))
    twice = flip_sample(flip_sample(sample))
    assert (twice.image == sample.image).all()
    assert (twice.segment_map == sample.segment_map).all()


@pytest.mark.parametrize(
    ("size", "wanted"),
    [
        ((480, 640), (800, 1067)),
        ((640, 480), (1067, 800)),
        ((100, 1000), (133, 1333)),
        ((1, 5000), (1, 1333)),
        ((800, 900), (800, 900)),
    ],
)
def test_short_size(size: tuple[int, int], wanted: tuple[int, int]) -> None:
    assert short_size(*size, size=800, max_size=1333) == wanted


def test_resize_short_of_an_image() -> None:
    image = np.full((20, 30, 3), 77, np.uint8)
    assert resize_short(image, 40, 100).shape == (40, 60, 3)
    assert (resize_short(image, 40, 100) == 77).all()
    assert resize_short(image, 20, 30) is image
