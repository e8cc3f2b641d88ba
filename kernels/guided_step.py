"""guided_step: combine the branch predictions of each picture and advance it by one sampler step.

For picture p with branch rows b, weights w and this step's coefficients (`stylefast.sampling.Schedule`):

    output           = sum_b w_b prediction[row_b]
    output          <- output * (1 - rescale + rescale * std(prediction[full]) / std(output))      where rescale > 0
    x0               = denoised @ (latents, output)
    latents', anchor' = update @ (latents, anchor, x0, history[0], history[1], noise)
    history'         = (x0, history[0])

The second line is guidance rescale (Lin et al. 2024, Eq. 15 and 16). Terms with coefficient zero and branches with
weight zero or row -1 are left out, not multiplied, so NaN in them has no effect; the full branch still counts if
rescale takes its deviation. All sums are float32.
"""

from typing import NamedTuple

import torch

from stylefast.kernels import checks
from stylefast.kernels.registry import FLOATS, Operation, require_extension, tensors_in

FULL = 3  # column of the "full" branch in branch_rows and branch_weights


class Branches(NamedTuple):
    """The predictions that make up each picture's output; see `guided_step`."""

    rows: torch.Tensor  # [pictures, 4] int64; -1: none
    weights: torch.Tensor  # [pictures, 4]
    rescale: torch.Tensor  # [pictures]


class SamplerStep(NamedTuple):
    """The step of each picture's sampler; see `guided_step`."""

    denoised: torch.Tensor  # [pictures, 2]: coefficients of x0
    update: torch.Tensor  # [pictures, 2, 6]: of the next latents and the next anchor
    noise: torch.Tensor  # [pictures, C, h, w]


def guided_step_ref(
    latents: torch.Tensor,
    anchor: torch.Tensor,
    history: torch.Tensor,
    predictions: torch.Tensor,
    branch_rows: torch.Tensor,
    branch_weights: torch.Tensor,
    rescale: torch.Tensor,
    denoised: torch.Tensor,
    update: torch.Tensor,
    noise: torch.Tensor,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Compute `guided_step` picture by picture and term by term."""
    next_latents, next_anchor = torch.empty_like(latents), torch.empty_like(anchor)
    next_history = torch.empty_like(history)
    exact = torch.promote_types(latents.dtype, torch.float32)
    for p in range(len(latents)):
        output = torch.zeros_like(latents[p], dtype=exact)
        for row, weight in zip(branch_rows[p].tolist(), branch_weights[p].tolist(), strict=True):
            if row >= 0 and weight != 0:
                output = output + weight * predictions[row].to(exact)
        full, strength = int(branch_rows[p, FULL]), float(rescale[p])
        if full >= 0 and strength != 0 and output.numel() > 1 and output.std() > 0:
            output = output * (1 - strength + strength * predictions[full].to(exact).std() / output.std())

        d0, d1 = denoised[p].tolist()
        x0 = torch.zeros_like(output)
        x0 = x0 + (d0 * latents[p].to(exact) if d0 else 0) + (d1 * output if d1 else 0)
        terms = (latents[p], anchor[p], x0, history[p, 0], history[p, 1], noise[p])
        for target, coefficients in ((next_latents, update[p, 0]), (next_anchor, update[p, 1])):
            total = torch.zeros_like(output)
            for coefficient, term in zip(coefficients.tolist(), terms, strict=True):
                if coefficient != 0:
                    total = total + coefficient * term.to(exact)
            target[p] = total
        next_history[p, 0], next_history[p, 1] = x0, history[p, 0]
    return next_latents, next_anchor, next_history


def guided_step(
    latents: torch.Tensor,
    anchor: torch.Tensor,
    history: torch.Tensor,
    predictions: torch.Tensor,
    branch_rows: torch.Tensor,
    branch_weights: torch.Tensor,
    rescale: torch.Tensor,
    denoised: torch.Tensor,
    update: torch.Tensor,
    noise: torch.Tensor,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Advance all pictures of a batch by one sampler step; samplers and guidance may differ.

    latents, anchor, noise [pictures, C, h, w]; history [pictures, 2, C, h, w], the x0 of the last step and of the one
    before; predictions [rows, C, h, w]; branch_rows [pictures, 4] int64, rows of the branches null, context, style,
    full, -1 where a picture has none; branch_weights [pictures, 4]; rescale [pictures] in [0, 1]; denoised
    [pictures, 2]; update [pictures, 2, 6].

    Returns new (latents, anchor, history) in the types of the old; arguments are not modified. A picture without a full
    branch, or whose output is constant, is not rescaled. Raises InvalidRequest, a ValueError, for shapes that don't fit
    and, on CPUs or under STYLEFAST_CHECKS=1, for branch rows and rescales out of range.
    """
    branches, step = Branches(branch_rows, branch_weights, rescale), SamplerStep(denoised, update, noise)
    arguments = (latents, anchor, history, predictions, branches, step)
    _check(*arguments)
    return operation.call(*arguments)


def _outputs(latents, anchor, history, *others):
    return tuple(torch.empty(x.shape, dtype=x.dtype, device=x.device) for x in (latents, anchor, history))


def _torch(latents, anchor, history, predictions, branches: Branches, step: SamplerStep):
    denoised, update, noise = step
    exact = torch.promote_types(latents.dtype, torch.float32)
    output = torch.zeros_like(latents, dtype=exact)
    if predictions.shape[0] == 0:  # no prediction rows at all: the gather below needs at least one
        predictions = predictions.new_zeros(1, *latents.shape[1:])
    for branch in range(branches.rows.shape[1]):
        rows = branches.rows[:, branch]
        weight = torch.where(rows >= 0, branches.weights[:, branch], 0.0)
        output = output + _weighted(weight, predictions[rows.clamp(min=0)].to(exact))
    output = output * _rescale_factor(output, predictions, branches.rows[:, FULL], branches.rescale)

    x0 = _weighted(denoised[:, 0], latents.to(exact)) + _weighted(denoised[:, 1], output)
    terms = [x.to(exact) for x in (latents, anchor, x0, history[:, 0], history[:, 1], noise)]
    zero = torch.zeros_like(x0)
    next_latents = sum((_weighted(update[:, 0, k], term) for k, term in enumerate(terms)), zero)
    next_anchor = sum((_weighted(update[:, 1, k], term) for k, term in enumerate(terms)), zero)
    next_history = torch.stack([x0.to(history.dtype), history[:, 0]], dim=1)
    results = (next_latents.to(latents.dtype), next_anchor.to(anchor.dtype), next_history)
    return tuple(result.contiguous() for result in results)


def _weighted(weight: torch.Tensor, values: torch.Tensor) -> torch.Tensor:
    # weight [pictures], values [pictures, C, h, w]; zero weight gives zero even for NaN
    weight = weight.to(values.dtype).view(-1, 1, 1, 1)
    return torch.where(weight != 0, weight * values, 0.0)


def _rescale_factor(
    output: torch.Tensor, predictions: torch.Tensor, full: torch.Tensor, rescale: torch.Tensor
) -> torch.Tensor:
    # [pictures, 1, 1, 1]
    strength = rescale.to(output.dtype)
    deviation = _deviation(output)
    full_deviation = _deviation(predictions[full.clamp(min=0)].to(output.dtype))
    applies = (full >= 0) & (strength != 0) & (deviation > 0)
    factor = torch.where(applies, 1 - strength + strength * full_deviation / deviation, 1.0)
    return factor.view(-1, 1, 1, 1)


def _deviation(pictures: torch.Tensor) -> torch.Tensor:
    # unbiased, [pictures]; 0 for single-value pictures, for which torch.std returns NaN and warns
    flat = pictures.flatten(1)
    centred = flat - flat.mean(dim=1, keepdim=True)
    return (centred.square().sum(dim=1) / max(flat.shape[1] - 1, 1)).sqrt()


def _check(latents, anchor, history, predictions, branches: Branches, step: SamplerStep):
    checks.shape("latents", latents, pictures=-1, C=-1, h=-1, w=-1)
    pictures, channels, height, width = latents.shape
    latent = {"C": channels, "h": height, "w": width}
    expected = {
        "anchor": (anchor, {"pictures": pictures, **latent}),
        "history": (history, {"pictures": pictures, "steps": 2, **latent}),
        "predictions": (predictions, {"rows": -1, **latent}),
        "branch_weights": (branches.weights, {"pictures": pictures, "branches": 4}),
        "rescale": (branches.rescale, {"pictures": pictures}),
        "denoised": (step.denoised, {"pictures": pictures, "coefficients": 2}),
        "update": (step.update, {"pictures": pictures, "results": 2, "coefficients": 6}),
        "noise": (step.noise, {"pictures": pictures, **latent}),
    }
    checks.floating("latents", latents)
    for name, (tensor, shape) in expected.items():
        checks.shape(name, tensor, **shape)
        checks.floating(name, tensor)
    checks.shape("branch_rows", branches.rows, pictures=pictures, branches=4)
    checks.dtype("branch_rows", branches.rows, torch.int64)
    tensors = {name: tensor for name, (tensor, _) in expected.items()}
    checks.together("latents", latents=latents, branch_rows=branches.rows, **tensors)


def _check_values(latents, anchor, history, predictions, branches: Branches, step):
    count = predictions.shape[0]
    checks.integers_within("branch_rows", branches.rows, -1, count, "rows of predictions (-1: no branch)")
    checks.numbers_within("rescale", branches.rescale, 0, 1)


def _cpp(*arguments):
    inputs, results = arguments[:-3], arguments[-3:]
    require_extension().guided_step(*operation.flat(inputs), *results)


def _refuse(form, arguments) -> str:
    others = {x.dtype for x in tensors_in(arguments) if x.is_floating_point()} - set(FLOATS)
    return f"{', '.join(map(str, others))} among the arguments" if form != "torch" and others else ""


operation = Operation(
    "guided_step",
    "(Tensor latents, Tensor anchor, Tensor history, Tensor predictions, Tensor branch_rows, Tensor branch_weights, "
    "Tensor rescale, Tensor denoised, Tensor update, Tensor noise) -> (Tensor, Tensor, Tensor)",
    groups=(Branches, SamplerStep),
    outputs=_outputs,
    forms={"triton": "guided_step", "cpp": _cpp, "torch": _torch},
    refuse=_refuse,
    values=_check_values,
)
