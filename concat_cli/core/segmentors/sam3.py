"""SAM 3 through transformers, for those who have been given its weights: a phrase at a time.

The picture's features are computed once; each phrase then asks for its instances and for the part
of the picture that it covers (Carion et al., 2025).
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from concat_cli.core.errors import UserError
from concat_cli.core.segmentors.library import library_with, quiet
from concat_cli.core.weights_from.hub import short

CONTEXT = 32  # tokens of a phrase
MEAN, STD = 0.5, 0.5  # of the pictures in 0-1


@dataclass(frozen=True)
class Read:
    """A phrase as its text encoder gives it: features (1, T, D) and which tokens count (1, T)."""

    features: Any
    mask: Tensor


@dataclass(frozen=True)
class Answer:
    """What a picture holds of one phrase.

    scores (Q,) in 0-1: of each query times that of the phrase being there at all; mask_logits
    (Q, h, w) and covered (h, w) over the whole picture, whatever its proportions; present in 0-1.
    """

    scores: Tensor
    mask_logits: Tensor
    covered: Tensor
    present: float


class Sam3(nn.Module):
    """The image model of SAM 3 with its tokenizer; frozen. source: the folder of both."""

    def __init__(self, model: Any, tokenizer: Any, source: str) -> None:
        super().__init__()
        self.source = source
        self.model = model.eval().requires_grad_(False)
        self.tokenizer = tokenizer
        size = model.config.vision_config.image_size
        self.side: int = size if isinstance(size, int) else size[0]

    def train(self, mode: bool = True) -> Sam3:
        """Stays in eval mode: it is frozen."""
        return super().train(False)

    def read(self, phrases: Sequence[str]) -> list[Read]:
        """The phrases' features; one beyond the context is cut."""
        device = next(self.model.parameters()).device
        found: list[Read] = []
        for phrase in phrases:
            tokens = self.tokenizer(
                phrase,
                return_tensors="pt",
                padding="max_length",
                max_length=CONTEXT,
                truncation=True,
            )
            ids, mask = tokens["input_ids"].to(device), tokens["attention_mask"].to(device)
            found.append(Read(self.model.get_text_features(ids, attention_mask=mask), mask))
        return found

    def ask(self, picture: Tensor, phrases: Sequence[Read]) -> Iterator[Answer]:
        """The answers for a picture (3, H, W) uint8, in the order of the phrases."""
        from torchvision.transforms.v2 import functional as views  # pyright: ignore[reportMissingTypeStubs]

        square: Any = views.resize(picture[None], [self.side, self.side])  # as its processor does
        pixels = (square.float() / 255 - MEAN) / STD
        seen = self.model.get_vision_features(pixels)
        for phrase in phrases:
            out = self.model(
                vision_embeds=seen, text_embeds=phrase.features, attention_mask=phrase.mask
            )
            present = out.presence_logits.float().sigmoid()  # (1, 1)
            scores = (out.pred_logits.float().sigmoid() * present)[0]
            covered = out.semantic_seg[0, 0].float()
            yield Answer(scores, out.pred_masks[0].float(), covered, present.item())


def open_sam3(folder: Path) -> Sam3:
    """SAM 3 of a folder as transformers writes it; UserError where a part is missing."""
    library = library_with("Sam3Model", "SAM 3")
    try:
        with quiet(library):
            model, told = library.Sam3Model.from_pretrained(
                folder, local_files_only=True, output_loading_info=True
            )
            tokenizer = library.AutoTokenizer.from_pretrained(folder, local_files_only=True)
    except (OSError, ValueError, RuntimeError) as error:
        raise UserError(
            f"{folder} cannot be opened as SAM 3: {short(error)}",
            "Give the whole folder of facebook/sam3 (weights, config.json, tokenizer); its licence "
            "must be accepted on the hub first.",
        ) from error
    if told["missing_keys"]:
        first = sorted(told["missing_keys"])[0]
        raise UserError(
            f"{folder} lacks {len(told['missing_keys'])} tensors of SAM 3, like {first}.",
            "Copy the folder again.",
        )
    return Sam3(model, tokenizer, str(folder))
