"""Published weights on their way: from the hub into its cache, out to a folder, in from a folder.

The cache is the one that every library with the hub's client shares, and is laid out as where there
are no symbolic links. A folder for a machine without
network holds plain files, which any copying leaves as they are, and `NAME.json` with their hashes.
"""

from __future__ import annotations

import errno
import hashlib
import json
import os
import re
import shutil
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

from huggingface_hub import (
    HfApi,
    constants,
    get_hf_file_metadata,  # pyright: ignore[reportUnknownVariableType]
    hf_hub_url,
)
from huggingface_hub.file_download import (
    http_get,  # pyright: ignore[reportUnknownVariableType]
)
from huggingface_hub.utils import (
    GatedRepoError,
    RepositoryNotFoundError,
    build_hf_headers,  # pyright: ignore[reportUnknownVariableType]
)

from concat_cli.core.errors import UserError
from concat_cli.core.files import atomic_path, sha256_of, write_error, write_json, write_text
from concat_cli.core.weights_from.hub import cached, is_here, short, without_waiting
from concat_cli.core.weights_from.published import (
    NOT_STATED,
    Part,
    how_to_get,
    in_words,
    parts_of,
)

BESIDE = ("config.json", "preprocessor_config.json")  # taken wherever a repository has them
_CHUNK = 1 << 22
_OF_DISK = (errno.ENOSPC, errno.EDQUOT, errno.EACCES, errno.EPERM, errno.EROFS)


@dataclass(frozen=True)
class Listing:
    """What will be fetched of a repository: files of a commit with their bytes, the weights last;
    the licence that its page states."""

    part: Part
    commit: str
    files: tuple[tuple[str, int], ...]
    licence: str

    @property
    def bytes(self) -> int:
        """Of all files."""
        return sum(size for _, size in self.files)


@dataclass(frozen=True)
class Carried:
    """A file in a folder for another machine."""

    repository: str
    commit: str
    file: str
    bytes: int
    sha256: str

    @property
    def place(self) -> Path:
        """Where it is in the folder."""
        return Path(_flat(self.repository), self.file)


def look_up(name: str, force: bool = False) -> list[Listing]:
    """What of a name is still to be fetched, as its pages say now; empty where all is here.

    force: also what states no licence. UserError without a network, and for repositories that are
    missing, gated or hold no weights.
    """
    missing = [part for part in parts_of(name) if not is_here(part)]
    if not missing:
        return []
    with without_waiting() as there:
        if not there:
            sizes = "; ".join(f"{p.repository}, a download {in_words(p.bytes)}" for p in missing)
            raise UserError(
                f"{name} is not here, and the hub cannot be reached. Missing: {sizes}.",
                how_to_get(name),
            )
        found = [_listing(name, part) for part in missing]
    for one in found:
        if one.licence == NOT_STATED and not force:
            raise UserError(
                f"{one.part.repository} states no licence, so nobody gave leave to use it.",
                "Ask its authors. To fetch it all the same, add --force.",
            )
    _check_space(sum(one.bytes for one in found), Path(constants.HF_HUB_CACHE))
    return found


def _listing(name: str, part: Part) -> Listing:
    """The hub's own word on a repository."""
    try:
        info = HfApi().model_info(part.repository, files_metadata=True)
    except Exception as error:  # which of two HTTP libraries is below depends on the client's age
        raise _refused(name, part.repository, error) from error
    sizes = {one.rfilename: one.size or 0 for one in info.siblings or ()}
    weights = next((file for file in part.weights if file in sizes), None)
    lacking = [file for file in part.others if file not in sizes]
    if weights is None or lacking:
        needed = ", ".join(lacking) or " or ".join(part.weights)
        raise UserError(
            f"{part.repository} holds no {needed}, but {', '.join(sorted(sizes)[:8])}.",
            "Give a repository with weights in the form of transformers or of open_clip.",
        )
    beside = [file for file in BESIDE if file in sizes and file not in part.others]
    card: Any = info.card_data
    licence = (card.get("license") if card is not None else None) or part.licence
    files = (*part.others, *beside, weights)
    return Listing(
        part, info.sha or "main", tuple((file, sizes[file]) for file in files), str(licence)
    )


def fetch(name: str, listing: Listing) -> None:
    """Downloads what was listed into the cache; the bytes of a file that have come are kept.

    UserError where the repository is closed, the disk full, or the connection breaks.
    """
    repository = listing.part.repository
    for file, _ in listing.files:
        try:
            _download(repository, listing.commit, file)
        except UserError:
            raise
        except Exception as error:  # see `_listing`
            if isinstance(error, OSError) and error.errno in _OF_DISK:
                raise write_error(Path(constants.HF_HUB_CACHE), error) from error
            raise _refused(name, f"{repository} {file}", error) from error
    write_text(_root(repository) / "refs" / "main", listing.commit)


def _download(repository: str, commit: str, file: str) -> None:
    """A file of a commit into the cache. The client's own download (2.4.0) drops what had come of a
    file when its process ends; this one goes on from there."""
    target = _root(repository) / "snapshots" / commit / file
    if target.exists():
        return
    url = hf_hub_url(repository, file, revision=commit)
    facts = get_hf_file_metadata(url)
    begun = _root(repository) / "blobs" / f"{facts.etag}.part"
    for folder in (begun.parent, target.parent):
        folder.mkdir(parents=True, exist_ok=True)
    headers = build_hf_headers() | {"Accept-Encoding": "identity"}  # or bytes could not be counted
    if begun.is_symlink():  # its name can be foreseen: nothing is written through a link
        begun.unlink()
    with begun.open("ab") as out:
        there = out.tell()
        http_get(url, out, resume_size=there, headers=headers, expected_size=facts.size)
    if re.fullmatch(r"[0-9a-f]{64}", facts.etag or "") and sha256_of(begun) != facts.etag:
        begun.unlink()
        raise UserError(f"{repository} {file} came damaged.", "Run the same command again.")
    os.replace(begun, target)


def _root(repository: str) -> Path:
    """The folder of a repository in the hub's cache."""
    return Path(constants.HF_HUB_CACHE) / f"models--{_flat(repository)}"


def lay_out(name: str, folder: Path) -> Iterator[Path]:
    """Copies what is here of a name into a folder for another machine; yields each file, at the end
    the list of them."""
    carried: list[Carried] = []
    sources = [path for part in parts_of(name) for path in _files_here(part)]
    _check_space(sum(path.stat().st_size for _, path in sources), folder)
    for part, path in sources:
        commit = path.parent.name
        target = folder / _flat(part.repository) / path.name
        with path.open("rb") as source:
            size, sha256 = _copy(source, target)
        carried.append(Carried(part.repository, commit, path.name, size, sha256))
        yield target
    write_json(folder / f"{_flat(name)}.json", [vars(one) for one in carried], indent=1)
    yield folder / f"{_flat(name)}.json"


def _files_here(part: Part) -> Iterator[tuple[Part, Path]]:
    groups = [part.weights, *((file,) for file in dict.fromkeys((*part.others, *BESIDE)))]
    for names in groups:
        path = cached(part.repository, names)
        if path is not None:
            yield part, path


def take_in(name: str, folder: Path) -> Iterator[Path]:
    """Copies a name's files from such a folder into the hub's cache; yields each.

    UserError where the folder was not made for the name, and where a file is missing or damaged.
    """
    wanted = {part.repository for part in parts_of(name)}
    listed = folder / f"{_flat(name)}.json"
    try:
        carried = [Carried(**row) for row in json.loads(listed.read_text("utf-8"))]
    except FileNotFoundError:
        others = sorted(path.stem for path in folder.glob("*.json"))
        held = f" It holds: {', '.join(others)}." if others else ""
        raise UserError(
            f"{folder} holds no {name} ({listed.name} is not there).{held}",
            f"Make it on a machine with a network: concat weights get {name} --to DIR",
        ) from None
    except (OSError, ValueError, TypeError, RecursionError) as error:
        raise UserError(f"{listed} cannot be read: {short(error)}", _AGAIN) from error
    for one in carried:
        plain = all(re.fullmatch(r"\w[\w.-]*", part) for part in (one.file, one.commit))
        if one.repository not in wanted or not plain:
            raise UserError(f"{listed} lists {one.place}, which is no part of {name}.", _AGAIN)
        root = _root(one.repository)
        target = root / "snapshots" / one.commit / one.file
        try:
            with (folder / one.place).open("rb") as source:
                _copy(source, target, one)
        except FileNotFoundError:
            raise UserError(f"{folder / one.place} is missing.", _AGAIN) from None
        write_text(root / "refs" / "main", one.commit)
        yield target


_AGAIN = "Copy the folder again, or make it again with `concat weights get NAME --to DIR`."


def _copy(source: BinaryIO, target: Path, expected: Carried | None = None) -> tuple[int, str]:
    """Copies atomically; bytes and SHA-256, which have to be the expected ones."""
    digest, size = hashlib.sha256(), 0
    with atomic_path(target) as temporary, temporary.open("wb") as out:
        while chunk := source.read(_CHUNK):
            digest.update(chunk)
            size += out.write(chunk)
        if expected is not None and (size, digest.hexdigest()) != (expected.bytes, expected.sha256):
            raise UserError(
                f"{source.name} is damaged: {size:,} of {expected.bytes:,} bytes, or others.",
                _AGAIN,
            )
    return size, digest.hexdigest()


def _flat(name: str) -> str:
    """A name of the hub as the name of a folder or file, as the cache has it."""
    return name.replace(":", "--").replace("/", "--")


def _check_space(needed: int, folder: Path) -> None:
    there = next(path for path in (folder, *folder.absolute().parents) if path.exists())
    free = shutil.disk_usage(there).free
    if needed > free:
        raise UserError(
            f"{needed / 1e6:,.0f} MB are needed at {folder}, and {free / 1e6:,.0f} MB are free.",
            "Free some space; HF_HUB_CACHE=DIR moves the cache to another disk.",
        )


def _refused(name: str, what: str, error: Exception) -> UserError:
    """What the hub's client was stopped by."""
    page = f"{constants.ENDPOINT}/{what.partition(' ')[0]}"
    if isinstance(error, GatedRepoError):
        return UserError(
            f"{what} is gated: its authors give it to people who ask.",
            f"Ask at {page}, log in with `hf auth login`, then: concat weights get {name}",
        )
    if isinstance(error, RepositoryNotFoundError):
        return UserError(
            f"The hub knows no repository {what}, or it is private.",
            f"Check the name ({page}); for a private one, log in with `hf auth login`.",
        )
    return UserError(
        f"{what} could not be fetched: {short(error)}",
        f"What has come is kept: the same command goes on (concat weights get {name}).",
    )


def state_of(parts: Sequence[Part]) -> str:
    """`here`, `in part` or nothing."""
    count = sum(is_here(part) for part in parts)
    return "here" if count == len(parts) else "in part" if count else ""
