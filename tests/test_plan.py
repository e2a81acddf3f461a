from pathlib import Path

import pytest

from examples import small_plan
from waterline.errors import PlanFileError
from waterline.plan import Layout, read_plan, write_plan


def test_a_plan_survives_its_file(tmp_path: Path) -> None:
    plan = small_plan()
    write_plan(plan, tmp_path / "plan.json")
    assert read_plan(tmp_path / "plan.json") == plan
    assert [path.name for path in tmp_path.iterdir()] == ["plan.json"]


def test_a_plan_that_cannot_be_written_leaves_nothing_behind(tmp_path: Path) -> None:
    with pytest.raises(PlanFileError, match="cannot write .*: No such file"):
        write_plan(small_plan(), tmp_path / "nowhere" / "plan.json")


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("{", "is not a plan: .*Write it again with: waterline plan FLEET"),
        ("[]", "is not a plan"),
        ('{"version": 1, "fleet": 3}', r"is not a plan: .*\$.fleet"),
    ],
)
def test_a_file_that_is_no_plan_is_refused(tmp_path: Path, text: str, message: str) -> None:
    (tmp_path / "plan.json").write_text(text)
    with pytest.raises(PlanFileError, match=message):
        read_plan(tmp_path / "plan.json")


def test_a_plan_of_another_version_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "plan.json"
    write_plan(small_plan(), path)
    path.write_text(path.read_text().replace('"version": 1', '"version": 2', 1))
    with pytest.raises(PlanFileError, match="version 2, this program reads 1"):
        read_plan(path)


def test_a_layout_says_only_what_is_not_one() -> None:
    assert str(Layout()) == "tp1"
    assert str(Layout(tp=8, pp=2)) == "tp8 pp2"
    assert Layout(tp=8, pp=2, ep=8).gpus == 16
