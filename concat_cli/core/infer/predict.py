"""Many pictures on disk -> predictions on disk, in shares over several processes."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from concat_cli.core.errors import UserError
from concat_cli.core.infer.files import (
    WrittenPrediction,
    image_ids,
    index_name,
    output_names,
    write_index,
    write_prediction,
)
from concat_cli.core.infer.outputs import to_array
from concat_cli.core.infer.predictor import Predictor
from concat_cli.core.infer.render import overlay
from concat_cli.core.progress import SILENT, Progress

CHUNK = 8  # pictures in memory at a time


@dataclass(frozen=True)
class Predicted:
    """What came of many pictures: predictions in their order, an error for each unreadable one, and
    the JSON that lists the predictions."""

    pictures: list[PicturePrediction]
    unreadable: list[UserError]
    index: Path


@dataclass(frozen=True)
class PicturePrediction:
    """What was found in one picture and where it was written. milliseconds: load, model, post."""

    path: Path
    written: WrittenPrediction
    milliseconds: dict[str, float]

    @property
    def segments(self) -> list[dict[str, Any]]:
        """COCO panoptic entries with `name` and `score`, the largest first."""
        found: list[dict[str, Any]] = self.written.annotation["segments_info"]
        return sorted(found, key=lambda segment: -segment["area"])


def predict_paths(
    predictor: Predictor,
    paths: Sequence[Path],
    out: Path,
    *,
    rank: int = 0,
    world: int = 1,
    gather: Callable[[Any], list[Any]] = lambda value: [value],
    progress: Progress = SILENT,
) -> Predicted:
    """Writes an overlay and a PNG for each picture, then one JSON for all; see `files.py`.

    Pictures that cannot be read are left out and named in the result.
    Each of several processes takes its share, all return everything, in the order of `paths`.
    """
    is_panoptic = "panoptic" in predictor.tasks
    names = output_names(paths)
    ids = image_ids(names)
    mine = range(rank, len(paths), world)
    chunks = [mine[i : i + CHUNK] for i in range(0, len(mine), CHUNK)]
    done: dict[int, PicturePrediction] = {}
    broken: dict[int, UserError] = {}
    for chunk in progress.track(chunks, f"predict, {CHUNK} pictures at a time", len(chunks)):
        start = time.perf_counter()
        images: dict[int, np.ndarray] = {}
        for index in chunk:
            try:
                images[index] = to_array(paths[index])
            except UserError as error:
                broken[index] = error
        load = round((time.perf_counter() - start) * 1000 / len(chunk), 2)
        found = predictor.predict_batch(list(images.values()))
        for (index, image), prediction in zip(images.items(), found, strict=True):
            written = write_prediction(
                out,
                names[index],
                prediction,
                image_id=ids[index],
                file_name=paths[index].as_posix(),
                overlay=overlay(image, prediction),
            )
            times = prediction.milliseconds | {"load": load}
            done[index] = PicturePrediction(paths[index], written, times)
    parts = gather((done, broken))
    everything = {index: one for part, _ in parts for index, one in part.items()}
    unreadable = {index: error for _, part in parts for index, error in part.items()}
    ordered = [everything[index] for index in sorted(everything)]
    if rank == 0:
        written = (one.written for one in ordered)
        write_index(out, written, predictor.vocabulary, is_panoptic)
    faults = [unreadable[index] for index in sorted(unreadable)]
    return Predicted(ordered, faults, out / index_name(is_panoptic))
