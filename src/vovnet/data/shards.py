"""Tar shards in the WebDataset layout: where each picture lies in its file, and its label.

Headers and labels are read, pictures are not, and nothing is unpacked: a member's name is a text
here, never a path.
"""

import json
import mmap
import tarfile
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

import numpy as np
from numpy.typing import NDArray

from vovnet.errors import DataError

PICTURES = ("jpg", "jpeg", "png", "webp")
MAX_CLASSES = 1_000_000
MAX_LABEL_BYTES = 2**20
CLASS_FILES = ("classes.json", "classes.txt")

_COMPRESSED = {
    b"\x1f\x8b": "gunzip",
    b"BZh": "bunzip2",
    b"\xfd7zXZ": "unxz",
    b"\x28\xb5\x2f\xfd": "unzstd",
}
_MAX_PADDING = 2**20  # after the end of the archive; tar itself fills up to 10 KiB
_Place = tuple[int, int]  # first byte, number of bytes


@dataclass(frozen=True, slots=True, eq=False)
class ShardIndex:
    """The pictures of tar files, in the order in which they lie there.

    files           the shards
    file_of         int64 (N,), index into files
    offsets, sizes  int64 (N,), bytes of the picture in its shard
    labels          int64 (N,), index into class_names
    class_names     of classes.json or classes.txt beside the shards, else what the labels say
    """

    files: tuple[str, ...]
    file_of: NDArray[np.int64]
    offsets: NDArray[np.int64]
    sizes: NDArray[np.int64]
    labels: NDArray[np.int64]
    class_names: tuple[str, ...]


class HasFiles(Protocol):
    """Samples of which each lies in one of several files."""

    @property
    def file_of(self) -> NDArray[np.int64]:
        """int64 (N,), index of the file."""


def index_shards(paths: Sequence[Path]) -> ShardIndex:
    """Find every picture and label of uncompressed tar files by their headers.

    The members of a sample share their name up to the first dot: KEY.jpg (.jpeg, .png, .webp)
    beside KEY.cls (a number) or KEY.json (with "label" or "class", a number or a class name).
    Numbers count from 0 in classes.json (a list of names) or classes.txt (a name a line) in the
    folder of the first shard; without these the classes are called "0", "1", ... Members with
    other endings are passed over. Raises DataError, with the shard and the key, on what is
    compressed, truncated, linked, sparse, doubled, incomplete or out of range.
    """
    if not paths:
        raise DataError("shards: expected at least one tar file, got none")
    class_names = _read_class_names(paths[0].parent)
    known = None if class_names is None else {name: n for n, name in enumerate(class_names)}
    file_of: list[int] = []
    places: list[_Place] = []
    labels: list[int | str] = []
    for number, path in enumerate(paths):
        for place, label in _read_shard(path, known):
            file_of.append(number)
            places.append(place)
            labels.append(label)
    names, numbers = _numbered(labels, class_names, where=paths[0].parent)
    table = np.array(places, dtype=np.int64).reshape(-1, 2)
    return ShardIndex(
        files=tuple(map(str, paths)),
        file_of=np.array(file_of, dtype=np.int64),
        offsets=np.ascontiguousarray(table[:, 0]),
        sizes=np.ascontiguousarray(table[:, 1]),
        labels=numbers,
        class_names=names,
    )


def shard_order(
    data: HasFiles, *, seed: int, epoch: int, shards_at_once: int = 16
) -> NDArray[np.int64]:
    """Return the order of an epoch, int64 (N,): every sample once, with reads kept local.

    Shards are shuffled and taken `shards_at_once` together; samples are shuffled among the shards
    taken together. The same numbers give the same order in every process. Raises ValueError when
    `shards_at_once` is below 1.
    """
    if shards_at_once < 1:
        raise ValueError(f"shards_at_once: expected at least 1, got {shards_at_once}")
    generator = np.random.default_rng([seed, epoch])
    shards, shard_of = np.unique(data.file_of, return_inverse=True)
    group_of = generator.permutation(len(shards))[shard_of] // shards_at_once  # (N,)
    shuffled = generator.permutation(len(group_of))
    return shuffled[np.argsort(group_of[shuffled], kind="stable")]


def _read_shard(path: Path, known: Mapping[str, int] | None) -> Iterator[tuple[_Place, int | str]]:
    """Place of the picture and label of each sample."""
    try:
        with path.open("rb") as stream:
            _check_start(stream.read(512), path)
            with mmap.mmap(stream.fileno(), 0, access=mmap.ACCESS_READ) as content:
                for key, members in _samples(content, path).items():
                    sample = _sample(members, content, known, where=f"{path}: {key!r}")
                    if sample is not None:
                        yield sample
    except OSError as error:
        raise DataError(f"{path}: expected a readable tar file, found: {error}") from error


def _check_start(start: bytes, path: Path) -> None:
    for magic, program in _COMPRESSED.items():
        if start.startswith(magic):
            raise DataError(
                f"{path}: expected a tar file that is not compressed, for its pictures are read "
                f"out of order; unpack it with {program}"
            )
    if len(start) < 512:
        raise DataError(f"{path}: expected a tar file, found {len(start)} bytes")


def _samples(content: mmap.mmap, path: Path) -> dict[str, dict[str, _Place]]:
    """By key, the place of each member by its ending in small letters."""
    samples: dict[str, dict[str, _Place]] = {}
    for member in _members(content, path):
        folder, slash, name = member.name.rpartition("/")
        stem, _, ending = name.partition(".")
        if not stem or not ending:
            continue
        where = f"{path}: {member.name!r}"
        if not member.isreg() or member.issparse():
            raise DataError(f"{where}: expected a plain file, found a link or a sparse one")
        places = samples.setdefault(f"{folder}{slash}{stem}", {})
        if ending.lower() in places:
            raise DataError(f"{where}: expected one such member, found a second")
        places[ending.lower()] = (member.offset_data, member.size)
    return samples


def _members(content: mmap.mmap, path: Path) -> Iterator[tarfile.TarInfo]:
    """The members that are no folders; each lies inside the file, behind the one before."""
    try:
        archive = tarfile.TarFile(fileobj=content)
        behind = 0
        while (member := archive.next()) is not None:
            end = member.offset_data + member.size
            if member.size < 0 or member.offset_data < behind or end > len(content):
                raise DataError(
                    f"{path}: {member.name!r}: expected its {member.size} bytes inside the file, "
                    f"found the end at {len(content)}; is the shard truncated?"
                )
            behind = member.offset_data
            if not member.isdir():
                yield member
        _check_end(content, archive.offset, path)
    except (tarfile.TarError, ValueError, OverflowError, MemoryError, RecursionError) as error:
        if isinstance(error, DataError):
            raise
        raise DataError(f"{path}: expected a whole tar file, found: {error}") from error


def _check_end(content: mmap.mmap, end: int, path: Path) -> None:
    """Tar ends with empty blocks; tarfile takes any broken header for the end as well."""
    rest = content[end : end + _MAX_PADDING]
    if len(rest) < 512 or rest.strip(b"\0") or len(content) - end > _MAX_PADDING:
        raise DataError(
            f"{path}: expected the end of the archive at byte {end}, found "
            f"{'nothing' if not rest else 'something else'}; is the shard truncated or two in one?"
        )


def _sample(
    members: Mapping[str, _Place],
    content: mmap.mmap,
    known: Mapping[str, int] | None,
    *,
    where: str,
) -> tuple[_Place, int | str] | None:
    """Picture and label; None for a key that has neither."""
    pictures = [members[ending] for ending in PICTURES if ending in members]
    labels = [ending for ending in ("cls", "json") if ending in members]
    if not pictures and not labels:
        return None
    if len(pictures) != 1 or pictures[0][1] == 0:
        raise DataError(
            f"{where}: expected one picture (.{', .'.join(PICTURES)}), found .{', .'.join(members)}"
        )
    if not labels:
        raise DataError(f"{where}: expected a label in .cls or .json, found .{', .'.join(members)}")
    offset, size = members[labels[0]]
    if size > MAX_LABEL_BYTES:
        raise DataError(f"{where}: expected a label in .{labels[0]}, found {size} bytes")
    label = _label(labels[0], content[offset : offset + size], where=f"{where}: .{labels[0]}")
    return pictures[0], _checked(label, known, where=f"{where}: .{labels[0]}")


def _label(ending: str, content: bytes, *, where: str) -> object:
    try:
        if ending == "cls":
            return int(content.decode("ascii"))
        value = json.loads(content)
    except (ValueError, RecursionError) as error:
        expected = "a whole number" if ending == "cls" else "JSON"
        raise DataError(f"{where}: expected {expected}, found {content[:40]!r}") from error
    if not isinstance(value, dict) or not {"label", "class"} & set(value):
        raise DataError(f'{where}: expected an object with "label" or "class", found neither')
    return value["label"] if "label" in value else value["class"]


def _checked(label: object, known: Mapping[str, int] | None, *, where: str) -> int | str:
    """A number of a class, or a name where there is no list of names."""
    count = MAX_CLASSES if known is None else len(known)
    if isinstance(label, str) and known is None and label:
        return label
    if isinstance(label, str) and known is not None and label in known:
        return known[label]
    if isinstance(label, int) and not isinstance(label, bool) and 0 <= label < count:
        return label
    names = "" if known is None else " or the name of a class"
    raise DataError(f"{where}: expected a label in 0..{count - 1}{names}, found {repr(label)[:80]}")


def _numbered(
    labels: Sequence[int | str], class_names: tuple[str, ...] | None, *, where: Path
) -> tuple[tuple[str, ...], NDArray[np.int64]]:
    """The names of the classes, and the labels as numbers."""
    texts = {label for label in labels if isinstance(label, str)}
    if not texts:
        numbers = np.array(labels, dtype=np.int64)
        highest = int(numbers.max(initial=-1))
        return class_names or tuple(map(str, range(highest + 1))), numbers
    if any(isinstance(label, int) for label in labels):
        raise DataError(
            f"{where}: expected labels that are all numbers or all names, found both; name the "
            f"classes in {CLASS_FILES[0]}"
        )
    names = tuple(sorted(texts))
    number_of = {name: number for number, name in enumerate(names)}
    return names, np.array([number_of[str(label)] for label in labels], dtype=np.int64)


def _read_class_names(folder: Path) -> tuple[str, ...] | None:
    path = next((folder / name for name in CLASS_FILES if (folder / name).is_file()), None)
    if path is None:
        return None
    try:
        text = path.read_text(encoding="utf-8-sig")
        names = json.loads(text) if path.suffix == ".json" else text.split("\n")
    except (OSError, ValueError, RecursionError) as error:
        raise DataError(
            f"{path}: expected the names of classes in UTF-8, found: {error}"
        ) from error
    if path.suffix == ".txt":
        names = [name.rstrip("\r") for name in (names[:-1] if names[-1] == "" else names)]
    if not isinstance(names, list) or not all(isinstance(name, str) and name for name in names):
        raise DataError(f"{path}: expected a list of names, none of them empty")
    if len(set(names)) < len(names):
        double = next(name for name in names if names.count(name) > 1)
        raise DataError(f"{path}: expected each class once, found {double!r} twice")
    return tuple(names)
