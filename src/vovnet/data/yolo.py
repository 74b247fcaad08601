"""YOLO text labels: data.yaml, a text file per image with boxes or polygons, and written back."""

import os
import re
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from decimal import Context, Decimal, localcontext
from itertools import pairwise
from pathlib import Path
from typing import Any

import yaml

from vovnet.data.labels import Annotation, DetectionData, ImageRecord, Polygons, brief
from vovnet.data.problems import Parsed, Problem, ProblemKind, RejectedError
from vovnet.errors import DataError, ImageError
from vovnet.images import SUFFIXES, find_images, image_size

DATA_FILES = ("data.yaml", "data.yml")
MAX_YAML_BYTES = 2**20
MAX_YAML_DEPTH = 20
MAX_TEXT_BYTES = 100 * 2**20
MAX_THREADS = 8
# Tools that compute in 32 bits end this far outside 0..1 at the border.
TOLERANCE = Decimal("1e-6")
EXACT = Context(prec=100)
# Decimals that are tried in turn until the pixels come back exactly.
DIGITS = (6, 10, 14, 18, 22, 30)

_NUMBER = re.compile(r"-?(\d{1,20}(\.\d{0,60})?|\.\d{1,60})([eE][+-]?\d{1,2})?", re.ASCII)
_HALF = Decimal("0.5")
_LEAST, _MOST = -TOLERANCE, 1 + TOLERANCE


@dataclass(frozen=True, slots=True)
class Config:
    """What data.yaml says: where the data set lies, its classes, and the entry of each split."""

    file: Path
    folder: Path
    class_names: tuple[str, ...]
    entries: dict[str, Any]


def is_yolo(data_dir: Path) -> bool:
    """Whether it is a folder with data.yaml, or a YAML file itself."""
    return _config_file(data_dir) is not None


def _config_file(data_dir: Path) -> Path | None:
    if data_dir.is_file() and data_dir.suffix in (".yaml", ".yml"):
        return data_dir
    found = [data_dir / name for name in DATA_FILES if (data_dir / name).is_file()]
    return found[0] if found else None


def find_split(data_dir: Path, split: str) -> tuple[Config, list[Path]]:
    """What data.yaml says, and the folders or list files of a split.

    Raises DataError where data.yaml cannot be used, or has no such split, or it is not there.
    """
    config = _read_config(data_dir)
    value = config.entries.get(split)
    texts = [value] if isinstance(value, str) else value
    if not isinstance(texts, list) or not texts or not all(isinstance(t, str) for t in texts):
        known = ", ".join(name for name in ("train", "val", "test") if config.entries.get(name))
        raise DataError(
            f"{config.file}: split {split!r}: expected a folder, a list of folders or a .txt file, "
            f"got {brief(value)}; it has {known or 'no split'}"
        )
    return config, [_located(config, split, text) for text in texts]


def _read_config(data_dir: Path) -> Config:
    file = _config_file(data_dir)
    if file is None:
        raise DataError(f"{data_dir}: expected {DATA_FILES[0]}, found none")
    text = _read_text(file, MAX_YAML_BYTES)
    try:
        _check_yaml(text)
        content = yaml.safe_load(text)
    except (yaml.YAMLError, ValueError, RecursionError) as error:
        reason = " ".join(str(error).split())[:300]
        raise DataError(f"{file}: not usable YAML: {reason}") from error
    if not isinstance(content, dict):
        raise DataError(f"{file}: expected the keys train, val and names, got {brief(content)}")
    folder = content.get("path") or "."
    if not isinstance(folder, str):
        raise DataError(f"{file}: path: expected a folder, got {brief(folder)}")
    return Config(file, file.parent / folder, _names(content, file), content)


def _check_yaml(text: str) -> None:
    """Raises ValueError on aliases, whose expansion can be of any size, and on deep nesting."""
    depth = 0
    for event in yaml.parse(text, yaml.SafeLoader):
        depth += isinstance(event, yaml.CollectionStartEvent)
        depth -= isinstance(event, yaml.CollectionEndEvent)
        if isinstance(event, yaml.AliasEvent) or depth > MAX_YAML_DEPTH:
            raise ValueError(f"expected no alias (*name) and at most {MAX_YAML_DEPTH} levels")


def _names(content: dict[Any, Any], file: Path) -> tuple[str, ...]:
    names = content.get("names")
    if isinstance(names, dict):
        if set(names) != set(range(len(names))):
            raise DataError(
                f"{file}: names: expected the numbers 0 to {len(names) - 1}, got {brief(names)}"
            )
        names = [names[index] for index in range(len(names))]
    if not isinstance(names, list) or not names:
        raise DataError(f"{file}: names: expected a list of class names, got {brief(names)}")
    for index, name in enumerate(names):
        is_number = isinstance(name, int) and not isinstance(name, bool)
        if not is_number and (not isinstance(name, str) or not name):
            raise DataError(f"{file}: names[{index}]: expected a quoted text, got {brief(name)}")
    count = content.get("nc")
    if count is not None and count != len(names):
        raise DataError(f"{file}: nc: expected {len(names)}, as many as names, got {brief(count)}")
    return tuple(str(name) for name in names)


def _located(config: Config, split: str, text: str) -> Path:
    """The folder or file of an entry; one that leaves `path` is refused."""
    candidates = [text]
    if text.startswith("../"):  # some tools write paths relative to a folder that is not there
        candidates.append(text.removeprefix("../"))
    for candidate in candidates:
        path = config.folder / candidate
        if is_inside(path, config.folder) and os.path.exists(path):  # false for too long names, too
            return path
    raise DataError(
        f"{config.file}: split {split!r}: expected an existing folder or .txt file that "
        f"lies in {config.folder} (by the key path, {brief(config.entries.get('path'))}), "
        f"got {brief(text)}"
    )


def is_inside(path: Path, folder: Path) -> bool:
    """Whether a path as written stays in a folder; links are not followed."""
    return Path(os.path.abspath(path)).is_relative_to(os.path.abspath(folder))


def _read_text(file: Path, max_bytes: int) -> str:
    try:
        if file.stat().st_size > max_bytes:
            raise DataError(f"{file}: expected at most {max_bytes} bytes, got more")
        return file.read_bytes().decode("utf-8-sig")
    except OSError as error:
        raise DataError(f"{file}: cannot be read: {error.strerror or error}") from error
    except ValueError as error:
        raise DataError(f"{file}: expected UTF-8: {error}") from error


def parse_split(data_dir: Path, split: str) -> Parsed:
    """Read a split; each image's size is read from the header of its file.

    Labels are the text files where the last folder `images` of an image's path is called `labels`;
    an image without one has no objects. Category ids are the numbers of the classes, from 0;
    images and objects are numbered from 1. A polygon's box is its bounds and its area its own.
    Raises DataError where data.yaml or a list cannot be used or no image has a label file.
    """
    config, sources = find_split(data_dir, split)
    problems: list[Problem] = []
    files = _image_files(config, sources, problems.append)
    label_files = {path: label_file(path) for path in files}
    present = [path for path in label_files.values() if os.path.isfile(path)]
    if files and not present:
        expected = next(iter(label_files.values()))
        raise DataError(f"split {split!r}: expected label files such as {expected}, found none")
    problems += _without_image(sources, set(label_files.values()))
    images: list[ImageRecord] = []
    places: dict[int, str] = {}
    num_rows = 0
    for path, size in zip(files, _sizes(files), strict=True):
        if isinstance(size, Problem):
            problems.append(size)
            continue
        start = num_rows + 1
        try:
            rows = _read_rows(label_files[path])
        except DataError as error:
            problems.append(Problem(ProblemKind.LABEL_FILE, str(error), path.name))
            continue
        num_rows += sum(1 for row in rows if row)
        record = ImageRecord(len(images) + 1, path, *size, ())
        numbered = _annotations(record, rows, label_files[path], len(config.class_names), start)
        annotations = []
        for item, place in numbered:
            if isinstance(item, Problem):
                problems.append(item)
            else:
                annotations.append(item)
                places[item.id] = place
        images.append(ImageRecord(record.id, path, *size, tuple(annotations)))
    ids = tuple(range(len(config.class_names)))
    return Parsed(
        data=DetectionData(tuple(images), config.class_names, ids, config.file),
        num_images=len(files),
        num_annotations=num_rows,
        problems=tuple(problems),
        image_roots=_roots(sources, files),
        places=places,
        sizes_measured=True,
    )


def _roots(sources: Iterable[Path], files: Iterable[Path]) -> tuple[Path, ...]:
    folders = [source for source in sources if source.is_dir()]
    listed = {_images_part(path) or path.parent for path in files}
    inside = {root for root in listed if not any(root.is_relative_to(f) for f in folders)}
    return (*folders, *sorted(inside))


def _images_part(path: Path) -> Path | None:
    """The last folder called images on the way to a file."""
    return next((parent for parent in path.parents if parent.name == "images"), None)


def label_file(image: Path) -> Path:
    """Where the labels of an image are."""
    root = _images_part(image)
    if root is None:
        return image.with_suffix(".txt")
    return (root.with_name("labels") / image.relative_to(root)).with_suffix(".txt")


def _image_files(
    config: Config, sources: Sequence[Path], report: Callable[[Problem], None]
) -> list[Path]:
    """The images of folders, all below them, and of lists; each once."""
    files: dict[Path, None] = {}
    for source in sources:
        found = find_images(str(source)) if source.is_dir() else _listed(config, source, report)
        for path in found:
            if path in files:
                text = f"{source}: {brief(str(path))} was named before"
                report(Problem(ProblemKind.DUPLICATE_IMAGE, text, path.name))
            files[path] = None
    return list(files)


def _listed(config: Config, source: Path, report: Callable[[Problem], None]) -> Iterator[Path]:
    """The images that a list file names, relative to its folder."""
    for line, text in enumerate(_read_text(source, MAX_TEXT_BYTES).split("\n"), start=1):
        name = text.strip()
        if not name:
            continue
        path = source.parent / name
        if "\0" in name or not is_inside(path, config.folder):
            text = f"{source}:{line}: expected a file in {config.folder}, got {brief(name)}"
            report(Problem(ProblemKind.UNSAFE_PATH, text))
        else:
            yield path


def _without_image(sources: Iterable[Path], expected: set[Path]) -> Iterator[Problem]:
    """Label files of the folders that belong to no image."""
    for source in sources:
        folder = label_file(source / "any.png").parent
        if not source.is_dir() or folder == source:
            continue
        for file in sorted(set(folder.rglob("*.txt")) - expected):
            if file.name != "classes.txt":  # some tools leave it there
                text = f"{file}: expected an image of that name in {source}, found none"
                yield Problem(ProblemKind.MISSING_FILE, text, file.name)


def _sizes(files: Sequence[Path]) -> list[tuple[int, int] | Problem]:
    with ThreadPoolExecutor(min(MAX_THREADS, os.cpu_count() or 1)) as pool:
        return list(pool.map(_size, files))


def _size(file: Path) -> tuple[int, int] | Problem:
    try:
        return image_size(file)
    except ImageError as error:
        missing = not os.path.lexists(file)
        kind = ProblemKind.MISSING_FILE if missing else ProblemKind.UNREADABLE_FILE
        return Problem(kind, str(error), file.name)


def _read_rows(file: Path) -> list[list[str]]:
    """The columns of every line; none where there is no file."""
    if not os.path.lexists(file):
        return []
    return [line.split() for line in _read_text(file, MAX_TEXT_BYTES).split("\n")]


def _annotations(
    image: ImageRecord, rows: Iterable[list[str]], file: Path, num_classes: int, number: int
) -> Iterator[tuple[Annotation | Problem, str]]:
    """Each row that is not empty, numbered from `number`, and where it stands."""
    with localcontext(EXACT):
        for line, row in enumerate(rows, start=1):
            if not row:
                continue
            place = f"{file}:{line}"
            try:
                yield _annotation(row, place, image, num_classes, number), place
            except RejectedError as rejected:
                name = image.path.name
                yield Problem(rejected.kind, rejected.text, name, image.id, number), place
            number += 1


def _annotation(
    row: list[str], place: str, image: ImageRecord, num_classes: int, number: int
) -> Annotation:
    is_box = len(row) == 5
    if not is_box and (len(row) < 7 or len(row) % 2 == 0):
        text = (
            f"{place}: expected class cx cy w h, or class and 3 or more points x y, "
            f"got {len(row)} columns"
        )
        raise RejectedError(ProblemKind.ANNOTATION, text)
    label = _label(row[0], place, num_classes)
    values = [_fraction(text, place) for text in row[1:]]
    if is_box:
        cx, cy, w, h = values
        values = [cx - w * _HALF, cy - h * _HALF, cx + w * _HALF, cy + h * _HALF]
    sides = (Decimal(image.width), Decimal(image.height))
    pixels = [float(value * sides[i % 2]) for i, value in enumerate(values)]
    if is_box:
        x1, y1, x2, y2 = pixels
        area = (x2 - x1) * (y2 - y1)
        return Annotation(number, label, (x1, y1, x2, y2), None, area, False)
    xs, ys = pixels[::2], pixels[1::2]
    box_xyxy = (min(xs), min(ys), max(xs), max(ys))
    return Annotation(number, label, box_xyxy, [pixels], polygon_area(pixels), False)


def polygon_area(ring: Sequence[float]) -> float:
    """Area in pixels of a polygon x1, y1, x2, y2, ..., by the shoelace formula."""
    points = list(zip(ring[::2], ring[1::2], strict=True))
    pairs = pairwise([*points, points[0]])
    return abs(sum(x1 * y2 - x2 * y1 for (x1, y1), (x2, y2) in pairs)) / 2


def _label(text: str, place: str, num_classes: int) -> int:
    whole = text.removesuffix(".0")
    if not (whole.isascii() and whole.isdigit() and len(whole) < 10) or int(whole) >= num_classes:
        text = f"{place}: expected a class of 0 to {num_classes - 1}, got {brief(text)}"
        raise RejectedError(ProblemKind.UNKNOWN_CATEGORY, text)
    return int(whole)


def _fraction(text: str, place: str) -> Decimal:
    if _NUMBER.fullmatch(text):
        value = Decimal(text)
        if _LEAST <= value <= _MOST:
            return value
        kind = ProblemKind.OUTSIDE_BOX
    else:
        kind = ProblemKind.NON_FINITE_BOX
    raise RejectedError(kind, f"{place}: expected numbers of 0 to 1, got {brief(text)}")


def write_split(folder: Path, split: str, data: DetectionData, names: Sequence[str]) -> None:
    """Write the label files of a split and its line of data.yaml; not the images.

    `names[i]` is the file of image i below images/SPLIT. A mask of one polygon is written as such;
    other masks, crowds, areas and ids have no place in this format, and what lies outside the
    image is moved to its border. Raises DataError where a name has no place either.
    """
    for image, name in zip(data.images, names, strict=True):
        if Path(name).suffix.lower() not in SUFFIXES or any(
            part.startswith(".") for part in Path(name).parts
        ):
            expected = ", ".join(sorted(SUFFIXES))
            raise DataError(f"YOLO finds images by {expected}, it cannot hold {brief(name)}")
        file = label_file(folder / "images" / split / name)
        file.parent.mkdir(parents=True, exist_ok=True)
        with localcontext(EXACT):
            rows = [_row(item, image.height, image.width) for item in image.annotations]
        file.write_text("".join(f"{row}\n" for row in rows), encoding="ascii")
    (folder / "images" / split).mkdir(parents=True, exist_ok=True)
    _write_config(folder, split, data.class_names)


def _write_config(folder: Path, split: str, class_names: Sequence[str]) -> None:
    file = folder / DATA_FILES[0]
    content = dict(_read_config(folder).entries) if file.is_file() else {}
    names = content.pop("names", dict(enumerate(class_names)))
    content[split] = f"images/{split}"
    text = yaml.safe_dump({**content, "names": names}, allow_unicode=True, sort_keys=False)
    file.write_text(text, encoding="utf-8")


def _row(annotation: Annotation, height: int, width: int) -> str:
    polygon = _only_ring(annotation.segmentation)
    values = list(annotation.box_xyxy) if polygon is None else polygon
    fractions = _fractions(values, (width, height))
    if polygon is None:
        x1, y1, x2, y2 = fractions
        fractions = [(x1 + x2) * _HALF, (y1 + y2) * _HALF, x2 - x1, y2 - y1]
    return " ".join([str(annotation.label), *map(_plain, fractions)])


def _only_ring(segmentation: object) -> list[float] | None:
    rings: Polygons | None = segmentation if isinstance(segmentation, list) else None
    return rings[0] if rings is not None and len(rings) == 1 else None


def _fractions(values: Sequence[float], sides: tuple[int, int]) -> list[Decimal]:
    """The values over the width and height, with as few decimals as give them back exactly."""
    exact = [Decimal(repr(value)) / sides[i % 2] for i, value in enumerate(values)]
    rounded: list[Decimal] = []
    for digits in DIGITS:
        unit = Decimal(1).scaleb(-digits)
        rounded = [value.quantize(unit) for value in exact]
        back = (float(value * sides[i % 2]) for i, value in enumerate(rounded))
        if all(a == b for a, b in zip(back, values, strict=True)):
            break
    return [abs(min(max(value, Decimal(0)), Decimal(1))) for value in rounded]


def _plain(value: Decimal) -> str:
    text = f"{value:f}"
    return text.rstrip("0").rstrip(".") if "." in text else text
