import importlib.metadata
import subprocess
import sys
from pathlib import Path

import pytest

import vovnet
from vovnet import _lazy

SOURCE_FOLDER = Path(__file__).parent.parent / "src"


def run_python(code: str) -> str:
    """Run code in a fresh Python that has only loaded vovnet, and return what it printed."""
    result = subprocess.run(
        [sys.executable, "-c", f"import sys, vovnet\n{code}"],
        capture_output=True,
        text=True,
        timeout=60,
        check=True,
        env={"PYTHONPATH": str(SOURCE_FOLDER), "OMP_NUM_THREADS": "1"},
    )
    return result.stdout.strip()


def test_all_is_the_table_and_the_version() -> None:
    assert vovnet.__all__ == sorted(vovnet.__all__)
    assert set(vovnet.__all__) == {*_lazy.ATTRIBUTES, "__version__"}


def test_dir_lists_every_public_name() -> None:
    assert set(vovnet.__all__) <= set(dir(vovnet))


def test_a_name_is_loaded_on_first_use() -> None:
    code = (
        "print('vovnet.images' in sys.modules, 'read_image' in vars(vovnet))\n"
        "vovnet.read_image\n"
        "print('vovnet.images' in sys.modules, 'read_image' in vars(vovnet))"
    )
    assert run_python(code).split() == ["False", "False", "True", "True"]


def test_a_loaded_name_is_the_object_of_its_module() -> None:
    from vovnet.images import read_image
    from vovnet.results import Detections

    assert vovnet.read_image is read_image
    assert vovnet.Detections is Detections


def test_an_unknown_name_is_named() -> None:
    with pytest.raises(AttributeError, match="module 'vovnet' has no attribute 'nonsense'"):
        _ = vovnet.nonsense


def test_the_version_is_the_installed_one() -> None:
    try:
        expected = importlib.metadata.version("vovnet")
    except importlib.metadata.PackageNotFoundError:
        pytest.skip("vovnet runs from its sources here, without an installed version")
    assert vovnet.__version__ == expected


def test_load_needs_a_module_and_an_attribute() -> None:
    assert _lazy.load("math:pi") == pytest.approx(3.14159265)
    with pytest.raises(ImportError):
        _lazy.load("vovnet.nothing:at_all")
    with pytest.raises(AttributeError):
        _lazy.load("math:nothing")


def test_import_vovnet_loads_nothing_heavy() -> None:
    own_and_standard = run_python(
        "print(*sorted({name.split('.')[0] for name in sys.modules} - sys.stdlib_module_names))"
    ).split()
    # Path hooks of editable installs and the site may load helpers of their own.
    allowed = {"vovnet", "__main__", "sitecustomize", "usercustomize"}
    loaded = {name for name in own_and_standard if not name.startswith(("_", "distutils"))}
    assert loaded <= allowed


@pytest.mark.parametrize(
    ("name", "absent"),
    [
        ("Detections", ["torch", "PIL.ImageDraw", "timm", "matplotlib"]),
        ("Preprocess", ["torch", "pycocotools"]),
        ("read_image", ["torch", "pycocotools"]),
        ("load_coco", ["torch", "matplotlib"]),
        ("Predictor", ["timm", "matplotlib", "typer", "onnx", "openvino"]),
    ],
)
def test_a_name_loads_only_what_it_needs(name: str, absent: list[str]) -> None:
    loaded = run_python(f"vovnet.{name}\nprint(*sys.modules)").split()
    assert not set(absent) & set(loaded)
