"""Adapters: mlx-lm's folders and PEFT's -> what they add to which matrix, and back.

mlx-lm has x A B · scale with A [columns, r] and B [r, rows] in `adapters.safetensors`; PEFT has x Aᵀ Bᵀ · alpha / r in
`adapter_model.safetensors`. What cannot be taken as it was meant is an error: the base model's answer would look right.
"""

import json
import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, TypeGuard

import mlx.core as mx
from mlx import nn

from mlx_gemma4.config import read_checked
from mlx_gemma4.errors import CheckpointError, a, listed, shown
from mlx_gemma4.model.matrix import adapt, total_columns
from mlx_gemma4.model.model import Model
from mlx_gemma4.weights.tensors import (
    DTYPE_NAMES,
    FLOATING,
    TEXT,
    Shape,
    Tensor,
    conversion_name,
    module_path,
    tensors_in,
)
from mlx_gemma4.weights.writing import write_arrays, write_text

CONFIG = "adapter_config.json"
WEIGHTS, PEFT_WEIGHTS = "adapters.safetensors", "adapter_model.safetensors"
PEFT_ROOT = "base_model.model."  # of the names in PEFT's files
# Paths in `Model`, which are the checkpoint's, -> transformers', where it has names of its own: PEFT has those.
PEFT_PATHS = {
    "embed_vision.embedding_projection": "embed_vision.multimodal_embedder.embedding_projection",
    "vision_embedder.patch_dense": "embed_vision.patch_dense",
}

# A tensor's name: the matrix, and which of its parts it is, in mlx-lm's spelling or PEFT's.
NAME = re.compile(
    rf"(?:{re.escape(PEFT_ROOT)})?(.+?)(?:\.weight)?"
    r"\.(lora_a|lora_b|m|lora_A|lora_B|lora_magnitude_vector)(?:\.default)?(?:\.weight)?"
)
PARTS = {"lora_a": "lora_a", "lora_b": "lora_b", "m": "gain"}
PEFT_PARTS = {"lora_A": "lora_a", "lora_B": "lora_b", "lora_magnitude_vector": "gain"}
LAYER = re.compile(rf"{re.escape(TEXT)}layers\.(\d+)\.(.+)")

# What PEFT's adapter_config.json may say beside what is read here; of a key that is not known, only that it is off.
# Not among the ways to begin are those that change the base model: PiSSA, OLoRA, CorDA, LoftQ, LoRA-GA.
PEFT_SUPPORTED: dict[str, tuple[Any, ...]] = {
    "peft_type": ("LORA",),
    "bias": ("none",),
    "init_lora_weights": (True, False, "gaussian", "eva", "orthogonal"),
}
PEFT_OFF: tuple[Any, ...] = (None, False, [], {})
PEFT_READ = {
    "r", "lora_alpha", "use_rslora", "rank_pattern", "alpha_pattern", "use_dora", "target_modules", "exclude_modules",
    "layers_to_transform", "layers_pattern",
}  # fmt: skip
PEFT_IRRELEVANT = {
    "task_type", "auto_mapping", "peft_version", "base_model_name_or_path", "revision", "inference_mode",
    "lora_dropout", "megatron_core", "megatron_config", "qalora_group_size", "eva_config", "ensure_weight_tying",
    "runtime_config",
}  # fmt: skip


@dataclass(frozen=True)
class AdapterTensor(Tensor):
    """A part of what is added to a matrix, with the shape that `matrix.Adapted` has for it."""

    module: str  # what is adapted, as the file names it
    turned: bool  # the file has rows and columns the other way round
    scale: float  # of lora_b, as the configuration says; 1 for the others

    @property
    def is_gain(self) -> bool:
        return len(self.shape) == 1

    @property
    def stored(self) -> Tensor:
        """As the file has it."""
        shape = self.shape[::-1] if self.turned else self.shape
        return Tensor(self.name, self.file, shape, self.dtype, self.offset, pitch=self.pitch)

    def part_of_rows(self, start: int, stop: int) -> "AdapterTensor":
        return self.part((Tensor.part_of_columns if self.turned else Tensor.part_of_rows)(self.stored, start, stop))

    def part_of_columns(self, start: int, stop: int) -> "AdapterTensor":
        return self.part((Tensor.part_of_rows if self.turned else Tensor.part_of_columns)(self.stored, start, stop))

    def part(self, stored: Tensor) -> "AdapterTensor":
        shape = stored.shape[::-1] if self.turned else stored.shape
        return replace(self, shape=shape, offset=stored.offset, pitch=stored.pitch)

    def read(self) -> mx.array:
        value = self.stored.read().astype(mx.float32)
        return (value.T if self.turned else value) * self.scale


@dataclass(frozen=True)
class AdapterTensors(AdapterTensor):
    """The same part of several adapters, behind that of none: 0s up to the largest rank, and NaN where one has no
    gain. The file is the first one's."""

    parts: tuple[AdapterTensor | None, ...]

    @property
    def is_gain(self) -> bool:
        return len(self.shape) == 2

    def read(self) -> mx.array:
        found = mx.full(self.shape, mx.nan if self.is_gain else 0.0)
        for number, part in enumerate(self.parts, 1):
            if part is not None:
                found[(number, *map(slice, part.shape))] = part.read()
        return found


Parts = dict[str, dict[str, AdapterTensor]]  # by path of the matrix and name of the part


@dataclass(frozen=True)
class Plan:
    """What adapter_config.json says."""

    is_dora: bool
    ranks: dict[str, int]  # by path of the matrix, as `scales`
    scales: dict[str, float]
    targets: set[str]  # paths of all that is adapted, as far as it can be known


def matrices_of(model: Model) -> dict[str, Shape]:
    """The matrices that an adapter may add to, [rows, columns] by path: the model's but embeddings and drafter."""
    return {
        path: (len(module.weight), total_columns(module))
        for path, module in model.named_modules()
        if isinstance(module, nn.Linear | nn.QuantizedLinear) and not path.startswith("drafter.")
    }


def attach(model: Model, tensors: Mapping[str, AdapterTensor]) -> None:
    """Make room in an empty model for what `read_adapter` or `choosable` gives."""
    modules = dict(model.named_modules())
    for path in sorted({path.rpartition(".")[0] for path in tensors}):
        gain = tensors.get(f"{path}.gain")
        if gain is not None and "bias" in modules[path]:
            raise CheckpointError(f"{shown(gain.name)} is DoRA's, of a matrix with a bias; supported is LoRA there")
        lora_a, lora_b = (mx.zeros(tensors[f"{path}.{part}"].shape) for part in ("lora_a", "lora_b"))
        adapt(modules[path], lora_a, lora_b, None if gain is None else mx.zeros(gain.shape))


# --- reading -----------------------------------------------------------------------------------


def read_adapter(folder: Path, matrices: Mapping[str, Shape]) -> dict[str, AdapterTensor]:
    """What an adapter adds, by path in the model: ….lora_a [r, columns], ….lora_b [rows, r], of DoRA ….gain [rows].

    matrices: the model's. CheckpointError if the folder holds no adapter, one of a kind that is not supported, or one
    that does not fit these matrices wholly.
    """
    file, config = adapter_file(folder), folder / CONFIG
    is_peft = file.name == PEFT_WEIGHTS
    settings = read_checked(config, of_peft if is_peft else of_mlx)
    parts = list_parts(file)
    check_parts(file, parts, matrices)
    try:
        plan = (peft_plan if is_peft else mlx_plan)(settings, parts, matrices)
    except CheckpointError as error:
        raise CheckpointError(f"{config}: {error}") from None
    if missing := sorted(plan.targets - parts.keys()):
        raise CheckpointError(
            f"{file} has nothing for {len(missing)} of the {len(plan.targets)} matrices that {CONFIG} names, first "
            f"{missing[0]}; expected a whole adapter of this model"
        )
    found = {}
    for path, own in parts.items():
        if ("gain" in own) != plan.is_dora:
            raise CheckpointError(
                f"{file} has {'no ' * plan.is_dora}magnitudes for {path} and {CONFIG} says "
                f"{'DoRA' if plan.is_dora else 'LoRA'}; expected both of one kind"
            )
        rank = own["lora_a"].shape[0]
        if rank != plan.ranks[path]:
            raise CheckpointError(f"{path} has the rank {rank} in {file}; expected {plan.ranks[path]}, as in {CONFIG}")
        for name, part in own.items():
            found[f"{path}.{name}"] = replace(part, scale=plan.scales[path]) if name == "lora_b" else part
    return found


def choosable(each: Sequence[Mapping[str, AdapterTensor]]) -> dict[str, AdapterTensor]:
    """What `read_adapter` has found of several, as one: ….lora_a [n + 1, r, columns], r being the largest rank."""
    found: dict[str, AdapterTensor] = {}
    for path in sorted({path for own in each for path in own}):
        parts = tuple(own.get(path) for own in each)
        there = [part for part in parts if part is not None]
        shape = (len(each) + 1, *(max(sizes) for sizes in zip(*(part.shape for part in there), strict=True)))
        first = there[0]
        found[path] = AdapterTensors(
            first.name, first.file, shape, first.dtype, first.offset, first.module, False, 1.0, parts
        )
    return found


def adapter_file(folder: Path) -> Path:
    """The weights in an adapter's folder; CheckpointError if there are none, or two of them."""
    if not folder.is_dir():
        raise CheckpointError(f"{str(folder)!r} is no folder; expected an adapter's, with {CONFIG}")
    files = [folder / name for name in (WEIGHTS, PEFT_WEIGHTS) if (folder / name).exists()]
    if len(files) > 1:
        raise CheckpointError(f"{folder} has {WEIGHTS} and {PEFT_WEIGHTS}; expected one of them")
    if not files:
        inner = sorted({file.parent.name for name in (WEIGHTS, PEFT_WEIGHTS) for file in folder.glob(f"*/{name}")})
        which = f", as its subfolders are: {listed(inner)}" if inner else ""
        raise CheckpointError(
            f"{folder} has no {WEIGHTS}, nor PEFT's {PEFT_WEIGHTS}; expected an adapter's folder{which}"
        )
    return files[0]


def list_parts(file: Path) -> Parts:
    """The tensors of an adapter's file by what they are."""
    found: Parts = {}
    for tensor in tensors_in(file):
        match = NAME.fullmatch(tensor.name)
        if match is None:
            raise CheckpointError(
                f"{file} has {shown(tensor.name)}; supported are LoRA's and DoRA's tensors of matrices"
            )
        own = found.setdefault(adapted_path(match[1]), {})
        part = PEFT_PARTS.get(match[2]) or PARTS[match[2]]
        if part in own:
            raise CheckpointError(
                f"{file} has {shown(own[part].name)} and {shown(tensor.name)}, one tensor; expected one name"
            )
        turned = match[2] in ("lora_a", "lora_b")
        shape = tensor.shape[::-1] if turned else tensor.shape
        own[part] = AdapterTensor(tensor.name, file, shape, tensor.dtype, tensor.offset, match[1], turned, 1.0)
    if not found:
        raise CheckpointError(f"{file} has no tensors; expected an adapter's")
    return found


def adapted_path(name: str) -> str:
    """A matrix's name in any of the spellings -> its path in `Model`; of the decoder alone, layers are all there is."""
    path = module_path(name)
    renamed = {theirs: own for own, theirs in PEFT_PATHS.items()}
    return TEXT + path if path.startswith("layers.") else renamed.get(path, path)


def peft_path(path: str) -> str:
    """A path in `Model` -> the matrix in transformers' model."""
    return f"model.{PEFT_PATHS.get(path, path)}"


def check_parts(file: Path, parts: Parts, matrices: Mapping[str, Shape]) -> None:
    """Whether each is of one of the model's matrices, and whole."""
    if strange := [path for path in parts if path not in matrices]:
        name = next(iter(parts[strange[0]].values())).name
        raise CheckpointError(
            f"{len(strange)} of the {len(parts)} matrices in {file} are none of this model, first {shown(name)}; "
            "expected an adapter of this model"
        )
    for path, own in parts.items():
        rows, columns = matrices[path]
        for name in ("lora_a", "lora_b"):
            if name not in own:
                raise CheckpointError(f"{file} has only one of two factors for {path}; expected A and B")
        rank = own["lora_a"].shape[0] if own["lora_a"].shape else 0
        shapes: dict[str, Shape] = {"lora_a": (rank, columns), "lora_b": (rows, rank), "gain": (rows,)}
        for name, part in own.items():
            if part.shape != shapes[name] or not rank:
                expected = shapes[name][::-1] if part.turned else shapes[name]
                raise CheckpointError(
                    f"{shown(part.name)} in {file} has shape {list(part.stored.shape)}; expected "
                    f"{list(expected) if rank else 'a rank of 1 or more'}, for this model"
                )
            if part.dtype not in FLOATING:
                kind = DTYPE_NAMES[part.dtype]
                raise CheckpointError(f"{shown(part.name)} in {file} is stored as {kind}; expected BF16, F16 or F32")


# --- mlx-lm ------------------------------------------------------------------------------------


def of_mlx(config: dict[str, Any]) -> dict[str, Any]:
    """The configuration, of a kind that is supported: of another the tensors, too, would be strange."""
    kind = config.get("fine_tune_type", "lora")
    if kind not in ("lora", "dora"):
        raise CheckpointError(f"fine_tune_type is {shown(kind)}; supported are 'lora' and 'dora'")
    return config


def mlx_plan(config: dict[str, Any], parts: Parts, matrices: Mapping[str, Shape]) -> Plan:
    settings = config.get("lora_parameters")
    if not isinstance(settings, dict):
        raise CheckpointError(f"lora_parameters is {a(settings)}; expected rank, scale and keys, as mlx-lm writes them")
    rank, scale, layers = whole(settings, "rank"), real(settings, "scale"), whole(config, "num_layers")
    keys = settings.get("keys")
    if keys is not None and not is_names(keys):
        raise CheckpointError(f"keys is {shown(keys)}; expected a list of names, of a layer's matrices")
    chosen = {
        path: [key for key in keys or () if key == layer_part(path) or adapted_path(key) == path] for path in matrices
    }
    if unknown := [key for key in keys or () if key not in {key for own in chosen.values() for key in own}]:
        raise CheckpointError(
            f"keys has {shown(unknown[0])}, which no matrix of this model is; expected one of a layer"
        )
    first = len({layer_of(path) for path in matrices} - {None}) - layers if layers > 0 else 0
    targets = {
        path
        for path, own in chosen.items()
        if any(key != layer_part(path) for key in own)
        or ((layer := layer_of(path)) is not None and layer >= first and (own or keys is None))
    }
    return Plan(
        config.get("fine_tune_type") == "dora", dict.fromkeys(parts, rank), dict.fromkeys(parts, scale), targets
    )


def layer_of(path: str) -> int | None:
    match = LAYER.fullmatch(path)
    return None if match is None else int(match[1])


def layer_part(path: str) -> str | None:
    """A matrix's name within its layer: self_attn.q_proj."""
    match = LAYER.fullmatch(path)
    return None if match is None else match[2]


# --- PEFT --------------------------------------------------------------------------------------


def of_peft(config: dict[str, Any]) -> dict[str, Any]:
    for key, supported in PEFT_SUPPORTED.items():
        if config.get(key, supported[0]) not in supported:
            expected = " or ".join(map(repr, supported))
            raise CheckpointError(f"{key} is {shown(config[key])}; supported is {expected}")
    for key, value in config.items():
        if key not in PEFT_SUPPORTED.keys() | PEFT_READ | PEFT_IRRELEVANT and value not in PEFT_OFF:
            raise CheckpointError(f"{key} is {shown(value)}; supported is LoRA without it, or DoRA")
    if "peft_type" not in config:
        raise CheckpointError("there is no peft_type; expected PEFT's configuration, beside PEFT's weights")
    return config


def peft_plan(config: dict[str, Any], parts: Parts, matrices: Mapping[str, Shape]) -> Plan:
    ranks, scales = {}, {}
    for path, own in parts.items():
        name = next(iter(own.values())).module
        rank = ranks[path] = whole(patterned(config, "rank_pattern", "r", name), "r")
        alpha = real(patterned(config, "alpha_pattern", "lora_alpha", name), "lora_alpha")
        scales[path] = alpha / (math.sqrt(rank) if config.get("use_rslora") else max(rank, 1))
    return Plan(config.get("use_dora") is True, ranks, scales, peft_targets(config, parts, matrices))


def patterned(config: dict[str, Any], patterns: str, key: str, name: str) -> dict[str, Any]:
    """The settings of one matrix, where a pattern may say another value for `key`, as PEFT matches them."""
    own = config.get(patterns) or {}
    if not isinstance(own, dict):
        raise CheckpointError(f"{patterns} is {a(own)}; expected an object")
    try:
        found = [value for pattern, value in own.items() if re.match(rf"(.*\.)?({pattern})$", name)]
    except re.error as error:
        raise CheckpointError(f"{patterns} has a pattern that is none: {error}") from None
    return config | {key: found[0]} if found else config


def peft_targets(config: dict[str, Any], parts: Parts, matrices: Mapping[str, Shape]) -> set[str]:
    """Of a list of names all that end with one; a pattern says it of Hugging Face's names alone."""
    names, layers = config.get("target_modules"), config.get("layers_to_transform")
    if not is_names(names) or config.get("exclude_modules"):
        return set()
    layers = [layers] if isinstance(layers, int) else layers
    is_text = all(layer_of(path) is not None for path in parts)  # the decoder may have been all there was
    return {
        path
        for path in matrices
        if any(f".{peft_path(path)}".endswith(f".{name}") for name in names)
        and (layers is None or layer_of(path) in layers)
        and (not is_text or layer_of(path) is not None)
    }


# --- values of a configuration -----------------------------------------------------------------


def whole(settings: Mapping[str, Any], key: str) -> int:
    value = settings.get(key)
    if not isinstance(value, int) or isinstance(value, bool) or (value < 1 and key != "num_layers"):
        raise CheckpointError(f"{key} is {shown(value)}; expected a whole number{' above 0' * (key != 'num_layers')}")
    return value


def real(settings: Mapping[str, Any], key: str) -> float:
    value = settings.get(key)
    if not isinstance(value, int | float) or isinstance(value, bool) or not math.isfinite(value):
        raise CheckpointError(f"{key} is {shown(value)}; expected a number")
    return float(value)


def is_names(value: Any) -> TypeGuard[list[str]]:
    return isinstance(value, list) and bool(value) and all(isinstance(name, str) for name in value)


# --- writing -----------------------------------------------------------------------------------


def write_adapter(
    folder: Path, weights: Mapping[str, mx.array], kind: str, rank: int, scale: float, num_layers: int,
    more: Mapping[str, Any] | None = None,
) -> None:  # fmt: skip
    """Write an adapter as mlx-lm does, each file whole or not at all.

    weights: by path in the model, as mlx-lm's layers have them: ….lora_a [columns, r], ….lora_b [r, rows], ….m [rows].
    kind: "lora" or "dora". num_layers: how many of the last, -1 for all. more: other settings to note.
    """
    paths = {path.rpartition(".")[0] for path in weights}
    keys = sorted({layer_part(path) or conversion_name(path) for path in paths})
    settings = {"rank": rank, "scale": scale, "dropout": 0.0, "keys": keys}
    config = {**(more or {}), "fine_tune_type": kind, "num_layers": num_layers, "lora_parameters": settings}
    save(folder, WEIGHTS, {conversion_name(path): value for path, value in weights.items()}, config)


def write_peft(
    folder: Path, weights: Mapping[str, mx.array], kind: str, rank: int, scale: float, base_model: str | None
) -> None:
    """The same as PEFT has it; PEFT has no targets of its own for this model, so that all are named."""
    tensors = {}
    names = {"lora_a": "lora_A.weight", "lora_b": "lora_B.weight", "m": "lora_magnitude_vector"}
    for path, value in weights.items():
        matrix, _, part = path.rpartition(".")
        tensors[f"{PEFT_ROOT}{peft_path(matrix)}.{names[part]}"] = value.T
    config = {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": base_model,
        "r": rank,
        "lora_alpha": scale * rank,
        "lora_dropout": 0.0,
        "bias": "none",
        "use_dora": kind == "dora",
        "target_modules": sorted({peft_path(path.rpartition(".")[0]) for path in weights}),
    }
    save(folder, PEFT_WEIGHTS, tensors, config)


def save(folder: Path, name: str, tensors: Mapping[str, mx.array], config: Mapping[str, Any]) -> None:
    """The configuration first: weights without it would be nobody's."""
    folder.mkdir(parents=True, exist_ok=True)
    write_text(folder / CONFIG, json.dumps(config, indent=4))
    write_arrays(folder / name, {name: mx.contiguous(value) for name, value in tensors.items()}, {"format": "pt"})


def read_weights(file: Path) -> dict[str, mx.array]:
    """What `write_adapter` was given, to go on from: mlx-lm's parts as they lie, by path in the model."""
    if file.name == PEFT_WEIGHTS:
        raise CheckpointError(f"{file} is PEFT's; expected {WEIGHTS}, as mlx-lm and mlx_gemma4.tune write it")
    found = {}
    for path, own in list_parts(file).items():
        for name, part in own.items():
            found[f"{path}.{'m' if name == 'gain' else name}"] = part.stored.read()
    return found
