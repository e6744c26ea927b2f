"""Scores a weights file on the val part of a data set."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import torch

from concat_cli.core.build import config_of
from concat_cli.core.checkpoint import load_weights
from concat_cli.core.config_file import override
from concat_cli.core.data.dataset import DatasetInfo, PanopticDataset, read_dataset_info
from concat_cli.core.evaluate.report import Report, Split
from concat_cli.core.evaluate.run import Gather, alone, evaluate_model
from concat_cli.core.infer.predictor import Predictor
from concat_cli.core.progress import SILENT, Progress
from concat_cli.core.vocabulary_file import same_name

PART = "val"


def evaluate_weights(
    weights: Path,
    overrides: Sequence[str] = (),
    *,
    split: Split = "all",
    device: torch.device | str = "auto",
    save_dir: Path | None = None,
    rank: int = 0,
    world: int = 1,
    gather: Gather = alone,
    progress: Progress = SILENT,
) -> Report:
    """Scores weights with the configuration that they carry, with `overrides` on top.

    The candidates are all classes of the data set, seen ones and unseen ones as the data set has
    them. What is said of the weights' own training stands in the report's protocol.
    """
    loaded = load_weights(weights)
    own = config_of(loaded)
    cfg = override(own, overrides)
    info = read_dataset_info(Path(cfg.data.root))
    predictor = Predictor.load(
        loaded, info.vocabulary, device, infer=cfg.infer, force=True, progress=progress
    )
    leaked = unseen_but_trained(info, loaded.meta["trained"])
    if leaked:
        progress.say(
            f"these weights were trained with labels of unseen classes: {'; '.join(leaked)}"
        )
    taught = unseen_but_taught(info, loaded.meta.get("taught", ()))
    protocol = {
        # by how the weights were made, whatever was asked for or said now
        "mode": "transductive" if taught else own.protocol.mode,
        "stage": loaded.stage,
        "weights": str(weights),
        "data": info.name,
        "class_split": info.class_split,
        "unseen_with_labels": len(leaked),
        "taught": len(taught),
    }
    dataset = PanopticDataset(info.part(PART), info.vocabulary, keep_crowd=True)
    return evaluate_model(
        predictor,
        dataset,
        split=split,
        protocol=protocol,
        save_dir=save_dir,
        workers=cfg.data.workers,
        rank=rank,
        world=world,
        gather=gather,
        progress=progress,
    )


def unseen_but_trained(info: DatasetInfo, trained: Sequence[str]) -> list[str]:
    """Unseen classes of the data set whose labels the weights were trained with."""
    return [e.name for e in info.vocabulary.entries if not e.seen and e.name in set(trained)]


def unseen_but_taught(info: DatasetInfo, taught: Sequence[str]) -> list[str]:
    """Unseen classes of the data set whose names the weights were taught."""
    known = {same_name(name) for name in taught}
    return [e.name for e in info.vocabulary.entries if not e.seen and same_name(e.name) in known]
