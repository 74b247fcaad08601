"""The formats of labelled images: which one lies in a folder, and the one entry that loads it."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

from vovnet.data import coco, voc, yolo
from vovnet.data.check import Report, check_dataset, load_checked
from vovnet.data.extra import apply_extra, extra_file
from vovnet.data.labels import DetectionData
from vovnet.data.problems import Parsed
from vovnet.errors import ConfigError, DataError

AUTO = "auto"


@dataclass(frozen=True, slots=True)
class Format:
    """One format: what it looks like, whether a folder has it, and how a split of it is read.

    layout        the files it is recognised by
    images        folder that `write_split` expects the images in
    find_split    raises DataError where the split is not there, and opens no images
    parse_split   reads the labels of a split, without what is kept beside them
    write_split   writes the labels of a split whose images lie at these names
    """

    title: str
    layout: str
    images: str
    is_in: Callable[[Path], bool]
    find_split: Callable[[Path, str], object]
    parse_split: Callable[[Path, str], Parsed]
    write_split: Callable[[Path, str, DetectionData, Sequence[str]], None]


FORMATS = {
    "coco": Format(
        title="COCO",
        layout="annotations/*.json",
        images="images/{split}",
        is_in=coco.is_coco,
        find_split=coco.find_split,
        parse_split=coco.parse_split,
        write_split=coco.write_split,
    ),
    "voc": Format(
        title="Pascal VOC",
        layout="ImageSets/Main/*.txt and Annotations/*.xml, or VOC20* folders with these",
        images="JPEGImages",
        is_in=voc.is_voc,
        find_split=voc.find_split,
        parse_split=voc.parse_split,
        write_split=voc.write_split,
    ),
    "yolo": Format(
        title="YOLO",
        layout="data.yaml",
        images="images/{split}",
        is_in=yolo.is_yolo,
        find_split=yolo.find_split,
        parse_split=yolo.parse_split,
        write_split=yolo.write_split,
    ),
}
"""By the value of the option --format."""


def recognise(data_dir: Path, format: str = AUTO) -> str:
    """Name of the format of a folder; a format other than "auto" is taken as it is.

    Raises DataError where the folder has none or several, ConfigError on an unknown format.
    """
    if format != AUTO and format not in FORMATS:
        raise ConfigError(
            f"--format: expected one of {', '.join([AUTO, *FORMATS])}, found {format!r}"
        )
    if not data_dir.exists():
        raise DataError(f"{data_dir}: expected the folder of a data set, found nothing")
    if format != AUTO:
        return format
    found = [name for name, known in FORMATS.items() if known.is_in(data_dir)]
    if len(found) == 1:
        return found[0]
    layouts = ", ".join(f"{known.title} ({known.layout})" for known in FORMATS.values())
    titles = " and ".join(FORMATS[name].title for name in found)
    if found:
        options = " or ".join(f"--format {name}" for name in found)
        raise DataError(f"{data_dir}: expected one format, found {titles}; choose by {options}")
    raise DataError(
        f"{data_dir}: expected one of {layouts}; found none of them. A folder of pictures for each "
        "class is for a classifier: vovnet train --task classify, which checks it"
    )


def require_split(data_dir: Path, split: str, *, format: str = AUTO) -> str:
    """Name of the format of a split that is there; opens no images.

    Raises DataError where it is not there; see `recognise` for the rest.
    """
    name = recognise(data_dir, format)
    FORMATS[name].find_split(data_dir, split)
    return name


def parse_split(data_dir: Path, split: str, *, format: str = AUTO) -> Parsed:
    """Read the labels of a split, malformed entries apart from the rest; raises DataError."""
    parsed = FORMATS[recognise(data_dir, format)].parse_split(data_dir, split)
    folder = data_dir.parent if data_dir.is_file() else data_dir  # the file is data.yaml
    file = extra_file(folder, split)
    return apply_extra(parsed, file, folder) if file.is_file() else parsed


def load_split(
    data_dir: Path,
    split: str,
    *,
    format: str = AUTO,
    skip_bad: bool = False,
    read_pixels: bool = True,
) -> tuple[DetectionData, Report]:
    """Load a split such as "train" of a COCO, Pascal VOC or YOLO data set, and check it.

    `format` is auto, coco, voc or yolo. With read_pixels False only the header of each image is
    read. Under skip_bad a bad annotation is left out alone, a bad image with its annotations.
    Raises DataError naming each problem, or where the split or its format cannot be told.
    """
    parsed = parse_split(data_dir, split, format=format)
    return load_checked(parsed, skip_bad=skip_bad, read_pixels=read_pixels)


def check_split(
    data_dir: Path, split: str, *, format: str = AUTO, read_pixels: bool = True
) -> Report:
    """List every problem of a split; raises DataError where it cannot be read at all."""
    return check_dataset(parse_split(data_dir, split, format=format), read_pixels=read_pixels)
