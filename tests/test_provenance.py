"""Pictures say that they were generated, in words that others read, and sign it where there is a certificate."""

import json
import shutil
import struct
import subprocess
from datetime import UTC, datetime, timedelta
from io import BytesIO
from xml.etree import ElementTree

import pytest
from cryptography.x509.oid import ExtendedKeyUsageOID
from PIL import Image, ImageChops

import stylefast
from stylefast import provenance
from stylefast.errors import InvalidRequest, MissingDependency, StyleFastError
from stylefast.provenance import MARKED, SOURCE_TYPE, Provenance, Signer
from tests.support.certificates import KEYS, write_chain

FORMS = ("png", "jpeg", "webp")
EXTENSION = "{http://iptc.org/std/Iptc4xmpExt/2008-02-29/}DigitalSourceType"


def picture():
    return Image.linear_gradient("L").resize((64, 48)).convert("RGB")


def packet(content, form):
    """Return the XMP packet of a file, found by the file's own structure; None if there is none."""
    found = []
    if form == "png":
        place = 8
        while place < len(content):
            length, kind = struct.unpack_from(">I4s", content, place)
            if kind == b"iTXt" and content[place + 8 :].startswith(b"XML:com.adobe.xmp\0\0\0\0\0"):
                found.append(content[place + 8 + 22 : place + 8 + length])
            place += 12 + length
    elif form == "jpeg":
        place = 2
        while content[place + 1] != 0xDA:
            (length,) = struct.unpack_from(">H", content, place + 2)
            segment = content[place + 4 : place + 2 + length]
            if content[place + 1] == 0xE1 and segment.startswith(b"http://ns.adobe.com/xap/1.0/\0"):
                found.append(segment[29:])
            place += 2 + length
    else:
        place = 12
        while place < len(content):
            kind, length = struct.unpack_from("<4sI", content, place)
            if kind == b"XMP ":
                found.append(content[place + 8 : place + 8 + length])
            if kind == b"VP8X":
                assert content[place + 8] & 0x04, "the header says nothing of XMP"
            place += 8 + length + length % 2
    assert len(found) <= 1
    return found[0] if found else None


@pytest.mark.parametrize("form", FORMS)
def test_every_form_has_the_mark_where_xmp_belongs(form):
    content = Provenance().encode(picture(), form)
    root = ElementTree.fromstring(packet(content, form).decode())
    assert [one.text for one in root.iter(EXTENSION)] == [SOURCE_TYPE]
    assert f"stylefast {stylefast.__version__}" in [one.text for one in root.iter()]
    with Image.open(BytesIO(content)) as opened:
        assert SOURCE_TYPE.encode() in opened.info["xmp"]


@pytest.mark.parametrize("form", FORMS)
def test_the_mark_can_be_left_out_and_changes_no_pixel(form):
    plain, marked = (Provenance(mark).encode(picture(), form) for mark in (False, True))
    assert packet(plain, form) is None
    assert Image.open(BytesIO(plain)).tobytes() == Image.open(BytesIO(marked)).tobytes()


@pytest.mark.skipif(shutil.which("exiftool") is None, reason="exiftool is not installed")
@pytest.mark.parametrize("form", FORMS)
def test_exiftool_finds_the_marks(tmp_path, chain, form):
    signed = Provenance.of(certificate=str(chain[0]), key=str(chain[1]))
    for made in (MARKED, signed):
        path = tmp_path / f"one.{form}"
        path.write_bytes(made.encode(picture(), form))
        words = ["exiftool", "-json", "-G", "-XMP:DigitalSourceType", "-JUMBF:ActionsAction", "-Warning", str(path)]
        (found,) = json.loads(subprocess.run(words, capture_output=True, check=True).stdout)
        assert found.pop("XMP:DigitalSourceType") == SOURCE_TYPE
        # it knows no signatures in WebP, at least in 12.57
        seen = None if made is MARKED or form == "webp" else "c2pa.created"
        assert found.pop("JUMBF:ActionsAction", None) == seen
        assert list(found) == ["SourceFile"]


@pytest.fixture(scope="module")
def chain(tmp_path_factory):
    return write_chain(tmp_path_factory.mktemp("chain"))


def read(content, form):
    """Return the active manifest of a file, whose signature must fit; nobody trusts its root."""
    from c2pa import Reader

    with Reader(f"image/{form}", BytesIO(content)) as reader:
        found = json.loads(reader.json())
    problems = [one["code"] for one in found.get("validation_status", ())]
    return found["manifests"][found["active_manifest"]], found["validation_state"], problems


@pytest.mark.parametrize("form", FORMS)
def test_a_signed_picture_claims_that_a_model_made_it(chain, form):
    content = Provenance.of(certificate=str(chain[0]), key=str(chain[1]), require=True).encode(picture(), form)
    manifest, state, problems = read(content, form)
    assert state == "Valid" and problems == ["signingCredential.untrusted"]
    (stated,) = [one for one in manifest["assertions"] if one["label"].startswith("c2pa.actions")]
    actions = stated["data"]["actions"]
    assert stated["created"]  # by the signer, where others would be gathered
    assert [one["action"] for one in actions] == ["c2pa.created"]
    assert actions[0]["digitalSourceType"] == SOURCE_TYPE
    assert actions[0]["softwareAgent"] == {"name": "stylefast", "version": stylefast.__version__}
    assert packet(content, form) is not None
    difference = ImageChops.difference(Image.open(BytesIO(content)), Image.open(BytesIO(_plain(form))))
    assert difference.getbbox() is None


def _plain(form):
    return Provenance().encode(picture(), form)


@pytest.mark.parametrize("form", FORMS)
def test_what_is_altered_after_signing_is_noticed(chain, form):
    content = bytearray(Provenance.of(certificate=str(chain[0]), key=str(chain[1])).encode(picture(), form))
    place = content.index(SOURCE_TYPE.encode(), content.index(b"Iptc4xmpExt:DigitalSourceType"))
    content[place] ^= 1
    _, state, problems = read(bytes(content), form)
    assert state == "Invalid" and "assertion.dataHash.mismatch" in problems


@pytest.mark.parametrize("kind", sorted(set(KEYS) - {"es256"}))
def test_keys_of_other_kinds_sign_too(tmp_path, kind):
    chain = write_chain(tmp_path, kind)
    signer = Signer.of(*chain)
    assert signer.algorithm == kind
    assert read(Provenance(signer=signer).encode(picture(), "png"), "png")[1] == "Valid"


def test_previews_are_marked_but_not_signed(chain):
    content = Provenance.of(certificate=str(chain[0]), key=str(chain[1])).encode(picture(), "png", sign=False)
    assert packet(content, "png") is not None and b"caBX" not in content


def refusal(**settings):
    with pytest.raises(InvalidRequest) as caught:
        Provenance.of(
            **{name: str(value) if name in ("certificate", "key") else value for name, value in settings.items()}
        )
    return str(caught.value)


def test_settings_that_contradict_one_another_are_refused(chain):
    assert "--c2pa-certificate and --c2pa-key" in refusal(require=True)
    assert "contradict" in refusal(require=True, marked=False)
    assert "contradict" in refusal(marked=False, certificate=chain[0], key=chain[1])
    assert "give --c2pa-key too" in refusal(certificate=chain[0])
    assert "give --c2pa-certificate too" in refusal(key=chain[1])
    assert Provenance.of() == Provenance() and Provenance.of(False) == Provenance(False)


def test_files_that_are_wrong_are_refused_by_name(chain, tmp_path):
    for folder in ("other", "late", "early", "server", "locked"):
        (tmp_path / folder).mkdir()
    missing, other = tmp_path / "none.pem", write_chain(tmp_path / "other")
    assert "No such file" in refusal(certificate=missing, key=chain[1])
    assert "no certificate in PEM" in refusal(certificate=chain[1], key=chain[1])
    assert "no private key in PEM" in refusal(certificate=chain[0], key=chain[0])
    assert "not that of the first certificate" in refusal(certificate=chain[0], key=other[1])
    large = tmp_path / "large.pem"
    large.write_bytes(bytes(2**20 + 1))
    assert "1048576 bytes" in refusal(certificate=large, key=chain[1])
    expired = write_chain(tmp_path / "late", begins=-9, ends=-1)
    assert "expired on" in refusal(certificate=expired[0], key=expired[1])
    early = write_chain(tmp_path / "early", begins=2)
    assert "valid from" in refusal(certificate=early[0], key=early[1])
    server = write_chain(tmp_path / "server", usage=ExtendedKeyUsageOID.SERVER_AUTH)
    assert "can't sign pictures" in refusal(certificate=server[0], key=server[1])
    locked = write_chain(tmp_path / "locked", password=b"secret")
    assert "is encrypted; decrypt it" in refusal(certificate=locked[0], key=locked[1])


def test_a_certificate_that_expires_later_stops_signing(chain, monkeypatch):
    signer = Signer.of(*chain)

    class Later(datetime):
        @classmethod
        def now(cls, zone=None):
            return super().now(zone) + timedelta(days=40)

    assert 29 * 86_400 < Provenance(signer=signer).seconds_left() < 30 * 86_400
    monkeypatch.setattr(provenance, "datetime", Later)
    with pytest.raises(StyleFastError, match=f"expired on {datetime.now(UTC).year}"):
        Provenance(signer=signer).encode(picture(), "png")
    assert Provenance(signer=signer).seconds_left() < 0


def test_without_the_package_there_is_a_way_out(chain, monkeypatch):
    monkeypatch.setattr(provenance, "find_spec", lambda name: None)
    with pytest.raises(MissingDependency, match=r"pip install 'stylefast\[provenance\]'"):
        Provenance.of(certificate=str(chain[0]), key=str(chain[1]))
