"""Names and kinds of a published segmentor's own classes."""

from __future__ import annotations

import pytest

from concat_cli.core.data.class_split import load_class_list
from concat_cli.core.segmentors.classes import SETS, own_classes
from concat_cli.core.vocabulary import Vocabulary


def labels_of(vocabulary: Vocabulary) -> dict[str, str]:
    return {str(i): name for i, name in enumerate(vocabulary.names)}


@pytest.mark.parametrize("name", SETS)
def test_a_file_without_names_takes_the_set_of_that_count_and_says_so(name: str) -> None:
    known = load_class_list(name)
    for labels in ({}, {str(i): f"LABEL_{i}" for i in range(len(known))}):
        found, notes = own_classes(labels, len(known))
        assert found == known
        assert notes == [
            f"It names none of its {len(known)} classes: by their number they are taken for "
            f"{SETS[name]}'s."
        ]


@pytest.mark.parametrize("name", SETS)
def test_names_of_a_known_set_have_its_kinds_and_ids(name: str) -> None:
    known = load_class_list(name)
    labels = labels_of(known)
    labels["3"], labels["5"] = "Spelt otherwise", f" {labels['5'].upper()}"
    found, notes = own_classes(labels, len(known))
    assert notes == [] and found.ids == known.ids and found.is_thing == known.is_thing
    assert found.names[3] == "Spelt otherwise" and found.names[5] == known.names[5].upper()


def test_names_of_other_sets_have_the_kinds_that_are_known() -> None:
    labels = {"0": "car, auto", "1": "sky-other-merged", "2": "gnome", "3": "road"}
    found, notes = own_classes(labels, 4)
    assert found.names == ("car", "sky-other-merged", "gnome", "road")
    assert found.entries[0].synonyms == ("auto",) and found.ids == (0, 1, 2, 3)
    assert found.is_thing == (True, False, True, False)
    assert notes == [
        "Of 1 of its 4 classes (gnome) no known list tells the kind: they count as things."
    ]
    _, notes = own_classes({str(i): f"gnome {i}" for i in range(5)}, 5)
    assert "Of 5 of its 5 classes (gnome 0, gnome 1, gnome 2, ...)" in notes[0]


def test_as_many_classes_as_a_set_but_others() -> None:
    found, notes = own_classes({str(i): f"gnome {i}" for i in range(19)}, 19)
    assert all(found.is_thing) and found.ids == tuple(range(19)) and len(notes) == 1


def test_told_kinds_count() -> None:
    found, notes = own_classes({"0": "car", "1": "sky", "2": "gnome"}, 3, things=[1])
    assert found.is_thing == (False, True, False) and notes == []
    found, notes = own_classes({}, 133, things=range(100))
    assert sum(found.is_thing) == 100 and len(notes) == 1


def test_an_unknown_count_without_names() -> None:
    found, notes = own_classes({"0": "LABEL_0", "1": "LABEL_1"}, 3)
    assert found.names == ("class 1", "class 2", "class 3") and all(found.is_thing)
    assert notes == [
        'It names none of its 3 classes: they are called "class 1" and so on, and count as things.'
    ]
    assert own_classes({}, 3, things=[0])[0].is_thing == (True, False, False)


def test_names_that_are_shared_stay_apart() -> None:
    """As ADE20K's "screen, silver screen" and "screen, crt screen"."""
    labels = {"0": "screen, silver screen", "1": "screen, crt", "2": "net", "3": "net"}
    names = own_classes(labels, 4)[0].names
    assert names == ("screen, silver screen", "screen, crt", "net (2)", "net (3)")
