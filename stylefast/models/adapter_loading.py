"""Loading of an IP-Adapter together with its image encoder."""

from pathlib import Path

from stylefast.errors import AdapterError
from stylefast.models.checkpoint import Components, load_image_encoder
from stylefast.models.image_encoder import ImageEncoder
from stylefast.models.ip_adapter import IPAdapter
from stylefast.models.unet import UNet


def load_adapter(
    file: str | Path, image_encoder: str | Path | None, components: Components, unet: UNet
) -> tuple[IPAdapter, ImageEncoder]:
    """Load an adapter file for `unet`, and its encoder from the folder `image_encoder` (None: the model's own).

    Raises AdapterError if the two don't fit together, or if there is no image encoder.
    """
    adapter = IPAdapter.load(
        file, unet.layout, unet.config["cross_attention_dim"], dtype=unet.dtype, device=unet.device
    )
    if image_encoder is not None:
        encoder = load_image_encoder(image_encoder, dtype=unet.dtype, device=unet.device)
    elif components.image_encoder is not None:
        encoder = ImageEncoder(components.image_encoder, components.feature_extractor)
    else:
        raise AdapterError(
            f"{components.name} comes without an image encoder; pass image_encoder=FOLDER with the encoder that the "
            "adapter was trained with, e.g. models/image_encoder of h94/IP-Adapter for a vit-h adapter"
        )
    adapter.check_encoder(encoder)
    return adapter, encoder
