"""COCO annotation files: read strictly, and written back for pycocotools."""

import glob
import json
import math
import os
from collections.abc import Callable, Collection
from dataclasses import dataclass
from enum import StrEnum
from pathlib import Path, PurePosixPath, PureWindowsPath
from typing import Any, NoReturn

from pycocotools import mask as coco_mask

from vovnet.data.labels import (
    Annotation,
    DetectionData,
    ImageRecord,
    Rle,
    Segmentation,
    brief,
    has_masks,
)
from vovnet.errors import DataError
from vovnet.images import MAX_PIXELS

# The rasteriser allocates by the length of a polygon's outline, also far outside the image.
MAX_OUTLINE = 2_000_000


class ProblemKind(StrEnum):
    """What can be wrong with one entry of an annotation file or with the image it names."""

    CATEGORY = "bad category entry"
    IMAGE = "bad image entry"
    ANNOTATION = "bad annotation entry"
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


@dataclass(frozen=True, slots=True)
class Problem:
    """One thing that is wrong; `file` is the image file where one is known."""

    kind: ProblemKind
    text: str
    file: str | None = None
    image_id: int | None = None
    annotation_id: int | None = None


class _RejectedError(Exception):
    """Why one entry cannot be used; never leaves this module."""

    def __init__(self, kind: ProblemKind, text: str) -> None:
        super().__init__(text)
        self.kind = kind
        self.text = text


def load_coco(annotation_file: Path, image_dir: Path) -> DetectionData:
    """Read a COCO instances file whose every entry has the right form.

    Image files are not opened and boxes may be empty or reach outside their image: data/check.py
    looks at those. Raises DataError with the file and the place of the first malformed entry.
    """

    def refuse(problem: Problem) -> NoReturn:
        raise DataError(f"{annotation_file}: {problem.kind}: {problem.text}")

    return parse_coco(read_coco_json(annotation_file), annotation_file, image_dir, report=refuse)


def read_coco_json(annotation_file: Path) -> dict[str, Any]:
    """Read the file and check that it has the lists images, annotations and categories.

    Raises DataError where the file is missing, is not JSON or lacks one of the lists.
    """
    try:
        content = json.loads(annotation_file.read_bytes())
    except OSError as error:
        raise DataError(f"{annotation_file}: cannot be read: {error.strerror or error}") from error
    except RecursionError as error:
        raise DataError(f"{annotation_file}: not usable JSON: nested too deep") from error
    except ValueError as error:
        raise DataError(f"{annotation_file}: not valid JSON: {error}") from error
    if not isinstance(content, dict):
        raise DataError(
            f"{annotation_file}: expected a JSON object with images, annotations and categories, "
            f"got {brief(content)}"
        )
    for key in ("images", "annotations", "categories"):
        if not isinstance(content.get(key), list):
            found = brief(content[key]) if key in content else "no such key"
            raise DataError(f"{annotation_file}: expected a list under {key!r}, got {found}")
    return content


def parse_coco(
    content: dict[str, Any],
    annotation_file: Path,
    image_dir: Path,
    *,
    report: Callable[[Problem], None],
) -> DetectionData:
    """Turn the content of `read_coco_json` into a data set.

    Each malformed entry goes to `report` and, when that returns, is left out; what belongs to a
    left-out image is left out with it.
    """
    names = _parse_categories(content["categories"], report)
    category_ids = sorted(names)
    labels = {category_id: label for label, category_id in enumerate(category_ids)}
    headers, refused_ids = _parse_images(content["images"], image_dir, report)
    grouped = _parse_annotations(content["annotations"], headers, refused_ids, labels, report)
    images = tuple(
        ImageRecord(header.id, header.path, header.height, header.width, tuple(grouped[header.id]))
        for header in headers.values()
    )
    class_names = tuple(names[category_id] for category_id in category_ids)
    return DetectionData(images, class_names, tuple(category_ids), annotation_file)


def _parse_categories(entries: list[Any], report: Callable[[Problem], None]) -> dict[int, str]:
    names: dict[int, str] = {}
    for index, entry in enumerate(entries):
        place = f"categories[{index}]"
        kind = ProblemKind.CATEGORY
        try:
            category_id = _integer(_field(entry, "id", place, kind), f"{place}.id", kind)
            name = _field(entry, "name", place, kind)
            if not isinstance(name, str) or not name:
                raise _RejectedError(kind, f"{place}.name: expected a text, got {brief(name)}")
            if category_id in names:
                kind = ProblemKind.DUPLICATE_CATEGORY
                raise _RejectedError(kind, f"{place}: id {category_id} was given before")
            names[category_id] = name
        except _RejectedError as rejected:
            report(Problem(rejected.kind, rejected.text))
    return names


def _parse_images(
    entries: list[Any], image_dir: Path, report: Callable[[Problem], None]
) -> tuple[dict[int, ImageRecord], set[int]]:
    """Records without annotations by id, and the ids of entries that were refused."""
    headers: dict[int, ImageRecord] = {}
    refused_ids: set[int] = set()
    for index, entry in enumerate(entries):
        place = f"images[{index}]"
        try:
            header = _parse_image(entry, place, image_dir)
            if header.id in headers:
                first = brief(headers[header.id].path.name)
                text = f"{place}: id {header.id} was given before, to {first}"
                raise _RejectedError(ProblemKind.DUPLICATE_IMAGE, text)
            headers[header.id] = header
        except _RejectedError as rejected:
            image_id = _id_of(entry, "id")
            if image_id is not None:
                refused_ids.add(image_id)
            file = entry.get("file_name") if isinstance(entry, dict) else None
            file = file if isinstance(file, str) else None
            report(Problem(rejected.kind, rejected.text, file, image_id))
    return headers, refused_ids


def _parse_image(entry: object, place: str, image_dir: Path) -> ImageRecord:
    kind = ProblemKind.IMAGE
    image_id = _integer(_field(entry, "id", place, kind), f"{place}.id", kind)
    path = image_dir / _safe_name(_field(entry, "file_name", place, kind), f"{place}.file_name")
    height = _integer(_field(entry, "height", place, kind), f"{place}.height", kind)
    width = _integer(_field(entry, "width", place, kind), f"{place}.width", kind)
    if height < 1 or width < 1 or height * width > MAX_PIXELS:
        text = f"{place}: expected a size of 1 to {MAX_PIXELS} pixels, got {height} x {width}"
        raise _RejectedError(kind, text)
    return ImageRecord(image_id, path, height, width, ())


def _safe_name(name: object, place: str) -> str:
    """A relative file name without a step upwards, read by the rules of either kind of system."""
    if not isinstance(name, str) or not name or "\0" in name or not _is_encodable(name):
        raise _RejectedError(ProblemKind.IMAGE, f"{place}: expected a file name, got {brief(name)}")
    for path in (PurePosixPath(name), PureWindowsPath(name)):
        if path.root or path.drive or ".." in path.parts:
            text = f"{place}: expected a name below the image folder, got {brief(name)}"
            raise _RejectedError(ProblemKind.UNSAFE_PATH, text)
    return name


def _is_encodable(name: str) -> bool:
    try:
        os.fsencode(name)
    except UnicodeEncodeError:
        return False
    return True


def _parse_annotations(
    entries: list[Any],
    headers: dict[int, ImageRecord],
    refused_ids: Collection[int],
    labels: dict[int, int],
    report: Callable[[Problem], None],
) -> dict[int, list[Annotation]]:
    grouped: dict[int, list[Annotation]] = {image_id: [] for image_id in headers}
    seen: set[int] = set()
    for index, entry in enumerate(entries):
        image_id = _id_of(entry, "image_id")
        if image_id in refused_ids and image_id not in headers:
            continue
        try:
            header, annotation = _parse_annotation(entry, f"annotations[{index}]", headers, labels)
            if annotation.id in seen:
                text = f"annotations[{index}]: id {annotation.id} was given before"
                raise _RejectedError(ProblemKind.DUPLICATE_ANNOTATION, text)
            seen.add(annotation.id)
            grouped[header.id].append(annotation)
        except _RejectedError as rejected:
            known = headers.get(image_id) if image_id is not None else None
            file = known.path.name if known else None
            report(Problem(rejected.kind, rejected.text, file, image_id, _id_of(entry, "id")))
    return grouped


def _parse_annotation(
    entry: object, place: str, headers: dict[int, ImageRecord], labels: dict[int, int]
) -> tuple[ImageRecord, Annotation]:
    kind = ProblemKind.ANNOTATION
    annotation_id = _integer(_field(entry, "id", place, kind), f"{place}.id", kind)
    image_id = _integer(_field(entry, "image_id", place, kind), f"{place}.image_id", kind)
    if image_id not in headers:
        text = f"{place}.image_id: no image has the id {image_id}"
        raise _RejectedError(ProblemKind.UNKNOWN_IMAGE, text)
    category_id = _integer(_field(entry, "category_id", place, kind), f"{place}.category_id", kind)
    if category_id not in labels:
        text = f"{place}.category_id: no category has the id {category_id}"
        raise _RejectedError(ProblemKind.UNKNOWN_CATEGORY, text)
    assert isinstance(entry, dict)  # _field has looked
    header = headers[image_id]
    x, y, width, height = _parse_box(_field(entry, "bbox", place, kind), f"{place}.bbox")
    area = entry.get("area")
    area = width * height if area is None else _number(area, f"{place}.area", kind)
    is_crowd = _flag(entry.get("iscrowd"), f"{place}.iscrowd", kind)
    segmentation = _parse_segmentation(
        entry.get("segmentation"), f"{place}.segmentation", (header.height, header.width)
    )
    box_xyxy = (x, y, x + width, y + height)
    annotation = Annotation(
        annotation_id, labels[category_id], box_xyxy, segmentation, area, is_crowd
    )
    return header, annotation


def _parse_box(value: object, place: str) -> list[float]:
    kind = ProblemKind.ANNOTATION
    if not isinstance(value, list) or len(value) != 4:
        text = f"{place}: expected [x, y, width, height], got {brief(value)}"
        raise _RejectedError(kind, text)
    for number in value:
        if isinstance(number, bool) or not isinstance(number, int | float):
            raise _RejectedError(kind, f"{place}: expected four numbers, got {brief(value)}")
    # Sums of larger numbers are no longer exact to the pixel, and overflow where they are used.
    if not all(abs(number) < 2**31 for number in value):
        text = f"{place}: expected finite pixel positions, got {brief(value)}"
        raise _RejectedError(ProblemKind.NON_FINITE_BOX, text)
    return [float(number) for number in value]


def _parse_segmentation(value: object, place: str, image_size: tuple[int, int]) -> Segmentation:
    kind = ProblemKind.SEGMENTATION
    if value is None or value == []:
        return None
    if isinstance(value, dict):
        return _parse_rle(value, place, image_size)
    if not isinstance(value, list):
        text = f"{place}: expected polygons or run lengths, got {brief(value)}"
        raise _RejectedError(kind, text)
    return [_parse_polygon(ring, f"{place}[{i}]", image_size) for i, ring in enumerate(value)]


def _parse_polygon(ring: object, place: str, image_size: tuple[int, int]) -> list[float]:
    kind = ProblemKind.SEGMENTATION
    if not isinstance(ring, list) or len(ring) < 6 or len(ring) % 2:
        text = f"{place}: expected [x1, y1, x2, y2, x3, y3, ...], got {brief(ring)}"
        raise _RejectedError(kind, text)
    points = [_number(value, place, kind) for value in ring]
    steps = (abs(a - b) for a, b in zip(points, points[2:] + points[:2], strict=True))
    if sum(steps) > MAX_OUTLINE:
        text = f"{place}: expected an outline of at most {MAX_OUTLINE} pixels, got {brief(ring)}"
        raise _RejectedError(kind, text)
    return points


def _parse_rle(value: dict[str, Any], place: str, image_size: tuple[int, int]) -> Rle:
    kind = ProblemKind.SEGMENTATION
    if value.get("size") != list(image_size):
        text = f"{place}.size: expected {list(image_size)}, got {brief(value.get('size'))}"
        raise _RejectedError(ProblemKind.SEGMENTATION_SIZE, text)
    counts = value.get("counts")
    if isinstance(counts, str) and counts.isascii() and counts:
        return Rle(size=list(image_size), counts=counts.encode("ascii"))
    if not isinstance(counts, list):
        text = f"{place}.counts: expected a text or a list of run lengths, got {brief(counts)}"
        raise _RejectedError(kind, text)
    runs = [_integer(run, f"{place}.counts", kind) for run in counts]
    pixels = image_size[0] * image_size[1]
    if not all(0 <= run <= pixels for run in runs) or sum(runs) != pixels:
        text = f"{place}.counts: expected runs of {pixels} pixels together, got {brief(counts)}"
        raise _RejectedError(kind, text)
    compressed = coco_mask.frPyObjects({"size": list(image_size), "counts": runs}, *image_size)
    return Rle(size=list(image_size), counts=compressed["counts"])


def _field(entry: object, key: str, place: str, kind: ProblemKind) -> object:
    if not isinstance(entry, dict):
        raise _RejectedError(kind, f"{place}: expected an object, got {brief(entry)}")
    if key not in entry:
        raise _RejectedError(kind, f"{place}: expected the key {key!r}, got {brief(sorted(entry))}")
    return entry[key]


def _integer(value: object, place: str, kind: ProblemKind) -> int:
    if isinstance(value, float) and value.is_integer():
        value = int(value)
    if isinstance(value, bool) or not isinstance(value, int) or abs(value) >= 2**63:
        raise _RejectedError(kind, f"{place}: expected a whole number, got {brief(value)}")
    return value


def _flag(value: object, place: str, kind: ProblemKind) -> bool:
    if value is None or value in (0, 1):
        return bool(value)
    raise _RejectedError(kind, f"{place}: expected 0 or 1, got {brief(value)}")


def _number(value: object, place: str, kind: ProblemKind) -> float:
    is_number = isinstance(value, int | float) and not isinstance(value, bool)
    if not is_number or not abs(value) < 1e300 or not math.isfinite(value):  # type: ignore[arg-type]
        raise _RejectedError(kind, f"{place}: expected a finite number, got {brief(value)}")
    return float(value)  # type: ignore[arg-type]


def _id_of(entry: object, key: str) -> int | None:
    """The id if the entry has a usable one."""
    if not isinstance(entry, dict):
        return None
    try:
        return _integer(entry.get(key), key, ProblemKind.ANNOTATION)
    except _RejectedError:
        return None


def find_split(data_dir: Path, split: str) -> tuple[Path, Path]:
    """Annotation file and image folder of a split such as "train".

    Understands data_dir/annotations/SPLIT.json and instances_SPLIT*.json with the images in
    images/SPLIT, SPLIT or images. Raises DataError listing what was looked for.
    """
    folder = data_dir / "annotations"
    plain = folder / f"{split}.json"
    pattern = f"instances_{glob.escape(split)}*.json"
    found = [plain] if plain.is_file() else sorted(folder.glob(pattern))
    if len(found) != 1:
        got = ", ".join(path.name for path in found) or "neither"
        raise DataError(
            f"split {split!r}: expected {plain} or one file {folder / f'instances_{split}*.json'}, "
            f"got {got}"
        )
    name = found[0].stem.removeprefix("instances_")
    folders = [data_dir / "images" / name, data_dir / name]
    folders += [data_dir / "images" / split, data_dir / split, data_dir / "images"]
    for candidate in folders:
        if candidate.is_dir():
            return found[0], candidate
    looked = ", ".join(str(candidate) for candidate in dict.fromkeys(folders))
    raise DataError(f"split {split!r}: expected the images in one of {looked}; got none of them")


def to_coco_dict(data: DetectionData) -> dict[str, Any]:
    """The data set as the JSON types that pycocotools indexes.

    In a data set with masks an object without one gets its box as a polygon, as in training.
    """
    with_masks = has_masks(data)
    return {
        "info": {},
        "licenses": [],
        "images": [
            {
                "id": image.id,
                "file_name": image.path.as_posix(),
                "height": image.height,
                "width": image.width,
            }
            for image in data.images
        ],
        "annotations": [
            _annotation_dict(annotation, image.id, data.category_ids, with_masks=with_masks)
            for image in data.images
            for annotation in image.annotations
        ],
        "categories": [
            {"id": category_id, "name": name}
            for category_id, name in zip(data.category_ids, data.class_names, strict=True)
        ],
    }


def _annotation_dict(
    annotation: Annotation, image_id: int, category_ids: tuple[int, ...], *, with_masks: bool
) -> dict[str, Any]:
    x1, y1, x2, y2 = annotation.box_xyxy
    result: dict[str, Any] = {
        "id": annotation.id,
        "image_id": image_id,
        "category_id": category_ids[annotation.label],
        "bbox": [x1, y1, x2 - x1, y2 - y1],
        "area": annotation.area,
        "iscrowd": int(annotation.is_crowd),
    }
    segmentation = annotation.segmentation
    if isinstance(segmentation, dict):
        counts = segmentation["counts"].decode("ascii")
        result["segmentation"] = {"size": segmentation["size"], "counts": counts}
    elif segmentation is not None:
        result["segmentation"] = segmentation
    elif with_masks:
        result["segmentation"] = [[x1, y1, x2, y1, x2, y2, x1, y2]]
    return result
