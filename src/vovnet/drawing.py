"""Detections drawn on their image, with Pillow and numpy alone."""

import colorsys

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageDraw, ImageFont

from .results import Detections, MaskCrop

FEW_OBJECTS = 10
MIN_SIDE_FOR_LABELS = 320
MAX_NAME_LENGTH = 30
DARKEST = 90

Colour = tuple[int, int, int]


def draw_detections(
    image: NDArray[np.uint8],
    detections: Detections,
    *,
    show_labels: bool | None = None,
    mask_alpha: float = 0.4,
) -> NDArray[np.uint8]:
    """Return a copy of a uint8 (H, W, 3) RGB image with the objects drawn on it.

    Masks are filled with `mask_alpha` (0 unseen, 1 opaque) and outlined, small ones over large
    ones; boxes are drawn where there are no masks or where labels are shown. With one class each
    object has its own colour, else each class. `show_labels=None` writes class and score when
    there is more than one class, or at most FEW_OBJECTS objects in an image whose sides are no
    shorter than MIN_SIDE_FOR_LABELS.

    Raises ValueError on another dtype or shape than the detections' image and on an alpha outside
    0..1.
    """
    _check(image, detections, mask_alpha)
    if show_labels is None:
        few = len(detections) <= FEW_OBJECTS and min(image.shape[:2]) >= MIN_SIDE_FOR_LABELS
        show_labels = few or len(detections.class_names) > 1
    colours = _object_colours(detections)
    drawn = image.copy()
    if detections.masks is not None:
        _draw_masks(drawn, detections.masks, colours, mask_alpha)
    if detections.masks is None or show_labels:
        drawn = _draw_boxes(drawn, detections, colours, show_labels)
    return drawn


def _check(image: NDArray[np.uint8], detections: Detections, mask_alpha: float) -> None:
    shape = (*detections.image_size, 3)
    if image.dtype != np.uint8 or image.shape != shape:
        raise ValueError(
            f"image: expected uint8 of shape {shape}, the detections' image, "
            f"got {image.dtype} of {image.shape}"
        )
    if not 0 <= mask_alpha <= 1:
        raise ValueError(f"mask_alpha: expected 0 to 1, got {mask_alpha}")


def _object_colours(detections: Detections) -> list[Colour]:
    several_classes = len(detections.class_names) > 1
    keys = detections.labels.tolist() if several_classes else range(len(detections))
    return [_colour(key) for key in keys]


def _colour(index: int) -> Colour:
    # Steps of the golden ratio keep any number of hues apart; the cycle of three parts those that
    # come near each other in the end.
    hue = (0.02 + index * 0.618034) % 1
    saturation, value = ((0.85, 1.0), (0.6, 1.0), (0.95, 0.85))[index % 3]
    red, green, blue = (
        round(255 * channel) for channel in colorsys.hsv_to_rgb(hue, saturation, value)
    )
    # Blue is dark: enough white makes it visible on dark images.
    lift = max(0.0, (DARKEST - _luminance((red, green, blue))) / (255 - DARKEST))
    red, green, blue = (round(channel + (255 - channel) * lift) for channel in (red, green, blue))
    return red, green, blue


def _luminance(colour: Colour) -> float:
    red, green, blue = colour
    return 0.299 * red + 0.587 * green + 0.114 * blue


def _draw_masks(
    drawn: NDArray[np.uint8],
    masks: tuple[MaskCrop, ...],
    colours: list[Colour],
    alpha: float,
) -> None:
    """Blend the masks into `drawn`, in place, each pixel with the topmost object's colour."""
    owners = _owners(masks, drawn.shape[:2])
    line_width = max(1, round(max(owners.shape) / 700))
    places = np.flatnonzero(owners)
    owner = owners.ravel()[places]
    table = np.array([(0, 0, 0), *colours], dtype=np.float32)  # (N + 1, 3)
    strength = np.where(_outlines(owners, line_width).ravel()[places], np.float32(1), alpha)
    pixels = drawn.reshape(-1, 3)
    ground = pixels[places].astype(np.float32)
    blended = ground + (table[owner] - ground) * strength[:, None]
    pixels[places] = np.rint(blended).astype(np.uint8)


def _owners(masks: tuple[MaskCrop, ...], image_size: tuple[int, ...]) -> NDArray[np.int32]:
    """Return (H, W): 1 + the index of the smallest object on each pixel, 0 where there is none."""
    owners = np.zeros(image_size, dtype=np.int32)
    areas = [np.count_nonzero(crop.pixels) for crop in masks]
    for index in sorted(range(len(masks)), key=lambda i: -areas[i]):
        crop = masks[index]
        height, width = crop.pixels.shape
        region = owners[crop.y : crop.y + height, crop.x : crop.x + width]
        region[crop.pixels] = index + 1
    return owners


def _outlines(owners: NDArray[np.int32], line_width: int) -> NDArray[np.bool_]:
    """Return (H, W), True on the pixels within `line_width` of another object or the ground."""
    edge = np.zeros(owners.shape, dtype=np.bool_)
    for step in range(1, line_width + 1):
        below = owners[step:] != owners[:-step]
        edge[step:] |= below
        edge[:-step] |= below
        beside = owners[:, step:] != owners[:, :-step]
        edge[:, step:] |= beside
        edge[:, :-step] |= beside
    return edge


def _draw_boxes(
    drawn: NDArray[np.uint8],
    detections: Detections,
    colours: list[Colour],
    show_labels: bool,
) -> NDArray[np.uint8]:
    height, width = detections.image_size
    line_width = max(1, round(max(height, width) / 400))
    canvas = Image.fromarray(drawn)
    draw = ImageDraw.Draw(canvas)
    last = np.array([width, height, width, height]) - 1
    # The last pixel of a box is the one before its right and lower edge.
    inclusive = np.rint(detections.boxes_xyxy) - np.array([0, 0, 1, 1])
    corners = np.clip(inclusive, 0, last).astype(int)  # (N, 4)
    corners[:, 2:] = np.maximum(corners[:, 2:], corners[:, :2])
    for box, colour in zip(corners.tolist(), colours, strict=True):
        draw.rectangle(box, outline=colour, width=line_width)
    if show_labels:
        _draw_labels(draw, detections, corners, colours)
    return np.array(canvas)


def _draw_labels(
    draw: ImageDraw.ImageDraw,
    detections: Detections,
    corners: NDArray[np.int64],
    colours: list[Colour],
) -> None:
    """Write class and score on a plate above each box, or inside it at the image's upper edge."""
    height, width = detections.image_size
    font_size = min(24, max(11, round(min(height, width) / 45)))
    font = ImageFont.load_default(font_size)
    texts: dict[str, Image.Image] = {}
    # The best last, so that no other plate covers it.
    for index in np.argsort(detections.scores, kind="stable").tolist():
        name = _shown_name(detections.class_names[detections.labels[index]])
        text = f"{name}  {detections.scores[index]:.2f}"
        if text not in texts:
            texts[text] = _text_mask(text, font, font_size)
        plate = texts[text]
        left, top = corners[index, :2].tolist()
        left = max(0, min(left, width - plate.width))
        top = top - plate.height if top >= plate.height else top
        end = (left + plate.width - 1, top + plate.height - 1)
        draw.rectangle(((left, top), end), fill=colours[index])
        draw.bitmap((left, top), plate, fill=_ink(colours[index]))


def _text_mask(
    text: str, font: ImageFont.FreeTypeFont | ImageFont.ImageFont, font_size: int
) -> Image.Image:
    """Return a grey image of the text, as large as the plate that it stands on."""
    pad = max(2, font_size // 6)
    size = (round(font.getlength(text)) + 2 * pad, font_size + 2 * pad)
    mask = Image.new("L", size)
    ImageDraw.Draw(mask).text((pad, size[1] / 2), text, fill=255, font=font, anchor="lm")
    return mask


def _shown_name(name: str) -> str:
    text = "".join(character if character.isprintable() else " " for character in name)
    return text if len(text) <= MAX_NAME_LENGTH else text[: MAX_NAME_LENGTH - 1] + "…"


def _ink(colour: Colour) -> Colour:
    return (0, 0, 0) if _luminance(colour) > 140 else (255, 255, 255)
