"""What several test files share: one miniature world, and one run of all stages on it."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
from mini import MiniRun, draw_world, mini_config

from concat_cli.core.runs import Run


@pytest.fixture(scope="session", autouse=True)
def own_cache(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """No test reads or fills the user's cache of text embeddings."""
    with pytest.MonkeyPatch.context() as patch:
        folder = tmp_path_factory.mktemp("cache")
        patch.setenv("CONCAT_CACHE", str(folder))
        yield folder


@pytest.fixture(scope="session")
def mini_world(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A prepared data set of a few small scenes, default split."""
    return draw_world(tmp_path_factory.mktemp("world") / "shapes")


@pytest.fixture(scope="session")
def mini_run(mini_world: Path, tmp_path_factory: pytest.TempPathFactory) -> MiniRun:
    """All three stages, trained once; not to be changed by tests."""
    from concat_cli.methods.concat.cat import train_cat
    from concat_cli.methods.concat.con import train_con
    from concat_cli.methods.concat.finetune import finetune

    cfg = mini_config(mini_world, "optim.preview_every=3", "optim.eval_every=3")
    run = Run("mini", tmp_path_factory.mktemp("runs"))
    for stage in (train_con, train_cat, finetune):
        assert stage(cfg, run, device="cpu").finished
    return MiniRun(cfg, run)
