"""The round: draft k tokens, verify them and the newest in one pass, keep those accepted. Plain decoding is k = 0.

A round is a function of arrays with fixed shapes, compiled once for each k and capacity of the cache. All that
decides the next round stays on the device, so the host can hand over a round before it has seen the last one.
"""

import weakref
from collections.abc import Callable
from typing import cast

import mlx.core as mx

from mlx_gemma4.cache import Cache, Slots
from mlx_gemma4.config import SLIDING
from mlx_gemma4.mask import attention_mask
from mlx_gemma4.model import Model
from mlx_gemma4.sampling import Sampler

# token [1] int32: the newest, which has no key yet; hidden [1, 1, D] at the position before it; offset: the number
# of positions before it; key of the random numbers; seen [V] bool: with a repetition penalty, the tokens so far.
State = dict[str, mx.array]
Layers = list[tuple[mx.array, mx.array]]
# tokens [k + 1] int32 (the accepted ones and one more, then -1), the next state, the caches' layers
Round = Callable[[State, mx.array, Layers], tuple[mx.array, State, Layers]]

KEPT_ROUNDS = 32  # each takes megabytes on the host: five with the 48 layers of the 12B, more with drafts


def first_state(model: Model, sampler: Sampler, prompt_ids: list[int], hidden: mx.array, seed: int) -> State:
    """The state after a prompt has been read, from the hidden state of its last position, [1, 1, D]."""
    key, draw_key = mx.random.split(mx.random.key(seed))
    state = {"offset": mx.array(len(prompt_ids)), "key": key, "hidden": hidden}
    if sampler.penalty != 1:
        state["seen"] = mx.zeros((model.config.text.vocab_size,), mx.bool_)
        state["seen"][mx.array(prompt_ids)] = True
    logits = model.language_model.head(hidden)[0]
    token = sampler.draw(sampler.probabilities(logits, seen_by_row(state, [])), draw_key)
    return see(state, token) | {"token": token}


def compiled_round(model: Model, sampler: Sampler, length: int, cache: Cache) -> tuple[Round, bool]:
    """The round that drafts `length` tokens, and whether it is new: the model keeps those that were used last."""
    rounds, key = model.learnt.rounds, (sampler.chosen, length, cache.slots)
    kept = rounds.pop(key, None)
    round_ = make_round(model, sampler, length) if kept is None else kept
    rounds[key] = round_
    for oldest in list(rounds)[:-KEPT_ROUNDS]:
        rounds.pop(oldest, None)
    return round_, kept is None


def make_round(owner: Model, sampler: Sampler, length: int) -> Round:
    model = cast(Model, weakref.proxy(owner))  # it keeps the round: if that kept it, `del model` would free no weights
    kinds = model.config.text.layer_types

    def round_(state: State, start: mx.array, layers: Layers) -> tuple[mx.array, State, Layers]:
        offset = state["offset"]
        stores = [
            Slots(keys, values, offset - start if kind == SLIDING else offset)
            for kind, (keys, values) in zip(kinds, layers, strict=True)
        ]
        key, draft_key, accept_key, draw_key = mx.random.split(state["key"], 4)
        drafts, q = propose(model, sampler, length, state, start, stores, draft_key)
        tokens = mx.concatenate([state["token"], *drafts])  # [k + 1]
        masks = slot_masks(model, offset + mx.arange(length + 1), start, stores)
        hidden = model.language_model(model.language_model.embed(tokens[None]), offset, masks, stores)
        p = sampler.probabilities(model.language_model.head(hidden)[0], seen_by_row(state, drafts))  # [k + 1, V]
        accepted, rest = accept(p, q, tokens[1:], accept_key)
        token = sampler.draw(rest, draw_key)  # [1]
        place = mx.arange(length + 1)
        following = mx.concatenate([tokens[1:], token])
        tokens = mx.where(place < accepted, following, mx.where(place == accepted, token, -1))
        state = see(state, tokens) | {
            "offset": offset + accepted + 1,
            "key": key,
            "token": token,
            "hidden": hidden[:, accepted[None]],
        }
        return tokens, state, [store.rows() for store in stores]

    return mx.compile(round_)


def propose(
    model: Model, sampler: Sampler, length: int, state: State, start: mx.array, stores: list[Slots], key: mx.array
) -> tuple[list[mx.array], mx.array]:
    """Draft `length` tokens: k arrays [1], and the distributions they were drawn from, [k, V]."""
    if model.drafter is None or not length:
        return [], mx.zeros((0, model.config.text.vocab_size))
    drafts: list[mx.array] = []
    q: list[mx.array] = []
    token, hidden, last = state["token"], state["hidden"], state["offset"] - 1
    shared = dict(zip(model.config.text.layer_types, stores, strict=True))  # the last layer of each kind
    masks = slot_masks(model, last[None], start, stores)
    for draft_key in mx.random.split(key, length):
        logits, hidden = model.drafter(model.language_model.embed(token[None]), hidden, last, masks, shared)
        seen = seen_by_row(state, drafts)
        q.append(sampler.probabilities(logits[0], None if seen is None else seen[-1:]))
        token = sampler.draw(q[-1], draft_key)
        drafts.append(token)
    return drafts, mx.concatenate(q)


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


def slot_masks(model: Model, queries: mx.array, start: mx.array, stores: list[Slots]) -> dict[str, mx.array]:
    """What queries at these positions see of the slots, by kind of layer."""
    text, masks = model.config.text, {}
    for kind, store in zip(text.layer_types, stores, strict=True):
        if kind not in masks:
            keys = mx.arange(store.keys.shape[2]) + (start if kind == SLIDING else 0)
            masks[kind] = attention_mask(queries, keys, text.attention[kind].window)
    return masks


def seen_by_row(state: State, drafts: list[mx.array]) -> mx.array | None:
    """Tokens seen before each row's choice, [k + 1, V]: a row has seen the drafts before it. None without a penalty."""
    if "seen" not in state:
        return None
    rows = [state["seen"]]
    for draft in drafts:
        rows.append(rows[-1] | (mx.arange(rows[-1].shape[0]) == draft))
    return mx.stack(rows)


def see(state: State, tokens: mx.array) -> State:
    """The state in which these tokens, of which -1 are none, have been seen."""
    if "seen" not in state:
        return state
    ids = mx.arange(state["seen"].shape[0])
    return state | {"seen": state["seen"] | (ids[:, None] == tokens).any(axis=1)}


def launch(round_: Round, state: State, cache: Cache) -> tuple[mx.array, State]:
    """Hand a round to the device without waiting for it."""
    tokens, state, cache.layers = round_(state, mx.array(cache.start), cache.layers)
    mx.async_eval(tokens, state, cache.layers)
    return tokens, state
