"""Launch configuration, device selection and strides for the launchers, and their ahead-of-time specialisations."""

from collections.abc import Iterable, Mapping
from contextlib import AbstractContextManager, nullcontext
from functools import cache
from typing import Any

import torch

from stylefast.code_caches import guard_triton_cache
from stylefast.kernels.configs import Config, configuration
from stylefast.kernels.gpu.ahead import Specialisation

INTERPRETED_CAPABILITY = 90  # capability whose configurations CPU tensors use in Triton's interpreter


def settings(operation: str, x: torch.Tensor, config: Config | None, **key: int | float | str) -> Config:
    """Return the given configuration, or the committed one nearest to `key` on the GPU that holds x."""
    if config is not None:
        return config
    if not x.is_cuda:
        return _configuration(operation, INTERPRETED_CAPABILITY, None, tuple(key.items()))
    capability, gpu = _gpu(x.device)
    return _configuration(operation, capability, gpu, tuple(key.items()))


def compiler_options(config: Config) -> dict[str, int | bool]:
    """Return Triton's options for a configuration: its warps and stages, and fused multiply-add.

    Triton 3.6 fuses by default, 3.9 does not.
    """
    return {name: config[name] for name in ("num_warps", "num_stages") if name in config} | {"enable_fp_fusion": True}


def device_of(x: torch.Tensor) -> AbstractContextManager:
    """Return a context that makes x's device current, because Triton launches on the current device."""
    if not x.is_cuda:
        return nullcontext()
    guard_triton_cache()
    return torch.cuda.device(x.device)


def as_rows(x: torch.Tensor) -> torch.Tensor:
    """Return x [..., columns] as evenly spaced rows of contiguous columns, copied only if they are not."""
    rows = x.reshape(-1, x.shape[-1])
    return rows if rows.shape[1] == 1 or rows.stride(1) == 1 else rows.contiguous()


def with_position_stride(x: torch.Tensor) -> tuple[torch.Tensor, int]:
    """Return x [rows, channels, h, w] and the stride of its h * w positions, copied only if they have no single one."""
    height, width = x.shape[2:]
    if height > 1 and width > 1 and x.stride(2) != width * x.stride(3):
        x = x.contiguous()
    return x, x.stride(2) if width == 1 else x.stride(3)


def power_of_two(n: int) -> int:
    """Return the smallest power of two that is at least n (and at least 1)."""
    return 1 << max(n - 1, 0).bit_length()


def specialisation(
    name: str,
    kernel: Any,
    pointers: Mapping[str, str],
    constants: Mapping[str, Any],
    divisible: Iterable[str] = (),
    num_warps: int = 4,
    num_stages: int = 3,
) -> Specialisation:
    """Return the specialisation of `kernel` for an ahead-of-time compile.

    pointers gives each pointer's type, all 16-byte aligned as PyTorch's are; divisible names integers that are
    multiples of 16. Type "none" marks an argument that is None. Scalars called eps or scale are fp32, all other
    arguments i32.
    """
    absent = {argument: None for argument, kind in pointers.items() if kind == "none"}
    constants = {**constants, **absent}
    signature, attrs = {}, {}
    for i, argument in enumerate(kernel.arg_names):
        if argument in constants:
            signature[argument] = "constexpr"
        elif argument in pointers:
            signature[argument] = pointers[argument]
        else:
            signature[argument] = "fp32" if argument in ("eps", "scale") else "i32"
        if argument in divisible or signature[argument].startswith("*"):
            attrs[(i,)] = [["tt.divisibility", 16]]
    options = {"num_warps": num_warps, "num_stages": num_stages}
    return Specialisation(name, kernel, signature, constants, options, attrs)


@cache
def _gpu(device: torch.device) -> tuple[int, str]:
    major, minor = torch.cuda.get_device_capability(device)
    return 10 * major + minor, torch.cuda.get_device_name(device)


@cache
def _configuration(operation: str, capability: int, gpu: str | None, key: tuple) -> Config:
    return configuration(operation, capability, gpu, **dict(key))
