"""What a JSON Schema says of strings: formats and patterns -> regular expressions of llguidance."""

import re
from collections.abc import Collection
from functools import cache, lru_cache

from llguidance import LLMatcher, LLTokenizer, regex_to_lark

MONTHS = r"((0[13578]|1[02])-(0[1-9]|[12][0-9]|3[01])|(0[469]|11)-(0[1-9]|[12][0-9]|30)|02-(0[1-9]|1[0-9]|2[0-8]))"
LEAP = r"([12][0-9](0[48]|[2468][048]|[13579][26])|(1[26]|2[048])00)"
DATE = rf"([12][0-9]{{3}}-{MONTHS}|{LEAP}-02-29)"
TIME = r"([01][0-9]|2[0-3]):[0-5][0-9]:[0-5][0-9](\.[0-9]{1,9})?(Z|[+-]([01][0-9]|2[0-3]):[0-5][0-9])"
BYTE = r"(25[0-5]|2[0-4][0-9]|1[0-9][0-9]|[1-9]?[0-9])"
HEX = "[0-9A-Fa-f]"
ATOM = r"[A-Za-z0-9!#$%&'*+\/=?^_`{|}~-]{1,32}"
LABEL = r"[A-Za-z0-9]([A-Za-z0-9-]{0,61}[A-Za-z0-9])?"
FORMATS = {
    "date": DATE,
    "time": TIME,
    "date-time": f"{DATE}T{TIME}",
    "uuid": rf"{HEX}{{8}}(-{HEX}{{4}}){{3}}-{HEX}{{12}}",
    "ipv4": rf"{BYTE}(\.{BYTE}){{3}}",
    "hostname": rf"{LABEL}(\.{LABEL}){{0,8}}",
    "email": rf"{ATOM}(\.{ATOM}){{0,3}}@{LABEL}(\.{LABEL}){{0,8}}",
    "uri": r"[a-z][a-z0-9+.-]{0,20}:\/\/[A-Za-z0-9._~:\/?#@!$&'()*+,;=%-]+",
}

SYMBOL = re.compile(r"\\.|\[\^?\]?(?:\\.|[^\]\\])*\]|.", re.DOTALL)  # an escape, a class, or a character
OTHERS = {"D": r"\P{Nd}", "W": r"[^\p{L}\p{N}_]"}
ANCHORS = {"^", "$", "\\b", "\\B", "\\A", "\\Z", "\\z"}


def whole_pattern(pattern: str) -> str | None:
    """A regular expression of JSON Schema, which matches anywhere, as one of llguidance that matches the whole text.

    None where an anchor stands inside, an escape asks for what is around a place, or brackets do not fit.
    """
    depth = 0
    alternatives: list[list[str]] = [[]]
    for symbol in SYMBOL.findall(pattern):
        depth += {"(": 1, ")": -1}.get(symbol, 0)
        if depth < 0:
            return None
        if symbol == "|" and depth == 0:
            alternatives.append([])
        else:
            alternatives[-1].append(symbol)
    written = []
    for symbols in alternatives:
        begins, ends = symbols[:1] == ["^"], symbols[-1:] == ["$"]
        inner = symbols[1 if begins else 0 : -1 if ends else None]
        if not ANCHORS.isdisjoint(inner):
            return None
        body = regex_to_lark("".join(inner), "dw")
        written.append(f"({'' if begins else '(?s:.*)'}({body}){'' if ends else '(?s:.*)'})")
    return "|".join(written) if depth == 0 else None


def as_all_read(pattern: str) -> str:
    """A pattern whose \\D and \\W are no digits and letters of any script: to some readers those are digits too."""
    return re.sub(r"\\(.)", lambda escape: OTHERS.get(escape[1], escape[0]), pattern, flags=re.DOTALL)


def other_than(texts: Collection[str]) -> str:
    """A pattern of JSON Schema that all texts match but these, which it leaves where they differ."""
    found = []
    for begun in sorted({text[:count] for text in texts for count in range(len(text) + 1)}):
        following = {text[len(begun)] for text in texts if text.startswith(begun) and text != begun}
        other = f"[^{''.join(map(re.escape, sorted(following)))}]" if following else "(?s:.)"
        found.append(f"{re.escape(begun)}({other}(?s:.*)){'' if begun in texts else '?'}")
    return f"^({'|'.join(found)})$"


@cache
def letters() -> LLTokenizer:
    """A vocabulary of bytes."""
    return LLTokenizer("byte")


def matches(pattern: str, text: str) -> bool:
    """Whether a regular expression of llguidance, which Python's engine may not read, matches a whole text."""
    matcher = LLMatcher(letters(), LLMatcher.grammar_from_regex(pattern), log_level=0)
    return matcher.consume_tokens(list(text.encode())) and matcher.is_accepting()


@lru_cache(maxsize=1024)
def is_empty(terminal: str) -> bool:
    """Whether no text matches a terminal of Lark; llguidance says so only where it is to go on, and then goes on with
    nothing else."""
    matcher = LLMatcher(letters(), LLMatcher.grammar_from_lark(f"start: T\nT: {terminal}"), log_level=0)
    matcher.compute_bitmask()
    return matcher.get_error().startswith("NoExtensionBias")
