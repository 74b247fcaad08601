import errno
import json
import os
import threading
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from vovnet.errors import ConfigError
from vovnet.files import (
    atomic_path,
    atomic_write_bytes,
    atomic_write_json,
    atomic_write_text,
    cache_folder,
    kept_if_filled,
    new_run_dir,
)


def names_in(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def fail_half_way(target: Path, error: type[BaseException]) -> None:
    with atomic_path(target) as temporary:
        temporary.write_text("half")
        raise error


def test_atomic_path_replaces_the_file_and_leaves_nothing_else(tmp_path: Path) -> None:
    target = tmp_path / "model.safetensors"
    target.write_bytes(b"old")
    with atomic_path(target) as temporary:
        assert temporary.parent == tmp_path
        assert temporary.suffix == ".safetensors"
        temporary.write_bytes(b"new")
        assert target.read_bytes() == b"old"
    assert target.read_bytes() == b"new"
    assert names_in(tmp_path) == ["model.safetensors"]


@pytest.mark.parametrize("error", [RuntimeError, KeyboardInterrupt, SystemExit])
@pytest.mark.parametrize("existed", [True, False])
def test_an_exception_keeps_the_old_content(
    tmp_path: Path, error: type[BaseException], existed: bool
) -> None:
    target = tmp_path / "config.json"
    if existed:
        target.write_text("old")
    with pytest.raises(error):
        fail_half_way(target, error)
    assert names_in(tmp_path) == (["config.json"] if existed else [])
    assert not existed or target.read_text() == "old"


def test_a_failing_rename_removes_the_temporary_file(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(source: Path, target: Path) -> None:
        raise OSError(errno.EXDEV, "no", str(source))

    monkeypatch.setattr(os, "replace", fail)
    with pytest.raises(OSError, match=r"no: '.*/a.txt'$"):
        atomic_write_text(tmp_path / "a.txt", "text")
    assert names_in(tmp_path) == []


@pytest.mark.parametrize("kind", ["folder", "pipe"])
def test_what_is_no_regular_file_stays(tmp_path: Path, kind: str) -> None:
    target = tmp_path / "taken"
    os.mkfifo(target) if kind == "pipe" else target.mkdir()
    mode = target.stat().st_mode
    with pytest.raises(ConfigError, match="taken: expected a file to write, found"):
        atomic_write_text(target, "text")
    assert target.stat().st_mode == mode
    assert names_in(tmp_path) == ["taken"]


def test_a_full_disk_is_told_with_the_file_that_was_asked_for(tmp_path: Path) -> None:
    with (
        pytest.raises(OSError, match=r"full: '.*/a.txt'$"),
        atomic_path(tmp_path / "a.txt"),
    ):
        raise OSError(errno.ENOSPC, "full")  # as a write to an open file does, without a name
    assert names_in(tmp_path) == []


def test_data_reaches_the_disk_before_the_rename_and_the_folder_after(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    calls: list[str] = []
    fsync, replace = os.fsync, os.replace

    def record_fsync(descriptor: int) -> None:
        is_folder = os.path.isdir(f"/proc/self/fd/{descriptor}")
        calls.append("sync folder" if is_folder else "sync file")
        fsync(descriptor)

    def record_replace(source: Path, target: Path) -> None:
        calls.append("replace")
        replace(source, target)

    monkeypatch.setattr(os, "fsync", record_fsync)
    monkeypatch.setattr(os, "replace", record_replace)
    atomic_write_bytes(tmp_path / "a.bin", b"data")
    assert calls == ["sync file", "replace", "sync folder"]


def test_new_files_follow_the_umask_and_old_ones_keep_their_mode(tmp_path: Path) -> None:
    target = tmp_path / "a.txt"
    previous = os.umask(0o022)
    try:
        atomic_write_text(target, "one")
        assert target.stat().st_mode & 0o777 == 0o644
        target.chmod(0o600)
        atomic_write_text(target, "two")
    finally:
        os.umask(previous)
    assert target.stat().st_mode & 0o777 == 0o600
    assert target.read_text() == "two"


def test_a_name_of_greatest_length_can_be_written(tmp_path: Path) -> None:
    target = tmp_path / ("é" * 125 + ".json")
    atomic_write_text(target, "x")
    assert names_in(tmp_path) == [target.name]


def test_a_missing_folder_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match=r"nowhere/a\.txt"):
        atomic_write_text(tmp_path / "nowhere" / "a.txt", "text")


@given(text=st.text(st.characters(exclude_categories=["Cs"])))
@settings(deadline=None, max_examples=30)
def test_text_is_written_as_utf8_with_its_line_ends(
    tmp_path_factory: pytest.TempPathFactory, text: str
) -> None:
    target = tmp_path_factory.getbasetemp() / "text.txt"
    atomic_write_text(target, text)
    assert target.read_bytes() == text.encode("utf-8")


@pytest.mark.parametrize("indent", [2, None])
def test_json_round_trip(tmp_path: Path, indent: int | None) -> None:
    value = {"name": "Zelle é", "sizes": [1, 2.5, None, True]}
    atomic_write_json(tmp_path / "a.json", value, indent=indent)
    text = (tmp_path / "a.json").read_text(encoding="utf-8")
    assert json.loads(text) == value
    assert "é" in text
    assert text.endswith("}\n")
    assert text.count("\n") == (1 if indent is None else 9)


@pytest.mark.parametrize("value", [float("nan"), float("inf"), {1, 2}])
def test_json_refuses_what_json_has_not(tmp_path: Path, value: object) -> None:
    target = tmp_path / "a.json"
    target.write_text("old")
    with pytest.raises((ValueError, TypeError)):
        atomic_write_json(target, [value])
    assert names_in(tmp_path) == ["a.json"]
    assert target.read_text() == "old"


def test_run_dirs_take_the_lowest_free_number(tmp_path: Path) -> None:
    root = tmp_path / "runs" / "train"
    made = [new_run_dir(root, "nuclei") for _ in range(3)]
    assert [path.name for path in made] == ["nuclei-1", "nuclei-2", "nuclei-3"]
    made[1].rmdir()
    assert new_run_dir(root, "nuclei") == root / "nuclei-2"
    assert new_run_dir(root, "cells") == root / "cells-1"
    assert made[0].is_dir()


def test_run_dirs_asked_for_at_once_differ(tmp_path: Path) -> None:
    made: list[Path] = []
    start = threading.Barrier(8)

    def ask() -> None:
        start.wait()
        made.extend(new_run_dir(tmp_path, "run") for _ in range(5))

    threads = [threading.Thread(target=ask) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert sorted(int(path.name.split("-")[1]) for path in made) == list(range(1, 41))


@pytest.mark.parametrize(
    "name", ["", ".", "..", ".hidden", "a/b", "../../x", "a\\b", "a\0b", "a\nb", "C:", "x" * 101]
)
def test_run_names_that_are_no_folder_names_are_refused(tmp_path: Path, name: str) -> None:
    with pytest.raises(ConfigError, match="run name: expected"):
        new_run_dir(tmp_path / "runs", name)
    assert names_in(tmp_path) == []


def test_the_cache_is_where_the_environment_says(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", "/somewhere")
    assert cache_folder() == Path("/somewhere/vovnet")
    monkeypatch.setenv("XDG_CACHE_HOME", "")
    monkeypatch.setenv("HOME", "/home/me")
    assert cache_folder() == Path("/home/me/.cache/vovnet")


def test_a_folder_stays_if_it_is_filled(tmp_path: Path) -> None:
    with kept_if_filled(tmp_path / "a" / "b"):
        (tmp_path / "a" / "other").mkdir()
    assert [path.name for path in (tmp_path / "a").iterdir()] == ["other"]
    with kept_if_filled(tmp_path / "c" / "d"):
        (tmp_path / "c" / "d" / "file").touch()
    assert (tmp_path / "c" / "d" / "file").is_file()
    with kept_if_filled(tmp_path / "a" / "other"):
        pass
    assert (tmp_path / "a" / "other").is_dir()  # it was there before
