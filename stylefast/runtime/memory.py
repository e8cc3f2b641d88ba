"""Whether a batch fits into memory, asked before it is run: the kernel's out-of-memory killer asks nobody."""

from pathlib import Path

import torch

from stylefast.errors import OutOfMemory
from stylefast.models.unet import UNet

# live feature maps of the UNet's finest level, in units of one; measured as a peak of about 30 with SDXL's layout
_LIVE_MAPS = 40


def available_memory(device: torch.device) -> int | None:
    """Bytes free on the device, None where the system does not tell."""
    if device.type == "cuda":
        return torch.cuda.mem_get_info(device)[0]
    try:
        lines = Path("/proc/meminfo").read_text().splitlines()
    except OSError:
        return None
    fields = dict(line.split(":", 1) for line in lines)
    return int(fields["MemAvailable"].split()[0]) * 1024 if "MemAvailable" in fields else None


def check_batch_fits(unet: UNet, rows: int, latent_size: tuple[int, int]) -> None:
    """Raise OutOfMemory if one UNet call of `rows` rows at (height, width) latents can't fit by a rough count."""
    height, width = latent_size
    bytes_per_value = torch.finfo(unet.dtype).bits // 8
    needed = rows * height * width * unet.config["block_out_channels"][0] * bytes_per_value * _LIVE_MAPS
    free = available_memory(unet.device)
    if free is not None and needed > free:
        raise OutOfMemory(
            f"a batch of {rows} rows at {width}x{height} latents needs about {needed / 2**30:.1f} GiB, "
            f"{free / 2**30:.1f} GiB are free; ask for fewer or smaller pictures at once"
        )


def is_out_of_memory(error: RuntimeError) -> bool:
    """Whether PyTorch raised `error` for want of memory, on the GPU or on the CPU."""
    return isinstance(error, torch.OutOfMemoryError) or "not enough memory" in str(error)
