"""The ensemble of a segmentor's own classes and CLIP, against loops from the formulas."""

from __future__ import annotations

import math

import pytest
import torch

from concat_cli.core.clip import prompts
from concat_cli.core.config import ClipConfig
from concat_cli.core.vocabulary import ClassEntry, Vocabulary
from concat_cli.methods.borrowed.config import BorrowedConfig
from concat_cli.methods.borrowed.naming import agreed, best_names, matches, names_of, one_by_one


def of_names(*names: str) -> Vocabulary:
    """A class a text, synonyms behind commas."""
    rows = ([part.strip() for part in name.split(",")] for name in names)
    return Vocabulary(tuple(ClassEntry(row[0], n, tuple(row[1:])) for n, row in enumerate(rows, 1)))


OWN = Vocabulary(
    (
        ClassEntry("person", 1),
        ClassEntry("sky-other-merged", 2, kind="stuff"),
        ClassEntry("car, auto", 3),
        ClassEntry("wall-brick", 4, kind="stuff"),
        ClassEntry("potted plant", 5, ("flower pot",)),
    )
)


def test_names_match_literally_as_people_write_them() -> None:
    asked = of_names("Sky", "settee, AUTO", "brick  wall", "wall", "flower pot, person", "cars")
    assert matches(asked, OWN).nonzero().tolist() == [[0, 1], [1, 2], [2, 3], [4, 0], [4, 4]]
    assert names_of(OWN.entries[2]) == ("car", "auto")


def test_each_name_has_its_text_and_the_best_one_counts() -> None:
    asked = of_names("cat, kitten", "settee", "wall-brick, bricks, house_wall")
    apart, owner = one_by_one(asked)
    assert apart.names == ("cat", "kitten", "settee", "wall-brick", "bricks", "house_wall")
    assert owner.tolist() == [0, 0, 1, 2, 2, 2]
    logits = torch.randn(2, 4, 6, generator=torch.Generator().manual_seed(0))
    found = best_names(logits, owner, 3)
    for k in range(3):
        assert torch.equal(found[..., k], logits[..., owner == k].amax(-1))
    texts = prompts.class_texts(apart, ClipConfig(templates="vild"))
    assert [len(row) for row in texts] == [14] * 6
    assert "a photo of a brick wall." in texts[3]
    assert not [text for row in texts for text in row if "-" in text or "_" in text]


def naive(
    own_logits: list[float], clip_logits: list[float], matched: torch.Tensor, way: BorrowedConfig
) -> list[float]:
    """The scores of one mask by the formulas."""
    own = [math.exp(value) / sum(map(math.exp, own_logits)) for value in own_logits]
    by_clip = [math.exp(value) / sum(map(math.exp, clip_logits)) for value in clip_logits]
    known = [any(row) for row in matched.tolist()]
    scores: list[float] = []
    for k, row in enumerate(matched.tolist()):
        inside = sum(p for p, same in zip(own, row, strict=True) if same)
        of_both = inside ** (1 - way.known) * by_clip[k] ** way.known
        scores.append(of_both if known[k] else by_clip[k])
    return [score / sum(scores) for score in scores]


@pytest.mark.parametrize("way", [BorrowedConfig(), BorrowedConfig(known=0.0, new=1.0)])
@pytest.mark.parametrize(
    "asked",
    [
        ("sky", "sofa", "auto", "tram", "person, flower pot"), ("sofa", "tram"), ("person", "sky"),
        ("person", "sky-other-merged, sky", "car", "wall-brick", "potted plant"),
    ],
)  # fmt: skip
def test_the_ensemble_is_that_of_the_formulas(way: BorrowedConfig, asked: tuple[str, ...]) -> None:
    matched = matches(of_names(*asked), OWN)
    generator = torch.Generator().manual_seed(0)
    own = 3 * torch.randn(7, len(OWN), generator=generator)
    clip = 5 * torch.randn(7, len(asked), generator=generator)
    found = agreed(own, clip, matched, way).exp()
    for row, (a, b) in enumerate(zip(own.tolist(), clip.tolist(), strict=True)):
        expected = torch.tensor(naive(a, b, matched, way))
        torch.testing.assert_close(found[row], expected, rtol=1e-4, atol=1e-6)


def test_new_names_stay_in_clips_order_and_yield_to_a_sure_segmentor() -> None:
    matched = matches(of_names("person", "sofa", "tram"), OWN)
    clip = torch.tensor([[0.0, 0.5, 0.2]] * 2)
    own = torch.tensor([[8.0, 0, 0, 0, 0], [0, 0, 8.0, 0, 0]])  # sure of person; of car
    person, car = agreed(own, clip, matched, BorrowedConfig()).exp()
    assert person.argmax() == 0 and car.argsort(descending=True).tolist() == [1, 2, 0]
    assert person[1] > person[2], "CLIP's order"


def test_a_new_name_is_found_beside_all_own_ones() -> None:
    """CLIP is sure of the new name, the segmentor of one of its own, as it knows no other."""
    matched = matches(of_names(*(names_of(e)[0] for e in OWN.entries), "unicorn"), OWN)
    own = torch.tensor([[2.0, 0, 0, 0, 0]])
    clip = torch.tensor([[0.0, 0, 0, 0, 0, 4.0]])
    assert agreed(own, clip, matched, BorrowedConfig()).argmax() == 5


def test_extreme_opinions_stay_finite() -> None:
    matched = matches(of_names("person", "sofa"), OWN)
    own = torch.tensor([[500.0, 0, 0, 0, 0], [-500.0, 500.0, 0, 0, 0]])
    found = agreed(own, torch.tensor([[0.0, 300.0], [300.0, 0.0]]), matched, BorrowedConfig())
    assert torch.isfinite(found.exp()).all()
    torch.testing.assert_close(found.exp().sum(-1), torch.ones(2))


def test_there_are_the_fourteen_templates_of_vild() -> None:
    chosen = prompts.TEMPLATES["vild"]
    assert len(chosen) == len(set(chosen)) == 14 and all(t.count("{}") == 1 for t in chosen)
    sizes = [t for t in chosen if any(size in t for size in ("small", "medium", "large"))]
    assert len(sizes) == 9
