"""From the token ids of a reply to its answer, its thought and its tool calls."""

import codecs
import re
import warnings
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from enum import Enum
from typing import Any

from tokenizers import Tokenizer

from mlx_gemma4.toolcall import parse_tool_call

CHANNEL_OPEN, CHANNEL_CLOSE = "<|channel>", "<channel|>"
TURN_OPEN, TURN_CLOSE = "<|turn>", "<turn|>"
TOOL_CALL_OPEN, TOOL_CALL_CLOSE = "<|tool_call>", "<tool_call|>"

THOUGHT_CHANNEL = "thought"
CHANNEL_NAME = re.compile(r"\w{0,32}")  # what a channel's first line may hold to count as its name
BYTE_TOKEN = re.compile(r"<0x([0-9A-F]{2})>")


@dataclass(frozen=True)
class Stats:
    prompt_tokens: int
    cached_tokens: int  # of the prompt's, those that were not read again
    prompt_tps: float  # of those that were
    generation_tokens: int
    generation_tps: float
    time_to_first_token: float  # seconds
    peak_memory: int  # bytes
    rounds: int
    drafted_tokens: int
    accepted_tokens: int  # counts whole rounds, the last included
    acceptance_by_position: list[float]
    tokens_per_round: float


@dataclass(frozen=True)
class Piece:
    """What one step of generation made printable; the last piece has the three optional fields."""

    text: str
    thinking: str
    token_ids: list[int]
    finish_reason: str | None = None  # "stop" | "length"
    tool_calls: list[dict[str, Any]] | None = None
    stats: Stats | None = None


@dataclass(frozen=True)
class Reply:
    """A whole reply. `tool_calls` holds `{"name": str, "arguments": dict}`; the stop token is nowhere in it."""

    text: str
    thinking: str | None  # None: it did not think
    tool_calls: list[dict[str, Any]]
    token_ids: list[int]
    finish_reason: str  # "stop" | "length"
    stats: Stats

    @property
    def message(self) -> dict[str, Any]:
        """The assistant message to append to `messages` to go on."""
        message: dict[str, Any] = {"role": "assistant", "content": self.text}
        if self.thinking:
            message["reasoning"] = self.thinking
        if self.tool_calls:
            message["tool_calls"] = [
                {"id": f"call_{n}", "type": "function", "function": dict(call)}
                for n, call in enumerate(self.tool_calls)
            ]
        return message


def collect(pieces: Iterable[Piece]) -> Reply:
    """The reply that the pieces make up. Raises ValueError if the last one does not say how the reply finished."""
    text: list[str] = []
    thinking: list[str] = []
    token_ids: list[int] = []
    piece = None
    for piece in pieces:
        text.append(piece.text)
        thinking.append(piece.thinking)
        token_ids.extend(piece.token_ids)
    if piece is None or piece.finish_reason is None or piece.stats is None:
        raise ValueError(f"the last piece needs a finish_reason and stats; got {piece}")
    return Reply(
        text="".join(text),
        thinking="".join(thinking).strip("\n") or None,  # the template writes the line breaks around it itself
        tool_calls=piece.tool_calls or [],
        token_ids=token_ids,
        finish_reason=piece.finish_reason,
        stats=piece.stats,
    )


@dataclass(frozen=True)
class Controls:
    """The ids of the tokens that structure a reply; None where the tokenizer lacks one."""

    channel_open: int | None
    channel_close: int | None
    turn_open: int | None
    turn_close: int | None
    tool_call_open: int | None
    tool_call_close: int | None

    @classmethod
    def from_tokenizer(cls, tokenizer: Tokenizer) -> "Controls":
        return cls(
            channel_open=tokenizer.token_to_id(CHANNEL_OPEN),
            channel_close=tokenizer.token_to_id(CHANNEL_CLOSE),
            turn_open=tokenizer.token_to_id(TURN_OPEN),
            turn_close=tokenizer.token_to_id(TURN_CLOSE),
            tool_call_open=tokenizer.token_to_id(TOOL_CALL_OPEN),
            tool_call_close=tokenizer.token_to_id(TOOL_CALL_CLOSE),
        )


class TokenDecoder:
    """Text of one segment, token by token; the bytes of a character are held back until it is whole.

    Gemma's decoder treats every token by itself, byte tokens apart, so that joining gives `Tokenizer.decode` of the
    segment. `tokenizers.DecodeStream` (0.23) is not used: it raises a bare Exception at a stray byte behind a character
    made of bytes, takes quadratic time for a run of them, and never gives out a U+FFFD that ends the text.
    """

    def __init__(self, tokenizer: Tokenizer, skip_special_tokens: bool) -> None:
        self._tokenizer = tokenizer
        self._skip_special_tokens = skip_special_tokens
        self._utf8 = codecs.getincrementaldecoder("utf-8")("replace")

    def step(self, token_id: int) -> str:
        """What became printable; an id outside the vocabulary, or a special token to skip, adds nothing."""
        byte = BYTE_TOKEN.fullmatch(self._tokenizer.id_to_token(token_id) or "")
        if byte:
            return self._utf8.decode(bytes.fromhex(byte[1]))
        text = self._tokenizer.decode([token_id], skip_special_tokens=self._skip_special_tokens)
        return self._utf8.decode(b"", final=True) + text if text else ""


class _State(Enum):
    ANSWER = "answer"
    THOUGHT = "thought"
    TOOL_CALL = "tool call"


class ReplyParser:
    """Sorts a reply's tokens into answer, thought and tool calls.

    It goes by token ids: text that merely looks like a control token stays text. No sequence of ids makes it raise.
    """

    def __init__(self, tokenizer: Tokenizer, controls: Controls, prompt_ids: Sequence[int]) -> None:
        self.tool_calls: list[dict[str, Any]] = []  # {"name": str, "arguments": dict}
        self._tokenizer = tokenizer
        self._controls = controls
        self._text: list[str] = []
        self._thinking: list[str] = []
        self._call: list[str] = []
        self._first_line: str | None = None  # of a thought, held back while it may be the channel's name
        self._first_line_in_prompt = ""  # the part of that line that the prompt holds
        self._enter(_State.ANSWER)
        self._continue_prompt(prompt_ids)

    @property
    def in_thought(self) -> bool:
        return self._state is _State.THOUGHT

    def feed(self, ids: Sequence[int]) -> tuple[str, str]:
        """(text, thinking) that these tokens made printable."""
        for token_id in ids:
            self._step(token_id)
        return self._take()

    def finish(self) -> tuple[str, str]:
        """(text, thinking) that was held back, after the last token; a character that lacks bytes is dropped."""
        if self._state is _State.TOOL_CALL:
            self._keep_call_as_text(TOOL_CALL_OPEN + "".join(self._call), "the reply ends inside it")
        self._enter(_State.ANSWER)
        return self._take()

    def _continue_prompt(self, prompt_ids: Sequence[int]) -> None:
        """After a tool response the template opens the thought itself, and the reply begins inside it."""
        c = self._controls
        marks = {c.channel_open, c.channel_close, c.turn_open, c.turn_close}
        last = next((n for n in reversed(range(len(prompt_ids))) if prompt_ids[n] in marks), None)
        if last is None or prompt_ids[last] != c.channel_open:
            return
        self._enter(_State.THOUGHT)
        self._first_line_in_prompt = self._tokenizer.decode(list(prompt_ids[last + 1 :]))
        if "\n" in self._first_line_in_prompt:
            self._first_line = None

    def _enter(self, state: _State) -> None:
        if self._first_line and self._first_line_in_prompt + self._first_line != THOUGHT_CHANNEL:
            self._thinking.append(self._first_line)  # the thought ended on its first line: that was no name
        self._first_line = "" if state is _State.THOUGHT else None
        self._first_line_in_prompt = ""
        self._call = []
        self._decoder = TokenDecoder(self._tokenizer, skip_special_tokens=state is not _State.TOOL_CALL)
        self._state = state

    def _step(self, token_id: int) -> None:
        c = self._controls
        if self._state is _State.TOOL_CALL:
            if token_id == c.tool_call_close:
                self._close_call()
            else:
                self._call.append(self._decoder.step(token_id))
        elif token_id == c.channel_open:
            self._enter(_State.THOUGHT)
        elif token_id == c.channel_close and self._state is _State.THOUGHT:
            self._enter(_State.ANSWER)
        elif token_id == c.tool_call_open and self._state is _State.ANSWER:
            self._enter(_State.TOOL_CALL)
        elif self._state is _State.THOUGHT:
            self._think(self._decoder.step(token_id))
        else:
            self._text.append(self._decoder.step(token_id))

    def _think(self, text: str) -> None:
        if self._first_line is None:
            self._thinking.append(text)
            return
        self._first_line += text
        name, line_break, rest = (self._first_line_in_prompt + self._first_line).partition("\n")
        if not CHANNEL_NAME.fullmatch(name):
            self._thinking.append(self._first_line)
            self._first_line = None
        elif line_break:
            self._thinking.append(rest)
            self._first_line = None

    def _close_call(self) -> None:
        call = "".join(self._call)
        try:
            self.tool_calls.append(parse_tool_call(call))
        except ValueError as error:
            self._keep_call_as_text(TOOL_CALL_OPEN + call + TOOL_CALL_CLOSE, str(error))
        self._enter(_State.ANSWER)

    def _keep_call_as_text(self, call: str, reason: str) -> None:
        self._text.append(call)
        warnings.warn(f"a tool call is kept as text: {reason}", stacklevel=2)

    def _take(self) -> tuple[str, str]:
        printable = "".join(self._text), "".join(self._thinking)
        self._text, self._thinking = [], []
        return printable
