"""Certificates that nobody vouches for, with the extensions that C2PA asks for."""

from datetime import UTC, datetime, timedelta

from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec, ed25519, rsa
from cryptography.x509.oid import ExtendedKeyUsageOID, NameOID

KEYS = {
    "es256": lambda: ec.generate_private_key(ec.SECP256R1()),
    "es384": lambda: ec.generate_private_key(ec.SECP384R1()),
    "ed25519": ed25519.Ed25519PrivateKey.generate,
    "ps256": lambda: rsa.generate_private_key(65537, 2048),
}


def _name(text):
    parts = ((NameOID.COMMON_NAME, text), (NameOID.ORGANIZATION_NAME, "stylefast tests"))
    return x509.Name([x509.NameAttribute(kind, value) for kind, value in parts])


def _usage(**allowed):
    names = ("digital_signature", "content_commitment", "key_encipherment", "data_encipherment", "key_agreement")
    names += ("key_cert_sign", "crl_sign", "encipher_only", "decipher_only")
    return x509.KeyUsage(**{name: allowed.get(name, False) for name in names})


def _begun(subject, issuer, key, start, end):
    begun = x509.CertificateBuilder().subject_name(_name(subject)).issuer_name(_name(issuer)).public_key(key)
    return begun.serial_number(x509.random_serial_number()).not_valid_before(start).not_valid_after(end)


def write_chain(folder, kind="es256", *, begins=-1, ends=30, usage=ExtendedKeyUsageOID.EMAIL_PROTECTION, password=None):
    """Write chain.pem and key.pem into a folder; return both paths. begins, ends: days from now."""
    now = datetime.now(UTC)
    start, end = now + timedelta(days=begins), now + timedelta(days=ends)
    root_key, key = ec.generate_private_key(ec.SECP256R1()), KEYS[kind]()
    root = _begun("a root", "a root", root_key.public_key(), start, end)
    root = root.add_extension(x509.BasicConstraints(True, None), True)
    root = root.add_extension(_usage(key_cert_sign=True, crl_sign=True), True).sign(root_key, hashes.SHA256())
    leaf = _begun("a signer", "a root", key.public_key(), start, end)
    leaf = leaf.add_extension(x509.BasicConstraints(False, None), True)
    leaf = leaf.add_extension(_usage(digital_signature=True), True)
    leaf = leaf.add_extension(x509.ExtendedKeyUsage([usage]), False)
    by = x509.AuthorityKeyIdentifier.from_issuer_public_key(root_key.public_key())
    leaf = leaf.add_extension(by, False).sign(root_key, hashes.SHA256())
    pem = serialization.Encoding.PEM
    chain, secret = folder / "chain.pem", folder / "key.pem"
    chain.write_bytes(leaf.public_bytes(pem) + root.public_bytes(pem))
    locked = serialization.BestAvailableEncryption(password) if password else serialization.NoEncryption()
    secret.write_bytes(key.private_bytes(pem, serialization.PrivateFormat.PKCS8, locked))
    return chain, secret
