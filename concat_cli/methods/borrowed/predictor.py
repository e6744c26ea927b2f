"""Borrowed masks at test: a published segmentor groups the pixels, CLIP and it agree on names.

CLIP is shown what may become a segment: masks with pixels that are no_object by at most
1 - `borrowed.min_object`. All others are no_object. That threshold alone decides whether a mask is
one: a closed set's no_object also means "nothing that was labelled", and with many classes no
single one may be likelier than it.
"""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from concat_cli.core.build import config_of
from concat_cli.core.clip.encoder import Clip
from concat_cli.core.clip.pooling import MaskPooling, between_cells
from concat_cli.core.config_file import diff
from concat_cli.core.errors import UserError
from concat_cli.core.infer.crops import encode_alike, peaks
from concat_cli.core.infer.pooled import pool_segments
from concat_cli.core.infer.postprocess import Size
from concat_cli.core.infer.predictor import Loading, Predictor, RawOutput
from concat_cli.core.progress import Progress
from concat_cli.core.segmentors import Proposals, PublishedSegmentor
from concat_cli.core.segmentors.fcclip import FcClip
from concat_cli.core.segmentors.sam3 import Sam3
from concat_cli.core.vocabulary import Vocabulary
from concat_cli.methods.borrowed import METHOD
from concat_cli.methods.borrowed.config import BorrowedConfig
from concat_cli.methods.borrowed.naming import agreed, best_names, ensemble, matches, one_by_one
from concat_cli.methods.borrowed.phrases import open_phrases
from concat_cli.methods.borrowed.weights import told

CROP = "cropmask"  # what CLIP is shown of a mask [Ding et al., CVPR 2022]
OFFSETS = 10.0  # 0.3 of it, the largest offset that is tried, is a factor of 20


@dataclass(frozen=True)
class Naming:
    """How masks are named: by which keys and CLIP.

    owner (S,): the class that each of the S texts is a name of. progress: told once of masks that
    are smaller than a cell of CLIP's map.
    """

    way: BorrowedConfig
    clip: Clip
    owner: Tensor
    progress: Progress


@dataclass(frozen=True)
class BorrowedRaw(RawOutput):
    """The class logits are logarithms of the ensemble's scores; those of masks that CLIP was not
    shown are -inf but for no_object's, that of the others is. objectness (B, Q) in 0-1."""

    objectness: Tensor | None = None


class BorrowedPredictor(Predictor):
    """A published segmentor whose masks CLIP names; the first arguments as of `Predictor`, but for
    the text: (S, E), of all names of all classes.

    Attributes:
        between: how many masks so far were named by the cell of CLIP's map that they cover most, as
            they hold no cell by half.
    """

    needs_clip_image = True

    def __init__(
        self,
        model: nn.Module,
        text: Tensor,
        vocabulary: Vocabulary,
        *common: Any,
        naming: Naming,
    ) -> None:
        assert isinstance(model, PublishedSegmentor) and len(text) == len(naming.owner)
        of_classes = text.new_zeros(len(vocabulary), text.shape[1])
        of_classes = of_classes.index_add(0, naming.owner.to(text.device), text)
        of_classes = F.normalize(of_classes, dim=-1)
        super().__init__(model, of_classes, vocabulary, *common)
        self.segmentor, self.naming = model, naming
        self.names, self.owner = text.to(self.device), naming.owner.to(self.device)
        self.matched = matches(vocabulary, model.vocabulary).to(self.device)
        pooled = naming.way.naming == "pool" and not isinstance(model, FcClip)
        self.pooling = MaskPooling(naming.clip, naming.way.side) if pooled else None
        self.between = 0

    @property
    def parameters(self) -> int:
        """Those of the segmentor and of CLIP's image encoder."""
        visual = self.naming.clip.model.visual.parameters()
        return super().parameters + sum(parameter.numel() for parameter in visual)

    @property
    def offset_scale(self) -> float:
        """Offsets are taken off logarithms of scores."""
        return OFFSETS

    def probabilities(self, raw: RawOutput, offset: float) -> Tensor:
        """(B, Q, K+1) of the classes, with `offset` taken off the seen ones, times objectness."""
        assert isinstance(raw, BorrowedRaw) and raw.objectness is not None
        return super().probabilities(raw, offset) * raw.objectness[..., None]

    def _run(self, images: Tensor, padding: Tensor | None, valid: list[Size]) -> BorrowedRaw:
        with torch.autocast(self.device.type, self.dtype, enabled=self.dtype is not None):
            found = self.segmentor(images, padding)
        if found.embeddings is not None:
            return self._told_by_text(found, found.embeddings, valid)
        objects = 1 - found.class_logits.softmax(-1)[..., -1]  # (B, Q)
        sent = (objects >= self.naming.way.min_object) & (peaks(found.mask_logits, valid) > 0)
        logits = objects.new_full((*sent.shape, len(self.vocabulary) + 1), -torch.inf)
        logits[..., -1] = torch.where(sent, -torch.inf, 0.0)
        clip_logits = self._clip_logits(images, found.mask_logits, valid, sent)
        own = found.class_logits[sent][:, :-1]
        logits[..., :-1][sent] = agreed(own, clip_logits, self.matched, self.naming.way)
        objects = torch.where(sent, objects, 1.0)
        return BorrowedRaw([], [], valid, 0.0, logits, found.mask_logits, None, objects)

    def _told_by_text(self, found: Proposals, both: Tensor, valid: list[Size]) -> BorrowedRaw:
        """Of a segmentor on a CLIP, both of whose opinions came with the masks [FC-CLIP]: its void
        is one more class, and a mask is one where that is not the likeliest."""
        assert isinstance(self.segmentor, FcClip)
        own = self.segmentor.classify(both[:, :, 0], self.names)  # (B, Q, S+1)
        opinion = best_names(own[..., :-1], self.owner, len(self.vocabulary))
        void = torch.cat((opinion, own[..., -1:]), -1).log_softmax(-1)[..., -1:]
        by_clip = self._by_clip(F.normalize(both[:, :, 1], dim=-1))
        known = self.matched.any(1)
        scores = ensemble(opinion.log_softmax(-1), by_clip.log_softmax(-1), known, self.naming.way)
        objects = -void.exp().clamp(max=1 - 1e-6)
        logits = torch.cat((scores + objects.log1p(), void), -1)
        whole = torch.ones_like(void[..., 0])
        return BorrowedRaw([], [], valid, 0.0, logits, found.mask_logits, None, whole)

    def _clip_logits(
        self, images: Tensor, masks: Tensor, valid: list[Size], sent: Tensor
    ) -> Tensor:
        """(M, K) of the masks that are sent."""
        clip = self.naming.clip
        if self.pooling is None:
            tokens = encode_alike(clip, images, masks, valid, sent.nonzero(), CROP)
        else:
            tokens, shares = pool_segments(self.pooling, images, masks, valid, sent)
            if self.pooling.attends:
                self._count(shares, self.pooling.grid)
        return self._by_clip(tokens)

    def _by_clip(self, tokens: Tensor) -> Tensor:
        """CLIP's tokens (..., E) -> its logits (..., K) of the classes."""
        logits = self.naming.clip.logit_scale * tokens @ self.names.T  # (..., S)
        return best_names(logits, self.owner, len(self.vocabulary))

    def _count(self, shares: Tensor, grid: int) -> None:
        small = int(between_cells(shares).sum())
        if small and not self.between:
            self.naming.progress.say(
                f"{small} of {len(shares)} masks hold no cell of CLIP's {grid}x{grid} map by half: "
                "such a mask is named by the cell that it covers most (said once; borrowed.side "
                "and borrowed.naming=crops look closer)"
            )
        self.between += small


def open_predictor(loading: Loading) -> Predictor:
    """The predictor of a pair, or of SAM 3."""
    model = loading.model()
    if isinstance(model, Sam3):
        _check_read(loading, "SAM 3 names masks by itself", METHOD.at_test)
        return open_phrases(loading)
    if isinstance(model, FcClip):
        told_by_text = ("borrowed.naming", "borrowed.side", "borrowed.min_object")
        _check_read(loading, "FC-CLIP names masks in the pass that makes them", told_by_text)
    loading.progress.say(told(loading.cfg))
    assert isinstance(model, PublishedSegmentor)
    for note in model.notes:
        loading.progress.say(note)
    clip = loading.clip(image_tower=True)
    clip.dtype = loading.dtype  # nothing was trained with its tokens: it may be as fast as the rest
    if isinstance(model, FcClip):
        model.attach(clip)
    apart, owner = one_by_one(loading.vocabulary)
    text = loading.text(vocabulary=apart)
    if loading.recent is None:
        clip.drop_text_tower()
    naming = Naming(loading.cfg.own(BorrowedConfig), clip, owner, loading.progress)
    return loading.open(BorrowedPredictor, text, naming=naming)


def _check_read(loading: Loading, why: str, unread: Collection[str]) -> None:
    """UserError for keys that were asked for and would change nothing."""
    changed = [line.partition(":")[0] for line in diff(config_of(loading.weights), loading.cfg)]
    if beyond := [key for key in changed if key in unread]:
        raise UserError(f"{why}: {', '.join(beyond)} would change nothing.", "Leave that out.")
