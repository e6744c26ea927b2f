"""Damaged input ends in success or in a UserError that names the file: no traceback, no hang.

200 inputs in `make test`; `make fuzz` tries ten times as many.
"""

from __future__ import annotations

import json
import os
import random
import shutil
import sys
import zipfile
from collections.abc import Callable, Iterator
from datetime import timedelta
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from data_helpers import official_part, write_part
from fuzz_helpers import (
    INSTANCES,
    fresh_copy,
    prepare_and_read,
    read_all,
    survives,
    write_instances,
)
from fuzz_mutations import mutated_bytes, mutated_json
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from PIL import Image
from scipy.io import savemat

from concat_cli.core.prepare.run import Options, prepare_data
from concat_cli.core.vocabulary_file import parse_vocabulary

TIMES = int(os.environ.get("FUZZ_TIMES", "1"))
GIB = 1 << 20  # in KiB, as ru_maxrss is, but on macOS: there it is in bytes

Rng = random.Random


def examples(count: int) -> Callable[[Any], Any]:
    """So many inputs, times `FUZZ_TIMES`; one that takes 20 seconds counts as a hang."""
    return settings(
        max_examples=count * TIMES,
        deadline=timedelta(seconds=20),
        derandomize=TIMES == 1,
        database=None,
        suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow],
    )


@pytest.fixture(autouse=True, scope="module")
def memory() -> Iterator[None]:
    """All of it stays within 1 GiB on top of what importing took."""
    if sys.platform == "win32":  # which does not tell the peak of a process
        yield
        return
    import resource

    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    yield
    grown = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before
    assert grown / (1024 if sys.platform == "darwin" else 1) < GIB


@pytest.fixture(scope="module")
def coco(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A small data set in COCO's layout."""
    root = tmp_path_factory.mktemp("coco")
    write_part(official_part(root, "train"), {1: [3, 20], 2: [3, 21], 3: [20]})
    write_part(official_part(root, "val"), {4: [3, 7, 20]})
    return root


@pytest.fixture(scope="module")
def work(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder that every input writes over."""
    return tmp_path_factory.mktemp("work")


@examples(40)
@given(seed=st.integers(0, 2**32))
def test_panoptic_json(coco: Path, work: Path, seed: int) -> None:
    root, rng = fresh_copy(coco, work / "a"), Rng(seed)
    path = official_part(root, rng.choice(("train", "val"))).index
    path.write_text(mutated_json(json.loads(path.read_text()), rng))
    survives(lambda: prepare_and_read(root), path.name, ".png", str(root))


@examples(15)
@given(seed=st.integers(0, 2**32))
def test_bytes_of_the_json(coco: Path, work: Path, seed: int) -> None:
    root, rng = fresh_copy(coco, work / "b"), Rng(seed)
    path = official_part(root, "train").index
    path.write_bytes(mutated_bytes(path.read_bytes(), rng))
    survives(lambda: prepare_and_read(root), path.name, ".png", str(root))


@examples(25)
@given(seed=st.integers(0, 2**32))
def test_bytes_of_images_and_id_pngs(coco: Path, work: Path, seed: int) -> None:
    root, rng = fresh_copy(coco, work / "c"), Rng(seed)
    part = official_part(root, "train")
    folder = rng.choice((part.images, part.labels))
    path = rng.choice(sorted(Path(folder).glob("*.png")))
    path.write_bytes(mutated_bytes(path.read_bytes(), rng))
    survives(lambda: prepare_and_read(root), path.name)


@examples(15)
@given(seed=st.integers(0, 2**32))
def test_pngs_of_other_kinds(coco: Path, work: Path, seed: int) -> None:
    """Modes and sizes that a panoptic PNG may not have."""
    root, rng = fresh_copy(coco, work / "d"), Rng(seed)
    path = rng.choice(sorted(Path(official_part(root, "train").labels).glob("*.png")))
    mode = rng.choice(("L", "P", "I;16", "RGBA", "RGB", "1", "LA"))
    size = (rng.choice((1, 31, 32, 33, 3000)), rng.choice((1, 24, 25)))
    Image.new(mode, size, rng.choice((0, 1))).save(path)
    survives(lambda: prepare_and_read(root), path.name)


@examples(20)
@given(seed=st.integers(0, 2**32))
def test_zip_archives(coco: Path, work: Path, seed: int) -> None:
    root, rng = fresh_copy(coco, work / "e"), Rng(seed)
    folder, archive = root / "train2017", root / "train2017.zip"
    with zipfile.ZipFile(archive, "w", rng.choice((0, 8))) as file:
        for path in sorted(folder.iterdir()):
            file.write(path, f"{rng.choice(('train2017', 'train2017', '..', 'x'))}/{path.name}")
    shutil.rmtree(folder)
    if rng.random() < 0.7:
        archive.write_bytes(mutated_bytes(archive.read_bytes(), rng))
    survives(lambda: prepare_and_read(root), archive.name, "train2017")


@pytest.fixture(scope="module")
def instances(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A small data set of COCO instances."""
    return write_instances(tmp_path_factory.mktemp("instances"))


@examples(25)
@given(seed=st.integers(0, 2**32))
def test_instances_json(instances: Path, work: Path, seed: int) -> None:
    root, rng = fresh_copy(instances, work / "f"), Rng(seed)
    path = root / "annotations" / "instances_train2017.json"
    path.write_text(mutated_json(json.loads(path.read_text()), rng))
    survives(lambda: prepare_and_read(root, "custom", **INSTANCES), path.name, ".jpg", str(root))


WORDS = st.text(st.characters(exclude_categories=()), max_size=60)
LISTS = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | WORDS,
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(WORDS, inner, max_size=3),
    max_leaves=8,
)


@examples(15)
@given(
    data=st.one_of(
        st.binary(max_size=300),
        WORDS.map(lambda text: text.encode("utf-8", "surrogatepass")),
        LISTS.map(lambda value: json.dumps(value).encode()),
    ),
    ending=st.sampled_from((".txt", ".yaml", ".json")),
)
def test_vocabularies(work: Path, data: bytes, ending: str) -> None:
    path = work / f"classes{ending}"
    path.write_bytes(data)
    survives(lambda: parse_vocabulary(path), path.name)


@examples(5)
@given(seed=st.integers(0, 2**32))
def test_vocabularies_that_were_whole(work: Path, seed: int) -> None:
    path = work / "whole.txt"
    text = "cat, kitten\nsky : stuff\n# comment\nroad, street : stuff\ntraffic light\n"
    path.write_bytes(mutated_bytes(text.encode(), Rng(seed)))
    survives(lambda: parse_vocabulary(path), path.name)


@examples(5)
@given(seed=st.integers(0, 2**32))
def test_class_splits(coco: Path, work: Path, seed: int) -> None:
    root, rng = fresh_copy(coco, work / "g"), Rng(seed)
    path = work / "mine.yaml"
    text = "unseen: [cow]\ncounts: {seen: 3, unseen: 1}\nallow_missing: true\n"
    path.write_bytes(mutated_bytes(text.encode(), rng))
    options = Options(class_split=str(path), unseen_pixels="void", processes=1)
    survives(lambda: prepare_data("coco", root, root / "out", options), "mine", ".json")


@pytest.fixture(scope="module")
def maps(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A small data set of label maps, grey and MATLAB's, and the list of their classes."""
    root = tmp_path_factory.mktemp("maps")
    rng = np.random.default_rng(0)
    for kind in ("grey", "mat", "images"):
        (root / kind).mkdir()
    for number in range(3):
        values = rng.integers(0, 3, (24, 32)).astype(np.uint8)
        Image.fromarray(values).save(root / "grey" / f"{number}.png")
        savemat(root / "mat" / f"{number}.mat", {"LabelMap": values}, do_compression=number > 0)
        Image.fromarray(values.repeat(3).reshape(24, 32, 3)).save(root / "images" / f"{number}.jpg")
    (root / "classes.txt").write_text("road : stuff = 0\ncar, automobile = 1\nvoid = 2\n")
    return root


@examples(25)
@given(seed=st.integers(0, 2**32))
def test_label_maps_and_their_classes(maps: Path, work: Path, seed: int) -> None:
    root, rng = fresh_copy(maps, work / "h"), Rng(seed)
    kind = rng.choice(("grey", "mat"))
    path = rng.choice([*sorted((root / kind).iterdir()), root / "classes.txt"])
    path.write_bytes(mutated_bytes(path.read_bytes(), rng))
    given = {"images": "images", "labels": kind, "classes": "classes.txt"}
    names = [path.name] if path.suffix != ".txt" else [path.name, ".png", ".mat"]
    survives(lambda: prepare_and_read(root, "custom", **given), *names)


@examples(20)
@given(seed=st.integers(0, 2**32))
def test_what_prepare_has_written(coco: Path, work: Path, seed: int) -> None:
    """Its header, its index, and its record of what was checked, which is made anew."""
    root, rng = fresh_copy(coco, work / "i"), Rng(seed)
    prepare_and_read(root)
    path = rng.choice(sorted(path for path in (root / "out").rglob("*.json*")))
    if path.suffix == ".json" and rng.random() < 0.6:
        path.write_text(mutated_json(json.loads(path.read_text()), rng))
    elif path.suffix == ".jsonl" and rng.random() < 0.5:
        lines = path.read_text().splitlines()
        place = rng.randrange(len(lines))
        lines[place] = mutated_json(json.loads(lines[place]), rng)
        path.write_text("\n".join(lines) + "\n")
    else:
        path.write_bytes(mutated_bytes(path.read_bytes(), rng))
    survives(lambda: read_all(root / "out"), path.name, ".png", str(root))
    survives(lambda: prepare_and_read(root), path.name)
