"""The stages of training: their names, their commands, and what a stage's result depends on."""

from __future__ import annotations

from concat_cli.core.config import Config
from concat_cli.core.config_file import diff

STAGES = ("con", "cat", "finetune")  # CONCAT's, in their order
METHODS = ("zegformer", "clip_zss")  # the others train in one stage
COMMANDS = {
    "con": "train-con",
    "cat": "train-cat",
    "finetune": "finetune",
    "zegformer": "train-zegformer",
    "clip_zss": "train-clip-zss",
}

# What a stage's result depends on: sections and keys, less those that only say how to run.
_CON = ("data", "shapes", "clip", "model", "warmup", "loss", "align", "optim", "infer")
_BANK = (
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
ZEGFORMER_TRAINED = ("segmentor", "targets", "raw_no_object")  # keys; the others say how to predict
_RELEVANT = {
    "con": _CON,
    "cat": (*_BANK, "cat", "protocol"),
    "finetune": (*_BANK, "cat", "finetune", "infer", "protocol"),
    "zegformer": (*_CON, *(f"zegformer.{key}" for key in ZEGFORMER_TRAINED)),
    "clip_zss": ("data", "shapes", "clip", "clip_zss", "optim", "infer"),
}
_HOW_TO_RUN = {
    "data.workers",
    "data.cache",
    "optim.per_device",
    "optim.channels_last",
    "optim.save_every",
    "optim.log_every",
    "optim.preview_every",
    "infer.batch",
}


def relevant_diff(stage: str, before: Config, after: Config) -> list[str]:
    """The lines of `diff` that matter for the result of a stage."""
    relevant = set(_RELEVANT[stage])
    if stage == "cat" and after.cat.refit_projector:  # the refit is a finetune of its own
        relevant.add("finetune")
    return [line for line in diff(before, after) if _matters(line.split(":")[0], relevant)]


def _matters(key: str, relevant: set[str]) -> bool:
    named = {key, key.split(".")[0]}
    return key not in _HOW_TO_RUN and not named.isdisjoint(relevant)
