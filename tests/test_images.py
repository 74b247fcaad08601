import os
import struct
import threading
import time
import warnings
import zlib
from io import BytesIO
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image, ImageFile

from vovnet.errors import DataError, ImageError
from vovnet.images import count_pages, find_images, image_size, read_image

# For each EXIF orientation the visual sides on which row 0 and column 0 of the stored pixels lie.
ROW_AND_COLUMN_SIDES = {
    1: ("top", "left"),
    2: ("top", "right"),
    3: ("bottom", "right"),
    4: ("bottom", "left"),
    5: ("left", "top"),
    6: ("right", "top"),
    7: ("right", "bottom"),
    8: ("left", "bottom"),
}
LOSSLESS: dict[str, dict[str, Any]] = {
    "PNG": {},
    "BMP": {},
    "TIFF": {},
    "WEBP": {"lossless": True},
}


def noise(height: int = 6, width: int = 9) -> np.ndarray:
    return np.random.default_rng(0).integers(0, 256, (height, width, 3), dtype=np.uint8)


def encode(pixels: np.ndarray, file_format: str, mode: str | None = None, **options: Any) -> bytes:
    """Return the bytes of an image file; the mode is told only where the array's is not it."""
    image = Image.fromarray(pixels)
    buffer = BytesIO()
    (image if mode is None else image.convert(mode)).save(buffer, file_format, **options)
    return buffer.getvalue()


def stored_from(visual: np.ndarray, orientation: int) -> np.ndarray:
    """Return what a camera stores when `visual` is seen after turning by this EXIF orientation."""
    height, width = visual.shape[:2]
    row_side, column_side = ROW_AND_COLUMN_SIDES[orientation]
    sideways = row_side in ("left", "right")
    rows, columns = (width, height) if sideways else (height, width)
    stored = np.empty((rows, columns, 3), dtype=np.uint8)
    for row in range(rows):
        for column in range(columns):
            along = {row_side: row, column_side: column}
            y = along["top"] if "top" in along else height - 1 - along["bottom"]
            x = along["left"] if "left" in along else width - 1 - along["right"]
            stored[row, column] = visual[y, x]
    return stored


def orientation_tag(orientation: int) -> Image.Exif:
    exif = Image.Exif()
    exif[274] = orientation
    return exif


def png_header(width: int, height: int, *, bits: int = 1) -> bytes:
    """Return a PNG that says it is large and holds next to nothing."""

    def chunk(name: bytes, data: bytes) -> bytes:
        return (
            struct.pack(">I", len(data)) + name + data + struct.pack(">I", zlib.crc32(name + data))
        )

    header = struct.pack(">IIBBBBB", width, height, bits, 0, 0, 0, 0)
    pixels = chunk(b"IDAT", zlib.compress(b"\0" * 100))
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + pixels + chunk(b"IEND", b"")


def assert_one_clear_line(error: ImageError, name: str) -> None:
    text = str(error)
    assert text.startswith(f"{name}: ")
    assert text.isprintable()
    assert len(text) < 300


@pytest.mark.parametrize(("file_format", "options"), LOSSLESS.items(), ids=LOSSLESS)
def test_lossless_colour_comes_back_as_it_was(
    tmp_path: Path, file_format: str, options: dict[str, Any]
) -> None:
    data = encode(noise(), file_format, **options)
    path = tmp_path / "image"
    path.write_bytes(data)
    for source in (data, path):
        found = read_image(source)
        np.testing.assert_array_equal(found, noise())
        assert found.dtype == np.uint8
        assert found.flags.writeable
        assert found.flags.c_contiguous
    assert image_size(path) == (6, 9)
    assert count_pages(path) == 1


def test_jpeg_is_near() -> None:
    flat = np.full((32, 32, 3), (200, 100, 50), dtype=np.uint8)
    found = read_image(encode(flat, "JPEG", quality=95))
    assert np.abs(found.astype(int) - flat).max() <= 3


def test_gif_frames() -> None:
    frames = [np.full((4, 5, 3), level, dtype=np.uint8) for level in (0, 128, 255)]
    others = [Image.fromarray(frame) for frame in frames[1:]]
    data = encode(frames[0], "GIF", save_all=True, append_images=others)
    for page, frame in enumerate(frames):
        np.testing.assert_array_equal(read_image(data, page=page), frame)


def test_eight_bit_grey_and_grey_with_alpha() -> None:
    grey = noise()[:, :, 0]
    expected = np.repeat(grey[:, :, None], 3, axis=2)
    np.testing.assert_array_equal(read_image(encode(grey, "PNG")), expected)
    with_alpha = noise()[:, :, :2]
    found = read_image(encode(with_alpha, "PNG"))
    np.testing.assert_array_equal(found, np.repeat(with_alpha[:, :, :1], 3, axis=2))


def test_alpha_is_dropped_not_blended() -> None:
    pixels = np.dstack([noise(), np.zeros((6, 9), dtype=np.uint8)])
    for file_format in ("PNG", "TIFF"):
        np.testing.assert_array_equal(read_image(encode(pixels, file_format)), noise())


def test_palette_with_and_without_transparency() -> None:
    image = Image.fromarray(np.array([[0, 1], [2, 1]], dtype=np.uint8))
    image.putpalette([255, 0, 0, 0, 255, 0, 0, 0, 255])
    colours = np.array([[255, 0, 0], [0, 255, 0], [0, 0, 255]], dtype=np.uint8)
    expected = colours[[[0, 1], [2, 1]]]
    for transparency in (None, 1, b"\x00\x80\xff"):
        buffer = BytesIO()
        image.save(
            buffer, "PNG", **({} if transparency is None else {"transparency": transparency})
        )
        np.testing.assert_array_equal(read_image(buffer.getvalue()), expected)


def test_one_bit() -> None:
    bits = np.array([[True, False], [False, True]])
    expected = np.repeat(np.where(bits, 255, 0)[:, :, None], 3, axis=2)
    for file_format in ("PNG", "BMP", "TIFF"):
        np.testing.assert_array_equal(read_image(encode(bits, file_format)), expected)


@pytest.mark.parametrize("file_format", ["JPEG", "TIFF"])
def test_cmyk(file_format: str) -> None:
    # Cyan ink takes the red away.
    cyan = Image.new("CMYK", (16, 16), (255, 0, 0, 0))
    buffer = BytesIO()
    cyan.save(buffer, file_format)
    found = read_image(buffer.getvalue())
    assert np.abs(found.astype(int) - (0, 255, 255)).max() <= 2


@pytest.mark.parametrize("file_format", ["PNG", "TIFF"])
def test_sixteen_bits_up_to_255_are_taken_as_they_are(file_format: str) -> None:
    values = np.array([[0, 1, 7], [100, 254, 255]], dtype=np.uint16)
    found = read_image(encode(values, file_format))
    np.testing.assert_array_equal(found, np.repeat(values[:, :, None], 3, axis=2))


@pytest.mark.parametrize("file_format", ["PNG", "TIFF"])
def test_larger_sixteen_bits_are_scaled_by_their_own_percentiles(file_format: str) -> None:
    values = np.linspace(1000, 3000, 10_000).reshape(100, 100).astype(np.uint16)
    values[0, 0], values[-1, -1] = 0, 65535  # one hot and one dead pixel
    found = read_image(encode(values, file_format))[:, :, 0]
    low, high = np.percentile(values, (0.1, 99.9))
    expected = np.clip((values - low) / (high - low), 0, 1) * 255
    np.testing.assert_allclose(found, expected, atol=0.51)
    assert (found.min(), found.max()) == (0, 255)
    assert abs(int(found[50, 0]) - 127) <= 2


def test_big_endian_sixteen_bit_tiff() -> None:
    # Pillow reads but does not write these: header, pixels, one directory.
    values = np.array([[3, 200]], dtype=">u2")
    tags = [
        (256, 2),
        (257, 1),
        (258, 16),
        (259, 1),
        (262, 1),
        (273, 8),
        (277, 1),
        (278, 1),
        (279, 4),
    ]
    entries = b"".join(struct.pack(">HHII", tag, 4, 1, value) for tag, value in tags)
    directory = struct.pack(">H", len(tags)) + entries + struct.pack(">I", 0)
    data = b"MM\0*" + struct.pack(">I", 12) + values.tobytes() + directory
    np.testing.assert_array_equal(read_image(data)[:, :, 0], values)


def test_float_tiff() -> None:
    values = np.array([[0.0, 10.4, 10.6], [255.0, np.nan, 128.0]], dtype=np.float32)
    found = read_image(encode(values, "TIFF"))[:, :, 0]
    np.testing.assert_array_equal(found, [[0, 10, 11], [255, 0, 128]])


def test_float_tiff_that_is_scaled_with_what_is_not_finite() -> None:
    values = np.linspace(-1000, 1000, 10_000, dtype=np.float32).reshape(100, 100)
    values[0, :3] = np.nan, np.inf, -np.inf
    found = read_image(encode(values, "TIFF"))[:, :, 0]
    assert found[0, :3].tolist() == [0, 255, 0]
    assert abs(int(found[50, 0]) - 128) <= 1
    assert (np.diff(found.ravel()[3:].astype(int)) >= 0).all()


@pytest.mark.parametrize(
    ("values", "expected"),
    [
        (np.full((2, 2), 1000, np.uint16), [[0, 0], [0, 0]]),
        (np.full((2, 2), np.nan, np.float32), [[0, 0], [0, 0]]),
        (np.array([[-3e38, 3e38]], np.float32), [[0, 255]]),
        (np.array([[-5, 250]], np.int32), [[0, 255]]),
        (np.array([[0, 250]], np.int32), [[0, 250]]),
        (np.array([[np.inf, 9.0, -np.inf]], np.float32), [[255, 9, 0]]),
    ],
    ids=["constant", "all NaN", "widest", "negative", "32 bits", "infinite"],
)
def test_strange_ranges(values: np.ndarray, expected: list[list[int]]) -> None:
    assert read_image(encode(values, "TIFF"))[:, :, 0].tolist() == expected


def test_a_few_bright_points_on_an_even_ground_stay_visible() -> None:
    values = np.zeros((100, 100), dtype=np.uint16)
    values[50, 50] = 4000
    found = read_image(encode(values, "PNG"))[:, :, 0]
    assert found[50, 50] == 255
    assert found.sum() == 255


@given(
    st.lists(st.floats(width=32, allow_subnormal=False), min_size=1, max_size=40)
    | st.lists(st.floats(0, 255, width=32, allow_subnormal=False), min_size=1, max_size=40)
)
@settings(deadline=None, max_examples=60)
def test_any_float_image_can_be_read_and_keeps_its_order(values: list[float]) -> None:
    grey = np.array([values], dtype=np.float32)
    found = read_image(encode(grey, "TIFF"))[0, :, 0]
    comparable = ~np.isnan(grey[0])
    order = np.argsort(grey[0][comparable])
    assert (np.diff(found[comparable][order].astype(int)) >= 0).all()


@pytest.mark.parametrize("orientation", range(1, 9))
@pytest.mark.parametrize("file_format", ["PNG", "TIFF", "WEBP"])
def test_exif_orientation(tmp_path: Path, file_format: str, orientation: int) -> None:
    visual = noise(5, 8)
    stored = stored_from(visual, orientation)
    path = tmp_path / "image"
    exif = orientation_tag(orientation)
    path.write_bytes(encode(stored, file_format, exif=exif, **LOSSLESS[file_format]))
    np.testing.assert_array_equal(read_image(path), visual)
    assert read_image(path).flags.c_contiguous
    assert image_size(path) == (5, 8)
    # Annotations made on the oriented pixels, on the stored ones, and on some other image.
    np.testing.assert_array_equal(read_image(path, expected_size=(5, 8)), visual)
    sideways = orientation >= 5
    expected = stored if sideways else visual
    np.testing.assert_array_equal(read_image(path, expected_size=stored.shape[:2]), expected)
    np.testing.assert_array_equal(read_image(path, expected_size=(3, 3)), visual)


@pytest.mark.parametrize("orientation", [3, 6, 8])
def test_exif_orientation_of_jpeg(orientation: int) -> None:
    visual = np.zeros((32, 48, 3), dtype=np.uint8)
    visual[:16, :16] = (250, 20, 20)
    stored = stored_from(visual, orientation)
    data = encode(stored, "JPEG", quality=100, subsampling=0, exif=orientation_tag(orientation))
    assert np.abs(read_image(data).astype(int) - visual).max() <= 6


def test_a_square_image_is_oriented_whatever_size_is_expected() -> None:
    visual = noise(5, 5)
    data = encode(stored_from(visual, 6), "PNG", exif=orientation_tag(6))
    np.testing.assert_array_equal(read_image(data, expected_size=(5, 5)), visual)


@pytest.mark.parametrize("value", [0, 9, 65535])
def test_orientations_that_do_not_exist_turn_nothing(value: int) -> None:
    data = encode(noise(), "PNG", exif=orientation_tag(value))
    np.testing.assert_array_equal(read_image(data), noise())


def test_broken_exif_turns_nothing() -> None:
    for block in (b"Exif\0\0nonsense", b"Exif\0\0II*\0\xff\xff\xff\xff", b"Exif\0\0MM\0*"):
        assert read_image(encode(noise(), "JPEG", exif=block)).shape == (6, 9, 3)


def test_tiff_pages(tmp_path: Path) -> None:
    pages = [noise(4, 5), noise(7, 3), noise(2, 2)]
    others = [Image.fromarray(page) for page in pages[1:]]
    path = tmp_path / "stack.tif"
    path.write_bytes(encode(pages[0], "TIFF", save_all=True, append_images=others))
    assert count_pages(path) == 3
    for index, page in enumerate(pages):
        np.testing.assert_array_equal(read_image(path, page=index), page)
    for wrong in (3, -1):
        with pytest.raises(ImageError, match=rf"expected a page from 0 to 2, got {wrong}"):
            read_image(path, page=wrong)
    with pytest.raises(ImageError, match="expected at most 20 pixels, got 3 x 7 = 21"):
        read_image(path, page=1, max_pixels=20)
    np.testing.assert_array_equal(read_image(path, page=2, max_pixels=4), pages[2])


@pytest.mark.parametrize("file_format", ["GIF", "WEBP", "PNG"])
def test_no_frame_is_looked_for_in_a_file_of_too_many_pixels(file_format: str) -> None:
    other = Image.fromarray(255 - noise())
    data = encode(noise(), file_format, save_all=True, append_images=[other])
    with pytest.raises(ImageError, match="expected at most 53 pixels, got 9 x 6 = 54"):
        read_image(data, page=99, max_pixels=53)
    with pytest.raises(ImageError, match="expected a page from 0 to 1, got 99"):
        read_image(data, page=99, max_pixels=54)


def test_the_content_decides_not_the_name(tmp_path: Path) -> None:
    path = tmp_path / "really_a_png.jpg"
    path.write_bytes(encode(noise(), "PNG"))
    np.testing.assert_array_equal(read_image(path), noise())


@pytest.mark.parametrize(
    "content", [b"", b"not an image", b"%!PS-Adobe-3.0 EPSF-3.0\n", b"\0" * 64]
)
def test_files_that_are_no_images(tmp_path: Path, content: bytes) -> None:
    path = tmp_path / "broken.jpg"
    path.write_bytes(content)
    for read in (read_image, image_size, count_pages):
        with pytest.raises(ImageError) as caught:
            read(path)
        assert_one_clear_line(caught.value, str(path))
    reason = "the file is empty" if not content else "not an image that can be read"
    assert reason in str(caught.value)
    with pytest.raises(ImageError, match="image bytes: not an image"):
        read_image(content)


def test_formats_outside_the_list_are_refused() -> None:
    for file_format in ("PPM", "ICO", "TGA", "PCX"):
        with pytest.raises(ImageError, match="not an image that can be read"):
            read_image(encode(noise(32, 32), file_format))


def test_what_is_not_a_file(tmp_path: Path) -> None:
    pipe = tmp_path / "pipe.png"
    os.mkfifo(pipe)
    for path, reason in [
        (tmp_path / "missing.png", "no such file"),
        (tmp_path, "is not a regular file"),
        (pipe, "is not a regular file"),
        (Path("/dev/zero"), "is not a regular file"),
    ]:
        with pytest.raises(ImageError) as caught:
            read_image(path)
        assert str(caught.value) == f"{path}: {reason}"


@pytest.mark.parametrize(
    ("name", "shown"),
    [
        ("Zelle é 細胞.png", "Zelle é 細胞.png"),
        ("two\nlines.png", r"two\nlines.png"),
        ("\x1b[31mred.png", r"\x1b[31mred.png"),
        ("[a]*?.png", "[a]*?.png"),
        (os.fsdecode(b"latin\xe9.png"), r"latin\xe9.png"),
    ],
)
def test_odd_names(tmp_path: Path, name: str, shown: str) -> None:
    path = tmp_path / name
    path.write_bytes(encode(noise(), "PNG"))
    np.testing.assert_array_equal(read_image(path), noise())
    assert find_images(str(path)) == [path]
    assert find_images(str(tmp_path)) == [path]
    path.write_bytes(b"broken")
    with pytest.raises(ImageError) as caught:
        read_image(path)
    assert_one_clear_line(caught.value, f"{tmp_path}/{shown}")


def test_a_null_character_is_no_name() -> None:
    with pytest.raises(ImageError, match=r"a\\x00b: "):
        read_image(Path("a\0b"))
    with pytest.raises(DataError, match=r"a\\x00b: "):
        find_images("a\0b")


@pytest.mark.parametrize(
    ("file_format", "options"),
    [*LOSSLESS.items(), ("GIF", {}), ("JPEG", {}), ("TIFF", {"compression": "tiff_lzw"})],
    ids=[*LOSSLESS, "GIF", "JPEG", "TIFF LZW"],
)
def test_a_cut_file_is_an_error_or_whole_never_partly_grey(
    tmp_path: Path, file_format: str, options: dict[str, Any]
) -> None:
    data = encode(noise(20, 30), file_format, **options)
    whole = read_image(data)
    path = tmp_path / "cut"
    errors = 0
    for end in range(1, len(data), 7):
        path.write_bytes(data[:end])
        try:
            found = read_image(path)
        except ImageError as error:
            assert_one_clear_line(error, str(path))
            errors += 1
        else:
            np.testing.assert_array_equal(found, whole)
    assert errors > 0.95 * len(range(1, len(data), 7))


@given(st.sampled_from(["PNG", "BMP", "TIFF", "WEBP", "GIF"]), st.data())
@settings(deadline=None, max_examples=100)
def test_damaged_files_give_an_image_or_an_image_error(
    file_format: str, data: st.DataObject
) -> None:
    damaged = bytearray(encode(noise(), file_format))
    for _ in range(data.draw(st.integers(1, 6))):
        place = data.draw(st.integers(0, len(damaged) - 1))
        damaged[place] = data.draw(st.integers(0, 255))
    try:
        found = read_image(bytes(damaged), max_pixels=1_000_000)
    except ImageError as error:
        assert_one_clear_line(error, "image bytes")
    else:
        assert found.dtype == np.uint8
        assert found.ndim == 3


def test_a_pixel_bomb_is_refused_from_its_header(tmp_path: Path) -> None:
    bmp = bytearray(encode(noise(), "BMP"))
    bmp[18:26] = struct.pack("<II", 50_000, 50_000)
    gif = bytearray(encode(noise(), "GIF"))
    gif[6:10] = struct.pack("<HH", 65_535, 65_535)
    webp = b"VP8X" + struct.pack("<I", 10) + b"\0" * 4 + b"\xff\xff\0" * 2
    webp = b"RIFF" + struct.pack("<I", len(webp) + 4) + b"WEBP" + webp
    bombs = {
        "bomb.png": png_header(50_000, 50_000),
        "bomb.bmp": bytes(bmp),
        "bomb.gif": bytes(gif),
        "bomb.webp": webp,
        "large.png": png_header(60_000, 2_000),
    }
    for name, data in bombs.items():
        path = tmp_path / name
        path.write_bytes(data)
        start = time.thread_time()
        with pytest.raises(ImageError, match="pixels") as caught:
            read_image(path)
        assert time.thread_time() - start < 1
        assert_one_clear_line(caught.value, str(path))
        with pytest.raises(ImageError, match="pixels"):
            image_size(path)


def test_the_pixel_limit_is_exact_and_checked_before_decoding() -> None:
    data = encode(noise(10, 10), "PNG")
    assert read_image(data, max_pixels=100).shape == (10, 10, 3)
    with pytest.raises(ImageError, match="expected at most 99 pixels, got 10 x 10 = 100"):
        read_image(data, max_pixels=99)
    # Its pixels are missing, so that decoding would say something else.
    with pytest.raises(ImageError, match="expected at most 99 pixels"):
        read_image(png_header(10, 10), max_pixels=99)


def test_the_size_is_read_without_the_pixels(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(image: ImageFile.ImageFile) -> None:
        decoded.append(str(image.format))
        raise AssertionError("decoded")

    decoded: list[str] = []
    monkeypatch.setattr(ImageFile.ImageFile, "load", refuse)
    path = tmp_path / "image"
    path.write_bytes(png_header(9_500, 10_000))  # Pillow itself would warn
    assert image_size(path) == (10_000, 9_500)
    for file_format in ("PNG", "JPEG", "TIFF", "GIF", "WEBP", "BMP"):
        path.write_bytes(encode(noise(), file_format))
        assert image_size(path) == (6, 9)
    assert decoded == []


def odd_tiff() -> bytes:
    """Return a TIFF that can be read and makes Pillow warn: one of its tags ends outside it."""
    data = bytearray(encode(noise(), "TIFF", software="a long name of some software"))
    place = data.index(struct.pack("<HH", 305, 2))
    data[place + 4 : place + 8] = struct.pack("<I", 100_000)
    return bytes(data)


def test_what_pillow_warns_of_stays_inside() -> None:
    with pytest.warns(UserWarning, match="larger than file"):
        Image.open(BytesIO(odd_tiff())).load()
    before = list(warnings.filters)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        np.testing.assert_array_equal(read_image(odd_tiff()), noise())
        warnings.warn("another's", UserWarning, stacklevel=1)
    assert [str(warning.message) for warning in caught] == ["another's"]
    assert list(warnings.filters) == before


def test_threads_leave_the_warning_filters_as_they_were() -> None:
    before = list(warnings.filters)
    data = odd_tiff()
    failures: list[BaseException] = []

    def read_many() -> None:
        try:
            for _ in range(30):
                read_image(data)
        except BaseException as error:
            failures.append(error)

    threads = [threading.Thread(target=read_many) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert failures == []
    assert list(warnings.filters) == before


def touch(path: Path) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.touch()
    return path


def test_find_images_in_a_folder(tmp_path: Path) -> None:
    wanted = [touch(tmp_path / name) for name in ("a/z.PNG", "b.jpeg", "a/b/c.TIF", "x y.webp")]
    for name in ("notes.txt", ".hidden.png", ".cache/thumb.png", "a/._z.png", "png", "d.png/e.txt"):
        touch(tmp_path / name)
    assert find_images(str(tmp_path)) == sorted(wanted)


def test_find_images_by_pattern(tmp_path: Path) -> None:
    for name in ("a/1.png", "a/2.jpg", "b/c/3.png", "a/1.txt"):
        touch(tmp_path / name)

    def found(pattern: str) -> list[str]:
        return [
            path.relative_to(tmp_path).as_posix() for path in find_images(f"{tmp_path}/{pattern}")
        ]

    assert found("a/*") == ["a/1.png", "a/2.jpg"]
    assert found("**/*.png") == ["a/1.png", "b/c/3.png"]
    assert found("a/[2-9].*") == ["a/2.jpg"]


def test_find_images_takes_a_named_file_as_it_is(tmp_path: Path) -> None:
    path = touch(tmp_path / "image.dat")
    assert find_images(str(path)) == [path]


@pytest.mark.parametrize("source", ["", "nowhere", "nowhere/*.png", "notes/*"])
def test_find_images_that_are_not_there(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, source: str
) -> None:
    touch(tmp_path / "notes" / "a.txt")
    touch(tmp_path / "image.png")
    monkeypatch.chdir(tmp_path)
    with pytest.raises(DataError, match="expected an image file, a folder"):
        find_images(source)


def test_a_path_may_be_a_string(tmp_path: Path) -> None:
    path = tmp_path / "a.png"
    Image.new("RGB", (3, 2), (1, 2, 3)).save(path)
    assert read_image(str(path)).tolist() == [[[1, 2, 3]] * 3] * 2


# Scaled decoding


def smooth(width: int, height: int) -> np.ndarray:
    pixels = np.random.default_rng(0).integers(0, 256, (6, 8, 3), dtype=np.uint8)
    return np.array(Image.fromarray(pixels).resize((width, height), Image.Resampling.BICUBIC))


@pytest.mark.parametrize(
    ("size", "min_side", "expected"),
    [
        ((800, 600), 150, (300, 400)),  # half: 300 is twice 150
        ((800, 600), 151, (600, 800)),
        ((805, 600), 75, (150, 202)),  # a quarter, rounded up
        ((804, 1206), 50, (151, 101)),  # an eighth at most
        ((800, 600), 1, (75, 100)),
        ((3, 3), 1, (3, 3)),
    ],
)
def test_min_side_bounds_the_scale_of_a_jpeg(
    size: tuple[int, int], min_side: int, expected: tuple[int, int]
) -> None:
    data = encode(smooth(*size), "JPEG", quality=90)
    assert read_image(data, min_side=min_side).shape[:2] == expected
    assert read_image(data).shape[:2] == size[::-1]


@pytest.mark.parametrize("file_format", ["PNG", "WEBP", "TIFF", "BMP"])
def test_min_side_changes_no_other_format(file_format: str) -> None:
    data = encode(smooth(400, 300), file_format)
    np.testing.assert_array_equal(read_image(data, min_side=20), read_image(data))


@pytest.mark.parametrize("mode", ["L", "CMYK", "RGB"])
def test_scaled_decoding_shows_the_same_picture(mode: str) -> None:
    data = encode(smooth(800, 600), "JPEG", mode, quality=95)
    whole = Image.fromarray(read_image(data)).resize((200, 150), Image.Resampling.BICUBIC)
    scaled = Image.fromarray(read_image(data, min_side=150)).resize((200, 150), Image.BICUBIC)
    assert np.abs(np.array(whole, int) - np.array(scaled, int)).mean() < 1.5


def test_scaled_decoding_turns_the_picture_too() -> None:
    data = encode(smooth(800, 600), "JPEG", exif=orientation_tag(6))
    assert read_image(data, min_side=75).shape[:2] == (200, 150)
    # The annotations' size is that of the file, not of what was decoded.
    kept = read_image(data, min_side=75, expected_size=(600, 800))
    assert kept.shape[:2] == (150, 200)


def test_min_side_keeps_the_limits_and_refuses_nonsense() -> None:
    data = encode(smooth(800, 600), "JPEG")
    with pytest.raises(ImageError, match="at most 1000 pixels"):
        read_image(data, min_side=1, max_pixels=1000)
    with pytest.raises(ImageError):
        read_image(data[: len(data) // 2], min_side=1)
    with pytest.raises(ValueError, match="min_side: expected at least 1, got 0"):
        read_image(data, min_side=0)
