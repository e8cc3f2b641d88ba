"""Weight files on disk: content, completeness and memory needs of `.safetensors` files.

Only the header is read (names, types, shapes), so that wrong, truncated or foreign files are rejected, naming their
actual kind, before any weights are loaded.
"""

import os
import struct
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

import torch

from stylefast import values
from stylefast.errors import ModelFormatError, ModelNotFound, OutOfMemory

PICKLED = (".ckpt", ".pt", ".pth", ".bin", ".pkl")
_HEADER_LIMIT = 100 * 2**20
_MOST_AXES = 16
# bits per number
_BITS = {
    "BOOL": 8,
    "U8": 8,
    "I8": 8,
    "F8_E5M2": 8,
    "F8_E4M3": 8,
    "F8_E8M0": 8,
    "F8_E4M3FNUZ": 8,
    "F8_E5M2FNUZ": 8,
    "F4": 4,
    "F6_E2M3": 6,
    "F6_E3M2": 6,
    "I16": 16,
    "U16": 16,
    "F16": 16,
    "BF16": 16,
    "I32": 32,
    "U32": 32,
    "F32": 32,
    "C64": 64,
    "F64": 64,
    "I64": 64,
    "U64": 64,
}
_LORA = (
    "lora_down",
    "lora_up",
    "lora_A",
    "lora_B",
    ".lora.down",
    "_lora.down",
    "lora_linear_layer",
    "hada_w1",
    "lokr_w",
    ".w_norm",
    "dora_scale",
    "oft_blocks",
    "bundle_emb.",
)
_FOREIGN = (
    (b"<!DOCTYPE", "a web page; the download went to a login or error page"),
    (b"<!doctype", "a web page; the download went to a login or error page"),
    (b"<html", "a web page; the download went to a login or error page"),
    (b"version https://git-lfs", "a Git LFS pointer; run `git lfs pull` to get the file itself"),
    (b"PK\x03\x04", "a pickled PyTorch file (zip) under another name"),
    (b"\x80\x02", "a pickled PyTorch file under another name"),
    (b"GGUF", "a GGUF file (packed integers, for llama.cpp and similar)"),
)


@dataclass(frozen=True)
class WeightHeader:
    """Names, dtypes, shapes and offsets of a `.safetensors` file's tensors, and its free-form metadata."""

    path: Path
    tensors: Mapping[str, tuple[str, tuple[int, ...]]]
    metadata: Mapping[str, str]
    offsets: Mapping[str, int] = field(default_factory=dict)  # name -> byte offset in the file

    def shape(self, name: str) -> tuple[int, ...]:
        """Return the shape of one tensor. Raises ModelFormatError if the file lacks it."""
        if name not in self.tensors:
            raise ModelFormatError(f"{self.path.name} lacks {name}; the file is incomplete or of another kind")
        return self.tensors[name][1]

    def has(self, prefix: str) -> bool:
        """Return whether any tensor's name starts with `prefix`."""
        return any(name.startswith(prefix) for name in self.tensors)

    def elements(self) -> int:
        """Count the values in all tensors."""
        return sum(_product(shape) for _, shape in self.tensors.values())


def read_header(path: str | Path, *, any_ending: bool = False) -> WeightHeader:
    """Read and check the header of a `.safetensors` file; `any_ending`: also if the name has a pickle's ending.

    Raises ModelNotFound if the file doesn't exist, ModelFormatError if it is a pickle, a web page, a Git LFS pointer,
    damaged or truncated.
    """
    path = Path(path)
    if not os.path.isfile(path):
        raise ModelNotFound(f"no file at {values.shown_path(path)}")
    if path.suffix in PICKLED and not any_ending:
        raise ModelFormatError(
            f"{path.name} is a pickled file, and opening it would run any code in it; get the .safetensors edition, "
            "or convert it on a machine where you trust it"
        )
    try:
        file = path.open("rb")
    except OSError as error:
        raise ModelFormatError(f"can't read {path.name}: {error.strerror or error}") from error
    with file:
        size = os.fstat(file.fileno()).st_size
        start = file.read(64)
        length = struct.unpack("<Q", start[:8])[0] if len(start) >= 8 else 0
        fits = 2 <= length <= min(_HEADER_LIMIT, size - 8)
        # the length of a valid header may look like another format's magic bytes
        meaning = next((meaning for mark, meaning in _FOREIGN if start.startswith(mark)), None)
        if meaning is not None and not (fits and start[8:9] == b"{"):
            raise ModelFormatError(f"{path.name} is {meaning}, not safetensors")
        if not fits:
            raise ModelFormatError(
                f"{path.name} ({size} bytes) has no valid safetensors header; it is truncated or another kind of file"
            )
        file.seek(8)
        raw = file.read(length)
    return _parsed(path, raw, size)


def _parsed(path: Path, raw: bytes, size: int) -> WeightHeader:
    """Parse the header in `raw` of a file of `size` bytes. Raises ModelFormatError, also for overlaps and gaps."""
    damaged = f"the header of {path.name} is damaged"
    header = values.load_json(
        raw, f"{damaged}: it", kind=dict, error=ModelFormatError, largest=_HEADER_LIMIT, deepest=4
    )
    metadata = header.pop("__metadata__", None) or {}
    if not isinstance(metadata, dict) or not all(isinstance(value, str) for value in metadata.values()):
        raise ModelFormatError(f"{damaged}: its metadata is {values.quoted(metadata)}, not strings; download it again")
    tensors, places = {}, []
    for name, entry in header.items():
        values.text(f"{damaged}: the name of a tensor", name, error=ModelFormatError)
        shape, start, end = _checked_entry(damaged, name, entry)
        tensors[name] = entry["dtype"], shape
        places.append((start, end, name))
    expected = 0
    for start, end, name in sorted(places):
        if start != expected:
            raise ModelFormatError(
                f"{damaged}: {values.quoted(name)} begins at byte {start} where {expected} is expected, so tensors "
                "overlap or leave gaps; download the file again"
            )
        expected = end
    if size != 8 + len(raw) + expected:
        raise ModelFormatError(
            f"{path.name} has {size} bytes, but its header declares {8 + len(raw) + expected}; download the file again"
        )
    return WeightHeader(path, tensors, metadata, {name: 8 + len(raw) + start for start, _, name in places})


def _checked_entry(damaged: str, name: str, entry) -> tuple[tuple[int, ...], int, int]:
    """Return shape, first byte and end of one tensor. Raises ModelFormatError."""
    what = f"{damaged}: {values.quoted(name)}"
    found = values.mapping(what, entry, error=ModelFormatError)
    missing = [key for key in ("dtype", "shape", "data_offsets") if key not in found]
    if missing:
        raise ModelFormatError(f"{what} has no {missing[0]}; download the file again")
    kind = values.one_of(
        f"{what} has a type that safetensors does not know; dtype", found["dtype"], _BITS, error=ModelFormatError
    )
    sides = values.several(f"{what}: shape", found["shape"], most=_MOST_AXES, error=ModelFormatError)
    shape = tuple(values.whole_number(f"{what}: shape", side, 0, error=ModelFormatError) for side in sides)
    offsets = values.several(f"{what}: data_offsets", found["data_offsets"], least=2, most=2, error=ModelFormatError)
    start, end = (values.whole_number(f"{what}: data_offsets", one, 0, error=ModelFormatError) for one in offsets)
    if end - start != -(-_product(shape) * _BITS[kind] // 8):
        raise ModelFormatError(
            f"{what} of shape {values.quoted(list(shape))} in {kind} has {end - start} bytes; download the file again"
        )
    return shape, start, end


def recognise(header: WeightHeader) -> str:
    """Describe a weight file's kind, by its keys, in words: "SDXL checkpoint", "LoRA", "IP-Adapter", ..."""
    names, text = header.tensors, " ".join(header.tensors)
    unet = "model.diffusion_model."
    if header.has("ip_adapter.") or header.has("image_proj."):
        return "IP-Adapter"
    if any(mark in text for mark in _LORA):
        return "LoRA"
    if "double_blocks." in text:
        return "Flux checkpoint"
    if "joint_blocks." in text:
        return "Stable Diffusion 3 checkpoint"
    if header.has("control_model.") or "controlnet_cond_embedding." in text or "zero_convs." in text:
        return "ControlNet"
    if header.has(unet):
        if f"{unet}label_emb.0.0.weight" in names:
            refiner = header.has("conditioner.embedders.0.model.") and not header.has("conditioner.embedders.1.")
            return "SDXL refiner checkpoint" if refiner else "SDXL checkpoint"
        cross = {shape[1] for name, (_, shape) in names.items() if name.endswith("attn2.to_k.weight")}
        second = header.has("cond_stage_model.model.") or cross == {1024}
        return "Stable Diffusion 2 checkpoint" if second else "Stable Diffusion 1 checkpoint"
    if header.has("decoder.layers.") or "first_stage_model.decoder.layers." in text:
        return "tiny VAE"
    if "decoder.mid.block_1." in text or "decoder.mid_block.resnets." in text:
        return "VAE"
    if header.has("down_blocks.") and header.has("conv_in."):
        return "UNet in diffusers' layout, without the rest of its pipeline"
    if "vision_model." in text:
        return "image encoder"
    if "token_embedding.weight" in text:
        return "text encoder"
    if {"clip_l", "clip_g"} & set(names) or "emb_params" in names:
        return "textual-inversion embedding"
    return f"file of unknown kind (first keys: {values.listed(sorted(names)[:3])})"


def available_memory(device: torch.device | str) -> int | None:
    """Return the free bytes on `device`; None if unknown."""
    device = torch.device(device)
    if device.type == "cuda":
        return torch.cuda.mem_get_info(device)[0]
    if device.type != "cpu":
        return None
    limits = [limit for limit in (_machine_memory(), _container_memory()) if limit is not None]
    return min(limits, default=None)


def total_memory(device: torch.device | str) -> int | None:
    """Return the total bytes of `device`, used or not; None if unknown."""
    device = torch.device(device)
    if device.type == "cuda":
        return torch.cuda.mem_get_info(device)[1]
    return os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") if device.type == "cpu" else None


def require_memory(needed: int, device: torch.device | str, what: str) -> None:
    """Raise OutOfMemory, naming both figures, if `needed` bytes do not fit on `device`."""
    free = available_memory(device)
    if free is not None and needed > free:
        raise OutOfMemory(
            f"the weights of {what} take {needed / 1e9:.3g} GB and {device} has {free / 1e9:.3g} GB free; "
            "free memory, load with dtype='float16', or use a smaller model such as 'tiny'"
        )


def _machine_memory() -> int | None:
    try:
        lines = Path("/proc/meminfo").read_text().splitlines()
    except OSError:
        return None
    return next((int(line.split()[1]) * 1024 for line in lines if line.startswith("MemAvailable:")), None)


def _container_memory(root: str = "/sys/fs/cgroup") -> int | None:
    """Return the bytes left in a memory-limited container, counting droppable file pages as free; None: no limit."""
    try:
        limit = Path(root, "memory.max").read_text().strip()
        if limit == "max":
            return None
        used = int(Path(root, "memory.current").read_text())
        stat = dict(line.split() for line in Path(root, "memory.stat").read_text().splitlines())
    except (OSError, ValueError):
        return None
    return max(int(limit) - used + int(stat.get("inactive_file", 0)) + int(stat.get("active_file", 0)), 0)


def offline() -> bool:
    """Return whether Hugging Face's environment variables forbid network access."""
    values = (os.environ.get(name, "").lower() for name in ("HF_HUB_OFFLINE", "TRANSFORMERS_OFFLINE"))
    return any(value in ("1", "true", "yes", "on") for value in values)


def _product(shape) -> int:
    count = 1
    for size in shape:
        count *= size
    return count
