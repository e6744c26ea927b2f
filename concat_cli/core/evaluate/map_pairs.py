"""Two panoptic PNGs of an image -> the pixels that their segments share, several images at once.

Segments are counted by runs of equal neighbours, which are far fewer than pixels.
"""

from __future__ import annotations

import multiprocessing
import os
import sys
import warnings
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import Executor, Future, ProcessPoolExecutor, ThreadPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass
from functools import partial
from itertools import islice
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
from numpy.typing import NDArray

from concat_cli.core.data.image_io import (
    ids_at,
    joint_runs,
    places_in,
    png_decoder,
    read_id_pixels,
    wrong_size,
)
from concat_cli.core.errors import UserError
from concat_cli.core.evaluate.panoptic_json import Annotation
from concat_cli.core.prepare.pool import begin

TOGETHER = "JSON and PNGs must come from one source: write both again."
LOOSELY = " --as-panopticapi counts it as that does."
WORKERS = 8  # at most: each holds a picture
AHEAD = 4  # batches a worker that wait to be added up
BATCH = 8  # images that go to a process at a time

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
    real = read_id_pixels(truth.png) if as_panopticapi else _read(truth, size)
    shape = (real.shape[0], real.shape[1])
    both = real, _read(found, shape)
    starts, lengths = joint_runs(*both)
    values, others = (ids_at(pixels, starts) for pixels in both)
    rows, strange = numbered(values, truth, as_panopticapi, LOOSELY)
    columns, _ = numbered(others, found, False)
    height = len(truth.listed.segments_info) + 1 + as_panopticapi
    width = len(found.listed.segments_info) + 1
    pixels = np.bincount(rows * width + columns, lengths, height * width).astype(np.int64)
    return Counted(truth.png, pixels.reshape(height, width), strange, shape != size)


def forks() -> bool:
    """Whether to work in processes: threads pay with Pillow, which lets others run meanwhile, but
    not with the quicker reader. Where processes cannot be forked, their start would take longer;
    a daemon, such as a worker of somebody's pool, may start none."""
    can = sys.platform == "linux" and "fork" in multiprocessing.get_all_start_methods()
    return can and not multiprocessing.current_process().daemon and png_decoder() is not None


def in_order(work: Callable[[A], B], items: Iterable[A], forked: bool = False) -> Iterator[B]:
    """The work of each item, done in threads or in forked processes, of which only a few results
    wait at a time. Work must be called before other threads start where it forks."""
    workers = min(WORKERS, os.cpu_count() or 1)
    pool, each = _processes(workers, work) if forked else _threads(workers, work)
    rest, size = iter(items), BATCH if forked else 1
    batches = iter(lambda: list(islice(rest, size)), [])
    waiting = deque(pool.submit(each, batch) for batch in islice(batches, AHEAD * workers))
    return _results(pool, each, batches, waiting)


def _results(
    pool: Executor,
    each: Callable[[list[A]], list[B]],
    batches: Iterator[list[A]],
    waiting: deque[Future[list[B]]],
) -> Iterator[B]:
    try:
        while waiting:
            done = waiting.popleft().result()
            waiting.extend(pool.submit(each, batch) for batch in islice(batches, 1))
            yield from done
    except BrokenProcessPool as error:
        what = "A process that scores was ended from outside."
        raise UserError(what, "Check the memory, and do it again.") from error
    finally:
        pool.shutdown(cancel_futures=True)


def _all(work: Callable[[A], B], batch: Sequence[A]) -> list[B]:
    return [work(one) for one in batch]


def _threads(count: int, work: Callable[[A], B]) -> tuple[Executor, Callable[[list[A]], list[B]]]:
    return ThreadPoolExecutor(count), partial(_all, work)


_WORK: list[Callable[[Any], Any]] = []  # of this process, if a pool forked it


def _forked(batch: list[Any]) -> list[Any]:
    return _all(_WORK[0], batch)


def _processes(count: int, work: Callable[[A], B]) -> tuple[Executor, Callable[[list[A]], list[B]]]:
    """A pool that has forked: its processes hold what the work holds, and nothing of it is sent."""
    context = multiprocessing.get_context("fork")
    pool = ProcessPoolExecutor(count, context, begin, (partial(_WORK.append, work),))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)  # of threads: those of BLAS can fork
        pool.submit(int).result()
    return pool, _forked


def _read(one: Drawn, size: tuple[int, int]) -> NDArray[np.uint8]:
    """The pixels (H, W, 3) of a PNG; UserError where it is of another size than the truth."""
    found = read_id_pixels(one.png, size)  # not decoded where it is of another size
    if found.shape[:2] != size:
        raise wrong_size(one.png, found.shape, size, "the truth says", one.listed.image_id)
    return found


def numbered(
    values: NDArray[np.int32], one: Drawn, loose: bool, hint: str = ""
) -> tuple[NDArray[np.int64], int]:
    """Numbers for the ids of runs, 0 = void and i+1 = segment i, and how many ids only the PNG has.

    loose: these have the number behind the last segment's; else UserError where PNG and JSON hold
    different ids.
    """
    ids = np.array([segment.id for segment in one.listed.segments_info], np.int64)
    order = np.argsort(ids)
    known = np.concatenate([[0], ids[order]])
    place, astray, strange = places_in(known, values)
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
