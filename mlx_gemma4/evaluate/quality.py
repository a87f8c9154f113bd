"""How close a model's next-token distributions are to another's, for models of any size.

A model is read layer by layer: one layer's tensors are loaded, all exchanges go through it, and it is dropped. What is
kept of a reference are the likeliest tokens of each position and the mass of the others.
"""

import hashlib
import json
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

import mlx.core as mx
import numpy as np
from mlx import nn
from mlx.utils import tree_map_with_path

from mlx_gemma4.decoding.sampling import Sampler, Sampling
from mlx_gemma4.errors import CheckpointError
from mlx_gemma4.model.arrange import arrange_drafter, arrange_layer
from mlx_gemma4.model.cache import Caches, LayerCache, empty_cache
from mlx_gemma4.model.mask import whole_mask
from mlx_gemma4.model.matrix import Adapted, adapt, settle_gains
from mlx_gemma4.model.model import Model, image_blocks
from mlx_gemma4.model.split import Share, join_head, join_layer
from mlx_gemma4.prompt.processor import Processor
from mlx_gemma4.prompt.prompt import Prompt, check_length
from mlx_gemma4.prompt.said import asked_and_said
from mlx_gemma4.weights.computing import load_value
from mlx_gemma4.weights.load import Checkpoint, parameters, quantize_drafter
from mlx_gemma4.weights.writing import beside

KEPT = 1024  # tokens of a position whose probabilities are kept, 8 KB; what the others have is kept as one number
ROWS = 32  # positions that go through the head at once: 34 MB for each array of probabilities


# --- exchanges ---------------------------------------------------------------------------------


@dataclass(frozen=True)
class Exchange:
    """A chat whose last message is the assistant's: this answer is what a model is measured on."""

    prompt: Prompt  # all of it, the answer and its stop token included
    start: int  # index of the answer's first token

    @property
    def rows(self) -> slice:
        """The positions whose distributions count: those that predict a token of the answer."""
        return slice(self.start - 1, len(self.prompt) - 1)


def encode(processor: Processor, line: dict[str, Any], max_tokens: int | None) -> Exchange:
    """The tokens of {"messages": […], "tools": […]}, of its answer the first `max_tokens`."""
    asked, said = asked_and_said(processor, line["messages"], line.get("tools"))
    budget = processor.image_budget(None)
    loaded = [(part["type"], processor.read(part, budget)) for part in asked.media]
    request = processor.assemble(asked.text, asked.mark, loaded)
    whole = Prompt([*request.token_ids, *said[:max_tokens]], request.media)
    check_length(whole, processor.config)
    return Exchange(whole, len(request))


def fingerprint(model: Model, exchanges: Sequence[Exchange]) -> str:
    """Of the vocabulary and the exchanges' tokens: two models are compared on the same ones."""
    parts = [[exchange.start, exchange.prompt.token_ids] for exchange in exchanges]
    text = json.dumps([model.config.text.vocab_size, parts])
    return hashlib.sha256(text.encode()).hexdigest()


# --- layer by layer ----------------------------------------------------------------------------


def load_module(checkpoint: Checkpoint, module: nn.Module, prefix: str) -> None:
    """Fill a module whose parameters' paths begin with `prefix`."""
    tensors, config = checkpoint.tensors, checkpoint.config
    values = [(path, load_value(tensors[prefix + path], config)) for path in parameters(module)]
    module.load_weights(values, strict=False)
    settle_gains(module)


def unpack(module: nn.Module, dtype: mx.Dtype) -> None:
    """Make plain matrices of quantized ones: products of many rows then take no longer than a reference's.

    (On a CPU they take a tenth.) What is in memory is one layer, or the head.
    """

    def plain(_: str, leaf: nn.Module) -> nn.Module:
        if not isinstance(leaf, (nn.QuantizedLinear, nn.QuantizedEmbedding)):
            return leaf
        made = nn.Linear(1, 1, bias=False) if isinstance(leaf, nn.QuantizedLinear) else nn.Embedding(1, 1)
        biases = leaf.biases if leaf.mode == "affine" else None
        made.weight = mx.dequantize(
            leaf.weight, leaf.scales, biases, leaf.group_size, leaf.bits, leaf.mode, dtype=dtype
        )
        if "bias" in leaf:
            made.bias = leaf.bias
        if isinstance(leaf, Adapted):
            adapt(made, leaf.lora_a, leaf.lora_b, leaf.get("gain"))
        mx.eval(made.weight)
        return made

    module.update_modules(tree_map_with_path(plain, module.leaf_modules(), is_leaf=nn.Module.is_module))


@dataclass(frozen=True, eq=False)
class Read:
    """What is left of a model that has read an exchange."""

    hidden: mx.array  # [1, L, hidden], after the final norm
    caches: dict[str, LayerCache]  # of the last layer of each kind, all positions
    still_weight: mx.array | None  # of the last full layer, for the drafter


def read_exchanges(
    checkpoint: Checkpoint, exchanges: Sequence[Exchange], step: Callable[[int, int], None]
) -> list[Read]:
    """Take all exchanges through the model, which loses its layers on the way; `step` hears (layers done, of all)."""
    model = checkpoint.model
    decoder = model.language_model
    kinds, share, group = model.config.text.layer_types, checkpoint.share, checkpoint.group
    last = {kind: place for place, kind in enumerate(kinds)}
    layers, decoder.layers = decoder.layers[::-1], []  # what is left of the model has no layers
    drafter, model.drafter = model.drafter, None
    load_module(checkpoint, model, "")
    unpack(model, model.config.dtype)
    model.drafter = drafter
    if group is not None:
        join_head(model, group)
    states = [model.embed(exchange.prompt, 0, len(exchange.prompt)) for exchange in exchanges]
    kept: list[dict[str, LayerCache]] = [{} for _ in exchanges]
    attention, weight = model.config.text.attention, None
    for place, kind in enumerate(kinds):
        layer = layers.pop()
        load_module(checkpoint, layer, f"language_model.layers.{place}.")
        unpack(layer, model.config.dtype)
        still = arrange_layer(layer)
        weight = still if still is not None else weight
        if group is not None and isinstance(share, Share):  # `open_subject`
            join_layer(layer, share, group)
        for index, exchange in enumerate(exchanges):
            length = len(exchange.prompt)
            caches = Caches([empty_cache(attention[kind], decoder.dtype, length)], [kind])  # as long as all
            masks = model.masks(caches, 0, length, mx.array(image_blocks(exchange.prompt, 0, length)))
            states[index] = layer(states[index], 0, masks[layer.kind], caches.layers[0])
            if place == last[kind]:
                kept[index] |= caches.last
                mx.eval(caches.arrays)
            mx.eval(states[index])
        mx.clear_cache()
        step(place + 1, len(kinds))
    hidden = [decoder.norm(state) for state in states]
    if not all(mx.isfinite(own).all().item() for own in hidden):
        raise RuntimeError(
            f"what {checkpoint.folder} computes is not finite; expected sound weights, or a wider computing type"
        )
    return [Read(own, caches, weight) for own, caches in zip(hidden, kept, strict=True)]


def load_drafter(checkpoint: Checkpoint, read: Read) -> None:
    """Fill the drafter, if there is one, as `load` does, after the model has been read."""
    if checkpoint.model.drafter is not None and checkpoint.drafter is not None:
        load_module(checkpoint, checkpoint.model.drafter, "drafter.")
        quantize_drafter(checkpoint.model.drafter, checkpoint.drafter)
        arrange_drafter(checkpoint.model.drafter, read.still_weight)


# --- distributions -----------------------------------------------------------------------------


@dataclass(frozen=True, eq=False)
class Distributions:
    """What a reference says at N positions."""

    ids: mx.array  # [N, K] int32: the likeliest tokens, descending
    log_probs: mx.array  # [N, K] float32
    log_rest: mx.array  # [N] float32: of all other tokens together
    fingerprint: str

    @property
    def positions(self) -> int:
        return len(self.log_rest)

    def save(self, file: Path) -> None:
        arrays = {"ids": self.ids, "log_probs": self.log_probs, "log_rest": self.log_rest}
        with beside(file) as part:
            mx.save_safetensors(str(part), arrays, {"fingerprint": self.fingerprint})


def load_distributions(file: Path) -> Distributions:
    try:
        arrays, metadata = cast(
            tuple[dict[str, mx.array], dict[str, str]], mx.load(str(file), format="safetensors", return_metadata=True)
        )
        ids, log_probs, rest = arrays["ids"], arrays["log_probs"], arrays["log_rest"]
        found = Distributions(ids, log_probs, rest, fingerprint=metadata["fingerprint"])
    except (RuntimeError, KeyError) as error:
        raise CheckpointError(f"{file} is no file of --save-logits: {error}") from None
    if ids.ndim != 2 or log_probs.shape != ids.shape or rest.shape != ids.shape[:1]:
        shapes = ", ".join(f"{name} {list(own.shape)}" for name, own in arrays.items())
        raise CheckpointError(f"{file} is no file of --save-logits: {shapes}; expected one length")
    return found


def blocks(count: int) -> Iterator[slice]:
    for start in range(0, count, ROWS):
        yield slice(start, min(start + ROWS, count))


def log_probabilities(model: Model, hidden: mx.array) -> mx.array:
    """[R, hidden] -> [R, vocab] float32, of the weights alone: what settings suppress is as likely as they say."""
    logits = model.language_model.head(hidden[None])[0]
    return logits - mx.logsumexp(logits, axis=-1, keepdims=True)


def answer_rows(exchanges: Sequence[Exchange], reads: Sequence[Read]) -> mx.array:
    """The hidden states that predict the answers' tokens, [N, hidden]."""
    return mx.concatenate([read.hidden[0, own.rows] for own, read in zip(exchanges, reads, strict=True)])


def distributions(model: Model, exchanges: Sequence[Exchange], reads: Sequence[Read]) -> Distributions:
    hidden = answer_rows(exchanges, reads)
    kept: list[tuple[mx.array, mx.array, mx.array]] = []
    for rows in blocks(len(hidden)):
        log_probs = log_probabilities(model, hidden[rows])
        count = min(KEPT, log_probs.shape[-1])
        ids = mx.argpartition(-log_probs, count - 1, axis=-1)[:, :count]
        best = mx.take_along_axis(log_probs, ids, axis=-1)
        order = mx.argsort(-best, axis=-1)
        ids, best = (mx.take_along_axis(array, order, axis=-1) for array in (ids, best))
        kept.append((ids.astype(mx.int32), best, log_rest(log_probs, ids)))
        mx.eval(kept[-1])
    ids, best, rest = (mx.concatenate(list(parts)) for parts in zip(*kept, strict=True))
    return Distributions(ids, best, rest, fingerprint(model, exchanges))


def log_rest(log_probs: mx.array, ids: mx.array) -> mx.array:
    """The logarithm of what tokens other than `ids` have, [R]: a sum of its own, for 1 - p would be rounding alone."""
    others = mx.put_along_axis(log_probs, ids, mx.array(-mx.inf), axis=-1)
    return mx.logsumexp(others, axis=-1)


@dataclass(frozen=True)
class Quality:
    """How close a model is to its reference."""

    positions: int
    kl_mean: float  # nats
    kl_p99: float
    top1: float  # share of positions where the likeliest token is the same
    rest: float  # the mean mass of the tokens that are compared only as one
    acceptance: float | None  # of the first draft of a round; None without a drafter


def compare(reference: Distributions, model: Model, exchanges: Sequence[Exchange], reads: Sequence[Read]) -> Quality:
    """KL(reference ‖ model) over the answers' tokens.

    The tokens that were not kept count as one. That can only make it smaller, by about their share of the mass: with
    Zipf's law to the power of 1.5 over 262144 tokens, of which they have 2.3 %, by 2.6 %.
    """
    hidden = answer_rows(exchanges, reads)
    divergences: list[np.ndarray] = []
    same: list[np.ndarray] = []
    for rows in blocks(len(hidden)):
        log_q = log_probabilities(model, hidden[rows])
        ids = reference.ids[rows]
        terms = weighted(reference.log_probs[rows], mx.take_along_axis(log_q, ids, axis=-1)).sum(axis=-1)
        divergences.append(np.asarray(terms + weighted(reference.log_rest[rows], log_rest(log_q, ids))))
        same.append(np.asarray(log_q.argmax(axis=-1) == ids[:, 0]))
    found = np.concatenate(divergences)
    return Quality(
        positions=len(found),
        kl_mean=float(found.mean()),
        kl_p99=float(np.percentile(found, 99)),
        top1=float(np.concatenate(same).mean()),
        rest=float(np.exp(np.asarray(reference.log_rest)).mean()),
        acceptance=acceptance(model, exchanges, reads),
    )


def weighted(log_p: mx.array, log_q: mx.array) -> mx.array:
    """p (log p - log q), 0 where p is."""
    return mx.where(log_p > -mx.inf, mx.exp(log_p) * (log_p - log_q), 0)


def acceptance(model: Model, exchanges: Sequence[Exchange], reads: Sequence[Read]) -> float | None:
    """How often the first draft of a round is accepted: the mean of Σ min(p, q), with the checkpoint's own sampling.

    Each token of the answers takes its turn as the newest one: of it the drafter knows what it does while decoding.
    """
    drafter = model.drafter
    if drafter is None:
        return None
    sampler = Sampler(Sampling(), model.config.generation, model.config.text.vocab_size)
    found: list[np.ndarray] = []
    for exchange, read in zip(exchanges, reads, strict=True):
        ids, length = exchange.prompt.token_ids, len(exchange.prompt)
        for rows in blocks(length - 1 - exchange.start):
            newest = slice(exchange.start + rows.start, exchange.start + rows.stop)
            last = mx.arange(newest.start - 1, newest.stop - 1)
            masks = {
                kind: whole_mask(last[None], mx.arange(length)[None], own.window)
                for kind, own in model.config.text.attention.items()
            }
            embeddings = model.language_model.embed(mx.array(ids[newest])[None])
            hidden = read.hidden[:, newest.start - 1 : newest.stop - 1]
            logits, _ = drafter(embeddings, hidden, last[:1], masks, read.caches)
            p = sampler.probabilities(model.language_model.head(read.hidden[:, newest])[0])
            found.append(np.asarray(mx.minimum(p, sampler.probabilities(logits[0])).sum(axis=-1)))
    return float(np.concatenate(found).mean()) if found else None
