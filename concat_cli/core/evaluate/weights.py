"""Scores a weights file on the val part of a data set: the one it was made for, or another."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, Literal

import torch

from concat_cli.core.build import config_of
from concat_cli.core.checkpoint import Weights, load_weights
from concat_cli.core.config import Config
from concat_cli.core.config_file import override
from concat_cli.core.data.dataset import DatasetInfo, PanopticDataset, read_dataset_info
from concat_cli.core.errors import UserError
from concat_cli.core.evaluate.offsets import sweep_offsets
from concat_cli.core.evaluate.report import Report, Split
from concat_cli.core.evaluate.run import Gather, alone, evaluate_model
from concat_cli.core.infer.predictor import Predictor, seen_by, vocabulary_of
from concat_cli.core.method import TASKS, stage_named
from concat_cli.core.method import loaded as named
from concat_cli.core.progress import SILENT, Progress
from concat_cli.core.vocabulary import Vocabulary, same_name

PART = "val"
Candidates = Literal["all", "split"]


def evaluate_weights(
    weights: Path,
    overrides: Sequence[str] = (),
    *,
    split: Split = "all",
    candidates: Candidates = "all",
    tasks: Collection[str] | None = None,
    bootstraps: int = 0,
    calibrate: bool = False,
    diagnostics: bool = False,
    with_counts: bool = False,
    limit: int | None = None,
    device: torch.device | str = "auto",
    save_dir: Path | None = None,
    truth_dir: Path | None = None,
    rank: int = 0,
    world: int = 1,
    gather: Gather = alone,
    progress: Progress = SILENT,
) -> Report:
    """Scores weights with the configuration that they carry, with `overrides` on top.

    The candidates are all classes of the data set, or with `candidates="split"` those of `split`
    alone, the easier protocol. On the classes that the weights were made for, seen and unseen are
    as the data set has them; on another list of classes, by the names that the weights were trained
    on. `calibrate` tries offsets on the seen logits beside the one that is configured;
    `diagnostics` looks at masks and names apart from each other; `with_counts` keeps the counts of
    every image; `limit` takes the first so many images alone.
    """
    loaded = load_weights(weights)
    own = config_of(loaded)
    cfg = override(own, overrides)
    info, foreign = divided(read_dataset_info(Path(cfg.data.root)), loaded)
    able = able_tasks(loaded.stage, own)
    chosen = tasks_of(info, tasks, able)
    check_segments(able, chosen, diagnostics, official=truth_dir is not None)
    competing = _competing(info.vocabulary, split, candidates)
    predictor = Predictor.load(
        loaded, competing, device, overrides=cfg, force=True, progress=progress,
    )  # fmt: skip
    protocol = _protocol(loaded, info, progress) | {
        "filtering": filtering_of(loaded, {} if foreign else info.protocol),
        "overlap": _overlap(info.vocabulary) if foreign else None,
    }
    offsets, dev = _offsets(loaded, cfg, info, predictor, split) if calibrate else ((), None)
    return evaluate_model(
        predictor,
        PanopticDataset(info.part(PART), info.vocabulary, keep_crowd=True),
        split=split,
        tasks=chosen,
        bootstraps=bootstraps,
        offsets=offsets,
        dev_offset=dev,
        with_diagnostics=diagnostics,
        with_counts=with_counts,
        limit=limit,
        restricted=candidates == "split",
        check=True,
        protocol=protocol,
        save_dir=save_dir,
        truth_dir=truth_dir,
        workers=cfg.data.workers,
        rank=rank,
        world=world,
        gather=gather,
        progress=progress,
    )


def able_tasks(stage: str, own: Config) -> tuple[str, ...]:
    """What weights of a stage can be scored for, by the configuration that they carry."""
    return named(stage_named(stage)[0].tasks)(own)


def tasks_of(
    info: DatasetInfo, asked: Collection[str] | None, known: tuple[str, ...] = TASKS
) -> tuple[str, ...]:
    """The tasks to score: those asked for, else panoptic and semantic as far as the truth and the
    weights (`known`) go, or all that the truth can score; UserError where one of the two cannot.
    """
    able = tuple(task for task in info.tasks if task in known)
    if asked is None:
        usual = tuple(task for task in ("panoptic", "semantic") if task in able)
        asked = usual or able or info.tasks
    unknown = [task for task in asked if task not in TASKS]
    if unknown or not asked:
        what = f"There is no task {unknown[0]!r}." if unknown else "--tasks names no task."
        raise UserError(what, f"Tasks are {', '.join(TASKS)}, separated by commas.")
    lacking = [task for task in asked if task not in info.tasks]
    if lacking:
        raise UserError(
            f"The truth of {info.root} cannot score: {', '.join(lacking)}.",
            f"It can score {', '.join(info.tasks)}.",
        )
    lacking = [task for task in asked if task not in known]
    if lacking:
        raise UserError(
            f"These weights cannot be scored for: {', '.join(lacking)}. CLIP-ZSS names every "
            "pixel, ZegFormer with zegformer.targets=category has a mask for each class: both tell "
            "no segments of a class apart.",
            "Score them with --tasks semantic, or give weights of CONCAT or of ZegFormer with "
            "zegformer.targets=segment.",
        )
    return tuple(task for task in TASKS if task in asked)


def check_segments(
    able: tuple[str, ...], chosen: tuple[str, ...], diagnostics: bool, official: bool
) -> None:
    """UserError for what needs segments where the weights (`able`) or the tasks have none."""
    if diagnostics and able == ("semantic",):
        raise UserError(
            "--diagnostics looks at segments, and these weights tell none of a class apart.",
            "Leave it out.",
        )
    if official and "panoptic" not in chosen:
        raise UserError(
            "--official scores panoptic segments, which the truth, these weights or --tasks leave "
            "out.",
            "Leave --official out.",
        )


def divided(info: DatasetInfo, loaded: Weights) -> tuple[DatasetInfo, bool]:
    """The data set, divided by the names that were trained on if its classes are not those that the
    weights were made for (then True)."""
    made_for = {same_name(name) for name in vocabulary_of(loaded).names}
    if made_for == {same_name(name) for name in info.vocabulary.names}:
        return info, False
    vocabulary = seen_by(info.vocabulary, loaded)
    return replace(info, vocabulary=vocabulary, class_split="by the names trained on"), True


def _competing(vocabulary: Vocabulary, split: Split, candidates: Candidates) -> Vocabulary:
    if candidates == "all":
        return vocabulary
    if split == "all":
        raise UserError(
            "--candidates split restricts the candidates to the classes of --split, which is all.",
            "Add --split unseen or --split seen.",
        )
    chosen = tuple(e for e in vocabulary.entries if e.seen == (split == "seen"))
    if not chosen:
        raise UserError(f"The data set has no {split} classes.", "Leave --split out.")
    return Vocabulary(chosen)


def _overlap(vocabulary: Vocabulary) -> dict[str, Any]:
    """The classes of another data set that labels were trained on."""
    names = [entry.name for entry in vocabulary.entries if entry.seen]
    return {"count": len(names), "of": len(vocabulary), "names": names}


def _protocol(loaded: Weights, info: DatasetInfo, progress: Progress) -> dict[str, Any]:
    """What the report says of the weights and of the data set."""
    leaked = unseen_but_trained(info, loaded.meta["trained"])
    if leaked:
        progress.say(
            f"these weights were trained with labels of unseen classes: {'; '.join(leaked)}"
        )
    taught = unseen_but_taught(info, loaded.meta.get("taught", ()))
    return {
        # by how the weights were made, whatever was asked for or said now
        "mode": "transductive" if taught else _mode(loaded),
        "stage": loaded.stage,
        "weights": str(loaded.path),
        "data": info.name,
        "class_split": info.class_split,
        "unseen_with_labels": len(leaked),
        "taught": len(taught),
    }


def filtering_of(loaded: Weights, otherwise: Mapping[str, Any]) -> dict[str, Any]:
    """What was taken away from the data that the weights were trained on; `otherwise` for weights
    that do not tell."""
    return dict(loaded.meta.get("data", {}).get("filtering", otherwise))


def _mode(loaded: Weights) -> str:
    """ZegFormer and CLIP-ZSS use no unseen name in training, whatever the configuration says."""
    method, _ = stage_named(loaded.stage)
    return "inductive" if method.inductive else config_of(loaded).protocol.mode


def _offsets(
    loaded: Weights, cfg: Config, info: DatasetInfo, predictor: Predictor, split: Split
) -> tuple[tuple[float, ...], float | None]:
    """The offsets to try, and the one that finetuning chose on dev, if it chose one."""
    if split != "all" or not (info.vocabulary.seen_indices and info.vocabulary.unseen_indices):
        raise UserError(
            "--calibrate weighs seen against unseen classes, and needs both of them.",
            "Leave --split out, and score a data set with seen and unseen classes.",
        )
    own = config_of(loaded)
    chosen = loaded.stage == "finetune" and own.finetune.calibrate
    dev = own.infer.seen_offset if chosen else None
    return sweep_offsets(predictor.offset_scale, cfg.infer.seen_offset, dev), dev


def unseen_but_trained(info: DatasetInfo, trained: Sequence[str]) -> list[str]:
    """Unseen classes of the data set whose labels the weights were trained with."""
    return [e.name for e in info.vocabulary.entries if not e.seen and e.name in set(trained)]


def unseen_but_taught(info: DatasetInfo, taught: Sequence[str]) -> list[str]:
    """Unseen classes of the data set whose names the weights were taught."""
    known = {same_name(name) for name in taught}
    return [e.name for e in info.vocabulary.entries if not e.seen and same_name(e.name) in known]
