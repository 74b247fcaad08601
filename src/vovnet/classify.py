"""From a picture or a path to class probabilities or to an embedding."""

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Self, overload

import numpy as np
from numpy.typing import NDArray

from vovnet.errors import ConfigError
from vovnet.images import read_image
from vovnet.model_folder import load_config, resolve_model
from vovnet.preprocess import Preprocess
from vovnet.published import (
    PUBLISHED,
    find_published,
    imagenet_class_names,
    published_preprocess,
)
from vovnet.results import Classification
from vovnet.runtime.engine import Engine, load_engine

Pixels = NDArray[np.uint8]
Logits = NDArray[np.float32]


class Classifier:
    """A classifier with its preprocess and class names; none of a backbone, which only embeds."""

    def __init__(
        self, engine: Engine, preprocess: Preprocess, class_names: tuple[str, ...]
    ) -> None:
        self.engine = engine
        self.preprocess = preprocess
        self.class_names = class_names

    @classmethod
    def load(
        cls,
        folder_or_name: str | Path,
        *,
        engine: str = "auto",
        precision: str = "auto",
        device: str = "auto",
        threads: int | None = None,
        test_size: bool = False,
    ) -> Self:
        """A classifier from a model folder or from published weights by their name.

        engine, precision, device and threads are those of load_engine. test_size takes the larger
        images at which timm reports its best figures. Raises ConfigError where the folder is not
        complete and right, and where published weights cannot be had.
        """
        preprocess, class_names = _describe(folder_or_name, test_size=test_size)
        loaded = load_engine(
            folder_or_name, engine=engine, precision=precision, device=device, threads=threads
        )
        return cls(loaded, preprocess, class_names)

    @overload
    def __call__(  # type: ignore[overload-overlap]  # a str is a Sequence of str
        self, source: Pixels | str | Path
    ) -> Classification: ...
    @overload
    def __call__(self, source: Sequence[Pixels | str | Path]) -> list[Classification]: ...
    def __call__(
        self, source: Pixels | str | Path | Sequence[Pixels | str | Path]
    ) -> Classification | list[Classification]:
        """Probabilities of a picture (H, W, 3) uint8 RGB or of a file; a list in gives a list out.

        A list runs as one batch. Raises ImageError on a file that cannot be read, ConfigError on a
        backbone.
        """
        if isinstance(source, Sequence) and not isinstance(source, str):
            images = [one if isinstance(one, np.ndarray) else read_image(one) for one in source]
            return self.classifications(self.logits(images))
        return self([source])[0]

    def classifications(self, logits: Logits) -> list[Classification]:
        """The rows of logits, float32 (N, C), as probabilities that sum to 1."""
        return [Classification(row, self.class_names) for row in softmax(logits)]

    def logits(self, images: Sequence[Pixels]) -> Logits:
        """float32 (N, C) of uint8 (H, W, 3) RGB pictures of any sizes, in one batch.

        Raises ConfigError on a backbone.
        """
        if not self.class_names:
            raise ConfigError("model: expected a classifier, found a backbone without classes")
        if not images:
            return np.zeros((0, len(self.class_names)), np.float32)
        return self.infer([self.preprocess.resize(image) for image in images])["logits"]

    def embeddings(self, images: Sequence[Pixels]) -> NDArray[np.float32]:
        """float32 (N, F), the pooled last map, of uint8 (H, W, 3) RGB pictures in one batch.

        Raises ValueError on no picture.
        """
        return self.infer([self.preprocess.resize(image) for image in images])["embedding"]

    def infer(self, resized: Sequence[Pixels]) -> dict[str, NDArray[np.float32]]:
        """The engine's logits (N, C), of a classifier, and embedding (N, F), both float32.

        resized are uint8 (H, W, 3) RGB pictures as `preprocess.resize` gives them.
        """
        if len({image.shape for image in resized}) > 1:
            # A model without a crop. Padding to a common size would count in the pooled map.
            parts = [self.infer([image]) for image in resized]
            return {name: np.concatenate([part[name] for part in parts]) for name in parts[0]}
        found = self.engine.infer(*self.preprocess.batch(resized))
        return {name: value.astype(np.float32, copy=False) for name, value in found.items()}


def is_classifier(folder_or_name: str | Path) -> bool:
    """Whether a name or folder is one for `Classifier`; else it is one for `Predictor`.

    Raises ConfigError where it is neither.
    """
    if find_published(folder_or_name) is not None:
        return True
    try:
        folder = resolve_model(folder_or_name)
    except ConfigError as error:
        names = ", ".join(f"{variant}.{weights.tag}" for variant, weights in PUBLISHED.items())
        raise ConfigError(f"{error}; published weights have the names {names}") from None
    return load_config(folder).task == "classify"


def softmax(logits: Logits) -> NDArray[np.float32]:
    """Probabilities (N, C), float32, of logits (N, C); computed in float64."""
    values = logits.astype(np.float64)
    values -= values.max(axis=1, keepdims=True)
    np.exp(values, out=values)
    values /= values.sum(axis=1, keepdims=True)
    probabilities: NDArray[np.float32] = values.astype(np.float32)
    return probabilities


def _describe(folder_or_name: str | Path, *, test_size: bool) -> tuple[Preprocess, tuple[str, ...]]:
    variant = find_published(folder_or_name)
    if variant is not None:
        return published_preprocess(variant, test_size=test_size), imagenet_class_names()
    folder = resolve_model(folder_or_name)
    config = load_config(folder)
    if config.task != "classify":
        raise ConfigError(f"{folder}: expected a classifier, found a model that detects objects")
    if test_size:
        raise ConfigError(f"test size: expected published weights by their name, got {folder}")
    preprocess = Preprocess.from_dict(config.preprocess)
    # Padding is for maps that are added up in a detector; in a pooled map it would count.
    return replace(preprocess, size_divisor=1), tuple(config.class_names)
