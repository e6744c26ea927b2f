"""Pseudo labels: against loops over tokens and clusters, on planted regions, on drawn scenes."""

from __future__ import annotations

import itertools
from dataclasses import replace

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from concat_cli.core.clip.encoder import load_clip
from concat_cli.core.config import ClipConfig
from concat_cli.core.infer.render import enlarged
from concat_cli.core.prepare.shapes_scene import draw_scene, scene_seed
from concat_cli.methods.clip_zss.config import ClipZssConfig
from concat_cli.methods.clip_zss.pseudo_labels import (
    PseudoLabels,
    cluster_tokens,
    fuse,
    kmeans,
    merge,
    pseudo_labels,
    window_seeds,
)
from concat_cli.methods.clip_zss.train import CAPTIONS, label_drawing, preview_row

PLAIN = ClipZssConfig(windows=(2, 4), iterations=3, merge=0.6, min_share=0.0)


def unit(*shape, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return F.normalize(torch.randn(*shape, generator=generator), dim=-1)


def random_problem(seed=0, images=3, side=8, width=4):
    """Blurred random tokens, a truth of patches, and pads below the last image."""
    tokens = unit(images, width, side, side, seed=seed)
    tokens = F.avg_pool2d(tokens, 3, 1, 1).permute(0, 2, 3, 1)
    generator = torch.Generator().manual_seed(seed)
    truth = torch.randint(-2, 3, (images, side // 2, side // 2), generator=generator)
    truth = truth.clamp(min=-1).repeat_interleave(2, 1).repeat_interleave(2, 2)
    padding = torch.zeros(images, side, side, dtype=torch.bool)
    padding[-1, side - 2 :] = True
    return F.normalize(tokens, dim=-1), truth, padding


def naive_merge(centroids, sizes, threshold):
    """Greedy from large to small, for one image; the groups in order."""
    unused = [s for s in np.argsort(-sizes.numpy(), kind="stable").tolist() if sizes[s] > 0]
    groups = []
    while unused:
        first = unused[0]
        cosines = {s: float(centroids[first] @ centroids[s]) for s in unused}
        group = [s for s in unused if s == first or cosines[s] > threshold]
        groups.append(group)
        unused = [s for s in unused if s not in group]
    return groups


def naive_labels(tokens, truth, padding, cfg):
    """One image, one token a pixel: labels (h, w) as a loop gives them, and how many."""
    side, width = tokens.shape[0], tokens.shape[-1]
    view = ~padding
    if cfg.centre:
        tokens = F.normalize(tokens - tokens[view].mean(0), dim=-1)
    valid = (truth < 0) & view
    centroids, sizes, assigned = [], [], []
    for count in cfg.windows:
        step, seeds, there = side // count, [], []
        for y in range(0, side, step):
            for x in range(0, side, step):
                inside = valid[y : y + step, x : x + step]
                block = tokens[y : y + step, x : x + step][inside]
                there.append(len(block) > 0)
                seeds.append(block.mean(0) if len(block) else torch.zeros(width))
        found = kmeans(
            tokens.reshape(1, -1, width),
            valid.reshape(1, -1),
            F.normalize(torch.stack(seeds), dim=-1)[None],
            torch.tensor(there)[None],
            cfg.iterations,
        )
        assigned.append(found.assignment[0] + len(sizes))
        centroids.extend(found.centroids[0])
        sizes.extend(found.sizes[0].tolist())
    groups = naive_merge(torch.stack(centroids), torch.tensor(sizes), cfg.merge)
    group_of = {s: g for g, group in enumerate(groups) for s in group}
    regions = {}
    for t in valid.flatten().nonzero().flatten().tolist():
        mine = [group_of[int(scale[t])] for scale in assigned]
        best = max(range(len(mine)), key=lambda r: (mine.count(mine[r]), r))
        regions.setdefault(mine[best], []).append(t)
    least = cfg.min_share * int(view.sum())
    # of equal areas, the region whose largest cluster comes first
    kept = [g for g in sorted(regions, key=lambda g: groups[g][0]) if len(regions[g]) >= least]
    kept = sorted(kept, key=lambda g: -len(regions[g]))[: cfg.most]
    labels = torch.full((side * side,), -1)
    for k, g in enumerate(kept):
        labels[regions[g]] = k
    return labels.reshape(side, side), len(kept)


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"windows": (1, 2, 4), "merge": 0.3},
        {"centre": True, "iterations": 0},
        {"min_share": 0.05},
        {"most": 2, "merge": 0.9},
    ],
)
def test_it_is_the_loop(changes):
    cfg = replace(PLAIN, **changes)
    tokens, truth, padding = random_problem(len(changes))
    found = cluster_tokens(tokens, truth, padding, cfg)
    for b in range(len(tokens)):
        labels, count = naive_labels(tokens[b], truth[b], padding[b], cfg)
        assert torch.equal(found.labels[b], labels)
        assert found.count[b] == count == labels.max() + 1
    assert (found.labels[(truth >= 0) | padding] == -1).all()


def test_seeds_are_means_of_the_valid_tokens_in_windows():
    tokens, valid = unit(2, 6, 6, 5), torch.rand(2, 6, 6) < 0.3
    valid[0, :2, 2:4] = False
    seeds, there = window_seeds(tokens, valid, 3)
    assert seeds.shape == (2, 9, 5) and not there[0, 1]
    for b in range(2):
        for n in range(9):
            y, x = 2 * (n // 3), 2 * (n % 3)
            block = tokens[b, y : y + 2, x : x + 2][valid[b, y : y + 2, x : x + 2]]
            assert there[b, n] == (len(block) > 0)
            expected = F.normalize(block.sum(0), dim=0)
            torch.testing.assert_close(seeds[b, n], expected)
    assert window_seeds(tokens, valid, 8)[0].shape == (2, 36, 5)  # not more than tokens


def test_windows_may_overlap():
    tokens, valid = unit(2, 6, 7, 5), torch.rand(2, 6, 7) < 0.7
    seeds, there = window_seeds(tokens, valid, 3, 0.9)  # windows of 2 x 3, one or two apart
    rows, columns = range(5), range(0, 5, 2)
    assert seeds.shape == (2, len(rows) * len(columns), 5)
    for b in range(2):
        for n, (y, x) in enumerate((y, x) for y in rows for x in columns):
            block = tokens[b, y : y + 2, x : x + 3][valid[b, y : y + 2, x : x + 3]]
            assert there[b, n] == (len(block) > 0)
            torch.testing.assert_close(seeds[b, n], F.normalize(block.sum(0), dim=0))


@pytest.mark.parametrize("least", [0.25, 0.5, 1.0])
def test_a_token_is_unannotated_from_a_share_of_its_pixels_on(least):
    tokens = unit(1, 2, 2, 4)
    truth = torch.zeros(1, 8, 8, dtype=torch.int64)
    for token, rows in enumerate((0, 1, 2, 4)):  # of 4, without a label
        y, x = 4 * (token // 2), 4 * (token % 2)
        truth[0, y : y + rows, x : x + 4] = -1
    cfg = ClipZssConfig(windows=(2,), covered=least, merge=1.0, min_share=0.0)
    found = cluster_tokens(tokens, truth, None, cfg)
    assert found.count.tolist() == [sum(share >= least for share in (0, 0.25, 0.5, 1.0))]


@pytest.mark.parametrize("threshold", [-1.0, 0.2, 0.7, 1.1])
def test_merging_is_greedy_from_large_to_small(threshold):
    centroids = unit(4, 12, 3)
    sizes = torch.randint(0, 5, (4, 12), generator=torch.Generator().manual_seed(1))
    leader = merge(centroids, sizes, threshold)
    assert torch.equal(leader < 0, sizes == 0)
    for b in range(4):
        groups = naive_merge(centroids[b], sizes[b], threshold)
        for group in groups:
            assert {int(leader[b, s]) for s in group} == {group[0]}
        if threshold > 1:
            assert all(len(group) == 1 for group in groups)


def planted(noise=0.0):
    """Left annotated; right: 24 tokens of one kind above, 8 of another below; 4 pixels a token."""
    kinds = torch.eye(3)
    tokens = kinds[0].repeat(8, 8, 1)
    tokens[:6, 4:], tokens[6:, 4:] = kinds[1], kinds[2]
    tokens = F.normalize(tokens + noise * unit(8, 8, 3), dim=-1)[None]
    truth = torch.full((1, 16, 16), -1)
    truth[:, :, :8] = 5
    return tokens, truth


@pytest.mark.parametrize("noise", [0.0, 0.2])
def test_planted_regions_are_found_and_fused(noise):
    tokens, truth = planted(noise)
    found = cluster_tokens(tokens, truth, None, PLAIN)
    expected = torch.full((1, 16, 16), -1)
    expected[:, :12, 8:], expected[:, 12:, 8:] = 0, 1  # the larger first
    assert torch.equal(found.labels, expected) and found.count.tolist() == [2]
    fused = fuse(truth, found, classes=9)
    assert torch.equal(fused, torch.where(truth >= 0, truth, expected + 9))


def test_small_regions_and_those_beyond_the_most_are_dropped():
    tokens, truth = planted()
    small = cluster_tokens(tokens, truth, None, replace(PLAIN, min_share=0.2))  # 8 of 64 tokens
    one = cluster_tokens(tokens, truth, None, replace(PLAIN, most=1))
    for found in (small, one):
        assert found.count.tolist() == [1]
        assert (found.labels[:, :12, 8:] == 0).all()
    padding = torch.zeros_like(truth, dtype=torch.bool)
    padding[:, :, :8] = True  # 8 of 32 tokens of the view
    assert cluster_tokens(tokens, truth, padding, replace(PLAIN, min_share=0.2)).count == 2


def test_centring_tells_apart_what_a_common_part_makes_alike():
    tokens, truth = planted()
    common = F.normalize(torch.ones(3), dim=0)
    alike = F.normalize(tokens + 5 * common, dim=-1)
    assert (alike @ common).min() > 0.95
    together = cluster_tokens(alike, truth, None, PLAIN)
    apart = cluster_tokens(alike, truth, None, replace(PLAIN, centre=True))
    assert together.count.tolist() == [1] and apart.count.tolist() == [2]
    assert torch.equal(apart.labels, cluster_tokens(tokens, truth, None, PLAIN).labels)


def test_an_image_does_not_depend_on_its_batch():
    tokens, truth, padding = random_problem(4, images=4)
    found = cluster_tokens(tokens, truth, padding, PLAIN)
    for b in range(4):
        one = slice(b, b + 1)
        alone = cluster_tokens(tokens[one], truth[one], padding[one], PLAIN)
        assert torch.equal(alone.labels[0], found.labels[b])


def test_without_unannotated_pixels_there_is_nothing():
    tokens, truth, padding = random_problem(5)
    truth[0], padding[1] = 1, True
    found = cluster_tokens(tokens, truth, padding, ClipZssConfig())
    assert found.count[:2].tolist() == [0, 0] and found.count[2] > 0
    assert (found.labels[:2] == -1).all()


def test_fused_labels_by_hand():
    truth = torch.tensor([[[0, 4, -1, -1]]])
    pseudo = PseudoLabels(torch.tensor([[[-1, 1, 1, -1]]]), torch.tensor([2]))
    assert fuse(truth, pseudo, 7).tolist() == [[[0, 4, 8, -1]]]


@pytest.fixture(scope="module")
def scenes():
    """Drawn scenes, half of whose classes are hidden: images, truth, the hidden classes."""
    drawn = [draw_scene(scene_seed("train", 7, i)) for i in range(5)]
    images = torch.stack([torch.from_numpy(scene.image).permute(2, 0, 1) for scene in drawn])
    classes = np.stack([scene.labels[scene.segment_map - 1] for scene in drawn])
    hidden = np.where(classes % 2 == 1, classes, -1)
    truth = np.where(classes % 2 == 1, -1, classes)
    return images, torch.from_numpy(truth), torch.from_numpy(hidden)


def best_overlaps(labels, hidden):
    """The greatest IoU of any region with each hidden class of an image, averaged."""
    found = []
    for made, held in zip(labels, hidden, strict=True):
        for k in held[held >= 0].unique():
            regions = [made == n for n in range(int(made.max()) + 1)]
            ious = [float(((held == k) & r).sum() / ((held == k) | r).sum()) for r in regions]
            found.append(max(ious, default=0.0))
    return float(np.mean(found))


def test_hidden_classes_of_drawn_scenes_are_found(scenes):
    images, truth, hidden = scenes
    clip = load_clip(ClipConfig())
    found = pseudo_labels(clip, images, truth, None, ClipZssConfig(dense_size=192))
    together = torch.where(hidden >= 0, 0, -1)  # the whole void as one region
    assert best_overlaps(found.labels, hidden) > best_overlaps(together, hidden) + 0.15


def test_a_row_of_the_preview(scenes):
    images, truth, _ = scenes
    image, known = images[0].permute(1, 2, 0).numpy(), truth[0].numpy()
    fused = np.where(known < 0, 50, known)
    names = [f"class {k}" for k in range(48)]
    row = preview_row(image, known, fused, names)
    assert len(row) == len(CAPTIONS)
    shown = [np.array(picture) for picture in row]
    assert all(not np.array_equal(a, b) for a, b in itertools.combinations(shown, 2))
    drawing = label_drawing(fused, names)
    assert {mark.name for mark in drawing.marks} >= {"#3"}
    assert {mark.id for mark in drawing.marks} == set(np.unique(drawing.segment_map).tolist())
    nothing = label_drawing(np.full((128, 128), -1), names)
    assert not nothing.marks and not (nothing.segment_map).any()
    assert np.array_equal(shown[0], enlarged(image, 4))
