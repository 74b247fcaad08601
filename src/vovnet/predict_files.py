"""Prediction over many files: bad ones are named and passed over, good ones are never lost."""

import ctypes
import json
from collections import deque
from collections.abc import Callable, Generator, Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from vovnet.augmented_predict import PLAIN, View, predict_augmented
from vovnet.drawing import draw_detections
from vovnet.errors import ConfigError
from vovnet.files import atomic_path, atomic_write_json, atomic_write_text
from vovnet.images import read_image
from vovnet.pages import Page, group_alike, in_order, read_ahead
from vovnet.predict import Predictor
from vovnet.results import Detections
from vovnet.runtime.stream import Batch, infer_stream

RESULTS, LINES = "results.json", "results.jsonl"
WINDOW = 4
"""Batches of pictures that one may wait for others of its size."""
_M_MMAP_THRESHOLD = -3


@dataclass(frozen=True, slots=True, eq=False)
class _Picture:
    image: NDArray[np.uint8]
    resized: NDArray[np.uint8]


Found = tuple[Page, NDArray[np.uint8], Detections]


@dataclass(slots=True)
class FilesReport:
    """What became of the files of one run."""

    images: int = 0
    objects: int = 0
    errors: list[str] = field(default_factory=list)
    interrupted: bool = False


def predict_files(
    predictor: Predictor,
    paths: Sequence[Path],
    output_dir: Path,
    *,
    save_pictures: bool = True,
    tile: int | None = None,
    overlap: int = 128,
    views: Sequence[View] = (PLAIN,),
    batch_size: int = 1,
    on_image: Callable[[Path, Detections], None] = lambda path, found: None,
    on_error: Callable[[str], None] = lambda text: None,
) -> FilesReport:
    """Detections of every page of every file, written to output_dir.

    results.json holds COCO results, results.jsonl a line per image with its id, file, page and
    objects; with save_pictures each image is drawn as PNG. tile and overlap in pixels (see
    Predictor.tiled); tile None looks at the whole image at once, or in several views of which
    predict_augmented merges the detections. Whole images go through the network batch_size at a
    time, those of one padded size together; what is written keeps the order of paths. Threads read
    the next files and draw the last picture meanwhile. A file that cannot be read is reported and
    passed over. Ctrl-C ends the run after what is done has been written.

    Raises ConfigError on a batch_size with tiles or views, which go one at a time.
    """
    whole = tile is None and tuple(views) == (PLAIN,)
    if batch_size != 1 and not whole:
        raise ConfigError(f"batch size: expected 1 with tiles or several views, got {batch_size}")
    report = FilesReport()

    def fail(text: str) -> None:
        report.errors.append(text)
        on_error(text)

    def read(path: Path, page: int) -> _Picture:
        image = read_image(path, page=page)
        return _Picture(image, predictor.preprocess.resize(image) if whole else image)

    pages = read_ahead(paths, read, ahead=batch_size + predictor.engine.parallel, on_error=fail)
    found_in = (
        _predict_whole(predictor, pages, batch_size)
        if whole
        else _predict_parts(predictor, pages, tile=tile, overlap=overlap, views=views)
    )
    coco: list[dict[str, Any]] = []
    lines: list[str] = []
    taken = {path.resolve() for path in paths}  # a picture never replaces what it was made from
    drawn: Future[None] | None = None
    drawing = ThreadPoolExecutor(1)
    try:
        for (path, page), image, found in found_in:
            if drawn is not None:  # first, so that an interrupt parts no line from its picture
                drawn.result()
            report.images += 1
            report.objects += len(found)
            entry = {"image_id": report.images, "file": str(path), "page": page}
            masks = found.segmentations()
            lines.append(json.dumps(entry | found.to_json(masks)))
            coco += found.to_coco(report.images, predictor.category_ids, masks)
            if save_pictures:
                picture = _free_name(output_dir, path, page, taken)
                drawn = drawing.submit(save_picture, picture, image, found)
            on_image(path, found)
        if drawn is not None:
            drawn.result()
    except KeyboardInterrupt:
        report.interrupted = True
    finally:
        try:
            found_in.close()
            pages.close()
            drawing.shutdown()
        finally:  # a second Ctrl-C does not lose them either
            atomic_write_json(output_dir / RESULTS, coco, indent=None)
            atomic_write_text(output_dir / LINES, "".join(f"{line}\n" for line in lines))
    return report


def _predict_whole(
    predictor: Predictor, pages: Iterable[tuple[Page, _Picture]], batch_size: int
) -> Generator[Found]:
    """Whole images, in batches of one padded size, the next made ready while the network runs."""
    groups: deque[list[tuple[int, tuple[Page, _Picture]]]] = deque()  # in the network

    def batches() -> Iterator[Batch]:
        alike = group_alike(
            pages,
            lambda one: predictor.preprocess.padded_size(*one[1].resized.shape[:2]),
            size=batch_size,
            window=WINDOW * batch_size,
        )
        for group in alike:
            groups.append(group)
            yield predictor.preprocess.batch([picture.resized for _, (_, picture) in group])

    def results() -> Iterator[tuple[int, Found]]:
        for raw in stream:
            for index, (number, (page, picture)) in enumerate(groups.popleft()):
                found = predictor.postprocess(
                    raw,
                    index,
                    image_size=picture.image.shape[:2],
                    resized_size=picture.resized.shape[:2],
                )
                yield number, (page, picture.image, found)

    stream = infer_stream(predictor.engine, batches())
    try:
        yield from in_order(results())
    finally:
        stream.close()


def _predict_parts(
    predictor: Predictor,
    pages: Iterable[tuple[Page, _Picture]],
    *,
    tile: int | None,
    overlap: int,
    views: Sequence[View],
) -> Generator[Found]:
    """Images in tiles or in several views, one pass of the network for each."""
    limit = predictor.engine.max_detections
    for page, picture in pages:
        if tile is None:
            found = predict_augmented(predictor, picture.image, views, max_detections=limit)
        else:
            found = predictor.tiled(picture.image, tile=tile, overlap=overlap)
        yield page, picture.image, found


def return_large_blocks() -> None:
    """Makes glibc give freed feature maps back to the system, for the whole process.

    Left alone it learns to keep them, and images of many sizes split its heap: a third more memory
    at the peak. Does nothing where the C library has no mallopt.
    """
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    if mallopt is not None:
        mallopt(_M_MMAP_THRESHOLD, 1 << 20)


def save_picture(path: Path, image: NDArray[np.uint8], found: Detections) -> None:
    """Writes the image, uint8 (H, W, 3) RGB, with its detections drawn; the file appears whole."""
    with atomic_path(path) as temporary:
        picture = Image.fromarray(draw_detections(image, found))
        picture.save(temporary, format="PNG", compress_level=1)


def _free_name(output_dir: Path, path: Path, page: int, taken: set[Path]) -> Path:
    """A picture name that no other file of this run has; pages after the first are numbered."""
    output_dir = output_dir.resolve()
    suffix = f"_page{page + 1}" if page else ""
    name = output_dir / f"{path.stem}{suffix}.png"
    number = 2
    while name in taken:
        name = output_dir / f"{path.stem}{suffix}_{number}.png"
        number += 1
    taken.add(name)
    return name
