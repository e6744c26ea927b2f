"""ZegFormer's stage: merged targets, losses, both segmentors, resuming, and nothing unseen."""

from __future__ import annotations

import itertools
import math
from dataclasses import replace
from functools import cache
from pathlib import Path

import numpy as np
import pytest
import torch
from mini import Interrupt, KilledError, flat_state, metrics, mini_config, same, scene
from torch import Tensor

from concat_cli.core.build import part_of
from concat_cli.core.checkpoint import load_weights
from concat_cli.core.clip.encoder import Clip, load_clip
from concat_cli.core.config import ClipConfig
from concat_cli.core.config_file import load_config
from concat_cli.core.data.dataset import PanopticDataset, read_dataset_info
from concat_cli.core.data.loader import Batch, collate
from concat_cli.core.errors import UserError
from concat_cli.core.losses import class_loss
from concat_cli.core.runs import Run
from concat_cli.core.train.teacher import merged_by_category, trained_indices
from concat_cli.methods.concat import con
from concat_cli.methods.concat.con import train_con
from concat_cli.methods.zegformer import train as zegformer
from concat_cli.methods.zegformer.config import ZegFormerConfig
from concat_cli.methods.zegformer.maskformer import MaskFormer, build_zegformer, restore_zegformer
from concat_cli.methods.zegformer.train import (
    ZegFormerModule,
    match_whole_masks,
    train_zegformer,
    whole_mask_losses,
)

FOLDER = Path(__file__).parents[1] / "configs"
COMMON = ("align.image=0", "align.instance=0", "optim.steps=2", "warmup.steps=1")
PUBLISHED = (*COMMON, "warmup.steps=0", "loss.dense=0", "loss.denoising=0", "loss.classes=1",
             "loss.mask=20", "loss.dice=1")  # fmt: skip
OURS = (*COMMON, "zegformer.segmentor=mask2former", "zegformer.targets=segment",
        "zegformer.raw_no_object=false")  # fmt: skip
KINDS = {
    "published": PUBLISHED,
    "ours": (*OURS, "zegformer.targets=category", "zegformer.raw_no_object=true"),
}


@cache
def clip_of(cfg: ClipConfig) -> Clip:
    return load_clip(cfg, "cpu", image_tower=False)


@pytest.fixture
def one_clip(monkeypatch: pytest.MonkeyPatch) -> None:
    """The built-in CLIP is loaded once: half of what two steps take."""
    monkeypatch.setattr(zegformer, "text_clip", lambda cfg, device: clip_of(cfg.clip))
    monkeypatch.setattr(con, "load_clip", lambda cfg, device, **_: clip_of(cfg))


# --- targets ----------------------------------------------------------------------------------


def pixels_of(batch: Batch) -> list[dict[int, set[int]]]:
    """The pixels under each label of each image."""
    found: list[dict[int, set[int]]] = []
    for segment_map, labels in zip(batch.segment_map, batch.labels, strict=True):
        own: dict[int, set[int]] = {}
        for place, number in enumerate(segment_map.flatten().tolist()):
            if number:
                own.setdefault(int(labels[number - 1]), set()).add(place)
        found.append(own)
    return found


def test_segments_of_a_class_become_one_mask() -> None:
    samples = [scene([3, 1, 3, 2, 1], 12), scene([4], 12, seed=1), scene([7, 7], 12, seed=2)]
    batch = collate(samples, [0, 1, 2], divisor=4)
    merged = merged_by_category(batch)
    assert merged.labels.tolist() == [[3, 1, -1, 2, -1], [4, *[-1] * 4], [7, *[-1] * 4]]
    assert pixels_of(merged) == pixels_of(batch)
    assert torch.equal(merged.segment_map == 0, batch.segment_map == 0)
    masks = merged.masks().flatten(2).any(-1)
    assert torch.equal(masks, merged.labels >= 0)  # each class in one slot, nothing elsewhere
    assert torch.equal(merged_by_category(merged).segment_map, merged.segment_map)
    assert merged.segment_map.dtype == batch.segment_map.dtype
    assert merged_by_category(collate([scene([], 8)], [0], 4)).labels.tolist() == [[-1]]


# --- losses -----------------------------------------------------------------------------------


class World:
    """A batch of true scenes, in which one class is called unseen, and modules to feed it to."""

    def __init__(self, root: Path) -> None:
        self.cfg = mini_config(root, *PUBLISHED, "model.queries=12")
        info = read_dataset_info(root)
        dataset = PanopticDataset(info.part("train"), info.vocabulary)
        self.batch = merged_by_category(collate([dataset[i] for i in range(4)], range(4)))
        largest = int(torch.bincount(self.batch.segment_map[0].flatten())[1:].argmax())
        self.never = int(self.batch.labels[0, largest])
        self.other = info.vocabulary.unseen_indices[3]
        seen = torch.tensor(info.vocabulary.is_seen)
        seen[self.never] = False
        self.to_trained = trained_indices(tuple(seen.tolist()), torch.device("cpu"))
        g = torch.Generator().manual_seed(0)
        self.text = torch.randn(int(seen.sum()), 16, generator=g)

    def module(self, to_trained: Tensor | None = None) -> ZegFormerModule:
        torch.manual_seed(0)
        segmentor = build_zegformer(self.cfg, 16)
        assert isinstance(segmentor, MaskFormer)
        given = self.to_trained if to_trained is None else to_trained
        return ZegFormerModule(segmentor, self.text, given, self.cfg.loss)

    def relabelled(self) -> Batch:
        """The unseen segments under the name of another unseen class."""
        labels = self.batch.labels
        return replace(self.batch, labels=labels.masked_fill(labels == self.never, self.other))

    def voided(self) -> Batch:
        """The same images without those segments: their pixels are void."""
        gone = torch.nn.functional.pad(self.batch.labels == self.never, (1, 0))
        where = gone.gather(1, self.batch.segment_map.flatten(1).long())
        where = where.view_as(self.batch.segment_map)
        return replace(
            self.batch,
            segment_map=self.batch.segment_map.masked_fill(where, 0),
            labels=self.batch.labels.masked_fill(self.batch.labels == self.never, -1),
        )


@pytest.fixture(scope="module")
def world(mini_world: Path) -> World:
    return World(mini_world)


def trained(module: ZegFormerModule, batch: Batch) -> dict[str, Tensor]:
    """Losses, gradients and state after a forward and a backward."""
    torch.manual_seed(1)
    losses = module(batch, 0)
    torch.stack(list(losses.values())).sum().backward()
    grads = {f"grad/{n}": p.grad for n, p in module.named_parameters() if p.grad is not None}
    assert len(grads) > 40
    return losses | grads | module.state_dict()


def test_an_unseen_segment_is_void(world: World) -> None:
    """Bit for bit the same losses, gradients and statistics."""
    found = trained(world.module(), world.batch)
    assert same(found, trained(world.module(), world.relabelled())) == []
    assert same(found, trained(world.module(), world.voided())) == []
    whole = world.to_trained.clone()  # and the test is no empty one: a trained label does matter
    whole[world.never] = 0
    changed = same(found, trained(world.module(whole), world.batch))
    assert {"class", "mask", "dice"} <= set(changed)


def test_losses_are_those_of_all_layers_each_matched_on_its_own(world: World) -> None:
    module = world.module().eval()
    losses = module(world.batch, 0)
    with torch.no_grad():
        out = module.segmentor(world.batch.images, None, world.text)
        labels = world.to_trained[world.batch.labels].masked_fill(world.batch.labels < 0, -1)
        masks = world.batch.masks() & (labels >= 0)[..., None, None]
    outside = ~masks.any(1)  # void: these scenes have no pads
    count = int((labels >= 0).sum())
    expected = {"class": 0.0, "mask": 0.0, "dice": 0.0}
    assert len(out.class_logits) == world.cfg.model.decoder_layers
    for classes, mask_logits in zip(out.class_logits, out.mask_logits, strict=True):
        classes, mask_logits = classes[None], mask_logits[None]
        matched = match_whole_masks(classes, mask_logits, labels, masks, (1, 20, 1))
        void = torch.zeros(classes.shape[:3], dtype=torch.bool)
        for b, q in itertools.product(range(4), range(12)):
            mask = mask_logits[0, b, q] >= 0  # of stride 4
            share = outside[b].view(16, 4, 16, 4).float().mean((1, 3))
            void[0, b, q] = float(share[mask].sum()) > 0.5 * max(1, int(mask.sum()))
        expected["class"] += float(class_loss(classes, matched, labels, 0.1, void))
        focal, dice = whole_mask_losses(mask_logits, matched, masks, float(count))
        expected["mask"] += 20 * float(focal)
        expected["dice"] += float(dice)
        assert void.any() and not void.all()
    for name, value in expected.items():
        assert float(losses[name].detach()) == pytest.approx(value, rel=1e-4), name


def test_an_image_of_void_alone_gives_finite_losses(world: World) -> None:
    nothing = replace(scene([], 64), segment_map=np.zeros((64, 64), np.int32))
    module = world.module()
    losses = module(collate([nothing, nothing], [0, 1]), 0)
    torch.stack(list(losses.values())).sum().backward()
    assert all(bool(torch.isfinite(value)) for value in losses.values())
    assert losses["mask"] == 0 and losses["dice"] == 0
    grads = [p.grad for p in module.parameters() if p.grad is not None]
    assert grads and all(bool(torch.isfinite(grad).all()) for grad in grads)


# --- the stage --------------------------------------------------------------------------------


@pytest.mark.usefixtures("one_clip")
@pytest.mark.parametrize("kind", KINDS)
def test_two_steps_are_one_and_one(mini_world: Path, tmp_path: Path, kind: str) -> None:
    cfg = mini_config(mini_world, *KINDS[kind], "optim.save_every=1")
    straight, broken = Run("straight", tmp_path), Run("broken", tmp_path)
    result = train_zegformer(cfg, straight, device="cpu")
    assert result.finished and result.steps == 2
    stage = straight.stage("zegformer")
    losses = [row for row in metrics(stage) if "loss" in row]
    assert len(losses) == 2 and all(math.isfinite(row["loss"]) for row in losses)
    assert {"class", "mask", "dice"} <= losses[0].keys()
    assert ("dense" in losses[0]) == kind.startswith("ours")
    score = "miou" if cfg.own(ZegFormerConfig).targets == "category" else "pq"
    assert result.figures["score"] == result.figures[score]
    warms_up = int(cfg.warmup.steps > 0)
    with pytest.raises(KilledError):
        train_zegformer(cfg, broken, device="cpu", progress=Interrupt("zegformer", 1, warms_up))
    assert flat_state(broken.stage("zegformer"))["/step"] == 1
    assert train_zegformer(cfg, broken, device="cpu").finished
    again = broken.stage("zegformer")
    assert same(flat_state(stage), flat_state(again)) == [] and metrics(stage) == metrics(again)
    assert stage.inner("warmup").last.exists() == bool(warms_up)
    weights = load_weights(result.weights)
    assert weights.stage == "zegformer" and weights.meta["taught"] == []
    restored = restore_zegformer(weights)
    assert restored.state_dict().keys() == part_of(weights, "segmentor").keys()
    assert restored.classifier.raw_no_object and not restored.training
    assert all(name.startswith("segmentor.") for name in weights.tensors)


@pytest.mark.usefixtures("one_clip")
def test_our_segmentor_is_that_of_con_without_its_alignment(
    mini_world: Path, tmp_path: Path
) -> None:
    """Bit for bit: nothing of stage 1 was written a second time."""
    run = Run("both", tmp_path)
    cfg = mini_config(mini_world, *OURS)
    train_zegformer(cfg, run, device="cpu")
    train_con(cfg, run, device="cpu")
    one, other = run.stage("zegformer"), run.stage("con")
    assert same(flat_state(one), flat_state(other)) == [] and metrics(one) == metrics(other)


@pytest.mark.usefixtures("one_clip")
def test_targets_by_category_are_what_is_learned(
    mini_world: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """An image gives each class once; else as often as it holds it."""
    given: dict[str, list[Tensor]] = {}
    whole = ZegFormerModule.forward

    def noted(self: ZegFormerModule, batch: Batch, step: int) -> dict[str, Tensor]:
        given.setdefault(name, []).append(batch.labels)
        return whole(self, batch, step)

    monkeypatch.setattr(ZegFormerModule, "forward", noted)
    for name in ("category", "segment"):
        cfg = mini_config(mini_world, *PUBLISHED, f"zegformer.targets={name}", "optim.batch_size=8",
                          "optim.per_device=8")  # fmt: skip
        train_zegformer(cfg, Run(name, tmp_path), device="cpu")
    repeated = {
        name: sum(
            len(held) - len(set(held))
            for labels in batches
            for held in ([x for x in row if x >= 0] for row in labels.tolist())
        )
        for name, batches in given.items()
    }
    assert repeated["category"] == 0 < repeated["segment"]


def test_clip_gives_its_text_alone(
    mini_world: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    towers: list[bool] = []
    whole = Clip.__init__

    def noted(self: Clip, *arguments: object, **named: object) -> None:
        whole(self, *arguments, **named)  # type: ignore[arg-type]
        towers.append(self.has_image_tower)

    monkeypatch.setattr(Clip, "__init__", noted)
    cfg = mini_config(mini_world, *PUBLISHED, "optim.steps=0")
    assert train_zegformer(cfg, Run("text", tmp_path), device="cpu").finished
    assert towers == [False]


@pytest.mark.parametrize(
    ("keys", "named"),
    [
        ((*PUBLISHED, "align.image=0.1"), "align.image"),
        ((*OURS, "align.instance=1"), "align.instance"),
        ((*PUBLISHED, "warmup.steps=5"), "warmup.steps"),
        ((*PUBLISHED, "loss.dense=1"), "loss.dense"),
        ((*PUBLISHED, "loss.denoising=2", "loss.truth=1"), "loss.denoising and no loss.truth"),
        ((*PUBLISHED, "model.init=somewhere"), "model.init"),
        ((*PUBLISHED, "model.width=48"), "model.width=48"),
    ],
)
def test_what_it_does_not_have_is_refused(
    mini_world: Path, tmp_path: Path, keys: tuple[str, ...], named: str
) -> None:
    run = Run("refused", tmp_path)
    with pytest.raises(UserError, match=named):
        train_zegformer(mini_config(mini_world, *keys), run, device="cpu")
    assert not run.path.exists()


# --- the shipped configuration; those of the papers' benchmarks: test_paper_configs.py ----------

SMALL = """
clip.templates=single model.width=32 model.mask_width=32 model.heads=4 model.decoder_layers=2
model.decoder_ffn=32 model.queries=10 data.crop=64 infer.size=64 infer.max_size=128 optim.steps=2
optim.batch_size=2 optim.per_device=1 optim.log_every=1 warmup.steps=1
shapes.train=24 shapes.dev=8 shapes.val=12 shapes.size=64
""".split()


@pytest.mark.usefixtures("one_clip")
def test_two_steps_of_the_shipped_configuration(mini_world: Path, tmp_path: Path) -> None:
    cfg = load_config(FOLDER / "shapes_zegformer.yaml", [*SMALL, f"data.root={mini_world}"])
    result = train_zegformer(cfg, Run("shapes", tmp_path), device="cpu")
    assert result.finished and "score" in result.figures
    rows = [row for row in metrics(Run("shapes", tmp_path).stage("zegformer")) if "loss" in row]
    assert len(rows) == 2 and all(math.isfinite(row["loss"]) for row in rows)
