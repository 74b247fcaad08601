"""Classification of many files: decoded by threads ahead of the network, bad ones passed over."""

import csv
import importlib
import io
import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from vovnet.classify import Classifier
from vovnet.errors import ConfigError
from vovnet.files import atomic_path, atomic_write_json, atomic_write_text
from vovnet.images import printable, read_image
from vovnet.pages import Page, read_ahead

RESULTS, LINES, TABLE = "results.json", "results.jsonl", "predictions.csv"
FEATURE_SUFFIXES = (".npz", ".parquet")
BATCH_SIZES = {"cpu": 8, "cuda": 64}
"""On a CPU larger batches leave its caches, on a GPU smaller ones leave it idle."""
BATCHES_AHEAD = 2


@dataclass(frozen=True, slots=True, eq=False)
class ClassifiedImage:
    """What became of one image.

    page       of its file, counted from 0
    top        the best (class name, probability), best first; empty of a backbone
    embedding  float32 (F,), where it was asked for
    """

    file: Path
    page: int
    top: list[tuple[str, float]]
    embedding: NDArray[np.float32] | None = None

    def to_json(self, image_id: int) -> dict[str, Any]:
        """Plain values: image_id, file, page, and classes with class_name and probability."""
        classes = [
            {"class_name": name, "probability": round(probability, 6)}
            for name, probability in self.top
        ]
        file = printable(self.file)
        return {"image_id": image_id, "file": file, "page": self.page, "classes": classes}


@dataclass(slots=True)
class ClassifyReport:
    """What became of the files of one run."""

    images: list[ClassifiedImage] = field(default_factory=list)
    errors: list[str] = field(default_factory=list)
    interrupted: bool = False


def classify_files(
    classifier: Classifier,
    paths: Sequence[Path],
    output_dir: Path,
    *,
    top: int = 5,
    batch_size: int | None = None,
    features: Path | None = None,
    fast_decode: bool = False,
    on_image: Callable[[ClassifiedImage], None] = lambda image: None,
    on_error: Callable[[str], None] = lambda text: None,
) -> ClassifyReport:
    """The top classes of every page of every file, written to output_dir, in the order of paths.

    results.jsonl holds a line per image with its id, file, page and classes, results.json the same
    as one list, predictions.csv a row per image. features names a .npz or .parquet file for the
    embeddings; a backbone writes that alone. batch_size None takes that of BATCH_SIZES. fast_decode
    reads large JPEGs at a fraction of their size (read_image, min_side). A file that cannot be read
    is reported and passed over. Ctrl-C ends the run after what is done has been written.

    Raises ConfigError on a backbone without features, and where features cannot be written.
    """
    _check_wanted(classifier, features)
    size = batch_size or BATCH_SIZES[classifier.engine.device.partition(":")[0]]
    report = ClassifyReport()

    preprocess = classifier.preprocess
    min_side = preprocess.short_side if fast_decode else None

    def read(path: Path, page: int) -> NDArray[np.uint8]:
        return preprocess.resize(read_image(path, page=page, min_side=min_side))

    def fail(text: str) -> None:
        report.errors.append(text)
        on_error(text)

    prepared = read_ahead(paths, read, ahead=(BATCHES_AHEAD + 1) * size, on_error=fail)
    try:
        while batch := list(islice(prepared, size)):
            done = _classify(classifier, batch, top, keep_embedding=features is not None)
            report.images += done
            for image in done:
                on_image(image)
    except KeyboardInterrupt:
        report.interrupted = True
    finally:
        prepared.close()
        if classifier.class_names:
            _write_predictions(output_dir, report.images)
        if features is not None:
            write_features(features, report.images)
    return report


def write_features(path: Path, images: Sequence[ClassifiedImage]) -> None:
    """Writes the embeddings of images as .npz or .parquet, told by the suffix.

    embedding float32 (N, F), file_name text (N,), page int64 (N,). The file appears whole. Raises
    ConfigError where .parquet is asked for and pyarrow is not installed.
    """
    kept = [image.embedding for image in images if image.embedding is not None]
    embedding = np.stack(kept) if kept else np.zeros((0, 0), np.float32)
    names = [printable(image.file) for image in images]
    pages = np.array([image.page for image in images], dtype=np.int64)
    write = _write_parquet if path.suffix.lower() == ".parquet" else _write_npz
    with atomic_path(path) as temporary:
        write(temporary, embedding, names, pages)


def _check_wanted(classifier: Classifier, features: Path | None) -> None:
    """Raises ConfigError before anything is computed that could not be told or written."""
    if features is None:
        if not classifier.class_names:
            raise ConfigError(
                "model: expected a classifier, found a backbone without classes, whose features "
                "can be written: --features FILE.npz"
            )
        return
    if features.suffix.lower() not in FEATURE_SUFFIXES:
        expected = " or ".join(FEATURE_SUFFIXES)
        raise ConfigError(f"features: expected a file that ends in {expected}, got {features}")
    if not features.parent.is_dir():
        raise ConfigError(f"features: expected an existing folder, got {features.parent}")
    if features.is_dir():
        raise ConfigError(f"features: expected a file, found the folder {features}")
    if features.suffix.lower() == ".parquet":
        _import_parquet()


def _classify(
    classifier: Classifier,
    batch: list[tuple[Page, NDArray[np.uint8]]],
    top: int,
    *,
    keep_embedding: bool,
) -> list[ClassifiedImage]:
    found = classifier.infer([image for _, image in batch])
    best: list[list[tuple[str, float]]] = [[] for _ in batch]
    if classifier.class_names:
        best = [one.top(top) for one in classifier.classifications(found["logits"])]
    return [
        ClassifiedImage(path, page, classes, row if keep_embedding else None)
        for ((path, page), _), classes, row in zip(batch, best, found["embedding"], strict=True)
    ]


def _write_predictions(output_dir: Path, images: Sequence[ClassifiedImage]) -> None:
    entries = [image.to_json(number) for number, image in enumerate(images, start=1)]
    atomic_write_json(output_dir / RESULTS, entries, indent=None)
    atomic_write_text(output_dir / LINES, "".join(f"{json.dumps(entry)}\n" for entry in entries))
    table = io.StringIO()
    writer = csv.writer(table, lineterminator="\n")
    ranks = range(1, 1 + max((len(image.top) for image in images), default=0))
    header = [f"{what}_{rank}" for rank in ranks for what in ("class", "probability")]
    writer.writerow(["file", "page", *header])
    for image in images:
        cells = [cell for name, share in image.top for cell in (name, f"{share:.6f}")]
        writer.writerow([printable(image.file), image.page, *cells])
    atomic_write_text(output_dir / TABLE, table.getvalue())


def _write_npz(
    path: Path, embedding: NDArray[np.float32], names: list[str], pages: NDArray[np.int64]
) -> None:
    with path.open("wb") as stream:
        np.savez(stream, embedding=embedding, file_name=np.array(names, np.str_), page=pages)


def _write_parquet(
    path: Path, embedding: NDArray[np.float32], names: list[str], pages: NDArray[np.int64]
) -> None:
    arrow, parquet = _import_parquet()
    width = max(embedding.shape[1], 1)  # of no image, too
    values = arrow.FixedSizeListArray.from_arrays(arrow.array(embedding.reshape(-1)), width)
    table = arrow.table({"file_name": names, "page": pages, "embedding": values})
    parquet.write_table(table, path)


def _import_parquet() -> tuple[Any, Any]:
    try:
        return importlib.import_module("pyarrow"), importlib.import_module("pyarrow.parquet")
    except ImportError:
        raise ConfigError(
            "features: expected the package pyarrow for .parquet, which the extra `parquet` "
            "brings: pip install 'vovnet[parquet]'; .npz needs nothing"
        ) from None
