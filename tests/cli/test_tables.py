"""What the commands draw: whole cells at any width, and names as they are."""

import re
from pathlib import Path

import pytest
from click.testing import CliRunner
from hypothesis import given
from hypothesis import strategies as st
from msgspec.structs import replace

from examples import small_plan
from plans import a_day, an_iceberg
from waterline.cli import plan as plan_command
from waterline.cli import rehearse_table
from waterline.cli.fit import fit
from waterline.cli.plan import plan
from waterline.cli.rehearse import Rehearsed
from waterline.cli.tables import console, draw, fitting
from waterline.errors import InputError
from waterline.fleet import Tenant
from waterline.plan import Plan
from waterline.rehearsal import rehearse

MIXED = Path(__file__).parents[2] / "examples" / "mixed.toml"
ODD = "[bold]x[/nope] :smile:"
COLUMNS = ("name", "peak req/s", "cost")
ROWS = [("chat", "3.2", "$1.00"), ("code", "12", "$123.45")]


def named(name: str) -> Plan:
    """Return the small plan with that name for its model, its tenant and its fleet."""
    small = small_plan()
    fleet = small.fleet
    return replace(
        small,
        fleet=replace(
            fleet,
            name=name,
            models=tuple(replace(one, name=name) for one in fleet.models),
            tenants=tuple(replace(one, name=name) for one in fleet.tenants),
            demand=tuple(replace(one, tenant=name, model=name) for one in fleet.demand),
        ),
        models=tuple(replace(one, model=name) for one in small.models),
        tenants=tuple(replace(one, tenant=name) for one in small.tenants),
        replicas=tuple(replace(one, model=name, id=f"{name}/0") for one in small.replicas),
    )


def test_a_wide_console_shows_every_column_on_one_line() -> None:
    # 4 + 10 + 7 of text, 3 for each cell's blanks and line, 1 for the last line: 31
    assert fitting(COLUMNS, ROWS, ("peak req/s",), 31) == ([0, 1, 2], [4, 10, 7])


def test_headers_fold_before_columns_are_left_out() -> None:
    assert fitting(COLUMNS, ROWS, ("peak req/s",), 30) == ([0, 1, 2], [4, 5, 7])
    assert fitting(COLUMNS, ROWS, ("peak req/s",), 25) == ([0, 2], [4, 7])


def test_the_most_needed_columns_are_taken_first_and_cheaper_ones_fill_the_room() -> None:
    columns, rows = ("a", "b", "c", "d"), [("1", "22", "333333", "4")]
    assert fitting(columns, rows, ("b", "c", "d"), 15) == ([0, 1, 3], [1, 2, 1])


@given(st.integers(20, 100), st.lists(st.text("abc", max_size=40), min_size=3, max_size=3))
def test_a_table_is_never_wider_than_its_room(room: int, row: list[str]) -> None:
    shown, widths = fitting(COLUMNS, [row], ("cost",), room)
    assert sum(width + 3 for width in widths) + 1 <= room
    assert {0, 1} <= set(shown)


def test_a_name_too_long_for_the_console_is_folded_not_cut(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("COLUMNS", "40")
    draw(console(), "title", COLUMNS, [("x" * 60, "1", "2")], text_columns=1, spare=("peak req/s",))
    drawn = capsys.readouterr().out
    assert drawn.count("x") == 60
    assert "…" not in drawn
    assert drawn.startswith("title\n")  # without blanks behind it
    assert max(len(line) for line in drawn.splitlines()) <= 40
    assert "Left out to fit 40 columns: peak req/s." in drawn


@pytest.mark.parametrize(("columns", "width"), [("", 130), ("80", 80), ("wide", 130), ("3", 40)])
def test_a_pipe_is_as_wide_as_columns_says(monkeypatch: pytest.MonkeyPatch, columns: str, width: int) -> None:
    monkeypatch.setenv("COLUMNS", columns)
    assert console().width == width


def test_names_that_look_like_markup_are_shown_as_they_are(capsys: pytest.CaptureFixture[str]) -> None:
    odd = named(ODD)
    plan_command.show(odd)
    assert capsys.readouterr().out.count(ODD) == 4  # title, model, tenant, reason
    rehearse_table.show(Rehearsed(name="", plan=odd, policy="static", happened=rehearse(odd), took_s=1.0))
    assert capsys.readouterr().out.count(ODD) == 5  # title, tenant and model, twice in the note


@pytest.mark.parametrize("width", ["60", "80", "130"])
def test_no_cell_of_a_plan_is_cut(monkeypatch: pytest.MonkeyPatch, width: str) -> None:
    monkeypatch.setenv("COLUMNS", width)
    result = CliRunner().invoke(plan, [str(MIXED)])
    assert result.exception is None
    assert "…" not in result.output
    assert max(len(line.rstrip()) for line in result.output.splitlines()) <= int(width)
    for cell in ("replicas", "coder", "mi300x", "enterprise"):
        assert cell in result.output


def test_a_dash_is_no_file_to_write_a_plan_to(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    result = CliRunner().invoke(plan, [str(MIXED), "--output", "-"])
    assert isinstance(result.exception, InputError)
    assert "To print the plan: waterline plan FLEET --json" in str(result.exception)
    assert not list(tmp_path.iterdir())


def test_a_plan_without_a_public_says_so_when_there_are_several_tenants(capsys: pytest.CaptureFixture[str]) -> None:
    plan_command.show(named("acme"))
    assert "aterline" not in capsys.readouterr().out
    one = named("acme")
    two = replace(
        one,
        fleet=replace(one.fleet, tenants=(*one.fleet.tenants, Tenant(name="labs"))),
        tenants=(*one.tenants, replace(one.tenants[0], tenant="labs")),
    )
    plan_command.show(two)
    said = "No waterline: it is drawn for a tenant named 'public', here are acme, labs."
    assert said in capsys.readouterr().out


@pytest.mark.parametrize(("context", "prompt", "output"), [("600", 500, 100), ("8192", 1000, 200)])
def test_fit_says_the_lengths_its_times_are_for(context: str, prompt: int, output: int) -> None:
    result = CliRunner().invoke(fit, ["qwen3-32b", "--gpu", "mi300x", "--context", context])
    assert result.exception is None
    assert f"Times are means for a prompt of {prompt} tokens and {output} back; four of five" in result.output


def test_fit_shows_the_longest_context_and_what_a_price_counts(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", "150")
    drawn = CliRunner().invoke(fit, ["qwen3-32b", "--gpu", "mi300x"]).output
    assert "longest context" in drawn
    assert " 40960 " in drawn  # all that the model reads
    assert "A price per M tokens counts prompts and answers" in drawn


def test_fit_says_what_its_times_are_worth() -> None:
    result = CliRunner().invoke(fit, ["qwen3-32b", "--gpu", "mi300x"])
    worth = next(line for line in result.output.splitlines() if "TTFT" in line and "TPOT" in line and "-" in line)
    assert re.match(
        r"  (measured|interpolated|transferred|physics) +TTFT 0\.\d+-\d+\.\d+  TPOT 0\.\d+-\d+\.\d+  ", worth
    )
    assert worth.split()[0] in result.output.split("Times are means")[0], "the row says the same"
    nothing = CliRunner().invoke(fit, ["qwen3-32b", "--gpu", "cpu"])
    assert "Times" not in nothing.output


@pytest.mark.parametrize("width", [50, 80, 100, 130])
def test_the_day_fits_any_console_and_no_figure_is_cut(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], width: int
) -> None:
    monkeypatch.setenv("COLUMNS", str(width))
    plan_command.show(an_iceberg())
    drawn = capsys.readouterr().out
    assert "…" not in drawn
    assert max(len(line.rstrip()) for line in drawn.splitlines()) <= width
    assert "\x1b" not in drawn  # no colour in a pipe
    assert re.search(r"│ 18:00 │ +19,200 │", drawn)
    assert len(drawn.splitlines()) < 260  # models, hours and moves; not replicas


def test_the_day_of_a_plan_is_a_row_an_hour_and_what_moves(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("COLUMNS", "100")
    plan_command.show(a_day(8))
    drawn = capsys.readouterr().out
    assert len(re.findall(r"(?m)^│ \d\d:00 │", drawn)) == 24
    assert "│ 19:00 │       12 │          4 │     16 │ $6.40 │ ██████████████████▓▓▓▓▓▓" in drawn
    assert "public borrows 8.8 from research 19:00-23:00.\n19:00 starts 6 chat.\n23:00 stops 6 chat.\n" in drawn
    assert "Waterline: of 32 GPUs 3 at 00:00, 12 at 19:00 serve the public (38% at most)." in drawn
    assert "In all $57.60 a day ($6.40 in the busiest hour, 19:00), $1,728 in 30 days." in drawn


def test_a_plan_that_falls_back_to_goodput_says_who_goes_short(capsys: pytest.CaptureFixture[str]) -> None:
    plan_command.show(replace(an_iceberg(), objective="goodput", warnings=("What would do: 2 more nodes of 'a'.",)))
    drawn = capsys.readouterr().out
    assert "What would do: 2 more nodes of 'a'." in drawn
    assert "The fleet is too small for its demand: it serves as much as it can." in drawn
    assert "Not served: 0.4% of what public asks of model-03 in a day; at 20:00 it gets 9 of 10 req/s." in drawn


def test_a_model_that_found_no_room_has_a_row(capsys: pytest.CaptureFixture[str]) -> None:
    plan_command.show(replace(small_plan(), objective="goodput", replicas=()))
    drawn = capsys.readouterr().out
    assert re.search(r"│ chat  │ 0 +│ - +│ - +│ - +│ +0.5 │ +- │ +- │ +- │ +\$0.000 │ +- │", drawn)


def test_what_does_not_serve_in_the_busiest_hour_has_no_cost_then(capsys: pytest.CaptureFixture[str]) -> None:
    small = small_plan()
    (always,) = small.replicas
    larger = replace(always, id="other/0", layout=replace(always.layout, tp=2), usd_per_hour=4.0, hours=(12,))
    night = replace(always, hours=(0, 1), usd_per_hour=1.25)
    plan_command._draw_models(replace(small, replicas=(night, larger)), console())
    drawn = capsys.readouterr().out
    assert "$4.00" in drawn
    assert "$1.25" not in drawn
    assert "$0.000" not in drawn


def test_many_tenants_share_a_column_whatever_they_are_called(capsys: pytest.CaptureFixture[str]) -> None:
    plan = a_day(8)
    names = ["public", "others", "idle", "x", "y", "z"]
    hours = tuple(
        replace(hour, shares=tuple(replace(hour.shares[0], tenant=name, gpus=hour.gpus / 6) for name in names))
        for hour in plan.hours
    )
    tenants = tuple(replace(plan.tenants[0], tenant=name) for name in names)
    plan_command.show(replace(plan, hours=hours, tenants=tenants))
    drawn = capsys.readouterr().out
    assert re.search(r"public █ ┃ others ▓ ┃ idle ▒ ┃ others ░ ┃ idle · ┃", drawn)
    assert re.search(r"│ 20:00 │ +2\.7 │ +2\.7 │ +2\.7 │ +8 │ +16 │", drawn)


@given(st.lists(st.floats(0, 1e5), min_size=1, max_size=5), st.integers(1, 60))
def test_a_bar_is_as_long_as_asked_and_each_part_near_its_share(parts: list[float], length: int) -> None:
    drawn = plan_command.bar(dict(zip("abcde", parts, strict=False)), length)
    if sum(parts) == 0:
        assert drawn == ""
        return
    assert len(drawn) == length
    for letter, part in zip("abcde", parts, strict=False):
        assert abs(drawn.count(letter) - length * part / sum(parts)) <= 1
