"""From logits to a token: one distribution, whatever the filters, and a draw from it."""

import math
from collections.abc import Mapping
from dataclasses import dataclass, replace
from functools import lru_cache
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
    another each time. frequency_penalty is taken from a token's logit as often as the reply has it, presence_penalty if
    it has it, as OpenAI counts them; None is 0.
    """

    temperature: float | None = None
    top_p: float | None = None
    top_k: int | None = None
    min_p: float | None = None
    repetition_penalty: float | None = None
    seed: int | None = None
    frequency_penalty: float | None = None
    presence_penalty: float | None = None

    def __post_init__(self) -> None:
        self.check("temperature", 0, HOTTEST, "0 or more, and at most 1e6")
        self.check("top_p", SMALLEST, 1, "above 0 and at most 1")
        self.check("top_k", 0, 2**31 - 1, "a whole number, 0 or more and below 2**31", whole=True)
        self.check("min_p", 0, 1, "from 0 to 1")
        self.check("repetition_penalty", 1 / LARGEST_PENALTY, LARGEST_PENALTY, "above 0, from 1e-3 to 1e3")
        for name in ("frequency_penalty", "presence_penalty"):
            self.check(name, -2, 2, "from -2 to 2")
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


# The filters look at so many of the largest logits of a row, one of few sizes, so that another top_k is no new trace.
FEWEST = 64

# Each [B]: temperature (0: greedy), top_k (0: all), top_p, min_p, penalty, frequency, presence; and, if a row has one,
# bias [B, V] float32.
Law = dict[str, mx.array]
NUMBERS = ("temperature", "top_k", "top_p", "min_p", "penalty", "frequency", "presence")
IN_PROMPT = 2**20  # in what has been seen, beside how often the reply has a token
TOP = 20  # of the likeliest tokens a round tells at most


@dataclass(frozen=True)
class Stages:
    """What the laws of a round's rows have in common: all that a trace knows of them, the numbers being its inputs."""

    suppressed: tuple[int, ...]
    takes_best: bool  # a row is greedy
    draws: bool  # a row is not
    largest: int  # logits of a row that its filters look at; 0: no row has such filters
    top_p: bool
    min_p: bool
    penalty: bool  # of any kind
    bias: bool = False
    tells: bool = False  # a row wants to know how likely its tokens were
    adapts: bool = False  # a row has one of the adapters by name
    pauses: bool = False  # there are tokens behind which a row's round ends: what follows them is held to a form

    def __or__(self, other: "Stages") -> "Stages":
        pairs = {name: (value, vars(other)[name]) for name, value in vars(self).items() if name != "suppressed"}
        return replace(self, **{name: max(pair) for name, pair in pairs.items()})


class Sampler:
    """A `Sampling` with nothing left open, for one checkpoint. Holds no state: keys and seen tokens are arguments."""

    def __init__(
        self,
        sampling: Sampling,
        defaults: GenerationConfig,
        vocab_size: int,
        bias: Mapping[int, float] | None = None,
        tells: bool = False,
    ):
        """bias: added to the logits of these tokens. tells: the rounds say how likely tokens were."""
        chosen = settled(sampling, defaults)
        greedy, filters = chosen.temperature == 0, chosen.top_k or chosen.top_p < 1
        top_k = min(chosen.top_k or vocab_size, vocab_size) if filters else 0
        penalties = chosen.repetition_penalty, sampling.frequency_penalty or 0.0, sampling.presence_penalty or 0.0
        temperature = 0.0 if greedy else max(chosen.temperature, COLDEST)
        self.numbers = dict(zip(NUMBERS, (temperature, top_k, chosen.top_p, chosen.min_p, *penalties), strict=True))
        self.bias = bias or {}
        bound = FEWEST
        while bound < top_k:
            bound *= 4
        self.stages = Stages(
            suppressed=chosen.suppress_tokens,
            takes_best=greedy,
            draws=not greedy,
            largest=min(bound, vocab_size) if filters and not greedy else 0,
            top_p=chosen.top_p < 1 and not greedy,
            min_p=chosen.min_p > 0 and not greedy,
            penalty=penalties != (1, 0, 0),
            bias=bool(self.bias),
            tells=tells,
        )
        self.vocab_size = vocab_size
        self.allowed = allowed(self.stages, vocab_size)

    def law(self) -> Law:
        """Of one row."""
        law = {name: mx.array([number]) for name, number in self.numbers.items()}
        if self.bias:
            law["bias"] = mx.zeros((1, self.vocab_size))
            law["bias"][:, mx.array([*self.bias])] = mx.array([*self.bias.values()])
        return law

    def probabilities(self, logits: mx.array, seen: mx.array | None = None) -> mx.array:
        """Of the one row, logits [L, V] float32, seen [L, V] -> [L, V]."""
        told = None if seen is None else seen[None]
        return probabilities(logits[None], self.stages, self.law(), self.allowed, told)[0]


@lru_cache(maxsize=8)
def allowed(stages: Stages, vocab_size: int) -> mx.array:
    """Tokens that may be chosen, [V] bool."""
    found = mx.ones((vocab_size,), mx.bool_)
    if suppressed := [token for token in stages.suppressed if token < vocab_size]:
        found[mx.array(suppressed)] = False
    mx.eval(found)  # or every trace would compute it anew
    return found


def probabilities(
    logits: mx.array, stages: Stages, law: Law, allowed: mx.array, seen: mx.array | None = None
) -> mx.array:
    """logits [B, L, V] float32 -> probabilities [B, L, V]. seen [B, L, V], for penalties: how often the reply has each
    token, and IN_PROMPT more if the prompt has it.

    The order is transformers': repetition penalty, suppression, temperature, top-k, top-p, min-p; what is added to
    logits comes behind the first.
    """
    numbers = {name: law[name][:, None, None] for name in NUMBERS}
    if seen is not None:
        penalty, count = numbers["penalty"], seen.astype(mx.int32) % IN_PROMPT
        logits = mx.where(seen > 0, mx.where(logits > 0, logits / penalty, logits * penalty), logits)
        logits = logits - numbers["frequency"] * count - numbers["presence"] * (count > 0)
    if stages.bias:
        logits = logits + law["bias"][:, None]
    logits = mx.where(allowed, logits, -mx.inf)
    best = None
    if stages.takes_best:
        best = (mx.arange(logits.shape[-1]) == logits.argmax(axis=-1, keepdims=True)).astype(mx.float32)
        if not stages.draws:
            return best
    temperature = numbers["temperature"]
    logits = logits / mx.where(temperature == 0, 1, temperature)
    found = mx.softmax(mx.where(logits >= lowest(logits, stages, numbers), logits, -mx.inf), axis=-1)
    return found if best is None else mx.where(temperature == 0, best, found)


def lowest(logits: mx.array, stages: Stages, numbers: Law) -> mx.array:
    """The smallest logit that the filters let through, [B, L, 1]: each of them keeps the largest ones."""
    bound = mx.array(-mx.inf)
    if stages.largest:
        best = largest(logits.flatten(0, 1), stages.largest).reshape(*logits.shape[:2], -1)
        top_k = numbers["top_k"]
        kept = mx.arange(stages.largest) < top_k
        if stages.top_p:
            top_p, weights = numbers["top_p"], mx.softmax(mx.where(kept, best, -mx.inf), axis=-1)
            kept = kept & ((weights.cumsum(axis=-1) - weights < top_p) | (top_p >= 1))
        bound = mx.where(top_k == 0, -mx.inf, mx.where(kept, best, mx.inf).min(axis=-1, keepdims=True))
    if stages.min_p:  # log 0 lets all through
        bound = mx.maximum(bound, logits.max(axis=-1, keepdims=True) + mx.log(numbers["min_p"]))
    return bound


def draw(probabilities: mx.array, keys: mx.array, stages: Stages) -> mx.array:
    """[B, V] and a key each, [B, 2] -> ids [B], int32; probabilities need not sum to 1."""
    if not stages.draws:
        return probabilities.argmax(axis=-1).astype(mx.int32)
    noise = mx.vmap(lambda key: mx.random.gumbel(probabilities.shape[1:], key=key))(keys)
    return (mx.log(probabilities) + noise).argmax(axis=-1).astype(mx.int32)


def largest(x: mx.array, k: int) -> mx.array:
    """The k largest of each row, descending, [R, N] -> [R, k]."""
    return -mx.sort(-candidates(x, k)[0], axis=-1)[:, :k]


def candidates(x: mx.array, k: int) -> tuple[mx.array, mx.array]:
    """Some of each row, [R, N], and their places, [R, n] each: the k largest are among them.

    They lie in the k groups whose maxima are largest, so two short sorts do for a vocabulary of 262144.
    """
    rows, n = x.shape
    width = math.isqrt(n // k)
    if width <= 1:
        return x, mx.broadcast_to(mx.arange(n), x.shape)
    x = mx.pad(x, [(0, 0), (0, -n % width)], constant_values=-mx.inf).reshape(rows, -1, width)
    groups = mx.argsort(-x.max(axis=-1), axis=-1)[:, :k, None]
    places = groups * width + mx.arange(width)
    return mx.take_along_axis(x, groups, axis=1).reshape(rows, -1), places.reshape(rows, -1)


def told(logits: mx.array, tokens: mx.array) -> mx.array:
    """How likely tokens [B, L] were by the model's own law, logits [B, L, V], and which were likeliest there.

    [B, L, 1 + 2 n] float32, n = TOP or V: the token's logarithm of its probability, the n largest, their ids.
    """
    scale = logits.logsumexp(axis=-1, keepdims=True)
    chosen = mx.take_along_axis(logits, mx.maximum(tokens, 0)[:, :, None], axis=2)
    count = min(TOP, logits.shape[-1])
    values, places = candidates(logits.flatten(0, 1), count)
    order = mx.argsort(-values, axis=-1)[:, :count]
    values, places = (mx.take_along_axis(found, order, axis=1) for found in (values, places))
    best, ids = (found.reshape(*tokens.shape, count) for found in (values, places))
    return mx.concatenate([chosen - scale, best - scale, ids.astype(mx.float32)], axis=-1)
