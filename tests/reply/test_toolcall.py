import json
import subprocess
import sys
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from toy import chat_template

from mlx_gemma4.reply.toolcall import MAX_DEPTH, QUOTE, QUOTE_TOKEN, needs_quotes, parse_tool_call, read_tool_calls

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
    code = "import sys, mlx_gemma4.reply.toolcall; sys.exit('mlx_lm' in sys.modules or 'transformers' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


# --- calls that are nearly right ---------------------------------------------------------------

Q = QUOTE
SCHEMAS = {
    "f": {"properties": {"a": {"type": "string"}, "b": {"type": "string"}, "n": {"type": "integer"}}},
    "g": {"properties": {"flag": {"type": "boolean"}, "list": {"type": "array", "items": {"type": "string"}}}},
}


@pytest.mark.parametrize(
    ("body", "arguments"),
    [
        ("{pattern:'a, b: {c}'}", {"pattern": "a, b: {c}"}),
        ("{a:'it's here',n:1}", {"a": "it's here", "n": 1}),
        (r"{a:'it\'s',b:':\s*\w+'}", {"a": "it's", "b": r":\s*\w+"}),
        (f"{{a:'x'{Q}}}", {"a": "x"}),
        ('{a:"say "hi" now"}', {"a": 'say "hi" now'}),
        ("{a:Paris}", {"a": "Paris"}),
        ("{a:New York,b:x}", {"a": "New York", "b": "x"}),
        ("{t:12:30,url:https://a.b/c?x=1}", {"t": "12:30", "url": "https://a.b/c?x=1"}),
        ("{d:2024-01-05,v:1.2.3}", {"d": "2024-01-05", "v": "1.2.3"}),
        ("{a=1,b='x',c=[1]}", {"a": 1, "b": "x", "c": [1]}),
        ("{x:True,y:False,z:None}", {"x": True, "y": False, "z": None}),
        ("{n:1,}", {"n": 1}),
        ("{x:[42,],y:{z:1,},}", {"x": [42], "y": {"z": 1}}),
        ("{x:108.,y:.5,z:-3.}", {"x": 108.0, "y": 0.5, "z": -3.0}),
        ("{n:007,zip:01234}", {"n": "007", "zip": "01234"}),
        ("{x:{y:1}", {"x": {"y": 1}}),
        ("{x:[{y:1}]", {"x": [{"y": 1}]}),
        ("{x:[1}", {"x": [1]}),
        ("{n:1}}", {"n": 1}),
        ("{x:[1]}]}", {"x": [1]}),
        ("{", {}),
        ("", {}),
        ("()", {}),
        ("(n:1)", {"n": 1}),
        (f"(a={Q}ls -a{Q}, n=2)", {"a": "ls -a", "n": 2}),
        ("({n:1})", {"n": 1}),
        (f"{{a:{Q}ls}}", {"a": "ls"}),
        (f"{{x:{{a:{Q}ls}}}}", {"x": {"a": "ls"}}),
        (f"{{a:{Q}ls", {"a": "ls"}),
        (f"{{a:{Q}echo ${{x}}", {"a": "echo ${x}"}),
        (f"{{a:weather in Tokyo{Q}}}", {"a": "weather in Tokyo"}),
        (f"{{query:Paris, France{Q},n:5}}", {"query": "Paris, France", "n": 5}),
        (f"{{x:[{Q}a{Q},b{Q}]}}", {"x": ["a", "b"]}),
        (f"{{a:{Q}the mark {Q} is text{Q}}}", {"a": f"the mark {Q} is text"}),
        ("{'zz':1,'b':'x'}", {"zz": 1, "b": "x"}),
    ],
)
def test_a_call_that_is_nearly_right_is_read(body: str, arguments: dict[str, Any]) -> None:
    for name in ("unknown", "f"):
        read = read_tool_calls(f"call:{name}{body}", SCHEMAS)
        assert json.dumps(read) == json.dumps([{"name": name, "arguments": arguments}])


@pytest.mark.parametrize(
    ("text", "arguments"),
    [
        ("call:f{a:hello, world,b:it's}", {"a": "hello, world", "b": "it's"}),
        ("call:f{a:\n\n# Title: {x}, it's", {"a": "\n\n# Title: {x}, it's"}),
        ("call:f{a:1.,b:True}", {"a": "1.", "b": "True"}),
        ("call:f{n:1.,a:x}", {"n": 1.0, "a": "x"}),
        (f"call:f{{a:{Q}look{Q}n:90}}", {"a": "look", "n": 90}),
        ("call:f{n:1 a:x}", {"n": 1, "a": "x"}),
        ("call:f{'n':1}", {"n": 1}),
        ("f{a:x}", {"a": "x"}),
        ("call:g{flag:True,list:[a, b c]}", {"flag": True, "list": ["a", "b c"]}),
    ],
)
def test_a_schema_decides_what_may_be_meant(text: str, arguments: dict[str, Any]) -> None:
    assert [call["arguments"] for call in read_tool_calls(text, SCHEMAS)] == [arguments]


@pytest.mark.parametrize(
    "text",
    [
        "", "hello", "call:", "call:{a:1}", "call:f prose", "call:f(x)", "call:f[1,2]", "call:f{a}", "call:f{a:}",
        "call:f{:1}", "call:f{n:many}", "call:unknown{a:hello, world}", "call:unknown{x:1 y:2}", "call:unknown{a:x\ny}",
        "call:unknown{a:hello", "print{x:1}", "call:f{a:'abc}", 'call:f{a:"C:\\users\\bob"}', "call:f{}call:g{a}",
        f"call:f{{a:{Q}one,b:{Q}two{Q}}}", f"call:unknown{{a:{Q}look{Q}n:90}}", "call:g{flag:maybe}",
        f"call:f{{a:{Q}one{Q},{Q}}}", "call:f{a:'one' , '}", f"call:unknown{{':{Q}x{Q},':1",
        f"call:f{{a:true,{Q}}}",
    ],
)  # fmt: skip
def test_what_could_mean_two_things_is_refused_in_one_line(text: str) -> None:
    with pytest.raises(ValueError) as error:
        read_tool_calls(text, SCHEMAS)
    assert "\n" not in str(error.value) and len(str(error.value)) < 200


def test_a_key_that_is_one_mark_is_no_key_in_quotes() -> None:
    call = {"name": "h", "arguments": {"'": "x", "b": 1}}
    assert read_tool_calls(f"call:h{{':{Q}x{Q},b:1}}", {"h": {"properties": {"": {}, "b": {}}}}) == [call]


def test_two_calls_in_one_block_are_two() -> None:
    first, second = {"name": "f", "arguments": {"a": 1}}, {"name": "g", "arguments": {"b": ["}"]}}
    for between in ("", "\n", ",", "; ", "}"):
        assert read_tool_calls(f"call:f{{a:1}}{between}call:g{{b:[{Q}}}{Q}]}}") == [first, second]


@pytest.mark.parametrize(
    "body", [f"{{a:{Q}ls", f"{{a:{Q}ls{Q}", "{a:1", "{a:[1", "{a:Par", f"{{a:{Q}ls{Q},{Q}}}", f"{{a:1,{Q}}}"]
)
def test_what_was_cut_off_is_not_completed(body: str) -> None:
    with pytest.raises(ValueError):
        read_tool_calls(f"call:f{body}", SCHEMAS, ended=False)
    assert read_tool_calls("call:f{n:1,}", ended=False) == [{"name": "f", "arguments": {"n": 1}}]


@given(names, st.dictionaries(st.text(), values, max_size=4))
def test_calls_in_the_right_form_are_read_as_they_are(name: str, arguments: dict[str, Any]) -> None:
    written = written_by_template(name, arguments)
    try:
        exact = parse_tool_call(written)
    except ValueError:
        return
    assert json.dumps(read_tool_calls(written)) == json.dumps([exact])


@given(st.text() | st.text(' \t\n\xa0\u3000"ab:', max_size=4), values)
def test_a_key_that_needs_quotes_is_read_with_them_and_any_other_without(key: str, value: Any) -> None:
    written = f"{QUOTE_TOKEN}{key}{QUOTE_TOKEN}" if needs_quotes(key) else key
    assert parse_tool_call(f"call:f{{{written}:1}}", QUOTE_TOKEN)["arguments"] == {key: 1}


@pytest.mark.parametrize("key", ["", " ", "▁", "a▁", " a", "a\n", '"', '"a', "a:b", "a,b", "{", "]"])
def test_keys_that_would_be_read_as_others_need_quotes(key: str) -> None:
    assert needs_quotes(key)


@given(st.text("{}[]():=,;'\"<|> \ncalTrue1-e.\udc22", max_size=40), st.booleans())
def test_any_block_raises_only_value_errors(text: str, ended: bool) -> None:
    for quotes in ((Q,), (QUOTE_TOKEN, Q)):
        for start in ("", "call:f{", "call:f("):
            try:
                calls = read_tool_calls(start + text, SCHEMAS, ended, quotes)
            except ValueError as error:
                assert "\n" not in str(error)
            else:
                assert calls and QUOTE_TOKEN not in json.dumps(calls, ensure_ascii=False)


@pytest.mark.parametrize(
    "body",
    [
        "a:'" + "'" * 200_000, "a:" + "b c, " * 60_000 + "}", "a:'" + "x', y" * 60_000,
        "a:" + "[" * 90 + "x y," * 60_000,
        f"a:{Q}" + f"x{Q} " * 60_000, "n:1," * 60_000 + "a:b c", "a:" + "'x'," * 60_000, "a:" + "(" * 200_000,
    ],
)  # fmt: skip
def test_long_blocks_take_linear_time(body: str) -> None:  # quadratic time would be minutes
    for schemas in ({}, SCHEMAS):
        try:
            read_tool_calls("call:f{" + body, schemas)
        except ValueError as error:
            assert len(str(error)) < 200
