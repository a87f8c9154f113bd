"""A conversation whose tools run: the model calls, the tool answers, the model goes on."""

from collections.abc import Collection, Generator, Iterator, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, replace
from fnmatch import fnmatchcase
from importlib.util import find_spec
from itertools import takewhile
from pathlib import Path
from typing import Any

from mlx_gemma4.agent.tools import Part, Tool, ToolError, function_tool, text_part
from mlx_gemma4.decoding.sampling import Sampling
from mlx_gemma4.decoding.store import PromptStore
from mlx_gemma4.engine.generation import Reading
from mlx_gemma4.engine.request import Options
from mlx_gemma4.engine.session import Session, copied
from mlx_gemma4.errors import a, shown
from mlx_gemma4.model.model import Model
from mlx_gemma4.planner import check_memory
from mlx_gemma4.prompt.messages import request_messages
from mlx_gemma4.prompt.processor import Processor
from mlx_gemma4.prompt.prompt import is_whole
from mlx_gemma4.prompt.tools import template_function
from mlx_gemma4.reply.reply import Piece, Reply, assistant_message, collect, whole_thought
from mlx_gemma4.weights.load import footprint_of

MOST_TOKENS = 10_000  # of a result; in a small context a quarter of it
LONGEST_TOKEN = 40  # characters, far more than they have on average
MAX_STEPS = 25
LONGEST_WAIT = 10**6  # seconds


@dataclass
class Call:
    """A call that is about to run. Whoever gets it may set `allowed`; one that is not allowed is refused."""

    name: str
    arguments: dict[str, Any]
    allowed: bool


@dataclass(frozen=True)
class Result:
    """What a call gave: the parts that the model reads."""

    name: str
    parts: list[Part]


class Agent:
    """A conversation with a model that calls tools, and what they give goes back to it.

    tools: functions with annotations and a docstring. mcp: a file with `mcpServers` as other programs have it, or the
    same as a dict. skills: a folder of folders with a SKILL.md. The caller's functions and skills run unasked; a
    server's tool runs if its name, or a pattern such as "git_*", is in `allow`, or if who takes the events of `stream`
    sets `allowed` of its `Call`. max_steps: replies to one request; the last one is written without tools. adapter: as
    `Session` takes it. Timeouts in seconds. `close` ends the servers, and so does the end of a `with` block.

    ValueError if any of it is wrong; OSError if a server does not start.
    """

    def __init__(
        self,
        model: Model,
        processor: Processor,
        tools: Sequence[Any] = (),
        mcp: str | Path | Mapping[str, Any] | None = None,
        skills: str | Path | None = None,
        allow: Collection[str] = (),
        system: str | None = None,
        thinking: bool = False,
        image_budget: int | None = None,
        store: PromptStore | None = None,
        max_steps: int = MAX_STEPS,
        start_timeout: float = 30,
        call_timeout: float = 120,
        adapter: str | None = None,
    ) -> None:
        if (tools or mcp is not None or skills is not None) and not all(map(find_spec, ("mcp", "yaml"))):
            raise ValueError('tools need what the extra agent brings; expected pip install "mlx_gemma4[agent]"')
        for name, given, wanted in (("tools", tools, "functions"), ("allow", allow, "names of tools")):
            if isinstance(given, str) or not isinstance(given, Collection):
                raise ValueError(f"{name} is {a(given)}; expected a list of {wanted}")
        if not is_whole(max_steps) or max_steps < 1:
            raise ValueError(f"max_steps is {shown(max_steps)}; expected a whole number above 0")
        for name, seconds in (("start_timeout", start_timeout), ("call_timeout", call_timeout)):
            numeric = isinstance(seconds, (int, float)) and not isinstance(seconds, bool)
            if not numeric or not 0 < seconds <= LONGEST_WAIT:
                raise ValueError(f"{name} is {shown(seconds)}; expected seconds, above 0 and at most {LONGEST_WAIT}")
        if skills is not None and not isinstance(skills, (str, Path)):
            raise ValueError(f"skills is {a(skills)}; expected a folder")
        self.opened = ExitStack()
        found = [function_tool(tool) for tool in tools]
        if skills is not None:
            from mlx_gemma4.agent.skills import read_skills, skill_tool  # here: it loads yaml

            found.append(skill_tool(read_skills(Path(skills))))
        if mcp is not None:
            from mlx_gemma4.agent.servers import Servers, read_configs  # here: the client takes a second to load

            servers = Servers(read_configs(mcp), start_timeout, call_timeout)
            self.opened.callback(servers.close)
            found += servers.tools({tool.name for tool in found})
        self.tools = {tool.name: tool for tool in found}
        self.allow, self.max_steps = set(map(str, allow)), max_steps
        try:
            self.check(found)
            declared = [tool.declaration for tool in found] or None
            self.session = Session(model, processor, system, declared, thinking, image_budget, store, adapter)
        except ValueError:
            self.close()
            raise

    def check(self, found: list[Tool]) -> None:
        names = [tool.name for tool in found]
        twice = next((name for name in names if names.count(name) > 1), None)
        if twice is not None:
            raise ValueError(f"two tools are named {shown(twice)}; expected each name once")
        for tool in found:
            template_function(tool.declaration["function"], f"the tool {shown(tool.name)}")
        for pattern in self.allow:
            if not any(fnmatchcase(name, pattern) for name in names):
                raise ValueError(f"allow has {shown(pattern)}; expected one of {', '.join(names) or 'no tools'}")

    @property
    def messages(self) -> list[dict[str, Any]]:
        """The conversation so far: a plain list, which may be edited."""
        return self.session.messages

    def __enter__(self) -> "Agent":
        return self

    def __exit__(self, *exception: object) -> None:
        self.close()

    def close(self) -> None:
        self.opened.close()

    def send(
        self,
        text: str,
        images: Sequence[Any] = (),
        audios: Sequence[Any] = (),
        videos: Sequence[Any] = (),
        max_tokens: int = 1024,
        sampling: Sampling = Sampling(),
        draft_length: int | str = "auto",
    ) -> Reply:
        """The last reply to a user turn, after all calls; everything is then in `messages`."""
        pieces: list[Piece] = []
        for event in self.stream(text, images, audios, videos, max_tokens, sampling, draft_length):
            if isinstance(event, Piece):
                pieces.append(event)
            else:
                pieces.clear()  # of the reply that called
        return collect(pieces)

    def stream(
        self,
        text: str,
        images: Sequence[Any] = (),
        audios: Sequence[Any] = (),
        videos: Sequence[Any] = (),
        max_tokens: int = 1024,
        sampling: Sampling = Sampling(),
        draft_length: int | str = "auto",
    ) -> Generator[Piece | Call | Result, None, None]:
        """As `send`: the pieces of each reply, each call before it runs, and what it gave.

        A stream that is left before its end leaves what was said in `messages`.
        """
        options = Options(max_tokens=max_tokens, sampling=sampling, draft_length=draft_length)
        events = self.events(request_messages(text, images, audios, videos), options)
        return (event for event in events if not isinstance(event, Reading))

    def events(
        self, turn: list[dict[str, Any]], options: Options
    ) -> Generator[Reading | Piece | Call | Result, None, None]:
        """What happens when a turn is added. ValueError and MemoryError before the first event leave the messages."""
        try:
            for step in range(1, self.max_steps + 1):
                own = options if step < self.max_steps else replace(options, tool_choice="none")
                yield from self.reply(turn, own)
                turn = []
                calls = self.messages[-1].get("tool_calls", ())
                if not calls:
                    return
                yield from self.run(calls)
        finally:
            self.answer_rest()

    def reply(self, turn: list[dict[str, Any]], options: Options) -> Iterator[Reading | Piece]:
        session, pieces = self.session, list[Piece]()
        prompt, prepared = session.prompt(turn)
        events = session.events(turn, prompt, prepared, options)
        check_memory(footprint_of(session.model), len(prompt), options.max_tokens)
        try:
            for event in events:
                if isinstance(event, Piece):
                    pieces.append(event)
                yield event
        finally:
            if not pieces or pieces[-1].finish_reason is None:  # stopped
                text = "".join(piece.text for piece in pieces)
                thought = whole_thought(piece.thinking for piece in pieces)
                said = [assistant_message(text, thought, ())] if text or thought else []
                session.messages += [*turn, *said]

    def run(self, calls: list[dict[str, Any]]) -> Iterator[Call | Result]:
        for made in calls:
            call = Call(**copied(made["function"]), allowed=self.is_allowed(made["function"]["name"]))
            yield call
            parts = self.answer(call) if call.allowed else [text_part("Error: the user does not allow this call.")]
            self.record(made, parts)
            yield Result(call.name, parts)

    def record(self, made: dict[str, Any], parts: list[Part]) -> None:
        answer = {"tool_call_id": made["id"], "name": made["function"]["name"], "content": content_of(parts)}
        self.messages.append({"role": "tool", **answer})

    def answer_rest(self) -> None:
        """Each call has an answer in the end, whoever stopped it."""
        answered = len(list(takewhile(lambda message: message["role"] == "tool", reversed(self.messages))))
        before = self.messages[-answered - 1 :][:1]
        for made in before[0].get("tool_calls", ())[answered:] if before else ():
            self.record(made, [text_part("Error: the user stopped this.")])

    def is_allowed(self, name: str) -> bool:
        own = name not in self.tools or self.tools[name].is_own  # what is not there does not run
        return own or any(fnmatchcase(name, pattern) for pattern in self.allow)

    def answer(self, call: Call) -> list[Part]:
        """What the model gets to read of a call's result, or why there is none."""
        try:
            if call.name not in self.tools:
                raise ToolError(f"there is no tool {call.name}; expected {' or '.join(self.tools) or 'none'}")
            parts = self.tools[call.name].run(call.arguments)
        except ToolError as error:
            parts = [text_part(f"Error: {error}")]
        except Exception as error:  # whatever a tool raises is an answer, and the model may try another way
            parts = [text_part(f"Error: {type(error).__name__}: {error}")]
        return self.fitted(parts)

    def fitted(self, parts: list[Part]) -> list[Part]:
        """Parts that the context and the processor take."""
        most = min(MOST_TOKENS, self.session.model.config.text.max_position_embeddings // 4)
        left, kept = most, list[Part]()
        for part in parts:
            part, size = self.text(part, left) if part["type"] == "text" else self.medium(part)
            if size > left:
                begun = [part] if part["type"] == "text" else []
                return [*kept, *begun, text_part(f"[cut: the result has more than {most} tokens]")]
            kept.append(part)
            left -= size
        return kept

    def text(self, part: Part, most: int) -> tuple[Part, int]:
        """A text with its tokens; of one that has more than `most`, its beginning with one more than these."""
        text = part["text"][: (most + 1) * LONGEST_TOKEN]
        encoded = self.session.processor.tokenizer.encode(text, add_special_tokens=False)
        if len(encoded) > most:
            return text_part(text[: encoded.offsets[most][0]]), most + 1
        return part, len(encoded)

    def medium(self, part: Part) -> tuple[Part, int]:
        """A medium with its tokens, or the reason why it cannot be read."""
        try:
            alone = self.session.processor(
                [{"role": "user", "content": [part]}], image_budget=self.session.settings.image_budget
            )
        except ValueError as error:
            return text_part(f"[left out: {error}]"), 0
        return part, len(alone)


def content_of(parts: list[Part]) -> str | list[Part]:
    """Parts as a message has them: texts alone are one."""
    if all(part["type"] == "text" for part in parts):
        return "\n".join(part["text"] for part in parts)
    return parts
