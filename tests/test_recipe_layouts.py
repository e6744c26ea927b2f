"""Each layout of the field's data sets is found, and read back as it was drawn, pixel by pixel."""

from __future__ import annotations

from collections import Counter
from pathlib import Path

import pytest
from drawn_files import Segments, Truth
from drawn_layouts import CASES, Case

from concat_cli.core.data.dataset import PanopticDataset, Sample, read_dataset_info
from concat_cli.core.data.index import read_records
from concat_cli.core.data.store import open_store
from concat_cli.core.prepare.recipes import RECIPES
from concat_cli.core.prepare.run import Options, prepare
from concat_cli.core.vocabulary import Vocabulary


@pytest.fixture(params=CASES, ids=lambda name: name.replace(" ", "_"))
def drawn(request: pytest.FixtureRequest, tmp_path: Path) -> tuple[Case, Path, Truth]:
    """A case, where it is drawn, and its truth."""
    case = CASES[request.param]
    return case, tmp_path / "data", case.draw(tmp_path / "data")


def test_found_and_read_back(drawn: tuple[Case, Path, Truth]) -> None:
    case, root, truth = drawn
    source = RECIPES[case.recipe].find(root, **case.options)
    assert source.layout == case.layout and source.tasks == case.tasks
    assert set(source.parts) == set(truth)
    for name, part in source.parts.items():
        items = list(part.items)
        assert sorted(item.image.rpartition("/")[2] for item in items) == sorted(truth[name])
        assert len({item.image_id for item in items}) == len(items)
        images = open_store(part.images)
        assert all(images.stamp(item.image) for item in items)
    # prepared with all classes seen, so that nothing is dropped
    out = root / "concat"
    prepare(source, root, out, Options(class_split="all_seen", dev=1, processes=1, one_part=True))
    info = read_dataset_info(out)
    assert info.vocabulary.ids == source.vocabulary.ids
    compared = Counter()
    for name in info.parts:
        dataset = PanopticDataset(info.part(name), info.vocabulary, keep_crowd=True)
        known = truth["val" if name == "val" and "val" in truth else next(iter(truth))]
        for sample in dataset:
            wanted = known[sample.file_name.rpartition("/")[2]]
            assert as_set(segments_of(sample, info.vocabulary)) == as_set(wanted), sample.file_name
            assert sample.image.shape == (48, 64, 3)
            compared[name] += 1
    assert compared["train"] + compared["dev"] == len(truth.get("train", truth["val"]))
    assert compared["val"] == len(truth["val"])
    # with its own split: no unseen class is listed for training, and all images are there
    options = Options(source.default_split, "void", dev=1, processes=1, one_part=True)
    report = prepare(source, root, root / "void", options)
    info = read_dataset_info(root / "void")
    assert info.class_split == report.class_split and info.protocol["unseen_pixels"] == "void"
    unseen = set(info.vocabulary.unseen_indices)
    for part in ("train", "dev"):
        records = read_records(info.part(part).index, info.vocabulary)
        assert len(records) == compared[part]
        assert all(unseen.isdisjoint(record.labels.tolist()) for record in records)


def segments_of(sample: Sample, vocabulary: Vocabulary) -> Segments:
    """The sample's segments with the data's ids."""
    return [
        (vocabulary.ids[label], bool(crowd), sample.segment_map == i + 1)
        for i, (label, crowd) in enumerate(zip(sample.labels, sample.crowd, strict=True))
    ]


def as_set(segments: Segments) -> set[tuple[int, bool, bytes]]:
    return {(category, crowd, mask.tobytes()) for category, crowd, mask in segments}
