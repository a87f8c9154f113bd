"""A tool call while it is written: its name, then its arguments, each as soon as it is whole."""

import json
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from mlx_gemma4.reply.toolcall import QUOTE_TOKEN, Call, parse_tool_call


@dataclass(frozen=True)
class CallPart:
    """What became known of a tool call while it is written."""

    index: int  # of the call among the reply's
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
        self.sent = ""  # of the arguments
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
            elif character == "," and self.depth == 1:
                yield from self.argument("".join(self.pending))
                self.pending = []
                continue
            self.pending.append(character)

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
        self.is_other = key.startswith(("'", '"'))  # which may be marks, not parts of it
        if not self.is_other:
            part = (", " if self.sent else "{") + as_json({key: value})[1:-1]
            self.sent += part
            yield CallPart(self.index, None, part)

    def finish(self, call: Call) -> Iterator[CallPart]:
        """What is left to say of it."""
        whole = as_json(call["arguments"])
        if self.name is None:
            yield CallPart(self.index, call["name"], whole)
        elif whole.startswith(self.sent):
            yield CallPart(self.index, None, whole[len(self.sent) :])
