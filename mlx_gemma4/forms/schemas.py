"""What drafts of JSON Schema say in other words."""

from typing import Any

Schema = dict[str, Any]

# What evaluates properties and entries beside a schema's own.
APPLIED = {"allOf", "anyOf", "oneOf", "$ref", "if", "not", "dependentSchemas", "contains", "$dynamicRef"}

ANY_NAME: tuple[Any, ...] = (True, {}, {"type": "string"})  # propertyNames that allow all, the last as Zod writes it


def without_unevaluated(schema: Schema) -> Schema:
    """What is not evaluated is additional, where nothing else evaluates more, and nothing is said by allowing it."""
    result = dict(schema)
    for key, known in (("unevaluatedProperties", "additionalProperties"), ("unevaluatedItems", "items")):
        if key in schema and schema[key] in (True, {}):
            del result[key]
        elif key in schema and known not in schema and APPLIED.isdisjoint(schema):
            result[known] = result.pop(key)
    return result


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
