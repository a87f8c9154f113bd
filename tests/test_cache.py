"""The caches: what a query may see is there and where `start` says, whatever was rejected in between."""

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
from mlx_gemma4.cache import (
    GROWTH,
    SLACK,
    Cache,
    FullStore,
    PromptCache,
    SlidingStore,
    Slots,
    append_empty,
    capacity_for,
    move_to_front,
)
from mlx_gemma4.config import SLIDING, GenerationConfig, TextConfig, parse_config
from mlx_gemma4.model import Model
from mlx_gemma4.processor import Processor

Loaded = tuple[Model, Processor]

TEXT: TextConfig = parse_config(config(TINY), GenerationConfig(eos_token_ids=())).text
SHAPES = {"planted": TINY, "planted_other": OTHER}
REJECTED = 1e6  # added to what is written and then not counted


def rows(values: list[float]) -> mx.array:
    """Keys whose every number is their value, [1, 1, L, 2]."""
    return mx.broadcast_to(mx.array(values, mx.float32)[None, None, :, None], (1, 1, len(values), 2))


def values_of(keys: mx.array) -> list[float]:
    return np.array(keys)[0, 0, :, 0].tolist()


# --- while a prompt is read --------------------------------------------------------------------


@settings(max_examples=100, deadline=None)
@given(sizes=st.lists(st.integers(1, 12), min_size=1, max_size=8), window=st.integers(1, 10))
def test_a_sliding_store_gives_what_came_before_and_keeps_a_window(sizes: list[int], window: int) -> None:
    store, length = SlidingStore(window), 0
    for size in sizes:
        new = [float(n) for n in range(length, length + size)]
        keys, values = store.update(rows(new), rows([-n for n in new]))
        given = [float(n) for n in range(max(0, length - window), length + size)]
        assert values_of(keys) == given
        assert values_of(values) == [-n for n in given]
        length += size
        assert values_of(store.rows()[0]) == given[-window:]
        assert store.keys.shape[2] == store.values.shape[2] == min(window, length)


def test_a_sliding_store_lets_go_of_what_it_was_cut_from() -> None:
    store = SlidingStore(16)
    for _ in range(3):
        big = mx.random.normal((1, 4, 20_000, 64))  # 20 MB
        mx.eval(store.update(big, big + 1))
        mx.eval(store.rows())
    del big
    mx.clear_cache()
    before = mx.get_active_memory()
    held = store.rows()
    bytes_held = sum(array.nbytes for array in held)
    store.keys = store.values = None
    del held
    assert before - mx.get_active_memory() < 4 * bytes_held


@settings(max_examples=50, deadline=None)
@given(sizes=st.lists(st.integers(1, 12), min_size=1, max_size=8), spare=st.integers(0, 9))
def test_a_full_store_keeps_everything_in_buffers_of_its_capacity(sizes: list[int], spare: int) -> None:
    store = FullStore(sum(sizes) + spare)
    for i in range(len(sizes)):
        length = sum(sizes[: i + 1])
        new = [float(n) for n in range(length - sizes[i], length)]
        keys, values = store.update(rows(new), rows([-n for n in new]))
        assert values_of(keys) == [float(n) for n in range(length)]
        assert values_of(values) == [-float(n) for n in range(length)]
        assert store.length == length
        assert store.keys.shape[2] == sum(sizes) + spare


@given(length=st.integers(1, 300_000), more=st.integers(1, 300_000))
def test_the_first_capacity_holds_the_prompt_and_wastes_little(length: int, more: int) -> None:
    slots = capacity_for(length, more)
    assert slots >= length + min(more, GROWTH)
    assert slots <= length + max(GROWTH, length // 8) + GROWTH


# --- while tokens are generated ------------------------------------------------------------------


def read_prompt(length: int, capacity: int) -> PromptCache:
    """As if a prompt had been read whose keys are its positions."""
    cache = PromptCache(TEXT, capacity)
    for store in cache.stores:
        for start in range(0, length, 40):
            places = [float(n) for n in range(start, min(start + 40, length))]
            store.update(rows(places), rows([-n for n in places]))
    cache.length = length
    return cache


def write(cache: Cache, offset: int, values: list[float]) -> None:
    """What a round does: rows for the positions from `offset` on, in every layer."""
    for i, (keys, held) in enumerate(cache.layers):
        slot = offset - cache.start if cache.is_sliding[i] else offset
        assert 0 <= slot <= keys.shape[2] - len(values)  # MLX writes anywhere
        slots = Slots(keys, held, mx.array(slot))
        cache.layers[i] = slots.update(rows(values), rows([-value for value in values]))


def check_visible(cache: Cache, length: int) -> None:
    """All keys that a query at length - 1 (a drafter's) or later may see lie where they should."""
    window = TEXT.attention[SLIDING].window
    for sliding, (keys, values) in zip(cache.is_sliding, cache.layers, strict=True):
        start = cache.start if sliding else 0
        oldest = max(0, length - window) if sliding else 0
        assert start <= oldest
        expected = [float(n) for n in range(oldest, length)]
        assert values_of(keys[:, :, oldest - start : length - start]) == expected
        assert values_of(values[:, :, oldest - start : length - start]) == [-n for n in expected]


@settings(max_examples=60, deadline=None)
@given(
    prompt=st.integers(1, 50), spare=st.integers(0, 20), most_rows=st.integers(1, 8), data=st.data(),
)  # fmt: skip
def test_what_a_query_may_see_is_always_there(prompt: int, spare: int, most_rows: int, data: st.DataObject) -> None:
    """The host knows only that the rounds so far ended somewhere from `least` to `most`, a round's rows apart."""
    cache = Cache(read_prompt(prompt, prompt + spare), most_rows)
    length = prompt
    check_visible(cache, length)
    counts = data.draw(st.lists(st.tuples(*[st.integers(0, 7)] * 4), min_size=20, max_size=60))
    for drafts, accepted, before, behind in counts:
        written = 1 + drafts % most_rows
        accepted = 1 + accepted % written
        before = min(before % most_rows, length)
        behind = behind % (most_rows - before) if before < most_rows else 0
        cache.reserve(length - before, length + behind)
        check_visible(cache, length)
        kept = [float(length + n) for n in range(accepted)]
        write(cache, length, kept + [REJECTED + length + n for n in range(accepted, written)])
        length += accepted
        check_visible(cache, length)


def test_windows_move_and_layers_grow_seldom() -> None:
    cache, moves, growths = Cache(read_prompt(40, 45), 4), 0, 0
    full = next(i for i, sliding in enumerate(cache.is_sliding) if not sliding)
    sliding_slots = {cache.layers[0][0].shape[2]}
    for length in range(40, 2040, 2):
        start, slots = cache.start, cache.layers[full][0].shape[2]
        cache.reserve(length, length + 3)
        moves += cache.start != start
        growths += cache.layers[full][0].shape[2] != slots
        assert cache.layers[full][0].shape[2] >= length + 3 + 4
        assert cache.layers[full][0].shape[2] <= 1.125 * (length + 7) + GROWTH + 7
        write(cache, length, [float(length), float(length + 1)])
        sliding_slots.add(cache.layers[0][0].shape[2])
    assert len(sliding_slots) == 1  # a fixed shape
    assert sliding_slots.pop() <= TEXT.attention[SLIDING].window + SLACK + 16
    assert moves <= 2000 / SLACK + 1
    assert growths <= 2000 / GROWTH + 1


def test_a_cache_takes_the_buffers_over() -> None:
    """Held twice, they could not be written in place."""
    read = read_prompt(20, 30)
    Cache(read, 4)
    assert all(store.keys is None and store.values is None for store in read.stores)


def test_a_prompt_has_to_be_read_first() -> None:
    with pytest.raises(ValueError, match=r"^the cache is empty; expected a prompt that has been read"):
        Cache(PromptCache(TEXT, 10), 4)


def test_slots_are_moved_and_appended() -> None:
    assert values_of(append_empty(rows([1, 2, 3]), 2)) == [1, 2, 3, 0, 0]
    assert values_of(move_to_front(rows([1, 2, 3, 4]), 3)) == [4, 0, 0, 0]


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
    """Every round's hidden state is that of a fresh reading, far past the window and several of its moves."""
    model, _ = request.getfixturevalue(checkpoint)
    rounds = Rounds(model, make_sampler(model, sampling), made_prompt(runs, SHAPES[checkpoint]))
    lengths = np.random.default_rng(0).integers(0, 8, 90).tolist()
    hidden, rejected = {}, 0
    for length in lengths:
        rejected += length + 1 - len(rounds.run(length))
        hidden[len(rounds.ids) - 2] = np.array(rounds.state["hidden"])[0, 0]
    assert rejected > 60
    assert rounds.cache.start > 2 * rounds.cache.window
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
    position_bytes = 2 * 4 * TINY.global_kv_heads * TINY.global_head_dim  # of the one full layer, in float32
    early = max(bytes_held for count, bytes_held in held if count < 200)
    late = max(bytes_held for count, bytes_held in held if count > 1300)
    # the old and the new buffer are there together when one grows
    assert late - early < 2 * position_bytes * (1500 * 9 // 8 + GROWTH)
