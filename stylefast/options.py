"""Options of an engine: the one list behind `Engine`, the command line and the documentation."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, fields, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeAlias

from stylefast import values
from stylefast.errors import InvalidRequest

if TYPE_CHECKING:
    import torch

    from stylefast.models.unet import UNet
    from stylefast.runtime.backends.base import Backend

    Part: TypeAlias = str | Path | torch.nn.Module

# backends that run the output of `stylefast export` -> kind of export
EXPORTED = {"onnxruntime": "onnx", "tensorrt": "tensorrt", "aoti": "aoti"}
BACKENDS = ("auto", "torch", "compile", *EXPORTED)
PREDICTION_TYPES = ("epsilon", "v_prediction")
# options that are memory sizes
SIZES = ("memory_limit", "bank_memory", "host_memory", "lora_memory", "lora_host_memory")
_MOST_BUCKETS, _MOST_CHUNKS = 64, 256
_MOST_BYTES = 2**60
_UNITS = {"": 1, "b": 1, "kb": 10**3, "mb": 10**6, "gb": 10**9, "kib": 2**10, "mib": 2**20, "gib": 2**30}


def _option(
    default: Any, text: str, flag: str | None = None, choices: Sequence[str] | None = None, loading: bool = False
) -> Any:
    """Declare an option.

    text: its description, in the documentation and in the command line's help. flag: what the command line calls its
    value; None: not an option there. choices: its values on the command line. loading: whether it says what to load,
    and so means nothing for a pipeline that is already loaded.
    """
    return field(default=default, metadata={"text": text, "flag": flag, "choices": choices, "loading": loading})


@dataclass(frozen=True, kw_only=True)
class EngineOptions:
    """Options of `Engine.from_pretrained` and `Engine.from_pipeline`.

    Memory sizes become bytes, and row counts a tuple. Raises InvalidRequest for a value that an option can't have.

    Examples:
        >>> options = sf.EngineOptions(bank_memory="1.5GB", batch_buckets=[2, 4, 8])
        >>> options.bank_memory, options.batch_buckets
        (1500000000, (2, 4, 8))
        >>> engine = sf.Engine.from_pretrained("tiny", options)
    """

    adapter: str | Path | Sequence[str | Path] | None = _option(
        "auto",
        "IP-Adapter file; auto: those in the model's folder. In Python also several, or None for none",
        "FILE",
        None,
        True,
    )
    image_encoder: str | Path | None = _option(
        None, "folder of the CLIP image encoder of `adapter`, by default the model's own", "DIR", None, True
    )
    vae: Part | None = _option(
        None, "VAE to use instead of the model's own: folder, file, hub id, module", "NAME", None, True
    )
    prediction_type: str | None = _option(
        None,
        "what the UNet predicts, for checkpoints that don't declare it or declare it wrongly",
        "NAME",
        PREDICTION_TYPES,
    )
    device: str | torch.device = _option(
        "auto", "auto (CUDA if there is a GPU), cpu, cuda or cuda:1", "NAME", None, True
    )
    dtype: str | torch.dtype = _option(
        "auto", "auto (float32 on the CPU, float16 on a GPU), float32, bfloat16 or float16", "NAME", None, True
    )
    backend: str | Backend | Callable[[UNet], Backend] = _option(
        "auto",
        "what runs the steps: torch (auto), compile, or an export (onnxruntime, tensorrt, aoti). In Python also a "
        "`runtime.backends.base.Backend`, or a function of the UNet that returns one",
        "NAME",
        BACKENDS,
    )
    engines: str | Path | None = _option(
        None,
        "folder of the export that `backend` runs; without it, onnxruntime and aoti export the model once into the "
        "cache folder, which takes minutes",
        "FOLDER",
    )
    trust: str | None = _option(
        None,
        "digest printed by `stylefast export`, to run engines from elsewhere, which are code",
        "DIGEST",
    )
    memory_limit: int | str | None = _option(
        None, "bytes (8GB) for everything the engine holds on its device, including the model", "BYTES"
    )
    bank_memory: int | str | None = _option(
        None, "bytes for the pages of style banks on the device, by default a share of the free memory", "BYTES"
    )
    host_memory: int | str | None = _option(
        None, "bytes of pinned memory for pages being copied to a GPU, by default a quarter of the free memory", "BYTES"
    )
    lora_memory: int | str | None = _option(
        None, "bytes for the LoRAs of requests on the device, by default as many as fit", "BYTES"
    )
    lora_host_memory: int | str | None = _option(
        None,
        "bytes of host memory for registered LoRAs; beyond it the least recently used are read again from their files",
        "BYTES",
    )
    max_batch_rows: int | None = _option(
        None, "max rows of one UNet call, two per picture with guidance; a larger group runs alone"
    )
    max_pending: int | None = _option(None, "max waiting jobs before QueueFull; None: no limit")
    max_text_chunks: int = _option(
        16, "chunks of 75 tokens that a prompt may have, up to 256; keys and values of text take memory for each", "N"
    )
    batch_buckets: Sequence[int] = _option(
        (),
        ("row counts that batches are padded to; within a bucket a picture's bits don't depend on the other pictures"),
    )
    pack_weights: bool = _option(
        True,
        "whether a CPU keeps a copy of the UNet's weights in oneDNN's order, which makes steps faster and takes as "
        "much memory again",
    )
    preview: Part | None = _option(
        None, "AutoencoderTiny (module, folder, file, hub id) for previews of jobs; None: a linear map"
    )

    def __post_init__(self):
        checked: dict[str, Any] = {name: parse_bytes(name, getattr(self, name)) for name in SIZES}
        checked["batch_buckets"] = _buckets(self.batch_buckets)
        for name in ("max_batch_rows", "max_pending"):
            value = getattr(self, name)
            checked[name] = None if value is None else values.whole_number(name, value, 1)
        checked["pack_weights"] = values.flag("pack_weights", self.pack_weights)
        checked["max_text_chunks"] = values.whole_number("max_text_chunks", self.max_text_chunks, 1, _MOST_CHUNKS)
        if self.prediction_type is not None:
            values.one_of("prediction_type", self.prediction_type, PREDICTION_TYPES)
        for name, value in checked.items():
            object.__setattr__(self, name, value)

    @classmethod
    def of(cls, options: EngineOptions | None, given: Mapping[str, Any]) -> tuple[EngineOptions, dict[str, Any]]:
        """Return options with those in `given` changed, and the rest of `given`. Raises InvalidRequest."""
        if options is not None and not isinstance(options, cls):
            raise InvalidRequest(
                f"options is {values.quoted(options)}; give EngineOptions(...), or the options by name: device='cpu'"
            )
        ours = {name: value for name, value in given.items() if name in NAMES}
        return replace(options or cls(), **ours), {name: value for name, value in given.items() if name not in ours}

    def loading(self) -> dict[str, Any]:
        """Return the options that say what to load and differ from their defaults."""
        return {
            f.name: getattr(self, f.name)
            for f in fields(self)
            if f.metadata["loading"] and getattr(self, f.name) is not f.default
        }


NAMES = tuple(f.name for f in fields(EngineOptions))
# those that mean something for a model that is already loaded
OF_LOADED = tuple(f.name for f in fields(EngineOptions) if not f.metadata["loading"])
# of options on the command line: metavar, choices and help
FLAGS = {f.name: f.metadata for f in fields(EngineOptions) if f.metadata["flag"]}


def parse_bytes(what: str, value: int | str | None) -> int | None:
    """Return the bytes of "8GB", "512 MiB" or a number; None stays None. Raises InvalidRequest."""
    if value is None:
        return None
    if isinstance(value, str):
        text = str.__str__(value).strip().lower().replace(" ", "")
        digits = text.rstrip("kmgib")
        try:
            count = float(digits) * _UNITS[text[len(digits) :]]
        except (ValueError, KeyError):
            count = -1
        if 0 < count < _MOST_BYTES:
            return int(count)
    try:
        return int(values.real_number(what, value, above=0, high=_MOST_BYTES))
    except InvalidRequest:
        raise InvalidRequest(
            f"{what} is {values.quoted(value)}; give bytes as a number above 0, or as text: '8GB', '512MiB'"
        ) from None


def _buckets(given: Any) -> tuple[int, ...]:
    """Return the row counts to which batches are padded, ascending. Raises InvalidRequest."""
    several = values.entries(given)
    given = several if several is not None else [] if given is None else [given]
    buckets = tuple(values.whole_number("batch_buckets", one, 1) for one in given[: _MOST_BUCKETS + 1])
    if list(buckets) != sorted(set(buckets)) or len(buckets) > _MOST_BUCKETS:
        raise InvalidRequest(
            f"batch_buckets is {values.quoted(given)}; give at most {_MOST_BUCKETS} ascending row counts such as "
            "(2, 4, 8, 16), or none"
        )
    return buckets
