"""Which matrix is stored with how many bits, and how large that makes it."""

import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from math import prod

from mlx_gemma4.config import ModelConfig, Quantization
from mlx_gemma4.errors import shown
from mlx_gemma4.model.model import Model
from mlx_gemma4.weights.load import parameters
from mlx_gemma4.weights.tensors import Shape

# What MLX takes: bits and group sizes by mode, the usual ones first.
BITS = {"affine": (4, 2, 3, 5, 6, 8), "mxfp4": (4,), "nvfp4": (4,), "mxfp8": (8,)}
GROUP_SIZES = {"affine": (64, 32, 128), "mxfp4": (32,), "nvfp4": (16,), "mxfp8": (32,)}

RECIPES = ("4bit", "8bit", "mixed", "qat")
# What `mixed` adds to `4bit`: on the published shapes 7.6 GB, which leaves 3.2 GB of a 16 GB Mac's 11.4 for the
# drafter, the caches and the rest.
MIXED_GROWTH = 1.126
# What qat does with a matrix off the lattice: Google's own file keeps the embedding at 6.6 bits (Q6_K).
QAT_FALLBACK = Quantization(64, 8, "affine")


@dataclass(frozen=True)
class Recipe:
    """How to quantize a checkpoint."""

    name: str  # as the model card has it
    base: Quantization | None  # of every matrix; None: nothing is quantized
    growth: float = 1.0  # how much larger than that it may become by giving sensitive matrices more bits
    lattice: bool = False  # matrices on a 4-bit lattice are stored on it, the others by `base`
    strict: bool = False  # a group size that was asked for has to divide every matrix


def named_recipe(name: str) -> Recipe:
    if name not in RECIPES:
        raise ValueError(f"recipe is {shown(name)}; expected one of {', '.join(RECIPES)}")
    if name == "qat":
        return Recipe(name, QAT_FALLBACK, lattice=True)
    base = Quantization(64, 8 if name == "8bit" else 4, "affine")
    return Recipe(name, base, growth=MIXED_GROWTH if name == "mixed" else 1.0)


def uniform_recipe(bits: int | None, group_size: int | None, mode: str | None) -> Recipe:
    """The same for every matrix; what is None is the mode's usual value. ValueError for what MLX cannot do."""
    mode = "affine" if mode is None else mode
    if mode not in BITS:
        raise ValueError(f"q-mode is {shown(mode)}; expected one of {', '.join(BITS)}")
    bits = BITS[mode][0] if bits is None else bits
    group_size = GROUP_SIZES[mode][0] if group_size is None else group_size
    for name, value, allowed in (("q-bits", bits, BITS[mode]), ("q-group-size", group_size, GROUP_SIZES[mode])):
        if value not in allowed:
            raise ValueError(f"{name} is {value}; {mode} takes {', '.join(map(str, sorted(allowed)))}")
    name = f"{bits} bits, group size {group_size}" + (f", {mode}" if mode != "affine" else "")
    return Recipe(name, Quantization(group_size, bits, mode), strict=True)


def is_matrix(path: str, shape: Shape) -> bool:
    """Whether a tensor is that of a linear layer or of the embedding: what MLX can quantize."""
    return path.endswith(".weight") and len(shape) == 2


def plan(recipe: Recipe, shapes: Mapping[str, Shape], item_bytes: int) -> dict[str, Quantization | None]:
    """The quantization of every matrix by its path; None for one that its group size does not divide.

    item_bytes: of an unquantized value, and of a scale. ValueError if a group size that was asked for does not divide.
    """
    base = recipe.base
    matrices = {path: shape for path, shape in shapes.items() if is_matrix(path, shape)}
    if base is None:
        return dict.fromkeys(matrices)
    chosen = {path: base if shape[1] % base.group_size == 0 else None for path, shape in matrices.items()}
    refused = [path for path, own in chosen.items() if own is None]
    if refused and (recipe.strict or len(refused) == len(matrices)):
        path = refused[0]
        raise ValueError(
            f"the group size {base.group_size} does not divide the {matrices[path][1]} columns of {path} "
            f"({len(refused)} of {len(matrices)} matrices)"
        )
    if recipe.growth > 1:
        room = int((recipe.growth - 1) * weights_nbytes(shapes, chosen, item_bytes))
        chosen |= upgrades(matrices, chosen, room, item_bytes)
    return chosen


def weights_nbytes(shapes: Mapping[str, Shape], chosen: Mapping[str, Quantization | None], item_bytes: int) -> int:
    """Bytes of all tensors with their scales and biases."""
    return sum(packed_nbytes(shape, chosen.get(path), item_bytes) for path, shape in shapes.items())


def packed_nbytes(shape: Shape, own: Quantization | None, item_bytes: int) -> int:
    count = prod(shape)
    if own is None:
        return count * item_bytes
    # affine groups have a scale and a bias; the others a scale of one byte
    return count * own.bits // 8 + count // own.group_size * (2 * item_bytes if own.mode == "affine" else 1)


def upgrades(
    matrices: Mapping[str, Shape], chosen: Mapping[str, Quantization | None], room: int, item_bytes: int
) -> dict[str, Quantization]:
    """More bits for matrices in the order of `sensitive`, for at most `room` bytes."""
    found: dict[str, Quantization] = {}
    for path, bits in sensitive(matrices):
        own = found.get(path) or chosen[path]
        if own is None or own.bits >= bits:
            continue
        better = Quantization(own.group_size, bits, own.mode)
        cost = packed_nbytes(matrices[path], better, item_bytes) - packed_nbytes(matrices[path], own, item_bytes)
        if cost <= room:
            room -= cost
            found[path] = better
    return found


def sensitive(matrices: Mapping[str, Shape]) -> Iterator[tuple[str, int]]:
    """Matrices and the bits they should have, those first whose errors are known to cost most for their size.

    Images and sounds have only a matrix or two, which are small. Then what llama.cpp's Q4_K_M and mlx-lm's mixed_4_6
    agree on: values (in full layers they come from k_proj), the head (the tied embedding, or one of its own), down_proj
    from both ends of the decoder inwards; then the rest of attention in the same way.
    """
    by_part: dict[str, dict[int, str]] = {}
    for path in matrices:
        if match := re.search(r"layers\.(\d+)\.(\w+\.\w+)\.weight$", path):
            by_part.setdefault(match[2], {})[int(match[1])] = path
    last = max((layer for part in by_part.values() for layer in part), default=0)

    def inwards(part: str) -> list[str]:
        layers = by_part.get(part, {})
        return [layers[layer] for layer in sorted(layers, key=lambda layer: min(layer, last - layer))]

    keys, values = by_part.get("self_attn.k_proj", {}), by_part.get("self_attn.v_proj", {})
    yield from ((path, 8) for path in matrices if path.startswith(("vision_embedder.", "embed_")))
    yield from ((path, 8) for path in inwards("self_attn.v_proj"))
    yield from ((keys[layer], 8) for layer in sorted(keys.keys() - values.keys()))
    heads = [path for path in matrices if path.endswith("lm_head.weight")]
    yield from ((path, 6) for path in heads or matrices if path.endswith(("lm_head.weight", "embed_tokens.weight")))
    for part in ("mlp.down_proj", "self_attn.k_proj", "self_attn.o_proj", "self_attn.q_proj"):
        yield from ((path, 6) for path in inwards(part))


def config_quantization(used: Mapping[str, Quantization | None]) -> dict[str, object] | None:
    """What config.json says under `quantization`, by module names as given: the commonest, and what differs from it."""
    counts: dict[Quantization, int] = {}
    for own in used.values():
        if own is not None:
            counts[own] = counts.get(own, 0) + 1
    if not counts:
        return None
    default = max(counts, key=lambda own: counts[own])
    return described(default) | {
        path.removesuffix(".weight"): described(own) for path, own in used.items() if own not in (None, default) and own
    }


def described(own: Quantization) -> dict[str, object]:
    return {"group_size": own.group_size, "bits": own.bits, "mode": own.mode}


def nbytes_at(config: ModelConfig, bits: int) -> int:
    """Bytes of a model's weights if every matrix had so many bits, and the rest two bytes."""
    shapes = {path: array.shape for path, array in parameters(Model(config)).items()}
    chosen = plan(Recipe("", Quantization(GROUP_SIZES["affine"][0], bits, "affine")), shapes, 2)
    return weights_nbytes(shapes, chosen, 2)
