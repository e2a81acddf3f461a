"""`waterline keys`: who may use the API, and how much."""

from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import click

from waterline.cli.ledger import ledger_option

if TYPE_CHECKING:
    from sqlalchemy import Engine

    from waterline.ledger import Key, Quotas, Usage

JSON = click.option("--json", "as_json", is_flag=True, help="Print JSON, for programs.")
UNCHECKED = "No fleet has been up with this ledger, so tenant and models are not checked; --fleet FILE does that."
TOKENS = click.IntRange(min=0)


@click.group("keys")
def keys() -> None:
    """Make, list and revoke the keys that let clients use the API.

    \b
    waterline keys create --tenant public --client alice --tokens-per-day 1000000 --usd 25
    waterline keys list
    waterline keys revoke 3f9a01c2
    """  # noqa: D301 - click wants the character, not its name


@keys.command("create")
@click.option("--tenant", required=True, help="Of the fleet.")
@click.option("--client", required=True, metavar="NAME", help="Whose key it is; a client may have several.")
@click.option("--models", default="", metavar="A,B", help="It may use these only.")
@click.option("--tokens-per-day", type=TOKENS, metavar="N", help="Tokens in and out; a day is one of UTC.")
@click.option("--tokens-per-month", type=TOKENS, metavar="N")
@click.option("--tokens", "tokens_total", type=TOKENS, metavar="N", help="In all.")
@click.option("--usd-per-day", metavar="USD")
@click.option("--usd-per-month", metavar="USD")
@click.option("--usd", "usd_total", metavar="USD", help="In all.")
@click.option("--fleet", type=click.Path(path_type=Path), help="That it is for; else the fleet that was up last.")
@ledger_option
@JSON
def create(
    tenant: str,
    client: str,
    models: str,
    tokens_per_day: int | None,
    tokens_per_month: int | None,
    tokens_total: int | None,
    usd_per_day: str | None,
    usd_per_month: str | None,
    usd_total: str | None,
    fleet: Path | None,
    ledger: str,
    *,
    as_json: bool,
) -> None:
    """Make a key and show its secret, once. What is not limited is without end."""
    import msgspec

    from waterline.ledger import Quotas, connect, create_key, nano_usd

    quotas = Quotas(
        tokens_per_day=tokens_per_day,
        tokens_per_month=tokens_per_month,
        tokens_total=tokens_total,
        nano_usd_per_day=None if usd_per_day is None else nano_usd(usd_per_day),
        nano_usd_per_month=None if usd_per_month is None else nano_usd(usd_per_month),
        nano_usd_total=None if usd_total is None else nano_usd(usd_total),
    )
    allowed = [name.strip() for name in models.split(",") if name.strip()]
    engine = connect(ledger)
    is_checked = _check(engine, fleet, tenant, allowed)
    key, secret = create_key(engine, tenant=tenant, client=client, models=allowed, quotas=quotas)
    if not is_checked:
        click.echo(UNCHECKED, err=True)
    if as_json:
        click.echo(msgspec.json.encode({"secret": secret, **msgspec.structs.asdict(key)}).decode())
        return
    click.echo(
        f"Key {key.id} for {key.client} of {key.tenant}: {', '.join(key.models) or 'all models'}; "
        f"{'; '.join(_limits(key.quotas)) or 'no quotas'}.\n\n{secret}\n\n"
        "This is its secret. It is shown once and kept nowhere: put it into OPENAI_API_KEY."
    )


@keys.command("list")
@ledger_option
@JSON
def list_keys(ledger: str, *, as_json: bool) -> None:
    """List the keys, and what each has used."""
    import msgspec

    from waterline.ledger import connect, noted_fleet, read_keys, read_usage

    engine = connect(ledger, create=False)
    known = read_keys(engine)
    used = {usage.key_id: usage for usage in read_usage(engine, ["key"])}
    if as_json:
        click.echo(msgspec.json.encode([{**msgspec.structs.asdict(key), **_used(used.get(key.id))} for key in known]))
        return
    if not known:
        click.echo("No keys. Make one: waterline keys create --tenant public --client NAME")
        return
    _draw(known, used, *noted_fleet(engine))


@keys.command("revoke")
@click.argument("key")
@ledger_option
def revoke(key: str, ledger: str) -> None:
    """Revoke the key with this id, or whose secret begins so; a running service refuses it within a second."""
    from waterline.ledger import connect, revoke_key

    revoked = revoke_key(connect(ledger, create=False), key)
    click.echo(
        f"Key {revoked.id} ({revoked.prefix}…) of {revoked.client}, {revoked.tenant}, is revoked since "
        f"{_date(revoked.revoked_us or 0)}."
    )


def _check(engine: "Engine", fleet: Path | None, tenant: str, models: Iterable[str]) -> bool:
    """Refuse names that the fleet does not know; where no fleet is known, every name will do, and this is False."""
    from waterline.errors import UnknownNameError, nearest
    from waterline.ledger import noted_fleet

    if fleet:
        from waterline.fleet import load_fleet
        from waterline.plan import is_plan, read_plan

        loaded, whose = read_plan(fleet).fleet if is_plan(fleet) else load_fleet(fleet), str(fleet)
        tenants, served = [one.name for one in loaded.tenants], [one.name for one in loaded.models]
    else:
        (tenants, served), whose = noted_fleet(engine), "the fleet that was up last; --fleet FILE names another"
    for what, name, known in (("tenant", tenant, tenants), *(("model", model, served) for model in models)):
        if known and name not in known:
            raise UnknownNameError(f"no {what} is called '{name}' in {whose}. {nearest(name, known)}")
    return bool(tenants)


def _limits(quotas: "Quotas") -> list[str]:
    limits = (
        (quotas.tokens_per_day, "a day"),
        (quotas.tokens_per_month, "a month"),
        (quotas.tokens_total, "in all"),
        (quotas.nano_usd_per_day, "a day"),
        (quotas.nano_usd_per_month, "a month"),
        (quotas.nano_usd_total, "in all"),
    )
    return [
        f"{limit:,} tokens {when}" if index < 3 else f"{_usd(limit)} {when}"
        for index, (limit, when) in enumerate(limits)
        if limit is not None
    ]


def _used(usage: "Usage | None") -> dict[str, int]:
    return {
        "requests": usage.requests if usage else 0,
        "tokens": usage.prompt_tokens + usage.output_tokens if usage else 0,
        "nano_usd": usage.nano_usd if usage else 0,
    }


def _draw(keys: "Iterable[Key]", used: "dict[str, Usage]", tenants: Sequence[str], models: Sequence[str]) -> None:
    """Draw the keys; what they are worth is by the tenants and models that were served last, if any were."""
    from waterline.cli.tables import console, draw

    columns = ("id", "secret", "tenant", "client", "models", "quotas", "made", "state", "requests", "tokens", "USD")
    rows = []
    for key in keys:
        of_key = _used(used.get(key.id))
        rows.append(
            (
                key.id,
                f"{key.prefix}…",
                key.tenant,
                key.client,
                ", ".join(key.models) or "all",
                "; ".join(_limits(key.quotas)) or "none",
                _date(key.created_us),
                _state(key, tenants, models),
                f"{of_key['requests']:,}",
                f"{of_key['tokens']:,}",
                f"{of_key['nano_usd'] / 1e9:,.4f}",
            )
        )
    draw(console(), "Keys", columns, rows, text_columns=8, spare=("made", "requests", "models"))


def _state(key: "Key", tenants: Sequence[str], models: Sequence[str]) -> str:
    if key.revoked_us is not None:
        return f"revoked {_date(key.revoked_us)}"
    return (key.trouble(tenants, models) if tenants else "") or "valid"


def _date(clock_us: int) -> str:
    from waterline.ledger import day_of

    return day_of(clock_us)


def _usd(amount: int) -> str:
    return "$" + f"{amount / 1e9:,.9f}".rstrip("0").rstrip(".")
