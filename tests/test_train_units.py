"""The parts of training, each against a naive loop or a case whose answer is known."""

from __future__ import annotations

import ast
import shutil
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass, replace
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from mini import Heard, MiniRun, alone, metrics, mini_config, scene
from torch import Tensor, nn

import concat_cli
from concat_cli.core.build import build_segmentor
from concat_cli.core.checkpoint import load_weights
from concat_cli.core.clip.encoder import load_clip
from concat_cli.core.clip.tokens import TokenCache
from concat_cli.core.config import ClipConfig, Config, DataConfig, OptimConfig
from concat_cli.core.data.loader import collate
from concat_cli.core.progress import SILENT
from concat_cli.core.runs import Run, StageDir
from concat_cli.core.train.distributed import Processes
from concat_cli.core.train.loop import Fit, MovingAverage, lr_factor, parameter_groups
from concat_cli.core.train.optimisers import eager
from concat_cli.core.train.session import Session
from concat_cli.core.train.teacher import (
    SegmentTokens,
    Truth,
    drawn_segments,
    on_void,
    trained_indices,
    trained_labels,
    void_of,
    with_slots,
)
from concat_cli.methods.concat.con import train_con
from concat_cli.methods.concat.con_module import TruthModule
from concat_cli.methods.concat.finetune import finetune

CPU = torch.device("cpu")
META = {
    "format": 1, "stage": "con", "config": {}, "vocabulary": [], "trained": [],
    "clip": {"model": "", "pretrained": "", "sha256": ""},
}  # fmt: skip


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

    def forward(self, batch: Rows, counts: object) -> dict[str, Tensor]:
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

    def counts(self, batch: Rows) -> dict[str, Tensor]:
        return {}

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


def fit(task: RegressionTask, folder: Path, **keys: Any) -> StageDir:
    stage = StageDir(folder, "con")
    optim = OptimConfig(
        **({"steps": 6, "warmup": 2, "log_every": 1, "preview_every": 0, "clip_norm": 1e9} | keys)
    )
    Fit(task, optim, stage, alone(), META).run()
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
    """8 images in one forward or in two of 4: each forward samples its own points and knows its
    own void; see `test_train_accumulation` for all that is exact."""
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
    found = on_void(mask_logits, void, 0.5)
    for layer, b, q in np.ndindex(2, 3, 5):
        inside = mask_logits[layer, b, q] >= 0
        share = void[b].float().view(4, 4, 4, 4).mean((1, 3))
        expected = (inside * share).sum() > 0.5 * max(1, int(inside.sum()))
        assert found[layer, b, q] == expected
    assert found.any() and not found.all() and not found[0, 0, 0]
    everywhere = torch.ones(1, 16, 1052, dtype=torch.bool)
    with torch.autocast("cpu", torch.bfloat16):  # which cannot count to 4 * 263
        assert not on_void(torch.ones(1, 1, 1, 4, 263), everywhere, 1.0).any()  # all have a target


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


def test_segments_are_drawn_at_random_and_those_without_a_label_last():
    labels = torch.tensor([[4, -1, 2, 7, -1], [-1, -1, -1, 0, -1]])
    torch.manual_seed(0)
    drawn = [drawn_segments(labels, 2) for _ in range(40)]
    assert {d.shape for d in drawn} == {(2, 2)}
    assert {frozenset(d[0].tolist()) for d in drawn} == {
        frozenset(pair) for pair in ((0, 2), (0, 3), (2, 3))
    }
    assert all(d[1, 0] == 3 and labels[1, d[1, 1]] == -1 for d in drawn)


def test_denoising_queries_keep_to_their_segments(mini_run):
    """Whatever the order in which segments are drawn, each has its own mask and label."""
    from concat_cli.methods.concat.con_module import ConModule

    cfg = mini_run.cfg
    text = F.normalize(torch.randn(9, 12), dim=-1)
    align = replace(cfg.align, image=0.0, instance=0.0)
    cfg = replace(cfg, loss=replace(cfg.loss, denoising=2), align=align)
    module = ConModule(build_segmentor(cfg.model, 12), text, torch.arange(9), cfg)
    batch = collate([scene([0, 1, 2, 3], 64), scene([4, 5], 64, seed=1)], [0, 1])
    quarter, seen = F.avg_pool2d(batch.masks().float(), 4), set()
    whole = module._denoising

    def noted(own_masks: Tensor, own_labels: Tensor) -> Any:
        for b, slot in np.ndindex(2, 2):
            label = int(own_labels[b, slot])
            (n,) = torch.nonzero(batch.labels[b] == label)[0].tolist()
            assert torch.equal(own_masks[b, slot], quarter[b, n])
            seen.add(label)
        return whole(own_masks, own_labels)

    module._denoising = noted
    for seed in range(8):
        torch.manual_seed(seed)
        losses = module(batch, 0)
        assert losses["denoising_class"].isfinite()
    assert seen == set(range(6))


@pytest.mark.parametrize("detach", [False, True])
def test_alignment_on_true_masks_may_be_cut_from_the_backbone(mini_run, detach):
    cfg = mini_run.cfg
    segmentor = build_segmentor(cfg.model, 12)
    batch = collate([scene([0, 1], 64), scene([2, 3], 64, seed=1)], [0, 1])
    rows, slots = (torch.tensor(x) for x in ([0, 0, 1, 1], [0, 1, 0, 1]))
    tokens = F.normalize(torch.randn(4, 12), dim=-1)
    target = SegmentTokens(rows, slots, torch.ones(4, dtype=torch.bool), tokens)
    cfg = replace(cfg, align=replace(cfg.align, detach=detach))
    module = TruthModule(segmentor, torch.randn(5, 12), torch.arange(5), cfg)
    maps, truth = segmentor.features(batch.images, None), Truth.of(batch, module.to_trained)
    losses = module.truth_losses(maps, truth, target, module.alone(batch))
    losses["truth_align"].backward(retain_graph=True)
    assert segmentor.projector.last.weight.grad.any()
    assert all(p.grad is None for p in segmentor.backbone.parameters()) == detach
    losses["truth_class"].backward()
    assert any(p.grad is not None for p in segmentor.backbone.parameters())


def test_an_image_of_void_alone_gives_finite_losses(mini_run):
    """It can happen where crops are small: nothing to learn, nothing to break."""
    from concat_cli.core.train.teacher import Teacher
    from concat_cli.methods.concat.con_module import ConModule, WarmupModule

    cfg, clip = mini_run.cfg, load_clip(mini_run.cfg.clip)
    nothing = replace(scene([], 64), segment_map=np.zeros((64, 64), np.int32))
    batch = collate([nothing, nothing], [0, 1])
    text = F.normalize(torch.randn(38, clip.embed_dim), dim=-1)
    indices = torch.arange(38)
    teacher = Teacher(clip, cfg.align.crops)
    segmentor = build_segmentor(cfg.model, clip.embed_dim)
    for module in (
        ConModule(segmentor, text, indices, cfg, teacher),
        WarmupModule(segmentor, text, indices, cfg, teacher),
    ):
        losses = module(batch, 0)
        torch.stack(list(losses.values())).sum().backward()
        assert all(bool(torch.isfinite(value)) for value in losses.values())
        assert losses.get("mask", torch.zeros(())) == 0


@pytest.mark.parametrize(
    ("run", "device", "native", "expected"),
    [
        (torch.bfloat16, "cuda", True, torch.bfloat16),
        (torch.float16, "cuda", True, torch.float16),
        (torch.bfloat16, "cuda", False, torch.float16),
        (None, "cuda", True, None),
        (torch.bfloat16, "cpu", True, None),
        (torch.float16, "mps", True, None),
    ],
)
def test_the_teacher_is_as_precise_as_the_student(run, device, native, expected, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda **_: native)
    surroundings: Any = (None, None, torch.device(device), run, Processes(), SILENT)
    assert Session(*surroundings).teacher_dtype is expected


def test_a_stage_hears_that_its_teachers_cache_is_full(tmp_path, monkeypatch):
    monkeypatch.setattr(TokenCache.__init__, "__defaults__", (None, 0, SILENT))  # no room
    heard, clip = Heard(), load_clip(ClipConfig())
    cfg = Config(data=DataConfig(root=str(tmp_path)))
    surroundings: Any = (cfg, None, torch.device("cpu"), None, Processes(), heard)
    teacher = Session(*surroundings).teacher(clip, 1, "cache")
    assert teacher.cache is not None
    teacher.cache.image_tokens(clip, torch.zeros(1, 3, 64, 64, dtype=torch.uint8))
    assert ["is full" in line for line in heard.lines] == [True]
    assert Session(*surroundings).teacher(clip, 1, "online").cache is None


def test_half_precision_is_of_images_alone_and_has_a_cache_of_its_own(tmp_path):
    said, whole = Heard(), load_clip(ClipConfig())
    half = load_clip(ClipConfig(), dtype=torch.bfloat16, progress=said)
    assert said.lines == ["CLIP encodes images in bfloat16"] and half.identity == whole.identity
    images = torch.rand(2, 3, 64, 64)
    a, b = whole.encode_image(images), half.encode_image(images)
    assert not torch.equal(a, b)
    torch.testing.assert_close(a, b, rtol=0, atol=0.02)
    assert torch.equal(whole.encode_text(["a ring"]), half.encode_text(["a ring"]))
    folders = {
        TokenCache(tmp_path, clip.identity, clip.embed_dim, clip.dtype).folder
        for clip in (whole, half)
    }
    assert len(folders) == 2


def test_no_tensor_is_doubled_on_its_device():
    """MPS has no float64: a tensor is brought to the CPU first."""
    root, doubled = Path(concat_cli.__file__).parent, 0
    for path in root.rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text("utf-8"))):
            call = node.func if isinstance(node, ast.Call) else None
            if isinstance(call, ast.Attribute) and call.attr == "double":
                doubled += 1
                assert ast.unparse(call.value).endswith(".cpu()"), f"{path}:{call.lineno}"
            if isinstance(node, ast.Call) and "torch.float64" in ast.unparse(node):
                assert "cpu" in ast.unparse(node), f"{path}:{node.lineno}"
    assert doubled


@pytest.mark.parametrize(
    ("kind", "keys"),
    [
        (torch.optim.AdamW, {"fused": True}),
        (torch.optim.AdamW, {"weight_decay": 0.1}),
        (torch.optim.Adam, {}),
        (torch.optim.SGD, {"momentum": 0.9}),
    ],
)
def test_optimisers_without_the_compiler_are_torchs_own(kind: Any, keys: dict[str, Any]) -> None:
    """To the bit, also after their state was saved by the one and loaded by the other."""

    def step(model: nn.Linear, optimiser: torch.optim.Optimizer, inputs: Tensor) -> None:
        optimiser.zero_grad()
        model(inputs).square().sum().backward()
        optimiser.step()

    theirs, ours = nn.Linear(8, 4), nn.Linear(8, 4)
    ours.load_state_dict(theirs.state_dict())
    pair = [
        (theirs, kind(theirs.parameters(), lr=0.01, **keys)),
        (ours, eager(kind)(ours.parameters(), lr=0.01, **keys)),
    ]
    for inputs in torch.randn(6, 3, 8):
        for model, optimiser in pair:
            step(model, optimiser, inputs)
        (_, a), (_, b) = pair
        pair = [(theirs, kind(theirs.parameters(), **keys)), (ours, eager(kind)(ours.parameters()))]
        pair[0][1].load_state_dict(b.state_dict())
        pair[1][1].load_state_dict(a.state_dict())
        assert torch.equal(theirs.weight, ours.weight) and torch.equal(theirs.bias, ours.bias)


def test_stages_without_images_import_no_compiler(mini_run: MiniRun, tmp_path: Path) -> None:
    """torch's optimisers would: it takes almost as long as torch itself. Texts are in the cache."""
    shutil.copytree(mini_run.run.path, tmp_path / "mini")
    assert finetune(mini_run.cfg, Run("mini", tmp_path), device="cpu", fresh=True).finished
    code = f"""
import sys
from pathlib import Path
sys.path.insert(0, {str(Path(__file__).parent)!r})
from mini import mini_config
from concat_cli.core.runs import Run
from concat_cli.methods.concat.cat import train_cat
from concat_cli.methods.concat.finetune import finetune
cfg = mini_config(Path({mini_run.cfg.data.root!r}))
for stage in (train_cat, finetune):
    assert stage(cfg, Run("mini", Path({str(tmp_path)!r})), device="cpu", fresh=True).steps
    assert "torch._dynamo" not in sys.modules, stage
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, encoding="utf-8")
    assert done.returncode == 0, done.stderr
