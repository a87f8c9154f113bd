"""From a request to a reply: where it ends, what is streamed and counted, thoughts and calls, wrong requests."""

import itertools
import math
import subprocess
import sys
import time
import weakref
from collections import deque
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any, cast

import mlx.core as mx
import numpy as np
import pytest
from rounds import GREEDY
from toy_checkpoint import TINY

from mlx_gemma4 import Prompt, Sampling, collect, generate, load, stream_generate
from mlx_gemma4.config import ModelConfig
from mlx_gemma4.decoding import batch
from mlx_gemma4.decoding import round as speculate
from mlx_gemma4.decoding.batch import Given
from mlx_gemma4.decoding.controller import MAX_DRAFTS, Controller, RoundClock
from mlx_gemma4.decoding.round import learnt_of
from mlx_gemma4.decoding.sampling import Sampler
from mlx_gemma4.engine import generation, reading
from mlx_gemma4.engine.request import Asked, Options
from mlx_gemma4.engine.row import Row
from mlx_gemma4.model import cache as cache_module
from mlx_gemma4.model.model import Model
from mlx_gemma4.planner import Prediction
from mlx_gemma4.prompt.processor import Processor
from mlx_gemma4.reply.reply import Reply

Loaded = tuple[Model, Processor]

IDS = np.random.default_rng(9).integers(110, 500, 20).tolist()
LENGTHS = [0, 1, 3, 7, "auto"]


@pytest.fixture
def configure(planted: Loaded, monkeypatch: pytest.MonkeyPatch) -> Callable[..., None]:
    """Change the stop tokens, or other defaults of generation, or the context of the planted model."""
    model, original = planted[0], planted[0].config
    # no calls and thoughts by chance: their tokens are neither text nor silent
    silent = (*original.generation.suppress_tokens, 48, 49, 100, 101)

    def configured(context: int | None = None, **generation: Any) -> None:
        changed: ModelConfig = replace(
            original, generation=replace(original.generation, **({"suppress_tokens": silent} | generation))
        )
        if context is not None:
            changed = replace(changed, text=replace(changed.text, max_position_embeddings=context))
        monkeypatch.setattr(model, "config", changed)

    configured(eos_token_ids=())
    return configured


@pytest.fixture
def endless(planted: Loaded, configure: Callable[..., None]) -> Loaded:
    """The planted model, which no token stops."""
    return planted


def reply_of(loaded: Loaded, length: int | str = 3, max_tokens: int = 24, sampling: Sampling = GREEDY) -> Reply:
    return generate(*loaded, Prompt(IDS), max_tokens=max_tokens, sampling=sampling, draft_length=length)


# --- where a reply ends ------------------------------------------------------------------------


def test_nothing_behind_a_stop_token_is_shown_or_counted(endless: Loaded, configure: Callable[..., None]) -> None:
    whole = reply_of(endless, 0).token_ids
    ends = [n for n, token in enumerate(whole) if token not in whole[:n]]
    texts = {end: reply_of(endless, 0, end).text if end else "" for end in ends}
    for end, length in itertools.product(ends, LENGTHS):
        configure(eos_token_ids=(whole[end], 1))
        pieces = list(stream_generate(*endless, Prompt(IDS), max_tokens=24, sampling=GREEDY, draft_length=length))
        assert [token for piece in pieces for token in piece.token_ids] == whole[:end]
        assert [piece.finish_reason for piece in pieces] == [None] * (len(pieces) - 1) + ["stop"]
        stats = pieces[-1].stats
        assert stats is not None and stats.generation_tokens == end
        assert "".join(piece.text for piece in pieces) == texts[end]


def test_a_number_of_numpy_s_is_a_number(endless: Loaded) -> None:
    assert reply_of(endless, np.int64(2), np.int64(5)).token_ids == reply_of(endless, 2, 5).token_ids


@pytest.mark.parametrize(("stop", "is_cut"), [((), False), (("a",), True)])
def test_a_stop_token_is_told_of_only_where_it_ended_the_reply(
    tiny: Loaded, stop: tuple[str, ...], is_cut: bool
) -> None:
    """Not behind a text that ended it, though one round gave both."""
    processor = tiny[1]
    ids = processor.tokenizer.encode("ab", add_special_tokens=False).ids
    row = Row(processor, Asked(*tiny, Prompt(IDS), Options(max_tokens=10, stop=stop, logprobs=0), 0.0))
    told = np.array([[-0.5 - place] for place in range(len(ids) + 1)])
    row.take(Given(cast(Any, None), None, [*ids, 1], told))
    end = row.finish().end
    assert end == (None if is_cut else {"token_id": 1, "logprob": -0.5 - len(ids), "top": {}})


class Foresight:
    """A drafter that knows what will be said: every draft of its rounds is accepted."""

    def __init__(self, ids: list[int], length: int):
        self.logits = 100 * mx.eye(TINY.vocab)[mx.array(ids)]  # by position
        self.length, self.calls = length, 0

    def __call__(
        self, embedding: mx.array, hidden: mx.array, last: mx.array, masks: Any, stores: Any
    ) -> tuple[mx.array, mx.array]:
        step = 2 + self.calls % self.length  # the newest token is at last + 1
        self.calls += 1
        return self.logits[last + step][None], hidden


@pytest.fixture(scope="module")
def foreseen(planted_folder: Path) -> tuple[Model, Processor, list[int]]:
    """A model whose rounds of 7 drafts all give 8 tokens, and the 33 tokens, all different, that it says."""
    model, processor = load(planted_folder)
    suppressed = (*model.config.generation.suppress_tokens, 48, 49, 100, 101)
    changed = replace(model.config.generation, eos_token_ids=(), suppress_tokens=suppressed)
    model.config = replace(model.config, generation=changed)
    said = generate(model, processor, Prompt(IDS), max_tokens=33, sampling=NO_REPEAT, draft_length=0).token_ids
    assert len(set(said)) == 33
    model.drafter = Foresight([*IDS, *said, *[0] * 20], 7)
    return model, processor, said


NO_REPEAT = Sampling(temperature=0, repetition_penalty=50.0)


@pytest.mark.parametrize("end", range(33))
def test_a_stop_token_ends_an_accepted_run_at_every_place(
    foreseen: tuple[Model, Processor, list[int]], monkeypatch: pytest.MonkeyPatch, end: int
) -> None:
    model, processor, said = foreseen
    generation = replace(model.config.generation, eos_token_ids=(said[end],))
    monkeypatch.setattr(model, "config", replace(model.config, generation=generation))
    pieces = list(
        stream_generate(model, processor, Prompt(IDS), max_tokens=33, sampling=NO_REPEAT, draft_length=7)
    )  # fmt: skip
    runs = [[]] if end == 0 else [said[:1]] + [said[n : min(n + 8, end)] for n in range(1, end + 1, 8)]
    assert [piece.token_ids for piece in pieces] == [*runs, []]
    assert pieces[-1].finish_reason == "stop"
    stats = pieces[-1].stats
    assert stats is not None
    assert (stats.generation_tokens, stats.rounds) == (end, len(runs) - 1)
    # whole rounds, the last included
    assert stats.accepted_tokens == stats.drafted_tokens == 7 * stats.rounds


@pytest.mark.parametrize("limit", range(1, 34))
def test_max_tokens_cuts_an_accepted_run_at_every_place(
    foreseen: tuple[Model, Processor, list[int]], limit: int
) -> None:
    model, processor, said = foreseen
    reply = generate(model, processor, Prompt(IDS), max_tokens=limit, sampling=NO_REPEAT, draft_length=7)
    assert (reply.token_ids, reply.finish_reason) == (said[:limit], "length")
    assert reply.stats.rounds == -(-(limit - 1) // 8)
    assert reply.stats.acceptance_by_position == ([1.0] * 7 if limit > 1 else [])


@pytest.mark.parametrize("length", LENGTHS)
def test_max_tokens_may_lie_inside_a_run(endless: Loaded, length: int | str) -> None:
    whole = reply_of(endless, 0).token_ids
    for limit in range(1, 13):
        reply = reply_of(endless, length, max_tokens=limit)
        assert reply.token_ids == whole[:limit]
        assert (reply.finish_reason, reply.stats.generation_tokens) == ("length", limit)


def test_the_last_token_may_be_the_stop_token(endless: Loaded, configure: Callable[..., None]) -> None:
    whole = reply_of(endless, 0).token_ids
    end = max(n for n, token in enumerate(whole) if token not in whole[:n])
    configure(eos_token_ids=(whole[end],))
    for length in LENGTHS:
        assert reply_of(endless, length, max_tokens=end + 1).finish_reason == "stop"
        cut = reply_of(endless, length, max_tokens=end)
        assert (cut.finish_reason, cut.token_ids) == ("length", whole[:end])


@pytest.mark.parametrize("length", LENGTHS)
def test_a_full_context_ends_a_reply(endless: Loaded, configure: Callable[..., None], length: int | str) -> None:
    whole = reply_of(endless, 0).token_ids
    for room in (1, 2, 5, 11):
        configure(context=len(IDS) + room, eos_token_ids=())
        reply = reply_of(endless, length)
        assert (reply.finish_reason, reply.token_ids) == ("length", whole[:room])


def test_a_prompt_that_fills_the_context_is_refused(endless: Loaded, configure: Callable[..., None]) -> None:
    configure(context=len(IDS), eos_token_ids=())
    with pytest.raises(ValueError, match="20 tokens"):
        stream_generate(*endless, Prompt(IDS))


# --- pieces and stats --------------------------------------------------------------------------


@pytest.mark.parametrize("length", LENGTHS)
def test_pieces_in_their_order_are_the_reply(endless: Loaded, length: int | str) -> None:
    reply = reply_of(endless, length, max_tokens=40)
    pieces = list(stream_generate(*endless, Prompt(IDS), max_tokens=40, sampling=GREEDY, draft_length=length))
    assert "".join(piece.text for piece in pieces) == reply.text
    assert list(itertools.chain(*(piece.token_ids for piece in pieces))) == reply.token_ids
    assert all(piece.stats is None and piece.tool_calls is None for piece in pieces[:-1])
    final = pieces[-1]
    assert (final.token_ids, final.finish_reason, final.tool_calls) == ([], "length", [])
    assert final.stats is not None
    assert len(pieces) == final.stats.rounds + 2  # the first token, the rounds, the end
    assert len(pieces[0].token_ids) == 1


@pytest.mark.parametrize("length", LENGTHS)
@pytest.mark.parametrize("sampling", [GREEDY, Sampling(temperature=1.0, top_k=0, top_p=1.0, seed=1)], ids=str)
def test_stats_fit_together(endless: Loaded, length: int | str, sampling: Sampling) -> None:
    pieces = list(stream_generate(*endless, Prompt(IDS), max_tokens=41, sampling=sampling, draft_length=length))
    stats = pieces[-1].stats
    assert stats is not None
    runs = [len(piece.token_ids) for piece in pieces[1:-1]]  # without the prompt's own token
    assert (stats.prompt_tokens, stats.generation_tokens, stats.rounds) == (len(IDS), 41, len(runs))
    assert sum(runs) == 40
    whole = stats.rounds + stats.accepted_tokens  # the last round's tokens beyond max_tokens included
    assert 40 <= whole <= 47
    assert stats.tokens_per_round == pytest.approx(whole / stats.rounds)
    if length != "auto":
        assert stats.drafted_tokens == length * stats.rounds
        assert len(stats.acceptance_by_position) == length
        assert sum(stats.acceptance_by_position) * stats.rounds == pytest.approx(stats.accepted_tokens)
        for place, share in enumerate(stats.acceptance_by_position):
            # all runs but the last are whole
            kept = sum(run > place + 1 for run in runs[:-1])
            assert kept <= round(share * stats.rounds) <= kept + 1
    assert stats.acceptance_by_position == sorted(stats.acceptance_by_position, reverse=True) or length == "auto"
    assert stats.accepted_tokens <= stats.drafted_tokens
    assert stats.time_to_first_token > 0
    assert min(stats.prompt_tps, stats.generation_tps, stats.peak_memory) > 0


def test_a_reply_of_one_token_has_no_rounds(endless: Loaded) -> None:
    stats = reply_of(endless, 3, max_tokens=1).stats
    assert (stats.rounds, stats.drafted_tokens, stats.accepted_tokens, stats.generation_tps) == (0, 0, 0, 0)
    assert (stats.acceptance_by_position, stats.tokens_per_round) == ([], 1)


@pytest.mark.parametrize("length", [0, 5])
def test_a_cache_may_grow_while_tokens_are_generated(
    endless: Loaded, monkeypatch: pytest.MonkeyPatch, length: int
) -> None:
    monkeypatch.setattr(cache_module, "STEP", 128)
    monkeypatch.setattr(reading, "AHEAD", 64)
    monkeypatch.setattr(learnt_of(endless[0]), "rounds", {})
    model, processor = endless
    count, step = 400, 128
    sampling = Sampling(temperature=0, repetition_penalty=1.05)
    reply = generate(
        model, processor, Prompt(IDS[:3]), max_tokens=count, sampling=sampling, draft_length=length
    )  # fmt: skip
    assert {slots for *_, slots in learnt_of(model).rounds} == {128, 256, 384, 512}
    grown = [*IDS[:3], *reply.token_ids]
    logits = np.array(model.logits(Prompt(grown)))[0]
    sampler = Sampler(sampling, model.config.generation, TINY.vocab)
    for n in (*range(2, 40), *range(step - 20, step + 20), *range(2 * step - 9, 2 * step + 50), count + 1):
        seen = mx.array(np.isin(np.arange(TINY.vocab), grown[: n + 1]))[None]
        best = sampler.probabilities(mx.array(logits[n : n + 1]), seen).argmax(axis=1).item()
        assert grown[n + 1] == best, n
    assert len(set(reply.token_ids)) > 30


@pytest.mark.parametrize(("length", "most"), [(0, 1), (3, 1), ("auto", 1 + MAX_DRAFTS)])
def test_a_long_reply_is_traced_once_for_each_draft_length(
    endless: Loaded, monkeypatch: pytest.MonkeyPatch, length: int | str, most: int
) -> None:
    """And the next one about as long, with another prompt, not at all."""
    model, _ = endless
    made: list[tuple[Any, ...]] = []
    make_round = speculate.make_round
    monkeypatch.setattr(learnt_of(model), "rounds", {})
    monkeypatch.setattr(speculate, "make_round", lambda *args: made.append(args) or make_round(*args))

    def write(ids: list[int], tokens: int) -> None:
        reply = generate(
            *endless, Prompt(ids), max_tokens=tokens, sampling=GREEDY, draft_length=length, repetition_detection="off"
        )
        assert len(reply.token_ids) == tokens

    write(IDS, 1500)
    assert 1 <= len(made) <= most
    if length != "auto":
        write(IDS * 3, 1400)
        assert len(made) == 1


# --- logits that are not finite ------------------------------------------------------------------


@pytest.mark.parametrize("length", [0, 1, 7, "auto"])
@pytest.mark.parametrize("wrong", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("after", [0, 1, 6])
def test_logits_that_are_not_finite_end_a_reply_with_one_line(
    planted_folder: Path, length: int | str, wrong: float, after: int
) -> None:
    """What was said before is given; wherever it happens, with and without drafts."""
    loaded = load(planted_folder)
    model = loaded[0]
    model.config = replace(model.config, generation=replace(model.config.generation, eos_token_ids=()))
    said = reply_of(loaded, 0).token_ids
    after = next(n for n in range(after, 24) if n == 0 or said[n - 1] not in [*IDS, *said[: n - 1]])
    broken = IDS[-1] if after == 0 else said[after - 1]  # the embedding of the token whose successor is asked for
    embed = model.language_model.embed

    def spoilt(ids: mx.array) -> mx.array:
        return mx.where((ids == broken)[..., None], wrong, embed(ids))

    model.language_model.embed = spoilt
    model.engine = None
    pieces = stream_generate(*loaded, Prompt(IDS), max_tokens=24, sampling=GREEDY, draft_length=length)
    got: list[int] = []
    with pytest.raises(RuntimeError) as caught:
        for piece in pieces:
            got += piece.token_ids
    assert str(caught.value) == (
        f"the logits after {len(got)} tokens of the reply are not finite; expected sound weights, "
        "or a wider computing type"
    )
    assert got == said[: len(got)] and len(got) <= after  # a round that is spoilt in its middle gives nothing
    assert after - len(got) <= (7 if length else 0)


def test_sampled_replies_end_so_too(planted_folder: Path) -> None:
    loaded = load(planted_folder)
    loaded[0].language_model.norm.weight = loaded[0].language_model.norm.weight * math.nan
    for length in (0, 3):
        with pytest.raises(RuntimeError, match=r"^the logits after 0 tokens of the reply are not finite; expected "):
            reply_of(loaded, length, sampling=Sampling(temperature=1.0, seed=3))


# --- the machine is left as it was -------------------------------------------------------------


def test_closing_a_reply_early_is_clean(endless: Loaded) -> None:
    before = mx.set_cache_limit(123 * 2**20)
    try:
        for taken in (0, 1, 4):
            pieces = stream_generate(*endless, Prompt(IDS), max_tokens=500, sampling=GREEDY, draft_length=3)
            for _ in range(taken):
                next(pieces)
            pieces.close()  # type: ignore[attr-defined]
            assert mx.set_cache_limit(123 * 2**20) == 123 * 2**20
        reply_of(endless)
        assert mx.set_cache_limit(123 * 2**20) == 123 * 2**20
        with pytest.raises(ZeroDivisionError):
            for _ in stream_generate(*endless, Prompt(IDS), max_tokens=500, sampling=GREEDY):
                raise ZeroDivisionError
        assert reply_of(endless, 3).token_ids == reply_of(endless, 0).token_ids
    finally:
        mx.set_cache_limit(before)


def test_requests_may_be_interleaved(endless: Loaded) -> None:
    """They share compiled rounds and the controller, and nothing else."""
    prompts = [IDS, IDS[3:9], IDS[::-1]]
    alone = [generate(*endless, Prompt(ids), max_tokens=30, sampling=GREEDY).token_ids for ids in prompts]
    together: list[list[int]] = [[], [], []]
    streams = [stream_generate(*endless, Prompt(ids), max_tokens=30, sampling=GREEDY) for ids in prompts]
    for pieces in itertools.zip_longest(*streams):
        for found, piece in zip(together, pieces, strict=True):
            found += piece.token_ids if piece else []
    assert together == alone


def test_requests_that_overlap_leave_the_limits_as_they_were(endless: Loaded) -> None:
    before = mx.set_cache_limit(1 << 25)
    try:
        streams = [stream_generate(*endless, Prompt(IDS), max_tokens=5, sampling=GREEDY) for _ in range(2)]
        for stream in streams:
            next(stream)
        for stream in streams:
            list(stream)
        assert mx.set_cache_limit(before) == 1 << 25
    finally:
        mx.set_cache_limit(before)


def test_a_model_that_has_generated_is_freed_with_its_last_name(planted_folder: Path) -> None:
    model, processor = load(planted_folder)
    generate(model, processor, Prompt(IDS), max_tokens=8, sampling=GREEDY, draft_length=2)
    gone = weakref.ref(model)
    del model
    assert gone() is None


def test_a_model_may_be_loaded_in_one_thread_and_used_in_another(planted_folder: Path) -> None:
    """In a process of its own: MLX's threads may abort it at the very end."""
    code = f"""
from concurrent.futures import ThreadPoolExecutor
from mlx_gemma4 import Prompt, Sampling, generate, load
loaded = load({str(planted_folder)!r})
def ask():
    return generate(*loaded, Prompt({IDS}), max_tokens=8, sampling=Sampling(temperature=0)).token_ids
with ThreadPoolExecutor(1) as pool:
    replies = [pool.submit(ask).result(), ask()]
print(replies[0] == replies[1], flush=True)
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60)
    assert done.stdout == "True\n", done.stderr


# --- sampling ----------------------------------------------------------------------------------


@pytest.mark.parametrize("length", [0, 3])
def test_a_seed_makes_a_reply_again(endless: Loaded, length: int) -> None:
    def reply(seed: int | None) -> list[int]:
        sampling = Sampling(temperature=2.0, top_k=0, top_p=1.0, seed=seed)
        return reply_of(endless, length, sampling=sampling).token_ids

    assert reply(5) == reply(5) != reply(6)
    assert reply(None) != reply(None)


def test_the_rounds_used_last_are_kept(endless: Loaded, monkeypatch: pytest.MonkeyPatch) -> None:
    """Each is compiled for a length and for the caches' slots, of which a long day brings many."""
    model, processor = endless
    monkeypatch.setattr(speculate, "KEPT_ROUNDS", 3)
    monkeypatch.setattr(learnt_of(model), "rounds", {})

    def kept(prompt_length: int) -> list[Any]:
        prompt = Prompt([IDS[-1]] * prompt_length)
        generate(model, processor, prompt, max_tokens=4, sampling=GREEDY, draft_length=1)
        return list(learnt_of(model).rounds.values())

    one = kept(20)
    assert kept(30) == one  # not compiled again
    assert kept(1300) == [*one, *kept(1310)[-1:]]
    assert len(kept(2600)) == len(kept(3900)) == 3
    assert kept(20)[-1] is not one[0]


@pytest.mark.parametrize(("kept", "known"), [(0.0, True), (0.04, True), (0.06, False)])
def test_a_round_is_timed_unless_the_caller_takes_longer(
    monkeypatch: pytest.MonkeyPatch, kept: float, known: bool
) -> None:
    """It reads every 0.1 s and the caller keeps each piece for a part of that."""
    now = 0.0
    monkeypatch.setattr(time, "perf_counter", lambda: now)
    clock = RoundClock()
    times = []
    for _ in range(4):
        clock.launched(2, False)
        now += 0.1 - kept
        times.append(clock.read())
        now += kept
        clock.resumed()
    assert times[0] is None
    assert times[1:] == ([pytest.approx(0.1)] * 3 if known else [None] * 3)


def test_what_was_measured_before_does_not_change_what_a_seed_gives(
    endless: Loaded, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Though "auto" drafts as many as times and acceptance say."""
    model, _ = endless
    sampling = Sampling(temperature=2.0, top_k=0, top_p=1.0, seed=5)
    replies = []
    for best in (0, 2, 7):
        times = {0: deque([1.0] * 3), 2: deque([1.0] * 2), best: deque([1.0] * 3)}
        monkeypatch.setattr(learnt_of(model), "controllers", {(1, False): Controller(times=times, best=best)})
        replies.append(reply_of(endless, "auto", 30, sampling).token_ids)
    assert replies[0] == replies[1] == replies[2]


def test_what_sampling_leaves_open_comes_from_the_checkpoint(endless: Loaded, configure: Callable[..., None]) -> None:
    configure(eos_token_ids=(), temperature=0.0)
    greedy = reply_of(endless, 0).token_ids
    assert reply_of(endless, 1, sampling=Sampling()).token_ids == greedy
    configure(eos_token_ids=(), temperature=1.5, top_k=1)
    assert reply_of(endless, 1, sampling=Sampling()).token_ids == greedy
    assert reply_of(endless, 1, sampling=Sampling(top_k=0, top_p=1.0, seed=3)).token_ids != greedy
    configure(eos_token_ids=(), temperature=0.0, repetition_penalty=1.5)
    penalized = reply_of(endless, 0, sampling=Sampling()).token_ids
    assert penalized != greedy
    assert reply_of(endless, 1, sampling=Sampling(repetition_penalty=1.5, temperature=0)).token_ids == penalized
    assert reply_of(endless, 1, sampling=Sampling(repetition_penalty=1.0)).token_ids == greedy


# --- thoughts and tool calls -------------------------------------------------------------------

CALL = '<|tool_call>call:weather{city:<|"|>rome<|"|>}<tool_call|>'
CALLED = [{"name": "weather", "arguments": {"city": "rome"}}]

Say = Callable[..., Reply]


@pytest.fixture
def say(planted: Loaded, configure: Callable[..., None], monkeypatch: pytest.MonkeyPatch) -> Say:
    """say("yes<turn|>") is the reply when what the host reads of the device are these tokens, in runs of 1 to 3."""
    configure(eos_token_ids=(1, 106, 50))
    tokenizer = planted[1].tokenizer

    def said(text: str, prompt: str = "a", max_tokens: int = 200, seed: int = 0) -> Reply:
        left = tokenizer.encode(text, add_special_tokens=False).ids
        rng = np.random.default_rng(seed)

        def tokens_of(array: mx.array) -> list[int]:
            run = [left.pop(0) for _ in range(min(len(left), int(rng.integers(1, array.size + 1))))]
            return run + [-1] * (array.size - len(run))

        for module in (generation, batch):
            monkeypatch.setattr(module, "tokens_of", tokens_of)
        ids = tokenizer.encode(prompt, add_special_tokens=False).ids
        return generate(*planted, Prompt(ids), max_tokens=max_tokens, sampling=GREEDY, draft_length=2)

    return said


@pytest.mark.parametrize("seed", range(5))
def test_thought_answer_and_calls_are_told_apart(say: Say, seed: int) -> None:
    """However they are cut into rounds."""
    reply = say(f"<|channel>thought\nhm, the quick<channel|>héllo {CALL}you<turn|>", seed=seed)
    assert (reply.thinking, reply.text, reply.tool_calls) == ("hm, the quick", "héllo you", CALLED)
    assert reply.finish_reason == "stop"
    assert reply.message["content"] == "héllo you"


def test_a_stream_ends_with_the_message_of_the_reply(planted: Loaded) -> None:
    pieces = list(stream_generate(*planted, Prompt([5, 6]), max_tokens=5, sampling=GREEDY, draft_length=0))
    reply = generate(*planted, Prompt([5, 6]), max_tokens=5, sampling=GREEDY, draft_length=0)
    whole = collect(pieces)
    assert replace(whole, stats=reply.stats) == reply
    assert [piece.message for piece in pieces[:-1]] == [None] * (len(pieces) - 1)
    assert pieces[-1].message == reply.message


def test_what_a_prompt_notes_comes_with_the_first_piece(planted: Loaded) -> None:
    prompt = Prompt([5, 6], notes=("long",))
    first, *rest = stream_generate(*planted, prompt, max_tokens=3, sampling=GREEDY, draft_length=0)
    assert first.notes[:1] == ["long"] and not any("long" in piece.notes for piece in rest)


def test_a_reply_need_not_think_or_call(say: Say) -> None:
    reply = say("yes<turn|>")
    assert (reply.thinking, reply.text, reply.tool_calls, reply.finish_reason) == (None, "yes", [], "stop")


def test_a_call_waits_for_its_response(say: Say) -> None:
    """The model opens the response itself, which is a stop token."""
    reply = say(f"{CALL}<|tool_response>and more")
    assert (reply.text, reply.tool_calls, reply.finish_reason) == ("", CALLED, "stop")


def test_a_reply_may_begin_inside_the_thought(say: Say) -> None:
    reply = say("go on<channel|>done<turn|>", prompt="a<|turn>model\n<|channel>thought\nhm")
    assert (reply.thinking, reply.text) == ("go on", "done")


def test_a_thought_that_runs_out_of_tokens_is_said(say: Say) -> None:
    reply = say("<|channel>thought\nhm, the quick one goes on", max_tokens=9)
    assert reply.notes == ["the 9 tokens ran out inside the thought; raise max_tokens"]
    assert reply.text == "" and reply.thinking and reply.finish_reason == "length"


def test_an_answer_that_runs_out_of_tokens_is_not_warned_of(say: Say) -> None:
    reply = say("<|channel>thought\nhm<channel|>and the quick one", max_tokens=14)
    assert (reply.finish_reason, reply.notes) == ("length", [])


# --- wrong requests ----------------------------------------------------------------------------

MESSAGES = [{"role": "user", "content": "a"}]
WRONG: dict[str, tuple[Any, dict[str, Any], str]] = {
    "max_tokens 0": ("a", {"max_tokens": 0}, "max_tokens is 0; expected a whole number, 1 or more"),
    "max_tokens 1.5": ("a", {"max_tokens": 1.5}, "max_tokens is 1.5; expected a whole number, 1 or more"),
    "sampling None": ("a", {"sampling": None}, "sampling is None; expected Sampling(…)"),
    "sampling {}": ("a", {"sampling": {"temperature": 0}}, "sampling is {'temperature': 0}; expected Sampling(…)"),
    "image_budget '70'": ("a", {"images": ["a.png"], "image_budget": "70"}, "image_budget is '70'; expected one of"),
    "max_tokens True": ("a", {"max_tokens": True}, "max_tokens is True; expected a whole number, 1 or more"),
    "draft_length 8": ("a", {"draft_length": 8}, "draft_length is 8; expected 'auto' or a whole number from 0 to 7"),
    "draft_length -1": ("a", {"draft_length": -1}, "draft_length is -1; expected 'auto' or a whole number"),
    "draft_length 'no'": ("a", {"draft_length": "no"}, "draft_length is 'no'; expected 'auto' or a whole number"),
    "draft_length True": ("a", {"draft_length": True}, "draft_length is True; expected 'auto' or a whole number"),
    "images": (MESSAGES, {"images": ["a.png"]}, "put them in the messages"),
    "audios": (MESSAGES, {"audios": ["a.wav"]}, "put them in the messages"),
    "videos": (Prompt(IDS), {"videos": ["a.mp4"]}, "put them in the messages"),
    "system": (MESSAGES, {"system": "be brief"}, "put them in the messages"),
    "tools": (Prompt(IDS), {"tools": [{"name": "weather"}]}, "a Prompt is taken as it stands"),
    "tools array": (Prompt(IDS), {"tools": np.zeros(3)}, "a Prompt is taken as it stands"),
    "thinking": (Prompt(IDS), {"thinking": True}, "a Prompt is taken as it stands"),
    "image_budget": (Prompt(IDS), {"image_budget": 70}, "a Prompt is taken as it stands"),
}


@pytest.mark.parametrize("function", [generate, stream_generate])
@pytest.mark.parametrize("what", WRONG)
def test_a_wrong_request_is_refused_when_it_is_made(planted: Loaded, what: str, function: Callable[..., Any]) -> None:
    """`stream_generate` too: not only when its first piece is asked for."""
    request, more, message = WRONG[what]
    with pytest.raises(ValueError) as refused:
        function(*planted, request, **more)
    assert message in str(refused.value) and "\n" not in str(refused.value)


def test_drafting_without_a_drafter_is_refused(tiny: Loaded) -> None:
    with pytest.raises(ValueError, match=r"draft_length is 2 and the model has no drafter; expected 0, or load one"):
        generate(*tiny, Prompt(IDS), draft_length=2)


def test_without_a_drafter_it_decodes_plainly(tiny: Loaded) -> None:
    for length in ("auto", 0):
        stats = generate(*tiny, Prompt(IDS), max_tokens=6, sampling=GREEDY, draft_length=length).stats
        assert (stats.drafted_tokens, stats.accepted_tokens, stats.tokens_per_round) == (0, 0, 1)


def test_no_more_is_wired_than_requests_take(monkeypatch: pytest.MonkeyPatch) -> None:
    """Requests that overlap add up, their model counted once, to the machine's working set at most; the last sets the
    limit back."""
    limits = [5]  # as it was before

    def set_limit(limit: int) -> int:
        limits.append(limit)
        return limits[-2]

    monkeypatch.setattr(mx.metal, "is_available", lambda: True)
    monkeypatch.setattr(mx, "device_info", lambda: {"max_recommended_working_set_size": 100})
    monkeypatch.setattr(mx, "set_wired_limit", set_limit)
    bounded = generation.BoundedMemory()

    def needed(caches: int, drafter: int = 3) -> Prediction:
        return Prediction(weights=20, drafter=drafter, sliding=0, full=caches, workspace=2)

    with bounded.request(needed(15)):
        with bounded.request(needed(5)), pytest.raises(RuntimeError), bounded.request(needed(90)):
            raise RuntimeError
        with bounded.request(needed(5, drafter=0)):  # another model
            pass
        assert limits == [5, 40, 47, 100, 47, 40, 67, 40]
    assert limits[-1] == 5
