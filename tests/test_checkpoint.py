"""Weights and states: what is written comes back, and damage is told in words."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors.torch import save_file

from concat_cli.core.checkpoint import (
    check_clip,
    check_stage,
    load_state,
    load_weights,
    read_meta,
    save_state,
    save_weights,
)
from concat_cli.core.clip.encoder import ClipIdentity
from concat_cli.core.errors import UserError

pytestmark = pytest.mark.core

META: dict[str, Any] = {
    "format": 1,
    "stage": "con",
    "config": {"optim": {"lr": 0.5}},
    "vocabulary": [],
    "trained": ["Häuser", "猫"],
    "clip": {"model": "tiny", "pretrained": "", "sha256": "ab" * 32},
}


@pytest.fixture
def weights(tmp_path: Path) -> Path:
    path = tmp_path / "deep" / "last.safetensors"
    tensors = {"segmentor.a": torch.arange(600.0).reshape(20, 30), "generator.b": torch.ones(3)}
    save_weights(path, tensors | {"segmentor.t": tensors["segmentor.a"].T}, META)
    return path


def test_weights_come_back(weights: Path) -> None:
    loaded = load_weights(weights)
    assert loaded.meta == META == read_meta(weights)
    assert loaded.stage == "con"
    assert torch.equal(loaded.tensors["segmentor.t"], torch.arange(600.0).reshape(20, 30).T)
    assert len(loaded.sha256) == 64
    assert [p.name for p in weights.parent.iterdir()] == [weights.name]


def test_the_same_weights_are_the_same_file(weights: Path) -> None:
    before = load_weights(weights)
    save_weights(weights, before.tensors, before.meta)
    assert load_weights(weights).sha256 == before.sha256


@settings(suppress_health_check=[HealthCheck.function_scoped_fixture], deadline=None)
@given(share=st.floats(0, 0.999))
def test_truncated_weights(weights: Path, share: float) -> None:
    data = weights.read_bytes()
    cut = weights.with_name("cut.safetensors")
    cut.write_bytes(data[: int(share * len(data))])
    with pytest.raises(UserError, match="no complete weights file"):
        load_weights(cut)


@settings(suppress_health_check=[HealthCheck.function_scoped_fixture], deadline=None)
@given(data=st.binary(max_size=200))
def test_any_bytes_are_a_user_error(tmp_path: Path, data: bytes) -> None:
    path = tmp_path / "some.safetensors"
    path.write_bytes(data)
    for read in (load_weights, read_meta, load_state):
        with pytest.raises(UserError):
            read(path)


def test_foreign_files(tmp_path: Path) -> None:
    path = tmp_path / "other.safetensors"
    save_file({"x": torch.ones(2)}, path)
    with pytest.raises(UserError, match="concat did not write it"):
        load_weights(path)
    torch.save({"x": torch.ones(2)}, path)
    with pytest.raises(UserError, match="no complete weights file"):
        load_weights(path)
    save_file({"x": torch.ones(2)}, path, {"concat": json.dumps(META | {"format": 9})})
    with pytest.raises(UserError, match="format 9"):
        load_weights(path)


def test_missing_weights_and_folders(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="no file"):
        load_weights(tmp_path / "none.safetensors")
    with pytest.raises(UserError, match="Cannot read"):
        load_weights(tmp_path)


def test_wrong_stage_names_the_command(weights: Path) -> None:
    loaded = load_weights(weights)
    check_stage(loaded, "con", "cat")
    with pytest.raises(UserError) as caught:
        check_stage(loaded, "cat", "finetune")
    assert "stage 'con'" in caught.value.what and "`concat train-cat`" in caught.value.hint


def test_another_clip_is_told(weights: Path) -> None:
    loaded = load_weights(weights)
    check_clip(loaded, ClipIdentity("tiny", "", "ab" * 32))
    with pytest.raises(UserError, match=r"tiny \(abababab\), this one is ViT-B-16 openai \(cdcd"):
        check_clip(loaded, ClipIdentity("ViT-B-16", "openai", "cd" * 32))


def test_state_of_a_loop_comes_back(tmp_path: Path) -> None:
    parameter = torch.nn.Parameter(torch.ones(3))
    optimiser = torch.optim.AdamW([parameter])
    parameter.sum().backward()
    optimiser.step()
    path = tmp_path / "last.state.pt"
    save_state(path, {"step": 3, "optimiser": optimiser.state_dict(), "best": float("-inf")})
    state = load_state(path)
    assert (state["step"], state["best"]) == (3, float("-inf"))
    assert torch.equal(state["optimiser"]["state"][0]["exp_avg"], torch.full((3,), 0.1))
    path.write_bytes(path.read_bytes()[:-40])
    with pytest.raises(UserError, match="damaged") as caught:
        load_state(path)
    assert "--fresh" in caught.value.hint


def test_a_state_with_code_in_it_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "last.state.pt"
    torch.save({"call": os.getcwd}, path)
    with pytest.raises(UserError, match="damaged"):
        load_state(path)


def test_a_failed_save_keeps_the_old_file(weights: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    before = weights.read_bytes()

    def full(*_: object, **__: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(UserError, match="No space left") as caught:
        save_weights(weights, {"segmentor.a": torch.zeros(3)}, META)
    assert "disk is full" in caught.value.hint
    assert weights.read_bytes() == before
    assert len(list(weights.parent.iterdir())) == 1
