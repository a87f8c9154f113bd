"""Every error that a caller can meet, the words for it in one line, and whose fault it is."""

import reprlib
from collections.abc import Sequence
from enum import Enum

LONGEST = 200  # characters of what a library says
LONGEST_SHOWN = 500  # of a value


class CheckpointError(ValueError):
    """A model folder that is incomplete, damaged or of another kind; the message is one line for its user."""


class MediaError(ValueError):
    """An image, a sound or a video that cannot be read; the message is one line for its user."""


class FetchError(MediaError):
    """A URL whose server cannot be reached or fails: it may be right, and another try may do."""


class TooLongError(ValueError):
    """A prompt that leaves the context no room for a reply. least: it has at least so many tokens."""

    def __init__(self, tokens: int, limit: int, text: str = "", least: bool = False):
        count = f"at least {tokens}" if least else f"{tokens}"
        super().__init__(text or f"the prompt has {count} tokens; the context holds {limit}, the reply included")
        self.tokens, self.limit = tokens, limit


class Kind(Enum):
    """Whose fault an error is: what a command's exit status and a server's answer go by."""

    WRONG_REQUEST = "wrong request"  # what was asked, its files or the checkpoint: the same again fails again
    FAILED = "failed"  # disk, memory, network, or a fault of ours


def kind(error: BaseException) -> Kind:
    wrong = isinstance(error, ValueError) and not isinstance(error, FetchError)
    return Kind.WRONG_REQUEST if wrong else Kind.FAILED


def one_line(error: BaseException) -> str:
    """What an error of a library says, without the number and the file name of the operating system's."""
    if isinstance(error, OSError) and error.strerror:
        return error.strerror
    return clipped(error, LONGEST) or type(error).__name__


def with_name(error: Exception) -> str:
    """What an error says in one line; one of the operating system's without its number, and with the file's name."""
    if isinstance(error, OSError) and error.strerror:
        name = "" if error.filename is None else f"{error.filename!r}: "
        return clipped(name + error.strerror, 2 * LONGEST)  # however long the name is
    return unbroken(error) or type(error).__name__


def unbroken(text: object) -> str:
    """A text in one line."""
    return " ".join(str(text).split())


def clipped(text: object, most: int) -> str:
    """A text in one line, without what is beyond `most` characters."""
    line = unbroken(text)
    return line if len(line) <= most else line[:most] + "…"


def listed(names: Sequence[str]) -> str:
    """Names for one line: the first ten, and how many more there are."""
    more = f" and {len(names) - 10} more" if len(names) > 10 else ""
    return clipped(", ".join(names[:10]) + more, LONGEST_SHOWN)


class Short(reprlib.Repr):
    """`repr`, cut short; of numbers so long that Python does not write them, their length."""

    def repr_int(self, x: int, level: int) -> str:
        if x.bit_length() > 1000:
            return f"{'-' if x < 0 else ''}2**{x.bit_length() - 1}…"
        return super().repr_int(x, level)

    def repr_bytes(self, x: bytes, level: int) -> str:
        return repr(x) if len(x) <= self.maxother else f"{x[: self.maxother - 10]!r}…"


SHORT = Short()
SHORT.maxstring = 100  # a tensor's name is shown whole


def shown(value: object) -> str:
    """A value for a message of one line."""
    return clipped(SHORT.repr(value), LONGEST_SHOWN)


def check_flag(value: object, name: str) -> None:
    if not isinstance(value, bool):
        raise ValueError(f"{name} is {shown(value)}; expected True or False")


def a(value: object) -> str:
    """A value's type for a message: a list."""
    return "None" if value is None else article(type(value).__name__)


def article(noun: str) -> str:
    return f"an {noun}" if noun[0].lower() in "aeiou" else f"a {noun}"
