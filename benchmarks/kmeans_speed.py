"""Batched spherical K-Means of CLIP tokens against a loop over images.

    python benchmarks/kmeans_speed.py
    python benchmarks/kmeans_speed.py --device cuda --images 16 --side 32

Sizes are those of a training batch of CLIP-ZSS with ViT-B/16 at 512 pixels: 1024 tokens of 512
numbers an image, started from 4 + 16 + 64 window means. The peer is scikit-learn's KMeans where it
is installed (same starts, at most as many steps; it clusters by distance, on the CPU, and stops
where nothing changes, while ours never waits for the device to ask), else a loop over images and
clusters in torch, which gives the same clusters. The figure is the median of the ratios of
interleaved pairs (ours / theirs).
"""

from __future__ import annotations

import argparse
import importlib
import importlib.util
import statistics
import time
from collections.abc import Callable, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from concat_cli.methods.clip_zss.pseudo_labels import kmeans, window_seeds

WINDOWS = (2, 4, 8)


def made_up(images: int, side: int, width: int, device: str) -> tuple[Tensor, Tensor]:
    """Tokens (B, T, E) and seeds (B, S, E): blurred noise, so that neighbours are alike."""
    torch.manual_seed(0)  # pyright: ignore[reportUnknownMemberType]
    noise = F.avg_pool2d(torch.randn(images, width, side, side), 5, 1, 2)
    tokens = F.normalize(noise.permute(0, 2, 3, 1), dim=-1).to(device)
    valid = torch.ones(images, side, side, dtype=torch.bool, device=device)
    seeds = torch.cat([window_seeds(tokens, valid, count)[0] for count in WINDOWS], 1)
    return tokens.flatten(1, 2), seeds


def torch_loop(tokens: Tensor, seeds: Tensor, iterations: int) -> list[Tensor]:
    """What one writes first: image by image, cluster by cluster."""
    found: list[Tensor] = []
    for image, centroids in zip(tokens, seeds.clone(), strict=True):
        for _ in range(iterations):
            nearest = (image @ centroids.T).argmax(1)
            for s in range(len(centroids)):
                members = image[nearest == s]
                if len(members):
                    centroids[s] = F.normalize(members.mean(0), dim=0)
        found.append((image @ centroids.T).argmax(1))
    return found


def sklearn_loop(tokens: Tensor, seeds: Tensor, iterations: int) -> list[Tensor]:
    """scikit-learn, image by image."""
    make = importlib.import_module("sklearn.cluster").KMeans
    found: list[Tensor] = []
    for image, start in zip(tokens.cpu().numpy(), seeds.cpu().numpy(), strict=True):
        model = make(len(start), init=start, n_init=1, max_iter=iterations, tol=0)
        found.append(torch.as_tensor(model.fit_predict(image)))
    return found


def seconds(run: Callable[[], object]) -> float:
    """Wall time of one run, with the GPU's work finished."""
    start = time.perf_counter()
    run()
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    return time.perf_counter() - start


def main(words: Sequence[str] | None = None) -> None:
    """Prints both times and their ratio."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("--images", type=int, default=16)
    parser.add_argument("--side", type=int, default=32, help="tokens along a side")
    parser.add_argument("--width", type=int, default=512)
    parser.add_argument("--iterations", type=int, default=10)
    parser.add_argument("--pairs", type=int, default=5)
    parser.add_argument("--device", default="cpu")
    args = parser.parse_args(words)
    tokens, seeds = made_up(args.images, args.side, args.width, args.device)
    valid, there = (x.new_ones(x.shape[:2], dtype=torch.bool) for x in (tokens, seeds))
    known = importlib.util.find_spec("sklearn") is not None
    peer, name = (sklearn_loop, "scikit-learn") if known else (torch_loop, "a loop in torch")

    found = kmeans(tokens, valid, seeds, there, args.iterations).assignment
    same = torch.stack(torch_loop(tokens, seeds, args.iterations)) == found
    assert same.float().mean() > 0.999, "the loop finds other clusters"
    pairs = [
        (
            seconds(lambda: kmeans(tokens, valid, seeds, there, args.iterations)),
            seconds(lambda: peer(tokens, seeds, args.iterations)),
        )
        for _ in range(args.pairs)
    ]
    ratio = statistics.median(ours / theirs for ours, theirs in pairs)
    ours, theirs = (statistics.median(times) for times in zip(*pairs, strict=True))
    print(f"{len(tokens)} images x {tokens.shape[1]} tokens x {tokens.shape[2]}, {args.device}")
    print(f"{seeds.shape[1]} seeds, {args.iterations} steps, {torch.get_num_threads()} threads")
    print(f"batched {ours * 1e3:.0f} ms; {name} {theirs * 1e3:.0f} ms")
    print(f"ours / theirs: {ratio:.2f}")


if __name__ == "__main__":
    main()
