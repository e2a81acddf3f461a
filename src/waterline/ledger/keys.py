"""Keys: made, listed, revoked, and the fleet they are checked against. A secret is shown once and kept nowhere."""

import hashlib
import secrets
from collections.abc import Iterable

import msgspec
from sqlalchemy import Engine, delete, insert, select, update

from waterline.errors import InputError, UnknownNameError, nearest
from waterline.ledger.batch import key_of
from waterline.ledger.database import reading, writing
from waterline.ledger.records import MOST, Key, Quotas, utc_us
from waterline.ledger.tables import keys, meta

BEGINS = "wl-"  # every secret
SHOWN = len(BEGINS) + 6  # letters of a secret that are kept for people


def hash_of(secret: str) -> str:
    """Return what is kept of a secret: nobody finds 256 random bits by trying, so it needs neither salt nor delay."""
    return hashlib.sha256(secret.encode()).hexdigest()


def create_key(
    engine: Engine, *, tenant: str, client: str, models: Iterable[str] = (), quotas: Quotas | None = None
) -> tuple[Key, str]:
    """Make a key; return it, and the secret that is not to be had again."""
    quotas = quotas or Quotas()
    for what, name in (("tenant", tenant), ("client", client)):
        if not name.strip() or not name.isprintable():
            raise InputError(f"the {what} of a key needs a name; '{name}' is none.")
    for name, limit in msgspec.structs.asdict(quotas).items():
        if limit is not None and not 0 <= limit <= MOST:
            raise InputError(f"{name} = {limit:,}: a quota lies between 0 and {MOST:,}.")
    secret = BEGINS + secrets.token_urlsafe(32)
    key = Key(
        id=secrets.token_hex(4),
        prefix=secret[:SHOWN],
        tenant=tenant,
        client=client,
        models=tuple(models),
        quotas=quotas,
        created_us=utc_us(),
    )
    row = {name: getattr(key, name) for name in ("id", "prefix", "tenant", "client", "created_us")}
    row |= {"hash": hash_of(secret), "models": msgspec.json.encode(key.models).decode()}
    with writing(engine) as connection:
        connection.execute(insert(keys), [row | msgspec.structs.asdict(quotas)])
    return key, secret


def note_fleet(engine: Engine, tenants: Iterable[str], models: Iterable[str]) -> None:
    """Remember whom and what a fleet serves, so that a key for nobody is noticed when it is made."""
    names = {"tenants": sorted(tenants), "models": sorted(models)}
    with writing(engine) as connection:
        connection.execute(delete(meta).where(meta.c.name.in_(names)))
        rows = [{"name": name, "value": msgspec.json.encode(value).decode()} for name, value in names.items()]
        connection.execute(insert(meta), rows)


def noted_fleet(engine: Engine) -> tuple[list[str], list[str]]:
    """Return the tenants and the models of the fleet that was served last; nothing when none was."""
    with reading(engine) as connection:
        noted = {row.name: msgspec.json.decode(row.value, type=list[str]) for row in connection.execute(select(meta))}
    return noted.get("tenants", []), noted.get("models", [])


def read_keys(engine: Engine) -> list[Key]:
    """Return all keys, the oldest first, revoked ones included."""
    with reading(engine) as connection:
        return [key_of(row) for row in connection.execute(select(keys).order_by(keys.c.created_us, keys.c.id))]


def revoke_key(engine: Engine, name: str) -> Key:
    """Revoke the key with this id, or whose secret begins so; raises UnknownNameError, or InputError for several."""
    known = read_keys(engine)
    found = [key for key in known if name in {key.id, key.prefix}] or [
        key for key in known if len(name) >= SHOWN and name.startswith(key.prefix)
    ]
    if not found:
        raise UnknownNameError(
            f"No key has the id or prefix '{name[:SHOWN]}'. {nearest(name, [key.id for key in known]) if known else ''}"
        )
    if len(found) > 1:
        ids = ", ".join(key.id for key in found)
        raise InputError(f"'{name[:SHOWN]}' is the beginning of several keys: {ids}. Say which id.")
    (key,) = found
    if key.revoked_us is None:
        key = msgspec.structs.replace(key, revoked_us=utc_us())
        with writing(engine) as connection:
            connection.execute(update(keys).where(keys.c.id == key.id).values(revoked_us=key.revoked_us))
    return key
