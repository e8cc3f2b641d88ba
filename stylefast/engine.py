"""The main interface: one loaded model and its operations."""

from collections.abc import Generator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

import torch

import stylefast
from stylefast import values
from stylefast.errors import InvalidRequest, StyleError
from stylefast.export.options import Source
from stylefast.models import vae as vaes
from stylefast.models.adapter_loading import load_adapter
from stylefast.models.checkpoint import (
    Components,
    from_pipeline,
    load_components,
    predicting,
    resolve_device,
    resolve_dtype,
)
from stylefast.models.control_net import ControlNet
from stylefast.models.image_encoder import ImageEncoder
from stylefast.models.ip_adapter import IPAdapter
from stylefast.models.layout import checked_layers
from stylefast.models.load_options import check_engine_options, sort_options
from stylefast.models.lora import LoraSet
from stylefast.models.pictures import PictureSource
from stylefast.models.prepacked import channels_last, pack
from stylefast.models.repaint import Kept
from stylefast.models.t2i_adapter import T2IAdapter
from stylefast.models.text import TextEncoder
from stylefast.models.unet import UNet
from stylefast.options import NAMES, OF_LOADED, SIZES, EngineOptions, parse_bytes
from stylefast.record import metadata, style_digest
from stylefast.runtime.admission import RequestPlanner
from stylefast.runtime.backends.choice import check_backend, make_backend
from stylefast.runtime.banks.baking import BakeCallback, bake, bake_request
from stylefast.runtime.controls import ControlNets
from stylefast.runtime.decoding import Decoder, to_pil
from stylefast.runtime.explaining import ExplainJob, arrays, check_point, check_steps
from stylefast.runtime.jobs import Call, Job, Make, StepCallback
from stylefast.runtime.loras import Lora, Loras
from stylefast.runtime.memory import MemoryBudget, check_limit, held_bytes, memory_report
from stylefast.runtime.plan.checks import as_list, check_deadline, check_output, prompts_of
from stylefast.runtime.plan.control import Control
from stylefast.runtime.plan.notices import Notices
from stylefast.runtime.plan.request import ControlLike, LoraStrength, Request, Result, StyleLike
from stylefast.runtime.plan.sample import enlarged
from stylefast.runtime.runner import Runner
from stylefast.runtime.scheduler import Scheduler
from stylefast.runtime.steps.conditions import ConditionStore
from stylefast.styles.bank import StyleBank
from stylefast.styles.style import Style
from stylefast.threads import fit_to_quota

if TYPE_CHECKING:
    from diffusers.pipelines.stable_diffusion_xl.pipeline_stable_diffusion_xl import StableDiffusionXLPipeline

    from stylefast.explanation import Explanation

AnyJob = TypeVar("AnyJob", bound=Job)

__all__ = ["Engine", "Request", "Result"]


class Engine:
    """A loaded SDXL-shaped model that makes pictures in many styles at once.

    Make one with `Engine.from_pretrained` or `Engine.from_pipeline`.

    Examples:
        >>> import stylefast as sf
        >>> engine = sf.Engine.from_pretrained("tiny")
        >>> engine.native_size
        (64, 64)
        >>> list(engine.references())
        ['glass', 'neon', 'watercolor', 'woodcut']
        >>> engine.generate("a fish", steps=2).images[0].size
        (64, 64)
    """

    def __init__(
        self,
        components: Components,
        options: EngineOptions | None = None,
    ):
        options = options or EngineOptions()
        components = predicting(components, options.prediction_type)
        fit_to_quota()
        self._components = components
        self.name, self.fingerprint = components.name, components.fingerprint
        channels_last(components.unet_state)
        self.unet = UNet.from_state(components.unet_config, components.unet_state)
        self.unet.layout = replace(self.unet.layout, style_modules=components.style_modules)
        self.text_encoder = TextEncoder(components.tokenizers, components.text_encoders, components.force_zeros)
        self.text_encoder.max_chunks = options.max_text_chunks
        self.vae = components.vae
        self.adapters: dict[str, tuple[IPAdapter, ImageEncoder]] = {}
        self.merged_loras = LoraSet(
            components.unet_state, components.text_encoders, guard=lambda: self.scheduler.changing_weights()
        )
        limits = [parse_bytes(name, getattr(options, name)) for name in SIZES]
        self.budget = MemoryBudget(*limits[:3])
        self.loras = Loras(
            self.unet,
            self.merged_loras.weights,
            limits[4],
            self.merged_loras,
            check_open=lambda: self.runner.check_open(),
        )
        self._warn = Notices(self.name, components.known_words)
        scheduler_config = components.scheduler_config
        store = ConditionStore(
            self.unet,
            self.text_encoder,
            self.adapters,
            scheduler_config.get("num_train_timesteps", 1000),
            self.loras,
            revision=lambda: self.merged_loras.fingerprint,
            lora_memory=limits[3],
        )
        chosen = make_backend(options.backend, self.unet, options.engines, options.trust, source=self._source)
        self.runner = Runner(self.unet, store, chosen, self.budget, options.batch_buckets)
        self.controls = ControlNets(
            self.unet,
            self.downscale,
            self.budget,
            check_open=lambda: self.runner.check_open(),
            paused=lambda: self.scheduler.paused(),
        )
        self._planner = RequestPlanner(
            self.runner,
            self.vae,
            scheduler_config,
            self.native_size,
            self.name,
            self._current_fingerprint,
            self.loras,
            self.controls,
        )
        _check_part("preview", options.preview)
        self.decoder = Decoder(self.vae, self.unet.dtype, self.budget, options.preview)
        chosen.attach(self)
        self.scheduler = Scheduler(
            self.runner,
            self._planner,
            self.decoder.previews,
            options.max_batch_rows,
            options.max_pending,
        )
        self.budget.watch(lambda: held_bytes(self))
        check_limit(self)
        self._packs = self.runner.backend.name == "torch" and options.pack_weights
        self._pack(self.unet)
        self.controls.prepare = self._pack
        with self.runner.stream:
            pass  # on a GPU, orders steps after the loads on the current stream

    @classmethod
    def from_pretrained(cls, source: str | Path, options: EngineOptions | None = None, **others: Any) -> "Engine":
        """Load a model.

        Args:
            source: "tiny" (shipped with stylefast), a diffusers folder, a `.safetensors` file, or a hub id.
            options: see `stylefast.EngineOptions`.
            others: options by name, before those in `options` (device="cuda", max_pending=8); and for loading: variant,
                tokenizer, config, revision, cache_dir, token, force_download and local_files_only, as in
                `load_components`. torch_dtype and other names of diffusers are accepted, or refused with a hint.

        Raises ModelNotFound, ModelFormatError, AdapterError, OutOfMemory, InvalidRequest, ExportError or a subclass.

        Examples:
            >>> engine = sf.Engine.from_pretrained("tiny", dtype="bfloat16", max_pending=8)
            >>> engine.unet.dtype
            torch.bfloat16
        """
        options, others = EngineOptions.of(options, others)
        check_backend(options.backend, options.engines, options.trust)
        others, dtype, device = sort_options(others, NAMES, options.dtype, options.device)
        place = resolve_device(device)
        _check_part("vae", options.vae)
        for file in [] if isinstance(options.adapter, str) else as_list(options.adapter):
            values.path("adapter", file)
        components = load_components(source, dtype=resolve_dtype(dtype, place), device=place, vae=options.vae, **others)
        engine = cls(components, options)
        for file in as_list(components.adapter_path if options.adapter == "auto" else options.adapter):
            engine.load_adapter(file, options.image_encoder)
        return engine

    @classmethod
    def from_pipeline(
        cls, pipeline: "StableDiffusionXLPipeline", options: EngineOptions | None = None, **others: Any
    ) -> "Engine":
        """Take over a diffusers `StableDiffusionXLPipeline`; weights are shared and the pipeline stays usable.

        Args:
            pipeline: of any of SDXL's family.
            options, others: as in `from_pretrained`, but for those that say what to load.

        Raises InvalidRequest for options that say what to load.
        """
        check_engine_options(others, OF_LOADED)
        options, _ = EngineOptions.of(options, others)
        check_engine_options(options.loading(), OF_LOADED)
        return cls(from_pipeline(pipeline), options)

    def load_adapter(self, file: str | Path, image_encoder: str | Path | None = None, name: str | None = None) -> str:
        """Load an IP-Adapter and return the name by which `InstantStyle(adapter=...)` finds it.

        Args:
            file: a `.safetensors` or `.bin` file.
            image_encoder: folder of its CLIP image encoder; None uses the model's own.
            name: None takes the file's stem.

        Raises AdapterError if the two don't match, or no image encoder is known.
        """
        self.runner.check_open()
        values.path("an adapter", file)
        if name is not None:
            values.text("an adapter's name", name, longest=values.NAME_BYTES, empty=False)
        if image_encoder is not None:
            values.path("image_encoder", image_encoder)
        loaded = load_adapter(file, image_encoder, self._components, self.unet)
        name = name or Path(file).stem
        adapter, encoder = self.runner.backend.adapter(*loaded)
        # also orders the loaded weights before their use on the stream of steps
        with self.scheduler.paused():
            self.adapters[name] = adapter, encoder
            if self.runner.buckets:
                # shapes must repeat, so reserve room for image tokens before the first picture comes
                self.runner.conditions.make_image_pages(len(adapter.negative_tokens(encoder)))
        return name

    def load_lora(self, source: str | Path, scale: float = 1.0, name: str | None = None) -> str:
        """Merge a LoRA (file or folder) into the UNet and text encoders; return its name, by default the file's.

        It then holds for all requests. LoRAs that differ by request are registered by `engine.loras.add`;
        `engine.merged_loras` changes the strengths of merged ones and removes them.

        Supports LoRA, LoCon, LoHa, LoKr, DoRA and full differences in the layouts of kohya, diffusers, peft, ComfyUI
        and OneTrainer. An embedding in the same file is reported, and used by `DreamStyler(file)`.
        Raises ModelNotFound, ModelFormatError, AdapterError if it does not fit, InvalidRequest while pictures are in
        progress, since half of their steps would use other weights.
        """
        self.runner.check_open()
        return self.merged_loras.add(source, scale, name)

    @property
    def downscale(self) -> int:
        """Return the pixels per latent along one side."""
        return vaes.downscale(self.vae)

    @property
    def scheduler_config(self) -> dict[str, Any]:
        """Return the model's scheduler config in diffusers' format."""
        return self._components.scheduler_config

    @property
    def native_size(self) -> tuple[int, int]:
        """Return (width, height) in pixels that the model was trained at."""
        side = self.unet.config.get("sample_size") or 128
        height, width = side if isinstance(side, (list, tuple)) else (side, side)
        return width * self.downscale, height * self.downscale

    def styles(self) -> dict[str, Path]:
        """Return the learned styles that come with the model: name -> file for `DreamStyler`."""
        return dict(self._components.style_paths)

    def references(self) -> dict[str, Path]:
        """Return the example reference pictures that come with the model: name -> file."""
        return dict(self._components.reference_paths)

    def lora_files(self) -> dict[str, Path]:
        """Return the LoRAs that come with the model: name -> file for `engine.loras.add`.

        Examples:
            >>> list(engine.lora_files())
            ['gold', 'pixel', 'sunset']
        """
        return dict(self._components.lora_paths)

    def control_files(self) -> dict[str, Path]:
        """Return the control networks that come with the model: name -> folder for `engine.controls.add`.

        Examples:
            >>> list(engine.control_files())
            ['edges']
        """
        return dict(self._components.control_paths)

    def generate(
        self,
        prompts: str | Request | Sequence[str | Request],
        style: StyleLike = None,
        *,
        negative_prompt: str = "",
        steps: int = 30,
        guidance: float = 5.0,
        size: tuple[int, int] | None = None,
        seed: int | Sequence[int] | None = 0,
        scheduler: str = "euler",
        guidance_rescale: float = 0.0,
        guidance_interval: tuple[float, float] = (0.0, 1.0),
        spacing: str | None = None,
        clip_skip: int | None = 0,
        loras: Mapping[str, LoraStrength] | None = None,
        prompt_2: str | None = None,
        negative_prompt_2: str | None = None,
        prompt_syntax: str = "plain",
        image: PictureSource | None = None,
        strength: float = 0.6,
        mask: PictureSource | torch.Tensor | None = None,
        upscale: float = 1.0,
        upscale_strength: float = 0.4,
        upscale_mode: str = "picture",
        variation_seed: int | None = None,
        variation_strength: float = 0.0,
        control: ControlLike = None,
        window: tuple[int, int] | None = None,
        window_stride: int | None = None,
        wrap: bool = False,
        callback: StepCallback | None = None,
        output: str = "pil",
        alone: bool = False,
    ) -> Result:
        """Make one picture per prompt; return when all are done.

        All pictures of a size share one UNet call per step, also with those of other threads' calls and of jobs.

        Args:
            prompts: a prompt or several, or `Request`s (whose own settings then count), or a mix of both.
            style: None, a style or a list of styles, for the prompts given as strings.
            seed: picture i gets seed + i; or a list with one for each prompt. None or -1 draws one; the seeds used are
                in the result's metadata.
            callback: called after every step of a size with (step, steps, latents of the running pictures), in this
                thread, while the steps of other calls go on.
            output: "pil", "np", or "latents" to leave the VAE out.
            alone: share no UNet call with other calls and jobs, so that the pictures' bits don't depend on them.
            The other arguments are documented in `Request`.

        Raises InvalidRequest or a subclass (PromptError, StyleError, ImageError) before any work is done, NumericsError
        if latents turn NaN, OutOfMemory if the batch does not fit.

        Examples:
            >>> neon = sf.StyleAligned(engine.references()["neon"])
            >>> result = engine.generate(["a fish", "a cat"], neon, steps=2, seed=7)
            >>> [entry["seed"] for entry in result.metadata]
            [7, 8]
            >>> mixed = [sf.Request("a tree", steps=2), sf.Request("a cat", style=neon, steps=3, scheduler="unipc")]
            >>> len(engine.generate(mixed).images)
            2
        """
        self.runner.check_open()
        check_output(output)
        values.function("callback", callback, "(step, steps, latents)")
        values.flag("alone", alone)
        prompts = prompts_of(prompts)
        shared = {
            "negative_prompt": negative_prompt,
            "style": style,
            "steps": steps,
            "guidance": guidance,
            "size": size,
            "scheduler": scheduler,
            "guidance_rescale": guidance_rescale,
            "guidance_interval": guidance_interval,
            "spacing": spacing,
            "clip_skip": clip_skip,
            "loras": loras,
            "prompt_2": prompt_2,
            "negative_prompt_2": negative_prompt_2,
            "prompt_syntax": prompt_syntax,
            "image": image,
            "strength": strength,
            "mask": mask,
            "upscale": upscale,
            "upscale_strength": upscale_strength,
            "upscale_mode": upscale_mode,
            "variation_seed": variation_seed,
            "variation_strength": variation_strength,
            "control": control,
            "window": window,
            "window_stride": window_stride,
            "wrap": wrap,
        }
        self._open(output)
        seeds = values.seeds("seed", seed, len(prompts))
        requests = [p if isinstance(p, Request) else Request(p, seed=s, **shared) for p, s in zip(prompts, seeds)]
        self._warn(requests)
        # first: a value that can't be recorded must not cost finished pictures
        job = self._job(Call, requests, output=output, callback=callback, alone=alone)
        result = self.scheduler.run(job)
        return replace(result, latents=[self.runner.stream.lend(one) for one in result.latents])

    def submit(
        self,
        request: Request | Sequence[Request],
        *,
        deadline: float | None = None,
        output: str = "pil",
    ) -> Job:
        """Add a request to the running batch; it joins at the next step, regardless of the others' styles and steps.

        Args:
            request: one, or several that belong together: under one `StyleAligned()` the first is the reference.
            deadline: seconds from now; a job not done by then fails with DeadlineExceeded.
            output: as in `generate`.

        Returns a `Job`: `result(timeout=)`, `cancel()`, `await job`, `async for preview in job`. Raises InvalidRequest
        or a subclass for errors found before anything runs, QueueFull if `max_pending` jobs are waiting, and
        EngineClosed.

        Examples:
            >>> fish = engine.submit(sf.Request("a fish", steps=2))
            >>> cats = engine.submit([sf.Request("a cat", seed=seed, steps=3) for seed in (1, 2)])
            >>> len(fish.result().images), len(cats.result().images)
            (1, 2)
        """
        self.runner.check_open()
        requests = as_list(request)
        if not requests or not all(isinstance(one, Request) for one in requests):
            raise InvalidRequest("submit takes a Request, or a list of them; wrap a prompt as sf.Request('a boat')")
        check_output(output)
        deadline = check_deadline(deadline)
        self._warn(requests)
        self._open(output)
        job = self._job(Job, requests, output=output, deadline=deadline)
        self.scheduler.submit(job)
        return job

    def explain(
        self,
        request: Request,
        point: tuple[int, int],
        *,
        layers: str | Sequence[str] = "all",
        steps: Sequence[int] | None = None,
    ) -> "Explanation":
        """Draw a request's picture once more, alone, and return what a point of it read of its references.

        Other requests run as always; only the steps of this one compute attention maps, and in PyTorch.

        Args:
            point: (x, y) in pixels of the picture.
            layers: "all", or parts of layer names, such as "up_blocks.0.attentions.1".
            steps: their numbers, from 1; None: all.

        Raises StyleError for a request without references and image prompts, for layers that the model does not have,
        and if no style acts in the chosen steps and layers; InvalidRequest for anything else out of range; and what
        `generate` raises.

        Examples:
            >>> neon = sf.StyleAligned(engine.references()["neon"])
            >>> found = engine.explain(sf.Request("a fish", style=neon, steps=4), point=(32, 32))
            >>> found.reference_map().shape, found.image.size
            ((8, 8), (64, 64))
        """
        from stylefast.explanation import Explanation, ImagePrompt, SharedAttention

        self.runner.check_open()
        if not isinstance(request, Request):
            raise InvalidRequest("explain takes a Request; wrap a prompt as sf.Request('a boat', style=...)")
        size = enlarged(request.size or self.native_size, request.upscale)
        names = [layer.name for layer in self.unet.layout.layers]
        chosen = self.unet.layout.matching(checked_layers(layers))
        wanted = check_steps(steps)
        self._open("pil")
        job = self._job(
            ExplainJob,
            [request],
            make=self._explained,
            point=check_point(point, size),
            layers=[i for i, one in enumerate(chosen) if one],
            steps=wanted,
        )
        image, references = self.scheduler.run(job)
        if not job.shared and not job.image:
            raise StyleError("nothing was recorded: no style of the request acts in the chosen steps and layers")
        return Explanation(
            image,
            (int(point[0]), int(point[1])),
            references or (None,) * max((len(found.references) for _, found in job.shared), default=0),
            tuple(SharedAttention(step, names[found.layer], *arrays(found)) for step, found in job.shared),
            tuple(ImagePrompt(step, names[found.layer], found.share.numpy()) for step, found in job.image),
        )

    def memory(self) -> dict[str, Any]:
        """Return the bytes that the engine holds, by purpose; see `runtime.memory.memory_report`."""
        return memory_report(self)

    def close(self) -> None:
        """Accept no more work; unfinished jobs fail with EngineClosed. Also called at the end of `with engine:`.

        `generate` and `bake` in other threads fail likewise, after their current step. In a forked process nothing is
        freed.
        """
        self.scheduler.close()

    def __enter__(self) -> "Engine":
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def bake(
        self,
        style: Style | Sequence[Style],
        steps: int = 30,
        scheduler: str = "euler",
        size: tuple[int, int] | None = None,
        guidance: float = 5.0,
        negative_prompt: str = "",
        *,
        guidance_rescale: float = 0.0,
        spacing: str | None = None,
        loras: Mapping[str, LoraStrength] | None = None,
        negative_prompt_2: str | None = None,
        prompt_syntax: str = "plain",
        clip_skip: int | None = 0,
        store: str = "kv",
        dtype: str = "auto",
        path: str | Path | None = None,
        overwrite: bool = True,
        callback: BakeCallback | None = None,
    ) -> StyleBank:
        """Run a style's reference once and store its features; `StyleAligned(bank)` then needs no reference rows.

        Args:
            style: a StyleAligned with a picture or a prompt; or a list with it and the other styles that its reference
                shares. The bank stores its `layers`; scale, shift, mode, adain and norm sharing are chosen when the
                bank is used.
            steps, scheduler, size, spacing, clip_skip: must be equal in requests that use the bank. guidance above 1
                also bakes the null branch, which requests with guidance need; its value, guidance_rescale,
                negative_prompt, negative_prompt_2 and prompt_syntax apply to a reference generated from a prompt.
            loras: as in `Request`; the reference is made under them, and the bank fits only requests with the same.
            store: "kv" (keys and values: largest, fastest), "hidden" (the states they are projected from: half as
                large, projected when a page is fetched), "latents" (a few kilobytes per step; the reference runs again
                alongside its readers).
            dtype: of keys, values or states: "auto" (the model's), "fp32", "fp16", "bf16" or "fp8".
            path: write to this file while baking, so that the bank need not fit into memory; None keeps it in memory
                until `StyleBank.save`.
            callback: called after every step with (step, steps).

        Raises StyleError and InvalidRequest for styles or settings that can't be baked, NumericsError if the
        reference's features are not finite, OutOfMemory if it does not fit into memory or onto the disk.

        Examples:
            >>> bank = engine.bake(sf.StyleAligned(prompt="a star in neon style"), steps=2)
            >>> result = engine.generate(["a fish", "a cat"], sf.StyleAligned(bank, scale=0.8), **bank.settings)
            >>> len(result.images)
            2
        """
        self.runner.check_open()
        options = {
            "steps": steps,
            "scheduler": scheduler,
            "size": size,
            "guidance": guidance,
            "spacing": spacing,
            "negative_prompt": negative_prompt,
            "guidance_rescale": guidance_rescale,
            "loras": loras,
            "negative_prompt_2": negative_prompt_2,
            "prompt_syntax": prompt_syntax,
            "clip_skip": clip_skip,
        }
        request = bake_request(style, options)
        self._warn([request], baking=True)
        return bake(
            self.scheduler,
            self._planner,
            request,
            store=store,
            dtype=dtype,
            path=path,
            overwrite=overwrite,
            callback=callback,
            styles_digest=style_digest,
            version=stylefast.__version__,
        )

    def _job(self, kind: type[AnyJob], requests: Sequence[Request], make: Make | None = None, **options: Any) -> AnyJob:
        """Return a job for requests, planned for the model as it is. Raises InvalidRequest or a subclass."""
        loras = {name: self.loras[name] for request in requests for name in request.lora_scales}
        job = kind(
            requests,
            make or self._made,
            self.scheduler.cancel,
            metadata=self._metadata(requests, loras),
            inside=self.scheduler.inside,
            loras=loras,
            **options,
        )
        job.plan(self._planner)
        return job

    def _result(
        self,
        latents: list[torch.Tensor],
        kept: list[Kept | None],
        wraps: list[bool],
        written: list[dict],
        output: str,
    ) -> Generator[None, None, Result]:
        """Yield between pictures, and return the result.

        kept: what each picture's mask keeps of another; wraps: whether its left and right edge are neighbours.
        """
        images = []
        if output != "latents":
            images = yield from self.decoder.images(latents, self.runner.beside, wraps)
            images = [image if rest is None else rest.put_back(image) for image, rest in zip(images, kept, strict=True)]
        if output == "np":
            images = [image.permute(1, 2, 0).cpu().numpy() for image in images]
        elif output == "pil":
            images = [to_pil(image) for image in images]
        return Result(images, [self.runner.stream.lend(one) for one in latents], written)

    def _pack(self, module: UNet | ControlNet | T2IAdapter) -> None:
        """Let a CPU keep copies of a network's weights in its own order, if that is wanted and there is room."""
        if not self._packs:
            return
        # half of the remaining limit; the rest is for pictures
        room = None if self.budget.limit is None else (self.budget.limit - held_bytes(self)) // 2
        pack(module, room)

    def _open(self, output: str) -> None:
        if output != "latents":
            self.decoder.open()

    def _made(self, job: Job, latents: Mapping[int, torch.Tensor]) -> Generator[None, None, Result]:
        """Return the generator of a job's result, see `_result`."""
        for entry in job.metadata:
            entry["loras"] = self.merged_loras.scales  # may have changed while the job waited, but not while it ran
        targets = (job.samples or [])[: len(job.requests)]
        kept = [sample.pin[1].kept if sample.pin and sample.request.mask is not None else None for sample in targets]
        wraps = [request.wrap for request in job.requests]
        return self._result([latents[i] for i in range(len(job.requests))], kept, wraps, job.metadata, job.output)

    def _explained(self, job: Job, latents: Mapping[int, torch.Tensor]) -> Generator[None, None, tuple]:
        """Return the generator of the picture of an `ExplainJob` and of those of its references."""
        result = yield from self._made(job, latents)
        rest = [latents[i] for i in sorted(latents) if i]
        references = yield from self.decoder.images(rest, self.runner.beside, [False] * len(rest))
        return result.images[0], tuple(to_pil(reference) for reference in references)

    def _current_fingerprint(self) -> str:
        loras = self.merged_loras.fingerprint
        return f"{self.fingerprint}+{loras[:16]}" if loras else self.fingerprint

    def _source(self) -> Source:
        return Source(
            self.name,
            self._current_fingerprint(),
            self.unet,
            self.vae,
            self.text_encoder,
            self.adapters,
            stylefast.__version__,
        )

    def _metadata(self, requests: Sequence[Request], loras: Mapping[str, Lora]) -> list[dict]:
        model = {
            "model": self.name,
            "fingerprint": self.fingerprint,
            "device": str(self.unet.device),
            "backend": self.runner.backend.name,
            "dtype": str(self.unet.dtype).removeprefix("torch."),
            "prediction_type": self._components.scheduler_config.get("prediction_type", "epsilon"),
            "loras": self.merged_loras.scales,
        }
        networks: dict[str, ControlNet | T2IAdapter] = {}

        def named(control: Control) -> Control:
            network = self.controls.find(control.network)
            networks[network.name] = network
            return replace(control, network=network.name)

        # the only network needs no name, but when the call is made again there may be others
        requests = [replace(one, control=tuple(map(named, one.controls))) if one.controls else one for one in requests]
        entries = metadata(requests, stylefast.__version__, model)
        if loras:
            # of the whole call, which is what is made again
            files = {name: lora.recorded() for name, lora in loras.items()}
            entries = [entry | {"lora_files": files} for entry in entries]
        if networks:
            nets = {
                name: {"path": str(net.path) if net.path else None, "sha256": net.digest}
                for name, net in networks.items()
            }
            entries = [entry | {"control_nets": nets} for entry in entries]
        return entries


def _check_part(name: str, part: Any) -> None:
    """Raise InvalidRequest unless `part` is None, a module, or a path or hub id."""
    if part is not None and not isinstance(part, torch.nn.Module):
        values.path(name, part)
