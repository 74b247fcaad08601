"""What can be wrong with labelled images, and how the values of a label file are read strictly."""

import math
import os
from collections.abc import Mapping
from dataclasses import dataclass, field
from enum import StrEnum
from pathlib import Path, PurePosixPath, PureWindowsPath

from vovnet.data.labels import DetectionData, brief


class ProblemKind(StrEnum):
    """What can be wrong with one entry of the labels or with the image it names."""

    CATEGORY = "bad category entry"
    IMAGE = "bad image entry"
    ANNOTATION = "bad annotation entry"
    LABEL_FILE = "bad label file"
    DUPLICATE_CATEGORY = "duplicate category id"
    DUPLICATE_IMAGE = "duplicate image id"
    DUPLICATE_ANNOTATION = "duplicate annotation id"
    UNSAFE_PATH = "file outside the image folder"
    UNKNOWN_IMAGE = "unknown image id"
    UNKNOWN_CATEGORY = "unknown category id"
    NON_FINITE_BOX = "non-finite box"
    DEGENERATE_BOX = "degenerate box"
    OUTSIDE_BOX = "box outside the image"
    SEGMENTATION = "broken segmentation"
    SEGMENTATION_SIZE = "segmentation size disagrees with the image entry"
    MISSING_FILE = "missing image file"
    UNREADABLE_FILE = "unreadable image file"
    IMAGE_SIZE = "image size disagrees with the file"
    EXTRA = "extra file disagrees with the labels"


@dataclass(frozen=True, slots=True)
class Problem:
    """One thing that is wrong; `file` is the image file where one is known."""

    kind: ProblemKind
    text: str
    file: str | None = None
    image_id: int | None = None
    annotation_id: int | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class Parsed:
    """One split as its label files have it, before the images are looked at.

    num_images, num_annotations   entries in the files, malformed ones included
    image_roots                   folders that the names of the images are relative to
    places                        by annotation id, where in which file it stands; COCO has none
    sizes_measured                whether the sizes are those of the image files
    """

    data: DetectionData
    num_images: int
    num_annotations: int
    problems: tuple[Problem, ...]
    image_roots: tuple[Path, ...]
    places: Mapping[int, str] = field(default_factory=dict)
    sizes_measured: bool = False


class RejectedError(Exception):
    """Why one entry cannot be used; it becomes a Problem and never leaves vovnet.data."""

    def __init__(self, kind: ProblemKind, text: str) -> None:
        super().__init__(text)
        self.kind = kind
        self.text = text


def safe_name(name: object, place: str) -> str:
    """A relative file name without a step upwards, read by the rules of either kind of system."""
    if not isinstance(name, str) or not name or "\0" in name or not _is_encodable(name):
        raise RejectedError(ProblemKind.IMAGE, f"{place}: expected a file name, got {brief(name)}")
    for path in (PurePosixPath(name), PureWindowsPath(name)):
        if path.root or path.drive or ".." in path.parts:
            text = f"{place}: expected a name below the image folder, got {brief(name)}"
            raise RejectedError(ProblemKind.UNSAFE_PATH, text)
    return name


def _is_encodable(name: str) -> bool:
    try:
        os.fsencode(name)
    except UnicodeEncodeError:
        return False
    return True


def key_of(entry: object, key: str, place: str, kind: ProblemKind) -> object:
    """The value of a key that must be there."""
    if not isinstance(entry, dict):
        raise RejectedError(kind, f"{place}: expected an object, got {brief(entry)}")
    if key not in entry:
        raise RejectedError(kind, f"{place}: expected the key {key!r}, got {brief(sorted(entry))}")
    return entry[key]


def integer(value: object, place: str, kind: ProblemKind) -> int:
    """A whole number of at most 63 bits, 5.0 included."""
    if isinstance(value, float) and value.is_integer():
        value = int(value)
    if isinstance(value, bool) or not isinstance(value, int) or abs(value) >= 2**63:
        raise RejectedError(kind, f"{place}: expected a whole number, got {brief(value)}")
    return value


def flag(value: object, place: str, kind: ProblemKind) -> bool:
    """0, 1, false or true; false where there is none."""
    if value is None or value in (0, 1):
        return bool(value)
    raise RejectedError(kind, f"{place}: expected 0 or 1, got {brief(value)}")


def number(value: object, place: str, kind: ProblemKind) -> float:
    """A finite number."""
    is_number = isinstance(value, int | float) and not isinstance(value, bool)
    if not is_number or not abs(value) < 1e300 or not math.isfinite(value):  # type: ignore[arg-type]
        raise RejectedError(kind, f"{place}: expected a finite number, got {brief(value)}")
    return float(value)  # type: ignore[arg-type]
