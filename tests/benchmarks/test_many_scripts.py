"""Scripts that time drafts, at toy size: they run, and say what they should."""

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

SCRIPTS = Path(__file__).parents[2] / "benchmarks"


def benchmark(name: str, *args: object) -> subprocess.CompletedProcess[str]:
    call = [sys.executable, str(SCRIPTS / name), *map(str, args)]
    # without a compiler no kernels are built, which would take longer than all the rest
    return subprocess.run(call, capture_output=True, text=True, timeout=300, env=os.environ | {"PATH": ""})


def results(name: str, *args: object) -> Any:
    done = benchmark(name, *args)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout.splitlines()[-1])["results"]


@pytest.fixture
def sizes(planted_folder: Path) -> list[object]:
    return ["--model", planted_folder, "--prompt-tokens", 4, "--max-tokens", 16, "--repeats", 1]


def test_each_load_is_decoded_by_each_way(sizes: list[object]) -> None:
    found = results("batch.py", *sizes, "--requests", 1, "--requests", 3, "--rate", 100)
    ours = [row for row in found if row["way"] != "mlx-vlm"]
    ways = [(row["load"], row["requests"], row["way"]) for row in ours]
    loads = ("short", "mixed", "arrivals")
    assert ways == [(load, count, way) for load in loads for count in (1, 3) for way in ("0", "3", "auto")]
    tokens = {"short": {1: 16, 3: 48}, "mixed": {1: 16, 3: 28}, "arrivals": {1: 16, 3: 28}}
    assert all(row["tokens"] == tokens[row["load"]][row["requests"]] for row in found)
    for row in found:
        assert row["tokens_per_second"] > 0 and row["rate_p50"] > 0 and 0 < row["first_p50"] <= row["first_p99"]
        assert row["times_plain"] == 1 if row["way"] == "0" else row["times_plain"] > 0
    assert all(0 < row["acceptance"] < 1 for row in ours if row["way"] == "3")  # the drafter is planted


def test_what_cannot_be_timed_is_one_line(tiny_folder: Path, sizes: list[object]) -> None:
    for args, message in (
        (["--model", tiny_folder], "has no drafter; expected one in its folder"),
        ([*sizes, "--load", "long"], "load is 'long'; expected short, mixed, arrivals"),
    ):
        done = benchmark("batch.py", *args)
        assert (done.returncode, done.stdout) == (1, "")
        assert message in done.stderr and done.stderr.startswith("error: ") and done.stderr.count("\n") == 1


@pytest.mark.parametrize(("acceptance", "tokens_per_round"), [(0, 1), (1, 4)])
def test_simulated_acceptance_is_what_was_asked_for(
    sizes: list[object], acceptance: int, tokens_per_round: int
) -> None:
    found = results("speculate.py", *sizes, "--length", 3, "--acceptance", acceptance)
    assert found["3"]["acceptance_by_position"] == [acceptance] * 3
    assert found["3"]["tokens_per_round"] == pytest.approx(tokens_per_round, rel=0.1)
