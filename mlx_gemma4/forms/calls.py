"""Tools as they were given -> a grammar of the calls that the chat template writes, in llguidance's Lark.

A call is no JSON: `call:NAME{key:value,…}`, keys bare and sorted as the template sorts them, strings between the token
`<|"|>`, no white space. The grammar begins behind `<|tool_call>` and ends with `<tool_call|>`; no other control token
is in it. What a schema says that cannot be held is left free, and noted: one of thirty tools must not refuse a request.
"""

import json
import logging
import re
from collections.abc import Callable, Iterable, Sequence
from fractions import Fraction
from functools import lru_cache
from itertools import combinations
from operator import add, ge, gt, le, lt
from typing import Any

from llguidance import LLMatcher, regex_to_lark

from mlx_gemma4.errors import listed
from mlx_gemma4.forms.lark import (
    NOTHING,
    ImpossibleError,
    Node,
    Printer,
    Property,
    Rule,
    choice,
    entries,
    first_error,
    literal,
    row,
)
from mlx_gemma4.forms.schemas import ANY_NAME, LARGEST, Schema, held_bounds, is_number, modern, values_of, with_null
from mlx_gemma4.forms.strings import FORMATS, is_empty, matches, whole_pattern
from mlx_gemma4.prompt.tools import TYPE_OF, pointed, types_of
from mlx_gemma4.reply.toolcall import QUOTE, needs_quotes

logger = logging.getLogger("mlx_gemma4")

MAX_RULES = 5_000  # of one tool: definitions that are merged anew at every level have no end
FREE_DEPTH = 6  # levels of a value of which nothing is said
MANY = 10_000  # entries, characters: a longer bound is none

# Ten digits more than a float's; a reader refuses what is no finite number.
WHOLE = r"-?(0|[1-9][0-9]{0,30})"
NUMBER = WHOLE + r"(\.[0-9]{1,30})?([eE][+-]?[0-9]{1,2})?"
# Of any name that is read back as it is written: words. A bound of its length would cost milliseconds a mask.
WORD = r"""[^\x00-\x20\x7f-\xa0\s:,{}\[\]"<▁]+"""
KEY = f"{WORD}( +{WORD})*"

# Keywords that say something of the values and are not held.
LOOSE = {
    "not", "if", "dependentRequired", "dependentSchemas", "dependencies", "propertyNames",
    "unevaluatedProperties", "unevaluatedItems", "contains", "uniqueItems", "$dynamicRef", "$recursiveRef",
}  # fmt: skip
# Values of these with which they say nothing, or what is held in another way.
NEUTRAL: dict[str, tuple[Any, ...]] = {
    "not": (False,),
    "propertyNames": ANY_NAME,
    "unevaluatedProperties": (True, {}, False),
    "unevaluatedItems": (True, {}, False),
    "uniqueItems": (False,),
    **dict.fromkeys(("dependentRequired", "dependentSchemas", "dependencies"), ({},)),
}
REMARKS = {"description", "title", "default", "examples", "$defs", "definitions"}
INNER = {  # what says something of the parts of a value
    "items", "prefixItems", "minItems", "maxItems", "properties", "patternProperties",
    "additionalProperties", "required", "minProperties", "maxProperties",
}  # fmt: skip
# Of numbers: whether one keeps to it.
BOUNDS: dict[str, Callable[[Any, Any], bool]] = {
    "minimum": ge,
    "maximum": le,
    "exclusiveMinimum": gt,
    "exclusiveMaximum": lt,
    "multipleOf": lambda value, step: step <= 0 or (Fraction(str(value)) / Fraction(str(step))).denominator == 1,
}
IMPOSSIBLE: Schema = {"enum": []}


# --- a call ------------------------------------------------------------------------------------


def call_grammar(tools: Sequence[Schema], only: str | None, quote: int, close: int) -> str:
    """The grammar of one call of these checked tools, or of the one with this name, in llguidance's form.

    quote, close: the ids of `<|"|>` and `<tool_call|>`. What is not held is logged, once for the same tools.
    """
    named = [tool for tool in tools if only is None or tool["function"]["name"] == only]
    return cached_grammar(json.dumps(named), quote, close)


@lru_cache(maxsize=64)
def cached_grammar(tools: str, quote: int, close: int) -> str:
    functions = [tool["function"] for tool in json.loads(tools)]
    rules = [f"start: {' | '.join(f't{place}' for place in range(len(functions)))}"]
    for place, function in enumerate(functions):
        text, notes = function_rules(function, f"t{place}", quote, close)
        if notes:
            logger.warning("calls of %s are not held to all of its schema: %s", function["name"][:80], listed(notes))
        rules.append(text)
    grammar: str = LLMatcher.grammar_from_lark("\n".join(rules))
    return grammar


def function_rules(function: Schema, name: str, quote: int, close: int) -> tuple[str, list[str]]:
    """The rules of one tool's call, and what of its schema they leave free."""
    schema = function.get("parameters") or {"type": "object", "properties": {}, "additionalProperties": False}
    compiler = Compiler(schema, name, quote)
    try:
        text = compiler.rules_of_call(function["name"], close)
    except (ImpossibleError, RecursionError):
        error = "it allows no arguments, or has no end"
    else:
        error = first_error(f"start: {name}\n{text}")
        if not error:
            return text, list(dict.fromkeys(compiler.notes))
    free = Compiler({"type": "object"}, name, quote)
    return free.rules_of_call(function["name"], close), [f"all of it ({error})"]


# --- what schemas say --------------------------------------------------------------------------


class Compiler:
    """The rules of one tool. `notes` gathers, by place, what is not held."""

    def __init__(self, root: Any, prefix: str, quote: int):
        """prefix: of the names of its rules."""
        self.root, self.prefix, self.mark = root, prefix, f"<[{quote}]>"
        self.notes: list[str] = []
        self.rules: dict[str, Node] = {}
        self.terminals: dict[str, str] = {}  # what matches -> name
        self.named: dict[tuple[bool, str], Node] = {}  # a schema, and whether it is an alternative -> its rule
        self.followed = 0  # references and lists of allOf
        self.alternatives = 0  # around what is read: of several, one that nothing fits is left out

    def rules_of_call(self, name: str, close: int) -> str:
        arguments = self.value({"type": "object", "allOf": [self.root]}, "")
        self.rules[self.prefix] = row(literal(f"call:{name}"), arguments, f"<[{close}]>")
        printer = Printer(self.rules, self.anything())
        lines = printer.lines(self.prefix)
        self.notes += [f"{key}, which has no end" for key in printer.freed]
        return "\n".join([*lines, *(f"{name}: {pattern}" for pattern, name in self.terminals.items())])

    def note(self, what: str, place: str) -> None:
        self.notes.append(f"{what} of {place or 'its arguments'}")

    def rule(self, node: Node) -> Rule:
        name = f"{self.prefix}_{len(self.rules)}"
        self.rules[name] = node
        return Rule(name)

    def terminal(self, pattern: str) -> Node:
        if " & " in pattern and is_empty(pattern):
            return NOTHING
        return self.terminals.setdefault(pattern, f"{self.prefix.upper()}_T{len(self.terminals)}")

    def quoted(self, inner: Node) -> Node:
        return row(self.mark, inner, self.mark)

    def value(self, schema: Any, place: str) -> Node:
        """A value that a schema allows, as a rule of its own: the same schema is the same rule, so recursion ends."""
        key = self.alternatives > 0, json.dumps(schema, sort_keys=True)
        if key not in self.named:
            if len(self.named) > MAX_RULES:
                raise ImpossibleError
            rule = self.named[key] = self.rule(NOTHING)  # until it is known
            self.rules[rule.name] = found = self.parts(as_schema(schema), place)
            self.named[key] = NOTHING if found == NOTHING else rule
        return self.named[key]

    def parts(self, schema: Schema, place: str) -> Node:
        schema = self.merged(schema, place)
        for union in ("anyOf", "oneOf"):
            if isinstance(schema.get(union), list):
                rest = without(schema, union)
                members = [self.both(rest, as_schema(member), place) for member in schema[union]]
                if union == "oneOf" and not self.apart(members, place):
                    self.note("oneOf, of whose members several may fit,", place)
                return self.alternative(members, place)
        for key in sorted(LOOSE & schema.keys()):
            if schema[key] not in NEUTRAL.get(key, ()):
                self.note(key, place)
        if "const" in schema or "enum" in schema:
            return self.one_of(schema, place)
        return choice(*(self.of_type(kind, schema, place) for kind in types_of(schema)))

    def alternative(self, members: Sequence[Schema], place: str) -> Node:
        """A value of one of these."""
        self.alternatives += 1
        found = choice(*(self.value(member, place) for member in members))
        self.alternatives -= 1
        return found

    # schemas joined

    def merged(self, schema: Schema, place: str) -> Schema:
        """References and allOf put in place: all of it holds at once."""
        following: list[Any] = []
        while "$ref" in schema or "allOf" in schema:
            self.followed += 1
            if self.followed > MAX_RULES:
                raise ImpossibleError
            if "$ref" in schema:
                reference, schema = schema["$ref"], without(schema, "$ref")
                members = [pointed(self.root, reference)]
                if reference in following:  # it holds already
                    continue
                if not isinstance(members[0], (dict, bool)):
                    self.note("$ref", place)
                    continue
                following.append(reference)
            else:
                members, schema = schema["allOf"], without(schema, "allOf")
            members = [as_schema(member) for member in members] if isinstance(members, list) else []
            for member in members:
                for key in ("unevaluatedProperties", "unevaluatedItems"):
                    if key in member and (len(members) > 1 or INNER & schema.keys()):
                        self.note(f"{key}, of one part alone,", place)
                schema = self.both(schema, member, place)
        return schema

    def both(self, one: Schema, other: Schema, place: str) -> Schema:
        """A schema for what fits both."""
        one, other = self.spread(one, other, place), self.spread(other, one, place)
        result = dict(one)
        for key, value in other.items():
            own = result.setdefault(key, value)
            kind, join = JOINS.get(key, (type(None), add))
            if own == value or key in REMARKS:
                continue
            elif key == "$ref":
                result = self.both(result, {"allOf": [{key: value}]}, place)
            elif key == "type" and (common := common_types(types_of(one), types_of(other))):
                result[key] = common
            elif key in ("type", "const"):
                result |= IMPOSSIBLE
            elif isinstance(own, kind) and isinstance(value, kind):
                result[key] = join(own, value)
            else:
                self.notes.append(f"{key} of {place or 'its arguments'}, which it has twice")
        return result

    def spread(self, schema: Schema, other: Schema, place: str) -> Schema:
        """A schema that says of each part which another one names what it says of all others."""
        found, more = dict(schema), schema.get("additionalProperties", True)
        if more not in (True, {}):
            patterns = self.patterns_of(schema, place)
            names = properties_of(other).keys() - properties_of(schema).keys()
            barred = names & required_of(other) if more is False else set()
            if barred:  # nothing would fit
                self.note("additionalProperties, which bars what is required,", place)
            others = {name: more for name in names - barred if not any(matches(own, name) for own in patterns)}
            found["properties"] = properties_of(schema) | others
        first, own = other.get("prefixItems"), schema.get("prefixItems", [])
        if isinstance(first, list) and isinstance(own, list):
            found["prefixItems"] = own + [schema.get("items", True)] * (len(first) - len(own))
        return found

    def apart(self, members: Sequence[Schema], place: str) -> bool:
        """Whether no value fits two of these, as far as a type, a value or a property that each has tells."""
        members = [self.merged(member, place) for member in members]
        signs = [
            {name: self.merged(as_schema(own), place) for name, own in properties_of(member).items() if name in needed}
            for member in members
            for needed in [required_of(member)]
        ]
        return all(
            differ(one, other)
            or any(differ(own[name], others[name]) for name in own.keys() & others.keys())
            or bars(one, other)
            or bars(other, one)
            for (one, own), (other, others) in combinations(zip(members, signs, strict=True), 2)
        )

    # values as they are written

    def one_of(self, schema: Schema, place: str) -> Node:
        """Of the values that a schema lists those that fit what stands beside them."""
        values, listed = values_of(schema) or [], schema.get("enum")
        kinds = set(types_of({"type": schema["type"]})) if "type" in schema else {"any"}
        found = [value for value in values if fits(value, kinds) and (not isinstance(listed, list) or value in listed)]
        if any(isinstance(value, (list, dict)) for value in found):
            for key in sorted(INNER & schema.keys()):
                self.note(f"{key} beside the values", place)
        return choice(*(self.written(value) for value in found if self.is_within(value, schema, place)))

    def is_within(self, value: Any, schema: Schema, place: str) -> bool:
        """Whether a string or a number keeps to the bounds of a schema."""
        if is_number(value):
            return all(keeps(value, schema[key]) for key, keeps in BOUNDS.items() if is_number(schema.get(key)))
        if not isinstance(value, str):
            return True
        least, most = bounds_of("Length", schema)
        if len(value) < least or (most is not None and len(value) > most):
            return False
        pattern = self.pattern(schema, place)
        return pattern is None or matches(pattern, value)

    def pattern(self, schema: Schema, place: str) -> str | None:
        """What a whole string matches; None if there is nothing that is held."""
        given = schema.get("pattern")
        if not isinstance(given, str):
            return None
        pattern = held_pattern(given)
        if pattern is None:
            self.note("the pattern", place)
        return pattern

    def written(self, value: Any) -> Node:
        """A value as the template writes it."""
        match value:
            case str():
                return self.quoted(literal(value))
            case list():
                return row('"["', *with_commas(map(self.written, value)), '"]"')
            case dict():
                pairs = (row(self.key(key), self.written(value[key])) for key in in_order(value))
                return row('"{"', *with_commas(pairs), '"}"')
            case _:
                return literal(json.dumps(value))

    def key(self, key: str) -> Node:
        """With its colon."""
        return row(self.quoted(literal(key)) if needs_quotes(key) else literal(key), '":"')

    # by type

    def of_type(self, kind: str, schema: Schema, place: str) -> Node:
        match kind:
            case "string":
                return self.string(schema, place)
            case "integer" | "number":
                return self.number(kind, schema, place)
            case "boolean":
                return choice('"true"', '"false"')
            case "null":
                return '"null"'
            case "array":
                return self.array(schema, place)
            case "object":
                return self.mapping(schema, place)
        if kind != "any":
            self.note(f"the type {kind[:40]}", place)
        return self.anything()

    def string(self, schema: Schema, place: str) -> Node:
        least, most = bounds_of("Length", schema)
        patterns, empty = [], least == 0
        match schema.get("format"):
            case str(given) if given in FORMATS:
                patterns.append(FORMATS[given])
                empty = False
            case str(given):
                self.note(f"the format {given[:40]}", place)
        if (pattern := self.pattern(schema, place)) is not None:
            patterns.append(pattern)
            empty = empty and matches(pattern, "")
        least = max(least, 1)
        patterns.append(f"(?s:.{{{least},{'' if most is None else most}}})")
        too_long = most is not None and most < least
        full = NOTHING if too_long else self.terminal(" & ".join(f"/{pattern}/" for pattern in patterns))
        return self.quoted(choice(full, "" if empty else NOTHING))

    def number(self, kind: str, schema: Schema, place: str) -> Node:
        bounds = {key: schema[key] for key in BOUNDS if is_number(schema.get(key))}
        if bounds:
            for name, limit in (("Maximum", LARGEST), ("Minimum", -LARGEST)):
                if f"exclusive{name}" not in bounds:
                    bounds.setdefault(name.lower(), limit)
            held = "%json " + json.dumps(
                held_bounds({"type": kind, **bounds}) | {"x-guidance": {"whitespace_flexible": False}}
            )
            if not first_error(f"start: {held}"):
                return held
            self.note("the bounds", place)
        return self.terminal(f"/{WHOLE if kind == 'integer' else NUMBER}/")

    def array(self, schema: Schema, place: str) -> Node:
        """As many of the entries that have schemas of their own as there may be, and others behind them."""
        least, most = bounds_of("Items", schema)
        items = schema.get("items", schema.get("unevaluatedItems") is not False)
        first = schema.get("prefixItems")
        first = first[:most] if isinstance(first, list) else []
        parts = [self.value(inner, f"{place}[{index}]") for index, inner in enumerate(first)]
        if NOTHING in parts:
            most = parts.index(NOTHING)
            parts = parts[:most]
        count = len(parts)
        left = None if most is None else most - count
        entry = NOTHING if left == 0 else self.value(items, f"{place}[]")
        if not parts:
            return row('"["', entries(entry, least, left), '"]"')
        more = row('","', entries(entry, max(least - count, 1), left))
        return row('"["', *with_commas(parts), choice(more, NOTHING if least > count else ""), '"]"')

    def mapping(self, schema: Schema, place: str) -> Node:
        given, more = schema.get("properties"), schema.get("additionalProperties")
        if more is None and schema.get("unevaluatedProperties") is False:
            more = False
        properties, required = properties_of(schema), required_of(schema)
        patterns = self.patterns_of(schema, place)
        rest = more if isinstance(more, dict) else more is not False
        named = {name: [properties[name]] if name in properties else [] for name in (*properties, *sorted(required))}
        for name, schemas in named.items():
            schemas += [inner for pattern, inner in patterns.items() if matches(pattern, name)]
        least, most = bounds_of("Properties", schema)
        declared = (isinstance(given, dict) or bool(patterns)) and all(named.values()) and (bool(named) or not least)
        names = in_order(named)
        pairs = [self.pairs(inner, names, place, pattern) for pattern, inner in patterns.items()]
        if more is not False and not (more is None and declared):  # a call of what is declared, although more may come
            pairs.append(self.pairs(rest, names, place, but="|".join(patterns)))
        others = choice(*pairs)
        members = []
        for name in names:
            schemas = named[name] or [rest]
            own = schemas[0] if len(schemas) == 1 else {"allOf": schemas}
            wanted = name in required or (isinstance(schemas[0], dict) and schemas[0].get("required") is True)
            where = f"{place}.{name}"[-80:] if place else name[:80]
            value = self.value(own, where)
            if value == NOTHING and wanted and self.alternatives:
                return NOTHING
            if value == NOTHING and wanted:
                self.notes.append(f"{where}, which nothing fits")
                value = self.anything()
            if value != NOTHING:
                members.append((row(self.key(name), Property(name[:80], value, wanted)), wanted))
        if not members:
            return row('"{"', entries(others, least, most), '"}"')
        if {"minProperties", "maxProperties"} & schema.keys():
            self.note("the number of properties", place)
        # others may stand behind each and before all; what may stand from here on, as the first and behind another
        several = choice(row('","', entries(others, 1)), "")
        first: Node = ""
        after: Node = ""
        for member, wanted in reversed(members):
            as_first, behind = row(member, several, after), row('","', member, several, after)
            first = self.rule(as_first if wanted else choice(as_first, first))
            after = self.rule(behind if wanted else choice(behind, after))
        return row('"{"', choice(row(entries(others, 1), after), first), '"}"')

    def patterns_of(self, schema: Schema, place: str) -> Schema:
        """The schemas of patternProperties, by what matches their whole names."""
        given = schema.get("patternProperties")
        found: Schema = {}
        for name, inner in given.items() if isinstance(given, dict) else ():
            pattern = held_pattern(name)
            if pattern is None or found:  # of a name that several match, one holds
                self.note("patternProperties", place)
            found["(?s:.*)" if pattern is None else pattern] = True if pattern is None else inner
        return found

    def pairs(self, schema: Any, taken: Sequence[str], place: str, name: str = "", but: str = "") -> Node:
        """A property of any other name, and its value. name, but: what its whole name matches, and does not."""
        value = self.value(schema, f"{place}.*") if schema is not True else self.anything()
        barred = "|".join([*(regex_to_lark(re.escape(own)) for own in sorted(taken)), *filter(None, [but])])
        terms = [*([f"/{name}/"] if name else []), *([f"~/({barred})/"] if barred else [])]
        return row(self.any_key(*terms), '":"', value)

    def any_key(self, *terms: str) -> Node:
        """A name that each of these terminals matches too, bare or in quotes."""
        bare, quoted = (" & ".join([f"/{pattern}/", *terms]) for pattern in (KEY, "(?s:.{1,})"))
        return choice(self.terminal(bare), self.quoted(self.terminal(quoted)))

    def anything(self, depth: int = FREE_DEPTH) -> Node:
        name = f"{self.prefix}_any{depth}"
        if name not in self.rules:
            choices = [self.string({}, ""), self.number("number", {}, ""), '"true"', '"false"', '"null"']
            if depth:
                inner = self.anything(depth - 1)
                pair = row(self.any_key(), '":"', inner)
                choices += [row('"["', entries(inner), '"]"'), row('"{"', entries(pair), '"}"')]
            self.rules[name] = choice(*choices)
        return Rule(name)


@lru_cache(maxsize=256)
def held_pattern(given: str) -> str | None:
    """What matches the whole text, as llguidance takes it; None for what it does not."""
    pattern = whole_pattern(given)
    return None if pattern is None or first_error(f"start: T\nT: /{pattern}/") else pattern


def as_schema(given: Any) -> Schema:
    """As the draft 2020-12 has it, null one of its types if it is nullable."""
    if not isinstance(given, dict):
        return IMPOSSIBLE if given is False else {}
    schema = modern(given)
    if schema.pop("nullable", False) is not True:
        return schema
    kinds = types_of(schema)
    return with_null(schema if kinds == ["any"] else {"type": kinds} | schema)


def properties_of(schema: Schema) -> Schema:
    given = schema.get("properties")
    return given if isinstance(given, dict) else {}


def required_of(schema: Schema) -> set[str]:
    given = schema.get("required")
    return {name for name in given if isinstance(name, str)} if isinstance(given, list) else set()


def differ(one: Schema, other: Schema) -> bool:
    """Whether what two schemas say of the type, or of all values, lets none fit both."""
    values, others = values_of(one), values_of(other)
    if values is not None and others is not None:
        return not any(value in others for value in values)
    kinds = [
        types_of({"enum": found}) if found else types_of(own) if "type" in own else ["any"]
        for own, found in ((one, values), (other, others))
    ]
    return ["any"] not in kinds and not common_types(*kinds)


def bars(one: Schema, other: Schema) -> bool:
    """Whether one schema allows no property of a name that the other requires."""
    closed = one.get("additionalProperties") is False and "patternProperties" not in one
    return any(properties_of(one).get(name, not closed) is False for name in required_of(other))


def without(schema: Schema, key: str) -> Schema:
    return {name: entry for name, entry in schema.items() if name != key}


def with_commas(nodes: Iterable[Node]) -> list[Node]:
    return [part for node in nodes for part in ('","', node)][1:]


def in_order(keys: Iterable[str]) -> list[str]:
    """Keys as the template sorts them: as they are written, shielded, in any case of letters."""

    def as_written(key: str) -> str:
        shielded = key.replace("<", "<\ue000")  # template.shield
        return (f"{QUOTE}{shielded}{QUOTE}" if needs_quotes(key) else shielded).lower()

    return sorted(keys, key=as_written)


def bounds_of(what: str, schema: Schema) -> tuple[int, int | None]:
    """The least and the most of minLength, maxLength and their like; of what is none, no bound."""
    least, most = (
        int(bound) if is_number(bound) and 0 <= bound <= MANY else None
        for bound in (schema.get(f"min{what}"), schema.get(f"max{what}"))
    )
    return least or 0, most


def fits(value: Any, kinds: set[str]) -> bool:
    """Whether a value, as JSON has it, is of one of these types."""
    kind = "integer" if isinstance(value, float) and value.is_integer() else TYPE_OF[type(value)]
    return not kinds.isdisjoint({"any", kind, "number" if kind == "integer" else kind})


def common_types(one: Sequence[str], other: Sequence[str]) -> list[str]:
    taken = [{*kinds, "integer"} if "number" in kinds else set(kinds) for kinds in (one, other)]
    return [kind for kind in dict.fromkeys([*one, *other]) if kind in taken[0] and kind in taken[1]]


def together(one: Any, other: Any) -> Any:
    return False if one is False or other is False else {"allOf": [one, other]}


def both_unions(one: list[Any], other: list[Any]) -> list[Any]:
    return [together(member, {"anyOf": other}) for member in one]


def all_properties(one: Schema, other: Schema) -> Schema:
    return one | {name: together(one[name], own) if name in one else own for name, own in other.items()}


# How two that a schema has of one keyword are one, where both are of these types.
JOINS: dict[str, tuple[type | tuple[type, ...], Callable[[Any, Any], Any]]] = {
    "properties": (dict, all_properties),
    "patternProperties": (dict, all_properties),
    "items": (object, together),
    "additionalProperties": (object, together),
    "anyOf": (list, both_unions),
    "oneOf": (list, both_unions),
    "required": (list, add),
    "allOf": (list, add),
    "enum": (list, lambda one, other: [value for value in one if value in other]),
    "prefixItems": (list, lambda one, other: list(map(together, one, other))),
    **dict.fromkeys(("minimum", "exclusiveMinimum", "minLength", "minItems", "minProperties"), ((int, float), max)),
    **dict.fromkeys(("maximum", "exclusiveMaximum", "maxLength", "maxItems", "maxProperties"), ((int, float), min)),
}
