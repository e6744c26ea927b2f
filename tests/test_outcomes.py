"""What became of segments: each kind drawn once, the sums those of PQ, pictures of the few kept."""

from __future__ import annotations

import pickle

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from concat_cli.core.evaluate.page.findings import KEPT, Findings
from concat_cli.core.evaluate.page.outcomes import OUTCOMES, Overlap, outcome_of
from concat_cli.core.evaluate.page.pictures import MOST_BYTES, MOST_RUNS, Picture, picture_of
from concat_cli.core.evaluate.quality import PanopticScore, overlaps
from concat_cli.core.vocabulary import ClassEntry, Vocabulary

VOCABULARY = Vocabulary(tuple(ClassEntry(name, i) for i, name in enumerate("abc")))
NOTHING = Picture(None, (1, 1), (0, 1), (0, 1))


def overlap(truth: str, found: str, labels=(), named=(), crowd=()) -> Overlap:
    """Of two rows of digits."""
    one, other = (np.array([list(map(int, row))]) for row in (truth, found))
    n, m = int(one.max()), int(other.max())
    real = np.array([*labels, *[0] * n][:n], int)
    theirs = np.array([*named, *[0] * m][:m], int)
    odd = np.array([*crowd, *[False] * n][:n], bool)
    return Overlap(overlaps(one, other, n, m), real, odd, theirs)


def words(values) -> list[str]:
    return [OUTCOMES[v] if v >= 0 else "crowd" for v in values]


@pytest.mark.parametrize(
    ("truth", "found", "true", "predicted", "how"),
    [
        ("1111", "1110", ["right"], ["right"], {}),
        ("1111", "1110", ["misnamed"], ["misnamed"], {"named": [1]}),
        ("1122", "1111", ["merged", "merged"], ["merged"], {}),
        ("1112", "1111", ["right", "merged"], ["right"], {}),
        ("1111", "1122", ["split"], ["split", "split"], {}),
        ("11110", "01220", ["split"], ["split", "split"], {}),
        ("1111000", "0001111", ["loose"], ["loose"], {}),
        ("11112222222", "00011122222", ["loose", "right"], ["loose", "right"], {}),
        ("1110", "0000", ["missed"], [], {}),
        ("1111111111111111111122", "0" * 19 + "122", ["missed", "right"],
         ["hallucinated", "right"], {}),
        ("1111", "1111", ["crowd"], ["ignored"], {"crowd": [True]}),
        ("0000", "0110", [], ["ignored"], {}),
    ],
)  # fmt: skip
def test_each_kind(truth, found, true, predicted, how):
    got = outcome_of(overlap(truth, found, **how))
    assert (words(got.true), words(got.found)) == (true, predicted)


rows = st.text("012345", min_size=40, max_size=40)


@given(rows, rows, st.integers(0, 5))
def test_the_sums_are_those_of_pq(truth, found, seed):
    rng = np.random.default_rng(seed)
    image = overlap(truth, found, rng.integers(0, 3, 9), rng.integers(0, 3, 9), rng.random(9) < 0.2)
    score, findings = PanopticScore(3), Findings(VOCABULARY)
    score.add_shared(image.shared, image.named, image.labels, image.crowd)
    findings.add(0, "x", image, lambda: NOTHING)
    assert findings.sizes.sum(1) == pytest.approx(score.counts.sum(1))
    right = findings.outcomes[OUTCOMES.index("right")]
    assert right.tolist() == score.counts[1].tolist()
    truths = findings.outcomes[: OUTCOMES.index("hallucinated")].sum()
    assert truths == (~image.crowd).sum()


def test_pictures_of_the_few_are_kept_and_of_two_processes_the_same():
    """Made only where they are wanted; merged, they are those of one process."""
    rng = np.random.default_rng(0)
    images = []
    for _ in range(300):
        one, other = (rng.integers(0, 4, (1, 30)) for _ in range(2))
        labels = np.zeros(3, int)
        images.append(Overlap(overlaps(one, other, 3, 3), labels, labels > 0, labels))
    whole, parts, made = Findings(VOCABULARY), [Findings(VOCABULARY) for _ in range(2)], []

    def picture() -> Picture:
        made.append(1)
        return NOTHING

    for number, image in enumerate(images):
        whole.add(number, str(number), image, picture)
        parts[number % 2].add(number, str(number), image, lambda: NOTHING)
    assert 2 * KEPT <= len(made) < 150
    parts[0].merge(pickle.loads(pickle.dumps(parts[1])))
    for kept in ("best", "worst"):
        numbers = [[one.number for one in getattr(f, kept)] for f in (whole, parts[0])]
        assert numbers[0] == numbers[1] and len(numbers[0]) == KEPT
    assert (whole.outcomes == parts[0].outcomes).all() and whole.confusion == parts[0].confusion
    assert whole.worst[0].score <= whole.worst[-1].score <= whole.best[-1].score


def test_a_picture_is_bounded_whatever_is_in_it():
    rng = np.random.default_rng(0)
    noise = rng.integers(0, 256, (900, 700, 3), np.uint8)
    found = picture_of(noise, rng.integers(0, 300, (900, 700)), np.zeros((900, 700), int))
    assert found.photo and len(found.photo) <= MOST_BYTES
    assert len(found.truth) <= 2 * MOST_RUNS and len(found.found) == 2
    assert sum(found.truth[1::2]) == sum(found.found[1::2]) == found.size[0] * found.size[1]
    small = picture_of(None, np.array([[0, 1], [1, 1]]), np.array([[2, 2], [2, 2]]))
    assert small == Picture(None, (2, 2), (0, 1, 1, 3), (2, 4))
