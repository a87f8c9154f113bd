"""A run's files beside its adapter, each whole or not at all."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any, cast

import mlx.core as mx
from mlx.utils import tree_flatten, tree_unflatten

from mlx_gemma4.entry import if_stopped
from mlx_gemma4.errors import unbroken


def write_text(path: Path, text: str) -> None:
    part = path.with_name(f"part-{path.name}")
    try:
        with if_stopped(lambda: part.unlink(missing_ok=True)):
            part.write_text(text, encoding="utf-8")
            part.replace(path)
    finally:
        part.unlink(missing_ok=True)


def write_arrays(path: Path, arrays: Mapping[str, mx.array], about: Mapping[str, str]) -> None:
    part = path.with_name(f"part-{path.name}")
    try:
        with if_stopped(lambda: part.unlink(missing_ok=True)):
            mx.save_safetensors(str(part), dict(arrays), dict(about))
            part.replace(path)
    except RuntimeError as error:
        raise OSError(f"{path} cannot be written: {unbroken(error)}") from None
    finally:
        part.unlink(missing_ok=True)


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
