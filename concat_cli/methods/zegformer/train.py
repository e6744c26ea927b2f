"""ZegFormer's only stage: a segmentor trained on seen classes, CLIP's text alone at hand.

Its losses are on whole masks, sigmoid focal and dice, and so is its matching (MaskFormer). Void is
in no mask: its pixels are negative ones [ZegFormer, code].
"""

from __future__ import annotations

from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor

from concat_cli.core.build import check_start
from concat_cli.core.config import Config, LossConfig
from concat_cli.core.data.loader import Batch
from concat_cli.core.losses import (
    as_float,
    assigned,
    class_costs,
    class_loss,
    dice_costs,
    expected_weight,
    full_precision,
    point_dice,
    sigmoid_focal,
)
from concat_cli.core.progress import SILENT, Progress
from concat_cli.core.runs import Run
from concat_cli.core.train.distributed import Counts
from concat_cli.core.train.images import ImageStage, open_image_session
from concat_cli.core.train.loop import StageResult
from concat_cli.core.train.plan import Plan, clip_width, segmentor_facts
from concat_cli.core.train.session import seed_torch, text_clip
from concat_cli.core.train.teacher import ImageModule, Truth, on_void
from concat_cli.methods.concat.con import warm_up
from concat_cli.methods.concat.con_module import ConModule
from concat_cli.methods.zegformer.config import ZegFormerConfig
from concat_cli.methods.zegformer.maskformer import MaskFormer, build_zegformer, check_keys


class ZegFormerModule(ImageModule):
    """The segmentor with its losses: cross-entropy, focal and dice, on all layers.

    Void (and with it all that is unseen) is in no mask, as in ZegFormer; besides, a query that lies
    on void by more than `loss.void_share` is taken neither for a class nor for no_object [ours].
    Several forwards of a step add up as in `ConModule`.

    Args:
        text, to_trained: see `ImageModule`.
        loss: the weights; they are those of the matching, too.
    """

    def __init__(
        self, segmentor: MaskFormer, text: Tensor, to_trained: Tensor, loss: LossConfig
    ) -> None:
        super().__init__(text, to_trained)
        self.segmentor, self.loss = segmentor, loss

    def counts(self, batch: Batch) -> dict[str, Tensor]:
        """Segments, and weights of queries in the class loss."""
        segments = Truth.of(batch, self.to_trained).segments
        weight = expected_weight(
            segments, self.segmentor.query_decoder.queries, self.loss.no_object
        )
        return {"segments": segments.sum(), "class": weight}

    def forward(self, batch: Batch, counts: Counts | None = None) -> dict[str, Tensor]:
        """Weighted losses by name."""
        counts = counts or self.alone(batch)
        truth = Truth.of(batch, self.to_trained)
        labels, masks, void = truth.labels, truth.masks, truth.void
        out = self.segmentor(batch.images, truth.padding, self.text)
        weights = (self.loss.classes, self.loss.mask, self.loss.dice)
        matched = match_whole_masks(out.class_logits, out.mask_logits, labels, masks, weights)
        ignore = None if void is None else on_void(out.mask_logits, void, self.loss.void_share)
        classes = class_loss(
            out.class_logits, matched, labels, self.loss.no_object, ignore, counts["class"].of_whole
        )
        mask, dice = whole_mask_losses(out.mask_logits, matched, masks, counts["segments"].whole)
        return {
            "class": self.loss.classes * classes,
            "mask": self.loss.mask * mask,
            "dice": self.loss.dice * dice,
        }


def train_zegformer(
    cfg: Config,
    run: Run,
    *,
    device: str = "auto",
    fresh: bool = False,
    force: bool = False,
    progress: Progress = SILENT,
) -> StageResult:
    """Trains a run's ZegFormer, or resumes it; its weights are in `runs/<name>/zegformer/`."""
    check_keys(cfg)
    session = open_image_session(cfg, device, progress, force)
    check_start(cfg.model)
    clip = text_clip(cfg, session.device)
    seed_torch(cfg.optim.seed)
    segmentor = build_zegformer(cfg, clip.embed_dim, pretrained=True, progress=progress)
    session.place(segmentor)
    images = ImageStage.open(
        session,
        run.stage("zegformer"),
        clip,
        fresh=fresh,
        by_category=cfg.own(ZegFormerConfig).targets == "category",
    )
    if isinstance(segmentor, MaskFormer):
        return images.fit(ZegFormerModule(segmentor, images.text, images.to_trained, cfg.loss))
    warmed = warm_up(images, segmentor, None)
    if warmed is not None and not warmed.finished:
        return images.unfinished(warmed)
    return images.fit(ConModule(segmentor, images.text, images.to_trained, cfg))


def plan(cfg: Config, run: Run, weights: Path | None, vocabulary: Path | None) -> Plan:
    """What `train_zegformer` would do; UserError for what would stop it at once."""
    check_keys(cfg)
    with torch.device("meta"):
        segmentor = build_zegformer(cfg, clip_width(cfg.clip) or 512)
    kind, stage = cfg.own(ZegFormerConfig).segmentor, run.stage("zegformer")
    return segmentor_facts(cfg, segmentor, segmentor.backbone, stage, f"{kind}, ")


def focal_costs(logits: Tensor, truth: Tensor) -> Tensor:
    """Mean focal loss of logits (L, B, Q, P) with truth (B, N, P) in {0, 1}: (L, B, Q, N).

    A pair is sum(positive y) + sum(negative (1 - y)), so that one product serves all pairs.
    """
    positive = sigmoid_focal(logits, torch.ones_like(logits))
    negative = sigmoid_focal(logits, torch.zeros_like(logits))
    gain = torch.einsum("lbqp,bnp->lbqn", positive - negative, truth)
    return (gain + negative.sum(-1, keepdim=True)) / logits.shape[-1]


def whole_mask_costs(
    class_logits: Tensor,
    mask_logits: Tensor,
    labels: Tensor,
    masks: Tensor,
    weights: tuple[float, float, float],
) -> Tensor:
    """Weighted costs (class, focal, dice) of every query and segment: (L, B, Q, N), fp32.

    Truth, masks (B, N, H, W) bool, is brought to the predictions' size, taking the nearest pixel.
    """
    with full_precision(mask_logits):
        by_class = class_costs(class_logits, labels)
        small = F.interpolate(masks.to(by_class.dtype), mask_logits.shape[-2:]).flatten(2)
        costs: list[Tensor] = []
        for layer, own in zip(torch.split(mask_logits, 1), torch.split(by_class, 1), strict=True):
            logits = as_float(layer).flatten(3)  # (1, B, Q, P); a layer at a time saves memory
            focal, dice = focal_costs(logits, small), dice_costs(logits, small)
            costs.append(weights[0] * own + weights[1] * focal + weights[2] * dice)
        return torch.cat(costs)


@torch.no_grad()
def match_whole_masks(
    class_logits: Tensor,
    mask_logits: Tensor,
    labels: Tensor,
    masks: Tensor,
    weights: tuple[float, float, float],
) -> Tensor:
    """As `match`, on whole masks; weights: of class, focal and dice cost [ZegFormer: 1, 20, 1]."""
    costs = whole_mask_costs(class_logits, mask_logits, labels, masks, weights)
    return assigned(costs, labels >= 0)


def whole_mask_losses(
    mask_logits: Tensor, matched: Tensor, masks: Tensor, num_masks: float | Tensor
) -> tuple[Tensor, Tensor]:
    """Focal and dice, each summed over layers and masks and divided by `num_masks`.

    Predictions are brought to the truth's size, bilinearly. Arguments as of `mask_losses`.
    """
    layer, image, segment = (matched >= 0).nonzero(as_tuple=True)  # (M,) each
    if layer.numel() == 0:
        nothing = mask_logits.sum() * 0.0
        return nothing, nothing
    with full_precision(mask_logits):
        logits = as_float(mask_logits[layer, image, matched[layer, image, segment]])  # (M, h, w)
        logits = F.interpolate(logits[:, None], masks.shape[-2:], mode="bilinear").flatten(1)
        truth = masks[image, segment].flatten(1).to(logits.dtype)  # (M, H*W)
        focal = sigmoid_focal(logits, truth).mean(-1).sum() / num_masks
        return focal, point_dice(logits, truth).sum() / num_masks
