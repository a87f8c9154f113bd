"""What makes float16 safe whatever the weights: powers of two, chosen once from bounds on all that is ever computed.

A product of a normed vector is at most its row's norm times the vector's, so every bound follows from the weights. The
norms that follow forgive a power of two, if their eps follows it: so the weights of norms take them, which is exact and
costs nothing. The residual stream has a unit of its own in which all that it can become has room: float32 would need a
cast in front of each norm, for `mx.compile` fuses no operation whose input is read elsewhere too. Only the product
inside an MLP has no bound that would leave room for what is usual: there gate and up are normed, a kernel a layer.
"""

import math
from collections.abc import Iterable
from typing import cast

import mlx.core as mx
from mlx import nn

from mlx_gemma4.model.attention import QueryAttention, SelfAttention
from mlx_gemma4.model.decoder import Layer, Ranges
from mlx_gemma4.model.matrix import Adapted, added, blocks, total_columns
from mlx_gemma4.model.model import Model

LIMIT = 2.0**15  # half of what float16 holds: bounds are of exact numbers, and rounded ones are a little larger
LOWEST = 2.0**-8  # what a usual product may be lowered to, so that much smaller ones have all their bits
SMALLEST_SHARE = 2.0**-6  # of what an MLP's row is divided by, its usual size: eps is then right to 1 / 4096


def float16_is_safe(model: Model) -> str | None:
    """Why a model, loaded and not yet arranged, cannot compute in float16, in one line; None: it can."""
    layers = [*model.language_model.layers, *(model.drafter.layers if model.drafter is not None else [])]
    keys = key_weights(model)
    for layer in layers:
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
        bound = output_bound(own)
        if not bound <= LIMIT and not can_scale(own.o_proj):
            return f"o_proj's products may reach {bound:.3g}, beyond float16, and its scales are no floats"
    return None


def make_float16_safe(model: Model) -> None:
    """Before `arrange`."""
    for module in model.modules():
        if isinstance(module, Adapted):
            settle_adapted(module)
    target, drafter = model.language_model, model.drafter
    width, eps = target.norm.weight.shape[0], target.norm.eps
    table = target.embed_tokens
    embedding = (largest_row(table) if drafter is not None else 0.0) * width**0.5  # the length of a vector
    start = largest_value(table) * width**0.5
    for part in ("embed_vision", "embed_audio"):
        if part in model:
            matrix = model[part].embedding_projection
            start = max(start, largest_row(matrix) * total_columns(matrix) ** 0.5)
    target.unit = settle_layers(target.layers, start, eps)

    # one power of two for both final norms: what they give goes to heads, projections and, joined, the drafter
    weight = wide(target.norm.weight)
    head = table if target.is_tied else target.lm_head
    bounds = [largest(weight) * width**0.5, largest_row(head, weight) * width**0.5]
    if drafter is not None:
        own = wide(drafter.norm.weight)
        root = own.shape[0] ** 0.5
        hidden = norm_of(row_norms(drafter.post_projection, own)) * root
        joined = math.hypot(embedding, max(bounds[0], hidden))
        first = largest_row(drafter.pre_projection) * joined
        bounds += [largest(own) * root, largest_row(drafter.embed_tokens, own) * root, hidden, joined, first]
    shrink = min(power(max(bounds)), 1.0)
    settle_last(target.norm, shrink, target.unit)
    target.grow = 1 / shrink
    if drafter is not None:
        drafter.unit = settle_layers(drafter.layers, first, eps)
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


def settle_layers(layers: list[Layer], start: float, eps: float) -> float:
    """Make the layers safe for a residual stream that begins below `start`; the unit that it is to have."""
    size = peak = start
    for layer in layers:
        root = layer.input_layernorm.weight.shape[0] ** 0.5
        for norm in (layer.post_attention_layernorm, layer.post_feedforward_layernorm):
            size += root * largest(norm.weight)
        peak = max(peak, size)
        size *= largest(layer.layer_scalar)
        peak = max(peak, size)
    unit = power(peak)
    for layer in layers:
        settle_attention(layer, unit)
        settle_mlp(layer, unit)
        mx.eval(layer.parameters())
    return unit


def settle_attention(layer: Layer, unit: float) -> None:
    own = layer.self_attn
    weight = wide(layer.input_layernorm.weight)
    matrices = [own[name] for name in ("q_proj", "k_proj", "v_proj") if name in own]
    bound = max(largest(weight), *(largest_row(matrix, weight) for matrix in matrices)) * len(weight) ** 0.5
    shrink = power(bound)
    layer.input_layernorm.weight = scaled(weight, shrink)
    layer.input_layernorm.eps *= unit**2
    own.eps *= shrink**2
    own.q_norm.eps *= shrink**2
    own.q_norm.weight = scaled(own.q_norm.weight, 1.0)
    if isinstance(own, SelfAttention):
        own.k_norm.eps *= shrink**2
        own.k_norm.weight = scaled(own.k_norm.weight, 1.0)
    shrink = min(power(output_bound(own)), 1.0)
    if shrink < 1:
        matrix = ("scales", "biases") if isinstance(own.o_proj, nn.QuantizedLinear) else ("weight",)
        for name in (*matrix, "lora_b"):
            if name in own.o_proj:
                own.o_proj[name] = scaled(own.o_proj[name], shrink)
    layer.post_attention_layernorm.eps *= shrink**2
    layer.post_attention_layernorm.weight = scaled(layer.post_attention_layernorm.weight, unit)


def settle_mlp(layer: Layer, unit: float) -> None:
    """Of the product gelu(gate) · up: both are divided by ρ, ρ² = mean((gate² + up²) / 2) + floor, so that all products
    of a row together are at most `inner`, and what is usual has room beside any of them. ρ is a row's own, which no eps
    can follow: so the floor is as far above what is usual as there is room, and usual rows are divided by it alone."""
    mlp, weight = layer.mlp, wide(layer.pre_feedforward_layernorm.weight)
    root, inner = len(weight) ** 0.5, total_columns(mlp.down_proj)
    gate, up = row_norms(mlp.gate_proj, weight), row_norms(mlp.up_proj, weight)
    shrink = power(max(largest(weight), norm_of(gate), norm_of(up)) * root)
    layer.pre_feedforward_layernorm.weight = scaled(weight, shrink)
    layer.pre_feedforward_layernorm.eps *= unit**2

    factor = power(inner * max(1.0, largest_value(mlp.down_proj)))  # what products are times
    lift = power((2 * inner) ** 0.5)  # so that small ones are not rounded away before they meet
    one, other = usual(gate) * shrink, usual(up) * shrink  # a normed vector's products have their rows' norms, usually
    size = (one**2 + other**2) / 2
    least = median(gate) * median(up) * min(1.0, usual(row_norms(mlp.down_proj)))
    room = factor * shrink**2 * least / LOWEST
    floor = min(max(room, size), size / SMALLEST_SHARE**2) if size > 0 else 1.0
    mlp.ranges = Ranges(
        floor,
        mx.full((2 * inner,), lift, mx.float16),
        mx.full((inner,), 1 / shrink),
        mx.full((inner,), factor / lift**2 / 2),
    )
    mx.eval(mlp.ranges.weight, mlp.ranges.gate, mlp.ranges.product)
    layer.post_feedforward_layernorm.eps *= (shrink**2 * factor / (size + floor)) ** 2
    layer.post_feedforward_layernorm.weight = scaled(layer.post_feedforward_layernorm.weight, unit)


# --- bounds ------------------------------------------------------------------------------------


def key_weights(model: Model) -> dict[str, mx.array]:
    """Of the layers whose keys the drafter reads, by kind."""
    return {layer.kind: cast(SelfAttention, layer.self_attn).k_norm.weight for layer in model.language_model.layers}


def output_bound(own: QueryAttention) -> float:
    """Of o_proj: what attention gives are means of normed values."""
    return largest_row(own.o_proj) * total_columns(own.o_proj) ** 0.5


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


def norm_of(norms: mx.array) -> float:
    return cast(float, norms.max().item())


def usual(norms: mx.array) -> float:
    return cast(float, mx.sqrt(mx.square(norms).mean()).item())


def median(norms: mx.array) -> float:
    return cast(float, mx.sort(norms)[len(norms) // 2].item())


def largest_row(module: nn.Module, columns: mx.array | None = None) -> float:
    return norm_of(row_norms(module, columns))


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
