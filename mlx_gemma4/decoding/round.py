"""The round: draft k tokens, verify them and the newest in one pass, keep those accepted. Plain decoding is k = 0.

A round is a function of arrays with fixed shapes, compiled once for each k and capacity of the caches. All that
decides the next round stays on the device, so the host can hand over a round before it has seen the last one.
"""

import weakref
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial
from typing import cast

import mlx.core as mx

from mlx_gemma4.config import GenerationConfig
from mlx_gemma4.decoding.controller import MAX_DRAFTS, Controller
from mlx_gemma4.decoding.sampling import Sampler, Sampling
from mlx_gemma4.decoding.warmup import Warmup
from mlx_gemma4.model.cache import ROUND, Arrays, Caches, traced
from mlx_gemma4.model.model import Model
from mlx_gemma4.prompt.prompt import Prompt

# token [1] int32: the newest, which has no key yet; hidden [1, 1, D] at the position before it; offset [1]: the number
# of positions before it; random: a key; seen [V] bool: with a repetition penalty, the tokens so far.
State = dict[str, mx.array]
# tokens [k + 1] int32 (the accepted ones and one more, then NONE), the next state, the caches' arrays
Round = Callable[[State, list[Arrays]], tuple[mx.array, State, list[Arrays]]]
Accept = Callable[[mx.array, mx.array, mx.array, mx.array], tuple[mx.array, mx.array]]

NONE = -1  # in a round's tokens: none
NOT_FINITE = -2  # in place of a token whose logits are not finite

KEPT_ROUNDS = 32  # each takes megabytes on the host: five with the 48 layers of the 12B, more with drafts


@dataclass
class Learnt:
    """What one request leaves for the next: no part of it changes an answer."""

    controller: Controller = field(default_factory=Controller)
    rounds: dict[tuple[GenerationConfig, int, int], Round] = field(default_factory=dict)  # compiled
    fingerprint: bytes | None = None  # of the weights, once a store has asked
    warmups: dict[GenerationConfig, Warmup] = field(default_factory=dict)

    def __reduce__(self) -> tuple[type["Learnt"], tuple[()]]:
        return Learnt, ()  # nothing of it goes to another process with the model


def learnt_of(model: Model) -> Learnt:
    if model.engine is None:
        model.engine = Learnt()
    return cast(Learnt, model.engine)


def first_state(model: Model, sampler: Sampler, prompt_ids: list[int], hidden: mx.array, seed: int) -> State:
    """The state after a prompt has been read, from the hidden state of its last position, [1, 1, D]."""
    random, draw_key = mx.random.split(mx.random.key(seed))
    state = {"offset": mx.array([len(prompt_ids)]), "random": random, "hidden": hidden}
    if sampler.penalty != 1:
        state["seen"] = mx.zeros((model.config.text.vocab_size,), mx.bool_)
        state["seen"][mx.array(prompt_ids)] = True
    logits = model.language_model.head(hidden)[0]
    token = sampler.draw(sampler.probabilities(logits, seen_by_row(state, [])), draw_key)
    token = checked(token, logits)
    return see(state, token) | {"token": token}


def compiled_round(model: Model, sampler: Sampler, length: int, caches: Caches) -> tuple[Round, bool]:
    """The round that drafts `length` tokens, and whether it is new: the model keeps those that were used last.

    On a CPU it is not compiled before its kernels are there.
    """
    if not has_kernels(model, sampler):
        return plain_round(model, sampler, length), False
    rounds, key = learnt_of(model).rounds, (sampler.chosen, length, caches.slots)
    kept = rounds.pop(key, None)
    round_ = make_round(model, sampler, length) if kept is None else kept
    rounds[key] = round_
    for oldest in list(rounds)[:-KEPT_ROUNDS]:
        rounds.pop(oldest, None)
    return round_, kept is None


def has_kernels(model: Model, sampler: Sampler) -> bool:
    warmups, law = learnt_of(model).warmups, sampler.chosen
    if law not in warmups:
        warmups[law] = Warmup(model, law)
    return warmups[law].is_done(partial(run_rounds, model, law))


def run_rounds(model: Model, law: GenerationConfig) -> None:
    """One compiled round of each draft length."""
    sampler = Sampler(Sampling(), law, model.config.text.vocab_size)
    caches = model.caches(ROUND * (MAX_DRAFTS + 2))
    for hidden in model.read(Prompt(token_ids=[0]), caches):  # noqa: B007
        pass
    state = first_state(model, sampler, [0], hidden, 0)
    for length in range(1 if model.drafter is None else MAX_DRAFTS + 1):
        tokens, state = launch(make_round(model, sampler, length), state, caches)
        mx.eval(tokens, state)


def make_round(model: Model, sampler: Sampler, length: int) -> Round:
    return mx.compile(plain_round(model, sampler, length))


def plain_round(owner: Model, sampler: Sampler, length: int) -> Round:
    model = cast(Model, weakref.proxy(owner))  # it keeps the round: if that kept it, `del model` would free no weights

    def round_(state: State, arrays: list[Arrays]) -> tuple[mx.array, State, list[Arrays]]:
        caches = traced(arrays, model.config.text)
        drafts, q = draft(model, sampler, length, state, caches)
        tokens, state = verify(model, sampler, state, caches, drafts, q)
        return tokens, state, caches.arrays

    return round_


def round_keys(state: State) -> list[mx.array]:
    """Of a round's random numbers: the next round's own, for drafting, for accepting, for drawing."""
    return list(mx.random.split(state["random"], 4))


def draft(model: Model, sampler: Sampler, length: int, state: State, caches: Caches) -> tuple[list[mx.array], mx.array]:
    """Draft `length` tokens: k arrays [1], and the distributions they were drawn from, [k, V]."""
    if model.drafter is None or not length:
        return [], mx.zeros((0, model.config.text.vocab_size))
    drafts: list[mx.array] = []
    q: list[mx.array] = []
    token, hidden, last, seen = state["token"], state["hidden"], state["offset"] - 1, state.get("seen")
    masks = model.masks(caches, last, 1)
    for key in mx.random.split(round_keys(state)[1], length):
        logits, hidden = model.drafter(model.language_model.embed(token[None]), hidden, last, masks, caches.last)
        q.append(sampler.probabilities(logits[0], None if seen is None else seen[None]))
        token = sampler.draw(q[-1], key)
        if seen is not None:
            seen = seen | (mx.arange(seen.shape[0]) == token)
        drafts.append(token)
    return drafts, mx.concatenate(q)


def verify(
    model: Model, sampler: Sampler, state: State, caches: Caches, drafts: list[mx.array], q: mx.array
) -> tuple[mx.array, State]:
    """One pass over the newest token and k drafts, arrays [1] drawn from q [k, V]: tokens [k + 1], the next state."""
    random, _, accept_key, draw_key = round_keys(state)
    length = len(drafts)
    tokens = mx.concatenate([state["token"], *drafts])  # [k + 1]
    offset = state["offset"]
    masks = model.masks(caches, offset, length + 1)
    hidden = model.language_model(model.language_model.embed(tokens[None]), offset, masks, caches.layers)
    logits = model.language_model.head(hidden)[0]  # [k + 1, V]
    p = sampler.probabilities(logits, seen_by_row(state, drafts))
    accepted, rest = accept(p, q, tokens[1:], accept_key)
    token = sampler.draw(rest, draw_key)  # [1]
    place = mx.arange(length + 1)
    following = mx.concatenate([tokens[1:], token])
    tokens = mx.where(place < accepted, following, mx.where(place == accepted, token, NONE))
    state = see(state, tokens) | {
        "offset": offset + accepted + 1,
        "random": random,
        "token": token,
        "hidden": hidden[:, accepted[None]],
    }
    return checked(tokens, logits), state


def checked(tokens: mx.array, logits: mx.array) -> mx.array:
    """The tokens, or none of them if their logits are not finite: the host learns it with them."""
    return mx.where(mx.isfinite(logits.sum()), tokens, NOT_FINITE)


def accept(p: mx.array, q: mx.array, drafts: mx.array, key: mx.array) -> tuple[mx.array, mx.array]:
    """Keep each draft with probability min(1, p / q), up to the first that is rejected (Leviathan et al., 2023).

    p [k + 1, V] of the target, q [k, V] of the drafter, drafts [k] drawn from q. Returns how many are accepted, and
    the distribution [1, V], unnormalized, of the token that follows: max(p - q, 0) after a rejection, else p.
    """
    if not drafts.shape[0]:
        return mx.array(0), p
    own = drafts[:, None]
    chance = mx.take_along_axis(p[:-1], own, axis=1)[:, 0]
    drawn = mx.take_along_axis(q, own, axis=1)[:, 0]
    kept = mx.random.uniform(shape=drafts.shape, key=key) * drawn < chance
    accepted = mx.cumprod(kept.astype(mx.int32)).sum()
    rejected = mx.concatenate([q, mx.zeros_like(q[:1])])[accepted[None]]
    target = p[accepted[None]]
    rest = mx.maximum(target - rejected, 0)
    # where p and q differ by rounding alone, nothing may be left
    return accepted, mx.where(rest.sum() > 0, rest, target)


def seen_by_row(state: State, drafts: list[mx.array]) -> mx.array | None:
    """Tokens seen before each row's choice, [k + 1, V]: a row has seen the drafts before it. None without a penalty."""
    if "seen" not in state:
        return None
    rows = [state["seen"]]
    for token in drafts:
        rows.append(rows[-1] | (mx.arange(rows[-1].shape[0]) == token))
    return mx.stack(rows)


def see(state: State, tokens: mx.array) -> State:
    """The state in which these tokens, of which NONE are none, have been seen."""
    if "seen" not in state:
        return state
    ids = mx.arange(state["seen"].shape[0])
    return state | {"seen": state["seen"] | (ids[:, None] == tokens).any(axis=1)}


def launch(round_: Round, state: State, caches: Caches) -> tuple[mx.array, State]:
    """Hand a round to the device without waiting for it."""
    tokens, state, arrays = round_(state, caches.arrays)
    caches.take(arrays)
    mx.async_eval(tokens, state, arrays)
    return tokens, state
