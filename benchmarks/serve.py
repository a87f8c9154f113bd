"""What the server costs: seconds to the first token and tokens/s of many clients, beside those of `Engine` alone.

    python benchmarks/serve.py --model demo --clients 8 --requests 64 --rate 4 --tokens 500

Both get the same requests with the same seeds, each from so many threads, in turns: `Engine` in this process, the
server, one of its own, over HTTP. With a rate, requests arrive by chance, so many a second; without, each client asks
again when it has been answered. Then one asks alone for what has been read before. Figures are medians of the turns;
the last line of standard output is JSON.
"""

import http.client
import json
import re
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from typing import Annotated, Any, TypeVar

import numpy as np
import typer
from decode import machine

from mlx_gemma4 import Engine, PromptStore, Sampling, load
from mlx_gemma4.engine.engine import Stream
from mlx_gemma4.reply.reply import Stats

AGAIN = 20  # times that a known prompt is asked

T = TypeVar("T")
Asked = dict[str, Any]
Told = tuple[float, float, int]  # seconds to the first token, seconds in all, tokens


def main(
    model: Annotated[str, typer.Option(help="A model folder, a hub id, or demo.")] = "demo",
    clients: Annotated[int, typer.Option(min=1, help="Threads that ask.")] = 8,
    requests: Annotated[int, typer.Option(min=1, help="How many are asked.")] = 32,
    rate: Annotated[float, typer.Option(min=0, help="That arrive a second; 0: as fast as they are answered.")] = 0,
    tokens: Annotated[int, typer.Option(min=1, help="Words of what stands before each question.")] = 100,
    turns: Annotated[int, typer.Option(min=1, help="Questions of a conversation: they begin alike.")] = 1,
    max_tokens: Annotated[int, typer.Option(min=1, help="Tokens of a reply.")] = 100,
    max_batch: Annotated[int, typer.Option(min=1, help="Replies written at once.")] = 8,
    repeats: Annotated[int, typer.Option(min=1, help="Turns of each.")] = 3,
) -> None:
    """Engine and server, turn by turn."""
    arrivals = np.random.default_rng(0).exponential(1 / rate, requests).cumsum() if rate else np.zeros(requests)
    loaded, processor = load(model)
    told: dict[str, list[dict[str, float]]] = {"engine": [], "server": []}
    with Engine(loaded, processor, max_batch, PromptStore()) as engine, server(model, max_batch) as port:
        ask = {"engine": lambda own: from_engine(engine, own), "server": lambda own: from_server(port, own)}
        for repeat in range(repeats):
            numbers = range(repeat * requests, (repeat + 1) * requests)  # others: none has been read
            asked = [request(number // turns, number % turns, tokens, max_tokens) for number in numbers]
            for name, own in told.items():
                own.append((timed if repeat else measured)(asked, arrivals, clients, ask[name]))
        again = [request(0, 0, tokens, 2)] * AGAIN
        cached = {name: [ask[name](one)[0] for one in again] for name in told}
    found = {
        name: {key: float(np.median([turn[key] for turn in own])) for key in own[0]}
        | {"first_cached": float(np.median(cached[name]))}
        for name, own in told.items()
    }
    for name, figure in found.items():
        print(
            f"{name}: {figure['tokens_per_second']:.1f} tokens/s; first token after {figure['first_p50']:.3f} s, "
            f"{figure['first_p99']:.3f} s for 99 %, {figure['first_cached']:.3f} s where the prompt is known; "
            f"{figure['rate_p50']:.1f} tokens/s a reply"
        )
    ratios = [turn["tokens_per_second"] / own["tokens_per_second"] for own, turn in zip(*told.values(), strict=True)]
    later = found["server"]["first_cached"] - found["engine"]["first_cached"]
    print(f"server: {np.median(ratios):.3f} of the engine's tokens/s, {1000 * later:.1f} ms later where it is known")
    print(json.dumps({"machine": machine(), **found, "ratio": float(np.median(ratios)), "ratios": ratios}))


def request(conversation: int, turn: int, tokens: int, max_tokens: int) -> Asked:
    words = " ".join(f"word{(conversation * 7919 + n) % 1000}" for n in range(tokens))
    messages = [{"role": "user", "content": f"{words} Tell me a story."}]
    for _ in range(turn):
        messages += [{"role": "assistant", "content": "Once."}, {"role": "user", "content": "Tell me a story."}]
    return {"messages": messages, "seed": conversation, "max_tokens": max_tokens}


def measured(asked: list[Asked], arrivals: np.ndarray, clients: int, ask: Callable[[Asked], Told]) -> dict[str, float]:
    ask(asked[0])  # what is compiled, is
    return timed(asked, arrivals, clients, ask)


def timed(asked: list[T], arrivals: np.ndarray, clients: int, ask: Callable[[T], Told]) -> dict[str, float]:
    """Of so many threads that ask, each request no sooner than it arrives."""
    started = time.perf_counter()

    def at_its_time(number: int) -> Told:
        time.sleep(max(0.0, started + arrivals[number] - time.perf_counter()))
        return ask(asked[number])

    with ThreadPoolExecutor(clients) as pool:
        told = list(pool.map(at_its_time, range(len(asked))))
    return figures(told, time.perf_counter() - started)


def figures(told: list[Told], seconds: float) -> dict[str, float]:
    first, whole, count = (np.array(column, float) for column in zip(*told, strict=True))
    rates = np.maximum(count - 1, 1) / np.maximum(whole - first, 1e-9)
    return {
        "tokens": count.sum(),
        "tokens_per_second": count.sum() / seconds,
        **{f"first_p{part}": float(np.percentile(first, part)) for part in (50, 99)},
        "rate_p50": float(np.percentile(rates, 50)),
        "rate_p99": float(np.percentile(rates, 1)),  # 99 % are faster
    }


def from_engine(engine: Engine, asked: Asked) -> Told:
    started = time.perf_counter()
    stream = engine.submit(asked["messages"], sampling=Sampling(seed=asked["seed"]), max_tokens=asked["max_tokens"])
    return streamed(stream, started)[0]


def streamed(stream: Stream, started: float) -> tuple[Told, Stats]:
    """A whole reply, and when it came since it was asked for."""
    first, stats = 0.0, None
    for piece in stream:
        first = first or time.perf_counter() - started
        stats = piece.stats
    assert stats is not None
    return (first, time.perf_counter() - started, stats.generation_tokens), stats


def from_server(port: int, asked: Asked) -> Told:
    started, first, count = time.perf_counter(), 0.0, 0
    for chunk in chunks(f"127.0.0.1:{port}", asked):
        if any(choice["delta"].get("content") for choice in chunk["choices"]):
            first = first or time.perf_counter() - started
        if chunk.get("usage"):
            count = chunk["usage"]["completion_tokens"]
    return first, time.perf_counter() - started, count


def chunks(host: str, asked: Asked) -> Iterator[dict[str, Any]]:
    """Of one streamed reply, usage in the last; RuntimeError if the server at host:port does not answer with one."""
    body = asked | {"stream": True, "stream_options": {"include_usage": True}}
    connection = http.client.HTTPConnection(host)
    connection.request("POST", "/v1/chat/completions", json.dumps(body), {"Content-Type": "application/json"})
    answer = connection.getresponse()
    if answer.status != 200:
        raise RuntimeError(f"{host} answered {answer.status}: {answer.read().decode()[:200]}; expected a reply")
    for line in answer:
        if line.startswith(b"data: {"):
            yield json.loads(line.removeprefix(b"data: "))
    connection.close()


@contextmanager
def server(model: str, max_batch: int) -> Iterator[int]:
    """The port of a server that has loaded the model."""
    command = [sys.executable, "-m", "mlx_gemma4.serve", "--model", model, "--port", "0", "--max-batch", str(max_batch)]
    with subprocess.Popen(command, stderr=subprocess.PIPE, text=True) as process:
        assert process.stderr is not None
        lines = iter(process.stderr)
        port = next(int(found[1]) for line in lines if (found := re.match(r"http://\S+:(\d+) serves", line)))
        ThreadPoolExecutor(1).submit(lambda: [line for line in lines])  # or its log would fill the pipe
        try:
            yield port
        finally:
            process.send_signal(signal.SIGTERM)


if __name__ == "__main__":
    typer.run(main)
