"""Benchmarks of one model on several machines, which here are processes: the first one reports for all."""

import json
from pathlib import Path
from typing import Any

import mlx.core as mx
import pytest
from machines import patience, run_on

pytestmark = pytest.mark.skipif(not mx.distributed.is_available("ring"), reason="MLX was built without its ring")

SCRIPTS = Path(__file__).parents[2] / "benchmarks"
SIZES = ("--prompt-tokens", 20, "--max-tokens", 8, "--repeats", 1)


@pytest.mark.parametrize(
    ("script", "options", "rows"),
    [
        ("decode.py", ("--split", "tensors"), 1),
        ("speculate.py", ("--split", "layers"), 2),
        ("batch.py", ("--split", "tensors", "--requests", 2, "--load", "short"), 3),
    ],
)
def test_one_of_the_machines_reports(
    script: str, options: tuple[object, ...], rows: int, split_folder: Path, tmp_path: Path
) -> None:
    command = [SCRIPTS / script, "--model", split_folder, *SIZES, *options]
    machines = run_on([*map(str, command)], 2, tmp_path / "hosts.json")
    with patience(machines):
        ends = [machine.communicate() for machine in machines]
    assert [machine.returncode for machine in machines] == [0, 0], ends
    found: dict[str, Any] = json.loads(ends[0][0].splitlines()[-1])
    assert f"{found['benchmark']}.py" == script and len(found["results"]) == rows
    assert ends[1][0] == ""
