"""What a picture costs at test: CONCAT, which needs no image encoder of CLIP, against ZegFormer.

From a uint8 image to its semantic map, everything counted: resizing, segmentor, the crops and
CLIP's image encoder for ZegFormer, fusion, map. ZegFormer shows CLIP one crop for each segment, so
its cost is a curve over their number: the curve is measured in one run with interleaved repeats,
and the figures are medians and quartiles of the paired ratios ZegFormer / CONCAT. All weights are
random, and masks are planted boxes, so that every crop is one. Text embeddings are made once for
both and not counted. fp32 on a CPU; on CUDA the best the GPU has, CLIP in fp16.

    python benchmarks/inference_cost.py --threads 2 --repeats 5 --out inference_cost.json
    python benchmarks/inference_cost.py --segmentor maskformer      # ZegFormer's own, published
    python benchmarks/inference_cost.py --device cuda --repeats 30

On a machine that others use too, set OMP_WAIT_POLICY=PASSIVE, or take the seconds of the processor
on one thread: --threads 1 --clock cpu.
Target: CONCAT is faster at every point, and at least twice as fast from 10 crops on.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from concat_cli.core.build import build_segmentor
from concat_cli.core.clip.encoder import Clip, load_clip
from concat_cli.core.config import ClipConfig, Config, InferConfig
from concat_cli.core.config_file import load_config
from concat_cli.core.device import choose_device, choose_precision
from concat_cli.core.infer.predictor import Predictor, RawOutput
from concat_cli.core.vocabulary import ClassEntry, Vocabulary
from concat_cli.methods.zegformer.config import ZegFormerConfig
from concat_cli.methods.zegformer.maskformer import build_zegformer
from concat_cli.methods.zegformer.predictor import ZegFormerPredictor

CONFIG = Path(__file__).parents[1] / "configs" / "concat_coco_stuff_156_15.yaml"
CLASSES, UNSEEN = 171, 15  # of that configuration
# COCO's panoptic truth: 1.3 million masks in 118 thousand images (COCONut, Deng et al., CVPR 2024)
SEGMENTS = 11
Clock = Callable[[], float]
CLOCKS: dict[str, Clock] = {"wall": time.perf_counter, "cpu": time.process_time}
TARGET, FROM = 2.0, 10  # times as fast, from so many crops on


class Boxes(nn.Module):
    """A segmentor whose masks are boxes, each query's with sides of 20-60% of the picture."""

    masks: Tensor  # (Q, h, w) logits

    def __init__(self, segmentor: nn.Module, queries: int, size: int) -> None:
        super().__init__()
        self.segmentor = segmentor
        rng, side = np.random.default_rng(0), size // 4
        logits = torch.full((queries, side, side), -10.0)
        for mask in logits:
            height, width = (int(rng.integers(side // 5, 3 * side // 5)) for _ in range(2))
            y, x = int(rng.integers(0, side - height)), int(rng.integers(0, side - width))
            mask[y : y + height, x : x + width] = 10.0
        self.register_buffer("masks", logits)

    def forward(self, *args: Any, **options: Any) -> Any:
        """As the segmentor."""
        output = self.segmentor(*args, **options)
        return replace(output, mask_logits=self.masks.expand_as(output.mask_logits))


class FixedCrops(ZegFormerPredictor):
    """Shows CLIP the first `crops` queries."""

    crops = 0

    def sent(self, raw: RawOutput) -> Tensor:
        """(B, Q) bool: the queries that CLIP is asked about."""
        shape = raw.class_logits.shape[:2]
        return (torch.arange(shape[1], device=self.device) < self.crops).expand(shape)


@dataclass(frozen=True)
class Spread:
    """Quartiles."""

    low: float
    median: float
    high: float

    @classmethod
    def of(cls, values: Sequence[float]) -> Spread:
        """Those of at least one value."""
        if len(values) == 1:
            return cls(values[0], values[0], values[0])
        return cls(*statistics.quantiles(values, n=4, method="inclusive"))


@dataclass(frozen=True)
class Point:
    """A point of the curve: seconds a picture, and ZegFormer / CONCAT of the same repeat."""

    crops: int
    concat: Spread
    zegformer: Spread
    ratio: Spread


def predictors(options: argparse.Namespace) -> tuple[Predictor, FixedCrops]:
    """CONCAT and ZegFormer with the same vocabulary, CLIP and number of queries."""
    device, _ = choose_device(options.device)
    cfg: Config = load_config(options.config, [])
    half = torch.float16 if device.type == "cuda" else None
    clip = load_clip(ClipConfig(model=options.clip, pretrained="random"), device, dtype=half)
    dtype, _ = choose_precision("auto" if device.type == "cuda" else "fp32", device)
    seen = CLASSES - UNSEEN
    vocabulary = Vocabulary(
        tuple(ClassEntry(f"class {n}", n, seen=n < seen) for n in range(CLASSES))
    )
    torch.manual_seed(0)
    text = F.normalize(torch.randn(2, CLASSES, clip.embed_dim), dim=-1)
    infer = InferConfig(size=options.size, max_size=options.size, batch=1, seen_offset=0.1)
    segmentor = build_segmentor(cfg.model, clip.embed_dim)
    common = (vocabulary, infer, device, dtype)
    ours = Boxes(segmentor, cfg.model.queries, options.size).eval()
    theirs = ours
    if options.segmentor == "maskformer":
        published = replace(cfg, model=replace(cfg.model, decoder_layers=6))
        theirs = build_zegformer(published, clip.embed_dim)
        theirs = Boxes(theirs, cfg.model.queries, options.size).eval()
    own: dict[str, Any] = {"way": ZegFormerConfig(), "clip": clip, "image_text": text[1]}
    ours = Predictor(ours, text[0], *common)
    return ours, FixedCrops(theirs, text[0], *common, **own)


def seconds(predictor: Predictor, image: np.ndarray, clock: Clock) -> float:
    """From an image to its semantic map, which is on the CPU."""
    start = clock()
    for raw in predictor.raw([image]):
        predictor.semantic(raw)
    return clock() - start


def measure(
    concat: Predictor,
    zegformer: FixedCrops,
    crops: Sequence[int],
    size: int,
    repeats: int,
    clock: Clock,
) -> list[Point]:
    """The curve; in each repeat CONCAT comes first, then ZegFormer with every number of crops."""
    image = np.random.default_rng(1).integers(0, 256, (size, size, 3), dtype=np.uint8)
    warm_up(zegformer, min(crops), image)
    seconds(concat, image, clock)
    ours: list[float] = []
    theirs: dict[int, list[float]] = {count: [] for count in crops}
    for _ in range(repeats):
        ours.append(seconds(concat, image, clock))
        for count in crops:
            zegformer.crops = count
            theirs[count].append(seconds(zegformer, image, clock))
    return [
        Point(
            count,
            Spread.of(ours),
            Spread.of(took),
            Spread.of([b / a for a, b in zip(ours, took, strict=True)]),
        )
        for count, took in theirs.items()
    ]


def warm_up(zegformer: FixedCrops, crops: int, image: np.ndarray) -> None:
    """Runs it once and asserts that so many crops are as many views of the image encoder."""
    assert zegformer.clip is not None
    encode = zegformer.clip.encode_normalised
    counts: list[int] = []

    def counted(images: Tensor) -> Tensor:
        counts.append(len(images))
        return encode(images)

    zegformer.clip.encode_normalised = counted
    zegformer.crops = crops
    zegformer(image)
    zegformer.clip.encode_normalised = encode
    assert sum(counts) == crops, counts


def table(points: Sequence[Point], segments: int, queries: int) -> str:
    """Markdown."""
    notes = {
        segments: "a crop for each segment" + " of COCO's mean image" * (segments == SEGMENTS),
        queries: "every query, as published",
    }
    lines = [
        "| crops | CONCAT, s | ZegFormer, s | ZegFormer / CONCAT (quartiles) | |",
        "|---|---|---|---|---|",
    ]
    for point in points:
        ratio = point.ratio
        lines.append(
            f"| {point.crops} | {point.concat.median:.3f} | {point.zegformer.median:.3f} "
            f"| {ratio.median:.2f} ({ratio.low:.2f}-{ratio.high:.2f}) "
            f"| {notes.get(point.crops, '')} |"
        )
    return "\n".join(lines)


def parameters(clip: Clip) -> float:
    """Millions of parameters of CLIP's image encoder."""
    return sum(p.numel() for p in clip.model.visual.parameters()) / 1e6


def main() -> None:
    """Parses the arguments, measures, prints the table and writes JSON."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("--crops", type=int, nargs="+", default=[5, 10, 20, 100])
    parser.add_argument(
        "--segments", type=int, default=SEGMENTS, help="of a mean image, a point of its own"
    )
    parser.add_argument("--segmentor", choices=("mask2former", "maskformer"), default="mask2former")
    parser.add_argument("--config", type=Path, default=CONFIG, help="of CONCAT's segmentor")
    parser.add_argument("--clip", default="ViT-B-16-quickgelu")
    parser.add_argument("--size", type=int, default=640)
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--clock", choices=CLOCKS, default="wall")
    parser.add_argument("--out", type=Path, help="JSON")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    concat, zegformer = predictors(options)
    assert zegformer.clip is not None
    crops = sorted({*options.crops, options.segments})
    clock = CLOCKS[options.clock]
    points = measure(concat, zegformer, crops, options.size, options.repeats, clock)
    queries = load_config(options.config, []).model.queries
    where = f"{options.threads} threads, " if options.device == "cpu" else f"{options.device}, "
    where += f"{options.clock} clock"
    print(
        f"{options.size}x{options.size}, {CLASSES} classes, {queries} queries, ZegFormer on "
        f"{options.segmentor}, {options.clip} ({parameters(zegformer.clip):.0f} M parameters that "
        f"CONCAT does not load), {where}, {options.repeats} repeats\n"
    )
    print(table(points, options.segments, queries))
    met = all(point.ratio.median > (1, TARGET)[point.crops >= FROM] for point in points)
    print(f"\ntarget (faster at every point, {TARGET}x from {FROM} crops on): "
          f"{'met' if met else 'MISSED'}")  # fmt: skip
    if options.out:
        asked = {key: str(v) if isinstance(v, Path) else v for key, v in vars(options).items()}
        content = {
            "options": asked, "torch": torch.__version__, "target_met": met,
            "points": [asdict(point) for point in points],
        }  # fmt: skip
        options.out.write_text(json.dumps(content, indent=2) + "\n")
    sys.exit(0 if met else 1)


if __name__ == "__main__":
    main()
