"""Many requests at once: any thread asks, one thread reads and decodes.

Where machines share the model, each of them does the same steps, by words of the first one: all that hangs on clients,
clocks or the queue is in a word, and all else is computed alike.
"""

import atexit
import pickle
import time
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import FIRST_EXCEPTION, ThreadPoolExecutor, wait
from contextlib import ExitStack
from dataclasses import dataclass, replace
from queue import SimpleQueue
from threading import Condition, Thread
from typing import Any

import mlx.core as mx

from mlx_gemma4.decoding.batch import MOST_ROWS, Batch, Given, Seat, size_of
from mlx_gemma4.decoding.disk import PAGE, common
from mlx_gemma4.decoding.round import NOT_FINITE, State, forget_thread
from mlx_gemma4.decoding.sampling import Sampling
from mlx_gemma4.decoding.store import PromptStore, units
from mlx_gemma4.engine.generation import begin, bounded_memory, check_given, prompt_told
from mlx_gemma4.engine.reading import Opened, opened, space_of
from mlx_gemma4.engine.request import Asked, Options, Request
from mlx_gemma4.engine.row import Row
from mlx_gemma4.errors import a, shown
from mlx_gemma4.model.cache import ROUND
from mlx_gemma4.model.model import Model, check_process
from mlx_gemma4.planner import Footprint, batch_bytes, check_memory, memory_limit, predict
from mlx_gemma4.prompt.processor import Processor
from mlx_gemma4.prompt.prompt import Prompt, is_whole
from mlx_gemma4.reply.reply import Piece, Reply, Stats, collect
from mlx_gemma4.weights.load import footprint_of
from mlx_gemma4.weights.peers import everyones, follows, give_up, hear, lead, release, same, settle

# Tokens read at once while rows are decoding: one chunk is what such a row waits for longest.
SHORT_CHUNK = 128
PAUSE = 0.25  # seconds that reading may be ahead of rounds: short prompts that come together are read together
AHEAD = 2  # so many requests are prepared for each row, where many are asked
FORESEEN = 1024  # tokens of a reply that must fit for its row to be taken in beside others


class Work(Asked):
    """A request on its way: it waits, is read, is a row of the batch, and ends."""

    def __init__(self, model: Model, processor: Processor, prompt: Prompt, options: Options, prepared: float):
        super().__init__(model, processor, prompt, options, prepared)
        self.units, self.came = units(prompt), time.perf_counter()
        self.pieces: SimpleQueue[Piece | BaseException | None] = SimpleQueue()  # None: no more
        self.cancelled = False
        self.asked = b""  # for the other machines that share the model
        self.arrived = 0  # tokens that the engine had read before it came
        self.stored = 0  # of its own, that the store had then
        # the prompt, with the reply of a row that was parked, and what of it is read before the row goes on
        self.grown = self.known = prompt
        self.parked: tuple[Seat, State] | None = None  # a row that goes on with what the store holds of it
        self.stack = ExitStack()
        self.reading: Opened | None = None
        self.row: Row | None = None
        self.seat: Seat | None = None

    def park(self, ids: list[int], state: State) -> None:
        """Leave the batch. ids: of the prompt and of all that came of the reply, whose newest token has no entries."""
        assert self.seat is not None
        self.parked, self.seat = (self.seat, state), None
        self.grown, self.known = (replace(self.prompt, token_ids=own) for own in (ids, ids[:-1]))

    @property
    def left(self) -> int:
        """Tokens that are still to be read."""
        return len(self.known) - (self.stored if self.reading is None else self.reading.caches.length)

    @property
    def is_scored(self) -> bool:
        """Whether each chunk that is read is to be seen: nothing of it is taken from a store."""
        return self.options.prompt_logprobs and self.parked is None

    @property
    def positions(self) -> int:
        return len(self.prompt) + (0 if self.row is None else self.row.count)


@dataclass(frozen=True)
class Word:
    """What a step goes by."""

    asked: list[bytes]  # requests that are new
    stored: list[int]  # tokens of each that the first machine's store has
    cancelled: list[int]  # which of the works, these among them, nobody waits for
    reads: bool  # it is the turn of a prompt
    known: list[int]  # positions of the works before it: all machines must have come as far


class Stream(Iterator[Piece]):
    """The pieces of one reply. Dropped or closed early, its row is free within one round."""

    def __init__(self, work: Work):
        self.work = work
        self.ended = False

    def __next__(self) -> Piece:
        if self.ended or self.work.cancelled:
            raise StopIteration
        found = self.work.pieces.get()
        if isinstance(found, Piece):
            return found
        self.ended = True
        if found is None:
            raise StopIteration
        raise found

    def close(self) -> None:
        """Take no more of it; a thread that waits for a piece gets none."""
        self.work.cancelled = True

    def stats(self) -> Stats | None:
        """Of a reply that has ended or is closed, once its row is free: as far as it came; None if it has no token."""
        while not self.ended:
            self.ended = not isinstance(self.work.pieces.get(), Piece)
        row = self.work.row
        return row.stats() if row is not None and row.count else None

    def __del__(self) -> None:
        self.close()


class Engine:
    """Answers many requests at once, at most `max_batch` in one round; the others wait.

    Any thread may submit. Requests that begin alike read what they share once, if there is a `store`. To be closed, or
    used in a with-statement: replies that are not finished by then end with a RuntimeError. ValueError if model,
    processor, max_batch or store is wrong.

    Where machines share the model, each makes an Engine: the first one's is asked, and the others `follow` theirs.
    """

    def __init__(self, model: Model, processor: Processor, max_batch: int = 8, store: PromptStore | None = None):
        check_given(model, processor, store)
        check_max_batch(max_batch)
        self.model, self.processor, self.max_batch, self.store = model, processor, int(max_batch), store
        self.shelf = PromptStore() if store is None else store  # for rows that are parked
        self.footprint = footprint_of(model)
        if model.group is not None:
            lead()
        self.machines = everyones(model.group, (self.footprint, memory_limit()))  # what each holds, and may hold
        self.asked: list[Work] = []  # that the next step takes over
        self.works: list[Work] = []  # of the engine's own thread
        self.batch = Batch(model)
        self.read = 0  # tokens, of all prompts
        self.debt = 0.0  # seconds that reading has had beyond what rounds had, while there were rows
        self.closed = False
        self.news = Condition()
        self.rank = 0 if model.group is None else model.group.rank()
        self.thread = Thread(target=self.run, name="mlx_gemma4.Engine", daemon=True)
        if not self.rank:
            self.thread.start()
            atexit.register(self.close)

    def __enter__(self) -> "Engine":
        return self

    def __exit__(self, *exception: object) -> None:
        self.close()

    def submit(
        self,
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
        *,
        preserve_thinking: bool = False,
        repetition_detection: str | Mapping[str, int] = "auto",
        stop: str | Sequence[str] = (),
        thinking_budget: int | None = None,
        continue_final_message: bool = False,
        logprobs: int | None = None,
        logit_bias: Mapping[int, float] | None = None,
        response_format: Any = None,
        tool_choice: str = "auto",
        parallel_tool_calls: bool = True,
        scope: str = "",
        adapter: str | None = None,
    ) -> Stream:
        """The reply piece by piece; takes what `generate` takes. The request is checked, and its media are decoded, in
        the thread that asks. scope: whose request it is; what has been read for others is not found in the store.
        RuntimeError if the engine is closed."""
        options = Options(
            max_tokens=max_tokens, sampling=sampling, draft_length=draft_length,
            repetition_detection=repetition_detection, stop=stop, thinking_budget=thinking_budget, logprobs=logprobs,
            logit_bias=logit_bias, response_format=response_format, tool_choice=tool_choice,
            parallel_tool_calls=parallel_tool_calls, scope=scope, adapter=adapter,
        )  # fmt: skip
        asked = Request(
            content=request, images=images, audios=audios, videos=videos, system=system, tools=tools,
            thinking=options.thinks(thinking), image_budget=image_budget, preserve_thinking=preserve_thinking,
            continue_final_message=continue_final_message,
        )  # fmt: skip
        return self.ask(asked, options)

    def ask(self, request: Request, options: Options) -> Stream:
        """`submit` of what is already checked."""
        check_process()
        self.check_open()
        prompt, prepared = request.timed_prompt(self.processor)
        work = Work(self.model, self.processor, prompt, options, prepared)
        for own, room in self.machines:
            check_memory(own, len(prompt), options.max_tokens, room)
        if self.model.group is not None:
            work.asked = pickle.dumps((prompt, options, prepared))
        with self.news:
            self.check_open()
            self.asked.append(work)
            self.news.notify()
        return Stream(work)

    def check_open(self) -> None:
        if self.rank:
            raise RuntimeError(f"this is machine {self.rank} of those that share the model; expected to ask machine 0")
        if self.closed:
            raise RuntimeError("the engine is closed; expected to submit before close()")

    def close(self) -> None:
        """End what is not finished, and the thread. Closing again does nothing."""
        if self.rank:
            return
        with self.news:
            self.closed = True
            self.news.notify()
        self.thread.join()
        atexit.unregister(self.close)

    def follow(self) -> None:
        """On the machines behind the first of those that share a model: do what it does, until it closes its engine.
        RuntimeError on the first."""
        if not self.rank:
            raise RuntimeError("this is machine 0; expected to follow it on those that share its model")
        self.answer()

    # --- the engine's thread -------------------------------------------------------------------

    def run(self) -> None:
        self.answer()
        # what was traced here hangs on this thread's streams: kept until the process ends, MLX would abort it
        forget_thread(self.model)
        mx.clear_streams()

    def answer(self) -> None:
        while (word := hear() if self.rank else self.word()) is not None:
            self.step(word)
        for work in [*self.works]:
            self.end(work, RuntimeError("the engine was closed before the reply was finished"))
        self.batch = Batch(self.model)

    def word(self) -> Word | None:
        """Wait for a request, or for the end: None."""
        with self.news:
            self.news.wait_for(lambda: self.asked or self.works or self.closed)
            known, asked = [work.positions for work in self.works], self.asked
            self.take(asked)
            self.asked = []
            if self.closed:
                release(self.model.group)
                return None
        gone = [place for place, work in enumerate(self.works) if work.cancelled]
        requests, stored = [work.asked for work in asked], [self.stored(work) for work in asked]
        return same(self.model.group, Word(requests, stored, gone, self.debt <= PAUSE, known))

    def stored(self, work: Work) -> int:
        if self.store is None or not self.store.lines or work.is_scored:
            return 0
        return self.store.best(space_of(self.model, work.options.scope, work.adapter), work.units, work.prompt)[1]

    def take(self, asked: list[Work]) -> None:
        for work in asked:
            work.arrived = self.read
        self.works += asked

    def step(self, word: Word) -> None:
        """One round of all rows, and a chunk of a newcomer's prompt if it is its turn."""
        if self.rank:
            if word.known != [work.positions for work in self.works]:
                give_up(
                    f"error: machine {self.rank} has come to another place than machine 0; expected the same on all"
                )
            self.take([Work(self.model, self.processor, *pickle.loads(asked)) for asked in word.asked])
        for work, stored in zip(reversed(self.works), reversed(word.stored), strict=False):
            work.stored = stored
        for work in [self.works[place] for place in word.cancelled]:
            self.end(work)
        if word.reads or not self.batch.rows:
            self.read_chunk()
        if self.batch.rows:
            self.decode()

    def decode(self) -> None:
        started = time.perf_counter()
        try:
            self.make_room()
            self.batch.shrink(len(self.busy))
            given = self.batch.step()
        except Exception as error:  # whatever a round raises, those who wait for it must learn it
            settle(self.model.group, error)
            self.batch = Batch(self.model)
            for work in [*self.works]:
                if work.seat is not None:
                    self.fail(work, error)
            return
        self.hand_out(given)
        self.debt = max(0.0, self.debt - (time.perf_counter() - started))

    def hand_out(self, given: list[Given]) -> None:
        works = {work.seat: work for work in self.works}
        for own in given:
            self.hand_on(works[own.seat], own)

    def make_room(self) -> None:
        """Park the youngest as long as those in work do not fit on; the oldest always goes on."""
        while not self.go_on(busy := self.busy):
            if self.batch.waiting is not None:
                self.hand_out(self.batch.flush())
            else:
                staying = next(count for count in reversed(range(len(busy))) if self.go_on(busy[:count]))
                self.park(busy[staying:])

    def go_on(self, works: list[Work]) -> bool:
        return len(works) < 2 or self.hold(works, 2 * ROUND)

    def park(self, works: list[Work]) -> None:
        """Put rows, or what has been read for them, into the store, from which they are taken up again when they fit.
        All at once: what those that stay leave is known then, and a batch has half the places or all."""
        going = [(work, reading) for work in works if (reading := work.reading) is not None]
        rows = [(work, seat, reading) for work, reading in going if (seat := work.seat) is not None]
        gone = [(seat, reading.caches) for _, seat, reading in rows]
        states = self.batch.part(gone, len(self.busy) - len(works))
        for (work, _, reading), state in zip(rows, states, strict=True):
            work.park(reading.ids, state)
        for work, reading in going:
            if reading.held is None:
                space = space_of(self.model, work.options.scope, work.adapter)
                reading.held = self.shelf.adopt(space, work.grown, reading.caches)
            work.reading = None
        self.leave_room()  # first, or what is given would have to fit beside it
        for work, reading in going:
            reading.give()
            work.stack.close()

    def hand_on(self, work: Work, given: Given) -> None:
        """Give what a round gave, or the reading of the prompt, to whoever asked."""
        assert work.row is not None and work.reading is not None
        try:
            piece = work.row.take(given)
            work.reading.ids += given.tokens
            last = None if work.row.finish_reason is None else work.row.finish()
        except Exception as error:  # an error of one request must not reach the others
            self.fail(work, error)
            return
        if last is None:
            work.pieces.put(piece)
            return
        self.leave(work)  # before the last piece goes out, what was read and written can be found
        work.pieces.put(piece)
        work.pieces.put(last)
        self.end(work)

    def leave(self, work: Work) -> None:
        """Free a row's place, and give the store what it has read and written."""
        reading = work.reading
        if reading is not None and self.store is None:
            reading.forget()  # it was parked once: nobody else is to find it
        if reading is not None and work.seat in self.batch.rows:
            self.batch.remove(work.seat, None if reading.held is None else reading.caches)
        work.seat = None
        work.stack.close()
        if reading is not None:
            reading.caches.clear()  # who keeps a stream keeps no entries

    def fail(self, work: Work, error: Exception) -> None:
        if work.reading is not None:
            work.reading.forget()  # what came of it is not sure
        self.end(work, error)

    def end(self, work: Work, error: BaseException | None = None) -> None:
        self.leave(work)
        with self.news:
            self.works.remove(work)
        self.leave_room()
        work.pieces.put(error)

    # --- reading -------------------------------------------------------------------------------

    def read_chunk(self) -> None:
        work = self.next_to_read()
        if work is None:
            return
        started, delays = time.perf_counter(), bool(self.batch.rows)
        self.batch.clock.interrupted()
        try:
            if work.reading is None:
                self.open(work)
            self.read_on(work)
        except Exception as error:  # an error of one request must not reach the others
            settle(self.model.group, error)
            self.fail(work, error)
        self.debt = self.debt + time.perf_counter() - started if delays else 0.0  # it is owed to rows that are there

    def next_to_read(self) -> Work | None:
        """Whose prompt to read: that of which least is left, less the tokens that others had read since it came, so
        that none waits for ever. None: nobody's, or there is no room for the one whose turn it is."""
        read = [work for work in self.works if work.reading is not None and work.seat is None]
        waiting = [work for work in self.works if work.reading is None]
        candidates = read + (waiting if len(self.busy) < self.max_batch else [])
        for work in sorted(candidates, key=lambda work: work.left - (self.read - work.arrived)):
            if work.reading is not None:
                return work
            if not any(self.shares(work, other) for other in read):
                return work if self.fits(work) else min(read, key=lambda own: own.left, default=None)
        return None

    @property
    def busy(self) -> list[Work]:
        """Those that are being read or decoded, the oldest first."""
        return [work for work in self.works if work.reading is not None]

    def shares(self, work: Work, other: Work) -> bool:
        """Whether what another reads will be found by this one, and sooner than this one would have read it."""
        same = (work.options.scope, work.adapter) == (other.options.scope, other.adapter)
        same = same and not work.is_scored and not other.is_scored
        return self.store is not None and same and common(work.units, other.units) >= max(PAGE, other.left)

    def fits(self, work: Work) -> bool:
        """Whether a newcomer fits beside those in work, for a while: what a reply may come to is not reserved."""
        return not self.busy or self.hold([*self.busy, work], FORESEEN)

    def hold(self, works: list[Work], ahead: int) -> bool:
        """Whether the machines can hold these together, and so many tokens of each more."""
        return all(self.needed(works, ahead, own) <= room for own, room in self.machines)

    def needed(self, works: list[Work], ahead: int, own: Footprint) -> float:
        """Bytes of one machine."""
        return batch_bytes(own, [work.positions for work in works], size_of(len(works)), ahead)

    def leave_room(self) -> None:
        """Let the store have what those in work leave."""
        if self.busy:
            self.shelf.leave(memory_limit() - int(self.needed(self.busy, FORESEEN, self.footprint)))

    def open(self, work: Work) -> None:
        is_new = work.row is None
        if work.row is None:
            work.prepared += time.perf_counter() - work.came  # the client has waited for it too
            work.row = Row(self.processor, work)
        prompt, limit = work.grown, min(work.limit - work.row.count, FORESEEN)
        needed = predict(self.footprint, len(prompt), limit)
        work.stack.enter_context(bounded_memory.request(needed))
        store = None if work.is_scored else self.store if is_new else self.shelf
        own, scope = self.processor, work.options.scope
        context = opened(store, self.model, own, prompt, limit, needed.peak, scope, work.adapter)
        work.reading = work.stack.enter_context(context)
        if is_new:
            work.row.cached = work.reading.caches.length
        self.leave_room()

    def read_on(self, work: Work) -> None:
        """One chunk, and behind the last one the row takes its place, with its first token if it is new."""
        reading, row = work.reading, work.row
        assert reading is not None and row is not None
        if work.left:
            chunk = min(SHORT_CHUNK, reading.chunk) if self.batch.rows else reading.chunk
            before = reading.caches.length
            hidden = next(self.model.read(work.known, reading.caches, chunk, work.adapter))
            reading.keep()
            if work.is_scored and (foretold := work.known.token_ids[before + 1 : reading.caches.length + 1]):
                row.score(before + 1, prompt_told(self.model, hidden, foretold, work.adapter))
            with self.news:
                self.read += reading.caches.length - before
            if work.left:
                return
        if work.parked is not None:
            work.seat, state = work.parked
            work.parked = None
            self.batch.put(work.seat, reading.caches, state)
            return
        state, given = begin(self.model, self.processor, work, hidden[:, -1:])
        if self.store is not None and NOT_FINITE not in given.tokens:
            reading.share()
        work.seat = given.seat
        self.batch.put(work.seat, reading.caches, state)
        self.hand_on(work, given)


def check_max_batch(value: int) -> None:
    if not is_whole(value) or not 1 <= value <= MOST_ROWS:
        raise ValueError(f"max_batch is {shown(value)}; expected a whole number from 1 to {MOST_ROWS}")


def generate_batch(
    model: Model,
    processor: Processor,
    requests: Sequence[str | list[dict[str, Any]] | Prompt],
    max_batch: int = 8,
    system: str | None = None,
    tools: list[dict[str, Any]] | None = None,
    thinking: bool = False,
    image_budget: int | None = None,
    max_tokens: int = 1024,
    sampling: Sampling = Sampling(),
    draft_length: int | str = "auto",
    *,
    store: PromptStore | None = None,
    preserve_thinking: bool = False,
    repetition_detection: str | Mapping[str, int] = "auto",
    stop: str | Sequence[str] = (),
    thinking_budget: int | None = None,
    continue_final_message: bool = False,
    logprobs: int | None = None,
    logit_bias: Mapping[int, float] | None = None,
    response_format: Any = None,
    tool_choice: str = "auto",
    parallel_tool_calls: bool = True,
    adapter: str | None = None,
) -> list[Reply]:
    """The whole replies to many requests, in their order; at most `max_batch` are decoded at once.

    The other arguments are those of `generate`, for all requests; `system` goes with those that are strings. ValueError
    if one is wrong, which says which: with an `Engine` that request alone fails. Of machines that share the model the
    first gives the replies; the others follow, and give none.
    """
    if isinstance(requests, (str, Prompt)) or not isinstance(requests, Sequence):
        raise ValueError(f"requests is {a(requests)}; expected a list of strings, lists of messages or Prompts")
    check_max_batch(max_batch)

    def ask(number: int) -> Reply:
        request = requests[number]
        try:
            stream = engine.submit(
                request, system=system if isinstance(request, str) else None, tools=tools, thinking=thinking,
                image_budget=image_budget, max_tokens=max_tokens, sampling=sampling, draft_length=draft_length,
                preserve_thinking=preserve_thinking, repetition_detection=repetition_detection, stop=stop,
                thinking_budget=thinking_budget, continue_final_message=continue_final_message, logprobs=logprobs,
                logit_bias=logit_bias, response_format=response_format, tool_choice=tool_choice,
                parallel_tool_calls=parallel_tool_calls, adapter=adapter,
            )  # fmt: skip
        except ValueError as error:
            raise ValueError(f"request {number}: {error}") from None
        return collect(stream)

    # the engine is closed before its askers are waited for: at an error they end with it
    with ThreadPoolExecutor(AHEAD * max_batch) as pool, Engine(model, processor, max_batch, store) as engine:
        if follows(model.group):
            engine.follow()
            return []
        replies = [pool.submit(ask, number) for number in range(len(requests))]
        wait(replies, return_when=FIRST_EXCEPTION)
        for reply in replies:
            if reply.done():
                reply.result()
        return [reply.result() for reply in replies]
