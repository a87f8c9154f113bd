"""From the token ids of a reply to its answer, its thought and its tool calls."""

import codecs
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from enum import Enum
from typing import Any

from tokenizers import Tokenizer

from mlx_gemma4.reply.opening import CallPart, OpenCall, whole_part
from mlx_gemma4.reply.stop import StopTexts
from mlx_gemma4.reply.toolcall import QUOTE, QUOTE_TOKEN, Call, Schema, parse_tool_call, read_tool_calls, spelled

CHANNEL_OPEN, CHANNEL_CLOSE = "<|channel>", "<channel|>"
TURN_OPEN, TURN_CLOSE = "<|turn>", "<turn|>"
TOOL_CALL_OPEN, TOOL_CALL_CLOSE = "<|tool_call>", "<tool_call|>"
TOOL_RESPONSE_OPEN = "<|tool_response>"
END_OF_TEXT = "<eos>"
THINK = "<|think|>"

REPLY_ANCHORS = (f"{TURN_OPEN}model\n", "<tool_response|>")  # a reply begins behind the last of them

THOUGHT_CHANNEL = "thought"
THOUGHT_LINE = f"{THOUGHT_CHANNEL}\n"  # what a thought begins with whose channel token the model left out
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
    thinking_tokens: int = 0  # of the reply's, those of its thoughts


@dataclass(frozen=True)
class Piece:
    """What one step of generation made printable; the last piece has the optional fields."""

    text: str
    thinking: str
    token_ids: list[int]
    finish_reason: str | None = None  # "stop" | "length" | "repetition"
    tool_calls: list[dict[str, Any]] | None = None
    stats: Stats | None = None
    notes: list[str] = field(default_factory=list)  # what its user should know, a line each; any piece may have some
    message: dict[str, Any] | None = None  # of the whole reply, to append to `messages` to go on
    calls: list[CallPart] = field(default_factory=list)  # in the order in which they are written
    logprobs: list[dict[str, Any]] | None = None  # if asked for, as Reply has them, of these token_ids
    stop: str = ""  # that of the texts to stop at which ended the reply
    end: dict[str, Any] | None = None  # of the stop token, which is in no piece, what `logprobs` would say


@dataclass(frozen=True)
class Reply:
    """A whole reply. `tool_calls` holds `{"name": str, "arguments": dict}`; the stop token is nowhere in it."""

    text: str
    thinking: str | None  # None: it did not think
    tool_calls: list[dict[str, Any]]
    token_ids: list[int]
    finish_reason: str  # "stop" | "length" | "repetition"
    stats: Stats
    notes: list[str] = field(default_factory=list)  # what its user should know, a line each
    # If asked for, of each token {"token_id": int, "logprob": float, "top": {id: logprob}}, natural logarithms by the
    # model's own law: before temperature, penalties, biases and forms.
    logprobs: list[dict[str, Any]] | None = None
    stop: str = ""  # that of the texts to stop at which ended it

    @property
    def message(self) -> dict[str, Any]:
        """The assistant message to append to `messages` to go on."""
        return assistant_message(self.text, self.thinking, self.tool_calls)


def assistant_message(text: str, thinking: str | None, tool_calls: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    message: dict[str, Any] = {"role": "assistant", "content": text}
    if thinking:
        message["reasoning"] = thinking
    if tool_calls:
        message["tool_calls"] = [
            {"id": f"call_{n}", "type": "function", "function": dict(call)} for n, call in enumerate(tool_calls)
        ]
    return message


def whole_thought(parts: Iterable[str]) -> str | None:
    """A thought without the line breaks around it, which the template writes itself; None if there is none."""
    return "".join(parts).strip("\n") or None


def collect(pieces: Iterable[Piece]) -> Reply:
    """The reply that the pieces make up: what `generate` returns for what `stream_generate` gives.

    Raises ValueError if the last one does not say how the reply finished.
    """
    given = list(pieces)
    last = given[-1] if given else None
    if last is None or last.finish_reason is None or last.stats is None:
        raise ValueError(f"the last piece needs a finish_reason and stats; got {last}")
    logprobs = [piece.logprobs for piece in given if piece.logprobs is not None]
    return Reply(
        text="".join(piece.text for piece in given),
        thinking=whole_thought(piece.thinking for piece in given),
        tool_calls=last.tool_calls or [],
        token_ids=[token for piece in given for token in piece.token_ids],
        finish_reason=last.finish_reason,
        stats=last.stats,
        notes=[note for piece in given for note in piece.notes],
        logprobs=[entry for entries in logprobs for entry in entries] if logprobs else None,
        stop=last.stop,
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
    tool_response_open: int | None
    end_of_text: int | None
    quote: int | None
    think: int | None  # in the system turn: the reply may begin with a thought

    @classmethod
    def from_tokenizer(cls, tokenizer: Tokenizer) -> "Controls":
        return cls(
            channel_open=tokenizer.token_to_id(CHANNEL_OPEN),
            channel_close=tokenizer.token_to_id(CHANNEL_CLOSE),
            turn_open=tokenizer.token_to_id(TURN_OPEN),
            turn_close=tokenizer.token_to_id(TURN_CLOSE),
            tool_call_open=tokenizer.token_to_id(TOOL_CALL_OPEN),
            tool_call_close=tokenizer.token_to_id(TOOL_CALL_CLOSE),
            tool_response_open=tokenizer.token_to_id(TOOL_RESPONSE_OPEN),
            end_of_text=tokenizer.token_to_id(END_OF_TEXT),
            quote=tokenizer.token_to_id(QUOTE),
            think=tokenizer.token_to_id(THINK),
        )

    def opened_thought(self, prompt_ids: Sequence[int]) -> int | None:
        """Where a prompt has opened the thought in which its reply begins, if it has."""
        marks = {self.channel_open, self.channel_close, self.turn_open, self.turn_close}
        last = next((n for n in reversed(range(len(prompt_ids))) if prompt_ids[n] in marks), None)
        return None if last is None or prompt_ids[last] != self.channel_open else last

    def end_reply(self, token_id: int) -> bool:
        """Whether the model ends its reply with this token, as far as the template's form goes."""
        return token_id in (self.turn_close, self.tool_response_open, self.end_of_text)

    def end_call(self, token_id: int) -> bool:
        """Whether a call that is open cannot go on behind this token, unless it stands in a string."""
        structure = (self.channel_open, self.channel_close, self.turn_open, self.tool_call_open, self.tool_call_close)
        return token_id in structure or self.end_reply(token_id)


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

    def step(self, token_id: int | str) -> str:
        """What became printable; an id outside the vocabulary, or a special token to skip, adds nothing.

        Text comes out as it is.
        """
        if isinstance(token_id, str):
            return self._utf8.decode(b"", final=True) + token_id
        byte = BYTE_TOKEN.fullmatch(self._tokenizer.id_to_token(token_id) or "")
        if byte:
            return self._utf8.decode(bytes.fromhex(byte[1]))
        text = self._tokenizer.decode([token_id], skip_special_tokens=self._skip_special_tokens)
        return self._utf8.decode(b"", final=True) + text if text else ""


class _State(Enum):
    ANSWER = "answer"
    THOUGHT = "thought"
    TOOL_CALL = "tool call"


@dataclass
class _Doubt:
    """What follows a call inside a thought: if the thought closes, it was only thought of; else it is a call."""

    as_thought: list[str] = field(default_factory=list)  # all of it
    as_reply: list[str] = field(default_factory=list)  # without the calls
    calls: list[Call] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)


class ReplyParser:
    """Sorts a reply's tokens into answer, thought and tool calls.

    It goes by token ids: text that merely looks like a control token stays text. Text may be fed between ids, as it is.
    No sequence makes it raise. schemas: of the arguments of each tool, by name, for calls that are nearly right; notes:
    what to say with the first piece; stop: texts before which the answer ends: it is `stopped` then.
    calls_end_thoughts: the reply is held to that; else a call inside a thought is one if the thought does not close.
    """

    def __init__(
        self,
        tokenizer: Tokenizer,
        controls: Controls,
        prompt_ids: Sequence[int],
        schemas: Mapping[str, Schema] | None = None,
        notes: Iterable[str] = (),
        stop: Sequence[str] = (),
        calls_end_thoughts: bool = False,
    ) -> None:
        self.tool_calls: list[Call] = []
        self.thinking_tokens = 0
        self._parts: list[CallPart] = []
        self._begun = 0  # calls of which parts were given, those included that turned out to be none
        self._tokenizer = tokenizer
        self._controls = controls
        self._schemas = schemas or {}
        self._notes = list(notes)
        self._stop = StopTexts(stop)
        self._calls_end_thoughts = calls_end_thoughts
        self._text: list[str] = []
        self._cut = ""  # a call that the reply ends in, as text: no text to stop at is looked for in it
        self._thinking: list[str] = []
        self._given: list[tuple[str, str]] = []
        self._call: list[int | str] = []  # what stands in it so far
        self._in_string = False  # of a call: behind an odd number of quote tokens
        self._first_end: int | None = None  # index of the first token in _call that ends it, if its string is none
        self._doubt: _Doubt | None = None
        self._first_line: str | None = None  # of a thought, held back while it may be the channel's name
        self._first_line_in_prompt = ""  # the part of that line that the prompt holds
        self._beginning: list[str] | None = None  # of the reply, while it may be a thought that nothing opened
        self._enter(_State.ANSWER)
        self._continue_prompt(prompt_ids)

    @property
    def in_thought(self) -> bool:
        return self._state is _State.THOUGHT or self._doubt is not None

    @property
    def stopped(self) -> str:
        """The text to stop at that ended the answer, if one did."""
        return self._stop.found

    @property
    def message(self) -> dict[str, Any]:
        """The assistant message of all that was given out, once it is finished."""
        text = "".join(text for text, _ in self._given)
        return assistant_message(text, whole_thought(thinking for _, thinking in self._given), self.tool_calls)

    def feed(self, symbols: Iterable[int | str]) -> tuple[str, str]:
        """(text, thinking) that these tokens made printable."""
        for symbol in symbols:
            thought = self._state is _State.THOUGHT
            self._step(symbol)
            self.thinking_tokens += thought or self._state is _State.THOUGHT
        return self._take()

    def finish(self, finish_reason: str = "stop") -> tuple[str, str]:
        """(text, thinking) that was held back, after the last token; a character that lacks bytes is dropped.

        A call whose end token is missing counts if the reply was not cut off ("length"), or lacks nothing else.
        """
        cut = finish_reason == "length"
        while self._state is _State.TOOL_CALL:
            self._end_unfinished_call(cut)
        self._enter(_State.ANSWER)
        self._settle(closed=cut)
        return self._take(last=True)

    def take_notes(self) -> list[str]:
        """What there is to say since the last time."""
        notes, self._notes = self._notes, []
        return notes

    def take_calls(self) -> list[CallPart]:
        """What became known of calls since the last time."""
        parts, self._parts = self._parts, []
        return parts

    def would_end(self, token_id: int) -> bool:
        """Whether the reply ends at this token: not where it stands in a call's string."""
        in_string = self._state is _State.TOOL_CALL and self._in_string
        return self._controls.end_reply(token_id) and not in_string

    def think(self) -> None:
        """Go on inside a thought, whose name has been written."""
        self._enter(_State.THOUGHT)
        self._first_line = None

    def _continue_prompt(self, prompt_ids: Sequence[int]) -> None:
        """After a tool response the template opens the thought itself, and the reply begins inside it."""
        opened = self._controls.opened_thought(prompt_ids)
        if opened is None:
            end = list(prompt_ids[-max(map(len, REPLY_ANCHORS)) :])
            if not end or self._tokenizer.decode(end, skip_special_tokens=False).endswith(REPLY_ANCHORS):
                self._beginning = []
            return
        self._enter(_State.THOUGHT)
        self._first_line_in_prompt = self._tokenizer.decode(list(prompt_ids[opened + 1 :]))
        if "\n" in self._first_line_in_prompt:
            self._first_line = None

    def _enter(self, state: _State) -> None:
        if self._first_line and self._first_line_in_prompt + self._first_line != THOUGHT_CHANNEL:
            self._add_thought(self._first_line)  # the thought ended on its first line: that was no name
        self._first_line = "" if state is _State.THOUGHT else None
        self._first_line_in_prompt = ""
        self._release()
        self._call, self._in_string, self._first_end = [], False, None
        self._open: OpenCall | None = None
        self._decoder = TokenDecoder(self._tokenizer, skip_special_tokens=True)
        self._state = state

    def _step(self, symbol: int | str) -> None:
        c = self._controls
        if self._state is _State.TOOL_CALL:
            self._step_in_call(symbol)
        elif symbol == c.channel_open:
            self._enter(_State.THOUGHT)
        elif symbol == c.channel_close and self._state is _State.THOUGHT:
            self._enter(_State.ANSWER)
            self._settle(closed=True)
        elif symbol == c.channel_close and self._beginning and "".join(self._beginning).startswith(THOUGHT_LINE):
            self._thinking.append("".join(self._beginning).removeprefix(THOUGHT_LINE))
            self._beginning = None
            self._enter(_State.ANSWER)
        elif symbol == c.tool_call_open:
            if self._state is _State.THOUGHT and self._doubt is None and not self._calls_end_thoughts:
                self._enter(_State.THOUGHT)  # gives out a first line that was no name
                self._doubt = _Doubt()
            self._enter(_State.TOOL_CALL)
            if self._doubt is None:
                self._open = OpenCall(self._begun)
                self._decoder = TokenDecoder(self._tokenizer, skip_special_tokens=False)
        elif self._state is _State.THOUGHT:
            self._think(self._decoder.step(symbol))
        else:
            self._answer(self._decoder.step(symbol))

    def _answer(self, text: str) -> None:
        if self._beginning is None or not text:
            self._text.append(text)
            return
        self._beginning.append(text)
        begun = "".join(self._beginning[: len(THOUGHT_LINE)])
        if not (THOUGHT_LINE.startswith(begun) or begun.startswith(THOUGHT_LINE)):
            self._release()

    def _release(self) -> None:
        self._text += self._beginning or []
        self._beginning = None

    def _think(self, text: str) -> None:
        if self._first_line is None:
            self._add_thought(text)
            return
        self._first_line += text
        name, line_break, rest = (self._first_line_in_prompt + self._first_line).partition("\n")
        if line_break or not THOUGHT_CHANNEL.startswith(name):
            is_name = line_break and name in ("", THOUGHT_CHANNEL)  # else it is the thought's first line
            self._add_thought(rest if is_name else self._first_line)
            self._first_line = None

    def _add_thought(self, text: str) -> None:
        if self._doubt is None:
            self._thinking.append(text)
        else:
            self._doubt.as_thought.append(text)
            self._doubt.as_reply.append(text)

    def _settle(self, closed: bool) -> None:
        """The calls inside a thought, if there are any: only thought of if it has closed."""
        doubt, self._doubt = self._doubt, None
        if doubt is None:
            return
        self._thinking += doubt.as_thought if closed else doubt.as_reply
        if not closed:
            self._parts += [whole_part(n, call) for n, call in enumerate(doubt.calls, self._begun)]
            self._begun += len(doubt.calls)
            self.tool_calls += doubt.calls
            self._notes += doubt.notes

    # calls

    def _step_in_call(self, symbol: int | str) -> None:
        if isinstance(symbol, str) or not self._controls.end_call(symbol):
            self._in_string ^= symbol == self._controls.quote
            self._call.append(symbol)
            if self._open is not None:
                mark = QUOTE_TOKEN if symbol == self._controls.quote else symbol
                self._parts += self._open.feed(self._decoder.step(mark))
        elif self._in_string:  # either part of the string, or the string lacks its end
            if self._first_end is None:
                self._first_end = len(self._call)
            self._call.append(symbol)
            if self._open is not None:
                self._open.wait()
        elif self._first_end is not None and not is_call(self._written(self._call)):
            self._end_call_at(self._first_end, symbol)
        else:
            self._end_call(self._call, symbol)

    def _end_call_at(self, index: int, *following: int | str) -> None:
        """The call ended at `index` of what was taken for it: sort what follows anew, if the reply did not end too."""
        call, end, rest = self._call[:index], self._call[index], self._call[index + 1 :]
        self._end_call(call, end)
        if isinstance(end, int) and self._controls.end_reply(end):
            return
        for symbol in (*rest, *following):
            self._step(symbol)

    def _end_call(self, call: list[int | str], end: int | str) -> None:
        text, closed = self._written(call), end == self._controls.tool_call_close
        try:
            self._leave_call(text, "", self._read(text))
        except ValueError as error:
            self._leave_call(text, TOOL_CALL_CLOSE if closed else "", [], str(error))
        if not closed:
            self._step(end)

    def _end_unfinished_call(self, cut: bool) -> None:
        text = self._written(self._call)
        if self._first_end is not None and not is_call(text):
            self._end_call_at(self._first_end)
            return
        try:
            if text.rstrip().endswith("{"):
                raise ValueError("nothing is said of its arguments")
            self._leave_call(text, "", self._read(text, ended=not cut))
        except ValueError:
            self._leave_call(text, "", [], "the reply ends inside it")
            if self._doubt is None:
                self._cut = self._text.pop()

    def _read(self, text: str, ended: bool = True) -> list[Call]:
        return read_tool_calls(text, self._schemas, ended, quotes=(QUOTE_TOKEN, QUOTE))

    def _leave_call(self, text: str, close: str, calls: list[Call], reason: str = "") -> None:
        """Keep the calls, or if there are none, the text, and say why."""
        kept = "" if calls else TOOL_CALL_OPEN + spelled(text) + close
        notes = [] if calls else [f"a tool call is kept as text: {reason}"]
        if self._doubt is not None:
            self._doubt.as_thought.append(spelled(text))
            self._doubt.as_reply.append(kept)
            self._doubt.calls += calls
            self._doubt.notes += notes
            self.think()
            return
        assert self._open is not None  # no thought is around it
        for n, call in enumerate(calls):
            self._parts += [whole_part(self._begun + n, call)] if n else self._open.finish(call)
        self._begun += len(calls) if calls else int(self._open.name is not None)
        self._enter(_State.ANSWER)
        self.tool_calls += calls
        self._text.append(kept)
        self._notes += notes

    def _written(self, call: list[int | str]) -> str:
        """The text of a call, with a mark of its own for quote tokens."""
        decoder = TokenDecoder(self._tokenizer, skip_special_tokens=False)
        return "".join(decoder.step(QUOTE_TOKEN if symbol == self._controls.quote else symbol) for symbol in call)

    def _take(self, *, last: bool = False) -> tuple[str, str]:
        last = last or (self._state is _State.TOOL_CALL and self._doubt is None)  # no text to stop at spans a call
        text = self._stop.feed("".join(self._text), last=last)
        printable = text + ("" if self.stopped else self._cut), "".join(self._thinking)
        self._text, self._thinking, self._cut = [], [], ""
        self._given.append(printable)
        return printable


def is_call(text: str) -> bool:
    try:
        parse_tool_call(text, QUOTE_TOKEN)
    except ValueError:
        return False
    return True
