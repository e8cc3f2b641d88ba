"""A call's pictures from noise to image, in the caller's thread: one UNet call per step and size."""

from collections.abc import Callable, Sequence

import torch

from stylefast.errors import StyleFastError
from stylefast.runtime.core import Runtime
from stylefast.runtime.group import Group
from stylefast.runtime.results import joined

# called after every step with (step, steps of the longest request, latents of the pictures asked for and still running)
StepCallback = Callable[[int, int, torch.Tensor], None]


def denoise(
    runtime: Runtime, groups: Sequence[Group], callback: StepCallback | None = None
) -> tuple[dict[int, torch.Tensor], list[StyleFastError]]:
    """Run groups of one size to their end, side by side.

    Returns the final latents [channels, h, w] fp32 by output number, and the errors of groups that failed; those don't
    keep the others from finishing. The runtime's lock is taken step by step, so that other work gets its turn.
    """
    done: dict[int, torch.Tensor] = {}
    errors: list[StyleFastError] = []
    running, total = list(groups), max(g.steps for g in groups)
    for step in range(total):
        with runtime.lock:
            failed: dict[Group, StyleFastError] = {}
            for batch in split(runtime, running):
                failed |= runtime.advance(batch)
            errors += failed.values()
            running = [g for g in running if g not in failed]
            runtime.prefetch(running)
            for group in [g for g in running if g.finished]:
                error = runtime.finite(group)
                if error is not None:
                    errors.append(error)
                    running.remove(group)
                else:
                    done |= results(runtime, group)
            if callback is not None:
                shown = [runtime.shown_of(g) for g in running]
                shown = runtime.lock.lend(torch.cat(shown)) if shown else None
        if callback is not None and shown is not None:
            callback(step + 1, total, shown)
        running = [g for g in running if not g.finished]
        if not running:
            break
    return done, errors


def denoise_all(
    runtime: Runtime, groups: Sequence[Group], callback: StepCallback | None = None
) -> dict[int, torch.Tensor]:
    """Run groups of any sizes to their end, one size after another, and give back all that they held.

    Returns the final latents by output number; raises the errors of groups that failed when all are done.
    """
    done: dict[int, torch.Tensor] = {}
    errors: list[StyleFastError] = []
    try:
        for shape in dict.fromkeys(group.latent_shape for group in groups):
            batch = [group for group in groups if group.latent_shape == shape]
            finished, failed = denoise(runtime, batch, callback)
            done |= finished
            errors += failed
    finally:
        with runtime.lock:
            for group in groups:
                runtime.retire(group)
    if errors:
        raise joined(errors)
    return done


def results(runtime: Runtime, group: Group) -> dict[int, torch.Tensor]:
    """Output number -> latents [channels, h, w] of the pictures that somebody asked for."""
    latents = runtime.lock.lend(runtime.latents_of(group))
    return {t.output: latents[i] for i, t in enumerate(group.trajectories) if t.output is not None}


def split(runtime: Runtime, groups: Sequence[Group]) -> list[list[Group]]:
    """Divide groups into batches of as many rows as fit into memory; a group is never divided."""
    room = runtime.rows_that_fit(groups[0].latent_shape[1:]) if groups else 0
    batches: list[list[Group]] = []
    rows = 0
    for group in groups:
        if not batches or rows + group.rows > room:
            batches.append([])
            rows = 0
        batches[-1].append(group)
        rows += group.rows
    return batches
