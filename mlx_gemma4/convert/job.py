"""A checkpoint -> a model folder for MLX, tensor by tensor, in memory for one block of rows at a time."""

import json
import shutil
from collections.abc import Generator, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from math import prod
from pathlib import Path
from typing import Any

import mlx.core as mx
import numpy as np
from mlx import nn

from mlx_gemma4.config import COMPUTING, GenerationConfig, ModelConfig, Quantization, read_config, read_json
from mlx_gemma4.convert import lattice
from mlx_gemma4.convert.card import Figures
from mlx_gemma4.convert.gguf import Q4_0, GGUFTensor, list_media, list_text
from mlx_gemma4.convert.recipes import Recipe, config_quantization, packed_nbytes, plan
from mlx_gemma4.convert.shards import PackedTensor, ShardWriter
from mlx_gemma4.entry import if_stopped
from mlx_gemma4.errors import CheckpointError
from mlx_gemma4.model.drafter import Drafter, DrafterConfig, check_fit, read_drafter_config
from mlx_gemma4.model.model import Model
from mlx_gemma4.prompt.processor import OLD_TEMPLATE_BYTES, PACKAGED_TEMPLATE, find_template, optional_json
from mlx_gemma4.weights.computing import own_dtype
from mlx_gemma4.weights.load import parameters
from mlx_gemma4.weights.tensors import (
    FLOATING,
    TEXT,
    Rows,
    Shape,
    Tensor,
    block_ranges,
    conversion_name,
    list_tensors,
    nbytes,
)
from mlx_gemma4.weights.whole import (
    check_tensors,
    quantization_by_path,
    quantization_of,
    quantize_empty,
    settle_drafter,
    settle_parts,
)

GENERATION = "generation_config.json"
COPIED = (
    GENERATION,
    "tokenizer.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "chat_template.jinja",
    "chat_template.json",
    "processor_config.json",
    "preprocessor_config.json",
)
GGUF_DTYPE = mx.bfloat16  # of what GGUF files hold as float32: it was bfloat16
PROBED_ROWS = 4  # of a matrix, to see whether it may lie on a lattice
CACHE_BYTES = 2**28  # freed memory that MLX may keep for the next block
LATTICE_REPORT = "lattice.tsv"


@dataclass(frozen=True)
class Source:
    """A checkpoint to convert: looked through, no values read yet."""

    folder: Path  # of config.json and of the files that are copied
    config: dict[str, Any]  # config.json as it stands
    parsed: ModelConfig | DrafterConfig
    tensors: dict[str, Rows]  # by path in the model, quantized ones as what they stand for
    stored: dict[str, Rows]  # the same as they are stored
    names: dict[str, str]  # by path, of `stored` and of `tensors` in the conversion
    dtype: mx.Dtype  # of what is not quantized

    @property
    def is_quantized(self) -> bool:
        return self.tensors.keys() != self.stored.keys()

    @property
    def weights(self) -> int:
        return sum(prod(tensor.shape) for tensor in self.tensors.values())


@dataclass(frozen=True)
class LatticeLine:
    """How a matrix was stored on its lattice."""

    name: str
    blocks: int
    inexact: int
    error: float


@dataclass
class Outcome:
    """What became of the tensors of one model; filled while they are written."""

    used: dict[str, Quantization | None] = field(default_factory=dict)  # by path, matrices only
    lattices: list[LatticeLine] = field(default_factory=list)
    figures: Figures = Figures(0, 0)  # noqa: RUF009 (frozen)


@dataclass(frozen=True)
class Job:
    """One model to write, and what became of it."""

    source: Source
    tensors: dict[str, Rows]
    config: dict[str, Any]  # to start from
    planned: dict[str, Quantization | None]  # by path
    on_lattice: frozenset[str]  # paths that seem to lie on one, and are stored there if they do
    dtype: mx.Dtype  # of what is not quantized, and of scales
    float32_scales: bool  # of lattices
    outcome: Outcome = field(default_factory=Outcome)

    def dtype_of(self, path: str) -> mx.Dtype:
        """Scales that are kept are rounded only where another type was asked for: a lattice's may be wider."""
        own = self.tensors[path].dtype
        kept = path.endswith((".scales", ".biases")) and self.dtype == self.source.dtype
        return own if kept or own not in FLOATING else self.dtype

    def scales_of(self, path: str) -> mx.Dtype:
        """The type of a lattice's scales."""
        return mx.float32 if self.float32_scales else self.dtype_of(path)

    @property
    def nbytes(self) -> int:
        """Bytes to write, if the matrices that seem to lie on a lattice do."""
        total = 0
        for path, tensor in self.tensors.items():
            found = path in self.on_lattice
            own = lattice.QUANTIZATION if found else self.planned.get(path)
            size = (self.scales_of(path) if found else self.dtype_of(path)).size
            total += packed_nbytes(tensor.shape, own, size)
        return total

    @property
    def source_nbytes(self) -> int:
        return sum(nbytes(tensor.shape, tensor.dtype) for tensor in self.tensors.values())


# --- reading -----------------------------------------------------------------------------------


def open_target(folder: Path) -> Source:
    """Look through a model folder; CheckpointError if anything is missing or wrong."""
    config, tensors = settle_parts(read_config(folder), list_tensors(folder))
    return open_source(folder, config, Model(config), tensors, {path: conversion_name(path) for path in tensors})


def open_drafter(folder: Path, target: ModelConfig) -> Source:
    """The same for a drafter, whose tensors keep their names."""
    config = read_drafter_config(folder)
    check_fit(config, target.text)
    config, tensors = settle_drafter(config, list_tensors(folder))
    return open_source(folder, config, Drafter(config), tensors, {path: own.name for path, own in tensors.items()})


def open_source(
    folder: Path,
    config: ModelConfig | DrafterConfig,
    model: nn.Module,
    tensors: dict[str, Tensor],
    names: dict[str, str],
) -> Source:
    quantization = quantization_by_path(config, "")
    quantize_empty(model, tensors, quantization)
    expected = parameters(model)
    check_tensors(expected, tensors)
    in_order = sorted(expected, key=lambda path: (tensors[path].file, tensors[path].offset))
    stored: dict[str, Rows] = {path: tensors[path] for path in in_order}
    raw = read_json(folder / "config.json")
    dtype = written_dtype(raw, own_dtype(tensors, quantization))
    rows: dict[str, Rows] = {}
    for path in in_order:
        module, tensor = path.removesuffix(".weight"), tensors[path]
        if f"{module}.scales" in expected:
            scales, biases = tensors[f"{module}.scales"], tensors.get(f"{module}.biases")
            own = quantization_of(module, quantization)
            rows[path] = PackedTensor(tensor.name, own, tensor, scales, biases if own.mode == "affine" else None)
        elif not path.endswith((".scales", ".biases")):
            rows[path] = tensor
    return Source(folder, raw, config, rows, stored, names, dtype)


def written_dtype(config: dict[str, Any], own: mx.Dtype) -> mx.Dtype:
    """The type that config.json names, unless that is wider than what the weights have."""
    text = config.get("text_config")
    holders = [config, text if isinstance(text, dict) else {}]
    names = [holder.get(key) for holder in holders for key in ("dtype", "torch_dtype")]
    found = next((COMPUTING[name] for name in names if isinstance(name, str) and name in COMPUTING), own)
    return found if found.size <= own.size else own


def open_gguf(file: Path, media: Path | None, folder: Path) -> Source:
    """The text model of a GGUF file, the embedders of another one or of a model folder, the rest of that folder."""
    config = read_config(folder)
    if media is not None:
        others = list_media(media, GGUF_DTYPE)
    else:
        others = {path: own for path, own in open_target(folder).tensors.items() if not path.startswith(TEXT)}
    tensors = list_text(file, GGUF_DTYPE) | others
    config, tensors = settle_parts(config, tensors)
    expected = {path: array.shape for path, array in parameters(Model(config)).items()}
    for path, shape in expected.items():
        if path not in tensors:
            raise CheckpointError(f"{file if path.startswith(TEXT) else media or folder} lacks the tensor for {path}")
        if tensors[path].shape != shape:
            name = tensors[path].name
            raise CheckpointError(f"{name} of the GGUF has shape {list(tensors[path].shape)}; expected {list(shape)}")
    if unknown := tensors.keys() - expected.keys():
        raise CheckpointError(f"the GGUF has a tensor {tensors[min(unknown)].name}, for which the model has no place")
    raw = read_json(folder / "config.json")
    names = {path: conversion_name(path) for path in tensors}
    return Source(folder, raw, config, tensors, tensors, names, GGUF_DTYPE)


# --- planning ----------------------------------------------------------------------------------


def make_job(source: Source, recipe: Recipe, dtype: mx.Dtype | None, float32_scales: bool = False) -> Job:
    """How to write a checkpoint by a recipe; dtype None: its own. ValueError if the recipe cannot be followed."""
    shapes = {path: tensor.shape for path, tensor in source.tensors.items()}
    dtype = dtype or source.dtype
    planned = plan(recipe, shapes, dtype.size)
    on_lattice = frozenset(path for path in planned if recipe.lattice and seems_on_lattice(source.tensors[path]))
    config = {key: value for key, value in source.config.items() if not key.startswith("quantization")}
    return Job(source, source.tensors, config, planned, on_lattice, dtype, float32_scales)


def keep_job(source: Source, dtype: mx.Dtype | None) -> Job:
    """How to write a checkpoint as it is, quantized or not."""
    return Job(source, source.stored, source.config, {}, frozenset(), dtype or source.dtype, float32_scales=False)


def seems_on_lattice(tensor: Rows) -> bool:
    """Whether a matrix may lie on a lattice, by its first rows."""
    if tensor.shape[1] % lattice.BLOCK:
        return False
    return lattice_of(tensor, 0, min(PROBED_ROWS, tensor.shape[0]), False) is not None


def lattice_of(tensor: Rows, start: int, stop: int, float32_scales: bool) -> lattice.Lattice | None:
    """That of some rows of a matrix; None if a block of them lies on none."""
    if isinstance(tensor, GGUFTensor) and tensor.kind == Q4_0:
        return tensor.lattice(start, stop, float32_scales)
    return lattice.find_lattice(np.asarray(tensor.rows(start, stop).astype(mx.float32)), float32_scales)


# --- writing -----------------------------------------------------------------------------------


def write_model(job: Job, folder: Path) -> Iterator[int]:
    """Write weights and config.json; yields the bytes of the source as they are done."""
    folder.mkdir(parents=True, exist_ok=True)
    before = mx.set_cache_limit(CACHE_BYTES)
    try:
        with ShardWriter(folder) as writer:
            for path, tensor in job.tensors.items():
                yield from write_tensor(job, path, tensor, writer)
    finally:
        mx.set_cache_limit(before)
    job.outcome.figures = Figures(writer.nbytes, job.source.weights)
    write_config(job, folder)
    if job.outcome.lattices:
        write_lattice_report(folder, job.outcome.lattices)


def write_tensor(job: Job, path: str, tensor: Rows, writer: ShardWriter) -> Iterator[int]:
    name, own, dtype = job.source.names[path], job.planned.get(path), job.dtype_of(path)
    if path in job.on_lattice:
        line = yield from write_on_lattice(job, path, tensor, writer)
        if line is not None:
            job.outcome.used[path] = lattice.QUANTIZATION
            job.outcome.lattices.append(line)
            return
    if path in job.planned:
        job.outcome.used[path] = own
    writer.begin({name: (tensor.shape, dtype)} if own is None else layout(name, tensor.shape, own, dtype))
    for start, stop in block_ranges(tensor):
        rows = tensor.rows(start, stop).astype(dtype)
        if own is None:
            writer.write({name: rows})
        else:
            writer.write(named_parts(name, *mx.quantize(rows, own.group_size, own.bits, own.mode)))
        yield rows.size * tensor.dtype.size


def write_on_lattice(
    job: Job, path: str, tensor: Rows, writer: ShardWriter
) -> Generator[int, None, LatticeLine | None]:
    """Write a matrix on its lattice; returns None, and leaves nothing, if a block of it lies on none."""
    name, scale_type = job.source.names[path], job.scales_of(path)
    writer.begin(layout(name, tensor.shape, lattice.QUANTIZATION, scale_type))
    columns, done, blocks, inexact, error = tensor.shape[1], 0, 0, 0, 0.0
    for start, stop in block_ranges(tensor):
        found = lattice_of(tensor, start, stop, scale_type == mx.float32)
        if found is None:
            writer.drop()
            yield -done
            return None
        scales = mx.array(found.scales).reshape(stop - start, -1)
        parts = mx.array(lattice.pack(found.codes, columns)), scales, lattice.LOWEST * scales
        writer.write(named_parts(name, parts[0], *(part.astype(scale_type) for part in parts[1:])))
        blocks, inexact, error = blocks + len(found.scales), inexact + found.inexact, max(error, found.error)
        done += (step := (stop - start) * columns * tensor.dtype.size)
        yield step
    return LatticeLine(name, blocks, inexact, error)


def layout(name: str, shape: Shape, own: Quantization, dtype: mx.Dtype) -> dict[str, tuple[Shape, mx.Dtype]]:
    """Shapes and types of the tensors that a quantized matrix becomes, with scales of the type `dtype`."""
    module = name.removesuffix(".weight")
    rows, columns = shape
    groups = (rows, columns // own.group_size)
    packed: dict[str, tuple[Shape, mx.Dtype]] = {f"{module}.weight": ((rows, columns * own.bits // 32), mx.uint32)}
    if own.mode != "affine":
        return packed | {f"{module}.scales": (groups, mx.uint8)}
    return packed | {f"{module}.scales": (groups, dtype), f"{module}.biases": (groups, dtype)}


def named_parts(name: str, *parts: mx.array) -> dict[str, mx.array]:
    module = name.removesuffix(".weight")
    return {f"{module}.{part}": array for part, array in zip(("weight", "scales", "biases"), parts, strict=False)}


def write_config(job: Job, folder: Path) -> None:
    config = dict(job.config)
    config["dtype"] = next(name for name, dtype in COMPUTING.items() if dtype == job.dtype)
    tied = {"tie_word_embeddings": job.source.parsed.text.tie_word_embeddings}
    config |= tied | {"text_config": config["text_config"] | tied}
    names = {job.source.names[path].removesuffix(".weight"): own for path, own in job.outcome.used.items()}
    if (quantization := config_quantization(names)) is not None:
        # the key that Hugging Face knows, too
        config |= {"quantization": quantization, "quantization_config": quantization}
    text = json.dumps(dict(sorted(config.items())), indent=4, ensure_ascii=False)
    (folder / "config.json").write_text(text, encoding="utf-8")


def write_lattice_report(folder: Path, lines: list[LatticeLine]) -> None:
    """Matrix by matrix, how many blocks no scale gives back, and by how much at most."""
    rows = [f"{line.name}\t{line.blocks}\t{line.inexact}\t{line.error:.3g}" for line in lines]
    text = "\n".join(["tensor\tblocks of 32\tnot exact\tlargest error", *rows, ""])
    (folder / LATTICE_REPORT).write_text(text, encoding="utf-8")


def copy_files(source: Path, folder: Path, generation: GenerationConfig) -> str | None:
    """Copy tokenizer, processor and generation settings; the chat template is replaced if it is outdated or missing.

    The generation settings name every stop token and what is suppressed, whatever the source's say: other engines know
    no better. Returns what there is to say about the template.
    """
    for name in COPIED:
        if (source / name).exists():
            shutil.copyfile(source / name, folder / name)
    settings = optional_json(source / GENERATION)
    settings |= {"eos_token_id": list(generation.eos_token_ids), "suppress_tokens": list(generation.suppress_tokens)}
    if settings != optional_json(source / GENERATION):
        (folder / GENERATION).write_text(json.dumps(settings, indent=2), encoding="utf-8")
    names = optional_json(folder / "tokenizer_config.json")
    template, origin = find_template(source, names)
    if template is not None and len(template.encode()) != OLD_TEMPLATE_BYTES:
        return None
    shutil.copyfile(PACKAGED_TEMPLATE, folder / "chat_template.jinja")
    if template is None:
        return "the source has no chat template: it gets the current one, of 2026-07-09"
    (folder / "chat_template.json").unlink(missing_ok=True)
    if names.pop("chat_template", None) is not None:
        (folder / "tokenizer_config.json").write_text(json.dumps(names, indent=2, ensure_ascii=False), encoding="utf-8")
    return f"the old chat template in {origin.name} leaks thoughts and loops on tools: the current one replaces it"


def part_of(path: Path) -> Path:
    """The name of a folder until it is whole."""
    return path.with_name(f".{path.name}.part")


@contextmanager
def finished_folder(path: Path) -> Iterator[Path]:
    """A folder to fill that gets its name `path` when the block has ended without an error, and goes otherwise."""
    part = part_of(path)
    if part.exists():  # of a run that was killed
        shutil.rmtree(part)

    def remove() -> None:
        shutil.rmtree(part, ignore_errors=True)

    part.mkdir(parents=True)
    try:
        with if_stopped(remove):
            yield part
            if path.exists():
                path.rmdir()  # it is empty
            part.rename(path)
    except BaseException:
        remove()
        raise
