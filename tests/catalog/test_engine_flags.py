import pytest

from waterline.catalog.engine_flags import check_arguments
from waterline.errors import InputError


@pytest.mark.parametrize(
    ("engine", "arguments"),
    [
        ("vllm", ["--enable-lora", "--lora-modules", "sql=/loras/sql", "--max-lora-rank", "64"]),
        ("vllm", ["--speculative-config", '{"method": "ngram", "num_speculative_tokens": 3}']),
        ("vllm", ["--speculative-config.method=ngram", "--hf-overrides.rope_scaling.factor", "4.0", "-O3"]),
        ("vllm", ["--model-impl", "transformers", "--kv-cache-dtype-skip-layers", "0"]),  # longer than what is ours
        ("vllm", ["--seed", "-1"]),
        ("vllm", ["--reasoning-parser", ""]),
        ("sglang", ["--trust-remote-code", "--speculative-algorithm", "NGRAM"]),
        ("llamacpp", ["--flash-attn", "on", "--threads", "8"]),
        ("openai", []),
    ],
)
def test_what_is_not_ours_is_handed_on(engine: str, arguments: list[str]) -> None:
    check_arguments(engine, arguments)


@pytest.mark.parametrize(
    ("engine", "arguments", "message"),
    [
        (
            "vllm",
            ["--max-model-len", "9"],
            "'--max-model-len' is not yours to give: it follows from 'max_context_tokens'",
        ),
        ("vllm", ["--max-model-len=9"], "'--max-model-len=9' is not yours"),
        ("vllm", ["--max_model_len", "9"], "'--max_model_len' is not yours"),
        ("vllm", ["--max-model", "9"], r"\(it means --max-model-len\)"),
        ("vllm", ["--no-enable-prefix-caching"], "'--no-enable-prefix-caching' is not yours"),
        ("vllm", ["--enable-lora", "-tp", "2"], "'-tp' is not yours to give: the plan lays a model out"),
        ("vllm", ["-tp=2"], "'-tp=2'"),
        ("vllm", ["-t", "2"], r"\(it means -tp\)"),
        ("vllm", ["-qfp8"], r"\(it means -q\)"),
        ("vllm", ["--kv-transfer-config.kv_role", "kv_both"], "which replicas read prompts"),
        ("vllm", ["--port", "1"], "the gateway decides where an engine listens"),
        ("sglang", ["--tp", "2"], r"\(it means --tp-size\)"),
        ("sglang", ["--schedule-low-priority-values-first"], "says who goes first"),
        ("llamacpp", ["-c", "4096"], "max_context_tokens"),
        ("vllm", ["--max-lora-rank 64"], r'two words. Write them one by one: \["--max-lora-rank", "64"\]'),
        ("vllm", ["enable-lora"], "'enable-lora' is no flag"),
        ("vllm", ["--", "x"], "'--' is no flag"),
        ("vllm", ["--tool-call-parser"], "has no value"),
        ("openai", ["--enable-lora"], "the engine 'openai' is handed no arguments"),
        ("fake", ["--enable-lora"], "the engine 'fake' is handed no arguments"),
    ],
)
def test_what_is_ours_is_refused_however_it_is_written(engine: str, arguments: list[str], message: str) -> None:
    with pytest.raises(InputError, match=message):
        check_arguments(engine, arguments)
