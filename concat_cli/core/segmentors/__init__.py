"""Published segmentors behind one interface: a picture in; masks, their own classes, queries out.

They are frozen, and used as they are: their classes are one voice among others, or none.
"""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor, nn

from concat_cli.core.vocabulary import Vocabulary

Size = tuple[int, int]


@dataclass(frozen=True)
class Proposals:
    """What a published segmentor says of B pictures.

    mask_logits (B, Q, h, w) at stride 4 of the padded input; class_logits (B, Q, C+1) of its own
    classes and, last, of no object; queries (B, Q, D), what its decoder ends with.
    """

    mask_logits: Tensor
    class_logits: Tensor
    queries: Tensor


class PublishedSegmentor(nn.Module):
    """A frozen segmentor; each kind has its own `forward`.

    Attributes:
        source: where it came from, as it was asked for.
        sha256: of its weights.
        vocabulary: its own classes, C of them.
        width: D of its queries.
        count: Q, how many there are.
        size, max_size: short and long side of pictures as its authors test it.
        padded: (H, W) that every picture is padded to; None: any multiple of 32.
    """

    source: str
    sha256: str
    vocabulary: Vocabulary
    width: int
    count: int
    size: int = 800
    max_size: int = 1333
    padded: Size | None = None

    def forward(self, images: Tensor, padding: Tensor | None) -> Proposals:
        """Images (B, 3, H, W) uint8, padded at the right and below; padding (B, H, W) bool."""
        raise NotImplementedError

    def train(self, mode: bool = True) -> PublishedSegmentor:
        """Stays in eval mode: it is frozen."""
        return super().train(False)
