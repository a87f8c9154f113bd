"""Many requests at once: each gets what it gets alone."""

import asyncio
import gc
import math
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import mlx.core as mx
import numpy as np
import pytest
from rounds import GREEDY

from mlx_gemma4 import Engine, Prompt, PromptStore, Sampling, collect, generate, generate_batch, load
from mlx_gemma4.decoding.batch import Batch, Seat
from mlx_gemma4.engine import engine
from mlx_gemma4.engine.engine import Stream, Work
from mlx_gemma4.model.cache import Caches
from mlx_gemma4.model.model import Model
from mlx_gemma4.planner import memory_limit
from mlx_gemma4.prompt.processor import Processor
from mlx_gemma4.serve.job import Job

Loaded = tuple[Model, Processor]


def prompts(count: int) -> tuple[list[Prompt], list[int]]:
    rng = np.random.default_rng(0)
    lengths, limits = rng.integers(3, 200, count), rng.integers(1, 40, count)
    return [Prompt(rng.integers(110, 500, int(n)).tolist()) for n in lengths], limits.tolist()


@pytest.mark.parametrize("stored", [False, True])
@pytest.mark.parametrize("length", [0, 2])
def test_each_row_gives_what_it_gives_alone(endless: Loaded, length: int, stored: bool) -> None:
    asked, limits = prompts(7)
    alone = [
        generate(*endless, own, max_tokens=limit, sampling=GREEDY, draft_length=2).token_ids
        for own, limit in zip(asked, limits, strict=True)
    ]
    with Engine(*endless, max_batch=4, store=PromptStore() if stored else None) as engine:
        streams = [
            engine.submit(own, max_tokens=limit, sampling=GREEDY, draft_length=length)
            for own, limit in zip(asked, limits, strict=True)
        ]
        assert [collect(stream).token_ids for stream in streams] == alone


def test_a_closed_stream_frees_its_row_and_disturbs_nobody(endless: Loaded) -> None:
    asked, _ = prompts(2)
    alone = generate(*endless, asked[1], max_tokens=20, sampling=GREEDY).token_ids
    with Engine(*endless, max_batch=1) as engine:
        long, short = (
            engine.submit(asked[0], max_tokens=100_000),
            engine.submit(asked[1], max_tokens=20, sampling=GREEDY),
        )
        next(long)
        long.close()
        assert collect(short).token_ids == alone
        assert list(long) == []


def test_what_was_read_while_logits_were_not_finite_is_not_found(
    planted_folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    loaded, (own, *_) = load(planted_folder), prompts(1)[0]
    expected = generate(*loaded, own, max_tokens=8, sampling=GREEDY).token_ids
    decoder = loaded[0].language_model
    embed = decoder.embed
    with Engine(*loaded, store=PromptStore()) as engine:
        monkeypatch.setattr(decoder, "embed", lambda ids: embed(ids) * math.nan)
        with pytest.raises(RuntimeError, match="are not finite"):
            collect(engine.submit(own, max_tokens=8, sampling=GREEDY))
        monkeypatch.setattr(decoder, "embed", embed)
        reply = collect(engine.submit(own, max_tokens=8, sampling=GREEDY))
    assert (reply.token_ids, reply.stats.cached_tokens) == (expected, 0)


def test_of_a_row_whose_reply_fails_nothing_is_copied(endless: Loaded, monkeypatch: pytest.MonkeyPatch) -> None:
    kept: list[bool] = []
    remove = Batch.remove

    def removing(self: Batch, seat: Seat, into: Caches | None = None) -> None:
        kept.append(into is not None)
        remove(self, seat, into)

    def failing(*given: Any) -> None:
        raise RuntimeError("it failed")

    monkeypatch.setattr(Batch, "remove", removing)
    with Engine(*endless, max_batch=2, store=PromptStore()) as engine:
        stream = engine.submit(prompts(1)[0][0], max_tokens=1000)
        next(stream)
        monkeypatch.setattr(stream.work.row, "take", failing)
        with pytest.raises(RuntimeError, match=r"^it failed$"):
            collect(stream)
    assert kept == [False]


@pytest.mark.parametrize("bound", [None, 1])
def test_who_keeps_a_stream_that_has_ended_keeps_nothing_of_what_was_read(endless: Loaded, bound: int | None) -> None:
    """bound: of the store's bytes, if there is one."""
    store = None if bound is None else PromptStore(max_bytes=bound)
    streams, held = [], []
    gc.collect()  # what other tests have left
    with Engine(*endless, max_batch=1, store=store) as engine:
        for own in prompts(4)[0]:
            streams.append(engine.submit(own, max_tokens=4))
            collect(streams[-1])
            held.append(mx.get_active_memory())
    one = sum(array.nbytes for own in endless[0].caches(200).arrays for array in own)
    assert held[-1] - held[0] < one / 10


def test_replies_come_in_the_order_of_the_requests(endless: Loaded) -> None:
    asked, _ = prompts(5)
    replies = generate_batch(*endless, asked, max_batch=2, max_tokens=6, sampling=GREEDY, draft_length=0)
    expected = [generate(*endless, own, max_tokens=6, sampling=GREEDY, draft_length=0).token_ids for own in asked]
    assert [reply.token_ids for reply in replies] == expected


def test_a_long_reply_does_not_hold_up_those_behind_it(endless: Loaded, monkeypatch: pytest.MonkeyPatch) -> None:
    limits: list[int] = []
    submit, end = Engine.submit, Engine.end

    def submit_some(self: Engine, request: Any, **options: Any) -> Any:
        return submit(self, request, **options | {"max_tokens": 150 if request is asked[0] else 2})

    def note(self: Engine, work: Work, error: BaseException | None = None) -> None:
        limits.append(work.options.max_tokens)
        end(self, work, error)

    monkeypatch.setattr(Engine, "submit", submit_some)
    monkeypatch.setattr(Engine, "end", note)
    asked, _ = prompts(12)
    replies = generate_batch(*endless, asked, max_batch=2, sampling=GREEDY)
    assert [len(reply.token_ids) for reply in replies] == [150] + [2] * 11
    assert limits[:8] == [2] * 8  # more than are prepared ahead


def test_one_wrong_request_ends_a_batch_at_once(endless: Loaded) -> None:
    asked: list[Any] = [*prompts(6)[0], 5]
    with pytest.raises(ValueError, match="request 6: request is an int"):
        generate_batch(*endless, asked, max_batch=2, max_tokens=100_000)


def test_a_closed_engine_says_so_in_one_line(endless: Loaded) -> None:
    engine = Engine(*endless)
    stream = engine.submit("hello", max_tokens=100_000)
    next(stream)
    engine.close()
    engine.close()
    with pytest.raises(RuntimeError, match="closed before the reply was finished"):
        list(stream)
    with pytest.raises(RuntimeError, match="the engine is closed; expected to submit before close"):
        engine.submit("hello")


def test_a_wrong_request_is_refused_where_it_is_made(endless: Loaded) -> None:
    with Engine(*endless) as engine, pytest.raises(ValueError, match="max_tokens is 0"):
        engine.submit("hello", max_tokens=0)
    with pytest.raises(ValueError, match="max_batch is 0; expected a whole number from 1 to 16"):
        Engine(*endless, max_batch=0)


# --- memory -------------------------------------------------------------------------------------


class Watched(Engine):
    """Counts the rows that were parked and the most that were in one round."""

    def __init__(self, *args: Any, **options: Any):
        self.parked = self.most = 0
        super().__init__(*args, **options)

    def park(self, works: list[Work]) -> None:
        self.parked += len(works)
        super().park(works)

    def decode(self) -> None:
        self.most = max(self.most, len(self.batch.rows))
        super().decode()


@pytest.fixture
def room(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """A machine with room for so many positions, of all places of a batch."""
    room = [2**60]
    limit = memory_limit()
    monkeypatch.setattr(
        engine, "batch_bytes", lambda model, lengths, size, ahead: limit * size * (max(lengths) + ahead) / room[0]
    )
    return room


SEEDED = Sampling(temperature=1, seed=3, repetition_penalty=1.1)


@pytest.mark.parametrize(
    ("sampling", "stored", "bound"),
    [(GREEDY, True, None), (GREEDY, False, 1), (SEEDED, False, None), (SEEDED, True, 1)],
)
def test_rows_that_do_not_fit_on_are_parked_and_give_what_they_give_alone(
    endless: Loaded,
    room: list[int],
    monkeypatch: pytest.MonkeyPatch,
    stored: bool,
    sampling: Sampling,
    bound: int | None,
) -> None:
    """bound: of the store's bytes: with 1 it keeps nothing, and what was parked is read once more."""
    monkeypatch.setattr(engine, "FORESEEN", 8)
    asked = [Prompt(own.token_ids[:40]) for own in prompts(9)[0] if len(own) > 40][:4]
    alone = [generate(*endless, own, max_tokens=70, sampling=sampling, draft_length=2).token_ids for own in asked]
    room[0] = 4 * 60
    store = PromptStore(max_bytes=bound) if stored else None
    with Watched(*endless, max_batch=4, store=store) as watched:
        if bound is not None:
            watched.shelf.max_bytes = bound
        streams = [watched.submit(own, max_tokens=70, sampling=sampling, draft_length=2) for own in asked]
        assert [collect(stream).token_ids for stream in streams] == alone
        assert watched.parked > 0 and watched.most > 1
        assert not watched.works and not watched.shelf.held
    assert stored or not watched.shelf.lines


def random_prompt(seed: int, length: int) -> Prompt:
    return Prompt([2, *np.random.default_rng(seed).integers(110, 500, length).tolist()])


def test_what_a_parked_row_has_is_not_read_again(
    endless: Loaded, room: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    """The store has room for it where it has left."""
    monkeypatch.setattr(engine, "FORESEEN", 8)
    room[0] = 2 * 460
    options = {"max_tokens": 90, "draft_length": 0, "repetition_detection": "off"}
    with Watched(*endless, max_batch=2, store=PromptStore()) as watched:
        streams = [watched.submit(random_prompt(seed, 400), **options) for seed in (0, 1)]
        for stream in streams:
            collect(stream)
        assert watched.parked > 0 and watched.read == 2 * 401


def test_of_eight_rows_that_become_four_none_is_read_again(
    endless: Loaded, room: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    """A round of five has eight places too: the store has no room before four rows have left."""
    monkeypatch.setattr(engine, "FORESEEN", 8)
    options: dict[str, Any] = {"max_tokens": 300, "draft_length": 0, "repetition_detection": "off", "sampling": GREEDY}
    asked = [random_prompt(seed, 200) for seed in range(8)]
    alone = [generate(*endless, own, **options).token_ids for own in asked]
    with Watched(*endless, max_batch=8, store=PromptStore()) as watched:
        streams = [watched.submit(own, **options) for own in asked]
        found = [[*next(stream).token_ids] for stream in streams]
        while watched.most < 8:
            found[0] += next(streams[0]).token_ids
        room[0] = 8 * max(work.positions for work in watched.works)
        for own, stream in zip(found, streams, strict=True):
            own += collect(stream).token_ids
        assert found == alone
        assert watched.parked > 3 and watched.read == 8 * 201


@pytest.mark.parametrize("stored", [False, True])
def test_a_reading_that_was_parked_goes_on_and_finds_no_more_than_others_read(
    endless: Loaded, room: list[int], stored: bool
) -> None:
    with Watched(*endless, max_batch=2, store=PromptStore() if stored else None) as watched:
        row = watched.submit(random_prompt(0, 20), max_tokens=3000, draft_length=0, repetition_detection="off")
        next(row)
        reader = watched.submit(random_prompt(1, 3000), max_tokens=1)
        while watched.read < 1000:
            next(row)
        room[0] = 5000  # positions: one of them fits, and the store beside it
        while not watched.parked:
            next(row)
        room[0] = 2**60
        assert collect(reader).stats.cached_tokens == int(stored)  # the first token is the same
        row.close()
        assert watched.read <= 21 + 3001


def test_of_a_row_that_was_parked_nothing_is_said_of_how_far_its_prompt_is_read(
    endless: Loaded, room: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    """The reply has begun; with a store that keeps nothing all of both is read again."""
    monkeypatch.setattr(engine, "FORESEEN", 8)
    room[0] = 2 * 460
    said: list[tuple[int, str]] = []

    class Telling(Watched):
        def read_on(self, work: Work) -> None:
            assert work.row is not None
            count = work.row.count
            super().read_on(work)
            if work.seat is None:
                said.append((count, asyncio.run(progress_of(work))))

    with Telling(*endless, max_batch=2) as telling:
        telling.shelf.max_bytes = 1
        for stream in [telling.submit(random_prompt(seed, 400), max_tokens=90, draft_length=0) for seed in (0, 1)]:
            collect(stream)
        assert telling.parked > 0
    assert any(count for count, _ in said) and {told == "" for count, told in said if count} == {True}
    assert {told for count, told in said if not count} <= {str((401, 0, read)) for read in range(1, 401)}


async def progress_of(work: Work) -> str:
    """As a server asks for it."""
    ask: Any = SimpleNamespace(n=1, prompts=(), progress=lambda *numbers: str(numbers))
    nobody: Any = None
    job = Job(nobody, nobody, ask, "")
    streams: list[Any] = [SimpleNamespace(work=work)]
    job.streams = streams
    return job.progress


def test_where_one_row_alone_fits_they_take_turns(endless: Loaded, room: list[int]) -> None:
    asked, limits = prompts(5)
    alone = [
        generate(*endless, own, max_tokens=n, sampling=GREEDY).token_ids for own, n in zip(asked, limits, strict=True)
    ]
    room[0] = 1
    with Watched(*endless, max_batch=4) as watched:
        streams = [watched.submit(own, max_tokens=n, sampling=GREEDY) for own, n in zip(asked, limits, strict=True)]
        assert [collect(stream).token_ids for stream in streams] == alone
        assert watched.most == 1


def test_a_parked_row_may_be_cancelled_or_closed(endless: Loaded, room: list[int]) -> None:
    asked, _ = prompts(3)
    with Watched(*endless, max_batch=4) as watched:
        streams = [watched.submit(own, max_tokens=10_000, draft_length=0) for own in asked]
        for stream in streams:
            next(stream)
        room[0] = 1
        while watched.parked < 2:
            next(streams[0])
        streams[1].close()
        next(streams[0])
        next(streams[0])
        while len(watched.works) > 2:
            next(streams[0])
    assert list(streams[1]) == []
    with pytest.raises(RuntimeError, match="closed before the reply was finished"):
        list(streams[2])


def test_what_max_tokens_bounds_is_not_reserved(endless: Loaded, room: list[int]) -> None:
    asked, _ = prompts(2)
    room[0] = 2 * (200 + engine.FORESEEN)
    with Watched(*endless, max_batch=2) as watched:
        streams = [watched.submit(own, max_tokens=2**31, draft_length=0) for own in asked]
        while watched.most < 2:
            next(streams[0])
            next(streams[1])
        assert watched.parked == 0


def test_the_store_has_of_a_short_row_no_slots_of_a_long_one_beside_it(endless: Loaded) -> None:
    store = PromptStore()
    with Engine(*endless, max_batch=2, store=store) as engine_:
        long = engine_.submit(random_prompt(0, 2500), max_tokens=900, draft_length=0, repetition_detection="off")
        next(long)
        collect(engine_.submit(random_prompt(1, 100), max_tokens=4))
        bytes_of = {len(line): line.nbytes for line in store.lines}
        long.close()
    assert bytes_of[101 + 3] <= bytes_of[2501] / 4


def test_slots_that_a_long_row_needed_go_with_it(endless: Loaded) -> None:
    long = Prompt(np.random.default_rng(0).integers(110, 500, 2000).tolist())
    with Engine(*endless, max_batch=2) as engine_:
        short = engine_.submit(Prompt([2, 150]), max_tokens=500, draft_length=0)
        next(short)
        collect(engine_.submit(long, max_tokens=4, draft_length=0))
        assert len(collect(short).token_ids) == 499
        stream = engine_.submit(Prompt([2, 150]), max_tokens=500, draft_length=0)
        next(stream)
        assert engine_.batch.caches is not None and engine_.batch.caches.slots <= 1536


class Visited(Engine):
    """Where others keep coming, for so many rounds. Notes slots of rows, and the most of all places behind a chunk."""

    def __init__(self, *args: Any, **options: Any):
        self.left = self.most = 0
        self.slots: list[int] = []
        self.visitors: list[Stream] = []
        super().__init__(*args, **options)

    def decode(self) -> None:
        if self.left and self.batch.caches is not None:
            self.left -= 1
            self.slots.append(self.batch.caches.slots)
            while len(self.works) + len(self.asked) < 4:
                self.visitors.append(self.submit(Prompt([2, 150]), max_tokens=5, draft_length=0))
        super().decode()

    def read_on(self, work: Work) -> None:
        super().read_on(work)
        if self.batch.caches is not None:
            self.most = max(self.most, len(self.batch.seats) * self.batch.caches.slots)


def test_slots_that_a_long_row_needed_go_with_it_though_others_wait(endless: Loaded) -> None:
    with Visited(*endless, max_batch=2) as visited:
        row = visited.submit(random_prompt(0, 9), max_tokens=400, draft_length=0, repetition_detection="off")
        next(row)
        long = visited.submit(random_prompt(1, 3000), max_tokens=2, draft_length=0)
        next(long)
        visited.left = 40
        collect(long)
        while visited.left:
            next(row)
        row.close()
    assert visited.slots[-1] <= 1024


def test_a_long_newcomer_gets_no_more_places_than_there_are_rows(endless: Loaded) -> None:
    """Those of rows that ended while it was read would each have its slots."""
    options = {"draft_length": 0, "repetition_detection": "off"}
    with Visited(*endless, max_batch=8) as visited:
        rows = [visited.submit(random_prompt(n, 9), max_tokens=100 if n else 2000, **options) for n in range(7)]
        for row in rows:
            next(row)
        long = visited.submit(random_prompt(8, 3500), max_tokens=5, **options)
        for row in rows[1:]:
            collect(row)
        collect(long)
        rows[0].close()
    assert visited.most <= 2 * 4096
