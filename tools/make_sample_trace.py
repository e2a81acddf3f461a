"""Make examples/traces/office-hour.csv: an hour of a small office, drawn by the rehearsal's own generator.

Poisson arrivals at 0.42 requests/s, lognormal lengths around 1,000 prompt and 200 output tokens, in a context of 8,192;
see `waterline.rehearsal.drawing.poisson_trace`. The same bytes every time.
"""

from pathlib import Path

from numpy.random import PCG64, Generator

from waterline.fleet import HOURS
from waterline.rehearsal.drawing import poisson_trace
from waterline.units import HOUR_S
from waterline.workload import Trace, write_trace

SAMPLE = Path(__file__).parent.parent / "examples" / "traces" / "office-hour.csv"


def office_hour() -> Trace:
    return poisson_trace(
        SAMPLE.name,
        [0.42] * HOURS,
        prompt_tokens=1000,
        output_tokens=200,
        max_context_tokens=8192,
        duration_s=HOUR_S,
        first_hour=0,
        generator=Generator(PCG64(2026)),
    )


if __name__ == "__main__":
    SAMPLE.parent.mkdir(parents=True, exist_ok=True)
    write_trace(office_hour(), SAMPLE)
    print(f"{SAMPLE}: {len(office_hour().requests)} requests, {SAMPLE.stat().st_size} bytes")
