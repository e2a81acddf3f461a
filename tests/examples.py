"""A card and two models with round numbers, so that every figure of a test can be worked out by hand."""

from waterline.catalog.engines import EngineProfile
from waterline.fleet import Demand, Fleet, Model, Pool, Tenant
from waterline.hardware import Gpu, Link
from waterline.llm import AttentionLayers, FeedForwardLayers, Llm
from waterline.plan import Layout, ModelPlan, Place, Plan, Replica, TenantPlan
from waterline.units import GIB
from waterline.workload import Slo

CARD = Gpu(
    id="card",
    name="Card",
    vendor="nvidia",
    architecture="round",
    stack="cuda",
    support="full",
    memory_bytes=10 * GIB,
    memory_bytes_per_s=1e12,
    flops_per_s={"fp32": 1e13, "fp16": 1e14, "bf16": 1e14, "fp8": 2e14},
    tdp_watts=300,
    link=Link(kind="nvlink", topology="nvswitch", bytes_per_s=1e11, pair_bytes_per_s=1e11),
    pcie_bytes_per_s=3.2e10,
    gpus_per_node=8,
    release_year=2024,
    source="made up",
    read="2026-11-23",
)

ENGINE = EngineProfile(
    name="ideal",
    usable_memory_fraction=0.9,
    memory_overhead_bytes=GIB,
    max_batch=64,
    step_tokens=512,
    load_bytes_per_s=1e9,
    start_s=10,
    source="made up",
    read="2026-11-23",
)

# 10 layers of 1000 wide; 8 query heads and 2 KV heads of 100; an odd parameter count that is simply stated.
DENSE = Llm(
    name="dense",
    architecture="llama",
    parameters=1_000_000_000,
    active_parameters=1_000_000_000,
    hidden=1000,
    vocabulary=10_000,
    max_context_tokens=4096,
    precision="bf16",
    attention=(AttentionLayers(kind="full", layers=10, query_heads=8, kv_heads=2, head_dim=100),),
    feed_forward=(FeedForwardLayers(layers=10, intermediate=4000),),
)

# The same with 8 experts of 2 a token in every layer: 10 x 8 x 3 x 1000 x 4000 = 960 M in experts, 40 M elsewhere.
SPARSE = Llm(
    name="sparse",
    architecture="mixtral",
    parameters=1_000_000_000,
    active_parameters=280_000_000,
    hidden=1000,
    vocabulary=10_000,
    max_context_tokens=4096,
    precision="bf16",
    attention=DENSE.attention,
    feed_forward=(FeedForwardLayers(layers=10, intermediate=4000, experts=8, experts_per_token=2),),
)


def small_plan() -> Plan:
    """Return a plan of one replica on one card, as the planner would write it."""
    slo = Slo(ttft_s=1.0, tpot_s=0.05)
    return Plan(
        fleet=Fleet(
            name="small",
            pools=(Pool(name="box", gpu="rtx-4090", nodes=1, gpus_per_node=1, usd_per_gpu_hour=0.4),),
            models=(
                Model(
                    name="chat",
                    weights="meta-llama/Llama-3.1-8B",
                    precisions=("bf16",),
                    max_context_tokens=4096,
                    slo=slo,
                    engine="fake",
                ),
            ),
            tenants=(Tenant(name="public", deserved=1.0, anonymous=True),),
            demand=(Demand(tenant="public", model="chat", requests_per_s=0.5),),
        ),
        models=(
            ModelPlan(
                model="chat",
                requests_per_s=0.5,
                prompt_tokens=1000,
                output_tokens=200,
                replicas=1,
                gpus=1,
                usd_per_hour=0.4,
                usd_per_million_tokens=0.185,
                limited_by="memory",
                reason="the only layout that does",
            ),
        ),
        tenants=(TenantPlan(tenant="public", gpus=1.0, guarantee_gpus=0.0, deserved_gpus=1.0, limit_gpus=1.0),),
        replicas=(
            Replica(
                id="chat/0",
                model="chat",
                pool="box",
                places=(Place(node=0, gpus=(0,)),),
                precision="bf16",
                layout=Layout(),
                engine="fake",
                max_context_tokens=4096,
                max_batch=8,
                cache_tokens=30_000,
                requests_per_s=1.5,
                prefill_tokens_per_s=9000.0,
                tokens_per_s=1800.0,
                ttft_s=0.3,
                tpot_s=0.03,
                usd_per_hour=0.4,
            ),
        ),
    )
