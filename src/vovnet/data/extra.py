"""What a format has no place for, in one file beside the labels of a split.

vovnet-extra/SPLIT.json names every image of the split, in order, with a checksum of its objects as
the labels have them, and of each object only what differs from what the labels give.
"""

import os
import zlib
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from vovnet.data.coco import parse_segmentation, read_json_object, segmentation_to_json
from vovnet.data.labels import Annotation, DetectionData, ImageRecord, brief
from vovnet.data.problems import (
    Parsed,
    Problem,
    ProblemKind,
    RejectedError,
    flag,
    integer,
    key_of,
    number,
)
from vovnet.errors import DataError

VERSION = 1
_KIND = ProblemKind.EXTRA
_ADVICE = "delete the file to use the labels alone"


def extra_file(folder: Path, split: str) -> Path:
    """Where what the labels of a split have no place for is kept."""
    return folder / "vovnet-extra" / f"{split}.json"


def make_extra(plain: DetectionData, whole: DetectionData, folder: Path) -> dict[str, Any] | None:
    """What `apply_extra` needs to turn `plain`, the labels as read, into `whole`; None: nothing.

    Both have the same image files, and each image the same objects in the same order.
    """
    if plain.images == whole.images and plain.category_ids == whole.category_ids:
        return None
    by_path = {image.path: image for image in plain.images}
    images = []
    for after in whole.images:
        before = by_path[after.path]
        pairs = zip(before.annotations, after.annotations, strict=True)
        entry = {
            "file": _name(after, folder),
            "id": after.id,
            "checksum": _checksum(before.annotations),
            "objects": [_difference(*pair) for pair in pairs],
        }
        images.append(entry)
    return {"version": VERSION, "category_ids": list(whole.category_ids), "images": images}


def _name(image: ImageRecord, folder: Path) -> str:
    return Path(os.path.relpath(image.path, folder)).as_posix()


def _checksum(annotations: Iterable[Annotation]) -> int:
    """Of the objects as the labels have them; line ends and spaces do not count."""
    seen = [(a.label, a.box_xyxy, a.segmentation, a.is_difficult) for a in annotations]
    return zlib.crc32(repr(seen).encode())


def _difference(before: Annotation, after: Annotation) -> dict[str, Any]:
    values = {
        "id": after.id,
        "area": after.area,
        "iscrowd": int(after.is_crowd),
        "difficult": int(after.is_difficult),
        "box_xyxy": list(after.box_xyxy),
        "segmentation": segmentation_to_json(after.segmentation),
    }
    same = {
        "id": before.id == after.id,
        "area": before.area == after.area,
        "iscrowd": before.is_crowd == after.is_crowd,
        "difficult": before.is_difficult == after.is_difficult,
        "box_xyxy": before.box_xyxy == after.box_xyxy,
        "segmentation": before.segmentation == after.segmentation,
    }
    return {key: value for key, value in values.items() if not same[key]}


def apply_extra(parsed: Parsed, file: Path, folder: Path) -> Parsed:
    """The split with what `file` holds beside its labels.

    An image whose labels have changed since, or that only one of the two knows, is a problem and is
    left out. Raises DataError where the file as a whole is not of this form.
    """
    content = read_json_object(file)
    entries = content.get("images")
    if content.get("version") != VERSION or not isinstance(entries, list):
        raise DataError(f"{file}: expected version {VERSION} and a list of images, got others")
    category_ids = _category_ids(content.get("category_ids"), file, len(parsed.data.class_names))
    waiting = {_name(image, folder): image for image in parsed.data.images}
    problems = list(parsed.problems)
    images: list[ImageRecord] = []
    places: dict[int, str] = {}
    seen: tuple[set[int], set[int]] = set(), set()
    for index, entry in enumerate(entries):
        try:
            place = f"{file}: images[{index}]"
            before = _known_image(entry, place, waiting)
            after = _merge(before, entry, place)
            _check_ids(after, seen, place)
        except RejectedError as rejected:
            name = entry.get("file") if isinstance(entry, dict) else None
            text = f"{rejected.text}; {_ADVICE}"
            problems.append(Problem(rejected.kind, text, name if isinstance(name, str) else None))
            continue
        images.append(after)
        pairs = zip(before.annotations, after.annotations, strict=True)
        places |= {b.id: parsed.places[a.id] for a, b in pairs if a.id in parsed.places}
    for name in waiting:
        text = f"{file}: expected an entry of {brief(name)}; {_ADVICE}"
        problems.append(Problem(_KIND, text, name))
    data = replace(parsed.data, images=tuple(images), category_ids=category_ids)
    return replace(parsed, data=data, problems=tuple(problems), places=places)


def _category_ids(value: object, file: Path, count: int) -> tuple[int, ...]:
    try:
        values = value if isinstance(value, list) else []
        ids = tuple(integer(item, f"{file}: category_ids", _KIND) for item in values)
    except RejectedError as rejected:
        raise DataError(rejected.text) from rejected
    if len(ids) != count or len(set(ids)) < count:
        raise DataError(f"{file}: category_ids: expected {count} different ids, got {brief(value)}")
    return ids


def _known_image(entry: object, place: str, waiting: dict[str, ImageRecord]) -> ImageRecord:
    """Takes the image that an entry names out of those that wait for theirs."""
    name = key_of(entry, "file", place, _KIND)
    image = waiting.pop(name, None) if isinstance(name, str) else None
    if image is None:
        text = f"{place}.file: expected an image of the split, once, got {brief(name)}"
        raise RejectedError(_KIND, text)
    return image


def _merge(image: ImageRecord, entry: object, place: str) -> ImageRecord:
    image_id = integer(key_of(entry, "id", place, _KIND), f"{place}.id", _KIND)
    objects = key_of(entry, "objects", place, _KIND)
    checksum = key_of(entry, "checksum", place, _KIND)
    if not isinstance(objects, list) or checksum != _checksum(image.annotations):
        text = f"{place}: expected the labels as they were written, but they have changed since"
        raise RejectedError(_KIND, text)
    if len(objects) != len(image.annotations):
        text = f"{place}.objects: expected {len(image.annotations)} entries, got {len(objects)}"
        raise RejectedError(_KIND, text)
    annotations = [
        _merge_object(annotation, value, f"{place}.objects[{index}]", (image.height, image.width))
        for index, (annotation, value) in enumerate(zip(image.annotations, objects, strict=True))
    ]
    return replace(image, id=image_id, annotations=tuple(annotations))


def _merge_object(
    annotation: Annotation, value: object, place: str, image_size: tuple[int, int]
) -> Annotation:
    if not isinstance(value, dict):
        raise RejectedError(_KIND, f"{place}: expected an object, got {brief(value)}")
    segmentation = annotation.segmentation
    if "segmentation" in value:
        segmentation = parse_segmentation(
            value["segmentation"], f"{place}.segmentation", image_size
        )
    return replace(
        annotation,
        id=integer(value.get("id", annotation.id), f"{place}.id", _KIND),
        area=number(value.get("area", annotation.area), f"{place}.area", _KIND),
        is_crowd=flag(value.get("iscrowd", annotation.is_crowd), f"{place}.iscrowd", _KIND),
        is_difficult=flag(
            value.get("difficult", annotation.is_difficult), f"{place}.difficult", _KIND
        ),
        box_xyxy=_box(value.get("box_xyxy", annotation.box_xyxy), f"{place}.box_xyxy"),
        segmentation=segmentation,
    )


def _box(value: object, place: str) -> tuple[float, float, float, float]:
    sides: Sequence[object] = value if isinstance(value, list | tuple) else ()
    if len(sides) != 4:
        raise RejectedError(_KIND, f"{place}: expected four numbers, got {brief(value)}")
    x1, y1, x2, y2 = (number(side, place, _KIND) for side in sides)
    return x1, y1, x2, y2


def _check_ids(image: ImageRecord, seen: tuple[set[int], set[int]], place: str) -> None:
    image_ids, annotation_ids = seen
    ids = [annotation.id for annotation in image.annotations]
    if image.id in image_ids or len(set(ids)) < len(ids) or annotation_ids & set(ids):
        raise RejectedError(_KIND, f"{place}: expected ids that were not given before")
    image_ids.add(image.id)
    annotation_ids.update(ids)


def count_objects(extra: Mapping[str, Any] | None) -> int:
    """Number of objects of which something is kept beside their labels, numbers apart."""
    if extra is None:
        return 0
    objects = (item for image in extra["images"] for item in image["objects"])
    return sum(bool(item.keys() - {"id"}) for item in objects)
