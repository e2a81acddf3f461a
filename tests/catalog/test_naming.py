import pytest

from waterline import catalog
from waterline.errors import UnknownNameError


@pytest.mark.parametrize(
    ("typed", "id_"),
    [("gb200", "gb200-186g"), ("a100_sxm", "a100-sxm-80g"), ("b200_sxm", "b200-sxm-180g"), ("RTX 4090", "rtx-4090")],
)
def test_names_as_tables_of_runs_spell_them(typed: str, id_: str) -> None:
    assert catalog.find_gpu(typed).id == id_


@pytest.mark.parametrize("typed", ["NVIDIA GeForce RTX 5070", "RTX 4080 Super", "rx 9070"])
def test_a_card_we_do_not_know_is_not_its_sister(typed: str) -> None:
    with pytest.raises(UnknownNameError, match="no GPU is called"):
        catalog.find_gpu(typed)


def test_several_cards_are_candidates() -> None:
    with pytest.raises(UnknownNameError, match=r"rtx-4060ti-8g, rtx-4060ti-16g"):
        catalog.find_gpu("4060 ti")
