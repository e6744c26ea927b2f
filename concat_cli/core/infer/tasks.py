"""What weights can be scored for: a model that tells no segments of a class apart has no PQ."""

from __future__ import annotations

from concat_cli.methods.zegformer.config import ZegFormerConfig

TASKS = ("panoptic", "semantic", "instance")
SEMANTIC_ALONE = ("semantic",)


def tasks_of_model(stage: str, zegformer: ZegFormerConfig) -> tuple[str, ...]:
    """The tasks of what a stage trained; a ZegFormer may have learnt one mask a class."""
    by_category = stage == "zegformer" and zegformer.targets == "category"
    return SEMANTIC_ALONE if stage == "clip_zss" or by_category else TASKS
