"""What the forecast is worth against reacting, in the rehearsal: real replicas, real queues, real loading.

    .venv/bin/python benchmarks/ramp.py [--seeds N] [--minutes M]

64 GPUs of eight nodes serve a small model, a replica each. The public deserves 16 of them and may have 48; research
trains on what idles. Within ten minutes the public's load grows threefold, stays for M minutes, and goes back in ten.
A replica that is lent serves two minutes later: up to 60 s in which a job saves its work, 60 s in which the model
loads.
Each policy decides with the same code; what it says the public will need is

- reactive: what was asked in the last step;
- forecast: what will be asked one cold start ahead, on its first day and with a plan that knows no ramp;
- clairvoyant: what is going to be asked, the most up to one cold start ahead.

Counted from the beginning of the ramp: requests beyond their SLO (late or refused), and GPU-hours that the public had
beyond what it deserves, loading included.
"""

import sys
from pathlib import Path

import numpy as np
from msgspec.structs import replace
from rich.console import Console
from rich.table import Table

from waterline.fleet import Demand, Fleet, Job, Model, Pool, Tenant, check_fleet
from waterline.plan import Plan
from waterline.planner import make_plan
from waterline.policy import tide as tides
from waterline.policy.holdings import Moves
from waterline.rehearsal import prepare
from waterline.rehearsal.acting import Tidal
from waterline.rehearsal.arrivals import Traffic, traffic
from waterline.rehearsal.pieces import Piece, piece_of
from waterline.rehearsal.recorder import Recorder
from waterline.units import PICOSECONDS_PER_S

QUIET_S, RISE_S = 900.0, 600.0
DESERVED = 16
POLICIES = ("reactive", "forecast", "clairvoyant")


def plan_of(quiet_per_s: float) -> Plan:
    """Return the plan of a quiet day."""
    fleet = Fleet(
        name="ramp",
        pools=(Pool(name="box", gpu="h100-sxm-80g", nodes=8, gpus_per_node=8, usd_per_gpu_hour=2.0),),
        models=(Model(name="chat", weights="meta-llama/Llama-3.1-8B"),),
        tenants=(
            Tenant(name="public", deserved=DESERVED, limit=48, priority=1),
            Tenant(name="research", deserved=16, grace_s=60.0, min_runtime_s=60.0),
        ),
        demand=(
            Demand(tenant="public", model="chat", requests_per_s=quiet_per_s, prompt_tokens=2000, output_tokens=300),
        ),
        jobs=(Job(name="train", tenant="research", gpus=1, copies=48, load_s=60.0),),
    )
    plan = make_plan(check_fleet(fleet, Path("ramp")))
    return replace(plan, shapes=tuple(replace(shape, load_s=60.0) for shape in plan.shapes))


def rate(time_s: np.ndarray, quiet_per_s: float, high_s: float) -> np.ndarray:
    """Return requests a second."""
    up = np.clip((time_s - QUIET_S) / RISE_S, 0.0, 1.0)
    down = np.clip((time_s - QUIET_S - RISE_S - high_s) / RISE_S, 0.0, 1.0)
    return quiet_per_s * (1.0 + 2.0 * (up - down))


class Ramp:
    """Arrivals at that rate, in the place of those of the plan."""

    def __init__(self, plan: Plan, quiet_per_s: float, high_s: float, seed: int) -> None:
        self.dice = np.random.default_rng(seed)
        self.quiet_per_s, self.high_s = quiet_per_s, high_s
        self.length_s = QUIET_S + 2 * RISE_S + high_s + QUIET_S
        self.asked: Traffic = traffic(plan, None, seed=seed, duration_s=self.length_s)

    def pieces(self) -> list[Piece]:
        count = int(self.dice.poisson(3 * self.quiet_per_s * self.length_s))
        times_s = np.sort(self.dice.random(count) * self.length_s)
        kept = self.dice.random(count) * 3 * self.quiet_per_s < rate(times_s, self.quiet_per_s, self.high_s)
        arrival_ps = (times_s[kept] * 1e9).astype(np.int64) * 1000
        total = len(arrival_ps)
        prompts, outputs = (
            np.maximum(1, self.dice.lognormal(np.log(mean) - 0.32, 0.8, total)).astype(np.int64)
            for mean in (2000.0, 300.0)
        )
        zeros = np.zeros(total, np.int64)
        return [
            piece_of(arrival_ps, np.minimum(prompts, 16_000), np.minimum(outputs, 4000), zeros, zeros.astype(np.int32))
        ]


def live(policy: str, quiet_per_s: float, high_s: float, seed: int) -> tuple[int, int, float]:
    """Return requests from the ramp on, those beyond their SLO, and GPU-hours borrowed."""
    plan = plan_of(quiet_per_s)
    ramp = Ramp(plan, quiet_per_s, high_s, seed)
    recorder = Recorder(plan, ramp.length_s)
    actor = Tidal("waterline", plan, ramp.asked, recorder, (), reasons=False)
    tide, minutes, roster = actor.minutes.tide, actor.minutes, actor.setting.roster
    public = roster.service("public", "chat")
    if policy == "reactive":
        tide.source[public] = tides.REACT
    if policy == "clairvoyant":
        ahead_s = np.arange(0.0, 131.0, 10.0)
        decide = minutes.decide

        def know(known: tides.Tide, now_s: float) -> Moves:
            most = rate(now_s - minutes.first_s + ahead_s, quiet_per_s, high_s).max()
            known.source[public], known.fixed[public] = tides.FIXED, most
            return decide(known, now_s)

        minutes.decide = know
    requests = within = 0
    slo = plan.fleet.slos["chat"]
    settled = [actor.serve(piece) for piece in ramp.pieces()]
    settled.append(actor.finish())
    in_report = np.array([recorder.add_replica(one) for one in actor.came])
    for one in settled:
        one.note(recorder, in_report)
        passages, asked = one.passages, one.asked
        counted = asked.arrival_ps >= QUIET_S * PICOSECONDS_PER_S
        ttft_s = (passages.first_token_ps - asked.arrival_ps) / PICOSECONDS_PER_S
        later = np.maximum(1, asked.output_tokens - 1)
        tpot_s = (passages.finish_ps - passages.first_token_ps) / PICOSECONDS_PER_S / later
        fine = (passages.replica >= 0) & (ttft_s <= slo.ttft_s) & (tpot_s <= slo.tpot_s)
        requests, within = requests + int(counted.sum()), within + int((counted & fine).sum())
    actor.close()
    events = [(max(stay.began_s, QUIET_S), 1) for stay in minutes.stays if stay.tenant == "public"]
    events += [(max(stay.ended_s, QUIET_S), -1) for stay in minutes.stays if stay.tenant == "public"]
    events.sort()
    has, before_s, borrowed_s = 0, QUIET_S, 0.0
    for at_s, change in events:
        borrowed_s += max(0, has - DESERVED) * (min(at_s, ramp.length_s) - min(before_s, ramp.length_s))
        has, before_s = has + change, at_s
    return requests, requests - within, borrowed_s / 3600


def argument(name: str, default: float) -> float:
    return float(sys.argv[sys.argv.index(name) + 1]) if name in sys.argv else default


def main() -> None:
    seeds, high_s = int(argument("--seeds", 10)), argument("--minutes", 30) * 60
    prepare()
    shape = plan_of(1.0).shapes[0]
    quiet_per_s = 0.8 * DESERVED * shape.requests_per_s
    table = Table(
        title=f"A ramp to three times {quiet_per_s:.1f} requests a second; mean of {seeds} seeds", title_justify="left"
    )
    for name in ("policy", "requests", "beyond SLO", "against reactive", "borrowed GPU-h", "x clairvoyant"):
        table.add_column(name, justify="left" if name == "policy" else "right")
    found = {
        policy: np.mean([live(policy, quiet_per_s, high_s, seed) for seed in range(seeds)], axis=0)
        for policy in POLICIES
    }
    for policy, (requests, late, borrowed) in found.items():
        table.add_row(
            policy,
            f"{requests:,.0f}",
            f"{late:,.0f}",
            f"{late / max(found['reactive'][1], 1e-9) - 1:+.0%}",
            f"{borrowed:.1f}",
            f"{borrowed / max(found['clairvoyant'][2], 1e-9):.2f}",
        )
    Console(width=110).print(table)


if __name__ == "__main__":
    main()
