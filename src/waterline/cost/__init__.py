"""How many bytes, how many seconds, how many dollars: a model on a card in a layout. It knows no requests."""

from waterline.cost.memory import (
    MemoryUse,
    cache_tokens,
    embedding_parameters,
    memory_use,
    sequence_cache_bytes,
    weights_bytes,
)
from waterline.cost.serving import ServingPoint, serving_point
from waterline.cost.step import StepCost, replica_step_cost, step_cost

__all__ = [
    "MemoryUse",
    "ServingPoint",
    "StepCost",
    "cache_tokens",
    "embedding_parameters",
    "memory_use",
    "replica_step_cost",
    "sequence_cache_bytes",
    "serving_point",
    "step_cost",
    "weights_bytes",
]
