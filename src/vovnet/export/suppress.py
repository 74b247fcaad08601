"""Non-maximum suppression and RoIAlign as single operations of an ONNX graph."""

import importlib
from collections.abc import Callable
from typing import Any

import torch

from vovnet.errors import ConfigError


def onnx_functions() -> dict[Any, Callable[..., Any]]:
    """What the exporter writes for operations that it does not know.

    Raises ConfigError where onnxscript is not installed.
    """
    try:
        op: Any = importlib.import_module("onnxscript").opset20
    except ImportError:
        raise ConfigError(
            "export: expected onnxscript to be installed: pip install 'vovnet[export]'"
        ) from None

    def write_suppress(boxes: Any, scores: Any, threshold: float, keep: int) -> Any:
        chosen = op.NonMaxSuppression(
            boxes,
            scores,
            op.Constant(value_ints=[keep]),
            op.Constant(value_floats=[threshold]),
            op.Constant(value_floats=[0.0]),
        )  # (number, 3): group, class, box
        nothing = op.Expand(op.Constant(value_float=0.0), op.Shape(scores))
        marks = op.Expand(op.Constant(value_float=1.0), op.Shape(chosen, start=0, end=1))
        return op.Cast(op.ScatterND(nothing, chosen, marks), to=9)  # bool

    def write_roi_align(
        feature: Any,
        rois: Any,
        spatial_scale: float,
        pooled_height: int,
        pooled_width: int,
        sampling_ratio: int = -1,
        aligned: bool = False,
    ) -> Any:
        first, rest = op.Constant(value_ints=[1]), op.Constant(value_ints=[5])
        zero, axis = op.Constant(value_ints=[0]), op.Constant(value_ints=[1])
        images = op.Squeeze(op.Slice(rois, zero, first, axis), axis)
        return op.RoiAlign(
            feature,
            op.Slice(rois, first, rest, axis),
            op.Cast(images, to=7),  # int64
            coordinate_transformation_mode="half_pixel" if aligned else "output_half_pixel",
            output_height=pooled_height,
            output_width=pooled_width,
            sampling_ratio=max(sampling_ratio, 0),
            spatial_scale=spatial_scale,
        )

    return {
        torch.ops.vovnet.suppress.default: write_suppress,
        torch.ops.torchvision.roi_align.default: write_roi_align,
    }
