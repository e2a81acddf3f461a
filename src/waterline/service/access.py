"""Who is asking: the key a request shows, the tenant and the client it stands for, and what it may use.

The ledger keeps keys in memory by a digest of their secrets, so that looking one up tells nothing about any secret by
the time it takes; a key that is made or revoked elsewhere is known within a second.
"""

import re
from dataclasses import dataclass
from functools import lru_cache
from ipaddress import ip_address, ip_network
from typing import Protocol

from waterline.fleet import Fleet
from waterline.ledger import Key
from waterline.service.asgi import Scope
from waterline.service.errors import RejectedError, shortened

OURS = "wl-"  # how the keys of a ledger begin
NAMELESS = "anonymous"  # the client of requests without a key
BEARER = re.compile(rb"(?i)bearer +([\x21-\x7e]{1,256}) *")
PASSED_ON = (b"forwarded", b"x-forwarded-for", b"x-real-ip", b"via")  # what a proxy says
HERE = re.compile(rb"(?i)(localhost|127(\.\d{1,3}){3}|\[::1\])(:\d{1,5})?")
CHALLENGE = {"www-authenticate": 'Bearer realm="waterline"'}
LOCAL = "local"  # anonymous = "local": those of this machine need no key


class Keys(Protocol):
    """Where keys are kept."""

    def find_key(self, secret: str) -> Key | None:
        """Return the key with this secret, revoked or not."""
        ...


@dataclass(frozen=True, slots=True, kw_only=True)
class Caller:
    """Whose request it is."""

    tenant: str
    client: str  # as the ledger and the log name it
    line: str  # those of a tenant with the same one wait in one line: a client's name, or an address
    key: Key | None = None  # None: it showed none, and needs none

    def may_use(self, model: str) -> bool:
        return not self.key or not self.key.models or model in self.key.models

    def check_model(self, model: str) -> None:
        """Raise RejectedError for a model its key is not for."""
        if self.key and not self.may_use(model):
            raise RejectedError(
                f"This key is not for '{shortened(model)}', but for {', '.join(self.key.models)}.",
                status=403,
                param="model",
                code="model_not_allowed",
            )


class Access:
    """The door.

    Args:
        fleet: whose tenants there are.
        keys: of the ledger; None when there is none.
        loopback: only this machine can reach the service.
    """

    def __init__(self, fleet: Fleet, keys: Keys | None, *, loopback: bool) -> None:
        self._keys = keys
        self._loopback = loopback
        self.use_fleet(fleet)

    def use_fleet(self, fleet: Fleet) -> None:
        """Go by the tenants of a fleet from now on."""
        self._tenants = {tenant.name for tenant in fleet.tenants}
        self._anonymous = anonymous_tenant(fleet, loopback=self._loopback)
        self._local_only = any(tenant.anonymous == LOCAL for tenant in fleet.tenants)

    def caller(self, scope: Scope) -> Caller:
        """Return whose request this is.

        Raises RejectedError when nobody can tell (401), or this fleet does not serve them (403).
        """
        shown = next((value for name, value in scope["headers"] if name == b"authorization"), b"")
        bearer = BEARER.fullmatch(shown)
        secret = bearer[1].decode() if bearer else ""
        key = self._keys.find_key(secret) if secret and self._keys else None
        if key:
            if key.revoked_us is not None:
                raise _refused(f"The key {key.prefix}… has been revoked.")
            if key.tenant not in self._tenants:
                raise RejectedError(
                    f"The key {key.prefix}… is of the tenant '{key.tenant}', which is not in this fleet.",
                    status=403,
                    code="tenant_not_served",
                )
            return Caller(tenant=key.tenant, client=key.client, line=key.client, key=key)
        if self._anonymous and self._local_only and not is_local(scope):
            raise _refused(
                "There is no key, and this request comes from elsewhere: a proxy passed it on, or it calls this "
                "machine by another name. Send a key, or name a tenant with anonymous = true in the fleet file."
            )
        if self._anonymous and not secret.startswith(OURS):  # clients that must send a key send any
            address = scope.get("client")
            return Caller(tenant=self._anonymous, client=NAMELESS, line=line_of(address[0]) if address else NAMELESS)
        if not shown:
            raise _refused("There is no key. Send one: Authorization: Bearer wl-…")
        raise _refused("This key is not valid." if secret else "That is no key. Send one: Authorization: Bearer wl-…")


@lru_cache(maxsize=4096)
def line_of(address: str) -> str:
    """Return in which line somebody without a key waits: of IPv6 that of the whole /64, which is one subscriber's."""
    try:
        ip = ip_address(address.partition("%")[0])
    except ValueError:  # a proxy may say anything
        return NAMELESS
    if ip.version == 4:
        return str(ip)
    return str(ip.ipv4_mapped or ip_network((ip, 64), strict=False))


def is_local(scope: Scope) -> bool:
    """Tell whether a request to a service that only this machine can reach is of this machine indeed.

    A proxy may have passed it on for anybody, or a web page may have had its own name mean this machine.
    """
    host = next((value for name, value in scope["headers"] if name == b"host"), b"localhost")
    return HERE.fullmatch(host) is not None and not any(name in PASSED_ON for name, _ in scope["headers"])


def anonymous_tenant(fleet: Fleet, *, loopback: bool) -> str:
    """Return whose requests without a key are; "" where a key is needed.

    A tenant that is anonymous = "local" is open to this machine alone; so is the one of a fleet that names none.
    """
    names = (tenant.name for tenant in fleet.tenants if tenant.anonymous and (loopback or tenant.anonymous != LOCAL))
    return next(names, "")


def _refused(message: str) -> RejectedError:
    return RejectedError(message, status=401, code="invalid_api_key", headers=CHALLENGE)
