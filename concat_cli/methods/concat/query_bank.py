"""The query bank: what the frozen segmentor's queries are for every training image, on disk.

CAT and finetuning look only at queries, so the images are passed through the segmentor once. Both
train on batches of the bank, and on pseudo queries of the generator.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from torch import Tensor

from concat_cli.core.checkpoint import Weights
from concat_cli.core.config import BankConfig, Config
from concat_cli.core.data.dataset import PanopticDataset, Sample
from concat_cli.core.data.loader import Batch, collate
from concat_cli.core.data.transforms import Augment, resize_short
from concat_cli.core.errors import UserError
from concat_cli.core.losses import match, query_targets
from concat_cli.core.model.segmentor import QueryOutput
from concat_cli.core.runs import Run
from concat_cli.core.train.distributed import wait
from concat_cli.core.train.session import Session
from concat_cli.core.train.teacher import Truth, on_void, trained_indices
from concat_cli.methods.concat.bank_files import BankFiles, Columns
from concat_cli.methods.concat.generator import Generator
from concat_cli.methods.concat.on_borrowed import AnySegmentor

PER_CLASS = 512  # real queries a class mean is taken over, at most
EMPTY, IGNORED = -1, -2  # classes of queries without a segment, and of queries on void
VOID_SHARE = 0.5  # a query that lies on void for more than this share is ignored
SYNC_EVERY = 16  # batches between two points that a killed pass can resume from


@dataclass(frozen=True)
class QueryBank:
    """queries: (M, Q, D) float16. classes: (M, Q) int16, index among the trained classes, or
    EMPTY, or IGNORED. M images (times views); both memory-mapped."""

    queries: NDArray[np.float16]
    classes: NDArray[np.int16]

    @property
    def width(self) -> int:
        """D."""
        return self.queries.shape[-1]

    def held(self, without: tuple[int, ...] = ()) -> NDArray[np.intp]:
        """Flat indices of the queries that hold a segment of a class not in `without`."""
        classes = self.classes.ravel()
        return np.flatnonzero((classes >= 0) & ~np.isin(classes, without))

    def empty(self) -> NDArray[np.intp]:
        """Flat indices of the queries without a segment; those on void are not among them."""
        return np.flatnonzero(self.classes.ravel() == EMPTY)

    def take(self, flat: NDArray[np.intp]) -> tuple[Tensor, Tensor]:
        """Queries (N, D) fp32 and classes (N,) int64 at flat indices."""
        place = np.divmod(flat, self.queries.shape[1])
        queries = self.queries[place].astype(np.float32)
        return torch.as_tensor(queries), torch.as_tensor(self.classes[place].astype(np.int64))


@dataclass(frozen=True)
class Banks:
    """The query banks of a run: train, and dev (train again where the data set has no dev)."""

    train: QueryBank
    dev: QueryBank


def open_banks(
    session: Session, run: Run, weights: Weights, segmentor: AnySegmentor, text: Tensor
) -> Banks:
    """Opens the banks under `runs/<name>/bank/`, writing what is not there."""
    return write_banks(bank_writer(session, weights, segmentor, text), run)


def bank_writer(
    session: Session, weights: Weights, segmentor: AnySegmentor, text: Tensor
) -> BankWriter:
    """The writer of the banks of these weights."""
    identity = str(weights.meta.get("segmentor", weights.sha256))
    return BankWriter(session, segmentor, text, identity)


def write_banks(writer: BankWriter, run: Run) -> Banks:
    """The same by a given writer."""
    folder, parts = run.path / "bank", writer.session.info.parts
    train = writer.of_part(folder / "train", "train", augmented=True)
    check_bank(train, writer.session.cfg.bank)
    return Banks(train, writer.of_part(folder / "dev", "dev") if "dev" in parts else train)


@dataclass(frozen=True)
class BankWriter:
    """Passes images through a segmentor.

    text: (K, E) of the trained classes. identity: of the weights; a bank of others is written anew.
    """

    session: Session
    segmentor: AnySegmentor
    text: Tensor
    identity: str

    def columns(self) -> Columns:
        """What is kept of a view, by name: type and shape."""
        decoder = self.segmentor.query_decoder
        shape = (decoder.queries, decoder.width)
        return {"queries": (np.float16, shape), "classes": (np.int16, shape[:1])}

    def described(self, batch: Batch, to_trained: Tensor) -> dict[str, Tensor]:
        """The columns of a batch."""
        queries, held = describe(self.segmentor, batch, self.text, to_trained, self.session.cfg)
        return {"queries": queries, "classes": held}

    def announce(self, folder: Path, dataset: PanopticDataset, views: int) -> None:
        """Told before so many views are written."""

    def of_part(self, folder: Path, part: str, augmented: bool = False) -> QueryBank:
        """`open` of a part of the data; of several processes the first one writes it."""
        session, writes = self.session, self.session.processes.is_main
        if not writes:
            wait()  # until the first process has written it
        dataset = PanopticDataset(session.info.part(part), session.info.vocabulary)
        found = self.open(folder, dataset, augmented, writes)
        if writes:
            wait()
        return found

    def open(
        self, folder: Path, dataset: PanopticDataset, augmented: bool, writes: bool = True
    ) -> QueryBank:
        """The bank in `folder`; written, or resumed where a killed pass left off, if it must be.

        Args:
            augmented: training views, `bank.views` of them; else the plain images once.
            writes: False in a process that only reads what another one has finished.
        """
        cfg, columns = self.session.cfg, self.columns()
        to_trained = trained_indices(self.session.info.vocabulary.is_seen, self.text.device)
        images = min(len(dataset), cfg.bank.images or len(dataset))
        rows = images * (cfg.bank.views if augmented else 1)
        facts: dict[str, Any] = {
            "weights": self.identity,
            "shape": [rows, *columns["queries"][1]],
            "part": str(dataset.part.index),
            "augmented": augmented,
            "trained": [int(index) for index in to_trained.cpu()],
            "segments": dataset.digest(),
            "config": _facts(cfg),
        }
        files = BankFiles(folder, facts, columns, rows)
        if writes and (changed := files.check()):
            self.session.progress.say(
                f"{folder}: {changed} of {files.done + changed} rows are not what was written "
                "there; they are made again"
            )
        assert writes or files.finished, f"{folder} is not finished"
        if not files.finished:
            with files.appending():
                self._fill(files, dataset, images, augmented)
        return QueryBank(files.read("queries"), files.read("classes"))

    def _fill(
        self, files: BankFiles, dataset: PanopticDataset, images: int, augmented: bool
    ) -> None:
        """Appends the rows that are not there."""
        cfg, row, rows = self.session.cfg, files.done, files.rows
        if row == rows:  # a pass that was killed after its last one
            return
        self.announce(files.folder, dataset, rows - row)
        views = _views(dataset, cfg, range(row, rows), images, augmented)
        total = -(-(rows - row) // cfg.infer.batch)
        views = self.session.progress.track(views, f"bank {files.folder.name}", total)
        device, dtype = self.text.device, self.session.dtype
        to_trained = trained_indices(self.session.info.vocabulary.is_seen, device)
        for number, batch in enumerate(views, 1):
            with torch.autocast(device.type, dtype, enabled=dtype is not None):
                found = self.described(batch.to(device), to_trained)
            files.append({name: values.cpu().numpy() for name, values in found.items()})
            row += len(batch)
            if number % SYNC_EVERY == 0 or row == rows:
                files.flush(row)


def _facts(cfg: Config) -> list[Any]:
    """The configuration that a bank's content depends on."""
    data = cfg.data
    side = [] if data.scale_side == "long" else [data.scale_side]  # banks without it stay valid
    return [
        [cfg.bank.views, cfg.bank.images, VOID_SHARE],
        [data.crop, data.flip, data.scale_min, data.scale_max, data.colour, cfg.optim.seed, *side],
        [*match_weights(cfg), cfg.loss.points],
        [cfg.infer.size, cfg.infer.max_size],
        [cfg.clip.templates, cfg.clip.clean_names],
    ]


def match_weights(cfg: Config) -> tuple[float, float, float]:
    """Of class, mask and dice in the matching. On a published segmentor, whose class path is not
    trained when the bank is written, masks alone decide."""
    loss = cfg.loss
    return 0.0 if cfg.model.segmentor else loss.classes, loss.mask, loss.dice


@dataclass(frozen=True)
class Found:
    """What a segmentor says of a batch, what is true, and the query (B, N) of each segment."""

    out: QueryOutput
    truth: Truth
    matched: Tensor


@torch.no_grad()
def matched_queries(
    segmentor: AnySegmentor, batch: Batch, text: Tensor, to_trained: Tensor, cfg: Config
) -> Found:
    """The final layer's queries of a batch, matched to its segments with a trained label."""
    truth = Truth.of(batch, to_trained)
    labels = truth.labels
    out = segmentor(batch.images, truth.padding, text, last_only=True)
    points = grid(cfg.loss.points, labels.device).expand(len(labels), -1, -1)
    logits = (out.class_logits, out.mask_logits)
    matched = match(*logits, labels, truth.masks, match_weights(cfg), points)
    return Found(out, truth, matched[0])


def describe(
    segmentor: AnySegmentor, batch: Batch, text: Tensor, to_trained: Tensor, cfg: Config
) -> tuple[Tensor, Tensor]:
    """Final vision queries (B, Q, D) of a batch and what each holds, (B, Q): see `QueryBank`."""
    return held_by(matched_queries(segmentor, batch, text, to_trained, cfg))


@torch.no_grad()
def held_by(found: Found) -> tuple[Tensor, Tensor]:
    """Vision queries (B, Q, D) in half precision, and what each holds, (B, Q)."""
    out, truth, matched = found.out, found.truth, found.matched[None]
    labels = truth.labels
    queries, classes = out.class_logits.shape[2], out.class_logits.shape[3] - 1
    held = query_targets(matched, labels, queries, classes)[0]
    held = held.masked_fill(held == classes, EMPTY)
    if truth.void is not None:
        astray = on_void(out.mask_logits, truth.void, VOID_SHARE)[0] & (held == EMPTY)
        held = held.masked_fill(astray, IGNORED)
    return out.vision_queries[-1].half(), held


def grid(points: int, device: torch.device) -> Tensor:
    """About `points` regular points (1, P, 2) in 0-1, so that a bank has nothing random."""
    side = max(2, round(points**0.5))
    axis = (torch.arange(side, device=device) + 0.5) / side
    return torch.stack(torch.meshgrid(axis, axis, indexing="xy"), -1).view(1, -1, 2)


def _views(
    dataset: PanopticDataset, cfg: Config, rows: range, images: int, augmented: bool
) -> Iterator[Batch]:
    """Batches of these rows: view v of image i is row v * images + i."""
    augment = Augment(cfg.data) if augmented and cfg.bank.views > 1 else None

    def view(row: int) -> Sample:
        sample = dataset[row % images]
        if augment is None or row < images:  # the first view is what inference sees
            return resize_short(sample, cfg.infer.size, cfg.infer.max_size)
        return augment(sample, np.random.Generator(np.random.PCG64([cfg.optim.seed, row])))

    for first in range(0, len(rows), cfg.infer.batch):
        block = rows[first : first + cfg.infer.batch]
        yield collate([view(row) for row in block], [row % images for row in block])


def check_bank(bank: QueryBank, cfg: BankConfig) -> None:
    """UserError where the bank has nothing to learn from."""
    if len(bank.held()) < 2 or len(bank.empty()) < 1:
        raise UserError(
            f"the query bank has {len(bank.held())} queries with a segment and "
            f"{len(bank.empty())} without; CAT needs both.",
            "train stage 1 longer (optim.steps), or use more images (bank.images).",
        )


@dataclass(frozen=True)
class QueryBatch:
    """real (N, D) with classes (N,), index among the trained classes or EMPTY; empty (U, D)."""

    real: Tensor
    classes: Tensor
    empty: Tensor

    def to(self, device: torch.device) -> QueryBatch:
        """The batch on `device`."""
        return QueryBatch(self.real.to(device), self.classes.to(device), self.empty.to(device))


def query_batches(
    bank: QueryBank, rows: NDArray[np.intp], count: int, empty: int, seed: int, start: int
) -> Iterator[list[QueryBatch]]:
    """Endless steps: `count` queries of the flat indices `rows`, and `empty` without a segment.

    What step t holds depends on (seed, t) alone.
    """
    nothing = bank.empty()
    step = start
    while True:
        rng = np.random.Generator(np.random.PCG64([seed, step]))
        real, classes = bank.take(np.sort(rng.choice(rows, count)))
        unmatched = torch.empty(0, bank.width)
        if empty:
            unmatched, _ = bank.take(np.sort(rng.choice(nothing, empty)))
        yield [QueryBatch(real, classes, unmatched)]
        step += 1


@dataclass(frozen=True)
class ClassStatistics:
    """Of real queries: means (K, D) of each class, how many were looked at (K,), and the mean (D,)
    and standard deviation (D,) over all."""

    means: Tensor
    counts: Tensor
    mean: Tensor
    std: Tensor


def class_statistics(
    bank: QueryBank, classes: int, without: tuple[int, ...] = (), seed: int = 0
) -> ClassStatistics:
    """Statistics over at most PER_CLASS queries of each class; zero means for classes left out."""
    rng = np.random.Generator(np.random.PCG64(seed))
    held = bank.held(without)
    of = bank.classes.ravel()[held]
    chosen = [rng.permutation(held[of == c])[:PER_CLASS] for c in range(classes)]
    queries, found = bank.take(np.sort(np.concatenate(chosen)))
    member = F.one_hot(found, classes).float()  # (N, K)
    counts = member.sum(0)
    means = member.T @ queries / counts.clamp(min=1)[:, None]
    return ClassStatistics(means, counts, queries.mean(0), queries.std(0).clamp(min=1e-4))


def pseudo_queries(
    generator: Generator,
    text: Tensor,
    each: int,
    residuals: Tensor | None = None,
    source: torch.Generator | None = None,
) -> Tensor:
    """`each` pseudo vision queries of every class: (K, each, D), from embeddings text (K, E).

    With `residuals` (R, D), real queries minus their class means: the noise is by analogy, the
    generated mean of a class plus residuals drawn at random [ours].
    """
    noise = generator.sample_noise(len(text) * each, source)
    made = generator(text.repeat_interleave(each, 0), noise).unflatten(0, (len(text), each))
    if residuals is None:
        return made
    where = residuals.device if source is None else source.device
    drawn = torch.randint(len(residuals), made.shape[:2], generator=source, device=where)
    return made.mean(1, keepdim=True) + residuals[drawn.to(residuals.device)]


def residuals_of(queries: Tensor, classes: Tensor, statistics: ClassStatistics) -> Tensor:
    """Queries (N, D) that hold a segment minus the mean of their class: (R, D)."""
    held = classes >= 0
    return queries[held] - statistics.means.to(queries)[classes[held]]


class BankTask:
    """What the tasks of the loop over the query bank have in common."""

    def __init__(self, banks: Banks) -> None:
        self.banks = banks

    def counts(self, batch: QueryBatch) -> dict[str, Tensor]:
        """Nothing: a step is one forward, the same in every process."""
        return {}

    def describe(self, batch: QueryBatch) -> str:
        """A batch of the bank has no names."""
        return f"{len(batch.real)} queries of the bank"

    def preview(self, path: Path) -> None:
        """Nothing to show."""
