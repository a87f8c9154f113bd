"""How much memory a request takes, from shapes alone: weights, caches, and what is computed on the way.

Peaks are MLX's own, `mx.get_peak_memory()`. Caches are exact; the numbers of arrays below stand for what `decoder.py`
makes and were fitted to 43 shapes and lengths on a CPU (benchmarks/README.md). Metal has not been measured.
"""

import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Protocol

import mlx.core as mx

from mlx_gemma4.config import FULL, SLIDING, WHOLE, ModelConfig, TextConfig
from mlx_gemma4.model.attention import MAX_SCORE_BYTES
from mlx_gemma4.model.cache import AHEAD, ROUND, capacity, entry_bytes, sliding_slots
from mlx_gemma4.model.model import CHUNK

# MLX hands over about one layer's operations ahead of the device (10 tasks of 10 on a CPU, 10 command buffers of 50 MB
# on Metal), so while a prompt is read nothing that a layer makes is free again before the layer has ended: so many
# arrays as wide as the hidden state, as the MLP and as all heads together, in the checkpoint's type and in float32.
HIDDEN_ARRAYS, MLP_ARRAYS, HEAD_ARRAYS = 5, 2.5, 5
FLOAT32_MLP_ARRAYS, FLOAT32_HEAD_ARRAYS = 2.5, 4  # the former only where the checkpoint's type is narrower
# Scores come in passes of at most MAX_SCORE_BYTES: so many while those arrays are still there, and so many handed over
# at once later, beside queries and results.
FIRST_PASSES, PASSES, RESULT_ARRAYS = 4, 4.5, 2
SHORT_REPLY = 256  # tokens that must fit for a request to be taken: most replies end long before their limit
# Of a training step (mlx_gemma4.tune), fitted to 11 shapes and lengths in float32 on a CPU: what is alive on the way
# back through one layer, in its MLP or in its attention, and what is kept of each layer that is not computed twice. The
# head goes through blocks of positions, one after the other.
BACK_MLP_ARRAYS, BACK_HEAD_ARRAYS, BACK_SCORES = 27.5, 18, 3.4
KEPT_HIDDEN_ARRAYS, KEPT_MLP_ARRAYS, KEPT_HEAD_ARRAYS = 8.6, 6.5, 5.5
HEAD_BLOCK, BLOCK_LOGIT_ARRAYS = 64, 4.1
TRAINED_ARRAYS = 5  # float32, of what is trained: itself, its gradient, their sum and Adam's two
LOGIT_ARRAYS = 6  # of each row of a round: the sampler's filters, p, q and what is left of them


class Sized(Protocol):
    """A tensor on disk or an array."""

    @property
    def nbytes(self) -> int: ...


@dataclass(frozen=True)
class Footprint:
    """What the memory of a model depends on."""

    text: TextConfig
    item_bytes: int  # of a number in hidden states, keys and values
    weights: int  # bytes, the drafter's not among them
    drafter: int = 0  # bytes; 0: none

    @property
    def drafts(self) -> int:
        return ROUND - 1 if self.drafter else 0

    @property
    def fits(self) -> bool:
        """Whether this machine can hold it and begin a reply."""
        return predict(self, 1, 1).peak <= memory_limit()

    def row_bytes(self, kind: str) -> int:
        """Keys and values of one position in all layers of a kind."""
        kinds = (SLIDING, WHOLE) if kind == SLIDING else (kind,)
        return sum(entry_bytes(self.text, own, self.item_bytes) for own in kinds if own in self.text.attention)


def footprint(config: ModelConfig, arrays: Mapping[str, Sized]) -> Footprint:
    """Of a model's parameters by their path; the drafter's begin with `drafter.`."""
    drafter = sum(array.nbytes for path, array in arrays.items() if path.startswith("drafter."))
    weights = sum(array.nbytes for array in arrays.values()) - drafter
    return Footprint(config.text, config.dtype.size, weights, drafter)


@dataclass(frozen=True)
class Prediction:
    """Bytes at the moment when most are in use."""

    weights: int
    drafter: int
    sliding: int  # caches of the sliding layers
    full: int  # and of the full ones
    workspace: int  # everything else

    @property
    def peak(self) -> int:
        return self.weights + self.drafter + self.sliding + self.full + self.workspace


def predict(model: Footprint, prompt_tokens: int, reply_tokens: int) -> Prediction:
    """The memory for reading a prompt and writing a reply of full length.

    Pieces of media count by their tokens; what they are computed from is little beside it.
    """
    text, rows = model.text, model.drafts + 1
    context = text.max_position_embeddings
    at_first = capacity(prompt_tokens + min(reply_tokens, AHEAD) + ROUND, context)
    slots = max(at_first, capacity(prompt_tokens + reply_tokens + (2 * ROUND if model.drafts else ROUND), context))
    sliding = model.row_bytes(SLIDING) * sliding_slots(text.sliding_window)
    full = model.row_bytes(FULL) * slots
    # a layer that grows is there twice, and while it is written a sliding one
    copied = full / layers(text, FULL) if slots > at_first else 0
    writing = sliding + full + copied + LOGIT_ARRAYS * rows * text.vocab_size * 4
    reading = model.row_bytes(FULL) * at_first + max(
        reading_bytes(model, *chunk) for chunk in last_chunks(prompt_tokens)
    )
    workspace = int(max(reading, writing)) - sliding - full
    return Prediction(model.weights, model.drafter, sliding, full, workspace)


@dataclass(frozen=True)
class Tuning:
    """Bytes at the moment of a training step when most are in use."""

    weights: int
    adapter: int  # with gradients and the optimizer's state
    kept: int  # of the layers, for the way back
    workspace: int

    @property
    def peak(self) -> int:
        return self.weights + self.adapter + self.kept + self.workspace


def predict_tuning(model: Footprint, trained: int, tokens: int, checkpoint: bool, layers: int) -> Tuning:
    """The memory for training so many numbers on rows of at most so many tokens, one row after the other.

    checkpoint: of each layer its input alone is kept, and it is computed twice. layers: the last ones, through which
    the way back leads.
    """
    text, item = model.text, model.item_bytes
    sizes = [
        (text.num_attention_heads + 2 * own.num_key_value_heads) * own.head_dim
        for own in (text.attention[kind] for kind in text.layer_types[len(text.layer_types) - layers :])
    ]
    kept = float(len(sizes) * text.hidden_size)
    if not checkpoint:
        wide = KEPT_HIDDEN_ARRAYS * text.hidden_size + KEPT_MLP_ARRAYS * text.intermediate_size
        kept = len(sizes) * wide + KEPT_HEAD_ARRAYS * sum(sizes)
    scores = BACK_SCORES * text.num_attention_heads * tokens
    layer = max(BACK_MLP_ARRAYS * text.intermediate_size, BACK_HEAD_ARRAYS * max(sizes) + scores)
    head = BLOCK_LOGIT_ARRAYS * min(HEAD_BLOCK, tokens) * text.vocab_size * 4
    workspace = max(tokens * layer * item, head)
    weights = model.weights + model.drafter
    return Tuning(weights, 4 * TRAINED_ARRAYS * trained, int(tokens * kept * item), int(workspace))


def batch_bytes(model: Footprint, lengths: Sequence[int], size: int, ahead: int) -> float:
    """The memory for rows that hold so many positions each, to go on together for `ahead` more, in a batch of `size`
    places: the longest row's slots are there for each place."""
    needed = predict(model, max(lengths), ahead)
    slots = capacity(max(lengths) + ahead + ROUND, model.text.max_position_embeddings)
    place = model.row_bytes(SLIDING) * sliding_slots(model.text.sliding_window) + model.row_bytes(FULL) * slots
    logits = LOGIT_ARRAYS * (model.drafts + 1) * model.text.vocab_size * 4
    return needed.peak + size * place + (size - 1) * logits


def layers(text: TextConfig, kind: str) -> int:
    """How many layers of a kind there are, at least 1 (to divide by)."""
    return max(1, text.layer_types.count(kind))


def last_chunks(prompt_tokens: int) -> Iterator[tuple[int, int]]:
    """The last whole chunk of a prompt and what is left behind it, (start, end): one of them takes most."""
    whole = prompt_tokens // CHUNK * CHUNK
    if whole:
        yield whole - CHUNK, whole
    if prompt_tokens > whole:
        yield whole, prompt_tokens


def reading_bytes(model: Footprint, start: int, end: int) -> float:
    """Sliding caches and workspace while the chunk start … end of a prompt is read."""
    cached = model.row_bytes(SLIDING) * sliding_slots(model.text.sliding_window)
    return cached + max(layer_bytes(model, kind, start, end) for kind in (FULL, SLIDING))


def layer_bytes(model: Footprint, kind: str, start: int, end: int) -> float:
    """What a layer makes of the chunk start … end."""
    text, own, item = model.text, model.text.attention[kind], model.item_bytes
    rows, window = end - start, own.window
    keys = end if window is None else (sliding_slots(window) if start else 0) + rows
    heads = text.num_attention_heads + (1 if window is None else 2) * own.num_key_value_heads
    scores = rows * text.num_attention_heads * keys * item
    head = HEAD_ARRAYS * item + FLOAT32_HEAD_ARRAYS * 4
    mlp = MLP_ARRAYS * item + (FLOAT32_MLP_ARRAYS * 4 if item < 4 else 0)
    wide = HIDDEN_ARRAYS * item * text.hidden_size + mlp * text.intermediate_size
    first = min(scores, FIRST_PASSES * MAX_SCORE_BYTES) + rows * (heads * own.head_dim * head + wide)
    later = min(scores, PASSES * MAX_SCORE_BYTES) + rows * heads * own.head_dim * RESULT_ARRAYS * item
    return max(first, later)


def longest(fits: Callable[[int], bool], most: int) -> int:
    """The largest of 1 … `most` that fits, 0 if none does."""
    low, high = 0, most
    while low < high:
        middle = (low + high + 1) // 2
        low, high = (middle, high) if fits(middle) else (low, middle - 1)
    return low


def memory_limit() -> int:
    """Bytes a model may hold here: Metal's working set, a GPU's memory, or the machine's."""
    info = mx.device_info()
    for key in ("max_recommended_working_set_size", "total_memory"):
        if key in info:
            return int(info[key])
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")


def check_memory(model: Footprint, prompt_tokens: int = 1, reply_tokens: int = 1, room: int | None = None) -> None:
    """MemoryError if this machine, or one that has so much room, cannot hold the model, read the prompt and begin the
    reply."""
    room, reply = room or memory_limit(), min(reply_tokens, SHORT_REPLY)  # a reply may end long before its limit
    needed = predict(model, prompt_tokens, reply).peak
    if needed <= room:
        return
    most = longest(lambda tokens: predict(model, tokens, reply).peak <= room, prompt_tokens)
    what = f"a prompt of {prompt_tokens} tokens" if most else "the model"
    expected = f"a prompt of at most {most} tokens" if most else "a smaller model or fewer bits a weight"
    weights = model.weights + model.drafter
    raise MemoryError(
        f"{what} needs {needed / 1e9:.1f} GB, {weights / 1e9:.1f} of them for weights, and this machine lets a model "
        f"hold {room / 1e9:.1f} GB; expected {expected}"
    )
