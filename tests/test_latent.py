"""Latent segments: proposals, their matching and what CLIP says of them, against naive loops."""

from __future__ import annotations

from dataclasses import replace
from itertools import permutations
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from mini import draw_world, mini_config
from torch import Tensor

from concat_cli.core.build import build_segmentor
from concat_cli.core.clip.encoder import load_clip
from concat_cli.core.config_file import load_config
from concat_cli.core.data.dataset import PanopticDataset, read_dataset_info
from concat_cli.core.data.loader import collate
from concat_cli.core.errors import UserError
from concat_cli.core.losses import point_bce, point_dice, sample_at, sample_masks
from concat_cli.core.runs import Run
from concat_cli.core.train.teacher import Teacher, Truth, info_nce, trained_indices
from concat_cli.methods.concat import latent as module
from concat_cli.methods.concat.cat import train_cat
from concat_cli.methods.concat.con import check_latent, train_con
from concat_cli.methods.concat.con_module import ConModule, TokenTargets, WarmupModule
from concat_cli.methods.concat.finetune import finetune
from concat_cli.methods.concat.latent import (
    Latent,
    connected,
    largest,
    latent_of,
    match_apart,
    parted,
)
from concat_cli.methods.concat.latent_bank import evidence, overlap
from concat_cli.methods.concat.latent_config import LatentConfig

QUICK = ("optim.steps=2", "warmup.steps=1", "cat.steps=2", "cat.eval_every=1", "finetune.steps=2")


def flooded(regions: np.ndarray) -> list[set[tuple[int, int]]]:
    """Connected parts of one map, by filling from pixel to pixel."""
    left = {(y, x) for y, x in zip(*np.nonzero(regions >= 0), strict=True)}
    found = []
    while left:
        todo = [left.pop()]
        part = set(todo)
        while todo:
            y, x = todo.pop()
            for near in ((y - 1, x), (y + 1, x), (y, x - 1), (y, x + 1)):
                if near in left and regions[near] == regions[y, x]:
                    left.remove(near)
                    part.add(near)
                    todo.append(near)
        found.append(part)
    return found


def pixels(region: np.ndarray) -> set[tuple[int, int]]:
    return set(zip(*np.nonzero(region), strict=True))


def test_connected_parts_are_those_of_a_flood_fill():
    rng = np.random.default_rng(0)
    maps = torch.as_tensor(rng.integers(-1, 2, (3, 12, 10)))
    for found, wanted in zip(connected(maps).numpy(), maps.numpy(), strict=True):
        numbers = sorted(set(found[found >= 0].tolist()))
        assert numbers == list(range(len(numbers)))
        parts = [pixels(found == n) for n in numbers]
        assert sorted(map(sorted, parts)) == sorted(map(sorted, flooded(wanted)))
    assert (connected(torch.full((1, 4, 4), -1)) == -1).all()


def test_the_largest_regions_become_masks():
    regions = torch.full((2, 4, 5), -1)
    regions[0, 0], regions[0, 1, :2], regions[0, 2, :3], regions[0, 3, :1] = 2, 0, 1, 3
    latent = Latent.of(regions, LatentConfig(most=3, least=0.1))  # two pixels
    assert [int(mask.sum()) for mask in latent.masks[0]] == [5, 3, 2]
    assert latent.labels.tolist() == [[0, 0, 0], [-1, -1, -1]]
    assert torch.equal(latent.masks[0, 0], regions[0] == 2)
    assert Latent.of(regions, LatentConfig(most=2)).labels.tolist() == [[0, 0], [-1, -1]]
    assert Latent.of(regions, LatentConfig(most=9)).masks.shape == (2, 9, 4, 5)
    kept = largest(regions, LatentConfig(most=3, least=0.1))
    assert kept.unique().tolist() == [-1, 0, 1, 2]
    assert all(torch.equal(kept == n, latent.masks[:, n]) for n in range(3))


def test_of_overlapping_masks_the_surest_stay():
    """Against a greedy loop over sets of cells."""
    generator = torch.Generator().manual_seed(0)
    logits = torch.randn(3, 7, 4, 4, generator=generator)
    owner = torch.tensor([[0, 0, 1, 1, -1, 0, 1]]).expand(3, -1)
    cells = torch.randint(0, 2, (3, 4, 4), generator=generator)
    inside = (cells[:, None] == owner[..., None, None]) & (owner >= 0)[..., None, None]
    rank = torch.rand(3, 7, generator=generator)
    found, owners = module._different(logits, owner, inside, rank, 7, 0.3)
    for b in range(3):
        sets = [pixels(((logits[b, s] > 0) & inside[b, s]).numpy()) for s in range(7)]
        kept: list[int] = []
        for s in sorted(range(7), key=lambda s: -float(rank[b, s])):
            clear = all(
                len(sets[s] & sets[k]) <= 0.3 * min(len(sets[s]), len(sets[k])) for k in kept
            )
            if len(sets[s]) > 1 and owner[b, s] >= 0 and clear:
                kept.append(s)
        count = int((owners[b] >= 0).sum())
        assert count == len(kept) > 0
        assert torch.equal(found[b, :count], logits[b, kept])
        assert torch.equal(owners[b, :count], owner[b, kept])


class World:
    """A batch whose scenes show unseen classes without a label, and a random segmentor."""

    def __init__(self, root, *keys: str) -> None:
        self.cfg = mini_config(root, "latent.weight=1", "latent.most=4", "align.crops=4", *keys)
        info = read_dataset_info(root)
        dataset = PanopticDataset(info.part("train"), info.vocabulary)
        shown = [i for i in range(len(dataset)) if (dataset[i].segment_map == 0).mean() > 0.1]
        self.batch = collate([dataset[i] for i in shown[:4]], shown[:4])
        self.to_trained = trained_indices(info.vocabulary.is_seen, torch.device("cpu"))
        self.truth = Truth.of(self.batch, self.to_trained)
        self.clip = load_clip(self.cfg.clip)
        names = info.vocabulary.seen_only().names
        self.text = self.clip.encode_text([f"a photo of a {name}." for name in names])

    @property
    def latent(self) -> LatentConfig:
        return self.cfg.own(LatentConfig)

    def made(self, kind: type[ConModule] | type[WarmupModule], cfg=None):
        torch.manual_seed(0)
        segmentor = build_segmentor(self.cfg.model, self.clip.embed_dim)
        teacher = Teacher(self.clip, self.cfg.align.crops)
        return kind(segmentor, self.text, self.to_trained, cfg or self.cfg, teacher)


@pytest.fixture(scope="module")
def void_world(tmp_path_factory):
    return draw_world(tmp_path_factory.mktemp("void") / "shapes", unseen_pixels="void", seed=3)


@pytest.fixture(scope="module")
def world(void_world) -> World:
    return World(void_world)


class Alike:
    """A decoder whose mask of a query is what has the features it was made of."""

    token_embedding = True

    def masks_of(self, pixel: Tensor, given) -> Tensor:
        weights = given.masks / given.masks.sum((2, 3), keepdim=True).clamp(min=1)
        made = torch.einsum("bmhw,bdhw->bmd", weights, pixel.mask_features)
        return torch.einsum("bmd,bdhw->bmhw", made, pixel.mask_features)


def test_void_is_parted_where_its_masks_are():
    """Three looks in one connected part and one in another, which stay apart though two of them
    are alike; what is too small for a window stays whole."""
    look = torch.zeros(1, 16, 16, dtype=torch.long)
    look[:, :, 6:10], look[:, 10:, 10:] = 1, 2
    features = (10 * torch.nn.functional.one_hot(look, 3) - 5).permute(0, 3, 1, 2).float()
    parts = torch.zeros(1, 64, 64, dtype=torch.long)
    parts[:, :, 56:60] = -1
    parts[:, :, 60:] = 1
    parts[:, 0, 0] = 2
    found = parted(
        parts, Alike(), SimpleNamespace(mask_features=features), LatentConfig(overlap=0.5)
    )
    assert torch.equal(found >= 0, parts >= 0)
    large = look.repeat_interleave(4, 1).repeat_interleave(4, 2)
    wanted = torch.where(parts < 0, -1, 3 * parts + large)
    wanted[:, 0, 0] = 99
    inner = torch.nn.functional.max_pool2d(large.float(), 5, 1, 2)
    inner = inner == -torch.nn.functional.max_pool2d(-large.float(), 5, 1, 2)  # off the borders
    for number in wanted[inner].unique():
        assert len(found[(wanted == number) & inner].unique()) == 1
    assert len(found[inner].unique()) == len(wanted[inner].unique()) == 7


def test_latent_segments_are_void_and_lie_apart(world):
    segmentor = world.made(ConModule).segmentor.eval()
    with torch.no_grad():
        _, pixel = segmentor.features(world.batch.images, None)
    looks = segmentor.query_decoder, pixel
    for latent in (latent_of(world.truth, one, world.latent) for one in (None, looks)):
        assert latent.masks.any() and (latent.masks.sum(1) <= 1).all()
        assert not (latent.masks.any(1) & ~world.truth.void).any()


def test_no_void_no_latent_segment(world):
    seen = replace(world.batch, segment_map=world.batch.segment_map.clamp(min=1))
    latent = latent_of(Truth.of(seen, world.to_trained), None, world.latent)
    assert latent.masks.shape[1] == world.latent.most and not latent.masks.any()


def naive_costs(logits: Tensor, mask: Tensor, coords: Tensor) -> Tensor:
    """5 BCE + 5 dice of one layer's queries (Q, h, w) and one mask (H, W): (Q,)."""
    values = sample_at(logits[None], coords[None])[0]
    wanted = sample_masks(mask[None, None], coords[None])[0].expand_as(values)
    return 5 * point_bce(values, wanted) + 5 * point_dice(values, wanted)


def test_latent_segments_get_the_best_of_the_queries_that_are_left():
    """Against all ways to hand them out."""
    generator = torch.Generator().manual_seed(1)
    layers, images, queries = 2, 3, 5
    logits = 3 * torch.randn(layers, images, queries, 4, 4, generator=generator)
    masks = torch.rand(images, 3, 8, 8, generator=generator) > 0.5
    masks[1, 2] = False
    masks[2] = False
    matched = torch.tensor([[[0, -1], [3, 1], [2, 4]], [[4, 2], [0, -1], [1, 3]]])
    coords = torch.rand(1, 20, 2, generator=generator).expand(images, -1, -1)
    latent = Latent(masks)
    found = match_apart(logits, matched, latent, (5.0, 5.0), coords)
    for layer in range(layers):
        for image in range(images):
            free = [q for q in range(queries) if q not in matched[layer, image].tolist()]
            there = [m for m in range(3) if masks[image, m].any()]
            cost = [naive_costs(logits[layer, image], masks[image, m], coords[0]) for m in there]
            best = min(
                permutations(free, len(there)),
                key=lambda chosen: sum(float(c[q]) for c, q in zip(cost, chosen, strict=True)),
            )
            assert found[layer, image, there].tolist() == list(best)
    assert found[0, 1, 2] == -1 and (found[:, 2] == -1).all()


def test_where_queries_run_out_labelled_segments_keep_theirs():
    logits = torch.randn(1, 1, 3, 4, 4)
    latent = Latent(torch.rand(1, 3, 8, 8) > 0.5)
    coords = torch.rand(1, 10, 2)
    found = match_apart(logits, torch.tensor([[[2, 0]]]), latent, (5.0, 5.0), coords)[0, 0]
    assert sorted(found.tolist()) == [-1, -1, 1]


def test_tokens_that_are_alike_are_no_negatives():
    generator = torch.Generator().manual_seed(2)
    queries, tokens = (torch.randn(5, 6, generator=generator) for _ in range(2))
    tokens[3] = tokens[0] * 2 + 0.01
    valid = torch.tensor([True, True, False, True, True])
    found = info_nce(queries, tokens, valid, 0.5, alike=0.9)
    q, t = (torch.nn.functional.normalize(x, dim=-1) for x in (queries, tokens))
    total = 0.0
    for i in (0, 1, 3, 4):
        others = [j for j in (0, 1, 3, 4) if j == i or float(t[i] @ t[j]) <= 0.9]
        assert len(others) == (3 if i in (0, 3) else 4)
        scores = torch.stack([q[i] @ t[j] / 0.5 for j in others])
        total += float(scores.logsumexp(0) - q[i] @ t[i] / 0.5)
    assert float(found) == pytest.approx(total / 4, rel=1e-5)


def test_latent_segments_have_masks_and_no_class(world, monkeypatch):
    """The queries that hold one have no target in the class loss, and its token is a seed."""
    given = {}
    whole = {name: getattr(module, name) for name in ("match_apart",)}

    from concat_cli.methods.concat import con_module

    def spied(*arguments):
        given["apart"] = whole["match_apart"](*arguments)
        given["latent"] = arguments[2]
        return given["apart"]

    loss = con_module.class_loss

    def heard(logits, matched, labels, no_object, ignore, average):
        given.setdefault("class", (matched, ignore))
        return loss(logits, matched, labels, no_object, ignore, average)

    monkeypatch.setattr(con_module, "match_apart", spied)
    monkeypatch.setattr(con_module, "class_loss", heard)
    con = world.made(ConModule)
    torch.manual_seed(1)
    losses = con(world.batch)
    assert {"latent_mask", "latent_dice", "again_mask", "again_dice"} <= set(losses)
    apart, (matched, ignore) = given["apart"], given["class"]
    layer, image, slot = (apart >= 0).nonzero(as_tuple=True)
    assert len(slot) > 4
    assert ignore[layer, image, apart[layer, image, slot]].all()
    assert not (apart[..., :, None] == matched[..., None, :])[apart >= 0].any()
    latent, size = given["latent"], (4, 4)
    plain = TokenTargets.of(world.truth, size, 0.5)
    more = TokenTargets.of(world.truth, size, 0.5, latent)
    assert (more.seeds >= plain.seeds).all() and more.seeds.sum() > plain.seeds.sum()
    assert torch.equal(more.classes, plain.classes)
    assert more.valid.sum() > plain.valid.sum()


@pytest.mark.parametrize("kind", [ConModule, WarmupModule])
def test_what_latent_segments_add_is_told_and_learned(world, kind):
    cfg = world.cfg.with_own(replace(world.latent, weight=0.0))
    torch.manual_seed(1)
    off = world.made(kind, cfg)(world.batch)
    twice = []
    for weight in (1.0, 2.0):
        made = world.made(kind, world.cfg.with_own(replace(world.latent, weight=weight)))
        torch.manual_seed(1)
        twice.append(made(world.batch))
    added = set(twice[0]) - set(off)
    assert added >= {"again_mask", "again_dice"}
    for name in added:
        assert twice[1][name].item() == pytest.approx(2 * twice[0][name].item(), rel=1e-4)
    sum(value for name, value in twice[1].items() if name in added).backward()
    assert made.segmentor.backbone is not None
    assert any(p.grad is not None and p.grad.any() for p in made.segmentor.backbone.parameters())


def test_learned_queries_take_the_parts_of_void_as_they_are(world):
    keys = ["model.token_queries=false", "loss.denoising=0", "loss.dense=0", "warmup.masks=0"]
    with pytest.raises(UserError, match=r"needs model\.token_queries"):
        check_latent(load_config(None, ["latent.weight=1", *keys]))
    with pytest.raises(UserError, match="published segmentor are frozen"):
        check_latent(load_config(None, ["latent.weight=1", "model.segmentor=somewhere"]))
    keys += ["latent.split=false", "latent.most=4", "latent.weight=1", "align.crops=4"]
    cfg = mini_config(Path(world.cfg.data.root), *keys)
    check_latent(cfg)
    torch.manual_seed(0)
    segmentor = build_segmentor(cfg.model, world.clip.embed_dim)
    teacher = Teacher(world.clip, cfg.align.crops)
    losses = ConModule(segmentor, world.text, world.to_trained, cfg, teacher)(world.batch)
    assert float(losses["latent_dice"].detach()) > 0 and "again_mask" not in losses


# --- what CLIP says of them ---------------------------------------------------------------------


def test_overlap_of_masks_by_the_middle_of_cells():
    large = torch.zeros(1, 2, 8, 8, dtype=torch.bool)
    large[0, 0, :, :4] = True
    small = torch.zeros(1, 2, 4, 4, dtype=torch.bool)
    small[0, 0, :, :3], small[0, 1, 0, 0] = True, True
    assert overlap(small, large).tolist() == [[pytest.approx(8 / 12), 0.0]]


def test_only_sure_names_of_new_classes_are_evidence():
    rng = np.random.default_rng(0)
    text = torch.nn.functional.normalize(torch.randn(6, 4), dim=-1)
    tokens = rng.normal(size=(200, 4)).astype(np.float16)
    tokens /= np.linalg.norm(tokens, axis=1, keepdims=True)
    queries = np.arange(200, dtype=np.float16)[:, None].repeat(3, 1)
    new = torch.tensor([4, 5])
    found = evidence(queries, tokens, text, new, LatentConfig(evidence=0.5, margin=0.1))
    wanted: dict[int, list[int]] = {4: [], 5: []}
    for row, token in enumerate(tokens.astype(np.float32)):
        cosine = sorted(((float(token @ t), k) for k, t in enumerate(text.numpy())), reverse=True)
        if cosine[0][1] in wanted and cosine[0][0] - cosine[1][0] >= 0.1:
            wanted[cosine[0][1]].append(row)
    assert all(wanted.values())
    for name, rows in wanted.items():
        start, count = int(found.starts[name]), int(found.counts[name])
        assert found.queries[start : start + count, 0].int().tolist() == rows
    assert int(found.counts.sum()) == len(found.queries)
    of = torch.tensor([4] * 500 + [5] * 500 + [3] * 100)
    made = torch.full((1100, 3), -1.0)
    mixed = found.mixed(made, of)
    drawn = mixed[:, 0] >= 0
    assert 0.4 < float(drawn[:1000].float().mean()) < 0.6 and not drawn[1000:].any()
    assert (made == -1).all()
    for name in (4, 5):
        assert set(mixed[(of == name) & drawn, 0].int().tolist()) == set(wanted[name])


def test_all_stages_on_a_world_that_shows_what_it_does_not_name(void_world, tmp_path, capsys):
    keys = ("latent.weight=1", "latent.evidence=1", "latent.margin=0", "latent.most=3")
    cfg, run = mini_config(void_world, *QUICK, *keys), Run("shown", tmp_path)
    assert train_con(cfg, run).finished and train_cat(cfg, run).finished
    with_all = finetune(cfg, run)
    classes = np.load(run.path / "bank" / "latent" / "classes.npy")
    assert classes.shape == (24, 3) and set(np.unique(classes)) <= {-1, 0}
    again = finetune(cfg, run, fresh=True)
    assert again.weights.read_bytes()[-4096:] == with_all.weights.read_bytes()[-4096:]
