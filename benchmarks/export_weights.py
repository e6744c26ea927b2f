"""Weights for shipping: matrices in half precision, everything needed to go on from them kept.

python benchmarks/export_weights.py runs/shapes/finetune/last.safetensors OUT.safetensors
"""

from __future__ import annotations

import argparse
from pathlib import Path

from concat_cli.core.checkpoint import load_weights, save_weights


def export(source: Path, target: Path) -> int:
    """Writes a weights file with its matrices as fp16 and returns its size in bytes.

    Vectors (norms, biases, statistics) stay fp32; loading widens everything again.
    """
    weights = load_weights(source)
    tensors = {
        name: tensor.half() if tensor.is_floating_point() and tensor.ndim > 1 else tensor
        for name, tensor in weights.tensors.items()
    }
    save_weights(target, tensors, weights.meta)
    return target.stat().st_size


def main() -> None:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("source", type=Path)
    parser.add_argument("target", type=Path)
    args = parser.parse_args()
    export(args.source, args.target)


if __name__ == "__main__":
    main()
