"""Traffic scaled, surged, moved, spliced, shortened and named; however it is cut into chunks."""

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from waterline.errors import TraceError
from waterline.workload import operators, ragged
from waterline.workload.grammar import duration_s, parse_surge, parse_traffic
from waterline.workload.stream import Chunk, Names, Stream, chunk_of, cut, measure

S = 10**9
HOUR = 3600 * S


def stream_of(
    arrivals_ns: list[int], *, tenants: str = "", clients: str = "", size: int = 3, clock_s: int = 0
) -> Stream:
    """Make a stream, `size` requests a chunk; tenants and clients have names of one letter, a letter a request."""
    count = len(arrivals_ns)
    names, users = Names(sorted(set(tenants))), Names(sorted(set(clients)))
    whole = chunk_of(
        np.array(arrivals_ns, np.int64),
        np.arange(10, 10 + count, dtype=np.int32),
        np.full(count, 5, np.int32),
        tenant=names.indices(list(tenants)) if tenants else None,
        client=users.indices(list(clients)) if clients else None,
        line=np.arange(2, 2 + count),
        leaves_ns=np.arange(1, 1 + count) * S,
        blocks=ragged.ragged([[1, 2 + number % 2] for number in range(count)]),
    )
    return Stream(name="mine.csv", read=lambda: cut(whole, size), tenants=names, clients=users, clock_ns=clock_s * S)


def arrivals(stream: Stream) -> list[int]:
    return stream.whole().arrival_ns.tolist()


def tenants(stream: Stream) -> list[str]:
    return [stream.tenants[index] for index in stream.whole().tenant.tolist()]


def same(one: Chunk, other: Chunk) -> bool:
    columns = [(getattr(one, name), getattr(other, name)) for name in Chunk.__slots__ if name != "blocks"]
    columns += [(one.blocks.values, other.blocks.values), (one.blocks.ends, other.blocks.ends)]
    return all(np.array_equal(own, others) for own, others in columns)


times = st.lists(st.integers(0, 10**6), min_size=1, max_size=60).map(sorted)


# --- Rate --------------------------------------------------------------------------------------------------------------


@given(times, st.integers(1, 10), st.integers(1, 9))
def test_at_any_time_there_have_been_so_many_times_as_many_requests(own: list[int], factor: int, size: int) -> None:
    more = arrivals(operators.scale(stream_of(own, size=size), factor))
    assert more == sorted(more)
    assert len(more) == factor * len(own)
    for number, arrival in enumerate(own):  # the first copies come in time, and all others before the next request
        assert sum(one <= arrival for one in more) >= factor * number + 1
        assert sum(one < arrival for one in more) <= factor * sum(one < arrival for one in own)


@given(times, st.floats(0.1, 5.0), st.integers(1, 9), st.integers(0, 99), st.text("ab", min_size=60, max_size=60))
def test_the_size_of_the_chunks_changes_nothing(
    own: list[int], factor: float, size: int, seed: int, names: str
) -> None:
    names = "a" + names[: len(own) - 1]
    text = f"surge a:3x@00:00+1s, x{factor:.3f}, tenant by tenant a=c *=d, tenant c=0.5 d=0.5, repeat 2, shift -100s"
    small, large = (
        parse_traffic(text).apply(stream_of(own, tenants=names, size=part), seed=seed).whole() for part in (size, 1000)
    )
    assert same(small, large)


def test_half_the_rate_keeps_each_request_with_that_chance() -> None:
    own = stream_of(list(range(0, 20_000 * S, S)), size=1000)
    half = arrivals(operators.scale(own, 0.5, seed=4))
    assert len(half) == pytest.approx(10_000, abs=4 * 71)  # 4 standard deviations
    assert set(half) <= set(range(0, 20_000 * S, S))
    assert half != arrivals(operators.scale(own, 0.5, seed=5))


def test_bursts_stay_bursts_when_the_rate_is_scaled() -> None:
    bursts = [minute * 60 * S + at for minute in range(100) for at in range(0, S, S // 20)]  # 20 in a second, then none
    more = np.array(arrivals(operators.scale(stream_of(bursts, size=100), 5)))
    in_burst = more % (60 * S) < 1 * S
    # 19 of 20 gaps are inside the burst; copies of its last request fall into the quiet that follows
    assert in_burst.mean() == pytest.approx((19 * 5 + 1 + 4 / 59) / 100, abs=0.01)


def test_a_surge_multiplies_a_window_of_every_day() -> None:
    own = stream_of([hour * HOUR for hour in range(48)], size=7, clock_s=18 * 3600)  # from 18:00 on
    got = arrivals(operators.surge(own, parse_surge("10x@20:00+2h")))
    hours = np.bincount(np.array(got) // HOUR)
    assert hours.tolist() == [1, 1, 10, 10, *[1] * 22, 10, 10, *[1] * 20]


def test_a_surge_may_pass_midnight_and_may_take_away() -> None:
    surge = parse_surge("x0.001@23:00+2h")
    assert surge.factors(np.array([22, 23, 24, 25, 46, 47]) * HOUR).tolist() == [1, 0.001, 0.001, 1, 1, 0.001]


def test_a_surge_of_one_tenant_leaves_the_others_alone() -> None:
    own = stream_of([at * S for at in range(600)], tenants="pe" * 300, size=50)
    got = operators.surge(own, parse_surge("p:4x@00:01+1m"))
    names, at_s = np.array(tenants(got)), np.array(arrivals(got)) // S
    assert (names == "e").sum() == 300
    assert (names == "p").sum() == 300 + 3 * 30
    surging = (names == "p") & (at_s >= 60) & (at_s < 122)
    assert surging.sum() == 30 * 4 + 1
    assert arrivals(got) == sorted(arrivals(got))


def test_a_surge_of_nobody_is_an_error() -> None:
    own = replace(stream_of([1, 2], tenants="ab"), tenants=Names(["public", "enterprise"]))
    surging = operators.surge(own, parse_surge("publik:10x@20:00+2h"))
    with pytest.raises(TraceError, match="no request is of the tenant 'publik' that surges. Did you mean 'public'"):
        measure(surging)


# --- Time --------------------------------------------------------------------------------------------------------------


def test_traffic_is_moved_and_what_would_come_before_the_start_is_left_out() -> None:
    own = stream_of([0, 10 * S, 20 * S])
    assert arrivals(operators.shift(own, 5 * S)) == [5 * S, 15 * S, 25 * S]
    assert arrivals(operators.shift(own, -10 * S)) == [0, 10 * S]


def test_a_repeated_trace_keeps_its_rate_or_the_day_it_is_given() -> None:
    own = stream_of([0, 10 * S, 20 * S])
    assert arrivals(operators.repeat(own, 3)) == [at * 10 * S for at in range(9)]
    assert arrivals(operators.repeat(own, 2, every_ns=HOUR)) == [0, 10 * S, 20 * S, HOUR, HOUR + 10 * S, HOUR + 20 * S]
    with pytest.raises(TraceError, match=r"mine.csv goes on for 20 s, longer than the 15 s after which"):
        arrivals(operators.repeat(own, 2, every_ns=15 * S))


def test_one_trace_follows_another_with_its_names() -> None:
    first = stream_of([0, 10 * S], tenants="ab")
    second = stream_of([0, 1 * S, 2 * S], tenants="bcb")
    joined = operators.splice(first, second)
    assert arrivals(joined) == [0, 10 * S, 20 * S, 21 * S, 22 * S]
    assert tenants(joined) == ["a", "b", "b", "c", "b"]
    assert arrivals(operators.splice(first, second, at_ns=5 * S)) == [0, 5 * S, 6 * S, 7 * S]
    assert joined.name == "mine.csv then mine.csv"


# --- Lengths -----------------------------------------------------------------------------------------------------------


def test_copies_repeats_and_other_traces_are_other_people_whose_prompts_begin_alike_among_each_other() -> None:
    def firsts(stream: Stream) -> list[int]:
        whole = stream.whole()
        assert (whole.blocks.counts == 2).all()
        return whole.blocks.values[::2].tolist()

    one = stream_of([0, 10 * S, 20 * S])
    for other in (operators.repeat(one, 2), operators.splice(one, one), operators.scale(one, 2.0)):
        assert sorted(map(firsts(other).count, set(firsts(other)))) == [3, 3], "three of either"
    thrice = operators.splice(operators.splice(one, one), one)
    assert len(set(firsts(thrice))) == 3
    assert len(set(firsts(operators.scale(operators.repeat(one, 2), 2.0)))) == 4


def test_what_is_too_long_is_cut_or_dropped() -> None:
    own = stream_of([0, 1, 2, 3])  # 10 + 5, 11 + 5, 12 + 5, 13 + 5 tokens
    whole = operators.cut(own, 13).whole()
    assert whole.prompt_tokens.tolist() == [10, 11, 12, 12]
    assert whole.output_tokens.tolist() == [3, 2, 1, 1]
    assert operators.drop(own, 16).whole().prompt_tokens.tolist() == [10, 11]


# --- Who ---------------------------------------------------------------------------------------------------------------


def test_tenants_are_named_by_share_by_client_and_by_value() -> None:
    own = stream_of(list(range(10_000)), clients="abcdefghij" * 1000, size=512)
    by_share = tenants(parse_traffic("tenant public=0.7 enterprise=0.3").apply(own))
    assert by_share.count("public") == pytest.approx(7000, abs=4 * 46)
    by_client = tenants(parse_traffic("tenant by client public=0.5 enterprise=0.5").apply(own))
    of_client = [set(by_client[index::10]) for index in range(10)]
    assert all(len(one) == 1 for one in of_client)  # a client is of one tenant
    assert len(set.union(*of_client)) == 2
    by_value = tenants(parse_traffic("tenant by client a=acme b=acme *=public").apply(own))
    assert by_value[:4] == ["acme", "acme", "public", "public"]
    assert set(tenants(parse_traffic("tenant public").apply(own))) == {"public"}


def test_clients_are_dealt_in_the_shares_that_are_asked_for() -> None:
    clients = [f"client {number}" for number in range(4000)]
    own = replace(stream_of(list(range(4000)), clients="a" * 4000), clients=Names(clients))
    index = np.arange(4000, dtype=np.int32)
    spread = replace(own, read=lambda: iter([replace(own.whole(), client=index)]))
    got = tenants(parse_traffic("tenant by client public=0.25 research=0.75").apply(spread))
    assert got.count("public") == pytest.approx(1000, abs=4 * 27.4)


def test_a_model_is_named_by_the_tenant() -> None:
    own = stream_of([0, 1, 2], tenants="rpr")
    got = parse_traffic("model by tenant r=r1 *=small").apply(own)
    assert [got.models[index] for index in got.whole().model.tolist()] == ["r1", "small", "r1"]


def test_who_is_not_listed_or_not_named_is_an_error() -> None:
    with pytest.raises(TraceError, match=r"mine.csv, line 3: the client 'b' is not listed. Write b=…, or \*=…"):
        measure(parse_traffic("tenant by client a=x").apply(stream_of([0, 1], clients="ab")))
    with pytest.raises(
        TraceError, match="line 2: no client is named. Give the column that does with --columns client="
    ):
        measure(parse_traffic("tenant by client a=0.5 b=0.5").apply(stream_of([0, 1])))


# --- Grammar -----------------------------------------------------------------------------------------------------------


def test_by_a_column_that_a_request_does_not_have_nobody_is_named() -> None:
    stream = operators.by_value(stream_of([0], tenants=" "), "tenant", "client", {"b": "public"})
    with pytest.raises(TraceError, match=r"mine.csv, line 2: no client is named. Write \*=… for those"):
        stream.whole()


def test_changes_are_made_from_left_to_right(tmp_path: Path) -> None:
    (tmp_path / "other file.csv").write_text("arrival_s,prompt_tokens,output_tokens\n5,1,1\n6,1,1\n")
    own = stream_of([0, 10 * S])
    assert arrivals(parse_traffic("shift 1h30m, repeat 2 every 1d").apply(own)) == [
        1.5 * HOUR, 1.5 * HOUR + 10 * S, 25.5 * HOUR, 25.5 * HOUR + 10 * S,
    ]  # fmt: skip
    assert arrivals(parse_traffic("then other file.csv at 4s, x2, cut 11", tmp_path).apply(own))[::2] == [
        0,
        4 * S,
        5 * S,
    ]
    assert arrivals(parse_traffic("").apply(own)) == [0, 10 * S]


def test_a_trace_that_follows_has_the_same_columns(tmp_path: Path) -> None:
    (tmp_path / "log.csv").write_text("t,p,o\n1,1,1\n3,1,1\n")
    changes = parse_traffic("then log.csv", tmp_path, columns="arrival=t,prompt=p,output=o")
    assert arrivals(changes.apply(stream_of([0, 10 * S]))) == [0, 10 * S, 20 * S, 22 * S]


def test_two_changes_have_dice_of_their_own() -> None:
    own = stream_of(list(range(0, 4000 * S, S)), size=1000)
    quarter = arrivals(parse_traffic("x0.5, x0.5").apply(own))
    assert len(quarter) == pytest.approx(1000, abs=4 * 28)


@pytest.mark.parametrize(
    ("text", "complaint"),
    [
        ("x0", "'x0' needs a factor from 0.001 to 1000. Write it like x2, or x0.5."),
        ("x2,", "there is nothing between two commas"),
        ("shfit 3h", "'shfit 3h' changes nothing. Did you mean 'shift'?"),
        ("shift", "'shift' needs one time. Write it like shift 3h"),
        ("shift 3 hours", "needs one time"),
        ("shift 3x", "needs a time like 90s, 15m, 2h or 1h30m where '3x' is"),
        ("repeat", "needs how often. Write it like repeat 7"),
        ("repeat 0", "needs how often, from 1 to 100,000"),
        ("repeat 7 every 0s", "'repeat 7 every 0s' needs a time above 0"),
        ("repeat 7 each 24h", "needs how often. Write it like repeat 7, or repeat 7 every 24h"),
        ("then", "needs a trace file"),
        ("then nowhere.csv", "cannot read the trace nowhere.csv: No such file"),
        ("surge", "needs a factor, an hour of the day and how long. Write it like surge 10x@20:00+2h"),
        ("surge 10@20:00+2h", "needs a factor, an hour"),
        ("surge 10x@25:00+2h", "'25:00' in the surge '10x@25:00+2h' is no time of the day"),
        ("surge 10x@20:00+25h", "lasts 25h. It comes every day: write at most 24h"),
        ("surge 10x@20:00+soon", "needs a time like 90s, 15m, 2h or 1h30m where 'soon' is"),
        ("cut 1", "needs the tokens of a context, at least 2. Write it like cut 32768"),
        ("drop 32k", "needs the tokens of a context"),
        ("tenant", "needs each name once"),
        ("tenant a b", "needs each name once, with something on both sides of ="),
        ("tenant a=0.5 b=0.6", "the shares in 'tenant a=0.5 b=0.6' come to 1.1. Make them 1 together."),
        ("tenant a=0.5 b=c", "needs shares, or names 'by' a column"),
        ("tenant by team a=b", "needs 'by tenant', 'by model' or 'by client'"),
        ("tenant by model a=0.5 b=0.5", "needs shares, or names 'by' a column"),
        ("model a=x", "needs shares, or names 'by' a column. Write it like model r1,"),
    ],
)
def test_a_mistake_is_answered_with_what_to_write(text: str, complaint: str) -> None:
    with pytest.raises(TraceError) as caught:
        parse_traffic(text)
    assert complaint in str(caught.value)


@pytest.mark.parametrize(
    ("text", "seconds"),
    [("90", 90), ("90s", 90), ("1.5h", 5400), ("1h30m", 5400), ("-2m", -120), ("1d", 86400), ("3min", 180)],
)
def test_a_time_is_read_in_seconds(text: str, seconds: float) -> None:
    assert duration_s(text) == seconds


@pytest.mark.parametrize("text", ["", "h", "1h30", "two", "1w", "--1s"])
def test_what_is_no_time_is_none(text: str) -> None:
    assert duration_s(text) is None
