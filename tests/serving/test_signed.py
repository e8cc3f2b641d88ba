"""A server with a certificate: every picture is signed, and still has the record that makes it again."""

import base64
import io
import json
import urllib.request

import pytest
from PIL import Image

from stylefast import cli
from stylefast.provenance import SOURCE_TYPE
from tests.serving.conftest import WAIT, serving
from tests.support.certificates import write_chain
from tests.test_provenance import FORMS, packet, read


@pytest.fixture(scope="module")
def chain(tmp_path_factory):
    return write_chain(tmp_path_factory.mktemp("chain"))


@pytest.fixture(scope="module")
def signing(chain):
    words = ("--c2pa-certificate", chain[0], "--c2pa-key", chain[1], "--require-provenance")
    with serving(*words) as running:
        yield running


@pytest.fixture(scope="module")
def signed(signing):
    from openai import OpenAI

    return OpenAI(base_url=signing.url + "/v1", api_key="none", timeout=WAIT, max_retries=0)


def content_of(reply):
    return base64.b64decode(reply.data[0].b64_json)


@pytest.mark.parametrize("form", FORMS)
def test_the_record_survives_signing_and_makes_the_same_picture(signed, form, tmp_path, capsys):
    own = {"stylefast": {"seed": 4, "steps": 2}}
    content = content_of(signed.images.generate(prompt="a fish", output_format=form, extra_body=own))
    assert read(content, form)[1] == "Valid" and packet(content, form) is not None
    path, again = tmp_path / f"one.{form}", tmp_path / "again.png"
    path.write_bytes(content)
    assert cli.main(["generate", "--from", str(path), "--out", str(again)]) == 0
    if form == "png":
        assert "same pixels" in capsys.readouterr().err
    lossless = content_of(signed.images.generate(prompt="a fish", extra_body=own))
    with Image.open(again) as ours, Image.open(io.BytesIO(lossless)) as theirs:
        assert ours.tobytes() == theirs.tobytes()


def test_the_other_routes_sign_too(signing, signed):
    events = signed.images.generate(
        prompt="a fish", stream=True, partial_images=1, extra_body={"stylefast": {"steps": 4}}
    )
    partial, last = (base64.b64decode(event.b64_json) for event in events)
    assert packet(partial, "png") is not None and b"caBX" not in partial
    assert read(last, "png")[1] == "Valid"
    body = json.dumps({"prompt": "a fish", "steps": 2, "width": 64, "height": 64}).encode()
    asked = urllib.request.Request(f"{signing.url}/sdapi/v1/txt2img", body, {"content-type": "application/json"})
    with urllib.request.urlopen(asked, timeout=WAIT) as reply:
        content = base64.b64decode(json.load(reply)["images"][0])
    assert read(content, "png")[1] == "Valid"


def test_the_metrics_say_how_long_the_certificate_is_valid(signing):
    page = signing.get("/metrics")[1].decode()
    (line,) = [line for line in page.splitlines() if line.startswith("stylefast:certificate_seconds")]
    assert 29 * 86_400 < float(line.split()[1]) < 30 * 86_400


def test_a_server_without_a_certificate_marks_its_pictures(client):
    content = content_of(client.images.generate(prompt="a fish", extra_body={"stylefast": {"steps": 2}}))
    assert SOURCE_TYPE.encode() in packet(content, "png") and b"caBX" not in content


def test_the_mark_can_be_switched_off(tmp_path):
    from openai import OpenAI

    with serving("--no-provenance", "--no-warm-up") as running:
        plain = OpenAI(base_url=running.url + "/v1", api_key="none", timeout=WAIT, max_retries=0)
        content = content_of(plain.images.generate(prompt="a fish", extra_body={"stylefast": {"steps": 2}}))
    assert packet(content, "png") is None


@pytest.mark.parametrize(
    "words, said",
    [
        (["--require-provenance"], "give --c2pa-certificate and --c2pa-key"),
        (["--c2pa-certificate", "none.pem"], "give --c2pa-key too"),
        (["--c2pa-certificate", "none.pem", "--c2pa-key", "none.pem"], "can't be read"),
    ],
)
def test_what_can_not_be_signed_is_said_before_the_start(words, said, capsys):
    for command in (["serve", "--port", "0"], ["generate", "a fish"]):
        assert cli.main([*command, *words]) == 2
        err = capsys.readouterr().err
        assert said in err and err.count("\n") <= 2


def test_the_command_line_marks_and_signs_the_same_way(chain, tmp_path, capsys):
    def made(name, *words):
        path = tmp_path / name
        assert cli.main(["generate", "a fish", "--steps", "2", "--quiet", "--out", str(path), *map(str, words)]) == 0
        return path.read_bytes()

    assert packet(made("a.png"), "png") is not None and packet(made("a.jpg"), "jpeg") is not None
    assert packet(made("b.png", "--no-provenance"), "png") is None
    for name, form in (("c.png", "png"), ("c.jpg", "jpeg")):
        words = ("--c2pa-certificate", chain[0], "--c2pa-key", chain[1], "--require-provenance")
        assert read(made(name, *words), form)[1] == "Valid"
        capsys.readouterr()
        assert cli.main(["generate", "--from", str(tmp_path / name), "--out", str(tmp_path / f"again-{name}")]) == 0
        assert ("same pixels" if form == "png" else "not compared") in capsys.readouterr().err
