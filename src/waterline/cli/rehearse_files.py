"""What a rehearsal leaves for programs: one object of JSON, every request as CSV, every decision as a line."""

import csv
import io
import math
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import asdict, fields
from pathlib import Path
from typing import TYPE_CHECKING, Any

import msgspec
import numpy as np

from waterline.cli.day import PUBLIC
from waterline.errors import InputError
from waterline.fleet import Fleet
from waterline.outcome import Completion, Summary
from waterline.policy.decisions import FIELDS, as_json, is_about_replicas
from waterline.units import HOUR_S
from waterline.workload import write_whole

if TYPE_CHECKING:
    from waterline.cli.rehearse import Rehearsed
    from waterline.rehearsal import Rehearsal
    from waterline.rehearsal.record import Reals

DIGITS = 6  # of the numbers of a timeline
LINES = 10_000  # of a file that are made at a time


def to_json(data: Any) -> str:
    return msgspec.json.format(msgspec.json.encode(data), indent=2).decode()


def as_data(found: "Rehearsed") -> dict[str, Any]:
    """Return all there is to say of a rehearsal; the same input gives the same, but for the speed."""
    happened, plan = found.happened, found.plan
    total, *parts = happened.summaries
    return {
        "fleet": plan.fleet.name,
        "policy": found.policy,
        "replayed": happened.notes,
        "first_hour": happened.first_hour,
        "duration_s": happened.duration_s,
        "gpus": plan.gpus,
        "usd_per_hour": plan.usd_per_hour,
        "usd": happened.usd,
        "kwh": {"replicas": total.kwh, "jobs": happened.jobs_kwh, "idle": happened.idle_kwh},
        "requests": total.requests,
        "requests_per_s_simulated": round(found.requests_per_s, 1),
        "total": total,
        "by_tenant": {summary.tenant: summary for summary in happened.by_tenant},
        "by_client": happened.by_client,
        "by_model": {summary.model: summary for summary in happened.by_model},
        "by_pool": {summary.pool: summary for summary in happened.by_pool},
        "parts": parts,
        "gpu_hours": gpu_hours_data(happened, plan.fleet),
        "lent": happened.lent,
        "jobs": happened.jobs,
        "moves": [_without_nan(asdict(move)) for move in happened.moves],
        "decisions_sha256": happened.digest,
        "timeline": timeline_data(happened, plan.fleet.gpus),
    }


def owned_gpu_hours(happened: "Rehearsal", fleet: Fleet) -> dict[str, dict[str, float]]:
    """Return the GPU-hours of the fleet by their owner: what it deserves; "" of what nobody does.

    "deserved" is what there was, "used" what the owner had of it, "lent" what others had, "idle" the rest.
    """
    line, hours = happened.timeline, happened.timeline.end_s / HOUR_S
    deserved = {one.name: float(one.deserved or 0.0) * fleet.gpus * hours for one in fleet.tenants}
    owned = {}
    for owner in (*line.tenants, ""):
        lent = math.fsum(loan.gpu_hours for loan in happened.lent if loan.lender == owner)
        borrowed = math.fsum(loan.gpu_hours for loan in happened.lent if loan.borrower == owner)
        used = line.gpu_hours_of(owner) - borrowed if owner else 0.0
        mine = deserved[owner] if owner else fleet.gpus * hours - math.fsum(deserved.values())
        owned[owner] = {"deserved": mine, "used": used, "lent": lent, "idle": mine - used - lent}
    return owned


def gpu_hours_data(happened: "Rehearsal", fleet: Fleet) -> dict[str, Any]:
    """Return whose GPU-hours there were, and who used others'; those of owners add up to the fleet's."""
    borrowers = dict.fromkeys(happened.timeline.tenants, 0.0)
    for loan in happened.lent:
        borrowers[loan.borrower] += loan.gpu_hours
    return {
        "fleet": fleet.gpus * happened.timeline.end_s / HOUR_S,
        "by_owner": owned_gpu_hours(happened, fleet),
        "by_borrower": borrowers,
    }


def timeline_data(happened: "Rehearsal", fleet_gpus: int) -> dict[str, Any]:
    """Return means over steps; replicas of one model in one pool together."""
    line = happened.timeline
    rows = {
        name: getattr(line, name)
        for name in ("gpus", "used_gpus", "asked_per_s", "refused_per_s", "waiting", "running")
    }
    groups: dict[tuple[str, str], list[int]] = {}
    for index, replica in enumerate(happened.replicas):
        groups.setdefault((replica.model, replica.pool), []).append(index)
    public = line.gpus[line.tenants.index(PUBLIC)] if PUBLIC in line.tenants else None
    return {
        "step_s": line.step_s,
        "at_s": _rounded(line.at_s),
        "end_s": line.end_s,
        "waterline": None if public is None else _rounded(public / fleet_gpus),
        "tenants": {
            tenant: {name: _rounded(row[index]) for name, row in rows.items()}
            for index, tenant in enumerate(line.tenants)
        },
        "spare_gpus": _rounded(line.spare_gpus),
        "down_gpus": _rounded(line.down_gpus),
        "replicas": [
            {
                "model": model,
                "pool": pool,
                "replicas": len(own),
                "present": _rounded(line.present[own].sum(axis=0)),
                "busy": _rounded(line.busy[own].sum(axis=0)),
            }
            for (model, pool), own in groups.items()
        ],
    }


def summary_row(summary: Summary) -> dict[str, Any]:
    """Return a summary as one flat row: ``ttft_p99_s`` for the p99 of `ttft_s`; None where there is none."""
    row: dict[str, Any] = {}
    for name in summary.__struct_fields__:
        value = getattr(summary, name)
        if name in {"ttft_s", "tpot_s", "latency_s"}:
            for part in ("mean", "p50", "p90", "p99"):
                row[f"{name.removesuffix('_s')}_{part}_s"] = None if value is None else getattr(value, part)
        else:
            row[name] = value
    return row


def write_completions(completions: Iterable[Completion], path: Path) -> None:
    """Write one row a request, in the order of arrival; what did not happen (a first token) is empty."""
    write_rows([field.name for field in fields(Completion)], (_without_nan(asdict(one)) for one in completions), path)


def write_rows(names: Sequence[str], rows: Iterable[dict[str, Any]], path: Path) -> None:
    """Write rows under their names as CSV; what there is none of is empty."""
    _write(path, _csv_lines(names, rows), "--output")


def _csv_lines(names: Sequence[str], rows: Iterable[dict[str, Any]]) -> Iterator[bytes]:
    file = io.StringIO()
    writer = csv.DictWriter(file, names, lineterminator="\n")
    writer.writeheader()
    for row in rows:
        writer.writerow({key: "" if value is None else value for key, value in row.items()})
        yield file.getvalue().encode()
        file.seek(0)
        file.truncate()
    yield file.getvalue().encode()


def write_decisions(happened: "Rehearsal", path: Path) -> None:
    """Write a line for every decision, about replicas and about requests, in the order of time."""
    _write(path, decision_lines(happened), "--decisions")


def decision_lines(happened: "Rehearsal") -> Iterator[bytes]:
    """Yield decisions as lines of JSON, by the names that replicas had then."""
    moves, rule = iter(happened.moves), FIELDS.index("rule")
    for begin in range(0, len(happened.decisions), LINES):
        rows, reasons = (table[begin : begin + LINES].tolist() for table in (happened.decisions, happened.reasons))
        for row, why in zip(rows, reasons, strict=True):
            if is_about_replicas(row[rule]):
                yield as_json(row, happened.names, next(moves).victim)
            else:
                yield as_json(row, happened.request_names, reasons=why)


def _write(path: Path, data: Iterable[bytes], option: str) -> None:
    try:
        write_whole(path, data)
    except OSError as error:
        raise InputError(f"cannot write {path}: {error.strerror}. Choose another place with {option}.") from error


def _without_nan(row: dict[str, Any]) -> dict[str, Any]:
    return {key: None if value != value else value for key, value in row.items()}  # noqa: PLR0124 - NaN


def _rounded(values: "Reals") -> list[float]:
    """Return numbers with a few digits: more of them would say nothing, and fill the file."""
    scale = 10.0 ** (DIGITS - 1 - np.floor(np.log10(np.maximum(np.abs(values), 1e-9))))
    rounded: list[float] = (np.rint(values * scale) / scale).tolist()
    return rounded
