"""A tool call while it is written: its name, then its arguments, each as soon as it is whole."""

import json
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from mlx_gemma4.reply.toolcall import QUOTE_TOKEN, Call, parse_tool_call


@dataclass(frozen=True)
class CallPart:
    """What became known of a tool call while it is written."""

    index: int  # of the call among those that were begun: the reply's, and any that turned out to be none
    name: str | None  # with the first part of each call
    arguments: str  # JSON, which the parts of a call add up to; of a call that was cut, its beginning


def whole_part(index: int, call: Call) -> CallPart:
    return CallPart(index, call["name"], as_json(call["arguments"]))


def as_json(value: Any) -> str:
    return json.dumps(value, ensure_ascii=False)


class OpenCall:
    """Follows one call in the template's form. What is in another form is known at its end, and given then."""

    def __init__(self, index: int) -> None:
        self.index = index
        self.name: str | None = None
        self.said: dict[str, str] = {}  # of the arguments, by key, as JSON
        self.depth = 0
        self.in_string = self.is_other = False
        self.pending: list[str] = []  # what stands before the first bracket, then what stands since the last comma

    def feed(self, text: str) -> Iterator[CallPart]:
        for character in text:
            if self.is_other:
                return
            if character == QUOTE_TOKEN:
                self.in_string = not self.in_string
            elif self.in_string:
                pass
            elif character in "{[":
                self.depth += 1
                if self.depth == 1:
                    yield from self.begin("".join(self.pending), character)
                    self.pending = []
                    continue
            elif character in "}]":
                self.depth -= 1
                self.is_other = self.depth <= 0  # nothing follows in the template's form
            elif character == "," and self.depth == 1:
                yield from self.argument("".join(self.pending))
                self.pending = []
                continue
            self.pending.append(character)

    def wait(self) -> None:
        """Say nothing more before its end: where its string ends is not known."""
        self.is_other = True

    def begin(self, head: str, bracket: str) -> Iterator[CallPart]:
        try:
            self.name = parse_tool_call(f"{head}{bracket}}}", QUOTE_TOKEN)["name"]
        except ValueError:
            self.is_other = True
            return
        yield CallPart(self.index, self.name, "")

    def argument(self, text: str) -> Iterator[CallPart]:
        try:
            ((key, value),) = parse_tool_call(f"call:{self.name}{{{text}}}", QUOTE_TOKEN)["arguments"].items()
        except ValueError:
            self.is_other = True
            return
        # Quotes may be marks, not parts of it; of a key that comes twice the last counts, known at the end.
        self.is_other = key.startswith(("'", '"')) or key in self.said
        if not self.is_other:
            yield CallPart(self.index, None, self.pair(key, as_json(value)))

    def pair(self, key: str, value: str) -> str:
        before = ", " if self.said else "{"
        self.said[key] = value
        return f"{before}{as_json(key)}: {value}"

    def finish(self, call: Call) -> Iterator[CallPart]:
        """What is left to say of it; of a key that JSON has twice, readers take the last."""
        if self.name is None:
            yield whole_part(self.index, call)
            return
        values = {key: as_json(value) for key, value in call["arguments"].items()}
        rest = "".join([self.pair(key, value) for key, value in values.items() if self.said.get(key) != value])
        yield CallPart(self.index, None, rest + ("}" if self.said else "{}"))
