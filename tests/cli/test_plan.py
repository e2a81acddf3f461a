from pathlib import Path

from click.testing import CliRunner

from waterline.cli.plan import plan
from waterline.errors import FleetFileError, InputError
from waterline.plan import read_plan

FLEET = """
name = "gaming"
pools = [{ name = "a", gpu = "rx-7900xtx", nodes = 2 }]
models = [{ name = "m", weights = "Qwen/Qwen3-8B", precisions = ["fp8", "int4"], engine = "llamacpp" }]
demand = [{ requests_per_s = 0.1 }]
"""


def test_a_card_without_a_price_gets_one_on_the_command_line(tmp_path: Path) -> None:
    fleet, made = tmp_path / "fleet.toml", tmp_path / "plan.json"
    fleet.write_text(FLEET)
    refused = CliRunner().invoke(plan, [str(fleet)])
    assert isinstance(refused.exception, FleetFileError)
    assert "--price rx-7900xtx=USD" in str(refused.exception)
    priced = CliRunner().invoke(plan, [str(fleet), "--price", "rx-7900xtx=0.25", "-o", str(made)])
    assert priced.exit_code == 0, priced.output
    assert read_plan(made).fleet.pools[0].usd_per_gpu_hour == 0.25
    again = CliRunner().invoke(plan, [str(made), "--price", "rx-7900xtx=0.25"])
    assert isinstance(again.exception, InputError)
    assert "was made at its own prices" in str(again.exception)
