"""What is said of a call while it is written adds up to the call."""

import json
from typing import Any

import pytest
from toy import toy_tokenizer

from mlx_gemma4.reply.reply import Controls, ReplyParser

TOKENIZER = toy_tokenizer()
CONTROLS = Controls.from_tokenizer(TOKENIZER)


def written(text: str, finish_reason: str = "stop") -> tuple[list[tuple[int, str | None, str]], list[dict[str, Any]]]:
    """The parts, token by token, and the calls."""
    parser = ReplyParser(TOKENIZER, CONTROLS, ())
    parts = []
    for token in TOKENIZER.encode(text, add_special_tokens=False).ids:
        parser.feed([token])
        parts += [(part.index, part.name, part.arguments) for part in parser.take_calls()]
    parser.finish(finish_reason)
    parts += [(part.index, part.name, part.arguments) for part in parser.take_calls()]
    return parts, parser.tool_calls


CALLS = [
    'call:f{a:1,b:<|"|>x, y}{<|"|>,c:[1,2,{d:3}]}',
    "call:f{}",
    'call:f.g-h{a b:<|"|><|"|>}',
    'call:f{<|"|>odd, key<|"|>:null,b:{c:1,d:[]}}',
    'call:f{"a":1,"b":2}',  # not the template's form
    "f(a=1, b=2)",
    'call:f{a:<|"|>é and [<|"|>}',
    "call:f{a:1,b:2,a:3}",
    "call:f{a:1,a:1,b:{c:1,c:2}}",
    "call: f{a:1,b:2}",
    "call:f({a:1,b:2})",
    "call:f{}call:g{b:2}",
]


@pytest.mark.parametrize("call", CALLS)
def test_parts_add_up_to_the_calls(call: str) -> None:
    text = f"one <|tool_call>{call}<tool_call|><|tool_call>call:g{{a:2}}<tool_call|>"
    parts, calls = written(text)
    indexes = [index for index, _, _ in parts]
    assert indexes == sorted(indexes)
    for index, made in enumerate(calls):
        own = [part for part in parts if part[0] == index]
        assert [name for _, name, _ in own] == [made["name"]] + [None] * (len(own) - 1)
        assert json.loads("".join(arguments for _, _, arguments in own)) == made["arguments"]


def test_each_argument_comes_before_the_next_is_written() -> None:
    parts, _ = written('<|tool_call>call:f{a:1,b:<|"|>x<|"|>,c:2}<tool_call|>')
    assert parts == [(0, "f", ""), (0, None, '{"a": 1'), (0, None, ', "b": "x"'), (0, None, ', "c": 2}')]


@pytest.mark.parametrize(
    ("text", "rest"),
    [
        ('a:1,b:<|"|>x <tool_call|> y<|"|>,c:2}<tool_call|>', ', "b": "x <tool_call|> y", "c": 2}'),
        ('a:1,b:<|"|>x}<tool_call|><|tool_call>call:g{c:<|"|>, y<|"|>}<tool_call|>', ', "b": "x"}'),  # no end
    ],
)
def test_of_a_string_with_a_control_token_nothing_is_said_before_the_end(text: str, rest: str) -> None:
    parts, _ = written("<|tool_call>call:f{" + text)
    assert [part for part in parts if part[0] == 0] == [(0, "f", ""), (0, None, '{"a": 1'), (0, None, rest)]


def test_a_call_that_is_cut_leaves_its_beginning() -> None:
    parts, calls = written('<|tool_call>call:f{a:1,b:<|"|>x', "length")
    assert not calls
    assert "".join(arguments for _, _, arguments in parts) == '{"a": 1'


def test_a_call_is_named_once() -> None:
    parts, calls = written("<|tool_call>call:f{call: x]b:{c:1}<tool_call|>")
    assert parts == [(0, "f", "")] and not calls


def test_a_call_that_turns_out_to_be_none_leaves_its_index_alone() -> None:
    none = "<|tool_call>call:f{a:1,b:2}no<tool_call|><|tool_call>f no<tool_call|>"
    parts, calls = written(f"{none}<|tool_call>call:f{{a:3}}<tool_call|>")
    assert parts == [(0, "f", ""), (0, None, '{"a": 1'), (1, "f", ""), (1, None, '{"a": 3}')]
    assert calls == [{"name": "f", "arguments": {"a": 3}}]


def test_a_call_that_was_only_thought_of_is_not_given() -> None:
    parts, calls = written("<|channel>thought\n<|tool_call>call:f{a:1,b:2}<tool_call|>no<channel|>done")
    assert parts == calls == []


def test_tokens_of_thoughts_are_counted() -> None:
    parser = ReplyParser(TOKENIZER, CONTROLS, ())
    thought, answer = (
        TOKENIZER.encode(text, add_special_tokens=False).ids
        for text in ("<|channel>thought\nlong<channel|>", "the answer")
    )
    parser.feed(thought + answer)
    assert parser.thinking_tokens == len(thought)
