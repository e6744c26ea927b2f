"""What `prepare_data` tests share: a data set in COCO's official layout, and how it is prepared."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from data_helpers import official_part, write_part

from concat_cli.core.prepare.run import Options, Report, prepare_data
from concat_cli.core.progress import SILENT, Progress

CAT, COW, SKY, WALL = 3, 7, 20, 21


def write_split(tmp_path: Path) -> str:
    """A class split in which cows are unseen."""
    path = tmp_path / "no_cow.yaml"
    path.write_text("unseen: [cow]\n")
    return str(path)


def draw_root(tmp_path: Path) -> Path:
    """20 training images, of which every fourth holds a cow, and 4 val images."""
    root = tmp_path / "coco"
    train = {i: [CAT, COW if i % 4 == 0 else WALL] for i in range(1, 21)}
    write_part(official_part(root, "train"), train)
    write_part(official_part(root, "val"), {100: [CAT], 101: [COW], 102: [SKY, COW], 103: []})
    return root


def coco(
    root: Path,
    split: str = "all_seen",
    out: Path | None = None,
    progress: Progress = SILENT,
    **how: Any,
) -> Report:
    return prepare_data("coco", root, out, Options(split, processes=1, **how), progress)


def contents(folder: Path, *but: str) -> dict[str, bytes]:
    """Every file below a folder; `but` leaves out those of these folders."""
    names = sorted(str(p.relative_to(folder)) for p in folder.rglob("*") if p.is_file())
    return {n: (folder / n).read_bytes() for n in names if n.split("/")[0] not in but}
