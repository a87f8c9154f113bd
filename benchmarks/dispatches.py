"""How many kernels a round is, and how many of them follow each other: the graph that MLX compiles, as Metal runs it.

Nothing is computed. What Metal has a kernel for and the CPU's build takes apart is counted as one; views are free, a
concatenation is one for each input, writing at a start that is an array two. Copies that shapes force are not seen.
"""

import json
import re
import tempfile
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Annotated, Any

import mlx.core as mx
import typer

from mlx_gemma4 import Sampling, load
from mlx_gemma4.decoding.round import State, make_round
from mlx_gemma4.decoding.sampling import Sampler
from mlx_gemma4.model import matrix
from mlx_gemma4.model.model import Model

VIEWS = {
    "Broadcast", "BroadcastAxes", "Reshape", "Flatten", "Unflatten", "Transpose", "Squeeze", "ExpandDims", "Slice",
    "Split", "AsStrided", "View", "Depends", "StopGradient", "NumberOfElements",
}  # fmt: skip
TWO = {"DynamicSlice", "DynamicSliceUpdate"}


@dataclass(frozen=True)
class Kernels:
    """Of one pass."""

    by_name: dict[str, int]
    chain: int  # the most that follow each other

    @property
    def count(self) -> int:
        return sum(self.by_name.values())


def opaque(like: mx.array, *inputs: mx.array | None) -> mx.array:
    """One node that nothing is fused with, as wide as `like`, and that waits for the inputs."""
    waits = [array for array in inputs if array is not None]
    made = mx.cumsum(like, axis=-1)
    return mx.depends(made, waits) if waits else made


@contextmanager
def as_on_metal() -> Iterator[None]:
    """While this lasts, what has a kernel of its own on Metal is one node."""

    def rms_norm(x: mx.array, weight: mx.array | None, eps: float) -> mx.array:
        return opaque(x)

    def rope(x: mx.array, dims: int, *, offset: int | mx.array, **settings: Any) -> mx.array:
        return opaque(x, offset if isinstance(offset, mx.array) else None)

    def attention(q: mx.array, k: mx.array, v: mx.array, *, scale: float, mask: mx.array | None = None) -> mx.array:
        return opaque(q, k, v, mask)

    def dequantize(
        w: mx.array, scales: mx.array, biases: mx.array | None = None, group_size: int = 64, bits: int = 4, **rest: Any
    ) -> mx.array:
        dims = w.shape[-1] * 32 // bits
        return opaque(mx.broadcast_to(scales[..., :1].astype(scales.dtype), (*w.shape[:-1], dims)), w)

    replaced: list[tuple[Any, str, Callable[..., mx.array]]] = [
        (mx.fast, "rms_norm", rms_norm),
        (mx.fast, "rope", rope),
        (mx.fast, "scaled_dot_product_attention", attention),
        (mx, "dequantize", dequantize),
    ]
    kept = [getattr(module, name) for module, name, _ in replaced]
    for module, name, function in replaced:
        setattr(module, name, function)
    try:
        yield
    finally:
        for (module, name, _), function in zip(replaced, kept, strict=True):
            setattr(module, name, function)


def kernels(*outputs: mx.array) -> Kernels:
    """Of the graph behind these arrays, which have not been evaluated."""
    with tempfile.TemporaryDirectory() as scratch:
        file = Path(scratch) / "graph.dot"
        mx.export_to_dot(str(file), *outputs)
        graph = file.read_text()
    labels = dict(re.findall(r'^\{ (\d+) \[label ="(\w+)"', graph, re.MULTILINE))
    inputs: dict[str, list[str]] = {node: [] for node in labels}
    made_by: dict[str, str] = {}
    for source, target in re.findall(r'^"?(\w+)"? -> "?(\w+)"?$', graph, re.MULTILINE):
        if target in labels:
            inputs[target].append(source)
        else:
            made_by[target] = source

    def cost(node: str) -> int:
        label = labels[node]
        if label in VIEWS:
            return 0
        return 2 if label in TWO else len(inputs[node]) if label == "Concatenate" else 1

    @cache
    def depth(node: str) -> int:
        before = [depth(made_by[array]) for array in inputs[node] if array in made_by]
        return max(before, default=0) + min(cost(node), 1)

    names: Counter[str] = Counter()
    for node in reversed(labels):  # from the back would recurse too deep
        names["Compiled" if labels[node].startswith("Compiled") else labels[node]] += cost(node)
    chain = 0
    for node in labels:  # inputs come first
        chain = max(chain, depth(node))
    return Kernels({name: count for name, count in names.most_common() if count}, chain)


def round_kernels(model: Model, length: int, slots: int = 2048) -> Kernels:
    """Of a greedy round of `length` drafts."""
    sampler = Sampler(Sampling(temperature=0), model.config.generation, model.config.text.vocab_size)
    hidden = mx.zeros((1, 1, model.config.text.hidden_size), model.language_model.dtype)
    state: State = sampler.law() | {
        "offset": mx.array([100]), "random": mx.random.key(0)[None], "hidden": hidden, "token": mx.array([9]),
        "limit": mx.array([length]),
    }  # fmt: skip
    arrays = model.caches(slots).arrays
    mx.eval(state, arrays)
    with as_on_metal():
        tokens, state, arrays = make_round(model, sampler.stages, length)(state, arrays)
        return kernels(tokens, *state.values(), *[array for layer in arrays for array in layer])


def main(
    model: Annotated[str, typer.Option(help="Folder or hub id.")],
    length: Annotated[list[int] | None, typer.Option(help="Drafts a round; repeatable.")] = None,
) -> None:
    matrix.joins_float32 = lambda: True  # as on a GPU
    loaded, _ = load(model)
    layers = len(loaded.language_model.layers)
    results = []
    for drafts in length or ([0] if loaded.drafter is None else [0, 3]):
        found = round_kernels(loaded, drafts)
        print(f"{drafts} drafts: {found.count} kernels, {found.count / layers:.1f} a layer, {found.chain} in a chain")
        print("  " + ", ".join(f"{name} {count}" for name, count in found.by_name.items()))
        results.append({"drafts": drafts, "kernels": found.count, "layers": layers, "chain": found.chain})
    print(json.dumps({"results": results}))


if __name__ == "__main__":
    typer.run(main)
