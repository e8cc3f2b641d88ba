"""Style banks: the features that a StyleAligned reference shares at every step, computed once and stored.

The reference never attends to its targets, so its keys, values and statistics depend only on the style, the model and
the schedule. `BankWriter` collects them step by step, `StyleBank` holds, saves and loads them, and `BankInfo` records
what they were made from, so that requests that don't fit are rejected.

A bank of keys and values, or of the hidden states they are projected from, holds per stored self-attention layer

    kv.{layer} [steps, branches, references, 2, tokens, heads, d]    or    hidden.{layer} [.., tokens, channels]
    mean.{layer}, variance.{layer} [steps, branches, references, 3, heads, d]     of queries, keys, values; fp32
    scale.{layer} [.., 2, heads, d] or [.., channels]      fp32, fp8 banks only: factor of the stored numbers

and also norm_mean.{i}, norm_variance.{i} [steps, branches, references, groups] of every group norm and the reference's
final latents [1, references, channels, h, w]. A bank of latents holds only latents
[steps + 1, references, channels, h, w], before every step and at the end: its reference runs again in each request.
"""

import itertools
import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from types import MappingProxyType
from typing import Any, NamedTuple

import torch
from torch import Tensor

from stylefast import values
from stylefast.errors import InvalidRequest, ModelFormatError, NumericsError, StyleError
from stylefast.models.stored_tensors import Span, StoredTensors
from stylefast.styles.bank_file import BankFile, bank_checksum, check_specs, read_bank, specs_of, write_bank
from stylefast.styles.bank_info import BankInfo
from stylefast.styles.bank_size import BankShapes, TensorSpec, bank_tensors

_FP8_MAX, _FP16_MAX = 448.0, 65504.0
# fields that a request can set; the rest is fixed when a bank is baked
_SETTINGS = ("steps", "scheduler", "size", "guidance", "negative_prompt", "negative_prompt_2")
_DIGESTS = {
    "schedule": "its schedule has other noise levels; bake the style again with this model and scheduler",
    "styles": "other styles were shared with the reference; bake it again with the styles of the request",
}
_ids = itertools.count(1)


class LayerFeatures(NamedTuple):
    """Features of one reference in one self-attention layer; those that a bank's store does not need may be None."""

    hidden: Tensor | None  # [tokens, channels], after the layer norm
    k: Tensor | None  # [tokens, heads, d]
    v: Tensor | None
    mean: Tensor  # [3, heads, d] fp32: over the tokens, of queries, keys, values
    variance: Tensor


class ReferenceFeatures(NamedTuple):
    """Features of one reference at one step in one branch."""

    layers: Mapping[int, LayerFeatures]
    norm_means: tuple[Tensor, ...]  # [groups] fp32 per group norm, module order
    norm_variances: tuple[Tensor, ...]
    norm_elements: tuple[int, ...]  # elements in one group's statistics


@dataclass(frozen=True, eq=False)
class StyleBank:
    """A finished bank. Treat `tensors` as read-only; in a loaded bank, each look-up reads from the file.

    Examples:
        >>> bank = engine.bake(sf.StyleAligned(prompt="a star in neon style"), steps=2)
        >>> bank.save("neon.bank").name
        'neon.bank'
        >>> bank = sf.StyleBank.load("neon.bank")
        >>> bank.settings
        {'steps': 2, 'scheduler': 'euler', 'size': (64, 64), 'guidance': 5.0, 'negative_prompt': ''}
    """

    info: BankInfo
    shapes: BankShapes
    tensors: Mapping[str, Tensor]
    path: Path | None = None
    checksum: str = ""  # as read from the file; "" for a bank that was not loaded from one
    id: int = field(default_factory=lambda: next(_ids), init=False)  # unique within the process

    @classmethod
    def load(cls, path: str | Path, verify: bool = True) -> "StyleBank":
        """Open a bank's file; its tensors are read on demand.

        Args:
            path: a file that `save` or `bake` wrote.
            verify: read the whole file once and compare its checksum.

        Raises StyleError if the file is missing, truncated, altered, of another format or not a bank, or if its tensors
        don't match its metadata.
        """
        values.flag("verify", verify, error=StyleError)
        path = values.path("a style bank", path, error=StyleError)
        metadata, checksum, tensors = read_bank(path)
        try:
            content = values.load_json(metadata, "it", kind=dict, error=ModelFormatError)
            info = BankInfo.from_json(content["bank"])
            shapes = BankShapes(**content["shapes"])
        except StyleError as error:
            raise StyleError(f"can't use the style bank {path}: {error}") from error
        except (ModelFormatError, ValueError, KeyError, TypeError, AttributeError) as error:
            raise StyleError(f"the metadata of the style bank {path} is damaged ({error}); bake it again") from error
        check_specs(tensors, _specs(info, shapes), str(path))
        if verify and bank_checksum(metadata, tensors) != checksum:
            raise StyleError(
                f"the style bank {path} was altered after it was written: its checksum does not match; "
                "copy it again or bake the style again"
            )
        return cls(info, shapes, tensors, path, checksum)

    def save(self, path: str | Path, overwrite: bool = True) -> Path:
        """Write the bank atomically as one safetensors file. Returns the path.

        Raises StyleError if the path can't be written, if it exists and `overwrite` is off, or if a bank loaded
        without verification turns out to be altered; OutOfMemory if the disk is too full.
        """

        def check(checksum: str):
            if self.checksum not in ("", checksum):
                raise StyleError(f"the style bank {self.path} was altered after it was written; bake the style again")

        return write_bank(path, _metadata(self.info, self.shapes), self.tensors, overwrite, check)

    def __deepcopy__(self, memo) -> "StyleBank":
        return self  # immutable

    def __reduce__(self):
        if self.path is not None:
            return StyleBank.load, (self.path,)
        return _rebuilt, (self.info, self.shapes, dict(self.tensors))

    @property
    def name(self) -> str:
        """Return the file's stem, else the reference's prompt, else the bank's number."""
        return self.path.stem if self.path is not None else self.info.prompt or f"bank {self.id}"

    @property
    def nbytes(self) -> int:
        """Return the bytes of all tensors."""
        return sum(spec.nbytes for spec in specs_of(self.tensors).values())

    def source(self, name: str, place: tuple[int, ...]) -> Tensor | Span:
        """Return a tensor at the leading indices `place`, or, for a loaded bank, its span in the file."""
        if isinstance(self.tensors, StoredTensors):
            return self.tensors.span(name, place)
        return self.tensors[name][place]

    @property
    def settings(self) -> dict:
        """Return the arguments of `Engine.generate` that a request must match."""
        found = {name: getattr(self.info, name) for name in _SETTINGS if getattr(self.info, name) is not None}
        usual = {"prompt_syntax": "plain", "clip_skip": 0}
        return found | {name: own for name, one in usual.items() if (own := getattr(self.info, name)) != one}

    def check_fits(self, **expected: Any) -> None:
        """Raise StyleError naming the first field of `BankInfo`, in its order, that differs from what is expected.

        A guidance of None in the bank fits every guidance. The bank may hold more branches and layers than expected,
        and a bank of latents fits all of them. `model` names the expected fingerprint, and `lora_names` the expected
        loras, in messages; names are not compared, since they depend on where the files are.
        """
        names = [entry.name for entry in fields(BankInfo)]
        unknown = sorted(set(expected) - set(names))
        if unknown:
            raise InvalidRequest(f"a style bank has no field {', '.join(unknown)}; its fields are {', '.join(names)}")
        for name in names:
            if name in expected and name not in ("model", "lora_names"):
                asked = expected[name]
                self._check_field(name, tuple(asked) if isinstance(asked, list) else asked, expected)

    def _check_field(self, name: str, asked, expected: Mapping[str, Any]) -> None:
        own, model = getattr(self.info, name), expected.get("model")
        if name in ("branches", "layers"):
            lacking = [one for one in asked if one not in own]
            if self.info.store != "latents" and lacking:
                raise StyleError(
                    f"the style bank {values.quoted(self.name)} has the {name} {values.listed(own)}, but the request "
                    f"also needs {values.listed(lacking)}; bake the style again with {name}={values.quoted(asked)}"
                )
            return
        if own == asked or (name in ("guidance", "guidance_rescale") and own is None):
            return
        bank = f"the style bank {values.quoted(self.name)}"
        if name == "loras":
            raise StyleError(
                f"{bank} was baked under {_under(own, self.info.lora_names)}, but the request is under "
                f"{_under(asked, expected.get('lora_names', ()))}; give the request the same loras, or bake the style "
                "again under its own"
            )
        if name == "fingerprint" and own.split("+")[0] == str(asked).split("+")[0]:
            raise StyleError(
                f"{bank} was baked with {'other LoRAs' if '+' in own else 'no LoRA'} on the model; load the same "
                "LoRAs with the same strengths, or bake the style again"
            )
        if name == "fingerprint":
            raise StyleError(
                f"{bank} was baked with the model {values.quoted(self.info.model)} (fingerprint {own[:12]}), but the "
                f"loaded one is {values.quoted(model or 'another')} ({str(asked)[:12]}); bake the style again with it, "
                f"or load {values.quoted(self.info.model)}"
            )
        if name in _DIGESTS:
            raise StyleError(
                f"{bank} does not fit: {name} is {own[:12] or 'none'} in the bank and {str(asked)[:12] or 'none'} "
                f"here, {_DIGESTS[name]}"
            )
        raise StyleError(
            f"{bank} was baked with {name}={values.quoted(own)}, but {name}={values.quoted(asked)} is requested; bake "
            f"the style again with {name}={values.quoted(asked)}, or request {name}={values.quoted(own)}"
        )


def _rebuilt(info: BankInfo, shapes: BankShapes, tensors: dict[str, Tensor]) -> StyleBank:
    return StyleBank(info, shapes, MappingProxyType(tensors))


class BankWriter:
    """Collector of a reference's features into a bank, in memory or, given a `path`, directly in its file.

        with BankWriter(info, shapes, "brand.bank") as writer:
            writer.put(step, "full", 0, features)       # every step, branch and reference, in any order
            writer.put_latents(step, 0, latents)
            bank = writer.finish()

    Leaving the block without `finish` removes the partial file. Raises StyleError if the path can't be written or,
    with overwrite=False, exists; OutOfMemory if the disk is too full.
    """

    def __init__(self, info: BankInfo, shapes: BankShapes, path: str | Path | None = None, overwrite: bool = True):
        self.info, self.shapes = info, shapes
        specs = _specs(info, shapes)
        self._file = BankFile(path, specs, _metadata(info, shapes), overwrite) if path is not None else None
        self._tensors = (
            self._file.tensors
            if self._file is not None
            else {name: torch.empty(spec.shape, dtype=spec.dtype) for name, spec in specs.items()}
        )
        latents_from = 0 if info.store == "latents" else info.steps
        self._awaited = set(itertools.product(range(latents_from, info.steps + 1), range(info.references)))
        if info.store != "latents":
            self._awaited |= set(itertools.product(range(info.steps), info.branches, range(info.references)))

    def __enter__(self) -> "BankWriter":
        return self

    def __exit__(self, *_) -> None:
        self._tensors = {}
        if self._file is not None:
            self._file.discard()

    def put(self, step: int, branch: str, reference: int, features: ReferenceFeatures) -> None:
        """Store the features of `reference` at `step` in `branch`, replacing earlier ones.

        All tensors must be on one device; layers that the bank does not store are ignored. Raises NumericsError for
        NaN or infinity, StyleError for an index outside the bank, shapes that don't fit, or, in a float16 bank,
        numbers beyond float16.
        """
        if self.info.store == "latents":
            raise StyleError("a bank of latents stores no features; bake with store='kv' or 'hidden'")
        self._check_open()
        if branch not in self.info.branches or not (0 <= step < self.info.steps):
            raise StyleError(
                f"step {step}, branch {values.quoted(branch)} is outside the bank's {self.info.steps} steps "
                f"and branches {values.listed(self.info.branches)}"
            )
        self._check_reference(reference)
        where = (step, self.info.branches.index(branch), reference)
        stored = {layer: self._stored(layer, features) for layer in self.info.layers}
        self._check_norms(features)
        self._check_numbers(f"step {step}, branch {values.quoted(branch)}, reference {reference}", stored, features)
        for layer, content in stored.items():
            self._write(layer, where, content)
            self._tensors[f"mean.{layer}"][where].copy_(features.layers[layer].mean)
            self._tensors[f"variance.{layer}"][where].copy_(features.layers[layer].variance)
        for i in range(len(self.shapes.groups)):
            self._tensors[f"norm_mean.{i}"][where].copy_(features.norm_means[i])
            self._tensors[f"norm_variance.{i}"][where].copy_(features.norm_variances[i])
        self._awaited.discard((step, branch, reference))

    def put_latents(self, step: int, reference: int, latents: Tensor) -> None:
        """Store a reference's latents [channels, h, w] before `step`; `step` == steps stores the final latents.

        Banks of features hold only the final latents. Raises StyleError for another step or shape, NumericsError for
        NaN or infinity.
        """
        self._check_open()
        first, last = (0 if self.info.store == "latents" else self.info.steps), self.info.steps
        if not first <= step <= last:
            held = f"{first} to {last}" if first < last else f"{last} (the end) only"
            raise StyleError(
                f"latents of step {step}: a bank with store={values.quoted(self.info.store)} holds step {held}"
            )
        self._check_reference(reference)
        self._shaped(f"latents of step {step}", latents, self.shapes.latents)
        if not torch.isfinite(latents).all():
            raise NumericsError(
                f"the reference's latents contain NaN or infinity at step {step}; bake in another type{self._weaker}"
            )
        self._tensors["latents"][step - first, reference].copy_(latents)
        self._awaited.discard((step, reference))

    def finish(self) -> StyleBank:
        """Check that no entry is missing, publish the file if any, and return the bank. Raises StyleError."""
        self._check_open()
        if self._awaited:
            step, *branch, reference = min(self._awaited, key=lambda entry: (len(entry), entry))
            what = f"step {step}, branch {values.quoted(branch[0])}" if branch else f"the latents of step {step}"
            raise StyleError(
                f"the bank is incomplete: {len(self._awaited)} entries are missing, including {what}, "
                f"reference {reference}"
            )
        if self._file is None:
            tensors, self._tensors = self._tensors, {}
            return StyleBank(self.info, self.shapes, MappingProxyType(tensors))
        checksum = bank_checksum(_metadata(self.info, self.shapes), self._tensors)
        self._tensors = {}
        return StyleBank.load(self._file.publish(checksum), verify=False)

    def _check_open(self) -> None:
        if not self._tensors:
            raise StyleError("this bank is finished; bake another one with a new BankWriter")

    def _check_reference(self, reference: int) -> None:
        if not 0 <= reference < self.info.references:
            raise StyleError(f"reference {reference} is outside the bank's {self.info.references} references")

    def _shaped(self, what: str, tensor: Tensor | None, shape: tuple[int, ...]) -> Tensor:
        """Return a tensor of this shape. Raises StyleError for another shape, and for None."""
        if tensor is None or tuple(tensor.shape) != shape:
            found = None if tensor is None else tuple(tensor.shape)
            raise StyleError(f"{what} has the shape {found}; this bank needs {shape}")
        return tensor

    def _stored(self, layer: int, features: ReferenceFeatures) -> tuple[Tensor, ...]:
        """Return one layer's tensors to store: (keys, values) or (hidden states,). Raises StyleError for bad shapes."""
        if layer not in features.layers:
            raise StyleError(f"the features lack self-attention layer {layer}, which the bank stores")
        found, shape = features.layers[layer], self.shapes.layers[layer]
        for name in ("mean", "variance"):
            self._shaped(f"{name} of layer {layer}", getattr(found, name), (3, shape.heads, shape.d))
        if self.info.store == "hidden":
            return (self._shaped(f"hidden of layer {layer}", found.hidden, (shape.tokens, shape.channels)),)
        k = self._shaped(f"k of layer {layer}", found.k, tuple(shape))
        return k, self._shaped(f"v of layer {layer}", found.v, tuple(shape))

    def _check_norms(self, features: ReferenceFeatures) -> None:
        for name in ("norm_means", "norm_variances"):
            statistics = getattr(features, name)
            if len(statistics) != len(self.shapes.groups):
                raise StyleError(f"{name} has {len(statistics)} entries; the model has {len(self.shapes.groups)} norms")
            for i, groups in enumerate(self.shapes.groups):
                self._shaped(f"{name}[{i}]", statistics[i], (groups,))
        if tuple(features.norm_elements) != self.shapes.norm_elements:
            raise StyleError(
                f"norm_elements are {tuple(features.norm_elements)}; this bank needs {self.shapes.norm_elements}, "
                f"for {self.info.size[0]}x{self.info.size[1]} pixels"
            )

    @property
    def _weaker(self) -> str:
        return f", or with weaker LoRAs ({values.listed(self.info.lora_names)})" if self.info.lora_names else ""

    def _check_numbers(self, place: str, stored: Mapping[int, tuple[Tensor, ...]], features: ReferenceFeatures) -> None:
        checked = [(f"layer {layer}", x, True) for layer, content in stored.items() for x in content]
        for layer in stored:
            found = features.layers[layer]
            checked += [(f"layer {layer}", found.mean, False), (f"layer {layer}", found.variance, False)]
        for i, pair in enumerate(zip(features.norm_means, features.norm_variances, strict=True)):
            checked += [(f"group norm {i}", x, False) for x in pair]
        # one transfer for all peaks, since each device-to-host read synchronises with the GPU
        peaks = torch.stack([x.abs().amax().float() for _, x, _ in checked]).tolist()
        for (what, _, narrowed), peak in zip(checked, peaks, strict=True):
            if not math.isfinite(peak):
                raise NumericsError(
                    f"the reference's features contain NaN or infinity at {place}, {what}; bake with a model in "
                    f"bfloat16 or float32{self._weaker}"
                )
            if narrowed and self.info.dtype == "float16" and peak > _FP16_MAX:
                raise StyleError(
                    f"{what} reaches {peak:.6g} at {place}, beyond float16's {_FP16_MAX:.0f}; use bfloat16"
                )

    def _write(self, layer: int, where: tuple[int, int, int], content: tuple[Tensor, ...]) -> None:
        target = self._tensors[f"{self.info.store}.{layer}"][where]
        scales = self._tensors[f"scale.{layer}"][where] if self.info.dtype == "float8_e4m3fn" else None
        for i, x in enumerate(content):
            # hidden states [tokens, channels] fill the page; keys and values [tokens, heads, d] fill half of it each
            part = i if self.info.store == "kv" else slice(None)
            if scales is not None:
                x = x.float()
                scale = _fp8_scale(x)
                scales[part].copy_(scale)
                x = x / scale
            target[part].copy_(x.to(target.dtype))


def _fp8_scale(x: Tensor) -> Tensor:
    """Return max |x| / 448 over the tokens per channel, or 1 where that is zero or subnormal."""
    scale = x.abs().amax(0) / _FP8_MAX
    return torch.where(scale >= torch.finfo(torch.float32).tiny, scale, 1.0)


def _specs(info: BankInfo, shapes: BankShapes) -> dict[str, TensorSpec]:
    return bank_tensors(
        shapes,
        steps=info.steps,
        branches=len(info.branches),
        references=info.references,
        store=info.store,
        dtype=info.dtype,
        layers=info.layers,
    )


def _metadata(info: BankInfo, shapes: BankShapes) -> str:
    return json.dumps({"bank": info.to_json(), "shapes": asdict(shapes)})


def _under(loras: str, names: Sequence[str]) -> str:
    return f"the LoRAs {values.listed(sorted(names) or [loras])}" if loras else "no LoRA"
