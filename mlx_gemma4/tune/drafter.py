"""The drafter learns to say what the tuned model says, on that model's own hidden states and distributions."""

import json
import shutil
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import mlx.core as mx
import mlx.optimizers as optim
import numpy as np
from mlx import nn
from mlx.utils import tree_unflatten

from mlx_gemma4.entry import if_stopped
from mlx_gemma4.model.drafter import Drafter
from mlx_gemma4.model.matrix import blocks
from mlx_gemma4.model.model import Model
from mlx_gemma4.tune.loss import BLOCK
from mlx_gemma4.tune.network import Keys, Turns, after_attention, attend, hidden_states, queries, turns_of
from mlx_gemma4.tune.rows import Row
from mlx_gemma4.tune.run import Schedule
from mlx_gemma4.tune.step import Processes, rate_at, update
from mlx_gemma4.weights.load import DRAFTER_BITS, DRAFTER_GROUP_SIZE, parameters
from mlx_gemma4.weights.writing import write_arrays, write_text

PROPOSALS = 3  # learnt in a row: each further one starts from what the drafter itself has made
LOWEST, HIGHEST, MANY = 1e-3, 1e-2, 700  # of Muon, whose steps do not hang on a matrix's size; updates
BITS, GROUP = 8, 64  # of matrices that were quantized: a 4-bit step is larger than what they learnt


def propose(
    drafter: Drafter, embedding: mx.array, hidden: mx.array, turns: Mapping[str, Turns], masks: Mapping[str, mx.array],
    keys: Mapping[str, Keys],
) -> tuple[mx.array, mx.array]:  # fmt: skip
    """One proposal at N places at once: embedding and hidden [1, N, D] -> the drafter's states, and its next hidden."""
    h = drafter.pre_projection(mx.concatenate([embedding, hidden], axis=-1))
    for layer in drafter.layers:
        q = queries(layer.self_attn, layer.input_layernorm(h), turns[layer.kind])
        h = after_attention(layer, h, attend(layer.self_attn, q, keys[layer.kind], masks[layer.kind]))
    h = drafter.norm(h)
    return h, drafter.post_projection(h)


def followers(row: Row) -> np.ndarray:
    """[N] bool: whether a learnt token is followed by the next one in the list."""
    places, found = row.places, np.zeros(len(row.places), bool)
    one, other = places[:-1], places[1:]
    found[:-1] = (
        (row.ids[other] == row.targets[:-1]) & (row.positions[other] == row.positions[one] + 1) & row.full[other, one]
    )
    return found


def rounds(model: Model, drafter: Drafter, row: Row) -> tuple[mx.array, mx.array]:
    """The cross entropy of each proposal with the model's law; Σ min(p, q) of each first one."""
    places, follows = row.places, followers(row)
    hidden, keys = hidden_states(model, row, checkpoint=False)
    hidden = mx.stop_gradient(hidden[:, mx.array(places)])
    keys = {kind: (mx.stop_gradient(k), mx.stop_gradient(v)) for kind, (k, v) in keys.items()}
    positions = mx.array(row.positions[places])[None]
    turns = turns_of(drafter.layers, positions)
    masks = {
        kind: mx.array((row.full if layer.self_attn.is_full else row.sliding)[places])[None, None]
        for layer in drafter.layers
        for kind in (layer.kind,)
    }

    def block(states: mx.array, said: mx.array) -> tuple[mx.array, mx.array]:
        p = mx.stop_gradient(mx.softmax(model.language_model.head(said[None])[0], axis=-1))
        log_q = nn.log_softmax(drafter.embed_tokens.as_linear(states).astype(mx.float32), axis=-1)
        return -(p * log_q).sum(axis=-1), mx.stop_gradient(mx.minimum(p, mx.exp(log_q)).sum(axis=-1))

    starts, own = np.arange(len(places)), hidden
    losses: list[mx.array] = []
    accepted: list[mx.array] = []
    for ahead in range(1, PROPOSALS + 1):
        starts = starts[follows[np.minimum(starts + ahead - 1, len(places) - 1)]]
        newest = row.targets[np.minimum(np.arange(len(places)) + ahead - 1, len(places) - 1)]
        states, own = propose(drafter, model.language_model.embed(mx.array(newest)[None]), own, turns, masks, keys)
        for first in range(0, len(starts), BLOCK):
            at = starts[first : first + BLOCK]
            each, hit = mx.checkpoint(block)(states[0][mx.array(at)], hidden[0][mx.array(at + ahead)])
            losses.append(each)
            accepted += [hit] if ahead == 1 else []
    if not losses:
        return mx.zeros((0,)), mx.zeros((0,))
    return mx.concatenate(losses), mx.concatenate(accepted)


def acceptance(model: Model, drafter: Drafter, rows: Iterable[Row], processes: Processes) -> float:
    """How often the first proposal of a round is accepted, at temperature 1."""
    found = mx.zeros(2)
    for row in rows:
        accepted = rounds(model, drafter, row)[1]
        found = found + mx.stack([accepted.sum(), mx.array(float(accepted.size))])
        mx.eval(found)
        mx.clear_cache()
    hits, all_of_them = np.array(processes.sum([found])[0])
    return float(hits / all_of_them)


def unfreeze_matrices(drafter: Drafter) -> list[str]:
    """Its layers and projections learn, in float32: smaller steps would be lost. Names of those that were quantized."""
    drafter.freeze()
    linear = (nn.Linear, nn.QuantizedLinear)
    matrices = [(name, part) for name, part in drafter.named_modules() if isinstance(part, linear)]
    for name, part in matrices:
        plain = nn.Linear(1, 1, bias=False)
        plain.weight = mx.concatenate([*blocks(part)])
        drafter.update_modules(tree_unflatten([(name, plain)]))
    mx.eval(drafter.parameters())
    return [name for name, part in matrices if isinstance(part, nn.QuantizedLinear)]


def slopes(model: Model, drafter: Drafter, row: Row) -> tuple[mx.array, Any]:
    """What `update` asks of a row; every proposal weighs as much."""

    def total(weights: Any) -> tuple[mx.array, int]:
        drafter.update(weights)
        each = rounds(model, drafter, row)[0]
        return each.sum(), each.size

    weights = drafter.trainable_parameters()
    (loss, size), found = mx.value_and_grad(total)(weights)
    drafter.update(weights)
    if not np.isfinite(loss.item()):
        raise ValueError(f"{row.where[0]}: the drafter's loss is {loss.item()}; expected another example")
    return mx.stack([loss, mx.array(max(1.0, size)), mx.array(float(row.tokens))]), found


def optimizer_for(updates: int) -> optim.Muon:
    """Of so many: at a high rate what the drafter knew is lost at first, and few of them do not bring it back."""
    return optim.Muon(min(max(LOWEST, HIGHEST * (updates / MANY) ** 2), HIGHEST), weight_decay=0.0)


def train_drafter(
    model: Model, drafter: Drafter, optimizer: optim.Optimizer, schedule: Schedule | Sequence[Sequence[int]],
    rows_of: Callable[[Sequence[int]], Iterable[Row]], processes: Processes,
) -> None:  # fmt: skip
    """What of it is not frozen, on the tuned model. schedule: the examples of each update, of all processes, which
    share them; the optimizer's learning rate is the highest."""
    peak = float(optimizer.learning_rate)
    for number, examples in enumerate(schedule):
        optimizer.learning_rate = rate_at(number, len(schedule), peak, len(schedule) // 10)
        update(drafter, optimizer, rows_of(processes.share(examples)), partial(slopes, model, drafter), processes)


def write_drafter(folder: Path, source: Path, drafter: Drafter, quantized: Collection[str]) -> None:
    """A drafter's folder, in its computing type; matrices with these names are quantized to 8 bits. It is there whole
    or as it was: half of one would be no model's drafter."""
    config = json.loads((source / "config.json").read_text(encoding="utf-8"))
    own = {name: {"group_size": GROUP, "bits": BITS, "mode": "affine"} for name in quantized}
    drafter.set_dtype(drafter.norm.weight.dtype)
    nn.quantize(drafter, GROUP, BITS, class_predicate=lambda name, _: name in own)
    quantization = config.get("quantization") or config.get("quantization_config")
    if own:  # a partner in full precision was quantized as it was loaded
        default = {"group_size": DRAFTER_GROUP_SIZE, "bits": DRAFTER_BITS, "mode": "affine"}
        config["quantization"] = config["quantization_config"] = {**(quantization or default), **own}
    part, old = (folder.with_name(f".{folder.name}.{end}") for end in ("part", "old"))

    def undo() -> None:
        shutil.rmtree(part, ignore_errors=True)
        if old.exists() and not folder.exists():
            old.rename(folder)

    undo()  # what was killed
    try:
        with if_stopped(undo):
            part.mkdir(parents=True)
            for file in source.glob("*.json"):
                if file.name != "config.json" and not file.name.endswith("index.json"):
                    shutil.copyfile(file, part / file.name)
            write_arrays(part / "model.safetensors", parameters(drafter), {"format": "mlx"})
            write_text(part / "config.json", json.dumps(config, indent=2) + "\n")
            shutil.rmtree(old, ignore_errors=True)
            if folder.exists():
                folder.rename(old)
            part.rename(folder)
    finally:
        undo()
    shutil.rmtree(old, ignore_errors=True)
