"""LoRA: removable changes to a loaded model's weights, W' = W + sum over LoRAs of scale * delta(W).

`lora_file` reads each weight's change from the file; this module applies it in place, in the tensors that UNet and text
encoders already share, so nothing is renamed or rebuilt. Originals of changed weights are kept on the CPU, so that
removing a LoRA restores every bit.
"""

import hashlib
from collections.abc import Callable, Iterable, Mapping
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path

import torch

from stylefast import values
from stylefast.errors import AdapterError, InvalidRequest
from stylefast.models.lora_changes import Change
from stylefast.models.lora_file import read_lora
from stylefast.models.lora_names import PARTS


def _checked_scale(scale) -> float:
    return values.real_number("a LoRA's scale", scale, -values.MAX_STRENGTH, values.MAX_STRENGTH)


class LoraSet:
    """The LoRAs on one model; several can be active, each with its own scale and removable on its own.

    Weights are changed in place. A model made by `from_pipeline` shares them with its pipeline, which then changes too.
    `guard` returns a context manager in which weights may change; it may raise to prevent that.
    """

    def __init__(
        self,
        unet_state: Mapping[str, torch.Tensor],
        text_encoders: Iterable[torch.nn.Module],
        guard: Callable[[], AbstractContextManager] = nullcontext,
    ):
        self._guard = guard
        states = (unet_state, *(encoder.state_dict() for encoder in text_encoders))
        self.weights = {part: dict(state) for part, state in zip(PARTS, states)}
        self._originals: dict[tuple[str, str], torch.Tensor] = {}
        self._loras: dict[str, Mapping[tuple[str, str], Change]] = {}
        self._scales: dict[str, float] = {}
        self._digests: dict[str, str] = {}

    @property
    def scales(self) -> dict[str, float]:
        """Return name -> scale of every active LoRA."""
        return dict(self._scales)

    @property
    def touched(self) -> tuple[str, ...]:
        """Return the names of all changed weights, prefixed by their part: "unet.down_blocks.1....to_q.weight"."""
        return tuple(sorted(f"{part}.{name}" for part, name in self._originals))

    @property
    def fingerprint(self) -> str:
        """Return a digest of the LoRAs' files and scales; empty if none is active or all scales are 0."""
        parts = sorted(f"{self._digests[name]} {scale}" for name, scale in self._scales.items() if scale != 0)
        return hashlib.sha256("\n".join(parts).encode()).hexdigest() if parts else ""

    def add(self, source: str | Path, scale: float = 1.0, name: str | None = None) -> str:
        """Apply a LoRA (a file, or a folder with one) to the model. Returns its name, by default the file's.

        Raises ModelNotFound, ModelFormatError for files that can't be read, AdapterError for files that are not a LoRA,
        have an unknown kind or layout, are made for other shapes, or are too strong for the weights' type, and
        InvalidRequest for a name that is taken. The model is then unchanged.
        """
        scale, path = _checked_scale(scale), values.path("a LoRA", source)
        if name is not None:
            values.text("the name of a LoRA", name, longest=values.QUOTED, empty=False)
        lora = read_lora(path, self.weights)
        name = lora.name if name is None else name
        if name in self._loras:
            raise InvalidRequest(
                f"a LoRA named {values.quoted(name)} is already loaded; use set_scale() to change it, or name= to load "
                "a second one"
            )
        with self._guard():
            self._loras[name], self._digests[name], self._scales[name] = lora.changes, lora.digest, scale
            self._rebuild(lora.changes, undo=lambda: self._forget(name))
        return name

    def set_scale(self, name: str, scale: float) -> None:
        """Set a LoRA's scale; 0 gives the model without it. Raises InvalidRequest, or AdapterError if too strong."""
        if not isinstance(name, str) or name not in self._loras:
            known = f"known LoRAs: {values.listed(self._loras)}{values.did_you_mean(name, self._loras)}"
            raise InvalidRequest(f"no LoRA named {values.quoted(name)} is loaded; {known}")
        scale, before = _checked_scale(scale), self._scales[name]
        with self._guard():
            self._scales[name] = scale
            self._rebuild(self._loras[name], undo=lambda: self._scales.update({name: before}))

    def remove(self, name: str) -> None:
        """Remove a LoRA; the weights become bit-identical to those without it. Raises as `set_scale` does."""
        self.set_scale(name, 0.0)
        self._forget(name)

    def clear(self) -> None:
        """Remove all LoRAs."""
        for name in list(self._loras):
            self.remove(name)

    def _forget(self, name: str) -> None:
        for table in (self._loras, self._scales, self._digests):
            table.pop(name)

    def _rebuild(self, keys: Iterable[tuple[str, str]], undo: Callable[[], None]) -> None:
        try:
            self._write(keys)
        except BaseException:
            # on any error, such as out of memory, undo so that no LoRA stays half applied
            undo()
            self._write(keys)
            raise

    @torch.no_grad()
    def _write(self, keys: Iterable[tuple[str, str]]) -> None:
        for key in keys:
            weight = self.weights[key[0]][key[1]]
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
            # start from the original, in float32: adding and subtracting in place would drift
            base = original.to(weight.device, torch.float32)
            total = base.clone()
            for scale, change in on:
                total += scale * change.delta(base)
            total = total.to(weight.dtype)
            if not torch.isfinite(total).all():
                raise AdapterError(
                    f"{'.'.join(key)} would not be finite in {weight.dtype} with the scales "
                    f"{values.listed(f'{name}: {scale:g}' for name, scale in self._scales.items())}; lower them"
                )
            weight.copy_(total)
