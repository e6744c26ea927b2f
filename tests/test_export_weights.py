"""Exported weights are half the size and load as the same model."""

import importlib.util
from pathlib import Path

import torch

from concat_cli.core.checkpoint import load_weights, save_weights

META = {
    "format": 1,
    "stage": "con",
    "config": {},
    "vocabulary": [],
    "trained": [],
    "clip": {"model": "tiny", "pretrained": "", "sha256": "0"},
}


def test_matrices_are_halved_and_vectors_kept(tmp_path: Path) -> None:
    tensors = {
        "segmentor.a": torch.randn(300, 40),
        "segmentor.b": torch.randn(40),
        "segmentor.steps": torch.tensor(7),
    }
    save_weights(tmp_path / "a.safetensors", tensors, META)
    path = Path(__file__).parents[1] / "benchmarks" / "export_weights.py"
    spec = importlib.util.spec_from_file_location("export_weights", path)
    assert spec is not None and spec.loader is not None
    script = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(script)
    size = script.export(tmp_path / "a.safetensors", tmp_path / "b.safetensors")
    assert size < 0.55 * (tmp_path / "a.safetensors").stat().st_size
    found = load_weights(tmp_path / "b.safetensors")
    assert found.meta == META
    assert found.tensors["segmentor.a"].dtype == torch.float16
    assert torch.equal(found.tensors["segmentor.b"], tensors["segmentor.b"])
    assert torch.equal(found.tensors["segmentor.steps"], tensors["segmentor.steps"])
    torch.testing.assert_close(
        found.tensors["segmentor.a"].float(), tensors["segmentor.a"], rtol=1e-3, atol=1e-4
    )
