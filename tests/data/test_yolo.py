"""YOLO text: fractions become pixels, data.yaml in every form, bad rows named by line."""

import os
from pathlib import Path

import numpy as np
import pytest
import yaml
from PIL import Image

from vovnet.data.labels import Annotation, DetectionData, ImageRecord
from vovnet.data.problems import Parsed, ProblemKind
from vovnet.data.yolo import label_file, parse_split, polygon_area, write_split
from vovnet.errors import DataError

HEIGHT, WIDTH = 24, 32
CONFIG = {"train": "images/train", "names": ["ant", "dog"]}


def add(folder: Path, name: str = "images/train/a.png", rows: str | None = "") -> Path:
    """Adds an image and its label file."""
    path = folder / name
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new("RGB", (WIDTH, HEIGHT)).save(path)
    file = label_file(path)
    if rows is not None:
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(rows)
    return file


def configure(folder: Path, **changes: object) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    file = folder / "data.yaml"
    file.write_text(yaml.safe_dump(CONFIG | changes))
    return file


def names_of(parsed: Parsed) -> list[str]:
    return [image.path.name for image in parsed.data.images]


def test_boxes_and_polygons(tmp_path: Path) -> None:
    configure(tmp_path)
    rows = "1 0.5 0.5 1 1\n\n0 0.25 .25 2.5e-1 0.5\r\n1.0 0 0 0.5 0 0.5 0.5 0 0.75\n"
    file = add(tmp_path, rows=rows)
    add(tmp_path, "images/train/sub/b.png", None)
    parsed = parse_split(tmp_path, "train")
    assert not parsed.problems
    ring = [0.0, 0.0, 16.0, 0.0, 16.0, 12.0, 0.0, 18.0]
    assert parsed.data.images[0] == ImageRecord(
        1,
        tmp_path / "images/train/a.png",
        HEIGHT,
        WIDTH,
        (
            Annotation(1, 1, (0, 0, 32, 24), None, 768, False),
            Annotation(2, 0, (4, 0, 12, 12), None, 96, False),
            Annotation(3, 1, (0, 0, 16, 18), [ring], 16 * 15, False),
        ),
    )
    assert (parsed.data.images[1].annotations, names_of(parsed)[1]) == ((), "b.png")
    assert (parsed.data.class_names, parsed.data.category_ids) == (("ant", "dog"), (0, 1))
    assert dict(parsed.places) == {1: f"{file}:1", 2: f"{file}:3", 3: f"{file}:4"}
    assert (parsed.num_images, parsed.num_annotations) == (2, 3)


def test_boxes_by_plain_arithmetic(tmp_path: Path) -> None:
    configure(tmp_path)
    corners = np.sort(np.random.default_rng(0).random((50, 2, 2)), axis=1).reshape(50, 4)
    centres, sizes = (corners[:, :2] + corners[:, 2:]) / 2, corners[:, 2:] - corners[:, :2]
    values = np.round(np.hstack([centres, sizes]), 6).clip(0, 1)
    add(tmp_path, rows="".join(f"0 {' '.join(map(str, row))}\n" for row in values))
    image = parse_split(tmp_path, "train").data.images[0]
    found = np.array([a.box_xyxy for a in image.annotations])
    centres, sizes = values[:, :2], values[:, 2:]
    expected = np.hstack([centres - sizes / 2, centres + sizes / 2]) * [
        WIDTH,
        HEIGHT,
        WIDTH,
        HEIGHT,
    ]
    np.testing.assert_allclose(found, expected, atol=1e-12)


def test_area_of_polygons() -> None:
    assert polygon_area([0, 0, 4, 0, 4, 3]) == 6
    assert polygon_area([4, 3, 4, 0, 0, 0]) == 6
    angles = np.linspace(0, 2 * np.pi, 1000, endpoint=False)
    circle = np.stack([5 + np.cos(angles), 9 + np.sin(angles)], axis=1).ravel().tolist()
    assert polygon_area(circle) == pytest.approx(np.pi, rel=1e-4)


BAD_ROWS = {
    "0 0.5 0.5 1": (ProblemKind.ANNOTATION, "got 4 columns"),
    "0 0.5 0.5 1 1 0.9": (ProblemKind.ANNOTATION, "got 6 columns"),
    "0 0 0 1 1 1 0 1": (ProblemKind.ANNOTATION, "got 8 columns"),
    "0": (ProblemKind.ANNOTATION, "got 1 columns"),
    "2 0.5 0.5 1 1": (ProblemKind.UNKNOWN_CATEGORY, "expected a class of 0 to 1, got '2'"),
    "-1 0.5 0.5 1 1": (ProblemKind.UNKNOWN_CATEGORY, "got '-1'"),
    "dog 0.5 0.5 1 1": (ProblemKind.UNKNOWN_CATEGORY, "got 'dog'"),
    "0.5 0.5 0.5 1 1": (ProblemKind.UNKNOWN_CATEGORY, "got '0.5'"),
    "0 1.1 0.5 1 1": (ProblemKind.OUTSIDE_BOX, "expected numbers of 0 to 1, got '1.1'"),
    "0 -0.1 0.5 1 1": (ProblemKind.OUTSIDE_BOX, "got '-0.1'"),
    "0 320 200 10 10": (ProblemKind.OUTSIDE_BOX, "got '320'"),
    "0 nan 0.5 1 1": (ProblemKind.NON_FINITE_BOX, "got 'nan'"),
    "0 0.5 inf 1 1": (ProblemKind.NON_FINITE_BOX, "got 'inf'"),
    "0 0.5 0.5 0,5 1": (ProblemKind.NON_FINITE_BOX, "got '0,5'"),
    "0 0.5 0.5 1e999 1": (ProblemKind.NON_FINITE_BOX, "got '1e999'"),
    f"0 0.5 0.5 {'9' * 5000} 1": (ProblemKind.NON_FINITE_BOX, "got '999"),
}


@pytest.mark.parametrize("row", BAD_ROWS)
def test_a_bad_row_is_named_and_the_rest_stays(tmp_path: Path, row: str) -> None:
    configure(tmp_path)
    file = add(tmp_path, rows=f"0 0.5 0.5 1 1\n{row}\n1 0.5 0.5 1 1\n")
    parsed = parse_split(tmp_path, "train")
    kind, text = BAD_ROWS[row]
    assert [problem.kind for problem in parsed.problems] == [kind]
    assert parsed.problems[0].text.startswith(f"{file}:2: ")
    assert text in parsed.problems[0].text
    assert len(parsed.problems[0].text) < len(str(file)) + 200
    assert [a.id for a in parsed.data.images[0].annotations] == [1, 3]


def test_rounding_at_the_border_is_no_problem(tmp_path: Path) -> None:
    configure(tmp_path)
    add(tmp_path, rows="0 0.5 0.5 1.0000001 1\n0 0 0 1.000001 0 1 1\n")
    assert not parse_split(tmp_path, "train").problems


def test_bad_label_files_and_images(tmp_path: Path) -> None:
    configure(tmp_path)
    add(tmp_path)
    add(tmp_path, "images/train/bytes.png").write_bytes(b"\xff\xfe0")
    with add(tmp_path, "images/train/huge.png").open("wb") as stream:
        stream.truncate(2**34)
    folder = add(tmp_path, "images/train/folder.png", None)
    folder.mkdir()
    add(tmp_path, "images/train/text.png")
    (tmp_path / "images/train/text.png").write_text("no image")
    (tmp_path / "labels/train/lonely.txt").write_text("")
    (tmp_path / "labels/train/classes.txt").write_text("ant\ndog\n")
    parsed = parse_split(tmp_path, "train")
    assert sorted((str(p.kind), p.file) for p in parsed.problems) == [
        ("bad label file", "bytes.png"),
        ("bad label file", "folder.png"),
        ("bad label file", "huge.png"),
        ("missing image file", "lonely.txt"),
        ("unreadable image file", "text.png"),
    ]
    assert names_of(parsed) == ["a.png"]


def test_no_labels_at_all_is_a_wrong_layout(tmp_path: Path) -> None:
    configure(tmp_path)
    add(tmp_path, rows=None)
    with pytest.raises(DataError, match=r"expected label files such as .*labels/train/a\.txt"):
        parse_split(tmp_path, "train")


@pytest.mark.parametrize(
    ("place", "changes"),
    [
        ("images/train", {}),
        ("images/train", {"train": ["images/train"]}),
        ("images/train", {"names": {0: "ant", 1: "dog"}, "nc": 2}),
        ("sub/images/train", {"path": "sub"}),
        ("train/images", {"train": "../train/images"}),  # as Roboflow writes it
        ("pictures", {"train": "pictures"}),
        ("images/a/images/b", {"train": "images"}),
    ],
)
def test_forms_of_the_file(tmp_path: Path, place: str, changes: dict[str, object]) -> None:
    file = configure(tmp_path / "data", **changes)
    add(tmp_path / "data", f"{place}/a.png", "1 0.5 0.5 1 1\n")
    for given in (file, file.parent):
        parsed = parse_split(given, "train")
        assert names_of(parsed) == ["a.png"]
        assert [a.label for a in parsed.data.images[0].annotations] == [1]
        assert parsed.data.class_names == ("ant", "dog")


def test_an_absolute_path(tmp_path: Path) -> None:
    configure(tmp_path / "here", path=str(tmp_path / "there"))
    add(tmp_path / "there")
    assert names_of(parse_split(tmp_path / "here", "train")) == ["a.png"]


def test_labels_beside_the_last_images(tmp_path: Path) -> None:
    assert label_file(Path("/images/x/images/y/a.b.jpg")) == Path("/images/x/labels/y/a.b.txt")
    assert label_file(Path("/myimages/a.jpg")) == Path("/myimages/a.txt")


def test_a_list_of_files(tmp_path: Path) -> None:
    configure(tmp_path, train=["list.txt", "images/more"])
    for name in ("images/b.png", "images/a.png", "images/more/c.png"):
        add(tmp_path, name, "0 0.5 0.5 1 1\n")
    absolute = tmp_path / "images/a.png"
    lines = f"./images/b.png\n{absolute}\n\n/etc/x.png\n../x.png\nimages/none.png\n./images/b.png"
    (tmp_path / "list.txt").write_text(lines)
    parsed = parse_split(tmp_path, "train")
    assert names_of(parsed) == ["b.png", "a.png", "c.png"]
    found = [(problem.kind, problem.text.partition(": expected")[0]) for problem in parsed.problems]
    assert found[0] == (ProblemKind.UNSAFE_PATH, f"{tmp_path / 'list.txt'}:4")
    assert found[1] == (ProblemKind.UNSAFE_PATH, f"{tmp_path / 'list.txt'}:5")
    assert [kind for kind, _ in found[2:]] == [
        ProblemKind.DUPLICATE_IMAGE,
        ProblemKind.MISSING_FILE,
    ]


MERGES = "a0: &a0 {x: 1}\n" + "".join(
    f"a{i}: &a{i} {{<<: [{', '.join([f'*a{i - 1}'] * 9)}]}}\n" for i in range(1, 12)
)
BAD_CONFIGS = {
    "no names": ("train: images\n", "names: expected a list of class names, got None"),
    "empty names": ("names: []\ntrain: x\n", "names: expected a list"),
    "gap": ("names: {0: a, 2: b}\ntrain: x\n", "names: expected the numbers 0 to 1"),
    "word": ("names: [a, no]\ntrain: x\n", r"names\[1\]: expected a quoted text, got False"),
    "nested": ("names: [[a]]\ntrain: x\n", r"names\[0\]: expected a quoted text"),
    "count": ("names: [a]\nnc: 2\ntrain: x\n", "nc: expected 1, as many as names, got 2"),
    "list": ("- a\n", "expected the keys train, val and names"),
    "broken": ("names: [a\n", "not usable YAML"),
    "object": ("names: !!python/object/apply:os.getcwd []\n", "not usable YAML"),
    "laughs": (MERGES + "names: [a]\n", "not usable YAML: expected no alias"),
    "deep": ("names: " + "[" * 500, "not usable YAML"),
    "path": ("path: [a]\nnames: [a]\n", "path: expected a folder"),
    "no split": ("val: images\nnames: [a]\n", "split 'train': expected a folder.*it has val"),
    "number": ("train: 5\nnames: [a]\n", "split 'train': expected a folder.*got 5"),
    "outside": ("train: ../..\nnames: [a]\n", "that lies in"),
    "root": ("path: /\ntrain: none\nnames: [a]\n", r"lies in / \(by the key path, '/'\), got"),
    "long": (f"train: {'x' * 5000}\nnames: [a]\n", "that lies in"),
    "absolute": ("train: /etc\nnames: [a]\n", "that lies in .*, got '/etc'"),
    "missing": ("train: none\nnames: [a]\n", "that lies in .*, got 'none'"),
}


@pytest.mark.parametrize("name", BAD_CONFIGS)
def test_a_bad_file_stops_it(tmp_path: Path, name: str) -> None:
    text, message = BAD_CONFIGS[name]
    (tmp_path / "data.yaml").write_text(text)
    with pytest.raises(DataError, match=message) as caught:
        parse_split(tmp_path, "train")
    assert str(tmp_path / "data.yaml") in str(caught.value)


def test_rows_are_as_short_as_exactness_allows(tmp_path: Path) -> None:
    rings = [[1.0, 1.0, 9.0, 1.0, 9.0, 9.0]]
    annotations = (
        Annotation(1, 0, (8.0, 6.0, 16.0, 12.0), None, 48.0, False),
        Annotation(2, 1, (0.0, 0.0, 32.9, 24.0), None, 1.0, False),
        Annotation(3, 1, (1.0, 1.0, 9.0, 9.0), rings, 32.0, False),
        Annotation(4, 1, (1.0, 1.0, 9.0, 9.0), [*rings, *rings], 32.0, True),
    )
    image = ImageRecord(1, tmp_path / "images/train/a.png", HEIGHT, WIDTH, annotations)
    data = DetectionData((image,), ("ant", "yes"), (0, 1), Path("x"))
    write_split(tmp_path, "train", data, ["a.png"])
    assert (tmp_path / "labels/train/a.txt").read_text().splitlines() == [
        "0 0.375 0.375 0.25 0.25",
        "1 0.5 0.5 1 1",  # what is over the border has no place
        f"1 0.03125 0.041{'6' * 14}7 0.28125 0.041{'6' * 14}7 0.28125 0.375",
        f"1 0.15625 0.208{'3' * 15}5 0.25 0.{'3' * 18}",
    ]
    content = yaml.safe_load((tmp_path / "data.yaml").read_text())
    assert content == {"train": "images/train", "names": {0: "ant", 1: "yes"}}
    write_split(tmp_path, "val", data, ["a.png"])
    content = yaml.safe_load((tmp_path / "data.yaml").read_text())
    assert (content["train"], content["val"]) == ("images/train", "images/val")


@pytest.mark.parametrize("name", ["a.gz", "a", ".a.png", "x/.y/a.png"])
def test_image_names_that_have_no_place(tmp_path: Path, name: str) -> None:
    image = ImageRecord(1, tmp_path / name, HEIGHT, WIDTH, ())
    data = DetectionData((image,), ("ant",), (0,), Path("x"))
    with pytest.raises(DataError, match="YOLO finds images by"):
        write_split(tmp_path, "train", data, [name])
    assert not os.listdir(tmp_path)


def test_a_listed_name_that_is_too_long_is_a_problem(tmp_path: Path) -> None:
    add(tmp_path)
    configure(tmp_path, train="train.txt")
    (tmp_path / "train.txt").write_text(f"images/train/a.png\nimages/train/{'x' * 5000}.png\n")
    parsed = parse_split(tmp_path, "train")
    assert names_of(parsed) == ["a.png"]
    assert len(parsed.problems) == 1
