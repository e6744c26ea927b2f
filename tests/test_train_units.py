"""The parts of training, each against a naive loop or a case whose answer is known."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from itertools import pairwise
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from mini import metrics, mini_config, planted_bank
from torch import Tensor, nn

from concat_cli.core.build import build_generator
from concat_cli.core.checkpoint import load_weights
from concat_cli.core.config import CatConfig, FinetuneConfig, OptimConfig
from concat_cli.core.data.dataset import PanopticDataset, Sample, read_dataset_info
from concat_cli.core.data.loader import collate
from concat_cli.core.errors import UserError
from concat_cli.core.evaluate.per_image import (
    harmonic_pq,
    mean_pq,
    paired_difference,
    per_image_counts,
    resample,
)
from concat_cli.core.evaluate.run import evaluate_model
from concat_cli.core.infer.predictor import Predictor
from concat_cli.core.losses import dense
from concat_cli.core.model.projector import Classifier, Projector
from concat_cli.core.model.segmentor import Segmentor
from concat_cli.core.progress import SILENT
from concat_cli.core.runs import Run, StageDir
from concat_cli.core.train.calibration import _sweep, choose_offset
from concat_cli.core.train.cat import Banks, GeneratorModule, GeneratorTask
from concat_cli.core.train.con import train_con, trained_indices
from concat_cli.core.train.con_module import on_void, trained_labels, void_of, with_slots
from concat_cli.core.train.distributed import Processes
from concat_cli.core.train.fold import choose_fold, fold_figures, harmonic
from concat_cli.core.train.loop import Fit
from concat_cli.core.train.optim import MovingAverage, lr_factor, parameter_groups
from concat_cli.core.train.queries import (
    class_statistics,
    pseudo_queries,
    query_batches,
    residuals_of,
)
from concat_cli.core.train.query_bank import EMPTY, IGNORED, QueryBank, check_bank
from concat_cli.core.train.union import UnionModule, UnionTask, statistics_for

CPU = torch.device("cpu")


# --- schedule, optimiser, average ---------------------------------------------------------------


def test_schedules():
    def factors(**keys: Any) -> list[float]:
        optim = OptimConfig(**({"steps": 100, "warmup": 4} | keys))
        return [lr_factor(step, optim) for step in range(100)]

    assert factors()[:4] == [0.25, 0.5, 0.75, 1.0]
    assert factors(schedule="constant")[4:] == [1.0] * 96
    cosine = factors(schedule="cosine", decay_from=0.5)
    assert cosine[4:51] == [1.0] * 47 and cosine[75] == pytest.approx(0.5)
    assert 0 < cosine[99] < 0.01 and all(a >= b for a, b in pairwise(cosine[4:]))
    assert factors(schedule="poly")[50] == pytest.approx(0.5**0.9)
    step = factors(schedule="step", step_at=(0.5, 0.75))
    assert (step[49], step[50], step[75]) == (1.0, pytest.approx(0.1), pytest.approx(0.01))
    assert lr_factor(0, OptimConfig(steps=0, warmup=0)) == 1.0
    assert lr_factor(9, OptimConfig(steps=10, warmup=0, decay_from=1.0)) == 1.0


class Mixed(nn.Module):
    """One of each kind of parameter."""

    def __init__(self) -> None:
        super().__init__()
        self.backbone = nn.Sequential(nn.Conv2d(3, 4, 1), nn.BatchNorm2d(4))
        self.head = nn.Linear(4, 4)
        self.norm = nn.LayerNorm(4)
        self.table = nn.Embedding(3, 4)
        self.query = nn.Parameter(torch.randn(5, 4))
        self.log_scale = nn.Parameter(torch.tensor(1.0))
        self.frozen = nn.Linear(4, 4).requires_grad_(False)


def test_parameter_groups():
    module = Mixed()
    groups = parameter_groups(module, 1.0, 0.05, {"backbone": 0.1, "log_scale": 3.0})
    of = {id(p): (group["lr"], group["weight_decay"]) for group in groups for p in group["params"]}
    found = {name: of.get(id(p)) for name, p in module.named_parameters()}
    assert sum(len(group["params"]) for group in groups) == len(of)
    assert found == {
        "backbone.0.weight": (0.1, 0.05),
        "backbone.0.bias": (0.1, 0.0),
        "backbone.1.weight": (0.1, 0.0),
        "backbone.1.bias": (0.1, 0.0),
        "head.weight": (1.0, 0.05),
        "head.bias": (1.0, 0.0),
        "norm.weight": (1.0, 0.0),
        "norm.bias": (1.0, 0.0),
        "table.weight": (1.0, 0.0),
        "query": (1.0, 0.0),
        "log_scale": (3.0, 0.0),
        "frozen.weight": None,
        "frozen.bias": None,
    }


def test_moving_average():
    module = nn.BatchNorm2d(2)
    average, decay = MovingAverage(module, 0.9), []
    expected = {k: v.clone() for k, v in module.state_dict().items()}
    for update in range(1, 120):
        with torch.no_grad():
            module.weight.normal_()
            module.num_batches_tracked += 1
        average.update(module)
        decay.append(min(0.9, (1 + update) / (10 + update)))
        expected["weight"] = decay[-1] * expected["weight"] + (1 - decay[-1]) * module.weight
    torch.testing.assert_close(average.state["weight"], expected["weight"])
    assert average.state["num_batches_tracked"] == 119 and average.updates == 119
    assert decay[0] < 0.2 and decay[-1] == 0.9
    assert torch.equal(average.state["bias"], module.bias)


# --- the loop -----------------------------------------------------------------------------------


@dataclass(frozen=True)
class Rows:
    """A batch of a regression."""

    x: Tensor

    def to(self, device: torch.device) -> Rows:
        return self


class Regression(nn.Module):
    """Two losses of a linear map."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.linear = nn.Linear(3, 1)

    def forward(self, batch: Rows, step: int) -> dict[str, Tensor]:
        found = self.linear(batch.x)[:, 0]
        return {"fit": (found - batch.x.sum(1)).square().mean(), "small": 0.01 * found.abs().mean()}


class RegressionTask:
    """Sixteen rows a step, in `parts` micro-batches; scores as given."""

    def __init__(self, parts: int = 1, scores: tuple[float, ...] = ()) -> None:
        self.module, self.parts, self.scores = Regression(), parts, list(scores)
        self.scored_at: list[int] = []

    def batches(self, start: int) -> Iterator[list[Rows]]:
        step = start
        while True:
            rows = torch.randn(16, 3, generator=torch.Generator().manual_seed(step))
            yield [Rows(part) for part in rows.chunk(self.parts)]
            step += 1

    def parameter_groups(self) -> list[dict[str, Any]]:
        return [{"params": list(self.module.parameters()), "lr": 0.1, "weight_decay": 0.0}]

    def describe(self, batch: Rows) -> str:
        return f"{len(batch.x)} rows"

    def weights(self, state: dict[str, Tensor]) -> dict[str, Tensor]:
        return {f"segmentor.{key}": value for key, value in state.items()}

    def score(self, step: int) -> dict[str, float]:
        self.scored_at.append(step)
        return {"score": self.scores.pop(0)} if self.scores else {}

    def preview(self, path: Path) -> None:
        path.parent.mkdir(exist_ok=True)
        path.write_text(f"{self.module.training}")


META = dict.fromkeys(("config", "vocabulary", "trained", "clip")) | {"format": 1, "stage": "con"}


def fit(task: RegressionTask, folder: Path, **keys: Any) -> StageDir:
    stage = StageDir(folder, "con")
    optim = OptimConfig(
        **({"steps": 6, "warmup": 2, "log_every": 1, "preview_every": 0, "clip_norm": 1e9} | keys)
    )
    Fit(
        task, optim, stage, device=CPU, dtype=None, meta=META, progress=SILENT,
        processes=Processes(),
    ).run()  # fmt: skip
    return stage


def test_micro_batches_add_up(tmp_path):
    """One forward of 16 rows, or two of 8: the same losses and weights."""
    whole, parts = (fit(RegressionTask(n), tmp_path / str(n)) for n in (1, 2))
    for a, b in zip(metrics(whole), metrics(parts), strict=True):
        assert a == pytest.approx(b, abs=1e-4)
    a, b = (load_weights(stage.last).tensors for stage in (whole, parts))
    torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5)


def test_best_is_chosen_and_no_step_is_scored_twice(tmp_path):
    task = RegressionTask(scores=(0.1, 0.7, 0.3))
    stage = fit(task, tmp_path, eval_every=2, preview_every=3)
    assert task.scored_at == [2, 4, 6]
    assert load_weights(stage.best).meta["step"] == 4
    assert load_weights(stage.last).meta["step"] == 6
    assert [row["dev"]["score"] for row in metrics(stage) if "dev" in row] == [0.1, 0.7, 0.3]
    pictures = {path.name: path.read_text() for path in stage.previews.iterdir()}
    assert pictures == {"step_000003.png": "False", "step_000006.png": "False"}


def test_the_average_is_saved_and_the_own_weights_go_on(tmp_path):
    plain = fit(RegressionTask(scores=(1.0,) * 9), tmp_path / "plain", eval_every=1)
    mean = fit(RegressionTask(scores=(1.0,) * 9), tmp_path / "mean", eval_every=1, ema=0.9)
    assert [r["loss"] for r in metrics(plain) if "loss" in r] == [
        r["loss"] for r in metrics(mean) if "loss" in r
    ]
    a, b = (load_weights(s.last).tensors["segmentor.linear.weight"] for s in (plain, mean))
    assert not torch.equal(a, b)


def test_clipping(tmp_path):
    """The norm that is logged is the one before clipping."""
    free, clipped = (
        fit(RegressionTask(), tmp_path / str(norm), steps=1, clip_norm=norm) for norm in (1e9, 1e-8)
    )
    assert metrics(free)[0]["grad_norm"] == metrics(clipped)[0]["grad_norm"] > 0.1
    start = Regression().linear.weight
    moved = [
        (load_weights(s.last).tensors["segmentor.linear.weight"] - start).abs().max()
        for s in (free, clipped)
    ]
    assert moved[1] < 0.6 * moved[0]  # Adam divides by the norm, up to its epsilon of 1e-8


def test_the_segmentor_accumulates(mini_world, tmp_path):
    """8 images in one forward or in two of 4. Each forward divides by its own number of segments,
    as in Mask2Former, samples its own points, and does not have the other's negatives: the terms
    agree within 15%, those without a normaliser or negatives within 1%."""
    rows = []
    for per_device in (8, 4):
        cfg = mini_config(
            mini_world, "model.frozen_bn=true", "loss.points=2000", "loss.importance=0",
            "loss.denoising=0", "optim.batch_size=8", f"optim.per_device={per_device}",
            "optim.steps=1", "warmup.steps=0", "align.image=0", "align.instance=0",
        )  # fmt: skip
        run = Run(f"forward-of-{per_device}", tmp_path)
        train_con(cfg, run, device="cpu")
        rows.append(metrics(run.stage("con"))[0])
    for name in ("class", "mask", "dice", "dense"):
        assert rows[1][name] == pytest.approx(rows[0][name], rel=0.15), name
    assert rows[1]["objectness"] == pytest.approx(rows[0]["objectness"], rel=0.01)
    assert rows[1]["grad_norm"] == pytest.approx(rows[0]["grad_norm"], rel=0.15)


# --- labels and void ----------------------------------------------------------------------------


def scene(labels: list[int], size: int = 8, seed: int = 0) -> Sample:
    """Random segments of one pixel each and void."""
    rng = np.random.default_rng(seed)
    segment_map = rng.integers(0, len(labels) + 1, (size, size), dtype=np.int32)
    image = rng.integers(0, 256, (size, size, 3)).astype(np.uint8)
    crowd = np.zeros(len(labels), bool)
    return Sample(image, segment_map, np.array(labels, np.int64), crowd, seed, f"{seed}.png")


def test_trained_labels():
    indices = trained_indices((True, False, True, True, False), CPU)
    assert indices.tolist() == [0, -1, 1, 2, -1]
    labels = torch.tensor([[0, 1, 2], [4, 3, -1]])
    assert trained_labels(labels, indices).tolist() == [[0, -1, 1], [-1, 2, -1]]


def test_void_of_is_what_no_trained_segment_covers():
    batch = collate([scene([0, 1, 2], seed=1), scene([1], 12, seed=2)], [0, 1], divisor=4)
    labels = trained_labels(batch.labels, trained_indices((True, False, True), CPU))
    found = void_of(batch, labels)
    assert found is not None
    expected = torch.zeros_like(found)
    for b, y, x in np.ndindex(*found.shape):
        if not batch.padding[b, y, x]:
            number = int(batch.segment_map[b, y, x])
            expected[b, y, x] = number == 0 or labels[b, number - 1] < 0
    assert torch.equal(found, expected)
    full = replace(scene([0]), segment_map=np.ones((8, 8), np.int32))
    assert void_of(collate([full], [0], 4), torch.tensor([[0]])) is None


def test_on_void_counts_pixels():
    torch.manual_seed(0)
    mask_logits = torch.randn(2, 3, 5, 4, 4)
    mask_logits[0, 0, 0] = -1.0  # an empty mask lies nowhere
    void = torch.rand(3, 16, 16) < 0.5
    found = on_void(mask_logits, void)
    for layer, b, q in np.ndindex(2, 3, 5):
        inside = mask_logits[layer, b, q] >= 0
        share = void[b].float().view(4, 4, 4, 4).mean((1, 3))
        expected = (inside * share).sum() > 0.5 * max(1, int(inside.sum()))
        assert found[layer, b, q] == expected
    assert found.any() and not found.all() and not found[0, 0, 0]


def test_a_batch_always_has_slots():
    """An all-void batch has one, and a process with few segments as many as the others."""
    empty = collate([replace(scene([]), segment_map=np.zeros((8, 8), np.int32))], [0], 4)
    assert empty.labels.shape == (1, 0)
    assert with_slots(empty, 0).labels.tolist() == [[-1]]
    batch = collate([scene([3, 4])], [0], 4)
    wide = with_slots(batch, 5)
    assert wide.labels.tolist() == [[3, 4, -1, -1, -1]]
    assert torch.equal(wide.masks()[:, :2], batch.masks()) and not wide.masks()[:, 2:].any()
    assert with_slots(batch, 1) is batch


def test_an_image_of_void_alone_gives_finite_losses(mini_run):
    """It can happen where crops are small: nothing to learn, nothing to break."""
    from concat_cli.core.build import build_segmentor
    from concat_cli.core.clip.encoder import load_clip
    from concat_cli.core.train.con_module import ConModule
    from concat_cli.core.train.teacher import Teacher
    from concat_cli.core.train.warmup import WarmupModule

    cfg, clip = mini_run.cfg, load_clip(mini_run.cfg.clip)
    nothing = replace(scene([], 64), segment_map=np.zeros((64, 64), np.int32))
    batch = collate([nothing, nothing], [0, 1])
    text = F.normalize(torch.randn(38, clip.embed_dim), dim=-1)
    indices = torch.arange(38)
    teacher = Teacher(clip, cfg.align.crops)
    segmentor = build_segmentor(cfg.model, clip.embed_dim)
    for module in (
        ConModule(segmentor, text, indices, cfg.loss, cfg.align, teacher),
        WarmupModule(segmentor, text, indices, cfg.align, cfg.warmup, teacher),
    ):
        losses = module(batch, 0)
        torch.stack(list(losses.values())).sum().backward()
        assert all(bool(torch.isfinite(value)) for value in losses.values())
        assert losses.get("mask", torch.zeros(())) == 0


# --- losses on tokens ---------------------------------------------------------------------------


def test_coverage_and_classes_of_tokens():
    torch.manual_seed(0)
    batch = collate([scene([4, 5], 16, 1), scene([6], 16, 2)], [0, 1], 16)
    masks, labels = batch.masks(), batch.labels
    masks[0, 0, :4, :4], masks[0, 1, :4, :4] = True, False  # one token that is full
    share = dense.coverage(masks, (4, 4))
    classes = dense.token_classes(share, labels)
    for b, y, x in np.ndindex(2, 4, 4):
        cell = masks[b, :, 4 * y : 4 * y + 4, 4 * x : 4 * x + 4].float().mean((1, 2))
        torch.testing.assert_close(share[b, :, y, x], cell)
        best = int(cell.argmax())
        expected = int(labels[b, best]) if cell[best] > 0.5 else -1
        assert classes[b, 4 * y + x] == expected
    assert classes[0, 0] == 4
    unknown = dense.token_classes(share, torch.full_like(labels, -1))
    assert (unknown == -1).all()


def test_seeds_lie_inside_their_segments():
    masks = torch.zeros(1, 3, 40, 40, dtype=torch.bool)
    masks[0, 0, 4:36, :20] = True  # a large one
    masks[0, 1, :8, 32:] = True  # a small one in a corner
    share = dense.coverage(masks, (10, 10))
    target = dense.seed_tokens(share, torch.tensor([[7, 8, -1]]))
    places = target[0].nonzero()[:, 0].tolist()
    assert len(places) == 2 and target.max() == 1
    for place in places:
        assert share[0, :2, place // 10, place % 10].max() == 1
    inner = [place for place in places if place % 10 < 5]
    assert len(inner) == 1 and 2 <= inner[0] // 10 <= 7  # away from the large one's border


def test_token_losses_are_naive_means():
    torch.manual_seed(0)
    logits, target = torch.randn(2, 5), (torch.rand(2, 5) < 0.3).float()
    valid = torch.rand(2, 5) < 0.7
    terms = []
    for b, t in np.ndindex(2, 5):
        p = torch.sigmoid(logits[b, t])
        loss = -(5.0 * target[b, t] * p.log() + (1 - target[b, t]) * (1 - p).log())
        terms.append((loss, bool(valid[b, t])))
    everywhere = torch.stack([loss for loss, _ in terms]).mean()
    inside = torch.stack([loss for loss, ok in terms if ok]).mean()
    torch.testing.assert_close(dense.objectness_loss(logits, target, None, 5.0), everywhere)
    torch.testing.assert_close(dense.objectness_loss(logits, target, valid, 5.0), inside)
    class_logits, classes = torch.randn(2, 5, 4), torch.tensor([[0, -1, 2, 1, -1], [-1] * 5])
    naive = [
        -class_logits[b, t].log_softmax(-1)[classes[b, t]]
        for b, t in np.ndindex(2, 5)
        if classes[b, t] >= 0
    ]
    torch.testing.assert_close(
        dense.token_class_loss(class_logits, classes), torch.stack(naive).mean()
    )
    assert dense.token_class_loss(class_logits, torch.full((2, 5), -1)) == 0
    halves = [
        dense.token_class_loss(class_logits[i : i + 1], classes[i : i + 1], lambda n: n * 0 + 1.5)
        for i in range(2)
    ]  # two processes that have 3 tokens together
    torch.testing.assert_close(sum(halves) / 2, torch.stack(naive).mean())


# --- the bank and what is drawn from it ---------------------------------------------------------


def test_batches_of_queries_depend_on_the_step_alone():
    bank = planted_bank()
    stream = query_batches(bank, bank.held((0,)), 12, 5, seed=3, start=0)
    first = [next(stream)[0] for _ in range(4)]
    later = next(query_batches(bank, bank.held((0,)), 12, 5, seed=3, start=3))[0]
    assert torch.equal(first[3].real, later.real) and torch.equal(first[3].empty, later.empty)
    assert not torch.equal(first[0].real, first[1].real)
    for batch in first:
        assert batch.real.shape == (12, 8) and batch.empty.shape == (5, 8)
        assert (batch.classes > 0).all()
    flat = bank.queries.reshape(-1, 8)
    empty = {tuple(row) for row in flat[bank.classes.reshape(-1) == EMPTY].tolist()}
    assert all(tuple(row) in empty for row in first[0].empty.tolist())
    assert (bank.classes == IGNORED).any()
    assert next(query_batches(bank, bank.held(), 4, 0, 0, 0))[0].empty.shape == (0, 8)


def test_class_statistics():
    bank = planted_bank()
    found = class_statistics(bank, 6, without=(2,))
    queries, classes = bank.queries.reshape(-1, 8).astype(np.float64), bank.classes.reshape(-1)
    kept = (classes >= 0) & (classes != 2)
    for c in range(6):
        rows = queries[(classes == c) & kept]
        assert found.counts[c] == len(rows)
        expected = rows.mean(0) if len(rows) else np.zeros(8)
        np.testing.assert_allclose(found.means[c], expected, atol=1e-3)
    np.testing.assert_allclose(found.mean, queries[kept].mean(0), atol=1e-3)
    np.testing.assert_allclose(found.std, queries[kept].std(0, ddof=1), rtol=1e-3)


def test_a_bank_with_nothing_to_learn_from():
    bank = planted_bank()
    check_bank(bank, mini_config(Path("x")).bank)
    nothing = QueryBank(bank.queries, np.full_like(bank.classes, EMPTY))
    with pytest.raises(UserError, match="0 queries with a segment"):
        check_bank(nothing, mini_config(Path("x")).bank)


def generator(kind: str = "mlp") -> nn.Module:
    torch.manual_seed(0)
    return build_generator(
        CatConfig(generator=kind, hidden=16, layers=1, primitives=4, heads=2, ffn=8), 5, 8
    ).eval()


@pytest.mark.parametrize("kind", ["mlp", "primitives"])
def test_pseudo_queries(kind):
    made_by = generator(kind)
    text = F.normalize(torch.randn(3, 5), dim=-1)
    source = torch.Generator().manual_seed(1)
    made = pseudo_queries(made_by, text, 7, source=source)
    again = pseudo_queries(made_by, text, 7, source=torch.Generator().manual_seed(1))
    assert made.shape == (3, 7, 8) and torch.equal(made, again)
    assert (made[:, 0] - made[:, 1]).abs().max() > 0
    residuals = torch.randn(4, 8)
    found = pseudo_queries(made_by, text, 7, residuals, torch.Generator().manual_seed(1))
    for c, n in np.ndindex(3, 7):  # by analogy: the class's mean plus a real residual
        gaps = (found[c, n] - made[c].mean(0) - residuals).abs().max(-1).values
        assert gaps.min() < 1e-5


def test_residuals_leave_the_class_means():
    bank = planted_bank()
    statistics = statistics_for("analogy", Banks(bank, bank), 6, CPU)
    assert statistics is not None and statistics_for("gaussian", Banks(bank, bank), 6, CPU) is None
    queries, classes = bank.take(np.arange(bank.classes.size))
    found = residuals_of(queries, classes, statistics)
    assert len(found) == (classes >= 0).sum()
    assert found.mean(0).abs().max() < 1e-3 and found.std() < 0.35


# --- the fold and the calibration ---------------------------------------------------------------


def test_the_fold():
    bank = planted_bank(classes=12, images=30)
    fold = choose_fold(bank, 12, 4, seed=0)
    assert len(fold) == 4 and list(fold) == sorted(set(fold)) and set(fold) <= set(range(12))
    assert fold == choose_fold(bank, 12, 4, seed=0) != choose_fold(bank, 12, 4, seed=1)
    assert len(choose_fold(bank, 12, 99, seed=0)) == 6  # never more than half
    assert choose_fold(bank, 12, 0, seed=0) == ()
    only = QueryBank(bank.queries, np.where(bank.classes < 3, bank.classes, EMPTY))
    assert set(choose_fold(only, 12, 9, seed=0)) < {0, 1, 2}  # what the bank does not hold is out
    assert harmonic(0.0, 0.0) == 0 and harmonic(0.5, 1.0) == pytest.approx(2 / 3)


class Perfect(nn.Module):
    """Makes the true class means, moved by `off`, with a little spread."""

    def __init__(self, means: Tensor, text: Tensor, off: float) -> None:
        super().__init__()
        self.means, self.text, self.off = means, text, off

    def sample_noise(self, rows: int, source: torch.Generator | None = None) -> Tensor:
        return torch.randn(rows, self.means.shape[1], generator=source)

    def forward(self, text: Tensor, noise: Tensor) -> Tensor:
        which = (text @ self.text.T).argmax(-1)
        return torch.roll(self.means, int(self.off), 0)[which] + 0.1 * noise


def test_figures_of_the_fold():
    train, dev = planted_bank(), planted_bank(seed=1)
    text = torch.eye(6)
    real = class_statistics(train, 6)
    queries, classes = dev.take(dev.held())
    good = fold_figures(Perfect(real.means, text, 0), text, (1, 4), real, queries, classes)
    assert good["score"] == good["fold_accuracy"] == good["rest_accuracy"] == 1
    assert good["nearest"] == 1 and good["distance"] < 0.1 and 0.01 < good["spread"] < 0.2
    wrong = fold_figures(Perfect(real.means, text, 1), text, (1, 4), real, queries, classes)
    assert wrong["fold_accuracy"] == wrong["nearest"] == wrong["score"] == 0
    assert wrong["distance"] > 0.5


class Planted(nn.Module):
    """A classifier for queries that are logits already."""

    scale = torch.tensor(100.0)

    def forward(self, queries: Tensor, text: Tensor) -> Tensor:
        return queries


def test_the_sweep_finds_a_planted_offset():
    """Queries of the fold lose by 7 to a seen class; seen ones win by 12 over the fold."""
    logits = np.zeros((1, 40, 6), np.float16)  # 5 classes and no_object
    classes = np.tile(np.arange(5), 8)[None].astype(np.int16)
    for q, c in enumerate(classes[0]):
        logits[0, q, c] = 20
        if c in (1, 3):  # the fold
            logits[0, q, 0] = 27
        else:
            logits[0, q, 1] = 8
    module: Any = SimpleNamespace(classifier=Planted(), projector=nn.Identity())
    banks: Any = SimpleNamespace(train=None, dev=QueryBank(logits, classes))  # dev alone is used
    offset, figures = _sweep(module, torch.zeros(5, 3), (1, 3), banks)
    assert 7 < offset < 12 and figures["uncalibrated"] == 0
    assert figures["calibrated"] == 1
    nothing, _ = _sweep(module, torch.zeros(5, 3), (), banks)
    assert nothing == 0


def planted_segmentor(width: int = 8) -> Any:
    torch.manual_seed(0)
    return SimpleNamespace(projector=Projector(width, 12), classifier=Classifier(12, 25.0, True))


def test_choosing_the_offset_never_learns_from_the_fold():
    """Real queries of the fold in the train bank are broken on purpose."""
    train, dev = planted_bank(classes=8), planted_bank(classes=8, seed=1)
    fold = (2, 5)
    queries = np.where(np.isin(train.classes, fold)[..., None], np.nan, train.queries)
    banks = Banks(QueryBank(queries.astype(np.float16), train.classes), dev)
    text = F.normalize(torch.randn(8, 12), dim=-1)
    for made_by in (None, build_generator(CatConfig(generator="mlp", hidden=8), 12, 8)):
        segmentor = planted_segmentor()
        before = [p.clone() for p in segmentor.projector.parameters()]
        cfg = FinetuneConfig(steps=20, batch=64, pseudo_per_class=4)
        offset, figures = choose_offset(segmentor, made_by, text, fold, banks, CatConfig(), cfg)
        assert 0 <= offset <= 7.5 * 1.5 and figures["calibrated"] >= figures["uncalibrated"]
        assert all(map(torch.equal, before, segmentor.projector.parameters()))


# --- union finetuning and the generator's task --------------------------------------------------


@pytest.mark.parametrize(
    ("layers", "no_object", "expected"),
    [
        ("last", False, {"projector.layers.1.weight", "projector.layers.1.bias"}),
        ("last", True, {"projector.layers.1.weight", "projector.layers.1.bias",
                        "classifier.no_object"}),
        ("all", False, {f"projector.layers.{i}.{p}" for i in (0, 1) for p in ("weight", "bias")}),
    ],
)  # fmt: skip
@pytest.mark.parametrize("optimiser", ["adam", "sgd"])
def test_what_finetuning_may_change(tmp_path, layers, no_object, expected, optimiser):
    torch.manual_seed(0)
    cfg = FinetuneConfig(
        steps=3, batch=16, layers=layers, no_object=no_object, optimiser=optimiser,
        unseen_per_step=2, pseudo_per_class=2,
    )  # fmt: skip
    banks = Banks(planted_bank(), planted_bank(seed=1))
    module = UnionModule(
        Projector(8, 5, 2, 8), Classifier(5, 25.0, True), generator(), torch.randn(9, 5),
        torch.arange(6, 9), cfg, statistics_for("analogy", banks, 6, CPU),
    )  # fmt: skip
    task = UnionTask(module, banks, (), cfg)
    before = {k: v.clone() for k, v in module.state_dict().items()}
    optim = OptimConfig(steps=3, warmup=0, schedule="constant", preview_every=0)
    Fit(
        task, optim, StageDir(tmp_path, "finetune"), device=CPU, dtype=None, meta=META,
        progress=SILENT, processes=Processes(), optimiser=task.optimiser(),
    ).run()  # fmt: skip
    after = module.state_dict()
    assert {k for k in before if not torch.equal(before[k], after[k])} == expected
    saved = load_weights(tmp_path / "last.safetensors").tensors
    assert set(saved) == {f"segmentor.{key}" for key in before}


def test_the_union_loss_is_the_weighted_cross_entropy():
    torch.manual_seed(0)
    cfg = FinetuneConfig(unseen_weight=3.0, no_object_weight=0.1, pseudo_per_class=4)
    module = UnionModule(
        Projector(8, 5), Classifier(5), generator(), torch.randn(8, 5), torch.tensor([6, 7]), cfg
    )
    bank = planted_bank()
    task = UnionTask(module, Banks(bank, bank), (1,), replace(cfg, batch=30))
    (batch,) = next(task.batches(0))
    assert not (batch.classes == 1).any() and not (batch.classes == IGNORED).any()
    assert (batch.classes == EMPTY).any()
    torch.manual_seed(5)
    found = module(batch, 0)["union"]
    torch.manual_seed(5)
    made, of = module._pseudo(batch)
    total, weights = 0.0, 0.0
    for query, label in zip([*batch.real, *made], [*batch.classes, *of], strict=True):
        index = 8 if label == EMPTY else int(label)
        weight = 0.1 if index == 8 else 3.0 if index >= 6 else 1.0
        logits = module.classifier(module.projector(query), module.text)
        total += weight * float(-logits.detach().log_softmax(-1)[index])
        weights += weight
    assert float(found) == pytest.approx(total / weights, rel=1e-5)
    assert made.shape == (8, 8) and of.tolist() == [6] * 4 + [7] * 4


def test_the_generators_task_leaves_the_fold_out():
    torch.manual_seed(0)
    cfg = CatConfig(generator="mlp", hidden=16, batch=24, negatives=6)
    bank = planted_bank()
    segmentor: Any = nn.ModuleDict({"projector": Projector(8, 12), "classifier": Classifier(12)})
    segmentor.projector, segmentor.classifier = segmentor["projector"], segmentor["classifier"]
    module = GeneratorModule(
        build_generator(cfg, 12, 8), segmentor, F.normalize(torch.randn(6, 12), dim=-1), cfg
    )
    task = GeneratorTask(module, Banks(bank, planted_bank(seed=1)), (1, 3), (1, 3), cfg)
    stream = task.batches(0)
    for _ in range(5):
        (batch,) = next(stream)
        assert not torch.isin(batch.classes, torch.tensor([1, 3])).any()
    losses = module(batch, 0)
    assert set(losses) == {"matching", "contrast", "cycle"}
    torch.stack(list(losses.values())).sum().backward()
    assert all(p.grad is not None for p in module.generator.parameters())
    assert all(p.grad is None for p in segmentor.parameters())  # the projector is frozen
    learned = class_statistics(bank, 6, (1, 3))
    torch.testing.assert_close(module.generator.statistics.mean, learned.mean)
    module.eval()
    assert set(task.score(0)) >= {"score", "fold_accuracy", "nearest", "distance"}
    off = GeneratorModule(
        module.generator, segmentor, module.text, replace(cfg, contrast=0.0, cycle=0.0)
    )
    assert set(off(batch, 0)) == {"matching"}


# --- counts image by image ----------------------------------------------------------------------


def test_counts_of_images_add_up_to_the_report(mini_run):
    info = read_dataset_info(Path(mini_run.cfg.data.root))
    weights = load_weights(mini_run.run.weights_of("finetune"))
    key = "segmentor.classifier.no_object"
    weights = replace(weights, tensors=weights.tensors | {key: 0 * weights.tensors[key]})
    infer = mini_config(info.root, "infer.min_score=0", "infer.min_mask=0", "infer.overlap=0").infer
    predictor = Predictor.load(weights, info.vocabulary, "cpu", infer=infer)
    dataset = PanopticDataset(info.part("val"), info.vocabulary, keep_crowd=True)
    counts = per_image_counts(predictor, dataset)
    report = evaluate_model(predictor, dataset, with_semantic=False)
    assert counts.shape == (12, 4, 48) and counts[:, 2].sum() > 0
    rows = {row.name: row for row in report.per_class}
    total = counts.sum(0)
    for index, name in enumerate(info.vocabulary.names):
        if name in rows:
            row = rows[name]
            assert (row.tp, row.fp, row.fn) == tuple(total[1:, index].astype(int))
    for group, members in (
        ("seen", info.vocabulary.seen_indices), ("unseen", info.vocabulary.unseen_indices)
    ):  # fmt: skip
        assert mean_pq(total, members) == pytest.approx(report.panoptic[group].pq)


def made_up(quality: float, images: int = 60, seed: int = 0) -> np.ndarray:
    """Counts (M, 4, 4) in which a share `quality` of the segments is found, at IoU 0.8."""
    rng = np.random.default_rng(seed)
    there = rng.random((images, 4)) < 0.5
    found = there & (rng.random((images, 4)) < quality)
    return np.stack([0.8 * found, found, 0 * found, there & ~found], 1).astype(float)


def test_paired_differences():
    seen, unseen = (0, 1), (2, 3)
    base = [made_up(0.5, seed=s) for s in (0, 1)]
    same = paired_difference(base, base, [(seen, unseen)] * 2, repeats=200)
    assert same.value == same.low == same.high == 0
    better = [made_up(0.9, seed=s) for s in (0, 1)]
    gain = paired_difference(better, base, [(seen, unseen)] * 2, repeats=200)
    assert 0 < gain.low < gain.value < gain.high
    loss = paired_difference(base, better, [(seen, unseen)] * 2, repeats=200)
    assert loss.value == pytest.approx(-gain.value)
    expected = [
        harmonic_pq(a.sum(0), seen, unseen) - harmonic_pq(b.sum(0), seen, unseen)
        for a, b in zip(better, base, strict=True)
    ]
    assert gain.value == pytest.approx(np.mean(expected))


def test_means_of_pq():
    counts = np.zeros((4, 3))  # class 0: one hit, one miss; class 1: a false alarm; class 2: absent
    counts[:, 0], counts[:, 1] = (0.8, 1, 0, 1), (0, 0, 1, 0)
    assert mean_pq(counts, [0]) == pytest.approx(0.8 / 1.5) and mean_pq(counts, [2]) == 0
    assert mean_pq(counts, [0, 1, 2]) == pytest.approx(0.8 / 1.5 / 2)
    assert harmonic_pq(counts, [0], [1]) == 0
    again = resample(np.stack([counts] * 5), 7, seed=0)
    assert again.shape == (7, 4, 3)
    np.testing.assert_allclose(again, np.broadcast_to(5 * counts, again.shape))


def test_the_segmentor_of_a_file_has_its_own_type(mini_run):
    from concat_cli.core.build import part_of, restore_segmentor

    weights = load_weights(mini_run.run.weights_of("con"))
    restored = restore_segmentor(weights)
    assert isinstance(restored, Segmentor) and not restored.training
    assert restored.state_dict().keys() == part_of(weights, "segmentor").keys()
    with pytest.raises(UserError, match="holds no generator"):
        part_of(weights, "generator")
