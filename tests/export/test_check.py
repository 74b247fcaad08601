"""A comparison finds what differs, and lets pass what may."""

from collections.abc import Callable

import numpy as np
import pytest

from vovnet.export.check import compare, find_unsound, made_up_pictures, make_batches
from vovnet.preprocess import Preprocess

Arrays = dict[str, np.ndarray]
BATCH = (np.zeros((1, 32, 32, 3), np.uint8), np.array([[32, 32]]))


def detections() -> Arrays:
    """Three of four rows, the second and third equally good."""
    boxes = np.array([[0, 0, 9, 9], [10, 0, 19, 9], [0, 10, 9, 19], [0, 0, 0, 0]], np.float32)
    return {
        "boxes": boxes[None],
        "scores": np.array([[0.9, 0.5, 0.5, 0.0]], np.float32),
        "labels": np.array([[1, 0, 0, 0]]),
        "valid": np.array([[True, True, True, False]]),
        "mask_probs": np.linspace(0, 1, 4 * 28 * 28, dtype=np.float32).reshape(1, 4, 28, 28),
        "mask_scores": np.array([[0.8, 0.4, 0.3, 0.0]], np.float32),
    }


def problems(change: Callable[[Arrays], None]) -> tuple[str, ...]:
    found = detections()
    change(found)
    return compare("x", lambda *_: detections(), lambda *_: found, [BATCH]).problems


def swap(found: Arrays) -> None:
    for value in found.values():
        value[:, [1, 2]] = value[:, [2, 1]]


def nudge(found: Arrays) -> None:
    found["boxes"] += 0.01
    found["scores"] *= 0.9999


@pytest.mark.parametrize("change", [lambda found: None, swap, nudge])
def test_what_may_differ(change: Callable[[Arrays], None]) -> None:
    assert problems(change) == ()


@pytest.mark.parametrize(
    ("key", "row", "value", "message"),
    [
        ("boxes", 0, 3.0, "valid: expected the same detections, 1 have no partner"),
        ("scores", 0, 0.8, "valid: expected the same detections"),
        ("labels", 0, 0, "valid: expected the same detections"),
        ("valid", 0, False, "valid: expected the same detections"),
        ("valid", 3, True, ""),
        ("mask_probs", 1, 0.5, "mask_probs: expected a difference of at most 0.01"),
        ("mask_scores", 1, 0.5, "mask_scores: expected a difference of at most 0.001"),
        ("mask_scores", 1, np.nan, "mask_scores"),
        ("boxes", 1, np.nan, "valid: expected the same detections"),
    ],
)
def test_what_must_not_differ(key: str, row: int, value: float, message: str) -> None:
    def change(found: Arrays) -> None:
        found[key][0, row] = value

    assert any(text.startswith(message) for text in problems(change)) or not message


def test_one_detection_too_many() -> None:
    def change(found: Arrays) -> None:
        found["valid"][0, 3] = True
        found["scores"][0, 3] = 0.4

    (problem,) = problems(change)
    assert problem.startswith("valid: expected the same detections, 1 have no partner")


def test_who_is_cut_off_at_the_limit_is_open() -> None:
    """Where all K rows are taken, the last may be another one that was as good."""

    def full() -> Arrays:
        found = {name: value[:, :3].copy() for name, value in detections().items()}
        found["valid"][:] = True
        return found

    other = full()
    other["boxes"][0, 2] = [20, 20, 29, 29]
    assert compare("x", lambda *_: full(), lambda *_: other, [BATCH]).problems == ()
    other["boxes"][0, 0] = [30, 20, 39, 29]
    assert compare("x", lambda *_: full(), lambda *_: other, [BATCH]).problems != ()


def test_arrays_are_measured_against_their_largest_value() -> None:
    logits = np.array([[1.0, -200.0]], np.float32)

    def run(factor: float) -> tuple[str, ...]:
        done = compare(
            "x", lambda *_: {"logits": logits}, lambda *_: {"logits": logits * factor}, [BATCH]
        )
        assert done.compared == 1
        return done.problems

    assert run(1.0005) == ()
    assert run(1.01) == ("logits: expected a difference of at most 0.001, found 0.01",)
    assert run(np.nan) != ()
    other = compare(
        "x", lambda *_: {"logits": logits}, lambda *_: {"logits": logits[:, :1]}, [BATCH]
    )
    assert other.problems == ("outputs: expected logits (1, 2), found logits (1, 1)",)


def test_pictures_come_alone_and_together() -> None:
    pictures = made_up_pictures()
    assert pictures[0].shape != pictures[1].shape
    assert [len(images) for images, _ in make_batches(Preprocess(), pictures)] == [1, 1, 2]
    open_sizes = Preprocess(size_divisor=1)
    assert [len(images) for images, _ in make_batches(open_sizes, pictures)] == [1, 1]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda found: found.pop("mask_scores"), "outputs: expected boxes (1, 4, 4)"),
        (
            lambda found: found.update(scores=np.zeros((1, 3))),
            "found boxes (1, 4, 4), scores (1, 3",
        ),
        (lambda found: found["scores"].fill(np.nan), "scores: expected finite values"),
        (lambda found: found["boxes"].fill(np.inf), "boxes: expected finite values"),
    ],
)
def test_what_no_rounding_explains(change: Callable[[Arrays], object], message: str) -> None:
    found = detections()
    found["scores"] *= 0.5
    assert list(find_unsound(lambda *_: detections(), lambda *_: found, [BATCH])) == []
    change(found)
    (problem,) = find_unsound(lambda *_: detections(), lambda *_: found, [BATCH])
    assert message in problem
