"""One update of what is trained: the gradients of some rows, of all processes, weighted by their learnt tokens."""

import math
import os
import sys
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from threading import Timer
from typing import Any, TypeVar

import mlx.core as mx
import mlx.optimizers as optim
import numpy as np
from mlx import nn
from mlx.utils import tree_map, tree_unflatten

from mlx_gemma4.model.model import Model
from mlx_gemma4.tune.loss import learnt, surprises
from mlx_gemma4.tune.network import learnt_states
from mlx_gemma4.tune.rows import Row
from mlx_gemma4.tune.state import flat
from mlx_gemma4.weights.peers import differing

LARGEST_NORM = 1.0  # of an update's gradient
PATIENCE = 900  # seconds that another process may take longer than this one
R = TypeVar("R", bound=Row)
T = TypeVar("T")


@dataclass(frozen=True)
class Seen:
    """What a pass over some rows came to, of all processes together."""

    loss: float  # nats of a learnt token, on average
    learnt: float  # by weight
    tokens: int


class Processes:
    """Those that `mlx.launch` has started, or this one alone."""

    def __init__(self, group: mx.distributed.Group):
        self.group, self.rank, self.size = group, group.rank(), group.size()

    def share(self, items: Sequence[T]) -> Sequence[T]:
        """Those that are this process's."""
        return items[self.rank :: self.size]

    def are_alike(self, described: str) -> bool:
        """Whether the same is said of all of them. The process ends as in `sum`."""
        with given_up_after(PATIENCE):
            return not differing(self.group, described)

    def sum(self, arrays: list[mx.array]) -> list[mx.array]:
        """Of all processes, float32. Apart from what computes them: sums inside of a step may wait for each other for
        ever. The process ends if the others do not answer."""
        mx.eval(arrays)
        if self.size == 1:
            return arrays
        joined = mx.concatenate([array.astype(mx.float32).reshape(-1) for array in arrays])
        mx.eval(joined)
        with given_up_after(PATIENCE):
            whole = mx.distributed.all_sum(joined, group=self.group, stream=mx.cpu)
            mx.eval(whole)
        ends = [int(end) for end in np.cumsum([array.size for array in arrays])[:-1]]
        parts = mx.split(whole, ends)
        return [part.reshape(array.shape) for part, array in zip(parts, arrays, strict=True)]


@contextmanager
def given_up_after(seconds: float) -> Iterator[None]:
    def give_up() -> None:
        print(f"error: the other processes have not answered for {seconds:g} s; start again to go on", file=sys.stderr)
        os._exit(1)

    timer = Timer(seconds, give_up)
    timer.daemon = True
    timer.start()
    try:
        yield
    finally:
        timer.cancel()


def check_finite(each: mx.array, row: Row) -> None:
    """ValueError that names the example if the loss of one is no number."""
    wrong = np.flatnonzero(~np.isfinite(np.array(each)))
    if len(wrong):
        raise ValueError(
            f"{row.where[row.owners[wrong[0]]]}: the loss is {each[int(wrong[0])].item()}; expected a smaller "
            "--learning-rate or --scale, or another example"
        )


def gradients(model: Model, row: Row, states: Callable[[], mx.array]) -> tuple[mx.array, Any]:
    """The surprise at each learnt token, [N], and the gradient of their weighted sum.

    states: what they are told from, [N, D], of the model with the weights it has when this is called.
    """

    def total(weights: Any) -> tuple[mx.array, tuple[mx.array, list[list[mx.array]]]]:
        model.update(weights)
        number, each, stages = learnt(model.language_model, states(), mx.array(row.targets), mx.array(row.weights))
        return number, (each, stages)

    weights = model.trainable_parameters()
    (_, (each, stages)), found = mx.value_and_grad(total)(weights)
    model.update(weights)  # not those of the trace
    for stage in stages:
        mx.eval(stage)
    return each, found


def slopes(model: Model, row: R, states: Callable[[R], mx.array]) -> tuple[mx.array, Any]:
    """What `update` asks of a row. ValueError that names the example if a loss is no number."""
    each, found = gradients(model, row, partial(states, row))
    check_finite(each, row)
    return counted(each, row), found


def update(
    module: nn.Module, optimizer: optim.Optimizer, rows: Iterable[R], slopes: Callable[[R], tuple[mx.array, Any]],
    processes: Processes,
) -> Seen:  # fmt: skip
    """Take a step down the mean loss of all processes' rows. ValueError if it is not finite.

    slopes: of a row, its summed loss, weight and tokens [3], and the gradient of the first by what is trained.
    """
    summed = tree_map(mx.zeros_like, module.trainable_parameters())
    counts = mx.zeros(3)
    where: list[str] = []
    for row in rows:
        own, found = slopes(row)
        summed = tree_map(mx.add, summed, found)
        counts = counts + own
        mx.eval(counts, summed)
        mx.clear_cache()
        where += row.where
    names = [name for name, _ in flat(summed)]
    *values, counts = processes.sum([*(value for _, value in flat(summed)), counts])
    seen = seen_of(counts)
    values = [value / seen.learnt for value in values]
    norm = math.sqrt(np.sum([np.array(mx.square(value).sum()) for value in values]))
    if not math.isfinite(norm):
        raise ValueError(f"the gradient of {', '.join(where[:4])} is {norm}; expected a smaller --learning-rate")
    shrink = min(1.0, LARGEST_NORM / norm) if norm else 1.0
    optimizer.update(module, tree_unflatten([(name, own * shrink) for name, own in zip(names, values, strict=True)]))
    mx.eval(module.trainable_parameters(), optimizer.state)
    return seen


def counted(each: mx.array, row: Row) -> mx.array:
    """Summed surprise, learnt tokens, both by weight; all tokens."""
    weights = mx.array(row.weights)
    return mx.stack([(weights * each).sum(), weights.sum(), mx.array(float(row.tokens))])


def seen_of(counts: mx.array) -> Seen:
    loss, learnt_tokens, tokens = np.array(counts).tolist()
    return Seen(loss / learnt_tokens, learnt_tokens, int(tokens))


def measure(model: Model, rows: Iterable[Row], processes: Processes) -> Seen:
    """The mean loss, without gradients."""
    counts = mx.zeros(3)
    for row in rows:
        states = learnt_states(model, row, checkpoint=False)
        each = surprises(model.language_model, states, mx.array(row.targets))
        counts = counts + counted(each, row)
        mx.eval(counts)
        mx.clear_cache()
        check_finite(each, row)
    return seen_of(processes.sum([counts])[0])


def rate_at(number: int, total: int, peak: float, warmup: int) -> float:
    """The learning rate of an update: a line up, then half a cosine down to nothing."""
    if number < warmup:
        return peak * (number + 1) / (warmup + 1)
    return peak * (1 + math.cos(math.pi * (number - warmup) / max(1, total - warmup))) / 2
