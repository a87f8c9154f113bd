"""Keys and values that the layers keep, and at which positions they are.

One class for each kind of layer, for reading a prompt and for rounds alike. While a prompt is read, the host knows
where a pass begins: `offset` is an int, and a pass attends to what there is. In a round only the device knows: `offset`
is an array [B], everything has a fixed shape, so that a round is traced once, and what counts is told by position
alone. So rejected entries are forgotten by not counting them.
"""

from collections.abc import Iterable, Sequence
from math import gcd, prod
from typing import NamedTuple, cast

import mlx.core as mx

from mlx_gemma4.config import SLIDING, WHOLE, AttentionConfig, TextConfig

Offset = int | mx.array  # the position of a pass's first entry
Arrays = tuple[mx.array, ...]  # each [B, heads, S, …]


class Packed(NamedTuple):
    """Quantized entries, as `mx.quantize` makes them."""

    weight: mx.array
    scales: mx.array
    biases: mx.array
    group_size: int
    bits: int


Entry = mx.array | Packed  # [B, heads, S, dims]

# Positions that a round may write, the newest token's and its drafts': what a ring has beyond its window, so that
# rejected ones do not hide committed ones.
ROUND = 8
# Values and no operation: a trace would make it anew for each layer, and all that comes of it, two kernels a layer; to
# evaluate one here would begin a thread of MLX's, and no fork of this process could load a model.
FIRST = mx.array([*range(ROUND)])
# Slots of full layers come in steps of an eighth, at least this many, so that replies share few traces. Empty ones are
# read too: 512 are 0.13 % of what a round of the 12B at 4 bits reads.
STEP = 512
AHEAD = 4096  # of a reply, what is reserved at first


def slots_of(entry: Entry) -> int:
    return (entry.weight if isinstance(entry, Packed) else entry).shape[2]


def place(arrays: Arrays, entries: Arrays, slots: mx.array) -> Arrays:
    """Write entries [B, heads, L, dims] into `slots` [B or 1, L]."""
    where = slots[:, None, :, None]
    return tuple(mx.put_along_axis(array, where, rows, axis=2) for array, rows in zip(arrays, entries, strict=True))


def along(parts: Iterable[Arrays]) -> Arrays:
    """Entries of positions that follow each other, as one."""
    return tuple(mx.concatenate([*each], axis=2) for each in zip(*parts, strict=True))


def steps(offset: mx.array, length: int) -> mx.array:
    """The positions of a round's pass, [B, L]."""
    return offset[:, None] + FIRST[:length]


class FullCache:
    """All entries, in the order of their positions, in `slots` slots.

    A full layer's value is the normed output of k_proj, and its key the same, of which `rotated_dims` are weighted and
    turned. So it keeps two entries: keys, and of values what their keys have turned (`attention.py`). With `bits` each
    is quantized as it comes, and read as it is kept.
    """

    def __init__(self, arrays: Arrays, bits: int | None = None):
        self.arrays, self.bits = arrays, bits

    @property
    def slots(self) -> int:
        return self.arrays[0].shape[2]

    @property
    def entries(self) -> tuple[Entry, ...]:
        """All slots."""
        return self.seen(self.arrays)

    def seen(self, arrays: Arrays) -> tuple[Entry, ...]:
        if self.bits is None:
            return arrays
        return tuple(
            Packed(weight, scales, biases, weight.shape[-1] * 32 // self.bits // scales.shape[-1], self.bits)
            for weight, scales, biases in zip(*[iter(arrays)] * 3, strict=True)
        )

    def positions(self, offset: Offset, length: int) -> mx.array:
        """Where the entries are that a pass of `length` at `offset` attends to, [B or 1, S]."""
        return mx.arange(offset + length if isinstance(offset, int) else self.slots)[None]

    def update(self, entries: Arrays, offset: Offset) -> tuple[Entry, ...]:
        """Take the entries of a pass, each [B, heads, L, dims]; give all that it attends to."""
        length = entries[0].shape[2]
        if self.bits is not None:
            group = group_size([rows.shape[-1] for rows in entries])
            entries = tuple(part for rows in entries for part in mx.quantize(rows, group, self.bits))
        if not isinstance(offset, int):
            self.arrays = place(self.arrays, entries, steps(offset, length))
            return self.entries
        self.arrays = tuple(
            mx.slice_update(array, rows, mx.array(offset), axes=(2,))
            for array, rows in zip(self.arrays, entries, strict=True)
        )
        return self.seen(tuple(array[:, :, : offset + length] for array in self.arrays))

    def grow(self, slots: int) -> None:
        if slots > self.slots:
            more = [(0, 0), (0, 0), (0, slots - self.slots), (0, 0)]
            self.arrays = tuple(mx.pad(array, more) for array in self.arrays)


class SlidingCache:
    """The last keys and values, in a ring: position p lies in slot p mod slots. Used as a `FullCache` is."""

    def __init__(self, arrays: Arrays):
        self.arrays = arrays

    @property
    def entries(self) -> tuple[Entry, ...]:
        return self.arrays

    @property
    def slots(self) -> int:
        return self.arrays[0].shape[2]

    def positions(self, offset: Offset, length: int) -> mx.array:
        if isinstance(offset, int):
            chunk = mx.arange(offset, offset + length)
            return (mx.concatenate([self.ring(mx.array(offset - 1)), chunk]) if offset else chunk)[None]
        return self.ring(offset[:, None] + length - 1)

    def ring(self, newest: mx.array) -> mx.array:
        """The positions of all slots, if the newest written is `newest`; negative: never written."""
        return newest - (newest - mx.arange(self.slots)) % self.slots

    def update(self, entries: Arrays, offset: Offset) -> tuple[Entry, ...]:
        length = entries[0].shape[2]
        if not isinstance(offset, int):
            self.arrays = place(self.arrays, entries, steps(offset, length) % self.slots)
            return self.arrays
        seen, before = entries, self.arrays
        if offset:  # joined before they are written to, or writing would copy them
            seen = along([before, entries])
            before = tuple(cast(list[mx.array], mx.depends(list(before), list(seen))))
        kept = min(length, self.slots)
        slots = (mx.arange(offset + length - kept, offset + length) % self.slots)[None]
        self.arrays = place(before, tuple(rows[:, :, length - kept :] for rows in entries), slots)
        # written before they are attended to: the chunk's own entries would live until its last layer
        return tuple(cast(list[mx.array], mx.depends(list(seen), list(self.arrays))))


LayerCache = FullCache | SlidingCache  # what one attention layer keeps


def group_size(dims: Iterable[int]) -> int:
    """Of quantized entries: numbers that share a scale. ValueError if MLX has no such groups."""
    shared = gcd(*dims)
    if shared % 32:
        raise ValueError(
            f"the full layers keep entries of {shared} numbers; expected a multiple of 32 to quantize them"
        )
    return 64 if shared % 64 == 0 else 32


def array_shapes(own: AttentionConfig, dtype: mx.Dtype) -> list[tuple[tuple[int, int], mx.Dtype]]:
    """(heads, numbers of a position) and type of the arrays that a layer keeps its entries in."""
    heads, bits = own.num_key_value_heads, own.kv_bits
    entries = [own.head_dim, own.rotated_dims if own.window is None else own.head_dim]  # numbers of each
    if bits is None:
        return [((heads, dims), dtype) for dims in entries]
    group = group_size(entries)
    return [
        array
        for dims in entries
        for array in [((heads, dims * bits // 32), mx.uint32)] + [((heads, dims // group), dtype)] * 2
    ]


def sliding_slots(window: int) -> int:
    return window + ROUND


def capacity(positions: int, context: int | None = None) -> int:
    """Slots of a full layer that is to hold so many positions: one of few sizes.

    context: the model's, beyond which there are only the rows of its last rounds; so no eighth of it is added to those.
    """
    step = max(STEP, 2 ** (positions.bit_length() - 4))
    slots = -(-positions // step) * step
    return slots if context is None else min(slots, -(-max(positions, context + 2 * ROUND) // STEP) * STEP)


def entry_bytes(text: TextConfig, kind: str, item_bytes: int) -> int:
    """What one position takes in all layers of a kind, with numbers of so many bytes where they are not packed."""
    arrays = array_shapes(text.attention[kind], mx.bfloat16)
    sizes = [prod(shape) * (item_bytes if own == mx.bfloat16 else own.size) for shape, own in arrays]
    return text.layer_types.count(kind) * sum(sizes)


def empty_cache(own: AttentionConfig, dtype: mx.Dtype, slots: int) -> LayerCache:
    """Of one layer, for one request."""
    shapes = array_shapes(own, dtype)
    return cache_of(own, tuple(mx.zeros((1, heads, slots, dims), type_) for (heads, dims), type_ in shapes))


def cache_of(own: AttentionConfig, arrays: Arrays) -> LayerCache:
    return FullCache(arrays, own.kv_bits) if own.window is None else SlidingCache(arrays)


class Caches:
    """What all layers keep of one request, or of B that go together."""

    def __init__(self, layers: list[LayerCache], kinds: Sequence[str], context: int | None = None):
        self.layers = layers
        self.kinds = tuple(kinds)
        self.length = 0  # positions read; in rounds the device knows more
        self.context = context  # as `capacity` takes it

    @classmethod
    def empty(cls, text: TextConfig, dtype: mx.Dtype, slots: int) -> "Caches":
        """For one request, with so many slots in full layers."""
        attention = [text.attention[kind] for kind in text.layer_types]
        counts = [slots if own.window is None else sliding_slots(own.window) for own in attention]
        layers = [empty_cache(own, dtype, count) for own, count in zip(attention, counts, strict=True)]
        return cls(layers, text.layer_types, text.max_position_embeddings)

    @property
    def last(self) -> dict[str, LayerCache]:
        """The last layer of each kind, which a drafter reads."""
        found = dict(zip(self.kinds, self.layers, strict=True))
        return found | {SLIDING: found.pop(WHOLE)} if WHOLE in found else found

    @property
    def arrays(self) -> list[Arrays]:
        return [layer.arrays for layer in self.layers]

    @property
    def slots(self) -> int:
        """Of full layers: what a round is compiled for; 0 if there are none."""
        return next((layer.slots for layer in self.layers if isinstance(layer, FullCache)), 0)

    @property
    def window(self) -> int:
        """Of sliding layers; 0 if there are none."""
        return next((layer.slots - ROUND for layer in self.layers if isinstance(layer, SlidingCache)), 0)

    @property
    def full_bytes(self) -> int:
        """Of full layers' entries."""
        return sum(array.nbytes for layer in self.layers if isinstance(layer, FullCache) for array in layer.arrays)

    def reserve(self, positions: int) -> None:
        """Make room for so many in full layers."""
        if positions > self.slots:
            for layer in self.layers:
                if isinstance(layer, FullCache):
                    layer.grow(capacity(positions, self.context))

    def clear(self) -> None:
        """Hold nothing: others go on with the arrays, or nobody."""
        self.take([()] * len(self.layers))

    def take(self, arrays: list[Arrays]) -> None:
        """Go on with what a round has made of the arrays."""
        for layer, own in zip(self.layers, arrays, strict=True):
            layer.arrays = own


def caches_of(arrays: list[Arrays], text: TextConfig) -> Caches:
    """Caches over arrays, of a trace too."""
    layers = [cache_of(text.attention[kind], own) for kind, own in zip(text.layer_types, arrays, strict=True)]
    return Caches(layers, text.layer_types, text.max_position_embeddings)
