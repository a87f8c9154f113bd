"""Many clients of all kinds at one server, in a process of its own: nothing grows, hangs or is answered wrongly.

    python -m tests.load --requests 2000

Sixteen clients ask a toy model over its three protocols. A third of them leave before the end, and one request in ten
is no good one: its JSON or its bytes changed, half of it, or sent so slowly that it is given up or nearly. Every other
reply is compared with what the same server said when nobody else asked. At the end a signal finds replies half written:
they are written to their end, and the process ends. The exit status is 1 if anything of that is not so.
"""

import base64
import http.client
import io
import json
import os
import random
import re
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import typer
from PIL import Image

sys.path.insert(0, str(Path(__file__).parent))

from conftest import write_planted
from fuzz.harness import resident
from fuzz.mutate import LEAVES, edited, hurt, text_of
from toy_checkpoint import Shape

WORDS = ("the", "a", "fox", "bear", "runs", "home", "and", "or", "red", "blue", "sees", "sky", "tree", "one", "two")
PLACE = {"type": "object", "properties": {"place": {"type": "string"}, "far": {"type": "boolean"}}}
LOOK = PLACE | {"required": ["place"]}
ANSWER = {"type": "object", "properties": {"ok": {"type": "boolean"}, "kind": {"enum": ["a", "b"]}}, "required": ["ok"]}
SYSTEM = "one fox and two bear " * 20
CHAT, RESPONSES, MESSAGES = "/v1/chat/completions", "/v1/responses", "/v1/messages"
CLIENTS = 16
BODIES = 100  # that are different; all others are asked again
PARTS = 10
HUNG = 120  # seconds without a byte
CONTEXT = 2048  # tokens
STORE_BYTES = "30000000"

Asked = tuple[str, dict[str, Any]]  # a path and a body
Said = dict[str, Any]


@dataclass(frozen=True)
class Outcome:
    kind: str
    wrong: str = ""


def main(
    requests: Annotated[int, typer.Option(min=PARTS * CLIENTS, help="How many are asked.")] = 2000,
    seed: Annotated[int, typer.Option(help="Of the requests.")] = 0,
) -> None:
    """Ask them all."""
    with tempfile.TemporaryDirectory() as folder:
        model = write_planted(Path(folder) / "model", Shape(context=CONTEXT), 1, 2.2)
        log = Path(folder) / "log"
        with server(model, log, "--store-bytes", STORE_BYTES) as (process, port), ThreadPoolExecutor(CLIENTS) as pool:
            bodies = [some_request(random.Random(f"{seed} body {number}")) for number in range(BODIES)]
            lone = [read_reply(opened(port), asked) for asked in bodies]
            clients = [Client(port, bodies, lone) for _ in range(CLIENTS)]
            sizes: list[tuple[int, int]] = []
            wrong: list[str] = []
            counts: Counter[str] = Counter()
            for part in range(PARTS):
                numbers = range(requests * part // PARTS, requests * (part + 1) // PARTS)
                started = time.perf_counter()
                shares = [(client, numbers[place::CLIENTS]) for place, client in enumerate(clients)]
                for outcomes in pool.map(lambda own: own[0].run(own[1], seed), shares):
                    counts.update(outcome.kind for outcome in outcomes)
                    wrong += [outcome.wrong for outcome in outcomes if outcome.wrong]
                seconds = time.perf_counter() - started
                left, held = idle(port)
                wrong += left
                sizes.append((resident(process.pid), len(os.listdir(f"/proc/{process.pid}/fd"))))
                print(
                    f"{numbers.stop} of {requests}: {len(numbers) / seconds:.1f} a second, "
                    f"{sizes[-1][0] / 1e6:.0f} MB resident, {held}, {sizes[-1][1]} open files, {len(wrong)} wrong, "
                    f"{dict(counts)}", flush=True,
                )  # fmt: skip
            wrong += ended(process, port, clients, pool)
        said = log.read_text(encoding="utf-8", errors="replace")
        wrong += [line for line in said.splitlines() if "a request failed" in line]
        wrong += [said[said.index("Traceback") :]] if "Traceback" in said else []
    # the store fills and what is compiled comes and goes: the most of the second half beside that of three parts
    grown = max(size for size, _ in sizes[PARTS // 2 :]) / max(size for size, _ in sizes[:3])
    print(f"{len(wrong)} wrong; resident memory {grown:.2f} times what it was")
    for line in wrong[:20]:
        print(line[:3000])
    sys.exit(int(bool(wrong) or grown > 1.1 or sizes[-1][1] > sizes[0][1] + 2))


# --- the server ------------------------------------------------------------------------------------


@contextmanager
def server(model: Path, log: Path, *options: str) -> Iterator[tuple["subprocess.Popen[bytes]", int]]:
    command = [sys.executable, "-m", "mlx_gemma4.serve", "--model", str(model), "--port", "0", *options]
    with log.open("wb") as errors, subprocess.Popen(command, stderr=errors) as process:
        try:
            while not (found := re.search(r"http://\S+:(\d+) serves", log.read_text(encoding="utf-8"))):
                time.sleep(0.05)
            yield process, int(found[1])
        finally:
            process.kill()


def opened(port: int) -> http.client.HTTPConnection:
    return http.client.HTTPConnection("127.0.0.1", port, timeout=HUNG)


def idle(port: int) -> tuple[list[str], str]:
    """What is still in work, where nobody waits for it, after a moment; and what the server holds."""
    deadline = time.monotonic() + 20
    while True:
        connection = opened(port)
        connection.request("GET", "/metrics")
        told = connection.getresponse().read().decode()
        connection.close()
        found = dict(
            re.findall(r"^mlx_gemma4_(queued|reading|rows|memory_bytes|store_bytes) (\S+)$", told, re.MULTILINE)
        )
        busy = [f"{found[name]} {name}" for name in ("queued", "reading", "rows") if float(found[name])]
        if not busy or time.monotonic() > deadline:
            held = (
                f"{float(found['memory_bytes']) / 1e6:.0f} MB of arrays, {float(found['store_bytes']) / 1e6:.0f} kept"
            )
            return [f"nobody waits, and {', '.join(busy)}"] if busy else [], held
        time.sleep(0.1)


def ended(
    process: "subprocess.Popen[bytes]", port: int, clients: list["Client"], pool: ThreadPoolExecutor
) -> list[str]:
    """What is wrong with how the server ends, when it is told to while replies are written and others wait."""
    half = socket.create_connection(("127.0.0.1", port))
    half.sendall(b"POST /v1/messages HTTP/1.1\r\nHost: localhost\r\nContent-Length: 99\r\n\r\n{")
    connections = [opened(port) for _ in clients]
    for number, connection in enumerate(connections):
        send(connection, clients[0].bodies[number])
    time.sleep(0.2)
    process.send_signal(signal.SIGTERM)
    outcomes = pool.map(lambda own: clients[0].whole(own[1].getresponse(), own[0]), enumerate(connections))
    wrong = [f"at the end: {outcome.wrong}" for outcome in outcomes if outcome.wrong]
    started = time.monotonic()
    status: int | None = None
    with suppress(subprocess.TimeoutExpired):
        status = process.wait(60)
    half.close()
    seconds = time.monotonic() - started
    print(f"ended {seconds:.1f} s after the last reply with status {status}")
    return wrong + ([f"ended {seconds:.1f} s after the last reply, status {status}"] if status or seconds > 5 else [])


# --- requests --------------------------------------------------------------------------------------


def some_request(rng: random.Random) -> Asked:
    """One whose reply is always the same."""
    path = rng.choice((CHAT, RESPONSES, MESSAGES))
    words = " ".join(rng.choices(WORDS, k=rng.choice((3, 20, 100, 300) if rng.random() < 0.3 else (3, 20))))
    kind = rng.choice(("plain", "plain", "image", "tool", "form", "stop", "thinking", "seed"))
    body = MADE[path](words, kind, rng)
    if kind == "seed" and path == CHAT:
        body |= {"temperature": 1, "seed": rng.randrange(99)}
    stream = rng.random() < 0.7
    body |= {"stream": stream} | ({"stream_options": {"include_usage": True}} if stream and path == CHAT else {})
    return path, body


def picture(rng: random.Random) -> str:
    pixels = np.random.default_rng(rng.randrange(20)).integers(0, 255, (96, 144, 3), np.uint8)
    file = io.BytesIO()
    Image.fromarray(pixels).save(file, "png")
    return base64.b64encode(file.getvalue()).decode()


def most(kind: str, rng: random.Random) -> int:
    return 60 if kind in ("tool", "form") else rng.choice((1, 8, 40))


def chat_body(words: str, kind: str, rng: random.Random) -> dict[str, Any]:
    content: list[dict[str, Any]] = [{"type": "text", "text": words}]
    if kind == "image":
        content.append({"type": "image_url", "image_url": {"url": f"data:image/png;base64,{picture(rng)}"}})
    messages = [{"role": "system", "content": SYSTEM}, {"role": "user", "content": content}]
    body = {"messages": messages, "temperature": 0, "max_tokens": most(kind, rng)}
    form = {"type": "json_schema", "json_schema": {"name": "answer", "schema": ANSWER}}
    tools = [{"type": "function", "function": {"name": "look", "parameters": LOOK}}]
    return body | {
        "tool": {"tools": tools, "tool_choice": rng.choice(("auto", "required"))},
        "form": {"response_format": form},
        "stop": {"stop": rng.choice(WORDS), "logprobs": True},
        "thinking": {"reasoning_effort": "low"},
    }.get(kind, {})


def responses_body(words: str, kind: str, rng: random.Random) -> dict[str, Any]:
    content = [{"type": "input_text", "text": words}]
    if kind == "image":
        content.append({"type": "input_image", "image_url": f"data:image/png;base64,{picture(rng)}"})
    body = {"input": [{"role": "user", "content": content}], "temperature": 0, "max_output_tokens": most(kind, rng)}
    tools = [{"type": "function", "name": "look", "parameters": LOOK}]
    return body | {"instructions": SYSTEM, "store": rng.random() < 0.5} | {
        "tool": {"tools": tools, "tool_choice": "required"},
        "form": {"text": {"format": {"type": "json_schema", "name": "answer", "schema": ANSWER}}},
        "thinking": {"reasoning": {"effort": "low", "summary": "auto"}},
    }.get(kind, {})  # fmt: skip


def messages_body(words: str, kind: str, rng: random.Random) -> dict[str, Any]:
    content: list[dict[str, Any]] = [{"type": "text", "text": words}]
    if kind == "image":
        source = {"type": "base64", "media_type": "image/png", "data": picture(rng)}
        content.append({"type": "image", "source": source})
    body = {"messages": [{"role": "user", "content": content}], "temperature": 0, "max_tokens": most(kind, rng)}
    return body | {"system": SYSTEM, "model": "another"} | {
        "tool": {"tools": [{"name": "look", "input_schema": LOOK}], "tool_choice": {"type": "any"}},
        "form": {"output_config": {"format": {"type": "json_schema", "schema": ANSWER}}},
        "stop": {"stop_sequences": [rng.choice(WORDS)]},
        "thinking": {"thinking": {"type": "enabled", "budget_tokens": 30}},
    }.get(kind, {})  # fmt: skip


MADE = {CHAT: chat_body, RESPONSES: responses_body, MESSAGES: messages_body}


# --- replies ---------------------------------------------------------------------------------------


def send(connection: http.client.HTTPConnection, asked: Asked) -> None:
    connection.request("POST", asked[0], json.dumps(asked[1]), {"Content-Type": "application/json"})


def read_reply(connection: http.client.HTTPConnection, asked: Asked) -> Said:
    send(connection, asked)
    return received(connection.getresponse(), asked)


def received(answer: http.client.HTTPResponse, asked: Asked) -> Said:
    """What was said, without what differs from one reply to the next. ValueError if it is no whole reply."""
    path, body = asked
    data = answer.read()
    if answer.status != 200:
        raise ValueError(f"{answer.status} {data[:300]!r}")
    if not body["stream"]:
        return WHOLE[path](json.loads(data))
    events = [line.removeprefix("data: ") for line in data.decode().splitlines() if line.startswith("data: ")]
    return STREAMED[path]([json.loads(event) for event in events if event != "[DONE]"])


def chat_whole(reply: dict[str, Any]) -> Said:
    (choice,) = reply["choices"]
    message = choice["message"]
    calls = [call["function"] for call in message.get("tool_calls", ())]
    return said(message["content"], message.get("reasoning"), calls, choice["finish_reason"], reply["usage"])


def chat_streamed(chunks: list[dict[str, Any]]) -> Said:
    deltas = [choice["delta"] for chunk in chunks for choice in chunk["choices"]]
    calls: list[dict[str, str]] = []
    for delta in deltas:
        for part in delta.get("tool_calls", ()):
            if "name" in part["function"]:
                calls.append({"name": part["function"]["name"], "arguments": ""})
            calls[-1]["arguments"] += part["function"]["arguments"]
    text, thought = ("".join(delta.get(key, "") for delta in deltas) for key in ("content", "reasoning"))
    return said(text, thought, calls, chunks[-2]["choices"][0]["finish_reason"], chunks[-1]["usage"])


def response_whole(response: dict[str, Any]) -> Said:
    items = {kind: [item for item in response["output"] if item["type"] == kind] for kind in ("message", "reasoning")}
    text = "".join(part["text"] for item in items["message"] for part in item["content"])
    thought = "".join(part["text"] for item in items["reasoning"] for part in item["summary"])
    calls = [item for item in response["output"] if item["type"] == "function_call"]
    return said(text, thought, calls, response["status"], response["usage"])


def response_streamed(events: list[dict[str, Any]]) -> Said:
    found = response_whole(events[-1]["response"])
    text = "".join(event["delta"] for event in events if event["type"] == "response.output_text.delta")
    if text != found["text"] or [event["sequence_number"] for event in events] != list(range(len(events))):
        raise ValueError(f"its events say {text!r}, its end {found['text']!r}")
    return found


def message_whole(message: dict[str, Any]) -> Said:
    blocks = message["content"]
    calls = [block | {"arguments": json.dumps(block["input"])} for block in blocks if block["type"] == "tool_use"]
    text, thought = ("".join(block.get(key, "") for block in blocks) for key in ("text", "thinking"))
    return said(text, thought, calls, message["stop_reason"], message["usage"])


def message_streamed(events: list[dict[str, Any]]) -> Said:
    blocks: list[dict[str, Any]] = []
    ending: dict[str, Any] = {}
    for event in events:
        if event["type"] == "content_block_start":
            blocks.append(event["content_block"] | {"arguments": ""})
        elif event["type"] == "content_block_delta":
            delta = event["delta"]
            for key, own in (("text", "text"), ("thinking", "thinking"), ("partial_json", "arguments")):
                blocks[-1][own] = blocks[-1].get(own, "") + delta.get(key, "")
        elif event["type"] == "message_delta":
            ending = event
    if events[-1]["type"] != "message_stop":
        raise ValueError(f"ends with {events[-1]}")
    text, thought = ("".join(block["text" if key == "text" else key] for block in blocks if block["type"] == key)
                     for key in ("text", "thinking"))  # fmt: skip
    calls = [block for block in blocks if block["type"] == "tool_use"]
    return said(text, thought, calls, ending["delta"]["stop_reason"], ending["usage"])


def said(text: str | None, thought: str | None, calls: list[Any], ending: str, usage: dict[str, Any]) -> Said:
    tokens = usage.get("output_tokens", usage.get("completion_tokens"))
    called = [(call["name"], call["arguments"]) for call in calls]
    return {"text": text or "", "thought": thought or "", "calls": called, "ending": ending, "tokens": tokens}


WHOLE: dict[str, Callable[[dict[str, Any]], Said]] = {
    CHAT: chat_whole, RESPONSES: response_whole, MESSAGES: message_whole,
}  # fmt: skip
STREAMED: dict[str, Callable[[list[dict[str, Any]]], Said]] = {
    CHAT: chat_streamed, RESPONSES: response_streamed, MESSAGES: message_streamed,
}  # fmt: skip


# --- clients ---------------------------------------------------------------------------------------


class Client:
    """One that asks one thing after the other, over one connection where it stays open."""

    def __init__(self, port: int, bodies: list[Asked], lone: list[Said]):
        self.port, self.bodies, self.lone = port, bodies, lone
        self.connection = opened(port)

    def run(self, numbers: range, seed: int) -> list[Outcome]:
        return [self.one(random.Random(f"{seed} {number}"), f"request {number}") for number in numbers]

    def one(self, rng: random.Random, name: str) -> Outcome:
        number = rng.randrange(BODIES)
        fate = rng.choices((self.odd, self.leaves, self.asks), (3, 10, 17))[0]
        try:
            outcome = fate(rng, number)
        except (OSError, http.client.HTTPException, ValueError, LookupError) as error:
            outcome = Outcome("failed", f"{type(error).__name__}: {error}")
        if outcome.kind != "whole" or outcome.wrong:
            self.connection.close()  # the next request opens it again
        asked = f"{name}, {fate.__name__}, {self.bodies[number]}"
        return Outcome(outcome.kind, f"{outcome.wrong} ({asked})" if outcome.wrong else "")

    def asks(self, rng: random.Random, number: int) -> Outcome:
        send(self.connection, self.bodies[number])
        return self.whole(self.connection.getresponse(), number)

    def whole(self, answer: http.client.HTTPResponse, number: int) -> Outcome:
        found = received(answer, self.bodies[number])
        return Outcome("whole", "" if found == self.lone[number] else f"{found}; alone {self.lone[number]}")

    def leaves(self, rng: random.Random, number: int) -> Outcome:
        """Before the answer begins, or behind some of its events."""
        send(self.connection, self.bodies[number])
        own = self.connection.sock
        assert own is not None
        if rng.random() < 0.5:
            time.sleep(rng.choice((0, 0.01, 0.1)))
        else:
            answer = self.connection.getresponse()
            for _ in range(rng.randrange(10)):
                answer.readline()
        if rng.random() < 0.3:
            with suppress(OSError):  # it may have been answered
                own.shutdown(socket.SHUT_WR)
            time.sleep(0.1)
        return Outcome("left")

    def odd(self, rng: random.Random, number: int) -> Outcome:
        return rng.choice((self.changed, self.damaged, self.half, self.slow))(rng, number)

    def changed(self, rng: random.Random, number: int) -> Outcome:
        """Other JSON."""
        path, body = self.bodies[number]
        kinds = ("replace", "replace", "delete", "swap", "rename", "wrap", "double")
        edits = [(rng.choice(kinds), rng.randrange(2**16), rng.choice(LEAVES), rng.randrange(2**16)) for _ in range(3)]
        return self.judged(path, text_of(edited(body, edits[: rng.randint(1, 3)])))

    def damaged(self, rng: random.Random, number: int) -> Outcome:
        """Other bytes."""
        path, body = self.bodies[number]
        edits = [("set", rng.randrange(400), rng.randrange(256)), ("drop", rng.randrange(400), rng.randint(1, 300))]
        return self.judged(path, hurt(json.dumps(body).encode(), rng.sample(edits, rng.randint(1, 2))))

    def judged(self, path: str, data: bytes) -> Outcome:
        """A body that may be wrong, and is then told so in one line, in JSON."""
        self.connection.request("POST", path, data, {"Content-Type": "application/json"})
        answer = self.connection.getresponse()
        told = answer.read()
        if answer.status == 200:
            return Outcome("taken")
        message = json.loads(told)["error"]["message"]
        right = answer.status in (400, 404) and message and "\n" not in message and "Traceback" not in message
        return Outcome("refused", "" if right else f"{answer.status} {told[:300]!r} for {data[:2000]!r}")

    def half(self, rng: random.Random, number: int) -> Outcome:
        """A request that ends before its end, or is none of HTTP's."""
        data = self.raw(number)
        cut = rng.choice((rng.randrange(60), rng.randrange(len(data))))
        with socket.create_connection(("127.0.0.1", self.port), timeout=HUNG) as own:
            own.sendall(rng.choice((data[:cut], data[:cut], hurt(data[:60], [("set", cut, rng.randrange(256))]))))
            time.sleep(rng.choice((0, 0.05)))
            own.shutdown(socket.SHUT_WR)
            while own.recv(2**16):
                pass
        return Outcome("half")

    def slow(self, rng: random.Random, number: int) -> Outcome:
        """A request that comes in small pieces, to its end or until it is given up."""
        data = self.raw(number)
        stands = rng.random() < 0.2
        with socket.create_connection(("127.0.0.1", self.port), timeout=HUNG) as own:
            place, step = 0, len(data) // rng.randint(3, 30) + 1
            while place < len(data) and not (stands and place > len(data) // 2):
                own.sendall(data[place : place + step])
                place += step
                time.sleep(0.05)
            if stands and place < len(data):
                given = own.recv(2**16)
                return Outcome("given up", "" if given == b"" or b" 408 " in given[:20] else f"{given[:300]!r}")
            answer = http.client.HTTPResponse(own)
            answer.begin()
            return Outcome("slow", self.whole(answer, number).wrong)

    def raw(self, number: int) -> bytes:
        path, body = self.bodies[number]
        data = json.dumps(body).encode()
        return b"POST %s HTTP/1.1\r\nHost: localhost\r\nContent-Length: %d\r\n\r\n" % (path.encode(), len(data)) + data


if __name__ == "__main__":
    typer.run(main)
