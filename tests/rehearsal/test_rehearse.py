"""A plan and traffic in, completions and a bill out."""

import math
from pathlib import Path

import msgspec
import pytest
from msgspec.structs import replace

from examples import small_plan
from waterline.fleet import Demand, Model, Tenant
from waterline.plan import Plan
from waterline.rehearsal import rehearse
from waterline.workload import Request, Slo, Trace, read_trace


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
    first, again = (msgspec.json.encode(rehearse(two_models(), seed=5)) for _ in range(2))
    assert first == again
    assert first != msgspec.json.encode(rehearse(two_models(), seed=6))


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


def test_the_bill_is_all_replicas_from_the_first_arrival_to_the_last_finish() -> None:
    plan = replace(small_plan(), replicas=tuple(replace(one, usd_per_hour=36.0) for one in small_plan().replicas))
    rehearsal = rehearse(plan, burst(3))
    finish_s = max(completion.finish_s for completion in rehearsal.completions)
    assert rehearsal.completions[0].arrival_s == 5.0
    assert rehearsal.duration_s == pytest.approx(finish_s - 5.0)
    assert rehearsal.usd == pytest.approx(rehearsal.duration_s / 100)
    assert rehearsal.summaries[0].usd == rehearsal.usd
    assert rehearsal.summaries[0].goodput_per_s == pytest.approx(3 / rehearsal.duration_s)


def test_gpu_time_is_the_replica_s_time_on_all_its_gpus() -> None:
    one_gpu = rehearse(small_plan(), burst(1))
    (completion,) = one_gpu.completions
    assert completion.gpu_s == pytest.approx(completion.finish_s - completion.arrival_s)
    assert one_gpu.summaries[0].gpu_hours == pytest.approx(one_gpu.duration_s / 3600)


def test_a_request_beyond_the_context_is_refused_with_a_reason() -> None:
    rehearsal = rehearse(small_plan(), burst(1, prompt_tokens=4090, output_tokens=7))
    (completion,) = rehearsal.completions
    assert completion.status == "refused"
    assert completion.reason == "4097 tokens, of which no replica of the model holds more than 4096"
    assert (rehearsal.duration_s, rehearsal.usd) == (0.0, 0.0)


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
