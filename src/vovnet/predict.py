"""From a picture or a path to detections: the same steps that training's evaluation runs."""

from collections.abc import Mapping, Sequence
from itertools import product
from pathlib import Path
from typing import Any, Self, overload

import numpy as np
from numpy.typing import NDArray

from vovnet.errors import ConfigError
from vovnet.images import read_image
from vovnet.model_folder import load_config, resolve_model
from vovnet.preprocess import Preprocess
from vovnet.results import Detections, MaskCrop
from vovnet.runtime.engine import Engine, load_engine

Pixels = NDArray[np.uint8]
ScoreThreshold = float | Mapping[str, float]


class Predictor:
    """A detector with its preprocess and class names.

    score_threshold hides detections below it: one number, or one per class name; classes not named
    show everything, and with `load` keep the threshold of the model.
    """

    def __init__(
        self,
        engine: Engine,
        preprocess: Preprocess,
        class_names: tuple[str, ...],
        *,
        category_ids: tuple[int, ...] | None = None,
        score_threshold: ScoreThreshold | None = None,
    ) -> None:
        self.engine = engine
        self.preprocess = preprocess
        self.class_names = class_names
        self.category_ids = category_ids or tuple(range(1, len(class_names) + 1))
        self.thresholds = _class_thresholds(score_threshold, class_names)  # (C,)

    @classmethod
    def load(
        cls,
        folder_or_name: str | Path,
        *,
        engine: str = "auto",
        precision: str = "auto",
        device: str = "auto",
        threads: int | None = None,
        mode: str = "latency",
        score_threshold: ScoreThreshold | None = None,
        max_detections: int | None = None,
    ) -> Self:
        """A predictor from a model folder or a bundled model's name.

        engine, precision, device, threads and mode are those of load_engine. score_threshold None
        takes the model's own, chosen on its validation split. Raises ConfigError where the folder
        is not complete and right.
        """
        folder = resolve_model(folder_or_name)
        config = load_config(folder)
        if config.task == "classify":
            raise ConfigError(f"{folder}: expected a detector or segmenter, found a classifier")
        shown = config.score_threshold if score_threshold is None else score_threshold
        if isinstance(shown, Mapping):
            shown = dict.fromkeys(config.class_names, config.score_threshold or 0.0) | dict(shown)
        thresholds = _class_thresholds(shown, tuple(config.class_names))
        # What is not shown needs no mask; below it, nothing changes what is above.
        settings: dict[str, object] = {"min_score": float(thresholds.min())}
        if max_detections is not None:
            settings["max_detections"] = max_detections
        return cls(
            load_engine(
                folder,
                engine=engine,
                precision=precision,
                device=device,
                threads=threads,
                settings=settings,
                mode=mode,
            ),
            Preprocess.from_dict(config.preprocess),
            tuple(config.class_names),
            category_ids=tuple(config.category_ids),
            score_threshold=shown,
        )

    @overload
    def __call__(  # type: ignore[overload-overlap]  # a str is a Sequence of str
        self, source: Pixels | str | Path
    ) -> Detections: ...
    @overload
    def __call__(self, source: Sequence[Pixels | str | Path]) -> list[Detections]: ...
    def __call__(
        self, source: Pixels | str | Path | Sequence[Pixels | str | Path]
    ) -> Detections | list[Detections]:
        """Detections of a picture (H, W, 3) uint8 RGB or of a file; a list in gives a list out.

        Raises ImageError on a file that cannot be read.
        """
        if isinstance(source, Sequence) and not isinstance(source, str):
            return [self(one) for one in source]
        image = source if isinstance(source, np.ndarray) else read_image(Path(source))
        resized = self.preprocess.resize(image)
        raw = self.engine.infer(*self.preprocess.batch([resized]))
        return self.postprocess(raw, 0, image_size=image.shape[:2], resized_size=resized.shape[:2])

    def postprocess(
        self,
        raw: Mapping[str, NDArray[Any]],
        index: int,
        *,
        image_size: tuple[int, ...],
        resized_size: tuple[int, ...],
    ) -> Detections:
        """Row `index` of the engine's results as detections in pixels of the original picture.

        Sizes are (height, width). Boxes are clipped to the picture; empty ones are dropped.
        """
        height, width = int(image_size[0]), int(image_size[1])
        factor = np.array([width / resized_size[1], height / resized_size[0]] * 2, np.float32)
        boxes = raw["boxes"][index].astype(np.float32) * factor
        clipped = boxes.clip(0, np.array([width, height] * 2, np.float32))
        labels = raw["labels"][index]
        shown = (
            raw["valid"][index]
            & (raw["scores"][index] >= self.thresholds[labels])
            & (clipped[:, 2] > clipped[:, 0])
            & (clipped[:, 3] > clipped[:, 1])
        )
        masks = mask_scores = None
        if "mask_probs" in raw:
            masks = tuple(
                paste_mask(probabilities, box, height, width)
                for probabilities, box in zip(
                    raw["mask_probs"][index][shown], boxes[shown], strict=True
                )
            )
            mask_scores = raw["mask_scores"][index][shown].astype(np.float32).clip(0, 1)
        return Detections(
            boxes_xyxy=clipped[shown],
            scores=raw["scores"][index][shown].astype(np.float32),
            labels=labels[shown].astype(np.int64),
            image_size=(height, width),
            class_names=self.class_names,
            masks=masks,
            mask_scores=mask_scores,
        )

    def tiled(self, image: Pixels, *, tile: int = 1024, overlap: int = 128) -> Detections:
        """Detections of a large picture (H, W, 3) uint8 RGB, looked at in overlapping square tiles.

        tile and overlap in pixels. An object cut by an inner tile border is taken from the
        neighbour that holds it whole; what two tiles found is kept once. Raises ValueError unless
        0 <= overlap < tile.
        """
        if not 0 <= overlap < tile:
            raise ValueError(f"tiles: expected 0 <= overlap < tile, got {overlap} and {tile}")
        height, width = image.shape[:2]
        parts = []
        tops, lefts = (_tile_starts(side, tile, overlap) for side in (height, width))
        for top, left in product(tops, lefts):
            pixels = np.ascontiguousarray(image[top : top + tile, left : left + tile])
            found = self(pixels)
            whole = ~_cut_by_tile(found, top, left, (height, width), overlap)
            parts.append(found[whole].moved(left, top, (height, width)))
        return _merge_tiles(Detections.concatenate(parts))


def paste_mask(
    probabilities: NDArray[np.float32], box_xyxy: NDArray[np.float32], height: int, width: int
) -> MaskCrop:
    """The pixels of a mask predicted inside a box: bilinear between cell centres, cut at one half.

    probabilities (28, 28); box in image pixels, not clipped; the crop lies inside height x width.
    """
    x0, y0, x1, y1 = (float(v) for v in box_xyxy)
    left, right = _pixel_range(x0, x1, width)
    top, bottom = _pixel_range(y0, y1, height)
    # No matrix product: BLAS would spread it over threads, which spin beside the network's.
    cells = np.pad(probabilities, 1)
    row, below = _cells_at(top, bottom, y0, y1, probabilities.shape[0])
    column, beside = _cells_at(left, right, x0, x1, probabilities.shape[1])
    wide = cells.take(column, 1)
    wide += (cells.take(column + 1, 1) - wide) * beside
    values = np.diff(wide, axis=0).take(row, 0)
    values *= below[:, None]
    values += wide.take(row, 0)
    return MaskCrop(x=left, y=top, pixels=values >= 0.5)


def _pixel_range(low: float, high: float, limit: int) -> tuple[int, int]:
    start = min(max(int(np.floor(low)), 0), limit - 1)
    return start, max(min(int(np.ceil(high)), limit), start + 1)


def _cells_at(
    start: int, stop: int, low: float, high: float, cells: int
) -> tuple[NDArray[np.int64], NDArray[np.float32]]:
    """Of each pixel centre the cell before it, in a row with an empty cell at either end, and how
    far it is on the way to the next, 0..1.
    """
    centres = np.arange(start, stop, dtype=np.float32) + 0.5
    position = ((centres - low) / max(high - low, 1e-6) * cells + 0.5).clip(0, cells + 1)
    before = np.minimum(position.astype(np.int64), cells)
    return before, (position - before).astype(np.float32)


def _class_thresholds(
    threshold: ScoreThreshold | None, class_names: tuple[str, ...]
) -> NDArray[np.float32]:
    if threshold is None:
        return np.zeros(len(class_names), np.float32)
    if not isinstance(threshold, Mapping):
        return np.full(len(class_names), threshold, np.float32)
    unknown = sorted(set(threshold) - set(class_names))
    if unknown:
        raise ConfigError(
            f"score thresholds: expected class names of the model ({', '.join(class_names[:20])}), "
            f"got {', '.join(unknown)}"
        )
    return np.array([threshold.get(name, 0.0) for name in class_names], np.float32)


def _tile_starts(side: int, tile: int, overlap: int) -> list[int]:
    if side <= tile:
        return [0]
    starts = list(range(0, side - tile, tile - overlap))
    return [*starts, side - tile]


def _cut_by_tile(
    found: Detections, top: int, left: int, image_size: tuple[int, int], overlap: int
) -> NDArray[np.bool_]:
    """Which detections an inner border of their tile cuts, though a neighbour can hold them
    whole.
    """
    height, width = found.image_size
    x0, y0, x1, y1 = found.boxes_xyxy.T
    cut: NDArray[np.bool_] = ((x0 < 1) & (left > 0)) | ((y0 < 1) & (top > 0))
    cut |= (x1 > width - 1) & (left + width < image_size[1])
    cut |= (y1 > height - 1) & (top + height < image_size[0])
    cut &= (x1 - x0 < overlap) & (y1 - y0 < overlap)
    return cut


def _merge_tiles(found: Detections) -> Detections:
    """Keeps the best of detections of one class of which one covers most of the other."""
    kept: list[int] = []
    boxes = found.boxes_xyxy
    areas = (boxes[:, 2] - boxes[:, 0]) * (boxes[:, 3] - boxes[:, 1])
    for index in np.argsort(-found.scores, kind="stable").tolist():
        same = [k for k in kept if found.labels[k] == found.labels[index]]
        low = np.maximum(boxes[same, :2], boxes[index, :2])
        high = np.minimum(boxes[same, 2:], boxes[index, 2:])
        shared = (high - low).clip(min=0).prod(axis=1)
        if not (shared > 0.6 * np.minimum(areas[same], areas[index])).any():
            kept.append(index)
    return found[np.array(sorted(kept), dtype=np.int64)]
