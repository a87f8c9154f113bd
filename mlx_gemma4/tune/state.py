"""A run's state: trees of arrays in one file."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any, cast

import mlx.core as mx
from mlx.utils import tree_flatten, tree_unflatten

from mlx_gemma4.errors import unbroken
from mlx_gemma4.weights.writing import write_arrays


def save(path: Path, trees: Mapping[str, Any], about: Mapping[str, str]) -> None:
    """Trees of arrays by their names, and what is said of them."""
    arrays = {f"{name}:{key}": value for name, tree in trees.items() for key, value in flat(tree)}
    write_arrays(path, arrays, about)


def flat(tree: Any) -> list[tuple[str, mx.array]]:
    return cast(list[tuple[str, mx.array]], tree_flatten(tree))


def trees_of(path: Path) -> tuple[dict[str, Any], dict[str, str]]:
    """What `save` wrote; ValueError if it is something else."""
    try:
        arrays, about = cast(Any, mx.load(str(path), format="safetensors", return_metadata=True))
    except RuntimeError as error:
        raise ValueError(f"{path} is damaged: {unbroken(error)}") from None
    trees: dict[str, list[tuple[str, mx.array]]] = {}
    for key, value in arrays.items():
        name, _, rest = key.partition(":")
        trees.setdefault(name, []).append((rest, value))
    return {name: tree_unflatten(pairs) for name, pairs in trees.items()}, about


def merge(old: Any, new: Any) -> Any:
    """Saved values in the structure they came from: empty parts are not saved."""
    if isinstance(old, dict):
        return {key: merge(value, new[key]) if key in new else value for key, value in old.items()}
    if isinstance(old, list):
        return [merge(a, b) for a, b in zip(old, new, strict=True)]
    return new
