"""The round: draft k tokens, verify them and the newest in one pass, keep those accepted. Plain decoding is k = 0.

A round is a function of arrays with fixed shapes, compiled once for each k and capacity of the caches. All that
decides the next round stays on the device, so the host can hand over a round before it has seen the last one.
"""

import weakref
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial
from itertools import count
from threading import get_ident
from typing import Any, TypeVar, cast

import mlx.core as mx

from mlx_gemma4.decoding.controller import MAX_DRAFTS, Acceptance, Controller, first_of
from mlx_gemma4.decoding.sampling import IN_PROMPT, Sampler, Sampling, Stages, allowed, draw, probabilities, told
from mlx_gemma4.decoding.warmup import Warmup
from mlx_gemma4.model.cache import ROUND, Arrays, Caches, caches_of
from mlx_gemma4.model.model import Model
from mlx_gemma4.prompt.prompt import Prompt

# Of B rows: token [B] int32: the newest, which has no key yet; hidden [B, 1, D] at the position before it; offset [B]:
# the number of positions before it; random [B, 2]: a key each; limit [B]: drafts that it takes at most, below 0: an
# empty row; the numbers of its law, each [B]; pauses [B, 2]: tokens behind which its round ends, NONE for none;
# with adapters by name, adapter [B]: which one, 0 for none;
# with penalties, seen [B, V] int32: how often the reply has each token, and IN_PROMPT more if the prompt has it.
# A round's result has, where a row asks for it, also told [B, k + 1, …] (sampling.told), which the next does not take.
State = dict[str, mx.array]
# tokens [B, k + 1] int32 (the accepted ones and one more, then NONE), the next state, the caches' arrays
Round = Callable[[State, list[Arrays]], tuple[mx.array, State, list[Arrays]]]
# A round in two halves, for rows that are held to a form. drafts [B, k] and the law of each, [B, k, V]; and from these,
# the tokens that may be chosen at each of k + 1 places, as bits [B, k + 1, V / 32] uint32, and which drafts were not
# drawn but must come, [B, k] bool, what a round gives. Without a law, all of them must.
Draft = Callable[[State, list[Arrays]], tuple[mx.array, mx.array]]
Verify = Callable[
    [State, list[Arrays], mx.array, mx.array | None, mx.array, mx.array], tuple[mx.array, State, list[Arrays]]
]

NONE = -1  # in a round's tokens: none
NOT_FINITE = -2  # in place of a token whose logits are not finite

Compiled = tuple[int, Stages, int, int, int]  # in which thread; then what it was compiled for
Made = TypeVar("Made")
marks = count(1)

KEPT_ROUNDS = 32  # each takes megabytes on the host: five with the 48 layers of the 12B, more with drafts


@dataclass
class Learnt:
    """What one request leaves for the next: no part of it changes an answer."""

    # by rows of a round, and of all rows; where a row is held to a form, their own
    controllers: dict[tuple[int, bool], Controller] = field(default_factory=dict)
    acceptance: dict[bool, Acceptance] = field(default_factory=lambda: {False: Acceptance(), True: Acceptance()})
    rounds: dict[Compiled, Round] = field(default_factory=dict)
    halves: dict[Compiled, tuple[Draft, Verify]] = field(default_factory=dict)
    fingerprints: dict[int, bytes] = field(default_factory=dict)  # of the weights, and adapters, once a store has asked
    warmups: dict[tuple[Stages, int], Warmup] = field(default_factory=dict)

    def __reduce__(self) -> tuple[type["Learnt"], tuple[()]]:
        return Learnt, ()  # nothing of it goes to another process with the model

    def controller(self, rows: int, is_held: bool = False) -> Controller:
        return self.controllers.setdefault((rows, is_held), Controller(self.acceptance[is_held], first_of(rows)))


def learnt_of(model: Model) -> Learnt:
    if model.engine is None:
        model.engine = Learnt()
    return cast(Learnt, model.engine)


OPTIONAL = {"seen": mx.int32, "bias": mx.float32}  # [B, V], of a state of which a row needs it; zeros are none


def optional(stages: Stages) -> list[str]:
    return [name for name, wanted in (("seen", stages.penalty), ("bias", stages.bias)) if wanted]


def first_state(
    model: Model, sampler: Sampler, prompt_ids: list[int], hidden: mx.array, seed: int, bits: mx.array | None = None,
    adapter: int = 0,
) -> State:  # fmt: skip
    """The state of one row after its prompt has been read, from the hidden state of the last position, [1, 1, D].

    bits [1, 1, V / 32]: the tokens that may be first, if not all may. adapter: as `Model.read` takes it.
    """
    random, draw_key = mx.random.split(mx.random.key(seed))
    state = sampler.law() | {
        "offset": mx.array([len(prompt_ids)]), "random": random[None], "hidden": hidden,
        "limit": mx.array([MAX_DRAFTS]), "pauses": mx.full((1, 2), NONE),
    }  # fmt: skip
    if sampler.stages.penalty:
        state["seen"] = mx.zeros((1, model.config.text.vocab_size), mx.int32)
        state["seen"][:, mx.array(prompt_ids)] = IN_PROMPT
    if model.config.adapters:
        state["adapter"] = mx.array([adapter])
    logits = model.language_model.head(hidden, state.get("adapter"))
    choices = sampler.allowed if bits is None else sampler.allowed & unpacked(bits, logits.shape[-1])
    p = probabilities(logits, sampler.stages, state, choices, seen_by_place(state, []))
    (token,) = model.agreed(checked(draw(p[:, 0], draw_key[None], sampler.stages)[:, None], logits))
    if sampler.stages.tells:
        (state["told"],) = model.agreed(told(logits, token))
    return see(state, token) | {"token": token[:, 0]}


def compiled_round(model: Model, stages: Stages, rows: int, length: int, slots: int) -> tuple[Round, bool]:
    """The round of so many rows that drafts `length` tokens, and whether it is new: the model keeps those that were
    used last. slots: of the full layers.

    On a CPU it is not compiled before its kernels are there.
    """
    if not has_kernels(model, stages, rows):
        return plain_round(model, stages, length), False
    made = partial(make_round, model, stages, length)
    return kept_or_made(learnt_of(model).rounds, (get_ident(), stages, rows, length, slots), made)


def halves_of_round(
    model: Model, stages: Stages, rows: int, length: int, slots: int
) -> tuple[tuple[Draft, Verify], bool]:
    """The same in two halves. On a CPU they are not compiled: nothing builds their kernels ahead."""
    if mx.default_device().type == mx.cpu:
        return make_halves(model, stages, length), False

    def made() -> tuple[Draft, Verify]:
        first, second = make_halves(model, stages, length)
        return compiled(first), compiled(second)

    return kept_or_made(learnt_of(model).halves, (get_ident(), stages, rows, length, slots), made)


def kept_or_made(kept: dict[Compiled, Made], key: Compiled, make: Callable[[], Made]) -> tuple[Made, bool]:
    """What is kept under a key, or made now, and whether it is new. Of a thread, those are kept that were used last."""
    found = kept.pop(key, None)
    kept[key] = make() if found is None else found
    own = [key for key in list(kept) if key[0] == get_ident()]
    for oldest in own[:-KEPT_ROUNDS]:
        kept.pop(oldest, None)
    return kept[key], found is None


def forget_thread(model: Model) -> None:
    """What was compiled in this thread, which ends."""
    for kept in (learnt_of(model).rounds, learnt_of(model).halves):
        for key in [key for key in list(kept) if key[0] == get_ident()]:
            kept.pop(key, None)


def compiled(function: Callable[..., Any]) -> Callable[..., Any]:
    """Compiled, and never taken for another.

    MLX finds a trace, in each thread, by its function's address and the shapes of what goes in, and of a function that
    has run in two threads it forgets the trace of one alone: another function at the same address would run the other.
    So rounds are each thread's own, and each is given an empty array of a shape of its own.
    """
    mark = mx.zeros((0, next(marks)))
    mx.eval(mark)
    own = mx.compile(lambda mark, *arguments: function(*arguments))
    return lambda *arguments: own(mark, *arguments)


def has_kernels(model: Model, stages: Stages, rows: int) -> bool:
    if model.group is not None and mx.default_device().type == mx.cpu:
        return False  # no other process could run a part of a model alone
    warmups, key = learnt_of(model).warmups, (stages, rows)
    if key not in warmups:
        warmups[key] = Warmup(model, key)
    return warmups[key].is_done(partial(run_rounds, model, stages, rows))


def run_rounds(model: Model, stages: Stages, rows: int) -> None:
    """One compiled round of each draft length."""
    sampler = Sampler(Sampling(temperature=1), model.config.generation, model.config.text.vocab_size)
    caches = model.caches(ROUND * (MAX_DRAFTS + 2))
    for hidden in model.read(Prompt(token_ids=[0]), caches):  # noqa: B007
        pass
    state = first_state(model, sampler, [0], hidden, 0)
    for name in optional(stages):
        state[name] = mx.zeros((1, model.config.text.vocab_size), OPTIONAL[name])
    state = {name: mx.repeat(array, rows, axis=0) for name, array in state.items()}
    caches.take([tuple(mx.repeat(array, rows, axis=0) for array in own) for own in caches.arrays])
    mx.eval(state, caches.arrays)
    for length in range(1 if model.drafter is None else MAX_DRAFTS + 1):
        tokens, state = launch(make_round(model, stages, length), state, caches)
        state.pop("told", None)
        mx.eval(tokens, state)


def make_round(model: Model, stages: Stages, length: int) -> Round:
    return compiled(plain_round(model, stages, length))


def plain_round(owner: Model, stages: Stages, length: int) -> Round:
    model = cast(Model, weakref.proxy(owner))  # it keeps the round: if that kept it, `del model` would free no weights
    choices = allowed(stages, model.config.text.vocab_size)

    def round_(state: State, arrays: list[Arrays]) -> tuple[mx.array, State, list[Arrays]]:
        caches = caches_of(arrays, model.config.text)
        drafts, q = draft(model, stages, choices, length, state, caches)
        tokens, state = verify(model, stages, choices, state, caches, drafts, q)
        return tokens, state, caches.arrays

    return round_


def make_halves(owner: Model, stages: Stages, length: int) -> tuple[Draft, Verify]:
    model = cast(Model, weakref.proxy(owner))
    choices = allowed(stages, model.config.text.vocab_size)

    def first(state: State, arrays: list[Arrays]) -> tuple[mx.array, mx.array]:
        drafts, q = draft(model, stages, choices, length, state, caches_of(arrays, model.config.text))
        return mx.stack(drafts, axis=1), mx.concatenate(q, axis=1)

    def second(
        state: State, arrays: list[Arrays], drafts: mx.array, q: mx.array | None, bits: mx.array, forced: mx.array
    ) -> tuple[mx.array, State, list[Arrays]]:
        caches, size = caches_of(arrays, model.config.text), model.config.text.vocab_size
        certain = (mx.arange(size) == drafts[:, :, None]).astype(mx.float32)
        q = certain if q is None else mx.where(forced[:, :, None], certain, q)
        own = [drafts[:, place] for place in range(length)], [q[:, place : place + 1] for place in range(length)]
        tokens, state = verify(model, stages, choices & unpacked(bits, size), state, caches, *own)
        return tokens, state, caches.arrays

    return first, second


def unpacked(bits: mx.array, size: int) -> mx.array:
    """[…, V / 32] uint32, the lowest bit first -> [..., V] bool."""
    spread = (bits[..., None] >> mx.arange(32, dtype=mx.uint32)) & 1
    return spread.flatten(-2)[..., :size].astype(mx.bool_)


def row_keys(state: State) -> mx.array:
    """Of a round's random numbers, [B, 3 + MAX_DRAFTS, 2]: the next round's own, for accepting, for drawing, for each
    draft: the same whatever others draft, so that a row's reply does not hang on its company."""
    return mx.vmap(lambda key: mx.random.split(key, 3 + MAX_DRAFTS))(state["random"])


def draft(
    model: Model, stages: Stages, choices: mx.array, length: int, state: State, caches: Caches
) -> tuple[list[mx.array], list[mx.array]]:
    """Draft `length` tokens: k arrays [B], and the distributions they were drawn from, each [B, 1, V]."""
    if model.drafter is None or not length:
        return [], []
    drafts: list[mx.array] = []
    q: list[mx.array] = []
    token, hidden, last, seen = state["token"], state["hidden"], state["offset"] - 1, state.get("seen")
    masks, keys = model.masks(caches, last, 1), row_keys(state)
    for place in range(length):
        embedding = model.language_model.embed(token[:, None])
        logits, hidden = model.drafter(embedding, hidden, last, masks, caches.last)
        q.append(probabilities(logits, stages, state, choices, None if seen is None else seen[:, None]))
        token = draw(q[-1][:, 0], keys[:, 3 + place], stages)
        if seen is not None:
            seen = seen + (mx.arange(seen.shape[1]) == token[:, None])
        drafts.append(token)
    return [*model.agreed(*drafts)], q


def verify(
    model: Model, stages: Stages, choices: mx.array, state: State, caches: Caches, drafts: list[mx.array],
    q: list[mx.array],
) -> tuple[mx.array, State]:  # fmt: skip
    """One pass over the newest token and k drafts, [B] each drawn from q [B, 1, V]: tokens [B, k + 1], the next
    state. choices: tokens that may be chosen, [V], or at each place, [B, k + 1, V] bool; the drafter may draft any."""
    keys, limit, offset = row_keys(state), state["limit"], state["offset"]
    length = len(drafts)
    tokens = mx.stack([state["token"], *drafts], axis=1)  # [B, k + 1]
    masks = model.masks(caches, offset, length + 1)
    adapters = state["adapter"] if stages.adapts else None
    hidden = model.language_model(model.language_model.embed(tokens), offset, masks, caches.layers, adapters)
    logits = model.language_model.head(hidden, adapters)  # [B, k + 1, V]
    p = probabilities(logits, stages, state, choices, seen_by_place(state, drafts))
    if length:
        accepted, rest = accept(p, mx.concatenate(q, axis=1), tokens[:, 1:], keys[:, 1], limit)
    else:
        accepted, rest = mx.zeros_like(offset), p[:, 0]
    token = draw(rest, keys[:, 2], stages)  # [B]
    if stages.pauses and length:
        accepted, token = paused(state["pauses"], tokens[:, 1:], accepted, token)
    # whether logits are finite is told with the token: not all machines have them
    accepted, token = model.agreed(accepted, checked(token[:, None], logits)[:, 0])
    place, count = mx.arange(length + 1), accepted[:, None]
    following = mx.concatenate([tokens[:, 1:], token[:, None]], axis=1)
    tokens = mx.where(place < count, following, mx.where(place == count, token[:, None], NONE))
    state = see(state, tokens) | {
        "offset": mx.where(limit < 0, offset, offset + accepted + 1),
        "random": keys[:, 0],
        "token": token,
        "hidden": mx.take_along_axis(hidden, accepted[:, None, None], axis=1) if length else hidden,
    }
    if stages.tells:
        (state["told"],) = model.agreed(told(logits, tokens))
    return mx.where(token[:, None] == NOT_FINITE, NOT_FINITE, tokens), state


def paused(pauses: mx.array, drafts: mx.array, accepted: mx.array, token: mx.array) -> tuple[mx.array, mx.array]:
    """Accepted drafts [B, k] up to the first of these [B, 2], which is then the newest, as if it had been drawn."""
    found = (drafts[:, :, None] == pauses[:, None]).any(axis=2) & (mx.arange(drafts.shape[1]) < accepted[:, None])
    is_paused = found.any(axis=1)
    accepted = mx.where(is_paused, found.argmax(axis=1).astype(accepted.dtype), accepted)
    newest = mx.take_along_axis(drafts, mx.minimum(accepted, drafts.shape[1] - 1)[:, None], axis=1)[:, 0]
    return accepted, mx.where(is_paused, newest, token)


def checked(tokens: mx.array, logits: mx.array) -> mx.array:
    """A row's tokens [B, L], or none of them if its logits are not finite: the host learns it with them."""
    return mx.where(mx.isfinite(logits.sum(axis=(1, 2)))[:, None], tokens, NOT_FINITE)


def accept(p: mx.array, q: mx.array, drafts: mx.array, keys: mx.array, limit: mx.array) -> tuple[mx.array, mx.array]:
    """Keep each draft with probability min(1, p / q), up to the first that is rejected (Leviathan et al., 2023).

    p [B, k + 1, V] of the target, q [B, k, V] of the drafter, drafts [B, k] drawn from q, keys [B, 2], limit [B]: the
    drafts that a row takes at most, as if no more had been drafted. Returns how many are accepted, [B], and the
    distribution [B, V], unnormalized, of the token that follows: max(p - q, 0) after a rejection, else p.
    """
    length = drafts.shape[1]
    own = drafts[:, :, None]
    chance = mx.take_along_axis(p[:, :-1], own, axis=2)[:, :, 0]
    drawn = mx.take_along_axis(q, own, axis=2)[:, :, 0]
    numbers = mx.vmap(lambda key: mx.random.uniform(shape=(MAX_DRAFTS,), key=key))(keys)[:, :length]
    kept = (numbers * drawn < chance) & (mx.arange(length) < limit[:, None])
    accepted = mx.cumprod(kept.astype(mx.int32), axis=1).sum(axis=1)
    at = accepted[:, None, None]
    target = mx.take_along_axis(p, at, axis=1)[:, 0]
    rejected = mx.take_along_axis(q, mx.minimum(at, length - 1), axis=1)[:, 0]
    was_rejected = accepted < mx.minimum(limit, length)
    rest = mx.where(was_rejected[:, None], mx.maximum(target - rejected, 0), target)
    # where p and q differ by rounding alone, nothing may be left
    return accepted, mx.where(rest.sum(axis=1, keepdims=True) > 0, rest, target)


def seen_by_place(state: State, drafts: list[mx.array]) -> mx.array | None:
    """Tokens seen before each choice, [B, k + 1, V]: it has seen the drafts before it. None without a penalty."""
    if "seen" not in state:
        return None
    places = [state["seen"]]
    for token in drafts:
        places.append(places[-1] + (mx.arange(places[-1].shape[1]) == token[:, None]))
    return mx.stack(places, axis=1)


def see(state: State, tokens: mx.array) -> State:
    """The state in which these tokens [B, L], of which NONE are none, have been seen."""
    if "seen" not in state:
        return state
    ids = mx.arange(state["seen"].shape[1])
    return state | {"seen": state["seen"] + (ids[:, None] == tokens[:, None]).sum(axis=2)}


def launch(round_: Round, state: State, caches: Caches) -> tuple[mx.array, State]:
    """Hand a round to the device without waiting for it."""
    tokens, state, arrays = round_(state, caches.arrays)
    caches.take(arrays)
    mx.async_eval(tokens, state, arrays)
    return tokens, state
