"""What other offsets on the seen logits would give, from the same raw outputs of the model.

The offset is calibrated stacking (Chao et al., ECCV 2016): it trades seen for unseen classes. The
best one of a sweep over the scored images has seen their truth: an oracle, no result.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from concat_cli.core.data.dataset import Sample
from concat_cli.core.evaluate.panoptic import PanopticScore
from concat_cli.core.evaluate.semantic import SemanticScore, class_map
from concat_cli.core.infer.predictor import Predictor, Raw
from concat_cli.core.vocabulary import Vocabulary

STEPS = 11  # offsets between 0 and 0.3 of the logit scale, where the offsets of finetuning lie


@dataclass(frozen=True)
class OffsetFigures:
    """Figures in 0-1 at one offset; None where a task was not scored or a group does not occur."""

    offset: float
    seen_pq: float | None
    unseen_pq: float | None
    hpq: float | None
    seen_miou: float | None
    unseen_miou: float | None
    hiou: float | None


@dataclass(frozen=True)
class Calibration:
    """A sweep over offsets.

    plain: the offset of the report's other figures. dev: the offset that the weights carry because
    finetuning chose it on dev and seen classes set aside; None where it chose none. oracle_pq,
    oracle_miou: the best of the sweep by hPQ and hIoU, chosen on the very images that are scored.
    """

    rows: tuple[OffsetFigures, ...]
    plain: float
    dev: float | None
    oracle_pq: float | None
    oracle_miou: float | None


def sweep_offsets(scale: float, *others: float | None) -> tuple[float, ...]:
    """Offsets from 0 to 0.3 of the scale of the logits, and the others that are given."""
    steps = np.linspace(0, 0.3 * scale, STEPS).round(4).tolist()
    return tuple(sorted({*steps, *(one for one in others if one is not None)}))


class OffsetScore:
    """The counts at one offset; `state` is all there is."""

    def __init__(self, offset: float, classes: int, tasks: Sequence[str]) -> None:
        self.offset, self.tasks = offset, tasks
        self.panoptic, self.semantic = PanopticScore(classes), SemanticScore(classes)

    def add(
        self,
        predictor: Predictor,
        raw: Raw,
        samples: Sequence[Sample],
        to_truth: NDArray[np.int64],
    ) -> None:
        """Raw outputs of a few images; to_truth: class index of the predictor -> of the data."""
        if "panoptic" in self.tasks:
            found = predictor.panoptic(raw, self.offset)
            for sample, one in zip(samples, found, strict=True):
                labels = to_truth[np.array([s.class_index for s in one.segments], np.int64)]
                self.panoptic.add(
                    one.panoptic_map, labels, sample.segment_map, sample.labels, sample.crowd
                )
        if "semantic" in self.tasks:
            for sample, one in zip(samples, predictor.semantic(raw, self.offset), strict=True):
                self.semantic.add(to_truth[one], class_map(sample.segment_map, sample.labels))

    def merge(self, other: OffsetScore) -> None:
        """Adds the counts of another part of the images."""
        self.panoptic.merge(other.panoptic)
        self.semantic.merge(other.semantic)

    def figures(self, vocabulary: Vocabulary) -> OffsetFigures:
        """Seen, unseen and harmonic means."""
        result = self.panoptic.result()
        pq = [result.mean(c) for c in (vocabulary.seen_indices, vocabulary.unseen_indices)]
        seen_pq, unseen_pq = (None if one is None else one.pq for one in pq)
        seen_iou, unseen_iou = (
            self.semantic.mean(c) for c in (vocabulary.seen_indices, vocabulary.unseen_indices)
        )
        return OffsetFigures(
            self.offset,
            seen_pq, unseen_pq, _harmonic(seen_pq, unseen_pq),
            seen_iou, unseen_iou, _harmonic(seen_iou, unseen_iou),
        )  # fmt: skip


def calibration(
    scores: Sequence[OffsetScore], vocabulary: Vocabulary, plain: float, dev: float | None
) -> Calibration:
    """The sweep's figures, and the best of them; of equals the smallest offset."""
    rows = tuple(one.figures(vocabulary) for one in scores)
    by_pq = [(row.hpq, -row.offset) for row in rows if row.hpq is not None]
    by_iou = [(row.hiou, -row.offset) for row in rows if row.hiou is not None]
    return Calibration(
        rows,
        plain,
        dev,
        oracle_pq=-max(by_pq)[1] if by_pq else None,
        oracle_miou=-max(by_iou)[1] if by_iou else None,
    )


def _harmonic(seen: float | None, unseen: float | None) -> float | None:
    if seen is None or unseen is None:
        return None
    return 2 * seen * unseen / (seen + unseen) if seen + unseen else 0.0
