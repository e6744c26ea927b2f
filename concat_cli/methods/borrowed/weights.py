"""A published segmentor and a CLIP as `Weights`, so that what takes weights takes the pair."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from concat_cli.core.checkpoint import Weights
from concat_cli.core.clip.prompts import clean_name
from concat_cli.core.config import ClipConfig, Config, DataConfig, InferConfig, ModelConfig
from concat_cli.core.config_file import to_dict
from concat_cli.core.metadata import FORMAT
from concat_cli.core.segmentors import PublishedSegmentor
from concat_cli.core.segmentors.sam3 import Sam3
from concat_cli.core.segmentors.source import open_segmentor
from concat_cli.core.vocabulary import Vocabulary
from concat_cli.core.weights_from.hub import without_waiting
from concat_cli.core.weights_from.published import DEFAULT, TRAINED_ON, pair_of, pairs
from concat_cli.methods.borrowed.naming import names_of


@dataclass(frozen=True)
class PairWeights(Weights):
    """Without tensors of their own, and without a digest: the segmentor is open already."""

    segmentor: PublishedSegmentor | Sam3


def open_weights(given: str) -> PairWeights:
    """The pair that `--weights` named; one that is not listed has the CLIP of `photos`.

    UserError for what is not here, or holds no segmentor. Nothing is downloaded.
    """
    with without_waiting(all_cached=True):
        segmentor = open_segmentor(given)
    if isinstance(segmentor, Sam3):
        return phrases(segmentor)
    listed = pair_of(given)
    clip = (listed or pairs()[DEFAULT]).clip
    return pair(
        segmentor,
        ClipConfig(clip.model, clip.pretrained, "vild"),
        TRAINED_ON if listed else "not told",
    )


def pair(segmentor: PublishedSegmentor, clip: ClipConfig, trained_on: str = "") -> PairWeights:
    """The pair as weights. trained_on: what the segmentor's authors trained it on, in words."""
    cfg = Config(
        data=DataConfig(root=""),  # it has no data set of its own
        clip=clip,
        model=ModelConfig(segmentor=segmentor.source),
        infer=InferConfig(  # a batch of photos gains nothing on a CPU but memory
            segmentor.size, segmentor.max_size, min_score=0.0, batch=1
        ),
    )
    meta = _meta(cfg, segmentor.vocabulary, trained_on)
    return PairWeights({}, meta, Path(segmentor.source), "", segmentor)


def _meta(cfg: Config, own: Vocabulary, trained_on: str) -> dict[str, Any]:
    names = [name for entry in own.entries for name in names_of(entry)]
    return {
        "format": FORMAT,
        "stage": "borrowed",
        "config": to_dict(cfg),
        "vocabulary": own.to_json(),
        # labels of "sky-other-merged" are labels of another data set's "sky"
        "trained": list(dict.fromkeys([*names, *map(clean_name, names)])),
        "clip": {"model": cfg.clip.model, "pretrained": cfg.clip.pretrained, "sha256": ""},
        "data": {"name": trained_on, "class_split": None, "filtering": {}},
    }


def phrases(sam3: Sam3) -> PairWeights:
    """SAM 3 as weights: no classes of its own, and no CLIP beside it."""
    cfg = Config(
        data=DataConfig(root=""),
        clip=ClipConfig(model=""),
        model=ModelConfig(segmentor=sam3.source),
        infer=InferConfig(min_score=0.5, batch=1),
    )
    return PairWeights({}, _meta(cfg, Vocabulary(()), "not told"), Path(sam3.source), "", sam3)


def told(cfg: Config) -> str:
    """Whose masks and whose names, in a line."""
    source, clip = cfg.model.segmentor, cfg.clip
    listed = pair_of(source)
    why = "" if listed else f" (that of `{DEFAULT}`: the segmentor is not listed)"
    own = (listed or pairs()[DEFAULT]).clip
    if (clip.model, clip.pretrained) != (own.model, own.pretrained):
        why = " (as asked)"
    masks = listed.source if listed else source
    return f"masks of {masks}; names by CLIP {clip.model} {clip.pretrained}".rstrip() + why


def restore(weights: Weights) -> PublishedSegmentor | Sam3:
    """The segmentor of a pair."""
    assert isinstance(weights, PairWeights)
    return weights.segmentor
