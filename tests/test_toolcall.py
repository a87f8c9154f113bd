import json
import subprocess
import sys
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from toy import chat_template

from mlx_gemma4.toolcall import MAX_DEPTH, parse_tool_call

template = chat_template()

strings = st.text().filter(lambda s: '<|"|>' not in s)
keys = st.text(min_size=1).filter(
    lambda s: s == s.strip() and not set(s) & set(":,{}[]") and not s.startswith(('"', '<|"|>'))
)
scalars = st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False, allow_infinity=False) | strings
values = st.recursive(scalars, lambda v: st.lists(v, max_size=4) | st.dictionaries(keys, v, max_size=4), max_leaves=12)
names = st.text("abcXYZ019_-.:", min_size=1)


def written_by_template(name: str, arguments: dict[str, Any]) -> str:
    call = {"id": "call_0", "type": "function", "function": {"name": name, "arguments": arguments}}
    chat = template.render(messages=[{"role": "assistant", "content": "", "tool_calls": [call]}], bos_token="")
    return chat[chat.index("<|tool_call>") + len("<|tool_call>") : chat.rindex("<tool_call|>")]


@given(names, st.dictionaries(keys, values, max_size=4))
def test_parser_is_the_inverse_of_the_template(name: str, arguments: dict[str, Any]):
    parsed = parse_tool_call(written_by_template(name, arguments))
    assert parsed["name"] == name
    # as JSON, because 1, 1.0 and True are three things
    assert json.dumps(parsed["arguments"], sort_keys=True) == json.dumps(arguments, sort_keys=True)


def test_every_kind_of_value():
    call = (
        'call:get_weather{city:<|"|>Paris, {"fr"}\n<|"|>,days:2,opts:{a:true,b:null},l:[1,<|"|>x<|"|>,[],{}],f:-1e-05}'
    )
    assert parse_tool_call(call) == {
        "name": "get_weather",
        "arguments": {
            "city": 'Paris, {"fr"}\n',
            "days": 2,
            "opts": {"a": True, "b": None},
            "l": [1, "x", [], {}],
            "f": -1e-05,
        },
    }


def test_names_and_keys_are_not_limited_to_words():
    call = parse_tool_call("call:mcp:files-v1.read{max-len:1,a.b:2,$ref:3,with space:4,été:5}")
    assert call == {
        "name": "mcp:files-v1.read",
        "arguments": {"max-len": 1, "a.b": 2, "$ref": 3, "with space": 4, "été": 5},
    }


def test_white_space_around_separators_is_skipped_but_kept_in_strings():
    call = parse_tool_call('\n call:f {\n a : <|"|> x <|"|> ,\n b : [ 1 , 2 ] , c : { } , d : [ ] } \n')
    assert call == {"name": "f", "arguments": {"a": " x ", "b": [1, 2], "c": {}, "d": []}}


def test_quoted_keys_and_json_strings_are_taken_too():
    call = parse_tool_call(r'call:f{<|"|>a:b<|"|>:"say \"hi\" \u00e9, {x}","c,d":[""]}')
    assert call == {"name": "f", "arguments": {"a:b": 'say "hi" é, {x}', "c,d": [""]}}


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "expected 'call:' at character 0, got ''"),
        ("get_weather{}", "expected 'call:' at character 0"),
        ("call:{}", "expected a name"),
        ("call:f", "expected '{'"),
        ("call:f{", "expected a key"),
        ("call:f{a}", "expected ':' at character 8, got '}'"),
        ("call:f{a:}", "expected a value"),
        ("call:f{a:1", "expected '}'"),
        ("call:f{a:1,}", "expected a key"),
        ("call:f{a:[1,]}", "expected a value"),
        ("call:f{a:[1}", "expected ']'"),
        ("call:f{a:Paris}", "got 'Paris}'"),
        ("call:f{a:1 2}", "expected '}'"),
        ("call:f{a:007}", "expected '}'"),
        ('call:f{a:<|"|>x}', 'expected a closing <|"|>'),
        ('call:f{a:"x}', "expected a value"),
        ("call:f{}call:g{}", "expected the end at character 8, got 'call:g{}'"),
        ("call:f{a:" + "9" * 5000 + "}", "expected a value"),  # Python converts at most 4300 digits
    ],
)
def test_malformed_calls_raise_one_line_that_says_what_was_got(text: str, message: str):
    with pytest.raises(ValueError) as error:
        parse_tool_call(text)
    assert message in str(error.value)
    assert "\n" not in str(error.value)
    assert len(str(error.value)) < 200


@given(st.text('{}[]:,"<|> \ncal1-e.', max_size=40))
def test_anything_else_raises_only_value_errors(text: str):
    try:
        call = parse_tool_call("call:f{" + text)
    except ValueError as error:
        assert "\n" not in str(error)
    else:
        assert isinstance(call["arguments"], dict)


@pytest.mark.parametrize(("opening", "closing"), [("[", "]"), ("{a:", "}")])
def test_nesting_is_bounded(opening: str, closing: str):
    deepest = MAX_DEPTH - 1  # the arguments themselves are the first level
    parse_tool_call("call:f{a:" + opening * deepest + "1" + closing * deepest + "}")
    for depth in (MAX_DEPTH, 100_000):
        with pytest.raises(ValueError, match="at most 100 levels"):
            parse_tool_call("call:f{a:" + opening * depth)


@pytest.mark.parametrize(
    ("body", "ok"),
    [
        ('a:<|"|>' + "x" * 1_000_000 + '<|"|>}', True),
        ("a:[" + "1," * 200_000 + "1]}", True),
        ("a:" + " " * 300_000 + "1}", True),
        ("a" * 1_000_000, False),
        ('a:"' + '\\"' * 500_000, False),
        ('a:<|"|>' * 100_000, False),
    ],
)
def test_long_calls_take_linear_time(body: str, ok: bool):  # quadratic time would be minutes
    try:
        parse_tool_call("call:f{" + body)
    except ValueError:
        assert not ok
    else:
        assert ok


def test_parser_does_not_import_mlx_lm():
    code = "import sys, mlx_gemma4.toolcall; sys.exit('mlx_lm' in sys.modules or 'transformers' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
