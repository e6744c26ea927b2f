"""The toy's model, its loss, its training and its predictor."""

from __future__ import annotations

from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from concat_cli.core.build import config_of, part_of
from concat_cli.core.checkpoint import Weights
from concat_cli.core.config import Config
from concat_cli.core.data.loader import Batch
from concat_cli.core.infer.postprocess import PanopticResult, regions, semantic_shares
from concat_cli.core.infer.predictor import Loading, Predictor, Raw
from concat_cli.core.model.segmentor import QueryOutput
from concat_cli.core.progress import SILENT, Progress
from concat_cli.core.runs import Run
from concat_cli.core.train.images import ImageStage, open_image_session
from concat_cli.core.train.loop import StageResult
from concat_cli.core.train.plan import Plan, clip_facts, clip_width, size_facts, training_facts
from concat_cli.core.train.session import text_clip
from concat_cli.core.train.teacher import trained_labels
from toy_method.config import ToyConfig


class Toy(nn.Module):
    """A linear map from colours to CLIP's space; each class is a query whose mask is its cosine."""

    def __init__(self, clip_width: int, scale: float) -> None:
        super().__init__()
        self.colours, self.scale = nn.Conv2d(3, clip_width, 1), scale

    def cosines(self, images: Tensor, text: Tensor) -> Tensor:
        """(B, 3, H, W) uint8, (K, E) -> (B, K, H/4, W/4)."""
        features = F.normalize(self.colours(F.avg_pool2d(images.float() / 255, 4)), dim=1)
        return self.scale * torch.einsum("ke,behw->bkhw", text, features)

    def forward(
        self, images: Tensor, padding: Tensor | None, text: Tensor, last_only: bool = False
    ) -> QueryOutput:
        """As a segmentor's, of one layer."""
        masks, classes = self.cosines(images, text)[None], len(text)
        named = F.pad(20 * torch.eye(classes, device=text.device), (0, 1))  # (K, K + 1)
        named = named.expand(1, len(images), classes, classes + 1)
        return QueryOutput(named, named, named, masks)


class ToyModule(nn.Module):
    """The toy with its loss."""

    def __init__(self, segmentor: Toy, text: Tensor, to_trained: Tensor) -> None:
        super().__init__()
        self.segmentor, self.text, self.to_trained = segmentor, text, to_trained

    def forward(self, batch: Batch, _: object = None) -> dict[str, Tensor]:
        """Cross-entropy of the pixels with a label."""
        labels = F.pad(trained_labels(batch.labels, self.to_trained), (1, 0), value=-1)
        known = labels.gather(1, batch.segment_map.flatten(1).long()).view_as(batch.segment_map)
        cosines = self.segmentor.cosines(batch.images, self.text)
        return {"classes": F.cross_entropy(cosines, known[:, ::4, ::4], ignore_index=-1)}


class ToyPredictor(Predictor):
    """Everything of a class is one segment."""

    tasks = ("semantic",)

    @torch.inference_mode()
    def segments(self, raw: Raw) -> list[PanopticResult]:
        """The classes of the pixels, and how sure they are."""
        raw, named = self._named(raw, None)
        shares = semantic_shares(named, raw.mask_logits, raw.sizes, raw.valid)
        return [regions(*both) for both in shares]


def train_toy(
    cfg: Config,
    run: Run,
    *,
    device: str = "auto",
    fresh: bool = False,
    progress: Progress = SILENT,
) -> StageResult:
    """Trains the toy, or resumes it."""
    session = open_image_session(cfg, device, progress)
    clip = text_clip(cfg, session.device)
    torch.manual_seed(cfg.optim.seed)
    toy = session.place(Toy(clip.embed_dim, cfg.own(ToyConfig).scale))
    images = ImageStage.open(session, run.stage("toy"), clip, fresh=fresh, by_category=True)
    return images.fit(ToyModule(toy, images.text, images.to_trained))


def plan(cfg: Config, run: Run, weights: Path | None, vocabulary: Path | None) -> Plan:
    """What `train_toy` would do."""
    toy = Toy(clip_width(cfg.clip) or 512, cfg.own(ToyConfig).scale)
    facts = training_facts(cfg.optim, toy, run.stage("toy")) | clip_facts(cfg.clip)
    return facts | {"toy": size_facts(toy, cfg.clip)}


def restore_toy(weights: Weights) -> Toy:
    """The model of a weights file."""
    tensors = part_of(weights, "segmentor")
    toy = Toy(len(tensors["colours.bias"]), config_of(weights).own(ToyConfig).scale)
    toy.load_state_dict(tensors)
    return toy.eval()


def open_predictor(loading: Loading) -> ToyPredictor:
    """The predictor of a weights file."""
    return loading.open(ToyPredictor)
