"""Tar shards against the members that were put in, and against hostile files."""

import io
import json
import tarfile
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from vovnet.data.classes import load_classes
from vovnet.data.shards import index_shards, shard_order
from vovnet.errors import DataError

Members = list[tuple[str, bytes]]


def jpeg(value: int) -> bytes:
    stream = io.BytesIO()
    Image.new("RGB", (8 + value % 5, 8), (value, 0, 0)).save(stream, "PNG")
    return stream.getvalue()


def write_tar(path: Path, members: Members, *, format: int = tarfile.GNU_FORMAT) -> Path:
    with tarfile.open(path, "w", format=format) as archive:
        for name, content in members:
            member = tarfile.TarInfo(name)
            member.size = len(content)
            archive.addfile(member, io.BytesIO(content))
    return path


def samples(count: int, *, start: int = 0) -> Members:
    numbers = range(start, start + count)
    return [
        member
        for number in numbers
        for member in (
            (f"{number:04d}.png", jpeg(number)),
            (f"{number:04d}.cls", b"%d" % (number % 3)),
        )
    ]


@pytest.mark.parametrize("format", [tarfile.GNU_FORMAT, tarfile.PAX_FORMAT, tarfile.USTAR_FORMAT])
def test_the_places_are_those_of_the_bytes(tmp_path: Path, format: int) -> None:
    paths = [
        write_tar(tmp_path / f"train-{n}.tar", samples(4, start=4 * n), format=format)
        for n in range(2)
    ]
    index = index_shards(paths)
    assert index.files == tuple(map(str, paths))
    assert index.file_of.tolist() == [0, 0, 0, 0, 1, 1, 1, 1]
    assert index.labels.tolist() == [n % 3 for n in range(8)]
    assert index.class_names == ("0", "1", "2")
    for number in range(8):
        content = paths[index.file_of[number]].read_bytes()
        offset, size = index.offsets[number], index.sizes[number]
        assert content[offset : offset + size] == jpeg(number)


def test_load_classes_reads_pictures_out_of_shards(tmp_path: Path) -> None:
    write_tar(tmp_path / "train-0.tar", samples(6))
    (tmp_path / "classes.txt").write_text("고양이\nфилин\ncat\n", encoding="utf-8")
    data = load_classes(tmp_path, "train")
    assert data.class_names == ("고양이", "филин", "cat")
    assert [int(data.read(i)[0, 0, 0]) for i in range(6)] == list(range(6))
    assert data.labels.tolist() == [0, 1, 2, 0, 1, 2]


@pytest.mark.parametrize("format", [tarfile.GNU_FORMAT, tarfile.PAX_FORMAT])
def test_long_and_foreign_names_and_folders(tmp_path: Path, format: int) -> None:
    deep = "d/" * 80 + "고" * 60
    members = [
        ("../../etc/a.png", jpeg(1)),
        ("../../etc/a.cls", b"1\n"),
        (f"{deep}.JPG", jpeg(2)),
        (f"{deep}.json", b'{"label": 0}'),
        ("b/a.webp", jpeg(3)),
        ("b/a.cls", b"1"),
        ("b/a.seg.png", b"not the picture"),
        ("README", b"text"),
        ("._a.png", b"hidden"),
        ("stats.txt", b"other"),
    ]
    index = index_shards([write_tar(tmp_path / "t.tar", members, format=format)])
    assert index.labels.tolist() == [1, 0, 1]
    content = (tmp_path / "t.tar").read_bytes()
    for number, (offset, size) in enumerate(zip(index.offsets, index.sizes, strict=True), start=1):
        assert content[offset : offset + size] == jpeg(number)


def test_class_names_of_a_file_and_of_labels(tmp_path: Path) -> None:
    members = [
        ("a.png", jpeg(1)),
        ("a.json", b'{"class": "dog"}'),
        ("b.png", jpeg(2)),
        ("b.json", b'{"label": "cat"}'),
    ]
    path = write_tar(tmp_path / "t.tar", members)
    index = index_shards([path])
    assert (index.class_names, index.labels.tolist()) == (("cat", "dog"), [1, 0])
    (tmp_path / "classes.json").write_text(json.dumps(["bird", "dog", "cat"]))
    index = index_shards([path])
    assert (index.class_names, index.labels.tolist()) == (("bird", "dog", "cat"), [1, 2])


PICTURE = ("a.png", jpeg(1))
LABEL = ("a.cls", b"1")


@pytest.mark.parametrize(
    ("members", "expected"),
    [
        ([PICTURE], r"'a': expected a label in .cls or .json, found .png"),
        ([LABEL], r"'a': expected one picture \(.*\), found .cls"),
        ([("a.tif", b"x"), LABEL], r"'a': expected one picture"),
        ([PICTURE, ("a.jpg", jpeg(1)), LABEL], r"'a': expected one picture .*found .png, .jpg"),
        ([("a.png", b""), LABEL], r"'a': expected one picture"),
        ([PICTURE, LABEL, PICTURE], r"'a.png': expected one such member, found a second"),
        ([PICTURE, LABEL, ("a.PNG", jpeg(1))], r"'a.PNG': expected one such member"),
        ([PICTURE, ("a.cls", b"dog")], r"'a': .cls: expected a whole number, found b'dog'"),
        ([PICTURE, ("a.cls", b"1.5")], "expected a whole number"),
        ([PICTURE, ("a.cls", b"9" * 5000)], "expected a whole number"),
        ([PICTURE, ("a.cls", b"-1")], r"expected a label in 0\.\.999999, found -1"),
        ([PICTURE, ("a.cls", b"1000000")], r"expected a label in 0\.\.999999"),
        ([PICTURE, ("a.cls", b"1" * (2**20 + 1))], "expected a label in .cls, found 1048577 bytes"),
        ([PICTURE, ("a.json", b"{")], "expected JSON"),
        ([PICTURE, ("a.json", b"[" * 100_000)], "expected JSON"),
        ([PICTURE, ("a.json", b"[1]")], 'expected an object with "label" or "class"'),
        ([PICTURE, ("a.json", b'{"label": true}')], "expected a label in"),
        ([PICTURE, ("a.json", b'{"label": 1.0}')], "expected a label in"),
        ([PICTURE, ("a.json", b'{"label": ""}')], "expected a label in"),
        (
            [PICTURE, LABEL, ("b.png", jpeg(1)), ("b.json", b'{"label": "dog"}')],
            "all numbers or all names",
        ),
    ],
)
def test_wrong_samples_are_named(tmp_path: Path, members: Members, expected: str) -> None:
    with pytest.raises(DataError, match=expected):
        index_shards([write_tar(tmp_path / "t.tar", members)])


@pytest.mark.parametrize(
    ("file", "content", "expected"),
    [
        ("classes.json", b'["a", "a"]', "expected each class once, found 'a' twice"),
        ("classes.json", b'{"a": 0}', "expected a list of names"),
        ("classes.json", b'["a", ""]', "expected a list of names, none of them empty"),
        ("classes.json", b"[", "expected the names of classes in UTF-8"),
        ("classes.txt", b"\xff\n", "expected the names of classes in UTF-8"),
        ("classes.txt", b"a\n\nb\n", "none of them empty"),
        ("classes.txt", b"a\n", r"'0001': .cls: expected a label in 0\.\.0 or the name"),
    ],
)
def test_wrong_class_files_are_named(
    tmp_path: Path, file: str, content: bytes, expected: str
) -> None:
    (tmp_path / file).write_bytes(content)
    with pytest.raises(DataError, match=expected):
        index_shards([write_tar(tmp_path / "t.tar", samples(3))])


@pytest.mark.parametrize("kind", [tarfile.LNKTYPE, tarfile.SYMTYPE, tarfile.FIFOTYPE])
def test_links_and_devices_are_refused(tmp_path: Path, kind: bytes) -> None:
    path = tmp_path / "t.tar"
    with tarfile.open(path, "w") as archive:
        member = tarfile.TarInfo("a.png")
        member.type, member.linkname = kind, "/etc/passwd"
        archive.addfile(member)
    with pytest.raises(DataError, match=r"'a.png': expected a plain file"):
        index_shards([path])


def test_a_sparse_member_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "t.tar"
    headers = {"GNU.sparse.map": "0,1", "GNU.sparse.size": "1000"}
    with tarfile.open(path, "w", format=tarfile.PAX_FORMAT) as archive:
        member = tarfile.TarInfo("a.png")
        member.size, member.pax_headers = 1, headers
        archive.addfile(member, io.BytesIO(b"x"))
    with pytest.raises(DataError, match=r"'a.png': expected"):
        index_shards([path])


@pytest.mark.parametrize("mode", ["w:gz", "w:bz2", "w:xz"])
def test_a_compressed_shard_is_refused(tmp_path: Path, mode: str) -> None:
    path = tmp_path / "t.tar"
    with tarfile.open(path, mode) as archive:  # type: ignore[call-overload]
        archive.addfile(tarfile.TarInfo("a.png"))
    with pytest.raises(DataError, match=r"not compressed, .* unpack it with (gunzip|bunzip2|unxz)"):
        index_shards([path])


def test_a_shard_cut_anywhere_is_refused(tmp_path: Path) -> None:
    path = write_tar(tmp_path / "t.tar", samples(3))
    whole = path.read_bytes()
    end = len(whole.rstrip(b"\0"))  # the last label; its block ends later
    last = -(-end // 512) * 512
    for length in [0, 100, 512, 700, 1024, 1500, 2048, 2560, end - 1, last]:
        path.write_bytes(whole[:length])
        with pytest.raises(DataError, match=r"t\.tar"):
            index_shards([path])
    path.write_bytes(whole[: last + 512])
    assert len(index_shards([path]).labels) == 3


def test_two_shards_in_one_file_are_refused(tmp_path: Path) -> None:
    path = write_tar(tmp_path / "t.tar", samples(3))
    path.write_bytes(path.read_bytes() * 2)
    with pytest.raises(DataError, match="two in one"):
        index_shards([path])


def test_a_damaged_header_is_refused(tmp_path: Path) -> None:
    path = write_tar(tmp_path / "t.tar", samples(3))
    content = bytearray(path.read_bytes())
    second = 512 + -(-len(jpeg(0)) // 512) * 512
    content[second] ^= 1
    path.write_bytes(content)
    with pytest.raises(DataError, match="expected the end of the archive"):
        index_shards([path])


@pytest.mark.parametrize(
    ("size", "expected"),
    [(-512, ""), (-10_240, ""), (10_241, "its 10241 bytes inside the file"), (2**40, "its 10995")],
)
def test_a_size_outside_the_file_is_refused(tmp_path: Path, size: int, expected: str) -> None:
    member = tarfile.TarInfo("a.png")
    member.size = size
    header = member.tobuf(tarfile.GNU_FORMAT)
    (tmp_path / "t.tar").write_bytes(header + bytes(10_240))
    with pytest.raises(DataError, match=rf"t\.tar.*{expected}"):
        index_shards([tmp_path / "t.tar"])


def test_random_damage_ends_in_a_data_error_or_in_places_inside_the_file(tmp_path: Path) -> None:
    path = write_tar(tmp_path / "t.tar", samples(6), format=tarfile.PAX_FORMAT)
    whole = path.read_bytes()
    generator = np.random.default_rng(0)
    refused = 0
    for _ in range(200):
        content = bytearray(whole)
        start = int(generator.integers(len(samples(6)) * 1024 // 512)) * 512
        places = start + generator.integers(0, 512, size=4)
        content[:] = content[: max(512, int(generator.integers(len(content))))] + bytes(1024)
        for place in places[places < len(content)]:
            content[place] = generator.integers(256)
        path.write_bytes(content)
        try:
            index = index_shards([path])
        except DataError:
            refused += 1
        else:
            assert (index.offsets + index.sizes <= len(content)).all()
            assert (index.offsets >= 512).all()
    assert 20 < refused < 200


def test_no_shard_and_no_file(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="at least one tar file"):
        index_shards([])
    with pytest.raises(DataError, match="expected a readable tar file"):
        index_shards([tmp_path / "none.tar"])


@dataclass(frozen=True)
class Located:
    file_of: np.ndarray


LOCATED = Located(np.repeat(np.arange(40), 25))


def test_an_epoch_takes_every_sample_once_in_an_order_of_its_own() -> None:
    orders = [shard_order(LOCATED, seed=s, epoch=e) for s, e in ((0, 0), (0, 1), (1, 0))]
    for order in orders:
        assert np.sort(order).tolist() == list(range(1000))
    assert np.array_equal(orders[0], shard_order(LOCATED, seed=0, epoch=0))
    assert not np.array_equal(orders[0], orders[1])
    assert not np.array_equal(orders[0], orders[2])
    assert not np.array_equal(orders[1], orders[2])


def test_reads_stay_within_a_few_shards_at_once() -> None:
    order = shard_order(LOCATED, seed=3, epoch=2, shards_at_once=8)
    groups = [set(LOCATED.file_of[order[start : start + 200]]) for start in range(0, 1000, 200)]
    assert [len(group) for group in groups] == [8] * 5
    assert set().union(*groups) == set(range(40))
    assert any(max(group) - min(group) > 7 for group in groups)  # the shards are shuffled too
    first = LOCATED.file_of[order[:200]]
    assert len(set(first[:30])) > 4  # and the samples among them


def test_shards_at_once_below_one_is_refused() -> None:
    with pytest.raises(ValueError, match="shards_at_once: expected at least 1, got 0"):
        shard_order(LOCATED, seed=0, epoch=0, shards_at_once=0)
