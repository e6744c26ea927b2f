"""Stage 1: the segmentor, trained on seen classes and aligned with CLIP (CON)."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator
from dataclasses import replace
from itertools import islice
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from concat_cli.core.build import build_segmentor, check_start
from concat_cli.core.clip.encoder import load_clip
from concat_cli.core.clip.tokens import TokenCache
from concat_cli.core.config import Config, OptimConfig
from concat_cli.core.data.dataset import PanopticDataset
from concat_cli.core.data.loader import Batch, make_loader
from concat_cli.core.data.transforms import Augment
from concat_cli.core.errors import UserError
from concat_cli.core.evaluate.run import evaluate_model
from concat_cli.core.infer.predictor import Predictor
from concat_cli.core.progress import SILENT, Progress
from concat_cli.core.runs import Run, StageDir
from concat_cli.core.train.con_module import ConModule
from concat_cli.core.train.distributed import Processes, gather_objects
from concat_cli.core.train.loop import Fit, StageResult
from concat_cli.core.train.optim import parameter_groups
from concat_cli.core.train.preview import write_preview
from concat_cli.core.train.session import Session, embed, open_session
from concat_cli.core.train.teacher import Teacher
from concat_cli.core.train.warmup import WarmupModule
from concat_cli.core.vocabulary import Vocabulary


class ImageTask:
    """A task of the loop over the images of the train part, scored on dev."""

    def __init__(
        self,
        module: ConModule | WarmupModule,
        session: Session,
        text: Tensor,
        optim: OptimConfig,
        train: PanopticDataset,
    ) -> None:
        self.module, self.session, self.text, self.optim = module, session, text, optim
        self.train = train
        cfg, info = session.cfg, session.info
        self.dev = None
        if "dev" in info.parts:
            seen = info.vocabulary.seen_only()
            self.dev = PanopticDataset(info.part("dev"), seen, cache=cfg.data.cache)

    def batches(self, start: int) -> Iterator[list[Batch]]:
        """The micro-batches of this process, a list a step."""
        cfg, processes = self.session.cfg, self.session.processes
        size, parts = micro_batches(self.optim, processes)
        stream = make_loader(
            self.train,
            Augment(cfg.data),
            size,
            self.optim.seed,
            start,
            processes.rank,
            processes.world,
            cfg.data.workers,
            parts,
        )
        while True:
            yield list(islice(stream, parts))

    def parameter_groups(self) -> list[dict[str, Any]]:
        """Mask2Former's groups; the learned logit scale runs three times as fast [ours]."""
        factors = {
            "segmentor.backbone": self.optim.backbone_factor,
            "segmentor.classifier.log_scale": 3.0,
        }
        return parameter_groups(self.module, self.optim.lr, self.optim.weight_decay, factors)

    def describe(self, batch: Batch) -> str:
        """The images of a batch."""
        return "images " + ", ".join(batch.file_names)

    def weights(self, state: dict[str, Tensor]) -> dict[str, Tensor]:
        """The segmentor alone."""
        return {k: v for k, v in state.items() if k.startswith("segmentor.")}

    def score(self, step: int) -> dict[str, float]:
        """PQ on dev, which holds seen classes alone."""
        if self.dev is None:
            return {}
        processes = self.session.processes
        report = evaluate_model(
            self.predictor(),
            self.dev,
            with_semantic=False,
            rank=processes.rank,
            world=processes.world,
            gather=gather_objects,
        )
        figures = report.panoptic["all"]
        if figures is None:
            return {}
        return {"score": figures.pq, "pq": figures.pq, "sq": figures.sq, "rq": figures.rq}

    def preview(self, path: Path) -> None:
        """Image, truth and prediction of a few dev images."""
        write_preview(self.predictor(), self.dev if self.dev is not None else self.train, path)

    def predictor(self) -> Predictor:
        """The module's segmentor over the seen classes."""
        session, vocabulary = self.session, self.session.info.vocabulary.seen_only()
        return Predictor(
            self.module.segmentor,
            self.text,
            vocabulary,
            session.cfg.infer,
            session.device,
            session.dtype,
        )


class WarmupTask(ImageTask):
    """The same over the warm-up module, which has nothing to score or show."""

    def score(self, step: int) -> dict[str, float]:
        """Nothing: the query decoder is still random."""
        return {}

    def preview(self, path: Path) -> None:
        """Nothing to show."""


def micro_batches(optim: OptimConfig, processes: Processes) -> tuple[int, int]:
    """Images of one forward of one process, and how many forwards make a step."""
    each, left = divmod(optim.batch_size, processes.world)
    size = min(each, optim.per_device)
    if left or size < 1 or each % size:
        raise UserError(
            f"optim.batch_size={optim.batch_size} does not divide into {processes.world} processes "
            f"with forwards of {optim.per_device} images.",
            "make it a multiple of processes x optim.per_device.",
        )
    return size, each // size


def train_con(
    cfg: Config,
    run: Run,
    *,
    device: str = "auto",
    fresh: bool = False,
    progress: Progress = SILENT,
) -> StageResult:
    """Trains stage 1 of a run, or resumes it; its weights are in `runs/<name>/con/`."""
    session = open_session(cfg, device, progress)
    micro_batches(cfg.optim, session.processes)  # what cannot be trained leaves no folder behind
    check_start(cfg.model)
    clip = load_clip(cfg.clip, session.device)
    vocabulary = session.info.vocabulary
    text = embed(clip, vocabulary.seen_only(), cfg, session.device)
    cache = None
    if cfg.align.source == "cache":
        cache = TokenCache(Path(cfg.data.root) / "clip", clip.identity, clip.embed_dim)
    teacher = Teacher(clip, cfg.align.crops, cache)
    torch.manual_seed(cfg.optim.seed)
    segmentor = build_segmentor(cfg.model, clip.embed_dim, pretrained=True, progress=progress)
    segmentor = segmentor.to(session.device)
    if cfg.optim.channels_last:
        segmentor = segmentor.to(memory_format=torch.channels_last)
    to_trained = trained_indices(vocabulary.is_seen, session.device)
    part = session.info.part("train")
    train = PanopticDataset(part, vocabulary, cache=cfg.data.cache)
    inputs = {"classes": classes_digest(vocabulary), "training images": train.digest()}
    stage = session.open_stage(run.stage("con"), fresh=fresh, inputs=inputs)
    meta = session.meta("con", clip)
    if cfg.warmup.steps and not stage.state.exists():
        module = WarmupModule(segmentor, text, to_trained, cfg.loss, cfg.align, cfg.warmup, teacher)
        optim = replace(cfg.optim, steps=cfg.warmup.steps, lr=cfg.warmup.lr, ema=0.0, eval_every=0)
        task = WarmupTask(module, session, text, optim, train)
        if not _fit(task, stage.inner("warmup"), meta).finished:
            return StageResult(stage.last, 0, 0.0, False, {})
    module = ConModule(segmentor, text, to_trained, cfg.loss, cfg.align, teacher)
    task = ImageTask(module.to(session.device), session, text, cfg.optim, train)
    return _fit(task, stage, meta)


def classes_digest(vocabulary: Vocabulary) -> str:
    """A digest of the names, their order and kinds, and which of them are seen."""
    rows = [[entry.name, entry.kind, entry.seen] for entry in vocabulary.entries]
    return hashlib.sha256(json.dumps(rows).encode()).hexdigest()


def trained_indices(is_seen: tuple[bool, ...], device: torch.device) -> Tensor:
    """(all classes,) int64: the index among the seen classes, -1 for unseen ones."""
    seen = torch.tensor(is_seen, device=device)
    return torch.where(seen, seen.cumsum(0) - 1, -1)


def _fit(task: ImageTask, stage: StageDir, meta: dict[str, Any]) -> StageResult:
    session = task.session
    task.module.to(session.device)
    return Fit(
        task,
        task.optim,
        stage,
        device=session.device,
        dtype=session.dtype,
        meta=meta,
        progress=session.progress,
        processes=session.processes,
    ).run()
