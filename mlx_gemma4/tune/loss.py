"""How surprised the model is by what it is to say, a block of positions at a time: the head's output is large."""

from collections.abc import Iterator

import mlx.core as mx

from mlx_gemma4.model.decoder import Decoder

BLOCK = 128  # positions: of a vocabulary of 262,144, 134 MB of logits


def surprise(decoder: Decoder, hidden: mx.array, targets: mx.array) -> mx.array:
    """-log p of each target in nats: hidden [n, D], targets [n] -> [n] float32."""
    logits = decoder.head(hidden[None])[0]
    return mx.logsumexp(logits, axis=-1) - mx.take_along_axis(logits, targets[:, None], axis=-1)[:, 0]


def blocks(hidden: mx.array, targets: mx.array) -> Iterator[tuple[mx.array, mx.array]]:
    for first in range(0, len(targets), BLOCK):
        yield hidden[first : first + BLOCK], targets[first : first + BLOCK]


def surprises(decoder: Decoder, hidden: mx.array, targets: mx.array) -> mx.array:
    """The same for any number of positions, [N] float32."""
    found: list[mx.array] = []
    for own, wanted in blocks(hidden, targets):
        found.append(surprise(decoder, mx.depends(own, found[-1]) if found else own, wanted))
    return mx.concatenate(found)


def learnt(decoder: Decoder, hidden: mx.array, targets: mx.array) -> tuple[mx.array, mx.array]:
    """A number whose gradient by `hidden` is that of the summed surprises, and these, [N] float32.

    Each block's gradient is taken at once, so that no block's logits wait for the way back.
    """
    slopes: list[mx.array] = []
    found: list[mx.array] = []

    def total(own: mx.array, wanted: mx.array) -> tuple[mx.array, mx.array]:
        each = surprise(decoder, own, wanted)
        return each.sum(), each

    step = mx.value_and_grad(total)
    for own, wanted in blocks(mx.stop_gradient(hidden), targets):
        (_, each), slope = step(mx.depends(own, slopes[-1]) if slopes else own, wanted)
        found.append(each)
        slopes.append(slope)
    slope = mx.stop_gradient(mx.concatenate(slopes))
    return (hidden.astype(mx.float32) * slope.astype(mx.float32)).sum(), mx.stop_gradient(mx.concatenate(found))
