"""A data set written in another format, and read back before it is shown."""

import os
import secrets
import shutil
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path

from vovnet.data.check import load_checked
from vovnet.data.extra import count_objects, extra_file, make_extra
from vovnet.data.formats import AUTO, FORMATS, parse_split, recognise, require_split
from vovnet.data.labels import DetectionData, brief
from vovnet.data.problems import Parsed
from vovnet.errors import ConfigError, DataError
from vovnet.files import atomic_write_json

SPLITS = ("train", "val", "test")


@dataclass(frozen=True, slots=True)
class ConvertedSplit:
    """What was written of one split; of `num_extras` objects a part is in vovnet-extra."""

    name: str
    num_images: int
    num_objects: int
    num_extras: int


def convert_dataset(
    data_dir: Path,
    output: Path,
    *,
    to: str,
    splits: Sequence[str] = (),
    format: str = AUTO,
    link: bool = False,
) -> tuple[ConvertedSplit, ...]:
    """Write splits of a data set to the folder `output` in the format coco, voc or yolo.

    Without `splits` those of train, val and test that are there, trainval where neither of the
    first two is. Images are copied, or linked to by symbolic links. What the format has no place
    for goes to vovnet-extra/SPLIT.json; all is read back and compared before `output` appears,
    whole or not at all. Raises ConfigError where it holds something or a format is unknown,
    DataError naming each problem of the data or what the format cannot hold.
    """
    if to not in FORMATS:
        raise ConfigError(f"--to: expected one of {', '.join(FORMATS)}, found {to!r}")
    if output.exists() and (not output.is_dir() or any(output.iterdir())):
        raise ConfigError(f"--output: expected a new or empty folder, found {output}")
    found = recognise(data_dir, format)
    wanted = tuple(dict.fromkeys(splits)) or _present_splits(data_dir, found)
    loaded = {split: _load(data_dir, split, found) for split in wanted}
    _check_classes(loaded, to)
    with _folder_at_once(output) as folder:
        planned = _planned(loaded, folder, to)
        for split, data in planned.items():
            _place_images(loaded[split].data, data, link)
            FORMATS[to].write_split(folder, split, data, _names(data, split, folder, to))
        return tuple(_complete(data, split, folder, to) for split, data in planned.items())


def _present_splits(data_dir: Path, format: str) -> tuple[str, ...]:
    def is_there(split: str) -> bool:
        try:
            require_split(data_dir, split, format=format)
        except DataError:
            return False
        return True

    found = [split for split in SPLITS if is_there(split)]
    if not {"train", "val"} & set(found) and is_there("trainval"):
        found.insert(0, "trainval")
    if not found:
        require_split(data_dir, SPLITS[0], format=format)  # says what it looked for
    return tuple(found)


def _load(data_dir: Path, split: str, format: str) -> Parsed:
    if split in ("", ".", "..") or Path(split).name != split:
        raise ConfigError(f"--split: expected the name of a split, found {split!r}")
    parsed = parse_split(data_dir, split, format=format)
    data, _ = load_checked(parsed, read_pixels=False)
    return replace(parsed, data=data)


def _check_classes(loaded: Mapping[str, Parsed], to: str) -> None:
    """A folder of Pascal VOC or YOLO has one list of classes for all splits."""
    first = next(iter(loaded.values())).data
    for parsed in loaded.values():
        if to != "coco" and parsed.data.class_names != first.class_names:
            raise DataError(
                f"{parsed.data.annotation_file}: expected the classes of {first.annotation_file}, "
                f"{brief(first.class_names)}; got {brief(parsed.data.class_names)}"
            )


@contextmanager
def _folder_at_once(output: Path) -> Iterator[Path]:
    """A new folder beside `output` that takes its place when the block ends well."""
    output.parent.mkdir(parents=True, exist_ok=True)
    folder = output.parent / f".{output.name[:40]}-{secrets.token_hex(8)}"
    folder.mkdir()
    try:
        yield folder
        if output.exists():
            output.rmdir()
        folder.rename(output)
    except BaseException:
        shutil.rmtree(folder, ignore_errors=True)
        raise


def _planned(loaded: Mapping[str, Parsed], folder: Path, to: str) -> dict[str, DetectionData]:
    """The splits with each image where it will lie; raises DataError where two share labels."""
    names = {split: _source_names(parsed) for split, parsed in loaded.items()}
    if _has_clash(loaded, names) and "{split}" not in FORMATS[to].images:
        names = {split: [Path(split, name) for name in names[split]] for split in names}
    planned = {}
    for split, parsed in loaded.items():
        stem, count = Counter(name.with_suffix("") for name in names[split]).most_common(1)[0]
        if to != "coco" and count > 1:
            raise DataError(
                f"{FORMATS[to].title} names labels after images without their suffix: expected "
                f"different names in the split {split!r}, got {brief(str(stem))} {count} times"
            )
        base = folder / FORMATS[to].images.format(split=split)
        pairs = zip(parsed.data.images, names[split], strict=True)
        images = tuple(replace(image, path=base / name) for image, name in pairs)
        planned[split] = replace(parsed.data, images=images)
    return planned


def _source_names(parsed: Parsed) -> list[Path]:
    """Where each image lies below its folder of images."""
    paths = [image.path for image in parsed.data.images]
    names = [_relative(path, parsed.image_roots) for path in paths]
    if len(set(names)) < len(names):  # of several folders: from where these part
        common = os.path.commonpath([os.path.abspath(path.parent) for path in paths])
        names = [Path(os.path.relpath(path, common)) for path in paths]
    return names


def _relative(path: Path, roots: Sequence[Path]) -> Path:
    inside = [path.relative_to(root) for root in roots if path.is_relative_to(root)]
    return min(inside, key=lambda name: len(name.parts), default=Path(path.name))


def _has_clash(loaded: Mapping[str, Parsed], names: Mapping[str, Sequence[Path]]) -> bool:
    """Whether splits give one name to different images, or to different labels of one."""
    seen: dict[Path, tuple[object, ...]] = {}
    for split, parsed in loaded.items():
        contents: dict[Path, tuple[object, ...]] = {}
        for image, name in zip(parsed.data.images, names[split], strict=True):
            plain = [(a.label, a.box_xyxy, a.is_difficult) for a in image.annotations]
            contents[name.with_suffix("")] = (image.path, plain)
        if any(seen.get(stem, content) != content for stem, content in contents.items()):
            return True
        seen |= contents
    return False


def _place_images(data: DetectionData, planned: DetectionData, link: bool) -> None:
    for image, target in zip(data.images, planned.images, strict=True):
        if target.path.exists():  # of another split too
            continue
        target.path.parent.mkdir(parents=True, exist_ok=True)
        if link:
            target.path.symlink_to(image.path.resolve())
        else:
            shutil.copyfile(image.path, target.path)


def _names(data: DetectionData, split: str, folder: Path, to: str) -> list[str]:
    base = folder / FORMATS[to].images.format(split=split)
    return [image.path.relative_to(base).as_posix() for image in data.images]


def _complete(data: DetectionData, split: str, folder: Path, to: str) -> ConvertedSplit:
    """Keeps what the labels have no place for; raises DataError where a rest is still lost."""
    title = FORMATS[to].title
    plain = parse_split(folder, split, format=to)
    if plain.problems:
        raise DataError(f"{title} cannot hold the split {split!r}: {plain.problems[0].text}")
    extra = make_extra(plain.data, data, folder)
    if extra is not None:
        file = extra_file(folder, split)
        file.parent.mkdir(exist_ok=True)
        atomic_write_json(file, extra, indent=None)
    back = parse_split(folder, split, format=to).data
    if replace(back, annotation_file=data.annotation_file) != data:
        raise DataError(f"{title} cannot hold the split {split!r} without a loss")
    num_objects = sum(len(image.annotations) for image in data.images)
    return ConvertedSplit(split, len(data.images), num_objects, count_objects(extra))
