"""Train a box detector and three peers from scratch under the same processor budget; compare them.

The peers are torchvision's `fcos_resnet50_fpn` and `ssdlite320_mobilenet_v3_large`, and Ultralytics
YOLO11n (never a dependency: `setup` makes an environment of its own for it). Every contestant
starts from random weights, sees the train split only, and is scored in box AP (pycocotools, 100
detections per image) on the test split.

The budget of 20 minutes is counted in processor time of the training process with all its threads
(`time.process_time`; data loading inside the process), because wall time would depend on what else
the machine does: 40 core-minutes with the 2 torch threads of the default, 20 with THREADS=1 in the
environment. Training
stops when the budget is spent, in whatever epoch. The learning rate is a function of the fraction
that is spent (linear warm-up, then cosine to zero), so every schedule is complete. Threads sleep
while they wait (`OMP_WAIT_POLICY=passive`): spinning would be billed as work.

Every picture is resized so that its long side is --side, at training (before random scales) and at
test; SSDLite sees 320 x 320 by design. Usage, in this order:

    python benchmarks/boxes_vs_peers.py --work-dir DIR setup
    python benchmarks/boxes_vs_peers.py --work-dir DIR fcos
    python benchmarks/boxes_vs_peers.py --work-dir DIR ssdlite
    DIR/peers-venv/bin/python benchmarks/boxes_vs_peers.py --work-dir DIR yolo
    python benchmarks/boxes_vs_peers.py --work-dir DIR ours --model RUN/model
    DIR/peers-venv/bin/python benchmarks/boxes_vs_peers.py --work-dir DIR export
    DIR/peers-venv/bin/python benchmarks/boxes_vs_peers.py --work-dir DIR speed --models RUN/model
    python benchmarks/boxes_vs_peers.py --work-dir DIR report
    python benchmarks/boxes_vs_peers.py --work-dir DIR page
"""

import argparse
import json
import os
from pathlib import Path
from typing import Any

import numpy as np
import torch
from box_page import write_page
from box_peers import (
    CONFIDENCE,
    MAX_DETECTIONS,
    TORCHVISION_PEERS,
    YOLO,
    Found,
    ask_peer,
    ask_yolo,
    category_ids,
    load_peer,
    prepare_yolo,
    resized_size,
    train_peer,
)
from box_speed import YOLO_EXPORTS, ask_openvino_yolo, export_yolo, measure_speed
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
    save_yolo,
    start,
    train_yolo,
)

from vovnet.model_folder import load_config
from vovnet.predict import Predictor
from vovnet.profiling.compare import ratio_interval

SHOWN = ("side", "engine", "precision", "steps", "images_seen", "core_minutes")


def to_results(image_id: int, found: Found) -> list[dict[str, Any]]:
    """Convert what was found in one image to COCO results."""
    return [
        {
            "image_id": image_id,
            "category_id": int(category),
            "score": float(score),
            "bbox": [float(side) for side in (x1, y1, x2 - x1, y2 - y1)],
        }
        for score, (x1, y1, x2, y2), category in zip(*found, strict=True)
    ]


def evaluate_boxes(
    arguments: argparse.Namespace, name: str, predict: Predict, *, outcome: dict[str, Any]
) -> None:
    """Score the boxes of a contestant on the test split."""
    evaluate(
        arguments,
        name,
        predict=predict,
        to_results=to_results,
        iou_type="bbox",
        max_detections=MAX_DETECTIONS,
        outcome={"engine": "torch"} | outcome,
    )


def run_torchvision(arguments: argparse.Namespace) -> None:
    """Train, save and score a detector of torchvision."""
    name, side, work_dir = arguments.verb, arguments.side, arguments.work_dir
    ids = category_ids(arguments.data)
    training = work_dir / f"{name}_training.json"
    if not arguments.evaluate_only:
        peer = TORCHVISION_PEERS[name]
        model = peer.build(len(ids) + 1, side).train()
        budget = Budget(cpu_seconds(arguments), work_dir / f"{name}_log.jsonl")
        outcome = train_peer(peer, model, arguments.data, side=side, budget=budget)
        outcome |= {"side": 320 if name == "ssdlite" else side, "settings": peer.settings}
        torch.save(model.state_dict(), work_dir / f"{name}.pt")
        training.write_text(json.dumps(outcome))
    model = load_peer(name, work_dir, num_classes=len(ids), side=side)
    predict = ask_peer(model, ids, CONFIDENCE)
    evaluate_boxes(arguments, name, predict, outcome=json.loads(training.read_text()))


def cpu_seconds(arguments: argparse.Namespace) -> float:
    """Return the budget: minutes of a machine with 2 cores as processor seconds."""
    return arguments.budget_minutes * 60 * THREADS


def run_yolo(arguments: argparse.Namespace) -> None:
    """Train, save and score YOLO11n; runs in the environment that `setup` makes."""
    work_dir = arguments.work_dir
    quiet_ultralytics(work_dir)
    training = work_dir / "yolo_training.json"
    if not arguments.evaluate_only:
        trainer = prepare_yolo(arguments.data, work_dir, side=arguments.side)
        budget = Budget(cpu_seconds(arguments), work_dir / "yolo_log.jsonl")
        outcome = train_yolo(trainer, budget=budget, mosaic_until=YOLO["mosaic_until"])
        outcome |= {"side": arguments.side, "settings": YOLO}
        save_yolo(trainer, work_dir / "yolo.pt")
        training.write_text(json.dumps(outcome))
    predict = ask_yolo(work_dir, category_ids(arguments.data), CONFIDENCE, side=arguments.side)
    evaluate_boxes(arguments, "yolo", predict, outcome=json.loads(training.read_text()))


def load_ours(model: Path, confidence: float, *, engine: str = "torch") -> tuple[Any, Predict]:
    """Return the predictor of a model folder or exported file, and a function as of the peers."""
    predictor = Predictor.load(
        model,
        engine=engine,
        device="cpu",
        threads=THREADS,
        score_threshold=confidence,
        max_detections=MAX_DETECTIONS,
    )

    def predict(image: np.ndarray) -> Found:
        found = predictor(image)
        return found.scores, found.boxes_xyxy, np.array(predictor.category_ids)[found.labels]

    return predictor, predict


def training_outcome(training: dict[str, Any]) -> dict[str, Any]:
    """Return what a model folder's training spent and saw; an exported file does not say."""
    if "config" not in training:
        return {}
    settings = training["config"]
    return {
        "settings": settings,
        "steps": training["steps"],
        "images_seen": training["steps"] * settings["batch_size"],
        # of wall time, so at least what the processor spent
        "core_minutes": round(training["minutes"] * (settings["threads"] or THREADS), 1),
    }


def run_ours(arguments: argparse.Namespace) -> None:
    """Score a model folder or an exported file; how it was trained is read from its config."""
    config = load_config(arguments.model)
    exported = arguments.model.is_file()
    predictor, predict = load_ours(
        arguments.model, CONFIDENCE, engine="auto" if exported else "torch"
    )
    for info in load_split(arguments.data, "test").imgs.values():
        wanted = resized_size(info, arguments.side)
        found = predictor.preprocess.output_size(info["height"], info["width"])
        if found != wanted:
            raise SystemExit(
                f"{arguments.model}: expected {info['file_name']} resized to {wanted}, as the "
                f"peers see it, got {found}; train with --set preprocess=... or change --side"
            )
    outcome = {
        "ours": True,
        "architecture": config.architecture,
        "side": arguments.side,
        "engine": predictor.engine.name,
        "precision": predictor.engine.precision,
        **training_outcome(config.training),
    }
    own = f"{config.architecture}_{outcome['precision']}" if exported else config.architecture
    evaluate_boxes(arguments, arguments.name or own, predict, outcome=outcome)


def run_export(arguments: argparse.Namespace) -> None:
    """Export YOLO11n to OpenVINO, fp32 and int8, and score both; in `setup`'s environment."""
    work_dir, ids = arguments.work_dir, category_ids(arguments.data)
    export_yolo(work_dir, arguments.data, side=arguments.side)
    outcome = json.loads((work_dir / "yolo_training.json").read_text())
    for precision, path in YOLO_EXPORTS.items():
        predict = ask_openvino_yolo(work_dir / path, ids, CONFIDENCE)
        engine = {"engine": "openvino", "precision": precision}
        evaluate_boxes(arguments, f"yolo_{precision}", predict, outcome=outcome | engine)


def run_speed(arguments: argparse.Namespace) -> None:
    """Time the contestants, files to detections and network alone, by turns; write `speed.json`.

    YOLO11n takes part in the environment that `setup` makes.
    """
    record = measure_speed(arguments) | machine()
    (arguments.work_dir / "speed.json").write_text(json.dumps(record, indent=1))
    print(speed_table(record, arguments.baseline))


def run_report(arguments: argparse.Namespace) -> None:
    """Print the results as Markdown: accuracy with intervals, paired differences, speed."""
    work_dir = arguments.work_dir
    records = [
        json.loads(path.with_name(path.name.replace("_samples.npy", ".json")).read_text())
        for path in sorted(work_dir.glob("*_samples.npy"))
    ]
    records.sort(key=lambda record: -record["ap"])
    print(f"Boxes, test split, at most {MAX_DETECTIONS} detections per image; 95 % intervals.\n")
    print(
        "| | AP | AP50 | AP75 | long side | engine | precision | steps | pictures | core-minutes |"
    )
    print("|" + "---|" * 10)
    for record in records:
        print(accuracy_row(record, SHOWN))
    for ours in records:
        for peer in records:
            if "ours" in ours and "ours" not in peer:
                print(f"\n{difference(work_dir, ours['name'], peer['name'])}, paired.")
    if (work_dir / "speed.json").exists():
        speed = json.loads((work_dir / "speed.json").read_text())
        print("\n" + speed_table(speed, arguments.baseline))


def speed_table(record: dict[str, Any], baseline: str) -> str:
    """Return the speed table; ratios are taken within a round, which keeps them paired."""
    from_files, networks = record["end_to_end_images_per_s"], record["network_images_per_s"]
    base = baseline if baseline in from_files else next(iter(from_files))
    lines = [
        f"{record['images']} pictures, long side {record['side']}, one at a time, "
        f"{record['threads']} threads; median (10 % to 90 %).\n",
        f"| | file to detections, images/s | times {base} | network alone, images/s |",
        "|---|---|---|---|",
    ]
    for name, rates in from_files.items():
        ratio, low, high = ratio_interval(rates, from_files[base])
        cells = [spread(rates), f"{ratio:.2f} ({low:.2f} to {high:.2f})", spread(networks[name])]
        lines.append(f"| {name} | " + " | ".join(cells) + " |")
    names_of: dict[str, list[str]] = {}
    for name, energy in record["energy"].items():
        names_of.setdefault(energy, []).append(name)
    lines += [f"\nEnergy of {', '.join(names)}: {text}" for text, names in names_of.items()]
    return "\n".join(lines)


def spread(rates: list[float]) -> str:
    """Return the median with the range that holds four fifths."""
    low, middle, high = np.percentile(rates, (10, 50, 90))
    return f"{middle:.1f} ({low:.1f} to {high:.1f})"


def run_page(arguments: argparse.Namespace) -> None:
    """Write the page of accuracy against cost, of what has been scored and timed."""
    write_page(arguments.work_dir, f"{arguments.data.name} test")


def run_setup(arguments: argparse.Namespace) -> None:
    """Make the peers' environment: this interpreter's packages, this source, and Ultralytics."""
    make_environment(arguments.work_dir / "peers-venv")


RUNS = {
    "setup": run_setup,
    **dict.fromkeys(TORCHVISION_PEERS, run_torchvision),
    "yolo": run_yolo,
    "ours": run_ours,
    "export": run_export,
    "speed": run_speed,
    "report": run_report,
    "page": run_page,
}


def parse_arguments() -> argparse.Namespace:
    """Parse the command line; the data default to the environment, then to a folder beside us."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    data = Path(os.environ.get("VOVNET_DATA", "../shared/data")) / "bccd"
    parser.add_argument("--data", type=Path, default=data)
    parser.add_argument("--work-dir", type=Path, required=True)
    parser.add_argument("--side", type=int, default=416, help="pixels of the pictures' long side")
    verbs = parser.add_subparsers(dest="verb", required=True)
    parsers = {name: verbs.add_parser(name, help=run.__doc__) for name, run in RUNS.items()}
    for name in (*TORCHVISION_PEERS, "yolo"):
        parsers[name].add_argument("--budget-minutes", type=float, default=20.0)
        parsers[name].add_argument("--evaluate-only", action="store_true")
    parsers["ours"].add_argument("--model", type=Path, required=True)
    parsers["ours"].add_argument(
        "--name", help="default: the architecture, of an export with _PRECISION"
    )
    parsers["speed"].add_argument("--models", type=Path, nargs="*", default=[])
    parsers["speed"].add_argument("--confidence", type=float, default=0.05)
    parsers["speed"].add_argument("--images", type=int, default=8)
    parsers["speed"].add_argument("--rounds", type=int, default=10, help="at least")
    parsers["speed"].add_argument("--seconds", type=float, default=120.0, help="of each table")
    for name in ("speed", "report"):
        parsers[name].add_argument("--baseline", default="yolo openvino int8")
    return parser.parse_args()


def main() -> None:
    """Run one verb with the thread settings that every contestant shares."""
    arguments = parse_arguments()
    start(arguments)
    RUNS[arguments.verb](arguments)


if __name__ == "__main__":
    main()
