"""Baking: run a style's reference once and store its features at every step in a bank."""

from collections.abc import Callable, Generator, Mapping, Sequence
from dataclasses import replace
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import torch

from stylefast import values
from stylefast.errors import InvalidRequest, StyleError
from stylefast.models.row_features import RowFeatures
from stylefast.runtime.admission import RequestPlanner
from stylefast.runtime.jobs import Job
from stylefast.runtime.loras import described, named
from stylefast.runtime.plan.request import Request, StyleLike
from stylefast.runtime.plan.sample import SampleGroup, shared_styles
from stylefast.runtime.runner import Runner
from stylefast.runtime.scheduler import Scheduler
from stylefast.sampling.guidance import BRANCHES
from stylefast.sampling.schedule import schedule_digest
from stylefast.styles.bank import BankWriter, LayerFeatures, ReferenceFeatures, StyleBank
from stylefast.styles.bank_info import FORMAT, BankInfo
from stylefast.styles.bank_size import STORES, BankShapes
from stylefast.styles.style import ReferenceStyle

DTYPES = {"fp32": "float32", "fp16": "float16", "bf16": "bfloat16", "fp8": "float8_e4m3fn"}
# called after every step with (step, steps)
BakeCallback = Callable[[int, int], None]


def bake(
    scheduler: Scheduler,
    planner: RequestPlanner,
    request: Request,
    *,
    store: str = "kv",
    dtype: str = "auto",
    path: str | Path | None = None,
    overwrite: bool = True,
    callback: BakeCallback | None = None,
    styles_digest: Callable[[Sequence], str],
    version: str,
) -> StyleBank:
    """Run the reference that `request` reads under the request's settings and store its features.

    The request's prompt does not matter. See `Engine.bake` for the arguments and errors.
    """
    style = request.reader
    if style is None:
        raise StyleError(
            "nothing to bake: pass a style that reads a reference (docs/styles.md), alone or in a list with styles "
            "that it shares"
        )
    kind = _check(style, store, dtype, planner.runner.unet.dtype)
    wanted = style.reads
    values.function("callback", callback, "(step, steps)")
    values.flag("overwrite", overwrite)
    if path is not None:
        path = values.path("path", path)
    target, references = planner.bake_plan(request)
    others = shared_styles(request, style)
    if others and store == "latents":
        way_out = ", or with share_styles=False" if wanted.share_styles else ", or take it out of the negative prompt"
        raise StyleError(
            f"store='latents' can't include other styles, but the reference shares {type(others[0]).__name__}; bake "
            f"with store='kv'{way_out}"
        )
    for reference in references:
        # run alone, a reference is an output
        reference.output = references.index(reference)
    layout = planner.runner.unet.layout
    layers = tuple(style.layer_mask(layout).nonzero().flatten().tolist()) if store != "latents" else ()
    generated = not wanted.pictures
    info = BankInfo(
        format=FORMAT,
        model=planner.model,
        fingerprint=planner.fingerprint(),
        store=store,
        dtype=kind,
        scheduler=request.scheduler,
        schedule=schedule_digest(target.schedule),
        steps=request.steps,
        size=target.size,
        guidance=float(request.guidance) if generated else None,
        guidance_rescale=float(request.guidance_rescale) if generated else None,
        branches=target.branches,
        negative_prompt=request.negative_prompt,
        negative_prompt_2=request.negative_prompt_2,
        prompt_syntax=request.prompt_syntax,
        clip_skip=request.clip_skip or 0,
        prompt=wanted.prompt or "",
        seed=wanted.seed,
        noise="generated" if generated else wanted.noise,
        references=len(references),
        layers=layers,
        styles=styles_digest(others),
        loras=described(target.loras),
        lora_names=named(target.loras),
        created=datetime.now(UTC).isoformat(timespec="seconds"),
        stylefast=version,
    )
    shapes = BankShapes.from_config(planner.runner.unet.config, target.size, planner.downscale)
    with BankWriter(info, shapes, path, overwrite) as writer:
        job = BakeJob(request, writer, callback, scheduler.cancel)
        job.samples, job.model = references, info.fingerprint
        scheduler.run(job)
        return writer.finish()


class BakeJob(Job):
    """A call of `bake`: each reference runs alone, and the caller's thread writes each step's results to the bank."""

    has_caller = collects = True

    def __init__(
        self,
        request: Request,
        writer: BankWriter,
        callback: BakeCallback | None,
        cancel: Callable[[Job], None],
    ):
        super().__init__([request], _nothing, cancel)
        self._writer, self._callback = writer, callback
        self._features: RowFeatures | None = None
        self._before: torch.Tensor | None = None  # latents [channels, h, w], of a bank that stores them

    def plan(self, planner: RequestPlanner) -> None:
        """Raise if the weights differ from those recorded in the bank."""
        raise StyleError("the model's weights changed while the bake waited for its turn; bake again")

    def before_step(self, runner: Runner, group: SampleGroup) -> RowFeatures | None:
        """Keep the latents, or return a collector of the rows' features."""
        if self._writer.info.store == "latents":
            self._features, self._before = None, runner.latents_of(group)[0]
        else:
            self._features, self._before = RowFeatures(), None
        return self._features

    def after_step(self, runner: Runner, groups: Sequence[SampleGroup]) -> Sequence[Callable[[], None]]:
        """Return a function that writes a reference's step, and calls the callback after the last reference's."""
        (group,) = groups
        number, step = self.groups.index(group), group.step - 1
        after = runner.latents_of(group)[0] if group.finished else None
        branches = group.rows_at(step).branch
        told = number == len(self.groups) - 1
        features, before, writer = self._features, self._before, self._writer

        def write() -> None:
            if before is not None:
                writer.put_latents(step, number, before)
            if features is not None:
                for row, branch in enumerate(branches):
                    writer.put(step, BRANCHES[branch], number, _of_row(features, row, writer.info.layers))
            if after is not None:
                writer.put_latents(step + 1, number, after)
            if told and self._callback is not None:
                self._callback(step + 1, self.steps)

        return [write]


def _nothing(job: Job, latents: Mapping[int, torch.Tensor]) -> Generator[None, None, None]:
    """Make no result, since the bank is the result."""
    return
    yield


def _of_row(features: RowFeatures, row: int, layers: Sequence[int]) -> ReferenceFeatures:
    per_layer = {}
    for layer in layers:
        hidden, k, v, mean, variance = features.layers[layer]
        per_layer[layer] = LayerFeatures(hidden[row], k[row], v[row], mean[:, row], variance[:, row])
    norms = range(len(features.norms))
    return ReferenceFeatures(
        per_layer,
        tuple(features.norms[i][0][row] for i in norms),
        tuple(features.norms[i][1][row] for i in norms),
        tuple(features.norm_elements[i] for i in norms),
    )


def _check(style: ReferenceStyle, store: str, dtype: str, model_dtype: torch.dtype) -> str:
    """Return the bank's element type by its full name. Raises InvalidRequest and StyleError."""
    if style.reads.bank is not None:
        raise StyleError("this style is a bank already; use it as it is, or bake its prompt or picture again")
    if style.reads.of_call:
        raise StyleError(
            "the style takes the first prompt of a call as its reference; to bake it, give it a prompt or a picture"
        )
    values.one_of("store", store, STORES)
    if not isinstance(dtype, str) or dtype not in DTYPES.values():
        values.one_of("dtype", dtype, ("auto", *DTYPES))
    if store == "latents":
        if dtype not in ("auto", "fp32", "float32"):
            raise InvalidRequest(
                f"store='latents' always stores float32, which is small already; leave dtype={values.quoted(dtype)} out"
            )
        return "float32"
    return str(model_dtype).removeprefix("torch.") if dtype == "auto" else DTYPES.get(dtype, dtype)


def bake_request(styles: StyleLike, options: dict[str, Any]) -> Request:
    """Return a request that represents all readers of a bank. Raises InvalidRequest for settings out of range."""
    request = Request("a reference", style=styles, **options)
    if request.guidance_interval != (0.0, 1.0):
        raise InvalidRequest("a bank serves all guidance intervals; leave guidance_interval out when baking")
    return replace(request, seed=0)
