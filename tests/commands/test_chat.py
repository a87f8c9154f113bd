"""The command mlx_gemma4.chat: in a terminal as a person uses it, line by line in a pipe, and what its commands do."""

import json
import os
import pty
import select
import signal
import stat
import struct
import subprocess
import sys
import termios
import time
from collections.abc import Iterator
from fcntl import ioctl
from pathlib import Path
from typing import Any

import pyte
import pytest

pytest.importorskip("prompt_toolkit", reason="comes with the extra chat")

from adapters import random_adapter
from rounds import GREEDY
from toy_checkpoint import TINY, Shape, write_checkpoint

from mlx_gemma4 import Agent, load
from mlx_gemma4.commands.chat import SUMMARIZE, Chat, Stop, Terminal, session_folder, turns_of
from mlx_gemma4.engine.request import Options
from mlx_gemma4.engine.session import read_saved
from mlx_gemma4.errors import FetchError, TooLongError
from mlx_gemma4.model.model import Model
from mlx_gemma4.prompt.processor import Processor
from mlx_gemma4.weights.adapter import write_adapter
from mlx_gemma4.weights.load import DEMO

Loaded = tuple[Model, Processor]

SCRIPT = Path(__file__).parents[1] / "mcp_server.py"
SHAPES = DEMO / "samples" / "shapes.png"
QUESTION, ANSWER = "What is the weather in Paris?", "It is sunny and 21 degrees in Paris."
COLUMNS, LINES = 100, 200


def words(*rest: object) -> list[str]:
    return [sys.executable, "-m", "mlx_gemma4.chat", *map(str, rest)]


def environment(home: Path) -> dict[str, str]:
    kept = {name: value for name, value in os.environ.items() if name not in ("COLUMNS", "LINES")}
    return kept | {"HOME": str(home), "TERM": "xterm", "PROMPT_TOOLKIT_NO_CPR": "1"}


class Window:
    """A command in a terminal, and what stands there."""

    def __init__(self, home: Path, *rest: object) -> None:
        self.master, slave = pty.openpty()
        ioctl(slave, termios.TIOCSWINSZ, struct.pack("HHHH", LINES, COLUMNS, 0, 0))
        self.running = subprocess.Popen(
            words(*rest), stdin=slave, stdout=slave, stderr=slave, env=environment(home), start_new_session=True,
            preexec_fn=lambda: ioctl(0, termios.TIOCSCTTY, 0),  # Ctrl-C there is a signal here
        )  # fmt: skip
        os.close(slave)
        self.screen = pyte.Screen(COLUMNS, LINES)
        self.stream = pyte.ByteStream(self.screen)

    def read(self) -> bool:
        """False: it has ended."""
        if select.select([self.master], [], [], 0.1)[0]:
            try:
                data = os.read(self.master, 65536)
            except OSError:
                return False
            self.stream.feed(data)
            return bool(data)
        return True

    def text(self) -> str:
        return "\n".join(line.rstrip() for line in self.screen.display).rstrip()

    def until(self, text: str, times: int = 1) -> None:
        end = time.monotonic() + 90
        while self.text().count(text) < times:
            if not self.read() or time.monotonic() > end:
                self.running.kill()
                pytest.fail(f"no {text!r} in\n{self.text()}")

    def type(self, text: str) -> None:
        os.write(self.master, text.encode())

    def end(self) -> int:
        """Its exit status."""
        while self.read():
            pass
        os.close(self.master)
        return self.running.wait(30)


def piped(home: Path, text: str, *rest: object) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        words("--model", "demo", "--temp", "0", *rest), input=text, capture_output=True, text=True, timeout=120,
        env=environment(home),
    )  # fmt: skip


# --- in a terminal -----------------------------------------------------------------------------


def test_a_conversation_in_a_terminal(tmp_path: Path) -> None:
    photo = tmp_path / "my photo.png"
    photo.write_bytes(SHAPES.read_bytes())
    window = Window(tmp_path, "--model", "demo", "--temp", "0", "--session", "notes")
    window.until("demo, session notes, 0 messages; /help says what can be done")
    window.until("\n>")
    window.type("\x1b[200~What is\n3 + 4?\x1b[201~")
    window.until("3 + 4?")
    assert "3 + 4 = 7." not in window.text()  # several lines are one message
    window.type("\r")
    window.until("3 + 4 = 7.")
    window.until(" tokens/s")
    window.type("/undo\r")
    window.until("the last turn is taken back")
    window.until("3 + 4?", 2)  # to be said in another way
    window.type("\x03")
    window.until("Ctrl-D ends the conversation")
    window.type(f"How many shapes are there? {str(photo).replace(' ', chr(92) + ' ')} \r")
    window.until("I see 4 shapes.")
    window.type("/imge x\r")
    window.until("error: /imge is no command; /help lists them")
    window.type("/image missing.png\r")
    window.until("error: image 'missing.png' does not exist")
    window.type("/help\r")
    window.until("Ctrl-C stops a reply")
    window.type("\x04")
    assert window.end() == 0
    saved = read_saved(tmp_path / ".mlx_gemma4" / "sessions" / "notes")
    assert [message["role"] for message in saved.messages] == ["user", "assistant"]
    assert saved.messages[0]["content"][1] == {"type": "text", "text": "How many shapes are there?"}
    history = tmp_path / ".mlx_gemma4" / "history"
    assert "+3 + 4?" in history.read_text() and stat.S_IMODE(history.stat().st_mode) == 0o600


def test_ctrl_c_stops_the_reply_and_not_the_program(tmp_path: Path, tiny_folder: Path) -> None:
    window = Window(tmp_path, "--model", tiny_folder, "--max-tokens", "100000", "--seed", "1", "--session", "long")
    window.until("\n>")
    window.type("hello\r")
    window.until("> hello")
    end = time.monotonic() + 60
    while len(window.text().partition("> hello")[2]) < 100:
        assert window.read() and time.monotonic() < end
    window.type("\x03")
    window.until("stopped")
    window.type("/quit\r")
    assert window.end() == 0
    said = read_saved(tmp_path / ".mlx_gemma4" / "sessions" / "long").messages
    assert said[0] == {"role": "user", "content": "hello"} and said[1]["role"] == "assistant"


def test_a_home_that_cannot_be_written_to_is_no_reason_to_be_silent(tmp_path: Path) -> None:
    (tmp_path / ".mlx_gemma4").write_text("no folder")
    window = Window(tmp_path, "--model", "demo", "--temp", "0")
    window.until("warning: what is typed is not remembered: ~/.mlx_gemma4/history: ")
    window.until("\n>")
    window.type("What is 3 + 4?\r")
    window.until("3 + 4 = 7.")
    window.until(" tokens/s")
    window.type("\x04")
    assert window.end() == 0


def test_a_signal_gives_the_terminal_back(tmp_path: Path, tiny_folder: Path) -> None:
    window = Window(tmp_path, "--model", tiny_folder)
    before = termios.tcgetattr(window.master)
    window.until("\n>")
    assert termios.tcgetattr(window.master) != before
    window.running.send_signal(signal.SIGTERM)
    while window.running.poll() is None:
        window.read()
    assert termios.tcgetattr(window.master) == before
    assert window.end() == 143


def test_a_call_is_shown_with_its_arguments_and_asked_for(tmp_path: Path) -> None:
    entry = {"command": sys.executable, "args": [str(SCRIPT), "stdio", str(tmp_path)]}
    (tmp_path / "mcp.json").write_text(json.dumps({"mcpServers": {"weather": entry}}))
    window = Window(tmp_path, "--model", "demo", "--temp", "0", "--mcp", tmp_path / "mcp.json")
    window.until("\n>")
    window.type(f"{QUESTION}\r")
    window.until('call: get_weather {"city": "Paris"}')
    window.until("(n)o:")
    window.type("x\r")
    window.until("(n)o:", 2)
    window.type("y\r")
    window.until("→ {")
    window.until(ANSWER)
    window.type("\x04")
    assert window.end() == 0


# --- in a pipe ---------------------------------------------------------------------------------


def test_lines_of_a_pipe_are_messages_and_a_session_goes_on(tmp_path: Path) -> None:
    done = piped(tmp_path, f"What is 3 + 4?\n\n/image '{SHAPES}' How many shapes are there?\n", "--session", "a")
    assert (done.returncode, done.stdout) == (0, "3 + 4 = 7.\nI see 3 shapes.\n")
    done = piped(tmp_path, "/undo\n/fork b\nWhat is 2 + 2?", "--session", "a")
    assert done.returncode == 0 and done.stdout.count("\n") == 1
    folder = tmp_path / ".mlx_gemma4" / "sessions"
    assert [len(read_saved(folder / name).messages) for name in "ab"] == [2, 4]


def test_what_is_wrong_in_a_pipe_ends_it_with_one_line(tmp_path: Path) -> None:
    done = piped(tmp_path, "/image missing.png\nWhat is 3 + 4?\n")
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr.splitlines()[-1] == "error: image 'missing.png' does not exist"


@pytest.mark.parametrize("allowed", [False, True])
def test_without_a_terminal_only_what_is_allowed_runs(tmp_path: Path, allowed: bool) -> None:
    entry = {"command": sys.executable, "args": [str(SCRIPT), "stdio", str(tmp_path)]}
    (tmp_path / "mcp.json").write_text(json.dumps({"mcpServers": {"weather": entry}}))
    options = ("--mcp", tmp_path / "mcp.json", "--max-tokens", 30, *(("--allow", "get_*") if allowed else ()))
    done = piped(tmp_path, QUESTION, *options)
    assert done.returncode == 0 and 'call: get_weather {"city": "Paris"}' in done.stderr
    assert (ANSWER in done.stdout, "warning: get_weather is not allowed" in done.stderr) == (allowed, not allowed)


@pytest.mark.parametrize(
    ("options", "said"),
    [
        (("--session", ""), "session is ''"),
        (("--session", "x" * 300), "bytes"),
        (("--mcp", "missing.json"), "missing.json' cannot be read"),
        (("--skills", "missing"), "no folders with a SKILL.md"),
        (("--allow", "get_weather"), "allow has 'get_weather'"),
        (("--draft-length", "9"), "draft_length"),
        (("--model", "/nowhere"), "/nowhere"),
    ],
)
def test_what_is_wrong_with_the_options_is_one_line(tmp_path: Path, options: tuple[str, ...], said: str) -> None:
    done = piped(tmp_path, "What is 3 + 4?", *options)
    lines = [line for line in done.stderr.splitlines() if not line.startswith("drafter: ")]
    assert done.returncode == 2 and done.stdout == "" and len(lines) == 1 and said in lines[0], done.stderr


# --- its commands ------------------------------------------------------------------------------


class Person(Terminal):
    """Answers what is asked, and remembers what was said."""

    def __init__(self, *answers: str) -> None:
        self.answers, self.heard, self.draft = list(answers), list[str](), ""

    def ask(self, question: str, answers: str) -> str:
        self.heard.append(question)
        return self.answers.pop(0)

    def say(self, text: str) -> None:
        self.heard.append(text)


@pytest.fixture
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    monkeypatch.setenv("HOME", str(tmp_path))
    yield tmp_path


def chat_of(loaded: Loaded, *answers: str, system: str | None = None) -> tuple[Chat, Person]:
    person = Person(*answers)
    options = Options(max_tokens=5, sampling=GREEDY)
    return Chat(Agent(*loaded, system=system), options, None, person), person


def contents(chat: Chat) -> list[Any]:
    return [message["content"] for message in chat.session.messages if message["role"] == "user"]


def test_undo_gives_back_what_was_said(tiny: Loaded) -> None:
    chat, person = chat_of(tiny, system="be brief")
    for line in ("one", f"two {SHAPES} ", "/undo"):
        chat.take(line)
    assert contents(chat) == ["one"] and person.draft == "two" and chat.media == [("image", str(SHAPES))]
    chat.take("three")
    assert contents(chat)[1][0] == {"type": "image", "image": str(SHAPES)} and chat.media == []
    chat.take("/clear")
    assert [message["role"] for message in chat.session.messages] == ["system"]
    with pytest.raises(ValueError, match="nothing has been said"):
        chat.take("/undo")


def test_names_of_sessions(tiny: Loaded, home: Path) -> None:
    chat, _ = chat_of(tiny)
    chat.take("one")
    for line, said in (("/save", "has no name"), ("/fork", "has no name"), ("/save a\0b", "expected a name")):
        with pytest.raises(ValueError, match=said):
            chat.take(line)
    chat.take("/save first")
    chat.take("two")
    with pytest.raises(ValueError, match="is 'first' itself; expected another name"):
        chat.take("/fork first")  # a copy that is none would be written over
    chat.take("/fork second")
    chat.take("three")
    sessions = home / ".mlx_gemma4" / "sessions"
    assert [len(read_saved(sessions / name).messages) for name in ("first", "second")] == [4, 6]
    with pytest.raises(ValueError, match="the session 'first' exists"):
        chat.take("/save first")
    assert session_folder("./here") == Path("here") and session_folder("~/x") == home / "x"


def test_thinking_is_switched(tiny: Loaded) -> None:
    chat, _ = chat_of(tiny)
    states = []
    for line in ("/think", "/think", "/think on", "/think on", "/think off"):
        chat.take(line)
        states.append(chat.session.settings.thinking)
    assert states == [True, False, True, True, False]
    with pytest.raises(ValueError, match="expected on, off or nothing"):
        chat.take("/think hard")


def test_what_was_wrong_can_be_mended(tiny: Loaded, tmp_path: Path) -> None:
    chat, person = chat_of(tiny)
    with pytest.raises(ValueError, match=r"^the image has no name; expected /image FILE \[TEXT\]$"):
        chat.take("/image")
    (tmp_path / "no.png").write_text("no image")
    with pytest.raises(ValueError, match=r"no\.png"):
        chat.take(f"what is this {tmp_path}/no.png ")
    assert chat.session.messages == [] and person.draft == "what is this" and chat.media == []
    assert person.heard[-1] == "its files are left out"
    chat.take("/image http://127.0.0.1:1/a.png")
    with pytest.raises(FetchError):
        chat.take("what is this")
    assert person.draft == "what is this" and chat.media == [("image", "http://127.0.0.1:1/a.png")]


def test_a_second_ctrl_c_ends_the_program_and_one_ends_a_tool() -> None:
    stop = Stop()
    stop.at_once = True
    with pytest.raises(KeyboardInterrupt), stop.listening(Person()):
        os.kill(os.getpid(), signal.SIGINT)
        time.sleep(1)
    assert stop.asked and signal.getsignal(signal.SIGINT) is signal.default_int_handler


# --- a full context ----------------------------------------------------------------------------


@pytest.fixture(scope="module")
def small(tmp_path_factory: pytest.TempPathFactory) -> Loaded:
    return load(write_checkpoint(tmp_path_factory.mktemp("small"), Shape(context=1024)))


def fill(chat: Chat) -> None:
    for turn in range(12):
        text = {"role": "user", "content": f"{turn:x} " + "one two three " * 4}
        chat.session.messages += [text, {"role": "assistant", "content": "four five"}]


def test_a_full_context_offers_to_drop_the_oldest_turns(small: Loaded) -> None:
    chat, person = chat_of(small, "d", system="be brief")
    fill(chat)
    chat.take("now " + "six " * 60)
    kept = contents(chat)
    assert kept[-1].startswith("now") and 1 < len(kept) < 8 and "(d)rop the oldest" in " ".join(person.heard)
    assert chat.session.messages[0] == {"role": "system", "content": "be brief"}
    assert [text[0] for text in kept[:-1]] == [f"{n:x}" for n in range(13 - len(kept), 12)]
    assert chat.session.messages[-1]["role"] == "assistant"


def test_a_full_context_offers_a_summary(small: Loaded) -> None:
    chat, _ = chat_of(small, "s")
    fill(chat)
    chat.take("now " + "six " * 60)
    assert contents(chat)[0] == SUMMARIZE and chat.session.messages[1]["role"] == "assistant"
    assert contents(chat)[1][1:6] == " one " and contents(chat)[-1].startswith("now")


def test_a_full_context_may_be_left_as_it_is(small: Loaded) -> None:
    chat, person = chat_of(small, "n")
    fill(chat)
    before = list(chat.session.messages)
    chat.take("now " + "six " * 400)
    assert chat.session.messages == before and person.draft.startswith("now six")


def test_a_message_that_never_fits_is_an_error(small: Loaded) -> None:
    chat, person = chat_of(small)
    with pytest.raises(TooLongError):
        chat.take("six " * 1000)
    assert person.draft.startswith("six") and chat.session.messages == []
    chat.take(f"/image {SHAPES}")
    with pytest.raises(TooLongError):
        chat.take("six " * 1000)
    assert chat.media == [("image", str(SHAPES))] and person.heard[-1] == "its files go with the next message"


def test_turns_are_what_a_person_said_and_all_that_followed() -> None:
    roles = ("system", "user", "assistant", "tool", "assistant", "user", "user", "assistant")
    system, turns = turns_of([{"role": role} for role in roles])
    assert [len(system), *map(len, turns)] == [1, 4, 1, 2]
    assert turns_of([]) == ([], [])


def test_an_adapter_is_chosen_by_name(tiny_folder: Path, tmp_path: Path) -> None:
    for seed, name in enumerate(("law", "garden")):
        write_adapter(tmp_path / name, random_adapter(TINY, seed=seed), "lora", 3, 0.4, -1)
    chat, _ = chat_of(load(tiny_folder, adapter={name: tmp_path / name for name in ("law", "garden")}))
    with pytest.raises(ValueError, match="adapter is 'sea'; expected None, or one of law, garden"):
        chat.take("/adapter sea")
    for line, adapter in (("/adapter garden", "garden"), ("/adapter", None)):
        chat.take(line)
        assert chat.session.settings.adapter == adapter
    given = [word for name in ("law", "garden") for word in ("--adapter", f"{name}={tmp_path / name}")]
    argv = words("--model", tiny_folder, *given, "--session", tmp_path / "kept", "--max-tokens", "3")
    for line in (b"/adapter garden\nhello\n", b"hello\n"):
        ended = subprocess.run(argv, input=line, capture_output=True, env=environment(tmp_path))
        assert ended.returncode == 0, ended.stderr
        assert read_saved(tmp_path / "kept").settings.adapter == "garden"


def test_an_adapter_goes_with_the_model(tmp_path: Path) -> None:
    argv = words("--model", "demo", "--adapter", tmp_path / "none")
    ended = subprocess.run(argv, input=b"", capture_output=True, env=environment(tmp_path))
    assert ended.returncode == 2 and b"none' is no folder; expected an adapter's" in ended.stderr
