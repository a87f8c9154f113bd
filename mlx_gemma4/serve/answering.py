"""From a request's bytes to the answer's: bodies within bounds, streams with pings, clients that leave."""

import asyncio
import json
import logging
import time
from collections.abc import AsyncIterator, Callable, Iterator, Mapping, Sequence
from contextlib import asynccontextmanager, contextmanager
from typing import Any

import anyio
from starlette.types import Message, Receive, Send

from mlx_gemma4.errors import one_line
from mlx_gemma4.reply.reply import Piece, Reply, collect
from mlx_gemma4.serve.ask import Ask, Refused, Writer
from mlx_gemma4.serve.job import Begun, Event, Job
from mlx_gemma4.serve.resident import RETRY_SECONDS, Resident
from mlx_gemma4.serve.transcription import ALONGSIDE, Transcription, read_recording

logger = logging.getLogger("mlx_gemma4.serve")

MOST_BODY = 256 * 2**20  # bytes
MOST_BODIES = 2**30  # bytes of all requests that are there and not answered yet
SILENCE = 30  # seconds that a body may stand still, or a reader leave what is sent to him
PING = 5  # seconds: clients give up after 10 to 300 of silence
PROGRESS = 0.5  # seconds between two words on how far a prompt is read


class Gone(Exception):
    """The client has left: nobody is to be told anything."""


# --- bodies ------------------------------------------------------------------------------------


class Bodies:
    """The bytes that requests hold until they are answered."""

    def __init__(self) -> None:
        self.held = 0

    @contextmanager
    def one(self) -> Iterator[Callable[[int], None]]:
        """Gives what counts the bytes of one body: Refused where all have too many together."""
        own = 0

        def count(size: int) -> None:
            nonlocal own
            if self.held + size > MOST_BODIES:
                raise Refused(f"requests hold {MOST_BODIES >> 20} MB; expected less, or later", status=429)
            own, self.held = own + size, self.held + size

        try:
            yield count
        finally:
            self.held -= own


async def read_body(receive: Receive, headers: Mapping[str, str], count: Callable[[int], None]) -> bytes:
    """Refused if it is too large or stands still; Gone if the client leaves."""
    length = headers.get("content-length", "")
    if length.isdecimal() and len(length) < 20 and int(length) > MOST_BODY:
        raise too_large()
    body = bytearray()
    while True:
        try:
            message = await asyncio.wait_for(receive(), SILENCE)
        except asyncio.TimeoutError:
            raise Refused(f"the body stood still for {SILENCE} seconds", status=408) from None
        if message["type"] == "http.disconnect":
            raise Gone
        count(len(message.get("body", b"")))
        body += message.get("body", b"")
        if len(body) > MOST_BODY:
            raise too_large()
        if not message.get("more_body"):
            return bytes(body)


def too_large() -> Refused:
    return Refused(f"the body has more than {MOST_BODY >> 20} MB; expected less", status=413)


def read_json(body: bytes) -> dict[str, Any]:
    """Refused for anything but an object of finite numbers."""
    try:
        value = json.loads(body, parse_constant=not_finite)
    except RecursionError:
        raise Refused("the body is nested too deep; expected a JSON object") from None
    except ValueError as error:  # not JSON, not UTF-8, numbers too long
        raise Refused(f"the body is not JSON: {one_line(error)}") from None
    if not isinstance(value, dict):
        raise Refused("the body is not a JSON object; expected one")
    return value


def not_finite(name: str) -> None:
    raise ValueError(f"{name} is no number of JSON's")


# --- answers -----------------------------------------------------------------------------------


async def answer(
    send: Send, status: int, body: bytes, content_type: str = "application/json", headers: Mapping[str, str] = {}
) -> None:
    own = {name.lower(): value for name, value in headers.items()}
    own |= {"content-type": content_type, "content-length": str(len(body))}
    if status == 429:
        own["retry-after"] = str(RETRY_SECONDS)
    if status == 401:
        own["www-authenticate"] = "Bearer"
    await deliver(send, {"type": "http.response.start", "status": status, "headers": encoded(own)})
    await deliver(send, {"type": "http.response.body", "body": body})


def encoded(headers: Mapping[str, str]) -> list[tuple[bytes, bytes]]:
    return [(name.encode(), value.encode("latin-1", "replace")) for name, value in headers.items()]


def as_bytes(value: dict[str, Any]) -> bytes:
    return json.dumps(value, ensure_ascii=False).encode("utf-8", "replace")  # of half a surrogate pair, a ?


async def deliver(send: Send, message: Message) -> None:
    """Gone if the client takes nothing of it for long."""
    try:
        with anyio.fail_after(SILENCE):
            await send(message)
    except TimeoutError:
        raise Gone from None


@asynccontextmanager
async def watched(jobs: Sequence[Job], receive: Receive) -> AsyncIterator[None]:
    """While the block runs, a client that leaves ends it with Gone; the jobs are left when it ends, however that is."""

    async def end_with_client() -> None:
        while (await receive())["type"] != "http.disconnect":
            pass
        block.cancel()

    block = anyio.CancelScope()
    watch = asyncio.create_task(end_with_client())
    try:
        with block:
            yield
    finally:
        watch.cancel()
        for job in jobs:
            job.leave()
    if block.cancelled_caught:
        raise Gone


async def whole(job: Job, writer: Writer, receive: Receive) -> bytes:
    """The answer of a request that is not streamed. Refused for what went wrong, Gone if the client leaves."""
    job.start()
    async with watched([job], receive):
        return as_bytes(writer.whole(await replies(job)))


async def replies(job: Job) -> list[Reply]:
    """Refused for what went wrong."""
    pieces: list[list[Piece]] = [[] for _ in range(job.replies)]
    while True:
        for event in await job.given(PING):
            match event:
                case None:
                    return [collect(own) for own in pieces]
                case Refused():
                    raise event
                case (choice, piece):
                    pieces[choice].append(piece)


async def transcribed(
    asked: Transcription, receive: Receive, job_of: Callable[[Ask], Job], resident: Resident
) -> bytes:
    """The answer of a request for what is said in a recording, which is admitted once: a queue that fills meanwhile
    does not end it."""
    samples, pieces = await asyncio.to_thread(read_recording, asked.recording)
    jobs = [job_of(asked.ask(samples[start:end])) for start, end in pieces]
    found: list[Reply] = []
    alongside = min(ALONGSIDE, resident.most)
    with resident.admitted(min(alongside, len(jobs))):
        async with watched(jobs, receive):
            for first in range(0, len(jobs), alongside):
                group = jobs[first : first + alongside]
                for job in group:
                    job.start()
                found += [reply for own in await asyncio.gather(*map(replies, group)) for reply in own]
    return asked.answer(samples, pieces, found)


async def streamed(job: Job, writer: Writer, receive: Receive, send: Send) -> None:
    """The answer as server-sent events. Refused if something is wrong before any of it has been sent."""
    job.start()
    async with watched([job], receive):
        found = await job.given(PING)
        if found and isinstance(found[0], Refused):
            raise found[0]
        own = {
            "content-type": "text/event-stream; charset=utf-8",
            "cache-control": "no-cache",
            "x-accel-buffering": "no",  # nginx would keep them back
        }
        await deliver(send, {"type": "http.response.start", "status": 200, "headers": encoded(own)})
        last = time.monotonic()
        while True:
            frames, ended = "", False
            for event in found:
                frames += "".join(written(event, writer))
                ended = event is None or isinstance(event, Refused)
                if ended:
                    break
            now = time.monotonic()
            frames = frames or job.progress
            if not frames and now - last >= PING:
                frames = writer.ping()
            if frames or ended:
                body = frames.encode("utf-8", "replace")
                await deliver(send, {"type": "http.response.body", "body": body, "more_body": not ended})
                last = now
            if ended:
                return
            found = await job.given(PROGRESS if job.ask.progress else max(0, last + PING - time.monotonic()))


def written(event: Event | None, writer: Writer) -> Iterator[str]:
    """What an event is in a stream."""
    match event:
        case None:
            yield from writer.end()
        case Refused():
            yield from writer.failed(event)
        case Begun():
            yield from writer.begin(event.prompt_tokens)
        case (choice, piece):
            yield from writer.piece(piece, choice)
