"""CLIP-ZSS: a dense student, trained in one stage; CLIP's image encoder is its teacher only."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from concat_cli.core.clip.encoder import Clip, load_clip
from concat_cli.core.clip.tokens import TokenCache
from concat_cli.core.config import Config
from concat_cli.core.data.dataset import PanopticDataset
from concat_cli.core.data.loader import collate
from concat_cli.core.data.transforms import resize_short
from concat_cli.core.progress import SILENT, Progress
from concat_cli.core.runs import Run
from concat_cli.core.train.images import PICTURES, ImageStage, ImageTask, micro_batches
from concat_cli.core.train.loop import StageResult, parameter_groups
from concat_cli.core.train.session import Session, open_session
from concat_cli.core.train.targets import trained_indices, trained_labels
from concat_cli.core.train.teacher import Teacher
from concat_cli.methods.clip_zss.build import build_student, build_synthesizer, check_student_start
from concat_cli.methods.clip_zss.module import ClipZssModule, label_map, pseudo_options
from concat_cli.methods.clip_zss.predictor import DensePredictor
from concat_cli.methods.clip_zss.preview import write_pseudo_preview
from concat_cli.methods.clip_zss.pseudo_labels import fuse, pseudo_labels


class ClipZssTask(ImageTask):
    """The student over the images of the train part, scored by mIoU on dev."""

    module: ClipZssModule

    def parameter_groups(self) -> list[dict[str, Any]]:
        """The head learns faster than the encoder where `optim.backbone_factor` says so."""
        factors = {
            "student.encoder": self.optim.backbone_factor,
            "student.log_scale": self.optim.scale_factor,
        }
        return parameter_groups(self.module, self.optim.lr, self.optim.weight_decay, factors)

    def weights(self, state: dict[str, Tensor]) -> dict[str, Tensor]:
        """The student alone: no synthesizer, no bank, nothing of CLIP."""
        return {k: v for k, v in state.items() if k.startswith("student.")}

    @property
    def scored(self) -> str:
        """By mIoU: a student has no segments."""
        return "semantic"

    def predictor(self) -> DensePredictor:
        """The module's student over the seen classes."""
        session, vocabulary = self.session, self.session.info.vocabulary.seen_only()
        return DensePredictor(
            self.module.student,
            self.text,
            vocabulary,
            session.cfg.infer,
            session.device,
            session.dtype,
        )


def train_clip_zss(
    cfg: Config,
    run: Run,
    *,
    device: str = "auto",
    fresh: bool = False,
    progress: Progress = SILENT,
    preview: Path | None = None,
) -> StageResult:
    """Trains a student, or resumes it; its weights are in `runs/<name>/clip_zss/`.

    preview: write a picture of the pseudo labels of some training images there, and train nothing.
    """
    session = open_session(cfg, device, progress)
    micro_batches(cfg.optim, session.processes)  # what cannot be trained leaves no folder behind
    check_student_start(cfg.clip_zss)
    looks = cfg.clip_zss.glm > 0 or cfg.clip_zss.pseudo or preview is not None
    clip = load_clip(
        cfg.clip, session.device, looks, dtype=session.teacher_dtype, progress=progress
    )
    if looks:
        session.place(clip.model.visual)
    if preview is not None:
        if session.processes.is_main:
            _draw_pseudo_labels(session, clip, preview)
        return StageResult(preview, 0, 0.0, False, {})
    torch.manual_seed(cfg.optim.seed)
    student = build_student(cfg.clip_zss, clip.embed_dim, pretrained=True, progress=progress)
    synthesizer = build_synthesizer(cfg.clip_zss, clip.embed_dim)
    session.place(student)
    images = ImageStage.open(session, run.stage("clip_zss"), clip, fresh=fresh)
    module = ClipZssModule(
        student,
        synthesizer,
        images.text,
        images.to_trained,
        cfg.clip_zss,
        _teacher(cfg, clip),
    )
    return images.fit(module, ClipZssTask)


def _teacher(cfg: Config, clip: Clip) -> Teacher | None:
    """What gives CLS tokens, where CLIP's image encoder was loaded."""
    if not clip.has_image_tower:
        return None
    cache = None
    if cfg.clip_zss.source == "cache":
        cache = TokenCache(Path(cfg.data.root) / "clip", clip.identity, clip.embed_dim, clip.dtype)
    return Teacher(clip, 1, cache)


def _draw_pseudo_labels(session: Session, clip: Clip, path: Path) -> None:
    """The pseudo labels of the first training images, not augmented."""
    vocabulary, cfg = session.info.vocabulary, session.cfg
    seen = vocabulary.seen_only()
    train = PanopticDataset(session.info.part("train"), vocabulary)
    to_trained = trained_indices(vocabulary.is_seen, session.device)
    samples = [
        resize_short(train[index], cfg.data.crop, 2 * cfg.data.crop)
        for index in range(min(PICTURES, len(train)))
    ]
    truths, fused = [], []
    for sample in samples:  # one by one, as their sizes may differ
        batch = collate([sample], [0]).to(session.device)
        truth = label_map(batch.segment_map, trained_labels(batch.labels, to_trained))
        options = pseudo_options(cfg.clip_zss)
        pseudo = pseudo_labels(clip, batch.images, truth, batch.padding, options)
        height, width = sample.segment_map.shape
        for labels, kept in ((truth, truths), (fuse(truth, pseudo, len(seen)), fused)):
            kept.append(labels[0, :height, :width].cpu().numpy())
    write_pseudo_preview(path, [sample.image for sample in samples], truths, fused, seen.names)
