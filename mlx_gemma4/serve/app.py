"""What is where: paths to what answers them."""

import asyncio
import json
import logging
import time
from dataclasses import replace
from typing import Any

from prometheus_client import CONTENT_TYPE_LATEST
from starlette.types import Message, Receive, Scope, Send

from mlx_gemma4.reply.reply import BYTE_TOKEN
from mlx_gemma4.serve.answering import (
    Bodies,
    Gone,
    answer,
    as_bytes,
    read_body,
    read_json,
    streamed,
    transcribed,
    whole,
)
from mlx_gemma4.serve.anthropic import Anthropic
from mlx_gemma4.serve.ask import Ask, Dialect, Refused, Writer
from mlx_gemma4.serve.chat import Chat
from mlx_gemma4.serve.completions import Completions
from mlx_gemma4.serve.guard import Guard
from mlx_gemma4.serve.job import Job, prompts, refused
from mlx_gemma4.serve.metrics import Metrics
from mlx_gemma4.serve.page import page
from mlx_gemma4.serve.resident import Resident
from mlx_gemma4.serve.responses import Responses, Shelf
from mlx_gemma4.serve.transcription import FORMATS, read_form

logger = logging.getLogger("mlx_gemma4.serve")

READ = ("GET", "HEAD")
OPEN = ("", "api/hello", "health", "ready")  # to be read without a key
TRANSCRIPTIONS = "audio/transcriptions"
COUNT = "messages/count_tokens"
LARGE = 2**17  # bytes of a body that a thread of its own makes sense of
LEFT = 499  # the status of a client that did not wait, as nginx has it


class App:
    """The server's answers, as an ASGI application."""

    def __init__(self, resident: Resident, guard: Guard):
        self.resident, self.guard = resident, guard
        self.metrics = Metrics(resident)
        self.started = int(time.time())
        shelf = Shelf()
        self.named = {name: self.dialects_of(name, shelf) for name in (resident.name, *resident.adapters)}
        self.dialects = self.named[resident.name]
        self.running = 0  # requests that are there as a whole and not answered yet
        self.is_closing = False
        self.bodies = Bodies()

    def dialects_of(self, name: str, shelf: Shelf) -> dict[str, Dialect]:
        """By path, for a model of this name."""
        anthropic = Anthropic(name)
        return {
            "chat/completions": Chat(name, self.token_bytes),
            "completions": Completions(name, self.token_bytes),
            "responses": Responses(name, shelf),
            "messages": anthropic,
            COUNT: anthropic,
        }

    def token_bytes(self, token: int) -> bytes:
        """What a token stands for: text, or one byte of a character that takes several tokens."""
        tokenizer = self.resident.processor.tokenizer
        byte = BYTE_TOKEN.fullmatch(tokenizer.id_to_token(token) or "")
        return bytes.fromhex(byte[1]) if byte else tokenizer.decode([token], skip_special_tokens=False).encode()

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            return
        headers = {name.decode("latin-1").lower(): value.decode("latin-1") for name, value in scope["headers"]}
        path, status, began = plain_path(scope["path"]), 0, time.perf_counter()

        async def sent(message: Message) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
                cors = self.guard.cors(headers)
                message["headers"] += [(name.encode(), value.encode("latin-1")) for name, value in cors.items()]
            await send(message)

        try:
            await self.handle(scope["method"], path, headers, receive, sent)
        except Gone:
            status = LEFT
        except Exception as error:  # the client is told one line, never a traceback
            told = refused(error)
            dialect = self.dialects.get(path, self.dialects["chat/completions"])
            if not status:
                await answer(sent, told.status, as_bytes(dialect.error(told)))
        finally:
            known = path if path in (*self.dialects, TRANSCRIPTIONS, *OPEN, "models", "metrics") else "other"
            self.metrics.requests.labels(known, status).inc()
            if known not in OPEN and known != "metrics":
                logger.info("%s /%s: %d after %.2f s", scope["method"], known, status, time.perf_counter() - began)

    async def handle(self, method: str, path: str, headers: dict[str, str], receive: Receive, send: Send) -> None:
        host, origin = headers.get("host", ""), headers.get("origin")
        self.guard.check_host(host)
        self.guard.check_origin(origin, host)
        if method == "OPTIONS" and origin is not None:
            await answer(send, 204, b"", headers=self.guard.preflight(headers))
            return
        whose = "" if method in READ and path in OPEN else self.guard.scope(headers)
        if method == "POST" and (path in self.dialects or path == TRANSCRIPTIONS):
            with self.bodies.one() as count:
                body = await read_body(receive, headers, count)
                self.running += 1
                try:
                    if path == TRANSCRIPTIONS:
                        await self.transcribe(body, whose, headers.get("content-type", ""), receive, send)
                    else:
                        await self.converse(path, body, whose, receive, send)
                finally:
                    self.running -= 1
        elif method in READ:
            await self.show(path, send)
        elif path in (*self.dialects, TRANSCRIPTIONS, *OPEN):
            raise Refused(f"/{path} is not for {method}", status=405)
        else:
            raise not_here(path)

    async def show(self, path: str, send: Send) -> None:
        """What can be read."""
        kind, _, name = path.partition("/")
        if path == "metrics":
            # a thread's: the store may be in the hands of one that writes it to a disk
            text = await asyncio.to_thread(self.metrics.text)
            await answer(send, 200, text, CONTENT_TYPE_LATEST)
        elif path == "ready":
            ready = self.resident.is_ready and not self.is_closing
            await answer(send, 200 if ready else 503, as_bytes({"ready": ready}))
        elif path == "":
            document, headers = page()
            await answer(send, 200, document, "text/html; charset=utf-8", headers)
        elif path in ("health", "api/hello"):
            await answer(send, 200, as_bytes({"status": "ok"}))
        elif path == "models":
            await answer(send, 200, as_bytes({"object": "list", "data": [*map(self.model, self.named)]}))
        elif kind == "models" and name in self.named:
            await answer(send, 200, as_bytes(self.model(name)))
        elif path in (*self.dialects, TRANSCRIPTIONS):
            raise Refused(f"/{path} is asked with POST", status=405)
        else:
            raise not_here(path)

    def model(self, name: str) -> dict[str, Any]:
        """As OpenAI's and Anthropic's clients have it, the context's length under each name that they look for."""
        length, created_at = self.resident.context, time.strftime("%FT%TZ", time.gmtime(self.started))
        return {
            "id": name, "object": "model", "created": self.started, "owned_by": "mlx_gemma4",
            "context_length": length, "max_model_len": length, "context_window": length,
            "type": "model", "display_name": name, "created_at": created_at,
        }  # fmt: skip

    async def transcribe(self, body: bytes, whose: str, content_type: str, receive: Receive, send: Send) -> None:
        asked = await read_form(body, content_type)
        adapter = self.resident.chosen(asked.model)

        def job(ask: Ask) -> Job:
            return Job(self.resident, self.metrics, replace(ask, adapter=adapter), whose, is_part=True)

        found = await transcribed(asked, receive, job, self.resident)
        await answer(send, 200, found, FORMATS[asked.form])

    async def converse(self, path: str, body: bytes, whose: str, receive: Receive, send: Send) -> None:
        if len(body) < LARGE:
            ask, writer = self.understood(path, body, whose)
        else:
            ask, writer = await asyncio.to_thread(self.understood, path, body, whose)
        if path == COUNT:
            count = await asyncio.to_thread(lambda: sum(len(prompt) for prompt, _ in prompts(ask, self.resident)))
            await answer(send, 200, json.dumps({"input_tokens": count}).encode())
            return
        job = Job(self.resident, self.metrics, ask, whose)
        if ask.stream:
            await streamed(job, writer, receive, send)
        else:
            await answer(send, 200, await whole(job, writer, receive))

    def understood(self, path: str, body: bytes, whose: str) -> tuple[Ask, Writer]:
        asked = read_json(body)
        adapter = self.resident.chosen(asked.get("model"))
        ask, writer = self.named[adapter or self.resident.name][path].parse(asked, whose)
        return replace(ask, adapter=adapter), writer


def plain_path(path: str) -> str:
    """A path without the slashes at its ends, doubled ones, and `v1` at its beginning, however often that stands there:
    clients join theirs to a base in every way."""
    parts = [part for part in path.split("/") if part]
    while parts and parts[0] == "v1":
        parts.pop(0)
    return "/".join(parts)


def not_here(path: str) -> Refused:
    return Refused(f"there is no /{path[:100]} here", status=404)
