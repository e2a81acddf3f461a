"""What every request used and costs, and what each key may use: written once, kept through a kill.

`Ledger` is for the gateway, the functions are for commands. See docs/ledger.md.
"""

from waterline.ledger.database import connect
from waterline.ledger.keys import create_key, note_fleet, noted_fleet, read_keys, revoke_key
from waterline.ledger.records import Key, Outcome, Quotas, Settlement, day_of, nano_usd, new_request_id, utc_us
from waterline.ledger.store import Lag, Ledger, Reservation
from waterline.ledger.usage import Usage, read_usage

__all__ = [
    "Key",
    "Lag",
    "Ledger",
    "Outcome",
    "Quotas",
    "Reservation",
    "Settlement",
    "Usage",
    "connect",
    "create_key",
    "day_of",
    "nano_usd",
    "new_request_id",
    "note_fleet",
    "noted_fleet",
    "read_keys",
    "read_usage",
    "revoke_key",
    "utc_us",
]
