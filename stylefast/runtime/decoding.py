"""Decoding of latents to pictures by the VAE, and quick previews."""

import threading
from collections.abc import Callable, Generator, Sequence
from functools import partial
from typing import TYPE_CHECKING

import torch

from stylefast.models import vae as vaes
from stylefast.models.previews import PreviewDecoder
from stylefast.runtime.memory import MemoryBudget

if TYPE_CHECKING:
    from stylefast.options import Part


# latents beyond an edge that a pixel beside it is decoded from
_MARGIN = 16


class Decoder:
    """Decoder of one model's latents.

    model_dtype: the UNet's type; a VAE that would overflow in it runs in another one (`vaes.decoding_dtype`).
    preview: an AutoencoderTiny in any form that `PreviewDecoder.load` accepts; None fits a linear map on first use.
    """

    def __init__(
        self, vae: torch.nn.Module, model_dtype: torch.dtype, budget: MemoryBudget, preview: "Part | None" = None
    ):
        self.vae, self._budget = vae, budget
        # a VAE that overflows in float16 was loaded in float32, but may decode in bfloat16
        self._dtype = vaes.decoding_dtype(vae, torch.float16 if model_dtype == torch.float16 else None)
        self._run: vaes.DecoderRun | None = None
        self._preview_source, self._preview = preview, None
        self._making = threading.Lock()
        if preview is not None:
            self._previews()  # fail at once if it can't be loaded

    def decode_by(self, run: vaes.DecoderRun, dtype: torch.dtype) -> None:
        """Decode pictures with `run`, which works in `dtype`, from now on; previews are unchanged.

        Pictures that overflow are decoded again by the VAE, in float32.
        """
        self._run, self._dtype = run, dtype

    def open(self) -> None:
        """Open the decoder that replaces the VAE, if any, so that its errors show before steps are spent.

        Raises the error with which its file is refused.
        """
        if self._run is not None and hasattr(self._run, "open"):
            self._run.open()

    def images(
        self,
        latents: Sequence[torch.Tensor],
        beside: Callable[[Callable[[], torch.Tensor]], torch.Tensor],
        wraps: Sequence[bool],
    ) -> Generator[None, None, list[torch.Tensor]]:
        """Decode each of `latents` [channels, h, w] to [3, height, width] in 0..1; yield after each.

        beside: runs the VAE call, `Runner.beside`. wraps: whether the left and right edge of each are neighbours.
        Raises NumericsError and OutOfMemory, see `vae.decode`.
        """
        images: list[torch.Tensor] = []
        for one, wrap in zip(latents, wraps, strict=True):
            images.append(beside(partial(self._decode_around if wrap else self._decode, one)))
            yield
        return images

    def _decode_around(self, latents: torch.Tensor) -> torch.Tensor:
        """Decode latents whose edges are neighbours, each with a margin of what lies beyond the other."""
        margin = min(_MARGIN, latents.shape[-1])
        image = self._decode(torch.cat([latents[..., -margin:], latents, latents[..., :margin]], dim=-1))
        margin *= image.shape[-1] // (latents.shape[-1] + 2 * margin)
        return image[..., margin:-margin]

    @torch.inference_mode()
    def _decode(self, latents: torch.Tensor) -> torch.Tensor:
        memory = None if self._budget.limit is None else self._budget.free(latents.device)
        return vaes.decode(
            self.vae, latents[None], tile="auto", memory=memory, decode_dtype=self._dtype, run=self._run
        )[0]

    def previews(self, latents: torch.Tensor) -> list:
        """Return quick PIL pictures of latents [n, channels, h, w]."""
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
    """Convert [3, height, width] in 0..1 to a PIL image."""
    from PIL import Image

    pixels = (image.clamp(0, 1) * 255).round().to(torch.uint8).permute(1, 2, 0).cpu().numpy()
    return Image.fromarray(pixels)
