"""Which keys a query sees. True: seen."""

from collections.abc import Callable

import mlx.core as mx

# What queries first … last of a pass see, [B or 1, last - first, S] bool. A function, so that a long prompt's mask
# never is there whole.
Mask = Callable[[int, int], mx.array]


def attention_mask(
    queries: mx.array,
    keys: mx.array,
    window: int | None,
    query_blocks: mx.array | None = None,
    key_blocks: mx.array | None = None,
) -> mx.array:
    """The mask of one kind of layer, [B or 1, L, S] bool.

    queries [B or 1, L] and keys [B or 1, S] are positions, negative where a slot was never written; query_blocks [L]
    and key_blocks [S] number the image blocks (-1 outside of them) and are given for sliding layers only: (causal OR
    same block) AND within the window. The window looks back only, as in transformers and vLLM; Google's JAX code bounds
    it ahead too, which differs only for a block longer than the window.
    """
    q, k = queries[:, :, None], keys[:, None, :]
    seen = k <= q
    if query_blocks is not None and key_blocks is not None:
        seen = seen | ((query_blocks[:, None] == key_blocks[None, :]) & (query_blocks[:, None] >= 0))
    return seen if window is None else seen & (k > q - window) & (k >= 0)


def whole_mask(queries: mx.array, keys: mx.array, window: int | None, blocks: mx.array | None = None) -> Mask:
    """A mask that all layers of a kind share. blocks [L]: of the queries, whose keys are the last of all."""
    key_blocks = None
    if blocks is not None:  # keys before the chunk are in no block of it, for a chunk never splits one
        key_blocks = mx.concatenate([mx.full((keys.shape[1] - blocks.shape[0],), -1, blocks.dtype), blocks])
    mask = attention_mask(queries, keys, window, blocks, key_blocks)
    return lambda first, last: mask[:, first:last]


def causal_mask(queries: mx.array, keys: mx.array) -> Mask:
    """A full layer's mask, made anew for the queries that are asked for: at 262144 keys it would be large."""
    return lambda first, last: attention_mask(queries[:, first:last], keys, None)
