"""`waterline catalog`: the accelerators, models and prices Waterline knows, with their sources."""

from collections.abc import Iterable, Sequence

import click
import msgspec

from waterline import catalog as facts
from waterline.hardware import Gpu
from waterline.llm import Llm
from waterline.units import GIB, GIGA, KILO, TERA, gib_text, parameters_text, usd_text

NAME = click.argument("name", required=False)
JSON = click.option("--json", "as_json", is_flag=True, help="Print JSON with units in the names, for programs.")
DOUBT = "?"


@click.group("catalog")
def catalog() -> None:
    """Show the GPUs, models and prices Waterline knows.

    \b
    Example:
      waterline catalog gpus --vendor amd
      waterline catalog models qwen3-32b
      waterline catalog prices rtx-4090 --json
    """  # noqa: D301 - click wants the character itself


@catalog.command("gpus")
@NAME
@click.option("--vendor", help="Only the cards of this vendor: nvidia, amd, intel …")
@JSON
def show_gpus(name: str | None, vendor: str | None, *, as_json: bool) -> None:
    """List accelerators, or show everything about the one called NAME.

    A ? marks what our sources disagree on; NAME shows why.

    \b
    Example:
      waterline catalog gpus "RTX 4090"
    """  # noqa: D301 - click wants the character itself
    if name is not None:
        gpu = facts.find_gpu(name)
        _show(gpu, _gpu_facts(gpu), as_json=as_json)
        return
    vendors = sorted({gpu.vendor for gpu in facts.gpus().values()})
    if vendor is not None and vendor.lower() not in vendors:
        raise click.BadParameter(f"'{vendor}' is not one of {', '.join(vendors)}.", param_hint="--vendor")
    found = [gpu for gpu in facts.gpus().values() if vendor is None or gpu.vendor == vendor.lower()]
    if as_json:
        _print_json(found)
        return
    columns = ["id", "memory GiB", "GB/s", "16-bit TFLOPs", "fp8", "fp4", "link GB/s", "watts", "year", "USD/h"]
    _print_table(columns, [_gpu_row(gpu) for gpu in found])
    click.echo(
        "TFLOPs are dense. ? = our sources disagree, see `waterline catalog gpus ID`. USD/h: * community, + bought."
    )


def _gpu_row(gpu: Gpu) -> list[str]:
    price = facts.usd_per_gpu_hour(gpu.id)
    mark = {"community": "*", "purchase": "+"}.get(price.kind, "") if price else ""
    return [
        gpu.id,
        f"{gpu.memory_bytes / GIB:.1f}{_doubt(gpu, 'memory_mib')}",
        f"{gpu.memory_bytes_per_s / GIGA:,.0f}{_doubt(gpu, 'memory_gb_per_s')}",
        *(
            f"{_rate(gpu.flops_per_s[rate])}{_doubt(gpu, f'dense_tflops.{rate}')}" if rate in gpu.flops_per_s else "-"
            for rate in ("bf16" if "bf16" in gpu.flops_per_s else "fp16", "fp8", "fp4")
        ),
        f"{gpu.link.bytes_per_s / GIGA:.4g}{_doubt(gpu, 'link_gb_per_s')}" if gpu.link.bytes_per_s else "-",
        f"{gpu.tdp_watts:.0f}{_doubt(gpu, 'tdp_watts')}" if gpu.tdp_watts else "-",
        str(gpu.release_year or "-"),
        f"{price.usd_per_gpu_hour:.2f}{mark}" if price else "-",
    ]


def _rate(flops_per_s: float) -> str:
    tera = flops_per_s / TERA
    return f"{tera:,.0f}" if tera >= 100 else f"{tera:.3g}"


def _doubt(gpu: Gpu, cell: str) -> str:
    """Return the mark where the cell, or the table it is in, is doubtful."""
    doubtful = {text.partition(":")[0] for text in gpu.doubtful}
    return DOUBT if cell in doubtful or cell.partition(".")[0] in doubtful else ""


def _gpu_facts(gpu: Gpu) -> list[tuple[str, str]]:
    price = facts.usd_per_gpu_hour(gpu.id)
    rates = ", ".join(
        f"{rate} {_rate(value)}{_doubt(gpu, f'dense_tflops.{rate}')}" for rate, value in gpu.flops_per_s.items()
    )
    pair = f", {gpu.link.pair_bytes_per_s / GIGA:.4g}{_doubt(gpu, 'pair_gb_per_s')} between two"
    shown = [
        ("id", gpu.id),
        ("name", gpu.name),
        ("also called", ", ".join(gpu.aliases)),
        ("vendor", f"{gpu.vendor}, {gpu.architecture} {gpu.chip} {gpu.target}".strip()),
        (
            "runs",
            gpu.stack if gpu.support == "full" else f"{gpu.stack}; planned and rehearsed only, no engine is started",
        ),
        ("memory", f"{gpu.memory_bytes / GIB:.2f}{_doubt(gpu, 'memory_mib')} GiB"),
        ("bandwidth", f"{gpu.memory_bytes_per_s / GIGA:,.0f}{_doubt(gpu, 'memory_gb_per_s')} GB/s"),
        ("dense TFLOPs", rates),
        ("link", f"{gpu.link.kind}, {gpu.link.topology}"),
        ("link GB/s", f"{gpu.link.bytes_per_s / GIGA:.4g}{_doubt(gpu, 'link_gb_per_s')} each way{pair}"),
        ("PCIe", f"{gpu.pcie}, {gpu.pcie_bytes_per_s / GIGA:.4g} GB/s each way" if gpu.pcie_bytes_per_s else ""),
        ("power", f"{gpu.tdp_watts:.0f}{_doubt(gpu, 'tdp_watts')} W" if gpu.tdp_watts else ""),
        ("in one node", str(gpu.gpus_per_node)),
        ("released", str(gpu.release_year or "")),
        ("list price", f"{usd_text(gpu.msrp_usd)}{_doubt(gpu, 'msrp_usd')}" if gpu.msrp_usd else ""),
        ("an hour", f"{usd_text(price.usd_per_gpu_hour)} ({price.kind}, {price.date})" if price and price.usd else ""),
        ("TPP", f"{gpu.tpp:,.0f}" if gpu.tpp else ""),
        ("die", f"{gpu.die_mm2:,.0f}{_doubt(gpu, 'die_mm2')} mm2" if gpu.die_mm2 else ""),
    ]
    shown += [("doubtful", text) for text in gpu.doubtful]
    return [*shown, ("notes", gpu.notes), ("source", gpu.source), ("read", gpu.read)]


@catalog.command("models")
@NAME
@JSON
def show_models(name: str | None, *, as_json: bool) -> None:
    """List models, or show everything about the one called NAME.

    \b
    Example:
      waterline catalog models deepseek-r1
    """  # noqa: D301 - click wants the character itself
    if name is not None:
        llm = facts.find_model(name)
        _show(llm, _model_facts(llm), as_json=as_json)
        return
    found = list(facts.models().values())
    if as_json:
        _print_json(found)
        return
    rows = [
        [
            llm.name,
            parameters_text(llm.parameters),
            parameters_text(llm.active_parameters),
            llm.precision,
            str(llm.layers),
            _context(llm),
            "+".join(dict.fromkeys(group.kind for group in llm.attention)),
        ]
        for llm in found
    ]
    _print_table(["model", "parameters", "active", "precision", "layers", "context", "attention"], rows)


def _context(llm: Llm) -> str:
    tokens = llm.max_context_tokens
    return f"{tokens // 2**10}Ki" if tokens % 2**10 == 0 else f"{tokens / KILO:.0f}k"


def _model_facts(llm: Llm) -> list[tuple[str, str]]:
    shown = [
        ("id", llm.name),
        ("family", llm.architecture),
        ("parameters", f"{parameters_text(llm.parameters)} ({llm.parameters:,})"),
        ("active", f"{parameters_text(llm.active_parameters)} ({llm.active_parameters:,}), input embedding included"),
        ("vision", f"{parameters_text(llm.vision_parameters)} more" if llm.vision_parameters else ""),
        ("published in", llm.precision),
        ("stored", gib_text(llm.stored_bytes) if llm.stored_bytes else ""),
        ("context", f"{llm.max_context_tokens:,} tokens"),
        ("hidden", f"{llm.hidden:,}"),
        ("vocabulary", f"{llm.vocabulary:,}{', embeddings tied' if llm.tied_embeddings else ''}"),
        *(("attention", _group_text(group)) for group in llm.attention),
        *(("feed-forward", _group_text(group)) for group in llm.feed_forward),
        ("weights", llm.weights_file),
    ]
    shown += [(f"note: {key}", text) for key, text in llm.notes.items()]
    return [*shown, ("source", llm.source), ("read", llm.read)]


def _group_text(group: msgspec.Struct) -> str:
    values = {name: value for name, value in msgspec.structs.asdict(group).items() if value not in {0, ""}}
    kind = values.pop("kind", "")
    layers = values.pop("layers")
    return f"{layers} {kind} layers: ".replace("  ", " ") + ", ".join(f"{key} {value}" for key, value in values.items())


@catalog.command("prices")
@NAME
@JSON
def show_prices(name: str | None, *, as_json: bool) -> None:
    """List prices, or those of the accelerator called NAME.

    \b
    Example:
      waterline catalog prices h100-sxm-80g
    """  # noqa: D301 - click wants the character itself
    gpu = facts.find_gpu(name).id if name is not None else None
    found = [price for price in facts.prices() if gpu in {None, price.gpu}]
    if as_json:
        _print_json(found)
        return
    if not found:
        click.echo(f"No price of {gpu} is known. Write usd_per_gpu_hour in the pool of your fleet file.")
        return
    columns = ["gpu", "kind", "low", "median", "high", "unit", "date", "seen", "recalled"]
    rows = [
        [
            price.gpu,
            price.kind,
            f"{price.low_usd:,.4g}" if price.unit != "usd" else f"{price.low_usd:,.0f}",
            f"{price.usd:,.4g}" if price.unit != "usd" else f"{price.usd:,.0f}",
            f"{price.high_usd:,.4g}" if price.unit != "usd" else f"{price.high_usd:,.0f}",
            price.unit,
            price.date,
            str(price.verified),
            str(price.recalled),
        ]
        for price in found
    ]
    _print_table(columns, rows)
    if gpu is not None:
        for price in found:
            click.echo(f"{price.kind}: {price.source}")


def _show(item: Gpu | Llm, lines: Iterable[tuple[str, str]], *, as_json: bool) -> None:
    if as_json:
        _print_json(item)
        return
    shown = [(key, text) for key, text in lines if text]
    width = max(len(key) for key, _ in shown)
    for key, text in shown:
        click.echo(f"{key:<{width}}  {text}")


def _print_json(items: object) -> None:
    click.echo(msgspec.json.format(msgspec.json.encode(items), indent=2).decode())


def _print_table(columns: Sequence[str], rows: Iterable[Sequence[str]]) -> None:
    from rich.console import Console  # only when something is drawn
    from rich.table import Table

    table = Table(box=None, header_style="bold", pad_edge=False)
    for index, column in enumerate(columns):
        table.add_column(column, justify="left" if index == 0 else "right", no_wrap=True)
    for row in rows:
        table.add_row(*row)
    console = Console()
    wide = Console(width=200) if not console.is_terminal else console
    wide.print(table)
