"""`response_format` -> a grammar of the answer, in llguidance's form. ValueError, one line, for what cannot be held."""

import json
import logging
import re
from collections.abc import Mapping
from functools import lru_cache
from typing import Any

from llguidance import LLMatcher

from mlx_gemma4.errors import LONGEST_SHOWN, a, clipped, shown, unbroken
from mlx_gemma4.forms.conditions import Conditions
from mlx_gemma4.forms.lark import validation
from mlx_gemma4.forms.references import linked
from mlx_gemma4.forms.schemas import Schema, held_bounds, inner_schemas, with_null
from mlx_gemma4.forms.strings import FORMATS as PATTERNS
from mlx_gemma4.forms.strings import as_all_read
from mlx_gemma4.prompt.messages import check_json
from mlx_gemma4.prompt.tools import TYPE_OF, pointed

logger = logging.getLogger("mlx_gemma4")

# Between the parts of JSON: without bounds, line breaks go on for ever; without any, models end lists early.
WHITE_SPACE = r"( |\n {0,40})"
LONGEST = 1_000_000  # characters of a schema or grammar

FORMS = '"json", a JSON schema, or a dict with the type regex, lark, json_schema or json_object'
FORMATS = {"date-time", "time", "date", "duration", "email", "hostname", "ipv4", "ipv6", "uuid", "uri", "unknown"}
# llguidance's know a February 29 of every year and a 61st second: as patterns, they do not.
MOMENTS = {"date", "time", "date-time"}
# Keywords that say something of the values and that no grammar of llguidance holds.
UNHELD = {
    "not", "if", "then", "else", "dependentRequired", "dependentSchemas", "dependencies", "propertyNames",
    "unevaluatedProperties", "unevaluatedItems", "contains", "minContains", "maxContains", "uniqueItems",
    "$dynamicRef", "$recursiveRef", "$vocabulary", "divisibleBy", "disallow", "extends",
}  # fmt: skip


def response_grammar(response_format: Any) -> str | None:
    """The grammar of an answer; None if any text will do. ValueError if it is wrong or cannot be held."""
    if response_format is None:
        return None
    if isinstance(response_format, str) and response_format == "json":
        return schema_grammar({"type": ["object", "array"]})
    if not isinstance(response_format, Mapping):
        raise ValueError(f"response_format is {shown(response_format)}; expected {FORMS}")
    form = dict(response_format)
    match form.get("type"):
        case "text":
            return None
        case "json_object":
            return schema_grammar({"type": "object"})
        case "json_schema":
            return schema_grammar(wrapped_schema(form))
        case "regex":
            return checked(LLMatcher.grammar_from_regex(text_of(form, "regex")))
        case "lark":
            return lark_grammar(text_of(form, "grammar"))
        case str() as kind if kind not in TYPE_OF.values():
            raise ValueError(f"response_format has the type {shown(kind)}; expected {FORMS}")
    return schema_grammar(form)


def wrapped_schema(form: Schema) -> Any:
    """OpenAI's two spellings: beside the type, or under `json_schema`."""
    inner = form.get("json_schema", form)
    if not isinstance(inner, Mapping) or inner.get("schema") is None:
        raise ValueError(
            'response_format has no schema; expected {"type": "json_schema", "json_schema": {"schema": …}}'
        )
    return inner["schema"]


def text_of(form: Schema, key: str) -> str:
    text = form.get(key)
    if not isinstance(text, str):
        raise ValueError(f"response_format has {a(text)} for its {key}; expected a string")
    if len(text) > LONGEST:
        raise ValueError(f"response_format has a {key} of {len(text)} characters; expected at most {LONGEST}")
    return encodable(text, key)


def encodable(text: str, key: str) -> str:
    try:
        text.encode()
    except UnicodeEncodeError:
        raise ValueError(f"response_format has half a surrogate pair in its {key}") from None
    return text


# What changes how a rule is drawn, or takes back what was written, would break the law of the drafts.
RULE_OPTIONS = re.compile(r"\[[^\]<>]*?\b(stop|stop_capture|max_tokens|temperature)\b[^\]<>]*\]\s*:")
QUOTED = re.compile(r'"(?:\\.|[^"\\\n])*"|(?://|#)[^\n]*|/(?:\\.|[^/\\])+/')  # as llguidance's lexer has them


def lark_grammar(text: str) -> str:
    grammar = LLMatcher.grammar_from_lark(text)
    found = RULE_OPTIONS.search(QUOTED.sub('""', text))
    if found:
        raise ValueError(f"response_format has a rule with the option {found[1]}, which cannot be held with drafts")
    result = checked(grammar)
    _, notes = validation(grammar)
    if any("can't validate" in note for note in notes):  # of tokens, without a tokenizer
        raise ValueError("response_format has a grammar that names control tokens; expected text alone")
    return result


class OverlapError(ValueError):
    """A oneOf whose members may overlap, for all that llguidance knows."""


@lru_cache(maxsize=256)
def checked(grammar: str) -> str:
    """ValueError for a grammar that llguidance does not take."""
    wrong, messages = validation(grammar)
    if not wrong:
        return grammar
    lines = [line.strip() for line in messages[0].splitlines()]
    reason = next((line.removeprefix("error: ") for line in lines if line.startswith("error: ")), lines[0])
    if lines[0] == "regex parse error:":  # of a schema, whose pattern is the next line
        reason = f"the pattern {clipped(lines[1], 60)} cannot be held: {reason}"
    unheld = re.match(r"Unimplemented keys: \[(.*)\]", reason)
    if unheld:
        reason = f"the keywords {unheld[1].replace(chr(34), '')} cannot be held"
    elif reason.startswith("oneOf constraints"):
        raise OverlapError("response_format: the members of its oneOf may overlap; expected anyOf")
    raise not_taken(reason)


def not_taken(reason: object) -> ValueError:
    return ValueError(f"response_format: {unbroken(reason)[:160]}")


# --- JSON schemas ------------------------------------------------------------------------------


def schema_grammar(schema: Any) -> str:
    if schema is True:
        schema = {}
    if not isinstance(schema, Mapping):
        raise ValueError(f"response_format has {a(schema)} for its schema; expected a dict")
    schema = check_json(dict(schema), "response_format")
    text = json.dumps(schema, ensure_ascii=False)
    if len(text) > LONGEST:
        raise ValueError(f"response_format has {len(text)} characters; expected at most {LONGEST}")
    return cached_schema_grammar(text)


@lru_cache(maxsize=256)
def cached_schema_grammar(text: str) -> str:
    try:
        return plain_schema_grammar(text, one_of=False)
    except OverlapError:
        return plain_schema_grammar(text, one_of=True)


def plain_schema_grammar(text: str, one_of: bool) -> str:
    """one_of: those are unions too, each member without what fits another."""
    unheld: set[str] = set()
    dropped: set[str] = set()
    try:
        given = linked(json.loads(encodable(text, "schema")))
        schema = held(given, Conditions(given, one_of), unheld, dropped)
        if unheld:
            names = f"keyword{'s' if len(unheld) > 1 else ''} {', '.join(sorted(unheld))}"
            raise ValueError(f"response_format: the {names} cannot be held")
        if not Ends(schema).ends(schema):
            raise ValueError("response_format: no value of finite size fits its schema")
        schema.pop("x-guidance", None)
        try:
            grammar = LLMatcher.grammar_from_json_schema(schema, overrides={"whitespace_pattern": WHITE_SPACE})
        except ValueError as error:  # a number beyond 64 bits
            raise not_taken(error) from None
        checked(grammar)
    except RecursionError:
        raise ValueError("response_format: its schema is nested too deep") from None
    if dropped:
        logger.warning(
            "response_format: strings are not held to the formats %s",
            clipped(", ".join(sorted(dropped)), LONGEST_SHOWN),
        )
    return grammar


def held(schema: Any, conditions: Conditions, unheld: set[str], dropped: set[str]) -> Any:
    """A schema as llguidance takes it: conditions are unions, formats that it does not know are gone, null is a type.

    unheld, dropped: gather the keywords and the formats that it cannot hold.
    """
    if not isinstance(schema, dict):
        return schema
    schema = conditions.narrowed(conditions.plain(schema))
    unheld |= UNHELD & schema.keys()
    schema = inner_schemas(held_bounds(schema), lambda inner: held(inner, conditions, unheld, dropped))
    if isinstance(schema.get("pattern"), str):
        schema["pattern"] = as_all_read(schema["pattern"])
    match schema.get("format"):
        case str(form) if form not in FORMATS:
            dropped.add(form[:40])
            del schema["format"]
        case str(form) if form in MOMENTS and "pattern" not in schema:
            del schema["format"]
            schema["pattern"] = f"^({PATTERNS[form]})$"
    return with_null(schema) if schema.pop("nullable", False) is True else schema


class Ends:
    """Whether some value of finite size fits a schema: not where all that it requires leads back to it."""

    def __init__(self, root: Schema):
        self.root = root
        self.targets = {"#": False} | {f"#/$defs/{name}": False for name in root.get("$defs", {})}
        while found := [
            name for name, known in self.targets.items() if not known and self.ends(pointed(self.root, name))
        ]:
            self.targets |= dict.fromkeys(found, True)

    def ends(self, schema: Any) -> bool:
        if not isinstance(schema, dict):
            return schema is not False
        if isinstance(schema.get("$ref"), str) and not self.targets.get(schema["$ref"], True):
            return False
        for key, together in (("allOf", all), ("anyOf", any), ("oneOf", any)):
            members = schema.get(key)
            if members and not together(self.ends(member) for member in members):
                return False
        if "const" in schema or "enum" in schema or "type" not in schema:
            return True
        types = schema["type"] if isinstance(schema["type"], list) else [schema["type"]]
        return any(self.type_ends(kind, schema) for kind in types)

    def type_ends(self, kind: Any, schema: Schema) -> bool:
        if kind == "object" and "required" in schema:
            properties = schema.get("properties", {})
            others = [schema.get("additionalProperties", True), *schema.get("patternProperties", {}).values()]
            other = any(map(self.ends, others))  # which of them a name is of llguidance knows
            return all(self.ends(properties.get(name, other)) for name in schema["required"])
        least = schema.get("minItems")
        if kind == "array" and isinstance(least, (int, float)) and least > 0:
            first = schema.get("prefixItems", [])[: int(least)]
            rest = [schema.get("items", True)] if least > len(first) else []
            return all(self.ends(inner) for inner in [*first, *rest] if not isinstance(inner, list))
        return True
