"""Tool calls there and back: what the template writes for a call, read as a reply, is that call."""

import math
from typing import Any

from hypothesis import strategies as st

from .judge import check as must
from .judge import check_refusal
from .surface import demo_processor, parser
from .texts import names, values

SHARE = 60
OPEN, CLOSE = "<|tool_call>", "<tool_call|>"

prepare = demo_processor


def strategy() -> st.SearchStrategy[Any]:
    return st.fixed_dictionaries(
        {
            "name": st.sampled_from(["f", "get_weather", "a.b", "x-y", "a:b", "ü"]),
            "arguments": st.dictionaries(names, values(2), max_size=3),
        }
    )


def check(call: Any) -> str | None:
    processor = demo_processor()
    messages: list[dict[str, Any]] = [
        {"role": "user", "content": "Do it."},
        {"role": "assistant", "content": "", "tool_calls": [{"type": "function", "function": call, "id": "1"}]},
        {"role": "tool", "tool_call_id": "1", "content": "done"},
    ]
    try:
        ids = processor(messages).token_ids
    except Exception as error:  # any: it is judged
        check_refusal(error, (ValueError,))
        return "refused"
    written_as = [processor.tokenizer.id_to_token(token) for token in ids]
    written = ids[written_as.index(OPEN) : written_as.index(CLOSE) + 1]
    reader = parser([])
    text = "".join(reader.feed(written)) + "".join(reader.finish())
    must(len(reader.tool_calls) == 1, "a call that the template wrote is not read", text)
    must(same(reader.tool_calls[0], call), "a call is read as another", reader.tool_calls[0])
    must(not text, "text beside a call", text)
    return None


def same(read: Any, given: Any) -> bool:
    """Equal, NaN to itself, and true is not 1; ▁ is how the tokenizer writes a space."""
    if isinstance(given, str):
        return isinstance(read, str) and read == given.replace("▁", " ")
    if isinstance(given, dict):
        written = [(key.replace("▁", " "), value) for key, value in given.items()]  # two keys may be written alike
        return (
            isinstance(read, dict)
            and read.keys() == {name for name, _ in written}
            and all(any(same(own, value) for other, value in written if other == name) for name, own in read.items())
        )
    if isinstance(given, list):
        return isinstance(read, list) and len(read) == len(given) and all(map(same, read, given))
    if isinstance(given, float) and math.isnan(given):
        return isinstance(read, float) and math.isnan(read)
    return isinstance(read, bool) == isinstance(given, bool) and bool(read == given)
