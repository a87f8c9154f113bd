"""A JSON Schema's conditions (`not`, `if`, `dependentRequired`, `uniqueItems`, …) in keywords that grammars hold.

Negation is what all of it needs: with it a condition is a union, `if` -> then, or not `if` and else. What comes of it
takes the same values, but for two things that no grammar says, of which it takes some: a number that is not whole, and
an entry that fits `contains` wherever it stands. What cannot be said so stays as it is, for its reader to refuse.
"""

import json
import re
from collections.abc import Callable, Iterable, Sequence
from functools import partial
from itertools import combinations, pairwise, permutations
from math import comb, perm
from typing import Any

from mlx_gemma4.forms.schemas import (
    Schema,
    drop_what_says_nothing,
    is_number,
    values_of,
    with_null,
    without_unevaluated,
)
from mlx_gemma4.forms.strings import other_than
from mlx_gemma4.prompt.tools import TYPE_OF, pointed

MANY = 100  # alternatives of one condition: with 326, llguidance reads a schema for 2 s
REACH = 10  # entries among which what `contains` asks for stands
MAX_STEPS = 500  # of one schema: negations of negations grow

# What says nothing of a value.
REMARKS = {
    "title", "description", "default", "examples", "deprecated", "readOnly", "writeOnly",
    "$schema", "$id", "$comment", "$anchor", "$defs", "definitions",
}  # fmt: skip
UNEVALUATED = {"unevaluatedProperties": "additionalProperties", "unevaluatedItems": "items"}
NAMED = ("properties", "patternProperties")
UNIONS = ("anyOf", "oneOf", "if", "dependentSchemas")  # in which what is evaluated hangs on the value
KINDS = ("string", "number", "boolean", "null", "array", "object")
NO_ARRAY = {"type": [kind for kind in KINDS if kind != "array"]}
# Of a bound: the type of what has it, the bound that what is beyond it keeps to, and how far that is off.
BEYOND = {
    "minimum": ("number", "exclusiveMaximum", 0),
    "maximum": ("number", "exclusiveMinimum", 0),
    "exclusiveMinimum": ("number", "maximum", 0),
    "exclusiveMaximum": ("number", "minimum", 0),
    "minLength": ("string", "maxLength", -1),
    "maxLength": ("string", "minLength", 1),
    "minItems": ("array", "maxItems", -1),
    "maxItems": ("array", "minItems", 1),
    "minProperties": ("object", "maxProperties", -1),
    "maxProperties": ("object", "minProperties", 1),
}

Case = tuple[list[Any], list[Any]]  # what holds in it, and what of that evaluates properties and entries


class UnheldError(Exception):
    """A condition that has no other form here."""


class Conditions:
    """Rewrites the conditions of one schema. one_of: those of `oneOf` too, where members may overlap."""

    def __init__(self, root: Schema, one_of: bool):
        self.root, self.one_of = root, one_of
        self.is_old = re.search("draft-0[467]|2019-09", str(root.get("$schema"))) is not None
        self.steps = 0
        self.exactly = 0  # times that what is being rewritten is to be negated
        self.following: list[str] = []  # references of what is negated

    def plain(self, given: Schema) -> Schema:
        """The schema, itself and not those in it, without the conditions that can be said otherwise."""
        schema = without_unevaluated(given)
        schema = self.rewritten(schema, UNEVALUATED, self.closed)
        drop_what_says_nothing(schema)
        schema = self.rewritten(schema, ("not",), lambda own: [self.negated(own.pop("not"))])
        for key in ("oneOf", "if", "dependentSchemas") if self.one_of else ("if", "dependentSchemas"):
            schema = self.rewritten(schema, (key,), partial(self.united, key))
        schema = self.rewritten(schema, ("dependentRequired", "dependencies"), self.dependent)
        schema = self.rewritten(schema, ("propertyNames",), self.names)
        schema = self.rewritten(schema, ("minProperties", "maxProperties"), self.counted)
        return self.rewritten(schema, ("uniqueItems",), self.unique)

    def narrowed(self, schema: Schema) -> Schema:
        """The schema without what can be said of some values alone, for nothing but a grammar to be made of it."""
        return self.rewritten(schema, ("contains",), self.containing)

    def rewritten(self, schema: Schema, keys: Iterable[str], rewrite: Callable[[Schema], list[Any]]) -> Schema:
        """The schema with what takes the place of these keywords, if something can."""
        result = dict(schema)
        try:
            parts = rewrite(result) if schema.keys() & set(keys) else []
        except UnheldError:
            return schema
        if parts:
            result["allOf"] = [*result.get("allOf", []), *parts]
        return result

    def step(self) -> None:
        self.steps += 1
        if self.steps > MAX_STEPS:
            raise UnheldError

    def followed(self, reference: Any, read: Callable[[Any], Any]) -> Any:
        """What is read of a reference's target."""
        if reference in self.following:
            raise UnheldError
        self.following.append(reference)
        try:
            return read(a_schema(pointed(self.root, reference)))
        finally:
            self.following.pop()

    def listed(self, first: Sequence[Any], rest: Any = True) -> Schema:
        """Of arrays: the schemas of the first entries and of those behind them."""
        given = [*first]
        return {"items": given, "additionalItems": rest} if self.is_old else {"prefixItems": given, "items": rest}

    def resolved(self, schema: Any) -> Any:
        """A schema, or what it is no more than a reference to."""
        if isinstance(schema, dict) and schema.keys() - REMARKS == {"$ref"}:
            return self.followed(schema["$ref"], self.resolved)
        return schema

    # not

    def negated(self, given: Any) -> Any:
        """A schema for what does not fit this one."""
        self.step()
        if isinstance(a_schema(given), bool):
            return not given
        self.exactly += 1
        try:
            schema = self.plain(given)
        finally:
            self.exactly -= 1
        if schema.pop("nullable", False) is True:
            schema = with_null(schema)
        if self.is_old and "$ref" in schema and len(without_remarks(schema)) > 1:
            raise UnheldError  # what stands beside it says nothing there, and is held all the same
        others = self.uncontained(schema)
        if isinstance(schema.get("items"), dict) and "prefixItems" in schema:
            raise UnheldError  # some entry behind those, wherever it stands
        others += [self.beyond(key, value) for key, value in schema.items() if key not in REMARKS]
        return one_of_these(others)

    def beyond(self, key: str, value: Any) -> Any:
        """What does not keep to one keyword."""
        match key, value:
            case "type", str() | list():
                kinds = [value] if isinstance(value, str) else value
                if "integer" in kinds and "number" not in kinds and self.exactly:
                    raise UnheldError  # a number that is not whole
                others = [kind for kind in KINDS if kind not in kinds and not (kind == "number" and "integer" in kinds)]
                return {"type": others} if others else False
            case ("const", _) | ("enum", list()):
                return other_values(value if key == "enum" else [value])
            case ("anyOf", list()):
                return {"allOf": [self.negated(member) for member in value]}
            case "not", _:
                return a_schema(value)
            case ("allOf", list()):
                return one_of_these([self.negated(member) for member in value])
            case ("oneOf", list()):
                none = {"allOf": [self.negated(member) for member in value]}
                return one_of_these([none, *({"allOf": list(two)} for two in combinations(value, 2))])
            case ("required", list()):
                return one_of_these({"type": "object"} | absent(name) for name in value)
            case ("properties", dict()):
                named = ((name, self.negated(inner)) for name, inner in value.items())
                return one_of_these(
                    {"type": "object", "required": [name], "properties": {name: other}}
                    for name, other in named
                    if other is not False
                )
            case (("prefixItems" | "items"), list()):
                placed = enumerate(self.negated(inner) for inner in value)
                return one_of_these(
                    {"type": "array", "minItems": place + 1} | self.listed([*[True] * place, other])
                    for place, other in placed
                    if other is not False
                )
            case (("items" | "additionalProperties"), _) if value is True or value == {}:
                return False
            case ("items", dict()):
                return {"type": "array", "contains": self.negated(value)}
            case ("$ref", _):
                return self.followed(value, self.negated)
            case _ if key in BEYOND and type(value) in (int, float):
                kind, other, off = BEYOND[key]
                return False if value + off < 0 and kind != "number" else {"type": kind, other: value + off}
        raise UnheldError

    def uncontained(self, schema: Schema) -> list[Any]:
        """Arrays in which too few or too many entries fit `contains`, which is taken out."""
        if "contains" not in schema:
            return []
        given, least, most = self.contained(schema)
        array = {"type": "array", "contains": given}
        none = {"type": "array", "items": self.negated(given)} if least else False
        few = array | {"minContains": 1, "maxContains": least - 1} if least > 1 else False
        return [none, few, False if most is None else array | {"minContains": most + 1}]

    # unions

    def cases(self, key: str, schema: Schema) -> list[Case]:
        """The cases of a keyword, which is taken out of the schema."""
        given = schema.pop(key)
        match key, given:
            case "anyOf", list():
                some = (combinations(given, count) for count in range(1, len(given) + 1))
                cases = [(list(own), list(own)) for members in some for own in members] if len(given) < 7 else []
            case "oneOf", list():
                others = [self.negated(member) for member in given]
                cases = [([own, *others[:n], *others[n + 1 :]], [own]) for n, own in enumerate(given)]
            case "if", _:
                then, other = schema.pop("then", True), schema.pop("else", True)
                cases = [([given, then], [given, then]), ([self.negated(given), other], [other])]
            case "dependentSchemas", dict() if len(given) < 7:
                cases = [([], [])]
                for name, own in given.items():
                    cases = [
                        (holds + more, evaluates + known)
                        for holds, evaluates in cases
                        for more, known in (
                            ([absent(name)], []),
                            ([{"type": "object", "required": [name]}, own], [own]),
                        )
                    ]
            case _:
                raise UnheldError
        if not 0 < len(cases) <= MANY:
            raise UnheldError
        return cases

    def united(self, key: str, schema: Schema) -> list[Any]:
        return [union(self.cases(key, schema))]

    def closed(self, schema: Schema) -> list[Any]:
        """Of unevaluatedProperties and unevaluatedItems: in each case other things are known."""
        rest = {key: schema.pop(key) for key in UNEVALUATED if key in schema}
        cases: list[Case] = [([], [])]
        for key in UNIONS:
            if key in schema:
                more = self.cases(key, schema)
                cases = [(one + holds, own + known) for one, own in cases for holds, known in more]
                if len(cases) > MANY:
                    raise UnheldError
        found = []
        for holds, known in cases:
            closing = [self.closing(key, value, [schema, *known]) for key, value in rest.items()]
            found.append(([*holds, *closing], known))
        return [union(found)]

    def closing(self, key: str, rest: Any, schemas: Sequence[Any]) -> Any:
        """A schema for what none of these, all of which hold, evaluates."""
        known = [self.evaluated(key, schema) for schema in schemas]
        if None in known:
            return True
        names = {name: True for own in known if own is not None for name in own}
        if key == "unevaluatedItems":
            fitting = [json.loads(text) for kind, text in names if kind == "contains"]
            return self.listed([True] * (len(names) - len(fitting)), one_of_these([rest, *fitting]))
        named = {kind: {name: True for own, name in names if own == kind} for kind in NAMED}
        return named | {"additionalProperties": rest}

    def evaluated(self, key: str, schema: Any) -> set[tuple[str, Any]] | None:
        """The properties, by keyword and name, or the places of the entries that a schema evaluates; None for all."""
        if isinstance(a_schema(schema), bool):
            return set()
        self.step()
        if schema.keys() & {*UNIONS, "$dynamicRef", "$recursiveRef"}:
            raise UnheldError
        parts = [self.evaluated(key, member) for member in schema.get("allOf", [])]
        if "$ref" in schema:
            parts.append(self.followed(schema["$ref"], lambda target: self.evaluated(key, target)))
        if key == "unevaluatedItems":
            items = schema.get("items")
            first = items if isinstance(items, list) else schema.get("prefixItems", [])
            parts.append({("", place) for place in range(len(first))})
            if "contains" in schema and not self.is_old:
                parts.append({("contains", json.dumps(schema["contains"]))})
            every = "additionalItems" in schema if isinstance(items, list) else items is not None
        else:
            parts += [{(kind, name) for name in schema.get(kind, {})} for kind in NAMED]
            every = "additionalProperties" in schema
        if every or key in schema or None in parts:
            return None
        return set().union(*(part for part in parts if part is not None))

    # objects and arrays

    def dependent(self, schema: Schema) -> list[Any]:
        found = []
        for key in ("dependentRequired", "dependencies"):
            for name, needed in schema.pop(key, {}).items():
                found.append(one_of_these([absent(name), {"required": needed} if isinstance(needed, list) else needed]))
        return found

    def names(self, schema: Schema) -> list[Any]:
        """Names that are listed, match a pattern or have a length."""
        given = self.resolved(schema.pop("propertyNames"))
        said = {} if isinstance(a_schema(given), bool) else without_remarks(given)
        if said.pop("type", "string") != "string":
            raise UnheldError
        match said:
            case {} if given is False:
                return [{"additionalProperties": False}]
            case {"const": value, **others} if not others:
                return [only([value])]
            case {"enum": list() as values, **others} if not others:
                return [only(values)]
            case {"pattern": str() as pattern, **others} if not others:
                return [{"patternProperties": {pattern: True}, "additionalProperties": False}]
        if not said or said.keys() - {"minLength", "maxLength"}:
            raise UnheldError
        pattern = f"^(?s:.{{{whole(said, 'minLength', 0)},{whole(said, 'maxLength', '')}}})$"
        return [{"patternProperties": {pattern: True}, "additionalProperties": False}]

    def counted(self, schema: Schema) -> list[Any]:
        """How many properties, where some need not be: llguidance counts those that are required, and others."""
        least, most = whole(schema, "minProperties", 0), whole(schema, "maxProperties", None)
        required = schema.get("required", [])
        names = [name for name, inner in schema.get("properties", {}).items() if inner is not False]
        needed = [name for name in names if name in required]
        free = [name for name in names if name not in required]
        is_closed = schema.get("additionalProperties") is False and not schema.get("patternProperties")
        if not free or not (is_closed or (least == 1 and most is None)):
            raise UnheldError
        for key in ("minProperties", "maxProperties"):
            schema.pop(key, None)
        if not is_closed:
            other = {"properties": dict.fromkeys(free, False), "minProperties": 1}
            return [] if needed else [one_of_these([*({"required": [name]} for name in free), other])]
        parts = []
        lack, room = max(least - len(needed), 0), len(free) if most is None else most - len(needed)
        if lack > len(free) or room < 0 or comb(len(free), lack) > MANY or comb(len(free), max(room, 0)) > MANY:
            raise UnheldError
        if lack:
            parts.append(one_of_these({"required": list(some)} for some in combinations(free, lack)))
        if room < len(free):
            barred = combinations(free, len(free) - room)
            parts.append(one_of_these({"properties": dict.fromkeys(some, False)} for some in barred))
        return parts

    def contained(self, schema: Schema) -> tuple[Any, int, int | None]:
        """`contains`, and how many entries fit it, taken out of a schema."""
        counts = whole(schema, "minContains", 1), whole(schema, "maxContains", None)
        if self.is_old and {"minContains", "maxContains"} & schema.keys() and "2019" not in str(self.root["$schema"]):
            raise UnheldError  # they say nothing there
        for key in ("minContains", "maxContains"):
            schema.pop(key, None)
        return a_schema(schema.pop("contains")), *counts

    def containing(self, schema: Schema) -> list[Any]:
        """Places of the entries that fit, among the first few."""
        given, least, most = self.contained(schema)
        other = True if most is None else self.negated(given)
        if least > MANY:
            raise UnheldError
        furthest = max(REACH, least)
        counts = range(least, (least if most is None else min(most, furthest)) + 1)
        reach = furthest
        while sum(comb(reach, count) for count in counts) > MANY:
            reach -= 1
        lists = []
        for places in (own for count in counts for own in combinations(range(reach), count)):
            first = [given if place in places else other for place in range(max(places, default=-1) + 1)]
            lists.append(self.listed(first, other) | {"minItems": len(first)})
        return [one_of_these([NO_ARRAY, *lists])]

    def unique(self, schema: Schema) -> list[Any]:
        """Entries that differ, where there are few: each order of them."""
        least, most = whole(schema, "minItems", 0), whole(schema, "maxItems", None)
        if schema.pop("uniqueItems") is not True:
            raise UnheldError
        if most is not None and most < 2:
            return []
        values = few_values(self.resolved(schema.get("items")))
        counts = range(least, len(values) + 1 if most is None else min(len(values), most) + 1)
        if "prefixItems" in schema or sum(perm(len(values), count) for count in counts) > MANY:
            raise UnheldError
        orders = (order for count in counts for order in permutations(values, count))
        lists = [self.listed([{"const": value} for value in order]) | of_length(len(order)) for order in orders]
        return [one_of_these([NO_ARRAY, *lists])]


def a_schema(given: Any) -> Any:
    if not isinstance(given, (dict, bool)):
        raise UnheldError
    return given


def without_remarks(schema: Schema) -> Schema:
    return {key: value for key, value in schema.items() if key not in REMARKS}


def absent(name: str) -> Schema:
    return {"properties": {name: False}}


def only(names: Iterable[Any]) -> Schema:
    named = {name: True for name in names if isinstance(name, str)}
    return {"properties": named, "additionalProperties": False}


def of_length(count: int) -> Schema:
    return {"minItems": count, "maxItems": count}


def whole(schema: Schema, key: str, nothing: Any) -> Any:
    """A count; `nothing` where there is none."""
    value = schema.get(key, nothing)
    if key in schema and (type(value) not in (int, float) or value != int(value) or value < 0):
        raise UnheldError
    return int(value) if key in schema else nothing


def union(cases: Iterable[Case]) -> Any:
    return one_of_these({"allOf": [part for part in holds if part is not True]} for holds, _ in cases)


def one_of_these(schemas: Iterable[Any]) -> Any:
    found = [schema for schema in schemas if schema is not False and not is_never(schema)]
    if not found or any(schema is True or schema in ({}, {"allOf": []}) for schema in found):
        return bool(found)
    return found[0] if len(found) == 1 else {"anyOf": found}


def is_never(schema: Any) -> bool:
    return isinstance(schema, dict) and any(part is False for part in schema.get("allOf", []))


def few_values(schema: Any) -> list[Any]:
    """The few values that an entry may have at most; two that JSON has for the same are not among them."""
    said = schema if isinstance(schema, dict) else {}
    values = values_of(said)
    if values is None and said.get("type") == "boolean":
        values = [False, True]
    if values is None or any(type(value) not in (str, int, bool, type(None)) for value in values):
        raise UnheldError
    return list({(type(value), value): value for value in values}.values())


def other_values(values: Sequence[Any]) -> Any:
    """A schema for all values but these."""
    kinds = {TYPE_OF[type(value)].replace("integer", "number") for value in values}
    if kinds & {"array", "object"}:
        raise UnheldError
    found: list[Any] = [{"type": [kind for kind in KINDS if kind not in kinds]}]
    if "string" in kinds:
        found.append({"type": "string", "pattern": other_than([value for value in values if isinstance(value, str)])})
    if "boolean" in kinds:
        found += [{"const": value} for value in (False, True) if not any(own is value for own in values)]
    numbers = sorted({value for value in values if is_number(value)})
    if numbers:
        gaps = [{"exclusiveMinimum": one, "exclusiveMaximum": two} for one, two in pairwise(numbers)]
        gaps = [{"exclusiveMaximum": numbers[0]}, {"exclusiveMinimum": numbers[-1]}, *gaps]
        found += [{"type": "number"} | gap for gap in gaps]
    return one_of_these(found)
