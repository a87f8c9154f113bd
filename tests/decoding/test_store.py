"""What has been read is found again, by content alone, within bounds; and never anything else."""

import random
from concurrent.futures import ThreadPoolExecutor, wait
from pathlib import Path

import mlx.core as mx
import numpy as np
import pytest
from conversing import (
    PAGED,
    Loaded,
    check_reply,
    difference,
    picture,
    quantizing,
    stored_logits,
    tolerance,
    with_picture,
    words,
)
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from rounds import GREEDY
from toy_checkpoint import tensors, write_checkpoint, write_drafter

from mlx_gemma4 import Prompt, load, stream_generate
from mlx_gemma4.decoding.disk import PAGE
from mlx_gemma4.decoding.store import PromptStore, fingerprint, forks, units
from mlx_gemma4.model.cache import ROUND, capacity

RANDOM = settings(
    deadline=None, max_examples=3, derandomize=True, suppress_health_check=[HealthCheck.function_scoped_fixture]
)


@pytest.fixture(scope="module")
def paged(tmp_path_factory: pytest.TempPathFactory) -> Loaded:
    return load(write_checkpoint(tmp_path_factory.mktemp("paged"), PAGED, seed=3))


@pytest.fixture(scope="module")
def drafting(tmp_path_factory: pytest.TempPathFactory) -> Loaded:
    folder = write_checkpoint(tmp_path_factory.mktemp("drafting"), PAGED, seed=4, plant=2.0)
    write_drafter(folder / "drafter", PAGED, 4, tensors(PAGED, 4, 2.0), planted=True)
    return load(folder)


def test_a_longer_prompt_reads_only_what_is_new(paged: Loaded) -> None:
    store, ids = PromptStore(), words(0, 700)
    assert stored_logits(paged, store, Prompt(ids))[1] == 0
    for length in (701, 720, 900):
        prompt = Prompt(words(0, 700) + words(1, length - 700))
        before = len(store.lines[0])
        logits, cached = stored_logits(paged, store, prompt)
        assert cached == before or cached >= 700
        assert difference(logits, paged[0].logits(prompt)[0, -1]) < 1e-4


@pytest.mark.parametrize("behind", [1, 5, 100, 199, 200])
def test_any_place_within_a_window_of_the_end_is_a_place_to_go_on_from(paged: Loaded, behind: int) -> None:
    store, ids = PromptStore(), words(0, 1000)
    stored_logits(paged, store, Prompt(ids))
    prompt = Prompt(ids[: 1000 - behind] + words(5, 30))
    logits, cached = stored_logits(paged, store, prompt)
    assert cached == 1000 - behind
    assert difference(logits, paged[0].logits(prompt)[0, -1]) < 1e-4


def test_parting_far_from_the_end_reads_at_most_as_much_again(paged: Loaded) -> None:
    store, ids = PromptStore(), words(0, 3300)
    stored_logits(paged, store, Prompt(ids))
    for behind in (3100, 2500, 1900, 1100):
        parted = 3300 - behind
        _, cached = stored_logits(paged, store, Prompt(ids[:parted] + words(behind, 30)))
        assert parted - behind <= cached <= parted


def test_the_system_turn_is_a_place_to_go_on_from(paged: Loaded) -> None:
    turn, system = 105, words(0, 300)
    store = PromptStore()
    stored_logits(paged, store, Prompt([2, turn, *system, turn, *words(1, 1600)]))
    assert stored_logits(paged, store, Prompt([2, turn, *system, turn, *words(2, 50)]))[1] >= 302


def test_forks_are_never_inside_an_image() -> None:
    image = picture(PAGED, 0, 1000, 100, 10)
    for rest in range(950, 1100, 7):
        prompt = with_picture(PAGED, words(0, 1000), image, words(1, rest))
        assert not any(1000 < mark < 1100 for mark in forks(prompt, 105))


def test_an_image_is_found_by_what_the_model_sees_of_it(paged: Loaded) -> None:
    """Another of the same size, and the same pixels in another shape, are others; it is read whole or not at all."""
    store = PromptStore()
    before, after = words(0, 50), words(1, 40)
    first = picture(PAGED, 0, 50, 24, 6)
    stored_logits(paged, store, with_picture(PAGED, before, first, after))
    for image, cached in (
        (picture(PAGED, 0, 50, 24, 6), 74),
        (picture(PAGED, 1, 50, 24, 6), 50),
        (picture(PAGED, 0, 50, 24, 8), 50),
    ):
        prompt = with_picture(PAGED, before, image, words(2, 40))
        logits, found = stored_logits(paged, store, prompt)
        assert found == cached
        assert difference(logits, paged[0].logits(prompt)[0, -1]) < 1e-4


def test_soft_tokens_are_not_the_same_ids_without_a_medium(paged: Loaded) -> None:
    store, image = PromptStore(), picture(PAGED, 0, 50, 24, 6)
    prompt = with_picture(PAGED, words(0, 50), image, words(1, 40))
    stored_logits(paged, store, prompt)
    assert stored_logits(paged, store, Prompt(prompt.token_ids))[1] == 50


def test_weights_types_bits_and_owners_are_apart(tmp_path: Path) -> None:
    """The same folder written anew with other weights, another computing type, `kv_bits`, another key."""
    store, prompt = PromptStore(), Prompt(words(0, 300))
    model = load(write_checkpoint(tmp_path / "model", PAGED, seed=1))
    stored_logits(model, store, prompt)
    assert stored_logits(model, store, prompt)[1] == 299
    assert stored_logits(model, store, prompt, scope="somebody")[1] == 0
    quantizing(model[0], 8)
    assert stored_logits(model, store, prompt)[1] == 0
    other = load(write_checkpoint(tmp_path / "model", PAGED, seed=2))
    assert stored_logits(other, store, prompt)[1] == 0
    assert stored_logits(load(tmp_path / "model", dtype="bfloat16"), store, prompt)[1] == 0


def test_one_bit_of_one_weight_is_another_fingerprint() -> None:
    rng = np.random.default_rng(0)
    for dtype in (mx.float32, mx.bfloat16, mx.uint32, mx.uint8):
        array = mx.array(rng.integers(0, 200, (33, 7))).astype(dtype)
        was = fingerprint({"a": array, "b": array[:1]})
        for place in range(0, array.size, 13):
            flat = array.flatten()
            flat[place] = flat[place] + 1
            assert fingerprint({"a": flat.reshape(33, 7), "b": array[:1]}) != was
        assert fingerprint({"a": array.reshape(7, 33), "b": array[:1]}) != was
        assert fingerprint({"a": array, "c": array[:1]}) != was


def script(loaded: Loaded, store: PromptStore, seed: int, steps: int, bits: tuple[int | None, ...] = (None,)) -> None:
    """A script at random: every reply is that of a fresh reading."""
    rng = random.Random(seed)
    model = loaded[0]
    conversations = [Prompt(words(0, rng.randint(2, 600)))]
    for step in range(steps):
        at = rng.randrange(len(conversations))
        prompt = conversations[at]
        quantizing(model, rng.choice(bits))
        what = rng.choice(["send", "send", "send", "edit", "fork", "image", "swap", "cancel", "evict", "new"])
        ids, media = prompt.token_ids, prompt.media
        if what == "edit":
            cut = rng.randint(1, len(ids))
            media = tuple(run for run in media if run.start + len(run) <= cut)
            ids = ids[: min([cut, *(run.start for run in prompt.media if run.start < cut < run.start + len(run))])]
            ids = ids or words(step, 1)
        elif what == "fork":
            conversations.append(prompt)
        elif what == "image":
            run = picture(PAGED, rng.randrange(2), len(ids), 24, rng.choice([6, 8]))
            ids, media = with_picture(PAGED, ids, run, []).token_ids, (*media, run)
        elif what == "swap" and media:
            run = picture(PAGED, rng.randrange(2), media[0].start, 24, rng.choice([6, 8]))
            media = (run, *media[1:])
        elif what == "evict":
            store.leave(rng.randrange(max(1, store.nbytes)))
            store.room = None
        elif what == "new":
            ids, media = words(rng.randrange(3), rng.randint(1, 500)), ()
        ids = [*ids, *words(rng.randrange(10**6), rng.choice([1, 3, 30, 130, 300]))]
        if len(ids) > 1500:
            ids, media = ids[:100], tuple(run for run in media if run.start + len(run) <= 100)
        prompt = Prompt(ids, media)
        draft = 0 if model.drafter is None else rng.choice([0, 3, 7, "auto"])
        if what == "cancel":
            stream = stream_generate(*loaded, prompt, max_tokens=20, sampling=GREEDY, store=store, draft_length=draft)
            for _ in range(rng.randint(0, 6)):
                next(stream, None)
            del stream
        else:
            logits, _ = stored_logits(loaded, store, prompt)
            assert difference(logits, model.logits(prompt)[0, -1]) < tolerance(model), (seed, step, what)
            reply = check_reply(loaded, store, prompt, rng.choice([1, 6, 12]), draft_length=draft)
            prompt = Prompt([*prompt.token_ids, *reply], media)
        assert not store.held
        assert store.ceiling is None or store.nbytes <= store.ceiling
        conversations[at] = prompt
    quantizing(model, None)


@RANDOM
@given(seed=st.integers(0, 10**6), ceiling=st.sampled_from([None, 3_000_000, 800_000, 100_000]))
def test_no_script_gets_another_reply_than_a_fresh_reading(paged: Loaded, seed: int, ceiling: int | None) -> None:
    script(paged, PromptStore(max_bytes=ceiling), seed, 5, (None, None, 8))


@RANDOM
@given(seed=st.integers(0, 10**6))
def test_nor_with_a_drafter(drafting: Loaded, seed: int) -> None:
    script(drafting, PromptStore(), seed, 3)


def test_memory_is_flat_over_prompts_that_nobody_asks_again(paged: Loaded) -> None:
    store, held = PromptStore(max_bytes=1_500_000), []
    for seed in range(24):
        stored_logits(paged, store, Prompt(words(seed, 30)))
        assert store.nbytes <= 1_500_000
        held.append(mx.get_active_memory())
    assert store.lines and max(held[16:]) <= max(held[8:16]) * 1.02


def test_a_line_that_is_forked_under_pressure_still_has_its_pages(paged: Loaded) -> None:
    """Room for the copy is made by what is superseded: never by what the copy is to have."""
    ids = words(0, 900)
    store = PromptStore()
    stored_logits(paged, store, Prompt(ids))
    store.max_bytes = store.nbytes
    prompt = Prompt(ids[:650] + words(1, 30))
    logits, _ = stored_logits(paged, store, prompt)
    assert difference(logits, paged[0].logits(prompt)[0, -1]) < 1e-4
    assert store.nbytes <= store.max_bytes


PAGE_BYTES = 5 * 2 * 16 * 4 * PAGE  # of PAGED
TURN = 105


def walked(loaded: Loaded, store: PromptStore, ids: list[int], reply: int = 0) -> int:
    """The way of a request through a store, with nothing computed; how many positions need not be read."""
    model, prompt = loaded[0], Prompt(ids)
    slots = len(ids) + reply + ROUND
    held = store.take(b"", prompt, slots, TURN, model.caches(slots), 10**12)
    while held.caches.length < len(ids):
        held.caches.length = min(held.caches.length + PAGED.window, len(ids))
        store.keep(held, held.caches.length)
    store.give(held, [*ids, *words(len(ids), reply)])
    return held.cached


@pytest.mark.parametrize("pages", [30, 20, 10, 4])
def test_a_line_that_has_no_room_for_all_its_marks_goes_on_from_its_last(paged: Loaded, pages: int) -> None:
    store, ids = PromptStore(), [2, TURN, *words(0, 300), TURN, *words(1, 6000), TURN, *words(2, 3)]
    full = 4 * (128 + 32) * capacity(len(ids) + 400)
    store.max_bytes = full + pages * PAGE_BYTES
    for turn in range(3):
        cached = walked(paged, store, ids, 40)
        assert store.nbytes <= store.max_bytes and (not turn or len(ids) - cached <= 100)
        ids = [*ids[:-3], *words(turn, 40), TURN, *words(turn + 5, 50), TURN, *words(2, 3)]


def test_under_pressure_too_parting_far_from_the_end_reads_at_most_as_much_again(paged: Loaded) -> None:
    """Turn by turn: marks that move with the end would leave a hole that grows."""
    store, ids = PromptStore(), [2]
    for turn in range(40):
        ids = [*ids, TURN, *words(turn, 260), TURN, *words(2, 3)]
        walked(paged, store, ids, 40)
        (line,) = store.lines
        store.max_bytes = line.nbytes + 44 * PAGE_BYTES
        store.evict(0)
        for behind in range(1100, len(ids) - 1, 97):
            prompt = Prompt([*ids[:-behind], 7])
            assert len(ids) - behind - store.best(b"", units(prompt), prompt)[1] <= behind
        ids = [*ids[:-4], *words(turn + 50, 40)]
    assert len(line) > 80 * PAGE and len(line.pages) <= 44


def test_rows_that_go_to_the_store_are_not_left_to_the_request_too(
    paged: Loaded, monkeypatch: pytest.MonkeyPatch
) -> None:
    ids = words(0, 3000)
    monkeypatch.setattr("mlx_gemma4.engine.reading.memory_limit", lambda: 8 * PAGE_BYTES)
    store, before = PromptStore(), 0
    for length in (3000, 3100, 3200):
        assert stored_logits(paged, store, Prompt((ids + words(1, 300))[:length]))[1] == before
        assert store.lines[0].nbytes > 8 * PAGE_BYTES
        before = length


def test_what_failed_is_not_given_back(paged: Loaded, monkeypatch: pytest.MonkeyPatch) -> None:
    store, prompt = PromptStore(), Prompt(words(0, 300))
    stream = stream_generate(*paged, prompt, max_tokens=20, sampling=GREEDY, store=store)
    next(stream)
    with monkeypatch.context() as patched:
        patched.setattr("mlx_gemma4.decoding.batch.tokens_of", lambda array: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            list(stream)
    assert not store.lines and not store.held
    stream = stream_generate(*paged, prompt, max_tokens=20, sampling=GREEDY, store=store)
    next(stream)
    with monkeypatch.context() as patched:
        patched.setattr("mlx_gemma4.decoding.batch.tokens_of", interrupted)
        with pytest.raises(KeyboardInterrupt):
            list(stream)
    assert [len(line) for line in store.lines] == [300] and not store.held
    check_reply(paged, store, Prompt([*prompt.token_ids, *words(1, 9)]))


def interrupted(array: mx.array) -> list[int]:
    raise KeyboardInterrupt


def test_where_prompts_part_is_one_line_of_the_log(paged: Loaded, caplog: pytest.LogCaptureFixture) -> None:
    store, ids = PromptStore(), words(0, 100)
    with caplog.at_level(10, "mlx_gemma4"):
        stored_logits(paged, store, Prompt(ids))
        stored_logits(paged, store, Prompt([*ids[:60], *words(1, 40)]))
    assert len(caplog.records) == 1
    assert "60 of 100 tokens are not read again; what was read goes on after token 60" in caplog.text


def test_its_size_is_not_read_while_it_changes() -> None:
    store = PromptStore()
    with ThreadPoolExecutor(1) as pool:
        with store.lock:
            size = pool.submit(lambda: store.nbytes)
            assert not wait([size], timeout=0.1).done
        assert size.result() == 0
