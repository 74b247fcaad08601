"""The page: whole by itself, its figures those of evaluate_coco, hostile names harmless."""

import base64
import io
import re
from dataclasses import replace
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from vovnet.data.labels import Annotation, DetectionData, ImageRecord
from vovnet.error_analysis import ErrorKind, Finding, analyse_errors, coco_curves
from vovnet.evaluation import evaluate_coco
from vovnet.val_page import _cut_out, _matrix, _surroundings, val_page

NAMES = ("cat", "<script>alert(1)</script>", 'a "dog" & b')
BOXES = [(5.0, 5.0, 30.0, 30.0), (40.0, 10.0, 70.0, 50.0), (0.0, 60.0, 20.0, 80.0)]


@pytest.fixture
def data(tmp_path: Path) -> DetectionData:
    """Two noise images with an object of each class."""
    records = []
    for number in range(2):
        pixels = np.random.default_rng(number).integers(0, 256, (80, 90, 3), dtype=np.uint8)
        Image.fromarray(pixels).save(tmp_path / f"<{number}>.png")
        made = tuple(
            Annotation(i, i, box, None, (box[2] - box[0]) * (box[3] - box[1]), False)
            for i, box in enumerate(BOXES)
        )
        records.append(ImageRecord(number, tmp_path / f"<{number}>.png", 80, 90, made))
    return DetectionData(tuple(records), NAMES, (1, 2, 3), tmp_path / "made.json")


def found(image: int, category: int, box: tuple[float, ...], score: float) -> dict[str, Any]:
    x1, y1, x2, y2 = box
    bbox = [x1, y1, x2 - x1, y2 - y1]
    return {"image_id": image, "category_id": category, "bbox": bbox, "score": score}


PREDICTIONS = [
    found(0, 1, BOXES[0], 0.9),
    found(0, 1, (5, 5, 30, 28), 0.8),  # doubled
    found(0, 3, BOXES[1], 0.7),  # wrong class
    found(1, 2, (40, 10, 70, 22), 0.6),  # badly placed
    found(1, 2, (72, 60, 89, 79), 0.95),  # nothing there
]


class Elements(HTMLParser):
    """Checks that what opens is closed, and gathers elements with their attributes."""

    def __init__(self) -> None:
        super().__init__()
        self.open: list[str] = []
        self.elements: list[tuple[str, dict[str, str | None]]] = []
        self.text: list[str] = []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.elements.append((tag, dict(attrs)))
        if tag not in ("meta", "img", "br"):
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.elements.append((tag, dict(attrs)))

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        self.text.append(data)


def page(data: DetectionData, predictions: list[dict[str, Any]], **options: int) -> str:
    metrics = evaluate_coco(data, predictions, iou_types=("bbox",))
    curves = [coco_curves(data, predictions, iou_type="bbox", max_detections=100)]
    errors = analyse_errors(data, predictions, min_score=0.5)
    return val_page("model <x>", data, metrics, curves, errors, **options)


def read(text: str) -> Elements:
    elements = Elements()
    elements.feed(text)
    assert not elements.open
    return elements


def test_one_page_that_needs_nothing_else(data: DetectionData) -> None:
    text = page(data, PREDICTIONS)
    elements = read(text)
    tags = [tag for tag, _ in elements.elements]
    assert "script" not in tags
    assert "link" not in tags
    for _, attributes in elements.elements:
        assert not any(name.startswith("on") for name in attributes)
        for name in ("src", "href"):
            assert (attributes.get(name) or "data:image/jpeg;base64,").startswith("data:image/jpeg")
    assert "http" not in text.replace("http://www.w3.org", "")
    assert "url(" not in text
    assert NAMES[1] in "".join(elements.text)  # shown, as text


def test_its_figures_are_those_of_evaluate_coco(data: DetectionData) -> None:
    figures = evaluate_coco(data, PREDICTIONS, iou_types=("bbox",)).by_type["bbox"]
    text = page(data, PREDICTIONS)
    rows = re.findall(r"<tr><td>(.*?)</td>(.*?)</tr>", text)
    cells = {name: re.findall(r"<td>(.*?)</td>", rest) for name, rest in rows}
    assert cells["all"][:3] == [f"{v:.3f}" for v in (figures.ap, figures.ap50, figures.ap75)]
    assert cells["all"][6] == f"{figures.ar:.3f}"
    assert cells["cat"][0] == f"{figures.ap_per_class[0]:.3f}"


def test_curves_end_where_the_recall_does(data: DetectionData) -> None:
    text = page(data, PREDICTIONS)
    plots = re.findall(r"<svg class=\"plot\".*?</svg>", text)
    assert len(plots) == 2  # overlap 0.5 and 0.75
    lines = re.findall(r'<polyline points="(.*?)"', plots[0])
    assert len(lines) == 4  # three classes and their mean
    points = [tuple(map(float, point.split(","))) for point in lines[1].split()]  # the cat
    assert len(points) == 101
    # One of two is found, without an error before it: precision 1 to a recall of 0.5, then 0.
    assert {y for x, y in points if x <= 42 + 150} == {8.0}
    assert {y for x, y in points if x > 42 + 150.1} == {268.0}


def test_pictures_of_each_kind_and_no_more_than_asked_for(data: DetectionData) -> None:
    elements = read(page(data, PREDICTIONS))
    pictures = [a for tag, a in elements.elements if tag == "img"]
    kinds = [a["alt"] for a in pictures]
    assert kinds == [
        *(ErrorKind.CLASS, ErrorKind.LOCALISATION, ErrorKind.DUPLICATE, ErrorKind.BACKGROUND),
        *[ErrorKind.MISSED] * 3,
    ]
    for attributes in pictures:
        source = attributes["src"] or ""
        with Image.open(io.BytesIO(base64.b64decode(source.split(",")[1]))) as picture:
            assert picture.format == "JPEG"
            assert max(picture.size) == 176
    fewer = read(page(data, PREDICTIONS, pictures=1))
    assert sum(tag == "img" for tag, _ in fewer.elements) == 5


def test_boxes_are_drawn_where_they_are() -> None:
    image = np.zeros((100, 100, 3), np.uint8)
    finding = Finding(kind=ErrorKind.BACKGROUND, image=0, found=(40, 40, 60, 60), score=1.0)
    assert _surroundings([(40, 40, 60, 60)], (100, 100)) == (28, 28, 72, 72)
    with Image.open(io.BytesIO(_cut_out(image, finding))) as picture:
        pixels = np.asarray(picture).astype(int)
    drawn = np.argwhere(pixels[..., 0] > 120)
    assert pixels.shape == (176, 176, 3)  # four times the 44 pixels
    assert np.abs(drawn.min(0) - 48).max() <= 2
    assert np.abs(drawn.max(0) - 127).max() <= 2


@pytest.mark.parametrize(
    "box", [(0, 0, 100, 80), (99.5, 79.5, 100, 80), (0, 0, 0.5, 0.5), (0, 0, 1, 80)]
)
def test_boxes_on_the_border_have_pictures(box: tuple[float, float, float, float]) -> None:
    left, top, right, bottom = _surroundings([box], (80, 100))
    assert 0 <= left < right <= 100
    assert 0 <= top < bottom <= 80
    image = np.zeros((80, 100, 3), np.uint8)
    assert _cut_out(image, Finding(kind=ErrorKind.MISSED, image=0, truth=box))


def test_nothing_to_find_and_nothing_found(data: DetectionData) -> None:
    empty = replace(data, images=tuple(replace(i, annotations=()) for i in data.images))
    read(page(empty, []))
    assert "n/a" in page(empty, PREDICTIONS)
    read(page(data, []))


def test_a_matrix_of_many_classes_shows_the_most_confused() -> None:
    confusion = np.zeros((101, 101), dtype=np.int64)
    confusion[np.arange(100), np.arange(100)] = 5
    confusion[70, 71] = 9
    text = _matrix(confusion, [f"class {k}" for k in range(100)])
    assert ">9<" in text
    assert text.count("<tr>") == 1 + 26
    assert "75 classes with fewer confusions are not shown" in text
