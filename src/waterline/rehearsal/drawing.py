"""Arrivals and lengths by chance, from the rates and the means of a demand."""

from collections.abc import Sequence

import numpy as np
from numpy.random import Generator
from numpy.typing import NDArray

from waterline.fleet import HOURS
from waterline.units import HOUR_S, PICOSECONDS_PER_S
from waterline.workload import LENGTH_SIGMA, TICKS_PER_S, Request, Trace

PICOSECONDS_PER_TICK = PICOSECONDS_PER_S // TICKS_PER_S

Integers = NDArray[np.int64]


def draw(
    hourly_requests_per_s: Sequence[float],
    *,
    prompt_tokens: int,
    output_tokens: int,
    max_context_tokens: int,
    duration_s: float,
    first_hour: int,
    generator: Generator,
) -> tuple[Integers, Integers, Integers]:
    """Draw Poisson arrivals whose rate changes with the hour, and lognormal lengths.

    Arrivals at the largest rate are thinned to the rate of their hour, and rounded to 100 ns, which a trace file keeps.
    Lengths are independent, with the stated means and `LENGTH_SIGMA`, at least 1; where prompt and output exceed the
    context, the output is cut, and the prompt when it alone does. So the means come out a little lower than stated when
    they are not far below the context.

    Returns arrivals in picoseconds from the start, prompt tokens and output tokens.
    """
    largest = max(hourly_requests_per_s)
    candidates_s = np.sort(generator.random(generator.poisson(largest * duration_s))) * duration_s
    hours = (first_hour + (candidates_s // HOUR_S).astype(np.int64)) % HOURS
    kept = generator.random(len(candidates_s)) * largest < np.asarray(hourly_requests_per_s)[hours]
    ticks = np.rint(candidates_s[kept] * TICKS_PER_S).astype(np.int64)
    prompts = np.clip(_lengths(prompt_tokens, len(ticks), generator), 1, max_context_tokens - 1)
    outputs = np.clip(_lengths(output_tokens, len(ticks), generator), 1, max_context_tokens - prompts)
    return ticks * PICOSECONDS_PER_TICK, prompts, outputs


def poisson_trace(
    name: str,
    hourly_requests_per_s: Sequence[float],
    *,
    prompt_tokens: int,
    output_tokens: int,
    max_context_tokens: int,
    duration_s: float,
    first_hour: int,
    generator: Generator,
) -> Trace:
    """Return what `draw` draws as a trace."""
    arrivals_ps, prompts, outputs = draw(
        hourly_requests_per_s,
        prompt_tokens=prompt_tokens,
        output_tokens=output_tokens,
        max_context_tokens=max_context_tokens,
        duration_s=duration_s,
        first_hour=first_hour,
        generator=generator,
    )
    return Trace(
        name=name,
        requests=[
            Request(arrival_s=ticks / TICKS_PER_S, prompt_tokens=prompt, output_tokens=output)
            for ticks, prompt, output in zip(
                (arrivals_ps // PICOSECONDS_PER_TICK).tolist(), prompts.tolist(), outputs.tolist(), strict=True
            )
        ],
    )


def _lengths(mean: float, count: int, generator: Generator) -> Integers:
    """Draw whole numbers; a lognormal with parameter μ has the mean exp(μ + σ²/2)."""
    lengths = generator.lognormal(np.log(mean) - LENGTH_SIGMA**2 / 2, LENGTH_SIGMA, count)
    return np.rint(lengths).astype(np.int64)
