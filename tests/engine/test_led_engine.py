"""One engine over machines that share a model gives what it gives on one; here they are processes."""

import json
import signal
from collections.abc import Callable, Iterator
from pathlib import Path
from subprocess import TimeoutExpired
from typing import Any

import mlx.core as mx
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from machines import FAILING, LINES, PATIENCE, WAYS, Machine, outcome, patience, started

from mlx_gemma4 import Engine, PromptStore, load
from mlx_gemma4.model.split import SPLITS

pytestmark = pytest.mark.skipif(not mx.distributed.is_available("ring"), reason="MLX was built without its ring")

IDS = [2, *(110 + 7 * number % 300 for number in range(200))]
CROWDED = """
import json, sys
import mlx.core as mx
from machines import outcome
from mlx_gemma4 import Engine, load
from mlx_gemma4.engine import engine as module
group = mx.distributed.init(strict=True, backend="ring")
model, processor = load(sys.argv[1], group=group)
limit = 10**6 // 10 ** (3 * group.rank())  # positions: the second machine is the smaller one
module.memory_limit, module.FORESEEN = lambda: limit, 8
module.check_memory = lambda *given: None
module.batch_bytes = lambda model, lengths, size, ahead: size * (max(lengths) + ahead) * 2.5
parked = []
class Watched(Engine):
    def park(self, work):
        parked.append(work)
        super().park(work)
with Watched(model, processor, max_batch=4) as engine:
    if group.rank():
        engine.follow()
    else:
        print(json.dumps(outcome(engine, json.loads(sys.stdin.readline()))))
print(len(parked))
"""
ALONE = """
import sys
import mlx.core as mx
import machines
from mlx_gemma4 import load
from mlx_gemma4.weights import peers
group = mx.distributed.init(strict=True, backend="ring")
peers.SILENCE = 10.0
if not group.rank():
    machines.fail_on_purpose = lambda: None
machines.answer_lines(*load(sys.argv[1], group=group), group.rank())
"""
Ask = Callable[[list[dict[str, Any]]], list[Any]]


@pytest.fixture(scope="module", params=SPLITS)
def machines(
    request: pytest.FixtureRequest, split_folder: Path, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[list[Machine]]:
    found = started(LINES, 2, tmp_path_factory.mktemp("hosts") / "hosts.json", split_folder, request.param)
    assert found[0].stdout is not None and found[0].stdout.readline() == "ready\n"
    yield found
    for machine in found:
        machine.kill()
        machine.communicate()


def answers(machines: list[Machine], schedule: list[dict[str, Any]]) -> list[Any]:
    first = machines[0]
    assert first.stdin is not None and first.stdout is not None
    with patience(machines):
        first.stdin.write(json.dumps(schedule) + "\n")
        first.stdin.flush()
        line = first.stdout.readline()
    assert line, [machine.communicate() for machine in machines]
    found: list[Any] = json.loads(line)
    return found


@pytest.fixture(scope="module")
def alone(split_folder: Path) -> Ask:
    """What one machine gives, one request after the other."""
    loaded, known = load(split_folder), dict[str, Any]()

    def ask(schedule: list[dict[str, Any]]) -> list[Any]:
        for own in schedule:
            if (key := json.dumps(own)) not in known:
                with Engine(*loaded) as engine:
                    known[key] = outcome(engine, [own])[0]
        return [known[json.dumps(own)] for own in schedule]

    return ask


def request(way: str, first: int = 0, last: int = 60, max_tokens: int = 12, **rest: Any) -> dict[str, Any]:
    return {"ids": [2, *IDS[1 + first : last]], "way": way, "max_tokens": max_tokens, **rest}


def without_counts(found: list[Any]) -> list[Any]:
    """Of what was found in a store."""
    return [own[:2] if isinstance(own, list) else own for own in found]


FAILED = {"ids": [2, FAILING, *IDS[2:40]], "way": "auto", "max_tokens": 9}


def test_batched_seeded_drafted_held_and_told_replies_are_those_of_one_machine(
    machines: list[Machine], alone: Ask
) -> None:
    schedule = [request(way, first) for first, way in enumerate(WAYS)]
    assert without_counts(answers(machines, schedule)) == without_counts(alone(schedule))


def test_requests_that_are_left_or_fail_disturb_nobody(machines: list[Machine], alone: Ask) -> None:
    rest = [request("auto", 20, 90), request("seeded", 3, 40)]
    left = [request("greedy", 9, 50, 400, leave=number) for number in (0, 2)]
    found = answers(machines, [left[0], FAILED | {"ids": [2, FAILING, 9]}, rest[0], left[1], FAILED, rest[1]])
    assert found[1] == found[4] == "on purpose"
    assert without_counts([found[2], found[5]]) == without_counts(alone(rest))


def test_what_has_been_read_is_found_again_on_all(machines: list[Machine], split_folder: Path) -> None:
    longer = [request("greedy") | {"ids": [7, *IDS[1:last]]} for last in (190, 200)]
    with Engine(*load(split_folder), store=PromptStore()) as engine:
        expected = [outcome(engine, [own])[0] for own in longer]
    assert expected[1][2] > 0
    assert [answers(machines, [own])[0] for own in longer] == expected


def test_rows_are_parked_where_the_smallest_machine_has_no_room(split_folder: Path, alone: Ask, tmp_path: Path) -> None:
    found = started(CROWDED, 2, tmp_path / "hosts.json", split_folder)
    schedule = [request(way, 20, 60, 70) for way in ("greedy", "auto", "seeded", "told")]
    with patience(found):
        ends = [machine.communicate(json.dumps(schedule) + "\n") for machine in found]
    assert [machine.returncode for machine in found] == [0, 0], ends
    first, counts = json.loads(ends[0][0].splitlines()[0]), [output.splitlines()[-1] for output, _ in ends]
    assert without_counts(first) == without_counts(alone(schedule))
    assert counts[0] == counts[1] != "0"


requests = st.one_of(
    st.builds(request, st.sampled_from([*WAYS]), st.integers(0, 3), st.integers(20, 24), st.integers(1, 20)),
    st.builds(lambda way, pieces: request(way, 5, 150, 300, leave=pieces), st.sampled_from([*WAYS]), st.integers(0, 3)),
    st.just(FAILED),
)


@settings(max_examples=6, deadline=None, derandomize=True, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(schedule=st.lists(requests, min_size=2, max_size=6))
def test_whatever_is_asked_left_or_fails_all_go_on_alike(
    machines: list[Machine], alone: Ask, schedule: list[dict[str, Any]]
) -> None:
    found = without_counts(answers(machines, schedule))
    kept = [own for own in schedule if "leave" not in own and own != FAILED]
    assert [own for own in found if isinstance(own, list)] == without_counts(alone(kept))
    assert [own for own in found if not isinstance(own, list)] == [
        "on purpose" if own == FAILED else "left" for own in schedule if own not in kept
    ]


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGSTOP])
def test_a_machine_lost_in_the_middle_of_a_reply_ends_the_other(
    split_folder: Path, number: int, tmp_path: Path
) -> None:
    first, second = started(LINES, 2, tmp_path / "hosts.json", split_folder, "layers")
    try:
        assert first.stdin is not None and first.stdout is not None and first.stdout.readline() == "ready\n"
        first.stdin.write(json.dumps([request("auto", max_tokens=100_000)]) + "\n")
        first.stdin.flush()
        with pytest.raises(TimeoutExpired):
            second.wait(1)
        second.send_signal(number)
        _, error = first.communicate(timeout=PATIENCE)
        assert first.returncode == 1
        assert error.strip().splitlines()[-1].startswith("error: machine 127.0.0.1 is gone")
    finally:
        for machine in (first, second):
            machine.kill()
            machine.communicate()


def test_a_machine_that_fails_alone_says_so_and_ends_the_other(split_folder: Path, tmp_path: Path) -> None:
    first, second = started(ALONE, 2, tmp_path / "hosts.json", split_folder)
    with patience([first, second]):
        ends = [machine.communicate(json.dumps([FAILED]) + "\n") for machine in (first, second)]
    assert [first.returncode, second.returncode] == [1, 1], ends
    assert ends[1][1].splitlines()[-1] == "error: machine 1 failed alone: on purpose; expected the same on all"
    assert ends[0][1].splitlines()[-1].startswith("error: machine 127.0.0.1 is gone")


def test_the_first_follows_nobody_and_alone_is_asked(split_folder: Path) -> None:
    with (
        Engine(*load(split_folder)) as engine,
        pytest.raises(RuntimeError, match="this is machine 0; expected to follow"),
    ):
        engine.follow()
    engine.rank = 1
    with pytest.raises(
        RuntimeError, match="this is machine 1 of those that share the model; expected to ask machine 0"
    ):
        engine.submit("hello")


def test_when_the_first_is_done_so_are_the_others(machines: list[Machine]) -> None:
    ends = [machine.communicate(timeout=PATIENCE) for machine in machines]
    assert [machine.returncode for machine in machines] == [0, 0], ends
    assert [error for _, error in ends] == ["", ""]
