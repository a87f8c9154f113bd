"""Whatever the grammar of calls allows is read back by the template's own reader, and fits the tool's schema."""

import json
import re
from typing import Any

import jsonschema
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st
from jinja2 import Environment
from llguidance import LLMatcher
from mcp_tools import TOOLS, openapi, tool
from walks import Walker

from mlx_gemma4 import Prompt
from mlx_gemma4.forms.calls import Compiler, call_grammar, in_order
from mlx_gemma4.forms.lark import literal
from mlx_gemma4.forms.strings import FORMATS, letters, matches, whole_pattern
from mlx_gemma4.model.model import Model
from mlx_gemma4.prompt.messages import check_tools
from mlx_gemma4.prompt.processor import Processor
from mlx_gemma4.reply.toolcall import needs_quotes

Loaded = tuple[Model, Processor]
Schema = dict[str, Any]
ASKED = [{"role": "user", "content": "hello"}]


@pytest.fixture(scope="module")
def walker(tiny: Loaded) -> Walker:
    return Walker(tiny[1])


def declared(tools: list[Schema]) -> Prompt:
    """As a prompt would have them; written out they are too long for the toy's context."""
    return Prompt([2], tools=tuple(check_tools(tools)))


def calls_of(walker: Walker, tools: list[Schema], count: int, choice: str = "required") -> list[Schema]:
    """The calls of random replies."""
    prompt = declared(tools)
    form, found = walker.form(prompt, tool_choice=choice), list[Schema]()
    schemas = [own["function"]["parameters"] for own in tools]
    required = [f"{name}:" for schema in schemas for name in schema.get("required", []) if not needs_quotes(name)]
    for _ in range(count):
        constraint, tokens = walker.walk(form, prompt, wanted=required)
        if not constraint.calls:  # cut off
            continue
        parser = walker.read(tokens, prompt)
        text = walker.processor.tokenizer.decode(tokens, skip_special_tokens=False)
        assert len(parser.tool_calls) >= len(constraint.calls), text
        assert not constraint.is_finished or not parser.take_notes(), text
        found += parser.tool_calls[: len(constraint.calls)]
    return found


def arguments(walker: Walker, schema: Schema, count: int = 25) -> list[Schema]:
    """What random calls of a tool with this schema say, which all fit it."""
    tools = [{"type": "function", "function": {"name": "f", "description": "", "parameters": schema}}]
    found = [call["arguments"] for call in calls_of(walker, tools, count)]
    assert found
    for own in found:
        jsonschema.validate(own, schema, jsonschema.Draft202012Validator)
    return found


@pytest.mark.parametrize("number", range(len(TOOLS)))
def test_calls_of_published_tools_fit_their_schemas(walker: Walker, number: int) -> None:
    own = TOOLS[number]["function"]
    found = calls_of(walker, [TOOLS[number]], 6)
    assert found
    for call in found:
        assert call["name"] == own["name"]
        jsonschema.validate(call["arguments"], openapi(own["parameters"]), jsonschema.Draft202012Validator)


def test_thirty_tools_are_told_apart_by_name(walker: Walker) -> None:
    schemas = {own["function"]["name"]: openapi(own["function"]["parameters"]) for own in TOOLS}
    found = calls_of(walker, TOOLS, 60)
    assert len({call["name"] for call in found}) > 5
    for call in found:
        jsonschema.validate(call["arguments"], schemas[call["name"]], jsonschema.Draft202012Validator)


def test_a_named_tool_is_called_once(walker: Walker) -> None:
    prompt = declared(TOOLS)
    form = walker.form(prompt, tool_choice="git_branch")
    finished = 0
    for _ in range(8):
        constraint, tokens = walker.walk(form, prompt)
        if constraint.is_finished:
            finished += 1
            assert [call["name"] for call in walker.read(tokens, prompt).tool_calls] == ["git_branch"]
            assert tokens[-1] == walker.controls.tool_call_close
    assert finished


VALUES = st.recursive(
    st.none() | st.booleans() | st.integers(-(10**9), 10**9) | st.floats(-1e9, 1e9) | st.text(max_size=8),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(min_size=1, max_size=6), inner, max_size=3),
    max_leaves=6,
).filter(lambda value: "▁" not in json.dumps(value, ensure_ascii=False))


@given(st.dictionaries(st.text(min_size=1, max_size=8).filter(lambda key: "▁" not in key), VALUES, max_size=4))
@example(dict.fromkeys(("aa", "AA", "aA", "Aa"), 1))
@settings(max_examples=60, deadline=None)
def test_a_call_of_constants_is_the_templates_own(walker: Walker, values: Schema) -> None:
    """So a kept prompt is found again when the call comes back in it."""
    own = tool("f", {key: {"const": value} for key, value in values.items()}, list(values), additionalProperties=False)
    call = {"id": "c", "type": "function", "function": {"name": "f", "arguments": values}}
    result = {"role": "tool", "tool_call_id": "c", "content": "x"}
    ids = walker.processor([*ASKED, {"role": "assistant", "content": "", "tool_calls": [call]}, result]).token_ids
    first, last = ids.index(walker.controls.tool_call_open), ids.index(walker.controls.tool_call_close)
    prompt = declared([own])
    constraint, written = walker.constraint(walker.form(prompt, tool_choice="f"), prompt), ids[first : last + 1]
    for token, mask in zip(written, constraint.masks_for(written), strict=False):
        assert walker.bits(mask)[token]
    assert constraint.advance(written) == len(written) and constraint.is_finished


RECURSIVE = {
    "$ref": "#/$defs/A",
    "$defs": {
        "A": {"type": "object", "properties": {"a": {"$ref": "#/$defs/B"}}},
        "B": {"type": ["array"], "items": {"$ref": "#/$defs/A"}},
    },
}


@pytest.mark.parametrize(
    "schema",
    [
        {"properties": {"a": {"type": ["string", "null"]}, "b": {"type": "integer"}}},
        {"type": "object", "properties": {"a": {"enum": [1, "1", None]}}, "required": ["a"]},
        {"type": "object", "properties": {"s": {"type": "string", "minLength": 3, "maxLength": 5}}, "required": ["s"]},
        {"type": "object", "properties": {"s": {"type": "string", "maxLength": 0}}, "required": ["s"]},
        {"type": "object", "properties": {"s": {"type": "string", "pattern": "^b+$|^x"}}, "required": ["s"]},
        {"type": "object", "properties": {"s": {"type": "string", "pattern": '[/"]\\d'}}, "required": ["s"]},
        {"type": "object", "properties": {"n": {"type": "number", "minimum": 3}}, "required": ["n"]},
        {"type": "object", "properties": {"n": {"type": "integer", "maximum": -7}}, "required": ["n"]},
        {"type": "object", "properties": {"n": {"type": "integer", "multipleOf": 7}}, "required": ["n"]},
        {"type": "object", "properties": {"l": {"type": "array", "minItems": 2, "maxItems": 3}}, "required": ["l"]},
        {"type": "object", "properties": {"l": {"prefixItems": [{"type": "integer"}, {"type": "null"}]}}},
        {"type": "object", "additionalProperties": {"type": "integer"}, "minProperties": 1},
        {"type": "object", "additionalProperties": {"type": "integer"}, "properties": {"a": {"type": "string"}}},
        {"type": "object", "required": ["x"]},
        {"anyOf": [{"properties": {"a": {"const": 1}}, "required": ["a"]}, {"properties": {"b": {}}}]},
        RECURSIVE,
        {"type": "object", "properties": {"next": {"$ref": "#"}, "value": {"type": "integer"}}, "required": ["value"]},
        {"type": "object", "properties": {"a": {"allOf": [{"type": "number"}, {"minimum": 2}, {"maximum": 4}]}}},
        {
            "properties": {"a": {"allOf": [{"anyOf": [{"minimum": 2}, {"const": 0}]}, {"anyOf": [{"maximum": 4}]}]}},
            "required": ["a"],
        },
        {"properties": {"a": {"items": {"allOf": [{"const": 1}, {"const": 2}]}, "type": "array"}}, "required": ["a"]},
        {"type": "object", "properties": {"a": {"type": "integer", "enum": [1, "x", 2.0, 2.5]}}, "required": ["a"]},
        {"properties": {"a": {"enum": [1, 2, 2.5, 6, 9, "1"], "minimum": 2, "multipleOf": 1.5}}, "required": ["a"]},
        {"properties": {"a": {"allOf": [{"enum": [1, 2, 3]}, {"exclusiveMaximum": 2}]}}, "required": ["a"]},
        {
            "properties": {"a": {"enum": ["a", "ab", "bb", "bbb", 1], "maxLength": 2, "pattern": "^b"}},
            "required": ["a"],
        },
        {"type": "object", "unevaluatedProperties": False},
        {"type": "object", "properties": {"a": {}}, "unevaluatedProperties": {"type": "null"}},
        {"allOf": [{"properties": {"a": {}}, "unevaluatedProperties": False}, {"properties": {"b": {}}}]},
        {"allOf": [{"properties": {"a": {}}, "additionalProperties": False}, {"properties": {"b": {}}}]},
        {"allOf": [{"additionalProperties": {"type": "integer"}}, {"properties": {"b": {}}}], "required": ["b"]},
        {"properties": {"a": {}}, "additionalProperties": False, "anyOf": [{"properties": {"b": {}}}, {}]},
        {
            "properties": {"l": {"allOf": [{"prefixItems": [{"type": "null"}, {}]}, {"items": {"enum": [1, None]}}]}},
            "required": ["l"],
        },
        {
            "properties": {"l": {"allOf": [{"prefixItems": [{}], "items": False}, {"prefixItems": [{}, {}]}]}},
            "required": ["l"],
        },
        {
            "properties": {"k": {"enum": ["a", "b"]}},
            "required": ["k"],
            "anyOf": [
                {"properties": {"k": {"const": "a"}}},
                {"properties": {"k": {"const": "c"}}},
            ],
        },
        {"properties": {"l": {"prefixItems": [{"type": "null"}], "unevaluatedItems": False}}, "required": ["l"]},
        {"type": "object", "properties": {"d": {"type": "string", "format": "date"}}, "required": ["d"]},
        {"type": "object", "properties": {"A": {"type": "boolean"}, "a": {"type": "null"}, "_": {"type": "array"}}},
        {"type": "object", "properties": {}, "minProperties": 1},
        {"properties": {"a": {"const": 1}}, "patternProperties": {"^a$": {}}, "additionalProperties": False},
        {"patternProperties": {"^x:": {"const": 1}}, "additionalProperties": False, "minProperties": 1},
        {"properties": {"a": {"anyOf": [{"const": 1}, {"pattern": "^[A-Z]{2}$", "minLength": 3, "type": "string"}]}}},
        {},
    ],
    ids=json.dumps,
)
def test_what_a_schema_says_is_held(walker: Walker, schema: Schema) -> None:
    arguments(walker, schema)


@pytest.mark.parametrize(
    "schema",
    [
        {"type": "boolean", "nullable": True},
        {"$ref": "#/$defs/A"},
        {"allOf": [{"$ref": "#/$defs/A"}, {"description": "Whether it is."}]},
        {"oneOf": [{"type": "null"}, {"const": True}], "nullable": True},
    ],
)
def test_what_is_nullable_may_be_null(walker: Walker, caplog: pytest.LogCaptureFixture, schema: Schema) -> None:
    definitions = {"A": {"type": "boolean", "nullable": True}}
    own = tool("f", {"a": schema}, ["a"], **{"$defs": definitions})
    found = [call["arguments"]["a"] for call in calls_of(walker, [own], 25)]
    assert None in found and True in found and not caplog.messages


@pytest.mark.parametrize("kind", [{"type": ["object", "null"]}, {"type": "object", "nullable": True}])
def test_the_arguments_themselves_are_never_null(walker: Walker, kind: Schema) -> None:
    function = {"name": "f", "description": "", "parameters": kind | {"properties": {"a": {"type": "boolean"}}}}
    found = calls_of(walker, [{"type": "function", "function": function}], 20)
    assert found and {call["name"] for call in found} == {"f"}


def test_optional_arguments_come_and_stay_away(walker: Walker) -> None:
    found = arguments(walker, {"type": "object", "properties": {key: {"enum": [1, 2]} for key in "abc"}}, 150)
    assert {"".join(own) for own in found} == {"", "a", "b", "c", "ab", "ac", "bc", "abc"}


def test_of_declared_arguments_no_others_are_made_up(walker: Walker) -> None:
    assert all(own == {} for own in arguments(walker, {"type": "object", "properties": {}}))
    for own in arguments(walker, {"type": "object", "properties": {"a": {"type": "integer"}}}):
        assert own.keys() <= {"a"}


BASES = {
    "allOf": [{"$ref": "#/$defs/A"}, {"$ref": "#/$defs/B"}],
    "$defs": {
        "Base": {"properties": {"id": {"type": "integer"}}, "required": ["id"]},
        "A": {"allOf": [{"$ref": "#/$defs/Base"}], "properties": {"a": {"const": 1}}, "required": ["a"]},
        "B": {"allOf": [{"$ref": "#/$defs/Base"}], "properties": {"b": {"const": 2}}, "required": ["b"]},
    },
}


def test_references_in_one_allOf_hold_together(walker: Walker, caplog: pytest.LogCaptureFixture) -> None:
    """As services that inherit declare their arguments."""
    assert all(own.keys() == {"a", "b", "id"} for own in arguments(walker, BASES))
    assert not caplog.records


def test_properties_that_a_pattern_names_come(walker: Walker, caplog: pytest.LogCaptureFixture) -> None:
    """Also where no others may: a map with names of a form is declared so."""
    schema: Schema = {"type": "object", "patternProperties": {"^x": {"enum": [1, 2]}}, "additionalProperties": False}
    assert any(arguments(walker, schema, 60))
    assert all(own["x-a"] in (1, 2) for own in arguments(walker, schema | {"required": ["x-a"]}))
    properties = {"x-a": {"enum": [2, 3]}, "y": {"type": "string"}}
    more = {"properties": properties, "required": ["x-a"], "additionalProperties": {"type": "null"}}
    assert all(own["x-a"] == 2 for own in arguments(walker, schema | more))
    assert not caplog.records


def test_properties_of_any_name_come_before_declared_ones(walker: Walker) -> None:
    """As the template sorts them: behind one of those the others were barred."""
    more: Schema = {"properties": {"m": {"const": 1}, "n": {"const": 2}}, "additionalProperties": {"const": 3}}
    prompt = declared([tool("f", more["properties"], [], additionalProperties={"const": 3})])
    constraint = walker.constraint(walker.form(prompt), prompt)
    assert walker.follows(constraint, walker.ids("<|tool_call>call:f{a:3,b:3,m:1,mm:3,n:2,o:3}"))
    for call in ("{a:3}", "{n:2}", "{m:1,o:3}", "{}"):
        assert walker.follows(constraint, walker.ids(f"<|tool_call>call:f{call}"))
    assert not walker.follows(constraint, walker.ids("<|tool_call>call:f{n:2,m:"))
    arguments(walker, more)


INTEGER, TEXT = {"type": "integer"}, {"type": "string"}


def of_kind(kind: Any, **more: Any) -> Schema:
    return {"properties": {"kind": kind}, "required": ["kind"]} | more


@pytest.mark.parametrize(
    "members",
    [
        [INTEGER, TEXT, {"type": "array"}],
        [{"const": 1}, {"enum": [2, "x"]}, {"type": "null"}],
        [of_kind({"const": "a"}), of_kind({"$ref": "#/$defs/b"})],
        [of_kind(INTEGER), of_kind(TEXT)],
        [{"$ref": "#/$defs/closed"}, of_kind(TEXT, additionalProperties=False)],
    ],
    ids=json.dumps,
)
def test_oneOf_that_tells_its_members_apart_is_not_noted(
    walker: Walker, caplog: pytest.LogCaptureFixture, members: list[Schema]
) -> None:
    closed = {"properties": {"n": INTEGER}, "required": ["n"], "additionalProperties": False}
    definitions = {"b": {"enum": ["b", "c"]}, "closed": closed}
    arguments(walker, {"properties": {"a": {"oneOf": members}}, "required": ["a"], "$defs": definitions})
    assert not caplog.records


def test_a_bound_may_be_exclusive_as_draft_4_has_it(walker: Walker) -> None:
    bounds = {"minimum": 3, "exclusiveMinimum": True, "maximum": 5, "exclusiveMaximum": True}
    found = calls_of(walker, [tool("f", {"n": INTEGER | bounds, "m": {"enum": [3, 4], **bounds}}, ["n", "m"])], 10)
    assert found and all(call["arguments"] == {"n": 4, "m": 4} for call in found)


@pytest.mark.parametrize(
    ("bounds", "value", "is_within"),
    [
        ({"exclusiveMinimum": 0, "maximum": 0.5}, "0", False),
        ({"exclusiveMinimum": 0, "maximum": 0.5}, "0.1", True),
        ({"exclusiveMaximum": -1, "minimum": -1.5}, "-1", False),
        ({"minimum": 0}, "1423400000000000001", True),
        ({"minimum": -(2**63), "maximum": 2**64}, "-7", True),
        ({"minimum": 0, "maximum": 2**64}, "-7", False),
    ],
)
def test_numbers_are_within_their_bounds(bounds: Schema, value: str, is_within: bool) -> None:
    compiler = Compiler({}, "t0", 1)
    matcher = LLMatcher(letters(), LLMatcher.grammar_from_lark(f"start: {compiler.number('number', bounds, '')}"))
    assert (matcher.consume_tokens([*value.encode()]) and matcher.is_accepting()) is is_within
    assert not compiler.notes


def test_what_says_nothing_is_not_noted(caplog: pytest.LogCaptureFixture) -> None:
    neutral = {
        "not": False, "propertyNames": {"type": "string"}, "unevaluatedProperties": False, "dependentRequired": {},
        "uniqueItems": False, "properties": {"a": {"enum": [[1]], "type": "array", "unevaluatedItems": True}},
    }  # fmt: skip
    odd = {"type": "function", "function": {"name": "neutral", "description": "", "parameters": neutral}}
    call_grammar(check_tools([odd]), None, 52, 49)
    assert not caplog.records


LOOP = {"properties": {"l": {"type": "array", "minItems": 1, "items": {"$ref": "#/properties/l"}}}, "required": ["l"]}
CLOSED = {"properties": {"a": {}}, "additionalProperties": False}
NOTHING = {"properties": {"a": {"type": "string", "minLength": 5, "maxLength": 2}}, "required": ["a"]}


@pytest.mark.parametrize(
    ("schema", "note"),
    [
        ({"properties": {"a": {"type": "array", "items": {"const": 1}, "uniqueItems": True}}}, "uniqueItems of a"),
        ({"properties": {"a": {"not": {"type": "string"}}}}, "not of a"),
        ({"properties": {"a": {"not": {}}}}, "not of a"),
        ({"properties": {"a": {"type": "array", "contains": False}}}, "contains of a"),
        ({"type": "object", "propertyNames": False}, "propertyNames of its arguments"),
        ({"properties": {"a": {"oneOf": [{"type": "integer"}, {"type": "number"}]}}}, "oneOf, of whose .* of a"),
        ({"properties": {"a": {}, "b": {}}, "oneOf": [{"required": ["a"]}, {"required": ["b"]}]}, "oneOf, of whose"),
        ({"allOf": [CLOSED, {"properties": {"b": {}}, "required": ["b"]}]}, "additionalProperties, which bars what is"),
        (
            {
                "properties": {"a": {}},
                "allOf": [{"$ref": "#/$defs/A", "unevaluatedProperties": False}],
                "$defs": {"A": CLOSED},
            },
            "unevaluatedProperties, of one part alone",
        ),
        (CLOSED | {"required": ["z"]}, "z, which nothing fits"),
        ({"properties": {"a": {"enum": [[], [1]], "minItems": 1}}}, "minItems beside the values of a"),
        ({"properties": {"a": {"enum": ["x", "y"], "pattern": "(?=x)"}}}, "the pattern of a"),
        ({"properties": {"a": {"const": 1, "maximum": 0}}, "required": ["a"]}, "a, which nothing fits"),
        ({"properties": {"a": {"$ref": "https://example.com/x"}}, "required": ["a"]}, r"\$ref of a"),
        ({"properties": {"a": {"type": "string", "pattern": "(?=x)y"}}}, "the pattern of a"),
        ({"properties": {"a": {"type": "string", "format": "int64"}}}, "the format int64 of a"),
        ({"properties": {"a": {"type": "thing"}}}, "the type thing of a"),
        (NOTHING, "a, which nothing fits"),
        ({"type": "object", "properties": {"a": {"$ref": "#"}}, "required": ["a"]}, "a, which has no end"),
        (LOOP, "l, which has no end"),
        ({"anyOf": [False]}, "all of it"),
    ],
    ids=str,
)
def test_what_cannot_be_held_is_free_and_noted(
    walker: Walker, caplog: pytest.LogCaptureFixture, schema: Schema, note: str
) -> None:
    """And the other tools are held as if it were not there."""
    odd = {"type": "function", "function": {"name": "odd", "description": note, "parameters": schema}}
    even = tool("even", {"n": {"type": "integer", "minimum": 1, "maximum": 9}}, ["n"])
    call_grammar(check_tools([odd, even]), None, 52, 49)
    [line] = [record.getMessage() for record in caplog.records]
    assert re.search(note, line) and "\n" not in line
    found = calls_of(walker, [odd, even], 40)
    assert {call["name"] for call in found} == {"odd", "even"}
    for call in found:
        if call["name"] == "even":
            assert 1 <= call["arguments"]["n"] <= 9


def test_the_end_of_the_reply_is_barred_inside_a_call(walker: Walker) -> None:
    prompt = declared([tool("f", {"s": {"type": "string"}}, ["s"])])
    constraint = walker.constraint(walker.form(prompt), prompt)
    for token in walker.ids('<|tool_call>call:f{s:<|"|>some text<|"|>}'):
        constraint.advance([token])
        assert not walker.bits(constraint.mask())[[1, 106, 50, 48, 100, 101]].any()
    assert walker.allowed(constraint) == [walker.controls.tool_call_close]


def test_keys_of_any_name_are_read_back(walker: Walker) -> None:
    """Bare or between quotes; as the reader of calls says which need them."""
    found = arguments(walker, {"type": "object", "additionalProperties": {"type": "null"}, "minProperties": 1}, 60)
    assert sum(not needs_quotes(key) for own in found for key in own) > 10


@pytest.mark.parametrize("key", ["my key", "a  b c"])
def test_a_key_of_several_words_stands_bare(walker: Walker, key: str) -> None:
    """As the template writes it; barred behind its first word, it would be another key."""
    prompt = declared([tool("f", {"id": {"type": "null"}}, ["id"], additionalProperties={"type": "null"})])
    constraint = walker.constraint(walker.form(prompt), prompt)
    for token in walker.ids(f"<|tool_call>call:f{{id:null,{key}:null}}<tool_call|>"):
        assert walker.bits(constraint.mask())[token]
        constraint.advance([token])
    [call] = walker.read(walker.ids(f"<|tool_call>call:f{{id:null,{key}:null}}<tool_call|>"), prompt).tool_calls
    assert call["arguments"] == {"id": None, key: None}


@given(st.text(st.characters(exclude_categories=("Cs",)), min_size=1, max_size=12))
@settings(max_examples=200, deadline=None)
def test_any_text_is_a_literal(text: str) -> None:
    grammar = LLMatcher.grammar_from_lark(f"start: {literal(text)}")
    assert LLMatcher.validate_grammar_with_warnings(grammar) == (False, [])


@pytest.mark.parametrize(("pattern", "empty"), [(r"^\p{L}*$", True), (r"^\p{Lu}+$", False)])
def test_patterns_that_python_does_not_read_are_held(walker: Walker, pattern: str, empty: bool) -> None:
    prompt = declared([tool("f", {"s": {"type": "string", "pattern": pattern}}, ["s"])])
    constraint = walker.constraint(walker.form(prompt), prompt)
    constraint.advance(walker.ids('<|tool_call>call:f{s:<|"|>'))
    allowed = walker.bits(constraint.mask())
    assert allowed[walker.ids("A")].all() and not allowed[walker.ids("1")].any()
    assert allowed[walker.controls.quote] == empty


@pytest.mark.parametrize(
    ("form", "text"),
    [
        ("email", "o'brien@example.com"), ("email", "root@localhost"), ("email", "a.b+c@d.co.uk"),
        ("uuid", "123E4567-E89B-12D3-A456-426614174000"), ("date-time", "2024-02-29T00:00:00.123456789Z"),
    ],
)  # fmt: skip
def test_what_a_user_names_in_a_format_can_be_said(form: str, text: str) -> None:
    assert matches(FORMATS[form], text)


@pytest.mark.parametrize("pattern", ["a^b", "a$b", r"\bword", "(^a)", "x|(y$)z", "(a", "a)"])
def test_anchors_inside_a_pattern_are_not_understood(pattern: str) -> None:
    assert whole_pattern(pattern) is None


@given(st.lists(st.text("abcABC_19é", min_size=1, max_size=4), unique_by=str.lower, max_size=8))
@settings(max_examples=100, deadline=None)
def test_keys_are_in_the_templates_order(keys: list[str]) -> None:
    template = Environment().from_string("{{ keys | dictsort | map(attribute=0) | join(' ') }}")
    assert " ".join(in_order(keys)) == template.render(keys=dict.fromkeys(keys))
