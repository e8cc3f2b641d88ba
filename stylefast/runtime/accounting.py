"""Memory held by an engine, in bytes, and the check against its limit."""

import time
from collections.abc import Iterable
from typing import Any
from weakref import WeakKeyDictionary

import torch

from stylefast.errors import OutOfMemory
from stylefast.models.packed import packed_bytes
from stylefast.models.vae_copies import copied_bytes
from stylefast.runtime.memory import resident_bytes, row_bytes

# recount the model's thousands of tensors only after this time, since the limit is checked at every step
_SECONDS = 2.0
_counted: WeakKeyDictionary[Any, tuple[float, int]] = WeakKeyDictionary()  # engine -> (time, model's bytes)


def memory_report(engine) -> dict[str, Any]:
    """Return the bytes held, by purpose.

    "model": UNet, text encoders, VAE (including packed weights and copies in other types), adapters. "banks": the pages
    of style banks on the device, per latent size with the pool's counts. "conditions": keys and values of prompts and
    pictures. "latents": pictures in progress. "graphs": memory prepared by the backend. "workspace": step tables, and a
    rough estimate of the peak of one row's feature maps at the native size. "held": the sum without that peak. "limit":
    the configured limit. "process": this process's resident memory, and on a GPU the memory reserved by PyTorch.
    """
    _counted.pop(engine, None)  # report current values
    runtime = engine.runtime
    width, height = engine.native_size
    device = engine.unet.device
    banks = {
        f"{size[1]}x{size[0]}": {"bytes": pool.nbytes, "host": pool.host_bytes, **pool.stats()._asdict()}
        for size, pool in list(runtime.bank_pages.items())
    }
    report = {
        "model": _model(engine),
        "banks": banks,
        "conditions": {
            "text": runtime.conditions.text.nbytes,
            "others": runtime.conditions.nbytes - runtime.conditions.text.nbytes,
        },
        "latents": sum(slots.nbytes for slots in list(runtime.latents.values())),
        "graphs": runtime.backend.nbytes,
        "workspace": {
            "tables": runtime.table_bytes(),
            "row": row_bytes(engine.unet, (height // engine.downscale, width // engine.downscale)),
        },
        "held": held_bytes(engine),
        "limit": engine.budget.limit,
        "process": {"resident": resident_bytes()},
    }
    if device.type == "cuda":
        report["process"]["reserved"] = torch.cuda.memory_reserved(device)
    return report


def held_bytes(engine) -> int:
    """Return the bytes that the engine keeps between steps; the model's part may be `_SECONDS` old."""
    runtime, now = engine.runtime, time.monotonic()
    counted, model = _counted.get(engine, (-_SECONDS, 0))
    if now - counted >= _SECONDS:
        model = sum(_model(engine).values())
        _counted[engine] = (now, model)
    return (
        model
        + sum(pool.nbytes for pool in list(runtime.bank_pages.values()))
        + runtime.conditions.nbytes
        + sum(slots.nbytes for slots in list(runtime.latents.values()))
        + runtime.backend.nbytes
        + runtime.table_bytes()
    )


def check_limit(engine) -> None:
    """Raise OutOfMemory if the model alone exceeds the limit; on a GPU, apply the limit to PyTorch as well."""
    held, limit, device = held_bytes(engine), engine.budget.limit, engine.unet.device
    if held > limit:
        raise OutOfMemory(
            f"the model takes {held / 2**30:.2f} GiB and memory_limit is {limit / 2**30:.2f} GiB; raise it, or "
            "load the model in half precision"
        )
    if device.type == "cuda":
        torch.cuda.set_per_process_memory_fraction(
            min(1.0, limit / torch.cuda.get_device_properties(device).total_memory), device
        )


def _model(engine) -> dict[str, int]:
    text = sum(_bytes(encoder) for encoder in engine.text_encoder.encoders)
    adapters = {id(part): part for pair in list(engine.adapters.values()) for part in pair}
    return {
        "unet": _bytes(engine.unet) + packed_bytes(engine.unet),
        "text_encoders": text,
        "vae": _bytes(engine.vae) + copied_bytes(engine.vae),
        "adapters": sum(_bytes(getattr(part, "vision_model", part)) for part in adapters.values()),
    }


def _bytes(module) -> int:
    if not isinstance(module, torch.nn.Module):
        return 0
    tensors: Iterable[torch.Tensor] = (*module.parameters(), *module.buffers())
    # tied weights count once
    return sum({t.data_ptr(): t.numel() * t.element_size() for t in tensors}.values())
