"""A segmentor that is asked for phrases, at test: the answers to all names as one panoptic map.

Things are a phrase's instances; stuff is the part of the picture that its phrase covers; what no
answer claims is background. A synonym is a phrase of its own.
"""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from concat_cli.core.clip.prompts import clean_name
from concat_cli.core.errors import UserError
from concat_cli.core.infer.postprocess import MASK_STRIDE
from concat_cli.core.infer.predictor import Loading, Predictor, Raw, RawOutput
from concat_cli.core.segmentors.sam3 import Answer, Read, Sam3

CERTAIN = 1e-6  # scores are kept this far from 0 and 1, where logits have an end


def open_phrases(loading: Loading) -> PhrasePredictor:
    """SAM 3 with names; UserError where there are none, as it has no classes of its own."""
    if not len(loading.vocabulary):
        raise UserError(
            "SAM 3 has no classes of its own.", 'Name some: --classes "dog; red car; sky : stuff"'
        )
    return loading.open(PhrasePredictor, torch.zeros(len(loading.vocabulary), 0))


class PhrasePredictor(Predictor):
    """SAM 3 with a vocabulary; the arguments as of `Predictor`, `text` (K, 0): it has its own."""

    semantic_from = "answers"

    def __init__(self, *common: Any) -> None:
        super().__init__(*common)
        assert isinstance(self.model, Sam3)
        self.sam3, vocabulary = self.model, self.vocabulary
        names = [
            (index, clean_name(name))
            for index, entry in enumerate(vocabulary.entries)
            for name in (entry.name, *entry.synonyms)
        ]
        self._classes = [index for index, _ in names]
        with torch.inference_mode(), self._precision():
            self._phrases: list[Read] = self.sam3.read([name for _, name in names])

    @property
    def offset_scale(self) -> float:
        """Offsets are taken off the logits of scores."""
        return 1.0

    @torch.inference_mode()
    def raw(self, images: Sequence[np.ndarray]) -> Iterator[Raw]:
        """The answers for (H, W, 3) uint8 images, one after the other."""
        for position, image in enumerate(images):
            start = time.perf_counter()
            picture = torch.tensor(image).permute(2, 0, 1).to(self.device)
            with self._precision():
                answers = list(self.sam3.ask(picture, self._phrases))
            logits, masks = self._merged(answers)
            grid = (MASK_STRIDE * masks.shape[-2], MASK_STRIDE * masks.shape[-1])
            elapsed = (time.perf_counter() - start) * 1000
            size = (image.shape[0], image.shape[1])
            yield RawOutput([position], [size], [grid], elapsed, logits[None], masks[None])

    def _precision(self) -> torch.autocast:
        return torch.autocast(self.device.type, self.dtype, enabled=self.dtype is not None)

    def _merged(self, answers: Sequence[Answer]) -> tuple[Tensor, Tensor]:
        """Class logits (N, K+1) and mask logits (N, h, w) of what is likely enough to be drawn."""
        scores: list[Tensor] = []
        masks: list[Tensor] = []
        classes: list[int] = []
        for index, answer in zip(self._classes, answers, strict=True):
            if self.vocabulary.is_thing[index]:
                kept = answer.scores > self.cfg.min_score
                scores.append(answer.scores[kept])
                masks.append(answer.mask_logits[kept])
            else:
                scores.append(answer.scores.new_tensor([answer.present]))
                masks.append(answer.covered[None])
            classes += [index] * len(scores[-1])
        score = torch.cat(scores).clamp(CERTAIN, 1 - CERTAIN)
        logits = score.new_full((len(score), len(self.vocabulary) + 1), -torch.inf)
        logits[torch.arange(len(score)), classes] = score.log()
        logits[:, -1] = (-score).log1p()
        return logits, torch.cat(masks)
