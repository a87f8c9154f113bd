"""From a request to a reply, piece by piece."""

import secrets
import time
import warnings
from collections.abc import Collection, Iterator, Sequence
from dataclasses import dataclass, field
from numbers import Integral
from threading import Lock
from typing import Any, cast

import mlx.core as mx

from mlx_gemma4.cache import Cache, PromptCache, capacity_for
from mlx_gemma4.controller import FixedLength, Pace, check_draft_length
from mlx_gemma4.memory import check_memory, footprint
from mlx_gemma4.messages import request_messages, shown
from mlx_gemma4.model import Model
from mlx_gemma4.processor import Processor
from mlx_gemma4.prompt import Prompt, check_length
from mlx_gemma4.reply import Controls, Piece, Reply, ReplyParser, Stats, collect
from mlx_gemma4.sampling import Sampler, Sampling, settled
from mlx_gemma4.speculate import State, compiled_round, first_state, launch
from mlx_gemma4.weights import parameters

SEEDED_LENGTH = 3  # drafts a round for "auto" when a reply is to be the same again

# Freed buffers that MLX may keep for reuse; unbounded, they crowd the weights out of a 16 GB machine.
BUFFER_CACHE_BYTES = 512 * 2**20


@dataclass(frozen=True)
class Reading:
    """How much of the prompt has been read."""

    done: int
    total: int


def generate(
    model: Model,
    processor: Processor,
    request: str | list[dict[str, Any]] | Prompt,
    images: Sequence[Any] = (),
    audios: Sequence[Any] = (),
    videos: Sequence[Any] = (),
    system: str | None = None,
    tools: list[dict[str, Any]] | None = None,
    thinking: bool = False,
    image_budget: int | None = None,
    max_tokens: int = 1024,
    sampling: Sampling = Sampling(),
    draft_length: int | str = "auto",
) -> Reply:
    """The whole reply to a request.

    request: a string (one user turn, with `images`, `audios`, `videos` placed before it and `system` in a turn of
    its own), chat messages, or a `Prompt`. ValueError if any of it is wrong, MemoryError if this machine cannot hold
    the model and the prompt.
    """
    return collect(
        stream_generate(
            model, processor, request, images, audios, videos, system, tools, thinking, image_budget, max_tokens,
            sampling, draft_length,
        )
    )  # fmt: skip


def stream_generate(
    model: Model,
    processor: Processor,
    request: str | list[dict[str, Any]] | Prompt,
    images: Sequence[Any] = (),
    audios: Sequence[Any] = (),
    videos: Sequence[Any] = (),
    system: str | None = None,
    tools: list[dict[str, Any]] | None = None,
    thinking: bool = False,
    image_budget: int | None = None,
    max_tokens: int = 1024,
    sampling: Sampling = Sampling(),
    draft_length: int | str = "auto",
) -> Iterator[Piece]:
    """The reply piece by piece; takes what `generate` takes. Request and memory are checked when this is called."""
    started = time.perf_counter()
    prompt = make_prompt(processor, request, images, audios, videos, system, tools, thinking, image_budget)
    prepared = time.perf_counter() - started
    events = generation_events(model, processor, prompt, max_tokens, sampling, draft_length, prepared)
    check_memory(footprint(model.config, parameters(model)), len(prompt), max_tokens)
    return (event for event in events if isinstance(event, Piece))


def make_prompt(
    processor: Processor,
    request: str | list[dict[str, Any]] | Prompt,
    images: Sequence[Any],
    audios: Sequence[Any],
    videos: Sequence[Any],
    system: str | None,
    tools: list[dict[str, Any]] | None,
    thinking: bool,
    image_budget: int | None,
) -> Prompt:
    """The prompt of a request as `generate` takes it."""
    if isinstance(request, str):
        request = request_messages(request, images, audios, videos, system)
    elif images or audios or videos or system is not None:
        raise ValueError(
            "images, audios, videos and system go with a request that is a string; put them in the messages"
        )
    if isinstance(request, Prompt):
        if tools or thinking or image_budget is not None:
            raise ValueError("tools, thinking and image_budget go with messages; a Prompt is taken as it stands")
        return request
    return processor(request, tools=tools, thinking=thinking, image_budget=image_budget)


def generation_events(
    model: Model,
    processor: Processor,
    prompt: Prompt,
    max_tokens: int,
    sampling: Sampling,
    draft_length: int | str,
    prepared: float,
) -> Iterator[Reading | Piece]:
    """Check the request, then give what happens: how far the prompt is read, then the pieces of the reply.

    The model's weights are not touched before the first of these is asked for. prepared: seconds that making the
    prompt took, which count for the time to first token.
    """
    if not isinstance(max_tokens, Integral) or isinstance(max_tokens, bool) or max_tokens < 1:
        raise ValueError(f"max_tokens is {max_tokens!r}; expected a whole number, 1 or more")
    check_length(prompt, model.config)
    if not isinstance(sampling, Sampling):
        raise ValueError(f"sampling is {shown(sampling)}; expected Sampling(…)")
    pace = choose_pace(model, draft_length, sampling)
    return run(model, processor, prompt, int(max_tokens), sampling, pace, prepared)


def choose_pace(model: Model, draft_length: int | str, sampling: Sampling) -> Pace:
    """With a seed "auto" is one length: which random number decides on which token must not hang on measured times."""
    check_draft_length(draft_length)
    if model.drafter is None and draft_length not in ("auto", 0):
        raise ValueError(f"draft_length is {draft_length} and the model has no drafter; expected 0, or load one")
    if draft_length != "auto":
        return FixedLength(int(draft_length))
    if model.drafter is None:
        return FixedLength(0)
    is_greedy = settled(sampling, model.config.generation).temperature == 0
    return model.learnt.controller if sampling.seed is None or is_greedy else FixedLength(SEEDED_LENGTH)


def run(
    model: Model,
    processor: Processor,
    prompt: Prompt,
    max_tokens: int,
    sampling: Sampling,
    pace: Pace,
    prepared: float,
) -> Iterator[Reading | Piece]:
    read_from = time.perf_counter()
    config, length = model.config, len(prompt)
    limit = min(max_tokens, config.text.max_position_embeddings - length)
    stops = config.generation.eos_token_ids
    sampler = Sampler(sampling, config.generation, config.text.vocab_size)
    seed = secrets.randbits(64) if sampling.seed is None else sampling.seed
    parser = ReplyParser(processor.tokenizer, Controls.from_tokenizer(processor.tokenizer), prompt.token_ids)
    mx.reset_peak_memory()
    with bounded_memory:
        cache = PromptCache(config.text, capacity_for(length, limit))
        for hidden in model.read(prompt, cache):  # noqa: B007
            yield Reading(cache.length, length)
        state = first_state(model, sampler, prompt.token_ids, hidden[:, -1:], seed)
        ids, finish_reason = until_stop(tokens_of(state["token"]), stops, limit)
        first_at = time.perf_counter()
        yield Piece(*parser.feed(ids), ids)
        count, tally = len(ids), Tally()
        if finish_reason is None:
            for drafted, new in decode(model, sampler, Cache(cache, pace.longest + 1), state, length, pace, limit):
                tally.add(drafted, len(new) - 1)
                ids, finish_reason = until_stop(new, stops, limit - count)
                count += len(ids)
                yield Piece(*parser.feed(ids), ids)
                if finish_reason is not None:
                    break
        ended = time.perf_counter()
    if finish_reason == "length" and parser.in_thought:
        warnings.warn(f"the {count} tokens ran out inside the thought; raise max_tokens", stacklevel=2)
    stats = Stats(
        prompt_tokens=length,
        prompt_tps=length / (first_at - read_from),
        generation_tokens=count,
        generation_tps=max(count - 1, 0) / (ended - first_at),
        time_to_first_token=prepared + first_at - read_from,
        peak_memory=mx.get_peak_memory(),
        rounds=tally.rounds,
        drafted_tokens=sum(tally.drafted),
        accepted_tokens=sum(tally.accepted),
        acceptance_by_position=[hits / tries for hits, tries in zip(tally.accepted, tally.drafted, strict=True)],
        tokens_per_round=1 + sum(tally.accepted) / max(tally.rounds, 1),
    )
    yield Piece(*parser.finish(), [], finish_reason, parser.tool_calls, stats)


@dataclass
class Tally:
    """What the rounds did, whole ones, by draft position."""

    rounds: int = 0
    drafted: list[int] = field(default_factory=list)
    accepted: list[int] = field(default_factory=list)

    def add(self, drafted: int, accepted: int) -> None:
        self.rounds += 1
        missing = drafted - len(self.drafted)
        self.drafted += [0] * missing
        self.accepted += [0] * missing
        for position in range(drafted):
            self.drafted[position] += 1
            self.accepted[position] += position < accepted


def until_stop(ids: list[int], stops: Collection[int], room: int) -> tuple[list[int], str | None]:
    """The ids before a stop token, `room` at most, and why they end there, if they do."""
    for index, token in enumerate(ids[:room]):
        if token in stops:
            return ids[:index], "stop"
    return ids[:room], "length" if len(ids) >= room else None


def decode(
    model: Model, sampler: Sampler, cache: Cache, state: State, length: int, pace: Pace, limit: int
) -> Iterator[tuple[int, list[int]]]:
    """Rounds until `limit` tokens: (tokens drafted, ids). `length` positions are cached and the newest token is known.

    The host runs one round behind: while it reads the tokens of one round, the device works on the next.
    """
    count = 1  # tokens known
    waiting: tuple[int, mx.array] | None = None
    clock = RoundClock()
    while count < limit:
        following = None
        least = 1 if waiting else 0  # tokens of the round that is waited for
        most = waiting[0] + 1 if waiting else 0
        if count + least < limit:
            draft = pace.choose()
            cache.reserve(length + count - 1 + least, length + count - 1 + most)
            round_, is_new = compiled_round(model, sampler, draft, cache)
            clock.launched(draft, is_new)
            tokens, state = launch(round_, state, cache)
            following = draft, tokens
        if waiting is not None:
            draft, tokens = waiting
            ids = [token for token in tokens_of(tokens) if token >= 0]
            count += len(ids)
            pace.record(draft, len(ids) - 1, clock.read())
            yield draft, ids
            clock.resumed()
        waiting = following


class RoundClock:
    """Seconds a round, from one read to the next: the device works on without a gap, if nobody makes it wait.

    MLX bounds how far it runs ahead, so between two reads the device does parts of two rounds. Only if they draft
    alike, and neither a trace nor the caller took longer than the device, is the time that of one round.
    """

    def __init__(self) -> None:
        self.last_read: float | None = None
        self.outside = 0.0  # of the time since then, how long the caller kept the tokens
        self.lengths: list[int] = []  # of the last two rounds launched
        self.traced = False

    def launched(self, length: int, is_new: bool) -> None:
        self.lengths = [*self.lengths[-1:], length]
        self.traced = is_new

    def read(self) -> float | None:
        """Seconds since the last read, None if they say nothing."""
        now = time.perf_counter()
        seconds = None if self.last_read is None else now - self.last_read
        alike = len(set(self.lengths)) == 1 and not self.traced
        self.last_read = now
        return seconds if alike and seconds is not None and self.outside < seconds / 2 else None

    def resumed(self) -> None:
        if self.last_read is not None:
            self.outside = time.perf_counter() - self.last_read


def tokens_of(array: mx.array) -> list[int]:
    """The one place where the host waits for the device."""
    return cast(list[int], array.tolist())


class BoundedMemory:
    """While generating, weights stay wired on Metal and MLX keeps few freed buffers.

    MLX's limits are those of the process: of requests that overlap, the first sets them and the last sets them back.
    """

    def __init__(self) -> None:
        self.lock = Lock()
        self.requests = 0
        self.buffers, self.wired = 0, 0  # the limits before

    def __enter__(self) -> None:
        with self.lock:
            self.requests += 1
            if self.requests == 1:
                self.buffers = mx.set_cache_limit(BUFFER_CACHE_BYTES)
                if mx.metal.is_available():
                    self.wired = mx.set_wired_limit(int(mx.device_info()["max_recommended_working_set_size"]))

    def __exit__(self, *exception: object) -> None:
        with self.lock:
            self.requests -= 1
            if not self.requests:
                mx.set_cache_limit(self.buffers)
                if mx.metal.is_available():
                    mx.synchronize()
                    mx.set_wired_limit(self.wired)


bounded_memory = BoundedMemory()
