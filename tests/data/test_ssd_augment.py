"""SSD's colours, against HSV pixel by pixel; resampling of every kind."""

import colorsys

import pytest
import torch
from PIL import Image

from vovnet.data import ssd_augment
from vovnet.data.ssd_augment import (
    _brighten,
    _saturate,
    _scale,
    _turn_hue,
    distort_colours,
    resize_randomly,
)


def picture(seed: int = 0) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(0, 256, (3, 9, 11), generator=generator, dtype=torch.uint8)


def by_pixel(pixels: torch.Tensor, turn: float, factor: float) -> torch.Tensor:
    """Hue turned and saturation scaled in HSV, one pixel at a time."""
    result = pixels.clone()
    for y in range(pixels.shape[1]):
        for x in range(pixels.shape[2]):
            h, s, v = colorsys.rgb_to_hsv(*pixels[:, y, x].tolist())
            changed = colorsys.hsv_to_rgb((h + turn) % 1, min(1.0, s * factor), v)
            result[:, y, x] = torch.tensor(changed)
    return result


@pytest.mark.parametrize("drawn", [0.0, 0.3, 1.0])
def test_each_change_is_that_of_hsv(drawn: float) -> None:
    pixels = picture().float() / 255
    saturated = by_pixel(pixels, 0.0, 0.5 + drawn)
    torch.testing.assert_close(_saturate(pixels, drawn), saturated, atol=1e-5, rtol=0)
    turned = by_pixel(pixels, 0.1 * (2 * drawn - 1), 1.0)
    torch.testing.assert_close(_turn_hue(pixels, drawn), turned, atol=1e-4, rtol=0)
    step = 32 / 255 * (2 * drawn - 1)
    torch.testing.assert_close(_brighten(pixels, drawn), pixels + step)
    torch.testing.assert_close(_scale(pixels, drawn), pixels * (0.5 + drawn))


def test_grey_and_black_have_no_saturation_to_change() -> None:
    grey = torch.full((3, 2, 2), 0.4)
    torch.testing.assert_close(_saturate(grey, 1.0), grey)
    black = torch.zeros(3, 2, 2)
    torch.testing.assert_close(_saturate(black, 1.0), black)


def test_probability_zero_changes_nothing_and_one_everything(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    image = picture()
    assert torch.equal(distort_colours(image, 0.0), image)
    called: list[str] = []
    for name in ("_brighten", "_scale", "_saturate", "_turn_hue"):
        step = getattr(ssd_augment, name)

        def noted(pixels: torch.Tensor, drawn: float, name=name, step=step) -> torch.Tensor:
            called.append(name)
            result: torch.Tensor = step(pixels, drawn)
            return result

        monkeypatch.setattr(ssd_augment, name, noted)
    orders = set()
    for seed in range(10):
        called.clear()
        torch.manual_seed(seed)
        result = distort_colours(image, 1.0)
        assert result.dtype == torch.uint8
        assert not torch.equal(result, image)
        orders.add(tuple(called))
    contrast_second = ("_brighten", "_scale", "_saturate", "_turn_hue")
    contrast_last = ("_brighten", "_saturate", "_turn_hue", "_scale")
    assert orders == {contrast_second, contrast_last}


def test_each_change_happens_by_itself_half_of_the_time(monkeypatch: pytest.MonkeyPatch) -> None:
    counts = dict.fromkeys(("_brighten", "_scale", "_saturate", "_turn_hue"), 0)
    for name in counts:

        def noted(pixels: torch.Tensor, drawn: float, name=name) -> torch.Tensor:
            counts[name] += 1
            return pixels

        monkeypatch.setattr(ssd_augment, name, noted)
    torch.manual_seed(0)
    for _ in range(400):
        distort_colours(picture(), 0.5)
    assert all(160 < count < 240 for count in counts.values())


def test_five_kinds_of_resampling() -> None:
    image = picture()
    source = Image.fromarray(image.permute(1, 2, 0).numpy())
    kinds = ("NEAREST", "BOX", "BILINEAR", "BICUBIC", "LANCZOS")
    expected = {
        source.resize((20, 16), getattr(Image.Resampling, kind)).tobytes(): kind for kind in kinds
    }
    torch.manual_seed(0)
    seen = set()
    for _ in range(60):
        resized = resize_randomly(image, (16, 20))
        assert resized.shape == (3, 16, 20)
        seen.add(expected[resized.permute(1, 2, 0).contiguous().numpy().tobytes()])
    # Of an enlargement the box takes the nearest pixel: both have the same bytes.
    assert len(seen) == len(expected) >= 4
