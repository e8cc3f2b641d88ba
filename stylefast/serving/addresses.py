"""Pictures that requests name by their address on the web, for servers that allow it: the one place that fetches.

What a client writes is read once, by `parse`, which knows the plain forms alone. The host is resolved once, all its
addresses must be public, and the connection goes to such an address rather than to the name, so that nothing resolves
it again; who answers is checked too. No proxy, cookie or credential is ever used, and redirects start from the top.
"""

import asyncio
import ipaddress
import re
import ssl
from collections.abc import Awaitable, Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any
from urllib.parse import urljoin

import h11

import stylefast
from stylefast.serving import media
from stylefast.serving.replies import ApiError
from stylefast.values import quoted

SECONDS = 15.0  # for one picture, with all redirects
CONNECT_SECONDS = 2.5
MOST_REDIRECTS = 3
MOST_AT_ONCE = 4
MOST_ADDRESSES = 4  # of one host that are tried
LONGEST = 2048  # characters of an address
PORTS = (80, 443)
_PIECE = 2**16
_ADDRESS = re.compile(r"(https?)://([^/?#]*)([^#]*)(?:#.*)?", re.IGNORECASE)
_PLACE = re.compile(r"(?:\[([0-9A-Fa-f:.]{2,45})\]|([A-Za-z0-9.-]{1,253}))(?::([0-9]{1,5}))?")
_LABEL = re.compile(r"[A-Za-z0-9_](?:[A-Za-z0-9_-]{0,61}[A-Za-z0-9_])?")
_NUMBER = re.compile(r"[0-9]+|0[xX][0-9A-Fa-f]*")  # a last label that some readers take for part of an IPv4 address
_NAT64 = ipaddress.ip_network("64:ff9b::/96")
_MOVED = (301, 302, 303, 307, 308)

Address = ipaddress.IPv4Address | ipaddress.IPv6Address
# returns the addresses of a host's name as text
Resolve = Callable[[str, int], Awaitable[Sequence[str]]]


@dataclass(frozen=True)
class Place:
    """Place of a picture on the web. host: a name in small letters, or an IP address; target: path and query."""

    scheme: str
    host: str
    port: int
    target: str

    @property
    def authority(self) -> str:
        """Return host and port as the Host header has them."""
        host = f"[{self.host}]" if ":" in self.host else self.host
        return host if self.port == {"http": 80, "https": 443}[self.scheme] else f"{host}:{self.port}"


class NotAllowed(Exception):
    """An address is refused before anything is asked of it."""


class Failed(Exception):
    """The picture at an address can't be fetched, or is not of an accepted kind."""


def parse(text: str) -> Place:
    """Return the place that an address names. Raises NotAllowed for all but plain http and https."""
    if len(text) > LONGEST or not text.isascii() or not text.isprintable() or set(text) & set(' \\"<>^`{|}'):
        raise NotAllowed(f"it must have at most {LONGEST} characters, of those that addresses have")
    whole = _ADDRESS.fullmatch(text)
    if whole is None:
        raise NotAllowed("it must begin with http:// or https://")
    scheme, authority, target = whole[1].lower(), whole[2], whole[3]
    place = _PLACE.fullmatch(authority)
    if place is None:
        raise NotAllowed("its host must be a name or an IP address, without user, password and escapes")
    host = _host(place[1], place[2])
    port = {"http": 80, "https": 443}[scheme] if place[3] is None else int(place[3])
    if not 0 < port < 2**16:
        raise NotAllowed(f"its port is {port}")
    return Place(scheme, host, port, target if target.startswith("/") else f"/{target}")


def _host(inside: str | None, name: str) -> str:
    """Return a host in one spelling. Raises NotAllowed."""
    try:
        if inside is not None:
            return str(ipaddress.IPv6Address(inside))
        labels = name.split(".")
        if _NUMBER.fullmatch(labels[-1]):
            return str(ipaddress.IPv4Address(name))  # four decimal numbers, and no other spelling
    except ValueError:
        raise NotAllowed("its IP address must be in the usual spelling") from None
    if not all(_LABEL.fullmatch(label) for label in labels):
        raise NotAllowed("its host is no name")
    return name.lower()


def is_public(text: str) -> bool:
    """Return whether an IP address is one of the open internet."""
    try:
        address: Address = ipaddress.ip_address(text)
    except ValueError:
        return False
    if isinstance(address, ipaddress.IPv6Address):
        if address in _NAT64:
            return is_public(str(ipaddress.IPv4Address(int(address) & 0xFFFFFFFF)))
        # these hold an IPv4 address, and nobody needs them for a web server
        odd = address.ipv4_mapped or address.sixtofour or address.teredo or address.scope_id or address.is_site_local
        if odd or int(address) < 2**32:
            return False
    return address.is_global and not (address.is_multicast or address.is_reserved or address.is_unspecified)


async def resolve(host: str, port: int) -> Sequence[str]:
    """Return the addresses of a host, as the system knows them. Raises OSError."""
    found = await asyncio.get_running_loop().getaddrinfo(host, port, type=1)  # SOCK_STREAM
    return [str(entry[4][0]) for entry in found]


class Fetcher:
    """Client that fetches pictures from the web.

    hosts: names that are allowed, with `*.` in front for those below them, and a port behind if it is another than 80
    and 443; empty: all. resolving: returns a host's addresses; public: says of each whether it is allowed.
    """

    def __init__(
        self,
        hosts: Sequence[str] = (),
        *,
        resolving: Resolve = resolve,
        public: Callable[[str], bool] = is_public,
        context: ssl.SSLContext | None = None,
    ):
        self._hosts = [host.lower() for host in hosts]
        self._resolve, self._public = resolving, public
        self._context = context or ssl.create_default_context()
        self._turns = asyncio.Semaphore(MOST_AT_ONCE)

    async def picture(self, address: str, param: str, room: int = media.MAX_BYTES) -> media.Upload:
        """Return the picture at an address of at most `room` bytes; `param` names its field. Raises ApiError."""
        try:
            async with self._turns, asyncio.timeout(SECONDS):
                content = await self._content(address, min(room, media.MAX_BYTES))
        except NotAllowed as error:
            raise ApiError(
                400,
                f"{param}: {quoted(address)} is not fetched: {error}; send the picture itself, in base64",
                param=param,
                code="url_not_allowed",
            ) from None
        except (Failed, OSError, h11.ProtocolError, TimeoutError) as error:
            why = error if isinstance(error, Failed) else "there was no reply in time, or none that is HTTP"
            raise ApiError(
                400,
                f"{param}: {quoted(address)} could not be fetched: {why}; send the picture itself, in base64",
                param=param,
                code="url_failed",
            ) from None
        return media.upload(content, param)

    async def _content(self, address: str, room: int) -> bytes:
        for _ in range(MOST_REDIRECTS + 1):
            place = parse(address)
            self._check_listed(place)
            found = await self._ask(place, room)
            if isinstance(found, bytes):
                return found
            try:
                address = urljoin(f"{place.scheme}://{place.authority}{place.target}", found)
            except ValueError:
                raise NotAllowed("it leads to what is no address") from None
            if place.scheme == "https" and not address.lower().startswith("https:"):
                raise NotAllowed("it leads from https to something else")
        raise Failed(f"it leads on more than {MOST_REDIRECTS} times")

    def _check_listed(self, place: Place) -> None:
        named = [host for host in self._hosts if _covers(host, place)]
        if self._hosts and not named:
            raise NotAllowed("this server fetches from other hosts alone, those of its setting image_url_hosts")
        if place.port not in PORTS and not any(":" in host for host in named):
            raise NotAllowed(f"its port is {place.port}; {PORTS[0]} and {PORTS[1]} are allowed")

    async def _checked(self, place: Place) -> Sequence[str]:
        """Return the addresses of a host, all of which must be public. Raises NotAllowed."""
        try:
            ipaddress.ip_address(place.host)
            found: Sequence[str] = [place.host]
        except ValueError:
            try:
                async with asyncio.timeout(CONNECT_SECONDS):
                    found = await self._resolve(place.host, place.port)
            except TimeoutError:
                raise
            except OSError:
                found = []
        # one message for both, which tells nobody what names there are inside
        if not found or not all(map(self._public, found)):
            raise NotAllowed("its host has no address on the open internet")
        return list(dict.fromkeys(found))[:MOST_ADDRESSES]

    async def _connected(
        self, checked: Sequence[str], place: Place
    ) -> tuple[str, asyncio.StreamReader, asyncio.StreamWriter]:
        """Connect to the first of several addresses that answers, and return it too. Raises OSError."""
        tls: Mapping[str, Any] = {}
        if place.scheme == "https":
            tls = {"ssl": self._context, "server_hostname": place.host}
        failure = OSError()
        async with asyncio.timeout(CONNECT_SECONDS):
            for address in checked:
                try:
                    # a literal address, which nothing resolves
                    return address, *await asyncio.open_connection(address, place.port, limit=_PIECE, **tls)
                except OSError as error:
                    failure = error
        raise failure

    async def _ask(self, place: Place, room: int) -> bytes | str:
        """Return the content of a place, or the address that it leads to. Raises NotAllowed, Failed and OSError."""
        checked, reader, writer = await self._connected(await self._checked(place), place)
        try:
            peer = writer.get_extra_info("peername")[0]
            if peer != checked or not self._public(peer):
                raise NotAllowed("its host has no address on the open internet")
            return await _exchange(reader, writer, place, room)
        finally:
            writer.close()


def _covers(host: str, place: Place) -> bool:
    """Return whether an entry of the list of hosts covers a place."""
    name, _, port = host.partition(":")
    if port and int(port) != place.port:
        return False
    return place.host.endswith(name[1:]) if name.startswith("*.") else place.host == name


async def _exchange(reader: asyncio.StreamReader, writer: asyncio.StreamWriter, place: Place, room: int) -> bytes | str:
    connection = h11.Connection(h11.CLIENT, max_incomplete_event_size=_PIECE)
    headers = [
        ("Host", place.authority),
        ("User-Agent", f"stylefast/{stylefast.__version__}"),
        ("Accept", "image/png, image/jpeg, image/webp"),
        ("Accept-Encoding", "identity"),
        ("Connection", "close"),
    ]
    request = h11.Request(method="GET", target=place.target, headers=headers)
    writer.write((connection.send(request) or b"") + (connection.send(h11.EndOfMessage()) or b""))
    await writer.drain()
    content = bytearray()
    while True:
        event = connection.next_event()
        if event is h11.NEED_DATA:
            connection.receive_data(await reader.read(_PIECE))
        elif isinstance(event, h11.Response):
            found = _judged(event, room)
            if found is not None:
                return found
        elif isinstance(event, h11.Data):
            content += event.data
            if len(content) > room:
                raise Failed(f"it has more than {room} bytes")
        elif isinstance(event, (h11.EndOfMessage, h11.ConnectionClosed)):
            return bytes(content)


def _judged(reply: h11.Response, room: int) -> str | None:
    """Return where a reply leads, None if the picture follows. Raises Failed for what is not worth reading."""
    headers = {name.lower(): value.decode("latin-1") for name, value in reply.headers}
    if reply.status_code in _MOVED and b"location" in headers:
        return headers[b"location"]
    if reply.status_code != 200:
        raise Failed(f"the reply has the status {reply.status_code}")
    if headers.get(b"content-encoding", "identity").lower() != "identity":
        raise Failed("the reply is compressed")
    length = headers.get(b"content-length", "0")
    if int(length) > room:
        raise Failed(f"it has {length} bytes, and the limit is {room}")
    return None
