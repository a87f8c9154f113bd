"""What a schema's conditions allow, and no more, its grammar takes."""

import json
import re
from collections.abc import Iterator
from itertools import combinations, permutations, product
from typing import Any

import jsonschema
import pytest
from llguidance import LLMatcher

from mlx_gemma4.forms.response import response_grammar
from mlx_gemma4.forms.strings import letters

SIMPLE = [None, True, False, 0, 1, 2, 3, -1, -0.25, 1.5, "", "a", "ab", "b", "\n"]
LISTS = [[], [1], ["a"], ["a", "b"], ["a", "a"], [1, "a"], ["b", "a"], ["a", 1], [1, 2, 1], [True, False], [[]]]
OBJECTS = [
    dict(zip(names, values, strict=True))
    for count in range(3)
    for names in combinations(("a", "b", "cc", "d"), count)
    for values in product((1, "a", None), repeat=count)
]
VALUES = [*SIMPLE, *LISTS, *OBJECTS, {"a": 1, "b": 2, "cc": 3}, {"a": {"b": 1}}, {"a": {}}, {"a": "x", "b": 1, "d": 2}]

ONE, TEXT, NUMBER = {"const": 1}, {"type": "string"}, {"type": "number"}
AB = {"a": NUMBER, "b": TEXT}
CLOSED = {"type": "object", "properties": AB, "additionalProperties": False}
COLOR = {"enum": ["a", "b", 1]}
DEFS = {"color": COLOR, "base": {"type": "object", "properties": {"a": NUMBER}, "required": ["a"]}}
DRAFT7 = {"$schema": "http://json-schema.org/draft-07/schema#"}
DRAFT2019 = {"$schema": "https://json-schema.org/draft/2019-09/schema"}
BASE, OF_COLOR = {"$ref": "#/$defs/base"}, {"$ref": "#/$defs/color"}
SCHEMAS: list[dict[str, Any]] = [
    {"not": {"type": ["object", "number"]}},
    {"not": {"enum": ["a", "ab", 1, 3, True, None, "\n"]}},
    {"not": {"const": ""}},
    {"not": {"minimum": 1, "maximum": 2}},
    {"not": {"required": ["a", "b"]}},
    {"type": "object", "not": {"anyOf": [{"required": ["a"]}, {"required": ["b"]}]}},
    {"not": {"properties": {"a": TEXT}, "required": ["a"]}},
    {"not": {"not": {"minLength": 1}}},
    {"not": {"prefixItems": [{"const": "a"}, {"const": "b"}]}},
    {"not": BASE, "$defs": DEFS},
    {"not": {"oneOf": [{"minimum": 1}, {"maximum": 2}, TEXT]}},
    {"not": {"minItems": 1, "minProperties": 1}},
    {"not": {"type": "string", "nullable": True}},
    {"if": {"properties": {"a": ONE}, "required": ["a"]}, "then": {"required": ["b"]}, "else": {"required": ["d"]}},
    {"type": "object", "properties": AB, "if": {"required": ["a"]}, "then": {"properties": {"b": {"const": "a"}}}},
    {"if": TEXT, "then": {"maxLength": 1}, "else": NUMBER},
    {"if": {"const": 1}, "else": False},
    {"oneOf": [{"minimum": 1}, {"maximum": 2}]},
    {"oneOf": [{"required": ["a"]}, {"required": ["b"]}]},
    {"type": "object", "oneOf": [{"required": ["a", "b"]}, {"required": ["a", "d"]}]},
    {"oneOf": [BASE, {"type": "object", "properties": {"b": TEXT}, "required": ["b"]}, OF_COLOR], "$defs": DEFS},
    {"dependentRequired": {"a": ["b"], "b": ["a"]}},
    CLOSED | {"dependentRequired": {"a": ["b"]}},
    {"dependentSchemas": {"a": {"required": ["b"]}, "b": {"properties": {"a": NUMBER}}}},
    DRAFT7 | {"dependencies": {"a": ["b"], "cc": {"required": ["d"]}}},
    {"type": "object", "propertyNames": {"enum": ["a", "b"]}, "additionalProperties": NUMBER},
    {"type": "object", "propertyNames": OF_COLOR, "$defs": DEFS},
    {"propertyNames": {"const": "a"}, "properties": {"b": TEXT}},
    {"propertyNames": {"type": "string", "minLength": 2, "maxLength": 3}},
    {"propertyNames": {"pattern": "^[ab]"}, "properties": {"d": TEXT, "a": NUMBER}},
    {"propertyNames": False},
    CLOSED | {"minProperties": 1},
    CLOSED | {"maxProperties": 1},
    CLOSED | {"minProperties": 2, "required": ["a"]},
    {"type": "object", "properties": AB, "minProperties": 1},
    {"type": "array", "items": COLOR, "uniqueItems": True},
    {"type": "array", "items": OF_COLOR, "uniqueItems": True, "minItems": 1, "maxItems": 2, "$defs": DEFS},
    DRAFT7 | {"type": "array", "items": COLOR, "uniqueItems": True},
    {"items": {"type": "boolean"}, "uniqueItems": True},
    {"uniqueItems": True, "maxItems": 1},
    {"properties": AB, "allOf": [{"properties": {"d": True}}], "unevaluatedProperties": False},
    BASE | {"properties": {"b": TEXT}, "unevaluatedProperties": False, "$defs": DEFS},
    {"anyOf": [{"required": ["b"]}, {"properties": {"cc": True}}], "unevaluatedProperties": ONE},
    {
        "oneOf": [{"properties": {"a": True}, "required": ["a"]}, {"properties": {"b": True}, "required": ["b"]}],
        "unevaluatedProperties": False,
    },
    {"if": {"required": ["a"], "properties": {"a": ONE}}, "then": {"properties": AB}, "unevaluatedProperties": False},
    {"dependentSchemas": {"a": {"properties": {"b": TEXT}}}, "unevaluatedProperties": TEXT},
    {"dependentSchemas": {"a": {"items": TEXT}}, "unevaluatedItems": False},
    {"prefixItems": [ONE], "allOf": [{"prefixItems": [True, TEXT]}], "unevaluatedItems": False},
    DRAFT2019 | {"items": [ONE], "allOf": [{"items": [True, TEXT]}], "unevaluatedItems": False},
    {"if": {"prefixItems": [{"const": "a"}]}, "unevaluatedItems": False},
    {"type": "string", "$defs": {"unused": {"uniqueItems": True}}},
]  # fmt: skip
ABOVE_ONE = {"exclusiveMinimum": 1, "maximum": 1.5}
SCHEMAS += [
    ABOVE_ONE,
    {"exclusiveMaximum": 0, "minimum": -0.5},
    {"exclusiveMinimum": 0, "allOf": [{"maximum": 0.5}], "type": ["number", "null"]},
    {"not": {"enum": [1.5, 2]}},
    {"not": {"not": ABOVE_ONE}},
    {"type": "integer", "minimum": -(2**63), "maximum": 2**63 - 1},
    {"items": {"minimum": -(2**64), "maximum": 1e300}, "type": ["array", "number"]},
    {"contains": ONE},
    {"contains": OF_COLOR, "minContains": 2, "$defs": DEFS},
    {"type": "array", "items": COLOR, "contains": ONE, "maxContains": 1},
    {"contains": {"const": "a"}, "minContains": 0, "maxContains": 1},
    {"contains": True},
    {
        "oneOf": [
            {"properties": {"a": {"type": "integer"}}, "required": ["a"]},
            {"properties": {"b": TEXT}, "required": ["b"]},
        ]
    },
    {"not": {"allOf": [{"not": {"type": "integer"}}]}},
    {"contains": False},
    {"not": {"contains": ONE}},
    {"not": {"contains": {"const": "a"}, "minContains": 2}},
    {"not": {"contains": {"const": "a"}, "minContains": 0, "maxContains": 1}},
    {"not": {"items": TEXT}},
    {"if": {"contains": ONE}, "then": {"contains": {"const": 2}}},
    {"prefixItems": [ONE], "contains": TEXT, "unevaluatedItems": False},
    {"allOf": [{"contains": ONE}, {"contains": {"const": 2}}], "unevaluatedItems": False},
    DRAFT7 | {"items": {"contains": ONE}, "type": ["array", "string"]},
    DRAFT2019 | {"not": {"items": [ONE, TEXT]}},
]
ANCHORED = ONE | {"$anchor": "one"}
REFERRING: list[dict[str, Any]] = [
    {"not": {"$ref": "k/c#one"}, "$defs": {"a": {"$id": "k/c", "$defs": {"b": ANCHORED}}}},
    {
        "$id": "https://a.b/c",
        "$ref": "d",
        "$defs": {"x": {"$id": "/d", "$ref": "#/$defs/y", "$defs": {"y": TEXT}}, "y": ONE},
    },
    {
        "$id": "urn:a",
        "properties": {"a": {"$ref": "#one"}, "b": {"$ref": "urn:a#/properties/a"}},
        "$defs": {"one": ANCHORED},
    },
    DRAFT7 | {"items": {"$ref": "#one"}, "definitions": {"a": ONE | {"$id": "#one"}}},
    {"items": {"$dynamicRef": "#tree"}, "$dynamicAnchor": "tree", "type": ["array", "string"]},
    DRAFT2019 | {"items": {"$recursiveRef": "#"}, "type": ["array", "null"]},
    {
        "if": {"required": ["a"]},
        "then": {"properties": {"b": {"$ref": "#/if"}}},
        "properties": {"a": {"$ref": "#/not"}},
        "not": TEXT,
    },
    {
        "type": "array",
        "items": {"$ref": "#/components/A~1B"},
        "components": {"A/B": {"$ref": "#/$defs/c%20d"}},
        "$defs": {"c d": TEXT},
    },
]


def spellings(value: Any) -> Iterator[str]:
    """The texts of a value, in every order of its properties."""
    match value:
        case dict():
            for names in permutations(value):
                for inner in product(*(spellings(value[name]) for name in names)):
                    yield (
                        "{"
                        + ",".join(f"{json.dumps(name)}:{text}" for name, text in zip(names, inner, strict=True))
                        + "}"
                    )
        case list():
            for inner in product(*map(spellings, value)):
                yield f"[{','.join(inner)}]"
        case _:
            yield json.dumps(value)


def takes(matcher: LLMatcher, text: str) -> bool:
    own = matcher.deep_copy()
    return own.consume_tokens([*text.encode()]) and own.is_accepting()


def taken(schema: dict[str, Any]) -> list[Any]:
    grammar = response_grammar({"type": "json_schema", "json_schema": {"schema": schema}})
    matcher = LLMatcher(letters(), grammar, log_level=0)
    return [value for value in VALUES if any(takes(matcher, text) for text in spellings(value))]


@pytest.mark.parametrize("schema", [*SCHEMAS, *REFERRING], ids=json.dumps)
def test_a_grammar_takes_the_values_that_fit_and_no_others(schema: dict[str, Any]) -> None:
    given = {key: value for key, value in schema.items() if key != "not" or "nullable" not in schema["not"]}
    given |= {} if given.keys() == schema.keys() else {"not": {"type": ["string", "null"]}}
    validator = jsonschema.validators.validator_for(given, jsonschema.Draft202012Validator)(given)
    fits = [value for value in VALUES if validator.is_valid(value)]
    assert taken(schema) == fits
    assert 0 < len(fits) < len(VALUES)


def test_where_a_whole_number_may_not_be_no_number_comes() -> None:
    assert taken({"not": {"type": "integer"}}) == [value for value in VALUES if type(value) not in (int, float)]
    with pytest.raises(ValueError, match="the keyword not cannot be held"):  # or 1.5 would come, which it does not fit
        taken({"not": {"if": {"type": "integer"}, "then": False}})


def test_of_long_lists_what_contains_asks_for_comes_early() -> None:
    grammar = response_grammar({"type": "array", "contains": {"type": "number"}, "items": {"type": ["number", "null"]}})
    matcher = LLMatcher(letters(), grammar, log_level=0)
    assert takes(matcher, f"[{'null,' * 9}1{',null' * 90}]")
    assert not takes(matcher, f"[{'null,' * 10}1]") and not takes(matcher, f"[{'null,' * 10}null]")


def test_a_reference_that_hangs_on_where_a_reader_comes_from_is_refused() -> None:
    of_any = {"$id": "list", "items": {"$dynamicRef": "#entry"}, "$defs": {"a": {"$dynamicAnchor": "entry"}}}
    own = {"$ref": "list", "$defs": {"list": of_any, "text": TEXT | {"$dynamicAnchor": "entry"}}}
    with pytest.raises(ValueError, match=r"the keyword \$dynamicRef cannot be held"):
        response_grammar({"type": "json_schema", "schema": {"$id": "https://a.b/c"} | own})
    for reference in ("#/$defs/none", "#none", "https://a.b/d.json", "#/$defs/list/$id"):
        with pytest.raises(ValueError, match=f"has the reference '{re.escape(reference)}'; expected one to"):
            response_grammar({"type": "array", "items": {"$ref": reference}, "$defs": {"list": of_any}})


def test_conditions_that_grow_without_end_are_refused() -> None:
    schema: dict[str, Any] = {"required": ["a"]}
    for _ in range(40):
        schema = {"oneOf": [schema, {"required": ["b"]}, {"required": ["d"]}]}
    with pytest.raises(ValueError, match="response_format: "):
        response_grammar(schema)
    with pytest.raises(ValueError, match="the keyword not cannot be held"):
        response_grammar({"not": {"$ref": "#/$defs/a"}, "$defs": {"a": {"properties": {"a": {"$ref": "#/$defs/a"}}}}})
