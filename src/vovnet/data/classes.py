"""Labelled pictures for classification: a folder per class, a CSV manifest, or tar shards."""

import csv
import hashlib
import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from vovnet.data.shards import index_shards
from vovnet.errors import DataError, ImageError
from vovnet.images import SUFFIXES, read_image

WHOLE_FILE = -1
VAL_PERCENT = 20
"""Of a data set without splits, the share that is kept for validation."""
_OTHER_NAMES = {"val": ("val", "validation", "valid")}
_SPLITS = ("train", "val", "validation", "valid", "test")
_OF_DETECTION = ("annotations", "Annotations", "labels", "data.yaml", "data.yml")


@dataclass(frozen=True, slots=True, eq=False)
class ClassData:
    """Pictures with one label each; arrays, because there may be millions.

    files           image files, or shards that hold many
    file_of         int64 (N,), index into files
    offsets, sizes  int64 (N,), bytes of the picture in its file; size -1: the whole file
    labels          int64 (N,), index into class_names
    source          what the user named
    """

    files: tuple[str, ...]
    file_of: NDArray[np.int64]
    offsets: NDArray[np.int64]
    sizes: NDArray[np.int64]
    labels: NDArray[np.int64]
    class_names: tuple[str, ...]
    source: Path

    def __len__(self) -> int:
        """Return the number of pictures."""
        return len(self.labels)

    def name(self, index: int) -> str:
        """Return the file of a picture, and its place in it where the file is a shard."""
        file = self.files[self.file_of[index]]
        return file if self.sizes[index] == WHOLE_FILE else f"{file}:{self.offsets[index]}"

    def read(self, index: int, *, min_side: int | None = None) -> NDArray[np.uint8]:
        """Decode a picture to uint8 (H, W, 3) RGB; see `read_image` for min_side.

        Raises ImageError naming the file.
        """
        file, size = Path(self.files[self.file_of[index]]), int(self.sizes[index])
        if size == WHOLE_FILE:
            return read_image(file, min_side=min_side)
        try:
            with file.open("rb") as stream:
                stream.seek(int(self.offsets[index]))
                content = stream.read(size)
        except OSError as error:
            raise ImageError(f"{file}: {error.strerror}") from error
        try:
            return read_image(content, min_side=min_side)
        except ImageError as error:
            raise ImageError(f"{self.name(index)}: {error}") from error

    def chosen(self, indices: Sequence[int] | NDArray[np.int64]) -> "ClassData":
        """Return the pictures at these places, in this order."""
        places = np.asarray(indices, dtype=np.int64)
        return replace(
            self,
            file_of=self.file_of[places],
            offsets=self.offsets[places],
            sizes=self.sizes[places],
            labels=self.labels[places],
        )


def load_classes(
    data_dir: Path, split: str, *, class_names: tuple[str, ...] | None = None
) -> ClassData:
    """The pictures of a split, found in the first of these forms that is there.

    data_dir/SPLIT.csv       columns path (from data_dir, or absolute) and label (a class name)
    data_dir/SPLIT-*.tar     shards in the WebDataset layout
    data_dir/SPLIT/CLASS/    a folder for each class, with pictures in it or below; for `val`,
                             `validation` and `valid` are looked for, too
    data_dir/CLASS/          the same without splits: `val` is every fifth picture, `train` the
                             rest, told by a hash of the name, so that new pictures move no others

    `class_names` gives the classes in order; without it they are sorted by name. A class may be a
    link to a folder; links to folders inside it are not followed. Raises DataError
    on no such data, on fewer than two classes, and on a class without a picture or not in
    `class_names`.
    """
    if not data_dir.is_dir():
        raise DataError(f"{data_dir}: expected the folder of a data set, found none")
    manifest = data_dir / f"{split}.csv"
    shards = sorted(data_dir.glob(f"{split}-*.tar")) + sorted(data_dir.glob(f"{split}.tar"))
    names = _OTHER_NAMES.get(split, (split,))
    split_dir = next((data_dir / n for n in names if (data_dir / n).is_dir()), data_dir / split)
    if manifest.is_file():
        return _from_manifest(manifest, class_names)
    if shards:
        return _from_shards(shards, split, class_names)
    if split_dir.is_dir():
        return _from_folders(split_dir, class_names)
    if any((data_dir / name).is_dir() for name in _SPLITS) or split not in ("train", "val"):
        found = ", ".join(sorted(path.name for path in data_dir.iterdir())[:10]) or "nothing"
        raise DataError(
            f"{data_dir}: expected {split}/CLASS/ with pictures, {split}.csv or {split}-*.tar, "
            f"found {found}"
        )
    return _part_of(_from_folders(data_dir, class_names), split)


def bad_pictures(
    data: ClassData, *, map_over: Callable[..., object] = map
) -> list[tuple[int, str]]:
    """Index and reason of every picture that cannot be decoded.

    map_over is `map` or that of an executor with the same order.
    """

    def problem(index: int) -> str | None:
        try:
            data.read(index, min_side=1)
        except ImageError as error:
            return str(error)
        return None

    reasons: list[str | None] = list(map_over(problem, range(len(data))))  # type: ignore[call-overload]
    return [(index, reason) for index, reason in enumerate(reasons) if reason is not None]


def _from_folders(folder: Path, class_names: tuple[str, ...] | None) -> ClassData:
    folders = sorted(
        path for path in folder.iterdir() if path.is_dir() and not path.name.startswith(".")
    )
    found = tuple(path.name for path in folders)
    if len(found) < 2:
        _refuse_detection_data(folder)
    names = _names(found, class_names, where=folder)
    files: list[str] = []
    labels: list[int] = []
    for path in folders:
        pictures = sorted(str(file) for file in path.rglob("*") if _is_picture(file))
        if not pictures:
            _refuse_detection_data(folder)
            suffixes = ", ".join(sorted(SUFFIXES))
            raise DataError(
                f"{path}: expected pictures of the class {path.name!r} ({suffixes}), found none "
                "(links to folders in it are not followed)"
            )
        files += pictures
        labels += [names.index(path.name)] * len(pictures)
    return _of_files(files, labels, names, source=folder)


def _refuse_detection_data(folder: Path) -> None:
    places = [folder, folder.parent] if folder.name in _SPLITS else [folder]
    found = [place / name for place in places for name in _OF_DETECTION if (place / name).exists()]
    if found:
        raise DataError(
            f"{folder}: expected a folder of pictures for each class, found data for detectors "
            f"({found[0]}), which no classifier learns from; `vovnet recipes` lists what does"
        )


def _is_picture(file: Path) -> bool:
    return file.suffix.lower() in SUFFIXES and not file.name.startswith(".") and file.is_file()


def _from_manifest(manifest: Path, class_names: tuple[str, ...] | None) -> ClassData:
    """The files a CSV names; relative paths count from its own folder."""
    try:
        with manifest.open(newline="", encoding="utf-8-sig") as stream:
            reader = csv.DictReader(stream, strict=True)
            columns = list(reader.fieldnames or [])
            if not {"path", "label"} <= set(columns):
                raise DataError(
                    f"{manifest}:1: expected the columns path and label, "
                    f"found {', '.join(columns) or 'none'}"
                )
            rows = [(reader.line_num, row["path"], row["label"]) for row in reader]
    except (OSError, UnicodeDecodeError, csv.Error) as error:
        raise DataError(f"{manifest}: expected a CSV file in UTF-8, found: {error}") from error
    for line, path, label in rows:
        if not path or not label:
            raise DataError(f"{manifest}:{line}: expected a path and a label, found a row without")
        if label != label.strip():
            raise DataError(f"{manifest}:{line}: expected no blanks around a label, got {label!r}")
        if not os.path.isfile(manifest.parent / path):  # false for names that are too long, too
            raise DataError(f"{manifest}:{line}: expected an image file, found none at {path!r}")
    names = _names(tuple(sorted({label for _, _, label in rows})), class_names, where=manifest)
    label_of = {name: label for label, name in enumerate(names)}
    files = [str(manifest.parent / path) for _, path, _ in rows]
    return _of_files(files, [label_of[label] for _, _, label in rows], names, source=manifest)


def _from_shards(shards: list[Path], split: str, class_names: tuple[str, ...] | None) -> ClassData:
    index = index_shards(shards)
    names = _names(index.class_names, class_names, where=shards[0].parent / f"{split}-*.tar")
    label_of = np.array([names.index(name) for name in index.class_names], dtype=np.int64)
    return ClassData(
        files=index.files,
        file_of=index.file_of,
        offsets=index.offsets,
        sizes=index.sizes,
        labels=label_of[index.labels],
        class_names=names,
        source=shards[0].parent,
    )


def _names(
    found: tuple[str, ...], wanted: tuple[str, ...] | None, *, where: Path
) -> tuple[str, ...]:
    """The classes in order: those wanted, if all that were found are among them."""
    if wanted is None:
        if len(found) < 2:
            raise DataError(
                f"{where}: expected at least 2 classes, found {', '.join(found) or 'none'}"
            )
        return found
    unknown = [name for name in found if name not in set(wanted)]
    if unknown:
        raise DataError(
            f"{where}: expected the classes {', '.join(wanted[:20])}; found also "
            f"{', '.join(unknown[:20])}"
        )
    return wanted


def _of_files(
    files: list[str], labels: list[int], class_names: tuple[str, ...], *, source: Path
) -> ClassData:
    count = len(files)
    return ClassData(
        files=tuple(files),
        file_of=np.arange(count),
        offsets=np.zeros(count, dtype=np.int64),
        sizes=np.full(count, WHOLE_FILE, dtype=np.int64),
        labels=np.array(labels, dtype=np.int64),
        class_names=class_names,
        source=source,
    )


def _part_of(data: ClassData, split: str) -> ClassData:
    """Training's or validation's part; a class of few pictures has at least one in each."""
    ranks = np.array([_hash_of(Path(file)) for file in data.files])
    in_val = np.zeros(len(data), dtype=bool)
    for label in range(len(data.class_names)):
        places = np.flatnonzero(data.labels == label)
        chosen = places[ranks[places] < VAL_PERCENT]
        if len(chosen) == 0:
            chosen = places[np.argsort(ranks[places], kind="stable")[:1]]
        if len(chosen) == len(places):
            raise DataError(
                f"{data.source / data.class_names[label]}: expected at least 2 pictures, one to "
                f"train on and one to validate on, found {len(places)}"
            )
        in_val[chosen] = True
    return data.chosen(np.flatnonzero(in_val if split == "val" else ~in_val))


def _hash_of(file: Path) -> int:
    """0..99 from the names of the class folder and the file alone, wherever the data set lies."""
    digest = hashlib.sha256(f"{file.parent.name}/{file.name}".encode(errors="surrogateescape"))
    return int.from_bytes(digest.digest()[:8], "big") % 100
