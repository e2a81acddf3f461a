import hashlib
import json

import numpy as np
import pytest

from waterline.policy import decisions
from waterline.policy.decisions import FIELDS, NONE, REASONS, RULES, as_json, canonical_bytes, log_row, nanoseconds

LOAN = log_row(
    at_s=61.5, rule=decisions.RECLAIM, tenant=0, claimant=1, victim=2, place=3, amount=8, cost_s=330.25, deadline_s=91.5
)


def test_a_row_is_integers_in_the_order_of_the_fields() -> None:
    assert LOAN == (61_500_000_000, decisions.RECLAIM, 0, 1, 2, 3, 8, 330_250, 91_500_000_000)
    assert len(LOAN) == len(FIELDS)


def test_a_row_says_in_words_what_it_has_and_leaves_out_what_it_has_not() -> None:
    names = {"tenant": ["public", "research"], "place": ["a100/0", "a100/1", "h100/0", "h100/1"]}
    assert as_json(LOAN, names) == (
        b'{"amount":8,"at_ns":61500000000,"claimant":1,"cost_ms":330250,"deadline_ns":91500000000,'
        b'"place":"h100/1","rule":"reclaim","tenant":"public","victim":2}\n'
    )
    said = json.loads(as_json(log_row(at_s=1, rule=decisions.SLOT_FREE)))
    assert said == {"at_ns": 1_000_000_000, "cost_ms": 0, "rule": "slot free"}


def test_reasons_are_said_beside_a_row_with_their_names_and_only_where_there_are_any() -> None:
    row = log_row(at_s=1, rule=decisions.WAITS_FOR_SLOT, tenant=0, place=1)
    names = {"tenant": ["public", "research"], "claimant": ["ann", "bob"], "place": ["chat/0", "chat/1"]}
    placed = (decisions.PREFIX_BEHIND, 250, 0, 900, 512)
    whose = (decisions.BELOW_DESERVED, 640_000, 1, decisions.BORROWS, 1_200_000, 3100, 1, 4000)
    assert json.loads(as_json(row, names, reasons=(*placed, *whose))) == {
        "at_ns": 1_000_000_000, "rule": "waits for slot", "cost_ms": 0, "tenant": "public", "place": "chat/1",
        "why": "prefix behind", "done_ms": 250, "other": "chat/0", "other_ms": 900, "cached": 512,
        "turn": "below deserved", "used_ppm": 640_000,
        "next_tenant": "research", "next_turn": "borrows", "next_ppm": 1_200_000,
        "counter_ms": 3100, "next_claimant": "bob", "next_counter_ms": 4000,
    }  # fmt: skip
    assert as_json(row, names, reasons=[NONE] * len(REASONS)) == as_json(row, names)


def test_the_bytes_of_a_log_are_the_same_row_by_row_and_all_at_once() -> None:
    rows = [LOAN, log_row(at_s=1, rule=decisions.TOO_LATE, tenant=1, claimant=9, cost_s=1.5)]
    one_by_one = hashlib.sha256()
    for row in rows:
        one_by_one.update(canonical_bytes([row]))
    assert one_by_one.digest() == hashlib.sha256(canonical_bytes(np.array(rows))).digest()
    assert len(canonical_bytes(rows)) == 2 * len(FIELDS) * 8
    assert canonical_bytes([LOAN])[:8] == (61_500_000_000).to_bytes(8, "little")
    assert canonical_bytes([]) == b""


def test_no_time_is_none() -> None:
    assert nanoseconds(float("inf")) == NONE
    assert nanoseconds(float("nan")) == NONE
    assert nanoseconds(0.1) == 100_000_000


def test_every_rule_has_a_code_of_its_own_a_name_and_a_sentence() -> None:
    codes = [
        value
        for name, value in vars(decisions).items()
        if name.isupper() and isinstance(value, int) and name not in ("NONE", "NANOSECONDS_PER_S")
    ]
    assert sorted(codes) == sorted(RULES)
    assert len({name for name, _ in RULES.values()}) == len(RULES)
    assert all(sentence.endswith(".") for _, sentence in RULES.values())


def test_a_row_of_another_length_is_refused() -> None:
    with pytest.raises(ValueError, match="reshape"):
        canonical_bytes([(1, 2, 3)])
