"""The pages say what the code does."""

import re
from pathlib import Path

import msgspec
import pytest

from waterline.cli import COMMANDS
from waterline.errors import WaterlineError
from waterline.fleet import ENGINES, Demand, Fleet, Job, Model, Pool, Tenant
from waterline.plan import (
    VERSION,
    HourPlan,
    Layout,
    Loan,
    ModelPlan,
    Place,
    Plan,
    PoolPlan,
    Replica,
    Shape,
    Share,
    TenantPlan,
)
from waterline.policy.decisions import (
    BELOW_GUARANTEE,
    FIELDS,
    HEDGES,
    PLACES_WHY,
    REASONS,
    RULES,
    TURNS_WHY,
    is_about_replicas,
)

DOCS = Path(__file__).parents[1] / "docs"
REQUESTS = (*range(BELOW_GUARANTEE), HEDGES)  # rules of what becomes of a request


@pytest.mark.parametrize(
    ("heading", "table"),
    [
        ("Top level", Fleet),
        ("`[[pools]]`", Pool),
        ("`[[models]]`", Model),
        ("`[[tenants]]`", Tenant),
        ("`[[demand]]`", Demand),
        ("`[[jobs]]`", Job),
    ],
)
def test_the_reference_lists_every_key_of_the_fleet_file_and_no_other(
    heading: str, table: type[msgspec.Struct]
) -> None:
    page = (DOCS / "fleet-file.md").read_text()
    section = page.split(f"## {heading}", 1)[1].split("\n## ", 1)[0]
    keys = re.findall(r"(?m)^\| `(\w+)` \|", section.split("\n\n| model |")[0])
    assert sorted(keys) == sorted(table.__struct_fields__)


@pytest.mark.parametrize(
    ("heading", "head", "table"),
    [
        ("Top level", "key", Plan),
        ("`models`", "key", ModelPlan),
        ("`tenants`", "key", TenantPlan),
        ("`replicas`", "key", Replica),
        ("`places`", "key of a place", Place),
        ("`places`", "key of a layout", Layout),
        ("`hours`", "key", HourPlan),
        ("`pools`", "key", PoolPlan),
        ("`shapes`", "key", Shape),
        ("`shares`", "key of a share", Share),
        ("`shares`", "key of a loan", Loan),
    ],
)
def test_the_reference_lists_every_key_of_the_plan_file_with_its_default(
    heading: str, head: str, table: type[msgspec.Struct]
) -> None:
    page = (DOCS / "plan-file.md").read_text()
    section = page.split(f"## {heading}", 1)[1].split("\n## ", 1)[0]
    header, *rows = section.split(f"| {head} |", 1)[1].split("\n\n", 1)[0].splitlines()
    keys = [re.match(r"\| `(\w+)` \|", row) for row in rows[1:]]
    assert [key[1] if key else None for key in keys] == list(table.__struct_fields__)
    if "default" in header:
        without = [row for row in rows[1:] if re.match(r"\| `\w+` \| \|", row)]
        assert len(without) == len(table.__struct_fields__) - len(table.__struct_defaults__)
    assert f"`version` is {VERSION}." in page


def test_the_reference_names_every_engine() -> None:
    page = (DOCS / "fleet-file.md").read_text()
    assert all(f"`{engine}`" in page for engine in ENGINES)


def test_the_readme_names_every_command() -> None:
    readme = (DOCS.parent / "README.md").read_text()
    assert all(f"waterline {command}" in readme or f"**{command}**" in readme for command in COMMANDS)


def test_no_class_of_errors_is_without_use() -> None:
    sources = "\n".join(path.read_text() for path in (DOCS.parent / "src").rglob("*.py") if path.name != "errors.py")
    for kind in WaterlineError.__subclasses__():
        for leaf in (kind, *kind.__subclasses__()):
            assert leaf.__name__ in sources, f"nothing raises or catches {leaf.__name__}"


def test_the_guide_to_rehearsing_says_what_every_rule_of_the_decision_log_means() -> None:
    page = (DOCS / "rehearsing.md").read_text()
    logged = {code: words for code, words in RULES.items() if code in REQUESTS or is_about_replicas(code)}
    section = page.split("| rule | what it says |", 1)[1].split("\n\n", 1)[0]
    assert re.findall(r"(?m)^\| ([a-z, ]+) \| (.+) \|$", section) == [words for _, words in sorted(logged.items())]
    keys = page.split("| key | about a request |", 1)[1].split("\n\n", 1)[0]
    assert re.findall(r"(?m)^\| `(\w+)` \|", keys) == list(FIELDS)


def test_the_guide_to_rehearsing_says_what_every_reason_of_the_decision_log_means() -> None:
    page = (DOCS / "rehearsing.md").read_text()
    for heading, rules in (("why", PLACES_WHY), ("turn", TURNS_WHY)):
        section = page.split(f"| {heading} | what it says |", 1)[1].split("\n\n", 1)[0]
        assert re.findall(r"(?m)^\| ([a-z ]+) \| (.+) \|$", section) == [RULES[rule] for rule in rules]
    tables = [
        page.split(f"| key | {what} |", 1)[1].split("\n\n", 1)[0] for what in ("why that replica", "whose turn it was")
    ]
    keys = re.findall(r"(?m)^\| (`[^|]+`) \|", "\n".join(tables))
    assert [key.strip("`") for some in keys for key in some.split(", ")] == list(REASONS)
