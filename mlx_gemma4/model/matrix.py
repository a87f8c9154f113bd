"""Matrices, quantized or not: their values, joining them, and what an adapter adds to them.

An adapted matrix stays as it is, with a low-rank product beside it: added to weights of a few bits, most of what was
learnt would be rounded away.
"""

from collections.abc import Iterator, Sequence

import mlx.core as mx
from mlx import nn

BLOCK = 2**22  # numbers that are looked at at once
STORED = ("weight", "scales", "biases")  # of a matrix, by rows


class Choosing(nn.Module):
    """What is called with the adapters that rows have: what may be an adapted matrix, or a part of one."""


class Adapted(Choosing):
    """x Wᵀ + (x Aᵀ) Bᵀ, B with the adapter's scale in it; of DoRA the rows of W + B A have lengths of their own.

    Of several adapters, which requests choose from, each array has one axis more in front, and the first adds nothing.
    """

    lora_a: mx.array  # [r, columns]
    lora_b: mx.array  # [rows, r]
    gain: mx.array  # [rows] float32, of DoRA: these lengths, and from `settle_gains` on what W's rows are times

    def __call__(self, x: mx.array, adapters: mx.array | None = None) -> mx.array:
        """adapters [B]: of several, which one each row of x [B, L, columns] has; None: none of them."""
        y = super().__call__(x)
        a, b, gain = self.lora_a, self.lora_b, self.get("gain")
        if a.ndim == 3:
            if adapters is None:
                return y
            a, b, gain = a[adapters], b[adapters], None if gain is None else gain[adapters][:, None]
        if gain is not None:
            y = (y * gain).astype(y.dtype)
        return mx.addmm(y, x @ a.swapaxes(-1, -2), b.swapaxes(-1, -2))


class AdaptedLinear(Adapted, nn.Linear):
    pass


class AdaptedQuantizedLinear(Adapted, nn.QuantizedLinear):
    pass


def adapt(module: nn.Module, lora_a: mx.array, lora_b: mx.array, gain: mx.array | None) -> None:
    """Make an adapted matrix of one, where it is."""
    module.__class__ = AdaptedQuantizedLinear if isinstance(module, nn.QuantizedLinear) else AdaptedLinear
    module.lora_a, module.lora_b = lora_a, lora_b
    if gain is not None:
        module.gain = gain


def product(module: nn.Module, x: mx.array, adapters: mx.array | None) -> mx.array:
    """x times a matrix that may be adapted; adapters as `Adapted` takes them."""
    return module(x, adapters) if isinstance(module, Choosing) else module(x)


def settle_gains(root: nn.Module) -> None:
    """In a module that has been loaded: lengths of rows -> what these are times."""
    for module in root.modules():
        if isinstance(module, Adapted) and "gain" in module:
            norms = [
                mx.linalg.norm(own + more, axis=-1) for own, more in zip(blocks(module), added(module), strict=True)
            ]
            gain = module.gain / mx.concatenate(norms, axis=-1)
            if gain.ndim == 2:  # those of several adapters that have none
                gain = mx.where(mx.isnan(module.gain), 1, gain)
            module.gain = gain
            module.lora_b = (module.lora_b * gain[..., None]).astype(module.lora_b.dtype)
            mx.eval(module.lora_b, module.gain)


# --- values ------------------------------------------------------------------------------------


def total_columns(module: nn.Module) -> int:
    """Of the matrix, packed or not."""
    columns = module.weight.shape[1]
    is_packed = isinstance(module, nn.QuantizedLinear | nn.QuantizedEmbedding)
    return int(columns * 32 // module.bits if is_packed else columns)


def steps(module: nn.Module) -> Iterator[slice]:
    """The rows that are looked at at once."""
    step = max(1, BLOCK // total_columns(module))
    yield from (slice(first, first + step) for first in range(0, len(module.weight), step))


def blocks(module: nn.Module) -> Iterator[mx.array]:
    """A matrix's values without what an adapter adds, some rows after the others, float32."""
    for rows in steps(module):
        part = {name: module[name][rows] for name in STORED if name in module}
        if isinstance(module, nn.QuantizedLinear | nn.QuantizedEmbedding):
            part["weight"] = mx.dequantize(
                part["weight"], part["scales"], part.get("biases"), module.group_size, module.bits, module.mode
            )
        yield part["weight"].astype(mx.float32)


def added(module: Adapted) -> Iterator[mx.array]:
    """What an adapter adds, B A, by the same rows; of several adapters, each."""
    lora_a = module.lora_a.astype(mx.float32)
    yield from (module.lora_b[..., rows, :].astype(mx.float32) @ lora_a for rows in steps(module))


# --- joining -----------------------------------------------------------------------------------


def are_alike(one: nn.Module, other: nn.Module) -> bool:
    """Whether two matrices can be one."""
    is_packed = isinstance(one, nn.QuantizedLinear)
    if one.weight.dtype != other.weight.dtype or is_packed != isinstance(other, nn.QuantizedLinear):
        return False
    if not is_packed:
        return one.weight.dtype != mx.float32 or joins_float32()
    settings = [(module.group_size, module.bits, module.mode, module.scales.dtype) for module in (one, other)]
    return settings[0] == settings[1]


def joins_float32() -> bool:
    """A CPU's BLAS copies a matrix above some size before each product: there joining costs more than it saves."""
    return mx.default_device().type == mx.gpu


def join(modules: Sequence[nn.Module]) -> nn.Module:
    """Matrices that are alike as one, in the first one's place."""
    first = modules[0]
    if len(modules) > 1:
        join_adapters(modules)
        for name in STORED:
            if name in first:
                first[name] = mx.concatenate([module[name] for module in modules])
    return first


def join_adapters(modules: Sequence[nn.Module]) -> None:
    """Give the first matrix what adapters add to all: two products, B's of each in rows and columns of its own."""
    own = [module for module in modules if isinstance(module, Adapted)]
    if not own:
        return
    lora_a = mx.concatenate([module.lora_a for module in own], axis=-2)
    *several, rank, _ = lora_a.shape
    parts, first = [], 0
    for module in modules:
        part = mx.zeros((*several, len(module.weight), rank), lora_a.dtype)
        if isinstance(module, Adapted):
            last = first + module.lora_a.shape[-2]
            part[..., first:last] = module.lora_b
            first = last
        parts.append(part)
    gains = [module.gain if "gain" in module else mx.ones((*several, len(module.weight))) for module in modules]
    gain = mx.concatenate(gains, axis=-1) if any("gain" in module for module in own) else None
    adapt(modules[0], lora_a, mx.concatenate(parts, axis=-2), gain)
