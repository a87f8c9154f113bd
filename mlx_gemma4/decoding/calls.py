"""Tools as they were given -> a grammar of the calls that the chat template writes, in llguidance's Lark.

A call is no JSON: `call:NAME{key:value,…}`, keys bare and sorted as the template sorts them, strings between the token
`<|"|>`, no white space. The grammar begins behind `<|tool_call>` and ends with `<tool_call|>`; no other control token
is in it. What a schema says that cannot be held is left free, and noted: one of thirty tools must not refuse a request.
"""

import json
import logging
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import lru_cache
from typing import Any
from urllib.parse import unquote

from llguidance import LLMatcher, regex_to_lark

from mlx_gemma4.decoding.grammar import validation
from mlx_gemma4.errors import unbroken
from mlx_gemma4.prompt.tools import types_of
from mlx_gemma4.reply.toolcall import QUOTE, needs_quotes

logger = logging.getLogger("mlx_gemma4")

Schema = dict[str, Any]

MAX_RULES = 5_000  # of one tool: definitions that are merged anew at every level have no end
FREE_DEPTH = 6  # levels of a value of which nothing is said
MANY = 10_000  # entries, characters: a longer bound is none
LARGEST_WHOLE = 10**18  # of a number that is bounded on one side only

# Ten digits more than a float's; a reader refuses what is no finite number.
WHOLE = r"-?(0|[1-9][0-9]{0,30})"
NUMBER = WHOLE + r"(\.[0-9]{1,30})?([eE][+-]?[0-9]{1,2})?"
# Of any name that is read back as it is written. A bound of its length would cost milliseconds a mask.
KEY = r"""[^\x00-\x20\x7f-\xa0\s:,{}\[\]"<▁]+"""

MONTHS = r"((0[13578]|1[02])-(0[1-9]|[12][0-9]|3[01])|(0[469]|11)-(0[1-9]|[12][0-9]|30)|02-(0[1-9]|1[0-9]|2[0-8]))"
DATE = rf"[12][0-9]{{3}}-{MONTHS}"
TIME = r"([01][0-9]|2[0-3]):[0-5][0-9]:[0-5][0-9](\.[0-9]{1,6})?(Z|[+-]([01][0-9]|2[0-3]):[0-5][0-9])"
BYTE = r"(25[0-5]|2[0-4][0-9]|1[0-9][0-9]|[1-9]?[0-9])"
LABEL = r"[A-Za-z0-9]([A-Za-z0-9-]{0,61}[A-Za-z0-9])?"
FORMATS = {
    "date": DATE,
    "time": TIME,
    "date-time": f"{DATE}T{TIME}",
    "uuid": r"[0-9a-f]{8}-[0-9a-f]{4}-[0-9a-f]{4}-[0-9a-f]{4}-[0-9a-f]{12}",
    "ipv4": rf"{BYTE}(\.{BYTE}){{3}}",
    "hostname": rf"{LABEL}(\.{LABEL}){{0,8}}",
    "email": rf"[A-Za-z0-9_+-]{{1,32}}(\.[A-Za-z0-9_+-]{{1,32}}){{0,3}}@{LABEL}(\.{LABEL}){{1,8}}",
    "uri": r"[a-z][a-z0-9+.-]{0,20}:\/\/[A-Za-z0-9._~:\/?#@!$&'()*+,;=%-]+",
}

# Keywords that say something of the values and are not held.
LOOSE = {
    "not", "if", "dependentRequired", "dependentSchemas", "dependencies", "propertyNames", "patternProperties",
    "unevaluatedProperties", "unevaluatedItems", "contains", "uniqueItems", "$dynamicRef", "$recursiveRef",
}  # fmt: skip
LOWEST = {"minimum", "exclusiveMinimum", "minLength", "minItems", "minProperties"}  # the larger of two holds
HIGHEST = {"maximum", "exclusiveMaximum", "maxLength", "maxItems", "maxProperties"}
BOUNDS = ("minimum", "maximum", "exclusiveMinimum", "exclusiveMaximum", "multipleOf")


class ImpossibleError(Exception):
    """A schema that no value fits."""


# --- expressions of the grammar ----------------------------------------------------------------


@dataclass(frozen=True)
class Text:
    """What stands in the grammar as it is: a literal, the name of a terminal, a token."""

    lark: str


@dataclass(frozen=True)
class Rule:
    name: str


@dataclass(frozen=True)
class Row:
    parts: tuple["Node", ...]


@dataclass(frozen=True)
class Choice:
    members: tuple["Node", ...]


@dataclass(frozen=True)
class Entries:
    """Values with commas between them."""

    entry: "Node"
    least: int
    most: int | None


@dataclass(frozen=True)
class Member:
    """One property of an object."""

    name: str
    key: "Node"  # with its colon
    value: "Node"
    required: bool


@dataclass(frozen=True)
class Members:
    """The properties of an object, in the template's order, and maybe others behind them."""

    members: tuple[Member, ...]
    others: "Node | None"


Node = Text | Rule | Row | Choice | Entries | Members


def literal(text: str) -> Text:
    """A text as a string of Lark, which are JSON's; of an empty one nothing."""
    written = json.dumps(text, ensure_ascii=False).replace("\x7f", "\\u007f")
    return Text(written if text else "")


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
            told = ", ".join(notes[:10]) + (f" and {len(notes) - 10} more" if len(notes) > 10 else "")
            logger.warning("calls of %s are not held to all of its schema: %s", function["name"][:80], told)
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


def first_error(lark: str) -> str:
    """Why llguidance does not take a grammar, in one line; empty if it does."""
    wrong, messages = validation(LLMatcher.grammar_from_lark(lark))
    return unbroken(messages[0].splitlines()[0])[:120] if wrong else ""


@dataclass
class Compiler:
    """The rules of one tool. `notes` gathers, by place, what is not held."""

    root: Any
    prefix: str  # of the names of its rules
    quote: int
    notes: list[str] = field(default_factory=list)
    rules: dict[str, Node] = field(default_factory=dict)
    terminals: dict[str, str] = field(default_factory=dict)  # what matches -> name
    named: dict[str, str] = field(default_factory=dict)  # a schema -> its rule
    followed: int = 0

    def rules_of_call(self, name: str, close: int) -> str:
        schema = self.root if isinstance(self.root, dict) else {}
        if types_of(schema) == ["any"]:
            schema = {"type": "object"} | schema
        arguments = self.value(schema, "")
        self.rules[self.prefix] = Row((literal(f"call:{name}"), arguments, Text(f"<[{close}]>")))
        printer = Printer(self.rules, self.anything(FREE_DEPTH))
        lines = printer.lines(self.prefix)
        self.notes += [f"{key}, which has no end" for key in printer.freed]
        return "\n".join([*lines, *(f"{name}: {pattern}" for pattern, name in self.terminals.items())])

    # what a schema says

    def value(self, schema: Any, place: str) -> Node:
        """A value that a schema allows, as a rule of its own: the same schema is the same rule, so recursion ends."""
        if schema is False:
            raise ImpossibleError
        if not isinstance(schema, dict):
            return self.anything(FREE_DEPTH)
        mark = json.dumps(schema, sort_keys=True)
        if mark in self.named:
            return Rule(self.named[mark])
        name = self.named[mark] = self.new_name()
        self.rules[name] = Choice(())  # until it is known; also if there is no value
        self.rules[name] = self.parts(schema, place)
        return Rule(name)

    def new_name(self) -> str:
        if len(self.named) > MAX_RULES:
            raise ImpossibleError
        return f"{self.prefix}_v{len(self.named)}"

    def parts(self, schema: Schema, place: str) -> Node:
        if schema.get("nullable") is True:
            rest = {key: entry for key, entry in schema.items() if key != "nullable"}
            return Choice((self.value(rest, place), literal("null")))
        schema = self.merged(schema, place)
        for union in ("anyOf", "oneOf"):
            if isinstance(schema.get(union), list):
                return self.union(schema, union, place)
        self.notes += [f"{key} of {place or 'its arguments'}" for key in sorted(LOOSE & schema.keys()) if schema[key]]
        if "const" in schema or "enum" in schema:
            return self.one_of(schema)
        choices: list[Node] = []
        for kind in types_of(schema):
            try:
                choices.append(self.of_type(kind, schema, place))
            except ImpossibleError:
                continue
        if not choices:
            raise ImpossibleError
        return choices[0] if len(choices) == 1 else Choice(tuple(choices))

    def merged(self, schema: Schema, place: str) -> Schema:
        """References and allOf put in place: all of it holds at once."""
        following: list[str] = []
        while "$ref" in schema or "allOf" in schema:
            self.followed += 1
            if self.followed > MAX_RULES:
                raise ImpossibleError
            if "$ref" in schema:
                reference = schema["$ref"]
                target = self.target(reference)
                schema = {key: entry for key, entry in schema.items() if key != "$ref"}
                if target is None or reference in following:
                    self.notes.append(f"$ref of {place or 'its arguments'}")
                    continue
                following.append(reference)
                schema = self.both(schema, target, place)
            else:
                members = schema["allOf"]
                schema = {key: entry for key, entry in schema.items() if key != "allOf"}
                for member in members if isinstance(members, list) else []:
                    if member is False:
                        raise ImpossibleError
                    schema = self.both(schema, member, place) if isinstance(member, dict) else schema
        return schema

    def target(self, reference: Any) -> Schema | None:
        """What a JSON pointer (RFC 6901) names; None for what is not in this schema."""
        if not isinstance(reference, str) or not (reference == "#" or reference.startswith("#/")):
            return None
        found: Any = self.root
        for step in unquote(reference[1:]).split("/")[1:]:
            step = step.replace("~1", "/").replace("~0", "~")
            if isinstance(found, list) and step.isdecimal() and int(step) < len(found):
                found = found[int(step)]
            elif isinstance(found, dict) and step in found:
                found = found[step]
            else:
                return None
        if found is False:
            raise ImpossibleError
        return {} if found is True else found if isinstance(found, dict) else None

    def both(self, one: Schema, other: Schema, place: str) -> Schema:
        """A schema for what fits both."""
        result = dict(one)
        for key, value in other.items():
            if key not in result:
                result[key] = value
            elif result[key] == value or key in ("description", "title", "default", "examples", "$defs", "definitions"):
                continue
            elif key == "properties" and isinstance(value, dict) and isinstance(result[key], dict):
                joined = dict(result[key])
                for name, inner in value.items():
                    joined[name] = {"allOf": [joined[name], inner]} if name in joined else inner
                result[key] = joined
            elif key == "required" and isinstance(value, list) and isinstance(result[key], list):
                result[key] = [*result[key], *value]
            elif key == "enum" and isinstance(value, list) and isinstance(result[key], list):
                result[key] = [entry for entry in result[key] if entry in value]
            elif key == "type":
                result[key] = common_types(types_of(one), types_of(other))
            elif key in LOWEST | HIGHEST and is_number(value) and is_number(result[key]):
                result[key] = (max if key in LOWEST else min)(result[key], value)
            elif key in ("items", "additionalProperties", "allOf"):
                whole = [result[key], value]
                result[key] = [*result[key], *value] if key == "allOf" else {"allOf": whole} if all(whole) else False
            elif key in ("anyOf", "oneOf", "const"):
                result["allOf"] = [*result.get("allOf", []), {key: value}]
            elif key == "nullable":
                result[key] = False
            else:
                self.notes.append(f"{key} of {place or 'its arguments'}, which it has twice")
        return result

    def union(self, schema: Schema, key: str, place: str) -> Node:
        members = schema[key]
        rest = {name: entry for name, entry in schema.items() if name != key}
        found: list[Node] = []
        for member in members:
            try:
                if member is False:
                    continue
                inner = self.both(rest, member, place) if isinstance(member, dict) else rest
                if isinstance(member, dict) and "nullable" in member:
                    inner["nullable"] = member["nullable"]
                found.append(self.value(inner, place))
            except ImpossibleError:
                continue
        if not found:
            raise ImpossibleError
        return Choice(tuple(dict.fromkeys(found)))

    def one_of(self, schema: Schema) -> Node:
        values = [schema["const"]] if "const" in schema else schema["enum"]
        if "const" in schema and isinstance(schema.get("enum"), list) and schema["const"] not in schema["enum"]:
            raise ImpossibleError
        kinds = set(types_of({"type": schema["type"]})) if "type" in schema else {"any"}
        fitting = [value for value in values if isinstance(values, list) and fits(value, kinds)]
        if not fitting:
            raise ImpossibleError
        return Choice(tuple(dict.fromkeys(self.written(value) for value in fitting)))

    def written(self, value: Any) -> Node:
        """A value as the template writes it."""
        if isinstance(value, str):
            return self.between_quotes(literal(value))
        if value is None or isinstance(value, bool):
            return literal({None: "null", True: "true", False: "false"}[value])
        if isinstance(value, list):
            entries = [part for entry in value for part in (literal(","), self.written(entry))]
            return Row((literal("["), *entries[1:], literal("]")))
        if isinstance(value, dict):
            pairs = [
                part for key in in_order(value) for part in (literal(","), self.key(key), self.written(value[key]))
            ]
            return Row((literal("{"), *pairs[1:], literal("}")))
        return literal(repr(value))

    def key(self, key: str) -> Node:
        return Row((*self.quoted_key(key), literal(":")))

    def quoted_key(self, key: str) -> tuple[Node, ...]:
        return (self.between_quotes(literal(key)),) if needs_quotes(key) else (literal(key),)

    def between_quotes(self, inner: Node) -> Node:
        return Row((Text(f"<[{self.quote}]>"), inner, Text(f"<[{self.quote}]>")))

    # by type

    def of_type(self, kind: str, schema: Schema, place: str) -> Node:
        if kind == "string":
            return self.string(schema, place)
        if kind in ("integer", "number"):
            return self.number(kind, schema, place)
        if kind == "boolean":
            return Choice((literal("true"), literal("false")))
        if kind == "null":
            return literal("null")
        if kind == "array":
            return self.array(schema, place)
        if kind == "object":
            return self.mapping(schema, place)
        if kind != "any":
            self.notes.append(f"the type {kind[:40]} of {place or 'its arguments'}")
        return self.anything(FREE_DEPTH)

    def string(self, schema: Schema, place: str) -> Node:
        least, most = count(schema.get("minLength"), 0), count(schema.get("maxLength"), None)
        if most is not None and most < (least or 0):
            raise ImpossibleError
        patterns, may_be_empty = [], not least
        given = schema.get("format")
        if isinstance(given, str) and given in FORMATS:
            patterns.append(f"/{FORMATS[given]}/")
            may_be_empty = False
        elif isinstance(given, str):
            self.notes.append(f"the format {given[:40]} of {place or 'its arguments'}")
        if isinstance(schema.get("pattern"), str):
            pattern = whole_pattern(schema["pattern"])
            if pattern is None or first_error(f"start: T\nT: /{pattern}/"):
                self.notes.append(f"the pattern of {place or 'its arguments'}")
            else:
                patterns.append(f"/{pattern}/")
                may_be_empty = may_be_empty and re.search(schema["pattern"], "") is not None
        bounded = f"{{{max(least or 0, 1)},{'' if most is None else most}}}"
        inner: list[Node] = []
        if most != 0:
            length = "+" if bounded == "{1,}" else bounded
            inner.append(Text(self.terminal(" & ".join([*patterns, f"/(?s:.{length})/"]))))
        if may_be_empty:
            inner.append(Text(""))
        if not inner:
            raise ImpossibleError
        return self.between_quotes(inner[0] if len(inner) == 1 else Choice(tuple(inner)))

    def number(self, kind: str, schema: Schema, place: str) -> Node:
        bounds = {key: schema[key] for key in BOUNDS if is_number(schema.get(key))}
        if not bounds:
            return Text(self.terminal(f"/{WHOLE if kind == 'integer' else NUMBER}/"))
        if not {"maximum", "exclusiveMaximum"} & bounds.keys():
            bounds["maximum"] = LARGEST_WHOLE
        if not {"minimum", "exclusiveMinimum"} & bounds.keys():
            bounds["minimum"] = -LARGEST_WHOLE
        held = {"type": kind} | bounds | {"x-guidance": {"whitespace_flexible": False}}
        if first_error(f"start: %json {json.dumps(held)}"):
            self.notes.append(f"the bounds of {place or 'its arguments'}")
            return Text(self.terminal(f"/{WHOLE if kind == 'integer' else NUMBER}/"))
        return Text(f"%json {json.dumps(held)}")

    def array(self, schema: Schema, place: str) -> Node:
        least, most = count(schema.get("minItems"), 0) or 0, count(schema.get("maxItems"), None)
        items, first = schema.get("items", True), schema.get("prefixItems", [])
        if isinstance(items, list):  # as drafts before 2020 had it
            items, first = schema.get("additionalItems", True), items
        first = first if isinstance(first, list) else []
        if most is not None and most < least:
            raise ImpossibleError
        if not first:
            try:
                entry = self.value(items, f"{place}[]")
            except ImpossibleError:
                entry, most = literal("null"), 0
                if least:
                    raise
            return Row((literal("["), Entries(entry, least, most), literal("]")))
        return Row((literal("["), *self.tuple_of(first, items, least, most, place), literal("]")))

    def tuple_of(self, first: list[Any], items: Any, least: int, most: int | None, place: str) -> list[Node]:
        """Entries of which the first have schemas of their own; as many of these as there may be."""
        parts: list[Node] = []
        for index, inner in enumerate(first[: len(first) if most is None else most]):
            parts += [literal(",")] if parts else []
            parts.append(self.value(inner, f"{place}[{index}]"))
        if items is not False and (most is None or most > len(first)):
            left = None if most is None else most - len(first)
            entry = self.value(items, f"{place}[]")
            behind = Row((literal(","), Entries(entry, max(least - len(first), 1), left)))
            parts.append(behind if least > len(first) else Choice((behind, Text(""))))
        elif least > len(first):
            raise ImpossibleError
        return parts

    def mapping(self, schema: Schema, place: str) -> Node:
        given, more = schema.get("properties"), schema.get("additionalProperties")
        properties: Schema = given if isinstance(given, dict) else {}
        listed = schema.get("required")
        required = {name for name in listed if isinstance(name, str)} if isinstance(listed, list) else set()
        if isinstance(given, dict) and (more is None or more is False) and required <= properties.keys():
            others = None  # a call of what is declared, although more is not forbidden
        elif more is False:
            others = None
        else:
            others = self.pairs(more, properties.keys() | required, place)
        members = []
        for name in in_order(properties.keys() | required):
            own = properties.get(name, more if isinstance(more, dict) else True)
            wanted = name in required or (isinstance(own, dict) and own.get("required") is True)
            member = self.member(name, own, wanted, f"{place}.{name}"[-80:] if place else name[:80])
            members += [] if member is None else [member]
        if not members and others is None:
            return literal("{}")
        if not members and others is not None:
            least, most = count(schema.get("minProperties"), 0) or 0, count(schema.get("maxProperties"), None)
            return Row((literal("{"), Entries(others, least, most), literal("}")))
        if {"minProperties", "maxProperties"} & schema.keys():
            self.notes.append(f"the number of properties of {place or 'its arguments'}")
        return Row((literal("{"), Members(tuple(members), others), literal("}")))

    def member(self, name: str, schema: Any, required: bool, place: str) -> Member | None:
        try:
            value = self.value(schema, place)
        except ImpossibleError:
            if not required:
                return None
            self.notes.append(f"{place}, which nothing fits")
            value = self.anything(FREE_DEPTH)
        return Member(name, self.key(name), value, required)

    def pairs(self, more: Any, taken: Iterable[str], place: str) -> Node:
        """A property of any other name, and its value."""
        names = "|".join(regex_to_lark(re.escape(name)) for name in sorted(taken))
        pattern = f"/{KEY}/" + (f" & ~/({names})/" if names else "")
        value = self.value(more, f"{place}.*") if isinstance(more, dict) else self.anything(FREE_DEPTH)
        quoted = self.between_quotes(Text(self.terminal("/(?s:.+)/")))
        keys: Node = Text(self.terminal(pattern))
        return Row((keys if names else Choice((keys, quoted)), literal(":"), value))

    def anything(self, depth: int) -> Node:
        name = f"{self.prefix}_any{depth}"
        if name not in self.rules:
            text, number = self.string({}, ""), Text(self.terminal(f"/{NUMBER}/"))
            choices: list[Node] = [text, number, literal("true"), literal("false"), literal("null")]
            if depth:
                inner = self.anything(depth - 1)
                key = Choice((Text(self.terminal(f"/{KEY}/")), self.between_quotes(Text(self.terminal("/(?s:.+)/")))))
                choices.append(Row((literal("["), Entries(inner, 0, None), literal("]"))))
                pair = Row((key, literal(":"), inner))
                choices.append(Row((literal("{"), Entries(pair, 0, None), literal("}"))))
            self.rules[name] = Choice(tuple(choices))
        return Rule(name)

    def terminal(self, pattern: str) -> str:
        return self.terminals.setdefault(pattern, f"{self.prefix.upper()}_T{len(self.terminals)}")


# --- from expressions to Lark ------------------------------------------------------------------


class Printer:
    """Writes the rules that a call needs. A value that has no end is left out, or, of a property, is any value."""

    def __init__(self, rules: Mapping[str, Node], anything: Node):
        self.rules, self.anything = rules, anything
        self.ending = set[str]()  # rules that some text of finite length fits
        self.freed: list[str] = []  # names of properties
        self.extra: list[str] = []
        self.waiting: list[str] = []
        while found := {name for name in rules.keys() - self.ending if self.ends(rules[name])}:
            self.ending |= found

    def ends(self, node: Node) -> bool:
        match node:
            case Rule(name):
                return name in self.ending
            case Row(parts):
                return all(self.ends(part) for part in parts)
            case Choice(members):
                return any(self.ends(member) for member in members)
            case Entries(entry, least, _):
                return least == 0 or self.ends(entry)
            case Members(members, _):
                return all(self.ends(member.value) for member in members if member.required)
            case _:
                return True

    def lines(self, start: str) -> list[str]:
        found: dict[str, str] = {}
        self.waiting = [start]
        while self.waiting:
            name = self.waiting.pop()
            if name not in found:
                found[name] = f"{name}: {self.lark(self.rules[name])}"
        return [*found.values(), *self.extra]

    def lark(self, node: Node) -> str:
        """The expression; empty for the empty text."""
        match node:
            case Text(lark):
                return lark
            case Rule(name):
                self.waiting.append(name)
                return name
            case Row(parts):
                return " ".join(filter(None, map(self.lark, parts)))
            case Choice(members):
                return self.choice([self.lark(member) for member in members if self.ends(member)])
            case Entries(entry, least, most):
                return self.entries(entry, least, most)
            case Members(members, others):
                return self.members(members, others)

    def choice(self, texts: list[str]) -> str:
        if not texts:
            raise ImpossibleError
        written = " | ".join(text for text in texts if text)
        if "" in texts:
            return f"({written})?" if written else ""
        return f"({written})" if len(texts) > 1 else written

    def entries(self, entry: Node, least: int, most: int | None) -> str:
        if most == 0 or not self.ends(entry):
            return ""
        one = self.lark(entry)
        more = f'("," {one}){{{max(least - 1, 0)},{"" if most is None else most - 1}}}'
        more = more.replace("{0,}", "*")
        text = one if most == 1 else f"{one} {more}"
        return text if least else f"({text})?"

    def members(self, members: Sequence[Member], others: Node | None) -> str:
        """A rule for each property and what follows it, if it is the first, and if it is not."""
        prefix = f"{next(iter(self.rules)).split('_')[0]}_m{len(self.extra)}"
        names = [f"{prefix}_{place}" for place in range(len(members) + 1)]
        rest = "" if others is None else self.lark(others)
        lines = [(f'({rest} ("," {rest})*)?', f'("," {rest})*') if rest else ("", "")]
        for place in reversed(range(len(members))):
            member, (first_after, rest_after) = members[place], (f"{names[place + 1]}f", f"{names[place + 1]}r")
            value = member.value
            if not self.ends(value):
                self.freed.append(member.name[:80])
                value = self.anything
            own = f"{self.lark(member.key)} {self.lark(value)}"
            behind = rest_after if lines[-1][1] else ""
            first, after = f"{own} {behind}", f'"," {own} {behind}'
            if not member.required:
                first = f"({first} | {first_after})" if lines[-1][0] else f"({first})?"
                after = f"({after} | {rest_after})" if lines[-1][1] else f"({after})?"
            lines.append((first, after))
        lines.reverse()
        for name, (first, after) in zip(names[1:], lines[1:], strict=True):
            self.extra += [f"{name}f: {first}"] if first else []
            self.extra += [f"{name}r: {after}"] if after else []
        return lines[0][0]


# --- what schemas say --------------------------------------------------------------------------


def in_order(keys: Iterable[str]) -> list[str]:
    """Keys as the template sorts them: as they are written, shielded, in any case of letters."""

    def as_written(key: str) -> str:
        shielded = key.replace("<", "<\ue000")  # template.shield
        return (f"{QUOTE}{shielded}{QUOTE}" if needs_quotes(key) else shielded).lower()

    return sorted(keys, key=as_written)


def is_number(value: Any) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool)


def count(value: Any, default: int | None) -> int | None:
    """A bound of a length; the default for what is none."""
    if not is_number(value) or not 0 <= value <= MANY:
        return default
    return int(value)


def common_types(one: Sequence[str], other: Sequence[str]) -> list[str]:
    found = [kind for kind in one if kind in other or (kind == "integer" and "number" in other)]
    found += [kind for kind in other if kind == "integer" and "number" in one and kind not in one]
    if not found:
        raise ImpossibleError
    return found


KINDS: dict[type, tuple[str, ...]] = {
    str: ("string",), bool: ("boolean",), int: ("integer", "number"), float: ("number", "integer"),
    dict: ("object",), list: ("array",), type(None): ("null",),
}  # fmt: skip


def fits(value: Any, kinds: set[str]) -> bool:
    """Whether a value, as JSON has it, is of one of these types."""
    if isinstance(value, float) and not value.is_integer():
        return bool({"number", "any"} & kinds)
    return "any" in kinds or not kinds.isdisjoint(KINDS[type(value)])


def whole_pattern(pattern: str) -> str | None:
    """A regular expression of JSON Schema, which matches anywhere, as one of llguidance that matches the whole text.

    None where an anchor stands inside, or an escape asks for what is around a place.
    """
    alternatives = split_alternatives(pattern)
    if alternatives is None:
        return None
    written = []
    for text in alternatives:
        begins, ends = text.startswith("^"), text.endswith("$") and not text.endswith("\\$")
        inner = text[1 if begins else 0 : -1 if ends else None]
        if has_anchor(inner):
            return None
        body = regex_to_lark(inner, "dw")
        written.append(f"{'' if begins else '(?s:.*)'}({body}){'' if ends else '(?s:.*)'}")
    return "|".join(f"({text})" for text in written)


SYMBOL = re.compile(r"\\.|\[\^?\]?(?:\\.|[^\]\\])*\]|.", re.DOTALL)  # an escape, a class, or a character


def split_alternatives(pattern: str) -> list[str] | None:
    """The alternatives of a regular expression; None if its brackets do not fit."""
    depth, parts = 0, [""]
    for symbol in SYMBOL.findall(pattern):
        depth += {"(": 1, ")": -1}.get(symbol, 0)
        if depth < 0:
            return None
        if symbol == "|" and depth == 0:
            parts.append("")
        else:
            parts[-1] += symbol
    return parts if depth == 0 else None


def has_anchor(pattern: str) -> bool:
    return any(symbol in ("^", "$", "\\b", "\\B", "\\A", "\\Z", "\\z") for symbol in SYMBOL.findall(pattern))
