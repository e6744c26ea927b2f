"""What it costs to name borrowed masks: a Mask2Former with Swin-T and 100 queries, and a CLIP.

Their weights are random. One 640x480 photo, all of whose masks are named. Each ratio is the median
of interleaved pairs with its quartiles; nothing is read from a network. Random masks lie all alike,
so that rectangles of all sizes are planted in their place, the same for all.

- pooling / naive: the whole of ours against transformers' segmentor and open_clip with one pass a
  crop, both from the photo to the masks' scores.
- whole / parts: ours, from the photo to the panoptic map, against its segmentor and one CLIP pass.
- 1,000 names / 100: ours with texts cached.
- memory: the peak of a process that names one photo of 12 megapixels, texts cached.

    OMP_WAIT_POLICY=PASSIVE python benchmarks/photos_speed.py --pairs 7 --threads 2
"""

from __future__ import annotations

import argparse
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any, cast
from unittest.mock import patch

import numpy as np
import torch
import torch.nn.functional as F
import transformers
from pairs import verdict
from torch import Tensor

from concat_cli.core.config import ClipConfig
from concat_cli.core.evaluate.cost import resident
from concat_cli.core.infer.predictor import Loading, Predictor
from concat_cli.core.segmentors import Proposals
from concat_cli.core.segmentors.source import open_frozen
from concat_cli.core.vocabulary import Vocabulary
from concat_cli.methods.borrowed.predictor import BorrowedPredictor
from concat_cli.methods.borrowed.weights import pair

PHOTO, LARGE = (480, 640), (3000, 4000)
QUERIES, OWN = 100, 133
MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
RATIOS = {"pooling / naive": 0.2, "whole / parts": 1.15, "1,000 names / 100": 1.05}
MEMORY = 2.5e9


def publish(folder: Path) -> None:
    """Writes a random Mask2Former with Swin-T as transformers publishes it."""
    swin = cast("Any", transformers.SwinConfig)(
        embed_dim=96, depths=[2, 2, 6, 2], num_heads=[3, 6, 12, 24], window_size=7,
        out_features=[f"stage{i}" for i in range(1, 5)],
    )  # fmt: skip
    config = transformers.Mask2FormerConfig(backbone_config=swin, num_queries=QUERIES)
    config.num_labels = OWN
    torch.manual_seed(0)  # pyright: ignore[reportUnknownMemberType]
    model: Any = transformers.Mask2FormerForUniversalSegmentation(config)
    model.save_pretrained(folder)


def names(count: int) -> list[str]:
    """That many made-up names, a third of them stuff."""
    return [f"thing {n}" if n % 3 else f"ground {n} : stuff" for n in range(count)]


def random_texts(
    loading: Loading, templates: tuple[str, ...] = (), vocabulary: Vocabulary | None = None
) -> Tensor:
    """In the place of the cache: 14 texts a name take the CPU minutes, once."""
    width = loading.clip(image_tower=True).embed_dim
    return F.normalize(torch.randn(len(vocabulary or loading.vocabulary), width), dim=-1)


def planted(masks: Tensor) -> Tensor:
    """Mask logits (B, Q, h, w) of rectangles from a hundredth of the picture to all of it."""
    generator = torch.Generator().manual_seed(0)
    count, (h, w) = masks.shape[1], masks.shape[2:]
    sides = 0.1 + 0.9 * torch.rand(count, 2, generator=generator) ** 2
    starts = torch.rand(count, 2, generator=generator) * (1 - sides)
    y, x = ((torch.arange(n) + 0.5) / n for n in (h, w))
    rows = (y > starts[:, :1]) & (y < (starts + sides)[:, :1])
    columns = (x > starts[:, 1:]) & (x < (starts + sides)[:, 1:])
    inside = rows[:, :, None] & columns[:, None]
    return torch.where(inside, 4.0, -4.0).expand(len(masks), -1, -1, -1)


def open_ours(folder: Path, clip: str, count: int, size: tuple[int, int]) -> BorrowedPredictor:
    """Our predictor of the pair; the photo keeps its size."""
    weights = pair(open_frozen(str(folder)), ClipConfig(clip, "random", "vild"))
    keys = [f"infer.size={min(size)}", f"infer.max_size={max(size)}", "borrowed.min_object=0.0"]
    found = Predictor.load(weights, names(count), "cpu", overrides=keys)
    assert isinstance(found, BorrowedPredictor)
    forward = found.segmentor.forward

    def with_planted(images: Tensor, padding: Tensor | None) -> Proposals:
        said = forward(images, padding)
        return replace(said, mask_logits=planted(said.mask_logits))

    found.segmentor.forward = with_planted
    return found


def naive_pipeline(folder: Path, ours: BorrowedPredictor) -> Callable[[np.ndarray], Tensor]:
    """transformers, then each mask's box cut out and shown to open_clip: (Q, K) scores."""
    load = cast("Any", transformers.Mask2FormerForUniversalSegmentation).from_pretrained
    theirs, clip = load(folder).eval(), ours.naming.clip
    mean, std = (torch.tensor(values).view(3, 1, 1) for values in (MEAN, STD))
    size = (clip.image_size, clip.image_size)

    @torch.inference_mode()
    def run(photo: np.ndarray) -> Tensor:
        image = torch.tensor(photo).permute(2, 0, 1)[None] / 255
        masks = planted(theirs((image - mean) / std).masks_queries_logits)
        masks = F.interpolate(masks, image.shape[2:], mode="bilinear")[0] > 0
        rows: list[Tensor] = []
        for mask in masks:
            y, x = mask.any(1).nonzero()[:, 0], mask.any(0).nonzero()[:, 0]
            crop = (image * mask)[..., y[0] : y[-1] + 1, x[0] : x[-1] + 1]
            crop = F.interpolate(crop, size, mode="bicubic", antialias=True)
            rows.append(F.normalize(clip.model.encode_image(clip.normalise(crop)), dim=-1)[0])
        return (clip.logit_scale * torch.stack(rows) @ ours.names.T).softmax(-1)

    return run


def parts_of(ours: BorrowedPredictor) -> Callable[[np.ndarray], None]:
    """The segmentor, and one pass of CLIP over the picture."""
    clip, segmentor = ours.naming.clip, ours.segmentor

    @torch.inference_mode()
    def run(photo: np.ndarray) -> None:
        image = torch.tensor(photo).permute(2, 0, 1)[None]
        segmentor(image, None)
        clip.encode_image(image / 255)

    return run


def seconds(run: Callable[[], object]) -> float:
    """Wall time of one call."""
    start = time.perf_counter()
    run()
    return time.perf_counter() - start


def ratio(name: str, one: Callable[[], object], other: Callable[[], object], pairs: int) -> str:
    """A line with both medians and the median of the paired ratios, after one call to warm up."""
    seconds(one)
    seconds(other)
    times = [(seconds(one), seconds(other)) for _ in range(pairs)]
    a, b = (statistics.median(column) for column in zip(*times, strict=True))
    print(f"{name}: {a:.3f} s against {b:.3f} s, {pairs} pairs", flush=True)
    return f"{name}: {verdict([a / b for a, b in times], RATIOS[name])}"


def peak(folder: Path, options: argparse.Namespace) -> str:
    """The peak memory of a process of its own with one large photo."""
    command = [sys.executable, __file__, "--folder", str(folder), "--clip", options.clip]
    command += ["--threads", str(options.threads), "--large"]
    said = subprocess.run(command, check=True, capture_output=True, text=True).stdout
    most = int(said.split()[-1])
    met = "met" if most <= MEMORY else "MISSED"
    return f"memory of a 12-megapixel photo: {most / 1e9:.2f} GB, <= {MEMORY / 1e9:.1f}: {met}"


def name_large(options: argparse.Namespace) -> None:
    """What the process of `peak` does: as `concat predict` sizes a photo."""
    ours = open_ours(options.folder, options.clip, 100, (800, 1333))
    photo = np.random.default_rng(0).integers(0, 256, (*LARGE, 3), dtype=np.uint8)
    found = ours(photo, semantic=False)
    most = resident(
        "VmHWM"
    )  # getrusage's peak begins with that of the process that forked this one
    print(len(found.segments), int((most or 0) * 2**20))


def measure(folder: Path, options: argparse.Namespace) -> None:
    """Prints all ratios, last."""
    publish(folder)
    photo = np.random.default_rng(0).integers(0, 256, (*PHOTO, 3), dtype=np.uint8)
    ours = open_ours(folder, options.clip, 100, PHOTO)
    many = open_ours(folder, options.clip, 1000, PHOTO)
    naive, parts = naive_pipeline(folder, ours), parts_of(ours)
    lines = [peak(folder, options)]

    def run(predictor: BorrowedPredictor = ours) -> object:
        return predictor(photo, semantic=False)

    (raw,) = ours.raw([photo])
    sent = int((ours.probabilities(cast("Any", raw), 0.0)[..., -1] == 0).sum())
    print(f"{sent} masks named, {torch.get_num_threads()} threads, torch {torch.__version__}")
    lines.append(ratio("whole / parts", run, lambda: parts(photo), options.pairs))
    lines.append(ratio("1,000 names / 100", lambda: run(many), run, options.pairs))
    lines.append(ratio("pooling / naive", run, lambda: naive(photo), options.pairs))
    print("\n".join(lines))


def main() -> None:
    """Parses the arguments and measures."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("--pairs", type=int, default=7)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--clip", default="ViT-B-16")
    parser.add_argument("--folder", type=Path, help="used by the process that measures memory")
    parser.add_argument("--large", action="store_true", help="be that process")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    with patch.object(Loading, "text", random_texts):
        if options.large:
            return name_large(options)
        with tempfile.TemporaryDirectory() as folder:
            measure(Path(folder), options)


if __name__ == "__main__":
    main()
