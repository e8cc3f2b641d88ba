"""Records hold uploads as the engine used them, so that `--from` makes the same picture."""

import base64
import io
import json

import numpy as np
import pytest
from PIL import Image

import stylefast as sf
from stylefast import cli
from stylefast.commands.files import png_info
from stylefast.record import from_record
from stylefast.record_values import pixel_digest
from stylefast.serving import engine_process, uploads
from stylefast.serving.media import encoded
from stylefast.serving.uploads import Uploads

INSTANT, ALIGNED = "InstantStyle", "StyleAligned"


@pytest.fixture(scope="module")
def engine():
    with sf.Engine.from_pretrained("tiny", device="cpu") as loaded:
        yield loaded


def photo(width=700, height=560):
    """A picture of much detail, above the size that records from memory hold."""
    noise = np.random.default_rng(1).integers(0, 256, (height // 4, width // 4, 3), np.uint8)
    image = Image.fromarray(noise).resize((width, height), Image.Resampling.BICUBIC)
    stream = io.BytesIO()
    image.save(stream, "PNG")
    return stream.getvalue()


def made(engine, content, style, size=(64, 64)):
    """Return the picture of a request with an upload, as the service makes it, its metadata, and the uploads."""
    request = {"prompt": "a fish", "steps": 2, "seed": 3, "size": list(size), "style": [style]}
    sent = Uploads([content], [request], engine)
    found = from_record({"requests": [request]}, sources=engine_process._served_sources(sent, engine))
    result = engine.generate(found)
    return result.images[0], {**result.metadata[0], "size": list(result.images[0].size), "load": {}}, sent


STYLES = [
    {"kind": INSTANT, "image": [{"upload": 0}]},
    {"kind": INSTANT, "image": {"upload": 0}, "crop": "squash"},
    {"kind": INSTANT, "image": {"upload": 0}, "crop": "pad"},
    {"kind": ALIGNED, "reference": {"upload": 0}},
]


@pytest.mark.parametrize("style", STYLES, ids=["center", "squash", "pad", "aligned"])
@pytest.mark.parametrize("shape", [(700, 560), (333, 911)], ids=["wide", "tall"])
def test_what_the_record_holds_gives_the_picture_of_the_whole_upload(engine, style, shape):
    content = photo(*shape)
    whole = Image.open(io.BytesIO(content))
    kinds = {INSTANT: sf.InstantStyle, ALIGNED: sf.StyleAligned}
    field = "image" if style["kind"] == INSTANT else "reference"
    own = kinds[style["kind"]](**{field: whole}, **({"crop": style["crop"]} if "crop" in style else {}))
    image, metadata, _ = made(engine, content, style, size=(64, 96))
    direct = engine.generate([sf.Request("a fish", steps=2, seed=3, size=(64, 96), style=own)]).images[0]
    assert image.tobytes() == direct.tobytes()
    again = engine.generate(from_record(metadata["call"])).images[0]
    assert again.tobytes() == image.tobytes()


def test_an_upload_with_several_uses_stays_whole(engine):
    request = {"size": [64, 64], "style": [STYLES[0], STYLES[3]]}
    assert Uploads([photo()], [request], engine).picture({"upload": 0}).size == (700, 560)
    sizes = [{"size": [64, 64], "style": [STYLES[3]]}, {"size": [96, 64], "style": [STYLES[3]]}]
    assert Uploads([photo()], sizes, engine).picture({"upload": 0}).size == (700, 560)
    small = photo(40, 40)
    assert Uploads([small], sizes[:1], engine).picture({"upload": 0}).size == (40, 40)


def saved(tmp_path, image, metadata):
    path = tmp_path / "one.png"
    image.save(path, pnginfo=png_info(metadata))
    return path


def test_above_the_limit_the_file_makes_the_picture_again(engine, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(uploads, "RECORD_LIMIT", 1000)
    content = photo()
    image, metadata, sent = made(engine, content, STYLES[0])
    (entry,) = metadata["call"]["styles"][0]["image"]
    digest = pixel_digest(Image.open(io.BytesIO(content)))
    assert entry == {"in_memory": "an upload of 700x560 pixels", "sha256": digest} and sent.short(metadata) is None
    path, file, other = saved(tmp_path, image, metadata), tmp_path / "photo.png", tmp_path / "other.png"
    words = ["generate", "--from", str(path), "--out", str(tmp_path / "again.png")]
    assert cli.main(words) == 2
    err = capsys.readouterr().err
    assert "an upload of 700x560 pixels" in err and digest[:12] in err and "--style-image FILE" in err
    Image.new("RGB", (32, 32)).save(other)
    assert cli.main([*words, "--style-image", str(other)]) == 2
    assert "give the very picture" in capsys.readouterr().err
    file.write_bytes(content)
    assert cli.main([*words, "--style-image", str(file)]) == 0
    assert "same pixels" in capsys.readouterr().err


def test_a_format_without_room_takes_the_record_with_digests(engine, tmp_path, capsys):
    content = photo()
    image, metadata, sent = made(engine, content, {"kind": ALIGNED, "reference": {"upload": 0}}, size=(256, 192))
    record, short = json.dumps(metadata), sent.short(metadata)
    assert len(record) > 65_533 > len(short)
    path, file, again = tmp_path / "one.jpg", tmp_path / "photo.png", tmp_path / "again.png"
    path.write_bytes(encoded(image, "jpeg", 90, record, None, short=short))
    file.write_bytes(content)
    words = ["generate", "--from", str(path), "--out", str(again)]
    assert cli.main(words) == 2 and "--style-image FILE" in capsys.readouterr().err
    assert cli.main([*words, "--style-image", str(file)]) == 0
    assert Image.open(again).tobytes() == image.tobytes()


def test_limits_hold_for_all_uploads_together(engine, monkeypatch):
    style = {"kind": INSTANT, "image": [{"upload": 0}, {"upload": 1}]}
    request = {"size": [64, 64], "style": [style]}
    one = len(uploads._png(Uploads([photo()], [request], engine).picture({"upload": 0})))
    monkeypatch.setattr(uploads, "RECORD_LIMIT", one + 1000)
    sent = Uploads([photo(), photo(560, 700)], [request], engine)
    assert [sent.picture({"upload": i}).size == size for i, size in enumerate(((700, 560), (560, 700)))] == [
        False,
        True,
    ]


def test_other_pictures_by_digest_may_be_given_too(tmp_path, capsys):
    noise = np.random.default_rng(0).integers(0, 256, (256, 256, 3), np.uint8)
    with sf.Engine.from_pretrained("tiny", device="cpu") as engine:
        result = engine.generate("a fish", steps=2, seed=1, style=sf.InstantStyle(Image.fromarray(noise)))
    path = saved(tmp_path, result.images[0], {**result.metadata[0], "size": list(result.images[0].size)})
    Image.fromarray(noise).save(tmp_path / "noise.png")
    words = ["generate", "--from", str(path), "--out", str(tmp_path / "again.png")]
    assert cli.main([*words, "--style-image", str(tmp_path / "noise.png")]) == 0
    assert "same pixels" in capsys.readouterr().err


def test_an_upload_of_a_client_is_in_the_record(client, tmp_path, capsys):
    reply = client.images.edit(image=photo(), prompt="a fish", extra_body={"stylefast": {"steps": 2, "seed": 4}})
    path = tmp_path / "one.png"
    path.write_bytes(base64.b64decode(reply.data[0].b64_json))
    assert cli.main(["generate", "--from", str(path), "--out", str(tmp_path / "again.png")]) == 0
    assert "same pixels" in capsys.readouterr().err
