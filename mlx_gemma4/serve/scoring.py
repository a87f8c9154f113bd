"""How likely a prompt's own tokens are: what `echo` with `logprobs` asks."""

from typing import Any

import mlx.core as mx
import numpy as np

from mlx_gemma4.engine.generation import adapter_of
from mlx_gemma4.model.model import Model
from mlx_gemma4.prompt.processor import Processor
from mlx_gemma4.prompt.prompt import Prompt
from mlx_gemma4.reply.reply import Piece

CHUNK = 128  # positions whose logits are held at once: 134 MB for 262,144 tokens


def prompt_piece(
    model: Model, processor: Processor, prompt: Prompt, tops: int | None, adapter: str | None = None
) -> Piece:
    """A prompt as if it had been written: its text, its tokens and, where asked, their logprobs with `tops` others
    beside each. The first token, which nothing foretells, has None."""
    ids = prompt.token_ids
    text = processor.tokenizer.decode(ids, skip_special_tokens=True)
    if tops is None:
        return Piece(text, "", ids)
    if model.group is not None:  # the engine alone decides what the machines do next
        raise ValueError(
            "logprobs is asked of a prompt, and several machines share the model; expected echo without it"
        )
    entries: list[dict[str, Any]] = [{"token_id": ids[0], "logprob": None, "top": {}}]
    index = adapter_of(model, adapter)
    for hidden in model.read(prompt, model.caches(len(prompt)), CHUNK, index):
        logits = model.language_model.head(hidden, mx.array([index]) if index else None)[0]  # [l, V]
        laws = np.array(logits - mx.logsumexp(logits, axis=-1, keepdims=True))
        for law, token in zip(laws, ids[len(entries) :], strict=False):
            best = np.argsort(-law)[:tops].tolist()
            top = {index: float(law[index]) for index in best}
            entries.append({"token_id": token, "logprob": float(law[token]), "top": top})
    return Piece(text, "", ids, logprobs=entries)
