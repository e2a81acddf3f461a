"""What engines understand beyond OpenAI's API, as far as an answer that broke off needs it; a line for each engine."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from waterline.catalog.parsers import END_OF_THINKING

CHAT = "/chat/completions"
COMPLETIONS = "/completions"
IN_TURN, AT_ONCE = "in turn", "at once"  # how one that has read a prompt lets another write; see `service.pairs`


@dataclass(frozen=True, slots=True, kw_only=True)
class Dialect:
    """How one engine is asked to help."""

    token_ids: tuple[str, ...] = ()  # endpoints whose streams carry the ids of tokens with `return_token_ids`
    completion_tokens: int | None = None  # of a completion that sets no limit; None: up to its context
    prefill: Mapping[str, Any] | None = None  # what a chat says to have its last message, the assistant's, gone on with
    prefill_thinking: bool = False  # … also where that message has only thoughts yet, as `reasoning_content`
    end_of_thinking: str = END_OF_THINKING  # in the text of a completion; "": a thought cannot be gone on with as one
    responses: bool = False  # it makes OpenAI's responses itself, and more of them than could be made of its chats
    hand_over: str = ""  # IN_TURN or AT_ONCE
    meeting_port: int = 0  # AT_ONCE: where one that reads is found by those that write; 0: where it is asked
    abort: str = ""  # where a request is ended by its `rid`, for an engine that is slow to notice who has hung up


# Read from vLLM 0.33 and SGLang 0.5.23, tried on llama.cpp at 00dc8057. SGLang refuses `return_token_ids` for a chat
# that is streamed, and looks only every 4 s whether the client of an answer that comes whole is still there.
# llama.cpp makes responses of its chats, as we do; SGLang keeps each in its memory, for ever.
OPENAI = Dialect(responses=True)
VLLM = Dialect(
    responses=True,
    token_ids=(CHAT, COMPLETIONS),
    completion_tokens=16,
    prefill={"continue_final_message": True, "add_generation_prompt": False},
    hand_over=IN_TURN,
)
SGLANG = Dialect(
    token_ids=(COMPLETIONS,),
    completion_tokens=16,
    prefill={"continue_final_message": True},
    hand_over=AT_ONCE,
    abort="/abort_request",
)
LLAMACPP = Dialect(prefill={}, prefill_thinking=True)
FAKE = Dialect(token_ids=VLLM.token_ids, prefill=VLLM.prefill, hand_over=VLLM.hand_over)

OWNERS = {"vllm": VLLM, "sglang": SGLANG, "llamacpp": LLAMACPP, "fake": FAKE}  # as /v1/models says `owned_by`
