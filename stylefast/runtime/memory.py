"""Memory available for batches and style bank pages, checked before it is used.

A CUDA out-of-memory error can be caught and retried; the Linux out-of-memory killer gives no such chance. So the rows
of a batch are counted beforehand, and the user's limit is divided here. `memory_report` lists what an engine holds.
"""

import ctypes
import os
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from functools import cache
from typing import TYPE_CHECKING, Any, Protocol
from weakref import WeakKeyDictionary

import torch

from stylefast.errors import OutOfMemory
from stylefast.models.prepacked import packed_bytes, unfolds
from stylefast.models.unet import UNet
from stylefast.models.vae_copies import copied_bytes
from stylefast.models.weight_files import available_memory, total_memory
from stylefast.runtime.banks.page_pool import PageLayout
from stylefast.values import quoted

if TYPE_CHECKING:
    from stylefast.engine import Engine

# peak of live feature maps, in units of one map at the finest level; measured with SDXL's layout at 128x128 latents,
# fp32 on a CPU: resident memory rose by 27
_LIVE_MAPS = 40
# the 3x3 convolution after the finest level's concatenation: nine values for each of its three maps
_UNFOLDED_MAPS = 27
# share of free memory for bank pages without a limit
_BANK_SHARE = {"cpu": 0.2, "cuda": 0.4}
_MOST_SLOTS = 512
_HOST_SHARE = 0.25
# recount the model's thousands of tensors only after this time, since the limit is checked at every step
_SECONDS = 2.0
_counted: WeakKeyDictionary[Any, tuple[float, int]] = WeakKeyDictionary()  # engine -> (time, model's bytes)


class HasBytes(Protocol):
    """An object that knows its size."""

    @property
    def nbytes(self) -> int: ...


class MemoryBudget:
    """Limits on memory use.

    limit: bytes for everything that the engine holds on its device, including the model; None: the device's memory.
    banks: bytes for pages of style banks, at most half of what a limit leaves; None: a share of what is left.
    host: bytes of pinned host memory for pages being copied to a GPU; None: a quarter of the free memory. Unused on
    CPUs.
    """

    def __init__(self, limit: int | None = None, banks: int | None = None, host: int | None = None):
        self.limit, self.banks, self.host = limit, banks, host
        self._held = lambda: 0

    def watch(self, held: Callable[[], int]) -> None:
        """Set the function that counts the bytes that the engine holds now; needed to enforce a limit."""
        self._held = held

    def free(self, device: torch.device) -> int | None:
        """Return the available bytes; None if unknown, or on a GPU without a limit, where errors can be caught."""
        found = available_memory(device) if device.type == "cpu" else None
        if self.limit is None:
            return found
        left = max(0, self.limit - self._held())
        return left if found is None else min(found, left)

    def rows(self, unet: UNet, latent_size: tuple[int, int]) -> int:
        """Return the estimated number of rows of one UNet call that fit; at least 0."""
        free = self.free(unet.device)
        return 2**20 if free is None else int(free // row_bytes(unet, latent_size))

    def check(self, unet: UNet, rows: int, latent_size: tuple[int, int]) -> None:
        """Raise OutOfMemory if one UNet call of `rows` rows at (height, width) latents is estimated not to fit."""
        needed, free = rows * row_bytes(unet, latent_size), self.free(unet.device)
        if free is not None and needed > free:
            height, width = latent_size
            limit = "" if self.limit is None else f" of the limit of {self.limit / 2**30:.1f} GiB"
            raise OutOfMemory(
                f"a batch of {rows} rows at {width}x{height} latents needs about {needed / 2**30:.1f} GiB, but only "
                f"{free / 2**30:.1f} GiB{limit} are free; ask for fewer or smaller pictures at once"
            )

    def check_texts(self, device: torch.device, needed: int) -> None:
        """Raise OutOfMemory if keys and values of texts, in new buffers of `needed` bytes, are estimated not to fit."""
        free = self.free(device)
        if free is not None and needed > free:
            limit = "" if self.limit is None else f" of the limit of {self.limit / 2**30:.1f} GiB"
            raise OutOfMemory(
                f"keys and values of the prompts need {needed / 2**20:.0f} MiB, but only {free / 2**20:.0f} MiB{limit} "
                "are free; shorten the longest prompt, or ask for fewer prompts at once"
            )

    def check_network(self, device: torch.device, name: str, needed: int) -> None:
        """Raise OutOfMemory if a control network of `needed` bytes does not fit below the limit."""
        free = None if self.limit is None else self.free(device)
        if free is not None and needed > free:
            raise OutOfMemory(
                f"the control network {quoted(name)} takes {needed / 2**20:.0f} MiB, but only {free / 2**20:.0f} MiB "
                f"of the limit of {(self.limit or 0) / 2**30:.1f} GiB are free; raise memory_limit, or remove another "
                "network"
            )

    def check_ever(self, unet: UNet, rows: int, latent_size: tuple[int, int], texts: int = 0) -> None:
        """Raise OutOfMemory if such a call can't fit even with all other work finished.

        texts: bytes of the keys and values of its prompts.
        """
        most = total_memory(unet.device) if self.limit is None else self.limit
        needed = rows * row_bytes(unet, latent_size)
        if most is not None and needed + texts > most >= needed:
            raise OutOfMemory(
                f"keys and values of the request's longest prompt need {texts / 2**20:.0f} MiB in addition to its "
                f"batch, and the limit is {most / 2**30:.1f} GiB; shorten it"
            )
        if most is not None and needed > most:
            height, width = latent_size
            what = f"{unet.device} has" if self.limit is None else "the limit is"
            raise OutOfMemory(
                f"a batch of {rows} rows at {width}x{height} latents needs about {needed / 2**30:.1f} GiB, and {what} "
                f"{most / 2**30:.1f} GiB; ask for a smaller picture, or fewer that depend on one another"
            )

    def bank_slots(
        self, unet: UNet, latent_size: tuple[int, int], others: Iterable[HasBytes] = (), own: int = 0
    ) -> int:
        """Return the number of bank pages that one size's pool may hold, given the pools of other sizes.

        own: bytes of the pool that is replaced.
        Raises OutOfMemory if not even one fits.
        """
        page, taken = PageLayout(unet, latent_size, unet.dtype).nbytes, sum(pool.nbytes for pool in others)
        free = self.free(unet.device)
        free = None if free is None else free + own
        if self.banks is not None:
            room = self.banks - taken
            # the limit covers everything, and half of what it leaves is for batches
            room = room if free is None or self.limit is None else min(room, free // 2)
        else:
            if free is None and (found := available_memory(unet.device)) is not None:
                free = found + own
            room = int((free if free is not None else 2**31) * _BANK_SHARE.get(unet.device.type, 0.2))
        slots = min(room // page, _MOST_SLOTS)
        if slots < 1:
            raise OutOfMemory(
                f"one page of a style bank takes {page / 2**20:.1f} MiB at {latent_size[1]}x{latent_size[0]} latents "
                f"and {max(room, 0) / 2**20:.1f} MiB are left for them; raise bank_memory or memory_limit"
            )
        return int(slots)

    def host_room(self, device: torch.device, others: int = 0) -> int:
        """Return the bytes for one size's pinned tier; `others`: bytes of the tiers of other sizes."""
        if device.type != "cuda":
            return 0
        free = available_memory("cpu")
        room = self.host if self.host is not None else int(_HOST_SHARE * free) if free is not None else 2**32
        return max(0, room - others)


def row_bytes(unet: UNet, latent_size: tuple[int, int]) -> int:
    """Estimate the peak bytes of one row's feature maps in a UNet call."""
    height, width = latent_size
    bytes_per_value = torch.finfo(unet.dtype).bits // 8
    maps = _LIVE_MAPS + (_UNFOLDED_MAPS if unfolds(unet.device, unet.dtype) else 0)
    return height * width * unet.config["block_out_channels"][0] * bytes_per_value * maps


def is_out_of_memory(error: BaseException) -> bool:
    """Return whether `error` means out of memory: from PyTorch on GPU or CPU, Python, or stylefast."""
    return isinstance(error, (torch.OutOfMemoryError, MemoryError)) or (
        isinstance(error, RuntimeError) and "not enough memory" in str(error)
    )


@contextmanager
def going_on() -> Iterator[None]:
    """Leave the rest of the block undone if memory runs out."""
    try:
        yield
    except (RuntimeError, MemoryError) as error:
        if not is_out_of_memory(error):
            raise


def give_back() -> None:
    """Return memory that the C library has freed to the system, if it supports that."""
    trim = getattr(_libc(), "malloc_trim", None)
    if trim is not None:
        trim(0)


@cache
def _libc():
    try:
        return ctypes.CDLL(None)
    except OSError:
        return None


def resident_bytes() -> int:
    """Return this process's resident memory in bytes; 0 if the system does not tell."""
    try:
        with open("/proc/self/statm") as statm:
            return int(statm.read().split()[1]) * os.sysconf("SC_PAGE_SIZE")
    except OSError:
        return 0


def memory_report(engine: "Engine") -> dict[str, Any]:
    """Return the bytes held, by purpose.

    "model": UNet, text encoders, VAE (including packed weights and copies in other types), adapters, ControlNets.
    "banks": the pages of style banks on the device, per latent size with the pool's counts. "conditions": keys and
    values of prompts and pictures. "loras": those of requests, on the device and in host memory. "latents": pictures in
    progress. "graphs": memory prepared by the backend. "workspace": step buffers, and an estimate of the peak of one
    row's feature maps at the native size. "held": the sum without that peak. "limit": the configured limit. "process":
    this process's resident memory, and on a GPU the memory reserved by PyTorch.
    """
    _counted.pop(engine, None)  # report current values
    runner = engine.runner
    width, height = engine.native_size
    device = engine.unet.device
    banks = {
        f"{size[1]}x{size[0]}": {"bytes": pool.nbytes, "host": pool.host_bytes, **pool.stats()._asdict()}
        for size, pool in list(runner.bank_pages.items())
    }
    report = {
        "model": _model(engine),
        "banks": banks,
        "conditions": {
            "text": runner.conditions.text.nbytes,
            "others": runner.conditions.nbytes - runner.conditions.text.nbytes - runner.conditions.loras.nbytes,
        },
        "loras": {"device": runner.conditions.loras.nbytes, "host": engine.loras.nbytes},
        "latents": sum(slots.nbytes for slots in list(runner.latents.values())),
        "graphs": runner.backend.nbytes,
        "workspace": {
            "tables": runner.buffer_bytes(),
            "row": row_bytes(engine.unet, (height // engine.downscale, width // engine.downscale)),
        },
        "held": held_bytes(engine),
        "limit": engine.budget.limit,
        "process": {"resident": resident_bytes()},
    }
    if device.type == "cuda":
        report["process"]["reserved"] = torch.cuda.memory_reserved(device)
    return report


def held_bytes(engine: "Engine") -> int:
    """Return the bytes that the engine keeps between steps; the model's part may be `_SECONDS` old."""
    runner, now = engine.runner, time.monotonic()
    counted, model = _counted.get(engine, (-_SECONDS, 0))
    if now - counted >= _SECONDS:
        model = sum(_model(engine).values())
        _counted[engine] = (now, model)
    return (
        model
        + sum(pool.nbytes for pool in list(runner.bank_pages.values()))
        + runner.conditions.nbytes
        + sum(slots.nbytes for slots in list(runner.latents.values()))
        + runner.backend.nbytes
        + runner.buffer_bytes()
    )


def check_limit(engine: "Engine") -> None:
    """Raise OutOfMemory if the model alone exceeds the limit, if any; on a GPU, apply it to PyTorch as well."""
    limit, device = engine.budget.limit, engine.unet.device
    if limit is None:
        return
    held = held_bytes(engine)
    if held > limit:
        raise OutOfMemory(
            f"the model takes {held / 2**30:.2f} GiB, but memory_limit is {limit / 2**30:.2f} GiB; raise the limit, "
            "or load the model in half precision"
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
        "controls": engine.controls.nbytes + sum(map(packed_bytes, list(engine.controls.values()))),
    }


def _bytes(module) -> int:
    if not isinstance(module, torch.nn.Module):
        return 0
    tensors: Iterable[torch.Tensor] = (*module.parameters(), *module.buffers())
    # tied weights count once
    return sum({t.data_ptr(): t.numel() * t.element_size() for t in tensors}.values())
