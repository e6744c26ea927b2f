"""An index is a line an image: read back as written, lazily, also by other processes."""

from __future__ import annotations

import pickle
from pathlib import Path

import numpy as np
import pytest
from data_helpers import VOCABULARY
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from concat_cli.core.data.index import Lines, Row, read_records, write_rows
from concat_cli.core.errors import UserError

CATEGORIES = st.sampled_from(VOCABULARY.ids)


@st.composite
def rows(draw: st.DrawFn, number: int) -> Row:
    count = draw(st.integers(0, 5))
    ids = sorted(draw(st.sets(st.integers(1, 1 << 23), min_size=count, max_size=count)))
    some = st.lists(st.integers(0, 1), min_size=count, max_size=count)
    return Row(
        number,
        draw(st.text(min_size=1, max_size=8)),
        draw(st.text(max_size=8)),
        draw(st.integers(1, 4000)),
        draw(st.integers(1, 4000)),
        ids,
        draw(st.lists(CATEGORIES, min_size=count, max_size=count)),
        draw(some),
        draw(st.lists(st.integers(1, 9999), min_size=count, max_size=count)),
        hidden=draw(st.integers(0, 3)),
    )


@settings(
    max_examples=15, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
@given(data=st.data(), count=st.integers(0, 6))
def test_rows_are_read_back_as_written(tmp_path: Path, data: st.DataObject, count: int) -> None:
    written = [data.draw(rows(number)) for number in range(count)]
    path = tmp_path / "a.jsonl"
    write_rows(path, written)
    lines = Lines(path)
    assert list(lines) == written and len(lines) == count
    records = pickle.loads(pickle.dumps(read_records(path, VOCABULARY)))
    for record, row in zip(records, written, strict=True):
        assert record.ids.tolist() == row.ids and record.crowd.tolist() == list(
            map(bool, row.crowd)
        )
        assert [VOCABULARY.ids[label] for label in record.labels] == row.categories
        assert (record.image_id, record.file_name, record.hidden) == (row.id, row.image, row.hidden)


def test_nothing_is_parsed_before_it_is_asked_for(tmp_path: Path) -> None:
    path = tmp_path / "a.jsonl"
    write_rows(path, [Row(i, f"{i}.jpg", "", 4, 4, [1], [3], [0], [9]) for i in range(50)])
    text = path.read_text().replace('{"id": 30,', '{"id": 30;')
    path.write_text(text)
    records = read_records(path, VOCABULARY)
    assert len(records) == 50 and records[29].image_id == 29 and records[-1].image_id == 49
    with pytest.raises(UserError, match=r"a\.jsonl:31 is damaged"):
        records[30]
    with pytest.raises(IndexError):
        records[50]


def test_damage_is_named(tmp_path: Path) -> None:
    path = tmp_path / "a.jsonl"
    with pytest.raises(UserError, match="No such file"):
        Lines(path)
    path.write_text('{"id": 1')
    with pytest.raises(UserError, match="ends within a line"):
        Lines(path)
    path.write_text('{"id": 1, "image": "a", "label": "", "height": 1, "width": 1, "ids": [1]}\n')
    with pytest.raises(UserError, match="differ in length"):
        Lines(path)[0]
    path.write_text('{"id": 1, "colour": "a"}\n')
    with pytest.raises(UserError, match=r"a\.jsonl:1 is damaged"):
        Lines(path)[0]
    write_rows(path, [Row(1, "a", "", 4, 4, [1], [999], [0], [9])])
    with pytest.raises(UserError, match="unknown category 999"):
        read_records(path, VOCABULARY)[0]


def test_a_digest_tells_two_indices_apart(tmp_path: Path) -> None:
    digests = set()
    for number, categories in enumerate(([3], [7], [3])):
        path = tmp_path / f"{number}.jsonl"
        write_rows(path, [Row(1, "a", "", 4, 4, [1], categories, [0], [9])])
        digests.add(Lines(path).digest())
    assert len(digests) == 2


def test_opening_is_quick(tmp_path: Path) -> None:
    """A tenth of COCO's images, in a tenth of a second of the processor."""
    import time

    row = Row(1, "000000000139.jpg", "000000000139.png", 426, 640, [9] * 11, [3] * 11, [0] * 11)
    line = Row(*(getattr(row, name) for name in row.__slots__[:8]), areas=[999] * 11).line() + "\n"
    path = tmp_path / "a.jsonl"
    path.write_text(line * 11_829)
    start = time.process_time()
    records = read_records(path, VOCABULARY)
    assert len(records) == 11_829 and time.process_time() - start < 0.1
    assert np.array_equal(records[11_828].labels, [0] * 11)
