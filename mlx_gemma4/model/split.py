"""One model on several machines: what each of them holds, and where the parts of a result meet.

By tensors: a machine has whole key/value heads of the sliding layers with their queries, columns of the MLP and rows of
the head. What attention and the MLP give is summed over all machines, logits are gathered. Whole on every machine: the
table of tokens, the one key/value head of the full layers, and all those of the last sliding layer, which the drafter
reads; the drafter itself, so that proposing exchanges nothing.
"""

from collections.abc import Sequence
from copy import copy
from dataclasses import dataclass, replace
from itertools import pairwise

import mlx.core as mx
from mlx import nn

from mlx_gemma4.config import FULL, SLIDING, WHOLE, TextConfig
from mlx_gemma4.model.decoder import Layer
from mlx_gemma4.model.model import Model


@dataclass(frozen=True)
class Share:
    """What one of several machines holds of a model."""

    group: mx.distributed.Group
    heads: tuple[int, int]  # of the sliding layers' key/value heads, from … to
    columns: tuple[int, int]  # of the MLP's

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
            kinds[last_of(text, SLIDING)] = WHOLE
        own = replace(sliding, num_key_value_heads=self.heads[1] - self.heads[0])
        return replace(
            text,
            num_attention_heads=last - first,
            intermediate_size=self.columns[1] - self.columns[0],
            layer_types=tuple(kinds),
            attention=text.attention | {SLIDING: own, WHOLE: sliding},
        )


def last_of(text: TextConfig, kind: str) -> int:
    """The number of the last layer of a kind."""
    return max(number for number, own in enumerate(text.layer_types) if own == kind)


def shares(text: TextConfig, group: mx.distributed.Group, memories: Sequence[int], block: int) -> list[Share]:
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
        Share(group, (head, next_head), (first * block, last * block))
        for (head, first), (next_head, last) in pairwise(ends)
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


class Summed(nn.Module):
    """A matrix of which each machine has some columns."""

    def __init__(self, module: nn.Module, group: mx.distributed.Group):
        super().__init__()
        self.own, self._group = module, group

    def __call__(self, x: mx.array) -> mx.array:
        return mx.distributed.all_sum(self.own(x), group=self._group)


class Gathered(nn.Module):
    """The head by rows, of which all machines have as many: of a table that is whole on every machine."""

    def __init__(self, table: nn.Module, group: mx.distributed.Group):
        super().__init__()
        self._group = group
        self._rows = len(table.weight)
        each = -(-self._rows // group.size())
        first = group.rank() * each
        self._part = copy(table)
        for name in ("weight", "scales", "biases"):
            if name in table:
                self._part[name] = table[name][first : first + each]  # a view
                mx.eval(self._part[name])  # in this thread: others have not its stream
        self._missing = each - len(self._part.weight)

    def __call__(self, hidden: mx.array) -> mx.array:
        """[B, L, hidden] -> [B, L, vocab]."""
        part = self._part
        logits = part.as_linear(hidden) if isinstance(part, nn.Embedding) else part(hidden)
        if self._missing:
            logits = mx.pad(logits, [(0, 0), (0, 0), (0, self._missing)])
        whole = mx.distributed.all_gather(logits[None], group=self._group)  # [machines, B, L, rows of each]
        return whole.moveaxis(0, 2).flatten(2)[..., : self._rows]


def join_machines(model: Model, share: Share) -> None:
    """Let a model, loaded and arranged, find the rest of itself on the other machines."""
    for layer in model.language_model.layers:
        join_layer(layer, share)
    join_head(model, share)


def join_layer(layer: Layer, share: Share) -> None:
    layer.self_attn["o_proj"] = Summed(layer.self_attn.o_proj, share.group)
    layer.mlp["down_proj"] = Summed(layer.mlp.down_proj, share.group)
    if layer.kind == WHOLE:
        layer.kind, layer.self_attn.own_heads = SLIDING, slice(*share.heads)


def join_head(model: Model, share: Share) -> None:
    decoder, model.group = model.language_model, share.group
    decoder["lm_head"] = Gathered(decoder.embed_tokens if decoder.is_tied else decoder.lm_head, share.group)
    decoder.is_tied = False
