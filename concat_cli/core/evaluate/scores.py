"""Everything that one evaluation counts, image by image."""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from concat_cli.core.data.dataset import Sample, keep_segments
from concat_cli.core.evaluate.checks import TruthCheck, truth_indices
from concat_cli.core.evaluate.counts import ImageCounts, SparseCounts, merged
from concat_cli.core.evaluate.diagnostics import MaskDiagnostics, mask_ious
from concat_cli.core.evaluate.instance import InstanceScore, true_instances
from concat_cli.core.evaluate.offsets import OffsetScore
from concat_cli.core.evaluate.panoptic import PanopticScore
from concat_cli.core.evaluate.semantic import SemanticScore, class_map
from concat_cli.core.infer.files import Saver, segment_entries
from concat_cli.core.infer.postprocess import bounding_boxes
from concat_cli.core.infer.predictor import Predictor, Raw, RawOutput
from concat_cli.core.vocabulary import Vocabulary


@dataclass(frozen=True)
class Wanted:
    """What is counted.

    tasks: panoptic, semantic, instance. restricted: truth of classes that are no candidates becomes
    void. check: stop where the truth is next to nothing.
    """

    tasks: tuple[str, ...]
    diagnostics: bool = False
    counts: bool = False
    offsets: tuple[float, ...] = ()
    restricted: bool = False
    check: bool = False


class Scores:
    """All counts of one evaluation, and the seconds spent on loading, the model, and the rest."""

    def __init__(
        self,
        predictor: Predictor,
        vocabulary: Vocabulary,
        wanted: Wanted,
        saver: Saver | None,
        truth_saver: Saver | None,
    ) -> None:
        self.predictor, self.vocabulary, self.wanted = predictor, vocabulary, wanted
        self.saver, self.truth_saver = saver, truth_saver
        self.to_truth = truth_indices(predictor.vocabulary, vocabulary)
        self.clock = {"load": 0.0, "model": 0.0, "post": 0.0}
        self.check = TruthCheck(wanted.tasks) if wanted.check else None
        self._clear()

    def _clear(self) -> None:
        classes, wanted = len(self.vocabulary), self.wanted
        self.panoptic, self.semantic = PanopticScore(classes), SemanticScore(classes)
        self.instance, self.masks = InstanceScore(), MaskDiagnostics(classes)
        self.sweep = [OffsetScore(o, classes, wanted.tasks) for o in wanted.offsets]
        kept = {name for name in wanted.tasks if wanted.counts}
        self.counts = ImageCounts(
            0,
            SparseCounts(4, classes) if "panoptic" in kept else None,
            SparseCounts(3, classes) if "semantic" in kept else None,
        )

    def add(self, numbers: Sequence[int], samples: Sequence[Sample]) -> None:
        """Predicts and scores a few images, given with their numbers in the data set."""
        samples = [self._as_scored(sample) for sample in samples]
        start = time.perf_counter()
        for raw in self.predictor.raw([sample.image for sample in samples]):
            now = time.perf_counter()
            self.clock["model"] += now - start
            rows = raw.positions
            self._score(raw, [numbers[r] for r in rows], [samples[r] for r in rows])
            start = time.perf_counter()
            self.clock["post"] += start - now

    def _as_scored(self, sample: Sample) -> Sample:
        """The truth as it is scored."""
        if self.check is not None:
            self.check.add(sample)
        if self.wanted.restricted:
            return keep_segments(sample, np.isin(sample.labels, self.to_truth))
        return sample

    def _score(self, raw: Raw, numbers: Sequence[int], samples: Sequence[Sample]) -> None:
        tasks = self.wanted.tasks
        if "panoptic" in tasks:
            self._score_panoptic(raw, numbers, samples)
        if "semantic" in tasks:
            self._score_semantic(raw, numbers, samples)
        if "instance" in tasks:
            self._score_instances(raw, samples)
        if self.wanted.diagnostics:
            self._score_masks(raw, samples)
        for one in self.sweep:
            one.add(self.predictor, raw, samples, self.to_truth)

    def _score_panoptic(self, raw: Raw, numbers: Sequence[int], samples: Sequence[Sample]) -> None:
        results = self.predictor.panoptic(raw)
        for number, sample, result in zip(numbers, samples, results, strict=True):
            classes = np.array([s.class_index for s in result.segments], np.int64)
            one = PanopticScore(len(self.vocabulary))
            one.add(
                result.panoptic_map,
                self.to_truth[classes],
                sample.segment_map,
                sample.labels,
                sample.crowd,
            )
            self.panoptic.merge(one)
            if self.counts.panoptic is not None:
                self.counts.panoptic.add(number, one.counts)
            if self.saver is not None:
                entries = segment_entries(result.segments, self.predictor.vocabulary)
                name = sample.file_name
                self.saver.panoptic(sample.image_id, name, result.panoptic_map, entries)
            if self.truth_saver is not None:
                self.truth_saver.panoptic(
                    sample.image_id,
                    sample.file_name,
                    sample.segment_map,
                    true_entries(sample, self.vocabulary),
                )

    def _score_semantic(self, raw: Raw, numbers: Sequence[int], samples: Sequence[Sample]) -> None:
        maps = self.predictor.semantic(raw)
        for number, sample, found in zip(numbers, samples, maps, strict=True):
            truth = class_map(sample.segment_map, sample.labels)
            counts = self.semantic.add(self.to_truth[found], truth)
            if self.counts.semantic is not None:
                self.counts.semantic.add(number, counts)
            if self.saver is not None:
                self.saver.semantic(sample.file_name, found)

    def _score_instances(self, raw: Raw, samples: Sequence[Sample]) -> None:
        for sample, found in zip(samples, self.predictor.instances(raw), strict=True):
            truth = true_instances(
                sample.segment_map, sample.labels, sample.crowd, self.vocabulary.is_thing
            )
            self.instance.add(sample.image_id, found, truth, self.to_truth)
            if self.saver is not None:
                self.saver.instances(sample.image_id, found)

    def _score_masks(self, raw: Raw, samples: Sequence[Sample]) -> None:
        if not isinstance(raw, RawOutput):
            return  # a model without queries
        named = self.predictor.probabilities(raw, self.predictor.cfg.seen_offset)
        for row, sample in enumerate(samples):
            self.masks.add(
                mask_ious(
                    raw.mask_logits[row], sample.segment_map, len(sample.labels), raw.valid[row]
                ),
                self.to_truth[named[row, :, :-1].argmax(-1).cpu().numpy()],
                sample.labels,
                sample.crowd,
            )

    def state(self) -> dict[str, Any]:
        """Hands out everything that is summed over processes, picklable, and starts from zero."""
        if self.check is not None:
            self.check.judge()
        state = {
            "panoptic": self.panoptic,
            "semantic": self.semantic,
            "instance": self.instance,
            "masks": self.masks.counts,
            "sweep": self.sweep,
            "counts": (self.counts.panoptic, self.counts.semantic),
            "clock": self.clock,
            "saved": [None if s is None else s.state() for s in (self.saver, self.truth_saver)],
        }
        self._clear()
        return state

    def merge(self, parts: Sequence[dict[str, Any]], images: int) -> None:
        """Adds what all processes counted; seconds are those of the slowest."""
        for part in parts:
            self.panoptic.merge(part["panoptic"])
            self.semantic.merge(part["semantic"])
            self.instance.merge(part["instance"])
            self.masks.counts += part["masks"]
            for mine, theirs in zip(self.sweep, part["sweep"], strict=True):
                mine.merge(theirs)
            self.clock = {name: max(v, part["clock"][name]) for name, v in self.clock.items()}
        panoptic, semantic = zip(*(part["counts"] for part in parts), strict=True)
        self.counts = ImageCounts(images, merged(panoptic), merged(semantic))

    def finish_files(self, parts: Sequence[dict[str, Any]]) -> None:
        """Writes the JSON files of everything that was saved."""
        for number, saver in enumerate((self.saver, self.truth_saver)):
            if saver is not None:
                saver.finish(part["saved"][number] for part in parts)

    def abandon_files(self) -> None:
        """Deletes temporary files after an error."""
        for saver in (self.saver, self.truth_saver):
            if saver is not None:
                saver.abandon()


def true_entries(sample: Sample, vocabulary: Vocabulary) -> list[dict[str, Any]]:
    """`segments_info` of a sample's truth, segment i with the id i+1."""
    boxes = bounding_boxes(sample.segment_map, len(sample.labels)).tolist()
    areas = np.bincount(sample.segment_map.ravel(), minlength=len(sample.labels) + 1)[1:]
    return [
        {
            "id": number,
            "category_id": vocabulary.ids[label],
            "area": int(area),
            "bbox": box,
            "iscrowd": int(crowd),
        }
        for number, (label, area, box, crowd) in enumerate(
            zip(sample.labels, areas, boxes, sample.crowd, strict=True), 1
        )
        if area
    ]
