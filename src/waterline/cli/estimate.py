"""`waterline estimate`: what if, a point or a table of points at a time."""

import csv
import io
import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from difflib import get_close_matches
from functools import cache, lru_cache
from pathlib import Path

import click

from waterline import catalog
from waterline.catalog.engines import check_runs, find_engine
from waterline.cli.tables import console, draw
from waterline.cost import Estimate, Priced, step_cost
from waterline.cost.estimate import MEANING, Asked, Between, estimate_at_rate, estimate_replica
from waterline.cost.split import Half, estimate_split
from waterline.errors import InputError, UnknownNameError, WaterlineError, nearest
from waterline.llm import PRECISIONS, Llm
from waterline.plan import Layout
from waterline.units import GIB, gib_text, seconds_text
from waterline.workload import write_whole

LOADS = ("concurrency", "request_rate")
NEEDED = ("model", "gpu", "isl", "osl")
SPELLED_COLUMNS = {"dp": "attention_dp", "ep": "moe_ep"}
DEGREES = ("tp", "pp", "attention_dp", "moe_tp", "moe_ep")
SIDES = ("prefill_", "decode_")
OF_SIDES = tuple(side + name for side in SIDES for name in ("gpu", "replicas", *DEGREES))
OPTIONAL = ("engine", "precision", *DEGREES, "prefix_hit", *OF_SIDES)
OF_REPLICA = ("model", "gpu", "engine", "precision", *DEGREES, *SPELLED_COLUMNS, *OF_SIDES)
KNOWN = (*NEEDED, *LOADS, *OPTIONAL)
FIGURES = ("ttft_ms", "tpot_ms", "tokens_per_s_per_gpu")
FOUND = (
    *(f"{name}{edge}" for name in FIGURES for edge in ("", "_low", "_high")),
    "memory_gib_per_gpu", "sustained_request_rate", "provenance", "note", "error",
)  # fmt: skip
NUMBERS = {*FOUND, *KNOWN} - {"model", "gpu", "prefill_gpu", "decode_gpu", "engine", "precision"}
NUMBERS -= {"provenance", "note", "error"}
SPELLED = {"fp4": "nvfp4", "fp16": "bf16", "int4 awq": "int4", "awq": "int4", "gptq": "int4"}
MOST = 10**9
MOST_DEGREE = 4096  # GPUs along one degree of a layout: more share no replica anywhere
HELP = {
    "gpu": "The card; `waterline catalog gpus` lists them.",
    "isl": "Tokens of a prompt.",
    "osl": "Tokens of an answer.",
    "concurrency": "Clients of each data-parallel rank, with one request under way each.",
    "request_rate": "Instead: requests a second that come to the replica.",
    "engine": "vllm (default), sglang, trtllm or llamacpp.",
    "precision": "The checkpoint's own by default.",
    "tp": "GPUs that share each layer.",
    "pp": "Stages of a pipeline.",
    "attention_dp": "Groups of tp GPUs that have requests of their own.",
    "moe_ep": "GPUs the experts are spread over.",
    "prefix_hit": "Share of each prompt that is in the cache already, 0 to 1.",
    "prefill_replicas": "Replicas that only read prompts; the others only write answers.",
}


def _cells(command: Callable[..., None]) -> Callable[..., None]:
    """Give a command an option for every column but the model."""
    for name in reversed(KNOWN[1:]):
        option = click.option(f"--{name.replace('_', '-')}", name, metavar="NUMBER" if name in NUMBERS else "NAME",
                              help=HELP.get(name))  # fmt: skip
        command = option(command)
    return command


@click.command()
@click.argument("model", required=False)
@_cells
@click.option(
    "--points", type=click.Path(exists=True, dir_okay=False, path_type=Path), metavar="CSV",
    help="A table instead of MODEL: one point a row, the other options as its columns.",
)  # fmt: skip
@click.option("-o", "--output", type=click.Path(dir_okay=False, path_type=Path), help="Where to; else to the screen.")
@click.option("--json", "as_json", is_flag=True, help="JSON: an object for MODEL, a list of them for a table.")
def estimate(
    model: str | None, points: Path | None, output: Path | None, *, as_json: bool, **cells: str | None
) -> None:
    """Estimate TTFT, TPOT and throughput of MODEL on some cards, or of every row of a table.

    Ask for so many clients (--concurrency), each of which sends a request, waits and sends the next; or for requests
    that come independently (--request-rate). Prompts and answers on replicas of their own take prefill and decode
    layouts; --concurrency is then that of the whole. Each figure comes with the interval that holds four of five
    measurements, and with where it comes from. A row of a table that cannot be says why in its column `error`.

    \b
    waterline estimate deepseek-r1 --gpu h200-sxm --engine sglang --tp 8 --isl 4000 --osl 500 --concurrency 64
    waterline estimate llama-3.1-8b --gpu l40s --isl 1000 --osl 200 --request-rate 2
    waterline estimate --points points.csv -o out.csv
    """  # noqa: D301 - click reads the backspace as: leave these lines alone
    given = {name: cell for name, cell in cells.items() if cell is not None}
    if points is not None:
        if model is not None or given:
            raise click.UsageError(
                f"{model or '--' + next(iter(given)).replace('_', '-')} has no place beside --points."
            )
        columns, rows = read_points(points)
        answers = answer_all(rows)
        text = _json(list(map(_typed, rows, answers))) if as_json else _csv(columns, rows, answers)
        _put(text, output, f"{sum(not one['error'] for one in answers)} of {len(rows)} points estimated; {output}")
        return
    if model is None:
        raise click.UsageError("Give a MODEL and --gpu, or --points with a table.")
    row = {"model": model, **given}
    if missing := [f"--{name}" for name in NEEDED if name not in row]:
        raise click.UsageError(f"{', '.join(missing)} is missing.")
    found, note = estimated(row)
    if as_json or output is not None:
        answered = figures(found, note)
        text = _json(_typed(row, answered)) if as_json else _csv(list(row), [row], [answered])
        _put(text, output, f"1 of 1 points estimated; {output}")
    else:
        show(row, found, note)


def _put(text: str, output: Path | None, said: str) -> None:
    if output is None:
        click.echo(text, nl=False)
        return
    try:
        write_whole(output, text.encode())
    except OSError as error:
        raise InputError(f"{output} cannot be written: {error.strerror}.") from error
    click.echo(said)


# --- tables -----------------------------------------------------------------------------------------------------------


def read_points(path: Path) -> tuple[list[str], list[dict[str, str]]]:
    """Return the columns and the rows of a table of points.

    Raises InputError for a column that is missing or nearly one we know, and for a line that is no row.
    """
    try:
        with path.open(newline="", encoding="utf-8-sig") as file:
            reader = csv.DictReader(file, restkey="", restval="", strict=True)
            columns = list(reader.fieldnames or ())
            _check_columns(path, columns)
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


def _check_columns(path: Path, columns: Sequence[str]) -> None:
    missing = [name for name in NEEDED if name not in columns]
    if not set(LOADS) & set(columns):
        missing.append(" or ".join(LOADS))
    if missing:
        raise InputError(
            f"{path} has no column {', '.join(missing)}. It needs {', '.join(NEEDED)}, {' or '.join(LOADS)}."
        )
    for name in columns:
        if columns.count(name) > 1:
            raise InputError(f"{path} has the column '{name[:40]}' {columns.count(name)} times.")
        squeezed = name.strip().lower().replace("-", "_").replace(" ", "_")
        near = get_close_matches(squeezed, [known for known in KNOWN if known not in columns], n=1, cutoff=0.9)
        if near and name not in {*KNOWN, *FOUND, *SPELLED_COLUMNS}:
            raise InputError(f"{path} has a column '{name[:40]}'. Is it '{near[0]}'? Write it so, or take it out.")


def answer_all(rows: Sequence[Mapping[str, str]]) -> list[dict[str, str]]:
    """Return the columns found for every row, in their order; rows about one replica are answered one after another."""
    answers: list[dict[str, str]] = [{}] * len(rows)
    for index in sorted(range(len(rows)), key=lambda index: [rows[index].get(name) or "" for name in OF_REPLICA]):
        answers[index] = answer(rows[index])
    return answers


def answer(row: Mapping[str, str]) -> dict[str, str]:
    """Return the columns found for a row; `error` alone for one that cannot be."""
    try:
        found, note = estimated(row)
    except WaterlineError as error:
        return {**dict.fromkeys(FOUND, ""), "error": str(error)}
    return figures(found, note)


def figures(found: Estimate, note: str) -> dict[str, str]:
    """Return the columns of an estimate, in their units."""
    cells = dict.fromkeys(FOUND, "")
    for name, between, unit in (
        ("ttft_ms", found.ttft_s, 1e3),
        ("tpot_ms", found.tpot_s, 1e3),
        ("tokens_per_s_per_gpu", found.tokens_per_s_per_gpu, 1.0),
    ):
        for edge, value in (("", between.value), ("_low", between.low), ("_high", between.high)):
            cells[name + edge] = f"{value * unit:.6g}"
    sustained = found.sustained_requests_per_s
    return {
        **cells,
        "memory_gib_per_gpu": f"{found.needed_bytes_per_gpu / GIB:.3f}",
        "sustained_request_rate": f"{sustained.value:.6g}" if sustained else "",
        "provenance": found.provenance,
        "note": "; ".join(one for one in (note, *found.notes) if one),
    }


def _csv(columns: Sequence[str], rows: Iterable[Mapping[str, str]], answers: Iterable[Mapping[str, str]]) -> str:
    text = io.StringIO()
    writer = csv.DictWriter(text, [*columns, *(name for name in FOUND if name not in columns)], lineterminator="\n")
    writer.writeheader()
    writer.writerows({**row, **found} for row, found in zip(rows, answers, strict=True))
    return text.getvalue()


def _json(value: object) -> str:
    import msgspec

    return msgspec.json.format(msgspec.json.encode(value), indent=2).decode() + "\n"


def _typed(row: Mapping[str, str], found: Mapping[str, str]) -> dict[str, object]:
    """Return what a row and its answer say: numbers as such, null for those without end, nothing for empty cells."""
    cells = {**row, **found}
    return {name: _value(cell) if name in NUMBERS else cell for name, cell in cells.items() if cell.strip()}


def _value(cell: str) -> float | str:
    try:
        value = float(cell)
    except ValueError:
        return cell
    return int(value) if value.is_integer() and abs(value) <= MOST else value


# --- what a row means -------------------------------------------------------------------------------------------------


def estimated(row: Mapping[str, str]) -> tuple[Estimate, str]:
    """Return the estimate of a row, and a note where its layout is read otherwise than it stands."""
    row = {**row, **{name: row[other] for other, name in SPELLED_COLUMNS.items() if other in row and name not in row}}
    asked = Asked(
        prompt_tokens=_count(row, "isl"), output_tokens=_count(row, "osl"), prefix_hit=_share(row, "prefix_hit")
    )
    loads = [name for name in LOADS if (row.get(name) or "").strip()]
    if len(loads) != 1:
        raise InputError(f"{' and '.join(loads) or 'neither concurrency nor request_rate'} given. Give one of them.")
    requests_per_s = _rate(row) if "request_rate" in loads else 0.0
    concurrency = 0 if requests_per_s else _count(row, "concurrency")
    if any(_given(row, name) for name in OF_SIDES):
        if both := [name for name in DEGREES if _given(row, name)]:
            raise InputError(f"{both[0]} stands beside prefill and decode layouts. Give those, or {both[0]}.")
        (prefill, note), (decode, other) = _half(row, "prefill_"), _half(row, "decode_")
        found = estimate_split(prefill, decode, asked, concurrency=concurrency, requests_per_s=requests_per_s)
        return found, "; ".join(dict.fromkeys(filter(None, (note, other))))
    replica, note = _placed(row, row["gpu"], "")
    if requests_per_s:
        return estimate_at_rate(replica, asked, requests_per_s), note
    found = estimate_replica(
        replica.llm, replica.gpu, replica.layout, replica.precision, replica.engine, replica.step,
        prompt_tokens=asked.prompt_tokens, output_tokens=asked.output_tokens, prefix_hit=asked.prefix_hit,
        concurrency=concurrency * _count(row, "attention_dp", 1, MOST_DEGREE),
    )  # fmt: skip
    return found, note


def _half(row: Mapping[str, str], side: str) -> tuple[Half, str]:
    replica, note = _placed(row, row.get(f"{side}gpu", "").strip() or row["gpu"], side)
    return Half(replica=replica, replicas=_count(row, f"{side}replicas", 1)), note


def _placed(row: Mapping[str, str], gpu: str, side: str) -> tuple[Priced, str]:
    layout, note = read_layout(*(_count(row, side + name, 1, MOST_DEGREE) for name in DEGREES))
    engine = row.get("engine", "").strip().lower() or "vllm"
    return _priced(row["model"].strip(), gpu.strip(), row.get("precision", "").strip(), engine, layout), note


@lru_cache(maxsize=16)
def _priced(model: str, gpu_name: str, precision: str, engine_name: str, layout: Layout) -> Priced:
    """Price the steps of a replica, once for all rows about it; a priced replica takes half a megabyte."""
    llm, gpu = catalog.load_model(model, Path()), _card(gpu_name)
    precision = read_precision(precision, llm)
    check_runs(engine_name, precision, gpu)
    engine = find_engine(engine_name).on(gpu)
    if engine_name != "llamacpp":  # which deals out layers and rows as they come
        _check_layout(llm, layout)
    return Priced(llm, gpu, layout, precision, engine, step_cost(llm, gpu, layout, precision, engine))


_card = cache(catalog.find_gpu)


def _check_layout(llm: Llm, layout: Layout) -> None:
    heads = next((group.query_heads for group in llm.attention if group.query_heads % layout.tp), 0)
    if heads:
        raise InputError(f"tp = {layout.tp} does not divide the {heads} heads of {llm.name}; no engine starts so.")
    if layout.pp > llm.layers:
        raise InputError(f"pp = {layout.pp} is more than the {llm.layers} layers of {llm.name}.")


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
    ep, shared = max(1, moe_ep), moe_tp * max(1, moe_ep)
    if gpus % ep:
        raise InputError(f"moe_ep = {moe_ep} does not divide tp x attention_dp = {gpus}.")
    if gpus % shared and shared % gpus:
        raise InputError(f"moe_tp x moe_ep = {shared} does not divide tp x attention_dp = {gpus}.")
    layout = Layout(tp=tp, pp=pp, dp=attention_dp, ep=ep)
    if moe_tp > 1 and shared != gpus:
        return layout, f"moe_tp x moe_ep = {shared}: experts are taken to be over all {gpus} GPUs of a stage, ep{ep}"
    return layout, ""


def _given(row: Mapping[str, str], name: str) -> bool:
    return (row.get(name) or "").strip() not in {"", "0", "1"}


def _count(row: Mapping[str, str], name: str, default: int | None = None, most: int = MOST) -> int:
    """Return a whole number; runs write 0 and nothing for degrees they do not have."""
    text = (row.get(name) or "").strip()
    if default is not None and text in {"", "0"}:
        return default
    value = _number(name, text)
    if value != int(value) or not 1 <= value <= most:
        raise InputError(f"{name} = '{text[:40]}' should be a whole number from 1 to {most:_}.")
    return int(value)


def _rate(row: Mapping[str, str]) -> float:
    value = _number("request_rate", text := row["request_rate"].strip())
    if not 0 < value <= MOST:
        raise InputError(f"request_rate = '{text[:40]}' should be above 0, at most {MOST:_}.")
    return value


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


# --- for people -------------------------------------------------------------------------------------------------------


def show(row: Mapping[str, str], found: Estimate, note: str) -> None:
    """Draw one estimate as a table, and say below it where it comes from."""
    screen = console()
    lines: list[tuple[str, Between, Callable[[float], str]]] = [
        ("TTFT", found.ttft_s, seconds_text),
        ("TPOT", found.tpot_s, seconds_text),
        ("output tokens/s a GPU", found.tokens_per_s_per_gpu, "{:,.4g}".format),
    ]
    if found.sustained_requests_per_s:
        lines.append(("requests/s sustained", found.sustained_requests_per_s, "{:.3g}".format))
    rows = [(name, text(one.value), _span(one, text)) for name, one, text in lines]
    rows.append(("memory of a GPU", gib_text(found.needed_bytes_per_gpu), ""))
    said = " ".join(f"{name}={cell}" for name, cell in row.items() if name not in {"model", "gpu"})
    draw(screen, f"{row['model']} on {row['gpu']}: {said}", ("figure", "mean", "four of five between"), rows,
         text_columns=1, spare=())  # fmt: skip
    screen.print(f"{found.provenance}: {MEANING[found.provenance]}", style="dim")
    for one in filter(None, (note, *found.notes)):
        screen.print(f"Note: {one}.", style="dim")


def _span(one: Between, text: Callable[[float], str]) -> str:
    return f"{text(one.low)} to {text(one.high) if math.isfinite(one.high) else 'no end'}"
