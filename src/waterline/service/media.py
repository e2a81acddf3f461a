"""What clients may have engines fetch: pictures, sounds and videos by URL, from the public network only.

An engine that sees pictures fetches them itself, from where it stands; a client must not reach through it what only our
own network reaches. Hosts are judged by their names as they are written, and nobody is asked about a name: that one of
a stranger leads inside, or that a public server redirects there, only the engine's own network can prevent.
"""

import re
import socket
from ipaddress import IPv4Address, IPv6Address, IPv6Network, ip_address

import msgspec
from msgspec import Raw, Struct

from waterline.service.errors import RejectedError, shortened

NOTHING = Raw()
SCHEME = re.compile(r"\s*([a-z][a-z0-9+.-]*):", re.IGNORECASE)
# Stricter than any client of HTTP, so that none of them can read another host than we do.
AUTHORITY = re.compile(
    r"\s*https?://(?:[^/?#\\\s@]*@)?(\[[^\]]*\]|[^/?#\\\s@:%]{1,253})(?::\d*)?(?:[/?#]|$)", re.IGNORECASE
)
INSIDE = ("localhost", "localdomain", "local", "internal", "svc", "arpa")  # ends of names that lead nowhere outside
NAT64 = IPv6Network("64:ff9b::/96")  # in which each address has one of IPv4


class Linked(Struct):
    """A part of a message, as far as it may hold a URL; kept as it came, because a picture may be in it."""

    image_url: Raw = NOTHING
    video_url: Raw = NOTHING
    audio_url: Raw = NOTHING
    file_url: Raw = NOTHING

    def check_links(self) -> None:
        """Raise RejectedError for what an engine must not fetch."""
        for name in Linked.__struct_fields__:
            if (link := getattr(self, name)) is not NOTHING:
                _check_link(link, name)


class _Link(Struct):
    url: Raw = Raw(b"null")


_LINK = msgspec.json.Decoder(_Link)


def _check_link(link: Raw, param: str) -> None:
    said = memoryview(link)
    if bytes(said[:1]) == b"{":
        said = memoryview(_LINK.decode(link).url)
    if bytes(said[:6]) != b'"data:' and isinstance(url := msgspec.json.decode(said), str):
        check_url(url, param)


def check_url(url: str, param: str) -> None:
    """Raise RejectedError for a URL of anything but data and the public network."""
    scheme = SCHEME.match(url)
    kind = scheme[1].lower() if scheme else ""
    is_bare = not kind and "." not in url  # base64, which SGLang takes; paths have dots
    if kind == "data" or is_bare:
        return
    if kind not in {"http", "https"}:
        raise _refused(f"is {f'of the kind {shortened(kind)}:' if kind else 'no URL'}", param)
    host = AUTHORITY.match(url)
    if not host:
        raise _refused("is a URL whose host cannot be read", param)
    if not _is_public(host[1]):
        raise _refused(f"is on {shortened(host[1])}, which is not on the public network", param)


def _refused(problem: str, param: str) -> RejectedError:
    return RejectedError(
        f"'{param}' {problem}; engines fetch nothing there. Send a data: URL, or one of a public server.",
        param=param,
        code="url_not_allowed",
    )


def _is_public(host: str) -> bool:
    try:
        if host.startswith("["):
            return _is_global(ip_address(host[1:-1]))
        name = host.encode("idna").decode().lower().rstrip(".")
    except ValueError:  # UnicodeError among them
        return False
    try:
        return _is_global(IPv4Address(socket.inet_aton(name)))  # in all its forms: 127.1, 0x7f000001, 2130706433
    except OSError:
        return "." in name and name.rpartition(".")[2] not in INSIDE


def _is_global(address: IPv4Address | IPv6Address) -> bool:
    if isinstance(address, IPv6Address):
        translated = IPv4Address(int(address) & 0xFFFFFFFF) if address in NAT64 else None
        if within := translated or address.ipv4_mapped or address.sixtofour:
            return _is_global(within)
    return address.is_global and not address.is_multicast
