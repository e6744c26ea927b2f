"""The frozen CLIP teacher: one code path for open_clip's models and for the built-in tiny one."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from concat_cli.core.clip import tiny
from concat_cli.core.clip.source import RANDOM, create, library, quiet, tokenizer
from concat_cli.core.config import ClipConfig
from concat_cli.core.progress import SILENT, Progress

TEXT_BATCH = 256


@dataclass(frozen=True)
class ClipIdentity:
    """Which CLIP it is: model name, tag or file of the weights, hash of both towers' weights."""

    model: str
    pretrained: str
    sha256: str


class Clip(nn.Module):
    """A frozen CLIP with L2-normalised fp32 outputs; `mean`, `std` (3, 1, 1) normalise images."""

    model: Any  # an open_clip model: a module with encode_image and encode_text
    mean: Tensor
    std: Tensor

    def __init__(
        self,
        model: Any,
        tokenize: Callable[..., Tensor],
        identity: ClipIdentity,
        image_tower: bool = True,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        size, config = model.visual.image_size, model.visual.preprocess_cfg
        self.image_size: int = size if isinstance(size, int) else size[0]
        self.register_buffer("mean", torch.tensor(config["mean"]).view(3, 1, 1), persistent=False)
        self.register_buffer("std", torch.tensor(config["std"]).view(3, 1, 1), persistent=False)
        self.logit_scale = float(model.logit_scale.detach().exp())
        self.identity = identity
        self.has_image_tower = image_tower
        self.dtype = dtype
        self._tokenize = tokenize
        if not image_tower:
            del model.visual
        self.model = model.requires_grad_(False).eval()
        self.embed_dim: int = self.encode_text(["a"]).shape[-1]

    @property
    def device(self) -> torch.device:
        """Where the weights are."""
        return self.mean.device

    def train(self, mode: bool = True) -> Clip:
        """Stays in eval mode: the teacher is frozen."""
        return super().train(False)

    def normalise(self, images: Tensor) -> Tensor:
        """(..., 3, h, w) in [0, 1] -> the same, minus CLIP's mean colour, over its deviation."""
        return (images - self.mean) / self.std

    def encode_image(self, images: Tensor) -> Tensor:
        """(B, 3, h, w) float in [0, 1], any size, resized to a square -> (B, E)."""
        return self.encode_normalised(self.normalise(self.resize(images)))

    def resize(self, images: Tensor, side: int = 0) -> Tensor:
        """(B, 3, h, w) in [0, 1] -> (B, 3, side, side), bicubic and antialiased; side 0: CLIP's
        own."""
        assert images.is_floating_point(), "images are floats in [0, 1]"
        size = (side or self.image_size,) * 2
        if images.shape[-2:] == size:
            return images
        resized = F.interpolate(
            images.float(), size, mode="bicubic", align_corners=False, antialias=True
        )
        return resized.clamp(0, 1)

    @torch.no_grad()
    def encode_normalised(self, images: Tensor) -> Tensor:
        """(B, 3, image_size, image_size) already normalised -> (B, E)."""
        assert self.has_image_tower, "loaded without the image tower"
        with self.precision():
            features = self.model.encode_image(images)
        return F.normalize(features.float(), dim=-1)

    @torch.no_grad()
    def encode_text(self, texts: list[str]) -> Tensor:
        """N texts -> (N, E); a text beyond the context length is cut."""
        parts: list[Tensor] = []
        for i in range(0, len(texts), TEXT_BATCH):
            tokens = self._tokenize(texts[i : i + TEXT_BATCH]).to(self.device)
            with torch.autocast(self.device.type, enabled=False):
                features = self.model.encode_text(tokens)
            parts.append(F.normalize(features.float(), dim=-1))
        return torch.cat(parts)

    def drop_text_tower(self) -> None:
        """Frees the memory of the text tower (0.25 GB of a ViT-B/16) once all texts are encoded."""
        for part in ("transformer", "token_embedding", "text"):  # "text": of custom text towers
            if hasattr(self.model, part):
                delattr(self.model, part)

    def precision(self) -> torch.autocast:
        """The image tower's own precision, whatever autocast the caller runs in. Texts, which are
        cached and seldom encoded, always have fp32."""
        return torch.autocast(self.device.type, self.dtype, enabled=self.dtype is not None)


def load_clip(
    cfg: ClipConfig,
    device: torch.device | str = "cpu",
    image_tower: bool = True,
    dtype: torch.dtype | None = None,
    progress: Progress = SILENT,
    tiny_files: Mapping[str, Path] = tiny.FILES,
) -> Clip:
    """Loads the teacher; without `image_tower` no image weights are kept.

    `dtype`: of the image tower; None: fp32. `tiny_files`: weights of the built-in models.
    UserError if the model or its weights cannot be had.
    """
    device = torch.device(device)
    with quiet(), torch.random.fork_rng(devices=[]):  # pyright: ignore[reportUnknownMemberType]
        torch.manual_seed(0)  # pyright: ignore[reportUnknownMemberType]
        if cfg.model in tiny.FILES:
            source = f"local-dir:{tiny.FOLDER}"
            state = tiny.load_tiny(tiny_files[cfg.model]).state
            model: nn.Module = library().create_model(source, load_weights=False)
            model.load_state_dict(state)
            tokenize = library().get_tokenizer(source)
        else:
            model = create(cfg)
            tokenize = tokenizer(cfg)
    if cfg.pretrained == RANDOM and cfg.model not in tiny.FILES:
        progress.say(f"CLIP {cfg.model} has random weights, as clip.pretrained=random asks.")
    if dtype is not None and image_tower:
        progress.say(f"CLIP encodes images in {str(dtype).removeprefix('torch.')}")
    identity = ClipIdentity(cfg.model, cfg.pretrained, hash_weights(model))
    return Clip(model, tokenize, identity, image_tower, dtype).to(device)


def hash_weights(model: nn.Module) -> str:
    """SHA-256 over names, shapes, types and values of a model's state, and OpenAI's activation.

    The activation has no weights, but other embeddings; caches and checkpoints go by this hash.
    """
    digest = hashlib.sha256()
    if any(isinstance(module, library().transformer.QuickGELU) for module in model.modules()):
        digest.update(b"QuickGELU\n")
    for name, tensor in sorted(model.state_dict().items()):
        digest.update(f"{name} {tuple(tensor.shape)} {tensor.dtype}\n".encode())
        digest.update(tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy())
    return digest.hexdigest()
