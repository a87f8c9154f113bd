"""What has been read of prompts, kept so that it is not read again.

A line is what was read along one conversation: the full layers' entries, which can be cut anywhere, and pages of the
sliding layers', of which a request needs the last window before the place where it goes on. A request takes a line out,
goes on with its arrays, and gives it back longer; it copies only if the line holds something else behind that place.
"""

import hashlib
import itertools
import os
import time
import weakref
from collections.abc import Iterable
from dataclasses import dataclass, replace
from pathlib import Path
from threading import RLock

import mlx.core as mx
import numpy as np

from mlx_gemma4.config import expanded
from mlx_gemma4.decoding.disk import FULL, PAGE, SLIDING, Disk, Page, chained, common
from mlx_gemma4.errors import shown
from mlx_gemma4.model.cache import ROUND, Arrays, Caches, FullCache, SlidingCache, along, place
from mlx_gemma4.prompt.prompt import Prompt, SoftTokens, is_whole

VERSION = 1  # of what is kept, and of how keys are made


# --- keys --------------------------------------------------------------------------------------


def units(prompt: Prompt) -> np.ndarray:
    """What each position of a prompt depends on beside those before it, [L, 3] uint64: its id, and of soft tokens 128
    bits of what the embedder sees."""
    found = np.zeros((len(prompt), 3), np.uint64)
    found[:, 0] = prompt.token_ids
    for run in prompt.media:
        found[run.start : run.start + len(run), 1:] = digest(run)
    return found


def digest(run: SoftTokens) -> np.ndarray:
    """[2] uint64, never 0."""
    made = hashlib.blake2b(digest_size=16)
    for array in (run.values, run.positions):
        if array is not None:
            made.update(repr((run.kind, array.shape, array.dtype.str)).encode())
            made.update(np.ascontiguousarray(array).data)
    return np.frombuffer(made.digest(), np.uint64) | np.uint64(1)


def fingerprint(arrays: dict[str, mx.array]) -> bytes:
    """128 bits of a model's parameters, by their values; computed on the device, block by block."""
    made = hashlib.blake2b(digest_size=16)
    for path in sorted(arrays):
        array = arrays[path]
        flat = array.flatten().view(mx.uint8 if array.nbytes % 4 else mx.uint32)
        made.update(repr((path, array.shape, str(array.dtype))).encode())
        for start in range(0, flat.size, BLOCK):
            made.update(np.asarray(mixed(flat[start : start + BLOCK].astype(mx.uint32))).tobytes())
    return made.digest()


BLOCK = 2**22  # numbers that are mixed at once


@mx.compile
def mixed(words: mx.array) -> mx.array:
    """[n] uint32 -> [4] uint32: sums, modulo 2**32, of four hashes of each word with its place (after MurmurHash3)."""
    places = mx.arange(words.size, dtype=mx.uint32)
    sums = []
    for seed in (0x9E3779B1, 0x85EBCA77, 0xC2B2AE3D, 0x27D4EB2F):
        x = words ^ (places * mx.array(seed, mx.uint32))
        for factor, shift in ((0x85EBCA6B, 16), (0xC2B2AE35, 13)):
            x = (x ^ (x >> mx.array(shift, mx.uint32))) * mx.array(factor, mx.uint32)
        sums.append((x ^ (x >> mx.array(16, mx.uint32)) ^ mx.array(seed, mx.uint32)).sum())
    return mx.stack(sums).astype(mx.uint32)


# --- one conversation --------------------------------------------------------------------------


@dataclass(eq=False)
class Line:
    """What was read along one conversation."""

    space: bytes  # what the entries depend on beside the units: weights, types, version, whose it is
    units: np.ndarray  # [n, 3], of the positions that are held
    full: list[Arrays]  # of the full layers, [1, KV, slots, …]
    pages: dict[int, Page]  # of the sliding layers, by their number
    window: int
    marks: tuple[int, ...] = ()  # where the last request says that others may part from it
    used: int = 0  # when, by the store's clock
    uses: int = 0

    def __len__(self) -> int:
        return len(self.units)

    @property
    def spans(self) -> list[tuple[int, int]]:
        """Which positions of the sliding layers are there, (first, last) a page."""
        return [(page.first, page.last) for page in self.pages.values()]

    def needed(self) -> set[int]:
        """The pages behind its marks, or behind the places before them where it can be cut; those that let its end be
        cut anywhere within a window; and those behind earlier places, each at most twice as far from the end as the
        next. Marks alone move with the end, and leave nothing behind them that newer ones could use."""
        cuts, place = self.cuts(), len(self) - self.window
        found = {0, *(int(cuts[cuts <= mark].max(initial=0)) for mark in self.marks)}
        while len(earlier := cuts[cuts < place]):
            near = earlier[earlier >= 2 * place - len(self)]
            place = int(near[0] if len(near) else earlier[-1])
            found.add(place)
        spans = [(cut - self.window, cut) for cut in found] + [(len(self) - 2 * self.window, len(self))]
        return {number for first, last in spans for number in span(first, last)}

    def newest(self) -> set[int]:
        """The pages without which its conversation could not go on: those behind its last mark and its end."""
        cuts = self.cuts()
        ends = [int(cuts[cuts <= place].max(initial=0)) for place in (*self.marks[-1:], len(self))]
        return {number for cut in ends for number in span(cut - self.window, cut)}

    def cuts(self) -> np.ndarray:
        """Where a request can go on, outside of media."""
        found, media = places(self.spans, self.window, len(self)), self.units[:, 1:]
        inside = np.append((media[1:] == media[:-1]).all(axis=1) & media[1:].any(axis=1), False)
        return found[~inside[found - 1]]

    @property
    def nbytes(self) -> int:
        """Of the full layers' entries; pages may be shared."""
        return sum(array.nbytes for own in self.full for array in own)


def places(spans: Iterable[tuple[int, int]], window: int, most: int) -> np.ndarray:
    """Where up to `most` a request can go on: all of a window before it is there."""
    positions = np.arange(most)
    missing = np.ones(most, np.bool_)
    for first, last in spans:
        missing[first:last] = False
    unbroken = positions - np.maximum.accumulate(np.where(missing, positions, -1))
    return np.flatnonzero(unbroken >= np.minimum(positions + 1, window)) + 1


def forks(prompt: Prompt, turn: int | None) -> tuple[int, ...]:
    """Where other prompts may part from this one: after its first turn (the system's and the tools), before the turn
    that it opens, and 1, 2, 4, 8 … thousand tokens before its end. turn: the token that opens one."""
    length = len(prompt)
    turns = [place for place, token in enumerate(prompt.token_ids) if token == turn]
    found = {*turns[1:2], *turns[-1:], *(length - 1024 * 2**n for n in range(20))}
    return tuple(sorted({outside(prompt, mark) for mark in found if 0 < mark <= length}))


def outside(prompt: Prompt, place: int) -> int:
    """A place, or the beginning of the image around it: tokens of an image see each other."""
    for run in prompt.media:
        if run.positions is not None and run.start < place < run.start + len(run):
            return run.start
    return place


@dataclass(eq=False)
class Held:
    """A line in the hands of a request, and the caches that go on from it."""

    store: "PromptStore"
    line: Line
    caches: Caches
    cached: int  # positions that need not be read
    prompt: np.ndarray  # the units of the whole prompt
    parted: tuple[int, int] | None = None  # where it parts from what was read, and the id there


class PromptStore:
    """Prompts that have been read, for requests that begin alike.

    max_bytes: the most that it holds in memory; None: what the models leave. folder: what is used twice, evicted, or
    saved is kept there too, for other processes; disk_bytes: the most that may lie there, None: a tenth of the disk. At
    least a tenth of the disk stays free. ValueError for a bound that is not above 0 or a folder that cannot be used.

    What lies in the folder says what was read, token by token: it is as private as the conversations themselves. Only
    its owner may read it. It may be deleted at any time.
    """

    def __init__(
        self, max_bytes: int | None = None, folder: str | Path | None = None, disk_bytes: int | None = None
    ) -> None:
        for name, value in (("max_bytes", max_bytes), ("disk_bytes", disk_bytes)):
            if value is not None and (not is_whole(value) or value <= 0):
                raise ValueError(f"{name} is {shown(value)}; expected a whole number of bytes above 0, or None")
        if folder is not None and not isinstance(folder, (str, Path)):
            raise ValueError(f"folder is {shown(folder)}; expected a folder's path, or None")
        if folder is None and disk_bytes is not None:
            raise ValueError(f"disk_bytes is {disk_bytes} without a folder; expected a folder too, or no disk_bytes")
        self.max_bytes = max_bytes
        self.room: int | None = None  # what the planner leaves
        self.disk = None if folder is None else Disk(expanded(folder), disk_bytes)
        self.lines: list[Line] = []
        self.held: list[Held] = []
        self.clock = itertools.count(1)
        self.lock = RLock()
        if self.disk is not None:
            weakref.finalize(self, save_at_end, self.lines, self.disk, os.getpid())  # at the end of the process too

    # --- a request's way -----------------------------------------------------------------------

    def take(self, space: bytes, prompt: Prompt, slots: int, turn: int | None, caches: Caches, room: int) -> Held:
        """The line with the longest beginning of a prompt, or a new one, and the caches, which hold nothing yet, to go
        on from there. At least the prompt's last token is left to read. room: as `leave` has it, from when the line is
        the request's."""
        own = units(prompt)
        with self.lock:
            self.room = max(0, room)
            parted = self.parting(space, own)
            line, cut = self.best(space, own, prompt)
            if line is None:
                self.evict(0)  # before others are read from disk
            on_disk = None if self.disk is None else read_line(self.disk, space, own, prompt, caches.window, cut)
            if on_disk is not None:
                line, cut = on_disk, len(on_disk)
            if line is None:
                taken = Line(space, own[:0], [], {}, caches.window, used=next(self.clock))
            else:
                line.uses += 1
                line.used = next(self.clock)
                taken = self.taken(line, cut)
                trim(taken, cut)
                resume(taken, caches, slots)
            taken.marks = forks(prompt, turn)
            held = Held(self, taken, caches, cut, own, parted)
            self.held.append(held)
            self.evict(0)
            return held

    def adopt(self, space: bytes, prompt: Prompt, caches: Caches) -> Held:
        """A request's hold on what it has read without this store."""
        own = units(prompt)
        held = Held(self, Line(space, own[:0], [], {}, caches.window, used=next(self.clock)), caches, 0, own)
        with self.lock:
            self.held.append(held)
        return held

    def keep(self, held: Held, length: int, end: int | None = None) -> None:
        """Put aside what the sliding layers have of the positions up to `length`, before it is overwritten: what a
        request needs that goes on from a mark, or from within a window before `end`; None: the prompt's."""
        line, caches = held.line, held.caches
        sliding = [layer for layer in caches.layers if isinstance(layer, SlidingCache)]
        if not sliding:
            return
        with self.lock:
            if end is None:
                line.units, end = held.prompt[:length], len(held.prompt)
            wanted = {number for mark in (*line.marks, end) for number in span(mark - line.window, mark)}
            wanted |= set(span(end - 2 * line.window, max(end, length)))
            # the caches have sliding entries of a window before where they began, as far as their slots go
            first = max(0, held.cached - line.window, length - sliding[0].slots + ROUND)
            for number in span(first, length):
                before = line.pages.get(number)
                start = max(first, number * PAGE, 0 if before is None else before.last)
                stop = min(length, (number + 1) * PAGE)
                if number not in wanted or start >= stop:
                    continue
                page = joined(before, ring_page(sliding, start, stop))
                if not self.fits(page.nbytes):
                    continue
                line.pages[number] = page
                mx.eval(page.arrays)

    def share(self, held: Held) -> None:
        """Let others find a prompt that a request has read whole and goes on from; the arrays are those of both, so
        that what it writes next is written to a copy."""
        line, caches = held.line, held.caches
        with self.lock:
            full = [layer.arrays for layer in caches.layers if isinstance(layer, FullCache)]
            self.hold(replace(line, units=held.prompt, full=full, pages=dict(line.pages), used=next(self.clock)))
            self.evict(0)

    def give(self, held: Held, ids: list[int]) -> None:
        """Take a line back, with what has been read or written since; ids: those of all its positions."""
        line, caches = held.line, held.caches
        with self.lock:
            known = len(held.prompt)
            rest = np.zeros((max(0, len(ids) - known), 3), np.uint64)
            rest[:, 0] = ids[known:]
            line.units = np.concatenate([held.prompt[: len(ids)], rest])
            self.keep(held, len(ids), len(ids))  # a reading that was broken off has not come to its prompt's end
            self.drop(held)
            line.full = [layer.arrays for layer in caches.layers if isinstance(layer, FullCache)]
            if not len(line) or (not line.full and not line.pages):
                return
            self.hold(line)
            if self.disk is not None and line.uses == 1:  # the second use; later ones would write at every turn
                save_line(line, self.disk)
            self.evict(0)

    def hold(self, line: Line) -> None:
        """Let others find a line, in the place of those that have no more than it."""
        self.lines[:] = [other for other in self.lines if not covers(line, other)]  # the list that `save_at_end` has
        self.lines.append(line)

    def drop(self, held: Held) -> None:
        """Take nothing back: what came of the request is not sure."""
        with self.lock:
            self.held.remove(held)

    # --- finding -------------------------------------------------------------------------------

    def longest(self, space: bytes, own: np.ndarray) -> tuple[int, Line | None]:
        """The line that a prompt goes along with longest, and how far."""
        lines = [(common(line.units, own), line) for line in self.lines if line.space == space]
        return max(lines, key=lambda entry: entry[0], default=(0, None))

    def parting(self, space: bytes, own: np.ndarray) -> tuple[int, int] | None:
        """Where a prompt parts from the line that it goes along with longest, and the line's id there."""
        same, line = self.longest(space, own)
        if line is None or not 0 < same < min(len(line), len(own)):
            return None
        return same, int(line.units[same, 0])

    def best(self, space: bytes, own: np.ndarray, prompt: Prompt) -> tuple[Line | None, int]:
        """The line that has most of a prompt in memory, and how many tokens of it. own: its units."""
        found: Line | None = None
        best = 0
        with self.lock:
            for line in self.lines:
                if line.space == space:
                    most = min(common(line.units, own), len(own) - 1)
                    cut = usable(line.spans, line.window, most, prompt) if most > best else 0
                    if cut > best:
                        found, best = line, cut
        return found, best

    def taken(self, line: Line, cut: int) -> Line:
        """The line itself if the request is the next one of its conversation, or else a copy of its beginning."""
        if line not in self.lines:  # from disk
            return line
        self.lines.remove(line)  # not to be given up for its own copy
        if cut >= max((mark for mark in line.marks if mark < len(line)), default=0):
            return line
        if not self.fits(line.nbytes + line.nbytes * cut // max(1, len(line))):
            if self.disk is not None:
                save_line(line, self.disk)
            return line
        self.lines.append(line)
        full = Page(0, len(line), line.full).upto(cut).arrays
        mx.eval(full)
        return replace(line, full=full, pages=dict(line.pages))

    # --- bounds --------------------------------------------------------------------------------

    @property
    def nbytes(self) -> int:
        """Bytes held in memory; what a request has in its hands counts with its caches, not here."""
        with self.lock:
            lines = [*self.lines, *(held.line for held in self.held)]
            pages = {id(page): page for line in lines for page in line.pages.values()}
            return sum(line.nbytes for line in self.lines) + sum(page.nbytes for page in pages.values())

    @property
    def ceiling(self) -> int | None:
        bounds = [bound for bound in (self.max_bytes, self.room) if bound is not None]
        return min(bounds) if bounds else None

    def fits(self, nbytes: int) -> bool:
        """Whether so many bytes more can be held, what is worth least being given up for them."""
        self.evict(nbytes)
        return self.has_room(nbytes)

    def has_room(self, nbytes: int) -> bool:
        return self.ceiling is None or self.nbytes + nbytes <= self.ceiling

    def leave(self, room: int) -> None:
        """Hold at most so much from now on, which is what others leave."""
        with self.lock:
            self.room = max(0, room)
            self.evict(0)

    def evict(self, nbytes: int) -> None:
        """Give up what is worth least until there is room for so many bytes: pages behind marks that newer ones have
        taken the place of, those that only other prompts could use, then whole lines that no request has in its
        hands."""
        now = next(self.clock)
        if self.has_room(nbytes):
            return
        by_use = sorted([*self.lines, *(held.line for held in self.held)], key=lambda line: line.used)
        for line, kept in [(line, kept) for kept in (Line.needed, Line.newest) for line in by_use]:
            for number in sorted(line.pages.keys() - kept(line)):
                del line.pages[number]
                if self.has_room(nbytes):
                    return
        for line in sorted(self.lines, key=lambda line: len(line) / (now - line.used)):
            if self.disk is not None:
                save_line(line, self.disk)
            self.lines.remove(line)
            if self.has_room(nbytes):
                return

    # --- disk ----------------------------------------------------------------------------------

    def save(self, folder: str | Path | None = None, prompt: "tuple[bytes, Prompt] | None" = None) -> None:
        """Write what is held to the store's own folder, if it has one, or to another; ValueError for one that cannot be
        written to. prompt: a space and a prompt, of which alone what was read is to be written."""
        disk = self.disk
        if folder is not None and (disk is None or expanded(folder) != disk.folder):
            disk = Disk(expanded(folder), None)
        with self.lock:
            if disk is None:
                return
            if prompt is None:
                for line in self.lines:
                    save_line(line, disk)
                return
            same, longest = self.longest(prompt[0], units(prompt[1]))
            if longest is not None:
                save_line(longest, disk, same)


def read_line(disk: Disk, space: bytes, own: np.ndarray, prompt: Prompt, window: int, least: int) -> Line | None:
    """What a folder has of a prompt, if that is more than `least`. own: the prompt's units."""
    unfit, now = set[Path](), time.time()
    while True:
        chain = disk.chain(space, own, unfit)
        most = min(chain[-1].last, len(own) - 1) if chain else 0
        end = usable([entry.sliding_span for entry in chain], window, most, prompt) if most > least else 0
        if end <= least:
            return None
        numbers = span(end - window, end) if window else range(0)
        whole = chain[: span(0, end).stop]
        files = [(entry.full, FULL, entry) for entry in whole]
        files += [(chain[number].sliding, SLIDING, chain[number]) for number in numbers]
        pages: list[Page] = []
        for file, kind, entry in files:
            page = disk.read(file, kind, entry, own, now)
            if page is None:
                unfit.add(file)
            else:
                pages.append(page)
        if len(pages) == len(files):
            full = [along(parts) for parts in zip(*(page.arrays for page in pages[: len(whole)]), strict=True)]
            mx.eval(full)
            return Line(space, own[:end], full, dict(zip(numbers, pages[len(whole) :], strict=True)), window, uses=1)


def save_at_end(lines: list[Line], disk: Disk, process: int) -> None:
    if os.getpid() == process:  # in one that was forked from it MLX cannot compute
        for line in lines:
            save_line(line, disk)


def save_line(line: Line, disk: Disk, most: int | None = None) -> None:
    """Write a line's pages that are not there yet, those of sliding layers where they are needed. most: positions of it
    that are to be written, all if None."""
    before, needed = line.space, line.needed()
    length, now = len(line) if most is None else most, time.time()
    for number in span(0, length):
        own = line.units[number * PAGE : min((number + 1) * PAGE, length)]
        first = number * PAGE
        last = first + len(own)
        arrays = [tuple(array[:, :, first:last] for array in entries) for entries in line.full]
        pages = [(FULL, Page(first, last, arrays))]
        sliding = line.pages.get(number) if number in needed else None
        if sliding is not None and sliding.first < last <= sliding.last:
            pages.append((SLIDING, sliding.upto(last)))
        if not all(disk.write(kind, before, own, page, now) for kind, page in pages):
            return
        before = chained(before, own)


def usable(spans: list[tuple[int, int]], window: int, same: int, prompt: Prompt) -> int:
    """The last place up to `same` where a prompt can go on from these, outside of images."""
    found = places(spans, window, same)
    while len(found) and (place := outside(prompt, int(found[-1]))) < found[-1]:
        found = found[found <= place]
    return int(found[-1]) if len(found) else 0


def covers(line: Line, other: Line) -> bool:
    """Whether a line has all that another has."""
    same = line.space == other.space and len(line) >= len(other)
    return same and common(line.units, other.units) == len(other) and line.pages.keys() >= other.pages.keys()


def trim(line: Line, cut: int) -> None:
    """Forget what lies behind a place."""
    line.units = line.units[:cut]
    line.pages = {number: page.upto(cut) for number, page in line.pages.items() if page.first < cut}
    mx.eval([page.arrays for page in line.pages.values() if page.last == cut])


def resume(line: Line, caches: Caches, slots: int) -> None:
    """Let caches hold the positions of a line, whose full layers they take over."""
    end = len(line)
    first = max(0, end - line.window)
    pages = [line.pages[number] for number in span(first, end)]
    full, sliding = iter(line.full), zip(*(page.arrays for page in pages), strict=True)
    line.full = []
    for cache in caches.layers:
        if isinstance(cache, FullCache):
            cache.arrays = next(full)
            continue
        start = pages[0].first
        kept = tuple(array[:, :, first - start : end - start] for array in along(next(sliding)))
        cache.arrays = place(cache.arrays, kept, (mx.arange(first, end) % cache.slots)[None])
        mx.eval(cache.arrays)
    caches.length = end
    caches.reserve(slots)


def span(first: int, last: int) -> range:
    """The pages of positions first … last."""
    return range(max(0, first) // PAGE, -(-last // PAGE))


def ring_page(sliding: list[SlidingCache], first: int, last: int) -> Page:
    """Positions first … last of rings that hold them."""
    slots = mx.arange(first, last) % sliding[0].slots
    return Page(first, last, [tuple(array[:, :, slots] for array in layer.arrays) for layer in sliding])


def joined(before: Page | None, page: Page) -> Page:
    """A page with what was there of it before, if nothing is missing between."""
    if before is None or before.last != page.first:
        return page
    return Page(before.first, page.last, [along(pair) for pair in zip(before.arrays, page.arrays, strict=True)])
