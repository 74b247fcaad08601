"""Everything that a training needs to go on exactly, in one file of tensors and plain values."""

import pickle
import random
import subprocess
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, fields
from importlib import metadata
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from vovnet.errors import ConfigError
from vovnet.files import atomic_path

FORMAT_VERSION = 2
LAST = "last.pt"


@dataclass(slots=True)
class Position:
    """Where a training stands, in numbers that a checkpoint stores."""

    step: int = 0  # finished optimizer steps
    epoch: int = 0  # finished epochs
    batch: int = 0  # finished batches of the epoch under way
    spent_s: float = 0.0  # wall time, evaluations included
    taught_s: float = 0.0  # of these, before the first step, with a teacher
    evaluated_s: float = 0.0  # spent_s at the latest evaluation
    evaluated_step: int = 0  # step at the latest evaluation
    best_metric: float = -1.0
    best_step: int = 0
    evaluations_since_best: int = 0
    window_steps: int = 0  # steps since the latest line of metrics.jsonl
    window_losses: dict[str, float] = field(default_factory=dict)  # their sums over these steps

    @property
    def trained_s(self) -> float:
        """Wall time since the first step."""
        return self.spent_s - self.taught_s


@dataclass(slots=True)
class Checkpoint:
    """The content of a checkpoint file."""

    model: dict[str, Tensor]  # and what is learnt beside it, such as a teacher's projection
    ema: dict[str, Any]
    optimizer: dict[str, Any]
    position: Position
    random_states: dict[str, Any]
    config: dict[str, Any]
    class_names: list[str]
    library: str


def save_checkpoint(path: Path, checkpoint: Checkpoint) -> None:
    """Write the file so that at any moment `path` is either the old or the new whole file."""
    content = {entry.name: getattr(checkpoint, entry.name) for entry in fields(checkpoint)}
    content["position"] = asdict(checkpoint.position)
    save_plain(path, {"format_version": FORMAT_VERSION, **content})


def load_checkpoint(path: Path) -> Checkpoint:
    """Read a checkpoint without running any code that it may hold; tensors arrive on the CPU.

    Raises ConfigError for a file that is missing, damaged, of another format, or not plain data.
    """
    content = load_plain(path)
    expected = {entry.name for entry in fields(Checkpoint)} | {"format_version"}
    if content.get("format_version") != FORMAT_VERSION:
        raise ConfigError(
            f"{path}: expected a training checkpoint of format {FORMAT_VERSION}, "
            f"found {content.get('format_version')!r}"
        )
    if set(content) != expected:
        raise ConfigError(f"{path}: expected the keys {sorted(expected)}, found {sorted(content)}")
    values = {key: value for key, value in content.items() if key != "format_version"}
    try:
        values["position"] = Position(**values["position"])
    except TypeError as error:
        raise ConfigError(f"{path}: expected the fields of Position, found: {error}") from error
    return Checkpoint(**values)


def find_checkpoint(resume: Path) -> Path:
    """The checkpoint a run folder holds, or this one; raises ConfigError where there is none."""
    file = resume / LAST if resume.is_dir() else resume
    if not file.is_file():
        raise ConfigError(f"resume: expected a checkpoint at {file}, found none")
    return file


def save_plain(path: Path, content: Mapping[str, Any]) -> None:
    """Write tensors and plain values; at any moment `path` is the old or the new whole file."""
    with atomic_path(path) as temporary:
        try:
            torch.save(dict(content), temporary)
        except RuntimeError as error:  # a full disk, in the words of torch's own writer
            reason = str(error).splitlines()[0]
            raise OSError(f"{path}: cannot be written, is the disk full? ({reason})") from error


def load_plain(path: Path) -> dict[str, Any]:
    """A mapping of tensors and plain values out of a file of torch.save; nothing else is loaded.

    Raises ConfigError naming the file, with what was expected and found.
    """
    if not path.is_file():
        raise ConfigError(f"{path}: expected a file of weights, found none")
    try:
        content = torch.load(path, map_location="cpu", weights_only=True)
    except (pickle.UnpicklingError, RuntimeError, EOFError, OSError, ValueError, KeyError) as error:
        reason = (str(error).strip().splitlines() or [type(error).__name__])[0]
        raise ConfigError(
            f"{path}: expected a whole file of tensors and plain values, found: {reason}"
        ) from error
    if not isinstance(content, dict):
        raise ConfigError(f"{path}: expected a mapping, found {type(content).__name__}")
    return content


def capture_random_states() -> dict[str, Any]:
    """The states of the global generators of torch, NumPy and Python as plain values."""
    name, keys, position, has_gauss, cached = np.random.get_state(legacy=True)
    return {
        "torch": torch.get_rng_state(),
        "cuda": torch.cuda.get_rng_state_all() if torch.cuda.is_available() else [],
        "numpy": [str(name), torch.from_numpy(np.array(keys, dtype=np.int64)), int(position)],
        "numpy_gauss": [int(has_gauss), float(cached)],
        "python": random.getstate(),
    }


def restore_random_states(states: Mapping[str, Any]) -> None:
    """Set the global generators to what capture_random_states gave."""
    torch.set_rng_state(states["torch"])
    if states["cuda"] and len(states["cuda"]) == torch.cuda.device_count():
        torch.cuda.set_rng_state_all(states["cuda"])
    name, keys, position = states["numpy"]
    has_gauss, cached = states["numpy_gauss"]
    np.random.set_state((name, keys.numpy().astype(np.uint32), position, has_gauss, cached))
    random.setstate(states["python"])


def library_version() -> str:
    """Version of this library, with the commit (and `-dirty`) where it runs from a checkout."""
    try:
        version = metadata.version("vovnet")
    except metadata.PackageNotFoundError:
        version = "unknown"
    root = Path(__file__).resolve().parents[3]
    if not (root / ".git").exists():
        return version
    describe = ["describe", "--always", "--dirty", "--abbrev=40", "--exclude=*"]
    command = ["git", "-C", str(root), *describe]
    try:
        commit = subprocess.run(command, capture_output=True, text=True, timeout=10, check=True)
    except (OSError, subprocess.SubprocessError):
        return version
    return f"{version}+{commit.stdout.strip()}"
