"""A plan and traffic in, completions and a bill out."""

import dataclasses
import json
import math
from collections import Counter
from pathlib import Path
from typing import Any

import msgspec
import pytest
from msgspec.structs import replace

from examples import small_plan
from waterline import rehearsal as rehearsing
from waterline.cli.rehearse_files import decision_lines
from waterline.cost import replica_step_cost
from waterline.fleet import Demand, Fleet, Measured, Model, Pool, Tenant, check_fleet
from waterline.outcome import summarize
from waterline.plan import Plan
from waterline.planner import make_plan
from waterline.rehearsal import Progress, Rehearsal, house
from waterline.workload import Request, Slo, Trace, read_trace
from waterline.workload.files import open_trace


def rehearse(plan: Plan, *arguments: Any, policy: str = "plan", **options: Any) -> Rehearsal:
    """Rehearse a plan as it is: the replicas of these plans stand on one and the same card."""
    return rehearsing.rehearse(plan, *arguments, policy=policy, **options)


def burst(count: int, prompt_tokens: int = 500, output_tokens: int = 20) -> Trace:
    return Trace(
        name="burst",
        requests=[
            Request(arrival_s=5.0 + index / 100, prompt_tokens=prompt_tokens, output_tokens=output_tokens)
            for index in range(count)
        ],
    )


def two_models() -> Plan:
    """Return the small plan with a second model, which has two replicas, and a second tenant."""
    plan = small_plan()
    (replica,) = plan.replicas
    code = Model(
        name="code", weights="meta-llama/Llama-3.1-8B", max_context_tokens=4096, slo=Slo(ttft_s=9.0, tpot_s=0.5)
    )
    return replace(
        plan,
        fleet=replace(
            plan.fleet,
            models=(*plan.fleet.models, code),
            tenants=(Tenant(name="public"), Tenant(name="research")),
            demand=(
                Demand(tenant="public", model="chat", requests_per_s=0.5),
                Demand(tenant="research", model="code", requests_per_s=1.0),
            ),
        ),
        models=(*plan.models, replace(plan.models[0], model="code")),
        replicas=(
            replica,
            replace(replica, id="code/0", model="code"),
            replace(replica, id="code/1", model="code"),
        ),
    )


def patient(plan: Plan) -> Plan:
    """Return the plan with an SLO for which nobody has to be refused."""
    models = tuple(replace(model, slo=Slo(ttft_s=1e6, tpot_s=1e6)) for model in plan.fleet.models)
    return replace(plan, fleet=replace(plan.fleet, models=models))


def test_the_same_input_gives_the_same_bytes() -> None:
    first, again, other = (rehearse(two_models(), seed=seed) for seed in (5, 5, 6))

    def text(rehearsal: Rehearsal) -> bytes:
        return msgspec.json.encode((rehearsal.summaries, rehearsal.completions, rehearsal.notes))

    assert text(first) == text(again)
    assert text(first) != text(other)


def test_every_request_ends_once_and_is_counted_once() -> None:
    rehearsal = rehearse(two_models(), burst(60))
    assert len(rehearsal.completions) == 60
    total, chat, code = rehearsal.summaries
    assert (chat.tenant, chat.model, chat.requests) == ("public", "chat", 20)
    assert (code.tenant, code.model, code.requests) == ("research", "code", 40)
    assert total.requests == total.completed + total.refused == 60
    assert {completion.replica for completion in rehearsal.completions if completion.model == "code"} >= {
        "code/0",
        "code/1",
    }
    for completion in rehearsal.completions:
        if completion.status == "ok":
            assert completion.output_tokens == 20
            assert completion.arrival_s < completion.first_token_s < completion.finish_s
            assert completion.gpu_s > 0
        else:
            assert completion.status == "refused"
            assert math.isnan(completion.first_token_s)
            assert completion.finish_s == completion.arrival_s
            assert completion.reason.startswith("would not start within")


def test_completions_come_in_the_order_of_arrival_whatever_the_model() -> None:
    arrivals_s = [completion.arrival_s for completion in rehearse(two_models(), burst(60)).completions]
    assert arrivals_s == pytest.approx([5.0 + index / 100 for index in range(60)])


def test_summaries_are_those_of_the_completions() -> None:
    plan = two_models()
    rehearsal = rehearse(plan, burst(80))
    again = summarize(rehearsal.completions, plan.fleet.slos, rehearsal.duration_s, plan.replica_usd_per_hour)
    for summary, expected in zip(rehearsal.summaries, again, strict=True):
        for name in ("tenant", "model", "requests", "completed", "refused", "within_slo", "output_tokens"):
            assert getattr(summary, name) == getattr(expected, name)
        for name in ("goodput_per_s", "gpu_hours", "usd"):
            assert getattr(summary, name) == pytest.approx(getattr(expected, name), rel=1e-9)
        for times, others in ((summary.ttft_s, expected.ttft_s), (summary.tpot_s, expected.tpot_s)):
            assert times is not None
            assert others is not None
            assert msgspec.structs.astuple(times) == pytest.approx(msgspec.structs.astuple(others), rel=1e-9)
    public, research = rehearsal.by_tenant
    assert (public.tenant, public.model, public.requests) == ("public", "", rehearsal.summaries[1].requests)
    assert (research.tenant, research.usd) == ("research", pytest.approx(rehearsal.summaries[2].usd))


def test_nothing_is_kept_of_single_requests_unless_asked() -> None:
    rehearsal = rehearse(small_plan(), burst(10), keep=False)
    assert rehearsal.completions == ()
    assert rehearsal.summaries == rehearse(small_plan(), burst(10)).summaries


def test_what_the_client_waits_for_on_top_moves_no_other_request(monkeypatch: pytest.MonkeyPatch) -> None:
    plain = rehearse(patient(two_models()), burst(50)).completions
    priced = replica_step_cost
    monkeypatch.setattr(
        house,
        "replica_step_cost",
        lambda fleet, replica: dataclasses.replace(
            priced(fleet, replica), first_token_ps=priced(fleet, replica).first_token_ps + 10**12
        ),
    )
    later = rehearse(patient(two_models()), burst(50)).completions
    for one, other in zip(plain, later, strict=True):
        assert (one.replica, one.gpu_s) == (other.replica, other.gpu_s)
        assert other.first_token_s == pytest.approx(one.first_token_s + 1)
        assert other.finish_s == pytest.approx(one.finish_s + 1)


def test_a_watcher_learns_how_far_it_is_and_can_stop_it() -> None:
    seen: list[Progress] = []

    def watch(progress: Progress) -> bool:
        seen.append(progress)
        return len(seen) < 3

    rehearsal = rehearse(small_plan(), duration_s=6 * 3600.0, watch=watch)
    assert [progress.at_s // 3600 for progress in seen] == [0, 1, 2]
    assert [progress.of_s for progress in seen] == [6 * 3600.0] * 3
    asked = seen[-1].requests
    assert rehearsal.notes[-1] == f"stopped after {asked:,} requests, {seen[-1].at_s / 60:.1f} of 360.0 min"
    total = rehearsal.summaries[0]
    assert total.completed + total.refused == total.requests == asked, "who has come is served"


def test_the_bill_is_all_replicas_from_the_first_arrival_to_the_last_finish() -> None:
    plan = replace(small_plan(), replicas=tuple(replace(one, usd_per_hour=36.0) for one in small_plan().replicas))
    rehearsal = rehearse(plan, burst(3))
    finish_s = max(completion.finish_s for completion in rehearsal.completions)
    assert rehearsal.completions[0].arrival_s == 5.0
    assert rehearsal.duration_s == pytest.approx(finish_s - 5.0)
    assert rehearsal.usd == pytest.approx(rehearsal.duration_s / 100)
    assert rehearsal.summaries[0].usd == rehearsal.usd
    assert rehearsal.summaries[0].goodput_per_s == pytest.approx(3 / rehearsal.duration_s)


def test_a_replica_gets_requests_and_costs_at_its_hours_only() -> None:
    """Demand from 0:00 on, for three hours; the second replica serves from 1:00 to 2:00, having loaded for 10 min."""
    plan = patient(small_plan())
    part = replace(plan.replicas[0], id="chat/1", hours=(1,), load_s=600.0)
    plan = replace(plan, replicas=(replace(plan.replicas[0], usd_per_hour=6.0), replace(part, usd_per_hour=36.0)))
    rehearsal = rehearse(plan, duration_s=3 * 3600.0, policy="plan")
    by_hour = Counter((completion.replica, int(completion.arrival_s // 3600)) for completion in rehearsal.completions)
    assert by_hour["chat/1", 1] > 500
    assert (by_hour["chat/1", 0], by_hour["chat/1", 2]) == (0, 0)
    assert rehearsal.usd == pytest.approx(36.0 * (1 + 1 / 6) + 6.0 * rehearsal.duration_s / 3600)
    assert rehearsal.summaries[0].usd == rehearsal.usd


def test_prompts_are_read_here_and_answers_written_there() -> None:
    """Llama-3.1-8B keeps 128 KiB a token; a 4090 sends that through its PCIe port of 32 GB/s in 4.1 us."""
    plan = patient(small_plan())
    (replica,) = plan.replicas
    reader = replace(replica, id="chat/read", role="prefill", usd_per_hour=1.0)
    writer = replace(replica, id="chat/write", role="decode", tokens_per_s=1000.0, prefill_tokens_per_s=0.0)
    split = replace(plan, replicas=(reader, writer))
    happened = [rehearse(one, burst(1, prompt_tokens=1000), decisions=True) for one in (plan, split)]
    alone, passed = (one.completions[0] for one in happened)
    lines = [(one["rule"], one["place"], one["why"], one["done_ms"]) for one in said(happened[1])]
    read_ms = round(1000 / reader.prefill_tokens_per_s * 1000)
    assert lines == [
        ("slot free", "chat/read", "only replica", read_ms),
        ("takes over", "chat/write", "only replica", 0),
    ]
    assert passed.replica == "chat/write"
    later_s = 1000 * 131_072 / 32e9 + alone.tpot_s  # the decode replica passes the first token on, in a step
    assert passed.first_token_s - alone.first_token_s == pytest.approx(later_s, rel=0.02)
    assert passed.finish_s - alone.finish_s == pytest.approx(later_s, rel=0.02)
    assert passed.gpu_s == pytest.approx(alone.gpu_s)
    (total, part), whole = rehearse(split, burst(50)).summaries, rehearse(plan, burst(50)).summaries[0]
    assert total.completed == 50
    assert part.usd == pytest.approx(total.usd), "both replicas are paid by those who used them"
    assert total.tpot_s is not None
    assert whole.tpot_s is not None
    assert total.tpot_s.p99 < whole.tpot_s.p99, "nobody's answer waits for somebody's prompt"


def test_gpu_time_is_the_replica_s_time_on_all_its_gpus() -> None:
    one_gpu = rehearse(small_plan(), burst(1))
    (completion,) = one_gpu.completions
    added_s = replica_step_cost(small_plan().fleet, small_plan().replicas[0]).first_token_ps / 1e12
    assert completion.gpu_s == pytest.approx(completion.finish_s - completion.arrival_s - added_s)
    assert one_gpu.summaries[0].gpu_hours == pytest.approx(completion.gpu_s / 3600)


def test_a_request_beyond_the_context_is_refused_with_a_reason() -> None:
    rehearsal = rehearse(small_plan(), burst(1, prompt_tokens=4090, output_tokens=7))
    (completion,) = rehearsal.completions
    assert completion.status == "refused"
    assert completion.reason == "4097 tokens, of which no replica of the model holds more than 4096"
    assert (rehearsal.duration_s, rehearsal.usd) == (0.0, 0.0)


def test_what_can_be_read_and_not_written_is_too_long_and_what_nobody_serves_is_not_served() -> None:
    plan = small_plan()
    (one,) = plan.replicas
    reader = replace(one, id="chat/read", role="prefill")
    writer = replace(one, id="chat/write", role="decode", cache_tokens=2000, prefill_tokens_per_s=0.0)
    reasons = []
    for replicas in ((reader, writer), (reader,), ()):
        happened = rehearse(replace(plan, replicas=replicas), burst(1, prompt_tokens=2500), decisions=True)
        (completion,), (decision,) = happened.completions, said(happened)
        reasons.append((decision["rule"], completion.reason))
    assert reasons == [
        ("too long", "2520 tokens, of which no replica of the model holds more than 2000"),
        *[("not served", "no replica of the model that can hold it is in service")] * 2,
    ]


def test_more_replicas_finish_a_burst_sooner() -> None:
    plan = patient(small_plan())
    more = replace(plan, replicas=(*plan.replicas, replace(plan.replicas[0], id="chat/1")))
    assert rehearse(more, burst(50)).duration_s < rehearse(plan, burst(50)).duration_s


def test_a_lone_request_takes_what_the_plan_expects_of_an_idle_replica() -> None:
    (completion,) = rehearse(small_plan(), burst(1, prompt_tokens=1000, output_tokens=200)).completions
    # Llama-3.1-8B in bf16 on a 4090: 16 GB of weights at 1008 GB/s x 0.8 are 20 ms a token
    assert 0.018 < completion.tpot_s < 0.025
    assert 0.02 < completion.ttft_s < 0.4


def test_the_azure_trace_is_rehearsed_whole(shared_data: Path) -> None:
    path = shared_data / "traces" / "AzureLLMInferenceTrace_code.csv.gz"
    if not path.is_file():
        pytest.skip("the Azure code trace is not beside this checkout")
    trace = read_trace(path)
    plan = patient(small_plan())
    replica = replace(plan.replicas[0], max_context_tokens=16_384)
    plan = replace(plan, replicas=tuple(replace(replica, id=f"chat/{index}") for index in range(4)))
    total = rehearse(plan, trace).summaries[0]
    assert total.completed == 8819
    assert total.output_tokens == sum(request.output_tokens for request in trace.requests)


def test_a_plan_that_counts_on_cached_prompts_holds_its_slo_when_they_are_and_not_when_they_are_not() -> None:
    demand = Demand(tenant="public", model="chat", requests_per_s=60.0, prompt_tokens=2000, output_tokens=200)
    slo = Slo(ttft_s=1.0, tpot_s=0.03, fraction=0.99)

    def planned(prefix_hit: float, measured: tuple[Measured, ...] = ()) -> Plan:
        model = Model(
            name="chat", weights="meta-llama/Llama-3.1-8B", max_context_tokens=8192, slo=slo, measured=measured
        )
        fleet = Fleet(
            name="one",
            pools=(Pool(name="h100", gpu="h100-sxm-80g", nodes=1, gpus_per_node=8, usd_per_gpu_hour=2.2),),
            models=(model,),
            tenants=(Tenant(name="public"),),
            demand=(replace(demand, prefix_hit=prefix_hit),),
        )
        return make_plan(check_fleet(fleet, Path("one.toml")))

    def in_slo(plan: Plan, prefix_hit: float) -> float:
        (row,) = plan.fleet.demand
        asked = replace(plan, fleet=replace(plan.fleet, demand=(replace(row, prefix_hit=prefix_hit),)))
        total = rehearse(asked, duration_s=120, keep=False).summaries[0]
        return total.within_slo / total.requests

    plan = planned(0.4)
    assert len(plan.replicas) < len(planned(0.0).replicas)
    assert in_slo(plan, 0.4) >= 0.99
    assert in_slo(plan, 0.0) < 0.5

    # Rates that were measured count cached tokens as read: there it makes no difference.
    rates = Measured(gpu="h100-sxm-80g", gpus=1, prompt_tokens_per_s=40_000, output_tokens_per_s=4000)
    with_hits, without = (rehearse(planned(hit, (rates,)), duration_s=60).summaries for hit in (0.4, 0.0))
    assert with_hits[0].cached_fraction == pytest.approx(0.4, abs=0.001)
    assert [replace(one, cached_tokens=0, cached_fraction=0.0) for one in with_hits] == list(without)


def test_who_does_not_want_to_wait_gives_up_and_counts_neither_way(tmp_path: Path) -> None:
    rows = "".join(f"0.{number:03},2000,50,{'' if number % 2 else '0.5'}\n" for number in range(900))
    path = tmp_path / "crowd.csv"
    path.write_text(f"arrival_s,prompt_tokens,output_tokens,patience_s\n{rows}")
    slo = Slo(ttft_s=1000.0, tpot_s=10.0)
    plan = small_plan()
    plan = replace(plan, fleet=replace(plan.fleet, models=tuple(replace(one, slo=slo) for one in plan.fleet.models)))
    happened = rehearse(plan, open_trace(path), decisions=True)
    total = happened.summaries[0]
    gone = [one for one in happened.completions if one.status == "cancelled"]
    assert total.cancelled == total.gave_up == len(gone) > 0
    assert {one.reason for one in gone} == {"gave up"}
    assert {round(one.finish_s - one.arrival_s, 9) for one in gone} == {0.5}
    assert total.slo_fraction == total.within_slo / (total.requests - total.cancelled)
    assert not any(one.status == "cancelled" for one in happened.completions[1::2]), "the others wait"
    log = said(happened)
    assert [one["cost_ms"] for one in log if one["rule"] == "gave up"] == [500] * len(gone)
    waited = [one for one in log if one["rule"] == "waits for slot"]
    assert 0 < len(waited) == total.completed - sum(one["rule"] == "slot free" for one in log)
    assert {one["turn"] for one in waited} == {"below deserved"}, "the only tenant deserves all there is"
    counters_ms = [one["counter_ms"] for one in waited]
    assert counters_ms == sorted(counters_ms)
    assert {one["why"] for one in log if "place" in one} == {"only replica"}
    assert [one for one in log if "turn" in one] == waited


def test_who_leaves_in_the_middle_of_its_answer_is_cancelled_with_what_it_has_and_its_gpu_time(tmp_path: Path) -> None:
    path = tmp_path / "leavers.csv"
    path.write_text(
        "arrival_s,prompt_tokens,output_tokens,leaves_after_s\n0,1000,500,2\n20,1000,500,\n40,1000,500,900\n"
    )
    happened = rehearse(small_plan(), open_trace(path))
    gone, whole, late = happened.completions
    assert (gone.status, gone.reason, gone.replica) == ("cancelled", "the client went away", whole.replica)
    assert (whole.status, late.status) == ("ok", "ok"), "who would leave after the end has left nothing"
    assert 0 < gone.output_tokens < 500 == whole.output_tokens == late.output_tokens
    assert 2.0 <= gone.finish_s < 2.1, "it ends with the step under way"
    assert gone.output_tokens == pytest.approx((gone.finish_s - whole.ttft_s) / whole.tpot_s, rel=0.05)
    assert 0 < gone.gpu_s < whole.gpu_s / 2
    (total, *_) = happened.summaries
    assert (total.completed, total.cancelled, total.left_midway, total.requests) == (2, 1, 1, 3)
    assert total.output_tokens == 1000 + gone.output_tokens
    assert total.gpu_hours == pytest.approx(sum(one.gpu_s for one in happened.completions) / 3600)
    assert (total.within_slo, total.slo_fraction) == (2, 1.0)
    assert (happened.by_client, [one.cancelled for one in happened.by_tenant]) == ((), [1])


def said(happened: Rehearsal) -> list[dict[str, Any]]:
    """Return the log of decisions as it is written."""
    return [json.loads(line) for line in decision_lines(happened)]


def test_a_log_of_decisions_changes_none() -> None:
    plan = two_models()
    silent, told = (rehearse(plan, burst(60), decisions=decisions) for decisions in (False, True))
    assert str(told.completions) == str(silent.completions)  # as text, because no NaN is like another
    assert (len(silent.decisions), len(told.decisions), len(told.reasons)) == (0, 60, 60)
