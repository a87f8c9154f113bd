"""A known reply as the model would write it: what is learnt, and what models are compared on."""

from collections.abc import Sequence
from typing import Any

from mlx_gemma4.prompt.messages import KIND_OF, as_now, check_message, strip_thinking
from mlx_gemma4.prompt.processor import Processor, Written
from mlx_gemma4.reply.reply import CHANNEL_CLOSE, CHANNEL_OPEN, THOUGHT_CHANNEL

TURN = "<|turn>model\n"  # behind it the template writes what the model says
OPEN_THOUGHT = f"{CHANNEL_OPEN}{THOUGHT_CHANNEL}\n"


def asked_and_said(
    processor: Processor, messages: Sequence[Any], tools: list[dict[str, Any]] | None
) -> tuple[Written, list[int]]:
    """What inference reads to reply as the last message does, and the reply's ids, its stop token the last.

    There is `<|think|>` exactly if the reply has a thought. ValueError if the messages are wrong or this one says
    nothing.
    """
    *before, message = messages
    where = f"messages[{len(before)}]"
    if not before:
        raise ValueError("messages begins with an assistant message; expected what it replies to")
    check_message(message, where)  # here: alone, it would be called by another number
    message = as_now(message, where)
    thought = message.get("reasoning") or message.get("reasoning_content")
    left = thought_left(message.get("content"))
    if left and thought not in (None, "", left):
        raise ValueError(f"{where} has a thought in content and another reasoning; expected one of them")
    message = message | {"reasoning": left or thought}  # what is left in the content is not written
    thinks = bool(message["reasoning"])
    asked = processor.write(before, tools, thinks)
    return asked, said_ids(processor, message, where, asked.text.endswith(OPEN_THOUGHT))


def thought_left(content: Any) -> str:
    """The thought that a checked assistant's content begins with, as other engines leave it there; "" if none."""
    parts = [{"type": "text", "text": content}] if isinstance(content, str) else content or ()
    texts = [part["text"] for part in parts if KIND_OF[part["type"]] == "text"]
    written = [text[: len(text) - len(strip_thinking(text))] for text in texts]
    thoughts = [
        thought.strip().removesuffix(CHANNEL_CLOSE).removeprefix(f"{THOUGHT_CHANNEL}\n").strip("\n")
        for one in written
        for thought in one.split(CHANNEL_OPEN)
    ]
    return "\n".join(filter(None, thoughts))


def said_ids(processor: Processor, message: dict[str, Any], where: str, in_thought: bool) -> list[int]:
    """A reply's ids, as the template writes them in a chat of this message alone.

    in_thought: whether the prompt has opened the thought.
    """
    written = processor.write([{"role": "user", "content": ""}, message])
    if written.media:
        raise ValueError(f"{where} is an assistant message with {written.media[0]['type']}; expected text and calls")
    text = written.text.partition(TURN)[2]
    if in_thought:
        text = text.removeprefix(OPEN_THOUGHT)
    ids = processor.assemble(text, written.mark, []).token_ids
    stops = processor.config.generation.eos_token_ids
    stop = next((place for place, token in enumerate(ids) if token in stops), None)
    if not stop:  # none, or nothing before it
        raise ValueError(f"{where} says nothing; expected content or tool_calls")
    return ids[: stop + 1]
