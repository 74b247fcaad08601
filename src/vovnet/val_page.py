"""The page of `vovnet val --html`: figures, curves, confusions, and pictures of the errors."""

import base64
import colorsys
import io
import math
from collections.abc import Sequence
from html import escape

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageDraw

from vovnet.data.labels import DetectionData
from vovnet.error_analysis import (
    Box,
    ClassFigures,
    Curves,
    ErrorAnalysis,
    ErrorKind,
    Finding,
    class_figures,
)
from vovnet.evaluation import Metrics
from vovnet.html_page import html_page, html_paragraphs, html_table
from vovnet.images import read_image

PICTURES_OF_KIND = 12
MAX_CONFUSED, MAX_CURVES = 25, 20  # classes that one matrix, and one plot, shows

_COLUMNS = (
    "class", "AP", "AP50", "AP75", "AP small", "AP medium", "AP large",
    "AR", "AR small", "AR medium", "AR large",
)  # fmt: skip
_WORDS = {"bbox": "boxes", "segm": "masks"}
_MEANINGS = {
    ErrorKind.CLASS: "overlaps an object of another class by 0.5 or more",
    ErrorKind.LOCALISATION: "overlaps an object of its class by 0.1 to 0.5",
    ErrorKind.BOTH: "overlaps an object of another class by 0.1 to 0.5",
    ErrorKind.DUPLICATE: "overlaps an object that a better detection has found",
    ErrorKind.BACKGROUND: "overlaps no object by 0.1",
    ErrorKind.MISSED: "an object that no detection found, nor nearly found",
}
_STYLE = """
.plot { color: var(--ink); width: 34rem } .plots { display: flex; flex-wrap: wrap; gap: 1rem }
.matrix td { text-align: center; border: 1px solid var(--line) }
.matrix thead th { writing-mode: vertical-rl; text-align: right; border: 0 }
.gallery { display: flex; flex-wrap: wrap; gap: .8rem } .gallery figure { margin: 0; width: 11rem }
.gallery img { display: block; max-width: 100%; border-radius: 3px }
.found { color: #e8710a } .truth { color: #1e8fd5 }
"""
_FOUND, _TRUTH = (232, 113, 10), (30, 143, 213)
_TILE = 176  # pixels of a picture's longer side


def val_page(
    title: str,
    data: DetectionData,
    metrics: Metrics,
    curves: Sequence[Curves],
    errors: ErrorAnalysis,
    *,
    pictures: int = PICTURES_OF_KIND,
) -> str:
    """The whole page, at most `pictures` pictures of each kind of error.

    Reads the images of the errors that it shows; raises ImageError on one that cannot be read.
    """
    parts = [f"<h1>{escape(title)}</h1>", html_paragraphs(metrics.format().splitlines())]
    for entry in curves:
        word = _WORDS[entry.iou_type]
        parts += [f"<h2>Average precision and recall of {word}</h2>", _figures_table(entry)]
        parts += [f"<h2>Precision against recall of {word}</h2>", _curve_plots(entry, data)]
    where = f"at overlap 0.5, of detections with a score of {errors.min_score:.3g} and above"
    parts += [
        "<h2>Confusions</h2>",
        _matrix(errors.confusion, data.class_names),
        html_paragraphs([f"True classes in rows, found ones in columns, {where}."]),
        "<h2>Errors by kind</h2>",
        _kinds_table(errors),
        html_paragraphs([f"{errors.num_correct} detections are right, {where}."]),
        "<h2>Errors in pictures</h2>",
        '<p>The box that was <span class="found">found</span>, and the object that is '
        '<span class="truth">there</span>; of each kind those of the highest scores, of the '
        "missed ones the largest.</p>",
    ]
    for kind in ErrorKind:
        parts += _gallery(kind, errors.of_kind(kind)[:pictures], data)
    return html_page(title, parts, style=_STYLE)


def _figures_table(curves: Curves) -> str:
    return html_table(_COLUMNS, [_figures_row(figures) for figures in class_figures(curves)])


def _figures_row(figures: ClassFigures) -> list[str]:
    numbers = (figures.ap, figures.ap50, figures.ap75, *figures.ap_by_area)
    return [figures.name, *map(_show, (*numbers, figures.ar, *figures.ar_by_area))]


def _show(value: float) -> str:
    return "n/a" if math.isnan(value) else f"{value:.3f}"


def _curve_plots(curves: Curves, data: DetectionData) -> str:
    """A plot for overlap 0.5 and one for 0.75, of the classes with the most objects and of all."""
    labels = [a.label for image in data.images for a in image.annotations if not a.is_ignored]
    counts = np.bincount(np.array(labels, dtype=np.int64), minlength=len(data.class_names))
    most = sorted(np.argsort(-counts, kind="stable")[:MAX_CURVES].tolist())
    note = "" if len(most) == len(counts) else f", the {MAX_CURVES} most frequent classes"
    plots = []
    for overlap in (0.5, 0.75):
        values = curves.precision[curves.place(overlap), :, :, 0]  # (R, K)
        existing: NDArray[np.bool_] = np.all(values > -1, axis=0)
        lines = [(data.class_names[k], values[:, k]) for k in most if existing[k]]
        if len(lines) > 1:
            lines.insert(0, ("mean of all", values[:, existing].mean(axis=1)))
        caption = f"overlap {overlap}{note}"
        plots.append(f"<figure>{_plot(lines)}<figcaption>{escape(caption)}</figcaption></figure>")
    return f'<div class="plots">{"".join(plots)}</div>'


def _plot(lines: Sequence[tuple[str, NDArray[np.float64]]]) -> str:
    """Curves over 0..1, each (101,), with their names beside; of several the first is bold."""
    left, top, width, height = 42, 8, 300, 260
    shapes = []
    for tick in range(0, 11, 2):
        x, y = left + width * tick / 10, top + height * (1 - tick / 10)
        shapes += [
            f'<path d="M{x:g} {top}V{top + height}M{left} {y:g}H{left + width}" class="grid"/>',
            f'<text x="{x:g}" y="{top + height + 16}" text-anchor="middle">{tick / 10:g}</text>',
            f'<text x="{left - 6}" y="{y + 4:g}" text-anchor="end">{tick / 10:g}</text>',
        ]
    for number, (name, values) in enumerate(lines):
        is_mean = number == 0 and len(lines) > 1
        colour, weight = ("currentColor", 3) if is_mean else (_colour(number), 1.6)
        steps = zip(np.linspace(left, left + width, len(values)), values, strict=True)
        points = " ".join(f"{x:.1f},{top + height * (1 - y):.1f}" for x, y in steps)
        y = top + 10 + 13 * number
        short = name if len(name) <= 24 else f"{name[:23]}…"
        shapes += [
            f'<polyline points="{points}" fill="none" stroke="{colour}" stroke-width="{weight}"/>',
            f'<rect x="{left + width + 12}" y="{y - 8}" width="9" height="9" fill="{colour}"/>',
            f'<text x="{left + width + 26}" y="{y}">{escape(short)}</text>',
        ]
    labels = (
        f'<text x="{left + width / 2}" y="{top + height + 34}" text-anchor="middle">recall</text>'
        f'<text transform="translate(11 {top + height / 2}) rotate(-90)" text-anchor="middle">'
        "precision</text>"
    )
    return (
        f'<svg class="plot" viewBox="0 0 540 {top + height + 40}" font-size="11" '
        'fill="currentColor" role="img" aria-label="precision against recall">'
        "<style>.grid { stroke: currentColor; stroke-opacity: .15; fill: none }</style>"
        + "".join(shapes)
        + labels
        + "</svg>"
    )


def _colour(number: int) -> str:
    """Hues far from one another, of a lightness that shows on white and on black."""
    red, green, blue = colorsys.hls_to_rgb((0.58 + 0.382 * number) % 1, 0.5, 0.65)
    return f"#{round(255 * red):02x}{round(255 * green):02x}{round(255 * blue):02x}"


def _matrix(confusion: NDArray[np.int64], class_names: Sequence[str]) -> str:
    """Counts, shaded by their share of the row; of many classes those confused most."""
    background = len(class_names)
    wrong = confusion.sum(0) + confusion.sum(1) - 2 * confusion.diagonal()
    most = sorted(np.argsort(-wrong[:background], kind="stable")[:MAX_CONFUSED].tolist())
    shown = [*most, background]
    names = [*class_names, "background"]
    head = "".join(f"<th>{escape(names[k])}</th>" for k in shown)
    rows = []
    for true in shown:
        total = max(1, int(confusion[true].sum()))
        cells = []
        for found in shown:
            count = int(confusion[true, found])
            tint = "30,160,90" if true == found else "215,70,50"
            shade = f' style="background: rgba({tint},{0.6 * count / total:.3f})"' if count else ""
            cells.append(f"<td{shade}>{count or ''}</td>")
        rows.append(f"<tr><th>{escape(names[true])}</th>{''.join(cells)}</tr>")
    left_out = background - len(most)
    note = f"{left_out} classes with fewer confusions are not shown." if left_out else ""
    return (
        f'<table class="matrix">\n<thead><tr><th></th>{head}</tr></thead>\n<tbody>\n'
        + "\n".join(rows)
        + f"\n</tbody>\n</table>\n{html_paragraphs([note]) if note else ''}"
    )


def _kinds_table(errors: ErrorAnalysis) -> str:
    rows = [[f"{kind}: {_MEANINGS[kind]}", str(len(errors.of_kind(kind)))] for kind in ErrorKind]
    return html_table(["kind", "number"], rows)


def _gallery(kind: ErrorKind, findings: Sequence[Finding], data: DetectionData) -> list[str]:
    if not findings:
        return []
    tiles = "\n".join(_tile(finding, data) for finding in findings)
    return [f"<h3>{escape(kind)}</h3>", f'<div class="gallery">\n{tiles}\n</div>']


def _tile(finding: Finding, data: DetectionData) -> str:
    record = data.images[finding.image]
    image = read_image(record.path, expected_size=(record.height, record.width))
    jpeg = base64.b64encode(_cut_out(image, finding)).decode("ascii")
    words = []
    if finding.found_label is not None:
        name = escape(data.class_names[finding.found_label])
        words.append(f'<span class="found">{name}</span> {finding.score:.2f}')
    if finding.true_label is not None:
        words.append(f'<span class="truth">{escape(data.class_names[finding.true_label])}</span>')
    if finding.overlap:
        words.append(f"IoU {finding.overlap:.2f}")
    caption = f"{', '.join(words)}<br>{escape(record.path.name)}"
    return (
        f'<figure><img alt="{escape(finding.kind)}" src="data:image/jpeg;base64,{jpeg}">'
        f"<figcaption>{caption}</figcaption></figure>"
    )


def _cut_out(image: NDArray[np.uint8], finding: Finding) -> bytes:
    """The boxes with something around them, enlarged or reduced, as JPEG."""
    boxes = [box for box in (finding.found, finding.truth) if box is not None]
    left, top, right, bottom = _surroundings(boxes, image.shape[:2])
    part = Image.fromarray(np.ascontiguousarray(image[top:bottom, left:right]))
    factor = _TILE / max(part.size)
    size = (max(1, round(part.width * factor)), max(1, round(part.height * factor)))
    tile = part.resize(size, Image.Resampling.BICUBIC)
    draw = ImageDraw.Draw(tile)
    for box, colour in ((finding.truth, _TRUTH), (finding.found, _FOUND)):
        if box is not None:
            x1, y1, x2, y2 = np.subtract(box, (left, top, left, top)) * factor
            draw.rectangle((x1, y1, max(x1, x2 - 1), max(y1, y2 - 1)), outline=colour, width=2)
    stream = io.BytesIO()
    tile.save(stream, format="JPEG", quality=80)
    return stream.getvalue()


def _surroundings(boxes: Sequence[Box], shape: tuple[int, ...]) -> tuple[int, int, int, int]:
    """Left, top, right and bottom of a part of the image that holds the boxes and a margin."""
    corners = np.array(boxes)
    low, high = corners[:, :2].min(0), corners[:, 2:].max(0)
    margin = max(12.0, 0.4 * float((high - low).max()))
    sides = np.array([shape[1], shape[0]])
    start = np.clip(np.floor(low - margin), 0, sides - 1).astype(int)
    stop = np.clip(np.ceil(high + margin), start + 1, sides).astype(int)
    return int(start[0]), int(start[1]), int(stop[0]), int(stop[1])
