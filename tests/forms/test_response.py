"""A response_format is held to, or refused in one line that says why."""

import json
import re
from typing import Any

import jsonschema
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from llguidance import LLMatcher
from walks import Walker

from mlx_gemma4 import Prompt
from mlx_gemma4.forms.response import response_grammar
from mlx_gemma4.forms.strings import letters
from mlx_gemma4.model.model import Model
from mlx_gemma4.prompt.processor import Processor

Loaded = tuple[Model, Processor]
PROMPT = Prompt([2])


@pytest.fixture(scope="module")
def walker(tiny: Loaded) -> Walker:
    return Walker(tiny[1])


def answers(walker: Walker, response_format: Any, count: int = 10, most: int = 300) -> list[str]:
    """Finished random answers."""
    form = walker.form(PROMPT, response_format)
    walks = [walker.walk(form, PROMPT, most) for _ in range(count)]
    return [
        str(walker.read(tokens, PROMPT).message["content"]) for constraint, tokens in walks if constraint.is_finished
    ]


SCHEMAS: list[dict[str, Any]] = [
    {"type": "object", "properties": {"a": {"type": "string"}, "b": {"type": "integer"}}, "required": ["a", "b"]},
    {"type": "array", "items": {"enum": ["a", 1, None, {"x": [1]}]}, "minItems": 2, "maxItems": 4},
    {"type": "string", "pattern": "^[a-f]{2,4}$"},
    {"type": "integer", "minimum": -3, "maximum": 12},
    {"type": "number", "exclusiveMinimum": 0, "exclusiveMaximum": 1},
    {"anyOf": [{"type": "boolean"}, {"type": "object", "properties": {"k": {"const": "v"}}, "required": ["k"]}]},
    {"$ref": "#/$defs/N", "$defs": {"N": {"type": "object", "properties": {"n": {"$ref": "#/$defs/N"}}}}},
    {"type": "object", "additionalProperties": {"type": "integer"}},
    {"type": "object", "propertyNames": {"type": "string"}, "additionalProperties": {"type": "integer"}},
    {"type": "array", "prefixItems": [{"type": "null"}], "unevaluatedItems": False, "maxItems": 2.0},
    {"type": "object", "properties": {"a": {"type": "null"}}, "unevaluatedProperties": False},
    {"type": "string", "enum": ["naïve", "日本", 'a"b', "c\\d", "\n", ""]},
    {"type": "array", "uniqueItems": False, "minContains": 2, "items": {"type": "null"}},
    {"type": "string", "format": "date"},
    {"allOf": [{"type": "object", "properties": {"a": {"type": "null"}}}, {"required": ["a"]}]},
    {"if": True, "type": "null"},
    {
        "type": "object",
        "patternProperties": {"^x": {"type": "null"}},
        "required": ["x1"],
        "additionalProperties": False,
    },
    {},
]


@pytest.mark.parametrize("schema", SCHEMAS, ids=json.dumps)
def test_finished_answers_fit_the_schema(walker: Walker, schema: dict[str, Any]) -> None:
    found = answers(walker, schema if schema else {"type": "json_schema", "json_schema": {"schema": schema}})
    assert found
    for text in found:
        jsonschema.validate(json.loads(text), schema, jsonschema.Draft202012Validator)


@pytest.mark.parametrize(
    ("form", "text", "fits"),
    [
        ("date", "2024-02-29", True), ("date", "2000-02-29", True), ("date", "1900-02-29", False),
        ("date", "2024-02-28", True), ("date", "2021-02-29", False), ("date", "2021-04-31", False),
        ("time", "23:59:59Z", True), ("time", "12:00:60Z", False), ("date-time", "2024-12-31T00:00:00.5+01:00", True),
        ("date-time", "2024-13-01T00:00:00Z", False),
    ],
)  # fmt: skip
def test_moments_are_those_of_the_calendar(form: str, text: str, fits: bool) -> None:
    grammar = response_grammar({"type": "string", "format": form})
    matcher = LLMatcher(letters(), grammar)
    assert (matcher.consume_tokens([*json.dumps(text).encode()]) and matcher.is_accepting()) is fits


@pytest.mark.parametrize(
    ("response_format", "types"),
    [("json", (dict, list)), ({"type": "json_object"}, dict), ({"type": "json_schema", "schema": SCHEMAS[0]}, dict)],
    ids=str,
)
def test_json_is_an_object_or_a_list(walker: Walker, response_format: Any, types: type) -> None:
    found = answers(walker, response_format)
    assert found and all(isinstance(json.loads(text), types) for text in found)


def test_white_space_is_bounded(walker: Walker) -> None:
    """`{` and line breaks without end would be JSON too."""
    form = walker.form(PROMPT, "json")
    constraint = walker.constraint(form, PROMPT)
    constraint.advance(walker.ids("{\n"))
    for space in walker.ids(" ") * 40:
        constraint.advance([space])
    allowed = walker.bits(constraint.mask())
    assert not allowed[walker.ids(" ") + walker.ids("\n")].any() and allowed[walker.ids('"')].all()


@pytest.mark.parametrize(
    "schema",
    [
        {"type": "string", "nullable": True},
        {"type": "integer", "enum": [1], "nullable": True},
        {"const": "x", "nullable": True},
        {"anyOf": [{"const": 1}, {"const": 2}], "nullable": True},
        {"$ref": "#/$defs/a", "$defs": {"a": {"const": "b"}}, "nullable": True},
        {"allOf": [{"type": "string"}, {"maxLength": 3}], "nullable": True},
    ],
    ids=json.dumps,
)
def test_what_is_nullable_may_be_null(walker: Walker, schema: dict[str, Any]) -> None:
    constraint = walker.constraint(walker.form(PROMPT, schema), PROMPT)
    for token in walker.ids("null"):
        assert walker.bits(constraint.mask())[token]
        constraint.advance([token])
    assert constraint.is_finished
    constraint = walker.constraint(walker.form(PROMPT, schema | {"nullable": False}), PROMPT)
    assert not walker.bits(constraint.mask())[walker.ids("n")].any()


def test_properties_named_as_keywords_stay(walker: Walker) -> None:
    schema = {
        "type": "object",
        "properties": {"format": {"const": {"format": "int64"}}, "nullable": {"const": True}, "not": {"type": "null"}},
        "required": ["format", "nullable", "not"],
        "additionalProperties": False,
    }
    assert json.loads(answers(walker, schema, 1)[0]) == {"format": {"format": "int64"}, "nullable": True, "not": None}


def test_formats_that_are_unknown_are_dropped_and_noted(walker: Walker, caplog: pytest.LogCaptureFixture) -> None:
    schema = {"type": "array", "items": {"type": "string", "format": "int32-of-the-test"}}
    assert answers(walker, schema)
    assert [record.getMessage() for record in caplog.records] == [
        "response_format: strings are not held to the formats int32-of-the-test"
    ]


def test_regular_expressions_and_grammars_are_taken(walker: Walker) -> None:
    for text in answers(walker, {"type": "regex", "regex": "[a-c]{2}-é?"}):
        assert text[:2].strip("abc") == "" and text[2:] in ("-", "-é")
    grammar = 'start: "<|x|>" word+ // <turn|>\nword: /[ab]/ | "<turn|>"'
    for text in answers(walker, {"type": "lark", "grammar": grammar}):
        assert text.startswith("<|x|>")


@pytest.mark.parametrize("response_format", [None, {"type": "text"}])
def test_any_text_needs_no_grammar(response_format: Any) -> None:
    assert response_grammar(response_format) is None


@pytest.mark.parametrize(
    ("response_format", "message"),
    [
        ("yaml", "response_format is 'yaml'; expected \"json\", a JSON schema, or"),
        (5, "response_format is 5; expected"),
        ({"type": "yaml"}, "response_format has the type 'yaml'; expected"),
        ({"type": "json_schema"}, "response_format has no schema; expected"),
        ({"type": "json_schema", "json_schema": {"schema": [1]}}, "response_format has a list for its schema"),
        ({"type": "regex"}, "response_format has None for its regex; expected a string"),
        ({"type": "regex", "regex": "a("}, "response_format: unclosed group"),
        ({"type": "regex", "regex": "(?=a)a"}, "response_format: look-around"),
        ({"type": "string", "pattern": "^(?=a)a"}, "response_format: the pattern ^(?=a)a cannot be held: look"),
        ({"type": "regex", "regex": "\ud800"}, "half a surrogate pair"),
        ({"type": "lark", "grammar": "start: ("}, "response_format: "),
        ({"type": "lark", "grammar": 'a: "b"'}, "no start rule"),
        ({"type": "lark", "grammar": "start: <turn|>"}, "names control tokens"),
        ({"type": "lark", "grammar": 'start: "a" <[106]>'}, "names control tokens"),
        ({"type": "lark", "grammar": "start: <[^3]>"}, "names control tokens"),
        ({"type": "lark", "grammar": 'start: a\na[max_tokens=3]: /"x.*/'}, "the option max_tokens"),
        ({"type": "lark", "grammar": 'start: a\na[lazy, stop="[]:"]: /x.*/'}, "the option stop"),
        (
            {"uniqueItems": True, "contains": {"const": 1}, "minContains": 101},
            "the keywords contains, minContains, uniqueItems cannot",
        ),
        ({"not": {"pattern": "a"}}, "the keyword not cannot be held"),
        ({"if": {"multipleOf": 2}, "then": {"minimum": 2}}, "the keywords if, then cannot be held"),
        ({"items": {"type": "string"}, "uniqueItems": True}, "the keyword uniqueItems cannot be held"),
        ({"oneOf": [{"type": "string"}, {"pattern": "a"}]}, "the members of its oneOf may overlap; expected anyOf"),
        ({"type": ["thing"]}, "Invalid type: thing"),
        ({"type": "integer", "minimum": 2, "maximum": 1}, "minimum (2) is greater than maximum (1)"),
        ({"enum": []}, "Unsatisfiable"),
        ({"$ref": "https://example.com/x"}, "https://example.com/x"),
        ({"$ref": "#/$defs/x"}, "/$defs/x"),
        ({"type": "object", "properties": {"a": {"$ref": "#"}}, "required": ["a"]}, "no value of finite size"),
        ({"type": "array", "items": {"$ref": "#"}, "minItems": 1}, "no value of finite size"),
        ({"properties": 3}, "has 3 for properties in its schema; expected a dict of schemas"),
        ({"dependentRequired": ["a"]}, "expected a dict of lists of names"),
        ({"not": {"required": [[]]}}, "has [[]] for required in its schema; expected a list of names"),
        ({"propertyNames": {"allOf": 3}, "unevaluatedProperties": False}, "expected a list of schemas"),
        ({"$id": "https://a.b", "$ref": "http://[x"}, "has the reference 'http://[x'; expected a URI"),
        ({"const": 2**70}, "not JSON serializable: 1180591620717411303424"),
        ({"const": float("nan")}, "holds nan"),
        ({"properties": {1: {}}}, "has the key 1"),
    ],
    ids=str,
)
def test_what_cannot_be_held_is_refused_in_one_line(response_format: Any, message: str) -> None:
    with pytest.raises(ValueError) as caught:
        response_grammar(response_format)
    text = str(caught.value)
    assert message in text and "response_format" in text and "\n" not in text and len(text) < 250


def test_what_is_no_digit_or_letter_is_none_of_any_script() -> None:
    pattern = r"^\D\W[^\D]\\D$"
    matcher = LLMatcher(letters(), response_grammar({"type": "string", "pattern": pattern}), log_level=0)
    for text in (r"a.1\D", r"߀.1\D", r"aé1\D", r"a.a\D", r".-9\D"):
        own, spelt = matcher.deep_copy(), json.dumps(text, ensure_ascii=False).encode()
        assert (own.consume_tokens([*spelt]) and own.is_accepting()) == bool(re.search(pattern, text)), text


def test_conditions_that_make_many_alternatives_do_not_end_a_reply(walker: Walker) -> None:
    first = {"contains": {"not": {"maxItems": 0, "type": ["number"]}}, "maxContains": 3}
    schema = first | {"not": {"items": {"required": ["b"], "type": "null", "maxItems": 2}}}
    constraint = walker.constraint(walker.form(PROMPT, schema), PROMPT)
    constraint.advance(walker.ids('["a",'))
    constraint.mask()


def test_a_panic_of_llguidance_is_one_line() -> None:
    """Its messages cut a schema after 100 bytes."""
    with pytest.raises(ValueError, match="response_format: "):
        response_grammar({"minItems": "x" + "é" * 60})
    with pytest.raises(ValueError, match="response_format: "):
        response_grammar({"pattern": {"k": "é" * 80, "kk": "x" + "é" * 80}})


@pytest.mark.parametrize(
    "bound", [{"exclusiveMinimum": 10**400}, {"exclusiveMaximum": -(10**400)}, {"multipleOf": 10**400}]
)
def test_a_number_beyond_64_bits_is_one_line(bound: dict[str, int]) -> None:
    with pytest.raises(ValueError, match=r"^response_format: .{,170}$"):
        response_grammar({"type": "number"} | bound)


def test_recursion_that_may_stop_is_taken() -> None:
    for inner in ({"anyOf": [{"$ref": "#"}, {"type": "null"}]}, {"type": "array", "items": {"$ref": "#"}}):
        assert response_grammar({"type": "object", "properties": {"a": inner}, "required": ["a"]})


JSON = st.recursive(
    st.none() | st.booleans() | st.integers(-9, 9) | st.text(max_size=5),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner, max_size=3),
    max_leaves=8,
)
WORDS = """
    type properties required items enum const anyOf allOf oneOf $ref format nullable pattern minimum maxItems not if
    additionalProperties prefixItems uniqueItems $defs
"""
KEYWORDS = st.sampled_from(WORDS.split())


@given(st.recursive(JSON, lambda inner: st.dictionaries(KEYWORDS, inner, max_size=4), max_leaves=8))
@settings(max_examples=300, deadline=None)
def test_odd_schemas_are_taken_or_refused_in_one_line(schema: Any) -> None:
    try:
        response_grammar({"type": "json_schema", "json_schema": {"schema": schema}})
    except ValueError as error:
        assert "\n" not in str(error) and "response_format" in str(error)
