"""How good a classifier is: accuracy, calibration, and each class for itself."""

import math
import re
from collections import Counter, deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

from vovnet.data.classes import WHOLE_FILE, ClassData, load_classes
from vovnet.errors import ConfigError, DataError, ImageError
from vovnet.published import imagenet_class_names

Interval = tuple[float, float]
Pixels = NDArray[np.uint8]

CALIBRATION_BINS = 15
_ROWS_AT_ONCE = 4096
_BATCHES_AHEAD = 2
_SYNSET = re.compile(r"n\d{8}")


@dataclass(frozen=True, slots=True)
class ClassFigures:
    """One class: `count` images; figures 0..1, nan where there is nothing to divide by."""

    name: str
    count: int
    recall: float
    precision: float
    f1: float


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class ClassMetrics:
    """Figures of a classifier over the images of a data set; all but log_loss 0..1.

    top1, top5         share of images whose class is the best one, or among the best five; top5
                       nan where there are five classes or fewer
    top1_interval      the central 95 % over resampled images, None where not asked for
    ece                expected calibration error over 15 equal bins of the confidence
    log_loss           mean of -ln(probability of the true class)
    balanced_accuracy  mean recall of the classes that have images
    confusion          int64 (C, C), images by true class (rows) and given class (columns)
    """

    top1: float
    top5: float
    top1_interval: Interval | None
    ece: float
    log_loss: float
    balanced_accuracy: float
    confusion: NDArray[np.int64]
    per_class: tuple[ClassFigures, ...]
    class_names: tuple[str, ...]
    num_images: int
    num_resamples: int = 0

    def main(self) -> float:
        """Top-1 accuracy, by which models are chosen."""
        return self.top1

    def to_dict(self, *, with_confusion: bool = False) -> dict[str, Any]:
        """Plain JSON types, with null for what does not exist.

        The confusion matrix has a number for each pair of classes, and is left out unless asked
        for.
        """
        names = ("top1", "top5", "ece", "log_loss", "balanced_accuracy")
        result: dict[str, Any] = {name: _plain(getattr(self, name)) for name in names}
        result |= {
            "top1_interval": None if self.top1_interval is None else list(self.top1_interval),
            "num_images": self.num_images,
            "num_resamples": self.num_resamples,
            # Not by name: ImageNet has two classes that are called crane.
            "per_class": [
                {
                    "name": entry.name,
                    "count": entry.count,
                    "recall": _plain(entry.recall),
                    "precision": _plain(entry.precision),
                    "f1": _plain(entry.f1),
                }
                for entry in self.per_class
            ],
        }
        return result | ({"confusion": self.confusion.tolist()} if with_confusion else {})

    def format(self) -> str:
        """The figures of all classes together, under a line on what they were measured on."""
        present = sum(entry.count > 0 for entry in self.per_class)
        missing = "" if present == len(self.per_class) else f" ({present} of them with images)"
        lines = [
            f"{self.num_images} images, {len(self.class_names)} classes{missing}",
            f"top-1 {_show(self.top1, self.top1_interval)}  top-5 {_show(self.top5)}  "
            f"balanced accuracy {_show(self.balanced_accuracy)}",
            f"calibration error {_show(self.ece)} ({CALIBRATION_BINS} bins)  "
            f"log loss {_show(self.log_loss)} (nats)",
        ]
        if self.top1_interval is not None:
            lines.append(f"[low-high]: 95 % of {self.num_resamples} resamples of the images")
        return "\n".join(lines)


def evaluate_classes(
    logits: NDArray[np.floating[Any]],
    labels: NDArray[np.integer[Any]],
    class_names: Sequence[str],
    *,
    bootstrap: int = 0,
    seed: int = 0,
) -> ClassMetrics:
    """Figures of logits (N, C) against the true classes (N,), which are indices of class_names.

    Of equal logits the class that stands first goes before the others, as in
    `Classification.top`. `bootstrap` is the number of resamples of the images behind the interval.
    Raises ValueError on other shapes, on no image, on a label outside 0..C-1, and on logits that
    are not finite.
    """
    count = len(class_names)
    _check(logits, labels, count, bootstrap)
    rank, given, confidence, loss = _judge_images(logits, labels)
    top1 = float(np.mean(rank == 0))
    confusion = np.bincount(labels * count + given, minlength=count * count).reshape(count, count)
    per_class = _class_figures(confusion, class_names)
    return ClassMetrics(
        top1=top1,
        top5=float(np.mean(rank < 5)) if count > 5 else math.nan,
        top1_interval=_interval(top1, len(labels), bootstrap, seed) if bootstrap else None,
        ece=calibration_error(confidence, rank == 0),
        log_loss=float(loss.mean()),
        balanced_accuracy=float(np.mean([entry.recall for entry in per_class if entry.count])),
        confusion=confusion,
        per_class=per_class,
        class_names=tuple(class_names),
        num_images=len(labels),
        num_resamples=bootstrap,
    )


def calibration_error(confidence: NDArray[np.float64], right: NDArray[np.bool_]) -> float:
    """Expected calibration error of N answers by their confidence, 0..1.

    Each bin holds what lies above its lower end, up to and with its upper end; the gaps between
    mean confidence and accuracy are weighted by the images of the bin (Guo et al. 2017, eq. 3).
    """
    ends = np.arange(1, CALIBRATION_BINS + 1) / CALIBRATION_BINS
    place = np.searchsorted(ends[:-1], confidence, side="left")  # (N,)
    gaps = np.bincount(place, weights=confidence - right, minlength=CALIBRATION_BINS)
    return float(np.abs(gaps).sum() / len(confidence))


def load_known_classes(data_dir: Path, split: str, class_names: tuple[str, ...]) -> ClassData:
    """A split as `load_classes` finds it, with labels that are indices of a model's class_names.

    Classes are told by name, and not all need be there. Where the model knows none of the names,
    numbers in shards without names count as the model's own, and so does the order of ImageNet's
    1000 folders n01440764 to n15075141.
    Raises ConfigError, with the first differences, on a class that is not the model's, and
    DataError as `load_classes` does.
    """
    try:
        data = load_classes(data_dir, split)
    except DataError:
        # One class is none to train on, but may be one to look at.
        return load_classes(data_dir, split, class_names=class_names)
    number_of = _numbers(data, class_names)
    unknown = [name for name in data.class_names if name not in number_of]
    if unknown:
        raise ConfigError(
            f"{data_dir}: expected only classes of the model, each by a name of its own "
            f"({_first(class_names)}); found {len(unknown)} others ({_first(unknown)})"
        )
    table = np.array([number_of[name] for name in data.class_names], dtype=np.int64)
    return replace(data, labels=table[data.labels], class_names=class_names)


def _numbers(data: ClassData, class_names: tuple[str, ...]) -> dict[str, int]:
    """The model's index of each class name that the data may have."""
    found, count = data.class_names, len(data.class_names)
    ordered = {name: number for number, name in enumerate(found)}
    in_shards = not np.any(data.sizes == WHOLE_FILE) and set(found).isdisjoint(class_names)
    if in_shards and count <= len(class_names) and found == tuple(map(str, range(count))):
        return ordered
    synsets = count == len(class_names) == 1000 and all(map(_SYNSET.fullmatch, found))
    if synsets and class_names == imagenet_class_names():
        return ordered
    times = Counter(class_names)
    return {name: number for number, name in enumerate(class_names) if times[name] == 1}


def _first(names: Sequence[str]) -> str:
    return ", ".join(map(repr, names[:5])) + (", ..." if len(names) > 5 else "")


class ClassifierParts(Protocol):
    """What `predict_logits` needs of a Classifier."""

    @property
    def engine(self) -> Any:
        """infer(images, sizes) gives a dict with logits (B, C)."""

    @property
    def preprocess(self) -> Any:
        """Its resize and batch prepare the images."""

    @property
    def class_names(self) -> tuple[str, ...]:
        """C names."""


def predict_logits(
    classifier: ClassifierParts,
    data: ClassData,
    *,
    batch_size: int = 32,
    threads: int = 2,
    on_bad: Callable[[int, str], None] | None = None,
    on_batch: Callable[[int], None] = lambda images: None,
) -> NDArray[np.float32]:
    """Logits (N, C) of every picture; `threads` decode while the network computes.

    A picture that cannot be read raises ImageError, or with `on_bad` is left out of the rows, after
    a call with its index and the reason. `on_batch` is called with the number of images done so
    far. Raises ConfigError where a logit is not finite, as an overflow of a half precision makes
    them.
    """
    rows: list[NDArray[np.float32]] = []
    done = 0
    prepare = partial(_prepare, classifier.preprocess, data)
    batches = [
        range(start, min(start + batch_size, len(data)))
        for start in range(0, len(data), batch_size)
    ]
    for batch, futures in _ahead(prepare, batches, threads):
        images = _readable(batch, futures, on_bad)
        if images:
            answer = classifier.engine.infer(*classifier.preprocess.batch(list(images.values())))
            logits = np.asarray(answer["logits"], dtype=np.float32)
            _check_finite(logits, list(images), data)
            rows.append(logits)
        done += len(batch)
        on_batch(done)
    return np.concatenate(rows) if rows else np.zeros((0, len(classifier.class_names)), np.float32)


def _prepare(preprocess: Any, data: ClassData, index: int) -> Pixels:
    resized: Pixels = preprocess.resize(data.read(index))
    return resized


def _ahead(
    prepare: Callable[[int], Pixels], batches: Sequence[range], threads: int
) -> Iterator[tuple[range, list[Future[Pixels]]]]:
    """Batches in order, with the pictures of the next ones on their way; never more than those."""
    pool = ThreadPoolExecutor(threads)
    waiting: deque[tuple[range, list[Future[Pixels]]]] = deque()
    try:
        for batch in batches:
            waiting.append((batch, [pool.submit(prepare, index) for index in batch]))
            if len(waiting) > _BATCHES_AHEAD:
                yield waiting.popleft()
        while waiting:
            yield waiting.popleft()
    finally:
        pool.shutdown(cancel_futures=True)


def _readable(
    batch: range, futures: Sequence[Future[Pixels]], on_bad: Callable[[int, str], None] | None
) -> Mapping[int, Pixels]:
    images = {}
    for index, future in zip(batch, futures, strict=True):
        try:
            images[index] = future.result()
        except ImageError as error:
            if on_bad is None:
                raise
            on_bad(index, str(error))
    return images


def _check_finite(logits: NDArray[np.float32], indices: Sequence[int], data: ClassData) -> None:
    bad = np.flatnonzero(~np.isfinite(logits).all(axis=1))
    if len(bad):
        raise ConfigError(
            f"{data.name(indices[bad[0]])}: expected finite logits of the network, got "
            f"{logits[bad[0]].tolist()[:5]}; does its precision hold them?"
        )


def _check(
    logits: NDArray[np.floating[Any]], labels: NDArray[np.integer[Any]], count: int, bootstrap: int
) -> None:
    if logits.ndim != 2 or logits.shape != (len(labels), count) or not len(labels):
        raise ValueError(
            f"logits: expected at least one row for each of {len(labels)} labels and a column for "
            f"each of {count} classes, got the shape {logits.shape}"
        )
    if not np.issubdtype(labels.dtype, np.integer) or labels.min() < 0 or labels.max() >= count:
        raise ValueError(
            f"labels: expected whole numbers in 0..{count - 1}, got {labels.dtype} in "
            f"{labels.min()}..{labels.max()}"
        )
    bad = np.flatnonzero(~np.isfinite(logits).all(axis=1))
    if len(bad):
        raise ValueError(f"logits: expected finite numbers, got others in row {bad[0]}")
    if bootstrap < 0:
        raise ValueError(f"bootstrap: expected at least 0, got {bootstrap}")


def _judge_images(
    logits: NDArray[np.floating[Any]], labels: NDArray[np.integer[Any]]
) -> tuple[NDArray[np.int64], NDArray[np.int64], NDArray[np.float64], NDArray[np.float64]]:
    """Of each image the rank of its class from 0, the class given, its probability, the loss."""
    parts = []
    for start in range(0, len(labels), _ROWS_AT_ONCE):
        rows = logits[start : start + _ROWS_AT_ONCE].astype(np.float64)
        true = labels[start : start + _ROWS_AT_ONCE, None]  # (n, 1)
        own = np.take_along_axis(rows, true, axis=1)
        before = np.arange(rows.shape[1]) < true
        rank = ((rows > own) | ((rows == own) & before)).sum(axis=1)
        best = rows.max(axis=1)
        log_sum = np.log(np.exp(rows - best[:, None]).sum(axis=1)) + best
        parts.append((rank, rows.argmax(axis=1), np.exp(best - log_sum), log_sum - own[:, 0]))
    rank, given, confidence, loss = (np.concatenate(column) for column in zip(*parts, strict=True))
    return rank, given, confidence, loss


def _class_figures(
    confusion: NDArray[np.int64], class_names: Sequence[str]
) -> tuple[ClassFigures, ...]:
    right, count, given = confusion.diagonal(), confusion.sum(axis=1), confusion.sum(axis=0)
    return tuple(
        ClassFigures(
            name=name,
            count=int(count[label]),
            recall=_share(right[label], count[label]),
            precision=_share(right[label], given[label]),
            f1=_share(2 * right[label], count[label] + given[label]),
        )
        for label, name in enumerate(class_names)
    )


def _share(part: int, whole: int) -> float:
    return float(part / whole) if whole else math.nan


def _interval(top1: float, num_images: int, resamples: int, seed: int) -> Interval:
    # Among N images drawn with replacement the number of right ones is binomial, so that drawing
    # that number is the same as drawing the images.
    right = np.random.default_rng(seed).binomial(num_images, top1, size=resamples)
    low, high = np.quantile(right / num_images, [0.025, 0.975])
    return float(low), float(high)


def _plain(value: float) -> float | None:
    return None if math.isnan(value) else value


def _show(value: float, interval: Interval | None = None) -> str:
    around = "" if interval is None else f" [{interval[0]:.3f}-{interval[1]:.3f}]"
    return "n/a" if math.isnan(value) else f"{value:.3f}{around}"
