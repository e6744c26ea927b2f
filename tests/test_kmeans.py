"""Batched spherical K-Means against a loop, on planted clusters, and at its edges."""

from __future__ import annotations

from itertools import pairwise

import pytest
import torch
import torch.nn.functional as F

from concat_cli.methods.clip_zss.pseudo_labels import kmeans


def unit(*shape, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return F.normalize(torch.randn(*shape, generator=generator), dim=-1)


def random_problem(seed, images=3, tokens=40, seeds=6, width=5):
    """Tokens and seeds, some of them not valid."""
    generator = torch.Generator().manual_seed(seed)
    valid = torch.rand(images, tokens, generator=generator) < 0.7
    there = torch.rand(images, seeds, generator=generator) < 0.8
    starts = unit(images, seeds, width, seed=seed + 100)
    return unit(images, tokens, width, seed=seed), valid, starts, there


def naive(tokens, valid, seeds, there, iterations):
    """One image after the other, one token after the other."""
    assignment = torch.full(valid.shape, -1)
    centroids = seeds.clone()
    for b in range(len(tokens)):
        for step in range(iterations + 1):
            groups = {}
            for t in range(tokens.shape[1]):
                best, at = -2.0, -1
                for s in range(seeds.shape[1]):
                    cosine = float(tokens[b, t] @ centroids[b, s])
                    if valid[b, t] and there[b, s] and cosine > best:
                        best, at = cosine, s
                assignment[b, t] = at
                groups.setdefault(at, []).append(tokens[b, t])
            if step < iterations:
                for s, members in groups.items():
                    if s >= 0:
                        centroids[b, s] = F.normalize(torch.stack(members).mean(0), dim=0)
    return assignment, centroids


@pytest.mark.parametrize("iterations", [0, 1, 4])
def test_it_is_the_loop(iterations):
    problem = random_problem(iterations)
    found = kmeans(*problem, iterations)
    assignment, centroids = naive(*problem, iterations)
    assert torch.equal(found.assignment, assignment)
    torch.testing.assert_close(found.centroids, centroids)
    counted = [[int((row == s).sum()) for s in range(6)] for row in assignment]
    assert found.sizes.tolist() == counted
    assert (found.sizes[~problem[3]] == 0).all() and (assignment[~problem[1]] == -1).all()


def test_planted_clusters_are_found_exactly():
    centres = torch.eye(4).expand(2, 4, 4)
    truth = torch.randint(0, 4, (2, 100), generator=torch.Generator().manual_seed(0))
    noise = 0.1 * unit(2, 100, 4)
    tokens = F.normalize(centres.gather(1, truth[..., None].expand(-1, -1, 4)) + noise, dim=-1)
    first = torch.stack([(truth == k).int().argmax(1) for k in range(4)], 1)
    seeds = tokens.gather(1, first[..., None].expand(-1, -1, 4))  # one token of each
    found = kmeans(tokens, torch.ones(2, 100, dtype=torch.bool), seeds, seeds[..., 0] > -9, 10)
    assert torch.equal(found.assignment, truth)
    assert ((found.centroids * centres).sum(-1) > 0.99).all()


def test_an_image_does_not_depend_on_its_batch_and_runs_repeat():
    problem = random_problem(7, images=4)
    found = kmeans(*problem, 5)
    again = kmeans(*problem, 5)
    assert torch.equal(found.assignment, again.assignment)
    assert torch.equal(found.centroids, again.centroids)
    for b in range(4):
        alone = kmeans(*(part[b : b + 1] for part in problem), 5)
        assert torch.equal(alone.assignment[0], found.assignment[b])


def test_each_step_brings_tokens_nearer_to_their_centroids():
    tokens, valid, seeds, there = random_problem(3, tokens=200)
    there[:] = True
    fits = []
    for iterations in range(6):
        found = kmeans(tokens, valid, seeds, there, iterations)
        own = found.centroids.gather(1, found.assignment.clamp(min=0)[..., None].expand(-1, -1, 5))
        fits.append(float(((tokens * own).sum(-1) * valid).sum()))
    assert all(b >= a - 1e-4 for a, b in pairwise(fits))
    assert fits[-1] > fits[0] + 1


def test_empty_clusters_keep_their_seed():
    tokens = torch.tensor([[[1.0, 0, 0], [0.9, 0.1, 0]]])
    seeds = torch.tensor([[[1.0, 0, 0], [0, 0, -1.0]]])
    valid, there = torch.ones(1, 2, dtype=torch.bool), torch.ones(1, 2, dtype=torch.bool)
    found = kmeans(F.normalize(tokens, dim=-1), valid, seeds, there, 10)
    assert found.sizes.tolist() == [[2, 0]] and found.assignment.tolist() == [[0, 0]]
    assert torch.equal(found.centroids[0, 1], seeds[0, 1])
    assert not torch.equal(found.centroids[0, 0], seeds[0, 0])


@pytest.mark.parametrize("lacking", ["tokens", "seeds"])
def test_without_tokens_or_seeds_nothing_is_assigned(lacking):
    tokens, valid, seeds, there = random_problem(5)
    valid[:], there[:] = True, True
    (valid if lacking == "tokens" else there)[1] = False
    found = kmeans(tokens, valid, seeds, there, 3)
    assert (found.assignment[1] == -1).all() and (found.sizes[1] == 0).all()
    assert torch.equal(found.centroids[1], seeds[1])
    assert (found.assignment[[0, 2]] >= 0).all()
