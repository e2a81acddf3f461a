"""`waterline estimate`: tables in, tables out, and a row that cannot be says why without stopping the others."""

import csv
import json
import os
from collections.abc import Sequence
from pathlib import Path

import pytest
from click.testing import CliRunner, Result

from waterline import catalog
from waterline.catalog.engines import find_engine
from waterline.cli.estimate import FIGURES, FOUND, estimate, read_layout, read_precision
from waterline.cost import estimate_replica, step_cost
from waterline.errors import InfeasibleError, InputError, UnknownNameError
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
        ({"tp": "8", "moe_tp": "3"}, "moe_tp x moe_ep = 3 does not divide tp x attention_dp = 8"),
        ({"attention_dp": "1e9"}, "attention_dp = '1e9' should be a whole number from 1 to 4_096"),
        ({"precision": "q4_k_m"}, "q4_k_m is a format of llama.cpp, vllm does not run it"),
        ({"engine": "trtllm", "gpu": "mi300x"}, "trtllm does not run on mi300x, but on NVIDIA's cards alone"),
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


# --- At a rate, and split -------------------------------------------------------------------------------------------

AT_RATE = {**{name: cell for name, cell in USUAL.items() if name != "concurrency"}, "request_rate": "4"}
SPLIT = {
    "model": "deepseek-ai/DeepSeek-V3", "gpu": "h800_sxm", "engine": "sglang", "isl": "4096", "osl": "1024",
    "prefix_hit": "0.563", "prefill_attention_dp": "32", "prefill_moe_ep": "32",
    "decode_attention_dp": "144", "decode_moe_ep": "144",
}  # fmt: skip


def asked(tmp_path: Path, *rows: dict[str, str]) -> list[dict[str, str]]:
    """Return what is found for rows as they are."""
    points = write(tmp_path / "points.csv", rows, list(dict.fromkeys(name for row in rows for name in row)))
    result = run("--points", points)
    assert result.exit_code == 0, result.output
    return list(csv.DictReader(result.output.splitlines()))


def test_a_rate_answers_all_that_comes_and_says_what_it_could(tmp_path: Path) -> None:
    slow, fast, loop = asked(tmp_path, AT_RATE, AT_RATE | {"request_rate": "12"}, USUAL)
    assert [slow["error"], fast["error"], loop["error"]] == ["", "", ""]
    assert float(slow["tokens_per_s_per_gpu"]) == pytest.approx(4 * 200)
    assert float(fast["tokens_per_s_per_gpu"]) == pytest.approx(12 * 200)
    assert float(slow["sustained_request_rate"]) == float(fast["sustained_request_rate"]) > 12
    assert not loop["sustained_request_rate"]
    for name in ("ttft_ms", "tpot_ms"):
        assert float(slow[name]) < float(fast[name])
        assert float(fast[name + "_low"]) < float(fast[name]) < float(fast[name + "_high"])


def test_a_replica_that_falls_behind_says_at_which_rate_it_would_not(tmp_path: Path) -> None:
    (fine,) = asked(tmp_path, AT_RATE)
    most = float(fine["sustained_request_rate"])
    within, near, beyond = asked(
        tmp_path, *(AT_RATE | {"request_rate": f"{most * share}"} for share in (0.5, 0.99, 1.01))
    )
    assert not within["note"]
    assert "may fall behind: " in near["note"]
    assert near["ttft_ms_high"] == "inf"
    assert f"answer {most:.4g} (" in beyond["error"]
    assert beyond["error"].endswith("and fall behind. Take at least 2 such replicas.")


def test_split_replicas_express_what_deepseek_ran(tmp_path: Path) -> None:
    rate, loop, mean = asked(
        tmp_path, SPLIT | {"request_rate": "40", "concurrency": ""}, SPLIT | {"concurrency": "1000"}, USUAL
    )
    assert [rate["error"], loop["error"], mean["error"]] == ["", "", ""]
    assert float(rate["tokens_per_s_per_gpu"]) == pytest.approx(40 * 1024 / (32 + 144), rel=1e-5)
    assert "prefill " in rate["note"]
    assert "decode " in rate["note"]
    for row in (rate, loop):
        assert row["provenance"] != "measured"
        assert float(row["sustained_request_rate"]) > 40
        for name in FIGURES:
            assert 0 < float(row[name + "_low"]) <= float(row[name]) <= float(row[name + "_high"])


def test_a_split_closed_loop_has_as_many_requests_under_way_as_clients(tmp_path: Path) -> None:
    few, many, full = asked(tmp_path, *(SPLIT | {"concurrency": clients} for clients in ("16", "500", "100000")))
    rates = [float(row["tokens_per_s_per_gpu"]) * (32 + 144) / 1024 for row in (few, many, full)]
    (open_loop,) = asked(tmp_path, SPLIT | {"request_rate": str(rates[1])})
    assert open_loop["tpot_ms"] == many["tpot_ms"]
    assert float(open_loop["ttft_ms"]) == pytest.approx(float(many["ttft_ms"]), rel=0.02)  # they wait for others alone
    assert rates == sorted(rates)
    assert rates[2] == pytest.approx(float(full["sustained_request_rate"]), rel=1e-3)


def test_more_replicas_of_both_sides_sustain_more(tmp_path: Path) -> None:
    plain = SPLIT | {"request_rate": "10"}
    one, two = asked(tmp_path, plain, plain | {"prefill_replicas": "2", "decode_replicas": "2"})
    assert float(two["sustained_request_rate"]) == pytest.approx(2 * float(one["sustained_request_rate"]), rel=1e-3)


def test_sides_may_be_of_different_cards(tmp_path: Path) -> None:
    plain = {
        "model": "Qwen/Qwen3-32B", "gpu": "h100_sxm", "isl": "2000", "osl": "500", "request_rate": "1",
        "prefill_tp": "2", "decode_tp": "2",
    }  # fmt: skip
    same, other = asked(tmp_path, plain, plain | {"decode_gpu": "a100_sxm"})
    assert float(other["tpot_ms"]) > float(same["tpot_ms"])
    assert other["provenance"] == "interpolated"


@pytest.mark.parametrize(
    ("row", "message"),
    [
        (AT_RATE | {"request_rate": "0"}, "request_rate = '0' should be above 0"),
        (AT_RATE | {"request_rate": "-1"}, "request_rate = '-1' should be above 0"),
        (AT_RATE | {"request_rate": "nan"}, "request_rate = 'nan' is not a number"),
        (AT_RATE | {"request_rate": "fast"}, "request_rate = 'fast' is not a number"),
        (AT_RATE | {"request_rate": "inf"}, "request_rate = 'inf' is not a number"),
        (AT_RATE | {"request_rate": ""}, "neither concurrency nor request_rate given"),
        (AT_RATE | {"concurrency": "1"}, "concurrency and request_rate given. Give one of them."),
        (SPLIT | {"request_rate": "1", "tp": "8"}, "tp stands beside prefill and decode layouts"),
        (SPLIT | {"request_rate": "1000"}, "prefill replicas read"),
        (SPLIT | {"request_rate": "1", "prefill_replicas": "-1"}, "prefill_replicas = '-1' should be a whole number"),
        (SPLIT | {"request_rate": "1", "decode_moe_ep": "7"}, "moe_ep = 7 does not divide"),
        (SPLIT | {"request_rate": "1", "prefill_gpu": "h900"}, "'h900'"),
        (SPLIT | {"request_rate": "1", "prefill_attention_dp": "1", "prefill_moe_ep": "1"}, "does not fit"),
        (USUAL | {"tp": "3"}, "tp = 3 does not divide the 32 heads of meta-llama/Llama-3.1-8B"),
        (USUAL | {"pp": "33"}, "pp = 33 is more than the 32 layers"),
    ],
)
def test_what_cannot_be_is_said(tmp_path: Path, row: dict[str, str], message: str) -> None:
    (found,) = asked(tmp_path, row)
    assert message in found["error"]
    assert not found["ttft_ms"]


def test_shorter_names_of_columns_mean_the_same(tmp_path: Path) -> None:
    sparse = USUAL | {"model": "Qwen/Qwen3-30B-A3B"}
    (short,) = asked(tmp_path, sparse | {"dp": "4", "ep": "4"})
    (long,) = asked(tmp_path, sparse | {"attention_dp": "4", "moe_ep": "4"})
    assert short["ttft_ms"] == long["ttft_ms"]


@pytest.mark.parametrize("name", ["Request-Rate", "prefix-hit", "request_rates", "prefil_tp", "Attention DP"])
def test_a_column_that_is_nearly_one_of_ours_is_not_overlooked(tmp_path: Path, name: str) -> None:
    points = write(tmp_path / "points.csv", [USUAL | {name: "1"}], [*USUAL, name])
    assert f"has a column '{name}'. Is it '" in str(failed("--points", points))


def test_a_column_that_is_there_twice_is_refused(tmp_path: Path) -> None:
    points = tmp_path / "points.csv"
    points.write_text("model,gpu,isl,osl,concurrency,isl\n")
    assert str(failed("--points", points)) == f"{points} has the column 'isl' 2 times."


# --- One point ------------------------------------------------------------------------------------------------------

ONE = ("llama-3.1-8b", "--gpu", "h100_sxm", "--isl", "1000", "--osl", "200")


def test_one_point_needs_no_table(tmp_path: Path) -> None:
    (row,) = answers(tmp_path, {"tp": "2", "prefix_hit": "0.5"})
    result = run(*ONE, "--concurrency", "8", "--tp", "2", "--prefix-hit", "0.5", "--json")
    assert result.exit_code == 0, result.output
    found = json.loads(result.output)
    assert found["model"] == "llama-3.1-8b"
    assert found["tp"] == 2
    for name in (*FIGURES, "memory_gib_per_gpu"):
        assert found[name] == pytest.approx(float(row[name]))
    assert found["provenance"] == row["provenance"]


def test_one_point_is_drawn_with_its_interval_and_where_it_comes_from() -> None:
    result = run(*ONE, "--request-rate", "2")
    assert result.exit_code == 0, result.output
    for said in ("TTFT", "TPOT", "four of five between", "requests/s sustained", "GiB", "measured on the card"):
        assert said in result.output


def test_a_table_comes_back_as_json_too(tmp_path: Path) -> None:
    points = write(tmp_path / "points.csv", [USUAL, USUAL | {"tp": "3"}])
    fine, wrong = json.loads(run("--points", points, "--json").output)
    assert fine["isl"] == 1000
    assert fine["ttft_ms_low"] < fine["ttft_ms"]
    assert "error" not in fine
    assert "does not divide" in wrong["error"]
    assert "ttft_ms" not in wrong


def test_one_point_that_cannot_be_ends_in_its_error() -> None:
    wrong = run(*ONE, "--concurrency", "many")
    assert isinstance(wrong.exception, InputError)
    assert str(wrong.exception) == "concurrency = 'many' is not a number."
    much = run("llama-3.1-405b", "--gpu", "l4", "--isl", "10", "--osl", "10", "--concurrency", "1")
    assert isinstance(much.exception, InfeasibleError)
    assert "does not fit" in str(much.exception)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("llama-3.1-8b",), "--gpu, --isl, --osl is missing"),
        (("--gpu", "h100_sxm"), "Give a MODEL and --gpu"),
        ((), "Give a MODEL and --gpu"),
        ((*ONE, "--points", __file__), "llama-3.1-8b has no place beside --points"),
    ],
)
def test_half_a_question_is_a_usage_error(arguments: tuple[str, ...], message: str) -> None:
    result = run(*arguments)
    assert result.exit_code == 2
    assert message in result.output


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


def test_experts_over_other_cards_than_attention_are_read_otherwise_and_it_is_said() -> None:
    layout, note = read_layout(8, 1, 1, 4, 4)
    assert layout == Layout(tp=8, ep=4)
    assert note == "moe_tp x moe_ep = 16: experts are taken to be over all 8 GPUs of a stage, ep4"


def test_precisions_are_read_as_tables_spell_them() -> None:
    llama = catalog.find_model("meta-llama/Llama-3.1-8B")
    assert [read_precision(name, llama) for name in ("", "FP8", "fp4", "AWQ", "bf16")] == [
        "bf16", "fp8", "nvfp4", "int4", "bf16",
    ]  # fmt: skip
    with pytest.raises(UnknownNameError, match="no precision is called 'bf17'. Did you mean"):
        read_precision("bf17", llama)
