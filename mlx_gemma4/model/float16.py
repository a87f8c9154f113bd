"""What makes float16 safe whatever the weights: powers of two, chosen once from bounds on all that is ever computed.

A product of a normed vector is at most its row's norm times the vector's, so every bound follows from the weights. The
norms that follow forgive a power of two, if their eps follows it: so the weights of norms take them, which is exact and
costs nothing. The residual stream has a unit of its own in which all that it can become has room: float32 would need a
cast in front of each norm, for `mx.compile` fuses no operation whose input is read elsewhere too. Only the product
inside an MLP has no bound that would leave room for what is usual: there gate and up are normed, a kernel a layer.

Machines that share a model by tensors add their bounds of what they sum, and sum what an MLP gives in float32, for each
has norms of its own; those that share layers tell each other what the residual stream can become.
"""

import math
from collections.abc import Iterable
from typing import cast

import mlx.core as mx
import numpy as np
from mlx import nn

from mlx_gemma4.model.attention import SelfAttention
from mlx_gemma4.model.decoder import Layer, Ranges
from mlx_gemma4.model.matrix import Adapted, added, blocks, total_columns
from mlx_gemma4.model.model import Model
from mlx_gemma4.model.split import LayerShare, Share

LIMIT = 2.0**15  # half of what float16 holds: bounds are of exact numbers, and rounded ones are a little larger
LOWEST = 2.0**-8  # what a usual product may be lowered to, so that much smaller ones have all their bits
CODES, SUMMED = {"mxfp4": 6.0, "nvfp4": 6.0, "mxfp8": 448.0}, 32  # the largest; of how many at most
SMALLEST_SHARE = 2.0**-6  # of what an MLP's row is divided by, its usual size: eps is then right to 1 / 4096


def float16_is_safe(model: Model, share: Share | LayerShare | None = None) -> str | None:
    """Why a model, loaded and not yet arranged, cannot compute in float16, in one line; None: it can.

    share: of one of several machines, which are asked at once.
    """
    own_layers, drafter_layers = model.language_model.layers, model.drafter.layers if model.drafter is not None else []
    outputs = [*output_bounds(own_layers, share), *output_bounds(drafter_layers)]
    keys = {layer.kind: cast(SelfAttention, layer.self_attn).k_norm.weight for layer in own_layers}
    for layer, output in zip([*own_layers, *drafter_layers], outputs, strict=True):
        own = layer.self_attn
        weights = own.k_norm.weight if isinstance(own, SelfAttention) else keys.get(layer.kind)
        q = largest(own.q_norm.weight)
        k = 1.0 if weights is None else largest(weights)
        for what, bound in (
            ("scores", own.head_dim * q * max(k, 1.0 if own.is_full else 0.0)),
            ("keys", own.head_dim**0.5 * k),
        ):
            if not bound <= LIMIT:  # nor if it is no number
                return f"attention's {what} may reach {bound:.3g}, beyond float16"
        if not output <= LIMIT and not can_scale(own.o_proj):
            return f"o_proj's products may reach {output:.3g}, beyond float16, and its scales are no floats"
    return None


def make_float16_safe(model: Model, share: Share | LayerShare | None = None) -> None:
    """Before `arrange`. share: of one of several machines."""
    for module in model.modules():
        if isinstance(module, Adapted):
            settle_adapted(module)
    target, drafter = model.language_model, model.drafter
    width = target.norm.weight.shape[0]
    table = target.embed_tokens
    # the first machine has what embeds media, the last one head and drafter; the table of tokens both
    is_first, is_last = (share.is_first, share.is_last) if isinstance(share, LayerShare) else (True, True)
    start = largest_value(table) * width**0.5 if is_first or is_last else 0.0
    for part in ("embed_vision", "embed_audio"):
        if part in model and is_first:
            start = max(start, output_bound(model[part].embedding_projection))
    target.unit = settle_layers(target.layers, start, share)
    if not is_last:  # what this norm gives is times 0 there, which an infinity would survive
        settle_last(target.norm, min(power(largest(target.norm.weight) * width**0.5), 1.0), target.unit)
        return
    embedding = (largest_row(table) if drafter is not None else 0.0) * width**0.5  # the length of a vector

    # one power of two for both final norms: what they give goes to heads, projections and, joined, the drafter
    weight = wide(target.norm.weight)
    head = table if target.is_tied else target.lm_head
    bounds = [largest(weight) * width**0.5, largest_sum(head, weight) * width**0.5]
    if drafter is not None:
        own = wide(drafter.norm.weight)
        root = own.shape[0] ** 0.5
        hidden = largest_row(drafter.post_projection, own) * root
        joined = math.hypot(embedding, max(bounds[0], hidden))
        first = largest_row(drafter.pre_projection) * joined
        sums = [largest_sum(matrix, own) * root for matrix in (drafter.embed_tokens, drafter.post_projection)]
        bounds += [largest(own) * root, *sums, joined, largest_sum(drafter.pre_projection) * joined]
    shrink = min(power(max(bounds)), 1.0)
    settle_last(target.norm, shrink, target.unit)
    target.grow = 1 / shrink
    if drafter is not None:
        drafter.unit = settle_layers(drafter.layers, first)
        settle_last(drafter.norm, shrink, drafter.unit)
        drafter.grow, drafter.joined = 1 / shrink, shrink / target.unit


def settle_last(norm: nn.RMSNorm, shrink: float, unit: float) -> None:
    norm.weight = scaled(norm.weight, shrink)
    norm.eps *= unit**2


def settle_adapted(module: Adapted) -> None:
    """A's products no larger than what it is given: B takes the power of two, of each adapter its own."""
    norms = mx.linalg.norm(wide(module.lora_a), axis=-1).max(axis=-1).reshape(-1)
    factors = [2.0 ** -math.ceil(math.log2(max(norm, 1.0))) for norm in cast(list[float], norms.tolist())]
    if min(factors) < 1:
        factor = mx.array(factors)[:, None, None] if module.lora_a.ndim == 3 else mx.array(factors[0])
        module.lora_a, module.lora_b = scaled(module.lora_a, factor), scaled(module.lora_b, 1 / factor)


def settle_layers(layers: list[Layer], start: float, share: Share | LayerShare | None = None) -> float:
    """Make the layers safe for a residual stream that begins below `start`; the unit that it is to have."""
    unit = power(largest_residual(layers, start, share))
    for layer, output in zip(layers, output_bounds(layers, share), strict=True):
        settle_attention(layer, unit, output)
        settle_mlp(layer, unit, isinstance(share, Share))
        mx.eval(layer.parameters())
    return unit


def largest_residual(layers: list[Layer], start: float, share: Share | LayerShare | None) -> float:
    """A bound on the residual stream: what each layer's two norms may add to it, and what it is then times."""
    steps = [(largest_step(layer), largest(layer.layer_scalar)) for layer in layers]
    if isinstance(share, LayerShare):
        every = np.zeros((1 + share.count, 2), np.float32)
        every[0, 0], every[1 + share.layers[0] : 1 + share.layers[1]] = start, steps
        told = cast(list[list[float]], mx.distributed.all_max(mx.array(every), group=share.group).tolist())
        start, steps = told[0][0], [(step, factor) for step, factor in told[1:]]
    size = peak = start
    for step, factor in steps:
        size += step
        peak = max(peak, size, size := size * factor)
    return peak


def largest_step(layer: Layer) -> float:
    norms = (layer.post_attention_layernorm, layer.post_feedforward_layernorm)
    return sum(norm.weight.shape[0] ** 0.5 * largest(norm.weight) for norm in norms)


def settle_attention(layer: Layer, unit: float, output: float) -> None:
    """output: the bound of what o_proj gives, of all machines together."""
    own = layer.self_attn
    weight = wide(layer.input_layernorm.weight)
    matrices = [own[name] for name in ("q_proj", "k_proj", "v_proj") if name in own]
    bound = max(largest(weight), *(largest_sum(matrix, weight) for matrix in matrices)) * len(weight) ** 0.5
    shrink = power(bound)
    layer.input_layernorm.weight = scaled(weight, shrink)
    layer.input_layernorm.eps *= unit**2
    own.eps *= shrink**2
    own.q_norm.eps *= shrink**2
    own.q_norm.weight = scaled(own.q_norm.weight, 1.0)
    if isinstance(own, SelfAttention):
        own.k_norm.eps *= shrink**2
        own.k_norm.weight = scaled(own.k_norm.weight, 1.0)
    shrink = min(power(output), 1.0)
    if shrink < 1:
        matrix = ("scales", "biases") if isinstance(own.o_proj, nn.QuantizedLinear) else ("weight",)
        for name in (*matrix, "lora_b"):
            if name in own.o_proj:
                own.o_proj[name] = scaled(own.o_proj[name], shrink)
    layer.post_attention_layernorm.eps *= shrink**2
    layer.post_attention_layernorm.weight = scaled(layer.post_attention_layernorm.weight, unit)


def settle_mlp(layer: Layer, unit: float, is_shared: bool) -> None:
    """Of the product gelu(gate) · up: both are divided by ρ, ρ² = mean((gate² + up²) / 2) + floor, so that all products
    of a row together are at most `inner`, and what is usual has room beside any of them. ρ is a row's own, which no eps
    can follow: so the floor is as far above what is usual as there is room, and usual rows are divided by it alone.

    is_shared: each of several machines has some columns and a ρ of its own, taken back before the parts meet."""
    mlp, weight = layer.mlp, wide(layer.pre_feedforward_layernorm.weight)
    root, inner = len(weight) ** 0.5, total_columns(mlp.down_proj)
    gate, up = row_norms(mlp.gate_proj, weight), row_norms(mlp.up_proj, weight)
    codes = max(map(largest_codes, (mlp.gate_proj, mlp.up_proj))) * largest(weight)
    shrink = power(max(largest(weight), largest(gate), largest(up), codes) * root)
    layer.pre_feedforward_layernorm.weight = scaled(weight, shrink)
    layer.pre_feedforward_layernorm.eps *= unit**2

    # what products are times
    factor = power(inner * max(1.0, largest_value(mlp.down_proj), largest_code(mlp.down_proj)))
    lift = power((2 * inner) ** 0.5)  # so that small ones are not rounded away before they meet
    one, other = usual(gate) * shrink, usual(up) * shrink  # a normed vector's products have their rows' norms, usually
    size = (one**2 + other**2) / 2
    least = median(gate) * median(up) * min(1.0, usual(row_norms(mlp.down_proj)))
    room = factor * shrink**2 * least / LOWEST
    floor = min(max(room, size), size / SMALLEST_SHARE**2) if size > 0 else 1.0
    mlp.ranges = Ranges(
        floor,
        1 / (shrink**2 * factor),
        mx.full((2 * inner,), lift, mx.float16),
        mx.full((inner,), 1 / shrink),
        mx.full((inner,), factor / lift**2),
    )
    mx.eval(mlp.ranges.weight, mlp.ranges.gate, mlp.ranges.product)
    if not is_shared:
        layer.post_feedforward_layernorm.eps *= (shrink**2 * factor / (size + floor)) ** 2
    layer.post_feedforward_layernorm.weight = scaled(layer.post_feedforward_layernorm.weight, unit)


# --- bounds ------------------------------------------------------------------------------------


def output_bounds(layers: list[Layer], share: Share | LayerShare | None = None) -> list[float]:
    """Of each layer's o_proj, to which attention gives means of normed values; of machines that sum, together."""
    own = mx.array([output_bound(layer.self_attn.o_proj) for layer in layers])
    if isinstance(share, Share):
        own = mx.distributed.all_sum(own, group=share.group)
    return cast(list[float], own.tolist())


def output_bound(matrix: nn.Module) -> float:
    """Of what a matrix makes of normed vectors."""
    return largest_row(matrix) * total_columns(matrix) ** 0.5


def power(bound: float) -> float:
    """The power of two that brings a bound just below the limit."""
    if not 0 < bound < math.inf:
        return 1.0
    return 2.0 ** min(max(math.floor(math.log2(LIMIT / bound)), -40), 40)


def wide(array: mx.array) -> mx.array:
    return array.astype(mx.float32)


def scaled(array: mx.array, factor: float | mx.array) -> mx.array:
    return (wide(array) * factor).astype(mx.float16)


def can_scale(module: nn.Module) -> bool:
    return not isinstance(module, nn.QuantizedLinear) or module.scales.dtype != mx.uint8


def largest(array: mx.array) -> float:
    return cast(float, mx.abs(wide(array)).max().item())


def usual(norms: mx.array) -> float:
    return cast(float, mx.sqrt(mx.square(norms).mean()).item())


def median(norms: mx.array) -> float:
    return cast(float, mx.sort(norms)[len(norms) // 2].item())


def largest_row(module: nn.Module, columns: mx.array | None = None) -> float:
    return largest(row_norms(module, columns))


def largest_sum(module: nn.Module, columns: mx.array | None = None) -> float:
    """As `largest_row`, also of what is summed on the way."""
    return max(largest_row(module, columns), largest_codes(module) * (1.0 if columns is None else largest(columns)))


def largest_codes(module: nn.Module) -> float:
    """The length of a group's codes at most. o_proj has room for them: of values of length √512 they make 57,344."""
    return largest_code(module) * SUMMED**0.5


def largest_code(module: nn.Module) -> float:
    """Where a CPU sums what codes give before it takes that times their scale; else 0."""
    is_packed = isinstance(module, nn.QuantizedLinear | nn.QuantizedEmbedding)
    return CODES.get(module.mode, 0.0) if is_packed else 0.0


def row_norms(module: nn.Module, columns: mx.array | None = None) -> mx.array:
    """[rows] float32; columns: what each is times. What an adapter adds counts on top, for it may cancel."""
    norms = norms_of(blocks(module), columns)
    if not isinstance(module, Adapted):
        return norms
    gain = mx.maximum(mx.abs(module.gain), 1) if "gain" in module else mx.array(1)
    both = norms * gain + norms_of(added(module), columns)
    return both.max(axis=0) if both.ndim == 2 else both  # of several adapters


def norms_of(parts: Iterable[mx.array], columns: mx.array | None) -> mx.array:
    found: list[mx.array] = []
    for rows in parts:
        found.append(mx.linalg.norm(rows if columns is None else rows * columns, axis=-1))
        mx.eval(found[-1])
    return mx.concatenate(found, axis=-1)


def largest_value(module: nn.Module) -> float:
    size = max(largest(rows) for rows in blocks(module))
    if not isinstance(module, Adapted):
        return size
    gain = max(largest(module.gain), 1.0) if "gain" in module else 1.0
    return size * gain + max(largest(rows) for rows in added(module))
