"""The files of examples/deploy: what a machine can check of them, and that they speak of this program."""

import json
import re
import shlex
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from waterline.cli.up import up
from waterline.outcome import Completion
from waterline.service.metrics import Metrics
from waterline.snapshot import (
    BatchNow,
    EjectionNow,
    JobNow,
    LedgerNow,
    ModelNow,
    MoveNow,
    ReplicaNow,
    Snapshot,
    TenantNow,
    Use,
)
from waterline.workload import Slo

ROOT = Path(__file__).parents[1]
DEPLOY = ROOT / "examples" / "deploy"
OPERATING = (ROOT / "docs" / "operating.md").read_text()
OPTIONS = {option for parameter in up.params for option in parameter.opts}


def told() -> set[str]:
    """Return the names that `/metrics` may have."""
    now = Snapshot(
        at_s=0.0,
        uptime_s=0.0,
        fleet="",
        health="ok",
        gpus=1,
        uses=(Use(pool="a", tenant="public", kind="serving", gpus=1.0),),
        tenants=(TenantNow(tenant="public", gpus=1.0, guarantee_gpus=0.0, deserved_gpus=0.0, limit_gpus=1.0),),
        models=(
            ModelNow(model="m", ready=1, replicas=1, running=0, slots=1, waiting=0, ttft_slo_s=1.0, tpot_slo_s=1.0),
        ),
        latencies=(),
        queues=(),
        replicas=(ReplicaNow(id="m/0", model="m", tenant="", pool="a", node=0, gpus=1, state="ready"),),
        replica_states={},
        jobs=(JobNow(job="j", tenant="public", state="running"),),
        batches=(BatchNow(id="b", tenant="public", client="", status="in_progress", requests=9, ended=4, left_s=1.0),),
        ledger=LedgerNow(waiting_rows=0, lag_s=0.0),
    )
    metrics = Metrics({"m": Slo(ttft_s=1.0, tpot_s=1.0)}, lambda: now)
    metrics.count(
        Completion(
            tenant="public", model="m", replica="m/0", status="ok", arrival_s=0.0, first_token_s=0.1, finish_s=1.0,
            prompt_tokens=1, output_tokens=9,
        )
    )  # fmt: skip
    metrics.moved(MoveNow(at_s=0.0, kind="start", rule="", why="", tenant="public", what="m", pool="a", gpus=1))
    metrics.ejected("m", EjectionNow(at_s=0.0, replica="m/0", reason=""))
    metrics.hedged("m", "won", 0.1)
    metrics.replica_changed("m", "ready")
    return set(re.findall(r"(?m)^(waterline_\w+)", metrics.text().decode()))


def yaml(name: str) -> Any:
    return pytest.importorskip("yaml", reason="PyYAML reads the files: pip install pyyaml").safe_load(
        (DEPLOY / name).read_text()
    )


def options_of(words: list[str]) -> set[str]:
    return {word for word in words if word.startswith("--")}


def test_systemd_finds_no_fault_with_the_unit(tmp_path: Path) -> None:
    analyze = shutil.which("systemd-analyze")
    if not analyze:
        pytest.skip("there is no systemd-analyze: apt-get install systemd")
    unit = (DEPLOY / "waterline.service").read_text()
    (command,) = re.findall(r"(?m)^ExecStart=(.+)$", unit)
    program = Path(sys.executable).with_name("waterline")
    changed = tmp_path / "waterline.service"
    changed.write_text(unit.replace(shlex.split(command)[0], str(program if program.exists() else sys.executable)))
    done = subprocess.run(
        [analyze, "verify", "--man=no", changed], capture_output=True, text=True, timeout=60, check=False
    )
    said = [line for line in done.stderr.splitlines() if "waterline.service" in line]
    assert said == [], done.stderr
    changed.write_text(changed.read_text().replace("KillMode=mixed", "KillMod=mixed"))
    wrong = subprocess.run(
        [analyze, "verify", "--man=no", changed], capture_output=True, text=True, timeout=60, check=False
    )
    assert "KillMod" in wrong.stderr, "it does look"


def test_the_unit_and_the_container_call_options_that_exist() -> None:
    (command,) = re.findall(r"(?m)^ExecStart=(.+)$", (DEPLOY / "waterline.service").read_text())
    assert shlex.split(command)[1] == "up"
    assert options_of(shlex.split(command)) <= OPTIONS
    (entry,) = re.findall(r"(?m)^ENTRYPOINT (.+)$", (DEPLOY / "Dockerfile").read_text())
    assert json.loads(entry)[:2] == ["waterline", "up"]
    assert options_of(json.loads(entry)) <= OPTIONS


def test_compose_starts_what_it_names() -> None:
    compose = yaml("compose.yaml")
    services = compose["services"]
    assert set(services) == {"waterline", "ledger", "front", "prometheus"}
    assert options_of(services["waterline"]["command"]) <= OPTIONS
    assert "@ledger/" in " ".join(services["waterline"]["command"])
    assert (DEPLOY / services["waterline"]["build"]["context"] / services["waterline"]["build"]["dockerfile"]).is_file()
    for name, service in services.items():
        assert set(service.get("depends_on", ())) <= set(services), name
        for volume in service.get("volumes", ()):
            source = volume.split(":")[0]
            there = source in compose["volumes"] or (DEPLOY / source).exists() or source == "./fleet"
            assert there, f"{name}: {source}"
    published = [port for service in services.values() for port in service.get("ports", ())]
    assert {port for port in published if not str(port).startswith("127.0.0.1:")} == {"80:80", "443:443", "443:443/udp"}


def test_fronts_pass_the_api_and_nothing_else() -> None:
    for name in ("Caddyfile", "nginx.conf"):
        text = (DEPLOY / name).read_text()
        assert "8001" not in text, f"{name} shows the admin listener to the world"
        assert "404" in text
        assert "1h" in text, "a request may think longer than a minute"


def test_alerts_and_panels_ask_for_metrics_that_exist() -> None:
    names = told()
    asked = {"alerts.yaml": (DEPLOY / "alerts.yaml").read_text(), "grafana.json": (DEPLOY / "grafana.json").read_text()}
    for file, text in asked.items():
        unknown = set(re.findall(r"\bwaterline_\w+", text)) - names
        assert not unknown, f"{file}: {unknown}"
    panels = json.loads(asked["grafana.json"])["panels"]
    assert len({panel["id"] for panel in panels}) == len(panels) >= 15
    boxes = [panel["gridPos"] for panel in panels]
    assert all(box["x"] + box["w"] <= 24 for box in boxes)


def test_every_alert_is_explained() -> None:
    rules = [rule for group in yaml("alerts.yaml")["groups"] for rule in group["rules"]]
    for rule in rules:
        assert f"`{rule['alert']}`" in OPERATING
        assert rule["annotations"]["summary"].endswith(".")
    assert set(re.findall(r"`(Waterline\w+)`", OPERATING)) == {rule["alert"] for rule in rules}


def test_every_metric_is_in_the_manual_and_no_other() -> None:
    families = {re.sub(r"_(total|bucket|sum|count)$", "", name) for name in told()}
    table = OPERATING.split("## Metrics", 1)[1].split("\n## ", 1)[0]
    documented = {re.sub(r"_total$", "", name) for name in re.findall(r"(?m)^\| `(waterline_\w+)`", table)}
    assert documented == families
