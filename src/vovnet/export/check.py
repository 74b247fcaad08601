"""Whether an exported file answers as torch does."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from vovnet.preprocess import Preprocess

Arrays = Mapping[str, NDArray[Any]]
Batch = tuple[NDArray[np.uint8], NDArray[np.int64]]
Run = Callable[[NDArray[np.uint8], NDArray[np.int64]], Arrays]

# Of the largest value that torch gives. Two orders of summation differ by about 1e-6 of it.
TOLERANCE = 1e-3
TOLERANCES = {"boxes": 0.1, "scores": 1e-3, "mask_probs": 1e-2, "mask_scores": 1e-3}
"""Of paired detections: pixels, scores, probabilities of a mask's cell."""


@dataclass(frozen=True, slots=True)
class Comparison:
    """How far a file is from torch: the largest difference of each output, and what is wrong."""

    engine: str
    differences: dict[str, float]
    compared: int  # detections, or pictures of a classifier
    problems: tuple[str, ...]


def compare(engine: str, expected: Run, exported: Run, batches: Sequence[Batch]) -> Comparison:
    """Runs both on every batch. Differences of arrays are shares of their largest value, those of
    detections as they are: pixels, scores, probabilities.
    """
    differences: dict[str, float] = {}
    problems: list[str] = []
    compared = 0
    for images, sizes in batches:
        wanted = expected(images, sizes)
        try:
            found = exported(images, sizes)
        except Exception as error:  # engines have no common one
            problems.append(f"cannot run: {str(error).strip()[-300:]}")
            continue
        if _shapes(wanted) != _shapes(found):
            problems.append(f"outputs: expected {_shapes(wanted)}, found {_shapes(found)}")
            continue
        compared += int(wanted["valid"].sum()) if "valid" in wanted else len(images)
        judge = _compare_detections if "valid" in wanted else _compare_arrays
        for name, difference, problem in judge(wanted, found):
            differences[name] = max(difference, differences.get(name, 0.0))
            problems += [problem] if problem else []
    return Comparison(engine, differences, compared, tuple(problems))


def find_unsound(expected: Run, exported: Run, batches: Sequence[Batch]) -> Iterator[str]:
    """What no rounding explains: outputs of other names or shapes than expected, values that are
    not finite.
    """
    for images, sizes in batches:
        wanted, found = _shapes(expected(images, sizes)), exported(images, sizes)
        if wanted != _shapes(found):
            yield f"outputs: expected {wanted}, found {_shapes(found)}"
        for name, value in found.items():
            if not np.isfinite(value).all():
                yield f"{name}: expected finite values, found others"


def make_batches(preprocess: Preprocess, pictures: Sequence[NDArray[np.uint8]]) -> list[Batch]:
    """Each picture alone, and all in one batch where they have one size or may be padded."""
    resized = [preprocess.resize(picture) for picture in pictures]
    batches = [preprocess.batch([one]) for one in resized]
    same_size = len({one.shape for one in resized}) == 1
    if len(resized) > 1 and (same_size or preprocess.size_divisor > 1):
        batches.append(preprocess.batch(resized))
    return batches


def made_up_pictures() -> list[NDArray[np.uint8]]:
    """Two pictures (H, W, 3) uint8 RGB of odd sizes, light discs on a dark ground."""
    return [_made_up(seed, *size) for seed, size in enumerate(((121, 163), (150, 97)))]


def _made_up(seed: int, height: int, width: int) -> NDArray[np.uint8]:
    random = np.random.default_rng(seed)
    rows, columns = np.mgrid[:height, :width]
    picture = random.normal(40, 8, (height, width, 3))
    for _ in range(12):
        row, column = random.uniform(0, height), random.uniform(0, width)
        radius, colour = random.uniform(4, 20), random.uniform(80, 255, 3)
        picture[(rows - row) ** 2 + (columns - column) ** 2 < radius**2] += colour
    clipped: NDArray[np.uint8] = picture.clip(0, 255).astype(np.uint8)
    return clipped


def _compare_arrays(expected: Arrays, found: Arrays) -> Iterator[tuple[str, float, str]]:
    """Name, largest difference over the largest value, and what is wrong with it."""
    for name, value in expected.items():
        scale = float(np.abs(value).max(initial=0.0)) or 1.0
        difference = float(np.abs(found[name].astype(np.float64) - value).max(initial=0.0)) / scale
        right = difference <= TOLERANCE  # not of NaN
        yield name, difference, "" if right else _too_far(name, difference, TOLERANCE)


def _compare_detections(expected: Arrays, found: Arrays) -> Iterator[tuple[str, float, str]]:
    """Name, largest difference of paired detections, and what is wrong with it.

    Which of two that are equally good comes first is open, and so is the last one of an image where
    the next best was as good.
    """
    rows, partners = _pair(expected, found)
    for name in (key for key in expected if key not in ("labels", "valid")):
        far = np.abs(expected[name][rows].astype(np.float64) - found[name][partners])
        difference, allowed = float(far.max(initial=0.0)), TOLERANCES[name]
        yield name, difference, "" if difference <= allowed else _too_far(name, difference, allowed)
    for one, other, paired in ((expected, found, rows), (found, expected, partners)):
        alone = one["valid"].copy()
        alone[paired] = False
        # Without a partner may be who would have been left out for a rounding error.
        full = other["valid"].all(1)
        least = np.where(full, np.where(other["valid"], other["scores"], np.inf).min(1), 0.0)
        lost = alone & (one["scores"] > least[:, None] + TOLERANCES["scores"])
        text = (
            f"valid: expected the same detections, {int(lost.sum())} have no partner (a network "
            "that has learnt little gives near-equal scores, of which a rounding error decides "
            "what suppresses what: train it longer, or name other pictures by --images)"
        )
        yield "valid", float(lost.sum()), text if lost.any() else ""


def _pair(expected: Arrays, found: Arrays) -> tuple[Any, Any]:
    """Indices (image, row) of detections of the one and of their partners among the other: of the
    same class, as near in box and score as tolerated, each taken once.
    """
    pairs = []
    for image in range(len(expected["valid"])):
        free = set(np.flatnonzero(found["valid"][image]).tolist())
        for row in np.flatnonzero(expected["valid"][image]).tolist():
            near = [one for one in sorted(free) if _is_near(expected, found, image, row, one)]
            if near:
                free.discard(near[0])
                pairs.append((image, row, near[0]))
    images, rows, partners = np.array(pairs, np.int64).reshape(-1, 3).T
    return (images, rows), (images, partners)


def _is_near(expected: Arrays, found: Arrays, image: int, row: int, other: int) -> bool:
    def far(name: str) -> float:
        return float(np.abs(expected[name][image, row] - found[name][image, other]).max())

    same_class = expected["labels"][image, row] == found["labels"][image, other]
    return bool(same_class) and all(far(key) <= TOLERANCES[key] for key in ("boxes", "scores"))


def _too_far(name: str, difference: float, allowed: float) -> str:
    return f"{name}: expected a difference of at most {allowed:g}, found {difference:.3g}"


def _shapes(arrays: Arrays) -> str:
    return ", ".join(f"{name} {value.shape}" for name, value in arrays.items())
