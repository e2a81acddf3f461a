"""What a model weighs and computes.

A model is described by the kinds of layers it stacks, not by its name: `attention` and `feed_forward` each list groups
of equal layers, and everything else (bytes, FLOPs, cache) is arithmetic on them, done in `waterline.cost`.
"""

from collections.abc import Mapping
from typing import Literal

from msgspec import Struct, field

from waterline.llm.precision import PRECISIONS, Precision

__all__ = ["PRECISIONS", "AttentionLayers", "FeedForwardLayers", "Llm", "Precision"]


class AttentionLayers(Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """A group of equal attention (or state-space) layers, anywhere in the stack.

    kind:
        ``full``    every token of the context is kept: 2 x kv_heads x head_dim elements a token and layer
        ``window``  as full, for the last `window_tokens` tokens only
        ``latent``  multi-head latent attention: `latent_dim` + `rope_dim` elements a token and layer, for all heads
        ``state``   linear attention or a state space: `state_elements` a sequence and layer, however long it grows
    """

    kind: Literal["full", "window", "latent", "state"]
    layers: int
    query_heads: int = 0
    kv_heads: int = 0
    head_dim: int = 0  # of queries and keys
    value_head_dim: int = 0  # 0: as head_dim
    window_tokens: int = 0
    latent_dim: int = 0  # kv_lora_rank
    rope_dim: int = 0  # qk_rope_head_dim
    state_elements: int = 0
    index_dim: int = 0  # sparse attention: elements kept a token and layer to choose what is read …
    selected_tokens: int = 0  # … and how many tokens are then read; 0: all


class FeedForwardLayers(Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """A group of equal feed-forward layers; dense when `experts` is 0."""

    layers: int
    intermediate: int  # of the dense network, or of one routed expert
    experts: int = 0  # routed experts a layer holds
    experts_per_token: int = 0
    shared_intermediate: int = 0  # of the experts every token passes, together
    matrices: int = 3  # 3 with a gate (SwiGLU), 2 without
    expert_hidden: int = 0  # the width routed experts work in, where it is not the model's; 0: it is


class Llm(Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """One model, as its `config.json`, its GGUF header or the catalogue states it."""

    name: str
    architecture: str  # the `model_type` of its config
    parameters: int  # of the language model: no vision tower, no multi-token-prediction layers
    active_parameters: int  # that one token passes, input embedding included
    hidden: int
    vocabulary: int
    max_context_tokens: int
    precision: str  # a key of PRECISIONS: what the published weights are stored in
    attention: tuple[AttentionLayers, ...]
    feed_forward: tuple[FeedForwardLayers, ...]
    tied_embeddings: bool = False
    vision_parameters: int = 0  # loaded beside the language model, not counted in `parameters`
    mtp_layers: int = 0  # multi-token-prediction layers of the checkpoint, not counted in `layers`
    mtp_parameters: int = 0  # theirs, not counted in `parameters`; 0 with `mtp_layers`: not known
    stored_forms: Mapping[str, str] = field(default_factory=dict)  # part -> a key of PRECISIONS or ``fp8_block``
    stored_types: Mapping[str, int] = field(default_factory=dict)  # type of tensors in the file read -> their bytes
    stored_bytes: int = 0  # that an engine loads (no multi-token prediction), of files read or mixes; 0: by precision
    weights_file: str = ""  # a .gguf to serve as it is
    source: str = ""
    read: str = ""  # ISO date
    notes: Mapping[str, str] = field(default_factory=dict)

    @property
    def form(self) -> str:
        """The form most matrices are stored in: the precision, or ``fp8_block`` where a block of weights has a scale.

        `stored_forms` has the parts one by one: embedding, head, attention, dense, shared and routed experts.
        """
        blocks = [self.stored_forms.get(part) for part in ("experts", "dense", "attention")]
        main = next((form for form in blocks if form), self.precision)
        return "fp8_block" if self.precision == "fp8" and main == "fp8_block" else self.precision

    @property
    def input_embedding_parameters(self) -> int:
        """What `active_parameters` counts and some publish without: 0 where the output head is the same table."""
        return 0 if self.tied_embeddings else self.vocabulary * self.hidden

    @property
    def layers(self) -> int:
        return sum(group.layers for group in self.attention)

    @property
    def expert_parameters(self) -> int:
        """Parameters of all routed experts together: what expert parallelism spreads."""
        return sum(
            group.layers * group.experts * group.matrices * (group.expert_hidden or self.hidden) * group.intermediate
            for group in self.feed_forward
        )
