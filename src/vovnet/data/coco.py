"""COCO annotation files: read strictly, and written back for pycocotools."""

import glob
import json
from collections.abc import Callable, Collection, Sequence
from pathlib import Path
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
from vovnet.data.problems import (
    Parsed,
    Problem,
    ProblemKind,
    RejectedError,
    flag,
    integer,
    key_of,
    number,
    safe_name,
)
from vovnet.errors import DataError
from vovnet.images import MAX_PIXELS

# The rasteriser allocates by the length of a polygon's outline, also far outside the image.
MAX_OUTLINE = 2_000_000


def load_coco(annotation_file: Path, image_dir: Path) -> DetectionData:
    """Read a COCO instances file whose every entry has the right form.

    Image files are not opened and boxes may be empty or reach outside their image: data/check.py
    looks at those. Raises DataError with the file and the place of the first malformed entry.
    """

    def refuse(problem: Problem) -> NoReturn:
        raise DataError(f"{annotation_file}: {problem.kind}: {problem.text}")

    return parse_coco(read_coco_json(annotation_file), annotation_file, image_dir, report=refuse)


def parse_split(data_dir: Path, split: str) -> Parsed:
    """Read a split; `find_split` says where it looks. Raises DataError as `parse_files` does."""
    return parse_files(*find_split(data_dir, split))


def parse_files(annotation_file: Path, image_dir: Path) -> Parsed:
    """Read a COCO instances file, malformed entries apart from the rest.

    Raises DataError where the file is no JSON object with images, annotations and categories.
    """
    content = read_coco_json(annotation_file)
    problems: list[Problem] = []
    data = parse_coco(content, annotation_file, image_dir, report=problems.append)
    return Parsed(
        data=data,
        num_images=len(content["images"]),
        num_annotations=len(content["annotations"]),
        problems=tuple(problems),
        image_roots=(image_dir,),
    )


def read_coco_json(annotation_file: Path) -> dict[str, Any]:
    """Read the file and check that it has the lists images, annotations and categories.

    Raises DataError where the file is missing, is not JSON or lacks one of the lists.
    """
    content = read_json_object(annotation_file)
    for key in ("images", "annotations", "categories"):
        if not isinstance(content.get(key), list):
            found = brief(content[key]) if key in content else "no such key"
            raise DataError(f"{annotation_file}: expected a list under {key!r}, got {found}")
    return content


def read_json_object(file: Path) -> dict[str, Any]:
    """Read a file that holds one JSON object; raises DataError where it is missing or does not."""
    try:
        content = json.loads(file.read_bytes())
    except OSError as error:
        raise DataError(f"{file}: cannot be read: {error.strerror or error}") from error
    except RecursionError as error:
        raise DataError(f"{file}: not usable JSON: nested too deep") from error
    except ValueError as error:
        raise DataError(f"{file}: not valid JSON: {error}") from error
    if not isinstance(content, dict):
        raise DataError(f"{file}: expected a JSON object, got {brief(content)}")
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
            category_id = integer(key_of(entry, "id", place, kind), f"{place}.id", kind)
            name = key_of(entry, "name", place, kind)
            if not isinstance(name, str) or not name:
                raise RejectedError(kind, f"{place}.name: expected a text, got {brief(name)}")
            if category_id in names:
                kind = ProblemKind.DUPLICATE_CATEGORY
                raise RejectedError(kind, f"{place}: id {category_id} was given before")
            names[category_id] = name
        except RejectedError as rejected:
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
                raise RejectedError(ProblemKind.DUPLICATE_IMAGE, text)
            headers[header.id] = header
        except RejectedError as rejected:
            image_id = _id_of(entry, "id")
            if image_id is not None:
                refused_ids.add(image_id)
            file = entry.get("file_name") if isinstance(entry, dict) else None
            file = file if isinstance(file, str) else None
            report(Problem(rejected.kind, rejected.text, file, image_id))
    return headers, refused_ids


def _parse_image(entry: object, place: str, image_dir: Path) -> ImageRecord:
    kind = ProblemKind.IMAGE
    image_id = integer(key_of(entry, "id", place, kind), f"{place}.id", kind)
    path = image_dir / safe_name(key_of(entry, "file_name", place, kind), f"{place}.file_name")
    height = integer(key_of(entry, "height", place, kind), f"{place}.height", kind)
    width = integer(key_of(entry, "width", place, kind), f"{place}.width", kind)
    if height < 1 or width < 1 or height * width > MAX_PIXELS:
        text = f"{place}: expected a size of 1 to {MAX_PIXELS} pixels, got {height} x {width}"
        raise RejectedError(kind, text)
    return ImageRecord(image_id, path, height, width, ())


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
                raise RejectedError(ProblemKind.DUPLICATE_ANNOTATION, text)
            seen.add(annotation.id)
            grouped[header.id].append(annotation)
        except RejectedError as rejected:
            known = headers.get(image_id) if image_id is not None else None
            file = known.path.name if known else None
            report(Problem(rejected.kind, rejected.text, file, image_id, _id_of(entry, "id")))
    return grouped


def _parse_annotation(
    entry: object, place: str, headers: dict[int, ImageRecord], labels: dict[int, int]
) -> tuple[ImageRecord, Annotation]:
    kind = ProblemKind.ANNOTATION
    annotation_id = integer(key_of(entry, "id", place, kind), f"{place}.id", kind)
    image_id = integer(key_of(entry, "image_id", place, kind), f"{place}.image_id", kind)
    if image_id not in headers:
        text = f"{place}.image_id: no image has the id {image_id}"
        raise RejectedError(ProblemKind.UNKNOWN_IMAGE, text)
    category_id = integer(key_of(entry, "category_id", place, kind), f"{place}.category_id", kind)
    if category_id not in labels:
        text = f"{place}.category_id: no category has the id {category_id}"
        raise RejectedError(ProblemKind.UNKNOWN_CATEGORY, text)
    assert isinstance(entry, dict)  # key_of has looked
    header = headers[image_id]
    x, y, width, height = _parse_box(key_of(entry, "bbox", place, kind), f"{place}.bbox")
    area = entry.get("area")
    area = width * height if area is None else number(area, f"{place}.area", kind)
    is_crowd = flag(entry.get("iscrowd"), f"{place}.iscrowd", kind)
    is_difficult = flag(entry.get("difficult"), f"{place}.difficult", kind)
    segmentation = parse_segmentation(
        entry.get("segmentation"), f"{place}.segmentation", (header.height, header.width)
    )
    box_xyxy = (x, y, x + width, y + height)
    annotation = Annotation(
        annotation_id, labels[category_id], box_xyxy, segmentation, area, is_crowd, is_difficult
    )
    return header, annotation


def _parse_box(value: object, place: str) -> list[float]:
    kind = ProblemKind.ANNOTATION
    if not isinstance(value, list) or len(value) != 4:
        text = f"{place}: expected [x, y, width, height], got {brief(value)}"
        raise RejectedError(kind, text)
    for side in value:
        if isinstance(side, bool) or not isinstance(side, int | float):
            raise RejectedError(kind, f"{place}: expected four numbers, got {brief(value)}")
    # Sums of larger numbers are no longer exact to the pixel, and overflow where they are used.
    if not all(abs(side) < 2**31 for side in value):
        text = f"{place}: expected finite pixel positions, got {brief(value)}"
        raise RejectedError(ProblemKind.NON_FINITE_BOX, text)
    return [float(side) for side in value]


def parse_segmentation(value: object, place: str, image_size: tuple[int, int]) -> Segmentation:
    """Polygons or run lengths of a mask of that (height, width), as COCO writes them."""
    kind = ProblemKind.SEGMENTATION
    if value is None or value == []:
        return None
    if isinstance(value, dict):
        return _parse_rle(value, place, image_size)
    if not isinstance(value, list):
        text = f"{place}: expected polygons or run lengths, got {brief(value)}"
        raise RejectedError(kind, text)
    return [_parse_polygon(ring, f"{place}[{i}]", image_size) for i, ring in enumerate(value)]


def _parse_polygon(ring: object, place: str, image_size: tuple[int, int]) -> list[float]:
    kind = ProblemKind.SEGMENTATION
    if not isinstance(ring, list) or len(ring) < 6 or len(ring) % 2:
        text = f"{place}: expected [x1, y1, x2, y2, x3, y3, ...], got {brief(ring)}"
        raise RejectedError(kind, text)
    points = [number(value, place, kind) for value in ring]
    steps = (abs(a - b) for a, b in zip(points, points[2:] + points[:2], strict=True))
    if sum(steps) > MAX_OUTLINE:
        text = f"{place}: expected an outline of at most {MAX_OUTLINE} pixels, got {brief(ring)}"
        raise RejectedError(kind, text)
    return points


def _parse_rle(value: dict[str, Any], place: str, image_size: tuple[int, int]) -> Rle:
    kind = ProblemKind.SEGMENTATION
    if value.get("size") != list(image_size):
        text = f"{place}.size: expected {list(image_size)}, got {brief(value.get('size'))}"
        raise RejectedError(ProblemKind.SEGMENTATION_SIZE, text)
    counts = value.get("counts")
    if isinstance(counts, str) and counts.isascii() and counts:
        return Rle(size=list(image_size), counts=counts.encode("ascii"))
    if not isinstance(counts, list):
        text = f"{place}.counts: expected a text or a list of run lengths, got {brief(counts)}"
        raise RejectedError(kind, text)
    runs = [integer(run, f"{place}.counts", kind) for run in counts]
    pixels = image_size[0] * image_size[1]
    if not all(0 <= run <= pixels for run in runs) or sum(runs) != pixels:
        text = f"{place}.counts: expected runs of {pixels} pixels together, got {brief(counts)}"
        raise RejectedError(kind, text)
    compressed = coco_mask.frPyObjects({"size": list(image_size), "counts": runs}, *image_size)
    return Rle(size=list(image_size), counts=compressed["counts"])


def _id_of(entry: object, key: str) -> int | None:
    """The id if the entry has a usable one."""
    if not isinstance(entry, dict):
        return None
    try:
        return integer(entry.get(key), key, ProblemKind.ANNOTATION)
    except RejectedError:
        return None


def is_coco(data_dir: Path) -> bool:
    """Whether a folder holds annotation files of COCO."""
    return any((data_dir / "annotations").glob("*.json"))


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
    """The data set as the JSON types that pycocotools indexes, to evaluate on.

    In a data set with masks an object without one gets its box as a polygon, as in training. What
    is difficult is a crowd here, because that is what pycocotools ignores.
    """
    with_masks = has_masks(data)
    content = _to_document(data, [image.path.as_posix() for image in data.images])
    annotations = (annotation for image in data.images for annotation in image.annotations)
    for entry, annotation in zip(content["annotations"], annotations, strict=True):
        entry["iscrowd"] = int(annotation.is_ignored)
        if annotation.segmentation is None and with_masks:
            x1, y1, x2, y2 = annotation.box_xyxy
            entry["segmentation"] = [[x1, y1, x2, y1, x2, y2, x1, y2]]
    return content


def write_split(folder: Path, split: str, data: DetectionData, names: Sequence[str]) -> None:
    """Write annotations/SPLIT.json; `names[i]` is the file of image i below images/SPLIT."""
    file = folder / "annotations" / f"{split}.json"
    file.parent.mkdir(parents=True, exist_ok=True)
    content = _to_document(data, names)
    file.write_text(json.dumps(content, ensure_ascii=False, allow_nan=False), encoding="utf-8")
    (folder / "images" / split).mkdir(parents=True, exist_ok=True)


def _to_document(data: DetectionData, names: Sequence[str]) -> dict[str, Any]:
    return {
        "info": {},
        "licenses": [],
        "images": [
            {"id": image.id, "file_name": name, "height": image.height, "width": image.width}
            for image, name in zip(data.images, names, strict=True)
        ],
        "annotations": [
            _to_entry(annotation, image.id, data.category_ids)
            for image in data.images
            for annotation in image.annotations
        ],
        "categories": [
            {"id": category_id, "name": name}
            for category_id, name in zip(data.category_ids, data.class_names, strict=True)
        ],
    }


def _to_entry(
    annotation: Annotation, image_id: int, category_ids: tuple[int, ...]
) -> dict[str, Any]:
    x1, y1, x2, y2 = annotation.box_xyxy
    entry: dict[str, Any] = {
        "id": annotation.id,
        "image_id": image_id,
        "category_id": category_ids[annotation.label],
        "bbox": [x1, y1, x2 - x1, y2 - y1],
        "area": annotation.area,
        "iscrowd": int(annotation.is_crowd),
    }
    if annotation.is_difficult:  # no key of COCO's own
        entry["difficult"] = 1
    if annotation.segmentation is not None:
        entry["segmentation"] = segmentation_to_json(annotation.segmentation)
    return entry


def segmentation_to_json(segmentation: Segmentation) -> object:
    """A mask as COCO writes it, None where there is none."""
    if isinstance(segmentation, dict):
        counts = segmentation["counts"].decode("ascii")
        return {"size": segmentation["size"], "counts": counts}
    return segmentation
