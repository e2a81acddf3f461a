"""Keys and usage on the command line, on a real ledger."""

import csv
import io
import json
import re
import sqlite3
from dataclasses import dataclass
from pathlib import Path

import pytest
from click.testing import CliRunner

from waterline.cli import waterline_command
from waterline.errors import WaterlineError
from waterline.ledger import Settlement, connect, nano_usd, note_fleet
from waterline.ledger.batch import Batch, Books, Ending


@dataclass(frozen=True)
class Done:
    returncode: int
    stdout: str
    stderr: str


def waterline(*arguments: str, ledger: Path) -> Done:
    """Run a command in this process, as `main` does: starting Python takes longer than the command."""
    environment = {"WATERLINE_LEDGER": str(ledger), "COLUMNS": "200"}
    done = CliRunner().invoke(waterline_command, list(arguments), env=environment)
    if isinstance(done.exception, WaterlineError):
        return Done(done.exception.exit_code, done.stdout, f"waterline: {done.exception}")
    assert done.exception is None or isinstance(done.exception, SystemExit), done.exc_info
    return Done(done.exit_code, done.stdout, done.stderr)


def test_a_secret_is_shown_once_and_only_its_hash_is_kept(tmp_path: Path) -> None:
    ledger = tmp_path / "new" / "ledger.db"
    made = waterline("keys", "create", "--tenant", "public", "--client", "alice", "--usd", "2.50", ledger=ledger)
    assert made.returncode == 0, made.stderr
    secret = re.findall(r"^wl-\S{43}$", made.stdout, re.MULTILINE)[0]
    assert "$2.5 in all" in made.stdout
    assert secret.encode() not in b"".join(path.read_bytes() for path in ledger.parent.iterdir())
    listed = waterline("keys", "list", ledger=ledger)
    assert f"{secret[:9]}…" in listed.stdout
    assert secret not in listed.stdout


def test_a_revoked_key_says_since_when(tmp_path: Path) -> None:
    ledger = tmp_path / "ledger.db"
    made = json.loads(waterline("keys", "create", "--tenant", "t", "--client", "c", "--json", ledger=ledger).stdout)
    assert waterline("keys", "revoke", made["secret"], ledger=ledger).returncode == 0
    (key,) = json.loads(waterline("keys", "list", "--json", ledger=ledger).stdout)
    assert key["id"] == made["id"]
    assert key["revoked_us"] >= key["created_us"]


def test_a_tenant_the_served_fleet_does_not_have_is_refused(tmp_path: Path) -> None:
    ledger = tmp_path / "ledger.db"
    note_fleet(connect(str(ledger)), ["public", "research"], ["small"])
    done = waterline("keys", "create", "--tenant", "publik", "--client", "c", ledger=ledger)
    assert done.returncode == 2
    assert "no tenant is called 'publik'" in done.stderr
    assert "Did you mean 'public'" in done.stderr


def test_the_fleet_may_be_a_file_and_without_any_it_says_that_names_are_not_checked(tmp_path: Path) -> None:
    ledger, mixed = tmp_path / "ledger.db", Path(__file__).parents[2] / "examples" / "mixed.toml"
    for_bob = ("keys", "create", "--client", "bob", "--tenant")
    assert "--fleet FILE" in waterline(*for_bob, "marketing", ledger=ledger).stderr
    done = waterline(*for_bob, "research", "--models", "small", "--fleet", str(mixed), ledger=ledger)
    assert (done.returncode, done.stderr) == (0, "")
    done = waterline(*for_bob, "research", "--models", "smal", "--fleet", str(mixed), ledger=ledger)
    assert "no model is called 'smal'" in done.stderr
    note_fleet(connect(str(ledger)), ["public", "research"], ["large"])
    rows = waterline("keys", "list", ledger=ledger).stdout
    assert ("no tenant 'marketing'" in rows, "no model 'small'" in rows) == (True, True)


def settled(request_id: str, day: int, client: str, usd: str) -> Ending:
    arrival_us = (1_795_651_200 + day * 86_400) * 1_000_000  # the 26th of November 2026, midnight in UTC
    return Ending(
        settlement=Settlement(
            request_id=request_id,
            tenant="public",
            client=client,
            model="small",
            prompt_tokens=10,
            output_tokens=20,
            arrival_us=arrival_us,
            finish_us=arrival_us + 1,
            gpu_us=3_600_000_000,
            nano_usd=nano_usd(usd),
            outcome="ok",
        ),
        periods=(),
        reserved=None,
    )


def test_usage_sums_by_day_and_client_to_the_billionth_of_a_dollar(tmp_path: Path) -> None:
    ledger = tmp_path / "ledger.db"
    endings = [
        settled("a", 0, "alice", "0.1"),
        settled("b", 0, "alice", "0.2"),
        settled("c", 0, "bob", "0.000000001"),
        settled("d", 1, "alice", "5"),
        settled("e", -1, "alice", "7"),
    ]
    Books(connect(str(ledger)), "test").write(Batch(endings={one.settlement.request_id: one for one in endings}))
    arguments = ("usage", "--by", "day,client", "--since", "2026-11-26", "--until", "2026-11-26")
    rows = list(csv.DictReader(io.StringIO(waterline(*arguments, "--csv", ledger=ledger).stdout)))
    assert [(row["day"], row["client"], row["requests"], row["nano_usd"], row["usd"]) for row in rows] == [
        ("2026-11-26", "alice", "2", "300000000", "0.300000000"),
        ("2026-11-26", "bob", "1", "1", "0.000000001"),
    ]
    (total,) = json.loads(waterline("usage", "--json", ledger=ledger).stdout)
    assert (total["tenant"], total["requests"], total["nano_usd"], total["gpu_s"]) == (
        "public",
        5,
        12_300_000_001,
        18_000,
    )
    table = waterline("usage", "--by", "client", ledger=ledger).stdout.replace("│", " ")
    assert re.search(r"all +5 +5 .* 12\.3000", table)


@pytest.mark.parametrize(
    ("arguments", "code", "says"),
    [
        (("usage",), 2, "there is no ledger"),
        (("usage", "--by", "hour"), 2, "'hour' is not one of tenant, client, model, day, key"),
        (("usage", "--since", "2026-02-30"), 2, "'2026-02-30' is no day"),
        (("keys", "create", "--tenant", "t", "--client", "c", "--usd", "-1"), 2, "an amount lies between 0 and"),
        (("usage", "--ledger", "mysql://x"), 2, "postgresql://USER"),
        (("usage", "--ledger", "postgresql://127.0.0.1:9/x"), 7, "Is it running"),
    ],
)
def test_a_mistake_gets_one_sentence(arguments: tuple[str, ...], code: int, says: str, tmp_path: Path) -> None:
    done = waterline(*arguments, ledger=tmp_path / "ledger.db")
    assert done.returncode == code
    assert says in done.stderr


def test_another_kind_of_file_is_no_ledger(tmp_path: Path) -> None:
    ledger = tmp_path / "ledger.db"
    ledger.write_text("a letter to a friend, which is longer than the header of a database, and is none all the same")
    done = waterline("usage", ledger=ledger)
    assert done.returncode == 7
    assert "another kind of file" in done.stderr
    assert ledger.read_text().startswith("a letter")


def test_a_ledger_of_a_newer_program_is_left_alone(tmp_path: Path) -> None:
    ledger = tmp_path / "ledger.db"
    connect(str(ledger)).dispose()
    with sqlite3.connect(ledger) as connection:
        connection.execute("UPDATE alembic_version SET version_num = '9999'")
    done = waterline("usage", ledger=ledger)
    assert done.returncode == 7
    assert "belongs to a newer Waterline: its tables are at step 9999" in done.stderr
