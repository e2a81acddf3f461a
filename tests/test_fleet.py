from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from waterline.errors import FleetFileError, UnknownNameError, WaterlineError
from waterline.fleet import check_fleet, load_fleet

TEN_LINES = """
name = "box"

[[pools]]
name = "box"
gpu = "RTX 4090"

[[models]]
name = "chat"
weights = "meta-llama/Llama-3.1-8B"

[[demand]]
requests_per_s = 1.0
"""

WHOLE = """
name = "whole"
pools = [{ name = "a", gpu = "h100-sxm-80g", nodes = 2, gpus_per_node = 4 }]
models = [{ name = "r1", weights = "deepseek-ai/DeepSeek-R1" }, { name = "chat", weights = "meta-llama/Llama-3.1-8B" }]
tenants = [{ name = "public", guarantee = 1, deserved = 2, limit = 8 }, { name = "lab", deserved = 0.5 }]
demand = [{ tenant = "lab", model = "chat", requests_per_s = 1 }]
jobs = [{ name = "train", tenant = "lab", copies = 2 }]
"""


def write(folder: Path, text: str) -> Path:
    path = folder / "fleet.toml"
    path.write_text(text)
    return path


def test_ten_lines_are_a_fleet(tmp_path: Path) -> None:
    fleet = load_fleet(write(tmp_path, TEN_LINES))
    (pool,), (model,), (tenant,), (demand,) = fleet.pools, fleet.models, fleet.tenants, fleet.demand
    assert (pool.gpu, pool.nodes, pool.gpus_per_node) == ("rtx-4090", 1, 4)
    assert pool.usd_per_gpu_hour is not None
    assert pool.usd_per_gpu_hour > 0
    assert (model.precisions, model.engine, model.max_context_tokens) == (("bf16",), "vllm", 32_768)
    assert model.slo is not None
    assert model.slo.ttft_s == 2.0
    assert (tenant.name, tenant.deserved, tenant.limit) == ("public", 1.0, 1.0)
    assert (demand.tenant, demand.model) == ("public", "chat")


def test_counts_of_gpus_become_fractions(tmp_path: Path) -> None:
    public = load_fleet(write(tmp_path, WHOLE)).tenant("public")
    assert (public.guarantee, public.deserved, public.limit) == (1 / 8, 2 / 8, 1.0)


def test_a_job_takes_a_node_where_one_is_large_enough(tmp_path: Path) -> None:
    two = '{ name = "a", gpu = "h100-sxm-80g", nodes = 2, gpus_per_node = 4 }'
    assert two in WHOLE
    job = load_fleet(write(tmp_path, WHOLE)).job("train")
    assert (job.tenant, job.gpus, job.copies, job.pools) == ("lab", 4, 2, ("a",))
    mixed = WHOLE.replace(two, two + ', { name = "b", gpu = "rtx-4090", gpus_per_node = 2 }').replace(
        "limit = 8", "limit = 10"
    )
    assert load_fleet(write(tmp_path, mixed)).job("train").gpus == 2
    large = load_fleet(write(tmp_path, mixed.replace("copies = 2", "copies = 2, gpus = 4"))).job("train")
    assert large.pools == ("a",)


def test_who_asks_without_a_key_is_the_only_tenant_where_none_is_written(tmp_path: Path) -> None:
    assert load_fleet(write(tmp_path, TEN_LINES)).tenant("public").anonymous == "local"
    assert not any(tenant.anonymous for tenant in load_fleet(write(tmp_path, WHOLE)).tenants)


def test_an_fp8_model_may_also_run_in_int8(tmp_path: Path) -> None:
    assert load_fleet(write(tmp_path, WHOLE)).model("r1").precisions == ("fp8", "int8")


@pytest.mark.parametrize(
    ("before", "after", "message"),
    [
        (
            'gpu = "RTX 4090"',
            'gpuu = "RTX 4090"',
            r"\[\[pools\]\] number 1 \('box'\): unknown key 'gpuu'. Did you mean 'gpu'",
        ),
        ('gpu = "RTX 4090"', "", r"\[\[pools\]\] number 1 \('box'\): the key 'gpu' is missing"),
        ('gpu = "RTX 4090"', 'gpu = "RTX 4900"', r"'gpu' of pool 'box': .*'rtx-4090'"),
        (
            'gpu = "RTX 4090"',
            'gpu = "RTX 4090"\nnodes = "two"',
            r"'nodes' of \[\[pools\]\] number 1 \('box'\): expected a whole number, got text",
        ),
        ('gpu = "RTX 4090"', 'gpu = "RTX 4090"\nnodes = 0', r"'nodes' of .*: expected a whole number >= 1"),
        (
            'weights = "meta-llama/Llama-3.1-8B"',
            'weights = "llama-3.1-9b"',
            r"'weights' of model 'chat': .*Llama-3.1-8B",
        ),
        ('weights = "meta-llama/Llama-3.1-8B"', 'weights = "./nowhere"', r"there is no file .*nowhere"),
        ("requests_per_s = 1.0", "", "needs either requests_per_s or a trace"),
        ("requests_per_s = 1.0", "requests_per_s = [1.0, 2.0]", "lists 2 rates. Write one number, or 24"),
        ("requests_per_s = 1.0", 'trace = "friday.csv"', "there is no trace .*friday.csv"),
        ("requests_per_s = 1.0", 'requests_per_s = 1.0\nmodel = "chatt"', "has no model 'chatt'. Did you mean 'chat'"),
        (
            "requests_per_s = 1.0",
            "requests_per_s = 1.0\nprompt_tokens = 90_000",
            "90000 .* max_context_tokens of model 'chat' is 32768",
        ),
        ('name = "chat"', 'name = "chat"\nprecisions = ["fp9"]', "'fp9' in precisions of model 'chat' is not known"),
        (
            'name = "chat"',
            'name = "chat"\nmax_context_tokens = 999_999',
            "999999 .* is more than the model's own 131072",
        ),
        ('name = "chat"', 'name = "chat"\nengine = "vlm"', "no engine is called 'vlm'. Did you mean 'vllm'"),
        (
            'name = "chat"',
            'name = "chat"\nengine = "trtllm"',
            "engine 'trtllm' of model 'chat' is priced by waterline fit .* cannot be planned or started. Write engine",
        ),
        ('name = "chat"', 'name = "chat"\nengine = "openai"', "needs both engine"),
        (
            'name = "chat"',
            'name = "chat"\nengine_arguments = ["--enable-lora", "--port=9"]',
            "'engine_arguments' of model 'chat': '--port=9' is not yours to give: .* Leave it out",
        ),
        (
            'name = "chat"',
            'name = "chat"\nengine_arguments = "--enable-lora"',
            "'engine_arguments' of .*expected a list",
        ),
        ('name = "chat"', 'name = "chat"\nslo = { ttft = 1 }', "unknown key 'ttft'. Did you mean 'ttft_s'"),
        (
            'name = "chat"',
            'name = "chat"\nmeasured = [{ gpu = "h800", gpus = 8, prompt_tokens_per_s = 9e4 }]',
            "'measured\\[0\\]' of .*: the key 'output_tokens_per_s' is missing",
        ),
        (
            'name = "chat"',
            'name = "chat"\nmeasured = [{ gpu = "h800x", gpus = 8, prompt_tokens_per_s = 9, output_tokens_per_s = 9 }]',
            "'gpu' of what was measured of model 'chat': .*h800",
        ),
        (
            'name = "chat"',
            (
                'name = "chat"\nmeasured = [{ gpu = "4090", gpus = 1, prompt_tokens_per_s = 9, output_tokens_per_s = 9 }, '
                '{ gpu = "RTX 4090", gpus = 1, prompt_tokens_per_s = 9, output_tokens_per_s = 9 }]'
            ),
            "model 'chat' was measured twice on 'rtx-4090'",
        ),
        ("requests_per_s = 1.0", "requests_per_s = 1.0\nprefix_hit = 1.5", "'prefix_hit' of .*: expected a number < 1"),
        (
            "[[pools]]",
            'objective = "speed"\n[[pools]]',
            "'objective': 'speed' is none. Write one of: money, energy, goodput",
        ),
        ("[[pools]]", "[[pool]]", "unknown key 'pool'. Did you mean 'pools'"),
        ("[[models]]", "[[models]", "not valid TOML: .*line"),
    ],
)
def test_a_mistake_is_answered_with_file_place_and_remedy(
    tmp_path: Path, before: str, after: str, message: str
) -> None:
    assert before in TEN_LINES
    path = write(tmp_path, TEN_LINES.replace(before, after, 1))
    with pytest.raises(WaterlineError, match=message) as caught:
        load_fleet(path)
    assert str(path) in str(caught.value)


@pytest.mark.parametrize(
    ("before", "after", "message"),
    [
        (
            "deserved = 0.5",
            "deserved = 0.9",
            r"deserved add up to 1.15 of the fleet's 8 GPUs: 0.25 \(public\) \+ 0.9 \(lab\)",
        ),
        ("guarantee = 1,", "guarantee = 3,", "must not fall: guarantee <= deserved <= limit"),
        ("limit = 8", "limit = 9", "limit = 9 GPUs of tenant 'public' is outside the fleet's 8 GPUs"),
        ("deserved = 0.5", "deserved = -0.5", "outside the fleet's 8 GPUs"),
        ('tenant = "lab", ', "", "does not say which tenant. Add tenant = one of: public, lab"),
        ('name = "chat"', 'name = "r1"', "two models are called 'r1'"),
        ('name = "public"', 'name = "public", grace_s = -1', "'grace_s' of .*: expected a number >= 0"),
        ('tenant = "lab", copies', 'tenant = "labb", copies', "job 'train': .*no tenant 'labb'. Did you mean 'lab'"),
        ('tenant = "lab", copies', "copies", "job 'train' does not say which tenant. Add tenant = one of: public, lab"),
        ("copies = 2", "gpus = 8", "gpus = 8 of job 'train' are for one node, and those of pool 'a' have 4"),
        ("copies = 2", 'pools = ["b"]', "job 'train': the fleet has no pool 'b'"),
        ("copies = 2", "checkpoint_evry_s = 5", "number 1 .'train'.: unknown key 'checkpoint_evry_s'"),
        ('name = "train"', 'name = "chat"', "job 'chat' is called like a model"),
        (
            "deserved = 0.5",
            "deserved = 0, limit = 2",
            "gpus = 4 of job 'train' are more than the limit .*'lab', 2 GPUs",
        ),
    ],
)
def test_shares_names_and_jobs_are_checked(tmp_path: Path, before: str, after: str, message: str) -> None:
    assert before in WHOLE
    with pytest.raises((FleetFileError, UnknownNameError), match=message):
        load_fleet(write(tmp_path, WHOLE.replace(before, after, 1)))


def test_one_tenant_at_most_asks_without_a_key(tmp_path: Path) -> None:
    both = WHOLE.replace('name = "public"', 'name = "public", anonymous = true').replace(
        'name = "lab"', 'name = "lab", anonymous = true'
    )
    with pytest.raises(FleetFileError, match=r"those of public and of lab: each is anonymous"):
        load_fleet(write(tmp_path, both))
    with pytest.raises(
        FleetFileError, match=r"number 1 \('public'\): 'lokal' is none. Write one of: true, false, \"local\""
    ):
        load_fleet(write(tmp_path, both.replace("true", '"lokal"')))


def test_a_missing_file_is_named(tmp_path: Path) -> None:
    with pytest.raises(FleetFileError, match="cannot read the fleet file .*fleet.toml: No such file"):
        load_fleet(tmp_path / "fleet.toml")


def test_a_file_that_is_not_text_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "fleet.toml"
    path.write_bytes(b"GGUF\x03\x00\xff\xfe")
    with pytest.raises(FleetFileError, match="is not text in UTF-8"):
        load_fleet(path)


def test_the_wrong_pool_is_answered_with_the_ones_there_are(tmp_path: Path) -> None:
    with pytest.raises(UnknownNameError, match="no pool 'b'. Known: a"):
        load_fleet(write(tmp_path, WHOLE)).pool("b")


keys = st.sampled_from(["name", "pools", "models", "tenants", "demand", "gpu", "nodes", "slo", "extra"])
values = st.recursive(
    st.none() | st.booleans() | st.integers(-9, 9) | st.floats(-2, 2) | st.sampled_from(["", "h100", "x"]),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(keys, inner, max_size=4),
    max_leaves=12,
)


def toml(value: object) -> str:
    if isinstance(value, dict):
        return "{" + ", ".join(f"{key} = {toml(item)}" for key, item in value.items() if item is not None) + "}"
    if isinstance(value, list):
        return "[" + ", ".join(toml(item) for item in value if item is not None) + "]"
    return str(value).lower() if isinstance(value, bool) else repr(value)


@settings(max_examples=200)
@given(table=st.dictionaries(keys, values, max_size=6))
def test_whatever_is_written_the_answer_is_a_fleet_or_one_of_our_errors(
    tmp_path_factory: pytest.TempPathFactory, table: dict[str, object]
) -> None:
    text = "\n".join(f"{key} = {toml(value)}" for key, value in table.items() if value is not None)
    try:
        load_fleet(write(tmp_path_factory.mktemp("fleets"), text))
    except WaterlineError as error:
        assert str(error).endswith((".", "?", "…", "'")), str(error)


@pytest.mark.parametrize(
    ("before", "after", "message"),
    [
        (
            'name = "chat"',
            'name = "chat"\nslo = { ttft_s = 0.0, tpot_s = 0.1 }',
            "ttft_s = 0 in slo of model 'chat' must lie between 0 and 86400",
        ),
        ('name = "chat"', 'name = "chat"\nslo = { ttft_s = 1.0, tpot_s = inf }', "tpot_s = inf in slo"),
        (
            'name = "chat"',
            'name = "chat"\nslo = { ttft_s = 1.0, tpot_s = 0.1, fraction = 1.0 }',
            "fraction = 1 in slo .* between 0 and 1",
        ),
        ('name = "chat"', 'name = "chat"\nslo = { ttft_s = 1.0, tpot_s = 0.1, fraction = nan }', "fraction = nan"),
        ("requests_per_s = 1.0", "requests_per_s = inf", "'requests_per_s' of .*number 1: expected"),
        ("requests_per_s = 1.0", "requests_per_s = -1.0", "'requests_per_s' of .*number 1: expected"),
        ('gpu = "RTX 4090"', 'gpu = "RTX 4090"\nusd_per_gpu_hour = inf', "'usd_per_gpu_hour' of .*: expected a number"),
        (
            'gpu = "RTX 4090"',
            'gpu = "RTX 4090"\nnodes = 100_000_000',
            "'nodes' of .*: expected a whole number <= 10000000",
        ),
        ('name = "chat"', 'name = " chat"', "the name ' chat' of a model has blanks around it"),
        ('name = "chat"', r'name = "chat\u001b[31m"', "what cannot be printed"),
        (
            'name = "chat"',
            'name = "chat"\nprecisions = ["q4_k_m"]',
            "'q4_k_m' .* is a format of llama.cpp, and its engine is vllm",
        ),
        (
            'name = "chat"',
            'name = "chat"\nengine = "openai"\nurl = "nonsense"',
            "url = 'nonsense' of model 'chat' must begin with http",
        ),
    ],
)
def test_numbers_and_names_that_mean_nothing_are_refused(tmp_path: Path, before: str, after: str, message: str) -> None:
    with pytest.raises(FleetFileError, match=message):
        load_fleet(write(tmp_path, TEN_LINES.replace(before, after, 1)))


def test_an_empty_file_and_a_byte_order_mark(tmp_path: Path) -> None:
    with pytest.raises(FleetFileError, match="is empty. A fleet needs at least name"):
        load_fleet(write(tmp_path, "\n"))
    assert load_fleet(write(tmp_path, "\ufeff" + TEN_LINES)).name == "box"


def test_checking_a_fleet_twice_changes_nothing(tmp_path: Path) -> None:
    path = write(tmp_path, WHOLE)
    fleet = load_fleet(path)
    assert check_fleet(fleet, path) == fleet
