"""Files of weights from elsewhere: every format is read, and nothing in them can run."""

from __future__ import annotations

import builtins
import os
import pickle
from collections import OrderedDict
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import save_file

from concat_cli.core.errors import UserError
from concat_cli.core.weights_from.files import read_tensors

VALUES = {"a.weight": torch.randn(3, 4), "a.bias": torch.randn(3), "steps": torch.tensor(7)}
ARRAYS = {name: tensor.numpy() for name, tensor in VALUES.items()}


class Runs:
    """A thing whose pickle calls a function when it is read."""

    def __init__(self, function: Any, *arguments: Any) -> None:
        self.call = function, arguments

    def __reduce__(self) -> Any:
        return self.call


def _same(found: dict[str, torch.Tensor], expected: dict[str, torch.Tensor] = VALUES) -> None:
    assert found.keys() == expected.keys()
    assert all(torch.equal(found[name], tensor) for name, tensor in expected.items())


def _old_numpy(data: bytes) -> bytes:
    """A pickle as NumPy 1 writes it, and so detectron2's model zoo (protocol 2: names by line)."""
    return data.replace(b"numpy._core.", b"numpy.core.")


def test_every_format_gives_the_same_tensors(tmp_path: Path) -> None:
    save_file(VALUES, tmp_path / "w.safetensors")
    torch.save(OrderedDict(VALUES), tmp_path / "w.pth")
    torch.save(VALUES, tmp_path / "old.pt", _use_new_zipfile_serialization=False)
    for protocol in (2, 3, 4, 5):
        zoo = {"model": ARRAYS, "__author__": "someone", "matching_heuristics": True}
        (tmp_path / f"zoo{protocol}.pkl").write_bytes(pickle.dumps(zoo, protocol))
    (tmp_path / "numpy1.pkl").write_bytes(_old_numpy(pickle.dumps({"model": ARRAYS}, 2)))
    files = sorted(tmp_path.iterdir())
    assert len(files) == 8
    for path in files:
        _same(read_tensors(path))


def test_the_model_of_a_training_checkpoint_is_taken_out(tmp_path: Path) -> None:
    parallel = {f"module.{name}": tensor for name, tensor in VALUES.items()}
    training = {"model": parallel, "optimizer": {"lr": 1.0}, "best": np.float64(3.0), "step": 5}
    torch.save(training, tmp_path / "d2.pth")
    _same(read_tensors(tmp_path / "d2.pth"))
    torch.save({"state_dict": VALUES, "epoch": 3}, tmp_path / "light.pth")
    _same(read_tensors(tmp_path / "light.pth"))


@pytest.mark.parametrize(
    "prefix", ["_orig_mod.", "model.", "_orig_mod.module.", "module._orig_mod.", "model.model."]
)
def test_what_was_wrapped_around_a_model_goes_off_its_names(tmp_path: Path, prefix: str) -> None:
    save_file({f"{prefix}{n}": t for n, t in VALUES.items()}, tmp_path / "w.safetensors")
    _same(read_tensors(tmp_path / "w.safetensors"))


def test_a_model_s_own_prefix_stays(tmp_path: Path) -> None:
    """Mask2Former's names begin with "model." in transformers, with and without its class head."""
    masks, head = "model.transformer_module.level_embed.weight", "class_predictor.weight"
    own, alone = {masks: torch.ones(2), head: torch.ones(3)}, {masks: torch.ones(2)}
    for tensors in (own, alone):
        for prefix in ("", "model.", "module.model.", "model._orig_mod."):
            wrapped = {f"{prefix}{name}": tensor for name, tensor in tensors.items()}
            wrapped |= {"criterion.empty_weight": torch.ones(1)} if prefix == "model." else {}
            save_file(wrapped, tmp_path / "w.safetensors")
            found = read_tensors(tmp_path / "w.safetensors")
            _same({n: t for n, t in found.items() if not n.startswith("criterion.")}, tensors)
    compiled = {"body._orig_mod.conv.weight": torch.ones(2), "head.weight": torch.ones(1)}
    save_file(compiled, tmp_path / "w.safetensors")
    assert sorted(read_tensors(tmp_path / "w.safetensors")) == ["body.conv.weight", "head.weight"]
    half = {"model.a": torch.ones(2), "other.a": torch.ones(1)}
    save_file(half, tmp_path / "w.safetensors")
    _same(read_tensors(tmp_path / "w.safetensors"), half)


def test_safetensors_whose_length_looks_like_a_pickle(tmp_path: Path) -> None:
    for pad in range(64):  # until the first byte, the header's length, is that of a pickle
        save_file(VALUES, tmp_path / "w.safetensors", {"note": " " * 4 * pad})
        if (tmp_path / "w.safetensors").read_bytes()[0] == 0x80:
            break
    else:
        pytest.fail("no header of such a length")
    _same(read_tensors(tmp_path / "w.safetensors"))


def test_the_name_of_a_file_does_not_matter(tmp_path: Path) -> None:
    save_file(VALUES, tmp_path / "w.bin")
    torch.save(VALUES, tmp_path / "w.pkl")
    _same(read_tensors(tmp_path / "w.bin"))
    _same(read_tensors(tmp_path / "w.pkl"))


@pytest.mark.parametrize("wrap", ["pickle", "torch", "torch-legacy"])
@pytest.mark.parametrize("kind", ["system", "eval", "exec", "getattr", "import", "torch.load"])
def test_a_file_that_would_run_code_is_refused_and_nothing_runs(
    tmp_path: Path, wrap: str, kind: str
) -> None:
    mark, path = tmp_path / "ran", tmp_path / "evil.pkl"
    touch = f"__import__('pathlib').Path({str(mark)!r}).touch()"
    evil = {
        "system": Runs(os.system, f"touch {mark}"),
        "eval": Runs(builtins.eval, touch),
        "exec": Runs(builtins.exec, touch),
        "getattr": Runs(getattr, os, "system"),
        "import": Runs(__import__, "antigravity"),
        "torch.load": Runs(torch.load, str(tmp_path / "inner.pt"), None, None, False),
    }[kind]
    if kind == "getattr":  # a module cannot be pickled: by its name
        evil = Runs(getattr, np.ndarray, "__reduce__")
    content = {"model": ARRAYS if wrap == "pickle" else VALUES, "extra": evil}
    if wrap == "pickle":
        path.write_bytes(pickle.dumps(content))
    else:
        torch.save(content, path, _use_new_zipfile_serialization=wrap == "torch")
    with pytest.raises(UserError) as caught:
        read_tensors(path)
    assert "refused" in caught.value.what and "Nothing was run" in caught.value.what
    assert str(path) in caught.value.what and caught.value.hint
    assert not mark.exists()


def test_code_hidden_in_an_array_of_objects_is_refused(tmp_path: Path) -> None:
    array = np.empty(1, object)
    array[0] = Runs(os.system, f"touch {tmp_path / 'ran'}")
    (tmp_path / "evil.pkl").write_bytes(pickle.dumps({"model": {"a": array}}))
    with pytest.raises(UserError, match="refused"):
        read_tensors(tmp_path / "evil.pkl")
    assert not (tmp_path / "ran").exists()


def test_codecs_decode_nothing_but_latin1(tmp_path: Path) -> None:
    data = b"\x80\x02c_codecs\nencode\nX\x03\x00\x00\x00abcX\x03\x00\x00\x00zip\x86R."
    (tmp_path / "evil.pkl").write_bytes(data)
    with pytest.raises(UserError, match="refused"):
        read_tensors(tmp_path / "evil.pkl")


def test_what_is_no_file_of_weights_is_told(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="not there"):
        read_tensors(tmp_path / "none.pkl")
    with pytest.raises(UserError, match="a folder"):
        read_tensors(tmp_path)
    save_file(VALUES, tmp_path / "w.safetensors")
    torch.save(VALUES, tmp_path / "w.pth")
    (tmp_path / "w.pkl").write_bytes(pickle.dumps({"model": ARRAYS}))
    for name in ("w.safetensors", "w.pth", "w.pkl"):
        cut = tmp_path / f"cut-{name}"
        cut.write_bytes((tmp_path / name).read_bytes()[:-20])
        with pytest.raises(UserError, match="cannot be read"):
            read_tensors(cut)
    for name, data in {"page": b"<html>not found", "empty": b"", "junk": b"\x80\x04K"}.items():
        (tmp_path / name).write_bytes(data)
        with pytest.raises(UserError, match="cannot be read"):
            read_tensors(tmp_path / name)
    (tmp_path / "list.pkl").write_bytes(pickle.dumps([1, 2]))
    with pytest.raises(UserError, match="holds no tensors"):
        read_tensors(tmp_path / "list.pkl")
