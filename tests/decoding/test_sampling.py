"""Sampling: the distribution against transformers' filters written with numpy, and the draws from it."""

from typing import Any

import mlx.core as mx
import numpy as np
import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from mlx_gemma4 import Sampling, generate
from mlx_gemma4.config import GenerationConfig
from mlx_gemma4.decoding.sampling import IN_PROMPT, Sampler, draw, largest, told
from mlx_gemma4.model.model import Model
from mlx_gemma4.prompt.processor import Processor
from mlx_gemma4.prompt.prompt import Prompt

PLAIN = GenerationConfig(eos_token_ids=(1,))


# --- the largest -------------------------------------------------------------------------------


@settings(max_examples=300, deadline=None)
@given(
    rows=st.integers(1, 4), n=st.integers(1, 700), k=st.integers(1, 100), few=st.booleans(), data=st.data(),
    seed=st.integers(0, 2**32 - 1),
)  # fmt: skip
def test_largest_are_those_that_sorting_gives(
    rows: int, n: int, k: int, few: bool, data: st.DataObject, seed: int
) -> None:
    k = min(k, n)
    rng = np.random.default_rng(seed)
    # few different values: many ties
    x = (rng.integers(-3, 3, (rows, n)) if few else rng.standard_normal((rows, n))).astype(np.float32)
    x[rng.random((rows, n)) < data.draw(st.sampled_from([0, 0.3, 0.99, 1]))] = -np.inf
    assert np.array_equal(np.array(largest(mx.array(x), k)), np.sort(x, axis=-1)[:, ::-1][:, :k])


@pytest.mark.parametrize("k", [1, 64, 4000])
def test_largest_of_a_whole_vocabulary(k: int) -> None:
    x = np.random.default_rng(k).standard_normal((2, 262144)).astype(np.float32)
    x[0, :200] = 9.0  # all in one place
    assert np.array_equal(np.array(largest(mx.array(x), k)), np.sort(x, axis=-1)[:, ::-1][:, :k])


# --- the distribution --------------------------------------------------------------------------


def softmax(x: np.ndarray) -> np.ndarray:
    e = np.exp(x - x.max())
    return e / e.sum()


def filtered(
    logits: np.ndarray, seen: np.ndarray | None, suppress: list[int], chosen: dict[str, float]
) -> tuple[np.ndarray, float]:
    """Probabilities [V] in float64, one filter after the other in the order in which transformers has them.

    Also how near a filter was to deciding otherwise.
    """
    x, lead = logits.astype(np.float64), np.inf
    if seen is not None:
        x = np.where(seen, np.where(x < 0, x * chosen["repetition_penalty"], x / chosen["repetition_penalty"]), x)
    x[suppress] = -np.inf
    x /= chosen["temperature"]
    if 0 < (top_k := int(chosen["top_k"])) < len(x):
        last, following = np.sort(x)[::-1][top_k - 1 : top_k + 1]
        lead = last - following if last > -np.inf else lead
        x[x < last] = -np.inf
    if chosen["top_p"] < 1:
        order = np.argsort(x)  # ascending; the smallest go while together they are at most 1 - top_p
        below = softmax(x)[order].cumsum()
        removed = below <= 1 - chosen["top_p"]
        removed[-1] = False
        lead = min(lead, np.abs(below - (1 - chosen["top_p"])).min())
        x[order[removed]] = -np.inf
    if chosen["min_p"] > 0:
        probabilities = softmax(x)
        lead = min(lead, np.abs(probabilities / probabilities.max() - chosen["min_p"]).min())
        x[probabilities < chosen["min_p"] * probabilities.max()] = -np.inf
    return softmax(x), lead


chosen_values = st.fixed_dictionaries(
    {
        "temperature": st.floats(0.05, 5),
        "top_k": st.sampled_from([0, 1, 2, 5, 64, 5000]),
        "top_p": st.sampled_from([1.0, 0.95, 0.5]) | st.floats(0.01, 1),
        "min_p": st.sampled_from([0.0, 0.05]) | st.floats(0, 1),
        "repetition_penalty": st.sampled_from([1.0, 1.3]) | st.floats(0.5, 3),
    }
)


@settings(max_examples=300, deadline=None)
@given(
    vocab=st.sampled_from([2, 7, 64, 3000]), chosen=chosen_values, seen=st.booleans(),
    suppressed=st.integers(0, 5), spread=st.sampled_from([0.1, 1, 8]), seed=st.integers(0, 2**32 - 1),
)  # fmt: skip
def test_probabilities_are_those_of_transformers_filters(
    vocab: int, chosen: dict[str, Any], seen: bool, suppressed: int, spread: float, seed: int
) -> None:
    rng = np.random.default_rng(seed)
    logits = (rng.standard_normal((2, vocab)) * spread).astype(np.float32)
    told = rng.random((2, vocab)) < 0.3 if seen else None
    suppress = rng.permutation(vocab)[: min(suppressed, vocab - 1)].tolist()
    expected, leads = zip(
        *(filtered(row, None if told is None else told[i], suppress, chosen) for i, row in enumerate(logits)),
        strict=True,
    )
    assume(min(leads) > 1e-5)  # else rounding decides
    defaults = GenerationConfig(eos_token_ids=(1,), suppress_tokens=tuple(suppress))
    sampler = Sampler(Sampling(**chosen), defaults, vocab)
    found = sampler.probabilities(mx.array(logits), None if told is None else mx.array(told))
    assert found.dtype == mx.float32
    assert np.array(found) == pytest.approx(np.stack(expected), abs=2e-5)
    assert not np.array(found)[np.stack(expected) == 0].any()
    assert np.array(found)[np.stack(expected) > 1e-30].all()


@pytest.mark.parametrize("seed", range(20))
def test_penalties_and_biases_are_added_to_the_logits_as_openai_counts_them(seed: int) -> None:
    rng = np.random.default_rng(seed)
    logits = (rng.standard_normal((3, 40)) * 4).astype(np.float32)
    counts, told = rng.integers(0, 4, (3, 40)) * (rng.random((3, 40)) < 0.4), rng.random((3, 40)) < 0.3
    frequency, presence, repetition = (float(rng.uniform(*bounds)) for bounds in ((-2, 2), (-2, 2), (0.5, 2)))
    bias = {int(token): float(rng.uniform(-100, 100)) for token in rng.choice(40, 3)} | {39: -np.inf}
    x = logits.astype(np.float64)
    x = np.where((counts > 0) | told, np.where(x < 0, x * repetition, x / repetition), x)
    x -= frequency * counts + presence * (counts > 0)
    x[:, [*bias]] += [*bias.values()]
    sampling = Sampling(
        temperature=1.0, top_k=0, top_p=1.0, repetition_penalty=repetition, frequency_penalty=frequency,
        presence_penalty=presence,
    )  # fmt: skip
    found = Sampler(sampling, PLAIN, 40, bias).probabilities(mx.array(logits), mx.array(counts + IN_PROMPT * told))
    assert np.array(found) == pytest.approx(np.stack([softmax(row) for row in x]), abs=2e-5)


@pytest.mark.parametrize("vocab", [5, 20, 21, 500, 70_000])
def test_what_is_told_is_of_the_logits_alone(vocab: int) -> None:
    logits = np.random.default_rng(vocab).standard_normal((2, 3, vocab)).astype(np.float32) * 3
    tokens = mx.array([[0, 1, 2], [4, 3, -1]])
    found, count = np.array(told(mx.array(logits), tokens)), min(20, vocab)
    expected = logits - np.log(np.exp(logits.astype(np.float64)).sum(axis=-1, keepdims=True))
    assert found[0, 1, 0] == pytest.approx(expected[0, 1, 1], abs=3e-4)
    assert found[:, :, 1 : count + 1] == pytest.approx(-np.sort(-expected, axis=-1)[:, :, :count], abs=3e-4)
    ids = found[:, :, count + 1 :].astype(int)
    assert np.take_along_axis(expected, ids, axis=-1) == pytest.approx(found[:, :, 1 : count + 1], abs=3e-4)


def test_ties_at_the_bound_stay_together() -> None:
    """As transformers' top-k has them; the draw among equals is fair then."""
    logits = mx.array([[2.0, 1.0, 1.0, 1.0, 0.0]])
    found = Sampler(Sampling(top_k=2), PLAIN, 5).probabilities(logits)
    assert (np.array(found)[0] > 0).tolist() == [True, True, True, True, False]


@pytest.mark.parametrize("vocab", [8, 3000])
def test_temperature_zero_is_all_on_the_best_that_is_not_suppressed(vocab: int) -> None:
    logits = np.random.default_rng(0).standard_normal((5, vocab)).astype(np.float32)
    best = logits.argmax(axis=-1)
    suppress = (int(best[0]), int(best[3]))
    logits_left = logits.copy()
    logits_left[:, suppress] = -np.inf
    sampler = Sampler(Sampling(temperature=0, top_k=3, top_p=0.5), GenerationConfig((1,), suppress), vocab)
    found = sampler.probabilities(mx.array(logits))
    assert np.array_equal(np.array(found), np.eye(vocab, dtype=np.float32)[logits_left.argmax(axis=-1)])
    assert draw(found, keys(0, 5), sampler.stages).tolist() == logits_left.argmax(axis=-1).tolist()


@pytest.mark.parametrize("temperature", [1e-6, 1e-40, 5e-324])
def test_the_coldest_draws_the_best(temperature: float) -> None:
    logits = mx.array([[29.9, 30.0, -30.0, 3.0]])
    sampler = Sampler(Sampling(temperature=temperature, top_k=0, top_p=1), PLAIN, 4)
    assert sampler.probabilities(logits).tolist() == [[0, 1, 0, 0]]


def test_temperature_zero_obeys_the_repetition_penalty() -> None:
    logits, seen = mx.array([[3.0, 2.0, -1.0], [-1.0, -1.5, -9.0]]), mx.array([[True, False, False]] * 2)
    sampler = Sampler(Sampling(temperature=0, repetition_penalty=2.0), PLAIN, 3)
    assert sampler.probabilities(logits, seen).argmax(axis=-1).tolist() == [1, 1]


def test_what_is_not_given_comes_from_the_checkpoint() -> None:
    defaults = GenerationConfig((1,), (), temperature=0.7, top_k=5, top_p=0.9, min_p=0.1, repetition_penalty=1.2)
    logits = np.random.default_rng(1).standard_normal((1, 50)).astype(np.float32)
    seen = mx.array(np.random.default_rng(2).random((1, 50)) < 0.5)
    values = {"temperature": 0.7, "top_k": 5, "top_p": 0.9, "min_p": 0.1, "repetition_penalty": 1.2}
    for name, other in (
        ("temperature", 2.0), ("top_k", 2), ("top_p", 0.3), ("min_p", 0.9), ("repetition_penalty", 3.0),
    ):  # fmt: skip
        expected, _ = filtered(logits[0], np.array(seen)[0], [], values | {name: other})
        found = Sampler(Sampling(**{name: other}), defaults, 50).probabilities(mx.array(logits), seen)
        assert np.array(found)[0] == pytest.approx(expected, abs=1e-6), name


# --- draws -------------------------------------------------------------------------------------


def keys(seed: int, count: int) -> mx.array:
    """Of so many rows, [count, 2]."""
    return mx.random.split(mx.random.key(seed), count)


def test_draws_follow_the_probabilities() -> None:
    """Chi-square: 31.26 is passed once in a thousand times by 11 degrees of freedom."""
    count = 20_000
    logits = mx.random.normal((1, 14), key=mx.random.key(3))
    sampler = Sampler(Sampling(temperature=1.3, top_k=12), PLAIN, 14)
    probabilities = sampler.probabilities(logits)
    drawn = draw(mx.repeat(probabilities, count, axis=0), keys(4, count), sampler.stages)
    assert drawn.dtype == mx.int32
    p = np.array(probabilities, np.float64)[0]
    counts = np.bincount(np.array(drawn), minlength=14)
    assert not counts[p == 0].any()
    expected = p[p > 0] / p.sum() * count
    assert len(expected) == 12
    assert ((counts[p > 0] - expected) ** 2 / expected).sum() < 31.26


def test_draws_need_no_normed_probabilities() -> None:
    sampler = Sampler(Sampling(), PLAIN, 4)
    drawn = np.array(draw(mx.array([[0.0, 0.03, 0.0, 0.01]] * 10_000), keys(5, 10_000), sampler.stages))
    assert set(drawn) == {1, 3}
    assert np.mean(drawn == 1) == pytest.approx(0.75, abs=0.02)  # 4.6 standard deviations


@pytest.mark.parametrize("temperature", [0, 1.0, 100.0])
def test_suppressed_tokens_are_never_drawn(temperature: float) -> None:
    suppress = (0, 5, 9)
    logits = np.zeros((1, 10), np.float32)
    logits[0, list(suppress)] = 30  # they would win
    sampler = Sampler(Sampling(temperature=temperature), GenerationConfig((1,), suppress), 10)
    probabilities = sampler.probabilities(mx.array(logits))
    assert not np.array(probabilities)[0, list(suppress)].any()
    drawn = draw(mx.repeat(probabilities, 5000, axis=0), keys(6, 5000), sampler.stages)
    assert not set(drawn.tolist()) & set(suppress)


def test_same_key_draws_the_same() -> None:
    sampler = Sampler(Sampling(temperature=1.0), PLAIN, 100)
    probabilities = mx.full((50, 100), 0.01)
    first, again, other = (draw(probabilities, keys(key, 50), sampler.stages).tolist() for key in (1, 1, 2))
    assert first == again != other


def test_same_seed_gives_the_same_reply_and_another_seed_another(tiny: tuple[Model, Processor]) -> None:
    model, processor = tiny

    def reply(seed: int | None) -> list[int]:
        sampling = Sampling(temperature=3.0, top_k=0, top_p=1.0, seed=seed)
        return generate(
            model, processor, Prompt([2, 150, 160]), max_tokens=12, sampling=sampling, draft_length=0
        ).token_ids

    assert reply(1) == reply(1) != reply(2)
    assert reply(None) != reply(None)


# --- values that there are not -----------------------------------------------------------------

NAN, INF = float("nan"), float("inf")
BAD: dict[str, tuple[str, list[Any]]] = {
    "temperature": ("0 or more", [-0.1, -1, NAN, INF, "1", True, [1.0]]),
    "top_p": ("above 0 and at most 1", [0, 0.0, -0.5, 1.01, 2, NAN, INF, "0.9", True]),
    "top_k": ("a whole number, 0 or more", [-1, 1.5, 64.0, NAN, INF, "64", True]),
    "min_p": ("from 0 to 1", [-0.01, 1.01, NAN, INF, "0", False]),
    "repetition_penalty": ("above 0", [0, 0.0, -1, NAN, INF, "1", True]),
    "seed": ("a whole number, from 0 to 2**64 - 1", [-1, 1.5, NAN, "7", True, 2**64]),
}
GOOD: dict[str, list[Any]] = {
    "temperature": [None, 0, 0.0, 1, 100.0],
    "top_p": [None, 1, 1.0, 1e-9],
    "top_k": [None, 0, 1, 10**9],
    "min_p": [None, 0, 1, 0.5],
    "repetition_penalty": [None, 1e-3, 1, 5.0],
    "seed": [None, 0, 2**64 - 1],
}


@pytest.mark.parametrize(("name", "value"), [(name, value) for name, (_, values) in BAD.items() for value in values])
def test_bad_value_is_refused_with_its_name_and_what_is_right(name: str, value: Any) -> None:
    with pytest.raises(ValueError) as refused:
        Sampling(**{name: value})
    message = str(refused.value)
    assert message.startswith(f"{name} is {value!r}; expected {BAD[name][0]}")
    assert "\n" not in message


@pytest.mark.parametrize(("name", "value"), [(name, value) for name, values in GOOD.items() for value in values])
def test_good_value_is_taken_up_to_its_bounds(name: str, value: Any) -> None:
    sampling = Sampling(**{name: value})
    assert getattr(sampling, name) == value
    probabilities = Sampler(sampling, PLAIN, 9).probabilities(mx.arange(9.0)[None])
    assert probabilities.sum().item() == pytest.approx(1)
