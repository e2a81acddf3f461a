import random
from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from waterline.catalog.calibration import Calibration
from waterline.cost.estimate import closed_loop
from waterline.cost.serving import OpenPoint, Pieces, open_point, pieces, serving_point, sustained_requests_per_s
from waterline.cost.step import AttentionCost, StepCost, prefill_pairs
from waterline.rehearsal.capacity import Capacity, Terms, asks
from waterline.rehearsal.oracle import serve
from waterline.units import PICOSECONDS_PER_S
from waterline.workload import Request

# A step takes 1 ms and 10 us a token, reading the cache 1 ns a token, multiplying a pair 2 ns.
STEP = StepCost(
    tokens_ps=(0, 1_010_000_000),
    more_ps_per_token=10_000_000,
    head_ps=(0,),
    attention=(
        AttentionCost(
            window_tokens=0,
            decode_ps=(0,),
            decode_ps_per_token=(1_000,),
            prefill_ps=0,
            prefill_ps_per_token=0,
            prefill_ps_per_pair=2_000,
        ),
    ),
    step_tokens=100,
)
FOUND = Pieces(plain_s=0.010, delay_s=0.040, alone_s=0.050, lone_s=0.050, reading_s=0.060)


def test_the_pieces_of_a_batch_by_hand() -> None:
    found = pieces(STEP, batch=20, prompt_tokens=60, context_tokens=500)
    assert found.plain_s == pytest.approx(1e-3 + 20 * 10e-6 + 20 * 500 * 1e-9)
    assert found.alone_s == pytest.approx(1e-3 + 60 * 10e-6 + prefill_pairs(0, 60) * 2e-9)
    assert found.delay_s == pytest.approx(
        60 * 10e-6 + prefill_pairs(0, 60) * 2e-9
    )  # it rides along: no step of its own
    assert found.reading_s == pytest.approx(found.alone_s + 19 * 10e-6 + 19 * 500 * 1e-9)


def test_a_prompt_beyond_the_budget_is_read_in_chunks() -> None:
    # 20 decodes leave 80 of 100 tokens: 200 prompt tokens are three steps
    found = pieces(STEP, batch=20, prompt_tokens=200, context_tokens=0)
    assert found.alone_s == pytest.approx(3 * 1e-3 + 200 * 10e-6 + prefill_pairs(0, 200) * 2e-9)


def test_what_is_in_the_cache_is_attended_to_but_not_read() -> None:
    found = pieces(STEP, batch=1, prompt_tokens=60, context_tokens=0, cached_tokens=50)
    assert found.alone_s == pytest.approx(1e-3 + 10 * 10e-6 + prefill_pairs(50, 10) * 2e-9)
    whole = pieces(STEP, batch=1, prompt_tokens=60, context_tokens=0, cached_tokens=60)
    last = pieces(STEP, batch=1, prompt_tokens=60, context_tokens=0, cached_tokens=59)
    assert whole == last, "the last token is always read: its logits are the first token"


def test_a_batch_that_never_empties_by_hand() -> None:
    point = serving_point(STEP, 20, 60, 10, 500)
    found = pieces(STEP, 20, 60, 500)
    assert point.tpot_s == pytest.approx(found.plain_s + 2 * found.delay_s)  # 20 / 10 prompts are read in each step
    assert point.requests_per_s == pytest.approx(20 / (10 * point.tpot_s))
    assert point.ttft_s == pytest.approx(point.tpot_s / 2 + found.reading_s)


def test_requests_that_are_all_alike_have_half_their_answer_behind_them() -> None:
    assert serving_point(STEP, 5, 60, 40) == serving_point(STEP, 5, 60, 40, 80)


def test_a_closed_loop_by_hand() -> None:
    # 4 requests of 100 tokens: 0.04 prompts a step, 40 ms each, beside a step of 10 ms
    ttft_s, tpot_s = closed_loop(FOUND, Calibration(), 4, 100, 4)
    assert tpot_s == pytest.approx(0.010 + 0.04 * 0.040)
    assert ttft_s == pytest.approx(0.050)
    calibrated = Calibration(request_s=0.02, reading=2.0, steps=3.0, together=0.5)
    ttft_s, same_tpot_s = closed_loop(FOUND, calibrated, 4, 100, 4)
    assert same_tpot_s == tpot_s
    assert ttft_s == pytest.approx(0.02 + 2 * 0.050 + 3 * tpot_s + 0.5 * 4 / 2 * 0.050)


def test_who_finds_no_place_waits_for_those_who_have_one() -> None:
    served_s, tpot_s = closed_loop(FOUND, Calibration(), 4, 100, 4)
    waiting_s, same_tpot_s = closed_loop(FOUND, Calibration(), 4, 100, 12)
    assert same_tpot_s == tpot_s
    assert waiting_s == pytest.approx(served_s + 2 * (served_s + 99 * tpot_s))  # two others are served before each


@given(st.integers(1, 99), st.integers(1, 2000), st.integers(1, 2000), st.integers(1, 2000))
def test_more_at_once_never_lowers_what_a_replica_yields(batch: int, prompt: int, output: int, more: int) -> None:
    few = serving_point(STEP, batch, prompt, output)
    many = serving_point(STEP, min(99, batch + more), prompt, output)
    assert many.tpot_s >= few.tpot_s
    assert many.requests_per_s >= few.requests_per_s * (1 - 0.05)  # chunks get smaller as decodes take the budget


def test_a_lone_prompt_of_one_rank_takes_its_own_attention_and_its_share_of_all_the_others_work() -> None:
    ranks = replace(STEP, ranks=4, step_tokens=400)
    found = pieces(ranks, 4, 40, 0)
    assert found.lone_s == pytest.approx(1e-3 + 40 / 4 * 10e-6 + 4 * prefill_pairs(0, 40) * 2e-9)
    assert pieces(STEP, 4, 40, 0).lone_s == pieces(STEP, 4, 40, 0).alone_s


@given(st.integers(1, 99), st.integers(1, 2000), st.integers(0, 2000), st.integers(0, 2000))
def test_more_in_the_cache_is_never_slower(batch: int, prompt: int, cached: int, more: int) -> None:
    cold = pieces(STEP, batch, prompt, 100, cached)
    warm = pieces(STEP, batch, prompt, 100, cached + more)
    assert (warm.delay_s, warm.alone_s, warm.reading_s) <= (cold.delay_s, cold.alone_s, cold.reading_s)
    assert warm.plain_s == cold.plain_s


@given(st.integers(1, 300), st.integers(1, 500))
def test_ranks_that_read_a_prompt_each_take_as_long_as_one(batch: int, prompt: int) -> None:
    ranks = replace(STEP, ranks=4, step_tokens=400)
    assert pieces(ranks, 4, prompt, 0).alone_s <= pieces(STEP, 1, 4 * prompt, 0).alone_s
    assert pieces(ranks, batch, prompt, 10).plain_s <= pieces(STEP, batch, prompt, 10).plain_s


# --- at a rate ------------------------------------------------------------------------------------------------------


def at_rate(requests_per_s: float, prompt: int, output: int, most: int = 60, slower: float = 1.0) -> OpenPoint | None:
    def price(batch: int) -> Pieces:
        return pieces(STEP, batch, prompt, prompt + output // 2)

    return open_point(price, most, output, requests_per_s, slower)


def sustained(prompt: int, output: int, most: int = 60) -> float:
    return sustained_requests_per_s(lambda batch: pieces(STEP, batch, prompt, prompt + output // 2), most, output)[0]


def stepped(requests_per_s: float, prompt: int, output: int, most: int = 60) -> tuple[float, float]:
    """Return mean TTFT and TPOT of the step-by-step rehearsal for requests that come independently."""
    generator, now_s, requests = random.Random(1), 0.0, []
    for _ in range(2500):
        now_s += generator.expovariate(requests_per_s)
        requests.append(Request(arrival_s=now_s, prompt_tokens=prompt, output_tokens=output))
    capacity = Capacity(
        replica="r", gpus=1, step=STEP, max_batch=most, cache_tokens=10**9, max_context_tokens=10**6,
        prefill_tokens_per_s=1e9, tokens_per_s=1e9,
    )  # fmt: skip
    done = serve([capacity], asks(requests), Terms(ttft_s=(1e9,), output_tokens=(output,)))
    settled = done[len(done) // 10 :]
    first = sum(one.first_token_ps - one.ask.arrival_ps for one in settled)
    rest = sum(one.finish_ps - one.first_token_ps for one in settled) / (output - 1)
    return first / len(settled) / PICOSECONDS_PER_S, rest / len(settled) / PICOSECONDS_PER_S


@pytest.mark.parametrize(("prompt", "output"), [(60, 40), (200, 20), (20, 100)])
@pytest.mark.parametrize("share", [0.2, 0.5, 0.8])
def test_a_rate_is_served_as_the_rehearsal_steps_through_it(prompt: int, output: int, share: float) -> None:
    rate = share * sustained(prompt, output)
    point = at_rate(rate, prompt, output)
    assert point is not None
    ttft_s, tpot_s = stepped(rate, prompt, output)
    assert point.lone_s + point.others_s + point.wait_s == pytest.approx(ttft_s, rel=0.15)
    assert point.tpot_s == pytest.approx(tpot_s, rel=0.25 if prompt > 100 else 0.05)  # read in chunks: too slow


@pytest.mark.parametrize(("prompt", "output"), [(60, 40), (200, 20), (20, 100)])
def test_beyond_the_sustained_rate_the_rehearsal_falls_behind_too(prompt: int, output: int) -> None:
    most = sustained(prompt, output)
    assert at_rate(1.001 * most, prompt, output) is None
    assert at_rate(0.999 * most, prompt, output) is not None
    below_s, above_s = (stepped(share * most, prompt, output)[0] for share in (0.7, 1.3))
    assert above_s > 5 * below_s


@given(st.floats(0.01, 0.97), st.floats(1.01, 1.5), st.integers(1, 500), st.integers(1, 500))
def test_more_requests_a_second_are_never_served_sooner(share: float, times: float, prompt: int, output: int) -> None:
    most = sustained(prompt, output)
    few, many = at_rate(share * most, prompt, output), at_rate(min(0.98, share * times) * most, prompt, output)
    assert few is not None
    assert many is not None
    assert many.tpot_s >= 0.99 * few.tpot_s  # decodes leave prompts less of a step, which makes chunks a little smaller
    assert many.batch >= few.batch


@given(st.floats(0.01, 0.7), st.floats(1.0, 1.4), st.integers(1, 500), st.integers(1, 500))
def test_a_slower_clock_makes_everything_longer(share: float, slower: float, prompt: int, output: int) -> None:
    rate = share * sustained(prompt, output)
    plain, slow = at_rate(rate, prompt, output), at_rate(rate, prompt, output, slower=slower)
    assert plain is not None
    assert slow is not None
    assert slow.tpot_s >= slower * plain.tpot_s * (1 - 1e-9)
    assert slow.lone_s >= slower * plain.lone_s * (1 - 1e-9)
