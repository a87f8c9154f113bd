"""Commands in a terminal, in a pipe, and ended by a signal."""

import logging
import os
import pty
import random
import re
import select
import shlex
import shutil
import signal
import struct
import subprocess
import sys
import time
from fcntl import ioctl
from pathlib import Path
from termios import TIOCSWINSZ

import pyte
import pytest

import mlx_gemma4
from mlx_gemma4 import terminal
from mlx_gemma4.weights.load import DEMO

STORY = ["--model", "demo", "--prompt", "Tell me a story."]
COMMANDS = ["generate", "convert", "evaluate", "fit"]


def words(name: str, *rest: str) -> list[str]:
    return [sys.executable, "-m", f"mlx_gemma4.{name}", *rest]


def in_terminal(columns: int, rest: list[str], kind: str = "xterm") -> tuple[pyte.Screen, bytes, int]:
    """A session in a terminal for both streams: the screen at its end, what was written, the exit status."""
    master, slave = pty.openpty()
    ioctl(slave, TIOCSWINSZ, struct.pack("HHHH", 60, columns, 0, 0))
    environment = {name: value for name, value in os.environ.items() if name not in ("COLUMNS", "LINES")}
    running = subprocess.Popen(rest, stdout=slave, stderr=slave, stdin=slave, env=environment | {"TERM": kind})
    os.close(slave)
    screen, written = pyte.Screen(columns, 60), b""
    stream = pyte.ByteStream(screen)
    until = time.monotonic() + 120
    while time.monotonic() < until:
        if not select.select([master], [], [], 0.1)[0]:
            continue
        try:
            data = os.read(master, 65536)
        except OSError:  # Linux's way to say that the other end is closed
            break
        if not data:
            break
        written += data
        stream.feed(data)
    os.close(master)
    return screen, written, running.wait(30)


@pytest.mark.parametrize("columns", [40, 80, 200])
def test_above_the_answer_stand_whole_lines_only(columns: int) -> None:
    question = "What is 3 + 4?"
    screen, _, status = in_terminal(columns, words("generate", "--model", "demo", "--prompt", question, "--temp", "0"))
    assert status == 0
    lines = [line.rstrip() for line in screen.display]
    answer = lines.index("3 + 4 = 7.")
    above = " ".join("".join(lines[:answer]).split())
    assert above.replace(" ", "") == f"drafter: {DEMO / 'drafter'}".replace(" ", "")
    assert not screen.cursor.hidden


def test_a_thought_is_dim_and_the_answer_is_not() -> None:
    _, written, status = in_terminal(
        80, words("generate", "--model", "demo", "--prompt", "What is 3 + 4?", "--temp", "0", "--thinking")
    )
    assert status == 0
    _, dim, rest = written.partition(b"\x1b[2m")
    assert dim and rest.rfind(b"\x1b[22m") < rest.rfind(b"3 + 4 = 7.")


def test_a_terminal_that_draws_no_line_anew_shows_no_bar() -> None:
    question = words("generate", "--model", "demo", "--prompt", "What is 3 + 4?", "--temp", "0")
    _, written, status = in_terminal(200, question, "dumb")
    assert status == 0
    assert written.decode().splitlines()[:2] == [f"drafter: {DEMO / 'drafter'}", "3 + 4 = 7."]


def test_a_thought_in_a_file_has_no_escapes() -> None:
    done = subprocess.run(
        words("generate", *STORY, "--thinking", "--max-tokens", "9"), capture_output=True, timeout=120
    )
    assert b"\x1b" not in done.stderr + done.stdout


@pytest.mark.parametrize(
    "rest",
    [
        words("generate", *STORY),
        words("generate", "--help"),
        words("fit", str(DEMO)),
        words("convert", "--help"),
        words("evaluate", "--help"),
        [sys.executable, "-m", "mlx_gemma4"],
    ],
)
def test_a_reader_that_had_enough_is_no_error(rest: list[str]) -> None:
    read, write = os.pipe()
    os.close(read)
    done = subprocess.run(rest, stdout=write, stderr=subprocess.PIPE, timeout=120)
    os.close(write)
    assert done.returncode in (0, 141)
    assert all(line.startswith(b"drafter: ") for line in done.stderr.splitlines())


@pytest.mark.parametrize("name", [*COMMANDS, "chat"])
def test_every_command_knows_its_version(name: str) -> None:
    done = subprocess.run(words(name, "--version"), capture_output=True, text=True, timeout=60)
    assert (done.returncode, done.stdout, done.stderr) == (0, f"mlx_gemma4 {mlx_gemma4.__version__}\n", "")


def test_the_package_lists_its_commands() -> None:
    done = subprocess.run([sys.executable, "-m", "mlx_gemma4"], capture_output=True, text=True, timeout=60)
    assert done.returncode == 0
    assert {f"mlx_gemma4.{name}" for name in [*COMMANDS, "chat"]} <= set(done.stdout.split())


def test_the_package_knows_its_version_and_no_words() -> None:
    rest = [sys.executable, "-m", "mlx_gemma4"]
    done = subprocess.run([*rest, "--version"], capture_output=True, text=True, timeout=60)
    assert (done.returncode, done.stdout) == (0, f"mlx_gemma4 {mlx_gemma4.__version__}\n")
    done = subprocess.run([*rest, "chat"], capture_output=True, text=True, timeout=60)
    assert (done.returncode, done.stderr) == (
        2,
        "error: 'chat' is none of these; expected python -m mlx_gemma4.COMMAND\n",
    )


@pytest.mark.parametrize("closed", ["<&-", ">&-", "2>&-", "<&- >&- 2>&-"])
def test_streams_may_be_closed(closed: str) -> None:
    line = f"{shlex.join(words('generate', '-m', 'demo', '-p', 'What is 3 + 4?', '--temp', '0'))} {closed}"
    done = subprocess.run(["sh", "-c", line], capture_output=True, text=True, timeout=120)
    assert (done.returncode, done.stdout) == (0, "" if " >&-" in f" {closed}" else "3 + 4 = 7.\n")
    assert "Traceback" not in done.stderr


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="Linux has it")
@pytest.mark.parametrize("errors", ["2>/dev/full", "2> >(true)"])
def test_what_standard_error_does_not_take_costs_no_answer(errors: str) -> None:
    line = (
        f"{shlex.join(words('generate', '-m', 'demo', '-p', 'What is 3 + 4?', '--temp', '0', '--thinking'))} {errors}"
    )
    done = subprocess.run(["bash", "-c", line], capture_output=True, text=True, timeout=120)
    assert (done.returncode, done.stdout) == (0, "3 + 4 = 7.\n")


def test_short_options_are_those_of_model_and_prompt() -> None:
    rest = words("generate", "-m", "demo", "-p", "What is 3 + 4?", "--temp", "0")
    assert subprocess.run(rest, capture_output=True, timeout=120).stdout == b"3 + 4 = 7.\n"


def test_a_folder_for_temporary_files_that_is_none_is_named(tmp_path: Path) -> None:
    nowhere = tmp_path / "nowhere"
    done = subprocess.run(
        words("generate", *STORY),
        capture_output=True,
        text=True,
        timeout=120,
        env=os.environ | {"TMPDIR": str(nowhere)},
    )
    if done.returncode:  # without g++ MLX needs none
        assert f"TMPDIR is {str(nowhere)!r}" in done.stderr.splitlines()[-1]


def test_importing_the_package_imports_no_mlx_before_it_is_used() -> None:
    line = "import sys, mlx_gemma4.entry; assert not any(n.startswith(('mlx.', 'typer')) for n in sys.modules)"
    assert subprocess.run([sys.executable, "-c", line], timeout=60).returncode == 0


@pytest.mark.parametrize(
    ("option", "value"),
    [
        *((option, "9" * 5000) for option in ("--max-tokens", "--top-k", "--seed", "--image-budget", "--draft-length")),
        *((option, "-" + "9" * 400) for option in ("--max-tokens", "--top-k", "--seed", "--image-budget")),
        *((option, "9" * 400) for option in ("--max-tokens", "--top-k", "--seed", "--image-budget", "--draft-length")),
        *((option, str(2**63)) for option in ("--top-k", "--image-budget", "--draft-length")),
        *((option, "1e999999") for option in ("--temp", "--top-p", "--min-p", "--repetition-penalty")),
    ],
    ids=lambda text: text[:16],
)
def test_a_number_beyond_all_bounds_is_one_short_line(option: str, value: str) -> None:
    done = subprocess.run(words("generate", *STORY, f"{option}={value}"), capture_output=True, text=True, timeout=120)
    assert done.returncode == 2 and done.stdout == ""
    assert done.stderr.count("\n") == 1 and len(done.stderr) < 700


def job(name: str, tmp_path: Path) -> list[str]:
    if name == "generate":
        return words(name, *STORY, "--max-tokens", "4000")
    if name == "convert":
        return words(name, "--model", str(DEMO), "--mlx-path", str(tmp_path / "out"), "--dequantize")
    if name == "evaluate":
        return words(name, str(DEMO), str(DEMO), "--save-logits", str(tmp_path / "saved.safetensors"))
    return words(name, str(DEMO))


def wait_for_handlers(pid: int) -> None:
    """Before, Python itself starts, and what it does with a signal is its own."""
    status = Path(f"/proc/{pid}/status")
    until = time.monotonic() + 30
    while status.exists() and time.monotonic() < until:
        caught = int(re.findall(r"SigCgt:\s*(\w+)", status.read_text())[0], 16)
        if caught >> (signal.SIGHUP - 1) & 1:  # the last that is set
            return
        time.sleep(0.002)
    if not status.exists():  # no Linux
        time.sleep(0.5)


@pytest.mark.parametrize("name", COMMANDS)
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGHUP])
def test_a_signal_at_any_moment_leaves_nothing_behind(name: str, number: signal.Signals, tmp_path: Path) -> None:
    chance = random.Random(f"{name} {number}")
    for _ in range(3):
        running = subprocess.Popen(
            job(name, tmp_path), stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
        )  # fmt: skip
        wait_for_handlers(running.pid)
        time.sleep(chance.random() * 1.5)
        running.send_signal(number)
        _, errors = running.communicate(timeout=120)
        # -number, which a shell shows alike: Python has done all and takes its handlers away
        assert running.returncode in (0, 128 + number, -number), errors
        assert "Traceback" not in errors and "error" not in errors.lower()
        assert "ignored" not in errors.lower()
        left = sorted(path.name for path in tmp_path.iterdir())
        assert left in ([], ["out"], ["saved.safetensors"])
        if left == ["out"]:
            assert (tmp_path / "out" / "README.md").is_file()
        shutil.rmtree(tmp_path)
        tmp_path.mkdir()


def test_what_concerns_each_turn_is_said_once_and_what_a_server_says_each_time(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """And what was said is not remembered for ever."""
    monkeypatch.setattr(terminal, "REMEMBERED", 2)
    news = terminal.News()
    news.setFormatter(terminal.Line())
    for text in ("a", "a", "b", "a", "c", "a"):
        for name in ("mlx_gemma4", "mlx_gemma4.serve"):
            news.emit(logging.makeLogRecord({"name": name, "msg": text, "levelno": logging.INFO}))
    assert capsys.readouterr().err.split() == ["a", "a", "a", "b", "b", "a", "c", "c", "a", "a"]


@pytest.mark.parametrize(
    "line", ["evaluate demo NAME --data x", "convert --hf-path NAME --mlx-path x", "fit --model NAME"]
)
def test_a_name_that_is_too_long_is_quoted_short(line: str) -> None:
    name, *rest = line.replace("NAME", "x" * 3000).split()
    done = subprocess.run(words(name, *rest), capture_output=True, text=True)
    assert done.returncode in (1, 2) and done.stderr.startswith("error: ")
    assert len(done.stderr) < 500 and done.stderr.count("\n") == 1
