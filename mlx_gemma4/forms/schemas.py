"""What drafts of JSON Schema say in other words."""

import math
from collections.abc import Callable
from functools import partial
from typing import Any, TypeGuard

from mlx_gemma4.errors import shown

Schema = dict[str, Any]

# What evaluates properties and entries beside a schema's own.
APPLIED = {"allOf", "anyOf", "oneOf", "$ref", "if", "not", "dependentSchemas", "contains", "$dynamicRef"}

# Where schemas stand in a schema.
ONE_SCHEMA = {
    "items", "additionalProperties", "additionalItems", "not", "if", "then", "else", "contains", "propertyNames",
    "unevaluatedProperties", "unevaluatedItems",
}  # fmt: skip
LISTED_SCHEMAS = {"allOf", "anyOf", "oneOf", "prefixItems", "items"}
NAMED_SCHEMAS = {"properties", "patternProperties", "$defs", "definitions", "dependentSchemas", "dependencies"}

COUNTS = {"minItems", "maxItems", "minLength", "maxLength", "minProperties", "maxProperties"}
LARGEST = 9 * 10**18  # a bound that llguidance reads
NULL: Schema = {"type": "null"}
ANY_NAME: tuple[Any, ...] = (True, {}, {"type": "string"})  # propertyNames that allow all, the last as Zod writes it


def inner_schemas(schema: Schema, change: Callable[[Any], Any]) -> Schema:
    """The schema with each schema in it changed; what stands in constants, names and annotations stays."""
    result = dict(schema)
    for key, value in schema.items():
        if key in NAMED_SCHEMAS and isinstance(value, dict):
            result[key] = {name: change(inner) for name, inner in value.items()}
        elif key in LISTED_SCHEMAS and isinstance(value, list):
            result[key] = [change(inner) for inner in value]
        elif key in ONE_SCHEMA and isinstance(value, dict):
            result[key] = change(value)
    return result


def without_unevaluated(schema: Schema) -> Schema:
    """What is not evaluated is additional, where nothing else evaluates more, and nothing is said by allowing it."""
    result = dict(schema)
    for key, known in (("unevaluatedProperties", "additionalProperties"), ("unevaluatedItems", "items")):
        if key in schema and schema[key] in (True, {}):
            del result[key]
        elif key in schema and known not in schema and APPLIED.isdisjoint(schema):
            result[known] = result.pop(key)
    return result


def drop_what_says_nothing(schema: Schema) -> None:
    """Take out keywords that allow all, and write others as llguidance knows them."""
    for key in ("uniqueItems", "not"):
        if schema.get(key) is False:
            del schema[key]
    for key, other in (("minContains", "contains"), ("maxContains", "contains"), ("then", "if"), ("else", "if")):
        if other not in schema:
            schema.pop(key, None)
    if "then" not in schema and "else" not in schema:
        schema.pop("if", None)
    schema.pop("$dynamicAnchor", None)
    if schema.get("propertyNames") in ANY_NAME:
        schema.pop("propertyNames", None)
    for key in COUNTS & schema.keys():
        if isinstance(schema[key], float) and schema[key].is_integer():
            schema[key] = int(schema[key])


def with_null(schema: Schema) -> Schema:
    """A schema that takes null too, whose parts stay where pointers find them."""
    if "type" in schema:
        types = schema["type"] if isinstance(schema["type"], list) else [schema["type"]]
        schema["type"] = [*types, *([] if "null" in types else ["null"])]
    if isinstance(schema.get("enum"), list) and None not in schema["enum"]:
        schema["enum"] = [*schema["enum"], None]
    if "const" in schema:
        schema["enum"] = [schema.pop("const"), None]
    for key in ("anyOf", "oneOf"):
        if isinstance(schema.get(key), list) and NULL not in schema[key]:
            schema[key] = [*schema[key], NULL]
    if isinstance(schema.get("allOf"), list):
        schema["allOf"] = [{"anyOf": [member, NULL]} for member in schema["allOf"]]
    if "$ref" in schema:
        schema["allOf"] = [*schema.get("allOf", []), {"anyOf": [{"$ref": schema.pop("$ref")}, NULL]}]
    return schema


def values_of(schema: Schema) -> list[Any] | None:
    """What a schema lists; None if it does not."""
    values = [schema["const"]] if "const" in schema else schema.get("enum")
    return values if isinstance(values, list) else None


def modern(schema: Schema) -> Schema:
    """A schema as the draft 2020-12 has it, itself alone and not those in it."""
    result = without_unevaluated(schema)
    if isinstance(schema.get("items"), list):  # before 2020
        result |= {"prefixItems": schema["items"], "items": result.pop("additionalItems", True)}
    for limit in ("minimum", "maximum"):  # before draft 6
        exclusive = f"exclusive{limit.capitalize()}"
        if isinstance(schema.get(exclusive), bool):
            del result[exclusive]
            if schema[exclusive] and limit in result:
                result[exclusive] = result.pop(limit)
    return result


def held_bounds(schema: Schema) -> Schema:
    """Bounds of a number that llguidance holds: none beyond what it reads, and above 1 is from 1.000000001, since it
    takes 1 for more than 1 and less than 1.5.
    """
    result = dict(schema)
    for bound, sign in (("minimum", 1), ("maximum", -1)):
        exclusive = f"exclusive{bound.capitalize()}"
        for key in (bound, exclusive):
            if is_number(limit := schema.get(key)) and sign * limit < -LARGEST:
                result[key] = -sign * LARGEST
        limit = result.get(exclusive)
        if not is_number(limit) or schema.get("type") == "integer":
            continue
        if 0 <= sign * limit <= LARGEST and limit == int(limit):
            nearest = result.pop(exclusive) + sign * max(1e-9, math.ulp(limit))
            other = result.get(bound)
            result[bound] = sign * max(sign * nearest, sign * other) if is_number(other) else nearest
    return result


def is_number(value: Any) -> TypeGuard[int | float]:
    return isinstance(value, (int, float)) and not isinstance(value, bool)


def is_schema(value: Any) -> bool:
    return isinstance(value, (dict, bool))


def are(kind: Callable[[Any], bool], values: Any) -> bool:
    return isinstance(values, list) and all(map(kind, values))


def named(kind: Callable[[Any], bool], values: Any) -> bool:
    return isinstance(values, dict) and all(map(kind, values.values()))


def is_name(value: Any) -> bool:
    return isinstance(value, str)


are_names = partial(are, is_name)
# Of keywords that hold schemas or names: whether a value is one of theirs, and what is.
SHAPES: dict[str, tuple[Callable[[Any], bool], str]] = {
    **dict.fromkeys(ONE_SCHEMA, (is_schema, "a schema")),
    **dict.fromkeys(LISTED_SCHEMAS, (partial(are, is_schema), "a list of schemas")),
    **dict.fromkeys(NAMED_SCHEMAS, (partial(named, is_schema), "a dict of schemas")),
    "items": (lambda value: is_schema(value) or are(is_schema, value), "a schema"),
    "dependencies": (partial(named, lambda value: is_schema(value) or are_names(value)), "a dict of schemas"),
    "dependentRequired": (partial(named, are_names), "a dict of lists of names"),
    "required": (are_names, "a list of names"),
    "enum": (partial(are, lambda value: True), "a list"),
    "type": (lambda value: is_name(value) or are_names(value), "a name or a list of names"),
}


def check_shapes(schema: Schema) -> None:
    for key, value in schema.items():
        fits, expected = SHAPES.get(key, (None, ""))
        if fits is not None and not fits(value):
            raise ValueError(f"response_format has {shown(value)} for {key} in its schema; expected {expected}")
