"""Two panoptic PNGs of an image -> the pixels that their segments share, several images at once.

Segments are counted by runs of equal neighbours, which are far fewer than pixels.
"""

from __future__ import annotations

import os
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import TypeVar

import numpy as np
from numpy.typing import NDArray

from concat_cli.core.data.image_io import read_id_png, wrong_size
from concat_cli.core.errors import UserError
from concat_cli.core.evaluate.panoptic_json import Annotation

TOGETHER = "JSON and PNGs must come from one source: write both again."
LOOSELY = " --as-panopticapi counts it as that does."
THREADS = 8  # at most: each holds a picture
AHEAD = 4  # images a thread that wait to be added up

A = TypeVar("A")
B = TypeVar("B")


@dataclass(frozen=True)
class Drawn:
    """An annotation, the PNG that it is drawn in, and the JSON that it stands in."""

    png: Path
    listed: Annotation
    json: Path


@dataclass(frozen=True)
class Counted:
    """What the true PNG and a prediction's share.

    pixels: (N+1, M+1) as `quality.overlaps`; as panopticapi counts, one more row for true ids that
    the JSON does not list, of which there are `strange`. resized: the true PNG is not of the size
    that the JSON says.
    """

    png: Path
    pixels: NDArray[np.int64]
    strange: int
    resized: bool


def count_pair(
    truth: Drawn, found: Drawn, size: tuple[int, int] | None, as_panopticapi: bool
) -> Counted:
    """Counts an image; UserError where PNG and JSON disagree, or a PNG has not the size (height,
    width) that the truth has. As panopticapi counts, what disagrees in the truth is counted."""
    if size is None:
        raise UserError(
            f"{truth.json} does not list image {truth.listed.image_id} with its height and width.",
            "Write the image into `images`.",
        )
    real = read_id_png(truth.png) if as_panopticapi else _read(truth, size)
    shape = (real.shape[0], real.shape[1])
    values, others, lengths = joint_runs(real, _read(found, shape))
    rows, strange = _numbered(values, truth, as_panopticapi, LOOSELY)
    columns, _ = _numbered(others, found, False)
    height = len(truth.listed.segments_info) + 1 + as_panopticapi
    width = len(found.listed.segments_info) + 1
    pixels = np.bincount(rows * width + columns, lengths, height * width).astype(np.int64)
    return Counted(truth.png, pixels.reshape(height, width), strange, shape != size)


def joint_runs(
    one: NDArray[np.int32], other: NDArray[np.int32]
) -> tuple[NDArray[np.int32], NDArray[np.int32], NDArray[np.int64]]:
    """Both maps' values in the runs, row by row, in which neither changes, and their lengths."""
    one, other = one.ravel(), other.ravel()
    changes = np.flatnonzero((one[1:] != one[:-1]) | (other[1:] != other[:-1])) + 1
    starts = np.concatenate([[0], changes])[: one.size]
    return one[starts], other[starts], np.diff(np.append(starts, one.size))


def in_order(work: Callable[[A], B], items: Iterable[A]) -> Iterator[B]:
    """The work of each item, done in threads, of which only a few results wait at a time.

    Threads pay where the time goes into Pillow and numpy, which let others run meanwhile.
    """
    threads = min(THREADS, os.cpu_count() or 1)
    pool, waiting = ThreadPoolExecutor(threads), deque[Future[B]]()
    try:
        for item in items:
            waiting.append(pool.submit(work, item))
            if len(waiting) > AHEAD * threads:
                yield waiting.popleft().result()
        while waiting:
            yield waiting.popleft().result()
    finally:
        pool.shutdown(cancel_futures=True)


def _read(one: Drawn, size: tuple[int, int]) -> NDArray[np.int32]:
    """The ids (H, W) of a PNG; UserError where it is of another size than the truth."""
    found = read_id_png(one.png, size)  # not decoded where it is of another size
    if found.shape != size:
        raise wrong_size(one.png, found.shape, size, "the truth says", one.listed.image_id)
    return found


def _numbered(
    values: NDArray[np.int32], one: Drawn, loose: bool, hint: str = ""
) -> tuple[NDArray[np.int64], int]:
    """Numbers for the ids of runs, 0 = void and i+1 = segment i, and how many ids only the PNG has.

    loose: these have the number behind the last segment's; else UserError where PNG and JSON hold
    different ids.
    """
    ids = np.array([segment.id for segment in one.listed.segments_info], np.int64)
    order = np.argsort(ids)
    known = np.concatenate([[0], ids[order]])
    place = np.searchsorted(known, values).clip(max=len(known) - 1)
    astray = known[place] != values
    strange = np.unique(values[astray])
    unused = known[np.bincount(place, minlength=len(known)) == 0]
    unused = unused[unused > 0]
    if not loose and (len(strange) or len(unused)):
        side, which = ("JSON", strange[0]) if len(strange) else ("PNG", unused[0])
        raise UserError(
            f"{one.png} and {one.json} disagree on image {one.listed.image_id}: segment id {which} "
            f"is not in the {side}.",
            TOGETHER + hint,
        )
    numbers = np.concatenate([[0], order + 1])[place]
    numbers[astray] = len(known)
    return numbers, len(strange)
