"""CONCAT: conditional token alignment (CON), cycle transition (CAT), and union finetuning."""

from __future__ import annotations

from concat_cli.core.method import Method, Stage

# of section `latent`; its other keys are finetuning's
LATENT = ("weight", "align", "split", "overlap", "least", "most", "alike")
CON = (
    *("data", "shapes", "clip", "model", "warmup", "loss", "align", "optim", "infer"),
    *(f"latent.{key}" for key in LATENT),
)
BANK = (
    "data",
    "clip",
    "bank",
    "loss.classes",
    "loss.mask",
    "loss.dice",
    "loss.points",
    "infer.size",
    "infer.max_size",
    "optim.seed",
    "optim.precision",
)
METHOD = Method(
    name="concat",
    stages=(
        Stage(
            "con",
            "train-con",
            "Train the segmentor on seen classes (stage 1, CON).",
            train="concat_cli.methods.concat.con:train_con",
            plan="concat_cli.methods.concat.con:plan",
            relevant=CON,
            options=("force",),
            following="train-cat",
        ),
        Stage(
            "cat",
            "train-cat",
            "Train the generator for unseen classes (stage 2, CAT).",
            train="concat_cli.methods.concat.cat:train_cat",
            plan="concat_cli.methods.concat.cat:plan",
            relevant=(*BANK, "cat", "protocol"),
            options=("weights", "force"),
            following="finetune",
        ),
        Stage(
            "finetune",
            "finetune",
            "Teach it unseen classes, or any names (stage 3).",
            train="concat_cli.methods.concat.finetune:finetune",
            plan="concat_cli.methods.concat.finetune:plan",
            relevant=(*BANK, "cat", "finetune", "infer", "protocol", "latent"),
            options=("vocabulary", "weights", "force"),
        ),
    ),
    reference="shapes",
    sections={"latent": "concat_cli.methods.concat.latent_config:LatentConfig"},
    restore="concat_cli.methods.concat.on_borrowed:restore",
    predictor="concat_cli.core.infer.predictor:open_predictor",
    tasks="concat_cli.methods.concat:tasks",
    examples={
        "train-con": (
            "concat train-con",
            "concat train-con -c demo",
            "concat train-con -c shapes --name try optim.lr=5e-4 align.instance=0.5",
        ),
        "train-cat": (
            "concat train-cat",
            "concat train-cat --name demo",
            "concat train-cat --name demo --fresh cat.steps=3000",
        ),
        "finetune": (
            "concat finetune",
            "concat finetune --name demo --vocab classes.txt",
        ),
    },
)


def tasks(_: object) -> tuple[str, ...]:
    """Everything: its queries are segments."""
    return ("panoptic", "semantic", "instance")
