"""How to score, and everything that is counted while scoring."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Literal

import numpy as np
from numpy.typing import NDArray

from concat_cli.core.errors import UserError
from concat_cli.core.evaluate.instance import InstanceScore
from concat_cli.core.evaluate.intervals import ImageCounts, harmonic
from concat_cli.core.evaluate.page.findings import KEPT, Findings
from concat_cli.core.evaluate.quality import (
    BoolArray,
    FloatArray,
    IntArray,
    MaskScore,
    PanopticScore,
    SemanticScore,
)
from concat_cli.core.method import TASKS
from concat_cli.core.progress import Progress
from concat_cli.core.vocabulary import Vocabulary

if TYPE_CHECKING:  # it imports torch, which the scoring of files has no need of
    from concat_cli.core.data.dataset import Sample

Split = Literal["all", "seen", "unseen"]
Candidates = Literal["all", "split"]
MOST_VOID = 0.95  # of the pixels: a truth of single objects on void is still scored
EARLY = 32  # images after which the truth is judged for the first time
FEW = 30  # images below which percentiles of the bootstrap cover clearly less than they say
STEPS = 11  # offsets between 0 and 0.3 of the logit scale, where the offsets of finetuning lie


@dataclass(frozen=True)
class Scoring:
    """How to score: the options of `concat evaluate`, and what only code asks for.

    split: the classes that are reported. candidates: the classes that compete, all of them or
        those of `split` alone; then all other truth is void, the easier protocol.
    tasks: of panoptic, semantic and instance, as names or as one text with commas; None: the first
        two, as far as truth and weights go.
    bootstraps: how often the images are drawn again for 95% intervals; 0: no intervals.
    calibrate: also try offsets on the seen logits, on the same outputs of the model.
    diagnostics: also find how many true segments get a mask, and of these the right name.
    official: of files, also ask panopticapi; UserError where it disagrees.
    save: a folder for the predictions.
    limit: only the first so many images.
    counts: keep the counts of every image in `Report.counts`.
    look: gather what a report page shows in `Report.findings`.
    images: of files, only those of these names, all of which `look` keeps then; empty: all.
    pictures: of files, the folder of the images that a report page shows.
    check: UserError where the truth is next to nothing.
    force: also report a split whose unseen classes the weights were trained on, and names with
        words that the built-in CLIP never saw.
    """

    split: Split = "all"
    candidates: Candidates = "all"
    tasks: Collection[str] | str | None = None
    bootstraps: int = 0
    calibrate: bool = False
    diagnostics: bool = False
    official: bool = False
    save: Path | None = None
    limit: int | None = None
    counts: bool = False
    look: bool = False
    images: frozenset[str] = frozenset()
    pictures: Path | None = None
    check: bool = True
    force: bool = False

    def task_names(self) -> tuple[str, ...] | None:
        """The tasks that were asked for; UserError for others, and for none."""
        if self.tasks is None:
            return None
        words = self.tasks.split(",") if isinstance(self.tasks, str) else self.tasks
        names = [word.strip() for word in words if word.strip()]
        unknown = [name for name in names if name not in TASKS]
        if unknown or not names:
            what = f"There is no task {unknown[0]!r}." if unknown else "--tasks names no task."
            raise UserError(what, f"Tasks are {', '.join(TASKS)}, separated by commas.")
        return tuple(task for task in TASKS if task in names)

    def findings(self, vocabulary: Vocabulary) -> Findings | None:
        """To gather what a page shows; None where none is made."""
        return Findings(vocabulary, len(self.images) or KEPT) if self.look else None


PLAIN = Scoring()


def check_split(split: Split, vocabulary: Vocabulary) -> None:
    """UserError for a split that has no class: its table would be empty."""
    if split != "all" and not any(seen == (split == "seen") for seen in vocabulary.is_seen):
        what = f"None of the {len(vocabulary)} classes is {split}: there is nothing to report."
        raise UserError(what, "Leave --split out, or divide the classes with another class split.")


def check_divided(split: Split, unseen: Collection[str] | None) -> None:
    """UserError for a split where nobody says which classes are unseen (None)."""
    if unseen is None and split != "all":
        what = f"Nobody says which classes are {split}."
        raise UserError(what, "Give --class-split, or leave --split out.")


def few_images(bootstraps: int, images: int, progress: Progress) -> None:
    """Says so where intervals are asked for from too few images."""
    if bootstraps and images < FEW:
        progress.say(
            f"intervals of {images} images: below {FEW} they are too narrow, as the images drawn "
            "again hold no others"
        )


class Tally:
    """All counts of one evaluation; picklable, and those of several processes merge.

    images: how many are scored, over all processes. clock: seconds of loading, the model, and the
    rest. sweep: by offset on the seen logits, scores of panoptic and of semantic maps.
    """

    def __init__(
        self,
        classes: int,
        images: int,
        tasks: Collection[str],
        keep: bool = False,
        offsets: Sequence[float] = (),
    ) -> None:
        self.findings: Findings | None = None  # of a report page, where one is made
        self.panoptic, self.semantic = PanopticScore(classes), SemanticScore(classes)
        self.instance, self.masks = InstanceScore(), MaskScore(classes)
        self.sweep = {one: (PanopticScore(classes), SemanticScore(classes)) for one in offsets}
        self.each = ImageCounts(
            images,
            np.zeros((images, 4, classes)) if keep and "panoptic" in tasks else None,
            np.zeros((images, 3, classes)) if keep and "semantic" in tasks else None,
        )
        self.clock = {"load": 0.0, "model": 0.0, "post": 0.0}

    def add_panoptic(
        self,
        number: int,
        found: tuple[IntArray, IntArray],
        truth: tuple[IntArray, IntArray, BoolArray],
        truth_areas: FloatArray | None = None,
    ) -> None:
        """Segments of an image by its number: map and labels, and crowd of the true ones; their
        areas where the map's do not count."""
        own = self.panoptic.add(*found, *truth, truth_areas)
        if self.each.panoptic is not None:
            self.each.panoptic[number] = own

    def add_semantic(self, number: int, found: IntArray, truth: IntArray) -> None:
        """Class maps (H, W) of an image by its number, -1 where there is none."""
        own = self.semantic.add(found, truth)
        if self.each.semantic is not None:
            self.each.semantic[number] = own

    def add_shared(
        self,
        number: int,
        shared: NDArray[np.int64],
        pred_labels: IntArray,
        truth: tuple[IntArray, BoolArray],
        truth_areas: FloatArray | None = None,
    ) -> None:
        """Both of an image by the `overlaps` of its segments: labels, and labels and crowd of the
        true ones."""
        own = self.panoptic.add_shared(shared, pred_labels, *truth, truth_areas)
        named = self.semantic.add_shared(shared, pred_labels, truth[0])
        if self.each.panoptic is not None and self.each.semantic is not None:
            self.each.panoptic[number], self.each.semantic[number] = own, named

    def merge(self, other: Tally) -> None:
        """Adds what another process counted; seconds are those of the slowest."""
        self.panoptic.counts += other.panoptic.counts
        self.semantic.matrix += other.semantic.matrix
        self.instance.merge(other.instance)
        self.masks.counts += other.masks.counts
        for offset, (panoptic, semantic) in other.sweep.items():
            self.sweep[offset][0].counts += panoptic.counts
            self.sweep[offset][1].matrix += semantic.matrix
        self.each.merge(other.each)
        if self.findings is not None and other.findings is not None:
            self.findings.merge(other.findings)
        self.clock = {name: max(value, other.clock[name]) for name, value in self.clock.items()}


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
    """What other offsets on the seen logits would give, from the same raw outputs of the model.

    The offset is calibrated stacking (Chao et al., ECCV 2016): it trades seen for unseen classes.
    plain: the offset of the report's other figures. dev: the offset that the weights carry because
    finetuning chose it on dev and seen classes set aside; None where it chose none. oracle_pq,
    oracle_miou: the best of the sweep by hPQ and hIoU, chosen on the very images that are scored:
    no result.
    """

    rows: tuple[OffsetFigures, ...]
    plain: float
    dev: float | None
    oracle_pq: float | None
    oracle_miou: float | None


@dataclass(frozen=True)
class Sweep:
    """Offsets that are tried, and the one that was chosen without the scored images, if any."""

    offsets: tuple[float, ...] = ()
    dev: float | None = None


NO_SWEEP = Sweep()


def sweep_offsets(scale: float, *others: float | None) -> tuple[float, ...]:
    """Offsets from 0 to 0.3 of the scale of the logits, and the others that are given."""
    steps = [round(float(step), 4) for step in np.linspace(0, 0.3 * scale, STEPS)]
    return tuple(sorted({*steps, *(one for one in others if one is not None)}))


def calibration(
    tally: Tally, vocabulary: Vocabulary, plain: float, dev: float | None
) -> Calibration | None:
    """The sweep's figures, and the best of them, of equals the smallest offset; None without a
    sweep."""
    if not tally.sweep:
        return None
    split = vocabulary.seen_indices, vocabulary.unseen_indices
    rows: list[OffsetFigures] = []
    for offset, (panoptic, semantic) in tally.sweep.items():
        result = panoptic.result()
        pq, unseen_pq = (None if q is None else q.pq for q in map(result.mean, split))
        iou, unseen_iou = (None if q is None else q.miou for q in map(semantic.quality, split))
        both_pq, both_iou = _both(pq, unseen_pq), _both(iou, unseen_iou)
        rows.append(OffsetFigures(offset, pq, unseen_pq, both_pq, iou, unseen_iou, both_iou))
    by_pq = [(row.hpq, -row.offset) for row in rows if row.hpq is not None]
    by_iou = [(row.hiou, -row.offset) for row in rows if row.hiou is not None]
    return Calibration(
        tuple(rows),
        plain,
        dev,
        oracle_pq=-max(by_pq)[1] if by_pq else None,
        oracle_miou=-max(by_iou)[1] if by_iou else None,
    )


def _both(seen: float | None, unseen: float | None) -> float | None:
    return None if seen is None or unseen is None else float(harmonic(seen, unseen))


class TruthCheck:
    """Looks at the truth as it comes by; UserError as soon as there is next to nothing to score."""

    def __init__(self, tasks: Collection[str]) -> None:
        self.tasks = tasks
        self.images = self.pixels = self.void = self.segments = 0

    def add(self, sample: Sample) -> None:
        """One image's truth as the data set has it."""
        self.images += 1
        self.pixels += sample.segment_map.size
        self.void += int((sample.segment_map == 0).sum())
        self.segments += len(sample.labels)
        if self.images == EARLY:
            self.judge()

    def judge(self) -> None:
        """UserError where the images so far hold no truth, or next to none."""
        share = self.void / max(1, self.pixels)
        too_little = share > MOST_VOID and set(self.tasks) != {"instance"}
        if self.images and (too_little or not self.segments):
            raise UserError(
                f"{100 * share:.1f}% of the true pixels of {self.images} images are void, with "
                f"{self.segments} segments: the figures would say nothing.",
                "Labels that are off by one or of another class list do that: look at them and "
                "prepare the data set again; or score single objects with --tasks instance.",
            )
