"""How the service is at a moment, against what was done to it."""

import asyncio
from typing import Any

import msgspec
from serving import QUESTION, fake_plan, served, until

from waterline.fleet import Demand, Tenant
from waterline.outcome import Completion
from waterline.plan import Plan
from waterline.service.recent import MOST, WINDOW_S, Recent
from waterline.snapshot import QueueNow, ReplicaNow, Snapshot
from waterline.workload import Slo


def ended(**changes: Any) -> Completion:
    fields = {
        "tenant": "public", "model": "chat", "replica": "chat/0", "status": "ok", "arrival_s": 0.0,
        "first_token_s": 0.5, "finish_s": 1.0, "prompt_tokens": 10, "output_tokens": 11, "gpu_s": 1.0,
    }  # fmt: skip
    return Completion(**{**fields, **changes})


def test_latencies_are_of_the_last_minute_and_of_what_went_well() -> None:
    recent = Recent({"chat": Slo(ttft_s=0.6, tpot_s=0.1)})
    recent.count(ended(finish_s=1.0))
    for number in range(10):
        recent.count(ended(arrival_s=100.0, first_token_s=100.1 + number / 10, finish_s=102.0 + number / 10))
    recent.count(ended(status="refused", arrival_s=103.0, first_token_s=float("nan"), finish_s=103.0, output_tokens=0))
    recent.count(ended(status="cancelled", arrival_s=100.0, first_token_s=109.0, finish_s=110.0))
    (latency,) = recent.latencies(110.0)
    assert (latency.requests, latency.ok, latency.within_slo) == (11, 10, 0), "TPOT is 0.19 s, beyond its SLO"
    assert latency.ttft_s
    assert latency.tpot_s
    assert (round(latency.ttft_s.p50, 6), round(latency.ttft_s.p99, 6)) == (0.5, 1.0)
    assert round(latency.tpot_s.p50, 6) == 0.19
    assert latency.window_s == WINDOW_S
    assert recent.latencies(1000.0) == ()


def test_under_a_high_rate_the_window_is_shorter_and_says_so() -> None:
    recent = Recent({"chat": Slo(ttft_s=0.6, tpot_s=0.1)})
    for number in range(MOST + 1000):
        recent.count(ended(finish_s=100.0 + number / 100))
    (latency,) = recent.latencies(130.0)
    assert latency.requests == MOST
    assert round(latency.window_s, 6) == 20.0


def shared_plan() -> Plan:
    plan = fake_plan({"chat": 1}, max_batch=1)
    tenants = (
        Tenant(name="public", guarantee=0.0, deserved=0.25),
        Tenant(name="research", guarantee=0.5, deserved=0.75),
    )
    demand = (Demand(tenant="public", model="chat", requests_per_s=0.5),)
    return msgspec.structs.replace(plan, fleet=msgspec.structs.replace(plan.fleet, tenants=tenants, demand=demand))


def test_gpus_are_whose_requests_used_them_and_the_rest_is_nobodys() -> None:
    async def case() -> None:
        async with served(shared_plan(), start=False) as service:
            before = service.gateway.snapshot()
            assert before.health == "not ready"
            assert [(use.tenant, use.kind, use.gpus) for use in before.uses] == [("", "idle", 1.0)]
            assert before.problems == ("No replica of 'chat' is ready.",)
            await service.supervisor.start()
            ready = service.gateway.snapshot()
            assert [(use.tenant, use.kind, use.gpus) for use in ready.uses] == [("public", "serving", 1.0)]
            assert (ready.health, ready.waterline, ready.problems) == ("ok", 1.0, ())
            now_s = service.gateway.now_s()
            for tenant, gpu_s in (("public", 1.0), ("research", 3.0)):
                service.gateway.metrics.count(ended(tenant=tenant, gpu_s=gpu_s, finish_s=now_s))
            used = service.gateway.snapshot()
            assert {use.tenant: use.gpus for use in used.uses} == {"public": 0.25, "research": 0.75}
            public, research = used.tenants
            assert (public.gpus, public.deserved_gpus, research.guarantee_gpus) == (0.25, 0.25, 0.5)
            assert used.waterline == 0.25

    asyncio.run(case())


def test_what_waits_and_runs_is_counted() -> None:
    async def case() -> None:
        async with served(fake_plan({"chat": 1}, max_batch=1, output_tokens=400)) as service:
            chat = service.openai.chat.completions
            asking = [
                asyncio.ensure_future(chat.create(model="chat", messages=QUESTION, max_tokens=400)) for _ in range(3)
            ]
            await until(lambda: service.gateway.snapshot().models[0].waiting == 2)
            now = service.gateway.snapshot()
            assert (now.models[0].running, now.models[0].slots, now.replicas[0].running) == (1, 1, 1)
            assert [(queue.model, queue.waiting) for queue in now.queues] == [("chat", 2)]
            assert (now.tenants[0].running, now.tenants[0].waiting) == (1, 2)
            assert now.replicas[0].backlog_tokens > 0
            for one in asking:
                one.cancel()
            await asyncio.gather(*asking, return_exceptions=True)
            service.gateway.cut()
            assert service.gateway.snapshot().health == "stopping"

    asyncio.run(case())


def test_the_public_view_names_no_client_and_keeps_the_replicas_that_need_attention() -> None:
    async def case() -> Snapshot:
        async with served(fake_plan(), start=False) as service:
            return service.gateway.snapshot()

    now = asyncio.run(case())
    replicas = [
        ReplicaNow(id=f"chat/{number}", model="chat", tenant="", pool="a", node=0, gpus=1, state="ready")
        for number in range(1000)
    ]
    replicas[999] = msgspec.structs.replace(replicas[999], state="suspect", reason="no answer")
    queues = tuple(
        QueueNow(model="chat", tenant="public", client=client, waiting=2, oldest_s=age_s)
        for client, age_s in (("alice", 3.0), ("bob", 1.0))
    )
    whole = msgspec.structs.replace(now, replicas=tuple(replicas), queues=queues)
    view = whole.public_view()
    assert view.queues == (QueueNow(model="chat", tenant="public", client="", waiting=4, oldest_s=3.0),)
    assert view.replicas[0].id == "chat/999"
    assert len(msgspec.json.encode(view)) < 60_000
    assert b"alice" not in msgspec.json.encode(view)
    assert msgspec.json.decode(msgspec.json.encode(whole), type=Snapshot) == whole


def test_who_misses_its_slo_is_named_with_the_numbers() -> None:
    async def case() -> None:
        async with served(fake_plan()) as service:
            now_s = service.gateway.now_s()
            for number in range(30):
                status = "refused" if number < 12 else "ok"
                service.gateway.metrics.count(
                    ended(
                        tenant="public", status=status, arrival_s=now_s, first_token_s=now_s + 0.1, finish_s=now_s + 0.2
                    )
                )
            (problem,) = service.gateway.snapshot().problems
            assert (
                problem
                == "60% of public's last 30 requests to 'chat' were within their SLO; 12 were refused or failed."
            )

    asyncio.run(case())
