"""Exported weights are half the size and load as the same model."""

from pathlib import Path

import torch

from concat_cli.core.checkpoint import load_weights, save_weights
from concat_cli.core.export import export

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
    size = export(tmp_path / "a.safetensors", tmp_path / "b.safetensors")
    assert size < 0.55 * (tmp_path / "a.safetensors").stat().st_size
    found = load_weights(tmp_path / "b.safetensors")
    assert found.meta == META
    assert found.tensors["segmentor.a"].dtype == torch.float16
    assert torch.equal(found.tensors["segmentor.b"], tensors["segmentor.b"])
    assert torch.equal(found.tensors["segmentor.steps"], tensors["segmentor.steps"])
    torch.testing.assert_close(
        found.tensors["segmentor.a"].float(), tensors["segmentor.a"], rtol=1e-3, atol=1e-4
    )
