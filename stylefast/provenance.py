"""Marks that tell that a picture was generated: IPTC's word for it in XMP, and a C2PA signature.

XMP is plain text, which any program may read and remove. The signature needs a certificate; it covers the whole file
with its records, so it is made last, and nothing is altered after it.
"""

import json
import math
from dataclasses import dataclass
from datetime import UTC, datetime
from importlib.util import find_spec
from io import BytesIO
from pathlib import Path
from typing import Any

from PIL import Image
from PIL.PngImagePlugin import PngInfo

import stylefast
from stylefast.errors import InvalidRequest, MissingDependency, StyleFastError
from stylefast.values import quoted, typed_path

# https://cv.iptc.org/newscodes/digitalsourcetype: made by a model alone
SOURCE_TYPE = "http://cv.iptc.org/newscodes/digitalsourcetype/trainedAlgorithmicMedia"
PNG_KEYWORD, JPEG_NAME = "XML:com.adobe.xmp", b"http://ns.adobe.com/xap/1.0/\0"
_XMP = f"""<?xpacket begin="\ufeff" id="W5M0MpCehiHzreSzNTczkc9d"?>
<x:xmpmeta xmlns:x="adobe:ns:meta/">
 <rdf:RDF xmlns:rdf="http://www.w3.org/1999/02/22-rdf-syntax-ns#">
  <rdf:Description rdf:about=""
    xmlns:xmp="http://ns.adobe.com/xap/1.0/"
    xmlns:Iptc4xmpExt="http://iptc.org/std/Iptc4xmpExt/2008-02-29/">
   <xmp:CreatorTool>stylefast {stylefast.__version__}</xmp:CreatorTool>
   <Iptc4xmpExt:DigitalSourceType>{SOURCE_TYPE}</Iptc4xmpExt:DigitalSourceType>
  </rdf:Description>
 </rdf:RDF>
</x:xmpmeta>
<?xpacket end="r"?>"""
_AGENT = {"name": "stylefast", "version": stylefast.__version__}
_MANIFEST = {
    "claim_generator_info": [_AGENT],
    "assertions": [
        {
            "label": "c2pa.actions.v2",
            "created": True,  # stated by the signer, and not gathered from elsewhere
            "data": {
                "actions": [{"action": "c2pa.created", "digitalSourceType": SOURCE_TYPE, "softwareAgent": _AGENT}]
            },
        }
    ],
}
# a picture is its own thumbnail; what it needs is in it, so nothing is asked of the network
_C2PA_SETTINGS = {"builder": {"thumbnail": {"enabled": False}}, "verify": {"remote_manifest_fetch": False}}
_MOST_PEM = 2**20  # bytes
_CURVES = {"secp256r1": "es256", "secp384r1": "es384", "secp521r1": "es512"}


@dataclass(frozen=True)
class Signer:
    """A certificate chain and its key, as C2PA's library takes them. `of` checks them."""

    chain: bytes
    key: bytes
    algorithm: str
    expires: datetime
    file: str  # for messages

    @classmethod
    def of(cls, certificate: str | Path, key: str | Path) -> "Signer":
        """Return the signer of two PEM files: a certificate with those that vouch for it, and its private key.

        Raises InvalidRequest for files that do not fit together, are out of date or not made for signing,
        MissingDependency without the package.
        """
        if find_spec("c2pa") is None:
            raise MissingDependency(
                "signing pictures needs the package c2pa-python; pip install 'stylefast[provenance]' brings it"
            )
        from cryptography.hazmat.primitives import serialization

        chain, given = _read("certificate", certificate), _read("key", key)
        first, private = _certificate(chain, certificate), _key(given, key)
        public = (serialization.Encoding.DER, serialization.PublicFormat.SubjectPublicKeyInfo)
        if private.public_key().public_bytes(*public) != first.public_key().public_bytes(*public):
            raise InvalidRequest(
                f"the C2PA key {quoted(str(key))} is not that of the first certificate in {quoted(str(certificate))}; "
                "give the two that belong together, the signer's own certificate first"
            )
        content = private.private_bytes(
            serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, serialization.NoEncryption()
        )
        made = cls(chain, content, _algorithm(private, key), first.not_valid_after_utc, str(certificate))
        if first.not_valid_before_utc > datetime.now(UTC):
            raise InvalidRequest(
                f"the C2PA certificate {quoted(made.file)} is valid from {first.not_valid_before_utc:%Y-%m-%d %H:%M} "
                "UTC on; give one that is valid now"
            )
        try:
            made.signed(_plain(Image.new("RGB", (16, 16)), "png", {}), "png")
        except StyleFastError as error:
            raise InvalidRequest(str(error)) from error
        return made

    def signed(self, content: bytes, form: str) -> bytes:
        """Return a picture's file with a signed claim that it was generated. Raises StyleFastError."""
        from c2pa import Builder, C2paError, C2paSignerInfo, Context
        from c2pa import Signer as Native

        if self.expires < datetime.now(UTC):
            raise StyleFastError(
                f"the C2PA certificate {quoted(self.file)} expired on {self.expires:%Y-%m-%d %H:%M} UTC; give a newer "
                "one, or leave it out for pictures without a signature"
            )
        out = BytesIO()
        try:
            signer = Native.from_info(C2paSignerInfo(self.algorithm, self.chain, self.key, None))
            builder = Builder(json.dumps(_MANIFEST), Context.from_dict(_C2PA_SETTINGS))
            builder.sign(signer, f"image/{form}", BytesIO(content), out)
        except C2paError as error:
            raise StyleFastError(
                f"the C2PA certificate {quoted(self.file)} can't sign pictures ({quoted(str(error))}); it must be one "
                "for signing documents, with those that vouch for it behind it in the file"
            ) from error
        return out.getvalue()


@dataclass(frozen=True)
class Provenance:
    """Marks of finished pictures.

    marked: write IPTC's mark into their XMP. signer: signs them; None: they are not signed.
    """

    marked: bool = True
    signer: Signer | None = None

    @classmethod
    def of(
        cls, marked: bool = True, certificate: str | None = None, key: str | None = None, require: bool = False
    ) -> "Provenance":
        """Return the marks of settings; `require`: whether pictures must be signed.

        Raises InvalidRequest for settings that contradict one another, and what `Signer.of` raises.
        """
        if (certificate is None) != (key is None):
            lacks = "--c2pa-key" if key is None else "--c2pa-certificate"
            raise InvalidRequest(f"a C2PA signature needs a certificate and its key; give {lacks} too")
        if require and not marked:
            raise InvalidRequest("--require-provenance and --no-provenance contradict each other; drop one")
        if not marked and certificate is not None:
            raise InvalidRequest("--no-provenance and --c2pa-certificate contradict each other; drop one")
        if certificate is None or key is None:
            if require:
                raise InvalidRequest(
                    "--require-provenance asks for signed pictures, and there is no certificate; give "
                    "--c2pa-certificate and --c2pa-key"
                )
            return cls(marked)
        return cls(marked, Signer.of(certificate, key))

    def seconds_left(self) -> float:
        """Return the seconds until the signer's certificate expires, NaN without one."""
        return math.nan if self.signer is None else (self.signer.expires - datetime.now(UTC)).total_seconds()

    def encode(self, image: Image.Image, form: str, *, sign: bool = True, **options: Any) -> bytes:
        """Return a picture as "png", "jpeg" or "webp", marked and, if there is a signer, signed.

        sign: whether it is finished; options: for Pillow's `save`. Raises StyleFastError if it can't be signed.
        """
        content = _plain(image, form, _with_mark(form, options) if self.marked else options)
        return self.signer.signed(content, form) if sign and self.signer is not None else content


MARKED = Provenance()


def _plain(image: Image.Image, form: str, options: dict[str, Any]) -> bytes:
    stream = BytesIO()
    image.save(stream, form.upper(), **options)
    return stream.getvalue()


def _with_mark(form: str, options: dict[str, Any]) -> dict[str, Any]:
    if form == "png":
        info = options.get("pnginfo") or PngInfo()
        info.add_itxt(PNG_KEYWORD, _XMP)
        return {**options, "pnginfo": info}
    packet = _XMP.encode("utf-8")
    if form == "webp":
        return {**options, "xmp": packet}
    # written here, since older versions of Pillow don't take XMP for JPEG
    return {**options, "extra": b"\xff\xe1" + (2 + len(JPEG_NAME + packet)).to_bytes(2, "big") + JPEG_NAME + packet}


def _read(what: str, file: str | Path) -> bytes:
    path = typed_path(f"--c2pa-{what}", str(file))
    try:
        with path.open("rb") as stream:
            content = stream.read(_MOST_PEM + 1)
    except OSError as error:
        raise InvalidRequest(
            f"the C2PA {what} {quoted(str(file))} can't be read ({error.strerror or error}); check the path"
        ) from error
    if len(content) > _MOST_PEM:
        raise InvalidRequest(f"the C2PA {what} {quoted(str(file))} has more than {_MOST_PEM} bytes; give a PEM file")
    return content


def _certificate(content: bytes, file: str | Path) -> Any:
    from cryptography import x509

    try:
        return x509.load_pem_x509_certificates(content)[0]
    except (ValueError, IndexError) as error:
        raise InvalidRequest(f"the C2PA certificate {quoted(str(file))} has no certificate in PEM format") from error


def _key(content: bytes, file: str | Path) -> Any:
    from cryptography.exceptions import UnsupportedAlgorithm
    from cryptography.hazmat.primitives.serialization import load_pem_private_key

    try:
        return load_pem_private_key(content, None)
    except TypeError:
        raise InvalidRequest(
            f"the C2PA key {quoted(str(file))} is encrypted; decrypt it: openssl pkey -in KEY -out PLAIN"
        ) from None
    except (ValueError, UnsupportedAlgorithm) as error:
        raise InvalidRequest(f"the C2PA key {quoted(str(file))} is no private key in PEM format") from error


def _algorithm(key: Any, file: str | Path) -> str:
    from cryptography.hazmat.primitives.asymmetric import ec, ed25519, rsa

    found = None
    if isinstance(key, ec.EllipticCurvePrivateKey):
        found = _CURVES.get(key.curve.name)
    elif isinstance(key, rsa.RSAPrivateKey):
        found = "ps256" if key.key_size >= 2048 else None
    elif isinstance(key, ed25519.Ed25519PrivateKey):
        found = "ed25519"
    if found is None:
        raise InvalidRequest(
            f"the C2PA key {quoted(str(file))} is of a kind that C2PA does not know; it may be EC on P-256, P-384 or "
            "P-521, RSA from 2048 bits on, or Ed25519"
        )
    return found
