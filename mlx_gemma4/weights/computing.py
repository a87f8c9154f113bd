"""The type that a model computes in, and its tensors' values in it."""

import logging
import math
import re
from collections.abc import Mapping
from dataclasses import replace

import mlx.core as mx

from mlx_gemma4.config import ModelConfig, Quantization
from mlx_gemma4.errors import CheckpointError
from mlx_gemma4.model.float16 import LIMIT
from mlx_gemma4.weights.adapter import AdapterTensor
from mlx_gemma4.weights.tensors import FLOATING, Tensor, block_ranges
from mlx_gemma4.weights.whole import DRAFTER_ROOT, quantization_of

logger = logging.getLogger("mlx_gemma4")

# GPUs before the M3's have no bfloat16: MLX computes it in float32, and rounds (1.34 times as long for a prompt).
EMULATED = re.compile(r"applegpu_g1[34]")
FLOAT16_END = 65520  # what float16 rounds to infinity begins here
BFLOAT16_ERROR = 2.0**-9 / 3**0.5  # root of the mean square, as a part of what is rounded, at most


def emulates_bfloat16() -> bool:
    return EMULATED.match(str(mx.device_info().get("architecture", ""))) is not None


def choose_dtype(tensors: Mapping[str, Tensor], quantization: Mapping[str, Quantization], emulated: bool) -> mx.Dtype:
    """The type to compute in where none is asked for: the checkpoint's own, but float16 where bfloat16 is emulated."""
    own = own_dtype(tensors, quantization)
    if own != mx.bfloat16 or not emulated:
        return own
    for path, tensor in tensors.items():
        if not is_table(path, tensor) and tensor.dtype in FLOATING and is_worse_in_float16(tensor):
            logger.info("computes in bfloat16, which this GPU emulates: float16 would change %s", tensor.name)
            return own
    if (bound := largest_score(tensors)) > LIMIT:
        logger.info("computes in bfloat16, which this GPU emulates: scores may reach %.3g, beyond float16", bound)
        return own
    logger.info("computes in float16: this GPU emulates the checkpoint's bfloat16")
    return mx.float16


def largest_score(tensors: Mapping[str, Tensor]) -> float:
    """A bound on what attention's products of queries and keys can be, which no power of two could make smaller."""
    found = {path: tensor for path, tensor in tensors.items() if path.endswith(("q_norm.weight", "k_norm.weight"))}
    if not all(tensor.file.exists() for tensor in found.values()):  # on the hub
        return 0.0
    size = {path: float(mx.abs(tensor.read().astype(mx.float32)).max()) for path, tensor in found.items()}
    keys = {tensor.shape: 1.0 for tensor in found.values()}  # the drafter reads those of its own width
    for path in size:
        if "k_norm" in path:
            keys[found[path].shape] = max(keys[found[path].shape], size[path])
    return max(
        (
            found[path].shape[0]
            * size[path]
            * max(size.get(path.replace("q_norm", "k_norm"), keys[found[path].shape]), 1)
            for path in size
            if "q_norm" in path
        ),
        default=0.0,
    )


def own_dtype(tensors: Mapping[str, Tensor], quantization: Mapping[str, Quantization]) -> mx.Dtype:
    """The type of most weights of the decoder's matrices: that of the matrix, or of the scales if these float.

    Norms and the rest count only where no matrix has a type: trainers save some of them as float32.
    """
    tables: dict[mx.Dtype, int] = dict.fromkeys(FLOATING, 0)
    others = dict(tables)
    for path, tensor in tensors.items():
        scales = tensors.get(f"{path.removesuffix('.weight')}.scales", tensor)
        if scales.dtype not in FLOATING or path.startswith(DRAFTER_ROOT):
            continue
        if not is_table(path, tensor):
            others[tensor.dtype] = others.get(tensor.dtype, 0) + math.prod(tensor.shape)
        else:
            packed = 1 if scales is tensor else 32 // quantization_of(path.removesuffix(".weight"), quantization).bits
            tables[scales.dtype] += packed * math.prod(tensor.shape)
    votes = tables if any(tables.values()) else others
    return max(FLOATING, key=lambda dtype: votes[dtype])


def is_table(path: str, tensor: Tensor) -> bool:
    """Whether a tensor is a matrix, quantized or not."""
    return path.endswith(".weight") and len(tensor.shape) == 2


def is_worse_in_float16(tensor: Tensor) -> bool:
    """Whether float16 rounds a tensor's values more than bfloat16 did, or has no room for one of them."""
    if not tensor.file.exists():  # on the hub
        return False
    lost = least = mx.array(0.0)
    for start, stop in block_ranges(tensor):
        values = tensor.rows(start, stop).astype(mx.float32)
        lost = lost + mx.square(values.astype(mx.float16) - values).sum()
        least = least + mx.square(values * BFLOAT16_ERROR).sum()
    return not bool(lost <= least)  # infinite, or no number


def loaded_dtype(tensor: Tensor, config: ModelConfig) -> mx.Dtype:
    """All that floats has one type; packed weights and scales of a byte stay. The lengths of DoRA's rows are divided by
    others that are nearly the same: float32."""
    if isinstance(tensor, AdapterTensor) and tensor.is_gain:
        return mx.float32
    return config.dtype if tensor.dtype in FLOATING else tensor.dtype


def as_loaded(path: str, tensors: Mapping[str, Tensor], config: ModelConfig) -> Tensor:
    """A tensor's type, and its size once the model is arranged: a layer's scalar becomes as long as a row."""
    like = tensors[path.replace("layer_scalar", "input_layernorm.weight")]
    return replace(tensors[path], dtype=loaded_dtype(tensors[path], config), shape=like.shape)


def load_value(tensor: Tensor, config: ModelConfig) -> mx.array:
    """A tensor's values in the type to compute in.

    A norm for which float16 has no room stays as wide as it is; CheckpointError if it is another tensor.
    """
    value = tensor.read()
    dtype = loaded_dtype(tensor, config)
    if dtype == mx.float16 and FLOAT16_END <= (largest := float(mx.maximum(value.max(), -value.min()))) < math.inf:
        if len(tensor.shape) > 1:
            raise CheckpointError(
                f"{tensor.name} holds {largest:.6g}, beyond float16; expected bfloat16 or float32, for dtype"
            )
        dtype = mx.float32
    value = value.astype(dtype)
    mx.eval(value)
    return value
