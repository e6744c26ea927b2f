"""What a page shows beyond the figures, gathered image by image while they are scored."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from concat_cli.core.evaluate.page.outcomes import (
    HALLUCINATED,
    OUTCOMES,
    Outcome,
    Overlap,
    outcome_of,
)
from concat_cli.core.evaluate.page.pictures import Picture
from concat_cli.core.vocabulary import Vocabulary

KEPT = 8  # images, of the best as of the worst
SIZES = (0.001, 0.01, 0.05, 0.2)  # borders between classes of size, as shares of the image


@dataclass(frozen=True)
class Shown:
    """An image of the page, by its number in the data set.

    score: its PQ over all segments at once, in 0-1. scores: of the predicted segments, as far as
    they are known.
    """

    number: int
    name: str
    score: float
    image: Overlap
    outcome: Outcome
    picture: Picture
    scores: tuple[float, ...] = ()


class Findings:
    """Counts over all images, and the pictures of the few best and worst.

    confusion: matched segments by true and predicted class. outcomes: (O, K) segments by OUTCOMES
    and class, the predicted class for those that no truth is behind. sizes: (4, S) IoU, TP, FP, FN
    by size. The memory does not depend on the number of images, but on how many are `kept`.
    """

    def __init__(self, vocabulary: Vocabulary, kept: int = KEPT) -> None:
        self.vocabulary, self.kept, classes = vocabulary, kept, len(vocabulary)
        self.confusion: Counter[tuple[int, int]] = Counter()
        self.outcomes: NDArray[np.int64] = np.zeros((len(OUTCOMES), classes), np.int64)
        self.sizes: NDArray[np.float64] = np.zeros((4, len(SIZES) + 1))
        self.best: list[Shown] = []
        self.worst: list[Shown] = []

    def add(
        self,
        number: int,
        name: str,
        image: Overlap,
        picture: Callable[[], Picture],
        scores: Sequence[float] = (),
    ) -> None:
        """Adds an image; its picture is made only if it is among the best or worst so far."""
        outcome = outcome_of(image)
        self._count(image, outcome)
        score = outcome.score
        if score is None:
            return
        low, high = (score, number), (-score, number)
        if not (self._wanted(self.worst, low) or self._wanted(self.best, high, -1)):
            return
        shown = Shown(number, name, score, image, outcome, picture(), tuple(scores))
        self._keep([shown])

    def merge(self, other: Findings) -> None:
        """Adds what another process found."""
        self.confusion.update(other.confusion)
        self.outcomes += other.outcomes
        self.sizes += other.sizes
        self._keep([*other.best, *other.worst])

    def _keep(self, more: Sequence[Shown]) -> None:
        every = {one.number: one for one in (*self.best, *self.worst, *more)}.values()
        self.worst = sorted(every, key=lambda one: (one.score, one.number))[: self.kept]
        self.best = sorted(every, key=lambda one: (-one.score, one.number))[: self.kept]

    def _wanted(self, kept: Sequence[Shown], key: tuple[float, int], sign: int = 1) -> bool:
        return len(kept) < self.kept or key < (sign * kept[-1].score, kept[-1].number)

    def _count(self, image: Overlap, outcome: Outcome) -> None:
        classes = self.outcomes.shape[1]
        rows, columns = np.nonzero(outcome.iou > 0.5)
        pairs = zip(image.labels[rows].tolist(), image.named[columns].tolist(), strict=True)
        self.confusion.update(pairs)
        for kind in range(len(OUTCOMES)):
            on_truth = kind < HALLUCINATED
            one, labels = (outcome.true, image.labels) if on_truth else (outcome.found, image.named)
            self.outcomes[kind] += np.bincount(labels[one == kind], minlength=classes)
        true, found = (
            _sizes(image.shared[1:].sum(1), image),
            _sizes(image.shared[:, 1:].sum(0), image),
        )
        bins, rows = self.sizes.shape[1], outcome.matches[0]
        self.sizes[0] += np.bincount(true[rows], outcome.iou[outcome.matches], bins)
        self.sizes[1] += np.bincount(true[rows], minlength=bins)
        self.sizes[2] += np.bincount(found[outcome.alarms], minlength=bins)
        self.sizes[3] += np.bincount(true[outcome.misses], minlength=bins)


def _sizes(areas: NDArray[np.int64], image: Overlap) -> NDArray[np.int64]:
    """The class of size of each area: how many of the borders it reaches."""
    shares = areas / max(1, int(image.shared.sum()))
    reached: NDArray[np.bool_] = shares[:, None] >= np.array(SIZES)
    return reached.sum(1)
