"""Prefix caches: how much of prompts is found depends on who reads them, and how much room there is."""

import json
from pathlib import Path

import msgspec
import numpy as np
import pytest

from examples import small_plan
from waterline import rehearsal
from waterline.cost.step import StepCost
from waterline.rehearsal.capacity import Capacity, Terms
from waterline.rehearsal.station import Station
from waterline.workload import ragged
from waterline.workload.files import open_trace
from waterline.workload.mooncake import EndlessCache
from waterline.workload.ragged import Ragged
from waterline.workload.stream import BLOCK_TOKENS, Stream, measure


def a_replica(name: str, cache_tokens: int) -> Capacity:
    """Return one that reads with ease."""
    step = StepCost(
        tokens_ps=(0, 10**7), more_ps_per_token=10**7, head_ps=(0,), attention=(), step_tokens=2048, ranks=1
    )
    return Capacity(
        replica=name,
        gpus=1,
        step=step,
        max_batch=64,
        cache_tokens=cache_tokens,
        max_context_tokens=10**6,
        prefill_tokens_per_s=1e5,
        tokens_per_s=1e5,
    )


def found(
    arrival_ns: np.ndarray, prompts: np.ndarray, blocks: Ragged, *, replicas: int, cache_tokens: int, affinity: bool
) -> int:
    """Return how many tokens of prompts are found by replicas that read them with ease."""
    station = Station(Terms(ttft_s=(1e9,), output_tokens=(2,), affinity=affinity))
    station.start_all([a_replica(f"a/{number}", cache_tokens) for number in range(replicas)], 0)
    station.offer(
        arrival_ns * 1000, prompts, np.full(len(prompts), 2), blocks=blocks.values, block_counts=blocks.counts
    )
    station.finish()
    return int(station.collect().cached_tokens.sum())


def test_one_replica_that_forgets_nothing_finds_what_the_prompts_alone_say() -> None:
    dice = np.random.Generator(np.random.PCG64(5))
    stories = dice.integers(30, size=2000)
    lengths = dice.integers(1, 40 * BLOCK_TOKENS, 2000)
    told = [
        [1000 * story + block for block in range(-(-length // BLOCK_TOKENS))]
        for story, length in zip(stories.tolist(), lengths.tolist(), strict=True)
    ]
    endless = EndlessCache()
    alone = sum(endless.hit_tokens(length, keys) for length, keys in zip(lengths.tolist(), told, strict=True))
    arrival_ns, blocks = np.arange(2000) * 10**7, ragged.ragged(told)
    assert found(arrival_ns, lengths, blocks, replicas=1, cache_tokens=10**8, affinity=True) == alone
    with_little_room = found(arrival_ns, lengths, blocks, replicas=1, cache_tokens=100_000, affinity=True)
    assert 0 < with_little_room < alone / 2


@pytest.mark.parametrize("cache_tokens", [9_000, 40_000])
def test_what_has_been_forgotten_stays_so_when_more_replicas_come(cache_tokens: int) -> None:
    """Two replicas are ready when each part begins: all of them told of before the first part, or each before its own."""
    dice = np.random.Generator(np.random.PCG64(8))
    part_ps, count = 2 * 10**12, 200
    lengths = dice.integers(1, 12 * BLOCK_TOKENS, 3 * count)
    blocks = ragged.ragged(
        [
            [1000 * story + block for block in range(-(-length // BLOCK_TOKENS))]
            for story, length in zip(dice.integers(12, size=3 * count).tolist(), lengths.tolist(), strict=True)
        ]
    )
    seen = []
    for told_first in (6, 2):
        station, told = Station(Terms(ttft_s=(1e9,), output_tokens=(2,))), 0
        for part in range(3):
            while told < max(told_first, 2 * part + 2):
                station.start(a_replica(f"a/{told}", cache_tokens), told // 2 * part_ps)
                told += 1
            own = slice(count * part, count * (part + 1))
            arrival_ps = part * part_ps + np.arange(count) * part_ps // count
            some = blocks[own]
            station.offer(arrival_ps, lengths[own], np.full(count, 2), blocks=some.values, block_counts=some.counts)
        station.finish()
        seen.append(station.collect().cached_tokens.tolist())
    assert sum(seen[0]) > 0
    assert seen[0] == seen[1]


def published(shared_data: Path) -> Stream:
    path = shared_data / "traces" / "mooncake_synthetic_trace.jsonl.gz"
    if not path.is_file():
        pytest.skip(f"{path.name} is not beside this checkout")
    return open_trace(path)


def test_of_the_published_prompts_many_replicas_find_as_much_only_where_requests_go_where_they_were_read(
    shared_data: Path,
) -> None:
    stream = published(shared_data)
    alone, whole = measure(stream).cached_tokens, stream.whole()
    asked = whole.arrival_ns, whole.prompt_tokens.astype(np.int64), whole.blocks
    assert found(*asked, replicas=1, cache_tokens=10**8, affinity=True) == alone
    near, anywhere = (found(*asked, replicas=16, cache_tokens=10**7, affinity=affinity) for affinity in (True, False))
    assert 0.9 * alone < near <= alone
    assert anywhere < 0.5 * alone


def test_a_rehearsal_of_conversations_tells_how_much_was_cached_and_who_looks_where_it_was_read_finds_more(
    tmp_path: Path,
) -> None:
    dice = np.random.Generator(np.random.PCG64(6))
    rows, turns = [], dict.fromkeys(range(10), 1)
    for number in range(400):
        story = int(dice.integers(10))
        blocks = [100 * story + block for block in range(turns[story])]
        turns[story] = turns[story] % 7 + 1
        rows.append(
            {"timestamp": 5000 * number, "input_length": 512 * len(blocks), "output_length": 20, "hash_ids": blocks}
        )
    path = tmp_path / "talk.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    plan = small_plan()
    (replica,) = plan.replicas
    many = tuple(msgspec.structs.replace(replica, id=f"chat/{number}", cache_tokens=100_000) for number in range(4))
    plan = msgspec.structs.replace(plan, replicas=many)
    stream = open_trace(path)
    happened = rehearsal.rehearse(plan, stream, policy="plan")
    total, part = happened.summaries
    alone = measure(stream).cached_fraction
    assert part.cached_fraction == total.cached_fraction
    assert total.cached_tokens == sum(one.cached_tokens for one in happened.completions)
    assert total.refused == 0
    assert 0.8 * alone < total.cached_fraction <= alone
    assert f"{alone:.1%} of its prompts' tokens had been asked before; what a replica still has is not read" in (
        happened.notes
    )
