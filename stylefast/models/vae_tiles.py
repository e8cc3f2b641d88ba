"""Memory estimates of VAE decoding, and decoding in overlapping tiles if a whole picture does not fit.

A tile's group norms and its middle block's attention cover only that tile, so tiles differ from the whole picture in
tone, not only at their borders; the overlap turns the step between neighbours into a ramp. Pictures that fit are
therefore decoded whole.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import nn

from stylefast.errors import InvalidRequest, OutOfMemory
from stylefast.models.config_files import config_of
from stylefast.models.prepacked import unfolds
from stylefast.values import quoted

WHOLE_PIXELS = 2048 * 2048
OVERLAP = 0.25
SMALLEST_TILE = 16  # latents along a side; in smaller tiles borders take up most of the area
LARGEST_TILE = 128
LIVE_WIDTHS = 5
UNFOLDED_WIDTHS = 9  # extra tensors for a 3x3 convolution that materialises its windows
RESULT_BYTES = 2 * 3 * 4  # per pixel: the float32 picture as decoded or summed from tiles, and clamped to 0..1


@dataclass(frozen=True)
class DecodePlan:
    """Plan for decoding a batch of equal sizes: `pictures` at a time, whole or in tiles of `tile` latents.

    `tile` is None for whole pictures; with tiles, `pictures` is 1.
    """

    pictures: int
    tile: int | None = None


def decode_bytes(vae: nn.Module, pixels: int, dtype: torch.dtype) -> int:
    """Estimate an upper bound of the peak memory for decoding a picture of so many pixels, without the weights.

    The peak is in the first residual block at full resolution. Per pixel, counted from the allocations of decoders
    of three shapes, 3 (channels_last) to 4.5 tensors of the block's input width are alive; 5 are assumed, to allow for
    the convolutions' workspace. If convolutions materialise their windows, on CPUs without instructions for `dtype`,
    12 are alive and 14 assumed. A convolution may hold a reordered second copy of its weights.
    """
    config = config_of(vae)
    # an AutoencoderKL lists widths in encoder order, so the decoder's last two levels come first
    widths = config.get("block_out_channels") or config["decoder_block_out_channels"][::-1]
    item = torch.empty((), dtype=dtype).element_size()
    alive = LIVE_WIDTHS + (UNFOLDED_WIDTHS if unfolds(next(vae.parameters()).device, dtype) else 0)
    reordered = max(weight.numel() for weight in vae.get_submodule("decoder").parameters())
    return (pixels * alive * max(widths[:2]) + reordered) * item


def plan_decode(
    vae: nn.Module,
    shape: Sequence[int],
    factor: int,
    dtype: torch.dtype,
    tile: int | str | None,
    budget: int | None,
) -> DecodePlan:
    """Choose between whole pictures and tiles for latents of `shape` [n, C, h, w].

    tile: None (whole), pixels along a side, or "auto": whole up to a total of 2048x2048 pixels that fit into `budget`
    bytes (None: no limit), else the largest tiles that fit. factor: pixels per latent. Raises InvalidRequest;
    OutOfMemory if not even the smallest tile fits.
    """
    count, _, height, width = shape
    if tile is None:
        return DecodePlan(count)
    if tile != "auto":
        side = _tile_side(tile, factor)
        if max(height, width) > side:
            return DecodePlan(1, side)
        return DecodePlan(min(count, side**2 // (height * width)))  # at most a tile's area at a time
    pixels = height * width * factor**2
    results = RESULT_BYTES * pixels * count
    room = None if budget is None else budget - results
    one = decode_bytes(vae, pixels, dtype)
    if pixels <= WHOLE_PIXELS and (room is None or one <= room):
        fitting = count if room is None else room // one
        return DecodePlan(min(count, fitting, WHOLE_PIXELS // pixels))
    smallest = decode_bytes(vae, (SMALLEST_TILE * factor) ** 2, dtype)
    if budget is not None and room is not None and smallest > room:
        raise OutOfMemory(
            f"decoding {count} of {width * factor}x{height * factor} pixels takes at least "
            f"{(smallest + results) / 1e6:.3g} MB, in tiles of {SMALLEST_TILE * factor} pixels, and "
            f"{budget / 1e6:.3g} MB may be used; free memory, raise the limit, or decode fewer or smaller pictures"
        )
    side = SMALLEST_TILE
    while side < LARGEST_TILE and (room is None or decode_bytes(vae, ((side + 8) * factor) ** 2, dtype) <= room):
        side += 8
    return DecodePlan(1, side)


def tile_starts(size: int, tile: int) -> list[int]:
    """Return the tiles' first latents along an axis, evenly spread; neighbours share at least a quarter of a tile."""
    if tile >= size:
        return [0]
    step = tile - int(tile * OVERLAP + 0.999)
    gaps = -(-(size - tile) // step)
    return [i * (size - tile) // gaps for i in range(gaps + 1)]


def decode_tiles(
    run: Callable[[torch.Tensor], torch.Tensor], latents: torch.Tensor, tile: int, factor: int
) -> torch.Tensor:
    """Decode to float32 pictures [n, 3, h * factor, w * factor], calling `run` on tiles of one picture at a time.

    latents: [n, C, h, w]; run: decoder of tiles of `tile` latents (fewer if the picture is smaller). All tiles have the
    same shape. Overlaps are blended linearly.
    """
    count, _, height, width = latents.shape
    tall, wide = min(tile, height), min(tile, width)
    tops, lefts = tile_starts(height, tall), tile_starts(width, wide)
    down = _blend_weights(tops, height, tall, factor, latents.device)  # [tiles, tall * factor]
    across = _blend_weights(lefts, width, wide, factor, latents.device)
    pictures = torch.zeros(count, 3, height * factor, width * factor, device=latents.device)
    for picture, latent in zip(pictures, latents, strict=True):
        for top, down_weight in zip(tops, down, strict=True):
            for left, across_weight in zip(lefts, across, strict=True):
                part = run(latent[None, :, top : top + tall, left : left + wide])[0].float()
                rows = slice(top * factor, (top + tall) * factor)
                columns = slice(left * factor, (left + wide) * factor)
                picture[:, rows, columns] += part * down_weight[:, None] * across_weight
    return pictures


def _blend_weights(starts: list[int], size: int, tile: int, factor: int, device) -> torch.Tensor:
    """Return the weights of each tile's pixels along one axis, [tiles, tile * factor], summing to 1 at every pixel."""
    pixels = tile * factor
    weights = torch.ones(len(starts), pixels, dtype=torch.float64)
    for i, (before, after) in enumerate(zip(starts, starts[1:], strict=False)):
        overlap = (before + tile - after) * factor
        ramp = (torch.arange(overlap, dtype=torch.float64) + 0.5) / overlap
        weights[i, pixels - overlap :] *= 1 - ramp
        weights[i + 1, :overlap] *= ramp
    # evenly spread tiles may overlap by more than half, so that three cover a pixel
    total = torch.zeros(size * factor, dtype=torch.float64)
    for start, weight in zip(starts, weights, strict=True):
        total[start * factor : start * factor + pixels] += weight
    for start, weight in zip(starts, weights, strict=True):
        weight /= total[start * factor : start * factor + pixels]
    return weights.to(device, torch.float32)


def _tile_side(tile, factor: int) -> int:
    """Convert a tile's side from pixels to latents. Raises InvalidRequest."""
    smallest = SMALLEST_TILE * factor
    if isinstance(tile, bool) or not isinstance(tile, int) or tile < smallest or tile % factor:
        raise InvalidRequest(
            f"tile is {quoted(tile)}; give None (the whole picture), 'auto', or its side in pixels: a multiple of "
            f"{factor}, at least {smallest}"
        )
    return tile // factor
