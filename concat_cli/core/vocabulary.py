"""Vocabulary: the ordered classes a run can name."""

from __future__ import annotations

from collections.abc import Collection, Iterable
from dataclasses import asdict, dataclass, fields, replace
from functools import cached_property
from typing import Any, Literal, get_args

Kind = Literal["thing", "stuff"]
KINDS: tuple[str, ...] = get_args(Kind)


@dataclass(frozen=True)
class ClassEntry:
    """One class: its name, other names for it, its kind, and whether labels of it were trained on.

    `id` is the data set's category id; it is used only where JSON or PNG files are read or written.
    """

    name: str
    id: int
    synonyms: tuple[str, ...] = ()
    kind: Kind = "thing"
    seen: bool = True


@dataclass(frozen=True)
class Vocabulary:
    """Ordered classes. Class indices are positions 0..K-1; `no_object` is K; `void` is -1."""

    entries: tuple[ClassEntry, ...]

    def __len__(self) -> int:
        return len(self.entries)

    @cached_property
    def names(self) -> tuple[str, ...]:
        """Names in class-index order."""
        return tuple(entry.name for entry in self.entries)

    @cached_property
    def ids(self) -> tuple[int, ...]:
        """Data-set ids in class-index order."""
        return tuple(entry.id for entry in self.entries)

    @cached_property
    def is_thing(self) -> tuple[bool, ...]:
        """True where a class is countable."""
        return tuple(entry.kind == "thing" for entry in self.entries)

    @cached_property
    def is_seen(self) -> tuple[bool, ...]:
        """True where labels of the class may be trained on."""
        return tuple(entry.seen for entry in self.entries)

    @cached_property
    def seen_indices(self) -> tuple[int, ...]:
        """Class indices of the seen classes."""
        return tuple(i for i, entry in enumerate(self.entries) if entry.seen)

    @cached_property
    def unseen_indices(self) -> tuple[int, ...]:
        """Class indices of the unseen classes."""
        return tuple(i for i, entry in enumerate(self.entries) if not entry.seen)

    @cached_property
    def index_of_id(self) -> dict[int, int]:
        """Data-set id -> class index."""
        return {entry.id: i for i, entry in enumerate(self.entries)}

    @cached_property
    def index_of_name(self) -> dict[str, int]:
        """Name -> class index."""
        return {entry.name: i for i, entry in enumerate(self.entries)}

    def seen_only(self) -> Vocabulary:
        """The seen classes alone, in order: all that an inductive run may know."""
        return Vocabulary(tuple(entry for entry in self.entries if entry.seen))

    def with_unseen(self, unseen: Collection[str]) -> Vocabulary:
        """The same classes with seen/unseen set by name."""
        return Vocabulary(tuple(replace(e, seen=e.name not in unseen) for e in self.entries))

    def to_json(self) -> list[dict[str, Any]]:
        """Plain values for JSON; `from_json` is its inverse."""
        return [asdict(entry) | {"synonyms": list(entry.synonyms)} for entry in self.entries]

    @staticmethod
    def from_json(rows: Iterable[dict[str, Any]]) -> Vocabulary:
        """The inverse of `to_json`; keys of later versions are left aside."""
        known = {one.name for one in fields(ClassEntry)}
        listed: list[dict[str, Any]] = [{k: v for k, v in r.items() if k in known} for r in rows]
        entries = (ClassEntry(**row) for row in listed)
        return Vocabulary(tuple(replace(one, synonyms=tuple(one.synonyms)) for one in entries))

    @staticmethod
    def from_categories(
        categories: Iterable[dict[str, Any]], unseen: Collection[str] = ()
    ) -> Vocabulary:
        """From the `categories` of a COCO panoptic JSON, in file order; a name with ", " holds
        synonyms only by a vocabulary file's rules, so it is kept whole here."""
        kinds: tuple[Kind, Kind] = ("stuff", "thing")
        entries = (
            ClassEntry(str(c["name"]), int(c["id"]), kind=kinds[bool(c.get("isthing", 1))])
            for c in categories
        )
        return Vocabulary(tuple(entries)).with_unseen(unseen)


def same_name(name: str) -> str:
    """The form in which two names count as one: case and spaces do not matter."""
    return " ".join(name.casefold().split())


def written(vocabulary: Vocabulary) -> str:
    """The names, synonyms and kinds in one line, as a vocabulary file would have them."""
    return "; ".join(
        f"{', '.join((entry.name, *entry.synonyms))} : {entry.kind}" for entry in vocabulary.entries
    )
