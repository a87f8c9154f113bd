"""Texts that end an answer: found however the answer is cut into pieces."""

import random
from typing import Any

import pytest

from mlx_gemma4.reply.stop import StopTexts, check_stop


def before(text: str, stop: tuple[str, ...]) -> str:
    return text[: min((text.find(own) for own in stop if own in text), default=len(text))]


@pytest.mark.parametrize("seed", range(200))
def test_an_answer_ends_before_the_first_text_however_it_is_cut(seed: int) -> None:
    rng = random.Random(seed)
    text = "".join(rng.choices("ab\né", k=rng.randint(0, 40)))
    stop = tuple("".join(rng.choices("ab\né", k=rng.randint(1, 6))) for _ in range(rng.randint(0, 3)))
    found, given, rest = StopTexts(stop), list[str](), text
    while rest and not found.found:
        cut = rng.randint(1, 5)
        given.append(found.feed(rest[:cut]))
        rest = rest[cut:]
        assert before(text, stop).startswith("".join(given))
    given.append(found.feed("", last=True))
    assert "".join(given) == before(text, stop)
    assert bool(found.found) == any(own in text for own in stop)


def test_no_more_is_held_back_than_may_begin_such_a_text() -> None:
    found = StopTexts(["END", "\n\n"])
    assert [found.feed(piece) for piece in ("Em", " E", "N", "d\n", "x", "\n")] == ["Em", " ", "", "ENd", "\nx", ""]
    assert not found.found


@pytest.mark.parametrize(("stop", "texts"), [((), ()), ("x", ("x",)), (["a", "b"], ("a", "b"))])
def test_one_text_may_be_given_alone(stop: Any, texts: tuple[str, ...]) -> None:
    assert check_stop(stop) == texts


@pytest.mark.parametrize(
    ("stop", "message"),
    [
        ("", r"^stop\[0\] is ''; expected a string of at least one character$"),
        (["a", ""], r"^stop\[1\] is ''; expected a string of at least one character$"),
        ([3], r"^stop\[0\] is 3; expected a string of at least one character$"),
        ({"a": 1}, "^stop is a dict; expected a list of strings$"),
        (None, "^stop is None; expected a list of strings$"),
    ],
)
def test_anything_else_is_refused(stop: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        check_stop(stop)
