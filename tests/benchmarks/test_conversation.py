"""A conversation is read once where there is a store, in this process, from disk, and by a server."""

import json
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from benchmarks.test_many_scripts import benchmark

sys.path.insert(0, str(Path(__file__).parents[2] / "benchmarks"))
import serve

SIZES = ["--turns", 3, "--first-tokens", 40, "--tokens", 5, "--max-tokens", 4]


@pytest.fixture
def server(tiny_folder: Path) -> Iterator[str]:
    with serve.server(str(tiny_folder), 8) as port:
        yield f"http://127.0.0.1:{port}"


def test_what_was_read_is_not_read_again(tiny_folder: Path, server: str) -> None:
    done = benchmark("conversation.py", "--model", tiny_folder, *SIZES, "--server", f"over HTTP={server}")
    assert done.returncode == 0, done.stderr
    series = json.loads(done.stdout.splitlines()[-1])["series"]
    assert [*series] == ["no store", "store", "disk, a process each turn", "over HTTP"]
    for name, turns in series.items():
        shares = [turn["read_tokens"] / turn["prompt_tokens"] for turn in turns]
        assert shares[0] == 1 and all(turn["time_to_first_token"] > 0 for turn in turns)
        assert all(share == 1 if name == "no store" else share < 0.7 for share in shares[1:])


def test_a_server_that_is_none_is_one_line(tiny_folder: Path, server: str) -> None:
    for url in (server + "/nowhere", "here"):
        done = benchmark("conversation.py", "--model", tiny_folder, *SIZES, "--server", f"x={url}")
        assert done.returncode == 1 and "expected NAME=http://HOST:PORT" in done.stderr
        assert done.stderr.count("\n") == 1


def test_engine_and_server_say_as_much_in_turns(tiny_folder: Path) -> None:
    sizes = ["--clients", 2, "--requests", 3, "--repeats", 2, "--tokens", 2, "--max-tokens", 5]
    done = benchmark("serve.py", "--model", tiny_folder, *sizes)
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout.splitlines()[-1])
    assert found["engine"]["tokens"] == found["server"]["tokens"] > 0 and len(found["ratios"]) == 2
    assert found["engine"]["first_cached"] > 0 and found["server"]["first_cached"] > 0
