"""The query bank: what the frozen segmentor's queries are for every training image, on disk.

CAT and finetuning look only at queries, so the images are passed through the segmentor once.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from concat_cli.core.config import BankConfig, Config
from concat_cli.core.data.dataset import PanopticDataset, Sample
from concat_cli.core.data.loader import Batch, collate
from concat_cli.core.data.transforms import Augment, resize_short
from concat_cli.core.errors import UserError
from concat_cli.core.files import write_error, write_json
from concat_cli.core.losses.classes import query_targets
from concat_cli.core.losses.matcher import match
from concat_cli.core.model.segmentor import Segmentor
from concat_cli.core.progress import SILENT, Progress
from concat_cli.core.train.targets import on_void, trained_labels, void_of, with_slots

EMPTY, IGNORED = -1, -2  # classes of queries without a segment, and of queries on void
SYNC_EVERY = 16  # batches between two points that a killed pass can resume from
FLUSHED = "bank.json"


@dataclass(frozen=True)
class QueryBank:
    """queries: (M, Q, D) float16. classes: (M, Q) int16, index among the trained classes, or
    EMPTY, or IGNORED. M images (times views); both memory-mapped."""

    queries: np.ndarray
    classes: np.ndarray

    @property
    def width(self) -> int:
        """D."""
        return self.queries.shape[-1]

    def held(self, without: tuple[int, ...] = ()) -> np.ndarray:
        """Flat indices of the queries that hold a segment of a class not in `without`."""
        classes = np.asarray(self.classes).reshape(-1)
        return np.flatnonzero((classes >= 0) & ~np.isin(classes, without))

    def empty(self) -> np.ndarray:
        """Flat indices of the queries without a segment; those on void are not among them."""
        return np.flatnonzero(np.asarray(self.classes).reshape(-1) == EMPTY)

    def take(self, flat: np.ndarray) -> tuple[Tensor, Tensor]:
        """Queries (N, D) fp32 and classes (N,) int64 at flat indices."""
        queries = self.queries.reshape(-1, self.width)[flat]
        classes = self.classes.reshape(-1)[flat]
        return torch.from_numpy(queries.astype(np.float32)), torch.from_numpy(
            classes.astype(np.int64)
        )


@dataclass(frozen=True)
class Banks:
    """The query banks of a run: train, and dev (train again where the data set has no dev)."""

    train: QueryBank
    dev: QueryBank


def open_bank(
    folder: Path,
    segmentor: Segmentor,
    text: Tensor,
    to_trained: Tensor,
    dataset: PanopticDataset,
    cfg: Config,
    identity: str,
    *,
    augmented: bool,
    writes: bool = True,
    dtype: torch.dtype | None = None,
    progress: Progress = SILENT,
) -> QueryBank:
    """The bank in `folder`; written, or resumed where a killed pass left off, if it must be.

    Args:
        text: (K, E) of the trained classes; to_trained: see `ConModule`.
        identity: of the weights; a bank of others is written anew.
        augmented: training views, `bank.views` of them; else the plain images once.
        writes: False in a process that only reads what another one has finished.
    """
    images = min(len(dataset), cfg.bank.images or len(dataset))
    rows = images * (cfg.bank.views if augmented else 1)
    shape = (rows, segmentor.query_decoder.queries, segmentor.query_decoder.width)
    facts = {
        "weights": identity,
        "shape": list(shape),
        "part": str(dataset.part.index),
        "augmented": augmented,
        "trained": to_trained.tolist(),
        "segments": dataset.digest(),
        "config": _facts(cfg),
    }
    done = _done(folder, facts)
    assert writes or done == rows, f"{folder} is not finished"
    try:
        folder.mkdir(parents=True, exist_ok=True)
        if not done:  # what is about to be overwritten must not be taken for complete
            (folder / FLUSHED).unlink(missing_ok=True)
        mode = "r+" if done else "w+"
        queries = np.lib.format.open_memmap(folder / "queries.npy", mode, np.float16, shape)
        classes = np.lib.format.open_memmap(folder / "classes.npy", mode, np.int16, shape[:2])
    except OSError as error:
        raise write_error(folder, error) from error
    if done < rows:
        views = _views(dataset, cfg, images, rows, done, augmented)
        device = text.device
        total = -(-(rows - done) // cfg.infer.batch)
        row = done
        for number, batch in enumerate(progress.track(views, f"bank {folder.name}", total), 1):
            with torch.autocast(device.type, dtype, enabled=dtype is not None):
                found = describe(segmentor, batch.to(device), text, to_trained, cfg)
            queries[row : row + len(batch)] = found[0].cpu().numpy()
            classes[row : row + len(batch)] = found[1].cpu().numpy()
            row += len(batch)
            if number % SYNC_EVERY == 0 or row == rows:
                queries.flush()
                classes.flush()
                write_json(folder / FLUSHED, facts | {"done": row})
    return QueryBank(queries, classes)


def _facts(cfg: Config) -> list[Any]:
    """The configuration that a bank's content depends on."""
    data, loss = cfg.data, cfg.loss
    side = [] if data.scale_side == "long" else [data.scale_side]  # banks without it stay valid
    return [
        [cfg.bank.views, cfg.bank.images, cfg.bank.void_share],
        [data.crop, data.flip, data.scale_min, data.scale_max, data.colour, cfg.optim.seed, *side],
        [loss.classes, loss.mask, loss.dice, loss.points],
        [cfg.infer.size, cfg.infer.max_size],
        [cfg.clip.templates, cfg.clip.clean_names],
    ]


@torch.no_grad()
def describe(
    segmentor: Segmentor, batch: Batch, text: Tensor, to_trained: Tensor, cfg: Config
) -> tuple[Tensor, Tensor]:
    """Final vision queries (B, Q, D) of a batch and what each holds, (B, Q): see `QueryBank`."""
    batch = with_slots(batch, 1)
    labels = trained_labels(batch.labels, to_trained)
    masks = batch.masks() & (labels >= 0)[..., None, None]
    padding = batch.padding if bool(batch.padding.any()) else None
    out = segmentor(batch.images, padding, text, last_only=True)
    grid = _grid(cfg.loss.points, labels.device).expand(len(labels), -1, -1)
    weights = (cfg.loss.classes, cfg.loss.mask, cfg.loss.dice)
    matched = match(out.class_logits, out.mask_logits, labels, masks, labels >= 0, weights, grid)
    queries, classes = out.class_logits.shape[2], out.class_logits.shape[3] - 1
    held = query_targets(matched, labels, queries, classes)[0]
    held = held.masked_fill(held == classes, EMPTY)
    void = void_of(batch, labels)
    if void is not None:
        astray = on_void(out.mask_logits, void, cfg.bank.void_share)[0] & (held == EMPTY)
        held = held.masked_fill(astray, IGNORED)
    return out.vision_queries[-1].half(), held


def _grid(points: int, device: torch.device) -> Tensor:
    """About `points` regular points (1, P, 2) in 0-1, so that a bank has nothing random."""
    side = max(2, round(points**0.5))
    axis = (torch.arange(side, device=device) + 0.5) / side
    return torch.stack(torch.meshgrid(axis, axis, indexing="xy"), -1).view(1, -1, 2)


def _views(
    dataset: PanopticDataset, cfg: Config, images: int, rows: int, start: int, augmented: bool
) -> Iterator[Batch]:
    """Batches of the rows from `start` on: view v of image i is row v * images + i."""
    augment = Augment(cfg.data) if augmented and cfg.bank.views > 1 else None

    def view(row: int) -> Sample:
        sample = dataset[row % images]
        if augment is None or row < images:  # the first view is what inference sees
            return resize_short(sample, cfg.infer.size, cfg.infer.max_size)
        return augment(sample, np.random.Generator(np.random.PCG64([cfg.optim.seed, row])))

    for first in range(start, rows, cfg.infer.batch):
        block = range(first, min(first + cfg.infer.batch, rows))
        yield collate([view(row) for row in block], [row % images for row in block])


def _done(folder: Path, facts: dict[str, Any]) -> int:
    """Rows that a former pass with the same facts has written."""
    try:
        found = json.loads((folder / FLUSHED).read_text())
    except (OSError, ValueError):
        return 0
    done = found.pop("done", 0)
    present = all((folder / name).exists() for name in ("queries.npy", "classes.npy"))
    return done if present and found == facts else 0


def check_bank(bank: QueryBank, cfg: BankConfig) -> None:
    """UserError where the bank has nothing to learn from."""
    if len(bank.held()) < 2 or len(bank.empty()) < 1:
        raise UserError(
            f"the query bank has {len(bank.held())} queries with a segment and "
            f"{len(bank.empty())} without; CAT needs both.",
            "train stage 1 longer (optim.steps), or use more images (bank.images).",
        )
