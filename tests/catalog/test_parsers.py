from itertools import combinations

import pytest
from msgspec.structs import replace

from waterline.catalog import find_model
from waterline.catalog.parsers import END_OF_THINKING, end_of_thinking, families, find_parsers

# weights, model_type, (vLLM: thoughts, tools), (SGLang: thoughts, tools)
KNOWN = [
    ("deepseek-ai/DeepSeek-R1-0528", "deepseek_v3", ("deepseek_r1", "deepseek_v3"), ("deepseek-r1", "deepseekv3")),
    ("deepseek-ai/DeepSeek-V3-0324", "deepseek_v3", ("", "deepseek_v3"), ("", "deepseekv3")),
    ("nvidia/DeepSeek-V3.1-NVFP4", "deepseek_v3", ("deepseek_v3", "deepseek_v31"), ("deepseek-v3", "deepseekv31")),
    ("deepseek-ai/DeepSeek-V3.2-Exp", "deepseek_v32", ("deepseek_v3", "deepseek_v31"), ("deepseek-v3", "deepseekv31")),
    ("deepseek-ai/DeepSeek-V3.2", "deepseek_v32", ("deepseek_v3", "deepseek_v32"), ("deepseek-v3", "deepseekv32")),
    ("deepseek-ai/DeepSeek-R1-Distill-Llama-70B", "llama", ("deepseek_r1", ""), ("deepseek-r1", "")),
    ("deepseek-ai/DeepSeek-R1-0528-Qwen3-8B", "qwen3", ("deepseek_r1", ""), ("deepseek-r1", "")),
    ("/models/Qwen3-8B", "qwen3", ("qwen3", "hermes"), ("qwen3", "qwen")),
    ("Qwen/Qwen3-235B-A22B-Instruct-2507-FP8", "qwen3_moe", ("", "hermes"), ("", "qwen")),
    ("Qwen/Qwen3-235B-A22B-Thinking-2507", "qwen3_moe", ("qwen3", "hermes"), ("qwen3-thinking", "qwen")),
    ("Qwen/Qwen3-Coder-30B-A3B-Instruct", "qwen3_moe", ("", "qwen3_xml"), ("", "qwen3_coder")),
    ("Qwen/Qwen3-Next-80B-A3B-Instruct", "qwen3_next", ("", "hermes"), ("", "qwen")),
    ("Qwen/Qwen3-Embedding-8B", "qwen3", ("", ""), ("", "")),
    ("hub/models--Qwen--Qwen3.5-27B/snapshots/8a3f", "qwen3_5_text", *[("qwen3", "qwen3_xml")],
     ("qwen3", "qwen3_coder")),
    ("openai/gpt-oss-20b", "gpt_oss", ("openai_gptoss", "openai"), ("gpt-oss", "gpt-oss")),
    ("zai-org/GLM-4.6", "glm4_moe", ("glm45", "glm45"), ("glm45", "glm")),
    ("zai-org/GLM-4.7", "glm4_moe", ("glm45", "glm47"), ("glm45", "glm47")),
    ("moonshotai/Kimi-K2-Instruct-0905", "kimi_k2", ("", "kimi_k2"), ("", "kimi_k2")),
    ("moonshotai/Kimi-K2-Thinking", "kimi_k2", ("kimi_k2", "kimi_k2"), ("kimi_k2", "kimi_k2")),
    ("moonshotai/Kimi-Linear-48B-A3B-Instruct", "kimi_linear", ("", ""), ("", "")),
    ("meta-llama/Llama-3.3-70B-Instruct", "llama", ("", "llama3_json"), ("", "llama3")),
    ("meta-llama/Meta-Llama-3-8B-Instruct", "llama", ("", ""), ("", "")),  # before it had tools
    ("nvidia/Llama-3.1-Nemotron-Nano-8B-v1", "llama", ("", ""), ("", "")),
    ("NousResearch/Hermes-3-Llama-3.1-8B", "llama", ("", "hermes"), ("", "hermes")),
    ("mistralai/Mistral-7B-Instruct-v0.3", "mistral", ("", "mistral"), ("", "mistral")),
    ("mistralai/Mistral-7B-Instruct-v0.2", "mistral", ("", ""), ("", "")),  # has no token for calls: it would not start
    ("mistralai/Magistral-Small-2509", "mistral", ("mistral", "mistral"), ("mistral", "mistral")),
    ("google/gemma-3-4b-it", "gemma3_text", ("", ""), ("", "")),
    ("microsoft/phi-4", "phi3", ("", ""), ("", "")),
    ("microsoft/Phi-4-mini-instruct", "phi3", ("", "phi4_mini_json"), ("", "")),
    ("ibm-granite/granite-4.0-h-small", "granite", ("", "granite4"), ("", "")),
    ("/models/abacus-hf", "llama", ("qwen3", ""), ("qwen3", "")),
    ("/models/ours", "llama", ("", ""), ("", "")),
    ("/models/qwen3-8b", "gpt2", ("", ""), ("", "")),  # called so, but is none
]  # fmt: skip


@pytest.mark.parametrize(("weights", "architecture", "vllm", "sglang"), KNOWN, ids=[one[0] for one in KNOWN])
def test_a_family_is_told_by_what_a_model_is_and_by_its_name(
    weights: str, architecture: str, vllm: tuple[str, str], sglang: tuple[str, str]
) -> None:
    llm = replace(find_model("Qwen/Qwen3-8B"), architecture=architecture)
    found = [find_parsers(engine, llm, weights) for engine in ("vllm", "sglang")]
    assert [(one.reasoning, one.tools) for one in found] == [vllm, sglang]


def test_no_row_is_hidden_behind_an_earlier_one() -> None:
    for earlier, later in combinations(families(), 2):
        always = not earlier.name and set(later.architectures) <= set(earlier.architectures)
        assert not always, (earlier, later)


def test_each_thought_ends_with_one_mark_and_where_that_is_not_enough_with_none() -> None:
    for engine in ("vllm", "sglang"):
        for family in families():
            assert family.end_of_thinking == "" or family.reasoning["vllm"]
            if family.reasoning[engine]:
                assert end_of_thinking(engine, family.reasoning[engine]) == family.end_of_thinking
    assert end_of_thinking("vllm", "minimax_m3") == "</mm:think>"
    assert end_of_thinking("vllm", "openai_gptoss") == ""
    assert {end_of_thinking("vllm", name) for name in ("", "my_own")} == {END_OF_THINKING}
