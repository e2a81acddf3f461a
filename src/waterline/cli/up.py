"""`waterline up`: start the engines and serve."""

import json
import os
import signal
import sys
from collections import deque
from functools import partial
from pathlib import Path
from time import monotonic
from typing import TYPE_CHECKING

import click

from waterline.cli.ledger import ledger_option

if TYPE_CHECKING:
    from sqlalchemy import Engine

    from waterline.outcome import Completion, Summary
    from waterline.plan import Plan
    from waterline.service.ray_cluster import RayCluster
    from waterline.workload import Slo

LAPTOP = Path(__file__).with_name("laptop.toml")
SUMMARISED = 100_000  # latest requests that the last words are about
OF_THIS_MACHINE = ("127.", "localhost", "::1")  # how hosts begin that nobody else can reach
EVERYWHERE = {"0.0.0.0": "127.0.0.1", "::": "::1"}  # noqa: S104 - hosts that are all networks, and what reaches them
MOST_KEYS_NAMED = 10
ABACUS = "waterline/abacus"
STANDARD_ERROR = 2  # the last of the three


@click.command()
@click.argument("fleet", required=False, type=click.Path(path_type=Path))
@click.option("--host", default="127.0.0.1", show_default=True, help="The address to listen on.")
@click.option("--port", default=8000, show_default=True, type=click.IntRange(0, 65535), help="0 takes a free one.")
@click.option("--admin-host", default="127.0.0.1", show_default=True, help="Where operators look: the page, metrics.")
@click.option("--admin-port", type=click.IntRange(0, 65535), help="Its port; the one after --port unless you say.")
@click.option(
    "--proxy", "proxies", multiple=True, metavar="ADDRESS", help="Believe its X-Forwarded-For; may be given again."
)
@click.option("--engine", default="", metavar="NAME", help="Use this engine for every replica, for example: fake.")
@click.option("--ray", default="", metavar="ADDRESS", help="Start engines on the nodes of this Ray cluster.")
@ledger_option
@click.option("--json", "as_json", is_flag=True, help="Print what runs, and at the end the summary, as lines of JSON.")
def up(
    fleet: Path | None,
    host: str,
    port: int,
    admin_host: str,
    admin_port: int | None,
    proxies: tuple[str, ...],
    engine: str,
    ray: str,
    ledger: str,
    *,
    as_json: bool,
) -> None:
    """Start the engines of FLEET and serve an OpenAI-compatible API until Ctrl-C.

    FLEET is a fleet file or a plan.json. Without it, this machine's processor serves the small model in the package.

    \b
    waterline up
    waterline up examples/mixed.toml --engine fake
    waterline up plan.json --port 8001
    waterline up plan.json --ray 10.0.0.1:6379
    """  # noqa: D301 - click wants the character, not its name
    signal.signal(signal.SIGTERM, lambda number, _: sys.exit(128 + number))  # the first process of a container has none
    try:
        _fill_standard_streams()
        _up(fleet, host, port, admin_host, admin_port, proxies, engine, ray, ledger, as_json=as_json)
    except KeyboardInterrupt:  # before the service listens to signals
        sys.exit(128 + signal.SIGINT)


def _fill_standard_streams() -> None:
    """Open what was closed (``>&-``) of standard input, output and error: no socket may get their numbers."""
    while (number := os.open(os.devnull, os.O_RDWR)) <= STANDARD_ERROR:
        pass
    os.close(number)


def _up(
    fleet: Path | None,
    host: str,
    port: int,
    admin_host: str,
    admin_port: int | None,
    proxies: tuple[str, ...],
    engine: str,
    ray: str,
    ledger: str,
    *,
    as_json: bool,
) -> None:
    from waterline.cli.admin import open_admin
    from waterline.ledger import Ledger
    from waterline.service.engines import prepare_engines
    from waterline.service.limits import room_for_connections
    from waterline.service.logs import log_to
    from waterline.service.server import Outlet, Source, listen, serve

    begun_s = monotonic()
    room_for_connections()
    _check_engine(engine)
    plan = _plan(fleet or LAPTOP, engine)
    _check_proxies(proxies)
    cluster = _cluster(ray)
    prepare = partial(cluster.prepare if cluster else prepare_engines, instead=engine, fleet=str(fleet or "FLEET"))
    engines = prepare(plan)
    listening = listen(host, port)
    api_port = listening.getsockname()[1]
    url = f"http://{_reachable(host)}:{api_port}/v1"
    admin, page = open_admin(admin_host, admin_port, api_port)
    log_to(Outlet(sys.stderr), terminal=bool(sys.stderr and sys.stderr.isatty()))
    completions: deque[Completion] = deque(maxlen=SUMMARISED)
    slos: dict[str, Slo] = {}  # of all models that were served, in whatever plan
    say = Outlet(sys.stdout).say

    def on_ready(missing: list[str]) -> None:
        took_s = monotonic() - begun_s
        say(_ready_json(plan, url, page, engine) if as_json else _ready_text(plan, url, page, took_s, missing))

    if not as_json:
        say(_what_runs(plan, engine))
    if not host.startswith(OF_THIS_MACHINE):
        Outlet(sys.stderr).say(_who_may(plan, host))
    with listening, admin.listening, Ledger.open(ledger) as books:

        def note(plan: "Plan") -> None:
            slos.update(plan.fleet.slos)
            _note_fleet(books.engine, plan)

        note(plan)
        usd = serve(
            plan,
            engines,
            listening,
            on_ready=on_ready,
            on_completion=completions.append,
            prepare=prepare,
            source=Source(path=fleet, read=partial(_plan, fleet, engine), on_plan=note)
            if fleet and fleet.is_file()
            else None,
            admin=admin,
            ledger=books,
            proxies=proxies,
            nodes=cluster,
        )
    if cluster:
        cluster.leave()
    if completions:
        say(_goodbye(completions, slos, monotonic() - begun_s, usd, as_json=as_json))


def _plan(path: Path, engine: str) -> "Plan":
    """Return what runs together. Raises EngineError where that cannot answer requests."""
    from msgspec.structs import replace

    from waterline.fleet import load_fleet
    from waterline.plan import is_plan, read_plan
    from waterline.planner import make_plan
    from waterline.service.pairs import check_pairs

    plan = read_plan(path) if is_plan(path) else make_plan(load_fleet(path))
    plan = replace(plan, replicas=plan.together)  # no replica is moved yet
    check_pairs(plan, lambda replica: engine or replica.engine)
    return plan


def _cluster(address: str) -> "RayCluster | None":
    if not address:
        return None
    from waterline.service.ray_cluster import RayCluster

    return RayCluster(address)


def _check_engine(engine: str) -> None:
    from waterline.errors import UnknownNameError
    from waterline.fleet import ENGINES

    if engine and engine not in ENGINES:
        raise UnknownNameError(f"no engine is called '{engine}'. Known: {', '.join(ENGINES)}.")


def _check_proxies(proxies: tuple[str, ...]) -> None:
    from ipaddress import ip_network

    from waterline.errors import InputError

    for proxy in proxies:
        try:
            ip_network(proxy)
        except ValueError as error:
            raise InputError(
                f"--proxy '{proxy}' is no address: {error}. Write where the proxy's connections come from, as in "
                "--proxy 127.0.0.1 or --proxy 10.0.3.0/24."
            ) from error


def _reachable(host: str) -> str:
    """Return what a URL on this machine calls that address."""
    host = EVERYWHERE.get(host, host)
    return f"[{host}]" if ":" in host else host


def _who_may(plan: "Plan", host: str) -> str:
    """Say who can use what others than this machine can reach."""
    from waterline.service.access import anonymous_tenant

    if tenant := anonymous_tenant(plan.fleet, loopback=False):
        return f"Requests without a key are those of '{tenant}': whoever reaches this machine at {host} can send some."
    return "Requests need a key. Make one: waterline keys create --tenant NAME --client NAME"


def _note_fleet(engine: "Engine", plan: "Plan") -> None:
    """Note in the ledger whom and what is served, and warn of keys that are good for nothing here."""
    import structlog

    from waterline.ledger import note_fleet, read_keys

    tenants = [one.name for one in plan.fleet.tenants]
    models = [one.name for one in plan.fleet.models]
    note_fleet(engine, tenants, models)
    useless = [
        f"{key.id} of {key.client}: {why}"
        for key in read_keys(engine)
        if key.revoked_us is None and (why := key.trouble(tenants, models))
    ]
    if useless:
        structlog.get_logger().warning(
            "keys are good for nothing in this fleet", count=len(useless), keys=useless[:MOST_KEYS_NAMED]
        )


def _what_runs(plan: "Plan", engine: str) -> str:
    lines = [f"{plan.fleet.name}: {plan.gpus} of {plan.fleet.gpus} GPUs"]
    for model in plan.models:
        alike: dict[str, int] = {}
        for replica in plan.replicas_of(model.model):
            role = {"both": "", "prefill": " for prompts", "decode": " for answers"}[replica.role]
            kind = f"{engine or replica.engine}{role}, {replica.precision} {replica.layout} on {replica.pool}"
            alike[kind] = alike.get(kind, 0) + 1
        lines += [f"  {model.model}: {count} x {kind}" for kind, count in alike.items()]
    return "\n".join(lines)


def _ready_text(plan: "Plan", url: str, page: str, took_s: float, missing: list[str]) -> str:
    from waterline.units import seconds_text

    model = plan.fleet.models[0]
    multiplies = model.weights == ABACUS
    request = {
        "model": model.name,
        "messages": [{"role": "user", "content": "What is 347 * 586?" if multiplies else "Hello!"}],
        **({"temperature": 0} if multiplies else {}),
    }
    body = json.dumps(request).replace("'", r"'\''")
    hint = " ('abacus' multiplies two numbers; it does not chat)" if multiplies else ""
    later = f"Not reachable yet, and asked again and again: {', '.join(missing)}.\n" if missing else ""
    return (
        f"{later}Ready after {seconds_text(took_s)}: {url}\nWatch it: {page}\n\nAsk it{hint}:\n\n"
        f"curl {url}/chat/completions -H 'Content-Type: application/json' -d '{body}'\n\nCtrl-C stops it."
    )


def _ready_json(plan: "Plan", url: str, page: str, engine: str) -> str:
    replicas = [{"id": one.id, "model": one.model, "engine": engine or one.engine} for one in plan.replicas]
    return json.dumps(
        {"url": url, "dashboard": page, "models": [model.model for model in plan.models], "replicas": replicas}
    )


def _goodbye(
    completions: "deque[Completion]", slos: "dict[str, Slo]", lasted_s: float, usd: dict[str, float], *, as_json: bool
) -> str:
    """Return what became of the requests, a line for each tenant and model; `usd`: what each replica has cost."""
    import msgspec

    from waterline.outcome import summarize
    from waterline.units import HOUR_S

    usd_per_hour = {replica: paid * HOUR_S / lasted_s for replica, paid in usd.items()}  # taken over the whole time
    summaries = summarize(completions, slos, lasted_s, usd_per_hour)
    if as_json:
        return msgspec.json.encode({"summaries": summaries}).decode()
    return "\n" + "\n".join(_line(summary) for summary in summaries[1:])


def _line(summary: "Summary") -> str:
    from waterline.units import seconds_text

    ended = {name: getattr(summary, name) for name in ("completed", "refused", "failed", "cancelled")}
    line = f"{summary.tenant}, {summary.model}: " + ", ".join(f"{count} {how}" for how, count in ended.items() if count)
    line += f"; {summary.prompt_tokens} tokens in, {summary.output_tokens} out"
    if summary.ttft_s:
        line += f"; TTFT median {seconds_text(summary.ttft_s.p50)}"
    if summary.tpot_s and summary.tpot_s.p50 > 0:  # 0: answers that came whole
        line += f", TPOT {seconds_text(summary.tpot_s.p50)}"
    return f"{line}; {summary.slo_fraction:.0%} within the SLO."
