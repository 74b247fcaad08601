"""The settings of one training: command-line flags over an optional YAML file over a recipe."""

import difflib
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from types import MappingProxyType
from typing import Annotated, Any, Literal, Self, cast

import yaml
from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator

from vovnet import _lazy
from vovnet.errors import ConfigError

DEFAULT_EPOCHS = 50.0
DEFAULT_CLASSIFIER = "ese_vovnet19b_slim"
MAX_YAML_BYTES = 1_000_000
MAX_YAML_DEPTH = 20
OWN_SOURCE = "this project"
_RECIPES = Path(__file__).parent.parent / "recipes"
# Of each group one is set; a layer that sets one replaces whichever a lower layer has set.
_EXCLUSIVE = (
    ("epochs", "max_minutes", "max_steps"),
    ("eval_every_epochs", "eval_every_minutes"),
    ("warmup_fraction", "warmup_steps"),
)
_CLASSIFIERS_ONLY = (
    "test_image_size", "crop_fraction", "drop_rate", "class_balance", "distill", "teacher_weight",
)  # fmt: skip
_DETECTORS_ONLY = ("max_detections", "data_format", "teacher_score")
_USELESS = {
    "classify": _DETECTORS_ONLY,
    "detect": _CLASSIFIERS_ONLY,
    "segment": _CLASSIFIERS_ONLY,
    "pretrain": (*_CLASSIFIERS_ONLY, "max_detections", "teacher_score", "patience"),
}
# What a resumed training may change; all else would make it another training.
_FREE_ON_RESUME = {
    "data", "epochs", "max_minutes", "max_steps", "eval_every_epochs", "eval_every_minutes",
    "log_every_steps", "checkpoint_every_minutes", "threads", "workers", "device", "export_half",
    "licence", "name", "runs_dir",
}  # fmt: skip
_NESTED = ("model_overrides", "preprocess", "augment")


class TrainConfig(BaseModel):
    """Everything that decides a training, each value checked once here.

    The number of classes is not a setting: it comes from the data.
    """

    model_config = ConfigDict(extra="forbid", frozen=True, protected_namespaces=())

    task: Literal["classify", "detect", "segment", "pretrain"] | None = Field(
        None, description="what the model does, or pretrain; none: as its name says"
    )
    model: str = Field("centermask_lite_ese_vovnet19b_slim", description="a name of list_models()")
    model_overrides: dict[str, Any] = Field(
        default_factory=dict, description="settings of the model that differ from its own defaults"
    )
    backbone_weights: str | None = Field(
        None, description="weights to start the backbone from: a file, or 'hub'; none: random"
    )
    init: str | None = Field(
        None, description="model folder or bundled model whose weights the training starts from"
    )
    data: str | None = Field(None, description="folder of the data set")
    data_format: Literal["auto", "coco", "voc", "yolo"] = Field(
        "auto", description="of the data set; auto: the one that lies in the folder"
    )
    train_split: str = Field("train", description="name of the split to train on")
    val_split: str = Field("val", description="name of the split to evaluate on")
    preprocess: dict[str, Any] = Field(
        default_factory=dict, description="fields of Preprocess that differ from its defaults"
    )
    augment: dict[str, Any] = Field(
        default_factory=dict,
        description="fields of TrainPreset, or of ClassPreset for a classifier, that differ from "
        "their defaults",
    )
    image_size: int | None = Field(
        None, ge=16, description="side of the square crops to train on; none: as augment says"
    )
    test_image_size: int | None = Field(
        None, ge=16, description="side of a classifier's crop at evaluation; none: as in training"
    )
    crop_fraction: float = Field(
        0.875, gt=0, le=1, description="of the shorter side that this crop shows"
    )
    freeze: int = Field(
        0, ge=0, le=5, description="parts that stay as they are: 1 the stem, 2 stage 2 too, ..."
    )
    drop_path_rate: float = Field(0.0, ge=0, lt=1, description="of the last residual branch")
    drop_rate: float = Field(0.0, ge=0, lt=1, description="of the classifier's input")
    class_balance: Literal["none", "loss", "sampler"] = Field(
        "none", description="rare classes of a classifier count more, or are shown more often"
    )
    teacher: str | None = Field(
        None,
        description="what is learnt from beside the labels. Classifiers and backbones: a model "
        "folder, a published name, timm:NAME, torchvision:NAME (each with @FILE of weights), or "
        "FILE.py:FUNCTION. Detectors: a detector's folder or exported file, or YOLOX's .onnx",
    )
    teacher_score: float = Field(
        0.5, gt=0, le=1, description="of a detector's teacher: from it on, what it found is learnt"
    )
    distill: Literal["auto", "logits", "features", "head"] = Field(
        "auto", description="of the teacher; head: its features under a classifier fitted here"
    )
    teacher_weight: float = Field(
        1.0, ge=0, allow_inf_nan=False, description="of the teacher's loss beside the labels'"
    )

    batch_size: int = Field(8, ge=1, description="images in a step")
    epochs: float | None = Field(
        None, gt=0, allow_inf_nan=False, description="length in passes over the train split"
    )
    max_minutes: float | None = Field(
        None, gt=0, description="length in minutes of wall time, evaluations included"
    )
    max_steps: int | None = Field(None, ge=1, description="length in steps of the optimizer")
    optimizer: Literal["sgd", "adamw"] = Field("sgd", description="the optimizer")
    learning_rate: float = Field(
        0.01, gt=0, allow_inf_nan=False, description="its highest value, after the warm-up"
    )
    nesterov: bool = Field(False, description="SGD looks ahead")
    momentum: float = Field(0.9, ge=0, lt=1, description="SGD's momentum, AdamW's first beta")
    weight_decay: float = Field(1e-4, ge=0, description="of all weights but norms and biases")
    drops_at: list[Annotated[float, Field(gt=0, lt=1)]] = Field(
        default_factory=list,
        description="shares of the training at which the learning rate falls to a tenth; none: it "
        "follows half a cosine",
    )
    warmup_fraction: float | None = Field(
        None, ge=0, lt=1, description="share of the training with a rising learning rate"
    )
    warmup_steps: int | None = Field(
        None, ge=0, description="the same in steps; needed for a warm-up of a fixed length"
    )
    clip_norm: float | None = Field(10.0, gt=0, description="largest norm of all gradients")
    ema_decay: float = Field(0.998, ge=0, lt=1, description="of the averaged weights, per step")

    precision: Literal["auto", "fp32", "bf16"] = Field(
        "auto", description="of the network; auto: bf16 where the hardware computes in it"
    )
    channels_last: bool = Field(True, description="store feature maps as NHWC")
    device: str = Field(
        "auto", description="cpu, cuda, cuda:N, or auto: the GPU where there is one"
    )
    threads: int | None = Field(
        None, ge=1, description="threads of torch on the CPU; none: its own"
    )
    workers: int = Field(2, ge=0, description="processes that load images; 0: in the main process")
    seed: int = Field(
        0, ge=0, lt=2**63, description="of the weights, the order and the augmentation"
    )

    eval_every_epochs: int | None = Field(None, ge=1, description="epochs between evaluations")
    eval_every_minutes: float | None = Field(None, gt=0, description="minutes between evaluations")
    patience: int | None = Field(
        None, ge=1, description="evaluations without a better one after which a training ends"
    )
    max_detections: int = Field(
        100, ge=1, description="largest number of objects found in an image, and AP's limit"
    )
    log_every_steps: int = Field(20, ge=1, description="steps between two lines of metrics.jsonl")
    checkpoint_every_minutes: float = Field(5.0, ge=0, description="minutes between checkpoints")
    tensorboard: bool = Field(False, description="write the figures for TensorBoard too")
    export_half: bool = Field(False, description="store the model's weights in 16 bits")
    licence: str = Field("not stated", description="of the trained weights, for the model's card")
    name: str | None = Field(None, description="of the run folder; none: the model's name")
    runs_dir: str = Field("runs/train", description="folder in which the run folder is made")

    @model_validator(mode="before")
    @classmethod
    def _complete_groups(cls, values: Any) -> Any:
        if not isinstance(values, dict):
            return values
        defaults = {"epochs": DEFAULT_EPOCHS, "eval_every_epochs": 1, "warmup_fraction": 0.02}
        for group in _EXCLUSIVE:
            if all(values.get(name) is None for name in group):
                values = {**values, group[0]: defaults[group[0]]}
        if values.get("model") is None and values.get("task") == "classify":
            values = {**values, "model": DEFAULT_CLASSIFIER}
        return values

    @model_validator(mode="after")
    def _check_groups(self) -> Self:
        for group in _EXCLUSIVE:
            found = [name for name in group if getattr(self, name) is not None]
            if len(found) > 1:
                count = "both" if len(found) == 2 else "all"
                raise ValueError(f"expected one of {' and '.join(found)}, found {count}")
        if self.nesterov and (self.optimizer != "sgd" or self.momentum == 0):
            raise ValueError("expected nesterov with sgd and a momentum alone")
        return self


@dataclass(frozen=True, slots=True, kw_only=True)
class Recipe:
    """The settings of one training, and what is known of it.

    data            what it trains and evaluates on
    source          where the settings and the figures stand
    expected        published figures by name, in percent; empty where there are none
    needs_weights   the backbone starts from ImageNet weights, which the user has to name
    one_gpu_batch   images in a step where one GPU does what the source did with several; None: the
                    settings are for one device as they are
    notes           what is unknown of the source, and where this differs from it
    """

    name: str
    config: TrainConfig
    data: str
    source: str
    expected: Mapping[str, float] = field(default_factory=dict)
    needs_weights: bool = False
    one_gpu_batch: int | None = None
    notes: tuple[str, ...] = ()


def check_task(config: TrainConfig, task: str) -> None:
    """Raise ConfigError on another task than the config's, and on settings without use for it."""
    if config.task not in (None, task):
        raise ConfigError(
            f"model: expected one to {config.task}, got {config.model}, which is one to {task}"
        )
    for name in ("distill", "teacher_weight", "teacher_score"):
        if config.teacher is None and getattr(config, name) != _default(name):
            raise ConfigError(f"teacher: expected one for {name}, got none")
    for name in _USELESS[task]:
        value = getattr(config, name)
        if value != _default(name):
            raise ConfigError(f"{name}: expected none for a model to {task}, got {value!r}")


def _default(name: str) -> object:
    return TrainConfig.model_fields[name].default


def list_recipes() -> list[Recipe]:
    """The recipes that come with the library: first its own, for pictures that a user brings, then
    the published ones by family, in their tables' order.
    """
    modules = sorted(path.stem for path in _RECIPES.glob("*.py") if not path.stem.startswith("_"))
    families = [_lazy.load(f"vovnet.recipes.{module}:RECIPES") for module in modules]
    recipes = [recipe for family in families for recipe in cast(tuple[Recipe, ...], family)]
    return sorted(recipes, key=lambda recipe: recipe.source != OWN_SOURCE)


def find_recipe(name: str) -> Recipe:
    """The recipe of this name; raises ConfigError with the closest one where there is none."""
    recipes = {recipe.name: recipe for recipe in list_recipes()}
    if name not in recipes:
        near = difflib.get_close_matches(name, recipes, n=1)
        hint = f"did you mean {near[0]!r}?" if near else "`vovnet recipes` lists them"
        raise ConfigError(f"recipe: expected a recipe of the library, found {name!r}; {hint}")
    return recipes[name]


def load_config(
    recipe: str | None,
    yaml_path: Path | None,
    flags: Mapping[str, object],
    *,
    defaults: Mapping[str, object] = MappingProxyType({}),
) -> TrainConfig:
    """Merge flags over the YAML file over the recipe, or `defaults` where there is none; None is a
    value, which not every setting takes.

    Settings that are themselves mappings (model_overrides, preprocess, augment) merge key by key.
    Raises ConfigError naming what was expected and found.
    """
    base = None if recipe is None else find_recipe(recipe)
    merged = dict(defaults) if base is None else base.config.model_dump(exclude_unset=True)
    if yaml_path is not None:
        merged = _merge(merged, _yaml_layer(yaml_path), str(yaml_path))
    merged = _merge(merged, flags, "the command line")
    if merged.get("data") is None:
        raise ConfigError("data: expected the folder of a data set (--data DIR), found nothing")
    config = _validate(merged)
    if base is not None and base.needs_weights:
        _require_weights(config, base.name)
    return config


def resume_config(run_dir: Path, flags: Mapping[str, object]) -> TrainConfig:
    """The settings saved in a run folder (or beside a checkpoint in it), under the given flags."""
    if not run_dir.exists():
        raise ConfigError(f"resume: expected a run folder or a checkpoint, found none at {run_dir}")
    folder = run_dir if run_dir.is_dir() else run_dir.parent
    return load_config(None, folder / "config.yaml", flags)


def parse_config(values: Mapping[str, Any], *, where: str) -> TrainConfig:
    """The settings in a plain mapping; raises ConfigError naming `where`."""
    return _validate(_merge({}, values, where))


def check_same_training(config: TrainConfig, saved: Mapping[str, Any], *, where: str) -> None:
    """Raise ConfigError where a resumed training differs from the saved settings in what counts."""
    previous = parse_config(saved, where=where).model_dump(mode="json")
    for name, found in config.model_dump(mode="json").items():
        expected = previous[name]
        if name not in _FREE_ON_RESUME and expected != found:
            raise ConfigError(
                f"resume: expected {name} {expected!r} as in {where}, found {found!r}"
            )


def config_to_yaml(config: TrainConfig, *, only_set: bool = False) -> str:
    """Every setting with its value, or those alone that differ from the defaults, as YAML that
    load_config reads back.
    """
    values = config.model_dump(mode="json", exclude_defaults=only_set)
    text: str = yaml.safe_dump(values, sort_keys=False)
    return text


def closest(name: str, known: list[str]) -> str:
    """A hint naming the known word most like `name`, or all of them when none is."""
    matches = difflib.get_close_matches(name, known, n=1)
    return f"did you mean {matches[0]!r}?" if matches else f"known: {', '.join(known)}"


def _require_weights(config: TrainConfig, recipe: str) -> None:
    if config.backbone_weights is None and config.init is None:
        raise ConfigError(
            f"recipe {recipe}: expected ImageNet weights to start the backbone from "
            "(--backbone-weights FILE, or --pretrained for a model with published ones), found none"
        )


def _yaml_layer(path: Path) -> dict[str, Any]:
    try:
        if path.stat().st_size > MAX_YAML_BYTES:
            raise ConfigError(f"{path}: expected at most {MAX_YAML_BYTES} bytes of YAML")
        text = path.read_text(encoding="utf-8")
        _check_yaml(text, path)
        values = yaml.safe_load(text)
    except OSError as error:
        raise ConfigError(f"{path}: expected a YAML file, found {error.strerror}") from error
    except (yaml.YAMLError, ValueError, RecursionError) as error:
        line = " ".join(str(error).split())
        raise ConfigError(f"{path}: expected a YAML mapping of settings, found: {line}") from error
    if values is None:
        return {}
    if not isinstance(values, dict) or not all(isinstance(key, str) for key in values):
        raise ConfigError(
            f"{path}: expected a mapping of setting names to values, found {type(values).__name__}"
        )
    return values


def _check_yaml(text: str, path: Path) -> None:
    """Refuse what makes a small file expensive: aliases, which multiply, and deep nesting."""
    depth = 0
    for event in yaml.parse(text, yaml.SafeLoader):
        depth += isinstance(event, yaml.CollectionStartEvent)
        depth -= isinstance(event, yaml.CollectionEndEvent)
        if isinstance(event, yaml.AliasEvent):
            raise ConfigError(f"{path}: expected plain values, found a YAML alias (*name)")
        if depth > MAX_YAML_DEPTH:
            raise ConfigError(f"{path}: expected at most {MAX_YAML_DEPTH} nested levels of YAML")


def _merge(base: dict[str, Any], layer: Mapping[str, Any], where: str) -> dict[str, Any]:
    known = list(TrainConfig.model_fields)
    for key in layer:
        if key not in known:
            raise ConfigError(
                f"{where}: expected the name of a setting, found {key!r}; {closest(key, known)}"
            )
    merged = dict(base)
    for group in _EXCLUSIVE:
        if any(layer.get(name) is not None for name in group):
            merged = {key: value for key, value in merged.items() if key not in group}
    for key, value in layer.items():
        nested = key in _NESTED and isinstance(value, Mapping)
        merged[key] = {**(merged.get(key) or {}), **value} if nested else value
    return merged


def _validate(values: dict[str, Any]) -> TrainConfig:
    try:
        return TrainConfig.model_validate(values)
    except ValidationError as error:
        raise ConfigError("; ".join(_explain(detail) for detail in error.errors())) from error


def _explain(detail: Any) -> str:
    place = ".".join(str(part) for part in detail["loc"])
    message: str = detail["msg"]
    if not place:
        return message.removeprefix("Value error, ")
    expected = message.removeprefix("Input should be ").removeprefix("Value error, ")
    return f"{place}: expected {expected}, found {detail['input']!r}"
