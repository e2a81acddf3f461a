"""What feed-forward networks weigh, dense and of experts, read from the fields of a config."""

from collections.abc import Callable, Iterator
from dataclasses import dataclass

from waterline.llm import FeedForwardLayers
from waterline.llm.family import Family, Sized, layers_of
from waterline.llm.fields import WHAT_NEXT, Fields


def dense(fields: Fields, family: Family) -> Iterator[Sized[FeedForwardLayers]]:
    yield dense_layers(fields, family, layers_of(fields), fields.count("intermediate_size"))


def dense_layers(
    fields: Fields, family: Family, layers: int, intermediate: int, matrices: int = 3
) -> Sized[FeedForwardLayers]:
    hidden = fields.count("hidden_size")
    biases = (matrices - 1) * intermediate + hidden if fields.flag("mlp_bias") else 0
    return Sized(
        group=FeedForwardLayers(layers=layers, intermediate=intermediate, matrices=matrices),
        parameters=matrices * hidden * intermediate + biases + family.norms * hidden,
    )


@dataclass(frozen=True, slots=True, kw_only=True)
class ExpertFields:
    """Under which names a family keeps its mixture of experts."""

    experts: str
    used: str = "num_experts_per_tok"
    intermediate: str = "moe_intermediate_size"
    dense_intermediate: str = "intermediate_size"
    shared_experts: str = ""  # how many, each as wide as a routed one
    shared_intermediate: str = ""  # or how wide they are together
    shared_gate: bool = False
    biases: bool = False  # of router and experts
    width: str = "moe_latent_size"  # of the routed experts, where it is not the model's
    width_norm: str = ""  # the flag that says whether what enters them at that width is normed
    beside_dense: bool = False  # a dense network of `dense_intermediate` works beside the experts of every layer
    more_norms: int = 0
    router_scales: bool = False  # one for every hidden dimension, and one for every expert


def experts(
    names: ExpertFields, is_sparse: Callable[[Fields, int], bool] = lambda _fields, _layer: True
) -> Callable[[Fields, Family], Iterator[Sized[FeedForwardLayers]]]:
    def feed_forward(fields: Fields, family: Family) -> Iterator[Sized[FeedForwardLayers]]:
        layers = layers_of(fields)
        sparse = sum(is_sparse(fields, layer) for layer in range(layers))
        if sparse < layers:
            yield dense_layers(fields, family, layers - sparse, fields.count(names.dense_intermediate))
        if sparse:
            yield sparse_layers(fields, family, names, sparse)

    return feed_forward


def sparse_layers(
    fields: Fields, family: Family, names: ExpertFields, layers: int, matrices: int = 3
) -> Sized[FeedForwardLayers]:
    hidden, intermediate = fields.count("hidden_size"), fields.count(names.intermediate)
    experts = fields.count(names.experts)
    width = fields.count(names.width, hidden)
    shared = _shared_intermediate(fields, names, intermediate)
    router = hidden * experts + (experts if names.biases else 0) + (hidden + experts if names.router_scales else 0)
    expert = matrices * width * intermediate + ((matrices - 1) * intermediate + hidden if names.biases else 0)
    shared_parameters = matrices * hidden * shared
    parameters = router + shared_parameters + (family.norms + names.more_norms) * hidden
    if shared and names.shared_gate:
        parameters += hidden
    if width != hidden:
        parameters += 2 * hidden * width
        if names.width_norm and fields.flag(names.width_norm):
            parameters += width
    group = FeedForwardLayers(
        layers=layers,
        intermediate=intermediate,
        experts=experts,
        experts_per_token=fields.count(names.used, most=experts),
        shared_intermediate=shared,
        matrices=matrices,
        expert_hidden=width if width != hidden else 0,
    )
    return Sized(group=group, parameters=parameters, expert_parameters=expert, shared_parameters=shared_parameters)


def _shared_intermediate(fields: Fields, names: ExpertFields, intermediate: int) -> int:
    if names.beside_dense:
        return fields.count(names.dense_intermediate)
    if names.shared_intermediate:
        return fields.count(names.shared_intermediate, 0, least=0)
    return fields.count(names.shared_experts, 0, least=0) * intermediate if names.shared_experts else 0


def sparse_by_step(fields: Fields, layer: int) -> bool:
    listed = fields.get("mlp_only_layers") or []
    if not isinstance(listed, list):
        raise fields.wrong("mlp_only_layers", "a list of layer numbers")
    return layer not in listed and (layer + 1) % fields.count("decoder_sparse_step", 1) == 0


def sparse_after_the_first(fields: Fields, layer: int) -> bool:
    if fields.count("moe_layer_freq", 1) != 1:
        raise fields.wrong("moe_layer_freq", f"1; other patterns are not known. {WHAT_NEXT}")
    return layer >= fields.count("first_k_dense_replace", 0, least=0)


def sparse_in_between(fields: Fields, layer: int) -> bool:
    return (layer + 1) % fields.count("interleave_moe_layer_step", 1) == 0


def sparse_from_the_start_index(fields: Fields, layer: int) -> bool:
    """Say whether a layer of ERNIE 4.5 has experts; it names the first and the last such layer, and the step."""
    last = fields.count("moe_layer_end_index", layers_of(fields) - 1, least=0)
    step = fields.count("moe_layer_interval", 1)
    return (layer + 1) % step == 0 and fields.count("moe_layer_start_index", 1, least=0) <= layer <= last


def sparse_where_marked(fields: Fields, layer: int) -> bool:
    return fields.marks("moe_layer_freq", layers_of(fields))[layer]


def sparse_where_listed(fields: Fields, layer: int) -> bool:
    """Say whether `moe_layers_enum` of Step names the layer: "3,4,5" or a list; without it all from the fourth on."""
    listed = fields.get("moe_layers_enum")
    if listed is None:
        return layer >= fields.count("first_k_dense_replace", 3, least=0)
    if isinstance(listed, str):
        return str(layer) in [item.strip() for item in listed.split(",")]
    return layer in fields.numbers("moe_layers_enum")


def dense_or_experts(names: ExpertFields) -> Callable[[Fields, Family], Iterator[Sized[FeedForwardLayers]]]:
    """Return the reading of Gemma 4, whose smaller models have no experts."""

    def feed_forward(fields: Fields, family: Family) -> Iterator[Sized[FeedForwardLayers]]:
        return (experts(names) if fields.flag("enable_moe_block") else dense)(fields, family)

    return feed_forward
