"""The masks against loops over queries and keys that say what reference and paper say."""

import mlx.core as mx
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from toy_checkpoint import Shape, config

from mlx_gemma4.config import FULL, SLIDING, GenerationConfig, parse_config
from mlx_gemma4.model.cache import ROUND, Caches, empty_cache
from mlx_gemma4.model.mask import attention_mask, causal_mask, whole_mask
from mlx_gemma4.model.model import Model, chunks, image_blocks
from mlx_gemma4.prompt.prompt import Prompt, SoftTokens

# Runs of tokens in a prompt: of text, sound, or one image or frame of a video.
runs = st.lists(
    st.tuples(st.sampled_from(["text", "audio", "image", "video"]), st.integers(1, 12)), min_size=1, max_size=8
)
windows = st.integers(1, 40)


def seen_in_full_layers(query: int, key: int) -> bool:
    """Causal, always."""
    return key <= query


def seen_in_sliding_layers(query: int, key: int, window: int, blocks: list[int | None]) -> bool:
    """(Causal or of the same image block) and within the window, which looks back only."""
    causal = key <= query
    same_block = blocks[query] is not None and blocks[query] == blocks[key]
    return (causal or same_block) and key > query - window


def brute_force(length: int, window: int | None, blocks: list[int | None]) -> np.ndarray:
    """[length, length] of bool."""
    mask = np.zeros((length, length), bool)
    for query in range(length):
        for key in range(length):
            if window is None:
                mask[query, key] = seen_in_full_layers(query, key)
            else:
                mask[query, key] = seen_in_sliding_layers(query, key, window, blocks)
    return mask


def made_prompt(runs: list[tuple[str, int]]) -> tuple[Prompt, list[int | None]]:
    """A prompt of those runs, images between brackets, and the number of the image that each token belongs to."""
    blocks: list[int | None] = []
    media = []
    for number, (kind, n) in enumerate(runs):
        if kind == "text":
            blocks += [None] * n
            continue
        places = None if kind == "audio" else np.zeros((n, 2), np.int32)
        media.append(SoftTokens(kind, len(blocks) + 1, np.zeros((n, 1), np.float32), places))
        blocks += [None, *[None if kind == "audio" else number] * n, None]
    return Prompt([110] * len(blocks), tuple(media)), blocks


def numbers(blocks: list[int | None]) -> mx.array:
    return mx.array([-1 if block is None else block for block in blocks])


@settings(max_examples=150, deadline=None)
@given(runs=runs, window=st.none() | windows)
def test_mask_is_that_of_the_reference(runs: list[tuple[str, int]], window: int | None) -> None:
    _, blocks = made_prompt(runs)
    places = mx.arange(len(blocks))[None]
    if window is None:
        mask = attention_mask(places, places, None)
    else:
        mask = attention_mask(places, places, window, numbers(blocks), numbers(blocks))
    assert mask.dtype == mx.bool_
    assert np.array_equal(np.array(mask), brute_force(len(blocks), window, blocks)[None])


@settings(max_examples=150, deadline=None)
@given(runs=runs, window=st.none() | windows, data=st.data())
def test_mask_of_a_part_is_that_part_of_the_mask(
    runs: list[tuple[str, int]], window: int | None, data: st.DataObject
) -> None:
    _, blocks = made_prompt(runs)
    length = len(blocks)
    first_query, first_key = data.draw(st.integers(0, length - 1)), data.draw(st.integers(0, length - 1))
    last_query, last_key = data.draw(st.integers(first_query, length)), data.draw(st.integers(first_key, length))
    known = (None, None)
    if window is not None:
        known = numbers(blocks[first_query:last_query]), numbers(blocks[first_key:last_key])
    queries, keys = mx.arange(first_query, last_query)[None], mx.arange(first_key, last_key)[None]
    expected = brute_force(length, window, blocks)[first_query:last_query, first_key:last_key]
    assert np.array_equal(np.array(attention_mask(queries, keys, window, *known)), expected[None])


@settings(max_examples=100, deadline=None)
@given(window=st.none() | windows, length=st.integers(1, 12), slots=st.integers(1, 30), data=st.data())
def test_rows_have_positions_of_their_own(window: int | None, length: int, slots: int, data: st.DataObject) -> None:
    """Keys in any order; what was never written is seen by none in a window."""
    batch = data.draw(st.integers(1, 4))
    offsets = data.draw(st.lists(st.integers(0, 50), min_size=batch, max_size=batch))
    low = 0 if window is None else -60  # all slots of full layers count, up to the query
    held = data.draw(st.lists(st.permutations(range(low, 60)), min_size=batch, max_size=batch))
    queries = np.array(offsets)[:, None] + np.arange(length)
    keys = np.array([own[:slots] for own in held])
    mask = np.array(attention_mask(mx.array(queries), mx.array(keys), window))
    assert mask.shape == (batch, length, slots)
    for b, q, k in np.ndindex(mask.shape):
        query, key = queries[b, q], keys[b, k]
        within = window is None or (key > query - window and key >= 0)
        assert mask[b, q, k] == (key <= query and within)


@settings(max_examples=60, deadline=None)
@given(length=st.integers(1, 20), before=st.integers(0, 20), window=windows, data=st.data())
def test_a_mask_of_some_queries_is_their_part_of_the_mask(
    length: int, before: int, window: int, data: st.DataObject
) -> None:
    first = data.draw(st.integers(0, length - 1))
    last = data.draw(st.integers(first + 1, length))
    block = data.draw(st.lists(st.sampled_from([-1, 0]), min_size=length, max_size=length))
    queries, keys = mx.arange(before, before + length)[None], mx.arange(before + length)[None]
    whole = brute_force(before + length, None, [None] * (before + length))[before:]
    assert np.array_equal(np.array(causal_mask(queries, keys)(first, last))[0], whole[first:last])
    blocks = [None] * before + [None if number < 0 else number for number in block]
    whole = brute_force(before + length, window, blocks)[before:]
    assert np.array_equal(
        np.array(whole_mask(queries, keys, window, mx.array(block))(first, last))[0], whole[first:last]
    )


@pytest.mark.parametrize("window", [1, 5, 16])
def test_window_holds_the_query_and_as_many_keys_before_it_as_fill_it(window: int) -> None:
    mask = np.array(attention_mask(mx.arange(40)[None], mx.arange(40)[None], window))[0]
    assert mask.sum(axis=1).tolist() == [min(query + 1, window) for query in range(40)]
    assert mask.diagonal().all()


def test_block_longer_than_the_window_looks_ahead_to_its_end_but_back_no_further_than_the_window() -> None:
    blocks = mx.array([-1] * 3 + [0] * 10 + [-1] * 3)
    mask = np.array(attention_mask(mx.arange(16)[None], mx.arange(16)[None], 4, blocks, blocks))[0]
    assert np.flatnonzero(mask[3]).tolist() == [0, 1, 2, *range(3, 13)]
    assert np.flatnonzero(mask[9]).tolist() == [6, 7, 8, *range(9, 13)]
    assert np.flatnonzero(mask[13]).tolist() == [10, 11, 12, 13]


@settings(max_examples=100, deadline=None)
@given(runs=runs, window=windows, size=st.integers(1, 50))
def test_masks_of_chunks_are_rows_of_the_whole_prompts(runs: list[tuple[str, int]], window: int, size: int) -> None:
    prompt, blocks = made_prompt(runs)
    model = model_of_window(window)
    full, sliding = brute_force(len(prompt), None, blocks), brute_force(len(prompt), window, blocks)
    for start, end in chunks(prompt, 0, size):
        caches = model_caches(model, start)
        masks = model.masks(caches, start, end - start, mx.array(image_blocks(prompt, start, end)))
        for kind, whole in ((FULL, full), (SLIDING, sliding)):
            positions = np.array(caches.last[kind].positions(start, end - start))[0]
            found = np.array(masks[kind](0, end - start))
            assert found.shape == (1, end - start, len(positions))
            scattered = np.zeros((end - start, len(prompt)), bool)
            for slot, position in enumerate(positions.tolist()):
                if position < 0:
                    assert not found[0, :, slot].any()
                else:
                    assert not scattered[:, position].any()
                    scattered[:, position] = found[0, :, slot]
            assert np.array_equal(scattered, whole[start:end])


@settings(max_examples=100, deadline=None)
@given(window=windows, length=st.integers(1, ROUND), offsets=st.lists(st.integers(1, 90), min_size=1, max_size=3))
def test_masks_of_a_round_are_rows_of_the_whole_masks(window: int, length: int, offsets: list[int]) -> None:
    """Of B requests at offsets of their own, no image among what they write."""
    model, reach = model_of_window(window), 90 + ROUND
    masks = model.masks(model_caches(model, reach, len(offsets)), mx.array(offsets), length)
    for kind, own in ((FULL, None), (SLIDING, window)):
        whole, found = brute_force(reach, own, [None] * reach), np.array(masks[kind](0, length))
        for row, offset in enumerate(offsets):
            rows = found[min(row, len(found) - 1)]
            caches = model_caches(model, reach, len(offsets))
            positions = np.array(caches.last[kind].positions(mx.array(offsets), length))
            own_positions = positions[min(row, len(positions) - 1)]
            expected = [
                [bool(p >= 0 and p < reach and whole[offset + q, p]) for p in own_positions] for q in range(length)
            ]
            assert rows.tolist() == expected
            assert rows.sum(axis=1).tolist() == whole[offset : offset + length].sum(axis=1).tolist()


def model_caches(model: Model, slots: int, batch: int = 1) -> Caches:
    """Of one layer of each kind."""
    layers = []
    for own in model.config.text.attention.values():
        count = slots if own.window is None else own.window + ROUND
        layers.append(empty_cache(own, mx.float32, count))
        layers[-1].arrays = tuple(mx.repeat(array, batch, axis=0) for array in layers[-1].arrays)
    return Caches(layers, [*model.config.text.attention])


def model_of_window(window: int) -> Model:
    """A model of no layers with this sliding window."""
    raw = config(Shape(window=window)) | {"vision_config": None, "audio_config": None}
    raw["text_config"] |= {"layer_types": [], "num_hidden_layers": 0}
    return Model(parse_config(raw, GenerationConfig(eos_token_ids=())))
