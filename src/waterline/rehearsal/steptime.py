"""How long steps take, from tables: the whole numbers of `StepCost.step_ps`. Times in picoseconds."""

import math

from waterline.rehearsal.jit import inlined
from waterline.rehearsal.state import (
    ATTENTION_TABLE,
    HEAD_LAST,
    HEAD_TABLE,
    MORE_PS_PER_TOKEN,
    PLAIN_TABLE,
    RANKS,
    READ_PS,
    READ_PS_PER_PAIR,
    READ_PS_PER_TOKEN,
    SLOPE_TABLE,
    TOKENS_LAST,
    TOKENS_TABLE,
    WINDOW,
    WINDOW_COUNT,
    WINDOW_PS_PER_PAIR,
    WINDOW_SLOPE_TABLE,
    WINDOW_TOKENS,
    WINDOWS,
    Memory,
)

MOST_STEPS = 1 << 20  # at once


@inlined
def reading_ps(memory: Memory, kind: int, prefill: int, pairs: int, decodes: int, cached: int) -> int:
    """Return the time of a step with prompts."""
    ranks = memory.kinds[kind + RANKS]
    tokens, last = -(-(prefill + decodes) // ranks), memory.kinds[kind + TOKENS_LAST]
    took: int = memory.tables[memory.kinds[kind + TOKENS_TABLE] + min(tokens, last)]
    took += memory.kinds[kind + MORE_PS_PER_TOKEN] * max(0, tokens - last)
    sampled = min(-(-decodes // ranks) + 1, memory.kinds[kind + HEAD_LAST])
    took += memory.tables[memory.kinds[kind + HEAD_TABLE] + sampled]
    took += memory.tables[memory.kinds[kind + ATTENTION_TABLE] + decodes]
    took += memory.tables[memory.kinds[kind + SLOPE_TABLE] + decodes] * cached
    took += memory.kinds[kind + READ_PS] + memory.kinds[kind + READ_PS_PER_TOKEN] * prefill
    took += memory.kinds[kind + READ_PS_PER_PAIR] * pairs
    for number in range(memory.kinds[kind + WINDOW_COUNT]):
        window = memory.kinds[kind + WINDOWS] + number * WINDOW
        tokens = memory.windows[window + WINDOW_TOKENS]
        kept = min(cached, -(-decodes // ranks) * ranks * tokens)
        took += memory.tables[memory.windows[window + WINDOW_SLOPE_TABLE] + decodes] * kept
        took += memory.windows[window + WINDOW_PS_PER_PAIR] * min(pairs, prefill * tokens)
    return took


@inlined
def decoding_ps(memory: Memory, kind: int, decodes: int, cached: int) -> tuple[int, int, int]:
    """Return the time of the next step that only decodes, what each one after it takes more, and for how many."""
    slope = memory.tables[memory.kinds[kind + SLOPE_TABLE] + decodes]
    first = memory.tables[memory.kinds[kind + PLAIN_TABLE] + decodes] + slope * cached
    steps = MOST_STEPS
    ranks = memory.kinds[kind + RANKS]
    for number in range(memory.kinds[kind + WINDOW_COUNT]):
        window = memory.kinds[kind + WINDOWS] + number * WINDOW
        most = -(-decodes // ranks) * ranks * memory.windows[window + WINDOW_TOKENS]
        more = memory.tables[memory.windows[window + WINDOW_SLOPE_TABLE] + decodes]
        first += more * min(cached, most)
        if cached < most:
            slope += more
            steps = min(steps, (most - cached) // decodes + 1)
    return first, slope * decodes, steps


@inlined
def span(steps: int, first: int, growth: int) -> int:
    """Return how long so many steps take."""
    return steps * first + growth * (steps * (steps - 1) // 2)


@inlined
def steps_until(elapsed: int, first: int, growth: int) -> int:
    """Return the least number of steps that take `elapsed` or more; a float guesses, whole numbers decide."""
    half = first - growth / 2
    steps = max(1, math.ceil(2 * elapsed / (half + math.sqrt(half * half + 2.0 * growth * elapsed))))
    while span(steps, first, growth) < elapsed:
        steps += 1
    while steps > 1 and span(steps - 1, first, growth) >= elapsed:
        steps -= 1
    return steps
