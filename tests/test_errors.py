"""Errors: whose fault they are, and values quoted in one short line."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from mlx_gemma4.errors import CheckpointError, FetchError, Kind, MediaError, a, kind, one_line, shown, with_name


@pytest.mark.parametrize("error", [ValueError("x"), CheckpointError("x"), MediaError("x")])
def test_a_wrong_request_is_its_senders_fault(error: Exception) -> None:
    assert kind(error) is Kind.WRONG_REQUEST


@pytest.mark.parametrize("error", [FetchError("x"), OSError("x"), ConnectionError("x"), MemoryError(), RuntimeError()])
def test_what_failed_is_not(error: Exception) -> None:
    assert kind(error) is Kind.FAILED


VALUES = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text() | st.binary(),
    lambda inner: st.lists(inner) | st.dictionaries(st.text(), inner) | st.tuples(inner),
)


@given(VALUES)
def test_a_value_is_shown_in_one_short_line(value: object) -> None:
    assert len(shown(value).splitlines()) == 1
    assert len(shown(value)) < 1000


class Unprintable:
    def __repr__(self) -> str:
        raise RuntimeError("no")


@pytest.mark.parametrize(
    "value",
    [10**400, -(10**5000), [10**5000], b"x" * 10**6, "x" * 10**6, np.zeros((300, 300)), Unprintable()],
    ids=["long", "longer", "listed", "bytes", "text", "array", "unprintable"],
)
def test_a_value_that_python_does_not_write_in_a_line_is_shown_short(value: object) -> None:
    assert len(shown(value).splitlines()) == 1
    assert len(shown(value)) < 200


def test_an_error_without_words_is_named_by_its_type() -> None:
    assert one_line(KeyError()) == "KeyError"
    assert one_line(FileNotFoundError(2, "No such file or directory", "x")) == "No such file or directory"


def test_the_system_s_error_is_the_file_and_the_cause_in_words() -> None:
    assert with_name(FileNotFoundError(2, "No such file or directory", "x")) == "'x': No such file or directory"
    assert with_name(OSError(28, "No space left on device")) == "No space left on device"
    assert with_name(OSError("own words")) == "own words" and with_name(ValueError("two\nlines")) == "two lines"
    assert with_name(OSError()) == "OSError" and with_name(OSError(300 * "x")) == 300 * "x"
    assert len(with_name(OSError(36, "File name too long", "x" * 3000))) < 500


def test_types_are_named_with_their_article() -> None:
    assert [a(value) for value in (None, 1, [], "")] == ["None", "an int", "a list", "a str"]
