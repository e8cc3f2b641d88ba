"""LoRA: low-rank changes to a loaded model's weights, W' = W + sum over LoRAs of scale * (alpha / rank) * B A.

diffusers and peft read the file (kohya's, diffusers' and peft's layouts, alphas, rank patterns); the change itself is
made here, in place, in the tensors that UNet and text encoders already share, so nothing is renamed or rebuilt. The
touched weights' originals are kept on the CPU: taking a LoRA off restores every bit.
"""

import hashlib
import math
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from pathlib import Path

import torch

from stylefast.errors import AdapterError, InvalidRequest, MissingDependency, ModelNotFound
from stylefast.models.weight_files import read_header, recognise

_PARTS = ("unet", "text_encoder", "text_encoder_2")
_NOT_PLAIN = ("hada_", "lokr_", "dora_scale", "lora_magnitude_vector")


@dataclass(frozen=True)
class LoraFactors:
    """One LoRA on one weight: delta = scaling * up @ down, in the weight's shape."""

    up: torch.Tensor  # [out, rank]
    down: torch.Tensor  # [rank, in (* kernel height * kernel width)]
    scaling: float  # alpha / rank, as the file says

    def delta(self, shape: torch.Size, device) -> torch.Tensor:
        """The full change in float32."""
        product = self.up.to(device, torch.float32) @ self.down.to(device, torch.float32)
        return (self.scaling * product).view(shape)


def _check_scale(scale) -> None:
    if isinstance(scale, bool) or not isinstance(scale, (int, float)) or not math.isfinite(scale):
        raise InvalidRequest(f"a LoRA's scale is {scale!r}; it must be a finite number")


class LoraSet:
    """The LoRAs on one model. Several may be applied; each keeps its own scale and can be changed or taken off alone.

    Weights are changed in place. A model made by `from_pipeline` shares them with its pipeline, which then changes too.
    `guard` gives a context manager in which weights may change; it may refuse by raising.
    """

    def __init__(
        self, unet_config, unet_state, text_encoders, guard: Callable[[], AbstractContextManager] = nullcontext
    ):
        self._guard = guard
        self._config = dict(unet_config)
        self._encoders = tuple(text_encoders)
        self._unet_state = unet_state
        states = (unet_state, *(encoder.state_dict() for encoder in self._encoders))
        self._weights = {part: dict(state) for part, state in zip(_PARTS, states)}
        self._originals: dict[tuple[str, str], torch.Tensor] = {}
        self._loras: dict[str, dict[tuple[str, str], LoraFactors]] = {}
        self._scales: dict[str, float] = {}
        self._digests: dict[str, str] = {}

    @property
    def scales(self) -> dict[str, float]:
        """Name -> scale of every LoRA that is on."""
        return dict(self._scales)

    @property
    def touched(self) -> tuple[str, ...]:
        """Names of all changed weights, with their part in front: "unet.down_blocks.1....to_q.weight"."""
        return tuple(sorted(f"{part}.{name}" for part, name in self._originals))

    @property
    def fingerprint(self) -> str:
        """Tells one combination of files and scales from another; empty if no LoRA is on."""
        parts = sorted(f"{self._digests[name]} {scale}" for name, scale in self._scales.items() if scale != 0)
        return hashlib.sha256("\n".join(parts).encode()).hexdigest() if parts else ""

    def add(self, source: str | Path, scale: float = 1.0, name: str | None = None) -> str:
        """Put a LoRA file (`.safetensors`, or a folder with one) on the model; gives back its name.

        Raises ModelNotFound, ModelFormatError, AdapterError if the file is no LoRA, fits other shapes, or touches
        layers that this model does not have.
        """
        file = _lora_file(source)
        name = name or file.stem
        _check_scale(scale)
        if name in self._loras:
            raise InvalidRequest(f"a LoRA named {name!r} is on already; set_scale() changes it, name= tells two apart")
        header = read_header(file)
        if recognise(header) != "LoRA":
            raise AdapterError(f"{file.name} is no LoRA but: {recognise(header)}")
        foreign = [key for key in header.tensors if any(mark in key for mark in _NOT_PLAIN)]
        if foreign:
            raise AdapterError(
                f"{file.name} is LoHa, LoKr or DoRA ({foreign[0]}), of which only plain LoRA is read; merge it into a "
                "checkpoint with the tool that made it"
            )
        factors, digest = self._factors(file), _digest(file)
        with self._guard():
            self._loras[name], self._digests[name], self._scales[name] = factors, digest, float(scale)
            self._rebuild(factors)
        return name

    def set_scale(self, name: str, scale: float) -> None:
        """Change the strength of a LoRA; 0 leaves the model as it was without it."""
        if name not in self._loras:
            raise InvalidRequest(f"no LoRA named {name!r} is on; there are: {', '.join(self._loras) or 'none'}")
        _check_scale(scale)
        with self._guard():
            self._scales[name] = float(scale)
            self._rebuild(self._loras[name])

    def remove(self, name: str) -> None:
        """Take a LoRA off; the weights are again, bit by bit, what they would be had it never been there."""
        self.set_scale(name, 0.0)
        self._loras.pop(name)
        self._scales.pop(name)
        self._digests.pop(name)

    def clear(self) -> None:
        """Take all off."""
        for name in list(self._loras):
            self.remove(name)

    @torch.no_grad()
    def _rebuild(self, keys) -> None:
        for key in keys:
            weight = self._weights[key[0]][key[1]]
            on = [(self._scales[n], lora[key]) for n, lora in self._loras.items() if key in lora and self._scales[n]]
            if key not in self._originals:
                if not on:
                    continue
                self._originals[key] = weight.detach().to("cpu", copy=True)
            original = self._originals[key]
            if not on:
                weight.copy_(original)
                del self._originals[key]
                continue
            # always from the original and in float32: adding and subtracting in place would drift
            total = original.to(weight.device, torch.float32)
            for scale, factors in on:
                total = total + scale * factors.delta(weight.shape, weight.device)
            weight.copy_(total)

    def _factors(self, file: Path) -> dict[tuple[str, str], LoraFactors]:
        """Let diffusers put the LoRA on throw-away skeletons that share our tensors, and read off what went where."""
        try:
            from peft.tuners.lora import LoraLayer
        except ImportError as error:
            raise MissingDependency("LoRA files need the package peft: pip install peft") from error
        from diffusers import StableDiffusionXLPipeline as Pipeline

        skeletons = self._skeletons()
        try:
            state, alphas, metadata = Pipeline.lora_state_dict(
                str(file.parent), weight_name=file.name, unet_config=skeletons["unet"].config, local_files_only=True,
                return_lora_metadata=True,
            )
            announced = {part: _pairs(state, part) for part in _PARTS}
            rest = {"network_alphas": alphas, "metadata": metadata, "adapter_name": "lora"}
            if announced["unet"]:
                Pipeline.load_lora_into_unet(state, unet=skeletons["unet"], **rest)
            for part in _PARTS[1:]:
                if announced[part]:
                    Pipeline.load_lora_into_text_encoder(state, text_encoder=skeletons[part], prefix=part, **rest)
        except (RuntimeError, ValueError, KeyError, IndexError, TypeError, AttributeError) as error:
            raise AdapterError(f"{file.name} does not fit this model: {_first_line(error)}; it was made for another "
                               "(Stable Diffusion 1 or 2?)") from error
        found = {}
        for part, skeleton in skeletons.items():
            matched = 0
            for name, module in skeleton.named_modules():
                if not isinstance(module, LoraLayer) or "lora" not in module.lora_A:
                    continue
                up, down = module.lora_B["lora"].weight.detach(), module.lora_A["lora"].weight.detach()
                if f"{name}.weight" not in self._weights[part]:
                    raise AdapterError(f"{file.name} changes {part}.{name}, which has no weight of its own here")
                matched += 1
                found[part, f"{name}.weight"] = LoraFactors(up.flatten(1).cpu(), down.flatten(1).cpu(),
                                                            float(module.scaling["lora"]))
            if matched < announced[part]:
                raise AdapterError(f"{file.name} changes {announced[part]} layers of {part}, of which this model has "
                                   f"{matched}; it was made for another model")
        if not found:
            raise AdapterError(f"{file.name} matches no layer of this model; it was made for another one")
        return found

    def _skeletons(self) -> dict[str, torch.nn.Module]:
        from diffusers import UNet2DConditionModel

        with torch.device("meta"):
            unet = UNet2DConditionModel.from_config(self._config)
            encoders = [type(encoder)(encoder.config) for encoder in self._encoders]
        skeletons = dict(zip(_PARTS, (unet, *encoders)))
        for part, skeleton in skeletons.items():
            skeleton.load_state_dict(self._weights[part], assign=True)
            for module in skeleton.modules():
                # never run, but peft moves whole modules about, which it can't with an empty buffer
                if getattr(module, "position_ids", None) is not None:
                    module.position_ids = torch.zeros(module.position_ids.shape, dtype=torch.long)
        return skeletons


def apply_lora(components, source: str | Path, scale: float = 1.0) -> LoraSet:
    """Put a LoRA on loaded `Components`; `.remove(name)` or `.clear()` on the result takes it off, `.add` adds more."""
    loras = LoraSet(components.unet_config, components.unet_state, components.text_encoders)
    loras.add(source, scale)
    return loras


def _lora_file(source: str | Path) -> Path:
    path = Path(source).expanduser()
    if path.is_dir():
        files = sorted(path.glob("*.safetensors"))
        if len(files) != 1:
            raise ModelNotFound(f"{path} holds {len(files)} .safetensors files; name the LoRA file itself")
        return files[0]
    if not path.is_file():
        raise ModelNotFound(f"no LoRA file at {path}; get one by `hf download <id> --local-dir loras`, give its path")
    return path


def _pairs(state, part: str) -> int:
    """How many layers of one part a LoRA's (already converted) tensors change."""
    marks = (".lora_A.", ".lora.down.", "_lora.down.", ".lora_linear_layer.down.")
    return sum(key.startswith(f"{part}.") and any(mark in key for mark in marks) for key in state)


def _digest(file: Path) -> str:
    digest = hashlib.sha256()
    with file.open("rb") as stream:
        while block := stream.read(2**20):
            digest.update(block)
    return digest.hexdigest()


def _first_line(error: Exception) -> str:
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return " ".join(lines[:2])[:300] if lines else type(error).__name__
