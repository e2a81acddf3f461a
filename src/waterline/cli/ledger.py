"""Where the ledger is: what the commands that open one have in common."""

import os
from pathlib import Path
from typing import Any

import click


def default_ledger() -> str:
    """Return the file in the state directory of this user."""
    home = os.environ.get("XDG_STATE_HOME") or Path.home() / ".local" / "state"
    return str(Path(home) / "waterline" / "ledger.db")


def ledger_option(command: Any) -> Any:
    """Add `--ledger`, which a command gets as `ledger`."""
    return click.option(
        "--ledger",
        envvar="WATERLINE_LEDGER",
        default=default_ledger,
        metavar="FILE|URL",
        help="A file, or postgresql://…; else WATERLINE_LEDGER, or ~/.local/state/waterline/ledger.db.",
    )(command)
