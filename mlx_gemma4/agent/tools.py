"""What a model may call: functions as tools, and what they give as a result that it can read."""

import asyncio
import inspect
import json
from collections.abc import Callable, Coroutine
from dataclasses import dataclass
from functools import cache
from threading import Thread
from typing import Any

from mlx_gemma4.engine.session import media_bytes
from mlx_gemma4.errors import a, one_line

Part = dict[str, Any]


@dataclass(frozen=True)
class Tool:
    """A tool that can be run. `run` takes the arguments and gives parts, text and media; what it raises is told to the
    model."""

    name: str
    description: str
    parameters: dict[str, Any]  # JSON schema
    run: Callable[[dict[str, Any]], list[Part]]
    is_own: bool = False  # of the program that made the agent: it need not be asked for

    @property
    def declaration(self) -> dict[str, Any]:
        function = {"name": self.name, "description": self.description, "parameters": self.parameters}
        return {"type": "function", "function": function}


class ToolError(RuntimeError):
    """What a tool has to say instead of a result."""


def function_tool(function: Callable[..., Any]) -> Tool:
    """A function with annotations and a docstring as a tool. ValueError if no JSON schema says what it takes."""
    from pydantic import PydanticUserError, TypeAdapter, ValidationError, validate_call

    if not (inspect.isfunction(function) or inspect.ismethod(function)):
        raise ValueError(f"tools has {a(function)}; expected functions with annotations")
    try:
        described: TypeAdapter[Any] = TypeAdapter(function)  # type: ignore[arg-type]  # its stubs know types only
        schema, checked = described.json_schema(), validate_call(function)
    except (PydanticUserError, NameError) as error:  # NameError: of an annotation
        raise ValueError(f"the tool {function.__name__!r} has no schema: {one_line(error)}") from None
    if schema.get("type") != "object":
        raise ValueError(f"the tool {function.__name__!r} takes positions; expected parameters with names")

    def run(arguments: dict[str, Any]) -> list[Part]:
        try:
            value = checked(**arguments)
        except ValidationError as error:
            wrong = [f"{'.'.join(map(str, fault['loc']))}: {fault['msg']}" for fault in error.errors()]
            raise ToolError("; ".join(wrong)) from None
        return parts_of(awaited(value) if inspect.iscoroutine(value) else value)

    return Tool(function.__name__, inspect.getdoc(function) or "", schema, run, is_own=True)


def awaited(coroutine: Coroutine[Any, Any, Any]) -> Any:
    future = asyncio.run_coroutine_threadsafe(coroutine, loop())
    try:
        return future.result()
    finally:
        future.cancel()  # if this was interrupted


@cache
def loop() -> asyncio.AbstractEventLoop:
    """Where coroutines of tools run, from the first to the last: a notebook's own loop is busy with the agent, and what
    a coroutine keeps, such as an HTTP client, belongs to the loop that it began in."""
    made = asyncio.new_event_loop()
    Thread(target=made.run_forever, daemon=True).start()
    return made


def parts_of(value: Any) -> list[Part]:
    """What a function gives: a text, a PIL image, a list of these, or anything that JSON can say."""
    from PIL import Image
    from pydantic_core import to_jsonable_python

    if isinstance(value, (list, tuple)) and any(isinstance(entry, Image.Image) for entry in value):
        return [part for entry in value for part in parts_of(entry)]
    if isinstance(value, Image.Image):
        # as bytes: what is done to the image later does not change what was said
        return [{"type": "image", "image": media_bytes(value, "image")[0]}]
    if not isinstance(value, str):
        value = json.dumps(to_jsonable_python(value, fallback=str, inf_nan_mode="null"), ensure_ascii=False)
    return [text_part(value)]


def text_part(text: str) -> Part:
    """A text for the model; of half a surrogate pair, as names of files that are not UTF-8 have, a ?."""
    return {"type": "text", "text": text.encode("utf-8", "replace").decode()}


def printable(text: str) -> str:
    """A text that shows every character that could hide or reorder others."""
    return "".join(char if char.isprintable() or char == "\n" else f"\\u{ord(char):04x}" for char in text)
