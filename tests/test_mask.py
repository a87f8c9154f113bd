"""The masks against loops over queries and keys that say what reference and paper say."""

import mlx.core as mx
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from toy_checkpoint import Shape, config

from mlx_gemma4.config import FULL, SLIDING, GenerationConfig, parse_config
from mlx_gemma4.mask import attention_mask
from mlx_gemma4.model import Model, chunks
from mlx_gemma4.prompt import Prompt, SoftTokens

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
    places = mx.arange(len(blocks))
    if window is None:
        mask = attention_mask(places, places, None)
    else:
        mask = attention_mask(places, places, window, numbers(blocks), numbers(blocks))
    assert mask.dtype == mx.bool_
    assert np.array_equal(np.array(mask), brute_force(len(blocks), window, blocks))


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
    mask = attention_mask(mx.arange(first_query, last_query), mx.arange(first_key, last_key), window, *known)
    expected = brute_force(length, window, blocks)[first_query:last_query, first_key:last_key]
    assert np.array_equal(np.array(mask), expected)


@pytest.mark.parametrize("window", [1, 5, 16])
def test_window_holds_the_query_and_as_many_keys_before_it_as_fill_it(window: int) -> None:
    mask = np.array(attention_mask(mx.arange(40), mx.arange(40), window))
    assert mask.sum(axis=1).tolist() == [min(query + 1, window) for query in range(40)]
    assert mask.diagonal().all()


def test_block_longer_than_the_window_looks_ahead_to_its_end_but_back_no_further_than_the_window() -> None:
    blocks = mx.array([-1] * 3 + [0] * 10 + [-1] * 3)
    mask = np.array(attention_mask(mx.arange(16), mx.arange(16), 4, blocks, blocks))
    assert np.flatnonzero(mask[3]).tolist() == [0, 1, 2, *range(3, 13)]
    assert np.flatnonzero(mask[9]).tolist() == [6, 7, 8, *range(9, 13)]
    assert np.flatnonzero(mask[13]).tolist() == [10, 11, 12, 13]


@settings(max_examples=100, deadline=None)
@given(runs=runs, window=windows, size=st.integers(1, 50))
def test_masks_of_chunks_are_rows_of_the_whole_prompts(runs: list[tuple[str, int]], window: int, size: int) -> None:
    prompt, blocks = made_prompt(runs)
    model = model_of_window(window)
    full, sliding = brute_force(len(prompt), None, blocks), brute_force(len(prompt), window, blocks)
    for start, end in chunks(prompt, size):
        masks = model.prompt_masks(prompt, start, end)
        assert np.array_equal(np.array(masks[FULL]), full[start:end, :end])
        assert not full[start:end, end:].any()
        # a sliding layer's store gives the last `window` keys before the chunk, and the chunk's
        oldest = max(0, start - window)
        assert np.array_equal(np.array(masks[SLIDING]), sliding[start:end, oldest:end])
        assert not sliding[start:end, :oldest].any()
        assert not sliding[start:end, end:].any()


def model_of_window(window: int) -> Model:
    """A model of no layers with this sliding window."""
    raw = config(Shape(window=window)) | {"vision_config": None, "audio_config": None}
    raw["text_config"] |= {"layer_types": [], "num_hidden_layers": 0}
    return Model(parse_config(raw, GenerationConfig(eos_token_ids=())))
