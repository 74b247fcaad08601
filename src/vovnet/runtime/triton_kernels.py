"""The end of an OSA block as Triton kernels: its 1x1 convolution over the maps where they lie,
without a concat, and eSE's gate with the residual in one pass.

A tile of the convolution adds bias and ReLU, and sums its pixels for eSE's mean. Each tile writes
its sums to a place of its own and a second kernel adds them in a fixed order: atomic additions
would come in another order each time, and the last digits of a result with them. Tiles are chosen
by rule, not by timing, for the same reason.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cache
from importlib.util import find_spec
from itertools import accumulate
from typing import TYPE_CHECKING, Any, TypeAlias

import torch
from torch import Tensor

triton: Any = importlib.import_module("triton") if find_spec("triton") else None
tl: Any = importlib.import_module("triton.language") if triton else None
if TYPE_CHECKING:
    constexpr: TypeAlias = Any
    tensor: TypeAlias = Any
elif triton:
    # Its compiler reads annotations, and knows no names but its own.
    constexpr, tensor = tl.constexpr, tl.tensor

MOST_MAPS = 6
_GATE_BLOCK = 1024
_POOL_TILES, _POOL_COLUMNS = 32, 64


@dataclass(frozen=True, slots=True)
class Tile:
    """What one program of the convolution computes: pixels x channels, `inner` inputs at a time."""

    rows: int
    columns: int
    inner: int
    warps: int = 4


_TILES = ((128, 128, 8), (128, 64, 4), (64, 64, 4), (32, 64, 4), (16, 64, 4))


def _jit(kernel: Callable[..., None]) -> Any:
    return triton.jit(kernel) if triton else kernel


@_jit
def _add_map(
    total: tensor,
    pixels: tensor,
    rows: tensor,
    weights: tensor,
    columns: tensor,
    before: constexpr,
    size: constexpr,
    all_sizes: constexpr,
    inner: constexpr,
    precision: constexpr,
) -> tensor:
    """total plus pixels (M, size) times the part of weights (N, all_sizes) that belongs to them."""
    for start in range(0, size, inner):
        channels = start + tl.arange(0, inner)
        x_at = pixels + rows[:, None] * size + channels[None, :]
        w_at = weights + columns[None, :] * all_sizes + before + channels[:, None]
        if size % inner == 0:
            x, w = tl.load(x_at), tl.load(w_at)
        else:
            x = tl.load(x_at, mask=channels[None, :] < size, other=0.0)
            w = tl.load(w_at, mask=channels[:, None] < size, other=0.0)
        total = tl.dot(x, w, total, input_precision=precision)
    return total


@_jit
def _aggregate(
    map0: tensor,
    map1: tensor,
    map2: tensor,
    map3: tensor,
    map4: tensor,
    map5: tensor,
    weights: tensor,
    bias: tensor,
    out: tensor,
    partial: tensor,
    num_pixels: tensor,
    image_pixels: tensor,
    num_columns: constexpr,
    all_sizes: constexpr,
    end0: constexpr,
    end1: constexpr,
    end2: constexpr,
    end3: constexpr,
    end4: constexpr,
    end5: constexpr,
    images: constexpr,
    pools: constexpr,
    adds: constexpr,
    rows_block: constexpr,
    columns_block: constexpr,
    inner: constexpr,
    precision: constexpr,
) -> None:
    """One tile of relu(maps * weights + bias), plus the first map where it adds; and of each of the
    images that the tile touches the sums over its pixels.
    """
    column_tiles = tl.cdiv(num_columns, columns_block)
    tile = tl.program_id(0) // column_tiles  # neighbours share their pixels
    all_rows = tile * rows_block + tl.arange(0, rows_block)
    all_columns = (tl.program_id(0) % column_tiles) * columns_block + tl.arange(0, columns_block)
    # Beyond the end the last one is computed again, and not stored.
    rows = tl.minimum(all_rows, num_pixels - 1).to(tl.int64)
    columns = tl.minimum(all_columns, num_columns - 1)
    total = tl.zeros((rows_block, columns_block), tl.float32)
    total = _add_map(total, map0, rows, weights, columns, 0, end0, all_sizes, inner, precision)
    if end1 > end0:
        total = _add_map(
            total, map1, rows, weights, columns, end0, end1 - end0, all_sizes, inner, precision
        )
    if end2 > end1:
        total = _add_map(
            total, map2, rows, weights, columns, end1, end2 - end1, all_sizes, inner, precision
        )
    if end3 > end2:
        total = _add_map(
            total, map3, rows, weights, columns, end2, end3 - end2, all_sizes, inner, precision
        )
    if end4 > end3:
        total = _add_map(
            total, map4, rows, weights, columns, end3, end4 - end3, all_sizes, inner, precision
        )
    if end5 > end4:
        total = _add_map(
            total, map5, rows, weights, columns, end4, end5 - end4, all_sizes, inner, precision
        )
    total += tl.load(bias + columns)[None, :]
    y = tl.where(total < 0, 0.0, total).to(out.dtype.element_ty)  # what is no number stays none
    if adds:
        y += tl.load(map0 + rows[:, None] * num_columns + columns[None, :])
    inside = (all_rows < num_pixels)[:, None] & (all_columns < num_columns)[None, :]
    tl.store(out + rows[:, None] * num_columns + columns[None, :], y, mask=inside)
    if pools:
        values = y.to(tl.float32)  # those beyond the end belong to images that nobody asks for
        first_image = (tile * rows_block) // image_pixels
        own_image = all_rows // image_pixels - first_image
        for image in range(images):
            sums = tl.sum(tl.where((own_image == image)[:, None], values, 0.0), axis=0)
            place = partial + (tile * images + image) * num_columns + columns
            tl.store(place, sums, mask=all_columns < num_columns)


@_jit
def _pool(
    partial: tensor,
    means: tensor,
    image_pixels: tensor,
    num_columns: constexpr,
    images: constexpr,
    rows_block: constexpr,
    tiles_block: constexpr,
    columns_block: constexpr,
) -> None:
    """The means of one image from the sums that its tiles left."""
    image = tl.program_id(0)
    columns = tl.program_id(1) * columns_block + tl.arange(0, columns_block)
    first = (image * image_pixels) // rows_block
    last = (image * image_pixels + image_pixels - 1) // rows_block
    total = tl.zeros((columns_block,), tl.float32)
    for start in range(first, last + 1, tiles_block):
        tiles = start + tl.arange(0, tiles_block)
        place = tiles * images + image - (tiles * rows_block) // image_pixels
        inside = (tiles <= last)[:, None] & (columns < num_columns)[None, :]
        sums = tl.load(partial + place[:, None] * num_columns + columns, mask=inside, other=0.0)
        total += tl.sum(sums, axis=0)
    mean = (total / image_pixels).to(means.dtype.element_ty)
    tl.store(means + image * num_columns + columns, mean, mask=columns < num_columns)


@_jit
def _gate(
    values: tensor,
    gates: tensor,
    shortcut: tensor,
    num_values: tensor,
    image_pixels: tensor,
    num_columns: constexpr,
    adds: constexpr,
    block: constexpr,
) -> None:
    """values times the hard sigmoid of their channel's gate, plus the shortcut, in place."""
    places = tl.program_id(0).to(tl.int64) * block + tl.arange(0, block)
    inside = places < num_values
    kind = values.dtype.element_ty
    image, column = places // num_columns // image_pixels, places % num_columns
    logit = tl.load(gates + image * num_columns + column, mask=inside, other=0.0).to(tl.float32)
    logit = tl.where(logit < -3, -3.0, logit)  # as above: no number stays none
    gate = ((tl.where(logit > 3, 3.0, logit) + 3) / 6).to(kind)
    y = tl.load(values + places, mask=inside, other=0.0)
    y = (y.to(tl.float32) * gate.to(tl.float32)).to(kind)
    if adds:
        y += tl.load(shortcut + places, mask=inside, other=0.0)
    tl.store(values + places, y, mask=inside)


def aggregate_maps(
    maps: Sequence[Tensor],
    weight: Tensor,
    bias: Tensor,
    *,
    adds: bool = False,
    pools: bool = False,
    tile: Tile | None = None,
) -> tuple[Tensor, Tensor | None]:
    """relu of the 1x1 convolution of concatenated maps (B, C_i, H, W), at most six, by weight
    (C, sum of C_i) and bias (C,) float; plus the first map where it adds.

    Returns (B, C, H, W) channels last, and its means (B, C) where it pools; in the type of weight,
    computed in float32.
    """
    given = [x.to(weight.dtype).contiguous(memory_format=torch.channels_last) for x in maps]
    batch, _, height, width = given[0].shape
    columns, channels = weight.shape
    pixels = batch * height * width
    tile = tile or choose_tile(pixels, columns, [x.shape[1] for x in given], weight)
    out = weight.new_empty((batch, height, width, columns)).permute(0, 3, 1, 2)
    ends = list(accumulate(x.shape[1] for x in given))
    absent = MOST_MAPS - len(given)
    tiles = -(-pixels // tile.rows)
    images = (tile.rows - 1) // (height * width) + 2  # that the pixels of a tile can belong to
    partial = bias.new_empty((tiles, images, columns) if pools else (1,))
    _aggregate[(tiles * -(-columns // tile.columns),)](
        *given,
        *[given[0]] * absent,
        weight,
        bias,
        out,
        partial,
        pixels,
        height * width,
        columns,
        channels,
        *ends,
        *[ends[-1]] * absent,
        images,
        pools,
        adds,
        tile.rows,
        tile.columns,
        tile.inner,
        input_precision(),
        num_warps=tile.warps,
    )
    if not pools:
        return out, None
    means = weight.new_empty((batch, columns))
    _pool[(batch, -(-columns // _POOL_COLUMNS))](
        partial, means, height * width, columns, images, tile.rows, _POOL_TILES, _POOL_COLUMNS
    )
    return out, means


def gate_map(values: Tensor, gates: Tensor, shortcut: Tensor | None) -> Tensor:
    """values (B, C, H, W), channels last, times the hard sigmoid of gates (B, C), plus the
    shortcut; in place.
    """
    _, columns, height, width = values.shape
    added = values
    if shortcut is not None:
        added = shortcut.to(values.dtype).contiguous(memory_format=torch.channels_last)
    _gate[(-(-values.numel() // _GATE_BLOCK),)](
        values,
        gates.to(values.dtype).contiguous(),
        added,
        values.numel(),
        height * width,
        columns,
        shortcut is not None,
        _GATE_BLOCK,
    )
    return values


def choose_tile(pixels: int, columns: int, sizes: Sequence[int], like: Tensor) -> Tile:
    """The largest tile that still gives every multiprocessor of the device of `like` one to do."""
    processors = _processors(like.device) if like.is_cuda else 1
    busy = (
        (rows, wide, warps)
        for rows, wide, warps in _TILES
        if -(-pixels // rows) * -(-columns // wide) >= processors
    )
    rows, wide, warps = next(busy, _TILES[-1])
    whole = like.itemsize == 2 and all(size % 64 == 0 for size in sizes)
    return Tile(rows, wide, 64 if whole else 32, warps)


@cache
def _processors(device: torch.device) -> int:
    return int(torch.cuda.get_device_properties(device).multi_processor_count)


def input_precision() -> str:
    """What torch's own convolutions do to float32 on this device."""
    return "tf32" if torch.backends.cudnn.allow_tf32 else "ieee"
