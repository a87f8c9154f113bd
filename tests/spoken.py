"""Replies without a model, and what a protocol's writer makes of them."""

import json
from collections.abc import Iterable, Iterator
from typing import Any

from mlx_gemma4.reply.reply import CallPart, Piece, Stats, collect
from mlx_gemma4.serve.ask import Writer

STATS = Stats(
    prompt_tokens=100, cached_tokens=90, prompt_tps=1.0, generation_tokens=20, generation_tps=1.0,
    time_to_first_token=1.0, peak_memory=1, rounds=1, drafted_tokens=0, accepted_tokens=0, acceptance_by_position=[],
    tokens_per_round=1.0, thinking_tokens=8,
)  # fmt: skip


def last(finish_reason: str = "stop", calls: Iterable[tuple[str, dict[str, Any]]] = (), stop: str = "") -> Piece:
    tool_calls = [{"name": name, "arguments": arguments} for name, arguments in calls]
    return Piece("", "", [], finish_reason, tool_calls, STATS, stop=stop)


def thought(thinking: str) -> Piece:
    return Piece("", thinking, [1])


def said(text: str) -> Piece:
    return Piece(text, "", [1])


def called(index: int, name: str | None, arguments: str) -> Piece:
    return Piece("", "", [1], calls=[CallPart(index, name, arguments)])


def streamed(writer: Writer, pieces: list[Piece]) -> list[dict[str, Any]]:
    """What the events hold; each is named as its type is."""
    return [read(event) for event in told(writer, pieces)]


def told(writer: Writer, pieces: list[Piece]) -> Iterator[str]:
    yield from writer.begin(STATS.prompt_tokens)
    for piece in pieces:
        yield from writer.piece(piece, 0)
    yield from writer.end()


def read(event: str) -> dict[str, Any]:
    name, data, *rest = event.split("\n")
    found: dict[str, Any] = json.loads(data.removeprefix("data: "))
    assert name == f"event: {found['type']}" and rest == ["", ""]
    return found


def whole(writer: Writer, pieces: list[Piece]) -> dict[str, Any]:
    return writer.whole([collect(pieces)])
