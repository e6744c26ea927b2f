"""Scores a predictor on a part of a data set, image by image, without keeping predictions."""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from concat_cli.core.data.dataset import PanopticDataset, Sample
from concat_cli.core.evaluate.diagnostics import MaskDiagnostics, mask_ious
from concat_cli.core.evaluate.panoptic import PanopticScore
from concat_cli.core.evaluate.report import Report, Split, make_report
from concat_cli.core.evaluate.semantic import SemanticScore, class_map
from concat_cli.core.infer.files import WrittenPrediction, write_index, write_prediction
from concat_cli.core.infer.postprocess import PanopticResult
from concat_cli.core.infer.predictor import Prediction, Predictor, RawOutput
from concat_cli.core.progress import SILENT, Progress
from concat_cli.core.vocabulary import Vocabulary

Gather = Callable[[Any], list[Any]]


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
    save_dir: Path | None = None,
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
        save_dir: write the predictions there as COCO panoptic files.
        workers: threads that decode images ahead.
        limit: only the first so many images.
        rank, world, gather: of several processes each takes its share of the images; `gather`
            returns a value of every process to every process, and all get the same report.
    """
    count = len(dataset) if limit is None else min(limit, len(dataset))
    scores = _Scores(predictor, dataset.vocabulary, with_semantic, with_diagnostics, save_dir)
    start = time.perf_counter()
    share = range(rank, count, world)
    samples = progress.track(_samples(dataset, share, workers, scores.clock), "score", len(share))
    for chunk in _chunks(samples, predictor.cfg.batch):
        scores.add(chunk)
    for part in gather(scores.state()):
        scores.merge(part)
    if save_dir is not None and rank == 0:
        write_index(save_dir, scores.all_written, predictor.vocabulary)
    return make_report(
        dataset.vocabulary,
        scores.panoptic,
        scores.semantic,
        split=split,
        protocol=_protocol(predictor, protocol, with_semantic),
        images=count,
        seconds=scores.clock | {"total": time.perf_counter() - start},
        diagnostics=scores.masks.result(dataset.vocabulary) if with_diagnostics else None,
        candidates=len(predictor.vocabulary),
    )


def _protocol(
    predictor: Predictor, given: dict[str, Any] | None, with_semantic: bool
) -> dict[str, Any]:
    """Generalised: every class of the vocabulary competes for every segment."""
    base = {
        "setting": "generalised",
        "mode": None,
        "seen_offset": predictor.cfg.seen_offset,
        "min_score": predictor.cfg.min_score,
        "overlap": predictor.cfg.overlap,
    }
    return base | ({"semantic_from": "queries"} if with_semantic else {}) | (given or {})


class _Scores:
    """All counts of one evaluation, and the seconds spent on loading, the model, and the rest."""

    def __init__(
        self,
        predictor: Predictor,
        vocabulary: Vocabulary,
        semantic: bool,
        diagnostics: bool,
        save_dir: Path | None,
    ) -> None:
        self.predictor, self.save_dir = predictor, save_dir
        self.with_semantic, self.with_masks = semantic, diagnostics
        # Class index of the predictor -> of the data set.
        self.to_truth = np.array([vocabulary.index_of_name[n] for n in predictor.vocabulary.names])
        self.clock = {"load": 0.0, "model": 0.0, "post": 0.0}
        self.written: list[WrittenPrediction] = []
        self._clear(len(vocabulary))

    def _clear(self, classes: int) -> None:
        self.panoptic, self.semantic = PanopticScore(classes), SemanticScore(classes)
        self.masks = MaskDiagnostics(classes)
        self.all_written: list[WrittenPrediction] = []

    def add(self, samples: list[Sample]) -> None:
        """Predicts and scores a few images."""
        start = time.perf_counter()
        for raw in self.predictor.raw([sample.image for sample in samples]):
            now = time.perf_counter()
            self.clock["model"] += now - start
            self._score(raw, [samples[position] for position in raw.positions])
            start = time.perf_counter()
            self.clock["post"] += start - now

    def _score(self, raw: RawOutput, samples: list[Sample]) -> None:
        for sample, result in zip(samples, self.predictor.panoptic(raw), strict=True):
            classes = np.array([s.class_index for s in result.segments], np.int64)
            self.panoptic.add(
                result.panoptic_map,
                self.to_truth[classes],
                sample.segment_map,
                sample.labels,
                sample.crowd,
            )
            if self.save_dir is not None:
                self.written.append(self._write(self.save_dir, sample, result))
        if self.with_semantic:
            for sample, found in zip(samples, self.predictor.semantic(raw), strict=True):
                self.semantic.add(
                    self.to_truth[found], class_map(sample.segment_map, sample.labels)
                )
        if self.with_masks:
            logits = self.predictor.offset_logits(raw.class_logits)
            for row, sample in enumerate(samples):
                self.masks.add(
                    mask_ious(
                        raw.mask_logits[row], sample.segment_map, len(sample.labels), raw.valid[row]
                    ),
                    self.to_truth[logits[row, :, :-1].argmax(-1).cpu().numpy()],
                    sample.labels,
                    sample.crowd,
                )

    def _write(self, out: Path, sample: Sample, result: PanopticResult) -> WrittenPrediction:
        prediction = Prediction(
            result.panoptic_map, result.segments, self.predictor.vocabulary, {}, _not_kept
        )
        name = Path(sample.file_name).with_suffix("").as_posix().replace("/", "_")
        return write_prediction(
            out, name, prediction, image_id=sample.image_id, file_name=sample.file_name
        )

    def state(self) -> dict[str, Any]:
        """Hands out everything that is summed over processes, picklable, and starts from zero."""
        state = {
            "panoptic": self.panoptic.counts,
            "semantic": self.semantic.matrix,
            "masks": self.masks.counts,
            "clock": self.clock,
            "written": self.written,
        }
        self._clear(self.panoptic.counts.shape[1])
        return state

    def merge(self, part: dict[str, Any]) -> None:
        """Adds the counts of one process; seconds are those of the slowest."""
        self.panoptic.counts += part["panoptic"]
        self.semantic.matrix += part["semantic"]
        self.masks.counts += part["masks"]
        self.clock = {name: max(value, part["clock"][name]) for name, value in self.clock.items()}
        self.all_written += part["written"]


def _not_kept() -> NDArray[np.int32]:
    raise AssertionError("evaluation keeps no semantic maps")


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


def _chunks(samples: Iterator[Sample], size: int) -> Iterator[list[Sample]]:
    chunk: list[Sample] = []
    for sample in samples:
        chunk.append(sample)
        if len(chunk) == size:
            yield chunk
            chunk = []
    if chunk:
        yield chunk
