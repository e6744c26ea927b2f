"""From configuration to modules: the only place where the two meet."""

from __future__ import annotations

from collections.abc import Callable, Generator
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path
from typing import TypeVar

from torch import Tensor, nn

from concat_cli.core.checkpoint import Weights
from concat_cli.core.config import Config, ModelConfig
from concat_cli.core.config_file import from_dict
from concat_cli.core.errors import UserError
from concat_cli.core.model.backbone import Backbone
from concat_cli.core.model.pixel_decoder import DeformablePixelDecoder, FPNPixelDecoder
from concat_cli.core.model.query_decoder import QueryDecoder
from concat_cli.core.model.segmentor import Classifier, MaskPool, Projector, Segmentor
from concat_cli.core.progress import SILENT, Progress
from concat_cli.core.weights_from.files import start_backbone, start_segmentor
from concat_cli.core.weights_from.fit import AGAIN, misfit, on_paper
from concat_cli.core.weights_from.hub import at_hand, weights_file

M = TypeVar("M", bound=nn.Module)
STRIDE_16 = {"fpn": 0, "deformable": 1}  # which level, coarse to fine, tokens are selected from


def build_segmentor(
    cfg: ModelConfig, clip_width: int, *, pretrained: bool = False, progress: Progress = SILENT
) -> Segmentor:
    """A segmentor whose semantic queries have CLIP's width.

    pretrained: load the weights it is to start from (model.init or model.backbone_weights), and say
    what was used of them; UserError where they cannot be had or do not fit.
    """
    segmentor = _segmentor(cfg, clip_width, pretrained)
    weights = cfg.backbone_weights if pretrained else ""
    if not (pretrained and cfg.init):
        load_backbone(segmentor.backbone, weights, cfg.backbone, progress)
        return segmentor
    report = start_segmentor(segmentor, cfg.init, asdict(cfg))
    if weights:
        progress.say(f"model.backbone_weights={weights} is not read: model.init brings them.")
    for line in report.lines():
        progress.say(line)
    return segmentor


def load_backbone(backbone: Backbone, weights: str, name: str, progress: Progress) -> None:
    """Loads a file that a backbone is to start from; timm's own weights come with the model."""
    if weights in ("", "timm"):
        return
    for line in start_backbone(backbone.body, Path(weights), name).lines():
        progress.say(line)


def check_start(cfg: ModelConfig) -> None:
    """UserError for a file to start from that is not there, before anything expensive is done."""
    if cfg.init and at_hand(cfg.init):
        weights_file(cfg.init)
    if cfg.backbone_weights not in ("", "timm") and not cfg.init:
        weights_file(cfg.backbone_weights)


def check_own_masks(cfg: Config, method: str) -> None:
    """UserError where a method that makes its own masks is given a published segmentor's."""
    if cfg.model.segmentor:
        raise UserError(
            f"{method} learns masks of its own: model.segmentor={cfg.model.segmentor} has no place "
            "in it.",
            "Leave it out; `concat train-con` trains on the masks of a published segmentor.",
        )


def _segmentor(cfg: ModelConfig, clip_width: int, pretrained: bool) -> Segmentor:
    published = pretrained and cfg.backbone_weights == "timm" and not cfg.init
    backbone = Backbone(cfg.backbone, published, cfg.frozen_bn)
    decoder = {"fpn": FPNPixelDecoder, "deformable": DeformablePixelDecoder}[cfg.pixel_decoder]
    pixel_decoder = decoder(
        backbone.channels,
        width=cfg.width,
        mask_width=cfg.mask_width,
        heads=cfg.heads,
        layers=cfg.encoder_layers,
        ffn=cfg.encoder_ffn,
    )
    query_decoder = QueryDecoder(
        cfg.width,
        mask_width=cfg.mask_width,
        heads=cfg.heads,
        ffn=cfg.decoder_ffn,
        layers=cfg.decoder_layers,
        queries=cfg.queries,
        token_queries=cfg.token_queries,
        token_level=STRIDE_16[cfg.pixel_decoder],
    )
    return Segmentor(
        backbone,
        pixel_decoder,
        query_decoder,
        Projector(cfg.width, clip_width, cfg.projector_layers),
        Classifier(clip_width, cfg.logit_scale, cfg.learn_scale),
        MaskPool([*backbone.channels, cfg.width], cfg.width) if cfg.mask_pooling else None,
        cfg.detach_class_path,
    )


def config_of(weights: Weights) -> Config:
    """The configuration that the weights were trained with; UserError names the file."""
    with naming(weights):
        return from_dict(weights.meta["config"])


def clip_width_of(weights: Weights, name: str = "segmentor.classifier.no_object") -> int:
    """CLIP's width, read off a tensor, by default the no-object embedding; UserError without it."""
    found = weights.tensors.get(name)
    if found is None or not found.ndim or not found.numel():
        raise _unfit(weights, f"{name} is missing" if found is None else f"{name} holds no row")
    return found.shape[0]


def restore_segmentor(weights: Weights) -> Segmentor:
    """The segmentor of a weights file of any stage, in evaluation mode."""
    cfg, width = config_of(weights).model, clip_width_of(weights)
    return filled(lambda: build_segmentor(cfg, width), weights, "segmentor")


def filled(build: Callable[[], M], weights: Weights, part: str) -> M:
    """The module with the tensors of a part of the weights, in evaluation mode.

    It is planned on the meta device first: UserError where tensors are missing, left over, of
    another shape or not finite, before anything as large as the configuration asks for is made.
    """
    tensors = part_of(weights, part)
    with naming(weights), on_paper(tensors):
        wrong = misfit(build().state_dict(), tensors)
    if wrong:
        raise _unfit(weights, wrong)
    module = build()
    module.load_state_dict(tensors)
    return module.eval()


@contextmanager
def naming(weights: Weights) -> Generator[None]:
    """A UserError inside names the file."""
    try:
        yield
    except UserError as error:
        raise UserError(f"{weights.path}: {error.what}", error.hint) from error


def _unfit(weights: Weights, why: str) -> UserError:
    return UserError(
        f"{weights.path} is damaged, or does not fit its own configuration: {why}.", AGAIN
    )


def part_of(weights: Weights, prefix: str) -> dict[str, Tensor]:
    """The tensors under a prefix, without it; UserError where the file holds none."""
    start = len(prefix) + 1
    found = {k[start:]: v for k, v in weights.tensors.items() if k.startswith(f"{prefix}.")}
    if not found:
        raise UserError(
            f"{weights.path} holds no {prefix} (it is of stage {weights.meta['stage']}).",
            "Give weights of a later stage, made by `concat train-cat` or `concat finetune`.",
        )
    return found
