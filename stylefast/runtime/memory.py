"""Whether a batch fits into memory, asked before it is run: the kernel's out-of-memory killer asks nobody."""

import torch

from stylefast.errors import OutOfMemory
from stylefast.models.unet import UNet
from stylefast.models.weight_files import available_memory

# peak of live feature maps in units of one at the finest level; with SDXL's layout at 128x128 latents, fp32 on a CPU,
# resident memory rose by 27
_LIVE_MAPS = 40


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
