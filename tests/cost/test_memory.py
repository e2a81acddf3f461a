import msgspec
import pytest

from examples import CARD, DENSE, ENGINE
from waterline.cost import cache_tokens, memory_use, sequence_cache_bytes, weights_bytes
from waterline.llm import AttentionLayers
from waterline.plan import Layout
from waterline.units import GIB

ONE = Layout()


def test_weights_keep_embedding_and_head_in_sixteen_bits() -> None:
    assert weights_bytes(DENSE, "bf16") == 2_000_000_000
    assert weights_bytes(DENSE, "fp8") == 980_000_000 + 2 * 20_000_000
    assert weights_bytes(DENSE, "q8_0") == 1_000_000_000 * 8.5 / 8  # a GGUF packs them too


def test_a_file_that_was_read_says_its_exact_size() -> None:
    stored = msgspec.structs.replace(DENSE, precision="q8_0", stored_bytes=1_065_432_100)
    assert weights_bytes(stored, "q8_0") == 1_065_432_100
    assert weights_bytes(stored, "bf16") == 2_000_000_000


def test_the_cache_of_grouped_query_attention_holds_keys_and_values_of_the_kv_heads() -> None:
    assert sequence_cache_bytes(DENSE, 1, ONE) == 10 * 2 * (100 + 100) * 2
    assert sequence_cache_bytes(DENSE, 1000, Layout(tp=2)) == 1000 * 8000 // 2


def test_more_gpus_than_kv_heads_replicate_them() -> None:
    assert sequence_cache_bytes(DENSE, 1000, Layout(tp=8)) == sequence_cache_bytes(DENSE, 1000, Layout(tp=2))


@pytest.mark.parametrize(
    ("group", "context", "elements"),
    [
        (
            AttentionLayers(kind="window", layers=1, query_heads=8, kv_heads=2, head_dim=100, window_tokens=512),
            4000,
            512 * 400,
        ),
        (AttentionLayers(kind="latent", layers=1, query_heads=8, latent_dim=512, rope_dim=64), 4000, 4000 * 576),
        (AttentionLayers(kind="state", layers=1, state_elements=12_345), 4000, 12_345),
    ],
)
def test_each_kind_of_attention_keeps_its_own_cache(group: AttentionLayers, context: int, elements: int) -> None:
    llm = msgspec.structs.replace(DENSE, attention=(group,))
    assert sequence_cache_bytes(llm, context, ONE) == 2 * elements


def test_every_gibibyte_is_accounted_for() -> None:
    use = memory_use(DENSE, CARD, ONE, "bf16", ENGINE)
    assert use.usable_bytes == 9 * GIB
    assert use.overhead_bytes == GIB
    assert use.needed_bytes + use.cache_bytes == use.usable_bytes
    assert cache_tokens(DENSE, ONE, use, 4096) == use.cache_bytes // 8000


def test_a_model_too_large_leaves_no_cache() -> None:
    large = msgspec.structs.replace(DENSE, parameters=6_000_000_000)
    use = memory_use(large, CARD, ONE, "bf16", ENGINE)
    assert use.cache_bytes < 0
    assert cache_tokens(large, ONE, use, 4096) == 0
    assert cache_tokens(large, Layout(tp=2), memory_use(large, CARD, Layout(tp=2), "bf16", ENGINE), 4096) > 0


def test_a_cache_smaller_than_one_context_counts_as_none() -> None:
    use = memory_use(DENSE, CARD, ONE, "bf16", ENGINE)
    too_long = use.cache_bytes // 8000 + 1
    assert cache_tokens(DENSE, ONE, use, too_long) == 0
