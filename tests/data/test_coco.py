"""Annotation files: every form is read, every malformed entry is named, masks are pycocotools'."""

import copy
import io
import json
import os
from contextlib import redirect_stdout
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from pycocotools import mask as coco_mask
from pycocotools.coco import COCO

from vovnet.data.coco import MAX_OUTLINE, find_split, load_coco, parse_coco, to_coco_dict
from vovnet.data.labels import Annotation, decode_mask, decode_masks, rle_runs
from vovnet.data.problems import Problem
from vovnet.errors import DataError

DATA_DIR = Path(os.environ.get("VOVNET_DATA", "../shared/data"))
HEIGHT, WIDTH = 12, 20
TRIANGLE = [[2.0, 1.0, 10.0, 1.0, 2.0, 9.0]]


def blob() -> np.ndarray:
    mask = np.zeros((HEIGHT, WIDTH), dtype=bool)
    mask[3:7, 5:9] = mask[6, 4:12] = True
    return mask


def compressed(mask: np.ndarray) -> dict[str, object]:
    rle = coco_mask.encode(np.asfortranarray(mask, dtype=np.uint8))
    return {"size": rle["size"], "counts": rle["counts"].decode()}


def uncompressed(mask: np.ndarray) -> dict[str, object]:
    flat = mask.T.reshape(-1)
    edges = np.flatnonzero(np.diff(np.concatenate(([False], flat))))
    counts = np.diff(np.concatenate(([0], edges, [flat.size])))
    return {"size": list(mask.shape), "counts": counts.tolist()}


def annotation(number: int, **changes: object) -> dict[str, object]:
    entry = {
        "id": number,
        "image_id": 7,
        "category_id": 18,
        "bbox": [5.0, 3.0, 7.0, 4.0],
        "area": 20,
        "iscrowd": 0,
        "segmentation": TRIANGLE,
    }
    return {**entry, **changes}


def content() -> dict[str, list[dict[str, object]]]:
    images = [
        {"id": 7, "file_name": "a.png", "height": HEIGHT, "width": WIDTH},
        {"id": 3, "file_name": "sub/b.png", "height": 5, "width": 6.0},
    ]
    annotations = [
        annotation(1),
        annotation(2, segmentation=compressed(blob()), category_id=90),
        annotation(3, segmentation=uncompressed(blob()), iscrowd=1),
        annotation(4, segmentation=[], area=None),
    ]
    categories = [{"id": 90, "name": "cat"}, {"id": 1, "name": "ant"}, {"id": 18, "name": "dog"}]
    return {"images": images, "annotations": annotations, "categories": categories}


def write(folder: Path, value: object) -> Path:
    path = folder / "labels.json"
    path.write_text(json.dumps(value))
    return path


def test_reads_all_forms(tmp_path: Path) -> None:
    data = load_coco(write(tmp_path, content()), tmp_path / "images")
    assert data.category_ids == (1, 18, 90)
    assert data.class_names == ("ant", "dog", "cat")
    first, empty = data.images
    assert (first.id, first.height, first.width) == (7, HEIGHT, WIDTH)
    assert (empty.path, empty.annotations) == (tmp_path / "images/sub/b.png", ())
    assert [a.label for a in first.annotations] == [1, 2, 1, 1]
    assert [a.is_crowd for a in first.annotations] == [False, False, True, False]
    assert [a.area for a in first.annotations] == [20, 20, 20, 28]
    assert first.annotations[0].box_xyxy == (5, 3, 12, 7)
    masks = decode_masks(first.annotations, HEIGHT, WIDTH)
    polygon = coco_mask.merge(coco_mask.frPyObjects(TRIANGLE, HEIGHT, WIDTH))
    box = np.zeros((HEIGHT, WIDTH), dtype=bool)
    box[3:7, 5:12] = True
    expected = [coco_mask.decode(polygon), blob(), blob(), box]
    np.testing.assert_array_equal(masks, np.array(expected, dtype=bool))


def replaced(place: str, index: int, key: str, value: object) -> dict[str, list[dict[str, object]]]:
    changed = content()
    changed[place][index][key] = value
    return changed


def removed(place: str, key: str) -> dict[str, list[dict[str, object]]]:
    changed = content()
    del changed[place][0][key]
    return changed


FAR = [[0, 0, 1e7, 0, 0, 1e7]]
BAD_ENTRIES = {
    "image id text": (replaced("images", 0, "id", "7"), r"images\[0\].id: expected a whole"),
    "image id twice": (replaced("images", 1, "id", 7), "duplicate image id"),
    "image id true": (replaced("images", 0, "id", True), r"images\[0\].id"),
    "image id large": (replaced("images", 0, "id", 10**30), r"images\[0\].id"),
    "no file name": (removed("images", "file_name"), "expected the key 'file_name'"),
    "zero height": (replaced("images", 0, "height", 0), "expected a size of 1"),
    "bomb": (replaced("images", 0, "height", 10**8), "expected a size of 1"),
    "height nan": (replaced("images", 0, "height", float("nan")), r"images\[0\].height"),
    "category twice": (replaced("categories", 1, "id", 90), "duplicate category id"),
    "category unnamed": (replaced("categories", 1, "name", None), r"categories\[1\].name"),
    "no annotation id": (removed("annotations", "id"), r"annotations\[0\]: expected the key 'id'"),
    "annotation twice": (replaced("annotations", 1, "id", 1), "duplicate annotation id"),
    "unknown image": (replaced("annotations", 0, "image_id", 8), "no image has the id 8"),
    "unknown category": (replaced("annotations", 0, "category_id", 2), "no category has the id 2"),
    "short box": (replaced("annotations", 0, "bbox", [1, 2, 3]), r"annotations\[0\].bbox"),
    "text box": (replaced("annotations", 0, "bbox", [1, 2, 3, "4"]), "expected four numbers"),
    "nan box": (replaced("annotations", 0, "bbox", [1, 2, 3, float("nan")]), "non-finite box"),
    "inf box": (replaced("annotations", 0, "bbox", [1, 2, 3, float("inf")]), "non-finite box"),
    "1e308 box": (replaced("annotations", 0, "bbox", [1e308, 2, 1e308, 3]), "non-finite box"),
    "crowd text": (replaced("annotations", 0, "iscrowd", "no"), "iscrowd: expected 0 or 1"),
    "area nan": (replaced("annotations", 0, "area", float("nan")), "area: expected a finite"),
    "flat polygon": (replaced("annotations", 0, "segmentation", [1, 2, 3, 4, 5, 6]), r"tion\[0\]"),
    "odd polygon": (replaced("annotations", 0, "segmentation", [[1, 2, 3, 4, 5, 6, 7]]), "x3, y3"),
    "box polygon": (replaced("annotations", 0, "segmentation", [[1, 2, 3, 4]]), "x3, y3"),
    "nan polygon": (
        replaced("annotations", 0, "segmentation", [[1, 2, 3, 4, 5, float("nan")]]),
        "expected a finite number",
    ),
    "endless polygon": (replaced("annotations", 0, "segmentation", FAR), f"at most {MAX_OUTLINE}"),
    "segmentation text": (replaced("annotations", 0, "segmentation", "abc"), "polygons or run"),
    "RLE size": (
        replaced("annotations", 0, "segmentation", {"size": [20, 12], "counts": "abc"}),
        r"size: expected \[12, 20\], got \[20, 12\]",
    ),
    "RLE sum": (
        replaced("annotations", 0, "segmentation", {"size": [12, 20], "counts": [100, 141]}),
        "expected runs of 240 pixels together",
    ),
    "RLE negative": (
        replaced("annotations", 0, "segmentation", {"size": [12, 20], "counts": [-1, 241]}),
        "expected runs of 240 pixels together",
    ),
    "RLE without counts": (
        replaced("annotations", 0, "segmentation", {"size": [12, 20]}),
        "expected a text or a list",
    ),
    "entry is a list": ({**content(), "annotations": [[]]}, r"annotations\[0\]: expected an objec"),
}


@pytest.mark.parametrize(("value", "message"), BAD_ENTRIES.values(), ids=BAD_ENTRIES)
def test_names_a_malformed_entry(tmp_path: Path, value: object, message: str) -> None:
    path = write(tmp_path, value)
    with pytest.raises(DataError, match=message) as caught:
        load_coco(path, tmp_path)
    assert str(caught.value).startswith(str(path))
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    "name",
    ["../a.png", "a/../../b.png", "/etc/a.png", "..", "C:\\a.png", "..\\a.png", "C:a.png", "\\a"],
)
def test_files_stay_below_the_image_folder(tmp_path: Path, name: str) -> None:
    path = write(tmp_path, replaced("images", 0, "file_name", name))
    with pytest.raises(DataError, match="file outside the image folder"):
        load_coco(path, tmp_path)


@pytest.mark.parametrize("name", ["", "a\0b", "\ud800.png", 5, None])
def test_refuses_what_is_no_file_name(tmp_path: Path, name: object) -> None:
    path = write(tmp_path, replaced("images", 0, "file_name", name))
    with pytest.raises(DataError, match="expected a file name"):
        load_coco(path, tmp_path)


@pytest.mark.parametrize(
    ("raw", "message"),
    [
        (b"", "not valid JSON"),
        (b'{"images": [', "not valid JSON"),
        (b"\xff\xfe\xfa", "not valid JSON"),
        (b"[" * 200_000, "nested too deep"),
        (b"[]", "expected a JSON object"),
        (b'{"images": [], "categories": []}', "'annotations', got no such key"),
        (b'{"images": {}, "annotations": [], "categories": []}', "expected a list under 'images'"),
        (b'{"images": [' + b"9" * 5000 + b"]}", "not valid JSON"),
    ],
)
def test_refuses_what_is_no_annotation_file(tmp_path: Path, raw: bytes, message: str) -> None:
    path = tmp_path / "labels.json"
    path.write_bytes(raw)
    with pytest.raises(DataError, match=message):
        load_coco(path, tmp_path)


def test_missing_annotation_file(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"none\.json: cannot be read"):
        load_coco(tmp_path / "none.json", tmp_path)


JSON_VALUES = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=8),
    lambda inner: (
        st.lists(inner, max_size=5) | st.dictionaries(st.text(max_size=8), inner, max_size=4)
    ),
    max_leaves=8,
)
KEYS = ["id", "image_id", "category_id", "bbox", "segmentation", "file_name", "height", "width"]


@settings(max_examples=40, deadline=None)
@given(
    place=st.sampled_from(["images", "annotations", "categories"]),
    index=st.integers(0, 1),
    key=st.sampled_from([*KEYS, "name", "area", "iscrowd", None]),
    value=JSON_VALUES,
)
def test_any_entry_is_read_or_reported(
    place: str, index: int, key: str | None, value: object
) -> None:
    changed = copy.deepcopy(content())
    if key is None:
        changed[place][index] = value  # type: ignore[assignment]
    else:
        changed[place][index][key] = value
    problems: list[Problem] = []
    data = parse_coco(changed, Path("x.json"), Path(), report=problems.append)
    for image in data.images:
        decode_masks(image.annotations, image.height, image.width)


@settings(max_examples=40, deadline=None)
@given(data=st.data())
def test_masks_equal_those_of_pycocotools(data: st.DataObject) -> None:
    height, width = data.draw(st.integers(1, 9)), data.draw(st.integers(1, 9))
    bits = data.draw(st.lists(st.booleans(), min_size=height * width, max_size=height * width))
    mask = np.array(bits).reshape(height, width)
    rle = coco_mask.encode(np.asfortranarray(mask, dtype=np.uint8))
    made = Annotation(1, 0, (0, 0, 1, 1), rle, 1, False)
    np.testing.assert_array_equal(decode_masks([made], height, width)[0], mask)
    crop = decode_mask(made, height, width)
    rows, columns = np.flatnonzero(mask.any(1)), np.flatnonzero(mask.any(0))
    if mask.any():
        assert (crop.x, crop.y) == (columns[0], rows[0])
        assert crop.pixels.shape == (np.ptp(rows) + 1, np.ptp(columns) + 1)
    else:
        assert crop.pixels.shape == (0, 0)


@settings(max_examples=80, deadline=None)
@given(counts=st.binary(max_size=12))
def test_any_bytes_are_runs_of_the_image_or_refused(counts: bytes) -> None:
    try:
        runs = rle_runs(counts, 6, 7)
    except DataError as error:
        assert "broken RLE" in str(error)  # noqa: PT017
    else:
        assert min(runs) >= 0
        assert sum(runs) == 42


@pytest.mark.parametrize(
    "counts", [b"", b"o", b"ooooooooooo0", b"0\x00", b"\x80", b"P1Z", b"1", b"[1O"]
)
def test_refuses_broken_run_lengths(counts: bytes) -> None:
    with pytest.raises(DataError, match="broken RLE"):
        rle_runs(counts, 6, 7)


def touch(path: Path) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.touch()
    return path


@pytest.mark.parametrize(
    ("labels", "images"),
    [
        ("train.json", "images/train"),
        ("train.json", "train"),
        ("train.json", "images"),
        ("instances_train.json", "images/train"),
        ("instances_train2017.json", "train2017"),
        ("instances_train2017.json", "images/train"),
    ],
)
def test_finds_a_split(tmp_path: Path, labels: str, images: str) -> None:
    path = touch(tmp_path / "annotations" / labels)
    touch(tmp_path / "annotations/val.json")
    (tmp_path / images).mkdir(parents=True)
    assert find_split(tmp_path, "train") == (path, tmp_path / images)


def test_a_split_that_is_not_there_or_not_clear(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"annotations/train\.json or one file .* got neither"):
        find_split(tmp_path, "train")
    touch(tmp_path / "annotations/instances_train2014.json")
    with pytest.raises(DataError, match=r"expected the images in one of .*train2014.*got none"):
        find_split(tmp_path, "train")
    touch(tmp_path / "annotations/instances_train2017.json")
    with pytest.raises(DataError, match=r"got instances_train2014\.json, instances_train2017"):
        find_split(tmp_path, "train")


def index_of(value: dict[str, object]) -> COCO:
    index = COCO()
    index.dataset = value
    with redirect_stdout(io.StringIO()):
        index.createIndex()
    return index


def assert_same_masks(annotation_file: Path, limit: int | None = None) -> int:
    data = load_coco(annotation_file, annotation_file.parent)
    original = index_of(json.loads(annotation_file.read_text()))
    ours = index_of(json.loads(json.dumps(to_coco_dict(data))))
    compared = 0
    for image in data.images[:limit]:
        masks = decode_masks(image.annotations, image.height, image.width)
        for mask, made in zip(masks, image.annotations, strict=True):
            entry = original.anns[made.id]
            compared += 1
            assert ours.anns[made.id]["category_id"] == entry["category_id"]
            np.testing.assert_allclose(ours.anns[made.id]["bbox"], entry["bbox"], atol=1e-9)
            if entry.get("segmentation"):
                assert np.array_equal(mask, original.annToMask(entry))
            assert np.array_equal(mask, ours.annToMask(ours.anns[made.id]))
    return compared


def test_pycocotools_reads_what_we_give_it(tmp_path: Path) -> None:
    assert assert_same_masks(write(tmp_path, content())) == 4


def test_data_without_masks_is_given_without(tmp_path: Path) -> None:
    value = content()
    value["annotations"] = value["annotations"][3:]
    given_back = to_coco_dict(load_coco(write(tmp_path, value), tmp_path))
    assert "segmentation" not in given_back["annotations"][0]


@pytest.mark.parametrize(
    ("path", "limit"),
    [("coco-free/annotations/instances_val.json", 10), ("nuclei/annotations/test.json", 2)],
)
def test_real_masks_equal_those_of_pycocotools(path: str, limit: int) -> None:
    if not (DATA_DIR / path).is_file():
        pytest.skip(f"needs {path} in the folder that VOVNET_DATA names ({DATA_DIR})")
    assert assert_same_masks(DATA_DIR / path, limit) > 20
