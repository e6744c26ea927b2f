"""What several test files share: one miniature world, and one run of all stages on it.

Nothing heavy is imported here, as the process that only hands out the tests imports this as well.
"""

from __future__ import annotations

import copy
import functools
import os
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest
from filelock import FileLock
from hypothesis import HealthCheck, settings

if TYPE_CHECKING:
    from mini import MiniRun

# The tests run side by side, as do the processes that they start.
os.environ.setdefault("OMP_NUM_THREADS", "1")
# A busy machine is slow at times; that says nothing about what is tested.
settings.register_profile("busy", deadline=None, suppress_health_check=[HealthCheck.too_slow])
settings.load_profile("busy")


@pytest.fixture(scope="session", autouse=True)
def own_cache(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """No test reads or fills the user's cache of text embeddings."""
    with pytest.MonkeyPatch.context() as patch:
        folder = tmp_path_factory.mktemp("cache")
        patch.setenv("CONCAT_CACHE", str(folder))
        yield folder


@pytest.fixture(scope="session", autouse=True)
def built_in_clip_is_made_once() -> Iterator[None]:
    """A process makes the built-in CLIP's untrained model, its tokenizer and its rows of unknown
    tokens once; the trained weights are read from their file each time."""
    open_clip = sys.modules.get("open_clip")
    if open_clip is None:  # none of the tests needs it
        yield
        return
    from concat_cli.core.clip import tiny

    source = f"local-dir:{tiny.FOLDER}"
    rows = functools.lru_cache(4)(tiny.unknown_rows)
    tokenizer = open_clip.get_tokenizer
    tokenizer_of_tiny = functools.cache(lambda: tokenizer(source))
    model = open_clip.create_model
    model_of_tiny = functools.cache(lambda: model(source, load_weights=False))

    def create_model(name: str, *arguments: Any, **named: Any) -> Any:
        if name == source and not arguments and named == {"load_weights": False}:
            return copy.deepcopy(model_of_tiny())
        return model(name, *arguments, **named)

    def get_tokenizer(name: str, *arguments: Any, **named: Any) -> Any:
        alone = name == source and not arguments and not named
        return tokenizer_of_tiny() if alone else tokenizer(name, *arguments, **named)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(open_clip, "create_model", create_model)
        patch.setattr(open_clip, "get_tokenizer", get_tokenizer)
        patch.setattr(tiny, "unknown_rows", lambda *size: rows(*size).clone())
        yield


def made_for_all(
    factory: pytest.TempPathFactory, name: str, make: Callable[[Path], object]
) -> Path:
    """The folder that `make` fills, once for all processes that tests run in side by side."""
    own = factory.getbasetemp()
    folder = (own.parent if "PYTEST_XDIST_WORKER" in os.environ else own) / "made" / name
    folder.mkdir(parents=True, exist_ok=True)
    with FileLock(folder.with_suffix(".lock")):
        if not (folder / "finished").exists():
            make(folder)
            (folder / "finished").touch()
    return folder


@pytest.fixture(scope="session")
def mini_world(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A prepared data set of a few small scenes, default split; not to be changed by tests."""
    from mini import draw_world

    def draw(folder: Path) -> None:
        draw_world(folder / "shapes")

    return made_for_all(tmp_path_factory, "world", draw) / "shapes"


@pytest.fixture(scope="session")
def mini_run(mini_world: Path, tmp_path_factory: pytest.TempPathFactory) -> MiniRun:
    """All three stages, trained once; not to be changed by tests."""
    from mini import MiniRun, mini_config

    from concat_cli.core.runs import Run
    from concat_cli.methods.concat.cat import train_cat
    from concat_cli.methods.concat.con import train_con
    from concat_cli.methods.concat.finetune import finetune

    cfg = mini_config(mini_world, "optim.preview_every=3", "optim.eval_every=3")

    def train(folder: Path) -> None:
        for stage in (train_con, train_cat, finetune):
            assert stage(cfg, Run("mini", folder), device="cpu").finished

    return MiniRun(cfg, Run("mini", made_for_all(tmp_path_factory, "runs", train)))
