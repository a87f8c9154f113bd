"""A known reply as the model would write it: what is learnt, and what models are compared on."""

from collections.abc import Sequence
from typing import Any

from mlx_gemma4.prompt.messages import LEADING_THOUGHT, as_now, check_message
from mlx_gemma4.prompt.processor import Processor, Written
from mlx_gemma4.reply.reply import CHANNEL_OPEN, THOUGHT_CHANNEL

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
    content = message.get("content")
    if isinstance(content, str) and LEADING_THOUGHT.match(content):  # a thought that was left in the text
        own = processor.parse_response(content)
        message = message | {"content": own["content"], "reasoning": own["reasoning"]}
    thinks = bool(message.get("reasoning") or message.get("reasoning_content"))
    asked = processor.write(before, tools, thinks)
    return asked, said_ids(processor, message, where, asked.text.endswith(OPEN_THOUGHT))


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
