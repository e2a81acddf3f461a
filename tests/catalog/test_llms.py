import csv
import json
from pathlib import Path

import pytest

from waterline import catalog
from waterline.catalog import llms, naming
from waterline.errors import UnknownNameError
from waterline.llm import PRECISIONS, Llm
from waterline.llm.config import read_config

COLLECTED = Path(__file__).parents[2].parent / "shared" / "data"
needs_collected = pytest.mark.skipif(not COLLECTED.exists(), reason="the collected data is not beside the checkout")


def collected() -> list[dict[str, str]]:
    if not COLLECTED.exists():
        return []
    with (COLLECTED / "model_facts.csv").open() as file:
        return list(csv.DictReader(file))


@needs_collected
@pytest.mark.parametrize("row", collected(), ids=lambda row: row["model"])
def test_parameters_are_within_a_thousandth_of_the_reference(row: dict[str, str]) -> None:
    config = COLLECTED / "model_configs" / row["config_file"]
    listed = catalog.models()[row["model"]]
    described = [listed, read_config(config, row["model"])]
    for llm in described:
        assert llm.layers == sum(group.layers for group in llm.attention)
        if row["reference_total_params"]:
            language = int(row["reference_total_params"]) - int(row["reference_vision_params"])
            assert llm.parameters == pytest.approx(language, rel=1e-3)
            assert llm.active_parameters == pytest.approx(int(row["reference_active_incl_embed"]), rel=1e-3)
            expert_weights = int(row["reference_expert_params"])
            assert llm.expert_parameters == pytest.approx(expert_weights, rel=1e-3)
            if row["reference_vision_params"] != "0":
                whole = int(row["reference_total_params"])
                assert llm.parameters + llm.vision_parameters == pytest.approx(whole, rel=1e-5)


@needs_collected
def test_the_table_holds_every_collected_model_and_agrees_with_the_reader() -> None:
    assert {row["model"] for row in collected()} == {*catalog.models()} - {"waterline/abacus"}
    for row in collected():
        read = read_config(json.loads((COLLECTED / "model_configs" / row["config_file"]).read_text()), row["model"])
        listed = catalog.models()[row["model"]]
        assert (read.attention, read.feed_forward) == (listed.attention, listed.feed_forward)
        assert (read.parameters, read.active_parameters) == (listed.parameters, listed.active_parameters)
        assert (read.tied_embeddings, read.max_context_tokens) == (listed.tied_embeddings, listed.max_context_tokens)


@pytest.mark.parametrize(
    ("model", "published"),  # the makers' own figures, in units of 1e9
    [
        ("deepseek-r1", 671),
        ("llama-3.1-405b", 405.9),
        ("gpt-oss-120b", 116.83),
        ("gpt-oss-20b", 20.91),
        ("mixtral-8x7b", 46.7),
        ("gemma-2-9b", 9.24),
        ("nemotron-super-49b", 49.87),
    ],
)
def test_parameters_are_the_published_ones(model: str, published: float) -> None:
    assert catalog.find_model(model).parameters / 1e9 == pytest.approx(published, rel=1e-3)


@pytest.mark.parametrize(
    ("model", "published"),  # with multi-token-prediction layers, as their makers or the Hub count them, in 1e9
    [("deepseek-r1", 684.5), ("mimo-7b", 7.83), ("qwen3-next", 81.3)],
)
def test_multi_token_prediction_layers_are_counted_apart(model: str, published: float) -> None:
    llm = catalog.find_model(model)
    assert llm.mtp_layers == 1
    assert (llm.parameters + llm.mtp_parameters) / 1e9 == pytest.approx(published, rel=1e-3)


def test_both_ways_to_publish_active_parameters_can_be_had() -> None:
    llm = catalog.find_model("gpt-oss-120b")
    assert (llm.active_parameters - llm.input_embedding_parameters) / 1e9 == pytest.approx(5.13, rel=1e-3)


@pytest.mark.parametrize("llm", catalog.models().values(), ids=lambda llm: llm.name)
def test_every_model_is_consistent(llm: Llm) -> None:
    assert 0 < llm.active_parameters <= llm.parameters
    assert llm.expert_parameters < llm.parameters
    assert llm.precision in PRECISIONS
    assert llm.max_context_tokens >= 512
    assert llm.source
    for group in llm.attention:
        assert group.layers > 0
        assert (group.kind == "window") == (group.window_tokens > 0)
        assert (group.kind == "state") == (group.state_elements > 0)
        assert (group.kind == "latent") == (group.latent_dim > 0)
        if group.kind in {"full", "window"}:
            assert group.query_heads % group.kv_heads == 0
            assert group.head_dim > 0
    for network in llm.feed_forward:
        assert network.layers > 0
        assert network.experts_per_token <= network.experts


@pytest.mark.parametrize("name", catalog.models())
def test_every_id_and_alias_means_one_model(name: str) -> None:
    for alias in (name, name.lower(), *llms.names()[name]):
        assert catalog.find_model(alias).name == name
        assert naming.called(alias, llms.names()) == [name]


@pytest.mark.parametrize(
    ("typed", "meant"),
    [
        ("deepseek-r1", "deepseek-ai/DeepSeek-R1"),
        ("r1", "deepseek-ai/DeepSeek-R1"),
        ("llama-3.1-8b", "meta-llama/Llama-3.1-8B"),
        ("meta-llama/Llama-3.1-8B-Instruct", "meta-llama/Llama-3.1-8B"),
        ("qwen3-32b", "Qwen/Qwen3-32B"),
        ("qwen3 32b", "Qwen/Qwen3-32B"),
        ("kimi k2", "moonshotai/Kimi-K2-Instruct"),
        ("abacus", "waterline/abacus"),
    ],
)
def test_models_are_found_by_the_names_people_type(typed: str, meant: str) -> None:
    assert catalog.find_model(typed).name == meant


@pytest.mark.parametrize(
    ("typed", "said"),
    [
        ("gpt-oss", "could be any of these models: openai/gpt-oss-120b, openai/gpt-oss-20b"),
        ("qwen3-33b", "Did you mean 'Qwen3-32B'"),
        ("", "no model is called ''"),
    ],
)
def test_a_name_that_does_not_settle_it_is_answered_with_names_that_do(typed: str, said: str) -> None:
    with pytest.raises(UnknownNameError, match=said):
        catalog.find_model(typed)


def test_the_shipped_model_is_described_by_its_own_file() -> None:
    abacus = catalog.find_model("waterline/abacus")
    path = catalog.weights_file("abacus")
    assert abacus.weights_file == str(path)
    assert 0 < abacus.stored_bytes < path.stat().st_size
    assert abacus.precision == "q8_0"
    with pytest.raises(UnknownNameError, match="waterline/abacus"):
        catalog.weights_file("qwen3-32b")
