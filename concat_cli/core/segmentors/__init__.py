"""Published segmentors behind one interface: a picture in; masks, their own classes, queries out.

They are frozen, and used as they are: their classes are one voice among others, or none.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from concat_cli.core.errors import UserError
from concat_cli.core.files import sha256_of
from concat_cli.core.vocabulary import Vocabulary

Size = tuple[int, int]
STRIDE = 4  # of mask logits
_DIVISOR = 32  # that sides are padded to a multiple of


@dataclass(frozen=True)
class Proposals:
    """What a published segmentor says of B pictures.

    mask_logits (B, Q, h, w) at stride 4 of the padded input; class_logits (B, Q, C+1) of its own
    classes and, last, of no object; queries (B, Q, D), what its decoder ends with. embeddings
    (B, Q, 2, E), not normalised: where classes are told by text, in the place of the logits, which
    are (B, Q, 0) then: those of its decoder, and those of the CLIP that it stands on.
    """

    mask_logits: Tensor
    class_logits: Tensor
    queries: Tensor
    embeddings: Tensor | None = None


class PublishedSegmentor(nn.Module):
    """A frozen segmentor; each kind has its own `propose`.

    Attributes:
        source: where it came from, as it was asked for.
        path: of its weights.
        vocabulary: its own classes, C of them.
        notes: what was assumed of it, a sentence each, to be said once.
        width: D of its queries.
        count: Q, how many there are.
        size, max_size: short and long side of pictures as its authors test it.
        padded: (H, W) that every picture is padded to, which nothing is told of; None: any multiple
            of 32.
    """

    source: str
    path: Path
    vocabulary: Vocabulary
    notes: tuple[str, ...] = ()
    width: int
    count: int
    size: int = 800
    max_size: int = 1333
    padded: Size | None = None

    @cached_property
    def sha256(self) -> str:
        """Of its weights, which is needed only where something is trained on top of them."""
        return sha256_of(self.path)

    def propose(self, images: Tensor, padding: Tensor | None) -> Proposals:
        """As `forward`, of pictures that need no smaller input."""
        raise NotImplementedError

    def forward(self, images: Tensor, padding: Tensor | None) -> Proposals:
        """Images (B, 3, H, W) uint8, padded at the right and below; padding (B, H, W) bool.

        A picture gives what it gives alone, padded to its own next multiple of 32, whatever else is
        in the batch: published models look into the padding (windows of a Swin, a pixel decoder
        that is told of none), so smaller pictures run apart from larger ones. UserError where they
        are larger than a segmentor of one size takes.
        """
        size = (images.shape[-2], images.shape[-1])
        if self.padded is not None:
            return self._proposed_of_one_size(images, size, self.padded)
        if padding is None:
            return self.propose(images, None)
        rows: dict[Size, list[int]] = {}
        for row, own in enumerate(_own_sizes(padding)):
            rows.setdefault(own, []).append(row)
        found = [
            _widened(self.propose(*_cut(images[some], padding[some], own)), size)
            for own, some in rows.items()
        ]
        order = torch.tensor([row for some in rows.values() for row in some]).argsort()
        embeddings = [one.embeddings for one in found if one.embeddings is not None]
        return Proposals(
            torch.cat([one.mask_logits for one in found])[order],
            torch.cat([one.class_logits for one in found])[order],
            torch.cat([one.queries for one in found])[order],
            torch.cat(embeddings)[order] if embeddings else None,
        )

    def _proposed_of_one_size(self, images: Tensor, size: Size, whole: Size) -> Proposals:
        """Of pictures made larger by black at the right and below; masks are cut back."""
        (height, width), (below, right) = size, (whole[0] - size[0], whole[1] - size[1])
        if below < 0 or right < 0:
            raise UserError(
                f"{self.source} takes pictures of {whole[0]}x{whole[1]} at most, these are "
                f"{height}x{width}.",
                f"Set infer.size={min(whole)} infer.max_size={min(whole)}, or less.",
            )
        found = self.propose(F.pad(images, (0, right, 0, below)), None)
        masks = found.mask_logits[..., : height // STRIDE, : width // STRIDE]
        return replace(found, mask_logits=masks)

    def train(self, mode: bool = True) -> PublishedSegmentor:
        """Stays in eval mode: it is frozen."""
        return super().train(False)


def _own_sizes(padding: Tensor) -> list[Size]:
    """What each picture would be padded to alone."""
    rows, columns = (~padding).any(2).sum(1), (~padding).any(1).sum(1)
    pairs: list[list[int]] = torch.stack((rows, columns), 1).cpu().numpy().tolist()
    return [(_rounded(height), _rounded(width)) for height, width in pairs]


def _rounded(side: int) -> int:
    return max(1, -(-side // _DIVISOR)) * _DIVISOR


def _cut(images: Tensor, padding: Tensor, size: Size) -> tuple[Tensor, Tensor | None]:
    """The upper left part, and its padding if there is any."""
    height, width = size
    own = padding[:, :height, :width]
    return images[..., :height, :width], own if bool(own.any()) else None


def _widened(found: Proposals, size: Size) -> Proposals:
    """Mask logits for a larger padded input: their last row and column go on into the padding, so
    that resizing does to the picture's pixels what it does to them alone."""
    height, width = found.mask_logits.shape[-2:]
    below, right = size[0] // STRIDE - height, size[1] // STRIDE - width
    masks = F.pad(found.mask_logits, (0, right, 0, below), mode="replicate")
    return replace(found, mask_logits=masks)
