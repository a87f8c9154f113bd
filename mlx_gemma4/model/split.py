"""One model on several machines: what each of them holds, and where the parts of a result meet.

By tensors: a machine has whole key/value heads of the sliding layers with their queries, columns of the MLP and rows of
the head. What attention and the MLP give is summed over all machines, logits are gathered. Whole on every machine: the
table of tokens, the one key/value head of the full layers, and all those of the last sliding layer, which the drafter
reads; the drafter itself, so that proposing exchanges nothing.

By layers: a machine has layers that follow each other and their caches, and hidden states go from each to the next. The
first has media and table of tokens, the last table, head and drafter with the layers that this reads. All run the same
program: what a machine lacks gives zeros there, and the last one decides.
"""

import math
import re
from collections.abc import Sequence
from copy import copy
from dataclasses import dataclass, replace
from functools import cache
from itertools import pairwise
from typing import cast

import mlx.core as mx
from mlx import nn

from mlx_gemma4.config import FULL, SLIDING, WHOLE, TextConfig
from mlx_gemma4.model.cache import LayerCache, Offset
from mlx_gemma4.model.decoder import MLP, Layer, Ranges
from mlx_gemma4.model.mask import Mask
from mlx_gemma4.model.matrix import STORED, Choosing, product
from mlx_gemma4.model.model import Model

SPLITS = ("tensors", "layers")
MEDIA = ("vision_embedder", "embed_vision", "embed_audio")
LAYERS = "language_model.layers."
LAYER = re.compile(rf"{re.escape(LAYERS)}(\d+)(\..*)")


@dataclass(frozen=True)
class Share:
    """What one of several machines holds of a model."""

    heads: tuple[int, int]  # of the sliding layers' key/value heads, from … to
    columns: tuple[int, int]  # of the MLP's
    group: mx.distributed.Group | None = None  # of these machines, where they are there

    def queries(self, text: TextConfig) -> tuple[int, int]:
        """Heads of queries, from … to; text: the whole decoder's."""
        each = text.num_attention_heads // text.attention[SLIDING].num_key_value_heads
        return self.heads[0] * each, self.heads[1] * each

    def of(self, text: TextConfig) -> TextConfig:
        """The decoder of this machine alone."""
        sliding = text.attention[SLIDING]
        first, last = self.queries(text)
        kinds = list(text.layer_types)
        if SLIDING in kinds:
            kinds[last_sliding(text)] = WHOLE
        own = replace(sliding, num_key_value_heads=self.heads[1] - self.heads[0])
        return replace(
            text,
            num_attention_heads=last - first,
            intermediate_size=self.columns[1] - self.columns[0],
            layer_types=tuple(kinds),
            attention=text.attention | {SLIDING: own, WHOLE: sliding},
        )


def last_sliding(text: TextConfig) -> int:
    """The number of the last sliding layer."""
    return max(number for number, kind in enumerate(text.layer_types) if kind == SLIDING)


def shares(text: TextConfig, memories: Sequence[int], block: int) -> list[Share]:
    """Of all machines, in the order of their ranks, in proportion to what each may hold.

    block: columns of the MLP that stay together, which share a scale. ValueError if a machine is left without a head.
    """
    sliding, full = text.attention[SLIDING], text.attention[FULL]
    heads, blocks = sliding.num_key_value_heads, text.intermediate_size // block
    if full.num_key_value_heads != 1:
        raise ValueError(
            f"the full layers have {full.num_key_value_heads} key/value heads; expected 1 to split a model"
        )
    if len(memories) > min(heads, blocks):
        raise ValueError(
            f"{len(memories)} machines share a model of {heads} key/value heads; expected at most {min(heads, blocks)}"
        )
    ends = list(zip(borders(heads, memories), borders(blocks, memories), strict=True))
    return [
        Share((head, next_head), (first * block, last * block)) for (head, first), (next_head, last) in pairwise(ends)
    ]


def borders(count: int, weights: Sequence[int]) -> list[int]:
    """Where to cut `count` things so that parts are as the weights, at least one each: [0, …, count]."""
    parts = [1] * len(weights)
    for _ in range(count - len(weights)):  # each to whom it takes least beyond what is due
        least = min(range(len(weights)), key=lambda rank: ((parts[rank] + 1) / weights[rank], rank))
        parts[least] += 1
    found = [0]
    for part in parts:
        found.append(found[-1] + part)
    return found


class Summed(Choosing):
    """A matrix of which each machine has some columns."""

    def __init__(self, module: nn.Module, group: mx.distributed.Group):
        super().__init__()
        self.own, self._group = module, group

    def __call__(self, x: mx.array, adapters: mx.array | None = None) -> mx.array:
        return mx.distributed.all_sum(product(self.own, x, adapters), group=self._group)


class RangedSum(nn.Module):
    """An MLP in float16 of which each machine has some columns, divided by what its own products need: they are
    themselves again, in float32, before they meet."""

    def __init__(self, mlp: MLP, ranges: Ranges, group: mx.distributed.Group):
        super().__init__()
        self.own, self._ranges, self._group = mlp, ranges, group
        rows, columns = mlp.down_proj.weight.shape[0], len(ranges.weight)
        # as long as a row: mx.compile would write one number into its kernels
        self._floor, self._back = mx.full((columns,), ranges.floor), mx.full((rows,), ranges.back)
        mx.eval(self._floor, self._back)

    def __call__(self, x: mx.array, adapters: mx.array | None = None) -> mx.array:
        """[B, L, hidden] -> the same, float32."""
        both = self.own.inputs.whole(x, adapters)
        size = (mx.square(both.astype(mx.float32)) + self._floor).mean(axis=-1, keepdims=True)
        part = self.own.ranged(self._ranges, both, adapters).astype(mx.float32) * size * self._back
        return mx.distributed.all_sum(part, group=self._group)


class Narrowed(nn.Module):
    """The norm behind it: float32 in, float16 out."""

    def __init__(self, norm: nn.RMSNorm):
        super().__init__()
        self.own = norm

    def __call__(self, x: mx.array) -> mx.array:
        return cast(mx.array, self.own(x).astype(self.own.weight.dtype))


class Gathered(Choosing):
    """The head by rows, of which all machines have as many: of a table that is whole on every machine."""

    def __init__(self, table: nn.Module, group: mx.distributed.Group):
        super().__init__()
        self._group = group
        self._rows = len(table.weight)
        each = -(-self._rows // group.size())
        first = group.rank() * each
        self._part = copy(table)
        for name in (*STORED, "lora_b", "gain"):
            if name in table:
                rows = (..., slice(first, first + each), *[slice(None)] * (name != "gain"))
                self._part[name] = table[name][rows]  # a view
                mx.eval(self._part[name])  # in this thread: others have not its stream
        self._missing = each - len(self._part.weight)

    def __call__(self, hidden: mx.array, adapters: mx.array | None = None) -> mx.array:
        """[B, L, hidden] -> [B, L, vocab]."""
        part = self._part
        logits = part.as_linear(hidden) if isinstance(part, nn.Embedding) else product(part, hidden, adapters)
        if self._missing:
            logits = mx.pad(logits, [(0, 0), (0, 0), (0, self._missing)])
        whole = mx.distributed.all_gather(logits[None], group=self._group)  # [machines, B, L, rows of each]
        return whole.moveaxis(0, 2).flatten(2)[..., : self._rows]


# --- by layers ---------------------------------------------------------------------------------


@dataclass(frozen=True)
class LayerShare:
    """What one of several machines holds of a model whose layers they share."""

    layers: tuple[int, int]  # from … to
    count: int  # of all machines' layers
    group: mx.distributed.Group | None = None  # of these machines, where they are there

    @property
    def is_first(self) -> bool:
        return self.layers[0] == 0

    @property
    def is_last(self) -> bool:
        return self.layers[1] == self.count

    def of(self, text: TextConfig) -> TextConfig:
        """The decoder of this machine alone."""
        return replace(text, layer_types=text.layer_types[slice(*self.layers)])

    def path_here(self, path: str) -> str | None:
        """Of a tensor or module, whose layers have numbers of their own on each machine; None if it is not here."""
        if match := LAYER.match(path):
            number = int(match[1])
            is_here, path = number in range(*self.layers), f"{LAYERS}{number - self.layers[0]}{match[2]}"
        elif path.startswith(MEDIA):
            is_here = self.is_first
        elif path.startswith("language_model.embed_tokens"):
            is_here = self.is_first or self.is_last
        else:
            is_here = self.is_last or not path.startswith(("language_model.lm_head", "drafter."))
        return path if is_here else None

    def leave_out(self, model: Model) -> None:
        """What other machines have, from an empty model, but its layers."""
        decoder, text = model.language_model, model.config.text
        if not self.is_first:
            for name in [name for name in MEDIA if name in model]:
                model[name] = Elsewhere(text.hidden_size)
            if not self.is_last:
                decoder["embed_tokens"] = TableElsewhere(text.hidden_size)
        if self.is_last:
            return
        decoder.is_tied, decoder["lm_head"] = False, Elsewhere(text.vocab_size)
        if (drafter := model.drafter) is not None:
            drafter.clear()
            drafter.layers = []
            drafter["pre_projection"] = drafter["norm"] = Elsewhere(1)
            drafter["embed_tokens"] = Elsewhere(text.vocab_size)
            drafter["post_projection"] = Elsewhere(text.hidden_size)


def layer_shares(
    text: TextConfig, memories: Sequence[int], sizes: Sequence[int], ends: tuple[int, int]
) -> list[LayerShare]:
    """Of all machines, so that the fullest has as much room left as can be.

    sizes: bytes of each layer; ends: of what the first and the last machine hold besides. The last has the last layer
    of each kind, which the drafter reads, and each one that slides, so that all read a prompt in the same chunks.
    ValueError if a machine is left without.
    """
    kinds, count, last = text.layer_types, len(text.layer_types), len(memories) - 1

    @cache
    def best(rank: int, first: int) -> tuple[float, tuple[int, ...]]:
        """What the fullest of the machines from `rank` on holds of its memory, and where their layers begin."""
        found: tuple[float, tuple[int, ...]] = (math.inf, ())
        for end in [count] if rank == last else range(first + 1, count):
            own = set(kinds[first:end])
            if own >= (set(kinds) if rank == last else {SLIDING} & set(kinds)):
                nbytes = sum(sizes[first:end]) + (ends[0] if rank == 0 else 0) + (ends[1] if rank == last else 0)
                rest, starts = (0.0, ()) if rank == last else best(rank + 1, end)
                found = min(found, (max(nbytes / memories[rank], rest), (first, *starts)))
        return found

    fullest, starts = best(0, 0)
    if fullest == math.inf:
        raise ValueError(
            f"{len(memories)} machines share a model of {count} layers; expected fewer, each with a sliding layer, the "
            "last with one of each kind"
        )
    return [LayerShare(own, count) for own in pairwise([*starts, count])]


class Elsewhere(nn.Module):
    """In the place of a matrix that another machine has: zeros, of what goes in, for that is computed everywhere."""

    def __init__(self, rows: int):
        super().__init__()
        self._rows = rows

    def __call__(self, x: mx.array, *_: mx.array) -> mx.array:
        """[…, columns] -> […, rows]."""
        return mx.broadcast_to(x[..., :1] * 0, (*x.shape[:-1], self._rows))

    def as_linear(self, x: mx.array) -> mx.array:
        return Elsewhere.__call__(self, x)


class TableElsewhere(Elsewhere):
    def __call__(self, x: mx.array, *_: mx.array) -> mx.array:
        """Ids […] -> […, rows]."""
        return self.as_linear(x[..., None])


def handed_on(h: mx.array, group: mx.distributed.Group, first: int, last: int) -> mx.array:
    """Hidden states from each of the machines first … last to the next.

    Sums of zeros but for one: to receive hangs on nothing, so it could come before an exchange that others wait in.
    """
    for rank in range(first, last):
        h = mx.distributed.all_sum(h * int(group.rank() == rank), group=group)
    return h


class Received(nn.Module):
    """A machine's first layer."""

    def __init__(self, layer: Layer, group: mx.distributed.Group):
        super().__init__()
        self.own, self.kind, self._group = layer, layer.kind, group

    def __call__(
        self, h: mx.array, offset: Offset, mask: Mask, cache: LayerCache, adapters: mx.array | None
    ) -> mx.array:
        return self.own(handed_on(h, self._group, 0, self._group.rank()), offset, mask, cache, adapters)


class Sent(nn.Module):
    """The norm behind a machine's last layer: the last machine's is the model's."""

    def __init__(self, norm: nn.Module, group: mx.distributed.Group):
        super().__init__()
        self.own, self._group = norm, group

    def __call__(self, h: mx.array) -> mx.array:
        return cast(mx.array, self.own(handed_on(h, self._group, self._group.rank(), self._group.size() - 1)))


# --- when all is loaded ------------------------------------------------------------------------


def join_machines(model: Model, share: Share | LayerShare) -> None:
    """Let a model, loaded and arranged, find the rest of itself on the other machines."""
    decoder, group = model.language_model, share.group
    assert group is not None
    model.split = SPLITS[isinstance(share, LayerShare)]
    if isinstance(share, LayerShare):
        model.group = group
        decoder.layers[0] = cast(Layer, Received(decoder.layers[0], group))
        decoder["norm"] = Sent(decoder.norm, group)
        return
    for layer in decoder.layers:
        join_layer(layer, share, group)
    join_head(model, group)


def join_layer(layer: Layer, share: Share, group: mx.distributed.Group) -> None:
    layer.self_attn["o_proj"] = Summed(layer.self_attn.o_proj, group)
    if layer.mlp.ranges is None:
        layer.mlp["down_proj"] = Summed(layer.mlp.down_proj, group)
    else:
        layer["mlp"] = RangedSum(layer.mlp, layer.mlp.ranges, group)
        layer["post_feedforward_layernorm"] = Narrowed(layer.post_feedforward_layernorm)
    if layer.kind == WHOLE:
        layer.kind, layer.self_attn.own_heads = SLIDING, slice(*share.heads)


def join_head(model: Model, group: mx.distributed.Group) -> None:
    decoder, model.group = model.language_model, group
    decoder["lm_head"] = Gathered(decoder.embed_tokens if decoder.is_tied else decoder.lm_head, group)
    decoder.is_tied = False
