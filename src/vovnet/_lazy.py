"""The one place of late loading: what is public, and where it lives, as strings.

`import vovnet` and `vovnet --help` stay fast because torch and the rest load on first use only.
"""

import importlib

ATTRIBUTES = {
    "Classification": "vovnet.results:Classification",
    "Classifier": "vovnet.classify:Classifier",
    "DeployGraph": "vovnet.models.deploy:DeployGraph",
    "Detections": "vovnet.results:Detections",
    "Predictor": "vovnet.predict:Predictor",
    "Preprocess": "vovnet.preprocess:Preprocess",
    "create_model": "vovnet.models.zoo:create_model",
    "draw_detections": "vovnet.drawing:draw_detections",
    "evaluate_coco": "vovnet.evaluation:evaluate_coco",
    "list_models": "vovnet.models.zoo:list_models",
    "load_coco": "vovnet.data.coco:load_coco",
    "read_image": "vovnet.images:read_image",
}
"""Public name of the package to "module:attribute"."""

COMMANDS = {
    "check": "vovnet.cli.check:check",
    "choose": "vovnet.cli.choose:choose",
    "convert": "vovnet.cli.convert:convert",
    "convert-data": "vovnet.cli.convert_data:convert_data",
    "export": "vovnet.cli.export:export",
    "models": "vovnet.cli.models:models",
    "predict": "vovnet.cli.predict:predict",
    "pretrain": "vovnet.cli.pretrain:pretrain",
    "profile": "vovnet.cli.profile:profile",
    "recipes": "vovnet.cli.recipes:recipes",
    "train": "vovnet.cli.train:train",
    "transition": "vovnet.cli.profile:draw_transition_weights",
    "val": "vovnet.cli.val:val",
}
"""Verb of the command line, or a second mode of one, to "module:function"."""

ENGINES = {
    "torch": "vovnet.runtime.torch:load",
    "torch-packed": "vovnet.runtime.torch:load_packed",
    "torch-compile": "vovnet.runtime.torch:load_compiled",
    "torch-triton": "vovnet.runtime.triton_osa:load",
    "torch-export": "vovnet.runtime.torch_export:load",
    "openvino": "vovnet.runtime.openvino:load",
    "onnxruntime": "vovnet.runtime.onnxruntime:load",
}
"""Name of an engine to the "module:function" that loads it."""


def load(target: str) -> object:
    """Import the module of a "module:attribute" string and return the attribute.

    Raises ImportError or AttributeError when there is no such module or attribute.
    """
    module, _, attribute = target.partition(":")
    return getattr(importlib.import_module(module), attribute)
