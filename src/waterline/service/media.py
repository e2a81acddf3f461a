"""What clients may have engines fetch: pictures, sounds and videos by URL, from the public network only.

An engine that sees pictures fetches them itself, from where it stands; a client must not reach through it what only our
own network reaches. Hosts are judged by their names as they are written, and nobody is asked about a name: that one of
a stranger leads inside, or that a public server redirects there, only the engine's own network can prevent.
"""

import re
import socket
from ipaddress import IPv4Address, IPv6Address, IPv6Network, ip_address

import msgspec
from msgspec import Raw

from waterline.service.errors import RejectedError, shortened

SCHEME = re.compile(r"\s*([a-z][a-z0-9+.-]*):", re.IGNORECASE)
# Stricter than any client of HTTP, so that none of them can read another host than we do.
AUTHORITY = re.compile(
    r"\s*https?://(?:[^/?#\\\s@]*@)?(\[[^\]]*\]|[^/?#\\\s@:%]{1,253})(?::\d*)?(?:[/?#]|$)", re.IGNORECASE
)
INSIDE = ("localhost", "localdomain", "local", "internal", "svc", "arpa")  # ends of names that lead nowhere outside
NAT64 = IPv6Network("64:ff9b::/96")  # in which each address has one of IPv4


Part = dict[str, Raw]  # of a message, or of what else may name a picture; values as they came, for one may be in it

# Engines do not agree where a picture is: image_url, image_url.url, image, file.url … So any string may be an address:
# one under such a name, and what looks like one under any other, but for what people say.
ADDRESSES = re.compile(r"(?:^|_)(?:url|uri|path|href|src|source|image|video|audio|file|pil)s?$")
LOOKS_LIKE_ONE = re.compile(r"\s*[a-z][a-z0-9+.-]+:/", re.IGNORECASE)
PROSE = frozenset(("text", "content", "thinking", "reasoning", "refusal", "title", "context"))
_PART = msgspec.json.Decoder(Part)
_PARTS = msgspec.json.Decoder(list[Raw])
_STRING = msgspec.json.Decoder(str)


def check_links(part: Part, where: str = "") -> None:
    """Raise RejectedError for what an engine must not fetch, however deep it is in there; `where` that is."""
    for name, value in part.items():
        _check(name, value, where + name)


def _check(name: str, value: Raw, where: str) -> None:
    begin = bytes(memoryview(value)[:6])
    if begin[:1] == b"{":
        check_links(_PART.decode(value), where + ".")
    elif begin[:1] == b"[":
        for one in _PARTS.decode(value):
            _check(name, one, where)
    elif begin[:1] == b'"' and begin != b'"data:' and name not in PROSE:
        url = _STRING.decode(value)
        if url and (ADDRESSES.search(name) or LOOKS_LIKE_ONE.match(url)):
            check_url(url, where)


def text_of(part: Part) -> str:
    """Return what a part says; "" where it is a picture. Raises RejectedError where that is no text."""
    said = part.get("text")
    if said is None or bytes(memoryview(said)) == b"null":
        return ""
    try:
        return _STRING.decode(said)
    except msgspec.ValidationError:
        raise RejectedError("The 'text' of a part of a message is no text.", param="text", code="wrong_type") from None


def check_url(url: str, param: str) -> None:
    """Raise RejectedError for a URL of anything but data and the public network."""
    scheme = SCHEME.match(url)
    kind = scheme[1].lower() if scheme else ""
    if kind == "data":
        return
    if kind not in {"http", "https"}:
        raise _refused(f"is {f'of the kind {shortened(kind)}:' if kind else 'no URL'}", param)  # but a file, it may be
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
