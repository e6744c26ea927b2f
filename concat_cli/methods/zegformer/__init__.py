"""ZegFormer: segments without classes first, then their names (Ding et al., CVPR 2022)."""

from __future__ import annotations

from typing import TYPE_CHECKING

from concat_cli.core.method import TASKS, Method, Stage
from concat_cli.methods.concat import CON

if TYPE_CHECKING:
    from concat_cli.core.config import Config

TRAINED = ("segmentor", "targets", "raw_no_object")  # keys of its section
AT_TEST = ("branch", "exponent", "crop", "image_prompts", "skip_below")  # the others
METHOD = Method(
    name="zegformer",
    stages=(
        Stage(
            "zegformer",
            "train-zegformer",
            "Train ZegFormer: segments first, then their names.",
            train="concat_cli.methods.zegformer.train:train_zegformer",
            plan="concat_cli.methods.zegformer.train:plan",
            relevant=(*CON, *(f"zegformer.{key}" for key in TRAINED)),
            options=("force",),
        ),
    ),
    reference="shapes_zegformer",
    restore="concat_cli.methods.zegformer.maskformer:restore_zegformer",
    predictor="concat_cli.methods.zegformer.predictor:open_predictor",
    tasks="concat_cli.methods.zegformer:tasks",
    sections={"zegformer": "concat_cli.methods.zegformer.config:ZegFormerConfig"},
    at_test=tuple(f"zegformer.{key}" for key in AT_TEST),
    inductive=True,
    examples={
        "train-zegformer": (
            "concat train-zegformer",
            "concat train-zegformer -c zegformer_voc_15_5 --dry-run",
        ),
        "predict": (
            "concat predict photo.jpg --name shapes_zegformer --set zegformer.branch=segment",
        ),
        "compare": (
            "concat compare demo segment=shapes_zegformer:zegformer.branch=segment "
            "fusion=shapes_zegformer --limit 50",
        ),
    },
)


def tasks(cfg: Config) -> tuple[str, ...]:
    """All, or maps of classes alone where it has learnt one mask a class."""
    from concat_cli.methods.zegformer.config import ZegFormerConfig

    return tasks_of(cfg.own(ZegFormerConfig).targets)


def tasks_of(targets: str) -> tuple[str, ...]:
    """By what a mask was learnt for: a "category" or a "segment"."""
    return ("semantic",) if targets == "category" else TASKS
