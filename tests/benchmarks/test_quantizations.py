"""benchmarks/quantizations.py, at toy size."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
from toy_checkpoint import Shape, tensors, write_checkpoint, write_drafter

SCRIPT = Path(__file__).parents[2] / "benchmarks" / "quantizations.py"
# Group sizes of 64 divide every matrix.
EVEN = Shape(hidden=128, mlp=128, heads=4, kv_heads=2, head_dim=32, global_head_dim=64)


def benchmark(*args: object) -> subprocess.CompletedProcess[str]:
    return subprocess.run(words(*args), capture_output=True, text=True, timeout=300)


def words(*args: object) -> list[str]:
    return [sys.executable, str(SCRIPT), *map(str, args)]


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = write_checkpoint(tmp_path_factory.mktemp("source") / "gemma", EVEN, plant=1.5)
    write_drafter(folder / "drafter", EVEN, 0, tensors(EVEN, 0, 1.5), planted=True)
    return folder


@pytest.fixture(scope="module")
def options(source: Path) -> list[object]:
    data = source.parent / "data.jsonl"
    line = {"messages": [{"role": "user", "content": "hello"}, {"role": "assistant", "content": "a quick fox"}]}
    data.write_text(json.dumps(line))
    return [source, "--data", data, "--prompt-tokens", 16, "--max-tokens", 8, "--repeats", 1, "--chats", 1]


def test_recipes_are_compared(options: list[object], tmp_path: Path) -> None:
    output = tmp_path / "results"
    done = benchmark(*options, "--output", output, "--recipes", "8bit, --q-bits 4 --q-group-size 32")
    assert done.returncode == 0, done.stderr
    found: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    eight, four = found["results"]
    assert (eight["recipe"], four["recipe"]) == ("8bit", "q-bits-4-q-group-size-32")
    assert eight["disk_bytes"] > four["disk_bytes"] > 0
    assert 0 < eight["kl_mean"] < four["kl_mean"]
    assert eight["positions"] == four["positions"] > 0
    assert eight["decode_tps"] > 0 and eight["mtp_tps"] > 0 and 0 <= eight["acceptance"] <= 1
    assert eight["peak_memory_bytes"] > eight["disk_bytes"] // 2
    assert "| 8bit |" in (output / "table.md").read_text() and "| 8bit |" in done.stdout
    assert (output / "chart.png").read_bytes().startswith(b"\x89PNG")
    assert not list((output / "models").iterdir())

    other = benchmark(*options, "--repeats", 2, "--output", output, "--recipes", "8bit")
    assert (other.returncode, other.stdout) == (1, "")
    assert "was measured with other options" in other.stderr and other.stderr.count("\n") == 1


def test_a_run_that_was_killed_goes_on_where_it_stopped(options: list[object], tmp_path: Path) -> None:
    call = words(*options, "--output", tmp_path, "--recipes", "8bit,4bit")
    running = subprocess.Popen(call, start_new_session=True, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    begun = tmp_path / "models" / "4bit"
    while not begun.exists() and running.poll() is None:
        time.sleep(0.01)
    os.killpg(running.pid, signal.SIGKILL)
    assert running.wait() == -signal.SIGKILL
    first, reference = tmp_path / "8bit.json", tmp_path / "reference.safetensors"
    assert not (tmp_path / "4bit.json").exists()
    assert not (tmp_path / "models" / "8bit").exists()
    first.write_text(json.dumps(json.loads(first.read_text()) | {"kl_mean": 0.5}))
    written = reference.stat().st_mtime_ns
    (begun / "model.safetensors").write_bytes(b"half of it")

    done = subprocess.run(call, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    eight, four = json.loads(done.stdout.splitlines()[-1])["results"]
    assert eight["kl_mean"] == 0.5  # as it was found
    assert four["kl_mean"] > 0 and four["decode_tps"] > 0  # from the beginning
    assert reference.stat().st_mtime_ns == written


@pytest.mark.parametrize(
    ("recipes", "message"),
    [
        ("--q-bits", "expected a name, or values for --q-bits, --q-group-size, --q-mode"),
        ("4bit, --q-bits many", "--q-bits is 'many'; expected a whole number"),
        ("--q-bits 7", "q-bits is 7; affine takes"),
        ("5bit", "recipe is '5bit'"),
        ("4bit,", "recipe is ''"),
    ],
)
def test_wrong_recipes_are_one_line(source: Path, tmp_path: Path, recipes: str, message: str) -> None:
    done = benchmark(source, "--output", tmp_path / "results", "--recipes", recipes)
    assert done.returncode == 1
    assert message in done.stderr and done.stderr.startswith("error: ") and done.stderr.count("\n") == 1
    assert not (tmp_path / "results").exists()


def test_a_quantized_source_is_refused_at_once(source: Path, options: list[object], tmp_path: Path) -> None:
    config = json.loads((source / "config.json").read_text()) | {"quantization": {"group_size": 64, "bits": 4}}
    own = tmp_path / "quantized"
    own.mkdir()
    (own / "config.json").write_text(json.dumps(config))
    done = benchmark(own, *options[1:], "--output", tmp_path / "out")
    assert done.returncode == 1 and "is quantized already; expected the original" in done.stderr
    assert not (tmp_path / "out").exists()
