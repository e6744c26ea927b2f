"""CLIP-ZSS: CLIP as the teacher of a dense encoder (arXiv 2310.02296)."""

from __future__ import annotations

from concat_cli.core.method import Method, Stage

METHOD = Method(
    name="clip_zss",
    stages=(
        Stage(
            "clip_zss",
            "train-clip-zss",
            "Train CLIP-ZSS: a dense encoder taught by CLIP.",
            train="concat_cli.methods.clip_zss.train:train_clip_zss",
            plan="concat_cli.methods.clip_zss.train:plan",
            relevant=("data", "shapes", "clip", "clip_zss", "optim", "infer"),
            options=("force", "preview"),
        ),
    ),
    reference="shapes_clip_zss",
    restore="concat_cli.methods.clip_zss.student:restore_student",
    predictor="concat_cli.methods.clip_zss.predictor:open_predictor",
    tasks="concat_cli.methods.clip_zss:tasks",
    sections={"clip_zss": "concat_cli.methods.clip_zss.config:ClipZssConfig"},
    inductive=True,
    examples={
        "train-clip-zss": (
            "concat train-clip-zss",
            "concat train-clip-zss --preview pseudo_labels.png",
            "concat train-clip-zss -c clip_zss_voc_15_5 --dry-run",
        ),
        "compare": ("concat compare demo shapes_zegformer shapes_clip_zss",),
    },
)


def tasks(_: object) -> tuple[str, ...]:
    """Maps of classes alone: it tells no segments of a class apart."""
    return ("semantic",)
