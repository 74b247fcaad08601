"""The package as others get it: the wheel's content, its metadata, and how fast it answers."""

import importlib.util
import resource
import statistics
import subprocess
import sys
import tomllib
import zipfile
from email import message_from_bytes
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

ROOT = Path(__file__).parent.parent
PACKAGE = ROOT / "src" / "vovnet"
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
MAX_MODEL_BYTES = 14_000_000


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    for module in ("build", "hatchling"):
        if importlib.util.find_spec(module) is None:
            pytest.skip(f"{module} is not installed; it is part of the extra `dev`")
    folder = tmp_path_factory.mktemp("wheel")
    command = [sys.executable, "-m", "build", "--wheel", "--no-isolation", "--outdir", str(folder)]
    result = subprocess.run(
        command, cwd=ROOT, capture_output=True, text=True, timeout=120, check=False
    )
    assert result.returncode == 0, result.stdout + result.stderr
    [path] = folder.glob("*.whl")
    return path


@pytest.fixture(scope="module")
def names(wheel: Path) -> set[str]:
    with zipfile.ZipFile(wheel) as archive:
        return set(archive.namelist())


def test_the_wheel_holds_the_package_and_nothing_else(names: set[str]) -> None:
    info = f"vovnet-{PROJECT['version']}.dist-info"
    expected = {
        f"vovnet/{path.relative_to(PACKAGE).as_posix()}"
        for path in PACKAGE.rglob("*")
        if path.is_file() and "__pycache__" not in path.parts
    }
    assert {name for name in names if not name.startswith(f"{info}/")} == expected
    assert f"{info}/licenses/LICENSE" in names


def test_the_wheel_is_typed(names: set[str]) -> None:
    assert "vovnet/py.typed" in names


def test_the_wheel_holds_the_recipes(names: set[str]) -> None:
    recipes = {f"vovnet/recipes/{path.name}" for path in PACKAGE.glob("recipes/[!_]*.py")}
    if not recipes:
        pytest.skip("this checkout has no recipe")
    assert recipes <= names


def test_the_wheel_holds_the_bundled_models(names: set[str]) -> None:
    folders = [path.parent for path in PACKAGE.glob("bundled/*/config.json")]
    if not folders:
        pytest.skip("this checkout has no bundled model")
    for folder in folders:
        for name in ("config.json", "model.safetensors", "README.md"):
            assert f"vovnet/bundled/{folder.name}/{name}" in names


def test_bundled_models_are_small() -> None:
    for folder in PACKAGE.glob("bundled/*/"):
        assert sum(path.stat().st_size for path in folder.iterdir()) <= MAX_MODEL_BYTES, folder


def test_the_metadata_of_the_wheel(wheel: Path) -> None:
    info = f"vovnet-{PROJECT['version']}.dist-info"
    with zipfile.ZipFile(wheel) as archive:
        metadata = message_from_bytes(archive.read(f"{info}/METADATA"))
        entry_points = archive.read(f"{info}/entry_points.txt").decode()
    assert metadata["Name"] == "vovnet"
    assert metadata["License-Expression"] == "Apache-2.0"
    assert metadata["Requires-Python"] == ">=3.11"
    assert "vovnet = vovnet.cli.main:main" in entry_points


def test_the_unpacked_wheel_imports(wheel: Path, tmp_path: Path) -> None:
    with zipfile.ZipFile(wheel) as archive:
        archive.extractall(tmp_path)
    code = "import vovnet; print(vovnet.__version__, vovnet.__file__, vovnet.read_image.__name__)"
    result = subprocess.run(
        [sys.executable, "-c", code],
        cwd=tmp_path,
        env={"PYTHONPATH": str(tmp_path)},
        capture_output=True,
        text=True,
        timeout=60,
        check=True,
    )
    version, file, name = result.stdout.split()
    assert version == PROJECT["version"]
    assert Path(file).is_relative_to(tmp_path)
    assert name == "read_image"


def test_constraints_name_every_direct_dependency_within_its_bounds() -> None:
    pinned = {}
    for line in (ROOT / "constraints.txt").read_text(encoding="utf-8").splitlines():
        if line and not line.startswith("#"):
            requirement = Requirement(line)
            [specifier] = requirement.specifier
            assert specifier.operator == "=="
            pinned[canonicalize_name(requirement.name)] = specifier.version
    extras = PROJECT["optional-dependencies"]
    installed = ("train", "export", "energy", "profile", "parquet", "dev")  # what `make` installs
    tested = [*PROJECT["dependencies"], *(text for name in installed for text in extras[name])]
    direct = [Requirement(text) for text in tested if not text.startswith("vovnet[")]
    for requirement in direct:
        version = pinned[canonicalize_name(requirement.name)]
        assert requirement.specifier.contains(version), requirement
    assert set(pinned) == {canonicalize_name(requirement.name) for requirement in direct}


def test_help_answers_quickly() -> None:
    times_s = []
    for _ in range(3):
        before = resource.getrusage(resource.RUSAGE_CHILDREN)
        result = subprocess.run(
            [sys.executable, "-c", "from vovnet.cli.main import main; main()", "--help"],
            env={"PYTHONPATH": str(ROOT / "src"), "COLUMNS": "100"},
            capture_output=True,
            text=True,
            timeout=60,
            check=False,
        )
        after = resource.getrusage(resource.RUSAGE_CHILDREN)
        times_s.append(after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime)
        assert result.returncode == 0, result.stderr
        assert "train" in result.stdout
    # Processor time, since other work may share the cores; the bar on an idle machine is 0.5 s.
    assert statistics.median(times_s) < 1.5


def test_help_loads_no_torch() -> None:
    code = (
        "import sys\nfrom vovnet.cli.main import main\n"
        "try:\n    main()\nexcept SystemExit:\n    print('torch' in sys.modules)"
    )
    result = subprocess.run(
        [sys.executable, "-c", code, "--help"],
        env={"PYTHONPATH": str(ROOT / "src")},
        capture_output=True,
        text=True,
        timeout=60,
        check=True,
    )
    assert result.stdout.split()[-1] == "False"
