"""Replies, well-formed and not: the parser takes any tokens, at once or one by one, and what it makes can be sent."""

from typing import Any

from hypothesis import strategies as st

from .judge import check as must
from .judge import check_refusal
from .surface import demo_processor, parser
from .texts import CONTROLS

SHARE = 60
WRITTEN = (
    "<|channel>thought\n", "<channel|>", "<|tool_call>call:f{", "}<tool_call|>", "<tool_call|>", "<turn|>",
    '<|"|>', "a:1", ",", "b:[", "]", "{", "}", "(", ")", "call:g", "call:", "true", "0012", "108.", "null", ":",
    '"x"', "-",
    "The answer.", "\n", " ", "é", "😀", "thought", "<|tool_response>", "response:f{", "```json\n", "x" * 3000,
    "[" * 300,
    "{a:" * 300, "1" * 5000, "\\u00e9", "\\", "'",
)  # fmt: skip

prepare = demo_processor


def strategy() -> st.SearchStrategy[Any]:
    token = st.one_of(
        st.sampled_from(WRITTEN), st.sampled_from(WRITTEN), st.sampled_from(CONTROLS), st.integers(0, 1855)
    )
    opened = st.sampled_from([[], ["<|channel>thought\n"], ["<|turn>model\n"], ["<|channel>"], ["<|tool_response>"]])
    return st.fixed_dictionaries({"prompt": opened, "reply": st.lists(token, max_size=14)})


def ids_of(pieces: list[Any]) -> list[int]:
    tokenizer = demo_processor().tokenizer
    ids: list[int] = []
    for piece in pieces:
        ids += [piece] if isinstance(piece, int) else tokenizer.encode(piece, add_special_tokens=False).ids
    return ids


def check(value: Any) -> str | None:
    processor = demo_processor()
    prompt, ids = ids_of(value["prompt"]), ids_of(value["reply"])
    at_once, one_by_one = parser(prompt), parser(prompt)
    whole = join([at_once.feed(ids), at_once.finish()])
    steps = join([*(one_by_one.feed([token]) for token in ids), one_by_one.finish()])
    must(whole == steps and at_once.tool_calls == one_by_one.tool_calls, "pieces make another reply", [whole, steps])
    text, thinking = whole
    message: dict[str, Any] = {"role": "assistant", "content": text}
    if thinking.strip():
        message["reasoning"] = thinking
    if at_once.tool_calls:
        for call in at_once.tool_calls:
            must(isinstance(call["name"], str) and isinstance(call["arguments"], dict), "a call of another form", call)
        functions = [{"name": call["name"], "arguments": call["arguments"]} for call in at_once.tool_calls]
        message["tool_calls"] = [
            {"id": f"call_{n}", "type": "function", "function": f} for n, f in enumerate(functions)
        ]
    messages = [{"role": "user", "content": "Hello"}, message]
    messages += [{"role": "tool", "tool_call_id": f"call_{n}", "content": "1"} for n in range(len(at_once.tool_calls))]
    try:
        processor([*messages, {"role": "user", "content": "Go on."}])
    except Exception as error:  # any: it is judged
        check_refusal(error, (ValueError,))
        return "refused"  # longer than the context, or half a character
    return None


def join(pieces: list[tuple[str, str]]) -> tuple[str, str]:
    return "".join(text for text, _ in pieces), "".join(thought for _, thought in pieces)
