"""`waterline rehearse`: what will happen."""

import csv
import io
import re
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, fields
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click
import msgspec

from waterline.cli.tables import console, draw
from waterline.errors import InputError
from waterline.units import HOUR_S, seconds_text, usd_text

if TYPE_CHECKING:
    from waterline.outcome import Completion, Percentiles
    from waterline.plan import Plan
    from waterline.rehearsal import Progress, Rehearsal

SECONDS = {"": 1, "s": 1, "m": 60, "min": 60, "h": HOUR_S}


class Duration(click.ParamType[float]):
    """A time like ``90``, ``90s``, ``15m`` or ``2h``, in seconds."""

    name = "duration"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> float:
        found = re.fullmatch(r"(\d+(?:\.\d+)?)\s*([a-z]*)", str(value))
        if not found or found[2] not in SECONDS or float(found[1]) <= 0:
            self.fail(f"{value!r} is not a duration. Write one like 90s, 15m or 2h.", param, ctx)
        return float(found[1]) * SECONDS[found[2]]


@click.command()
@click.argument("fleet_or_plan", type=click.Path(path_type=Path))
@click.option("--trace", type=click.Path(path_type=Path), metavar="FILE", help="Replay this trace.")
@click.option("--columns", metavar="MAP", default="", help="Of the trace: arrival=ts,prompt=in,output=out,tenant=team.")
@click.option("--traffic", metavar="CHANGES", default="", help="Change the trace: 'x2, repeat 7 every 24h'.")
@click.option("--surge", "surges", metavar="SURGE", multiple=True, help="public:10x@20:00+2h; may be given again.")
@click.option("--duration", type=Duration(), metavar="TIME", help="Only so much of the traffic: 90s, 15m, 2h.")
@click.option("--seed", type=click.IntRange(min=0), default=0, show_default=True, help="Of drawn arrivals.")
@click.option(
    "--output", "-o", type=click.Path(path_type=Path), metavar="FILE", help="Write every request as CSV here."
)
@click.option("--json", "as_json", is_flag=True, help="Print the summaries as JSON.")
def rehearse(
    fleet_or_plan: Path,
    trace: Path | None,
    columns: str,
    traffic: str,
    surges: tuple[str, ...],
    duration: float | None,
    seed: int,
    output: Path | None,
    *,
    as_json: bool,
) -> None:
    """Replay traffic against FLEET_OR_PLAN (fleet.toml or plan.json): who waits, who is refused, what it costs.

    The traffic is the trace, dealt to the fleet's demand; without one, each demand's own trace, or arrivals drawn at
    its rate: 15 minutes of the busiest hour, or from an hour before a surge to an hour after. Every replica runs
    continuous batching at the speed of the cost model.

    \b
    waterline rehearse examples/mixed.toml
    waterline rehearse examples/mixed.toml --trace examples/traces/office-hour.csv
    waterline rehearse examples/mixed.toml --surge public:10x@20:00+2h
    """  # noqa: D301 - click wants the character itself
    from waterline import rehearsal
    from waterline.workload.files import open_trace
    from waterline.workload.grammar import parse_surge, parse_traffic

    if output == Path("-"):
        raise InputError("--output names a file, and '-' is none. To print the requests: --output /dev/stdout --json")
    if (columns or traffic) and not trace:
        raise InputError("--columns and --traffic are about a trace. Name it with --trace FILE.")
    changes, surging = parse_traffic(traffic, columns=columns), [parse_surge(surge) for surge in surges]
    replayed = changes.apply(open_trace(trace, columns=columns, seed=seed), seed=seed) if trace else None
    plan = _plan_of(fleet_or_plan)
    _prepare(rehearsal.prepare)
    began_s = time.perf_counter()
    with _watching() as watch:
        happened = rehearsal.rehearse(
            plan, replayed, seed=seed, duration_s=duration, surges=surging, keep=bool(output), watch=watch
        )
    took_s = time.perf_counter() - began_s
    if output:
        write_completions(happened.completions, output)
    if as_json:
        click.echo(to_json(plan, happened, took_s))
    else:
        show(plan, happened, took_s)


def _plan_of(path: Path) -> "Plan":
    from waterline.plan import is_plan, read_plan

    if is_plan(path):
        return read_plan(path)
    from waterline.fleet import load_fleet
    from waterline.planner import make_plan

    return make_plan(load_fleet(path))


def _prepare(prepare: Callable[[], None]) -> None:
    """Compile, and say so to a person at a terminal when it takes long: only the first time does."""
    text = "Compiling the rehearsal for this machine, once; that takes 10 to 30 seconds …"
    note = threading.Timer(1.5, click.echo, [text], {"err": True})
    if sys.stderr.isatty():
        note.start()
    prepare()
    note.cancel()


@contextmanager
def _watching() -> "Iterator[Callable[[Progress], bool]]":
    """Show how far a long rehearsal is, to a person at a terminal; Ctrl-C ends it early and in order."""
    from rich.console import Console
    from rich.progress import BarColumn, TextColumn, TimeRemainingColumn
    from rich.progress import Progress as Bar

    going = True

    def stop(*_: object) -> None:
        nonlocal going
        if not going:  # the second time
            raise KeyboardInterrupt
        going = False

    columns = (TextColumn("Rehearsing"), BarColumn(), TextColumn("{task.fields[done]}"), TimeRemainingColumn())
    bar = Bar(*columns, console=Console(stderr=True), transient=True, disable=not sys.stderr.isatty())
    began_s = time.perf_counter()

    def watch(progress: "Progress") -> bool:
        took_s = time.perf_counter() - began_s
        done = f"{progress.requests:,} requests, {progress.requests / took_s:,.0f} per second"
        bar.update(task, total=max(progress.of_s, progress.at_s), completed=progress.at_s, done=done)
        return going

    at_main = threading.current_thread() is threading.main_thread()
    before = signal.signal(signal.SIGINT, stop) if at_main else None
    try:
        with bar:
            task = bar.add_task("", done="")
            yield watch
    finally:
        if at_main:
            signal.signal(signal.SIGINT, before)


def write_completions(completions: "tuple[Completion, ...]", path: Path) -> None:
    """Write one row a request, in the order of arrival; what did not happen (a first token) is empty."""
    from waterline.outcome import Completion
    from waterline.workload import write_whole

    file = io.StringIO()
    writer = csv.DictWriter(file, [field.name for field in fields(Completion)], lineterminator="\n")
    writer.writeheader()
    for completion in completions:
        row = asdict(completion)
        writer.writerow({key: "" if value != value else value for key, value in row.items()})  # noqa: PLR0124 - NaN
    try:
        write_whole(path, file.getvalue().encode())
    except OSError as error:
        raise InputError(f"cannot write {path}: {error.strerror}. Choose another place with --output.") from error


def to_json(plan: "Plan", rehearsal: "Rehearsal", took_s: float) -> str:
    """Return one object; the same input gives the same text, but for the speed."""
    data = {
        "fleet": plan.fleet.name,
        "replayed": rehearsal.notes,
        "duration_s": rehearsal.duration_s,
        "gpus": plan.gpus,
        "usd_per_hour": plan.usd_per_hour,
        "usd": rehearsal.usd,
        "requests": rehearsal.summaries[0].requests,
        "requests_per_s_simulated": round(rehearsal.summaries[0].requests / took_s, 1) if took_s > 0 else 0.0,
        "total": rehearsal.summaries[0],
        "by_tenant": {summary.tenant: summary for summary in rehearsal.by_tenant},
        "parts": rehearsal.summaries[1:],
    }
    return msgspec.json.format(msgspec.json.encode(data), indent=2).decode()


def show(plan: "Plan", rehearsal: "Rehearsal", took_s: float) -> None:
    """Draw who asked, who waited how long, and what it cost; then what was replayed."""
    from waterline.rehearsal import COMPILED

    total, *parts = rehearsal.summaries
    rows = [
        (
            summary.tenant or "all",
            summary.model,
            f"{summary.requests:,}",
            f"{summary.completed:,}",
            f"{summary.refused:,}",
            _percentiles_text(summary.ttft_s),
            _percentiles_text(summary.tpot_s),
            f"{summary.goodput_per_s:.3g}",
            f"{summary.slo_fraction:.1%}",
            f"{summary.gpu_hours:.3g}",
            usd_text(summary.usd),
        )
        for summary in (*parts, total)
    ]
    ttft, tpot = "TTFT p50/p90/p99", "TPOT p50/p90/p99"
    screen = console()
    draw(
        screen,
        f"{plan.fleet.name}: {plan.gpus} of {plan.fleet.gpus} GPUs, rehearsed",
        ("tenant", "model", "requests", "done", "refused", ttft, tpot, "goodput/s", "in SLO", "GPU-h", "cost"),
        rows,
        text_columns=2,
        spare=("GPU-h", "goodput/s", "done", tpot, "cost", "refused", ttft),
        last_apart=True,
    )
    for note in rehearsal.notes:
        screen.print(note)
    speed = total.requests / took_s if took_s > 0 else 0.0
    screen.print(
        f"{rehearsal.duration_s / 60:,.1f} min from the first arrival to the last token, at "
        f"{usd_text(plan.usd_per_hour)} per hour for the plan; {rehearsal.preempted:,} "
        f"{'request was' if rehearsal.preempted == 1 else 'requests were'} preempted.",
    )
    slow = "" if COMPILED else " Without numba; with it hundreds of times more: pip install 'waterline-llm[rehearse]'"
    screen.print(f"Rehearsed in {seconds_text(took_s)}, {speed:,.0f} requests per second.{slow}", style="dim")


def _percentiles_text(times_s: "Percentiles | None") -> str:
    """Say three times in one unit, that of the first: ``12/40/310 ms``, ``0.43/1.77/12.1 s``."""
    if times_s is None:
        return "-"
    scale, unit = (1e3, "ms") if times_s.p50 < 0.1 else (1.0, "s")
    values = [time_s * scale for time_s in (times_s.p50, times_s.p90, times_s.p99)]
    digits = [max(0, (1 if unit == "ms" else 2) - (value >= 10) - (value >= 100)) for value in values]
    return "/".join(f"{value:.{places}f}" for value, places in zip(values, digits, strict=True)) + f" {unit}"
