"""The round: from the newest token to the next, one function of arrays with fixed shapes."""

from collections.abc import Callable

import mlx.core as mx

from mlx_gemma4.cache import Cache, Slots
from mlx_gemma4.config import FULL, SLIDING
from mlx_gemma4.mask import attention_mask
from mlx_gemma4.model import Model
from mlx_gemma4.sampling import Sampler

# What decides the next round and stays on the device: token [1] int32, the newest, which has no key yet;
# offset, the number of positions before it; key, of the random numbers; seen [V] bool, with a penalty only.
State = dict[str, mx.array]
Layers = list[tuple[mx.array, mx.array]]
Round = Callable[[State, mx.array, Layers], tuple[mx.array, State, Layers]]


def first_state(model: Model, sampler: Sampler, prompt_ids: list[int], hidden: mx.array, seed: int) -> State:
    """The state after a prompt has been read, from the hidden state of its last position, [1, 1, hidden]."""
    key, draw_key = mx.random.split(mx.random.key(seed))
    state = {"offset": mx.array(len(prompt_ids)), "key": key}
    if sampler.penalty != 1:
        state["seen"] = mx.zeros((model.config.text.vocab_size,), mx.bool_)
        state["seen"][mx.array(prompt_ids)] = True
    probabilities = sampler.probabilities(model.language_model.head(hidden)[0], seen_rows(state))
    return see(state, sampler.draw(probabilities, draw_key))


def make_round(model: Model, sampler: Sampler, is_sliding: list[bool]) -> Round:
    """A compiled round: traced once for each capacity of the cache, then launched without Python's walk."""
    decoder, config = model.language_model, model.config.text

    def round_(state: State, start: mx.array, layers: Layers) -> tuple[mx.array, State, Layers]:
        offset = state["offset"]
        stores = [
            Slots(keys, values, offset - start if sliding else offset)
            for sliding, (keys, values) in zip(is_sliding, layers, strict=True)
        ]
        queries = offset + mx.arange(1)
        masks = {}
        for sliding, kind in ((True, SLIDING), (False, FULL)):
            if sliding in is_sliding:
                slots = layers[is_sliding.index(sliding)][0].shape[2]
                keys = (start if sliding else 0) + mx.arange(slots)
                masks[kind] = attention_mask(queries, keys, config.attention[kind].window)
        hidden = decoder(decoder.embed(state["token"][None]), offset, masks, stores)
        key, draw_key = mx.random.split(state["key"])
        probabilities = sampler.probabilities(decoder.head(hidden)[0], seen_rows(state))
        token = sampler.draw(probabilities, draw_key)
        state = see(state | {"offset": offset + 1, "key": key}, token)
        return token, state, [(store.keys, store.values) for store in stores]

    return mx.compile(round_)


def seen_rows(state: State) -> mx.array | None:
    return state["seen"][None] if "seen" in state else None


def see(state: State, token: mx.array) -> State:
    """The state with `token` [1] as the newest one."""
    state = state | {"token": token}
    if "seen" in state:
        state["seen"] = state["seen"] | (mx.arange(state["seen"].shape[0]) == token)
    return state


def launch(round_: Round, state: State, cache: Cache) -> tuple[mx.array, State]:
    """Hand a round to the device without waiting for it."""
    tokens, state, cache.layers = round_(state, mx.array(cache.start), cache.layers)
    mx.async_eval(tokens, state, cache.layers)
    return tokens, state
