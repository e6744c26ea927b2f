"""Forward time of the R-50 segmentor against `transformers`' Mask2Former of the same architecture.

Same weights (random, converted), 100 queries, 9 decoder layers, 133 classes; theirs is eager, fp32.
Ours is as `predict` runs it: in fp32, and under autocast of bf16 where the processor has it. All
are timed by turns; the figures are medians of the paired ratios (ours / theirs), with quartiles.

In fp32 the masks must be theirs to 1e-4 of the largest logit, else the script fails. In bf16 the
IoU with fp32 is that of the masks of the built-in weights, which are trained, on scenes that they
have not seen, and must be 0.99. Random weights make no masks: that of the pixels above each query's
median is told besides. On a machine that others use too, set OMP_WAIT_POLICY=PASSIVE: threads that
spin while they wait make all times several times longer. --clock cpu takes the processor's seconds.

    python benchmarks/segmentor_vs_transformers.py --pairs 15 --threads 2
"""

import argparse
import platform
import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, cast

import torch
import transformers
from torch import Tensor, nn

from concat_cli.core.device import has_native_bf16
from concat_cli.core.infer.predictor import Predictor, RawOutput
from concat_cli.core.model.backbone import Backbone
from concat_cli.core.model.pixel_decoder import DeformablePixelDecoder
from concat_cli.core.model.prepared import prepare
from concat_cli.core.model.query_decoder import QueryDecoder
from concat_cli.core.model.segmentor import Classifier, Projector, Segmentor
from concat_cli.core.prepare.shapes_scene import draw_scene, scene_seed
from concat_cli.core.weights_from.names import rename

CLASSES, CLIP_WIDTH = 133, 512
SCENES = 16
TARGETS = {"fp32": 0.33, "bf16": 0.2}
LARGEST_DIFFERENCE, LEAST_OVERLAP = 1e-4, 0.99


def their_model() -> nn.Module:
    """Mask2Former with R-50 at its defaults otherwise."""
    stages = [f"stage{i}" for i in range(1, 5)]
    resnet = cast("Any", transformers.ResNetConfig)
    backbone = resnet.from_dict({"out_features": stages})
    config = transformers.Mask2FormerConfig(backbone_config=backbone)
    config.num_labels = CLASSES
    torch.manual_seed(0)  # pyright: ignore[reportUnknownMemberType]
    model = transformers.Mask2FormerForUniversalSegmentation(config).eval()
    for name, tensor in model.state_dict().items():
        if name.endswith("normalization.weight"):  # their random batch norms nearly cut the signal
            tensor.fill_(1.0)
    return model


def our_model(theirs: nn.Module) -> Segmentor:
    """The segmentor with the other model's weights; its class head is projector and cosine."""
    backbone = Backbone("resnet50", pretrained=False, frozen_bn=True)
    segmentor = Segmentor(
        backbone,
        DeformablePixelDecoder(backbone.channels),
        QueryDecoder(),
        Projector(256, CLIP_WIDTH),
        Classifier(CLIP_WIDTH),
    ).eval()
    renamed = rename(theirs.state_dict())
    assert renamed is not None
    _, unexpected = cast(
        "tuple[list[str], list[str]]", segmentor.load_state_dict(renamed.tensors, False)
    )
    assert not unexpected
    return segmentor


def machine() -> str:
    """What the ratio depends on: the processor, its threads and the libraries."""
    cpus = Path("/proc/cpuinfo")
    lines = cpus.read_text().splitlines() if cpus.is_file() else []
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    processor = names[0] if names else platform.processor() or platform.machine()
    return (
        f"{processor}, {torch.get_num_threads()} threads, torch {torch.__version__}, "
        f"{torch.backends.cpu.get_cpu_capability()}, transformers {transformers.__version__}"
    )


def seconds(run: Callable[[], object], clock: Callable[[], float]) -> float:
    """What one call takes by a clock."""
    start = clock()
    run()
    return clock() - start


def overlap(masks: Tensor, expected: Tensor) -> Tensor:
    """IoU (N, M) of each of N bool masks (N, ...) with each of M others."""
    a, b = masks.flatten(1).float(), expected.flatten(1).float()
    both = a @ b.T
    return both / (a.sum(1)[:, None] + b.sum(1) - both).clamp(min=1)


def trained_overlap() -> float:
    """Mean IoU of the built-in weights' masks in fp32 with the most similar ones in bf16.

    Of queries that name a class, in both. Queries start from the tokens with the highest
    objectness, so that their order is another one where two tokens are about equal.
    """
    exact, half = (Predictor.load(device="cpu", precision=name) for name in ("fp32", "bf16"))
    found: list[Tensor] = []
    for index in range(SCENES):
        scene = draw_scene(scene_seed("val", 0, index))
        masks: list[Tensor] = []
        for predictor in (exact, half):
            (raw,) = predictor.raw([scene.image])
            assert isinstance(raw, RawOutput)
            named = raw.class_logits[0].argmax(-1) < raw.class_logits.shape[-1] - 1
            masks.append(raw.mask_logits[0][named] > 0)
        found.append(overlap(*masks).amax(1))
    return torch.cat(found).mean().item()


@dataclass
class Versions:
    """Their model, and ours as it runs in each precision."""

    theirs: nn.Module
    ours: dict[str, Segmentor]

    @torch.inference_mode()
    def compare(self, size: int, pairs: int, clock: Callable[[], float]) -> None:
        """Prints a line for each precision at one image size; fails where outputs differ."""
        images = torch.rand(1, 3, size, size)
        normalised = self.ours["fp32"].backbone.normalised(images, None)
        text = torch.randn(CLASSES, CLIP_WIDTH)

        def run(precision: str) -> Tensor:
            if precision == "transformers":
                return self.theirs(normalised).masks_queries_logits
            with torch.autocast("cpu", torch.bfloat16, enabled=precision == "bf16"):
                return self.ours[precision](images, None, text, last_only=True).mask_logits[-1]

        expected = run("transformers")
        median = expected.flatten(2).median(-1).values[..., None, None]
        told: dict[str, str] = {}
        for name in self.ours:
            found = run(name)
            error = ((found - expected).abs().max() / expected.abs().max()).item()
            if name == "fp32" and not error <= LARGEST_DIFFERENCE:
                raise SystemExit(f"{size}x{size}: masks differ by {error:.1e} of the largest logit")
            iou = overlap((found > median)[0], (expected > median)[0]).diagonal().mean()
            told[name] = f"largest relative difference {error:.1e}, IoU above the median {iou:.3f}"
        rows = [
            {name: seconds(partial(run, name), clock) for name in ("transformers", *self.ours)}
            for _ in range(pairs)
        ]
        theirs = statistics.median(row["transformers"] for row in rows)
        for name, facts in told.items():
            times = statistics.median(row[name] for row in rows)
            ratios = [row[name] / row["transformers"] for row in rows]
            low, middle, high = statistics.quantiles(ratios, n=4)
            met = "met" if middle <= TARGETS[name] else "MISSED"
            print(f"{size}x{size} {name}: {times:.3f} s, transformers {theirs:.3f} s, {facts}")
            print(
                f"  ratio {middle:.3f} (quartiles {low:.3f}-{high:.3f}, {pairs} pairs), <= "
                f"{TARGETS[name]}: {met}",
                flush=True,
            )


def main() -> None:
    """Parses the arguments and compares at each size."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("--sizes", type=int, nargs="+", default=[512, 640, 800])
    parser.add_argument("--pairs", type=int, default=15)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--clock", choices=("wall", "cpu"), default="wall")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    print(machine())
    theirs = their_model()
    versions = Versions(theirs, {"fp32": our_model(theirs)})
    prepare(versions.ours["fp32"], None)
    if has_native_bf16():
        iou = trained_overlap()
        print(f"IoU of trained masks in bf16 with those in fp32: {iou:.4f}")
        if not iou >= LEAST_OVERLAP:
            raise SystemExit(f"it must be {LEAST_OVERLAP}")
        versions.ours["bf16"] = our_model(theirs)
        prepare(versions.ours["bf16"], torch.bfloat16)
    clock = {"wall": time.perf_counter, "cpu": time.process_time}[options.clock]
    for size in options.sizes:
        versions.compare(size, options.pairs, clock)


if __name__ == "__main__":
    main()
