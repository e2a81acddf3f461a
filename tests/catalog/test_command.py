import json
from typing import Any

import pytest
from click.testing import CliRunner

from waterline.cli.catalog import catalog
from waterline.errors import UnknownNameError


def run(*words: str) -> str:
    result = CliRunner().invoke(catalog, words, catch_exceptions=False)
    assert result.exit_code == 0, result.output
    return result.output


def decoded(*words: str) -> Any:
    return json.loads(run(*words, "--json"))


def test_the_table_of_gpus_marks_doubtful_cells() -> None:
    lines = {line.split()[0]: line for line in run("gpus").splitlines()}
    assert "1,597?" in lines["rtx-pro-6000-server"]
    assert "?" not in lines["rtx-4090"]
    assert len(lines) == 78 + 2  # a head and a legend


def test_gpus_of_one_vendor_are_listed() -> None:
    assert {gpu["vendor"] for gpu in decoded("gpus", "--vendor", "AMD")} == {"amd"}
    result = CliRunner().invoke(catalog, ["gpus", "--vendor", "3dfx"])
    assert result.exit_code == 2
    assert "3dfx" in result.output


def test_one_gpu_shows_source_date_and_doubts() -> None:
    shown = run("gpus", "RTX PRO 6000 Server")
    assert "1,597? GB/s" in shown
    assert "doubtful" in shown
    assert "1597 datasheet vs 1792 aiconfigurator" in shown
    assert "source" in shown
    assert "2026-11-23" in shown


def test_json_has_units_in_its_names() -> None:
    gpu = decoded("gpus", "h200-sxm-141g")
    assert gpu["memory_bytes"] == 143771 * 2**20
    assert gpu["memory_bytes_per_s"] == 4.8e12
    assert decoded("prices", "rtx-4090")[0]["unit"] == "usd_per_gpu_hour"


def test_models_are_listed_and_shown() -> None:
    assert "meta-llama/Llama-3.1-8B" in run("models")
    assert "8.03B (8,030,261,248)" in run("models", "llama-3.1-8b")
    assert len(decoded("models")) >= 73


def test_prices_are_listed_and_their_absence_is_explained() -> None:
    assert len(decoded("prices")) == 69
    assert "hyperstack" in run("prices", "h100 pcie")
    assert "usd_per_gpu_hour" in run("prices", "mi50-16g")


@pytest.mark.parametrize("command", ["gpus", "models", "prices"])
def test_an_unknown_name_is_an_error_and_help_has_an_example(command: str) -> None:
    with pytest.raises(UnknownNameError, match="nonsense"):
        run(command, "nonsense")
    help_lines = run(command, "--help").splitlines()
    assert any(line.strip().startswith(f"waterline catalog {command}") for line in help_lines)
