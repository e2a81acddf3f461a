"""`waterline estimate`: tables in, tables out, and a row that cannot be says why without stopping the others."""

import csv
import os
from collections.abc import Sequence
from pathlib import Path

import pytest
from click.testing import CliRunner, Result

from waterline import catalog
from waterline.catalog.engines import find_engine
from waterline.cli.estimate import FIGURES, FOUND, estimate, read_layout, read_precision
from waterline.cost import estimate_replica, step_cost
from waterline.errors import InputError, UnknownNameError
from waterline.plan import Layout

IN = (
    "model", "gpu", "engine", "precision", "isl", "osl", "concurrency",
    "tp", "pp", "attention_dp", "moe_tp", "moe_ep", "prefix_hit",
)  # fmt: skip
USUAL = {"model": "meta-llama/Llama-3.1-8B", "gpu": "h100_sxm", "isl": "1000", "osl": "200", "concurrency": "8"}


def write(path: Path, rows: Sequence[dict[str, str]], columns: Sequence[str] = IN) -> Path:
    with path.open("w", newline="") as file:
        writer = csv.DictWriter(file, columns, restval="", extrasaction="ignore")
        writer.writeheader()
        writer.writerows(rows)
    return path


def run(*arguments: str | Path) -> Result:
    return CliRunner().invoke(estimate, list(map(str, arguments)))


def answers(tmp_path: Path, *changes: dict[str, str]) -> list[dict[str, str]]:
    """Return the rows found for the usual point with these cells changed."""
    out = tmp_path / "out.csv"
    result = run("--points", write(tmp_path / "points.csv", [USUAL | change for change in changes]), "-o", out)
    assert result.exit_code == 0, result.output
    with out.open(newline="") as file:
        return list(csv.DictReader(file))


def refused(tmp_path: Path, change: dict[str, str]) -> str:
    """Return why a point is refused, and see that its neighbours are answered."""
    before, row, after = answers(tmp_path, {}, change, {})
    assert not before["error"]
    assert before == after
    assert not any(row[name] for name in FOUND if name != "error")
    return row["error"]


def test_every_column_comes_back_with_three_figures_each(tmp_path: Path) -> None:
    whole = USUAL | {
        "engine": "sglang", "precision": "fp8", "tp": "2", "pp": "1",
        "attention_dp": "1", "moe_tp": "1", "moe_ep": "1", "prefix_hit": "0.25",
    }  # fmt: skip
    (row,) = answers(tmp_path, whole)
    assert list(row) == [*IN, *FOUND]
    assert {name: row[name] for name in IN} == whole
    for name in FIGURES:
        assert 0 < float(row[name + "_low"]) < float(row[name]) < float(row[name + "_high"])
    assert 0 < float(row["memory_gib_per_gpu"]) < 80
    assert row["provenance"] in {"measured", "interpolated", "transferred", "physics"}
    assert not row["error"]


def test_figures_are_those_of_the_cost_model_in_the_units_of_the_columns(tmp_path: Path) -> None:
    (row,) = answers(tmp_path, {"tp": "2", "precision": "fp8", "engine": "vllm", "prefix_hit": "0.5"})
    llm, gpu = catalog.find_model(USUAL["model"]), catalog.find_gpu("h100-sxm-80g")
    engine, layout = find_engine("vllm").on(gpu), Layout(tp=2)
    found = estimate_replica(
        llm, gpu, layout, "fp8", engine, step_cost(llm, gpu, layout, "fp8", engine),
        prompt_tokens=1000, output_tokens=200, concurrency=8, prefix_hit=0.5,
    )  # fmt: skip
    assert float(row["ttft_ms"]) == pytest.approx(found.ttft_s.value * 1000, rel=1e-5)
    assert float(row["tpot_ms_high"]) == pytest.approx(found.tpot_s.high * 1000, rel=1e-5)
    assert float(row["tokens_per_s_per_gpu_low"]) == pytest.approx(found.tokens_per_s_per_gpu.low, rel=1e-5)
    assert float(row["memory_gib_per_gpu"]) == pytest.approx(found.needed_bytes_per_gpu / 2**30, abs=1e-3)


def test_cards_are_found_as_the_measured_tables_spell_them(tmp_path: Path) -> None:
    names = ["h100_sxm", "h200_sxm", "b200_sxm", "a100_sxm", "l40s", "rtx_pro_6000_server"]
    rows = answers(tmp_path, *({"gpu": name} for name in names))
    assert [row["error"] for row in rows] == [""] * len(names)
    assert len({row["tpot_ms"] for row in rows}) == len(names)


def test_blank_cells_and_absent_columns_mean_the_default(tmp_path: Path) -> None:
    spelled = {
        "engine": "vllm", "precision": "bf16", "tp": "1", "pp": "1",
        "attention_dp": "1", "moe_tp": "1", "moe_ep": "1", "prefix_hit": "0",
    }  # fmt: skip
    blank = dict.fromkeys(spelled, " ")
    zero = blank | {"tp": "0", "pp": "0", "attention_dp": "0", "moe_tp": "0", "moe_ep": "0"}
    rows = answers(tmp_path, spelled, blank, zero)
    assert len({row["ttft_ms"] for row in rows}) == 1
    short = write(tmp_path / "short.csv", [USUAL], list(USUAL))
    (printed,) = csv.DictReader(run("--points", short).output.splitlines())
    assert printed["ttft_ms"] == rows[0]["ttft_ms"]


def test_columns_of_ones_own_are_kept_and_answers_of_an_earlier_run_replaced(tmp_path: Path) -> None:
    columns = ["run", *USUAL, "tpot_ms"]
    points = write(tmp_path / "points.csv", [USUAL | {"run": "17, first", "tpot_ms": "nonsense"}], columns)
    (row,) = csv.DictReader(run("--points", points).output.splitlines())
    assert row["run"] == "17, first"
    assert float(row["tpot_ms"]) > 0


def test_concurrency_is_that_of_each_rank(tmp_path: Path) -> None:
    sparse = {"model": "Qwen/Qwen3-30B-A3B", "concurrency": "4"}
    one, four = answers(tmp_path, sparse, sparse | {"attention_dp": "4", "moe_ep": "4"})
    assert not four["error"]
    assert float(four["tokens_per_s_per_gpu"]) > 0.3 * float(one["tokens_per_s_per_gpu"])


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"model": "llama-9"}, "'llama-9'"),
        ({"model": ""}, "''"),
        ({"gpu": "h900"}, "'h900'"),
        ({"engine": "vlm"}, "no engine is called 'vlm'. Did you mean 'vllm'"),
        ({"precision": "fp9"}, "no precision is called 'fp9'"),
        ({"precision": "fp8", "gpu": "a100_sxm"}, "a100-sxm-80g cannot compute in fp8"),
        ({"isl": ""}, "isl = '' is not a number"),
        ({"isl": "nan"}, "isl = 'nan' is not a number"),
        ({"isl": "inf"}, "isl = 'inf' is not a number"),
        ({"isl": "many"}, "isl = 'many' is not a number"),
        ({"osl": "0"}, "osl = '0' should be a whole number from 1"),
        ({"osl": "-5"}, "osl = '-5' should be a whole number from 1"),
        ({"osl": "1.5"}, "osl = '1.5' should be a whole number"),
        ({"concurrency": "-1"}, "concurrency = '-1' should be"),
        ({"concurrency": "1e30"}, "concurrency = '1e30' should be a whole number from 1 to"),
        ({"tp": "-2"}, "tp = '-2' should be"),
        ({"tp": "nan"}, "tp = 'nan' is not a number"),
        ({"prefix_hit": "1.5"}, "prefix_hit = 1.5 should be a share from 0 to 1"),
        ({"prefix_hit": "nan"}, "prefix_hit = 'nan' is not a number"),
        ({"prefix_hit": "-0.5"}, "prefix_hit = -0.5 should be"),
        ({"isl": "200000"}, "has a context of 131072"),
        ({"tp": "2", "moe_ep": "3"}, "moe_ep = 3 does not divide tp x attention_dp = 2"),
        ({"model": "meta-llama/Meta-Llama-3.1-405B"}, "does not fit. Take more cards or fewer bits"),
    ],
)
def test_a_row_that_cannot_be_says_why_and_the_others_are_answered(
    tmp_path: Path, change: dict[str, str], message: str
) -> None:
    assert message in refused(tmp_path, change)


def test_it_counts_what_was_estimated(tmp_path: Path) -> None:
    points = write(tmp_path / "points.csv", [USUAL, USUAL | {"isl": "x"}, USUAL])
    result = run("--points", points, "-o", tmp_path / "out.csv")
    assert f"2 of 3 points estimated; {tmp_path / 'out.csv'}" in result.output


def test_a_table_without_rows_has_only_its_columns(tmp_path: Path) -> None:
    result = run("--points", write(tmp_path / "points.csv", []))
    assert result.output.strip().split(",") == [*IN, *FOUND]


# --- Files that are no tables of points -----------------------------------------------------------------------------


def failed(*arguments: str | Path) -> InputError:
    result = run(*arguments)
    assert isinstance(result.exception, InputError), result.output
    assert result.exception.exit_code == 2
    assert not result.output
    return result.exception


def test_a_missing_column_is_named(tmp_path: Path) -> None:
    points = write(tmp_path / "points.csv", [USUAL], ["model", "gpu", "isl"])
    assert str(failed("--points", points)) == (
        f"{points} has no column osl, concurrency or request_rate. It needs model, gpu, isl, osl, concurrency or "
        "request_rate."
    )


@pytest.mark.parametrize("data", [b"", b"\x89PNG\r\n\x1a\n\x00\x00", b"{}\n", b"\xff\xfe\x00m"])
def test_what_is_no_table_is_refused(tmp_path: Path, data: bytes) -> None:
    points = tmp_path / "points.csv"
    points.write_bytes(data)
    message = str(failed("--points", points))
    assert message.startswith(str(points))
    assert "is not a CSV file" in message or "has no column" in message


def test_a_row_with_more_cells_than_columns_is_named(tmp_path: Path) -> None:
    points = write(tmp_path / "points.csv", [USUAL, USUAL], list(USUAL))
    points.write_text(points.read_text() + "a,b,1,2,3,4,5\n")
    assert str(failed("--points", points)) == f"{points}:4: more cells than the 5 columns."


def test_an_open_quote_is_no_table(tmp_path: Path) -> None:
    points = write(tmp_path / "points.csv", [USUAL], list(USUAL))
    points.write_text(points.read_text() + '"a,b\n')
    assert "is not a CSV file" in str(failed("--points", points))


def test_files_that_are_not_there_or_folders_are_refused_by_their_option(tmp_path: Path) -> None:
    for path in (tmp_path, tmp_path / "nowhere.csv"):
        result = run("--points", path)
        assert result.exit_code == 2
        assert str(path) in result.output
        assert "--points" in result.output
    assert run().exit_code == 2


def test_a_table_that_may_not_be_read_says_so(tmp_path: Path) -> None:
    points = write(tmp_path / "points.csv", [USUAL])
    points.chmod(0)
    if os.access(points, os.R_OK):
        pytest.skip("this user may read everything")
    assert "cannot be read: Permission denied" in str(failed("--points", points))


def test_an_answer_that_cannot_be_written_says_so(tmp_path: Path) -> None:
    points = write(tmp_path / "points.csv", [USUAL])
    out = tmp_path / "no" / "such" / "folder" / "out.csv"
    assert str(failed("--points", points, "-o", out)) == f"{out} cannot be written: No such file or directory."
    blocked = points / "out.csv"
    assert str(blocked) in str(failed("--points", points, "-o", blocked))


# --- What cells mean -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("degrees", "layout"),  # tp, pp, attention_dp, moe_tp, moe_ep
    [
        ((1, 1, 1, 1, 1), Layout()),
        ((8, 1, 1, 8, 1), Layout(tp=8)),
        ((8, 1, 1, 1, 8), Layout(tp=8, ep=8)),
        ((1, 1, 8, 1, 8), Layout(dp=8, ep=8)),
        ((2, 1, 4, 2, 4), Layout(tp=2, dp=4, ep=4)),
        ((4, 2, 1, 1, 1), Layout(tp=4, pp=2)),
    ],
)
def test_degrees_are_a_layout(degrees: tuple[int, int, int, int, int], layout: Layout) -> None:
    assert read_layout(*degrees) == (layout, "")


@pytest.mark.parametrize(
    ("degrees", "layout"),
    [
        ((64, 1, 1, 8, 8), Layout(tp=8, ep=8)),
        ((4, 1, 4, 1, 16), Layout(dp=4, ep=4)),
    ],
)
def test_products_of_degrees_are_read_as_the_cards_they_are_and_say_so(
    degrees: tuple[int, int, int, int, int], layout: Layout
) -> None:
    assert read_layout(*degrees) == (layout, f"read as {layout.gpus} GPUs, {layout}")


def test_precisions_are_read_as_tables_spell_them() -> None:
    llama = catalog.find_model("meta-llama/Llama-3.1-8B")
    assert [read_precision(name, llama) for name in ("", "FP8", "fp4", "AWQ", "bf16")] == [
        "bf16", "fp8", "nvfp4", "int4", "bf16",
    ]  # fmt: skip
    with pytest.raises(UnknownNameError, match="no precision is called 'bf17'. Did you mean"):
        read_precision("bf17", llama)
