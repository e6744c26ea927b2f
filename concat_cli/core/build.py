"""From configuration to modules: the only place where the two meet."""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path

from torch import Tensor, nn

from concat_cli.core.checkpoint import Weights
from concat_cli.core.config import CatConfig, Config, ModelConfig
from concat_cli.core.config_file import from_dict
from concat_cli.core.config_methods import ClipZssConfig
from concat_cli.core.errors import UserError
from concat_cli.core.model.backbone import Backbone
from concat_cli.core.model.generator import MlpGenerator, PrimitiveGenerator
from concat_cli.core.model.maskformer import MaskFormer, MaskFormerDecoder
from concat_cli.core.model.maskformer_pixel import MaskFormerPixelDecoder
from concat_cli.core.model.pixel_decoder import DeformablePixelDecoder, FPNPixelDecoder
from concat_cli.core.model.projector import Classifier, Projector
from concat_cli.core.model.query_decoder import QueryDecoder
from concat_cli.core.model.segmentor import MaskPool, Segmentor
from concat_cli.core.model.student import Student
from concat_cli.core.model.synthesizer import Synthesizer
from concat_cli.core.progress import SILENT, Progress
from concat_cli.core.weights_from.hub import PREFIX, weights_file
from concat_cli.core.weights_from.start import start_backbone, start_segmentor

STRIDE_16 = {"fpn": 0, "deformable": 1}  # which level, coarse to fine, tokens are selected from
Generator = PrimitiveGenerator | MlpGenerator


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
        _start_backbone(segmentor.backbone, weights, cfg.backbone, progress)
        return segmentor
    report = start_segmentor(segmentor, cfg.init, asdict(cfg))
    if weights:
        progress.say(f"model.backbone_weights={weights} is not read: model.init brings them.")
    for line in report.lines():
        progress.say(line)
    return segmentor


def _start_backbone(backbone: Backbone, weights: str, name: str, progress: Progress) -> None:
    """Loads a file that a backbone is to start from; timm's own weights come with the model."""
    if weights in ("", "timm"):
        return
    for line in start_backbone(backbone.body, Path(weights), name).lines():
        progress.say(line)


def check_start(cfg: ModelConfig) -> None:
    """UserError for a file to start from that is not there, before anything expensive is done."""
    if cfg.init and not cfg.init.startswith(PREFIX):
        weights_file(cfg.init)
    if cfg.backbone_weights not in ("", "timm") and not cfg.init:
        weights_file(cfg.backbone_weights)


def check_student_start(cfg: ClipZssConfig) -> None:
    """As `check_start`, of a student."""
    if cfg.encoder_weights not in ("", "timm"):
        weights_file(cfg.encoder_weights)


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
        Projector(cfg.width, clip_width, cfg.projector_layers, cfg.projector_hidden),
        Classifier(clip_width, cfg.logit_scale, cfg.learn_scale),
        MaskPool([*backbone.channels, cfg.width], cfg.width) if cfg.mask_pooling else None,
        cfg.detach_class_path,
    )


def build_student(
    cfg: ClipZssConfig, clip_width: int, *, pretrained: bool = False, progress: Progress = SILENT
) -> Student:
    """A dense encoder into CLIP's space; `pretrained`: with clip_zss.encoder_weights."""
    weights = cfg.encoder_weights if pretrained else ""
    encoder = Backbone(cfg.encoder, weights == "timm")
    _start_backbone(encoder, weights, cfg.encoder, progress)
    return Student(
        encoder, clip_width, cfg.head_width, cfg.dropout, cfg.logit_scale, cfg.learn_scale
    )


def build_synthesizer(cfg: ClipZssConfig, clip_width: int) -> Synthesizer | None:
    """What makes prototypes of centroids; None where they are taken as they are."""
    if not cfg.synthesizer:
        return None
    if clip_width % cfg.heads:
        raise UserError(
            f"clip_zss.heads={cfg.heads} does not divide CLIP's width, {clip_width}.",
            "Take a number that does, such as 8.",
        )
    return Synthesizer(clip_width, cfg.synthesizer, cfg.heads, cfg.synthesizer_ffn)


def build_zegformer(
    cfg: Config, clip_width: int, *, pretrained: bool = False, progress: Progress = SILENT
) -> MaskFormer | Segmentor:
    """ZegFormer's segmentor as published, or this project's own in its place.

    pretrained: as in `build_segmentor`; a MaskFormer starts from model.backbone_weights alone.
    """
    model, raw = cfg.model, cfg.zegformer.raw_no_object
    if cfg.zegformer.segmentor == "mask2former":
        segmentor = build_segmentor(model, clip_width, pretrained=pretrained, progress=progress)
        segmentor.classifier.raw_no_object = raw
        return segmentor
    weights = model.backbone_weights if pretrained else ""
    backbone = Backbone(model.backbone, weights == "timm", model.frozen_bn)
    _start_backbone(backbone, weights, model.backbone, progress)
    return MaskFormer(
        backbone,
        MaskFormerPixelDecoder(backbone.channels, model.width, model.mask_width),
        MaskFormerDecoder(
            backbone.channels[-1],
            model.width,
            model.heads,
            model.decoder_layers,
            model.decoder_ffn,
            model.queries,
        ),
        Projector(model.width, clip_width, model.projector_layers, model.projector_hidden),
        Classifier(clip_width, model.logit_scale, model.learn_scale, raw),
    )


def build_generator(cfg: CatConfig, clip_width: int, width: int) -> Generator:
    """A generator of vision queries of the given width from text embeddings of CLIP's width."""
    if cfg.generator == "mlp":
        return MlpGenerator(clip_width, width, cfg.hidden, cfg.noise_width, cfg.dropout)
    return PrimitiveGenerator(
        clip_width, width, cfg.layers, cfg.primitives, cfg.heads, cfg.ffn, cfg.dropout
    )


def config_of(weights: Weights) -> Config:
    """The configuration that the weights were trained with."""
    return from_dict(weights.meta["config"])


def restore_model(weights: Weights) -> nn.Module:
    """The model of a weights file of any stage, in evaluation mode."""
    if weights.stage == "clip_zss":
        return restore_student(weights)
    if weights.stage == "zegformer":
        return restore_zegformer(weights)
    return restore_segmentor(weights)


def clip_width_of(weights: Weights) -> int:
    """CLIP's width, read off the no-object embedding."""
    return weights.tensors["segmentor.classifier.no_object"].shape[0]


def restore_segmentor(weights: Weights) -> Segmentor:
    """The segmentor of a weights file of any stage, in evaluation mode."""
    segmentor = build_segmentor(config_of(weights).model, clip_width_of(weights))
    segmentor.load_state_dict(part_of(weights, "segmentor"))
    return segmentor.eval()


def restore_zegformer(weights: Weights) -> MaskFormer | Segmentor:
    """The segmentor of a weights file of stage `zegformer`, in evaluation mode."""
    segmentor = build_zegformer(config_of(weights), clip_width_of(weights))
    segmentor.load_state_dict(part_of(weights, "segmentor"))
    return segmentor.eval()


def restore_student(weights: Weights) -> Student:
    """The student of a weights file of stage `clip_zss`, in evaluation mode."""
    width = weights.tensors["student.projection.weight"].shape[0]
    student = build_student(config_of(weights).clip_zss, width)
    student.load_state_dict(part_of(weights, "student"))
    return student.eval()


def restore_generator(weights: Weights) -> Generator:
    """The generator of a weights file of stage `cat` or `finetune`, in evaluation mode."""
    cfg = config_of(weights)
    generator = build_generator(cfg.cat, clip_width_of(weights), cfg.model.width)
    generator.load_state_dict(part_of(weights, "generator"))
    return generator.eval()


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
