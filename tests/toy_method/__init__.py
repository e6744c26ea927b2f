"""A method of somebody else's, all of it: the text nearest to a mapped colour names a pixel."""

from __future__ import annotations

from concat_cli.core.method import Method, Stage

METHOD = Method(
    name="toy",
    stages=(
        Stage(
            "toy",
            "train-toy",
            "Train the toy: colours, named one by one.",
            train="toy_method.toy:train_toy",
            plan="toy_method.toy:plan",
            relevant=("data", "shapes", "clip", "toy", "optim", "infer"),
        ),
    ),
    reference="shapes",
    restore="toy_method.toy:restore_toy",
    predictor="toy_method.toy:open_predictor",
    tasks="toy_method:tasks",
    sections={"toy": "toy_method.config:ToyConfig"},
    inductive=True,
    examples={"train-toy": ("concat train-toy toy.scale=30",)},
)


def tasks(_: object) -> tuple[str, ...]:
    """Maps of classes alone."""
    return ("semantic",)
