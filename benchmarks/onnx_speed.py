"""The exported model in ONNX Runtime against our own forward in fp32, both on the CPU.

R-50, six layers of deformable attention and nine of the decoder, 100 queries, random weights,
square pictures. ONNX Runtime is given uint8 pictures and does the preprocessing as well; ours is
given the finished tensor. Both take as many threads as torch, by turns, wall clock. A line for each
size, the median of the sizes' ratios last.

    OMP_NUM_THREADS=2 python benchmarks/onnx_speed.py --sizes 512 640 800 --pairs 7
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable
from typing import Any

import numpy as np
import torch

from concat_cli.core.build import build_segmentor
from concat_cli.core.config import InferConfig, ModelConfig
from concat_cli.core.model.segmentor import Segmentor
from concat_cli.core.onnx.model import onnx_model
from concat_cli.core.onnx.needed import needed

TARGET = 0.8
CLASSES, CLIP_WIDTH = 133, 512
MODEL = ModelConfig(
    backbone="resnet50", pixel_decoder="deformable", width=256, mask_width=256, encoder_layers=6,
    encoder_ffn=1024, decoder_layers=9, decoder_ffn=2048, queries=100, token_queries=False,
    mask_pooling=False,
)  # fmt: skip


def session(segmentor: Segmentor, text: torch.Tensor, size: int) -> Any:
    """The file that resizes no picture of this size, opened."""
    model = onnx_model(segmentor, text, InferConfig(size=size, max_size=size))
    runtime = needed("onnxruntime")
    options = runtime.SessionOptions()
    options.intra_op_num_threads = torch.get_num_threads()
    options.log_severity_level = 3
    packed = model.SerializeToString()
    return runtime.InferenceSession(packed, options, disabled_optimizers=["SkipLayerNormFusion"])


def seconds(run: Callable[[], object]) -> float:
    """Wall time of one call."""
    start = time.perf_counter()
    run()
    return time.perf_counter() - start


@torch.inference_mode()
def compare(segmentor: Segmentor, opened: Any, text: torch.Tensor, size: int, pairs: int) -> float:
    """Prints one line for one size; the median ratio."""
    picture = np.random.default_rng(0).integers(0, 256, (size, size, 3), dtype=np.uint8)
    images = torch.tensor(picture).permute(2, 0, 1)[None].contiguous()
    feed = {"image": picture, "text_embeddings": text.numpy()}

    def ours() -> torch.Tensor:
        return segmentor(images, None, text, last_only=True).mask_logits[-1, 0]

    def theirs() -> np.ndarray:
        return opened.run(["mask_logits"], feed)[0]

    error = float(np.abs(ours().numpy() - theirs()).max())
    times = [(seconds(ours), seconds(theirs)) for _ in range(pairs)]
    a, b = (statistics.median(column) for column in zip(*times, strict=True))
    low, middle, high = statistics.quantiles([other / one for one, other in times], n=4)
    print(
        f"{size}: ours {a:.3f} s, ONNX Runtime {b:.3f} s, ratio {middle:.2f} "
        f"(quartiles {low:.2f}-{high:.2f}), largest difference of mask logits {error:.1e}",
        flush=True,
    )
    return middle


def main() -> None:
    """Measures, and prints the ratio."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("--sizes", type=int, nargs="+", default=[512, 640, 800])
    parser.add_argument("--pairs", type=int, default=7)
    options = parser.parse_args()
    torch.manual_seed(0)  # pyright: ignore[reportUnknownMemberType]
    segmentor = build_segmentor(MODEL, CLIP_WIDTH).eval()
    text = torch.nn.functional.normalize(torch.randn(CLASSES, CLIP_WIDTH), dim=-1)
    ratios: list[float] = []
    for size in options.sizes:
        opened = session(segmentor, text, size)
        ratios.append(compare(segmentor, opened, text, size, options.pairs))
    middle = statistics.median(ratios)
    met = "met" if middle <= TARGET else "MISSED"
    print(f"{torch.get_num_threads()} threads, torch {torch.__version__}")
    print(f"ratio {middle:.2f}, <= {TARGET}: {met}")


if __name__ == "__main__":
    main()
