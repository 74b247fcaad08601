"""Image files into uint8 RGB arrays, with every file taken for hostile until it is decoded."""

import glob
import os
import threading
import warnings
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from io import BytesIO
from pathlib import Path
from typing import BinaryIO

import numpy as np
from numpy.typing import NDArray
from PIL import Image, UnidentifiedImageError

from .errors import DataError, ImageError

MAX_PIXELS = 100_000_000
FORMATS = ("JPEG", "PNG", "WEBP", "BMP", "TIFF", "GIF")
SEPARATE_PAGES = ("TIFF", "MPO")
SUFFIXES = frozenset({".jpg", ".jpeg", ".png", ".webp", ".bmp", ".tif", ".tiff", ".gif"})

_ORIENTATION_TAG = 274
_STORED_ORIENTATION = 1
_INVERSE_ORIENTATION = {2: 2, 3: 3, 4: 4, 5: 5, 6: 8, 7: 7, 8: 6}
_SIDEWAYS = frozenset({5, 6, 7, 8})


def read_image(
    source: str | Path | bytes,
    *,
    page: int = 0,
    max_pixels: int = MAX_PIXELS,
    expected_size: tuple[int, int] | None = None,
    min_side: int | None = None,
) -> NDArray[np.uint8]:
    """Decode one image to a writable uint8 array (H, W, 3), RGB, 0..255.

    JPEG, PNG, WebP, BMP, TIFF and GIF, told by content, not by name; `page` counts from 0 in files
    with several. Grey, palette, 1-bit and CMYK are converted and transparency is dropped. Grey of
    16 or 32 bits or of floating point is taken as it is when all values lie in 0..255; else its
    own 0.1 and 99.9 percentiles become 0 and 255, and what is not finite 0 (NaN, -inf) or 255
    (inf). Colour of 16 bits keeps its high byte.

    The EXIF orientation that stands before the pixels is applied, except where `expected_size`
    (height, width) equals the stored and not the oriented size: then the annotations were made on
    the stored pixels.

    `min_side` in pixels makes large JPEGs cheap: they are decoded at 1/2, 1/4 or 1/8 of their size
    as long as the shorter side keeps at least twice `min_side`. A resize to `min_side` then gives
    nearly the same pixels, not the same.

    Raises ImageError, one line with the file and the reason, for what is missing, truncated,
    unreadable or larger than `max_pixels`, which is checked before any pixel is decoded. Pillow's
    own limit, 2 * PIL.Image.MAX_IMAGE_PIXELS, holds besides.
    """
    if min_side is not None and min_side < 1:
        raise ValueError(f"min_side: expected at least 1, got {min_side}")
    file = Path(source) if isinstance(source, str) else source
    with _opened(file, page=page, max_pixels=max_pixels) as image:
        orientation = _orientation(image)
        keep_stored = expected_size is not None and _only_stored(image, orientation, expected_size)
        if min_side is not None:
            image.draft(image.mode, (2 * min_side, 2 * min_side))  # nothing on other formats
        pixels = _to_rgb(image)
        # Pillow itself orients TIFF, and only TIFF, while it decodes.
        applied = orientation if image.format == "TIFF" else _STORED_ORIENTATION
        wanted = _STORED_ORIENTATION if keep_stored else orientation
        if wanted != applied:
            turn = wanted if applied == _STORED_ORIENTATION else _INVERSE_ORIENTATION[applied]
            pixels = _turned(pixels, turn)
        return pixels


def count_pages(path: Path) -> int:
    """Return the number of pages or frames in a file, at least 1; raises as `read_image` does."""
    with _opened(path) as image:
        return int(getattr(image, "n_frames", 1))


def image_size(path: Path) -> tuple[int, int]:
    """Return (height, width) in pixels after EXIF orientation, from the header alone.

    Raises ImageError for what is missing or unreadable and for more than MAX_PIXELS pixels.
    """
    with _opened(path) as image:
        orientation = _orientation(image)
        height, width = _stored_size(image, orientation)
        return (width, height) if orientation in _SIDEWAYS else (height, width)


def find_images(source: str) -> list[Path]:
    """Return the image files that a file name, a folder or a glob pattern means, sorted.

    A file is returned whatever its name; in folders (with all folders below) and for patterns
    (`**` crosses folders) the suffix decides, and hidden files and folders are passed over.

    Raises DataError when nothing is found or a folder cannot be read.
    """
    path = Path(source)
    if path.is_file():
        return [path]
    if source and path.is_dir():  # the empty text, an unset variable, is not the current folder
        found = _images_below(path)
    else:
        found = [match for match in map(Path, _glob(source)) if _is_image_file(match)]
    if not found:
        raise DataError(
            f"{printable(source)}: expected an image file, a folder with images or a pattern that "
            f"matches some ({', '.join(sorted(SUFFIXES))}), found none"
        )
    return sorted(found)


def _glob(pattern: str) -> list[str]:
    try:
        return glob.glob(pattern, recursive=True)
    except ValueError:  # a null character
        return []


def _images_below(folder: Path) -> list[Path]:
    def refuse(error: OSError) -> None:
        raise DataError(f"{printable(error.filename)}: cannot be read ({error.strerror})")

    found: list[Path] = []
    for parent, folders, files in os.walk(folder, onerror=refuse):
        folders[:] = [name for name in folders if not name.startswith(".")]
        paths = (Path(parent, name) for name in files if not name.startswith("."))
        found.extend(path for path in paths if _is_image_file(path))
    return found


def _is_image_file(path: Path) -> bool:
    return path.suffix.lower() in SUFFIXES and path.is_file()


@contextmanager
def _opened(
    source: Path | bytes, *, page: int = 0, max_pixels: int = MAX_PIXELS
) -> Iterator[Image.Image]:
    """Open the header and turn whatever goes wrong until the end of the block into ImageError."""
    name = "image bytes" if isinstance(source, bytes) else printable(source)
    try:
        with ExitStack() as stack:
            stack.enter_context(_pillow_warnings_ignored())
            if isinstance(source, bytes):
                stream: BinaryIO = BytesIO(source)
            else:
                _check_file(source)
                stream = stack.enter_context(source.open("rb"))
            image = stack.enter_context(Image.open(stream, formats=FORMATS))
            if image.format not in SEPARATE_PAGES:
                # Frames share one canvas, and going to a later one decodes those before it.
                _check_pixels(image, max_pixels)
            _seek(image, page)
            _check_pixels(image, max_pixels)
            yield image
    except ImageError as error:
        raise ImageError(f"{name}: {error}") from error.__cause__
    except Exception as error:
        # Hostile files make Pillow's decoders raise nearly any type.
        raise ImageError(f"{name}: {_reason(error)}") from error


def _check_file(path: Path) -> None:
    # Reading a pipe or a device could wait or go on for ever.
    if not path.is_file():
        raise ImageError("is not a regular file" if path.exists() else "no such file")
    if path.stat().st_size == 0:
        raise ImageError("the file is empty")


def _check_pixels(image: Image.Image, max_pixels: int) -> None:
    width, height = image.size
    if width * height > max_pixels:
        raise ImageError(
            f"expected at most {max_pixels} pixels, got {width} x {height} = {width * height}"
        )


def _seek(image: Image.Image, page: int) -> None:
    if page == 0:
        return
    pages = int(getattr(image, "n_frames", 1))
    if not 0 <= page < pages:
        raise ImageError(f"expected a page from 0 to {pages - 1}, got {page}")
    image.seek(page)


def _reason(error: Exception) -> str:
    if isinstance(error, UnidentifiedImageError):
        return f"not an image that can be read (expected {', '.join(FORMATS)})"
    if isinstance(error, OSError) and error.strerror:
        return error.strerror
    text = " ".join(str(error).split())
    return f"cannot be decoded ({text or type(error).__name__})"


def printable(name: str | bytes | Path) -> str:
    """Return a name on one line, in characters that every terminal and log can take."""
    text = os.fsencode(name).decode("utf-8", "backslashreplace")
    return "".join(c if c.isprintable() else ascii(c)[1:-1] for c in text)


def _orientation(image: Image.Image) -> int:
    try:
        # The base class's method: that of PNG decodes the pixels when the header has no EXIF.
        value = Image.Image.getexif(image).get(_ORIENTATION_TAG)
    except Exception:
        # A broken EXIF block turns nothing, as in other viewers; its errors are of any type.
        return _STORED_ORIENTATION
    if isinstance(value, int) and value in _INVERSE_ORIENTATION:
        return value
    return _STORED_ORIENTATION


def _stored_size(image: Image.Image, orientation: int) -> tuple[int, int]:
    width, height = image.size
    if image.format == "TIFF" and orientation in _SIDEWAYS:  # already oriented by Pillow
        return width, height
    return height, width


def _only_stored(image: Image.Image, orientation: int, expected_size: tuple[int, int]) -> bool:
    stored = _stored_size(image, orientation)
    oriented = stored[::-1] if orientation in _SIDEWAYS else stored
    return tuple(expected_size) == stored != oriented


def _turned(pixels: NDArray[np.uint8], orientation: int) -> NDArray[np.uint8]:
    """Apply one EXIF orientation, 2 to 8, to (H, W, 3) pixels."""
    views = {
        2: pixels[:, ::-1],
        3: pixels[::-1, ::-1],
        4: pixels[::-1],
        5: pixels.swapaxes(0, 1),
        6: pixels[::-1].swapaxes(0, 1),
        7: pixels[::-1, ::-1].swapaxes(0, 1),
        8: pixels[:, ::-1].swapaxes(0, 1),
    }
    return np.ascontiguousarray(views[orientation])


def _to_rgb(image: Image.Image) -> NDArray[np.uint8]:
    image.load()
    if image.mode in ("I", "F") or image.mode.startswith("I;16"):
        grey = _to_eight_bits(np.asarray(image))
        return np.repeat(grey[:, :, None], 3, axis=2)
    if image.mode in ("La", "RGBa"):  # colours multiplied by their alpha
        image = image.convert({"La": "LA", "RGBa": "RGBA"}[image.mode])
    return np.array(image if image.mode == "RGB" else image.convert("RGB"))


def _to_eight_bits(values: NDArray[np.generic]) -> NDArray[np.uint8]:
    """Map (H, W) grey of any number type to 0..255 by the rule that `read_image` states."""
    grey = values.astype(np.float64)
    finite = grey[np.isfinite(grey)]
    low, high = _range(finite)
    np.nan_to_num(grey, copy=False, nan=low, posinf=high, neginf=low)
    np.clip(grey, low, high, out=grey)
    if (low, high) != (0.0, 255.0):
        # Divided before it is subtracted, so that the widest range cannot overflow.
        span = high / 255.0 - low / 255.0
        grey = (grey / 255.0 - low / 255.0) / span * 255.0 if span > 0 else np.zeros_like(grey)
    return np.rint(grey).astype(np.uint8)


def _range(finite: NDArray[np.float64]) -> tuple[float, float]:
    if finite.size == 0 or (finite.min() >= 0 and finite.max() <= 255):
        return 0.0, 255.0
    low, high = np.percentile(finite, (0.1, 99.9))
    if low == high:  # a few bright points on an even ground
        low, high = finite.min(), finite.max()
    return float(low), float(high)


class _WarningFilter:
    """The state that threads share while they read images."""

    lock = threading.Lock()
    readers = 0
    saved = warnings.catch_warnings()


@contextmanager
def _pillow_warnings_ignored() -> Iterator[None]:
    """Keep what Pillow says about odd files off the screen.

    `warnings.catch_warnings` alone is not safe here: two threads that leave it in the order they
    came would keep the filter for ever. So the first reader sets it and the last one lifts it.
    """
    with _WarningFilter.lock:
        if _WarningFilter.readers == 0:
            _WarningFilter.saved = warnings.catch_warnings()
            _WarningFilter.saved.__enter__()
            warnings.filterwarnings("ignore", module=r"PIL\.")
        _WarningFilter.readers += 1
    try:
        yield
    finally:
        with _WarningFilter.lock:
            _WarningFilter.readers -= 1
            if _WarningFilter.readers == 0:
                _WarningFilter.saved.__exit__(None, None, None)
