"""CONCAT on a published segmentor: its masks and queries as they are, our class path on top.

The published tensors stay in their own file. Weights files hold the projector and the classifier,
and by `published` in their metadata which segmentor they go with: source, sha256, classes.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from concat_cli.core.build import clip_width_of, config_of, filled, restore_segmentor
from concat_cli.core.checkpoint import Weights
from concat_cli.core.config import ModelConfig
from concat_cli.core.errors import UserError
from concat_cli.core.model.segmentor import Classifier, Projector, QueryOutput, Segmentor
from concat_cli.core.segmentors import PublishedSegmentor
from concat_cli.core.segmentors.source import open_frozen


@dataclass(frozen=True)
class Shape:
    """How many queries there are, and their width."""

    queries: int
    width: int


class OnBorrowed(nn.Module):
    """A frozen published segmentor whose queries a projector and a classifier of ours name.

    It stands where a `Segmentor` does; its state is that of what is learned alone.
    """

    def __init__(
        self, published: PublishedSegmentor, projector: Projector, classifier: Classifier
    ) -> None:
        super().__init__()
        self.published = published.requires_grad_(False).eval()
        self.projector, self.classifier = projector, classifier
        self.query_decoder = Shape(published.count, published.width)

    def forward(
        self, images: Tensor, padding: Tensor | None, text: Tensor, last_only: bool = True
    ) -> QueryOutput:
        """As of `Segmentor`, of the final layer (first dimension 1), which is all there is."""
        assert last_only, "a published segmentor tells of its final layer alone"
        found = self.published(images, padding)
        semantic, logits = self.classify(found.queries, text)
        masks = found.mask_logits.float()
        return QueryOutput(found.queries[None], semantic[None], logits[None], masks[None])

    def classify(self, vision_queries: Tensor, text: Tensor) -> tuple[Tensor, Tensor]:
        """Vision queries (..., D), text (K, E) -> semantic queries (..., E), logits (..., K+1)."""
        semantic = self.projector(vision_queries)
        return semantic, self.classifier(semantic, text)

    def state_dict(self, *args: Any, **kwargs: Any) -> dict[str, Any]:
        """Without the published tensors."""
        found: dict[str, Any] = super().state_dict(*args, **kwargs)
        inside = f"{kwargs.get('prefix', '')}published."
        for name in [name for name in found if name.startswith(inside)]:
            del found[name]
        return found


AnySegmentor = Segmentor | OnBorrowed


def on_top(published: PublishedSegmentor, cfg: ModelConfig, clip_width: int) -> OnBorrowed:
    """A new projector and classifier, random, on a published segmentor."""
    return OnBorrowed(
        published, _projector(published, cfg, clip_width), _classifier(cfg, clip_width)
    )


def _projector(published: PublishedSegmentor, cfg: ModelConfig, clip_width: int) -> Projector:
    return Projector(published.width, clip_width, cfg.projector_layers)


def _classifier(cfg: ModelConfig, clip_width: int) -> Classifier:
    return Classifier(clip_width, cfg.logit_scale, cfg.learn_scale)


def in_place(source: str) -> str:
    """A source as it can be found again from another folder."""
    path = Path(source).expanduser()
    return str(path.resolve()) if path.exists() else source


def facts_of(published: PublishedSegmentor) -> dict[str, Any]:
    """What a weights file says of the segmentor that it goes with."""
    names = list(published.vocabulary.names)
    return {"source": published.source, "sha256": published.sha256, "classes": names}


def kept_facts(source: Weights) -> dict[str, Any]:
    """What weights hand on to those made of them: whose queries their bank holds."""
    kept = {key: source.meta[key] for key in ("published",) if key in source.meta}
    return {"segmentor": source.meta.get("segmentor", source.sha256)} | kept


def restore(weights: Weights) -> AnySegmentor:
    """The segmentor of a weights file of any stage, in evaluation mode: ours, or a published one
    with what was learned on top. UserError where that one is not there or has changed."""
    if "published" not in weights.meta:
        return restore_segmentor(weights)
    cfg, width, published = config_of(weights).model, clip_width_of(weights), _same(weights)
    projector = filled(lambda: _projector(published, cfg, width), weights, "segmentor.projector")
    classifier = filled(lambda: _classifier(cfg, width), weights, "segmentor.classifier")
    return OnBorrowed(published, projector, classifier).eval()


def _same(weights: Weights) -> PublishedSegmentor:
    """The segmentor that the weights were trained on."""
    source, sha256 = (weights.meta["published"][key] for key in ("source", "sha256"))
    try:
        found = open_frozen(source)
    except UserError as error:
        raise UserError(
            f"{weights.path} names the masks of the segmentor {source}, which cannot be opened: "
            f"{error.what}",
            f"Put it back there, or train on another: `concat train-con segmentor=...`. "
            f"{error.hint}",
        ) from error
    if found.sha256 != sha256:
        raise UserError(
            f"{weights.path} was trained on another segmentor than {source} is now (sha256 "
            f"{sha256[:8]}, there {found.sha256[:8]}).",
            f"Put the former file back, or train on the new one: `concat train-con "
            f"segmentor={source} --fresh`.",
        )
    return found
