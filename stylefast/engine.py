"""The facade: one loaded model and all that can be asked of it."""

import platform
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch

import stylefast
from stylefast.errors import AdapterError, InvalidRequest, OutOfMemory
from stylefast.models import vae as vaes
from stylefast.models.checkpoint import Components, from_pipeline, load_components, load_image_encoder
from stylefast.models.image_encoder import ImageEncoder
from stylefast.models.ip_adapter import IPAdapter
from stylefast.models.lora import LoraSet
from stylefast.models.pictures import open_picture
from stylefast.models.text import TextEncoder
from stylefast.models.unet import UNet
from stylefast.record import to_record
from stylefast.runtime.conditions import encode_conditions
from stylefast.runtime.loop import StepCallback, denoise
from stylefast.runtime.memory import check_batch_fits, is_out_of_memory
from stylefast.runtime.pinning import Pin, forward_pin, inverted_pin, scheduler_config
from stylefast.runtime.request import Request, check_size
from stylefast.runtime.trajectory import Trajectory, plan_trajectories
from stylefast.sampling.schedule import Schedule, make_schedule

__all__ = ["Engine", "Request", "Result"]

BACKENDS = ("auto", "torch")
OUTPUTS = ("pil", "np", "latents")
# pixels decoded at once; the VAE's activations dwarf its result
DECODE_PIXELS = 2**20


@dataclass(frozen=True, eq=False)
class Result:
    """What `Engine.generate` gives back, in the order of the prompts.

    `images`: PIL images, or for output="np" float arrays [height, width, 3] in 0..1, or for "latents" nothing.
    `latents`: per picture [channels, h, w] fp32, before the VAE. `metadata`: per picture, enough to make it again.
    """

    images: list
    latents: list[torch.Tensor]
    metadata: list[dict] = field(repr=False)


class Engine:
    """A loaded SDXL-shaped model that makes pictures in many styles at once.

    Make one with `Engine.from_pretrained` or `Engine.from_pipeline`.
    """

    def __init__(self, components: Components):
        self._components = components
        self.name, self.fingerprint = components.name, components.fingerprint
        self.unet = UNet.from_state(components.unet_config, components.unet_state)
        self.unet.layout = replace(self.unet.layout, style_modules=components.style_modules)
        self.text_encoder = TextEncoder(components.tokenizers, components.text_encoders, components.force_zeros)
        self.vae = components.vae
        self.adapters: dict[str, tuple[IPAdapter, ImageEncoder]] = {}
        self.loras = LoraSet(components.unet_config, components.unet_state, components.text_encoders)

    @classmethod
    def from_pretrained(
        cls,
        source: str | Path,
        *,
        adapter: str | Path | Sequence[str | Path] | None = "auto",
        image_encoder: str | Path | None = None,
        device: str = "auto",
        dtype: str = "auto",
        backend: str = "auto",
        vae: Any = None,
        **options,
    ) -> "Engine":
        """Load a model.

        Args:
            source: "tiny" (shipped with stylefast), a diffusers folder, a `.safetensors` file, or a hub id.
            adapter: an IP-Adapter file, or several; "auto" takes those that come with the model; None loads none.
            image_encoder: folder of the CLIP image encoder that `adapter` was trained with; None: the model's own.
            device: "auto" (CUDA where there is one), "cpu", "cuda", "cuda:1".
            dtype: "auto" (fp32 on the CPU, else what the device does best), "float32", "bfloat16", "float16".
            backend: "auto" or "torch".
            vae: a VAE in place of the model's own: folder, file, hub id or module.
            options: passed on to `load_components`.

        Raises ModelNotFound, ModelFormatError, AdapterError, OutOfMemory, InvalidRequest.
        """
        if backend not in BACKENDS:
            raise InvalidRequest(f"backend is {backend!r}; there are {', '.join(BACKENDS)}")
        place, kind = _device(device), _dtype(dtype, device)
        components = load_components(source, dtype=kind, device=place, vae=vae, **options)
        engine = cls(components)
        files = _as_list(components.adapter_path if adapter == "auto" else adapter)
        for file in files:
            engine.load_adapter(file, image_encoder)
        return engine

    @classmethod
    def from_pipeline(cls, pipeline) -> "Engine":
        """Take over a diffusers `StableDiffusionXLPipeline`; weights are shared and the pipeline stays usable."""
        return cls(from_pipeline(pipeline))

    def load_adapter(self, file: str | Path, image_encoder: str | Path | None = None, name: str | None = None) -> str:
        """Load an IP-Adapter and return the name by which `InstantStyle(adapter=...)` finds it (the file's stem).

        `image_encoder` is the folder of its CLIP image encoder; None takes the model's own.
        Raises AdapterError when the two don't belong together, or no image encoder is known.
        """
        adapter = IPAdapter.load(
            file, self.unet.layout, self.unet.config["cross_attention_dim"], dtype=self.unet.dtype,
            device=self.unet.device,
        )  # fmt: skip
        encoder = self._image_encoder(image_encoder)
        adapter.check_encoder(encoder)
        name = name or Path(file).stem
        self.adapters[name] = (adapter, encoder)
        return name

    def _image_encoder(self, source) -> ImageEncoder:
        components = self._components
        if source is not None:
            return load_image_encoder(source, dtype=self.unet.dtype, device=self.unet.device)
        if components.image_encoder is None:
            raise AdapterError(
                f"{self.name} comes without an image encoder; pass image_encoder= the folder of the one that the "
                "adapter was trained with, e.g. models/image_encoder of h94/IP-Adapter for a vit-h adapter"
            )
        return ImageEncoder(components.image_encoder, components.feature_extractor)

    def load_lora(self, source: str | Path, scale: float = 1.0, name: str | None = None) -> str:
        """Put a LoRA (kohya's, diffusers' or peft's layout) on UNet and text encoders; returns its name.

        Raises ModelNotFound, ModelFormatError, AdapterError if it does not fit.
        """
        return self.loras.add(source, scale, name)

    @property
    def downscale(self) -> int:
        """Pixels per latent along one side."""
        return vaes.downscale(self.vae)

    @property
    def native_size(self) -> tuple[int, int]:
        """(width, height) in pixels that the model was trained at."""
        side = self.unet.config.get("sample_size") or 128
        height, width = side if isinstance(side, (list, tuple)) else (side, side)
        return width * self.downscale, height * self.downscale

    def styles(self) -> dict[str, Path]:
        """Learned styles that come with the model: name -> file for `DreamStyler`."""
        return dict(self._components.style_paths)

    def references(self) -> dict[str, Path]:
        """Example reference pictures that come with the model: name -> file."""
        return dict(self._components.reference_paths)

    def generate(
        self,
        prompts: str | Request | Sequence[str | Request],
        style=None,
        *,
        negative_prompt: str = "",
        steps: int = 30,
        guidance: float = 5.0,
        size: tuple[int, int] | None = None,
        seed: int = 0,
        scheduler: str = "euler",
        guidance_rescale: float = 0.0,
        callback: StepCallback | None = None,
        output: str = "pil",
    ) -> Result:
        """Make one picture per prompt, all in one batch: one UNet call a step for each size.

        Args:
            prompts: a prompt or several, or `Request`s (whose own settings then count), or a mix of both.
            style: None, a style or a list of styles, for the prompts given as strings.
            seed: picture i gets seed + i.
            callback: called after every step with (step, steps, latents of the running pictures).
            output: "pil", "np", or "latents" to leave the VAE out.
            The rest is documented at `Request`.

        Raises InvalidRequest and its kin (PromptError, StyleError, ImageError) before any work is done, NumericsError
        when latents turn NaN, OutOfMemory when the batch does not fit.
        """
        if output not in OUTPUTS:
            raise InvalidRequest(f"output is {output!r}; there are {', '.join(OUTPUTS)}")
        prompts = [prompts] if isinstance(prompts, (str, Request)) else list(prompts)
        if not prompts:
            raise InvalidRequest("no prompt was given; pass one or several")
        shared = {"negative_prompt": negative_prompt, "style": style, "steps": steps, "guidance": guidance,
                  "size": size, "scheduler": scheduler, "guidance_rescale": guidance_rescale}  # fmt: skip
        requests = [p if isinstance(p, Request) else Request(p, seed=seed + i, **shared) for i, p in enumerate(prompts)]
        # written down first: a value that can't be recorded must not cost finished pictures
        metadata = self._metadata(requests)
        try:
            latents = self._sample(requests, callback)
            images = [] if output == "latents" else self._decode(latents)
        except RuntimeError as error:
            if not is_out_of_memory(error):
                raise
            raise OutOfMemory(
                f"{len(requests)} pictures don't fit into memory; ask for fewer or smaller ones at once, or load the "
                f"model in half precision ({str(error).splitlines()[0]})"
            ) from None
        if output == "np":
            images = [image.permute(1, 2, 0).cpu().numpy() for image in images]
        elif output == "pil":
            images = [_to_pil(image) for image in images]
        return Result(images, latents, metadata)

    def _sample(self, requests: Sequence[Request], callback: StepCallback | None) -> list[torch.Tensor]:
        for style in {request.aligned for request in requests} - {None}:
            style.layer_mask(self.unet.layout)
        trajectories = plan_trajectories(requests, self._schedule, self.native_size)
        sizes = dict.fromkeys(t.size for t in trajectories)
        batches = [[t for t in trajectories if t.size == size] for size in sizes]
        for batch in batches:
            check_batch_fits(self.unet, sum(len(t.branches) for t in batch), self._latent_shape(batch[0].size)[1:])
        done: dict[int, torch.Tensor] = {}
        for batch in batches:
            shape = self._latent_shape(batch[0].size)
            pins = {t: self._pin(t) for t in batch if t.picture is not None}
            conditions = encode_conditions(
                batch, self.unet, self.text_encoder, self.adapters, shape[1:], self._train_timesteps
            )
            done |= denoise(self.unet, batch, conditions, shape, pins, callback)
        return [done[i] for i in range(len(requests))]

    def _schedule(self, request: Request) -> Schedule:
        config = scheduler_config(request, self._components.scheduler_config)
        return make_schedule(request.scheduler, request.steps, config)

    @property
    def _train_timesteps(self) -> int:
        return self._components.scheduler_config.get("num_train_timesteps", 1000)

    def _latent_shape(self, size: tuple[int, int]) -> tuple[int, int, int]:
        width, height = check_size(size)
        return self.unet.config["in_channels"], height // self.downscale, width // self.downscale

    def _pin(self, t: Trajectory) -> Pin:
        """How the reference picture of `t` is held at every step."""
        clean, style = self._encode_picture(t), t.reference_of
        if style.noise == "forward":
            return forward_pin(t, clean)
        config = self._components.scheduler_config
        return inverted_pin(t, clean, self.unet, self.text_encoder, config, style.inversion_guidance)

    def _encode_picture(self, t: Trajectory) -> torch.Tensor:
        """A reference picture, scaled to cover the size and cropped in the middle, as latents [channels, h, w]."""
        from PIL import ImageOps

        picture = ImageOps.fit(open_picture(t.picture), t.size)
        pixels = torch.frombuffer(bytearray(picture.tobytes()), dtype=torch.uint8)
        pixels = pixels.view(1, t.size[1], t.size[0], 3).permute(0, 3, 1, 2).float() / 127.5 - 1
        with torch.inference_mode():
            return vaes.encode(self.vae, pixels.to(self.unet.device))[0].float()

    @torch.inference_mode()
    def _decode(self, latents: Sequence[torch.Tensor]) -> list[torch.Tensor]:
        """[3, height, width] in 0..1 for each of `latents`, decoded in groups of equal size."""
        images: list[torch.Tensor] = []
        start = 0
        while start < len(latents):
            shape = latents[start].shape
            limit = max(1, DECODE_PIXELS // (shape[1] * shape[2] * self.downscale**2))
            stop = start + 1
            while stop < len(latents) and latents[stop].shape == shape and stop - start < limit:
                stop += 1
            images += list(vaes.decode(self.vae, torch.stack(list(latents[start:stop]))))
            start = stop
        return images

    def _metadata(self, requests: Sequence[Request]) -> list[dict]:
        record = to_record(requests)
        packages = ("torch", "diffusers", "transformers")
        versions = {"stylefast": stylefast.__version__, "python": platform.python_version()}
        versions |= {package: version(package) for package in packages}
        common = {
            "stylefast": stylefast.__version__,
            "model": self.name,
            "fingerprint": self.fingerprint,
            "device": str(self.unet.device),
            "dtype": str(self.unet.dtype).removeprefix("torch."),
            "versions": versions,
            "loras": self.loras.scales,
            "call": record,
        }
        return [{**common, "index": i, "seed": request.seed} for i, request in enumerate(requests)]


def _to_pil(image: torch.Tensor):
    from PIL import Image

    pixels = (image.clamp(0, 1) * 255).round().to(torch.uint8).permute(1, 2, 0).cpu().numpy()
    return Image.fromarray(pixels)


def _as_list(value) -> list:
    return [] if value is None else list(value) if isinstance(value, (list, tuple)) else [value]


def _device(name: str) -> torch.device:
    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        device = torch.device(name)
    except RuntimeError:
        raise InvalidRequest(f"device {name!r} is unknown; use 'auto', 'cpu' or 'cuda'") from None
    if device.type == "cuda" and not torch.cuda.is_available():
        raise InvalidRequest("device is 'cuda', but PyTorch finds no CUDA device; use 'cpu', or install a CUDA build")
    return device


def _dtype(name: str, device: str) -> torch.dtype | str:
    kinds = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
    if name == "auto":
        return "auto"
    if name not in kinds:
        raise InvalidRequest(f"dtype is {name!r}; there are auto, {', '.join(kinds)}")
    return kinds[name]
