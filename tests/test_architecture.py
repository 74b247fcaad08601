"""The direction of every import: each module uses only what stands before it in ORDER.

Everything is read from the source text by ast. The second half proves on small made-up packages
that each rule can fail.
"""

import ast
import sys
import tomllib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from graphlib import CycleError, TopologicalSorter
from pathlib import Path

import pytest

from vovnet import _lazy

PACKAGE = Path(__file__).parent.parent / "src" / "vovnet"

# In the order of the flow. "vovnet" is the package's own __init__, the last of all; those of the
# subpackages hold a docstring only and are not listed.
ORDER = [
    "_lazy",
    # data in numpy; no torch
    "errors",
    "files",
    "hardware",
    "html_page",
    "results",
    "images",
    "pages",
    "preprocess",
    "published",
    "graph_file",
    "model_folder",
    "exported",
    # tensors in, tensors out
    "models.settings",
    "models.layers",
    "models.vovnet",
    "models.fpn",
    "models.pan",
    "models.boxes",
    "models.roi",
    "models.losses",
    "models.suppress",
    "models.fcos",
    "models.centermask",
    "models.rpn",
    "models.rcnn",
    "models.multibox",
    "models.refinedet",
    "models.dsod",
    "models.assign",
    "models.prototypes",
    "models.vovdet",
    "models.deploy",
    "models.layouts",
    "models.rename",
    "models.convert",
    "models.weights",
    "models.zoo",
    "timm",
    # engines that run a trained network
    "runtime.threads",
    "runtime.packed",
    "runtime.cuda_graphs",
    "runtime.torch",
    "runtime.triton_kernels",
    "runtime.triton_osa",
    "runtime.exported",
    "runtime.torch_export",
    "runtime.openvino",
    "runtime.onnxruntime",
    "runtime.measured",
    "runtime.engine",
    "runtime.stream",
    # data sets
    "data.labels",
    "data.problems",
    "data.coco",
    "data.voc",
    "data.yolo",
    "data.extra",
    "data.check",
    "data.formats",
    "data.convert",
    "data.preset",
    "data.windows",
    "data.ssd_augment",
    "data.mixing",
    "data.augment",
    "data.shards",
    "data.classes",
    "data.class_batches",
    "data.pictures",
    "data.views",
    # from results to figures, pictures and files
    "evaluation",
    "evaluation_voc",
    "error_analysis",
    "val_page",
    "evaluation_classes",
    "drawing",
    "class_pictures",
    "cards",
    "predict",
    "augmented_predict",
    "predict_files",
    "classify",
    "classify_files",
    # from a trained network to a file for other engines
    "export.fuse",
    "export.suppress",
    "export.detections",
    "export.graph",
    "export.onnx",
    "export.torch_export",
    "export.check",
    "export.model",
    "export.int8",
    "export.quantize",
    # what it costs
    "profiling.cost",
    "profiling.liveness",
    "profiling.trace",
    "profiling.count",
    "profiling.onnx_count",
    "profiling.transition",
    "profiling.transition_plot",
    "profiling.energy",
    "profiling.latency",
    "profiling.compare",
    "profiling.records",
    "profiling.machine",
    "profiling.roofline",
    "profiling.target",
    "profiling.placing",
    "profiling.stages",
    "profiling.profile",
    "profiling.accuracy",
    "profiling.gate",
    "profiling.choose",
    "profiling.report",
    "profiling.plots",
    "profiling.html",
    # training
    "training.config",
    "training.recipe",
    "recipes.centermask",
    "recipes.dsod",
    "recipes.fast",
    "recipes.finetune",
    "recipes.nuclei",
    "recipes.paper",
    "recipes.rcnn",
    "recipes.refinedet",
    "recipes.timm_ra",
    "recipes.vovdet",
    "training.optim",
    "training.checkpoint",
    "training.step",
    "training.world",
    "training.loop",
    "training.task",
    "training.build",
    "training.report",
    "training.package",
    "training.detect_teacher",
    "training.detect",
    "training.distill",
    "training.classify",
    "training.siamese",
    "training.pretrain",
    "training.run",
    # command line
    "cli.engines",
    "cli.check",
    "cli.convert",
    "cli.convert_data",
    "cli.export",
    "cli.models",
    "cli.predict",
    "cli.profile",
    "cli.choose",
    "cli.recipes",
    "cli.settings",
    "cli.train",
    "cli.pretrain",
    "cli.val_classes",
    "cli.val_detections",
    "cli.val",
    "cli.options",
    "cli.measure",
    "cli.main",
    "__main__",
    "vovnet",
]

# These answer without torch: they import it neither themselves nor through each other.
NUMPY_ONLY = {
    "_lazy",
    "errors",
    "files",
    "hardware",
    "html_page",
    "results",
    "images",
    "pages",
    "preprocess",
    "published",
    "graph_file",
    "model_folder",
    "exported",
    "data.labels",
    "data.problems",
    "data.coco",
    "data.voc",
    "data.yolo",
    "data.extra",
    "data.check",
    "data.formats",
    "data.convert",
    "data.preset",
    "data.shards",
    "data.classes",
    "data.pictures",
    "evaluation",
    "evaluation_voc",
    "error_analysis",
    "val_page",
    "evaluation_classes",
    "drawing",
    "class_pictures",
    "cards",
    "predict",
    "augmented_predict",
    "predict_files",
    "classify",
    "classify_files",
    "runtime.threads",
    "runtime.exported",
    "runtime.openvino",
    "runtime.onnxruntime",
    "runtime.measured",
    "runtime.engine",
    "runtime.stream",
    "export.int8",
    "profiling.cost",
    "profiling.liveness",
    "profiling.onnx_count",
    "profiling.energy",
    "profiling.latency",
    "profiling.compare",
    "profiling.records",
    "profiling.gate",
    "profiling.choose",
    "profiling.report",
    "profiling.plots",
    "profiling.html",
}

MODELS_MAY_IMPORT = {"torch", "torchvision.ops", "numpy"}
WEIGHTS_MAY_IMPORT = {"huggingface_hub", "safetensors"}

# Who may load late, and what: modules whose name starts with the prefix.
LATE_LOADERS = {
    "vovnet": "vovnet.",
    "cli.options": "vovnet.cli.",
    "runtime.engine": "vovnet.runtime.",
    "training.config": "vovnet.recipes.",
}


IMPORT_NAMES = {"pillow": "PIL", "pyyaml": "yaml", "huggingface-hub": "huggingface_hub"}


@dataclass(frozen=True)
class Import:
    target: str  # full dotted name, with the imported name where that may be a module
    line: int
    in_function: bool


def module_name(path: str) -> str:
    """Name as in ORDER of a file given relative to the package: models/fcos.py, __init__.py."""
    parts = path.removesuffix(".py").split("/")
    if parts[-1] == "__init__":
        parts.pop()
    return ".".join(parts) or "vovnet"


def full_name(module: str) -> str:
    return module if module == "vovnet" else f"vovnet.{module}"


@cache
def parse(source: str) -> ast.Module:
    return ast.parse(source)


def imports_of(path: str, source: str) -> list[Import]:
    """Every import statement of a file, relative ones resolved."""
    package = ["vovnet", *path.split("/")[:-1]]
    found = []
    for node, in_function in walk(parse(source)):
        if isinstance(node, ast.Import):
            found += [Import(name.name, node.lineno, in_function) for name in node.names]
        elif isinstance(node, ast.ImportFrom):
            base = package[: len(package) - node.level + 1] if node.level else []
            stem = ".".join([*base, *filter(None, [node.module])])
            found += [
                Import(f"{stem}.{name.name}", node.lineno, in_function) for name in node.names
            ]
    return found


def walk(tree: ast.AST, in_function: bool = False) -> Iterator[tuple[ast.AST, bool]]:
    for node in ast.iter_child_nodes(tree):
        yield node, in_function
        inside = isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.Lambda)
        yield from walk(node, in_function or inside)


def is_own(target: str) -> bool:
    return target.split(".")[0] == "vovnet"


def resolve(target: str, modules: set[str]) -> str | None:
    """The module of the package, as named in ORDER, that importing `target` runs; None if none."""
    for name in (target, target.rpartition(".")[0]):
        if name == "vovnet" or name.removeprefix("vovnet.") in modules:
            return name.removeprefix("vovnet.")
    return None


def own_imports(sources: Mapping[str, str]) -> dict[str, list[tuple[Import, str | None]]]:
    modules = {module_name(path) for path in sources}
    return {
        module_name(path): [
            (found, resolve(found.target, modules))
            for found in imports_of(path, source)
            if is_own(found.target)
        ]
        for path, source in sources.items()
    }


def check_listed(sources: Mapping[str, str], order: Sequence[str]) -> list[str]:
    problems = []
    listed = set(order)
    for path, source in sources.items():
        if path.endswith("/__init__.py"):
            statements = [node for node in parse(source).body if not isinstance(node, ast.Expr)]
            if statements:
                problems.append(f"{path}:{statements[0].lineno}: expected a docstring only")
        elif module_name(path) not in listed:
            problems.append(f"{path}: not in ORDER")
    present = {module_name(path) for path in sources}
    return problems + [f"{module}: in ORDER, but no such file" for module in listed - present]


def check_direction(sources: Mapping[str, str], order: Sequence[str]) -> list[str]:
    rank = {module: index for index, module in enumerate(order)}
    problems = []
    for module, imports in own_imports(sources).items():
        for found, target in imports:
            if target is None:
                problems.append(f"{module}:{found.line}: no such module {found.target}")
            elif rank.get(target, -1) >= rank.get(module, len(order)):
                problems.append(f"{module}:{found.line}: upward import of {target}")
    return problems


def check_cycles(sources: Mapping[str, str]) -> list[str]:
    graph = {
        module: {target for _, target in imports if target is not None}
        for module, imports in own_imports(sources).items()
    }
    try:
        TopologicalSorter(graph).prepare()
    except CycleError as error:
        return [f"cycle: {' -> '.join(error.args[1])}"]
    return []


def check_functions(sources: Mapping[str, str]) -> list[str]:
    return [
        f"{module}:{found.line}: import of {found.target} inside a function"
        for module, imports in own_imports(sources).items()
        for found, _ in imports
        if found.in_function
    ]


def check_dynamic(sources: Mapping[str, str]) -> list[str]:
    """import_module and __import__ take the literal name of somebody else's module."""
    problems = []
    for path, source in sources.items():
        for node, _ in walk(parse(source)):
            if path == "_lazy.py" or not isinstance(node, ast.Call):
                continue
            if called_name(node) not in {"import_module", "__import__"}:
                continue
            name = literal_start(node)
            if name is None or is_own(name) or name.startswith("."):
                problems.append(f"{path}:{node.lineno}: late import of {name or 'a computed name'}")
    return problems


def check_late_loading(sources: Mapping[str, str], loaders: Mapping[str, str]) -> list[str]:
    """Only the named modules use _lazy, and a text they pass to load starts with their prefix."""
    problems = []
    for path, source in sources.items():
        module = module_name(path)
        uses = [found for found in imports_of(path, source) if "vovnet._lazy" in found.target]
        if uses and module not in loaders:
            problems.append(f"{path}:{uses[0].line}: _lazy is not for {module}")
        for node, _ in walk(parse(source)):
            if uses and isinstance(node, ast.Call) and called_name(node) == "load":
                start = literal_start(node)
                if start is not None and not start.startswith(loaders.get(module, "vovnet.")):
                    problems.append(f"{path}:{node.lineno}: {module} may not load {start}")
    return problems


def called_name(node: ast.Call) -> str:
    function = node.func
    return getattr(function, "attr", None) or getattr(function, "id", "")


def literal_start(node: ast.Call) -> str | None:
    """The first argument where it is a text, or the fixed start of an f-string; else None."""
    argument = node.args[0] if node.args else None
    if isinstance(argument, ast.JoinedStr) and argument.values:
        argument = argument.values[0]
    if isinstance(argument, ast.Constant) and isinstance(argument.value, str):
        return argument.value
    return None


def foreign_imports(path: str, source: str) -> list[Import]:
    return [
        found
        for found in imports_of(path, source)
        if not is_own(found.target) and found.target.split(".")[0] not in sys.stdlib_module_names
    ]


def is_within(target: str, allowed: set[str]) -> bool:
    return any(target == name or target.startswith(f"{name}.") for name in allowed)


def check_models(sources: Mapping[str, str]) -> list[str]:
    problems = []
    for path, source in sources.items():
        if not path.startswith("models/"):
            continue
        allowed = MODELS_MAY_IMPORT | (WEIGHTS_MAY_IMPORT if path == "models/weights.py" else set())
        problems += [
            f"{path}:{found.line}: a model may not import {found.target}"
            for found in foreign_imports(path, source)
            if not is_within(found.target, allowed)
        ]
    return problems


def check_numpy_only(sources: Mapping[str, str], numpy_only: set[str]) -> list[str]:
    own = own_imports(sources)
    problems = []
    for path, source in sources.items():
        module = module_name(path)
        if module not in numpy_only:
            continue
        problems += [
            f"{path}:{found.line}: {module} is to work without {found.target}"
            for found in foreign_imports(path, source)
            if found.target.split(".")[0] in {"torch", "torchvision", "timm"}
        ]
        problems += [
            f"{path}:{found.line}: {module} is to work without torch, but uses {target}"
            for found, target in own[module]
            if target not in numpy_only
        ]
    return problems


def check_dependencies(sources: Mapping[str, str], declared: set[str]) -> list[str]:
    """What loads with a module is a core dependency; extras load where they are used."""
    return [
        f"{path}:{found.line}: {found.target} is no core dependency"
        for path, source in sources.items()
        for found in foreign_imports(path, source)
        if not found.in_function and not is_within(found.target, declared)
    ]


def core_dependencies() -> set[str]:
    """Import names of the dependencies in pyproject.toml that no extra is needed for."""
    project = tomllib.loads((PACKAGE.parent.parent / "pyproject.toml").read_text())["project"]
    names = {requirement.split(">")[0].strip() for requirement in project["dependencies"]}
    return {IMPORT_NAMES.get(name, name) for name in names} | {"pydantic_core"}


def read_sources() -> dict[str, str]:
    return {
        path.relative_to(PACKAGE).as_posix(): path.read_text(encoding="utf-8")
        for path in sorted(PACKAGE.rglob("*.py"))
    }


def test_every_file_has_its_place() -> None:
    assert check_listed(read_sources(), ORDER) == []


def test_no_upward_imports() -> None:
    assert check_direction(read_sources(), ORDER) == []


def test_no_cycles() -> None:
    assert check_cycles(read_sources()) == []


def test_no_own_imports_inside_functions() -> None:
    assert check_functions(read_sources()) == []


def test_no_late_imports_but_in_lazy() -> None:
    assert check_dynamic(read_sources()) == []
    assert check_late_loading(read_sources(), LATE_LOADERS) == []


def test_models_know_tensors_only() -> None:
    assert check_models(read_sources()) == []


def test_numpy_modules_do_without_torch() -> None:
    assert check_numpy_only(read_sources(), NUMPY_ONLY) == []
    assert set(ORDER) >= NUMPY_ONLY


def test_the_core_needs_no_extra() -> None:
    assert check_dependencies(read_sources(), core_dependencies()) == []


@pytest.mark.parametrize(
    "target",
    [*_lazy.ATTRIBUTES.values(), *_lazy.COMMANDS.values(), *_lazy.ENGINES.values()],
)
def test_every_lazy_entry_resolves(target: str) -> None:
    assert _lazy.load(target) is not None


def test_lazy_entries_keep_the_direction() -> None:
    order = {full_name(module): index for index, module in enumerate(ORDER)}
    for target in _lazy.ATTRIBUTES.values():
        assert order[target.split(":")[0]] < order["vovnet.cli.check"], target
    for target in _lazy.ENGINES.values():
        assert target.startswith(LATE_LOADERS["runtime.engine"]), target
        assert order[target.split(":")[0]] < order["vovnet.runtime.engine"], target
    for target in _lazy.COMMANDS.values():
        assert target.startswith(LATE_LOADERS["cli.options"]), target
        assert order[target.split(":")[0]] < order["vovnet.cli.options"], target


@pytest.mark.parametrize("recipe", sorted(path.stem for path in PACKAGE.glob("recipes/[!_]*.py")))
def test_every_recipe_resolves(recipe: str) -> None:
    assert _lazy.load(f"vovnet.recipes.{recipe}:RECIPES")


# The checker itself, on made-up packages.

GOOD = {
    "__init__.py": "from vovnet.models.zoo import create\n",
    "errors.py": "import numpy as np\n",
    "models/__init__.py": '"""Networks."""\n',
    "models/layers.py": "import torch\nfrom torchvision.ops import nms\nfrom ..errors import E\n",
    "models/zoo.py": "from vovnet.models import layers\nfrom . import layers\n",
}
GOOD_ORDER = ["errors", "models.layers", "models.zoo", "vovnet"]


def changed(**files: str) -> dict[str, str]:
    """GOOD with files added or replaced; a name like models_zoo stands for models/zoo.py."""
    return GOOD | {f"{name.replace('_', '/')}.py": source for name, source in files.items()}


def test_a_good_package_has_no_problem() -> None:
    assert check_listed(GOOD, GOOD_ORDER) == []
    assert check_direction(GOOD, GOOD_ORDER) == []
    assert check_cycles(GOOD) == []
    assert check_functions(GOOD) == []
    assert check_dynamic(GOOD) == []
    assert check_late_loading(GOOD, LATE_LOADERS) == []
    assert check_models(GOOD) == []
    assert check_numpy_only(GOOD, {"errors"}) == []
    assert check_dependencies(GOOD, {"numpy", "torch", "torchvision"}) == []


def test_an_unlisted_file_is_found() -> None:
    assert check_listed(changed(extra=""), GOOD_ORDER) == ["extra.py: not in ORDER"]


def test_a_missing_file_is_found() -> None:
    problems = check_listed(GOOD, [*GOOD_ORDER, "predict"])
    assert problems == ["predict: in ORDER, but no such file"]


def test_code_in_the_init_of_a_subpackage_is_found() -> None:
    sources = GOOD | {"models/__init__.py": '"""Networks."""\nfrom .zoo import create\n'}
    assert check_listed(sources, GOOD_ORDER) == ["models/__init__.py:2: expected a docstring only"]


@pytest.mark.parametrize(
    "statement",
    [
        "from vovnet.models.zoo import create",
        "from vovnet.models import zoo",
        "import vovnet.models.zoo",
        "import vovnet.models.zoo as z",
        "from . import zoo",
        "from .zoo import create",
        "from ..models.zoo import create",
        "if TYPE_CHECKING:\n    from .zoo import create",
        "try:\n    from .zoo import create\nexcept ImportError: ...",
        "class A:\n    from .zoo import create",
        "def f():\n    from .zoo import create",
    ],
)
def test_an_upward_import_is_found_in_every_spelling(statement: str) -> None:
    problems = check_direction(changed(models_layers=statement), GOOD_ORDER)
    assert len(problems) == 1
    assert problems[0].endswith("upward import of models.zoo")
    assert problems[0].startswith("models.layers:")


@pytest.mark.parametrize(
    "statement", ["import vovnet", "from vovnet import create", "from .. import x"]
)
def test_an_import_of_the_root_is_upward(statement: str) -> None:
    problems = check_direction(changed(models_zoo=statement), GOOD_ORDER)
    assert problems == ["models.zoo:1: upward import of vovnet"]


def test_an_import_of_itself_is_upward() -> None:
    problems = check_direction(changed(errors="from vovnet.errors import E"), GOOD_ORDER)
    assert problems == ["errors:1: upward import of errors"]


def test_an_import_of_nothing_is_found() -> None:
    problems = check_direction(changed(errors="from vovnet.nothing import E"), GOOD_ORDER)
    assert problems == ["errors:1: no such module vovnet.nothing.E"]


def test_a_cycle_is_found() -> None:
    problems = check_cycles(changed(models_layers="from vovnet.models.zoo import create"))
    assert len(problems) == 1
    assert "models.layers -> models.zoo" in problems[0]


@pytest.mark.parametrize(
    "source",
    [
        "def f():\n    from vovnet.errors import E",
        "async def f():\n    import vovnet.errors",
        "class A:\n    def f(self):\n        if True:\n            from ..errors import E",
        "def f():\n    class A:\n        from ..errors import E",
    ],
)
def test_an_import_inside_a_function_is_found(source: str) -> None:
    problems = check_functions(changed(models_zoo=source))
    assert len(problems) == 1
    assert "inside a function" in problems[0]


def test_others_may_be_imported_inside_a_function() -> None:
    assert check_functions(changed(models_zoo="def f():\n    import matplotlib")) == []


@pytest.mark.parametrize(
    "source",
    [
        "import importlib\nimportlib.import_module('vovnet.models.zoo')",
        "from importlib import import_module\nimport_module('vovnet')",
        "from importlib import import_module\nimport_module('.zoo', 'vovnet.models')",
        "from importlib import import_module\nimport_module(name)",
        "from importlib import import_module\nimport_module(f'vovnet.{name}')",
        "from importlib import import_module\nimport_module(f'{name}')",
        "__import__('vovnet.models.zoo')",
        "def f():\n    return __import__(name)",
    ],
)
def test_a_late_import_is_found(source: str) -> None:
    assert len(check_dynamic(changed(errors=source))) == 1
    assert check_dynamic(GOOD | {"_lazy.py": source}) == []


def test_a_late_import_of_an_extra_is_allowed() -> None:
    source = "import importlib\nimportlib.import_module('zeus.device.gpu')"
    assert check_dynamic(changed(errors=source)) == []


@pytest.mark.parametrize(
    "statement", ["from vovnet import _lazy", "from ._lazy import load", "import vovnet._lazy"]
)
def test_a_stranger_to_late_loading_is_found(statement: str) -> None:
    problems = check_late_loading(changed(errors=statement), LATE_LOADERS)
    assert problems == ["errors.py:1: _lazy is not for errors"]


def test_late_loading_of_what_is_not_ones_own_is_found() -> None:
    source = "from vovnet import _lazy\n_lazy.load(f'vovnet.{}:config')"
    sources = changed(training_config=source.replace("{}", "cli.{name}"))
    problems = check_late_loading(sources, LATE_LOADERS)
    assert problems == ["training/config.py:2: training.config may not load vovnet.cli."]
    sources = changed(training_config=source.replace("{}", "recipes.{name}"))
    assert check_late_loading(sources, LATE_LOADERS) == []


@pytest.mark.parametrize(
    "statement",
    [
        "import timm",
        "import torchvision",
        "from torchvision import transforms",
        "from torchvision.models import resnet50",
        "import PIL.Image",
        "from huggingface_hub import hf_hub_download",
        "def f():\n    import timm",
    ],
)
def test_a_foreign_package_in_models_is_found(statement: str) -> None:
    problems = check_models(changed(models_layers=statement))
    assert len(problems) == 1
    assert "a model may not import" in problems[0]
    assert check_models(changed(errors=statement)) == []


def test_weights_may_reach_the_hub() -> None:
    sources = changed(models_weights="import huggingface_hub\nfrom safetensors.torch import load")
    assert check_models(sources) == []


@pytest.mark.parametrize(
    "statement",
    [
        "import torch",
        "from torch.nn import Module",
        "import torchvision.ops",
        "def f(): import torch",
    ],
)
def test_torch_in_a_numpy_module_is_found(statement: str) -> None:
    assert len(check_numpy_only(changed(errors=statement), {"errors"})) == 1


def test_torch_by_a_detour_is_found() -> None:
    sources = changed(predict="from vovnet.models.layers import nms")
    problems = check_numpy_only(sources, {"errors", "predict"})
    assert problems == ["predict.py:1: predict is to work without torch, but uses models.layers"]


def test_an_extra_that_loads_with_a_module_is_found() -> None:
    problems = check_dependencies(changed(errors="from matplotlib import pyplot"), {"numpy"})
    assert "errors.py:1: matplotlib.pyplot is no core dependency" in problems
    sources = {"errors.py": "def f():\n    from matplotlib import pyplot"}
    assert check_dependencies(sources, {"numpy"}) == []
