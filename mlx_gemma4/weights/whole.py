"""Whether tensors are a whole model, quantized as its configuration says, and what they settle of that."""

import logging
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import TypeVar

import mlx.core as mx
from mlx import nn

from mlx_gemma4.config import ModelConfig, Quantization, TextConfig
from mlx_gemma4.errors import LONGEST, CheckpointError, clipped, shown
from mlx_gemma4.model.drafter import DrafterConfig
from mlx_gemma4.weights.tensors import (
    DTYPE_NAMES,
    EMBEDDING,
    FLOATING,
    HEAD,
    TEXT,
    Rows,
    Tensor,
    conversion_name,
    have_same_values,
    module_path,
)

logger = logging.getLogger("mlx_gemma4")

DRAFTER_ROOT = "drafter."  # of the paths of its tensors, beside the model's
# Parts a conversion may have left out; the rest of the model is then used without them.
OPTIONAL_PARTS = {"vision": ("vision_embedder.", "embed_vision."), "audio": ("embed_audio.",)}
NAMED = 4  # tensors named in one warning, which stays a line

Stored = TypeVar("Stored", bound=Rows)


def quantize_empty(model: nn.Module, tensors: Mapping[str, Tensor], quantization: Mapping[str, Quantization]) -> None:
    """Give an empty model quantized modules where the tensors are; quantization: as `quantization_by_path`."""

    def parameters_of(path: str, module: nn.Module) -> bool | dict[str, int | str]:
        scales = tensors.get(f"{path}.scales")
        if scales is None:
            return False
        own = quantization_of(path, quantization)
        if (own.mode == "affine") != (scales.dtype in FLOATING):
            stored = DTYPE_NAMES[scales.dtype]
            expected = "BF16, F16 or F32" if own.mode == "affine" else "U8"
            raise CheckpointError(
                f"{shown(scales.name)} is stored as {stored} and config.json says mode {own.mode}; expected {expected}"
            )
        return {"group_size": own.group_size, "bits": own.bits, "mode": own.mode}

    try:
        nn.quantize(model, class_predicate=parameters_of)
    except CheckpointError:
        raise
    except ValueError as error:
        raise CheckpointError(f"config.json has a quantization that MLX cannot do: {error}") from None


def quantization_of(path: str, quantization: Mapping[str, Quantization]) -> Quantization:
    """Of a quantized module: its own, or the default of the model or drafter that it belongs to."""
    root = DRAFTER_ROOT if path.startswith(DRAFTER_ROOT) else ""
    own = quantization.get(path) or quantization.get(root)
    if own is None:
        raise CheckpointError(f"{path} is quantized, but config.json has no quantization")
    return own


def quantization_by_path(config: ModelConfig | DrafterConfig, root: str) -> dict[str, Quantization]:
    """By the path of a module; the default by `root`, which all paths begin with."""
    default = {root: config.quantization} if config.quantization else {}
    return default | {root + module_path(name): own for name, own in config.quantization_overrides.items()}


def check_tensors(expected: Mapping[str, mx.array], tensors: Mapping[str, Tensor]) -> None:
    """CheckpointError for a tensor that is missing, of another shape or kind than the model's parameter of this path; a
    warning for those without a place."""
    if missing := sorted(expected.keys() - tensors.keys()):
        raise CheckpointError(
            f"the checkpoint lacks {len(missing)} of {len(expected)} tensors, first {missing[0]}"
            + foreign_names([tensor.name for tensor in tensors.values()], missing[0])
        )
    for path, array in expected.items():
        own = tensors[path]
        if own.shape != array.shape:
            raise CheckpointError(f"{own.name} has shape {shown(list(own.shape))}; expected {list(array.shape)}")
        allowed = FLOATING if array.dtype in FLOATING else (array.dtype,)
        if own.dtype not in allowed:
            names = " or ".join(DTYPE_NAMES[dtype] for dtype in allowed)
            raise CheckpointError(f"{own.name} is stored as {DTYPE_NAMES[own.dtype]}; expected {names}")
    if unknown := sorted(tensors[path].name for path in tensors.keys() - expected.keys()):
        names = ", ".join(clipped(name, LONGEST) for name in unknown[:NAMED])
        more = f" and {len(unknown) - NAMED} more" if len(unknown) > NAMED else ""
        logger.warning("the model has no place for %d tensors, left out: %s%s", len(unknown), names, more)


# What other libraries add to the names of tensors.
WRAPPERS = ("base_model.model.", "_orig_mod.", "_fsdp_wrapped_module.", "module.")
FOREIGN_PARTS = {
    "qweight": "GPTQ's or AWQ's",
    "weight_packed": "compressed-tensors'",
    "weight_scale": "compressed-tensors' or fp8's",
    "weight_scale_inv": "fp8's",
    "absmax": "bitsandbytes'",
    "lora_A": "a LoRA adapter's",
}


def foreign_names(names: Sequence[str], path: str) -> str:
    """What is to be said of a checkpoint whose tensors are named otherwise; `path`: of one that is missing."""
    ends = tuple(f".{own}" for own in (path, conversion_name(path)))
    prefixed = next((name for name in names if name.endswith(ends)), None)
    wrapper = next((own for own in WRAPPERS if any(f".{own}" in f".{name}" for name in names)), None)
    if wrapper is None and prefixed is not None:
        wrapper = prefixed[: -len(path)].removesuffix("model.").removesuffix(TEXT)
    if wrapper:
        return f"; its names have {shown(wrapper)} in front, expected them as Google or MLX writes them"
    parts = [part for name in names for part in name.split(".")[-3:]]
    foreign = next((FOREIGN_PARTS[part] for part in parts if part in FOREIGN_PARTS), None)
    return f"; its tensors are {foreign}, expected the original checkpoint or MLX's quantization" if foreign else ""


# --- what the tensors settle -------------------------------------------------------------------


def settle_parts(config: ModelConfig, tensors: dict[str, Stored]) -> tuple[ModelConfig, dict[str, Stored]]:
    """The configuration as the tensors have it, without the modalities of which there is none (text-only conversions),
    and those of them that count."""
    found = {part: any(path.startswith(own) for path in tensors) for part, own in OPTIONAL_PARTS.items()}
    vision, audio = config.vision if found["vision"] else None, config.audio if found["audio"] else None
    is_tied = has_tied_head(config.text, tensors)
    if is_tied:
        tensors = {path: tensor for path, tensor in tensors.items() if not path.startswith(f"{HEAD}.")}
    text = replace(config.text, tie_word_embeddings=is_tied)
    return replace(config, text=text, vision=vision, audio=audio), tensors


def has_tied_head(text: TextConfig, tensors: Mapping[str, Rows]) -> bool:
    """Whether the embedding is the head: there is no other, or one with the same values. The config may be wrong."""
    own = {path.removeprefix(HEAD): tensor for path, tensor in tensors.items() if path.startswith(f"{HEAD}.")}
    if not own:
        if not text.tie_word_embeddings:
            raise CheckpointError("tie_word_embeddings is False and there is no lm_head.weight; expected it, or True")
        return True
    table = {
        path.removeprefix(EMBEDDING): tensor for path, tensor in tensors.items() if path.startswith(f"{EMBEDDING}.")
    }
    if any(isinstance(tensor, Tensor) and not tensor.file.exists() for tensor in own.values()):
        return text.tie_word_embeddings  # on the hub: the values are not here to compare
    return own.keys() == table.keys() and all(have_same_values(own[part], table[part]) for part in own)


def settle_drafter(config: DrafterConfig, tensors: dict[str, Tensor]) -> tuple[DrafterConfig, dict[str, Tensor]]:
    """A drafter's embedding is its head and nothing else: a head of its own takes that place."""
    head = {path: tensor for path, tensor in tensors.items() if path.startswith(f"{HEAD}.")}
    if not head:
        if not config.text.tie_word_embeddings:
            raise CheckpointError("tie_word_embeddings of the drafter is False and there is no lm_head.weight")
        return config, tensors
    rest = {path: own for path, own in tensors.items() if not path.startswith((f"{HEAD}.", "embed_tokens."))}
    overrides = {
        path: own for path, own in config.quantization_overrides.items() if module_path(path) != "embed_tokens"
    }
    overrides = {"embed_tokens" if module_path(path) == HEAD else path: own for path, own in overrides.items()}
    renamed = {f"embed_tokens{path.removeprefix(HEAD)}": tensor for path, tensor in head.items()}
    text = replace(config.text, tie_word_embeddings=False)
    return replace(config, text=text, quantization_overrides=overrides), rest | renamed
