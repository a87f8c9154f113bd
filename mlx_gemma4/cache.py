"""Keys and values that the layers keep.

While a prompt is read, a layer's store grows by chunks whose positions the host knows (`FullStore`,
`SlidingStore`). While tokens are generated, everything has a fixed shape, so that a round is traced once: a
`Cache` is arrays of slots, and a round writes into them at a position which only the device knows (`Slots`).
Slots are in temporal order and the valid ones are told from the rest by position alone, so that rejected rows
are forgotten by not counting them.
"""

from dataclasses import dataclass
from typing import Any, Protocol

import mlx.core as mx

from mlx_gemma4.config import TextConfig

# Slots beyond the window of a sliding layer: every SLACK tokens the window is moved to the front. At 64, the
# empty slots read and the rows moved are together under a tenth of a window of 1024.
SLACK = 64
# A full layer grows by this much or an eighth of its length: fixed shapes read the empty slots too.
GROWTH = 256


class Store(Protocol):
    """What an attention layer needs of a cache."""

    def update(self, keys: mx.array, values: mx.array) -> tuple[mx.array, mx.array]:
        """Take the rows of this pass, [1, heads, L, head_dim]; give all rows to attend to, [1, heads, S, head_dim]."""
        ...

    def rows(self) -> tuple[mx.array, mx.array]:
        """All rows, for layers that add none."""
        ...


@dataclass
class FullStore:
    """All keys and values so far, in buffers of `capacity` slots."""

    capacity: int
    length: int = 0
    keys: Any = None  # mx.array after the first update
    values: Any = None

    def update(self, keys: mx.array, values: mx.array) -> tuple[mx.array, mx.array]:
        end = self.length + keys.shape[2]
        self.keys = self._write(self.keys, keys)
        self.values = self._write(self.values, values)
        self.length = end
        return self.rows()

    def rows(self) -> tuple[mx.array, mx.array]:
        return self.keys[:, :, : self.length], self.values[:, :, : self.length]

    def _write(self, buffer: Any, rows: mx.array) -> mx.array:
        if buffer is None:
            buffer = mx.zeros((*rows.shape[:2], self.capacity, rows.shape[3]), rows.dtype)
        return mx.slice_update(buffer, rows, mx.array(self.length), axes=(2,))


@dataclass
class SlidingStore:
    """The last `window` keys and values: one more than the next query needs, for a drafter looks from one back."""

    window: int
    keys: Any = None  # mx.array after the first update
    values: Any = None

    def update(self, keys: mx.array, values: mx.array) -> tuple[mx.array, mx.array]:
        if self.keys is not None:
            keys = mx.concatenate([self.keys, keys], axis=2)
            values = mx.concatenate([self.values, values], axis=2)
        # a copy, not a view: a view would keep the whole chunk alive
        self.keys = mx.contiguous(keys[:, :, -self.window :])
        self.values = mx.contiguous(values[:, :, -self.window :])
        # copied before they are attended to: the chunk's own rows would live until its last layer
        keys, values = mx.depends([keys, values], [self.keys, self.values])
        return keys, values

    def rows(self) -> tuple[mx.array, mx.array]:
        return self.keys, self.values


@dataclass
class Slots:
    """One layer's slots in a round; rows go to `slot`, an int32 array, and all slots are attended to."""

    keys: mx.array
    values: mx.array
    slot: mx.array

    def update(self, keys: mx.array, values: mx.array) -> tuple[mx.array, mx.array]:
        self.keys = mx.slice_update(self.keys, keys, self.slot, axes=(2,))
        self.values = mx.slice_update(self.values, values, self.slot, axes=(2,))
        return self.rows()

    def rows(self) -> tuple[mx.array, mx.array]:
        return self.keys, self.values


class PromptCache:
    """The stores of all layers while a prompt is read."""

    def __init__(self, config: TextConfig, capacity: int):
        windows = [config.attention[kind].window for kind in config.layer_types]
        self.length = 0
        self.stores: list[FullStore | SlidingStore] = [
            FullStore(capacity) if window is None else SlidingStore(window) for window in windows
        ]

    def arrays(self) -> list[mx.array]:
        return [array for store in self.stores if store.keys is not None for array in store.rows()]


class Cache:
    """Slots of all layers while tokens are generated.

    `start` is the position of slot 0 in the sliding layers. The number of valid positions is not kept here: it
    lives on the device and is handed from round to round.
    """

    def __init__(self, prompt: PromptCache, rows: int):
        """Take over what was read of a prompt, for rounds of at most `rows` rows."""
        self.rows = rows
        self.start = 0
        self.window = 0
        self.sliding_slots = 0
        self.layers: list[tuple[mx.array, mx.array]] = []
        self.is_sliding = [isinstance(store, SlidingStore) for store in prompt.stores]
        for store in prompt.stores:
            if store.keys is None:
                raise ValueError("the cache is empty; expected a prompt that has been read")
            keys, values = store.keys, store.values
            if isinstance(store, SlidingStore):
                # two rounds' rows: the host runs one round behind the device
                self.window, self.sliding_slots = store.window, store.window + 2 * rows + SLACK
                self.start = prompt.length - keys.shape[2]
                missing = self.sliding_slots - keys.shape[2]
                keys, values = append_empty(keys, missing), append_empty(values, missing)
            self.layers.append((keys, values))
            store.keys = store.values = None  # handed over, so that the slots can be written in place

    @property
    def slots(self) -> tuple[int, ...]:
        """Of each layer: a round is compiled for them."""
        return tuple(keys.shape[2] for keys, _ in self.layers)

    def reserve(self, least: int, most: int) -> None:
        """Make room for one more round, of which the host knows that from `least` to `most` positions come before."""
        end, shift = most + self.rows, 0
        if any(self.is_sliding) and end - self.start > self.sliding_slots:
            shift = max(0, least - self.window) - self.start
            self.start += shift
        for i, (sliding, (keys, values)) in enumerate(zip(self.is_sliding, self.layers, strict=True)):
            slots = keys.shape[2]
            if sliding and shift:
                self.layers[i] = move_to_front(keys, shift), move_to_front(values, shift)
            elif not sliding and end > slots:
                more = max(GROWTH, slots // 8, end - slots)
                self.layers[i] = append_empty(keys, more), append_empty(values, more)


def capacity_for(length: int, more: int) -> int:
    """Slots of a full layer for a prompt of `length` tokens and at first `more` generated ones, if those are few.

    A multiple of GROWTH, so that requests of about one length share their compiled rounds.
    """
    slots = length + min(more, max(GROWTH, length // 8))
    return -(-slots // GROWTH) * GROWTH


def append_empty(rows: mx.array, slots: int) -> mx.array:
    """[1, heads, S, head_dim] -> [1, heads, S + slots, head_dim]."""
    return mx.pad(rows, [(0, 0), (0, 0), (0, slots), (0, 0)])


def move_to_front(rows: mx.array, shift: int) -> mx.array:
    """Drop the first `shift` rows and append as many empty ones."""
    return append_empty(rows[:, :, shift:], shift)
