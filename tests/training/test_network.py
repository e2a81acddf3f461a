import pytest

torch = pytest.importorskip("torch", reason="needs the extra waterline-llm[training]")

from waterline.training.network import ABACUS, Network, Shape, rotary_turns, rotate  # noqa: E402  # torch may be absent
from waterline.training.tokens import VOCABULARY  # noqa: E402  # as above

TINY = Shape(channels=32, layers=2, heads=2, hidden_channels=64)


@pytest.fixture
def network():
    torch.manual_seed(0)
    return Network(TINY)


def test_there_is_a_score_for_every_token_at_every_position(network):
    assert network(torch.zeros(3, 7, dtype=torch.long)).shape == (3, 7, VOCABULARY)


def test_a_later_token_never_changes_an_earlier_score(network):
    tokens = torch.randint(VOCABULARY, (1, 9))
    changed = tokens.clone()
    changed[0, 5] = (changed[0, 5] + 1) % VOCABULARY
    before, after = network(tokens), network(changed)
    torch.testing.assert_close(before[:, :5], after[:, :5])
    assert not torch.allclose(before[:, 5:], after[:, 5:])


def test_rotation_makes_attention_depend_on_distance_alone():
    turns = rotary_turns(head_channels=16)
    query, key = torch.randn(16), torch.randn(16)

    def attention(query_position, key_position):
        return rotate(query, turns[query_position]) @ rotate(key, turns[key_position])

    torch.testing.assert_close(attention(30, 10), attention(120, 100))
    assert not torch.allclose(attention(30, 10), attention(30, 11))


def test_abacus_has_the_parameters_the_card_says():
    norms = 2 * ABACUS.layers + 1
    matrices = 4 * ABACUS.channels**2 + 3 * ABACUS.channels * ABACUS.hidden_channels
    expected = (VOCABULARY + norms) * ABACUS.channels + ABACUS.layers * matrices
    assert Network(ABACUS).parameter_count == expected == 2_264_064
