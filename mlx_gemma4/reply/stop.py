"""Where an answer ends because of a text in it."""

from collections.abc import Sequence
from typing import Any

from mlx_gemma4.errors import a, shown


def check_stop(stop: Any) -> tuple[str, ...]:
    """The texts that end an answer; one may be given alone. ValueError for what is none."""
    given = (stop,) if isinstance(stop, str) else stop
    if not isinstance(given, (list, tuple)):
        raise ValueError(f"stop is {a(stop)}; expected a list of strings")
    for index, text in enumerate(given):
        if not isinstance(text, str) or not text:
            raise ValueError(f"stop[{index}] is {shown(text)}; expected a string of at least one character")
    return tuple(given)


class StopTexts:
    """Takes an answer in pieces, however it is cut, and gives out what stands before the first of these texts.

    `found`, that text, once its place is known: of two texts that overlap, not before the one that begins first is
    whole, or none.
    """

    def __init__(self, texts: Sequence[str]):
        self.texts, self.longest = texts, max(map(len, texts), default=0)
        self.held = ""  # that may be the beginning of one of them
        self.found = ""

    def feed(self, text: str, *, last: bool = False) -> str:
        """What is to be given out now; last: nothing follows."""
        if self.found or not self.texts:
            return "" if self.found else text
        held = self.held + text
        end, text = min(((place, own) for own in self.texts if (place := held.find(own)) >= 0), default=(len(held), ""))
        begun = end if last else next((place for place in self.places(held) if place < end), end)
        self.found = text if begun == end else ""
        self.held = "" if self.found else held[begun:]
        return held[:begun]

    def places(self, held: str) -> Sequence[int]:
        """Where in it a text begins that is not whole yet."""
        first = max(0, len(held) - self.longest + 1)
        return [place for place in range(first, len(held)) if any(own.startswith(held[place:]) for own in self.texts)]
