"""Conversations: a prompt in which no control token is one that somebody typed, or one line that says what is wrong."""

from collections import Counter
from typing import Any

from hypothesis import strategies as st

from .judge import check as must
from .judge import check_refusal
from .mutate import weighted
from .surface import SAMPLES, demo_processor
from .texts import names, texts, values

SHARE = 60
PICTURE, SOUND = str(SAMPLES / "shapes.png"), str(SAMPLES / "beeps.wav")
CHANNELS = ("<|channel>", "<channel|>")  # thoughts in an answer are left out, whoever typed them

prepare = demo_processor

parts = st.one_of(
    st.fixed_dictionaries({"type": st.just("text"), "text": texts}),
    st.fixed_dictionaries({"type": st.just("text"), "text": texts}),
    st.just({"type": "image", "image": PICTURE}),
    st.just({"type": "image_url", "image_url": {"url": PICTURE}}),
    st.just({"type": "audio", "audio": SOUND}),
    st.just({"type": "video", "video": [PICTURE, PICTURE], "fps": 1}),
    st.fixed_dictionaries(
        {"type": st.sampled_from(["text", "image", "input_audio", "video_url", "file"])},
        optional={
            "text": values(1),
            "image": texts,
            "input_audio": values(2),
            "video_url": values(1),
            "fps": values(0),
        },
    ),
    values(1),
)
calls = st.one_of(
    st.fixed_dictionaries(
        {
            "type": st.just("function"),
            "function": st.fixed_dictionaries(
                {"name": names, "arguments": st.dictionaries(names, values(1), max_size=3)}
            ),
        },
        optional={"id": names},
    ),
    values(2),
)
contents = st.one_of(texts, texts, st.lists(parts, max_size=3), values(1))
good_parts = st.one_of(
    st.fixed_dictionaries({"type": st.just("text"), "text": texts}),
    st.sampled_from(
        [
            {"type": "image", "image": PICTURE},
            {"type": "image_url", "image_url": {"url": PICTURE}},
            {"type": "audio", "audio": SOUND},
            {"type": "video", "video": [PICTURE, PICTURE], "fps": 1},
        ]
    ),
)
good_calls = st.fixed_dictionaries(
    {
        "type": st.just("function"),
        "function": st.fixed_dictionaries(
            {"name": st.sampled_from(["f", "a.b"]), "arguments": st.dictionaries(names, values(1), max_size=3)}
        ),
    }
)
users = st.one_of(
    st.fixed_dictionaries({"role": st.just("user"), "content": texts}),
    st.fixed_dictionaries({"role": st.just("user"), "content": st.lists(good_parts, min_size=1, max_size=3)}),
)
answers = st.fixed_dictionaries({"role": st.just("assistant"), "content": texts}, optional={"reasoning": texts})


def used_tools(calls: list[Any], content: Any, results: list[Any], texted: bool) -> list[Any]:
    """An answer that calls tools, and their results."""
    called = [call | {"id": f"call_{n}"} for n, call in enumerate(calls)]
    told = [
        {
            "role": "tool",
            "tool_call_id": call["id"],
            "content": result if isinstance(result, (str, list)) and texted else "1",
        }
        for call, result in zip(called, results, strict=False)
    ]
    return [{"role": "assistant", "content": content, "tool_calls": called}, *told]


turns = st.one_of(
    users.map(lambda message: [message]),
    answers.map(lambda message: [message]),
    st.builds(
        used_tools,
        st.lists(good_calls, min_size=1, max_size=2),
        st.one_of(st.none(), texts),
        st.lists(st.one_of(texts, st.lists(good_parts, max_size=2)), min_size=2, max_size=2),
        st.booleans(),
    ),
)
begin = st.one_of(st.just([]), st.fixed_dictionaries({"role": st.just("system"), "content": texts}).map(lambda m: [m]))
good = st.builds(
    lambda first, user, rest: first + [user] + [message for turn in rest for message in turn],
    begin, users, st.lists(turns, max_size=4),
)  # fmt: skip
tidy = st.one_of(
    users,
    answers,
    st.fixed_dictionaries(
        {
            "role": st.just("assistant"),
            "content": st.one_of(st.none(), texts),
            "tool_calls": st.lists(calls, max_size=2),
        },
        optional={"reasoning": texts},
    ),
    st.fixed_dictionaries(
        {"role": st.just("tool"), "content": contents}, optional={"name": names, "tool_call_id": names}
    ),
)
wild = st.fixed_dictionaries(
    {"role": st.one_of(st.sampled_from(["user", "assistant", "tool", "system", "developer", "model"]), values(0))},
    optional={
        "content": contents, "tool_calls": values(2), "reasoning": values(0), "reasoning_content": values(0),
        "name": values(0), "tool_call_id": values(0), "tool_responses": values(2), "images": values(1),
        "extra": values(1),
    },
)  # fmt: skip


def strategy() -> st.SearchStrategy[Any]:
    mixed = st.lists(st.one_of(tidy, wild), max_size=5)
    conversation = weighted((7, good), (1, st.lists(tidy, max_size=4)), (1, mixed), (1, values(2)))
    return st.fixed_dictionaries({"messages": conversation, "thinking": st.booleans()})


def check(value: Any) -> str | None:
    processor = demo_processor()
    try:
        prompt = processor(value["messages"], thinking=value["thinking"])
    except Exception as error:  # any: it is judged
        check_refusal(error, (ValueError,))
        return "refused"
    vocabulary = processor.config.text.vocab_size
    must(all(0 <= token < vocabulary for token in prompt.token_ids), "an id beyond the vocabulary")
    for run in prompt.media:
        ids = prompt.token_ids[run.start : run.start + len(run)]
        must(len(set(ids)) == 1 and len(ids) == len(run), "soft tokens are not where the prompt says")
    if "<" in str(value["messages"]) and not any(channel in str(value["messages"]) for channel in CHANNELS):
        try:
            other = processor(without_marks(value["messages"]), thinking=value["thinking"])
        except ValueError:
            return None  # two keys have become one, or a message empty
        controls = [Counter(control_tokens(prompt.token_ids)), Counter(control_tokens(other.token_ids))]
        must(controls[0] == controls[1], "typed text became a control token", [dict(count) for count in controls])
    return None


def without_marks(value: Any) -> Any:
    """The same with another character for that with which control tokens begin."""
    if isinstance(value, str):
        return value.replace("<", "‹") if value not in (PICTURE, SOUND) else value
    if isinstance(value, dict):
        return {without_marks(key): without_marks(entry) for key, entry in value.items()}
    return [without_marks(entry) for entry in value] if isinstance(value, list) else value


def control_tokens(ids: list[int]) -> list[str]:
    added = demo_processor().tokenizer.get_added_tokens_decoder()
    return [added[token].content for token in ids if token in added and added[token].special]
