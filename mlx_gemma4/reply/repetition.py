"""Tells when a reply does nothing any more but repeat one block of tokens."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from numbers import Integral

import numpy as np

from mlx_gemma4.errors import a, shown

LONGEST = 2**18  # tokens of a context: a block that is longer, or more copies, cannot be met
KEYS = ("max_pattern_size", "min_pattern_size", "min_count")


@dataclass(frozen=True)
class RepetitionSettings:
    """When a reply counts as collapsed: what it ends with is one block, again and again.

    The defaults let pass what people ask for: a row of a table, a line of code or zeros in a list repeat too, but
    rarely eight times and for 128 tokens without any difference.
    """

    max_pattern_size: int = 64  # tokens of the longest block
    min_pattern_size: int = 1  # of the shortest; a block that is itself a repetition counts as what it repeats
    min_count: int = 8  # copies of the block
    min_tokens: int = 128  # of all copies together


def parse_repetition_detection(value: object) -> RepetitionSettings | None:
    """ "auto", "off" or a dict as vLLM takes it -> settings, None for off.

    A dict has max_pattern_size (0 switches it off), min_count (at least 2) and, if wanted, min_pattern_size (0 means
    1), and nothing else counts: no least number of tokens. ValueError for anything else.
    """
    if isinstance(value, str):
        if value not in ("auto", "off"):
            raise ValueError(f"repetition_detection is {shown(value)}; expected 'auto', 'off' or a dict")
        return RepetitionSettings() if value == "auto" else None
    if not isinstance(value, Mapping):
        raise ValueError(f"repetition_detection is {a(value)}; expected 'auto', 'off' or a dict")
    for key in value:
        if key not in KEYS:
            raise ValueError(f"repetition_detection has the key {shown(key)}; expected {', '.join(KEYS)}")
    longest, shortest, count = (whole(value, key) for key in KEYS)
    if shortest > longest:
        raise ValueError(
            f"repetition_detection has min_pattern_size {shown(shortest)} and max_pattern_size {shown(longest)}; "
            "expected the smaller one first, or both 0 for no detection"
        )
    if longest == 0:
        return None
    if count < 2:
        raise ValueError(f"repetition_detection has min_count {shown(count)}; expected at least 2")
    return RepetitionSettings(longest, max(shortest, 1), count, min_tokens=0)


def whole(settings: Mapping[str, object], key: str) -> int:
    number = settings.get(key, 0)
    if not isinstance(number, Integral) or isinstance(number, bool) or not 0 <= int(number) < 2**31:
        raise ValueError(
            f"repetition_detection has {key} {shown(number)}; expected a whole number, 0 or more and below 2**31"
        )
    return int(number)


class Repetition:
    """Watches one reply, given token by token, whatever the tokens say: thoughts and tool calls count too.

    A token takes O(max_pattern_size), in four passes over an array.
    """

    def __init__(self, settings: RepetitionSettings):
        self.found: tuple[int, int] | None = None  # tokens of the block, and of what repeats it
        self.shortest = settings.min_pattern_size
        longest = min(settings.max_pattern_size, LONGEST)
        sizes = np.arange(1, longest + 1)
        # How many tokens must be equal to the one a block before: the first copy has nothing to be equal to.
        copies = sizes * (min(settings.min_count, LONGEST) - 1)
        self.needed = np.maximum(copies, settings.min_tokens - sizes)  # by size - 1
        self.equal = np.zeros(longest, np.int64)  # by size - 1: how many of the last tokens were
        self.past = np.zeros(2 * longest, np.int64)  # the latest tokens, in their order
        self.end = 0  # of them

    def feed(self, ids: Sequence[int]) -> int | None:
        """How many of these next ids it takes until the reply counts as collapsed; None if it does not."""
        for index, token in enumerate(ids):
            if self.add(token):
                return index + 1
        return None

    def add(self, token: int) -> bool:
        longest = len(self.equal)
        if self.end == len(self.past):
            self.past[:longest] = self.past[longest:]
            self.end = longest
        before = self.past[max(self.end - longest, 0) : self.end][::-1]
        equal = self.equal[: len(before)]
        equal += 1
        equal *= before == token
        self.past[self.end] = token
        self.end += 1
        enough = np.flatnonzero(equal >= self.needed[: len(before)])
        # Of a block that repeats a shorter one, the shorter is among these too, or below min_pattern_size.
        for size in (enough + 1).tolist():
            if size >= self.shortest and self.is_primitive(size):
                self.found = size, size + int(equal[size - 1])
                return True
        return False

    def is_primitive(self, size: int) -> bool:
        """Whether the last `size` tokens are no repetition of a shorter block."""
        return not any(size % part == 0 and self.equal[part - 1] >= size - part for part in range(1, size // 2 + 1))

    def note(self) -> str:
        """What a reply that ended here says about it."""
        if self.found is None:
            raise ValueError("no repetition was found")
        size, tokens = self.found
        block = "1 token" if size == 1 else f"a block of {size} tokens"
        return (
            f"the reply repeated {block} {tokens // size} times and was ended; repetition_detection 'off' lets it go on"
        )
