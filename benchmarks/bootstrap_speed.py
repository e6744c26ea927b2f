"""How long 95% intervals of PQ and mIoU take, against a loop that sums the drawn images anew.

    python benchmarks/bootstrap_speed.py
    python benchmarks/bootstrap_speed.py --images 2000 --classes 171 --repeats 1000

The counts are made up, as many a COCO image has them: 8 classes with segments, 20 with pixels. The
loop is what one writes first: draw image numbers, add up their counts, compute the figures. It runs
a few times only, and its time is taken as proportional.
"""

from __future__ import annotations

import argparse
import resource
import time
from collections.abc import Sequence

import numpy as np

from concat_cli.core.evaluate.intervals import ImageCounts, bootstrap, harmonic, mean_iou, mean_pq
from concat_cli.core.vocabulary import ClassEntry, Vocabulary

LOOPS = 5


def made_up(images: int, classes: int, seed: int = 0) -> ImageCounts:
    """Counts of images in which a few of the classes occur."""
    rng = np.random.default_rng(seed)
    panoptic, semantic = (np.zeros((images, columns, classes)) for columns in (4, 3))
    for image in range(images):
        there = rng.choice(classes, 8, replace=False)
        tp = rng.integers(0, 3, 8)
        panoptic[image, :, there] = np.array(
            [0.8 * tp, tp, rng.integers(0, 2, 8), rng.integers(0, 2, 8)]
        ).T
        there = rng.choice(classes, 20, replace=False)
        truth = rng.integers(1000, 30_000, 20)
        semantic[image, :, there] = np.array([truth // 2, truth, truth]).T
    return ImageCounts(images, panoptic, semantic)


def loop(counts: ImageCounts, vocabulary: Vocabulary, repeats: int) -> list[list[float]]:
    """The same figures, one draw after the other."""
    assert counts.panoptic is not None and counts.semantic is not None
    rng = np.random.default_rng(0)
    seen, unseen = vocabulary.seen_indices, vocabulary.unseen_indices
    rows: list[list[float]] = []
    for _ in range(repeats):
        drawn = rng.integers(0, counts.images, counts.images)
        row: list[float] = []
        for values, mean in zip(
            (counts.panoptic, counts.semantic), (mean_pq, mean_iou), strict=True
        ):
            total = values[drawn].sum(0)
            parts = [mean(total, classes) for classes in (range(len(vocabulary)), seen, unseen)]
            row += [float(one) for one in (*parts, harmonic(parts[1], parts[2]))]
        rows.append(row)
    return rows


def main(words: Sequence[str] | None = None) -> None:
    """Prints both times, their ratio, and the memory."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("--images", type=int, default=5000)
    parser.add_argument("--classes", type=int, default=133)
    parser.add_argument("--repeats", type=int, default=1000)
    args = parser.parse_args(words)
    rows = (ClassEntry(f"class {i}", i, seen=i % 10 > 0) for i in range(args.classes))
    vocabulary = Vocabulary(tuple(rows))
    counts = made_up(args.images, args.classes)
    assert counts.panoptic is not None and counts.semantic is not None
    kept = (counts.panoptic.nbytes + counts.semantic.nbytes) / 2**20
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    start = time.perf_counter()
    found = bootstrap(counts, vocabulary, args.repeats)
    ours = time.perf_counter() - start
    peak = (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) / 2**10
    start = time.perf_counter()
    loop(counts, vocabulary, LOOPS)
    theirs = (time.perf_counter() - start) * args.repeats / LOOPS
    print(f"{args.images} images x {args.classes} classes x {args.repeats} draws, PQ and mIoU")
    print(f"counts kept: {kept:.1f} MiB; peak memory on top while drawing: {peak:.0f} MiB")
    print(f"matrix product {ours:.2f} s; loop {theirs:.1f} s (from {LOOPS} draws)")
    print(f"{theirs / ours:.1f} times as fast")
    assert found.pq["harmonic"] is not None and found.miou["harmonic"] is not None


if __name__ == "__main__":
    main()
