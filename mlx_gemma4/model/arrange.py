"""The last step of loading: weights as the checkpoint has them -> as the passes want them.

Matrices with one input are joined, but on a CPU those of float32. In full layers the dimensions that turn are put in
front of those that do not, and the keys' norm weight of the latter goes into the queries' norm (`cache.FullCache`).
Nothing before this step sees either: the converter, adapters and names are the checkpoint's.
"""

from math import gcd
from typing import cast

import mlx.core as mx
from mlx import nn

from mlx_gemma4.model.attention import Projections, QueryAttention, SelfAttention
from mlx_gemma4.model.decoder import Layer
from mlx_gemma4.model.drafter import Drafter
from mlx_gemma4.model.float16 import make_float16_safe
from mlx_gemma4.model.matrix import STORED, total_columns
from mlx_gemma4.model.model import Model
from mlx_gemma4.model.split import LayerShare, Share


def arrange(model: Model, share: Share | LayerShare | None = None) -> None:
    """Make a model whose weights are loaded ready to run. share: of one of several machines."""
    if model.language_model.dtype == mx.float16:
        make_float16_safe(model, share)
    still: mx.array | None = None
    for layer in model.language_model.layers:
        own = arrange_layer(layer)
        still = own if own is not None else still
    if model.drafter is not None:
        arrange_drafter(model.drafter, still)


def arrange_layer(layer: Layer) -> mx.array | None:
    """Of the target. Returns of a full layer what its values are times to be its keys: the weight of their norm, and 1
    where they turn, [hd] float32; whoever reads it has that in the queries' norm."""
    own, still = cast(SelfAttention, layer.self_attn), None
    if own.is_full:
        order = turned_first(own)
        reorder_rows(own.k_proj, order)
        turns, weight = mx.arange(own.head_dim) < own.turned_dims, own.k_norm.weight[order]
        still = mx.where(turns, 1, weight.astype(mx.float32))
        own.k_norm.weight = mx.where(turns, weight, 1).astype(weight.dtype)
        arrange_queries(own, order, still)
        mx.eval(still)
    names = ["q_proj", "k_proj"] if own.is_full else ["q_proj", "k_proj", "v_proj"]
    own.inputs = Projections([own.pop(name) for name in names])
    arrange_mlp(layer)
    return still


def arrange_drafter(drafter: Drafter, weight: mx.array | None) -> None:
    """weight: of the target's last full layer, which the drafter's full layers read; None if there is none."""
    for layer in drafter.layers:
        if layer.self_attn.is_full and weight is not None:
            arrange_queries(layer.self_attn, turned_first(layer.self_attn), weight)
        arrange_mlp(layer)


def arrange_mlp(layer: Layer) -> None:
    layer.mlp.inputs = Projections([layer.mlp.pop("gate_proj"), layer.mlp.pop("up_proj")])
    widen_scalar(layer)
    mx.eval(layer.parameters())


def widen_scalar(layer: Layer) -> None:
    """As long as a row: mx.compile writes one number into its kernels, and every layer would have some of its own."""
    layer.layer_scalar = mx.full(layer.input_layernorm.weight.shape, layer.layer_scalar)


def turned_first(own: QueryAttention) -> mx.array:
    """The order of a full layer's dimensions: those that turn, which are the first of each half, before the rest."""
    half, turned = own.head_dim // 2, own.turned_dims // 2
    dims = mx.arange(own.head_dim).reshape(2, half)
    return mx.concatenate([dims[:, :turned].flatten(), dims[:, turned:].flatten()])


def arrange_queries(own: QueryAttention, order: mx.array, key_weight: mx.array) -> None:
    """key_weight [hd] float32: goes into the queries' norm; in this order."""
    reorder_rows(own.q_proj, order)
    weight = own.q_norm.weight
    own.q_norm.weight = (weight[order].astype(mx.float32) * key_weight).astype(weight.dtype)
    if not reorder_columns(own.o_proj, order, gcd(own.turned_dims // 2, own.head_dim // 2)):
        own._order = mx.argsort(order)
        mx.eval(own._order)


def reorder_rows(module: nn.Module, order: mx.array) -> None:
    """The rows of each head, [heads · hd, …]."""
    for name in (*STORED, "lora_b", "gain"):
        if name in module:
            axis = -1 if name == "gain" else -2
            rows = mx.unflatten(module[name], axis, (-1, len(order)))
            module[name] = taken(rows, order, axis).flatten(axis - 1, axis)


def reorder_columns(module: nn.Module, order: mx.array, block: int) -> bool:
    """The columns of each head, which move in blocks; False, and nothing done, if these cut quantization groups."""
    if isinstance(module, nn.QuantizedLinear) and block % module.group_size:
        return False
    blocks = order[::block] // block
    for name in (*STORED, "lora_a"):
        if name in module:
            columns = module[name]
            heads = mx.unflatten(columns, -1, (-1, len(blocks), columns.shape[-1] * block // total_columns(module)))
            module[name] = taken(heads, blocks, -2).flatten(-3, -1)
    return True


def taken(array: mx.array, order: mx.array, axis: int) -> mx.array:
    """As `mx.take` along an axis from the end, without its copy of the array."""
    return array[(*[slice(None)] * (array.ndim + axis), order)]
