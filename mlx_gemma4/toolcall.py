"""Reads the tool calls that Gemma 4 writes: `call:NAME{key:value,…}`, where strings stand between `<|"|>`.

mlx-lm 0.32.2 has such a parser too, but importing it takes 0.8-2.4 s, and it fails on keys that hold a hyphen, dot or
space, on names that hold a dot or colon, and on white space after a comma.
"""

import json
import re
from typing import Any

QUOTE = '<|"|>'
MAX_DEPTH = 100  # far below Python's recursion limit, far above any real call

NAME = re.compile(r"[^\s{}]+")
BARE_KEY = re.compile(r"[^:,{}\[\]]+")
JSON = json.JSONDecoder(strict=False)  # not strict: line breaks inside a double-quoted string are let through


def parse_tool_call(text: str) -> dict[str, Any]:
    """`{"name": str, "arguments": dict}` from the text between `<|tool_call>` and `<tool_call|>`.

    The inverse of what the chat template writes for a call; keys in `<|"|>`, double-quoted JSON strings and white space
    around separators are taken too. Raises ValueError, one line, if the text is anything else.
    """
    reader = _Reader(text)
    reader.expect("call:")
    name = reader.match(NAME, "a name")
    arguments = reader.mapping(depth=1)
    reader.skip_space()
    if reader.position < len(text):
        raise reader.error("the end")
    return {"name": name, "arguments": arguments}


class _Reader:
    """A recursive-descent parser: every method reads one construct at `position` and moves behind it."""

    def __init__(self, text: str) -> None:
        self.text = text
        self.position = 0

    def error(self, expected: str) -> ValueError:
        got = self.text[self.position : self.position + 40]
        return ValueError(f"tool call: expected {expected} at character {self.position}, got {got!r}")

    def skip_space(self) -> None:
        while self.text[self.position : self.position + 1].isspace():
            self.position += 1

    def take(self, token: str) -> bool:
        self.skip_space()
        if not self.text.startswith(token, self.position):
            return False
        self.position += len(token)
        return True

    def expect(self, token: str) -> None:
        if not self.take(token):
            raise self.error(repr(token))

    def match(self, pattern: re.Pattern[str], expected: str) -> str:
        self.skip_space()
        found = pattern.match(self.text, self.position)
        if found is None:
            raise self.error(expected)
        self.position = found.end()
        return found[0].rstrip()

    def mapping(self, depth: int) -> dict[str, Any]:
        self.expect("{")
        result: dict[str, Any] = {}
        if self.take("}"):
            return result
        while True:
            key = self.key()
            self.expect(":")
            result[key] = self.value(depth)
            if not self.take(","):
                self.expect("}")
                return result

    def sequence(self, depth: int) -> list[Any]:
        self.expect("[")
        result: list[Any] = []
        if self.take("]"):
            return result
        while True:
            result.append(self.value(depth))
            if not self.take(","):
                self.expect("]")
                return result

    def key(self) -> str:
        self.skip_space()
        if self.text.startswith((QUOTE, '"'), self.position):
            key: str = self.scalar()
            return key
        return self.match(BARE_KEY, "a key")

    def value(self, depth: int) -> Any:
        self.skip_space()
        opening = self.text[self.position : self.position + 1]
        if opening in ("{", "["):
            if depth == MAX_DEPTH:
                raise self.error(f"at most {MAX_DEPTH} levels")
            return self.mapping(depth + 1) if opening == "{" else self.sequence(depth + 1)
        return self.scalar()

    def scalar(self) -> Any:
        """A string between `<|"|>`; all else is as in JSON, Python's repr of a finite float included."""
        if self.take(QUOTE):
            start, end = self.position, self.text.find(QUOTE, self.position)
            if end < 0:
                raise self.error(f"a closing {QUOTE}")
            self.position = end + len(QUOTE)
            return self.text[start:end]
        try:
            value, self.position = JSON.raw_decode(self.text, self.position)
        except ValueError:
            raise self.error("a value") from None
        return value
