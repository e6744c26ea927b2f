"""Devices and precisions, each chosen with a reason."""

from __future__ import annotations

import pytest
import torch

from concat_cli.core import device as module
from concat_cli.core.device import choose_device, choose_precision, cpu_threads
from concat_cli.core.errors import UserError


@pytest.mark.parametrize(
    ("cuda", "mps", "best"),
    [(True, False, "cuda"), (False, True, "mps"), (True, True, "cuda"), (False, False, "cpu")],
)
def test_auto_takes_the_best_there_is(
    cuda: bool, mps: bool, best: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: cuda)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda: "Some GPU")
    monkeypatch.setattr(torch.backends.mps, "is_available", lambda: mps)
    device, reason = choose_device("auto")
    assert device.type == best and reason


def test_what_is_not_there(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(UserError, match="no cuda device here"):
        choose_device("cuda")
    with pytest.raises(UserError, match="Unknown device 'tpu'"):
        choose_device("tpu")
    assert choose_device("cpu")[0] == torch.device("cpu")


@pytest.mark.parametrize(
    ("name", "device", "native", "expected"),
    [
        ("auto", "cuda", True, torch.bfloat16),
        ("auto", "cuda", False, torch.float16),
        ("auto", "cpu", True, torch.bfloat16),
        ("auto", "cpu", False, None),
        ("auto", "mps", True, None),
        ("fp32", "cuda", True, None),
        ("fp16", "cpu", True, torch.float16),
        ("bf16", "cpu", False, torch.bfloat16),
    ],
)
def test_precision(
    name: str,
    device: str,
    native: bool,
    expected: torch.dtype | None,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda **_: native)
    monkeypatch.setattr(module, "has_native_bf16", lambda: native)
    dtype, reason = choose_precision(name, torch.device(device))
    assert dtype == expected and reason


def test_one_thread_lasts_as_long_as_its_block() -> None:
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    try:
        with pytest.raises(KeyError), cpu_threads():
            assert torch.get_num_threads() == 1
            raise KeyError
        assert torch.get_num_threads() == 2
    finally:
        torch.set_num_threads(before)
