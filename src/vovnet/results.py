"""What a prediction is: numpy arrays that are checked once, when they are made."""

import importlib
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
from numpy.typing import NDArray
from pycocotools import mask as coco_mask


@dataclass(frozen=True, slots=True, eq=False)
class MaskCrop:
    """One object's mask, kept as the part of the image that holds it.

    x, y      column and row of the crop's top left pixel in the image, at least 0
    pixels    bool (h, w), True on the object; may be empty

    Raises ValueError on another dtype or shape and on a negative corner.
    """

    x: int
    y: int
    pixels: NDArray[np.bool_]

    def __post_init__(self) -> None:
        if self.pixels.dtype != np.bool_ or self.pixels.ndim != 2:
            raise ValueError(
                "MaskCrop.pixels: expected bool of shape (h, w), "
                f"got {self.pixels.dtype} of {self.pixels.shape}"
            )
        if self.x < 0 or self.y < 0:
            raise ValueError(f"MaskCrop: expected x and y of at least 0, got {self.x}, {self.y}")


@dataclass(frozen=True, slots=True, eq=False)
class Detections:
    """The objects found in one image, best first where a predictor made them.

    boxes_xyxy     float32 (N, 4), left, top, right, bottom in image pixels, left <= right,
                   top <= bottom
    scores         float32 (N,), 0..1
    labels         int64 (N,), index into class_names
    image_size     (height, width) in pixels
    class_names    the names of all classes, not only of those found
    masks          N crops inside the image, or None from a model without masks
    mask_scores    float32 (N,), 0..1: score x predicted mask IoU, from models that predict it;
                   ranks the masks where `scores` ranks the boxes

    Raises ValueError, with what was expected and what came, when any of this does not hold.
    """

    boxes_xyxy: NDArray[np.float32]
    scores: NDArray[np.float32]
    labels: NDArray[np.int64]
    image_size: tuple[int, int]
    class_names: tuple[str, ...]
    masks: tuple[MaskCrop, ...] | None = None
    mask_scores: NDArray[np.float32] | None = None

    def __post_init__(self) -> None:
        count = len(self.scores)
        _check_array("boxes_xyxy", self.boxes_xyxy, np.float32, (count, 4))
        _check_array("scores", self.scores, np.float32, (count,))
        _check_array("labels", self.labels, np.int64, (count,))
        _check_image_size(self.image_size)
        _check_range("scores", self.scores, 0, 1)
        _check_range("labels", self.labels, 0, len(self.class_names) - 1)
        _check_boxes(self.boxes_xyxy)
        if self.masks is not None:
            _check_masks(self.masks, count, self.image_size)
        if self.mask_scores is not None:
            _check_array("mask_scores", self.mask_scores, np.float32, (count,))
            _check_range("mask_scores", self.mask_scores, 0, 1)

    def __len__(self) -> int:
        """Return the number of objects."""
        return len(self.scores)

    def __getitem__(
        self, index: int | slice | Sequence[int] | Sequence[bool] | NDArray[Any]
    ) -> "Detections":
        """Return the objects that a bool mask (N,), whole numbers (M,), a slice or one number mean.

        Always a `Detections`, of one object for one number. Raises IndexError outside the range.
        """
        chosen = _positions(index, len(self))
        return Detections(
            boxes_xyxy=self.boxes_xyxy[chosen],
            scores=self.scores[chosen],
            labels=self.labels[chosen],
            image_size=self.image_size,
            class_names=self.class_names,
            masks=None if self.masks is None else tuple(self.masks[i] for i in chosen),
            mask_scores=None if self.mask_scores is None else self.mask_scores[chosen],
        )

    def moved(self, x: int, y: int, image_size: tuple[int, int]) -> "Detections":
        """Return the same objects in a larger image (height, width) that holds this one at x, y.

        Raises ValueError when a mask would not lie inside that image.
        """
        offset = np.array([x, y, x, y], dtype=np.float32)
        return replace(
            self,
            boxes_xyxy=self.boxes_xyxy + offset,
            image_size=image_size,
            masks=None
            if self.masks is None
            else tuple(replace(crop, x=crop.x + x, y=crop.y + y) for crop in self.masks),
        )

    @classmethod
    def empty(
        cls,
        image_size: tuple[int, int],
        class_names: tuple[str, ...],
        *,
        with_masks: bool = False,
    ) -> "Detections":
        """Return the result of an image, of (height, width) pixels, in which nothing was found."""
        return cls(
            boxes_xyxy=np.zeros((0, 4), dtype=np.float32),
            scores=np.zeros(0, dtype=np.float32),
            labels=np.zeros(0, dtype=np.int64),
            image_size=image_size,
            class_names=class_names,
            masks=() if with_masks else None,
        )

    @classmethod
    def concatenate(cls, parts: Sequence["Detections"]) -> "Detections":
        """Return the objects of several results of one image, in order.

        Raises ValueError on no part and on parts that differ in image size, class names or in
        whether they have masks and mask scores.
        """
        if not parts:
            raise ValueError("parts: expected at least one, got none")
        first = parts[0]
        for index, part in enumerate(parts):
            _check_same_kind(first, part, f"parts[{index}]")
        masks = tuple(crop for part in parts for crop in part.masks or ())
        return cls(
            boxes_xyxy=np.concatenate([part.boxes_xyxy for part in parts]),
            scores=np.concatenate([part.scores for part in parts]),
            labels=np.concatenate([part.labels for part in parts]),
            image_size=first.image_size,
            class_names=first.class_names,
            masks=None if first.masks is None else masks,
            mask_scores=None
            if first.mask_scores is None
            else np.concatenate(
                [part.mask_scores for part in parts if part.mask_scores is not None]
            ),
        )

    def dense_masks(self) -> NDArray[np.bool_]:
        """Return the masks as bool (N, H, W), which is large; raises ValueError without masks."""
        if self.masks is None:
            raise ValueError("dense_masks: expected detections with masks, got masks=None")
        dense = np.zeros((len(self), *self.image_size), dtype=np.bool_)
        for canvas, crop in zip(dense, self.masks, strict=True):
            height, width = crop.pixels.shape
            canvas[crop.y : crop.y + height, crop.x : crop.x + width] = crop.pixels
        return dense

    def segmentations(self) -> list[dict[str, Any]] | None:
        """Return the COCO compressed RLE of each mask, of the whole image; None without masks."""
        return None if self.masks is None else encode_masks(self.masks, self.image_size)

    def to_coco(
        self,
        image_id: int,
        category_ids: Sequence[int],
        segmentations: Sequence[dict[str, Any]] | None = None,
    ) -> list[dict[str, Any]]:
        """Return one COCO result per object, with the category id of each label.

        bbox is [left, top, width, height] in pixels; segmentation, where there are masks, a
        compressed RLE with str counts; mask_score, beside COCO's keys, ranks the masks where the
        model predicts it. Who has the segmentations gives them, or they are made anew. Raises
        ValueError unless there is one id per class name.
        """
        if len(category_ids) != len(self.class_names):
            raise ValueError(
                f"category_ids: expected {len(self.class_names)}, one per class, "
                f"got {len(category_ids)}"
            )
        boxes_xywh = self.boxes_xyxy.astype(np.float64)  # (N, 4)
        boxes_xywh[:, 2:] -= boxes_xywh[:, :2]
        results: list[dict[str, Any]] = [
            {
                "image_id": int(image_id),
                "category_id": int(category_ids[label]),
                "bbox": box,
                "score": score,
            }
            for box, score, label in zip(
                boxes_xywh.tolist(), self.scores.tolist(), self.labels.tolist(), strict=True
            )
        ]
        encoded = self.segmentations() if segmentations is None else segmentations
        if encoded is not None:
            for result, segmentation in zip(results, encoded, strict=True):
                result["segmentation"] = segmentation
        if self.mask_scores is not None:
            for result, mask_score in zip(results, self.mask_scores.tolist(), strict=True):
                result["mask_score"] = mask_score
        return results

    def to_json(self, segmentations: Sequence[dict[str, Any]] | None = None) -> dict[str, Any]:
        """Return plain JSON values: image_size, class_names and a list of detections.

        Each has box_xyxy (pixels, to a thousandth), score (to a millionth), label, class_name and,
        where there are masks, mask: a COCO compressed RLE of the whole image. Who has the
        segmentations gives them, or they are made anew.
        """
        detections: list[dict[str, Any]] = [
            {
                "box_xyxy": [round(side, 3) for side in box],
                "score": round(score, 6),
                "label": label,
                "class_name": self.class_names[label],
            }
            for box, score, label in zip(
                self.boxes_xyxy.tolist(), self.scores.tolist(), self.labels.tolist(), strict=True
            )
        ]
        encoded = self.segmentations() if segmentations is None else segmentations
        if encoded is not None:
            for detection, mask in zip(detections, encoded, strict=True):
                detection["mask"] = mask
        return {
            "image_size": [int(side) for side in self.image_size],
            "class_names": list(self.class_names),
            "detections": detections,
        }

    def to_supervision(self) -> Any:
        """Return a `supervision.Detections`, with dense masks and data["class_name"].

        Raises ImportError when supervision is not installed.
        """
        try:
            supervision = importlib.import_module("supervision")
        except ImportError as error:
            raise ImportError(
                "to_supervision: expected the package supervision, which the extra `vision` "
                "brings: pip install 'vovnet[vision]'"
            ) from error
        names = np.array(self.class_names, dtype=np.str_)
        return supervision.Detections(
            xyxy=self.boxes_xyxy.copy(),
            mask=None if self.masks is None else self.dense_masks(),
            confidence=self.scores.copy(),
            class_id=self.labels.copy(),
            data={"class_name": names[self.labels]},
        )


@dataclass(frozen=True, slots=True, eq=False)
class Classification:
    """The class probabilities of one image.

    probabilities    float32 (C,), 0..1
    class_names      C names

    Raises ValueError, with what was expected and what came, when any of this does not hold.
    """

    probabilities: NDArray[np.float32]
    class_names: tuple[str, ...]

    def __post_init__(self) -> None:
        shape = (len(self.class_names),)
        _check_array("probabilities", self.probabilities, np.float32, shape)
        _check_range("probabilities", self.probabilities, 0, 1)

    def top(self, k: int) -> list[tuple[str, float]]:
        """Return the k best (class name, probability), best first, equals in class order.

        All classes where there are fewer than k. Raises ValueError when k is below 1.
        """
        if k < 1:
            raise ValueError(f"k: expected at least 1, got {k}")
        order = np.argsort(-self.probabilities, kind="stable")[:k]
        return [(self.class_names[i], float(self.probabilities[i])) for i in order]


def encode_masks(masks: Sequence[MaskCrop], image_size: tuple[int, int]) -> list[dict[str, Any]]:
    """Return the COCO compressed RLE of each crop, as a mask of the whole (height, width) image.

    Equal to `pycocotools.mask.encode` of the dense mask, with str counts, without making it.
    """
    height, width = (int(side) for side in image_size)
    if not masks:
        return []
    runs = [
        {"size": [height, width], "counts": _run_lengths(crop, height, width)} for crop in masks
    ]
    encoded = coco_mask.frPyObjects(runs, height, width)
    return [{"size": rle["size"], "counts": rle["counts"].decode("ascii")} for rle in encoded]


def _run_lengths(crop: MaskCrop, height: int, width: int) -> NDArray[np.int64]:
    """Return the lengths of the runs of 0, 1, 0, ... down the columns of the whole image."""
    rows, columns = crop.pixels.shape
    # A zero before each column and at the end parts the columns; then a change is a start or end.
    padded = np.zeros(columns * (rows + 1) + 1, dtype=np.bool_)
    padded[:-1].reshape(columns, rows + 1)[:, 1:] = crop.pixels.T
    changes = np.flatnonzero(padded[1:] != padded[:-1])
    column, row = changes // (rows + 1), changes % (rows + 1)
    edges = (crop.x + column) * height + crop.y + row  # start, end, start, end, ...
    if rows == height:
        # Runs that go on at the top of the next column are one.
        joined = np.flatnonzero(edges[1:-1:2] == edges[2::2])
        edges = np.delete(edges, np.concatenate([2 * joined + 1, 2 * joined + 2]))
    bounds = np.concatenate(([0], edges, [height * width]))
    lengths = bounds[1:] - bounds[:-1]
    ends_on_object = len(lengths) > 1 and lengths[-1] == 0
    return lengths[:-1] if ends_on_object else lengths


def _positions(index: object, count: int) -> NDArray[np.int64]:
    if isinstance(index, slice):
        return np.arange(count)[index]
    chosen = np.asarray(index)
    if chosen.size == 0 and chosen.dtype != np.bool_:
        chosen = chosen.astype(np.int64)
    if chosen.ndim > 1 or chosen.dtype.kind not in "biu":
        raise IndexError(
            "Detections[...]: expected a slice, a bool mask or whole numbers, "
            f"got {chosen.dtype} of shape {chosen.shape}"
        )
    return np.atleast_1d(np.arange(count)[chosen])


def _check_array(
    name: str, array: NDArray[Any], dtype: type[np.generic], shape: tuple[int, ...]
) -> None:
    if array.dtype != dtype or array.shape != shape:
        raise ValueError(
            f"{name}: expected {np.dtype(dtype)} of shape {shape}, "
            f"got {array.dtype} of {array.shape}"
        )


def _check_range(name: str, values: NDArray[Any], low: int, high: int) -> None:
    wrong = np.flatnonzero(~((values >= low) & (values <= high)))  # NaN is wrong, too
    if wrong.size:
        raise ValueError(
            f"{name}: expected {low} to {high}, got {values[wrong[0]]} at index {wrong[0]}"
        )


def _check_image_size(image_size: tuple[int, int]) -> None:
    if len(image_size) != 2 or min(image_size) < 1:
        raise ValueError(f"image_size: expected (height, width) of at least 1, got {image_size}")


def _check_boxes(boxes_xyxy: NDArray[np.float32]) -> None:
    ordered = (boxes_xyxy[:, :2] <= boxes_xyxy[:, 2:]).all(axis=1)
    wrong = np.flatnonzero(~(ordered & np.isfinite(boxes_xyxy).all(axis=1)))
    if wrong.size:
        raise ValueError(
            "boxes_xyxy: expected finite left <= right and top <= bottom, "
            f"got {boxes_xyxy[wrong[0]].tolist()} at index {wrong[0]}"
        )


def _check_masks(masks: tuple[MaskCrop, ...], count: int, image_size: tuple[int, int]) -> None:
    if len(masks) != count:
        raise ValueError(f"masks: expected {count}, one per box, got {len(masks)}")
    height, width = image_size
    for index, crop in enumerate(masks):
        rows, columns = crop.pixels.shape
        if crop.x + columns > width or crop.y + rows > height:
            raise ValueError(
                f"masks: expected crops inside the image of {height} x {width}, got "
                f"{rows} x {columns} at row {crop.y}, column {crop.x} at index {index}"
            )


def _check_same_kind(first: Detections, part: Detections, where: str) -> None:
    def kind(value: Detections) -> tuple[object, ...]:
        return (
            tuple(value.image_size),
            tuple(value.class_names),
            value.masks is not None,
            value.mask_scores is not None,
        )

    if kind(first) != kind(part):
        raise ValueError(
            f"{where}: expected (image_size, class_names, has masks, has mask scores) "
            f"{kind(first)}, got {kind(part)}"
        )
