"""Expressions of a grammar -> llguidance's Lark, and what llguidance says of it."""

import json
from dataclasses import dataclass

from llguidance import LLMatcher

from mlx_gemma4.errors import unbroken
from mlx_gemma4.media.source import unheard


class ImpossibleError(Exception):
    """What no text fits, or what has no end."""


@dataclass(frozen=True)
class Rule:
    name: str


@dataclass(frozen=True)
class Row:
    parts: tuple["Node", ...]


@dataclass(frozen=True)
class Choice:
    members: tuple["Node", ...]


@dataclass(frozen=True)
class Entries:
    """Values with commas between them."""

    entry: "Node"
    least: int
    most: int | None


@dataclass(frozen=True)
class Property:
    """The value of one; any value where this one has no end."""

    name: str
    value: "Node"
    required: bool


# A string stands in the grammar as it is: a literal, the name of a terminal, a token; the empty one is the empty text.
Node = str | Rule | Row | Choice | Entries | Property
NOTHING = Choice(())  # that fits


def literal(text: str) -> str:
    """A text as a string of Lark, which are JSON's; of an empty one nothing."""
    return json.dumps(text, ensure_ascii=False).replace("\x7f", "\\u007f") if text else ""


def row(*parts: Node) -> Node:
    return NOTHING if NOTHING in parts else Row(parts)


def choice(*members: Node) -> Node:
    fitting = tuple(dict.fromkeys(member for member in members if member != NOTHING))
    return fitting[0] if len(fitting) == 1 else Choice(fitting)


def entries(entry: Node, least: int = 0, most: int | None = None) -> Node:
    if most is not None and most < least:
        return NOTHING
    if entry == NOTHING or most == 0:
        return NOTHING if least else ""
    return Entries(entry, least, most)


class Printer:
    """Writes rules. A value that has no end is left out, or, of a property, is `anything`."""

    def __init__(self, rules: dict[str, Node], anything: Node):
        self.rules, self.anything = rules, anything
        self.freed: list[str] = []  # names of properties
        self.waiting: list[str] = []
        self.ending = set[str]()  # rules that some text of finite length fits
        known = -1
        while known < len(self.ending):
            known = len(self.ending)
            for name in (*rules, *reversed(rules)):  # either may be what leads from a rule to those that it names
                if self.ends(rules[name]):
                    self.ending.add(name)

    def ends(self, node: Node) -> bool:
        match node:
            case Rule(name):
                return name in self.ending
            case Row(parts):
                return all(map(self.ends, parts))
            case Choice(members):
                return any(map(self.ends, members))
            case Entries(entry, least, _):
                return least == 0 or self.ends(entry)
            case Property(_, value, required):
                return not required or self.ends(value)
            case _:
                return True

    def lines(self, start: str) -> list[str]:
        """The rule of this name and those that it needs."""
        found: dict[str, str] = {}
        self.waiting = [start]
        while self.waiting:
            name = self.waiting.pop()
            if name not in found:
                found[name] = f"{name}: {self.lark(self.rules[name])}"
        return list(found.values())

    def lark(self, node: Node) -> str:
        """The expression; empty for the empty text."""
        match node:
            case str():
                return node
            case Rule(name):
                self.waiting.append(name)
                return name
            case Row(parts):
                return " ".join(filter(None, map(self.lark, parts)))
            case Choice(members):
                return self.choice([self.lark(member) for member in members if self.ends(member)])
            case Entries(entry, least, most):
                one = self.lark(entry) if self.ends(entry) else ""
                more = f'("," {one}){{{max(least - 1, 0)},{"" if most is None else most - 1}}}'
                text = one if most == 1 or not one else f"{one} {more}"
                return text if least or not one else f"({text})?"
            case Property(name, value, _):
                if not self.ends(value):
                    self.freed.append(name)
                    value = self.anything
                return self.lark(value)

    def choice(self, texts: list[str]) -> str:
        if not texts:
            raise ImpossibleError
        written = " | ".join(filter(None, texts))
        return f"({written})?" if written and "" in texts else f"({written})" if len(texts) > 1 and written else written


def validation(grammar: str) -> tuple[bool, list[str]]:
    """Whether llguidance refuses a grammar, and why, or what it notes of it."""
    try:
        with unheard(2):
            return LLMatcher.validate_grammar_with_warnings(grammar)
    except BaseException as error:  # a panic of its Rust is no Exception: its messages cut text inside characters
        if isinstance(error, (KeyboardInterrupt, SystemExit)):
            raise
        return True, [f"llguidance fails: {unbroken(error)[:100]}"]


def first_error(lark: str) -> str:
    """Why llguidance does not take a grammar, in one line; empty if it does."""
    wrong, messages = validation(LLMatcher.grammar_from_lark(lark))
    return unbroken(messages[0].splitlines()[0])[:120] if wrong else ""
