"""How surprised the model is by what it is to say, a block of positions at a time: the head's output is large."""

from collections.abc import Iterator
from typing import Any, cast

import mlx.core as mx
from mlx.utils import tree_map

from mlx_gemma4.model.decoder import Decoder
from mlx_gemma4.tune.state import flat

BLOCK = 64  # positions: of a vocabulary of 262,144, 67 MB of logits


def head(decoder: Decoder, hidden: mx.array) -> mx.array:
    """Logits [n, D] -> [n, vocab] as the decoder's, whose slope needs them alone: what they are made of is free."""
    scores, cap = decoder.scores(hidden[None]).squeeze(0), decoder.softcap
    if cap is None:
        return scores

    @mx.custom_function
    def capped(scores: mx.array) -> mx.array:
        return mx.tanh(scores / cap) * cap

    @capped.vjp
    def back(scores: mx.array, pull: mx.array, logits: mx.array) -> mx.array:
        return pull * (1 - mx.square(logits / cap))

    return cast(mx.array, capped(scores))


def surprise(decoder: Decoder, hidden: mx.array, targets: mx.array) -> mx.array:
    """-log p of each target in nats: hidden [n, D], targets [n] -> [n] float32."""
    column = targets[:, None]

    @mx.custom_function
    def of(logits: mx.array) -> mx.array:
        return mx.logsumexp(logits, axis=-1, keepdims=True) - mx.take_along_axis(logits, column, axis=-1)

    @of.vjp
    def back(logits: mx.array, pull: mx.array, found: mx.array) -> mx.array:
        law = mx.exp(logits - (found + mx.take_along_axis(logits, column, axis=-1)))
        return pull * mx.put_along_axis(law, column, mx.take_along_axis(law, column, axis=-1) - 1, axis=-1)

    return cast(mx.array, of(head(decoder, hidden))).squeeze(1)


def blocks(*arrays: mx.array) -> Iterator[tuple[mx.array, ...]]:
    for first in range(0, len(arrays[0]), BLOCK):
        yield tuple(array[first : first + BLOCK] for array in arrays)


def surprises(decoder: Decoder, hidden: mx.array, targets: mx.array) -> mx.array:
    """The same for any number of positions, [N] float32."""
    found: list[mx.array] = []
    for own, wanted in blocks(hidden, targets):
        found.append(surprise(decoder, own, wanted))
        mx.eval(found[-1])
    return mx.concatenate(found)


def learnt(
    decoder: Decoder, hidden: mx.array, targets: mx.array, weights: mx.array
) -> tuple[mx.array, mx.array, list[list[mx.array]]]:
    """A number whose gradient is that of Σ weight · surprise, by `hidden` and by the head if it is trained; the
    surprises, [N] float32; and what both are made of, in stages.

    Each block's gradient is taken at once, so that no block's logits wait for the way back. Evaluated one stage after
    the other, four arrays of a block's logits are alive; a device that is handed all at once runs ten arrays ahead.
    """
    owner = decoder.embed_tokens if decoder.is_tied else decoder.lm_head
    trained = owner.trainable_parameters()
    fixed = tree_map(mx.stop_gradient, trained)
    found: list[mx.array] = []
    slopes: list[mx.array] = []
    stages: list[list[mx.array]] = [[hidden]]
    of_head = tree_map(mx.zeros_like, trained)

    def total(given: dict[str, Any], wanted: mx.array, weight: mx.array) -> tuple[mx.array, mx.array]:
        owner.update(given["head"])
        each = surprise(decoder, given["hidden"], wanted)
        return (weight * each).sum(), each

    step = mx.value_and_grad(total)
    for own, wanted, weight in blocks(mx.stop_gradient(hidden), targets, weights):
        (_, each), by = step({"hidden": own, "head": fixed}, wanted, weight)
        found.append(each)
        slopes.append(by["hidden"])
        of_head = tree_map(mx.add, of_head, by["head"])
        stages += [[each], [slopes[-1], *(value for _, value in flat(of_head))]]
    owner.update(trained)
    pairs = [(hidden, mx.concatenate(slopes))]
    pairs += [(one, two) for (_, one), (_, two) in zip(flat(trained), flat(of_head), strict=True)]
    number = sum((one.astype(mx.float32) * mx.stop_gradient(two).astype(mx.float32)).sum() for one, two in pairs)
    return cast(mx.array, number), mx.stop_gradient(mx.concatenate(found)), stages
