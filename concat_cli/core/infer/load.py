"""From a weights file to the predictor of its kind."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import torch
from torch import Tensor

from concat_cli.core.build import config_of
from concat_cli.core.checkpoint import Weights, load_weights
from concat_cli.core.clip.encoder import Clip
from concat_cli.core.clip.prompts import text_embeddings
from concat_cli.core.config import ClipConfig, InferConfig
from concat_cli.core.infer.predictor import Predictor
from concat_cli.core.infer.restore import restore
from concat_cli.core.progress import SILENT, Progress
from concat_cli.core.runs import BUILT_IN
from concat_cli.core.vocabulary import Vocabulary
from concat_cli.methods.clip_zss.predictor import DensePredictor
from concat_cli.methods.zegformer import TRAINED
from concat_cli.methods.zegformer.config import ZegFormerConfig
from concat_cli.methods.zegformer.predictor import ZegFormerPredictor


def load_predictor(
    weights: Weights | Path | str | None,
    vocabulary: Vocabulary | Path | str | None,
    device: torch.device | str,
    *,
    infer: InferConfig | None,
    zegformer: ZegFormerConfig | None,
    precision: str,
    force: bool,
    cache_dir: Path | None,
    progress: Progress,
) -> Predictor:
    """A `Predictor`, or the one of it that fits what made the weights; see `Predictor.load`."""
    if not isinstance(weights, Weights):
        weights = load_weights(Path(weights) if weights is not None else BUILT_IN)
    cfg = config_of(weights)
    trained = {key: getattr(cfg.zegformer, key) for key in TRAINED}
    zegformer = replace(zegformer or cfg.zegformer, **trained)
    looks = weights.stage == "zegformer" and zegformer.branch != "segment"
    found = restore(
        weights,
        vocabulary,
        device,
        infer=infer,
        image_tower=looks,
        precision=precision,
        force=force,
        cache_dir=cache_dir,
        progress=progress,
    )
    common = (
        found.model,
        found.text,
        found.vocabulary,
        found.infer,
        found.device,
        found.dtype,
        found.weights.meta,
    )
    if weights.stage == "clip_zss":
        return DensePredictor(*common)
    if weights.stage == "zegformer":
        image_text = None
        if looks:
            image_text = image_embeddings(
                found.clip, found.vocabulary, cfg.clip, zegformer, cache_dir, progress
            )
        clip = found.clip if looks else None
        return ZegFormerPredictor(*common, zegformer=zegformer, clip=clip, image_text=image_text)
    return Predictor(*common)


def image_embeddings(
    clip: Clip,
    vocabulary: Vocabulary,
    cfg: ClipConfig,
    zegformer: ZegFormerConfig,
    cache_dir: Path | None = None,
    progress: Progress = SILENT,
) -> Tensor:
    """(K, E): the text of ZegFormer's image branch, of the prompts that the configuration names."""
    templates = None if zegformer.image_prompts == "same" else "masked"
    return text_embeddings(clip, vocabulary, cfg, cache_dir, progress, templates)
