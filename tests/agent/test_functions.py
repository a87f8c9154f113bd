"""Functions as tools: the schema that the model reads, arguments checked, results that it can read."""

import asyncio
import io
import json
import os
import signal
import threading
from dataclasses import dataclass
from datetime import date
from pathlib import Path
from typing import Annotated, Any, Literal, Optional

import pytest

pydantic = pytest.importorskip("pydantic", reason="comes with the extra agent")

from PIL import Image  # noqa: E402

from mlx_gemma4.agent.tools import Tool, ToolError, function_tool, printable  # noqa: E402
from mlx_gemma4.prompt.messages import check_tools  # noqa: E402
from mlx_gemma4.prompt.tools import template_tools  # noqa: E402


@dataclass
class Point:
    x: int
    y: int = 0


def plan(
    city: str,
    day: date,
    unit: Literal["c", "f"] = "c",
    people: Optional[int] = None,  # noqa: UP045  # as many write it
    tags: list[str] = [],  # noqa: B006
    at: Point | None = None,
    hours: Annotated[float, pydantic.Field(description="How long.", gt=0)] = 1,
) -> dict[str, Any]:
    """Plan a trip.

    It is not booked.
    """
    return {"city": city, "day": day, "unit": unit, "people": people, "tags": tags, "at": at, "hours": hours}


def told(tool: Tool, **arguments: Any) -> Any:
    (part,) = tool.run(arguments)
    return json.loads(part["text"])


def test_annotations_and_docstring_become_a_schema_that_the_template_can_write() -> None:
    tool = function_tool(plan)
    properties, required = tool.parameters["properties"], tool.parameters["required"]
    assert (tool.name, tool.description) == ("plan", "Plan a trip.\n\nIt is not booked.")
    assert required == ["city", "day"] and properties["unit"]["enum"] == ["c", "f"]
    assert properties["tags"]["items"] == {"type": "string"} and properties["hours"]["description"] == "How long."
    (written,) = template_tools(check_tools([tool.declaration]))
    shown = written["function"]["parameters"]["properties"]
    assert set(shown) == set(properties) and shown["at"]["properties"]["x"]["type"] == "integer"
    assert shown["people"]["nullable"]


def test_arguments_reach_the_function_as_its_types() -> None:
    given = told(function_tool(plan), city="Paris", day="2026-01-02", at={"x": 3}, people=2)
    assert given["at"] == {"x": 3, "y": 0} and given["day"] == "2026-01-02" and given["hours"] == 1


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        ({"day": "2026-01-02"}, "city: Missing"),
        ({"city": "Paris", "day": "soon"}, "day: Input should be"),
        ({"city": "Paris", "day": "2026-01-02", "unit": "k"}, "unit: Input should be 'c' or 'f'"),
        ({"city": "Paris", "day": "2026-01-02", "colour": "red"}, "colour: Unexpected"),
        ({"city": "Paris", "day": "2026-01-02", "at": {}}, "at.x: Field required"),
    ],
)
def test_wrong_arguments_are_told(arguments: dict[str, Any], said: str) -> None:
    with pytest.raises(ToolError, match=said):
        function_tool(plan).run(arguments)


def test_methods_and_coroutines_are_functions_too() -> None:
    class Shop:
        def price(self, item: str) -> int:
            """Get a price."""
            return len(item)

        async def order(self, item: str) -> str:
            return f"one {item}"

    assert told(function_tool(Shop().price), item="lamp") == 4
    assert function_tool(Shop().order).run({"item": "lamp"}) == [{"type": "text", "text": "one lamp"}]


def test_coroutines_run_in_one_loop_whatever_runs_around_them() -> None:
    loops = set()

    async def order(item: str) -> str:
        loops.add(asyncio.get_running_loop())
        return f"one {item}"

    tool = function_tool(order)

    async def cell() -> list[Any]:  # as in a notebook
        return tool.run({"item": "lamp"})

    assert asyncio.run(cell()) == tool.run({"item": "lamp"}) == [{"type": "text", "text": "one lamp"}]
    assert len(loops) == 1


def test_a_coroutine_that_is_interrupted_is_cancelled() -> None:
    ended = threading.Event()

    async def wait() -> None:
        try:
            await asyncio.sleep(30)
        finally:
            ended.set()

    threading.Timer(0.5, os.kill, (os.getpid(), signal.SIGINT)).start()
    with pytest.raises(KeyboardInterrupt):
        function_tool(wait).run({})
    assert ended.wait(10)


def positions(*values: int) -> int:
    return sum(values)


def unknown(value: "Nowhere") -> int:  # type: ignore[name-defined]  # noqa: F821
    return 0


class Opaque:
    pass


def opaque(value: Opaque) -> int:
    return 0


@pytest.mark.parametrize("wrong", [print, 3, "plan", Opaque(), Opaque, positions, unknown, opaque, {"name": "x"}])
def test_what_has_no_schema_is_refused_in_one_line(wrong: Any) -> None:
    with pytest.raises(ValueError) as caught:
        function_tool(wrong)
    assert "\n" not in str(caught.value) and len(str(caught.value)) < 400


def test_results_are_texts_images_and_json() -> None:
    image = Image.new("RGB", (4, 4), "red")

    def parts(value: Any) -> list[dict[str, Any]]:
        def function() -> Any:
            return value

        return function_tool(function).run({})

    assert parts("as it is") == [{"type": "text", "text": "as it is"}]
    assert [part["text"] for part in parts(None)] == ["null"]
    assert json.loads(parts({"at": Point(1), "in": Path("x"), "é": {1}})[0]["text"]) == {
        "at": {"x": 1, "y": 0},
        "in": "x",
        "é": [1],
    }
    assert [part["type"] for part in parts(["left", image, "right"])] == ["text", "image", "text"]
    assert parts(["left", "right"]) == [{"type": "text", "text": '["left", "right"]'}]


@pytest.mark.parametrize("mode", ["CMYK", "F", "I", "LAB", "YCbCr"])
def test_images_of_every_mode_are_results(mode: str) -> None:
    def look() -> Image.Image:
        return Image.new(mode, (40, 40))

    (part,) = function_tool(look).run({})
    with Image.open(io.BytesIO(part["image"])) as image:
        assert image.size == (40, 40)


def test_names_of_files_that_are_not_utf_8_can_be_told() -> None:
    def names() -> list[str]:
        return [os.fsdecode(b"caf\xe9.txt")]

    assert told(function_tool(names)) == ["caf?.txt"]


def test_nothing_can_hide_in_what_is_shown() -> None:
    assert printable('{"é": "a\u202eb\x1b[2J\u200b"}\n') == '{"é": "a\\u202eb\\u001b[2J\\u200b"}\n'
