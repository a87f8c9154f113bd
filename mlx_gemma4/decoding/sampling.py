"""From logits to a token: one distribution, whatever the filters, and a draw from it."""

import math
from dataclasses import dataclass, replace
from numbers import Integral, Real

import mlx.core as mx

from mlx_gemma4.config import GenerationConfig
from mlx_gemma4.errors import shown

# The law is computed in float32: beyond these bounds it would divide by zero or multiply infinities.
HOTTEST = 1e6
SMALLEST = 1e-30  # top_p: less is 0 there, and would let nothing through
LARGEST_PENALTY = 1e3
COLDEST = 1e-6  # colder, float32 logits of 30 differ by nothing or by so much that the largest alone is drawn


@dataclass(frozen=True)
class Sampling:
    """How to choose a token; what is None comes from the checkpoint's generation_config.json.

    temperature 0 is greedy; top_k 0, top_p 1, min_p 0 and repetition_penalty 1 switch those off; seed None is
    another each time.
    """

    temperature: float | None = None
    top_p: float | None = None
    top_k: int | None = None
    min_p: float | None = None
    repetition_penalty: float | None = None
    seed: int | None = None

    def __post_init__(self) -> None:
        self.check("temperature", 0, HOTTEST, "0 or more, and at most 1e6")
        self.check("top_p", SMALLEST, 1, "above 0 and at most 1")
        self.check("top_k", 0, 2**31 - 1, "a whole number, 0 or more and below 2**31", whole=True)
        self.check("min_p", 0, 1, "from 0 to 1")
        self.check("repetition_penalty", 1 / LARGEST_PENALTY, LARGEST_PENALTY, "above 0, from 1e-3 to 1e3")
        self.check("seed", 0, 2**64 - 1, "a whole number, from 0 to 2**64 - 1", whole=True)

    def check(self, name: str, low: float, high: float, expected: str, *, whole: bool = False) -> None:
        """ValueError for a field that is out of bounds; numpy's numbers and fractions become Python's."""
        value = vars(self)[name]
        if value is None:
            return
        numeric = isinstance(value, Integral if whole else Real) and not isinstance(value, bool)
        if not numeric or not low <= value <= high:  # NaN is in no bounds
            raise ValueError(f"{name} is {shown(value)}; expected {expected}")
        object.__setattr__(self, name, int(value) if whole else float(value))


def settled(sampling: Sampling, defaults: GenerationConfig) -> GenerationConfig:
    """The checkpoint's defaults, with what the sampling says in their place."""
    own = ("temperature", "top_p", "top_k", "min_p", "repetition_penalty")
    given = {name: value for name, value in vars(sampling).items() if name in own and value is not None}
    return replace(defaults, **given)


class Sampler:
    """A `Sampling` with nothing left open, for one checkpoint. Holds no state: keys and seen tokens are arguments."""

    def __init__(self, sampling: Sampling, defaults: GenerationConfig, vocab_size: int):
        chosen = self.chosen = settled(sampling, defaults)
        self.temperature = max(chosen.temperature, COLDEST) if chosen.temperature else 0.0
        self.top_p, self.min_p = chosen.top_p, chosen.min_p
        self.top_k = min(chosen.top_k, vocab_size)
        self.penalty = chosen.repetition_penalty
        ids = mx.arange(vocab_size)
        suppressed = mx.array(chosen.suppress_tokens or (-1,))
        self.allowed = (ids[:, None] != suppressed).all(axis=1)  # [V]
        mx.eval(self.allowed)  # or every trace would compute it anew

    def probabilities(self, logits: mx.array, seen: mx.array | None = None) -> mx.array:
        """logits [R, V] float32, seen [R, V] bool (for the repetition penalty) -> probabilities [R, V].

        The order is transformers': penalty, suppression, temperature, top-k, top-p, min-p.
        """
        if seen is not None:
            logits = mx.where(seen, mx.where(logits > 0, logits / self.penalty, logits * self.penalty), logits)
        logits = mx.where(self.allowed, logits, -mx.inf)
        if self.temperature == 0:
            best = logits.argmax(axis=-1, keepdims=True)
            return (mx.arange(logits.shape[-1]) == best).astype(mx.float32)
        logits = logits / self.temperature
        return mx.softmax(mx.where(logits >= self.lowest(logits), logits, -mx.inf), axis=-1)

    def lowest(self, logits: mx.array) -> mx.array:
        """The smallest logit that the filters let through, [R, 1]: each of them keeps the largest ones."""
        bound = mx.array(-mx.inf)
        if self.top_k or self.top_p < 1:
            best = largest(logits, self.top_k or logits.shape[-1])
            bound = best[:, -1:]
            if self.top_p < 1:
                weights = mx.softmax(best, axis=-1)
                before = weights.cumsum(axis=-1) - weights
                bound = mx.where(before < self.top_p, best, mx.inf).min(axis=-1, keepdims=True)
        if self.min_p > 0:
            bound = mx.maximum(bound, logits.max(axis=-1, keepdims=True) + math.log(self.min_p))
        return bound

    def draw(self, probabilities: mx.array, key: mx.array) -> mx.array:
        """[R, V] -> ids [R], int32; probabilities need not sum to 1."""
        if self.temperature == 0:
            return probabilities.argmax(axis=-1).astype(mx.int32)
        return mx.random.categorical(mx.log(probabilities), key=key).astype(mx.int32)


def largest(x: mx.array, k: int) -> mx.array:
    """The k largest of each row, descending, [R, N] -> [R, k].

    They lie in the k groups whose maxima are largest, so two short sorts do for a vocabulary of 262144.
    """
    rows, n = x.shape
    width = math.isqrt(n // k)
    if width > 1:
        x = mx.pad(x, [(0, 0), (0, -n % width)], constant_values=-mx.inf).reshape(rows, -1, width)
        groups = mx.argsort(-x.max(axis=-1), axis=-1)[:, :k]
        x = mx.take_along_axis(x, groups[:, :, None], axis=1).reshape(rows, -1)
    return -mx.sort(-x, axis=-1)[:, :k]
