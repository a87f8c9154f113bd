"""Rows that decode together: each round gives every one of them tokens, and they come and go between rounds."""

import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, cast

import mlx.core as mx
import numpy as np

from mlx_gemma4.decoding.controller import MAX_DRAFTS, Acceptance, RoundClock
from mlx_gemma4.decoding.round import (
    NONE,
    NOT_FINITE,
    OPTIONAL,
    State,
    compiled_round,
    halves_of_round,
    launch,
    learnt_of,
    optional,
)
from mlx_gemma4.decoding.sampling import Stages
from mlx_gemma4.model.cache import ROUND, Arrays, Caches, FullCache, SlidingCache, caches_of, capacity
from mlx_gemma4.model.model import Model
from mlx_gemma4.weights.peers import same

if TYPE_CHECKING:
    from mlx_gemma4.decoding.constraint import Constraint  # which loads llguidance

SIZES = (1, 2, 4, 8, 16)  # of a batch: rows that a round is compiled for; places without a row are computed in vain

MOST_ROWS = SIZES[-1]


@dataclass(eq=False)
class Seat:
    """A row of a batch, as the host knows it."""

    stages: Stages
    length: int  # positions of its prompt
    limit: int  # tokens of its reply, at most
    drafts: int | None  # tokens that it drafts in every round; None: as many as pay
    constraint: "Constraint | None" = None  # what its reply is held to
    acceptance: Acceptance = field(default_factory=Acceptance)  # of its drafts
    count: int = 1  # tokens of its reply that are known

    @property
    def positions(self) -> int:
        return self.length + self.count - 1

    @property
    def is_held(self) -> bool:
        return self.constraint is not None and self.constraint.binds


@dataclass(frozen=True)
class Launched:
    """A round that was handed to the device."""

    seats: list[Seat | None]
    drafts: int
    tokens: mx.array  # [B, drafts + 1]
    told: mx.array | None = None  # [B, drafts + 1, …]: sampling.told


@dataclass(frozen=True)
class Given:
    """What a round gave a row, or the reading of its prompt."""

    seat: Seat
    drafted: int | None  # None: the first token, which no round gave
    tokens: list[int]
    told: np.ndarray | None = None  # [drafts + 1, …]: sampling.told, of whoever asks for it
    error: Exception | None = None  # why the row cannot go on


class Batch:
    """The rows and what the device keeps of them. The host runs one round behind: while it reads the tokens of one
    round, the device works on the next."""

    def __init__(self, model: Model):
        self.model = model
        self.seats: list[Seat | None] = []  # None: no row is there
        self.caches = Caches([], ())  # of no layers where no row is there
        self.state: State = {}
        self.waiting: Launched | None = None
        self.clock = RoundClock()

    @property
    def rows(self) -> list[Seat]:
        return [seat for seat in self.seats if seat is not None]

    def put(self, seat: Seat, caches: Caches, state: State) -> None:
        """Take a row in, and what its caches hold, which are empty then. state: of this row alone."""
        self.clock.interrupted()
        copy = caches_of(caches.arrays, self.model.config.text)
        caches.clear()
        state = state | {"limit": mx.array([limit_of(seat)])}
        if not self.seats:
            self.seats, self.caches, self.state = [seat], copy, state
            return
        size, slots = size_of(len(self.rows) + 1), slots_of([seat], copy)
        # No empty place grows; by what the rows need, for of several machines some have no full layers.
        if size > len(self.seats) or (size < len(self.seats) and slots > slots_of(self.rows, copy)):
            self.resize(size)
        place = self.seats.index(None)
        slots = max(slots, self.caches.slots)
        for layer, new in zip(self.caches.layers, copy.layers, strict=True):
            for cache in (layer, new):
                if isinstance(cache, FullCache):
                    cache.grow(slots)
            layer.arrays = tuple(
                put_row(array, row[:, :, : array.shape[2]], place)
                for array, row in zip(layer.arrays, new.arrays, strict=True)
            )
            new.arrays = ()
            mx.eval(layer.arrays)
        for name in OPTIONAL.keys() & (state.keys() | self.state.keys()):
            for one in (state, self.state):
                shape = len(one["token"]), self.model.config.text.vocab_size
                one[name] = one.get(name, mx.zeros(shape, OPTIONAL[name]))
        self.state = {name: put_row(array, state[name], place) for name, array in self.state.items()}
        self.seats[place] = seat

    def remove(self, seat: Seat, into: Caches | None = None) -> None:
        """Let a row go, and what there is of it into the caches that it came with, if that is to be kept."""
        self.clock.interrupted()
        place, caches = self.seats.index(seat), self.caches
        if into is not None and len(self.seats) == 1:
            into.take(caches.arrays)
        elif into is not None:
            slots = capacity(seat.positions, caches.context)  # of its own: others' may be many more
            for layer, own in zip(caches.layers, into.layers, strict=True):
                own.arrays = row_of(layer, place, slots)
                mx.eval(own.arrays)
        self.seats[place] = None
        if self.rows:
            self.state["limit"] = put_row(self.state["limit"], mx.array([-1]), place)
        else:
            self.clear()

    def clear(self) -> None:
        self.seats, self.caches, self.state, self.waiting = [], Caches([], ()), {}, None

    def part(self, gone: Sequence[tuple[Seat, Caches]], rows: int) -> list[State]:
        """Let rows go that are to go on later, each into the caches that it came with, and go on with places for so
        many: their states; no round may be waiting."""
        if not gone:
            return []
        self.clock.interrupted()
        places = [self.seats.index(seat) for seat, _ in gone]
        states = [{name: array[place : place + 1] for name, array in self.state.items()} for place in places]
        mx.eval(states)
        self.resize(min(size_of(rows), len(self.seats)), gone=gone)
        if not self.rows:
            self.clear()
        return states

    def flush(self) -> list[Given]:
        """The tokens of the round that is waiting, and hand over no other."""
        before, self.waiting = self.waiting, None
        return [] if before is None else self.read(before)

    def shrink(self, rows: int) -> None:
        """Go on with fewer places, if half as many do for so many rows, and with fewer slots likewise."""
        if not self.rows:
            return
        size, slots = size_of(rows), slots_of(self.rows, self.caches)
        if size < len(self.seats) or 2 * slots <= self.caches.slots:
            self.clock.interrupted()
            self.resize(min(size, len(self.seats)), slots)

    def resize(self, size: int, slots: int | None = None, gone: Sequence[tuple[Seat, Caches]] = ()) -> None:
        """slots: of full layers, if they are to have fewer: rows then keep their places, which are those of all
        machines, of which some have no full layers. gone: rows that leave, and where to: layer by layer, since there
        may be no memory for all of them twice."""
        leaving = [(self.seats.index(seat), capacity(seat.positions, self.caches.context), into) for seat, into in gone]
        for place, _, _ in leaving:
            self.seats[place] = None
        is_other = size != len(self.seats)
        places = [place for place, seat in enumerate(self.seats) if seat is not None or not is_other]
        self.seats = [self.seats[place] for place in places] + [None] * (size - len(places))
        rows = mx.array(places, mx.int32)
        for number, layer in enumerate(self.caches.layers):
            for place, own, into in leaving:
                into.layers[number].arrays = row_of(layer, place, own)
            kept = slice(slots if isinstance(layer, FullCache) else None)
            layer.arrays = tuple(chosen_rows(array[:, :, kept], rows, size) for array in layer.arrays)
            mx.eval(layer.arrays, [into.layers[number].arrays for _, _, into in leaving])
        self.state = {name: chosen_rows(array, rows, size) for name, array in self.state.items()}
        empty = mx.array([seat is None for seat in self.seats])
        # of an empty place: the drafter's query is one position before the offset
        self.state["limit"] = mx.where(empty, -1, self.state["limit"])
        self.state["offset"] = mx.where(empty, 1, self.state["offset"])

    def step(self) -> list[Given]:
        """Hand over the next round, if a row needs it, and give the tokens of the one before.

        Where a row is held to a form, the host has to see each round's tokens before the next one.
        """
        self.clock.resumed()
        before, self.waiting = self.waiting, None
        if any(seat.is_held for seat in self.rows):
            return self.held_round() if before is None else self.read(before)
        state = self.state
        pending = set() if before is None else {seat for seat in before.seats if seat is not None}
        if any(seat.count + (seat in pending) < seat.limit for seat in self.rows):
            self.waiting = self.launch(pending, 0 if before is None else before.drafts + 1)
        given = [] if before is None else self.read(before)
        if self.waiting is not None and any(seat.is_held for seat in self.rows):
            self.waiting, self.state = None, state  # it was not: this round never was
            self.clock.interrupted()
        return given

    def held_round(self) -> list[Given]:
        """A round in two halves: drafts, then, on the host, what may come at each place, and what comes of it."""
        started = time.perf_counter()
        caches, size, vocabulary = self.caches, len(self.seats), self.model.config.text.vocab_size
        wanted = self.choose(is_held=True)
        forced = [self.forced(seat, wanted) for seat in self.seats]
        limits = [len(own) or limit for own, limit in zip(forced, map(limit_of, self.seats), strict=True)]
        is_drafted = wanted > 0 and any(seat and not own for seat, own in zip(self.seats, forced, strict=True))
        drafts = max(wanted if is_drafted else 0, *map(len, forced))
        caches.reserve(max(seat.positions for seat in self.rows) + ROUND)
        stages = self.stages()
        (first, second), is_new = halves_of_round(self.model, stages, size, drafts, caches.slots)
        drafted: mx.array = mx.zeros((size, drafts), mx.int32)
        q: mx.array | None = None  # drafts that all must come, or none
        if is_drafted:
            drafted, q = first(self.state, caches.arrays)
        proposed, is_forced = np.array(drafted), np.zeros((size, drafts), bool)
        for place, own in enumerate(forced):
            proposed[place, : len(own)], is_forced[place, : len(own)] = own, True
        bits, errors = np.full((size, drafts + 1, -(-vocabulary // 32)), 0xFFFFFFFF, np.uint32), {}
        for place, seat in enumerate(self.seats):
            if seat is not None and seat.constraint is not None and seat.is_held:
                try:
                    masks = seat.constraint.masks_for(proposed[place, : limits[place]].tolist())
                    bits[place, : len(masks)] = masks
                except RuntimeError as error:  # of this row: the others go on
                    errors[seat] = error
        state = self.state | {"limit": mx.array(limits)}
        if is_forced.any():
            drafted = mx.array(proposed)
        tokens, state, arrays = second(state, caches.arrays, drafted, q, mx.array(bits), mx.array(is_forced))
        self.state = state | {"limit": mx.array([limit_of(seat) for seat in self.seats])}
        caches.take(arrays)
        mx.async_eval(tokens, self.state, arrays)
        self.clock.interrupted()
        given = self.rows_of(Launched([*self.seats], drafts, tokens, self.state.pop("told", None)), errors)
        free = [(own.seat.acceptance, len(own.tokens) - 1) for own in given if own.seat.drafts is None]
        if free and not any(forced):
            seconds = None if is_new else time.perf_counter() - started
            learnt_of(self.model).controller(size, is_held=True).record(drafts, free, seconds)
        return given

    def forced(self, seat: Seat | None, wanted: int) -> list[int]:
        """What must come next in a row, as drafts: no more than others draft, or beside none than may be."""
        if seat is None or seat.constraint is None or not seat.is_held or not wanted:
            return []
        most = MAX_DRAFTS if len(self.seats) == 1 else wanted
        return seat.constraint.forced(most if seat.drafts is None else seat.drafts)

    def stages(self) -> Stages:
        """What the laws of the rows have in common."""
        stages = self.rows[0].stages
        for seat in self.rows[1:]:
            stages = stages | seat.stages
        for name in OPTIONAL.keys() - optional(stages):
            self.state.pop(name, None)
        return stages

    def launch(self, pending: set[Seat], most: int) -> Launched:
        """pending: the rows that a round of at most so many tokens is not read of yet."""
        caches, size = self.caches, len(self.seats)
        drafts = self.choose()
        caches.reserve(max(seat.positions + most * (seat in pending) for seat in self.rows) + ROUND)
        stages = self.stages()
        round_, is_new = compiled_round(self.model, stages, size, drafts, caches.slots)
        self.clock.launched(drafts, is_new)
        tokens, self.state = launch(round_, self.state, caches)
        return Launched([*self.seats], drafts, tokens, self.state.pop("told", None))

    def choose(self, is_held: bool = False) -> int:
        """Drafts of the next round: rows that draft a fixed number get them, whatever pays for the others."""
        wanted = [seat.drafts for seat in self.rows if seat.drafts is not None]
        if len(wanted) < len(self.rows):
            pays = learnt_of(self.model).controller(len(self.seats), is_held).choose()
            wanted.append(same(self.model.group, pays))  # measured times differ from machine to machine
        return max(wanted)

    def read(self, launched: Launched) -> list[Given]:
        """The tokens of a round, row by row; those that have left in the meantime are passed over."""
        given = self.rows_of(launched, {})
        seconds = self.clock.read()
        free = [(own.seat.acceptance, len(own.tokens) - 1) for own in given if own.seat.drafts is None]
        if free:
            learnt_of(self.model).controller(len(launched.seats)).record(launched.drafts, free, seconds)
        return given

    def rows_of(self, launched: Launched, errors: Mapping[Seat, Exception]) -> list[Given]:
        flat, width = tokens_of(launched.tokens), launched.drafts + 1
        told = None if launched.told is None else np.asarray(launched.told)
        given: list[Given] = []
        for place, seat in enumerate(launched.seats):
            if seat is None or seat not in self.seats:
                continue
            tokens = [token for token in flat[place * width : (place + 1) * width] if token != NONE]
            seat.count += len(tokens)
            drafted = launched.drafts if seat.drafts is None else seat.drafts
            error = errors.get(seat)
            if error is None and seat.constraint is not None and NOT_FINITE not in tokens:
                try:
                    tokens = tokens[: seat.constraint.advance(tokens)]
                except RuntimeError as found:  # of this row: the others go on
                    error = found
            own = told[place] if told is not None and seat.stages.tells else None
            given.append(Given(seat, drafted, tokens, own, error))
        return given


def limit_of(seat: Seat | None) -> int:
    """Drafts that a row takes at most; below 0: no row is there."""
    if seat is None:
        return -1
    return MAX_DRAFTS if seat.drafts is None else seat.drafts


def slots_of(seats: Sequence[Seat], caches: Caches) -> int:
    """Of full layers: what these rows need for the next rounds."""
    return capacity(max(seat.positions for seat in seats) + 2 * ROUND, caches.context)


def size_of(rows: int) -> int:
    return next(size for size in SIZES if size >= rows)


def row_of(layer: FullCache | SlidingCache, place: int, slots: int) -> Arrays:
    """A copy of a place's own, [1, …] each; slots: of full layers, where others may need many more."""
    own = slice(slots if isinstance(layer, FullCache) else None)
    return tuple(mx.contiguous(array[place : place + 1, :, own]) for array in layer.arrays)


def put_row(array: mx.array, row: mx.array, place: int) -> mx.array:
    """array [B, …] with row [1, …] in its place."""
    return mx.slice_update(array, row.astype(array.dtype), mx.array([place]), axes=(0,))


def chosen_rows(array: mx.array, rows: mx.array, size: int) -> mx.array:
    """These rows of array [B, …], and zeros up to `size`."""
    found = array[rows]
    return mx.pad(found, [(0, size - len(rows))] + [(0, 0)] * (array.ndim - 1))


def tokens_of(array: mx.array) -> list[int]:
    """The one place where the host waits for the device."""
    return cast(list[int], np.asarray(array).ravel().tolist())
