"""CLIP image encoder for IP-Adapter: turns pictures into one embedding each, or into patch features."""

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from PIL import Image

from stylefast.errors import AdapterError, InvalidRequest, ModelFormatError
from stylefast.models.config_check import check_feature_extractor
from stylefast.models.pictures import PictureSource, open_picture
from stylefast.values import quoted

if TYPE_CHECKING:
    from transformers.models.clip.modeling_clip import CLIPVisionModelWithProjection

CLIP_MEAN = (0.48145466, 0.4578275, 0.40821073)
CLIP_STD = (0.26862954, 0.26130258, 0.27577711)
CROPS = ("center", "squash", "pad")


def preprocess(
    image: PictureSource,
    size: int,
    crop: str = "center",
    mean: Sequence[float] = CLIP_MEAN,
    std: Sequence[float] = CLIP_STD,
    *,
    short_side: int | None = None,
) -> torch.Tensor:
    """Return a picture as the encoder's input: `[3, size, size]` float32, normalised with `mean` and `std`.

    `crop`: "center" scales the short side to `short_side` (default `size`) and crops the centre, as CLIPImageProcessor
    does, so the ends of long pictures are lost; "squash" scales both sides, which keeps everything but changes the
    aspect; "pad" scales the long side to `size` and pads with the mean colour. Raises ImageError and InvalidRequest.
    """
    check_crop(crop)
    picture = scaled(open_picture(image), size, crop, short_side)
    if crop == "center":
        left, top = (picture.width - size) // 2, (picture.height - size) // 2
        # a crop beyond the border is black there, as in CLIPImageProcessor if crop_size exceeds the short side
        picture = picture.crop((left, top, left + size, top + size))

    pixels = torch.from_numpy(np.array(picture, dtype=np.float32) / 255).permute(2, 0, 1)
    pixels = (pixels - torch.tensor(mean)[:, None, None]) / torch.tensor(std)[:, None, None]
    if pixels.shape[1:] == (size, size):
        return pixels.contiguous()
    # zero after normalisation is the mean colour
    padded = torch.zeros(3, size, size)
    top, left = (size - pixels.shape[1]) // 2, (size - pixels.shape[2]) // 2
    padded[:, top : top + pixels.shape[1], left : left + pixels.shape[2]] = pixels
    return padded


def scaled(picture: Image.Image, size: int, crop: str, short_side: int | None = None) -> Image.Image:
    """Return a picture scaled as `preprocess` does before it crops; scaled again, it stays as it is."""
    width, height = picture.size
    if crop == "squash":
        return _resize(picture, size, size)
    if crop == "pad":
        scale = size / max(width, height)
        return _resize(picture, max(1, round(width * scale)), max(1, round(height * scale)))
    short = short_side or size
    if width <= height:
        return _resize(picture, short, int(short * height / width))
    return _resize(picture, int(short * width / height), short)


def check_crop(crop: str) -> None:
    """Raise InvalidRequest for anything but "center", "squash" or "pad"."""
    if crop not in CROPS:
        raise InvalidRequest(f"crop={quoted(crop)} is unknown; choose one of {', '.join(map(repr, CROPS))}")


class ImageEncoder:
    """A CLIP vision model with projection, and its picture preprocessing.

    `vision_model` is transformers' CLIPVisionModelWithProjection, `processor_config` the content of its
    preprocessor_config.json (a mapping), or None for CLIP's defaults at the model's own size.
    Raises ModelFormatError if the two don't fit together.
    """

    def __init__(self, vision_model: "CLIPVisionModelWithProjection", processor_config: Mapping | None = None):
        config = getattr(vision_model, "config", None)
        if config is None or not hasattr(vision_model, "visual_projection"):
            raise ModelFormatError(
                f"{type(vision_model).__name__} is not a CLIPVisionModelWithProjection; IP-Adapter needs one with "
                "its projection"
            )
        self.vision_model = vision_model.eval()
        self.embed_dim: int = config.projection_dim
        self.hidden_size: int = config.hidden_size
        self.image_size: int = config.image_size

        processor = dict(processor_config or {})
        check_feature_extractor(processor, "the image processor")
        crop_size = _edge(processor.get("crop_size", self.image_size))
        if crop_size != self.image_size:
            raise ModelFormatError(
                f"the image processor crops to {crop_size} pixels, but the image encoder takes {self.image_size}; "
                "use the preprocessor_config.json that came with the encoder"
            )
        self.short_side = _edge(processor.get("size", self.image_size))
        self.mean = tuple(processor.get("image_mean", CLIP_MEAN))
        self.std = tuple(processor.get("image_std", CLIP_STD))

    @property
    def device(self) -> torch.device:
        return self._weight.device

    @property
    def dtype(self) -> torch.dtype:
        return self._weight.dtype

    @property
    def _weight(self) -> torch.Tensor:
        return self.vision_model.get_parameter("visual_projection.weight")

    def to(self, *args: Any, **kwargs: Any) -> "ImageEncoder":
        """Move the model and return self."""
        self.vision_model.to(*args, **kwargs)
        return self

    def scaled(self, picture: Image.Image, crop: str = "center") -> Image.Image:
        """Return a picture scaled as `pixels` does first."""
        return scaled(picture, self.image_size, crop, self.short_side)

    def pixels(self, images: Sequence[PictureSource], crop: str = "center") -> torch.Tensor:
        """Return pictures as the encoder's input `[n, 3, image_size, image_size]`."""
        if not isinstance(images, (list, tuple)) or not images:
            raise InvalidRequest("the image encoder needs a list of one or more pictures")
        prepared = [
            preprocess(image, self.image_size, crop, self.mean, self.std, short_side=self.short_side)
            for image in images
        ]
        return torch.stack(prepared).to(self.device, self.dtype)

    @torch.no_grad()
    def embed(self, images: Sequence[PictureSource], crop: str = "center") -> torch.Tensor:
        """Return projected class embeddings `[n, embed_dim]`, not normalised to unit length."""
        return self._embeds(self.pixels(images, crop))

    @torch.no_grad()
    def patches(self, images: Sequence[PictureSource], crop: str = "center") -> torch.Tensor:
        """Return the features before the last layer, class token first: `[n, 1 + patches, hidden_size]`."""
        return self._features(self.pixels(images, crop))

    @torch.no_grad()
    def blank_patches(self) -> torch.Tensor:
        """Return patch features of the "no picture" used to train plus adapters: `[1, 1 + patches, hidden_size]`.

        That picture is zero after normalisation: the mean colour, not black.
        """
        size = self.image_size
        return self._features(torch.zeros(1, 3, size, size, device=self.device, dtype=self.dtype))

    def _embeds(self, pixels: torch.Tensor) -> torch.Tensor:  # -> [n, embed_dim]
        return self.vision_model(pixels).image_embeds

    def _features(self, pixels: torch.Tensor) -> torch.Tensor:
        hidden_states = self.vision_model(pixels, output_hidden_states=True).hidden_states
        if not hidden_states or len(hidden_states) < 2:
            raise AdapterError("the image encoder returns no hidden states; plus adapters read the one before the last")
        return hidden_states[-2]


def _resize(picture: Image.Image, width: int, height: int) -> Image.Image:
    return picture.resize((width, height), Image.Resampling.BICUBIC)


def _edge(size: int | Mapping) -> int:
    """Return the side length in a processor config: a number, {"shortest_edge": n} or {"height": n, "width": n}.

    Raises ModelFormatError for other sizes.
    """
    if isinstance(size, int):
        return size
    if "shortest_edge" in size:
        return int(size["shortest_edge"])
    if "height" in size and size.get("height") == size.get("width"):
        return int(size["height"])
    raise ModelFormatError(
        f"the image processor's size {dict(size)} is not square; CLIP's encoders need square pictures"
    )
