"""`waterline estimate`: what if, a table of points at a time."""

import csv
import io
import math
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cache
from pathlib import Path

import click

from waterline import catalog
from waterline.catalog.engines import EngineProfile, find_engine
from waterline.cost import StepCost, step_cost
from waterline.cost.estimate import Estimate, estimate_replica
from waterline.errors import InputError, UnknownNameError, WaterlineError, nearest
from waterline.hardware import Gpu
from waterline.llm import PRECISIONS, Llm
from waterline.plan import Layout
from waterline.units import GIB
from waterline.workload import write_whole

NEEDED = ("model", "gpu", "isl", "osl", "concurrency")
DEGREES = ("tp", "pp", "attention_dp", "moe_tp", "moe_ep")
OPTIONAL = ("engine", "precision", *DEGREES, "prefix_hit")
FIGURES = ("ttft_ms", "tpot_ms", "tokens_per_s_per_gpu")
FOUND = (
    *(f"{name}{edge}" for name in FIGURES for edge in ("", "_low", "_high")),
    "memory_gib_per_gpu", "provenance", "note", "error",
)  # fmt: skip
SPELLED = {"fp4": "nvfp4", "fp16": "bf16", "int4 awq": "int4", "awq": "int4", "gptq": "int4"}
MOST = 10**9


@click.command()
@click.option(
    "--points", required=True, type=click.Path(exists=True, dir_okay=False, path_type=Path), metavar="CSV",
    help="One point a row.",
)  # fmt: skip
@click.option("-o", "--output", type=click.Path(dir_okay=False, path_type=Path), help="Where to; else to the screen.")
def estimate(points: Path, output: Path | None) -> None:
    """Estimate TTFT, TPOT and throughput for every row of a table.

    Columns in: model, gpu, isl, osl, concurrency (of each data-parallel rank), and where they differ from their
    defaults engine, precision, tp, pp, attention_dp, moe_tp, moe_ep, prefix_hit. Columns out: the same, each figure
    with the interval that holds four of five measurements, and where it comes from. A row that cannot be says why.

    \b
    waterline estimate --points points.csv -o out.csv
    """  # noqa: D301 - click reads the backspace as: leave these lines alone
    columns, rows = read_points(points)
    text = io.StringIO()
    writer = csv.DictWriter(text, [*columns, *(name for name in FOUND if name not in columns)], lineterminator="\n")
    writer.writeheader()
    refused = 0
    for row in rows:
        found = answer(row)
        refused += bool(found["error"])
        writer.writerow({**row, **found})
    if output is None:
        click.echo(text.getvalue(), nl=False)
    else:
        try:
            write_whole(output, text.getvalue().encode())
        except OSError as error:
            raise InputError(f"{output} cannot be written: {error.strerror}.") from error
        click.echo(f"{len(rows) - refused} of {len(rows)} points estimated; {output}")


def read_points(path: Path) -> tuple[list[str], list[dict[str, str]]]:
    """Return the columns and the rows of a table of points. Raises InputError naming the line that is no row."""
    try:
        with path.open(newline="", encoding="utf-8-sig") as file:
            reader = csv.DictReader(file, restkey="", restval="", strict=True)
            columns = list(reader.fieldnames or ())
            if missing := [name for name in NEEDED if name not in columns]:
                raise InputError(f"{path} has no column {', '.join(missing)}. It needs {', '.join(NEEDED)}.")
            rows = []
            for row in reader:
                if row.pop("", None):
                    raise InputError(f"{path}:{reader.line_num}: more cells than the {len(columns)} columns.")
                rows.append(row)
    except (csv.Error, UnicodeDecodeError) as error:
        raise InputError(f"{path} is not a CSV file: {error}.") from error
    except OSError as error:
        raise InputError(f"{path} cannot be read: {error.strerror}.") from error
    return columns, rows


def answer(row: Mapping[str, str]) -> dict[str, str]:
    """Return the columns found for a row; `error` alone for one that cannot be."""
    found = dict.fromkeys(FOUND, "")
    try:
        result, note = _estimated(row)
    except WaterlineError as error:
        return {**found, "error": str(error)}
    for name, between, unit in (
        ("ttft_ms", result.ttft_s, 1e3),
        ("tpot_ms", result.tpot_s, 1e3),
        ("tokens_per_s_per_gpu", result.tokens_per_s_per_gpu, 1.0),
    ):
        for edge, value in (("", between.value), ("_low", between.low), ("_high", between.high)):
            found[name + edge] = f"{value * unit:.6g}"
    notes = (*((note,) if note else ()), *result.notes)
    return {
        **found,
        "memory_gib_per_gpu": f"{result.needed_bytes_per_gpu / GIB:.3f}",
        "provenance": result.provenance,
        "note": "; ".join(notes),
    }


def _estimated(row: Mapping[str, str]) -> tuple[Estimate, str]:
    ranks = _count(row, "attention_dp", 1)
    layout, note = read_layout(*(ranks if name == "attention_dp" else _count(row, name, 1) for name in DEGREES))
    replica = _replica(
        row["model"].strip(), row["gpu"].strip(), row.get("precision", "").strip(),
        row.get("engine", "").strip() or "vllm", layout,
    )  # fmt: skip
    result = estimate_replica(
        replica.llm, replica.gpu, layout, replica.precision, replica.engine, replica.step,
        prompt_tokens=_count(row, "isl"),
        output_tokens=_count(row, "osl"),
        concurrency=_count(row, "concurrency") * ranks,
        prefix_hit=_share(row, "prefix_hit"),
    )  # fmt: skip
    return result, note


@dataclass(frozen=True, slots=True)
class _Replica:
    llm: Llm
    gpu: Gpu
    precision: str
    engine: EngineProfile
    step: StepCost


@cache
def _replica(model: str, gpu_name: str, precision: str, engine_name: str, layout: Layout) -> _Replica:
    """Price the steps of a replica, once for all rows about it."""
    llm, gpu = catalog.load_model(model, Path()), catalog.find_gpu(gpu_name)
    precision = read_precision(precision, llm)
    engine = find_engine(engine_name).on(gpu)
    return _Replica(llm, gpu, precision, engine, step_cost(llm, gpu, layout, precision, engine))


def read_precision(name: str, llm: Llm) -> str:
    """Return the precision a cell means; an empty one means the checkpoint's own."""
    found = SPELLED.get(name.lower(), name.lower()) or llm.precision
    if found not in PRECISIONS:
        raise UnknownNameError(f"no precision is called '{name[:40]}'. {nearest(found, PRECISIONS)}")
    return found


def read_layout(tp: int, pp: int, attention_dp: int, moe_tp: int, moe_ep: int) -> tuple[Layout, str]:
    """Return the layout that degrees state, and a note where they are read otherwise than they stand.

    Published tables of runs write the product of tensor and expert degree for engines that run both over the same GPUs:
    ``tp 64, moe_tp 8, moe_ep 8`` for eight GPUs, ``tp 4, attention_dp 4, moe_ep 16`` for four. Where both degrees are
    equal and their product is what stands, it is read as those GPUs.
    """
    gpus = tp * attention_dp
    twice = moe_tp == moe_ep and moe_tp * moe_ep == gpus > 8
    ranks_twice = moe_tp == 1 and tp == attention_dp > 1 and moe_ep == gpus
    if twice or ranks_twice:
        really = moe_ep if twice else tp
        layout = Layout(tp=1, dp=really, pp=pp, ep=really) if attention_dp > 1 else Layout(tp=really, pp=pp, ep=really)
        return layout, f"read as {layout.gpus} GPUs, {layout}"
    ep = max(1, moe_ep)
    if gpus % ep:
        raise InputError(f"moe_ep = {moe_ep} does not divide tp x attention_dp = {gpus}.")
    return Layout(tp=tp, pp=pp, dp=attention_dp, ep=ep), ""


def _count(row: Mapping[str, str], name: str, default: int | None = None) -> int:
    """Return a whole number; runs write 0 and nothing for degrees they do not have."""
    text = (row.get(name) or "").strip()
    if default is not None and text in {"", "0"}:
        return default
    value = _number(name, text)
    if value != int(value) or not 1 <= value <= MOST:
        raise InputError(f"{name} = '{text[:40]}' should be a whole number from 1 to {MOST:_}.")
    return int(value)


def _share(row: Mapping[str, str], name: str) -> float:
    text = (row.get(name) or "").strip()
    return _number(name, text) if text else 0.0


def _number(name: str, text: str) -> float:
    try:
        value = float(text)
    except ValueError:
        value = math.nan
    if not math.isfinite(value):
        raise InputError(f"{name} = '{text[:40]}' is not a number.")
    return value
