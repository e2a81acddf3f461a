"""Fit what engines add to their kernels on measured serving runs, and write `catalog/measured/engines.toml`.

    python tools/fit_serving.py ../shared/data/serving

The time per token of a closed loop is linear in the factors and overheads of `Calibration`: each run gives one equation
between its measured time and the times of its parts, priced with one of them at a time. They are solved for the least
sum of relative errors, none below its bound, drawn a little towards "as measured kernel by kernel" so that parts few
runs depend on stay near it. TTFT is then linear in the engine's own time, the reading of a prompt and the share of
requests that start together. Every configuration (engine, architecture, card, precision, layout; no version) weighs as
the square root of its runs. Intervals come from predictions for runs left out of the fit: by configuration where the
model ran on the card; else by card, by model or by source (a laboratory, with its protocol and versions), whichever is
widest.
"""

import argparse
import csv
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from datetime import date
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from waterline import catalog
from waterline.catalog.calibration import Calibration
from waterline.catalog.engines import EngineProfile, find_engine
from waterline.cli.estimate import read_layout, read_precision
from waterline.cost.estimate import closed_loop
from waterline.cost.memory import memory_use, most_sequences
from waterline.cost.serving import Pieces, pieces
from waterline.cost.step import StepCost, price_steps
from waterline.hardware import Gpu
from waterline.llm import Llm
from waterline.plan import Layout

Numbers = NDArray[np.float64]

STEP = {"products": 1.0, "experts": 1.0, "exchange": 1.0, "attention": 1.0, "latent": 1.0, "small": 1.0,
        "step_s": 1e-3, "layer_s": 1e-5, "token_s": 1e-5}  # parts of a step, and their units in the fit  # fmt: skip
PRIOR = np.array([1.0] * 6 + [0.0] * 3)
LOOSE = np.array([1.0] * 6 + [5.0] * 3)  # how far from it a part may lie, in its unit …
PULL = 0.005  # … against the relative errors of all runs; chosen by the configurations left out
REQUEST = ("request_s", "reading", "together", "steps")  # parts of a first token
REQUEST_PRIOR = np.array([0.05, 1.0, 0.1, 0.0])  # a prompt is read once; runs have ten requests a client as a rule
REQUEST_PULL = 0.2  # as PULL
OUTSIDE = ("card", "architecture", "source")  # what may be new about a run
TARGET = Path(__file__).parents[1] / "src/waterline/catalog/measured/engines.toml"
SOURCE = "silicon_sample.csv of aiconfigurator-core 0.12.0 (NVIDIA, Apache-2.0; most are InferenceX runs of 2025-26)"
FLOOR = 0.03  # relative errors below it count alike: runs repeat no better


@dataclass(frozen=True, slots=True)
class Run:
    """One measured serving run, and what it takes to price it."""

    llm: Llm
    gpu: Gpu
    layout: Layout
    precision: str
    engine: str
    version: str
    source: str
    isl: int
    osl: int
    concurrency: int  # over all data-parallel ranks
    ttft_s: float
    tpot_s: float
    peer_ttft_s: float  # NaN where it did not answer
    peer_tpot_s: float

    @property
    def card(self) -> str:
        return self.gpu.id

    @property
    def architecture(self) -> str:
        """The same architecture under two names is one."""
        return re.sub(r"DeepSeek-(V3|R1).*", "DeepSeek-V3", self.llm.name)

    @property
    def configuration(self) -> str:
        """What is left out together."""
        return f"{self.engine} {self.architecture} {self.gpu.id} {self.precision} {self.layout}"


def read_runs(folder: Path) -> Iterator[Run]:
    """Read `e2e_datacentre.csv`."""
    with (folder / "e2e_datacentre.csv").open() as file:
        for row in csv.DictReader(file):
            llm = catalog.load_model(row["model"], Path())
            degrees = (int(row[name] or 1) or 1 for name in ("tp", "pp", "attention_dp", "moe_tp", "moe_ep"))
            layout, _ = read_layout(*degrees)
            yield Run(
                llm=llm,
                gpu=catalog.find_gpu(row["gpu"]),
                layout=layout,
                precision=read_precision(row["precision"], llm),
                engine=row["engine"],
                version=row["engine_version"],
                source=_source(row["origin"]),
                isl=int(row["isl"]),
                osl=int(row["osl"]),
                concurrency=int(row["concurrency"]) * (int(row["attention_dp"] or 1)),
                ttft_s=float(row["ttft_ms"]) / 1e3,
                tpot_s=float(row["tpot_ms"]) / 1e3,
                peer_ttft_s=float(row["aic_ttft_ms"] or "nan") / 1e3,
                peer_tpot_s=float(row["aic_tpot_ms"] or "nan") / 1e3,
            )


def _source(origin: str) -> str:
    """Return whose runs they are: dated files and dumps are InferenceX's, others a series of NVIDIA's each."""
    file = origin.partition(";")[0]
    return "InferenceX" if re.match(r"db-dump|source_file=\d{4}-", file) else file


class Pricer:
    """The pieces of runs, part by part; steps are priced once for all runs of a replica."""

    def __init__(self) -> None:
        self._steps: dict[tuple[str, ...], list[StepCost]] = {}

    def parts(self, run: Run) -> list[Pieces]:
        """Return the pieces of the run for each of STEP alone."""
        context = run.isl + run.osl // 2
        return [pieces(step, self.running(run), run.isl, context) for step in self._priced(run)]

    def running(self, run: Run) -> int:
        """Return how many requests run together; runs that cannot fit did, so at least one."""
        engine = self._engine(run)
        memory = memory_use(run.llm, run.gpu, run.layout, run.precision, engine)
        places = most_sequences(run.llm, run.layout, memory, run.isl + run.osl // 2) if memory.cache_bytes > 0 else 0
        return min(run.concurrency, places or run.concurrency, engine.max_batch * run.layout.dp)

    def _engine(self, run: Run) -> EngineProfile:
        return find_engine(run.engine).on(run.gpu)

    def _priced(self, run: Run) -> list[StepCost]:
        key = (run.llm.name, run.gpu.id, str(run.layout), run.precision, run.engine)
        if key not in self._steps:
            nothing = dict.fromkeys(STEP, 0.0)
            self._steps[key] = [
                price_steps(
                    run.llm,
                    run.gpu,
                    run.layout,
                    run.precision,
                    self._engine(run),
                    Calibration(**{**nothing, name: unit}),
                )
                for name, unit in STEP.items()
            ]
        return self._steps[key]


@dataclass(frozen=True)
class Design:
    """The equations of some runs: [run, part] seconds."""

    plain: Numbers
    delay: Numbers
    lone: Numbers
    running: Numbers
    concurrency: Numbers
    osl: Numbers
    ttft_s: Numbers
    tpot_s: Numbers
    weight: Numbers

    def of(self, chosen: NDArray[np.bool_]) -> "Design":
        return Design(*(value[chosen] for value in self.__dict__.values()))

    def predicted(self, calibration: Calibration) -> tuple[Numbers, Numbers]:
        """Return TTFT and TPOT of each run, by the very function the estimate uses."""
        values = np.array([getattr(calibration, name) / unit for name, unit in STEP.items()])
        both = [
            closed_loop(
                Pieces(plain_s=plain, delay_s=delay, alone_s=0.0, lone_s=lone, reading_s=0.0),
                calibration,
                run,
                osl,
                all_,
            )
            for plain, delay, lone, run, osl, all_ in zip(
                self.plain @ values,
                self.delay @ values,
                self.lone @ values,
                self.running.astype(int),
                self.osl.astype(int),
                self.concurrency.astype(int),
                strict=True,
            )
        ]
        ttft_s, tpot_s = np.array(both).T
        return ttft_s, tpot_s


def design(runs: list[Run]) -> Design:
    """Price every run part by part."""
    pricer = Pricer()
    parts = [pricer.parts(run) for run in runs]
    names = [run.configuration for run in runs]

    def column(name: str) -> Numbers:
        return np.array([[getattr(part, name) for part in row] for row in parts])

    def each(name: str) -> Numbers:
        return np.array([float(getattr(run, name)) for run in runs])

    return Design(
        plain=column("plain_s"),
        delay=column("delay_s"),
        lone=column("lone_s"),
        running=np.array([float(pricer.running(run)) for run in runs]),
        concurrency=each("concurrency"),
        osl=each("osl"),
        ttft_s=each("ttft_s"),
        tpot_s=each("tpot_s"),
        weight=np.array([names.count(name) ** -0.5 for name in names]),
    )


def fit(data: Design) -> Calibration:
    """Fit one engine."""
    tpot = data.plain + (data.running / data.osl)[:, None] * data.delay
    step = _solve(tpot, data.tpot_s, data.weight, PRIOR, PULL / LOOSE**2)
    alone = data.lone @ step
    served = data.running == data.concurrency  # the others wait, for as long as everything else takes
    first = np.stack([np.ones_like(alone), alone, data.running / 2 * alone, tpot @ step], axis=1)
    scale = np.median(first / data.ttft_s[:, None], axis=0)  # so that each coefficient is a share of a first token
    request = _solve(
        (first / scale)[served],
        data.ttft_s[served],
        data.weight[served],
        REQUEST_PRIOR * scale,
        np.full(4, REQUEST_PULL),
    )
    request = request / scale
    values = {name: float(value * unit) for (name, unit), value in zip(STEP.items(), step, strict=True)}
    return Calibration(**values, **{name: float(value) for name, value in zip(REQUEST, request, strict=True)})


def _solve(columns: Numbers, measured: Numbers, weight: Numbers, prior: Numbers, pull: Numbers) -> Numbers:
    """Return coefficients, none negative, with the least weighted sum of relative errors.

    Iteratively reweighted least squares; `pull` weighs the squared distance from `prior` against all runs together.
    """
    relative = columns / measured[:, None]
    found, weights = prior.copy(), weight.copy()
    for _ in range(60):
        kept = list(range(len(prior)))
        while kept:
            some = relative[:, kept]
            ridge = np.diag(pull[kept]) * weights.sum()
            values = np.linalg.solve(some.T @ (some * weights[:, None]) + ridge, some.T @ weights + ridge @ prior[kept])
            if (values >= 0).all():
                break
            kept.pop(int(np.argmin(values)))
        found = np.zeros(len(prior))
        found[kept] = values
        weights = weight / np.maximum(np.abs(relative @ found - 1), FLOOR)
    return found


def left_out(data: Design, groups: list[str]) -> tuple[Numbers, Numbers]:
    """Return TTFT and TPOT of every run as fitted without its group."""
    names = np.array(groups)
    ttft_s, tpot_s = np.zeros(len(names)), np.zeros(len(names))
    for name in np.unique(names):
        own = names == name
        ttft_s[own], tpot_s[own] = data.of(own).predicted(fit(data.of(~own)))
    return ttft_s, tpot_s


def ratios(measured: Numbers, predicted: Numbers) -> tuple[float, float]:
    """Return the 10th and 90th percentile of measured over predicted."""
    low, high = np.quantile(measured / predicted, [0.1, 0.9])
    return round(float(low), 3), round(float(high), 3)


def _left_out_ratios(data: Design, groups: list[str]) -> tuple[tuple[float, float], tuple[float, float]]:
    """Return the ratios of TTFT and of TPOT."""
    ttft_s, tpot_s = left_out(data, groups)
    return ratios(data.ttft_s, ttft_s), ratios(data.tpot_s, tpot_s)


def most_line(runs: Sequence[Any]) -> str:
    """Return the largest of each size among runs, as a line of the table."""
    most = {name: max(getattr(run, name) for run in runs) for name in ("isl", "osl", "concurrency")}
    most["context"] = max(run.isl + run.osl for run in runs)
    most["gpus"] = max(run.layout.gpus for run in runs)
    return "most = { " + ", ".join(f"{name} = {value}" for name, value in most.items()) + " }"


def _widest(edges: list[tuple[float, float]]) -> tuple[float, float]:
    return min(low for low, _ in edges), max(high for _, high in edges)


def main() -> None:
    """Fit every engine and write the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path, nargs="?", default=Path("../shared/data/serving"))
    folder = parser.parse_args().folder
    everything = list(read_runs(folder))
    lines = [
        "# What engines add to their kernels. Written by tools/fit_serving.py; do not edit.",
        f"# From {SOURCE}, {len(everything)} runs, fitted {date.today().isoformat()}.",  # noqa: DTZ011
    ]
    for engine in sorted({run.engine for run in everything}):
        runs = [run for run in everything if run.engine == engine]
        lines += _entry(engine, runs)
    TARGET.write_text("\n".join(lines) + "\n")


def _entry(engine: str, runs: list[Run]) -> list[str]:
    data = design(runs)
    found = fit(data)
    cards = sorted({run.gpu.id for run in runs})
    lines = ["", f"[{engine}]"]
    lines += [f"{name} = {getattr(found, name):.4g}" for name in (*STEP, *REQUEST)]
    lines += [f"gpus = {cards}".replace("'", '"'), f'source = "{len(runs)} runs"']
    lines.append(most_line(runs))
    models = {card: sorted({run.llm.parameters for run in runs if run.card == card}) for card in cards}
    lines.append("parameters = { " + ", ".join(f"{card} = {some}" for card, some in models.items()) + " }")
    by = {name: _left_out_ratios(data, [getattr(run, name) for run in runs]) for name in ("configuration", *OUTSIDE)}
    outside = [_widest([by[name][figure] for name in OUTSIDE]) for figure in (0, 1)]
    for provenance, (ttft, tpot) in {
        "measured": by["configuration"], "interpolated": outside, "transferred": outside
    }.items():  # fmt: skip
        lines.append(f"spread.{provenance} = {{ ttft = {list(ttft)}, tpot = {list(tpot)} }}")
    return lines


if __name__ == "__main__":
    main()
