"""Several machines, which here are processes; and an engine whose requests come over a pipe."""

import json
import os
import socket
import subprocess
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from threading import Timer
from typing import Any

from toy_checkpoint import Shape

from mlx_gemma4 import Engine, Prompt, PromptStore, Sampling, collect
from mlx_gemma4.engine import generation as module
from mlx_gemma4.engine.engine import Stream

# Whose heads can be dealt to two machines.
SPLIT = Shape(hidden=64, mlp=192, heads=6, kv_heads=2, head_dim=16, global_head_dim=32, window=16, vocab=500)
Machine = subprocess.Popen[str]
GREEDY = Sampling(temperature=0)
WAYS: dict[str, dict[str, Any]] = {
    "greedy": {"draft_length": 0, "sampling": GREEDY},
    "auto": {"sampling": GREEDY},
    "seeded": {"draft_length": 2, "sampling": Sampling(temperature=1.0, seed=5)},
    "form": {"sampling": GREEDY, "response_format": {"type": "regex", "regex": "[a-m]{2,12}"}},
    "told": {"draft_length": 1, "sampling": GREEDY, "logprobs": 2},
}
PATIENCE = 600  # seconds
FAILING = 13  # max_tokens of a request that fails when its prompt has been read
LINES = """
import sys
import mlx.core as mx
from machines import answer_lines
from mlx_gemma4 import load
group = mx.distributed.init(strict=True, backend="ring")
answer_lines(*load(sys.argv[1], group=group, split=sys.argv[2]), group.rank())
"""


@contextmanager
def patience(machines: list[Machine]) -> Iterator[None]:
    """For machines that would wait for each other for ever: they are killed, after so long that no load explains it."""
    timer = Timer(PATIENCE, lambda: [machine.kill() for machine in machines])
    timer.start()
    try:
        yield
    finally:
        timer.cancel()


def free_port() -> int:
    with socket.socket() as own:
        own.bind(("127.0.0.1", 0))
        port: int = own.getsockname()[1]
        return port


def started(code: str, count: int, hosts: Path, *arguments: object) -> list[Machine]:
    """Python processes that find each other as those of `mlx.launch` do."""
    return run_on(["-c", code, *map(str, arguments)], count, hosts)


def run_on(command: Sequence[str], count: int, hosts: Path) -> list[Machine]:
    sockets = [socket.create_server(("127.0.0.1", 0)) for _ in range(count)]
    hosts.write_text(json.dumps([[f"127.0.0.1:{own.getsockname()[1]}"] for own in sockets]))
    for own in sockets:
        own.close()
    tests = Path(__file__).parent
    path = os.pathsep.join([*sys.path, str(tests), str(tests / "model")])
    told = [{"MLX_RANK": str(rank), "MLX_HOSTFILE": str(hosts)} for rank in range(count)] if count > 1 else [{}]
    return [
        subprocess.Popen(
            [sys.executable, *command],
            text=True, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE,
            env=os.environ | {"PYTHONPATH": path} | own,
        )
        for own in told
    ]  # fmt: skip


# --- an engine ---------------------------------------------------------------------------------


def answer_lines(model: Any, processor: Any, rank: int) -> None:
    """Schedules as JSON, a line each, to what came of their requests."""
    fail_on_purpose()
    store = PromptStore()
    with Engine(model, processor, max_batch=3, store=store) as engine:
        if rank:
            engine.follow()
            assert not store.held and not engine.works
            return
        print("ready", flush=True)
        for line in sys.stdin:
            print(json.dumps(outcome(engine, json.loads(line))), flush=True)


def fail_on_purpose() -> None:
    first_token = module.first_token

    def failing(model: Any, sampler: Any, prompt: Prompt, *rest: Any) -> Any:
        if prompt.token_ids[1] == FAILING:
            raise RuntimeError("on purpose")
        return first_token(model, sampler, prompt, *rest)

    module.first_token = failing  # type: ignore[attr-defined]


def outcome(engine: Engine, schedule: list[dict[str, Any]]) -> list[Any]:
    """Of requests {"ids", "way", "max_tokens", "leave"}: how many pieces are taken, or None, before it is left; what
    each gave: its tokens, how many were not read again, and of those that were left or failed what was the end."""
    streams = [asked(engine, own) for own in schedule]
    found: list[Any] = []
    for stream, own in zip(streams, schedule, strict=True):
        if own.get("leave") is not None:
            for _ in range(own["leave"]):
                next(stream, None)
            stream.close()
            found.append("left")
            continue
        try:
            reply = collect(stream)
            found.append([reply.token_ids, reply.text, reply.stats.cached_tokens])
        except RuntimeError as error:
            found.append(str(error))
    return found


def asked(engine: Engine, own: dict[str, Any]) -> Stream:
    return engine.submit(
        Prompt(own["ids"]), max_tokens=own["max_tokens"], repetition_detection="off", **WAYS[own["way"]]
    )
