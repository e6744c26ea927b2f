"""Scores a predictor on a part of a data set, image by image, without keeping predictions."""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Collection, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from itertools import islice
from typing import Any

import numpy as np
from numpy.typing import NDArray

from concat_cli.core.data.dataset import PanopticDataset, Sample, keep_segments
from concat_cli.core.device import ALONE, Share
from concat_cli.core.errors import UserError
from concat_cli.core.evaluate.instance import true_instances
from concat_cli.core.evaluate.page.outcomes import Overlap, regions
from concat_cli.core.evaluate.page.pictures import picture_of
from concat_cli.core.evaluate.quality import (
    BoolArray,
    IntArray,
    class_map,
    mask_ious,
    overlaps,
)
from concat_cli.core.evaluate.report import Report, make_report
from concat_cli.core.evaluate.scores import (
    NO_SWEEP,
    PLAIN,
    Scoring,
    Sweep,
    Tally,
    TruthCheck,
    calibration,
    few_images,
)
from concat_cli.core.infer.files import Saver, flat_names
from concat_cli.core.infer.postprocess import PanopticResult
from concat_cli.core.infer.prediction import segment_entries
from concat_cli.core.infer.predictor import Predictor, Raw, RawOutput
from concat_cli.core.progress import SILENT, Progress
from concat_cli.core.vocabulary import Vocabulary

USUAL = ("panoptic", "semantic")


def evaluate_model(
    predictor: Predictor,
    dataset: PanopticDataset,
    scoring: Scoring = PLAIN,
    *,
    sweep: Sweep = NO_SWEEP,
    protocol: Mapping[str, Any] | None = None,
    workers: int = 0,
    share: Share = ALONE,
    progress: Progress = SILENT,
) -> Report:
    """Scores every image of `dataset` (made with `keep_crowd=True` where crowds matter).

    The predictor's classes, the candidates, are all or some of the data set's, by name.

    Args:
        sweep: seen offsets that are tried on the same raw outputs, beside the predictor's own.
        protocol: what the report says of the weights (mode, stage, class split, ...).
        workers: threads that decode images ahead.
        share: of several processes each takes its share of the images, and all get one report.
    """
    count = len(dataset) if scoring.limit is None else min(scoring.limit, len(dataset))
    if scoring.check and not count:
        raise UserError("The data set's part has no image to score.", "Prepare it again.")
    few_images(scoring.bootstraps, count, progress)
    start = time.perf_counter()
    tasks = scoring.task_names() or USUAL
    keep = scoring.counts or scoring.bootstraps > 0
    whole, tally = (
        Tally(len(dataset.vocabulary), count, tasks, keep, sweep.offsets) for _ in range(2)
    )
    if keep:
        whole.each.names = tuple(one.file_name for one in islice(dataset.records, count))
    whole.findings, tally.findings = (scoring.findings(dataset.vocabulary) for _ in range(2))
    saver = None
    if scoring.save is not None:
        saver = Saver(scoring.save, predictor.vocabulary, share.rank)
    names = [] if saver is None else flat_names(one.file_name for one in dataset.records)
    scorer = Scorer(predictor, dataset.vocabulary, scoring, tasks, tally, saver, names)
    mine = share.of(count)
    try:
        samples = _samples(dataset, mine, workers)
        shown = progress.track(zip(mine, samples, strict=True), "score", len(mine))
        while True:
            waiting = time.perf_counter()
            chunk = list(islice(shown, predictor.cfg.batch))
            tally.clock["load"] += time.perf_counter() - waiting
            if not chunk:
                break
            scorer.add([number for number, _ in chunk], [sample for _, sample in chunk])
        if scorer.check is not None:
            scorer.check.judge()
        parts = share.gather((tally, None if saver is None else saver.state()))
        for other, _ in parts:
            whole.merge(other)
        if saver is not None and share.rank == 0:
            saver.finish(saved for _, saved in parts)
    except BaseException:
        if saver is not None:
            saver.abandon()
        raise
    plain = predictor.cfg.seen_offset
    facts: dict[str, Any] = {
        "setting": "restricted" if scoring.candidates == "split" else "generalised",
        "mode": None,
        "seen_offset": plain,
        "min_score": predictor.cfg.min_score,
        "overlap_threshold": predictor.cfg.overlap,
    }
    if predictor.cfg.joint_stuff:
        facts["joint_stuff"] = True
    if "semantic" in tasks:
        facts["semantic_from"] = predictor.semantic_from
    if "instance" in tasks:
        facts["instance_truth"] = "panoptic segments"
    return make_report(
        whole,
        dataset.vocabulary,
        scoring,
        tasks,
        protocol=facts | dict(protocol or {}) | {"candidates": len(predictor.vocabulary)},
        seconds=whole.clock | {"total": time.perf_counter() - start},
        calibration=calibration(whole, dataset.vocabulary, plain, sweep.dev),
    )


class Scorer:
    """Predicts images, adds them to a tally, and writes what is to be saved."""

    def __init__(
        self,
        predictor: Predictor,
        vocabulary: Vocabulary,
        scoring: Scoring,
        tasks: Collection[str],
        tally: Tally,
        saver: Saver | None,
        names: Sequence[str] = (),
    ) -> None:
        self.predictor, self.vocabulary, self.scoring = predictor, vocabulary, scoring
        self.tasks, self.tally, self.saver, self.names = tasks, tally, saver, names
        self.to_truth = truth_indices(predictor.vocabulary, vocabulary)
        self.check = TruthCheck(tasks) if scoring.check else None

    def add(self, numbers: Sequence[int], samples: Sequence[Sample]) -> None:
        """Predicts and scores a few images, given with their numbers in the data set."""
        samples = [self._as_scored(sample) for sample in samples]
        start = time.perf_counter()
        for raw in self.predictor.raw([sample.image for sample in samples]):
            now = time.perf_counter()
            self.tally.clock["model"] += now - start
            rows = raw.positions
            self._score(raw, [numbers[r] for r in rows], [samples[r] for r in rows])
            start = time.perf_counter()
            self.tally.clock["post"] += start - now

    def _as_scored(self, sample: Sample) -> Sample:
        """The truth as it is scored."""
        if self.check is not None:
            self.check.add(sample)
        if self.scoring.candidates == "split":
            return keep_segments(sample, np.isin(sample.labels, self.to_truth))
        return sample

    def _score(self, raw: Raw, numbers: Sequence[int], samples: Sequence[Sample]) -> None:
        if "panoptic" in self.tasks:
            self._score_panoptic(raw, numbers, samples)
        if "semantic" in self.tasks:
            self._score_semantic(raw, numbers, samples)
        if "instance" in self.tasks:
            self._score_instances(raw, samples)
        if self.scoring.diagnostics and isinstance(raw, RawOutput):  # else there are no queries
            self._score_masks(raw, samples)
        for offset, (panoptic, semantic) in self.tally.sweep.items():
            if "panoptic" in self.tasks:
                found = self.predictor.panoptic(raw, offset)
                for sample, one in zip(samples, found, strict=True):
                    panoptic.add(*self._segments(one), *truth_of(sample))
            if "semantic" in self.tasks:
                maps = self.predictor.semantic(raw, offset)
                for sample, one in zip(samples, maps, strict=True):
                    semantic.add(self.to_truth[one], class_map(sample.segment_map, sample.labels))

    def _score_panoptic(self, raw: Raw, numbers: Sequence[int], samples: Sequence[Sample]) -> None:
        results = self.predictor.panoptic(raw)
        for number, sample, result in zip(numbers, samples, results, strict=True):
            self.tally.add_panoptic(number, self._segments(result), truth_of(sample))
            scores = [segment.score for segment in result.segments]
            self._look(number, sample, self._segments(result), scores)
            if self.saver is not None:
                entries = segment_entries(result.segments, self.predictor.vocabulary)
                image = sample.image_id, sample.file_name
                self.saver.panoptic(*image, result.panoptic_map, entries, self.names[number])

    def _segments(self, found: PanopticResult) -> tuple[IntArray, IntArray]:
        labels = [segment.class_index for segment in found.segments]
        return found.panoptic_map, self.to_truth[np.array(labels, np.int64)]

    def _look(
        self,
        number: int,
        sample: Sample,
        found: tuple[IntArray, IntArray],
        scores: Sequence[float] = (),
    ) -> None:
        """Adds an image to what a report page shows, where one is made. Where no segments are
        scored, all that is of one class is one segment, in the truth as well."""
        findings = self.tally.findings
        if findings is None:
            return
        (real, labels, crowd), (segment_map, named) = truth_of(sample), found
        if "panoptic" not in self.tasks:
            real, labels = regions(class_map(real, labels))
            crowd = np.zeros(len(labels), bool)
        shared = overlaps(real, segment_map, len(labels), len(named))
        findings.add(
            number,
            sample.file_name,
            Overlap(shared, labels, crowd, named),
            lambda: picture_of(sample.image, real, segment_map),
            scores,
        )

    def _score_semantic(self, raw: Raw, numbers: Sequence[int], samples: Sequence[Sample]) -> None:
        maps = self.predictor.semantic(raw)
        for number, sample, found in zip(numbers, samples, maps, strict=True):
            truth = class_map(sample.segment_map, sample.labels)
            self.tally.add_semantic(number, self.to_truth[found], truth)
            if "panoptic" not in self.tasks:
                self._look(number, sample, regions(self.to_truth[found]))
            if self.saver is not None:
                self.saver.semantic(found, self.names[number])

    def _score_instances(self, raw: Raw, samples: Sequence[Sample]) -> None:
        for sample, found in zip(samples, self.predictor.instances(raw), strict=True):
            truth = true_instances(*truth_of(sample), self.vocabulary.is_thing)
            self.tally.instance.add(sample.image_id, found, truth, self.to_truth)
            if self.saver is not None:
                self.saver.instances(sample.image_id, found)

    def _score_masks(self, raw: RawOutput, samples: Sequence[Sample]) -> None:
        named = self.predictor.probabilities(raw, self.predictor.cfg.seen_offset)
        for row, sample in enumerate(samples):
            size = len(sample.labels), raw.valid[row]
            self.tally.masks.add(
                mask_ious(raw.mask_logits[row], sample.segment_map, *size),
                self.to_truth[named[row, :, :-1].argmax(-1).cpu().numpy()],
                sample.labels,
                sample.crowd,
            )


def truth_indices(candidates: Vocabulary, vocabulary: Vocabulary) -> NDArray[np.int64]:
    """(K,) class indices of the data set for those of the candidates; UserError for other names."""
    missing = [name for name in candidates.names if name not in vocabulary.index_of_name]
    if missing:
        which = "None" if len(missing) == len(candidates) else "Not every one"
        raise UserError(
            f"{which} of the {len(candidates)} classes that the predictor names is a class of the "
            f"data set: it lacks {', '.join(map(repr, missing[:3]))}. What it finds of them would "
            "count for nothing.",
            "Let it name the data set's classes: Predictor.load(weights, info.vocabulary).",
        )
    return np.array([vocabulary.index_of_name[name] for name in candidates.names], np.int64)


def truth_of(sample: Sample) -> tuple[IntArray, IntArray, BoolArray]:
    """The map of true segments, and what they are."""
    return sample.segment_map, sample.labels, sample.crowd


def _samples(dataset: PanopticDataset, indices: Sequence[int], workers: int) -> Iterator[Sample]:
    """The samples in order; by threads, decoded up to a few ahead."""
    if workers == 0:
        yield from map(dataset.__getitem__, indices)
        return
    with ThreadPoolExecutor(workers) as pool:
        waiting = iter(indices)
        ahead = deque(pool.submit(dataset.__getitem__, i) for i in islice(waiting, 4 * workers))
        while ahead:
            ahead.extend(pool.submit(dataset.__getitem__, i) for i in islice(waiting, 1))
            yield ahead.popleft().result()
