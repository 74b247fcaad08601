"""Files that are either whole or not there: atomic writes, numbered run folders, the cache."""

import json
import os
import secrets
import shutil
from collections.abc import Iterable, Iterator
from contextlib import contextmanager, suppress
from itertools import count
from pathlib import Path

from .errors import ConfigError

MAX_RUN_NAME_LENGTH = 100


@contextmanager
def atomic_path(path: Path) -> Iterator[Path]:
    """Yield a temporary path beside `path` that takes its place when the block ends well.

    The temporary file exists, is empty and has the suffix of `path`. At the end it is written
    through to the disk and renamed over `path` in one step. When the block raises, the temporary
    file is removed and `path` keeps its old content. A process that is killed leaves `path` old
    or new, never half, and perhaps a hidden temporary file.

    Raises ConfigError where `path` is a folder or a device, and OSError naming `path` when its
    folder does not exist or cannot be written.
    """
    if path.exists() and not path.is_file():
        raise ConfigError(f"{path}: expected a file to write, found a folder or a device")
    # Not tempfile: its files are private (0600) and would stay so after the rename.
    temporary = path.parent / f".{path.stem[:40]}-{secrets.token_hex(8)}{path.suffix}"
    with _naming(path, instead_of=temporary):
        os.close(os.open(temporary, os.O_CREAT | os.O_EXCL | os.O_WRONLY, 0o666))
        try:
            yield temporary
            _sync(temporary)
            if path.exists():
                shutil.copymode(path, temporary)
            os.replace(temporary, path)
        except BaseException:
            temporary.unlink(missing_ok=True)
            raise
        _sync_folder(path.parent)


@contextmanager
def _naming(path: Path, *, instead_of: Path) -> Iterator[None]:
    """Errors of the system name the file that the user knows; a full disk names none by itself."""
    try:
        yield
    except OSError as error:
        if error.errno is not None and error.filename in (None, str(instead_of), instead_of):
            raise OSError(error.errno, error.strerror, str(path)) from error
        raise


def atomic_write_text(path: Path, text: str) -> None:
    """Write `text` as UTF-8 with the line ends it has; see `atomic_path`."""
    atomic_write_bytes(path, text.encode("utf-8"))


def atomic_write_bytes(path: Path, data: bytes) -> None:
    """Write `data`; see `atomic_path`."""
    with atomic_path(path) as temporary:
        temporary.write_bytes(data)


def atomic_write_json(path: Path, value: object, *, indent: int | None = 2) -> None:
    """Write `value` as standard JSON with a final line end; see `atomic_path`.

    `indent=None` gives the compact form for large lists. Raises ValueError for NaN and infinity,
    which JSON does not have, and TypeError for values that are not plain; nothing is written.
    """
    text = json.dumps(value, indent=indent, ensure_ascii=False, allow_nan=False)
    atomic_write_text(path, text + "\n")


def new_run_dir(root: Path, name: str) -> Path:
    """Create and return `root/name-N` with the lowest N from 1 that is free.

    Two processes that ask at the same time get different folders. `root` is created when
    missing. Raises ConfigError when `name` cannot be part of a folder's name.
    """
    _check_run_name(name)
    root.mkdir(parents=True, exist_ok=True)
    for number in count(1):
        candidate = root / f"{name}-{number}"
        try:
            candidate.mkdir()
        except FileExistsError:
            continue
        return candidate
    raise AssertionError("unreachable: the numbers do not end")


@contextmanager
def kept_if_filled(folder: Path) -> Iterator[None]:
    """Make a folder, with those above it; of these, take away at the end what has stayed empty.

    Folders that were there before stay in any case.
    """
    made = [one for one in (folder, *folder.parents) if not one.exists()]
    folder.mkdir(parents=True, exist_ok=True)
    try:
        yield
    finally:
        remove_empty(made)


def remove_empty(folders: Iterable[Path]) -> None:
    """Remove folders in this order, up to the first that holds something."""
    with suppress(OSError):
        for folder in folders:
            folder.rmdir()


def cache_folder() -> Path:
    """Where what was measured is kept: XDG_CACHE_HOME/vovnet, or ~/.cache/vovnet."""
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "vovnet"


def _check_run_name(name: str) -> None:
    allowed = name.isprintable() and not set(name) & set('/\\:*?"<>|')
    if not allowed or not 1 <= len(name) <= MAX_RUN_NAME_LENGTH or name.startswith("."):
        raise ConfigError(
            f"run name: expected 1 to {MAX_RUN_NAME_LENGTH} printable characters, no leading dot "
            f'and none of / \\ : * ? " < > |, got {name!r}'
        )


def _sync(path: Path) -> None:
    with path.open("rb+") as stream:
        os.fsync(stream.fileno())


def _sync_folder(folder: Path) -> None:
    if os.name == "nt":  # folders cannot be opened there
        return
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
