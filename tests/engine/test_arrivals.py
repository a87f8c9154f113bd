"""Requests that come and go at random: each gets what it gets alone, reading has its share of time, and nobody waits
for ever."""

import time
from dataclasses import replace
from functools import cache
from itertools import islice
from typing import Any, NamedTuple

import numpy as np
import pytest
from conversing import logprobs_of, picture, with_picture, words
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from rounds import GREEDY
from toy_checkpoint import TINY

from mlx_gemma4 import Engine, Prompt, PromptStore, Sampling, collect, generate
from mlx_gemma4.decoding.disk import PAGE
from mlx_gemma4.engine import engine
from mlx_gemma4.engine.engine import Stream, Work
from mlx_gemma4.engine.request import Options, Request
from mlx_gemma4.model.model import Model
from mlx_gemma4.prompt.processor import Processor
from mlx_gemma4.reply.reply import Piece

Loaded = tuple[Model, Processor]

SAMPLINGS = (
    GREEDY,
    replace(GREEDY, repetition_penalty=1.3),
    Sampling(temperature=1, seed=3),
    Sampling(temperature=0.7, top_k=5, frequency_penalty=0.4, seed=11),
    Sampling(temperature=1.2, top_p=0.9, min_p=0.02, seed=2),
)


class Asked(NamedTuple):
    family: int  # prompts of one begin alike
    length: int
    max_tokens: int
    sampling: int
    bias: bool
    image: int  # soft tokens of a picture in its middle, if any
    scored: bool  # how likely the prompt's tokens were is told too


class Event(NamedTuple):
    asked: Asked
    taken: int  # pieces of the oldest stream that are taken before it comes
    cancelled: int | None  # after so many pieces of its own


asked = st.builds(
    Asked, st.integers(0, 2), st.integers(1, 300), st.integers(1, 40), st.integers(0, len(SAMPLINGS) - 1),
    st.booleans(), st.sampled_from([0, 0, 12, 140]), st.sampled_from([False, False, True]),
)  # fmt: skip
events = st.lists(
    st.builds(Event, asked, st.integers(0, 5), st.none() | st.integers(0, 6)), min_size=2, max_size=7
)  # fmt: skip


def prompt_of(own: Asked) -> Prompt:
    ids = [2, *words(own.family, own.length)]
    if not own.image:
        return Prompt(ids)
    half = len(ids) // 2
    image = picture(TINY, own.family, half, own.image, 4)
    return with_picture(TINY, ids[:half], image, ids[half:])


def options_of(own: Asked) -> dict[str, Any]:
    return {
        "max_tokens": own.max_tokens, "sampling": SAMPLINGS[own.sampling], "draft_length": 2,
        "logit_bias": {150: 3.0, 160: -4.0} if own.bias else None, "repetition_detection": "off",
    }  # fmt: skip


@pytest.fixture(scope="module")
def alone(planted: Loaded) -> Any:
    @cache
    def reply(own: Asked) -> list[int]:
        return generate(*planted, prompt_of(own), **options_of(own)).token_ids

    return reply


@pytest.fixture(scope="module")
def likely(planted: Loaded) -> Any:
    """How likely the tokens of a prompt are, behind those before them."""

    @cache
    def logprobs(family: int, length: int, image: int) -> np.ndarray:
        return logprobs_of(planted[0], prompt_of(Asked(family, length, 1, 0, False, image, True)))

    return logprobs


@settings(max_examples=8, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(schedule=events, max_batch=st.integers(1, 5), stored=st.booleans())
def test_whatever_comes_and_goes_each_gets_what_it_gets_alone(
    planted: Loaded, alone: Any, likely: Any, schedule: list[Event], max_batch: int, stored: bool
) -> None:
    with Engine(*planted, max_batch=max_batch, store=PromptStore() if stored else None) as running:
        streams = []
        taken: list[list[Piece]] = []
        for event in schedule:
            if streams:
                taken[0] += islice(streams[0], event.taken)
            options = Options(**options_of(event.asked), logprobs=0, prompt_logprobs=event.asked.scored)
            streams.append(running.ask(Request(content=prompt_of(event.asked)), options))
            taken.append([])
        for stream, own, event in zip(streams, taken, schedule, strict=True):
            for piece in stream:
                own.append(piece)
                if event.cancelled is not None and len(own) > event.cancelled:
                    stream.close()
    for stream, own, event in zip(streams, taken, schedule, strict=True):
        what = event.asked
        tokens = [token for piece in own for token in piece.token_ids]
        expected = alone(what)
        assert tokens == (expected if event.cancelled is None else expected[: len(tokens)])
        assert event.cancelled is not None or own[-1].finish_reason is not None
        if what.scored and (own or event.cancelled is None):
            found = [entry["logprob"] for entry in stream.work.row.scores[1:]]
            assert found == pytest.approx(likely(what.family, what.length, what.image), abs=1e-3)


# --- reading ------------------------------------------------------------------------------------


def long_prompt(length: int, tail: int = 0) -> Prompt:
    ids = np.random.default_rng(0).integers(110, 500, length).tolist()
    return Prompt([2, *ids, *range(110, 110 + tail)])


class Clock:
    """Stands for the time module: each chunk and each round takes what the test says."""

    def __init__(self) -> None:
        self.now = 0.0

    def perf_counter(self) -> float:
        return self.now


class Timed(Engine):
    """Reading takes 1 s for 128 tokens, a round .1 s. Notes what was done while a prompt is read beside rows."""

    def __init__(self, clock: Clock, *args: Any, **options: Any):
        self.clock, self.shares = clock, {"reading": 0.0, "rounds": 0.0}
        self.noted = False
        self.steps = ""  # a chunk: c, a round: r
        super().__init__(*args, **options)

    def spend(self, what: str, seconds: float) -> None:
        self.clock.now += seconds
        if self.noted:
            self.shares[what] += seconds

    def read_on(self, work: Work) -> None:
        self.noted = self.noted or bool(self.batch.rows)
        before = self.read
        self.steps += "c"
        super().read_on(work)
        self.spend("reading", (self.read - before) / 128)
        self.noted = self.noted and bool(work.left)

    def decode(self) -> None:
        step = self.batch.step

        def timed() -> Any:
            self.spend("rounds", 0.1)
            self.steps += "r"
            return step()

        self.batch.step = timed  # type: ignore[method-assign]
        try:
            super().decode()
        finally:
            if self.batch.step is timed:
                del self.batch.step


def test_while_rows_run_reading_takes_at_most_half_of_the_time(
    endless: Loaded, monkeypatch: pytest.MonkeyPatch
) -> None:
    clock = Clock()
    monkeypatch.setattr(engine, "time", clock)
    with Timed(clock, *endless, max_batch=3) as running:
        row = running.submit("hello", max_tokens=3000, draft_length=0, repetition_detection="off")
        next(row)
        reader = running.submit(long_prompt(2000), max_tokens=1, draft_length=0)
        collect(reader)
        reading, rounds = running.shares["reading"], running.shares["rounds"]
        row.close()
    assert reading == pytest.approx(2001 / 128)
    # what is read ahead, and the chunk that is being read, are made up for behind them
    assert rounds >= reading - 1.01 - engine.PAUSE
    assert rounds <= reading + 1.01  # and the reader has its half


class Joined(Timed):
    """Others ask as soon as the first row is there."""

    def __init__(self, others: list[Prompt], *args: Any, **options: Any):
        self.others, self.joined = others, list[Stream]()
        super().__init__(*args, **options)

    def decode(self) -> None:
        while self.others:
            self.joined.append(self.submit(self.others.pop(), max_tokens=1, draft_length=0))
        super().decode()


@pytest.mark.parametrize(
    ("others", "steps"),
    [
        pytest.param([long_prompt(127)], "crcr", id="what was read before there were rows is nobody's delay"),
        pytest.param([long_prompt(14)] * 3, "rcrcrcr", id="short prompts that come together are read together"),
        pytest.param([long_prompt(127)] * 2, "rc" + "r" * 8 + "c", id="behind a long one rows have their share first"),
    ],
)
def test_when_newcomers_are_read(
    endless: Loaded, monkeypatch: pytest.MonkeyPatch, others: list[Prompt], steps: str
) -> None:
    clock = Clock()
    monkeypatch.setattr(engine, "time", clock)
    with Joined([*others], clock, *endless, max_batch=8) as running:
        row = running.submit(long_prompt(2000), max_tokens=60, draft_length=0, repetition_detection="off")
        collect(row)
        for stream in running.joined:
            collect(stream)
    assert steps in running.steps


class Following(Joined):
    """Others ask one by one, each as soon as nobody else is there but one row."""

    def decode(self) -> None:
        others, self.others = self.others, []
        if others and len(self.works) == 1:
            self.joined.append(self.submit(others.pop(), max_tokens=30, draft_length=0))
        super().decode()
        self.others = others


def test_what_rows_were_owed_goes_with_them(endless: Loaded, monkeypatch: pytest.MonkeyPatch) -> None:
    clock = Clock()
    monkeypatch.setattr(engine, "time", clock)
    others = [Prompt([2, 150]), long_prompt(1000)]
    with Following(others, clock, *endless, max_batch=2) as running:
        collect(running.submit("hello", max_tokens=15, draft_length=0, repetition_detection="off"))
        while others:
            time.sleep(0.001)
        for stream in running.joined:
            collect(stream)
    assert "ccrcr" in running.steps


def test_the_time_to_the_first_token_counts_what_was_waited_for_a_row(
    endless: Loaded, monkeypatch: pytest.MonkeyPatch
) -> None:
    clock = Clock()
    monkeypatch.setattr(engine, "time", clock)
    with Joined([Prompt([2, 150])], clock, *endless, max_batch=1) as running:
        collect(running.submit("hello", max_tokens=60, draft_length=0, repetition_detection="off"))
        reply = collect(running.joined[0])
    assert reply.stats.time_to_first_token >= 0.1 * 57


def test_what_eight_share_is_read_once(planted: Loaded) -> None:
    with Engine(*planted, max_batch=8, store=PromptStore()) as running:
        streams = [running.submit(long_prompt(1500, tail), max_tokens=4, sampling=GREEDY) for tail in range(8)]
        replies = [collect(stream) for stream in streams]
        read = running.read
    assert read <= 1.1 * 1501
    assert sum(1501 + tail - reply.stats.cached_tokens for tail, reply in enumerate(replies)) == read


def test_a_short_prompt_does_not_wait_for_a_long_one_that_begins_alike(planted: Loaded) -> None:
    """Of which it could find no more than their beginning, once all of it is read."""
    begin = long_prompt(300).token_ids
    with Engine(*planted, max_batch=2, store=PromptStore()) as running:
        long = running.submit(Prompt([*begin, *long_prompt(3500).token_ids]), max_tokens=1)
        while running.read < 500:
            time.sleep(0.001)
        short = running.submit(Prompt([*begin, 150]), max_tokens=1)
        collect(long)
        collect(short)
    assert short.work.row.first_at < long.work.row.first_at


def test_a_conversations_next_turn_does_not_wait_for_a_prompt_that_nobody_has_read(planted: Loaded) -> None:
    """It is the longer one, and has less to read."""
    with Engine(*planted, max_batch=2, store=PromptStore()) as running:
        turn = long_prompt(3000)
        collect(running.submit(turn, max_tokens=1))
        new = running.submit(Prompt(long_prompt(2500).token_ids[:0:-1]), max_tokens=1)
        while running.read < 3500:
            time.sleep(0.001)
        next_turn = running.submit(Prompt([*turn.token_ids, 150]), max_tokens=1)
        collect(new)
        collect(next_turn)
    assert next_turn.work.row.first_at < new.work.row.first_at


def test_a_cancelled_reading_stays_in_the_store(planted: Loaded) -> None:
    prompt = long_prompt(3500)
    with Engine(*planted, max_batch=2, store=PromptStore()) as running:
        stream = running.submit(prompt, max_tokens=4)
        while running.read < 1000:
            time.sleep(0.001)
        stream.close()
        while running.works:
            time.sleep(0.001)
        read = running.read
        again = collect(running.submit(prompt, max_tokens=4, sampling=GREEDY))
    assert again.stats.cached_tokens >= read - PAGE > 0
    assert running.read == 3501 + read - again.stats.cached_tokens


def test_what_was_read_and_written_can_be_found_once_the_last_piece_is_out(planted: Loaded) -> None:
    store = PromptStore()
    with Engine(*planted, max_batch=2, store=store) as running:
        for length in range(40, 60):
            prompt = long_prompt(length)
            ids = []
            for piece in running.submit(prompt, max_tokens=9, sampling=GREEDY, repetition_detection="off"):
                ids += piece.token_ids
                if piece.finish_reason is not None:
                    break
            grown = Prompt([*prompt.token_ids, *ids, 150])
            reply = collect(running.submit(grown, max_tokens=1))
            assert reply.stats.cached_tokens >= len(prompt) + len(ids) - 1


def test_a_long_prompt_is_read_though_short_ones_keep_coming(planted: Loaded) -> None:
    """Each of them alone goes first: less of it is left."""
    with Engine(*planted, max_batch=2) as running:
        rng = np.random.default_rng(1)

        def short() -> Any:
            return running.submit(Prompt(rng.integers(110, 500, 100).tolist()), max_tokens=1)

        waiting = [short(), short(), short()]
        long = running.submit(long_prompt(1500), max_tokens=1)
        count = 0
        while long.work.reading is None or long.work.left:
            collect(waiting.pop(0))
            waiting.append(short())
            count += 1
            assert count < 60, "it waits for ever"
        collect(long)
