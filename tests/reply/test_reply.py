from collections.abc import Sequence
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from toy import LINE_BREAK, chat_template, toy_tokenizer

from mlx_gemma4.reply.reply import Controls, Piece, Reply, ReplyParser, Stats, collect

TOKENIZER = toy_tokenizer()
CONTROLS = Controls.from_tokenizer(TOKENIZER)
CHANNEL, CHANNEL_END, TURN, TURN_END, CALL, CALL_END, EOS = 100, 101, 105, 106, 48, 49, 1
STATS = Stats(1, 0, 1.0, 1, 1.0, 0.1, 1, 0, 0, 0, [], 1.0)

RESPONSE, QUOTE, THINK = 50, 52, 98
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
    return parse_with_notes(reply, prompt, cuts)[:3]


def parse_with_notes(
    reply: Sequence[int], prompt: Sequence[int] = (), cuts: Sequence[int] = (), finish_reason: str = "stop"
) -> tuple[str, str, list[dict[str, Any]], list[str]]:
    parser = ReplyParser(TOKENIZER, CONTROLS, prompt)
    ends = [*sorted(cut for cut in cuts if cut < len(reply)), len(reply)]
    parts = [parser.feed(reply[start:end]) for start, end in zip([0, *ends], ends, strict=False)]
    parts.append(parser.finish(finish_reason))
    text, thinking = ("".join(column) for column in zip(*parts, strict=True))
    return text, thinking, parser.tool_calls, parser.take_notes()


def test_controls_have_the_published_ids():
    assert Controls(CHANNEL, CHANNEL_END, TURN, TURN_END, CALL, CALL_END, RESPONSE, EOS, QUOTE, THINK) == CONTROLS


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


def test_text_comes_out_before_the_call_behind_it():
    """A text to stop at, of which it may be the beginning, spans no call."""
    parser = ReplyParser(TOKENIZER, CONTROLS, (), stop=["the end"])
    assert [parser.feed([token])[0] for token in [*letters("so the"), CALL]][-4:] == ["", "", "", "the"]
    parser.feed(ids("call:f{}"))
    assert parser.take_calls() and parser.feed([CALL_END]) == parser.finish() == ("", "")


@pytest.mark.parametrize("reason", ["length", "stop"])
def test_no_text_to_stop_at_is_looked_for_in_a_call_that_the_reply_ends_in(reason: str):
    parser = ReplyParser(TOKENIZER, CONTROLS, (), stop=["a"])
    parser.feed([*letters("so"), CALL, *letters("call:f{")])
    assert parser.finish(reason) == ("<|tool_call>call:f{", "") and not parser.stopped


def test_calls_that_end_a_thought_are_calls_at_once():
    """As a reply is held that may have some."""
    parser = ReplyParser(TOKENIZER, CONTROLS, (), calls_end_thoughts=True)
    call = [CALL, *ids("call:f{}"), CALL_END]
    parser.feed([CHANNEL, *ids("thought\nzz"), *call, CALL, *ids("call:g{")])
    assert parser.tool_calls == [{"name": "f", "arguments": {}}] and not parser.in_thought
    assert [part.name for part in parser.take_calls()] == ["f", None, "g"]
    assert parser.finish("length") == ("<|tool_call>call:g{", "") and parser.message["reasoning"] == "zz"


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
    text, _, _, notes = parse_with_notes([CALL, *run])
    assert text == "<|tool_call>" + "�" * 50_000
    assert notes == ["a tool call is kept as text: the reply ends inside it"]


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
    ["<|tool_call>call:f{a}<tool_call|>", "<|tool_call><tool_call|>", "<|tool_call>call:f{", "<|tool_call>call:f{a:{"],
)
def test_a_malformed_or_unfinished_call_stays_in_the_text(call: str):
    text, thinking, calls, notes = parse_with_notes([*ids("a "), *ids(call)])
    assert (text, thinking, calls) == ("a " + call, "", [])
    assert len(notes) == 1 and notes[0].startswith("a tool call is kept as text: ") and "\n" not in notes[0]


def test_text_goes_on_behind_a_malformed_call():
    call, tail = "<|tool_call>call:f{a:}<tool_call|>", "the quick"
    assert parse(ids(call + tail)) == (call + tail, "", [])


def test_a_call_inside_a_thought_is_only_thought_of_if_the_thought_closes():
    thought = [CHANNEL, *ids("thought\na "), *ids("<|tool_call>call:f{}<tool_call|>"), *ids("b")]
    assert parse([*thought, CHANNEL_END, *ids("c")]) == ("c", "a call:f{}b", [])
    assert parse(thought) == ("", "a b", [{"name": "f", "arguments": {}}])
    assert parse(thought[2:], prompt=thought[:2]) == ("", "a b", [{"name": "f", "arguments": {}}])
    assert parse_with_notes(thought, finish_reason="length") == ("", "a call:f{}b", [], [])  # it may have closed yet


CALL_F = {"name": "f", "arguments": {}}


def test_a_call_without_its_end_token_counts_if_the_reply_was_not_cut_off():
    for tail, arguments in (("call:f{}", {}), ("call:f{a:1", {"a": 1}), ('call:f{a:<|"|>x', {"a": "x"})):
        reply = [CALL, *ids(tail)]
        assert parse(reply) == ("", "", [{"name": "f", "arguments": arguments}])
        cut = parse_with_notes(reply, finish_reason="length")
        if tail == "call:f{}":  # it lacks nothing else
            assert cut == ("", "", [CALL_F], [])
        else:
            assert cut == ("<|tool_call>" + tail, "", [], ["a tool call is kept as text: the reply ends inside it"])


@pytest.mark.parametrize("end", [RESPONSE, TURN_END, EOS, CALL, CHANNEL, CHANNEL_END])
def test_other_control_tokens_end_a_call_too(end: int):
    assert parse([CALL, *ids("call:f{"), *ids("}"), end, *ids("call:g{}"), CALL_END])[2][0] == CALL_F
    assert parse([CALL, *ids('call:f{a:<|"|>x<|"|>}'), CALL, *ids("call:f{}"), CALL_END])[2][1:] == [CALL_F]


def test_an_end_token_inside_a_string_is_part_of_it():
    string = "a <tool_call|> b <turn|> <|tool_call>call:g{}<tool_call|>"
    reply = ids(f'<|tool_call>call:f{{a:<|"|>{string}<|"|>}}<tool_call|>x')
    assert parse(reply, cuts=range(len(reply))) == ("x", "", [{"name": "f", "arguments": {"a": string}}])


def test_a_string_without_its_mark_ends_with_its_call():
    reply = ids('<|tool_call>call:f{a:<|"|>ls}<tool_call|>x <|tool_call>call:f{}<tool_call|>y')
    calls = [{"name": "f", "arguments": {"a": "ls"}}, CALL_F]
    assert parse(reply, cuts=range(len(reply))) == ("x y", "", calls)
    again = ids('<|tool_call>call:f{a:<|"|>ls}<tool_call|><|tool_call>call:f{a:<|"|>ls}<tool_call|>x')
    assert parse(again) == ("x", "", [calls[0], calls[0]])


def test_the_text_of_a_mark_inside_a_string_is_text():
    mark = letters('<|"|>')
    assert QUOTE not in mark
    reply = [CALL, *ids("call:f{a:"), QUOTE, *ids("x "), *mark, *ids(",b:"), *mark, QUOTE, *ids("}"), CALL_END]
    assert parse(reply) == ("", "", [{"name": "f", "arguments": {"a": 'x <|"|>,b:<|"|>'}}])


def test_many_strings_without_end_take_linear_time():  # quadratic time would be minutes
    call = ids('<|tool_call>call:f{a:<|"|>ls}<tool_call|>')
    assert len(parse(call * 3000)[2]) == 3000
    assert len(parse([*call[:-1], *[CALL_END, TURN_END] * 30_000])[2]) == 1


def test_schemas_help_with_calls_that_are_nearly_right():
    reply = ids("<|tool_call>call:f{a:hello, world,b:1}<tool_call|>")
    schemas = {"f": {"properties": {"a": {"type": "string"}, "b": {"type": "integer"}}}}
    parser = ReplyParser(TOKENIZER, CONTROLS, (), schemas)
    parser.feed(reply)
    assert parser.finish() == ("", "")
    assert parser.tool_calls == [{"name": "f", "arguments": {"a": "hello, world", "b": 1}}]
    assert parse(reply)[2] == []


def test_a_thought_without_its_name_keeps_its_first_line():
    for first in ("hm\n", "thoughtful\n", "a\n", "tho\n"):
        assert parse([CHANNEL, *ids(first), *ids("b"), CHANNEL_END, *ids("c")]) == ("c", first + "b", [])


@pytest.mark.parametrize(
    ("reply", "text", "thinking"),
    [
        ("thought\n<channel|>Yes.", "Yes.", ""),
        ("thought\nIs it?\nIt is.<channel|>Yes.", "Yes.", "Is it?\nIt is."),
        ("thought\nnotion\nidea", "thought\nnotion\nidea", ""),
        ("thought", "thought", ""),
        ("thoughtful<channel|>", "thoughtful", ""),
        ("Yes.\nthought\n<channel|>", "Yes.\nthought\n", ""),
        ("thought\nx<|channel>thought\ny<channel|>z", "thought\nxz", "y"),
    ],
)
def test_a_thought_may_lack_the_token_that_opens_it(reply: str, text: str, thinking: str):
    """Seen behind a tool's result (ollama #15943): its name is there, and the token that closes it."""
    for prompt in (ids("<|turn>model\n"), ids("<|tool_response>response:f{value:1}<tool_response|>"), []):
        assert parse(ids(reply), prompt, range(len(reply))) == (text, thinking, [])


def test_only_what_may_be_such_a_thought_is_held_back():
    parser = ReplyParser(TOKENIZER, CONTROLS, ids("<|turn>model\n"))
    assert [parser.feed([token])[0] for token in letters("those are")] == ["", "", "", "thos", *"e are"]
    parser = ReplyParser(TOKENIZER, CONTROLS, ids("a first "))
    assert [parser.feed([token])[0] for token in letters("thought\n")] == [*"thought\n"]


def test_notes_come_once_and_those_of_the_prompt_first():
    parser = ReplyParser(TOKENIZER, CONTROLS, (), notes=["long"])
    parser.feed(ids("<|tool_call>call:f{a}<tool_call|>"))
    first, *rest = parser.take_notes()
    assert first == "long" and len(rest) == 1 and rest[0].startswith("a tool call is kept as text: ")
    assert parser.take_notes() == []


def test_the_message_of_a_parser_is_that_of_the_reply():
    reply = ids("<|channel>thought\nhm\n<channel|>a <|tool_call>call:f{}<tool_call|>")
    parser = ReplyParser(TOKENIZER, CONTROLS, ())
    pieces = [Piece(*parser.feed([token]), [token]) for token in reply]
    last = Piece(*parser.finish(), [], "stop", parser.tool_calls, STATS, ["n"], parser.message)
    whole = collect([*pieces, last])
    assert whole.message == last.message and last.message["reasoning"] == "hm" and whole.notes == ["n"]


# --- any ids at all ----------------------------------------------------------------------------------

words = st.sampled_from(["thought\n", "thought", "a", "日", "call:f{a:", "1}", "}", '<|"|>', "x y\n", "<tool_call|>"])
structure = st.sampled_from([CHANNEL, CHANNEL_END, CALL, CALL_END, TURN, TURN_END, LINE_BREAK])
chunks = structure.map(lambda token: [token]) | words.map(ids) | st.integers(0, 520).map(lambda token: [token])
sequences = st.lists(chunks, max_size=25).map(lambda lists: [token for part in lists for token in part])


@settings(deadline=None)
@given(sequences, sequences, st.lists(st.integers(0, 100)))
def test_how_a_reply_is_split_never_matters(prompt: list[int], reply: list[int], cuts: list[int]):
    whole = parse(reply, prompt)
    assert parse(reply, prompt, cuts) == whole
    assert parse(reply, prompt, range(len(reply))) == whole


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
