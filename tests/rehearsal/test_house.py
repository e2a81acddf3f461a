"""What clients see of a plan's replicas, beside what the plan expects."""

import numpy as np
import pytest
from msgspec.structs import replace

from examples import small_plan
from waterline.rehearsal import rehearse
from waterline.rehearsal.house import passed_on
from waterline.workload import Request, Trace


def test_of_a_split_the_first_token_comes_a_decode_step_after_the_cache() -> None:
    read, finish, transfer, output = (np.array([one]) for one in (1000, 1000 + 200 + 9 * 50, 200, 10))
    first, last = passed_on(read, finish, transfer, output)  # nine steps of 50 for the tokens after the first
    assert (first.tolist(), last.tolist()) == ([1250], [1700])
    assert (last - first).tolist() == [9 * 50]  # ten steps for ten tokens, and the same time for each token after one


def test_a_lone_request_to_a_split_sees_what_the_plan_counts() -> None:
    """Llama-3.1-8B keeps 128 KiB a token; a 4090 sends that through its PCIe port of 32 GB/s in 4.1 us."""
    plan = small_plan()
    (replica,) = plan.replicas
    reader = replace(replica, id="chat/read", role="prefill")
    writer = replace(replica, id="chat/write", role="decode", tokens_per_s=1000.0, prefill_tokens_per_s=0.0)
    trace = Trace(name="one", requests=[Request(arrival_s=0.0, prompt_tokens=1000, output_tokens=100)])
    split = replace(plan, replicas=(reader, writer))
    alone, passed = (rehearse(one, trace, policy="plan").completions[0] for one in (plan, split))
    transfer_s = 1000 * 131_072 / 32e9
    assert passed.ttft_s == pytest.approx(alone.ttft_s + transfer_s + alone.tpot_s, rel=1e-3)
    assert passed.tpot_s == pytest.approx(alone.tpot_s, rel=1e-3)
    assert passed.gpu_s == pytest.approx(alone.gpu_s)
