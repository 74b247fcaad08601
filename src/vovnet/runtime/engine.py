"""What every engine is, and choosing one; the engines themselves load on first use."""

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, Protocol, cast

import numpy as np
from numpy.typing import NDArray

from vovnet import _lazy
from vovnet.errors import ConfigError
from vovnet.model_folder import resolve_model
from vovnet.published import find_published

ENGINES = ("auto", *_lazy.ENGINES)
PRECISIONS = ("fp32", "bf16", "fp16")


class Engine(Protocol):
    """A loaded network: a batch of pictures in, the arrays of DeployGraph or ClassifierGraph out.

    name            of ENGINES
    precision       what the convolutions compute in
    device          cpu, cuda:0, ...
    max_detections  K, the padded number of detections of an image; 0 of a classifier
    has_masks       whether mask_probs and mask_scores are among the results
    """

    name: str
    precision: str
    device: str
    max_detections: int
    has_masks: bool

    def infer(self, images: NDArray[np.uint8], sizes: NDArray[np.int64]) -> dict[str, NDArray[Any]]:
        """images (B, H, W, 3) RGB, sizes (B, 2) height and width of the picture in each.

        Returns boxes (B, K, 4) xyxy in pixels of the images, scores, labels, valid (B, K) and,
        of a segmenter, mask_probs (B, K, 28, 28) and mask_scores (B, K). A classifier returns
        logits (B, C) and embedding (B, F), a backbone the embedding alone. The results are
        complete when it returns.
        """


def load_engine(
    folder_or_name: str | Path,
    *,
    engine: str = "auto",
    precision: str = "auto",
    device: str = "auto",
    threads: int | None = None,
    settings: Mapping[str, object] | None = None,
) -> Engine:
    """An engine with the network of a model folder, a bundled model or published weights.

    engine and precision `auto` choose by what the machine has. threads sets the CPU threads of the
    process. settings go over the folder's own settings of the network (min_score, max_detections).
    Raises ConfigError on an unknown engine, precision or device, or a folder that is not complete
    and right.
    """
    name = "torch" if engine == "auto" else engine
    if name not in _lazy.ENGINES:
        raise ConfigError(f"engine: expected auto, {', '.join(_lazy.ENGINES)}; got {engine!r}")
    if precision not in ("auto", *PRECISIONS):
        raise ConfigError(f"precision: expected auto, {', '.join(PRECISIONS)}; got {precision!r}")
    load = cast(Callable[..., Engine], _lazy.load(_lazy.ENGINES[name]))
    is_published = find_published(folder_or_name) is not None
    return load(
        folder_or_name if is_published else resolve_model(folder_or_name),
        precision=precision,
        device=device,
        threads=threads,
        settings=settings or {},
    )
