"""Borrowed masks at test: CLIP and the segmentor's own classes agree on names."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from concat_cli.core.clip.encoder import Clip
from concat_cli.core.config import InferConfig
from concat_cli.core.infer.postprocess import Size
from concat_cli.core.infer.predictor import Loading, Predictor, Raw
from concat_cli.core.segmentors import PublishedSegmentor
from concat_cli.core.vocabulary import Vocabulary
from concat_cli.methods.borrowed.config import BorrowedConfig
from concat_cli.methods.borrowed.weights import told


@dataclass(frozen=True)
class Naming:
    """How masks are named: by which keys, and by which CLIP."""

    way: BorrowedConfig
    clip: Clip


class BorrowedPredictor(Predictor):
    """A published segmentor whose masks CLIP names; the first arguments as of `Predictor`."""

    needs_clip_image = True

    def __init__(
        self,
        model: nn.Module,
        text: Tensor,
        vocabulary: Vocabulary,
        cfg: InferConfig,
        device: torch.device | str = "cpu",
        dtype: torch.dtype | None = None,
        meta: dict[str, Any] | None = None,
        *,
        naming: Naming,
    ) -> None:
        super().__init__(model, text, vocabulary, cfg, device, dtype, meta)
        assert isinstance(model, PublishedSegmentor)
        self.segmentor, self.naming = model, naming

    def _run(self, images: Tensor, padding: Tensor | None, valid: list[Size]) -> Raw:
        with torch.autocast(self.device.type, self.dtype, enabled=self.dtype is not None):
            found = self.segmentor(images, padding)
        raise NotImplementedError(found)


def open_predictor(loading: Loading) -> BorrowedPredictor:
    """The predictor of a pair."""
    loading.progress.say(told(loading.cfg))
    clip = loading.clip(image_tower=True)
    naming = Naming(loading.cfg.own(BorrowedConfig), clip)
    return loading.open(BorrowedPredictor, naming=naming)
