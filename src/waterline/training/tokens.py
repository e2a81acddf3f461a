"""How a conversation becomes tokens: one per byte of UTF-8, and five marks.

<|user|>What is 347 * 586?<|assistant|><think>347*586…</think>203342<|end|>
<|user|>What is 347 * 586?<|assistant|><think></think>203342<|end|>          with thinking off
"""

from typing import Final

from waterline.training.problems import Problem, think

MARKS: Final = ("<|end|>", "<|user|>", "<|assistant|>", "<think>", "</think>")
END, USER, ASSISTANT, THINK, THINK_END = range(256, 256 + len(MARKS))
VOCABULARY: Final = 256 + len(MARKS)

# GPT-2's vocabulary files name each byte by a letter: itself where it prints, else the next letter from U+0100 on.
_PRINTS: Final = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
_OTHERS: Final = [byte for byte in range(256) if byte not in _PRINTS]
BYTE_LETTERS: Final = [chr(byte if byte in _PRINTS else 256 + _OTHERS.index(byte)) for byte in range(256)]

CONTEXT: Final = 512  # the longest question and thought together take about 230 tokens

# Abacus was trained on single questions, so it is shown the last thing the user said and nothing else.
CHAT_TEMPLATE: Final = """\
{%- set last = namespace(question='') -%}
{%- for message in messages -%}
{%- if message['role'] == 'user' -%}{%- set last.question = message['content'] -%}{%- endif -%}
{%- endfor -%}
{{- '<|user|>' + (last.question | trim) -}}
{%- if add_generation_prompt -%}
{{- '<|assistant|><think>' -}}
{%- if enable_thinking is defined and not enable_thinking -%}{{- '</think>' -}}{%- endif -%}
{%- endif -%}
"""


def prompt(question: str, *, thinking: bool) -> list[int]:
    """Return what the model is given; `CHAT_TEMPLATE` says the same to an engine."""
    opening = [THINK] if thinking else [THINK, THINK_END]
    return [USER, *question.encode(), ASSISTANT, *opening]


def completion(problem: Problem, *, thinking: bool) -> list[int]:
    """Return what the model should say to `prompt`."""
    thought = [*think(problem).encode(), THINK_END] if thinking else []
    return [*thought, *problem.answer.encode(), END]
