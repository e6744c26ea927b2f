"""CLIP-ZSS's only stage: a dense student; CLIP's image encoder is its teacher and no more."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from PIL.Image import Image

from concat_cli.core.build import check_own_masks
from concat_cli.core.clip.encoder import Clip, load_clip
from concat_cli.core.config import Config, ModelConfig
from concat_cli.core.data.dataset import PanopticDataset
from concat_cli.core.data.loader import collate
from concat_cli.core.data.transforms import resize_short
from concat_cli.core.files import atomic_path
from concat_cli.core.infer.render import Drawing, Mark, enlarged, enlargement, overlay, panel
from concat_cli.core.progress import SILENT, Progress
from concat_cli.core.runs import Run
from concat_cli.core.train.images import PICTURES, ImageStage, ImageTask, open_image_session
from concat_cli.core.train.loop import StageResult
from concat_cli.core.train.plan import (
    Plan,
    clip_facts,
    clip_width,
    size_facts,
    start_facts,
    training_facts,
)
from concat_cli.core.train.session import Session, seed_torch
from concat_cli.core.train.teacher import trained_indices, trained_labels
from concat_cli.methods.clip_zss.config import ClipZssConfig
from concat_cli.methods.clip_zss.module import ClipZssModule, label_map
from concat_cli.methods.clip_zss.predictor import DensePredictor
from concat_cli.methods.clip_zss.pseudo_labels import fuse, pseudo_labels
from concat_cli.methods.clip_zss.student import (
    build_student,
    build_synthesizer,
    check_student_start,
)

CAPTIONS = ("image", "annotation", "pseudo labels", "fused")  # of a preview


class ClipZssTask(ImageTask):
    """The student over the images of the train part, scored by mIoU on dev."""

    part, backbone, scale = "student", "encoder", "log_scale"
    predicts = DensePredictor

    @property
    def scored(self) -> str:
        """By mIoU: a student has no segments."""
        return "semantic"


def train_clip_zss(
    cfg: Config,
    run: Run,
    *,
    device: str = "auto",
    fresh: bool = False,
    force: bool = False,
    progress: Progress = SILENT,
    preview: Path | None = None,
) -> StageResult:
    """Trains a student, or resumes it; its weights are in `runs/<name>/clip_zss/`.

    preview: write a picture of the pseudo labels of some training images there, and train nothing.
    """
    check_own_masks(cfg, "CLIP-ZSS")
    own = cfg.own(ClipZssConfig)
    session = open_image_session(cfg, device, progress, force)
    check_student_start(own)
    looks = own.glm > 0 or own.pseudo or preview is not None
    clip = load_clip(
        cfg.clip, session.device, looks, dtype=session.teacher_dtype, progress=progress
    )
    if looks:
        session.place(clip.model.visual)
    if preview is not None:
        if session.processes.is_main:
            _draw_pseudo_labels(session, clip, preview)
        return StageResult(preview, 0, 0.0, False, {})
    seed_torch(cfg.optim.seed)
    student = build_student(own, clip.embed_dim, pretrained=True, progress=progress)
    synthesizer = build_synthesizer(own, clip.embed_dim)
    session.place(student)
    images = ImageStage.open(session, run.stage("clip_zss"), clip, fresh=fresh)
    teacher = session.teacher(clip, 1, own.source) if looks else None
    module = ClipZssModule(student, synthesizer, images.text, images.to_trained, own, teacher)
    return images.fit(module, ClipZssTask)


def plan(cfg: Config, run: Run, weights: Path | None, vocabulary: Path | None) -> Plan:
    """What `train_clip_zss` would do; UserError for what would stop it at once."""
    check_own_masks(cfg, "CLIP-ZSS")
    own = cfg.own(ClipZssConfig)
    with torch.device("meta"):
        student = build_student(own, clip_width(cfg.clip) or 512)
    parts = {
        "GLM": own.glm > 0,
        "pseudo labels": own.pseudo,
        "synthesizer": own.pseudo and own.synthesizer > 0,
    }
    facts = training_facts(cfg.optim, student, run.stage("clip_zss"))
    facts["student"] = f"{own.encoder}, {size_facts(student, cfg.clip)}"
    facts["parts"] = ", ".join(name for name, on in parts.items() if on) or "seen pixels alone"
    start = ModelConfig(backbone=own.encoder, backbone_weights=own.encoder_weights)
    return facts | clip_facts(cfg.clip) | start_facts(start, student, student.encoder)


def _draw_pseudo_labels(session: Session, clip: Clip, path: Path) -> None:
    """Writes a PNG with a row for each of the first training images, which are not augmented."""
    vocabulary, cfg = session.info.vocabulary, session.cfg
    seen = vocabulary.seen_only()
    train = PanopticDataset(session.info.part("train"), vocabulary)
    to_trained = trained_indices(vocabulary.is_seen, session.device)
    rows: list[list[Image]] = []
    for index in range(min(PICTURES, len(train))):  # one by one, as their sizes may differ
        sample = resize_short(train[index], cfg.data.crop, 2 * cfg.data.crop)
        batch = collate([sample], [0]).to(session.device)
        truth = label_map(batch.segment_map, trained_labels(batch.labels, to_trained))
        own = cfg.own(ClipZssConfig)
        pseudo = pseudo_labels(clip, batch.images, truth, batch.padding, own)
        height, width = sample.segment_map.shape
        known, both = (
            labels[0, :height, :width].cpu().numpy()
            for labels in (truth, fuse(truth, pseudo, len(seen)))
        )
        rows.append(preview_row(sample.image, known, both, seen.names))
    path.parent.mkdir(parents=True, exist_ok=True)
    with atomic_path(path) as temporary:
        panel(rows, captions=CAPTIONS).save(temporary, format="PNG")


def preview_row(
    image: NDArray[np.uint8],
    known: NDArray[np.integer],
    both: NDArray[np.integer],
    names: Sequence[str],
) -> list[Image]:
    """Image (H, W, 3), annotation, pseudo labels, fused, of class indices (H, W), -1 for none;
    those from `len(names)` on are pseudo classes."""
    made = np.where(both >= len(names), both, -1)
    scale = enlargement(*known.shape)
    drawings = (label_drawing(each, names) for each in (known, made, both))
    return [enlarged(image, scale), *(overlay(image, one, scale=scale) for one in drawings)]


def label_drawing(labels: NDArray[np.integer], names: Sequence[str]) -> Drawing:
    """Labels as of `preview_row` -> what to draw; pseudo classes are called by their number."""
    there = [int(label) for label in np.unique(labels) if label >= 0]
    called = [names[k] if k < len(names) else f"#{k - len(names) + 1}" for k in there]
    marks = (Mark(label + 1, name, True) for label, name in zip(there, called, strict=True))
    return Drawing(labels + 1, tuple(marks))
