"""The minutes clock in a rehearsal: small fleets by their story, random ones by what must never happen."""

import importlib.util
import json
import sys
from collections.abc import Sequence
from pathlib import Path
from types import ModuleType

import numpy as np
import pytest
from msgspec.structs import replace

from waterline.errors import InputError, UnknownNameError
from waterline.fleet import Demand, Fleet, Job, Model, Pool, Tenant, check_fleet
from waterline.plan import Plan, Replica
from waterline.planner import make_plan
from waterline.policy import tide as tides
from waterline.policy.decisions import COMES_BACK, FIELDS, NONE, as_json, canonical_bytes
from waterline.policy.tide import signal_line
from waterline.rehearsal import POLICIES, Failure, Rehearsal, rehearse
from waterline.rehearsal.arrivals import Traffic
from waterline.rehearsal.failures import parse_failure, random_failures
from waterline.rehearsal.pieces import Piece
from waterline.rehearsal.state import LOSS_PS
from waterline.roster import Roster
from waterline.workload import Request, Trace
from waterline.workload.operators import Surge

HOUR_NS = 3600 * 10**9
FLEETS = 50
SEED = 36  # of a fleet that moves a lot


def harness() -> ModuleType:
    path = Path(__file__).parents[2] / "benchmarks" / "random_fleets.py"
    spec = importlib.util.spec_from_file_location("benchmarks_random_fleets", path)
    assert spec
    assert spec.loader
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    spec.loader.exec_module(module)
    return module


class Fluid:
    """Serves whatever is asked; replicas are idle some steps after they drain."""

    def __init__(self) -> None:
        self.rows = 0
        self.drained: dict[int, int] = {}  # row -> polls until it is idle

    def start_all(self, replicas: Sequence[Replica], ready_ps: int) -> range:  # noqa: ARG002 - the station's signature
        self.rows += len(replicas)
        return range(self.rows - len(replicas), self.rows)

    def drain(self, row: int, at_ps: int) -> None:  # noqa: ARG002 - likewise
        self.drained[row] = row % 6

    def fail(self, row: int, at_ps: int) -> None:
        pass

    def offer(self, piece: Piece) -> None:
        pass

    def advance(self, until_ps: int) -> None:
        pass

    def idle(self, row: int) -> bool:
        self.drained[row] -= 1
        return self.drained[row] < 0


class Given:
    """Says what is asked at each step."""

    def __init__(self, loads: np.ndarray, step_s: float) -> None:
        self.of_step, self.step_s, self.asked = loads, step_s, 0  # [step, service]

    def note(self, piece: Piece) -> None:
        pass

    def loads(self) -> dict[int, float]:
        self.asked += 1
        return dict(enumerate((self.of_step[min(self.asked, len(self.of_step)) - 1] * self.step_s).tolist()))


def a_plan(*, public_per_s: float = 8.0, jobs: int = 4, nodes: int = 3) -> Plan:
    """Return twelve GPUs; the public and research deserve a third each and share a model of one GPU; jobs take two."""
    fleet = Fleet(
        name="small",
        pools=(Pool(name="box", gpu="h100-sxm-80g", nodes=nodes, gpus_per_node=4, usd_per_gpu_hour=1.0),),
        models=(Model(name="chat", weights="meta-llama/Llama-3.1-8B"),),
        tenants=(
            Tenant(name="public", guarantee=0.1, deserved=0.34, priority=1),
            Tenant(name="research", deserved=0.34, grace_s=90.0, min_runtime_s=60.0),
        ),
        demand=(
            Demand(tenant="public", model="chat", requests_per_s=public_per_s, prompt_tokens=2000, output_tokens=300),
            Demand(tenant="research", model="chat", requests_per_s=2.0, prompt_tokens=2000, output_tokens=300),
        ),
        jobs=(Job(name="train", tenant="research", gpus=2, copies=jobs, checkpoint_every_s=120.0),) if jobs else (),
    )
    return make_plan(check_fleet(fleet, Path("small.toml")))


PLAN = a_plan()
SURGE = Surge(tenant="public", factor=7.0, begin_ns=10 * HOUR_NS, length_ns=HOUR_NS // 2)


@pytest.fixture(scope="module")
def surged() -> Rehearsal:
    return rehearse(PLAN, surges=[SURGE], duration_s=2.2 * 3600, keep=False)


def test_a_surge_takes_gpus_from_jobs_in_time_and_hands_them_back(surged: Rehearsal) -> None:
    in_surge = [move for move in surged.moves if 3600 <= move.at_s < 3600 + 900]
    assert {"start"} <= {move.kind for move in in_surge if move.tenant == "public"}
    stopped = [move for move in in_surge if move.kind == "drain"]
    assert {move.victim.split("/")[0] for move in stopped} == {"train"}
    after = [move for move in surged.moves if move.at_s > 3600 + 1800 + 300]
    assert any(move.kind == "hand back" and move.victim.startswith("chat") for move in after)
    assert any(move.kind == "start" and move.target == "train" for move in after)
    public = next(one for one in surged.by_tenant if one.tenant == "public")
    planned = rehearse(replace(PLAN), surges=[SURGE], duration_s=2.2 * 3600, keep=False, policy="plan")
    assert public.slo_fraction > 1.3 * next(one for one in planned.by_tenant if one.tenant == "public").slo_fraction


def test_an_idle_guarantee_serves_the_surge_of_another_tenant_of_the_model() -> None:
    plan = a_plan(jobs=0)
    guaranteed = tuple(replace(tenant, guarantee=0.0 if tenant.name == "public" else 0.6, deserved=share)
                       for tenant, share in zip(plan.fleet.tenants, (0.1, 0.6), strict=True))  # fmt: skip
    plan = replace(plan, fleet=replace(plan.fleet, tenants=guaranteed))
    done = rehearse(plan, surges=[SURGE], duration_s=1.2 * 3600, keep=False)
    hosted = [move for move in done.moves if move.rule == "hosts"]
    assert {move.tenant for move in hosted} == {"research"}
    assert 3600 < min(move.at_s for move in hosted) <= 3660, "when what idles beside it is used"


def test_what_a_job_did_is_kept_or_lost_and_nothing_else(surged: Rehearsal) -> None:
    (job,) = surged.jobs
    had = sum(move.gpus for move in surged.moves if move.kind == "start" and move.target == "train")
    assert job.stops > 0
    assert 0 < job.lost_gpu_hours < job.gpu_hours
    assert job.gpu_hours + job.lost_gpu_hours < had * surged.duration_s / 3600
    assert job.lost_gpu_hours >= had * 60 / 3600 - 1e-9 - 2 * 60 / 3600  # loading, the last perhaps in part


def test_whoever_said_when_gpus_would_come_kept_the_word(surged: Rehearsal) -> None:
    told = [
        move for move in surged.moves if move.kind in {"start", "drain", "hand back"} and move.done_s == move.done_s
    ]
    assert len(told) > 10
    for move in told:
        assert move.done_s <= move.deadline_s + 1e-6


def test_the_log_is_the_same_for_the_same_seed_whatever_the_size_of_pieces(monkeypatch: pytest.MonkeyPatch) -> None:
    def run(seed: int) -> Rehearsal:
        return rehearse(PLAN, surges=[SURGE], duration_s=1.2 * 3600, seed=seed)

    whole, other = run(1), run(2)
    pieces = Traffic.pieces
    monkeypatch.setattr(
        Traffic,
        "pieces",
        lambda asked: (piece[at : at + 777] for piece in pieces(asked) for at in range(0, len(piece), 777)),
    )
    parts = run(1)
    assert len(whole.decisions) > 10
    assert parts.digest == whole.digest != other.digest
    assert canonical_bytes(parts.decisions) == canonical_bytes(whole.decisions)
    assert str(parts.completions) == str(whole.completions)  # as text, because no NaN is like another
    lines = [json.loads(as_json(row, whole.names)) for row in whole.decisions]
    assert [(line["rule"], line["claimant"], line["place"], line["amount"]) for line in lines] == [
        (move.rule, f"{move.tenant}/{move.target}", f"{move.pool}/{move.node}", move.gpus) for move in whole.moves
    ]


def test_decisions_about_requests_are_kept_when_asked_for() -> None:
    done = rehearse(PLAN, duration_s=60.0, decisions=True)
    rules = done.decisions[:, FIELDS.index("amount")]
    assert len(done.decisions) == len(done.completions) + len(done.moves)
    assert (np.diff(done.decisions[:, 0]) >= 0).all()
    assert rules.sum() > 2000 * len(done.completions)


@pytest.mark.parametrize("policy", POLICIES)
def test_every_policy_serves_an_ordinary_hour(policy: str) -> None:
    done = rehearse(PLAN, duration_s=300.0, keep=False, policy=policy)
    assert done.summaries[0].slo_fraction > 0.97
    assert (done.digest == "") == (policy == "plan")


@pytest.mark.parametrize("policy", POLICIES)
def test_who_is_refused_learns_why_whoever_decides(policy: str) -> None:
    """A thousand ask at once, of whom one asks for more than any replica holds."""
    asked = [Request(arrival_s=0.0, prompt_tokens=2000, output_tokens=100)] * 1000
    asked.append(Request(arrival_s=1.0, prompt_tokens=40_000, output_tokens=1))
    done = rehearse(PLAN, Trace(name="crowd", requests=tuple(asked)), policy=policy)
    *_, longest = done.completions
    assert longest.reason == "40001 tokens, of which no replica of the model holds more than 32768"
    late = {one.reason.split(" s; retry after ")[0] for one in done.completions[:-1] if one.status == "refused"}
    assert late == {"would not start within 2"}


def test_a_fixed_split_lends_nothing() -> None:
    done = rehearse(PLAN, surges=[SURGE], duration_s=1.5 * 3600, keep=False, policy="static")
    assert [(move.at_s, move.target, move.gpus) for move in done.moves] == [(0.0, "train", 2)]
    assert done.lent == ()
    gpus = dict(zip(done.timeline.tenants, done.timeline.gpus.max(axis=1).tolist(), strict=True))
    assert gpus == {"public": 4, "research": 3}  # of the last of its four GPUs, no job of two can be made


def test_who_does_not_exist_does_not_decide() -> None:
    with pytest.raises(UnknownNameError, match="no policy is called 'fcsf'. Did you mean 'fcfs'"):
        rehearse(PLAN, policy="fcsf")


# --- Failures ---------------------------------------------------------------------------------------------------------


def test_requests_on_a_node_that_fails_go_on_elsewhere_and_another_replica_starts() -> None:
    failed = PLAN.replicas_at(0)[0].places[0].node
    failure = Failure(pool="box", node=failed, begin_s=300.0, length_s=900.0)
    done = rehearse(PLAN, duration_s=1500.0, failures=[failure], decisions=True)
    total = done.summaries[0]
    assert (total.failed, total.completed) == (0, total.requests - total.refused)
    assert total.refused < 0.08 * total.requests  # while the next replica loads
    back = done.decisions[done.decisions[:, FIELDS.index("rule")] == COMES_BACK]
    first_ns = done.first_hour * HOUR_NS
    assert len(back) > 0
    assert (back[:, FIELDS.index("at_ns")] >= first_ns + 300 * 10**9).all()
    places = [done.request_names["place"][place] for place in back[:, FIELDS.index("place")]]
    assert PLAN.replicas_at(0)[0].id not in places
    assert (done.reasons[:, 0] != NONE).sum() == total.completed + len(back)
    down = [move for move in done.moves if move.kind == "start" and 300 <= move.at_s < 1200]
    assert any(move.target == "chat" for move in down)
    assert all(move.node != failed for move in down)
    assert any(move.node == failed for move in done.moves if move.at_s >= 1200)
    assert done.timeline.down_gpus @ done.timeline.lengths_s == pytest.approx(4 * 900.0)
    lost_gpu_s = sum(
        float(settled.passages.losses[:, LOSS_PS].sum()) / 1e12 for settled in done.kept
    )  # of one GPU each
    assert lost_gpu_s > 1.0
    computed_gpu_s = sum(one.gpu_s for one in done.completions)
    assert total.gpu_hours == pytest.approx(computed_gpu_s / 3600)
    assert sum(one.gpu_hours for one in done.by_pool) == pytest.approx(computed_gpu_s / 3600)
    assert (done.timeline.used_gpus @ done.timeline.lengths_s).sum() == pytest.approx(computed_gpu_s)


def test_failures_are_read_and_drawn() -> None:
    assert parse_failure("h800:3@20:30+2h") == Failure(pool="h800", node=3, begin_s=73_800.0, length_s=7200.0)
    assert str(parse_failure("h800:3@20:30+2h")) == "h800:3@20:30+2h"
    for wrong in ("h800@20:30+2h", "h800:3@25:30+2h", "h800:3@20:30+0h", "h800:x@20:30+1h"):
        with pytest.raises(InputError, match="Write a pool and a node"):
            parse_failure(wrong)
    drawn = random_failures(PLAN.fleet, mean_hours_between=10.0, repair_s=600.0, length_s=1000 * 3600.0, seed=3)
    assert len(drawn) == pytest.approx(3 * 1000 / (10 + 1 / 6), rel=0.15)
    assert drawn == random_failures(PLAN.fleet, mean_hours_between=10.0, repair_s=600.0, length_s=3.6e6, seed=3)
    assert str(Failure(pool="box", node=1, begin_s=69_000.0, length_s=600.0)) == "box:1@19:10+10m"
    with pytest.raises(InputError, match="pool 'box' has no node 3 that could fail: it has 3, counted from 0"):
        rehearse(PLAN, failures=[Failure(pool="box", node=3, begin_s=0.0, length_s=60.0)])
    with pytest.raises(
        UnknownNameError, match="the fleet has no pool 'bax', of which a node is to fail. Did you mean 'box'"
    ):
        rehearse(PLAN, failures=[Failure(pool="bax", node=0, begin_s=0.0, length_s=60.0)])
    late = Failure(pool="box", node=0, begin_s=300.0, length_s=60.0)
    with pytest.raises(
        InputError, match=r"the failure box:0@00:05\+1m begins outside of the rehearsal, which goes from"
    ):
        rehearse(PLAN, duration_s=300.0, failures=[late])
    assert rehearse(PLAN, duration_s=310.0, failures=[late], keep=False).notes[-1] == "failing box:0@00:05+1m"
    with pytest.raises(InputError, match="Rehearse that under another policy"):
        rehearse(PLAN, policy="plan", failures=[Failure(pool="box", node=0, begin_s=0.0, length_s=60.0)])


# --- Random fleets ----------------------------------------------------------------------------------------------------


def test_every_promise_holds_at_every_step_and_for_every_request_of_random_fleets() -> None:
    fleets = harness()
    lives = [fleets.live(fleets.random_fleet(seed)) for seed in range(FLEETS)]
    assert sum(life.minutes.made for life, _ in lives) > 10 * FLEETS, "they do move"
    assert sum(len(one.numbers) for _, settled in lives for one in settled) > 1000 * FLEETS


def test_what_a_rehearsal_was_told_makes_the_same_log_again() -> None:
    fleets = harness()
    life, _ = fleets.live(fleets.random_fleet(SEED), keep=True)
    again, _ = fleets.begin(fleets.random_fleet(SEED))
    rows = list(tides.replay(again.setting.roster.tide, [signal_line(signal) for signal in life.minutes.signals]))
    assert len(rows) > 50
    assert canonical_bytes(rows) == canonical_bytes(life.minutes.log.rows)


@pytest.mark.parametrize("cold_starts", [0.5, 1.0, 2.0])
def test_a_square_wave_makes_no_more_than_one_round_trip_a_period(cold_starts: float) -> None:
    plan = a_plan(jobs=0)
    roster = Roster(plan, plan.replicas_at(0), hour=0)
    cold_start_s = plan.shapes[0].load_s + 30.0
    steps, periods = max(1, round(cold_starts * cold_start_s / roster.step_s / 2)), 12
    low, high = np.array([4.0, 2.0]), np.array([30.0, 2.0])
    wave = np.concatenate([np.repeat([high, low], steps, axis=0)] * periods)
    life = harness().Checked(plan, roster, Fluid(), rows=(), first_hour=0, length_s=0.0)
    life.watch()
    life.meter = Given(wave, roster.step_s)
    life.advance(len(wave) * roster.step_s)
    settled = [move for move in life.moves if move.at_s > 3 * 2 * steps * roster.step_s]  # its first rise has to be met
    starts = sum(move.kind == "start" for move in settled)
    stops = sum(move.kind in {"drain", "hand back"} and bool(move.victim) for move in settled)
    rate = plan.shapes[0].requests_per_s
    assert min(starts, stops) <= (periods - 3) * -(-26.0 // rate)
