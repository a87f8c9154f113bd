"""One request in work: a thread of its own asks the engine, and hands what comes to the loop that answers."""

import asyncio
import logging
import traceback
from collections import deque
from collections.abc import Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from itertools import chain, islice
from threading import Thread
from typing import Any

import mlx.core as mx

from mlx_gemma4.engine.engine import Engine, Stream
from mlx_gemma4.engine.request import Options, Request
from mlx_gemma4.errors import Kind, MediaError, TooLongError, kind, one_line
from mlx_gemma4.prompt.prompt import Prompt
from mlx_gemma4.reply.reply import TOOL_CALL_OPEN, Piece
from mlx_gemma4.serve.ask import Ask, Refused
from mlx_gemma4.serve.media import opened
from mlx_gemma4.serve.metrics import Metrics
from mlx_gemma4.serve.resident import Resident

logger = logging.getLogger("mlx_gemma4.serve")


@dataclass(frozen=True)
class Begun:
    """The engine has taken the request: nothing is wrong with it."""

    prompt_tokens: int


Event = Begun | Refused | tuple[int, Piece]  # which of the replies, and a piece of it


class Job:
    """Asks for the replies to one request; made and used by the loop, but for what its own threads do."""

    def __init__(self, resident: Resident, metrics: Metrics, ask: Ask, scope: str, *, is_part: bool = False):
        """is_part: of what the resident has admitted as a whole."""
        self.resident, self.metrics, self.ask, self.scope = resident, metrics, ask, scope
        self.replies = ask.n * max(len(ask.prompts), 1)
        self.admitted = 0 if is_part else self.replies
        self.loop = asyncio.get_running_loop()
        self.news = asyncio.Event()
        self.events: deque[Event | None] = deque()  # None: no more
        self.told = self.left = False
        self.streams: list[Stream] = []
        self.prompt_tokens = 0  # of all that is to be gone on with

    def start(self) -> None:
        """Refused if too many replies are asked for already."""
        self.resident.admit(self.admitted)
        Thread(target=self.run, name="mlx_gemma4.Job", daemon=True).start()

    def leave(self) -> None:
        """Nobody waits for it any more: its rows are free within one round."""
        self.left = True
        for stream in [*self.streams]:
            stream.close()

    async def given(self, seconds: float) -> list[Event | None]:
        """What came since the last time, as soon as there is any; nothing after so many seconds."""
        with suppress(asyncio.TimeoutError):
            await asyncio.wait_for(self.news.wait(), seconds)
        self.news.clear()
        self.told = False
        return [self.events.popleft() for _ in range(len(self.events))]

    @property
    def progress(self) -> str:
        """What there is to say of how far the prompt is read, where that is asked."""
        say = self.ask.progress
        if say is None:
            return ""
        for work in [stream.work for stream in self.streams]:
            reading, row = work.reading, work.row
            # of a row that was parked its reply is read too
            if reading is not None and row is not None and row.count == 0:
                return say(len(work.prompt), row.cached, len(work.prompt) - work.left)
        return ""

    # --- its own threads -----------------------------------------------------------------------

    def put(self, event: Event | None) -> None:
        self.events.append(event)
        if not self.told:
            self.told = True
            with suppress(RuntimeError):  # the loop has ended
                self.loop.call_soon_threadsafe(self.news.set)

    def run(self) -> None:
        try:
            asked = self.submit()
            self.put(Begun(self.prompt_tokens))
            begun = self.echo(asked) if self.ask.echo else {}
            pumps = [
                Thread(target=self.pump, args=(choice, begun.get(choice, ()), stream), daemon=True)
                for choice, stream in enumerate(self.streams)
            ]
            for pump in pumps[1:]:
                pump.start()
            pumps[0].run()
            for pump in pumps[1:]:
                pump.join()
        except Exception as error:  # whatever it is, the client must learn that nothing follows
            self.leave()
            self.put(refused(error))
        for stream in self.streams:  # those that a client left count as far as they were written
            if (stats := stream.stats()) is not None:
                self.metrics.count(stats)
        self.put(None)
        self.resident.release(self.admitted)
        mx.clear_streams()

    def submit(self) -> list[tuple[Prompt, int]]:
        """Begin the streams, which says what is wrong with the request; what `prompts` gives."""
        ask, engine, asked = self.ask, self.resident.load(), list[tuple[Prompt, int]]()
        for prompt, added in prompts(ask, self.resident):
            asked.append((prompt, added))
            self.prompt_tokens += len(prompt)
            for number in range(ask.n):
                self.streams.append(self.stream(engine, prompt, number))
                if self.left:
                    self.leave()
        return asked

    def echo(self, asked: list[tuple[Prompt, int]]) -> dict[int, list[Piece]]:
        """Each prompt as the first piece of its replies, as the client gave it; what is to follow it of those that had
        to begin, for their prompt to be scored."""
        ask, begun = self.ask, dict[int, list[Piece]]()
        for index, (prompt, added) in enumerate(asked):
            given, first = prompt.token_ids[added:], index * ask.n
            text = self.resident.processor.tokenizer.decode(given, skip_special_tokens=False)
            entries: list[dict[str, Any]] | None = None
            if ask.logprobs is not None:
                stream = self.streams[first]
                begun[first] = [*islice(stream, 1)]
                row = stream.work.row
                entries = [] if row is None else row.scores[added:]
            for number in range(ask.n):
                self.put((first + number, Piece(text, "", given, logprobs=entries)))
        return begun

    def stream(self, engine: Engine, prompt: Prompt, number: int) -> Stream:
        ask, sampling = self.ask, self.ask.sampling
        if sampling.seed is not None:
            sampling = replace(sampling, seed=(sampling.seed + number) % 2**64)
        options = Options(
            max_tokens=self.resident.context if ask.max_tokens is None else max(ask.max_tokens, 1),
            sampling=sampling,
            draft_length=ask.draft_length,
            stop=ask.stop,
            thinking_budget=ask.thinking_budget,
            logprobs=ask.logprobs,
            prompt_logprobs=ask.echo and ask.logprobs is not None and not number,
            logit_bias=ask.logit_bias,
            response_format=ask.response_format,
            tool_choice=ask.tool_choice,
            parallel_tool_calls=ask.parallel_tool_calls,
            scope=self.scope,
            adapter=ask.adapter,
        )
        return engine.ask(Request(content=prompt), options)

    def pump(self, choice: int, begun: Sequence[Piece], stream: Stream) -> None:
        """begun: what has been taken of it."""
        try:
            for piece in chain(begun, stream):
                if self.ask.max_tokens == 0:
                    piece = untold(piece)
                elif self.ask.echo and piece.end is not None:  # who scores texts counts all tokens, and drops the last
                    piece = replace(piece, logprobs=[piece.end])
                if piece.stats is not None:
                    piece = without_cut_call(piece)
                self.put((choice, piece))
        except Exception as error:  # the others of the request's replies go on
            self.put(refused(error))


def prompts(ask: Ask, resident: Resident) -> Iterator[tuple[Prompt, int]]:
    """What a request asks to be gone on with, and how many of its first tokens the client has not given. ValueError if
    it is wrong."""
    processor = resident.processor
    if ask.messages is not None:
        wanted = resident.settings.thinking if ask.thinking is None else ask.thinking
        prompt = processor(
            opened(ask.messages, resident.settings.allowed),
            tools=ask.tools,
            thinking=wanted and ask.thinking_budget != 0,
            image_budget=ask.image_budget,
            preserve_thinking=ask.preserve_thinking,
            continue_final_message=ask.continue_final_message,
        )
        yield prompt, 0
    for given in ask.prompts:
        ids = given if isinstance(given, list) else processor.ids(given)
        begin = processor.control.ids[processor.bos_token]
        added = [] if ids[:1] == [begin] else [begin]  # without it the model reads no text as text
        yield Prompt(added + ids), len(added)


def untold(piece: Piece) -> Piece:
    """What a client has of it who asks for the prompt alone: no reply has no token, but he is not told of it."""
    told = Piece("", "", [])
    if piece.stats is None:
        return told
    stats = replace(piece.stats, generation_tokens=0, thinking_tokens=0)
    return replace(told, finish_reason="length", tool_calls=[], stats=stats)


def without_cut_call(last: Piece) -> Piece:
    """The last piece without the text of a call that was cut: what is known of it has been given as a call."""
    return replace(last, text="") if last.text.startswith(TOOL_CALL_OPEN) and last.finish_reason != "stop" else last


def refused(error: Exception) -> Refused:
    """What a client is told of an error."""
    if isinstance(error, Refused):
        return error
    if isinstance(error, TooLongError):
        message = f"prompt is too long: {error.tokens} tokens > {error.limit - 1} maximum"
        return Refused(message, field="messages", code="context_length_exceeded")
    if isinstance(error, MemoryError):
        return Refused(str(error), field="messages", code="context_length_exceeded")
    if isinstance(error, MediaError) or kind(error) is Kind.WRONG_REQUEST:
        return Refused(str(error))
    place = traceback.extract_tb(error.__traceback__)[-1:]
    where = "".join(f" at {frame.name}, {frame.filename}:{frame.lineno}" for frame in place)
    logger.error("a request failed: %s: %s%s", type(error).__name__, one_line(error), where)
    return Refused("the server failed at this request; its log says where", status=500)
