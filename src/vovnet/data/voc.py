"""Pascal VOC folders: XML read without entities, 1-based inclusive pixels, and written back."""

import re
import xml.etree.ElementTree as ET
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from decimal import Context, Decimal, localcontext
from pathlib import Path, PurePosixPath
from xml.parsers import expat

from vovnet.data.labels import Annotation, DetectionData, ImageRecord, brief
from vovnet.data.problems import Parsed, Problem, ProblemKind, RejectedError, safe_name
from vovnet.errors import DataError
from vovnet.images import MAX_PIXELS

CLASS_NAMES = (
    "aeroplane",
    "bicycle",
    "bird",
    "boat",
    "bottle",
    "bus",
    "car",
    "cat",
    "chair",
    "cow",
    "diningtable",
    "dog",
    "horse",
    "motorbike",
    "person",
    "pottedplant",
    "sheep",
    "sofa",
    "train",
    "tvmonitor",
)
"""The classes of the VOC challenges 2007 to 2012, in the order of their development kit."""

LABELS_FILE = "labels.txt"
MAX_XML_BYTES = 10 * 2**20
MAX_XML_DEPTH = 32
MAX_TEXT_BYTES = 100 * 2**20
# Enough digits for x + 1 and x - 1 of any float of 64 bits.
EXACT = Context(prec=400)

_NUMBER = re.compile(r"[+-]?(\d{1,30}(\.\d{0,360})?|\.\d{1,360})([eE][+-]?\d{1,3})?", re.ASCII)
_MAX_POSITION = 2**31
_CORNERS = ("xmin", "ymin", "xmax", "ymax")


@dataclass(frozen=True, slots=True)
class _Object:
    name: str
    box_xyxy: tuple[float, float, float, float]
    is_difficult: bool
    place: str


@dataclass(frozen=True, slots=True)
class _Labels:
    """One XML file: the image it describes, and its objects."""

    path: Path
    height: int
    width: int
    objects: tuple[_Object, ...]
    num_objects: int  # malformed ones included


def is_voc(data_dir: Path) -> bool:
    """Whether a folder holds image lists or annotations of Pascal VOC, or folders that do."""
    return bool(_devkit_folders(data_dir)) or any((data_dir / "Annotations").glob("*.xml"))


def _devkit_folders(data_dir: Path) -> list[Path]:
    """The folders with ImageSets/Main: this one, or those of the years in it."""
    parents = (data_dir, data_dir / "VOCdevkit")
    years = [sorted(parent.glob("VOC[0-9]*")) for parent in parents]
    for folders in ([data_dir], *years):
        found = [folder for folder in folders if (folder / "ImageSets" / "Main").is_dir()]
        if found:
            return found
    return []


def find_split(data_dir: Path, split: str) -> list[Path]:
    """Image lists ImageSets/Main/SPLIT.txt of a folder, or of every VOC20* folder in it.

    Raises DataError listing what was looked for.
    """
    folders = _devkit_folders(data_dir) or [data_dir]
    lists = [folder / "ImageSets" / "Main" / f"{split}.txt" for folder in folders]
    found = [path for path in lists if path.is_file()]
    if not found:
        looked = " or ".join(map(str, lists))
        raise DataError(f"split {split!r}: expected {looked}, found neither")
    return found


def parse_split(data_dir: Path, split: str) -> Parsed:
    """Read a split, from VOC2007 and VOC2012 together where both lie there.

    The classes are those of labels.txt; else the 20 of VOC in their order where there is no other
    name in any annotation of the folders; else all names, sorted. Images, objects and categories
    are numbered from 1. Raises DataError where a list or labels.txt cannot be used.
    """
    lists = find_split(data_dir, split)
    folders = [path.parent.parent.parent for path in lists]
    problems: list[Problem] = []
    labels: list[_Labels] = []
    seen_files: set[Path] = set()
    num_images = 0
    for image_list, folder in zip(lists, folders, strict=True):
        for line, name in enumerate(read_lines(image_list), start=1):
            num_images += 1
            place = f"{image_list}:{line}"
            read = _read_listed(folder, name, place, seen_files, problems.append)
            if read is not None:
                labels.append(read)
    class_names = _class_names(data_dir, folders, labels, seen_files)
    data, places = _numbered(labels, class_names, lists[0], problems.append)
    return Parsed(
        data=data,
        num_images=num_images,
        num_annotations=sum(read.num_objects for read in labels),
        problems=tuple(problems),
        image_roots=tuple(folder / "JPEGImages" for folder in folders),
        places=places,
    )


def read_lines(path: Path) -> list[str]:
    """The lines of a list, without the space around them and without empty ones at the end.

    Raises DataError where it cannot be read.
    """
    try:
        if path.stat().st_size > MAX_TEXT_BYTES:
            raise DataError(f"{path}: expected at most {MAX_TEXT_BYTES} bytes, got more")
        text = path.read_bytes().decode("utf-8-sig")
    except OSError as error:
        raise DataError(f"{path}: cannot be read: {error.strerror or error}") from error
    except UnicodeDecodeError as error:
        raise DataError(f"{path}: expected UTF-8, got byte {error.start} that is none") from error
    return [line.strip() for line in text.rstrip().split("\n")] if text.strip() else []


def _read_listed(
    folder: Path,
    name: str,
    place: str,
    seen_files: set[Path],
    report: Callable[[Problem], None],
) -> _Labels | None:
    """The labels of one line of a list; what is wrong goes to `report`."""
    try:
        file = folder / "Annotations" / f"{safe_name(name, place)}.xml"
        if file in seen_files:
            text = f"{place}: {brief(name)} was listed before"
            raise RejectedError(ProblemKind.DUPLICATE_IMAGE, text)
        seen_files.add(file)
        root = read_xml(file)
        path = folder / "JPEGImages" / _image_name(root, file, name)
        height, width = _size(root, file)
    except RejectedError as rejected:
        report(Problem(rejected.kind, rejected.text, name))
        return None
    elements = root.findall("object")
    objects = []
    for index, element in enumerate(elements):
        try:
            objects.append(_read_object(element, f"{file}: object[{index}]"))
        except RejectedError as rejected:
            report(Problem(rejected.kind, rejected.text, path.name))
    return _Labels(path, height, width, tuple(objects), len(elements))


def read_xml(file: Path) -> ET.Element:
    """The root of an XML file; a document type, and so any entity of its own, is refused.

    Raises RejectedError on what is missing, malformed, too large or too deep.
    """
    kind = ProblemKind.LABEL_FILE
    try:
        if file.stat().st_size > MAX_XML_BYTES:
            raise RejectedError(kind, f"{file}: expected at most {MAX_XML_BYTES} bytes, got more")
        return _parse_xml(file.read_bytes())
    except OSError as error:
        raise RejectedError(kind, f"{file}: cannot be read: {error.strerror or error}") from error
    except (expat.ExpatError, ValueError, LookupError) as error:
        raise RejectedError(kind, f"{file}: not usable XML: {error}") from error


def _parse_xml(content: bytes) -> ET.Element:
    builder = ET.TreeBuilder()
    depth = 0

    def start(tag: str, attributes: dict[str, str]) -> None:
        nonlocal depth
        depth += 1
        if depth > MAX_XML_DEPTH:
            raise ValueError(f"expected at most {MAX_XML_DEPTH} levels of elements, got more")
        builder.start(tag, attributes)

    def end(tag: str) -> None:
        nonlocal depth
        depth -= 1
        builder.end(tag)

    def refuse(*_: object) -> None:
        raise ValueError("expected no document type and no entities, got <!DOCTYPE ...>")

    parser = expat.ParserCreate()
    parser.buffer_text = True
    parser.StartElementHandler = start
    parser.EndElementHandler = end
    parser.CharacterDataHandler = builder.data
    parser.StartDoctypeDeclHandler = refuse
    parser.EntityDeclHandler = refuse
    parser.Parse(content, True)
    return builder.close()


def _image_name(root: ET.Element, file: Path, name: str) -> str:
    """Name below JPEGImages: <filename>, in the folder of the listed name."""
    stated = safe_name(_text(root, "filename", str(file)), f"{file}: filename")
    return (PurePosixPath(name).parent / stated).as_posix()


def _size(root: ET.Element, file: Path) -> tuple[int, int]:
    height, width = (_text(root, f"size/{tag}", str(file)) for tag in ("height", "width"))
    if not (_is_whole(height) and _is_whole(width)) or not int(height) * int(width) >= 1:
        text = f"{file}: size: expected a height and width above 0, got {brief((height, width))}"
        raise RejectedError(ProblemKind.LABEL_FILE, text)
    if int(height) * int(width) > MAX_PIXELS:
        text = f"{file}: size: expected at most {MAX_PIXELS} pixels, got {height} x {width}"
        raise RejectedError(ProblemKind.LABEL_FILE, text)
    return int(height), int(width)


def _is_whole(text: str) -> bool:
    return text.isascii() and text.isdigit() and len(text) < 10


def _text(
    element: ET.Element, path: str, place: str, *, kind: ProblemKind = ProblemKind.LABEL_FILE
) -> str:
    text = element.findtext(path, "").strip()
    if not text:
        raise RejectedError(kind, f"{place}: expected a text in <{path}>")
    return text


def _read_object(element: ET.Element, place: str) -> _Object:
    kind = ProblemKind.ANNOTATION
    name = _text(element, "name", place, kind=kind)
    texts = [_text(element, f"bndbox/{tag}", place, kind=kind) for tag in _CORNERS]
    sides = [_position(text, tag, place) for text, tag in zip(texts, _CORNERS, strict=True)]
    difficult = element.findtext("difficult", "0").strip()
    if difficult not in ("0", "1"):
        text = f"{place}: difficult: expected 0 or 1, got {brief(difficult)}"
        raise RejectedError(ProblemKind.ANNOTATION, text)
    return _Object(name, (sides[0], sides[1], sides[2], sides[3]), difficult == "1", place)


def _position(text: str, tag: str, place: str) -> float:
    """A side in pixels from 0: the first pixel is 1 in the file, and the last one belongs to it."""
    from_one = tag in ("xmin", "ymin")
    if _is_whole(text):
        return float(int(text) - from_one)
    if not _NUMBER.fullmatch(text) or not abs(float(text)) < _MAX_POSITION:
        text = f"{place}: {tag}: expected a finite pixel position, got {brief(text)}"
        raise RejectedError(ProblemKind.NON_FINITE_BOX, text)
    return float(EXACT.subtract(Decimal(text), Decimal(from_one)))


def _class_names(
    data_dir: Path, folders: Sequence[Path], labels: Iterable[_Labels], seen_files: set[Path]
) -> tuple[str, ...]:
    stated = _stated_names(data_dir, folders)
    if stated is not None:
        return stated
    names = {item.name for read in labels for item in read.objects}
    # The other splits have their say too, or each would have an order of its own.
    for folder in folders:
        for file in (folder / "Annotations").rglob("*.xml"):
            if file not in seen_files:
                names |= _names_in(file)
    return CLASS_NAMES if names <= set(CLASS_NAMES) else tuple(sorted(names))


def _stated_names(data_dir: Path, folders: Sequence[Path]) -> tuple[str, ...] | None:
    """The lines of labels.txt; of several such files all must be equal."""
    files = dict.fromkeys(path / LABELS_FILE for path in (data_dir, *folders))
    found = {file: tuple(read_lines(file)) for file in files if file.is_file()}
    if not found:
        return None
    first, names = next(iter(found.items()))
    for file, others in found.items():
        if others != names:
            raise DataError(f"{file}: expected the classes of {first}, found others")
    if not names or "" in names or len(set(names)) < len(names):
        raise DataError(f"{first}: expected a class a line, each once, got {brief(names)}")
    return names


def _names_in(file: Path) -> set[str]:
    try:
        objects = read_xml(file).findall("object")
    except RejectedError:
        return set()  # not of this split; the check of its own names it
    return {name for item in objects if (name := item.findtext("name", "").strip())}


def _numbered(
    labels: Iterable[_Labels],
    class_names: tuple[str, ...],
    image_list: Path,
    report: Callable[[Problem], None],
) -> tuple[DetectionData, dict[int, str]]:
    positions = {name: label for label, name in enumerate(class_names)}
    images: list[ImageRecord] = []
    places: dict[int, str] = {}
    number = 0
    for image_id, read in enumerate(labels, start=1):
        annotations = []
        for item in read.objects:
            number += 1
            if item.name not in positions:
                expected = f"expected a class of {LABELS_FILE}"
                text = f"{item.place}: name: {expected}, got {brief(item.name)}"
                report(Problem(ProblemKind.UNKNOWN_CATEGORY, text, read.path.name, image_id))
                continue
            places[number] = item.place
            x1, y1, x2, y2 = item.box_xyxy
            area = (x2 - x1) * (y2 - y1)
            label = positions[item.name]
            annotations.append(
                Annotation(number, label, item.box_xyxy, None, area, False, item.is_difficult)
            )
        images.append(ImageRecord(image_id, read.path, read.height, read.width, tuple(annotations)))
    ids = tuple(range(1, len(class_names) + 1))
    return DetectionData(tuple(images), class_names, ids, image_list), places


def write_split(folder: Path, split: str, data: DetectionData, names: Sequence[str]) -> None:
    """Write the list of a split, its annotations and labels.txt; not the images.

    `names[i]` is the file of image i below JPEGImages. Masks, crowds, areas and ids have no place
    in this format. Raises DataError where a name has none either.
    """
    for name in data.class_names:
        if name != name.strip() or not name.isprintable():
            raise DataError(f"Pascal VOC cannot hold the class name {brief(name)}")
    if len(set(data.class_names)) < len(data.class_names):
        raise DataError(f"Pascal VOC cannot hold equal class names: {brief(data.class_names)}")
    ids = [PurePosixPath(name).with_suffix("").as_posix() for name in names]
    for image, image_id, name in zip(data.images, ids, names, strict=True):
        file = folder / "Annotations" / f"{image_id}.xml"
        file.parent.mkdir(parents=True, exist_ok=True)
        root = _to_xml(image, PurePosixPath(name).name, data.class_names)
        ET.indent(root)
        file.write_bytes(ET.tostring(root, encoding="utf-8") + b"\n")
    image_list = folder / "ImageSets" / "Main" / f"{split}.txt"
    image_list.parent.mkdir(parents=True, exist_ok=True)
    image_list.write_text("".join(f"{image_id}\n" for image_id in ids), encoding="utf-8")
    labels = "".join(f"{name}\n" for name in data.class_names)
    (folder / LABELS_FILE).write_text(labels, encoding="utf-8")


def _to_xml(image: ImageRecord, file_name: str, class_names: Sequence[str]) -> ET.Element:
    root = ET.Element("annotation")
    _add(root, "folder", "JPEGImages")
    _add(root, "filename", file_name)
    size = ET.SubElement(root, "size")
    for tag, value in (("width", image.width), ("height", image.height), ("depth", 3)):
        _add(size, tag, str(value))
    for annotation in image.annotations:
        item = ET.SubElement(root, "object")
        _add(item, "name", class_names[annotation.label])
        _add(item, "difficult", str(int(annotation.is_difficult)))
        box = ET.SubElement(item, "bndbox")
        for tag, side in zip(_CORNERS, annotation.box_xyxy, strict=True):
            _add(box, tag, _position_text(side, tag))
    return root


def _position_text(side: float, tag: str) -> str:
    from_one = tag in ("xmin", "ymin")
    if side.is_integer():
        return str(int(side) + from_one)
    with localcontext(EXACT):
        return f"{Decimal(repr(side)) + from_one:f}"


def _add(parent: ET.Element, tag: str, text: str) -> None:
    ET.SubElement(parent, tag).text = text
