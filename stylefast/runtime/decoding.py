"""Latents to pictures: the VAE in groups of equal size, and quick previews."""

import threading
from collections.abc import Callable, Generator, Sequence
from functools import partial

import torch

from stylefast.models import vae as vaes
from stylefast.models.previews import PreviewDecoder
from stylefast.runtime.memory import MemoryBudget


class Decoder:
    """Decodes the latents of one model.

    model_dtype: that of the UNet; a VAE that would overflow in it is run in another type (`vaes.decoding_dtype`).
    preview: an AutoencoderTiny in any form that `PreviewDecoder.load` takes; None fits a linear map when first asked.
    """

    def __init__(self, vae: torch.nn.Module, model_dtype: torch.dtype, budget: MemoryBudget, preview=None):
        self.vae, self._budget = vae, budget
        # a VAE that float16 can't run was loaded in float32, and may not have to stay there
        self._dtype = vaes.decoding_dtype(vae, torch.float16 if model_dtype == torch.float16 else None)
        self._run: vaes.DecoderRun | None = None
        self._preview_source, self._preview = preview, None
        self._making = threading.Lock()
        if preview is not None:
            self._previews()  # what can't be loaded is an error at once

    def decode_by(self, run: vaes.DecoderRun, dtype: torch.dtype) -> None:
        """Decode pictures by `run`, which works in `dtype`, from now on; previews stay as they are.

        What overflows in it is decoded again by the VAE, in float32.
        """
        self._run, self._dtype = run, dtype

    def open(self) -> None:
        """Open what decodes in place of the VAE, so that what is wrong with it shows before steps are spent.

        Raises what its file is refused with.
        """
        if hasattr(self._run, "open"):
            self._run.open()

    def images(
        self, latents: Sequence[torch.Tensor], beside: Callable[[Callable[[], torch.Tensor]], torch.Tensor]
    ) -> Generator[None, None, list[torch.Tensor]]:
        """[3, height, width] in 0..1 for each of `latents` [channels, h, w]; yields after each.

        beside: how the VAE is called, `Runtime.beside`. Raises NumericsError and OutOfMemory, see `vae.decode`.
        """
        images: list[torch.Tensor] = []
        for one in latents:
            images.append(beside(partial(self._decode, one)))
            yield
        return images

    @torch.inference_mode()
    def _decode(self, latents: torch.Tensor) -> torch.Tensor:
        memory = None if self._budget.limit is None else self._budget.free(latents.device)
        return vaes.decode(
            self.vae, latents[None], tile="auto", memory=memory, decode_dtype=self._dtype, run=self._run
        )[0]

    def previews(self, latents: torch.Tensor) -> list:
        """Quick PIL pictures of latents [n, channels, h, w]."""
        from PIL import Image

        device = next(self.vae.parameters()).device
        return [Image.fromarray(pixels) for pixels in self._previews().decode(latents.to(device)).cpu().numpy()]

    def _previews(self) -> PreviewDecoder:
        with self._making:
            if self._preview is None:
                weight = next(self.vae.parameters())
                self._preview = PreviewDecoder.load(self._preview_source, self.vae, weight.dtype, weight.device)
            return self._preview


def to_pil(image: torch.Tensor):
    """[3, height, width] in 0..1 as a PIL image."""
    from PIL import Image

    pixels = (image.clamp(0, 1) * 255).round().to(torch.uint8).permute(1, 2, 0).cpu().numpy()
    return Image.fromarray(pixels)
