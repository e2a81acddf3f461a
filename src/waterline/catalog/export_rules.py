"""`export_rules.toml`: which cards are under which dated rule, as far as published numbers say. Never legal advice."""

from datetime import date
from functools import cache
from importlib import resources
from typing import Any

import msgspec
from msgspec import Struct

from waterline.errors import UnknownNameError
from waterline.hardware import Gpu
from waterline.units import GIGA


class Limit(Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """A card is under the paragraph when all of these hold."""

    paragraph: str
    tpp: float
    density: float = 0.0
    io_gb_per_s: float = 0.0


class Rule(Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """One dated rule; the header of the file says what the keys mean."""

    title: str
    published: date
    effective: date
    source: str
    limits: tuple[Limit, ...] = ()
    spared_below_tpp: float = 0.0
    extends: str = ""
    named: tuple[str, ...] = ()


class _File(Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    not_for_data_centres: tuple[str, ...]
    rule: dict[str, Rule]


@cache
def _file() -> _File:
    text = resources.files("waterline.catalog").joinpath("export_rules.toml").read_bytes()
    return msgspec.toml.decode(text, type=_File)


def export_rules() -> dict[str, Rule]:
    """Return every rule by its name, the oldest first."""
    return dict(_file().rule)


def find_rule(name: str) -> Rule:
    """Return a rule. Raises UnknownNameError that lists those we know."""
    if name not in export_rules():
        listed = ", ".join(f"{known} ({rule.title})" for known, rule in export_rules().items())
        raise UnknownNameError(f"no export rule is called '{name}'. Known: {listed}.")
    return export_rules()[name]


def for_data_centres(gpu: Gpu) -> bool:
    """Return whether a card is sold for data centres, by its name."""
    return not gpu.name.startswith(_file().not_for_data_centres)


def density(gpu: Gpu) -> float | None:
    """Return TPP over die area in mm2; None where one of them is not known."""
    return gpu.tpp / gpu.die_mm2 if gpu.tpp is not None and gpu.die_mm2 else None


def io_gb_per_s(gpu: Gpu) -> float:
    """Return the rate of all links to other chips, both directions together."""
    links = gpu.pcie_bytes_per_s or 0.0
    if "pcie" not in gpu.link.kind:
        links += gpu.link.bytes_per_s
    return 2 * links / GIGA


def why_controlled(gpu: Gpu, rule: Rule) -> str:
    """Say why a card is under a rule, or why it cannot be judged; "" where its figures keep it outside."""
    if gpu.id in rule.named:
        return f"named by the rule of {rule.effective}"
    if rule.extends and (why := why_controlled(gpu, find_rule(rule.extends))):
        return why
    if not rule.limits:
        return ""
    if gpu.tpp is None:
        return "cannot be judged: its TPP is not known"
    if gpu.tpp < rule.spared_below_tpp and not for_data_centres(gpu):
        return ""
    verdicts = [_why(gpu, gpu.tpp, limit) for limit in rule.limits]
    sure = [why for why in verdicts if why and not why.startswith("cannot")]
    return next(iter(sure), "") or next((why for why in verdicts if why), "")


def _why(gpu: Gpu, tpp: float, limit: Limit) -> str:
    facts: list[tuple[str, float | None, float, str]] = [
        ("TPP", tpp, limit.tpp, ",.0f"),
        ("density", density(gpu), limit.density, ".2f"),
        ("links, GB/s", io_gb_per_s(gpu), limit.io_gb_per_s, ",.0f"),
    ]
    asked = [(name, value, least, form) for name, value, least, form in facts if least]
    if any(value is not None and value < least for _, value, least, _ in asked):
        return ""
    if unknown := [name for name, value, _, _ in asked if value is None]:
        return f"cannot be judged: its {unknown[0]} is not known, and its TPP is {tpp:,.0f}"
    found = ", ".join(f"{name} {value:{form}} >= {least:{form}}" for name, value, least, form in asked)
    return f"{limit.paragraph}: {found}"


def facts_of(gpu: Gpu) -> dict[str, Any]:
    """Return the figures the rules ask for."""
    return {"tpp": gpu.tpp, "density": density(gpu), "io_gb_per_s": io_gb_per_s(gpu)}
