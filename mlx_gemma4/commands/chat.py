"""The command `mlx_gemma4.chat`: a conversation in a terminal, or line by line from a pipe."""

import json
import os
import signal
import sys
import termios
from bisect import bisect_left
from collections.abc import Callable, Iterator
from contextlib import closing, contextmanager, suppress
from dataclasses import replace
from functools import partial
from importlib.util import find_spec
from itertools import chain, pairwise, takewhile
from pathlib import Path
from types import FrameType
from typing import TYPE_CHECKING, Annotated

from mlx_gemma4 import flags
from mlx_gemma4.agent.agent import Agent, Call, Result
from mlx_gemma4.agent.tools import printable
from mlx_gemma4.commands.generate import check_media, go_on, load_shown, parse_draft_length, print_reply
from mlx_gemma4.commands.typed import Medium, read_argument, read_typed
from mlx_gemma4.config import computing_type, expanded
from mlx_gemma4.decoding.sampling import Sampling
from mlx_gemma4.decoding.store import PromptStore
from mlx_gemma4.engine.generation import Reading, follow
from mlx_gemma4.engine.request import Options, adapter_of
from mlx_gemma4.engine.session import Session, is_session, read_saved, session_store
from mlx_gemma4.entry import if_stopped, leave
from mlx_gemma4.errors import FetchError, MediaError, TooLongError, one_line, shown, unbroken, with_name
from mlx_gemma4.flags import adapters_of, check_name, option
from mlx_gemma4.media.source import local_path
from mlx_gemma4.planner import check_memory
from mlx_gemma4.prompt.messages import MEDIA, Message, request_messages
from mlx_gemma4.prompt.processor import load_processor
from mlx_gemma4.reply.reply import Piece, Stats
from mlx_gemma4.terminal import is_screen, run, show_warning
from mlx_gemma4.weights.load import DEFAULT_MODEL, check_split, find_checkpoint, footprint_of
from mlx_gemma4.weights.peers import follows, launched, lead, release, same

if TYPE_CHECKING:
    from prompt_toolkit.history import History


HOME = Path("~/.mlx_gemma4")
SUMMARIZE = "Summarize our conversation so far, with all that matters for going on."
LEAST_ROOM = 256  # tokens for a reply; in a small context a sixteenth of it
SHOWN_RESULT = 200  # characters


def chat(
    model: flags.ModelName = DEFAULT_MODEL,
    system: flags.System = None,
    thinking: flags.Thinking = False,
    session: Annotated[
        str | None, option("NAME", "Go on with the conversation of this name, or in this folder; keep it there.")
    ] = None,
    mcp: Annotated[Path | None, option("FILE", "Servers whose tools may be called: a file with mcpServers.")] = None,
    skills: Annotated[Path | None, option("FOLDER", "Folders with a SKILL.md.")] = None,
    allow: Annotated[list[str], option("TOOL", "Run this tool unasked, or those that git_* names; repeatable.")] = [],  # noqa: B006
    max_tokens: flags.MaxTokens = 4096,
    temp: flags.Temperature = None,
    top_p: flags.TopP = None,
    top_k: flags.TopK = None,
    min_p: flags.MinP = None,
    repetition_penalty: flags.RepetitionPenalty = None,
    seed: flags.Seed = None,
    image_budget: flags.ImageBudget = None,
    drafter: flags.DrafterName = "auto",
    draft_length: flags.DraftLength = "auto",
    adapter: flags.Adapters = [],  # noqa: B006
    dtype: flags.DType = None,
    kv_bits: flags.KvBits = None,
    split: flags.Split = None,
    store: flags.StoreFolder = None,
    version: flags.Version = False,
    debug: flags.Debug = False,
) -> None:
    """Talk with Gemma 4 in a terminal. Drop files into it; /help says more. Ctrl-C stops a reply, Ctrl-D ends."""
    sampling = Sampling(temp, top_p, top_k, min_p, repetition_penalty, seed)
    options = Options(max_tokens=max_tokens, sampling=sampling, draft_length=parse_draft_length(draft_length))
    computing = computing_type(dtype)
    check_media([], image_budget)
    check_split(split)
    folder = None if session is None else session_folder(session)
    lead()
    group = launched()
    is_first = not follows(group)
    saved = read_saved(folder) if is_first and folder is not None and is_session(folder) else None
    split = same(group, saved.split if split is None and saved is not None else split)
    terminal = Terminal() if is_first and is_terminal() else None
    checkpoint = find_checkpoint(model, drafter, computing, kv_bits, adapters_of(adapter), group, split)
    processor = load_processor(checkpoint.folder, checkpoint.config)
    check_memory(checkpoint.footprint)
    kept = PromptStore(folder=store) if store is not None or folder is None else session_store(folder)
    if not is_first:
        load_shown(checkpoint)
        follow(checkpoint.model, processor, kept)
        return
    with Agent(checkpoint.model, processor, (), mcp, skills, allow, system, thinking, image_budget, kept) as agent:
        load_shown(checkpoint)
        tools = agent.session.settings.tools
        if saved is not None:
            saved.check_model(checkpoint.model)
            go_on(agent.session, saved, system, thinking, image_budget)
            agent.session.settings = replace(agent.session.settings, tools=tools)
        elif checkpoint.config.adapters:
            switch(agent.session, checkpoint.config.adapters[0])
        conversation = Chat(agent, options, folder, terminal)
        if terminal is not None:
            conversation.greet(model)
        try:
            conversation.run(piped() if terminal is None else terminal.lines())
        finally:
            conversation.close()
    release(group)


def is_terminal() -> bool:
    """Whether somebody sits there."""
    return sys.stdin is not None and sys.stdin.isatty() and sys.stdout is not None and sys.stdout.isatty()


def piped() -> Iterator[str]:
    """The lines of standard input."""
    if sys.stdin is None:
        raise ValueError("standard input is closed; expected a terminal, or messages, a line each")
    for number, line in enumerate(sys.stdin.buffer, 1):
        try:
            yield line.decode("utf-8-sig" if number == 1 else "utf-8").rstrip("\r\n")
        except UnicodeDecodeError as error:
            raise ValueError(f"standard input is not UTF-8: {error.reason} in line {number}") from None


def session_folder(name: str) -> Path:
    """Where a conversation is kept: a name is a folder beside the others, a path is itself."""
    if not name.strip() or "\0" in name:
        raise ValueError(f"session is {shown(name)}; expected a name, or a path with a slash in it")
    folder = Path(name) if "/" in name or name in (".", "..") else HOME / "sessions" / name
    check_name(folder, "--session")
    return expanded(folder)


class Terminal:
    """Reads what a person types: with history, several pasted lines as one message, and names that Tab completes."""

    def __init__(self) -> None:
        if find_spec("prompt_toolkit") is None:
            raise ValueError('a terminal needs prompt_toolkit; expected pip install "mlx_gemma4[chat]"')
        from prompt_toolkit import PromptSession
        from prompt_toolkit.completion import NestedCompleter, PathCompleter
        from prompt_toolkit.key_binding import KeyBindings, KeyPressEvent

        keys = KeyBindings()

        @keys.add("escape", "enter")
        def another_line(event: KeyPressEvent) -> None:
            event.current_buffer.insert_text("\n")

        words = {name: PathCompleter(expanduser=True) if name[1:] in MEDIA else None for name in COMMANDS}
        self.typed: PromptSession[str] = PromptSession(
            history=history(), key_bindings=keys, completer=NestedCompleter.from_nested_dict(words),
            complete_while_typing=False, prompt_continuation="  ",
        )  # fmt: skip
        self.draft = ""  # what the next line begins with
        self.mode = termios.tcgetattr(0)

    def restore(self) -> None:
        """The terminal as it was, for a signal that ends the program while a line is typed."""
        termios.tcsetattr(0, termios.TCSADRAIN, self.mode)
        os.write(1, b"\x1b[?2004l\x1b[?25h\n")  # no marks around what is pasted; the cursor

    def lines(self) -> Iterator[str]:
        while True:
            draft, self.draft = self.draft, ""
            try:
                with if_stopped(self.restore):
                    line = self.typed.prompt("> ", default=draft)
                yield line
            except KeyboardInterrupt:
                self.say("Ctrl-D ends the conversation")
            except EOFError:
                return

    def ask(self, question: str, answers: str) -> str:
        """One of these letters; the last one if it is left."""
        from prompt_toolkit import prompt

        try:
            while (answer := prompt(question).strip().lower()[:1]) not in tuple(answers):
                pass
        except (KeyboardInterrupt, EOFError):
            return answers[-1]
        return answer

    def say(self, text: str) -> None:
        print(f"\x1b[2m{text}\x1b[22m" if is_screen(sys.stderr) else text, file=sys.stderr)


def history() -> "History":
    """What has been typed: in a file for its owner only, or where there can be none, while the program runs."""
    from prompt_toolkit.history import FileHistory, InMemoryHistory

    try:
        file = HOME.expanduser() / "history"
        file.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
        os.close(os.open(file, os.O_CREAT | os.O_RDWR, 0o600))
    except (OSError, RuntimeError) as error:  # a container has no home, or one that is not to be written to
        show_warning(f"what is typed is not remembered: {HOME / 'history'}: {one_line(error)}")
        return InMemoryHistory()
    return FileHistory(str(file))


class Stop:
    """Ctrl-C while a reply is written: it ends after what is being computed, a tool's work at once. A second one ends
    the program."""

    def __init__(self) -> None:
        self.asked = False
        self.at_once = False

    def __call__(self, number: int, frame: FrameType | None) -> None:
        if self.asked:
            leave(number, frame)
        self.asked = True
        if self.at_once:
            raise KeyboardInterrupt

    @contextmanager
    def listening(self, terminal: Terminal | None) -> Iterator[None]:
        if terminal is None:  # it ends the program, as any command in a pipe
            yield
            return
        before = signal.signal(signal.SIGINT, self)
        try:
            yield
        finally:
            signal.signal(signal.SIGINT, before)


class Chat:
    """A conversation, and the commands in it. terminal None: nobody can be asked, and what is wrong ends it."""

    def __init__(self, agent: Agent, options: Options, folder: Path | None, terminal: Terminal | None) -> None:
        self.agent, self.session, self.options = agent, agent.session, options
        self.folder, self.terminal = folder, terminal
        self.media: list[Medium] = []  # for the next message
        self.is_over = False

    def greet(self, model: str) -> None:
        name = "" if self.folder is None else f", session {self.folder.name}, {len(self.session.messages)} messages"
        self.say(f"{model}{name}; /help says what can be done")

    def say(self, text: str) -> None:
        if self.terminal is not None:
            self.terminal.say(text)

    def run(self, lines: Iterator[str]) -> None:
        for line in lines:
            try:
                self.take(line)
            except (ValueError, OSError, MemoryError, RuntimeError) as error:
                if self.terminal is None or isinstance(error, BrokenPipeError):
                    raise
                print(f"error: {with_name(error)}", file=sys.stderr)
            if self.is_over:
                return

    def take(self, line: str) -> None:
        """Do what a line says."""
        word, _, rest = line.strip().partition(" ")
        if word in COMMANDS:
            COMMANDS[word][0](self, rest.strip())
        elif word.startswith("/") and word[1:].isalpha() and not Path(word).exists():
            raise ValueError(f"{word} is no command; /help lists them")
        elif line.strip():
            typed = read_typed(line)
            self.ask(typed.text, [*self.media, *typed.media])

    def close(self) -> None:
        if self.folder is not None and self.session.messages:
            self.session.save(self.folder)

    # --- asking --------------------------------------------------------------------------------

    def ask(self, text: str, media: list[Medium]) -> None:
        by_kind = {kind: [source for other, source in media if other == kind] for kind in MEDIA}
        for kind, source in media:
            self.say(f"{kind} {source}")
        turn = request_messages(text, by_kind["image"], by_kind["audio"], by_kind["video"])
        before, left = list(self.session.messages), media
        try:
            self.reply(turn)
        except MediaError as error:
            if not isinstance(error, FetchError):
                left = []  # or no message would go until it is found which of them it was
            raise
        finally:
            self.media = []
            if self.session.messages == before and self.terminal is not None:  # to be mended
                self.terminal.draft, self.media = text, left
                if media:
                    self.say(f"its files {'go with the next message' if left else 'are left out'}")
        self.keep()

    def keep(self) -> None:
        """What was said is there if the program is ended."""
        if self.folder is not None:
            self.session.save_messages(self.folder)

    def reply(self, turn: list[Message]) -> None:
        """Show what happens when a turn is added, and make room for it if need be."""
        while True:
            before = len(self.session.messages)
            try:
                return self.stream(turn)
            except (TooLongError, MemoryError) as error:
                if len(self.session.messages) > before:  # tools have answered: the conversation is to go on
                    turn = []
                if not self.make_room(turn, error):
                    return

    def stream(self, turn: list[Message]) -> None:
        stop, events, call = Stop(), self.agent.events(turn, self.options), None

        def until_call() -> Iterator[Reading | Piece]:
            nonlocal call
            call = None
            for event in events:
                stop.at_once = False
                if isinstance(event, Call):
                    call = event
                    return
                if isinstance(event, Result):
                    self.say(f"  → {result_line(event)}")
                else:
                    self.check_room(event)
                    yield event
                if stop.asked:
                    return

        with stop.listening(self.terminal), closing(events), suppress(KeyboardInterrupt):  # a tool was stopped
            while True:
                last = print_reply(until_call())
                if last is not None and last.stats is not None:
                    self.say(end_line(last, last.stats))
                if call is None or stop.asked:
                    break
                self.decide(call)
                stop.at_once = call.allowed
        if stop.asked:
            self.say("stopped")

    def decide(self, call: Call) -> None:
        """Show a call, and ask for it if it is not allowed."""
        line = printable(f"{call.name} {json.dumps(call.arguments, ensure_ascii=False)}")
        print(f"call: {line}", file=sys.stderr)
        if call.allowed:
            return
        if self.terminal is None:
            show_warning(f"{call.name} is not allowed; expected --allow {call.name}, or a terminal to ask in")
            return
        answer = self.terminal.ask("run it? (y)es, (a)lways in this session, (n)o: ", "yan")
        call.allowed = answer != "n"
        if answer == "a":
            self.agent.allow.add(call.name)

    # --- room ----------------------------------------------------------------------------------

    def check_room(self, event: Reading | Piece) -> None:
        """TooLongError if a prompt leaves too little room for a reply, before it is read."""
        limit = self.session.model.config.text.max_position_embeddings
        if isinstance(event, Reading) and event.total > limit - min(LEAST_ROOM, limit // 16):
            raise TooLongError(event.total, limit)

    def make_room(self, turn: list[Message], error: Exception) -> bool:
        """Offer to drop or to summarize the oldest turns before this one. False: neither was done."""
        system, turns = turns_of([*self.session.messages, *turn])
        if self.terminal is None or len(turns) < 2:
            raise error
        print(f"the context is full: {unbroken(error)}", file=sys.stderr)
        most = len(turns) - 1
        cut = self.first_that_fits(system, turns, 1)
        question = f"(d)rop the oldest {cut} of {most} turns, (s)ummarize them, or (n)either? "
        answer = self.terminal.ask(question, "dsn")
        summary = self.summary(system, turns[:cut]) if answer == "s" else []
        if answer == "n" or summary is None:
            return False
        kept = [*system, *summary, *chain(*turns[cut:])]
        self.session.messages[:] = kept[: len(kept) - len(turn)]
        return True

    def first_that_fits(self, system: list[Message], turns: list[list[Message]], least: int) -> int:
        """The first turn from which on they fit; the last one if none does."""
        return bisect_left(
            range(len(turns) - 1), True, lo=least, key=lambda n: self.fits([*system, *chain(*turns[n:])])
        )

    def fits(self, messages: list[Message]) -> bool:
        """Whether these leave half of the context, or of the memory, to what will be said."""
        other, model = self.session.fork(), self.session.model
        other.messages = messages
        try:
            twice = 2 * len(other.prompt([])[0])
            check_memory(footprint_of(model), twice)
        except (TooLongError, MemoryError):
            return False
        return twice <= model.config.text.max_position_embeddings

    def summary(self, system: list[Message], oldest: list[list[Message]]) -> list[Message] | None:
        """The question for a summary and the model's answer; None if it was stopped."""
        other, asked, stop = self.session.fork(), request_messages(SUMMARIZE), Stop()
        other.messages = [*system, *chain(*oldest[self.first_that_fits(system, oldest, 0) :])]
        prompt, prepared = other.prompt(asked)
        with stop.listening(self.terminal):
            events = other.events(asked, prompt, prepared, replace(self.options, tool_choice="none"))
            print_reply(takewhile(lambda event: not stop.asked, events))
        return None if stop.asked else other.messages[-2:]


def turns_of(messages: list[Message]) -> tuple[list[Message], list[list[Message]]]:
    """What stands before the first turn, and the turns: what a person said, and all that followed."""
    starts = [index for index, message in enumerate(messages) if message["role"] == "user"]
    first = starts[0] if starts else len(messages)
    return messages[:first], [messages[start:end] for start, end in pairwise([*starts, len(messages)])]


def result_line(result: Result) -> str:
    text = " ".join(part["text"] if part["type"] == "text" else f"[{part['type']}]" for part in result.parts)
    line = printable(unbroken(text[: SHOWN_RESULT + 1]))
    return line if len(line) <= SHOWN_RESULT else line[:SHOWN_RESULT] + "…"


def end_line(last: Piece, stats: Stats) -> str:
    cut = "; cut: there was no room for more" if last.finish_reason == "length" else ""
    kept = f"; {stats.cached_tokens} of {stats.prompt_tokens} not read again" if stats.cached_tokens else ""
    return f"{stats.generation_tokens} tokens, {stats.generation_tps:.1f} tokens/s{kept}{cut}"


# --- commands ----------------------------------------------------------------------------------


def attach(chat: Chat, rest: str, kind: str) -> None:
    if not rest:
        raise ValueError(f"the {kind} has no name; expected /{kind} FILE [TEXT]")
    source, text = read_argument(rest)
    local_path(source, kind)
    chat.media.append((kind, source))
    if text:
        chat.ask(text, chat.media)
    else:
        chat.say(f"{kind} {source} goes with the next message")


def think(chat: Chat, rest: str) -> None:
    settings = chat.session.settings
    if rest not in ("", "on", "off"):
        raise ValueError(f"/think got {shown(rest)}; expected on, off or nothing")
    thinking = not settings.thinking if rest == "" else rest == "on"
    chat.session.settings = replace(settings, thinking=thinking)
    chat.say(f"thinking is {'on' if thinking else 'off'}; the next message reads the conversation once more")


def save(chat: Chat, rest: str) -> None:
    if rest:
        folder = session_folder(rest)
        if folder != chat.folder and is_session(folder):
            raise ValueError(f"the session {rest!r} exists; expected a new name, or --session {rest} to go on there")
    elif chat.folder is None:
        raise ValueError("the conversation has no name; expected /save NAME")
    else:
        folder = chat.folder
    chat.session.save(folder)
    chat.folder = folder
    chat.say(f"kept in {folder}")


def fork(chat: Chat, rest: str) -> None:
    if not rest:
        raise ValueError("the copy has no name; expected /fork NAME")
    if session_folder(rest) == chat.folder:
        raise ValueError(f"the conversation is {rest!r} itself; expected another name for the copy")
    chat.keep()
    save(chat, rest)


def switch(session: Session, name: str | None) -> None:
    """ValueError unless it is an adapter's name, or None."""
    adapter_of(session.model, name)
    session.settings = replace(session.settings, adapter=name)


def choose_adapter(chat: Chat, rest: str) -> None:
    switch(chat.session, rest or None)
    chat.say(f"the next reply is with {rest or 'no adapter'}")
    chat.keep()


def undo(chat: Chat, rest: str) -> None:
    system, turns = turns_of(chat.session.messages)
    if not turns:
        raise ValueError("nothing has been said; expected /undo after a message")
    chat.session.messages[:] = [*system, *chain(*turns[:-1])]
    content = turns[-1][0]["content"]
    parts = [{"type": "text", "text": content}] if isinstance(content, str) else content
    chat.media = [(part["type"], part[part["type"]]) for part in parts if part["type"] != "text"]
    text = "".join(part["text"] for part in parts if part["type"] == "text")
    if chat.terminal is not None:
        chat.terminal.draft = text
    chat.say("the last turn is taken back" + (", its files go with the next message" if chat.media else ""))
    chat.keep()


def clear(chat: Chat, rest: str) -> None:
    chat.session.messages[:] = turns_of(chat.session.messages)[0]
    chat.media = []
    chat.say("the conversation begins anew")
    chat.keep()


def quit_chat(chat: Chat, rest: str) -> None:
    chat.is_over = True


def show_help(chat: Chat, rest: str) -> None:
    print("\n".join(f"{name + ' ' + use:22} {about}" for name, (_, use, about) in COMMANDS.items()), file=sys.stderr)
    print(KEYS, file=sys.stderr)


KEYS = """
A file dropped into the window goes with the message. Alt-Enter begins another line, Tab completes.
Ctrl-C stops a reply, Ctrl-D ends the conversation."""

COMMANDS: dict[str, tuple[Callable[[Chat, str], None], str, str]] = {
    **{
        f"/{kind}": (partial(attach, kind=kind), "FILE [TEXT]", f"{a_kind} for the next message, or for this one")
        for kind, a_kind in (("image", "an image"), ("audio", "a sound"), ("video", "a video"))
    },
    "/think": (think, "[on|off]", "let the model think before it answers"),
    "/adapter": (choose_adapter, "[NAME]", "which of those given by name the next replies are with"),
    "/undo": (undo, "", "take the last turn back, to say it in another way"),
    "/clear": (clear, "", "forget all that was said"),
    "/save": (save, "[NAME]", "keep the conversation; --session NAME goes on with it"),
    "/fork": (fork, "NAME", "go on in a copy of another name"),
    "/help": (show_help, "", "this"),
    "/quit": (quit_chat, "", "end, as Ctrl-D does"),
}


def main() -> int:
    return run(chat)
