"""The check before a training: each defect is found once, named, and leaves the rest in use."""

import json
import os
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from vovnet.data.check import Report, check_dataset, describe, load_checked
from vovnet.data.coco import find_split, parse_files
from vovnet.data.problems import Problem, ProblemKind
from vovnet.errors import DataError

DATA_DIR = Path(os.environ.get("VOVNET_DATA", "../shared/data"))
HEIGHT, WIDTH = 24, 32
GOOD_BOX = [4, 4, 8, 8]
EMPTY_RLE = {"size": [HEIGHT, WIDTH], "counts": [HEIGHT * WIDTH]}

# By annotation id: the entry's changes and the problem expected of it.
BAD_ANNOTATIONS: dict[int, tuple[dict[str, object], ProblemKind]] = {
    10: ({"bbox": [4, 4, 0, 8]}, ProblemKind.DEGENERATE_BOX),
    11: ({"bbox": [4, 4, 8, -3]}, ProblemKind.DEGENERATE_BOX),
    12: ({"bbox": [4, 4, float("nan"), 8]}, ProblemKind.NON_FINITE_BOX),
    13: ({"bbox": [4, 4, 1e308, 8]}, ProblemKind.NON_FINITE_BOX),
    14: ({"bbox": [40, 4, 8, 8]}, ProblemKind.OUTSIDE_BOX),
    15: ({"bbox": [-3, 4, 8, 8]}, ProblemKind.OUTSIDE_BOX),
    16: ({"category_id": 77}, ProblemKind.UNKNOWN_CATEGORY),
    17: ({"image_id": 777}, ProblemKind.UNKNOWN_IMAGE),
    18: ({"segmentation": {"size": [9, 9], "counts": "02"}}, ProblemKind.SEGMENTATION_SIZE),
    19: ({"segmentation": {"size": [24, 32], "counts": "0!"}}, ProblemKind.SEGMENTATION),
    20: ({"segmentation": {"size": [24, 32], "counts": "1"}}, ProblemKind.SEGMENTATION),
    21: ({"segmentation": EMPTY_RLE}, ProblemKind.SEGMENTATION),
    22: ({"segmentation": [[1, 2, 3, 4]]}, ProblemKind.SEGMENTATION),
    23: ({"segmentation": [[-9, -9, -8, -9, -8, -8]]}, ProblemKind.SEGMENTATION),
    24: ({"bbox": None}, ProblemKind.ANNOTATION),
    1: ({}, ProblemKind.DUPLICATE_ANNOTATION),
}


def write_image(path: Path, size: tuple[int, int] = (HEIGHT, WIDTH), exif: int = 1) -> None:
    noise = np.random.default_rng(0).integers(0, 255, (*size, 3), dtype=np.uint8)
    tags = Image.Exif()
    tags[274] = exif
    Image.fromarray(noise).save(path, exif=tags)


def image(number: int, name: str, **changes: object) -> dict[str, object]:
    return {"id": number, "file_name": name, "height": HEIGHT, "width": WIDTH, **changes}


def annotation(number: int, **changes: object) -> dict[str, object]:
    return {"id": number, "image_id": 1, "category_id": 5, "bbox": GOOD_BOX, **changes}


def write(folder: Path, images: list[object], annotations: list[object]) -> Path:
    categories = [{"id": 5, "name": "thing"}]
    path = folder / "labels.json"
    content = {"images": images, "annotations": annotations, "categories": categories}
    path.write_text(json.dumps(content))
    return path


@pytest.fixture
def broken(tmp_path: Path) -> Path:
    """Three good images among bad ones, and each bad annotation on a good image."""
    write_image(tmp_path / "good.png")
    write_image(tmp_path / "turned.jpg", (WIDTH, HEIGHT), exif=6)
    write_image(tmp_path / "stored.jpg", exif=6)
    write_image(tmp_path / "resized.png", (HEIGHT, WIDTH + 1))
    write_image(tmp_path / "cut.png")
    cut = tmp_path / "cut.png"
    cut.write_bytes(cut.read_bytes()[:-600])
    (tmp_path / "text.png").write_text("no image")
    (tmp_path / "folder.png").mkdir()
    names = ["good.png", "turned.jpg", "resized.png", "cut.png", "text.png", "folder.png"]
    names += ["no.png", "stored.jpg"]
    images: list[object] = [image(number, name) for number, name in enumerate(names, start=1)]
    images += [image(1, "good.png"), image(90, "../x.png"), image(91, "good.png", width="5"), 3]
    annotations: list[object] = [annotation(1), annotation(2, bbox=[0, 0, WIDTH + 0.9, HEIGHT])]
    annotations += [annotation(3, image_id=2), annotation(4, image_id=4), annotation(5, iscrowd=1)]
    annotations += [annotation(6, image_id=90)]
    annotations += [annotation(i, **changes) for i, (changes, _) in BAD_ANNOTATIONS.items()]
    return write(tmp_path, images, [*annotations, None])


def test_names_each_problem_once(broken: Path) -> None:
    report = check_dataset(parse_files(broken, broken.parent))
    kinds = ProblemKind
    of_images = {
        (p.kind, p.image_id, p.file)
        for p in report.problems
        if p.annotation_id is None and p.kind != kinds.ANNOTATION
    }
    assert of_images == {
        (kinds.IMAGE_SIZE, 3, "resized.png"),
        (kinds.UNREADABLE_FILE, 4, "cut.png"),
        (kinds.UNREADABLE_FILE, 5, "text.png"),
        (kinds.UNREADABLE_FILE, 6, "folder.png"),
        (kinds.MISSING_FILE, 7, "no.png"),
        (kinds.DUPLICATE_IMAGE, 1, "good.png"),
        (kinds.UNSAFE_PATH, 90, "../x.png"),
        (kinds.IMAGE, 91, "good.png"),
        (kinds.IMAGE, None, None),
    }
    of_annotations = [(p.annotation_id, p.kind) for p in report.problems if p.annotation_id]
    expected = [(number, kind) for number, (_, kind) in BAD_ANNOTATIONS.items()]
    assert sorted(of_annotations) == sorted(expected)
    assert sum(p.kind == kinds.ANNOTATION for p in report.problems) == 2  # 24 and the last
    assert len(report.problems) == len(of_images) + len(expected) + 1
    assert (report.num_images, report.num_annotations) == (12, 23)


def test_skip_bad_keeps_the_rest(broken: Path) -> None:
    data, report = load_checked(parse_files(broken, broken.parent), skip_bad=True)
    assert [record.path.name for record in data.images] == ["good.png", "turned.jpg", "stored.jpg"]
    assert [[a.id for a in record.annotations] for record in data.images] == [[1, 2, 5], [3], []]
    assert not report.is_good


def test_without_skip_bad_it_stops(broken: Path) -> None:
    with pytest.raises(DataError, match=r"labels\.json: 26 problems in 12 images") as caught:
        load_checked(parse_files(broken, broken.parent))
    lines = str(caught.value).splitlines()
    assert len(lines) == 13
    assert lines[-2] == "  ... and 16 more"
    assert "broken segmentation 5" in lines[-1]


def test_headers_alone_show_all_but_broken_pixels(broken: Path) -> None:
    full = check_dataset(parse_files(broken, broken.parent))
    headers = check_dataset(parse_files(broken, broken.parent), read_pixels=False)
    gone = set(full.problems) - set(headers.problems)
    assert [problem.file for problem in gone] == ["cut.png"]
    assert set(headers.problems) < set(full.problems)


def test_good_data_has_no_problem(tmp_path: Path) -> None:
    write_image(tmp_path / "a.png")
    path = write(tmp_path, [image(1, "a.png")], [annotation(1)])
    data, report = load_checked(parse_files(path, tmp_path))
    assert report.is_good
    assert report.summary() == f"{path}: 0 problems in 1 images with 1 annotations"
    assert len(data.images[0].annotations) == 1


def test_nothing_left_is_an_error(tmp_path: Path) -> None:
    path = write(tmp_path, [image(1, "a.png")], [])
    with pytest.raises(DataError, match="expected a usable image, got none"):
        load_checked(parse_files(path, tmp_path), skip_bad=True)


def test_no_image_at_all_is_an_error(tmp_path: Path) -> None:
    path = write(tmp_path, [], [])
    with pytest.raises(DataError, match="expected at least one image, found none"):
        check_dataset(parse_files(path, tmp_path))


def test_a_file_that_is_no_annotation_file_stops_either_way(tmp_path: Path) -> None:
    path = tmp_path / "labels.json"
    path.write_text("{")
    with pytest.raises(DataError, match="not valid JSON"):
        load_checked(parse_files(path, tmp_path), skip_bad=True)


def test_names_that_files_cannot_have(tmp_path: Path) -> None:
    names = ["x" * 300 + ".png", "a\nb\x1b[31m.png", "ü\u202e.png"]
    path = write(tmp_path, [image(i, name) for i, name in enumerate(names)], [])
    report = check_dataset(parse_files(path, tmp_path))
    assert len(report.problems) == 3
    for problem in report.problems:
        assert describe(problem).isprintable()


def test_json_of_a_report_says_all() -> None:
    problem = Problem(ProblemKind.IMAGE_SIZE, "expected 1, got 2", "a.png", 3, None)
    value = json.loads(json.dumps(Report(Path("x.json"), 5, 6, (problem,)).to_json()))
    assert value["counts"] == {"image size disagrees with the file": 1}
    assert value["problems"] == [
        {
            "kind": "image size disagrees with the file",
            "text": "expected 1, got 2",
            "file": "a.png",
            "image_id": 3,
            "annotation_id": None,
        }
    ]


@pytest.mark.parametrize(("name", "split"), [("coco-free", "val"), ("bccd", "test")])
def test_real_data_is_good(name: str, split: str) -> None:
    if not (DATA_DIR / name).is_dir():
        pytest.skip(f"needs {name} in the folder that VOVNET_DATA names ({DATA_DIR})")
    assert check_dataset(parse_files(*find_split(DATA_DIR / name, split))).problems == ()
