"""The caches: what a query may see is there and where its position says, whatever was rejected in between."""

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import mlx.core as mx
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from rounds import Rounds, hidden_states, made_prompt, make_sampler
from toy_checkpoint import OTHER, TINY, config

from mlx_gemma4 import Prompt, Sampling, stream_generate
from mlx_gemma4.config import FULL, SLIDING, GenerationConfig, TextConfig, parse_config
from mlx_gemma4.model.cache import (
    AHEAD,
    ROUND,
    STEP,
    Arrays,
    Caches,
    FullCache,
    Offset,
    SlidingCache,
    caches_of,
    capacity,
    empty_cache,
    entry_bytes,
    sliding_slots,
)
from mlx_gemma4.model.mask import attention_mask
from mlx_gemma4.model.model import Model
from mlx_gemma4.prompt.processor import Processor

Loaded = tuple[Model, Processor]

TEXT: TextConfig = parse_config(config(TINY), GenerationConfig(eos_token_ids=())).text
SHAPES = {"planted": TINY, "planted_other": OTHER}
REJECTED = 1e6  # added to what is written and then not counted


def entries(values: Sequence[Sequence[float]]) -> Arrays:
    """Two arrays whose every number is their row's value, the second's with a minus, [B, 1, L, 2]."""
    array = mx.array(values, mx.float32)[:, None, :, None]
    return mx.broadcast_to(array, (*array.shape[:3], 2)), mx.broadcast_to(-array, (*array.shape[:3], 2))


def values_of(held: Arrays) -> np.ndarray:
    """[B, S], the same in both arrays."""
    first, second = (np.array(array)[:, 0, :, 0] for array in held)
    assert np.array_equal(first, -second)
    return first


def sliding_cache(slots: int, batch: int = 1) -> SlidingCache:
    return SlidingCache((mx.zeros((batch, 1, slots, 2)), mx.zeros((batch, 1, slots, 2))))


def full_cache(slots: int, batch: int = 1) -> FullCache:
    return FullCache((mx.zeros((batch, 1, slots, 2)), mx.zeros((batch, 1, slots, 2))))


def check_seen(cache: FullCache | SlidingCache, held: Any, offset: Offset, length: int, window: int | None) -> None:
    """Each query of a pass sees each position up to its own within the window once, and nothing else."""
    positions = cache.positions(offset, length)
    values = values_of(held)
    ends = [offset] * len(values) if isinstance(offset, int) else offset.tolist()
    queries = mx.array(ends)[:, None] + mx.arange(length)
    mask = np.array(attention_mask(queries, positions, window))
    for row, end in enumerate(ends):
        for place in range(length):
            query = end + place
            oldest = 0 if window is None else max(0, query - window + 1)
            seen = values[row, mask[min(row, len(mask) - 1), place]]
            assert sorted(seen.tolist()) == list(range(oldest, query + 1))


# --- while a prompt is read --------------------------------------------------------------------


@settings(max_examples=100, deadline=None)
@given(
    sizes=st.lists(st.integers(1, 30), min_size=1, max_size=8), window=st.integers(1, 10), spare=st.integers(0, 9),
)  # fmt: skip
def test_a_sliding_cache_gives_what_the_chunk_may_see_and_keeps_what_comes_last(
    sizes: list[int], window: int, spare: int
) -> None:
    cache, length = sliding_cache(max(1, window - 1) + spare), 0
    for size in sizes:
        assert cache.positions(length, size).shape[1] == (cache.slots if length else 0) + size
        held = cache.update(entries([[*range(length, length + size)]]), length)
        check_seen(cache, held, length, size, window)
        length += size
        kept, where = values_of(cache.arrays)[0], cache.ring(mx.array(length - 1))
        assert sorted(np.array(where)[np.array(where) >= 0].tolist()) == [*range(max(0, length - cache.slots), length)]
        assert all(value == place for value, place in zip(kept.tolist(), where.tolist(), strict=True) if place >= 0)
        assert cache.slots == max(1, window - 1) + spare


@settings(max_examples=50, deadline=None)
@given(sizes=st.lists(st.integers(1, 12), min_size=1, max_size=8), spare=st.integers(0, 9))
def test_a_full_cache_keeps_everything_in_arrays_of_its_capacity(sizes: list[int], spare: int) -> None:
    cache, length = full_cache(sum(sizes) + spare), 0
    for size in sizes:
        assert cache.positions(length, size).tolist() == [[*range(length + size)]]
        held = cache.update(entries([[*range(length, length + size)]]), length)
        assert values_of(held).tolist() == [[*range(length + size)]]
        length += size
        assert cache.slots == sum(sizes) + spare


@pytest.mark.parametrize("kind", [FULL, SLIDING])
def test_nothing_is_kept_of_a_chunk_beyond_the_caches(kind: str) -> None:
    cache: FullCache | SlidingCache
    arrays = tuple(mx.zeros((1, 4, 16 if kind == SLIDING else 3000, 64)) for _ in range(2))
    mx.eval(arrays)
    cache = SlidingCache(arrays) if kind == SLIDING else FullCache(arrays)
    del arrays
    mx.clear_cache()
    before = mx.get_active_memory()
    for n in range(3):
        big = mx.random.normal((1, 4, 1000, 64))  # 1 MB
        held = cache.update((big, big + 1), 1000 * n)
        mx.eval(held, cache.arrays)
        del held, big
    assert mx.get_active_memory() - before < 4096


def test_a_chunk_of_a_prompt_is_written_in_place() -> None:
    """Nor is an array of a full layer there twice while a prompt is read."""
    cache = full_cache(500_000)  # 4 MB each
    mx.eval(cache.arrays)
    for n in range(3):
        mx.reset_peak_memory()
        before = mx.get_active_memory()
        made = entries([[*range(n, n + 5)]])
        cache.update(made, 5 * n)
        del made
        mx.eval(cache.arrays)
        assert mx.get_peak_memory() - before < 2**20


@given(positions=st.integers(1, 300_000))
def test_a_capacity_holds_what_it_is_asked_for_and_wastes_little(positions: int) -> None:
    slots = capacity(positions)
    assert positions <= slots < positions + max(STEP, positions / 8 + 1)
    assert capacity(slots) == slots


def test_capacities_are_few() -> None:
    """Each is a trace of its own: 24 up to 16,384 positions, then eight each time that they double."""
    assert len({capacity(positions) for positions in range(1, 16_385)}) == 24
    assert len({capacity(positions) for positions in range(16_385, 262_145)}) == 32


@given(context=st.integers(1, 300_000), positions=st.integers(1, 300_000))
def test_a_whole_context_has_room_for_its_last_round_and_no_eighth_beyond(context: int, positions: int) -> None:
    slots = capacity(positions, context)
    assert positions <= slots <= capacity(positions)
    assert slots < max(positions, context + 2 * ROUND) + STEP
    assert capacity(slots, context) == slots


def test_the_published_context_takes_a_step_more_than_itself() -> None:
    text = replace(TEXT, max_position_embeddings=262_144, layer_types=(FULL,))
    caches = Caches.empty(text, mx.bfloat16, STEP)
    caches.reserve(262_144 + ROUND)
    assert caches.slots == capacity(262_144, 262_144) + STEP == 262_144 + STEP
    assert capacity(262_144 + ROUND) == 294_912


def test_a_reply_of_4096_tokens_has_one_capacity_from_the_start() -> None:
    for length in (5, 1000, 50_000):
        caches = Caches.empty(TEXT, mx.float32, capacity(length + AHEAD + ROUND))
        slots = caches.slots
        for count in range(0, AHEAD, 8):
            caches.reserve(length + count + ROUND)
        assert caches.slots == slots


def test_layers_that_grow_keep_what_they_hold() -> None:
    caches = Caches.empty(TEXT, mx.float32, capacity(40))
    full = next(layer for layer in caches.layers if isinstance(layer, FullCache))
    full.arrays = tuple(mx.random.normal(array.shape) for array in full.arrays)
    before, ring = full.arrays, sliding_slots(TEXT.attention[SLIDING].window or 0)
    for positions, slots in ((STEP, STEP), (STEP + 1, 2 * STEP), (9, 2 * STEP), (20_000, 20_480)):
        caches.reserve(positions)
        assert caches.slots == full.slots == slots
    for old, new in zip(before, full.arrays, strict=True):
        assert mx.array_equal(old, new[:, :, :STEP]) and not new[:, :, STEP:].any()
    assert {layer.slots for layer in caches.layers if isinstance(layer, SlidingCache)} == {ring}


@pytest.mark.parametrize("dtype", [mx.float32, mx.bfloat16], ids=str)
def test_an_entry_takes_what_is_said(dtype: mx.Dtype) -> None:
    caches = Caches.empty(TEXT, dtype, 2048)
    window = TEXT.attention[SLIDING].window
    assert window is not None
    for kind, slots in ((FULL, 2048), (SLIDING, window + ROUND)):
        own = [layer.arrays for layer, name in zip(caches.layers, caches.kinds, strict=True) if name == kind]
        held = sum(array.nbytes for arrays in own for array in arrays)
        assert held == slots * entry_bytes(TEXT, kind, dtype.size)
    # of a full layer: head_dim and what turns of a key
    assert entry_bytes(TEXT, FULL, 1) == TINY.global_kv_heads * (32 + 8) * TEXT.layer_types.count(FULL)


# --- while tokens are generated ------------------------------------------------------------------


def is_consistent(window: int, slots: int, most_rows: int, accepted: Sequence[Sequence[tuple[int, int]]]) -> bool:
    """Whether all queries see what they may in rounds of B rows at offsets of their own; of each round, for each row,
    how many rows it writes (at least) and how many of them are kept."""
    batch, caches = len(accepted[0]), (sliding_cache(slots, len(accepted[0])), full_cache(2000, len(accepted[0])))
    lengths = [3 + 5 * row for row in range(batch)]
    for cache in caches:  # as if prompts of these lengths had been read, each alone
        parts = []
        for length in lengths:
            one = sliding_cache(slots) if isinstance(cache, SlidingCache) else full_cache(2000)
            one.update(entries([[*range(length)]]), 0)
            parts.append(one.arrays)
        cache.arrays = tuple(mx.concatenate(list(arrays)) for arrays in zip(*parts, strict=True))
    windows: list[int | None] = [window, None]
    try:
        for round_ in accepted:
            written = 1 + max(rows for rows, _ in round_) % most_rows
            kept = [1 + own % written for _, own in round_]
            for cache, own in zip(caches, windows, strict=True):
                last = mx.array(lengths) - 1  # a drafter's queries
                check_seen(cache, cache.arrays, last, 1, own)
                values = [[length + n for n in range(written)] for length in lengths]
                held = cache.update(entries(values), mx.array(lengths))
                check_seen(cache, held, mx.array(lengths), written, own)
                rejected = [[*row[:n], *[REJECTED + x for x in row[n:]]] for row, n in zip(values, kept, strict=True)]
                cache.update(entries(rejected), mx.array(lengths))
            lengths = [length + n for length, n in zip(lengths, kept, strict=True)]
    except AssertionError:
        return False
    return True


rounds = st.integers(1, 3).flatmap(
    lambda batch: st.lists(
        st.lists(st.tuples(st.integers(0, 7), st.integers(0, 7)), min_size=batch, max_size=batch),
        min_size=10,
        max_size=25,
    )
)


@settings(max_examples=40, deadline=None)
@given(window=st.integers(1, 20), most_rows=st.integers(1, 8), accepted=rounds)
def test_what_a_query_may_see_is_always_there(
    window: int, most_rows: int, accepted: list[list[tuple[int, int]]]
) -> None:
    """And nothing else, neither rejected rows nor those that a ring has lost: drafters' queries from one back too."""
    assert is_consistent(window, window + most_rows - 1, most_rows, accepted)
    assert is_consistent(window, sliding_slots(window), most_rows, accepted)


@pytest.mark.parametrize("window", [1, 2, 7, 16])
@pytest.mark.parametrize("most_rows", [2, 3, 8])
def test_a_ring_of_one_slot_fewer_would_lose_what_is_seen(window: int, most_rows: int) -> None:
    """All rejected: what the first of them is written over is then seen by the drafter."""
    all_rejected = [[(most_rows - 1, 0)]] * 30
    assert is_consistent(window, window + most_rows - 1, most_rows, all_rejected)
    assert not is_consistent(window, window + most_rows - 2, most_rows, all_rejected)


def test_a_ring_has_room_for_the_longest_round() -> None:
    assert sliding_slots(1024) >= 1024 + ROUND - 1


@settings(max_examples=30, deadline=None)
@given(window=st.integers(1, 12), size=st.integers(1, 30), kept=st.lists(st.integers(1, 8), min_size=1, max_size=9))
def test_what_is_read_after_rounds_sees_nothing_of_what_they_rejected(window: int, size: int, kept: list[int]) -> None:
    """Of a next turn."""
    for cache, own in ((sliding_cache(sliding_slots(window)), window), (full_cache(200), None)):
        cache.update(entries([[*range(11)]]), 0)
        length = 11
        for count in kept:
            values = [float(length + n) + (REJECTED if n >= count else 0) for n in range(ROUND)]
            cache.update(entries([values]), mx.array([length]))
            length += count
        held = cache.update(entries([[*range(length, length + size)]]), length)
        check_seen(cache, held, length, size, own)


@pytest.mark.parametrize("kind", [FULL, SLIDING])
def test_a_round_writes_in_place(kind: str) -> None:
    arrays = mx.zeros((2, 1, 250_000, 2)), mx.zeros((2, 1, 250_000, 2))  # 4 MB each
    mx.eval(arrays)

    @mx.compile
    def write(held: list[Arrays], offset: mx.array) -> list[Arrays]:
        caches = caches_of(held, replace(TEXT, layer_types=(kind,)))
        caches.layers[0].update(entries([[1, 2, 3]] * 2), offset)
        return caches.arrays

    held: list[Arrays] = [arrays]
    del arrays
    for n in range(4):
        mx.reset_peak_memory()
        before = mx.get_active_memory()
        held = write(held, mx.array([n, 5 * n]))
        mx.eval(held)
        assert mx.get_peak_memory() - before < 2**20


def test_a_layer_alone_is_kept_as_in_all() -> None:
    for kind, shapes in ((FULL, [(1, 2, 9, 32), (1, 2, 9, 8)]), (SLIDING, [(1, 2, 9, 16)] * 2)):
        own = replace(TEXT.attention[kind], num_key_value_heads=2)
        assert [array.shape for array in empty_cache(own, mx.bfloat16, 9).arrays] == shapes


# --- with a model ------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "sampling",
    [Sampling(temperature=0, repetition_penalty=1.2), Sampling(temperature=1.0, top_k=0, top_p=1.0)],
    ids=["greedy", "sampled"],
)
@pytest.mark.parametrize(
    ("checkpoint", "runs"),
    [("planted", [("text", 5)]), ("planted", [("text", 37)]), ("planted_other", [("text", 9), ("image", 6, 5)])],
    ids=str,
)
def test_rejected_rows_leave_no_trace(
    request: pytest.FixtureRequest, checkpoint: str, runs: list[Any], sampling: Sampling
) -> None:
    """Every round's hidden state is that of a fresh reading, far past the window and several turns of its ring."""
    model, _ = request.getfixturevalue(checkpoint)
    rounds = Rounds(model, make_sampler(model, sampling), made_prompt(runs, SHAPES[checkpoint]))
    lengths = np.random.default_rng(0).integers(0, 8, 90).tolist()
    hidden, rejected = {}, 0
    for length in lengths:
        rejected += length + 1 - len(rounds.run(length))
        hidden[len(rounds.ids) - 2] = np.array(rounds.state["hidden"])[0, 0]
    assert rejected > 60
    assert len(rounds.ids) > 3 * sliding_slots(SHAPES[checkpoint].window)
    expected = hidden_states(model, Prompt(rounds.ids[:-1], rounds.prompt.media))
    scale = np.abs(expected).max()
    for position, found in hidden.items():
        assert np.abs(found - expected[position]).max() < 1e-5 * scale, position


def test_memory_does_not_grow_beyond_the_caches_own(planted: Loaded, monkeypatch: pytest.MonkeyPatch) -> None:
    model, processor = planted
    stopless = {106, 1, 50}
    assert set(model.config.generation.eos_token_ids) == stopless
    sampling = Sampling(temperature=1.0, top_k=0, top_p=1.0, seed=0)
    suppressed = (*model.config.generation.suppress_tokens, *stopless, 48, 100)  # no call, no thought
    generation = replace(model.config.generation, suppress_tokens=suppressed)
    monkeypatch.setattr(model, "config", replace(model.config, generation=generation))
    held: list[tuple[int, int]] = []
    tokens = 0
    for piece in stream_generate(
        model, processor, Prompt([2, 150]), max_tokens=1500, sampling=sampling, draft_length=3
    ):  # fmt: skip
        tokens += len(piece.token_ids)
        held.append((tokens, mx.get_active_memory()))
    assert tokens == 1500
    early = max(bytes_held for count, bytes_held in held if count < 200)
    late = max(bytes_held for count, bytes_held in held if count > 1300)
    # all is reserved from the start; the host's part of a reply is small
    assert late - early < 2**16
