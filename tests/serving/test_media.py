"""Uploads are judged by their content, before any decoder sees them."""

import struct
import zlib
from io import BytesIO

import pytest
from PIL import Image
from PIL.PngImagePlugin import PngInfo

from stylefast.commands.files import read_metadata
from stylefast.provenance import PNG_KEYWORD
from stylefast.serving.media import MAX_METADATA, encoded, upload
from stylefast.serving.replies import ApiError


def saved(form, size=(40, 30), **options):
    stream = BytesIO()
    Image.new("RGB", size, (10, 200, 30)).save(stream, form, **options)
    return stream.getvalue()


def chunk(kind, content):
    return struct.pack(">I", len(content)) + kind + content + struct.pack(">I", zlib.crc32(kind + content))


def png(width, height, *chunks):
    header = struct.pack(">IIBBBBB", width, height, 1, 0, 0, 0, 0)
    parts = [chunk(b"IHDR", header), *chunks, chunk(b"IDAT", zlib.compress(b"")), chunk(b"IEND", b"")]
    return b"\x89PNG\r\n\x1a\n" + b"".join(parts)


@pytest.mark.parametrize("form", ["PNG", "JPEG", "WEBP"])
@pytest.mark.parametrize("size", [(40, 30), (17, 333)])
def test_size_and_kind_are_read_from_the_file(form, size):
    found = upload(saved(form, size), "image")
    assert (found.kind, found.width, found.height) == (form.lower(), *size)


def test_other_webps_and_jpegs_are_read_too():
    assert upload(saved("WEBP", (41, 31), lossless=True), "image").width == 41
    assert upload(saved("WEBP", (41, 31), exif=b"Exif\0\0" + bytes(100)), "image").height == 31
    assert upload(saved("JPEG", (41, 31), progressive=True, comment=b"x" * 1000), "image").width == 41


def refusal(content):
    with pytest.raises(ApiError) as caught:
        upload(content, "image")
    assert caught.value.param == "image" and caught.value.status in (400, 413)
    return caught.value.message


def many(form):
    """Return a picture of 16 MB, which consists of parts that hold nothing."""
    content, size = saved(form), 16 * 2**20
    if form == "PNG":
        return content[:33] + chunk(b"IDAT", b"") * (size // 12) + content[33:]
    if form == "JPEG":
        return content[:2] + b"\xff\xdb\x00\x02" * (size // 4) + content[2:]
    length = struct.pack("<I", 4 + size + len(content) - 12)
    return b"RIFF" + length + b"WEBP" + b"abcd\0\0\0\0" * (size // 8) + content[12:]


@pytest.mark.parametrize("form", ["PNG", "JPEG", "WEBP"])
def test_a_file_of_countless_parts_is_refused(form):
    assert "more than 100000 parts" in refusal(many(form))


def test_markers_and_filling_of_a_jpeg_cost_no_time():
    content = saved("JPEG", (41, 31))
    assert upload(content[:2] + b"\xff" * 1000 + content[2:], "image").width == 41
    assert "bytes of metadata" in refusal(content[:2] + b"\xff" * 48 * 2**20 + content[2:])
    assert "more than 100000 parts" in refusal(content[:2] + b"\xff\xd0" * 200_000 + content[2:])
    place = content.index(b"\xff\xda")  # behind the size
    assert "more than 100000 parts" in refusal(content[:place] + b"\xff\xdb\0\2" * 200_000 + content[place:])
    assert "one size" in refusal(content[:place] + content[content.index(b"\xff\xc0") :])


def test_a_jpeg_of_countless_scans_is_refused():
    """Each of 33 bytes takes a decoder 10 ms for 16 megapixels."""
    content = saved("JPEG", (256, 256), progressive=True)
    first = content.rindex(b"\xff\xda")
    scan = content[first : content.index(b"\xff\xd9", first)]
    assert upload(content[:first] + scan * 50 + content[first:], "image").width == 256
    assert "more than 100 scans" in refusal(content[:first] + scan * 100 + content[first:])


@pytest.mark.parametrize("form", ["BMP", "TIFF", "GIF", "ICO", "PPM"])
def test_other_formats_are_refused_whatever_they_are_called(form):
    assert "no PNG, JPEG or WebP" in refusal(saved(form, (32, 32)))


def test_what_is_no_picture_is_refused():
    assert "no PNG" in refusal(b"<svg xmlns='http://www.w3.org/2000/svg'/>")
    assert "empty" in refusal(b"")
    assert "no PNG" in refusal(b"SIMPLE  =                    T" + bytes(2880))


def test_bombs_are_refused_from_their_header():
    assert "30000 x 30000" in refusal(png(30_000, 30_000))
    assert "13000 x 13000" in refusal(png(13_000, 13_000))
    assert "8 x 8" in refusal(saved("PNG", (8, 8)))


def test_animations_are_refused():
    frames = [Image.new("RGB", (32, 32), (100 * i, 0, 0)) for i in range(3)]
    for form in ("WEBP", "PNG"):
        stream = BytesIO()
        frames[0].save(stream, form, save_all=True, append_images=frames[1:])
        assert "animated" in refusal(stream.getvalue())


def test_huge_metadata_is_refused_without_unpacking_it():
    text = zlib.compress(bytes(64 * 2**20), 9)  # 64 MB in 64 KB
    assert upload(png(32, 32, chunk(b"zTXt", b"a\0\0" + text)), "image").width == 32
    assert "metadata" in refusal(png(32, 32, chunk(b"tEXt", bytes(MAX_METADATA + 1))))
    segment = b"\xff\xe1" + struct.pack(">H", 65_535) + bytes(65_533)
    picture = saved("JPEG")
    assert "metadata" in refusal(picture[:2] + segment * 40 + picture[2:])


@pytest.mark.parametrize("form", ["PNG", "JPEG", "WEBP"])
def test_truncated_files_are_refused_or_left_to_the_decoder_but_never_fail_otherwise(form):
    content = saved(form)
    for end in range(1, len(content)):
        try:
            upload(content[:end], "image")
        except ApiError as error:
            assert error.status == 400


@pytest.mark.parametrize("form", ["PNG", "JPEG", "WEBP"])
def test_any_byte_may_be_wrong(form):
    content = saved(form)
    for place in range(len(content)):
        for byte in (0, 255):
            try:
                upload(content[:place] + bytes([byte]) + content[place + 1 :], "image")
            except ApiError as error:
                assert error.status == 400


def test_records_are_written_into_all_three_formats():
    image, record = Image.new("RGB", (32, 32)), '{"stylefast":"0"}'
    found = {form: Image.open(BytesIO(encoded(image, form, 90, record, "a fish"))) for form in ("png", "jpeg", "webp")}
    text = dict(found["png"].text)
    assert text.pop(PNG_KEYWORD) and text == {"stylefast": record, "parameters": "a fish"}
    assert found["jpeg"].info["comment"] == record.encode()
    assert found["webp"].getexif()[0x010E] == record
    for form in ("jpeg", "webp"):
        comment = found[form].getexif().get_ifd(0x8769)[0x9286]
        assert comment == b"UNICODE\0" + "a fish".encode("utf-16-be")


@pytest.mark.parametrize("length", [60_000, 60_001, 1_000_000, 1_100_000])
@pytest.mark.parametrize("form", ["png", "webp"])
def test_long_records_are_read_back(tmp_path, form, length):
    record = '{"stylefast":"0","index":0,"fingerprint":"a","call":{"requests":[1]},"more":"' + "x" * length + '"}'
    path = tmp_path / f"one.{form}"
    path.write_bytes(encoded(Image.new("RGB", (32, 32)), form, 90, record, None))
    assert read_metadata(path)[0]["more"] == "x" * length
    upload(path.read_bytes(), "image")


def test_too_much_text_for_jpeg_is_left_out_of_it():
    found = Image.open(BytesIO(encoded(Image.new("RGB", (32, 32)), "jpeg", 90, "x" * 70_000, "y" * 70_000)))
    assert "comment" not in found.info and not found.getexif()


def test_a_text_chunk_is_as_it_was():
    info = PngInfo()
    info.add_text("a", "b")
    assert upload(saved("PNG", pnginfo=info), "image").kind == "png"
