"""A published segmentor and a CLIP as `Weights`, so that what takes weights takes the pair."""

from __future__ import annotations

from pathlib import Path

from concat_cli.core.checkpoint import FORMAT, Weights
from concat_cli.core.config import ClipConfig, Config, InferConfig, ModelConfig
from concat_cli.core.config_file import to_dict
from concat_cli.core.segmentors import PublishedSegmentor
from concat_cli.core.segmentors.source import open_segmentor


def open_weights(given: str) -> Weights | None:
    """The pair that `--weights` named; None where it is none. Nothing is downloaded."""
    segmentor = open_segmentor(given)
    return pair(segmentor, ClipConfig("ViT-B-16", "datacomp_xl_s13b_b90k", "vild"))


def pair(segmentor: PublishedSegmentor, clip: ClipConfig) -> Weights:
    """The pair as weights without tensors of their own."""
    cfg = Config(
        clip=clip,
        model=ModelConfig(segmentor=segmentor.source),
        infer=InferConfig(  # a batch of photos gains nothing on a CPU but memory
            segmentor.size, segmentor.max_size, min_score=0.0, batch=1
        ),
    )
    meta = {
        "format": FORMAT,
        "stage": "borrowed",
        "config": to_dict(cfg),
        "vocabulary": segmentor.vocabulary.to_json(),
        "trained": list(segmentor.vocabulary.names),
        "clip": {"model": clip.model, "pretrained": clip.pretrained, "sha256": ""},
    }
    return Weights({}, meta, Path(segmentor.source), segmentor.sha256)


def restore(weights: Weights) -> PublishedSegmentor:
    """The segmentor of a pair."""
    return open_segmentor(weights.meta["config"]["model"]["segmentor"])
