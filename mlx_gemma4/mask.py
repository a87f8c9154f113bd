"""Which keys a query sees. True: seen."""

import mlx.core as mx


def attention_mask(
    queries: mx.array,
    keys: mx.array,
    window: int | None,
    query_blocks: mx.array | None = None,
    key_blocks: mx.array | None = None,
) -> mx.array:
    """The mask of one kind of layer, [L, S] bool.

    queries [L] and keys [S] are positions; query_blocks [L] and key_blocks [S] number the image blocks
    (-1 outside of them) and are given for sliding layers only: (causal OR same block) AND within the window.
    The window looks back only, as in transformers and vLLM; Google's JAX code bounds it ahead too, which
    differs only for a block longer than the window.
    """
    q, k = queries[:, None], keys[None, :]
    seen = k <= q
    if query_blocks is not None and key_blocks is not None:
        seen = seen | ((query_blocks[:, None] == key_blocks[None, :]) & (query_blocks[:, None] >= 0))
    return seen if window is None else seen & (k > q - window)
