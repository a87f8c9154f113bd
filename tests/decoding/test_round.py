"""The round: what it accepts, the state that it leaves, and that the target's distribution is what comes out."""

import functools
import itertools
import math
import operator
import re
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from threading import Thread
from typing import Any

import mlx.core as mx
import numpy as np
import pytest
from rounds import (
    GREEDY,
    Rounds,
    hidden_states,
    made_prompt,
    make_sampler,
    reference_drafts,
    reference_round,
)
from toy_checkpoint import OTHER, TINY, Shape, config, drafter_config, drafter_tensors, tensors, write_drafter

from mlx_gemma4 import Prompt, Sampling, generate, load
from mlx_gemma4.config import FULL, SLIDING, GenerationConfig, parse_config
from mlx_gemma4.decoding import batch
from mlx_gemma4.decoding import round as speculate
from mlx_gemma4.decoding.controller import MAX_DRAFTS
from mlx_gemma4.decoding.round import State, accept, compiled
from mlx_gemma4.decoding.sampling import IN_PROMPT, Sampler, Stages
from mlx_gemma4.engine import generation
from mlx_gemma4.model import cache
from mlx_gemma4.model.arrange import arrange
from mlx_gemma4.model.drafter import Drafter, parse_drafter
from mlx_gemma4.model.model import Model
from mlx_gemma4.prompt.processor import Processor
from mlx_gemma4.weights.tensors import module_path

Loaded = tuple[Model, Processor]
Accept = Callable[[mx.array, mx.array, mx.array, mx.array, mx.array], tuple[mx.array, mx.array]]

LENGTHS = range(MAX_DRAFTS + 1)
SHAPES = {"planted": TINY, "planted_other": OTHER}
SAMPLED = Sampling(temperature=1.0, top_k=0, top_p=1.0)


@pytest.fixture
def models(planted: Loaded, planted_other: Loaded, monkeypatch: pytest.MonkeyPatch) -> dict[str, Loaded]:
    """The planted checkpoints, which no token stops."""
    found = {"planted": planted, "planted_other": planted_other}
    for model, _ in found.values():
        endless = replace(model.config, generation=replace(model.config.generation, eos_token_ids=()))
        monkeypatch.setattr(model, "config", endless)
    return found


def random_ids(length: int, seed: int) -> list[int]:
    return np.random.default_rng(seed).integers(110, 500, length).tolist()


# --- a round against a reference that keeps nothing ----------------------------------------------


def check_state(rounds: Rounds) -> None:
    """A round leaves what reading all tokens but the newest afresh would leave."""
    model, ids, state = rounds.model, rounds.ids, rounds.state
    assert state["offset"].item() == len(ids) - 1
    assert state["token"].tolist() == ids[-1:]
    expected = hidden_states(model, Prompt(ids[:-1], rounds.prompt.media))[-1]
    assert np.array(state["hidden"])[0, 0] == pytest.approx(expected, abs=1e-4)
    if rounds.sampler.numbers["penalty"] != 1:
        assert set(np.flatnonzero(np.array(state["seen"]))) == set(ids)
    else:
        assert "seen" not in state


@pytest.mark.parametrize("penalty", [1.0, 1.3])
@pytest.mark.parametrize("checkpoint", SHAPES)
def test_greedy_rounds_of_all_lengths_are_those_of_the_reference(
    models: dict[str, Loaded], checkpoint: str, penalty: float
) -> None:
    model, _ = models[checkpoint]
    sampler = make_sampler(model, replace(GREEDY, repetition_penalty=penalty))
    rounds = Rounds(model, sampler, Prompt(random_ids(12, seed=3)))
    accepted: dict[int, set[int]] = {length: set() for length in LENGTHS}
    for length in np.random.default_rng(0).permutation([*LENGTHS] * 2).tolist():
        drafts = reference_drafts(model, rounds.grown, length, penalty)
        expected = reference_round(model, rounds.grown, drafts, penalty)
        tokens = rounds.run(length)
        assert tokens == expected
        accepted[length].add(len(tokens) - 1)
        check_state(rounds)
    assert len(rounds.ids) > SHAPES[checkpoint].window
    if penalty == 1:
        assert {0, 1} <= set.union(*accepted.values())
        assert any(length in hits for length, hits in accepted.items() if length > 1)  # all accepted


@pytest.mark.parametrize("sampling", [SAMPLED, Sampling(temperature=0.6, top_k=9, repetition_penalty=1.2)], ids=str)
def test_sampled_rounds_leave_the_state_of_the_tokens_that_they_give(
    models: dict[str, Loaded], sampling: Sampling
) -> None:
    model, _ = models["planted"]
    rounds = Rounds(model, make_sampler(model, sampling), Prompt(random_ids(14, seed=4)), seed=2)
    accepted = set()
    for length in np.random.default_rng(1).permutation([*LENGTHS] * 2).tolist():
        accepted.add(len(rounds.run(length)) - 1)
        check_state(rounds)
    assert {0, 1} <= accepted


@pytest.fixture(scope="module")
def opinionated(planted_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Model:
    """A drafter that is not planted: what it proposes comes from the keys that it sees and from where it sees them."""
    return load(planted_folder, drafter=write_drafter(tmp_path_factory.mktemp("opinionated"), TINY))[0]


@pytest.mark.parametrize("length", [3, 7])
def test_rounds_draft_what_a_fresh_reading_would_propose(
    opinionated: Model, monkeypatch: pytest.MonkeyPatch, length: int
) -> None:
    """Past the window, with rejected rows behind the newest token."""
    made: list[list[int]] = []

    def seen_accept(
        p: mx.array, q: mx.array, drafts: mx.array, keys: mx.array, limit: mx.array
    ) -> tuple[mx.array, mx.array]:
        made.extend(drafts.tolist())
        assert np.array_equal(np.array(q.argmax(axis=2))[0], made[-1])
        return accept(p, q, drafts, keys, limit)

    monkeypatch.setattr(mx, "compile", lambda function: function)
    monkeypatch.setattr(speculate, "accept", seen_accept)
    rounds = Rounds(opinionated, make_sampler(opinionated, GREEDY), Prompt(random_ids(4, seed=9)))
    expected = []
    while len(rounds.ids) < 3 * TINY.window:
        expected.append(opinionated.draft(rounds.grown, length))
        rounds.run(length)
    assert made == expected
    assert len(made) > 2 * TINY.window  # hardly one was accepted


class Script:
    """A drafter that proposes what it is told."""

    def __init__(self, drafts: list[int], vocab: int):
        self.logits = mx.eye(vocab)[mx.array(drafts)]  # numbers would become part of a compiled kernel
        self.calls = 0

    def __call__(
        self, embedding: mx.array, hidden: mx.array, last: mx.array, masks: Any, stores: Any
    ) -> tuple[mx.array, mx.array]:
        row = self.calls % len(self.logits)
        self.calls += 1
        return self.logits[None, row : row + 1], hidden


def patterns() -> Iterator[tuple[bool, ...]]:
    """Which drafts are right: all ways for up to three, some for more."""
    for length in range(1, 4):
        yield from itertools.product((True, False), repeat=length)
    rng = np.random.default_rng(2)
    for length in range(4, MAX_DRAFTS + 1):
        yield (True,) * length
        yield from (tuple(row) for row in (rng.random((1, length)) < 0.7).tolist())


@pytest.mark.parametrize("penalty", [1.0, 1.3])
def test_drafts_behind_a_wrong_one_are_not_kept(planted_folder: Path, penalty: float) -> None:
    model, _ = load(planted_folder)
    sampler = make_sampler(model, replace(GREEDY, repetition_penalty=penalty))
    rounds = Rounds(model, sampler, Prompt(random_ids(11, seed=5)))
    for right in patterns():
        best: list[int] = []
        for _ in range(len(right) + 1):
            grown = Prompt([*rounds.ids, *best])
            best += reference_round(model, grown, [], penalty)
        drafts = [token if good else token + 1 for token, good in zip(best, right, strict=False)]
        hits = [*right, False].index(False)
        model.drafter = Script(drafts, TINY.vocab)
        tokens = rounds.run(len(right), fresh=True)
        assert tokens == best[: hits + 1]
        check_state(rounds)


def test_the_order_of_lengths_changes_no_greedy_token(models: dict[str, Loaded]) -> None:
    model, _ = models["planted"]
    sampler, prompt = make_sampler(model, GREEDY), Prompt(random_ids(5, seed=6))
    runs = []
    for lengths in ([0], [3], [7, 0, 1], [1, 6, 2]):
        rounds = Rounds(model, sampler, prompt)
        for length in itertools.cycle(lengths):
            rounds.run(length)
            if len(rounds.tokens) >= 60:
                break
        runs.append(rounds.tokens[:60])
    assert all(tokens == runs[0] for tokens in runs)
    assert len(set(runs[0])) > 5


# --- greedy replies ----------------------------------------------------------------------------


PROMPTS: dict[str, list[tuple[Any, ...]]] = {
    "short": [("text", 3)],
    "long": [("text", 45)],
    "image, sound and frames": [("text", 5), ("image", 4, 5), ("audio", 6), ("video", 2, 2), ("text", 4)],
    "image at the end": [("text", 2), ("image", 6, 5)],
}


def replies(loaded: Loaded, prompt: Prompt, sampling: Sampling, tokens: int) -> dict[int | str, list[int]]:
    model, processor = loaded
    found: dict[int | str, list[int]] = {}
    for length in (*LENGTHS, "auto"):
        reply = generate(model, processor, prompt, max_tokens=tokens, sampling=sampling, draft_length=length)
        assert length in (0, "auto") or reply.stats.drafted_tokens == length * reply.stats.rounds > 0
        found[length] = reply.token_ids
    return found


@pytest.mark.parametrize("prompt", PROMPTS)
@pytest.mark.parametrize("checkpoint", SHAPES)
def test_greedy_replies_are_the_same_at_every_length(models: dict[str, Loaded], checkpoint: str, prompt: str) -> None:
    """40 tokens cross the windows of 16 and 24."""
    made = made_prompt(PROMPTS[prompt], SHAPES[checkpoint], prompt)
    found = replies(models[checkpoint], made, GREEDY, 40)
    assert len(found[0]) == 40
    assert all(tokens == found[0] for tokens in found.values())


@pytest.mark.parametrize("checkpoint", SHAPES)
def test_a_repetition_penalty_keeps_greedy_replies_the_same(models: dict[str, Loaded], checkpoint: str) -> None:
    sampling, prompt = replace(GREEDY, repetition_penalty=1.3), Prompt(random_ids(20, seed=7))
    found = replies(models[checkpoint], prompt, sampling, 40)
    assert all(tokens == found[0] for tokens in found.values())
    model, processor = models[checkpoint]
    free = generate(model, processor, prompt, max_tokens=40, sampling=GREEDY, draft_length=0)
    assert found[0] != free.token_ids
    assert len(set(found[0])) > len(set(free.token_ids))


def test_suppressed_tokens_keep_greedy_replies_the_same(
    models: dict[str, Loaded], monkeypatch: pytest.MonkeyPatch
) -> None:
    model, processor = models["planted"]
    prompt = Prompt(random_ids(20, seed=8))
    usual = generate(model, processor, prompt, max_tokens=40, sampling=GREEDY, draft_length=0).token_ids
    frequent = [token for token, _ in Counter(usual).most_common(3)]
    generation = replace(
        model.config.generation, suppress_tokens=(*model.config.generation.suppress_tokens, *frequent)
    )  # fmt: skip
    monkeypatch.setattr(model, "config", replace(model.config, generation=generation))
    found = replies(models["planted"], prompt, GREEDY, 40)
    assert all(tokens == found[0] for tokens in found.values())
    assert not set(found[0]) & set(frequent)


@pytest.mark.parametrize("length", [0, 3, "auto"])
def test_the_host_reads_once_a_round(
    models: dict[str, Loaded], monkeypatch: pytest.MonkeyPatch, length: int | str
) -> None:
    model, processor = models["planted"]
    reads: list[tuple[int, ...]] = []
    read = batch.tokens_of

    def counted(array: mx.array) -> list[int]:
        reads.append(array.shape)
        return read(array)

    for module in (generation, batch):
        monkeypatch.setattr(module, "tokens_of", counted)
    monkeypatch.setattr(mx, "synchronize", lambda *_: pytest.fail("the host waits"))
    reply = generate(model, processor, Prompt(random_ids(9, 1)), max_tokens=30, sampling=GREEDY, draft_length=length)
    assert len(reads) == 1 + reply.stats.rounds  # the first token comes from the prompt
    assert reads[0] == (1,)
    if isinstance(length, int):
        assert set(reads[1:]) == {(1, length + 1)}


# --- the rule of acceptance --------------------------------------------------------------------


def critical(freedom: int) -> float:
    """Chi-square's value that is passed once in 10,000 times (Wilson and Hilferty: z is 3.719)."""
    return freedom * (1 - 2 / (9 * freedom) + 3.719 * math.sqrt(2 / (9 * freedom))) ** 3


def chi_square(counts: np.ndarray, expected: np.ndarray) -> tuple[float, float]:
    """The statistic and its critical value; cells below 5 are counted together, impossible ones give infinity."""
    assert counts.sum() == pytest.approx(expected.sum(), rel=1e-4)
    if counts[expected == 0].any():
        return math.inf, 0.0
    counts, expected = counts[expected > 0], expected[expected > 0]
    few = expected < 5
    observed, awaited = counts[~few].astype(float), expected[~few]
    if few.any():
        observed, awaited = np.append(observed, counts[few].sum()), np.append(awaited, expected[few].sum())
    return float(((observed - awaited) ** 2 / awaited).sum()), critical(len(awaited) - 1)


def test_critical_values_are_those_of_tables() -> None:
    assert critical(20) == pytest.approx(52.386, rel=0.01)
    assert critical(100) == pytest.approx(161.319, rel=0.003)


def rows_at(array: mx.array, places: mx.array) -> mx.array:
    """array [B, L, V], places [B] -> [B, V]."""
    return mx.take_along_axis(array, places[:, None, None], axis=1)[:, 0]


def with_p_for_the_residual(
    p: mx.array, q: mx.array, drafts: mx.array, keys: mx.array, limit: mx.array
) -> tuple[mx.array, mx.array]:
    accepted, _ = accept(p, q, drafts, keys, limit)
    return accepted, rows_at(p, accepted)


def with_the_rejected_draft(
    p: mx.array, q: mx.array, drafts: mx.array, keys: mx.array, limit: mx.array
) -> tuple[mx.array, mx.array]:
    accepted, rest = accept(p, q, drafts, keys, limit)
    rejected = mx.take_along_axis(mx.concatenate([drafts, drafts[:, :1]], axis=1), accepted[:, None], axis=1)
    own = (mx.arange(p.shape[2]) == rejected).astype(p.dtype)
    return accepted, mx.where((accepted < drafts.shape[1])[:, None], own, rest)


def without_its_limit(
    p: mx.array, q: mx.array, drafts: mx.array, keys: mx.array, limit: mx.array
) -> tuple[mx.array, mx.array]:
    """A draft beyond the limit counts as rejected."""
    accepted, _ = accept(p, q, drafts, keys, limit)
    rest = mx.maximum(rows_at(p, accepted) - rows_at(mx.pad(q, [(0, 0), (0, 1), (0, 0)]), accepted), 0)
    return accepted, mx.where(rest.sum(axis=1, keepdims=True) > 0, rest, rows_at(p, accepted))


def with_matching_ids_only(
    p: mx.array, q: mx.array, drafts: mx.array, keys: mx.array, limit: mx.array
) -> tuple[mx.array, mx.array]:
    """Exact too, but it accepts less: the draft is kept if the target draws it too."""
    drawn = mx.argmax(mx.log(p) + mx.random.gumbel(p.shape, key=keys[0]), axis=2)
    accepted = mx.cumprod((drawn[:, :-1] == drafts).astype(mx.int32), axis=1).sum(axis=1)
    own = mx.take_along_axis(drawn, accepted[:, None], axis=1)
    return accepted, (mx.arange(p.shape[2]) == own).astype(p.dtype)


V, RUNS = 5, 40_000


class Chain:
    """Target and drafter as tables: the next token's distribution after none, one and two tokens."""

    def __init__(self, seed: int):
        rng = np.random.default_rng(seed)
        self.rng = rng
        self.p = [rng.dirichlet(np.full(V, 0.7), V**n).astype(np.float32) for n in range(3)]  # [V^n, V]
        self.q = [rng.dirichlet(np.full(V, 0.7), V**n).astype(np.float32) for n in range(2)]
        self.p[1][:, 0] = 0  # the drafter proposes what the target never says
        self.p[1] /= self.p[1].sum(axis=1, keepdims=True)

    def draw(self, rows: np.ndarray) -> np.ndarray:
        return (rows.cumsum(axis=1) < self.rng.random((len(rows), 1))).sum(axis=1).clip(max=V - 1)

    def run(self, rule: Accept, limits: Sequence[int] = (2,)) -> tuple[np.ndarray, np.ndarray]:
        """Three tokens each of RUNS rows of two drafts, [RUNS, 3], and how many were accepted, [RUNS]."""
        first = self.draw(np.broadcast_to(self.q[0], (RUNS, V)))
        second = self.draw(self.q[1][first])
        q = np.stack([np.broadcast_to(self.q[0], (RUNS, V)), self.q[1][first]], axis=1)
        p = np.stack([np.broadcast_to(self.p[0], (RUNS, V)), self.p[1][first], self.p[2][first * V + second]], axis=1)
        drafts = np.stack([first, second], axis=1).astype(np.int32)
        keys = mx.random.split(mx.random.key(int(self.rng.integers(1 << 30))), RUNS)
        limit = mx.array(np.resize(limits, RUNS).astype(np.int32))
        found = rule(mx.array(p), mx.array(q), mx.array(drafts), keys, limit)
        accepted, rest = (np.array(array) for array in found)
        rest = rest.astype(np.float64)
        token = self.draw(rest / rest.sum(axis=1, keepdims=True))
        tokens = np.column_stack([drafts, np.zeros(RUNS, int)])
        tokens[np.arange(RUNS), accepted] = token
        for place in (1, 2):  # what the round leaves open, the target says
            own = self.p[place][tokens[:, 0] if place == 1 else tokens[:, 0] * V + tokens[:, 1]]
            tokens[:, place] = np.where(place > accepted, self.draw(own), tokens[:, place])
        return tokens, accepted

    def joint(self) -> np.ndarray:
        """[V³]."""
        return (self.p[0].reshape(V, 1, 1) * self.p[1].reshape(V, V, 1) * self.p[2].reshape(V, V, V)).ravel()

    def overlaps(self, combine: Callable[[np.ndarray, np.ndarray], np.ndarray]) -> tuple[float, float]:
        """How often the first, and both, of two drafts are accepted; `combine` is min or a product."""
        first, second = combine(self.p[0][0], self.q[0][0]), combine(self.p[1], self.q[1]).sum(axis=1)
        return float(first.sum()), float((first * second).sum())


def distance(chain: Chain, tokens: np.ndarray) -> float:
    """Chi-square of the emitted tokens, in critical values: above 1 they are not the target's."""
    cells = np.bincount(tokens @ [V * V, V, 1], minlength=V**3)
    statistic, bound = chi_square(cells, chain.joint() * RUNS)
    return statistic / bound if bound else math.inf


def accepted_as(accepted: np.ndarray, expected: tuple[float, float]) -> bool:
    """Within 4 standard errors."""
    return all(
        abs(np.mean(accepted > place) - share) < 4 * math.sqrt(share * (1 - share) / RUNS)
        for place, share in enumerate(expected)
    )


@pytest.mark.parametrize("seed", range(4))
def test_accepted_tokens_have_the_targets_joint_distribution(seed: int) -> None:
    chain = Chain(seed)
    tokens, accepted = chain.run(accept)
    assert distance(chain, tokens) < 1
    assert accepted_as(accepted, chain.overlaps(np.minimum))
    assert not accepted_as(accepted, chain.overlaps(np.multiply))


@pytest.mark.parametrize("seed", range(4))
@pytest.mark.parametrize("mutant", [with_p_for_the_residual, with_the_rejected_draft])
def test_wrong_rules_fail_the_same_check(seed: int, mutant: Accept) -> None:
    chain = Chain(seed)
    assert distance(chain, chain.run(mutant)[0]) > 1


@pytest.mark.parametrize("seed", range(4))
def test_rows_that_take_fewer_drafts_have_the_same_distribution(seed: int) -> None:
    chain = Chain(seed)
    tokens, accepted = chain.run(accept, limits := (0, 1, 2))
    for place, limit in enumerate(limits):
        assert accepted[place::3].max() == limit
    assert distance(chain, tokens) < 1
    assert distance(chain, chain.run(without_its_limit, limits)[0]) > 1


@pytest.mark.parametrize("seed", range(4))
def test_matching_ids_alone_would_accept_too_few(seed: int) -> None:
    chain = Chain(seed)
    tokens, accepted = chain.run(with_matching_ids_only)
    assert distance(chain, tokens) < 1
    assert accepted_as(accepted, chain.overlaps(np.multiply))
    assert not accepted_as(accepted, chain.overlaps(np.minimum))


def test_equal_distributions_accept_everything() -> None:
    """And leave the last row to draw from, though nothing is left of p - q."""
    p = mx.softmax(mx.random.normal((200, 4, 9), key=mx.random.key(0)), axis=-1)
    drafts = mx.random.categorical(mx.log(p[:, :3]), key=mx.random.key(1)).astype(mx.int32)
    keys = mx.random.split(mx.random.key(2), 200)
    accepted, rest = accept(p, p[:, :3], drafts, keys, mx.full((200,), 7))
    assert accepted.tolist() == [3] * 200
    assert mx.array_equal(rest, p[:, 3])


def test_each_row_has_numbers_of_its_own() -> None:
    """So that what one is given does not hang on where it sits, or beside whom."""
    p, q = (mx.softmax(mx.random.normal((6, 4, 9), key=mx.random.key(n)), axis=-1) for n in (0, 1))
    drafts = mx.random.categorical(mx.log(q[:, :3]), key=mx.random.key(2)).astype(mx.int32)
    keys, limit = mx.random.split(mx.random.key(3), 6), mx.full((6,), 7)
    accepted, rest = accept(p, q[:, :3], drafts, keys, limit)
    order = mx.array([4, 1, 5])
    some, left = accept(p[order], q[order, :3], drafts[order], keys[order], limit[order])
    assert mx.array_equal(some, accepted[order])
    assert mx.array_equal(left, rest[order])
    shorter, _ = accept(p[:, :3], q[:, :2], drafts[:, :2], keys, limit)
    assert mx.array_equal(shorter, mx.minimum(accepted, 2))


@pytest.mark.parametrize("right", list(itertools.product((True, False), repeat=3)), ids=str)
def test_at_temperature_zero_equal_ids_are_accepted(right: tuple[bool, ...]) -> None:
    best = [3, 1, 4, 2]
    drafts = [token if good else 0 for token, good in zip(best, right, strict=False)]
    p, q = mx.eye(6)[mx.array([best])], mx.eye(6)[mx.array([drafts])]
    accepted, rest = accept(p, q, mx.array([drafts], mx.int32), mx.random.key(7)[None], mx.array([7]))
    assert accepted.item() == [*right, False].index(False)
    assert rest.argmax(axis=1).item() == best[accepted.item()]
    assert rest.sum().item() == 1


# --- the distribution of what rounds give ----------------------------------------------------------

# Vocabulary of 24, of which these may be said.
SAID = range(8, 16)
SMALL = Shape(hidden=32, mlp=32, heads=2, kv_heads=1, head_dim=8, global_head_dim=16, window=8, vocab=24)
PROMPT = [2, 9, 4, 9, 5, 14, 6, 7, 14, 3, 9]  # longer than the window
SAMPLES, PASSES = 20_000, 8


def with_two_layers(raw: dict[str, Any]) -> dict[str, Any]:
    """One sliding and one full: enough for what rounds do, and quick."""
    raw["text_config"] |= {"layer_types": [SLIDING, FULL], "num_hidden_layers": 2}
    raw["text_config"]["num_kv_shared_layers"] = min(raw["text_config"]["num_kv_shared_layers"], 2)
    return raw


def full_layer(weights: dict[str, np.ndarray]) -> list[str]:
    last = max(int(found[1]) for name in weights if (found := re.search(r"layers\.(\d)\.", name)))
    return [name for name in weights if f"layers.{last}." in name]


@pytest.fixture(scope="module")
def small() -> Iterator[Model]:
    generation = GenerationConfig(
        eos_token_ids=(), suppress_tokens=tuple(token for token in range(SMALL.vocab) if token not in SAID)
    )  # fmt: skip
    model = Model(parse_config(with_two_layers(config(SMALL)), generation))
    drafter = Drafter(parse_drafter(with_two_layers(drafter_config(SMALL))))
    for module, weights in ((model, tensors(SMALL, 0)), (drafter, drafter_tensors(SMALL, 0, None))):
        own = {name: mx.array(weights[name]) for name in weights if not re.search(r"layers\.[1-9]\.", name)}
        own |= {re.sub(r"layers\.[35]\.", "layers.1.", name): mx.array(weights[name]) for name in full_layer(weights)}
        module.load_weights([(module_path(name), value) for name, value in own.items()])
    model.drafter = drafter
    arrange(model)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(cache, "STEP", 8)  # each sample has a cache of its own
        patch.setattr(cache, "ROUND", 4)
        yield model


def exact_joint(model: Model, sampler: Sampler, ids: list[int]) -> np.ndarray:
    """The probability of every three tokens that may follow, [8³], one after the other from uncached logits."""

    def following(said: tuple[int, ...]) -> np.ndarray:
        grown = [*ids, *said]
        seen = mx.array(counted(ids, said))[None] if sampler.stages.penalty else None
        row = np.array(sampler.probabilities(model.logits(Prompt(grown))[0, -1:], seen), np.float64)[0]
        assert row[SAID].sum() == pytest.approx(1, abs=1e-5)
        return row[SAID] / row[SAID].sum()

    first = following(())
    second = np.stack([following((a,)) for a in SAID])
    third = np.stack([[following((a, b)) for b in SAID] for a in SAID])
    return (first[:, None, None] * second[:, :, None] * third).ravel()


def counted(ids: Sequence[int], said: Sequence[int]) -> np.ndarray:
    """What penalties see; the first token of a reply stands behind the prompt in `ids`."""
    reply = [*ids[len(PROMPT) :], *said]
    return np.isin(np.arange(SMALL.vocab), PROMPT) * IN_PROMPT + np.bincount(reply, minlength=SMALL.vocab)


def sample_three(model: Model, samplers: Sequence[Sampler], length: int) -> tuple[np.ndarray, list[int]]:
    """The first three tokens of rows from one prompt with different keys, [SAMPLES, 3], and what goes before them; the
    samplers take turns. All rows of a pass go through the same rounds, and are soon at different places."""
    rounds = Rounds(model, samplers[0], Prompt(PROMPT), longest=length, room=4 * (length + 1) + 4)
    stages = functools.reduce(operator.or_, (sampler.stages for sampler in samplers))
    round_ = speculate.make_round(model, stages, length)
    count = SAMPLES // PASSES
    laws = [sampler.law() for sampler in samplers]
    if stages.bias:
        laws = [{"bias": mx.zeros((1, SMALL.vocab))} | law for law in laws]
    turns = {name: mx.concatenate([law[name] for law in laws])[mx.arange(count) % len(laws)] for name in laws[0]}
    if stages.penalty:
        turns["seen"] = mx.repeat(mx.array(counted(rounds.ids, ()).astype(np.int32))[None], count, axis=0)
    found: list[np.ndarray] = []
    for keys in mx.split(mx.random.split(mx.random.key(1), SAMPLES), PASSES):
        same = {name: mx.repeat(rounds.state[name], count, axis=0) for name in ("token", "hidden", "offset", "limit")}
        state = same | turns | {"random": keys}
        arrays = [tuple(mx.repeat(array, count, axis=0) for array in own) for own in rounds.caches.arrays]
        known: list[list[int]] = [[] for _ in range(count)]
        while min(map(len, known)) < 3:
            tokens, state, arrays = round_(state, arrays)
            mx.eval(tokens, state, arrays)
            for row, own in zip(known, tokens.tolist(), strict=True):
                row += [token for token in own if token >= 0]
        found.append(np.array([row[:3] for row in known]))
    return np.concatenate(found), rounds.ids


def distances_of_rounds(
    model: Model, samplings: Sequence[Sampling], length: int, bias: dict[int, float] | None = None
) -> list[float]:
    """Chi-square of the first three tokens of each sampling's rows, in critical values; the first has the bias."""
    defaults = model.config.generation
    samplers = [
        Sampler(sampling, defaults, SMALL.vocab, None if place else bias) for place, sampling in enumerate(samplings)
    ]
    tokens, ids = sample_three(model, samplers, length)
    assert tokens.shape == (SAMPLES, 3)
    found = []
    for turn, sampler in enumerate(samplers):
        own = tokens[np.arange(SAMPLES) % (SAMPLES // PASSES) % len(samplers) == turn]
        cells = np.bincount((own - SAID[0]) @ [64, 8, 1], minlength=512)
        statistic, bound = chi_square(cells, exact_joint(model, sampler, ids) * len(own))
        found.append(statistic / bound if bound else math.inf)
    return found


LAWS = [
    SAMPLED,
    Sampling(temperature=0.7, top_k=5, top_p=1.0),
    Sampling(temperature=1.0, top_k=0, top_p=0.8),
    Sampling(temperature=1.5, top_k=0, top_p=1.0, min_p=0.1),
    Sampling(temperature=1.0, top_k=0, top_p=1.0, repetition_penalty=1.3),
    Sampling(temperature=1.0, top_k=0, top_p=1.0, frequency_penalty=2.0),
    Sampling(temperature=1.0, top_k=6, top_p=0.95, frequency_penalty=-1.0, presence_penalty=1.5),
]


@pytest.mark.parametrize(("length", "sampling"), list(zip((1, 2, 3, 2, 3, 2, 3), LAWS, strict=True)), ids=str)
def test_three_tokens_of_rounds_have_the_targets_joint_distribution(
    small: Model, length: int, sampling: Sampling
) -> None:
    assert distances_of_rounds(small, [sampling], length)[0] < 1


@pytest.mark.parametrize("length", [0, 2])
def test_rows_of_one_round_have_each_their_own_law(small: Model, length: int) -> None:
    for own in distances_of_rounds(small, LAWS, length):
        assert own < 1


@pytest.mark.parametrize("length", [0, 2])
def test_a_bias_is_part_of_the_law_of_its_row_alone(small: Model, length: int) -> None:
    bias = {SAID[0]: 2.0, SAID[3]: -2.0, SAID[5]: -math.inf}
    for own in distances_of_rounds(small, [SAMPLED, SAMPLED], length, bias):
        assert own < 1


def uncounted(state: State, drafts: list[mx.array]) -> mx.array | None:
    """As if no draft had been said yet."""
    return mx.repeat(state["seen"][:, None], len(drafts) + 1, axis=1) if "seen" in state else None


def unbiased(drafter: Callable[..., Any]) -> Callable[..., Any]:
    """Drafts drawn with a bias, which their q then does not have."""

    def drafted(model: Model, stages: Stages, *rest: Any) -> Any:
        drafts, q = drafter(model, stages, *rest)
        return drafts, drafter(model, replace(stages, bias=False), *rest)[1] if drafts else q

    return drafted


def test_counts_without_the_drafts_fail_the_same_check(small: Model, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(speculate, "seen_by_place", uncounted)
    assert distances_of_rounds(small, [LAWS[5]], 2)[0] > 1


def test_another_bias_of_the_drafts_fails_the_same_check(small: Model, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(speculate, "draft", unbiased(speculate.draft))
    assert distances_of_rounds(small, [SAMPLED], 2, {SAID[0]: 2.0, SAID[3]: -2.0})[0] > 1


def test_greedy_rows_stay_greedy_beside_others(small: Model) -> None:
    samplers = [make_sampler(small, sampling) for sampling in (GREEDY, *LAWS)]
    tokens, ids = sample_three(small, samplers, 2)
    own = tokens[np.arange(SAMPLES) % (SAMPLES // PASSES) % len(samplers) == 0]
    expected: list[int] = []
    for _ in range(3):
        expected += reference_round(small, Prompt([*ids, *expected]), [])
    assert (own == expected).all()


@pytest.mark.parametrize("mutant", [with_p_for_the_residual, with_the_rejected_draft])
def test_rounds_with_a_wrong_rule_fail_the_same_check(
    small: Model, monkeypatch: pytest.MonkeyPatch, mutant: Accept
) -> None:
    monkeypatch.setattr(speculate, "accept", mutant)
    assert distances_of_rounds(small, [SAMPLED], 2)[0] > 1


def test_three_tokens_of_replies_have_the_targets_joint_distribution(small: Model, tiny: Loaded) -> None:
    """2,000 requests, a seed each; the first token comes from the prompt."""
    requests, sampling = 2_000, replace(SAMPLED, temperature=0.8)
    cells = np.zeros(512, int)
    accepted = drafted = 0
    for seed in range(requests):
        own = replace(sampling, seed=seed)
        reply = generate(small, tiny[1], Prompt(PROMPT), max_tokens=3, sampling=own, draft_length=2)
        first, second, third = (token - SAID[0] for token in reply.token_ids)
        cells[64 * first + 8 * second + third] += 1
        drafted, accepted = drafted + reply.stats.drafted_tokens, accepted + reply.stats.accepted_tokens
    assert 0.05 < accepted / drafted < 0.95
    statistic, bound = chi_square(cells, exact_joint(small, make_sampler(small, sampling), PROMPT) * requests)
    assert statistic < bound


def test_a_compiled_function_that_ran_in_two_threads_is_not_taken_for_one_that_follows() -> None:
    """MLX would run its trace for the next that lies at the same address."""
    for number in range(20):
        kept = [compiled(lambda x, number=number: x + number)]
        found = [kept[0](mx.array(1)).item()]
        other = Thread(target=lambda kept=kept, found=found: found.append(kept[0](mx.array(1)).item()))
        other.start()
        other.join()
        assert found == [1 + number] * 2
        del other
