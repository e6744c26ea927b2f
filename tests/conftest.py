"""What every test gets: one thread, and caches in a folder of its own."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path

import pytest

os.environ.setdefault("OMP_NUM_THREADS", "1")  # before torch is imported; tests run side by side


@pytest.fixture(scope="session", autouse=True)
def own_cache(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """Text embeddings are cached below this folder, not in the home directory."""
    folder = tmp_path_factory.mktemp("cache")
    before = os.environ.get("CONCAT_CACHE")
    os.environ["CONCAT_CACHE"] = str(folder)
    yield folder
    if before is None:
        del os.environ["CONCAT_CACHE"]
    else:
        os.environ["CONCAT_CACHE"] = before
