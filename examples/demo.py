"""The main job on one real image: what is found, how long each stage takes, what it costs.

Run by `make demo`. Options: --model FOLDER_OR_NAME, --repeats N, --threads N, --output FILE.
"""

import argparse
import sys
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from pycocotools import mask as coco_mask

from vovnet.data.labels import Annotation, DetectionData, ImageRecord
from vovnet.errors import ConfigError, DataError
from vovnet.evaluation import evaluate_coco, predict_images
from vovnet.images import read_image
from vovnet.predict import Predictor
from vovnet.predict_files import save_picture
from vovnet.profiling.count import count_macs, count_parameters
from vovnet.profiling.energy import measure_energy
from vovnet.profiling.stages import WHOLE, time_stages

ASSETS = Path(__file__).parent.parent / "assets"
IMAGE, LABELS = ASSETS / "nuclei.tif", ASSETS / "nuclei_mask.png"
MODEL = "nuclei"


def labelled_image() -> DetectionData:
    """The demo image with its labelled nuclei as a data set of one image."""
    labels = np.array(Image.open(LABELS))
    annotations = []
    for number in np.unique(labels[labels > 0]).tolist():
        mask = np.asfortranarray(labels == number, dtype=np.uint8)
        rle = coco_mask.encode(mask)
        x, y, width, height = coco_mask.toBbox(rle).tolist()
        annotations.append(
            Annotation(
                id=number,
                label=0,
                box_xyxy=(x, y, x + width, y + height),
                segmentation=rle,
                area=float(mask.sum()),
                is_crowd=False,
            )
        )
    record = ImageRecord(
        id=1,
        path=IMAGE,
        height=labels.shape[0],
        width=labels.shape[1],
        annotations=tuple(annotations),
    )
    return DetectionData(
        images=(record,), class_names=("nucleus",), category_ids=(1,), annotation_file=LABELS
    )


def print_accuracy(model: str, predictor: Predictor, data: DetectionData) -> None:
    """Counted against labelled objects, and AP50 at the model's own detection limit."""
    found = predictor(IMAGE)
    labelled = len(data.images[0].annotations)
    print(f"{'found':<18}{len(found)} nuclei, {labelled} are labelled")
    ranker = Predictor.load(model, score_threshold=0.0)
    predictions = [entry for part in predict_images(ranker, data) for entry in part]
    metrics = evaluate_coco(data, predictions, max_detections=ranker.engine.max_detections)
    box, mask = metrics.by_type["bbox"].ap50, metrics.by_type["segm"].ap50
    print(
        f"{'AP50':<18}box {box:.3f}, mask {mask:.3f} on this image "
        f"(at most {metrics.max_detections} detections)"
    )


def print_cost(predictor: Predictor, repeats: int) -> None:
    """Time of each stage, FPS, MACs, parameters, energy."""
    times = time_stages(predictor, IMAGE, rounds=repeats)
    for stage, timings in times.items():
        print(f"{stage:<18}{timings.format()}")
    whole = times[WHOLE]
    print(f"{'speed':<18}{1000 / whole.median_ms:.2f} images/s, {torch.get_num_threads()} threads")
    resized = predictor.preprocess.resize(read_image(IMAGE))
    batch = predictor.preprocess.batch([resized])
    inputs = tuple(torch.from_numpy(part) for part in batch)
    macs = count_macs(predictor.engine.graph, inputs)
    height, width = batch[0].shape[1:3]
    print(f"{'macs':<18}{macs / 1e9:.2f} G (input {height} x {width}, masks of what was found)")
    print(f"{'parameters':<18}{count_parameters(predictor.engine.graph) / 1e6:.2f} M")

    def run() -> int:
        predictor.engine.infer(*batch)
        return 1

    print(f"{'energy':<18}{measure_energy(run).format()}")


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", default=MODEL, help="model folder or bundled model")
    parser.add_argument("--repeats", type=int, default=10)
    parser.add_argument("--threads", type=int, default=None)
    parser.add_argument("--output", type=Path, default=Path("runs/demo/nuclei.png"))
    options = parser.parse_args()
    try:
        predictor = Predictor.load(options.model, engine="torch", threads=options.threads)
        data = labelled_image()
        print(f"{'image':<18}{IMAGE.name}, {data.images[0].width} x {data.images[0].height} pixels")
        print_accuracy(options.model, predictor, data)
        print_cost(predictor, options.repeats)
        options.output.parent.mkdir(parents=True, exist_ok=True)
        image = read_image(IMAGE)
        save_picture(options.output, image, predictor(image))
        print(f"{'picture':<18}{options.output}")
    except (ConfigError, DataError) as error:
        print(f"demo: {error}", file=sys.stderr)
        return 2 if isinstance(error, ConfigError) else 3
    return 0


if __name__ == "__main__":
    sys.exit(main())
