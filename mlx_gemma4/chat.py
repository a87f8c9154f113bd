"""Checked messages -> the text that a checkpoint's chat template makes of them.

What a user types stays text. Before rendering, `shield` puts a mark, a character that occurs nowhere in the request,
behind every character with which a control token can begin. So whatever stands in a message or a tool, alone or across
a seam that the template makes, no control token in the rendered text comes from there: those are the template's own.
The mark is taken out again when the text between them is encoded (`processor.py`).
"""

import json
import re
from collections.abc import Iterator
from datetime import datetime
from itertools import chain
from typing import Any, NoReturn

from jinja2 import Template, TemplateError
from jinja2.ext import loopcontrols
from jinja2.sandbox import ImmutableSandboxedEnvironment

from mlx_gemma4.errors import unbroken
from mlx_gemma4.messages import Message

PRIVATE_USE = (range(0xE000, 0xF900), range(0xF0000, 0xFFFFE), range(0x100000, 0x10FFFE))  # the Unicode standard, 23.5

# What a template, which is somebody's code, can raise in the sandbox.
TEMPLATE_FAILURES = (
    TemplateError,
    TypeError,
    ValueError,
    LookupError,
    AttributeError,
    ArithmeticError,
    RecursionError,
)


def compile_template(source: str) -> Template:
    """A chat template as transformers compiles it; jinja2.TemplateSyntaxError if it is none."""
    environment = ImmutableSandboxedEnvironment(trim_blocks=True, lstrip_blocks=True, extensions=[loopcontrols])
    environment.filters["tojson"] = to_json
    environment.globals["raise_exception"] = raise_exception
    environment.globals["strftime_now"] = strftime_now
    return environment.from_string(source)


def to_json(
    value: Any,
    ensure_ascii: bool = False,
    indent: int | None = None,
    separators: tuple[str, str] | None = None,
    sort_keys: bool = False,
) -> str:
    """jinja2's own filter escapes <, > and & for HTML."""
    return json.dumps(value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys)


def raise_exception(message: str) -> NoReturn:
    raise TemplateError(message)


def strftime_now(form: str) -> str:
    return datetime.now().strftime(form)


def render(
    template: Template,
    messages: list[Message],
    tools: list[dict[str, Any]],
    thinking: bool,
    bos_token: str,
    add_generation_prompt: bool = True,
) -> str:
    """The text that the template makes of checked messages and tools; ValueError in one line if it fails."""
    try:
        return template.render(
            messages=messages,
            tools=tools or None,
            enable_thinking=thinking,
            bos_token=bos_token,
            add_generation_prompt=add_generation_prompt,
        )
    except TEMPLATE_FAILURES as error:
        raise ValueError(
            f"the chat template fails on this request: {unbroken(error) or type(error).__name__}"
        ) from error


# --- shielding ---------------------------------------------------------------------------------


def unused_character(value: Any) -> str:
    """A private-use character that is in no string of a JSON-like value.

    Raises ValueError if a string holds half a surrogate pair, which no tokenizer can encode.
    """
    text = "".join(strings(value))
    try:
        text.encode()
    except UnicodeEncodeError as error:
        half = text[error.start]
        raise ValueError(f"a text holds {half!r}, half of a surrogate pair; expected valid Unicode") from None
    used = set(text)
    free = next((chr(code) for code in chain(*PRIVATE_USE) if chr(code) not in used), None)
    if free is None:
        raise ValueError("the texts hold every private-use character of Unicode; expected one to be free")
    return free


def strings(value: Any) -> Iterator[str]:
    """Every string in a JSON-like value, keys included."""
    if isinstance(value, str):
        yield value
    elif isinstance(value, dict):
        yield from value
        for entry in value.values():
            yield from strings(entry)
    elif isinstance(value, list):
        for entry in value:
            yield from strings(entry)


def shield(value: Any, starts: re.Pattern[str], mark: str) -> Any:
    """A copy of a JSON-like value with the mark behind every match of `starts` in every string, keys included.

    `starts` matches each character that a control token begins with. The mark is not put around whole strings: the
    template trims them, and would find no space at their ends.
    """
    if isinstance(value, str):
        return starts.sub(lambda start: start[0] + mark, value)
    if isinstance(value, dict):
        return {shield(key, starts, mark): shield(entry, starts, mark) for key, entry in value.items()}
    if isinstance(value, list):
        return [shield(entry, starts, mark) for entry in value]
    return value
