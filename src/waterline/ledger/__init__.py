"""What every request used and costs, and what each key may use: written once, kept through a kill.

`Ledger` is for the gateway, the functions are for commands. See docs/ledger.md.
"""

from waterline.ledger.database import connect
from waterline.ledger.keys import create_key, read_keys, revoke_key
from waterline.ledger.records import Key, Outcome, Quotas, Settlement, nano_usd, new_request_id, utc_us
from waterline.ledger.store import Ledger, Reservation

__all__ = [
    "Key",
    "Ledger",
    "Outcome",
    "Quotas",
    "Reservation",
    "Settlement",
    "connect",
    "create_key",
    "nano_usd",
    "new_request_id",
    "read_keys",
    "revoke_key",
    "utc_us",
]
