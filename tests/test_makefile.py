"""The set-up logic of the Makefile, run in a copy with a python that only notes its calls."""

import os
import shutil
import subprocess
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent

# Stands for python3 and for .venv/bin/python. FAIL names the call that fails and CODE how.
FAKE_PYTHON = """#!/bin/sh
echo "$*" >> "$CALLS"
case "$*" in
    *"$FAIL"*) exit "$CODE" ;;
    "-m venv "*) mkdir -p "$3/bin" && cp "$0" "$3/bin/python" ;;
esac
"""

pytestmark = pytest.mark.skipif(shutil.which("make") is None, reason="make is not installed")


class Checkout:
    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.calls = folder / "calls"
        for name in ("Makefile", "pyproject.toml", "constraints.txt"):
            shutil.copy(ROOT / name, folder / name)
        self.python = folder / "fake-python"
        self.python.write_text(FAKE_PYTHON)
        self.python.chmod(0o755)

    def make(self, target: str, *, fail: str = "nothing fails", code: int = 1) -> int:
        """Run make and return its exit code; `pythons` then holds the calls of python."""
        self.calls.write_text("")
        environment = {
            "PATH": os.environ["PATH"],
            "CALLS": str(self.calls),
            "FAIL": fail,
            "CODE": str(code),
        }
        result = subprocess.run(
            ["make", target, f"PYTHON={self.python}"],
            cwd=self.folder,
            env=environment,
            capture_output=True,
            text=True,
            timeout=30,
            check=False,
        )
        self.output = result.stdout + result.stderr
        return result.returncode

    @property
    def installed(self) -> bool:
        return "-m pip install" in self.calls.read_text()

    def change_dependencies(self) -> None:
        newer = (self.folder / ".venv/.stamp").stat().st_mtime + 10
        os.utime(self.folder / "pyproject.toml", (newer, newer))


@pytest.fixture
def checkout(tmp_path: Path) -> Checkout:
    return Checkout(tmp_path)


@pytest.mark.parametrize(
    ("target", "command"),
    [
        ("demo", "examples/demo.py"),
        ("test", "-m pytest -q -n 2"),
        ("check", "-m mypy src"),
        ("format", "-m ruff format"),
    ],
)
def test_every_target_installs_once_and_then_starts_at_once(
    checkout: Checkout, target: str, command: str
) -> None:
    assert checkout.make(target) == 0
    assert checkout.installed
    assert command in checkout.calls.read_text().splitlines()
    assert checkout.make(target) == 0
    assert not checkout.installed
    assert command in checkout.calls.read_text().splitlines()


def test_changed_dependencies_are_installed_in_place(checkout: Checkout) -> None:
    checkout.make("demo")
    (checkout.folder / ".venv/kept").touch()
    checkout.change_dependencies()
    assert checkout.make("demo") == 0
    assert checkout.installed
    assert (checkout.folder / ".venv/kept").exists()


@pytest.mark.parametrize("killed_at", ["-m venv", "-m pip install"])
def test_an_interrupted_installation_is_started_afresh(checkout: Checkout, killed_at: str) -> None:
    assert checkout.make("demo", fail=killed_at, code=137) != 0
    (checkout.folder / ".venv/half-written").touch()
    assert checkout.make("demo") == 0
    assert "interrupted: starting it afresh" in checkout.output
    assert checkout.installed
    assert not (checkout.folder / ".venv/half-written").exists()
    assert checkout.make("demo") == 0
    assert not checkout.installed


def test_an_interrupted_update_is_started_afresh(checkout: Checkout) -> None:
    checkout.make("demo")
    checkout.change_dependencies()
    assert checkout.make("demo", fail="-m pip install", code=143) != 0
    (checkout.folder / ".venv/half-written").touch()
    assert checkout.make("demo") == 0
    assert not (checkout.folder / ".venv/half-written").exists()


def test_an_update_that_pip_refuses_keeps_the_environment(checkout: Checkout) -> None:
    checkout.make("demo")
    (checkout.folder / ".venv/kept").touch()
    checkout.change_dependencies()
    assert checkout.make("demo", fail="-m pip install", code=1) != 0
    assert checkout.make("demo") == 0
    assert checkout.installed
    assert (checkout.folder / ".venv/kept").exists()


def test_an_old_python_is_refused_with_the_way_out(checkout: Checkout) -> None:
    assert checkout.make("demo", fail="version_info") != 0
    assert "Python 3.11 or newer is needed" in checkout.output
    assert "make PYTHON=python3.12 demo" in checkout.output
    assert not (checkout.folder / ".venv").exists()


def test_a_python_without_venv_is_refused_with_the_way_out(checkout: Checkout) -> None:
    assert checkout.make("test", fail="import ensurepip, venv") != 0
    assert "python3-venv" in checkout.output
    assert not (checkout.folder / ".venv").exists()


def test_a_failing_step_fails_the_check(checkout: Checkout) -> None:
    for step in ("ruff format", "ruff check", "mypy", "test_architecture"):
        assert checkout.make("check", fail=step) != 0


@pytest.mark.parametrize(
    ("fail", "code"), [("nothing fails", 0), ("-m mypy", 1), ("-m pytest -q -n 2", 1)]
)
def test_ci_runs_both_and_fails_when_either_does(checkout: Checkout, fail: str, code: int) -> None:
    (checkout.folder / ".ci").mkdir()
    shutil.copy(ROOT / ".ci/run", checkout.folder / ".ci/run")
    checkout.calls.write_text("")
    result = subprocess.run(
        ["bash", ".ci/run"],
        cwd=checkout.folder,
        env={
            "PATH": os.environ["PATH"],
            "CALLS": str(checkout.calls),
            "PYTHON": str(checkout.python),
            "FAIL": fail,
            "CODE": "1",
        },
        capture_output=True,
        text=True,
        timeout=30,
        check=False,
    )
    assert result.returncode == code
    assert "=== make check" in result.stdout
    assert "=== make test" in result.stdout
    assert "-m pytest -q -n 2" in checkout.calls.read_text().splitlines()
