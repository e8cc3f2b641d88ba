"""Fast previews of unfinished pictures by a tiny decoder, or else by a linear map from latents to colours."""

from dataclasses import dataclass
from pathlib import Path
from threading import Lock
from weakref import WeakKeyDictionary

import torch
import torch.nn.functional as F
from torch import nn

from stylefast.errors import InvalidRequest, ModelFormatError
from stylefast.models.config_files import config_of
from stylefast.models.vae import decode, decode_unchecked, decoding_dtype, downscale, encode, load_vae
from stylefast.models.vae_copies import weights_stamp

FIT_SIDE = 16  # side, in latents, of the pictures used to fit the linear map
FIT_PICTURES = 8
RIDGE = 1e-3


@dataclass(frozen=True)
class LinearColours:
    """Linear map colour = weight @ latent + bias, in 0..1: weight [3, C], bias [3], both float32."""

    weight: torch.Tensor
    bias: torch.Tensor


_fitted: WeakKeyDictionary[nn.Module, tuple[tuple, LinearColours]] = WeakKeyDictionary()
_fitting = Lock()


class PreviewDecoder:
    """Fast decoder of latents to 8-bit pictures that accepts any latent values; created by `load`.

    `kind` is "tiny" (an AutoencoderTiny such as TAESD: sharp, at a few per cent of a full decode's cost) or "linear"
    (a flat square of colour per latent, at almost no cost). Noisy latents give noisy previews; pass the step's estimate
    of the clean latents if available.
    """

    def __init__(self, channels: int, factor: int, tiny: nn.Module | None, colours: LinearColours | None):
        self.channels, self.factor = channels, factor
        self._tiny, self._colours = tiny, colours

    @classmethod
    def load(
        cls, source: str | Path | nn.Module | None, vae: nn.Module, dtype: torch.dtype, device: torch.device | str
    ) -> "PreviewDecoder":
        """Load a preview decoder for the latents of `vae`.

        source: an AutoencoderTiny, its folder, file or hub id ("madebyollin/taesdxl"), loaded as `dtype` on `device`
        (a module is used unchanged); None fits a linear map to `vae`. Raises ModelNotFound, or ModelFormatError for
        another kind of VAE or other latents.
        """
        channels, factor = config_of(vae)["latent_channels"], downscale(vae)
        if source is None:
            colours = fit_colours(vae)
            return cls(channels, factor, None, LinearColours(colours.weight.to(device), colours.bias.to(device)))
        tiny = load_vae(source, dtype=dtype, device=device)
        kind = type(tiny).__name__
        if kind != "AutoencoderTiny":
            raise ModelFormatError(
                f"{_name(source)} is an {kind}; previews need an AutoencoderTiny such as 'madebyollin/taesdxl', or None"
            )
        found = config_of(tiny)["latent_channels"], downscale(tiny)
        if found != (channels, factor):
            raise ModelFormatError(
                f"{_name(source)} decodes latents of {found[0]} channels to {found[1]} pixels each, but the model's "
                f"have {channels} channels and {factor} pixels; use the tiny decoder of this model family, or None"
            )
        return cls(channels, factor, tiny, None)

    @property
    def kind(self) -> str:
        """Return "tiny" or "linear"."""
        return "linear" if self._tiny is None else "tiny"

    @torch.no_grad()
    def decode(self, latents: torch.Tensor) -> torch.Tensor:
        """Decode latents [n, C, h, w] to previews: uint8 [n, h * factor, w * factor, 3] on the latents' device.

        Values that are not finite become 0. Raises InvalidRequest for another shape.
        """
        if latents.ndim != 4 or latents.shape[1] != self.channels:
            raise InvalidRequest(
                f"latents of shape {tuple(latents.shape)} have no preview: the shape must be [n, {self.channels}, h, w]"
            )
        if self._tiny is not None:
            pictures = decode_unchecked(self._tiny, latents, decoding_dtype(self._tiny))
            return _bytes(pictures / 2 + 0.5).permute(0, 2, 3, 1).to(latents.device)
        if self._colours is None:
            raise ModelFormatError("a preview decoder needs a tiny VAE or a linear map")
        weight, bias = (part.to(latents.device) for part in (self._colours.weight, self._colours.bias))
        colours = torch.einsum("oc,nchw->nhwo", weight, latents.float()) + bias
        squares = _bytes(colours)  # [n, h, w, 3]; nearest: each becomes factor x factor pixels
        return squares.repeat_interleave(self.factor, 1).repeat_interleave(self.factor, 2)


def fit_colours(vae: nn.Module) -> LinearColours:
    """Fit the linear map from a latent of `vae` to the mean colour of its pixels.

    Least squares over the latents of seeded coloured blocks, and the blocks as decoded by `vae`. Cached per VAE until
    its weights change.
    """
    with _fitting:
        stamp = weights_stamp(vae)
        kept = _fitted.get(vae)
        if kept is None or kept[0] != stamp:
            kept = _fitted[vae] = (stamp, _fit(vae))
        return kept[1]


def colour_blocks(side: int) -> torch.Tensor:
    """Return seeded pictures of 5x5 blocks of random colours, [FIT_PICTURES, 3, side, side] in -1..1."""
    generator = torch.Generator().manual_seed(1)
    colours = torch.rand(FIT_PICTURES, 3, 5, 5, generator=generator) * 2 - 1
    return F.interpolate(colours, (side, side), mode="nearest")


def _fit(vae: nn.Module) -> LinearColours:
    factor, device = downscale(vae), next(vae.parameters()).device
    with torch.inference_mode(False), torch.no_grad():
        # two at a time keeps activations small at SDXL's size
        latents = [encode(vae, part.to(device)) for part in colour_blocks(FIT_SIDE * factor).split(2)]
        # fit to the decoded colours, not the encoded ones, since previews predict the decoder's output
        drawn = torch.cat([F.avg_pool2d(decode(vae, part), factor).cpu() for part in latents])
        known = torch.cat(latents).cpu().movedim(1, -1).flatten(0, -2).double()  # [squares, C]
        wanted = drawn.movedim(1, -1).flatten(0, -2).double()  # [squares, 3]
        mean, middle = known.mean(0), wanted.mean(0)
        known, wanted = known - mean, wanted - middle
        # damping by a share of the latents' variance keeps constant channels from getting huge weights
        damping = RIDGE * known.square().sum() / known.shape[1] * torch.eye(known.shape[1], dtype=torch.float64)
        weight = torch.linalg.solve(known.T @ known + damping, known.T @ wanted).T  # [3, C]
        return LinearColours(weight.float(), (middle - weight @ mean).float())


def _bytes(pictures: torch.Tensor) -> torch.Tensor:
    """Convert 0..1 to uint8; values that are not finite become 0."""
    return (pictures.nan_to_num(0, 0, 0).clamp(0, 1) * 255).round().to(torch.uint8)


def _name(source) -> str:
    return type(source).__name__ if isinstance(source, nn.Module) else str(source)
