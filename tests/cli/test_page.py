"""The page of a plan: whole, self-contained, escaped, and readable without eyes or scripts."""

import json
import re
from pathlib import Path

import pytest
from click.testing import CliRunner
from msgspec.structs import replace

from examples import small_plan
from pages import NASTY, Reader, named
from plans import a_day, an_iceberg, one_replica
from waterline.cli.page import page, write_page
from waterline.cli.plan import plan as plan_command
from waterline.errors import InputError
from waterline.plan import Plan, write_plan


@pytest.mark.parametrize(
    "plan", [small_plan(), a_day(8), an_iceberg(), one_replica(role="prefill"), replace(small_plan(), replicas=())]
)
def test_every_plan_has_a_page_that_loads_nothing(plan: Plan) -> None:
    html = page(plan)
    reader = Reader(html)
    tags = {tag for tag, _ in reader.tags}
    assert not tags & {"link", "img", "iframe", "object", "a"}
    assert not any(attribute in {"src", "href"} for _, attributes in reader.tags for attribute in attributes)
    assert not re.search(r"url\(|@import|https?://", html)
    policy = next(one for one in reader.all("meta") if one.get("http-equiv") == "Content-Security-Policy")
    assert str(policy["content"]).startswith("default-src 'none'")
    assert plan.fleet.name in "".join(reader.text)
    assert "$" not in re.sub(r"\$[\d,.]+", "", html)  # every placeholder is filled in


def test_a_name_is_text_wherever_it_stands() -> None:
    reader = Reader(page(named(a_day(8), NASTY)))
    assert not reader.all("img")
    assert len(reader.all("script")) == 1
    assert "".join(reader.text).count("onerror=alert(1)") > 10
    title = page(named(a_day(8), NASTY)).split("<title>", 1)[1].split("</title>", 1)[0]
    assert title == "&lt;/script&gt;&lt;img src=x onerror=alert(1)&gt;&amp;&quot;&#x27; ${why} $name: plan"


def test_the_script_reads_a_sentence_for_each_hour() -> None:
    data = json.loads(page(a_day(8)).split("const day = ", 1)[1].split(";\n", 1)[0])
    assert len(data["sentences"]) == 24
    assert data["sentences"][3] == "03:00: public 3, research 1, idle 28."
    assert data["sentences"][20] == (
        "20:00: public 12, research 4, idle 16; public borrows 8.8 from research 19:00-23:00."
    )


def test_the_chart_stacks_to_the_whole_fleet_and_the_waterline_lies_under_the_public() -> None:
    html = page(a_day(8))
    polygons = re.findall(r'<polygon points="([^"]+)" style="fill: var\((--[\w]+)\)"', html)
    assert [colour for _, colour in polygons] == ["--t1", "--idle", "--public"]  # from the bottom
    corners = [[tuple(map(float, point.split(","))) for point in points.split()] for points, _ in polygons]
    assert all(len(outline) == 2 * 48 for outline in corners)
    top = {y for _, y in corners[-1][:48]}
    assert top == {12.0}  # 32 of 32 GPUs at every hour
    line = re.search(r'<polyline class="surface" points="([^"]+)"', html)
    assert line is not None
    waterline = [float(point.split(",")[1]) for point in line[1].split()]
    assert len(set(waterline)) == 2
    assert max(waterline) == waterline[2 * 20]  # it drops in the evening: y grows downwards


def test_the_chart_is_a_table_too_and_has_words_for_those_who_do_not_see_it() -> None:
    reader = Reader(page(a_day(8)))
    (svg,) = reader.all("svg")
    assert svg["role"] == "img"
    named_by = str(svg["aria-labelledby"]).split()
    assert {one.get("id") for one in (*reader.all("title"), *reader.all("desc"))} >= set(named_by)
    text = "".join(reader.text)
    assert "19:00: public 12, research 4, idle 16; public borrows 8.8 from research 19:00-23:00." in text
    assert len(reader.all("caption")) == len(reader.all("table")) == 7
    assert all(one.get("scope") in {"col", "row"} for one in reader.all("th"))


def test_what_scrolls_or_moves_can_be_reached_with_the_keyboard() -> None:
    reader = Reader(page(a_day(8)))
    scrolling = [one for one in reader.all("div") if one.get("class") == "scroll"]
    assert scrolling
    assert all(one.get("tabindex") == "0" and one.get("aria-label") for one in scrolling)
    (slider,) = reader.all("input")
    assert (slider["type"], slider["min"], slider["max"], slider["value"]) == ("range", "0", "23", "19")
    assert any(one.get("for") == slider["id"] for one in reader.all("label"))


def test_thousands_of_replicas_are_a_few_rows() -> None:
    html = page(an_iceberg())
    assert len(html) < 100_000
    assert "Not served: 0.4% of what public asks of model-03 in a day" in html


def test_the_page_is_written_whole_or_not_at_all(tmp_path: Path) -> None:
    write_page(small_plan(), tmp_path / "plan.html")
    assert (tmp_path / "plan.html").read_text() == page(small_plan())
    assert [path.name for path in tmp_path.iterdir()] == ["plan.html"]
    with pytest.raises(InputError, match="cannot write .*nowhere.*: No such file.*Choose another place with --html"):
        write_page(small_plan(), tmp_path / "nowhere" / "plan.html")


def test_a_plan_file_is_shown_as_it_is_and_as_a_page(tmp_path: Path) -> None:
    write_plan(a_day(8), tmp_path / "plan.json")
    result = CliRunner().invoke(plan_command, [str(tmp_path / "plan.json"), "--html", str(tmp_path / "plan.html")])
    assert result.exception is None
    assert "public borrows 8.8 from research 19:00-23:00." in result.output
    assert (tmp_path / "plan.html").read_text() == page(a_day(8))
    dash = CliRunner().invoke(plan_command, [str(tmp_path / "plan.json"), "--html", "-"])
    assert isinstance(dash.exception, InputError)
    assert "--html names a file, and '-' is none" in str(dash.exception)
