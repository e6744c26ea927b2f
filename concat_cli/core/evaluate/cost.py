"""What a prediction costs: parameters, images a second, memory; measured in a process of its own.

A fresh process because memory that was taken once is seldom given back, so the peak of a process
tells of everything that it ever did.
"""

from __future__ import annotations

import gc
import os
import statistics
import time
from collections.abc import Sequence
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from contextlib import suppress
from dataclasses import dataclass
from multiprocessing import get_context
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray

from concat_cli.core.device import choose_device
from concat_cli.core.errors import UserError
from concat_cli.core.evaluate.weights import open_subject
from concat_cli.core.infer.predictor import Predictor

IMAGES = 8  # of val, one at a time
WARM_UP = 2  # images before the clock runs
REPEATS = 3  # of each image
BUDGET = 30.0  # seconds after which no further image is begun; at least `IMAGES` are timed
_RESET, _STATUS = Path("/proc/self/clear_refs"), Path("/proc/self/status")  # Linux alone
Image = NDArray[np.uint8]


@dataclass(frozen=True)
class Cost:
    """What it takes to predict one image at a time.

    parameters: of all that runs at test (text embeddings are made before, once). clip_image: that
    CLIP's image encoder is among it. images_per_second: by task, from a uint8 image to its semantic
    map and to its panoptic map, medians; None where the model makes none. peak_mib: the most memory
    while it predicts, of tensors on a GPU, else beyond what Python and its packages took before
    anything was loaded; None where the system does not tell.
    """

    parameters: int
    clip_image: bool
    images_per_second: dict[str, float | None]
    peak_mib: float | None
    device: str
    threads: int


def measure_cost(weights: Path, overrides: Sequence[str] = (), device: str = "auto") -> Cost:
    """The cost of weights on images of val of their data set, measured in a fresh process.

    Arguments as of `evaluate_weights`. UserError where the process dies.
    """
    with ProcessPoolExecutor(1, get_context("spawn"), _silence) as pool:
        try:
            return pool.submit(cost_here, weights, overrides, device).result()
        except BrokenProcessPool as error:
            raise UserError(
                f"The process that measures the speed of {weights} died.",
                "It was killed, for want of memory as a rule.",
            ) from error


def _silence() -> None:
    """What packages print while they load is said by the process that scores."""
    nowhere = os.open(os.devnull, os.O_WRONLY)
    for stream in (1, 2):
        os.dup2(nowhere, stream)


def cost_here(weights: Path, overrides: Sequence[str], device: str) -> Cost:
    """The cost, measured in this process."""
    before = resident("VmRSS")
    chosen, _ = choose_device(device)
    subject = open_subject(weights, overrides)
    predictor = Predictor.load(
        subject.weights, subject.info.vocabulary, chosen, overrides=subject.cfg, force=True
    )
    samples = subject.dataset()
    images = [samples[i].image for i in range(min(IMAGES, len(samples)))]
    del subject, samples
    gc.collect()
    gpu = chosen.type == "cuda"
    if gpu:
        torch.cuda.reset_peak_memory_stats(chosen)
    with suppress(OSError):  # not Linux, or not ours to write
        _RESET.write_text("5")  # proc(5): the peak of the resident set becomes what it is now
    speed, most = images_per_second(predictor, images), resident("VmHWM")
    peak = None if most is None or before is None else most - before
    if gpu:
        peak = torch.cuda.max_memory_allocated(chosen) / 2**20
    return Cost(
        predictor.parameters,
        predictor.needs_clip_image,
        speed,
        None if peak is None else round(peak, 1),
        str(chosen),
        torch.get_num_threads(),
    )


def images_per_second(predictor: Predictor, images: Sequence[Image]) -> dict[str, float | None]:
    """One over the median time of an image, after a warm-up, by task."""
    seconds: dict[str, list[float]] = {"semantic": [], "panoptic": []}
    for image in images[:WARM_UP]:
        _time(predictor, image)
    began = time.monotonic()
    for number in range(REPEATS * len(images)):
        for task, value in _time(predictor, images[number % len(images)]).items():
            seconds[task].append(value)
        if number + 1 >= len(images) and time.monotonic() - began > BUDGET:
            break
    return {
        task: round(1 / statistics.median(values), 3) if values else None
        for task, values in seconds.items()
    }


def _time(predictor: Predictor, image: Image) -> dict[str, float]:
    """Seconds by task of one image; the model runs once for both."""
    start = time.perf_counter()
    raw = list(predictor.raw([image]))
    model = time.perf_counter() - start
    found: dict[str, float] = {}
    for task, make in (("semantic", predictor.semantic), ("panoptic", predictor.panoptic)):
        if task in predictor.tasks:
            start = time.perf_counter()
            for one in raw:
                make(one)  # numpy arrays: a GPU has finished
            found[task] = model + time.perf_counter() - start
    return found


def resident(key: str) -> float | None:
    """MiB of this process as Linux tells it: VmRSS now, VmHWM at most; None elsewhere."""
    with suppress(OSError):
        lines = dict(line.split(":", 1) for line in _STATUS.read_text().splitlines())
        return int(lines[key].split()[0]) / 2**10
    return None
