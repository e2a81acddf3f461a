"""Write `docs/explanation/the-article.md`: what a news post says about GPUs, held against what Waterline computes.

    python tools/make_article.py

Every number on the page is an answer of the program, and so is every verdict: the words follow from comparisons.
Run it whenever the cost model or the catalogue has changed, and read the difference before you commit it.
"""

import textwrap
from collections.abc import Sequence
from dataclasses import replace
from functools import cache
from pathlib import Path

import msgspec

from waterline import catalog
from waterline.catalog.calibration import calibration_of
from waterline.catalog.currencies import find_currency
from waterline.catalog.engines import EngineProfile, find_engine
from waterline.catalog.export_rules import density, export_rules, io_gb_per_s, why_controlled
from waterline.catalog.servers import hosting, server_price
from waterline.cost import (
    Between,
    Estimate,
    MemoryUse,
    StepCost,
    estimate_replica,
    longest_context,
    memory_use,
    most_sequences,
    step_cost,
    weights_bytes,
)
from waterline.cost.kernels import find_kernels
from waterline.cost.step import prefill_pairs
from waterline.fleet import load_fleet
from waterline.hardware import Gpu
from waterline.llm import PRECISIONS, Llm
from waterline.llm.gguf_sizes import file_bytes
from waterline.plan import Layout
from waterline.planner import make_plan
from waterline.planner.buying import Advice, Purchase, buy
from waterline.planner.fits import fits
from waterline.planner.market import Wish
from waterline.planner.tenders import CONTEXT_TOKENS as CONTEXT
from waterline.planner.tenders import for_budget, of_servers
from waterline.units import GIGA, KIB, MIB, gib_text, parameters_text, seconds_text, usd_text

ROOT = Path(__file__).parents[1]
PAGE = ROOT / "docs" / "explanation" / "the-article.md"

PROMPT_TOKENS, OUTPUT_TOKENS = 1000, 200  # of the requests whose times are shown
USUAL_TOKENS, LONG_TOKENS = 8192, 32_768  # contexts that concurrency is given at; the second is what we call long
NODE = 8  # cards
FELT = 1.05  # a step slower by less than this is lost in what a version of the software changes

HOLDS, PARTLY, NOT = "**It holds.**", "**It holds in part.**", "**It does not hold.**"


@cache
def model(name: str) -> Llm:
    return catalog.find_model(name)


@cache
def card(name: str) -> Gpu:
    return catalog.find_gpu(name)


class Setting:
    """A model on some cards in a precision, and what the program says of it."""

    def __init__(self, llm: Llm, gpu: Gpu, precision: str, layout: Layout | None = None, engine: str = "vllm") -> None:
        self.llm, self.gpu, self.precision, self.layout = llm, gpu, precision, layout or Layout()
        self.engine: EngineProfile = find_engine(engine).on(gpu)
        self.memory: MemoryUse = memory_use(llm, gpu, self.layout, precision, self.engine)

    @property
    def cards(self) -> str:
        return f"{self.layout.gpus} × {self.gpu.id}"

    @property
    def context_tokens(self) -> int:
        """The longest context one request may have; 0 when the model does not fit."""
        return longest_context(self.llm, self.layout, self.memory)

    def at_once(self, context_tokens: int) -> int:
        held = most_sequences(self.llm, self.layout, self.memory, min(context_tokens, self.llm.max_context_tokens))
        return min(held, self.engine.max_batch * self.layout.dp)

    def estimate(self, concurrency: int = 1) -> Estimate | None:
        """What so many clients see; None where the cache does not hold a request of the usual lengths."""
        if self.context_tokens < PROMPT_TOKENS + OUTPUT_TOKENS:
            return None
        return estimate_replica(
            self.llm, self.gpu, self.layout, self.precision, self.engine, steps_of(self),
            prompt_tokens=PROMPT_TOKENS, output_tokens=OUTPUT_TOKENS, concurrency=concurrency,
        )  # fmt: skip


def steps_of(setting: Setting) -> StepCost:
    return step_cost(setting.llm, setting.gpu, setting.layout, setting.precision, setting.engine)


def page() -> str:
    """Return the whole page."""
    parts = (
        HEAD, small_model(), middle_model(), large_model(), bits(), weaker_link(), iceberg(), vendors(),
        tender(), rules(), mix(), worth(), not_here(),
    )  # fmt: skip
    return "\n\n".join(parts) + "\n"


HEAD = """\
# The article, checked

<!-- Written by tools/make_article.py; do not edit. -->

Waterline began with a news post of 14 May 2025 that asks how many GPUs DeepSeek uses. This page takes what it says
about which cards run which model, and puts beside each claim what `waterline` computes from its catalogue. Ask for any
of it yourself: `waterline fit deepseek-r1 --gpu a100-sxm-80g`, `waterline model llama-2-7b`."""


# --- The sections ---------------------------------------------------------------------------------------------------


def small_model() -> str:
    llm = model("deepseek-r1-distill-qwen-1.5b")
    found = [Setting(llm, card(name), "bf16") for name in ("rtx-3090", "rtx-4090")]
    shortest = min(setting.context_tokens for setting in found)
    verdict = HOLDS if shortest >= USUAL_TOKENS else PARTLY if shortest else NOT
    return section(
        "1.5B on one RTX 3090 or 4090",
        "The 1.5B model runs on a single RTX 3090 or RTX 4090.",
        f"{verdict} {llm.name} has {parameters_text(llm.parameters)} parameters, embedding included. "
        f"{reach(found, 'either card')}",
        serving_table(found),
    )


def middle_model() -> str:
    llm, a100, gaming = model("deepseek-r1-distill-qwen-32b"), card("a100-sxm-80g"), card("rtx-4090")
    claimed = [Setting(llm, a100, "bf16"), Setting(llm, gaming, "bf16", Layout(tp=4))]
    fewer = [Setting(llm, a100, "int8"), Setting(llm, gaming, "fp8", Layout(tp=2))]
    short = [setting for setting in claimed if setting.context_tokens < LONG_TOKENS]
    verdict = HOLDS if not short else PARTLY if all(setting.context_tokens for setting in claimed) else NOT
    falls = "falls" if len(short) == 1 else "fall"
    long_text = f"{both([setting.cards for setting in short])} {falls} short of" if short else "Both reach"
    better = [setting for setting in fewer if setting.context_tokens > claimed[0].context_tokens]
    return section(
        "32B on one A100 or four RTX 4090, for long text",
        "The 32B model runs on one A100 or on four RTX 4090, and suits long text.",
        f"{verdict} The post does not say which A100: in bf16 the weights alone are "
        f"{gib_text(weights_bytes(llm, 'bf16'))}, so it must be the one of 80 GB. {long_text} {LONG_TOKENS:,} tokens "
        f"in bf16; the model itself reads {llm.max_context_tokens:,}."
        + (f" For more context take 8 bits: {options(better)}." if better else ""),
        serving_table([*claimed, *fewer]),
    )


def options(settings: Sequence[Setting]) -> str:
    return both([f"{one.precision} on {one.cards} reads {one.context_tokens:,} tokens" for one in settings])


def large_model() -> str:
    llm, a100 = model("deepseek-r1"), card("a100-sxm-80g")
    layout = Layout(tp=8, pp=2)
    found = [Setting(llm, a100, precision, layout) for precision in ("bf16", "int8", "int4")]
    sixteen, eight = found[0], found[1]
    sold_gb, offered_gb = layout.gpus * 80, layout.gpus * a100.memory_bytes / GIGA
    usable_gb = layout.gpus * sixteen.memory.usable_bytes / GIGA
    verdict = PARTLY if eight.context_tokens and not sixteen.context_tokens else HOLDS if eight.context_tokens else NOT
    return section(
        "671B on two servers of eight A100",
        "The full 671B model runs on two 8-card A100 servers, 1200 GB in all.",
        f"{verdict} Sixteen cards of 80 GB are {sold_gb:,} GB as sold and {offered_gb:,.0f} as the driver counts, "
        f"of which vLLM takes {usable_gb:,.0f} by default. In bf16 the weights are "
        f"{weights_bytes(llm, 'bf16') / GIGA:,.0f} GB: {room(sixteen)}. "
        f"An A100 has no units for FP8, so the published checkpoint is converted to INT8, "
        f"{weights_bytes(llm, 'int8') / GIGA:,.0f} GB: {room(eight)}. "
        f"{fewest_cards(llm, a100, ('bf16', 'int8', 'int4'))}",
        serving_table(found),
        busy_table(eight),
        "The layout is tensor parallel inside each server and a pipeline of the two, so that only one hidden state a "
        f"token ({llm.hidden * 2 / KIB:.0f} KiB) crosses the network.",
    )


def room(setting: Setting) -> str:
    """Say whether it fits, and by how much on the card that holds most."""
    memory = setting.memory
    if setting.context_tokens:
        return f"it fits, with {gib_text(memory.cache_bytes)} a card left for the cache"
    return (
        f"it does not fit, each card would need {gib_text(memory.needed_bytes)} and offers "
        f"{gib_text(memory.usable_bytes)}"
    )


def fewest_cards(llm: Llm, gpu: Gpu, precisions: Sequence[str]) -> str:
    """Say the smallest numbers of cards that `waterline fit` finds."""
    said = []
    for precision in precisions:
        (found,) = fits(llm, [gpu], (precision,), "vllm", USUAL_TOKENS, 1)
        said.append(f"{found.gpus} in {precision}" if found.runs else f"none it knows of in {precision}")
    return f"The fewest that run it with {USUAL_TOKENS:,} tokens of context: {both(said)}."


def bits() -> str:
    llm = model("llama-2-7b")
    small, large = card("rtx-4060ti-8g"), card("rtx-4060ti-16g")
    eight_gb, four_gb = file_bytes(llm, "q8_0") / GIGA, file_bytes(llm, "q4_k_m") / GIGA
    sixteen_gb = weights_bytes(llm, "fp16") / GIGA
    near = "4-bit" if abs(four_gb - 4.2) < abs(eight_gb - 4.2) else "8-bit"
    small_eight = Setting(llm, small, "q8_0", engine="llamacpp")
    large_eight = Setting(llm, large, "q8_0", engine="llamacpp")
    verdict = HOLDS if near == "8-bit" else PARTLY if large_eight.context_tokens else NOT
    rows = []
    for precision, engine in (
        ("fp16", "llamacpp"), ("q8_0", "llamacpp"), ("q4_k_m", "llamacpp"),
        ("fp16", "vllm"), ("int8", "vllm"), ("int4", "vllm"),
    ):  # fmt: skip
        size = file_bytes(llm, precision) if PRECISIONS[precision].gguf else weights_bytes(llm, precision)
        on = [Setting(llm, gpu, precision, engine=engine) for gpu in (small, large)]
        shown = "llama.cpp" if engine == "llamacpp" else "vLLM"
        rows.append((
            precision, shown, f"{size / GIGA:.2f} GB", *(context_text(one) for one in on),
            *(speed_text(one.estimate()) for one in on),
        ))  # fmt: skip
    columns = ("format", "engine", "weights", "context, 8 GB", "context, 16 GB", "TPOT, 8 GB", "TPOT, 16 GB")
    return section(
        "7B at 16, 8 and 4 bits, on an RTX 4060 Ti",
        "8-bit quantisation takes a 7B model from 13 GB to 4.2 GB, so an RTX 4060 Ti runs it.",
        f"{verdict} {sixteen_gb:.1f} GB at 16 bits is {llm.name}, of {parameters_text(llm.parameters)} parameters. "
        f"At 8 bits it is {eight_gb:.1f} GB, at 4 bits {four_gb:.1f} GB: 4.2 GB is the size of {near} weights. "
        f"With 8 bits (q8_0) the card of 16 GB leaves {tokens_left(large_eight)} and the one of 8 GB "
        f"{tokens_left(small_eight)}, of the {llm.max_context_tokens:,} the model reads.",
        table(columns, rows),
        "vLLM keeps more for itself (graphs, workspace, a tenth of the card) than llama.cpp, which is why the same "
        "weights leave less context. Models since then share key-value heads among queries and keep a fraction of this "
        "one's cache.",
    )


def tokens_left(setting: Setting) -> str:
    return f"{setting.context_tokens:,} tokens" if setting.context_tokens else "no room for a context"


WORKLOADS = (  # one prefill and several decodes; batches are over all cards
    ("decode", 1), ("decode", 16), ("decode", 64), ("decode", 256), ("decode", 1024), ("prefill", 8192),
)  # fmt: skip
CONTEXT_TOKENS = 4096


def weaker_link() -> str:
    sold, (whole, cut) = card("h800-sxm-80g"), links()
    settings = (
        ("all-reduce", "meta-llama/Meta-Llama-3.1-70B", Layout(tp=8)),
        ("all-reduce", "deepseek-ai/DeepSeek-V3", Layout(tp=8, pp=2)),
        ("experts", "Qwen/Qwen3-235B-A22B", Layout(dp=8, ep=8)),
    )
    slowdowns = {
        (exchanged, name, str(layout)): [slower(name, layout, *work) for work in WORKLOADS]
        for exchanged, name, layout in settings
    }
    rows = [
        (name, layout, exchanged, *(percent_text(ratio) for ratio in ratios))
        for (exchanged, name, layout), ratios in slowdowns.items()
    ]
    decode_worst = max(max(ratios[:-1]) for ratios in slowdowns.values())
    prefill_worst = max(ratios[-1] for ratios in slowdowns.values())
    worst = max(decode_worst, prefill_worst)
    same = whole.flops_per_s == sold.flops_per_s and whole.memory_bytes_per_s == sold.memory_bytes_per_s
    columns = ("model, FP8", "layout", "exchange", *(f"{kind} {size:,}" for kind, size in WORKLOADS))
    return section(
        "H800 against H100: where the link matters",
        "Multi-card parallelism makes up for the weaker H800.",
        f"{HOLDS if worst < FELT else PARTLY} The H800 {'computes' if same else 'does not compute'} like the H100, but "
        f"its NVLink carries {cut.link.bytes_per_s / GIGA:.0f} GB/s each way instead of "
        f"{whole.link.bytes_per_s / GIGA:.0f}. {onset(slowdowns)} At worst a decode step takes "
        f"{percent_text(decode_worst)} longer and a prefill step {percent_text(prefill_worst)}: "
        f"{'the layout hardly matters' if worst < FELT else 'layouts that exchange less are worth searching for'}.",
        "How much longer one step takes when an H100 is given the link of an H800, so that nothing but the link "
        f"differs; batches are over all cards, with {CONTEXT_TOKENS:,} tokens of context, and the prefill is of "
        f"{WORKLOADS[-1][1]:,} tokens:",
        table(columns, rows, text_columns=3),
        "One exchange between eight cards, by what each of them holds:",
        exchange_table(whole, cut),
        "DeepSeek's own deployment spreads experts over several servers. There the network between servers decides, "
        "which is no different for the H800. The figures above are for exchange within a server.",
    )


@cache
def links() -> tuple[Gpu, Gpu]:
    """Return the H100, and the same card with the H800's link: their curves differ in nothing else."""
    whole = card("h100-sxm-80g")
    return whole, replace(whole, link=card("h800-sxm-80g").link)


def slower(name: str, layout: Layout, kind: str, size: int) -> float:
    """Return the time of a step with the cut link over that with the whole one."""
    decode, prefill = (0, 0, size, size * CONTEXT_TOKENS), (size, prefill_pairs(0, size), 0, 0)
    whole_ps, cut_ps = (step.step_ps(*(decode if kind == "decode" else prefill)) for step in priced(name, layout))
    return cut_ps / whole_ps


@cache
def priced(name: str, layout: Layout) -> tuple[StepCost, ...]:
    return tuple(steps_of(Setting(model(name), gpu, "fp8", layout)) for gpu in links())


def onset(slowdowns: dict[tuple[str, str, str], list[float]]) -> str:
    """Say, for each exchange, the smallest batch of a decode at which the slower link is felt."""
    said = []
    batches = [size for kind, size in WORKLOADS if kind == "decode"]
    for (exchanged, name, _), ratios in slowdowns.items():
        felt = [size for size, ratio in zip(batches, ratios, strict=False) if ratio >= FELT]
        where = f"from a batch of {felt[0]:,} on" if felt else "at no batch shown"
        said.append(f"{name.split('/')[-1]} ({exchanged}) {where}")
    return f"A decode step is slower by {(FELT - 1) * 100:.0f} % or more: {'; '.join(said)}."


def exchange_table(whole: Gpu, cut: Gpu) -> str:
    rows = []
    for kind, label in (("all_reduce", "all-reduce"), ("all_to_all", "all-to-all")):
        for size in (16 * KIB, MIB, 16 * MIB, 128 * MIB):
            fast, slow = (float(find_kernels(gpu).collective_s(kind, size, 8)) for gpu in (whole, cut))
            message = f"{size // MIB} MiB" if size >= MIB else f"{size // KIB} KiB"
            rows.append((label, message, seconds_text(fast), seconds_text(slow), percent_text(slow / fast)))
    return table(("exchange", "message", "H100", "H800", "longer by"), rows, text_columns=1)


def iceberg() -> str:
    """Plan the day DeepSeek published, with the throughput they gave and with our own."""
    fleet = load_fleet(ROOT / "examples" / "deepseek-day.toml")
    given = make_plan(fleet)
    own = make_plan(msgspec.structs.replace(fleet, models=(msgspec.structs.replace(fleet.models[0], measured=()),)))
    nodes = {plan: [hour.gpus / NODE for hour in plan.hours] for plan in (given, own)}
    free = 1 - min(nodes[given]) / max(nodes[given])
    verdict = PARTLY if free > 0.5 else NOT
    rows = [
        (name, theirs, *(of(plan) for plan in (given, own)))
        for name, theirs, of in (
            ("nodes, mean of the day", "226.75", lambda plan: f"{sum(nodes[plan]) / 24:.1f}"),
            ("nodes, most", "278", lambda plan: f"{max(nodes[plan]):.0f}"),
            ("nodes, least", "68", lambda plan: f"{min(nodes[plan]):.0f}"),
            ("USD a day, at 2 a GPU-hour", "87,072", lambda plan: f"{sum(hour.usd for hour in plan.hours):,.0f}"),
        )
    ]
    return section(
        "The iceberg, by day and by night",
        "Of 60,000 cards most are kept for research and enterprise, and a small part serves the public.",
        f"{verdict} How many cards there are, nobody has said. What DeepSeek published of its service is one day of "
        "February 2025: by day all of its nodes served, at night most went to research and training. A plan of that "
        f"day (`examples/deepseek-day.toml`) frees {free:.0%} of the nodes in the hour that asks least. With the "
        "throughput of a node that they measured, and with that of our own cost model, which was fitted on none of "
        "it, a plan takes:",
        table(("", "DeepSeek", "their throughput", "our cost model"), rows, text_columns=1),
        "Our hours are sized for what is asked in them, at the hours of their chart of income; their nodes went up "
        "before the morning's load and stayed at 278 all day.",
    )


def vendors() -> str:
    """Say on which stacks the mixed example runs at its busiest hour."""
    plan = make_plan(load_fleet(ROOT / "examples" / "mixed.toml"))
    cards = {pool.name: card(pool.gpu) for pool in plan.fleet.pools}
    gpus: dict[tuple[str, str], int] = {}
    for replica in plan.replicas_at(plan.busiest_hour):
        where = (replica.model, replica.pool)
        gpus[where] = gpus.get(where, 0) + replica.layout.gpus
    stacks = {cards[pool].stack for _, pool in gpus}
    rows = [(name, cards[pool].id, cards[pool].vendor, cards[pool].stack, str(gpus[name, pool])) for name, pool in gpus]
    return section(
        "NVIDIA and AMD in one fleet",
        "The fleet may take NVIDIA's cards with CUDA or AMD's with ROCm.",
        f"{HOLDS if len(stacks) > 1 else NOT} One plan of `examples/mixed.toml` puts each model where it is cheapest, "
        f"on {both(sorted(stacks))}; a replica never spans two vendors. `waterline launch` prints the command and "
        "the variables of each engine on its own stack.",
        table(("model", "card", "vendor", "stack", "cards at the busiest hour"), rows, text_columns=4),
    )


def tender() -> str:
    priced, yuan = server_price("a100-sxm-80g"), find_currency("CNY")
    h800 = server_price("h800-sxm-80g")
    assert priced is not None
    assert h800 is not None
    two = of_servers(priced, 2, every_model=True)
    back = for_budget(priced, two.low_usd, two.high_usd, every_model=False)
    verdict = HOLDS if back.servers == two.servers else PARTLY
    served = [one for one in two.runs if one.model in TENDERED]
    rows = [
        (one.model, one.precision, str(one.layout), str(one.gpus), str(one.replicas), f"{one.at_once:,}")
        for one in served
    ]
    columns = ("model", "precision", "layout", "GPUs", "replicas", f"at once, {CONTEXT:,} tokens")
    return section(
        "What a server costs, and what a budget buys",
        "An 8-card A100 server costs 2.6 to 3.2 M CNY, so the size of the tender follows from the budget.",
        f"{verdict} At {yuan.per_usd:g} CNY a dollar ({yuan.date}) that is {usd_text(priced.low_usd)} to "
        f"{usd_text(priced.high_usd)}, which fits an H800 server too ({usd_text(h800.low_usd)} to "
        f"{usd_text(h800.high_usd)}, recalled). Two of them are {two.gpus} cards for {yuan.text(two.low_usd)} to "
        f"{yuan.text(two.high_usd)}. Back from that range it is {back.servers} servers at the middle price, and "
        f"{back.fewest} to {back.most} at the ends of both.",
        f"{two.gpus} A100 run, at the precision of most bits that fits:",
        table(columns, rows, text_columns=3),
    )


TENDERED = (
    "deepseek-ai/DeepSeek-R1", "meta-llama/Meta-Llama-3.1-405B", "meta-llama/Meta-Llama-3.1-70B",
    "deepseek-ai/DeepSeek-R1-Distill-Qwen-1.5B",
)  # fmt: skip


def rules() -> str:
    names = (
        "a100-sxm-80g",
        "a800-sxm-80g",
        "h100-sxm-80g",
        "h800-sxm-80g",
        "h20-96g",
        "rtx-4090",
        "rtx-4090d",
        "mi300x",
    )
    known = export_rules()
    rows = []
    for gpu in map(card, names):
        dense = density(gpu)
        verdicts = ["covered" if why_controlled(gpu, rule) else "outside" for rule in known.values()]
        rows.append(
            (gpu.id, f"{gpu.tpp or 0:,.0f}", f"{dense:.2f}" if dense else "?", f"{io_gb_per_s(gpu):,.0f}", *verdicts)
        )
    first, second = known["2022-10"], known["2023-10"]
    h800 = card("h800-sxm-80g")
    outside, covered = not why_controlled(h800, first), why_controlled(h800, second)
    columns = ("card", "TPP", "density", "links, GB/s both ways", *known)
    return section(
        "Export rules are dated facts",
        "NVIDIA says DeepSeek keeps to the export rules.",
        f"{PARTLY} Figures can say which cards a rule covers, and when. The H800 that V3 and R1 were trained on is "
        f"{'outside' if outside else 'under'} the rule of {first.effective}, because its links are slower, and "
        f"{'under' if covered else 'outside'} that of {second.effective} ({covered}). Who bought what, when and "
        "where to, no catalogue knows. This is a reading of published figures, never legal advice.",
        table(columns, rows, text_columns=1),
    )


CARDS = {"nvidia": ("h20-141g", "h200-sxm-141g", "b200-sxm-180g"), "amd": ("mi300x", "mi355x")}
EITHER = (*CARDS["nvidia"], *CARDS["amd"])


def mix() -> str:
    """Buy for the example of a tender from each vendor alone and from both, and say what the mix costs and guards."""
    alone = {vendor: bought(cards, 1.0) for vendor, cards in CARDS.items()}
    both_vendors = bought(EITHER, 0.6)
    cheapest = min(alone.values(), key=lambda advice: advice.best.lifetime_usd)
    dearer = both_vendors.best.lifetime_usd / cheapest.best.lifetime_usd
    single = min(swing(advice) for advice in alone.values())
    verdict = HOLDS if swing(both_vendors) < single else NOT
    rows = [
        (name, told(advice.best), usd_text(advice.best.usd), usd_text(advice.best.lifetime_usd),
         percent_text(swing(advice)), f"{arrives(advice):.0%}")
        for name, advice in (*((f"{vendor} alone", one) for vendor, one in alone.items()), ("both", both_vendors))
    ]  # fmt: skip
    columns = ("cards of", "servers", "price", "over 4 years", "dearer at worst", "served without its larger vendor")
    costs = f"{percent_text(dearer)} more" if dearer >= 1 else f"{(1 - dearer) * 100:.0f} % less"
    return section(
        "A mix of vendors, and what it costs",
        "Staying free to use either vendor's cards guards against price swings and supply risk.",
        f"{verdict} For the demand of `examples/tender.toml`, and five data-centre cards to choose from, a purchase "
        f"that gives at most 60 % of the money to one vendor costs {costs} over its lifetime than the cheaper vendor "
        f"alone. When one vendor raises its prices by 30 %, its bill grows by {percent_text(swing(both_vendors))} at "
        f"worst, instead of {percent_text(single)}. When the vendor with most of the order does not "
        f"deliver, what arrives and what is owned serve {arrives(both_vendors):.0%} of the requests at "
        "their hardest hours.",
        table(columns, rows, text_columns=2),
        "Prices are of dated offers and some are recalled; `waterline buy` names each with its source.",
    )


@cache
def bought(cards: tuple[str, ...], share: float) -> Advice:
    wish = Wish(gpus=cards, max_vendor_share=share, scenarios=("nvidia +30 %", "amd +30 %"))
    return buy(load_fleet(ROOT / "examples" / "tender.toml"), wish, hosting())


def swing(advice: Advice) -> float:
    """Return what the same servers cost in the worse of the scenarios, over their price."""
    return max(one.same_usd for one in advice.scenarios) / advice.best.usd


def arrives(advice: Advice) -> float:
    """Return the fraction served, with what is owned, when the vendor that gets most money delivers nothing."""
    best = advice.best
    largest = max(best.vendor_shares, key=lambda vendor: best.vendor_shares[vendor])
    left = {one.gpu: (one.servers, one.gpus_per_server) for one in best.bought if one.vendor != largest}
    wish = Wish(tender=left) if left else Wish(gpus=("mi300x",), budget_usd=1.0)  # which buys nothing
    return buy(load_fleet(ROOT / "examples" / "tender.toml"), wish, hosting()).best.served_fraction


def told(purchase: Purchase) -> str:
    return both([f"{one.servers} × {one.gpu}" for one in purchase.bought])


OTHERS = (  # of the post, that other parts of Waterline answer or will
    ("what training V3 and R1 took, in GPU-hours and money", "planning a training run"),
    ("25,000 A100 for GPT-4 against that", "the same"),
    ("test-time scaling makes it efficient", "effort: thinking budgets that follow the load"),
    ("layouts searched around the H800's link, for training", "planning a training run; serving is above"),
    ("the Spring Festival's peak is survived", "lending, and `waterline rehearse`"),
    ("writing 8-bit and 4-bit checkpoints", "`waterline quantize`; the sizes are above"),
)


def not_here() -> str:
    rows = [(claim, where) for claim, where in OTHERS]
    return f"## Not answered here\n\n{table(('the post says or asks', 'where it belongs'), rows)}"


def worth() -> str:
    """Say what the figures are worth, from the spread of the engine's own calibration."""
    lines = []
    for provenance, told in (
        ("measured", "kernels, and the engine with this model, were measured on this very card"),
        ("interpolated", "the kernels were measured on this card, the engine on others or with other models"),
        ("transferred", "the curves are those of another card, scaled to this one's peaks"),
        ("physics", "nothing near was measured; the interval is wide on purpose, and no more than a guess"),
    ):
        spread = calibration_of("vllm").spread_of(provenance)
        lines.append((provenance, told, ratios_text(spread.ttft), ratios_text(spread.tpot)))
    columns = ("times are", "because", "TTFT in runs, of ours", "TPOT in runs, of ours")
    counted = (
        "Sizes of weights and caches are counted. What an engine keeps for itself was read off start-up logs and "
        "changes with its version, so a fit with less than a GiB to spare is a maybe."
    )
    timed = (
        f"Times are for a prompt of {PROMPT_TOKENS:,} tokens and {OUTPUT_TOKENS} back, sent again and again by one "
        "client where nothing else is said. The interval beside each is meant to hold four of five measurements; how "
        "wide it is depends on how near the measurements were (here for vLLM):"
    )
    moved = (
        "Software alone moves a figure by a tenth or more from one version to the next. Use the times to choose what "
        "to try, then measure."
    )
    parts = (counted, timed, table(columns, lines), moved)
    return "\n\n".join(("## What the figures are worth", *map(wrapped, parts)))


def ratios_text(ratios: tuple[float, float]) -> str:
    return f"{ratios[0]:.2f} to {ratios[1]:.2f}"


# --- Words and tables -----------------------------------------------------------------------------------------------


def section(title: str, claim: str, *paragraphs: str) -> str:
    return "\n\n".join((f"## {title}", f"> {claim}", *map(wrapped, paragraphs)))


def wrapped(paragraph: str) -> str:
    """Break prose at the width of our files; tables stay as they are."""
    if "\n" in paragraph:
        return paragraph
    return textwrap.fill(paragraph, 120, break_long_words=False, break_on_hyphens=False)


def reach(settings: Sequence[Setting], which: str) -> str:
    """Say how long a context all of the settings hold."""
    shortest = min(setting.context_tokens for setting in settings)
    most = settings[0].llm.max_context_tokens
    if not shortest:
        return f"Not {which} holds it."
    return (
        f"Its whole context of {most:,} tokens fits on {which}, next to the weights."
        if shortest == most
        else f"On {which} at least {shortest:,} of its {most:,} tokens of context fit."
    )


def serving_table(settings: Sequence[Setting]) -> str:
    rows = []
    for one in settings:
        found = one.estimate()
        rows.append((
            one.cards, one.precision, str(one.layout),
            gib_text(one.memory.weights_bytes),
            gib_text(one.memory.cache_bytes) if one.context_tokens else "none",
            context_text(one), str(one.at_once(USUAL_TOKENS)),
            interval_text(found.ttft_s) if found else "-",
            interval_text(found.tpot_s) if found else "-",
            found.provenance if found else "-",
        ))  # fmt: skip
    columns = (
        "cards", "precision", "layout", "weights a card", "cache a card", "longest context",
        f"at once, {USUAL_TOKENS:,} tokens", "TTFT", "TPOT", "times are",
    )  # fmt: skip
    return table(columns, rows, text_columns=3)


def busy_table(setting: Setting) -> str:
    """Show a setting by the number of clients, as far as the cache holds them."""
    rows = []
    most = setting.at_once(PROMPT_TOKENS + OUTPUT_TOKENS)
    for clients in (count for count in (1, 8, 32, 128) if count <= most):
        found = setting.estimate(clients)
        assert found is not None  # the cache holds that many requests, so it holds one
        rate = rate_text(found.tokens_per_s_per_gpu, setting.layout.gpus)
        rows.append((str(clients), interval_text(found.ttft_s), interval_text(found.tpot_s), rate))
    lengths = ", ".join(f"{setting.at_once(tokens)} of {tokens:,} tokens" for tokens in (USUAL_TOKENS, LONG_TOKENS))
    title = f"In {setting.precision} the cache holds this many requests at once: {lengths}. By number of clients:"
    return f"{title}\n\n" + table(("clients", "TTFT", "TPOT", "tokens/s, all cards"), rows, text_columns=0)


def context_text(setting: Setting) -> str:
    return f"{setting.context_tokens:,}" if setting.context_tokens else "does not fit"


def speed_text(found: Estimate | None) -> str:
    return interval_text(found.tpot_s) if found else "-"


def interval_text(between: Between) -> str:
    return f"{seconds_text(between.value)} ({seconds_text(between.low)} to {seconds_text(between.high)})"


def rate_text(between: Between, gpus: int) -> str:
    value, low, high = (rounded(each * gpus) for each in (between.value, between.low, between.high))
    return f"{value:,} ({low:,} to {high:,})"


def rounded(value: float) -> int:
    """Keep two digits, which is all that an estimate is worth."""
    return int(float(f"{value:.2g}"))


def percent_text(ratio: float) -> str:
    return f"{(ratio - 1) * 100:.0f} %"


def both(parts: Sequence[str]) -> str:
    return " and ".join((", ".join(parts[:-1]), parts[-1])) if len(parts) > 1 else "".join(parts)


def table(columns: Sequence[str], rows: Sequence[Sequence[str]], *, text_columns: int = 2) -> str:
    """Return a Markdown table; the columns after the first `text_columns` are right-aligned."""
    rule = [" --- " if index < text_columns else " ---: " for index in range(len(columns))]
    lines = [columns, *rows]
    drawn = ["| " + " | ".join(line) + " |" for line in lines]
    return "\n".join([drawn[0], "|" + "|".join(rule) + "|", *drawn[1:]])


if __name__ == "__main__":
    PAGE.parent.mkdir(exist_ok=True)
    PAGE.write_text(page())
