"""Settings of the service: the one list behind the command line, the environment, the file and the documentation."""

import ipaddress
import os
import re
import tomllib
from collections.abc import Mapping, Sequence
from dataclasses import MISSING, dataclass, field, fields
from pathlib import Path
from typing import Any

from stylefast import values
from stylefast.errors import InvalidRequest
from stylefast.options import parse_bytes

PREFIX = "STYLEFAST_SERVE_"
# keys stand in files and in the environment, where other users of the machine don't see them
_SECRET = ("api_keys", "admin_keys")
_HOST = re.compile(r"(?:\*\.)?[A-Za-z0-9_](?:[A-Za-z0-9_.-]*[A-Za-z0-9_])?(?::[0-9]{1,5})?")
_URL = re.compile(r"https?://[A-Za-z0-9._:\[\]-]+(?:/[A-Za-z0-9._~/-]*)?")
_ATTRIBUTE = re.compile(r"\w+(?:\.\w+)*:\w+(?:\.\w+)*")
_LEAST_KEY = 16  # characters
_KEY = re.compile(r"[!-~]+")
_PATHS = ("styles_dir", "c2pa_certificate", "c2pa_key")


def _setting(default: Any, text: str, shown: str = "", kind: str = "text", flag: str | None = None) -> Any:
    """Declare a setting.

    text: its description. shown: what the command line calls its value. kind: "text", "whole", "seconds", "bytes",
    "flag", "list" or "hosts". flag: on the command line, if not named after the setting.
    """
    extra: dict[str, Any] = {"text": text, "shown": shown, "kind": kind, "flag": flag}
    if isinstance(default, list):
        return field(default_factory=tuple, metadata=extra)
    return field(default=default, metadata=extra)


@dataclass(frozen=True, kw_only=True)
class ServeSettings:
    """Settings of `stylefast serve`. Raises InvalidRequest for values that a setting can't have."""

    host: str = _setting("127.0.0.1", "address to listen on", "ADDRESS")
    port: int = _setting(8000, "port to listen on; 0 takes a free one", "PORT", "whole")
    served_model_name: str | None = _setting(None, "name of the model for clients (default: its own)", "NAME")
    accept_any_model: bool = _setting(False, "serve the model whatever name a request gives", kind="flag")
    api_keys: Sequence[str] = _setting([], "keys of clients, each NAME:KEY or KEY; none: no key is needed", kind="list")
    admin_keys: Sequence[str] = _setting([], "keys for what changes the server", kind="list")
    no_auth: bool = _setting(False, "serve without keys on an address that others reach", kind="flag")
    open_metrics: bool = _setting(False, "serve /metrics without a key", kind="flag")
    max_running: int = _setting(8, "pictures that are with the engine at once", "N", "whole")
    max_waiting: int = _setting(64, "requests that may wait; further ones get 429", "N", "whole")
    max_per_key: int = _setting(0, "pictures that one key may have on their way; 0: any number", "N", "whole")
    deadline: float = _setting(600.0, "seconds that a request may take, waiting included", "SECONDS", "seconds")
    grace: float = _setting(30.0, "seconds that requests get to finish after SIGTERM", "SECONDS", "seconds")
    body_limit: int = _setting(64 * 2**20, "bytes of a request's body", "BYTES", "bytes")
    body_timeout: float = _setting(
        30.0, "seconds without news of a body after which it is given up", "SECONDS", "seconds"
    )
    keep_results: float = _setting(600.0, "seconds that the state of a finished request is kept", "SECONDS", "seconds")
    styles_dir: str | None = _setting(
        None, "folder of registered styles, which requests may name (--styles)", "DIR", flag="--styles"
    )
    link_seconds: float = _setting(
        3600.0, "seconds that pictures are kept for response_format url", "SECONDS", "seconds"
    )
    link_bytes: int = _setting(256 * 2**20, "bytes of pictures kept for response_format url", "BYTES", "bytes")
    public_url: str | None = _setting(
        None, "address of the server for links to pictures (default: that of the request)", "URL"
    )
    safety: str | None = _setting(None, "checks of requests and pictures, a class or object", "MODULE:ATTRIBUTE")
    allow_image_urls: bool = _setting(False, "fetch pictures that requests name by their address", kind="flag")
    image_url_hosts: Sequence[str] = _setting(
        [], "hosts that pictures are fetched from, such as *.example.com; none: all public ones", "HOSTS", "hosts"
    )
    no_provenance: bool = _setting(False, "leave out IPTC's mark for generated pictures", kind="flag")
    c2pa_certificate: str | None = _setting(None, "PEM file with the certificates that sign pictures", "FILE")
    c2pa_key: str | None = _setting(None, "PEM file with the private key of c2pa_certificate", "FILE")
    require_provenance: bool = _setting(False, "refuse to start if pictures would not be signed", kind="flag")
    no_warm_up: bool = _setting(False, "be ready before a first picture was made", kind="flag")
    log_format: str = _setting("json", "json or text", "FORMAT")

    def __post_init__(self):
        for f in fields(self):
            object.__setattr__(self, f.name, _checked(f.name, f.metadata["kind"], getattr(self, f.name), f.default))
        if self.max_running < 1 or self.max_waiting < 0 or self.max_per_key < 0:
            raise InvalidRequest("max_running must be at least 1, max_waiting and max_per_key at least 0")
        if self.styles_dir is not None and not values.typed_path("styles_dir", self.styles_dir).is_dir():
            raise InvalidRequest(f"styles_dir is {values.quoted(self.styles_dir)}, and that is no folder; create it")
        if self.public_url is not None and not _URL.fullmatch(self.public_url):
            raise InvalidRequest(
                f"public_url is {values.quoted(self.public_url)}; it must be like https://pictures.example.com/service"
            )
        if self.safety is not None and not _ATTRIBUTE.fullmatch(self.safety):
            raise InvalidRequest(f"safety is {values.quoted(self.safety)}; it must be MODULE:ATTRIBUTE")
        if self.image_url_hosts and not self.allow_image_urls:
            raise InvalidRequest("image_url_hosts says where pictures are fetched from; give --allow-image-urls too")
        values.one_of("log_format", self.log_format, ("json", "text"))
        if not (self.api_keys or self.no_auth or _is_loopback(self.host)):
            raise InvalidRequest(
                f"others reach {self.host}, and there are no API keys; set {PREFIX}API_KEYS, or give --no-auth if "
                "something in front of the server checks them"
            )

    @classmethod
    def of(
        cls,
        flags: Mapping[str, Any],
        environment: Mapping[str, str] = os.environ,
        file: str | Path | None = None,
    ) -> "ServeSettings":
        """Return the settings of flags, which count first, of the environment, and of a TOML file.

        Raises InvalidRequest for unknown names too.
        """
        known = {f.name: f.metadata["kind"] for f in fields(cls)}
        found = {} if file is None else _of_file(file, known)
        for variable, text in environment.items():
            if not variable.startswith(PREFIX):
                continue
            name = variable.removeprefix(PREFIX).lower()
            if name == "config":
                continue
            if name not in known:
                raise InvalidRequest(f"{variable} is no setting{values.did_you_mean(name, known)}")
            found[name] = _of_text(text, known[name])
        return cls(**{**found, **{name: value for name, value in flags.items() if value is not None}})

    @classmethod
    def flags(cls) -> dict[str, Mapping[str, Any]]:
        """Return the settings that the command line takes: name -> text, shown, kind, default."""
        return {
            f.name: {**f.metadata, "default": None if f.default is MISSING else f.default}
            for f in fields(cls)
            if f.name not in _SECRET
        }


def _of_file(file: str | Path, known: Mapping[str, str]) -> dict[str, Any]:
    path = values.typed_path("--config", os.fspath(file))
    try:
        with path.open("rb") as stream:
            found = tomllib.load(stream)
    except OSError as error:
        raise InvalidRequest(f"--config: {path} can't be read ({error.strerror or error})") from None
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise InvalidRequest(f"--config: {path} is not TOML ({error})") from None
    for name in found:
        if name not in known:
            raise InvalidRequest(f"{path}: {values.quoted(name)} is no setting{values.did_you_mean(name, known)}")
    return found


def _of_text(text: str, kind: str) -> Any:
    if kind in ("list", "hosts"):
        return tuple(part.strip() for part in text.replace("\n", ",").split(",") if part.strip())
    if kind == "flag":
        return {"1": True, "true": True, "yes": True, "0": False, "false": False, "no": False, "": False}.get(
            text.strip().lower(), text
        )
    if kind in ("whole", "seconds"):
        try:
            return int(text) if kind == "whole" else float(text)
        except ValueError:
            return text
    return text


def _checked(name: str, kind: str, value: Any, default: Any) -> Any:
    if value is None and default is None:
        return None
    if kind == "flag":
        return values.flag(name, value)
    if kind == "whole":
        return values.whole_number(name, value, 0, 65535 if name == "port" else 1_000_000)
    if kind == "seconds":
        return values.real_number(name, value, above=0, high=86_400)
    if kind == "bytes":
        return parse_bytes(name, value)
    if kind == "hosts":
        hosts = _of_text(value, kind) if isinstance(value, str) else tuple(values.several(name, value))
        for host in hosts:
            if not isinstance(host, str) or not _HOST.fullmatch(host):
                raise InvalidRequest(
                    f"{name} has {values.quoted(host)}; write example.com, *.example.com or example.com:8080"
                )
        return hosts
    if kind == "list":
        keys = tuple(values.text(name, key, longest=values.QUOTED, empty=False) for key in values.several(name, value))
        if any(len(key.rpartition(":")[2]) < _LEAST_KEY for key in keys):
            raise InvalidRequest(f"{name} has a key of fewer than {_LEAST_KEY} characters; use a longer one")
        if not all(_KEY.fullmatch(key.rpartition(":")[2]) for key in keys):
            raise InvalidRequest(f"{name} has a key that no header can carry; use letters, digits and signs of ASCII")
        return keys
    return values.text(name, value, longest=values.PATH_BYTES if name in _PATHS else values.QUOTED, empty=False)


def _is_loopback(host: str) -> bool:
    if host == "localhost":
        return True
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return False
