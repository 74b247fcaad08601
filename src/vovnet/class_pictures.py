"""Pictures of a classifier's answers: the confusion matrix, and a sheet of the worst mistakes."""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageDraw, ImageFont

from vovnet.errors import ConfigError, ImageError
from vovnet.files import atomic_path

TILE = 176
COLUMNS = 6
MAX_NAMES = 60
MAX_NUMBERED_CLASSES = 24
MAX_NAME_LENGTH = 24

# Looked for where the system keeps its fonts; the first that has every letter of a text writes it.
FONTS = (
    "DejaVuSans.ttf",
    "NotoSans-Regular.ttf",
    "NotoSansCJK-Regular.ttc",
    "NotoSansKR-Regular.otf",
    "NanumGothic.ttf",
    "wqy-microhei.ttc",
    "AppleSDGothicNeo.ttc",
    "Arial Unicode.ttf",
    "malgun.ttf",
    "msyh.ttc",
    "arial.ttf",
)
_NOT_A_LETTER = "\U0010ffff"
_FONT_SIZE = 13
_PAD = 6

Font = ImageFont.FreeTypeFont | ImageFont.ImageFont


@dataclass(frozen=True, slots=True)
class Mistake:
    """A picture that got another class than its own, and how probable the network held that."""

    index: int
    true: int
    given: int
    probability: float


def find_mistakes(
    probabilities: NDArray[np.floating[Any]], labels: NDArray[np.integer[Any]], *, limit: int = 36
) -> list[Mistake]:
    """The wrong answers that the network held most probable, those first; equals in data order.

    probabilities (N, C), labels (N,). Of equally probable classes the first is the one given.
    """
    given = probabilities.argmax(axis=1)
    wrong = np.flatnonzero(given != labels)
    highest = probabilities[wrong, given[wrong]]
    return [
        Mistake(int(i), int(labels[i]), int(given[i]), float(probabilities[i, given[i]]))
        for i in wrong[np.argsort(-highest, kind="stable")][:limit]
    ]


def draw_mistakes(
    mistakes: Sequence[Mistake],
    read: Callable[[int], NDArray[np.uint8]],
    class_names: Sequence[str],
) -> NDArray[np.uint8]:
    """A sheet (H, W, 3) uint8 RGB with a tile for each mistake: its picture, and what was said.

    `read` gives the picture of an index, uint8 (H, W, 3) RGB. A class whose name no font here can
    write is called by its number.
    """
    rows = max(1, math.ceil(len(mistakes) / COLUMNS))
    line = round(1.5 * _FONT_SIZE)
    width, height = TILE + 2 * _PAD, TILE + 3 * _PAD + 2 * line
    sheet = Image.new("RGB", (COLUMNS * width, rows * height), "white")
    draw = ImageDraw.Draw(sheet)
    if not mistakes:
        draw.text((_PAD, _PAD), "no wrong answer", fill="black", font=_font(None, _FONT_SIZE))
    for place, mistake in enumerate(mistakes):
        left, top = place % COLUMNS * width + _PAD, place // COLUMNS * height + _PAD
        sheet.paste(_thumbnail(mistake, read), (left, top))
        true, given = (class_names[label] for label in (mistake.true, mistake.given))
        probability = f"{mistake.probability:.2f}"
        below = top + TILE + _PAD
        _write(draw, (left, below), "is ", true, mistake.true, "", "black")
        _write(
            draw, (left, below + line), "got ", given, mistake.given, f" {probability}", "#b00020"
        )
    return np.array(sheet)


def check_drawing() -> None:
    """Raise ConfigError where matplotlib, which `draw_confusion` needs, is missing."""
    try:
        import matplotlib.figure  # noqa: F401
    except ImportError as error:
        raise ConfigError(
            "drawing: expected matplotlib, found none; install vovnet with its extra: "
            "vovnet[profile]"
        ) from error


def draw_confusion(confusion: NDArray[np.int64], class_names: Sequence[str], path: Path) -> None:
    """Draw a confusion matrix (C, C), rows true and columns given, into a picture (.png).

    Colours are shares of a row's images; the counts are written where they fit, and of many
    classes every n-th is named. Raises ConfigError when matplotlib is missing.
    """
    check_drawing()
    from matplotlib.colors import PowerNorm
    from matplotlib.figure import Figure

    count = len(class_names)
    side = float(np.clip(2.5 + 0.32 * count, 5, 13))
    figure = Figure(figsize=(side + 1, side), layout="constrained")
    axes = figure.add_subplot()
    totals = confusion.sum(axis=1, keepdims=True)
    shares = np.where(totals > 0, confusion / np.maximum(totals, 1), np.nan)
    # The square root of the share: a few confused images would not be seen beside the diagonal.
    norm = PowerNorm(0.5, vmin=0, vmax=1)
    shown = axes.imshow(shares, cmap="Blues", norm=norm, interpolation="nearest")
    _name_axes(axes, class_names)
    if count <= MAX_NUMBERED_CLASSES:
        _write_counts(axes, confusion, shares)
    figure.colorbar(shown, ax=axes, label="share of the class's images", shrink=0.8)
    with atomic_path(path) as temporary:
        figure.savefig(temporary, format="png", dpi=150)


def _name_axes(axes: Any, class_names: Sequence[str]) -> None:
    step = math.ceil(len(class_names) / MAX_NAMES)
    places = range(0, len(class_names), step)
    size = float(np.clip(12 - 0.1 * len(places), 6, 10))
    texts = [written_name(class_names[place], place) for place in places]
    axes.set_xticks(places, texts, fontsize=size, rotation=90, parse_math=False)
    axes.set_yticks(places, texts, fontsize=size, parse_math=False)
    for label in (*axes.get_xticklabels(), *axes.get_yticklabels()):
        file = font_file(label.get_text())
        if file is not None:
            label.set_font(file)
            label.set_fontsize(size)
    every = "" if step == 1 else f" (1 of {step} is named)"
    axes.set_xlabel(f"class given{every}")
    axes.set_ylabel(f"true class{every}")


def _write_counts(axes: Any, confusion: NDArray[np.int64], shares: NDArray[np.float64]) -> None:
    digits = len(str(confusion.max()))
    size = min(10.0, 26 / digits)
    for row, column in np.argwhere(confusion):
        colour = "white" if shares[row, column] > 0.3 else "black"
        axes.text(
            column,
            row,
            str(confusion[row, column]),
            ha="center",
            va="center",
            color=colour,
            fontsize=size,
        )


def written_name(name: str, label: int) -> str:
    """A class name on one line, short enough to stand in a picture; its number where no font
    here can write it.
    """
    text = "".join(letter if letter.isprintable() else " " for letter in name)
    if font_file(text) is None and not _has_letters(_font(None, _FONT_SIZE), text):
        return f"class {label}"
    return text if len(text) <= MAX_NAME_LENGTH else text[: MAX_NAME_LENGTH - 1] + "…"


@cache
def font_file(text: str) -> Path | None:
    """The first font of the system that can write a text; None for Pillow's own."""
    if text.isascii():
        return None
    for name in FONTS:
        try:
            font = ImageFont.truetype(name, _FONT_SIZE)
        except OSError:
            continue
        if _has_letters(font, text):
            return Path(str(font.path))
    return None


def _has_letters(font: Font, text: str) -> bool:
    """A font draws the same box for every letter that it lacks."""
    missing = bytes(font.getmask(_NOT_A_LETTER))
    return all(bytes(font.getmask(letter)) != missing for letter in set(text) if letter > "\x7f")


@cache
def _font(file: Path | None, size: int) -> Font:
    return ImageFont.load_default(size) if file is None else ImageFont.truetype(str(file), size)


def _write(
    draw: ImageDraw.ImageDraw,
    place: tuple[int, int],
    before: str,
    name: str,
    label: int,
    after: str,
    colour: str,
) -> None:
    """One line of a tile; a name that is too long for it is cut, what stands around is not."""
    name = written_name(name, label)
    font = _font(font_file(name), _FONT_SIZE)
    text = before + name + after
    while font.getlength(text) > TILE and len(name) > 1:
        name = name.removesuffix("…")[:-1] + "…"
        text = before + name + after
    draw.text(place, text, fill=colour, font=font)


def _thumbnail(mistake: Mistake, read: Callable[[int], NDArray[np.uint8]]) -> Image.Image:
    """The whole picture, as large as it fits into a square tile."""
    tile = Image.new("RGB", (TILE, TILE), "#e8e8e8")
    try:
        picture = Image.fromarray(read(mistake.index))
    except ImageError:  # it was there when the network saw it
        return tile
    factor = TILE / max(picture.size)
    size = tuple(max(1, round(side * factor)) for side in picture.size)
    picture = picture.resize((size[0], size[1]), Image.Resampling.BICUBIC)
    tile.paste(picture, ((TILE - picture.width) // 2, (TILE - picture.height) // 2))
    return tile
