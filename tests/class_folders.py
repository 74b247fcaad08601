"""A data set of coloured pictures with a folder for each class, for tests."""

from pathlib import Path

import numpy as np
from PIL import Image

COLOURS = {"blue": (40, 60, 220), "green": (40, 200, 60), "red": (220, 50, 40)}


def make_class_folders(
    folder: Path, *, splits: tuple[str, ...] = ("train", "val"), count: int = 6, side: int = 40
) -> Path:
    """`count` noisy PNG pictures of each colour, in folder/SPLIT/COLOUR/."""
    draw = np.random.default_rng(0)
    for split in splits:
        for name, colour in COLOURS.items():
            (folder / split / name).mkdir(parents=True)
            for number in range(count):
                noise = draw.integers(-30, 31, (side, side + 4, 3))
                pixels = (np.array(colour) + noise).clip(0, 255).astype(np.uint8)
                Image.fromarray(pixels).save(folder / split / name / f"{number}.png")
    return folder
