"""How likely a prompt's own tokens are: what `echo` with `logprobs` asks."""

from collections.abc import Iterator
from typing import Any

import mlx.core as mx
import numpy as np

from mlx_gemma4.engine.generation import adapter_of
from mlx_gemma4.model.model import Model
from mlx_gemma4.prompt.prompt import Prompt

CHUNK = 128  # positions whose logits and their order are held at once: twice 134 MB for 262,144 tokens


def scores(model: Model, prompt: Prompt, tops: int, adapter: str | None = None) -> Iterator[dict[str, Any]]:
    """What `logprobs` says of each token of a prompt, with the `tops` likeliest beside it, as they are read. The first,
    which nothing foretells, has None."""
    ids, index = prompt.token_ids, adapter_of(model, adapter)
    yield {"token_id": ids[0], "logprob": None, "top": {}}
    read = 1
    for hidden in model.read(prompt, model.caches(len(prompt)), CHUNK, index):
        tokens = ids[read : read + hidden.shape[1]]  # what is foretold: one fewer in the last chunk
        read += len(tokens)
        if not tokens:
            return
        logits = model.language_model.head(hidden[:, : len(tokens)], mx.array([index]) if index else None)[0]  # [l, V]
        best = mx.argpartition(logits, -max(tops, 1), axis=-1)[:, logits.shape[-1] - tops :]
        whole = mx.logsumexp(logits, axis=-1, keepdims=True)
        own = (mx.take_along_axis(logits, mx.array(tokens)[:, None], axis=-1) - whole)[:, 0]
        values = mx.take_along_axis(logits, best, axis=-1) - whole
        told = (np.array(found).tolist() for found in (own, best, values))
        for token, logprob, beside, likely in zip(tokens, *told, strict=True):
            ranked = sorted(zip(beside, likely, strict=True), key=lambda pair: -pair[1])
            yield {"token_id": token, "logprob": logprob, "top": dict(ranked)}
