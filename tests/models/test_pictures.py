import contextlib
import io
import os
import struct
import zlib

import numpy as np
import pytest
from PIL import Image

from stylefast.errors import ImageError
from stylefast.models.pictures import check_sources, open_picture, readable_formats, say_once
from tests.support.small_adapter import small_picture


def encoded(image, format="PNG", **options):
    stream = io.BytesIO()
    image.save(stream, format, **options)
    return stream.getvalue()


def png_header(width, height, depth=8, colour=2):
    """A PNG that claims a size and holds next to nothing."""

    def chunk(kind, data):
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    header = struct.pack(">IIBBBBB", width, height, depth, colour, 0, 0, 0)
    pixels = zlib.compress(b"\0" * 64)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", pixels) + chunk(b"IEND", b"")


def test_every_kind_of_source_gives_the_same_pixels(tmp_path):
    picture = small_picture()
    path = tmp_path / "a.png"
    picture.save(path)
    for source in (
        path,
        str(path),
        path.read_bytes(),
        bytearray(path.read_bytes()),
        picture,
        np.array(picture),
        np.array(picture) / 255.0,
    ):
        opened = open_picture(source)
        assert opened.mode == "RGB"
        assert np.array_equal(np.array(opened), np.array(picture))


@pytest.mark.parametrize("format", readable_formats())
def test_the_formats_open_whatever_the_name_says(tmp_path, format):
    path = tmp_path / "picture.dat"
    path.write_bytes(encoded(small_picture(), format))
    assert open_picture(path).size == (48, 40)


@pytest.mark.parametrize("format", ["PPM", "ICO"])
def test_other_formats_are_refused_even_under_a_png_name(tmp_path, format):
    path = tmp_path / "picture.png"
    path.write_bytes(encoded(small_picture(), format))
    with pytest.raises(ImageError, match="picture.png is no PNG, JPEG, WEBP, BMP, GIF, TIFF or AVIF .*whatever its"):
        open_picture(path)


@pytest.mark.parametrize(
    "content, said",
    [
        (b"", "another kind"),
        (b"<svg></svg>", "an? SVG"),
        (b"SIMPLE  =              T", "another kind"),
        (b"\x89PNG\r\n\x1a\n", "damaged"),
        (b"\0\0\0\x24ftypheic" + bytes(50), "but a HEIC file; save it as PNG or JPEG"),
        (b"\0\0\0\x1cftypmif1" + bytes(50), "HEIC"),
        (b"%PDF-1.7", "PDF"),
        (b"BM" + bytes(4), "damaged|another kind"),
    ],
)
def test_what_is_no_picture_is_refused_by_its_true_name(content, said):
    with pytest.raises(ImageError, match=said):
        open_picture(content)


@pytest.mark.parametrize("orientation", range(1, 9))
def test_exif_orientation_is_applied(orientation):
    exif = Image.Exif()
    exif[0x0112] = orientation
    opened = open_picture(encoded(small_picture(), "PNG", exif=exif))
    assert opened.size == ((48, 40) if orientation < 5 else (40, 48))
    original = np.array(small_picture())
    if orientation == 3:
        assert np.array_equal(np.array(opened), original[::-1, ::-1])
    if orientation == 6:
        assert np.array_equal(np.array(opened), np.rot90(original, -1))


def test_transparency_is_laid_over_white():
    pixels = np.zeros((20, 20, 4), dtype=np.uint8)
    pixels[:, 10:, 3] = 255
    for source in (pixels, encoded(Image.fromarray(pixels))):
        opened = np.array(open_picture(source))
        assert (opened[:, :10] == 255).all() and (opened[:, 10:] == 0).all()


def test_transparent_palette_entries_are_laid_over_white():
    palette = Image.new("P", (20, 20), 0)
    palette.putpalette([10, 20, 30] + [0] * 765)
    opened = open_picture(encoded(palette, transparency=0))
    assert opened.getpixel((5, 5)) == (255, 255, 255)


@pytest.mark.parametrize("mode", ["1", "L", "LA", "P", "RGBA", "CMYK", "YCbCr", "HSV", "LAB", "RGBa", "La"])
def test_every_mode_becomes_rgb(mode):
    image = small_picture()
    if mode in ("RGBa", "La"):
        image = image.convert("RGBA" if mode == "RGBa" else "LA")
    if mode == "LAB":
        image = Image.new("LAB", image.size, (128, 0, 0))
    opened = open_picture(image.convert(mode) if image.mode != mode else image)
    assert opened.mode == "RGB" and opened.size == image.size


def test_cmyk_jpegs_keep_their_colours():
    image = Image.new("RGB", (32, 32), (200, 60, 20))
    opened = open_picture(encoded(image.convert("CMYK"), "JPEG", quality=95))
    assert np.abs(np.array(opened).astype(int) - (200, 60, 20)).max() <= 6


@pytest.mark.parametrize("value, expected", [(0, 0), (257 * 100, 100), (65535, 255)])
def test_sixteen_bit_grey_is_scaled_and_not_clipped(value, expected):
    pixels = np.full((20, 20), value, dtype=np.uint16)
    for source in (pixels, pixels.astype(">u2"), encoded(Image.fromarray(pixels))):
        assert open_picture(source).getpixel((3, 3)) == (expected,) * 3


# Pillow's own warning begins at 89 megapixels
@pytest.mark.filterwarnings("error")
@pytest.mark.parametrize("size", [(30_000, 30_000), (13_000, 13_000), (4097, 4096), (100_000, 100_000)])
def test_bombs_are_refused_from_the_header(size):
    with pytest.raises(ImageError, match="limit is 16.8 megapixels"):
        open_picture(png_header(*size))


def test_sixteen_point_eight_megapixels_pass_the_size_check():
    # the header passes; the missing pixels are found only on decoding
    with pytest.raises(ImageError, match="damaged or truncated"):
        open_picture(png_header(4096, 4096))


@pytest.mark.parametrize("size, words", [((15, 100), "at least 16"), ((16, 513), "32 : 1")])
def test_slivers_are_refused(size, words):
    image = Image.new("RGB", size)
    for source in (image, encoded(image), np.array(image)):
        with pytest.raises(ImageError, match=words):
            open_picture(source)


def test_arrays_are_refused_by_their_size_before_they_are_copied():
    # a broadcast array costs nothing as long as it is not converted; this one would have 12 terabytes
    huge = np.broadcast_to(np.float32(0.5), (1_000_000, 1_000_000, 3))
    with pytest.raises(ImageError, match="1000000 x 1000000 pixels"):
        open_picture(huge)


@pytest.mark.parametrize("format", readable_formats())
def test_truncated_files_are_refused_at_any_length(format):
    whole = encoded(small_picture(0, (120, 90)), format)
    # of BMP and TIFF some bytes behind the pixels may be missing
    for length in range(1, len(whole) * 9 // 10, max(1, len(whole) // 12)):
        with pytest.raises(ImageError):
            open_picture(whole[:length])


# broken orientation tags make Pillow warn before it goes on without them
@pytest.mark.filterwarnings("ignore::UserWarning:PIL")
@pytest.mark.parametrize("format", readable_formats())
def test_damaged_bytes_give_a_picture_or_an_image_error(format):
    exif = {}
    if format not in ("BMP", "GIF"):
        exif["exif"] = Image.Exif()
        exif["exif"][0x0112] = 6
    whole = np.frombuffer(encoded(small_picture(0), format, **exif), np.uint8)
    draw = np.random.default_rng(4)
    for _ in range(80):
        damaged = whole.copy()
        places = draw.integers(0, len(damaged) if draw.random() < 0.5 else 100, 4)
        damaged[places] = draw.integers(0, 256, 4, dtype=np.uint8)
        with contextlib.suppress(ImageError):
            assert open_picture(damaged.tobytes()).mode == "RGB"


@pytest.mark.parametrize("format, word", [("PNG", "frames"), ("WEBP", "frames"), ("GIF", "frames"), ("TIFF", "pages")])
def test_of_an_animation_the_first_frame_is_taken_and_that_is_said_once(format, word, caplog):
    say_once.cache_clear()
    frames = [Image.new("RGB", (20, 20), colour) for colour in ((250, 0, 0), (0, 250, 0), (0, 0, 250))]
    options = {"lossless": True} if format == "WEBP" else {}
    data = encoded(frames[0], format, save_all=True, append_images=frames[1:], **options)
    for _ in range(2):
        assert open_picture(data).getpixel((9, 9)) == (250, 0, 0)
    assert [f"several {word}; the first one is used" in record.message for record in caplog.records] == [True]


def test_of_the_pictures_that_a_phone_puts_into_one_jpeg_the_photo_is_taken(caplog):
    photo, gain_map = Image.new("RGB", (64, 48), (250, 0, 0)), Image.new("RGB", (32, 24), (9, 9, 9))
    data = encoded(photo, "MPO", save_all=True, append_images=[gain_map])
    assert b"MPF" in data and open_picture(data).size == (64, 48) and not caplog.records


def test_a_pipe_and_a_device_are_refused_without_waiting_for_them(tmp_path):
    os.mkfifo(tmp_path / "pipe.png")
    for source in (tmp_path / "pipe.png", "/dev/zero"):
        with pytest.raises(ImageError, match="a pipe or a device"):
            open_picture(source)


def test_paths_that_lead_nowhere_say_so(tmp_path):
    for source, words in (
        (tmp_path / "absent.png", "no picture found at"),
        (tmp_path, "folder"),
        ("https://example.org/a.png", "download"),
        ("a\0b.png", "no NUL"),
        ("\ud83d.png", "surrogate|path"),
        ("", "at least one character"),
    ):
        with pytest.raises(ImageError, match=words):
            open_picture(source)


@pytest.mark.parametrize(
    "source, words",
    [
        (None, "NoneType"),
        (np.zeros((20, 20, 2), np.uint8), r"\[20, 20, 2\]"),
        (np.zeros(20, np.uint8), r"\[20\]"),
        (np.full((20, 20, 3), 1.5), "1.5"),
        (np.full((20, 20, 3), np.nan), "nan"),
        (np.zeros((20, 20, 3), np.int32), "int32"),
        (np.zeros((0, 20, 3), np.uint8), "no pixels"),
        (Image.fromarray(np.full((20, 20), 7.5, np.float32)), "floating point"),
        (Image.fromarray(np.full((20, 20), 70_000, np.int32)), "70000"),
    ],
    ids=["nothing", "two channels", "one dimension", "beyond one", "nan", "int32", "empty", "mode F", "beyond 16 bits"],
)
def test_values_that_are_no_picture_are_refused(source, words):
    with pytest.raises(ImageError, match=words):
        open_picture(source)


def test_a_masked_array_is_refused_where_something_is_masked():
    pixels = np.ma.array(np.full((20, 20, 3), 9, np.uint8))
    assert open_picture(pixels).getpixel((3, 3)) == (9, 9, 9)
    pixels[3, 3] = np.ma.masked
    for call in (open_picture, lambda source: check_sources("image", [source])):
        with pytest.raises(ImageError, match=r"a masked array, but pictures have no mask; .*filled\(255\)"):
            call(pixels)


def test_a_memoryview_of_any_stride_is_read_and_a_released_one_named():
    data = encoded(small_picture())
    spread = bytes(byte for one in data for byte in (one, 0))
    expected = open_picture(data).tobytes()
    assert open_picture(memoryview(spread)[::2]).tobytes() == expected
    view = memoryview(data)
    view.release()
    with pytest.raises(ImageError, match="can't be read"):
        open_picture(view)


def test_floats_and_bools_become_grey():
    assert open_picture(Image.new("F", (20, 20), 0.2)).getpixel((3, 3)) == (51, 51, 51)
    assert open_picture(np.ones((20, 20), bool)).getpixel((3, 3)) == (255, 255, 255)


def test_the_source_is_left_untouched():
    image = small_picture().convert("RGBA")
    before = image.tobytes()
    open_picture(image)
    assert image.mode == "RGBA" and image.tobytes() == before
