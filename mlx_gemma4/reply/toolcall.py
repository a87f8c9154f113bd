"""Reads the tool calls that Gemma 4 writes: `call:NAME{key:value,…}`, where strings stand between `<|"|>`.

A call in the template's form is read by `Reader`. What models write instead, now and then, is read by `LooseReader`, if
it can mean one thing only. For calls that are nearly right:

    block     = call { [ "," | ";" ] call }
    call      = [ "call" ] ":" NAME arguments | TOOL arguments         TOOL: the name of a known tool
    arguments = "{" pairs "}" | "(" pairs ")" | "(" "{" pairs "}" ")" | nothing
    pairs     = [ key ( ":" | "=" ) value { "," key ( ":" | "=" ) value } [ "," ] ]
    value     = string | "{" pairs "}" | list | literal | words
    string    = between `<|"|>`, '…' or "…": up to the first closing mark behind which the call goes on or ends
    literal   = JSON's and Python's: null None true True 12 1.5, and 108. or .5
    words     = bare text, up to where the next pair begins, the call ends, or a `<|"|>` whose first is missing

Brackets that are missing or too many at the end are overlooked. A tool's schema, where there is one, says which keys
follow a value, and whether bare words may be meant. Both readers take time linear in the text.

mlx-lm 0.32.2 has such a parser too, but importing it takes 0.8-2.4 s, and it fails on keys that hold a hyphen, dot or
space, on names that hold a dot or colon, and on white space after a comma.
"""

import json
import math
import re
from collections.abc import Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from typing import Any

MAX_DEPTH = 100  # of a tool's or an argument's nesting: far below Python's recursion limit, far above any real one
QUOTE = '<|"|>'
# Stands for the token `<|"|>` where a call comes from tokens, so that the same text inside a string is text: half of a
# surrogate pair, which no decoded text holds.
QUOTE_TOKEN = "\udc22"

Call = dict[str, Any]  # {"name": str, "arguments": dict}
Schema = Mapping[str, Any]  # of one value, resolved: prompt/tools.py

NAME = re.compile(r"[^\s{}()]+")
PLAIN_NAME = re.compile(r"[\w.:/-]+")  # what counts as one without arguments
BARE_KEY = re.compile(r"[^:,{}\[\]]+")


def parse_tool_call(text: str, quote: str = QUOTE) -> Call:
    """`{"name": str, "arguments": dict}` from the text between `<|tool_call>` and `<tool_call|>`.

    The inverse of what the chat template writes for a call; keys in `<|"|>`, double-quoted JSON strings and white space
    around separators are taken too. Raises ValueError, one line, if the text is anything else.
    """
    reader = Reader(text, quote)
    call = reader.call()
    reader.skip_space()
    if reader.position < len(text):
        raise reader.error("the end")
    return call


def read_tool_calls(
    text: str, schemas: Mapping[str, Schema] | None = None, ended: bool = True, quotes: Sequence[str] = (QUOTE,)
) -> list[Call]:
    """The calls of one block, one as a rule, in the template's form or nearly so.

    schemas: of the arguments of each known tool, by name. ended: the model ended the block, so that a bracket or mark
    which lacks at its end may be added; not so where a reply was cut off. quotes: what may stand for `<|"|>`, the
    first that does so. Raises ValueError, one line, if the text is no call or could mean more than one thing.
    """
    schemas = schemas or {}
    reason = ValueError("tool call: its keys are in quotes")
    for quote in quotes:
        try:
            call = parse_tool_call(text, quote)
            if not has_quoted_keys(call, schemas):
                return [call]
        except ValueError as error:
            reason = error
    quote = next((quote for quote in quotes if quote in text), quotes[-1])
    try:
        return LooseReader(text, quote, schemas, ended).block()
    except ValueError:
        raise reason from None


def has_quoted_keys(call: Call, schemas: Mapping[str, Schema]) -> bool:
    """Whether a call's keys, legal as they are, are its tool's in single quotes."""
    known = schemas.get(call["name"], {}).get("properties", {})
    return any(key[:1] == "'" == key[1:][-1:] and key[1:-1] in known and key not in known for key in call["arguments"])


def needs_quotes(key: str) -> bool:
    """Whether a key has to stand between `<|"|>` for `parse_tool_call` to read it back, whatever comes after it."""
    key = key.replace("▁", " ")  # as the tokenizer gives it back
    if key.startswith('"'):  # a later one could end it as a JSON string
        return True
    try:
        return Reader(f"{key}:", QUOTE_TOKEN).key() != key
    except ValueError:
        return True


def spelled(text: str) -> str:
    """Text with the marks as a reader sees them."""
    return text.replace(QUOTE_TOKEN, QUOTE)


def number(text: str) -> int | float:
    """ValueError for one that JSON could not hold: too many digits, or beyond the largest."""
    if text.lstrip("+-").isdecimal():
        return int(text)
    value = float(text)
    if not math.isfinite(value):
        raise ValueError(f"{text} is too large")
    return value


JSON = json.JSONDecoder(strict=False)  # not strict: line breaks inside a double-quoted string are let through
LITERAL = re.compile(r"null|true|false|-?(?:0|[1-9]\d*)(?:\.\d+)?(?:[eE][+-]?\d+)?")
CONSTANTS = {"null": None, "true": True, "false": False}


class Reader:
    """A recursive-descent parser: every method reads one construct at `position` and moves behind it."""

    def __init__(self, text: str, quote: str = QUOTE) -> None:
        self.text = text
        self.position = 0
        self.quote = quote

    def error(self, expected: str) -> ValueError:
        got = spelled(self.text[self.position : self.position + 40])
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
        return spelled(found[0].rstrip())

    def call(self) -> Call:
        self.expect("call:")
        return {"name": self.match(NAME, "a name"), "arguments": self.mapping(depth=1)}

    def mapping(self, depth: int) -> dict[str, Any]:
        result: dict[str, Any] = {}
        for _ in self.entries("{", "}"):
            key = self.key()
            self.expect(":")
            result[key] = self.value(depth)
        return result

    def entries(self, opening: str, closing: str) -> Iterator[None]:
        """Before each entry between these."""
        self.expect(opening)
        if self.take(closing):
            return
        yield
        while self.take(","):
            yield
        self.expect(closing)

    def key(self) -> str:
        self.skip_space()
        start = self.position
        if self.text.startswith((self.quote, '"'), start):
            try:
                key: str = self.scalar()
                self.skip_space()
            except ValueError:
                if self.text[start] != '"':
                    raise
            else:
                if self.text.startswith(":", self.position) or self.text[start] != '"':
                    return key
            self.position = start  # a key that begins with the character
        return self.match(BARE_KEY, "a key")

    def value(self, depth: int) -> Any:
        self.skip_space()
        opening = self.text[self.position : self.position + 1]
        if opening not in ("{", "["):
            return self.scalar()
        self.check_depth(depth)
        return self.mapping(depth + 1) if opening == "{" else [self.value(depth + 1) for _ in self.entries("[", "]")]

    def check_depth(self, depth: int) -> None:
        if depth == MAX_DEPTH:
            raise self.error(f"at most {MAX_DEPTH} levels")

    def scalar(self) -> Any:
        """A string between `<|"|>`; all else is as in JSON, Python's repr of a finite float included."""
        if self.take(self.quote):
            start, end = self.position, self.text.find(self.quote, self.position)
            if end < 0:
                raise self.error(f"a closing {QUOTE}")
            self.position = end + len(self.quote)
            return spelled(self.text[start:end])
        literal = LITERAL.match(self.text, self.position)  # JSON's decoder counts all lines when it finds no value
        try:
            if literal is not None:
                self.position = literal.end()
                return CONSTANTS[literal[0]] if literal[0] in CONSTANTS else number(literal[0])
            if not self.text.startswith('"', self.position):
                raise self.error("a value")
            value, self.position = JSON.raw_decode(self.text, self.position)
        except ValueError:
            raise self.error("a value") from None
        value = spelled(value)
        if any("\ud800" <= character <= "\udfff" for character in value):  # an escape of half a pair
            raise self.error("a value")
        return value


# --- calls that are nearly right ---------------------------------------------------------------

CLOSING = {"{": "}", "[": "]", "(": ")"}
OPENING = {closing: opening for opening, closing in CLOSING.items()}
ANY_KEY = r"""(?:[\w$@][\w$@./-]{0,63}|'[^'\n]{1,64}'|"[^"\n]{1,64}")"""
LOOSE_KEY = re.compile(r"[^\s:=,{}\[\]()'\"\udc22<][^:=,{}\[\]()\n\udc22]{0,199}")
CALL_PREFIX = re.compile(r"\s*(?:call\s*)?:\s*(?:call:)?")
SURPLUS = re.compile(r"[}\])\s]*")  # brackets that close nothing, behind a call
PYTHON = {"True": True, "False": False}
ZERO_FIRST = re.compile(r"-?0\d+(?:\.\d+)?")  # a postal code, an account: a number would lose its zeros
NOT_ONLY_WORDS = re.compile(r"[\n,'\"{}\[\]]|\s\w+\s*[:=]")  # what in bare text may be more than that, without a schema
DECIMAL = re.compile(r"[+-]?(?:(?:0|[1-9]\d*)\.\d*|\.\d+|(?:0|[1-9]\d*))(?:[eE][+-]?\d+)?")  # no leading zero: a text


@dataclass(frozen=True)
class Place:
    """What can stand behind a value: in a mapping with these keys, or in a list."""

    goes_on: re.Pattern[str]  # behind a whole value: the next pair or entry, a bracket that closes, or the end
    ends_words: re.Pattern[str]  # where bare text may end, and the brackets inside it
    key: re.Pattern[str] | None = None  # of the tool: there may be no comma before it

    @classmethod
    def in_mapping(cls, known: Mapping[str, Schema], quote: str) -> "Place":
        key, mark = key_pattern(known), re.escape(quote)
        quoted = rf"{mark}[^{QUOTE_TOKEN}]{{0,64}}{mark}"
        no_comma = rf"|(?:{key})\s*[:=]" if known else ""
        return cls(
            goes_on=re.compile(rf"\s*(?:$|[}}\])]|,\s*(?:(?:{key}|{ANY_KEY}|{quoted})\s*[:=]|$|[}}\])]){no_comma})"),
            ends_words=re.compile(rf"{mark}|,\s*(?:(?:{key}|{quoted})\s*[:=]|$|[}}\])])|[{{}}\[\]()]"),
            key=re.compile(rf"(?:{key})\s*[:=]") if known else None,
        )

    @classmethod
    def in_list(cls, quote: str) -> "Place":
        return cls(re.compile(r"\s*(?:$|[,}\])])"), re.compile(rf"{re.escape(quote)}|[,{{}}\[\]()]"))


class LooseReader(Reader):
    """Reads what a call must have meant; ValueError where it could mean two things."""

    def __init__(self, text: str, quote: str, schemas: Mapping[str, Schema], ended: bool) -> None:
        super().__init__(text, quote)
        self.schemas = schemas
        self.ended = ended
        self.open: list[str] = []  # the brackets that would close what is open, outermost first
        self.entry = Place.in_list(self.quote)
        self.pair = Place.in_mapping({}, self.quote)

    def block(self) -> list[Call]:
        calls = []
        while True:
            calls.append(self.call())
            surplus = SURPLUS.match(self.text, self.position)
            self.position = surplus.end() if surplus else self.position
            if self.position == len(self.text):
                return calls
            if not self.take(","):
                self.take(";")

    def call(self) -> Call:
        prefix = CALL_PREFIX.match(self.text, self.position)
        self.position = prefix.end() if prefix else self.position
        name = self.match(NAME, "a name")
        if prefix is None and name not in self.schemas:
            raise self.error("'call:'")
        schema = self.schemas.get(name, {})
        self.skip_space()
        if self.position == len(self.text) and self.ended and PLAIN_NAME.fullmatch(name):
            return {"name": name, "arguments": {}}
        self.open = [CLOSING[opening] for opening in ("(", "{") if self.take(opening)]
        if not self.open:
            raise self.error(repr("{"))
        arguments = self.pairs(1, schema)
        if self.open:
            self.close()
        return {"name": name, "arguments": arguments}

    # brackets

    def at_close(self) -> bool:
        """Whether what is open ends here: at its own bracket, one around it, or the end of the text."""
        self.skip_space()
        if self.position == len(self.text):
            if not self.ended:
                raise self.error(repr(self.open[-1]))
            return True
        return self.text[self.position] in self.open

    def close(self) -> None:
        """Behind the innermost bracket; it may be missing where one around it, or the text, ends."""
        if not self.at_close():
            raise self.error(repr(self.open[-1]))
        if self.text.startswith(self.open.pop(), self.position):
            self.position += 1

    def pairs(self, depth: int, schema: Schema) -> dict[str, Any]:
        result: dict[str, Any] = {}
        known = schema.get("properties", {})
        place = Place.in_mapping(known, self.quote)
        for _ in self.until_closed(place):
            key = self.key()
            if not self.take(":"):
                self.expect("=")
            result[key] = self.loose_value(depth, known.get(key, {}), place)
        return result

    def items(self, depth: int, schema: Schema) -> list[Any]:
        item = schema.get("items", {})
        return [self.loose_value(depth, item, self.entry) for _ in self.until_closed(self.entry)]

    def until_closed(self, place: Place) -> Iterator[None]:
        """Before each entry of what is open."""
        while not self.at_close():
            yield
            if not (self.take(",") or self.at_close() or self.at_key(place)):
                raise self.error(f"',' or {self.open[-1]!r}")
        self.close()

    def at_key(self, place: Place) -> bool:
        return place.key is not None and place.key.match(self.text, self.position) is not None

    def key(self) -> str:
        self.skip_space()
        for mark in (self.quote, '"', "'"):
            if self.text.startswith(mark, self.position):
                start = self.position + len(mark)
                end = self.text.find(mark, start)
                if end < 0 or self.quote in self.text[start:end]:  # no key goes on behind a string
                    raise self.error(f"a closing {spelled(mark)}")
                self.position = end + len(mark)
                return spelled(self.text[start:end])
        return self.match(LOOSE_KEY, "a key")

    # values

    def loose_value(self, depth: int, schema: Schema, place: Place) -> Any:
        self.skip_blanks()
        text, start = self.text, self.position
        if (opening := text[start : start + 1]) in ("{", "["):
            self.check_depth(depth)
            self.position += 1
            self.open.append(CLOSING[opening])
            return self.pairs(depth + 1, schema) if opening == "{" else self.items(depth + 1, schema)
        with suppress(ValueError):  # what is right stays as it is, if the call goes on behind it
            value = self.scalar()
            if place.goes_on.match(text, self.position):
                return value
        self.position = start
        for mark in (self.quote, '"', "'"):
            if text.startswith(mark, start):
                self.position += len(mark)
                return self.string(mark, place)
        return self.words(schema, place)

    def skip_blanks(self) -> None:
        """Spaces; a line break may belong to bare text, and is skipped only before what is no bare text."""
        start = self.position
        self.skip_space()
        if self.position < len(self.text) and not self.text.startswith(("{", "[", '"', "'", self.quote), self.position):
            while start < self.position and self.text[start] in " \t":
                start += 1
            self.position = start

    def string(self, mark: str, place: Place) -> str:
        """Up to the first mark behind which the call goes on; a mark that seems to open another string is a doubt."""
        start = self.position
        last: int | None = None  # behind the mark before
        for found in re.compile(re.escape(mark)).finditer(self.text, start):
            opens = last is not None and self.text[last : found.start()].strip() in (",", ":", "=")
            behind = last = found.end()
            if mark == "'" and self.text.startswith(self.quote, behind):
                behind += len(self.quote)  # one mark of each kind: seen at the end of a string in single quotes
            if not opens and place.goes_on.match(self.text, behind):
                inner, self.position = self.text[start : found.start()], behind
                if mark == '"' and "\\" in inner:
                    raise self.error("escapes of JSON")  # what it would be with them nobody knows
                return spelled(inner.replace("\\'", "'") if mark == "'" else inner)
            if opens or self.text[max(start, found.start() - 40) : found.start()].rstrip().endswith((":", "=", ",")):
                self.position = found.start()
                raise self.error(f"a closing {spelled(mark)}")
        return self.rest(mark, start)

    def rest(self, mark: str, start: int) -> str:
        """A string that lacks its end, because the text ends: up to the brackets that close the call."""
        text = self.text[start:].rstrip()
        if not self.ended or mark in text:
            raise self.error(f"a closing {spelled(mark)}")
        for closing in self.open:  # outermost, and last in the text, first
            if not text.endswith(closing) or text.count(closing) <= text.count(OPENING[closing]):
                break
            if mark != self.quote:
                raise self.error(f"a closing {mark}")  # it may be an apostrophe
            text = text[:-1].rstrip()
        self.position = len(self.text)
        return spelled(text) if mark == self.quote else spelled(self.text[start:])

    def words(self, schema: Schema, place: Place) -> Any:
        """Bare text: a literal, or a string if the schema allows one."""
        start = self.position
        if place is not self.entry and not (schema and allows(schema, "string")):
            place = self.pair  # only in a known text is what looks like a key part of it, unless the tool has it
        end, marked = self.end_of_words(place)
        text = self.text[start:end].rstrip()
        self.position = end + (len(self.quote) if marked else 0)
        if marked and (text.endswith(",") or not place.goes_on.match(self.text, self.position)):  # or a key begins
            raise self.error("the end of a value")
        if not marked:
            literal = read_literal(text.strip(), schema)
            if literal is not UNREAD:
                return literal
            if ZERO_FIRST.fullmatch(text.strip()):
                return text.strip()
        only_words = schema or marked or (end < len(self.text) and NOT_ONLY_WORDS.search(text) is None)
        if not text.strip() or not allows(schema, "string") or not only_words:
            self.position = start
            raise self.error("a value")
        return spelled(text)

    def end_of_words(self, place: Place) -> tuple[int, bool]:
        """Where bare text ends, and whether a mark stands there."""
        depth: list[str] = []
        for found in place.ends_words.finditer(self.text, self.position):
            token = found[0]
            if token == self.quote:
                if depth:
                    raise self.error("a value")
                return found.start(), True
            if token in CLOSING:
                depth.append(CLOSING[token])
            elif depth and token == depth[-1]:
                depth.pop()
            elif token in self.open or token.startswith(","):
                return found.start(), False
        if not self.ended:
            raise self.error(repr(self.open[-1]))
        return len(self.text), False


UNREAD = object()


def read_literal(text: str, schema: Schema) -> Any:
    """A literal of JSON or Python, UNREAD if the text is none or the schema has it for a string."""
    if text == "None":
        return None
    kind = "boolean" if text in PYTHON else "number"
    if allows(schema, "string") and (text.startswith("+") or not allows(schema, kind)):
        return UNREAD
    if text in PYTHON:
        return PYTHON[text]
    with suppress(ValueError):  # too large
        if DECIMAL.fullmatch(text):
            return number(text)
    return UNREAD


def allows(schema: Schema, kind: str) -> bool:
    """Whether a resolved schema takes a value of this kind: one that names no type takes all."""
    types = schema.get("type") or "any"
    names = {types.lower()} if isinstance(types, str) else {str(name).lower() for name in types}
    if schema.get("nullable"):
        names.add("null")
    if "any" in names or not names & KINDS:
        return True
    return kind in names or (kind == "number" and "integer" in names)


KINDS = {"string", "number", "integer", "boolean", "array", "object", "null"}


def key_pattern(known: Mapping[str, Schema]) -> str:
    """Matches a key of the tool, or, if the tool is not known, what looks like a key."""
    if not known:
        return ANY_KEY
    return "|".join(rf"""["']?{re.escape(key)}["']?""" for key in sorted(known, key=len, reverse=True))
