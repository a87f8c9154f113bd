import warnings
from collections.abc import Sequence
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from toy import LINE_BREAK, chat_template, toy_tokenizer

from mlx_gemma4.reply import Controls, Piece, Reply, ReplyParser, Stats, collect

TOKENIZER = toy_tokenizer()
CONTROLS = Controls.from_tokenizer(TOKENIZER)
CHANNEL, CHANNEL_END, TURN, TURN_END, CALL, CALL_END, EOS = 100, 101, 105, 106, 48, 49, 1
STATS = Stats(1, 1.0, 1, 1.0, 0.1, 1, 0, 0, 0, [], 1.0)

Outcome = tuple[str, str, list[dict[str, Any]]]


def ids(text: str) -> list[int]:
    return TOKENIZER.encode(text, add_special_tokens=False).ids


def letters(text: str) -> list[int]:
    """Ids of single characters and bytes only, so that no control token is made."""
    return [token for character in text for token in ids(character)]


def byte_ids(data: bytes) -> list[int]:
    return [TOKENIZER.token_to_id(f"<0x{byte:02X}>") for byte in data]


def parse(reply: Sequence[int], prompt: Sequence[int] = (), cuts: Sequence[int] = ()) -> Outcome:
    """The joined text, the joined thinking and the calls, the reply being fed in parts cut at `cuts`."""
    parser = ReplyParser(TOKENIZER, CONTROLS, prompt)
    ends = [*sorted(cut for cut in cuts if cut < len(reply)), len(reply)]
    parts = [parser.feed(reply[start:end]) for start, end in zip([0, *ends], ends, strict=False)]
    parts.append(parser.finish())
    return "".join(text for text, _ in parts), "".join(thinking for _, thinking in parts), parser.tool_calls


def test_controls_have_the_published_ids():
    assert Controls(CHANNEL, CHANNEL_END, TURN, TURN_END, CALL, CALL_END) == CONTROLS


def test_a_tokenizer_may_lack_the_control_tokens():
    plain = toy_tokenizer()
    vocab = plain.to_str().replace("<|channel>", "<|other>")
    controls = Controls.from_tokenizer(type(plain).from_str(vocab))
    assert controls.channel_open is None and controls.channel_close == CHANNEL_END


# --- text ------------------------------------------------------------------------------------------


@given(st.text(), st.lists(st.integers(0, 60)))
def test_joined_text_is_what_the_tokenizer_decodes(text: str, cuts: list[int]):
    reply = letters(text)
    assert parse(reply, cuts=cuts) == (TOKENIZER.decode(reply), "", [])
    assert parse([CHANNEL, *ids("thought\n"), *reply, CHANNEL_END], cuts=cuts) == ("", TOKENIZER.decode(reply), [])


def test_leading_and_repeated_spaces_are_kept():
    assert parse(ids("  the  quick ")) == ("  the  quick ", "", [])


def test_characters_come_out_whole():
    parser = ReplyParser(TOKENIZER, CONTROLS, ())
    texts = [parser.feed([token])[0] for token in ids("a日😀")]
    assert texts == ["a", "", "", "日", "", "", "", "😀"]


def test_special_tokens_are_skipped_even_within_a_character():
    first, *rest = byte_ids("日".encode())
    assert parse([2, first, 98, EOS, *rest, TURN, CHANNEL_END, CALL_END, 52]) == ("日", "", [])


def test_incomplete_bytes_at_the_end_are_dropped():
    assert parse([*ids("the"), *byte_ids(b"\xf0\x9f\x98")]) == ("the", "", [])
    assert parse([*ids("the"), *byte_ids(b"\xf0\x9f"), CHANNEL, *ids("thought\na"), *byte_ids(b"\xe6")]) == (
        "the",
        "a",
        [],
    )


def test_invalid_bytes_leave_their_neighbours_alone():
    reply = [*byte_ids("😀".encode() + b"\x80"), *ids("the "), *byte_ids(b"\xff" + "日".encode() + b"\xe6"), *ids("a")]
    assert parse(reply) == ("😀�the �日�a", "", [])


def test_a_replacement_character_that_was_meant_is_kept():
    assert parse(ids("a�")) == ("a�", "", [])


def test_long_runs_of_invalid_bytes_take_linear_time():  # DecodeStream would take ten minutes
    run = byte_ids(b"\x80" * 50_000)
    assert parse(run) == ("�" * 50_000, "", [])
    with pytest.warns(UserWarning, match="the reply ends inside it"):
        assert parse([CALL, *run])[0] == "<|tool_call>" + "�" * 50_000


def test_ids_outside_the_vocabulary_add_nothing():
    assert parse([*ids("the"), 512, 10**6, *ids("quick")]) == ("thequick", "", [])


# --- thoughts --------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "name",
    [ids("thought\n"), letters("thought\n"), [*ids("tho"), *ids("ught"), LINE_BREAK], byte_ids(b"thought\n")],
    ids=["one token", "letters", "two parts", "bytes"],
)
def test_the_channel_name_is_not_part_of_the_thought(name: list[int]):
    reply = [CHANNEL, *name, *ids("a b\nc\n"), CHANNEL_END, *ids("the quick")]
    assert parse(reply) == ("the quick", "a b\nc\n", [])
    assert parse(reply, cuts=range(len(reply))) == ("the quick", "a b\nc\n", [])


def test_a_thought_streams_as_soon_as_its_name_is_over():
    parser = ReplyParser(TOKENIZER, CONTROLS, ())
    fed = [parser.feed([token]) for token in [CHANNEL, *ids("thought\n"), *ids("a"), CHANNEL_END, *ids("b")]]
    assert fed == [("", ""), ("", ""), ("", ""), ("", "a"), ("", ""), ("b", "")]


@pytest.mark.parametrize(
    ("inside", "thinking"),
    [
        ("", ""),
        ("thought", ""),
        ("thought\n", ""),
        ("hm", "hm"),
        ("let me see\nthen", "let me see\nthen"),
        ("\na", "a"),
    ],
)
def test_a_first_line_that_is_no_name_is_thought(inside: str, thinking: str):
    assert parse([CHANNEL, *ids(inside), CHANNEL_END, *ids("b")]) == ("b", thinking, [])
    assert parse([CHANNEL, *ids(inside)]) == ("", thinking, [])


def test_a_long_first_line_is_not_held_back():
    parser = ReplyParser(TOKENIZER, CONTROLS, ())
    assert parser.feed([CHANNEL, *ids("let me")]) == ("", "let me")


def test_in_thought_follows_the_channel():
    parser = ReplyParser(TOKENIZER, CONTROLS, ())
    states = []
    for token in [*ids("a"), CHANNEL, *ids("thought"), LINE_BREAK, CHANNEL_END, CALL, CALL_END]:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            parser.feed([token])
        states.append(parser.in_thought)
    assert states == [False, True, True, True, False, False, False]


@pytest.mark.parametrize(
    ("prompt", "reply", "text", "thinking"),
    [
        ([TURN, *ids("model\n"), CHANNEL, *ids("thought\n")], ids("a\nb"), "", "a\nb"),
        ([CHANNEL, *ids("thought\na b")], ids(" c"), "", " c"),
        ([CHANNEL, *ids("thought")], ids("\na"), "", "a"),
        ([CHANNEL, *ids("tho")], ids("ught\na"), "", "a"),
        ([CHANNEL, *ids("tho")], ids("ught"), "", ""),
        ([CHANNEL], ids("thought\na"), "", "a"),
        ([CHANNEL, *ids("let me")], ids("see"), "", "see"),
        ([CHANNEL, *ids("thought\n"), CHANNEL_END], ids("a\nb"), "a\nb", ""),
        ([CHANNEL, *ids("thought\n"), TURN_END, TURN, *ids("model\n")], ids("a"), "a", ""),
        ([CHANNEL, *ids("thought\n"), 51, EOS], ids("a"), "", "a"),
        ([], ids("a"), "a", ""),
    ],
)
def test_a_reply_may_begin_inside_the_thought(prompt: list[int], reply: list[int], text: str, thinking: str):
    assert ReplyParser(TOKENIZER, CONTROLS, prompt).in_thought == (text == "")
    assert parse(reply, prompt) == (text, thinking, [])
    assert parse([*reply, CHANNEL_END, *ids("c")], prompt) == (text + "c", thinking, [])


def test_channels_in_any_order_lose_nothing():
    reply = [
        CHANNEL_END,
        *ids("a"),
        CHANNEL,
        CHANNEL,
        *ids("hm"),
        CHANNEL,
        *ids("thought\nb"),
        CHANNEL_END,
        CHANNEL_END,
    ]
    assert parse([*reply, *ids("c")]) == ("ac", "hmb", [])


def test_text_that_looks_like_control_tokens_stays_text():
    text = "<|channel>thought\na<channel|><|tool_call>call:f{}<tool_call|><turn|>"
    reply = letters(text)
    assert not set(reply) & {CHANNEL, CHANNEL_END, CALL, CALL_END, TURN_END}
    assert parse(reply) == (text, "", [])


# --- tool calls ------------------------------------------------------------------------------------


def test_tool_calls_are_parsed_and_leave_no_text():
    first = '<|tool_call>call:get_weather{city:<|"|>Zürich {日}<|"|>,days:2}<tool_call|>'
    reply = ids(f"<|channel>thought\nhm<channel|>a{first}<|tool_call>call:now{{}}<tool_call|>b")
    calls = [
        {"name": "get_weather", "arguments": {"city": "Zürich {日}", "days": 2}},
        {"name": "now", "arguments": {}},
    ]
    assert parse(reply) == ("ab", "hm", calls)
    assert parse(reply, cuts=range(len(reply))) == ("ab", "hm", calls)


@pytest.mark.parametrize(
    "call",
    ["<|tool_call>call:f{a}<tool_call|>", "<|tool_call><tool_call|>", "<|tool_call>call:f{", "<|tool_call>call:f{}"],
)
def test_a_malformed_or_unfinished_call_stays_in_the_text(call: str):
    with pytest.warns(UserWarning, match="a tool call is kept as text") as caught:
        assert parse([*ids("a "), *ids(call)]) == ("a " + call, "", [])
    assert len(caught) == 1 and "\n" not in str(caught[0].message)


def test_text_goes_on_behind_a_malformed_call():
    with pytest.warns(UserWarning):
        call, tail = '<|tool_call>call:f{a:<|"|>}<tool_call|>', "the quick"
        assert parse(ids(call + tail)) == (call + tail, "", [])


def test_a_call_inside_a_thought_is_only_thought_of():
    assert parse([CHANNEL, *ids("thought\n"), *ids("<|tool_call>call:f{}<tool_call|>")]) == ("", "call:f{}", [])


# --- any ids at all ----------------------------------------------------------------------------------

words = st.sampled_from(["thought\n", "thought", "a", "日", "call:f{a:", "1}", "}", '<|"|>', "x y\n", "<tool_call|>"])
structure = st.sampled_from([CHANNEL, CHANNEL_END, CALL, CALL_END, TURN, TURN_END, LINE_BREAK])
chunks = structure.map(lambda token: [token]) | words.map(ids) | st.integers(0, 520).map(lambda token: [token])
sequences = st.lists(chunks, max_size=25).map(lambda lists: [token for part in lists for token in part])


@settings(deadline=None)
@given(sequences, sequences, st.lists(st.integers(0, 100)))
@pytest.mark.filterwarnings("ignore:a tool call is kept")
def test_how_a_reply_is_split_never_matters(prompt: list[int], reply: list[int], cuts: list[int]):
    whole = parse(reply, prompt)
    assert parse(reply, prompt, cuts) == whole
    assert parse(reply, prompt, range(len(reply))) == whole


@pytest.mark.filterwarnings("ignore:a tool call is kept")
def test_finish_leaves_nothing_behind():
    for reply in ([*ids("a"), CHANNEL, *ids("hm")], [CALL, *ids("call")], byte_ids(b"\xe6")):
        parser = ReplyParser(TOKENIZER, CONTROLS, ())
        parser.feed(reply)
        parser.finish()
        assert parser.finish() == ("", "")


# --- pieces and replies ------------------------------------------------------------------------------


def test_collect_folds_pieces():
    call = {"name": "f", "arguments": {"a": 1}}
    pieces = [
        Piece("", "\na", [7]),
        Piece("b ", "\n", [8, 9]),
        Piece("c\n", "", [], finish_reason="stop", tool_calls=[call], stats=STATS),
    ]
    assert collect(iter(pieces)) == Reply("b c\n", "a", [call], [7, 8, 9], "stop", STATS)


def test_a_reply_without_thought_or_calls():
    reply = collect([Piece("a", "\n", [7], finish_reason="length", stats=STATS)])
    assert reply.thinking is None and reply.tool_calls == []
    assert reply.message == {"role": "assistant", "content": "a"}


@pytest.mark.parametrize("pieces", [[], [Piece("a", "", [7])], [Piece("a", "", [7], finish_reason="stop")]])
def test_collect_refuses_pieces_without_an_end(pieces: list[Piece]):
    with pytest.raises(ValueError, match="the last piece needs a finish_reason and stats"):
        collect(pieces)


def test_message_goes_back_through_the_template():
    reply = ids("<|channel>thought\nhm\n<channel|><|tool_call>call:get{a:[1,2]}<tool_call|>")
    text, thinking, calls = parse(reply)
    message = collect([Piece(text, thinking, reply, "stop", calls, STATS)]).message
    assert message["reasoning"] == "hm"
    messages = [
        {"role": "user", "content": "hi"},
        message,
        {"role": "tool", "tool_call_id": "call_0", "content": "3"},
    ]
    chat = chat_template().render(
        messages=messages, enable_thinking=True, add_generation_prompt=True, bos_token="<bos>"
    )
    assert TOKENIZER.decode(reply, skip_special_tokens=False) + "<|tool_response>response:get{" in chat
    assert chat.endswith("<tool_response|><|channel>thought\n")
    assert parse(ids("so 3<channel|>three"), prompt=ids(chat)) == ("three", "so 3", [])
