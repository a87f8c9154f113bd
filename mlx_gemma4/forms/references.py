"""A schema's references by ids, anchors and pointers -> pointers to definitions of its own root."""

import re
from collections import Counter
from typing import Any
from urllib.parse import unquote, urljoin

from mlx_gemma4.errors import shown
from mlx_gemma4.forms.schemas import Schema, check_shapes, inner_schemas

NAMES = {"$id", "$anchor", "$dynamicAnchor", "$recursiveAnchor", "$defs", "definitions"}
REFERENCES = ("$ref", "$dynamicRef", "$recursiveRef")


def linked(root: Schema) -> Schema:
    """The schema without ids and anchors: what it refers to is itself (`#`) or one of its `$defs`, all of which are
    referred to. A reference that hangs on where a reader comes from stays. ValueError for one that leads nowhere.
    """
    return Links(root).linked()


class Links:
    def __init__(self, root: Schema):
        self.root = root
        draft = re.search(r"draft-0(\d)", str(root.get("$schema")))
        self.id = "id" if draft and draft[1] == "4" else "$id"
        self.alone = draft is not None  # beside a reference, before 2019, an id says nothing
        self.named: dict[tuple[str, str], tuple[Any, str]] = {}  # URI and fragment -> schema and its base URI
        self.dynamic: Counter[str] = Counter()
        self.read(root, "")
        self.named.setdefault(("", ""), (root, ""))
        self.places: dict[int, int] = {}  # of a schema that is referred to, by identity
        self.targets: list[tuple[Any, str]] = []

    def linked(self) -> Schema:
        schema: Schema = self.rewritten(self.root, "")
        definitions: Schema = {}
        for target, base in self.targets:  # which grow
            definitions[str(len(definitions))] = self.rewritten(target, base)
        return schema | {"$defs": definitions} if definitions else schema

    def base(self, schema: Schema, base: str) -> str:
        """The URI that a schema's references are relative to."""
        given = schema.get(self.id)
        if not isinstance(given, str) or given.startswith("#") or (self.alone and "$ref" in schema):
            return base
        return absolute(base, given)[0]

    def read(self, schema: Any, base: str) -> Any:
        """Gather what has a name."""
        if isinstance(schema, dict):
            own = self.base(schema, base)
            if own != base:
                self.named.setdefault((own, ""), (schema, base))
            for key in (self.id, "$anchor", "$dynamicAnchor"):
                name = schema.get(key)
                if isinstance(name, str) and (key != self.id or name.startswith("#")):
                    self.named.setdefault((own, name.removeprefix("#")), (schema, base))
            self.dynamic.update(name for name in [schema.get("$dynamicAnchor")] if isinstance(name, str))
            self.dynamic["$recursiveAnchor"] += schema.get("$recursiveAnchor") is True
            inner_schemas(schema, lambda inner: self.read(inner, own))
        return schema

    def rewritten(self, schema: Any, base: str) -> Any:
        if not isinstance(schema, dict):
            return schema
        check_shapes(schema)
        base = self.base(schema, base)
        kept = {key: value for key, value in schema.items() if key not in NAMES and key != self.id}
        result = inner_schemas(kept, lambda inner: self.rewritten(inner, base))
        for key in REFERENCES:
            if isinstance(schema.get(key), str):
                target, around = self.target(schema[key], base)
                if key == "$ref" or ("$ref" not in schema and self.is_plain(key, schema[key], target)):
                    del result[key]
                    result["$ref"] = self.pointer(target, around)
        return result

    def target(self, reference: str, base: str) -> tuple[Any, str]:
        """What a reference names, and the base URI around it."""
        uri, fragment = absolute(base, reference)
        found, around = self.named.get((uri, "" if fragment.startswith("/") else fragment), (None, ""))
        for step in fragment.split("/")[1:]:
            step = step.replace("~1", "/").replace("~0", "~")
            if isinstance(found, dict):
                around = self.base(found, around)
                found = found.get(step)
            else:
                found = found[int(step)] if isinstance(found, list) and step in map(str, range(len(found))) else None
        if not isinstance(found, (dict, bool)):
            raise ValueError(
                f"response_format has the reference {shown(reference)}; expected one to a part of its schema"
            )
        return found, around

    def is_plain(self, key: str, reference: str, target: Any) -> bool:
        """Whether a dynamic reference leads to the same from wherever a reader comes."""
        name = "$recursiveAnchor" if key == "$recursiveRef" else reference.partition("#")[2]
        is_dynamic = isinstance(target, dict) and target.get("$dynamicAnchor") == name
        return self.dynamic[name] < 2 or not (is_dynamic or key == "$recursiveRef")

    def pointer(self, target: Any, base: str) -> str:
        if target is self.root:
            return "#"
        place = self.places.setdefault(id(target), len(self.targets))
        if place == len(self.targets):
            self.targets.append((target, base))
        return f"#/$defs/{place}"


def absolute(base: str, reference: str) -> tuple[str, str]:
    """A URI, and the fragment behind it."""
    uri, _, fragment = reference.partition("#")
    try:
        return urljoin(base, uri) if uri else base, unquote(fragment)
    except ValueError:
        raise ValueError(f"response_format has the reference {shown(reference)}; expected a URI") from None
