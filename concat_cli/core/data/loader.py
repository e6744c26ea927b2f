"""Samples -> padded batches, in an order that depends only on (seed, step, rank): resumable."""

from __future__ import annotations

import multiprocessing
import os
import shutil
import traceback
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, fields, replace
from functools import lru_cache
from multiprocessing.queues import Queue
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from concat_cli.core.data.dataset import PanopticDataset, Sample
from concat_cli.core.data.transforms import Augment
from concat_cli.core.errors import UserError

_ORDER, _VIEW = 0, 1  # streams of random numbers drawn from one seed


@dataclass(frozen=True)
class Batch:
    """Images of one forward pass, padded to one size at the right and the bottom.

    images: (B, 3, H, W) uint8 RGB, 0 in pads. padding: (B, H, W) bool, true = pad.
    segment_map: (B, H, W) int32, 0 = void or pad, i + 1 = segment i of that image.
    labels: (B, N) int64 class indices, -1 = no such segment. image_ids: (B,) int64.
    indices: (B,) int64, positions in the data set. file_names: B names.
    """

    images: Tensor
    padding: Tensor
    segment_map: Tensor
    labels: Tensor
    image_ids: Tensor
    indices: Tensor
    file_names: list[str]

    def __len__(self) -> int:
        return len(self.file_names)

    def to(self, device: torch.device | str) -> Batch:
        """The batch on `device`."""
        return self._each(lambda tensor: tensor.to(device, non_blocking=True))

    def pin_memory(self) -> Batch:
        """The batch in page-locked memory, from which copies to a GPU need not wait."""
        return self._each(Tensor.pin_memory)

    def masks(self) -> Tensor:
        """(B, N, H, W) bool: the pixels of each segment; empty where a label is -1."""
        numbers = torch.arange(1, self.labels.shape[1] + 1, device=self.labels.device)
        return self.segment_map[:, None] == numbers[None, :, None, None]  # (B, N, H, W)

    def sizes(self) -> list[tuple[int, int]]:
        """(height, width) of each image without its pads."""
        inside = ~self.padding
        sides = (inside[:, :, 0].sum(1), inside[:, 0].sum(1))
        return [(int(height), int(width)) for height, width in zip(*sides, strict=True)]

    def _each(self, change: Callable[[Tensor], Tensor]) -> Batch:
        tensors = {f.name: getattr(self, f.name) for f in fields(self) if f.name != "file_names"}
        return replace(self, **{name: change(tensor) for name, tensor in tensors.items()})


def as_tensor(values: np.ndarray) -> Tensor:
    """The array as a tensor, without a copy where it lies in one piece."""
    return torch.as_tensor(np.ascontiguousarray(values))


def collate(samples: Sequence[Sample], indices: Sequence[int], divisor: int = 32) -> Batch:
    """Pads samples to the largest height and width among them, rounded up to `divisor`."""
    count = len(samples)
    sizes = [sample.segment_map.shape for sample in samples]
    height = -(-max(size[0] for size in sizes) // divisor) * divisor
    width = -(-max(size[1] for size in sizes) // divisor) * divisor
    images = torch.zeros(count, 3, height, width, dtype=torch.uint8)
    padding = torch.ones(count, height, width, dtype=torch.bool)
    segment_map = torch.zeros(count, height, width, dtype=torch.int32)
    labels = torch.full((count, max(len(sample.labels) for sample in samples)), -1)
    for i, (sample, (h, w)) in enumerate(zip(samples, sizes, strict=True)):
        image = as_tensor(sample.image)
        images[i, :, :h, :w] = image.permute(2, 0, 1)
        padding[i, :h, :w] = False
        segment_map[i, :h, :w] = as_tensor(sample.segment_map)
        labels[i, : len(sample.labels)] = as_tensor(sample.labels)
    return Batch(
        images,
        padding,
        segment_map,
        labels,
        image_ids=torch.tensor([sample.image_id for sample in samples]),
        indices=torch.tensor(list(indices)),
        file_names=[sample.file_name for sample in samples],
    )


@lru_cache(maxsize=2)
def _epoch_order(length: int, seed: int, epoch: int) -> np.ndarray:
    return np.random.default_rng([seed, _ORDER, epoch]).permutation(length)


def dataset_index(position: int, length: int, seed: int) -> int:
    """The data-set index at a position of the endless stream: one shuffle of all per epoch."""
    return int(_epoch_order(length, seed, position // length)[position % length])


@dataclass(frozen=True)
class StepSampler:
    """Positions of each micro-batch of one process, from `start_step` on, without end.

    A step takes `batch_size * accumulate * world` positions of one stream, whatever the number of
    processes: several processes see together what one process would see with more accumulation.
    """

    batch_size: int
    accumulate: int = 1
    rank: int = 0
    world: int = 1
    start_step: int = 0

    def __iter__(self) -> Iterator[list[int]]:
        micro = self.start_step * self.accumulate
        while True:
            first = (micro * self.world + self.rank) * self.batch_size
            yield list(range(first, first + self.batch_size))
            micro += 1


class _Views(Dataset[Batch | UserError]):
    """Positions -> batch. A UserError is handed over as a value, as raising it in a loader process
    would bury its message in a traceback."""

    def __init__(
        self, dataset: PanopticDataset, augment: Augment | None, seed: int, divisor: int
    ) -> None:
        self._dataset = dataset
        self._augment = augment
        self._seed = seed
        self._divisor = divisor

    def __getitem__(self, positions: list[int]) -> Batch | UserError:
        indices = [dataset_index(p, len(self._dataset), self._seed) for p in positions]
        try:
            samples = [self._dataset[index] for index in indices]
        except UserError as error:
            return error
        if self._augment is not None:
            samples = [
                self._augment(sample, np.random.default_rng([self._seed, _VIEW, position]))
                for sample, position in zip(samples, positions, strict=True)
            ]
        return collate(samples, indices, self._divisor)


def _unchanged(batch: Any) -> Any:
    return batch


def make_loader(
    dataset: PanopticDataset,
    augment: Augment | None,
    sampler: StepSampler,
    seed: int,
    workers: int = 0,
    divisor: int = 32,
) -> Iterator[Batch]:
    """Endless training batches: those of the sampler, in its order.

    What step t yields depends only on (seed, t, rank, world), not on its start or on `workers`.

    Args:
        workers: loader processes; 0 decodes in this one.
    """
    if len(dataset) == 0:
        raise UserError(f"{dataset.part.index} lists no images.", "Prepare the data set again.")
    views = _Views(dataset, augment, seed, divisor)
    if workers == 0:
        return _raised(views[positions] for positions in sampler)
    loader = DataLoader(
        views,
        batch_size=None,
        sampler=sampler,
        num_workers=workers,
        collate_fn=_unchanged,
        worker_init_fn=_end_where_a_batch_is_lost,
        pin_memory=torch.cuda.is_available(),
        generator=torch.Generator(),  # leaves the global random state alone
    )
    return _raised(_told(loader, workers))


def _end_where_a_batch_is_lost(_: int) -> None:
    """In a loader process: where a batch cannot be handed over, such as for lack of shared memory,
    Python drops it and goes on, and the training would wait for it for ever."""

    def end(error: Exception, _: object) -> None:
        os._exit(getattr(error, "errno", None) or 1)

    Queue._on_queue_feeder_error = staticmethod(end)  # pyright: ignore


def _told(loader: DataLoader[Batch | UserError], workers: int) -> Iterator[Batch | UserError]:
    """Its batches, and whatever fails in its processes or on the way as a UserError."""
    try:
        multiprocessing.Lock()  # which the loader needs; it fails noisily where it gets none
        yield from loader
        return
    except Exception as error:
        lines = str(error).splitlines() or [type(error).__name__]
        # of what was raised in a loader process, the last line of its traceback
        reason = lines[-1] if "Traceback" in str(error) else lines[0].partition(". ")[0]
        traceback.clear_frames(error.__traceback__)  # which would keep the other processes alive
    shared = Path("/dev/shm")
    free = f", where {shutil.disk_usage(shared).free / 1e6:,.0f} MB are free" if shared.is_dir() else ""
    yield UserError(
        f"One of {workers} loader processes failed: {reason}",
        f"Use data.workers=0, which also shows more of a fault; or give more shared memory "
        f"(/dev/shm{free}) and open files (ulimit -n).",
    )


def _raised(batches: Iterator[Batch | UserError]) -> Iterator[Batch]:
    for batch in batches:
        if isinstance(batch, UserError):
            break
        yield batch
    else:
        raise AssertionError("the stream of batches is endless")
    del batches  # ends the loader processes now: in the error's traceback they would linger
    raise UserError(batch.what, batch.hint)
