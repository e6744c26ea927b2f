"""Stage 1: the segmentor, trained on seen classes and aligned with CLIP (CON)."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator
from dataclasses import dataclass, replace
from itertools import islice
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from concat_cli.core.build import build_segmentor, check_start
from concat_cli.core.clip.encoder import Clip, load_clip
from concat_cli.core.clip.tokens import TokenCache
from concat_cli.core.config import Config, OptimConfig
from concat_cli.core.data.dataset import PanopticDataset
from concat_cli.core.data.loader import Batch, StepSampler, make_loader
from concat_cli.core.data.transforms import Augment
from concat_cli.core.errors import UserError
from concat_cli.core.evaluate.instance import InstanceQuality
from concat_cli.core.evaluate.panoptic import Quality
from concat_cli.core.evaluate.run import evaluate_model
from concat_cli.core.evaluate.semantic import SemanticQuality
from concat_cli.core.infer.predictor import Predictor
from concat_cli.core.infer.tasks import TASKS
from concat_cli.core.model.segmentor import Segmentor
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
from concat_cli.core.train.zegformer_module import ZegFormerModule, merged_by_category
from concat_cli.core.vocabulary import Vocabulary


class ImageTask:
    """A task of the loop over the images of the train part, scored on dev.

    by_category: an image has one mask for each class present; scored by mIoU.
    """

    def __init__(
        self,
        module: nn.Module,
        session: Session,
        text: Tensor,
        optim: OptimConfig,
        train: PanopticDataset,
        by_category: bool = False,
    ) -> None:
        self.module, self.session, self.text, self.optim = module, session, text, optim
        self.train, self.by_category = train, by_category
        cfg, info = session.cfg, session.info
        self.dev = None
        if "dev" in info.parts:
            seen = info.vocabulary.seen_only()
            self.dev = PanopticDataset(info.part("dev"), seen, cache=cfg.data.cache)

    @property
    def scored(self) -> str:
        """The task it is scored for: the first that the truth of dev can score."""
        wanted = ("semantic", *TASKS) if self.by_category else TASKS
        return next(task for task in wanted if task in self.session.info.tasks)

    def batches(self, start: int) -> Iterator[list[Batch]]:
        """The micro-batches of this process, a list a step."""
        cfg, processes = self.session.cfg, self.session.processes
        size, parts = micro_batches(self.optim, processes)
        stream = make_loader(
            self.train,
            Augment(cfg.data),
            StepSampler(size, parts, processes.rank, processes.world, start),
            self.optim.seed,
            cfg.data.workers,
        )
        if self.by_category:
            stream = map(merged_by_category, stream)
        while True:
            yield list(islice(stream, parts))

    def parameter_groups(self) -> list[dict[str, Any]]:
        """Mask2Former's groups, and one of the learned logit scale [ours]."""
        factors = {
            "segmentor.backbone": self.optim.backbone_factor,
            "segmentor.classifier.log_scale": self.optim.scale_factor,
        }
        return parameter_groups(self.module, self.optim.lr, self.optim.weight_decay, factors)

    def describe(self, batch: Batch) -> str:
        """The images of a batch."""
        return "images " + ", ".join(batch.file_names)

    def weights(self, state: dict[str, Tensor]) -> dict[str, Tensor]:
        """The segmentor alone."""
        return {k: v for k, v in state.items() if k.startswith("segmentor.")}

    def score(self, step: int) -> dict[str, float]:
        """PQ, mIoU or AP on dev, which holds seen classes alone."""
        if self.dev is None:
            return {}
        processes = self.session.processes
        report = evaluate_model(
            self.predictor(),
            self.dev,
            tasks=(self.scored,),
            rank=processes.rank,
            world=processes.world,
            gather=gather_objects,
        )
        found = getattr(report, self.scored)["all"]
        if isinstance(found, SemanticQuality):
            return {"score": found.miou, "miou": found.miou, "pacc": found.pacc}
        if isinstance(found, Quality):
            return {"score": found.pq, "pq": found.pq, "sq": found.sq, "rq": found.rq}
        if isinstance(found, InstanceQuality):
            return {"score": found.ap, "ap": found.ap, "ap50": found.ap50}
        return {}

    def preview(self, path: Path) -> None:
        """Image, truth and prediction of a few dev images."""
        write_preview(self.predictor(), self.dev if self.dev is not None else self.train, path)

    def predictor(self) -> Predictor:
        """The module's segmentor over the seen classes."""
        session, vocabulary = self.session, self.session.info.vocabulary.seen_only()
        return Predictor(
            self.module.get_submodule("segmentor"),
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


@dataclass(frozen=True)
class ImageStage:
    """A stage that learns from images, opened: where its files are and what it may learn from.

    text: (K, E) of the seen classes, and of no other. to_trained: see `ConModule`. by_category: see
    `ImageTask`.
    """

    session: Session
    stage: StageDir
    meta: dict[str, Any]
    text: Tensor
    to_trained: Tensor
    train: PanopticDataset
    by_category: bool

    @staticmethod
    def open(
        session: Session, stage: StageDir, clip: Clip, *, fresh: bool, by_category: bool = False
    ) -> ImageStage:
        """Makes the folder or finds that it can be resumed; see `StageDir.open`."""
        cfg, vocabulary = session.cfg, session.info.vocabulary
        text = embed(clip, vocabulary.seen_only(), cfg, session.device)
        to_trained = trained_indices(vocabulary.is_seen, session.device)
        train = PanopticDataset(session.info.part("train"), vocabulary, cache=cfg.data.cache)
        inputs = {"classes": classes_digest(vocabulary), "training images": train.digest()}
        session.open_stage(stage, fresh=fresh, inputs=inputs)
        meta = session.meta(stage.stage, clip)
        return ImageStage(session, stage, meta, text, to_trained, train, by_category)

    def warm_up(self, segmentor: Segmentor, teacher: Teacher | None) -> bool:
        """The warm-up, where one is asked for and was not done yet; False if it was stopped."""
        cfg = self.session.cfg
        if not cfg.warmup.steps or self.stage.state.exists():
            return True
        module = WarmupModule(
            segmentor, self.text, self.to_trained, cfg.loss, cfg.align, cfg.warmup, teacher
        )
        optim = replace(cfg.optim, steps=cfg.warmup.steps, lr=cfg.warmup.lr, ema=0.0, eval_every=0)
        task = WarmupTask(module, self.session, self.text, optim, self.train, self.by_category)
        return _fit(task, self.stage.inner("warmup"), self.meta).finished

    def unfinished(self) -> StageResult:
        """The result of a stage that was stopped before its own first step."""
        return StageResult(self.stage.last, 0, 0.0, False, {})

    def fit(self, module: ConModule | ZegFormerModule) -> StageResult:
        """Trains the module, or goes on with it."""
        session = self.session
        task = ImageTask(
            module, session, self.text, session.cfg.optim, self.train, self.by_category
        )
        return _fit(task, self.stage, self.meta)


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
    cache = None
    if cfg.align.source == "cache":
        cache = TokenCache(Path(cfg.data.root) / "clip", clip.identity, clip.embed_dim)
    teacher = Teacher(clip, cfg.align.crops, cache)
    torch.manual_seed(cfg.optim.seed)
    segmentor = build_segmentor(cfg.model, clip.embed_dim, pretrained=True, progress=progress)
    session.place(segmentor)
    images = ImageStage.open(session, run.stage("con"), clip, fresh=fresh)
    if not images.warm_up(segmentor, teacher):
        return images.unfinished()
    return images.fit(
        ConModule(segmentor, images.text, images.to_trained, cfg.loss, cfg.align, teacher)
    )


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
