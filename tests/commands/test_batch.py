"""The command mlx_gemma4.batch: every line of IN has one line of OUT, whatever happens on the way."""

import fcntl
import json
import os
import random
import re
import resource
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from adapters import random_adapter
from conftest import Run
from toy_checkpoint import TINY

from mlx_gemma4 import Sampling, generate, load
from mlx_gemma4.commands import batch
from mlx_gemma4.commands.batch import main
from mlx_gemma4.model.model import Model
from mlx_gemma4.prompt.processor import Processor
from mlx_gemma4.terminal import awake
from mlx_gemma4.weights.adapter import write_adapter
from mlx_gemma4.weights.load import DEMO

Loaded = tuple[Model, Processor]
GREEDY = Sampling(temperature=0)


@pytest.fixture
def run(in_process: Callable[..., Run]) -> Run:
    return in_process("mlx_gemma4.batch", main)


def question(custom_id: str, content: Any, **body: Any) -> dict[str, Any]:
    own = {"model": "gemma", "temperature": 0, "max_tokens": 6, "messages": [{"role": "user", "content": content}]}
    return {"custom_id": custom_id, "method": "POST", "url": "/v1/chat/completions", "body": own | body}


def write(path: Path, lines: list[Any]) -> Path:
    path.write_text("".join(line if isinstance(line, str) else json.dumps(line) + "\n" for line in lines))
    return path


def answers_in(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def text_of(answer: dict[str, Any]) -> str:
    return str(answer["response"]["body"]["choices"][0]["message"]["content"])


def test_each_line_gets_what_generate_gives_in_openais_format(
    run: Run, tiny_folder: Path, tiny: Loaded, tmp_path: Path
) -> None:
    shutil.copy(DEMO / "samples" / "shapes.png", tmp_path)
    seen = [{"type": "image_url", "image_url": {"url": "shapes.png"}}, {"type": "text", "text": "what"}]
    lines = [question("a", "the quick"), question("b", seen), question("c", "model", max_completion_tokens=3)]
    source, target = write(tmp_path / "in.jsonl", lines), tmp_path / "out.jsonl"
    status, out, _ = run(source, target, "--model", tiny_folder, "--max-batch", "2")
    assert (status, out) == (0, "")
    found = {answer["custom_id"]: answer for answer in answers_in(target)}
    assert sorted(found) == ["a", "b", "c"]
    pictured = [{"role": "user", "content": [{"type": "image", "image": str(tmp_path / "shapes.png")}, seen[1]]}]
    for custom_id, request, limit in (("a", "the quick", 6), ("b", pictured, 6), ("c", "model", 3)):
        alone, answer = generate(*tiny, request, max_tokens=limit, sampling=GREEDY), found[custom_id]
        assert set(answer) == {"id", "custom_id", "response", "error"}
        assert (answer["error"], answer["response"]["status_code"]) == (None, 200)
        body = answer["response"]["body"]
        assert (body["object"], body["model"]) == ("chat.completion", str(tiny_folder))
        assert text_of(answer) == alone.text
        assert body["choices"][0]["finish_reason"] == alone.finish_reason
        assert body["usage"]["total_tokens"] == alone.stats.prompt_tokens + alone.stats.generation_tokens


def test_an_adapter_is_the_models(run: Run, tiny_folder: Path, tmp_path: Path) -> None:
    write_adapter(tmp_path / "own", random_adapter(TINY), "lora", 3, 2.0, -1)
    source, target = write(tmp_path / "in.jsonl", [question("a", "the quick")]), tmp_path / "out.jsonl"
    assert run(source, target, "--model", tiny_folder, "--adapter", tmp_path / "own")[0] == 0
    loaded = load(tiny_folder, adapter=tmp_path / "own")
    alone = generate(*loaded, "the quick", max_tokens=6, sampling=GREEDY).text
    assert text_of(answers_in(target)[0]) == alone
    lines = [question(name, "the quick", model=name) for name in ("mine", "base", "yours")]
    write(source, lines)
    target.unlink()
    assert run(source, target, "--model", tiny_folder, "--adapter", f"mine={tmp_path / 'own'}")[0] == 0
    found = {answer["custom_id"]: answer for answer in answers_in(target)}
    assert (text_of(found["mine"]), found["mine"]["response"]["body"]["model"]) == (alone, "mine")
    assert text_of(found["base"]) == generate(*load(tiny_folder), "the quick", max_tokens=6, sampling=GREEDY).text
    assert "model is 'yours'; expected" in found["yours"]["error"]["message"]


WRONG: list[tuple[Any, str | None, str]] = [  # a line, its custom_id in OUT, what is said of it
    ("nonsense\n", None, "line 2 is not JSON: Expecting value"),
    ('{"custom_id": "x"\n', None, "line 3 is not JSON"),
    ("[" * 100_000 + "\n", None, "line 4 is not JSON"),
    ([1], None, "line 5: it is a list; expected an object with custom_id, method, url and body"),
    (question("x", "a") | {"custom_id": 7}, None, "line 6: custom_id is 7; expected a string"),
    (question("b", "a") | {"method": "GET"}, "b", "line 7: method is 'GET'; expected POST"),
    (question("c", "a") | {"url": "/v1/embeddings"}, "c", "expected /v1/chat/completions"),
    (question("d", "a") | {"body": [2]}, "d", "the body is a list; expected an object"),
    (question("e", "a", max_tokens=0), "e", "max_tokens is 0; expected a whole number, 1 or more"),
    (question("f", "a", max_token=3), "f", "the body has the key 'max_token'"),
    (question("g", [{"type": "image_url", "image_url": {"url": "no.png"}}]), "g", "no.png' does not exist"),
    (question("h", [{"type": ["image"]}]), "h", "has the type ['image']; expected text, image, audio or video"),
    (question("i", "a", messages=[]), "i", "messages is empty"),
    (question("j", "a" * 20_000), "j", "the prompt has 20013 tokens; the context holds"),
    (question("\ud800", "a", n=2), "\ud800", "n is 2; expected 1"),
]


def test_a_wrong_line_is_an_error_of_that_line_alone(run: Run, tiny_folder: Path, tmp_path: Path) -> None:
    lines = ["\n", *(line for line, *_ in WRONG), question("right", "the")]
    source, target = write(tmp_path / "in.jsonl", lines), tmp_path / "out.jsonl"
    status, out, err = run(source, target, "--model", tiny_folder)
    assert (status, out) == (0, "")
    assert f"{len(WRONG) + 1} lines answered, {len(WRONG)} of them with an error" in err
    found = answers_in(target)
    [right] = [answer for answer in found if answer["error"] is None]
    assert (right["custom_id"], right["response"]["status_code"]) == ("right", 200)
    for _, custom_id, message in WRONG:
        [wrong] = [answer for answer in found if answer["error"] and message in answer["error"]["message"]]
        assert wrong["custom_id"] == custom_id
        assert "\n" not in wrong["error"]["message"] and len(wrong["error"]["message"]) < 300
        assert wrong["response"]["status_code"] == 400
        assert wrong["response"]["body"] == {"error": wrong["error"]}


def test_a_custom_id_is_answered_once(run: Run, tiny_folder: Path, tmp_path: Path) -> None:
    same = question("a", "the")
    source, target = write(tmp_path / "in.jsonl", [same, same, question("a", "quick")]), tmp_path / "out.jsonl"
    assert run(source, target, "--model", tiny_folder)[0] == 0
    found = answers_in(target)
    assert [answer["custom_id"] for answer in found] == ["a"] * 3
    assert len({answer["id"] for answer in found}) == 3
    wrong = [answer["error"]["message"] for answer in found if answer["error"]]
    assert sorted(text.split(";")[0] for text in wrong) == [
        f"line {number}: custom_id is 'a', as in a line before" for number in (2, 3)
    ]


def test_what_is_in_out_is_not_asked_again(run: Run, tiny_folder: Path, tmp_path: Path) -> None:
    lines = [question(str(number), "the" * number) for number in range(1, 5)]
    source, target = write(tmp_path / "in.jsonl", lines), tmp_path / "out.jsonl"
    assert run(source, target, "--model", tiny_folder)[0] == 0
    first, second, third, _ = whole = target.read_text().splitlines(keepends=True)
    marked = first.replace('"status_code": 200', '"status_code": 299')
    target.write_text(marked + second + third[: len(third) // 2])
    write(source, [*lines, question("5", "quick")])
    status, _, err = run(source, target, "--model", tiny_folder)
    assert status == 0 and "3 lines answered, 0 of them with an error; 2 were before" in err
    assert target.read_text().startswith(marked + second)
    assert sorted(answer["custom_id"] for answer in answers_in(target)) == ["1", "2", "3", "4", "5"]
    assert {text_of(answer) for answer in answers_in(target)} >= {text_of(json.loads(line)) for line in whole}
    assert run(source, target, "--model", "nowhere")[0] == 0  # nothing is left to do


def test_a_kill_at_any_moment_costs_no_line_and_doubles_none(tiny_folder: Path, tmp_path: Path) -> None:
    count, kills = 80, 3
    lines = [question(f"{number}", f"the quick {number}", max_tokens=4) for number in range(count)]
    source, target = write(tmp_path / "in.jsonl", lines), tmp_path / "out.jsonl"
    words = [sys.executable, "-m", "mlx_gemma4.batch", str(source), str(target), "--model", str(tiny_folder)]
    target.touch()
    rng = random.Random(0)
    for _ in range(kills):
        until = target.stat().st_size + rng.randrange(1, 12_000)
        with subprocess.Popen(words, stderr=subprocess.DEVNULL) as process:
            while process.poll() is None and target.stat().st_size < until:
                time.sleep(rng.random() / 100)
            process.kill()
        assert process.wait() == -signal.SIGKILL
    subprocess.run(words, check=True, timeout=60, stderr=subprocess.DEVNULL)
    found = answers_in(target)
    assert sorted(int(answer["custom_id"]) for answer in found) == list(range(count))
    assert all(answer["error"] is None for answer in found)


def test_files_that_will_not_do_are_one_line(run: Run, tiny_folder: Path, tmp_path: Path) -> None:
    source, target = write(tmp_path / "in.jsonl", [question("a", "the")]), tmp_path / "out.jsonl"
    other = write(tmp_path / "other.jsonl", [{"id": "batch_req_0", "custom_id": "b"}])
    os.mkfifo(tmp_path / "pipe")
    for first, second, message in (
        (tmp_path / "nowhere", target, "nowhere' cannot be read: No such file or directory"),
        (tmp_path, target, "cannot be read: Is a directory"),
        (source, tmp_path, "cannot be written to: Is a directory"),
        (source, Path("/dev/full"), "'/dev/full' is no file; expected one"),
        (source, tmp_path / "no" / "out.jsonl", "cannot be written to: No such file or directory"),
        (source, source, "line 1 of "),
        (source, other, "other.jsonl' answers no line of "),
        (source, tmp_path / "pipe", "pipe' cannot be written to: "),
    ):
        kept = second.read_bytes() if second.is_file() else None
        status, out, err = run(first, second, "--model", tiny_folder)
        assert (status, out) == (2, "")
        assert err.startswith("error: ") and err.count("\n") == 1 and message in err
        assert kept is None or second.read_bytes() == kept
    assert not target.exists()
    assert run(source, target, "--model", tiny_folder, "--max-batch", "17")[0] == 2


def test_a_pipe_is_refused_before_its_lines_are_lost(run: Run, tiny_folder: Path, tmp_path: Path) -> None:
    reading, writing = os.pipe()
    os.write(writing, json.dumps(question("a", "the")).encode())
    os.close(writing)
    status, out, err = run(Path(f"/dev/fd/{reading}"), tmp_path / "out.jsonl", "--model", tiny_folder)
    os.close(reading)
    assert (status, out) == (2, "") and err.count("\n") == 1
    assert f"'/dev/fd/{reading}' is a pipe; expected a file" in err
    assert not (tmp_path / "out.jsonl").exists()


def test_two_processes_do_not_share_a_file(run: Run, tiny_folder: Path, tmp_path: Path) -> None:
    source, target = write(tmp_path / "in.jsonl", [question("a", "the")]), tmp_path / "out.jsonl"
    with target.open("wb") as held:
        fcntl.flock(held, fcntl.LOCK_EX)
        status, _, err = run(source, target, "--model", tiny_folder)
    assert status == 2 and "is being written to by another process" in err
    assert target.read_bytes() == b""


def test_a_full_disk_ends_it_at_once(
    run: Run, tiny_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    lines = [question(str(number), "the", max_tokens=100) for number in range(10)]
    source, target = write(tmp_path / "in.jsonl", [question("a", "the", n=2), *lines]), tmp_path / "out.jsonl"

    def full(answer: Any) -> str:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(batch.json, "dumps", full)
    status, _, err = run(source, target, "--model", tiny_folder)
    assert status == 1 and "No space left on device" in err
    assert target.read_bytes() == b""


def test_a_file_that_takes_no_more_is_named(tmp_path: Path) -> None:
    target, before = tmp_path / "out.jsonl", resource.getrlimit(resource.RLIMIT_FSIZE)
    with batch.opened(target) as out:
        resource.setrlimit(resource.RLIMIT_FSIZE, (1000, before[1]))
        try:
            with pytest.raises(OSError, match=f"^{re.escape(repr(str(target)))} cannot be written to: File too large$"):
                batch.append(out, target, {"text": 2000 * "x"})
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, before)
    assert target.stat().st_size == 1000  # half a line at the end, which the next call cuts off


def test_a_mac_stays_awake_and_its_screen_need_not(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    told = tmp_path / "told"
    fake = tmp_path / "caffeinate"
    fake.write_text(f'#!/bin/sh\necho "$@" > {told}.new; mv {told}.new {told}; exec sleep 60\n')
    fake.chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path), prepend=os.pathsep)
    with awake():
        pass
    assert not told.exists()
    monkeypatch.setattr(sys, "platform", "darwin")
    with awake():
        while not told.exists():
            time.sleep(0.01)
    assert told.read_text().split() == ["-is", "-w", str(os.getpid())]
