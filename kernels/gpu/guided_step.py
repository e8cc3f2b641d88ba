"""guided_step in Triton: combine the branches of each picture and advance it by one sampler step, in two launches.

    output           = sum_b w_b prediction[row_b]
    output          <- output * (1 - rescale + rescale * std(prediction[full]) / std(output))      where rescale > 0
    x0               = denoised @ (latents, output)
    latents', anchor' = update @ (latents, anchor, x0, history[0], history[1], noise)
    history'         = (x0, history[0])

The first launch computes the two deviations of rescaled pictures, in splits, and skips the others; the second does the
rest. Terms with coefficient zero and branches of row -1 are not read. All sums are fp32.
"""

import torch
import triton
import triton.language as tl

from stylefast.kernels.configs import Config, configurations
from stylefast.kernels.gpu.ahead import Specialisation
from stylefast.kernels.gpu.launch import (
    compiler_options,
    device_of,
    power_of_two,
    settings,
    specialisation,
    with_position_stride,
)
from stylefast.kernels.gpu.moments import add_to_moments, merge_moments
from stylefast.kernels.guided_step import Branches, SamplerStep

_FULL = tl.constexpr(3)  # column of the "full" branch in branch_rows and branch_weights
_BRANCHES = tl.constexpr(4)

TABLES = [
    "positions",
    "rows",
    "splits",
    "tiles",
    "branch_rows_picture",
    "branch_rows_branch",
    "branch_weights_picture",
    "branch_weights_branch",
    "rescale_picture",
    "denoised_picture",
    "denoised_term",
    "update_picture",
    "update_target",
    "update_term",
]


@triton.jit
def _places(element, positions, channel_stride, position_stride, PACKED: tl.constexpr):
    """Return the offsets in a prediction of a picture's elements, which are counted channel by channel."""
    if PACKED:
        return element
    return element // positions * channel_stride + element % positions * position_stride


@triton.jit
def _combined(
    picture,
    element,
    place,
    elements,
    predictions,
    branch_rows,
    branch_weights,
    rows,
    prediction_row,
    branch_rows_picture,
    branch_rows_branch,
    branch_weights_picture,
    branch_weights_branch,
):
    """Return sum_b w_b prediction[row_b]; NaN if a row in use is out of range."""
    output = tl.zeros_like(place).to(tl.float32)
    for branch in tl.static_range(_BRANCHES):
        row = tl.load(branch_rows + picture * branch_rows_picture + branch * branch_rows_branch)
        weight = tl.load(branch_weights + picture * branch_weights_picture + branch * branch_weights_branch)
        used = (row >= 0) & (weight != 0.0)
        inside = element < tl.where(used & (row < rows), elements, 0)
        values = tl.load(predictions + row * prediction_row + place, mask=inside, other=0.0)
        output += tl.where(used, weight * values.to(tl.float32), 0.0)
        output = tl.where(used & (row >= rows), float("nan"), output)
    return output


@triton.jit(do_not_specialize=TABLES)
def _deviations(
    predictions,  # [rows, channels, positions]
    branch_rows,
    branch_weights,  # [pictures, 4]
    rescale,  # [pictures]
    moments,  # [pictures, splits, 2 (output, full prediction), 3 (count, mean, spread)]
    elements,
    positions,
    rows,
    splits,
    tiles,
    prediction_row,
    prediction_channel,
    prediction_position,
    branch_rows_picture,
    branch_rows_branch,
    branch_weights_picture,
    branch_weights_branch,
    rescale_picture,
    PACKED: tl.constexpr,
    BLOCK: tl.constexpr,
):
    split = tl.program_id(0)
    picture = tl.program_id(1).to(tl.int64)
    full = tl.load(branch_rows + picture * branch_rows_picture + _FULL * branch_rows_branch)
    strength = tl.load(rescale + picture * rescale_picture)
    if (strength != 0.0) & (full >= 0):
        begin = split * tiles * BLOCK
        end = tl.minimum(begin + tiles * BLOCK, elements)
        lane = tl.arange(0, BLOCK)
        mean = tl.zeros([BLOCK], tl.float32)
        spread = tl.zeros([BLOCK], tl.float32)
        full_mean = tl.zeros([BLOCK], tl.float32)
        full_spread = tl.zeros([BLOCK], tl.float32)
        step = 0.0
        for start in range(begin, end, BLOCK):
            element = start + lane
            place = _places(element, positions, prediction_channel, prediction_position, PACKED)
            output = _combined(
                picture,
                element,
                place,
                elements,
                predictions,
                branch_rows,
                branch_weights,
                rows,
                prediction_row,
                branch_rows_picture,
                branch_rows_branch,
                branch_weights_picture,
                branch_weights_branch,
            )
            inside = element < tl.where(full < rows, elements, 0)
            values = tl.load(predictions + full * prediction_row + place, mask=inside, other=0.0)
            values = tl.where(full < rows, values.to(tl.float32), float("nan"))
            mean, spread = add_to_moments(output, element < elements, step, mean, spread)
            full_mean, full_spread = add_to_moments(values, element < elements, step, full_mean, full_spread)
            step += 1.0
        counts = (tl.maximum(end - begin - lane + BLOCK - 1, 0) // BLOCK).to(tl.float32)
        count, centre, spread = merge_moments(counts, mean, spread, 0)
        full_count, full_centre, full_spread = merge_moments(counts, full_mean, full_spread, 0)
        target = moments + (picture * splits + split) * 6
        tl.store(target, count)
        tl.store(target + 1, centre)
        tl.store(target + 2, spread)
        tl.store(target + 3, full_count)
        tl.store(target + 4, full_centre)
        tl.store(target + 5, full_spread)


@triton.jit
def _deviation(moments, picture, splits, which: tl.constexpr, reads, SPLITS: tl.constexpr):
    """Return the unbiased standard deviation of the output (0) or of the full prediction (1); 0 for a single value."""
    split = tl.arange(0, SPLITS)
    inside = split < tl.where(reads, splits, 0)
    place = moments + (picture * splits + split) * 6 + which * 3
    count, mean, spread = merge_moments(
        tl.load(place, mask=inside, other=0.0),
        tl.load(place + 1, mask=inside, other=0.0),
        tl.load(place + 2, mask=inside, other=0.0),
        0,
    )
    return tl.sqrt(spread / tl.maximum(count - 1.0, 1.0))


@triton.jit
def _term(values, element, elements, first, second, third):
    """Load elements of one picture; not read if all three coefficients are zero."""
    used = (first != 0.0) | (second != 0.0) | (third != 0.0)
    return tl.load(values + element, mask=element < tl.where(used, elements, 0), other=0.0).to(tl.float32)


@triton.jit
def _scaled(coefficient, values):
    return tl.where(coefficient != 0.0, coefficient * values, 0.0)


@triton.jit(do_not_specialize=TABLES)
def _step(
    latents,
    anchor,  # [pictures, channels, positions]
    history,  # [pictures, 2, channels, positions]
    predictions,  # [rows, channels, positions]
    branch_rows,
    branch_weights,  # [pictures, 4]
    rescale,  # [pictures]
    denoised,  # [pictures, 2]
    update,  # [pictures, 2, 6]
    noise,  # [pictures, channels, positions]
    moments,  # as `_deviations` writes them
    next_latents,
    next_anchor,
    next_history,
    elements,
    positions,
    rows,
    splits,
    prediction_row,
    prediction_channel,
    prediction_position,
    branch_rows_picture,
    branch_rows_branch,
    branch_weights_picture,
    branch_weights_branch,
    rescale_picture,
    denoised_picture,
    denoised_term,
    update_picture,
    update_target,
    update_term,
    latents_picture,
    anchor_picture,
    history_picture,
    history_age,
    noise_picture,
    next_latents_picture,
    next_anchor_picture,
    next_history_picture,
    next_history_age,
    PACKED: tl.constexpr,
    SPLITS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    picture = tl.program_id(1).to(tl.int64)
    element = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    inside = element < elements
    place = _places(element, positions, prediction_channel, prediction_position, PACKED)

    d0 = tl.load(denoised + picture * denoised_picture)
    d1 = tl.load(denoised + picture * denoised_picture + denoised_term)
    output = _combined(
        picture,
        element,
        place,
        tl.where(d1 != 0.0, elements, 0),
        predictions,
        branch_rows,
        branch_weights,
        rows,
        prediction_row,
        branch_rows_picture,
        branch_rows_branch,
        branch_weights_picture,
        branch_weights_branch,
    )
    full = tl.load(branch_rows + picture * branch_rows_picture + _FULL * branch_rows_branch)
    strength = tl.load(rescale + picture * rescale_picture)
    rescales = (strength != 0.0) & (full >= 0) & (elements > 1)
    deviation = _deviation(moments, picture, splits, 0, rescales, SPLITS)
    full_deviation = _deviation(moments, picture, splits, 1, rescales, SPLITS)
    rescales = rescales & (deviation > 0)
    factor = 1 - strength + strength * full_deviation / tl.where(rescales, deviation, 1.0)
    output = tl.where(rescales, output * factor, output)

    row = update + picture * update_picture
    a0 = tl.load(row)
    a1 = tl.load(row + update_term)
    a2 = tl.load(row + 2 * update_term)
    a3 = tl.load(row + 3 * update_term)
    a4 = tl.load(row + 4 * update_term)
    a5 = tl.load(row + 5 * update_term)
    row += update_target
    b0 = tl.load(row)
    b1 = tl.load(row + update_term)
    b2 = tl.load(row + 2 * update_term)
    b3 = tl.load(row + 3 * update_term)
    b4 = tl.load(row + 4 * update_term)
    b5 = tl.load(row + 5 * update_term)

    old = history + picture * history_picture
    last = tl.load(old + element, mask=inside, other=0.0)  # always read: it becomes the older history entry
    before = _term(old + history_age, element, elements, 0.0, a4, b4)
    now = _term(latents + picture * latents_picture, element, elements, d0, a0, b0)
    fixed = _term(anchor + picture * anchor_picture, element, elements, 0.0, a1, b1)
    drawn = _term(noise + picture * noise_picture, element, elements, 0.0, a5, b5)

    x0 = _scaled(d0, now) + _scaled(d1, output)
    recent = last.to(tl.float32)
    moved = _scaled(a0, now) + _scaled(a1, fixed) + _scaled(a2, x0)
    moved += _scaled(a3, recent) + _scaled(a4, before) + _scaled(a5, drawn)
    held = _scaled(b0, now) + _scaled(b1, fixed) + _scaled(b2, x0)
    held += _scaled(b3, recent) + _scaled(b4, before) + _scaled(b5, drawn)

    kept = next_history + picture * next_history_picture + element
    tl.store(
        next_latents + picture * next_latents_picture + element, moved.to(next_latents.dtype.element_ty), mask=inside
    )
    tl.store(next_anchor + picture * next_anchor_picture + element, held.to(next_anchor.dtype.element_ty), mask=inside)
    tl.store(kept, x0.to(next_history.dtype.element_ty), mask=inside)
    tl.store(kept + next_history_age, last.to(next_history.dtype.element_ty), mask=inside)


def guided_step(
    latents: torch.Tensor,
    anchor: torch.Tensor,
    history: torch.Tensor,
    predictions: torch.Tensor,
    branches: Branches,
    step: SamplerStep,
    next_latents: torch.Tensor,
    next_anchor: torch.Tensor,
    next_history: torch.Tensor,
    config: Config | None = None,
) -> None:
    """Write one sampler step of all pictures into the three `next_*`; arguments as the operation's.

    Predictions may be contiguous or channels_last; other pictures that are not contiguous are copied. A picture that
    uses a row out of range becomes NaN.
    """
    if latents.numel() == 0:
        return
    latents, anchor, history, noise = (x.contiguous() for x in (latents, anchor, history, step.noise))
    pictures, channels, height, width = latents.shape
    positions, elements = height * width, latents[0].numel()
    config = settings("guided_step", latents, config, elements=elements)
    block = config["block"]
    splits = min(config["splits"], triton.cdiv(elements, block))
    tiles = triton.cdiv(triton.cdiv(elements, splits), block)  # per split
    splits = triton.cdiv(elements, tiles * block)
    moments = torch.empty(pictures, splits, 6, dtype=torch.float32, device=latents.device)
    predictions, position = with_position_stride(predictions)
    packed = len(predictions) == 0 or predictions[0].is_contiguous()
    prediction = (predictions.stride(0), *((0, 0) if packed else (predictions.stride(1), position)))
    strides = tuple(stride for table in branches for stride in table.stride())
    with device_of(latents):
        _deviations[(splits, pictures)](
            predictions,
            *branches,
            moments,
            elements,
            positions,
            len(predictions),
            splits,
            tiles,
            *prediction,
            *strides,
            PACKED=packed,
            BLOCK=block,
            **compiler_options(config),
        )
        _step[(triton.cdiv(elements, block), pictures)](
            latents,
            anchor,
            history,
            predictions,
            *branches,
            step.denoised,
            step.update,
            noise,
            moments,
            next_latents,
            next_anchor,
            next_history,
            elements,
            positions,
            len(predictions),
            splits,
            *prediction,
            *strides,
            *step.denoised.stride(),
            *step.update.stride(),
            latents.stride(0),
            anchor.stride(0),
            *history.stride()[:2],
            noise.stride(0),
            next_latents.stride(0),
            next_anchor.stride(0),
            *next_history.stride()[:2],
            PACKED=packed,
            SPLITS=power_of_two(config["splits"]),
            BLOCK=block,
            **compiler_options(config),
        )


def specialisations(capability: int) -> list[Specialisation]:
    """List both launches of every committed configuration, for bf16 predictions and fp32 state."""
    found = []
    tables = {"branch_rows": "*i64", "branch_weights": "*fp32", "rescale": "*fp32", "moments": "*fp32"}
    state = ("latents", "anchor", "history", "noise", "next_latents", "next_anchor", "next_history")
    for _, config in configurations("guided_step", capability):
        sizes = {"PACKED": True, "BLOCK": config["block"]}
        found.append(
            specialisation(
                "guided_step deviations",
                _deviations,
                pointers={"predictions": "*bf16", **tables},
                constants=sizes,
                divisible=("elements", "prediction_row"),
                num_warps=config["num_warps"],
            )
        )
        found.append(
            specialisation(
                "guided_step",
                _step,
                pointers={
                    "predictions": "*bf16",
                    **tables,
                    "denoised": "*fp32",
                    "update": "*fp32",
                    **dict.fromkeys(state, "*fp32"),
                },
                constants={**sizes, "SPLITS": power_of_two(config["splits"])},
                divisible=(
                    "elements",
                    "prediction_row",
                    "history_age",
                    "next_history_age",
                    *(f"{name}_picture" for name in state),
                ),
                num_warps=config["num_warps"],
            )
        )
    return found
