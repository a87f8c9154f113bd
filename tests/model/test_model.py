"""The whole model against transformers' answers, and what must not change them."""

import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import mlx.core as mx
import numpy as np
import pytest
from conftest import joining
from golden_cases import CHECKPOINTS, EVERY, GOLDEN, IMAGE_BUDGET, LAYOUTS, chats, generator, lay_out, layout
from hypothesis import given, settings
from hypothesis import strategies as st
from toy_checkpoint import TINY, Shape, config, media_ids, write_checkpoint

from mlx_gemma4 import Prompt, Sampling, generate, load
from mlx_gemma4.config import SLIDING, GenerationConfig, parse_config
from mlx_gemma4.model import model as model_module
from mlx_gemma4.model.arrange import arrange
from mlx_gemma4.model.cache import ROUND
from mlx_gemma4.model.model import Model, chunks
from mlx_gemma4.prompt.processor import Processor
from mlx_gemma4.prompt.prompt import SoftTokens

Loaded = tuple[Model, Processor]

# Of the largest logit; what rounding makes of it is 1e-6 to 2e-5. The reference is asked for 5e-4.
TOLERANCE = 1e-4
GREEDY = Sampling(temperature=0)
CASES = [(checkpoint, name) for checkpoint in CHECKPOINTS for name in [*LAYOUTS, *chats()]]


@pytest.fixture(scope="module")
def golden() -> dict[str, np.ndarray]:
    with np.load(GOLDEN) as file:
        return dict(file)


@pytest.fixture(scope="session", params=["apart", "joined"])
def models(
    request: pytest.FixtureRequest, tiny: Loaded, other: Loaded, tiny_folder: Path, other_folder: Path
) -> dict[str, Loaded]:
    """With matrices as a CPU has those of float32, and as a GPU has all."""
    if request.param == "apart":
        return {"tiny": tiny, "other": other}
    with joining():
        return {"tiny": load(tiny_folder), "other": load(other_folder)}


@pytest.fixture
def unstopped(models: dict[str, Loaded], monkeypatch: pytest.MonkeyPatch) -> dict[str, Loaded]:
    """The models, which no token stops."""
    for model, _ in models.values():
        endless = replace(model.config, generation=replace(model.config.generation, eos_token_ids=()))
        monkeypatch.setattr(model, "config", endless)
    return models


def made_prompt(runs: list[tuple[Any, ...]], shape: Shape = TINY, seed: str = "") -> Prompt:
    """Random tokens and media of a layout."""
    ids, media = lay_out(runs, shape, generator(seed))
    return Prompt(ids, tuple(SoftTokens(run.kind, run.start, run.values, run.positions) for run in media))


def golden_prompt(checkpoint: str, name: str, processor: Processor) -> Prompt:
    if name in LAYOUTS:
        ids, media = layout(name, CHECKPOINTS[checkpoint][0])
        return Prompt(ids, tuple(SoftTokens(run.kind, run.start, run.values, run.positions) for run in media))
    return processor(chats()[name], image_budget=IMAGE_BUDGET)


def read_logits(model: Model, prompt: Prompt, chunk: int) -> np.ndarray:
    hidden = mx.concatenate(list(model.read(prompt, model.caches(len(prompt)), chunk=chunk)), axis=1)
    return np.array(model.language_model.head(hidden))[0]


def error(found: np.ndarray, expected: np.ndarray) -> float:
    """The largest difference, of the largest value."""
    return float(np.abs(found - expected).max() / np.abs(expected).max())


# --- transformers' answers ---------------------------------------------------------------------


@pytest.mark.parametrize(("checkpoint", "name"), CASES)
def test_logits_are_those_of_transformers(
    models: dict[str, Loaded], golden: dict[str, np.ndarray], checkpoint: str, name: str
) -> None:
    model, processor = models[checkpoint]
    prompt = golden_prompt(checkpoint, name, processor)
    assert prompt.token_ids == golden[f"{checkpoint}/{name}/token_ids"].tolist()
    logits = np.array(model.logits(prompt))[0]
    assert logits.shape == (len(prompt), CHECKPOINTS[checkpoint][0].vocab)
    assert error(logits[:, ::EVERY], golden[f"{checkpoint}/{name}/some"]) < TOLERANCE
    assert error(logits[-1], golden[f"{checkpoint}/{name}/last"]) < TOLERANCE


@pytest.mark.parametrize(("checkpoint", "name"), CASES)
def test_greedy_replies_are_those_of_transformers(
    unstopped: dict[str, Loaded], golden: dict[str, np.ndarray], checkpoint: str, name: str
) -> None:
    model, processor = unstopped[checkpoint]
    expected = golden[f"{checkpoint}/{name}/greedy"].tolist()
    prompt = golden_prompt(checkpoint, name, processor)
    reply = generate(model, processor, prompt, max_tokens=len(expected), sampling=GREEDY, draft_length=0)
    assert reply.token_ids == expected


def test_all_of_the_golden_answers_are_compared(golden: dict[str, np.ndarray]) -> None:
    parts = ("token_ids", "some", "last", "greedy")
    assert set(golden) == {f"{checkpoint}/{name}/{part}" for checkpoint, name in CASES for part in parts}


# --- chunks ------------------------------------------------------------------------------------

text = st.tuples(st.just("text"), st.integers(1, 30))
sound = st.tuples(st.just("audio"), st.integers(1, 20))
picture = st.tuples(st.sampled_from(["image", "video"]), st.integers(1, 6), st.integers(1, 5))
layouts = st.lists(st.one_of(text, sound, picture), min_size=1, max_size=7)


@pytest.mark.parametrize("size", [16, 64])
def test_size_of_chunks_changes_no_logits(models: dict[str, Loaded], size: int) -> None:
    runs = [("text", 20), ("image", 7, 10), ("text", 9), ("audio", 30), ("video", 5, 3), ("text", 50), ("image", 2, 2)]
    for name, (model, _) in models.items():
        prompt = made_prompt(runs, CHECKPOINTS[name][0])
        assert error(read_logits(model, prompt, size), read_logits(model, prompt, len(prompt))) < TOLERANCE


@settings(max_examples=25, deadline=None)
@given(runs=layouts, size=st.integers(1, 80))
def test_any_size_of_chunks_gives_the_logits_of_the_whole(tiny: Loaded, runs: list[Any], size: int) -> None:
    prompt = made_prompt(runs, seed=str(runs))
    whole = read_logits(tiny[0], prompt, len(prompt))
    assert error(read_logits(tiny[0], prompt, size), whole) < TOLERANCE


@settings(max_examples=300, deadline=None)
@given(runs=layouts, size=st.integers(1, 80))
def test_chunks_cover_the_prompt_and_cut_no_image(runs: list[Any], size: int) -> None:
    prompt = bare_prompt(runs)
    cuts = list(chunks(prompt, 0, size))
    assert [start for start, _ in cuts] == [0, *(end for _, end in cuts[:-1])]
    assert cuts[-1][1] == len(prompt)
    blocks = {(run.start, run.start + len(run)) for run in prompt.media if run.kind != "audio"}
    for start, end in cuts:
        assert start < end
        assert end - start <= size or (start, end) in blocks
        assert not any(first < end < last for first, last in blocks)


def test_chunks_are_as_long_as_they_may_be() -> None:
    prompt = bare_prompt([("text", 10), ("audio", 20), ("image", 3, 3), ("text", 14)])
    assert list(chunks(prompt, 0, 16)) == [(0, 16), (16, 32), (32, 48), (48, 57)]
    # the image is [33, 42): a cut at 36 goes before it, and in chunks of 8 it is one of its own
    assert list(chunks(prompt, 0, 36)) == [(0, 33), (33, 57)]
    assert list(chunks(prompt, 0, 8))[4:6] == [(32, 33), (33, 42)]


def bare_prompt(runs: list[tuple[Any, ...]]) -> Prompt:
    """A layout's lengths, without pixels."""
    length, media = 0, []
    for kind, *size in runs:
        n = int(np.prod(size))
        if kind != "text":
            places = None if kind == "audio" else np.zeros((n, 2), np.int32)
            media.append(SoftTokens(kind, length + 1, np.zeros((n, 1), np.uint8), places))
            n += 2
        length += n
    return Prompt([110] * length, tuple(media))


# --- decoding ----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "runs",
    [
        [("text", 1)],
        [("text", 9)],  # the window is passed while decoding
        [("text", 40)],
        [("text", 3), ("image", 2, 3), ("audio", 2), ("text", 1)],
        [("audio", 21), ("video", 5, 5)],  # ends right behind a block longer than the window
    ],
    ids=str,
)
@pytest.mark.parametrize("checkpoint", CHECKPOINTS)
def test_cached_decoding_equals_reading_the_grown_prompt(
    unstopped: dict[str, Loaded], checkpoint: str, runs: list[Any]
) -> None:
    model, processor = unstopped[checkpoint]
    prompt = made_prompt(runs, CHECKPOINTS[checkpoint][0])
    reply = generate(model, processor, prompt, max_tokens=40, sampling=GREEDY, draft_length=0)
    grown = Prompt([*prompt.token_ids, *reply.token_ids], prompt.media)
    logits = np.array(model.logits(grown))[0, len(prompt) - 1 : -1]
    logits[:, list(model.config.generation.suppress_tokens)] = -np.inf
    assert reply.token_ids == logits.argmax(axis=-1).tolist()


# --- what a prompt means -----------------------------------------------------------------------


def test_media_are_read_in_their_order(tiny: Loaded) -> None:
    model, processor = tiny
    first, second = (part["image"] for part in chats()["chat_about_images"][0]["content"] if part["type"] == "image")
    about, swapped = (
        processor(
            [{"role": "user", "content": [{"type": "image", "image": one}, {"type": "image", "image": two}]}],
            image_budget=IMAGE_BUDGET,
        )
        for one, two in ((first, second), (second, first))
    )
    assert about.token_ids == swapped.token_ids  # both are of 70 tokens
    by_hand = Prompt(
        about.token_ids,
        tuple(
            SoftTokens("image", place.start, other.values, other.positions)
            for place, other in zip(about.media, reversed(about.media), strict=True)
        ),
    )
    logits = np.array(model.logits(swapped))
    assert np.array_equal(logits, np.array(model.logits(by_hand)))
    assert error(np.array(model.logits(about)), logits) > 0.01


def test_every_kind_of_media_is_seen_by_what_follows_only(tiny: Loaded) -> None:
    model, _ = tiny
    for kind, size in (("audio", (7,)), ("image", (3, 2)), ("video", (2, 3))):
        prompt = made_prompt([("text", 6), (kind, *size), ("text", 5)])
        (run,) = prompt.media
        changed = replace(run, values=run.values[::-1].copy())
        before, after = (np.array(model.logits(Prompt(prompt.token_ids, (media,))))[0] for media in (run, changed))
        assert np.array_equal(before[: run.start], after[: run.start])
        assert (np.abs(before - after).max(axis=-1) > 1e-3)[run.start :].all()


@pytest.mark.parametrize("placeholder", ["<|image|>", "<|video|>", "<|audio|>"])
def test_ids_of_placeholders_without_media_are_plain_tokens(tiny: Loaded, placeholder: str) -> None:
    model, _ = tiny
    token = media_ids(TINY)[placeholder]
    prompt = Prompt([110, 111, *[token] * 8, 112])
    embedded = np.array(model.embed(prompt, 0, len(prompt)))[0]
    table = np.array(model.language_model.embed_tokens.weight)
    assert error(embedded, table[prompt.token_ids] * TINY.hidden**0.5) < 1e-6
    # and they look at nothing that follows them
    logits = np.array(model.logits(prompt))[0]
    assert error(np.array(model.logits(Prompt(prompt.token_ids[:6])))[0], logits[:6]) < 1e-5


# --- types and memory --------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [mx.bfloat16, mx.float32], ids=str)
def test_hidden_states_and_caches_have_the_type_of_the_checkpoint(tmp_path: Path, dtype: mx.Dtype) -> None:
    model, _ = load(write_checkpoint(tmp_path / "model", dtype=dtype))
    prompt = made_prompt([("text", 20), ("image", 2, 2), ("audio", 3), ("text", 4)])
    caches = model.caches(len(prompt))
    hidden = list(model.read(prompt, caches, chunk=16))
    assert {part.dtype for part in hidden} == {dtype}
    assert {array.dtype for own in caches.arrays for array in own} == {dtype}
    assert model.embed(prompt, 0, len(prompt)).dtype == dtype
    assert model.logits(prompt).dtype == mx.float32


def test_logits_of_a_bf16_checkpoint_are_as_close_as_its_type_allows(
    tmp_path: Path, golden: dict[str, np.ndarray]
) -> None:
    model, processor = load(write_checkpoint(tmp_path / "model", dtype=mx.bfloat16))
    for name in LAYOUTS:
        found = np.array(model.logits(golden_prompt("tiny", name, processor)))[0, :, ::EVERY]
        expected = golden[f"tiny/{name}/some"]
        # transformers in bf16 is off by 1.9e-2 to 2.7e-2 of the logits' spread
        assert np.sqrt(np.mean((found - expected) ** 2)) < 4e-2 * np.sqrt(np.mean(expected**2))


@pytest.fixture
def wide_model() -> Iterator[Model]:
    """One layer of each kind with the published head shapes; what the weights are does not matter."""
    shape = Shape(
        hidden=256, mlp=1024, heads=16, kv_heads=8, head_dim=256, global_head_dim=512, window=1024, context=262144
    )
    raw = config(shape)
    raw["text_config"] |= {"layer_types": [SLIDING, "full_attention"], "num_hidden_layers": 2}
    model = Model(parse_config(raw, GenerationConfig(eos_token_ids=())))
    arrange(model)
    mx.eval(model.parameters())
    yield model
    mx.clear_cache()


def multiplies_slowly() -> bool:
    """Whether MLX has the reference BLAS of its Linux wheel, 20 times slower than OpenBLAS."""
    a, seconds = mx.ones((512, 512)), []
    for _ in range(5):
        start = time.perf_counter()
        mx.eval(a @ a)
        seconds.append(time.perf_counter() - start)
    return min(seconds) > 0.02  # 0.003 with OpenBLAS, 0.05 without


def test_reading_the_end_of_a_long_prompt_takes_little_memory(
    wide_model: Model, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Where most keys are seen; the rows before it are zeros, which take as much memory and no time."""
    if multiplies_slowly():
        pytest.skip("takes a minute with MLX's own BLAS; run with LD_PRELOAD=libopenblas.so.0")
    prompt = Prompt([110 + i % 300 for i in range(16384)])  # scores unsplit: 16 heads, 512 · 16384, 512 MB
    start, end = list(chunks(prompt, 0, model_module.CHUNK))[-1]
    caches = wide_model.caches(len(prompt))
    caches.length = start
    mx.eval(caches.arrays)
    mx.clear_cache()
    before = mx.get_active_memory()  # weights and caches; these are as long as they get
    mx.reset_peak_memory()
    assert [hidden.shape[1] for hidden in wide_model.read(prompt, caches)] == [end - start]
    assert mx.get_peak_memory() - before < 512 * 10**6


def test_nothing_is_kept_of_a_prompt_but_caches_of_bounded_length(tiny: Loaded) -> None:
    model, _ = tiny
    prompt = Prompt([110 + i % 300 for i in range(1000)])
    before = mx.get_active_memory()
    caches = model.caches(len(prompt))
    assert sum(hidden.shape[1] for hidden in model.read(prompt, caches, 500)) == len(prompt)
    kept = sum(array.nbytes for arrays in caches.arrays for array in arrays)
    sliding = 5 * (TINY.window + ROUND) * 2 * TINY.kv_heads * TINY.head_dim
    assert kept == 4 * (sliding + 1024 * TINY.global_kv_heads * (32 + 8))  # 8 of 32 dimensions turn
    assert mx.get_active_memory() - before - kept < 100_000  # views of whole chunks would be 640,000
