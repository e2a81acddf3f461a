"""A service on loopback for the length of a block, plans for it, and engines that fail as they are told."""

import asyncio
from collections.abc import AsyncIterator, Awaitable, Callable, Mapping
from contextlib import asynccontextmanager, suppress
from dataclasses import dataclass
from pathlib import Path

from aiohttp import web
from openai import AsyncOpenAI

import waterline
from waterline.fleet import Demand, Fleet, Model, Pool, Tenant, load_fleet
from waterline.ledger import Ledger
from waterline.outcome import Completion
from waterline.plan import Layout, ModelPlan, Place, Plan, Replica, TenantPlan
from waterline.planner import make_plan
from waterline.service.engines import Engine, prepare_engines
from waterline.service.gateway import Gateway
from waterline.service.jobs import Jobs
from waterline.service.keeper import Keeper
from waterline.service.nodes import Nodes
from waterline.service.operator import Operator
from waterline.service.server import listen, running
from waterline.service.shore import Prepare, Shore
from waterline.service.state import State
from waterline.service.supervisor import Supervisor
from waterline.workload import Slo

LAPTOP = Path(waterline.__file__).parent / "cli" / "laptop.toml"
QUESTION = [{"role": "user", "content": "What is 347 * 586?"}]


def laptop_plan() -> Plan:
    """Return the plan of `waterline up`: llama.cpp with the model in the package."""
    return make_plan(load_fleet(LAPTOP))


def fake_plan(
    models: dict[str, int] | None = None,
    *,
    engine: str = "fake",
    urls: tuple[str, ...] = (),
    max_batch: int = 4,
    output_tokens: int = 10,
    tokens_per_s: float = 1000.0,
    ttft_s: float = 60.0,
) -> Plan:
    """Return a plan of so many replicas a model; a token of the fake takes about 1.6 ms."""
    models = models or {"chat": 1}
    urls = urls or ("",) * len(models)
    return Plan(
        fleet=Fleet(
            name="fakes",
            pools=(Pool(name="box", gpu="cpu", nodes=1, gpus_per_node=1, usd_per_gpu_hour=0.0),),
            models=tuple(
                Model(
                    name=name,
                    weights="waterline/abacus",
                    precisions=("q8_0",),
                    max_context_tokens=512,
                    slo=Slo(ttft_s=ttft_s, tpot_s=0.05),
                    engine=engine,
                    url=url,
                )
                for name, url in zip(models, urls, strict=True)
            ),
            tenants=(Tenant(name="enterprise", deserved=1.0, anonymous=True),),
            demand=tuple(Demand(tenant="enterprise", model=name, requests_per_s=0.5) for name in models),
        ),
        models=tuple(
            ModelPlan(
                model=name,
                requests_per_s=0.5,
                prompt_tokens=10,
                output_tokens=output_tokens,
                replicas=replicas,
                gpus=replicas,
                usd_per_hour=0.0,
                usd_per_million_tokens=0.0,
                limited_by="engine",
                reason="a test",
            )
            for name, replicas in models.items()
        ),
        tenants=(TenantPlan(tenant="enterprise", gpus=1.0, guarantee_gpus=0, deserved_gpus=1.0, limit_gpus=1.0),),
        replicas=tuple(
            Replica(
                id=f"{name}/{number}",
                model=name,
                pool="box",
                places=(Place(node=0, gpus=(0,)),),
                precision="q8_0",
                layout=Layout(),
                engine=engine,
                max_context_tokens=512,
                max_batch=max_batch,
                cache_tokens=512 * max_batch,
                requests_per_s=10.0,
                prefill_tokens_per_s=tokens_per_s,
                tokens_per_s=tokens_per_s,
                ttft_s=0.01,
                tpot_s=0.002,
                usd_per_hour=0.0,
            )
            for name, replicas in models.items()
            for number in range(replicas)
        ),
    )


@dataclass(frozen=True, kw_only=True)
class Served:
    """What a test can look at."""

    url: str  # of the gateway, without /v1
    openai: AsyncOpenAI
    supervisor: Supervisor
    gateway: Gateway
    shore: Shore
    operator: Operator
    keeper: Keeper
    jobs: Jobs
    state: State
    completions: list[Completion]


@asynccontextmanager
async def served(
    plan: Plan,
    *,
    start: bool = True,
    engines: Mapping[str, Engine] | None = None,
    ledger: Ledger | None = None,
    prepare: Prepare = prepare_engines,
    nodes: Nodes | None = None,
) -> AsyncIterator[Served]:
    """Serve a plan on a free port, with its engines started unless a test does that itself."""
    listening = listen("127.0.0.1", 0)
    url = f"http://127.0.0.1:{listening.getsockname()[1]}"
    completions: list[Completion] = []
    async with (
        running(
            plan, engines or prepare(plan), listening, completions.append, prepare, ledger=ledger, nodes=nodes
        ) as service,
        AsyncOpenAI(base_url=f"{url}/v1", api_key="none", max_retries=0) as openai,
    ):
        if start:
            await service.supervisor.start()
        yield Served(
            url=url,
            openai=openai,
            supervisor=service.supervisor,
            gateway=service.gateway,
            shore=service.shore,
            operator=service.operator,
            keeper=service.keeper,
            jobs=service.jobs,
            state=service.state,
            completions=completions,
        )


async def until(condition: Callable[[], bool], within_s: float = 60.0) -> None:
    """Wait for something to become true."""
    async with asyncio.timeout(within_s):
        while not condition():  # noqa: ASYNC110 - whatever it is about, it sets no event for us
            await asyncio.sleep(0.01)


Answer = Callable[[web.Request], Awaitable[web.StreamResponse]]


@asynccontextmanager
async def engine_that(
    answer: Answer, model: str = "chat", *, responses: Answer | None = None, owner: str = "nobody"
) -> AsyncIterator[str]:
    """Yield the URL of an OpenAI-compatible engine that answers completions, and may be responses, as the test says."""

    async def models(_request: web.Request) -> web.Response:
        return web.json_response({"object": "list", "data": [{"id": model, "object": "model", "owned_by": owner}]})

    app = web.Application()
    app.router.add_get("/v1/models", models)
    app.router.add_post("/v1/chat/completions", answer)
    app.router.add_post("/v1/completions", answer)
    app.router.add_post("/v1/embeddings", answer)
    if responses:
        app.router.add_post("/v1/responses", responses)
    runner = web.AppRunner(app, shutdown_timeout=0.1)
    await runner.setup()
    site = web.TCPSite(runner, "127.0.0.1", 0)
    await site.start()
    try:
        yield f"http://127.0.0.1:{runner.addresses[0][1]}/v1"
    finally:
        with suppress(TimeoutError):
            await runner.cleanup()
