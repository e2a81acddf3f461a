"""A sweep: one fleet file with keys set to one value after another, each point planned and rehearsed.

Points know nothing of one another, so they run on all cores, or on the machines of a Ray cluster; what a point comes
to is the same bytes wherever it was worked out.
"""

import itertools
import os
import re
import signal
import socket
import sys
import time
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from contextlib import contextmanager
from copy import deepcopy
from dataclasses import dataclass
from decimal import Decimal, InvalidOperation
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click
import msgspec

from waterline.errors import InputError, MissingExtraError, WaterlineError, nearest
from waterline.fleet import fleet_of, read_fleet_file
from waterline.plan import is_plan
from waterline.units import seconds_text

if TYPE_CHECKING:
    from waterline.cli.rehearse import Question

MOST_POINTS = 10_000
ANSWERS_WITHIN_S = 5.0  # a Ray cluster
NAMED = {"pools": "name", "models": "name", "tenants": "name", "jobs": "name"}  # tables whose entries have a name
NUMBER = re.compile(r"x?-?\d+(\.\d+)?([eE][+-]?\d+)?")

Value = int | float | str | bool


@dataclass(frozen=True, slots=True)
class Sweep:
    """One key of the fleet file and the values it takes."""

    key: str
    values: tuple[Value, ...]  # "x2": so many times what the file says


@dataclass(frozen=True, slots=True)
class Point:
    """What one process, here or elsewhere, works out."""

    data: dict[str, Any]  # of the fleet file, changed
    path: Path
    policy: str
    question: "Question"


def sweep(
    path: Path,
    question: "Question",
    sweeps: Sequence[str],
    *,
    policy: str,
    ray: str | None,
    output: Path | None,
    as_json: bool,
) -> None:
    """Rehearse every combination of values, and print what they come to, in their order."""
    from waterline.cli.rehearse import policies_of

    if is_plan(path):
        raise InputError(f"{path} is a plan, and a sweep changes the fleet file it was made from. Give that one.")
    data, parsed, policies = read_fleet_file(path), [parse_sweep(text) for text in sweeps], policies_of(policy)
    for key, times in Counter(one.key for one in parsed).items():
        if times > 1:
            raise InputError(f"--sweep {key}=… is given {times} times. Give it once, with all its values: {key}=A,B,C")
    combinations = list(itertools.product(*(one.values for one in parsed), policies))
    if len(combinations) > MOST_POINTS:
        raise InputError(f"this sweep has {len(combinations):,} points, more than {MOST_POINTS:,}. Take larger steps.")
    points = []
    for combination in combinations:
        values, name = combination[:-1], str(combination[-1])
        changed = deepcopy(data)
        for one, value in zip(parsed, values, strict=True):
            set_key(changed, one.key, value, path)
        fleet_of(changed, path)  # what is wrong with a point is said before any runs
        points.append(Point(changed, path, name, question))
    keys = [one.key for one in parsed] + (["policy"] if len(policies) > 1 else [])
    answers: list[bytes] = []
    begun_s = time.perf_counter()
    with _runner(ray, len(points)) as run:
        try:
            for answer in run(points):
                answers.append(answer)
                if sys.stderr.isatty():
                    left_s = (time.perf_counter() - begun_s) / len(answers) * (len(points) - len(answers))
                    said = f"\r{len(answers)} of {len(points)} points, {seconds_text(left_s)} to go \033[K"
                    click.echo(said, err=True, nl=len(answers) == len(points))
        except KeyboardInterrupt:
            click.echo(f"\nstopped after {len(answers)} of {len(points)} points", err=True)
    settings = [dict(zip(keys, values, strict=False)) for values in combinations]
    _tell(keys, settings[: len(answers)], [msgspec.json.decode(answer) for answer in answers], output, as_json=as_json)


def rehearse_point(point: Point) -> bytes:
    """Plan and rehearse one point; return a JSON object of its summaries, or of why there are none."""
    from waterline.cli.rehearse_files import summary_row
    from waterline.planner import make_plan

    try:
        plan = make_plan(fleet_of(point.data, point.path))
        happened = point.question.answer(plan, point.policy)
    except WaterlineError as error:  # a point that cannot be is an answer too
        return msgspec.json.encode({"error": str(error)})
    rows = [summary_row(one) for one in (happened.summaries[0], *happened.by_tenant)]
    totals = {
        "gpus": plan.gpus,
        "usd_per_hour": plan.usd_per_hour,
        "kept_gpu_hours": sum(job.gpu_hours for job in happened.jobs),
        "lost_gpu_hours": sum(job.lost_gpu_hours for job in happened.jobs),
        "moves": len(happened.moves),
        "warnings": list(plan.warnings),
    }
    return msgspec.json.encode({**totals, "summaries": rows})


# --- Where points run -------------------------------------------------------------------------------------------------


@contextmanager
def _runner(address: str | None, points: int) -> Iterator[Callable[[Sequence[Point]], Iterator[bytes]]]:
    """Yield what works out points and yields the answers in their order."""
    if address is not None:
        with _on_ray(address) as run:
            yield run
        return
    from waterline.cli.rehearse import telling_of_compilation
    from waterline.rehearsal import prepare

    with telling_of_compilation():
        prepare()  # once, before each process does
    workers = min(os.cpu_count() or 1, points)
    if workers < 2:
        yield lambda all_points: map(rehearse_point, all_points)
        return
    import multiprocessing

    context = multiprocessing.get_context("spawn")  # threads of numpy and numba do not survive a fork
    ignore = signal.SIGINT, signal.SIG_IGN  # Ctrl-C goes to all processes of a terminal; this one says when to stop
    with ProcessPoolExecutor(workers, mp_context=context, initializer=signal.signal, initargs=ignore) as pool:
        try:
            yield lambda all_points: pool.map(rehearse_point, all_points)
        except BrokenProcessPool as error:
            raise WaterlineError(
                "a process that worked out points was killed, perhaps for want of memory. Take less traffic, with "
                "--duration, or points one by one."
            ) from error
        finally:
            pool.shutdown(wait=False, cancel_futures=True)
            for process in multiprocessing.active_children():
                process.terminate()  # what is still worked out, nobody waits for


@contextmanager
def _on_ray(address: str) -> Iterator[Callable[[Sequence[Point]], Iterator[bytes]]]:
    """Run on the Ray cluster at an address, or on one of this machine's own. Files are read where a point runs."""
    try:
        import ray
    except ImportError as error:
        raise MissingExtraError("a sweep over a Ray cluster", "ray") from error
    _knock(address)
    try:
        ray.init(
            address=None if address == "local" else address,
            log_to_driver=False,
            include_dashboard=False if address == "local" else None,
            logging_level="ERROR",
        )
    except (ConnectionError, RuntimeError, ValueError) as error:
        raise InputError(
            f"no Ray cluster answers at '{address}': {str(error).splitlines()[0]}. Write host:port, auto, or local."
        ) from error
    try:
        remote = ray.remote(rehearse_point)

        def run(points: Sequence[Point]) -> Iterator[bytes]:
            for reference in [remote.remote(point) for point in points]:
                answer: bytes = ray.get(reference)
                yield answer

        yield run
    finally:
        ray.shutdown()


def _knock(address: str) -> None:
    """Raise InputError when nobody listens at host:port; Ray itself would go on trying for minutes."""
    host, colon, port = address.removeprefix("ray://").rpartition(":")
    if not colon:
        return  # "auto", "local"
    try:
        socket.create_connection((host.strip("[]"), int(port)), timeout=ANSWERS_WITHIN_S).close()
    except (OSError, ValueError, OverflowError) as error:
        raise InputError(f"no Ray cluster answers at '{address}': {error}. Write host:port, auto, or local.") from error


# --- What a person writes ---------------------------------------------------------------------------------------------


def parse_sweep(text: str) -> Sweep:
    """Read ``tenants.public.limit=0.2:0.8:0.1``, ``pools.a100.nodes=2,4,8``, ``demand.1.requests_per_s=x1:x3:x0.5``."""
    key, equals, values = text.partition("=")
    if not equals or not key.strip() or not values.strip():
        raise InputError(
            f"'{text}' is not a sweep. Write KEY=FROM:TO:STEP or KEY=A,B,C: tenants.public.limit=0.2:0.8:0.1"
        )
    found = [value for part in values.split(",") for value in _values(text, part.strip())]
    if len(set(map(str, found))) != len(found):
        raise InputError(f"'{text}' names a value twice. Name each once.")
    return Sweep(key.strip(), tuple(found))


def _values(text: str, part: str) -> list[Value]:
    ends = part.split(":")
    if len(ends) == 1 or not all(NUMBER.fullmatch(end) for end in ends):
        return [_value(part)]
    times = "x" if ends[0].startswith("x") else ""
    try:
        begin, last, step = (Decimal(end.removeprefix("x")) for end in [*ends, "1"][:3])
    except (InvalidOperation, ValueError) as error:
        raise InputError(
            f"'{part}' in '{text}' is no range. Write FROM:TO or FROM:TO:STEP, like 0.2:0.8:0.1"
        ) from error
    if len(ends) > 3 or step <= 0 or last < begin:
        raise InputError(f"'{part}' in '{text}' is no range. Write FROM:TO or FROM:TO:STEP, like 0.2:0.8:0.1")
    whole = all("." not in end and "e" not in end.lower() for end in ends)
    if len(ends) == 2 and not whole:
        raise InputError(f"'{part}' in '{text}' needs a step. Write FROM:TO:STEP, like {ends[0]}:{ends[1]}:0.1")
    if (last - begin) / step > MOST_POINTS:
        raise InputError(f"'{part}' in '{text}' has more than {MOST_POINTS:,} values. Take a larger step.")
    count = int((last - begin) / step) + 1
    numbers = [begin + step * number for number in range(count)]
    return [f"x{number}" if times else int(number) if whole else float(number) for number in numbers]


def _value(text: str) -> Value:
    if text in {"true", "false"}:
        return text == "true"
    for kind in (int, float):
        try:
            return kind(text)
        except ValueError:
            continue
    return text.strip("\"'")


def set_key(data: dict[str, Any], key: str, value: Value, path: Path) -> None:
    """Set a key of a fleet file's data: ``models.chat.slo.ttft_s``; of a [[demand]] by its number, from 1 on.

    Raises InputError when there is no such place. Whether the key itself is one is for the fleet file's check to say.
    """
    place, rest = data, key
    table, _, inner = key.partition(".")
    if isinstance(data.get(table), list):
        place, rest = _entry(data, table, inner, key, path)
    elif inner or table in NAMED or table == "demand":
        known = [name for name, entries in data.items() if isinstance(entries, list)]
        raise InputError(f"{path} has no [[{table}]], which --sweep {key}=… would change. {nearest(table, known)}")
    *parents, last = rest.split(".")
    for parent in parents:
        inner_place = place.setdefault(parent, {})
        if not isinstance(inner_place, dict):
            raise InputError(f"{path}: '{parent}' in --sweep {key}=… is no table. Leave out what stands behind it.")
        place = inner_place
    place[last] = _times(place, last, value, key, path) if isinstance(value, str) and NUMBER.fullmatch(value) else value


def _entry(data: dict[str, Any], table: str, inner: str, key: str, path: Path) -> tuple[dict[str, Any], str]:
    """Return the entry of a table that a key names, and what of the key is left."""
    entries: list[dict[str, Any]] = data[table]
    name = NAMED.get(table, "")
    names = [str(entry.get(name, "")) if name else str(number) for number, entry in enumerate(entries, start=1)]
    for known, entry in sorted(zip(names, entries, strict=True), key=lambda pair: -len(pair[0])):
        if known and inner.startswith(f"{known}."):
            return entry, inner[len(known) + 1 :]
    if inner in names:
        raise InputError(f"--sweep {key}=… names no key of [[{table}]] '{inner}'. Write one: {key}.KEY=…")
    asked = inner.partition(".")[0]
    what = f"'{asked}'" if name else f"number '{asked}'"
    raise InputError(f"{path} has no [[{table}]] {what}, which --sweep {key}=… would change. {nearest(asked, names)}")


def _times(place: dict[str, Any], last: str, value: str, key: str, path: Path) -> Any:
    before, factor = place.get(last), float(value.removeprefix("x"))
    if isinstance(before, list) and all(isinstance(one, int | float) for one in before):
        return [one * factor for one in before]
    if isinstance(before, bool) or not isinstance(before, int | float):
        raise InputError(
            f"{path} gives {key} no number, of which --sweep {key}={value} could be so many times. Write one."
        )
    product = before * factor
    return int(product) if isinstance(before, int) and product == int(product) else product


# --- What it comes to -------------------------------------------------------------------------------------------------


def _tell(
    keys: Sequence[str],
    settings: Sequence[dict[str, Any]],
    answers: Sequence[dict[str, Any]],
    output: Path | None,
    *,
    as_json: bool,
) -> None:
    from waterline.cli.rehearse_files import to_json, write_rows

    rows = [
        {**setting, **{key: value for key, value in answer.items() if key not in {"summaries", "warnings"}}, **summary}
        for setting, answer in zip(settings, answers, strict=True)
        for summary in answer.get("summaries", [{}])
    ]
    if as_json:
        points = [{"set": setting, **answer} for setting, answer in zip(settings, answers, strict=True)]
        click.echo(to_json({"keys": keys, "points": points}))
    else:
        _draw(keys, settings, answers)
    if output:
        names = dict.fromkeys(name for row in rows for name in row)
        write_rows(list(names), rows, output)
        if not as_json:
            click.echo(f"Written to {output}.")


def _draw(keys: Sequence[str], settings: Sequence[dict[str, Any]], answers: Sequence[dict[str, Any]]) -> None:
    from waterline.cli.tables import console, draw
    from waterline.units import usd_text

    tenants = dict.fromkeys(one["tenant"] for answer in answers for one in answer.get("summaries", [])[1:])
    rows, errors = [], []
    for setting, answer in zip(settings, answers, strict=True):
        said = [str(setting[key]) for key in keys]
        if "error" in answer:
            errors.append(f"{', '.join(f'{key} = {setting[key]}' for key in keys)}: {answer['error']}")
            rows.append([*said, *["-"] * (5 + len(tenants))])
            continue
        total, *others = answer["summaries"]
        within = {one["tenant"]: f"{one['slo_fraction']:.1%}" for one in others}
        p99 = total["ttft_p99_s"]
        rows.append(
            [
                *said,
                f"{answer['gpus']:,}",
                f"{total['requests']:,}",
                f"{total['refused']:,}",
                "-" if p99 is None else f"{p99:.2f} s",
                *(within.get(tenant, "-") for tenant in tenants),
                usd_text(total["usd"]),
            ]
        )
    in_slo = [f"{tenant} in SLO" for tenant in tenants]
    heads = [*keys, "GPUs", "requests", "refused", "TTFT p99", *in_slo, "cost"]
    draw(console(), f"{len(rows)} points", heads, rows, text_columns=0, spare=("requests", "GPUs", "refused"))
    for error in errors:
        console().print(error)
