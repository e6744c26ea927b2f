"""A miniature world and a miniature configuration, in which every stage takes seconds."""

from __future__ import annotations

import json
import os
import socket
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
import torch
import torch.multiprocessing as mp
from torch import Tensor

from concat_cli.core.checkpoint import load_state
from concat_cli.core.config import Config, ShapesConfig
from concat_cli.core.config_file import load_config
from concat_cli.core.data.dataset import Sample
from concat_cli.core.prepare.shapes import prepare_shapes
from concat_cli.core.progress import SILENT, Silent
from concat_cli.core.runs import Run, StageDir
from concat_cli.core.train.distributed import Processes
from concat_cli.core.train.session import Session
from concat_cli.methods.concat.query_bank import QueryBank

T = TypeVar("T")

KEYS = """
data.crop=64 infer.size=64 infer.batch=8 optim.precision=fp32
model.width=32 model.mask_width=32 model.heads=4 model.queries=10
model.encoder_ffn=32 model.decoder_ffn=32 model.decoder_layers=2
loss.points=64 loss.dense=1 loss.denoising=3
align.image=0.1 align.instance=1 align.bank=32 align.crops=3
warmup.steps=2 warmup.masks=1 optim.steps=6 optim.batch_size=2 optim.per_device=2 optim.warmup=2
optim.ema=0.9
optim.save_every=100 optim.log_every=1 optim.preview_every=0
cat.steps=6 cat.primitives=8 cat.ffn=32 cat.heads=4 cat.layers=1 cat.batch=16 cat.negatives=16
cat.eval_every=3 cat.fold=3 finetune.steps=4 finetune.batch=16 finetune.pseudo_per_class=2
""".split()


def draw_world(root: Path, **options: Any) -> Path:
    """A few small scenes; `options` are of `ShapesConfig`."""
    defaults: dict[str, Any] = {"train": 24, "dev": 8, "val": 12, "size": 64}
    prepare_shapes(root, ShapesConfig(**(defaults | options)), processes=1)
    return root


def mini_config(world: Path, *keys: str) -> Config:
    """The miniature configuration on a world, if it is there as it was drawn, with overrides."""
    header = world / "dataset.json"
    source = json.loads(header.read_text())["source"] if header.exists() else {}
    drawn = [f"shapes.{key}={value}" for key, value in source.items() if key != "world"]
    return load_config(None, [f"data.root={world}", *drawn, *KEYS, *keys])


@dataclass(frozen=True)
class MiniRun:
    """A finished run of all three stages."""

    cfg: Config
    run: Run


class KilledError(Exception):
    """What `Interrupt` raises: stands for a process that dies."""


class Interrupt(Silent):
    """Raises before item `at` (0-based) of the `call`-th loop whose label begins with `what`."""

    def __init__(self, what: str, at: int, call: int = 0) -> None:
        self.what, self.at, self.call, self.calls = what, at, call, 0

    def track(self, items: Iterable[T], what: str, total: int | None = None) -> Iterator[T]:
        here = False
        if what.startswith(self.what):
            here, self.calls = self.calls == self.call, self.calls + 1
        for number, item in enumerate(items):
            if here and number == self.at:
                raise KilledError
            yield item


class Heard(Silent):
    """Keeps what was said."""

    def __init__(self) -> None:
        self.lines: list[str] = []

    def say(self, message: str) -> None:
        self.lines.append(message)


def flat_state(stage: StageDir) -> dict[str, Any]:
    """Everything a loop resumes from, less the seconds it took, by path."""
    flat: dict[str, Any] = {}

    def walk(value: Any, path: str) -> None:
        if isinstance(value, dict):
            for key, inner in value.items():
                walk(inner, f"{path}/{key}")
        elif isinstance(value, (list, tuple)):
            for number, inner in enumerate(value):
                walk(inner, f"{path}/{number}")
        elif path != "/seconds":
            flat[path] = value

    walk(load_state(stage.state), "")
    return flat


def same(a: dict[str, Any], b: dict[str, Any]) -> list[str]:
    """The keys whose values are not bit for bit equal."""
    keys = sorted(set(a) | set(b))
    return [key for key in keys if key not in a or key not in b or not _equal(a[key], b[key])]


def _equal(a: Any, b: Any) -> bool:
    if isinstance(a, Tensor) and isinstance(b, Tensor):
        return a.dtype == b.dtype and torch.equal(a, b)
    return type(a) is type(b) and a == b


def metrics(stage: StageDir) -> list[dict[str, Any]]:
    """The lines of metrics.jsonl without the seconds."""
    return [{k: v for k, v in row.items() if k != "seconds"} for row in stage.read_metrics()]


def planted_bank(
    classes: int = 6, width: int = 8, images: int = 40, queries: int = 10, seed: int = 0
) -> QueryBank:
    """A bank of well-separated classes: query = 3 x (direction of its class) + noise."""
    rng = np.random.default_rng(seed)
    held = rng.integers(-1, classes, (images, queries))
    held[rng.random(held.shape) < 0.05] = -2
    directions = np.random.default_rng(99).normal(size=(classes + 1, width))
    directions[-1] = 0
    values = 3 * directions[np.where(held >= 0, held, classes)]
    values = values + 0.3 * rng.normal(size=(images, queries, width))
    return QueryBank(values.astype(np.float16), held.astype(np.int16))


def scene(labels: list[int], size: int = 8, seed: int = 0) -> Sample:
    """Random segments of one pixel each and void."""
    rng = np.random.default_rng(seed)
    segment_map = rng.integers(0, len(labels) + 1, (size, size), dtype=np.int32)
    image = rng.integers(0, 256, (size, size, 3)).astype(np.uint8)
    crowd = np.zeros(len(labels), bool)
    return Sample(image, segment_map, np.array(labels, np.int64), crowd, seed, f"{seed}.png")


def free_port() -> int:
    """A port that nobody listens on, for processes to meet at."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def in_two_processes(work: Callable[..., None], *arguments: Any) -> None:
    """`work(*arguments)` in each of two processes that find each other as under `torchrun`.

    They are forked, as a new interpreter would import for seconds what is here already.
    """
    together = (free_port(), work, arguments)
    mp.start_processes(_one_of_two, together, nprocs=2, start_method="fork")


def _one_of_two(
    rank: int, port: int, work: Callable[..., None], arguments: tuple[Any, ...]
) -> None:
    os.environ |= {
        "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "WORLD_SIZE": "2",
        "RANK": str(rank), "LOCAL_RANK": str(rank),
    }  # fmt: skip
    torch.set_num_threads(1)
    work(*arguments)


def alone(processes: Processes = Processes()) -> Session:  # noqa: B008
    """The surroundings of a loop that needs neither data nor configuration."""
    nothing: Any = None
    return Session(nothing, nothing, torch.device("cpu"), None, processes, SILENT)
