"""Tools as people's servers declare them -> the JSON Schema that the chat template can write.

The template writes of a property its description, type, nullable, properties and required, items, and the enum of a
string; all else it drops in silence, and of `parameters` without a type it never closes the brace. So references are
put in place, unions with null become nullable, unions that have no other form are said in the description, and what
is left out is logged. What the model writes is checked against the tools as they were given.
"""

import logging
from collections.abc import Iterable, Iterator, Mapping
from functools import lru_cache
from itertools import chain
from typing import Any
from urllib.parse import unquote

from mlx_gemma4.errors import clipped, listed
from mlx_gemma4.reply.opening import as_json

logger = logging.getLogger("mlx_gemma4")

Schema = dict[str, Any]

MAX_PARTS = 10_000  # of one tool, references in place: a few definitions that name each other twice have no end
MAX_DEPTH = 50  # of one tool, references in place
SAID_LENGTH = 1_000  # characters of a union in a description

DEFINITIONS = ("$defs", "definitions")
UNIONS = ("anyOf", "oneOf")
# What says nothing about the values, or nothing that the template does not write anyway.
BOOKKEEPING = {"$schema", "$id", "$comment", "$anchor", "title", "type", "strict", "cache_control", *DEFINITIONS}
REMARKS = "\0remarks"  # key for what the description has to say besides, while a schema is rewritten
SEEN = {
    "description", "nullable", "properties", "required", "items", "prefixItems", "enum", "additionalProperties",
    *BOOKKEEPING,
}  # fmt: skip
TYPE_OF = {
    str: "string", bool: "boolean", int: "integer", float: "number", dict: "object", list: "array", type(None): "null"
}  # fmt: skip
# A schema without a type is of the type that its keywords are for.
SIGNS = {
    "object": ("properties", "required", "additionalProperties", "patternProperties", "minProperties", "maxProperties"),
    "array": ("items", "prefixItems", "minItems", "maxItems", "uniqueItems"),
    "string": ("pattern", "minLength", "maxLength", "format"),
    "number": ("minimum", "maximum", "exclusiveMinimum", "exclusiveMaximum", "multipleOf"),
}


def template_tools(tools: list[Schema]) -> list[Schema]:
    """Checked tools as the template can write them; what it cannot is logged, a line a tool, once.

    ValueError, one line, for a reference that leads nowhere and for what is no schema.
    """
    written = []
    for index, tool in enumerate(tools):
        function, lost = template_function(tool["function"], f"tools[{index}]")
        written.append({"type": "function", "function": function})
        if lost:
            warn(clipped(function["name"], 80), listed(lost))
    return written


@lru_cache(1000)
def warn(name: str, lost: str) -> None:
    """Once, not with every prompt that has the tool."""
    logger.warning("the chat template cannot write all of %s, left out: %s", name, lost)


def argument_schemas(tools: Iterable[Schema]) -> dict[str, Schema]:
    """The resolved schema of each checked tool's arguments, by name."""
    functions = [template_function(tool["function"], f"tools[{index}]")[0] for index, tool in enumerate(tools)]
    return {function["name"]: function.get("parameters") or {} for function in functions}


def template_function(function: Schema, where: str) -> tuple[Schema, list[str]]:
    """The function as the template can write it, and what it cannot."""
    written = {"name": function["name"], "description": function["description"]}
    lost = [key for key in function if key not in ("name", "description", "parameters", "response", *BOOKKEEPING)]
    for key in ("parameters", "response"):
        given = function.get(key)
        if given is None or given == {}:
            continue
        if not isinstance(given, dict):
            raise ValueError(f"{where}.{key} is of type {type(given).__name__}; expected a JSON schema, a dict")
        schema = Resolver(given, f"{where}.{key}", lost).resolve(given, key)
        about = schema.pop("description", "")
        if key == "response":  # the template closes the brace of objects only
            text = about if schema["type"] == "object" else said(schema | {"description": about})
            schema = {"type": "object", "description": text}
        elif about and about not in written["description"]:  # of the arguments as such the template writes nothing
            written["description"] = "\n".join(filter(None, [written["description"], about]))
        written[key] = schema
    return written, lost


class Resolver:
    """Rewrites the schemas of one tool. `lost` gathers, by place, what the template cannot write."""

    def __init__(self, root: Schema, where: str, lost: list[str]) -> None:
        self.root = root
        self.where = where
        self.lost = lost
        self.parts = 0
        self.following: list[str] = []  # references that are being put in place

    def count(self, depth: int) -> None:
        self.parts += 1
        if depth > MAX_DEPTH or self.parts > MAX_PARTS:
            raise ValueError(
                f"{self.where} is too large or too deep with its references in place; "
                f"expected at most {MAX_PARTS} parts and {MAX_DEPTH} levels"
            )

    def resolve(self, given: Any, place: str, depth: int = 0, whole: bool = False) -> Schema:
        """A schema with a type, and nothing that the template drops in silence. whole: it writes every key of it."""
        if given is not None and not isinstance(given, (dict, bool)):
            self.lost.append(f"{place}, of type {type(given).__name__}")
        before = list(self.following)
        schema = self.merged(dict(given) if isinstance(given, dict) else {}, depth)
        schema = self.without_unions(schema, place, depth)
        schema = self.typed(schema, place, depth, whole)
        self.following = before
        return schema

    def merged(self, schema: Schema, depth: int) -> Schema:
        """References and allOf put in place; what stands beside a reference counts before what it names."""
        self.count(depth)
        while "$ref" in schema or "allOf" in schema:
            self.count(depth)
            if "allOf" in schema:
                members = schema.pop("allOf")
                for member in members if isinstance(members, list) else [members]:
                    schema = combined(schema, self.merged(dict(member), depth + 1) if isinstance(member, dict) else {})
                continue
            reference = schema.pop("$ref")
            if reference in self.following:
                name = str(reference).rsplit("/", 1)[-1][:80]
                schema = combined(schema, {"type": "object", "description": f"Again as {name} around it."})
            else:
                schema = combined(schema, self.target(reference))
                self.following.append(reference)
        return schema

    def target(self, reference: Any) -> Schema:
        """What a reference inside the schema names."""
        found = pointed(self.root, reference)
        if not isinstance(found, dict):
            name = str(reference)[:80]
            raise ValueError(f"{self.where} has the $ref {name!r}, which leads nowhere; expected '#/$defs/…'")
        return found

    def without_unions(self, schema: Schema, place: str, depth: int) -> Schema:
        """anyOf and oneOf, null apart: one schema that is left is it; several are types, or said in words."""
        for key in UNIONS:
            members = schema.pop(key, None)
            if not isinstance(members, list) or not members:
                continue
            before = list(self.following)
            rest = []
            for given in members:
                member = self.merged(dict(given) if isinstance(given, dict) else {}, depth + 1)
                if is_null(member):
                    schema["nullable"] = True
                else:
                    rest.append((member, self.following))
                self.following = list(before)
            if len(rest) == 1:
                member, self.following = rest[0]
                schema = self.without_unions(self.merged(combined(schema, member), depth + 1), place, depth + 1)
            elif rest:
                members = [self.resolve(member, place, depth + 1) for member, _ in rest]
                schema = self.said_union(schema, members, place, depth)
        return schema

    def said_union(self, schema: Schema, members: list[Schema], place: str, depth: int) -> Schema:
        kinds = list(dict.fromkeys(chain.from_iterable(types_of(member) for member in members)))
        if any(member.get("nullable") for member in members):
            schema["nullable"] = True
        if depth == 0:  # the arguments themselves: a call may have what any of them has
            for member in members if isinstance(schema.get("properties", {}), dict) else ():
                schema["properties"] = member.get("properties", {}) | schema.get("properties", {})
        schema.setdefault("type", kinds[0] if len(kinds) == 1 else kinds)
        if any(set(member) - {"type"} for member in members):
            schema.setdefault(REMARKS, []).append(self.one_of([said(member) for member in members], place))
        return schema

    def typed(self, schema: Schema, place: str, depth: int, whole: bool) -> Schema:
        remarks: list[str] = schema.pop(REMARKS, [])
        if depth == 0 and types_of(schema) == ["any"]:
            schema["type"] = "object"
        if "const" in schema:
            schema["enum"] = [schema.pop("const")]
        types = types_of(schema)
        if "null" in types and len(types) > 1:
            types.remove("null")
            schema["nullable"] = True
        result: Schema = {"type": types[0] if len(types) == 1 else types}
        values = schema.get("enum")
        if isinstance(values, list) and values:
            if None in values and len(values) > 1:
                values = [value for value in values if value is not None]
                schema["nullable"] = True
            if whole or (types == ["string"] and all(isinstance(value, str) for value in values)):
                result["enum"] = values
            else:
                remarks.append(self.one_of([as_json(value) for value in values], place))
        if schema.get("nullable"):
            result["nullable"] = True
        if types == ["object"]:
            result |= self.object_parts(schema, place, depth, remarks)
        elif types == ["array"]:
            result |= self.array_parts(schema, place, depth, remarks)
        elif types == ["any"]:
            remarks.append("Any JSON value.")
        own = schema.get("description")
        if depth == 0 and own and not self.where.endswith("response"):
            self.lost.append("the description of its parameters")
            own = ""
        if description := " ".join([*([str(own)] if own not in (None, "") else []), *remarks]):
            result["description"] = description
        more = {key: value for key, value in schema.items() if key not in SEEN}
        if whole:
            return more | result
        self.lost += [f"{key} of {place}" for key in more]
        return result

    def one_of(self, alternatives: list[str], place: str) -> str:
        text = "; ".join(dict.fromkeys(alternatives))
        if len(text) > SAID_LENGTH:
            self.lost.append(f"the end of the alternatives of {place}")
            text = text[:SAID_LENGTH] + "…"
        return f"One of: {text}." if len(alternatives) > 1 else f"Always {text}."

    def object_parts(self, schema: Schema, place: str, depth: int, remarks: list[str]) -> Schema:
        given = schema.get("properties")
        if given is not None and not isinstance(given, dict):
            raise ValueError(f"{self.where} has properties of type {type(given).__name__}; expected a dict")
        listed = schema.get("required")
        required = [name for name in listed if isinstance(name, str)] if isinstance(listed, list) else []
        properties: Schema = {}
        for name, inner in (given or {}).items():
            if inner is False:
                self.lost.append(f"{place}.{name}, which takes nothing")
                continue
            if isinstance(inner, dict) and isinstance(inner.get("required"), bool):  # as drafts before 4 had it
                required += [name] if inner["required"] else []
                inner = {key: value for key, value in inner.items() if key != "required"}
            properties[name] = self.resolve(inner, f"{place}.{name}"[-80:], depth + 1)
        more = schema.get("additionalProperties")
        if isinstance(more, dict) and more:
            keys = "More keys" if properties else "Keys"
            remarks.append(f"{keys} of any name, each value: {said(self.resolve(more, place, depth + 1))}.")
        result: Schema = {"properties": properties}
        if required:
            result["required"] = list(dict.fromkeys(required))
        return result

    def array_parts(self, schema: Schema, place: str, depth: int, remarks: list[str]) -> Schema:
        items, first = schema.get("items"), schema.get("prefixItems")
        if isinstance(items, list):  # as drafts before 2020 had it
            items, first = None, items
        if isinstance(first, list) and first:
            entries = [said(self.resolve(entry, place, depth + 1)) for entry in first]
            remarks.append(f"Entries in this order: {'; '.join(entries)}.")
        if not isinstance(items, dict) or not items:
            return {}
        return {"items": self.resolve(items, f"{place}[]"[-80:], depth + 1, whole=True)}


def pointed(root: Any, reference: Any) -> Any:
    """What a JSON pointer (RFC 6901) names in a schema; None for nothing."""
    found = root if isinstance(reference, str) and reference.startswith("#") else None
    for step in unquote(str(reference)[1:]).strip("/").split("/"):
        step = step.replace("~1", "/").replace("~0", "~")
        if step and isinstance(found, list) and step.isdecimal() and int(step) < len(found):
            found = found[int(step)]
        elif step:
            found = found.get(step) if isinstance(found, dict) else None
    return found


def types_of(schema: Mapping[str, Any]) -> list[str]:
    """The types that a schema names, or else those that it implies; "any" if it implies none."""
    named = schema.get("type")
    if isinstance(named, str) and named:
        return [canonical(named)]
    if isinstance(named, list) and named:
        return list(dict.fromkeys(canonical(str(name)) for name in named))
    values = schema.get("enum")
    if isinstance(values, list) and values:
        kinds = list(dict.fromkeys(TYPE_OF[type(value)] for value in values))
        return ["number"] if set(kinds) == {"integer", "number"} else kinds
    return next(([kind] for kind, signs in SIGNS.items() if any(sign in schema for sign in signs)), ["any"])


def canonical(name: str) -> str:
    """A type's name as JSON Schema writes it, if it is one of its own: the template makes it upper case."""
    return name.lower() if name.lower() in TYPE_OF.values() else name


def is_null(schema: Mapping[str, Any]) -> bool:
    return types_of(schema) == ["null"] or ("const" in schema and schema["const"] is None)


def combined(schema: Schema, other: Mapping[str, Any]) -> Schema:
    """Both at once: the first counts where they differ, but descriptions, properties and what is required are those of
    both."""
    result = {**other, **schema}
    texts = [part.get("description") for part in (schema, other)]
    if all(isinstance(text, str) for text in texts):
        result["description"] = " ".join(filter(None, dict.fromkeys(texts)))
    if isinstance(schema.get("properties"), dict) and isinstance(other.get("properties"), dict):
        result["properties"] = {**other["properties"], **schema["properties"]}
    if isinstance(schema.get("required"), list) and isinstance(other.get("required"), list):
        result["required"] = [*other["required"], *schema["required"]]
    return result


# --- in words ----------------------------------------------------------------------------------


def said(schema: Schema) -> str:
    """A resolved schema in words, for a description."""
    types = types_of(schema)
    text = " or ".join(types)
    if "enum" in schema:
        text = " or ".join(as_json(value) for value in schema["enum"])
    elif types == ["array"] and "items" in schema:
        text = f"array of {said(schema['items'])}"
    elif types == ["object"] and (schema.get("properties") or schema.get("required")):
        text = f"object with {', '.join(said_properties(schema))}"
    if schema.get("nullable"):
        text += " or null"
    description = str(schema.get("description", "")).rstrip(".")
    return f"{text} ({description})" if description else text


def said_properties(schema: Schema) -> Iterator[str]:
    required = schema.get("required", [])
    for name, inner in schema["properties"].items():
        yield f"{name}{'' if name in required else ' (optional)'}: {said(inner)}"
    yield from (name for name in required if name not in schema["properties"])
