"""How long a silence may last, and what becomes of a request in one; no sockets."""

import asyncio
import math

import pytest
from serving import fake_plan

from waterline.service.health import Vitals
from waterline.service.silence import Watch


def watch(**vitals: float) -> Watch:
    [replica] = fake_plan().replicas  # TTFT 0.01 s, TPOT 0.002 s, 1000 tokens of prompts a second

    async def made() -> Watch:
        return Watch(vitals=Vitals(replica=replica, **vitals), patience=1.0)

    return asyncio.run(made())


def test_how_long_a_silence_may_last_follows_from_the_plan_and_from_what_was_measured() -> None:
    first = watch()
    assert first.allowed_s(100.0) == pytest.approx(1.0 + 8 * 0.01)
    assert watch(unread_tokens=500).allowed_s(100.0) == pytest.approx(1.0 + 8 * 0.5), "prompts take their time"
    assert watch(ttft_s=2.0).allowed_s(100.0) == pytest.approx(1.0 + 8 * 2.0), "slower than planned, it gets more"
    later = watch(tpot_s=0.1)
    later.heard = True
    assert later.allowed_s(100.0) == pytest.approx(1.0 + 25 * 0.1)
    later.vitals.heard_s = 99.0
    assert later.allowed_s(100.0) == pytest.approx(4 * (1.0 + 25 * 0.1)), "others on it are answered"
    later.patience = math.inf
    assert later.allowed_s(100.0) == math.inf, "the last engine that is left may take all the time there is"
