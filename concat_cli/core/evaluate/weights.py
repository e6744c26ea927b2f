"""Scores a weights file on the val part of a data set: the one it was made for, or another."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch

from concat_cli.core.build import config_of
from concat_cli.core.checkpoint import Weights, open_weights
from concat_cli.core.config import Config
from concat_cli.core.config_file import override
from concat_cli.core.data.dataset import DatasetInfo, PanopticDataset, read_dataset_info
from concat_cli.core.device import ALONE, Share
from concat_cli.core.errors import UserError
from concat_cli.core.evaluate.report import Report
from concat_cli.core.evaluate.run import USUAL, evaluate_model
from concat_cli.core.evaluate.scores import (
    NO_SWEEP,
    PLAIN,
    Scoring,
    Sweep,
    check_split,
    sweep_offsets,
)
from concat_cli.core.infer.predictor import Predictor, seen_by, vocabulary_of
from concat_cli.core.method import TASKS, loaded, stage_named
from concat_cli.core.progress import SILENT, Progress
from concat_cli.core.runs import BUILT_IN
from concat_cli.core.vocabulary import Vocabulary, same_name

PART = "val"


@dataclass(frozen=True)
class Subject:
    """Weights and what they are scored on.

    own: the configuration as trained; cfg: with overrides. info: the data set; foreign: its classes
    are not those that the weights were made for, so they are divided by the names trained on.
    """

    weights: Weights
    own: Config
    cfg: Config
    info: DatasetInfo
    foreign: bool

    @property
    def able(self) -> tuple[str, ...]:
        """The tasks that the weights can be scored for."""
        method, _ = stage_named(self.weights.stage)
        return loaded(method.tasks)(self.own)

    def tasks(self, scoring: Scoring) -> tuple[str, ...]:
        """The tasks to score; UserError for what the truth or the weights have no figures of."""
        chosen = tasks_of(self.info, scoring, self.able)
        if scoring.diagnostics and "panoptic" not in self.able:
            raise UserError(
                "--diagnostics looks at segments, and these weights tell none of a class apart.",
                "Leave it out.",
            )
        return chosen

    def candidates(self, scoring: Scoring) -> Vocabulary:
        """The classes that compete; UserError for a split that is none with these weights."""
        vocabulary, split = self.info.vocabulary, scoring.split
        leaked = self.leaked()
        if split != "all" and leaked and not scoring.force:
            raise UserError(
                f"These weights were trained with labels of {len(leaked)} of the unseen classes, "
                f"like {leaked[0]}: there is no --split for them on this data set.",
                "Leave --split out: the report tells the leak. --force scores it all the same, for "
                "no zero-shot table.",
            )
        check_split(split, vocabulary)
        if scoring.candidates == "all":
            return vocabulary
        if split == "all":
            raise UserError(
                "--candidates split restricts the candidates to the classes of --split, which is "
                "all.",
                "Add --split unseen or --split seen.",
            )
        return Vocabulary(tuple(e for e in vocabulary.entries if e.seen == (split == "seen")))

    def leaked(self) -> list[str]:
        """The unseen classes that the weights were trained on with labels."""
        return unseen_among(self.info, self.weights.meta["trained"])

    def dataset(self) -> PanopticDataset:
        """The images that are scored."""
        return PanopticDataset(self.info.part(PART), self.info.vocabulary, keep_crowd=True)


def open_subject(weights: Path, overrides: Sequence[str] = (), *, tensors: bool = True) -> Subject:
    """Reads weights, without their tensors if nothing is to be predicted, and `dataset.json`."""
    read = open_weights(weights, tensors=tensors)
    own = config_of(read)
    cfg = override(own, overrides)
    if not cfg.data.root:
        raise UserError(
            f"{weights} has no data set of its own.", "Say what to score it on: data.root=data/ade"
        )
    info = read_dataset_info(Path(cfg.data.root))
    made_for = {same_name(name) for name in vocabulary_of(read).names}
    foreign = made_for != {same_name(name) for name in info.vocabulary.names}
    if foreign:
        vocabulary = seen_by(info.vocabulary, read)
        info = replace(info, vocabulary=vocabulary, class_split="by the names trained on")
    return Subject(read, own, cfg, info, foreign)


def evaluate_weights(
    weights: Path | str = BUILT_IN,
    overrides: Sequence[str] = (),
    scoring: Scoring = PLAIN,
    *,
    device: torch.device | str = "auto",
    share: Share = ALONE,
    progress: Progress = SILENT,
) -> Report:
    """The figures, in 0-1, of weights on the val part of a prepared data set.

    On the classes that the weights were made for, seen and unseen are as the data set has them; on
    another list of classes, by the names that the weights were trained on.

    Args:
        overrides: `section.key=value`, on top of the configuration that the weights carry;
            `data.root` is the data set, by default the one that they were trained on.
        scoring: which figures, of which classes; see `Scoring`.

    UserError for files that are missing or damaged, and for what these weights or this truth cannot
    be scored for.
    """
    if scoring.official:
        raise UserError(
            "--official compares files, not weights.",
            "Write them with --save, then score these with --predictions and --truth.",
        )
    subject = open_subject(Path(weights), overrides)
    tasks = subject.tasks(scoring)
    predictor = Predictor.load(
        subject.weights,
        subject.candidates(scoring),
        device,
        overrides=subject.cfg,
        force=scoring.force,
        progress=progress,
    )
    return evaluate_model(
        predictor,
        subject.dataset(),
        replace(scoring, tasks=tasks),
        sweep=_sweep(subject, predictor, scoring) if scoring.calibrate else NO_SWEEP,
        protocol=_protocol(subject, progress),
        workers=subject.cfg.data.workers,
        share=share,
        progress=progress,
    )


def tasks_of(
    info: DatasetInfo, scoring: Scoring = PLAIN, able: tuple[str, ...] = TASKS
) -> tuple[str, ...]:
    """The tasks to score: those asked for, else panoptic and semantic as far as the truth and the
    weights (`able`) go, or all that the truth can score; UserError where one of the two cannot.
    """
    asked = scoring.task_names()
    if asked is None:
        both = tuple(task for task in info.tasks if task in able)
        asked = tuple(task for task in USUAL if task in both) or both or info.tasks
    lacking = [task for task in asked if task not in info.tasks]
    if lacking:
        raise UserError(
            f"The truth of {info.root} cannot score: {', '.join(lacking)}.",
            f"It can score {', '.join(info.tasks)}.",
        )
    lacking = [task for task in asked if task not in able]
    if lacking:
        raise UserError(
            f"These weights cannot be scored for: {', '.join(lacking)}. They say of every pixel "
            "which class it is of, and tell no segments of a class apart.",
            f"Score them with --tasks {','.join(able)}, or give weights that were trained to tell "
            "segments apart.",
        )
    return tuple(task for task in TASKS if task in asked)


def _protocol(subject: Subject, progress: Progress) -> dict[str, Any]:
    """What the report says of the weights and of the data set."""
    weights, info = subject.weights, subject.info
    leaked = subject.leaked()
    if leaked:
        progress.say(
            f"these weights were trained with labels of unseen classes: {'; '.join(leaked)}"
        )
    taught = unseen_among(info, weights.meta.get("taught", ()))
    method, _ = stage_named(weights.stage)
    seen = [entry.name for entry in info.vocabulary.entries if entry.seen]
    overlap = {"count": len(seen), "of": len(info.vocabulary), "names": seen}
    filtering = weights.meta.get("data", {}).get("filtering")
    if filtering is None:  # weights that do not tell what was taken away before they were trained
        filtering = {} if subject.foreign else info.protocol
    # the mode is by how the weights were made, whatever was asked for or said now
    mode = "inductive" if method.inductive else subject.own.protocol.mode
    return {
        "mode": "transductive" if taught else mode,
        "stage": weights.stage,
        "weights": str(weights.path),
        "data": info.name,
        "class_split": info.class_split,
        "unseen_with_labels": len(leaked),
        "taught": len(taught),
        "filtering": dict(filtering),
        "overlap": overlap if subject.foreign else None,
    }


def unseen_among(info: DatasetInfo, names: Iterable[str]) -> list[str]:
    """Unseen classes of the data set that are among the names."""
    known = {same_name(name) for name in names}
    return [e.name for e in info.vocabulary.entries if not e.seen and same_name(e.name) in known]


def _sweep(subject: Subject, predictor: Predictor, scoring: Scoring) -> Sweep:
    """The offsets to try, and the one that training chose on dev, if it chose one."""
    vocabulary, own = subject.info.vocabulary, subject.own
    if scoring.split != "all" or not (vocabulary.seen_indices and vocabulary.unseen_indices):
        raise UserError(
            "--calibrate weighs seen against unseen classes, and needs both of them.",
            "Leave --split out, and score a data set with seen and unseen classes.",
        )
    _, stage = stage_named(subject.weights.stage)
    chosen = own.finetune.calibrate and "finetune" in stage.relevant
    dev = own.infer.seen_offset if chosen else None
    plain = predictor.cfg.seen_offset
    return Sweep(sweep_offsets(predictor.offset_scale, plain, dev), dev)
