"""Rows held to a form: what rounds give has the target's law held to the grammar, with drafts and without."""

import math
from collections.abc import Callable, Sequence
from dataclasses import replace

import mlx.core as mx
import numpy as np
import pytest
from decoding.test_round import PROMPT, SAID, SAMPLES, SMALL, chi_square, small, with_the_rejected_draft
from llguidance import LLMatcher, LLTokenizer
from rounds import Rounds, make_sampler
from toy import toy_tokenizer

from mlx_gemma4 import Prompt, Sampling
from mlx_gemma4.decoding import round as speculate
from mlx_gemma4.decoding.batch import Batch, Seat
from mlx_gemma4.decoding.constraint import Constraint, DeadEndError
from mlx_gemma4.decoding.sampling import Sampler
from mlx_gemma4.engine.generation import first_token
from mlx_gemma4.forms.form import Form
from mlx_gemma4.model.model import Model
from mlx_gemma4.reply.reply import Controls

__all__ = ["small"]

LETTERS = "abcdefgh"  # of SAID
# Which tokens are wrong at a place hangs on those before it; after c there is no choice, after "h" a b.
GRAMMAR = "[a-g](a[a-d]|b[c-h]|c|d[aceg]|[e-h][^d])[a-h]{0,2}|h(ba|bd|be)[a-h]{0,1}"


class Letters:
    """A vocabulary of 24 pieces: eight letters, and others that are never said."""

    size, end = SMALL.vocab, 0

    def __init__(self) -> None:
        self.is_tokenizer_wrapper, self.bos_token_id, self.eos_token_id = True, None, 0
        self.tokens = [LETTERS[n - SAID[0]].encode() if n in SAID else b"<%d>" % n for n in range(SMALL.vocab)]
        self.special_token_ids = [n for n in range(SMALL.vocab) if n not in SAID]
        self.read = LLTokenizer(self)  # type: ignore[arg-type]

    def __call__(self, text: str) -> list[int]:
        return [SAID[0] + LETTERS.index(letter) for letter in text]

    def tokenizer(self) -> LLTokenizer:
        return self.read


VOCABULARY = Letters()
CONTROLS = Controls.from_tokenizer(toy_tokenizer())


def constraint(grammar: str = GRAMMAR) -> Constraint:
    form = Form(LLMatcher.grammar_from_regex(grammar), None, False, True)
    return Constraint(form, VOCABULARY, CONTROLS, (), Prompt([2]))  # type: ignore[arg-type]


def allowed(said: Sequence[int]) -> np.ndarray:
    """[8] bool: which letters may follow these."""
    own = constraint()
    own.advance(said)
    bits = np.unpackbits(own.mask().view(np.uint8), bitorder="little")[: SMALL.vocab]
    return bits.astype(bool)[SAID]


def held_joint(model: Model, sampler: Sampler, ids: list[int]) -> np.ndarray:
    """The probability of every three letters, [8³]: uncached logits, held to the grammar, and then the filters."""
    found = np.zeros((8, 8, 8))

    def following(said: tuple[int, ...]) -> np.ndarray:
        may = np.zeros(SMALL.vocab, bool)
        may[SAID] = allowed(said)
        logits = mx.where(mx.array(may), model.logits(Prompt([*ids, *said]))[0, -1:], -mx.inf)
        return np.array(sampler.probabilities(logits), np.float64)[0][SAID]

    first = following(())
    for a in np.flatnonzero(first):
        second = following((SAID[a],))
        for b in np.flatnonzero(second):
            found[a, b] = first[a] * second[b] * following((SAID[a], SAID[b]))
    return found.ravel() / found.sum()


SAMPLED = Sampling(temperature=1.3, top_k=0, top_p=1.0)
Drawn = Callable[[Model, Sampler, int], np.ndarray]


def drawn_by_halves(model: Model, sampler: Sampler, length: int) -> np.ndarray:
    """The first three letters of rows that all begin at the prompt, [SAMPLES, 3]: many rows of one round."""
    count = SAMPLES // 8
    rounds = Rounds(model, sampler, Prompt(PROMPT), longest=max(length, 1), room=4 * (length + 1) + 4)
    first, second = speculate.make_halves(model, sampler.stages, length)
    masks: dict[tuple[int, ...], Constraint] = {}

    def at(said: tuple[int, ...]) -> Constraint:
        if said not in masks:
            masks[said] = constraint()
            try:
                masks[said].advance(said)
            except DeadEndError:  # with a mutant
                masks[said] = constraint("[a-h]*")
        return masks[said]

    found = []
    for keys in mx.split(mx.random.split(mx.random.key(3), SAMPLES), 8):
        state = {name: mx.repeat(array, count, axis=0) for name, array in rounds.state.items()} | {"random": keys}
        arrays = [tuple(mx.repeat(array, count, axis=0) for array in own) for own in rounds.caches.arrays]
        known: list[list[int]] = [[] for _ in range(count)]
        while min(map(len, known)) < 3:
            drafts, q = mx.zeros((count, 0), mx.int32), mx.zeros((count, 0, SMALL.vocab))
            if length:
                drafts, q = first(state, arrays)
            proposed = np.array(drafts).tolist()
            bits = np.stack([at(tuple(own[:3])).masks_for(more) for own, more in zip(known, proposed, strict=True)])
            tokens, state, arrays = second(state, arrays, drafts, q, mx.array(bits), mx.zeros(drafts.shape, mx.bool_))
            mx.eval(tokens, state, arrays)
            for row, own in zip(known, tokens.tolist(), strict=True):
                row += [token for token in own if token >= 0]
                del row[3:]  # what lies behind is not looked at
        found.append(np.array(known))
    return np.concatenate(found)


def distance(model: Model, tokens: np.ndarray, sampler: Sampler, ids: list[int]) -> float:
    """Chi-square in critical values."""
    cells = np.bincount((tokens - SAID[0]) @ [64, 8, 1], minlength=512)
    statistic, bound = chi_square(cells, held_joint(model, sampler, ids) * len(tokens))
    return statistic / bound if bound else math.inf


def distance_of_halves(model: Model, sampling: Sampling, length: int) -> float:
    sampler = make_sampler(model, sampling)
    first = Rounds(model, sampler, Prompt(PROMPT), room=16).ids
    return distance(model, drawn_by_halves(model, sampler, length), sampler, first)


LAWS = [SAMPLED, Sampling(temperature=0.7, top_k=3, top_p=1.0), Sampling(temperature=1.0, top_k=0, top_p=0.8)]


@pytest.mark.parametrize(("length", "sampling"), list(zip((0, 1, 3), LAWS, strict=True)), ids=str)
def test_three_tokens_of_held_rounds_have_the_law_held_to_the_grammar(
    small: Model, length: int, sampling: Sampling
) -> None:
    assert distance_of_halves(small, sampling, length) < 1


def masked_at_the_first_place_only(bits: mx.array, size: int) -> mx.array:
    spread = UNPACKED(bits, size)
    return spread | (mx.arange(bits.shape[1]) > 0)[:, None]


def masked_by_the_place_before(bits: mx.array, size: int) -> mx.array:
    spread = UNPACKED(bits, size)
    return mx.concatenate([spread[:, :1], spread[:, :-1]], axis=1)


UNPACKED = speculate.unpacked


@pytest.mark.parametrize("mutant", [masked_at_the_first_place_only, masked_by_the_place_before])
def test_masks_of_other_places_fail_the_same_check(
    small: Model, monkeypatch: pytest.MonkeyPatch, mutant: Callable[[mx.array, int], mx.array]
) -> None:
    monkeypatch.setattr(speculate, "unpacked", mutant)
    assert distance_of_halves(small, SAMPLED, 2) > 1


def test_a_wrong_rule_of_acceptance_fails_the_same_check(small: Model, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(speculate, "accept", with_the_rejected_draft)
    assert distance_of_halves(small, SAMPLED, 2) > 1


# --- whole replies, through Batch -------------------------------------------------------------------

REPLIES = 800


def reply(model: Model, sampler: Sampler, seed: int, drafts: int) -> list[int]:
    """As `generate` goes, without a processor."""
    own, prompt = constraint(), Prompt(PROMPT)
    caches = model.caches(len(PROMPT))
    *_, hidden = model.read(prompt, caches)
    seat = Seat(replace(sampler.stages, pauses=True), len(PROMPT), 8, drafts, own)
    state, first = first_token(model, sampler, prompt, hidden[:, -1:], seed, seat)
    batch, tokens = Batch(model), first.tokens
    batch.put(seat, caches, state)
    while len(tokens) < 3 and not own.is_finished:
        for given in batch.step():
            assert given.error is None
            tokens += given.tokens
    return tokens[:3]


@pytest.mark.parametrize("drafts", [0, 2])
def test_three_tokens_of_held_replies_have_the_law_held_to_the_grammar(small: Model, drafts: int) -> None:
    """What must come is taken as drafts; the law is the same."""
    sampler = make_sampler(small, SAMPLED)
    found = np.array([reply(small, sampler, seed, drafts) for seed in range(REPLIES)])
    assert distance(small, found, sampler, PROMPT) < 1


def forced_wrongly(self: Constraint, most: int) -> list[int]:
    """Letters that may come but need not, taken without a draw."""
    return [SAID[int(np.flatnonzero(allowed_after(self))[0])]][:most]


def allowed_after(own: Constraint) -> np.ndarray:
    return np.unpackbits(own.mask().view(np.uint8), bitorder="little")[: SMALL.vocab].astype(bool)[SAID]


def test_what_need_not_come_may_be_a_draft_all_the_same(small: Model, monkeypatch: pytest.MonkeyPatch) -> None:
    """A draft of which the drafter is sure is held against p like any other."""
    monkeypatch.setattr(Constraint, "forced", forced_wrongly)
    sampler = make_sampler(small, SAMPLED)
    found = np.array([reply(small, sampler, seed, 1) for seed in range(REPLIES)])
    assert distance(small, found, sampler, PROMPT) < 1


def test_drafts_that_are_taken_unseen_fail_the_same_check(small: Model, monkeypatch: pytest.MonkeyPatch) -> None:
    def all_accepted(
        p: mx.array, q: mx.array, drafts: mx.array, keys: mx.array, limit: mx.array
    ) -> tuple[mx.array, mx.array]:
        return mx.full(limit.shape, drafts.shape[1], mx.int32), p[:, -1]

    monkeypatch.setattr(Constraint, "forced", forced_wrongly)
    monkeypatch.setattr(speculate, "accept", all_accepted)
    sampler = make_sampler(small, SAMPLED)
    found = np.array([reply(small, sampler, seed, 1) for seed in range(REPLIES)])
    assert distance(small, found, sampler, PROMPT) > 1


def test_a_round_ends_at_a_pause() -> None:
    drafts, token = mx.array([[5, 9, 6], [9, 1, 2], [5, 6, 9], [5, 6, 7]]), mx.array([11, 12, 13, 14])
    accepted, newest = speculate.paused(mx.array([[9, -1]] * 2 + [[-1, 9]] * 2), drafts, mx.array([3, 1, 2, 3]), token)
    assert accepted.tolist() == [1, 0, 2, 3] and newest.tolist() == [9, 9, 13, 14]
