"""`waterline rehearse`: what will happen."""

import os
import re
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from waterline.errors import InputError
from waterline.units import HOUR_S

if TYPE_CHECKING:
    from waterline.plan import Plan
    from waterline.rehearsal import Progress, Rehearsal

SECONDS = {"": 1, "s": 1, "m": 60, "min": 60, "h": HOUR_S}
FIRST_TIME = "Compiling the rehearsal for this machine, once; that takes a minute or so …"


class Duration(click.ParamType[float]):
    """A time like ``90``, ``90s``, ``15m`` or ``2h``, in seconds."""

    name = "duration"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> float:
        found = re.fullmatch(r"(\d+(?:\.\d+)?)\s*([a-z]*)", str(value))
        if not found or found[2] not in SECONDS or float(found[1]) <= 0:
            self.fail(f"{value!r} is not a duration. Write one like 90s, 15m or 2h.", param, ctx)
        return float(found[1]) * SECONDS[found[2]]


@dataclass(frozen=True, slots=True, kw_only=True)
class Question:
    """What is asked of every plan alike: all of it plain values, so that it can go to another process."""

    trace: Path | None
    columns: str
    traffic: str
    surges: tuple[str, ...]
    failures: tuple[str, ...]
    duration_s: float | None
    seed: int

    def answer(
        self,
        plan: "Plan",
        policy: str,
        *,
        keep: bool = False,
        decisions: bool = False,
        watch: "Callable[[Progress], bool]" = lambda _: True,
    ) -> "Rehearsal":
        from waterline import rehearsal
        from waterline.rehearsal.failures import parse_failure
        from waterline.workload.files import open_trace
        from waterline.workload.grammar import parse_surge, parse_traffic

        if (self.columns or self.traffic) and not self.trace:
            raise InputError("--columns and --traffic are about a trace. Name it with --trace FILE.")
        changes = parse_traffic(self.traffic, columns=self.columns)
        surges = [parse_surge(surge) for surge in self.surges]
        opened = open_trace(self.trace, columns=self.columns, seed=self.seed) if self.trace else None
        return rehearsal.rehearse(
            plan,
            changes.apply(opened, seed=self.seed) if opened else None,
            seed=self.seed,
            duration_s=self.duration_s,
            surges=surges,
            failures=[parse_failure(failure) for failure in self.failures],
            keep=keep,
            policy=policy,
            decisions=decisions,
            watch=watch,
        )


@dataclass(frozen=True, slots=True, kw_only=True)
class Rehearsed:
    """One rehearsal and how it went."""

    name: str  # by which it is told from others
    plan: "Plan"
    policy: str
    happened: "Rehearsal"
    took_s: float

    @property
    def requests_per_s(self) -> float:
        return self.happened.summaries[0].requests / self.took_s if self.took_s > 0 else 0.0


def file_option(name: str, text: str, *more: str) -> Callable[[Any], Any]:
    return click.option(name, *more, type=click.Path(path_type=Path), metavar="FILE", help=text)


@click.command()
@click.argument("fleet_or_plan", type=click.Path(path_type=Path), nargs=-1, required=True)
@file_option("--trace", "Replay this trace.")
@click.option("--columns", metavar="MAP", default="", help="Of the trace: arrival=ts,prompt=in,output=out,tenant=team.")
@click.option("--traffic", metavar="CHANGES", default="", help="Change the trace: 'x2, repeat 7 every 24h'.")
@click.option("--surge", "surges", metavar="SURGE", multiple=True, help="public:10x@20:00+2h; may be given again.")
@click.option("--fail", "failures", metavar="NODE", multiple=True, help="A node goes down: h800:3@20:30+2h; again.")
@click.option("--duration", type=Duration(), metavar="TIME", help="Only so much of the traffic: 90s, 15m, 2h.")
@click.option("--seed", type=click.IntRange(min=0), default=0, show_default=True, help="Of drawn arrivals.")
@click.option(
    "--policy", metavar="NAMES", default="", help="Who decides: several of them are compared: fcfs,waterline."
)
@click.option("--sweep", "sweeps", metavar="KEY=VALUES", multiple=True, help="tenants.public.limit=0.2:0.8:0.1; again.")
@click.option("--ray", metavar="ADDRESS", help="Sweep over the Ray cluster there, or 'local'.")
@file_option("--output", "Write every request as CSV here; of a sweep, every point.", "-o")
@file_option("--html", "Write a page with charts here.")
@file_option("--decisions", "Write every decision as a line of JSON here.")
@click.option("--json", "as_json", is_flag=True, help="Print all there is to say as JSON.")
def rehearse(
    fleet_or_plan: tuple[Path, ...],
    trace: Path | None,
    columns: str,
    traffic: str,
    surges: tuple[str, ...],
    failures: tuple[str, ...],
    duration: float | None,
    seed: int,
    policy: str,
    sweeps: tuple[str, ...],
    ray: str | None,
    output: Path | None,
    html: Path | None,
    decisions: Path | None,
    *,
    as_json: bool,
) -> None:
    """Replay traffic against FLEET_OR_PLAN (fleet.toml or plan.json): who waits, who is refused, what it costs.

    The traffic is the trace, dealt to the fleet's demand; without one, each demand's own trace, or arrivals drawn at
    its rate: 15 minutes of the busiest hour, or from an hour before a surge to an hour after. Every replica runs
    continuous batching at the speed of the cost model. Several plans, or policies, are compared on the same traffic.

    \b
    waterline rehearse examples/mixed.toml
    waterline rehearse examples/mixed.toml --trace examples/traces/office-hour.csv
    waterline rehearse examples/mixed.toml --surge public:10x@20:00+2h
    waterline rehearse monday.json friday.json --html both.html
    waterline rehearse examples/mixed.toml --sweep 'pools.a100.nodes=1:4'
    """  # noqa: D301 - click wants the character itself
    check_places({"--output": output, "--html": html, "--decisions": decisions})
    question = Question(
        trace=trace, columns=columns, traffic=traffic, surges=surges, failures=failures, duration_s=duration, seed=seed
    )
    if sweeps or ray:
        if len(fleet_or_plan) > 1 or html or decisions or not sweeps:
            raise InputError(
                "a sweep is of one fleet file, and gives a table, --output FILE.csv or --json. Give it at least one "
                "--sweep KEY=VALUES, and neither --html nor --decisions."
            )
        from waterline.cli.sweep import sweep

        sweep(fleet_or_plan[0], question, sweeps, policy=policy, ray=ray, output=output, as_json=as_json)
        return
    policies = policies_of(policy)
    if len(fleet_or_plan) * len(policies) > 1 and (output or decisions):
        raise InputError("--output and --decisions are of one rehearsal. Give one plan and one policy.")
    found = rehearse_all(fleet_or_plan, policies, question, keep=bool(output), decisions=bool(decisions))
    if len(found) > 1:
        from waterline.cli import compare

        compare.tell(found, html=html, as_json=as_json)
        return
    tell(found[0], output=output, html=html, decisions=decisions, as_json=as_json)


def tell(found: Rehearsed, *, output: Path | None, html: Path | None, decisions: Path | None, as_json: bool) -> None:
    """Print and write what was asked for of one rehearsal."""
    from waterline.cli import rehearse_files

    said = []
    if as_json:
        click.echo(rehearse_files.to_json(rehearse_files.as_data(found)))
    else:
        from waterline.cli.rehearse_table import show

        show(found)
    if output:  # a disk that is full now costs the file, and not what was learnt
        completions = found.happened.completions
        rehearse_files.write_completions(completions, output)
        said.append(f"{len(completions):,} requests written to {output}.")
    if decisions:
        rehearse_files.write_decisions(found.happened, decisions)
        said.append(f"{len(found.happened.decisions):,} decisions written to {decisions}.")
        said.append(f"sha256 of those about replicas: {found.happened.digest}")
    if html:
        from waterline.cli.rehearse_page import write_page

        write_page([found], html)
        said.append(f"Written to {html}. Open it in a browser.")
    if said and not as_json:
        click.echo("\n".join(said))


def check_places(files: Mapping[str, Path | None]) -> None:
    """Raise InputError for a file that cannot be written, by its option: now, and not after the rehearsal."""
    options: dict[Path, str] = {}
    for option, file in files.items():
        if file is None:
            continue
        if file == Path("-"):
            raise InputError(f"{option} names a file, and '-' is none. To print there: {option} /dev/stdout")
        place = file.absolute()
        device = place.exists() and not (place.is_file() or place.is_dir())
        reason = (
            "it is a folder"
            if place.is_dir()
            else "there is no such folder"
            if not place.parent.is_dir()
            else "its folder may not be written to"
            if not (device or os.access(place.parent, os.W_OK))
            else ""
        )
        if reason:
            raise InputError(f"cannot write {file}: {reason}. Choose another place with {option}.")
        if place in options and not device:
            raise InputError(f"{options[place]} and {option} both name {file}. Give each a file of its own.")
        options[place] = option


def policies_of(names: str) -> tuple[str, ...]:
    """Return the policies a person names, of those there are; the usual one when none is named."""
    from waterline.rehearsal import POLICIES, check_policy

    policies = tuple(name.strip() for name in names.split(",")) if names else (POLICIES[0],)
    for name in policies:
        check_policy(name)
        if policies.count(name) > 1:
            raise InputError(f"the policy '{name}' is named twice. Name each once.")
    return policies


def rehearse_all(
    paths: Sequence[Path], policies: Sequence[str], question: Question, *, keep: bool, decisions: bool
) -> list[Rehearsed]:
    """Rehearse every plan under every policy, on the same traffic; Ctrl-C ends with what there is so far."""
    from waterline import rehearsal

    plans = [plan_of(path) for path in paths]
    if len(plans) > 1:
        from waterline.cli.compare import check_same_traffic

        check_same_traffic(paths, plans)
    names, found = _names(paths), list[Rehearsed]()
    with telling_of_compilation():
        rehearsal.prepare(decisions=decisions)
    with telling_of_compilation(), watching() as watch:  # prompts with beginnings in common take a loop of their own
        for name, plan in zip(names, plans, strict=True):
            for policy in policies:
                label = name if len(policies) == 1 else policy if len(plans) == 1 else f"{name}, {policy}"
                if found and not watch(None):
                    break
                begun_s = time.perf_counter()
                happened = question.answer(plan, policy, keep=keep, decisions=decisions, watch=watch)
                took_s = time.perf_counter() - begun_s
                found.append(Rehearsed(name=label, plan=plan, policy=policy, happened=happened, took_s=took_s))
    return found


def _names(paths: Sequence[Path]) -> list[str]:
    """Return the shortest names that tell files apart: without their folders, or with."""
    for names in ([path.stem for path in paths], [path.name for path in paths], [str(path) for path in paths]):
        if len(set(names)) == len(names):
            return names
    return [f"{path} ({number})" for number, path in enumerate(paths, start=1)]


def plan_of(path: Path) -> "Plan":
    from waterline.plan import is_plan, read_plan

    if is_plan(path):
        return read_plan(path)
    from waterline.fleet import load_fleet
    from waterline.planner import make_plan

    return make_plan(load_fleet(path))


@contextmanager
def telling_of_compilation() -> "Iterator[None]":
    """Say so to a person at a terminal when something has to be compiled."""
    from waterline.rehearsal.jit import telling

    with telling(partial(click.echo, FIRST_TIME, err=True)) if sys.stderr.isatty() else nullcontext():
        yield


@contextmanager
def watching() -> "Iterator[Callable[[Progress | None], bool]]":
    """Show how far a long rehearsal is, to a person at a terminal; Ctrl-C ends it early and in order.

    What is yielded tells whether to go on; None shows nothing.
    """
    going = True

    def stop(*_: object) -> None:
        nonlocal going
        if not going:  # the second time
            raise KeyboardInterrupt
        going = False

    with _bar() if sys.stderr.isatty() else _no_bar() as update:

        def watch(progress: "Progress | None") -> bool:
            if progress is not None:
                update(progress)
            return going

        at_main = threading.current_thread() is threading.main_thread()
        before = signal.signal(signal.SIGINT, stop) if at_main else None
        try:
            yield watch
        finally:
            if at_main:
                signal.signal(signal.SIGINT, before)


@contextmanager
def _no_bar() -> "Iterator[Callable[[Progress], None]]":
    yield lambda _: None


@contextmanager
def _bar() -> "Iterator[Callable[[Progress], None]]":
    from rich.console import Console
    from rich.progress import BarColumn, TextColumn, TimeRemainingColumn
    from rich.progress import Progress as Bar

    columns = (TextColumn("Rehearsing"), BarColumn(), TextColumn("{task.fields[done]}"), TimeRemainingColumn())
    with Bar(*columns, console=Console(stderr=True), transient=True) as bar:
        task = bar.add_task("", done="")
        begun_s, before = time.perf_counter(), 0

        def update(progress: "Progress") -> None:
            nonlocal begun_s, before
            if progress.requests < before:  # the next rehearsal has begun
                begun_s = time.perf_counter()
                bar.reset(task)
            before = progress.requests
            took_s = max(1e-3, time.perf_counter() - begun_s)
            done = f"{progress.requests:,} requests, {progress.requests / took_s:,.0f} per second"
            bar.update(task, total=max(progress.of_s, progress.at_s), completed=progress.at_s, done=done)

        yield update
