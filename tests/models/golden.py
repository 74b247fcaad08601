"""The authors' own networks in tests/golden: their weights, their images, and our copy of them."""

import json
import re
import zlib
from functools import cache
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from vovnet.models.convert import Conversion
from vovnet.models.layers import Normalize
from vovnet.models.weights import load_tensors
from vovnet.models.zoo import create_model

FOLDER = Path(__file__).parent.parent / "golden"


def read(name: str):
    return json.loads((FOLDER / name).read_text())


BACKBONES = read("backbones.json")
CENTERMASK = read("det_centermask_lite_V_19_slim_eSE.json")
FASTER_RCNN = read("det_faster_rcnn_V_19_slim_FPNLite.json")
CASES = [*BACKBONES, CENTERMASK, FASTER_RCNN]


def golden_value(key: str, shape: list[int]) -> Tensor:
    """The weight that the golden run had under this original key."""
    if key.endswith("num_batches_tracked"):
        return torch.tensor(0)
    random = np.random.RandomState(zlib.crc32(key.encode())).standard_normal(shape)
    if re.search(r"(objectness_logits|anchor_deltas|box_predictor\.\w+)\.weight$", key):
        value = random * np.sqrt(2.0 / np.prod(shape[1:])) * 0.02
    elif len(shape) >= 2:
        value = random * np.sqrt(2.0 / np.prod(shape[1:]))
    elif key.endswith("running_var"):
        value = 1 + 0.1 * np.abs(random)
    elif key.endswith("scale"):
        value = 1 + 0.1 * random
    elif key.endswith("fcos_head.bbox_pred.bias"):
        value = 4 + 0.1 * random
    elif key.endswith("weight"):
        value = 1 + 0.1 * random
    else:
        value = 0.1 * random
    return torch.from_numpy(np.asarray(value))


def original(case: dict) -> dict[str, Tensor]:
    """The state dict that the authors' code had."""
    return dict(_draw(case["name"]))


@cache
def _draw(name: str) -> dict[str, Tensor]:
    keys = next(case["keys"] for case in CASES if case["name"] == name)
    return {key: golden_value(key, shape) for key, shape in keys.items()}


def rebuild(conversion: Conversion, *, norm: str = "bn") -> nn.Module:
    """The converted model in double precision."""
    arguments = dict(conversion.model_args)
    arguments["overrides"] = arguments["overrides"] | {"norm": norm}
    model = create_model(conversion.architecture, **arguments).double().eval()
    load_tensors(model, conversion.tensors, where="test")
    return model


def golden_input(case: dict, conversion: Conversion) -> tuple[Tensor, Tensor]:
    """The images as the network gets them, and their sizes."""
    pixels, sizes = golden_pixels(case)
    return Normalize(conversion.mean, conversion.std).double()(pixels, sizes), sizes


def golden_pixels(case: dict) -> tuple[Tensor, Tensor]:
    """The images as we take them: uint8 RGB (B, H, W, 3), zero-padded, and their sizes."""
    batch = np.zeros([len(case["images"]), *case["padded_batch"][2:], 3], np.uint8)
    for canvas, image in zip(batch, case["images"], strict=True):
        bgr = np.random.RandomState(image["seed"]).randint(0, 256, image["shape"])
        canvas[: bgr.shape[1], : bgr.shape[2]] = bgr[::-1].transpose(1, 2, 0)
    sizes = [image["shape"][1:] for image in case["images"]]
    return torch.from_numpy(batch), torch.tensor(sizes)


def assert_summary(actual: Tensor, expected: dict, *, relative: float) -> None:
    assert list(actual.shape) == expected["shape"]
    flat = actual.detach().double().flatten()
    scale = max(abs(v) for v in expected["value"]) or 1.0
    assert flat.mean().item() == pytest.approx(expected["mean"], rel=relative, abs=relative)
    assert flat.abs().sum().item() == pytest.approx(expected["abs_sum"], rel=relative)
    values = flat[expected["index"]].numpy()
    np.testing.assert_allclose(values, expected["value"], rtol=relative, atol=relative * scale)
