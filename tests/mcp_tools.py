"""Thirty tools as MCP servers publish them: optional arguments, unions with null, enums, references, maps, bounds."""

from typing import Any

Schema = dict[str, Any]


def tool(name: str, properties: Schema, required: list[str] | None = None, **more: Any) -> Schema:
    schema: Schema = {"type": "object", "properties": properties} | more
    if required is not None:
        schema["required"] = required
    return {"type": "function", "function": {"name": name, "description": f"Does {name}.", "parameters": schema}}


def listed(items: Schema, **more: Any) -> Schema:
    return {"type": "array", "items": items} | more


def made(properties: Schema, required: list[str]) -> Schema:
    return {"type": "object", "properties": properties, "required": required}


TEXT, WHOLE, NUMBER, FLAG = {"type": "string"}, {"type": "integer"}, {"type": "number"}, {"type": "boolean"}
STRICT = {"additionalProperties": False, "$schema": "http://json-schema.org/draft-07/schema#"}
OPTIONAL_TEXT = {"anyOf": [TEXT, {"type": "null"}], "default": None, "title": "Optional"}
NODE = made({"name": TEXT, "children": listed({"$ref": "#/$defs/Node"})}, ["name"])
EDIT = made({"oldText": TEXT, "newText": TEXT}, ["oldText", "newText"]) | {"additionalProperties": False}
ENTITY = made({"name": TEXT, "entityType": TEXT, "observations": listed(TEXT)}, ["name", "entityType", "observations"])
POINT = made({"lat": NUMBER | {"minimum": -90, "maximum": 90}, "lng": NUMBER | {"minimum": -180}}, ["lat", "lng"])
CIRCLE = made({"kind": {"const": "circle"}, "r": NUMBER}, ["kind", "r"])
BOX = made({"kind": {"const": "box"}, "w": WHOLE, "h": WHOLE}, ["kind", "w"])
ODD_NAMES = ["ü", "naïve", "日本", 'a"b', "c\\d", "<x>", ""]
LENGTH = WHOLE | {"exclusiveMaximum": 1000000, "exclusiveMinimum": 0, "default": 5000}
PATCH = {"allOf": [made({"name": TEXT | {"nullable": True}}, ["name"]), {"properties": {"n": {"multipleOf": 5}}}]}
PARAMETER = {"type": ["string", "number", "boolean", "null"]}


def openapi(schema: Any) -> Any:
    """With null where it is nullable, which JSON Schema does not know."""
    if isinstance(schema, list):
        return [openapi(entry) for entry in schema]
    if not isinstance(schema, dict):
        return schema
    inner = {key: openapi(value) for key, value in schema.items() if key != "nullable"}
    return {"anyOf": [inner, {"type": "null"}]} if schema.get("nullable") is True else inner


TOOLS = [
    tool("read_file", {"path": TEXT, "head": NUMBER, "tail": NUMBER}, ["path"], **STRICT),
    tool("read_multiple_files", {"paths": listed(TEXT, minItems=1)}, ["paths"], **STRICT),
    tool("write_file", {"path": TEXT, "content": TEXT}, ["path", "content"], **STRICT),
    tool("edit_file", {"path": TEXT, "edits": listed(EDIT), "dryRun": FLAG}, ["path", "edits"], **STRICT),
    tool("list_allowed_directories", {}, []),
    tool("search_files", {"path": TEXT, "pattern": TEXT, "excludePatterns": listed(TEXT)}, ["path"]),
    tool("git_log", {"repo_path": TEXT, "max_count": WHOLE | {"default": 10, "minimum": 1}}, ["repo_path"]),
    tool("git_branch", {"type": {"enum": ["local", "remote", "all"]}, "contains": OPTIONAL_TEXT}, ["type"]),
    tool("create_issue", {
        "owner": TEXT, "title": TEXT | {"minLength": 1, "maxLength": 256}, "labels": listed(TEXT, maxItems=5),
        "milestone": {"type": ["integer", "null"], "minimum": 1}, "state": TEXT | {"enum": ["open", "closed"]},
    }, ["owner", "title"]),
    tool("search_code", {"q": TEXT, "order": {"enum": ["asc", "desc"]}, "page": {"minimum": 1, "maximum": 9}}, ["q"]),
    tool("fetch", {"url": TEXT | {"format": "uri", "minLength": 1}, "max_length": LENGTH, "raw": FLAG}, ["url"]),
    tool("create_entities", {"entities": listed(ENTITY)}, ["entities"]),
    tool("get_current_time", {"timezone": TEXT}, ["timezone"]),
    tool("convert_time", {"time": TEXT | {"pattern": "^[0-2][0-9]:[0-5][0-9]$"}, "zone": TEXT}, ["time", "zone"]),
    tool("think", {"thought": TEXT, "more": FLAG, "number": WHOLE | {"minimum": 1}}, ["thought", "more", "number"]),
    tool("query", {"sql": TEXT, "params": listed(PARAMETER)}, ["sql"]),
    tool("post_message", {"channel": TEXT | {"pattern": "^[CGD][A-Z0-9]{8,10}$"}, "text": TEXT}, ["channel", "text"]),
    tool("screenshot", {"name": TEXT, "selector": TEXT, "width": NUMBER, "encoded": FLAG}, ["name"]),
    tool("directions", {"origin": TEXT, "mode": TEXT | {"enum": ["driving", "walking", "transit"]}}, ["origin"]),
    tool("distance", {"point": POINT}, ["point"]),
    tool("set_env", {"variables": {"type": "object", "additionalProperties": TEXT}}, ["variables"]),
    tool("add_tree", {"root": {"$ref": "#/$defs/Node"}}, ["root"], **{"$defs": {"Node": NODE}}),
    tool("create_event", {
        "start": TEXT | {"format": "date-time"}, "day": TEXT | {"format": "date"},
        "guests": listed(TEXT | {"format": "email"}),
    }, ["start"]),
    tool("draw", {"shape": {"oneOf": [CIRCLE, BOX]}}, ["shape"]),
    tool("tag", {"tags": listed({"enum": ODD_NAMES}, minItems=1)}, ["tags"]),
    tool("color", {"rgb": {"type": "array", "prefixItems": [WHOLE] * 3, "items": False, "minItems": 3}}, ["rgb"]),
    tool("update", {"id": TEXT | {"format": "uuid"}, "patch": PATCH}, ["id", "patch"]),
    tool("größe-setzen", {"Größe": WHOLE, "b key": TEXT, "a.b/c": FLAG, "Zeit ": TEXT}, ["Größe", "Zeit "]),
    tool("log", {"level": TEXT | {"enum": ["debug", "info", "error"]}, "data": {}}, ["level", "data"]),
    tool("version", {"of": {"enum": [1, 2.5, True, None, "latest", {"b": [1, "x"], "A": None}]}}, ["of"]),
]  # fmt: skip
