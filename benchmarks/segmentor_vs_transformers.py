"""Forward time of the R-50 segmentor against `transformers`' Mask2Former of the same architecture.

Same weights (random, converted), 100 queries, 9 decoder layers, 133 classes, fp32. Both are timed
in interleaved pairs; the figure is the median of the paired ratios (ours / theirs), with quartiles.
Before timing, the masks of both are compared. On a machine that others use too, set
OMP_WAIT_POLICY=PASSIVE: threads that spin while they wait make all times several times longer.

    python benchmarks/segmentor_vs_transformers.py --sizes 512 640 --pairs 15 --threads 2
"""

import argparse
import platform
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, cast

import torch
import transformers
from torch import nn

from concat_cli.core.model.backbone import Backbone
from concat_cli.core.model.pixel_decoder import DeformablePixelDecoder
from concat_cli.core.model.query_decoder import QueryDecoder
from concat_cli.core.model.segmentor import Classifier, Projector, Segmentor
from concat_cli.core.weights_from.names import rename

CLASSES, CLIP_WIDTH = 133, 512


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


def seconds(run: Callable[[], object]) -> float:
    """Wall time of one call."""
    start = time.perf_counter()
    run()
    return time.perf_counter() - start


@torch.inference_mode()
def compare(ours: Segmentor, theirs: nn.Module, size: int, pairs: int) -> None:
    """Prints one line for one image size."""
    images = torch.rand(1, 3, size, size)
    normalised = ours.backbone.normalised(images, None)
    text = torch.randn(CLASSES, CLIP_WIDTH)

    def run_ours() -> torch.Tensor:
        return ours(images, None, text, last_only=True).mask_logits[-1]

    def run_theirs() -> torch.Tensor:
        return theirs(normalised).masks_queries_logits

    expected = run_theirs()
    error = ((run_ours() - expected).abs().max() / expected.abs().max()).item()
    times = [(seconds(run_ours), seconds(run_theirs)) for _ in range(pairs)]
    ratios = [a / b for a, b in times]
    low, middle, high = statistics.quantiles(ratios, n=4)
    print(
        f"{size}x{size}: ours {statistics.median(a for a, _ in times):.3f} s, transformers "
        f"{statistics.median(b for _, b in times):.3f} s, ratio {middle:.3f} "
        f"(quartiles {low:.3f}-{high:.3f}, {pairs} pairs), largest relative difference {error:.1e}"
    )


def main() -> None:
    """Parses the arguments and compares at each size."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--sizes", type=int, nargs="+", default=[512, 640])
    parser.add_argument("--pairs", type=int, default=15)
    parser.add_argument("--threads", type=int, default=2)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    print(machine())
    theirs = their_model()
    ours = our_model(theirs)
    for size in options.sizes:
        compare(ours, theirs, size, options.pairs)


if __name__ == "__main__":
    main()
