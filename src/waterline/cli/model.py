"""`waterline model`: what one model weighs, keeps and is made of."""

from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

import click
import msgspec

from waterline import catalog
from waterline.cli.tables import console, draw
from waterline.cost.memory import sequence_cache_bytes, weights_bytes
from waterline.llm import PRECISIONS, AttentionLayers, FeedForwardLayers, Llm
from waterline.llm.gguf_sizes import file_bytes
from waterline.plan import Layout
from waterline.units import GIB, KIB, gib_text, parameters_text

if TYPE_CHECKING:
    from rich.console import Console

CONTEXTS = (1024, 4096, 8192, 32_768, 131_072, 524_288)
SHOWN = ("bf16", "fp8", "int8", "int4", "nvfp4", "mxfp4", "q8_0", "q6_k", "q5_k_m", "q4_k_m", "q3_k_m", "q2_k")


@click.command()
@click.argument("path_or_id")
@click.option("--json", "as_json", is_flag=True, help="Print JSON with units in the names, for programs.")
def model(path_or_id: str, *, as_json: bool) -> None:
    """Show what a model is made of: parameters, bytes by precision, cache a token, layers by kind.

    PATH_OR_ID is an id of the catalogue, a Hugging Face id, a folder with config.json (its safetensors files are
    counted where they are there), a config.json, a model.safetensors.index.json, or a .gguf file, split or not.

    \b
    Example:
      waterline model deepseek-r1
      waterline model ./Qwen3-32B-AWQ
      waterline model qwen3-8b-q4_k_m.gguf --json
    """  # noqa: D301 - click reads the backspace as: leave these lines alone
    llm = catalog.load_model(path_or_id, Path())
    if as_json:
        click.echo(msgspec.json.format(msgspec.json.encode(describe(llm)), indent=2).decode())
    else:
        show(llm, console())


def describe(llm: Llm) -> dict[str, object]:
    """Return everything the command knows, with units in the names.

    `parameters` and `active_parameters` are those of the language model: vision tower and multi-token-prediction layers
    are beside them, and so is the input embedding that some leave out of the active ones.
    """
    contexts = _contexts(llm)
    caches = {context: sequence_cache_bytes(llm, context, Layout()) for context in contexts}
    return {
        "model": llm.name,
        "architecture": llm.architecture,
        "parameters": llm.parameters,
        "active_parameters": llm.active_parameters,
        "input_embedding_parameters": llm.input_embedding_parameters,
        "active_parameters_without_input_embedding": llm.active_parameters - llm.input_embedding_parameters,
        "expert_parameters": llm.expert_parameters,
        "vision_parameters": llm.vision_parameters,
        "parameters_with_vision": llm.parameters + llm.vision_parameters,
        "mtp_layers": llm.mtp_layers,
        "mtp_parameters": llm.mtp_parameters,
        "hidden": llm.hidden,
        "vocabulary": llm.vocabulary,
        "tied_embeddings": llm.tied_embeddings,
        "max_context_tokens": llm.max_context_tokens,
        "precision": llm.precision,
        "form": llm.form,
        "stored_forms": llm.stored_forms,
        "stored_bytes": weights_bytes(llm, llm.precision),
        "stored_bytes_by_type": llm.stored_types,
        "bytes_by_precision": {precision: _bytes_in(llm, precision) for precision in PRECISIONS},
        "kv_bytes_per_token": {str(context): round(size / context, 3) for context, size in caches.items()},
        "kv_bytes_per_sequence": {str(context): size for context, size in caches.items()},
        "layers": llm.layers,
        "attention": [_without_zeros(group) for group in llm.attention],
        "feed_forward": [_without_zeros(group) for group in llm.feed_forward],
        "notes": llm.notes,
        "source": llm.source,
    }


def _without_zeros(group: msgspec.Struct) -> dict[str, object]:
    return {key: value for key, value in msgspec.structs.asdict(group).items() if value not in {0, ""}}


def _contexts(llm: Llm) -> list[int]:
    most = llm.max_context_tokens
    return [*(context for context in CONTEXTS if context < most), most]


def _bytes_in(llm: Llm, precision: str) -> int:
    """Return the weights in a precision: as stored in the model's own, as llama.cpp would write them in its formats."""
    own = precision == llm.precision and llm.stored_bytes
    return file_bytes(llm, precision) if PRECISIONS[precision].gguf and not own else weights_bytes(llm, precision)


# --- for people -------------------------------------------------------------------------------------------------------


def show(llm: Llm, screen: "Console") -> None:
    """Print the counts as lines, and bytes, cache and layers as tables."""
    facts = [(key, text) for key, text in _facts(llm) if text]
    width = max(len(key) for key, _ in facts)
    for key, text in facts:
        screen.print(f"{key:<{width}}  {text}")
    _draw_bytes(llm, screen)
    _draw_cache(llm, screen)
    _draw_layers(llm, screen)
    for about, text in llm.notes.items():
        screen.print(f"Note on {about.replace('_', ' ')}: {text}.", style="dim")


def _facts(llm: Llm) -> Iterator[tuple[str, str]]:
    outside = parameters_text(llm.active_parameters - llm.input_embedding_parameters)
    yield "model", llm.name
    yield "family", llm.architecture
    yield "parameters", f"{parameters_text(llm.parameters)} ({llm.parameters:,})"
    active = f"{parameters_text(llm.active_parameters)} ({llm.active_parameters:,})"
    yield "active", active + (f"; {outside} without the input embedding" if llm.input_embedding_parameters else "")
    yield "vision", f"{parameters_text(llm.vision_parameters)} beside it" if llm.vision_parameters else ""
    layers = "layer" if llm.mtp_layers == 1 else "layers"
    counted = f", {parameters_text(llm.mtp_parameters)} beside it" if llm.mtp_parameters else ", not counted"
    yield "multi-token prediction", f"{llm.mtp_layers} {layers}{counted}" if llm.mtp_layers else ""
    yield "stored in", _stored(llm)
    yield "context", f"{llm.max_context_tokens:,} tokens"
    yield "hidden", f"{llm.hidden:,}"
    yield "vocabulary", f"{llm.vocabulary:,}{', embeddings tied' if llm.tied_embeddings else ''}"
    yield "source", llm.source


def _stored(llm: Llm) -> str:
    types = ", ".join(f"{name} {gib_text(size)}" for name, size in llm.stored_types.items())
    parts = ", ".join(f"{part} {form}" for part, form in llm.stored_forms.items())
    said = f"{llm.form}, {gib_text(weights_bytes(llm, llm.precision))}"
    return said + (f" (tensors: {types})" if types else f" ({parts})" if parts else "")


def _draw_bytes(llm: Llm, screen: "Console") -> None:
    shown = {*SHOWN, llm.precision}
    rows = []
    for precision in sorted(shown, key=lambda name: (PRECISIONS[name].gguf, -PRECISIONS[name].bits, name)):
        size = _bytes_in(llm, precision)
        rows.append(
            (
                precision + (" (stored)" if precision == llm.precision else ""),
                f"{size / GIB:,.1f}" if size >= GIB else f"{size / GIB:,.3f}",
                f"{size * 8 / (llm.parameters + llm.vision_parameters):.2f}",
                "llama.cpp" if PRECISIONS[precision].gguf else "",
            )
        )
    columns = ("precision", "GiB", "bits a weight", "engine")
    draw(screen, "Weights, by precision", columns, rows, text_columns=1, spare=("engine",))


def _draw_cache(llm: Llm, screen: "Console") -> None:
    rows = []
    for context in _contexts(llm):
        size = sequence_cache_bytes(llm, context, Layout())
        rows.append((f"{context:,}", f"{size / context / KIB:,.1f}", gib_text(size)))
    title = "Cache of one sequence, in 16 bits on one GPU"
    draw(screen, title, ("context", "KiB a token", "the sequence"), rows, text_columns=0, spare=())


def _draw_layers(llm: Llm, screen: "Console") -> None:
    rows = [(str(group.layers), *_attention_text(group)) for group in llm.attention]
    rows += [(str(group.layers), *_network_text(group)) for group in llm.feed_forward]
    draw(screen, "Layers, by kind", ("layers", "kind", "made of"), rows, text_columns=3, spare=())


def _attention_text(group: AttentionLayers) -> tuple[str, str]:
    value_dim = group.value_head_dim or group.head_dim
    dims = f"{group.head_dim}" if value_dim == group.head_dim else f"{group.head_dim} and {value_dim}"
    heads = f"{group.query_heads} query and {group.kv_heads} key-value heads of {dims}"
    chosen = f"; an indexer chooses {group.selected_tokens:,} tokens" if group.selected_tokens else ""
    if group.kind == "state":
        return "state", f"{group.state_elements:,} elements a sequence"
    if group.kind == "latent":
        return (
            "latent attention",
            f"{group.query_heads} heads; {group.latent_dim} + {group.rope_dim} kept a token{chosen}",
        )
    if group.kind == "window":
        return "window attention", f"{heads}; the last {group.window_tokens:,} tokens"
    return "full attention", heads + chosen


def _network_text(group: FeedForwardLayers) -> tuple[str, str]:
    gate = "gated" if group.matrices == 3 else "no gate"
    if not group.experts:
        return "dense network", f"{group.intermediate:,} wide, {gate}"
    shared = f"; {group.shared_intermediate:,} wide for every token" if group.shared_intermediate else ""
    return "experts", f"{group.experts_per_token} of {group.experts}, {group.intermediate:,} wide each, {gate}{shared}"
