"""What may come of an input: success, or an error that this project raised on purpose, in one short line."""

import ast
import re
import traceback
from functools import cache
from pathlib import Path
from types import TracebackType

from .surface import PACKAGE

LONGEST = 500  # characters of a message
FOREIGN = ("Exceeds the limit (4300 digits)",)  # raised by Python while a message of ours is put together


class Fault(Exception):
    """What must not happen; `where` tells faults apart."""

    def __init__(self, where: str, detail: str = "") -> None:
        super().__init__(where)
        self.where, self.detail = where, detail


def plain(text: str) -> str:
    """One line in which numbers, which differ from input to input, are not told apart."""
    return re.sub(r"0x[0-9a-f]+|\d+", "#", " ".join(text.split()))


def check(condition: bool, property: str, detail: object = "") -> None:
    if not condition:
        raise Fault(property, repr(detail)[:2000])


def check_line(text: str, what: str) -> None:
    """A message for people: one line, not empty, not endless, no half characters."""
    check(bool(text.strip()), f"{what}: empty", text)
    check(len(text.splitlines()) <= 1, f"{what}: several lines", text)
    check(len(text) <= LONGEST, f"{what}: more than {LONGEST} characters", text)


def check_refusal(error: BaseException, kinds: tuple[type[Exception], ...]) -> None:
    """Fault unless an error is one of these kinds, raised by this project itself, in one line."""
    name, place = type(error).__name__, last_place(error.__traceback__)
    told = "".join(traceback.format_exception(error))[-3000:]
    if not isinstance(error, (*kinds, MemoryError)):
        raise Fault(f"{name} at {place}", told)
    own_kind = type(error).__module__.startswith("mlx_gemma4") or type(error) in (*kinds, MemoryError)
    if not (own_kind and on_purpose(error.__traceback__)) or str(error).startswith(FOREIGN):
        raise Fault(f"{name} of a library at {place}", told)
    check_line(str(error), f"message of {name} at {place}")


def frames(trace: TracebackType | None) -> list[tuple[Path, int]]:
    return [(Path(frame.filename), frame.lineno or 0) for frame in traceback.extract_tb(trace)]


def last_place(trace: TracebackType | None) -> str:
    """The last line of ours that a traceback goes through."""
    own = [(path, line) for path, line in frames(trace) if path.is_relative_to(PACKAGE)]
    return f"{own[-1][0].relative_to(PACKAGE)}:{own[-1][1]}" if own else "none of our lines"


def on_purpose(trace: TracebackType | None) -> bool:
    """Whether an error comes from a `raise` of ours."""
    path, line = frames(trace)[-1]
    return path.is_relative_to(PACKAGE) and any(first <= line <= last for first, last in raises(path))


@cache
def raises(path: Path) -> list[tuple[int, int]]:
    """The lines of each `raise` in a file."""
    tree = ast.parse(path.read_text(encoding="utf-8"))
    return [(node.lineno, node.end_lineno or node.lineno) for node in ast.walk(tree) if isinstance(node, ast.Raise)]
