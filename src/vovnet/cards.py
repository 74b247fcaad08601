"""README.md of a classifier's folder: what a person, a model hub and timm's index read of it."""

import json
import math
import re
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import yaml

from vovnet.model_folder import ModelConfig
from vovnet.preprocess import Preprocess

MAX_NAMES = 200

# Words as in the Architecture lists of timm's model index, by the modules that they stand for.
LAYER_WORDS = {
    "AdaptiveAvgPool2d": "Global Average Pooling",
    "BatchNorm2d": "Batch Normalization",
    "Conv2d": "Convolution",
    "DeformableConvNormAct": "Deformable Convolution",
    "Dropout": "Dropout",
    "EfficientChannelAttention": "Efficient Channel Attention",
    "EffectiveSqueezeExcite": "Effective Squeeze-and-Excitation",
    "EvoNormS0": "EvoNorm-S0",
    "GroupNorm": "Group Normalization",
    "Linear": "Dense Connections",
    "MaxPool2d": "Max Pooling",
    "OsaBlock": "One-Shot Aggregation",
    "ReLU": "ReLU",
    "SeparableConvNormAct": "Depthwise Separable Convolution",
    "SqueezeExcite": "Squeeze-and-Excitation",
    "StochasticDepth": "Stochastic Depth",
}

_IDENTIFIER = re.compile(r"[a-z0-9][a-z0-9._+-]*")
_DATA_SET = re.compile(r"[\w-][\w.-]*(/[\w-][\w.-]*)?", re.ASCII)


def architecture_words(type_names: Iterable[str]) -> list[str]:
    """The words for the class names of a network's modules, sorted, each once."""
    return sorted({LAYER_WORDS[name] for name in type_names if name in LAYER_WORDS})


def classifier_card(
    config: ModelConfig, *, macs: int, parameters: int, file_bytes: int, layers: Sequence[str]
) -> str:
    """Markdown of a classifier's README.md.

    Its YAML head is what a model hub reads; the comment at its end is timm's model index. macs are
    multiply-accumulates of one image of the model's own size, file_bytes the size of the weights,
    layers the words of `architecture_words`. Accuracy is the first of config.metrics, and left out
    where there is none.
    """
    preprocess = Preprocess.from_dict(config.preprocess)
    head = _dump(_hub_facts(config))
    index = _dump(_timm_index(config, preprocess, macs, parameters, file_bytes, layers))
    body = _body(config, preprocess, macs, parameters, file_bytes)
    return f"---\n{head}---\n\n{body}\n<!--\n{index}-->\n"


class _Dumper(yaml.SafeDumper):
    """Writes texts that could end what they stand in between double quotes, on one line."""


def _represent_text(dumper: yaml.SafeDumper, text: str) -> yaml.ScalarNode:
    risky = "--" in text or not text.isprintable()
    style = '"' if risky else None
    return dumper.represent_scalar("tag:yaml.org,2002:str", text, style=style)


_Dumper.add_representer(str, _represent_text)


def _dump(value: Mapping[str, Any]) -> str:
    text = yaml.dump(value, Dumper=_Dumper, sort_keys=False, allow_unicode=True, width=math.inf)
    # These end an HTML comment. They stand between double quotes, where YAML knows escapes.
    return text.replace("-->", r"--\x3e").replace("--!>", r"--!\x3e")


def _hub_facts(config: ModelConfig) -> dict[str, Any]:
    """The head of the card, by the hub's own keys."""
    licence = config.licence.lower()
    named = _IDENTIFIER.fullmatch(licence) is not None
    facts: dict[str, Any] = {"license": licence if named else "other"}
    if not named:
        facts["license_name"] = config.licence
    facts |= {
        "library_name": "vovnet",
        "pipeline_tag": "image-classification",
        "tags": ["image-classification", "vovnet", "one-shot-aggregation"],
    }
    data = _data(config)
    if data is not None and _DATA_SET.fullmatch(data):
        facts["datasets"] = [data]
    measured = _measured(config)
    if measured is not None:
        facts["model-index"] = [{"name": config.architecture, "results": [_hub_result(config)]}]
    return facts


def _hub_result(config: ModelConfig) -> dict[str, Any]:
    split, figures = _measured(config) or ("", {})
    data = _data(config) or "unknown"
    metrics = [
        {"type": kind, "name": name, "value": round(figures[key], 6)}
        for key, kind, name in (
            ("top1", "accuracy", "Top-1 accuracy"),
            ("top5", "top_5_accuracy", "Top-5 accuracy"),
            ("ece", "expected_calibration_error", "Expected calibration error"),
        )
        if figures.get(key) is not None
    ]
    return {
        "task": {"type": "image-classification", "name": "Image Classification"},
        "dataset": {"type": data, "name": data, "split": split},
        "metrics": metrics,
    }


def _timm_index(
    config: ModelConfig,
    preprocess: Preprocess,
    macs: int,
    parameters: int,
    file_bytes: int,
    layers: Sequence[str],
) -> dict[str, Any]:
    """The block that timm's model pages end with; its FLOPs there are multiply-accumulates."""
    size = _image_size(preprocess)
    metadata: dict[str, Any] = {
        "FLOPs": 2 * macs,
        "FLOPs Unit": "operations for one image, 2 for each multiply-accumulate",
        "Multiply-Accumulates": macs,
        "Parameters": parameters,
        "File Size": file_bytes,
        "File Size Unit": "bytes",
    }
    data = _data(config)
    metadata |= {} if data is None else {"Training Data": [data]}
    metadata |= {
        "Architecture": list(layers),
        "Tasks": ["Image Classification"],
        "ID": config.architecture,
        "Crop Pct": f"{_crop_fraction(preprocess):.3g}",
    }
    metadata |= {} if size is None else {"Image Size": str(size)}
    metadata |= {"Interpolation": preprocess.interpolation}
    entry: dict[str, Any] = {"Name": config.architecture, "Metadata": metadata}
    measured = _measured(config)
    if measured is not None:
        split, figures = measured
        shares = {
            name: f"{100 * figures[key]:.2f}%"
            for key, name in (("top1", "Top 1 Accuracy"), ("top5", "Top 5 Accuracy"))
            if figures.get(key) is not None
        }
        named = f"{data or 'unknown'} ({split})"
        entry["Results"] = [{"Task": "Image Classification", "Dataset": named, "Metrics": shares}]
    return {"Models": [entry], "Type": "model-index"}


def _body(
    config: ModelConfig, preprocess: Preprocess, macs: int, parameters: int, file_bytes: int
) -> str:
    size = _image_size(preprocess)
    seen = "images of any size" if size is None else f"an image of {size} x {size} pixels"
    facts = [
        f"- {len(config.class_names)} classes, licence {_code(config.licence)}",
        f"- {_how_prepared(preprocess)}",
        f"- {macs / 1e9:.3f} G multiply-accumulates for {seen} ({2 * macs / 1e9:.3f} GFLOPs)",
        f"- {parameters / 1e6:.3f} M parameters, {file_bytes / 1e6:.1f} MB of weights",
        f"- {_how_trained(config)}",
        f"- {_how_good(config)}",
    ]
    names = config.class_names
    left_out = len(names) - MAX_NAMES
    return _BODY.format(
        title=_code(config.architecture),
        facts="\n".join(facts),
        # A name a line: each begins with a quote, so that none ends the block.
        names=json.dumps(names[:MAX_NAMES], ensure_ascii=False, indent=0),
        more=f"\nand {left_out} more, in config.json\n" if left_out > 0 else "",
    )


_BODY = """# {title}

An image classifier of the VoVNet family, made with the library vovnet.

{facts}

## Use

```python
from vovnet import Classifier

classifier = Classifier.load("path/of/this/folder")
print(classifier("image.jpg").top(5))
```

```sh
vovnet predict --model path/of/this/folder --source image.jpg
vovnet val --model path/of/this/folder --data path/of/labelled/images --split test
```

## Classes

```json
{names}
```
{more}"""


def _how_prepared(preprocess: Preprocess) -> str:
    if preprocess.short_side is None:
        return f"images are scaled by {preprocess.scale:g} ({preprocess.interpolation})"
    resized = (
        f"the shorter side becomes {preprocess.short_side} pixels ({preprocess.interpolation})"
    )
    if preprocess.crop_size is None:
        return resized
    return (
        f"{resized}, then {preprocess.crop_size} x {preprocess.crop_size} are cut from the middle"
    )


def _how_trained(config: ModelConfig) -> str:
    """What config.training says of it; weights that others trained have no steps and hardware."""
    data = _data(config)
    parts = [] if data is None else [f"trained on {_code(data)}"]
    training = config.training
    parts += [f"for {training['minutes']} minutes"] if "minutes" in training else []
    parts += [f"({training['steps']} steps)"] if "steps" in training else []
    parts += [f"on {_code(str(training['hardware']))}"] if "hardware" in training else []
    parts += [f"with vovnet {_code(str(training['library']))}"] if "library" in training else []
    return " ".join(parts) or "what it was trained on is not recorded"


def _how_good(config: ModelConfig) -> str:
    measured = _measured(config)
    if measured is None:
        return "accuracy: not measured"
    split, figures = measured
    text = f"top-1 accuracy {figures['top1']:.4f}"
    interval = figures.get("top1_interval")
    if interval is not None:
        text += f" (95 % interval {interval[0]:.4f} to {interval[1]:.4f} over resampled images)"
    if figures.get("top5") is not None:
        text += f", top-5 {figures['top5']:.4f}"
    if figures.get("ece") is not None:
        text += f", expected calibration error {figures['ece']:.4f}"
    return f"{text} on {figures.get('num_images', 'the')} images of the split {_code(split)}"


def _measured(config: ModelConfig) -> tuple[str, Mapping[str, Any]] | None:
    """The first split of config.metrics that has a top-1 accuracy."""
    for split, figures in config.metrics.items():
        if isinstance(figures, Mapping) and isinstance(figures.get("top1"), float | int):
            return split, figures
    return None


def _data(config: ModelConfig) -> str | None:
    name = config.training.get("data")
    return name if isinstance(name, str) and name else None


def _image_size(preprocess: Preprocess) -> int | None:
    return preprocess.short_side if preprocess.crop_size is None else preprocess.crop_size


def _crop_fraction(preprocess: Preprocess) -> float:
    if preprocess.crop_size is None or preprocess.short_side is None:
        return 1.0
    return preprocess.crop_size / preprocess.short_side


def _code(text: str) -> str:
    """A text of others inside a sentence, where none of its characters acts."""
    shown = "".join(letter if letter.isprintable() else " " for letter in text).replace("`", "'")
    return f"`{shown.strip() or ' '}`"
