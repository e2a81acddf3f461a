import json
import os
from pathlib import Path
from typing import Any

import pytest
from msgspec.structs import replace

from examples import small_plan
from plans import a_day
from waterline.errors import PlanFileError
from waterline.plan import Layout, Plan, Shape, is_plan, read_plan, write_plan


def test_a_plan_survives_its_file(tmp_path: Path) -> None:
    plan = small_plan()
    write_plan(plan, tmp_path / "plan.json")
    assert read_plan(tmp_path / "plan.json") == plan
    assert [path.name for path in tmp_path.iterdir()] == ["plan.json"]


def test_a_plan_that_cannot_be_written_leaves_nothing_behind(tmp_path: Path) -> None:
    with pytest.raises(PlanFileError, match="cannot write .*: No such file"):
        write_plan(small_plan(), tmp_path / "nowhere" / "plan.json")


@pytest.mark.parametrize(
    ("data", "message"),
    [
        (b"{", "is not a plan: .*Write it again with: waterline plan FLEET"),
        (b"[]", "is not a plan"),
        (b"[" * 100_000, "is not a plan"),
        (b'{"version": 3, "fleet": 3}', r"is not a plan: .*\$.fleet"),
        (b'{"version": 3, "fleet": {"name": "\xff"}}', "is not a plan: 'utf-8' codec"),
    ],
)
def test_a_file_that_is_no_plan_is_refused(tmp_path: Path, data: bytes, message: str) -> None:
    (tmp_path / "plan.json").write_bytes(data)
    with pytest.raises(PlanFileError, match=message):
        read_plan(tmp_path / "plan.json")


def test_a_plan_of_another_version_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "plan.json"
    write_plan(small_plan(), path)
    path.write_text(path.read_text().replace('"version": 3', '"version": 1, "of_old": true', 1))
    with pytest.raises(PlanFileError, match="version 1, this program reads 3"):
        read_plan(path)


def test_a_layout_says_only_what_is_not_one() -> None:
    assert str(Layout()) == "tp1"
    assert str(Layout(tp=8, pp=2)) == "tp8 pp2"
    assert Layout(tp=8, pp=2, ep=8).gpus == 16


def edited(folder: Path, where: str, value: object, plan: Plan | None = None) -> Path:
    """Write a plan with one value changed by hand, or added to; `where` is like ``replicas.0.layout.tp``."""
    path = folder / "plan.json"
    write_plan(plan or small_plan(), path)
    data = json.loads(path.read_text())
    *keys, last = [int(key) if key.isdigit() else key for key in where.split(".")]
    part: Any = data
    for key in keys:
        part = part[key]
    part[last] = value
    path.write_text(json.dumps(data).replace("Infinity", "1e999"))
    return path


@pytest.mark.parametrize(
    ("where", "value", "message"),
    [
        ("replicas.0.layout.tp", 0, "replica 'chat/0': layout.tp = 0: expected `int` >= 1"),
        ("replicas.0.layout.tp", -2, "replica 'chat/0': layout.tp = -2: expected `int` >= 1"),
        ("replicas.0.layout.tp", 4096, "replica 'chat/0': places: 1 GPUs, but layout tp4096 takes 4096"),
        ("replicas.0.layout.tp", 10**30, "replica 'chat/0': layout.tp = 1000000000000000000000000000000: "),
        ("replicas.0.layout.pp", -1, "replica 'chat/0': layout.pp = -1"),
        ("replicas.0.layout.dp", 0, "replica 'chat/0': layout.dp = 0"),
        ("replicas.0.layout.xp", 1, "replica 'chat/0': layout: object contains unknown field `xp`"),
        ("replicas.0.precision", "fp9", "replica 'chat/0': precision = 'fp9' is not known. Did you mean "),
        ("replicas.0.engine", "vlm", "replica 'chat/0': engine = 'vlm' is not known. Did you mean 'vllm'"),
        ("replicas.0.model", "chatt", "replicas: model 'chat' has none"),
        ("replicas.0.pool", "bax", "replica 'chat/0': pool = 'bax' is not known. Did you mean 'box'"),
        ("replicas.0.max_batch", 0, "replica 'chat/0': max_batch = 0"),
        ("replicas.0.max_batch", -1, "replica 'chat/0': max_batch = -1"),
        ("replicas.0.cache_tokens", -5, "replica 'chat/0': cache_tokens = -5"),
        ("replicas.0.usd_per_hour", -0.5, "replica 'chat/0': usd_per_hour = -0.5: expected `float` >= 0.0"),
        ("replicas.0.tokens_per_s", float("inf"), "number out of range"),
        ("replicas.0.requests_per_s", None, "replica 'chat/0': requests_per_s: expected `float`, got `null`"),
        ("replicas.0.id", "", "expected `str` of length >= 1"),
        ("replicas.0.places", [], "replica 'chat/0': places: 0 GPUs, but layout tp1 takes 1"),
        ("replicas.0.places.0.node", 1, "GPU 0 of node 1 is not in pool 'box', which has 1 x 1 GPUs"),
        ("replicas.0.places.0.node", -1, "replica 'chat/0': places[0].node = -1"),
        ("replicas.0.places.0.gpus", [3], "GPU 3 of node 0 is not in pool 'box'"),
        ("replicas", [], "replicas: model 'chat' has none"),
        ("models", [], "models: 'chat' is there 0 times, not once"),
        ("models.0.model", "chatt", "models: model = 'chatt' is not known. Did you mean 'chat'"),
        ("models.0.requests_per_s", -1, "$.models[0].requests_per_s = -1"),
        ("tenants.0.tenant", "nobody", "tenants: tenant = 'nobody' is not known"),
        ("fleet.demand.0.tenant", "nobody", "fleet: [[demand]]"),
        ("fleet.pools.0.nodes", 0, "$.fleet.pools[0].nodes = 0"),
        ("fleet.models.0.weights", "no/such", "fleet: 'weights' of model 'chat'"),
    ],
)
def test_a_value_that_makes_no_sense_is_named_with_its_place(
    tmp_path: Path, where: str, value: object, message: str
) -> None:
    path = edited(tmp_path, where, value)
    with pytest.raises(PlanFileError) as caught:
        read_plan(path)
    said = str(caught.value)
    assert said.startswith(str(path))
    assert message in said
    assert said.endswith("Write it again with: waterline plan FLEET")


@pytest.mark.parametrize(
    ("where", "value", "message"),
    [
        ("hours.3.hour", 4, "hours: they are [0, 1, 2, 4, 4, "),
        ("hours.3.hour", 24, "hours[3].hour = 24: expected `int` <= 23"),
        ("hours", [], ""),
        (
            "hours.19.shares.0.tenant",
            "pubic",
            "hour 19: tenant of a share = 'pubic' is not known. Did you mean 'public'",
        ),
        ("hours.19.shares.0.model", "chad", "hour 19: model of a share = 'chad' is not known. Did you mean 'chat'"),
        ("hours.19.loans.0.lender", "x", "hour 19: lender of a loan = 'x' is not known"),
        ("hours.19.loans.0.lender", "", ""),
        ("hours.19.loans.0.borrower", "", "hours[19].loans[0].borrower = '': expected `str` of length >= 1"),
        ("hours.19.starts", ["chat/9"], "hour 19: starts: replica = 'chat/9' is not known. Did you mean 'chat/"),
        ("hours.23.stops", ["r1/0"], "hour 23: stops: replica = 'r1/0' is not known"),
    ],
)
def test_a_day_that_makes_no_sense_is_named_with_its_hour(
    tmp_path: Path, where: str, value: object, message: str
) -> None:
    path = edited(tmp_path, where, value, a_day(8))
    if not message:
        read_plan(path)
        return
    with pytest.raises(PlanFileError) as caught:
        read_plan(path)
    assert message in str(caught.value)


def test_two_replicas_share_neither_an_id_nor_a_gpu(tmp_path: Path) -> None:
    replica = json.loads(edited(tmp_path, "version", 3).read_text())["replicas"][0]
    path = edited(tmp_path, "replicas", [replica, replica])
    with pytest.raises(PlanFileError, match="replica 'chat/0': 2 replicas have this id"):
        read_plan(path)
    path = edited(tmp_path, "replicas", [replica, replica | {"id": "chat/1"}])
    with pytest.raises(PlanFileError, match="'chat/1': places: GPU 0 of node 0 in pool 'box' is taken by 'chat/0'"):
        read_plan(path)


def test_a_model_has_one_shape_on_a_pool_and_it_fits(tmp_path: Path) -> None:
    (replica, *_) = json.loads(edited(tmp_path, "version", 3).read_text())["replicas"]
    shape = {key: replica[key] for key in Shape.__struct_fields__}
    assert read_plan(edited(tmp_path, "shapes", [shape])).shapes[0].layout == small_plan().replicas[0].layout
    for wrong, message in (
        ([shape, shape], "shapes: there are 2 of 'chat' on 'box'. Keep one."),
        ([shape | {"pool": "bax"}], "shape of 'chat' on 'bax': pool = 'bax' is not known. Did you mean 'box'"),
        ([shape | {"layout": {"tp": 64}}], "shape of 'chat' on 'box': layout tp64 takes 64 GPUs, and the pool has"),
    ):
        with pytest.raises(PlanFileError, match=message):
            read_plan(edited(tmp_path, "shapes", wrong))


def test_a_link_stays_a_link_and_what_it_leads_to_is_replaced(tmp_path: Path) -> None:
    (tmp_path / "there").mkdir()
    (tmp_path / "plan.json").symlink_to(tmp_path / "there" / "real.json")
    for _ in range(2):
        write_plan(small_plan(), tmp_path / "plan.json")
        assert (tmp_path / "plan.json").is_symlink()
        assert read_plan(tmp_path / "there" / "real.json") == small_plan()
        assert len(list((tmp_path / "there").iterdir())) == 1


def test_a_device_is_written_through(tmp_path: Path) -> None:
    (tmp_path / "null").symlink_to(os.devnull)
    write_plan(small_plan(), tmp_path / "null")
    assert Path(os.devnull).is_char_device()
    assert (tmp_path / "null").is_symlink()


def test_a_long_name_is_a_name(tmp_path: Path) -> None:
    write_plan(small_plan(), tmp_path / ("n" * 250))
    assert read_plan(tmp_path / ("n" * 250)) == small_plan()


@pytest.mark.parametrize(
    ("name", "message"),
    [("", "Is a directory"), (".", "Is a directory"), ("/", "Is a directory"), ("n" * 300, "too long"), ("\0", "null")],
)
def test_a_name_that_is_none_is_one_clear_error(name: str, message: str) -> None:
    with pytest.raises(PlanFileError, match=f"cannot write .*{message}"):
        write_plan(small_plan(), name)


def test_paths_may_be_text_and_only_plans_are_written(tmp_path: Path) -> None:
    write_plan(small_plan(), str(tmp_path / "plan.json"))
    assert read_plan(str(tmp_path / "plan.json")) == small_plan()
    with pytest.raises(TypeError, match="write_plan writes a Plan, as make_plan returns it, not a Fleet"):
        write_plan(small_plan().fleet, tmp_path / "fleet.json")  # type: ignore[arg-type]


def test_a_plan_is_known_by_its_content(tmp_path: Path) -> None:
    (tmp_path / "a.toml").write_text('\n  {"version": 1}')
    (tmp_path / "b.json").write_text('name = "small"')
    assert is_plan(tmp_path / "a.toml")
    assert not is_plan(tmp_path / "b.json")
    assert not is_plan(tmp_path / "none.json")
    assert not is_plan(tmp_path)


def test_what_serves_side_by_side_is_the_busiest_hour_and_who_finds_its_gpus_free() -> None:
    plan = small_plan()
    (first, *_) = plan.replicas
    night = replace(first, id="chat/night", hours=(0, 1, 2))
    day = replace(first, id="chat/day", hours=tuple(range(3, 24)))
    (place,) = first.places
    elsewhere = replace(night, id="chat/elsewhere", places=(replace(place, gpus=tuple(gpu + 1 for gpu in place.gpus)),))
    assert [one.id for one in replace(plan, replicas=(night, day)).together] == ["chat/night"]
    busy_day = replace(plan, replicas=(night, day, replace(elsewhere, hours=(5,))))
    assert [one.id for one in busy_day.together] == ["chat/day", "chat/elsewhere"]
