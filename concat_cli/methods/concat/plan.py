"""What each stage of CONCAT would do: its part of `--dry-run`."""

from __future__ import annotations

from pathlib import Path

import torch

from concat_cli.core.build import build_segmentor
from concat_cli.core.config import Config
from concat_cli.core.errors import UserError
from concat_cli.core.runs import Run
from concat_cli.core.train.plan import (
    Plan,
    clip_facts,
    clip_width,
    size_facts,
    start_facts,
    training_facts,
    weights_facts,
)
from concat_cli.core.vocabulary_file import parse_vocabulary
from concat_cli.methods.concat.generator import build_generator


def con(cfg: Config, run: Run, weights: Path | None, vocabulary: Path | None) -> Plan:
    """Of the segmentor."""
    with torch.device("meta"):
        segmentor = build_segmentor(cfg.model, clip_width(cfg.clip) or 512)
    facts = training_facts(cfg.optim, segmentor, run.stage("con"))
    if cfg.warmup.steps:
        facts["steps"] = f"{cfg.warmup.steps} of warm-up, then {facts['steps']}"
    facts["segmentor"] = f"{size_facts(segmentor, cfg.clip)}, {cfg.model.queries} queries"
    return facts | clip_facts(cfg.clip) | start_facts(cfg.model, segmentor, segmentor.backbone)


def cat(cfg: Config, run: Run, weights: Path | None, vocabulary: Path | None) -> Plan:
    """Of the generator, and of the query bank before it."""
    with torch.device("meta"):
        generator = build_generator(cfg.cat, clip_width(cfg.clip) or 512, cfg.model.width)
    bank = f"{cfg.bank.images or 'all'} images, {cfg.bank.views} views of each"
    each = 2 * cfg.model.queries * cfg.model.width / 1e3
    return weights_facts("con", run, weights) | {
        "steps": f"{cfg.cat.steps} of {cfg.cat.batch} queries",
        "query bank": f"{bank}; {cfg.model.queries} queries of width {cfg.model.width} each, "
        f"{each:.0f} kB a view",
        "generator": size_facts(generator, cfg.clip),
    }


def finetune(cfg: Config, run: Run, weights: Path | None, vocabulary: Path | None) -> Plan:
    """Of the projector: what it is taught."""
    facts = weights_facts("cat" if cfg.finetune.pseudo else "con", run, weights)
    names = "the unseen classes of the data set"
    if vocabulary is not None:
        names = f"{len(parse_vocabulary(vocabulary))} names of {vocabulary}"
    elif cfg.protocol.mode == "inductive" and cfg.finetune.pseudo:
        raise UserError(
            "protocol.mode=inductive: no unseen name may be known before evaluation.",
            "Set finetune.pseudo=false, or teach names on purpose with --vocab.",
        )
    return facts | {
        "steps": f"{cfg.finetune.steps} of {cfg.finetune.batch} real queries",
        "teaches": names if cfg.finetune.pseudo else "nothing new (control)",
    }
