"""From configuration to ZegFormer's segmentor."""

from __future__ import annotations

from concat_cli.core.build import build_segmentor, clip_width_of, config_of, load_backbone, part_of
from concat_cli.core.checkpoint import Weights
from concat_cli.core.config import Config
from concat_cli.core.model.backbone import Backbone
from concat_cli.core.model.segmentor import Classifier, Projector, Segmentor
from concat_cli.core.progress import SILENT, Progress
from concat_cli.methods.zegformer.maskformer import MaskFormer, MaskFormerDecoder
from concat_cli.methods.zegformer.maskformer_pixel import MaskFormerPixelDecoder


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
    load_backbone(backbone, weights, model.backbone, progress)
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


def restore_zegformer(weights: Weights) -> MaskFormer | Segmentor:
    """The segmentor of a weights file of stage `zegformer`, in evaluation mode."""
    segmentor = build_zegformer(config_of(weights), clip_width_of(weights))
    segmentor.load_state_dict(part_of(weights, "segmentor"))
    return segmentor.eval()
