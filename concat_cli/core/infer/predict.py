"""Many pictures on disk -> predictions on disk, in shares over several processes."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from concat_cli.core.data.image_io import check_image
from concat_cli.core.infer.files import (
    WrittenPrediction,
    image_ids,
    output_names,
    write_index,
    write_prediction,
)
from concat_cli.core.infer.predictor import Predictor, to_array
from concat_cli.core.infer.render import overlay
from concat_cli.core.progress import SILENT, Progress

CHUNK = 8  # pictures in memory at a time


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
) -> list[PicturePrediction]:
    """Writes an overlay and an id PNG for each picture, then one `panoptic.json` for all.

    Every file is looked at before the first prediction; UserError names the one that is damaged.
    Each of several processes takes its share, all return everything, in the order of `paths`.
    """
    for path in paths:
        check_image(path)
    names = output_names(paths)
    ids = image_ids(names)
    mine = range(rank, len(paths), world)
    chunks = [mine[i : i + CHUNK] for i in range(0, len(mine), CHUNK)]
    done: dict[int, PicturePrediction] = {}
    for chunk in progress.track(chunks, f"predict, {CHUNK} pictures at a time", len(chunks)):
        start = time.perf_counter()
        images = [to_array(paths[index]) for index in chunk]
        load = round((time.perf_counter() - start) * 1000 / len(chunk), 2)
        found = predictor.predict_batch(images)
        for index, image, prediction in zip(chunk, images, found, strict=True):
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
    everything = {index: one for part in gather(done) for index, one in part.items()}
    ordered = [everything[index] for index in range(len(paths))]
    if rank == 0:
        write_index(out, (one.written for one in ordered), predictor.vocabulary)
    return ordered
