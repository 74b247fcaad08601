"""Train a detector and two peers from scratch under the same processor budget and compare them.

The peers are torchvision's `maskrcnn_resnet50_fpn` and Ultralytics YOLO11n-seg (never a dependency:
`setup` makes an environment of its own for it). Every contestant starts from random weights, sees
the train split only, and is scored in mask AP (pycocotools, 500 detections per image) on the test
split.

The budget of "20 minutes of a machine with 2 cores" is counted as 40 core-minutes of processor
time of the training process with all its threads (`time.process_time`; 2 torch threads, data
loading inside the process), because wall time would depend on what else the machine does. Training
stops when the budget is spent, in whatever epoch. The learning rate is a function of the fraction
that is spent (linear warm-up, then cosine to zero), so every schedule is complete. Threads sleep
while they wait (`OMP_WAIT_POLICY=passive`): spinning would be billed as work.

Every image is seen at 1.5 times its size, at training and at test. Usage, in this order:

    python benchmarks/train_vs_peers.py --work-dir DIR setup
    python benchmarks/train_vs_peers.py --work-dir DIR maskrcnn
    DIR/peers-venv/bin/python benchmarks/train_vs_peers.py --work-dir DIR yolo
    python benchmarks/train_vs_peers.py --work-dir DIR ours --model-folder RUN/model
    python benchmarks/train_vs_peers.py --work-dir DIR speed --model-folder RUN/model
    python benchmarks/train_vs_peers.py --work-dir DIR report
"""

import argparse
import importlib
import importlib.util
import json
import os
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch
from mask_peers import (
    CONFIDENCE,
    MASKRCNN,
    MAX_DETECTIONS,
    YOLO,
    build_maskrcnn,
    load_maskrcnn,
    load_yolo,
    prepare_yolo,
    train_maskrcnn,
)
from peers import (
    THREADS,
    Budget,
    Predict,
    accuracy_row,
    difference,
    evaluate,
    load_split,
    machine,
    make_environment,
    quiet_ultralytics,
    read_rgb,
    save_yolo,
    start,
    train_yolo,
)
from pycocotools import mask as mask_utils


def to_results(image_id: int, output: Any) -> list[dict[str, Any]]:
    """Convert Detections, or a peer's (scores, boxes_xyxy, masks), of one image to COCO results."""
    if hasattr(output, "to_coco"):
        # Masks are what is scored here, so their own score ranks them.
        return [r | {"score": r["mask_score"]} for r in output.to_coco(image_id, [1])]
    results = []
    for value, (x1, y1, x2, y2), mask in zip(*output, strict=True):
        rle = mask_utils.encode(np.asfortranarray(mask, dtype=np.uint8))
        result = {"image_id": image_id, "category_id": 1, "score": float(value)}
        result["bbox"] = [float(side) for side in (x1, y1, x2 - x1, y2 - y1)]
        result["segmentation"] = {"size": rle["size"], "counts": rle["counts"].decode()}
        results.append(result)
    return results


def evaluate_masks(
    arguments: argparse.Namespace, name: str, predict: Predict, *, outcome: dict[str, Any]
) -> None:
    """Score the masks of a contestant on the test split."""
    evaluate(
        arguments,
        name,
        predict=predict,
        to_results=to_results,
        iou_type="segm",
        max_detections=MAX_DETECTIONS,
        outcome=outcome,
    )


def run_maskrcnn(arguments: argparse.Namespace) -> None:
    """Train, save and score Mask R-CNN."""
    training = arguments.work_dir / "maskrcnn_training.json"
    if not arguments.evaluate_only:
        model = build_maskrcnn().train()
        budget = Budget(arguments.cpu_seconds, arguments.work_dir / "maskrcnn_log.jsonl")
        outcome = train_maskrcnn(model, arguments.data, budget=budget) | {"settings": MASKRCNN}
        torch.save(model.state_dict(), arguments.work_dir / "maskrcnn.pt")
        training.write_text(json.dumps(outcome))
    predict = load_maskrcnn(arguments.work_dir, CONFIDENCE)
    evaluate_masks(arguments, "maskrcnn", predict, outcome=json.loads(training.read_text()))


def run_yolo(arguments: argparse.Namespace) -> None:
    """Train, save and score YOLO11n-seg; runs in the environment that `setup` makes."""
    quiet_ultralytics(arguments.work_dir)
    training = arguments.work_dir / "yolo_training.json"
    if not arguments.evaluate_only:
        trainer = prepare_yolo(arguments)
        budget = Budget(arguments.cpu_seconds, arguments.work_dir / "yolo_log.jsonl")
        outcome = train_yolo(trainer, budget=budget, mosaic_until=YOLO["mosaic_until"])
        outcome |= {"settings": YOLO}
        save_yolo(trainer, arguments.work_dir / "yolo.pt")
        training.write_text(json.dumps(outcome))
    predict = load_yolo(arguments.work_dir, CONFIDENCE)
    evaluate_masks(arguments, "yolo", predict, outcome=json.loads(training.read_text()))


def load_ours(model_folder: Path, confidence: float) -> Predict:
    """Return the predictor of a model folder: a uint8 RGB image to Detections."""
    load = importlib.import_module("vovnet.predict").Predictor.load
    return load(
        str(model_folder),
        threads=THREADS,
        score_threshold=confidence,
        max_detections=MAX_DETECTIONS,
    )


def run_ours(arguments: argparse.Namespace) -> None:
    """Score a model folder; how it was trained is read from its config."""
    config = json.loads((arguments.model_folder / "config.json").read_text())
    outcome = {"settings": {"architecture": config["architecture"]}, **config["training"]}
    predict = load_ours(arguments.model_folder, CONFIDENCE)
    evaluate_masks(arguments, "ours", predict, outcome=outcome)


def run_speed(arguments: argparse.Namespace) -> None:
    """Time whole predictions, image in memory to masks, in interleaved rounds A B C A B C.

    The images are the 256 x 256 ones of the test split, so every network sees 384 x 384. YOLO takes
    part when the interpreter is that of the environment made by `setup`.
    """
    confidence = arguments.confidence
    truth = load_split(arguments.data, "test")
    small = [info for info in truth.imgs.values() if info["height"] == info["width"] == 256]
    images = [read_rgb(arguments.data, info) for info in small[: arguments.images]]
    predictors = {"maskrcnn": load_maskrcnn(arguments.work_dir, confidence)}
    if importlib.util.find_spec("ultralytics"):
        quiet_ultralytics(arguments.work_dir)
        predictors["yolo"] = load_yolo(arguments.work_dir, confidence)
    if arguments.model_folder:
        predictors["ours"] = load_ours(arguments.model_folder, confidence)
    rates: dict[str, list[float]] = {name: [] for name in predictors}
    for turn in range(arguments.rounds + 1):
        for name, predict in predictors.items():
            torch.set_num_threads(THREADS)
            started = time.perf_counter()
            for image in images if turn else images[:2]:
                predict(image)
            if turn:
                rates[name].append(len(images) / (time.perf_counter() - started))
    found = {
        name: sum(len(to_results(0, predict(image))) for image in images)
        for name, predict in predictors.items()
    }
    record = {"images": len(images), "confidence": confidence, "images_per_second": rates}
    record |= {"detections": found, **machine()}
    (arguments.work_dir / "speed.json").write_text(json.dumps(record, indent=1))
    print(json.dumps(record, indent=1))


def speed_table(rates: dict[str, list[float]]) -> str:
    """Return the speed table; ratios are taken within a round, which keeps them paired."""
    lines = [
        "| | images/s, median (min to max) | times Mask R-CNN, median of rounds |",
        "|---|---|---|",
    ]
    for name, values in rates.items():
        ratio = np.median(np.divide(values, rates["maskrcnn"]))
        spread = f"{min(values):.2f} to {max(values):.2f}"
        lines.append(f"| {name} | {np.median(values):.2f} ({spread}) | {ratio:.2f} |")
    return "\n".join(lines)


def run_report(arguments: argparse.Namespace) -> None:
    """Print the results as Markdown: accuracy with intervals, paired differences, speed."""
    work_dir = arguments.work_dir
    names = [name for name in ("ours", "maskrcnn", "yolo") if (work_dir / f"{name}.json").exists()]
    print(f"Masks, test split, at most {MAX_DETECTIONS} detections per image; 95 % intervals.\n")
    print("| | AP | AP50 | AP75 | epochs | images | steps | CPU s | wall s |")
    print("|---|---|---|---|---|---|---|---|---|")
    for name in names:
        row = json.loads((work_dir / f"{name}.json").read_text())
        print(accuracy_row(row, ("epochs", "images_seen", "steps", "cpu_seconds", "wall_seconds")))
    for name in names[1:] if "ours" in names else []:
        print(f"\n{difference(work_dir, 'ours', name)}, paired.")
    if (work_dir / "speed.json").exists():
        speed = json.loads((work_dir / "speed.json").read_text())
        print("\n" + speed_table(speed["images_per_second"]))


def run_setup(arguments: argparse.Namespace) -> None:
    """Make the peers' environment: this interpreter's packages, this source, and Ultralytics."""
    make_environment(arguments.work_dir / "peers-venv")


def parse_arguments() -> argparse.Namespace:
    """Parse the command line; the data default to the environment, then to a folder beside us."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    data = Path(os.environ.get("VOVNET_DATA", "../shared/data")) / "nuclei"
    parser.add_argument("--data", type=Path, default=data)
    parser.add_argument("--work-dir", type=Path, required=True)
    verbs = parser.add_subparsers(required=True)
    runs = (run_setup, run_maskrcnn, run_yolo, run_ours, run_speed, run_report)
    parsers = {run: verbs.add_parser(run.__name__[4:], help=run.__doc__) for run in runs}
    for run, verb in parsers.items():
        verb.set_defaults(run=run)
    for run in (run_maskrcnn, run_yolo):
        parsers[run].add_argument("--cpu-seconds", type=float, default=2400.0)
        parsers[run].add_argument("--evaluate-only", action="store_true")
    parsers[run_ours].add_argument("--model-folder", type=Path, required=True)
    parsers[run_speed].add_argument("--model-folder", type=Path)
    parsers[run_speed].add_argument("--confidence", type=float, default=0.05)
    parsers[run_speed].add_argument("--images", type=int, default=12)
    parsers[run_speed].add_argument("--rounds", type=int, default=5)
    return parser.parse_args()


def main() -> None:
    """Run one verb with the thread settings that every contestant shares."""
    arguments = parse_arguments()
    start(arguments)
    arguments.run(arguments)


if __name__ == "__main__":
    main()
