"""`waterline status`: how a running service is, in a terminal."""

import os
import sys
from collections.abc import Iterator, Sequence
from time import monotonic, sleep
from typing import TYPE_CHECKING

import click

if TYPE_CHECKING:
    from rich.console import RenderableType

    from waterline.snapshot import LatencyNow, ModelNow, MoveNow, QueueNow, Snapshot, TenantNow

URL = "http://127.0.0.1:8001"  # of what `waterline up` starts by itself
EVERY_S = 1.0
ANSWER_S = 5.0
BAR = 24  # characters, for all GPUs of the fleet
MOST_MOVES = 5
MOST_REPLICAS = 12
MOST_QUEUES = 5
MOST_NODES = 12
MOST_JOBS = 12
MOST_USERS = 8
HEALTH = {"ok": "serving", "not ready": "NOT READY", "stopping": "STOPPING"}


@click.command()
@click.option("--url", default=URL, show_default=True, help="Of the page that waterline up names.")
@click.option("--once", is_flag=True, help="Print it and end; so it is when the output is no terminal.")
@click.option("--json", "as_json", is_flag=True, help="Print the snapshot as JSON and end.")
def status(url: str, *, once: bool, as_json: bool) -> None:
    """Show how a running service is, until Ctrl-C: GPUs above and below the water, queues, latencies, moves.

    With the admin key in WATERLINE_ADMIN_KEY it names clients too; from elsewhere the key is needed for all of it.

    \b
    waterline status
    waterline status --once
    waterline status --url http://10.0.0.5:8001 --json
    """  # noqa: D301 - click wants the character, not its name
    if as_json:
        import msgspec

        click.echo(msgspec.json.format(msgspec.json.encode(fetch_snapshot(url)), indent=2).decode())
    elif once or not sys.stdout.isatty():
        from waterline.cli.tables import console

        screen = console()
        for part in view(fetch_snapshot(url)):
            screen.print(part)
    else:
        _watch(url)


def _watch(url: str) -> None:
    from rich.console import Group
    from rich.live import Live

    from waterline.cli.tables import console
    from waterline.errors import WaterlineError

    screen = console()
    now = fetch_snapshot(url)  # a service that is not there is an error; one that leaves is news
    try:
        with Live(Group(*view(now)), console=screen, screen=True, auto_refresh=False) as live:
            while True:
                begun_s = monotonic()
                try:
                    now, news = fetch_snapshot(url), "Ctrl-C leaves."
                except WaterlineError as error:
                    news = f"{error} Trying again; above is how it was."
                live.update(Group(*view(now), news), refresh=True)
                sleep(max(0.1, EVERY_S - (monotonic() - begun_s)))
    except KeyboardInterrupt:
        return


def fetch_snapshot(url: str) -> "Snapshot":
    """Ask a service how it is. Raises InputError when none answers there, or it is none, or it wants its key."""
    from http.client import HTTPException
    from urllib.error import HTTPError, URLError
    from urllib.request import ProxyHandler, Request, build_opener

    import msgspec

    from waterline.errors import InputError
    from waterline.snapshot import KEY_VARIABLE, Snapshot

    if not url.startswith(("http://", "https://")):
        raise InputError(f"--url {url} is no address. Write it like {URL}")
    key = os.environ.get(KEY_VARIABLE, "")
    path = "/admin/snapshot" if key else "/snapshot"
    asked = Request(url.rstrip("/") + path, headers={"authorization": f"Bearer {key}"} if key else {})  # noqa: S310 - see above
    try:
        with build_opener(ProxyHandler({})).open(asked, timeout=ANSWER_S) as answer:
            return msgspec.json.decode(answer.read(), type=Snapshot)
    except HTTPError as error:
        if error.code == 401:
            wrong = "another one than that of" if key else "its admin key in"
            raise InputError(f"the service at {url} wants {wrong} {KEY_VARIABLE}.") from error
        raise InputError(
            f"what answers at {url} is no page of waterline up: {error.code} {error.reason}. Its API has another port: "
            "say --url with the address that it names as 'Watch it'."
        ) from error
    except msgspec.DecodeError as error:
        raise InputError(
            f"what answers at {url} is no page of waterline up, or of another version: {error}."
        ) from error
    except (URLError, OSError, HTTPException, ValueError) as error:
        reason = getattr(error, "reason", error)
        raise InputError(
            f"no service answers at {url}: {getattr(reason, 'strerror', None) or reason}. Start one with: "
            "waterline up; or say --url with the address that it names as 'Watch it'."
        ) from error


def view(now: "Snapshot") -> "Iterator[RenderableType]":
    """Yield what is shown, from the top down."""
    from waterline.units import seconds_text

    yield f"{now.fleet}: {HEALTH[now.health]}, up {seconds_text(now.uptime_s)}"
    for problem in now.problems[:8]:
        yield f"! {problem}"
    if len(now.problems) > 8:
        yield f"! and {len(now.problems) - 8} more"
    yield ""
    yield _iceberg(now)
    yield ""
    yield _models(now)
    if now.latencies:
        yield ""
        yield _latencies(now)
    if now.jobs:
        yield ""
        yield _jobs(now)
    if now.batches:
        left = sum(batch.requests - batch.ended for batch in now.batches)
        yield f"\nBatches: {len(now.batches)} under way, {left:,} requests left"
    if now.moves:
        yield "\n".join(["", "Moves", *(_move(move) for move in now.moves[:MOST_MOVES])])
    yield ""
    yield _replicas(now)
    if now.nodes:
        yield ""
        yield _nodes(now)
    if now.ledger:
        lag = f"Ledger: {now.ledger.waiting_rows} rows to write, {seconds_text(now.ledger.lag_s)} behind"
        yield f"{lag}. {now.ledger.problem}" if now.ledger.problem else lag


def _iceberg(now: "Snapshot") -> "RenderableType":
    from waterline.snapshot import PUBLIC

    columns = ("tenant", "GPUs", "of the fleet", "guarantee", "deserved", "limit", "under way", "waiting")
    tenants = sorted(now.tenants, key=lambda tenant: tenant.tenant != PUBLIC)
    rows = [_tenant(tenant, now.gpus) for tenant in tenants]
    water = next((index for index, tenant in enumerate(tenants) if tenant.tenant != PUBLIC), len(tenants))
    idle = sum(use.gpus for use in now.uses if use.kind == "idle")
    rows.append(("idle", f"{idle:,.4g}", _bar(idle, now.gpus, "·"), "", "", "", "", ""))
    if lost := sum(use.gpus for use in now.uses if use.kind == "lost"):
        rows.append(("lost", f"{lost:,.4g}", _bar(lost, now.gpus, "x"), "", "", "", "", ""))
    title = f"Waterline {now.waterline:.0%}: {now.public_gpus:,.4g} of {now.gpus:,} GPUs serve the public"
    return _table(title, columns, rows, text=(0, 2), section_after=water)


def _tenant(tenant: "TenantNow", gpus: int) -> tuple[str, ...]:
    shares = (tenant.guarantee_gpus, tenant.deserved_gpus, tenant.limit_gpus)
    return (
        tenant.tenant,
        f"{tenant.gpus:,.4g}",
        _bar(tenant.gpus, gpus, "█"),
        *(f"{share:,.4g}" for share in shares),
        str(tenant.running),
        str(tenant.waiting),
    )


def _bar(part: float, whole: int, glyph: str) -> str:
    return glyph * (round(BAR * part / whole) if whole else 0)


def _models(now: "Snapshot") -> "RenderableType":
    from waterline.units import seconds_text

    def row(model: "ModelNow") -> tuple[str, ...]:
        queues = sorted((queue for queue in now.queues if queue.model == model.model), key=lambda one: -one.waiting)
        oldest_s = max((queue.oldest_s for queue in queues), default=0.0)
        return (
            model.model,
            f"{model.ready} of {model.replicas}" + ("" if model.ready else " !"),
            f"{model.running} of {model.slots}",
            str(model.waiting),
            seconds_text(oldest_s) if oldest_s else "-",
            ", ".join(f"{_who(queue)} {queue.waiting}" for queue in queues[:MOST_QUEUES]) or "-",
        )

    columns = ("model", "replicas ready", "slots taken", "waiting", "longest wait", "who waits")
    return _table("Requests now", columns, [row(model) for model in now.models], text=(0, 5))


def _who(queue: "QueueNow") -> str:
    return f"{queue.tenant}/{queue.client}" if queue.client else queue.tenant


def _latencies(now: "Snapshot") -> "RenderableType":
    slos = {model.model: model for model in now.models}

    def row(one: "LatencyNow") -> tuple[str, ...]:
        slo = slos[one.model]
        return (
            one.model,
            one.tenant,
            f"{one.requests / max(1.0, one.window_s):.3g}/s",
            f"{one.within_slo / one.requests:.0%}",
            str(one.requests - one.ok),
            *(_judged(getattr(one.ttft_s, rank, None), slo.ttft_slo_s) for rank in ("p50", "p99")),
            *(_judged(getattr(one.tpot_s, rank, None), slo.tpot_slo_s) for rank in ("p50", "p99")),
        )

    columns = ("model", "tenant", "requests", "in SLO", "not ok", "TTFT p50", "p99", "TPOT p50", "p99")
    title = "Requests of the last minute; ! is beyond the SLO"
    return _table(title, columns, [row(one) for one in now.latencies], text=(0, 1))


def _judged(value_s: float | None, slo_s: float) -> str:
    from waterline.units import seconds_text

    if value_s is None:
        return "-"
    return seconds_text(value_s) + (" !" if value_s > slo_s else "")


def _jobs(now: "Snapshot") -> "RenderableType":
    from waterline.units import seconds_text

    rows = [
        (
            job.job,
            job.tenant,
            job.state,
            job.pool or "-",
            str(job.gpus),
            "-" if job.checkpoint_age_s is None else seconds_text(job.checkpoint_age_s),
            str(job.stops),
            job.reason or "-",
        )
        for job in sorted(now.jobs, key=lambda job: not job.reason)[:MOST_JOBS]
    ]
    columns = ("job", "tenant", "state", "pool", "GPUs", "since its checkpoint", "yielded", "why")
    total = ", ".join(f"{count:,} {state}" for state, count in now.job_states.items())
    return _table(f"Research jobs: {total}" if total else "Research jobs", columns, rows, text=(0, 1, 2, 3, 7))


def _move(move: "MoveNow") -> str:
    from datetime import datetime

    from waterline.units import seconds_text

    at = datetime.fromtimestamp(move.at_s).astimezone().strftime("%H:%M:%S")
    victim = f"; {move.victim} ends within {seconds_text(move.deadline_s)}" if move.victim else ""
    return f"  {at}  {move.kind}: {move.what} of {move.tenant}, {move.gpus} GPUs of {move.pool} ({move.rule}){victim}"


def _replicas(now: "Snapshot") -> "RenderableType":
    total = ", ".join(f"{count} {state}" for state, count in now.replica_states.items()) or "none"
    odd = [replica for replica in now.replicas if replica.state != "ready"]
    if not odd:
        return f"Replicas: {total}"
    rows = [(one.id, one.state, f"{one.pool}, {one.node}", str(one.restarts), one.reason or "-") for one in odd]
    columns = ("replica", "state", "pool, node", "restarts", "why")
    return _table(f"Replicas: {total}", columns, rows[:MOST_REPLICAS], text=(0, 1, 2, 4))


def _nodes(now: "Snapshot") -> "RenderableType":
    total = ", ".join(f"{count:,} {state}" for state, count in now.node_states.items())
    rows = [
        (
            f"{one.pool}, {one.node}",
            one.state + (" !" if one.state in {"silent", "down"} else ""),
            f"{one.used_gpus} of {one.gpus}",
            _few(one.users) or "-",
            one.address or "-",
            one.reason or "-",
        )
        for one in now.nodes[:MOST_NODES]
    ]
    columns = ("node", "state", "GPUs in use", "who has them", "address", "why")
    if sum(now.node_states.values()) > len(rows):
        total += f"; the first {len(rows)}, those that are lost before all others"
    return _table(f"Nodes: {total}", columns, rows, text=(0, 1, 3, 4, 5))


def _few(names: Sequence[str]) -> str:
    more = len(names) - MOST_USERS
    return ", ".join(names[:MOST_USERS]) + (f" and {more} more" if more > 0 else "")


def _table(
    title: str,
    columns: tuple[str, ...],
    rows: Sequence[tuple[str, ...]],
    *,
    text: tuple[int, ...],
    section_after: int = 0,
) -> "RenderableType":
    """Return a table; `text` are the columns that stand to the left, a line follows so many rows."""
    from rich.table import Table

    table = Table(title=title, title_justify="left", title_style="bold", box=None, pad_edge=False, padding=(0, 2, 0, 0))
    for index, column in enumerate(columns):
        table.add_column(column, justify="left" if index in text else "right", overflow="fold", header_style="dim")
    for index, row in enumerate(rows):
        if section_after and index == section_after:
            table.add_row("~" * 6, "~" * 4, "~" * 12)
        table.add_row(*row)
    return table
