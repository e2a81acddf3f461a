"""What an engine is told of a model beside the plan: how its thoughts and tool calls are told apart, and owners' flags.

Both vLLM and SGLang name a parser each; which, `catalog.parsers` says. An owner's own choice comes first.
"""

from waterline.catalog.engine_flags import PARSERS, flag_of
from waterline.catalog.parsers import end_of_thinking, find_parsers
from waterline.fleet import Model
from waterline.llm import Llm
from waterline.service.engines.seat import checkpoint

REASONING, TOOLS = PARSERS


def parser_flags(engine: str, model: Model, llm: Llm, with_tools: tuple[str, ...] = ()) -> tuple[str, ...]:
    """Return the flags that name the parsers of a model; none for a model that nobody knows.

    `with_tools` is what an engine wants beside the parser of tool calls.
    """
    known = find_parsers(engine, llm, checkpoint(model, llm))
    chosen = {REASONING: known.reasoning, TOOLS: known.tools} | _parted(model)[0]
    flags = [word for flag, name in chosen.items() if name for word in (flag, name)]
    return (*flags, *(with_tools if chosen[TOOLS] else ()))


def own_arguments(model: Model) -> tuple[str, ...]:
    """Return what an owner hands the engine, without the choice of parsers."""
    return _parted(model)[1]


def mark_of(engine: str, arguments: tuple[str, ...]) -> str:
    """Return the mark that ends a thought in the text of an engine that is started so; see `end_of_thinking`."""
    reasoning = arguments[arguments.index(REASONING) + 1] if REASONING in arguments else ""
    return end_of_thinking(engine, reasoning)


def _parted(model: Model) -> tuple[dict[str, str], tuple[str, ...]]:
    """Return an owner's parsers by their flag, and the other words."""
    parsers, others = {}, []
    words = iter(model.engine_arguments)
    for word in words:
        if (flag := flag_of(word)) in PARSERS:
            _, sign, value = word.partition("=")
            parsers[flag] = value if sign else next(words, "")
        else:
            others.append(word)
    return parsers, tuple(others)
