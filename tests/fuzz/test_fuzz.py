"""A small, seeded share of every kind of odd input, and that what must not happen is seen."""

import time
from collections.abc import Iterator
from importlib import import_module
from pathlib import Path

import pytest

from . import inputs
from .harness import KINDS, Worker, hunt

SEED = 18
# Kinds with faults that are known and not yet mended, and what these are; each line goes with the last of them.
OPEN: dict[str, str] = {
    "calls": "keys of white space, or with some at an end, are written without quotes",
}


@pytest.fixture(scope="module")
def worker() -> Iterator[Worker]:
    with Worker() as own:
        yield own


@pytest.mark.parametrize("kind", KINDS)
def test_odd_inputs_are_taken_or_refused_in_one_line(kind: str, worker: Worker, tmp_path: Path) -> None:
    if kind in OPEN:
        pytest.skip(OPEN[kind])
    share = import_module(f".{kind}", __package__).SHARE
    tally = hunt(kind, SEED, share, worker, until=time.monotonic() + 600)
    told = [
        f"{where}\n{result.detail}\npython -m tests.fuzz --repeat {inputs.save(tmp_path, kind, value)}"
        for where, (value, result) in tally.faults.items()
    ]
    assert not told, "\n\n".join(told)
    assert sum(tally.outcomes.values()) >= share
    assert tally.outcomes["right"], "every input was refused: the kind tries nothing"


def test_what_must_not_happen_is_seen_and_the_next_input_is_tried() -> None:
    expected = {
        "raise": "KeyError in the check itself",
        "exit": "SystemExit in the check itself",
        "warn": "RuntimeWarning of a library",
        "refuse": "MediaError of a library",
        "print": "a line on a stream: library: # things",
        "die": "died with status -6",
        "grow": "more than 0.2 GB",
        "sleep": "more than 1 s",
    }
    with Worker(seconds=1, most_bytes=2 * 10**8) as own:
        for do, where in expected.items():
            result = own.attempt("faulty", {"do": do})
            assert result.outcome == "fault" and result.where.startswith(where)
        assert own.attempt("faulty", {"do": "nothing"}).outcome == "right"


def test_a_failing_input_is_made_small_and_saved(worker: Worker, tmp_path: Path) -> None:
    tally = hunt("faulty", 0, 50, worker, until=time.monotonic() + 600)
    value, _ = tally.faults["too many"]
    assert value["number"] == 1235
    path = inputs.save(tmp_path, "faulty", value)
    assert worker.attempt("faulty", inputs.unpack(path.read_bytes())).where == "too many"
    assert tally.seen["too many"] > 1 and sum(tally.outcomes.values()) >= 50


@pytest.mark.parametrize("value", [{"data": b"\x00\xff", "a": [1, None, {"b": "é\ud800"}]}, [], 10**400, "x"])
def test_an_input_is_read_as_it_was_written(value: object) -> None:
    assert inputs.unpack(inputs.pack(value)) == value
