"""How fast the link between machines is, and how long a token takes with a model that they share.

Seconds a token, b what of the weights a machine reads for it, B its bandwidth, t(n) the time of an exchange of n bytes,
which is a latency and n / rate, of L layers and M machines:

    by tensors  max(b / B) + 2 L t(hidden) + t(logits) + t(0)
    by layers   sum(b / B) + (M - 1) t(hidden) + t(0)

Drafts add an exchange a round, t(0), to both.
"""

import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import mlx.core as mx

from mlx_gemma4.config import TextConfig

LARGE = 2**22  # bytes; a sum of them takes much longer than its latency
ROWS, COLUMNS = 4096, 8192  # of a matrix that no cache holds


@dataclass(frozen=True)
class Link:
    """Between all machines: what an exchange takes."""

    latency: float  # seconds, of a sum of few bytes
    rate: float  # bytes a second beyond that

    def seconds(self, nbytes: int) -> float:
        return self.latency + nbytes / self.rate


def token_seconds(split: str, text: TextConfig, item_bytes: int, reading: Sequence[float], link: Link) -> float:
    """Seconds a token. text: of the whole model; reading: what each machine takes for its weights."""
    hidden, decided = link.seconds(text.hidden_size * item_bytes), link.seconds(0)
    if split == "layers":
        return sum(reading) + (len(reading) - 1) * hidden + decided
    return max(reading) + 2 * len(text.layer_types) * hidden + link.seconds(text.vocab_size * item_bytes) + decided


def even_latency(text: TextConfig, by_tensors: Sequence[float], by_layers: Sequence[float]) -> float:
    """Seconds of an exchange below which a model is faster by tensors, where rates do not count. Arguments as
    `token_seconds`'s, what each machine takes for its weights."""
    more = 2 * len(text.layer_types) + 2 - len(by_layers)  # exchanges
    return max(0.0, sum(by_layers) - max(by_tensors)) / more


def time_link(group: mx.distributed.Group) -> Link:
    """All machines are to call it at once."""

    def exchange(count: int) -> Callable[[], object]:
        own = mx.zeros((count,))
        return lambda: mx.eval(mx.distributed.all_sum(own, group=group))

    latency, long = timed(exchange(1), 20), timed(exchange(LARGE // 4), 3)
    return Link(latency, LARGE / max(long - latency, 1e-9))


def time_reading(dtype: mx.Dtype) -> float:
    """Bytes of weights a second that a row is multiplied by."""
    matrix, row = mx.zeros((ROWS, COLUMNS), dtype), mx.zeros((1, COLUMNS), dtype)
    mx.eval(matrix)
    return matrix.nbytes / timed(lambda: mx.eval(row @ matrix.T), 3)


def timed(run: Callable[[], object], times: int) -> float:
    """Seconds, the middle of so many, the first, which also prepares, not among them."""
    found = []
    for _ in range(times + 1):
        begun = time.perf_counter()
        run()
        found.append(time.perf_counter() - begun)
    return statistics.median(found[1:])
