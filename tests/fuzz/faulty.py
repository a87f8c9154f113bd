"""A kind whose inputs do what none may, for the tests of what finds such."""

import os
import sys
import time
import warnings
from typing import Any

from hypothesis import strategies as st

from .judge import check as must
from .judge import check_refusal
from .surface import MediaError

SHARE = 0
kept: list[bytes] = []


def prepare() -> None:
    pass


def strategy() -> st.SearchStrategy[Any]:
    return st.integers(0, 10**6).map(lambda number: {"do": "many" if number > 1234 else "nothing", "number": number})


def check(value: Any) -> str | None:
    what = value["do"]
    if what == "die":
        os.abort()
    elif what == "print":
        os.write(2, b"library: 3 things\n")
    elif what == "raise":
        dict[str, int]()["a"]
    elif what == "many":
        must(False, "too many")
    elif what == "sleep":
        while True:
            time.sleep(0)
    elif what == "grow":
        kept.append(b"a" * 10**9)
        time.sleep(5)
    elif what == "exit":
        sys.exit(3)
    elif what == "warn":
        warnings.warn("overflow", RuntimeWarning, stacklevel=1)
    elif what == "refuse":
        try:
            raise MediaError("not one of ours: the line is in no file of the package")
        except MediaError as error:
            check_refusal(error, (MediaError,))
    return None
