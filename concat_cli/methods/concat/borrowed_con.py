"""Stage 1 on a published segmentor: CON trains the class path alone, on a bank written in one pass.

The segmentor is frozen, and so is CLIP. One pass over the training images keeps the queries, what
each holds, and the CLS tokens of the segments they found and of the whole picture. Queries are
matched by masks alone: the class path is not trained then.
"""

from __future__ import annotations

import math
import shutil
import time
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from torch import Tensor, nn

from concat_cli.core.clip.encoder import Clip, load_clip
from concat_cli.core.clip.tokens import image_tokens, segment_tokens
from concat_cli.core.config import (
    AlignConfig,
    ClipConfig,
    Config,
    InferConfig,
    LossConfig,
    OptimConfig,
)
from concat_cli.core.data.dataset import PanopticDataset, training_part
from concat_cli.core.data.loader import Batch, collate
from concat_cli.core.data.transforms import resize_short
from concat_cli.core.device import cpu_threads
from concat_cli.core.errors import UserError
from concat_cli.core.evaluate.cost import resident
from concat_cli.core.evaluate.weights import unseen_among
from concat_cli.core.model.segmentor import Classifier, Projector
from concat_cli.core.progress import Progress
from concat_cli.core.runs import Run
from concat_cli.core.segmentors import PublishedSegmentor
from concat_cli.core.segmentors.source import open_frozen
from concat_cli.core.train.distributed import Counts
from concat_cli.core.train.images import classes_digest
from concat_cli.core.train.loop import Fit, StageResult, parameter_groups
from concat_cli.core.train.plan import Plan, clip_facts
from concat_cli.core.train.session import embed, open_session, seed_torch
from concat_cli.core.train.teacher import TokenBank, aggregate, contrast, trained_indices
from concat_cli.core.weights_from.published import pair_of
from concat_cli.methods.concat.bank_files import Columns
from concat_cli.methods.concat.on_borrowed import facts_of, in_place, on_top
from concat_cli.methods.concat.query_bank import (
    EMPTY,
    IGNORED,
    Banks,
    BankWriter,
    held_by,
    matched_queries,
    write_banks,
)

_ALONE = InferConfig()  # whose values nobody chose


@dataclass(frozen=True)
class TaughtWriter(BankWriter):
    """Writes beside the queries what CLIP's image encoder says of them.

    slots (N,): the query of each of the `crops` largest segments that one was matched to, or -1;
    tokens (N, E): CLS tokens of these segments, masked and cropped; images (E,): of the picture.
    """

    clip: Clip
    crops: int

    def columns(self) -> Columns:
        """See `BankWriter`."""
        width = self.clip.embed_dim
        return {
            **super().columns(),
            "slots": (np.int16, (self.crops,)),
            "tokens": (np.float16, (self.crops, width)),
            "images": (np.float16, (width,)),
        }

    @torch.no_grad()
    def described(self, batch: Batch, to_trained: Tensor) -> dict[str, Tensor]:
        """See `BankWriter`; segments without a trained label are shown to nobody."""
        found = matched_queries(self.segmentor, batch, self.text, to_trained, self.session.cfg)
        queries, held = held_by(found)
        truth, matched = found.truth, found.matched
        area = truth.masks.flatten(2).sum(-1).masked_fill(matched < 0, 0)  # (B, N')
        area = F.pad(area, (0, max(0, self.crops - area.shape[1])))
        segment = torch.argsort(area, dim=1, descending=True, stable=True)[:, : self.crops]
        valid = area.gather(1, segment) > 0
        select = torch.stack((valid.nonzero()[:, 0], segment[valid]), 1)
        tokens = queries.new_zeros(*segment.shape, self.clip.embed_dim)
        tokens[valid] = segment_tokens(self.clip, batch.images, truth.masks, select).to(tokens)
        slots = torch.full_like(segment, -1)
        slots[valid] = matched[select[:, 0], select[:, 1]]
        whole = image_tokens(self.clip, batch.images, truth.padding)
        return {
            "queries": queries, "classes": held, "slots": slots, "tokens": tokens,
            "images": whole.to(tokens),
        }  # fmt: skip

    def announce(self, folder: Path, dataset: PanopticDataset, views: int) -> None:
        """Says what the pass will take, by the second of two pictures; UserError if disk lacks."""
        kept = sum(np.dtype(t).itemsize * math.prod(s) for t, s in self.columns().values())
        free = shutil.disk_usage(folder).free
        seconds = self._seconds(dataset)
        self.session.progress.say(
            f"bank {folder.name}: {views:,} pictures at {seconds:.3f} s each (measured on one) "
            f"make about {views * seconds / 60:.1f} minutes; {views * kept / 1e6:,.1f} MB on disk, "
            f"{free / 1e9:,.1f} GB are free{_memory(self.text.device)}"
        )
        if views * kept > free:
            raise UserError(
                f"The query bank takes {views * kept / 1e9:.1f} GB, and {free / 1e9:.1f} GB are "
                f"free in {folder}.",
                "Use fewer pictures (bank.images=...), or free some space.",
            )

    def _seconds(self, dataset: PanopticDataset) -> float:
        """Of one picture, after another that warms up."""
        infer, device, dtype = self.session.cfg.infer, self.text.device, self.session.dtype
        to_trained = trained_indices(dataset.vocabulary.is_seen, device)
        began = time.perf_counter()
        for index in (0, min(1, len(dataset) - 1)):
            began = time.perf_counter()
            view = resize_short(dataset[index], infer.size, infer.max_size)
            with torch.autocast(device.type, dtype, enabled=dtype is not None):
                found = self.described(collate([view], [index]).to(device), to_trained)
            found["tokens"].cpu()  # waits for a GPU
        return time.perf_counter() - began


def _memory(device: torch.device) -> str:
    """What this process has held at most with one picture, where the system tells."""
    if device.type == "cuda":
        return f"; {torch.cuda.max_memory_allocated(device) / 1e9:.1f} GB of GPU memory for one"
    found = resident("VmHWM")
    return "" if found is None else f"; {found / 1e3:.1f} GB of memory for one"


@dataclass(frozen=True)
class TaughtBatch:
    """B views of the bank: queries (B, Q, D), classes (B, Q), slots (B, N), tokens (B, N, E),
    images (B, E), image_ids (B,); see `QueryBank` and `TaughtWriter`."""

    queries: Tensor
    classes: Tensor
    slots: Tensor
    tokens: Tensor
    images: Tensor
    image_ids: Tensor

    def to(self, device: torch.device) -> TaughtBatch:
        """The batch on `device`."""
        return TaughtBatch(**{name: value.to(device) for name, value in vars(self).items()})


class BankConModule(nn.Module):
    """Projector and classifier with CON's losses on queries that do not change.

    Args:
        text: (K, E) of the trained classes.
    """

    text: Tensor
    weight: Tensor

    def __init__(
        self,
        projector: Projector,
        classifier: Classifier,
        text: Tensor,
        loss: LossConfig,
        align: AlignConfig,
    ) -> None:
        super().__init__()
        self.projector, self.classifier = projector, classifier
        self.loss, self.align = loss, align
        self.register_buffer("text", text, persistent=False)
        weight = torch.ones(len(text) + 1, device=text.device)
        weight[-1] = loss.no_object
        self.register_buffer("weight", weight, persistent=False)
        self.image_bank = TokenBank(align.bank if align.image else 0, text.shape[1])
        self.segment_bank = TokenBank(align.bank if align.instance else 0, text.shape[1])

    def forward(self, batch: TaughtBatch, counts: Counts | None = None) -> dict[str, Tensor]:
        """Weighted losses by name, as of `ConModule` less those of masks."""
        align = self.align
        semantic = self.projector(batch.queries)
        logits = self.classifier(semantic, self.text)
        wanted = batch.classes.masked_fill(batch.classes == EMPTY, len(self.text))
        classes = F.cross_entropy(
            logits.flatten(0, 1), wanted.flatten(), self.weight, ignore_index=IGNORED
        )
        losses = {"class": self.loss.classes * classes}
        if align.instance:
            losses["align_instance"] = align.instance * self._instance(semantic, batch)
        if align.image:
            objectness = 1 - logits.detach().softmax(-1)[..., -1]
            whole = aggregate(
                semantic,
                align.pooling,
                batch.images,
                objectness,
                batch.classes >= 0,
                align.temperature,
            )
            valid = torch.ones_like(batch.image_ids, dtype=torch.bool)
            losses["align_image"] = align.image * contrast(
                whole,
                batch.images,
                valid,
                batch.image_ids,
                align.temperature,
                bank=self.image_bank,
            )
        return losses

    def _instance(self, semantic: Tensor, batch: TaughtBatch) -> Tensor:
        """Each matched semantic query against the CLS token of its segment."""
        valid, slots = batch.slots >= 0, batch.slots.clamp(min=0)
        image = torch.arange(len(slots), device=slots.device)[:, None]
        groups = batch.classes[image, slots].masked_fill(~valid, -1)
        return contrast(
            semantic[image, slots].flatten(0, 1),
            batch.tokens.flatten(0, 1),
            valid.flatten(),
            groups.flatten(),
            self.align.temperature,
            bank=self.segment_bank,
        )


class BankConTask:
    """A task of the loop over the views of the bank. folder: of the train part."""

    def __init__(
        self, module: BankConModule, banks: Banks, folder: Path, optim: OptimConfig, views: int
    ) -> None:
        self.module, self.banks, self.optim, self.folder = module, banks, optim, folder
        self.pictures = len(banks.train.classes) // views

    def batches(self, start: int) -> Iterator[list[TaughtBatch]]:
        """Endless steps of `optim.batch_size` views; what step t holds depends on (seed, t)."""
        names = ("queries", "classes", "slots", "tokens", "images")
        kept: dict[str, NDArray[Any]] = {
            name: np.load(self.folder / f"{name}.npy", mmap_mode="r") for name in names
        }
        count = len(kept["classes"])
        step = start
        while True:
            rng = np.random.Generator(np.random.PCG64([self.optim.seed, step]))
            rows = np.sort(rng.choice(count, min(count, self.optim.batch_size), replace=False))
            found = {
                name: torch.as_tensor(
                    values[rows].astype(np.float32 if values.dtype == np.float16 else np.int64)
                )
                for name, values in kept.items()
            }
            yield [TaughtBatch(**found, image_ids=torch.as_tensor(rows % self.pictures))]
            step += 1

    def counts(self, batch: TaughtBatch) -> dict[str, Tensor]:
        """Nothing: a step is one forward, the same in every process."""
        return {}

    def parameter_groups(self) -> list[dict[str, Any]]:
        """As of stage 1 on images."""
        factors = {"classifier.log_scale": self.optim.scale_factor}
        return parameter_groups(self.module, self.optim.lr, self.optim.weight_decay, factors)

    def describe(self, batch: TaughtBatch) -> str:
        """A batch of the bank has no names."""
        return f"{len(batch.classes)} pictures of the bank"

    def weights(self, state: dict[str, Tensor]) -> dict[str, Tensor]:
        """The class path, by its names in a segmentor."""
        return {
            f"segmentor.{name}": tensor
            for name, tensor in state.items()
            if name.startswith(("projector.", "classifier."))
        }

    def score(self, step: int) -> dict[str, float]:
        """Accuracy on the dev queries that hold a segment, among the trained classes."""
        queries, classes = self.banks.dev.take(self.banks.dev.held())
        module = self.module
        logits = module.classifier(module.projector(queries.to(module.text.device)), module.text)
        accuracy = float((logits[:, :-1].argmax(-1).cpu() == classes).float().mean())
        return {"score": accuracy, "dev_accuracy": accuracy}

    def preview(self, path: Path) -> None:
        """Nothing to show."""


def train_on_borrowed(
    cfg: Config, run: Run, device: str, fresh: bool, force: bool, progress: Progress
) -> StageResult:
    """Trains stage 1 of a run on the published segmentor `model.segmentor`, or resumes it."""
    published = open_frozen(in_place(cfg.model.segmentor))
    cfg = as_borrowed(cfg, published)
    session = open_session(cfg, device, progress, force)
    info, infer = session.info, cfg.infer
    progress.say(
        f"{published.source}: {published.count} queries of width {published.width}, frozen; "
        f"pictures at {infer.size} (at most {infer.max_size}), {infer.batch} at a time; CLIP "
        f"{cfg.clip.model} {cfg.clip.pretrained}. Only the "
        "projector and the classifier are trained: warmup.* and the losses of masks do not count."
    )
    for note in published.notes:
        progress.say(note)
    leaked = unseen_among(info, published.vocabulary.names)
    if leaked:
        progress.say(
            f"its masks were trained with labels of {len(leaked)} unseen classes, so figures of "
            f"unseen classes are not zero-shot: {'; '.join(leaked)}"
        )
    clip = load_clip(cfg.clip, session.device, dtype=session.teacher_dtype, progress=progress)
    train = training_part(info)
    teaching = f"{clip.identity.sha256}, {cfg.align.crops} crops"
    inputs = {
        "classes": classes_digest(info.vocabulary),
        "training images": train.digest(),
        "segmentor": published.sha256,
        "bank": f"{cfg.bank.views} views, {cfg.bank.images or 'all'} images",
    }
    stage = session.open_stage(run.stage("con"), fresh=fresh, inputs=inputs)
    seed_torch(cfg.optim.seed)
    segmentor = session.place(on_top(published, cfg.model, clip.embed_dim))
    text = embed(clip, info.vocabulary.seen_only(), cfg, session.device)
    identity = f"{published.sha256}, taught by {teaching}"
    banks = write_banks(
        TaughtWriter(session, segmentor, text, identity, clip, cfg.align.crops), run
    )
    names = (*info.vocabulary.seen_only().names, *published.vocabulary.names)
    meta = session.meta(
        "con",
        clip.identity,
        trained=list(dict.fromkeys(names)),
        segmentor=identity,
        published=facts_of(published),
    )
    module = BankConModule(segmentor.projector, segmentor.classifier, text, cfg.loss, cfg.align)
    module.to(session.device)
    folder = run.path / "bank" / "train"
    task = BankConTask(module, banks, folder, cfg.optim, cfg.bank.views)
    with cpu_threads():
        return Fit(task, cfg.optim, stage, replace(session, dtype=None), meta).run()


def as_borrowed(cfg: Config, published: PublishedSegmentor) -> Config:
    """The configuration with what the segmentor decides: its sizes, and where nobody chose others,
    the CLIP that it is listed with, and pictures as its authors test it, no more pixels of them at
    a time than by default."""
    infer, listed = cfg.infer, pair_of(published.source)
    if listed is not None and cfg.clip.model == ClipConfig.model:
        clip = ClipConfig(listed.clip.model, listed.clip.pretrained, "vild")
        cfg = replace(cfg, clip=clip)
    if (infer.size, infer.max_size) == (_ALONE.size, _ALONE.max_size):
        infer = replace(infer, size=published.size, max_size=published.max_size)
        if infer.batch == _ALONE.batch:
            fewer = _ALONE.batch * _ALONE.size**2 // infer.size**2
            infer = replace(infer, batch=max(1, min(_ALONE.batch, fewer)))
    model = replace(
        cfg.model, segmentor=published.source, width=published.width, queries=published.count
    )
    return replace(cfg, model=model, infer=infer)


def plan_on_borrowed(cfg: Config) -> Plan:
    """What `train_on_borrowed` would do; UserError where the segmentor is not there."""
    published = open_frozen(in_place(cfg.model.segmentor))
    cfg = as_borrowed(cfg, published)
    return {
        "steps": f"{cfg.optim.steps} of {cfg.optim.batch_size} pictures of the bank",
        "segmentor": f"{published.source}, frozen: {published.count} queries of width "
        f"{published.width}, pictures at {cfg.infer.size}",
        "query bank": f"{cfg.bank.images or 'all'} images, {cfg.bank.views} views of each",
    } | clip_facts(cfg.clip)
