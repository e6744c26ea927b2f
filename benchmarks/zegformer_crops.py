"""ZegFormer's crops: all of them one image at a time, as published, against only those that matter.

What is timed is all that happens between uint8 scenes and the logits of both branches. Three ways:
every query of an image (naive), every query but in batches over images and with one view for all
the empty masks of an image, and only the queries by which CLIP can change a pixel's score
(`zegformer.skip_below`). Repeats are interleaved; ratios are medians of paired ones. The script
ends with exit code 1 if scores differ from the naive ones by more than 1e-3.

    python benchmarks/zegformer_crops.py                              # random weights, 100 queries
    python benchmarks/zegformer_crops.py --clip ViT-B-16-quickgelu --scenes 4 --repeats 1
    python benchmarks/zegformer_crops.py --weights runs/NAME/zegformer/best.safetensors

With random weights a share of the queries is planted to be empty (`--empty`), so the speed-up says
what is gained at that share, no more.
"""

from __future__ import annotations

import argparse
import statistics
import sys
import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from concat_cli.core.build import build_segmentor
from concat_cli.core.checkpoint import load_weights
from concat_cli.core.clip.encoder import Clip, load_clip
from concat_cli.core.config import ClipConfig, InferConfig, ModelConfig
from concat_cli.core.infer.crops import encode_segments
from concat_cli.core.infer.postprocess import Size, resized_strips
from concat_cli.core.infer.predictor import Loading, Predictor, Raw, RawOutput, at_test, named_by
from concat_cli.core.prepare.shapes_scene import CLASSES, draw_scene
from concat_cli.core.vocabulary import Vocabulary
from concat_cli.methods.zegformer.config import MASKED_PROMPTS, ZegFormerConfig
from concat_cli.methods.zegformer.predictor import ZegFormerPredictor

LIMIT = 1e-3  # the largest difference that counts as none
UNSEEN = CLASSES.names[::5]  # of random weights
SEGMENT, NAIVE = "segment branch alone", "naive"


class Naive(ZegFormerPredictor):
    """Every query is shown to CLIP, those of an image together."""

    def _run(self, images: Tensor, padding: Tensor | None, valid: list[Size]) -> Raw:
        raw = Predictor._run(self, images, padding, valid)
        assert isinstance(raw, RawOutput) and self.clip and self.image_text is not None
        shape = raw.mask_logits.shape[:2]
        select = torch.ones(shape, dtype=torch.bool, device=self.device).nonzero()
        tokens = encode_segments(
            self.clip, images, raw.mask_logits, valid, select, self.zegformer.crop, len(select)
        )
        logits = self.clip.logit_scale * tokens @ self.image_text.T
        return replace(raw, image_logits=logits.view(*shape, -1))


class Planted(nn.Module):
    """A segmentor of which a share of the queries is empty: every other of them covers no pixel,
    the rest are sure of no_object."""

    def __init__(self, segmentor: nn.Module, empty: float) -> None:
        super().__init__()
        self.segmentor, self.empty = segmentor, empty

    def forward(self, *args: Any, **options: Any) -> Any:
        """As the segmentor."""
        output = self.segmentor(*args, **options)
        planted = round(self.empty * output.mask_logits.shape[2])
        classes, masks = output.class_logits.clone(), output.mask_logits.clone()
        masks[:, :, 0:planted:2] -= 30.0
        classes[:, :, 1:planted:2, -1] += 60.0
        return replace(output, class_logits=classes, mask_logits=masks)


@dataclass(frozen=True)
class Parts:
    """What predictors are made of."""

    model: nn.Module
    text: Tensor
    vocabulary: Vocabulary
    infer: InferConfig
    way: ZegFormerConfig
    clip: Clip
    image_text: Tensor

    def predictor(
        self, kind: type[ZegFormerPredictor], batch: int | None = None, **keys: Any
    ) -> ZegFormerPredictor:
        """One of them, with keys of `ZegFormerConfig`."""
        infer = replace(self.infer, batch=batch or self.infer.batch)
        common = (self.model, self.text, self.vocabulary, infer)
        way = replace(self.way, **keys)
        return kind(*common, way=way, clip=self.clip, image_text=self.image_text)


def loaded(path: Path) -> Parts:
    """Those of a weights file."""
    weights = load_weights(path)
    found = Loading(weights, at_test(weights), named_by(weights), torch.device("cpu"))
    way = replace(found.cfg.own(ZegFormerConfig), branch="fusion")
    return Parts(
        found.model(),
        found.text(),
        found.vocabulary,
        found.cfg.infer,
        way,
        found.clip(image_tower=True),
        found.text(MASKED_PROMPTS if way.image_prompts == "masked" else ()),
    )


def random_ones(options: argparse.Namespace) -> Parts:
    """Random weights with planted queries."""
    random = "" if options.clip == "tiny" else "random"
    clip = load_clip(ClipConfig(model=options.clip, pretrained=random))
    vocabulary = CLASSES.with_unseen(UNSEEN)
    torch.manual_seed(0)
    segmentor = build_segmentor(ModelConfig(queries=options.queries), clip.embed_dim).eval()
    text = F.normalize(torch.randn(2, len(vocabulary), clip.embed_dim), dim=-1)
    model, infer = Planted(segmentor, options.empty), InferConfig(size=options.size)
    return Parts(model, text[0], vocabulary, infer, ZegFormerConfig(), clip, text[1])


def count_views(clip: Clip) -> list[int]:
    """A list that grows by the number of views with every call of the image encoder."""
    counts: list[int] = []
    encode = clip.encode_normalised

    def counted(images: Tensor) -> Tensor:
        counts.append(len(images))
        return encode(images)

    clip.encode_normalised = counted
    return counts


def seconds(run: Callable[[], object]) -> float:
    """Wall time of one call."""
    start = time.perf_counter()
    run()
    return time.perf_counter() - start


def by_position(raws: Iterable[Raw]) -> dict[int, RawOutput]:
    """The output for each picture."""
    found: dict[int, RawOutput] = {}
    for raw in raws:
        for row, position in enumerate(raw.positions):
            assert isinstance(raw, RawOutput)
            found[position] = row_of(raw, row)
    return found


def row_of(raw: RawOutput, row: int) -> RawOutput:
    """The output for one of the pictures; it does not keep the whole batch alive."""
    own: dict[str, Any] = {}
    for each in fields(raw):
        value = getattr(raw, each.name)
        if isinstance(value, Tensor):
            own[each.name] = value[row : row + 1].clone()
        elif isinstance(value, list):
            own[each.name] = [value[row]]
    return replace(raw, **own)


@torch.inference_mode()
def differences(
    predictor: ZegFormerPredictor, naive: dict[int, RawOutput], other: dict[int, RawOutput]
) -> tuple[float, float]:
    """The largest difference of a pixel's score, and of a query's score times its mask."""
    pixels, queries = 0.0, 0.0
    for position, first in naive.items():
        second = other[position]
        a, b = (predictor.scores(raw)[..., :-1] for raw in (first, second))
        top = first.mask_logits.sigmoid().flatten(2).amax(-1)  # (1, Q)
        queries = max(queries, float(((a - b).abs().amax(-1) * top).max()))
        strips = (
            resized_strips(raw.mask_logits, raw.sizes[0], raw.valid[0], width=sum(a.shape[1:]))
            for raw in (first, second)
        )
        for one, two in zip(*strips, strict=True):
            sums = (
                torch.einsum("bqk,bqhw->bkhw", weights, masks.sigmoid())
                for weights, masks in ((a, one), (b, two))
            )
            pixels = max(pixels, float((next(sums) - next(sums)).abs().max()))
    return pixels, queries


def compare(parts: Parts, options: argparse.Namespace) -> bool:
    """Prints the table; whether nothing differs by more than `LIMIT`."""
    ways = {
        SEGMENT: parts.predictor(ZegFormerPredictor, branch="segment"),
        NAIVE: parts.predictor(Naive, batch=1),
        "batched, empty masks share a view": parts.predictor(ZegFormerPredictor, skip_below=0.0),
        "selective and batched": parts.predictor(ZegFormerPredictor),
    }
    scenes = [draw_scene(1_000_000 + n, options.size).image for n in range(options.scenes)]
    counts = count_views(parts.clip)
    views: dict[str, float] = {}
    found: dict[str, dict[int, RawOutput]] = {}
    for name, one in ways.items():  # which also warms up
        found[name] = by_position(one.raw(scenes))
        views[name] = sum(counts) / len(scenes)
        counts.clear()
    times = [
        {name: seconds(lambda one=one: list(one.raw(scenes))) for name, one in ways.items()}
        for _ in range(options.repeats)
    ]
    worst = 0.0
    print(
        f"{options.scenes} scenes of {options.size}x{options.size}, batches of "
        f"{parts.infer.batch}, {torch.get_num_threads()} threads, medians of {options.repeats}\n\n"
        "| way | views a scene | ms a scene | naive / it | CLIP's part: naive / it "
        "| differences: pixels, queries |\n|---|---|---|---|---|---|"
    )
    for name in ways:
        took = statistics.median(row[name] for row in times) / len(scenes)
        cells = [name, f"{views[name]:.1f}", f"{1e3 * took:.1f}", ratio_of(times, name, False)]
        if name == SEGMENT:
            cells += ["", ""]
        else:
            found_ones = differences(ways[NAIVE], found[NAIVE], found[name])
            worst = max(worst, *found_ones)
            cells += [ratio_of(times, name, True), "{:.1e}, {:.1e}".format(*found_ones)]
        print("| " + " | ".join(cells) + " |")
    print(f"\n{'unchanged' if worst <= LIMIT else 'CHANGED'} within {LIMIT}")
    return worst <= LIMIT


def ratio_of(times: list[dict[str, float]], name: str, without_segmentor: bool) -> str:
    """Median of the paired ratios of the naive way and another."""
    less = [row[SEGMENT] if without_segmentor else 0.0 for row in times]
    ratios = [
        (row[NAIVE] - minus) / max(row[name] - minus, 1e-9)
        for row, minus in zip(times, less, strict=True)
    ]
    return f"{statistics.median(ratios):.2f}"


def main() -> None:
    """Parses the arguments and compares."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("--weights", type=Path, help="a segmentor's; without: random ones")
    parser.add_argument("--clip", default="tiny", help="of random weights; others than tiny: too")
    parser.add_argument("--queries", type=int, default=100, help="of random weights")
    parser.add_argument("--empty", type=float, default=0.8, help="share, of random weights")
    parser.add_argument("--scenes", type=int, default=32)
    parser.add_argument("--size", type=int, default=128)
    parser.add_argument("--batch", type=int, default=16)
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--threads", type=int, default=1)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    parts = loaded(options.weights) if options.weights else random_ones(options)
    parts = replace(parts, infer=replace(parts.infer, batch=options.batch))
    sys.exit(0 if compare(parts, options) else 1)


if __name__ == "__main__":
    main()
