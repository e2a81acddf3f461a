"""How many bytes, how many seconds, how many dollars: a model on a card in a layout. It knows no requests."""

from waterline.cost.estimate import Asked, Between, Estimate, Priced, estimate_at_rate, estimate_replica
from waterline.cost.measured import replica_step_cost
from waterline.cost.memory import (
    MemoryFit,
    MemoryUse,
    cache_tokens,
    embedding_parameters,
    longest_context,
    memory_fit,
    memory_use,
    most_sequences,
    sequence_cache_bytes,
    weights_bytes,
)
from waterline.cost.serving import ServingPoint, serving_point
from waterline.cost.split import Half, estimate_split, transfer_s
from waterline.cost.step import StepCost, step_cost

__all__ = [
    "Asked",
    "Between",
    "Estimate",
    "Half",
    "MemoryFit",
    "MemoryUse",
    "Priced",
    "ServingPoint",
    "StepCost",
    "cache_tokens",
    "embedding_parameters",
    "estimate_at_rate",
    "estimate_replica",
    "estimate_split",
    "longest_context",
    "memory_fit",
    "memory_use",
    "most_sequences",
    "replica_step_cost",
    "sequence_cache_bytes",
    "serving_point",
    "step_cost",
    "transfer_s",
    "weights_bytes",
]
