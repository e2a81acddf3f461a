"""Stacks that differ from block to block: attention, state space or feed-forward (Nemotron-H), each its own (NAS)."""

from collections import Counter
from collections.abc import Iterator

from waterline.llm import AttentionLayers, FeedForwardLayers
from waterline.llm.attention import plain_heads
from waterline.llm.family import MOST_LAYERS, Family, Sized
from waterline.llm.feed_forward import ExpertFields, dense_layers, sparse_layers
from waterline.llm.fields import WHAT_NEXT, Fields

# --- blocks that are one thing each (Nemotron-H) ---------------------------------------------------------------------

BLOCKS = {"M": "state", "*": "full", "-": "dense", "E": "sparse"}
BLOCK_NAMES = {"mamba": "state", "attention": "full", "mlp": "dense", "moe": "sparse"}
NEMOTRON_EXPERTS = ExpertFields(experts="n_routed_experts", shared_intermediate="moe_shared_expert_intermediate_size")


def _blocks(fields: Fields) -> Counter[str]:
    pattern = fields.get("hybrid_override_pattern")
    if isinstance(pattern, str):
        unknown = set(pattern) - set(BLOCKS)
        if unknown:
            raise fields.wrong("hybrid_override_pattern", f"made of {' '.join(BLOCKS)}. {WHAT_NEXT}")
        return Counter(BLOCKS[letter] for letter in pattern)
    listed = fields.get("layers_block_type")
    if not isinstance(listed, list):
        raise fields.wrong("hybrid_override_pattern", "a text such as 'M-M*', one letter a layer")
    return Counter(fields.per_layer("layers_block_type", len(listed), BLOCK_NAMES))


def mixers(fields: Fields, family: Family) -> Iterator[Sized[AttentionLayers]]:
    blocks, hidden = _blocks(fields), fields.count("hidden_size")
    if blocks["full"]:
        key = "head_dim" if fields.get("head_dim") is not None else "attention_head_dim"
        heads = plain_heads(fields, key)
        queries, keys = heads.queries * heads.head_dim, heads.keys * heads.head_dim
        biases = queries + 2 * keys + hidden if fields.flag("attention_bias") else 0
        group = AttentionLayers(
            kind="full",
            layers=blocks["full"],
            query_heads=heads.queries,
            kv_heads=heads.keys,
            head_dim=heads.head_dim,
        )
        parameters = 2 * hidden * (queries + keys) + biases + family.norms * hidden
        yield Sized(group=group, parameters=parameters)
    if blocks["state"]:
        yield _mamba(fields, family, blocks["state"])


def _mamba(fields: Fields, family: Family, layers: int) -> Sized[AttentionLayers]:
    """Return Mamba-2 layers: a state of `ssm_state_size` for every channel, and a short convolution."""
    hidden, heads = fields.count("hidden_size"), fields.count("mamba_num_heads")
    head_dim, state = fields.count("mamba_head_dim"), fields.count("ssm_state_size")
    groups, kernel = fields.count("n_groups"), fields.count("conv_kernel")
    inner = heads * head_dim
    convolved = inner + 2 * groups * state
    projections = hidden * (inner + convolved + heads) + inner * hidden
    biases = (inner + convolved + heads + hidden) if fields.flag("mamba_proj_bias") else 0
    convolution = convolved * (kernel + (1 if fields.flag("use_conv_bias", default=True) else 0))
    group = AttentionLayers(
        kind="state",
        layers=layers,
        query_heads=heads,
        kv_heads=groups,
        head_dim=state,
        value_head_dim=head_dim,
        state_elements=inner * state + convolved * (kernel - 1),
    )
    per_head = 3 * heads  # A, D and the time-step bias
    return Sized(group=group, parameters=projections + biases + convolution + per_head + inner + family.norms * hidden)


def blocks_between(fields: Fields, family: Family) -> Iterator[Sized[FeedForwardLayers]]:
    blocks, ungated = _blocks(fields), 2
    if blocks["dense"]:
        yield dense_layers(fields, family, blocks["dense"], fields.count("intermediate_size"), ungated)
    if blocks["sparse"]:
        yield sparse_layers(fields, family, NEMOTRON_EXPERTS, blocks["sparse"], ungated)


# --- blocks found by architecture search (nemotron-nas) ---------------------------------------------------------------

UNREAD = {
    "attention": ("replace_with_linear", "sparsify", "num_sink_tokens", "window_length", "unshifted_sink"),
    "ffn": ("replace_with_linear", "sparsify"),
}
WIDTH_MULTIPLE = 256  # the model's own code rounds the width of a network up to it


def _searched(fields: Fields, part: str) -> Iterator[Fields]:
    """Yield the part of every block that has it."""
    listed = fields.get("block_configs")
    if not isinstance(listed, list) or len(listed) != fields.count("num_hidden_layers", most=MOST_LAYERS):
        raise fields.wrong("block_configs", "a list with one object for each of num_hidden_layers")
    for index in range(len(listed)):
        block = fields.item("block_configs", index).inner(part)
        if block.flag("no_op"):
            continue
        for key in UNREAD[part]:
            if block.get(key):
                raise block.wrong(key, f"null or false. {WHAT_NEXT}")
        yield block


def searched_attention(fields: Fields, family: Family) -> Iterator[Sized[AttentionLayers]]:
    hidden, heads = fields.count("hidden_size"), fields.count("num_attention_heads")
    head_dim, shares = hidden // heads, Counter[int]()
    for block in _searched(fields, "attention"):
        share = block.count("n_heads_in_group", most=heads)
        if heads % share:
            raise block.wrong("n_heads_in_group", f"a divisor of num_attention_heads = {heads}")
        shares[share] += 1
    for share, count in shares.items():
        kv_heads = heads // share
        group = AttentionLayers(kind="full", layers=count, query_heads=heads, kv_heads=kv_heads, head_dim=head_dim)
        yield Sized(group=group, parameters=2 * hidden * (heads + kv_heads) * head_dim + family.norms * hidden)


def searched_feed_forward(fields: Fields, family: Family) -> Iterator[Sized[FeedForwardLayers]]:
    hidden, widths = fields.count("hidden_size"), Counter[int]()
    for block in _searched(fields, "ffn"):
        width = int(2 * block.ratio("ffn_mult") * hidden / 3)
        widths[-(-width // WIDTH_MULTIPLE) * WIDTH_MULTIPLE] += 1
    for width, count in widths.items():
        yield dense_layers(fields, family, count, width)
