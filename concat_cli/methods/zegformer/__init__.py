"""ZegFormer: segments without classes first, then their names (Ding et al., CVPR 2022)."""

from __future__ import annotations

from concat_cli.core.config import Config
from concat_cli.core.config_methods import ZegFormerConfig
from concat_cli.core.method import Method, Stage
from concat_cli.methods.concat import CON

TASKS = {  # by what a mask was learnt for
    "category": ("semantic",),
    "segment": ("panoptic", "semantic", "instance"),
}
TRAINED = ("segmentor", "targets", "raw_no_object")  # keys; the others say how to predict
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
        ),
    ),
    reference="shapes_zegformer",
    restore="concat_cli.methods.zegformer.maskformer:restore_zegformer",
    predictor="concat_cli.methods.zegformer.predictor:open_predictor",
    tasks="concat_cli.methods.zegformer:tasks",
    sections={"zegformer": ZegFormerConfig},
    at_test=tuple(
        f"zegformer.{key}" for key in ZegFormerConfig.__annotations__ if key not in TRAINED
    ),
    inductive=True,
    examples={
        "train-zegformer": (
            "concat train-zegformer",
            "concat train-zegformer -c configs/zegformer_voc_15_5.yaml --dry-run",
        ),
    },
)


def tasks(cfg: Config) -> tuple[str, ...]:
    """All, or maps of classes alone where it has learnt one mask a class."""
    return TASKS[cfg.own(ZegFormerConfig).targets]
