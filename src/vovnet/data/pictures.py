"""All pictures of a data set, whatever its labels say: what a backbone is pretrained on."""

from collections.abc import Sequence
from pathlib import Path

import numpy as np

from vovnet.data.classes import WHOLE_FILE, ClassData, load_classes
from vovnet.data.formats import AUTO, FORMATS, parse_split, recognise
from vovnet.errors import DataError
from vovnet.images import SUFFIXES

_TEST = "test"


def load_pictures(data_dir: Path, splits: Sequence[str], *, format: str = AUTO) -> ClassData:
    """The pictures of these splits, each once and without a class; nothing is decoded.

    data_dir is a data set in COCO, Pascal VOC or YOLO format, manifests or shards of labelled
    pictures, of which the splits that are there are taken; or any other folder, of which all
    pictures below it are, but those in its own folder `test`.
    Raises DataError where there is no picture, ConfigError on an unknown format.
    """
    if not data_dir.exists():
        raise DataError(f"{data_dir}: expected a folder of pictures, found nothing")
    if format != AUTO or any(known.is_in(data_dir) for known in FORMATS.values()):
        found = _of_files(_detection_files(data_dir, splits, format), data_dir)
    else:
        parts = [load_classes(data_dir, split) for split in splits if _is_listed(data_dir, split)]
        found = _joined(parts) if parts else _of_files(_files_below(data_dir), data_dir)
    if not len(found):
        suffixes = ", ".join(sorted(SUFFIXES))
        raise DataError(
            f"{data_dir}: expected pictures ({suffixes}) in the splits {', '.join(splits)}, or in "
            "any folder but test, found none"
        )
    return found


def _detection_files(data_dir: Path, splits: Sequence[str], format: str) -> list[Path]:
    name = recognise(data_dir, format)
    files: list[Path] = []
    for split in splits:
        try:
            FORMATS[name].find_split(data_dir, split)
        except DataError:
            continue
        images = parse_split(data_dir, split, format=name).data.images
        files += [image.path for image in images]
    return files


def _is_listed(data_dir: Path, split: str) -> bool:
    """Whether a manifest or shards say what a split of labelled pictures holds."""
    names = (f"{split}.csv", f"{split}.tar", f"{split}-*.tar")
    return any(path.is_file() for name in names for path in data_dir.glob(name))


def _files_below(folder: Path) -> list[Path]:
    return sorted(
        path
        for path in folder.rglob("*")
        if path.suffix.lower() in SUFFIXES
        and not any(part.startswith(".") for part in path.relative_to(folder).parts)
        and path.relative_to(folder).parts[0] != _TEST
        and path.is_file()
    )


def _of_files(files: Sequence[Path], source: Path) -> ClassData:
    names = tuple(dict.fromkeys(str(path) for path in files))
    count = len(names)
    return ClassData(
        files=names,
        file_of=np.arange(count),
        offsets=np.zeros(count, dtype=np.int64),
        sizes=np.full(count, WHOLE_FILE, dtype=np.int64),
        labels=np.zeros(count, dtype=np.int64),
        class_names=(),
        source=source,
    )


def _joined(parts: Sequence[ClassData]) -> ClassData:
    starts = np.cumsum([0, *(len(part.files) for part in parts)])
    count = sum(len(part) for part in parts)
    return ClassData(
        files=tuple(file for part in parts for file in part.files),
        file_of=np.concatenate([s + p.file_of for s, p in zip(starts, parts, strict=False)]),
        offsets=np.concatenate([part.offsets for part in parts]),
        sizes=np.concatenate([part.sizes for part in parts]),
        labels=np.zeros(count, dtype=np.int64),
        class_names=(),
        source=parts[0].source.parent if parts[0].source.is_file() else parts[0].source,
    )
