"""What is wrong with a data set, entry by entry, before a training stumbles over it."""

import os
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from vovnet.data.labels import Annotation, DetectionData, ImageRecord, mask_runs
from vovnet.data.problems import Parsed, Problem, ProblemKind
from vovnet.errors import DataError, ImageError
from vovnet.images import image_size, read_image

# Tools round and draw boxes to the border and a little over it; augmentation clips that.
BORDER_TOLERANCE = 1.0
MAX_THREADS = 8


@dataclass(frozen=True, slots=True)
class Report:
    """Every problem found in a data set of that many image and annotation entries."""

    annotation_file: Path
    num_images: int
    num_annotations: int
    problems: tuple[Problem, ...]

    @property
    def is_good(self) -> bool:
        """Whether nothing is wrong."""
        return not self.problems

    def counts(self) -> dict[str, int]:
        """Number of problems of each kind, the most frequent first."""
        return dict(Counter(str(problem.kind) for problem in self.problems).most_common())

    def summary(self, max_lines: int = 10) -> str:
        """The first problems, a line each, and how many there are of each kind."""
        head = (
            f"{self.annotation_file}: {len(self.problems)} problems in {self.num_images} images "
            f"with {self.num_annotations} annotations"
        )
        if self.is_good:
            return head
        lines = [head, *(f"  {describe(problem)}" for problem in self.problems[:max_lines])]
        if len(self.problems) > max_lines:
            lines.append(f"  ... and {len(self.problems) - max_lines} more")
        counts = ", ".join(f"{kind} {count}" for kind, count in self.counts().items())
        return "\n".join([*lines, f"  in all: {counts}"])

    def to_json(self) -> dict[str, Any]:
        """The report as plain JSON types."""
        return {
            "annotation_file": str(self.annotation_file),
            "num_images": self.num_images,
            "num_annotations": self.num_annotations,
            "counts": self.counts(),
            "problems": [
                {
                    "kind": str(problem.kind),
                    "text": problem.text,
                    "file": problem.file,
                    "image_id": problem.image_id,
                    "annotation_id": problem.annotation_id,
                }
                for problem in self.problems
            ],
        }


def describe(problem: Problem) -> str:
    """One line of printable characters: kind, file, ids and text."""
    places = []
    if problem.file is not None:
        places.append(f"file {problem.file}")
    if problem.image_id is not None:
        places.append(f"image {problem.image_id}")
    if problem.annotation_id is not None:
        places.append(f"annotation {problem.annotation_id}")
    where = f" ({', '.join(places)})" if places else ""
    line = f"{problem.kind}{where}: {problem.text}"
    return "".join(c if c.isprintable() else ascii(c)[1:-1] for c in line)


def check_dataset(parsed: Parsed, *, read_pixels: bool = True) -> Report:
    """List every problem of a split, those of its files included.

    Looks at each box and each mask, and decodes each image; with read_pixels False only the header
    of each image. Boxes may reach one pixel over the border. Raises DataError on no image at all.
    """
    if not parsed.num_images:
        raise DataError(f"{parsed.data.annotation_file}: expected at least one image, found none")
    return _examine(parsed, read_pixels=read_pixels)[1]


def load_checked(
    parsed: Parsed, *, skip_bad: bool = False, read_pixels: bool = True
) -> tuple[DetectionData, Report]:
    """The split once checked, without what is bad under skip_bad.

    A bad annotation is left out alone, a bad image with its annotations. Raises DataError with the
    report's summary on any problem without skip_bad, and where no image remains.
    """
    data, report = _examine(parsed, read_pixels=read_pixels)
    if not report.is_good and not skip_bad:
        raise DataError(report.summary())
    if not data.images:
        raise DataError(f"expected a usable image, got none\n{report.summary()}")
    return data, report


def _examine(parsed: Parsed, *, read_pixels: bool) -> tuple[DetectionData, Report]:
    """What is good of the split, and what is not."""
    data, problems, good_images = parsed.data, list(parsed.problems), []
    for image, file_problem in zip(data.images, _check_files(parsed, read_pixels), strict=True):
        good_annotations = []
        for annotation in image.annotations:
            problem = _check_annotation(annotation, image, parsed.places.get(annotation.id))
            if problem is None:
                good_annotations.append(annotation)
            else:
                problems.append(problem)
        if file_problem is None:
            good_images.append(replace(image, annotations=tuple(good_annotations)))
        else:
            problems.append(file_problem)
    counts = parsed.num_images, parsed.num_annotations
    report = Report(data.annotation_file, *counts, tuple(problems))
    return replace(data, images=tuple(good_images)), report


def _check_files(parsed: Parsed, read_pixels: bool) -> list[Problem | None]:
    images = parsed.data.images
    if parsed.sizes_measured and not read_pixels:
        return [None] * len(images)
    # Pillow decodes without holding the interpreter's lock.
    with ThreadPoolExecutor(min(MAX_THREADS, os.cpu_count() or 1)) as pool:
        return list(pool.map(lambda image: _check_file(image, read_pixels), images))


def _check_file(image: ImageRecord, read_pixels: bool) -> Problem | None:
    declared = (image.height, image.width)
    try:
        size = None if read_pixels else image_size(image.path)
        if size != declared:
            # Annotations may be made on the pixels as stored, before the EXIF orientation.
            pixels = read_image(image.path, expected_size=declared)
            size = (pixels.shape[0], pixels.shape[1])
    except ImageError as error:
        missing = not os.path.lexists(image.path)
        kind = ProblemKind.MISSING_FILE if missing else ProblemKind.UNREADABLE_FILE
        return Problem(kind, str(error), image.path.name, image.id)
    if size == declared:
        return None
    text = (
        f"expected {declared[0]} x {declared[1]} (height x width) as declared, "
        f"got {size[0]} x {size[1]}"
    )
    return Problem(ProblemKind.IMAGE_SIZE, text, image.path.name, image.id)


def _check_annotation(
    annotation: Annotation, image: ImageRecord, place: str | None
) -> Problem | None:
    kind, text = _box_problem(annotation, image) or _mask_problem(annotation, image) or (None, "")
    if kind is None:
        return None
    text = text if place is None else f"{place}: {text}"
    return Problem(kind, text, image.path.name, image.id, annotation.id)


def _box_problem(annotation: Annotation, image: ImageRecord) -> tuple[ProblemKind, str] | None:
    x1, y1, x2, y2 = annotation.box_xyxy
    if x2 <= x1 or y2 <= y1:
        text = f"expected a width and height above 0, got {x2 - x1:g} x {y2 - y1:g}"
        return ProblemKind.DEGENERATE_BOX, text
    over = max(-x1, -y1, x2 - image.width, y2 - image.height)
    if over > BORDER_TOLERANCE:
        box = ", ".join(f"{side:g}" for side in annotation.box_xyxy)
        text = f"expected corners in {image.width} x {image.height} (width x height), got {box}"
        return ProblemKind.OUTSIDE_BOX, text
    return None


def _mask_problem(annotation: Annotation, image: ImageRecord) -> tuple[ProblemKind, str] | None:
    try:
        runs = mask_runs(annotation, image.height, image.width)
    except DataError as error:
        return ProblemKind.SEGMENTATION, str(error)
    if runs is not None and not any(runs[1::2]):
        return ProblemKind.SEGMENTATION, "expected a pixel inside the image, got none"
    return None
