"""`parsers.csv`: which parser of an engine tells the thoughts and the tool calls of a model from its answer.

The first row of which both columns fit is a model's: `architectures`, one of which is the `model_type` of its config,
and `name`, a pattern that is looked for in its name, whatever the case, without the organisation. Models of one
architecture think in different ways, so most rows want a name. A model that no row fits gets no parser.

Sources: the registries of vLLM 0.32 and of SGLang 0.5.23, vLLM's pages on tool calling and on reasoning outputs and its
recipes, SGLang's rules for ``auto``, and the cards of the models. Read 2026-11-26.
"""

import csv
import re
from functools import cache
from importlib import resources
from pathlib import PurePath

from msgspec import Struct

from waterline.llm import Llm

END_OF_THINKING = "</think>"  # of most models that think


class Family(Struct, frozen=True, kw_only=True):
    """Models that think and call tools alike; a parser is "" where there is nothing to tell apart, or nobody can."""

    architectures: tuple[str, ...]
    name: str
    reasoning: dict[str, str]  # by engine
    tools: dict[str, str]
    end_of_thinking: str  # see below

    def has(self, architecture: str, name: str) -> bool:
        return architecture in self.architectures and re.search(self.name, name, re.IGNORECASE) is not None


class Parsers(Struct, frozen=True):
    """What an engine is told of a model; "" is nothing."""

    reasoning: str = ""
    tools: str = ""


@cache
def families() -> tuple[Family, ...]:
    """Return every row, in the order in which they are tried."""
    text = resources.files("waterline.catalog").joinpath("parsers.csv").read_text(encoding="utf-8")
    return tuple(
        Family(
            architectures=tuple(row["architectures"].split()),
            name=row["name"],
            reasoning={"vllm": row["vllm_reasoning"], "sglang": row["sglang_reasoning"]},
            tools={"vllm": row["vllm_tools"], "sglang": row["sglang_tools"]},
            end_of_thinking=row["end_of_thinking"],
        )
        for row in csv.DictReader(text.splitlines())
    )


def find_parsers(engine: str, llm: Llm, weights: str) -> Parsers:
    """Return the parsers of vLLM or SGLang for a model.

    Args:
        engine: "vllm" or "sglang".
        llm: the model.
        weights: what the engine loads: an id of the Hub, or a folder, whose name then counts.
    """
    name = _bare(weights)
    family = next((one for one in families() if one.has(llm.architecture, name)), None)
    return Parsers(family.reasoning[engine], family.tools[engine]) if family else Parsers()


def end_of_thinking(engine: str, reasoning: str) -> str:
    """Return the mark that ends a thought where an engine has such a parser; of one that nobody knows END_OF_THINKING.

    "" where what follows the mark is not the answer as it stands.
    """
    marks = (one.end_of_thinking for one in families() if one.reasoning[engine] == reasoning != "")
    return next(marks, END_OF_THINKING)


def _bare(weights: str) -> str:
    """Return a name without the organisation or folders around it; of a copy in the Hub's cache, that of its model."""
    path = PurePath(weights)
    stored = next((part for part in path.parts if part.startswith("models--")), "")
    return stored.rpartition("--")[2] if stored else path.name
