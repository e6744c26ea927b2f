"""Borrowed masks: a published segmentor groups the pixels, CLIP names the groups; untrained."""

from __future__ import annotations

from concat_cli.core.method import TASKS, Method, Stage

METHOD = Method(
    name="borrowed",
    stages=(Stage("borrowed"),),
    reference="",
    restore="concat_cli.methods.borrowed.weights:restore",
    predictor="concat_cli.methods.borrowed.predictor:open_predictor",
    tasks="concat_cli.methods.borrowed:tasks",
    sections={"borrowed": "concat_cli.methods.borrowed.config:BorrowedConfig"},
    at_test=(
        *(f"clip.{key}" for key in ("model", "pretrained", "templates", "clean_names")),
        *(f"borrowed.{key}" for key in ("naming", "side", "known", "new", "min_object")),
    ),
    inductive=True,  # nothing is trained; what the segmentor was trained on is told as a leak
    opens="concat_cli.methods.borrowed.weights:open_weights",
)


def tasks(_: object) -> tuple[str, ...]:
    """Everything: its queries are segments."""
    return TASKS
