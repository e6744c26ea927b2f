"""Batches: padding, and an order that depends only on seed, step and rank."""

from __future__ import annotations

import multiprocessing
import os
import signal
import sys
from itertools import islice
from pathlib import Path

import numpy as np
import pytest
import torch
from data_helpers import VOCABULARY, coded_sample, simple_part, write_part

from concat_cli.core.config import DataConfig
from concat_cli.core.data.dataset import PanopticDataset
from concat_cli.core.data.loader import (
    Batch,
    StepSampler,
    _Views,
    collate,
    dataset_index,
    make_loader,
)
from concat_cli.core.data.transforms import Augment
from concat_cli.core.errors import UserError

AUGMENT = Augment(DataConfig(crop=32, scale_min=0.5, scale_max=2.0, colour=0.3))


@pytest.fixture(scope="module")
def dataset(tmp_path_factory: pytest.TempPathFactory) -> PanopticDataset:
    scenes = {i: [3, 7, 20, 21][: i % 5] for i in range(1, 8)}
    sizes = {i: (20 + 3 * i, 50 - 4 * i) for i in scenes}
    part = simple_part(tmp_path_factory.mktemp("mini"))
    return PanopticDataset(write_part(part, scenes, sizes), VOCABULARY, cache=True)


def _same(one: Batch, two: Batch) -> bool:
    return one.file_names == two.file_names and all(
        torch.equal(getattr(one, name), getattr(two, name))
        for name in ("images", "padding", "segment_map", "labels", "image_ids", "indices")
    )


def test_collate_pads_and_marks_pads() -> None:
    rng = np.random.default_rng(0)
    samples = [coded_sample(20, 40, 3, rng), coded_sample(33, 12, 1, rng)]
    batch = collate(samples, [7, 4])
    assert batch.images.shape == (2, 3, 64, 64) and batch.images.dtype == torch.uint8
    assert batch.sizes() == [(20, 40), (33, 12)] and len(batch) == 2
    assert (batch.images.sum(1)[batch.padding] == 0).all()
    assert (batch.segment_map[batch.padding] == 0).all()
    assert (batch.images[0, :, :20, :40].permute(1, 2, 0).numpy() == samples[0].image).all()
    assert batch.labels.tolist() == [[5, 6, 7], [5, -1, -1]] and batch.indices.tolist() == [7, 4]
    masks = batch.masks()
    assert masks.shape == (2, 3, 64, 64) and not masks[1, 1:].any()
    for i, sample in enumerate(samples):
        for n in range(len(sample.labels)):
            mask = masks[i, n, : sample.image.shape[0], : sample.image.shape[1]].numpy()
            assert (mask == (sample.segment_map == n + 1)).all() and mask.any()
    assert batch.to("cpu").file_names == ["coded.png"] * 2


def test_images_without_segments_make_a_batch() -> None:
    sample = coded_sample(20, 40, 0, np.random.default_rng(0))
    batch = collate([sample], [0], divisor=8)
    assert batch.labels.shape == (1, 0) and batch.masks().shape == (1, 0, 24, 40)


def test_every_epoch_is_a_shuffle_of_all() -> None:
    epochs = [[dataset_index(p, 11, 5) for p in range(e * 11, e * 11 + 11)] for e in range(3)]
    assert all(sorted(epoch) == list(range(11)) for epoch in epochs)
    assert epochs[0] != epochs[1] != epochs[2]
    assert epochs[0] != [dataset_index(p, 11, 6) for p in range(11)]


@pytest.mark.parametrize("workers", [0, 2])
def test_ten_steps_are_five_and_five(dataset: PanopticDataset, workers: int) -> None:
    straight = list(islice(make_loader(dataset, AUGMENT, StepSampler(3), 1), 10))
    first = list(islice(make_loader(dataset, AUGMENT, StepSampler(3), 1, workers=workers), 5))
    rest = islice(
        make_loader(dataset, AUGMENT, StepSampler(3, start_step=5), 1, workers=workers), 5
    )
    assert all(_same(a, b) for a, b in zip(straight, [*first, *rest], strict=True))
    other = next(make_loader(dataset, AUGMENT, StepSampler(3), 2))
    assert not _same(straight[0], other)


def test_processes_see_together_what_one_sees(dataset: PanopticDataset) -> None:
    one = list(islice(make_loader(dataset, AUGMENT, StepSampler(2, accumulate=6), 1), 12))
    three = [
        list(
            islice(
                make_loader(dataset, AUGMENT, StepSampler(2, rank=r, world=3, accumulate=2), 1), 4
            )
        )
        for r in range(3)
    ]
    for step in range(2):
        gathered = [three[r][2 * step + a] for a in range(2) for r in range(3)]
        wanted = one[6 * step : 6 * step + 6]
        assert all(_same(a, b) for a, b in zip(gathered, wanted, strict=True))


def test_start_step_counts_accumulated_steps(dataset: PanopticDataset) -> None:
    straight = list(islice(make_loader(dataset, AUGMENT, StepSampler(2, accumulate=3), 1), 9))
    resumed = next(make_loader(dataset, AUGMENT, StepSampler(2, accumulate=3, start_step=2), 1))
    assert _same(straight[6], resumed)


@pytest.mark.parametrize("workers", [0, 1])
def test_global_random_state_is_left_alone(dataset: PanopticDataset, workers: int) -> None:
    torch.manual_seed(3)
    wanted = torch.rand(2)
    torch.manual_seed(3)
    next(make_loader(dataset, AUGMENT, StepSampler(2), 1, workers=workers))
    assert torch.equal(torch.rand(2), wanted)


@pytest.mark.parametrize("workers", [0, 1])
def test_damage_found_while_loading_is_a_user_error(tmp_path: Path, workers: int) -> None:
    part = write_part(simple_part(tmp_path), {1: [3]})
    dataset = PanopticDataset(part, VOCABULARY)
    (part.images / "000000000001.png").write_bytes(b"broken")
    with pytest.raises(UserError) as caught:
        next(make_loader(dataset, None, StepSampler(1), 0, workers=workers))
    assert "000000000001.png" in caught.value.what and "Traceback" not in caught.value.what
    assert caught.value.hint


def test_no_images(tmp_path: Path) -> None:
    empty = PanopticDataset(write_part(simple_part(tmp_path), {}), VOCABULARY)
    with pytest.raises(UserError, match="no images"):
        make_loader(empty, None, StepSampler(1), 0)


class Lost:
    """Cannot be handed over: pickling it fails, as of a tensor where shared memory is full."""

    def __reduce__(self) -> str:
        raise OSError(28, "No space left on device")


def _killed(_: object, positions: list[int]) -> Batch:
    os.kill(os.getpid(), signal.SIGKILL)
    raise AssertionError


def _broken(_: object, positions: list[int]) -> Batch:
    raise ValueError("a fault of ours")


@pytest.mark.skipif(sys.platform != "linux", reason="loader processes are forked there")
@pytest.mark.parametrize(
    ("work", "reason"),
    [(_killed, "worker"), (_broken, "a fault of ours"), (lambda *_: Lost(), "worker")],
)
def test_a_loader_that_fails_ends_the_training(dataset, monkeypatch, work, reason) -> None:
    """A killed process, an exception, a batch that is lost on its way: one error, no waiting."""
    monkeypatch.setattr(_Views, "__getitem__", work)
    stream = make_loader(dataset, None, StepSampler(1), 0, workers=2)
    with pytest.raises(UserError, match="One of 2 loader processes") as caught:
        next(stream)
    assert reason in caught.value.what and "\n" not in caught.value.what
    assert "data.workers=0" in caught.value.hint and caught.value.__cause__ is None
    assert not multiprocessing.active_children()


def test_without_semaphores_nothing_is_started(dataset, monkeypatch) -> None:
    """As where there is no /dev/shm."""

    def missing() -> None:
        raise FileNotFoundError(2, "No such file or directory")

    monkeypatch.setattr(multiprocessing, "Lock", missing)
    with pytest.raises(UserError, match="No such file") as caught:
        next(make_loader(dataset, None, StepSampler(1), 0, workers=1))
    assert "/dev/shm" in caught.value.hint
