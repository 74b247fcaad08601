import json
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

SIDE = 72


@pytest.fixture(scope="package")
def data_dir(tmp_path_factory) -> Path:
    """Two pictures with a bright square each, as the splits of COCO and of Pascal VOC."""
    folder = tmp_path_factory.mktemp("data")
    (folder / "images").mkdir()
    (folder / "annotations").mkdir()
    images, annotations = [], []
    for number, (x, side) in enumerate(((6, 48), (20, 40)), start=1):
        pixels = np.full((SIDE, SIDE + 16, 3), 40, dtype=np.uint8)
        pixels[8 : 8 + side, x : x + side] = 220
        Image.fromarray(pixels).save(folder / "images" / f"{number}.png")
        size = {"height": SIDE, "width": SIDE + 16}
        images.append({"id": number, "file_name": f"{number}.png", **size})
        corners = [x, 8, x + side, 8, x + side, 8 + side, x, 8 + side]
        annotations.append(
            {
                "id": number,
                "image_id": number,
                "category_id": 1,
                "bbox": [x, 8, side, side],
                "area": side * side,
                "iscrowd": 0,
                "segmentation": [corners],
            }
        )
    categories = [{"id": 1, "name": "square"}, {"id": 2, "name": "disc"}]
    content = {"images": images, "annotations": annotations, "categories": categories}
    for split in ("train", "val", "trainval", "test"):
        (folder / "annotations" / f"{split}.json").write_text(json.dumps(content))
    return folder
