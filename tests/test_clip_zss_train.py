"""CLIP-ZSS in training: every switch, resuming, the bank, several processes, and what may leak."""

from __future__ import annotations

import math
import shutil
import threading
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from mini import Interrupt, KilledError, draw_world, flat_state, metrics, mini_config, same
from torch import Tensor, nn

from concat_cli.core.checkpoint import load_weights
from concat_cli.core.clip.encoder import Clip, load_clip
from concat_cli.core.config import Config
from concat_cli.core.config_file import load_config
from concat_cli.core.data.dataset import PanopticDataset, read_dataset_info
from concat_cli.core.data.loader import Batch, collate
from concat_cli.core.errors import UserError
from concat_cli.core.prepare.shapes_scene import DEFAULT_UNSEEN
from concat_cli.core.runs import Run
from concat_cli.core.train import distributed
from concat_cli.core.train import teacher as contrast
from concat_cli.core.train.teacher import Teacher, trained_indices
from concat_cli.methods.clip_zss import module as clip_zss_module
from concat_cli.methods.clip_zss import train as clip_zss
from concat_cli.methods.clip_zss.config import ClipZssConfig
from concat_cli.methods.clip_zss.module import ClipZssModule, label_map, labels_at
from concat_cli.methods.clip_zss.pseudo_labels import PseudoLabels
from concat_cli.methods.clip_zss.student import build_student, build_synthesizer, restore_student
from concat_cli.methods.clip_zss.train import train_clip_zss

FOLDER = Path(__file__).parents[1] / "configs"
SMALL = ("clip_zss.head_width=16", "clip_zss.bank=6", "clip_zss.heads=4", "optim.steps=2",
         "optim.save_every=1", "optim.warmup=0", "optim.batch_size=2", "optim.per_device=2",
         "clip_zss.dense_size=128", "clip_zss.windows=[1,2,4]", "clip_zss.most=4",
         "clip_zss.iterations=3", "clip_zss.min_share=0.05")  # fmt: skip
SWITCHES = {
    "baseline": (),
    "global": ("clip_zss.glm=1", "clip_zss.source=cache", "clip_zss.full_size=true"),
    "centroids": ("clip_zss.pseudo=true", "clip_zss.learn_scale=false"),
    "synthesizer": ("clip_zss.pseudo=true", "clip_zss.synthesizer=1"),
    "all": ("clip_zss.glm=1", "clip_zss.glm_temperature=0.1", "clip_zss.pseudo=true",
            "clip_zss.synthesizer=2", "clip_zss.prototypes=2", "clip_zss.prototype_scale=20",
            "optim.ema=0"),
}  # fmt: skip
RESUMED = ("global", "all")  # the cache on disk; everything that has a state
PIXELS = {"focal", "dice", "classes"}
LOSSES = {
    "baseline": PIXELS,
    "global": PIXELS | {"global"},
    "centroids": PIXELS,
    "synthesizer": PIXELS | {"prototypes"},
    "all": PIXELS | {"global", "prototypes"},
}


# --- the stage --------------------------------------------------------------------------------


@pytest.mark.parametrize("switch", SWITCHES)
def test_two_steps_of_every_switch(mini_world, tmp_path, switch):
    world = Path(shutil.copytree(mini_world, tmp_path / "shapes"))  # caches are written into it
    cfg, run = mini_config(world, *SMALL, *SWITCHES[switch]), Run("two", tmp_path)
    result = train_clip_zss(cfg, run, device="cpu")
    assert result.finished and result.steps == 2
    rows = [row for row in metrics(run.stage("clip_zss")) if "loss" in row]
    assert set(rows[0]) - {"step", "loss", "grad_norm", "lr_factor"} == LOSSES[switch]
    assert 0 <= result.figures["miou"] == result.figures["score"] <= 1
    check_weights(cfg, run.stage("clip_zss").last)
    if switch in RESUMED:
        broken = Run("broken", tmp_path)
        with pytest.raises(KilledError):
            train_clip_zss(cfg, broken, device="cpu", progress=Interrupt("clip_zss", 1))
        assert train_clip_zss(cfg, broken, device="cpu").finished
        one, two = run.stage("clip_zss"), broken.stage("clip_zss")
        assert same(flat_state(one), flat_state(two)) == [] and metrics(one) == metrics(two)


def test_two_steps_of_the_shipped_configuration(tmp_path):
    root = draw_world(tmp_path / "void", unseen_pixels="void", train=6, dev=2, val=2)
    drawn = [f"shapes.{key}" for key in ("train=6", "dev=2", "val=2", "size=64")]
    keys = [*SMALL, "optim.log_every=1", f"data.root={root}", *drawn]
    cfg = load_config(FOLDER / "shapes_clip_zss.yaml", [*keys, "data.crop=64", "infer.size=64"])
    run = Run("shapes", tmp_path)
    assert train_clip_zss(cfg, run, device="cpu").finished
    rows = [row for row in metrics(run.stage("clip_zss")) if "loss" in row]
    assert len(rows) == 2 and all(math.isfinite(row["loss"]) for row in rows)
    assert set(rows[0]) >= LOSSES["all"]


def check_weights(cfg: Config, path: Path) -> None:
    """The file holds the student alone, and enough to make it again."""
    weights = load_weights(path)
    assert weights.stage == "clip_zss" and {k.split(".")[0] for k in weights.tensors} == {"student"}
    assert restore_student(weights).projection.out_channels == 128
    vocabulary = read_dataset_info(Path(cfg.data.root)).vocabulary
    assert weights.meta["trained"] == list(vocabulary.seen_only().names)
    assert weights.meta["taught"] == []


def test_learning_rates(mini_world, tmp_path, monkeypatch):
    groups: list[dict[str, Any]] = []

    def noted(self: clip_zss.ClipZssTask) -> list[dict[str, Any]]:
        groups.extend(whole(self))
        names = {id(p): n for n, p in self.module.named_parameters()}
        for group in groups:
            group["names"] = [names[id(p)] for p in group["params"]]
        raise KilledError

    whole = clip_zss.ClipZssTask.parameter_groups
    monkeypatch.setattr(clip_zss.ClipZssTask, "parameter_groups", noted)
    keys = ("optim.lr=0.01", "optim.backbone_factor=0.1", *SWITCHES["all"])
    with pytest.raises(KilledError):
        train_clip_zss(mini_config(mini_world, *SMALL, *keys), Run("lr", tmp_path), device="cpu")
    rate = {name: group["lr"] for group in groups for name in group["names"]}
    assert rate["student.log_scale"] == pytest.approx(0.03)
    assert rate["synthesizer.out.weight"] == rate["student.head.fuse.weight"] == 0.01
    slow = [rate[name] for name in rate if name.startswith("student.encoder")]
    assert slow and slow == pytest.approx([0.001] * len(slow))
    decayed = {n for group in groups for n in group["names"] if group["weight_decay"]}
    assert "student.projection.weight" in decayed and "student.projection.bias" not in decayed


def test_what_cannot_be_trained_leaves_no_folder(mini_world, tmp_path):
    run = Run("bad", tmp_path)
    for key in ("encoder=no-such-encoder", "encoder_weights=missing.pth", "heads=7"):
        keys = (*SMALL, *SWITCHES["all"], f"clip_zss.{key}")
        with pytest.raises(UserError):
            train_clip_zss(mini_config(mini_world, *keys), run, device="cpu")
        assert not run.path.exists()


def test_a_preview_trains_nothing(mini_world, tmp_path, monkeypatch):
    monkeypatch.setattr(clip_zss, "PICTURES", 1)
    run, path = Run("preview", tmp_path), tmp_path / "pictures" / "pseudo.png"
    result = train_clip_zss(mini_config(mini_world, *SMALL), run, device="cpu", preview=path)
    assert path.stat().st_size > 1000 and not run.path.exists()
    assert result.steps == 0 and not result.finished


# --- what enters ------------------------------------------------------------------------------


def test_no_unseen_name_and_no_image_tower_without_need(mini_world, tmp_path, monkeypatch):
    """The method is inductive: unseen names are for evaluation alone."""
    heard, towers, whole = [], [], Clip.encode_text

    def noted(self: Clip, texts: list[str]) -> Tensor:
        heard.extend(texts)
        towers.append(self.has_image_tower)
        return whole(self, texts)

    monkeypatch.setattr(Clip, "encode_text", noted)
    seen = read_dataset_info(mini_world).vocabulary.seen_only().names
    for switch in ("baseline", "all"):
        heard.clear(), towers.clear()
        monkeypatch.setenv("CONCAT_CACHE", str(tmp_path / switch))
        cfg = mini_config(mini_world, *SMALL, *SWITCHES[switch])
        train_clip_zss(cfg, Run(switch, tmp_path), device="cpu")
        assert all(any(name in text for text in heard) for name in seen)
        assert not any(name in text for text in heard for name in DEFAULT_UNSEEN)
        assert set(towers) == {switch == "all"}


class World:
    """A batch with segments of a class that must not be trained on, and modules to feed it to."""

    def __init__(self, root: Path) -> None:
        self.root = root
        info = read_dataset_info(root)
        dataset = PanopticDataset(info.part("train"), info.vocabulary)
        self.batch = collate([dataset[i] for i in range(6)], range(6))
        largest = torch.bincount(self.batch.segment_map[0].flatten())[1:].argmax()
        self.never = int(self.batch.labels[0, largest])
        self.other = info.vocabulary.unseen_indices[3]
        seen = torch.tensor(info.vocabulary.is_seen)
        seen[self.never] = False
        self.to_trained = trained_indices(tuple(seen.tolist()), torch.device("cpu"))
        self.clip = load_clip(mini_config(root).clip)
        self.text = self.clip.encode_text([f"{i}" for i in range(int(seen.sum()))])

    @property
    def hidden(self) -> Tensor:
        """Which slots (B, N) hold the class that must not be trained on."""
        return self.batch.labels == self.never

    def relabelled(self) -> Batch:
        """The same segments under the name of another unseen class."""
        return replace(self.batch, labels=self.batch.labels.masked_fill(self.hidden, self.other))

    def voided(self) -> Batch:
        """The same images; the pixels of those segments have no label at all."""
        gone = torch.cat((torch.zeros(6, 1, dtype=torch.bool), self.hidden), 1)
        pixels = gone.gather(1, self.batch.segment_map.flatten(1).long())
        return replace(
            self.batch,
            segment_map=self.batch.segment_map.masked_fill(pixels.view(6, 64, 64), 0),
            labels=self.batch.labels.masked_fill(self.hidden, -1),
        )

    def module(self, *keys: str) -> ClipZssModule:
        cfg = mini_config(self.root, *SMALL, "clip_zss.dropout=0", *keys).own(ClipZssConfig)
        torch.manual_seed(0)
        student = build_student(cfg, 128)
        synthesizer = build_synthesizer(cfg, 128)
        if synthesizer is not None:
            nn.init.normal_(synthesizer.out.weight, std=0.3)
        teacher = Teacher(self.clip, 1) if cfg.glm or cfg.pseudo else None
        own = self.to_trained.clone()
        return ClipZssModule(student, synthesizer, self.text, own, cfg, teacher)


@pytest.fixture(scope="module")
def world(mini_world: Path) -> World:
    found = World(mini_world)
    assert found.hidden.any() and not found.hidden.all()
    return found


def trained(module: ClipZssModule, batch: Batch) -> dict[str, Tensor]:
    """Losses, gradients and state after two forwards and one backward."""
    module(batch, 0)  # the second one meets what the first left in the bank
    losses = module(batch, 0)
    torch.stack(list(losses.values())).sum().backward()
    grads = {f"grad/{n}": p.grad for n, p in module.named_parameters() if p.grad is not None}
    assert len(grads) > 40
    return losses | grads | module.state_dict()


@pytest.mark.parametrize("switch", ["baseline", "all"])
def test_a_label_that_must_not_be_trained_on_changes_nothing(world, switch):
    first = trained(world.module(*SWITCHES[switch]), world.batch)
    for batch in (world.relabelled(), world.voided()):
        assert same(first, trained(world.module(*SWITCHES[switch]), batch)) == []
    module = world.module(*SWITCHES[switch])
    module.to_trained[world.never] = 0  # trained on after all: or the test says nothing
    assert same(first, trained(module, world.batch))


def test_weights_of_the_terms(world):
    """Every weight multiplies its own term and no other."""
    keys = dict.fromkeys(("focal", "dice", "classes", "glm", "prototypes"), 3)
    switch = ("clip_zss.glm=1", "clip_zss.pseudo=true", "clip_zss.synthesizer=1")
    plain = world.module(*switch).eval()(world.batch, 0)
    for key, factor in keys.items():
        whole = getattr(ClipZssConfig(glm=1), key) * factor
        found = world.module(*switch, f"clip_zss.{key}={whole}").eval()(world.batch, 0)
        name = "global" if key == "glm" else key
        torch.testing.assert_close(found[name], 3 * plain[name])
        assert all(torch.equal(found[n], plain[n]) for n in plain if n != name)


def test_without_pseudo_labels_it_is_the_baseline(world, monkeypatch):
    """The global module adds its loss alone; slots without a pseudo class add nothing."""
    plain = world.module()(world.batch, 0)
    with_global = world.module("clip_zss.glm=1")(world.batch, 0)
    assert all(torch.equal(plain[name], with_global[name]) for name in PIXELS)

    def nothing(clip: Clip, images: Tensor, *_: Any) -> PseudoLabels:
        count = torch.zeros(len(images), dtype=torch.int64)
        nowhere = torch.full(images[:, 0].shape, -1)
        return PseudoLabels(nowhere, count)

    monkeypatch.setattr(clip_zss_module, "pseudo_labels", nothing)
    for switch in ("centroids", "synthesizer"):
        found = world.module(*SWITCHES[switch], "clip_zss.learn_scale=true")(world.batch, 0)
        for name in PIXELS:
            torch.testing.assert_close(found[name], plain[name])


def test_pseudo_labels_are_asked_for_where_nothing_is_known(world, monkeypatch):
    """Void pixels inside the image; a region found there becomes a channel of its image alone."""
    asked: list[Tensor] = []

    def square(clip: Clip, images: Tensor, truth: Tensor, pads: Any, *_: Any) -> PseudoLabels:
        assert pads is padding
        free = (truth < 0) & ~padding
        asked.append(free)
        labels = torch.where(free, 0, -1)
        labels[1:] = -1
        count = torch.tensor([1, 0, 0, 0, 0, 0])
        return PseudoLabels(labels, count)

    monkeypatch.setattr(clip_zss_module, "pseudo_labels", square)
    module = world.module(*SWITCHES["centroids"])
    padding = torch.zeros_like(world.batch.padding)
    padding[:, 60:] = True
    batch = replace(world.batch, padding=padding)
    batch = replace(batch, segment_map=batch.segment_map.masked_fill(padding, 0))
    fused = module._labels(batch, padding)
    known = label_map(batch.segment_map, world.to_trained[batch.labels]) >= 0
    assert torch.equal(asked[0], ~known & ~padding) and asked[0][0].any()
    seen = len(world.text)
    assert torch.equal(fused.labels[0] == seen, asked[0][0])
    assert torch.equal(fused.labels[1:] >= 0, known[1:])
    assert fused.active[:, :seen].all() and fused.active[:, seen:].sum() == 1
    assert fused.active[0, seen]


def test_maps_of_labels_against_loops():
    generator = torch.Generator().manual_seed(0)
    segments = torch.randint(0, 4, (2, 8, 12), generator=generator, dtype=torch.int32)
    labels = torch.tensor([[5, -1, 2], [0, 7, -1]])
    found = label_map(segments, labels)
    coarse = labels_at(found, (2, 3)).view(2, 2, 3)
    for b in range(2):
        for y in range(8):
            for x in range(12):
                number = int(segments[b, y, x])
                assert found[b, y, x] == (-1 if number == 0 else labels[b, number - 1])
        for y in range(2):
            for x in range(3):
                assert coarse[b, y, x] == found[b, 4 * y + 2, 4 * x + 2]


# --- the bank ---------------------------------------------------------------------------------


def test_own_tokens_are_no_negatives(world):
    """Neither the image's own token nor another view of it, wherever the bank holds one."""
    module = world.module("clip_zss.glm=1", "clip_zss.bank=12")
    ids, batch = world.batch.image_ids, world.batch
    bank_ids = torch.cat((ids, ids + 1000))
    changed = []
    for row in (None, 2, 8):  # a view of image 2 moved; a view of another image moved
        module.bank.tokens.copy_(torch.eye(12, 128))
        if row is not None:
            module.bank.tokens[row] = -torch.ones(128)
        module.bank.groups.copy_(bank_ids)
        module.bank.valid.fill_(True)
        module.eval()  # nothing is pushed, so that all three meet the same bank
        one = replace(
            batch, **{n: getattr(batch, n)[2:3] for n in
                      ("images", "padding", "segment_map", "labels", "image_ids", "indices")},
            file_names=batch.file_names[2:3],
        )  # fmt: skip
        changed.append(float(module(one, 0)["global"].detach()))
    assert changed[0] == changed[1] != changed[2]


def test_each_step_feeds_the_bank_once(world):
    for switch, kept in (("global", 6), ("synthesizer", 6), ("centroids", 0), ("baseline", 0)):
        module = world.module(*SWITCHES[switch], "clip_zss.source=online")
        module(world.batch, 0)
        assert len(module.bank.valid) == kept
        if kept:
            torch.testing.assert_close(
                module.bank.tokens, Teacher(world.clip, 1).images(world.batch)
            )
            assert torch.equal(module.bank.groups, world.batch.image_ids)
        before = module.bank.tokens.clone()
        module.eval()(world.batch)
        assert torch.equal(module.bank.tokens, before)


def test_the_synthesizer_reads_the_bank(world):
    module = world.module("clip_zss.pseudo=true", "clip_zss.synthesizer=1").eval()
    empty = module(world.batch, 0)["prototypes"]
    module.bank.tokens.copy_(torch.eye(6, 128))
    assert torch.equal(module(world.batch, 0)["prototypes"], empty)  # unused rows
    module.bank.valid.fill_(True)
    assert not torch.allclose(module(world.batch, 0)["prototypes"], empty)


# --- several processes --------------------------------------------------------------------------


class Together:
    """Two threads in the place of two processes: `gather_rows` and the like wait for the other."""

    def __init__(self) -> None:
        self.own, self.barrier = threading.local(), threading.Barrier(2, timeout=60)
        self.parts: list[Tensor] = [torch.zeros(0)] * 2

    def gather_rows(self, rows: Tensor) -> Tensor:
        self.parts[self.own.rank] = rows.detach()
        self.barrier.wait()
        both = torch.cat(self.parts) if rows.ndim else torch.stack(self.parts)
        self.barrier.wait()
        return both

    def mean_over_processes(self, value: Tensor) -> Tensor:
        return self.gather_rows(value[None]).mean(0)

    def process_rank(self) -> int:
        return self.own.rank


def test_two_processes_find_the_losses_of_one(world, monkeypatch):
    """Without batch statistics, which are those of a process."""
    batch = world.batch
    halves = [
        replace(
            batch, **{n: getattr(batch, n)[half] for n in
                      ("images", "padding", "segment_map", "labels", "image_ids", "indices")},
            file_names=batch.file_names[half],
        )
        for half in (slice(0, 3), slice(3, 6))
    ]  # fmt: skip
    modules = [world.module(*SWITCHES["all"]) for _ in range(3)]
    for module in modules:
        module.student.eval()
    alone = [modules[2](batch) for _ in range(2)][-1]
    both, found = Together(), [{}, {}]
    for name in ("gather_rows", "mean_over_processes", "process_rank"):
        for user in (contrast, distributed, clip_zss_module):
            monkeypatch.setattr(user, name, getattr(both, name), raising=False)

    def work(rank: int) -> None:
        both.own.rank = rank
        for _ in range(2):
            found[rank] = modules[rank](halves[rank])

    threads = [threading.Thread(target=work, args=(rank,)) for rank in (0, 1)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for name, value in alone.items():
        mean = (found[0][name] + found[1][name]) / 2
        torch.testing.assert_close(mean, value, rtol=1e-4, atol=1e-5)
    for one, two in zip(modules[0].bank.buffers(), modules[2].bank.buffers(), strict=True):
        torch.testing.assert_close(one, two)


# --- the configuration ----------------------------------------------------------------------------


@pytest.mark.parametrize(
    "key",
    ["synthesizer=1", "logit_scale=0", "dropout=1", "temperature=0", "glm=-1", "windows=[4,2]"],
)
def test_impossible_values_are_refused(key):
    with pytest.raises(UserError, match="clip_zss"):
        load_config(None, [f"clip_zss.{key}"])
