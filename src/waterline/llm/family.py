"""What is known of a family of models: which arithmetic counts its layers, and where its config keeps the numbers."""

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Generic, Literal, TypeVar

from waterline.llm import AttentionLayers, FeedForwardLayers
from waterline.llm.fields import Fields

MOST_LAYERS = 10_000

Layers = TypeVar("Layers", AttentionLayers, FeedForwardLayers)


@dataclass(frozen=True, slots=True, kw_only=True)
class Sized(Generic[Layers]):
    """A group of equal layers and what one of them weighs, in parameters."""

    group: Layers
    parameters: int  # without routed experts
    expert_parameters: int = 0  # of one routed expert
    shared_parameters: int = 0  # of the experts every token passes, among `parameters`


@dataclass(frozen=True, slots=True, kw_only=True)
class Heads:
    """The heads of one kind of attention layer."""

    queries: int
    keys: int  # key-value heads
    head_dim: int
    value_dim: int
    keys_are_values: bool = False  # one projection serves as both
    sinks: bool = False  # a learnt logit for each head


@dataclass(frozen=True, slots=True, kw_only=True)
class MoreTokens:
    """Multi-token-prediction layers: each is one layer of the model, and what joins it to the stack.

    The checkpoint keeps a norm for the embedding and one for the hidden state, a projection of both to one, and a last
    norm; with `copies_embeddings` a copy of embedding and output head as well.
    """

    layers_key: str = "num_nextn_predict_layers"
    attention: Literal["full", "latent"] = "full"
    attention_parameters: Callable[["Fields", "Family"], int] | None = None  # where no layer of the stack is like it
    copies_embeddings: bool = False
    layers: int | None = None  # where the config does not say how many the checkpoint has


@dataclass(frozen=True, slots=True, kw_only=True)
class Family:
    """How the models of one `model_type` are counted."""

    attention: Callable[["Fields", "Family"], Iterator[Sized[AttentionLayers]]]
    feed_forward: Callable[["Fields", "Family"], Iterator[Sized[FeedForwardLayers]]]
    kinds: Callable[["Fields", int], list[str]]  # of each layer, where the config does not list them
    heads: Callable[["Fields", str], Heads] | None = None  # of a kind of layer; None: the same for all
    defaults: Mapping[str, object] = field(default_factory=dict)  # what its own code fills in for absent fields
    aliases: Mapping[str, str] = field(default_factory=dict)  # our name of a field -> the other one it may have
    refused: Mapping[str, str] = field(default_factory=dict)  # field -> why a value other than null, 0, false stops us
    norms: int = 1  # before attention, and again before the feed-forward network
    query_key_norm: Literal["", "head", "all", "flag"] = (
        ""  # one weight a dimension of a head, or of all; "flag": a head, where `use_qk_norm`
    )
    biases: Literal["", "qkv", "config", "config-qkv"] = "config"  # of the projections; config: where `attention_bias`
    sinks: bool = False  # a learnt logit for each head
    gate: Literal["", "element", "head"] = ""  # on what attention yields: one for each element, or each head
    more_tokens: MoreTokens | None = None  # None: such layers are named, not counted
    beside_layers: Callable[["Fields"], int] | None = None  # parameters of neither layers nor embeddings
    notes: Mapping[str, str] = field(default_factory=dict)


def layers_of(fields: Fields) -> int:
    return fields.count("num_hidden_layers", most=MOST_LAYERS)
