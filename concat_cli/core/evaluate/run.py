"""Scores a predictor on a part of a data set, image by image, without keeping predictions."""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Callable, Collection, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import Any, TypeVar

from concat_cli.core.data.dataset import PanopticDataset, Sample
from concat_cli.core.errors import UserError
from concat_cli.core.evaluate.bootstrap import bootstrap
from concat_cli.core.evaluate.offsets import calibration
from concat_cli.core.evaluate.report import Report, Split, make_report
from concat_cli.core.evaluate.scores import Scores, Wanted
from concat_cli.core.infer.files import Saver
from concat_cli.core.infer.predictor import Predictor
from concat_cli.core.method import TASKS
from concat_cli.core.progress import SILENT, Progress

Gather = Callable[[Any], list[Any]]
T = TypeVar("T")


def alone(value: Any) -> list[Any]:
    """The gather of a single process."""
    return [value]


def evaluate_model(
    predictor: Predictor,
    dataset: PanopticDataset,
    *,
    split: Split = "all",
    protocol: dict[str, Any] | None = None,
    with_semantic: bool = True,
    with_diagnostics: bool = False,
    with_counts: bool = False,
    tasks: Collection[str] | None = None,
    bootstraps: int = 0,
    offsets: Sequence[float] = (),
    dev_offset: float | None = None,
    restricted: bool = False,
    check: bool = False,
    save_dir: Path | None = None,
    truth_dir: Path | None = None,
    workers: int = 0,
    limit: int | None = None,
    rank: int = 0,
    world: int = 1,
    gather: Gather = alone,
    progress: Progress = SILENT,
) -> Report:
    """Scores every image of `dataset` (made with `keep_crowd=True` where crowds matter).

    The predictor's classes, the candidates, are all or some of the data set's, by name.

    Args:
        split: which classes are reported; all candidates compete.
        protocol: what the report says of the weights (mode, stage, class split, ...).
        with_semantic: also score semantic maps; half of the time on small images.
        with_diagnostics: also fill `Report.diagnostics` (mask recall, matched accuracy).
        with_counts: also fill `Report.counts`, the counts of every image.
        tasks: of panoptic, semantic and instance; None: panoptic, and semantic by `with_semantic`.
        bootstraps: how often the images are drawn again for 95% intervals; 0: no intervals.
        offsets: seen offsets that are tried on the same raw outputs, beside the predictor's own.
        dev_offset: the one that was chosen without val, for the report.
        restricted: truth of classes that are no candidates is void: the easier protocol.
        check: UserError where the truth is next to nothing.
        save_dir: write the predictions there (`infer/files.py`).
        truth_dir: write the panoptic truth there, as COCO panoptic files.
        workers: threads that decode images ahead.
        limit: only the first so many images.
        rank, world, gather: of several processes each takes its share of the images; `gather`
            returns a value of every process to every process, and all get the same report.
    """
    chosen = tasks if tasks is not None else ("panoptic", "semantic")[: 1 + with_semantic]
    wanted = Wanted(
        tuple(task for task in TASKS if task in chosen),
        with_diagnostics,
        with_counts or bootstraps > 0,
        tuple(offsets),
        restricted,
        check,
    )
    vocabulary = dataset.vocabulary
    count = len(dataset) if limit is None else min(limit, len(dataset))
    if check and not count:
        raise UserError("The data set's part has no image to score.", "Prepare it again.")
    start = time.perf_counter()
    scores = Scores(
        predictor,
        vocabulary,
        wanted,
        None if save_dir is None else Saver(save_dir, predictor.vocabulary, rank),
        None if truth_dir is None else Saver(truth_dir, vocabulary, rank),
    )
    share = range(rank, count, world)
    try:
        samples = _samples(dataset, share, workers, scores.clock)
        shown = progress.track(zip(share, samples, strict=True), "score", len(share))
        for chunk in _chunks(shown, predictor.cfg.batch):
            scores.add([number for number, _ in chunk], [sample for _, sample in chunk])
        parts = gather(scores.state())
        scores.merge(parts, count)
        if rank == 0:
            scores.finish_files(parts)
    except BaseException:
        scores.abandon_files()
        raise
    plain = predictor.cfg.seen_offset
    return make_report(
        vocabulary,
        scores.panoptic,
        scores.semantic,
        instance=scores.instance,
        tasks=wanted.tasks,
        split=split,
        protocol=_protocol(predictor, protocol, wanted),
        images=count,
        seconds=scores.clock | {"total": time.perf_counter() - start},
        diagnostics=scores.masks.result(vocabulary) if with_diagnostics else None,
        candidates=len(predictor.vocabulary),
        intervals=bootstrap(scores.counts, vocabulary, bootstraps) if bootstraps else None,
        calibration=(
            calibration(scores.sweep, vocabulary, plain, dev_offset) if scores.sweep else None
        ),
        counts=scores.counts if with_counts else None,
    )


def _protocol(predictor: Predictor, given: dict[str, Any] | None, wanted: Wanted) -> dict[str, Any]:
    """Generalised: every class of the vocabulary competes for every segment."""
    base = {
        "setting": "restricted" if wanted.restricted else "generalised",
        "mode": None,
        "seen_offset": predictor.cfg.seen_offset,
        "min_score": predictor.cfg.min_score,
        "overlap_threshold": predictor.cfg.overlap,
    }
    if "semantic" in wanted.tasks:
        base["semantic_from"] = predictor.semantic_from
    if "instance" in wanted.tasks:
        base["instance_truth"] = "panoptic segments"
    return base | (given or {})


def _samples(
    dataset: PanopticDataset, indices: Sequence[int], workers: int, clock: dict[str, float]
) -> Iterator[Sample]:
    """The samples in order, decoded up to a few ahead by threads; waiting is booked as "load"."""
    if workers == 0:
        for index in indices:
            with _timed(clock):
                sample = dataset[index]
            yield sample
        return
    with ThreadPoolExecutor(workers) as pool:
        ahead: deque[Future[Sample]] = deque()
        for index in indices:
            ahead.append(pool.submit(dataset.__getitem__, index))
            if len(ahead) > 4 * workers:
                yield _result(ahead, clock)
        while ahead:
            yield _result(ahead, clock)


def _result(ahead: deque[Future[Sample]], clock: dict[str, float]) -> Sample:
    with _timed(clock):
        return ahead.popleft().result()


@contextmanager
def _timed(clock: dict[str, float]) -> Iterator[None]:
    start = time.perf_counter()
    yield
    clock["load"] += time.perf_counter() - start


def _chunks(items: Iterator[T], size: int) -> Iterator[list[T]]:
    chunk: list[T] = []
    for item in items:
        chunk.append(item)
        if len(chunk) == size:
            yield chunk
            chunk = []
    if chunk:
        yield chunk
