"""Pascal VOC: pixels from 1 become pixels from 0, classes keep order, hostile XML is named."""

import time
from pathlib import Path

import pytest
from PIL import Image
from torchvision.datasets import VOCDetection

from vovnet.data.labels import Annotation, DetectionData, ImageRecord
from vovnet.data.problems import Parsed, ProblemKind
from vovnet.data.voc import CLASS_NAMES, parse_split, write_split
from vovnet.errors import DataError

HEIGHT, WIDTH = 24, 32
BOX = "<bndbox><xmin>1</xmin><ymin>2</ymin><xmax>32</xmax><ymax>{ymax}</ymax></bndbox>"


def thing(name: str = "dog", box: str = BOX.format(ymax=24), rest: str = "") -> str:
    return f"<object><name>{name}</name>{rest}{box}</object>"


def xml(objects: str, *, file: str = "a.jpg", size: str | None = None) -> str:
    size = f"<width>{WIDTH}</width><height>{HEIGHT}</height>" if size is None else size
    return f"<annotation><filename>{file}</filename><size>{size}</size>{objects}</annotation>"


def add(folder: Path, name: str, content: str | bytes, split: str = "train") -> Path:
    """Adds an annotation file and lists it."""
    file = folder / "Annotations" / f"{name}.xml"
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_bytes(content.encode() if isinstance(content, str) else content)
    image_list = folder / "ImageSets" / "Main" / f"{split}.txt"
    image_list.parent.mkdir(parents=True, exist_ok=True)
    with image_list.open("a") as stream:
        stream.write(f"{name}\n")
    return file


def kinds(parsed: Parsed) -> list[ProblemKind]:
    return [problem.kind for problem in parsed.problems]


def test_pixels_difficult_and_parts(tmp_path: Path) -> None:
    part = "<part><name>head</name>" + BOX.format(ymax=3) + "</part>"
    exact = "<bndbox><ymin>1.5</ymin><xmin>3.25</xmin><xmax>7e0</xmax><ymax>9.125</ymax></bndbox>"
    objects = thing(rest="<difficult>1</difficult>" + part) + thing("cat", exact)
    add(tmp_path, "a", "\ufeff" + xml(objects))
    add(tmp_path, "sub/b", xml("", file="b.png"))
    data = parse_split(tmp_path, "train").data
    first, second = data.images
    assert first == ImageRecord(
        1,
        tmp_path / "JPEGImages/a.jpg",
        HEIGHT,
        WIDTH,
        (
            # The last pixel belongs to the box: 32 x 23 pixels.
            Annotation(1, 11, (0, 1, 32, 24), None, 32 * 23, False, True),
            Annotation(2, 7, (2.25, 0.5, 7, 9.125), None, 4.75 * 8.625, False, False),
        ),
    )
    assert (second.path, second.annotations) == (tmp_path / "JPEGImages/sub/b.png", ())
    assert (data.class_names, data.category_ids) == (CLASS_NAMES, tuple(range(1, 21)))


def test_two_years_together(tmp_path: Path) -> None:
    for year, names in (("VOC2007", "ab"), ("VOC2012", "bc")):
        for name in names:
            add(tmp_path / year, name, xml(thing(), file=f"{name}.jpg"), "trainval")
    add(tmp_path / "VOC2007", "d", xml(thing()), "test")
    both, test = (parse_split(tmp_path, split) for split in ("trainval", "test"))
    assert not both.problems
    assert [image.id for image in both.data.images] == [1, 2, 3, 4]
    assert [a.id for image in both.data.images for a in image.annotations] == [1, 2, 3, 4]
    years = [image.path.relative_to(tmp_path).parts[0] for image in both.data.images]
    assert years == ["VOC2007", "VOC2007", "VOC2012", "VOC2012"]
    assert len(test.data.images) == 1


def test_other_classes_are_sorted_over_all_splits(tmp_path: Path) -> None:
    add(tmp_path, "a", xml(thing("dog")))
    add(tmp_path, "b", xml(thing("zebra") + thing("ant")), "val")
    assert parse_split(tmp_path, "train").data.class_names == ("ant", "dog", "zebra")
    assert parse_split(tmp_path, "val").data.class_names == ("ant", "dog", "zebra")


def test_stated_classes_keep_their_order(tmp_path: Path) -> None:
    add(tmp_path, "a", xml(thing("zebra") + thing("dog") + thing("ant")))
    (tmp_path / "labels.txt").write_text("zebra\r\nant\r\n\r\n")
    parsed = parse_split(tmp_path, "train")
    assert parsed.data.class_names == ("zebra", "ant")
    assert [a.label for a in parsed.data.images[0].annotations] == [0, 1]
    assert kinds(parsed) == [ProblemKind.UNKNOWN_CATEGORY]
    assert "object[1]: name: expected a class of labels.txt, got 'dog'" in parsed.problems[0].text
    assert parsed.num_annotations == 3


@pytest.mark.parametrize("text", ["", "a\na\n", "a\n\nb\n"])
def test_a_list_of_classes_that_is_none(tmp_path: Path, text: str) -> None:
    add(tmp_path, "a", xml(""))
    (tmp_path / "labels.txt").write_text(text)
    with pytest.raises(DataError, match="expected a class a line, each once"):
        parse_split(tmp_path, "train")


def test_lists_of_classes_that_disagree(tmp_path: Path) -> None:
    for year, names in (("VOC2007", "a\nb\n"), ("VOC2012", "b\na\n")):
        add(tmp_path / year, "x", xml(""))
        (tmp_path / year / "labels.txt").write_text(names)
    with pytest.raises(DataError, match=r"VOC2012.*labels.txt: expected the classes of .*VOC2007"):
        parse_split(tmp_path, "train")


LAUGHS = "".join(f'<!ENTITY l{i} "{f"&l{i - 1};" * 10}">' for i in range(1, 12))
BAD_FILES = {
    "laughs": f'<!DOCTYPE a [<!ENTITY l0 "ha">{LAUGHS}]>' + xml(thing("&l11;")),
    "external": '<!DOCTYPE a [<!ENTITY x SYSTEM "/etc/hostname">]>' + xml(thing("&x;")),
    "doctype": "<!DOCTYPE annotation>" + xml(""),
    "utf-16": ("<!DOCTYPE a>" + xml("")).encode("utf-16"),
    "ebcdic": b"<?xml version='1.0' encoding='cp037'?>"
    + ("<!DOCTYPE a>" + xml("")).encode("cp037"),
    "encoding": "<?xml version='1.0' encoding='nonsense'?>" + xml(""),
    "cut": xml(thing())[:-9],
    "empty": "",
    "no XML": b"\xff\xd8\xff",
    "deep": xml("<part>" * 3000 + "</part>" * 3000),
    "no size": "<annotation><filename>a.jpg</filename></annotation>",
    "no width": xml("", size="<height>4</height>"),
    "width 0": xml("", size="<width>0</width><height>4</height>"),
    "width -1": xml("", size="<width>-1</width><height>4</height>"),
    "width x": xml("", size="<width>x</width><height>4</height>"),
    "huge": xml("", size="<width>99999999</width><height>99999999</height>"),
    "no name": "<annotation><size><width>4</width><height>4</height></size></annotation>",
}


@pytest.mark.parametrize("name", BAD_FILES)
def test_a_bad_file_is_named_and_the_rest_stays(tmp_path: Path, name: str) -> None:
    file = add(tmp_path, "bad", BAD_FILES[name])
    add(tmp_path, "good", xml(thing()))
    start = time.process_time()
    parsed = parse_split(tmp_path, "train")
    assert time.process_time() - start < 2
    assert kinds(parsed) == [ProblemKind.LABEL_FILE]
    assert parsed.problems[0].text.startswith(str(file))
    assert len(parsed.problems[0].text) < len(str(file)) + 200
    assert [len(image.annotations) for image in parsed.data.images] == [1]
    if name in ("laughs", "external", "doctype", "utf-16"):
        assert "expected no document type and no entities" in parsed.problems[0].text


def test_a_file_that_is_too_large_is_not_read(tmp_path: Path) -> None:
    file = add(tmp_path, "bad", "")
    with file.open("wb") as stream:
        stream.truncate(2**34)
    parsed = parse_split(tmp_path, "train")
    assert "expected at most 10485760 bytes" in parsed.problems[0].text


def box(**sides: str) -> str:
    texts = {"xmin": "2", "ymin": "2", "xmax": "8", "ymax": "8"} | sides
    return "<bndbox>" + "".join(f"<{k}>{v}</{k}>" for k, v in texts.items()) + "</bndbox>"


BAD_OBJECTS = {
    "nan": (thing(box=box(xmax="nan")), ProblemKind.NON_FINITE_BOX, "xmax: expected a finite"),
    "inf": (thing(box=box(ymin="-inf")), ProblemKind.NON_FINITE_BOX, "ymin"),
    "1e308": (thing(box=box(ymax="1e308")), ProblemKind.NON_FINITE_BOX, "ymax"),
    "far": (thing(box=box(ymax="9" * 99)), ProblemKind.NON_FINITE_BOX, "ymax"),
    "text": (thing(box=box(xmin="1_0")), ProblemKind.NON_FINITE_BOX, "got '1_0'"),
    "digits": (thing(box=box(xmin="\u0663")), ProblemKind.NON_FINITE_BOX, "xmin"),
    "no side": (thing(box=box(xmin=" ")), ProblemKind.ANNOTATION, "<bndbox/xmin>"),
    "no box": (thing(box=""), ProblemKind.ANNOTATION, "<bndbox/xmin>"),
    "no name": (thing(name=" "), ProblemKind.ANNOTATION, "<name>"),
    "difficult": (
        thing(rest="<difficult>yes</difficult>"),
        ProblemKind.ANNOTATION,
        "difficult: expected 0 or 1, got 'yes'",
    ),
}


@pytest.mark.parametrize("name", BAD_OBJECTS)
def test_a_bad_object_is_named_and_the_rest_stays(tmp_path: Path, name: str) -> None:
    content, kind, text = BAD_OBJECTS[name]
    file = add(tmp_path, "a", xml(thing() + content + thing()))
    parsed = parse_split(tmp_path, "train")
    assert kinds(parsed) == [kind]
    assert parsed.problems[0].text.startswith(f"{file}: object[1]")
    assert text in parsed.problems[0].text
    assert len(parsed.data.images[0].annotations) == 2
    assert parsed.num_annotations == 3


def test_names_outside_the_folder(tmp_path: Path) -> None:
    add(tmp_path, "a", xml("", file="../../secret.jpg"))
    add(tmp_path, "b", xml("", file="C:\\secret.jpg"))
    add(tmp_path, "c", xml("", file="/etc/x.jpg"))
    with (tmp_path / "ImageSets/Main/train.txt").open("a") as stream:
        stream.write("../x\nnone\nb\n\nd\n")
    add(tmp_path, "d", xml("", file="d.jpg"))
    parsed = parse_split(tmp_path, "train")
    unsafe = ProblemKind.UNSAFE_PATH
    assert kinds(parsed) == [
        *[unsafe] * 4,
        ProblemKind.LABEL_FILE,
        ProblemKind.DUPLICATE_IMAGE,
        ProblemKind.IMAGE,
        ProblemKind.DUPLICATE_IMAGE,
    ]
    assert "train.txt:4: expected a name below the image folder" in parsed.problems[3].text
    assert parsed.num_images == 9
    assert [image.path.name for image in parsed.data.images] == ["d.jpg"]


def test_a_split_that_is_not_there(tmp_path: Path) -> None:
    add(tmp_path, "a", xml(""))
    with pytest.raises(DataError, match=r"split 'val': expected .*ImageSets/Main/val\.txt"):
        parse_split(tmp_path, "val")
    (tmp_path / "ImageSets/Main/val.txt").write_bytes(b"\xff\xfe")
    with pytest.raises(DataError, match="expected UTF-8"):
        parse_split(tmp_path, "val")


def test_written_files_are_read_by_torchvision(tmp_path: Path) -> None:
    folder = tmp_path / "VOCdevkit" / "VOC2012"
    annotations = (
        Annotation(5, 0, (0.0, 1.0, 7.0, 24.0), None, 161.0, False, True),
        Annotation(6, 1, (0.25, 1.5, 7.5, 24.0), None, 1.0, False),
    )
    image = ImageRecord(3, folder / "JPEGImages/a.jpg", HEIGHT, WIDTH, annotations)
    data = DetectionData((image,), ("dog & <cat>", "개"), (4, 9), Path("x"))
    write_split(folder, "train", data, ["a.jpg"])
    (folder / "JPEGImages").mkdir()
    Image.new("RGB", (WIDTH, HEIGHT)).save(folder / "JPEGImages/a.jpg")
    (picture, target), *others = VOCDetection(tmp_path, "2012", "train")
    assert (picture.size, others) == ((WIDTH, HEIGHT), [])
    found = target["annotation"]
    assert found["size"] == {"width": "32", "height": "24", "depth": "3"}
    assert [item["name"] for item in found["object"]] == ["dog & <cat>", "개"]
    assert [item["difficult"] for item in found["object"]] == ["1", "0"]
    assert [list(item["bndbox"].values()) for item in found["object"]] == [
        ["1", "2", "7", "24"],
        ["1.25", "2.5", "7.5", "24"],
    ]


@pytest.mark.parametrize("names", [("a", "a"), (" a",), ("a\nb",), ("\x00",)])
def test_class_names_that_have_no_place(tmp_path: Path, names: tuple[str, ...]) -> None:
    data = DetectionData((), names, tuple(range(len(names))), Path("x"))
    with pytest.raises(DataError, match="Pascal VOC cannot hold"):
        write_split(tmp_path, "train", data, [])
