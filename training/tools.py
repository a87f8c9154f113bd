"""Tools: a call for one of the declared, and an answer made of what it gave."""

import json
import random
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from training.items import Item, Question
from training.texts import WORDS
from training.world import DAYS, Split, Wordings, choose, nonsense, worded, wordings_of

NAMES = Split(
    ("Paris", "London", "Berlin", "Rome", "Madrid", "Tokyo", "Delhi", "Cairo", "Lima", "Oslo", "Boston", "Chicago",
     "Vienna",      "Prague", "Dublin", "Athens", "Sydney", "Toronto", "Lagos", "Nairobi"),
    ("Lisbon", "Warsaw", "Seattle", "Denver", "Geneva", "Kyoto", "Quito", "Tunis", "Bergen", "Porto"),
)  # fmt: skip
PEOPLE = Split(
    ("Anna", "Ben", "Clara", "David", "Emma", "Felix", "Grace", "Henry", "Ida", "Jack", "Kate", "Leo", "Mia",
     "Noah", "Olga"),
    ("Paula", "Quinn", "Rosa", "Simon", "Tina", "Viktor", "Wanda"),
)  # fmt: skip
ROOMS = Split(("kitchen", "bedroom", "bathroom", "hall", "garage", "office"), ("attic", "cellar", "study"))
QUESTIONS = 4  # for the same tools
SKIES = ("sunny", "cloudy", "rainy", "windy", "foggy", "snowy")


@dataclass(frozen=True)
class Tool:
    """A function, how it is asked for, and what is said of what it gave. {…}: an argument, or a value it gave."""

    name: str
    descriptions: tuple[str, ...]
    arguments: dict[str, str]  # name: what is drawn for it
    wordings: Wordings
    gives: dict[str, str]
    answer: str


TOOLS = tuple(
    Tool(**entry | {"descriptions": tuple(entry["descriptions"]), "wordings": wordings_of(entry["wordings"])})
    for entry in json.loads(Path(__file__).with_name("tools.json").read_text(encoding="utf-8"))
)


def value(rng: random.Random, kind: str, held_out: bool) -> Any:
    if kind in ("city", "person", "room"):
        names = {"city": NAMES, "person": PEOPLE, "room": ROOMS}[kind]
        if not held_out and rng.random() < 0.35:
            return nonsense(rng).capitalize() if kind != "room" else nonsense(rng)
        return choose(rng, names.of(held_out))
    if kind == "minutes":
        return rng.randint(2, 99)
    if kind == "degrees":
        return rng.randint(1, 99)
    if kind == "time":
        return f"{rng.randint(0, 23):02d}:{rng.randint(0, 59):02d}"
    if kind == "day":
        return choose(rng, DAYS)
    if kind == "sky":
        return choose(rng, SKIES)
    if kind == "ok":
        return "ok"
    n = 1 if kind == "word" else rng.randint(1, 3)
    return " ".join(choose(rng, WORDS) if rng.random() < 0.7 else nonsense(rng) for _ in range(n))


def declaration(rng: random.Random, tool: Tool) -> dict[str, Any]:
    kinds = {"minutes": "integer"}
    properties: dict[str, Any] = {}
    for name, kind in tool.arguments.items():
        properties[name] = {"type": kinds.get(kind, "string")}
        if rng.random() < 0.5:
            properties[name]["description"] = f"The {name}."
    function = {
        "name": tool.name,
        "description": choose(rng, tool.descriptions),
        "parameters": {"type": "object", "properties": properties, "required": list(tool.arguments)},
    }
    return {"type": "function", "function": function}


def tool_item(rng: random.Random, held_out: bool) -> Item:
    """One to three tools and questions for them; of some, what the tool gave is there too, and is to be told."""
    tools = rng.sample(TOOLS, rng.choice((1, 1, 2, 3)))
    declared = tuple(declaration(rng, tool) for tool in tools)
    return Item("tool", tuple(tool_question(rng, choose(rng, tools), declared, held_out) for _ in range(QUESTIONS)))


NEW_TOOL = Tool(
    "book_table",
    ("Book a table.", "Book a table in a city.", "A table for some people."),
    {"guests": "minutes", "city": "city", "day": "day"},
    Wordings(
        (
            "Book a table for {guests} in {city} on {day}.", "I need a table for {guests} on {day} in {city}.",
            "A table in {city} for {guests} on {day}.", "Get a table for {guests} people in {city} on {day}.",
            "Find a table on {day} in {city} for {guests}.", "We are {guests} and want a table in {city} on {day}.",
        ),
        (
            "Please book a table in {city} for {guests} on {day}.",
            "Can you get a table on {day} for {guests} in {city}?", "Table for {guests} in {city}, {day}.",
        ),
        (),
        (),
    ),
    {"status": "ok"},
    "A table for {guests} in {city} is booked on {day}.",
)  # fmt: skip


def new_tool_item(rng: random.Random, held_out: bool) -> Item:
    """Of a lesson: a question for a tool that the demo has not seen, often beside some that it has."""
    tools = [NEW_TOOL, *rng.sample(TOOLS, rng.choice((0, 0, 1, 2)))]
    rng.shuffle(tools)
    declared = tuple(declaration(rng, tool) for tool in tools)
    return Item("tool", tuple(tool_question(rng, NEW_TOOL, declared, held_out) for _ in range(QUESTIONS)))


def tool_question(rng: random.Random, tool: Tool, declared: tuple[dict[str, Any], ...], held_out: bool) -> Question:
    arguments = {name: value(rng, kind, held_out) for name, kind in tool.arguments.items()}
    text = worded(rng, tool.wordings, held_out, False, arguments)
    call = {"name": tool.name, "arguments": arguments}
    if rng.random() < 0.6:
        return Question("call", text, "", "I need a tool.", declared, call)
    given = {name: value(rng, kind, held_out) for name, kind in tool.gives.items()}
    return Question(
        "response", text, tool.answer.format(**arguments, **given), "The tool has answered.", declared, call, given
    )
