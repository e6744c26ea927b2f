"""What stops an evaluation whose figures would mean nothing."""

from __future__ import annotations

from collections.abc import Collection

import numpy as np
from numpy.typing import NDArray

from concat_cli.core.data.dataset import Sample
from concat_cli.core.errors import UserError
from concat_cli.core.vocabulary import Vocabulary

MOST_VOID = 0.95  # of the pixels: a truth of single objects on void is still scored
EARLY = 32  # images after which the truth is judged for the first time


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
        if self.images and not self.segments:
            raise UserError(
                f"None of the {self.images} images has any truth.",
                "Its labels may be void throughout (ids off by one, or of another class list): "
                "look at them, and prepare the data set again.",
            )
        share = self.void / max(1, self.pixels)
        if share > MOST_VOID and set(self.tasks) != {"instance"}:
            raise UserError(
                f"{100 * share:.1f}% of the true pixels of {self.images} images are void, over "
                f"{100 * MOST_VOID:.0f}%: the figures would say nothing.",
                "Labels that are off by one or of another class list do that: look at them and "
                "prepare the data set again; or score single objects with --tasks instance.",
            )
