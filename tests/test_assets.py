"""The demo image is what assets/LICENSE.md says it is."""

import json
import os
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from pycocotools import mask as coco_mask

ASSETS = Path(__file__).parent.parent / "assets"
NUCLEI = Path(os.environ.get("VOVNET_DATA", "../shared/data")) / "nuclei"
SOURCE = "4dbbb275960ab9e4.png"
CROP = (slice(8, 520), slice(184, 696))


def read_asset(name: str) -> np.ndarray:
    with Image.open(ASSETS / name) as image:
        return np.asarray(image)


def annotations(split: str) -> dict[str, list[dict]]:
    path = NUCLEI / "annotations" / f"{split}.json"
    if not path.is_file():
        pytest.skip(f"no nuclei data set at {NUCLEI}; VOVNET_DATA names the folder")
    return json.loads(path.read_text())


def test_size_type_and_number_of_labels() -> None:
    image, labels = read_asset("nuclei.tif"), read_asset("nuclei_mask.png")
    assert image.shape == labels.shape == (512, 512)
    assert image.dtype == labels.dtype == np.uint16
    assert (image.min(), image.max()) == (0, 235)
    assert len(np.unique(labels)) - 1 == 125


def test_the_labels_are_those_of_the_test_image() -> None:
    content = annotations("test")
    [image_id] = [image["id"] for image in content["images"] if image["file_name"] == SOURCE]
    labels = read_asset("nuclei_mask.png")
    found = set()
    for annotation in content["annotations"]:
        if annotation["image_id"] != image_id:
            continue
        rle = annotation["segmentation"]
        if isinstance(rle["counts"], list):
            rle = coco_mask.frPyObjects(rle, *rle["size"])
        mask = coco_mask.decode(rle)[CROP].astype(bool)
        if mask.any():
            label = labels[mask][0]
            np.testing.assert_array_equal(labels == label, mask)
            found.add(int(label))
    assert len(found) == 125


def test_the_pixels_are_those_of_the_test_image_with_noise() -> None:
    annotations("test")
    with Image.open(NUCLEI / "images" / SOURCE) as image:
        original = np.asarray(image.convert("L")).astype(int)[CROP]
    difference = np.abs(read_asset("nuclei.tif").astype(int) - original)
    assert difference.max() <= 22
    assert difference.mean() < 5


def test_the_image_is_in_no_training_split() -> None:
    for split in ("train", "val"):
        assert all(image["file_name"] != SOURCE for image in annotations(split)["images"])
