"""A batch that is split over forwards and processes teaches what it teaches in one forward."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from mini import alone, in_two_processes, mini_config, scene
from torch import Tensor, nn

from concat_cli.core import losses
from concat_cli.core.build import build_segmentor
from concat_cli.core.clip.encoder import load_clip
from concat_cli.core.config import OptimConfig
from concat_cli.core.data.dataset import Sample
from concat_cli.core.data.loader import Batch, collate
from concat_cli.core.model.layers import Attention
from concat_cli.core.model.query_decoder import Denoising
from concat_cli.core.runs import StageDir
from concat_cli.core.train import distributed, teacher
from concat_cli.core.train.distributed import Count, Processes
from concat_cli.core.train.loop import Fit
from concat_cli.core.train.teacher import ImageModule, Teacher
from concat_cli.methods.clip_zss.config import ClipZssConfig
from concat_cli.methods.clip_zss.module import ClipZssModule
from concat_cli.methods.clip_zss.student import build_student
from concat_cli.methods.concat import con_module
from concat_cli.methods.concat.con_module import ConModule, WarmupModule
from concat_cli.methods.zegformer.maskformer import MaskFormer, build_zegformer
from concat_cli.methods.zegformer.train import ZegFormerModule

META = dict.fromkeys(("config", "vocabulary", "trained", "clip")) | {"format": 1, "stage": "con"}
IMAGES, CLASSES = 16, 9
KEYS = (
    "loss.points=64", "loss.dense=1", "loss.denoising=2", "loss.truth=0.5", "model.frozen_bn=true",
    "align.image=0.1", "align.instance=1", "align.crops=3", "warmup.masks=1", "model.queries=6",
)  # fmt: skip


# --- nothing is drawn -------------------------------------------------------------------------


def grid(mask_logits: Tensor, count: int, *_: Any) -> Tensor:
    """The same points for each mask."""
    side = int(count**0.5)
    axis = (torch.arange(side) + 0.5) / side
    points = torch.stack(torch.meshgrid(axis, axis, indexing="xy"), -1).view(1, -1, 2)
    return points.expand(len(mask_logits), -1, -1)


def first_segments(labels: Tensor, count: int) -> Tensor:
    return (labels < 0).to(torch.uint8).argsort(dim=1, stable=True)[:, :count]


def not_noised(_: Any, masks: Tensor, labels: Tensor) -> Denoising:
    return Denoising(F.avg_pool2d(masks.float(), 8), labels >= 0)


def without_negatives(
    queries: Tensor,
    tokens: Tensor,
    valid: Tensor,
    groups: Tensor,
    temperature: float,
    count: Count | None = None,
    bank: Any = None,
    alike: float | None = None,
) -> Tensor:
    """What is left of InfoNCE: only the number of rows that it is a mean over."""
    own = valid.sum().float()
    number = distributed.mean_over_processes(own) if count is None else count.of_whole(own)
    unlike = 1 - F.cosine_similarity(queries, tokens)
    return unlike.masked_fill(~valid, 0.0).sum() / number.clamp(min=1e-12)


def draw_nothing(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(losses, "uncertain_points", grid)
    patch.setattr(con_module.TruthModule, "_denoising", not_noised)
    patch.setattr(con_module, "contrast", without_negatives)
    for module in (con_module, teacher):
        patch.setattr(module, "drawn_segments", first_segments)
    whole = torch.rand  # the points of the matching are drawn first, from the seed of the step
    patch.setattr(con_module.torch, "rand", lambda *size, **named: whole(*size, **named).fill_(0.3))


# --- the modules ------------------------------------------------------------------------------


def embeddings(width: int) -> Tensor:
    return F.normalize(torch.randn(CLASSES, width, generator=torch.Generator().manual_seed(1)), -1)


def trained_on() -> Tensor:
    """One of ten classes must not be trained on."""
    return torch.cat((torch.arange(CLASSES), torch.tensor([-1])))


def con(world: Path) -> ImageModule:
    cfg, clip = mini_config(world, *KEYS), load_clip(mini_config(world).clip)
    segmentor = build_segmentor(cfg.model, clip.embed_dim)
    text, teaches = embeddings(clip.embed_dim), Teacher(clip, cfg.align.crops)
    return ConModule(segmentor, text, trained_on(), cfg, teaches)


def warm_up(world: Path) -> ImageModule:
    cfg, clip = mini_config(world, *KEYS), load_clip(mini_config(world).clip)
    segmentor = build_segmentor(cfg.model, clip.embed_dim)
    text, teaches = embeddings(clip.embed_dim), Teacher(clip, cfg.align.crops)
    return WarmupModule(segmentor, text, trained_on(), cfg, teaches)


def zegformer(world: Path) -> ImageModule:
    segmentor = build_zegformer(mini_config(world, *KEYS), 12)
    assert isinstance(segmentor, MaskFormer)
    return ZegFormerModule(segmentor, embeddings(12), trained_on(), mini_config(world, *KEYS).loss)


def clip_zss(world: Path) -> ImageModule:
    cfg = ClipZssConfig(head_width=16, dropout=0.0)
    student = build_student(cfg, 12)
    return ClipZssModule(student, None, embeddings(12), trained_on(), cfg)


MODULES = (con, warm_up, zegformer, clip_zss)


def samples(void: bool = False) -> list[Sample]:
    """Images with one to five segments, one of them of a class that is not trained on."""
    made = []
    for image in range(IMAGES):
        count = 1 + image % 5
        sample = scene([(image + n) % CLASSES for n in range(count)], 64, image)
        blocks = np.random.default_rng(image).integers(0 if void else 1, count + 1, (4, 4))
        segment_map = np.kron(blocks, np.ones((16, 16))).astype(np.int32)
        segment_map[:8, :8] = 1  # every image has one
        made.append(replace(sample, segment_map=segment_map))
    return made


class OneStep:
    """A task of one step over the images, in forwards of `size`; what a process sees of them."""

    def __init__(self, module: ImageModule, images: list[Sample], size: int, mine: slice) -> None:
        self.module = module
        parts = [images[i : i + size] for i in range(0, len(images), size)][mine]
        self.parts = [collate(part, range(len(part))) for part in parts]

    def batches(self, start: int) -> Iterator[list[Batch]]:
        while True:
            yield self.parts

    def counts(self, batch: Batch) -> dict[str, Tensor]:
        return self.module.counts(batch)

    def parameter_groups(self) -> list[dict[str, Any]]:
        return [{"params": [p for p in self.module.parameters() if p.requires_grad], "lr": 1.0}]

    def describe(self, batch: Batch) -> str:
        return f"{len(batch)} images"

    def weights(self, state: dict[str, Tensor]) -> dict[str, Tensor]:
        return {f"segmentor.{key}": value for key, value in state.items()}

    def score(self, step: int) -> dict[str, float]:
        return {}

    def preview(self, path: Path) -> None: ...


def nothing(mode: bool = True) -> None:
    """Instead of `train`."""


def gradients(
    module: ImageModule,
    images: list[Sample],
    size: int,
    folder: Path,
    processes: Processes = Processes(),  # noqa: B008
) -> tuple[dict[str, Tensor], int]:
    """Of one step, and how often the processes exchanged some."""
    for part in module.modules():
        if isinstance(part, nn.Dropout):
            part.p = 0.0
        if isinstance(part, Attention):
            part.dropout = 0.0
        if isinstance(part, nn.BatchNorm2d):
            part.eval().train = nothing  # batch statistics stay out of it
    mine = slice(processes.rank, None, processes.world)
    task = OneStep(module, images, size, mine)
    optim = OptimConfig(
        steps=1, warmup=0, schedule="constant", clip_norm=1e9, preview_every=0, log_every=1
    )
    before = {name: p.detach().clone() for name, p in module.named_parameters()}
    fit = Fit(
        task, optim, StageDir(folder, "con"), alone(processes), META,
        torch.optim.SGD(task.parameter_groups()),
    )  # fmt: skip
    exchanged: list[int] = []
    if processes.world > 1:

        def hook(state, bucket):
            exchanged.append(bucket.index())
            group = torch.distributed.group.WORLD
            tensor = bucket.buffer().div_(processes.world)
            handle = torch.distributed.all_reduce(tensor, group=group, async_op=True)
            return handle.get_future().then(lambda found: found.value()[0])

        fit.model.register_comm_hook(None, hook)
    fit.run()
    moved = {name: before[name] - p.detach() for name, p in module.named_parameters()}
    return moved, len(exchanged)


def assert_alike(found: dict[str, Tensor], wanted: dict[str, Tensor]) -> None:
    assert found.keys() == wanted.keys()
    assert sum(bool(value.any()) for value in wanted.values()) > 20
    for name, value in wanted.items():
        scale = max(1.0, float(value.abs().max()))
        # sums in another order: 3e-6 on some processors, 3e-5 on others
        torch.testing.assert_close(found[name] / scale, value / scale, rtol=0, atol=1e-4, msg=name)


@pytest.mark.parametrize("build", MODULES)
def test_forwards_add_up_to_the_whole_batch(build, mini_world, tmp_path, monkeypatch):
    """16 images at once, or 4 x 4 with other numbers of segments in each."""
    draw_nothing(monkeypatch)
    found = []
    for size in (16, 4):
        torch.manual_seed(0)
        module = build(mini_world)
        found.append(gradients(module, samples(), size, tmp_path / str(size))[0])
    assert_alike(found[1], found[0])


def test_the_share_of_void_is_all_that_differs(mini_world, tmp_path, monkeypatch):
    """Queries on void do not count in the class loss: each forward knows its own share only."""
    draw_nothing(monkeypatch)
    rows = []
    for size in (16, 4):
        torch.manual_seed(0)
        gradients(con(mini_world), samples(void=True), size, tmp_path / str(size))
        rows.append(StageDir(tmp_path / str(size), "con").read_metrics()[0])
    for name in rows[0].keys() - {"seconds", "loss", "class", "grad_norm"}:
        assert rows[1][name] == pytest.approx(rows[0][name], rel=1e-4, abs=2e-5), name
    assert rows[1]["class"] == pytest.approx(rows[0]["class"], rel=0.02)


def work(world: Path, folder: Path) -> None:
    """One of two processes with two forwards of 4 images, and with one of 8."""
    _, processes = distributed.join(torch.device("cpu"))
    with pytest.MonkeyPatch.context() as patch:
        draw_nothing(patch)
        found = {}
        for size in (4, 8):
            torch.manual_seed(0)
            where = folder / f"forwards-of-{size}"
            found[size] = gradients(con(world), samples(), size, where, processes)
    torch.save(found, folder / f"rank{processes.rank}.pt")
    distributed.leave()


def test_processes_and_forwards_add_up(mini_world, tmp_path, monkeypatch):
    """And the processes exchange gradients once a step, however many forwards it takes."""
    in_two_processes(work, mini_world, tmp_path)
    draw_nothing(monkeypatch)
    torch.manual_seed(0)
    whole, _ = gradients(con(mini_world), samples(), 16, tmp_path / "whole")
    for rank in range(2):
        found = torch.load(tmp_path / f"rank{rank}.pt", weights_only=True)
        assert_alike(found[4][0], whole)
        assert_alike(found[8][0], whole)
        assert found[4][1] == found[8][1] > 0
