"""Tools as servers declare them: declarations that close what they open and name every property, or one line."""

import json
import re
from typing import Any

from hypothesis import strategies as st

from .judge import check as must
from .judge import check_refusal
from .mutate import weighted
from .surface import demo_processor
from .texts import names, texts, values

SHARE = 25
QUOTED = re.compile(r'<\|"\|>.*?<\|"\|>', re.DOTALL)

prepare = demo_processor

TYPES = ("string", "number", "integer", "boolean", "array", "object", "null", "STRING", "date")
plain_names = st.sampled_from(
    ["city", "units", "type", "description", "properties", "required", "items", "nullable", "x-y", "ü", "n"]
)


def schemas(depth: int) -> st.SearchStrategy[Any]:
    inner = schemas(depth - 1) if depth else st.fixed_dictionaries({"type": st.sampled_from(TYPES)})
    more: dict[str, st.SearchStrategy[Any]] = {
        "description": texts,
        "enum": st.lists(st.one_of(texts, st.integers(0, 9), st.none(), st.floats(0, 1)), max_size=3),
        "const": values(0),
        "default": values(1),
        "nullable": st.booleans(),
        "items": inner,
        "properties": st.dictionaries(plain_names, inner, max_size=3),
        "required": st.lists(plain_names, max_size=2),
        "anyOf": st.lists(inner, max_size=3),
        "oneOf": st.lists(inner, max_size=2),
        "allOf": st.lists(inner, max_size=2),
        "$ref": st.sampled_from(
            ["#/$defs/A", "#/$defs/B", "#", "#/definitions/A", "https://example.org/a", "#/$defs/none"]
        ),
        "$defs": st.dictionaries(st.sampled_from(["A", "B"]), inner, max_size=2),
        "additionalProperties": st.one_of(st.booleans(), inner),
        "minimum": st.integers(0, 9),
        "pattern": texts,
    }
    kinds = st.one_of(st.sampled_from(TYPES), st.lists(st.sampled_from(TYPES), max_size=3))
    return st.fixed_dictionaries({}, optional={"type": kinds} | more)


def functions(parameters: st.SearchStrategy[Any], name: st.SearchStrategy[str]) -> st.SearchStrategy[Any]:
    return st.fixed_dictionaries(
        {"name": name}, optional={"description": texts, "parameters": parameters, "strict": st.booleans()}
    )


def strategy() -> st.SearchStrategy[Any]:
    tidy = functions(schemas(2), st.sampled_from(["f", "get_weather", "a.b", "x-y"]))
    wild = st.one_of(functions(st.one_of(schemas(1), values(2)), names), values(2))
    wrapped = tidy.map(lambda function: {"type": "function", "function": function})
    tool = weighted((4, tidy), (2, wrapped), (1, wild))
    return st.lists(tool, min_size=1, max_size=2)


def check(tools: Any) -> str | None:
    processor = demo_processor()
    given = json.dumps(tools)
    try:
        prompt = processor([{"role": "user", "content": "Hello"}], tools=tools)
    except Exception as error:  # any: it is judged
        check_refusal(error, (ValueError,))
        return "refused"
    must(json.dumps(tools) == given, "the caller's tools were changed")
    text = processor.tokenizer.decode(prompt.token_ids, skip_special_tokens=False)
    must(text.count("<|tool>") >= len(tools), "a tool is missing")
    if "<|" not in given and "|>" not in given:  # else what was typed reads like quotes here
        declared = text.partition("<|tool>")[2].rpartition("<tool|>")[0]
        bare = QUOTED.sub("", declared)
        if not any(mark in key for key in keys(tools) for mark in "{}[]"):
            must(bare.count("{") == bare.count("}"), "a declaration does not close its braces", declared)
            must(bare.count("[") == bare.count("]"), "a declaration does not close its brackets", declared)
    return None


def keys(value: Any) -> list[str]:
    """Keys and names: what stands in a declaration without quotes."""
    if isinstance(value, dict):
        own = [*value, *(entry for entry in value.values() if isinstance(entry, str))]
        return own + [key for entry in value.values() for key in keys(entry)]
    return [key for entry in value for key in keys(entry)] if isinstance(value, list) else []
