"""Each stage, `predict` and `evaluate` give what they gave when `snapshots.json` was recorded.

Everywhere: the names, shapes and order of the tensors, their sums, the losses, the segments and the
figures, within a tolerance that other processors and other versions of torch keep. Where the
machine has the fingerprint of the one that recorded: the very bits. After a change that is meant to
alter them: `OMP_NUM_THREADS=1 python tests/test_snapshots.py --record`, and say why in the commit.
Only the command line is used, so that code may move.
"""

from __future__ import annotations

import contextlib
import functools
import hashlib
import io
import json
import os
import platform
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file

from concat_cli.app import main

pytestmark = pytest.mark.core

FILE = Path(__file__).with_name("snapshots.json")
SCENES = {"train": 8, "dev": 3, "val": 6, "size": 64}
COMMON = """
data.root=world data.crop=64 infer.size=64 infer.batch=4 optim.precision=fp32
model.width=32 model.mask_width=32 model.heads=4 model.queries=10
model.encoder_ffn=32 model.decoder_ffn=32 model.decoder_layers=2
loss.points=64 optim.lr=1e-4 warmup.lr=1e-4
optim.steps=3 optim.batch_size=4 optim.per_device=4 optim.warmup=2
optim.log_every=1 optim.preview_every=0
cat.steps=4 cat.primitives=8 cat.ffn=32 cat.heads=4 cat.layers=1 cat.batch=16 cat.negatives=16
cat.eval_every=2 cat.fold=3 finetune.steps=3 finetune.batch=16 finetune.pseudo_per_class=2
clip_zss.head_width=16 clip_zss.heads=4 clip_zss.bank=6
""".split()
TEACHING = """
warmup.steps=2 warmup.masks=1 loss.dense=1 loss.denoising=3 loss.truth=1
""".split()
PUBLISHED = "loss.classes=1 loss.mask=20 loss.dice=1".split()
OURS = "zegformer.segmentor=mask2former zegformer.targets=segment zegformer.raw_no_object=false"
PSEUDO = """
clip_zss.glm=1 clip_zss.pseudo=true clip_zss.synthesizer=1 clip_zss.dense_size=128
clip_zss.windows=[1,2,4] clip_zss.most=4 clip_zss.iterations=3 clip_zss.min_share=0.05 optim.ema=0.9
""".split()
CON = ("align.image=0.1", "align.instance=1", "align.bank=32", "optim.ema=0.9")
# snapshot -> command, run, folder of the weights, keys (None: the command finds them in the run)
STAGES: dict[str, tuple[str, str, str, list[str] | None]] = {
    "con": ("train-con", "concat", "con", [*TEACHING, *CON]),
    "cat": ("train-cat", "concat", "cat", None),
    "finetune": ("finetune", "concat", "finetune", None),
    "zegformer": ("train-zegformer", "published", "zegformer", PUBLISHED),
    "zegformer-mask2former": ("train-zegformer", "ours", "zegformer", [*TEACHING, *OURS.split()]),
    "clip_zss": ("train-clip-zss", "plain", "clip_zss", []),
    "clip_zss-pseudo": ("train-clip-zss", "pseudo", "clip_zss", PSEUDO),
}
NEEDS = {"cat": "con", "finetune": "cat"}
FIGURES = ("panoptic", "semantic", "instance", "intervals", "calibration", "diagnostics")
RTOL = 2e-3  # of sums; another torch draws some numbers and rounds in another way
OTHER_TORCH = 20  # times as much
NOISE = 3e-4  # times the root of the number of values: Adam moves those without a gradient too


def fingerprint() -> dict[str, str]:
    """What the bits of a result depend on, beside the code."""
    path = Path("/proc/cpuinfo")
    lines = path.read_text().splitlines() if path.exists() else []
    told = dict(line.partition(":")[::2] for line in lines)
    kind = {key.strip(): value.strip() for key, value in told.items()}
    brand = " ".join(kind.get(key, "") for key in ("model name", "cpu family", "model", "stepping"))
    return {
        "torch": torch.__version__,
        "instructions": torch.backends.cpu.get_cpu_capability(),
        "processor": brand.strip() or platform.processor(),
        "python": platform.python_version(),
        "numpy": np.__version__,
    }


def run(*arguments: str) -> str:
    """Runs a command line that must succeed; returns its stdout."""
    out = io.StringIO()
    with contextlib.redirect_stdout(out):
        code = main([*arguments])
    assert code == 0, out.getvalue()
    return out.getvalue()


def keys(own: list[str]) -> list[str]:
    """The words of a command line: every key is given, none comes from a shipped file."""
    return [*(f"shapes.{key}={value}" for key, value in SCENES.items()), *COMMON, *own]


def draw() -> None:
    """The world, below the current folder, and an empty configuration."""
    run("prepare-data", "shapes", "world", *(f"--{k}={v}" for k, v in SCENES.items()))
    Path("defaults.yaml").write_text("{}\n")


@functools.cache
def trained(stage: str) -> dict[str, Any]:
    """Trains a stage below the current folder; what is recorded of it."""
    if stage in NEEDS:
        trained(NEEDS[stage])
    command, name, folder, own = STAGES[stage]
    given = [] if own is None else ["-c", "defaults.yaml", *keys(own)]
    run(command, "--name", name, "--device", "cpu", *given)
    path = Path("runs", name, folder)
    rows = [json.loads(line) for line in (path / "metrics.jsonl").read_text().splitlines()]
    stored = load_file(path / "last.safetensors")
    # in an order that does not depend on the version of safetensors: by size of type, then name
    tensors = dict(sorted(stored.items(), key=lambda item: (-item[1].element_size(), item[0])))
    digest = hashlib.sha256()
    for key, value in tensors.items():
        digest.update(f"{key} {value.dtype} {tuple(value.shape)}".encode())
        digest.update(value.contiguous().numpy().tobytes())
    return {
        "digest": digest.hexdigest(),
        "losses": [{k: v for k, v in r.items() if k != "seconds"} for r in rows if "loss" in r],
        "tensors": {
            key: [list(value.shape), *sums(value.double())] for key, value in tensors.items()
        },
    }


def sums(tensor: torch.Tensor) -> list[float]:
    """Of the magnitudes and of the values."""
    return [float(f"{float(value):.7g}") for value in (tensor.abs().sum(), tensor.sum())]


@functools.cache
def predicted() -> dict[str, Any]:
    """Two pictures with the built-in weights."""
    pictures = [f"world/val/{number:012d}.png" for number in (13, 14)]
    run("predict", *pictures, "--out", "predicted", "--device", "cpu", "--json")
    index = json.loads(Path("predicted/panoptic.json").read_text())
    pngs = [Path("predicted/panoptic") / row["file_name"] for row in index["annotations"]]
    digest = hashlib.sha256(b"".join(np.asarray(Image.open(png)).tobytes() for png in pngs))
    return {"digest": digest.hexdigest(), "annotations": index["annotations"]}


@functools.cache
def scored(stage: str) -> dict[str, Any]:
    """The figures of the built-in weights, or of a stage's."""
    options = ["--tasks", "panoptic,semantic,instance", "--bootstrap", "20"]
    if stage == "built-in":
        options += ["--calibrate", "--diagnostics", "data.root=world"]
    else:
        trained(stage)
        options = ["--name", STAGES[stage][1]]
    report = json.loads(run("evaluate", "--device", "cpu", "--json", *options))
    return {key: report[key] for key in FIGURES if key in report}


SCORED = ("built-in", "finetune", "zegformer", "clip_zss-pseudo")


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """A folder with the world; one thread, as the snapshots were recorded with."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(tmp_path_factory.mktemp("snapshots"))
        draw()
        yield
    torch.set_num_threads(threads)
    for cached in (trained, predicted, scored):
        cached.cache_clear()


@pytest.fixture(scope="module")
def recorded() -> dict[str, Any]:
    return json.loads(FILE.read_text(encoding="utf-8"))


def apart(found: Any, wanted: Any, rel: float, absolute: float, path: str = "") -> list[str]:
    """Where two nests of values differ; numbers may by `rel` of theirs, or by `absolute`."""
    if isinstance(wanted, dict) and isinstance(found, dict):
        if list(found) != list(wanted):
            return [f"{path}: {list(found)}, not {list(wanted)}"]
        inner = [(f"{path}.{key}", found[key], wanted[key]) for key in wanted]
    elif isinstance(wanted, list) and isinstance(found, list) and len(found) == len(wanted):
        inner = [(f"{path}[{n}]", *both) for n, both in enumerate(zip(found, wanted, strict=True))]
    elif isinstance(wanted, float) and isinstance(found, float):
        close = abs(found - wanted) <= max(rel * abs(wanted), absolute)
        return [] if close else [f"{path}: {found}, not {wanted}"]
    else:
        return [] if found == wanted else [f"{path}: {found}, not {wanted}"]
    return [line for at, a, b in inner for line in apart(a, b, rel, absolute, at)]


@pytest.mark.parametrize("stage", STAGES)
def test_a_stage(world: None, recorded: dict[str, Any], stage: str) -> None:
    found, wanted = trained(stage), recorded["stages"][stage]
    assert list(found["tensors"]) == list(wanted["tensors"])
    apart_by = 1 if recorded["fingerprint"]["torch"] == torch.__version__ else OTHER_TORCH
    for name, (shape, magnitude, total) in wanted["tensors"].items():
        own = found["tensors"][name]
        assert own[0] == shape, name
        slack = apart_by * RTOL * magnitude + NOISE * max(1, int(np.prod(shape))) ** 0.5
        assert abs(own[1] - magnitude) <= slack and abs(own[2] - total) <= slack, (name, own)
    assert apart(found["losses"], wanted["losses"], 5 * apart_by * RTOL, 1e-3) == []


def test_predict(world: None, recorded: dict[str, Any]) -> None:
    found, wanted = predicted(), recorded["predict"]
    for own, row in zip(found["annotations"], wanted["annotations"], strict=True):
        assert (own["image_id"], own["file_name"]) == (row["image_id"], row["file_name"])
        pairs = list(zip(own["segments_info"], row["segments_info"], strict=True))
        assert pairs and all(
            a["id"] == b["id"] and a["name"] == b["name"] and abs(a["score"] - b["score"]) < 0.02
            and abs(a["area"] - b["area"]) <= max(3, 0.03 * b["area"])
            for a, b in pairs
        )  # fmt: skip


def test_evaluate(world: None, recorded: dict[str, Any]) -> None:
    """The built-in weights; what hardly trained ones are sure of is rounding (see `test_bits`)."""
    assert apart(scored("built-in"), recorded["evaluate"]["built-in"], 1e-2, 5e-3) == []


def test_bits(world: None, recorded: dict[str, Any]) -> None:
    """Weights, pixels and figures to the last bit, on the machine that recorded them."""
    there, here = recorded["fingerprint"], fingerprint()
    other = [f"{key} is {here[key]}, was {there[key]}" for key in there if here[key] != there[key]]
    if other:
        pytest.skip("; ".join(other))
    found = {
        "stages": {stage: trained(stage)["digest"] for stage in STAGES},
        "predict": predicted(),
        "evaluate": {stage: scored(stage) for stage in SCORED},
    }
    digests = {stage: wanted["digest"] for stage, wanted in recorded["stages"].items()}
    wanted = {"stages": digests, "predict": recorded["predict"], "evaluate": recorded["evaluate"]}
    assert apart(found, wanted, 0, 0) == []


def record() -> None:
    """Writes `snapshots.json` anew: a tensor, a step or a picture a line."""
    torch.set_num_threads(1)
    found: dict[str, Any] = {
        "fingerprint": fingerprint(),
        "predict": predicted(),
        "evaluate": {stage: scored(stage) for stage in SCORED},
        "stages": {stage: trained(stage) for stage in STAGES},
    }

    def written(value: Any, depth: int = 0) -> str:
        line = json.dumps(value)
        if len(line) <= 200 or not isinstance(value, dict | list):
            return line
        inner, pad = [], " " * (depth + 1)
        if isinstance(value, dict):
            inner = [f"{json.dumps(key)}: {written(v, depth + 1)}" for key, v in value.items()]
        else:
            inner = [written(v, depth + 1) for v in value]
        ends = "{}" if isinstance(value, dict) else "[]"
        return f"{ends[0]}\n{pad}" + f",\n{pad}".join(inner) + f"\n{' ' * depth}{ends[1]}"

    FILE.write_text(written(found) + "\n", encoding="utf-8")


if __name__ == "__main__":
    assert sys.argv[1:] == ["--record"], "usage: python tests/test_snapshots.py --record"
    with tempfile.TemporaryDirectory() as folder:
        os.environ["CONCAT_CACHE"] = str(Path(folder) / "cache")
        os.chdir(folder)
        draw()
        record()
        os.chdir("/")
