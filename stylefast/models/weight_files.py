"""Weight files on disk: what a `.safetensors` file holds, whether it is whole, and how much memory it will take.

Everything here reads the header alone (names, types, shapes), so that a wrong, cut or foreign file is refused with its
true name before a byte of it is loaded.
"""

import json
import os
import struct
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import torch

from stylefast.errors import ModelFormatError, ModelNotFound, OutOfMemory

PICKLED = (".ckpt", ".pt", ".pth", ".bin", ".pkl")
_HEADER_LIMIT = 100 * 2**20
_FOREIGN = (
    (b"<!DOCTYPE", "a web page; the download went to a login or error page"),
    (b"<!doctype", "a web page; the download went to a login or error page"),
    (b"<html", "a web page; the download went to a login or error page"),
    (b"version https://git-lfs", "a Git LFS pointer; run `git lfs pull` to get the file itself"),
    (b"PK\x03\x04", "a pickled PyTorch file (zip) under another name"),
    (b"\x80\x02", "a pickled PyTorch file under another name"),
    (b"GGUF", "a GGUF file"),
)


@dataclass(frozen=True)
class WeightHeader:
    """Names, dtypes and shapes of a `.safetensors` file, and its free-form metadata."""

    path: Path
    tensors: Mapping[str, tuple[str, tuple[int, ...]]]
    metadata: Mapping[str, str]

    def shape(self, name: str) -> tuple[int, ...]:
        """Shape of one tensor; raises ModelFormatError if the file does not hold it."""
        if name not in self.tensors:
            raise ModelFormatError(f"{self.path.name} lacks {name}; the file is incomplete or of another kind")
        return self.tensors[name][1]

    def has(self, prefix: str) -> bool:
        """Whether any tensor's name starts so."""
        return any(name.startswith(prefix) for name in self.tensors)

    def elements(self, prefix: str = "") -> int:
        """Number of values in all tensors whose name starts with `prefix`."""
        return sum(_product(shape) for name, (_, shape) in self.tensors.items() if name.startswith(prefix))


def read_header(path: str | Path) -> WeightHeader:
    """Read and check the header of a `.safetensors` file.

    Raises ModelNotFound if nothing is there, ModelFormatError if the file is a pickle, a web page, a Git LFS pointer,
    damaged or cut short.
    """
    path = Path(path)
    if not path.is_file():
        raise ModelNotFound(f"no file at {path}")
    if path.suffix in PICKLED:
        raise ModelFormatError(
            f"{path.name} is a pickled file, and opening one runs whatever code is in it; "
            "get the .safetensors edition, or convert it on a machine where you trust it"
        )
    size = path.stat().st_size
    with path.open("rb") as file:
        start = file.read(64)
        for mark, meaning in _FOREIGN:
            if start.startswith(mark):
                raise ModelFormatError(f"{path.name} is {meaning}, not safetensors")
        length = struct.unpack("<Q", start[:8])[0] if len(start) >= 8 else 0
        if not 2 <= length <= min(_HEADER_LIMIT, size - 8):
            raise ModelFormatError(
                f"{path.name} ({size} bytes) has no valid safetensors header; it is cut short or something else"
            )
        file.seek(8)
        raw = file.read(length)
    try:
        header = json.loads(raw)
        metadata = header.pop("__metadata__", {}) or {}
        tensors = {name: (entry["dtype"], tuple(entry["shape"])) for name, entry in header.items()}
        end = max((entry["data_offsets"][1] for entry in header.values()), default=0)
    except (ValueError, KeyError, TypeError, AttributeError, IndexError) as error:
        raise ModelFormatError(f"the header of {path.name} is damaged ({error}); fetch the file again") from error
    if size != 8 + length + end:
        raise ModelFormatError(
            f"{path.name} has {size} bytes where its header announces {8 + length + end}; fetch the file again"
        )
    return WeightHeader(path, tensors, metadata)


def load_weights(path: str | Path, *, dtype: torch.dtype, device, prefix: str = "") -> dict[str, torch.Tensor]:
    """Load all tensors whose name starts with `prefix`, floating ones cast to `dtype`; names are kept as they are."""
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(str(path), framework="pt", device=str(device)) as file:
            names = [name for name in file.keys() if name.startswith(prefix)]  # noqa: SIM118
            tensors = {name: file.get_tensor(name) for name in names}
    except (SafetensorError, OSError) as error:
        raise ModelFormatError(f"can't read {Path(path).name}: {error}; fetch the file again") from error
    return {name: t.to(dtype) if t.is_floating_point() else t for name, t in tensors.items()}


def recognise(header: WeightHeader) -> str:
    """Say in words what a weight file is, from its keys: "SDXL checkpoint", "LoRA", "IP-Adapter", ..."""
    names, text = header.tensors, " ".join(header.tensors)
    unet = "model.diffusion_model."
    if any(mark in text for mark in ("lora_down", "lora_up", "lora_A", "lora_B", ".lora.down", "hada_w1", "lokr_w")):
        return "LoRA"
    if header.has("ip_adapter.") or header.has("image_proj."):
        return "IP-Adapter"
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
    return f"file of unknown kind (first keys: {', '.join(sorted(names)[:3]) or 'none'})"


def available_memory(device) -> int | None:
    """Bytes free on `device`; None where the system does not tell."""
    device = torch.device(device)
    if device.type == "cuda":
        return torch.cuda.mem_get_info(device)[0]
    if device.type != "cpu":
        return None
    limits = [limit for limit in (_machine_memory(), _container_memory()) if limit is not None]
    return min(limits, default=None)


def require_memory(needed: int, device, what: str) -> None:
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
    """What a memory-limited container may still take; file pages it can drop count as free."""
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
    """Whether the user forbade network access through Hugging Face's environment variables."""
    values = (os.environ.get(name, "").lower() for name in ("HF_HUB_OFFLINE", "TRANSFORMERS_OFFLINE"))
    return any(value in ("1", "true", "yes", "on") for value in values)


def _product(shape) -> int:
    count = 1
    for size in shape:
        count *= size
    return count
