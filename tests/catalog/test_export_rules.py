"""What the rules are known to cover, held against what our figures say of each card."""

from dataclasses import replace

import pytest

from waterline import catalog
from waterline.catalog.export_rules import density, export_rules, find_rule, io_gb_per_s, why_controlled
from waterline.errors import UnknownNameError


def covered(card: str, rule: str) -> bool:
    return bool(why_controlled(catalog.find_gpu(card), find_rule(rule)))


@pytest.mark.parametrize(
    ("card", "of_2022", "of_2023", "of_2025"),
    [  # NVIDIA made A800 and H800 for the first rule, H20 and L20 for the second; the letters of 2025 named H20 and MI308
        ("a100-sxm-80g", True, True, True),
        ("h100-sxm-80g", True, True, True),
        ("a800-sxm-80g", False, True, True),
        ("h800-sxm-80g", False, True, True),
        ("h20-96g", False, False, True),
        ("l20", False, False, False),
        ("rtx-4090", False, True, True),
        ("rtx-4090d", False, False, False),
        ("rtx-3090", False, False, False),
        ("l40s", False, True, True),
        ("a30", False, True, True),
        ("t4", False, False, False),
        ("mi300x", True, True, True),
    ],
)
def test_the_rules_cover_the_cards_they_are_known_to(card: str, of_2022: bool, of_2023: bool, of_2025: bool) -> None:
    assert [covered(card, rule) for rule in ("2022-10", "2023-10", "2025-04")] == [of_2022, of_2023, of_2025]


def test_why_names_the_paragraph_and_the_figures() -> None:
    rule = find_rule("2023-10")
    assert why_controlled(catalog.find_gpu("h800-sxm-80g"), rule) == "3A090.a: TPP 15,832 >= 4,800"
    assert why_controlled(catalog.find_gpu("a40"), rule) == "3A090.b: TPP 2,395 >= 1,600, density 3.81 >= 3.20"


def test_the_link_decides_under_the_first_rule() -> None:
    a100, a800 = catalog.find_gpu("a100-sxm-80g"), catalog.find_gpu("a800-sxm-80g")
    assert a100.tpp == a800.tpp
    assert io_gb_per_s(a800) < 600 <= io_gb_per_s(a100)


def test_a_card_without_figures_is_not_waved_through() -> None:
    mi308x = catalog.find_gpu("mi308x")  # its die is not known
    assert density(mi308x) is None
    assert why_controlled(mi308x, find_rule("2023-10")).startswith("cannot be judged: its density is not known")
    nothing = replace(catalog.find_gpu("l20"), tpp=None)
    assert why_controlled(nothing, find_rule("2023-10")).startswith("cannot be judged: its TPP")


def test_a_more_capable_card_is_never_freer() -> None:
    for rule in export_rules().values():
        for gpu in catalog.gpus().values():
            if gpu.tpp is not None and gpu.die_mm2 is not None and why_controlled(gpu, rule):
                assert why_controlled(replace(gpu, tpp=2 * gpu.tpp), rule)


def test_every_rule_is_dated_and_sourced() -> None:
    for rule in export_rules().values():
        assert rule.source
        assert rule.limits or rule.named
        assert all(id_ in catalog.gpus() for id_ in rule.named)


def test_an_unknown_rule_is_answered_with_those_we_know() -> None:
    with pytest.raises(UnknownNameError, match=r"'2024-01'. Known: 2022-10 .*, 2023-10 "):
        find_rule("2024-01")
