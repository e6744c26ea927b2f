"""Stages that learn from images: their task of the loop, and what they may learn from."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from itertools import islice
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from concat_cli.core.clip.encoder import Clip
from concat_cli.core.config import Config, OptimConfig
from concat_cli.core.data.dataset import PanopticDataset, training_part
from concat_cli.core.data.loader import Batch, StepSampler, make_loader
from concat_cli.core.data.transforms import Augment
from concat_cli.core.device import Share, cpu_threads
from concat_cli.core.errors import UserError
from concat_cli.core.evaluate.instance import InstanceQuality
from concat_cli.core.evaluate.quality import Quality, SemanticQuality
from concat_cli.core.evaluate.run import evaluate_model
from concat_cli.core.evaluate.scores import Scoring
from concat_cli.core.files import atomic_path
from concat_cli.core.infer.predictor import Predictor
from concat_cli.core.infer.render import Drawing, side_by_side, stack
from concat_cli.core.method import TASKS
from concat_cli.core.progress import Progress
from concat_cli.core.runs import StageDir
from concat_cli.core.train.distributed import Processes, gather_objects
from concat_cli.core.train.loop import Fit, StageResult, parameter_groups
from concat_cli.core.train.session import Session, embed, open_session
from concat_cli.core.train.teacher import ImageModule, merged_by_category, trained_indices
from concat_cli.core.vocabulary import Vocabulary

PICTURES = 4  # of a preview


class ImageTask:
    """A task of the loop over the images of the train part, scored on dev.

    by_category: an image has one mask for each class present; scored by mIoU. part: the submodule
    that its weights files hold; its backbone and logit scale have learning rates of their own.
    """

    part, backbone, scale = "segmentor", "backbone", "classifier.log_scale"
    predicts: type[Predictor] = Predictor

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

    def counts(self, batch: Batch) -> Mapping[str, Tensor]:
        """What the module counts in a batch."""
        return self.module.counts(batch) if isinstance(self.module, ImageModule) else {}

    def parameter_groups(self) -> list[dict[str, Any]]:
        """Mask2Former's groups, and one of the learned logit scale [ours]."""
        factors = {
            f"{self.part}.{self.backbone}": self.optim.backbone_factor,
            f"{self.part}.{self.scale}": self.optim.scale_factor,
        }
        return parameter_groups(self.module, self.optim.lr, self.optim.weight_decay, factors)

    def describe(self, batch: Batch) -> str:
        """The images of a batch."""
        return "images " + ", ".join(batch.file_names)

    def weights(self, state: dict[str, Tensor]) -> dict[str, Tensor]:
        """Those of its part alone."""
        return {k: v for k, v in state.items() if k.startswith(f"{self.part}.")}

    def score(self, step: int) -> dict[str, float]:
        """PQ, mIoU or AP on dev, which holds seen classes alone."""
        if self.dev is None:
            return {}
        processes = self.session.processes
        share = Share(processes.rank, processes.world, gather_objects)
        scoring = Scoring(tasks=self.scored, check=False)
        report = evaluate_model(self.predictor(), self.dev, scoring, share=share)
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
        """The module's part over the seen classes."""
        session, vocabulary = self.session, self.session.info.vocabulary.seen_only()
        return self.predicts(
            self.module.get_submodule(self.part),
            self.text,
            vocabulary,
            session.cfg.infer,
            session.device,
            session.dtype,
        )


def open_image_session(
    cfg: Config, device: str, progress: Progress, force: bool = False
) -> Session:
    """`open_session` of a stage that learns from images; UserError where its steps do not divide
    into forwards, before anything is loaded or a folder made."""
    session = open_session(cfg, device, progress, force)
    micro_batches(cfg.optim, session.processes)
    return session


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
        train = training_part(session.info, cfg.data.cache)
        inputs = {"classes": classes_digest(vocabulary), "training images": train.digest()}
        session.open_stage(stage, fresh=fresh, inputs=inputs)
        meta = session.meta(stage.stage, clip.identity)
        return ImageStage(session, stage, meta, text, to_trained, train, by_category)

    def unfinished(self, part: StageResult) -> StageResult:
        """The result of a stage that was stopped in a part before its own first step."""
        return replace(part, weights=self.stage.last, steps=0)

    def fit(
        self,
        module: nn.Module,
        task: type[ImageTask] = ImageTask,
        optim: OptimConfig | None = None,
        part: str = "",
    ) -> StageResult:
        """Trains the module, or goes on with it.

        task: what it is trained as. optim: by default that of the configuration. part: of the
        stage with a loop of its own, such as a warm-up.
        """
        session, optim = self.session, optim or self.session.cfg.optim
        module.to(session.device)
        made = task(module, session, self.text, optim, self.train, self.by_category)
        stage = self.stage.inner(part) if part else self.stage
        with cpu_threads(optim.threads):
            return Fit(made, optim, stage, session, self.meta).run()


def classes_digest(vocabulary: Vocabulary) -> str:
    """A digest of the names, their order and kinds, and which of them are seen."""
    rows = [[entry.name, entry.kind, entry.seen] for entry in vocabulary.entries]
    return hashlib.sha256(json.dumps(rows).encode()).hexdigest()


def write_preview(predictor: Predictor, dataset: PanopticDataset, path: Path) -> None:
    """Writes image, truth and prediction of the first images of a data set, a row each."""
    samples = [dataset[index] for index in range(min(PICTURES, len(dataset)))]
    predictions = predictor.predict_batch([sample.image for sample in samples])
    rows = [
        side_by_side(
            sample.image,
            Drawing.of_sample(sample, dataset.vocabulary),
            Drawing.of_prediction(prediction),
        )
        for sample, prediction in zip(samples, predictions, strict=True)
    ]
    path.parent.mkdir(parents=True, exist_ok=True)
    with atomic_path(path) as temporary:
        stack(rows).save(temporary, format="PNG")
