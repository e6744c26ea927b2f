"""From configuration to a student and its synthesizer."""

from __future__ import annotations

from concat_cli.core.build import config_of, load_backbone, part_of
from concat_cli.core.checkpoint import Weights
from concat_cli.core.errors import UserError
from concat_cli.core.model.backbone import Backbone
from concat_cli.core.progress import SILENT, Progress
from concat_cli.core.weights_from.hub import weights_file
from concat_cli.methods.clip_zss.config import ClipZssConfig
from concat_cli.methods.clip_zss.student import Student
from concat_cli.methods.clip_zss.synthesizer import Synthesizer


def check_student_start(cfg: ClipZssConfig) -> None:
    """As `check_start`, of a student."""
    if cfg.encoder_weights not in ("", "timm"):
        weights_file(cfg.encoder_weights)


def build_student(
    cfg: ClipZssConfig, clip_width: int, *, pretrained: bool = False, progress: Progress = SILENT
) -> Student:
    """A dense encoder into CLIP's space; `pretrained`: with clip_zss.encoder_weights."""
    weights = cfg.encoder_weights if pretrained else ""
    encoder = Backbone(cfg.encoder, weights == "timm")
    load_backbone(encoder, weights, cfg.encoder, progress)
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


def restore_student(weights: Weights) -> Student:
    """The student of a weights file of stage `clip_zss`, in evaluation mode."""
    width = weights.tensors["student.projection.weight"].shape[0]
    student = build_student(config_of(weights).clip_zss, width)
    student.load_state_dict(part_of(weights, "student"))
    return student.eval()
