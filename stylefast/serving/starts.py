"""Pictures that requests begin with, and their masks: from the clients' conventions to the engine's."""

from io import BytesIO
from math import sqrt

from PIL import Image, ImageChops, ImageFilter, ImageOps

from stylefast.serving.media import MIN_SIDE, Upload
from stylefast.serving.replies import ApiError

_ORIENTATION, _TURNED = 0x0112, (5, 6, 7, 8)  # of EXIF: values that swap width and height
_UNIT = 8  # sides of the engine's pictures


def size_near(picture: Upload, native: tuple[int, int]) -> tuple[int, int]:
    """Return the size of a picture that begins with another: of its shape, and at most of the model's own area."""
    width, height = picture.width, picture.height
    with Image.open(BytesIO(picture.content)) as opened:
        if opened.getexif().get(_ORIENTATION) in _TURNED:
            width, height = height, width
    share = min(1.0, sqrt(native[0] * native[1] / (width * height)))
    sides = (max(_UNIT * round(side * share / _UNIT), MIN_SIDE) for side in (width, height))
    width, height = sides
    return width, height


def mask_of_clear(mask: Upload) -> Upload:
    """Return a mask by which transparent parts change as one by which white ones do. Raises ApiError."""
    opened = _opened(mask, "mask")
    if not (opened.mode in ("RGBA", "LA", "PA") or "transparency" in opened.info):
        raise ApiError(
            400,
            "mask has no transparent parts; what is transparent is changed, so send a PNG with an alpha channel",
            param="mask",
            code="invalid_image",
        )
    return _upload(ImageChops.invert(opened.convert("RGBA").getchannel("A")))


def mask_of_white(mask: Upload, inverted: bool, blur: float) -> Upload:
    """Return a mask with black and white exchanged, or with soft edges. Raises ApiError."""
    grey = _opened(mask, "mask").convert("L")
    grey = ImageChops.invert(grey) if inverted else grey
    return _upload(grey.filter(ImageFilter.GaussianBlur(blur)) if blur else grey)


def stretched(picture: Upload, size: tuple[int, int]) -> Upload:
    """Return a picture at another size, whatever its shape. Raises ApiError."""
    upright = ImageOps.exif_transpose(_opened(picture, "init_images")).convert("RGB")
    return _upload(upright.resize(size, Image.Resampling.LANCZOS))


def _opened(picture: Upload, param: str) -> Image.Image:
    try:
        opened = Image.open(BytesIO(picture.content))
        opened.load()
    except Exception as error:  # decoders raise arbitrary errors for damaged pixels
        message = f"{param}: the file is damaged; save it again"
        raise ApiError(400, message, param=param, code="invalid_image") from error
    return opened


def _upload(picture: Image.Image) -> Upload:
    stream = BytesIO()
    picture.save(stream, "PNG")
    return Upload(stream.getvalue(), "png", picture.width, picture.height)
