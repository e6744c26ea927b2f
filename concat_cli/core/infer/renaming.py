"""Weights that stay in memory and are asked with other names each time, as a server does."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import nullcontext
from copy import copy
from dataclasses import replace
from pathlib import Path

import torch

from concat_cli.core.build import naming
from concat_cli.core.checkpoint import Weights
from concat_cli.core.clip.prompts import RecentTexts, check_names
from concat_cli.core.config import Config
from concat_cli.core.infer.predictor import Loading, Predictor, seen_by
from concat_cli.core.progress import SILENT, Progress
from concat_cli.core.vocabulary import Vocabulary
from concat_cli.core.vocabulary_file import parse_classes

PREDICTORS = 8  # that stay ready; each holds little besides the embeddings of its names


class AnyNames:
    """A model in memory that predicts with any names; of one thread at a time.

    The first question already finds everything loaded. Arguments and errors as of
    `Predictor.load`.

    Attributes:
        own: the weights' own classes, which are named where nothing is asked for; may be empty.
        cfg: the configuration as it predicts.
    """

    def __init__(
        self,
        weights: Weights,
        device: torch.device | str = "auto",
        *,
        overrides: Sequence[str] | Config = (),
        force: bool = False,
        cache_dir: Path | None = None,
        progress: Progress = SILENT,
    ) -> None:
        loading = Loading.of(
            weights,
            device=device,
            overrides=overrides,
            force=force,
            cache_dir=cache_dir,
            progress=progress,
        )
        self._loading = replace(loading, recent=RecentTexts())
        self.own, self.cfg = loading.vocabulary, loading.cfg
        self._ready: dict[Vocabulary, Predictor] = {}  # those asked for last stand last
        if len(self.own):
            self._ready[self.own] = self._loading.predictor()
        self.predictor(self.parsed("a"))  # loads CLIP's text tower

    def parsed(self, classes: str) -> Vocabulary:
        """The vocabulary of "dog; cat, kitten; grass : stuff"; empty: the weights' own classes."""
        if not classes.strip():
            return self.own
        asked = parse_classes(classes, self.own, "The list of names")
        return seen_by(asked, self._loading.weights)

    def predictor(self, vocabulary: Vocabulary, min_score: float | None = None) -> Predictor:
        """Of these names, and the least score of a segment; None: that of the weights. UserError
        for names that cannot be told apart, and for words that the built-in CLIP never saw."""
        found = self._ready.pop(vocabulary, None)
        if found is None:
            loading = self._loading
            with naming(loading.weights) if vocabulary == self.own else nullcontext():
                check_names(vocabulary, self.cfg.clip, loading.force)
            found = loading.renamed(vocabulary).predictor()
        self._ready[vocabulary] = found
        for old in list(self._ready)[:-PREDICTORS]:
            del self._ready[old]
        if min_score is None:
            return found
        found = copy(found)
        found.cfg = replace(found.cfg, min_score=min_score)
        return found
