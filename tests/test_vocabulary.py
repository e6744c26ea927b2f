"""Vocabulary files: text, YAML, JSON; what is known of a name; every mistake in words."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from concat_cli.core.errors import UserError
from concat_cli.core.vocabulary import ClassEntry, Vocabulary, same_name
from concat_cli.core.vocabulary_file import parse_names, parse_vocabulary

pytestmark = pytest.mark.core

KNOWN = Vocabulary(
    (
        ClassEntry("Sky", 7, ("heaven",), "stuff", True),
        ClassEntry("cow", 3, (), "thing", False),
    )
)


def write(folder: Path, text: str, name: str = "classes.txt") -> Path:
    path = folder / name
    path.write_bytes(text.encode("utf-8"))
    return path


def test_a_text_file(tmp_path: Path) -> None:
    text = "\ufeff# my classes\r\ncat,  kitten\r\n\r\nsky : stuff  # above\nC#\n猫:thing\n"
    vocabulary = parse_vocabulary(write(tmp_path, text))
    assert vocabulary.names == ("cat", "sky", "C#", "猫")
    assert vocabulary.entries[0].synonyms == ("kitten",)
    assert vocabulary.is_thing == (True, False, True, True)
    assert vocabulary.ids == (1, 2, 3, 4)
    assert not any(vocabulary.is_seen)


@pytest.mark.parametrize(
    ("name", "text"),
    [
        ("a.yaml", "- cat, kitten\n- sky : stuff\n- {name: no, synonyms: [never], kind: thing}\n"),
        ("a.yml", "- {name: cat, synonyms: kitten}\n- {name: sky, kind: stuff}\n- no, never\n"),
        ("a.json", '["cat, kitten", "sky: stuff", {"name": "no", "synonyms": ["never"]}]'),
    ],
)
def test_lists(tmp_path: Path, name: str, text: str) -> None:
    vocabulary = parse_vocabulary(write(tmp_path, text, name))
    assert vocabulary.names == ("cat", "sky", "no")
    assert [e.synonyms for e in vocabulary.entries] == [("kitten",), (), ("never",)]
    assert vocabulary.is_thing == (True, False, True)


def test_what_the_weights_know(tmp_path: Path) -> None:
    vocabulary = parse_vocabulary(write(tmp_path, "dog\nblue, HEAVEN\ncow : stuff\n"), KNOWN)
    assert vocabulary.names == ("dog", "blue", "cow")
    assert vocabulary.ids == (8, 7, 3)
    assert vocabulary.is_thing == (True, False, False)
    assert vocabulary.is_seen == (False, True, False)


def test_the_form_of_names_may_be_given(tmp_path: Path) -> None:
    known = Vocabulary((ClassEntry("sky-other-merged", 187, (), "stuff", True),))
    path = write(tmp_path, "sky\n")
    assert not parse_vocabulary(path, known).entries[0].seen
    found = parse_vocabulary(path, known, key=lambda name: name.partition("-")[0])
    assert found.entries == (ClassEntry("sky", 187, (), "stuff", True),)


@pytest.mark.parametrize(
    ("name", "text", "what"),
    [
        ("a.txt", "", "names no class"),
        ("a.txt", "# only\n  \n", "names no class"),
        ("a.yaml", "", "names no class"),
        ("a.json", "[]", "names no class"),
        ("a.txt", "cat\ndog\n Cat \n", r"'Cat' stands twice .*a\.txt:1 and 3"),
        ("a.txt", "cat, dog\ndog\n", "'dog' stands twice"),
        ("a.txt", "cat, cat\n", "stands twice"),
        ("a.yaml", "- cat\n- cat\n", "item 1 and item 2"),
        ("a.txt", "sky : stuf\n", r"a\.txt:1: unknown kind 'stuf'"),
        ("a.txt", "sky :\n", "nothing after the colon"),
        ("a.txt", "cat,,dog\n", "a name is empty"),
        ("a.txt", ": stuff\n", "a name is empty"),
        ("a.txt", "c\x00t\n", "control characters"),
        ("a.yaml", "cat: dog\n", "holds no list"),
        ("a.yaml", "- [a\n", "no valid YAML"),
        ("a.yaml", "- [a]\n", "is no class"),
        ("a.yaml", "- {nam: a, kind: stuff}\n", "is no class"),
        ("a.json", '[{"nam": "x"}]', "unknown key 'nam'"),
        ("a.json", '[{"kind": "stuff"}]', "it has no name"),
        ("a.txt", "cat; dog\n", r"a\.txt:1: .* semicolon"),
        ("a.yaml", "- {name: [a]}\n", "must be strings"),
        ("a.json", "[1]", "is no class"),
        ("a.json", '[{"name": "a", "synonyms": 3}]', "must be strings"),
        ("a.json", "[", "no valid JSON"),
        (
            "a.txt",
            "Idx\tRatio\tName\n1\t0.2\tcat\n",
            r"a\.txt:1: .* row of a table: it holds a tab",
        ),
        ("a.txt", "id,name\n1,cat\n", r"a\.txt:2: '1' is a number, not a name"),
        ("a.txt", "cat, 0.25\n", "'0.25' is a number"),
        ("a.txt", "7: cat\n8: dog\n", "'7' is a number"),
        ("a.txt", "1 cat\n2 dog\n", "every line begins with a number, like '1 cat'"),
        ("a.txt", "0. cat\n7) dog\n", "every line begins with a number"),
    ],
)
def test_mistakes(tmp_path: Path, name: str, text: str, what: str) -> None:
    with pytest.raises(UserError, match=what) as caught:
        parse_vocabulary(write(tmp_path, text, name))
    assert caught.value.hint


def test_names_with_numbers_are_names(tmp_path: Path) -> None:
    """Where not every line begins with one, or the list is no text."""
    assert parse_vocabulary(write(tmp_path, "3 wheeler\n2nd floor\nC4\n")).names[0] == "3 wheeler"
    listed = write(tmp_path, '["1 litre bottle", "2 litre bottle"]', "a.json")
    assert len(parse_vocabulary(listed)) == 2


def test_files_that_cannot_be_read(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="no vocabulary file"):
        parse_vocabulary(tmp_path / "none.txt")
    with pytest.raises(UserError, match="Cannot read"):
        parse_vocabulary(tmp_path)
    path = tmp_path / "latin.txt"
    path.write_bytes("Bär".encode("latin-1"))
    with pytest.raises(UserError, match="not UTF-8"):
        parse_vocabulary(path)


@settings(suppress_health_check=[HealthCheck.function_scoped_fixture], deadline=None)
@given(data=st.one_of(st.binary(max_size=60), st.text(max_size=60).map(str.encode)))
@pytest.mark.parametrize("ending", ["txt", "yaml", "json"])
def test_any_file_is_a_vocabulary_or_a_user_error(tmp_path: Path, ending: str, data: bytes) -> None:
    path = tmp_path / f"any.{ending}"
    path.write_bytes(data)
    try:
        vocabulary = parse_vocabulary(path, KNOWN)
    except UserError:
        return
    names = [same_name(n) for e in vocabulary.entries for n in (e.name, *e.synonyms)]
    assert names and all(names) and len(set(names)) == len(names)
    assert len(set(vocabulary.ids)) == len(vocabulary)


NAMES = st.lists(
    st.text(st.characters(categories=("L", "N")), min_size=1, max_size=8), min_size=1, max_size=6
).filter(
    lambda names: (
        len({same_name(n) for n in names}) == len(names)
        and not any(name.isascii() and name.isdecimal() for name in names)
    )
)


@settings(suppress_health_check=[HealthCheck.function_scoped_fixture], deadline=None)
@given(names=NAMES, kinds=st.lists(st.sampled_from(["thing", "stuff"]), min_size=6, max_size=6))
def test_text_and_json_say_the_same(tmp_path: Path, names: list[str], kinds: list[str]) -> None:
    lines = [f"{name} : {kind}" for name, kind in zip(names, kinds, strict=False)]
    rows = [{"name": name, "kind": kind} for name, kind in zip(names, kinds, strict=False)]
    text = parse_vocabulary(write(tmp_path, "\n".join(lines)))
    listed = parse_vocabulary(write(tmp_path, json.dumps(rows), "classes.json"))
    assert text == listed
    assert text.names == tuple(names)


def test_a_list_of_names() -> None:
    """The same as the lines of a file."""
    vocabulary = parse_names(["cat, kitten", "heaven", "cow: stuff"], KNOWN)
    assert vocabulary.names == ("cat", "heaven", "cow")
    assert vocabulary.entries[0].synonyms == ("kitten",)
    assert vocabulary.is_thing == (True, False, False) and vocabulary.ids == (8, 7, 3)
    assert parse_names("cat").names == ("cat",)


@pytest.mark.parametrize(
    ("names", "what"),
    [
        ([], "The list names no class"),
        (["cat", "Cat"], "'Cat' stands twice in the vocabulary: The list, item 1 and item 2"),
        (["cat; dog"], "The list, item 1: .* semicolon"),
        ([""], "a name is empty"),
        ([3], "The list, item 1: 3 is no class"),
    ],
)
def test_mistakes_in_a_list(names: list[str], what: str) -> None:
    with pytest.raises(UserError, match=what):
        parse_names(names)
