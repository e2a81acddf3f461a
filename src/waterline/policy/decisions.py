"""Why: the rules by which decisions are made, and the log they are written to.

A decision is a row of integers (`FIELDS`), so that a rehearsal can write a hundred million of them, and so that two
logs can be compared byte for byte. Whoever keeps the log hashes the bytes of its rows as they come:

    digest = hashlib.sha256()
    digest.update(canonical_bytes(rows))

A request that is given to a replica has *reasons* beside its row: why that replica, whose turn it was, and the numbers
that decided. They are a row of integers too (`REASONS`), and nobody makes them who keeps no log.

`as_json` says one row in words, as a line of JSON whose bytes are canonical too: sorted keys, whole numbers, no blanks.
"""

import json
from collections.abc import Iterable, Mapping, Sequence
from typing import Final

import numpy as np
from numpy.typing import NDArray

NONE: Final = -1  # of a field that a decision does not have
NANOSECONDS_PER_S: Final = 1_000_000_000

# --- Rules: the reason of a decision ----------------------------------------------------------------------------------

SLOT_FREE: Final = 10
WAITS_FOR_SLOT: Final = 11
TOO_LATE: Final = 12
QUEUE_FULL: Final = 13
OVER_LIMIT: Final = 14
NOT_SERVED: Final = 15
TOO_LONG: Final = 16
GAVE_UP: Final = 17
COMES_BACK: Final = 18
TAKES_OVER: Final = 19
BELOW_GUARANTEE: Final = 20
BELOW_DESERVED: Final = 21
BORROWS: Final = 22
HEDGES: Final = 25
PREFIX_CACHED: Final = 30
SHORTEST_WAIT: Final = 31
NO_REPLICA: Final = 32
ONLY_REPLICA: Final = 33
ONLY_FREE: Final = 34
FIRST_FREE: Final = 35
PREFIX_BEHIND: Final = 36
PREFIX_BUSY: Final = 37
LAST_RESORT: Final = 38
FULL_EFFORT: Final = 40
LOAD_HIGH: Final = 41
OWN_IDLE: Final = 50
BORROW_IDLE: Final = 51
CLAIM_KEPT: Final = 52
RECLAIM: Final = 53
OUTBID_LOAN: Final = 54
OWN_SURPLUS: Final = 55
SURPLUS: Final = 56
CLAIM_DROPPED: Final = 57
FREED_FOR_CLAIM: Final = 58
SPARED: Final = 59
HOSTS: Final = 60

RULES: Final[dict[int, tuple[str, str]]] = {
    SLOT_FREE: ("slot free", "A replica has a slot and nobody waits for it."),
    WAITS_FOR_SLOT: ("waits for slot", "It can start before its deadline, when those ahead of it have been served."),
    TOO_LATE: ("too late", "The work ahead of it would keep it past its deadline."),
    QUEUE_FULL: ("queue full", "Its client already holds as many places of the queue as are free."),
    OVER_LIMIT: ("over limit", "Its tenant has used its limit of GPU time."),
    NOT_SERVED: ("not served", "No replica that can hold it is in service."),
    TOO_LONG: ("too long", "No replica of the model holds so many tokens."),
    GAVE_UP: ("gave up", "Its client did not wait any longer."),
    COMES_BACK: ("comes back", "Its replica failed: it goes on from where it was, before its client's other requests."),
    TAKES_OVER: ("takes over", "Its prompt was read on another replica; this one writes the answer."),
    HEDGES: ("hedges", "Its first token is late: it is sent to this replica too, where a slot was to spare."),
    BELOW_GUARANTEE: ("below guarantee", "Its tenant has used less GPU time than it is guaranteed."),
    BELOW_DESERVED: ("below deserved", "Its tenant has used less GPU time than it deserves."),
    BORROWS: ("borrows", "Its tenant has used what it deserves; nobody below that waits."),
    PREFIX_CACHED: ("prefix cached", "What the replica keeps of the prompt saves more than its queue costs."),
    SHORTEST_WAIT: ("shortest wait", "Of the replicas looked at it would be done first."),
    NO_REPLICA: ("no replica", "No replica of the model is in service."),
    ONLY_REPLICA: ("only replica", "No other replica of the model is in service."),
    ONLY_FREE: ("only free", "Of the replicas looked at, no other has a slot and can hold it."),
    FIRST_FREE: (
        "first free",
        "None of those drawn can take it; this is the first that can, of those with a slot.",
    ),
    PREFIX_BEHIND: (
        "prefix behind",
        "Another replica keeps the beginning of the prompt, but its queue costs more than that saves.",
    ),
    PREFIX_BUSY: (
        "prefix busy",
        "Another replica keeps the beginning of the prompt, but has no slot for it, or is not in service.",
    ),
    LAST_RESORT: ("last resort", "No replica in service can write it; of those that drain it would be done first."),
    FULL_EFFORT: ("full effort", "The load leaves time for all the thinking that was asked for."),
    LOAD_HIGH: ("load high", "Thinking is cut so that requests start before their deadline."),
    OWN_IDLE: ("own, idle", "The tenant starts a replica on idle GPUs, within what it deserves."),
    BORROW_IDLE: ("borrow idle", "The tenant starts a replica on GPUs others leave idle, within its limit."),
    CLAIM_KEPT: ("claim kept", "The GPUs that were freed for the claimant are complete: its replica starts."),
    RECLAIM: ("reclaim", "The claimant stays within what it deserves; the victim's tenant has more than it deserves."),
    OUTBID_LOAN: ("outbid loan", "Both borrow; the claimant has priority, and the victim keeps what it deserves."),
    OWN_SURPLUS: (
        "own surplus",
        "The claimant's tenant stops a replica of its own that can be spared, or that has lower priority.",
    ),
    SURPLUS: ("surplus", "The load can do without the replica, and has been able to for a while: it is handed back."),
    CLAIM_DROPPED: ("claim dropped", "The claimant no longer needs the GPUs kept for it."),
    SPARED: ("spared", "Another tenant of the same model can do without the replica, which goes on as it runs."),
    HOSTS: ("hosts", "In its idle guarantee the tenant starts a replica that another tenant of the model may use too."),
    FREED_FOR_CLAIM: ("freed for claim", "Idle GPUs of the node are kept until the claim is complete."),
}

PLACES_WHY: Final = (  # a request goes to a replica
    PREFIX_CACHED,
    SHORTEST_WAIT,
    ONLY_REPLICA,
    ONLY_FREE,
    FIRST_FREE,
    PREFIX_BEHIND,
    PREFIX_BUSY,
    LAST_RESORT,
)
TURNS_WHY: Final = (BELOW_GUARANTEE, BELOW_DESERVED, BORROWS)  # a tenant is the next

# --- The log ----------------------------------------------------------------------------------------------------------

FIELDS: Final = (
    "at_ns",  # when, on the clock of the caller
    "rule",  # a key of RULES
    "tenant",  # index of the tenant it is about
    "claimant",  # client of a request; service (a tenant's model) of a move
    "victim",  # replica that is stopped
    "place",  # replica of a request; node of a move
    "amount",  # tokens of a request; GPUs of a move
    "cost_ms",  # wait of a request; GPU-milliseconds that a move loses
    "deadline_ns",  # when to come back, or when the GPUs are handed over at the latest
)

REASONS: Final = (
    "why",  # that replica, of PLACES_WHY
    "done_ms",  # until it would have served what it has and read this prompt
    "other",  # replica: the runner-up; the one that keeps more of the prompt, where that is why it was not taken
    "other_ms",  # likewise; not known of one that is out of service
    "cached",  # tokens of the prompt that are kept: by `other` where that was not taken in spite of it
    "turn",  # why its tenant was the next, of TURNS_WHY
    "used_ppm",  # that the tenant has used, of its guarantee while it is below that, else of what it deserves
    "next_tenant",  # that would have been the next; none where nobody else waited, or only at the limit
    "next_turn",  # likewise
    "next_ppm",  # likewise
    "counter_ms",  # GPU time on the virtual counter of its client
    "next_claimant",  # client of the same tenant and model that would have been the next; none where no other waited
    "next_counter_ms",  # likewise
)
RULES_OF_REASONS: Final = ("why", "turn", "next_turn")  # keys of RULES
NAMED_AS: Final = {"other": "place", "next_tenant": "tenant", "next_claimant": "claimant"}
Known = Sequence[str] | Mapping[int, str]  # names by index
_encode = json.JSONEncoder(sort_keys=True, separators=(",", ":")).encode


def nanoseconds(time_s: float) -> int:
    """Return a time as the log writes it; NONE for a time that is none."""
    return round(time_s * NANOSECONDS_PER_S) if np.isfinite(time_s) else NONE


def log_row(
    *,
    at_s: float,
    rule: int,
    tenant: int = NONE,
    claimant: int = NONE,
    victim: int = NONE,
    place: int = NONE,
    amount: int = NONE,
    cost_s: float = 0.0,
    deadline_s: float = float("inf"),
) -> tuple[int, ...]:
    """Return one decision as a row of the log, in the order of `FIELDS`."""
    return (
        nanoseconds(at_s),
        int(rule),
        int(tenant),
        int(claimant),
        int(victim),
        int(place),
        int(amount),
        round(cost_s * 1000),
        nanoseconds(deadline_s),
    )


def canonical_bytes(rows: Sequence[Sequence[int]] | NDArray[np.int64]) -> bytes:
    """Return the bytes of rows of the log: 64-bit little-endian integers, on every machine."""
    table: NDArray[np.int64] = np.asarray(rows, dtype="<i8").reshape(-1, len(FIELDS))
    return table.tobytes()


def is_about_replicas(rule: int) -> bool:
    """Whether a rule is one by which replicas come and go, and not of a request."""
    return rule >= OWN_IDLE


def as_json(
    row: Iterable[int],
    names: Mapping[str, Known] | None = None,
    victim: str = "",
    reasons: Iterable[int] = (),
    request_id: str = "",
) -> bytes:
    """Return one row as a line of JSON.

    Args:
        row: in the order of `FIELDS`; fields that are `NONE` are left out.
        names: of "tenant", "claimant" or "place", by index; the index stands where there is no name.
        victim: the name of the replica that is stopped, where it is known: its number is another's later on.
        reasons: in the order of `REASONS`, likewise; or none.
        request_id: of the request, where it has one.
    """
    names = names or {}
    said: dict[str, int | str] = {"request_id": request_id} if request_id else {}
    for field, value in zip(FIELDS, map(int, row), strict=True):
        if field == "rule":
            said[field] = RULES[value][0]
        elif field == "victim" and victim:
            said[field] = victim
        elif value != NONE:
            said[field] = _named(value, names.get(field))
    for field, value in zip(REASONS, reasons, strict=False):
        if value != NONE:
            rule = field in RULES_OF_REASONS
            said[field] = RULES[value][0] if rule else _named(value, names.get(NAMED_AS.get(field, "")))
    return _encode(said).encode() + b"\n"


def _named(index: int, known: Known | None) -> int | str:
    """Return a name by its index, or the index where there is none."""
    if known is None:
        return index
    try:
        return known[index]
    except LookupError:
        return index
