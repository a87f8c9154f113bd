"""Weights trained onto a 4-bit lattice: find it again, so that they are stored as codes without being rounded.

A block is 32 weights along the input that are d · q with q in −8 … 7 (llama.cpp's Q4_0), rounded to bfloat16. MLX holds
it as scale · (q + 8) + bias with scale = d and bias = −8 d. A scale is exact if float32 arithmetic, rounded to
bfloat16, gives the weights back.
"""

from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from itertools import repeat

import numpy as np

from mlx_gemma4.config import Quantization

BLOCK = 32
QUANTIZATION = Quantization(BLOCK, 4, "affine")
CHUNK = 2**12  # blocks looked at together: what fits into a processor's cache
LOWEST, HIGHEST = -8, 7
# What the weight of largest magnitude may be a multiple of, where it is not −8 as llama.cpp has it. Below 4 there is
# nothing new: half of d then gives the same weights. A lattice without its −8 has no sign, d is then positive.
OTHER_EXTREMA = (7, 6, 5, 4)
# Of a weight's distance from its point, as a part of it: two roundings to bfloat16, d's and the weight's, and as much
# again, for nobody says in which steps the weights were rounded. A random block passes with a chance below 1e-30.
TOLERANCE = np.float32(2.0**-7)


@dataclass(frozen=True)
class Lattice:
    """Blocks as codes and scales, and how well they give the weights back."""

    codes: np.ndarray  # [blocks, 32] uint8, q + 8
    scales: np.ndarray  # [blocks] float32, with bfloat16's bits if these were asked for
    inexact: int  # blocks that no scale gives back
    error: float  # the largest difference of a weight from what is given back, after rounding to bfloat16


def find_lattice(weights: np.ndarray, float32_scales: bool = False) -> Lattice | None:
    """The lattice of [rows, columns] float32 weights, or None if they, or one block of them, lie on none.

    No weight is moved to another point of the lattice. Columns are a multiple of 32.
    """
    blocks = weights.reshape(-1, BLOCK)
    parts = [blocks[start : start + CHUNK] for start in range(0, len(blocks), CHUNK)]
    with ThreadPoolExecutor() as threads:  # NumPy lets them run side by side
        found = list(threads.map(find_blocks, parts, repeat(float32_scales)))
    whole = [part for part in found if part is not None]
    return join(whole) if len(whole) == len(found) else None


def keep_lattice(q: np.ndarray, d: np.ndarray, float32_scales: bool = False) -> Lattice:
    """The lattice that [blocks, 32] integers and [blocks] float32 scales give, whose scales may have to be rounded."""
    parts = []
    for start in range(0, len(q), CHUNK):
        own, step = q[start : start + CHUNK].astype(np.float32), d[start : start + CHUNK]
        if float32_scales:
            parts.append(Lattice(codes_of(own), step, 0, 0.0))
            continue
        weights = round_bfloat16(own * step[:, None])
        scales, errors = best_scale(weights, own, step, float32_scales)
        parts.append(Lattice(codes_of(own), scales, int(np.count_nonzero(errors)), float(errors.max(initial=0))))
    return join(parts)


def join(parts: list[Lattice]) -> Lattice:
    return Lattice(
        np.concatenate([part.codes for part in parts]),
        np.concatenate([part.scales for part in parts]),
        sum(part.inexact for part in parts),
        max(part.error for part in parts),
    )


def find_blocks(weights: np.ndarray, float32_scales: bool) -> Lattice | None:
    """`find_lattice` of a few blocks, [n, 32]."""
    if np.any(weights.view(np.uint32) & 0xFFFF):  # more bits than bfloat16 has
        return None
    highest, lowest = weights.max(axis=1), weights.min(axis=1)
    extreme = np.where(highest > -lowest, highest, lowest)
    if not np.all(np.isfinite(extreme)):
        return None
    # The bfloat16 that is nearest to d, and the only one that can be exact: −8 times it is a weight.
    scales = extreme / LOWEST
    q, fits = multiples(weights, scales)
    errors = largest_error(weights, q, scales)
    if float32_scales and len(rest := np.flatnonzero(fits & (errors > 0))):
        scales[rest], errors[rest] = best_scale(weights[rest], q[rest], scales[rest], float32_scales)
    if len(rest := np.flatnonzero(~fits)):
        found = search(weights[rest], extreme[rest], float32_scales)
        if found is None:
            return None
        q[rest], scales[rest], errors[rest] = found
    return Lattice(codes_of(q), scales, int(np.count_nonzero(errors)), float(errors.max(initial=0)))


def search(
    weights: np.ndarray, extreme: np.ndarray, float32_scales: bool
) -> tuple[np.ndarray, np.ndarray, np.ndarray] | None:
    """q, scales and errors of blocks [n, 32] whose extremum is not −8 d; None if one has no lattice."""
    q, scales = np.zeros_like(weights), np.zeros_like(extreme)
    errors = np.full_like(extreme, np.inf)  # infinite: no lattice yet
    rest = np.arange(len(weights))
    for k in OTHER_EXTREMA:
        step = np.abs(extreme[rest]) / np.float32(k)
        multiple, fits = multiples(weights[rest], step)
        scale, error = best_scale(weights[rest], multiple, step, float32_scales)
        better = fits & (error < errors[rest])
        at = rest[better]
        q[at], scales[at], errors[at] = multiple[better], scale[better], error[better]
        rest = rest[errors[rest] > 0]
        if not len(rest):
            break
    return None if np.isinf(errors).any() else (q, scales, errors)


def multiples(weights: np.ndarray, step: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """The integers nearest to weights / step, [n, 32] float32, and whether the weights lie there, [n]."""
    with np.errstate(divide="ignore", over="ignore"):
        quotients = weights * np.where(step == 0, np.float32(0), 1 / step)[:, None]
    q = np.rint(quotients)
    off = np.abs(quotients - q) > TOLERANCE * np.abs(q)
    return q, ~off.any(axis=1) & (q.max(axis=1) <= HIGHEST)


def bounds(weights: np.ndarray, q: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """The least and the greatest |d| with which every |d · q| is rounded to the bfloat16 weight, [n] each."""
    size = np.abs(weights)
    bits = size.view(np.uint32)
    # half the distance to the next bfloat16: 2 ** (exponent − 8); towards zero half of that at a power of two
    half = (np.maximum(bits & 0x7F800000, 9 << 23) - np.uint32(8 << 23)).view(np.float32)
    below = np.where((bits & 0x7FFFFF) == 0, half / 2, half)
    with np.errstate(divide="ignore", invalid="ignore", over="ignore"):
        inverse = 1 / np.abs(q)
        nothing = (q == 0) | (size == 0)
        low = np.where(nothing, np.float32(0), (size - below) * inverse).max(axis=1)
        high = np.where(nothing, np.float32(np.inf), (size + half) * inverse).min(axis=1)
    return low, np.where(np.isinf(high), np.float32(0), high)  # a block of zeros: d is 0


def best_scale(
    weights: np.ndarray, q: np.ndarray, step: np.ndarray, float32_scales: bool
) -> tuple[np.ndarray, np.ndarray]:
    """The middle of d's bounds, or of the bfloat16 on both sides of it the one with the smaller error; and that error.

    If any bfloat16 lies within the bounds, one of the middle's two neighbours does. step: has the sign of d. [n] each.
    """
    low, high = bounds(weights, q)
    middle = np.copysign(low + (high - low) / 2, step)
    if float32_scales:
        return middle, largest_error(weights, q, middle)
    down = middle.view(np.uint32) & 0xFFFF0000
    up = np.where(middle == 0, down, down + 0x10000).astype(np.uint32)
    candidates = down.view(np.float32), up.view(np.float32)
    errors = [largest_error(weights, q, scale) for scale in candidates]
    first = errors[0] <= errors[1]
    return np.where(first, *candidates), np.where(first, *errors)


def largest_error(weights: np.ndarray, q: np.ndarray, scale: np.ndarray) -> np.ndarray:
    """How far scale · (q + 8) + bias, as float32 arithmetic has it, lies from the weights after rounding, [n]."""
    if np.any(scale.view(np.uint32) & 0xFFFF):  # more bits than bfloat16: each step is rounded
        back = scale[:, None] * (q - LOWEST) + (scale * LOWEST)[:, None]
    else:  # each is exact
        back = scale[:, None] * q
    back = round_bfloat16(back)
    back -= weights
    return np.abs(back, out=back).max(axis=1)


def round_bfloat16(x: np.ndarray) -> np.ndarray:
    """float32 -> the nearest bfloat16, ties to even, as float32."""
    bits = x.view(np.uint32)
    rounding = (bits >> 16) & 1
    rounding += 0x7FFF
    rounding += bits
    rounding &= 0xFFFF0000
    return rounding.view(np.float32)


def codes_of(q: np.ndarray) -> np.ndarray:
    return (q - LOWEST).astype(np.uint8)


def pack(codes: np.ndarray, columns: int) -> np.ndarray:
    """[blocks, 32] codes -> [rows, columns / 8] uint32, as mx.quantize packs them: the first in the lowest bits."""
    pairs = codes[:, 0::2] | codes[:, 1::2] << 4
    return pairs.reshape(-1, columns // 2).view("<u4")
